//! Writes to DynamoDB whose response is lost, or that are throttled or collide with others. Each takes effect exactly once, and its
//! caller gets the result that it would have got without the fault.

use std::time::Duration;

use secrecy::SecretString;
use serde_json::json;
use shared::Time;
use shared::aws::Aws;
use shared::config::Names;
use shared::conversation::ConversationRecord;
use shared::conversation::reports::{AgentStats, Lookup, ReportTime, Touch};
use shared::conversation::search::Filter as ConversationFilter;
use shared::conversation::store::{ConversationChange, ConversationStore};
use shared::dynamo::{Cancellation, Condition, Item, Outcome, Table, Transacted, Update, number, text, transact};
use shared::pending_message::store::{MessageStore, Sending};
use shared::sandbox::store::{Desired, SandboxStore};
use shared::start::identity::StartIdentity;
use shared::start::request::StartRequest;
use shared::start::store::{Abandoned, Change, Claim, Filter, ImportedTask, NewStart, StartTaskStore};
use shared::start::task::{Snapshot, StartStatus};
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::api_key::ApiKeyStore;
use shared::user::counters::{Counter, read};
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;
use shared::user::settings_document::SecretChange;
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::engines::Engines;
use crate::support::fault_proxy::{FaultProxy, Stop};
use crate::support::hostile_aws::retries;
use crate::support::server::Server;

const PREFIX: &str = "lost-";
const LEASE: Duration = Duration::from_secs(60);
/// The attempts of the SDK.
const SDK_ATTEMPTS: usize = 3;

/// Stores behind a proxy that injects faults into calls to DynamoDB.
struct Rig {
    user: UserId,
    proxy: FaultProxy,
    dynamodb: aws_sdk_dynamodb::Client,
    names: Names,
    tasks: StartTaskStore,
    conversations: ConversationStore,
    messages: MessageStore,
    settings: SettingsStore,
    api_keys: ApiKeyStore,
    sandboxes: SandboxStore,
    engines: Engines,
    _way: Server,
    _folder: TempDir,
}

impl Rig {
    async fn start() -> Self {
        let folder = TempDir::new().expect("a folder");
        let engines = Engines::start(folder.path()).await;
        let aws = Aws::new(&engines.sdk_config().await);
        let names = engines.names(PREFIX);
        schema::make_all(&aws, &names, PREFIX).await.expect("a schema");
        let proxy = FaultProxy::new();
        let way = proxy.to(&engines.dynamodb).await;
        let network = engines.network_sdk_config().await;
        let dynamodb = aws_sdk_dynamodb::Client::from_conf(
            aws_sdk_dynamodb::config::Builder::from(&network)
                .endpoint_url(way.url())
                .retry_partition(retries())
                .build(),
        );
        let sealer = Sealer::ephemeral();
        let stores = Stores::new(&names, &Aws { dynamodb: dynamodb.clone(), ..aws }, &sealer);
        Self {
            user: UserId::new("user"),
            tasks: stores.start_tasks(),
            conversations: stores.conversations(),
            messages: stores.messages(),
            settings: stores.settings(),
            api_keys: stores.api_keys(),
            sandboxes: stores.sandboxes(),
            proxy,
            dynamodb,
            names,
            engines,
            _way: way,
            _folder: folder,
        }
    }

    /// Runs a call whose first write takes effect and loses its response. Calls before the write only read.
    async fn lossy<T>(&self, write: &str, call: impl AsyncFn() -> T) -> T {
        self.faulty(write, Stop::LoseResponses(1), call).await
    }

    /// Runs a call with a fault at its first call of this name, which is found by its number: reads come before it.
    async fn faulty<T>(&self, write: &str, stop: Stop, call: impl AsyncFn() -> T) -> T {
        let reads = match write {
            // The number of reads before the write.
            "settings PutItem" | "create a key" => 1,
            _ => 0,
        };
        self.proxy.arm(reads + 1, stop);
        let result = call().await;
        self.proxy.disarm();
        assert!(self.proxy.is_reached(), "{write}: {:?}", self.proxy.calls());
        result
    }

    /// The user's count of unfinished starts.
    async fn unfinished(&self) -> u64 {
        read(&self.scratch(), &self.user, Counter::UnfinishedStarts).await.expect("a count")
    }

