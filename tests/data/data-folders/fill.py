#!/usr/bin/env python3
"""Fills a data folder with a given build of `local`, and packs it as NAME.tar.gz with the list of its contents in expected.json.

    python3 fill.py PROGRAM NAME

PROGRAM is the executable `target/debug/local` of the commit whose data folder is to be kept. The script drives it over HTTP; a stand-in
for the runtime API and for agent servers runs in this process, and holds starts and deletions in the state that the folder has to
contain. At the end the program is killed, as `kill -9` does, so that leases and unfinished work stay. Takes about two minutes.
"""
import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent
API_KEY = "key-of-the-runtime-api"
LLM_KEY = "sk-key-of-the-model"
STATUSES = ["WORKING", "WAITING_FOR_SANDBOX", "PREPARING_REPOSITORY", "RUNNING_SETUP_SCRIPT", "SETTING_UP_GIT_HOOKS",
            "SETTING_UP_SKILLS", "STARTING_CONVERSATION"]
# The request that never gets a response (or the command that never ends) in a sandbox whose start stays in this status.
HELD = {"PREPARING_REPOSITORY": "/prepare-repository'", "RUNNING_SETUP_SCRIPT": "/setup-script'", "SETTING_UP_GIT_HOOKS": "/git-hooks'"}


