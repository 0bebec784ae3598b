//! Deletion of conversations: immediate for the user, and complete in the end, whichever call a worker crashes at.

use std::time::Duration;

use serde_json::json;
use shared::Time;
use shared::conversation::search::Filter;
use shared::event::ingest::{ConversationReport, EventIngestor};
use shared::event::store::{Event, EventFilter};
use shared::jobs::delete_conversation::RETRY_AFTER_REQUEST;
use shared::start::task::{StartStatus, StartTaskRecord};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::support::fault_proxy::{Moment, Stop};
use crate::support::worker_harness::{WorkerHarness, quick};

/// A READY conversation with two events, one of them in the bucket.
pub async fn conversation(harness: &WorkerHarness, body: serde_json::Value) -> StartTaskRecord {
    let task = harness.begin(&body).await;
    let ready = harness.drive(task.id).await;
    assert_eq!(ready.now.status, StartStatus::Ready, "{:?}", ready.now.detail);
    let event = |id: &str, size: usize| Event {
        id: id.to_owned(),
        timestamp: "2025-01-01T00:00:00".to_owned(),
        kind: "MessageEvent".to_owned(),
        json: json!({"id": id, "timestamp": "2025-01-01T00:00:00", "kind": "MessageEvent", "text": "x".repeat(size)})
            .to_string(),
    };
    let events = vec![event("small", 10), event("large", 400_000)];
    harness.events().append(&harness.user, ready.conversation_id, events).await.expect("stored");
    ready
}

/// A message too long to be stored in the row of its task.
pub fn long_message() -> serde_json::Value {
    json!({"initial_message": {"content": [{"type": "text", "text": "long ".repeat(4000)}]}})
}

pub fn everything() -> Filter {
    Filter { include_sub_conversations: true, ..Filter::default() }
}

/// Asserts that nothing of the conversation is left, except what it shares with another one.
pub async fn assert_nothing_left(harness: &WorkerHarness, started: &StartTaskRecord, case: &str) {
    let id = started.conversation_id;
    assert!(harness.conversations.get(&harness.user, id).await.expect("the store").is_none(), "{case}: the record");
    let row = harness.conversations.take_deletion(&harness.user, id, Time::now()).await.expect("the store");
    assert!(row.is_none(), "{case}: the row");
    assert!(harness.tasks.get(&harness.user, started.id).await.expect("the store").is_none(), "{case}: its task");
    let events = &harness.other_worker.deletion.events;
    assert_eq!(events.count(&harness.user, id, &EventFilter::default()).await.expect("a count"), 0, "{case}: events");
    // The agent server's copy is removed by itself or with the sandbox.
    let sandbox = &harness.sandboxes.made()[started.now.sandbox_id.as_ref().expect("a sandbox")];
    let copied = harness.agent.conversations().iter().any(|known| known.id == id);
    assert!(sandbox.deleted || !copied, "{case}: the agent server's copy");
}

/// Handles jobs until the queue and the index of deletions are empty.
pub async fn settle(harness: &WorkerHarness) {
    let deadline = Instant::now() + Duration::from_secs(300);
    loop {
        while let Some(message) = harness.receive().await {
            harness.handle(&message).await;
        }
        let is_idle = harness.waiting_messages().await == 0;
        // A request whose response was lost has enqueued no job. The sweep enqueues it.
        let soon = Time::now().plus(RETRY_AFTER_REQUEST);
        if is_idle && harness.conversations.deletions().due(soon).await.0.is_empty() {
            return harness.settle_sandboxes().await;
        }
        assert!(Instant::now() < deadline, "a deletion is not finished");
        harness.sweep().await;
    }
}

