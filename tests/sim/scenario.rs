//! What clients do in a world, and what must hold at its end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};
use shared::user::UserId;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::agents;
use crate::agents::history::{ConversationHistory, Life, SandboxHistory};
use crate::aws::lock;
use crate::dice::{random, seeded};
use crate::world::{Conditions, World};

/// The starts, their users, and how long they are spread over.
#[derive(Clone, Debug)]
pub struct Load {
    pub starts: u64,
    pub tenants: u64,
    pub within: Duration,
}

/// The longest time from a request to READY or ERROR: the sum of the limits of the steps (boot 120 s, clone 300 s, script 600 s, four
/// other steps of 300 s, each with its margin), and the waits in queues.
const LONGEST_START: Duration = Duration::from_secs(90 * 60);
/// How long the rest may take after the clients have finished: deletions, compensations, confirmed ends of sandboxes.
const LONGEST_REST: Duration = Duration::from_secs(12 * 3600);

/// What a client knows of its start.
#[derive(Clone, Debug)]
pub struct Start {
    pub user: UserId,
    pub task: Uuid,
    pub conversation: Uuid,
    pub message: Option<String>,
    pub status: String,
    pub detail: Option<String>,
    pub took: Duration,
    /// The texts of pending messages that were accepted, in their order.
    pub accepted: Vec<String>,
    pub is_deleted: bool,
}

/// The result of a run.
#[derive(Debug)]
pub struct Report {
    pub hash: u64,
    pub calls: u64,
    pub starts: Vec<Start>,
    /// Everything that does not hold.
    pub violations: Vec<String>,
    /// The simulated time.
    pub took: Duration,
    pub world: Figures,
}

/// Counted costs.
#[derive(Clone, Debug, Default)]
pub struct Figures {
    pub invocations: BTreeMap<String, u64>,
    pub busy: BTreeMap<String, Duration>,
    pub read_units: f64,
    pub write_units: f64,
    pub queue_requests: u64,
    pub object_calls: u64,
    pub provider_calls: u64,
    pub agent_calls: u64,
    pub faults: BTreeMap<String, u64>,
}

/// Runs a scenario in a runtime of its own, on a paused clock.
pub fn run(conditions: &Conditions, load: &Load) -> Report {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        let began = Instant::now();
        let (world, entered) = World::start(conditions).await;
        let users: Vec<UserId> = (0..load.tenants).map(|number| UserId::new(format!("tenant-{number}"))).collect();
        join_all(users.iter().map(|user| Box::pin(world.settings(user)))).await;
        let known = Arc::new(Mutex::new(Vec::new()));
        let clients = (0..load.starts).map(|number| {
            // The first tenant has a third of the starts.
            let tenant = match seeded(conditions.seed, &("tenant", number)) {
                draw if draw % 3 == 0 => 0,
                draw => (draw >> 8) % load.tenants,
            };
            let user = users[usize::try_from(tenant).expect("a small number")].clone();
            let client =
                Client { world: world.clone(), seed: seeded(conditions.seed, &("client", number)), user, number };
            // In a task of its own, as its future is too large for the stack.
            let running = tokio::spawn(client.run(load.within, known.clone()));
            async { running.await.expect("a client") }
        });
        let mut violations: Vec<String> = join_all(clients).await.into_iter().flatten().collect();
        world.sandboxes().heal();
        let starts = lock(&known).clone();
        settle(&world, &mut violations).await;
        check(&world, &starts, &mut violations);
        let (hash, calls) = (world.services().trace.hash(), world.services().trace.calls());
        if let Some(folder) = std::env::var_os("SIM_LINES") {
            let path = std::path::Path::new(&folder).join(format!("{}-{}", conditions.seed, std::process::id()));
            std::fs::write(path, world.services().trace.lines().join("\n")).expect("a file");
        }
        let report = Report { hash, calls, starts, violations, took: began.elapsed(), world: figures(&world) };
        drop(entered);
        report
    })
}

struct Client {
    world: World,
    seed: u64,
    user: UserId,
    number: u64,
}

impl Client {
    fn draw(&self, what: &str) -> f64 {
        random(self.seed, &what)
    }

