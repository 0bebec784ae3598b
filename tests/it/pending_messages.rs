//! Messages for conversations that cannot take them yet: each arrives once and in its order, whatever stops the workers.

use std::time::{Duration, Instant};

use axum::body::Body;
use http::Request;
use serde_json::{Value, json};
use shared::config::SandboxConfig;
use shared::http::caller::Caller;
use shared::jobs::deliver_messages::{DeliverMessages, FREQUENT_ATTEMPTS};
use shared::jobs::queue::Job;
use shared::pending_message::delivery::{Addressee, Queued};
use shared::sandbox::SandboxStatus;
use shared::start::request::{Content, TextContent};
use shared::user::UserId;
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::api::Api;
use crate::support::fault_proxy::{Moment, Stop};
use crate::support::stand_in_agent::{Fault, Kind, Nth};
use crate::support::worker_harness::{WorkerHarness, quick};

const END_WITHIN: Duration = Duration::from_secs(180);

fn start_body() -> Value {
    json!({"initial_message": {"content": [{"type": "text", "text": "first"}]}})
}

/// A job that does not continue a wait.
fn job(user: &UserId, conversation: Uuid) -> DeliverMessages {
    DeliverMessages { user: user.clone(), conversation, due_at: None }
}

fn text(text: &str) -> Vec<Content> {
    vec![Content::Text(TextContent { cache_prompt: false, text: text.to_owned() })]
}

pub async fn keep(harness: &WorkerHarness, to: Addressee, said: &str) -> shared::Result<Queued> {
    harness.other_worker.messages.keep(&harness.user, to, &text(said)).await
}

/// The messages that the agent has received, in order.
fn received(harness: &WorkerHarness, conversation: Uuid) -> Vec<String> {
    let messages = harness.agent.messages_delivered(conversation);
    messages.iter().map(|message| message["content"][0]["text"].as_str().expect("text").to_owned()).collect()
}

/// A READY conversation whose agent has received the message `first`.
pub async fn ready(harness: &WorkerHarness) -> (Uuid, Uuid) {
    let task = harness.begin(&start_body()).await;
    let record = harness.drive(task.id).await;
    (task.id, record.conversation_id)
}

/// Handles the queued jobs, and sweeps, until the agent has received all these messages.
pub async fn drive_until_delivered(harness: &WorkerHarness, conversation: Uuid, expected: &[&str], case: &str) {
    let deadline = Instant::now() + END_WITHIN;
    while received(harness, conversation).len() < expected.len() || harness.messages_wait(conversation).await {
        assert!(
            Instant::now() < deadline,
            "{case}: received {:?}, calls {:?}",
            received(harness, conversation),
            harness.gate.calls()
        );
        match harness.receive().await {
            Some(message) => harness.handle(&message).await,
            None => harness.sweep().await,
        }
    }
    assert_eq!(received(harness, conversation), expected, "{case}");
}

#[tokio::test]
async fn messages_before_during_and_after_ready_arrive_once_and_in_order() {
    let harness = WorkerHarness::start(quick()).await;
    let task = harness.begin(&start_body()).await;
    let conversation = task.conversation_id;
    let to = Addressee::Task(task.id);
    for (position, said) in ["one", "two"].iter().enumerate() {
        assert_eq!(keep(&harness, to, said).await.expect("kept").position, position + 1);
    }
    // During: the worker stands in the middle of the start.
    harness.gate.arm(20, Stop::Hold(Moment::Before));
    let message = harness.receive().await.expect("the job");
    let (context, event) = (harness.context.clone(), WorkerHarness::event(&message));
    let worker = tokio::spawn(async move { worker::handle(&context, event).await });
    harness.gate.reached().await;
    keep(&harness, to, "three").await.expect("kept");
    harness.gate.disarm();
    harness.gate.open();
    drop(worker.await.expect("no panic"));
    harness.delete(&message).await;
    harness.drive(task.id).await;
    // After, in both ways of naming the conversation.
    keep(&harness, to, "four").await.expect("kept");
    keep(&harness, Addressee::Conversation(conversation), "five").await.expect("kept");
    drive_until_delivered(&harness, conversation, &["first", "one", "two", "three", "four", "five"], "all").await;
    harness.settle().await;
    keep(&harness, Addressee::Conversation(conversation), "six").await.expect("kept");
    drive_until_delivered(&harness, conversation, &["first", "one", "two", "three", "four", "five", "six"], "later")
        .await;
    assert!(harness.objects().await.iter().all(|key| !key.starts_with("messages/")));
    harness.finish().await;
}