class StandIn:
    """The runtime API at / and the agent server of each session at /agent/SESSION."""

    def __init__(self):
        self.sessions, self.next, self.lock, self.commands = {}, {}, threading.Lock(), {}
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def handle_any(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                url = urllib.parse.urlparse(self.path)
                answer = stand_in.answer(self.command, url.path, urllib.parse.parse_qs(url.query), body)
                if answer is None:  # held until the program is killed
                    threading.Event().wait(600)
                    return
                status, value = answer
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_POST = do_DELETE = do_PATCH = do_PUT = handle_any

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def shown(self, name):
        session = self.sessions[name]
        return {"session_id": name, "runtime_id": session["runtime_id"], "session_api_key": session["key"],
                "url": f"{self.url}/agent/{name}", "status": session["status"], "pod_status": "ready"}

    def answer(self, method, path, query, body):
        parts = path.strip("/").split("/")
        if parts[0] == "agent":
            return self.agent(method, self.sessions[parts[1]], parts[2:], query, body)
        with self.lock:
            if path == "/start":
                name = json.loads(body)["session_id"]
                held = self.next.get("held")
                if held == "WORKING":
                    return None
                number = len(self.sessions) + 1
                status = "starting" if held == "WAITING_FOR_SANDBOX" else "running"
                self.sessions[name] = {"runtime_id": f"runtime-{number}", "key": f"key-of-session-{number}", "status": status,
                                       "conversations": {}, **self.next}
                return 200, self.shown(name)
            if path == "/sessions/batch":
                return 200, [self.shown(name) if name in self.sessions else None for name in query.get("ids", [])]
            if parts[0] == "sessions":
                return (200, self.shown(parts[1])) if parts[1] in self.sessions else (404, {"detail": "Runtime not found"})
            runtime = json.loads(body)["runtime_id"]
            session = next(found for found in self.sessions.values() if found["runtime_id"] == runtime)
            if parts[0] == "stop" and session.get("cannot_stop"):
                return None
            session["status"] = {"pause": "paused", "resume": "running", "stop": "stopped"}[parts[0]]
            return 200, {"status": "success"}

    def agent(self, method, session, parts, query, body):
        held, path = session.get("held"), "/".join(parts)
        if path == "alive":
            return 200, {"status": "ok"}
        if path == "server_info":
            return 200, {"version": "1.58.2", "uptime": 10000.0, "idle_time": 0.0}
        if path in ("api/bash/start_bash_command", "api/bash/execute_bash_command"):
            command = json.loads(body)["command"]
            number = uuid.uuid4().hex
            code = 1 if session.get("clone_fails") and "/prepare-repository'" in command else 0
            self.commands[number] = None if HELD.get(held, "\0") in command else code
            return 200, {"id": number, "exit_code": code, "stdout": "", "stderr": "no such repository" if code else ""}
        if path == "api/bash/bash_events/search":
            code = self.commands[query["command_id__eq"][0]]
            items = [] if code is None else [{"exit_code": code, "stdout": "", "stderr": "no such repository" if code else "", "order": 0}]
            return 200, {"items": items, "next_page_id": None}
        if path == "api/file/upload":
            return 200, {"success": True}
        if path == "api/skills":
            return None if held == "SETTING_UP_SKILLS" else (200, {"skills": []})
        if path == "api/hooks":
            return 200, {"hook_config": None}
        if path == "api/conversations" and method == "POST":
            if held == "STARTING_CONVERSATION":
                return None
            made = json.loads(body)
            number = str(uuid.UUID(made["conversation_id"]))
            session["conversations"][number] = {"id": number, "execution_status": "idle", "title": None,
                                                "last_user_message_id": str(uuid.uuid4()) if made.get("initial_message") else None}
            return 200, session["conversations"][number]
        if path == "api/conversations":
            return 200, [session["conversations"].get(number) for number in query.get("ids", [])]
        if path.endswith("/events/search"):
            return 200, {"items": [], "next_page_id": None}
        if method == "DELETE" and session.get("cannot_delete"):
            return None
        return 200, {"success": True}


class Program:
    def __init__(self, program, data, stand_in, **more):
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment.update(SANDBOX_REMOTE_RUNTIME_API_URL=stand_in.url, SANDBOX_API_KEY=API_KEY, LLM_MODEL="openai/a-model", LLM_API_KEY=LLM_KEY,
                           SANDBOX_STARTUP_TIMEOUT="3600", **more)
        self.environment, self.program, self.data = environment, program, data
        self.process = subprocess.Popen([program, "--data", data, "--port", "0", "--sandbox", "remote"], env=environment,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        line = self.process.stdout.readline().decode()
        self.url = line.split()[-1]

    def call(self, method, path, body=None, key=None, raw=False, may_fail=False):
        request = urllib.request.Request(self.url + path, method=method, data=None if body is None else json.dumps(body).encode())
        request.add_header("content-type", "application/json")
        if key:
            request.add_header("x-session-api-key", key)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                data = response.read()
        except urllib.error.HTTPError as error:
            if may_fail:
                return error.code
            raise RuntimeError(f"{method} {path}: {error.code} {error.read()[:500]}") from error
        return data if raw else json.loads(data or b"null")

    def start(self, **body):
        return self.call("POST", "/api/v1/app-conversations", body)["id"]

    def until(self, task, status):
        for _ in range(600):
            shown = self.call("GET", f"/api/v1/app-conversations/start-tasks?ids={task}")[0]
            if shown["status"] == status:
                return shown
            if shown["status"] in ("READY", "ERROR"):
                raise RuntimeError(f"{shown}")
            time.sleep(0.1)
        raise RuntimeError(f"{task} does not become {status}: {shown}")

    def command(self, *arguments, **options):
        return subprocess.run([self.program, "--data", self.data, *arguments], env=self.environment, check=True, capture_output=True,
                              text=True, **options).stdout

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def event(number, **more):
    return {"id": f"event-{number:04}", "timestamp": f"2026-11-20T10:{number // 60:02}:{number % 60:02}.000000", "source": "agent",
            "kind": "MessageEvent", "llm_message": {"role": "assistant", "content": [{"type": "text", "text": f"text {number}"}]}, **more}


def stats(number, cost):
    usage = {"model": "openai/a-model", "prompt_tokens": 100, "completion_tokens": 20, "cache_read_tokens": 0, "cache_write_tokens": 0,
             "reasoning_tokens": 0, "context_window": 1000, "per_turn_token": 120, "response_id": "r"}
    metrics = {"model_name": "openai/a-model", "accumulated_cost": cost, "max_budget_per_task": None, "accumulated_token_usage": usage}
    return event(number, kind="ConversationStateUpdateEvent", key="stats", value={"usage_to_metrics": {"agent": metrics}})


def message(text):
    return {"content": [{"type": "text", "text": text}]}


def fill(program, data, name):
    stand_in = StandIn()
    # Exports are left to the worker, so that their rows stay; starts return to the queue, so that the ids of their commands are stored.
    server = Program(program, data, stand_in, EXPORT_BUDGET_MS="0", START_INLINE_WAIT_MS="1000")
    expected = {"layout": 1, "conversations": {}, "start_tasks": {}, "events": {}, "other_users": {}}
    # Settings, with secrets and tokens.
    server.call("POST", "/api/v1/settings", {"agent_settings_diff": {"llm": {"model": "openai/a-model", "api_key": LLM_KEY}}})
    server.call("POST", "/api/v1/settings", {"provider_tokens": {"github": {"token": "ghp_token-of-the-fixture"}, "gitlab": {
        "token": "glpat-token-of-the-fixture", "host": "https://git.example.org"}}})
    server.call("POST", "/api/v1/secrets", {"name": "A_SECRET", "value": "value-of-the-secret", "description": "of the fixture"})

    sessions = {}

    def ready(may=None, **body):
        with stand_in.lock:
            stand_in.next = may or {}
        task = server.start(**body)
        shown = server.until(task, "READY")
        expected["start_tasks"][task] = "READY"
        # The name of a session is a hash; the newest one is that of this start, unless it has joined its parent's sandbox.
        sessions.setdefault(shown["sandbox_id"], list(stand_in.sessions.values())[-1])
        return task, shown["app_conversation_id"], shown["sandbox_id"]

    def report(conversation, sandbox, events):
        server.call("POST", f"/api/v1/webhooks/events/{uuid.UUID(conversation)}", events, key=sessions[sandbox]["key"])

    def snapshot(conversation, sandbox, **more):
        body = {"id": str(uuid.UUID(conversation)), "execution_status": "running", "updated_at": "2026-11-20T11:00:00Z",
                "workspace": {"working_dir": "/workspace/project"}, "agent": {"llm": {"model": "openai/stub", "usage_id": "agent"}}, **more}
        server.call("POST", "/api/v1/webhooks/conversations", body, key=sessions[sandbox]["key"])

    _, top, sandbox = ready(title="Top level, with metrics and events", initial_message=message("Hello"))
    report(top, sandbox, [event(number) for number in range(1, 151)])
    report(top, sandbox, [event(151, text="x" * (400 * 1024)), stats(152, 1.25)])
    expected["events"][top] = {"count": 152, "large": "event-0151", "first": "event-0001"}
    _, child, _ = ready(title="Sub-conversation", parent_conversation_id=top)
    _, public, public_sandbox = ready(title="Public, with a repository", selected_repository="o/r", selected_branch="main", git_provider="github")
    server.call("PATCH", f"/api/v1/app-conversations/{public}", {"public": True})
    report(public, public_sandbox, [event(number) for number in range(1, 4)])
    expected["events"][public] = {"count": 3, "large": None, "first": "event-0001"}
    large_task, large, _ = ready(title="Large request", initial_message=message("long " * 4000))
    # A stub: a conversation that is known only from its agent server.
    stub = uuid.uuid4().hex
    snapshot(stub, sandbox, title="Of an agent server")
    report(stub, sandbox, [event(1)])
    expected["events"][stub] = {"count": 1, "large": None, "first": "event-0001"}
    # Two sandboxes, paused and stopped.
    _, asleep, paused = ready(title="In a paused sandbox")
    server.call("POST", f"/api/v1/sandboxes/{paused}/pause")
    _, lost, stopped = ready(title="In a stopped sandbox")
    for conversation in (top, child, public, large, stub, asleep, lost):
        found = server.call("GET", f"/api/v1/app-conversations?ids={conversation}")[0]
        expected["conversations"][conversation] = {key: found[key] for key in (
            "title", "sandbox_id", "parent_conversation_id", "public", "selected_repository", "selected_branch", "git_provider",
            "created_at", "llm_model", "sub_conversation_ids")} | {"accumulated_cost": (found["metrics"] or {}).get("accumulated_cost")}
    # A finished export that no client has fetched: the request leaves it to the worker.
    assert server.call("GET", f"/api/v1/app-conversations/{top}/download", raw=True, may_fail=True) == 503
    expected["export"] = {"conversation": top, "members": 152 + 1}
    # Pending messages: of a conversation whose sandbox is paused, and of a start that is not finished.
    server.call("POST", f"/api/v1/conversations/{uuid.UUID(asleep)}/pending-messages", message("to the paused sandbox"))
    server.call("POST", f"/api/v1/conversations/{uuid.UUID(asleep)}/pending-messages", message("long " * 8000))
    # A failed start whose clean-up has ended, and one whose clean-up never ends.
    with stand_in.lock:
        stand_in.next = {"clone_fails": True}
    failed = server.start(title="Failed", selected_repository="o/none")
    for _ in range(300):
        if server.call("GET", f"/api/v1/app-conversations/start-tasks?ids={failed}")[0]["status"] == "ERROR":
            break
        time.sleep(0.1)
    expected["start_tasks"][failed] = "ERROR"
    with stand_in.lock:
        stand_in.next = {"clone_fails": True, "cannot_stop": True}
    failing = server.start(title="Its clean-up never ends", selected_repository="o/none")
    expected["start_tasks"][failing] = "failing"
    time.sleep(3)
    # Starts in every status.
    expected["unfinished"] = {}
    for status in STATUSES:
        with stand_in.lock:
            stand_in.next = {"held": status}
        task = server.start(title=f"Held in {status}", selected_repository="o/r", secrets={"OF_THE_REQUEST": "secret"},
                            initial_message=message("later"))
        for _ in range(300):
            if server.call("GET", f"/api/v1/app-conversations/start-tasks?ids={task}")[0]["status"] == status:
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(status)
        expected["unfinished"][task] = status
    pending = next(task for task, status in expected["unfinished"].items() if status == "RUNNING_SETUP_SCRIPT")
    server.call("POST", f"/api/v1/conversations/task-{uuid.UUID(pending)}/pending-messages", message("to the start"))
    expected["pending_messages"] = {"conversation": asleep, "count": 2, "task": pending}
    # A conversation whose deletion does not end.
    deleting_task, deleting, _ = ready(may={"cannot_stop": True, "cannot_delete": True}, title="Being deleted")
    session_of = server.call("GET", f"/api/v1/app-conversations?ids={deleting}")[0]["sandbox_id"]
    report(deleting, session_of, [event(1), event(2)])
    server.call("DELETE", f"/api/v1/app-conversations/{deleting}")
    expected["deleting"] = {"conversation": deleting, "task": deleting_task}
    del expected["start_tasks"][deleting_task]
    time.sleep(2)
    counts = {path: server.call("GET", f"/api/v1/app-conversations/{path}") for path in ("count", "start-tasks/count")}
    expected["counts"] = {"conversations": counts["count"], "start_tasks": counts["start-tasks/count"]}
    server.kill()
    # The commands open the folder by themselves.
    key = server.command("api-key", "create", "key of the fixture").strip()
    other_key = server.command("api-key", "create", "key of ann", "--user", "ann").strip()
    lines = []
    for number in range(1, 4):
        at = f"2026-11-1{number}T10:00:00Z"
        lines.append({"type": "conversation", "data": {"id": str(uuid.UUID(int=number << 96)), "created_by_user_id": "ann", "title": f"Imported {number}",
                      "sandbox_id": "elsewhere", "created_at": at, "updated_at": at}})
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.write("\n".join(map(json.dumps, lines)) + "\n")
        file.flush()
        server.command("import", file.name, "--user", "ann")
    expected["other_users"] = {"ann": {"conversations": 3}}
    expected["api_keys"] = {"local": {"name": "key of the fixture", "key": key}, "ann": {"name": "key of ann", "key": other_key}}
    # Only process sandboxes are stopped, so this state is written directly.
    database = sqlite3.connect(f"{data}/dynamodb.sqlite")
    expected["sandboxes"] = {}
    for table in ("", "::gsi::by-session-key", "::gsi::by-created"):
        for row, text in database.execute(f'SELECT rowid, item_json FROM "openhands-sandboxes{table}"').fetchall():
            item = json.loads(text)
            if item["id"] == {"S": stopped}:
                item["wanted"] = {"S": "stopped"}
                text = json.dumps(item, separators=(",", ":"))
                database.execute(f'UPDATE "openhands-sandboxes{table}" SET item_json = ? WHERE rowid = ?', (text, row))
            expected["sandboxes"][item["id"]["S"]] = item["wanted"]["S"]
    kinds = [json.loads(text)["kind"]["S"] for (text,) in database.execute('SELECT item_json FROM "openhands-users"')]
    database.commit()
    database.close()
    assert set(expected["sandboxes"].values()) == {"running", "paused", "stopped"}
    assert any(kind.startswith("export#") for kind in kinds), kinds
    expected["secrets"] = {"llm_api_key": LLM_KEY, "A_SECRET": "value-of-the-secret", "github": "ghp_token-of-the-fixture"}
    pack(data, name)
    path = HERE / "expected.json"
    everything = json.loads(path.read_text()) if path.exists() else {}
    everything[name] = expected
    path.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")


def pack(data, name):
    buffer = HERE / f"{name}.tar.gz"
    with tarfile.open(buffer, "w:gz", compresslevel=9) as archive:
        for path in sorted(Path(data).rglob("*")):
            inside = path.relative_to(data)
            if inside.parts[0] in ("engines.lock",) or path.is_socket():
                continue
            archive.add(path, arcname=str(inside), recursive=False)
    print(buffer, buffer.stat().st_size)


if __name__ == "__main__":
    folder = tempfile.mkdtemp(prefix="data-folder-")
    try:
        fill(sys.argv[1], folder, sys.argv[2])
    finally:
        shutil.rmtree(folder)
