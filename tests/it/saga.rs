//! The start saga under faults: crashes at every call, late workers, lost and repeated messages, a store and an agent
//! server that fail.

use std::time::Duration;

use futures::future::join_all;
use futures::stream::{self, StreamExt as _};
use serde_json::{Value, json};
use shared::sandbox::SandboxStatus;
use shared::start::task::StartStatus;
use tokio::time::timeout;

use crate::support::fault_proxy::{Moment, Stop};
use crate::support::stand_in_agent::{Fault, Kind, Nth};
use crate::support::worker_harness::{WorkerHarness, quick};

/// Rigs at a time in the tests that need many.
const RIGS: usize = 4;

fn message() -> Value {
    json!({"initial_message": {"content": [{"type": "text", "text": "hi"}]}})
}

#[tokio::test]
async fn a_start_ends_ready_with_one_of_everything() {
    let rig = WorkerHarness::start(quick()).await;
    let task = rig.begin(&message()).await;
    let done = rig.drive(task.id).await;
    rig.assert_one(task.id, 1, "a plain start").await;
    assert_eq!(done.now.sandbox_id, rig.sandboxes.made().keys().next().cloned());
    assert!(done.now.agent_server_url.is_some());
    // Skills are loaded once.
    assert_eq!(rig.agent.requests_to("POST /api/skills").len(), 1);
    rig.finish().await;
}

/// Whether the model streams depends on the agent server's version; one that does not say is no reason to fail.
#[tokio::test]
async fn the_model_streams_where_tokens_reach_nobody_but_clients() {
    for (version, streams) in
        [("1.15.0", false), ("1.34.0", false), ("1.49.1", true), ("1.58.2", true), ("unknown", false)]
    {
        let rig = WorkerHarness::start(quick()).await;
        rig.agent.set_version(version);
        rig.drive(rig.begin(&message()).await.id).await;
        let created = rig.agent.requests_to("POST /api/conversations").pop().expect("a request").json();
        let agent = &created["agent"];
        assert_eq!(
            (&agent["llm"]["stream"], &agent["condenser"]["llm"]["stream"]),
            (&json!(streams), &json!(false)),
            "{version}"
        );
        rig.finish().await;
    }
    let off = WorkerHarness::start(shared::config::StartConfig { token_streaming: false, ..quick() }).await;
    off.agent.set_version("1.58.2");
    off.drive(off.begin(&message()).await.id).await;
    let created = off.agent.requests_to("POST /api/conversations").pop().expect("a request").json();
    assert_eq!(created["agent"]["llm"]["stream"], false, "it is switched off");
    off.finish().await;
    for kind in [Kind::Status(500, "x".into()), Kind::CutBefore, Kind::Garbage] {
        let rig = WorkerHarness::start(quick()).await;
        rig.agent.set_version("1.58.2");
        rig.agent.inject(Fault::new("GET /server_info", Nth::Always, kind));
        let task = rig.begin(&message()).await;
        assert_eq!(rig.drive(task.id).await.now.status, StartStatus::Ready);
        let created = rig.agent.requests_to("POST /api/conversations").pop().expect("a request").json();
        assert_eq!(created["agent"]["llm"]["stream"], false);
        rig.finish().await;
    }
}

/// How many calls a start makes.
async fn calls_of_a_start() -> Vec<String> {
    let rig = WorkerHarness::start(quick()).await;
    let task = rig.begin(&message()).await;
    rig.gate.arm(usize::MAX, Stop::Refuse);
    rig.drive(task.id).await;
    let calls = rig.gate.calls();
    rig.finish().await;
    assert!(calls.len() > 20, "{calls:?}");
    calls
}

