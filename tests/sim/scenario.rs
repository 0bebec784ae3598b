//! What clients do in a world, and what must hold at its end.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Cursor;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use axum::body::Body;
use futures::future::join_all;
use http::StatusCode;
use serde_json::{Value, json};
use shared::http::caller::Caller;
use shared::user::UserId;
use tokio::time::{Instant, sleep};
use uuid::Uuid;
use zip::ZipArchive;

use crate::agents;
use crate::aws::lock;
use crate::cost::{Costs, PerStart};
use crate::dice::{random, seeded};
use crate::invariants::{check, unfinished};
use crate::world::{Conditions, World};

/// The starts, their users, and how long they are spread over.
#[derive(Clone, Debug)]
pub struct Load {
    pub starts: u64,
    pub tenants: u64,
    pub within: Duration,
    /// The share of the first tenant in the starts. `None`: a third, and what each of the tenants has of the rest.
    pub first_share: Option<f64>,
    /// Leaves out the first tenant. What the others do stays the same.
    pub without_first: bool,
}

/// The longest time from a request to READY or ERROR: the sum of the limits of the steps (boot 120 s, clone 300 s, script 600 s, four
/// other steps of 300 s, each with its margin), and the waits in queues.
const LONGEST_START: Duration = Duration::from_secs(90 * 60);
/// How often a client asks for its start's status.
const POLL: Duration = Duration::from_secs(5);
/// The longest time from a request to an export: the time limit of a build, and its repetition.
const LONGEST_EXPORT: Duration = Duration::from_secs(30 * 60);
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
    /// When its client sent the request, and when the client had the response, since the simulation began.
    pub began: Duration,
    pub began_to_wait: Duration,
    /// The time until the client knew the end.
    pub took: Duration,
    /// The sandbox that its request named.
    pub named: Option<String>,
    /// The sandbox that it has chosen.
    pub sandbox: Option<String>,
    /// The texts of pending messages that were accepted, in their order.
    pub accepted: Vec<String>,
    /// When the client sent the request to delete its conversation, since the simulation began.
    pub deleted_at: Option<Duration>,
}

impl Start {
    pub fn name(&self) -> String {
        format!("start {} of {}", self.task.simple(), self.user)
    }

    pub fn is_deleted(&self) -> bool {
        self.deleted_at.is_some()
    }
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
    pub costs: Costs,
    /// The agents' turns: messages that they received.
    pub turns: usize,
    /// Injected faults that happened, by service.
    pub faults: BTreeMap<String, u64>,
    /// The highest share of a partition's capacity that a second has used, by table and index.
    pub peaks: Vec<(String, f64)>,
    /// The most invocations of each function at one time.
    pub most_concurrent: BTreeMap<&'static str, usize>,
    /// Invocations that Lambda refused, because the account's executions were in use.
    pub throttled: u64,
}

/// The most that a start may cost on average, with its agent's turns and its deletion, in a world without faults.
const BUDGET: PerStart = PerStart {
    worker_invocations: 25.0,
    worker_seconds: 35.0,
    webhook_invocations: 18.0,
    read_units: 150.0,
    write_units: 480.0,
    queue_requests: 75.0,
    provider_calls: 26.0,
    agent_calls: 42.0,
};
/// The same in a hostile world, in which calls, messages and invocations are repeated.
const HOSTILE_BUDGET: PerStart = PerStart {
    worker_invocations: 55.0,
    worker_seconds: 75.0,
    webhook_invocations: 22.0,
    read_units: 300.0,
    write_units: 600.0,
    queue_requests: 150.0,
    provider_calls: 40.0,
    agent_calls: 75.0,
};
/// With fewer starts the averages say little.
const STARTS_FOR_A_BUDGET: usize = 50;