    fn request() -> StartRequest {
        StartRequest::from_body(Some("application/json"), b"{}").expect("a request")
    }

    fn scratch(&self) -> Table {
        Table::new(self.dynamodb.clone(), self.names.users.clone())
    }

    fn key(&self, kind: &str) -> Item {
        Item::from([("user".into(), text(self.user.as_str())), ("kind".into(), text(kind))])
    }

    fn record(id: Uuid) -> ConversationRecord {
        serde_json::from_value(json!({
            "user": "user", "id": id.simple().to_string(), "sandbox_id": "s",
            "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z",
        }))
        .expect("a record")
    }
}

fn new_start() -> NewStart {
    NewStart {
        identity: StartIdentity::random(),
        deadline: Time::now().plus(LEASE),
        max_unfinished: 500,
        membership: None,
        trace: None,
    }
}

fn snapshot(status: StartStatus) -> Snapshot {
    Snapshot {
        status,
        updated_at: Time::now(),
        detail: None,
        app_conversation_id: None,
        sandbox_id: None,
        agent_server_url: None,
    }
}

#[tokio::test]
async fn a_start_is_created_once_and_counted_once() {
    let rig = Rig::start().await;
    let request = Rig::request();
    // First one lost response, which the SDK retries, then so many that the SDK gives up: the start is looked up.
    for (number, lost) in [(1, 1), (2, SDK_ATTEMPTS)] {
        let create = async || rig.tasks.create(&rig.user, &request, &new_start()).await;
        let record = rig.faulty("create", Stop::LoseResponses(lost), create).await.expect("created");
        assert!(rig.tasks.get(&rig.user, record.id).await.expect("the store").is_some());
        assert_eq!(rig.tasks.count(&rig.user, &Filter::default()).await.expect("a count"), number);
    }
    // One that was not written is not found.
    rig.proxy.arm(1, Stop::Refuse);
    rig.tasks.create(&rig.user, &request, &new_start()).await.expect_err("refused");
    rig.proxy.disarm();
    assert_eq!(rig.tasks.count(&rig.user, &Filter::default()).await.expect("a count"), 2);

    let id = Uuid::new_v4();
    let task = ImportedTask { id, now: snapshot(StartStatus::Ready), created_at: Time::now(), request };
    rig.proxy.arm(2, Stop::LoseResponses(1));
    assert_eq!(rig.tasks.import(&rig.user, std::slice::from_ref(&task)).await.expect("imported"), [true]);
    assert_eq!(rig.proxy.calls(), ["BatchGetItem", "TransactWriteItems", "TransactWriteItems"]);
    rig.proxy.disarm();
    assert_eq!(rig.tasks.count(&rig.user, &Filter::default()).await.expect("a count"), 3);
    rig.engines.shutdown().await;
}