async fn crash_everywhere(moment: Moment) {
    let calls = calls_of_a_start().await;
    stream::iter(1..=calls.len())
        .for_each_concurrent(RIGS, |call| {
            let name = format!("a crash {moment:?} call {call} ({})", calls[call - 1]);
            async move {
                let rig = WorkerHarness::start(quick()).await;
                let task = rig.begin(&message()).await;
                rig.crash_at(task.id, call, Stop::Hang(moment)).await;
                rig.drive(task.id).await;
                rig.assert_one(task.id, 1, &name).await;
                rig.finish().await;
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_before_any_call_leaves_one_of_everything() {
    crash_everywhere(Moment::Before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_after_any_call_leaves_one_of_everything() {
    crash_everywhere(Moment::After).await;
}

/// The worker is not dead but stuck: its lease runs out, another does the work, and then it goes on. So every step is done
/// twice, and overlapping.
async fn late_everywhere(moment: Moment) {
    let calls = calls_of_a_start().await;
    stream::iter(1..=calls.len())
        .for_each_concurrent(RIGS, |call| {
            let name = format!("a worker held {moment:?} call {call} ({})", calls[call - 1]);
            async move {
                let rig = WorkerHarness::start(quick()).await;
                let task = rig.begin(&message()).await;
                rig.gate.arm(call, Stop::Hold(moment));
                let first = rig.receive().await.expect("a message");
                let (context, event) = (rig.context.clone(), WorkerHarness::event(&first));
                let mut late = tokio::spawn(async move { worker::handle(&context, event).await });
                // The number of calls varies a little: the last ones may not come.
                let ended = tokio::select! {
                    ended = &mut late => Some(ended),
                    () = rig.gate.reached() => None,
                };
                rig.drive_with(&rig.other_worker, task.id).await;
                rig.gate.disarm();
                rig.gate.open();
                let ended = match ended {
                    Some(ended) => ended,
                    None => timeout(Duration::from_secs(30), late).await.expect("the late worker goes on and ends"),
                };
                ended.expect("no panic").expect("handled");
                rig.assert_one(task.id, 1, &name).await;
                rig.finish().await;
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_late_before_any_call_changes_nothing() {
    late_everywhere(Moment::Before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_late_after_any_call_changes_nothing() {
    late_everywhere(Moment::After).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn any_call_to_the_store_may_be_refused_once() {
    let calls = calls_of_a_start().await;
    let to_aws: Vec<usize> = (1..=calls.len()).filter(|call| !calls[call - 1].contains(' ')).collect();
    stream::iter(to_aws)
        .for_each_concurrent(RIGS, |call| {
            let name = format!("call {call} ({}) refused", calls[call - 1]);
            async move {
                let rig = WorkerHarness::start(quick()).await;
                let task = rig.begin(&message()).await;
                rig.gate.arm(call, Stop::Refuse);
                rig.drive(task.id).await;
                rig.gate.disarm();
                rig.assert_one(task.id, 1, &name).await;
                rig.finish().await;
            }
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_message_three_times_at_once_is_one_start() {
    let rig = WorkerHarness::start(quick()).await;
    let task = rig.begin(&message()).await;
    let delivered = rig.receive().await.expect("a message");
    join_all((0..3).map(|_| rig.handle(&delivered))).await;
    rig.drive(task.id).await;
    rig.assert_one(task.id, 1, "three deliveries").await;
    assert_eq!(rig.agent.requests_to("POST /api/conversations").len(), 1);
    rig.finish().await;
}

#[tokio::test]
async fn a_lost_message_is_rung_again() {
    let rig = WorkerHarness::start(quick()).await;
    let task = rig.begin(&message()).await;
    rig.purge().await;
    rig.drive(task.id).await;
    rig.assert_one(task.id, 1, "a lost message").await;
    rig.finish().await;
}

#[tokio::test]
async fn a_worker_without_patience_gives_the_start_back_and_ends_it_all_the_same() {
    let rig = WorkerHarness::start(shared::config::StartConfig { inline_wait: Duration::ZERO, ..quick() }).await;
    let task = rig.begin(&message()).await;
    let first = rig.receive().await.expect("a message");
    rig.handle(&first).await;
    let waiting = rig.task(task.id).await;
    assert!(!waiting.now.status.is_final() && waiting.command.is_some(), "{waiting:?}");
    rig.drive(task.id).await;
    rig.assert_one(task.id, 1, "no inline_wait").await;
    rig.finish().await;
}

#[tokio::test]
async fn a_dead_letter_ends_its_start_with_an_error() {
    let rig = WorkerHarness::start(quick()).await;
    let task = rig.begin(&message()).await;
    let dead = rig.receive().await.expect("a message");
    rig.bury(&dead).await;
    let ended = rig.task(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    assert!(ended.now.detail.expect("a detail").contains("given up"));
    rig.finish().await;
}

/// One fault of the agent server, once: the start is READY all the same, and nothing is there twice.
#[tokio::test(flavor = "multi_thread")]
async fn any_single_fault_of_the_agent_server_is_got_over() {
    let routes = [
        "GET /alive",
        "POST /api/bash/start_bash_command",
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
        .for_each_concurrent(RIGS, |(route, kind)| async move {
            let name = format!("{route}: {kind:?}");
            let rig = WorkerHarness::start(quick()).await;
            rig.agent.inject(Fault::new(route, Nth::Next, kind));
            let task = rig.begin(&message()).await;
            rig.drive(task.id).await;
            rig.assert_one(task.id, 1, &name).await;
            rig.finish().await;
        })
        .await;
}

/// The agent server takes longer than we wait, and makes the conversation all the same.
#[tokio::test]
async fn a_conversation_that_is_made_behind_our_back_is_found_and_not_made_again() {
    let rig = WorkerHarness::start(quick()).await;
    let late = Kind::Slow(Duration::from_millis(3500));
    rig.agent.inject(Fault::new("POST /api/conversations", Nth::Next, late));
    let task = rig.begin(&message()).await;
    rig.drive(task.id).await;
    rig.assert_one(task.id, 1, "an answer that came too late").await;
    rig.finish().await;
}

/// Faults that stay: ERROR, with the agent server's own words, and the sandbox is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_fault_that_stays_is_an_error_that_says_why() {
    let broken = || Kind::Status(500, r#"{"detail":"Internal Server Error","exception":"the disk is full"}"#.into());
    let cases = [
        ("POST /api/bash/start_bash_command", broken(), "the disk is full"),
        ("POST /api/conversations", broken(), "the disk is full"),
        ("POST /api/conversations", Kind::Status(422, r#"{"detail":"no such tool"}"#.into()), "no such tool"),
        ("POST /api/conversations", Kind::CutBefore, "cut off"),
    ];
    stream::iter(cases)
        .for_each_concurrent(RIGS, |(route, kind, words)| async move {
            let name = format!("{route}: {kind:?}");
            let rig = WorkerHarness::start(quick()).await;
            rig.agent.inject(Fault::new(route, Nth::Always, kind));
            let task = rig.begin(&message()).await;
            let ended = rig.drive(task.id).await;
            assert_eq!(ended.now.status, StartStatus::Error, "{name}");
            let detail = ended.now.detail.expect("an ERROR has a detail");
            assert!(detail.contains(words), "{name}: {detail}");
            assert!(
                rig.sandboxes.made().values().all(|made| made.deleted),
                "{name}: the sandbox was made for this start"
            );
            assert_eq!(
                rig.conversations
                    .count(&rig.user, &shared::conversation::search::Filter::default())
                    .await
                    .expect("a count"),
                0,
                "{name}"
            );
            rig.finish().await;
        })
        .await;
}

#[tokio::test]
async fn a_crash_while_a_failed_start_is_cleaned_up_keeps_its_reason() {
    let rig = WorkerHarness::start(quick()).await;
    let refusal = Kind::Status(422, r#"{"detail":"no such tool"}"#.into());
    rig.agent.inject(Fault::new("POST /api/conversations", Nth::Always, refusal));
    rig.gate.arm(usize::MAX, Stop::Refuse);
    let first = rig.begin(&message()).await;
    let detail = rig.drive(first.id).await.now.detail.expect("a detail");
    assert!(detail.contains("no such tool"), "{detail}");
    let calls = rig.gate.calls().len();
    for call in calls.saturating_sub(4)..=calls {
        let task = rig.begin(&message()).await;
        rig.crash_at(task.id, call, Stop::Hang(Moment::After)).await;
        let ended = rig.drive(task.id).await;
        assert_eq!(ended.now.detail.as_deref(), Some(detail.as_str()), "a crash after call {call}");
    }
    assert!(rig.sandboxes.made().values().all(|made| made.deleted));
    rig.finish().await;
}

#[tokio::test]
async fn a_missing_model_is_an_error_before_the_sandbox_has_booted() {
    let rig = WorkerHarness::start(quick()).await;
    rig.set_settings(json!({})).await;
    *rig.sandboxes.begins_as.lock().expect("status") = SandboxStatus::Starting;
    let task = rig.begin(&message()).await;
    let detail = rig.drive(task.id).await.now.detail.expect("a detail");
    assert!(detail.contains("LLM_MODEL"), "{detail}");
    assert!(rig.sandboxes.made().values().all(|made| made.deleted));
    rig.finish().await;
}

#[tokio::test]
async fn a_sandbox_that_never_answers_is_an_error_within_its_time() {
    let config = shared::config::StartConfig { sandbox_startup_timeout: Duration::from_secs(1), ..quick() };
    let rig = WorkerHarness::start(config).await;
    *rig.sandboxes.begins_as.lock().expect("status") = SandboxStatus::Starting;
    let task = rig.begin(&message()).await;
    let ended = rig.drive(task.id).await;
    let detail = ended.now.detail.expect("a detail");
    assert!(detail.starts_with("Sandbox failed to start within 1s: "), "{detail}");
    rig.finish().await;
}

#[tokio::test]
async fn a_sandbox_that_ends_during_the_start_is_an_error_that_says_so() {
    let rig = WorkerHarness::start(quick()).await;
    rig.agent.inject(Fault::new("POST /api/skills", Nth::Always, Kind::CutBefore));
    let task = rig.begin(&message()).await;
    let delivered = rig.receive().await.expect("a message");
    let ending = async {
        crate::support::wait::wait_until("the skills are asked for", Duration::from_secs(20), async || {
            !rig.agent.requests_to("POST /api/skills").is_empty()
        })
        .await;
        let id = rig.sandboxes.made().keys().next().cloned().expect("a sandbox");
        rig.sandboxes.set_status(&id, SandboxStatus::Missing);
    };
    tokio::join!(rig.handle(&delivered), ending);
    let ended = rig.drive(task.id).await;
    let detail = ended.now.detail.expect("a detail");
    assert!(detail.contains("ended during the start. It was ended by a test"), "{detail}");
    rig.finish().await;
}

#[tokio::test]
async fn a_paused_sandbox_is_resumed_and_an_unknown_one_is_an_error() {
    let rig = WorkerHarness::start(quick()).await;
    let first = rig.begin(&json!({})).await;
    let sandbox = rig.drive(first.id).await.now.sandbox_id.expect("a sandbox");
    rig.sandboxes.set_status(&sandbox, SandboxStatus::Paused);
    let second = rig.begin(&json!({"sandbox_id": sandbox})).await;
    assert_eq!(rig.drive(second.id).await.now.status, StartStatus::Ready);
    assert_eq!(rig.sandboxes.made()[&sandbox].resumed, 1);
    let lost = rig.begin(&json!({"sandbox_id": "nowhere"})).await;
    assert_eq!(rig.drive(lost.id).await.now.detail.as_deref(), Some("Sandbox not found: nowhere"));
    // Somebody else's start failed in it; it is not that start's to remove.
    assert!(!rig.sandboxes.made()[&sandbox].deleted);
    rig.finish().await;
}

#[tokio::test]
async fn the_same_conversation_started_twice_stays_one() {
    let rig = WorkerHarness::start(quick()).await;
    let id = "aaaa1111-0000-4000-8000-000000000001";
    let mut body = message();
    body["conversation_id"] = id.into();
    body["title"] = "kept".into();
    let first = rig.begin(&body).await;
    rig.drive(first.id).await;
    body["title"] = "not taken".into();
    let second = rig.begin(&body).await;
    rig.drive(second.id).await;
    rig.assert_one(second.id, 1, "the same id again").await;
    let kept = rig.conversations.get(&rig.user, first.conversation_id).await.expect("the store").expect("a record");
    assert_eq!(kept.title.as_deref(), Some("kept"));
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_starts_of_one_conversation_at_once_are_one_conversation() {
    let rig = WorkerHarness::start(quick()).await;
    let mut body = message();
    body["conversation_id"] = "aaaa1111-0000-4000-8000-000000000002".into();
    let (one, two) = (rig.begin(&body).await, rig.begin(&body).await);
    let messages = [rig.receive().await.expect("a message"), rig.receive().await.expect("a message")];
    join_all(messages.iter().map(|message| rig.handle(message))).await;
    rig.drive(one.id).await;
    rig.drive(two.id).await;
    for task in [one, two] {
        rig.assert_one(task.id, 1, "two starts at once").await;
    }
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn many_starts_at_once_in_one_sandbox_do_not_disturb_each_other() {
    let rig = WorkerHarness::start(quick()).await;
    rig.set_settings(json!({"llm_model": "openai/x", "git_user_name": "A", "git_user_email": "a@example.org"})).await;
    let first = rig.begin(&json!({})).await;
    let sandbox = rig.drive(first.id).await.now.sandbox_id.expect("a sandbox");
    let mut tasks = Vec::new();
    for _ in 0..12 {
        tasks.push(rig.begin(&json!({"sandbox_id": sandbox})).await.id);
    }
    let messages: Vec<_> =
        stream::iter(&tasks).then(|_| rig.receive()).filter_map(async |message| message).collect().await;
    join_all(messages.iter().map(|message| rig.handle(message))).await;
    for task in tasks {
        let done = rig.drive(task).await;
        assert_eq!(done.now.status, StartStatus::Ready, "{:?}", done.now.detail);
    }
    assert_eq!(rig.agent.conversations().len(), 13);
    rig.finish().await;
}

#[tokio::test]
async fn a_request_too_large_for_the_record_is_kept_in_the_bucket() {
    let rig = WorkerHarness::start(quick()).await;
    let text = "x".repeat(600_000);
    let task = rig.begin(&json!({"initial_message": {"content": [{"type": "text", "text": text}]}})).await;
    rig.drive(task.id).await;
    rig.assert_one(task.id, 1, "a large request").await;
    let shown = rig.tasks.show_page(&[rig.task(task.id).await]).await.expect("the bucket").into_page(None);
    let shown = serde_json::to_value(shown).expect("JSON");
    assert_eq!(shown["items"][0]["request"]["initial_message"]["content"][0]["text"].as_str(), Some(text.as_str()));
    rig.finish().await;
}

#[tokio::test]
async fn secrets_of_a_request_reach_the_agent_and_show_nowhere() {
    let rig = WorkerHarness::start(quick()).await;
    let task = rig.begin(&json!({"secrets": {"DEPLOY_KEY": "canary-5121"}})).await;
    assert!(!format!("{task:?}").contains("canary-5121"));
    let done = rig.drive(task.id).await;
    assert!(!serde_json::to_string(&done.show()).expect("json").contains("canary-5121"));
    let body = &rig.agent.conversations()[0].body;
    assert_eq!(body["secrets"]["DEPLOY_KEY"]["value"], "canary-5121");
    rig.finish().await;
}