#[tokio::test]
async fn a_crash_at_any_call_neither_loses_nor_repeats_nor_reorders_a_message() {
    let harness = WorkerHarness::start(quick()).await;
    let long = "x".repeat(30_000);
    let expected = ["first", "one", long.as_str(), "three"];
    let queued = async || {
        let (_, conversation) = ready(&harness).await;
        for said in &expected[1..] {
            keep(&harness, Addressee::Conversation(conversation), said).await.expect("kept");
        }
        harness.purge().await;
        conversation
    };
    let conversation = queued().await;
    harness.gate.arm(usize::MAX, Stop::Refuse);
    harness.context.messages.deliver(&job(&harness.user, conversation)).await.expect("delivered");
    let calls = harness.gate.calls();
    assert_eq!(received(&harness, conversation), expected);
    assert!(
        calls.iter().filter(|call| call.starts_with("POST") && call.ends_with("/events")).count() == 3,
        "{calls:?}"
    );
    let mut crashes = 0;
    for number in 1..=calls.len() {
        for moment in [Moment::Before, Moment::After] {
            let case = format!("crash {moment:?} call {number}, {}", calls[number - 1]);
            let conversation = queued().await;
            harness.gate.arm(number, Stop::Hang(moment));
            let messages = harness.context.messages.clone();
            let user = harness.user.clone();
            let mut worker = tokio::spawn(async move { messages.deliver(&job(&user, conversation)).await });
            tokio::select! {
                _ended = &mut worker => {}
                () = harness.gate.reached() => {
                    crashes += 1;
                    worker.abort();
                    let _dropped = worker.await;
                }
            }
            harness.gate.disarm();
            harness.expire_message_lease(conversation).await;
            drive_until_delivered(&harness, conversation, &expected, &case).await;
        }
    }
    assert!(crashes >= calls.len(), "{crashes} crashes at {calls:?}");
    harness.settle().await;
    harness.finish().await;
}

#[tokio::test]
async fn a_store_that_refuses_any_call_delays_a_message_and_no_more() {
    let harness = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&harness).await;
    let mut expected = vec!["first".to_owned(), "message 0".to_owned()];
    keep(&harness, Addressee::Conversation(conversation), "message 0").await.expect("kept");
    harness.gate.arm(usize::MAX, Stop::Refuse);
    harness.context.messages.deliver(&job(&harness.user, conversation)).await.expect("delivered");
    let calls = harness.gate.calls();
    let mut refused = 0;
    let numbered = calls.iter().enumerate().map(|(index, call)| (index + 1, call));
    // The SDK repeats a call whose response was lost.
    let stops = [Stop::Refuse, Stop::LoseResponses(1)];
    for (stop, (number, call)) in stops.into_iter().flat_map(|stop| numbered.clone().map(move |call| (stop, call))) {
        // Those of DynamoDB have names without a path.
        if !call.chars().all(char::is_alphanumeric) {
            continue;
        }
        let said = format!("message {number} {stop:?}");
        keep(&harness, Addressee::Conversation(conversation), &said).await.expect("kept");
        expected.push(said);
        harness.purge().await;
        harness.gate.arm(number, stop);
        let delivered = harness.context.messages.deliver(&job(&harness.user, conversation)).await;
        assert!(harness.gate.is_reached(), "{call}: {delivered:?}");
        refused += 1;
        harness.gate.disarm();
        harness.expire_message_lease(conversation).await;
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        drive_until_delivered(&harness, conversation, &expected, &format!("{stop:?} at {call}: {delivered:?}")).await;
    }
    assert!(refused >= 4, "{calls:?}");
    harness.settle().await;
    harness.finish().await;
}