#[tokio::test]
async fn a_start_is_claimed_changed_and_released_once() {
    let rig = Rig::start().await;
    let (user, tasks) = (&rig.user, &rig.tasks);
    let id = tasks.create(user, &Rig::request(), &new_start()).await.expect("created").id;
    let claimed = rig.lossy("claim", async || tasks.claim(user, id, "w1", LEASE, None).await).await.expect("the store");
    let Claim::Claimed(task) = claimed else { panic!("{claimed:?}") };
    assert_eq!(task.record.open_claims, 1, "a repeated claim is no death of a worker");
    assert!(matches!(tasks.claim(user, id, "w2", LEASE, None).await.expect("the store"), Claim::Held));

    rig.lossy("renew", async || tasks.renew(user, id, "w1", LEASE).await).await.expect("the store").expect("renewed");
    let next = snapshot(StartStatus::WaitingForSandbox);
    let change = Change::default().state(id, &next).expect("a change").note("a note");
    let saved = rig.lossy("save", async || tasks.save(user, id, "w1", &change).await).await;
    saved.expect("the store").expect("saved");
    let record = tasks.get(user, id).await.expect("the store").expect("it");
    assert_eq!((record.history.len(), record.notes.len()), (2, 1), "{:?}", record.history);

    let release = async || tasks.release(user, id, "w1", Time::now(), Change::default()).await;
    rig.lossy("release", release).await.expect("the store").expect("released");
    release().await.expect("the store").expect_err("released before");
    // A job that continues a wait ends if a job that was enqueued since continues it later.
    assert!(matches!(tasks.claim(user, id, "w1", LEASE, None).await.expect("the store"), Claim::Claimed(_)));
    let later = Time::now().plus(Duration::from_secs(60));
    let due_at = tasks.release(user, id, "w1", later, Change::default()).await.expect("the store").expect("released");
    let obsolete = Some(due_at.minus(Duration::from_micros(1)));
    assert!(matches!(tasks.claim(user, id, "w2", LEASE, obsolete).await.expect("the store"), Claim::Held));
    let claimed = tasks.claim(user, id, "w1", LEASE, Some(due_at)).await.expect("the store");
    assert!(matches!(claimed, Claim::Claimed(_)), "{claimed:?}");
    tasks.release(user, id, "w1", Time::now(), Change::default()).await.expect("the store").expect("released");
    assert!(matches!(tasks.claim(user, id, "w2", LEASE, None).await.expect("the store"), Claim::Claimed(_)));
    tasks.save(user, id, "w1", &change).await.expect("the store").expect_err("another worker's");

    let conversation = Uuid::new_v4();
    let recorded = rig.conversations.put_started(&Rig::record(conversation), &[]).expect("writes");
    let ready = StartTaskStore::ready(user, id, conversation, &snapshot(StartStatus::Ready)).expect("a change");
    let end = async || tasks.end(user, id, "w2", &ready, recorded.clone()).await;
    assert_eq!(rig.unfinished().await, 1);
    rig.lossy("end", end).await.expect("the store").expect("ended");
    end().await.expect("the store").expect_err("ended before");
    let all = ConversationFilter::default();
    assert_eq!((rig.conversations.count(user, &all).await.expect("a count"), rig.unfinished().await), (1, 0));
    assert!(matches!(tasks.claim(user, id, "w3", LEASE, None).await.expect("the store"), Claim::Finished));
    assert!(matches!(tasks.claim(user, Uuid::new_v4(), "w3", LEASE, None).await.expect("the store"), Claim::Unknown));
    rig.engines.shutdown().await;
}

#[tokio::test]
async fn a_start_fails_once_and_is_undone_under_one_lease() {
    let rig = Rig::start().await;
    let (user, tasks) = (&rig.user, &rig.tasks);
    let claim = async |id, worker: &'static str| tasks.claim(user, id, worker, LEASE, None).await.expect("the store");
    // Under a lease, which the worker keeps to undo what it made.
    let id = tasks.create(user, &Rig::request(), &new_start()).await.expect("created").id;
    assert!(matches!(claim(id, "w1").await, Claim::Claimed(_)));
    let failed = Snapshot { detail: Some("no model".to_owned()), ..snapshot(StartStatus::Error) };
    let fail = async || tasks.fail(user, id, "w1", &failed).await;
    rig.lossy("fail", fail).await.expect("the store").expect("failed");
    fail().await.expect("the store").expect_err("failed before");
    assert_eq!(rig.unfinished().await, 0);
    let record = tasks.get(user, id).await.expect("the store").expect("it");
    assert_eq!((record.history.len(), record.step()), (2, StartStatus::Working));
    let change = || StartTaskStore::detail(&record, "no model\na sandbox is left");
    let release = async || tasks.release(user, id, "w1", Time::now(), change()).await;
    rig.lossy("release", release).await.expect("the store").expect("released");
    let Claim::Failed(record) = claim(id, "w2").await else { panic!("not claimed") };
    assert_eq!(record.now.detail.as_deref(), Some("no model\na sandbox is left"));
    assert_eq!(record.history.last(), Some(&record.now));
    assert!(!tasks.remove_failed(user, &record).await.expect("the store"), "what it made is not undone yet");
    let compensated = async || tasks.compensated(user, id, "w2", Change::default()).await;
    rig.lossy("compensated", compensated).await.expect("the store").expect("compensated");
    assert!(matches!(claim(id, "w3").await, Claim::Finished));
    let record = tasks.get(user, id).await.expect("the store").expect("it");
    assert!(rig.lossy("remove", async || tasks.remove_failed(user, &record).await).await.expect("the store"));
    assert!(tasks.remove_failed(user, &record).await.expect("the store"));
    assert_eq!(tasks.count(user, &Filter::default()).await.expect("a count"), 0);
    assert!(matches!(claim(id, "w3").await, Claim::Unknown));

    // Without the lease, which another worker holds: it cannot write any more, and what it made is undone after the lease.
    let id = tasks.create(user, &Rig::request(), &new_start()).await.expect("created").id;
    assert!(matches!(claim(id, "w1").await, Claim::Claimed(_)));
    rig.proxy.arm(2, Stop::LoseResponses(1));
    let Abandoned::Now { free_at, .. } = tasks.abandon(user, id, "no more").await.expect("the store") else {
        panic!("ended")
    };
    rig.proxy.disarm();
    assert!(free_at > Time::now());
    assert!(matches!(tasks.abandon(user, id, "again").await.expect("the store"), Abandoned::Before(_)));
    assert!(matches!(claim(id, "w2").await, Claim::Held));
    tasks.renew(user, id, "w1", LEASE).await.expect("the store").expect_err("revoked");
    tasks.save(user, id, "w1", &Change::default().note("late")).await.expect("the store").expect_err("revoked");
    assert_eq!(tasks.get(user, id).await.expect("the store").expect("it").history.len(), 2);
    assert_eq!(rig.unfinished().await, 0);
    assert!(matches!(tasks.abandon(user, Uuid::new_v4(), "x").await.expect("the store"), Abandoned::Unknown));
    rig.engines.shutdown().await;
}

