"""The supervisor in a MicroVM: answers the hooks of AWS Lambda, and keeps one agent server running.

    python3 guest.py                    # listens for hooks
    python3 guest.py fork SOCKET ...    # internal: requests an agent server from supervisor.py

Uses only the standard library. AWS calls `POST /aws/lambda-microvms/runtime/v1/<hook>`:

- `ready` and `validate`, when the image is built: prepares the agent server, so that the snapshot has its modules in memory. With an
  AGENT_SERVER_PYTHON, the fork supervisor (supervisor.py beside this file) imports them; otherwise the agent server is started once with a
  key that is thrown away, and stopped, so that its files are in the page cache.
- `run`, once, when a MicroVM starts: starts the agent server with the environment of the payload,
  `{"v": 1, "environment": {"NAME": "value"}}`, and responds before it answers. A second `run` is refused.
- `suspend`: writes what is in the file system's cache. `resume`: nothing. `terminate`: stops the agent server.

An agent server that ends is started again, after a pause that doubles; one that has ended five times within a minute stays down. No secret
is in memory before `run`, because a snapshot has everything that is in memory. Requests come from AWS's proxy on this machine; others probe
the port with garbage, which must not end the listener.
"""

import contextlib
import http.server
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

PREFIX = "/aws/lambda-microvms/runtime/v1/"
MAX_PAYLOAD_BYTES = 64 * 1024
# How long `ready` may take. AWS permits an hour.
PREPARE_TIMEOUT = 600
FORK_TIMEOUT = 60
STOP_TIMEOUT = 5
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0
MAX_ENDS, ENDS_WITHIN = 5, 60

HOOK_PORT = int(os.environ.get("GUEST_HOOK_PORT", "9000"))
AGENT_PORT = int(os.environ.get("GUEST_AGENT_PORT", "8000"))
ADDRESS = os.environ.get("GUEST_ADDRESS", "0.0.0.0")
WORKSPACE = os.environ.get("GUEST_WORKSPACE", "/workspace")
# The user that runs the agent server; empty: the one that runs this program.
USER = os.environ.get("GUEST_USER", "10001")
PYTHON = os.environ.get("AGENT_SERVER_PYTHON", "")
PROGRAM = os.environ.get("AGENT_SERVER_PROGRAM", "/usr/local/bin/openhands-agent-server")
HERE = os.path.dirname(os.path.abspath(__file__))
# Passed on to agent servers and to the fork supervisor. Nothing else is.
INHERITED = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "GUEST_MARK")


def log(event, **fields):
    print(json.dumps({"event": event, **fields}), file=sys.stderr, flush=True)


def identity():
    """The arguments of Popen with which a process runs as USER."""
    return {"user": int(USER), "group": int(USER), "extra_groups": []} if USER else {}


def inherited():
    return {name: os.environ[name] for name in INHERITED if name in os.environ}


class Refusal(Exception):
    """Why a hook fails: a status and a reason that AWS shows."""

    def __init__(self, status, reason):
        super().__init__(reason)
        self.status = status