#[tokio::test]
async fn an_agent_server_that_fails_gets_each_message_once() {
    let harness = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&harness).await;
    let mut expected = vec!["first".to_owned()];
    let route = "POST /api/conversations/{id}/events";
    let refused = r#"{"detail": "no"}"#.to_owned();
    for (index, kind) in [
        Kind::Status(500, refused.clone()),
        Kind::Status(404, refused.clone()),
        Kind::StatusAfter(500, refused.clone()),
        Kind::StatusAfter(503, refused),
        Kind::CutBefore,
        Kind::CutAfter,
        Kind::Garbage,
    ]
    .into_iter()
    .enumerate()
    {
        harness.agent.inject(Fault::new(route, Nth::Next, kind.clone()));
        for said in [format!("{index} a"), format!("{index} b")] {
            keep(&harness, Addressee::Conversation(conversation), &said).await.expect("kept");
            expected.push(said);
        }
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        drive_until_delivered(&harness, conversation, &expected, &format!("{kind:?}")).await;
        harness.agent.clear_faults();
    }
    // The same words again are another message.
    for _ in 0..2 {
        keep(&harness, Addressee::Conversation(conversation), "again").await.expect("kept");
        expected.push("again".to_owned());
    }
    let all: Vec<&str> = expected.iter().map(String::as_str).collect();
    drive_until_delivered(&harness, conversation, &all, "the same words").await;
    // Neither the way there nor the look back answers.
    harness.agent.inject(Fault::new("GET /api/conversations/{id}/events/search", Nth::On(2), Kind::CutBefore));
    harness.agent.inject(Fault::new(route, Nth::Next, Kind::CutAfter));
    keep(&harness, Addressee::Conversation(conversation), "last").await.expect("kept");
    let all: Vec<&str> = all.into_iter().chain(["last"]).collect();
    drive_until_delivered(&harness, conversation, &all, "no look back").await;
    harness.settle().await;
    harness.finish().await;
}

/// How often a message was sent until the agent server's errors were taken for permanent.
async fn drive_until_given_up(harness: &WorkerHarness, conversation: Uuid) -> usize {
    let before = harness.agent.requests_to("POST /api/conversations/{id}/events").len();
    let deadline = Instant::now() + END_WITHIN;
    while harness.messages_are_due(conversation).await {
        assert!(Instant::now() < deadline, "calls {:?}", harness.gate.calls());
        match harness.receive().await {
            Some(message) => harness.handle(&message).await,
            None => harness.sweep().await,
        }
    }
    harness.settle().await;
    harness.agent.requests_to("POST /api/conversations/{id}/events").len() - before
}

#[tokio::test]
async fn a_message_that_an_agent_server_never_takes_waits_for_the_next_one() {
    let harness = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&harness).await;
    let plugin = r#"{"detail":"Internal Server Error","exception":"Local plugin path does not exist: /nowhere"}"#;
    let unknown = r#"{"detail":"Internal Server Error","exception":"a new kind of fault"}"#;
    let mut expected = vec!["first".to_owned()];
    for (answer, status, tries) in [(plugin, 500, 1), (unknown, 500, 3), (unknown, 404, 3)] {
        harness.agent.fail_setup(None, status, answer);
        let said = format!("{status} {tries}");
        keep(&harness, Addressee::Conversation(conversation), &said).await.expect("kept");
        expected.push(said);
        assert_eq!(drive_until_given_up(&harness, conversation).await, tries, "{status} {answer}");
        harness.sweep().await;
        assert_eq!(harness.waiting_messages().await, 0, "no worker processes it any more");
        assert!(harness.messages_wait(conversation).await, "it is kept");
        // The next message has both tried again, as often as the first was.
        let said = format!("again {status} {tries}");
        keep(&harness, Addressee::Conversation(conversation), &said).await.expect("kept");
        expected.push(said);
        assert_eq!(drive_until_given_up(&harness, conversation).await, tries, "again {status} {answer}");
        // The next message has all delivered, as soon as the agent server takes them.
        harness.agent.clear_setup_failure();
        let said = format!("after {status} {tries}");
        keep(&harness, Addressee::Conversation(conversation), &said).await.expect("kept");
        expected.push(said);
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        drive_until_delivered(&harness, conversation, &expected, &format!("after {status} {answer}")).await;
    }
    harness.settle().await;
    harness.finish().await;
}

