//! Errors of the agent server during a start: permanent ones end the start without useless retries, and its detail says
//! what is wrong and what to do.

use std::time::Duration;

use serde_json::{Value, json};
use shared::config::StartConfig;
use shared::conversation::search::Filter;
use shared::start::task::{StartStatus, StartTaskRecord};
use uuid::Uuid;

use crate::alarms::Log;
use crate::support::stand_in_agent::{Fault, Kind, Nth};
use crate::support::worker_harness::{SESSION_KEY, WorkerHarness, quick};

/// Responses of running agent servers, recorded: to a create body with one mistake in it, and, for the disk errors,
/// from a server whose disk is full or read-only.
const RECORDED: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/data/agent-server/create-errors.json"));
const CREATE: &str = "POST /api/conversations";
const SEND: &str = "POST /api/conversations/{id}/events";
/// The number of attempts after an error of an unknown or uncertain cause.
const TRIES: usize = 3;

fn message() -> Value {
    json!({"initial_message": {"content": [{"type": "text", "text": "hi"}]}})
}

/// The number of requests for the start's conversation: to create it, or with its first message.
fn tries(harness: &WorkerHarness) -> usize {
    harness.agent.requests_to(CREATE).len() + harness.agent.requests_to(SEND).len()
}

fn detail(record: &StartTaskRecord) -> &str {
    record.now.detail.as_deref().unwrap_or_default()
}

/// What each recorded mistake must lead to: the number of attempts, whose fault it is, and the beginning of the message
/// for the user.
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
        // The format of the body, and fields that users do not control, are this server's responsibility.
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
async fn each_recorded_error_ends_its_start_after_the_expected_number_of_attempts() {
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
        let harness = WorkerHarness::start(quick()).await;
        let code = u16::try_from(status).expect("a status");
        if answer["conversation_is_kept"] == true {
            harness.agent.fail_setup(None, code, &answer["answer"].to_string());
        } else {
            harness.agent.inject(Fault::new(CREATE, Nth::Always, Kind::Status(code, answer["answer"].to_string())));
        }
        let task = harness.begin(&message()).await;
        let ended = harness.drive(task.id).await;
        assert_eq!(ended.now.status, StartStatus::Error, "{case}");
        let (expected_tries, fault, advice) = expected(mistake, status);
        assert_eq!(tries(&harness), expected_tries, "{case}: {:#?}", harness.agent.requests());
        assert!(detail(&ended).contains(advice), "{case}: {}", detail(&ended));
        assert!(!detail(&ended).contains("Internal Server Error\""), "{case}: {}", detail(&ended));
        // The agent server's own message follows.
        if let Some(words) = answer["answer"]["exception"].as_str() {
            let first_line = words.lines().next().expect("a line").trim();
            assert!(detail(&ended).contains(first_line), "{case}: {}", detail(&ended));
        }
        let lines = log.take();
        let failed: Vec<&Value> = lines.iter().filter(|line| line["message"] == "start.failed").collect();
        assert_eq!(failed.len(), 1, "{case}: {lines:?}");
        assert_eq!(failed[0]["fault"], fault, "{case}: {}", failed[0]);
        harness.settle_sandboxes().await;
        assert!(
            harness.sandboxes.made().values().all(|made| made.deleted),
            "{case}: the sandbox was made for this start"
        );
        harness.finish().await;
    }
    assert_eq!(versions.len(), 3, "{versions:?}");
}

