//! What is inside a conversation's sandbox, over HTTP, with a stand-in for the agent server: what each route answers in every
//! state of the sandbox, and whatever the agent server does.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use http::HeaderMap;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use shared::agent_server::AgentServer;
use shared::aws::Aws;
use shared::clock::Time;
use shared::conversation::store::ConversationStore;
use shared::conversation::workspace::WorkspaceLocator;
use shared::conversation::{ConversationRecord, MetricsSnapshot};
use shared::http::caller::Caller;
use shared::http::response::with_common_answers;
use shared::http_client::{AddressPolicy, HttpClient};
use shared::sandbox::{SandboxService as _, SandboxStatus};
use shared::stores::Stores;
use shared::user::UserId;
use tempfile::TempDir;
use tower::ServiceExt as _;
use uuid::Uuid;

use crate::support::api::documented;
use crate::support::engines::Engines;
use crate::support::server::Request;
use crate::support::stand_in_agent::{Fault, Kind, Nth, StandInAgent};
use crate::support::worker_harness::{SESSION_KEY, StandInSandboxes};

/// What a request has for all that it asks, on a busy machine.
const BUDGET: Duration = Duration::from_secs(30);
/// The same for servers that do not respond: short, so that a table of hanging servers ends soon.
const SHORT_BUDGET: Duration = Duration::from_secs(3);
/// What a whole request may take.
const AT_MOST: Duration = Duration::from_secs(40);
const SANDBOX: &str = "sandbox";

struct WorkerHarness {
    user: UserId,
    agent: StandInAgent,
    sandboxes: Arc<StandInSandboxes>,
    conversations: ConversationStore,
    places: WorkspaceLocator,
    router: Router,
    engines: Engines,
    _folder: TempDir,
}

struct Answer {
    status: u16,
    headers: HeaderMap,
    body: Value,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().expect("text"))
    }

    fn status_and_body(self) -> (u16, Value) {
        (self.status, self.body)
    }
}

impl WorkerHarness {
    async fn start() -> Self {
        let folder = TempDir::new().expect("a folder");
        let engines = Engines::start(folder.path()).await;
        let aws = Aws::new(&engines.sdk_config().await);
        let names = engines.names("inside-");
        schema::make_all(&aws, &names, "inside-").await.expect("a schema");
        let agent = StandInAgent::start(SESSION_KEY).await;
        let user = UserId::new("somebody");
        let sandboxes = Arc::new(StandInSandboxes::at(agent.url(), agent.working_dir()));
        sandboxes.start(&user, SANDBOX, None).await.expect("a sandbox");
        fs::create_dir_all(agent.working_dir()).expect("a workspace");
        let conversations = Stores::without_key(&names, &aws).conversations();
        let http = HttpClient::new(AddressPolicy::Any);
        let places = WorkspaceLocator::new(conversations.clone(), sandboxes.clone(), http);
        let router = router(&places, BUDGET);
        Self { user, agent, sandboxes, conversations, places, router, engines, _folder: folder }
    }

    fn set_budget(&mut self, budget: Duration) {
        self.router = router(&self.places, budget);
    }

    async fn conversation_with(&self, id: Uuid, sandbox: &str, repository: Option<&str>) -> Uuid {
        let now = Time::now();
        let record = ConversationRecord {
            user: self.user.clone(),
            id,
            sandbox_id: sandbox.to_owned(),
            selected_repository: repository.map(str::to_owned),
            selected_branch: None,
            git_provider: None,
            title: None,
            trigger: None,
            pr_number: Vec::new(),
            llm_model: None,
            metrics: MetricsSnapshot::default(),
            parent_conversation_id: None,
            public: None,
            tags: shared::conversation::tags::Tags::default(),
            agent_kind: "openhands".to_owned(),
            acp_server: None,
            launched_agent_profile: None,
            created_at: now,
            updated_at: now,
        };
        self.conversations.import(&self.user, &[record]).await.expect("stored");
        id
    }

    async fn conversation(&self) -> Uuid {
        self.conversation_with(Uuid::new_v4(), SANDBOX, None).await
    }

    /// A conversation that the agent server has too, in this folder.
    async fn conversation_in(&self, folder: &str) -> Uuid {
        let id = self.conversation().await;
        let body = json!({
            "conversation_id": id,
            "workspace": {"kind": "LocalWorkspace", "working_dir": folder},
            "agent": {},
        });
        let http = HttpClient::new(AddressPolicy::Any);
        let agent = AgentServer::new(http, &self.agent.url(), Some(SESSION_KEY.into()));
        agent.create_conversation(&body, BUDGET).await.expect("created");
        id
    }