#[tokio::test]
async fn deleted_conversation_is_hidden_at_once_and_later_removed_with_all_its_data() {
    let harness = WorkerHarness::start(quick()).await;
    let parent = conversation(&harness, long_message()).await;
    let child = conversation(&harness, json!({"parent_conversation_id": parent.conversation_id})).await;
    let other = conversation(&harness, long_message()).await;
    assert_eq!(harness.conversations.count(&harness.user, &everything()).await.expect("a count"), 3);
    let sandbox = parent.now.sandbox_id.clone().expect("a sandbox");
    assert_eq!(child.now.sandbox_id.as_ref(), Some(&sandbox));

    let deleter = &harness.context.deletion.deleter;
    assert!(deleter.delete(&harness.user, parent.conversation_id).await.expect("deleted"));
    for gone in [&parent, &child] {
        assert!(harness.conversations.get(&harness.user, gone.conversation_id).await.expect("the store").is_none());
        assert!(!deleter.delete(&harness.user, gone.conversation_id).await.expect("nothing"), "it no longer exists");
    }
    assert_eq!(harness.conversations.count(&harness.user, &everything()).await.expect("a count"), 1);
    assert_eq!(harness.conversations.count(&harness.user, &Filter::default()).await.expect("a count"), 1);
    assert!(!harness.sandboxes.made()[&sandbox].deleted, "only the worker deletes the sandbox");

    settle(&harness).await;
    for gone in [&parent, &child] {
        assert_nothing_left(&harness, gone, "deleted").await;
    }
    assert!(harness.sandboxes.made()[&sandbox].deleted, "no conversation uses it any more");
    // The other conversation is complete.
    let id = other.conversation_id;
    assert!(harness.conversations.get(&harness.user, id).await.expect("the store").is_some());
    assert_eq!(harness.tasks.count(&harness.user, &shared::start::store::Filter::default()).await.expect("a count"), 1);
    assert!(
        harness.tasks.get(&harness.user, other.id).await.expect("the store, and its request in the bucket").is_some()
    );
    let events = &harness.context.deletion.events;
    assert_eq!(events.count(&harness.user, id, &EventFilter::default()).await.expect("a count"), 2);
    assert!(!harness.sandboxes.made()[other.now.sandbox_id.as_ref().expect("a sandbox")].deleted);
    assert_eq!(harness.objects().await.len(), 2, "the other one's request and large event");
    harness.finish().await;
}

#[tokio::test]
async fn sandbox_is_kept_while_another_conversation_or_a_start_uses_it() {
    let harness = WorkerHarness::start(quick()).await;
    let first = conversation(&harness, json!({})).await;
    let sandbox = first.now.sandbox_id.clone().expect("a sandbox");
    let second = conversation(&harness, json!({"sandbox_id": sandbox})).await;
    let deleter = &harness.context.deletion.deleter;
    deleter.delete(&harness.user, first.conversation_id).await.expect("deleted");
    settle(&harness).await;
    assert_nothing_left(&harness, &first, "the first").await;
    assert!(!harness.sandboxes.made()[&sandbox].deleted);

    // A start that has chosen the sandbox and is not finished: its job has not been handled to the end.
    let third = harness.begin(&json!({"sandbox_id": sandbox})).await;
    let message = harness.receive().await.expect("a message");
    let chosen = async {
        while harness.task(third.id).await.now.sandbox_id.is_none() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = harness.handle(&message) => {}
        () = chosen => {}
    }
    harness.delete(&message).await;
    deleter.delete(&harness.user, second.conversation_id).await.expect("deleted");
    let deletion = harness.receive().await.expect("a message");
    harness.handle(&deletion).await;
    harness.settle_sandboxes().await;
    assert!(!harness.sandboxes.made()[&sandbox].deleted, "an unfinished start uses it");
    let ready = harness.drive(third.id).await;
    assert_eq!(ready.now.status, StartStatus::Ready, "{:?}", ready.now.detail);
    harness.finish().await;
}

