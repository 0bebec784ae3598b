//! The product on AWS with its faults: indexes that lag, throttled calls, colliding transactions, lost responses. Each test
//! runs with every fault alone, and with all together. What a run prints names its faults and their seed.

use std::time::Duration;

use axum::body::Body;
use futures::stream::{self, StreamExt as _};
use http::Request;
use serde_json::{Value, json};
use shared::config::SandboxConfig;
use shared::dynamo::INDEX_LAG;
use shared::event::store::EventFilter;
use shared::pending_message::delivery::Addressee;
use shared::user::UserId;
use tempfile::TempDir;
use uuid::Uuid;

use crate::deletion::{self, assert_nothing_left, everything, long_message};
use crate::pending_messages;
use crate::support::api::Api;
use crate::support::fault_proxy::{Moment, Stop};
use crate::support::hostile_aws::AwsFaults;
use crate::support::lagging_indexes::seeded;
use crate::support::log::all_events;
use crate::support::worker_harness::{WorkerHarness, quick};

/// Repeats a call as its client does after a 5xx.
async fn repeated<T, E: std::fmt::Debug>(mut call: impl AsyncFnMut() -> Result<T, E>) -> T {
    let mut last = None;
    for _ in 0..12 {
        match call().await {
            Ok(done) => return done,
            Err(error) => last = Some(error),
        }
    }
    panic!("a call fails again and again: {last:?}");
}

fn print(faults: AwsFaults, harness: &WorkerHarness) {
    println!("{faults:?}: {:?}", harness.hostile.counted());
}