    fn workspace(&self) -> PathBuf {
        self.agent.working_dir().into()
    }

    fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.workspace().join(path);
        fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        fs::write(path, content).expect("written");
    }

    async fn send(&self, method: &str, target: &str, body: Option<&Value>) -> Answer {
        let mut request = http::Request::builder().method(method).uri(target).extension(Caller(self.user.clone()));
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        let answer = self.router.clone().oneshot(request.body(body).expect("a request")).await.expect("an answer");
        let (parts, body) = answer.into_parts();
        let bytes = body.collect().await.expect("a body").to_bytes();
        let body = serde_json::from_slice(&bytes).unwrap_or_else(|_| panic!("no JSON: {bytes:?}"));
        Answer { status: parts.status.as_u16(), headers: parts.headers, body }
    }

    async fn get(&self, conversation: Uuid, route: &str) -> Answer {
        self.send("GET", &format!("/api/v1/app-conversations/{conversation}/{route}"), None).await
    }

    async fn say(&self, conversation: Uuid, body: &Value) -> Answer {
        self.send("POST", &format!("/api/v1/app-conversations/{conversation}/send-message"), Some(body)).await
    }

    /// The text of a file and what is said of it.
    async fn file(&self, conversation: Uuid, query: &str) -> (String, String) {
        let answer = self.get(conversation, &format!("file{query}")).await;
        assert_eq!(answer.status, 200, "{query}");
        let status = answer.header("x-file-status").expect("a status").to_owned();
        (answer.body.as_str().expect("text").to_owned(), status)
    }

    async fn end(self) {
        self.engines.shutdown().await;
    }
}

fn router(places: &WorkspaceLocator, budget: Duration) -> Router {
    with_common_answers(documented(skills::router(skills::Context::with_locator(places.clone(), budget))))
}

fn said(text: &str) -> Value {
    json!({"content": [{"type": "text", "text": text}]})
}

fn encoded(path: &str) -> String {
    form_urlencoded::byte_serialize(path.as_bytes()).collect()
}

#[tokio::test]
async fn recorded_exchanges_get_the_recorded_responses() {
    let mut harness = WorkerHarness::start().await;
    let recorded = include_str!("../data/contract/example-inside.jsonl");
    let mut seen = 0;
    for line in recorded.lines() {
        let case: Value = serde_json::from_str(line).expect("JSON");
        let text = |value: &Value| value.as_str().expect("text").to_owned();
        let (file, label, path) = (text(&case["file"]), text(&case["label"]), text(&case["request"]["path"]));
        let id: Uuid = path.split('/').nth(4).expect("an id").parse().expect("an id");
        let what = path.rsplit('/').next().expect("a route");
        // The situation.
        let sandbox = if label.contains("deleted sandbox") { "deleted" } else { SANDBOX };
        harness.conversation_with(id, sandbox, None).await;
        let paused = label.contains("paused");
        harness.sandboxes.set_status(SANDBOX, if paused { SandboxStatus::Paused } else { SandboxStatus::Running });
        harness.agent.clear_faults();
        harness.set_budget(if label.ends_with("drop") { SHORT_BUDGET } else { BUDGET });
        harness.agent.set_skills(as_the_agent_server_returns_them(&case["response"]["body"]["skills"]));
        harness.write("PLAN.md", "# Plan ünï\nline2\n");
        harness.write("bin.dat", [0xff, 0xfe, 0x00]);
        harness.write("empty.txt", "");
        let hooks = match label.as_str() {
            "hooks with hooks.json" => {
                r#"{"PreToolUse": [{"matcher": "terminal", "hooks": [{"type": "command", "command": "echo pre", "timeout": 10}]}],
                    "Stop": [{"hooks": [{"type": "command", "command": "echo stop", "async": true}]}]}"#
            }
            "hooks: bad json" => "{bad",
            "hooks: snake case top level" => r#"{"session_start": [{"hooks": [{"command": "true"}]}]}"#,
            _ => "{}",
        };
        harness.write(".openhands/hooks.json", hooks);
        if let Some(fault) = label.split("agent ").nth(1).filter(|_| file == "example-agent-faults") {
            let route = match what {
                "skills" => "POST /api/skills",
                "hooks" => "POST /api/hooks",
                _ => "GET /api/file/download",
            };
            let kind = match fault {
                "badjson" => Kind::Status(200, "{bad".to_owned()),
                "drop" => Kind::Hang,
                status => Kind::Status(status.parse().expect("a status"), r#"{"detail": "no"}"#.to_owned()),
            };
            harness.agent.inject(Fault::new(route, Nth::Always, kind));
        }
        let query = text(&case["request"]["query"]);
        let target = if query.is_empty() { path.clone() } else { format!("{path}?{query}") };
        let answer = harness.send("GET", &target, None).await;
        let expected = match label.as_str() {
            // Named in docs/deviations.md.
            "outside the workspace" => (200, json!("")),
            "hooks: agent badjson" => {
                (502, json!({"error": "Agent-server returned an invalid response when loading hooks"}))
            }
            _ => {
                let status = u16::try_from(case["response"]["status"].as_u64().expect("a status")).expect("a status");
                (status, case["response"]["body"].clone())
            }
        };
        assert_eq!(answer.status_and_body(), expected, "{file}: {label}: {target}");
        seen += 1;
    }
    assert_eq!(seen, 36);
    harness.end().await;
}

