//! Webhook routes: session keys and ownership, validation, storage of events, and no acknowledgement before everything
//! is stored.

use futures::future::join_all;
use local::options::{CommonOptions, SandboxKind};
use local::server::{Environment, Server};
use reqwest::Client;
use secrecy::SecretString;
use serde_json::{Value, json};
use shared::Time;
use shared::aws::Aws;
use shared::config::{Config, ExportConfig, Names, SandboxConfig, SealingConfig, StartConfig};
use shared::conversation::ConversationRecord;
use shared::conversation::search::Filter;
use shared::conversation::store::ConversationStore;
use shared::event::store::{Event, EventStore};
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tempfile::TempDir;
use tower::ServiceExt as _;
use uuid::Uuid;

use crate::support::engines::Engines;
use crate::support::fault_proxy::{FaultProxy, Stop};
use crate::support::hostile_aws::retries;
use crate::support::log::all_events;

const KEY: &str = "session-key-of-one";
const OTHER_KEY: &str = "session-key-of-another";
const INSTANCE_KEY: &str = "key-of-the-instance";

/// A user with two sandboxes.
struct Owner {
    user: UserId,
    conversations: ConversationStore,
    events: EventStore,
}

impl Owner {
    async fn new(aws: &Aws, names: &Names, sealer: &Sealer, user: UserId) -> Self {
        let sandboxes = Stores::new(names, aws, sealer).sandboxes();
        for (id, key) in [("one", KEY), ("another", OTHER_KEY)] {
            let record = sandboxes.new_record(&user, id, "spec", &SecretString::from(key)).await.expect("a record");
            sandboxes.create(record, None).await.expect("stored");
        }
        Self {
            user,
            conversations: Stores::without_key(names, aws).conversations(),
            events: Stores::without_key(names, aws).events(),
        }
    }

    async fn has_conversation(&self, id: Uuid, sandbox: &str) {
        let now = Time::now();
        let record = ConversationRecord {
            user: self.user.clone(),
            id,
            sandbox_id: sandbox.to_owned(),
            selected_repository: None,
            selected_branch: None,
            git_provider: None,
            title: None,
            trigger: None,
            pr_number: Vec::new(),
            llm_model: None,
            metrics: shared::conversation::MetricsSnapshot::default(),
            parent_conversation_id: None,
            public: None,
            tags: shared::conversation::tags::Tags::default(),
            agent_kind: "openhands".to_owned(),
            acp_server: None,
            launched_agent_profile: None,
            created_at: now,
            updated_at: now,
        };
        assert_eq!(self.conversations.import(&self.user, &[record]).await.expect("stored"), [true]);
    }

    async fn events_of(&self, conversation: Uuid) -> Vec<Event> {
        all_events(&self.events, &self.user, conversation).await
    }
}

/// The whole server, with a session API key for all other routes.
struct Fixture {
    server: Server,
    http: Client,
    owner: Owner,
    _folder: TempDir,
}

impl Fixture {
    async fn start() -> Self {
        let folder = TempDir::new().expect("a folder");
        let options = CommonOptions::on(folder.path().join("data"), SandboxKind::None);
        let environment =
            Environment { session_api_key: Some(INSTANCE_KEY.to_owned().into()), ..Environment::default() };
        let server = Server::start(&options, environment, true, None).await.expect("the server starts");
        let SealingConfig::File(key) = &server.config.sealing else { panic!("a key file") };
        let sealer = Sealer::from_file(key).expect("the sealing key");
        let owner = Owner::new(&server.aws, &server.config.names, &sealer, UserId::local()).await;
        Self { server, http: Client::builder().no_proxy().build().expect("a client"), owner, _folder: folder }
    }

