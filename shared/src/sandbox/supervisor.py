"""Boots agent servers by fork: imports their modules once, and forks a process per request.

    python supervisor.py SOCKET [MODULE]

Runs on Linux with the Python of an installed agent server; uses only the standard library itself. Start it with an environment that
contains no secret, with LITELLM_LOCAL_MODEL_COST_MAP=True (otherwise litellm may start a thread), and in a session of its own.

- It ends when its standard input ends. The processes that it has forked go on.
- It listens on the Unix socket SOCKET before it imports anything; requests wait until the modules are imported.
- It writes one line to its standard output when its state changes: `listening`, then `ready`, or `refused: ` and a reason, after which the
  caller boots agent servers without it. It also ends when it can never fork.

A request is one connection. The supervisor accepts it and forks without reading it, so that it never has a sandbox's environment in
its memory. The forked process reads a line of JSON, which comes with two file descriptors (standard input; standard output and error):

    {"arguments": ["--port", "8000"], "environment": {"NAME": "value"}, "folder": "/working/directory"}

It answers `{"pid": 1, "boot": "fork"}`, or `{"error": "reason"}`, and waits for one byte. If the connection ends before, the process
ends. Otherwise it becomes `python -m MODULE ARGUMENTS` in a session of its own. `boot` is `exec`, and the process executes a new
Python, where an imported module has read a variable of the environment that has another value in the request.

Modules compute paths below the home directory while they are imported. They are imported with HOME set to a placeholder; the forked
process replaces it in each of these paths. Where the placeholder is in anything else than a path, the supervisor refuses to fork.
Times that modules have read while they were imported, such as that of the start of the agent server, become those of the fork.
"""

import ast
import contextlib
import gc
import importlib
import importlib.util
import json
import locale
import os
import pathlib
import random
import runpy
import select
import signal
import socket
import struct
import sys
import sysconfig
import tempfile
import time

# Not imported: a process executes them when it has its environment. `browser_use` creates folders in the home directory.
AFTER_FORK = ("openhands.agent_server.__main__", "openhands.agent_server.api", "browser_use", "openhands.tools.browser_use.impl")
# Imported besides the modules that MODULE and its `api` import, as far as they exist: uvicorn imports the protocols by name, and
# `browser_use`, which agent servers import in the background, is slow because of the modules that it imports.
ALSO_IMPORTED = (
    "anyio._backends._asyncio",
    "bubus",
    "cdp_use.client",
    "lmnr",
    "openhands.tools.preset.default",
    "posthog",
    "psutil",
    "pyotp",
    "screeninfo",
    "uuid_extensions",
    "uvicorn.lifespan.on",
    "uvicorn.loops.auto",
    "uvicorn.protocols.http.auto",
    "uvicorn.protocols.websockets.wsproto_impl",
)
# In two parts, because a library keeps the text of this file, in which it would be found.
PLACEHOLDER = "/home-of-the-sandbox" + "-7c1e0b52"
# Set by a shell that has executed the supervisor.
OF_SHELL = ("PWD", "OLDPWD", "SHLVL", "_")
# Packages that read all variables with a prefix while they are imported.
PREFIXES = {"fastmcp": "FASTMCP_", "tqdm": "TQDM_"}
# Variables that the interpreter or the dynamic linker reads before any module is imported.
OF_INTERPRETER = ("PYTHON", "LD_", "GLIBC_", "MALLOC_", "OPENSSL_")
# Set by the supervisor and not by requests: both values mean the same to the forked process.
IGNORED = {"HOME", "LITELLM_LOCAL_MODEL_COST_MAP", "OPENHANDS_SUPPRESS_BANNER", "PYTHON_DOTENV_DISABLED", "PYTHONUNBUFFERED"}
# The descriptor to which states are written.
STATES = 100
MAX_REQUEST_BYTES = 1024 * 1024
# The time in which a client sends its request, and its confirmation.
CLIENT_TIMEOUT = 30


class Refusal(Exception):
    """Why agent servers cannot be forked."""


class RecordingEnviron(type(os.environ)):
    """Records which variables are read, and which packages read all of them."""

    names = set()
    readers_of_all = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def __iter__(self):
        self.readers_of_all.add(importing_package())
        return super().__iter__()


