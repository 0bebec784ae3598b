//! Imports: each row is stored once, whatever happens meanwhile, and an invalid row is reported without ending the
//! import.

use std::collections::BTreeMap;
use std::fs;
use std::future::pending;
use std::path::{Path, PathBuf};
use std::time::Duration;

use local::import::jsonl::JsonLines;
use local::import::openhands::DataFolder;
use local::import::summary::Tally;
use local::import::{End, Entry, Importer, Pace, Skip, Summary, command};
use local::options::TargetOptions;
use rusqlite::{Connection, params};
use serde_json::{Value, json};
use shared::Time;
use shared::aws::Aws;
use shared::conversation::AppConversation;
use shared::conversation::search::Filter;
use shared::conversation::tags::{MAX_TAG_NAME, MAX_TAG_VALUE, MAX_TAGS};
use shared::event::store::EventStore;
use shared::http::secret::MASK;
use shared::start::store::{Filter as TaskFilter, SortOrder};
use shared::start::task::StartStatus;
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tempfile::TempDir;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::support::engines::{Engines, skipped_on_ministack};
use crate::support::fault_proxy::{FaultProxy, Moment, Stop};
use crate::support::hostile_aws::retries;
use crate::support::log::all_events;

const PREFIX: &str = "import-";
const SEED: &str = include_str!("../data/contract/seed.jsonl");
const SECRET: &str = "hunter2-in-clear";
const TOKEN: &str = "event: it is a streamed token (StreamingDeltaEvent), which is not stored; the message with the whole text is a separate event";

/// Empty tables on engines of their own, with a fault proxy in front of DynamoDB.
struct Fixture {
    stores: Stores,
    events: EventStore,
    importer: Importer,
    gated: Importer,
    gate: FaultProxy,
    engines: Engines,
    _way: crate::support::server::Server,
    folder: TempDir,
}

impl Fixture {
    async fn start() -> Self {
        let folder = TempDir::new().expect("a folder");
        let engines = Engines::start(&folder.path().join("data")).await;
        let sdk = engines.sdk_config().await;
        let aws = Aws::new(&sdk);
        let names = engines.names(PREFIX);
        schema::make_all(&aws, &names, PREFIX).await.expect("a schema");
        let gate = FaultProxy::new();
        let way = gate.to(&engines.dynamodb).await;
        let network = engines.network_sdk_config().await;
        let dynamodb = aws_sdk_dynamodb::config::Builder::from(&network)
            .endpoint_url(way.url())
            .retry_partition(retries())
            .build();
        let gated = Aws { dynamodb: aws_sdk_dynamodb::Client::from_conf(dynamodb), ..aws.clone() };
        Self {
            stores: Stores::new(&names, &aws, &Sealer::ephemeral()),
            events: Stores::without_key(&names, &aws).events(),
            importer: Importer::new(&aws, &names, Pace::AWS),
            gated: Importer::new(&gated, &names, Pace { in_flight: 2, per_owner: 1 }),
            gate,
            engines,
            _way: way,
            folder,
        }
    }

    fn file(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, text).expect("a file");
        path
    }

    async fn take(&self, entries: impl Iterator<Item = Result<Entry, Skip>> + Send + 'static) -> Summary {
        complete(self.importer.run(entries, pending(), |_| {}).await)
    }

    async fn conversations(&self, user: &UserId) -> u64 {
        let all = Filter { include_sub_conversations: true, ..Filter::default() };
        self.stores.conversations().count(user, &all).await.expect("a count")
    }

    async fn start_tasks(&self, user: &UserId) -> u64 {
        self.stores.start_tasks().count(user, &TaskFilter::default()).await.expect("a count")
    }

    /// Compares the counters with the rows.
    async fn assert_counts(&self, user: &UserId, conversations: u64, start_tasks: u64) {
        assert_eq!((self.conversations(user).await, self.start_tasks(user).await), (conversations, start_tasks));
        let ids: Vec<Uuid> = seed("conversation").iter().map(|line| id(&line["data"]["id"])).collect();
        let found = self.stores.conversations().batch_get(user, &ids).await.expect("the store");
        assert_eq!(found.iter().flatten().count() as u64, conversations);
        let listed =
            self.stores.start_tasks().list(user, &TaskFilter::default(), SortOrder::CreatedAt, None, 100).await;
        assert_eq!(listed.expect("a list").0.len() as u64, start_tasks);
    }
}

fn complete((summary, end): (Summary, End)) -> Summary {
    assert!(matches!(end, End::Complete), "{end:?}");
    summary
}

fn seed(kind: &str) -> Vec<Value> {
    let lines = SEED.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    lines.filter(|line| line["type"] == kind).collect()
}

fn id(value: &Value) -> Uuid {
    value.as_str().and_then(|id| id.parse().ok()).expect("an id")
}

fn lines(paths: &[PathBuf], default: Option<UserId>) -> JsonLines {
    JsonLines::open(paths, default).expect("files")
}

fn imported(imported: u64) -> Tally {
    Tally { imported, already_present: 0 }
}

fn already_present(already_present: u64) -> Tally {
    Tally { imported: 0, already_present }
}