class ForkSupervisor:
    """Runs supervisor.py, which imports the agent server's modules once and forks processes."""

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="boot-")
        if USER:
            os.chown(self.folder, int(USER), int(USER))
        self.socket = os.path.join(self.folder, "boot.sock")
        self.process = subprocess.Popen(
            [PYTHON, os.path.join(HERE, "supervisor.py"), self.socket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd="/",
            env={**inherited(), "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            start_new_session=True,
            **identity(),
        )

    def wait(self):
        """Waits until the modules are imported. Returns whether processes can be forked."""
        deadline = time.monotonic() + PREPARE_TIMEOUT
        buffer = b""
        while time.monotonic() < deadline:
            if not select.select([self.process.stdout], [], [], 1)[0]:
                continue
            data = os.read(self.process.stdout.fileno(), 4096)
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                state = line.decode(errors="replace")
                if state == "ready":
                    return True
                if state.startswith("refused"):
                    log("supervisor.refused", reason=state)
                    return False
            if not data:
                log("supervisor.ended", status=self.process.wait())
                return False
        return False

    def fork(self, arguments, environment, folder):
        """Requests an agent server, by a process of its user. Returns the process id."""
        request = json.dumps({"arguments": arguments, "environment": environment, "folder": folder})
        helper = subprocess.run(
            [sys.executable, os.path.abspath(__file__), "fork", self.socket],
            input=request.encode(),
            stdout=subprocess.PIPE,
            timeout=FORK_TIMEOUT + 10,
            check=True,
            **identity(),
        )
        answer = json.loads(helper.stdout)
        log("agent_server.forked", boot=answer.get("boot"), reason=answer.get("reason"))
        return answer["pid"]


def fork_request(path):
    """Sends the request in standard input to supervisor.py and prints the answer. Runs in a process of the agent server's user."""
    request = sys.stdin.buffer.read()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(FORK_TIMEOUT)
        os.chdir(os.path.dirname(path))
        connection.connect(os.path.basename(path))
        with open(os.devnull, "rb") as given_input:
            socket.send_fds(connection, [request + b"\n"], [given_input.fileno(), 2])
        answer = b""
        while not answer.endswith(b"\n"):
            part = connection.recv(4096)
            if not part:
                raise SystemExit("the supervisor has closed the connection")
            answer += part
        if "pid" not in json.loads(answer):
            raise SystemExit(answer.decode())
        connection.sendall(b"\n")
    sys.stdout.buffer.write(answer)


class Agent:
    """The agent server of this MicroVM."""

    def __init__(self):
        self.lock = threading.Lock()
        self.supervisor = None
        self.can_fork = False
        self.environment = None
        self.is_stopped = False
        self.pid = None

    def prepare(self):
        with self.lock:
            if PYTHON:
                if self.supervisor is None:
                    self.supervisor = ForkSupervisor()
                    self.can_fork = self.supervisor.wait()
                return
            self._try_program()

    def _try_program(self):
        key = os.urandom(16).hex()
        folder = tempfile.mkdtemp(prefix="prepare-")
        if USER:
            os.chown(folder, int(USER), int(USER))
        environment = {**inherited(), "HOME": folder, "OH_SESSION_API_KEYS_0": key, "OH_SECRET_KEY": key}
        process = subprocess.Popen(
            [PROGRAM, "--port", str(AGENT_PORT)], cwd=folder, env=environment, start_new_session=True, **identity()
        )
        deadline = time.monotonic() + PREPARE_TIMEOUT
        try:
            while not is_alive():
                if process.poll() is not None:
                    raise Refusal(500, f"the agent server has ended with status {process.returncode}")
                if time.monotonic() > deadline:
                    raise Refusal(500, "the agent server does not respond")
                time.sleep(0.2)
        finally:
            stop(process.pid, process.poll)
            shutil.rmtree(folder, ignore_errors=True)

    def run(self, environment):
        with self.lock:
            if self.environment is not None:
                raise Refusal(409, "this MicroVM runs already")
            project = os.path.join(WORKSPACE, "project")
            os.makedirs(project, exist_ok=True)
            home = environment.get("HOME") or os.path.join(WORKSPACE, ".home")
            os.makedirs(home, exist_ok=True)
            if USER:
                for folder in (WORKSPACE, project, home):
                    os.chown(folder, int(USER), int(USER))
            self.environment = {**inherited(), "HOME": home, **environment}
            self.folder = project
        threading.Thread(target=self._keep_running, daemon=True).start()

    def _keep_running(self):
        pause, ends = FIRST_PAUSE, []
        while not self.is_stopped:
            try:
                self._boot_and_wait()
            except Exception as error:
                log("agent_server.not_started", error=f"{type(error).__name__}: {error}")
            if self.is_stopped:
                return
            now = time.monotonic()
            ends = [end for end in ends if now - end < ENDS_WITHIN] + [now]
            if len(ends) >= MAX_ENDS:
                log("agent_server.stays_down")
                return
            log("agent_server.ended")
            time.sleep(pause)
            pause = FIRST_PAUSE if len(ends) == 1 else min(2 * pause, LONGEST_PAUSE)

    def _boot_and_wait(self):
        arguments = ["--host", ADDRESS, "--port", str(AGENT_PORT)]
        if self.can_fork and self.supervisor.process.poll() is None:
            self.pid = self.supervisor.fork(arguments, self.environment, self.folder)
            wait_for_end(self.pid)
            return
        command = [PYTHON, "-m", "openhands.agent_server"] if PYTHON else [PROGRAM]
        process = subprocess.Popen(
            [*command, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **identity(),
        )
        self.pid = process.pid
        process.wait()

    def terminate(self):
        self.is_stopped = True
        if self.pid is not None:
            stop(self.pid, lambda: None if os.path.exists(f"/proc/{self.pid}") else 0)


def wait_for_end(pid):
    """Waits until a process has ended that is not a child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([descriptor], [], [])
    finally:
        os.close(descriptor)


def stop(pid, ended):
    """Stops the session of a process."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT
    while ended() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def is_alive():
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{AGENT_PORT}/alive", timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def environment_of(body):
    """The environment in the payload of `run`, which AWS wraps into a text."""
    try:
        payload = json.loads(json.loads(body)["runHookPayload"])
        environment = payload["environment"]
        if payload["v"] != 1:
            raise ValueError("unknown version")
        for name, value in environment.items():
            if not (isinstance(name, str) and isinstance(value, str)) or "=" in name or "\0" in name + value:
                raise ValueError("not an environment")
    except (AttributeError, KeyError, TypeError, ValueError):
        # Without the error, which may quote the payload.
        raise Refusal(400, "the payload of the run hook is not valid") from None
    # In a test, where this machine is no sandbox.
    relocated = WORKSPACE != "/workspace"
    return {
        name: WORKSPACE + value.removeprefix("/workspace") if relocated and value.startswith("/workspace/") else value
        for name, value in environment.items()
    }


class Hooks(http.server.BaseHTTPRequestHandler):
    timeout = 60
    agent = None

    def do_POST(self):
        if not self.path.startswith(PREFIX):
            return self.respond(404, "unknown path")
        hook = self.path.removeprefix(PREFIX).partition("?")[0]
        try:
            length = int(self.headers.get("Content-Length") or "0")
            if not 0 <= length <= MAX_PAYLOAD_BYTES:
                raise Refusal(413, "the payload is too large")
            body = self.rfile.read(length)
            self.call(hook, body)
            self.respond(200, "ok")
        except Refusal as refusal:
            self.respond(refusal.status, str(refusal))
        except ValueError:
            self.respond(400, "the request is not valid")
        except Exception as error:
            self.respond(500, type(error).__name__)
        return None

    def call(self, hook, body):
        if hook in ("ready", "validate"):
            self.agent.prepare()
        elif hook == "run":
            self.agent.run(environment_of(body))
        elif hook == "suspend":
            os.sync()
        elif hook == "terminate":
            self.agent.terminate()
        elif hook != "resume":
            raise Refusal(404, "unknown hook")

    def respond(self, status, text):
        data = json.dumps({"message": text}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass  # requests contain keys


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        log("hook.connection_failed", error=type(sys.exc_info()[1]).__name__)


def main():
    if sys.argv[1:2] == ["fork"]:
        fork_request(sys.argv[2])
        return
    Hooks.agent = Agent()
    log("hooks.listening", port=HOOK_PORT)
    Server((ADDRESS, HOOK_PORT), Hooks).serve_forever()


if __name__ == "__main__":
    main()