/// Runs a scenario in a runtime of its own, on a paused clock.
pub fn run(conditions: &Conditions, load: &Load) -> Report {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_time().start_paused(true).build().expect("a runtime");
    runtime.block_on(async {
        let began = Instant::now();
        let (world, entered) = World::start(conditions).await;
        let users: Vec<UserId> = (0..load.tenants).map(|number| UserId::new(format!("tenant-{number}"))).collect();
        join_all(users.iter().map(|user| Box::pin(world.settings(user, grouping(conditions.seed, user))))).await;
        let known = Arc::new(Mutex::new(Vec::new()));
        let tenant_of = |number: u64| match load.first_share {
            Some(share) if random(conditions.seed, &("first tenant", number)) < share => 0,
            Some(_) => seeded(conditions.seed, &("tenant", number)) % load.tenants,
            None => match seeded(conditions.seed, &("tenant", number)) {
                draw if draw % 3 == 0 => 0,
                draw => (draw >> 8) % load.tenants,
            },
        };
        let numbers = (0..load.starts).filter(|number| !load.without_first || tenant_of(*number) > 0);
        let clients = numbers.map(|number| {
            let tenant = tenant_of(number);
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
        let services = world.services();
        let costs = Costs::of(services);
        if starts.len() >= STARTS_FOR_A_BUDGET {
            let budget = if conditions.is_calm() { &BUDGET } else { &HOSTILE_BUDGET };
            violations.extend(costs.per_start(starts.len()).over(budget));
        }
        let turns = world.sandboxes().conversations().iter().map(|one| one.messages.len()).sum();
        let happened = services.happened().into_iter();
        let faults = happened.map(|((service, fault), count)| (format!("{service} {fault}"), count)).collect();
        let mut peaks: Vec<(String, f64)> =
            services.dynamodb.peaks().into_iter().map(|(name, (peak, _))| (name, peak)).collect();
        peaks.sort_by(|(_, one), (_, other)| other.total_cmp(one));
        let usage = services.lambda.usage();
        let report = Report {
            hash,
            calls,
            starts,
            violations,
            took: began.elapsed(),
            costs,
            turns,
            faults,
            peaks,
            most_concurrent: usage.iter().map(|(name, usage)| (*name, usage.most_concurrent)).collect(),
            throttled: usage.values().map(|usage| usage.throttled).sum(),
        };
        drop(entered);
        report
    })
}

/// How a user's starts share sandboxes. Most users' do not.
fn grouping(seed: u64, user: &UserId) -> &'static str {
    match seeded(seed, &("grouping", user.as_str())) % 8 {
        0 => "ADD_TO_ANY",
        1 => "LEAST_RECENTLY_USED",
        2 => "FEWEST_CONVERSATIONS",
        _ => "NO_GROUPING",
    }
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
        let mut starts = Vec::new();
        let wrong = self.live(&mut starts).await;
        lock(&known).extend(starts);
        wrong.into_iter().collect()
    }

    /// Starts a conversation and talks to it. Some clients then start another one in the same sandbox, and delete the first one about the
    /// same time. Some delete what they have started. Returns what went wrong.
    async fn live(&self, starts: &mut Vec<Start>) -> Option<String> {
        let mut first = match self.start("", None).await {
            Ok(start) => start,
            Err(wrong) => return Some(wrong),
        };
        self.follow("", &mut first).await;
        if first.status != "READY" {
            starts.push(first);
            return None;
        }
        let exported = if self.draw("export") < 0.2 { self.export(&first).await } else { Ok(()) };
        if let Err(wrong) = exported {
            starts.push(first);
            return Some(wrong);
        }
        let sandbox = first.sandbox.clone();
        let (then, delay) = (self.draw("then"), Duration::from_secs(20).mul_f64(self.draw("delay").powi(2)));
        let mut second = None;
        if then < 0.12 {
            second = Some(self.start(" again", sandbox.clone()).await);
            sleep(delay).await;
        }
        let is_deleted = if then < 0.24 || self.draw("delete") < 0.5 { self.delete(&mut first).await } else { Ok(()) };
        starts.push(first);
        if (0.12..0.24).contains(&then) {
            sleep(delay).await;
            second = Some(self.start(" again", sandbox).await);
        }
        let mut second = match (second, is_deleted) {
            (_, Err(wrong)) | (Some(Err(wrong)), _) => return Some(wrong),
            (None, _) => return None,
            (Some(Ok(second)), _) => second,
        };
        self.follow(" again", &mut second).await;
        let delete = second.status == "READY" && self.draw("delete again") < 0.5;
        let is_deleted = if delete { self.delete(&mut second).await } else { Ok(()) };
        starts.push(second);
        is_deleted.err()
    }

    /// Requests a start. `again` distinguishes the starts of a client.
    async fn start(&self, again: &str, sandbox: Option<String>) -> Result<Start, String> {
        let number = self.number;
        let draw = |what: &str| self.draw(&format!("{what}{again}"));
        let message = (draw("message") < 0.7).then(|| format!("first message of {number}{again}"));
        let mut body = json!({});
        if let Some(text) = &message {
            body["initial_message"] = json!({"role": "user", "content": [{"type": "text", "text": text}], "run": true});
        }
        if draw("repository") < 0.6 {
            body["selected_repository"] = format!("o/r{}", number % 7).into();
            body["git_provider"] = "github".into();
        }
        if let Some(sandbox) = &sandbox {
            body["sandbox_id"] = sandbox.as_str().into();
        }
        let (key, began) = (format!("key-{number}{}", again.replace(' ', "-")), self.world.elapsed());
        let (status, task) = self.repeat("start", "POST", "/api/v1/app-conversations", Some(&key), &body).await;
        if status != 200 {
            return Err(format!("start {number}{again}: POST is {status} {task}"));
        }
        let id = |name: &str| Uuid::parse_str(task[name].as_str().unwrap_or_default()).unwrap_or_default();
        Ok(Start {
            user: self.user.clone(),
            task: id("id"),
            conversation: Uuid::nil(),
            message,
            status: String::new(),
            detail: None,
            began,
            began_to_wait: self.world.elapsed(),
            took: Duration::ZERO,
            named: sandbox,
            sandbox: None,
            accepted: Vec::new(),
            deleted_at: None,
        })
    }

    /// Follows a start until its end, sends messages, and stays for a while.
    async fn follow(&self, again: &str, start: &mut Start) {
        let pending = if self.draw(&format!("early message{again}")) < 0.2 { 2 } else { 0 };
        let to = format!("task-{}", start.task.simple());
        for message in 0..pending {
            self.queue_message(again, start, &to, message).await;
        }
        let path = format!("/api/v1/app-conversations/start-tasks?ids={}", start.task.simple());
        while self.world.elapsed() < start.began_to_wait + LONGEST_START {
            let (status, tasks) = self.repeat("start-tasks", "GET", &path, None, &Value::Null).await;
            let shown = &tasks[0];
            if status == 200 && matches!(shown["status"].as_str(), Some("READY" | "ERROR")) {
                shown["status"].as_str().unwrap_or_default().clone_into(&mut start.status);
                start.detail = shown["detail"].as_str().map(str::to_owned);
                start.sandbox = shown["sandbox_id"].as_str().map(str::to_owned);
                start.conversation =
                    shown["app_conversation_id"].as_str().and_then(|id| Uuid::parse_str(id).ok()).unwrap_or_default();
                break;
            }
            sleep(POLL).await;
        }
        start.took = self.world.elapsed().saturating_sub(start.began);
        if start.status == "READY" {
            let to = start.conversation.hyphenated().to_string();
            for message in 2..2 + seeded(self.seed, &format!("messages{again}")) % 3 {
                let pause = seeded(self.seed, &(format!("pause{again}"), message)) % 300;
                sleep(Duration::from_secs(pause)).await;
                self.queue_message(again, start, &to, message).await;
            }
            sleep(Duration::from_secs(seeded(self.seed, &format!("stay{again}")) % 1800)).await;
        }
    }

    /// Downloads the export of a conversation. Returns what is wrong with it.
    async fn export(&self, start: &Start) -> Result<(), String> {
        let path = format!("/api/v1/app-conversations/{}/download", start.conversation.hyphenated());
        for _ in 0..LONGEST_EXPORT.as_secs() / POLL.as_secs() {
            let stored = self.world.stored_events(&self.user, start.conversation);
            let request = http::Request::get(&path).extension(Caller(self.user.clone())).body(Body::empty());
            match self.world.call("download", request.expect("a request")).await {
                Ok((StatusCode::OK, zip)) => {
                    return check_export(&zip, &stored).map_err(|wrong| format!("{}: {wrong}", start.name()));
                }
                Ok((status, _)) if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS => {
                    return Err(format!("{}: its export is {status}", start.name()));
                }
                _ => sleep(POLL).await,
            }
        }
        Err(format!("{}: no export within {LONGEST_EXPORT:?}", start.name()))
    }

    /// Deletes the conversation of a start.
    async fn delete(&self, start: &mut Start) -> Result<(), String> {
        let path = format!("/api/v1/app-conversations/{}", start.conversation.hyphenated());
        let at = self.world.elapsed();
        match self.repeat("conversations", "DELETE", &path, None, &Value::Null).await {
            // 404: an attempt whose response was lost has deleted it.
            (200 | 204 | 404, _) => {
                start.deleted_at = Some(at);
                Ok(())
            }
            (status, answer) => Err(format!("{}: DELETE is {status} {answer}", start.name())),
        }
    }

    /// Sends a pending message. It may be stored although its response is lost; then nothing is known, and it is not repeated.
    async fn queue_message(&self, again: &str, start: &mut Start, to: &str, message: u64) {
        let text = format!("message {message} of {}{again}", self.number);
        let path = format!("/api/v1/conversations/{to}/pending-messages");
        let body = json!({"content": [{"type": "text", "text": text}]});
        if let Ok((201, _)) = self.world.send("sandboxes", &self.user, "POST", &path, None, &body).await {
            start.accepted.push(text);
        }
    }
}