/// Other versions of the worker write the same two attributes and no other.
#[tokio::test]
async fn a_lease_on_a_row_of_an_earlier_version_is_respected_and_expires() {
    let rig = Rig::start().await;
    let id = rig.tasks.create(&rig.user, &Rig::request(), &new_start()).await.expect("created").id;
    let table = Table::new(rig.dynamodb.clone(), rig.names.start_tasks.clone());
    let row = format!("{}#lease", id.simple());
    let key = Item::from([("user".into(), text(rig.user.as_str())), ("id".into(), text(row))]);
    let held = async |until: Time| {
        let lease = Update::new().set("lease_owner", text("old")).set("lease_until", text(until.sortable()));
        assert!(table.apply(key.clone(), lease).await.expect("the store"));
        rig.tasks.claim(&rig.user, id, "new", LEASE, None).await.expect("the store")
    };
    assert!(matches!(held(Time::now().plus(LEASE)).await, Claim::Held));
    let saved = rig.tasks.save(&rig.user, id, "old", &Change::default().note("a note")).await;
    saved.expect("the store").expect("its owner writes");
    assert!(matches!(held(Time::now().minus(LEASE)).await, Claim::Claimed(_)));
    rig.engines.shutdown().await;
}

#[tokio::test]
async fn a_message_is_added_once_and_its_queue_is_worked_on_under_one_lease() {
    let rig = Rig::start().await;
    let (user, store, conversation) = (&rig.user, &rig.messages, Uuid::new_v4());
    let ids: Vec<Uuid> = (0..3).map(|_| Uuid::new_v4()).collect();
    let due = Time::now();
    for (index, (id, lost)) in ids.iter().zip([1, 2, SDK_ATTEMPTS]).enumerate() {
        let append = async || store.append(user, conversation, None, *id, "[]".to_owned(), due).await;
        let added = rig.faulty("append", Stop::LoseResponses(lost), append).await.expect("the store");
        assert_eq!(added, Some(index + 1), "{lost} lost responses");
    }
    let claim = async || store.claim(user, conversation, LEASE, None).await;
    let (lease, queue) = rig.lossy("claim", claim).await.expect("the store").expect("the lease");
    assert_eq!(queue.messages.iter().map(|message| message.id).collect::<Vec<_>>(), ids);
    assert!(claim().await.expect("the store").is_none(), "another worker has it");

    let sending = Sending { message: ids[0].simple().to_string(), after: None, since: Time::now() };
    assert!(rig.lossy("begin", async || store.begin(user, conversation, &lease, &sending).await).await.expect("begun"));
    let mut left = queue;
    for id in &ids {
        let first = left.messages[0].clone();
        assert_eq!(first.id, *id);
        let arrived = async || store.arrived(user, conversation, &lease, &left, &first).await;
        left = rig.lossy("arrived", arrived).await.expect("the store").expect("the rest");
    }
    assert!(left.messages.is_empty());
    let newest = left.newest.as_deref();

    let refused = async || store.refused(user, conversation, &lease, newest, 1, due).await;
    assert!(rig.lossy("refused", refused).await.expect("the store"));
    let (lease, queue) = claim().await.expect("the store").expect("released");
    assert_eq!(queue.refusals, 1);
    let give_up = async || store.give_up(user, conversation, &lease, newest).await;
    assert!(rig.lossy("give_up", give_up).await.expect("the store"));
    let (lease, _) = claim().await.expect("the store").expect("released");
    rig.lossy("postpone", async || store.postpone(user, conversation, &lease, 3, due).await).await.expect("postponed");
    let (lease, queue) = claim().await.expect("the store").expect("released");
    assert_eq!(queue.attempts, 3);
    assert!(rig.lossy("end", async || store.end(user, conversation, &lease).await).await.expect("the store"));
    assert!(claim().await.expect("the store").is_none());
    // An attempt may take effect after a repeated one has, and after its message was delivered.
    for id in &ids {
        store
            .append(user, conversation, None, *id, "[]".to_owned(), due)
            .await
            .expect("the store")
            .expect("added before");
    }
    assert!(claim().await.expect("the store").is_none(), "no message is there again");
    rig.engines.shutdown().await;
}

