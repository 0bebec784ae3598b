//! Messages for conversations that cannot take them yet: each arrives once and in its order, whatever stops the workers.

use std::time::{Duration, Instant};

use axum::body::Body;
use http::Request;
use serde_json::{Value, json};
use shared::config::SandboxConfig;
use shared::http::caller::Caller;
use shared::jobs::deliver_messages::DeliverMessages;
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

fn text(text: &str) -> Vec<Content> {
    vec![Content::Text(TextContent { cache_prompt: false, text: text.to_owned() })]
}

async fn keep(rig: &WorkerHarness, to: Addressee, said: &str) -> shared::Result<Queued> {
    rig.other_worker.messages.keep(&rig.user, to, &text(said)).await
}

/// What the agent was told, in order.
fn told(rig: &WorkerHarness, conversation: Uuid) -> Vec<String> {
    let messages = rig.agent.messages_delivered(conversation);
    messages.iter().map(|message| message["content"][0]["text"].as_str().expect("text").to_owned()).collect()
}

/// A conversation that is ready and was told `first`.
async fn ready(rig: &WorkerHarness) -> (Uuid, Uuid) {
    let task = rig.begin(&start_body()).await;
    let record = rig.drive(task.id).await;
    (task.id, record.conversation_id)
}

/// Works on what is queued, and sweeps, until the agent was told all of this.
async fn drive_until_told(rig: &WorkerHarness, conversation: Uuid, expected: &[&str], case: &str) {
    let deadline = Instant::now() + END_WITHIN;
    while told(rig, conversation).len() < expected.len() || rig.messages_wait(conversation).await {
        assert!(Instant::now() < deadline, "{case}: told {:?}, calls {:?}", told(rig, conversation), rig.gate.calls());
        match rig.receive().await {
            Some(message) => rig.handle(&message).await,
            None => rig.sweep().await,
        }
    }
    assert_eq!(told(rig, conversation), expected, "{case}");
}

#[tokio::test]
async fn messages_before_during_and_after_ready_arrive_once_and_in_order() {
    let rig = WorkerHarness::start(quick()).await;
    let task = rig.begin(&start_body()).await;
    let conversation = task.conversation_id;
    let to = Addressee::Task(task.id);
    for (position, said) in ["one", "two"].iter().enumerate() {
        assert_eq!(keep(&rig, to, said).await.expect("kept").position, position + 1);
    }
    // During: the worker stands in the middle of the start.
    rig.gate.arm(20, Stop::Hold(Moment::Before));
    let message = rig.receive().await.expect("the bell");
    let (context, event) = (rig.context.clone(), WorkerHarness::event(&message));
    let worker = tokio::spawn(async move { worker::handle(&context, event).await });
    rig.gate.reached().await;
    keep(&rig, to, "three").await.expect("kept");
    rig.gate.disarm();
    rig.gate.open();
    drop(worker.await.expect("no panic"));
    rig.delete(&message).await;
    rig.drive(task.id).await;
    // After, in both ways of naming the conversation.
    keep(&rig, to, "four").await.expect("kept");
    keep(&rig, Addressee::Conversation(conversation), "five").await.expect("kept");
    drive_until_told(&rig, conversation, &["first", "one", "two", "three", "four", "five"], "all").await;
    rig.settle().await;
    keep(&rig, Addressee::Conversation(conversation), "six").await.expect("kept");
    drive_until_told(&rig, conversation, &["first", "one", "two", "three", "four", "five", "six"], "later").await;
    assert!(rig.objects().await.iter().all(|key| !key.starts_with("messages/")));
    rig.finish().await;
}

#[tokio::test]
async fn a_crash_at_any_call_neither_loses_nor_repeats_nor_reorders_a_message() {
    let rig = WorkerHarness::start(quick()).await;
    let long = "x".repeat(30_000);
    let expected = ["first", "one", long.as_str(), "three"];
    let queued = async || {
        let (_, conversation) = ready(&rig).await;
        for said in &expected[1..] {
            keep(&rig, Addressee::Conversation(conversation), said).await.expect("kept");
        }
        rig.purge().await;
        conversation
    };
    let conversation = queued().await;
    rig.gate.arm(usize::MAX, Stop::Refuse);
    rig.context.messages.deliver(&rig.user, conversation).await.expect("delivered");
    let calls = rig.gate.calls();
    assert_eq!(told(&rig, conversation), expected);
    assert!(
        calls.iter().filter(|call| call.starts_with("POST") && call.ends_with("/events")).count() == 3,
        "{calls:?}"
    );
    let mut crashes = 0;
    for number in 1..=calls.len() {
        for moment in [Moment::Before, Moment::After] {
            let case = format!("crash {moment:?} call {number}, {}", calls[number - 1]);
            let conversation = queued().await;
            rig.gate.arm(number, Stop::Hang(moment));
            let messages = rig.context.messages.clone();
            let user = rig.user.clone();
            let mut worker = tokio::spawn(async move { messages.deliver(&user, conversation).await });
            tokio::select! {
                _ended = &mut worker => {}
                () = rig.gate.reached() => {
                    crashes += 1;
                    worker.abort();
                    let _dropped = worker.await;
                }
            }
            rig.gate.disarm();
            rig.expire_message_lease(conversation).await;
            drive_until_told(&rig, conversation, &expected, &case).await;
        }
    }
    assert!(crashes >= calls.len(), "{crashes} crashes at {calls:?}");
    rig.settle().await;
    rig.finish().await;
}