#[tokio::test]
async fn recorded_rows_are_imported_once_and_unchanged() {
    let fixture = Fixture::start().await;
    let (local, other) = (UserId::local(), UserId::new("other-user"));
    let file = fixture.file("seed.jsonl", SEED);
    let read = || lines(std::slice::from_ref(&file), Some(UserId::local()));
    assert_eq!(read().total(), 165);

    let summary = fixture.take(read()).await;
    assert_eq!(
        (summary.conversations, summary.start_tasks, summary.events),
        (imported(155), imported(10), imported(0))
    );
    assert_eq!(summary.skipped, []);
    fixture.assert_counts(&local, 155, 9).await;
    fixture.assert_counts(&other, 0, 1).await;

    for line in seed("start_task") {
        let owner = if line["data"]["created_by_user_id"].is_null() { &local } else { &other };
        let record =
            fixture.stores.start_tasks().get(owner, id(&line["data"]["id"])).await.expect("the store").expect("a task");
        assert_eq!(serde_json::to_value(record.show()).expect("JSON"), line["data"]);
    }
    let (unfinished, _) =
        fixture.stores.start_tasks().unfinished().due(Time::now().plus(Duration::from_secs(3600))).await;
    assert_eq!(unfinished, [], "no worker continues them");

    let again = fixture.take(read()).await;
    assert_eq!((again.conversations, again.start_tasks), (already_present(155), already_present(10)));
    fixture.assert_counts(&local, 155, 9).await;
}

#[tokio::test]
async fn existing_rows_are_not_overwritten() {
    let fixture = Fixture::start().await;
    let mut line = seed("conversation").remove(0);
    let conversation = id(&line["data"]["id"]);
    let event = |text: &str| {
        json!({"type": "event", "conversation_id": conversation,
            "data": {"id": "e", "timestamp": "2025-01-01T00:00:00", "kind": "K", "text": text}})
    };
    let first = fixture.file("first", format!("{line}\n{}\n", event("first")));
    fixture.take(lines(&[first], Some(UserId::local()))).await;
    let title = line["data"]["title"].clone();
    line["data"]["title"] = json!("another");
    // Also twice in one file.
    let second = fixture.file("second", format!("{line}\n{line}\n{}\n{0}\n", event("second")));
    let summary = fixture.take(lines(&[second], Some(UserId::local()))).await;
    assert_eq!((summary.conversations, summary.events), (already_present(2), already_present(2)));
    let record = fixture.stores.conversations().get(&UserId::local(), conversation).await.expect("the store");
    assert_eq!(record.and_then(|record| record.title), title.as_str().map(ToOwned::to_owned));
    let events = all_events(&fixture.events, &UserId::local(), conversation).await;
    assert!(events.len() == 1 && events[0].json.contains("first"), "{events:?}");
}

#[tokio::test]
async fn stopped_import_is_completed_by_the_next_run() {
    let fixture = Fixture::start().await;
    let file = fixture.file("seed.jsonl", SEED);
    let user = UserId::new("stopped");
    let read = || lines(std::slice::from_ref(&file), Some(UserId::new("stopped")));
    let (stop, stopped) = oneshot::channel();
    let mut stop = Some(stop);
    let progress = |summary: &Summary| {
        assert!(summary.settled() > 0);
        if let Some(stop) = stop.take() {
            stop.send(()).expect("a run");
        }
    };
    // One batch at a time: after the first one, others remain.
    let stopped = async { stopped.await.expect("a stop") };
    let (first, end) = fixture.gated.run(read(), stopped, progress).await;
    assert!(matches!(end, End::Stopped), "{end:?}");
    assert!(first.settled() < 165, "{first:?}");
    assert_eq!(fixture.conversations(&user).await, first.conversations.imported, "what was reported is stored");

    let second = fixture.take(read()).await;
    assert_eq!(second.conversations.already_present, first.conversations.imported);
    assert_eq!(second.conversations.imported + first.conversations.imported, 155);
    fixture.assert_counts(&user, 155, 9).await;
}

#[tokio::test]
async fn import_that_failed_or_was_killed_at_any_call_is_completed_by_the_next_run() {
    let fixture = Fixture::start().await;
    let event = |number: usize| {
        let data = json!({"id": format!("e{number}"), "timestamp": "2025-01-01T00:00:00", "kind": "K"});
        json!({"type": "event", "conversation_id": Uuid::nil(), "data": data}).to_string()
    };
    let events: Vec<String> = (0..60).map(event).collect();
    let file = fixture.file("seed.jsonl", format!("{SEED}{}", events.join("\n")));
    let mut stops = 0;
    for stop in [Stop::Refuse, Stop::Hang(Moment::After)] {
        for call in 1.. {
            let user = UserId::new(format!("{stop:?} {call}"));
            let read = || lines(std::slice::from_ref(&file), Some(user.clone()));
            fixture.gate.arm(call, stop);
            let run = fixture.gated.run(read(), pending(), |_| {});
            let (counted, reached) = tokio::select! {
                (summary, end) = run => {
                    assert_eq!(matches!(end, End::Failed(_)), fixture.gate.is_reached(), "{end:?}");
                    (Some(summary), fixture.gate.is_reached())
                }
                // Dropped at this call, as if the process was killed.
                () = fixture.gate.reached(), if stop != Stop::Refuse => (None, true),
            };
            fixture.gate.disarm();
            let second = fixture.take(read()).await;
            if let Some(first) = counted {
                assert_eq!(second.conversations.already_present, first.conversations.imported, "{user}");
                assert_eq!(second.conversations.imported + first.conversations.imported, 155, "{user}");
            }
            fixture.assert_counts(&user, 155, 9).await;
            assert_eq!(all_events(&fixture.events, &user, Uuid::nil()).await.len(), 60, "{user}");
            if !reached {
                break;
            }
            stops += 1;
        }
    }
    assert!(stops > 10, "only {stops}");
    // Its line names the owner, so the first run stored it.
    assert_eq!(fixture.start_tasks(&UserId::new("other-user")).await, 1);
}

