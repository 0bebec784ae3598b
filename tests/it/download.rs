//! Exports over HTTP: what is in them, when one is used again, and that nothing half is ever served.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::extract::Request;
use axum::middleware::{self, Next};
use futures::future::join_all;
use local::agent_server::find_python;
use local::options::{CommonOptions, SandboxKind};
use local::server::{Environment, Server};
use reqwest::{Client, Response};
use serde_json::{Value, json};
use shared::Time;
use shared::aws::Aws;
use shared::config::{ExportConfig, Names};
use shared::conversation::store::{ConversationChange, ConversationStore};
use shared::conversation::{ConversationRecord, MetricsSnapshot};
use shared::digest::sha256_hex;
use shared::event::store::{Event, EventStore};
use shared::export::store::ExportStore;
use shared::export::zip::ZipWriter;
use shared::export::{Exporter, WARNING, python_json};
use shared::http::caller::Caller;
use shared::http_client::{AddressPolicy, HttpClient};
use shared::jobs::queue::Job;
use shared::sandbox::SandboxService as _;
use shared::stores::Stores;
use shared::user::UserId;
use tempfile::TempDir;
use tokio::process::Command;
use uuid::Uuid;

use crate::support::engines::{Engines, skipped_on_ministack};
use crate::support::fault_proxy::{FaultProxy, Moment, Stop};
use crate::support::product::{Product, saying};
use crate::support::scripted_llm::ScriptedLlm;
use crate::support::server;
use crate::support::wait::wait_for;
use crate::support::worker_harness::StandInSandboxes;

const PREFIX: &str = "download-";
const SANDBOX: &str = "the-sandbox";
/// The user that a request is of, unless it says another.
const USER: &str = "somebody";
const USER_HEADER: &str = "x-user-of-the-test";
const END_WITHIN: Duration = Duration::from_secs(120);

/// The function alone, on engines of its own. Its calls to DynamoDB and S3 go through a gate.
struct WorkerHarness {
    url: String,
    http: Client,
    aws: Aws,
    names: Names,
    user: UserId,
    conversations: ConversationStore,
    events: EventStore,
    exporter: Exporter,
    gate: FaultProxy,
    sandboxes: Arc<StandInSandboxes>,
    agent: Arc<AgentLog>,
    engines: Engines,
    folder: TempDir,
    _served: [server::Server; 3],
}

/// The events of an agent server.
#[derive(Debug, Default)]
struct AgentLog {
    /// Newest first.
    events: std::sync::Mutex<Vec<Value>>,
    asked: AtomicUsize,
}

impl AgentLog {
    fn answer(&self, request: &server::Request) -> axum::response::Response {
        self.asked.fetch_add(1, Ordering::Relaxed);
        assert!(request.is("GET /api/conversations/{id}/events/search"), "{request:?}");
        assert_eq!(request.query_value("sort_order").as_deref(), Some("TIMESTAMP_DESC"));
        let events = self.events.lock().expect("events");
        let limit: usize = request.query_value("limit").expect("a limit").parse().expect("a number");
        let start = request.query_value("page_id");
        let start = start.map_or(0, |id| events.iter().position(|event| event["id"] == *id).expect("a page"));
        let items: Vec<&Value> = events.iter().skip(start).take(limit).collect();
        let next = events.get(start + limit).map(|event| event["id"].clone());
        server::json(http::StatusCode::OK, &json!({"items": items, "next_page_id": next}))
    }
}

/// Redirects are the test's to follow.
fn client() -> Client {
    Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build().expect("a client")
}

/// Indexes of the embedded engine never lag.
fn config() -> ExportConfig {
    ExportConfig { settle: Duration::ZERO, ..ExportConfig::default() }
}