/// An unknown error gets three attempts, in whatever step it occurs; network errors and overload get as many as any
/// other temporary error.
#[tokio::test(flavor = "multi_thread")]
async fn unknown_errors_get_three_attempts_and_network_errors_more() {
    let unknown =
        || Kind::Status(500, r#"{"detail":"Internal Server Error","exception":"a new kind of fault"}"#.into());
    for (kind, times, ends) in [
        (unknown(), 2, StartStatus::Ready),
        (unknown(), 3, StartStatus::Error),
        (Kind::Status(503, r#"{"detail":"busy"}"#.into()), 4, StartStatus::Ready),
        (Kind::Status(429, r#"{"detail":"busy"}"#.into()), 4, StartStatus::Ready),
    ] {
        for route in [CREATE, "POST /api/bash/execute_bash_command"] {
            let case = format!("{route} {times} times {kind:?}");
            let harness = WorkerHarness::start(quick()).await;
            for nth in 1..=times {
                harness.agent.inject(Fault::new(route, Nth::On(nth), kind.clone()));
            }
            let task = harness.begin(&message()).await;
            let ended = harness.drive(task.id).await;
            assert_eq!(ended.now.status, ends, "{case}: {}", detail(&ended));
            if ends == StartStatus::Ready {
                harness.assert_one(task.id, 1, &case).await;
            } else {
                assert_eq!(harness.agent.requests_to(route).len(), times, "{case}");
                assert!(detail(&ended).contains("a new kind of fault"), "{case}: {}", detail(&ended));
            }
            harness.finish().await;
        }
    }
}

/// Errors of the agent server with network errors between them do not count as consecutive.
#[tokio::test]
async fn nonconsecutive_errors_do_not_end_a_start() {
    let harness = WorkerHarness::start(quick()).await;
    for nth in 1..=6 {
        let status = if nth % 2 == 0 { 503 } else { 500 };
        let answer = r#"{"detail":"Internal Server Error","exception":"a new kind of fault"}"#.to_owned();
        harness.agent.inject(Fault::new(CREATE, Nth::On(nth), Kind::Status(status, answer)));
    }
    let task = harness.begin(&message()).await;
    let ended = harness.drive(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Ready, "{}", detail(&ended));
    harness.assert_one(task.id, 1, "nonconsecutive errors").await;
    harness.finish().await;
}

/// `detail` names what a failed start could not remove, until it has been removed.
#[tokio::test]
async fn detail_names_a_conversation_that_could_not_be_removed_yet() {
    let harness = WorkerHarness::start(quick()).await;
    let first = harness.begin(&message()).await;
    let sandbox = harness.drive(first.id).await.now.sandbox_id.expect("a sandbox");
    harness.agent.fail_setup(None, 500, r#"{"exception":"Local plugin path does not exist: /nowhere"}"#);
    let delete = "DELETE /api/conversations/{id}";
    harness.agent.inject(Fault::new(delete, Nth::Next, Kind::Status(500, r#"{"detail":"no"}"#.into())));
    let mut body = message();
    body["sandbox_id"] = sandbox.as_str().into();
    let second = harness.begin(&body).await;
    let ended = harness.drive(second.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    let left = format!("Its conversation {} may still be in the sandbox {sandbox}", second.conversation_id);
    assert!(detail(&ended).ends_with(&left), "{}", detail(&ended));
    harness.undone(second.id).await;
    assert!(!detail(&harness.task(second.id).await).contains("may still be"));
    assert_eq!(harness.agent.conversations().len(), 1);
    harness.finish().await;
}

/// The error count survives a change of worker: a waiting start is released to the queue between any two attempts.
#[tokio::test]
async fn error_count_survives_a_change_of_worker() {
    let harness = WorkerHarness::start(StartConfig { inline_wait: Duration::ZERO, ..quick() }).await;
    harness.agent.fail_setup(None, 500, r#"{"detail":"Internal Server Error","exception":"a new kind of fault"}"#);
    let task = harness.begin(&message()).await;
    let ended = harness.drive(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    assert_eq!(tries(&harness), TRIES);
    harness.finish().await;
}

/// The start's check of the sandbox finds a browser, but the agent server does not: it keeps the conversation whose
/// setup failed, so another request with the same id would return that one.
#[tokio::test]
async fn conversation_is_recreated_without_the_browser_tool_if_there_is_no_browser() {
    let recorded: Vec<Value> = serde_json::from_str(RECORDED).expect("recorded answers");
    let answer = recorded.iter().find(|answer| answer["mistake"] == "no browser").expect("the recorded answer");
    let harness = WorkerHarness::start(quick()).await;
    harness.agent.fail_setup(Some("browser_tool_set"), 500, &answer["answer"].to_string());
    let task = harness.begin(&message()).await;
    let done = harness.drive(task.id).await;
    assert_eq!(done.now.status, StartStatus::Ready, "{}", detail(&done));
    harness.assert_one(task.id, 1, "no browser").await;
    assert!(detail(&done).contains("no Chromium was found"), "{}", detail(&done));
    assert!(!harness.agent.conversations()[0].body["agent"]["tools"].to_string().contains("browser"));
    harness.finish().await;
}

/// In a sandbox that existed before the start, nothing of a failed start remains.
#[tokio::test]
async fn failed_start_removes_its_conversation_from_a_kept_sandbox() {
    let harness = WorkerHarness::start(quick()).await;
    let first = harness.begin(&message()).await;
    let sandbox = harness.drive(first.id).await.now.sandbox_id.expect("a sandbox");
    harness.agent.fail_setup(None, 500, r#"{"exception":"Local plugin path does not exist: /nowhere"}"#);
    let mut body = message();
    body["sandbox_id"] = sandbox.as_str().into();
    let second = harness.begin(&body).await;
    let ended = harness.drive(second.id).await;
    assert_eq!(ended.now.status, StartStatus::Error, "{}", detail(&ended));
    harness.settle_sandboxes().await;
    let left: Vec<Uuid> = harness.agent.conversations().iter().map(|conversation| conversation.id).collect();
    assert_eq!(left, [first.conversation_id]);
    assert!(!harness.sandboxes.made()[&sandbox].deleted, "the first conversation uses it");
    assert_eq!(harness.conversations.count(&harness.user, &Filter::default()).await.expect("a count"), 1);
    // The failed start must not remove a conversation that existed before it.
    let mut again = body.clone();
    again["conversation_id"] = first.conversation_id.to_string().into();
    harness.agent.inject(Fault::new(CREATE, Nth::Always, Kind::Status(422, r#"{"detail":"no"}"#.into())));
    let third = harness.begin(&again).await;
    assert_eq!(harness.drive(third.id).await.now.status, StartStatus::Error);
    assert_eq!(harness.agent.conversations().len(), 1);
    // Nor a conversation that another client created at the agent server, of which this server has no record.
    let theirs = Uuid::new_v4();
    harness.agent.clear_faults();
    harness.agent.clear_setup_failure();
    let conversation = json!({
        "conversation_id": theirs,
        "workspace": {"kind": "LocalWorkspace", "working_dir": harness.agent.working_dir()},
        "agent": {"llm": {"model": "theirs"}},
        "initial_message": {"role": "user", "content": [{"type": "text", "text": "Mine"}], "run": false},
    });
    let request = reqwest::Client::new().post(format!("{}/api/conversations", harness.agent.url())).json(&conversation);
    let created = request.header("X-Session-API-Key", SESSION_KEY).send().await.expect("an answer");
    assert!(created.status().is_success(), "{}", created.text().await.unwrap_or_default());
    harness.agent.inject(Fault::new(CREATE, Nth::Always, Kind::Status(422, r#"{"detail":"no"}"#.into())));
    body["conversation_id"] = theirs.to_string().into();
    let fourth = harness.begin(&body).await;
    assert_eq!(harness.drive(fourth.id).await.now.status, StartStatus::Error);
    assert_eq!(harness.agent.conversations().len(), 2);
    harness.finish().await;
}

/// Agent servers before 1.34 ignore a system prompt and a security analyzer in the body that creates a conversation.
#[tokio::test]
async fn a_start_uses_what_its_agent_server_reads_and_names_what_it_lacks() {
    let analyzer = json!({"kind": "LLMSecurityAnalyzer"});
    for (version, is_read) in [("1.15.0", false), ("1.33.9", false), ("1.34.0", true), ("1.58.2", true)] {
        let harness = WorkerHarness::start(quick()).await;
        harness.agent.set_version(version);
        harness.set_settings(json!({"llm_model": "openai/m", "security_analyzer": "llm"})).await;
        let task = harness.begin(&json!({"tags": {"team": "a"}})).await;
        let ended = harness.drive(task.id).await;
        assert_eq!(ended.now.status, StartStatus::Ready, "{version}: {}", detail(&ended));
        let conversation = harness.agent.conversations().remove(0);
        assert_eq!(conversation.security_analyzer, analyzer, "{version}");
        let set_later = harness.agent.requests_to("POST /api/conversations/{id}/security_analyzer").len();
        assert_eq!(set_later, usize::from(!is_read), "{version}: an agent could act before it is set");
        assert_eq!(conversation.body["tags"], json!({"team": "a"}));
        let record = harness.conversations.get(&harness.user, task.conversation_id).await.expect("the store");
        assert_eq!(json!(record.expect("a record").tags), json!({"team": "a"}), "{version}");

        let task = harness.begin(&json!({"system_prompt": "Be brief."})).await;
        let ended = harness.drive(task.id).await;
        if is_read {
            assert_eq!(ended.now.status, StartStatus::Ready, "{version}: {}", detail(&ended));
            assert_eq!(harness.agent.conversations()[1].body["agent"]["system_prompt"], "Be brief.");
        } else {
            assert_eq!(ended.now.status, StartStatus::Error, "{version}");
            assert!(detail(&ended).contains("from version 1.34.0 on") && detail(&ended).contains(version));
            assert_eq!(harness.agent.conversations().len(), 1, "{version}");
        }
        harness.settle().await;
        harness.finish().await;
    }
}