#[tokio::test]
async fn invalid_line_is_reported_and_does_not_end_the_import() {
    let fixture = Fixture::start().await;
    let good = seed("conversation").remove(0);
    let with = |field: &str, value: Value| {
        let mut line = good.clone();
        line["data"]["id"] = json!(Uuid::new_v4());
        line["data"][field] = value;
        line.to_string()
    };
    let task = |field: &str, value: Value| {
        let mut line = seed("start_task").remove(1);
        line["data"]["id"] = json!(Uuid::new_v4());
        line["data"][field] = value;
        line.to_string()
    };
    let event = |conversation: &str, data: Value| {
        json!({"type": "event", "conversation_id": conversation, "data": data}).to_string()
    };
    let some = Uuid::new_v4().to_string();
    let bad: Vec<(String, &str)> = vec![
        ("{".into(), "line: it is not JSON"),
        ("[1]".into(), "line: it is not an object with a type and data"),
        (r#"{"type": "conversation"}"#.into(), "line: it is not an object with a type and data"),
        (r#"{"type": "sandbox", "data": {}}"#.into(), "line: its type is not conversation, start_task or event"),
        (with("id", json!("not-an-id")), "conversation: id: Input should be a valid UUID"),
        (with("sandbox_id", Value::Null), "conversation: sandbox_id: Input should be a valid string"),
        (with("sandbox_id", json!("x".repeat(600))), "conversation: sandbox_id: it must have 1 to 512 bytes"),
        (with("created_by_user_id", json!("")), "conversation: created_by_user_id: it must have 1 to 512 bytes"),
        (with("created_at", json!("yesterday")), "conversation: created_at: Input should be a valid datetime or date"),
        (
            with("git_provider", json!("sourcehut")),
            "conversation: git_provider: Input should be 'github', 'gitlab', 'bitbucket', 'bitbucket_data_center', 'forgejo', 'azure_devops' or 'enterprise_sso'",
        ),
        (
            with("metrics", json!({"accumulated_cost": -1})),
            "conversation: metrics.accumulated_cost: it is not an amount of money",
        ),
        (
            with("metrics", json!({"accumulated_cost": 1e300})),
            "conversation: metrics.accumulated_cost: it is not an amount of money",
        ),
        (
            with("metrics", json!({"accumulated_token_usage": {"prompt_tokens": -1}})),
            "conversation: metrics.accumulated_token_usage.prompt_tokens: it is not a number of tokens",
        ),
        (with("title", json!("x".repeat(500_000))), "conversation: it is too large for the store"),
        (with("tags", json!(["a"])), "conversation: tags: Input should be a valid dictionary"),
        (task("status", json!("DREAMING")), "start task: status: it is not a status of a start task"),
        (
            task("request", json!({"agent_type": "spy"})),
            "start task: request.agent_type: Input should be 'default' or 'plan'",
        ),
        (
            task("request", json!({"secrets": {"TOKEN": [SECRET]}})),
            "start task: request.secrets: Input should be a valid string",
        ),
        (
            task("request", json!({"secrets": SECRET})),
            "start task: request.secrets: Input should be a valid dictionary",
        ),
        (event("nonsense", json!({})), "event: conversation_id: Input should be a valid UUID"),
        (
            event(&some, json!({"id": "e", "kind": "K"})),
            "event: it is not a JSON object whose id, timestamp and kind are texts",
        ),
        (event(&some, json!({"id": "", "timestamp": "t", "kind": "K"})), "event: id is empty"),
        (
            event(&some, json!({"id": "e".repeat(2000), "timestamp": "t", "kind": "K"})),
            "event: id, timestamp and kind are too long",
        ),
        (event(&some, json!({"id": "e", "timestamp": "t", "kind": "StreamingDeltaEvent", "content": SECRET})), TOKEN),
        (event(&some, json!({"id": "f", "timestamp": "t", "kind": "StreamingDeltaEvent", "content": SECRET})), TOKEN),
    ];
    let mut text: Vec<u8> = bad.iter().flat_map(|(line, _)| [line.as_bytes(), b"\n\n"].concat()).collect();
    text.extend(b"\xff\n");
    text.extend(good.to_string().bytes());
    let file = fixture.file("lines", &text);
    let name = file.display().to_string();
    let summary = fixture.take(lines(&[file], Some(UserId::local()))).await;
    assert_eq!(summary.conversations, imported(1), "{summary}");
    let mut expected: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (index, (_, reason)) in bad.iter().enumerate() {
        // Every second line is empty.
        expected.entry(reason).or_default().push(format!("{name}:{}", 2 * index + 1));
    }
    expected.entry("line: it is not UTF-8").or_default().push(format!("{name}:{}", 2 * bad.len() + 1));
    let found: BTreeMap<&str, Vec<String>> =
        summary.skipped.iter().map(|skipped| (skipped.reason.as_str(), skipped.locations.clone())).collect();
    assert_eq!(found, expected);
    assert_eq!(summary.skipped_rows(), bad.len() as u64 + 1);
    assert!(!summary.to_string().contains(SECRET));
}

#[tokio::test]
async fn rows_belong_to_their_owner_and_events_to_their_conversation() {
    let fixture = Fixture::start().await;
    let (one, another, unowned) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    let conversation = |id: Uuid, owner: Value| {
        let mut line = seed("conversation").remove(0);
        (line["data"]["id"], line["data"]["created_by_user_id"]) = (json!(id), owner);
        line.to_string()
    };
    let event = |id: Uuid, number: usize| {
        let data = json!({"id": format!("e{number}"), "timestamp": "2025-01-01T00:00:00", "kind": "K"});
        json!({"type": "event", "conversation_id": id, "data": data}).to_string()
    };
    // Events precede their conversations, and are in another file.
    let events = [event(one, 1), event(another, 2), event(unowned, 3), event(another, 4)].join("\n");
    let conversations =
        [conversation(another, json!("ann")), conversation(one, json!("bob")), conversation(unowned, Value::Null)];
    let files = [fixture.file("events", events), fixture.file("conversations", conversations.join("\n"))];

    let strict = fixture.take(lines(&files, None)).await;
    assert_eq!((strict.conversations, strict.events), (imported(2), imported(3)));
    let reasons: Vec<&str> = strict.skipped.iter().map(|skipped| skipped.reason.as_str()).collect();
    assert_eq!(reasons.len(), 2);
    assert!(reasons.iter().all(|reason| reason.contains("--user ID")), "{reasons:?}");

    let summary = fixture.take(lines(&files, Some(UserId::local()))).await;
    assert_eq!(summary.conversations, Tally { imported: 1, already_present: 2 });
    assert_eq!(summary.events, Tally { imported: 1, already_present: 3 });
    assert_eq!(summary.skipped, []);
    for (owner, conversation, count) in
        [(UserId::new("ann"), another, 2), (UserId::new("bob"), one, 1), (UserId::local(), unowned, 1)]
    {
        assert_eq!(fixture.conversations(&owner).await, 1);
        assert_eq!(all_events(&fixture.events, &owner, conversation).await.len(), count, "{owner}");
    }
}

#[tokio::test]
async fn ten_thousand_events_in_mixed_order_are_stored_byte_for_byte() {
    const EVENTS: usize = 10_000;
    let fixture = Fixture::start().await;
    let conversations: Vec<Uuid> = (0..7).map(|_| Uuid::new_v4()).collect();
    // 7919 and the number of events have no common divisor, so every number comes once, in mixed order.
    let numbers = (0..EVENTS).map(|index| index * 7919 % EVENTS);
    let json = |number: usize| {
        let (minute, second) = (number / 60 % 60, number % 60);
        format!(
            r#"{{"b" : {number}, "id":"e-{number}",  "timestamp":"2025-01-01T{:02}:{minute:02}:{second:02}", "text":"\u00e4ä\/", "kind":"K","n":1.50}}"#,
            number / 3600
        )
    };
    let text: Vec<String> = numbers
        .map(|number| {
            let conversation = conversations[number % conversations.len()].simple();
            format!("{{\"data\": {} ,\"type\":\"event\",\"conversation_id\":\"{conversation}\"}}\n", json(number))
        })
        .collect();
    let file = fixture.file("events", text.concat());
    let summary = fixture.take(lines(&[file], Some(UserId::local()))).await;
    assert_eq!((summary.events, summary.skipped_rows()), (imported(EVENTS as u64), 0));
    for (first, conversation) in conversations.iter().enumerate() {
        let found = all_events(&fixture.events, &UserId::local(), *conversation).await;
        let expected: Vec<String> = (first..EVENTS).step_by(conversations.len()).map(json).collect();
        assert!(found.iter().map(|event| &event.json).eq(&expected), "conversation {first}");
    }
}

/// A data folder of the reference, with its database in the state after its migrations.
struct Reference {
    folder: TempDir,
    database: Connection,
}

impl Reference {
    fn new() -> Self {
        let folder = TempDir::new().expect("a folder");
        let database = Connection::open(folder.path().join("openhands.db")).expect("a database");
        database
            .execute_batch(
                "CREATE TABLE conversation_metadata (
                    conversation_id VARCHAR PRIMARY KEY NOT NULL, user_id VARCHAR, selected_repository VARCHAR,
                    selected_branch VARCHAR, git_provider VARCHAR, title VARCHAR, last_updated_at DATETIME,
                    created_at DATETIME, \"trigger\" VARCHAR, pr_number JSON, accumulated_cost FLOAT,
                    prompt_tokens INTEGER, completion_tokens INTEGER, total_tokens INTEGER, max_budget_per_task FLOAT,
                    cache_read_tokens INTEGER, cache_write_tokens INTEGER, reasoning_tokens INTEGER,
                    context_window INTEGER, per_turn_token INTEGER, llm_model VARCHAR,
                    conversation_version VARCHAR NOT NULL, sandbox_id VARCHAR, parent_conversation_id VARCHAR,
                    public BOOLEAN);
                CREATE TABLE app_conversation_start_task (
                    id UUID PRIMARY KEY NOT NULL, created_by_user_id VARCHAR, status VARCHAR(21), detail VARCHAR,
                    app_conversation_id UUID, sandbox_id VARCHAR, agent_server_url VARCHAR, request JSON,
                    created_at DATETIME, updated_at DATETIME);",
            )
            .expect("tables");
        Self { folder, database }
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn conversation(&self, id: Uuid, version: &str, trigger: &str, sandbox: Option<&str>) {
        let values = params![id.to_string(), version, trigger, sandbox];
        self.database
            .execute(
                "INSERT INTO conversation_metadata VALUES (?1, NULL, 'o/r', 'main', 'github', 'A title',
                    '2025-06-01 10:01:00.123456', '2025-06-01 10:00:00', ?3, '[7]', 0.5, 1, 2, 0, NULL, 3, 4, 5, 6, NULL,
                    'model', ?2, ?4, NULL, 1)",
                values,
            )
            .expect("a row");
    }

    fn start_task(&self, id: Uuid, status: &str, request: &Value) {
        let values = params![id.simple().to_string(), status, request.to_string()];
        self.database
            .execute(
                "INSERT INTO app_conversation_start_task VALUES (?1, NULL, ?2, NULL, NULL, 'box', 'http://localhost:1', ?3,
                    '2025-06-01 10:00:00.000001', '2025-06-01 10:00:02')",
                values,
            )
            .expect("a row");
    }

    fn event(&self, user: &str, conversation: Uuid, name: &str, json: &str) {
        let folder = self.path().join(user).join("v1_conversations").join(conversation.simple().to_string());
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join(name), json).expect("an event");
    }

    /// Every file with its content.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut folders = vec![self.path().to_owned()];
        let mut files = BTreeMap::new();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    // The shared memory of the live connection also records its readers.
                    let content = if path.to_string_lossy().ends_with("-shm") {
                        Vec::new()
                    } else {
                        fs::read(&path).expect("a file")
                    };
                    files.insert(path, content);
                }
            }
        }
        files
    }

    async fn import_into(&self, fixture: &Fixture) -> Summary {
        fixture.take(DataFolder::open(self.path(), Some(UserId::local())).expect("a data folder")).await
    }
}