    /// Repeats a request as a client does after a 5xx, a 429 or no response. Returns the last response.
    async fn repeat(
        &self,
        function: &'static str,
        method: &str,
        path: &str,
        key: Option<&str>,
        body: &Value,
    ) -> (u16, Value) {
        let mut last = (0, Value::Null);
        for attempt in 0..40_u32 {
            if let Ok(response) = self.world.send(function, &self.user, method, path, key, body).await {
                last = response;
                if last.0 < 500 && last.0 != 429 {
                    return last;
                }
            }
            sleep(Duration::from_millis(500 * u64::from(attempt.min(20) + 1))).await;
        }
        last
    }

    /// Returns what went wrong from the client's point of view.
    async fn run(self, within: Duration, known: Arc<Mutex<Vec<Start>>>) -> Vec<String> {
        sleep(within.mul_f64(self.draw("arrival"))).await;
        let number = self.number;
        let message = (self.draw("message") < 0.7).then(|| format!("first message of {number}"));
        let mut body = json!({});
        if let Some(text) = &message {
            body["initial_message"] = json!({"role": "user", "content": [{"type": "text", "text": text}], "run": true});
        }
        if self.draw("repository") < 0.6 {
            body["selected_repository"] = format!("o/r{}", number % 7).into();
            body["git_provider"] = "github".into();
        }
        let key = format!("key-{number}");
        let (status, task) = self.repeat("start", "POST", "/api/v1/app-conversations", Some(&key), &body).await;
        if status != 200 {
            return vec![format!("start {number}: POST is {status} {task}")];
        }
        let began = Instant::now();
        let id = |name: &str| Uuid::parse_str(task[name].as_str().unwrap_or_default()).unwrap_or_default();
        let mut start = Start {
            user: self.user.clone(),
            task: id("id"),
            conversation: Uuid::nil(),
            message,
            status: String::new(),
            detail: None,
            took: Duration::ZERO,
            accepted: Vec::new(),
            is_deleted: false,
        };
        let pending = if self.draw("early message") < 0.2 { 2 } else { 0 };
        let to = format!("task-{}", start.task.simple());
        for message in 0..pending {
            self.queue_message(&mut start, &to, message).await;
        }
        let path = format!("/api/v1/app-conversations/start-tasks?ids={}", start.task.simple());
        while began.elapsed() < LONGEST_START {
            let (status, tasks) = self.repeat("start-tasks", "GET", &path, None, &Value::Null).await;
            let shown = &tasks[0];
            if status == 200 && matches!(shown["status"].as_str(), Some("READY" | "ERROR")) {
                start.status = shown["status"].as_str().unwrap_or_default().to_owned();
                start.detail = shown["detail"].as_str().map(str::to_owned);
                start.conversation =
                    shown["app_conversation_id"].as_str().and_then(|id| Uuid::parse_str(id).ok()).unwrap_or_default();
                break;
            }
            sleep(Duration::from_secs(5)).await;
        }
        start.took = began.elapsed();
        if start.status == "READY" {
            let to = start.conversation.hyphenated().to_string();
            for message in 2..2 + seeded(self.seed, &"messages") % 3 {
                sleep(Duration::from_secs(seeded(self.seed, &("pause", message)) % 300)).await;
                self.queue_message(&mut start, &to, message).await;
            }
            sleep(Duration::from_secs(seeded(self.seed, &"stay") % 1800)).await;
            if self.draw("delete") < 0.5 {
                let path = format!("/api/v1/app-conversations/{to}");
                let (status, answer) = self.repeat("conversations", "DELETE", &path, None, &Value::Null).await;
                // 404: an attempt whose response was lost has deleted it.
                start.is_deleted = matches!(status, 200 | 204 | 404);
                if !start.is_deleted {
                    lock(&known).push(start);
                    return vec![format!("start {number}: DELETE is {status} {answer}")];
                }
            }
        }
        lock(&known).push(start);
        Vec::new()
    }

    /// Sends a pending message. It may be stored although its response is lost; then nothing is known, and it is not repeated.
    async fn queue_message(&self, start: &mut Start, to: &str, message: u64) {
        let text = format!("message {message} of {}", self.number);
        let path = format!("/api/v1/conversations/{to}/pending-messages");
        let body = json!({"content": [{"type": "text", "text": text}]});
        if let Ok((201, _)) = self.world.send("sandboxes", &self.user, "POST", &path, None, &body).await {
            start.accepted.push(text);
        }
    }
}