#[tokio::test]
async fn a_message_that_was_not_added_is_reported() {
    let rig = Rig::start().await;
    let conversation = Uuid::new_v4();
    let append =
        async || rig.messages.append(&rig.user, conversation, None, Uuid::new_v4(), "[]".to_owned(), Time::now()).await;
    rig.proxy.arm(1, Stop::Refuse);
    append().await.expect_err("refused");
    rig.proxy.disarm();
    for position in 1..=10 {
        assert_eq!(append().await.expect("the store"), Some(position));
    }
    assert_eq!(append().await.expect("the store"), None, "the queue is full");
    rig.engines.shutdown().await;
}

#[tokio::test]
async fn conversations_are_recorded_changed_and_deleted_once() {
    let rig = Rig::start().await;
    let (user, store, id) = (&rig.user, &rig.conversations, Uuid::new_v4());
    let record = Rig::record(id);
    let count = async || store.count(user, &ConversationFilter::default()).await.expect("a count");
    let key = SecretString::from("k");
    let sandbox = rig.sandboxes.new_record(&rig.user, "s", "spec", &key).await.expect("a record");
    rig.sandboxes.create(sandbox, None).await.expect("stored").expect("a record");
    let membership = || rig.sandboxes.adding(&rig.user, "s", record.id).expect("a write");
    let put = async || store.put_stub(&record, "2025-01-01T00:00:00", membership()).await;
    assert!(rig.lossy("put_stub", put).await.expect("the store"));
    assert!(!put().await.expect("the store"), "the id is taken");
    assert_eq!(count().await, 1);

    let change = ConversationChange::default().public(Some(true));
    let updated = rig.lossy("update", async || store.update(user, id, change.clone()).await).await;
    assert_eq!(updated.expect("the store").expect("the record").public, Some(true));
    let stats = AgentStats::read(&json!({"usage_to_metrics": {"agent": {"accumulated_cost": 2.5}}}), None);
    let stats = stats.expect("stats");
    let time = ReportTime::Snapshot("2025-01-01T00:00:01".to_owned());
    assert!(
        rig.lossy("set_stats", async || store.set_stats(user, id, &stats, &time, Touch::Now).await)
            .await
            .expect("the store")
    );
    let old = ReportTime::Snapshot("2024-01-01T00:00:01".to_owned());
    assert!(!store.set_stats(user, id, &stats, &old, Touch::Now).await.expect("the store"));
    rig.lossy("title", async || store.set_agent_title(user, id, "a title").await).await.expect("the store");
    let claim = async |from: Option<&str>, to: &str| store.move_processed_to(user, id, from, to).await;
    assert!(rig.lossy("processed_to", async || claim(None, "1").await).await.expect("the store"));
    assert!(rig.lossy("processed_to", async || claim(Some("1"), "2").await).await.expect("the store"));
    assert!(!claim(Some("1"), "2").await.expect("the store"), "another worker has claimed them");
    let Lookup::Present(found) = store.lookup(user, id).await.expect("the store") else { panic!("absent") };
    assert_eq!(found.record.title.as_deref(), Some("a title"));
    assert!((found.record.metrics.accumulated_cost - 2.5).abs() < 1e-9);

    let records = std::slice::from_ref(&found.record);
    let begin = async || store.begin_deletion(user, records, Time::now()).await;
    assert!(rig.lossy("begin_deletion", begin).await.expect("the store"));
    assert!(!begin().await.expect("the store"));
    assert_eq!(count().await, 0);
    let take = async || store.take_deletion(user, id, Time::now()).await;
    assert!(rig.lossy("take_deletion", take).await.expect("the store").is_some());
    rig.lossy("end_deletion", async || store.end_deletion(user, id).await).await.expect("the store");
    // Its tombstone.
    assert_eq!(store.lookup(user, id).await.expect("the store"), Lookup::Deleting);
    rig.engines.shutdown().await;
}