#[tokio::test]
async fn data_folder_of_the_reference_is_imported_with_its_events() {
    let fixture = Fixture::start().await;
    let user = UserId::local();
    let reference = Reference::new();
    let ids: Vec<Uuid> = (0..6).map(|_| Uuid::new_v4()).collect();
    reference.conversation(ids[0], "V1", "gui", Some("box"));
    reference.conversation(ids[1], "V1", "automation", Some("box"));
    reference.conversation(ids[2], "V0", "gui", None);
    reference.conversation(ids[3], "V1", "the moon", Some("box"));
    reference.conversation(ids[4], "V1", "gui", None);
    let tasks: Vec<Uuid> = (0..4).map(|_| Uuid::new_v4()).collect();
    let large = json!({"system_message_suffix": "x".repeat(20_000), "secrets": {"TOKEN": SECRET}});
    reference.start_task(tasks[0], "READY", &large);
    reference.start_task(tasks[1], "PREPARING_REPOSITORY", &json!({"secrets": {"TOKEN": SECRET}}));
    reference.start_task(tasks[2], "ERROR", &json!({}));
    reference.start_task(tasks[3], "READY", &json!("no request"));
    let event = |name: &str| {
        format!("{{\n  \"id\": \"{name}\",\n  \"timestamp\": \"2025-01-01T00:00:00\",\n  \"kind\": \"K\"\n}}")
    };
    reference.event("", ids[0], "a.json", &event("a"));
    reference.event("", ids[0], "b.json", "{");
    reference.event("", ids[0], "note.txt", "no event");
    reference.event("user-one", ids[1], "c.json", &event("c"));
    for token in ["t1", "t2"] {
        let token =
            json!({"id": token, "timestamp": "2025-01-01T00:00:01", "kind": "StreamingDeltaEvent", "content": "x"});
        reference.event("", ids[0], &format!("{}.json", token["id"]), &token.to_string());
    }
    reference.event("", ids[2], "d.json", &event("d"));
    reference.event("", ids[5], "e.json", &event("e"));
    let files = reference.files();

    let folder = DataFolder::open(reference.path(), Some(UserId::local())).expect("a data folder");
    assert_eq!(folder.total(), 5 + 4 + 7);
    let summary = fixture.take(folder).await;
    assert_eq!(
        (summary.conversations, summary.start_tasks, summary.events),
        (imported(2), imported(3), imported(2)),
        "{summary}"
    );
    let skipped: Vec<(&str, u64)> =
        summary.skipped.iter().map(|skipped| (skipped.reason.as_str(), skipped.count)).collect();
    assert_eq!(skipped.iter().map(|(_, count)| count).sum::<u64>(), 9, "{summary}");
    for (beginning, count) in [
        ("conversation: it has version V0", 1),
        ("conversation: trigger: Input should be", 1),
        ("conversation: sandbox_id: Field required", 1),
        ("start task: request: Input should be", 1),
        ("event: it is not a JSON object", 1),
        ("event: its conversation is not in the database", 2),
        (TOKEN, 2),
    ] {
        assert!(skipped.iter().any(|(reason, found)| reason.starts_with(beginning) && *found == count), "{summary}");
    }

    let record = fixture.stores.conversations().get(&user, ids[0]).await.expect("the store").expect("a conversation");
    let shown = serde_json::to_value(shared::conversation::AppConversation::without_sandbox(record)).expect("JSON");
    for (field, value) in [
        ("created_at", json!("2025-06-01T10:00:00Z")),
        ("updated_at", json!("2025-06-01T10:01:00.123456Z")),
        ("selected_repository", json!("o/r")),
        ("git_provider", json!("github")),
        ("trigger", json!("gui")),
        ("pr_number", json!([7])),
        ("public", json!(true)),
        ("sandbox_id", json!("box")),
    ] {
        assert_eq!(shown[field], value, "{field}");
    }
    let of_later = fixture.stores.conversations().get(&user, ids[1]).await.expect("the store").expect("a conversation");
    let of_later = shared::conversation::AppConversation::without_sandbox(of_later);
    assert_eq!(serde_json::to_value(of_later).expect("JSON")["trigger"], "automation");
    assert_eq!(shown["metrics"]["accumulated_cost"], 0.5);
    let usage = &shown["metrics"]["accumulated_token_usage"];
    assert_eq!((&usage["cache_write_tokens"], &usage["per_turn_token"]), (&json!(4), &json!(0)));

    let unfinished = fixture.stores.start_tasks().get(&user, tasks[1]).await.expect("the store").expect("a task");
    assert_eq!(unfinished.now.status, StartStatus::Error);
    assert!(unfinished.now.detail.as_ref().is_some_and(|detail| detail.contains("PREPARING_REPOSITORY")));
    let ready = fixture.stores.start_tasks().batch_get(&user, &tasks[..1]).await.expect("the store");
    let ready =
        fixture.stores.start_tasks().show_all(&ready).await.expect("the bucket").pop().flatten().expect("a task");
    let request: Value = serde_json::from_str(ready.request.get()).expect("JSON");
    assert_eq!(request["secrets"], json!({"TOKEN": "**********"}));
    assert_eq!(request["system_message_suffix"].as_str().map(str::len), Some(20_000));
    assert_eq!(ready.created_at.to_string(), "2025-06-01T10:00:00.000001Z");

    let kept = all_events(&fixture.events, &user, ids[0]).await;
    assert_eq!(kept.iter().map(|kept| kept.json.as_str()).collect::<Vec<_>>(), [event("a")]);
    assert_eq!(
        all_events(&fixture.events, &user, ids[1]).await.len(),
        1,
        "the conversation's owner is the events' owner"
    );

    let again = reference.import_into(&fixture).await;
    assert_eq!(
        (again.conversations, again.start_tasks, again.events),
        (already_present(2), already_present(3), already_present(2))
    );
    assert_eq!(reference.files(), files, "the import writes nothing to the reference's folder");
    assert_eq!((fixture.conversations(&user).await, fixture.start_tasks(&user).await), (2, 3));

    let Fixture { engines, folder, .. } = fixture;
    engines.shutdown().await;
    if skipped_on_ministack("what is in the embedded engines' files") {
        return;
    }
    let mut kept = vec![folder.path().to_owned()];
    while let Some(path) = kept.pop() {
        if path.is_dir() {
            kept.extend(fs::read_dir(path).expect("a folder").map(|entry| entry.expect("an entry").path()));
            continue;
        }
        let content = fs::read(&path).expect("a file");
        assert!(!content.windows(SECRET.len()).any(|part| part == SECRET.as_bytes()), "{}", path.display());
    }
}