/// An export is a whole zip file with the conversation and every event that was stored before the request.
fn check_export(zip: &[u8], stored: &BTreeSet<String>) -> Result<(), String> {
    let mut archive = ZipArchive::new(Cursor::new(zip)).map_err(|error| format!("its export is no zip: {error}"))?;
    let mut events = BTreeSet::new();
    let mut has_meta = false;
    for index in 0..archive.len() {
        let mut member = archive.by_index(index).map_err(|error| error.to_string())?;
        let name = member.name().map_err(|error| error.to_string())?.into_owned();
        let content: Value = serde_json::from_reader(&mut member).map_err(|error| format!("{name}: {error}"))?;
        match name.strip_prefix("event_") {
            Some(_) => drop(events.insert(content["id"].as_str().unwrap_or_default().to_owned())),
            None => has_meta |= name == "meta.json",
        }
    }
    let lost: Vec<&String> = stored.difference(&events).collect();
    match (has_meta, lost.is_empty()) {
        (false, _) => Err("its export has no meta.json".to_owned()),
        (true, false) => Err(format!("its export lacks {} of {} events: {lost:?}", lost.len(), stored.len())),
        (true, true) => Ok(()),
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

impl Report {
    /// What a person reads of a run: a line, and with `is_long` what it cost and where it was busy.
    pub fn text(&self, seed: u64, is_long: bool) -> String {
        let mut text = String::new();
        let ready: Vec<&Start> = self.starts.iter().filter(|start| start.status == "READY").collect();
        let _infallible = writeln!(
            text,
            "seed {seed}: {} starts, {} READY, {} calls, hash {:016x}, {:?} simulated",
            self.starts.len(),
            ready.len(),
            self.calls,
            self.hash,
            self.took
        );
        let mut details: BTreeMap<String, usize> = BTreeMap::new();
        for start in self.starts.iter().filter(|start| start.status != "READY") {
            let detail = start.detail.clone().unwrap_or_else(|| start.status.clone());
            *details.entry(detail.chars().filter(|one| !one.is_ascii_digit()).take(90).collect()).or_default() += 1;
        }
        for (detail, count) in &details {
            let _infallible = writeln!(text, "  {count} ERROR: {detail}");
        }
        if is_long {
            let mut took: Vec<Duration> = ready.iter().map(|start| start.took).collect();
            took.sort();
            let at = |share: usize| took.get((took.len() * share / 100).min(took.len().saturating_sub(1))).copied();
            let _infallible = writeln!(
                text,
                "  to READY, as clients see it that ask every {POLL:?}: median {:?}, 90 % {:?}, 99 % {:?}, longest {:?}",
                at(50).unwrap_or_default(),
                at(90).unwrap_or_default(),
                at(99).unwrap_or_default(),
                at(100).unwrap_or_default()
            );
            let _infallible = write!(text, "{}", self.costs.table());
            let _infallible = writeln!(text, "  one start: {}", self.costs.per_start(self.starts.len()).line());
            let webhooks = self.costs.of_function("events");
            let _infallible = writeln!(
                text,
                "  one of {} turns: {:.1} webhook requests, {:.1} read and {:.1} write units of theirs",
                self.turns,
                ratio(webhooks.invocations as f64, self.turns),
                ratio(webhooks.read_units, self.turns),
                ratio(webhooks.write_units, self.turns)
            );
            let peaks: Vec<String> =
                self.peaks.iter().take(5).map(|(name, peak)| format!("{name} {:.1} %", peak * 100.0)).collect();
            let _infallible = writeln!(text, "  busiest partitions, of what DynamoDB allows one: {}", peaks.join(", "));
            let _infallible = writeln!(
                text,
                "  most invocations at a time: {:?}, refused for lack of executions: {}",
                self.most_concurrent, self.throttled
            );
            let _infallible = writeln!(text, "  faults: {:?}", self.faults);
        }
        for violation in &self.violations {
            let _infallible = writeln!(text, "  VIOLATION {violation}");
        }
        text
    }
}

fn ratio(value: f64, count: usize) -> f64 {
    value / count.max(1) as f64
}

/// A number from the environment.
fn number(name: &str, default: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// A scenario by its numbers, from the environment: `SIM_SEED`, `SIM_SEEDS`, `SIM_SKIP` (seeds that are left out), `SIM_STARTS`, `SIM_TENANTS`, `SIM_WORKERS`, `SIM_MINUTES` (over
/// which the starts are spread), `SIM_FIRST_PERCENT` (the first tenant's share of the starts), `SIM_CALM` for a world without faults, and
/// `SIM_REFUSALS` for the share, in percent, of repositories that cannot be cloned, `SIM_OUTAGES` for the share of minutes in which a
/// service of AWS fails half of its calls. With `SIM_BODIES` the hash of the trace includes
/// bodies.
fn from_environment() -> (Vec<u64>, impl Fn(u64) -> Conditions, Load) {
    let (first, seeds) = (number("SIM_SEED", 1), number("SIM_SEEDS", 1));
    let (is_calm, workers) = (std::env::var_os("SIM_CALM").is_some(), number("SIM_WORKERS", 10));
    let minutes = number("SIM_MINUTES", 10);
    let share = |name: &str| std::env::var_os(name).map(|_| number(name, 0) as f64 / 100.0);
    let (refusals, outages) = (share("SIM_REFUSALS"), share("SIM_OUTAGES"));
    let load = Load {
        starts: number("SIM_STARTS", 10),
        tenants: number("SIM_TENANTS", 4),
        within: Duration::from_secs(60 * minutes),
        first_share: share("SIM_FIRST_PERCENT"),
        without_first: false,
    };
    let conditions = move |seed| {
        let mut conditions = conditions(seed, is_calm, usize::try_from(workers).expect("a small number"));
        if let Some(refusals) = refusals {
            conditions.agents.commands.clone_refusals = refusals;
        }
        if let Some(outages) = outages {
            conditions.aws.outages = outages;
        }
        conditions
    };
    let skipped: Vec<u64> = std::env::var("SIM_SKIP")
        .unwrap_or_default()
        .split_whitespace()
        .map(|seed| seed.parse().expect("SIM_SKIP has numbers"))
        .collect();
    ((first..first + seeds).filter(|seed| !skipped.contains(seed)).collect(), conditions, load)
}

pub fn conditions(seed: u64, is_calm: bool, workers: usize) -> Conditions {
    let (aws, agents) = match is_calm {
        true => (crate::aws::Faults::none(), agents::Faults::default()),
        false => (crate::aws::Faults::hostile(), agents::Faults::usual()),
    };
    Conditions { seed, aws, agents, pace: agents::Pace::default(), cap: None, workers }
}

/// The stack of a thread that runs a world, in bytes. Without optimisation the futures are large.
const STACK: usize = 16 << 20;

/// Runs seeds on as many threads as there are processors, and hands each report over in the order of the seeds.
fn run_all(
    seeds: &[u64],
    conditions: &(impl Fn(u64) -> Conditions + Sync),
    load: &Load,
    mut done: impl FnMut(u64, Report),
) {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let (sender, reports) = mpsc::channel();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            let (sender, next) = (sender.clone(), &next);
            let work = move || {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if sender.send((*seed, run(&conditions(*seed), load))).is_err() {
                        return;
                    }
                }
            };
            std::thread::Builder::new().stack_size(STACK).spawn_scoped(scope, work).expect("a thread");
        }
        drop(sender);
        let mut waiting = BTreeMap::new();
        let mut expected = seeds.iter();
        for (seed, report) in reports {
            waiting.insert(seed, report);
            while let Some(next) = expected.as_slice().first()
                && let Some(report) = waiting.remove(next)
            {
                done(*next, report);
                expected.next();
            }
        }
    });
}