    async fn post(&self, path: &str, key: Option<&str>, body: impl Into<reqwest::Body>) -> (u16, Value) {
        let url = format!("http://{}/api/v1/webhooks/{path}", self.server.address);
        let mut request = self.http.post(url).header("content-type", "application/json").body(body);
        if let Some(key) = key {
            request = request.header("X-Session-API-Key", key);
        }
        let answer = request.send().await.expect("an answer");
        assert!(answer.headers().contains_key("cache-control"), "webhook responses have the common headers");
        (answer.status().as_u16(), answer.json().await.expect("JSON"))
    }

    async fn post_events(&self, conversation: Uuid, events: &Value) -> (u16, Value) {
        self.post(&format!("events/{}", conversation.simple()), Some(KEY), events.to_string()).await
    }
}

fn event(number: usize) -> Value {
    json!({"id": format!("event-{number}"), "timestamp": format!("2025-01-01T00:00:{number:02}"), "source": "agent",
        "kind": "MessageEvent"})
}

fn success() -> (u16, Value) {
    (200, json!({"success": true}))
}

fn refused(text: &str) -> (u16, Value) {
    (401, json!({"detail": text}))
}

#[tokio::test]
async fn only_a_sandbox_may_post_webhooks_and_only_for_its_own_conversations() {
    let fixture = Fixture::start().await;
    let (own, foreign, unknown) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4());
    fixture.owner.has_conversation(own, "one").await;
    fixture.owner.has_conversation(foreign, "another").await;
    let batch = json!([event(1)]).to_string();
    for (id, expected) in [(own, success()), (unknown, success()), (foreign, refused("Unauthorized"))] {
        let events = format!("events/{id}");
        let said = json!({"id": id, "execution_status": "running"}).to_string();
        for (path, body) in [(events.as_str(), &batch), ("conversations", &said)] {
            // The caller is authenticated before the body is validated.
            for body in [body.as_str(), "nonsense"] {
                let missing = refused("X-Session-API-Key header is required");
                assert_eq!(fixture.post(path, None, body.to_owned()).await, missing, "{path}");
                assert_eq!(fixture.post(path, Some(""), body.to_owned()).await, missing, "{path}");
                for key in ["unknown", INSTANCE_KEY] {
                    let answer = fixture.post(path, Some(key), body.to_owned()).await;
                    assert_eq!(answer, refused("Invalid session API key"), "{path}");
                }
            }
            assert_eq!(fixture.post(path, Some(KEY), body.clone()).await, expected, "{path}");
        }
        let kept = fixture.owner.events_of(id).await.len();
        assert_eq!(kept, usize::from(expected.0 == 200));
    }
    // A report of an unknown conversation created its record; a report of a deletion changes nothing.
    let deleting = json!({"id": own, "execution_status": "deleting"}).to_string();
    assert_eq!(fixture.post("conversations", Some(KEY), deleting).await, success());
    assert_eq!(fixture.owner.conversations.count(&fixture.owner.user, &Filter::default()).await.expect("a count"), 3);
    // The session key is accepted only by webhooks, and their paths have no other methods.
    let url = format!("http://{}/api/v1", fixture.server.address);
    let get = async |path: &str| {
        fixture
            .http
            .get(format!("{url}{path}"))
            .header("X-Session-API-Key", KEY)
            .send()
            .await
            .expect("an answer")
            .status()
    };
    assert_eq!(get("/app-conversations/search").await, 401);
    assert_eq!(get("/webhooks/conversations").await, 405);
    assert_eq!(get("/webhooks/nothing").await, 404);
    fixture.server.shutdown().await;
}