impl WorkerHarness {
    async fn new(config: ExportConfig) -> Self {
        let folder = TempDir::new().expect("a folder");
        let engines = Engines::start(folder.path()).await;
        let sdk = engines.sdk_config().await;
        let aws = Aws::new(&sdk);
        let mut names = engines.names(PREFIX);
        names.job_queue_url = schema::make_all(&aws, &names, PREFIX).await.expect("a schema").jobs;
        let (gate, agent) = (FaultProxy::new(), Arc::new(AgentLog::default()));
        let (dynamodb_way, s3_way) = (gate.to(&engines.dynamodb).await, gate.to(&engines.s3).await);
        let agent_server = {
            let agent = agent.clone();
            server::Server::start(move |request| {
                let agent = agent.clone();
                async move { Ok(agent.answer(&request)) }
            })
            .await
        };
        let network = engines.network_sdk_config().await;
        let gated = Aws {
            dynamodb: aws_sdk_dynamodb::Client::from_conf(
                aws_sdk_dynamodb::config::Builder::from(&network).endpoint_url(dynamodb_way.url()).build(),
            ),
            s3: aws_sdk_s3::Client::from_conf(
                aws_sdk_s3::config::Builder::from(&network).endpoint_url(s3_way.url()).force_path_style(true).build(),
            ),
            ..aws.clone()
        };
        let sandboxes = Arc::new(StandInSandboxes::at(agent_server.url(), "/nowhere".to_owned()));
        let exporter = Exporter::new(&config, &names, &gated, sandboxes.clone(), HttpClient::new(AddressPolicy::Any));
        let context = download::Context::with_exporter(exporter.clone(), config.inline_limit);
        let router = download::router(context).layer(middleware::from_fn(async |mut request: Request, next: Next| {
            let user = request.headers().get(USER_HEADER).map_or(USER, |user| user.to_str().expect("text"));
            let caller = Caller(UserId::new(user));
            request.extensions_mut().insert(caller);
            next.run(request).await
        }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self {
            url,
            http: client(),
            user: UserId::new(USER),
            conversations: Stores::without_key(&names, &aws).conversations(),
            events: Stores::without_key(&names, &aws).events(),
            aws,
            names,
            exporter,
            gate,
            sandboxes,
            agent,
            engines,
            folder,
            _served: [dynamodb_way, s3_way, agent_server],
        }
    }

    async fn conversation(&self, parent: Option<Uuid>) -> Uuid {
        let record = record(&self.user, parent);
        store(&self.conversations, &record).await;
        record.id
    }

    async fn append(&self, conversation: Uuid, events: Vec<Event>) {
        self.events.append(&self.user, conversation, events).await.expect("stored");
    }

    async fn get(&self, conversation: impl std::fmt::Display) -> Response {
        let url = format!("{}/api/v1/app-conversations/{conversation}/download", self.url);
        self.http.get(url).send().await.expect("an answer")
    }

    /// The zip, wherever it is, in a file.
    async fn download(&self, conversation: Uuid) -> Zip {
        let answer = self.get(conversation).await;
        let answer = match answer.status().as_u16() {
            302 => self.http.get(answer.headers()["location"].to_str().expect("text")).send().await.expect("an answer"),
            _ => answer,
        };
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["content-type"], "application/zip");
        let disposition = format!("attachment; filename=\"conversation_{conversation}.zip\"");
        assert_eq!(answer.headers()["content-disposition"], disposition.as_str());
        self.zip(&answer.bytes().await.expect("a body"))
    }

    fn zip(&self, bytes: &[u8]) -> Zip {
        let path = self.folder.path().join(format!("{}.zip", Uuid::new_v4()));
        fs::write(&path, bytes).expect("written");
        Zip { path }
    }

    /// The exports in the bucket, by key. Finished ones only: an upload is no object.
    async fn objects(&self) -> Vec<String> {
        let objects = self.aws.s3.list_objects_v2().bucket(&self.names.bucket).prefix("exports/").send().await;
        let objects = objects.expect("a list").contents.unwrap_or_default();
        objects.into_iter().map(|object| object.key.expect("a key")).collect()
    }

    async fn zips(&self) -> Vec<String> {
        self.objects().await.into_iter().filter(|key| key.ends_with(".zip")).collect()
    }

    /// What there is of uploads that were begun and neither completed nor given up.
    async fn uploads(&self) -> usize {
        if self.engines.as_embedded().is_none() {
            let listed = self.aws.s3.list_multipart_uploads().bucket(&self.names.bucket).send().await.expect("a list");
            return listed.uploads().len();
        }
        // The embedded engine has no such list.
        let files = fs::read_dir(self.folder.path().join("s3")).expect("a folder").filter_map(Result::ok);
        let names = files.map(|file| file.file_name().to_string_lossy().into_owned());
        names.filter(|name| name.starts_with(".upload")).count()
    }

    async fn record(&self, conversation: Uuid) -> Option<shared::export::store::ExportRecord> {
        let store = self.exporter.store();
        store.get(&self.user, conversation).await.expect("the store")
    }

    /// As if time had passed.
    async fn let_the_lease_run_out(&self, conversation: Uuid) {
        let text = |text: String| aws_sdk_dynamodb::types::AttributeValue::S(text);
        let update = self.aws.dynamodb.update_item().table_name(&self.names.users);
        let update = update
            .key("user", text(USER.to_owned()))
            .key("kind", text(format!("export#{}", conversation.simple())))
            .update_expression("SET lease_until = :past")
            .condition_expression("attribute_exists(lease_owner)")
            .expression_attribute_values(":past", text("2000-01-01T00:00:00.000000Z".to_owned()));
        // Refused where there is no lease.
        drop(update.send().await);
    }

    /// As if the export had been finished so many minutes ago.
    async fn age_finished(&self, conversation: Uuid, minutes: u64) {
        let text = |text: String| aws_sdk_dynamodb::types::AttributeValue::S(text);
        let at = Time::now().minus(Duration::from_secs(60 * minutes));
        let update = self.aws.dynamodb.update_item().table_name(&self.names.users);
        let update = update
            .key("user", text(USER.to_owned()))
            .key("kind", text(format!("export#{}", conversation.simple())))
            .update_expression("SET finished.#at = :at")
            .expression_attribute_names("#at", "at")
            .expression_attribute_values(":at", text(at.sortable()));
        update.send().await.expect("a finished export");
    }

    /// Jobs in the queue.
    async fn jobs(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        loop {
            let received = self.aws.sqs.receive_message().queue_url(&self.names.job_queue_url).send().await;
            let Some(message) = received.expect("the queue").messages.unwrap_or_default().pop() else { return jobs };
            jobs.push(Job::from_body(&message.body.expect("a body")).expect("a job"));
            let receipt = message.receipt_handle.expect("a receipt");
            let delete = self.aws.sqs.delete_message().queue_url(&self.names.job_queue_url).receipt_handle(receipt);
            delete.send().await.expect("deleted");
        }
    }

    async fn end(self) {
        self.engines.shutdown().await;
    }
}

/// A zip in a file, read by Python: what we write is not to be judged by what we read with.
struct Zip {
    path: PathBuf,
}

impl Zip {
    /// Name and text of each member, in the archive's order. Fails where a member is not as it should be.
    async fn members(&self) -> Vec<(String, String)> {
        self.read("data.decode()").await
    }

    /// The same with the SHA-256 of the text.
    async fn digests(&self) -> Vec<(String, String)> {
        self.read("hashlib.sha256(data).hexdigest()").await
    }

    async fn names(&self) -> Vec<String> {
        self.read("''").await.into_iter().map(|(name, _)| name).collect()
    }

    async fn read(&self, form: &str) -> Vec<(String, String)> {
        let script = format!(
            r"
import hashlib, json, sys, zipfile
with zipfile.ZipFile(sys.argv[1]) as archive:
    read = []
    for info in archive.infolist():
        assert info.compress_type == zipfile.ZIP_DEFLATED, info
        assert info.external_attr >> 16 == 0o100644, info
        data = archive.read(info)
        read.append((info.filename, {form}))
    assert len({{info.date_time for info in archive.infolist()}}) == 1
print(json.dumps(read))
"
        );
        if let Ok(tested) = Command::new("unzip").arg("-tqq").arg(&self.path).output().await {
            assert!(tested.status.success(), "unzip: {tested:?}");
        }
        serde_json::from_str(&python(&script, &[&self.path]).await).expect("JSON")
    }
}

async fn python(script: &str, arguments: &[&Path]) -> String {
    let python = find_python(None).await.expect("a Python");
    let ran = Command::new(python.path).arg("-c").arg(script).args(arguments).output().await.expect("run");
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).expect("text")
}

