//! Tests of the test fixtures themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use reqwest::Client;
use reqwest::multipart::{Form, Part};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Command;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};
use uuid::Uuid;

use crate::support::engines::{Engines, Ministack, is_ministack};
use crate::support::git_server::GitServer;
use crate::support::log::log_to;
use crate::support::scripted_llm::{self, Reply, ScriptedLlm};
use crate::support::stand_in_agent::{self, Fault, Kind, Nth, StandInAgent};
use crate::support::wait::{wait_for, wait_until};

const KEY: &str = "session-key";
const SOON: Duration = Duration::from_secs(60);

// Log capture

/// Counts log events.
#[derive(Clone, Default)]
struct Events(Arc<AtomicUsize>);

impl Subscriber for Events {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "support_tests"
    }
    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _span: &Id, _values: &Record<'_>) {}
    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
    fn event(&self, _event: &Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _span: &Id) {}
    fn exit(&self, _span: &Id) {}
}

/// This can fail only in the first test of its process: product tests subscribe for all threads.
#[test]
fn log_statement_first_reached_by_another_thread_is_captured() {
    fn warned() {
        tracing::warn!(target: "support_tests", "warned");
    }
    fn informed() {
        tracing::info!(target: "support_tests", number = 1, "informed");
    }
    fn traced() {
        tracing::trace!(target: "support_tests", "traced");
    }
    let events = Events::default();
    let _guard = log_to(events.clone());
    for (index, line) in [warned, informed, traced].into_iter().enumerate() {
        // A test on another thread, which captures nothing.
        thread::spawn(line).join().expect("a thread");
        line();
        line();
        assert_eq!(events.0.load(Ordering::Relaxed), 2 * (index + 1), "line {index}");
    }
}

// The stub language model

async fn ask(llm: &ScriptedLlm, body: &Value) -> (u16, String) {
    let url = format!("{}/chat/completions", llm.base_url());
    let answer = Client::new().post(url).json(body).send().await.expect("an answer");
    (answer.status().as_u16(), answer.text().await.expect("a body"))
}

