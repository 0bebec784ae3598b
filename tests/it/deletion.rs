//! Deleting conversations: gone at once for their user, and in the end nothing is left, wherever a worker crashes.

use std::time::Duration;

use serde_json::json;
use shared::Time;
use shared::conversation::search::Filter;
use shared::event::store::{Event, EventFilter};
use shared::start::task::{StartStatus, StartTaskRecord};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::support::fault_proxy::{Moment, Stop};
use crate::support::worker_harness::{WorkerHarness, quick};

/// A READY conversation with two events, of which one is in the bucket.
async fn conversation(rig: &WorkerHarness, body: serde_json::Value) -> StartTaskRecord {
    let task = rig.begin(&body).await;
    let ready = rig.drive(task.id).await;
    assert_eq!(ready.now.status, StartStatus::Ready, "{:?}", ready.now.detail);
    let event = |id: &str, size: usize| Event {
        id: id.to_owned(),
        timestamp: "2025-01-01T00:00:00".to_owned(),
        kind: "MessageEvent".to_owned(),
        json: json!({"id": id, "timestamp": "2025-01-01T00:00:00", "kind": "MessageEvent", "text": "x".repeat(size)})
            .to_string(),
    };
    let events = vec![event("small", 10), event("large", 400_000)];
    rig.context.deletion.events.append(&rig.user, ready.conversation_id, events).await.expect("stored");
    ready
}

/// A message too long to be kept in the row of its task.
fn long_message() -> serde_json::Value {
    json!({"initial_message": {"content": [{"type": "text", "text": "long ".repeat(4000)}]}})
}

fn everything() -> Filter {
    Filter { include_sub_conversations: true, ..Filter::default() }
}

/// Fails if anything of the conversation is left but what another one shares with it.
async fn assert_nothing_left(rig: &WorkerHarness, started: &StartTaskRecord, case: &str) {
    let id = started.conversation_id;
    assert!(rig.conversations.get(&rig.user, id).await.expect("the store").is_none(), "{case}: the record");
    let row = rig.conversations.take_deletion(&rig.user, id, Time::now()).await.expect("the store");
    assert!(row.is_none(), "{case}: the row");
    assert!(rig.tasks.get(&rig.user, started.id).await.expect("the store").is_none(), "{case}: its task");
    let events = &rig.context.deletion.events;
    assert_eq!(events.count(&rig.user, id, &EventFilter::default()).await.expect("a count"), 0, "{case}: events");
    // The copy of its agent server goes by itself or with the sandbox.
    let sandbox = &rig.sandboxes.made()[started.now.sandbox_id.as_ref().expect("a sandbox")];
    let copied = rig.agent.conversations().iter().any(|known| known.id == id);
    assert!(sandbox.deleted || !copied, "{case}: the agent server's copy");
}

/// Works until the queue and the index of deletions are empty.
async fn settle(rig: &WorkerHarness) {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        while let Some(message) = rig.receive().await {
            rig.handle(&message).await;
        }
        if rig.conversations.deletions().due(Time::now()).await.0.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "a deletion is left");
        rig.sweep().await;
    }
}