/// Its own job finds the queue claimed and ends, so the worker that abandons the queue must not leave the message in it.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_comes_during_the_last_try_is_tried_too() {
    const SEND: &str = "POST /api/conversations/{id}/events";
    let harness = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&harness).await;
    let before = harness.agent.requests_to(SEND).len();
    harness.agent.fail_setup(None, 500, r#"{"exception":"Local plugin path does not exist: /nowhere"}"#);
    harness.agent.inject(Fault::new(SEND, Nth::Next, Kind::Slow(Duration::from_secs(2))));
    keep(&harness, Addressee::Conversation(conversation), "one").await.expect("kept");
    let mut message = harness.receive().await;
    while message.is_none() {
        message = harness.receive().await;
    }
    let message = message.expect("a message");
    let add_another = async {
        while harness.agent.requests_to(SEND).len() == before {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        keep(&harness, Addressee::Conversation(conversation), "two").await.expect("kept");
    };
    tokio::join!(harness.handle(&message), add_another);
    assert_eq!(harness.agent.requests_to(SEND).len() - before, 2, "tried again because of the second message");
    assert!(!harness.messages_are_due(conversation).await);
    harness.settle().await;
    harness.finish().await;
}

/// Errors that come between reasons to wait are not in a row.
#[tokio::test]
async fn an_agent_server_that_cannot_be_reached_between_two_errors_begins_the_count_again() {
    let harness = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&harness).await;
    for nth in 1..=9 {
        let status = if nth % 3 == 0 { 503 } else { 500 };
        let answer = r#"{"exception":"a new kind of fault"}"#.to_owned();
        harness.agent.inject(Fault::new(
            "POST /api/conversations/{id}/events",
            Nth::On(nth),
            Kind::Status(status, answer),
        ));
    }
    keep(&harness, Addressee::Conversation(conversation), "one").await.expect("kept");
    drive_until_delivered(&harness, conversation, &["first", "one"], "errors that are not in a row").await;
    harness.settle().await;
    harness.finish().await;
}

#[tokio::test]
async fn a_message_that_a_busy_agent_has_accepted_is_not_sent_again() {
    let harness = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&harness).await;
    // The agent thinks for longer than anybody waits for an answer; what was sent comes in when it is done.
    harness.agent.set_execution_status(conversation, "running");
    let step = Duration::from_secs(6);
    harness.agent.inject(Fault::new("POST /api/conversations/{id}/events", Nth::Next, Kind::Slow(step)));
    for said in ["one", "two"] {
        keep(&harness, Addressee::Conversation(conversation), said).await.expect("kept");
    }
    drive_until_delivered(&harness, conversation, &["first", "one", "two"], "at work").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(received(&harness, conversation), ["first", "one", "two"]);
    assert_eq!(harness.agent.requests_to("POST /api/conversations/{id}/events").len(), 2, "each was sent once");
    harness.settle().await;
    harness.finish().await;
}

#[tokio::test]
async fn many_workers_and_a_lost_job_change_nothing() {
    let harness = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&harness).await;
    for said in ["one", "two", "three"] {
        keep(&harness, Addressee::Conversation(conversation), said).await.expect("kept");
    }
    let job = job(&harness.user, conversation);
    let workers = (0..8).map(|_| harness.other_worker.messages.deliver(&job));
    for done in futures::future::join_all(workers).await {
        done.expect("delivered, or left to another one");
    }
    let all = ["first", "one", "two", "three"];
    drive_until_delivered(&harness, conversation, &all, "eight workers").await;
    // The job is lost; the sweep finds the row.
    keep(&harness, Addressee::Conversation(conversation), "four").await.expect("kept");
    harness.purge().await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(harness.other_worker.messages.sweep().await.expect("swept"), 1);
    drive_until_delivered(&harness, conversation, &["first", "one", "two", "three", "four"], "swept").await;
    harness.settle().await;
    assert_eq!(harness.other_worker.messages.sweep().await.expect("swept"), 0, "an empty queue leaves nothing behind");
    harness.finish().await;
}