/// Waits until nothing is left to do.
async fn settle(world: &World, violations: &mut Vec<String>) {
    let deadline = Instant::now() + LONGEST_REST;
    let mut quiet = 0;
    while quiet < 15 {
        sleep(Duration::from_secs(61)).await;
        let is_quiet =
            unfinished(world).is_empty() && world.sandboxes().is_quiet() && world.services().queues_are_empty();
        quiet = if is_quiet { quiet + 1 } else { 0 };
        if Instant::now() > deadline {
            let left = unfinished(world);
            violations.push(format!("after {LONGEST_REST:?} there is still work: {left:?}"));
            return;
        }
    }
    world.services().dynamodb.catch_up();
}

fn text<'a>(item: &'a Value, name: &str) -> Option<&'a str> {
    item[name]["S"].as_str()
}

/// Rows that are to be processed: starts, deletions, queues of messages, sandboxes that are marked for deletion.
fn unfinished(world: &World) -> Vec<String> {
    let names = &world.services().names;
    let rows = |table: &str| world.services().dynamodb.items(table);
    let mut left = Vec::new();
    for row in rows(&names.start_tasks) {
        if text(&row, "id").is_some_and(|id| id.ends_with("#lease"))
            && text(&row, "expires_at").is_none()
            && row["expires_at"].is_null()
        {
            left.push(format!("start {}", text(&row, "id").unwrap_or_default()));
        }
    }
    for row in rows(&names.conversations) {
        if !row["due_at"].is_null() && row["expires_at"].is_null() {
            left.push(format!("conversation {}", text(&row, "id").unwrap_or_default()));
        }
    }
    for row in rows(&names.sandboxes) {
        if text(&row, "desired") == Some("deleted") {
            left.push(format!("sandbox {}", text(&row, "id").unwrap_or_default()));
        }
    }
    left
}

/// Compares what is stored and what has happened with what clients know.
fn check(world: &World, starts: &[Start], violations: &mut Vec<String>) {
    violations.extend(world.services().lambda.panics().into_iter().map(|panic| format!("panic: {panic}")));
    let histories = world.sandboxes().conversations();
    let mut of: BTreeMap<Uuid, Vec<&ConversationHistory>> = BTreeMap::new();
    for history in &histories {
        of.entry(history.id).or_default().push(history);
    }
    let refused: BTreeSet<Uuid> =
        world.sandboxes().runs().iter().filter(|run| run.is_refused).map(|run| run.task).collect();
    let sandboxes = world.sandboxes().history();
    let records = world.services().dynamodb.items(&world.services().names.sandboxes);
    for start in starts {
        let name = format!("start {} of {}", start.task.simple(), start.user);
        match start.status.as_str() {
            "READY" => {}
            "ERROR" => {
                let detail = start.detail.as_deref().unwrap_or_default();
                let lost = sandboxes.iter().filter(|sandbox| sandbox.life.iter().any(|(_, what)| is_end(*what)));
                let mut lost = lost.filter_map(|sandbox| sandbox_of(&records, sandbox));
                let is_injected = refused.contains(&start.task)
                    || PERMANENT.iter().any(|cause| detail.contains(cause))
                    || lost.any(|id| detail.contains(&id));
                if !is_injected {
                    violations.push(format!("{name} is ERROR without a permanent cause: {detail}"));
                }
            }
            _ => violations.push(format!("{name} has not ended after {:?}", start.took)),
        }
        if start.status != "READY" {
            continue;
        }
        let received: Vec<&str> = of
            .get(&start.conversation)
            .into_iter()
            .flatten()
            .flat_map(|one| &one.messages)
            .map(|one| one.text.as_str())
            .collect();
        if let Some(first) = &start.message {
            let times = received.iter().filter(|text| *text == first).count();
            if times != 1 {
                violations.push(format!("{name}: the first message arrived {times} times"));
            }
        }
        let mine: Vec<&str> =
            received.iter().copied().filter(|text| start.accepted.iter().any(|one| one == text)).collect();
        let arrived: BTreeSet<&str> = mine.iter().copied().collect();
        if arrived.len() != mine.len() {
            violations.push(format!("{name}: a message arrived twice: {received:?}"));
        }
        let in_order: Vec<&str> =
            start.accepted.iter().map(String::as_str).filter(|text| arrived.contains(text)).collect();
        if in_order != mine && arrived.len() == mine.len() {
            violations.push(format!("{name}: messages arrived in another order: {received:?}"));
        }
        let is_dead = of.get(&start.conversation).into_iter().flatten().any(|one| {
            let sandbox = sandboxes.iter().find(|sandbox| sandbox.runtime_id == one.runtime_id);
            sandbox.is_none_or(|sandbox| sandbox.life.iter().any(|(_, what)| is_end(*what)))
        });
        if !start.is_deleted && !is_dead && arrived.len() != start.accepted.len() {
            violations.push(format!("{name}: of {:?} arrived {received:?}", start.accepted));
        }
        if let Some(copies) = of.get(&start.conversation)
            && copies.len() != 1
        {
            violations.push(format!("{name}: {} agent servers have had its conversation", copies.len()));
        }
    }
    check_records(world, starts, violations);
    check_sandboxes(world, violations);
}