/// The repositories of past conversations are imported unchanged, except for credentials in an address.
#[tokio::test]
async fn repositories_are_imported_without_credentials() {
    let fixture = Fixture::start().await;
    let user = UserId::local();
    let reference = Reference::new();
    let mut text = String::new();
    let mut expected = Vec::new();
    for (given, kept) in [
        ("https://me:SECRET@git.example/o/r.git", "https://git.example/o/r.git"),
        ("https://SECRET@git.example/o/r", "https://git.example/o/r"),
        ("me:SECRET@git.example/o/r", "git.example/o/r"),
        ("https://git.example/o/r?access_token=SECRET", "https://git.example/o/r"),
        ("git@git.example:o/r.git", "git@git.example:o/r.git"),
        (" of/an/earlier one;", " of/an/earlier one;"),
    ] {
        let (line_id, row_id) = (Uuid::new_v4(), Uuid::new_v4());
        let mut line = seed("conversation").remove(0);
        line["data"]["id"] = json!(line_id);
        line["data"]["created_by_user_id"] = Value::Null;
        line["data"]["selected_repository"] = json!(given);
        text += &format!("{line}\n");
        reference.database.execute(
            "INSERT INTO conversation_metadata (conversation_id, created_at, conversation_version, sandbox_id, selected_repository)
                VALUES (?1, '2025-06-01 10:00:00', 'V1', 'box', ?2)",
            params![row_id.to_string(), given],
        ).expect("a row");
        expected.extend([(line_id, kept), (row_id, kept)]);
    }
    let mut task = seed("start_task").remove(1);
    let id = Uuid::new_v4();
    task["data"]["id"] = json!(id);
    task["data"]["created_by_user_id"] = Value::Null;
    task["data"]["request"] = json!({"selected_repository": "https://me:SECRET@git.example/o/r"});
    text += &format!("{task}\n");
    let file = fixture.file("repositories", text);
    let summary = fixture.take(lines(&[file], Some(user.clone()))).await;
    assert_eq!(summary.skipped_rows(), 0, "{summary}");
    reference.import_into(&fixture).await;
    for (id, kept) in expected {
        let record = fixture.stores.conversations().get(&user, id).await.expect("the store").expect("a conversation");
        assert_eq!(record.selected_repository.as_deref(), Some(kept));
    }
    let task = fixture.stores.start_tasks().get(&user, id).await.expect("the store").expect("a task");
    let shown = serde_json::to_value(task.show_within(u64::MAX)).expect("JSON");
    assert_eq!(shown["request"]["selected_repository"], "https://git.example/o/r");
    fixture.engines.shutdown().await;
}

