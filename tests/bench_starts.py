#!/usr/bin/env python3
"""Measures starts on this machine, as a client sees them.

    cargo build -p local && python3 tests/bench_starts.py [--binary target/debug/local] [--starts 10] [--at-once 20]
    python3 tests/bench_starts.py --new-sandboxes --binary BEFORE --binary AFTER [--starts 10]
    python3 tests/bench_starts.py --running --binary BEFORE --binary AFTER [--starts 10]

Runs the program on a new data folder, with the agent server of target/agent-server (or OPENHANDS_AGENT_SERVER_FOLDER),
and prints a table. No model is asked: the conversations have no first message, except for some with --running, whose model is a server
of this script. Only the standard library is used.

With --new-sandboxes it compares builds of the program: starts in new sandboxes one after the other, alternating between the
builds, then 4 and 20 at once, and the memory of their agent servers. With --running it compares starts in a running sandbox, with and
without a first message, alternating between the builds.
"""
import argparse, concurrent.futures, http.server, json, os, re, shutil, signal, statistics, subprocess, sys, tempfile, threading, time
import urllib.error, urllib.request

POLL = 0.02


class Server:
    def __init__(self, binary):
        self.data = tempfile.mkdtemp(prefix="bench-")
        self.log = os.path.join(self.data, "log")
        environment = dict(os.environ, LLM_MODEL="openai/none", LLM_API_KEY="none")
        environment.setdefault("OPENHANDS_AGENT_SERVER_FOLDER", os.path.abspath("target/agent-server"))
        environment.pop("SESSION_API_KEY", None)
        environment["SANDBOX_MAX_RUNNING"] = "100"
        self.process = subprocess.Popen(
            [binary, "--data", os.path.join(self.data, "data"), "--port", "0", "--log", "json"],
            stdout=subprocess.PIPE, stderr=open(self.log, "w"), env=environment, text=True)
        line = self.process.stdout.readline()
        self.base = re.search(r"http://[\d.:]+", line).group()
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def call(self, path, body=None, method=None):
        request = urllib.request.Request(self.base + path, method=method or ("GET" if body is None else "POST"),
                                         data=None if body is None else json.dumps(body).encode(),
                                         headers={"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def wait_until_alive(self):
        while True:
            try:
                self.call("/alive")
                return
            except urllib.error.HTTPError:
                time.sleep(0.2)

    def begin(self, body):
        return self.call("/api/v1/app-conversations", body)

    def wait_for(self, task, pause=POLL):
        """The finished task, and when it was seen to be so."""
        while True:
            (now,) = self.call(f"/api/v1/app-conversations/start-tasks?ids={task['id']}")
            if now["status"] == "READY":
                return now, time.monotonic()
            if now["status"] == "ERROR":
                sys.exit(f"a start failed: {now['detail']}")
            time.sleep(pause)

    def port_of(self, sandbox):
        while True:
            for line in open(self.log):
                if "sandbox.launched" in line and sandbox in line:
                    return json.loads(line)["port"]
            time.sleep(POLL)

    def memory(self):
        status = open(f"/proc/{self.process.pid}/status").read()
        return {name: int(re.search(rf"{name}:\s+(\d+) kB", status).group(1)) / 1024 for name in ("VmRSS", "VmHWM")}

    def wait_until_prepared(self):
        """Until sandboxes boot as they always will. Builds that only have plain boots do not say how."""
        while self.call("/ready")["parts"].get("sandbox_boot", "plain").startswith("being"):
            time.sleep(0.2)

    def folder(self, *names):
        return os.path.join(self.data, "data", "sandboxes", *names)

    def agent_server(self, sandbox):
        return open(self.folder(sandbox, "agent-server.pid")).read().strip()

    def supervisor(self):
        try:
            return open(self.folder(".boot", "supervisor.pid")).read().split()[0]
        except FileNotFoundError:
            return None

    def delete(self, sandboxes):
        for sandbox in sandboxes:
            self.call(f"/api/v1/sandboxes/{sandbox}", method="DELETE")

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(60)
        shutil.rmtree(self.data)


def row(what, values, unit="ms", scale=1000):
    values = sorted(value * scale for value in values)
    worst = values[min(len(values) - 1, int(len(values) * 0.99))]
    print(f"| {what} | {len(values)} | {statistics.median(values):.0f} {unit} | {worst:.0f} {unit} |", flush=True)


def first_answer(port):
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/alive", timeout=1).read()
            return time.monotonic()
        except OSError:
            time.sleep(POLL)


def proportional_mib(pid):
    text = open(f"/proc/{pid}/smaps_rollup").read()
    return int(re.search(r"^Pss:\s+(\d+) kB", text, re.M).group(1)) / 1024


def cpu_seconds(pid):
    """The CPU time of a process and of its children that have ended."""
    fields = open(f"/proc/{pid}/stat").read().rpartition(") ")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def compare(binaries, starts):
    servers = [Server(binary) for binary in binaries]
    rows = {}

    def add(what, index, text):
        rows.setdefault(what, [""] * len(servers))[index] = text

    try:
        for index, server in enumerate(servers):
            began = time.monotonic()
            server.wait_until_alive()
            server.wait_until_prepared()
            add("until sandboxes boot at full speed, once", index, f"{time.monotonic() - began:.1f} s")
        print("load average at the beginning:", *os.getloadavg(), flush=True)
        times, cpu = [[] for _ in servers], [[] for _ in servers]
        for _ in range(starts):
            for index, server in enumerate(servers):
                began = time.monotonic()
                task, ready = server.wait_for(server.begin({}))
                times[index].append(ready - began)
                cpu[index].append(cpu_seconds(server.agent_server(task["sandbox_id"])))
                # It still loads tools in the background, which belongs to no other start.
                time.sleep(4)
                server.delete([task["sandbox_id"]])
        for index, values in enumerate(times):
            text = f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"
            add(f"POST to READY in a new sandbox, median of {starts}", index, text)
            add("CPU time of its agent server until READY, median", index, f"{statistics.median(cpu[index]):.2f} s")
        for count in (4, 20):
            for index, server in enumerate(servers):

                def one(_):
                    began = time.monotonic()
                    task, ready = server.wait_for(server.begin({}), pause=0.25)
                    return task["sandbox_id"], ready - began

                with concurrent.futures.ThreadPoolExecutor(count) as pool:
                    began = time.monotonic()
                    done = list(pool.map(one, range(count)))
                    add(f"{count} new sandboxes at once, all READY", index, f"{time.monotonic() - began:.1f} s")
                time.sleep(15)
                pids = [server.agent_server(sandbox) for sandbox, _ in done]
                memory = sum(map(proportional_mib, pids)) / count
                add(f"memory per agent server while {count} run (proportional set size)", index, f"{memory:.0f} MiB")
                if server.supervisor():
                    shown = f"{proportional_mib(server.supervisor()):.0f} MiB"
                    add(f"memory of the supervisor while {count} run", index, shown)
                server.delete([sandbox for sandbox, _ in done])
        print("load average at the end:", *os.getloadavg())
        print("| |", " | ".join(binaries), "|\n|---|" + "---|" * len(binaries))
        for what, texts in rows.items():
            print(f"| {what} |", " | ".join(texts), "|")
    finally:
        for server in servers:
            server.stop()


class Model(http.server.BaseHTTPRequestHandler):
    """A language model that says one thing."""
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        message = {"role": "assistant", "content": "Done."}
        answer = json.dumps({"id": "1", "object": "chat.completion", "created": 1, "model": "none",
                             "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                             "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def compare_running(binaries, starts):
    model = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=model.serve_forever, daemon=True).start()
    os.environ["LLM_BASE_URL"] = f"http://127.0.0.1:{model.server_port}/v1"
    servers = [Server(binary) for binary in binaries]
    rows = {}
    try:
        sandboxes = []
        for server in servers:
            server.wait_until_alive()
            server.wait_until_prepared()
            sandboxes.append(server.wait_for(server.begin({}))[0]["sandbox_id"])
        # The agent servers still load tools in the background.
        time.sleep(5)
        print("load average at the beginning:", *os.getloadavg(), flush=True)
        message = {"content": [{"type": "text", "text": "Hello"}]}
        for what, body in (("without a message", {}), ("with a first message", {"initial_message": message})):
            times = [[] for _ in servers]
            for _ in range(starts):
                for index, server in enumerate(servers):
                    began = time.monotonic()
                    task = server.begin(dict(body, sandbox_id=sandboxes[index]))
                    times[index].append(server.wait_for(task, pause=0.005)[1] - began)
                    # The agent of a conversation works after READY, too.
                    time.sleep(1.5)
            rows[what] = [f"{statistics.median(of):.3f} s ({min(of):.3f} to {max(of):.3f})" for of in times]
        print("load average at the end:", *os.getloadavg())
        print("| POST to READY in a running sandbox, median (least to most) |", " | ".join(binaries), "|")
        print("|---|" + "---|" * len(binaries))
        for what, texts in rows.items():
            print(f"| {what} |", " | ".join(texts), "|")
    finally:
        for server in servers:
            server.stop()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", action="append", help="the program; several with --new-sandboxes and --running")
    parser.add_argument("--new-sandboxes", action="store_true", help="compares starts in new sandboxes")
    parser.add_argument("--running", action="store_true", help="compares starts in a running sandbox")
    parser.add_argument("--starts", type=int, default=10, help="starts one after the other")
    parser.add_argument("--at-once", type=int, default=20, help="starts at once in one sandbox")
    parser.add_argument("--own", type=int, default=4, help="starts at once with sandboxes of their own")
    a = parser.parse_args()
    binaries = a.binary or ["target/debug/local"]
    if a.running:
        compare_running(binaries, a.starts)
        return
    if a.new_sandboxes:
        compare(binaries, a.starts)
        return
    server = Server(binaries[0])
    try:
        server.wait_until_alive()
        at_rest = server.memory()
        print("| what | n | median | p99 |\n|---|---|---|---|")

        began = time.monotonic()
        task = server.begin({})
        while not task["sandbox_id"]:
            (task,) = server.call(f"/api/v1/app-conversations/start-tasks?ids={task['id']}")
            time.sleep(POLL)
        answered = first_answer(server.port_of(task["sandbox_id"]))
        task, ready = server.wait_for(task)
        sandbox = task["sandbox_id"]
        row("POST to READY, a sandbox of its own", [ready - began], "s", 1)
        row("of that: until the agent server's first `/alive`", [answered - began], "s", 1)
        row("of that: first `/alive` to READY", [ready - answered])

        posts, readies = [], []
        for _ in range(a.starts):
            began = time.monotonic()
            task = server.begin({"sandbox_id": sandbox})
            posts.append(time.monotonic() - began)
            readies.append(server.wait_for(task)[1] - began)
        row("POST to answer", posts)
        row("POST to READY, in a running sandbox", readies)

        def one(body):
            began = time.monotonic()
            # Less often: many clients that poll every 20 ms would be most of the load.
            return server.wait_for(server.begin(body), pause=0.25)[1] - began

        with concurrent.futures.ThreadPoolExecutor(64) as pool:
            began = time.monotonic()
            row(f"{a.at_once} at once in one running sandbox", list(pool.map(one, [{"sandbox_id": sandbox}] * a.at_once)))
            print(f"| all {a.at_once} READY | 1 | {time.monotonic() - began:.1f} s | |", flush=True)
            began = time.monotonic()
            row(f"{a.own} at once with sandboxes of their own", list(pool.map(one, [{}] * a.own)), "s", 1)
            print(f"| all {a.own} READY | 1 | {time.monotonic() - began:.1f} s | |", flush=True)
        memory = server.memory()
        print(f"| memory of the server at rest | 1 | {at_rest['VmRSS']:.0f} MiB | |")
        print(f"| memory of the server, largest | 1 | {memory['VmHWM']:.0f} MiB | |")
    finally:
        server.stop()


if __name__ == "__main__":
    main()