/// Whether a sandbox has ended without a client's doing.
fn is_end(what: Life) -> bool {
    matches!(what, Life::Evicted | Life::Failed)
}

/// The id of the product's record of a sandbox, by its name at the provider.
fn sandbox_of(rows: &[Value], sandbox: &SandboxHistory) -> Option<String> {
    let named = format!("#name#{}", sandbox.session);
    let name = rows.iter().find(|row| text(row, "user") == Some(&named))?;
    text(name, "sandbox").map(str::to_owned)
}

/// What `detail` says of a start whose time is up: its sandbox booted too slowly, or the provider had too long an outage.
const PERMANENT: [&str; 2] = ["Sandbox failed to start within", "The sandbox provider does not respond"];

/// Nothing is left of what was deleted, and everything else is there.
fn check_records(world: &World, starts: &[Start], violations: &mut Vec<String>) {
    let names = &world.services().names;
    let rows = |table: &str| world.services().dynamodb.items(table);
    let conversations: BTreeMap<String, Value> = rows(&names.conversations)
        .into_iter()
        .filter(|row| row["expires_at"].is_null())
        .map(|row| (text(&row, "id").unwrap_or_default().to_owned(), row))
        .collect();
    let events = rows(&names.events);
    for start in starts {
        let id = start.conversation.simple().to_string();
        if start.is_deleted {
            if conversations.contains_key(&id) {
                violations.push(format!("conversation {id} was deleted and is there"));
            }
            let left = events.iter().filter(|row| row.to_string().contains(&id)).count();
            if left > 0 {
                violations.push(format!("conversation {id} was deleted and has {left} events"));
            }
        } else if start.status == "READY" && !conversations.contains_key(&id) {
            violations.push(format!("conversation {id} is READY and is not there"));
        }
    }
    let expected: BTreeSet<String> = starts
        .iter()
        .filter(|start| start.status == "READY" && !start.is_deleted)
        .map(|start| start.conversation.simple().to_string())
        .collect();
    for id in conversations.keys().filter(|id| !expected.contains(*id)) {
        violations.push(format!("conversation {id} belongs to no start: {}", conversations[id]));
    }
}

/// No sandbox runs without a member, and none is gone that has members.
fn check_sandboxes(world: &World, violations: &mut Vec<String>) {
    let rows = world.services().dynamodb.items(&world.services().names.sandboxes);
    let records: Vec<&Value> = rows.iter().filter(|row| text(row, "desired").is_some()).collect();
    let is_member = |row: &Value| row["starts"].is_object() || row["conversations"].is_object();
    for row in &records {
        if !is_member(row) {
            violations.push(format!("sandbox {} has no member", text(row, "id").unwrap_or_default()));
        }
    }
    for sandbox in world.sandboxes().history() {
        let is_left = matches!(sandbox.status, "starting" | "running" | "paused");
        let id = sandbox_of(&rows, &sandbox);
        let has_record = id.is_some() && records.iter().any(|row| text(row, "id") == id.as_deref());
        if is_left && !has_record {
            violations.push(format!(
                "sandbox {} is {} and has no record: {:?}",
                sandbox.session, sandbox.status, sandbox.life
            ));
        }
    }
}