#[tokio::test]
async fn messages_wait_for_their_sandbox_and_resume_a_paused_one() {
    let harness = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&harness).await;
    let sandbox = harness.sandboxes.made().into_keys().next().expect("a sandbox");
    for status in [SandboxStatus::Paused, SandboxStatus::Starting, SandboxStatus::Error, SandboxStatus::Missing] {
        harness.sandboxes.set_status(&sandbox, status);
        keep(&harness, Addressee::Conversation(conversation), &format!("{status:?}")).await.expect("kept");
        harness.other_worker.messages.deliver(&job(&harness.user, conversation)).await.expect("postponed");
        assert_eq!(received(&harness, conversation), ["first"], "{status:?}");
    }
    assert_eq!(harness.sandboxes.made()[&sandbox].resumed, 1, "the paused one");
    harness.sandboxes.set_status(&sandbox, SandboxStatus::Running);
    drive_until_delivered(&harness, conversation, &["first", "Paused", "Starting", "Error", "Missing"], "resumed")
        .await;
    harness.settle().await;
    harness.finish().await;
}

/// Each of several jobs for one queue that has to wait enqueues the next job; only the last one of these continues the wait.
#[tokio::test]
async fn a_wait_is_continued_by_one_job() {
    let harness = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&harness).await;
    let sandbox = harness.sandboxes.made().into_keys().next().expect("a sandbox");
    harness.sandboxes.set_status(&sandbox, SandboxStatus::Starting);
    keep(&harness, Addressee::Conversation(conversation), "wait").await.expect("kept");
    harness.purge().await;
    let mut messages = harness.other_worker.messages.clone();
    messages.timing.sweep_delay = Duration::from_secs(60);
    for _ in 0..3 {
        messages.deliver(&job(&harness.user, conversation)).await.expect("postponed");
    }
    for expected in [3, 1, 1] {
        let mut received = Vec::new();
        let until = Instant::now() + Duration::from_secs(4);
        while received.len() < expected && Instant::now() < until {
            received.extend(harness.receive().await);
        }
        assert_eq!(received.len(), expected);
        for message in received {
            let Ok(Job::DeliverMessages(job)) = Job::from_body(message.body.as_deref().unwrap_or_default()) else {
                panic!("{message:?}")
            };
            assert!(job.due_at.is_some(), "{job:?}");
            messages.deliver(&job).await.expect("postponed, or left to another job");
            harness.delete(&message).await;
        }
    }
    harness.sandboxes.set_status(&sandbox, SandboxStatus::Running);
    messages.deliver(&job(&harness.user, conversation)).await.expect("delivered");
    assert_eq!(received(&harness, conversation), ["first", "wait"]);
    harness.finish().await;
}

#[tokio::test]
async fn messages_for_a_sandbox_that_is_gone_wait_for_the_next_one() {
    let harness = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&harness).await;
    let sandbox = harness.sandboxes.made().into_keys().next().expect("a sandbox");
    let messages = &harness.other_worker.messages;
    harness.sandboxes.set_status(&sandbox, SandboxStatus::Missing);
    keep(&harness, Addressee::Conversation(conversation), "one").await.expect("kept");
    for attempt in 0..=FREQUENT_ATTEMPTS + 1 {
        assert!(harness.messages_are_due(conversation).await, "{attempt}");
        messages.deliver(&job(&harness.user, conversation)).await.expect("postponed");
    }
    assert!(!harness.messages_are_due(conversation).await);
    harness.purge().await;
    harness.sandboxes.set_status(&sandbox, SandboxStatus::Running);
    keep(&harness, Addressee::Conversation(conversation), "two").await.expect("kept");
    drive_until_delivered(&harness, conversation, &["first", "one", "two"], "the sandbox is back").await;
    harness.finish().await;
}

#[tokio::test]
async fn messages_to_a_start_that_fails_stay_until_they_go_with_it() {
    let harness = WorkerHarness::start(quick()).await;
    harness.set_settings(json!({})).await;
    let task = harness.begin(&start_body()).await;
    let to = Addressee::Task(task.id);
    keep(&harness, to, &"x".repeat(30_000)).await.expect("kept");
    let record = harness.drive(task.id).await;
    assert_eq!(record.now.status, shared::start::task::StartStatus::Error);
    harness.settle().await;
    assert!(harness.messages_wait(task.conversation_id).await, "nothing is lost");
    assert_eq!(harness.other_worker.messages.sweep().await.expect("swept"), 0, "and enqueues nothing");
    let refused = keep(&harness, to, "more").await.expect_err("it failed");
    assert!(matches!(refused, shared::Error::Conflict(_)), "{refused:?}");

    // Deleted with the conversation, in the bucket too.
    harness.set_settings(json!({"llm_model": "any", "llm_api_key": "any"})).await;
    let (_, conversation) = ready(&harness).await;
    let sandbox = harness.sandboxes.made().into_keys().next_back().expect("a sandbox");
    harness.sandboxes.set_status(&sandbox, SandboxStatus::Paused);
    keep(&harness, Addressee::Conversation(conversation), &"y".repeat(30_000)).await.expect("kept");
    let before = harness.objects().await.len();
    assert!(harness.other_worker.deletion.deleter.delete(&harness.user, conversation).await.expect("deleted"));
    let refused = keep(&harness, Addressee::Conversation(conversation), "more").await.expect_err("it is gone");
    assert!(matches!(refused, shared::Error::NotFound(_)), "{refused:?}");
    harness.settle().await;
    assert!(!harness.messages_wait(conversation).await);
    assert_eq!(harness.objects().await.len(), before - 1);
    harness.finish().await;
}