#[tokio::test]
async fn events_are_stored_unchanged_and_once() {
    let fixture = Fixture::start().await;
    let id = Uuid::new_v4();
    // More events than DynamoDB accepts in one write, in mixed order, one of them twice.
    let mut batch: Vec<Value> = (0..30).rev().map(event).collect();
    batch.push(event(7));
    let batch = Value::Array(batch);
    let answers = join_all((0..5).map(|_| fixture.post_events(id, &batch))).await;
    assert!(answers.iter().all(|answer| *answer == success()), "{answers:?}");
    assert_eq!(fixture.post_events(id, &json!([])).await, success());
    let ids = async || fixture.owner.events_of(id).await.into_iter().map(|event| event.id).collect::<Vec<_>>();
    let thirty: Vec<String> = (0..30).map(|number| format!("event-{number}")).collect();
    assert_eq!(ids().await, thirty);
    assert_eq!(fixture.post_events(id, &json!([event(29), event(30)])).await, success());
    assert_eq!(ids().await.len(), 31);

    // Byte for byte, whatever the content.
    let other = Uuid::new_v4();
    let sent = r#"{"timestamp":"2025-01-01T00:00:00.5", "kind":"UnknownKindEvent","more":[1.10, 1e2,123456789012345678901234567890],
        "text":"\u00e9é", "id":"strange"}"#;
    let large = json!({"id": "large", "timestamp": "2025-01-01T00:00:01", "kind": "ObservationEvent",
        "text": "é".repeat(250_000)})
    .to_string();
    assert!(large.len() > 500_000);
    let path = format!("events/{other}");
    for _ in 0..2 {
        assert_eq!(fixture.post(&path, Some(KEY), format!("[{sent} , {large}]")).await, success());
    }
    let kept = fixture.owner.events_of(other).await;
    assert_eq!(kept.iter().map(|event| event.json.as_str()).collect::<Vec<_>>(), [sent, large.as_str()]);
    assert_eq!(kept[0].kind, "UnknownKindEvent");
    // The large event is in the bucket, under a key that is also a valid file name.
    let objects = fixture.server.aws.s3.list_objects_v2().bucket(&fixture.server.config.names.bucket).prefix("events/");
    let objects = objects.send().await.expect("a list").contents.unwrap_or_default();
    let [object] = objects.as_slice() else { panic!("one object: {objects:?}") };
    let key = object.key().expect("a key");
    assert!(key.starts_with(&format!("events/{}/", other.simple())) && key.len() < 145, "{key}");
    fixture.server.shutdown().await;
}