fn question(text: &str) -> Value {
    json!({"model": "scripted", "messages": [{"role": "user", "content": text}]})
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[tokio::test]
async fn scripted_llm_follows_its_script() {
    let llm = ScriptedLlm::start().await;
    llm.reply_with(vec![
        Reply::tool_call("terminal", json!({"command": "pwd"})),
        Reply::Status(500),
        Reply::text("hello").after(Duration::from_millis(50)),
    ]);

    let (status, body) = ask(&llm, &question("one")).await;
    let call = &parsed(&body)["choices"][0];
    assert_eq!((status, &call["finish_reason"]), (200, &json!("tool_calls")), "{body}");
    assert_eq!(call["message"]["tool_calls"][0]["function"]["name"], "terminal", "{body}");
    let arguments = call["message"]["tool_calls"][0]["function"]["arguments"].as_str().expect("a string");
    assert_eq!(parsed(arguments), json!({"command": "pwd"}));

    let (status, body) = ask(&llm, &question("two")).await;
    assert_eq!((status, &parsed(&body)["error"]["code"]), (500, &json!(500)), "{body}");

    let asked = Instant::now();
    let (_, body) = ask(&llm, &question("three")).await;
    assert!(asked.elapsed() >= Duration::from_millis(50), "the reply is delayed");
    assert_eq!(parsed(&body)["choices"][0]["message"]["content"], "hello", "{body}");

    let (_, body) = ask(&llm, &question("four")).await;
    let body = parsed(&body);
    assert_eq!(body["choices"][0]["message"]["content"], scripted_llm::DEFAULT_TEXT, "{body}");
    assert_eq!(body["choices"][0]["finish_reason"], "stop", "{body}");
    assert_eq!(body["usage"]["prompt_tokens"], scripted_llm::PROMPT_TOKENS, "{body}");

    let asked: Vec<Value> = llm.requests().iter().map(|request| request["messages"][0]["content"].clone()).collect();
    assert_eq!(asked, ["one", "two", "three", "four"]);
}

#[tokio::test]
async fn title_request_consumes_no_scripted_reply() {
    let llm = ScriptedLlm::start().await;
    llm.reply_with(vec![Reply::text("scripted")]);
    let system = "You are a helpful assistant that generates concise, descriptive titles for \
        conversations with OpenHands.";
    let messages = json!([
        {"role": "system", "content": [{"type": "text", "text": system}]},
        {"role": "user", "content": "Generate a title"},
    ]);
    let request = json!({"model": "scripted", "messages": messages});

    let (_, body) = ask(&llm, &request).await;
    assert_eq!(parsed(&body)["choices"][0]["message"]["content"], scripted_llm::DEFAULT_TITLE, "{body}");
    llm.set_title("Another");
    let (_, body) = ask(&llm, &request).await;
    assert_eq!(parsed(&body)["choices"][0]["message"]["content"], "Another", "{body}");
    let (_, body) = ask(&llm, &question("then")).await;
    assert_eq!(parsed(&body)["choices"][0]["message"]["content"], "scripted", "{body}");
    assert_eq!((llm.title_requests().len(), llm.requests().len()), (2, 1));
}

#[tokio::test]
async fn scripted_llm_streams_on_request() {
    let llm = ScriptedLlm::start().await;
    llm.reply_with(vec![Reply::tool_call("terminal", json!({})), Reply::text("hello to you")]);
    let mut request = question("hi");
    request["stream"] = json!(true);

    let (_, body) = ask(&llm, &request).await;
    let chunks: Vec<&str> = body.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    assert_eq!(chunks.last(), Some(&"[DONE]"), "{body}");
    let call = &parsed(chunks[0])["choices"][0]["delta"]["tool_calls"][0];
    assert_eq!((&call["index"], &call["function"]["name"]), (&json!(0), &json!("terminal")), "{body}");
    assert_eq!(parsed(chunks[1])["choices"][0]["finish_reason"], "tool_calls", "{body}");
    assert_eq!(parsed(chunks[2])["usage"]["completion_tokens"], scripted_llm::COMPLETION_TOKENS, "{body}");

    let (_, body) = ask(&llm, &request).await;
    let chunks = body.lines().filter_map(|line| line.strip_prefix("data: {").map(|rest| parsed(&format!("{{{rest}"))));
    let words: Vec<String> =
        chunks.filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned)).collect();
    assert_eq!(words, ["hello ", "to ", "you"], "{body}");
}

#[tokio::test]
async fn scripted_llm_closes_its_port_when_dropped() {
    let llm = ScriptedLlm::start().await;
    let url = format!("{}/models", llm.base_url());
    let client = Client::new();
    let models = client.get(&url).send().await.expect("an answer");
    assert_eq!(models.json::<Value>().await.expect("a list")["data"][0]["id"], "scripted");
    drop(llm);
    wait_until("the port is closed", SOON, async || client.get(&url).send().await.is_err()).await;
}

// The stub git host

