//! Hostile sandboxes: agent servers with endless or huge responses, with responses that take much memory to parse, and
//! with errors that repeat the secrets they were given. A start with one of them ends within its limits, and what is
//! stored of it is short.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::stream::{self, StreamExt as _};
use serde_json::{Value, json};
use shared::agent_server::{AgentServer, AgentServerError, Failure, SkillsQuery};
use shared::http_client::{AddressPolicy, HttpClient};
use shared::sandbox::SandboxStatus;
use shared::start::task::StartStatus;
use shared::{Result, Time};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use uuid::Uuid;

use crate::support::fault_proxy::{Moment, Stop};
use crate::support::log::log_to;
use crate::support::stand_in_agent::{Fault, Kind, Nth, StandInAgent};
use crate::support::wait::wait_until;
use crate::support::worker_harness::{SESSION_KEY, WorkerHarness, quick};

const EXECUTE: &str = "POST /api/bash/execute_bash_command";
const START_COMMAND: &str = "POST /api/bash/start_bash_command";
const MIB: usize = 1024 * 1024;
const SOON: Duration = Duration::from_secs(60);
/// The longest `detail` of a start that is stored, in bytes: a text of an agent server, and the words around it.
const MAX_DETAIL: usize = 12_000;

fn zeros(count: usize) -> String {
    format!("[0{}]", ",0".repeat(count - 1))
}

fn agent_server(agent: &StandInAgent) -> AgentServer {
    AgentServer::new(HttpClient::new(AddressPolicy::Any), &agent.url(), Some(SESSION_KEY.into()))
}

fn always(agent: &StandInAgent, route: &str, body: String) {
    agent.clear_faults();
    agent.inject(Fault::new(route, Nth::Always, Kind::Status(200, body)));
}

fn is_too_large<T>(answer: &Result<T, AgentServerError>) -> bool {
    matches!(answer, Err(AgentServerError { failure: Failure::TooLarge(_), .. }))
}

fn is_malformed<T>(answer: &Result<T, AgentServerError>) -> bool {
    // The message quotes nothing of the response.
    matches!(answer, Err(AgentServerError { failure: Failure::Malformed(what), .. }) if what.len() < 100)
}