def importing_package():
    """The top-level package whose import is the innermost of the running ones."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == "<module>":
            return frame.f_globals["__name__"].partition(".")[0]
        frame = frame.f_back
    return ""


def imported_by(name):
    """The modules that this module imports at its top level; empty if there is no such module."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return []
    with open(spec.origin, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            found.extend(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module)
    return found


class Preloaded:
    """The imported modules, and what a forked process has to replace in them."""

    def __init__(self, module):
        self.module = module
        sysconfig.get_config_vars()  # keeps the home directory, which nothing here reads
        for name in OF_SHELL:
            os.environ.pop(name, None)
        os.environ["HOME"] = PLACEHOLDER
        os.environ["OPENHANDS_SUPPRESS_BANNER"] = "1"
        # litellm would read the `.env` of any folder above its own, which may contain keys.
        os.environ["PYTHON_DOTENV_DISABLED"] = "1"
        os.environ.__class__ = RecordingEnviron
        began = time.time()
        try:
            self._import()
        finally:
            os.environ.__class__ = RecordingEnviron.__base__
        self.environment = dict(os.environ)
        strangers = RecordingEnviron.readers_of_all - set(PREFIXES)
        if strangers:
            raise Refusal(f"{', '.join(sorted(strangers))} read the whole environment while they were imported")
        objects = gc.get_objects()
        self.paths = [o for o in objects if isinstance(o, pathlib.PurePath) and str(o).startswith(PLACEHOLDER)]
        self._require_only_paths(objects)
        # Python seeds the generator of the module `random` after a fork, but no other.
        self.generators = [
            o for o in objects if isinstance(o, random.Random) and not isinstance(o, random.SystemRandom)
        ]
        now = time.time()
        self.times = [
            (vars(module), name)
            for module in sys.modules.values()
            for name, value in getattr(module, "__dict__", {}).items()
            if type(value) is float and began <= value <= now
        ]
        for path in self.paths:
            self._check(path)

    def _import(self):
        main = self.module + ".__main__"
        wanted = [*imported_by(main), *imported_by(self.module + ".api"), *ALSO_IMPORTED]
        if not imported_by(main):
            raise Refusal(f"there is no module {main}")
        for name in wanted:
            if name not in AFTER_FORK and name not in sys.modules:
                try:
                    importlib.import_module(name)
                except Exception:
                    if name not in ALSO_IMPORTED:
                        raise
        for name in AFTER_FORK:
            if name in sys.modules:
                raise Refusal(f"{name} was imported, which reads the environment of the sandbox")

    def _require_only_paths(self, objects):
        """Requires that nothing but the paths contains the placeholder, and that nothing depends on their hashes."""
        paths = {id(path) for path in self.paths}
        parts = {id(value) for path in self.paths for value in gc.get_referents(path)}
        own = {id(o) for o in (self.environment, os.environ._data, globals(), self.paths)}
        bytes_of_placeholder = PLACEHOLDER.encode()
        pending = [o for o in objects if not (id(o) in paths or id(o) in parts or id(o) in own)]
        while pending:
            container = pending.pop()
            kind = type(container).__name__
            for value in gc.get_referents(container):
                if (type(value) is str and PLACEHOLDER in value and value is not PLACEHOLDER) or (
                    type(value) is bytes and bytes_of_placeholder in value
                ):
                    raise Refusal(f"a {kind} contains the path {value} as a text")
                # The collector does not list these where all that they contain are texts and numbers.
                if type(value) in (dict, tuple) and not gc.is_tracked(value) and id(value) not in own:
                    pending.append(value)
                if id(value) not in paths:
                    continue
                keys = container if isinstance(container, (dict, set, frozenset)) else ()
                if any(id(key) == id(value) for key in keys):
                    raise Refusal(f"a {kind} has a path below the home directory as its key")

    @staticmethod
    def _check(path):
        relocated = type(path)(str(path))
        give_state(relocated, type(path)("/x" + str(path)))
        if relocated != type(path)("/x" + str(path)) or hash(relocated) == hash(path):
            raise Refusal("paths of this Python cannot be replaced")

    def obstacle(self, environment):
        """Why a process with this environment has to import the modules itself; `None` if it need not."""
        for name in environment:
            if name not in IGNORED and name.startswith((*OF_INTERPRETER, *PREFIXES.values())):
                return f"{name} is set"
        for name in RecordingEnviron.names - IGNORED:
            if name in environment and environment[name] != self.environment.get(name):
                return f"{name} is set"
            # Python itself sets LC_CTYPE where no variable sets the locale.
            if name in self.environment and name not in environment and name != "LC_CTYPE":
                return f"{name} is not set"
        if not environment.get("HOME", "").startswith("/"):
            return "HOME is not an absolute path"
        return None

    def adapt(self, environment):
        """Makes the imported modules what they would be if they had been imported with this environment."""
        for path in self.paths:
            relative = str(path)[len(PLACEHOLDER) :].lstrip("/")
            give_state(path, type(path)(environment["HOME"], relative))
        for variables, name in self.times:
            variables[name] = time.time()
        for generator in self.generators:
            generator.seed()
        numpy = sys.modules.get("numpy.random")
        if numpy is not None:
            numpy.seed()
        tempfile.tempdir = None
        time.tzset()
        with contextlib.suppress(locale.Error):  # Python does the same where the system does not have the locale
            locale.setlocale(locale.LC_CTYPE, "")


def give_state(path, source):
    """Gives a path the value of another one, in place: it may be referred to from anywhere."""
    for kind in type(path).__mro__:
        names = kind.__dict__.get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            if name == "__weakref__":
                continue
            with contextlib.suppress(AttributeError):
                delattr(path, name)
            with contextlib.suppress(AttributeError):
                setattr(path, name, getattr(source, name))


def threads():
    return len(os.listdir("/proc/self/task"))


def report(state):
    try:
        os.write(STATES, (state + "\n").encode())
    except OSError:
        pass  # the owner has ended; the end of standard input says so, too


def reap():
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def serve(listener):
    """Forks a process per connection. Returns the connection in a forked process, and `None` when standard input has ended."""
    wakeup, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    poll = select.poll()
    for descriptor in (0, wakeup, listener.fileno()):
        poll.register(descriptor, select.POLLIN)
    while True:
        reap()
        ready = dict(poll.poll())
        if wakeup in ready:
            os.read(wakeup, 4096)
        if 0 in ready and not os.read(0, 4096):
            return None
        if listener.fileno() not in ready:
            continue
        try:
            connection, _ = listener.accept()
        except OSError:
            continue
        if is_own(connection) and fork_for(connection):
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return connection
        connection.close()


def is_own(connection):
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] == os.getuid()


