//! Exports over HTTP and through their queue: their contents, when one is reused, and that a partial zip is never served.

use std::collections::{BTreeSet, HashSet};
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
use shared::export::archive::ArchiveWriter;
use shared::export::store::{ExportRecord, ExportStore, FailureReason, Lease, Upload};
use shared::export::{Answer, Exporter, OLDER_EXPORT, UNREADABLE, WARNING, python_json};
use shared::http::caller::Caller;
use shared::http_client::{AddressPolicy, HttpClient};
use shared::jobs::process_events::ProcessEvents;
use shared::jobs::queue::{DEAD_LETTER_SUFFIX, Job};
use shared::sandbox::SandboxService as _;
use shared::stores::Stores;
use shared::user::UserId;
use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use crate::support::engines::{Engines, skipped_on_ministack};
use crate::support::fault_proxy::{FaultProxy, Moment, Stop};
use crate::support::hostile_aws::{self, AwsFaults, HostileAws};
use crate::support::iam_proxy::IamProxy;
use crate::support::product::{Product, saying};
use crate::support::scripted_llm::ScriptedLlm;
use crate::support::server;
use crate::support::wait::wait_for;
use crate::support::worker_harness::StandInSandboxes;
use crate::template::{policies, template};

const PREFIX: &str = "download-";
const SANDBOX: &str = "the-sandbox";
/// The user that a request is of, unless it says another.
const USER: &str = "somebody";
const USER_HEADER: &str = "x-user-of-the-test";
const END_WITHIN: Duration = Duration::from_secs(120);

/// The functions `download` and `exports`, on engines of their own. Their calls to AWS go through a fault proxy, and then through a
/// proxy that knows what their policies allow.
struct ExportHarness {
    url: String,
    http: Client,
    aws: Aws,
    names: Names,
    user: UserId,
    conversations: ConversationStore,
    events: EventStore,
    exporter: Exporter,
    exports: exports::Context,
    gate: FaultProxy,
    iam: IamProxy,
    /// Their clients, through the proxies.
    clients: [Aws; 2],
    sandboxes: Arc<StandInSandboxes>,
    agent: Arc<AgentLog>,
    engines: Engines,
    /// What the functions' calls to AWS meet after the fault proxy.
    hostile: HostileAws,
    folder: TempDir,
    _served: Vec<server::Server>,
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
    ExportConfig { settle: Duration::ZERO, retry_pause: Duration::ZERO, ..ExportConfig::default() }
}

impl ExportHarness {
    async fn new(config: ExportConfig) -> Self {
        Self::on(config, AwsFaults::none()).await
    }