#[tokio::test]
async fn a_deleted_conversation_is_gone_at_once_and_then_with_all_that_belongs_to_it() {
    let rig = WorkerHarness::start(quick()).await;
    let parent = conversation(&rig, long_message()).await;
    let child = conversation(&rig, json!({"parent_conversation_id": parent.conversation_id})).await;
    let other = conversation(&rig, long_message()).await;
    assert_eq!(rig.conversations.count(&rig.user, &everything()).await.expect("a count"), 3);
    let sandbox = parent.now.sandbox_id.clone().expect("a sandbox");
    assert_eq!(child.now.sandbox_id.as_ref(), Some(&sandbox));

    let deleter = &rig.context.deletion.deleter;
    assert!(deleter.delete(&rig.user, parent.conversation_id).await.expect("deleted"));
    for gone in [&parent, &child] {
        assert!(rig.conversations.get(&rig.user, gone.conversation_id).await.expect("the store").is_none());
        assert!(!deleter.delete(&rig.user, gone.conversation_id).await.expect("nothing"), "it does not exist any more");
    }
    assert_eq!(rig.conversations.count(&rig.user, &everything()).await.expect("a count"), 1);
    assert_eq!(rig.conversations.count(&rig.user, &Filter::default()).await.expect("a count"), 1);
    assert!(!rig.sandboxes.made()[&sandbox].deleted, "that is the worker's business");

    settle(&rig).await;
    for gone in [&parent, &child] {
        assert_nothing_left(&rig, gone, "deleted").await;
    }
    assert!(rig.sandboxes.made()[&sandbox].deleted, "nobody uses it any more");
    // The other one has everything that it had.
    let id = other.conversation_id;
    assert!(rig.conversations.get(&rig.user, id).await.expect("the store").is_some());
    assert_eq!(rig.tasks.count(&rig.user, &shared::start::store::Filter::default()).await.expect("a count"), 1);
    assert!(rig.tasks.get(&rig.user, other.id).await.expect("the store, and its request in the bucket").is_some());
    let events = &rig.context.deletion.events;
    assert_eq!(events.count(&rig.user, id, &EventFilter::default()).await.expect("a count"), 2);
    assert!(!rig.sandboxes.made()[other.now.sandbox_id.as_ref().expect("a sandbox")].deleted);
    assert_eq!(rig.objects().await.len(), 2, "the other one's request and large event");
    rig.finish().await;
}

#[tokio::test]
async fn a_sandbox_stays_while_another_conversation_or_a_start_needs_it() {
    let rig = WorkerHarness::start(quick()).await;
    let first = conversation(&rig, json!({})).await;
    let sandbox = first.now.sandbox_id.clone().expect("a sandbox");
    let second = conversation(&rig, json!({"sandbox_id": sandbox})).await;
    let deleter = &rig.context.deletion.deleter;
    deleter.delete(&rig.user, first.conversation_id).await.expect("deleted");
    settle(&rig).await;
    assert_nothing_left(&rig, &first, "the first").await;
    assert!(!rig.sandboxes.made()[&sandbox].deleted);

    // A start that has chosen the sandbox and is not finished: its bell is not heard yet.
    let third = rig.begin(&json!({"sandbox_id": sandbox})).await;
    let bell = rig.receive().await.expect("a message");
    let chosen = async {
        while rig.task(third.id).await.now.sandbox_id.is_none() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = rig.handle(&bell) => {}
        () = chosen => {}
    }
    rig.delete(&bell).await;
    deleter.delete(&rig.user, second.conversation_id).await.expect("deleted");
    let deletion = rig.receive().await.expect("a message");
    rig.handle(&deletion).await;
    assert!(!rig.sandboxes.made()[&sandbox].deleted, "a start is on its way into it");
    let ready = rig.drive(third.id).await;
    assert_eq!(ready.now.status, StartStatus::Ready, "{:?}", ready.now.detail);
    rig.finish().await;
}

#[tokio::test]
async fn a_lost_message_is_rung_again() {
    let rig = WorkerHarness::start(quick()).await;
    let started = conversation(&rig, json!({})).await;
    rig.context.deletion.deleter.delete(&rig.user, started.conversation_id).await.expect("deleted");
    rig.purge().await;
    let deadline = Instant::now() + Duration::from_secs(20);
    let message = loop {
        rig.sweep().await;
        if let Some(message) = rig.receive().await {
            break message;
        }
        assert!(Instant::now() < deadline, "nobody rang");
    };
    rig.handle(&message).await;
    assert_nothing_left(&rig, &started, "rung again").await;
    rig.finish().await;
}

