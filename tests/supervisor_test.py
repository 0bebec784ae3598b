"""Tests of shared/src/sandbox/supervisor.py with a module that stands in for the agent server. `cargo test` runs them
(tests/it/fork.rs); by hand: python3 -m unittest tests/supervisor_test.py"""
import json
import os
import pathlib
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import unittest

PROGRAM = pathlib.Path(__file__).parents[1] / "shared/src/sandbox/supervisor.py"
LIMIT = 60

# Reports what it sees as JSON on standard output, and then waits for a signal.
MAIN = """
import json, os, pathlib, random, ssl, stand_in.paths, stand_in.tls, stand_in.generator, sys, tempfile, uuid
import signal, time
if "--die" in sys.argv:
    os._exit(3)
if "--fail" in sys.argv:
    raise RuntimeError("as requested")
incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
connection = stand_in.tls.CONTEXT.wrap_bio(incoming, outgoing, server_hostname="example.com")
try:
    connection.do_handshake()
except ssl.SSLWantReadError:
    pass
descriptors = {}
for name in os.listdir("/proc/self/fd"):
    try:
        descriptors[name] = os.readlink("/proc/self/fd/" + name)
    except OSError:
        pass  # that of the listing
print(json.dumps({
    "arguments": sys.argv, "environment": dict(os.environ), "name": __name__, "path": sys.path[0],
    "folder": os.getcwd(), "session": os.getsid(0), "group": os.getpgrp(), "pid": os.getpid(),
    "home": str(stand_in.paths.SKILLS), "equal": stand_in.paths.SKILLS in {pathlib.Path.home() / ".openhands/skills"},
    "descriptors": descriptors, "temporary": tempfile.gettempdir(),
    "random": [random.random(), stand_in.generator.OWN.random(), str(uuid.uuid4()), ssl.RAND_bytes(16).hex(),
               outgoing.read().hex()],
    "signals": [signal.getsignal(signal.SIGINT) is signal.default_int_handler, str(signal.getsignal(signal.SIGCHLD))],
    "zone": time.strftime("%Z"), "started": stand_in.paths.STARTED,
}), flush=True)
if "--exit" in sys.argv:
    sys.exit(int(sys.argv[-1]))
signal.pause()
"""
FILES = {
    "__init__.py": "",
    "__main__.py": MAIN,
    "api.py": "import stand_in.paths, stand_in.tls, stand_in.generator\nraise RuntimeError('imported before the fork')",
    "paths.py": """
        import os, pathlib
        SKILLS = pathlib.Path.home() / ".openhands" / "skills"
        import time
        STARTED = time.time()
        LEVEL = os.environ.get("LOG_LEVEL")
        """,
    "tls.py": "import ssl\nprint('ready')\nCONTEXT = ssl.create_default_context()",
    "generator.py": "import random\nOWN = random.Random()",
}


class Supervisor:
    """A supervisor with a package `stand_in`, in a folder of its own."""

    def __init__(self, files=None, left=None):
        # The path of a socket may not be longer than 107 bytes; this one is.
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="supervisor-"))
        self.sockets = self.folder / ("long" * 30)
        package = self.folder / "lib" / "stand_in"
        for folder in (self.sockets, package):
            folder.mkdir(parents=True)
        if left:
            (self.sockets / left).touch()
        for name, text in {**FILES, **(files or {})}.items():
            (package / name).write_text(textwrap.dedent(text))
        site = self.folder / "lib"
        # PYTHONPATH would make each boot one by `exec`: the folder is added as an installed one.
        start = (f"import sys; sys.path.append({str(site)!r}); sys.argv = sys.argv[1:]; program = open(sys.argv[0]); "
                 "text = program.read(); program.close(); exec(compile(text, sys.argv[0], 'exec'))")
        with open(self.folder / "errors", "w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-c", start, PROGRAM, self.sockets / "s.sock", "stand_in"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                env={"LITELLM_LOCAL_MODEL_COST_MAP": "True"}, start_new_session=True)
        self.pids = []
        self.connections = []
        assert self.state() == "listening"

    def state(self):
        readable, _, _ = select.select([self.process.stdout], [], [], LIMIT)
        assert readable, "no state was reported"
        return self.process.stdout.readline().decode().strip()

    def connect(self):
        folder = os.open(self.sockets, os.O_RDONLY)
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(LIMIT)
        self.connections.append(connection)
        connection.connect(f"/proc/self/fd/{folder}/s.sock")
        os.close(folder)
        return connection

    def request(self, name, arguments=(), **environment):
        """Sends a request. Returns the connection, and the folder of the process."""
        folder = self.folder / name
        (folder / "home").mkdir(parents=True, exist_ok=True)
        environment = {"HOME": str(folder / "home"), "PYTHONUNBUFFERED": "1", "KEY": f"key-of-{name}", **environment}
        message = {"arguments": list(arguments), "environment": environment, "folder": str(folder)}
        connection = self.connect()
        with open(folder / "lock", "w") as lock, open(folder / "log", "a") as log:
            socket.send_fds(connection, [json.dumps(message).encode() + b"\n"], [lock.fileno(), log.fileno()])
        return connection, folder

    def boot(self, name, arguments=(), **environment):
        """Boots a process. Returns the answer, and what the process reports."""
        connection, folder = self.request(name, arguments, **environment)
        answer = json.loads(line(connection))
        self.pids.append(answer["pid"])
        connection.sendall(b"\n")
        log = folder / "log"
        wait(lambda: "}\n" in log.read_text(), f"{name} reports")
        (report,) = (line for line in log.read_text().splitlines() if line.startswith("{"))
        return answer, json.loads(report)

    def close(self):
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, *self.connections):
            file.close()
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(self.folder)