fn figures(world: &World) -> Figures {
    let services = world.services();
    let mut figures = Figures::default();
    for (name, usage) in services.lambda.usage() {
        figures.invocations.insert(name.to_owned(), usage.invocations);
        figures.busy.insert(name.to_owned(), usage.busy);
    }
    for usage in services.dynamodb.usage().values() {
        figures.read_units += usage.read_units;
        figures.write_units += usage.write_units;
    }
    for usage in services.sqs.usage().values() {
        figures.queue_requests += usage.send_requests + usage.receive_requests + usage.delete_requests;
    }
    figures.object_calls = services.s3.usage().values().map(|usage| usage.calls).sum();
    for (kind, count) in world.sandboxes().calls() {
        *(if kind.starts_with("agent ") { &mut figures.agent_calls } else { &mut figures.provider_calls }) += count;
    }
    for ((service, fault), count) in services.happened() {
        figures.faults.insert(format!("{service} {fault}"), count);
    }
    figures
}

impl Report {
    pub fn print(&self, seed: u64) {
        let mut text = String::new();
        let ready = self.starts.iter().filter(|start| start.status == "READY").count();
        let _infallible = writeln!(
            text,
            "seed {seed}: {} starts, {ready} READY, {} calls, hash {:016x}, {:?} simulated",
            self.starts.len(),
            self.calls,
            self.hash,
            self.took
        );
        let mut details: BTreeMap<String, usize> = BTreeMap::new();
        for start in self.starts.iter().filter(|start| start.status != "READY") {
            let detail = start.detail.clone().unwrap_or_else(|| start.status.clone());
            *details.entry(detail.chars().filter(|one| !one.is_ascii_digit()).take(90).collect()).or_default() += 1;
        }
        let _infallible = writeln!(text, "  errors {details:?}\n  {:?}", self.world);
        for violation in &self.violations {
            let _infallible = writeln!(text, "  VIOLATION {violation}");
        }
        println!("{text}");
    }
}

/// A scenario by its numbers, from the environment: `SIM_SEED`, `SIM_SEEDS`, `SIM_STARTS`, `SIM_TENANTS`, `SIM_WORKERS`, `SIM_MINUTES`
/// (over which the starts are spread), and `SIM_CALM` for a world without faults.
fn from_environment() -> (std::ops::Range<u64>, impl Fn(u64) -> Conditions, Load) {
    let number = |name: &str, default: u64| {
        let given = std::env::var(name).ok();
        given.map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
    };
    let (first, seeds) = (number("SIM_SEED", 1), number("SIM_SEEDS", 1));
    let (is_calm, workers) = (std::env::var_os("SIM_CALM").is_some(), number("SIM_WORKERS", 10));
    let minutes = number("SIM_MINUTES", 10);
    let load = Load {
        starts: number("SIM_STARTS", 10),
        tenants: number("SIM_TENANTS", 4),
        within: Duration::from_secs(60 * minutes),
    };
    let conditions = move |seed| conditions(seed, is_calm, usize::try_from(workers).expect("a small number"));
    (first..first + seeds, conditions, load)
}

fn conditions(seed: u64, is_calm: bool, workers: usize) -> Conditions {
    let (aws, agents) = match is_calm {
        true => (crate::aws::Faults::none(), agents::Faults::default()),
        false => (crate::aws::Faults::hostile(), agents::Faults::usual()),
    };
    Conditions { seed, aws, agents, pace: agents::Pace::default(), cap: None, workers }
}

/// Runs the scenario of the environment, prints a report for each seed, and fails if anything does not hold.
#[test]
fn scenario_holds() {
    let (seeds, conditions, load) = from_environment();
    let mut failed = Vec::new();
    for seed in seeds {
        let report = run(&conditions(seed), &load);
        report.print(seed);
        if !report.violations.is_empty() {
            failed.push(seed);
        }
    }
    assert!(failed.is_empty(), "seeds {failed:?}");
}

/// Another process, in which the hashes of maps are different, gives the same trace.
#[test]
fn trace_of_a_seed_is_the_same_in_two_processes() {
    let hash = || {
        let mut process = std::process::Command::new(std::env::current_exe().expect("this program"));
        process.args(["--exact", "scenario::scenario_holds", "--nocapture"]);
        process.envs([("SIM_SEED", "20"), ("SIM_SEEDS", "1"), ("SIM_STARTS", "5")]);
        let output = process.output().expect("a process");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let (_, rest) = text.split_once("hash ").unwrap_or_else(|| panic!("{text}"));
        rest.chars().take(16).collect::<String>()
    };
    assert_eq!(hash(), hash());
}
