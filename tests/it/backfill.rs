//! Events that an agent server has and that have not arrived: a job fetches them.

use std::time::Duration;

use serde_json::{Value, json};
use shared::conversation::ConversationRecord;
use shared::event::ingest::{ConversationReport, EventIngestor};
use shared::event::store::Event;
use shared::jobs::backfill_events::BackfillEvents;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::deletion;
use crate::support::fault_proxy::{Moment, Stop};
use crate::support::log::all_events;
use crate::support::stand_in_agent::{Fault, Kind, Nth};
use crate::support::worker_harness::{WorkerHarness, quick};

const SEARCH: &str = "GET /api/conversations/{id}/events/search";
const SOON: Duration = Duration::from_secs(60);

/// The event with this number, which reports the agent's cost until then.
fn event(number: usize) -> Value {
    json!({"id": format!("event-{number:03}"), "timestamp": format!("2026-01-01T00:{:02}:{:02}", number / 60, number % 60),
        "kind": "ConversationStateUpdateEvent", "source": "environment", "key": "stats",
        "value": {"usage_to_metrics": {"agent": {"accumulated_cost": number}}}})
}

fn ids(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("event-{number:03}")).collect()
}

fn stored(value: &Value) -> Event {
    let text = |name: &str| value[name].as_str().expect("a text").to_owned();
    Event { id: text("id"), timestamp: text("timestamp"), kind: text("kind"), json: value.to_string() }
}

/// A conversation, of whose events the first ones have arrived.
struct Conversation {
    record: ConversationRecord,
    count: usize,
}

impl Conversation {
    /// A conversation in the sandbox of another one.
    async fn beside(harness: &WorkerHarness, other: &ConversationRecord, arrived: usize, count: usize) -> Self {
        let record = ConversationRecord { id: Uuid::new_v4(), ..other.clone() };
        assert!(harness.put_stub(&record).await);
        Self { record, count }.with_events(harness, arrived).await
    }

    async fn with_events(self, harness: &WorkerHarness, arrived: usize) -> Self {
        harness.agent.set_events(self.record.id, (0..self.count).map(event).collect());
        let first = (0..arrived).map(|number| stored(&event(number))).collect();
        harness.events().append(&harness.user, self.record.id, first).await.expect("stored");
        self
    }

    async fn arrived(&self, harness: &WorkerHarness) -> Vec<String> {
        let events = all_events(&harness.events(), &harness.user, self.record.id).await;
        events.into_iter().map(|event| event.id).collect()
    }

    async fn enqueue(&self, harness: &WorkerHarness) {
        let job = BackfillEvents { user: harness.user.clone(), conversation: self.record.id, attempt: 0 }.into();
        harness.context.follow_up.queue.send(&job, Duration::ZERO).await.expect("enqueued");
    }
}

async fn ready(harness: &WorkerHarness) -> ConversationRecord {
    let started = deletion::conversation(harness, json!({})).await;
    harness.purge().await;
    harness.conversations.get(&harness.user, started.conversation_id).await.expect("the store").expect("a record")
}

/// Reports a conversation as its agent server does.
async fn report(harness: &WorkerHarness, conversation: &ConversationRecord, status: &str) {
    let ingestor = EventIngestor {
        conversations: harness.conversations.clone(),
        events: harness.events(),
        sandboxes: harness.records.clone(),
        queue: harness.context.saga.queue.clone(),
    };
    let sandbox = harness.records.get(&harness.user, &conversation.sandbox_id).await.expect("the store");
    let report = json!({"execution_status": status, "updated_at": "2026-01-01T01:00:00Z"});
    let report = ConversationReport::read(conversation.id, &report);
    ingestor.ingest_report(&sandbox.expect("a sandbox"), &report).await.expect("acknowledged");
}

/// Handles messages until the queue is empty, delayed ones included.
async fn drain(harness: &WorkerHarness) {
    let deadline = Instant::now() + SOON;
    while harness.waiting_messages().await > 0 {
        assert!(Instant::now() < deadline, "messages are left");
        match harness.receive().await {
            Some(message) => harness.handle(&message).await,
            None => sleep(Duration::from_millis(100)).await,
        }
    }
}