#[tokio::test]
async fn lost_message_is_requeued_by_sweep() {
    let harness = WorkerHarness::start(quick()).await;
    let started = conversation(&harness, json!({})).await;
    harness.context.deletion.deleter.delete(&harness.user, started.conversation_id).await.expect("deleted");
    harness.purge().await;
    let deadline = Instant::now() + Duration::from_secs(60);
    let message = loop {
        harness.sweep().await;
        if let Some(message) = harness.receive().await {
            break message;
        }
        assert!(Instant::now() < deadline, "the sweep has not requeued the deletion");
    };
    harness.handle(&message).await;
    harness.settle_sandboxes().await;
    assert_nothing_left(&harness, &started, "requeued").await;
    harness.finish().await;
}

/// Stops each of a worker's calls in turn, and delivers the message again. A worker whose call hangs has crashed.
async fn stop_everywhere(stop: Stop) {
    let harness = WorkerHarness::start(quick()).await;
    let mut calls = 0;
    for call in 1.. {
        let started = conversation(&harness, long_message()).await;
        let case = format!("{stop:?} at call {call}");
        harness.context.deletion.deleter.delete(&harness.user, started.conversation_id).await.expect("deleted");
        let message = harness.receive().await.expect("a message");
        harness.gate.arm(call, stop);
        let (context, event) = (harness.context.clone(), WorkerHarness::event(&message));
        let mut worker = tokio::spawn(async move { worker::handle(&context, event).await });
        let hangs = async {
            harness.gate.reached().await;
            if !matches!(stop, Stop::Hang(_)) {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            handled = &mut worker => {
                assert!(handled.expect("no panic").expect("handled").batch_item_failures.is_empty(), "{case}");
            }
            () = hangs => worker.abort(),
        }
        let is_reached = harness.gate.is_reached();
        calls = harness.gate.calls().len();
        harness.gate.disarm();
        harness.handle(&message).await;
        harness.settle_sandboxes().await;
        assert_nothing_left(&harness, &started, &case).await;
        let sandbox = started.now.sandbox_id.expect("a sandbox");
        assert!(harness.sandboxes.made()[&sandbox].deleted, "{case}: its sandbox");
        assert_eq!(harness.conversations.count(&harness.user, &everything()).await.expect("a count"), 0, "{case}");
        let tasks =
            harness.tasks.count(&harness.user, &shared::start::store::Filter::default()).await.expect("a count");
        assert_eq!(tasks, 0, "{case}: the count of tasks");
        assert_eq!(harness.objects().await, Vec::<String>::new(), "{case}: objects");
        if !is_reached {
            break;
        }
    }
    assert!(calls > 8, "only {calls} calls");
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_before_any_call_still_removes_everything() {
    stop_everywhere(Stop::Hang(Moment::Before)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_after_any_call_still_removes_everything() {
    stop_everywhere(Stop::Hang(Moment::After)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lost_response_of_any_call_still_removes_everything() {
    stop_everywhere(Stop::LoseResponses(1)).await;
}

/// A sandbox that has another conversation goes on after the deletion of one, and may report that one late.
#[tokio::test]
async fn late_reports_do_not_bring_a_deleted_conversation_back() {
    let harness = WorkerHarness::start(quick()).await;
    let (user, conversations) = (&harness.user, &harness.conversations);
    let kept = conversation(&harness, json!({})).await;
    let sandbox = kept.now.sandbox_id.clone().expect("a sandbox");
    let gone = conversation(&harness, json!({"sandbox_id": sandbox})).await;
    let id = gone.conversation_id;
    let deleter = &harness.context.deletion.deleter;
    assert!(deleter.delete(user, id).await.expect("deleted"));
    settle(&harness).await;

    let ingestor = EventIngestor {
        conversations: conversations.clone(),
        events: harness.events(),
        sandboxes: harness.records.clone(),
        queue: harness.context.saga.queue.clone(),
    };
    let reporter = harness.records.get(user, &sandbox).await.expect("the store").expect("a record");
    let report = ConversationReport::read(id, &json!({"title": "Late", "updated_at": "2030-01-01T00:00:00Z"}));
    ingestor.ingest_report(&reporter, &report).await.expect("acknowledged");
    let lookup = ingestor.lookup(&reporter, id).await.expect("the store");
    let event = json!({"id": "late", "timestamp": "2030-01-01T00:00:00", "kind": "MessageEvent"});
    let event = Event {
        id: "late".to_owned(),
        timestamp: "2030-01-01T00:00:00".to_owned(),
        kind: "MessageEvent".to_owned(),
        json: event.to_string(),
    };
    ingestor.ingest_events(&reporter, id, &lookup, vec![event]).await.expect("acknowledged");
    assert_nothing_left(&harness, &gone, "after late reports").await;
    assert_eq!(conversations.count(user, &everything()).await.expect("a count"), 1);
    let record = harness.records.get(user, &sandbox).await.expect("the store").expect("a record");
    assert_eq!(record.conversations.len(), 1, "{record:?}");

    // A client may use the id again: while the tombstone is there, when it has expired, and when it is gone.
    for round in 0..3 {
        if round > 0 {
            harness.expire_tombstone(id).await;
        }
        if round == 2 {
            // A write that took effect after the deletion.
            let late = Event {
                id: "later".to_owned(),
                timestamp: "2030-01-01T00:00:00".to_owned(),
                kind: "MessageEvent".to_owned(),
                json: json!({"id": "later", "timestamp": "2030-01-01T00:00:00", "kind": "MessageEvent"}).to_string(),
            };
            harness.events().append(user, id, vec![late]).await.expect("stored");
            let stored = async || harness.other_worker.deletion.events.count_all(user, id).await.expect("a count");
            assert_eq!(stored().await, 1);
            harness.sweep().await;
            settle(&harness).await;
            assert_eq!(stored().await, 0, "late events go with the tombstone");
        }
        assert_eq!(harness.has_conversation_row(id).await, round < 2);
        let again = conversation(&harness, json!({"conversation_id": id})).await;
        assert!(conversations.get(user, id).await.expect("the store").is_some());
        assert!(deleter.delete(user, again.conversation_id).await.expect("deleted"));
        settle(&harness).await;
    }
    // An import may use it at once.
    let other = conversations.get(user, kept.conversation_id).await.expect("the store").expect("a record");
    let imported = shared::conversation::ConversationRecord { id, ..other };
    assert_eq!(conversations.import(user, &[imported]).await.expect("imported"), [true]);
    harness.finish().await;
}

/// A start uses the sandbox that its request names from the request on, although no worker has begun with it.
#[tokio::test]
async fn sandbox_is_kept_for_a_start_that_has_only_been_requested() {
    let harness = WorkerHarness::start(quick()).await;
    let last = conversation(&harness, json!({})).await;
    let sandbox = last.now.sandbox_id.clone().expect("a sandbox");
    let start = harness.begin(&json!({"sandbox_id": sandbox})).await;
    let job = harness.receive().await.expect("the start's message");
    let deleter = &harness.context.deletion.deleter;
    assert!(deleter.delete(&harness.user, last.conversation_id).await.expect("deleted"));
    let deletion = harness.receive().await.expect("the deletion's message");
    harness.handle(&deletion).await;
    let record = harness.records.get(&harness.user, &sandbox).await.expect("the store");
    assert!(record.is_some_and(|record| record.conversations.is_empty() && record.starts.len() == 1));
    harness.handle(&job).await;
    let ready = harness.drive(start.id).await;
    assert_eq!((ready.now.status, ready.now.sandbox_id), (StartStatus::Ready, Some(sandbox.clone())));
    let record = harness.records.get(&harness.user, &sandbox).await.expect("the store").expect("a sandbox");
    assert!(record.starts.is_empty() && record.conversations.len() == 1, "{record:?}");

    // One that ends before a worker has begun leaves the sandbox.
    let cancelled = harness.begin(&json!({"sandbox_id": sandbox})).await;
    harness.purge().await;
    harness.cancel(cancelled.id).await.expect("cancelled");
    harness.undone(cancelled.id).await;
    let record = harness.records.get(&harness.user, &sandbox).await.expect("the store").expect("a sandbox");
    assert!(record.starts.is_empty(), "{record:?}");
    assert!(deleter.delete(&harness.user, ready.conversation_id).await.expect("deleted"));
    settle(&harness).await;
    assert!(harness.sandboxes.made()[&sandbox].deleted, "no one uses it any more");

    // Without such a sandbox the start ends as before.
    for unknown in [sandbox, "no-such-sandbox".to_owned(), "x".repeat(300)] {
        let start = harness.begin(&json!({"sandbox_id": unknown})).await;
        let ended = harness.drive(start.id).await;
        let expected = format!("Sandbox not found: {unknown}");
        assert_eq!((ended.now.status, ended.now.detail), (StartStatus::Error, Some(expected)));
    }
    settle(&harness).await;
    harness.finish().await;
}

/// A sub-conversation whose start ends while its parent is deleted.
#[tokio::test]
async fn no_conversation_is_added_below_one_that_is_being_deleted() {
    let harness = WorkerHarness::start(quick()).await;
    let parent = conversation(&harness, json!({})).await;
    let start = harness.begin(&json!({"parent_conversation_id": parent.conversation_id})).await;
    let job = harness.receive().await.expect("the start's message");
    assert!(harness.context.deletion.deleter.delete(&harness.user, parent.conversation_id).await.expect("deleted"));
    harness.handle(&job).await;
    let ended = harness.drive(start.id).await;
    let expected = format!("Parent conversation {} was deleted during the start", parent.conversation_id);
    assert_eq!((ended.now.status, ended.now.detail), (StartStatus::Error, Some(expected)));
    harness.undone(start.id).await;
    settle(&harness).await;
    assert_nothing_left(&harness, &parent, "the parent").await;
    assert_eq!(harness.conversations.count(&harness.user, &everything()).await.expect("a count"), 0);
    assert!(harness.sandboxes.made().values().all(|made| made.deleted));
    harness.finish().await;
}

/// Crashes the worker that deletes a sandbox at each of its calls in turn.
async fn crash_while_reconciling(moment: Moment) {
    let harness = WorkerHarness::start(quick()).await;
    let mut calls = 0;
    for call in 1.. {
        let started = conversation(&harness, json!({})).await;
        let sandbox = started.now.sandbox_id.expect("a sandbox");
        let case = format!("a crash {moment:?} call {call}");
        harness.context.deletion.deleter.delete(&harness.user, started.conversation_id).await.expect("deleted");
        let deletion = harness.receive().await.expect("the deletion of the conversation");
        harness.handle(&deletion).await;
        let message = harness.receive().await.expect("the deletion of the sandbox");
        harness.gate.arm(call, Stop::Hang(moment));
        let (context, event) = (harness.context.clone(), WorkerHarness::event(&message));
        let mut worker = tokio::spawn(async move { worker::handle(&context, event).await });
        let crashed = tokio::select! {
            handled = &mut worker => {
                assert!(handled.expect("no panic").expect("handled").batch_item_failures.is_empty(), "{case}");
                false
            }
            () = harness.gate.reached() => {
                worker.abort();
                true
            }
        };
        calls = harness.gate.calls().len();
        harness.gate.disarm();
        harness.delete(&message).await;
        harness.settle_sandboxes().await;
        assert!(harness.sandboxes.made()[&sandbox].deleted, "{case}");
        assert!(harness.records.list_all(&harness.user).await.expect("records").is_empty(), "{case}: the record");
        if !crashed {
            break;
        }
    }
    assert!(calls >= 3, "only {calls} calls");
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_before_any_call_still_deletes_the_sandbox() {
    crash_while_reconciling(Moment::Before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_after_any_call_still_deletes_the_sandbox() {
    crash_while_reconciling(Moment::After).await;
}

/// The last conversation of a sandbox is deleted while a start in the sandbox becomes READY.
#[tokio::test(flavor = "multi_thread")]
async fn deletion_does_not_take_the_sandbox_of_a_start_that_becomes_ready() {
    let harness = WorkerHarness::start(quick()).await;
    let mut last = conversation(&harness, json!({})).await;
    let sandbox = last.now.sandbox_id.clone().expect("a sandbox");
    for round in 0..4 {
        let next = harness.begin(&json!({"sandbox_id": sandbox})).await;
        let message = harness.receive().await.expect("a message");
        let deletion = async {
            // Each round, the deletion comes at another time of the start.
            sleep(Duration::from_millis(60 * round)).await;
            harness.context.deletion.deleter.delete(&harness.user, last.conversation_id).await.expect("deleted");
            harness.context.deletion.finish(&harness.user, last.conversation_id).await.expect("finished");
            harness.context.reconciler.reconcile(&harness.user, &sandbox).await.expect("reconciled");
        };
        tokio::join!(harness.handle(&message), deletion);
        last = harness.drive(next.id).await;
        match last.now.status {
            StartStatus::Ready => {
                settle(&harness).await;
                assert!(!harness.sandboxes.made()[&sandbox].deleted, "round {round}");
            }
            // The deletion came before the start had joined the sandbox.
            _ => {
                assert_eq!(last.now.detail, Some(format!("Sandbox not found: {sandbox}")), "round {round}");
                break;
            }
        }
    }
    settle(&harness).await;
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_deletions_of_one_conversation_decrement_the_counter_once() {
    let harness = WorkerHarness::start(quick()).await;
    let kept = conversation(&harness, json!({})).await;
    let started = conversation(&harness, json!({})).await;
    let deleter = &harness.context.deletion.deleter;
    let asked = (0..10).map(|_| deleter.delete(&harness.user, started.conversation_id));
    let answers: Vec<bool> =
        futures::future::join_all(asked).await.into_iter().map(|answer| answer.expect("an answer")).collect();
    assert_eq!(answers.iter().filter(|deleted| **deleted).count(), 1, "{answers:?}");
    assert_eq!(harness.conversations.count(&harness.user, &everything()).await.expect("a count"), 1);
    settle(&harness).await;
    assert_nothing_left(&harness, &started, "deleted concurrently").await;
    assert!(harness.conversations.get(&harness.user, kept.conversation_id).await.expect("the store").is_some());
    harness.finish().await;
}

#[tokio::test]
async fn conversation_with_many_children_is_deleted_as_a_whole() {
    let harness = WorkerHarness::start(quick()).await;
    let parent = conversation(&harness, json!({})).await;
    let record =
        harness.conversations.get(&harness.user, parent.conversation_id).await.expect("the store").expect("a record");
    let child = |parent: Uuid| shared::conversation::ConversationRecord {
        id: Uuid::new_v4(),
        parent_conversation_id: Some(parent),
        ..record.clone()
    };
    let children: Vec<_> = (0..120).map(|_| child(record.id)).collect();
    let grandchild = child(children[0].id);
    for some in children.chunks(60).chain([[grandchild].as_slice()]) {
        harness.conversations.import(&harness.user, some).await.expect("stored");
    }
    assert_eq!(harness.conversations.count(&harness.user, &everything()).await.expect("a count"), 122);
    assert!(harness.context.deletion.deleter.delete(&harness.user, record.id).await.expect("deleted"));
    assert_eq!(harness.conversations.count(&harness.user, &everything()).await.expect("a count"), 0);
    settle(&harness).await;
    assert_nothing_left(&harness, &parent, "the parent").await;
    for child in children {
        assert!(
            harness
                .conversations
                .take_deletion(&harness.user, child.id, Time::now())
                .await
                .expect("the store")
                .is_none()
        );
    }
    harness.finish().await;
}
