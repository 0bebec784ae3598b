# MCP server probe: `main` receives the uploaded document and prints one line of JSON for each server. It runs with Python 3.8 and later and
# uses only the standard library, because an image may bundle the agent server without its libraries.
#
# A server works if it responds to `initialize` and `tools/list`, the requests that an agent server sends before the first message. The
# probe connects like the agent servers' MCP client: the same transports, cookies, redirects only within the origin, the same environment
# for commands. It applies the checks of the newest client version to the responses, because that client drops the tools of all servers if
# one fails. It prints no URL, header or variable.

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
# The protocol version that the agent servers' MCP client requests, and the versions that it accepts. Version 2026-07-28 has no
# `initialize`: the clients of some older agent servers use a server that supports only that version, the newest client does not.
PROTOCOL = "2025-11-25"
PROTOCOLS = ("2024-11-05", "2025-03-26", "2025-06-18", PROTOCOL)
CLIENT = {"name": "openhands", "version": "1"}
LARGEST_ANSWER = 8 * 1024 * 1024
LARGEST_LINE = 64 * 1024
# Maximum length of a reason, in characters.
LONGEST_REASON = 250
REDIRECTS = 5
# Minimum connect timeout for each address of a host, in seconds: TCP retransmits a lost packet after one second.
LEAST_TO_CONNECT = 1.5
# The agent servers' client reads more pages; a server with this many pages works.
PAGES = 50
# Environment variables that the MCP client passes to commands.
INHERITED = ("HOME", "LOGNAME", "PATH", "SHELL", "TERM", "USER")
# Programs that download what they run.
DOWNLOADERS = ("bunx", "deno", "docker", "npm", "npx", "pipx", "pnpm", "podman", "uv", "uvx", "yarn")
# The printable ASCII characters that the agent servers' HTTP client does not escape in a path and in a query.
PATH_SAFE = "!$%&'()*+,/:;=@[\\]^|~"
QUERY_SAFE = PATH_SAFE + "?`{}"
NO_MCP = "its answer is not an MCP message"
MASK = "**********"


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
    result = result_of(connection, "initialize", params)
    version = result.get("protocolVersion")
    if not isinstance(version, str):
        raise Failed(NO_MCP)
    if version not in PROTOCOLS:
        raise Failed("it chose version %.20s of MCP, which agent servers do not support" % version)
    check("initialize", "", result, {"capabilities": dict, "serverInfo": dict}, {"instructions": str})
    check("initialize", "serverInfo.", result["serverInfo"], {"name": str, "version": str}, {"title": str})
    capabilities = ("experimental", "logging", "prompts", "resources", "tools", "completions", "tasks")
    check("initialize", "capabilities.", result["capabilities"], {}, dict.fromkeys(capabilities, dict))
    connection.initialized(version)
    cursor = None
    for _ in range(PAGES):
        result = result_of(connection, "tools/list", {"cursor": cursor} if cursor else {})
        check("tools/list", "", result, {"tools": list}, {"nextCursor": str})
        for number, tool in enumerate(result["tools"]):
            check_tool("tools[%d]" % number, tool)
        before, cursor = cursor, result.get("nextCursor")
        if not cursor or cursor == before:
            return


def check_tool(name, tool):
    if not isinstance(tool, dict):
        raise Failed("its answer to tools/list is not valid: %s" % name)
    optional = {"description": str, "title": str, "outputSchema": dict, "annotations": dict, "icons": list, "_meta": dict}
    check("tools/list", name + ".", tool, {"name": str, "inputSchema": dict}, optional)


def check(method, prefix, value, required, optional):
    """Fails unless the fields have these types; optional ones may be null."""
    for name, kind in required.items():
        if not isinstance(value.get(name), kind):
            problem = "is not valid" if value.get(name) is not None else "is missing"
            raise Failed("its answer to %s is not valid: %s%s %s" % (method, prefix, name, problem))
    for name, kind in optional.items():
        if not isinstance(value.get(name), (kind, type(None))):
            raise Failed("its answer to %s is not valid: %s%s is not valid" % (method, prefix, name))


def result_of(connection, method, params):
    answer = connection.request(method, params)
    result = answer.get("result")
    if not isinstance(result, dict):
        raise Failed(error_text(answer, method))
    return result


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
    # Each opener, and so each probe, has its own cookies; load balancers use them for session affinity.
    cookies = urllib.request.HTTPCookieProcessor()
    https = urllib.request.HTTPSHandler(context=context)
    return proxies, urllib.request.build_opener(urllib.request.ProxyHandler(proxies), https, cookies, NoRedirect)


