//! The creation of starts and their end: limits, counters, idempotency keys, cancellation, and what becomes of failed starts.

use std::collections::HashSet;
use std::time::Duration;

use axum::body::Body;
use futures::future::join_all;
use http::{Request, header};
use http_body_util::BodyExt as _;
use local::options::TargetOptions;
use local::recount;
use local::target::Target;
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::config::{SandboxConfig, StartConfig};
use shared::conversation::search::Filter as ConversationFilter;
use shared::dynamo::{Item, Table, Update, number, text};
use shared::error::Error;
use shared::http::caller::Caller;
use shared::sandbox::SandboxStatus;
use shared::start::cancel::CANCELLED;
use shared::start::identity::StartIdentity;
use shared::start::request::StartRequest;
use shared::start::store::{Change, Claim, Filter, NewStart};
use shared::start::task::{PendingCommand, StartStatus};
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::counters::{Counter, read};
use tempfile::TempDir;

use crate::support::account;
use crate::support::api::Api;
use crate::support::conflict_proxy::ConflictProxy;
use crate::support::engines::Engines;
use crate::support::meter::Meter;
use crate::support::seed;
use crate::support::stand_in_agent::{Fault, Kind, Nth};
use crate::support::wait::wait_until;
use crate::support::worker_harness::{WorkerHarness, quick};

const STARTS: &str = "/api/v1/app-conversations";

fn body(title: &str) -> Value {
    json!({"title": title})
}

/// Sends a start with an idempotency key. Returns the status and the body.
async fn start_with_key(api: &Api, user: &UserId, path: &str, key: &str, body: &Value) -> (u16, Value) {
    let request = Request::post(format!("{STARTS}{path}"))
        .extension(Caller(user.clone()))
        .header(header::CONTENT_TYPE, "application/json")
        .header("Idempotency-Key", key)
        .body(Body::from(body.to_string()))
        .expect("a request");
    api.send(request).await
}

async fn cancel(api: &Api, user: &UserId, task: &str) -> (u16, Value) {
    api.call(user, "DELETE", &format!("{STARTS}/start-tasks/{task}"), None).await
}

async fn task(api: &Api, user: &UserId, task: &str) -> Value {
    let (status, mut tasks) = api.get(user, "/start-tasks", &[("ids", task.to_owned())]).await;
    assert_eq!(status, 200, "{tasks}");
    tasks[0].take()
}

fn id_of(task: &Value) -> String {
    task["id"].as_str().expect("an id").to_owned()
}

fn new_start() -> NewStart {
    NewStart {
        identity: StartIdentity::random(),
        deadline: shared::Time::now(),
        max_unfinished: 500,
        membership: None,
        trace: None,
    }
}

