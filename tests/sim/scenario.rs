//! What clients do in a world, and what must hold at its end.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};
use shared::user::UserId;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::agents;
use crate::aws::lock;
use crate::dice::{random, seeded};
use crate::invariants::{check, unfinished};
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
        join_all(users.iter().map(|user| Box::pin(world.settings(user, grouping(conditions.seed, user))))).await;
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
                start.status = shown["status"].as_str().unwrap_or_default().to_owned();
                start.detail = shown["detail"].as_str().map(str::to_owned);
                start.sandbox = shown["sandbox_id"].as_str().map(str::to_owned);
                start.conversation =
                    shown["app_conversation_id"].as_str().and_then(|id| Uuid::parse_str(id).ok()).unwrap_or_default();
                break;
            }
            sleep(Duration::from_secs(5)).await;
        }
        start.took = self.world.elapsed() - start.began;
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
/// (over which the starts are spread), `SIM_CALM` for a world without faults, and `SIM_REFUSALS` for the share, in percent, of repositories
/// that cannot be cloned.
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
    let refusals = std::env::var_os("SIM_REFUSALS").map(|_| number("SIM_REFUSALS", 0) as f64 / 100.0);
    let conditions = move |seed| {
        let mut conditions = conditions(seed, is_calm, usize::try_from(workers).expect("a small number"));
        if let Some(refusals) = refusals {
            conditions.agents.commands.clone_refusals = refusals;
        }
        conditions
    };
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
