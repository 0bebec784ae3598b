# Probes MCP servers: `main` takes the uploaded document and prints one line of JSON for each server. It runs with any Python from 3.8
# on and needs nothing but the standard library, because an image may bundle the agent server without its libraries.
#
# A server works if it answers `initialize` and `tools/list`, which is what an agent server asks for before the first message. The
# probe connects as the agent servers' MCP client does: the same transports, redirects within the origin alone, the same environment
# for commands. It prints no URL, header or variable.

import base64
import collections
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

MARK = "openhands-mcp-probe:"
PROTOCOL = "2025-06-18"
CLIENT = {"name": "openhands", "version": "1"}
LARGEST_ANSWER = 8 * 1024 * 1024
REDIRECTS = 5
METHOD_NOT_FOUND = -32601
# Variables that the MCP client passes on to commands.
INHERITED = ("HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER")
# Programs that download what they run.
DOWNLOADERS = ("bunx", "deno", "docker", "npm", "npx", "pipx", "pnpm", "podman", "uv", "uvx", "yarn")
NO_MCP = "its answer is not an MCP message"


class Failed(Exception):
    """The server does not work, for this reason."""


class Unsure(Exception):
    """The probe cannot find out whether the server works."""


class Probe:
    def __init__(self, server, limit):
        self.server = server
        own = server.get("timeout")  # In milliseconds.
        self.limit = min(limit, own / 1000) if own else limit
        self.deadline = time.monotonic() + self.limit
        self.outcome = None
        self.thread = threading.Thread(target=self.run, daemon=True)

    def run(self):
        try:
            if "command" in self.server:
                connection = Stdio(self)
            elif is_sse(self.server):
                connection = Sse(self)
            else:
                connection = StreamableHttp(self)
            handshake(connection)
            self.outcome = {"works": True}
            connection.close()
        except Failed as failed:
            self.outcome = self.outcome or {"works": False, "reason": str(failed)}
        except Unsure as unsure:
            self.outcome = self.outcome or {"unsure": str(unsure)}
        except Exception as error:
            self.outcome = self.outcome or outcome_of(error, self.slow())

    def slow(self):
        text = "it did not answer within %g s" % self.limit
        name = os.path.basename(str(self.server.get("command", "")))
        return text + (" (%s may still be downloading it)" % name if name in DOWNLOADERS else "")

    def left(self):
        return max(0.05, self.deadline - time.monotonic())