async fn start(faults: AwsFaults) {
    let harness = WorkerHarness::start_on(quick(), faults).await;
    let task = harness.begin(&long_message()).await;
    harness.drive(task.id).await;
    print(faults, &harness);
    harness.assert_one(task.id, 1, &format!("{faults:?}")).await;
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_creates_everything_exactly_once() {
    for seed in [1, 2] {
        for faults in AwsFaults::each(seed) {
            start(faults).await;
        }
    }
}

/// Workers die at some calls, while other calls fail.
async fn start_with_crashes(faults: AwsFaults) {
    let harness = WorkerHarness::start_on(quick(), faults).await;
    let task = harness.begin(&long_message()).await;
    for crash in 0..3 {
        let moment = if seeded(faults.seed, &("moment", crash)) % 2 == 0 { Moment::Before } else { Moment::After };
        let call = seeded(faults.seed, &("call", crash)) % 20 + 1;
        harness.crash_at(task.id, usize::try_from(call).expect("small"), Stop::Hang(moment)).await;
    }
    harness.drive(task.id).await;
    print(faults, &harness);
    harness.assert_one(task.id, 1, &format!("{faults:?}")).await;
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_creates_everything_exactly_once_although_workers_die() {
    stream::iter(20..28).for_each_concurrent(4, |seed| start_with_crashes(AwsFaults::all(seed))).await;
}

async fn messages(faults: AwsFaults) {
    let harness = WorkerHarness::start_on(quick(), faults).await;
    let (_, conversation) = pending_messages::ready(&harness).await;
    let long = "x".repeat(30_000);
    let expected = ["first", "one", long.as_str(), "three"];
    for said in &expected[1..] {
        let to = Addressee::Conversation(conversation);
        pending_messages::keep(&harness, to, said).await.expect("kept");
    }
    pending_messages::drive_until_delivered(&harness, conversation, &expected, &format!("{faults:?}")).await;
    print(faults, &harness);
    harness.settle().await;
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_arrive_once_and_in_order() {
    for faults in AwsFaults::each(3) {
        messages(faults).await;
    }
}

async fn delete(faults: AwsFaults) {
    let case = format!("{faults:?}");
    let harness = WorkerHarness::start_on(quick(), faults).await;
    let parent = deletion::conversation(&harness, long_message()).await;
    let child = deletion::conversation(&harness, json!({"parent_conversation_id": parent.conversation_id})).await;
    let other = deletion::conversation(&harness, long_message()).await;
    harness.hostile.catch_up().await;
    let deleter = &harness.context.deletion.deleter;
    repeated(async || deleter.delete(&harness.user, parent.conversation_id).await).await;
    deletion::settle(&harness).await;
    print(faults, &harness);
    harness.hostile.catch_up().await;
    for gone in [&parent, &child] {
        assert_nothing_left(&harness, gone, &case).await;
    }
    let sandbox = parent.now.sandbox_id.as_ref().expect("a sandbox");
    assert!(harness.sandboxes.made()[sandbox].deleted, "{case}: no conversation uses the sandbox any more");
    assert!(!harness.sandboxes.made()[other.now.sandbox_id.as_ref().expect("a sandbox")].deleted, "{case}");
    assert_eq!(harness.conversations.count(&harness.user, &everything()).await.expect("a count"), 1, "{case}");
    let events = &harness.other_worker.deletion.events;
    let left = events.count(&harness.user, other.conversation_id, &EventFilter::default()).await;
    assert_eq!(left.expect("a count"), 2, "{case}");
    assert_eq!(harness.objects().await.len(), 2, "{case}: the other one's request and large event");
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_under_load_removes_everything_and_no_more() {
    for seed in [4, 5] {
        delete(AwsFaults::throttling(seed)).await;
        delete(AwsFaults::losing_responses(seed)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_on_lagging_indexes_removes_everything_and_no_more() {
    // Indexes that catch up long after the worker has finished.
    let lag = Duration::from_secs(3600);
    for seed in [30, 31] {
        delete(AwsFaults { lag, ..AwsFaults::lagging(seed) }).await;
    }
}

/// A sub-conversation that is not in the indexes yet.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_includes_a_sub_conversation_that_was_just_made() {
    let harness = WorkerHarness::start_on(quick(), AwsFaults { lag: INDEX_LAG, ..AwsFaults::lagging(50) }).await;
    let parent = deletion::conversation(&harness, json!({})).await;
    let child = deletion::conversation(&harness, json!({"parent_conversation_id": parent.conversation_id})).await;
    harness.context.deletion.deleter.delete(&harness.user, parent.conversation_id).await.expect("deleted");
    deletion::settle(&harness).await;
    harness.hostile.catch_up().await;
    for gone in [&parent, &child] {
        assert_nothing_left(&harness, gone, "just made").await;
    }
    harness.finish().await;
}

const SANDBOX: &str = "6osgGulToTzNONWACSWMZh";

/// Posts as the sandbox; an agent server sends what failed again.
async fn post(api: &Api, path: &str, body: &Value) {
    repeated(async || {
        let request = Request::post(format!("/api/v1/webhooks/{path}"))
            .header("content-type", "application/json")
            .header("x-session-api-key", SANDBOX)
            .body(Body::from(body.to_string()));
        match api.send(request.expect("a request")).await {
            (200, _) => Ok(()),
            // The record of a sandbox is found in an index.
            (401, refused) => {
                tokio::time::sleep(Duration::from_millis(200)).await;
                Err(refused)
            }
            (500.., failed) => Err(failed),
            (status, refused) => panic!("{status} {refused}"),
        }
    })
    .await;
}

async fn ingest(faults: AwsFaults) {
    let (folder, user, id) = (TempDir::new().expect("a folder"), UserId::local(), Uuid::new_v4());
    let api = Api::with_faults(folder.path(), SandboxConfig::None, faults).await;
    let sandboxes = api.stores.sandboxes();
    let record = sandboxes.new_record(&user, SANDBOX, "spec", &SANDBOX.into()).await.expect("a record");
    sandboxes.create(record, None).await.expect("stored");
    let snapshot = json!({"id": id, "title": "Mine", "execution_status": "idle", "updated_at": "2026-01-01T00:00:00"});
    post(&api, "conversations", &snapshot).await;
    let event = |number: u64| {
        json!({"id": format!("event-{number}"), "timestamp": format!("2026-01-01T00:00:{number:02}"),
            "kind": "ConversationStateUpdateEvent", "source": "environment", "key": "stats",
            "value": {"usage_to_metrics": {"agent": {"accumulated_cost": number}}}})
    };
    for batch in 0..6 {
        let events: Vec<Value> = (batch * 4..batch * 4 + 4).map(event).collect();
        post(&api, &format!("events/{id}"), &json!(events)).await;
    }
    // A batch of earlier events is sent again.
    post(&api, &format!("events/{id}"), &json!([event(2), event(3)])).await;
    println!("{faults:?}: {:?}", api.hostile.counted());
    api.hostile.catch_up().await;
    let record = api.stores.conversations().get(&user, id).await.expect("the store").expect("a record");
    assert_eq!(record.title.as_deref(), Some("Mine"), "{faults:?}");
    assert!((record.metrics.accumulated_cost - 23.0).abs() < 1e-9, "{faults:?}: {:?}", record.metrics);
    assert_eq!(api.stores.conversations().count(&user, &everything()).await.expect("a count"), 1, "{faults:?}");
    let stored: Vec<String> =
        all_events(&api.stores.events(), &user, id).await.into_iter().map(|event| event.id).collect();
    assert_eq!(stored, (0..24).map(|number| format!("event-{number}")).collect::<Vec<_>>(), "{faults:?}");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn webhooks_are_applied_once() {
    for seed in [9, 10] {
        for faults in AwsFaults::each(seed) {
            ingest(faults).await;
        }
    }
}