/// The recorded skills in the form in which the agent server returns them.
fn as_the_agent_server_returns_them(shown: &Value) -> Value {
    let skills = shown.as_array().into_iter().flatten().map(|skill| {
        json!({
            "name": skill["name"], "type": skill["type"], "content": skill["content"], "triggers": skill["triggers"],
            "source": null, "description": null, "is_agentskills_format": skill["type"] == "agentskills",
        })
    });
    json!(skills.collect::<Vec<Value>>())
}

#[tokio::test]
async fn every_state_of_a_sandbox_has_its_answer() {
    let harness = WorkerHarness::start().await;
    let id = harness.conversation().await;
    let lost = harness.conversation_with(Uuid::new_v4(), "none", None).await;
    let unknown = Uuid::new_v4();
    let gone = harness.conversation().await;
    let detail = |text: String| json!({"detail": text});
    let error = |text: String| json!({"error": text});
    let answers = async |id: Uuid| {
        let mut answers = Vec::new();
        for route in ["skills", "hooks", "files", "git/changes?path=.", "git/diff?path=a"] {
            answers.push((route, harness.get(id, route).await.status_and_body()));
        }
        answers.push(("send-message", harness.say(id, &said("Hello")).await.status_and_body()));
        answers
    };
    for (what, id, status, older, newer, file) in [
        (
            "unknown conversation",
            unknown,
            SandboxStatus::Running,
            (404, error(format!("Conversation {unknown} not found"))),
            (404, detail(format!("Conversation {unknown} not found"))),
            "no-conversation",
        ),
        (
            "no sandbox",
            lost,
            SandboxStatus::Running,
            (404, error(format!("Sandbox not found for conversation {lost}"))),
            (404, detail(format!("Sandbox not found for conversation {lost}"))),
            "not-running",
        ),
        (
            "starting",
            id,
            SandboxStatus::Starting,
            (404, error(format!("Sandbox not ready for conversation {id}"))),
            (409, detail(format!("The sandbox of conversation {id} is starting; try again in a few seconds"))),
            "not-running",
        ),
        (
            "paused",
            id,
            SandboxStatus::Paused,
            (200, Value::Null),
            (
                409,
                detail(format!(
                    "The sandbox of conversation {id} is paused; POST /api/v1/sandboxes/{SANDBOX}/resume resumes it"
                )),
            ),
            "not-running",
        ),
        (
            "failed",
            id,
            SandboxStatus::Error,
            (404, error(format!("Sandbox not ready for conversation {id}"))),
            (503, detail(format!("The sandbox of conversation {id} has failed; start a new conversation"))),
            "not-running",
        ),
        (
            "missing",
            gone,
            SandboxStatus::Missing,
            (404, error(format!("Sandbox not ready for conversation {gone}"))),
            (410, detail(format!("The sandbox of conversation {gone} no longer exists; start a new conversation"))),
            "not-running",
        ),
    ] {
        harness.sandboxes.set_status(SANDBOX, status);
        for (route, answer) in answers(id).await {
            let expected = match route {
                "skills" if what == "paused" => (200, json!({"skills": []})),
                "hooks" if what == "paused" => (200, json!({"hooks": []})),
                "skills" | "hooks" => older.clone(),
                _ => newer.clone(),
            };
            assert_eq!(answer, expected, "{what}: {route}");
        }
        assert_eq!(harness.file(id, "").await, (String::new(), file.to_owned()), "{what}");
    }
    assert!(harness.agent.requests().is_empty(), "no request was sent");
    // What is asked for is looked at first.
    for route in ["skills", "hooks", "file", "files", "git/changes", "git/diff"] {
        let answer = harness.send("GET", &format!("/api/v1/app-conversations/bad/{route}"), None).await;
        assert_eq!((answer.status, &answer.body["detail"][0]["type"]), (422, &json!("uuid_parsing")), "{route}");
    }
    for route in ["git/changes", "git/diff"] {
        let answer = harness.get(id, route).await;
        assert_eq!(answer.status, 422, "{route}");
        assert_eq!(answer.body["detail"][0]["loc"], json!(["query", "path"]), "{route}");
    }
    harness.end().await;
}