#[tokio::test]
async fn keys_settings_and_sandboxes_are_written_once() {
    let rig = Rig::start().await;
    let user = &rig.user;
    for (number, lost) in [(1, 1), (2, SDK_ATTEMPTS)] {
        let create = async || rig.api_keys.create(user, "ci").await;
        let (key, secret) = rig.faulty("create a key", Stop::LoseResponses(lost), create).await.expect("created");
        assert_eq!(rig.api_keys.list(user).await.expect("the store").len(), number);
        assert_eq!(rig.api_keys.owner(&secret).await.expect("the store").as_ref(), Some(user));
        if number == 2 {
            rig.proxy.arm(2, Stop::LoseResponses(1));
            assert!(rig.api_keys.revoke(user, key.id).await.expect("the store"), "{:?}", rig.proxy.calls());
            rig.proxy.disarm();
            assert_eq!(rig.api_keys.owner(&secret).await.expect("the store"), None);
        }
    }
    for (name, lost) in [("A", 1), ("B", 1), ("C", SDK_ATTEMPTS)] {
        let change = SecretChange { name: name.to_owned(), value: Some("v".to_owned()), description: None };
        let put = async || rig.settings.change(user, |document| document.put_secret(&change)).await;
        let is_new = rig.faulty("settings PutItem", Stop::LoseResponses(lost), put).await.expect("written");
        assert!(is_new, "the change was applied once");
    }
    let delete = async || rig.settings.change(user, |document| document.delete_secret("A")).await;
    rig.lossy("settings PutItem", delete).await.expect("deleted");
    delete().await.expect_err("there is none any more");

    let key = SecretString::from("k");
    let record = rig.sandboxes.new_record(user, "s", "spec", &key).await.expect("a record");
    let stored = rig.lossy("create", async || rig.sandboxes.create(record.clone(), None).await).await.expect("stored");
    assert_eq!(stored.expect("a record").session_key_hash, record.session_key_hash);
    let pause = async || rig.sandboxes.set_desired(user, "s", Desired::Paused).await;
    assert!(rig.lossy("set_desired", pause).await.expect("the store"));
    let delete = async || rig.sandboxes.mark_deleted(user, "s").await;
    assert!(rig.lossy("mark_deleted", delete).await.expect("the store"));
    assert!(!delete().await.expect("the store"), "it is marked already");
    assert!(!pause().await.expect("the store"), "it is being deleted");
    rig.engines.shutdown().await;
}

const CONFLICT: &str = r#"{"__type":"com.amazonaws.dynamodb.v20120810#TransactionCanceledException","Message":"cancelled",
    "CancellationReasons":[{"Code":"None"},{"Code":"TransactionConflict"}]}"#;
const THROTTLED_ITEM: &str = r#"{"__type":"com.amazonaws.dynamodb.v20120810#TransactionCanceledException","Message":"cancelled",
    "CancellationReasons":[{"Code":"ThrottlingError"},{"Code":"None"}]}"#;
const NO_CAPACITY: &str = r#"{"__type":"com.amazonaws.dynamodb.v20120810#TransactionCanceledException","Message":"cancelled",
    "CancellationReasons":[{"Code":"ProvisionedThroughputExceeded"},{"Code":"TransactionConflict"}]}"#;
const INVALID: &str = r#"{"__type":"com.amazonaws.dynamodb.v20120810#TransactionCanceledException","Message":"cancelled",
    "CancellationReasons":[{"Code":"ValidationError"},{"Code":"TransactionConflict"}]}"#;
const IN_PROGRESS: &str =
    r#"{"__type":"com.amazonaws.dynamodb.v20120810#TransactionInProgressException","Message":"in progress"}"#;