/// Runs the scenario of the environment, prints a report for each seed, and fails if anything does not hold.
#[test]
fn scenario_holds() {
    let (seeds, conditions, load) = from_environment();
    let is_long = seeds.len() <= 3;
    let mut failed = Vec::new();
    let (mut count, mut starts) = (0_u64, 0_usize);
    let began = std::time::Instant::now();
    run_all(&seeds, &conditions, &load, |seed, report| {
        print!("{}", report.text(seed, is_long || !report.violations.is_empty()));
        count += 1;
        starts += report.starts.len();
        if !report.violations.is_empty() {
            failed.push(seed);
        }
    });
    println!("{count} seeds, {starts} starts, {:?}", began.elapsed());
    assert!(failed.is_empty(), "seeds {failed:?}");
}

/// Other processes, in which the hashes of maps and the number of worlds at a time are different, give the same traces.
#[test]
fn traces_of_seeds_are_the_same_in_two_processes() {
    let seeds = number("SIM_HASHED_SEEDS", 2);
    let start = || {
        let mut process = std::process::Command::new(std::env::current_exe().expect("this program"));
        process.args(["--exact", "scenario::scenario_holds", "--nocapture"]).env_remove("SIM_SKIP");
        process.envs([
            ("SIM_SEED", "20"),
            ("SIM_SEEDS", &seeds.to_string()),
            ("SIM_STARTS", "5"),
            ("SIM_MINUTES", "10"),
            ("SIM_BODIES", "1"),
        ]);
        process.stdout(std::process::Stdio::piped()).spawn().expect("a process")
    };
    let hashes = |process: std::process::Child| {
        let output = process.wait_with_output().expect("its output");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let hashes: Vec<String> =
            text.split("hash ").skip(1).map(|rest| rest.chars().take(16).collect::<String>()).collect();
        assert_eq!(hashes.len() as u64, seeds, "{text}");
        hashes
    };
    let (first, second) = (start(), start());
    assert_eq!(hashes(first), hashes(second));
}