#[tokio::test]
async fn a_store_that_refuses_any_call_delays_a_message_and_no_more() {
    let rig = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&rig).await;
    let mut expected = vec!["first".to_owned(), "message 0".to_owned()];
    keep(&rig, Addressee::Conversation(conversation), "message 0").await.expect("kept");
    rig.gate.arm(usize::MAX, Stop::Refuse);
    rig.context.messages.deliver(&rig.user, conversation).await.expect("delivered");
    let calls = rig.gate.calls();
    let mut refused = 0;
    for (number, call) in calls.iter().enumerate().map(|(index, call)| (index + 1, call)) {
        // Those of DynamoDB have names without a path.
        if !call.chars().all(char::is_alphanumeric) {
            continue;
        }
        let said = format!("message {number}");
        keep(&rig, Addressee::Conversation(conversation), &said).await.expect("kept");
        expected.push(said);
        rig.purge().await;
        rig.gate.arm(number, Stop::Refuse);
        let delivered = rig.context.messages.deliver(&rig.user, conversation).await;
        assert!(rig.gate.is_reached(), "{call}: {delivered:?}");
        refused += 1;
        rig.gate.disarm();
        rig.expire_message_lease(conversation).await;
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        drive_until_told(&rig, conversation, &expected, &format!("{call} refused: {delivered:?}")).await;
    }
    assert!(refused >= 4, "{calls:?}");
    rig.settle().await;
    rig.finish().await;
}

#[tokio::test]
async fn an_agent_server_that_fails_is_tried_again_and_never_told_twice() {
    let rig = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&rig).await;
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
        rig.agent.inject(Fault::new(route, Nth::Next, kind.clone()));
        for said in [format!("{index} a"), format!("{index} b")] {
            keep(&rig, Addressee::Conversation(conversation), &said).await.expect("kept");
            expected.push(said);
        }
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        drive_until_told(&rig, conversation, &expected, &format!("{kind:?}")).await;
        rig.agent.clear_faults();
    }
    // The same words again are another message.
    for _ in 0..2 {
        keep(&rig, Addressee::Conversation(conversation), "again").await.expect("kept");
        expected.push("again".to_owned());
    }
    let all: Vec<&str> = expected.iter().map(String::as_str).collect();
    drive_until_told(&rig, conversation, &all, "the same words").await;
    // Neither the way there nor the look back answers.
    rig.agent.inject(Fault::new("GET /api/conversations/{id}/events/search", Nth::On(2), Kind::CutBefore));
    rig.agent.inject(Fault::new(route, Nth::Next, Kind::CutAfter));
    keep(&rig, Addressee::Conversation(conversation), "last").await.expect("kept");
    let all: Vec<&str> = all.into_iter().chain(["last"]).collect();
    drive_until_told(&rig, conversation, &all, "no look back").await;
    rig.settle().await;
    rig.finish().await;
}

/// How often a message was sent until the agent server's errors were taken for permanent.
async fn drive_until_given_up(rig: &WorkerHarness, conversation: Uuid) -> usize {
    let before = rig.agent.requests_to("POST /api/conversations/{id}/events").len();
    let deadline = Instant::now() + END_WITHIN;
    while rig.messages_are_due(conversation).await {
        assert!(Instant::now() < deadline, "calls {:?}", rig.gate.calls());
        match rig.receive().await {
            Some(message) => rig.handle(&message).await,
            None => rig.sweep().await,
        }
    }
    rig.settle().await;
    rig.agent.requests_to("POST /api/conversations/{id}/events").len() - before
}

