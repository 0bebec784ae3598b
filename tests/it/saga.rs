//! The start saga under fault injection: crashes at every call, late workers, lost and repeated messages, a store and
//! an agent server that fail.

use std::time::Duration;

use futures::future::join_all;
use futures::stream::{self, StreamExt as _};
use serde_json::{Value, json};
use shared::conversation::search::Filter;
use shared::sandbox::{SandboxService as _, SandboxStatus};
use shared::start::task::StartStatus;
use tokio::time::timeout;
use uuid::Uuid;

use crate::support::fault_proxy::{Moment, Stop};
use crate::support::stand_in_agent::{Fault, Kind, Nth};
use crate::support::worker_harness::{WorkerHarness, quick};

/// How many harnesses run at the same time in tests that need many.
const HARNESSES: usize = 4;
const EXECUTE: &str = "POST /api/bash/execute_bash_command";
const START_COMMAND: &str = "POST /api/bash/start_bash_command";

fn message() -> Value {
    json!({"initial_message": {"content": [{"type": "text", "text": "hi"}]}})
}

#[tokio::test]
async fn start_ends_ready_and_creates_everything_exactly_once() {
    let harness = WorkerHarness::start(quick()).await;
    let task = harness.begin(&message()).await;
    let done = harness.drive(task.id).await;
    harness.assert_one(task.id, 1, "a plain start").await;
    assert_eq!(done.now.sandbox_id, harness.sandboxes.made().keys().next().cloned());
    assert!(done.now.agent_server_url.is_some());
    // Skills are loaded once: those of the project when its workspace is prepared, the others meanwhile.
    let loaded: Vec<Value> =
        harness.agent.requests_to("POST /api/skills").iter().map(crate::support::server::Request::json).collect();
    let sources = |load: &Value| [&load["load_public"], &load["load_user"], &load["load_project"]].map(Value::as_bool);
    let [base, project] = [[true, true, false], [false, false, true]].map(|sources| sources.map(Some));
    assert_eq!(loaded.iter().map(sources).collect::<Vec<_>>(), [base, project]);
    // Without scripts of the project, one command prepares everything.
    assert_eq!(harness.agent.commands().len(), 1);
    harness.finish().await;
}

/// Whether the model streams depends on the agent server's version; a start does not fail if the version is unknown.
#[tokio::test]
async fn model_streams_only_if_tokens_reach_only_clients() {
    for (version, streams) in
        [("1.15.0", false), ("1.34.0", false), ("1.49.1", true), ("1.58.2", true), ("unknown", false)]
    {
        let harness = WorkerHarness::start(quick()).await;
        harness.agent.set_version(version);
        harness.drive(harness.begin(&message()).await.id).await;
        let created = harness.agent.requests_to("POST /api/conversations").pop().expect("a request").json();
        let agent = &created["agent"];
        assert_eq!(
            (&agent["llm"]["stream"], &agent["condenser"]["llm"]["stream"]),
            (&json!(streams), &json!(false)),
            "{version}"
        );
        harness.finish().await;
    }
    let off = WorkerHarness::start(shared::config::StartConfig { token_streaming: false, ..quick() }).await;
    off.agent.set_version("1.58.2");
    off.drive(off.begin(&message()).await.id).await;
    let created = off.agent.requests_to("POST /api/conversations").pop().expect("a request").json();
    assert_eq!(created["agent"]["llm"]["stream"], false, "streaming is disabled");
    off.finish().await;
    for kind in [Kind::Status(500, "x".into()), Kind::CutBefore, Kind::Garbage] {
        let harness = WorkerHarness::start(quick()).await;
        harness.agent.set_version("1.58.2");
        harness.agent.inject(Fault::new("GET /server_info", Nth::Always, kind));
        let task = harness.begin(&message()).await;
        assert_eq!(harness.drive(task.id).await.now.status, StartStatus::Ready);
        let created = harness.agent.requests_to("POST /api/conversations").pop().expect("a request").json();
        assert_eq!(created["agent"]["llm"]["stream"], false);
        harness.finish().await;
    }
}