/// The names of past secrets are imported as well, even those that a start would refuse.
#[tokio::test]
async fn secrets_of_requests_are_imported_by_name_only() {
    let fixture = Fixture::start().await;
    let user = UserId::local();
    let reference = Reference::new();
    let (mut text, mut expected) = (String::new(), Vec::new());
    for (given, kept) in [
        (json!({"MY-X": MASK}), json!({"MY-X": MASK})),
        (json!({"LLM_API_KEY": MASK, "B": ""}), json!({"LLM_API_KEY": MASK, "B": ""})),
        (json!({"PATH": SECRET, "1ST": SECRET, "": SECRET}), json!({"PATH": MASK, "1ST": MASK, "": MASK})),
        (json!({"NUL": "a\0", "LARGE": "x".repeat(70_000)}), json!({"NUL": MASK, "LARGE": MASK})),
        (json!({"a b$(id)": MASK}), json!({"a b$(id)": MASK})),
        (json!({}), json!({})),
        (Value::Null, Value::Null),
    ] {
        let (line_id, row_id) = (Uuid::new_v4(), Uuid::new_v4());
        let request = json!({"title": "t", "secrets": given});
        let mut line = seed("start_task").remove(1);
        line["data"]["id"] = json!(line_id);
        line["data"]["created_by_user_id"] = Value::Null;
        line["data"]["request"] = request.clone();
        text += &format!("{line}\n");
        reference.start_task(row_id, "READY", &request);
        expected.extend([(line_id, kept.clone()), (row_id, kept)]);
    }
    let file = fixture.file("secrets", text);
    let summary = fixture.take(lines(&[file], Some(user.clone()))).await;
    assert_eq!(summary.skipped_rows(), 0, "{summary}");
    let summary = reference.import_into(&fixture).await;
    assert_eq!(summary.skipped_rows(), 0, "{summary}");
    for (id, kept) in expected {
        let task = fixture.stores.start_tasks().get(&user, id).await.expect("the store").expect("a task");
        let shown = serde_json::to_value(task.show_within(u64::MAX)).expect("JSON");
        assert_eq!((&shown["request"]["secrets"], &shown["request"]["title"]), (&kept, &json!("t")));
    }
    fixture.engines.shutdown().await;
}

