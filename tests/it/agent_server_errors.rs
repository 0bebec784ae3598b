//! Errors of agent servers that stay: they end a start as soon as that is clear, and say what is wrong and what to do.

use std::time::Duration;

use serde_json::{Value, json};
use shared::config::StartConfig;
use shared::conversation::search::Filter;
use shared::start::task::{StartStatus, StartTaskRecord};
use uuid::Uuid;

use crate::alarms::Log;
use crate::support::stand_in_agent::{Fault, Kind, Nth};
use crate::support::worker_harness::{SESSION_KEY, WorkerHarness, quick};

/// Recorded from running agent servers: to the body of a start with one mistake in it, and, of the disk, from a server on a full one
/// and on one that cannot be written to.
const RECORDED: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/data/agent-server/create-errors.json"));
const CREATE: &str = "POST /api/conversations";
const SEND: &str = "POST /api/conversations/{id}/events";
/// How often an error of an unknown or uncertain cause is tried.
const TRIES: usize = 3;

fn message() -> Value {
    json!({"initial_message": {"content": [{"type": "text", "text": "hi"}]}})
}

/// How often the agent server was asked for a start's conversation: to create it, or for its first message.
fn tries(rig: &WorkerHarness) -> usize {
    rig.agent.requests_to(CREATE).len() + rig.agent.requests_to(SEND).len()
}

fn detail(record: &StartTaskRecord) -> &str {
    record.now.detail.as_deref().unwrap_or_default()
}

/// What each recorded mistake comes to: how often it is tried, whose fault it is, and what the user reads of it first.
fn expected(mistake: &str, status: u64) -> (usize, &'static str, &'static str) {
    const PLUGIN: &str = "A plugin cannot be loaded; correct its source";
    const VERSION: &str = "The agent server lacks a tool or a prompt";
    match (mistake, status) {
        ("plugin folder missing" | "plugin subfolder missing" | "plugin source odd" | "plugin outside", _) => {
            (1, "user", PLUGIN)
        }
        ("plugin unreachable", _) => (TRIES, "user", "A plugin cannot be fetched; check"),
        ("hook of no event", _) => (1, "user", "The hooks of the repository are invalid"),
        ("mcp server unreachable", 500) => (TRIES, "user", "An MCP server of the settings cannot be reached"),
        ("mcp server without an address", _) => (1, "user", "An MCP server of the settings is invalid"),
        ("skill twice", _) => (1, "user", "A skill is invalid"),
        ("no such tool" | "no such default tool" | "no such prompt", _) => (1, "server", VERSION),
        // The form of the body, and what users have no say in, are our doing.
        ("mcp server of another form" | "no such analyzer" | "tag with a bad name", 422) => {
            (1, "server", "The agent server answered 422")
        }
        ("folder is a file", _) => (1, "server", "A file is where the agent server needs a folder"),
        ("disk full", _) => (1, "server", "The disk of the sandbox is full; delete files"),
        ("disk read-only", _) => (1, "server", "The agent server cannot write to the disk"),
        (other, status) => panic!("{other} ({status}) is not expected"),
    }
}

#[tokio::test]
async fn every_recorded_mistake_ends_its_start_as_soon_as_it_is_clear() {
    let (log, _logging) = Log::begin();
    let recorded: Vec<Value> = serde_json::from_str(RECORDED).expect("recorded answers");
    let mut versions = std::collections::BTreeSet::new();
    for answer in &recorded {
        let text = |name: &str| answer[name].as_str().expect("text");
        let (version, mistake, status) =
            (text("version"), text("mistake"), answer["status"].as_u64().expect("a status"));
        if mistake == "no browser" {
            continue;
        }
        versions.insert(version);
        let case = format!("{mistake} ({version}, {status})");
        let rig = WorkerHarness::start(quick()).await;
        let code = u16::try_from(status).expect("a status");
        if answer["conversation_is_kept"] == true {
            rig.agent.fail_setup(None, code, &answer["answer"].to_string());
        } else {
            rig.agent.inject(Fault::new(CREATE, Nth::Always, Kind::Status(code, answer["answer"].to_string())));
        }
        let task = rig.begin(&message()).await;
        let ended = rig.drive(task.id).await;
        assert_eq!(ended.now.status, StartStatus::Error, "{case}");
        let (expected_tries, fault, advice) = expected(mistake, status);
        assert_eq!(tries(&rig), expected_tries, "{case}: {:#?}", rig.agent.requests());
        assert!(detail(&ended).contains(advice), "{case}: {}", detail(&ended));
        assert!(!detail(&ended).contains("Internal Server Error\""), "{case}: {}", detail(&ended));
        // Its own words follow.
        if let Some(words) = answer["answer"]["exception"].as_str() {
            let first_line = words.lines().next().expect("a line").trim();
            assert!(detail(&ended).contains(first_line), "{case}: {}", detail(&ended));
        }
        let lines = log.take();
        let failed: Vec<&Value> = lines.iter().filter(|line| line["message"] == "start.failed").collect();
        assert_eq!(failed.len(), 1, "{case}: {lines:?}");
        assert_eq!(failed[0]["fault"], fault, "{case}: {}", failed[0]);
        assert!(rig.sandboxes.made().values().all(|made| made.deleted), "{case}: the sandbox was made for this start");
        rig.finish().await;
    }
    assert_eq!(versions.len(), 3, "{versions:?}");
}