/// The calls that a start makes.
async fn calls_of_a_start() -> Vec<String> {
    let harness = WorkerHarness::start(quick()).await;
    let task = harness.begin(&message()).await;
    harness.gate.arm(usize::MAX, Stop::Refuse);
    harness.drive(task.id).await;
    let calls = harness.gate.calls();
    harness.finish().await;
    assert!(calls.len() > 20, "{calls:?}");
    calls
}

async fn crash_everywhere(moment: Moment) {
    let calls = calls_of_a_start().await;
    stream::iter(1..=calls.len())
        .for_each_concurrent(HARNESSES, |call| {
            let name = format!("a crash {moment:?} call {call} ({})", calls[call - 1]);
            async move {
                let harness = WorkerHarness::start(quick()).await;
                let task = harness.begin(&message()).await;
                harness.crash_at(task.id, call, Stop::Hang(moment)).await;
                harness.drive(task.id).await;
                harness.assert_one(task.id, 1, &name).await;
                harness.finish().await;
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_before_any_call_creates_everything_exactly_once() {
    crash_everywhere(Moment::Before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn crash_after_any_call_creates_everything_exactly_once() {
    crash_everywhere(Moment::After).await;
}

/// The worker is stuck, not dead: its lease expires, another worker completes the start, and then it continues. So
/// every step runs twice, with overlap.
async fn late_everywhere(moment: Moment) {
    let calls = calls_of_a_start().await;
    stream::iter(1..=calls.len())
        .for_each_concurrent(HARNESSES, |call| {
            let name = format!("a worker held {moment:?} call {call} ({})", calls[call - 1]);
            async move {
                let harness = WorkerHarness::start(quick()).await;
                let task = harness.begin(&message()).await;
                harness.gate.arm(call, Stop::Hold(moment));
                let first = harness.receive().await.expect("a message");
                let (context, event) = (harness.context.clone(), WorkerHarness::event(&first));
                let mut late = tokio::spawn(async move { worker::handle(&context, event).await });
                // The number of calls varies a little, so the last ones may not be reached.
                let ended = tokio::select! {
                    ended = &mut late => Some(ended),
                    () = harness.gate.reached() => None,
                };
                harness.drive_with(&harness.other_worker, task.id).await;
                harness.gate.disarm();
                harness.gate.open();
                let ended = match ended {
                    Some(ended) => ended,
                    None => timeout(Duration::from_secs(30), late).await.expect("the late worker continues and ends"),
                };
                ended.expect("no panic").expect("handled");
                harness.assert_one(task.id, 1, &name).await;
                harness.finish().await;
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn late_worker_before_any_call_changes_nothing() {
    late_everywhere(Moment::Before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn late_worker_after_any_call_changes_nothing() {
    late_everywhere(Moment::After).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn start_recovers_from_any_single_store_error() {
    start_with_a_fault_at_each_call_to_aws(Stop::Refuse).await;
}

/// The call takes effect, and the SDK repeats it.
#[tokio::test(flavor = "multi_thread")]
async fn start_recovers_from_the_lost_response_of_any_call() {
    start_with_a_fault_at_each_call_to_aws(Stop::LoseResponses(1)).await;
}

async fn start_with_a_fault_at_each_call_to_aws(stop: Stop) {
    let calls = calls_of_a_start().await;
    let to_aws: Vec<usize> = (1..=calls.len()).filter(|call| !calls[call - 1].contains(' ')).collect();
    stream::iter(to_aws)
        .for_each_concurrent(HARNESSES, |call| {
            let name = format!("{stop:?} at call {call} ({})", calls[call - 1]);
            async move {
                let harness = WorkerHarness::start(quick()).await;
                let task = harness.begin(&message()).await;
                harness.gate.arm(call, stop);
                harness.drive(task.id).await;
                harness.gate.disarm();
                harness.assert_one(task.id, 1, &name).await;
                harness.finish().await;
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn message_delivered_three_times_concurrently_is_one_start() {
    let harness = WorkerHarness::start(quick()).await;
    let task = harness.begin(&message()).await;
    let delivered = harness.receive().await.expect("a message");
    join_all((0..3).map(|_| harness.handle(&delivered))).await;
    harness.drive(task.id).await;
    harness.assert_one(task.id, 1, "three deliveries").await;
    assert_eq!(harness.agent.requests_to("POST /api/conversations").len(), 1);
    harness.finish().await;
}

#[tokio::test]
async fn lost_message_is_requeued_by_sweep() {
    let harness = WorkerHarness::start(quick()).await;
    let task = harness.begin(&message()).await;
    harness.purge().await;
    harness.drive(task.id).await;
    harness.assert_one(task.id, 1, "a lost message").await;
    harness.finish().await;
}

#[tokio::test]
async fn worker_without_inline_wait_releases_the_start_and_completes_it_later() {
    let harness = WorkerHarness::start(shared::config::StartConfig { inline_wait: Duration::ZERO, ..quick() }).await;
    let task = harness.begin(&message()).await;
    let first = harness.receive().await.expect("a message");
    harness.handle(&first).await;
    let waiting = harness.task(task.id).await;
    assert!(!waiting.now.status.is_final() && harness.pending_command(task.id).await.is_some(), "{waiting:?}");
    harness.drive(task.id).await;
    harness.assert_one(task.id, 1, "no inline_wait").await;
    harness.finish().await;
}

#[tokio::test]
async fn a_dead_letter_ends_its_start_with_an_error_and_deletes_its_sandbox() {
    let config = shared::config::StartConfig { inline_wait: Duration::ZERO, ..quick() };
    let harness = WorkerHarness::start(config).await;
    harness.agent.inject(endless_command());
    let task = harness.begin(&message()).await;
    let dead = harness.receive().await.expect("a message");
    harness.handle(&dead).await;
    let sandbox = run_to_command(&harness, task.id).await;
    harness.bury(&dead).await;
    harness.settle_sandboxes().await;
    assert!(harness.sandboxes.made()[&sandbox].deleted, "nothing else uses it");
    let ended = harness.task(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    assert!(ended.now.detail.expect("a detail").contains("could not be started after several attempts"));
    harness.finish().await;
}

/// After one fault of the agent server, the start is still READY, and nothing exists twice.
#[tokio::test(flavor = "multi_thread")]
async fn start_recovers_from_any_single_fault_of_the_agent_server() {
    let routes = [
        "GET /alive",
        EXECUTE,
        START_COMMAND,
        "GET /api/bash/bash_events/search",
        "POST /api/skills",
        "POST /api/hooks",
        "POST /api/conversations",
    ];
    let kinds = || {
        [
            Kind::Slow(Duration::from_millis(700)),
            Kind::SlowReply(Duration::from_millis(700)),
            Kind::Status(500, r#"{"detail":"Internal Server Error","exception":"by a test"}"#.into()),
            Kind::StatusAfter(503, "busy".into()),
            Kind::CutBefore,
            Kind::CutAfter,
            Kind::Garbage,
        ]
    };
    let cases = routes.iter().flat_map(|route| kinds().into_iter().map(move |kind| (*route, kind)));
    stream::iter(cases)
        .for_each_concurrent(HARNESSES, |(route, kind)| async move {
            let name = format!("{route}: {kind:?}");
            let harness = WorkerHarness::start(quick()).await;
            if [START_COMMAND, "GET /api/bash/bash_events/search"].contains(&route) {
                harness.agent.refuse_to_wait_for_commands();
            }
            harness.agent.inject(Fault::new(route, Nth::Next, kind));
            let task = harness.begin(&message()).await;
            harness.drive(task.id).await;
            harness.assert_one(task.id, 1, &name).await;
            harness.finish().await;
        })
        .await;
}

/// The agent server takes longer than the request's timeout, and creates the conversation nevertheless.
#[tokio::test]
async fn conversation_created_after_a_timeout_is_found_and_not_created_again() {
    let harness = WorkerHarness::start(quick()).await;
    let late = Kind::Slow(Duration::from_millis(3500));
    harness.agent.inject(Fault::new("POST /api/conversations", Nth::Next, late));
    let task = harness.begin(&message()).await;
    harness.drive(task.id).await;
    harness.assert_one(task.id, 1, "an answer that came too late").await;
    harness.finish().await;
}

/// Permanent faults: the start ends in ERROR with the agent server's own message, and the sandbox is removed.
#[tokio::test(flavor = "multi_thread")]
async fn permanent_fault_ends_in_an_error_with_its_reason() {
    let broken = || Kind::Status(500, r#"{"detail":"Internal Server Error","exception":"the disk is full"}"#.into());
    let cases = [
        (EXECUTE, broken(), "the disk is full"),
        ("POST /api/conversations", broken(), "the disk is full"),
        ("POST /api/conversations", Kind::Status(422, r#"{"detail":"no such tool"}"#.into()), "no such tool"),
        ("POST /api/conversations", Kind::CutBefore, "cut off"),
    ];
    stream::iter(cases)
        .for_each_concurrent(HARNESSES, |(route, kind, words)| async move {
            let name = format!("{route}: {kind:?}");
            let harness = WorkerHarness::start(quick()).await;
            harness.agent.inject(Fault::new(route, Nth::Always, kind));
            let task = harness.begin(&message()).await;
            let ended = harness.drive(task.id).await;
            assert_eq!(ended.now.status, StartStatus::Error, "{name}");
            let detail = ended.now.detail.expect("an ERROR has a detail");
            assert!(detail.contains(words), "{name}: {detail}");
            harness.settle_sandboxes().await;
            assert!(
                harness.sandboxes.made().values().all(|made| made.deleted),
                "{name}: the sandbox was made for this start"
            );
            assert_eq!(
                harness
                    .conversations
                    .count(&harness.user, &shared::conversation::search::Filter::default())
                    .await
                    .expect("a count"),
                0,
                "{name}"
            );
            harness.finish().await;
        })
        .await;
}

#[tokio::test]
async fn crash_during_cleanup_keeps_the_reason_of_the_failure() {
    let harness = WorkerHarness::start(quick()).await;
    let refusal = Kind::Status(422, r#"{"detail":"no such tool"}"#.into());
    harness.agent.inject(Fault::new("POST /api/conversations", Nth::Always, refusal));
    harness.gate.arm(usize::MAX, Stop::Refuse);
    let first = harness.begin(&message()).await;
    let detail = harness.drive(first.id).await.now.detail.expect("a detail");
    assert!(detail.contains("no such tool"), "{detail}");
    let calls = harness.gate.calls().len();
    for call in calls.saturating_sub(8)..=calls {
        let task = harness.begin(&message()).await;
        harness.crash_at(task.id, call, Stop::Hang(Moment::After)).await;
        let ended = harness.drive(task.id).await;
        assert_eq!(ended.now.detail.as_deref(), Some(detail.as_str()), "a crash after call {call}");
        harness.undone(task.id).await;
    }
    assert!(harness.sandboxes.made().values().all(|made| made.deleted));
    harness.finish().await;
}

#[tokio::test]
async fn a_missing_model_is_an_error_before_a_sandbox_is_created() {
    let harness = WorkerHarness::start(quick()).await;
    harness.set_settings(json!({})).await;
    *harness.sandboxes.begins_as.lock().expect("status") = SandboxStatus::Starting;
    let task = harness.begin(&message()).await;
    let detail = harness.drive(task.id).await.now.detail.expect("a detail");
    assert!(detail.contains("LLM_MODEL"), "{detail}");
    assert!(harness.sandboxes.made().is_empty());
    harness.finish().await;
}

#[tokio::test]
async fn unresponsive_sandbox_is_an_error_after_its_timeout() {
    let config = shared::config::StartConfig { sandbox_startup_timeout: Duration::from_secs(1), ..quick() };
    let harness = WorkerHarness::start(config).await;
    *harness.sandboxes.begins_as.lock().expect("status") = SandboxStatus::Starting;
    let task = harness.begin(&message()).await;
    let ended = harness.drive(task.id).await;
    let detail = ended.now.detail.expect("a detail");
    assert!(detail.starts_with("Sandbox failed to start within 1s: "), "{detail}");
    harness.finish().await;
}

#[tokio::test]
async fn sandbox_that_ends_during_the_start_is_reported_in_the_error() {
    let harness = WorkerHarness::start(quick()).await;
    harness.agent.inject(Fault::new("POST /api/skills", Nth::Always, Kind::CutBefore));
    let task = harness.begin(&message()).await;
    let delivered = harness.receive().await.expect("a message");
    let ending = async {
        crate::support::wait::wait_until("the skills are requested", Duration::from_secs(60), async || {
            !harness.agent.requests_to("POST /api/skills").is_empty()
        })
        .await;
        let id = harness.sandboxes.made().keys().next().cloned().expect("a sandbox");
        harness.sandboxes.set_status(&id, SandboxStatus::Missing);
    };
    tokio::join!(harness.handle(&delivered), ending);
    let ended = harness.drive(task.id).await;
    let detail = ended.now.detail.expect("a detail");
    assert!(detail.contains("ended during the start. It was ended by a test"), "{detail}");
    harness.finish().await;
}

#[tokio::test]
async fn a_paused_sandbox_is_resumed_and_an_unknown_one_is_an_error() {
    let harness = WorkerHarness::start(quick()).await;
    let first = harness.begin(&json!({})).await;
    let sandbox = harness.drive(first.id).await.now.sandbox_id.expect("a sandbox");
    harness.sandboxes.set_status(&sandbox, SandboxStatus::Paused);
    let second = harness.begin(&json!({"sandbox_id": sandbox})).await;
    assert_eq!(harness.drive(second.id).await.now.status, StartStatus::Ready);
    assert_eq!(harness.sandboxes.made()[&sandbox].resumed, 1);
    let lost = harness.begin(&json!({"sandbox_id": "nowhere"})).await;
    assert_eq!(harness.drive(lost.id).await.now.detail.as_deref(), Some("Sandbox not found: nowhere"));
    // Another start failed in the sandbox; that start must not remove it.
    assert!(!harness.sandboxes.made()[&sandbox].deleted);
    harness.finish().await;
}

/// Commands in the sandbox do not end until the fault is cleared.
fn endless_command() -> Fault {
    let running = json!({"items": []}).to_string();
    Fault::new("GET /api/bash/bash_events/search", Nth::Always, Kind::Status(200, running))
}

/// Handles jobs until the start waits for a command.
async fn run_to_command(harness: &WorkerHarness, task: Uuid) -> String {
    loop {
        let record = harness.task(task).await;
        assert!(!record.now.status.is_final(), "{:?}", record.now.detail);
        if harness.pending_command(task).await.is_some() {
            return record.now.sandbox_id.expect("a sandbox");
        }
        match harness.receive().await {
            Some(message) => harness.handle(&message).await,
            None => harness.sweep().await,
        }
    }
}

/// Two starts share a sandbox that the first one has created. The sandbox stays while one of them, or the conversation of one, uses it.
#[tokio::test]
async fn sandbox_of_a_failed_start_stays_for_another_start() {
    for second_fails in [false, true] {
        let config = shared::config::StartConfig { inline_wait: Duration::ZERO, ..quick() };
        let harness = WorkerHarness::start(config).await;
        let grouping = "ADD_TO_ANY";
        let settings = json!({"llm_model": "openai/x", "llm_api_key": "k", "sandbox_grouping_strategy": grouping});
        harness.set_settings(settings).await;
        harness.agent.inject(endless_command());
        let first = harness.begin(&message()).await;
        let sandbox = run_to_command(&harness, first.id).await;
        let second = harness.begin(&message()).await;
        assert_eq!(run_to_command(&harness, second.id).await, sandbox, "the strategy picks it");

        harness.end_time_of(first.id).await;
        assert_eq!(harness.drive(first.id).await.now.status, StartStatus::Error);
        let record = harness.records.get(&harness.user, &sandbox).await.expect("the store").expect("a record");
        assert_eq!((record.starts.len(), record.conversations.len()), (1, 0), "{record:?}");
        if second_fails {
            harness.end_time_of(second.id).await;
            assert_eq!(harness.drive(second.id).await.now.status, StartStatus::Error);
        } else {
            harness.agent.clear_faults();
            let ready = harness.drive(second.id).await;
            assert_eq!(ready.now.status, StartStatus::Ready, "{:?}", ready.now.detail);
            harness.settle_sandboxes().await;
            let record = harness.records.get(&harness.user, &sandbox).await.expect("the store").expect("a record");
            assert_eq!((record.starts.len(), record.conversations.len()), (0, 1), "{record:?}");
            assert!(!harness.sandboxes.made()[&sandbox].deleted, "the conversation of the second start uses it");
            let deleter = &harness.context.deletion.deleter;
            assert!(deleter.delete(&harness.user, ready.conversation_id).await.expect("deleted"));
        }
        harness.settle_sandboxes().await;
        assert!(harness.sandboxes.made()[&sandbox].deleted, "nothing uses it any more");
        assert!(harness.records.list_all(&harness.user).await.expect("the store").is_empty(), "its record is removed");
        harness.finish().await;
    }
}

/// A sandbox that its user has created stays when a start in it fails, and is deleted with its last conversation.
#[tokio::test]
async fn sandbox_of_a_user_outlives_a_failed_start() {
    let harness = WorkerHarness::start(quick()).await;
    harness.sandboxes.start(&harness.user, "mine", None).await.expect("a sandbox");
    let refusal = Kind::Status(422, r#"{"detail":"no such tool"}"#.into());
    harness.agent.inject(Fault::new("POST /api/conversations", Nth::Always, refusal));
    let mut body = message();
    body["sandbox_id"] = "mine".into();
    let failed = harness.begin(&body).await;
    assert_eq!(harness.drive(failed.id).await.now.status, StartStatus::Error);
    harness.settle_sandboxes().await;
    assert!(!harness.sandboxes.made()["mine"].deleted);
    harness.agent.clear_faults();
    let ready = harness.drive(harness.begin(&body).await.id).await;
    assert_eq!(ready.now.status, StartStatus::Ready, "{:?}", ready.now.detail);
    let deleter = &harness.context.deletion.deleter;
    assert!(deleter.delete(&harness.user, ready.conversation_id).await.expect("deleted"));
    harness.settle_sandboxes().await;
    assert!(harness.sandboxes.made()["mine"].deleted);
    harness.finish().await;
}

/// An earlier start of the conversation has failed, and the sandbox with the id of the conversation is still being deleted.
#[tokio::test]
async fn start_does_not_use_a_sandbox_that_is_being_deleted() {
    let harness = WorkerHarness::start(quick()).await;
    let mut body = message();
    body["conversation_id"] = "aaaa1111-0000-4000-8000-000000000003".into();
    let task = harness.begin(&body).await;
    harness.sandboxes.start(&harness.user, &task.new_sandbox_id, None).await.expect("a sandbox");
    assert!(harness.records.mark_deleted(&harness.user, &task.new_sandbox_id).await.expect("the store"));
    let ready = harness.drive(task.id).await;
    assert_eq!(ready.now.status, StartStatus::Ready, "{:?}", ready.now.detail);
    assert_ne!(ready.now.sandbox_id.as_ref(), Some(&task.new_sandbox_id));
    harness.settle_sandboxes().await;
    assert!(harness.sandboxes.made()[&task.new_sandbox_id].deleted);
    assert!(!harness.sandboxes.made()[ready.now.sandbox_id.as_ref().expect("a sandbox")].deleted);
    harness.finish().await;
}

/// The user deletes the sandbox after the conversation was created in it, before the start has recorded it.
#[tokio::test]
async fn sandbox_deleted_during_its_start_ends_the_start() {
    let harness = WorkerHarness::start(quick()).await;
    harness.agent.inject(Fault::new("POST /api/conversations", Nth::Next, Kind::SlowReply(Duration::from_secs(1))));
    let task = harness.begin(&message()).await;
    let delivered = harness.receive().await.expect("a message");
    let deleting = async {
        crate::support::wait::wait_until("the conversation is created", Duration::from_secs(60), async || {
            !harness.agent.requests_to("POST /api/conversations").is_empty()
        })
        .await;
        let id = harness.task(task.id).await.now.sandbox_id.expect("a sandbox");
        assert!(harness.other_worker.reconciler.delete(&harness.user, &id).await.expect("the store"));
    };
    tokio::join!(harness.handle(&delivered), deleting);
    let ended = harness.drive(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    assert!(ended.now.detail.as_ref().is_some_and(|detail| detail.contains("during the start")), "{:?}", ended.now);
    let everything = Filter { include_sub_conversations: true, ..Filter::default() };
    assert_eq!(harness.conversations.count(&harness.user, &everything).await.expect("a count"), 0);
    harness.settle_sandboxes().await;
    harness.finish().await;
}

/// A sandbox that is paused in the middle of a start, by its provider or because the machine was restarted.
#[tokio::test]
async fn sandbox_paused_during_its_start_is_resumed() {
    let config = shared::config::StartConfig { inline_wait: Duration::ZERO, ..quick() };
    let harness = WorkerHarness::start(config).await;
    harness.agent.inject(endless_command());
    let task = harness.begin(&message()).await;
    let sandbox = run_to_command(&harness, task.id).await;
    harness.sandboxes.set_status(&sandbox, SandboxStatus::Paused);
    harness.agent.clear_faults();
    assert_eq!(harness.drive(task.id).await.now.status, StartStatus::Ready);
    assert_eq!(harness.sandboxes.made()[&sandbox].resumed, 1);
    harness.finish().await;
}

#[tokio::test]
async fn starting_the_same_conversation_twice_creates_one() {
    let harness = WorkerHarness::start(quick()).await;
    let id = "aaaa1111-0000-4000-8000-000000000001";
    let mut body = message();
    body["conversation_id"] = id.into();
    body["title"] = "kept".into();
    let first = harness.begin(&body).await;
    harness.drive(first.id).await;
    body["title"] = "ignored".into();
    let second = harness.begin(&body).await;
    harness.drive(second.id).await;
    harness.assert_one(second.id, 1, "the same id again").await;
    let kept =
        harness.conversations.get(&harness.user, first.conversation_id).await.expect("the store").expect("a record");
    assert_eq!(kept.title.as_deref(), Some("kept"));
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_starts_of_one_conversation_create_one() {
    let harness = WorkerHarness::start(quick()).await;
    let mut body = message();
    body["conversation_id"] = "aaaa1111-0000-4000-8000-000000000002".into();
    let (one, two) = (harness.begin(&body).await, harness.begin(&body).await);
    let messages = [harness.receive().await.expect("a message"), harness.receive().await.expect("a message")];
    join_all(messages.iter().map(|message| harness.handle(message))).await;
    harness.drive(one.id).await;
    harness.drive(two.id).await;
    for task in [one, two] {
        harness.assert_one(task.id, 1, "two starts at once").await;
    }
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_starts_in_one_sandbox_do_not_interfere() {
    let harness = WorkerHarness::start(quick()).await;
    harness
        .set_settings(json!({"llm_model": "openai/x", "git_user_name": "A", "git_user_email": "a@example.org"}))
        .await;
    let first = harness.begin(&json!({})).await;
    let sandbox = harness.drive(first.id).await.now.sandbox_id.expect("a sandbox");
    let mut tasks = Vec::new();
    for _ in 0..12 {
        tasks.push(harness.begin(&json!({"sandbox_id": sandbox})).await.id);
    }
    let messages: Vec<_> =
        stream::iter(&tasks).then(|_| harness.receive()).filter_map(async |message| message).collect().await;
    join_all(messages.iter().map(|message| harness.handle(message))).await;
    for task in tasks {
        let done = harness.drive(task).await;
        assert_eq!(done.now.status, StartStatus::Ready, "{:?}", done.now.detail);
    }
    assert_eq!(harness.agent.conversations().len(), 13);
    harness.finish().await;
}

#[tokio::test]
async fn a_request_too_large_for_the_record_is_kept_in_the_bucket() {
    let harness = WorkerHarness::start(quick()).await;
    let text = "x".repeat(600_000);
    let task = harness.begin(&json!({"initial_message": {"content": [{"type": "text", "text": text}]}})).await;
    harness.drive(task.id).await;
    harness.assert_one(task.id, 1, "a large request").await;
    let shown = harness.tasks.show_page(&[harness.task(task.id).await]).await.expect("the bucket").into_page(None);
    let shown = serde_json::to_value(shown).expect("JSON");
    assert_eq!(shown["items"][0]["request"]["initial_message"]["content"][0]["text"].as_str(), Some(text.as_str()));
    harness.finish().await;
}

#[tokio::test]
async fn secrets_of_a_request_reach_only_the_agent() {
    let harness = WorkerHarness::start(quick()).await;
    let task = harness.begin(&json!({"secrets": {"DEPLOY_KEY": "canary-5121"}})).await;
    assert!(!format!("{task:?}").contains("canary-5121"));
    let done = harness.drive(task.id).await;
    assert!(!serde_json::to_string(&done.show()).expect("json").contains("canary-5121"));
    let body = &harness.agent.conversations()[0].body;
    assert_eq!(body["secrets"]["DEPLOY_KEY"]["value"], "canary-5121");
    harness.finish().await;
}