/// Each importer keeps tags within the limits, and ignores those that exceed them.
#[tokio::test]
async fn tags_within_the_limits_are_imported_with_their_conversation() {
    let fixture = Fixture::start().await;
    let user = UserId::local();
    let (long, longest) = ("x".repeat(MAX_TAG_VALUE + 1), "x".repeat(MAX_TAG_VALUE));
    let many: serde_json::Map<String, Value> = (0..=MAX_TAGS).map(|tag| (format!("{tag:03}"), json!(""))).collect();
    let mut kept = many.clone();
    kept.remove(&format!("{MAX_TAGS:03}"));
    let cases = [
        (json!({"team": "a1", "note": longest}), json!({"team": "a1", "note": longest})),
        (
            json!({"team": "a1", "long": long, "number": 1, "nothing": null, "n".repeat(MAX_TAG_NAME + 1): ""}),
            json!({"team": "a1"}),
        ),
        (Value::Object(many), Value::Object(kept)),
        (json!({}), json!({})),
        (Value::Null, json!({})),
    ];
    let good = seed("conversation").remove(0);
    let reference = Reference::new();
    reference.database.execute_batch("ALTER TABLE conversation_metadata ADD COLUMN tags JSON").expect("a column");
    let (mut text, mut expected) = (String::new(), Vec::new());
    let in_database = |id: Uuid, tags: Option<String>| {
        reference.database.execute(
            "INSERT INTO conversation_metadata (conversation_id, created_at, conversation_version, sandbox_id, tags)
                VALUES (?1, '2025-06-01 10:00:00', 'V1', 'box', ?2)",
            params![id.to_string(), tags],
        ).expect("a row");
    };
    for (tags, kept) in &cases {
        let (line_id, row_id) = (Uuid::new_v4(), Uuid::new_v4());
        let mut line = good.clone();
        line["data"]["id"] = json!(line_id);
        line["data"]["created_by_user_id"] = Value::Null;
        line["data"]["tags"] = tags.clone();
        text += &format!("{line}\n");
        // The column also holds the text `null`.
        in_database(row_id, Some(tags.to_string()));
        expected.extend([(line_id, kept.clone()), (row_id, kept.clone())]);
    }
    let null = Uuid::new_v4();
    in_database(null, None);
    expected.push((null, json!({})));
    let file = fixture.file("tags", text);
    let from_lines = fixture.take(lines(&[file], Some(user.clone()))).await;
    assert_eq!(
        (from_lines.conversations, from_lines.skipped_rows()),
        (imported(cases.len() as u64), 0),
        "{from_lines}"
    );
    let from_folder = reference.import_into(&fixture).await;
    let all = imported(cases.len() as u64 + 1);
    assert_eq!((from_folder.conversations, from_folder.skipped_rows()), (all, 0), "{from_folder}");
    for (id, tags) in expected {
        let record = fixture.stores.conversations().get(&user, id).await.expect("the store").expect("a conversation");
        assert_eq!(json!(record.tags), tags);
    }
    fixture.engines.shutdown().await;
}