async fn count(api: &Api, user: &UserId, counter: Counter) -> u64 {
    let users = Table::new(api.aws.dynamodb.clone(), api.names.users.clone());
    read(&users, user, counter).await.expect("a count")
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_simultaneous_starts_of_one_user_are_all_created() {
    const STARTS_AT_ONCE: usize = 200;
    let folder = TempDir::new().expect("a folder");
    let mut api = Api::at(folder.path(), SandboxConfig::None).await;
    let proxy = ConflictProxy::default();
    let way = proxy.to(&api.dynamodb()).await;
    api.use_dynamodb_at(&way.url()).await;
    let user = UserId::new("busy");
    let answers = join_all(
        (0..STARTS_AT_ONCE).map(async |number| api.call(&user, "POST", STARTS, Some(&body(&number.to_string()))).await),
    )
    .await;
    let failed: Vec<&(u16, Value)> = answers.iter().filter(|(status, _)| *status != 200).collect();
    assert!(failed.is_empty(), "{} failed: {:?}", failed.len(), failed.first());
    assert!(proxy.conflicts() > 0, "the transactions never met");
    let expected = STARTS_AT_ONCE as u64;
    assert_eq!(api.get(&user, "/start-tasks/count", &[]).await, (200, json!(expected)));
    assert_eq!(count(&api, &user, Counter::UnfinishedStarts).await, expected);
    drop(way);
    api.stop().await;
}

#[tokio::test]
async fn starts_beyond_the_limit_are_refused_until_others_have_ended() {
    let harness = WorkerHarness::start(StartConfig { max_unfinished_starts: 1, ..quick() }).await;
    // Each of the items that share the limit admits one start.
    let mut begun = Vec::new();
    let refused = loop {
        match harness.try_to_begin(&body("one of many")).await {
            Ok(task) => begun.push(task.id),
            Err(error) => break error,
        }
    };
    assert!(matches!(refused, Error::Saturated { .. }), "{refused:?}");
    assert!((1..=8).contains(&begun.len()), "{begun:?}");
    assert_eq!(harness.count(Counter::UnfinishedStarts).await, begun.len() as u64);
    assert_eq!(harness.tasks.count(&harness.user, &Filter::default()).await.expect("a count"), begun.len() as u64);
    // One ends with ERROR, the others are READY.
    harness.agent.inject(Fault::new(
        "POST /api/conversations",
        Nth::Next,
        Kind::Status(422, r#"{"detail":"no such tool"}"#.into()),
    ));
    let mut failed = 0;
    for task in &begun {
        failed += usize::from(harness.drive(*task).await.now.status == StartStatus::Error);
    }
    assert_eq!(failed, 1);
    assert_eq!(harness.count(Counter::UnfinishedStarts).await, 0);
    let again = harness.begin(&body("another")).await;
    assert_eq!(harness.drive(again.id).await.now.status, StartStatus::Ready);
    harness.finish().await;
}

#[tokio::test]
async fn a_refused_start_says_when_to_retry_and_leaves_nothing() {
    let folder = TempDir::new().expect("a folder");
    let mut api = Api::at(folder.path(), SandboxConfig::None).await;
    api.configure_starts(|config| config.max_unfinished_starts = 1);
    let user = UserId::new("busy");
    let long = json!({"initial_message": {"content": [{"type": "text", "text": "x".repeat(20_000)}]}});
    let mut created = 0;
    let refused = loop {
        let request = Request::post(STARTS)
            .extension(Caller(user.clone()))
            .header(header::CONTENT_TYPE, "application/json")
            .body(Body::from(long.to_string()));
        let response = api.response(request.expect("a request")).await;
        if response.status() != 200 {
            break response;
        }
        created += 1;
    };
    assert_eq!((refused.status().as_u16(), refused.headers()["retry-after"].as_bytes()), (429, &b"10"[..]));
    let refused = refused.into_body().collect().await.expect("a body").to_bytes();
    assert!(String::from_utf8_lossy(&refused).contains("too many unfinished starts"), "{refused:?}");
    let objects = api.aws.s3.list_objects_v2().bucket(&api.names.bucket).prefix("start-requests/").send().await;
    assert_eq!(objects.expect("a list").contents().len(), created, "the request of a refused start is not kept");
    assert_eq!(count(&api, &user, Counter::StartTasks).await, created as u64);
    // Other users are not affected.
    assert_eq!(api.call(&UserId::new("other"), "POST", STARTS, Some(&body("mine"))).await.0, 200);
    api.stop().await;
}

#[tokio::test]
async fn a_repeated_key_returns_the_first_start() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let [user, other] = ["one", "two"].map(UserId::new);
    let (status, first) = start_with_key(&api, &user, "", "key-1", &body("a")).await;
    assert_eq!(status, 200, "{first}");
    assert_eq!(start_with_key(&api, &user, "", "key-1", &body("a")).await, (200, first.clone()));
    let (status, refused) = start_with_key(&api, &user, "", "key-1", &body("b")).await;
    assert_eq!(status, 409);
    assert!(refused["detail"].as_str().expect("a detail").contains("Idempotency-Key"), "{refused}");
    let (status, of_other) = start_with_key(&api, &other, "", "key-1", &body("b")).await;
    assert_eq!(status, 200);
    assert_ne!(of_other["id"], first["id"]);
    for invalid in ["", "two words", &"k".repeat(256)] {
        assert_eq!(start_with_key(&api, &user, "", invalid, &body("a")).await.0, 400, "{invalid}");
    }
    // A start without a key is never a repetition.
    let (_, plain) = api.call(&user, "POST", STARTS, Some(&body("a"))).await;
    assert_ne!(plain["id"], first["id"]);
    assert_eq!(count(&api, &user, Counter::StartTasks).await, 2);

    // Concurrent repetitions, whose requests are objects: one creates the task, and its request is its own.
    let long = |number: usize| json!({"title": number.to_string(), "initial_message": {"content": [{"type": "text", "text": "x".repeat(20_000)}]}});
    let same = join_all((0..8).map(async |_| start_with_key(&api, &user, "", "key-2", &long(0)).await)).await;
    let ids: HashSet<String> = same
        .iter()
        .map(|(status, task)| {
            assert_eq!(*status, 200, "{task}");
            id_of(task)
        })
        .collect();
    assert_eq!(ids.len(), 1);
    let different =
        join_all((0..8).map(async |number| start_with_key(&api, &user, "", "key-3", &long(number)).await)).await;
    let created: Vec<&Value> = different.iter().filter(|(status, _)| *status == 200).map(|(_, task)| task).collect();
    assert!(different.iter().all(|(status, _)| [200, 409].contains(status)), "{different:?}");
    assert_eq!(created.len(), 1);
    assert_eq!(task(&api, &user, &id_of(created[0])).await["request"], created[0]["request"]);
    let objects = api.aws.s3.list_objects_v2().bucket(&api.names.bucket).prefix("start-requests/").send().await;
    assert_eq!(objects.expect("a list").contents().len(), 2, "of each key one request is kept");

    // The stream of a repetition is that of the first start.
    api.work().await;
    let (status, streamed) = start_with_key(&api, &user, "/stream-start", "key-1", &body("a")).await;
    assert_eq!(status, 200);
    let streamed = streamed.as_array().expect("an array");
    assert!(streamed.iter().all(|state| state["id"] == first["id"]), "{streamed:?}");
    assert_eq!(streamed.last().expect("a state")["status"], "ERROR", "this deployment has no sandboxes");
    api.stop().await;
}

#[tokio::test]
async fn a_cancelled_start_ends_and_can_then_be_removed() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let [user, other] = ["one", "two"].map(UserId::new);
    let (_, begun) = api.call(&user, "POST", STARTS, Some(&body("a"))).await;
    let id = id_of(&begun);
    assert_eq!(cancel(&api, &other, &id).await, (404, json!({"detail": "Start not found"})));
    assert_eq!(cancel(&api, &user, "no-uuid").await.0, 422);
    // The repetition of a request whose response was lost changes nothing while the start is being undone.
    for _ in 0..2 {
        assert_eq!(cancel(&api, &user, &id).await, (200, json!({"success": true})));
        let ended = task(&api, &user, &id).await;
        assert_eq!((&ended["status"], &ended["detail"]), (&json!("ERROR"), &json!(CANCELLED)));
    }
    assert_eq!(count(&api, &user, Counter::UnfinishedStarts).await, 0);
    assert_eq!(count(&api, &user, Counter::StartTasks).await, 1);
    api.work().await;
    assert_eq!(task(&api, &user, &id).await["detail"], CANCELLED, "no worker has continued the start");
    assert_eq!(cancel(&api, &user, &id).await, (200, json!({"success": true})));
    assert_eq!(task(&api, &user, &id).await, Value::Null);
    assert_eq!(cancel(&api, &user, &id).await.0, 404);
    assert_eq!(count(&api, &user, Counter::StartTasks).await, 0);
    api.stop().await;
}