/// Crashes a worker at each of its calls in turn, and delivers the message again.
async fn crash_everywhere(moment: Moment) {
    let rig = WorkerHarness::start(quick()).await;
    let mut calls = 0;
    for call in 1.. {
        let started = conversation(&rig, long_message()).await;
        let case = format!("a crash {moment:?} call {call}");
        rig.context.deletion.deleter.delete(&rig.user, started.conversation_id).await.expect("deleted");
        let message = rig.receive().await.expect("a message");
        rig.gate.arm(call, Stop::Hang(moment));
        let (context, event) = (rig.context.clone(), WorkerHarness::event(&message));
        let mut worker = tokio::spawn(async move { worker::handle(&context, event).await });
        let crashed = tokio::select! {
            handled = &mut worker => {
                assert!(handled.expect("no panic").expect("handled").batch_item_failures.is_empty(), "{case}");
                false
            }
            () = rig.gate.reached() => {
                worker.abort();
                true
            }
        };
        calls = rig.gate.calls().len();
        rig.gate.disarm();
        rig.handle(&message).await;
        assert_nothing_left(&rig, &started, &case).await;
        let sandbox = started.now.sandbox_id.expect("a sandbox");
        assert!(rig.sandboxes.made()[&sandbox].deleted, "{case}: its sandbox");
        assert_eq!(rig.conversations.count(&rig.user, &everything()).await.expect("a count"), 0, "{case}");
        let tasks = rig.tasks.count(&rig.user, &shared::start::store::Filter::default()).await.expect("a count");
        assert_eq!(tasks, 0, "{case}: the count of tasks");
        assert_eq!(rig.objects().await, Vec::<String>::new(), "{case}: objects");
        if !crashed {
            break;
        }
    }
    assert!(calls > 8, "only {calls} calls");
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_before_any_call_leaves_nothing_behind() {
    crash_everywhere(Moment::Before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_after_any_call_leaves_nothing_behind() {
    crash_everywhere(Moment::After).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_delete_the_same_conversation_count_it_off_once() {
    let rig = WorkerHarness::start(quick()).await;
    let kept = conversation(&rig, json!({})).await;
    let started = conversation(&rig, json!({})).await;
    let deleter = &rig.context.deletion.deleter;
    let asked = (0..10).map(|_| deleter.delete(&rig.user, started.conversation_id));
    let answers: Vec<bool> =
        futures::future::join_all(asked).await.into_iter().map(|answer| answer.expect("an answer")).collect();
    assert_eq!(answers.iter().filter(|deleted| **deleted).count(), 1, "{answers:?}");
    assert_eq!(rig.conversations.count(&rig.user, &everything()).await.expect("a count"), 1);
    settle(&rig).await;
    assert_nothing_left(&rig, &started, "deleted by many").await;
    assert!(rig.conversations.get(&rig.user, kept.conversation_id).await.expect("the store").is_some());
    rig.finish().await;
}

#[tokio::test]
async fn a_large_family_goes_as_a_whole() {
    let rig = WorkerHarness::start(quick()).await;
    let parent = conversation(&rig, json!({})).await;
    let record = rig.conversations.get(&rig.user, parent.conversation_id).await.expect("the store").expect("a record");
    let child = |parent: Uuid| shared::conversation::ConversationRecord {
        id: Uuid::new_v4(),
        parent_conversation_id: Some(parent),
        ..record.clone()
    };
    let children: Vec<_> = (0..120).map(|_| child(record.id)).collect();
    let grandchild = child(children[0].id);
    for some in children.chunks(60).chain([[grandchild].as_slice()]) {
        rig.conversations.import(&rig.user, some).await.expect("stored");
    }
    assert_eq!(rig.conversations.count(&rig.user, &everything()).await.expect("a count"), 122);
    assert!(rig.context.deletion.deleter.delete(&rig.user, record.id).await.expect("deleted"));
    assert_eq!(rig.conversations.count(&rig.user, &everything()).await.expect("a count"), 0);
    settle(&rig).await;
    assert_nothing_left(&rig, &parent, "the parent").await;
    for child in children {
        assert!(rig.conversations.take_deletion(&rig.user, child.id, Time::now()).await.expect("the store").is_none());
    }
    rig.finish().await;
}