#[tokio::test]
async fn a_lost_batch_is_fetched_when_the_agent_has_halted() {
    let harness = WorkerHarness::start(quick()).await;
    let other = ready(&harness).await;
    let conversation = Conversation::beside(&harness, &other, 10, 75).await;
    let record = &conversation.record;
    report(&harness, record, "running").await;
    report(&harness, record, "idle").await;
    assert_eq!(harness.waiting_messages().await, 0, "the agent may still post its events");
    for _ in 0..3 {
        report(&harness, record, "finished").await;
    }
    assert_eq!(harness.waiting_messages().await, 1, "one job for all reports");
    drain(&harness).await;
    assert_eq!(conversation.arrived(&harness).await, ids(75));
    let now = harness.conversations.get(&harness.user, record.id).await.expect("the store").expect("a record");
    assert!((now.metrics.accumulated_cost - 74.0).abs() < 1e-9, "{:?}", now.metrics);

    // When nothing is missing, one request shows it.
    let before = harness.agent.requests_to(SEARCH).len();
    report(&harness, record, "finished").await;
    drain(&harness).await;
    assert_eq!(harness.agent.requests_to(SEARCH).len(), before + 1);

    // A conversation that is deleted meanwhile gets no events.
    let gone = Conversation::beside(&harness, &other, 1, 3).await;
    gone.enqueue(&harness).await;
    harness.context.deletion.deleter.delete(&harness.user, gone.record.id).await.expect("deleted");
    drain(&harness).await;
    assert!(gone.arrived(&harness).await.is_empty());
    harness.finish().await;
}

/// Events that are stored are always the first ones: otherwise the next run, which begins with the newest, would find nothing missing.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_at_any_call_leaves_no_gap() {
    let harness = WorkerHarness::start(quick()).await;
    let other = ready(&harness).await;
    let mut calls = 0;
    for call in 1.. {
        let conversation = Conversation::beside(&harness, &other, 2, 45).await;
        conversation.enqueue(&harness).await;
        let message = harness.receive().await.expect("a message");
        harness.gate.arm(call, Stop::Hang(Moment::After));
        let (context, event) = (harness.context.clone(), WorkerHarness::event(&message));
        let mut worker = tokio::spawn(async move { worker::handle(&context, event).await });
        let is_reached = tokio::select! {
            handled = &mut worker => {
                assert!(handled.expect("no panic").expect("handled").batch_item_failures.is_empty());
                false
            }
            () = harness.gate.reached() => {
                worker.abort();
                let _dropped = worker.await;
                true
            }
        };
        harness.gate.disarm();
        let arrived = conversation.arrived(&harness).await;
        assert_eq!(arrived, ids(arrived.len()), "call {call}");
        harness.handle(&message).await;
        drain(&harness).await;
        assert_eq!(conversation.arrived(&harness).await, ids(45), "call {call}");
        if !is_reached {
            break;
        }
        calls = call;
    }
    assert!(calls > 10, "only {calls} calls");
    harness.finish().await;
}

#[tokio::test]
async fn an_agent_server_that_does_not_respond_is_asked_again() {
    let harness = WorkerHarness::start(quick()).await;
    let other = ready(&harness).await;
    let conversation = Conversation::beside(&harness, &other, 2, 30).await;
    harness.agent.inject(Fault::new(SEARCH, Nth::On(2), Kind::Status(503, String::new())));
    conversation.enqueue(&harness).await;
    let message = harness.receive().await.expect("a message");
    harness.handle(&message).await;
    assert_eq!(conversation.arrived(&harness).await, ids(2));
    assert_eq!(harness.waiting_messages().await, 1, "another attempt");
    drain(&harness).await;
    assert_eq!(conversation.arrived(&harness).await, ids(30));
    harness.finish().await;
}