#[tokio::test]
async fn invalid_bodies_are_refused_with_every_violation() {
    let fixture = Fixture::start().await;
    let id = Uuid::new_v4();
    let events = format!("events/{id}");
    let long = "x".repeat(1024);
    for (path, body, faults) in [
        ("conversations", "", vec![("missing", json!(["body"]))]),
        ("conversations", "[]", vec![("model_attributes_type", json!(["body"]))]),
        ("conversations", "{}", vec![("missing", json!(["body", "id"]))]),
        ("conversations", r#"{"id": "x"}"#, vec![("uuid_parsing", json!(["body", "id"]))]),
        (events.as_str(), "", vec![("missing", json!(["body"]))]),
        (&events, "[", vec![("json_invalid", json!(["body", 1]))]),
        (&events, "{}", vec![("list_type", json!(["body"]))]),
        (
            &events,
            &json!([event(1), 3, {"id": 4, "kind": "K"}]).to_string(),
            vec![
                ("model_attributes_type", json!(["body", 1])),
                ("string_type", json!(["body", 2, "id"])),
                ("missing", json!(["body", 2, "timestamp"])),
            ],
        ),
        (
            &events,
            &json!([{"id": long, "timestamp": "2025", "kind": "K"}]).to_string(),
            vec![("value_error", json!(["body", 0]))],
        ),
        (
            "events/nothing",
            "{}",
            vec![("uuid_parsing", json!(["path", "conversation_id"])), ("list_type", json!(["body"]))],
        ),
        ("events/%FF", "[]", vec![("uuid_parsing", json!(["path", "conversation_id"]))]),
    ] {
        let (status, answer) = fixture.post(path, Some(KEY), body.to_owned()).await;
        let violations: Vec<(&str, Value)> = answer["detail"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|fault| (fault["type"].as_str().unwrap_or_default(), fault["loc"].clone()))
            .collect();
        assert_eq!((status, violations), (422, faults), "{path} {body}: {answer}");
    }
    assert_eq!(fixture.owner.events_of(id).await, [], "a batch is stored as a whole or not at all");
    fixture.server.shutdown().await;
}

#[tokio::test]
async fn webhook_is_not_acknowledged_if_the_store_fails() {
    let folder = TempDir::new().expect("a folder");
    let engines = Engines::start(folder.path()).await;
    let sdk = engines.sdk_config().await;
    let aws = Aws::new(&sdk);
    let mut names = engines.names("webhooks-");
    let queues = schema::make_all(&aws, &names, "webhooks-").await.expect("a schema");
    names.job_queue_url = queues.jobs;
    let sealing_key_file = folder.path().join("sealing-key");
    let sealer = Sealer::from_file(&sealing_key_file).expect("a key");
    let owner = Owner::new(&aws, &names, &sealer, UserId::new("user-one")).await;
    let gate = FaultProxy::new();
    let way = gate.to(&engines.dynamodb).await;
    let network = engines.network_sdk_config().await;
    let gated = Aws {
        dynamodb: aws_sdk_dynamodb::Client::from_conf(
            aws_sdk_dynamodb::config::Builder::from(&network)
                .endpoint_url(way.url())
                .retry_partition(retries())
                .build(),
        ),
        ..aws.clone()
    };
    let config = Config {
        start: StartConfig::default(),
        sandbox: SandboxConfig::None,
        names,
        sealing: SealingConfig::File(sealing_key_file),
        single_user: false,
        live_status_budget: std::time::Duration::from_secs(1),
        sandbox_request_budget: std::time::Duration::from_secs(2),
        sandbox_idle_limit: None,
        address_policy: shared::http_client::AddressPolicy::Any,
        export: ExportConfig::default(),
    };
    let router = events::webhooks_router(events::Context::new(&config, &gated, &sealer));
    let id = Uuid::new_v4();
    let mut batch: Vec<Value> = (0..29).map(event).collect();
    batch.push(json!({"id": "stats", "timestamp": "2025-01-01T00:00:29", "kind": "ConversationStateUpdateEvent",
        "key": "stats", "value": {"usage_to_metrics": {"agent": {"accumulated_cost": 1.5}}}}));
    let batch = Value::Array(batch).to_string();
    owner.has_conversation(id, "one").await;
    let post = async || {
        let request = http::Request::post(format!("/api/v1/webhooks/events/{id}"))
            .header("x-session-api-key", KEY)
            .header("content-type", "application/json")
            .body(axum::body::Body::from(batch.clone()))
            .expect("a request");
        router.clone().oneshot(request).await.expect("an answer").status().as_u16()
    };
    let cost = async || owner.conversations.get(&owner.user, id).await.expect("the store").expect("it").metrics;
    // Two lookups, two writes of which the first has 25 events, and then the updates that follow from them.
    for (call, kept) in [(1, 0), (2, 0), (3, 0), (4, 25), (5, 30), (6, 30)] {
        gate.arm(call, Stop::Refuse);
        assert_eq!(post().await, 503, "{:?}", gate.calls());
        assert_eq!(owner.events_of(id).await.len(), kept, "{:?}", gate.calls());
    }
    assert!(cost().await.accumulated_cost.abs() < 1e-9);
    gate.arm(7, Stop::Refuse);
    assert_eq!(post().await, 200, "{:?}", gate.calls());
    assert_eq!(gate.calls(), ["Query", "GetItem", "BatchWriteItem", "BatchWriteItem", "PutItem", "UpdateItem"]);
    assert_eq!(owner.events_of(id).await.len(), 30);
    assert!((cost().await.accumulated_cost - 1.5).abs() < 1e-9);
    drop(way);
    engines.shutdown().await;
}