fn record(user: &UserId, parent: Option<Uuid>) -> ConversationRecord {
    let now = Time::now();
    ConversationRecord {
        user: user.clone(),
        id: Uuid::new_v4(),
        sandbox_id: SANDBOX.to_owned(),
        selected_repository: Some("owner/näme".to_owned()),
        selected_branch: None,
        git_provider: None,
        title: Some("Tïtle 😀".to_owned()),
        trigger: None,
        pr_number: vec![3],
        llm_model: Some("model".to_owned()),
        metrics: MetricsSnapshot::default(),
        parent_conversation_id: parent,
        public: None,
        tags: shared::conversation::tags::Tags::default(),
        created_at: now,
        updated_at: now,
    }
}

async fn store(conversations: &ConversationStore, record: &ConversationRecord) {
    let added = conversations.import(&record.user, std::slice::from_ref(record)).await.expect("stored");
    assert_eq!(added, [true]);
}

fn event(id: &str, timestamp: &str, json: &str) -> Event {
    Event { id: id.to_owned(), timestamp: timestamp.to_owned(), kind: "MessageEvent".to_owned(), json: json.to_owned() }
}

fn numbered(number: usize) -> Event {
    let timestamp = format!("2025-01-01T00:{:02}:{:02}", number / 60, number % 60);
    let json = json!({"id": format!("event-{number}"), "timestamp": timestamp, "kind": "MessageEvent"});
    event(&format!("event-{number}"), &timestamp, &json.to_string())
}

/// Numbers that look random and are the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }

    /// Text that hardly gets smaller when it is packed.
    fn noise(&mut self, length: usize) -> String {
        const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+-";
        let mut letter = || char::from(LETTERS[usize::try_from(self.roll(64)).expect("small")]);
        (0..length).map(|_| letter()).collect()
    }

    /// A JSON text, in a form that hardly anybody writes.
    fn json(&mut self, depth: u64) -> String {
        let space = [" ", "", "\n\t", ""][usize::try_from(self.roll(4)).expect("small")];
        let kind = self.roll(if depth == 0 { 4 } else { 6 });
        let value = match kind {
            0 => ["null", "true", "false"][usize::try_from(self.roll(3)).expect("small")].to_owned(),
            1 => {
                let bits = self.roll(63);
                let (sign, whole) = (["", "-"][usize::from(self.roll(2) == 0)], self.roll(1 << bits));
                let fraction = if self.roll(2) == 0 { format!(".{:03}", self.roll(1000)) } else { String::new() };
                let exponent = match self.roll(4) {
                    0 => format!("e{}", self.roll(30)),
                    1 => format!("E-{}", self.roll(330)),
                    _ => String::new(),
                };
                format!("{sign}{whole}{fraction}{exponent}")
            }
            2 | 3 => self.string(),
            4 => {
                let items: Vec<String> = (0..self.roll(4)).map(|_| self.json(depth - 1)).collect();
                format!("[{space}{}]", items.join(","))
            }
            _ => {
                // A key that comes twice is another thing.
                let count = self.roll(4);
                let mut entry = |index| {
                    let key = self.string();
                    format!("\"{index}{}{space}:{}", &key[1..], self.json(depth - 1))
                };
                let entries: Vec<String> = (0..count).map(&mut entry).collect();
                format!("{{{}{space}}}", entries.join(", "))
            }
        };
        format!("{space}{value}{space}")
    }

    fn string(&mut self) -> String {
        let mut text = "\"".to_owned();
        for _ in 0..self.roll(12) {
            match self.roll(7) {
                0 => text += &format!("\\u{:04x}", self.roll(0x10000)),
                1 => text += &format!("\\u{:04X}", self.roll(0x100)),
                2 => {
                    text += ["\\n", "\\t", "\\\"", "\\\\", "\\/", "\\b", "\\f", "\\r"]
                        [usize::try_from(self.roll(8)).expect("small")];
                }
                3 => text.push(
                    ['é', '€', '😀', '\u{7f}', '\u{80}', '\u{2028}'][usize::try_from(self.roll(6)).expect("small")],
                ),
                _ => text.push(char::from(b'a' + u8::try_from(self.roll(26)).expect("small"))),
            }
        }
        text + "\""
    }
}

#[tokio::test]
async fn the_json_is_what_python_makes_of_it() {
    const SCRIPT: &str = r"
import json, sys
given, ours = (json.load(open(name, encoding='utf-8')) for name in sys.argv[1:])
assert len(given) == len(ours) > 1000
for given, ours in zip(given, ours):
    theirs = json.dumps(json.loads(given), indent=2)
    assert theirs == ours, (given, theirs, ours)
";
    let mut dice = Dice(0x2545_F491_4F6C_DD1D);
    let mut given: Vec<String> = (0..3000).map(|_| dice.json(5)).collect();
    given.extend(
        [
            "-0",
            "-0.0",
            "0e0",
            "1e22",
            "1e23",
            "123456789012345678901234567890",
            "1E400",
            "-1E400",
            "5e-324",
            "2.5e-324",
            "0.1e-6",
            "9007199254740993",
            "9007199254740993.0",
            "1.7976931348623158e308",
            "123456789.123456789",
            "1e15",
            "1e16",
            "12345678901234567.0",
            "0.0001",
            "0.00001",
            r#""\ud800""#,
            r#""\udc00\ud800""#,
            r#""\u007f""#,
            "[[[]]]",
            "[{},[]]",
            "{\"\":{}}",
        ]
        .map(ToOwned::to_owned),
    );
    let ours: Vec<String> = given
        .iter()
        .map(|given| {
            let mut out = Vec::new();
            python_json::write(given, &mut out).unwrap_or_else(|error| panic!("{given}: {error}"));
            String::from_utf8(out).expect("ASCII")
        })
        .collect();
    let folder = TempDir::new().expect("a folder");
    let files = [("given", given), ("ours", ours)].map(|(name, texts)| {
        let path = folder.path().join(name);
        fs::write(&path, serde_json::to_vec(&texts).expect("JSON")).expect("written");
        path
    });
    python(SCRIPT, &[&files[0], &files[1]]).await;
}