def fork_for(connection):
    """Forks. Returns whether this is the forked process."""
    try:
        # Another thread could hold a lock, which no one would release in the forked process.
        if threads() != 1:
            report("refused: the supervisor has more than one thread")
            raise Refusal("the supervisor has more than one thread")
        return os.fork() == 0
    except (OSError, Refusal) as error:
        answer(connection, {"error": str(error)})
        return False


def answer(connection, message):
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        pass  # the client has ended; it reads as the end of the connection


def read_request(connection):
    """Reads the request and its two file descriptors."""
    data, descriptors = b"", []
    while not data.endswith(b"\n"):
        part, received, _, _ = socket.recv_fds(connection, 65536, 2)
        descriptors.extend(received)
        data += part
        if not part or len(data) > MAX_REQUEST_BYTES:
            raise ValueError("the request is incomplete")
    request = json.loads(data)
    texts = [request["folder"], *request["arguments"], *request["environment"], *request["environment"].values()]
    if len(descriptors) != 2 or not all(isinstance(text, str) for text in texts):
        raise ValueError("the request is invalid")
    return request, descriptors


def become(connection, preloaded):
    """Becomes the agent server that the client requests."""
    os.setsid()
    connection.settimeout(CLIENT_TIMEOUT)
    request, (given_input, given_output) = read_request(connection)
    environment, arguments = request["environment"], request["arguments"]
    obstacle = preloaded.obstacle(environment)
    boot = {"boot": "fork"} if obstacle is None else {"boot": "exec", "reason": obstacle}
    answer(connection, {"pid": os.getpid(), **boot})
    if not connection.recv(1):
        os._exit(1)
    os.chdir(request["folder"])
    for descriptor, target in ((given_input, 0), (given_output, 1), (given_output, 2)):
        os.dup2(descriptor, target)
    connection.detach()
    os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if obstacle is not None:
        os.execve(sys.executable, [sys.executable, "-m", preloaded.module, *arguments], environment)
    os.environ.clear()
    os.environ.update(environment)
    if not any(environment.get(name) for name in ("LC_ALL", "LC_CTYPE", "LANG")):
        os.environ["LC_CTYPE"] = "C.UTF-8"  # as Python does
    preloaded.adapt(environment)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, write_through=True)
    with open("/proc/self/comm", "w", encoding="ascii") as file:
        file.write("agent-server")
    sys.path.insert(0, os.getcwd())
    sys.argv = [preloaded.module, *arguments]


def main():
    del sys.path[0]  # the folder of this file: nothing is imported from it
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    path, module = sys.argv[1], (sys.argv[2:] or ["openhands.agent_server"])[0]
    folder, name = os.path.split(path)
    # What modules print goes to standard error.
    os.dup2(1, STATES, inheritable=False)
    os.dup2(2, 1)
    # Bound by its name in the working directory, because the path of a socket has at most 107 bytes.
    os.chdir(folder)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name + ".new")  # of a supervisor that was killed here
    listener.bind(name + ".new")
    os.chmod(name + ".new", 0o600)
    listener.listen(128)
    os.rename(name + ".new", name)
    report("listening")
    try:
        if sys.platform != "linux":
            raise Refusal(f"{sys.platform} has no safe fork")
        preloaded = Preloaded(module)
        if threads() != 1:
            raise Refusal("the imported modules have started a thread")
    except Exception as error:
        report(f"refused: {error}")
        raise
    # A forked process would write what is buffered into its own log.
    sys.stdout.flush()
    sys.stderr.flush()
    gc.collect()
    # The collector would write to the objects, and so copy their memory into each forked process.
    gc.freeze()
    gc.disable()
    report("ready")
    connection = serve(listener)
    if connection is None:
        return None
    listener.close()
    try:
        become(connection, preloaded)
    except Exception as error:
        answer(connection, {"error": f"{type(error).__name__}: {error}"})
        raise
    gc.enable()
    return module


if __name__ == "__main__":
    agent_server = main()
    if agent_server is not None:
        # The frames of the supervisor have ended: an exit of the agent server is an exit of the process.
        runpy.run_module(agent_server, run_name="__main__", alter_sys=True)