#[tokio::test]
async fn a_message_that_an_agent_server_never_takes_waits_for_the_next_one() {
    let rig = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&rig).await;
    let plugin = r#"{"detail":"Internal Server Error","exception":"Local plugin path does not exist: /nowhere"}"#;
    let unknown = r#"{"detail":"Internal Server Error","exception":"a new kind of fault"}"#;
    let mut expected = vec!["first".to_owned()];
    for (answer, status, tries) in [(plugin, 500, 1), (unknown, 500, 3), (unknown, 404, 3)] {
        rig.agent.fail_setup(None, status, answer);
        let said = format!("{status} {tries}");
        keep(&rig, Addressee::Conversation(conversation), &said).await.expect("kept");
        expected.push(said);
        assert_eq!(drive_until_given_up(&rig, conversation).await, tries, "{status} {answer}");
        rig.sweep().await;
        assert_eq!(rig.waiting_messages().await, 0, "nobody looks after it any more");
        assert!(rig.messages_wait(conversation).await, "it is kept");
        // The next message has both tried again, as often as the first was.
        let said = format!("again {status} {tries}");
        keep(&rig, Addressee::Conversation(conversation), &said).await.expect("kept");
        expected.push(said);
        assert_eq!(drive_until_given_up(&rig, conversation).await, tries, "again {status} {answer}");
        // The next message has all delivered, as soon as the agent server takes them.
        rig.agent.clear_setup_failure();
        let said = format!("after {status} {tries}");
        keep(&rig, Addressee::Conversation(conversation), &said).await.expect("kept");
        expected.push(said);
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        drive_until_told(&rig, conversation, &expected, &format!("after {status} {answer}")).await;
    }
    rig.settle().await;
    rig.finish().await;
}

/// Its own job finds the queue claimed and ends, so the worker that gives up must not leave it behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_comes_during_the_last_try_is_tried_too() {
    const SEND: &str = "POST /api/conversations/{id}/events";
    let rig = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&rig).await;
    let before = rig.agent.requests_to(SEND).len();
    rig.agent.fail_setup(None, 500, r#"{"exception":"Local plugin path does not exist: /nowhere"}"#);
    rig.agent.inject(Fault::new(SEND, Nth::Next, Kind::Slow(Duration::from_secs(2))));
    keep(&rig, Addressee::Conversation(conversation), "one").await.expect("kept");
    let mut message = rig.receive().await;
    while message.is_none() {
        message = rig.receive().await;
    }
    let message = message.expect("a message");
    let add_another = async {
        while rig.agent.requests_to(SEND).len() == before {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        keep(&rig, Addressee::Conversation(conversation), "two").await.expect("kept");
    };
    tokio::join!(rig.handle(&message), add_another);
    assert_eq!(rig.agent.requests_to(SEND).len() - before, 2, "tried again because of the second message");
    assert!(!rig.messages_are_due(conversation).await);
    rig.settle().await;
    rig.finish().await;
}

/// Errors that come between reasons to wait are not in a row.
#[tokio::test]
async fn an_agent_server_that_cannot_be_reached_between_two_errors_begins_the_count_again() {
    let rig = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&rig).await;
    for nth in 1..=9 {
        let status = if nth % 3 == 0 { 503 } else { 500 };
        let answer = r#"{"exception":"a new kind of fault"}"#.to_owned();
        rig.agent.inject(Fault::new("POST /api/conversations/{id}/events", Nth::On(nth), Kind::Status(status, answer)));
    }
    keep(&rig, Addressee::Conversation(conversation), "one").await.expect("kept");
    drive_until_told(&rig, conversation, &["first", "one"], "errors that are not in a row").await;
    rig.settle().await;
    rig.finish().await;
}

#[tokio::test]
async fn a_message_that_stands_at_the_door_of_an_agent_at_work_is_not_sent_again() {
    let rig = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&rig).await;
    // The agent thinks for longer than anybody waits for an answer; what was sent comes in when it is done.
    rig.agent.set_execution_status(conversation, "running");
    let step = Duration::from_secs(6);
    rig.agent.inject(Fault::new("POST /api/conversations/{id}/events", Nth::Next, Kind::Slow(step)));
    for said in ["one", "two"] {
        keep(&rig, Addressee::Conversation(conversation), said).await.expect("kept");
    }
    drive_until_told(&rig, conversation, &["first", "one", "two"], "at work").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(told(&rig, conversation), ["first", "one", "two"]);
    assert_eq!(rig.agent.requests_to("POST /api/conversations/{id}/events").len(), 2, "each was sent once");
    rig.settle().await;
    rig.finish().await;
}