#[tokio::test]
async fn the_route_keeps_ten_messages_and_says_what_is_wrong_with_others() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("somebody");
    let (status, task) = api.call(&user, "POST", "/api/v1/app-conversations", Some(&json!({}))).await;
    assert_eq!(status, 200, "{task}");
    let task = task["id"].as_str().expect("an id").to_owned();
    let send = async |to: &str, body: &str| {
        let request = Request::post(format!("/api/v1/conversations/{to}/pending-messages"));
        // Whatever it calls itself.
        let request = request.header("content-type", "text/plain").extension(Caller(user.clone()));
        api.send(request.body(Body::from(body.to_owned())).expect("a request")).await
    };
    let to = format!("task-{task}");
    let good = r#"{"content": [{"type": "text", "text": "Hello"}]}"#;
    let (status, first) = send(&to, good).await;
    let id = first["id"].as_str().expect("an id");
    assert_eq!((status, &first), (201, &json!({"id": id, "queued": true, "position": 1})));
    assert_eq!(id.len(), 36, "with dashes: {id}");
    for (body, expected) in [
        ("{", "Invalid request body"),
        ("[1]", "Invalid request body"),
        ("{}", "content must be a non-empty list"),
        (r#"{"content": []}"#, "content must be a non-empty list"),
        (r#"{"content": [{"text": "x"}], "role": "tool"}"#, "role must be user"),
    ] {
        assert_eq!(send(&to, body).await, (400, json!({"detail": expected})), "{body}");
    }
    let (status, response) = send(&to, r#"{"content": [{"type": "text"}]}"#).await;
    assert!(
        status == 400 && response["detail"].as_str().is_some_and(|text| text.starts_with("Invalid content format: ")),
        "{response}"
    );
    for (unknown, expected) in [
        ("task-00000000000000000000000000000001", "Start not found"),
        ("00000000000000000000000000000001", "Conversation not found"),
        ("00000000-0000-0000-0000-000000000001", "Conversation not found"),
        ("task-", "Conversation not found"),
        ("anything", "Conversation not found"),
    ] {
        assert_eq!(send(unknown, good).await, (404, json!({"detail": expected})), "{unknown}");
    }
    // Twenty at once: the limit leaves nine.
    let answers = futures::future::join_all((0..20).map(|_| send(&to, good))).await;
    let mut positions: Vec<u64> = Vec::new();
    let full = json!({"detail": "Too many pending messages. Maximum 10 messages per conversation."});
    for (status, response) in answers {
        match status {
            201 => positions.push(response["position"].as_u64().expect("a number")),
            status => assert_eq!((status, &response), (429, &full)),
        }
    }
    positions.sort_unstable();
    assert_eq!(positions, (2..=10).collect::<Vec<u64>>());
    let large = json!({"content": [{"type": "text", "text": "x".repeat(6_000_000)}]}).to_string();
    assert_eq!(send(&to, &large).await.0, 413);
    api.stop().await;
}

#[test]
fn what_a_job_of_this_kind_looks_like_on_the_queue() {
    let body = r#"{"v":1,"type":"deliver_messages","user":"u","conversation":"00000000000000000000000000000001"}"#;
    let read = Job::from_body(body).expect("a job");
    assert_eq!(read, Job::DeliverMessages(job(&UserId::new("u"), Uuid::from_u128(1))));
}