#[tokio::test]
async fn files_are_read_from_the_workspace_and_from_nowhere_else() {
    let harness = WorkerHarness::start().await;
    let id = harness.conversation().await;
    let workspace = harness.workspace();
    let ours = |path: &str| format!("?file_path={}", encoded(&workspace.join(path).display().to_string()));
    let known = |path: &str| format!("?file_path={}", encoded(&format!("/workspace/project/{path}")));
    let status = |text: &str, status: &str| (text.to_owned(), status.to_owned());

    // Without a path: the conversation's own plan, then the workspace's.
    assert_eq!(harness.file(id, "").await, status("", "missing"));
    harness.write("PLAN.md", "the workspace's plan");
    assert_eq!(harness.file(id, "").await, status("the workspace's plan", "ok"));
    harness.write(".agents_tmp/PLAN.md", "the plan");
    assert_eq!(harness.file(id, "").await, status("the plan", "ok"));
    // Conversations of a grouped sandbox have a folder each.
    let folder = workspace.join("0123/repository");
    let grouped = harness.conversation_in(&folder.display().to_string()).await;
    assert_eq!(harness.file(grouped, "").await, status("the workspace's plan", "ok"));
    harness.write("0123/repository/.agents_tmp/PLAN.md", "its own plan");
    assert_eq!(harness.file(grouped, "").await, status("its own plan", "ok"));
    // One that says it works elsewhere reads nothing there.
    let elsewhere = harness.conversation_in("/etc").await;
    assert_eq!(harness.file(elsewhere, "").await, status("the workspace's plan", "ok"));

    harness.write("it's $(a) file", "wörds \"quoted\"\n");
    harness.write("empty", "");
    harness.write("binary", [0xff, 0x00]);
    harness.write("large", vec![b'x'; 5 * 1024 * 1024 + 1]);
    harness.write("just so", vec![b'x'; 5 * 1024 * 1024]);
    harness.write("becomes large", vec![b'\n'; 3 * 1024 * 1024]);
    fs::write(harness.agent.root().join("secret"), "a secret").expect("written");
    symlink("../../secret", workspace.join("way-out")).expect("a link");
    symlink("/etc", workspace.join("etc")).expect("a link");
    symlink("it's $(a) file", workspace.join("link")).expect("a link");
    let both: [&dyn Fn(&str) -> String; 2] = [&ours, &known];
    for path in both {
        for (name, expected) in [
            ("it's $(a) file", status("wörds \"quoted\"\n", "ok")),
            ("link", status("wörds \"quoted\"\n", "ok")),
            ("empty", status("", "ok")),
            ("binary", status("", "not-text")),
            ("large", status("", "too-large")),
            ("becomes large", status("", "too-large")),
            (".agents_tmp", status("", "missing")),
            ("", status("", "missing")),
            ("none", status("", "missing")),
            ("none/at/all", status("", "missing")),
            ("way-out", status("", "outside-workspace")),
            ("etc/hostname", status("", "outside-workspace")),
            ("../../secret", status("", "outside-workspace")),
            ("a/../link", status("", "outside-workspace")),
            ("nul\0", status("", "outside-workspace")),
        ] {
            assert_eq!(harness.file(id, &path(name)).await, expected, "{name}");
        }
        assert_eq!(harness.file(id, &path("just so")).await.0.len(), 5 * 1024 * 1024);
    }
    for path in ["/etc/hostname", "/", "", "PLAN.md", "/workspace/projects/PLAN.md", "/workspace"] {
        let query = format!("?file_path={}", encoded(path));
        assert_eq!(harness.file(id, &query).await, status("", "outside-workspace"), "{path}");
    }
    harness.end().await;
}