const THROTTLED: &str = r#"{"__type":"com.amazonaws.dynamodb.v20120810#ThrottlingException","message":"slow down"}"#;
const OVER_LIMIT: &str = r#"{"__type":"com.amazonaws.dynamodb.v20120810#RequestLimitExceeded","message":"slow down"}"#;
const COLLISION: &str =
    r#"{"__type":"com.amazonaws.dynamodb.v20120810#TransactionConflictException","message":"a transaction"}"#;

#[tokio::test]
async fn a_transaction_is_repeated_where_that_helps() {
    let rig = Rig::start().await;
    let table = rig.scratch();
    let writes = || {
        let add = Update::new().add("count", 1).in_transaction(&table.name, rig.key("counter")).expect("a write");
        let put = table.put_in_transaction(rig.key(&Uuid::new_v4().to_string()), &Condition::Missing("kind"));
        vec![put.expect("a write"), add]
    };
    let count = async || table.get(rig.key("counter")).await.expect("the store").expect("it")["count"].clone();
    let faults = [CONFLICT, THROTTLED_ITEM, NO_CAPACITY, IN_PROGRESS, THROTTLED, OVER_LIMIT];
    for (done, fault) in faults.iter().enumerate() {
        let write = async || transact(&rig.dynamodb, writes(), "a test").await;
        let written = rig.faulty("transact", Stop::Respond(fault), write).await;
        assert_eq!(written.expect(fault), Transacted::Written);
        assert_eq!(count().await, number(u32::try_from(done + 1).expect("few")), "{fault}");
    }
    // The repetition of one that was written writes nothing, whether the SDK repeats it or this code does.
    let lost = rig.lossy("transact", async || transact(&rig.dynamodb, writes(), "a test").await).await;
    assert_eq!(lost.expect("the store"), Transacted::Written);
    assert_eq!(count().await, number(7));
    // Nothing changes what is not valid, or a condition that does not hold.
    let write = async || transact(&rig.dynamodb, writes(), "a test").await;
    let error = rig.faulty("transact", Stop::Respond(INVALID), write).await.expect_err("invalid");
    assert!(error.context().starts_with("a test: TransactionCanceledException"), "{}", error.context());
    assert_eq!(rig.proxy.calls().len(), 1);
    let taken = table.put_in_transaction(rig.key("counter"), &Condition::Missing("kind")).expect("a write");
    let other = table.put_in_transaction(rig.key("other"), &Condition::Missing("kind")).expect("a write");
    rig.proxy.arm(usize::MAX, Stop::Refuse);
    let failed = transact(&rig.dynamodb, vec![other, taken], "a test").await.expect("the store");
    assert_eq!(failed, Transacted::ConditionFailed(vec![Cancellation::None, Cancellation::ConditionFailed]));
    assert_eq!(rig.proxy.calls().len(), 1);
    assert_eq!(count().await, number(7));
    rig.engines.shutdown().await;
}

#[tokio::test]
async fn a_single_write_that_collides_with_a_transaction_is_repeated() {
    let rig = Rig::start().await;
    let table = rig.scratch();
    let key = || rig.key("row");
    let collide = Stop::Respond(COLLISION);
    let put = async || table.put(rig.key("row"), Condition::Missing("kind")).await;
    assert!(rig.faulty("put", collide, put).await.expect("the store"));
    let add = async || table.update(key(), Update::new().add("count", 1)).await;
    let Outcome::Applied(item) = rig.faulty("update", collide, add).await.expect("the store") else { panic!("failed") };
    assert_eq!(item["count"], number(1));
    let failed = table.update(key(), Update::new().add("count", 1).condition(Condition::Missing("count"))).await;
    let Outcome::ConditionFailed(Some(found)) = failed.expect("the store") else { panic!("applied") };
    assert_eq!(found["count"], number(1));
    let once = async || table.update_once(key(), Update::new().add("count", 1)).await;
    let Outcome::Applied(item) = rig.lossy("update_once", once).await.expect("the store") else { panic!("failed") };
    assert_eq!(item["count"], number(2));
    let delete = async || table.delete(key(), Condition::Exists("count")).await;
    assert!(rig.faulty("delete", collide, delete).await.expect("the store").is_ok());
    assert_eq!(delete().await.expect("the store"), Err(None));
    rig.engines.shutdown().await;
}