async fn git(arguments: &[&str]) -> (bool, String) {
    let output = Command::new("git")
        .args(arguments)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env_remove("GIT_ASKPASS")
        .env_remove("SSH_ASKPASS")
        .output()
        .await
        .expect("git runs");
    (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
}

#[tokio::test]
async fn repositories_can_be_cloned_and_pushed_to() {
    let host = GitServer::start().await;
    let files = [("README.md", "hello\n", false), (".openhands/setup.sh", "echo hi\n", true)];
    host.create_repository("owner/name", &files, &["feature"]).await;
    let folder = tempfile::tempdir().expect("a folder");
    let at = |name: &str| folder.path().join(name).display().to_string();

    for (name, url) in [("a", "owner/name.git"), ("b", "owner/name")] {
        let (done, stderr) = git(&["clone", &format!("{}/{url}", host.url()), &at(name)]).await;
        assert!(done, "{stderr}");
        assert_eq!(std::fs::read_to_string(at(&format!("{name}/README.md"))).expect("the file"), "hello\n");
        let script = at(&format!("{name}/.openhands/setup.sh"));
        assert!(stand_in_agent::is_executable(script.as_ref()), "the script can be executed");
    }
    let (done, stderr) = git(&["-C", &at("a"), "checkout", "feature"]).await;
    assert!(done, "{stderr}");
    assert_eq!(std::fs::read_to_string(at("a/branch.txt")).expect("the branch's file"), "feature");
    let (done, stderr) = git(&["-C", &at("a"), "push", "origin", "HEAD:refs/heads/copy"]).await;
    assert!(done, "{stderr}");
    let (done, _) = git(&["clone", &format!("{}/owner/other.git", host.url()), &at("c")]).await;
    assert!(!done, "the repository does not exist");
}

#[tokio::test]
async fn git_server_can_require_credentials() {
    let host = GitServer::start().await;
    host.create_repository("owner/name", &[("a", "a", false)], &[]).await;
    host.require("user", "secret");
    let folder = tempfile::tempdir().expect("a folder");
    let clone = async |name: &str, credentials: &str| {
        let url = format!("http://{credentials}{}/owner/name.git", host.host());
        git(&["clone", &url, &folder.path().join(name).display().to_string()]).await
    };
    for (name, credentials, admitted) in [
        ("none", "", false),
        ("wrong", "user:wrong@", false),
        ("right", "user:secret@", true),
        ("gitlab", "oauth2:secret@", true),
        ("github", "x-access-token:secret@", true),
        ("empty", "secret:@", true),
        // Git sends an empty password before it prompts for one.
        ("bare", "secret@", true),
        ("bare and wrong", "wrong@", false),
    ] {
        let (done, stderr) = clone(name, credentials).await;
        assert_eq!(done, admitted, "{name}: {stderr}");
    }
    let sent: Vec<String> =
        host.requests().iter().filter_map(|request| request.header("authorization").map(str::to_owned)).collect();
    assert!(sent.contains(&"Basic dXNlcjpzZWNyZXQ=".to_owned()), "user:secret is recorded: {sent:?}");

    let api = async |name: &str, authorization: Option<&str>| {
        let mut request = Client::new().get(format!("{}/api/v3/repos/owner/{name}", host.url()));
        if let Some(authorization) = authorization {
            request = request.header("authorization", authorization);
        }
        let answer = request.send().await.expect("an answer");
        (answer.status().as_u16(), answer.json::<Value>().await.expect("JSON"))
    };
    let (status, found) = api("name", Some("Bearer secret")).await;
    assert_eq!((status, &found["full_name"]), (200, &json!("owner/name")), "{found}");
    assert_eq!(found["clone_url"], format!("{}/owner/name.git", host.url()));
    assert_eq!(api("name", Some("token secret")).await.0, 200);
    assert_eq!(api("name", Some("Bearer wrong")).await.0, 401);
    assert_eq!(api("name", None).await.0, 404);
    assert_eq!(api("other", Some("Bearer secret")).await.0, 404);
}

// The stub agent server

/// A client of the stub agent server.
struct Caller<'a> {
    agent: &'a StandInAgent,
    client: Client,
}

impl<'a> Caller<'a> {
    fn of(agent: &'a StandInAgent) -> Self {
        Self { agent, client: Client::new() }
    }

    async fn try_send(&self, route: &str, body: Value) -> Result<(u16, Value), reqwest::Error> {
        let (method, path) = route.split_once(' ').expect("a method and a path");
        let method = method.parse().expect("a method");
        let mut request = self.client.request(method, format!("{}{path}", self.agent.url()));
        if !body.is_null() {
            request = request.json(&body);
        }
        let answer = request.header("x-session-api-key", KEY).send().await?;
        Ok((answer.status().as_u16(), answer.json().await?))
    }

    async fn send(&self, route: &str, body: Value) -> (u16, Value) {
        self.try_send(route, body).await.unwrap_or_else(|error| panic!("{route}: {error:?}"))
    }