/// An unknown error is tried a few times, wherever it comes, and no more; errors of the way there as often as anything else.
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_error_is_tried_a_few_times_and_one_of_the_way_there_more_often() {
    let unknown =
        || Kind::Status(500, r#"{"detail":"Internal Server Error","exception":"a new kind of fault"}"#.into());
    for (kind, times, ends) in [
        (unknown(), 2, StartStatus::Ready),
        (unknown(), 3, StartStatus::Error),
        (Kind::Status(503, r#"{"detail":"busy"}"#.into()), 4, StartStatus::Ready),
        (Kind::Status(429, r#"{"detail":"busy"}"#.into()), 4, StartStatus::Ready),
    ] {
        for route in [CREATE, "POST /api/bash/start_bash_command"] {
            let case = format!("{route} {times} times {kind:?}");
            let rig = WorkerHarness::start(quick()).await;
            for nth in 1..=times {
                rig.agent.inject(Fault::new(route, Nth::On(nth), kind.clone()));
            }
            let task = rig.begin(&message()).await;
            let ended = rig.drive(task.id).await;
            assert_eq!(ended.now.status, ends, "{case}: {}", detail(&ended));
            if ends == StartStatus::Ready {
                rig.assert_one(task.id, 1, &case).await;
            } else {
                assert_eq!(rig.agent.requests_to(route).len(), times, "{case}");
                assert!(detail(&ended).contains("a new kind of fault"), "{case}: {}", detail(&ended));
            }
            rig.finish().await;
        }
    }
}

/// Errors of the agent server with errors of the way there between them are not in a row.
#[tokio::test]
async fn errors_that_are_not_in_a_row_do_not_end_a_start() {
    let rig = WorkerHarness::start(quick()).await;
    for nth in 1..=6 {
        let status = if nth % 2 == 0 { 503 } else { 500 };
        let answer = r#"{"detail":"Internal Server Error","exception":"a new kind of fault"}"#.to_owned();
        rig.agent.inject(Fault::new(CREATE, Nth::On(nth), Kind::Status(status, answer)));
    }
    let task = rig.begin(&message()).await;
    let ended = rig.drive(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Ready, "{}", detail(&ended));
    rig.assert_one(task.id, 1, "not in a row").await;
    rig.finish().await;
}

/// What a failed start could not remove is named.
#[tokio::test]
async fn a_conversation_that_cannot_be_removed_is_named() {
    let rig = WorkerHarness::start(quick()).await;
    let first = rig.begin(&message()).await;
    let sandbox = rig.drive(first.id).await.now.sandbox_id.expect("a sandbox");
    rig.agent.fail_setup(None, 500, r#"{"exception":"Local plugin path does not exist: /nowhere"}"#);
    let delete = "DELETE /api/conversations/{id}";
    rig.agent.inject(Fault::new(delete, Nth::Always, Kind::Status(500, r#"{"detail":"no"}"#.into())));
    let mut body = message();
    body["sandbox_id"] = sandbox.as_str().into();
    let second = rig.begin(&body).await;
    let ended = rig.drive(second.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    let left = format!("Its conversation {} may still be in the sandbox {sandbox}", second.conversation_id);
    assert!(detail(&ended).ends_with(&left), "{}", detail(&ended));
    rig.finish().await;
}

/// The count outlives workers: a start that waits is given back to the queue between any two tries.
#[tokio::test]
async fn a_worker_without_patience_counts_the_errors_of_those_before_it() {
    let rig = WorkerHarness::start(StartConfig { inline_wait: Duration::ZERO, ..quick() }).await;
    rig.agent.fail_setup(None, 500, r#"{"detail":"Internal Server Error","exception":"a new kind of fault"}"#);
    let task = rig.begin(&message()).await;
    let ended = rig.drive(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    assert_eq!(tries(&rig), TRIES);
    rig.finish().await;
}

/// Our probe of the sandbox finds a browser, and the agent server does not: it keeps the conversation that it could not finish, and
/// a second one with the same id would be that one.
#[tokio::test]
async fn without_a_browser_the_conversation_is_made_anew_without_its_tool() {
    let recorded: Vec<Value> = serde_json::from_str(RECORDED).expect("recorded answers");
    let answer = recorded.iter().find(|answer| answer["mistake"] == "no browser").expect("the recorded answer");
    let rig = WorkerHarness::start(quick()).await;
    rig.agent.fail_setup(Some("browser_tool_set"), 500, &answer["answer"].to_string());
    let task = rig.begin(&message()).await;
    let done = rig.drive(task.id).await;
    assert_eq!(done.now.status, StartStatus::Ready, "{}", detail(&done));
    rig.assert_one(task.id, 1, "no browser").await;
    assert!(detail(&done).contains("no Chromium was found"), "{}", detail(&done));
    assert!(!rig.agent.conversations()[0].body["agent"]["tools"].to_string().contains("browser"));
    rig.finish().await;
}

/// In a sandbox that was there before, nothing of a start stays that failed.
#[tokio::test]
async fn a_failed_start_takes_its_conversation_out_of_a_sandbox_that_stays() {
    let rig = WorkerHarness::start(quick()).await;
    let first = rig.begin(&message()).await;
    let sandbox = rig.drive(first.id).await.now.sandbox_id.expect("a sandbox");
    rig.agent.fail_setup(None, 500, r#"{"exception":"Local plugin path does not exist: /nowhere"}"#);
    let mut body = message();
    body["sandbox_id"] = sandbox.as_str().into();
    let second = rig.begin(&body).await;
    let ended = rig.drive(second.id).await;
    assert_eq!(ended.now.status, StartStatus::Error, "{}", detail(&ended));
    let left: Vec<Uuid> = rig.agent.conversations().iter().map(|conversation| conversation.id).collect();
    assert_eq!(left, [first.conversation_id]);
    assert!(!rig.sandboxes.made()[&sandbox].deleted, "the first conversation lives in it");
    assert_eq!(rig.conversations.count(&rig.user, &Filter::default()).await.expect("a count"), 1);
    // A conversation that was there before is not the failed start's to remove.
    let mut again = body.clone();
    again["conversation_id"] = first.conversation_id.to_string().into();
    rig.agent.inject(Fault::new(CREATE, Nth::Always, Kind::Status(422, r#"{"detail":"no"}"#.into())));
    let third = rig.begin(&again).await;
    assert_eq!(rig.drive(third.id).await.now.status, StartStatus::Error);
    assert_eq!(rig.agent.conversations().len(), 1);
    // Nor is one that somebody talks to at the agent server, of which this server has no record.
    let theirs = Uuid::new_v4();
    rig.agent.clear_faults();
    rig.agent.clear_setup_failure();
    let conversation = json!({
        "conversation_id": theirs,
        "workspace": {"kind": "LocalWorkspace", "working_dir": rig.agent.working_dir()},
        "agent": {"llm": {"model": "theirs"}},
        "initial_message": {"role": "user", "content": [{"type": "text", "text": "Mine"}], "run": false},
    });
    let request = reqwest::Client::new().post(format!("{}/api/conversations", rig.agent.url())).json(&conversation);
    let created = request.header("X-Session-API-Key", SESSION_KEY).send().await.expect("an answer");
    assert!(created.status().is_success(), "{}", created.text().await.unwrap_or_default());
    rig.agent.inject(Fault::new(CREATE, Nth::Always, Kind::Status(422, r#"{"detail":"no"}"#.into())));
    body["conversation_id"] = theirs.to_string().into();
    let fourth = rig.begin(&body).await;
    assert_eq!(rig.drive(fourth.id).await.now.status, StartStatus::Error);
    assert_eq!(rig.agent.conversations().len(), 2);
    rig.finish().await;
}