#[tokio::test]
async fn every_response_of_an_agent_server_has_a_size_limit() {
    let agent = StandInAgent::start(SESSION_KEY).await;
    let client = agent_server(&agent);
    let (id, search) = (Uuid::new_v4(), "GET /api/bash/bash_events/search");

    // Size in bytes: 1 MiB for all responses but skills, conversations and events.
    for (route, length) in [
        (search, MIB),
        ("POST /api/bash/start_bash_command", MIB),
        ("POST /api/hooks", MIB),
        ("POST /api/bash/execute_bash_command", 2 * MIB),
        ("POST /api/skills", 4 * MIB),
        ("POST /api/conversations", 8 * MIB),
        ("GET /api/conversations", 8 * MIB),
        ("POST /api/conversations/{id}/events", MIB),
        ("DELETE /api/conversations/{id}", MIB),
        ("GET /api/conversations/{id}/events/search", 16 * MIB),
    ] {
        agent.clear_faults();
        agent.inject(Fault::new(route, Nth::Always, Kind::Huge(length)));
        let refused = match route {
            "GET /api/bash/bash_events/search" => is_too_large(&client.command_output("x").await),
            "POST /api/bash/start_bash_command" => is_too_large(&client.start_command("x", "/", SOON).await),
            "POST /api/hooks" => is_too_large(&client.hooks("/").await),
            "POST /api/bash/execute_bash_command" => {
                is_too_large(&client.run_command("x", SOON).await)
                    && is_too_large(&client.execute_command("x", "/", SOON, SOON).await)
            }
            "POST /api/skills" => is_too_large(&client.skills(&SkillsQuery::default()).await),
            "POST /api/conversations" => is_too_large(&client.create_conversation(&json!({}), SOON).await),
            "GET /api/conversations" => {
                is_too_large(&client.conversations(&[id], SOON).await)
                    && is_too_large(&client.whole_conversation(id, SOON).await)
            }
            "POST /api/conversations/{id}/events" => {
                is_too_large(&client.send_message(id, "user", &json!([]), true).await)
            }
            "DELETE /api/conversations/{id}" => is_too_large(&client.delete_conversation(id, SOON).await),
            _ => is_too_large(&client.newest_events(id, None, 1).await),
        };
        assert!(refused, "{route}");
    }

    // Number of elements: many in few bytes.
    always(&agent, search, json!({"items": []}).to_string().replace("[]", &zeros(1000)));
    assert!(is_malformed(&client.command_output("x").await));
    always(&agent, search, json!({"items": []}).to_string().replace("[]", &format!("[{}{{}}]", "{},".repeat(300_000))));
    assert!(is_malformed(&client.command_output("x").await));
    always(&agent, "POST /api/skills", format!(r#"{{"skills": {}}}"#, zeros(2001)));
    assert!(is_malformed(&client.skills(&SkillsQuery::default()).await));
    always(&agent, "GET /api/conversations", format!("[null{}]", ",null".repeat(200)));
    assert!(is_malformed(&client.conversations(&[id], SOON).await));
    always(&agent, "GET /api/conversations/{id}/events/search", format!(r#"{{"items": {}}}"#, zeros(7_000_000)));
    assert!(is_malformed(&client.newest_events(id, None, 1).await));

    // Length of texts that would be stored.
    let long = "x".repeat(10_000);
    always(&agent, "POST /api/bash/start_bash_command", json!({"id": long}).to_string());
    assert!(is_malformed(&client.start_command("x", "/", SOON).await));
    always(&agent, search, json!({"items": [], "next_page_id": long}).to_string());
    assert!(is_malformed(&client.command_output("x").await));
    always(&agent, "POST /api/conversations/{id}/generate_title", json!({"title": long}).to_string());
    assert_eq!(client.generate_title(id, SOON).await.expect("no title"), None);
    let response = json!([{"id": id, "title": long, "execution_status": long}]).to_string();
    always(&agent, "GET /api/conversations", response);
    let found = client.conversations(&[id], SOON).await.expect("one").pop().flatten().expect("it");
    assert_eq!((found.title, found.execution_status), (None, None));
    // An error quotes only the beginning of its message, and nothing of a value of another type.
    agent.clear_faults();
    agent.inject(Fault::new("POST /api/hooks", Nth::Always, Kind::Status(500, "x".repeat(5 * MIB))));
    let Err(AgentServerError { failure: Failure::Status(_, text), .. }) = client.hooks("/").await else {
        panic!("an error")
    };
    assert_eq!(text.len(), 2000);
    always(&agent, "POST /api/conversations", json!("x".repeat(100_000)).to_string());
    assert!(is_malformed(&client.create_conversation(&json!({}), SOON).await));
}

#[tokio::test]
async fn only_the_used_fields_of_a_conversation_are_read() {
    let agent = StandInAgent::start(SESSION_KEY).await;
    let id = Uuid::new_v4();
    let usage = json!({"prompt_tokens": 7});
    let response = json!([{
        "id": id, "title": "T", "execution_status": "idle", "updated_at": "2026-01-01T00:00:00Z",
        "workspace": {"kind": "LocalWorkspace", "working_dir": "/w"},
        "agent": {"llm": {"model": "m", "api_key": "sk"}, "agent_context": {"skills": ["x".repeat(MIB)]}},
        "stats": {"usage_to_metrics": {"agent": {
            "accumulated_cost": 0.5, "max_budget_per_task": null, "accumulated_token_usage": usage,
            "costs": vec![json!({"cost": 1}); 50_000],
        }, "condenser": {}}},
    }]);
    always(&agent, "GET /api/conversations", response.to_string());
    let whole = agent_server(&agent).whole_conversation(id, SOON).await.expect("an answer").expect("it");
    let agents = json!({"accumulated_cost": 0.5, "max_budget_per_task": null, "accumulated_token_usage": usage});
    let unused = json!({"accumulated_cost": null, "max_budget_per_task": null, "accumulated_token_usage": null});
    assert_eq!(
        whole,
        json!({
            "execution_status": "idle", "title": "T", "updated_at": "2026-01-01T00:00:00Z",
            "workspace": {"working_dir": "/w"}, "agent": {"llm": {"model": "m", "usage_id": null}}, "tags": null,
            "stats": {"usage_to_metrics": {"agent": agents, "condenser": unused}},
        })
    );
    // From a version, or an agent server, that returns fewer fields.
    always(&agent, "GET /api/conversations", json!([{"id": id}]).to_string());
    let whole = agent_server(&agent).whole_conversation(id, SOON).await.expect("an answer").expect("it");
    assert_eq!((&whole["title"], &whole["stats"]), (&Value::Null, &Value::Null));
}

/// Counts warnings.
struct Warnings(Arc<AtomicUsize>);

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::WARN && metadata.target().starts_with("shared")
    }
    fn new_span(&self, _span: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _span: &Id, _values: &Record<'_>) {}
    fn record_follows_from(&self, _span: &Id, _follows: &Id) {}
    fn event(&self, _event: &Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn enter(&self, _span: &Id) {}
    fn exit(&self, _span: &Id) {}
}

#[tokio::test]
async fn unreadable_skills_are_logged_as_one_warning() {
    let agent = StandInAgent::start(SESSION_KEY).await;
    let mut skills = vec![json!(0); 1999];
    skills.push(json!({"name": "good", "content": "text"}));
    always(&agent, "POST /api/skills", json!({"skills": skills}).to_string());
    let lines = Arc::new(AtomicUsize::new(0));
    let client = agent_server(&agent);
    let found = {
        let _counted = log_to(Warnings(lines.clone()));
        client.skills(&SkillsQuery::default()).await.expect("skills")
    };
    assert_eq!(found.iter().map(|skill| skill.name.as_str()).collect::<Vec<_>>(), ["good"]);
    assert_eq!(lines.load(Ordering::Relaxed), 1);
}

/// Whatever a sandbox responds, its start ends soon, stores little, and removes what it created.
#[tokio::test(flavor = "multi_thread")]
async fn hostile_sandbox_fails_only_its_own_start() {
    let search = "GET /api/bash/bash_events/search";
    let huge = |length| Kind::Huge(length);
    let cases: Vec<(&str, Kind, Option<&str>)> = vec![
        (search, Kind::EndlessPages(10), Some("longer than")),
        (search, Kind::EndlessPages(200_000), Some("longer than")),
        (search, huge(20 * MIB), Some("longer than")),
        (search, Kind::Status(200, format!(r#"{{"items": {}}}"#, zeros(400_000))), Some("unexpected form")),
        (EXECUTE, Kind::Status(500, "x".repeat(MIB)), Some("xxx")),
        // The command has ended, and its output is looked up.
        (EXECUTE, huge(20 * MIB), None),
        (EXECUTE, Kind::Status(200, zeros(400_000)), None),
        (START_COMMAND, huge(20 * MIB), Some("longer than")),
        (START_COMMAND, Kind::Status(200, json!({"id": "x".repeat(500_000)}).to_string()), Some("unexpected form")),
        (START_COMMAND, Kind::Status(500, "x".repeat(MIB)), Some("xxx")),
        ("POST /api/conversations", huge(20 * MIB), None),
        ("POST /api/conversations", Kind::Status(422, "y".repeat(MIB)), Some("yyy")),
        // A conversation without skills and hooks is still useful; `detail` names what is missing.
        ("POST /api/skills", huge(20 * MIB), None),
        ("POST /api/skills", Kind::Status(200, format!(r#"{{"skills": {}}}"#, zeros(1_000_000))), None),
        ("POST /api/hooks", huge(20 * MIB), None),
    ];
    stream::iter(cases)
        .for_each_concurrent(3, |(route, kind, reason)| async move {
            let name = format!("{route} {:.60}", format!("{kind:?}"));
            let harness = WorkerHarness::start(quick()).await;
            if [START_COMMAND, search].contains(&route) {
                harness.agent.refuse_to_wait_for_commands();
            }
            harness.agent.inject(Fault::new(route, Nth::Always, kind));
            let task = harness.begin(&json!({"initial_message": {"content": [{"type": "text", "text": "hi"}]}})).await;
            let ended = harness.drive(task.id).await;
            let detail = ended.now.detail.unwrap_or_default();
            assert!(detail.len() < MAX_DETAIL, "{name}: {} bytes", detail.len());
            if let Some(reason) = reason {
                assert_eq!(ended.now.status, StartStatus::Error, "{name}");
                assert!(detail.contains(reason), "{name}: {detail}");
                harness.settle_sandboxes().await;
                assert!(harness.sandboxes.made().values().all(|made| made.deleted), "{name}");
            }
            assert!(harness.agent.requests_to(search).len() <= 8 * 20, "{name}: pages are bounded");
            harness.finish().await;
        })
        .await;
}

/// Passes the task's next message to a worker that crashes at its n-th call. Returns whether it did.
async fn crash(harness: &WorkerHarness, call: usize) -> bool {
    let Some(message) = harness.receive().await else {
        harness.other_worker.saga.sweep().await.expect("swept");
        return false;
    };
    harness.gate.arm(call, Stop::Hang(Moment::After));
    let (context, event) = (harness.context.clone(), WorkerHarness::event(&message));
    let mut worker = tokio::spawn(async move { worker::handle(&context, event).await });
    let died = tokio::select! {
        handled = &mut worker => {
            assert!(handled.expect("no panic").expect("handled").batch_item_failures.is_empty());
            false
        }
        () = harness.gate.reached() => {
            worker.abort();
            drop(worker.await);
            true
        }
    };
    harness.gate.disarm();
    // The sweep requeues the row; the queue would redeliver the message, too.
    harness.delete(&message).await;
    died
}

/// A step that kills its worker also kills every later worker that takes the start over. None of them can count the
/// failure.
#[tokio::test]
async fn start_that_kills_its_workers_ends_in_error() {
    let harness = WorkerHarness::start(quick()).await;
    // The command never ends, so each worker makes calls until it is killed.
    harness.agent.refuse_to_wait_for_commands();
    let running = json!({"items": []}).to_string();
    harness.agent.inject(Fault::new("GET /api/bash/bash_events/search", Nth::Always, Kind::Status(200, running)));
    let task = harness.begin(&json!({})).await;
    let mut crashes = 0;
    while !harness.task(task.id).await.now.status.is_final() {
        crashes += usize::from(crash(&harness, 8).await);
        assert!(crashes <= 12, "too many workers take the start over");
    }
    let ended = harness.task(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    let detail = ended.now.detail.expect("a detail");
    assert!(detail.contains("PreparingRepository was interrupted 8 times"), "{detail}");
    harness.settle_sandboxes().await;
    assert!(harness.sandboxes.made().values().all(|made| made.deleted));
    harness.finish().await;
}

#[tokio::test]
async fn start_ends_after_two_workers_die_past_its_deadline() {
    let harness = WorkerHarness::start(quick()).await;
    harness.agent.refuse_to_wait_for_commands();
    let running = json!({"items": []}).to_string();
    harness.agent.inject(Fault::new("GET /api/bash/bash_events/search", Nth::Always, Kind::Status(200, running)));
    let task = harness.begin(&json!({})).await;
    let mut crashes = 0;
    while !harness.task(task.id).await.now.status.is_final() {
        // The second one dies before it sees that the time is up, and the third one does not die.
        let call = [12, 6, usize::MAX][crashes.min(2)];
        crashes += usize::from(crash(&harness, call).await);
        if crashes == 1 && harness.task(task.id).await.now.status == StartStatus::PreparingRepository {
            harness.end_time_of(task.id).await;
        }
    }
    assert_eq!(crashes, 2, "its deadline is over");
    let ended = harness.task(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    assert!(ended.now.detail.expect("a detail").contains("did not finish within"));
    harness.finish().await;
}

/// A deployment ends workers, too: progress since then counts, even if no worker checked before the deadline.
#[tokio::test]
async fn one_lost_worker_does_not_end_an_overdue_start() {
    let config = shared::config::StartConfig { inline_wait: Duration::from_secs(60), ..quick() };
    let harness = WorkerHarness::start(config).await;
    *harness.sandboxes.begins_as.lock().expect("status") = SandboxStatus::Starting;
    let task = harness.begin(&json!({})).await;
    let message = harness.receive().await.expect("a message");
    let (context, event) = (harness.context.clone(), WorkerHarness::event(&message));
    let worker = tokio::spawn(async move { worker::handle(&context, event).await });
    let waits = async || harness.task(task.id).await.now.status == StartStatus::WaitingForSandbox;
    wait_until("the start waits for its sandbox", Duration::from_secs(60), waits).await;
    worker.abort();
    assert!(worker.await.is_err_and(|lost| lost.is_cancelled()), "the worker is lost");
    harness.sandboxes.set_status(&task.new_sandbox_id, SandboxStatus::Running);
    harness.end_time_of(task.id).await;
    let late = harness.task(task.id).await;
    assert_eq!((late.now.status, harness.open_claims(task.id).await), (StartStatus::WaitingForSandbox, 1));
    assert!(late.deadline.is_some_and(|deadline| Time::now() > deadline), "{late:?}");
    harness.drive(task.id).await;
    harness.assert_one(task.id, 0, "a lost worker").await;
    harness.finish().await;
}

/// Tasks of the previous version have no count of claims, and a waiting worker releases its claim: however often a
/// start is checked, it is not abandoned for that.
#[tokio::test]
async fn released_claims_do_not_count_as_attempts() {
    let harness = WorkerHarness::start(shared::config::StartConfig { inline_wait: Duration::ZERO, ..quick() }).await;
    harness.agent.refuse_to_wait_for_commands();
    let running = json!({"items": []}).to_string();
    harness.agent.inject(Fault::new("GET /api/bash/bash_events/search", Nth::Always, Kind::Status(200, running)));
    let task = harness.begin(&json!({})).await;
    let mut polls = 0;
    while polls < 11 {
        let Some(message) = harness.receive().await else { continue };
        harness.handle(&message).await;
        polls += 1;
        let now = harness.task(task.id).await;
        assert!(!now.now.status.is_final(), "{now:?}");
        assert_eq!(harness.open_claims(task.id).await, 0);
    }
    harness.agent.clear_faults();
    harness.drive(task.id).await;
    harness.assert_one(task.id, 0, "many checks").await;
    harness.finish().await;
}

/// Agent servers repeat the request in their errors: FastAPI as `input`, pydantic in its message, exceptions anywhere.
#[tokio::test(flavor = "multi_thread")]
async fn secrets_repeated_in_agent_server_errors_are_not_stored() {
    let secrets = ["sk-canary-of-the-model", "npm-canary", "mcp-canary", SESSION_KEY];
    let repeated = json!({"llm": {"api_key": secrets[0]}, "secrets": {"NPM": {"value": secrets[1]}}, "mcp": secrets[2], "key": secrets[3]});
    let missing = json!({"type": "missing", "loc": ["body", "agent"], "msg": "Field required", "input": repeated, "ctx": repeated});
    let cases = [
        ("POST /api/conversations", 422, json!({"detail": [missing]}), "Field required"),
        (
            "POST /api/conversations",
            500,
            json!({"detail": "Internal Server Error", "exception": format!("bad: {repeated}")}),
            "bad: ",
        ),
        ("POST /api/conversations", 400, json!({"detail": {"why": "unknown tool", "input": repeated}}), "unknown tool"),
        ("POST /api/conversations", 400, json!({"detail": format!("no: {}", secrets.join(" "))}), "no: **********"),
        (EXECUTE, 401, json!({"detail": format!("{SESSION_KEY} is no key")}), "is no key"),
    ];
    stream::iter(cases)
        .for_each_concurrent(3, |(route, status, body, words)| async move {
            let harness = WorkerHarness::start(quick()).await;
            harness
                .set_settings(json!({
                    "llm_model": "openai/scripted", "llm_api_key": secrets[0],
                    "custom_secrets": {"NPM": {"secret": secrets[1]}},
                    "mcp_config": {"sse_servers": [], "stdio_servers": [], "shttp_servers": [
                        {"url": "https://mcp.example.com", "api_key": secrets[2]},
                    ]},
                }))
                .await;
            harness.agent.inject(Fault::new(route, Nth::Always, Kind::Status(status, body.to_string())));
            let task = harness.begin(&json!({})).await;
            let ended = harness.drive(task.id).await;
            let detail = ended.now.detail.clone().expect("a detail");
            assert!(detail.contains(words), "{detail}");
            let kept = format!("{ended:?}");
            for secret in secrets {
                assert!(!kept.contains(secret), "{secret}: {kept}");
            }
            harness.finish().await;
        })
        .await;
}

/// A sweep handles a bounded number of rows, of all users in turn; it continues after a failed batch, and the next
/// sweep handles that batch.
#[tokio::test]
async fn sweep_is_bounded_and_fair_and_continues_after_a_failure() {
    let harness = WorkerHarness::start(quick()).await;
    let tasks = harness.tasks.unfinished();
    let rows: Vec<(String, String)> = (0..130)
        .map(|number| ("flood".to_owned(), number))
        .chain([("patient".to_owned(), 130)])
        .map(|(user, number)| (user, format!("{number:032x}")))
        .collect();
    for (number, (user, id)) in rows.iter().enumerate() {
        harness.put_due_task(user, id, &format!("2020-01-01T00:00:00.{number:06}Z")).await;
    }
    // A row without an owner does not stop the sweep.
    harness.put_due_task("flood", "no id", "2019-01-01T00:00:00.000000Z").await;
    let (due, failed) = tasks.due(Time::now()).await;
    assert!(failed.is_none());
    assert_eq!(due.len(), 100);
    assert!(due[..3].iter().any(|row| row.user.as_str() == "patient"), "users are served in turn");

    // The third batch is refused: all others are sent, and the next sweep sends that one.
    let calls_before_the_batches = shared::start::store::SHARDS.len();
    harness.gate.arm(calls_before_the_batches + 3, Stop::Refuse);
    assert!(harness.context.saga.sweep().await.is_err(), "the failure is returned");
    harness.gate.disarm();
    let calls = harness.gate.calls();
    assert_eq!(calls.iter().filter(|call| *call == "SendMessageBatch").count(), 10, "{calls:?}");
    assert_eq!(harness.waiting_messages().await, 90);
    assert_eq!(harness.context.saga.sweep().await.expect("swept"), 41);
    assert_eq!(harness.waiting_messages().await, 131);
    assert_eq!(harness.context.saga.sweep().await.expect("swept"), 0, "requeued rows are not due for a while");
    for (user, id) in rows.iter().map(|(user, id)| (user.as_str(), id.as_str())).chain([("flood", "no id")]) {
        harness.remove_due_task(user, id).await;
    }
    harness.purge().await;
    harness.finish().await;
}