/// The starts of tenants take at most this many times as long when another tenant has many at the same time.
const MOST_DELAY: f64 = 1.5;

/// A tenant with 120 starts in a minute and five workers delays those of others by less than [`MOST_DELAY`].
#[test]
fn starts_of_a_tenant_do_not_wait_for_those_of_another() {
    let medians = |without_first| {
        let load =
            Load { starts: 150, tenants: 6, within: Duration::from_secs(60), first_share: Some(0.8), without_first };
        let report = run(&conditions(number("SIM_SEED", 1), true, 5), &load);
        assert_eq!(report.violations, Vec::<String>::new());
        let median = |is_first: bool| {
            let of = report.starts.iter().filter(|start| (start.user.as_str() == "tenant-0") == is_first);
            let mut took: Vec<Duration> = of.map(|start| start.took).collect();
            took.sort();
            (took.len(), took.get(took.len() / 2).copied().unwrap_or_default())
        };
        (median(true), median(false))
    };
    let (((_, first), (count, others)), ((_, _), (same, alone))) = (medians(false), medians(true));
    println!("{count} starts of others: {others:?}, alone {alone:?}; the first tenant's {first:?}");
    assert_eq!(count, same);
    assert!(count >= 15);
    assert!(others.as_secs_f64() <= alone.as_secs_f64() * MOST_DELAY, "{others:?} instead of {alone:?}");
}