/// The worker holds the lease, and may still make something until it notices. What it made is undone after that.
#[tokio::test(flavor = "multi_thread")]
async fn a_start_is_cancelled_while_a_worker_continues_it() {
    let harness = WorkerHarness::start(quick()).await;
    *harness.sandboxes.begins_as.lock().expect("status") = SandboxStatus::Starting;
    let begun = harness.begin(&body("a")).await;
    let delivered = harness.receive().await.expect("a message");
    let cancelled = async {
        wait_until("the sandbox is created", Duration::from_secs(60), async || !harness.sandboxes.made().is_empty())
            .await;
        harness.cancel(begun.id).await.expect("cancelled");
        harness.cancel(begun.id).await.expect("a repetition");
        let ended = harness.task(begun.id).await;
        assert_eq!((ended.now.status, ended.now.detail.as_deref()), (StartStatus::Error, Some(CANCELLED)));
    };
    tokio::join!(harness.handle(&delivered), cancelled);
    harness.undone(begun.id).await;
    let ended = harness.task(begun.id).await;
    assert_eq!((ended.now.status, ended.now.detail.as_deref()), (StartStatus::Error, Some(CANCELLED)));
    assert!(harness.sandboxes.made().values().all(|made| made.deleted), "{:?}", harness.sandboxes.made());
    assert_eq!(harness.count(Counter::UnfinishedStarts).await, 0);
    // A start that is READY is not cancelled.
    *harness.sandboxes.begins_as.lock().expect("status") = SandboxStatus::Running;
    let ready = harness.begin(&body("b")).await;
    let ready = harness.drive(ready.id).await;
    let conversation = shared::id::dashed(ready.conversation_id);
    match harness.cancel(ready.id).await {
        Err(Error::Conflict(text)) => assert!(text.contains(&conversation), "{text}"),
        other => panic!("{other:?}"),
    }
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_failed_start_made_is_removed_however_often_that_fails() {
    let harness = WorkerHarness::start(quick()).await;
    let refusal = Kind::Status(422, r#"{"detail":"no such tool"}"#.into());
    harness.agent.inject(Fault::new("POST /api/conversations", Nth::Always, refusal));
    harness.sandboxes.fail_deletions(2);
    let begun = harness.begin(&body("a")).await;
    let failed = harness.drive(begun.id).await;
    let detail = failed.now.detail.expect("a detail");
    assert!(detail.contains("no such tool"), "{detail}");
    assert_eq!(harness.count(Counter::UnfinishedStarts).await, 0);
    assert!(harness.sandboxes.made().values().any(|made| !made.deleted), "its provider does not respond");
    // The job of the next attempt is lost: the sweep enqueues it.
    harness.purge().await;
    harness.undone(begun.id).await;
    let undone = harness.task(begun.id).await;
    let detail = undone.now.detail.clone().expect("a detail");
    assert!(detail.contains("no such tool") && !detail.contains("removed"), "{detail}");
    assert_eq!(undone.history.last(), Some(&undone.now));
    assert!(harness.sandboxes.made().values().all(|made| made.deleted));
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_abandoned_start_made_is_removed() {
    let harness = WorkerHarness::start(StartConfig { inline_wait: Duration::ZERO, ..quick() }).await;
    *harness.sandboxes.begins_as.lock().expect("status") = SandboxStatus::Starting;
    let begun = harness.begin(&body("a")).await;
    let first = harness.receive().await.expect("a message");
    harness.handle(&first).await;
    assert_eq!(harness.sandboxes.made().len(), 1);
    harness.bury(&first).await;
    let ended = harness.task(begun.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    assert!(ended.now.detail.expect("a detail").contains("could not be started after several attempts"));
    assert_eq!(harness.count(Counter::UnfinishedStarts).await, 0);
    harness.undone(begun.id).await;
    assert!(harness.sandboxes.made().values().all(|made| made.deleted));
    harness.finish().await;
}

#[tokio::test]
async fn a_failed_start_is_removed_when_it_has_expired() {
    let harness = WorkerHarness::start(quick()).await;
    let long = json!({"initial_message": {"content": [{"type": "text", "text": "x".repeat(20_000)}]}});
    let begun = harness.begin(&long).await;
    let message = harness.receive().await.expect("a message");
    harness.bury(&message).await;
    harness.undone(begun.id).await;
    assert_eq!(harness.sweep_starts().await, 0, "it is kept for a while");
    assert_eq!(harness.objects().await.len(), 1);
    harness.expire(begun.id).await;
    assert_eq!(harness.sweep_starts().await, 1);
    harness.settle().await;
    assert!(harness.tasks.get(&harness.user, begun.id).await.expect("the store").is_none());
    assert_eq!(harness.count(Counter::StartTasks).await, 0);
    assert_eq!(harness.objects().await, [""; 0]);
    assert_eq!(harness.sweep_starts().await, 0);
    harness.finish().await;
}

/// The request and the history of a start are not rewritten, in the table and in the indexes of lists, while a worker waits for it.
#[tokio::test]
async fn a_wait_writes_only_the_lease_row() {
    let folder = TempDir::new().expect("a folder");
    let engines = Engines::start(folder.path()).await;
    let aws = Aws::new(&engines.sdk_config().await);
    let names = engines.names("metered-");
    schema::make_all(&aws, &names, "metered-").await.expect("a schema");
    let meter = Meter::new();
    let way = meter.to(&engines).await;
    let sdk = engines.network_sdk_config().await;
    let dynamodb = aws_sdk_dynamodb::config::Builder::from(&sdk).endpoint_url(way.url()).build();
    let aws = Aws { dynamodb: aws_sdk_dynamodb::Client::from_conf(dynamodb), ..aws };
    let tasks = Stores::new(&names, &aws, &shared::user::seal::Sealer::ephemeral()).start_tasks();
    let user = UserId::new("user");
    let text = "x".repeat(6000);
    let long = json!({"initial_message": {"content": [{"type": "text", "text": text}]}}).to_string();
    let request = StartRequest::from_body(Some("application/json"), long.as_bytes()).expect("a request");
    let id = tasks.create(&user, &request, &new_start()).await.expect("created").id;
    meter.take();
    let lease = Duration::from_secs(60);
    assert!(matches!(tasks.claim(&user, id, "w", lease, None).await.expect("the store"), Claim::Claimed(_)));
    tasks.renew(&user, id, "w", lease).await.expect("the store").expect("renewed");
    let command = PendingCommand { name: "clone".to_owned(), id: "c".to_owned(), ..PendingCommand::default() };
    let change = Change::default().command(&command).expect("a change");
    tasks.release(&user, id, "w", shared::Time::now(), change).await.expect("the store").expect("released");
    let spent = meter.take();
    // One unit for the row and two for its entry of the index, which moves, for each of the three writes.
    let written = spent["UpdateItem"];
    assert!(written.requests == 3 && written.units <= 9.0, "{spent:?}");
    engines.shutdown().await;
}

#[tokio::test]
async fn wrong_counters_are_computed_again_from_the_rows() {
    let folder = TempDir::new().expect("a folder");
    let user = UserId::local();
    let options = TargetOptions::default();
    let target = Target::open(&options, folder.path()).await.expect("a data folder");
    let sealer = shared::user::seal::Sealer::ephemeral();
    let stores = Stores::new(&target.names, &target.aws, &sealer);
    seed::load(&stores, &user, (0..40).map(account::conversation)).await;
    let all = ConversationFilter { include_sub_conversations: true, ..ConversationFilter::default() };
    let top_level = ConversationFilter::default();
    let counts = async |stores: &Stores| {
        let conversations = stores.conversations();
        (
            conversations.count(&user, &all).await.expect("a count"),
            conversations.count(&user, &top_level).await.expect("a count"),
            stores.start_tasks().count(&user, &Filter::default()).await.expect("a count"),
        )
    };
    let right = counts(&stores).await;
    assert_eq!(right.0, 40);
    stores.start_tasks().create(&user, &StartRequest::default(), &new_start()).await.expect("created");
    let users = Table::new(target.aws.dynamodb.clone(), target.names.users.clone());
    // The item of earlier versions counts as well, until it is replaced.
    for kind in ["counters", "counters#3"] {
        let key = Item::from([("user".into(), text(user.as_str())), ("kind".into(), text(kind))]);
        let wrong = Update::new().set("conversations", number(1000)).set("unfinished_starts", number(7));
        assert!(users.apply(key, wrong).await.expect("the store"));
    }
    assert!(counts(&stores).await.0 >= 2000);
    target.close().await;

    let printed = recount::run(&options, folder.path()).await.expect("recounted");
    let starts = right.2 + 1;
    let expected =
        format!("{} conversations, {} of them top-level; {starts} starts, 1 of them unfinished\n", right.0, right.1);
    assert_eq!(printed, expected);
    let target = Target::open(&options, folder.path()).await.expect("a data folder");
    let stores = Stores::new(&target.names, &target.aws, &sealer);
    assert_eq!(counts(&stores).await, (right.0, right.1, starts));
    let users = Table::new(target.aws.dynamodb.clone(), target.names.users.clone());
    assert_eq!(read(&users, &user, Counter::UnfinishedStarts).await.expect("a count"), 1);
    target.close().await;
}