/// What later versions store of a conversation's agent is kept, from lines and from a database.
#[tokio::test]
async fn agents_of_later_versions_are_imported_with_their_conversation() {
    let fixture = Fixture::start().await;
    let user = UserId::local();
    let profile = json!({"agent_profile_id": "b704a292-9166-4871-83f0-f2c3a805d5d4", "revision": 3});
    let (line_id, row_id, old) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    let mut good = seed("conversation").remove(0);
    good["data"]["created_by_user_id"] = Value::Null;
    let mut text = String::new();
    for (id, agent) in [(line_id, true), (old, false)] {
        let mut line = good.clone();
        line["data"]["id"] = json!(id);
        if agent {
            line["data"]["agent_kind"] = "acp".into();
            line["data"]["acp_server"] = "codex".into();
            line["data"]["launched_agent_profile"] = profile.clone();
            line["data"]["trigger"] = "automation".into();
        }
        text += &format!("{line}\n");
    }
    for (field, value) in [
        ("agent_kind", json!("x".repeat(101))),
        ("acp_server", json!(1)),
        ("launched_agent_profile", json!({"agent_profile_id": "x", "revision": 1})),
        ("launched_agent_profile", json!({"agent_profile_id": Uuid::nil(), "revision": -1})),
    ] {
        let mut line = good.clone();
        line["data"]["id"] = json!(Uuid::new_v4());
        line["data"][field] = value;
        text += &format!("{line}\n");
    }
    let reference = Reference::new();
    let columns = "ALTER TABLE conversation_metadata ADD COLUMN agent_kind TEXT;
        ALTER TABLE conversation_metadata ADD COLUMN launched_agent_profile JSON;";
    reference.database.execute_batch(columns).expect("columns");
    let insert = "INSERT INTO conversation_metadata
        (conversation_id, created_at, conversation_version, sandbox_id, agent_kind, launched_agent_profile)
        VALUES (?1, '2025-06-01 10:00:00', 'V1', 'box', 'acp', ?2)";
    reference.database.execute(insert, params![row_id.to_string(), profile.to_string()]).expect("a row");

    let file = fixture.file("agents", text);
    let from_lines = fixture.take(lines(&[file], Some(user.clone()))).await;
    assert_eq!((from_lines.conversations, from_lines.skipped_rows()), (imported(2), 4), "{from_lines}");
    let from_folder = reference.import_into(&fixture).await;
    assert_eq!((from_folder.conversations, from_folder.skipped_rows()), (imported(1), 0), "{from_folder}");
    for (id, kind, server, launched) in [
        (line_id, "acp", json!("codex"), profile.clone()),
        (row_id, "acp", Value::Null, profile),
        (old, "openhands", Value::Null, Value::Null),
    ] {
        let record = fixture.stores.conversations().get(&user, id).await.expect("the store").expect("a conversation");
        let shown = json!(AppConversation::without_sandbox(record));
        assert_eq!(
            (&shown["agent_kind"], &shown["acp_server"], &shown["launched_agent_profile"]),
            (&json!(kind), &server, &launched)
        );
    }
    fixture.engines.shutdown().await;
}

#[tokio::test]
async fn a_database_in_wal_mode_is_read_while_it_is_written_and_after_a_crash() {
    let fixture = Fixture::start().await;
    let reference = Reference::new();
    reference.database.pragma_update(None, "journal_mode", "wal").expect("WAL");
    reference.database.pragma_update(None, "wal_autocheckpoint", 0).expect("no checkpoints");
    let ids: Vec<Uuid> = (0..3).map(|_| Uuid::new_v4()).collect();
    reference.conversation(ids[0], "V1", "gui", Some("box"));
    let files = reference.files();
    assert!(files.keys().any(|path| path.to_string_lossy().ends_with("-wal")));
    assert_eq!(
        reference.import_into(&fixture).await.conversations,
        imported(1),
        "from the write-ahead log of a live server"
    );
    assert_eq!(reference.files(), files);

    // During a write transaction.
    reference.database.execute_batch("BEGIN IMMEDIATE").expect("a transaction");
    reference.conversation(ids[1], "V1", "gui", Some("box"));
    assert_eq!(
        reference.import_into(&fixture).await.conversations,
        already_present(1),
        "uncommitted rows are not imported"
    );
    reference.database.execute_batch("COMMIT").expect("committed");
    assert_eq!(reference.import_into(&fixture).await.conversations, Tally { imported: 1, already_present: 1 });

    // The files that a killed server leaves, and those of a copy without the shared memory.
    for (name, suffixes) in [("killed", ["", "-wal", "-shm"].as_slice()), ("copied", &["", "-wal"])] {
        let folder = TempDir::new().expect("a folder");
        for suffix in suffixes {
            let file = format!("openhands.db{suffix}");
            fs::copy(reference.path().join(&file), folder.path().join(&file)).expect("a copy");
        }
        let listed = || {
            let mut names: Vec<_> = fs::read_dir(folder.path())
                .expect("a folder")
                .map(|entry| entry.expect("an entry").file_name())
                .collect();
            names.sort();
            names
        };
        let before = listed();
        let data = DataFolder::open(folder.path(), Some(UserId::local())).expect("a data folder");
        assert_eq!(fixture.take(data).await.conversations, already_present(2), "{name}");
        assert_eq!(listed(), before, "{name}");
    }

    // After a clean shutdown only the database is left, still in WAL mode.
    reference.conversation(ids[2], "V1", "gui", Some("box"));
    let Reference { folder, database } = reference;
    database.close().expect("closed");
    let data = DataFolder::open(folder.path(), Some(UserId::local())).expect("a data folder");
    assert_eq!(fixture.take(data).await.conversations, Tally { imported: 1, already_present: 2 });
    assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 1);
}

#[tokio::test]
async fn data_folder_in_use_and_unknown_folder_are_refused_with_an_explanation() {
    if skipped_on_ministack("a data folder is the embedded engines' alone") {
        return;
    }
    let fixture = Fixture::start().await;
    let file = fixture.file("seed.jsonl", SEED);
    let data = fixture.folder.path().join("data");
    let into = TargetOptions::default();
    let refused = command::import(&[file], &into, &data, pending()).await.expect_err("it is in use");
    assert!(refused.to_string().ends_with("is in use by another process. Stop that process or choose another folder."));
    let refused =
        command::import_openhands(fixture.folder.path(), &into, &data, pending()).await.expect_err("no such server's");
    assert!(refused.to_string().starts_with("There is no openhands.db in "), "{refused}");
    let missing = fixture.folder.path().join("missing");
    let refused = command::import(&[missing], &into, &data, pending()).await.expect_err("no such file");
    assert!(refused.to_string().contains("missing cannot be read: "), "{refused}");
}