    /// Runs a command to its end: its last output, and the outputs before it.
    async fn run(&self, command: Value) -> (Value, Vec<Value>) {
        let (status, started) = self.send("POST /api/bash/start_bash_command", command).await;
        assert_eq!((status, &started["kind"]), (200, &json!("BashCommand")), "{started}");
        let id = started["id"].as_str().expect("an id");
        assert_eq!(id.len(), 32, "{started}");
        let route = format!(
            "GET /api/bash/bash_events/search?command_id__eq={id}&sort_order=TIMESTAMP&limit=100&kind__eq=BashOutput"
        );
        let mut outputs = wait_for("the command's end", SOON, async || {
            let (_, page) = self.send(&route, Value::Null).await;
            let items = page["items"].as_array().expect("items").clone();
            items.iter().any(|item| !item["exit_code"].is_null()).then_some(items)
        })
        .await;
        outputs.sort_by_key(|output| output["order"].as_u64());
        (outputs.pop().expect("an output"), outputs)
    }

    fn file_url(&self, what: &str, path: &str) -> String {
        let query = form_urlencoded::Serializer::new(String::new()).append_pair("path", path).finish();
        format!("{}/api/file/{what}?{query}", self.agent.url())
    }

    async fn upload(&self, path: &str, content: &str) -> (u16, Value) {
        let file = Part::text(content.to_owned()).file_name("any.txt");
        let answer = self
            .client
            .post(self.file_url("upload", path))
            .header("x-session-api-key", KEY)
            .multipart(Form::new().text("before", "x").part("file", file))
            .send()
            .await
            .expect("an answer");
        (answer.status().as_u16(), answer.json().await.expect("JSON"))
    }

    async fn download(&self, path: &str) -> (u16, String) {
        let answer = self
            .client
            .get(self.file_url("download", path))
            .header("x-session-api-key", KEY)
            .send()
            .await
            .expect("an answer");
        (answer.status().as_u16(), answer.text().await.expect("text"))
    }
}

fn start_request(id: Uuid) -> Value {
    json!({
        "workspace": {"working_dir": "/workspace/project", "kind": "LocalWorkspace"},
        "conversation_id": id.hyphenated().to_string(),
        "initial_message": {"role": "user", "content": [{"type": "text", "text": "hi"}], "run": false},
        "secrets": {"NAME": {"kind": "StaticSecret", "value": "secret"}},
        "agent": {"kind": "Agent", "llm": {"model": "openai/scripted", "api_key": "secret", "usage_id": "agent"}},
    })
}

#[tokio::test]
async fn stand_in_agent_requires_its_session_key() {
    let agent = StandInAgent::start(KEY).await;
    let caller = Caller::of(&agent);
    let plain = async |path: &str| {
        let answer = reqwest::get(format!("{}{path}", agent.url())).await.expect("an answer");
        (answer.status().as_u16(), answer.json::<Value>().await.expect("JSON"))
    };
    assert_eq!(plain("/alive").await, (200, json!({"status": "ok"})));
    assert_eq!(plain("/health").await, (200, json!("OK")));
    assert_eq!(plain("/server_info").await.1["version"], "1.15.0");
    assert_eq!(plain("/api/conversations/count").await, (401, json!({"detail": "Unauthorized"})));
    assert_eq!(caller.send("GET /api/conversations/count", Value::Null).await, (200, json!(0)));
    assert_eq!(caller.send("GET /api/nothing", Value::Null).await.0, 404);
    let paths: Vec<String> = agent.requests().into_iter().map(|request| request.path).collect();
    assert_eq!(paths.len(), 6, "{paths:?}");

    agent.set_alive(false);
    assert!(caller.try_send("GET /alive", Value::Null).await.is_err(), "the connection must be closed");
    agent.set_alive(true);
    assert_eq!(caller.send("GET /alive", Value::Null).await.0, 200);
}

