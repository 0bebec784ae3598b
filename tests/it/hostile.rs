//! Sandboxes that attack: agent servers whose answers are endless, huge, or made to take memory, and that repeat the secrets they
//! were given. A start with one of them ends within its bounds, and what is kept of it is short.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures::stream::{self, StreamExt as _};
use serde_json::{Value, json};
use shared::agent_server::{AgentServer, AgentServerError, Failure, SkillsQuery};
use shared::http_client::{AddressPolicy, HttpClient};
use shared::start::task::StartStatus;
use shared::{Result, Time};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use uuid::Uuid;

use crate::support::fault_proxy::{Moment, Stop};
use crate::support::log::log_to;
use crate::support::stand_in_agent::{Fault, Kind, Nth, StandInAgent};
use crate::support::worker_harness::{SESSION_KEY, WorkerHarness, quick};

const MIB: usize = 1024 * 1024;
const SOON: Duration = Duration::from_secs(10);
/// The longest detail of a start that is kept, in bytes: a text of an agent server, and what is around it.
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
    // Nothing of the answer is quoted.
    matches!(answer, Err(AgentServerError { failure: Failure::Malformed(what), .. }) if what.len() < 100)
}

#[tokio::test]
async fn every_answer_has_a_bound_of_its_own() {
    let agent = StandInAgent::start(SESSION_KEY).await;
    let client = agent_server(&agent);
    let (id, search) = (Uuid::new_v4(), "GET /api/bash/bash_events/search");

    // Bytes: those of everything but skills, conversations and events are 1 MiB.
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
            "POST /api/bash/execute_bash_command" => is_too_large(&client.run_command("x", SOON).await),
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

    // Elements: many in few bytes.
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

    // Texts that would be kept.
    let long = "x".repeat(10_000);
    always(&agent, "POST /api/bash/start_bash_command", json!({"id": long}).to_string());
    assert!(is_malformed(&client.start_command("x", "/", SOON).await));
    always(&agent, search, json!({"items": [], "next_page_id": long}).to_string());
    assert!(is_malformed(&client.command_output("x").await));
    always(&agent, "POST /api/conversations/{id}/generate_title", json!({"title": long}).to_string());
    assert_eq!(client.generate_title(id, SOON).await.expect("no title"), None);
    let told = json!([{"id": id, "title": long, "execution_status": long}]).to_string();
    always(&agent, "GET /api/conversations", told);
    let found = client.conversations(&[id], SOON).await.expect("one").pop().flatten().expect("it");
    assert_eq!((found.title, found.execution_status), (None, None));
    // An error quotes no more than its beginning, and a value of another type not at all.
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
async fn a_conversation_is_read_over_but_for_what_is_used_of_it() {
    let agent = StandInAgent::start(SESSION_KEY).await;
    let id = Uuid::new_v4();
    let usage = json!({"prompt_tokens": 7});
    let told = json!([{
        "id": id, "title": "T", "execution_status": "idle", "updated_at": "2026-01-01T00:00:00Z",
        "workspace": {"kind": "LocalWorkspace", "working_dir": "/w"},
        "agent": {"llm": {"model": "m", "api_key": "sk"}, "agent_context": {"skills": ["x".repeat(MIB)]}},
        "stats": {"usage_to_metrics": {"agent": {
            "accumulated_cost": 0.5, "max_budget_per_task": null, "accumulated_token_usage": usage,
            "costs": vec![json!({"cost": 1}); 50_000],
        }, "condenser": {}}},
    }]);
    always(&agent, "GET /api/conversations", told.to_string());
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
    // Of a version, or an agent server, that tells less.
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
async fn skills_that_do_not_read_are_one_line_of_the_log() {
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

/// Whatever a sandbox answers, its start ends soon, keeps little, and leaves nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_sandbox_ends_its_own_start_and_nothing_else() {
    let search = "GET /api/bash/bash_events/search";
    let huge = |length| Kind::Huge(length);
    let cases: Vec<(&str, Kind, Option<&str>)> = vec![
        (search, Kind::EndlessPages(10), Some("longer than")),
        (search, Kind::EndlessPages(200_000), Some("longer than")),
        (search, huge(20 * MIB), Some("longer than")),
        (search, Kind::Status(200, format!(r#"{{"items": {}}}"#, zeros(400_000))), Some("unexpected form")),
        ("POST /api/bash/start_bash_command", huge(20 * MIB), Some("longer than")),
        (
            "POST /api/bash/start_bash_command",
            Kind::Status(200, json!({"id": "x".repeat(500_000)}).to_string()),
            Some("unexpected form"),
        ),
        ("POST /api/bash/start_bash_command", Kind::Status(500, "x".repeat(MIB)), Some("xxx")),
        ("POST /api/conversations", huge(20 * MIB), None),
        ("POST /api/conversations", Kind::Status(422, "y".repeat(MIB)), Some("yyy")),
        // Without skills and hooks a conversation is worth having; the start says what it lacks.
        ("POST /api/skills", huge(20 * MIB), None),
        ("POST /api/skills", Kind::Status(200, format!(r#"{{"skills": {}}}"#, zeros(1_000_000))), None),
        ("POST /api/hooks", huge(20 * MIB), None),
    ];
    stream::iter(cases)
        .for_each_concurrent(3, |(route, kind, reason)| async move {
            let name = format!("{route} {:.60}", format!("{kind:?}"));
            let rig = WorkerHarness::start(quick()).await;
            rig.agent.inject(Fault::new(route, Nth::Always, kind));
            let task = rig.begin(&json!({"initial_message": {"content": [{"type": "text", "text": "hi"}]}})).await;
            let ended = rig.drive(task.id).await;
            let detail = ended.now.detail.unwrap_or_default();
            assert!(detail.len() < MAX_DETAIL, "{name}: {} bytes", detail.len());
            if let Some(reason) = reason {
                assert_eq!(ended.now.status, StartStatus::Error, "{name}");
                assert!(detail.contains(reason), "{name}: {detail}");
                assert!(rig.sandboxes.made().values().all(|made| made.deleted), "{name}");
            }
            assert!(rig.agent.requests_to(search).len() <= 8 * 20, "{name}: pages are bounded");
            rig.finish().await;
        })
        .await;
}

/// Hands the next message of the task's to a worker that dies at its n-th call. Whether it did.
async fn crash(rig: &WorkerHarness, call: usize) -> bool {
    let Some(message) = rig.receive().await else {
        rig.other_worker.saga.sweep().await.expect("swept");
        return false;
    };
    rig.gate.arm(call, Stop::Hang(Moment::After));
    let (context, event) = (rig.context.clone(), WorkerHarness::event(&message));
    let mut worker = tokio::spawn(async move { worker::handle(&context, event).await });
    let died = tokio::select! {
        handled = &mut worker => {
            assert!(handled.expect("no panic").expect("handled").batch_item_failures.is_empty());
            false
        }
        () = rig.gate.reached() => {
            worker.abort();
            drop(worker.await);
            true
        }
    };
    rig.gate.disarm();
    // The sweep finds the row; the queue would bring the message, too.
    rig.delete(&message).await;
    died
}

/// What kills a worker inside a step kills each that takes the start over. None of them lives to count it.
#[tokio::test]
async fn a_start_that_kills_its_workers_ends() {
    let rig = WorkerHarness::start(quick()).await;
    // The command never ends, so that every worker makes as many calls as it lives.
    let running = json!({"items": []}).to_string();
    rig.agent.inject(Fault::new("GET /api/bash/bash_events/search", Nth::Always, Kind::Status(200, running)));
    let task = rig.begin(&json!({})).await;
    let mut crashes = 0;
    while !rig.task(task.id).await.now.status.is_final() {
        crashes += usize::from(crash(&rig, 8).await);
        assert!(crashes <= 12, "it is taken over again and again");
    }
    let ended = rig.task(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    let detail = ended.now.detail.expect("a detail");
    assert!(detail.contains("PreparingRepository was interrupted 8 times"), "{detail}");
    assert!(rig.sandboxes.made().values().all(|made| made.deleted));
    rig.finish().await;
}

#[tokio::test]
async fn two_workers_that_die_beyond_the_deadline_are_the_last_ones() {
    let config = shared::config::StartConfig { clone_timeout: Duration::from_millis(500), ..quick() };
    let rig = WorkerHarness::start(config).await;
    let running = json!({"items": []}).to_string();
    rig.agent.inject(Fault::new("GET /api/bash/bash_events/search", Nth::Always, Kind::Status(200, running)));
    let task = rig.begin(&json!({})).await;
    let mut crashes = 0;
    while !rig.task(task.id).await.now.status.is_final() {
        crashes += usize::from(crash(&rig, 12).await);
        assert!(crashes <= 3, "its time is over");
    }
    let ended = rig.task(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    assert!(ended.now.detail.expect("a detail").contains("did not finish within"));
    rig.finish().await;
}

/// A deployment ends workers, too: what was done meanwhile counts, even if nobody has looked in time.
#[tokio::test]
async fn one_lost_worker_does_not_end_a_start_that_is_late() {
    let rig = WorkerHarness::start(quick()).await;
    let task = rig.begin(&json!({})).await;
    assert!(crash(&rig, 5).await, "a worker died");
    rig.end_time_of(task.id).await;
    let late = rig.task(task.id).await;
    assert_eq!((late.now.status, late.open_claims), (StartStatus::WaitingForSandbox, 1));
    assert!(late.deadline.is_some_and(|deadline| Time::now() > deadline), "{late:?}");
    rig.drive(task.id).await;
    rig.assert_one(task.id, 0, "a lost worker").await;
    rig.finish().await;
}

/// A task of the version before has no count of claims, and a worker that waits gives its claim back: however often a start is
/// looked at, it is not given up for that.
#[tokio::test]
async fn claims_that_are_given_back_do_not_count() {
    let rig = WorkerHarness::start(shared::config::StartConfig { inline_wait: Duration::ZERO, ..quick() }).await;
    let running = json!({"items": []}).to_string();
    rig.agent.inject(Fault::new("GET /api/bash/bash_events/search", Nth::Always, Kind::Status(200, running)));
    let task = rig.begin(&json!({})).await;
    assert_eq!(task.open_claims, 0);
    let mut looks = 0;
    while looks < 11 {
        let Some(message) = rig.receive().await else { continue };
        rig.handle(&message).await;
        looks += 1;
        let now = rig.task(task.id).await;
        assert!(!now.now.status.is_final(), "{now:?}");
        assert_eq!(now.open_claims, 0);
    }
    rig.agent.clear_faults();
    rig.drive(task.id).await;
    rig.assert_one(task.id, 0, "many looks").await;
    rig.finish().await;
}

/// An agent server that refuses a request repeats it: FastAPI as `input`, pydantic in its text, exceptions as they please.
#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_server_repeats_of_a_request_is_kept_nowhere() {
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
        ("POST /api/bash/start_bash_command", 401, json!({"detail": format!("{SESSION_KEY} is no key")}), "is no key"),
    ];
    stream::iter(cases)
        .for_each_concurrent(3, |(route, status, body, words)| async move {
            let rig = WorkerHarness::start(quick()).await;
            rig.set_settings(json!({
                "llm_model": "openai/scripted", "llm_api_key": secrets[0],
                "custom_secrets": {"NPM": {"secret": secrets[1]}},
                "mcp_config": {"sse_servers": [], "stdio_servers": [], "shttp_servers": [
                    {"url": "https://mcp.example.com", "api_key": secrets[2]},
                ]},
            }))
            .await;
            rig.agent.inject(Fault::new(route, Nth::Always, Kind::Status(status, body.to_string())));
            let task = rig.begin(&json!({})).await;
            let ended = rig.drive(task.id).await;
            let detail = ended.now.detail.clone().expect("a detail");
            assert!(detail.contains(words), "{detail}");
            let kept = format!("{ended:?}");
            for secret in secrets {
                assert!(!kept.contains(secret), "{secret}: {kept}");
            }
            rig.finish().await;
        })
        .await;
}

/// A sweep takes a bounded number of rows, of all users in turn; it goes on behind what fails, and the next one goes on from there.
#[tokio::test]
async fn a_sweep_is_bounded_fair_and_goes_on_behind_a_failure() {
    let rig = WorkerHarness::start(quick()).await;
    let tasks = rig.tasks.unfinished();
    let rows: Vec<(String, String)> = (0..130)
        .map(|number| ("flood".to_owned(), number))
        .chain([("patient".to_owned(), 130)])
        .map(|(user, number)| (user, format!("{number:032x}")))
        .collect();
    for (number, (user, id)) in rows.iter().enumerate() {
        rig.put_due_task(user, id, &format!("2020-01-01T00:00:00.{number:06}Z")).await;
    }
    // One that names no owner does not stop it.
    rig.put_due_task("flood", "no id", "2019-01-01T00:00:00.000000Z").await;
    let (due, failed) = tasks.due(Time::now()).await;
    assert!(failed.is_none());
    assert_eq!(due.len(), 100);
    assert!(due[..3].iter().any(|row| row.user.as_str() == "patient"), "users take turns");

    // The third batch is refused: all others are sent, and that one is sent by the next sweep.
    let calls_before_the_batches = shared::start::store::SHARDS.len();
    rig.gate.arm(calls_before_the_batches + 3, Stop::Refuse);
    assert!(rig.context.saga.sweep().await.is_err(), "what failed is told");
    rig.gate.disarm();
    let calls = rig.gate.calls();
    assert_eq!(calls.iter().filter(|call| *call == "SendMessageBatch").count(), 10, "{calls:?}");
    assert_eq!(rig.waiting_messages().await, 90);
    assert_eq!(rig.context.saga.sweep().await.expect("swept"), 41);
    assert_eq!(rig.waiting_messages().await, 131);
    assert_eq!(rig.context.saga.sweep().await.expect("swept"), 0, "they are left alone for a while");
    for (user, id) in rows.iter().map(|(user, id)| (user.as_str(), id.as_str())).chain([("flood", "no id")]) {
        rig.remove_task(user, id).await;
    }
    rig.purge().await;
    rig.finish().await;
}