#[tokio::test]
async fn members_are_those_of_the_contract_byte_by_byte() {
    let rig = WorkerHarness::new(config()).await;
    let id = rig.conversation(None).await;
    // Nothing was told yet.
    let empty = rig.download(id).await.members().await;
    assert_eq!(empty.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["meta.json"]);
    let child = rig.conversation(Some(id)).await;
    let large = format!(r#"{{"text": "{}"}}"#, "é😀x".repeat(750_000));
    assert!(large.len() > 5_000_000);
    rig.append(
        id,
        vec![
            event(
                "../up/and\\away",
                "2025-01-01T00:00:03",
                r#"{"more":[1.10, 1e2,123456789012345678901234567890,-0],"none":null}"#,
            ),
            event("second", "2025-01-01T00:00:02", &large),
            event(
                "first",
                "2025-01-01T00:00:01.5",
                "{\"z\":\"\\u00e9é\\ud83d\\ude00😀\\u001f\\n\\t\\b\\f\\r\u{7f}/\\/\",\"a\":[[],{},[{}]]}",
            ),
        ],
    )
    .await;
    let members = rig.download(id).await.members().await;
    let escaped = r"\u00e9\ud83d\ude00x".repeat(750_000);
    let mut record =
        serde_json::to_value(rig.conversations.get(&rig.user, id).await.expect("the store")).expect("JSON");
    let meta = format!(
        r#"{{
  "id": "{}",
  "created_by_user_id": "somebody",
  "sandbox_id": "the-sandbox",
  "selected_repository": "owner/näme",
  "selected_branch": null,
  "git_provider": null,
  "title": "Tïtle 😀",
  "trigger": null,
  "pr_number": [
    3
  ],
  "llm_model": "model",
  "agent_kind": "openhands",
  "metrics": {{
    "model_name": "default",
    "accumulated_cost": 0.0,
    "max_budget_per_task": null,
    "accumulated_token_usage": {{
      "model": "",
      "prompt_tokens": 0,
      "completion_tokens": 0,
      "cache_read_tokens": 0,
      "cache_write_tokens": 0,
      "reasoning_tokens": 0,
      "context_window": 0,
      "per_turn_token": 0,
      "response_id": ""
    }}
  }},
  "parent_conversation_id": null,
  "sub_conversation_ids": [
    "{}"
  ],
  "public": null,
  "tags": {{}},
  "created_at": {},
  "updated_at": {}
}}"#,
        id.simple(),
        child.simple(),
        record["created_at"].take(),
        record["updated_at"].take(),
    );
    let expected = [
        (
            "event_000000_first.json",
            "{\n  \"z\": \"\\u00e9\\u00e9\\ud83d\\ude00\\ud83d\\ude00\\u001f\\n\\t\\b\\f\\r\\u007f//\",\n  \"a\": [\n    [],\n    {},\n    [\n      {}\n    ]\n  ]\n}".to_owned(),
        ),
        ("event_000001_second.json", format!("{{\n  \"text\": \"{escaped}\"\n}}")),
        (
            "event_000002_.._up_and_away.json",
            "{\n  \"more\": [\n    1.1,\n    100.0,\n    123456789012345678901234567890,\n    0\n  ],\n  \"none\": null\n}".to_owned(),
        ),
        ("meta.json", meta),
    ]
    .map(|(name, text)| (name.to_owned(), text));
    assert!(
        members == expected,
        "{:#?}",
        members.iter().map(|(name, text)| (name, &text[..text.len().min(900)])).collect::<Vec<_>>()
    );
    rig.end().await;
}

#[tokio::test]
async fn what_is_not_the_callers_is_not_there() {
    let rig = WorkerHarness::new(config()).await;
    let (own, unknown) = (rig.conversation(None).await, Uuid::new_v4());
    let not_found = |id: Uuid| json!({"detail": format!("Conversation not found: {id}")});
    let answer = rig.get(unknown.simple()).await;
    assert_eq!((answer.status().as_u16(), answer.json::<Value>().await.expect("JSON")), (404, not_found(unknown)));
    let url = format!("{}/api/v1/app-conversations/{own}/download", rig.url);
    let answer = rig.http.get(url).header(USER_HEADER, "another").send().await.expect("an answer");
    assert_eq!((answer.status().as_u16(), answer.json::<Value>().await.expect("JSON")), (404, not_found(own)));
    for bad in ["nothing", "%FF"] {
        let answer = rig.get(bad).await;
        assert_eq!(answer.status(), 422);
        let told: Value = answer.json().await.expect("JSON");
        assert_eq!(
            (&told["detail"][0]["type"], &told["detail"][0]["loc"]),
            (&json!("uuid_parsing"), &json!(["path", "conversation_id"]))
        );
    }
    assert_eq!(rig.objects().await, [""; 0], "nothing was made");
    rig.end().await;
}