    /// As [`Self::new`], with functions whose calls to AWS meet these faults.
    async fn on(config: ExportConfig, faults: AwsFaults) -> Self {
        let folder = TempDir::new().expect("a folder");
        let engines = Engines::start(folder.path()).await;
        let mut names = engines.names(PREFIX);
        let aws = Aws::new(&engines.sdk_config().await);
        let queues = schema::make_all(&aws, &names, PREFIX).await.expect("a schema");
        let mut hostile = HostileAws::start(&engines, PREFIX, faults).await;
        let aws = hostile.clients_of_test(&engines).await;
        (names.job_queue_url, names.export_queue_url) = (queues.jobs, queues.exports);
        let (gate, agent) = (FaultProxy::new(), Arc::new(AgentLog::default()));
        let iam = IamProxy::new(policies(&template()), PREFIX);
        let network = hostile.retry(engines.network_sdk_config().await);
        let mut served = Vec::new();
        let mut clients = Vec::new();
        for function in ["download", "exports"] {
            let mut urls = Vec::new();
            for engine in [&hostile.dynamodb, &hostile.s3, &hostile.sqs] {
                let held = iam.to(function, engine).await;
                let way = gate.to(&held.url()).await;
                urls.push(way.url());
                served.extend([held, way]);
            }
            clients.push(hostile_aws::clients(&network, [&urls[0], &urls[1], &urls[2]]));
        }
        let clients: [Aws; 2] = clients.try_into().expect("two");
        let agent_server = {
            let agent = agent.clone();
            server::Server::start(move |request| {
                let agent = agent.clone();
                async move { Ok(agent.answer(&request)) }
            })
            .await
        };
        let sandboxes = Arc::new(StandInSandboxes::at(agent_server.url(), "/nowhere".to_owned()));
        let exporter = Stores::without_key(&names, &clients[0]).exporter(
            &config,
            sandboxes.clone(),
            HttpClient::new(AddressPolicy::Any),
        );
        let exports = exports::Context::with_jobs(Stores::without_key(&names, &clients[1]).export_jobs(&config));
        served.push(agent_server);
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
            exports,
            gate,
            iam,
            clients,
            sandboxes,
            agent,
            engines,
            hostile,
            folder,
            _served: served,
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

    /// How many uploads were started and neither completed nor aborted.
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

    /// Stores beside the fault proxy.
    fn stores(&self) -> Stores<shared::stores::NoKey> {
        Stores::without_key(&self.names, &self.aws)
    }

    /// Reads the record beside the fault proxy, which may hold all calls.
    async fn record(&self, conversation: Uuid) -> Option<ExportRecord> {
        let store = self.stores().exports();
        store.get(&self.user, conversation).await.expect("the store")
    }

    /// Changes the record of a conversation's export; refused where the condition does not hold.
    async fn change_record(&self, conversation: Uuid, update: &str, condition: &str, value: String) {
        let text = |text: String| aws_sdk_dynamodb::types::AttributeValue::S(text);
        let call = self.aws.dynamodb.update_item().table_name(&self.names.users);
        let call = call
            .key("user", text(USER.to_owned()))
            .key("kind", text(format!("export#{}", conversation.simple())))
            .update_expression(update)
            .condition_expression(condition)
            .expression_attribute_values(":value", text(value));
        let call = if update.contains('#') { call.expression_attribute_names("#at", "at") } else { call };
        drop(call.send().await);
    }

    /// As if the process that builds the export had crashed long ago.
    async fn let_the_lease_run_out(&self, conversation: Uuid) {
        let past = "2000-01-01T00:00:00.000000Z".to_owned();
        self.change_record(conversation, "SET lease_until = :value", "attribute_exists(lease_owner)", past).await;
    }

    /// As if the job had been enqueued so many seconds ago.
    async fn age_queued(&self, conversation: Uuid, seconds: u64) {
        let at = Time::now().minus(Duration::from_secs(seconds)).sortable();
        self.change_record(conversation, "SET queued_at = :value", "attribute_exists(queued_at)", at).await;
    }

    /// As if the export had been finished so many minutes ago.
    async fn age_finished(&self, conversation: Uuid, minutes: u64) {
        let at = Time::now().minus(Duration::from_secs(60 * minutes)).sortable();
        self.change_record(conversation, "SET finished.#at = :value", "attribute_exists(finished)", at).await;
    }

    /// As if its build had failed so many minutes ago.
    async fn age_failure(&self, conversation: Uuid, minutes: u64) {
        let at = Time::now().minus(Duration::from_secs(60 * minutes)).sortable();
        self.change_record(conversation, "SET failed.#at = :value", "attribute_exists(failed)", at).await;
    }

    /// A record as another version wrote it.
    async fn put_record(&self, conversation: Uuid, mut record: Value) {
        record["user"] = json!(USER);
        record["kind"] = json!(format!("export#{}", conversation.simple()));
        let item: shared::dynamo::Item = shared::dynamo::to_item(&record).expect("an item");
        self.aws.dynamodb.put_item().table_name(&self.names.users).set_item(Some(item)).send().await.expect("stored");
    }

    /// An object of the bucket.
    async fn object(&self, key: &str) -> Vec<u8> {
        let object = self.aws.s3.get_object().bucket(&self.names.bucket).key(key).send().await.expect("an object");
        object.body.collect().await.expect("a body").into_bytes().into()
    }

    /// A build that has uploaded a part and goes no further.
    async fn build_that_hangs(&self, conversation: Uuid) -> (Lease, Upload) {
        let store = self.exporter.store();
        let claimed = store.claim_for_request(&self.user, conversation, Duration::from_secs(30)).await;
        let (lease, _) = claimed.expect("the store").expect("a lease");
        let key = ExportStore::key(&self.user, conversation, "a build that hangs");
        let upload_id = store.start_upload(&key, Time::now()).await.expect("an upload");
        let upload = Upload { key, upload_id };
        assert!(store.record_upload(&lease, &upload).await.expect("the store"));
        store.upload_part(&upload, 1, "PK".into()).await.expect("a part");
        (lease, upload)
    }

    /// Receives the jobs in the queue.
    async fn jobs(&self) -> Vec<Job> {
        let mut jobs = Vec::new();
        loop {
            let received = self.aws.sqs.receive_message().queue_url(&self.names.export_queue_url).send().await;
            let Some(message) = received.expect("the queue").messages.unwrap_or_default().pop() else { return jobs };
            jobs.push(Job::from_body(&message.body.expect("a body")).expect("a job"));
            let receipt = message.receipt_handle.expect("a receipt");
            let delete = self.aws.sqs.delete_message().queue_url(&self.names.export_queue_url).receipt_handle(receipt);
            delete.send().await.expect("deleted");
        }
    }

    fn job(&self, conversation: Uuid) -> Job {
        Job::Export { user: self.user.clone(), conversation }
    }

    /// Hands a job to the function `exports`; whether it succeeded.
    async fn run(&self, job: &Job) -> bool {
        exports::handle(&self.exports, message(job, "download-exports"))
            .await
            .expect("handled")
            .batch_item_failures
            .is_empty()
    }

    /// The export, after whatever has happened: requests are repeated, leases expire, jobs are run.
    async fn download_at_last(&self, conversation: Uuid) -> Zip {
        for _ in 0..8 {
            let status = self.get(conversation).await.status();
            if matches!(status.as_u16(), 200 | 302) {
                return self.download(conversation).await;
            }
            assert_eq!(status, 503);
            for job in self.jobs().await {
                assert!(self.run(&job).await);
            }
            self.let_the_lease_run_out(conversation).await;
            self.age_queued(conversation, 61).await;
        }
        panic!("no export: {:?}", self.record(conversation).await);
    }

    async fn end(self) {
        assert_eq!(self.iam.refused(), BTreeSet::new());
        self.engines.shutdown().await;
    }
}

/// A job as the function gets it from the queue of this name.
fn message(job: &Job, queue: &str) -> Value {
    let mut body = serde_json::to_value(job).expect("JSON");
    body["v"] = json!(1);
    let arn = format!("arn:aws:sqs:eu-central-1:123456789012:{queue}");
    json!({"Records": [{"messageId": "1", "body": body.to_string(), "eventSourceARN": arn}]})
}

/// The status of a response, and its `Retry-After`.
fn status_and_retry(answer: &Response) -> (u16, Option<u64>) {
    let retry =
        answer.headers().get("retry-after").map(|value| value.to_str().expect("text").parse().expect("a number"));
    (answer.status().as_u16(), retry)
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
        agent_kind: "openhands".to_owned(),
        acp_server: None,
        launched_agent_profile: None,
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
    let harness = ExportHarness::new(config()).await;
    let id = harness.conversation(None).await;
    // No event was reported yet.
    let empty = harness.download(id).await.members().await;
    assert_eq!(empty.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["meta.json"]);
    let child = harness.conversation(Some(id)).await;
    let large = format!(r#"{{"text": "{}"}}"#, "é😀x".repeat(750_000));
    assert!(large.len() > 5_000_000);
    harness
        .append(
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
    let members = harness.download(id).await.members().await;
    let escaped = r"\u00e9\ud83d\ude00x".repeat(750_000);
    let mut record =
        serde_json::to_value(harness.conversations.get(&harness.user, id).await.expect("the store")).expect("JSON");
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
  "updated_at": {},
  "acp_server": null,
  "launched_agent_profile": null
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
    harness.end().await;
}

#[tokio::test]
async fn what_is_not_the_callers_is_not_there() {
    let harness = ExportHarness::new(config()).await;
    let (own, unknown) = (harness.conversation(None).await, Uuid::new_v4());
    let not_found = |id: Uuid| json!({"detail": format!("Conversation not found: {id}")});
    let answer = harness.get(unknown.simple()).await;
    assert_eq!((answer.status().as_u16(), answer.json::<Value>().await.expect("JSON")), (404, not_found(unknown)));
    let url = format!("{}/api/v1/app-conversations/{own}/download", harness.url);
    let answer = harness.http.get(url).header(USER_HEADER, "another").send().await.expect("an answer");
    assert_eq!((answer.status().as_u16(), answer.json::<Value>().await.expect("JSON")), (404, not_found(own)));
    for bad in ["nothing", "%FF"] {
        let answer = harness.get(bad).await;
        assert_eq!(answer.status(), 422);
        let response: Value = answer.json().await.expect("JSON");
        assert_eq!(
            (&response["detail"][0]["type"], &response["detail"][0]["loc"]),
            (&json!("uuid_parsing"), &json!(["path", "conversation_id"]))
        );
    }
    assert_eq!(harness.objects().await, [""; 0], "nothing was made");
    harness.end().await;
}

#[tokio::test]
async fn an_unchanged_conversation_is_built_once_and_a_changed_one_again() {
    let harness = ExportHarness::new(config()).await;
    let id = harness.conversation(None).await;
    harness.append(id, vec![numbered(5)]).await;
    let first = fs::read(&harness.download(id).await.path).expect("a file");
    harness.gate.arm(usize::MAX, Stop::Refuse);
    let again = fs::read(&harness.download(id).await.path).expect("a file");
    assert!(first == again, "the same bytes");
    assert!(!harness.gate.calls().iter().any(|call| call.starts_with("PUT")), "{:?}", harness.gate.calls());
    assert_eq!(harness.zips().await.len(), 1);
    // A late one, in front of the first: neither the last event nor the end of the log changes.
    harness.append(id, vec![numbered(1)]).await;
    assert_eq!(
        harness.download(id).await.names().await,
        ["event_000000_event-1.json", "event_000001_event-5.json", "meta.json"]
    );
    // The same event again, with another content.
    harness.append(id, vec![Event { json: r#"{"changed": true}"#.into(), ..numbered(1) }]).await;
    assert_eq!(harness.download(id).await.members().await[0].1, "{\n  \"changed\": true\n}");
    let renamed = ConversationChange::default().title(Some("Another"));
    harness.conversations.update(&harness.user, id, renamed).await.expect("the store");
    let members = harness.download(id).await.members().await;
    assert!(members.last().expect("members").1.contains(r#""title": "Another""#));
    harness.conversation(Some(id)).await;
    harness.download(id).await;
    assert_eq!(harness.zips().await.len(), 5);
    assert_eq!(harness.record(id).await, None, "no record is left");

    // An object whose build did not wait for the indexes may lack events, so it is not reused.
    let patient = ExportConfig { settle: Duration::from_secs(3600), budget: Duration::from_millis(300), ..config() };
    let http = HttpClient::new(AddressPolicy::Any);
    let patient = Stores::without_key(&harness.names, &harness.aws).exporter(&patient, harness.sandboxes.clone(), http);
    let answer = patient.export(&harness.user, id).await.expect("an answer");
    assert!(matches!(answer, Some(Answer::Pending)), "{answer:?}");
    harness.end().await;
}

#[tokio::test]
async fn a_build_waits_for_the_indexes_and_is_then_reused() {
    let harness = ExportHarness::new(ExportConfig { settle: Duration::from_secs(1), ..config() }).await;
    let id = harness.conversation(None).await;
    harness.append(id, vec![numbered(1)]).await;
    for builds in [true, false] {
        harness.gate.arm(usize::MAX, Stop::Refuse);
        harness.download(id).await;
        let calls = harness.gate.calls();
        assert_eq!(calls.iter().any(|call| call.starts_with("PUT")), builds, "{calls:?}");
    }
    harness.end().await;
}

#[tokio::test]
async fn a_large_export_is_a_redirect_that_curl_and_browsers_follow() {
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
    let harness = ExportHarness::new(config()).await;
    let id = harness.conversation(None).await;
    harness.append(id, (0..250).map(numbered).collect()).await;
    harness.gate.arm(usize::MAX, Stop::Refuse);
    let zips = join_all((0..5).map(|_| harness.download(id))).await;
    let puts = harness.gate.calls().into_iter().filter(|call| call.starts_with("PUT")).count();
    assert_eq!(puts, 1, "{:?}", harness.gate.calls());
    let bytes: Vec<Vec<u8>> = zips.iter().map(|zip| fs::read(&zip.path).expect("a file")).collect();
    assert!(bytes.iter().all(|zip| *zip == bytes[0]));
    assert_eq!(zips[0].names().await.len(), 251);
    harness.end().await;
}

/// Events that make several parts, in several pages.
async fn append_large(harness: &ExportHarness, id: Uuid, count: usize) -> Vec<(String, String)> {
    let mut dice = Dice(42);
    let mut members = Vec::new();
    for number in 0..count {
        let noise = dice.noise(1_500_000);
        let json = format!(r#"{{"noise":"{noise}"}}"#);
        harness.append(id, vec![Event { json, ..numbered(number) }]).await;
        members.push((format!("event_{number:06}_event-{number}.json"), format!("{{\n  \"noise\": \"{noise}\"\n}}")));
    }
    members
}

/// How the export is built while a call of the build fails.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// In the request.
    Request,
    /// In the request, which runs out of time and enqueues a job.
    Handover,
    /// By a job.
    Job,
}

#[tokio::test]
async fn a_failure_or_a_crash_at_any_call_of_a_request_leaves_nothing_partial_and_the_next_request_succeeds() {
    crash_at_every_call(Way::Request).await;
}

#[tokio::test]
async fn a_failure_or_a_crash_at_any_call_of_a_handover_leaves_nothing_partial_and_a_later_request_succeeds() {
    crash_at_every_call(Way::Handover).await;
}

#[tokio::test]
async fn a_failure_or_a_crash_at_any_call_of_a_job_leaves_nothing_partial_and_a_later_request_succeeds() {
    crash_at_every_call(Way::Job).await;
}

/// The builds of a job that fail one after the other are some time apart, however often clients ask.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_job_is_not_enqueued_again_before_its_pause() {
    let hour = Duration::from_secs(3600);
    let harness = ExportHarness::new(ExportConfig { budget: Duration::ZERO, retry_pause: hour, ..config() }).await;
    let id = harness.conversation(None).await;
    append_large(&harness, id, 2).await;
    assert_eq!(harness.get(id).await.status(), 503);
    assert_eq!(harness.jobs().await, [harness.job(id)]);
    // The first call is the claim.
    harness.gate.arm(2, Stop::Refuse);
    assert!(!harness.run(&harness.job(id)).await, "the build fails");
    harness.gate.disarm();
    for _ in 0..5 {
        assert_eq!(harness.get(id).await.status(), 503);
    }
    assert_eq!(harness.jobs().await, []);
    let past = "2000-01-01T00:00:00.000000Z".to_owned();
    harness.change_record(id, "SET retry_at = :value", "attribute_exists(retry_at)", past).await;
    assert_eq!(harness.get(id).await.status(), 503);
    assert_eq!(harness.jobs().await, [harness.job(id)]);
    assert!(harness.run(&harness.job(id)).await);
    harness.download(id).await;
    harness.end().await;
}

/// A store that fails for a moment ends no build: the lease lasts for two more renewals.
#[tokio::test(flavor = "multi_thread")]
async fn a_build_outlives_a_renewal_of_its_lease_that_fails() {
    let harness = ExportHarness::new(config()).await;
    let id = harness.conversation(None).await;
    let store = harness.exporter.store();
    let claimed = store.claim_for_request(&harness.user, id, Duration::from_secs(6)).await;
    let (lease, _) = claimed.expect("the store").expect("a lease");
    let until = harness.record(id).await.expect("a record").lease_until;
    harness.gate.arm(1, Stop::Refuse);
    let renewed = wait_for("the lease is renewed", Duration::from_secs(60), async || {
        (harness.record(id).await.expect("a record").lease_until > until).then_some(())
    });
    tokio::select! {
        ended = store.keep(&lease) => panic!("the build ends: {ended:?}"),
        () = renewed => {}
    }
    assert!(harness.gate.is_reached(), "no renewal has failed");
    harness.end().await;
}

async fn crash_at_every_call(way: Way) {
    // A lease that is renewed before the object is made alone, and all the time there is, so that the calls are the same each time.
    let hour = Duration::from_secs(3600);
    let budget = if way == Way::Request { hour } else { Duration::ZERO };
    let config = ExportConfig { lease: hour, budget, build_budget: hour, catch_up: hour, inline_limit: 0, ..config() };
    let harness = ExportHarness::new(config).await;
    let id = harness.conversation(None).await;
    let expected: Vec<(String, String)> =
        append_large(&harness, id, 8).await.into_iter().map(|(name, text)| (name, sha256_hex(&text))).collect();
    let job = harness.job(id);
    let change = AtomicUsize::new(0);
    // Another export each time.
    let prepare = async || {
        let title = format!("Title {}", change.fetch_add(1, Ordering::Relaxed));
        let change = ConversationChange::default().title(Some(&title));
        harness.conversations.update(&harness.user, id, change).await.expect("the store");
        harness.age_finished(id, 11).await;
        if way == Way::Job {
            assert_eq!(harness.get(id).await.status(), 503);
            assert_eq!(harness.jobs().await, std::slice::from_ref(&job));
        }
    };
    let build = async || match way {
        Way::Request | Way::Handover => harness.get(id).await.status().as_u16().to_string(),
        Way::Job => harness.run(&job).await.to_string(),
    };
    prepare().await;
    harness.gate.arm(usize::MAX, Stop::Refuse);
    build().await;
    let calls = harness.gate.calls();
    harness.gate.disarm();
    harness.download_at_last(id).await;
    let parts = calls.iter().filter(|call| call.contains("partNumber")).count();
    assert_eq!(parts, if way == Way::Handover { 0 } else { 2 }, "{calls:?}");
    let of_s3 = |call: &str| !call.chars().all(char::is_alphanumeric);
    // Each kind of call once: where it is the first time, and the last.
    let mut stops: Vec<usize> = Vec::new();
    for (number, call) in calls.iter().enumerate().map(|(index, call)| (index + 1, call)) {
        let is_write = ["PUT", "POST", "Update", "DeleteItem", "Send"].iter().any(|name| call.starts_with(name));
        let neighbours = [number.checked_sub(2).and_then(|before| calls.get(before)), calls.get(number)];
        let repeated = neighbours.iter().all(|other| other.is_some_and(|other| other == call));
        if is_write && !repeated {
            stops.push(number);
        }
    }
    assert!(stops.len() >= if way == Way::Handover { 3 } else { 7 }, "{calls:?}");
    let mut metas = HashSet::new();
    // A process that crashes before it has recorded the id of its upload leaves the upload to the bucket's lifecycle rule.
    let mut unrecorded_uploads = 0;
    for number in stops {
        let call = &calls[number - 1];
        for stop in [
            if of_s3(call) { Stop::RefuseObject } else { Stop::Refuse },
            // A crash before a call is one after the call before.
            Stop::Hang(Moment::After),
        ] {
            let case = format!("{way:?}: {stop:?} of call {number}, {call}");
            unrecorded_uploads += usize::from(matches!(stop, Stop::Hang(_)) && call.contains("?uploads"));
            let mut before = Vec::new();
            // A run in which the SDK had to repeat nothing has fewer calls than one in which it had to.
            for attempt in 1.. {
                prepare().await;
                before = harness.zips().await;
                harness.gate.arm(number, stop);
                let answer = match (stop, way) {
                    (Stop::Hang(_), Way::Request | Way::Handover) => tokio::select! {
                        answer = harness.exporter.export(&harness.user, id) => format!("{answer:?}"),
                        () = harness.gate.reached() => String::new(),
                    },
                    (Stop::Hang(_), Way::Job) => tokio::select! {
                        succeeded = harness.run(&job) => succeeded.to_string(),
                        () = harness.gate.reached() => String::new(),
                    },
                    _ => build().await,
                };
                if harness.gate.is_reached() {
                    assert!(["", "302", "503", "true", "false"].contains(&answer.as_str()), "{case}: {answer}");
                    break;
                }
                assert!(attempt < 3, "{case}: {answer}, {:?}", harness.gate.calls());
                harness.gate.disarm();
                harness.download_at_last(id).await;
            }
            harness.gate.disarm();
            // An object that exists is complete.
            for key in harness.zips().await.into_iter().filter(|key| !before.contains(key)) {
                assert_eq!(harness.zip(&harness.object(&key).await).names().await.len(), 9, "{case}");
            }
            harness.let_the_lease_run_out(id).await;
            harness.age_queued(id, 61).await;
            let zip = harness.download_at_last(id).await;
            let mut members = zip.digests().await;
            let meta = members.pop().expect("members").1;
            assert!(members == expected, "{case}");
            assert!(metas.insert(meta), "{case}: an export of its own");
            fs::remove_file(zip.path).expect("removed");
        }
    }
    assert_eq!(
        harness.uploads().await,
        unrecorded_uploads,
        "the recorded uploads of builds that crashed are aborted: {calls:?}"
    );
    harness.end().await;
}

#[tokio::test]
async fn an_export_that_outlasts_its_request_is_built_by_a_job_and_kept_for_every_client() {
    let harness = ExportHarness::new(ExportConfig { budget: Duration::ZERO, inline_limit: 0, ..config() }).await;
    let id = harness.conversation(None).await;
    let expected = append_large(&harness, id, 14).await;
    let pending = (503, Some(5));
    let answer = harness.get(id).await;
    assert_eq!(status_and_retry(&answer), pending);
    let detail: Value = answer.json().await.expect("JSON");
    assert_eq!(detail, json!({"detail": "The export is still being built; retry in a few seconds"}));
    let job = harness.job(id);
    assert_eq!(status_and_retry(&harness.get(id).await), pending);
    assert_eq!(harness.jobs().await, std::slice::from_ref(&job), "one job, whatever the number of requests");
    assert_eq!(harness.objects().await, [""; 0]);
    assert!(harness.run(&job).await);
    assert_eq!(harness.download(id).await.members().await[..14], expected);
    assert_eq!(harness.objects().await, harness.zips().await, "nothing but the export is in the bucket");
    assert_eq!(harness.uploads().await, 0);
    // Every client gets it, as often as it asks, although the conversation has changed since.
    harness.append(id, vec![numbered(20)]).await;
    let record = harness.record(id).await;
    for zip in join_all((0..3).map(|_| harness.download(id))).await {
        assert_eq!(zip.names().await.len(), 15);
    }
    // The same message again, and one about a conversation that does not exist, change nothing.
    assert!(harness.run(&job).await);
    assert!(harness.run(&harness.job(Uuid::new_v4())).await);
    assert_eq!(harness.record(id).await, record, "requests and messages change nothing");
    assert_eq!(harness.jobs().await, []);
    // After 10 minutes the conversation is exported as it is then.
    harness.age_finished(id, 11).await;
    assert_eq!(status_and_retry(&harness.get(id).await), pending);
    assert!(harness.record(id).await.expect("a record").finished.is_some(), "a request loses no finished export");
    assert_eq!(harness.jobs().await, std::slice::from_ref(&job));
    assert!(harness.run(&job).await);
    assert_eq!(harness.download(id).await.names().await.len(), 16);
    harness.end().await;
}

#[tokio::test]
async fn a_request_does_not_wait_for_a_job_and_two_jobs_build_one_export() {
    let harness = ExportHarness::new(ExportConfig { budget: Duration::ZERO, ..config() }).await;
    let id = harness.conversation(None).await;
    harness.append(id, vec![numbered(1)]).await;
    assert_eq!(harness.get(id).await.status(), 503);
    // This request would have all the time there is, to wait or to build.
    let patient = ExportConfig { budget: 10 * END_WITHIN, ..config() };
    let http = HttpClient::new(AddressPolicy::Any);
    let exporter = harness.stores().exporter(&patient, harness.sandboxes.clone(), http);
    for held in [false, true] {
        let lease = match held {
            true => harness.exporter.store().claim_for_job(&harness.user, id, END_WITHIN).await.expect("the store"),
            false => None,
        };
        assert_eq!(lease.is_some(), held);
        let answer =
            tokio::time::timeout(END_WITHIN, exporter.export(&harness.user, id)).await.expect("it does not wait");
        assert!(matches!(answer.expect("the store"), Some(Answer::Pending)));
    }
    let job = harness.job(id);
    assert!(harness.run(&job).await, "another process has the lease");
    assert_eq!(harness.zips().await, [""; 0]);
    harness.let_the_lease_run_out(id).await;
    harness.gate.arm(usize::MAX, Stop::Refuse);
    assert_eq!(join_all((0..3).map(|_| harness.run(&job))).await, [true; 3]);
    assert_eq!(
        harness.gate.calls().iter().filter(|call| call.starts_with("PUT")).count(),
        1,
        "{:?}",
        harness.gate.calls()
    );
    assert_eq!(harness.download(id).await.names().await.len(), 2);
    harness.end().await;
}

#[tokio::test]
async fn a_message_that_was_lost_is_enqueued_again_once_a_minute() {
    let harness = ExportHarness::new(ExportConfig { budget: Duration::ZERO, ..config() }).await;
    let id = harness.conversation(None).await;
    let job = harness.job(id);
    for seconds in [0, 50, 61] {
        harness.age_queued(id, seconds).await;
        let answers = join_all((0..4).map(|_| harness.get(id))).await;
        assert!(answers.iter().all(|answer| answer.status() == 503));
        let expected = usize::from(seconds != 50);
        assert_eq!(harness.jobs().await, vec![job.clone(); expected], "{seconds} s after it was enqueued");
    }
    // A process that crashed: at once.
    let claimed = harness.exporter.store().claim_for_job(&harness.user, id, Duration::from_millis(1)).await;
    assert!(claimed.expect("the store").is_some());
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(harness.get(id).await.status(), 503);
    assert_eq!(harness.jobs().await, std::slice::from_ref(&job));
    assert!(harness.run(&job).await);
    assert_eq!(harness.get(id).await.status(), 200);
    harness.end().await;
}

#[tokio::test]
async fn a_process_that_lost_its_lease_publishes_nothing() {
    // A lease that needs no renewal before the object is made, so that the number of the last part's call is the same in both builds.
    let lease = Duration::from_secs(3600);
    let harness = ExportHarness::new(ExportConfig { budget: Duration::ZERO, inline_limit: 0, lease, ..config() }).await;
    let id = harness.conversation(None).await;
    append_large(&harness, id, 8).await;
    let job = harness.job(id);
    // The first process stands still before its last part, and another process finishes the export meanwhile.
    assert_eq!(harness.get(id).await.status(), 503);
    harness.gate.arm(usize::MAX, Stop::Refuse);
    assert!(harness.run(&job).await);
    let last_part = harness.gate.calls().iter().rposition(|call| call.contains("partNumber")).expect("a part") + 1;
    harness.gate.disarm();
    harness.age_finished(id, 11).await;
    harness.append(id, vec![numbered(100)]).await;
    assert_eq!(harness.get(id).await.status(), 503);
    harness.gate.arm(last_part, Stop::Hold(Moment::Before));
    let mut late = {
        let (context, message) = (harness.exports.clone(), message(&job, "download-exports"));
        tokio::spawn(async move { exports::handle(&context, message).await.expect("handled") })
    };
    tokio::select! {
        () = harness.gate.reached() => {}
        () = sleep(Duration::from_secs(60)) => panic!("call {last_part} does not come: {:?}", harness.gate.calls()),
        response = &mut late => panic!("ended before call {last_part}: {response:?}, {:?}", harness.gate.calls()),
    }
    harness.let_the_lease_run_out(id).await;
    // Beside the fault proxy.
    let jobs = harness.stores().export_jobs(&ExportConfig { inline_limit: 0, ..config() });
    timeout(Duration::from_secs(60), jobs.run(&harness.user, id)).await.expect("the other build ends").expect("built");
    let record = harness.record(id).await.expect("a record");
    assert!(record.finished.is_some() && !record.is_queued);
    harness.gate.open();
    let response = timeout(Duration::from_secs(60), late).await.expect("the late process ends").expect("joined");
    harness.gate.disarm();
    // Its upload was aborted by the other process, so that even its last part is refused; or it found its lease lost.
    assert!(response.batch_item_failures.len() <= 1);
    assert_eq!(harness.record(id).await, Some(record), "it changes nothing");
    assert_eq!(harness.zips().await.len(), 2);
    assert_eq!(harness.uploads().await, 0);
    assert_eq!(harness.download(id).await.names().await.len(), 10);
    harness.end().await;
}

#[tokio::test]
async fn a_build_that_runs_out_of_time_fails_once_and_tells_its_clients() {
    let config = ExportConfig { budget: Duration::ZERO, build_budget: Duration::ZERO, ..config() };
    let harness = ExportHarness::new(config).await;
    let id = harness.conversation(None).await;
    harness.append(id, vec![numbered(1)]).await;
    let job = harness.job(id);
    assert_eq!(harness.get(id).await.status(), 503);
    assert_eq!(harness.jobs().await, std::slice::from_ref(&job));
    assert!(harness.run(&job).await, "the message is not delivered again");
    for _ in 0..2 {
        let answer = harness.get(id).await;
        let (status, retry) = status_and_retry(&answer);
        assert!(status == 503 && retry.is_some_and(|seconds| (500..=600).contains(&seconds)), "{status} {retry:?}");
        let detail: Value = answer.json().await.expect("JSON");
        let detail = detail["detail"].as_str().expect("text");
        assert!(detail.starts_with("The export could not be built within 0 seconds: retry in "), "{detail}");
    }
    assert_eq!(harness.jobs().await, [], "nothing is built");
    assert!(harness.run(&job).await, "late messages change nothing");
    assert_eq!(status_and_retry(&harness.get(id).await).0, 503);
    // After 10 minutes a request starts it again.
    harness.age_failure(id, 11).await;
    assert_eq!(status_and_retry(&harness.get(id).await), (503, Some(5)));
    assert_eq!(harness.jobs().await, std::slice::from_ref(&job));
    let jobs = harness.stores().export_jobs(&self::config());
    jobs.run(&harness.user, id).await.expect("built");
    assert_eq!(harness.download(id).await.names().await.len(), 2);

    // The export before stays until there is a newer one.
    harness.age_finished(id, 11).await;
    harness.append(id, vec![numbered(2)]).await;
    assert_eq!(harness.get(id).await.status(), 503);
    assert!(harness.run(&job).await);
    for _ in 0..2 {
        let answer = harness.get(id).await;
        assert_eq!(answer.headers()["x-export-warning"], OLDER_EXPORT);
        assert_eq!(harness.zip(&answer.bytes().await.expect("a body")).names().await.len(), 2);
    }
    harness.end().await;
}

#[tokio::test]
async fn a_deadline_within_the_build_ends_it_and_aborts_its_upload() {
    let hour = Duration::from_secs(3600);
    let harness = ExportHarness::new(ExportConfig { budget: hour, catch_up: hour, ..config() }).await;
    let id = harness.conversation(None).await;
    append_large(&harness, id, 8).await;
    harness.gate.arm(usize::MAX, Stop::Refuse);
    harness.download(id).await;
    let first_part = harness.gate.calls().iter().position(|call| call.contains("partNumber=1")).expect("a part") + 1;
    harness.append(id, vec![numbered(50)]).await;
    harness.gate.disarm();
    // A job has these 5 seconds, and one call hangs for longer.
    let build_budget = Duration::from_secs(5);
    let job = harness.job(id);
    let config = ExportConfig { budget: Duration::ZERO, build_budget, ..config() };
    let http = HttpClient::new(AddressPolicy::Any);
    let exporter = harness.stores().exporter(&config, harness.sandboxes.clone(), http);
    assert!(matches!(exporter.export(&harness.user, id).await.expect("the store"), Some(Answer::Pending)));
    let jobs = Stores::without_key(&harness.names, &harness.clients[1]).export_jobs(&config);
    // The request's calls before the build are not the job's: any call of the build will do.
    harness.gate.arm(first_part.saturating_sub(4), Stop::Hang(Moment::Before));
    jobs.run(&harness.user, id).await.expect("recorded");
    harness.gate.disarm();
    let failed = harness.record(id).await.expect("a record").failed.expect("a failure");
    assert_eq!(failed.reason, FailureReason::OutOfTime { seconds: 5 });
    assert_eq!(harness.uploads().await, 0);
    assert!(harness.run(&job).await);
    harness.end().await;
}

#[tokio::test]
async fn events_are_counted_and_more_than_the_bound_are_refused_by_number() {
    let harness = ExportHarness::new(ExportConfig { max_events: 5, ..config() }).await;
    let id = harness.conversation(None).await;
    harness.append(id, (0..5).map(numbered).collect()).await;
    assert_eq!(harness.download(id).await.names().await.len(), 6, "as many as the bound");
    harness.append(id, vec![numbered(5)]).await;
    let detail = json!({"detail":
        "The conversation has 6 events, and an export holds at most 5: read the events page by page instead"});
    harness.gate.arm(usize::MAX, Stop::Refuse);
    for _ in 0..2 {
        let answer = harness.get(id).await;
        assert_eq!(status_and_retry(&answer), (413, None));
        assert_eq!(answer.json::<Value>().await.expect("JSON"), detail);
    }
    assert_eq!(harness.gate.calls().iter().filter(|call| call.starts_with("PUT")).count(), 0);
    // A request that has no time to count leaves it to the job, and clients get the same.
    harness.age_failure(id, 11).await;
    let hurried = ExportConfig { budget: Duration::ZERO, max_events: 5, ..config() };
    let http = HttpClient::new(AddressPolicy::Any);
    let exporter = harness.stores().exporter(&hurried, harness.sandboxes.clone(), http);
    assert!(matches!(exporter.export(&harness.user, id).await.expect("the store"), Some(Answer::Pending)));
    assert!(harness.run(&harness.job(id)).await);
    let answer = harness.get(id).await;
    assert_eq!(answer.status(), 413);
    assert_eq!(answer.json::<Value>().await.expect("JSON"), detail);
    assert!(shared::config::ExportConfig::default().max_events >= 1_000_000);
    harness.end().await;
}

#[tokio::test]
async fn crashes_are_bounded_and_a_dead_letter_lets_the_next_request_build() {
    let harness = ExportHarness::new(ExportConfig { budget: Duration::ZERO, ..config() }).await;
    let id = harness.conversation(None).await;
    harness.append(id, vec![numbered(1)]).await;
    let (job, store) = (harness.job(id), harness.exporter.store());
    assert_eq!(harness.get(id).await.status(), 503);
    for _ in 0..3 {
        assert_eq!(harness.jobs().await.len(), 1);
        let claimed = store.claim_for_job(&harness.user, id, Duration::from_millis(1)).await.expect("the store");
        assert!(claimed.is_some());
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(status_and_retry(&harness.get(id).await), (503, Some(5)));
    }
    assert!(harness.run(&job).await);
    let answer = harness.get(id).await;
    assert!(status_and_retry(&answer).1.is_some_and(|seconds| seconds > 500));
    let detail: Value = answer.json().await.expect("JSON");
    assert!(detail["detail"].as_str().is_some_and(|text| text.contains("in 3 attempts")), "{detail}");
    harness.jobs().await;

    // Dead letters: the next request builds the export, here at once.
    let patient = ExportConfig::default();
    let http = HttpClient::new(AddressPolicy::Any);
    let exporter = harness.stores().exporter(&patient, harness.sandboxes.clone(), http);
    let dead = |job: &Job| message(job, &format!("download-exports{DEAD_LETTER_SUFFIX}"));
    harness.age_failure(id, 11).await;
    assert_eq!(harness.get(id).await.status(), 503);
    assert!(matches!(exporter.export(&harness.user, id).await.expect("the store"), Some(Answer::Pending)));
    let handled = exports::handle(&harness.exports, dead(&job)).await.expect("handled");
    assert!(handled.batch_item_failures.is_empty());
    let Some(Answer::Ready(ready)) = exporter.export(&harness.user, id).await.expect("the store") else {
        panic!("no export")
    };
    assert!(ready.length > 0);
    // While a process builds the export, a dead letter does not disturb it; and one that is no export is dropped.
    harness.append(id, vec![numbered(2)]).await;
    assert_eq!(harness.get(id).await.status(), 503);
    let claimed = store.claim_for_job(&harness.user, id, END_WITHIN).await.expect("the store").expect("a lease");
    let other = ProcessEvents { user: harness.user.clone(), conversation: id, up_to: None }.into();
    for dead_letter in [dead(&job), dead(&other)] {
        let handled = exports::handle(&harness.exports, dead_letter).await.expect("handled");
        assert!(handled.batch_item_failures.is_empty());
    }
    assert!(store.renew(&claimed.0).await.expect("the store"));
    assert!(!harness.run(&other).await, "not of this queue");
    harness.end().await;
}

/// With a checkpoint, as the version before resumed builds from it.
#[tokio::test]
async fn an_unfinished_export_of_the_version_before_is_built_from_the_start() {
    let harness = ExportHarness::new(config()).await;
    for (queued, lease) in [(true, false), (true, true), (false, true), (false, false)] {
        let id = harness.conversation(None).await;
        harness.append(id, (0..3).map(numbered).collect()).await;
        let key = ExportStore::key(&harness.user, id, "the version before");
        let upload_id = harness.exporter.store().start_upload(&key, Time::now()).await.expect("an upload");
        let upload = Upload { key: key.clone(), upload_id: upload_id.clone() };
        harness.exporter.store().upload_part(&upload, 1, "PK".into()).await.expect("a part");
        let notes = format!("{}.abcdefgh.", key.trim_end_matches(".zip"));
        let note = harness.aws.s3.put_object().bucket(&harness.names.bucket).key(format!("{notes}meta"));
        note.body(b"{}".to_vec().into()).send().await.expect("a note");
        let now = Time::now().sortable();
        let mut record = json!({
            "wanted": queued, "warning": "of the version before",
            "progress": {"key": key, "upload_id": upload_id, "notes": notes, "parts": 1, "bytes": 2, "members": 1,
                "after": {"position": numbered(0).position()}, "began_at": now, "saved_at": now},
        });
        if lease {
            record["lease_owner"] = json!("a process of the version before");
            record["lease_until"] = json!(Time::now().minus(Duration::from_secs(1)).sortable());
        }
        harness.put_record(id, record).await;
        let answer = harness.get(id).await;
        if queued {
            assert_eq!(answer.status(), 503, "{lease}");
            assert_eq!(harness.jobs().await, [harness.job(id)]);
            assert!(harness.run(&harness.job(id)).await);
            let answer = harness.get(id).await;
            assert_eq!(answer.headers()["x-export-warning"], "of the version before");
        }
        assert_eq!(harness.download(id).await.names().await.len(), 4);
        assert_eq!(harness.uploads().await, 0, "its upload is aborted");
        let store = harness.stores().exports();
        store.delete_all(&harness.user, id).await.expect("deleted");
        assert_eq!(harness.objects().await, [""; 0], "with what the version before left");
    }
    harness.end().await;
}

#[tokio::test]
async fn a_finished_export_of_the_version_before_is_served_and_one_that_is_gone_is_built_again() {
    let harness = ExportHarness::new(config()).await;
    let id = harness.conversation(None).await;
    harness.append(id, vec![numbered(1)]).await;
    harness.download(id).await;
    let zip = harness.zips().await.pop().expect("an export");
    harness.append(id, vec![numbered(2)]).await;
    // As it was written: the warning beside the finished export.
    let at = Time::now().minus(Duration::from_secs(60)).sortable();
    let record = json!({"wanted": false, "warning": "an old warning", "finished": {"key": zip, "at": at}});
    harness.put_record(id, record).await;
    let answer = harness.get(id).await;
    assert_eq!(answer.headers()["x-export-warning"], "an old warning");
    assert_eq!(harness.zip(&answer.bytes().await.expect("a body")).names().await.len(), 2);
    assert_eq!(harness.download(id).await.names().await.len(), 2, "again");
    harness.aws.s3.delete_object().bucket(&harness.names.bucket).key(&zip).send().await.expect("deleted");
    assert_eq!(harness.download(id).await.names().await.len(), 3, "a new build");
    harness.end().await;
}

#[tokio::test]
async fn the_product_builds_it_through_the_queue() {
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
    let harness = ExportHarness::new(config()).await;
    let id = harness.conversation(None).await;
    harness.sandboxes.start(&harness.user, SANDBOX, None).await.expect("a sandbox");
    let reported: Vec<Value> =
        (0..50).map(|number| serde_json::from_str(&numbered(number).json).expect("JSON")).rev().collect();
    *harness.agent.events.lock().expect("events") = reported;
    // Some have arrived, the last of them not; and one that the agent server keeps to itself.
    harness.append(id, (0..10).chain([15]).map(numbered).collect()).await;
    harness.append(id, vec![event("state", "2025-01-01T00:00:16", "{}")]).await;
    assert_eq!(harness.download(id).await.names().await.len(), 52);
    assert!(harness.agent.asked.swap(0, Ordering::Relaxed) > 1);
    let answer = harness.get(id).await;
    assert_eq!((answer.status().as_u16(), answer.headers().get("x-export-warning")), (200, None));
    assert_eq!(harness.agent.asked.swap(0, Ordering::Relaxed), 1, "nothing is missing: one question");
    // The newest event cannot be read. The one before it is fetched nevertheless, and the client learns that an event is missing.
    {
        let mut reported = harness.agent.events.lock().expect("events");
        reported.insert(0, serde_json::from_str(&numbered(50).json).expect("JSON"));
        reported.insert(0, json!({"id": "without-a-kind", "timestamp": "2025-01-01T00:02:00"}));
    }
    let answer = harness.get(id).await;
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["x-export-warning"]),
        (200, &http::HeaderValue::from_static(UNREADABLE))
    );
    assert_eq!(harness.zip(&answer.bytes().await.expect("a body")).names().await.len(), 53);
    harness.agent.asked.store(0, Ordering::Relaxed);
    // A sandbox that does not run is not asked.
    harness.sandboxes.set_status(SANDBOX, shared::sandbox::SandboxStatus::Paused);
    assert_eq!(harness.get(id).await.headers().get("x-export-warning"), None);
    assert_eq!(harness.agent.asked.load(Ordering::Relaxed), 0);

    // One that cannot be reached: the export says so, and is exact else.
    let gone = StandInSandboxes::at("http://127.0.0.1:1".to_owned(), "/nowhere".to_owned());
    gone.start(&harness.user, SANDBOX, None).await.expect("a sandbox");
    let exporter = harness.stores().exporter(&config(), Arc::new(gone), HttpClient::new(AddressPolicy::Any));
    let Some(Answer::Ready(ready)) = exporter.export(&harness.user, id).await.expect("an export") else {
        panic!("an export")
    };
    assert_eq!(ready.warning.as_deref(), Some(WARNING));
    let context = download::Context::with_exporter(exporter, u64::MAX);
    let router = download::router(context);
    let mut request = Request::get(format!("/api/v1/app-conversations/{id}/download"))
        .body(axum::body::Body::empty())
        .expect("a request");
    request.extensions_mut().insert(Caller(harness.user.clone()));
    let answer = tower::ServiceExt::oneshot(router, request).await.expect("an answer");
    assert_eq!(answer.headers()["x-export-warning"], WARNING);
    harness.end().await;
}

/// An export of several parts, whose first requests may fail.
async fn large_export(faults: AwsFaults) {
    let config = ExportConfig { settle: Duration::from_secs(1), ..ExportConfig::default() };
    let harness = ExportHarness::on(config, faults).await;
    let id = harness.conversation(None).await;
    let expected: Vec<(String, String)> =
        append_large(&harness, id, 8).await.into_iter().map(|(name, text)| (name, sha256_hex(&text))).collect();
    let mut failed = 0;
    let zip = loop {
        let answer = harness.get(id).await;
        let status = answer.status().as_u16();
        // A response that is cut off is one that failed.
        if status == 200
            && let Ok(bytes) = answer.bytes().await
        {
            break harness.zip(&bytes);
        }
        failed += 1;
        assert!(matches!(status, 200 | 503) && failed < 12, "{faults:?}: {status}");
        harness.let_the_lease_run_out(id).await;
    };
    println!("{faults:?}: {:?}, {failed} failed", harness.hostile.counted());
    let members = zip.digests().await;
    assert_eq!(members[..members.len() - 1], expected, "{faults:?}");
    harness.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_export_is_complete_although_calls_fail() {
    for faults in AwsFaults::each(3) {
        large_export(faults).await;
    }
}

/// The events of an agent server are fetched just before they are exported.
async fn export_of_a_running_agent(faults: AwsFaults) {
    let config = ExportConfig { settle: Duration::from_secs(1), ..ExportConfig::default() };
    let harness = ExportHarness::on(config, faults).await;
    let id = harness.conversation(None).await;
    harness.sandboxes.start(&harness.user, SANDBOX, None).await.expect("a sandbox");
    let reported: Vec<Value> =
        (0..50).map(|number| serde_json::from_str(&numbered(number).json).expect("JSON")).rev().collect();
    *harness.agent.events.lock().expect("events") = reported;
    harness.append(id, (0..10).map(numbered).collect()).await;
    let mut failed = 0;
    let answer = loop {
        let answer = harness.get(id).await;
        if answer.status() == 200 {
            break answer;
        }
        failed += 1;
        assert!(answer.status() == 503 && failed < 8, "{faults:?}: {answer:?}");
        harness.let_the_lease_run_out(id).await;
    };
    println!("{faults:?}: {:?}, {failed} failed", harness.hostile.counted());
    let is_warned = answer.headers().contains_key("x-export-warning");
    let names = harness.zip(&answer.bytes().await.expect("a body")).names().await;
    assert!(is_warned || names.len() == 51, "{faults:?}: {} of 50 events and no warning", names.len() - 1);
    assert!(!is_warned || faults.throttled + faults.lost > 0.0, "{faults:?}: the agent server has returned all events");
    harness.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_has_the_events_that_were_stored_just_before_it() {
    for seed in [1, 2] {
        for faults in AwsFaults::each(seed) {
            export_of_a_running_agent(faults).await;
        }
    }
}

/// Under load, an index of AWS may lag for longer than a build waits in any case.
#[tokio::test(flavor = "multi_thread")]
async fn an_export_waits_for_index_entries_that_lag() {
    for seed in [1, 2, 3] {
        let lag = Duration::from_secs(3);
        let harness = ExportHarness::on(config(), AwsFaults { lag, ..AwsFaults::lagging(seed) }).await;
        let id = harness.conversation(None).await;
        for number in 0..20 {
            harness.append(id, vec![numbered(number)]).await;
        }
        let zip = harness.download(id).await;
        assert_eq!(zip.names().await.len(), 21, "seed {seed}");
        harness.end().await;
    }
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
    let reported = product.at_agent(&id).await.all_events().await;
    let id = Uuid::parse_str(&id).expect("an id");
    let answer = product.download(&id.to_string()).await;
    assert_eq!((answer.status().as_u16(), answer.headers().get("x-export-warning")), (200, None));
    let path = product.data().join("export.zip");
    fs::write(&path, answer.bytes().await.expect("a body")).expect("written");
    let members = Zip { path }.members().await;
    assert!(reported.len() > 2, "{reported:#?}");
    for event in &reported {
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
    let harness = ExportHarness::new(config()).await;
    let (id, other) = (harness.conversation(None).await, harness.conversation(None).await);
    for conversation in [id, other] {
        harness.download(conversation).await;
    }
    let (lease, upload) = harness.build_that_hangs(id).await;
    assert_ne!(harness.uploads().await, 0);
    let store = harness.exporter.store();
    // As the worker deletes them: the policies of exports do not allow it.
    let deleter = harness.stores().exports();
    deleter.delete_all(&harness.user, id).await.expect("deleted");
    deleter.delete_all(&harness.user, id).await.expect("deleted again");
    assert_eq!(harness.record(id).await, None);
    assert_eq!(harness.zips().await.len(), 1, "the export of the other conversation stays");
    assert_eq!(harness.uploads().await, 0);
    // The process that builds the export finds its lease lost, and its upload aborted.
    assert!(!store.renew(&lease).await.expect("the store"));
    assert!(!store.record_upload(&lease, &upload).await.expect("the store"));
    assert!(store.upload_part(&upload, 1, "x".into()).await.is_err());
    harness.end().await;
}

#[tokio::test]
async fn old_exports_and_uploads_are_removed_where_no_lifecycle_rule_does() {
    if skipped_on_ministack("there a lifecycle rule would be the one to do it") {
        return;
    }
    let harness = ExportHarness::new(config()).await;
    let engines = harness.engines.as_embedded().expect("embedded engines");
    let (unfinished, finished) = (harness.conversation(None).await, harness.conversation(None).await);
    append_large(&harness, unfinished, 8).await;
    harness.download(finished).await;
    harness.build_that_hangs(unfinished).await;
    let names = || {
        let entries = fs::read_dir(harness.folder.path().join("s3")).expect("a folder").filter_map(Result::ok);
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| name.contains("upload"))
            .count()
    };
    let (day, now) = (Duration::from_secs(24 * 3600), Duration::ZERO);
    let bucket = &harness.names.bucket;
    assert_eq!(engines.expire(bucket, "exports/", day, day).expect("expired"), 0);
    assert!(names() >= 1 && !harness.objects().await.is_empty());
    assert!(engines.expire(bucket, "exports/", now, day).expect("expired") >= 1);
    assert_eq!(harness.objects().await, [""; 0]);
    assert!(engines.expire(bucket, "exports/", day, now).expect("expired") >= 1);
    assert_eq!(names(), 0);
    // Events in the bucket stay, and the export is built again.
    harness.let_the_lease_run_out(unfinished).await;
    assert_eq!(harness.download(unfinished).await.names().await.len(), 9);
    harness.end().await;
}

#[tokio::test]
async fn more_members_than_16_bits_count_open_everywhere() {
    let (mut archive, mut chunks) = ArchiveWriter::new(Time::now());
    let writing = tokio::task::spawn_blocking(move || {
        for number in 0..70_000 {
            archive.add(&format!("event_{number:06}_x.json"), number.to_string().as_bytes()).expect("added");
        }
        archive.finish().expect("finished");
    });
    let mut zip = Vec::new();
    while let Some(chunk) = chunks.recv().await {
        zip.extend_from_slice(&chunk);
    }
    writing.await.expect("written");
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("many.zip");
    fs::write(&path, zip).expect("written");
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