def connect(address, timeout, source_address=None, **_):
    """As `socket.create_connection`, but all addresses of the host share the timeout: a dead one leaves time for the next."""
    end = time.monotonic() + timeout
    found = socket.getaddrinfo(address[0], address[1], 0, socket.SOCK_STREAM)
    error = OSError("the host has no address")
    for index, (family, kind, protocol, _, where) in enumerate(found):
        left = max(0.05, end - time.monotonic())
        connection = None
        try:
            connection = socket.socket(family, kind, protocol)
            connection.settimeout(min(left, max(LEAST_TO_CONNECT, left / (len(found) - index))))
            if source_address:
                connection.bind(source_address)
            connection.connect(where)
            connection.settimeout(max(0.05, end - time.monotonic()))
            return connection
        except OSError as failure:
            error = failure
            if connection is not None:
                connection.close()
    raise error


def encoded(url):
    """The URL in ASCII, as the agent servers' HTTP client sends it."""
    if any(ord(character) < 32 or ord(character) == 127 for character in url):
        raise ValueError("a control character")
    parts = urllib.parse.urlsplit(url)
    netloc, path = parts.netloc, parts.path
    if any(ord(character) > 127 for character in netloc):
        user, at, host = netloc.rpartition("@")
        host, colon, port = host.partition(":")
        netloc = user + at + ascii_host(host) + colon + port
    path = without_dots(path)
    path = urllib.parse.quote(path, safe=PATH_SAFE)
    query = urllib.parse.quote(parts.query, safe=QUERY_SAFE)
    return urllib.parse.urlunsplit((parts.scheme, netloc, path, query, ""))


def without_dots(path):
    """The path without its segments `.` and `..`; empty segments stay, as in the client."""
    segments = []
    for segment in path.split("/"):
        if segment == ".." and len(segments) > 1:
            segments.pop()
        if segment not in (".", ".."):
            segments.append(segment)
    if path.endswith(("/.", "/..")):
        segments.append("")
    return "/".join(segments)


def ascii_host(host):
    try:
        import idna

        return idna.encode(host.lower()).decode()
    except ImportError:
        # The standard library implements an older IDNA standard, which differs in these letters.
        if any(letter in host for letter in "\u00df\u03c2\u200c\u200d"):
            raise Unsure("its host name needs a newer IDNA than the sandbox has") from None
        return host.encode("idna").decode()


def is_sse(server):
    # If no transport is configured, the agent servers' MCP client derives it from the path.
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
        self.url = encoded(urllib.parse.urlunsplit(parts._replace(netloc=netloc)))

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
                target = encoded(urllib.parse.urljoin(url, as_text(answer.headers.get("Location") or "")))
                is_kept = method == "GET" or answer.code in (307, 308)
                if not is_kept or not may_follow(url, target):
                    raise Failed("it answered %d: agent servers do not follow this redirect" % answer.code) from None
                url = target
        raise Failed("it redirects in a loop")


def as_text(header):
    """A header's value, which was read as Latin-1; most servers mean UTF-8."""
    try:
        return header.encode("latin-1").decode()
    except UnicodeError:
        return header


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
                self.endpoint = encoded(urllib.parse.urljoin(self.stream.geturl(), data))
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
                # The command gets its own session, so that its process group includes all processes that it starts and can be terminated.
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
            raise Failed("its command is not executable") from None
        except OSError as error:
            raise Failed("its command could not be run: %s" % error.strerror) from None
        except ValueError:
            raise Failed("its command could not be run") from None
        self.last = collections.deque(maxlen=5)
        self.drain = threading.Thread(target=self.keep_stderr, daemon=True)
        self.drain.start()

    def keep_stderr(self):
        starts = True
        while True:
            line = self.process.stderr.readline(LARGEST_LINE)
            if not line:
                return
            # The remainder of a line that is too long may start within a secret, which could then not be masked.
            if starts:
                self.last.append(line.decode("utf-8", "replace").strip())
            starts = line.endswith(b"\n")

    def send(self, message):
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            pass  # The process has ended; its output shows the reason.

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
                pass  # The process group is empty.
        if number == signal.SIGTERM:
            wait_for(processes, 0.3)


def wait_for(processes, seconds):
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.02)


def clean(reason, secrets):
    """The reason without secrets, without what UTF-8 cannot express, and short. It is cut last, so that no secret is cut in two."""
    for secret in secrets:
        reason = reason.replace(secret, MASK)
    return reason.encode("utf-8", "replace").decode()[:LONGEST_REASON]


def main(document):
    socket.create_connection = connect
    probes = [Probe(server, document["limit"]) for server in document["servers"]]
    for probe in probes:
        probe.thread.start()
    outcomes = []
    for probe in probes:
        probe.thread.join(max(0, probe.deadline - time.monotonic()))
        outcomes.append(probe.outcome or {"works": False, "reason": probe.slow()})
    end_processes()
    for key, outcome in zip(document["keys"], outcomes):
        if "reason" in outcome:
            outcome = dict(outcome, reason=clean(outcome["reason"], document["secrets"]))
        print(MARK + json.dumps(dict(outcome, server=key)))
    sys.stdout.flush()
    # The process exits without joining threads that still wait for a server.
    os._exit(0)