#[tokio::test]
async fn an_unchanged_conversation_is_zipped_once_and_a_changed_one_anew() {
    let rig = WorkerHarness::new(config()).await;
    let id = rig.conversation(None).await;
    rig.append(id, vec![numbered(5)]).await;
    let first = fs::read(&rig.download(id).await.path).expect("a file");
    rig.gate.arm(usize::MAX, Stop::Refuse);
    let again = fs::read(&rig.download(id).await.path).expect("a file");
    assert!(first == again, "the same bytes");
    assert!(!rig.gate.calls().iter().any(|call| call.starts_with("PUT")), "{:?}", rig.gate.calls());
    assert_eq!(rig.zips().await.len(), 1);
    // A late one, in front of the first: neither the last event nor the end of the log changes.
    rig.append(id, vec![numbered(1)]).await;
    assert_eq!(
        rig.download(id).await.names().await,
        ["event_000000_event-1.json", "event_000001_event-5.json", "meta.json"]
    );
    // The same event again, with another content.
    rig.append(id, vec![Event { json: r#"{"changed": true}"#.into(), ..numbered(1) }]).await;
    assert_eq!(rig.download(id).await.members().await[0].1, "{\n  \"changed\": true\n}");
    let renamed = ConversationChange::default().title(Some("Another"));
    rig.conversations.update(&rig.user, id, renamed).await.expect("the store");
    let members = rig.download(id).await.members().await;
    assert!(members.last().expect("members").1.contains(r#""title": "Another""#));
    rig.conversation(Some(id)).await;
    rig.download(id).await;
    assert_eq!(rig.zips().await.len(), 5);
    assert_eq!(rig.record(id).await, None, "no record is left");

    // What was begun right behind a change may lack what indexes did not show yet.
    let patient = WorkerHarness::new(ExportConfig { settle: Duration::from_secs(3600), ..config() }).await;
    let id = patient.conversation(None).await;
    patient.append(id, vec![numbered(1)]).await;
    for _ in 0..2 {
        patient.gate.arm(usize::MAX, Stop::Refuse);
        patient.download(id).await;
        assert!(patient.gate.calls().iter().any(|call| call.starts_with("PUT")), "{:?}", patient.gate.calls());
    }
    rig.end().await;
    patient.end().await;
}

#[tokio::test]
async fn a_large_one_is_behind_a_link_that_curl_and_browsers_follow() {
    let folder = TempDir::new().expect("a folder");
    let export = ExportConfig { inline_limit: 1000, ..config() };
    let product = start(&folder, Environment { export, ..Environment::default() }).await;
    let (user, events, id) = product_with_events(&product, 30).await;
    let url = format!("http://{}/api/v1/app-conversations/{id}/download", product.address);
    let origin = "http://localhost:1234";
    let answer = client().get(&url).header("origin", origin).send().await.expect("an answer");
    assert_eq!(answer.status(), 302);
    assert_eq!(answer.headers()["access-control-allow-origin"], origin);
    let link = answer.headers()["location"].to_str().expect("text").to_owned();
    assert!(link.contains("X-Amz-Expires=900"), "{link}");
    // On the same port, so that the origin of a redirected request stays that of the page. Browsers ask first where a header is added.
    assert!(link.starts_with("/openhands-data/exports/"), "{link}");
    let link = format!("http://{}{link}", product.address);
    let asked = client()
        .request(http::Method::OPTIONS, &link)
        .header("origin", origin)
        .header("access-control-request-method", "GET")
        .header("access-control-request-headers", "x-session-api-key")
        .send()
        .await
        .expect("an answer");
    let allowed = asked.headers()["access-control-allow-headers"].to_str().expect("text");
    assert!(allowed == "*" || allowed.contains("x-session-api-key"), "{allowed}");
    let fetched = client().get(&link).header("origin", origin).send().await.expect("an answer");
    assert_eq!(fetched.status(), 200);
    assert_eq!(fetched.headers()["access-control-allow-origin"], origin);
    let exposed = fetched.headers()["access-control-expose-headers"].to_str().expect("text").to_lowercase();
    assert!(exposed.contains("content-disposition"), "{exposed}");
    assert_eq!(fetched.headers()["content-type"], "application/zip");
    let name = format!("conversation_{id}.zip");
    assert_eq!(fetched.headers()["content-disposition"], format!("attachment; filename=\"{name}\"").as_str());
    // The signature is what lets it in.
    let tampered = link.replace("X-Amz-Expires=900", "X-Amz-Expires=90000");
    assert_eq!(client().get(tampered).send().await.expect("an answer").status(), 403);
    let saved =
        Command::new("curl").args(["-sSfLOJ", "--noproxy", "*", &url]).current_dir(folder.path()).output().await;
    if let Ok(saved) = saved {
        assert!(saved.status.success(), "{saved:?}");
        let zip = Zip { path: folder.path().join(&name) };
        assert_eq!(zip.names().await.len(), 31);
    }
    // Small enough, it is the answer itself.
    let small = record(&user, None);
    let conversations = conversations(&product);
    store(&conversations, &small).await;
    events.append(&user, small.id, vec![]).await.expect("stored");
    let url = format!("http://{}/api/v1/app-conversations/{}/download", product.address, small.id);
    let answer = client().get(url).send().await.expect("an answer");
    assert_eq!((answer.status().as_u16(), answer.headers().get("location")), (200, None));
    assert_eq!(answer.headers()["cache-control"], "no-cache, no-store, must-revalidate, max-age=0");
    product.shutdown().await;
}

#[tokio::test]
async fn callers_at_once_cause_one_export() {
    let rig = WorkerHarness::new(config()).await;
    let id = rig.conversation(None).await;
    rig.append(id, (0..250).map(numbered).collect()).await;
    rig.gate.arm(usize::MAX, Stop::Refuse);
    let zips = join_all((0..5).map(|_| rig.download(id))).await;
    let puts = rig.gate.calls().into_iter().filter(|call| call.starts_with("PUT")).count();
    assert_eq!(puts, 1, "{:?}", rig.gate.calls());
    let bytes: Vec<Vec<u8>> = zips.iter().map(|zip| fs::read(&zip.path).expect("a file")).collect();
    assert!(bytes.iter().all(|zip| *zip == bytes[0]));
    assert_eq!(zips[0].names().await.len(), 251);
    rig.end().await;
}

/// Events that make several parts, in several pages.
async fn append_large(rig: &WorkerHarness, id: Uuid, count: usize) -> Vec<(String, String)> {
    let mut dice = Dice(42);
    let mut members = Vec::new();
    for number in 0..count {
        let noise = dice.noise(1_500_000);
        let json = format!(r#"{{"noise":"{noise}"}}"#);
        rig.append(id, vec![Event { json, ..numbered(number) }]).await;
        members.push((format!("event_{number:06}_event-{number}.json"), format!("{{\n  \"noise\": \"{noise}\"\n}}")));
    }
    members
}

#[tokio::test]
async fn a_failure_or_a_crash_at_any_call_leaves_nothing_half_and_the_next_call_succeeds() {
    // A lease that is renewed by parts alone, and all the time there is, so that the calls are the same each time.
    let hour = Duration::from_secs(3600);
    let rig =
        WorkerHarness::new(ExportConfig { lease: hour, budget: hour, catch_up: hour, inline_limit: 0, ..config() })
            .await;
    let id = rig.conversation(None).await;
    let expected: Vec<(String, String)> =
        append_large(&rig, id, 8).await.into_iter().map(|(name, text)| (name, sha256_hex(&text))).collect();
    rig.gate.arm(usize::MAX, Stop::Refuse);
    rig.download(id).await;
    let calls = rig.gate.calls();
    assert!(calls.iter().filter(|call| call.contains("partNumber")).count() == 2, "{calls:?}");
    let begins = |name: &str, call: &str| call.starts_with(name);
    let of_s3 = |call: &str| !call.chars().all(char::is_alphanumeric);
    // Each kind of call once: where it is the first time, and the last.
    let mut stops: Vec<usize> = Vec::new();
    for (number, call) in calls.iter().enumerate().map(|(index, call)| (index + 1, call)) {
        let is_write =
            begins("PUT", call) || begins("POST", call) || begins("Update", call) || begins("DeleteItem", call);
        let neighbours = [number.checked_sub(2).and_then(|before| calls.get(before)), calls.get(number)];
        let repeated = neighbours.iter().all(|other| other.is_some_and(|other| other == call));
        if is_write && !repeated {
            stops.push(number);
        }
    }
    assert!(stops.len() > 8, "{calls:?}");
    let change = AtomicUsize::new(0);
    let mut metas = HashSet::new();
    // Another export each time.
    let changed = async || {
        let title = format!("Title {}", change.fetch_add(1, Ordering::Relaxed));
        rig.conversations
            .update(&rig.user, id, ConversationChange::default().title(Some(&title)))
            .await
            .expect("the store");
    };
    for number in stops {
        let call = &calls[number - 1];
        for stop in [
            if of_s3(call) { Stop::RefuseObject } else { Stop::Refuse },
            // A crash in front of a call is one behind the call before.
            Stop::Hang(Moment::After),
        ] {
            let case = format!("{stop:?} of call {number}, {call}");
            let mut before = 0;
            // A run in which the SDK had to repeat nothing has fewer calls than one in which it had to.
            for attempt in 1.. {
                changed().await;
                before = rig.zips().await.len();
                rig.gate.arm(number, stop);
                let answer = match stop {
                    Stop::Hang(_) => tokio::select! {
                        answer = rig.exporter.export(&rig.user, id) => format!("{answer:?}"),
                        () = rig.gate.reached() => String::new(),
                    },
                    _ => rig.get(id).await.status().as_u16().to_string(),
                };
                if rig.gate.is_reached() {
                    assert!(["", "302", "503"].contains(&answer.as_str()), "{case}: {answer}");
                    break;
                }
                assert!(attempt < 3, "{case}: {answer}, {:?}", rig.gate.calls());
            }
            rig.gate.disarm();
            // What is there is whole.
            for key in rig.zips().await.into_iter().skip(before) {
                let bytes = rig.exporter.store().read(&key).await.expect("an object");
                assert_eq!(rig.zip(&bytes).names().await.len(), 9, "{case}");
            }
            rig.let_the_lease_run_out(id).await;
            let zip = rig.download(id).await;
            let mut members = zip.digests().await;
            let meta = members.pop().expect("members").1;
            assert!(members == expected, "{case}");
            assert!(metas.insert(meta), "{case}: an export of its own");
            fs::remove_file(zip.path).expect("removed");
        }
    }
    rig.end().await;
}

#[tokio::test]
async fn one_that_outlasts_its_request_is_made_by_workers_from_part_to_part() {
    let export = ExportConfig { budget: Duration::ZERO, worker_budget: Duration::ZERO, inline_limit: 0, ..config() };
    let rig = WorkerHarness::new(export).await;
    let id = rig.conversation(None).await;
    let expected = append_large(&rig, id, 14).await;
    let told = |answer: &Response| (answer.status().as_u16(), answer.headers().get("retry-after").cloned());
    let come_back = (503, Some("5".parse().expect("a value")));
    let answer = rig.get(id).await;
    assert_eq!(told(&answer), come_back);
    let detail: Value = answer.json().await.expect("JSON");
    assert_eq!(detail, json!({"detail": "The export is still being made: ask again in a few seconds"}));
    let job = Job::Export { user: rig.user.clone(), conversation: id };
    assert_eq!(rig.jobs().await, std::slice::from_ref(&job));
    // Each turn ends with a part, and rings for the next.
    let mut turns = 0;
    loop {
        rig.exporter.go_on(&rig.user, id).await.expect("a turn");
        turns += 1;
        let record = rig.record(id).await.expect("a record");
        let Some(progress) = record.progress else { break };
        assert_eq!(progress.parts, turns);
        assert_eq!(rig.jobs().await, std::slice::from_ref(&job));
        assert_eq!(rig.zips().await, [""; 0], "nothing is there before all of it is");
        assert_eq!(told(&rig.get(id).await), come_back);
        assert_eq!(rig.jobs().await, std::slice::from_ref(&job), "who asks again rings again");
        // The conversation goes on; what was asked for is made nevertheless.
        rig.append(id, vec![numbered(20 + usize::try_from(turns).expect("few"))]).await;
    }
    assert!(turns >= 3, "{turns}");
    let mut members = rig.download(id).await.members().await;
    assert_eq!(members.pop().expect("members").0, "meta.json");
    assert!(members.len() > expected.len() && members.starts_with(&expected));
    assert_eq!(rig.objects().await, rig.zips().await, "notes are gone");
    // Everyone gets it, as often as they ask, although the conversation has changed since.
    let record = rig.record(id).await;
    let zips = join_all((0..3).map(|_| rig.download(id))).await;
    for zip in zips {
        assert_eq!(zip.members().await.len(), members.len() + 1);
    }
    assert_eq!(rig.record(id).await, record, "a request changes nothing");
    assert_eq!(rig.jobs().await, [], "nothing is built");
    // What comes after its time is what there is then.
    rig.age_finished(id, 11).await;
    assert_eq!(told(&rig.get(id).await), come_back);
    assert_eq!(rig.jobs().await, std::slice::from_ref(&job));
    // Late messages do no harm.
    rig.exporter.go_on(&rig.user, id).await.expect("a turn");
    assert_eq!(rig.exporter.go_on(&rig.user, Uuid::new_v4()).await.ok(), Some(()));
    rig.end().await;
}

#[tokio::test]
async fn a_client_is_told_at_once_to_come_back_while_a_worker_builds_the_export() {
    let rig = WorkerHarness::new(ExportConfig { budget: Duration::ZERO, ..config() }).await;
    let id = rig.conversation(None).await;
    rig.append(id, vec![numbered(1)]).await;
    assert_eq!(rig.get(id).await.status(), 503);
    let store = rig.exporter.store();
    let (lease, _) = store.claim(&rig.user, id, END_WITHIN).await.expect("the store").expect("a lease");
    // A request that would wait had all the time there is.
    let patient = ExportConfig { budget: 10 * END_WITHIN, ..config() };
    let exporter =
        Exporter::new(&patient, &rig.names, &rig.aws, rig.sandboxes.clone(), HttpClient::new(AddressPolicy::Any));
    let answer = tokio::time::timeout(END_WITHIN, exporter.export(&rig.user, id)).await.expect("it does not wait");
    assert!(matches!(answer.expect("the store"), Some(shared::export::Answer::Pending)));
    // As soon as the worker gives the lease back, a request may build it.
    store.hand_over(&lease, None).await.expect("the store");
    let answer = exporter.export(&rig.user, id).await.expect("the store");
    assert!(matches!(answer, Some(shared::export::Answer::Ready(_))), "{answer:?}");
    // And as others were told to come back, it is kept for them.
    rig.append(id, vec![numbered(2)]).await;
    assert_eq!(rig.download(id).await.names().await.len(), 2);
    rig.end().await;
}

#[tokio::test]
async fn a_finished_export_of_the_version_before_is_served_and_one_that_is_gone_is_built_again() {
    let rig = WorkerHarness::new(config()).await;
    let id = rig.conversation(None).await;
    rig.append(id, vec![numbered(1)]).await;
    rig.download(id).await;
    let zip = rig.zips().await.pop().expect("an export");
    rig.append(id, vec![numbered(2)]).await;
    // As it was written: the warning beside what is finished.
    let item = json!({
        "user": USER, "kind": format!("export#{}", id.simple()), "wanted": false, "warning": "an old warning",
        "finished": {"key": zip, "at": Time::now().minus(Duration::from_secs(60)).sortable()},
    });
    let item: shared::dynamo::Item = shared::dynamo::to_item(&item).expect("an item");
    rig.aws.dynamodb.put_item().table_name(&rig.names.users).set_item(Some(item)).send().await.expect("stored");
    let answer = rig.get(id).await;
    assert_eq!(answer.headers()["x-export-warning"], "an old warning");
    assert_eq!(rig.zip(&answer.bytes().await.expect("a body")).names().await.len(), 2);
    assert_eq!(rig.download(id).await.names().await.len(), 2, "again");
    rig.aws.s3.delete_object().bucket(&rig.names.bucket).key(&zip).send().await.expect("deleted");
    assert_eq!(rig.download(id).await.names().await.len(), 3, "anew");
    rig.end().await;
}

#[tokio::test]
async fn the_worker_of_the_product_goes_on_with_it() {
    let folder = TempDir::new().expect("a folder");
    let export = ExportConfig { budget: Duration::ZERO, ..config() };
    let product = start(&folder, Environment { export, ..Environment::default() }).await;
    let (_, _, id) = product_with_events(&product, 150).await;
    let url = format!("http://{}/api/v1/app-conversations/{id}/download", product.address);
    let answers = AtomicUsize::new(0);
    let zip = wait_for("the export is there", END_WITHIN, async || {
        let answer = client().get(&url).send().await.expect("an answer");
        answers.fetch_add(1, Ordering::Relaxed);
        match answer.status().as_u16() {
            200 => Some(answer.bytes().await.expect("a body")),
            503 => None,
            other => panic!("{other}"),
        }
    })
    .await;
    assert!(answers.load(Ordering::Relaxed) > 1, "the first answer was to come back");
    let path = folder.path().join("export.zip");
    fs::write(&path, zip).expect("written");
    assert_eq!(Zip { path }.names().await.len(), 151);
    product.shutdown().await;
}

#[tokio::test]
async fn events_that_have_not_arrived_are_fetched() {
    let rig = WorkerHarness::new(config()).await;
    let id = rig.conversation(None).await;
    rig.sandboxes.start(&rig.user, SANDBOX).await.expect("a sandbox");
    let told: Vec<Value> =
        (0..50).map(|number| serde_json::from_str(&numbered(number).json).expect("JSON")).rev().collect();
    *rig.agent.events.lock().expect("events") = told;
    // Some have arrived, the last of them not; and one that the agent server keeps to itself.
    rig.append(id, (0..10).chain([15]).map(numbered).collect()).await;
    rig.append(id, vec![event("state", "2025-01-01T00:00:16", "{}")]).await;
    assert_eq!(rig.download(id).await.names().await.len(), 52);
    assert!(rig.agent.asked.swap(0, Ordering::Relaxed) > 1);
    let answer = rig.get(id).await;
    assert_eq!((answer.status().as_u16(), answer.headers().get("x-export-warning")), (200, None));
    assert_eq!(rig.agent.asked.swap(0, Ordering::Relaxed), 1, "nothing is missing: one question");
    // A sandbox that does not run is not asked.
    rig.sandboxes.set_status(SANDBOX, shared::sandbox::SandboxStatus::Paused);
    assert_eq!(rig.get(id).await.headers().get("x-export-warning"), None);
    assert_eq!(rig.agent.asked.load(Ordering::Relaxed), 0);

    // One that cannot be reached: the export says so, and is exact else.
    let gone = StandInSandboxes::at("http://127.0.0.1:1".to_owned(), "/nowhere".to_owned());
    gone.start(&rig.user, SANDBOX).await.expect("a sandbox");
    let exporter = Exporter::new(&config(), &rig.names, &rig.aws, Arc::new(gone), HttpClient::new(AddressPolicy::Any));
    let Some(shared::export::Answer::Ready(ready)) = exporter.export(&rig.user, id).await.expect("an export") else {
        panic!("an export")
    };
    assert_eq!(ready.warning.as_deref(), Some(WARNING));
    let context = download::Context::with_exporter(exporter, u64::MAX);
    let router = download::router(context);
    let mut request = Request::get(format!("/api/v1/app-conversations/{id}/download"))
        .body(axum::body::Body::empty())
        .expect("a request");
    request.extensions_mut().insert(Caller(rig.user.clone()));
    let answer = tower::ServiceExt::oneshot(router, request).await.expect("an answer");
    assert_eq!(answer.headers()["x-export-warning"], WARNING);
    rig.end().await;
}

#[tokio::test]
async fn a_real_agents_events_are_in_an_export_before_it_has_posted_them() {
    let llm = ScriptedLlm::start().await;
    let settings =
        json!({"llm_model": "openai/scripted", "llm_api_key": "key-of-the-model", "llm_base_url": llm.base_url()});
    let product = Product::start(settings).await;
    let start = product.start_conversation(saying("Say hello")).await;
    let id = start.conversation_id();
    product.conversation_when(&id, "finished").await;
    // What happened last is posted up to 30 s later.
    let told = product.at_agent(&id).await.all_events().await;
    let id = Uuid::parse_str(&id).expect("an id");
    let answer = product.download(&id.to_string()).await;
    assert_eq!((answer.status().as_u16(), answer.headers().get("x-export-warning")), (200, None));
    let path = product.data().join("export.zip");
    fs::write(&path, answer.bytes().await.expect("a body")).expect("written");
    let members = Zip { path }.members().await;
    assert!(told.len() > 2, "{told:#?}");
    for event in &told {
        let id = event["id"].as_str().expect("an id");
        let member = members.iter().find(|(name, _)| name.ends_with(&format!("_{id}.json")));
        let (_, text) = member.unwrap_or_else(|| panic!("{id} is missing: {event:#}"));
        let exported: Value = serde_json::from_str(text).expect("JSON");
        assert!(without_nulls(&exported) == without_nulls(event), "{id}: {exported:#}");
    }
    product.shutdown().await;
}

/// From 1.49 on, an agent server leaves nulls out when it is asked for events, and posts them with nulls.
fn without_nulls(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let fields = fields.iter().filter(|(_, value)| !value.is_null());
            fields.map(|(name, value)| (name.clone(), without_nulls(value))).collect::<serde_json::Map<_, _>>().into()
        }
        Value::Array(items) => items.iter().map(without_nulls).collect(),
        other => other.clone(),
    }
}

#[tokio::test]
async fn a_deleted_conversation_leaves_no_export() {
    let rig =
        WorkerHarness::new(ExportConfig { budget: Duration::ZERO, worker_budget: Duration::ZERO, ..config() }).await;
    let (id, other) = (rig.conversation(None).await, rig.conversation(None).await);
    append_large(&rig, id, 8).await;
    for conversation in [id, other] {
        rig.get(conversation).await;
        rig.exporter.go_on(&rig.user, conversation).await.expect("a turn");
    }
    assert!(rig.record(id).await.expect("a record").progress.is_some());
    assert_ne!(rig.uploads().await, 0);
    let store = rig.exporter.store();
    store.delete_all(&rig.user, id).await.expect("deleted");
    store.delete_all(&rig.user, id).await.expect("deleted again");
    assert_eq!(rig.record(id).await, None);
    assert_eq!(rig.objects().await, rig.zips().await);
    assert_eq!(rig.zips().await.len(), 1, "the other one's stays");
    assert_eq!(rig.uploads().await, 0);
    // A worker that holds a part in its hands finds its lease lost.
    rig.get(id).await;
    let held = store.claim(&rig.user, id, Duration::from_secs(30)).await.expect("the store");
    let (mut lease, _) = held.expect("a lease");
    store.delete_all(&rig.user, id).await.expect("deleted");
    assert!(!store.renew(&mut lease, None).await.expect("the store"));
    rig.end().await;
}

#[tokio::test]
async fn old_exports_and_uploads_are_removed_where_no_lifecycle_rule_does() {
    if skipped_on_ministack("there a lifecycle rule would be the one to do it") {
        return;
    }
    let rig =
        WorkerHarness::new(ExportConfig { budget: Duration::ZERO, worker_budget: Duration::ZERO, ..config() }).await;
    let engines = rig.engines.as_embedded().expect("embedded engines");
    let (unfinished, finished) = (rig.conversation(None).await, rig.conversation(None).await);
    append_large(&rig, unfinished, 8).await;
    for id in [unfinished, finished] {
        rig.get(id).await;
        rig.exporter.go_on(&rig.user, id).await.expect("a turn");
    }
    let names = || {
        let entries = fs::read_dir(rig.folder.path().join("s3")).expect("a folder").filter_map(Result::ok);
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.contains("upload"))
            .count()
    };
    let (day, now) = (Duration::from_secs(24 * 3600), Duration::ZERO);
    let bucket = &rig.names.bucket;
    assert_eq!(engines.expire(bucket, "exports/", day, day).expect("expired"), 0);
    assert!(names() >= 2 && rig.objects().await.len() >= 3);
    assert!(engines.expire(bucket, "exports/", now, day).expect("expired") >= 3);
    assert_eq!(rig.objects().await, [""; 0]);
    assert!(engines.expire(bucket, "exports/", day, now).expect("expired") >= 2);
    assert_eq!(names(), 0);
    // Events in the bucket stay, and the export is made anew.
    loop {
        rig.exporter.go_on(&rig.user, unfinished).await.ok();
        let answer = rig.get(unfinished).await;
        if answer.status() == 200 {
            break;
        }
    }
    assert_eq!(rig.download(unfinished).await.names().await.len(), 9);
    rig.end().await;
}

#[tokio::test]
async fn more_members_than_16_bits_count_open_everywhere() {
    let mut zip = ZipWriter::new(Time::now());
    for number in 0..70_000 {
        zip.add(&format!("event_{number:06}_x.json"), |out| write!(out, "{number}")).expect("added");
    }
    let (body, directory) = (zip.take_body(), zip.take_directory());
    let end = zip.end(directory.len() as u64);
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("many.zip");
    fs::write(&path, [body, directory, end].concat()).expect("written");
    let members = Zip { path }.members().await;
    assert_eq!(members.len(), 70_000);
    assert!(members.iter().enumerate().all(|(number, (_, text))| *text == number.to_string()));
    assert_eq!(ExportStore::key(&UserId::new("x".repeat(500)), Uuid::nil(), "x").len(), 77, "short enough for any S3");
}

async fn start(folder: &TempDir, environment: Environment) -> Server {
    let options = CommonOptions::on(folder.path().join("data"), SandboxKind::None);
    Server::start(&options, environment, true, None).await.expect("the server starts")
}

fn conversations(product: &Server) -> ConversationStore {
    let names = &product.config.names;
    Stores::without_key(names, &product.aws).conversations()
}

async fn product_with_events(product: &Server, count: usize) -> (UserId, EventStore, Uuid) {
    let Server { aws, config, .. } = product;
    let names = &config.names;
    let user = UserId::local();
    let record = record(&user, None);
    store(&conversations(product), &record).await;
    let events = Stores::without_key(names, aws).events();
    events.append(&user, record.id, (0..count).map(numbered).collect()).await.expect("stored");
    (user, events, record.id)
}