def outcome_of(error, slow):
    """The reason in words of our own: an exception's text may repeat the URL or a header."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        error = error.reason
    failed = lambda reason: {"works": False, "reason": reason}
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == 20 and not has_authorities():
            return {"unsure": "there are no TLS certificate authorities for the probe"}
        return failed("its TLS certificate is not valid: %s" % error.verify_message)
    if isinstance(error, ssl.SSLError):
        return failed("the TLS connection failed")
    if isinstance(error, (socket.timeout, TimeoutError)):
        return failed(slow)
    if isinstance(error, socket.gaierror):
        return failed("its host name cannot be resolved")
    if isinstance(error, ConnectionRefusedError):
        return failed("the connection was refused")
    if isinstance(error, (http.client.InvalidURL, UnicodeError, ValueError)):
        return failed("its URL or one of its headers is not valid")
    if isinstance(error, (http.client.HTTPException, ConnectionError)):
        return failed("it closed the connection without a complete HTTP response")
    if isinstance(error, OSError) and error.strerror:
        return failed("the connection failed: %s" % error.strerror)
    if isinstance(error, OSError) and "unnel" in str(error):
        return failed("the HTTP proxy refused the connection")
    return {"unsure": "the probe failed (%s)" % type(error).__name__}


def handshake(connection):
    params = {"protocolVersion": PROTOCOL, "capabilities": {}, "clientInfo": CLIENT}
    answer = connection.request("initialize", params)
    result = answer.get("result")
    if not isinstance(result, dict):
        raise Failed(error_text(answer, "initialize"))
    if not isinstance(result.get("protocolVersion"), str):
        raise Failed(NO_MCP)
    connection.initialized(result["protocolVersion"])
    answer = connection.request("tools/list", {})
    result = answer.get("result")
    if isinstance(result, dict) and isinstance(result.get("tools"), list):
        return
    error = answer.get("error")
    # A server without tools may say so; agent servers go on then.
    if not (isinstance(error, dict) and error.get("code") == METHOD_NOT_FOUND):
        raise Failed(error_text(answer, "tools/list"))


def error_text(answer, method):
    error = answer.get("error")
    if not isinstance(error, dict):
        return NO_MCP
    return "it answered %s with an error: %s" % (method, error.get("message"))


# --- HTTP


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def has_authorities():
    paths = ssl.get_default_verify_paths()
    return bool(paths.cafile) or bool(paths.capath and os.listdir(paths.capath))


def make_opener():
    context = ssl.create_default_context()
    if not has_authorities():
        try:
            import certifi

            context.load_verify_locations(certifi.where())
        except (ImportError, OSError):
            pass
    proxies = urllib.request.getproxies()
    every = proxies.pop("all", None)
    if every:
        proxies.setdefault("http", every)
        proxies.setdefault("https", every)
    handlers = [urllib.request.ProxyHandler(proxies), urllib.request.HTTPSHandler(context=context), NoRedirect]
    return proxies, urllib.request.build_opener(*handlers)


def is_sse(server):
    # Without a transport, the MCP client of the agent servers takes it from the path.
    transport = server.get("transport")
    if transport:
        return transport == "sse"
    return re.search(r"/sse(/|\?|&|$)", urllib.parse.urlsplit(server["url"]).path) is not None


def origin(url):
    parts = urllib.parse.urlsplit(url)
    return (parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme))


def may_follow(before, after):
    before, after = origin(before), origin(after)
    is_upgrade = before[0] == "http" and before[2] == 80 and after == ("https", before[1], 443)
    return before == after or is_upgrade


class Http:
    def __init__(self, probe):
        self.probe = probe
        self.proxies, self.opener = make_opener()
        parts = urllib.parse.urlsplit(probe.server["url"])
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise Failed("its URL is not an HTTP URL")
        if self.proxies.get(parts.scheme, "").startswith("socks") and not urllib.request.proxy_bypass(parts.hostname):
            raise Unsure("the sandbox uses a SOCKS proxy")
        self.headers = {"User-Agent": "openhands"}
        self.headers.update(probe.server.get("headers") or {})
        if "@" in parts.netloc:
            user = ":".join(urllib.parse.unquote(part or "") for part in (parts.username, parts.password))
            self.headers = {name: value for name, value in self.headers.items() if name.lower() != "authorization"}
            self.headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        netloc = parts.netloc.rpartition("@")[2]
        self.url = urllib.parse.urlunsplit(parts._replace(netloc=netloc, fragment=""))

    def open(self, method, url, message, headers, left=None):
        body = None if message is None else json.dumps(message).encode()
        for _ in range(REDIRECTS):
            request = urllib.request.Request(url, data=body, method=method)
            for name, value in list(self.headers.items()) + list(headers.items()):
                request.add_header(name, value)
            if body is not None:
                request.add_header("Content-Type", "application/json")
            try:
                return self.opener.open(request, timeout=left or self.probe.left())
            except urllib.error.HTTPError as answer:
                answer.close()
                if answer.code not in (301, 302, 303, 307, 308):
                    phrase = http.client.responses.get(answer.code, "")
                    raise Failed(("it answered %d %s" % (answer.code, phrase)).strip()) from None
                target = urllib.parse.urljoin(url, answer.headers.get("Location") or "")
                is_kept = method == "GET" or answer.code in (307, 308)
                if not is_kept or not may_follow(url, target):
                    raise Failed("it answered %d: agent servers do not follow this redirect" % answer.code) from None
                url = target
        raise Failed("it redirects in a loop")


def media_type(answer):
    return (answer.headers.get("Content-Type") or "").partition(";")[0].strip().lower()


def events(answer):
    """The events of a stream: name and data."""
    name, data, size = "message", [], 0
    while True:
        line = answer.readline(LARGEST_ANSWER)
        size += len(line)
        if not line or size > LARGEST_ANSWER:
            raise Failed("it ended its event stream without an answer")
        line = line.decode("utf-8", "replace").rstrip("\r\n")
        if line:
            field, _, value = line.partition(":")
            value = value[1:] if value.startswith(" ") else value
            if field == "event":
                name = value
            elif field == "data":
                data.append(value)
            continue
        if data:
            yield name, "\n".join(data)
        name, data = "message", []


def answer_to(number, text):
    """The JSON-RPC response with this id, if the text is or holds it."""
    try:
        message = json.loads(text)
    except ValueError:
        return None
    for one in message if isinstance(message, list) else [message]:
        if isinstance(one, dict) and one.get("id") == number and "method" not in one:
            return one
    return None


class StreamableHttp(Http):
    def __init__(self, probe):
        super().__init__(probe)
        self.number = 0
        self.session = {}

    def post(self, message):
        headers = {"Accept": "application/json, text/event-stream"}
        headers.update(self.session)
        return self.open("POST", self.url, message, headers)

    def request(self, method, params):
        self.number += 1
        message = {"jsonrpc": "2.0", "id": self.number, "method": method, "params": params}
        with self.post(message) as answer:
            session = answer.headers.get("Mcp-Session-Id")
            if session:
                self.session["Mcp-Session-Id"] = session
            if media_type(answer) == "text/event-stream":
                for _, data in events(answer):
                    found = answer_to(self.number, data)
                    if found:
                        return found
            found = answer_to(self.number, answer.read(LARGEST_ANSWER))
            if not found:
                raise Failed(NO_MCP)
            return found

    def initialized(self, version):
        self.session["Mcp-Protocol-Version"] = version
        with self.post({"jsonrpc": "2.0", "method": "notifications/initialized"}):
            pass

    def close(self):
        if "Mcp-Session-Id" in self.session:
            self.open("DELETE", self.url, None, self.session, left=min(1, self.probe.left())).close()


class Sse(Http):
    def __init__(self, probe):
        super().__init__(probe)
        self.number = 0
        self.stream = self.open("GET", self.url, None, {"Accept": "text/event-stream", "Cache-Control": "no-store"})
        if media_type(self.stream) != "text/event-stream":
            raise Failed("it did not answer with an event stream")
        self.events = events(self.stream)
        for name, data in self.events:
            if name == "endpoint":
                self.endpoint = urllib.parse.urljoin(self.stream.geturl(), data)
                break
        if origin(self.endpoint) != origin(self.stream.geturl()):
            raise Failed("its event stream names an endpoint on another host")

    def post(self, message):
        self.open("POST", self.endpoint, message, {}).close()

    def request(self, method, params):
        self.number += 1
        self.post({"jsonrpc": "2.0", "id": self.number, "method": method, "params": params})
        for _, data in self.events:
            found = answer_to(self.number, data)
            if found:
                return found

    def initialized(self, _version):
        self.post({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def close(self):
        self.stream.close()


# --- stdio

PROCESSES = []
LOCK = threading.Lock()
ENDED = threading.Event()


class Stdio:
    def __init__(self, probe):
        self.number = 0
        server = probe.server
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        environment.update(server.get("env") or {})
        pipe = subprocess.PIPE
        try:
            with LOCK:
                if ENDED.is_set():
                    raise Failed(probe.slow())
                # A session of its own: its process group is ended with all that the command starts.
                self.process = subprocess.Popen(
                    [server["command"]] + list(server.get("args") or []),
                    stdin=pipe,
                    stdout=pipe,
                    stderr=pipe,
                    env=environment,
                    cwd=server.get("cwd"),
                    start_new_session=True,
                )
                PROCESSES.append(self.process)
        except FileNotFoundError:
            is_folder = not server.get("cwd") or os.path.isdir(server["cwd"])
            raise Failed("its command was not found" if is_folder else "its working directory does not exist") from None
        except PermissionError:
            raise Failed("its command must not be run") from None
        except OSError as error:
            raise Failed("its command could not be run: %s" % error.strerror) from None
        except ValueError:
            raise Failed("its command could not be run") from None
        self.last = collections.deque(maxlen=5)
        self.drain = threading.Thread(target=self.keep_stderr, daemon=True)
        self.drain.start()

    def keep_stderr(self):
        while True:
            line = self.process.stderr.readline(4096)
            if not line:
                return
            self.last.append(line.decode("utf-8", "replace").strip())

    def send(self, message):
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # It has ended; its output tells.

    def request(self, method, params):
        self.number += 1
        self.send({"jsonrpc": "2.0", "id": self.number, "method": method, "params": params})
        while True:
            line = self.process.stdout.readline(LARGEST_ANSWER)
            if not line:
                raise Failed(self.end())
            found = answer_to(self.number, line)
            if found:
                return found

    def end(self):
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return "it closed its output without an answer"
        self.drain.join(0.2)
        said = [line for line in self.last if line]
        text = "it ended with exit code %d" % code if code >= 0 else "it was ended by signal %d" % -code
        return "%s: %s" % (text, said[-1]) if said else text

    def initialized(self, _version):
        self.send({"jsonrpc": "2.0", "method": "notifications/initialized"})

    def close(self):
        pass


def end_processes():
    with LOCK:
        ENDED.set()
        processes = list(PROCESSES)
    for process in processes:
        try:
            process.stdin.close()
        except OSError:
            pass
    wait_for(processes, 0.5)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            try:
                os.killpg(process.pid, number)
            except OSError:
                pass  # Nobody is left in it.
        if number == signal.SIGTERM:
            wait_for(processes, 0.3)


def wait_for(processes, seconds):
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.02)


def main(document):
    probes = [Probe(server, document["limit"]) for server in document["servers"]]
    for probe in probes:
        probe.thread.start()
    outcomes = []
    for probe in probes:
        probe.thread.join(max(0, probe.deadline - time.monotonic()))
        outcomes.append(probe.outcome or {"works": False, "reason": probe.slow()})
    end_processes()
    for key, outcome in zip(document["keys"], outcomes):
        print(MARK + json.dumps(dict(outcome, server=key)))
    sys.stdout.flush()
    # Threads that still wait for a server are not waited for.
    os._exit(0)