#[tokio::test]
async fn many_workers_and_a_lost_bell_change_nothing() {
    let rig = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&rig).await;
    for said in ["one", "two", "three"] {
        keep(&rig, Addressee::Conversation(conversation), said).await.expect("kept");
    }
    let workers = (0..8).map(|_| rig.other_worker.messages.deliver(&rig.user, conversation));
    for done in futures::future::join_all(workers).await {
        done.expect("delivered, or left to another one");
    }
    let all = ["first", "one", "two", "three"];
    drive_until_told(&rig, conversation, &all, "eight workers").await;
    // Nobody hears the bell; the sweep finds the row.
    keep(&rig, Addressee::Conversation(conversation), "four").await.expect("kept");
    rig.purge().await;
    tokio::time::sleep(Duration::from_millis(400)).await;
    assert_eq!(rig.other_worker.messages.sweep().await.expect("swept"), 1);
    drive_until_told(&rig, conversation, &["first", "one", "two", "three", "four"], "swept").await;
    rig.settle().await;
    assert_eq!(rig.other_worker.messages.sweep().await.expect("swept"), 0, "an empty queue leaves nothing behind");
    rig.finish().await;
}

#[tokio::test]
async fn a_paused_sandbox_gets_its_messages_when_it_is_resumed() {
    let rig = WorkerHarness::start(quick()).await;
    let (_, conversation) = ready(&rig).await;
    let sandbox = rig.sandboxes.made().into_keys().next().expect("a sandbox");
    for status in [SandboxStatus::Paused, SandboxStatus::Starting, SandboxStatus::Error, SandboxStatus::Missing] {
        rig.sandboxes.set_status(&sandbox, status);
        keep(&rig, Addressee::Conversation(conversation), &format!("{status:?}")).await.expect("kept");
        rig.other_worker.messages.deliver(&rig.user, conversation).await.expect("postponed");
        assert_eq!(told(&rig, conversation), ["first"], "{status:?}");
    }
    rig.sandboxes.set_status(&sandbox, SandboxStatus::Running);
    drive_until_told(&rig, conversation, &["first", "Paused", "Starting", "Error", "Missing"], "resumed").await;
    rig.settle().await;
    rig.finish().await;
}

#[tokio::test]
async fn messages_to_a_start_that_fails_stay_until_they_go_with_it() {
    let rig = WorkerHarness::start(quick()).await;
    rig.set_settings(json!({})).await;
    let task = rig.begin(&start_body()).await;
    let to = Addressee::Task(task.id);
    keep(&rig, to, &"x".repeat(30_000)).await.expect("kept");
    let record = rig.drive(task.id).await;
    assert_eq!(record.now.status, shared::start::task::StartStatus::Error);
    rig.settle().await;
    assert!(rig.messages_wait(task.conversation_id).await, "nothing is lost");
    assert_eq!(rig.other_worker.messages.sweep().await.expect("swept"), 0, "and nobody is rung for it");
    let refused = keep(&rig, to, "more").await.expect_err("it failed");
    assert!(matches!(refused, shared::Error::Conflict(_)), "{refused:?}");

    // Deleted with the conversation, in the bucket too.
    rig.set_settings(json!({"llm_model": "any", "llm_api_key": "any"})).await;
    let (_, conversation) = ready(&rig).await;
    let sandbox = rig.sandboxes.made().into_keys().next_back().expect("a sandbox");
    rig.sandboxes.set_status(&sandbox, SandboxStatus::Paused);
    keep(&rig, Addressee::Conversation(conversation), &"y".repeat(30_000)).await.expect("kept");
    let before = rig.objects().await.len();
    assert!(rig.other_worker.deletion.deleter.delete(&rig.user, conversation).await.expect("deleted"));
    let refused = keep(&rig, Addressee::Conversation(conversation), "more").await.expect_err("it is gone");
    assert!(matches!(refused, shared::Error::NotFound(_)), "{refused:?}");
    rig.settle().await;
    assert!(!rig.messages_wait(conversation).await);
    assert_eq!(rig.objects().await.len(), before - 1);
    rig.finish().await;
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
    let (status, told) = send(&to, r#"{"content": [{"type": "text"}]}"#).await;
    assert!(
        status == 400 && told["detail"].as_str().is_some_and(|text| text.starts_with("Invalid content format: ")),
        "{told}"
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
    // Twenty at once: nine have room.
    let answers = futures::future::join_all((0..20).map(|_| send(&to, good))).await;
    let mut positions: Vec<u64> = Vec::new();
    let full = json!({"detail": "Too many pending messages. Maximum 10 messages per conversation."});
    for (status, told) in answers {
        match status {
            201 => positions.push(told["position"].as_u64().expect("a number")),
            status => assert_eq!((status, &told), (429, &full)),
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
    let job = Job::from_body(body).expect("a job");
    assert_eq!(job, Job::DeliverMessages(DeliverMessages { user: UserId::new("u"), conversation: Uuid::from_u128(1) }));
}