#[tokio::test]
async fn commands_really_run() {
    let agent = StandInAgent::start(KEY).await;
    let caller = Caller::of(&agent);
    let root = agent.root().display().to_string();

    let command = format!("mkdir -p {0} && cd {0} && pwd && echo oops >&2; exit 3", agent.working_dir());
    let (output, before) = caller.run(json!({"command": command, "cwd": root, "timeout": 5})).await;
    assert_eq!(output["exit_code"], 3, "{output}");
    assert_eq!(output["stdout"], format!("{}\n", agent.working_dir()));
    assert_eq!((&output["stderr"], &output["order"]), (&json!("oops\n"), &json!(0)));
    assert_eq!(before, Vec::<Value>::new());
    assert_eq!(agent.commands(), [command]);

    let (output, _) = caller.run(json!({"command": "git config --global user.name Me && echo $HOME"})).await;
    assert_eq!(output["stdout"], format!("{root}/home\n"), "{output}");
    assert!(agent.root().join("home/.gitconfig").is_file(), "commands have their own home directory");

    let (output, _) = caller.run(json!({"command": "kill -9 $$", "cwd": root})).await;
    assert_eq!((&output["exit_code"], &output["stdout"]), (&json!(-9), &Value::Null), "{output}");

    let started = Instant::now();
    let (output, _) = caller.run(json!({"command": "echo so far; sleep 60; true", "timeout": 1})).await;
    assert_eq!((&output["exit_code"], &output["stdout"]), (&json!(-1), &json!("so far\n")), "{output}");
    assert!(started.elapsed() < Duration::from_secs(8), "the command is killed at its timeout");

    let missing = format!("{root}/missing");
    let (output, _) = caller.run(json!({"command": "true", "cwd": missing})).await;
    let text = format!("Error executing command: [Errno 2] No such file or directory: '{missing}'");
    assert_eq!((&output["exit_code"], &output["stderr"]), (&json!(-1), &json!(text)), "{output}");
    let (output, _) = caller.run(json!({"command": "true", "cwd": "/"})).await;
    assert_eq!(output["exit_code"], -1, "a folder outside of the root is refused: {output}");

    let (status, body) = caller.send("POST /api/bash/start_bash_command", json!({"cwd": "/"})).await;
    assert_eq!((status, &body["detail"][0]["loc"]), (422, &json!(["body", "command"])), "{body}");
}

#[tokio::test]
async fn long_output_is_returned_in_pieces() {
    let agent = StandInAgent::start(KEY).await;
    let caller = Caller::of(&agent);
    let (last, before) = caller.run(json!({"command": "head -c 2500000 /dev/zero | tr '\\0' x"})).await;
    assert_eq!((before.len(), &last["order"], &last["exit_code"]), (2, &json!(2), &json!(0)));
    assert!(before.iter().all(|output| output["exit_code"].is_null()), "only the last output has an exit code");
    let length = |output: &Value| output["stdout"].as_str().expect("stdout").len();
    assert_eq!(before.iter().map(length).sum::<usize>() + length(&last), 2_500_000);

    let id = last["command_id"].as_str().expect("an id");
    let search = format!("GET /api/bash/bash_events/search?command_id__eq={id}");
    let (_, page) = caller.send(&format!("{search}&kind__eq=BashOutput&order__gt=1"), Value::Null).await;
    assert_eq!(page["items"], json!([last]));
    let (_, page) = caller.send(&format!("{search}&limit=3"), Value::Null).await;
    assert_eq!(page["items"].as_array().expect("items").len(), 3, "the command and two outputs");
    let next = page["next_page_id"].as_str().expect("a next page");
    let (_, page) = caller.send(&format!("{search}&limit=3&page_id={next}"), Value::Null).await;
    assert_eq!((page["items"].as_array().map(Vec::len), &page["next_page_id"]), (Some(1), &Value::Null));
}

#[tokio::test]
async fn a_command_ends_with_the_stand_in() {
    let agent = StandInAgent::start(KEY).await;
    let caller = Caller::of(&agent);
    let pid = agent.root().join("pid");
    let command = json!({"command": "sleep 600 & echo $! > pid; wait"});
    caller.send("POST /api/bash/start_bash_command", command).await;
    let pid: i32 = wait_for("the command's pid", SOON, async || {
        std::fs::read_to_string(&pid).ok().and_then(|text| text.trim().parse().ok())
    })
    .await;
    drop(agent);
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    wait_until("the sleep process has ended", SOON, async || {
        // It has ended, or is a zombie that its parent has not reaped.
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero()));
        stat.map_or_else(|_| rustix::process::test_kill_process(pid).is_err(), |stat| stat.contains(") Z"))
    })
    .await;
}