def wait(condition, what):
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end, f"not in time: {what}"
        time.sleep(0.01)


def line(connection):
    with connection.makefile() as file:
        return file.readline()


def exists(pid):
    return os.path.exists(f"/proc/{pid}")


class Forks(unittest.TestCase):
    def supervisor(self, **options):
        supervisor = Supervisor(**options)
        self.addCleanup(supervisor.close)
        return supervisor

    def ready(self, **options):
        supervisor = self.supervisor(**options)
        self.assertEqual(supervisor.state(), "ready", (supervisor.folder / "errors").read_text())
        return supervisor

    def test_a_process_has_what_its_request_says_and_nothing_else(self):
        supervisor = self.ready()
        ready = time.time()
        sees = {}
        for name in ("one", "two"):
            answer, sees[name] = supervisor.boot(name, ["--port", "1"], TZ="America/Bogota", TMPDIR="/tmp")
            self.assertEqual(answer, {"pid": sees[name]["pid"], "boot": "fork"})
        for name, other in (("one", "two"), ("two", "one")):
            seen, folder = sees[name], str(supervisor.folder / name)
            self.assertEqual(seen["arguments"][1:], ["--port", "1"])
            self.assertEqual(seen["name"], "__main__")
            self.assertEqual((seen["folder"], seen["path"]), (folder, folder))
            self.assertEqual({seen["session"], seen["group"]}, {seen["pid"]}, "a session of its own")
            expected = {"HOME": folder + "/home", "PYTHONUNBUFFERED": "1", "KEY": "key-of-" + name,
                        "TZ": "America/Bogota", "TMPDIR": "/tmp", "LC_CTYPE": "C.UTF-8"}
            self.assertEqual(seen["environment"], expected)
            self.assertEqual(seen["home"], folder + "/home/.openhands/skills")
            self.assertTrue(seen["equal"], "and it has the hash of that path")
            files = {"0": folder + "/lock", "1": folder + "/log", "2": folder + "/log"}
            self.assertEqual(seen["descriptors"], files)
            self.assertEqual(seen["signals"], [True, "0"])
            self.assertEqual(seen["zone"], "-05")
            self.assertGreater(seen["started"], ready)
            self.assertNotIn(other, json.dumps(seen["environment"]))
        pairs = zip(sees["one"]["random"], sees["two"]["random"])
        self.assertEqual([one == two for one, two in pairs], [False] * 5)

    def test_the_supervisor_reads_no_request(self):
        supervisor = self.ready()
        supervisor.boot("one", SECRET="canary-" + "of-the-request")
        found = []
        with open(f"/proc/{supervisor.process.pid}/maps") as maps, open(
            f"/proc/{supervisor.process.pid}/mem", "rb", buffering=0
        ) as memory:
            for line in maps:
                addresses, modes, *_ = line.split()
                begin, end = (int(address, 16) for address in addresses.split("-"))
                if not modes.startswith("r") or "[v" in line:
                    continue
                memory.seek(begin)
                try:
                    content = memory.read(end - begin)
                except OSError:
                    continue
                found.extend(word for word in (b"canary-of-the-request", b"key-of-one") if word in content)
                if b"--die" in content or PROGRAM.name.encode() in content:
                    found.append("control")
        self.assertEqual(set(found), {"control"})

    def test_a_variable_that_was_read_makes_a_new_python(self):
        supervisor = self.ready()
        for name, variable in {"LOG_LEVEL": "DEBUG", "PYTHONHASHSEED": "1", "FASTMCP_X": "1", "LD_X": "1"}.items():
            answer, seen = supervisor.boot("with-" + name, [], PYTHONPATH=str(supervisor.folder / "lib"), **{name: variable})
            self.assertEqual((answer["boot"], answer["pid"]), ("exec", seen["pid"]))
            self.assertTrue(answer["reason"].endswith(" is set"), answer)
            self.assertEqual(seen["environment"][name], variable)
            home = str(supervisor.folder / ("with-" + name) / "home")
            self.assertEqual(seen["home"], home + "/.openhands/skills")
            self.assertEqual(len(seen["descriptors"]), 3, seen["descriptors"])

    def test_a_process_starts_with_a_locale_that_does_not_exist_and_after_a_crash_of_the_supervisor(self):
        supervisor = self.ready(left="s.sock.new")
        answer, seen = supervisor.boot("one", LC_CTYPE="xx_XX.UTF-8")
        self.assertEqual((answer["boot"], seen["environment"]["LC_CTYPE"]), ("fork", "xx_XX.UTF-8"))

    def test_what_cannot_be_forked_is_refused_with_the_reason(self):
        thread = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
        for name, text, reason in (
            ("tls.py", thread, "have started a thread"),
            ("tls.py", "import os\nALL = dict(os.environ)", "stand_in read the whole environment"),
            ("tls.py", "import os\nSKILLS = [os.path.expanduser('~/skills')]", "as a text"),
            ("tls.py", "import os\nSKILLS = {'a': os.path.expanduser('~/skills')}", "as a text"),
            ("tls.py", "import os\nSKILLS = [{'a': (os.path.expanduser('~/skills'), 1)}]", "as a text"),
            ("tls.py", "import os\nSKILLS = b'file://' + os.path.expanduser('~').encode()", "as a text"),
            ("tls.py", "import pathlib\nALL = {pathlib.Path.home() / 'x': 1}", "a dict has a path"),
            ("tls.py", "import pathlib\nALL = frozenset([pathlib.Path.home() / 'x'])", "a frozenset has a path"),
            ("tls.py", "import stand_in.api", "imported before the fork"),
            ("tls.py", "import no_such_module", "no_such_module"),
        ):
            supervisor = self.supervisor(files={name: text})
            state = supervisor.state()
            self.assertTrue(state.startswith("refused: ") and reason in state, state)
            # A thread that is not a daemon would keep the process.
            self.assertNotEqual(supervisor.process.wait(LIMIT), 0)
            with self.assertRaises(ConnectionRefusedError):
                supervisor.connect()

    def test_a_client_that_goes_away_starts_nothing(self):
        supervisor = self.ready()
        connection, folder = supervisor.request("one")
        pid = json.loads(line(connection))["pid"]
        self.assertTrue(exists(pid))
        connection.shutdown(socket.SHUT_RDWR)
        wait(lambda: not exists(pid), "the process has ended and is reaped")
        self.assertEqual((folder / "log").read_text(), "")
        # One that sends nothing, and one that sends something else.
        supervisor.connect().close()
        connection = supervisor.connect()
        connection.sendall(b"{}\n")
        self.assertIn("error", json.loads(line(connection)))
        self.assertEqual(supervisor.boot("two")[0]["boot"], "fork")

    def test_processes_are_reaped_and_report_their_errors(self):
        supervisor = self.ready()
        for arguments in (["--die"], ["--fail"]):
            connection, folder = supervisor.request("one", arguments)
            pid = json.loads(line(connection))["pid"]
            connection.sendall(b"\n")
            wait(lambda: not exists(pid), "the process is reaped")
        self.assertIn("RuntimeError: as requested", (folder / "log").read_text())
        _, seen = supervisor.boot("two", ["--exit", "7"])
        wait(lambda: not exists(seen["pid"]), "the process is reaped")

    def test_it_ends_with_its_owner_and_its_processes_go_on(self):
        supervisor = self.ready()
        _, seen = supervisor.boot("one")
        supervisor.process.stdin.close()
        self.assertEqual(supervisor.process.wait(LIMIT), 0)
        self.assertTrue(exists(seen["pid"]))
        # So do those of one that is killed; and a request that waits meanwhile fails.
        supervisor = self.ready()
        _, seen = supervisor.boot("one")
        os.kill(supervisor.process.pid, signal.SIGSTOP)
        connection, folder = supervisor.request("two")
        supervisor.process.kill()
        try:
            self.assertEqual(connection.recv(1), b"")
        except ConnectionResetError:
            pass
        self.assertTrue(exists(seen["pid"]))
        self.assertEqual((folder / "log").read_text(), "")


if __name__ == "__main__":
    unittest.main()