#[tokio::test]
async fn skills_hooks_and_files_are_those_of_the_conversations_folder() {
    let harness = WorkerHarness::start().await;
    let folder = harness.workspace().join("0123/repository");
    let id = harness.conversation_in(&folder.display().to_string()).await;
    harness.write("0123/repository/src/main.rs", "fn main() {}\n");
    harness.write("0123/repository/.openhands/hooks.json", r#"{"Stop": [{"hooks": [{"command": "true"}]}]}"#);
    harness.write("0123/other", "");
    harness.write("0123/repository/.git-not", "");

    assert_eq!(harness.get(id, "skills").await.header("x-skills-status"), Some("ok"));
    let asked = harness.agent.requests_to("POST /api/skills").pop().expect("asked").json();
    assert_eq!(asked["project_dir"], folder.display().to_string());
    assert_eq!(asked["sandbox_config"]["exposed_urls"][0]["name"], "AGENT_SERVER");
    let hooks = harness.get(id, "hooks").await.body;
    assert_eq!(hooks["hooks"][0]["event_type"], "stop", "{hooks}");

    let files = harness.get(id, "files").await;
    assert_eq!(files.body, json!([".git-not", ".openhands/hooks.json", "src/main.rs"]));
    assert_eq!(files.header("x-files-truncated"), None);
    assert_eq!(harness.get(id, "files?path=src").await.body, json!(["main.rs"]));
    let all = harness.get(id, "files?path=/workspace/project/0123").await.body;
    assert_eq!(all[0], "other", "{all}");
    assert_eq!(
        harness.get(id, "files?path=none").await.status_and_body(),
        (404, json!({"detail": "The folder does not exist"}))
    );
    for outside in ["/etc", "..", "src/../..", "/workspace"] {
        let answer = harness.get(id, &format!("files?path={outside}")).await;
        assert_eq!(
            answer.status_and_body(),
            (400, json!({"detail": "The path must be inside the workspace"})),
            "{outside}"
        );
    }

    harness.end().await;
}

#[tokio::test]
async fn git_is_asked_of_the_workspace_by_every_form_of_a_path() {
    let harness = WorkerHarness::start().await;
    let folder = harness.workspace().join("0123/repository");
    let id = harness.conversation_in(&folder.display().to_string()).await;
    harness.write("0123/repository/changed", "one\n");
    harness.write("0123/repository/deleted \"文\"\t#?%+&.txt", "gone\n");
    let git = |arguments: &[&str]| {
        let name = ["-c", "user.name=A", "-c", "user.email=a@example.org"];
        let ran = Command::new("git").args(name).args(arguments).current_dir(&folder).output().expect("git");
        assert!(ran.status.success(), "{ran:?}");
    };
    git(&["init", "-q"]);
    git(&["add", "-A"]);
    git(&["commit", "-qm", "First"]);
    harness.write("0123/repository/changed", "two");
    fs::remove_file(folder.join("deleted \"文\"\t#?%+&.txt")).expect("removed");
    harness.write("0123/repository/binary", "\0");
    harness.write("0123/repository/src/main.rs", "fn main() {}\n");
    harness.write("0123/repository/large", "line of text\n".repeat(100_000));
    harness.write("0123/repository/too-large", "x".repeat(5_000_001));
    symlink("gone", folder.join("dangling")).expect("a link");
    symlink("/etc", folder.join("out")).expect("a link");

    let known = "/workspace/project/0123/repository";
    let changes = |folder: &str| {
        let change = |status: &str, path: &str| json!({"status": status, "path": format!("{folder}{path}")});
        json!([
            change("ADDED", "binary"),
            change("UPDATED", "changed"),
            change("ADDED", "dangling"),
            change("DELETED", "deleted \"文\"\t#?%+&.txt"),
            change("ADDED", "large"),
            change("ADDED", "out"),
            change("ADDED", "src/main.rs"),
            change("ADDED", "too-large"),
        ])
    };
    for (path, expected) in [
        (".", changes("")),
        ("./", changes("")),
        (&folder.display().to_string(), changes("")),
        (known, changes("")),
        ("/workspace/project/0123", changes("repository/")),
        ("/workspace/project", json!([])),
        ("src", json!([{"status": "ADDED", "path": "main.rs"}])),
    ] {
        let answer = harness.get(id, &format!("git/changes?path={}", encoded(path))).await;
        assert_eq!(answer.header("x-changes-truncated"), None);
        assert_eq!(answer.status_and_body(), (200, expected), "{path}");
    }
    let large = "line of text\n".repeat(100_000);
    for change in changes("").as_array().expect("changes") {
        let path = change["path"].as_str().expect("a path");
        let expected = match path {
            "binary" => Err((400, "The file is binary (0 bytes before, 1 bytes now)")),
            "changed" => Ok(("one\n", "two")),
            "dangling" => Ok(("", "gone")),
            "large" => Ok(("", large.as_str())),
            "out" => Ok(("", "/etc")),
            "src/main.rs" => Ok(("", "fn main() {}\n")),
            "too-large" => Err((413, "The file is too large for a diff: 0 bytes before, 5000001 bytes now")),
            _ => Ok(("gone\n", "")),
        };
        let quoted = r#""deleted \"\346\226\207\"\t#?%+&.txt""#;
        let forms = [path, if path.starts_with("deleted") { quoted } else { path }];
        for given in forms.iter().flat_map(|path| [(*path).to_owned(), format!("{known}/{path}")]) {
            let answer = harness.get(id, &format!("git/diff?path={}", encoded(&given))).await.status_and_body();
            match expected {
                Ok((original, modified)) => {
                    assert!(answer == (200, json!({"modified": modified, "original": original})), "{given}");
                }
                Err((status, detail)) => {
                    assert_eq!(answer.0, status, "{given}");
                    assert!(answer.1["detail"].as_str().expect("a reason").starts_with(detail), "{}", answer.1);
                }
            }
        }
    }
    let outside = "The path must be absolute and inside the workspace";
    for (route, status, detail) in [
        ("git/diff?path=none", 404, "The file exists neither now nor when the work began"),
        ("git/diff?path=none&ref=HEAD", 404, "The file exists neither now nor at HEAD"),
        ("git/diff?path=src", 400, "The path is a folder; choose a file for a diff"),
        ("git/diff?path=changed&ref=gone", 400, "The ref \"gone\" is not a commit of this repository"),
        ("git/changes?path=.&ref=--help", 400, "The ref \"--help\" is not a commit of this repository"),
        ("git/changes?path=.&ref=gone", 400, "The ref \"gone\" is not a commit of this repository"),
        (
            "git/changes?path=/workspace/project/0123&ref=gone",
            400,
            "The ref \"gone\" is not a commit of this repository",
        ),
        ("git/changes?path=none", 404, "The folder does not exist"),
        ("git/changes?path=changed", 400, "The path is not a folder"),
        ("git/changes?path=out", 400, outside),
        ("git/diff?path=out/passwd", 400, outside),
        ("git/changes?path=/etc/hostname", 400, outside),
        ("git/diff?path=/etc/hostname", 400, outside),
        ("git/changes?path=../other", 400, outside),
        ("git/diff?path=../other", 400, outside),
        ("git/changes?path=/workspace", 400, outside),
        ("git/diff?path=/workspace", 400, outside),
    ] {
        assert_eq!(harness.get(id, route).await.status_and_body(), (status, json!({"detail": detail})), "{route}");
    }
    harness.write("beside", "");
    let beside = harness.get(id, "git/diff?path=/workspace/project/beside").await.status_and_body();
    assert_eq!(beside, (200, json!({"modified": null, "original": null})));
    assert!(
        harness.agent.requests().iter().all(|request| !request.path.contains("/git/")),
        "its own routes are not asked"
    );
    harness.end().await;
}

#[tokio::test]
async fn git_that_does_not_come_to_an_end_is_said_to_be_unfinished() {
    let harness = WorkerHarness::start().await;
    let id = harness.conversation_in(&harness.agent.working_dir()).await;
    let run = "POST /api/bash/execute_bash_command";
    let gone = format!("{}/openhands-git.x/result", harness.agent.working_dir());
    for (answer, status, detail) in [
        (json!({"exit_code": -1}), 503, "Git did not finish within 14 s in this sandbox"),
        (json!({"exit_code": 124}), 503, "Git did not finish within 14 s in this sandbox"),
        (json!({"exit_code": 137, "stderr": "Killed"}), 503, "Git did not finish within 14 s in this sandbox"),
        (json!({"exit_code": 3, "stderr": "mktemp: failed"}), 409, "The sandbox has no space"),
        (json!({"exit_code": 0, "stdout": "inline\n%%%"}), 502, "The agent server returned an invalid response"),
        (json!({"exit_code": 0, "stdout": "file /etc/passwd\n"}), 502, "The agent server returned an invalid response"),
        (json!({"exit_code": 0, "stdout": format!("file {gone}\n")}), 502, "The agent server returned status 404"),
        (json!({"exit_code": 127, "stderr": "sh: not found"}), 502, "The agent server returned an invalid response"),
    ] {
        harness.agent.clear_faults();
        harness.agent.inject(Fault::new(run, Nth::Always, Kind::Status(200, answer.to_string())));
        for route in ["git/changes?path=/workspace/project", "git/diff?path=/workspace/project/a"] {
            let response = harness.get(id, route).await.status_and_body();
            assert_eq!(response.0, status, "{answer}: {response:?}");
            assert!(response.1["detail"].as_str().expect("a reason").starts_with(detail), "{answer}: {response:?}");
        }
    }
    harness.end().await;
}

#[tokio::test]
async fn messages_go_to_the_agent_as_they_were_sent() {
    let harness = WorkerHarness::start().await;
    let id = harness.conversation_in(&harness.agent.working_dir()).await;
    let answer = harness.say(id, &said("Hello")).await;
    assert_eq!(answer.status_and_body(), (200, json!({"success": true, "sandbox_status": "RUNNING", "message": null})));
    let image = json!({"role": "user", "content": [{"type": "image", "image_urls": ["data:image/png;base64,AA=="]}], "run": false});
    assert_eq!(harness.say(id, &image).await.status, 200);
    let sent: Vec<Value> =
        harness.agent.requests_to("POST /api/conversations/{id}/events").iter().map(Request::json).collect();
    let text = json!({"cache_prompt": false, "type": "text", "text": "Hello"});
    let picture = json!({"cache_prompt": false, "type": "image", "image_urls": ["data:image/png;base64,AA=="]});
    assert_eq!(
        sent,
        [
            json!({"role": "user", "content": [text], "run": true}),
            json!({"role": "user", "content": [picture], "run": false}),
        ]
    );
    for (body, kind, place) in [
        (json!({}), "missing", json!(["body", "content"])),
        (json!({"content": []}), "too_short", json!(["body", "content"])),
        (json!({"content": "Hello"}), "list_type", json!(["body", "content"])),
        (json!({"content": [{"type": "text"}]}), "missing", json!(["body", "content", 0, "TextContent", "text"])),
        (json!({"role": "assistant", "content": [{"text": "x"}]}), "literal_error", json!(["body", "role"])),
        (json!({"content": [{"text": "x"}], "run": "perhaps"}), "bool_parsing", json!(["body", "run"])),
        (json!([]), "model_attributes_type", json!(["body"])),
    ] {
        let answer = harness.say(id, &body).await;
        assert_eq!(answer.status, 422, "{body}");
        let first = &answer.body["detail"][0];
        assert_eq!((&first["type"], &first["loc"]), (&json!(kind), &place), "{body}");
    }
    assert_eq!(harness.agent.requests_to("POST /api/conversations/{id}/events").len(), 2);
    harness.end().await;
}

/// What is wrong and what to do, in our words: those of the agent server are for the log.
#[tokio::test]
async fn a_message_for_an_agent_that_cannot_be_set_up_is_answered_with_the_mistake() {
    let harness = WorkerHarness::start().await;
    let id = harness.conversation_in(&harness.agent.working_dir()).await;
    for (exception, status, expected) in [
        (
            "Local plugin path does not exist: /secret words",
            409,
            "A plugin cannot be loaded; correct its source, ref and repo_path in the request, or leave it out. Then start a \
                new conversation",
        ),
        (
            "[Errno 28] No space left on device: secret words",
            502,
            "The agent server returned status 500. The disk of the sandbox is full; delete files or conversations in it, or use \
                another sandbox",
        ),
        ("secret words", 502, "The agent server returned status 500"),
    ] {
        let answer = json!({"detail": "Internal Server Error", "exception": exception});
        harness.agent.fail_setup(None, 500, &answer.to_string());
        let answer = harness.say(id, &said("Hello")).await;
        assert_eq!((answer.status, &answer.body), (status, &json!({"detail": expected})), "{exception}");
    }
    harness.end().await;
}

#[tokio::test]
async fn whatever_an_agent_server_does_each_route_answers_in_time_and_says_what_is_the_matter() {
    let mut harness = WorkerHarness::start().await;
    let id = harness.conversation_in(&harness.agent.working_dir()).await;
    harness.write("PLAN.md", "a plan");
    let private = StandInAgent::start(SESSION_KEY).await;
    let routes = [
        ("skills", "POST /api/skills"),
        ("hooks", "POST /api/hooks"),
        ("file", "GET /api/file/download"),
        ("files", "POST /api/bash/execute_bash_command"),
        ("git/changes?path=/workspace/project", "POST /api/bash/execute_bash_command"),
        ("git/diff?path=/workspace/project/PLAN.md", "POST /api/bash/execute_bash_command"),
        ("send-message", "POST /api/conversations/{id}/events"),
    ];
    let faults = [
        ("hangs", Kind::Hang),
        ("garbage", Kind::Garbage),
        ("cut before", Kind::CutBefore),
        ("cut after", Kind::CutAfter),
        ("401", Kind::Status(401, r#"{"detail": "Unauthorized: secret words"}"#.to_owned())),
        ("404", Kind::Status(404, r#"{"detail": "Not Found: secret words"}"#.to_owned())),
        ("500", Kind::Status(500, r#"{"exception": "secret words"}"#.to_owned())),
        ("10 MB", Kind::Huge(20 * 1024 * 1024)),
        ("redirect", Kind::Redirect(format!("{}/api/conversations/count", private.url()))),
    ];
    let json_of = |text: &str| json!({"detail": text});
    for (what, kind) in &faults {
        harness.set_budget(if *what == "hangs" { SHORT_BUDGET } else { BUDGET });
        // All that the route asks, or only what it is there for.
        for everything in [false, true] {
            for (route, asked) in routes {
                harness.agent.clear_faults();
                for faulty in routes.iter().map(|(_, asked)| *asked).chain(["GET /api/conversations"]) {
                    if everything || faulty == asked {
                        harness.agent.inject(Fault::new(faulty, Nth::Always, kind.clone()));
                    }
                }
                let begun = Instant::now();
                let answer = match route {
                    "send-message" => harness.say(id, &said("Hello")).await,
                    route => harness.get(id, route).await,
                };
                let case = format!("{what}, {route}, everything: {everything}: {} {}", answer.status, answer.body);
                assert!(begun.elapsed() < AT_MOST, "{case} after {:?}", begun.elapsed());
                assert!(!answer.body.to_string().contains("secret words"), "{case}");
                let status = match *what {
                    "401" => Some(401),
                    "404" => Some(404),
                    "500" => Some(500),
                    "redirect" => Some(302),
                    _ => None,
                };
                match route {
                    "skills" => {
                        assert_eq!((answer.status, &answer.body), (200, &json!({"skills": []})), "{case}");
                        assert_eq!(answer.header("x-skills-status"), Some("unreachable"), "{case}");
                    }
                    "hooks" => {
                        let expected = match (*what, status) {
                            (_, Some(status)) => format!("Agent-server returned status {status} when loading hooks"),
                            ("garbage" | "10 MB", _) => {
                                "Agent-server returned an invalid response when loading hooks".to_owned()
                            }
                            _ => "Failed to reach agent-server when loading hooks".to_owned(),
                        };
                        assert_eq!((answer.status, &answer.body), (502, &json!({"error": expected})), "{case}");
                    }
                    "file" => {
                        let (text, expected) = match *what {
                            "404" if !everything => ("", "missing"),
                            "10 MB" if !everything => ("", "too-large"),
                            "garbage" if !everything => ("<html>not what you asked for", "ok"),
                            _ => ("", "unreachable"),
                        };
                        assert_eq!((answer.status, &answer.body), (200, &json!(text)), "{case}");
                        assert_eq!(answer.header("x-file-status"), Some(expected), "{case}");
                    }
                    _ => {
                        let expected = match (*what, status) {
                            (_, Some(status)) => format!("The agent server returned status {status}"),
                            ("garbage", _) => "The agent server returned an invalid response".to_owned(),
                            ("10 MB", _) => "The agent server's response is too large".to_owned(),
                            ("hangs", _) if route == "send-message" => "The agent server did not respond in time; its \
                                agent may be busy, and the message may still arrive"
                                .to_owned(),
                            ("hangs", _) => "The agent server did not respond in time".to_owned(),
                            _ => "The agent server's response was cut off".to_owned(),
                        };
                        assert_eq!((answer.status, &answer.body), (502, &json_of(&expected)), "{case}");
                    }
                }
            }
        }
    }
    assert!(private.requests().is_empty(), "a redirect was followed");
    // A port without a listener.
    harness.agent.clear_faults();
    let unreachable = StandInSandboxes::at("http://127.0.0.1:9".to_owned(), harness.agent.working_dir());
    unreachable.start(&harness.user, SANDBOX, None).await.expect("a sandbox");
    let http = HttpClient::new(AddressPolicy::Any);
    let places = WorkspaceLocator::new(harness.conversations.clone(), Arc::new(unreachable), http);
    harness.router = router(&places, BUDGET);
    let expected = json_of("The agent server cannot be reached");
    for (route, status) in [("git/changes?path=.", 404), ("git/diff?path=PLAN.md", 404), ("files", 502)] {
        assert_eq!(harness.get(id, route).await.status_and_body(), (status, expected.clone()), "{route}");
    }
    assert_eq!(harness.say(id, &said("Hello")).await.status_and_body(), (502, expected));
    assert_eq!(harness.file(id, "").await, (String::new(), "unreachable".to_owned()));
    harness.end().await;
}