#[tokio::test]
async fn files_are_really_stored() {
    let agent = StandInAgent::start(KEY).await;
    let caller = Caller::of(&agent);
    let path = format!("{}/.git/hooks/pre-commit", agent.working_dir());
    assert_eq!(caller.download(&path).await, (404, r#"{"detail":"File not found"}"#.to_owned()));
    assert_eq!(caller.upload(&path, "one\r\n--two\n").await, (200, json!({"success": true})));
    assert_eq!(std::fs::read_to_string(&path).expect("the file"), "one\r\n--two\n");
    assert_eq!(caller.download(&path).await, (200, "one\r\n--two\n".to_owned()));

    let relative = (400, json!({"detail": "Path must be absolute"}));
    assert_eq!(caller.upload(".git/hooks/pre-commit", "x").await, relative);
    assert_eq!(caller.download(".git/hooks/pre-commit").await, (400, relative.1.to_string()));
    let folder = (400, r#"{"detail":"Path is not a file"}"#.to_owned());
    assert_eq!(caller.download(&agent.working_dir()).await, folder);
    for outside in ["/etc/hostname".to_owned(), format!("{}/../x", agent.root().display())] {
        assert_eq!(caller.download(&outside).await.0, 500, "{outside}");
    }
    assert_eq!(caller.send("POST /api/file/upload?path=/x", json!({})).await.0, 422);
}

#[tokio::test]
async fn skills_and_hooks_are_returned() {
    let agent = StandInAgent::start(KEY).await;
    let caller = Caller::of(&agent);
    let (_, skills) = caller.send("POST /api/skills", json!({"load_public": true})).await;
    assert_eq!(skills["skills"], json!([]));
    agent.set_skills(json!([{"name": "a"}]));
    let (_, skills) = caller.send("POST /api/skills", json!({})).await;
    assert_eq!(skills["skills"], json!([{"name": "a"}]));

    let ask = json!({"project_dir": agent.working_dir()});
    let none = (200, json!({"hook_config": null}));
    assert_eq!(caller.send("POST /api/hooks", ask.clone()).await, none);
    let file = format!("{}/.openhands/hooks.json", agent.working_dir());
    let hook = json!({"command": "true", "async_": true});
    caller.upload(&file, &json!({"hooks": {"PreToolUse": [{"hooks": [hook]}]}}).to_string()).await;
    let (_, hooks) = caller.send("POST /api/hooks", ask.clone()).await;
    let wanted = json!([{"matcher": "*", "hooks": [
        {"type": "command", "command": "true", "timeout": 60, "async": true}
    ]}]);
    assert_eq!((&hooks["hook_config"]["pre_tool_use"], &hooks["hook_config"]["stop"]), (&wanted, &json!([])));
    for invalid in ["{", "{}", r#"{"Unknown": []}"#, r#"{"stop": [{"hooks": [{}]}]}"#] {
        caller.upload(&file, invalid).await;
        assert_eq!(caller.send("POST /api/hooks", ask.clone()).await, none, "{invalid}");
    }
    agent.set_hooks(json!({"stop": []}));
    assert_eq!(caller.send("POST /api/hooks", ask).await.1, json!({"hook_config": {"stop": []}}));
}

#[tokio::test]
async fn a_conversation_runs_from_start_to_deletion() {
    let agent = StandInAgent::start(KEY).await;
    let caller = Caller::of(&agent);
    let id = Uuid::new_v4();
    let (status, info) = caller.send("POST /api/conversations", start_request(id)).await;
    assert_eq!((status, &info["id"]), (201, &json!(id.hyphenated().to_string())), "{info}");
    assert!(!info.to_string().contains("secret\""), "secrets are not returned: {info}");
    let (status, again) = caller.send("POST /api/conversations", start_request(id)).await;
    assert_eq!((status, &again["created_at"]), (200, &info["created_at"]), "{again}");
    assert_eq!(agent.messages_delivered(id).len(), 1, "delivered once");
    assert_eq!((agent.conversations().len(), agent.conversations()[0].posts), (1, 2));
    assert_eq!(agent.conversations()[0].body, start_request(id), "the body is stored as sent");

    let path = format!("/api/conversations/{}", id.simple());
    let more = json!({"role": "user", "content": [], "run": true});
    assert_eq!(caller.send(&format!("POST {path}/events"), more.clone()).await, (200, json!({"success": true})));
    assert_eq!(agent.messages_delivered(id).last(), Some(&more));
    let analyzer = json!({"security_analyzer": {"kind": "LLMSecurityAnalyzer"}});
    assert_eq!(caller.send(&format!("POST {path}/security_analyzer"), analyzer).await.0, 200);
    assert_eq!(caller.send(&format!("PATCH {path}"), json!({"title": " New "})).await.0, 200);
    assert_eq!(caller.send(&format!("PATCH {path}"), json!({"title": ""})).await.0, 422);
    let (_, info) = caller.send(&format!("GET {path}"), Value::Null).await;
    assert_eq!((&info["title"], &info["execution_status"]), (&json!("New"), &json!("finished")), "{info}");
    assert_eq!(info["security_analyzer"]["kind"], "LLMSecurityAnalyzer", "{info}");
    agent.set_execution_status(id, "running");
    let other = Uuid::new_v4();
    let (_, infos) = caller.send(&format!("GET /api/conversations?ids={id}&ids={other}"), Value::Null).await;
    assert_eq!((&infos[0]["execution_status"], &infos[1]), (&json!("running"), &Value::Null), "{infos}");
    assert_eq!(caller.send("GET /api/conversations/count", Value::Null).await, (200, json!(1)));

    assert_eq!(caller.send(&format!("DELETE {path}"), Value::Null).await, (200, json!({"success": true})));
    assert_eq!(caller.send(&format!("DELETE {path}"), Value::Null).await.0, 400);
    assert_eq!(caller.send(&format!("GET {path}"), Value::Null).await.0, 404);
    let gone = json!({"detail": format!("Conversation not found: {id}")});
    assert_eq!(caller.send(&format!("POST {path}/events"), more).await, (404, gone));
    assert_eq!(caller.send(&format!("PATCH {path}"), json!({"title": "x"})).await, (200, json!({"success": false})));
    assert_eq!(caller.send("GET /api/conversations/nonsense", Value::Null).await.0, 422);
    assert_eq!(caller.send("GET /api/conversations", Value::Null).await.0, 422);
    assert_eq!(caller.send("POST /api/conversations", json!({"agent": {}})).await.0, 422);
}

/// Starts a conversation while the fault is injected: the response, whether it was started, and the duration.
async fn start_with(kind: Kind) -> (Result<(u16, Value), reqwest::Error>, bool, Duration) {
    let agent = StandInAgent::start(KEY).await;
    agent.inject(Fault::new("POST /api/conversations", Nth::Next, kind));
    let id = Uuid::new_v4();
    let mut caller = Caller::of(&agent);
    caller.client = Client::builder().timeout(Duration::from_millis(600)).build().expect("a client");
    let sent = Instant::now();
    let answer = caller.try_send("POST /api/conversations", start_request(id)).await;
    let (took, started) = (sent.elapsed(), !agent.messages_delivered(id).is_empty());

    // Whatever the fault, it applied once.
    let (status, _) = caller.send("POST /api/conversations", start_request(id)).await;
    assert_eq!(status, if started { 200 } else { 201 });
    assert_eq!(agent.messages_delivered(id).len(), 1);
    assert_eq!(agent.requests_to("POST /api/conversations").len(), 2);
    (answer, started, took)
}

#[tokio::test]
async fn each_fault_has_its_documented_effect() {
    let delay = Duration::from_millis(200);
    for kind in [Kind::Slow(delay), Kind::SlowReply(delay)] {
        let (answer, started, took) = start_with(kind.clone()).await;
        assert_eq!(answer.expect("an answer").0, 201, "{kind:?}");
        assert!(started && took >= delay, "{kind:?}: {took:?}");
    }

    let body = json!({"detail": "Internal Server Error", "exception": "no"});
    let (answer, started, _) = start_with(Kind::Status(500, body.to_string())).await;
    assert_eq!((answer.expect("an answer"), started), ((500, body.clone()), false));
    let (answer, started, _) = start_with(Kind::StatusAfter(503, body.to_string())).await;
    assert_eq!((answer.expect("an answer"), started), ((503, body), true));

    let (answer, started, _) = start_with(Kind::CutBefore).await;
    assert!(answer.expect_err("no answer").is_request() && !started);
    let (answer, started, _) = start_with(Kind::CutAfter).await;
    let error = answer.expect_err("half an answer");
    assert!((error.is_body() || error.is_decode()) && started, "the head arrives: {error:?}");
    let (answer, started, _) = start_with(Kind::Garbage).await;
    assert!(answer.expect_err("no JSON").is_decode() && started);
    let (answer, started, _) = start_with(Kind::Hang).await;
    assert!(answer.expect_err("no answer").is_timeout() && !started);
}

#[tokio::test]
async fn slow_effect_happens_even_if_the_client_disconnects() {
    let agent = StandInAgent::start(KEY).await;
    agent.inject(Fault::new("POST /api/conversations", Nth::Next, Kind::Slow(Duration::from_millis(400))));
    let mut caller = Caller::of(&agent);
    caller.client = Client::builder().timeout(Duration::from_millis(100)).build().expect("a client");
    let id = Uuid::new_v4();
    let error = caller.try_send("POST /api/conversations", start_request(id)).await.expect_err("too slow");
    assert!(error.is_timeout(), "{error:?}");
    assert!(agent.conversations().is_empty(), "the effect is delayed");
    wait_until("the conversation exists", SOON, async || agent.conversations().len() == 1).await;
}

#[tokio::test]
async fn fault_applies_to_the_chosen_request() {
    let agent = StandInAgent::start(KEY).await;
    let caller = Caller::of(&agent);
    let fault = |route, nth| agent.inject(Fault::new(route, nth, Kind::Status(503, "{}".to_owned())));
    let statuses = async |path: &str| {
        let mut statuses = Vec::new();
        for _ in 0..3 {
            statuses.push(caller.send(&format!("GET {path}"), Value::Null).await.0);
        }
        statuses
    };
    fault("GET /api/conversations/count", Nth::On(2));
    assert_eq!(statuses("/api/conversations/count").await, [200, 503, 200]);
    fault("GET /alive", Nth::Next);
    assert_eq!(statuses("/alive").await, [503, 200, 200]);
    fault("GET /api/conversations/{id}", Nth::Always);
    let path = format!("/api/conversations/{}", Uuid::new_v4());
    assert_eq!(statuses(&path).await, [503, 503, 503]);
    agent.clear_faults();
    assert_eq!(statuses(&path).await, [404, 404, 404]);
}

// AWS engines

#[tokio::test]
async fn engines_are_those_that_the_environment_selects() {
    let folder = TempDir::new().expect("a folder");
    let engines = Engines::start(folder.path()).await;
    for url in [&engines.dynamodb, &engines.s3, &engines.sqs] {
        assert!(url.starts_with("http://127.0.0.1:"), "{url}");
        let answer = Client::new().get(format!("{url}/_ministack/health")).send().await.expect("an answer");
        let text = answer.text().await.expect("a body");
        assert_eq!(text.contains(r#""services": {"dynamodb": "available""#), is_ministack(), "{url}: {text}");
    }
    engines.shutdown().await;
}

#[tokio::test]
async fn ministack_ends_with_the_process_that_started_it() {
    if !is_ministack() {
        println!("not run: a process of ministack (OPENHANDS_TEST_AWS=ministack)");
        return;
    }
    let Ministack { url, mut process, .. } = Ministack::start();
    let healthy = async || Client::new().get(format!("{url}/_ministack/health")).send().await.is_ok();
    assert!(healthy().await);
    // The kernel closes it the same way when a process is killed.
    drop(process.stdin.take());
    wait_until("it has ended", SOON, async || process.try_wait().expect("a process").is_some()).await;
    assert!(!healthy().await);
}

// Waiting

#[tokio::test]
#[should_panic(expected = "not true after 50ms: pigs fly")]
async fn timed_out_wait_names_its_condition() {
    wait_until("pigs fly", Duration::from_millis(50), async || false).await;
}
