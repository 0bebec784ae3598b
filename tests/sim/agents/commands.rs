//! What the commands of starts do in a sandbox: the runs of their scripts, the copies that wait for them, the outputs that agent servers
//! store, and the notifications of their ends.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::history::{Notification, Outcome, RunHistory};
use super::provider::in_boot;
use super::scripts::{Kind, Once, Script, recognise};
use super::server::Process;
use super::{Shared, State, naive, ok, query_value, webhooks};
use crate::net::{Failure, Reply, Request};

/// Until a shell has started, and until a copy notices the end of the run that it waits for.
const SHELL: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(200)];
const POLL: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(500)];
/// The time in which a supervisor ends a script whose time is up.
const STOP: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(10)];
/// A short script.
const SHORT: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(900)];
/// The share of projects with each of the scripts for which a start has a step.
const SCRIPTS: f64 = 0.7;
/// A probe of MCP servers, after its file has arrived.
const PROBE: [Duration; 2] = [Duration::from_millis(300), Duration::from_secs(8)];
/// How often a request that waits for its command checks whether the agent server still runs.
const PROCESS_CHECK: Duration = Duration::from_millis(100);
const FILE_POLL: Duration = Duration::from_millis(100);
/// A supervisor notifies of the ends of runs that took at least this long.
const NOTIFIED: Duration = Duration::from_secs(2);
/// How long a supervisor waits for its copy before it notifies, at most, and then in any case.
const COPY_WAIT: Duration = Duration::from_secs(2);
const NOTIFY_DELAY: Duration = Duration::from_millis(300);
const NOTIFY_TIMEOUT: Duration = Duration::from_secs(5);
/// The agent server's default time limit of a command, in seconds.
const DEFAULT_TIMEOUT: u64 = 300;

/// A command of an agent server.
#[derive(Default)]
pub(super) struct Command {
    /// Its text, and its number among the commands of its sandbox.
    text: String,
    nth: u64,
    /// Wakes the requests that wait for its end.
    changed: Arc<Notify>,
    /// The stored pieces of output.
    outputs: Vec<Value>,
    /// Whether it has ended.
    has_ended: bool,
}

/// The state of an idempotent command on the disk of its sandbox.
#[derive(Default)]
pub(super) struct Folder {
    runs: Vec<Run>,
    /// The outcome, and the run that had it.
    exit: Option<(End, usize)>,
    /// Wakes the copies that wait.
    changed: Arc<Notify>,
}

struct Run {
    is_alive: bool,
    /// Its index in [`State::runs`].
    history: usize,
    stdout: String,
    stderr: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Code(i64),
    TimedOut,
}

impl Folder {
    /// Ends the run without an outcome, if there is one, and with it the copies. Returns its index in [`State::runs`].
    pub(super) fn end_run(&mut self) -> Option<usize> {
        self.changed.notify_waiters();
        let run = self.runs.iter_mut().find(|run| run.is_alive)?;
        run.is_alive = false;
        Some(run.history)
    }
}

/// Starts a command.
pub(super) fn start(shared: &Arc<Shared>, process: &Process, body: &Value) -> Reply {
    let Some((id, time)) = begin(shared, process, body) else { return Err(Failure::Cut) };
    ok(&json!({
        "id": id.simple().to_string(), "timestamp": time, "kind": "BashCommand",
        "command": body["command"], "cwd": body["cwd"], "timeout": body["timeout"],
    }))
}

/// Runs a command, and returns its whole output at its end. The connection is cut when the agent server ends.
pub(super) async fn execute(shared: &Arc<Shared>, process: &Process, body: &Value) -> Reply {
    let Some((id, time)) = begin(shared, process, body) else { return Err(Failure::Cut) };
    loop {
        let changed = {
            let mut state = shared.lock();
            let Some(runtime) = process.of(&mut state) else { return Err(Failure::Cut) };
            let command = &runtime.server.commands[&id];
            if command.has_ended {
                let whole = |name: &str| {
                    let pieces: String = command.outputs.iter().filter_map(|output| output[name].as_str()).collect();
                    (!pieces.is_empty()).then_some(pieces)
                };
                return ok(&json!({
                    "id": id.simple().to_string(), "timestamp": time, "kind": "BashOutput",
                    "command_id": id.simple().to_string(), "order": command.outputs.len() - 1,
                    "exit_code": command.outputs.last().map_or(&Value::Null, |output| &output["exit_code"]),
                    "stdout": whole("stdout"), "stderr": whole("stderr"),
                }));
            }
            command.changed.clone()
        };
        // No await is between the unlock and the registration, and all is one thread: no change is missed, only the end of the process.
        let _ended_or_not = timeout(PROCESS_CHECK, changed.notified()).await;
    }
}

fn begin(shared: &Arc<Shared>, process: &Process, body: &Value) -> Option<(Uuid, String)> {
    let text = body["command"].as_str().expect("a command");
    let script = recognise(text);
    let limit = Duration::from_secs(body["timeout"].as_u64().unwrap_or(DEFAULT_TIMEOUT));
    let state = &mut *shared.lock();
    let nth = process.of(state)?.server.commands.len() as u64;
    let id = shared.id("command", &process.runtime, nth);
    let time = naive(shared.timestamp(state));
    let command = Command { text: text.to_owned(), nth, ..Command::default() };
    process.of(state)?.server.commands.insert(id, command);
    tokio::spawn(run_command(shared.clone(), process.clone(), id, script, limit));
    Some((id, time))
}

/// Returns the stored outputs of a command, or the last commands.
pub(super) fn search(shared: &Shared, process: &Process, request: &Request) -> Reply {
    let mut state = shared.lock();
    let Some(runtime) = process.of(&mut state) else { return Err(Failure::Cut) };
    let commands = &runtime.server.commands;
    let items: Vec<Value> = match query_value(request, "kind__eq").as_deref() {
        Some("BashOutput") => {
            let id = query_value(request, "command_id__eq").expect("the id of a command");
            let id = Uuid::parse_str(&id).expect("an id");
            commands.get(&id).map(|command| command.outputs.clone()).unwrap_or_default()
        }
        Some("BashCommand") => {
            assert_eq!(query_value(request, "sort_order").as_deref(), Some("TIMESTAMP_DESC"), "the last commands");
            let limit = query_value(request, "limit").and_then(|limit| limit.parse().ok()).expect("a limit");
            let mut commands: Vec<(&Uuid, &Command)> = commands.iter().collect();
            commands.sort_by_key(|(_, command)| Reverse(command.nth));
            let shown = |(id, command): (&Uuid, &Command)| json!({"id": id.simple().to_string(), "kind": "BashCommand", "command": command.text});
            commands.into_iter().take(limit).map(shown).collect()
        }
        kind => panic!("outputs or commands are requested: {kind:?}"),
    };
    ok(&json!({"items": items, "next_page_id": null}))
}

/// Ends the commands of an agent server that shuts down: it stores their exit codes.
pub(super) fn interrupt(shared: &Shared, state: &mut State, runtime: &str) {
    let commands = &state.runtimes[runtime].server.commands;
    let running = commands.iter().filter(|(_, command)| !command.has_ended).map(|(id, _)| *id);
    let process = Process { runtime: runtime.to_owned(), number: state.runtimes[runtime].server.process };
    for id in running.collect::<Vec<_>>() {
        store(shared, state, &process, id, Output::of(-15));
    }
}

/// What a command has printed, and its exit code.
struct Output {
    exit_code: i64,
    stdout: String,
    stderr: String,
}

impl Output {
    fn of(exit_code: i64) -> Self {
        Self { exit_code, stdout: String::new(), stderr: String::new() }
    }
}

/// Runs a command of an agent server, and stores its output unless the agent server has ended.
async fn run_command(shared: Arc<Shared>, process: Process, id: Uuid, script: Script, limit: Duration) {
    let subject = process.runtime.as_str();
    let starts = shared.between(&mut shared.lock(), "shell", subject, SHELL);
    sleep(starts).await;
    let output = match &script {
        Script::MakeFolder => Some(Output::of(0)),
        Script::Once(once) => match timeout(limit, copy(&shared, &process, once)).await {
            Ok(output) => output,
            Err(_) => Some(Output::of(-1)),
        },
        Script::Probe { file, wait } => match timeout(limit, probe(&shared, &process, file, *wait)).await {
            Ok(output) => output,
            Err(_) => Some(Output::of(-1)),
        },
    };
    let state = &mut *shared.lock();
    if let Script::Once(once) = &script
        && let Some(runtime) = process.of(state)
        && runtime.server.folders.get(&once.folder).is_some_and(|folder| folder.exit.is_some())
        && let Some(file) = &once.removes
    {
        runtime.server.files.remove(file);
    }
    if let Some(output) = output {
        store(&shared, state, &process, id, output);
    }
}

/// Stores the output of a command, sometimes in two pieces.
fn store(
    shared: &Shared,
    state: &mut State,
    process: &Process,
    id: Uuid,
    Output { exit_code, stdout, stderr }: Output,
) {
    let subject = id.to_string();
    let is_split = shared.chance(state, "output in two pieces", &subject, 0.2) && stdout.len() > 1;
    let time = naive(shared.timestamp(state));
    let Some(runtime) = process.of(state) else { return };
    let command = runtime.server.commands.get_mut(&id).expect("the command");
    let mut rest = stdout;
    let mut add = |exit_code: Option<i64>, stdout: &str, stderr: &str| {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let order = command.outputs.len();
        let output = shared.id("output", &subject, order as u64).simple().to_string();
        command.outputs.push(json!({
            "id": output, "timestamp": time, "kind": "BashOutput", "command_id": id.simple().to_string(),
            "order": order, "exit_code": exit_code, "stdout": some(stdout), "stderr": some(stderr),
        }));
    };
    if is_split {
        let last = rest.split_off(rest.floor_char_boundary(rest.len() / 2));
        add(None, &rest, "");
        rest = last;
    }
    add(Some(exit_code), &rest, &stderr);
    command.has_ended = true;
    command.changed.notify_waiters();
}

/// A copy of an idempotent command: starts a run if there is none, or waits for the one that there is, and repeats its outcome. Returns
/// `None` if the agent server, and so the copy, has ended.
async fn copy(shared: &Arc<Shared>, process: &Process, once: &Once) -> Option<Output> {
    loop {
        let changed = {
            let state = &mut *shared.lock();
            let history = state.runs.len();
            let runtime = process.of(state)?;
            let boot = runtime.boot;
            let folder = runtime.server.folders.entry(once.folder.clone()).or_default();
            if let Some((end, run)) = folder.exit {
                let (stdout, stderr) = match folder.runs.get(run) {
                    Some(run) => (run.stdout.clone(), run.stderr.clone()),
                    None => (String::new(), String::new()),
                };
                return Some(match end {
                    End::Code(exit_code) => Output { exit_code, stdout, stderr },
                    End::TimedOut => {
                        Output { exit_code: 124, stdout: format!("{stdout}\n{}\n", once.timed_out), stderr }
                    }
                });
            }
            if folder.runs.last().is_none_or(|run| !run.is_alive) {
                if folder.runs.len() >= once.max_runs as usize {
                    folder.exit = Some((End::Code(137), folder.runs.len()));
                    folder.changed.notify_waiters();
                    continue;
                }
                folder.runs.push(Run { is_alive: true, history, stdout: String::new(), stderr: String::new() });
                let number = folder.runs.len();
                state.runs.push(RunHistory {
                    runtime_id: process.runtime.clone(),
                    task: once.start,
                    name: once.name.clone(),
                    number: u32::try_from(number).expect("a number"),
                    started: shared.elapsed(),
                    ended: None,
                    is_refused: false,
                });
                tokio::spawn(supervise(shared.clone(), process.runtime.clone(), boot, once.clone(), number, history));
            }
            let folder = process.of(state)?.server.folders.get_mut(&once.folder).expect("the folder");
            folder.changed.clone()
        };
        // No await is between the unlock and the registration, and all is one thread: no change is missed.
        changed.notified().await;
        let notices = shared.between(&mut shared.lock(), "copy notices", &process.runtime, POLL);
        sleep(notices).await;
    }
}

/// What a run of a script does in the end.
struct Plan {
    length: Duration,
    code: i64,
    stdout: String,
    stderr: String,
    is_refused: bool,
}

/// A run of a script with its supervisor, which outlives the agent server, but not the sandbox.
async fn supervise(shared: Arc<Shared>, runtime: String, boot: u64, once: Once, number: usize, history: usize) {
    let subject = format!("{} {}", once.start.simple(), once.name);
    let faults = &shared.settings.faults.commands;
    let began = Instant::now();
    let (plan, killed_after, stops_in) = {
        let state = &mut *shared.lock();
        let plan = plan(&shared, state, &runtime, &once, &subject);
        let length = plan.length.min(once.limit);
        let killed_after = length.mul_f64(shared.draw(state, "killed after", &subject));
        let is_killed = shared.fails(state, "killed", &subject, faults.kills);
        let stops_in = shared.between(state, "stop", &subject, STOP);
        (plan, is_killed.then_some(killed_after), stops_in)
    };
    let is_late = plan.length > once.limit;
    sleep(killed_after.unwrap_or(if is_late { once.limit + stops_in } else { plan.length })).await;
    {
        let state = &mut *shared.lock();
        let Some(there) = in_boot(state, &runtime, boot) else { return };
        let server = &mut there.server;
        let folder = server.folders.get_mut(&once.folder).expect("the folder of the run");
        let run = &mut folder.runs[number - 1];
        run.is_alive = false;
        let (end, outcome) =
            if is_late { (End::TimedOut, Outcome::TimedOut) } else { (End::Code(plan.code), Outcome::Exit(plan.code)) };
        folder.changed.notify_waiters();
        if killed_after.is_some() {
            state.runs[history].ended = Some((shared.elapsed(), Outcome::Killed));
            return;
        }
        (run.stdout, run.stderr) = (plan.stdout, plan.stderr);
        folder.exit = Some((end, number - 1));
        if let Some(file) = &once.removes {
            server.files.remove(file);
        }
        if let (Kind::PrepareRepository { working_dir, project_dir, .. }, Outcome::Exit(0)) = (&once.kind, outcome) {
            server.projects.extend([working_dir.clone(), project_dir.clone()]);
        }
        let ended = &mut state.runs[history];
        ended.ended = Some((shared.elapsed(), outcome));
        ended.is_refused = plan.is_refused;
    }
    notify(&shared, &runtime, boot, &once, &subject, began.elapsed()).await;
}

/// Notifies the product of the end of a run.
async fn notify(shared: &Arc<Shared>, runtime: &str, boot: u64, once: &Once, subject: &str, took: Duration) {
    let Some(token) = once.token.as_ref().filter(|_| took >= NOTIFIED) else { return };
    let wait = shared.between(&mut shared.lock(), "copy ends", subject, [Duration::ZERO, COPY_WAIT]);
    sleep(wait + NOTIFY_DELAY).await;
    let request = {
        let state = &mut *shared.lock();
        let is_lost =
            shared.fails(state, "notification is lost", subject, shared.settings.faults.commands.lost_notifications);
        let Some(url) = in_boot(state, runtime, boot).and_then(|runtime| runtime.webhooks.clone()) else { return };
        if is_lost {
            return;
        }
        state.counters.posts_open += 1;
        let mut headers = HeaderMap::new();
        headers.insert("x-access-token", token.parse().expect("a token"));
        let path = format!("/commands/{}", once.start.simple());
        webhooks::request(Method::POST, &url, &path, headers, Bytes::new())
    };
    let latency = shared.between(&mut shared.lock(), "latency of a notification", subject, shared.settings.pace.agent);
    sleep(latency).await;
    let at = shared.elapsed();
    let status = shared.send(request, NOTIFY_TIMEOUT).await.map(|status| status.as_u16());
    let state = &mut *shared.lock();
    state.counters.posts_open -= 1;
    state.notifications.push(Notification { at, runtime_id: runtime.to_owned(), task: once.start, status });
}

/// Decides what a run does.
fn plan(shared: &Shared, state: &mut State, runtime: &str, once: &Once, subject: &str) -> Plan {
    let (faults, pace) = (&shared.settings.faults.commands, &shared.settings.pace);
    let short = shared.between(state, "short script", subject, SHORT);
    let done =
        |length: Duration| Plan { length, code: 0, stdout: String::new(), stderr: String::new(), is_refused: false };
    let failed = |length: Duration, code: i64, stderr: &str| Plan { code, stderr: stderr.to_owned(), ..done(length) };
    // What is permanent is the same for all runs of a start.
    let always = |what: &'static str, probability: f64| {
        crate::dice::random(shared.settings.seed, &(what, subject)) < probability && !state.is_healed
    };
    let (refuses, fails) =
        (always("clone refused", faults.clone_refusals), always("setup fails", faults.setup_failures));
    let exceeds = always("setup exceeds its time", faults.setup_timeouts);
    let missing = |folder: &String| !state.runtimes[runtime].server.projects.contains(folder);
    let cannot_enter = |folder: &String| failed(SHORT[0], 1, &format!("sh: 0: cannot cd to {folder}\n"));
    match &once.kind {
        Kind::PrepareRepository { credentials, urls, .. } => {
            let is_private = urls.iter().any(|url| url.contains("private"));
            let has_credentials = state.runtimes[runtime].server.files.contains_key(credentials);
            let length = if urls.is_empty() { short } else { shared.between(state, "clone", subject, pace.clone) };
            let has_browser = shared.chance(state, "browser", runtime, 0.9);
            if refuses && !urls.is_empty() {
                let text = format!("fatal: repository '{}/' not found\n", urls[0]);
                return Plan { is_refused: true, ..failed(length, 1, &text) };
            }
            if is_private && !has_credentials {
                return failed(length, 1, "fatal: Authentication failed\n");
            }
            let browser = if has_browser { "yes" } else { "no" };
            let has = |name: &str| crate::dice::random(shared.settings.seed, &("script", name, subject)) < SCRIPTS;
            let scripts =
                ["setup.sh", "pre-commit.sh"].into_iter().filter(|name| has(name)).collect::<Vec<_>>().join(" ");
            Plan { stdout: format!("openhands-browser:{browser}\nopenhands-scripts: {scripts}\n"), ..done(length) }
        }
        Kind::SetupScript { project_dir } | Kind::GitHooks { project_dir } if missing(project_dir) => {
            cannot_enter(project_dir)
        }
        Kind::SetupScript { .. } => {
            let length = shared.between(state, "setup script", subject, pace.setup);
            if exceeds {
                return Plan { stdout: "installing\n".to_owned(), ..done(once.limit + Duration::from_secs(1)) };
            }
            if fails { failed(length, 3, "setup.sh: a package is missing\n") } else { done(length) }
        }
        Kind::GitHooks { .. } => done(short),
    }
}

/// The probe of MCP servers: waits for its file, removes it, and prints an outcome for each server.
async fn probe(shared: &Shared, process: &Process, file: &str, wait: Duration) -> Option<Output> {
    let deadline = Instant::now() + wait;
    let document: Value = loop {
        {
            let state = &mut *shared.lock();
            if let Some(content) = process.of(state)?.server.files.remove(file) {
                break serde_json::from_slice(&content).expect("the probe's document");
            }
        }
        if Instant::now() > deadline {
            return Some(Output::of(75));
        }
        sleep(FILE_POLL).await;
    };
    let limit = document["limit"].as_f64().map(Duration::from_secs_f64).expect("the limit of the probe");
    let takes = shared.between(&mut shared.lock(), "probe", &process.runtime, PROBE);
    sleep(takes.min(limit)).await;
    let mut stdout = String::new();
    for key in document["keys"].as_array().expect("the servers' keys") {
        let key = key.as_str().expect("a key");
        let state = &mut *shared.lock();
        let fails = shared.fails(state, "MCP server fails", key, shared.settings.faults.commands.mcp_failures);
        let outcome: BTreeMap<&str, Value> = if fails {
            [("server", json!(key)), ("works", json!(false)), ("reason", json!("it answered 401 Unauthorized"))].into()
        } else {
            [("server", json!(key)), ("works", json!(true))].into()
        };
        stdout += &format!("openhands-mcp-probe:{}\n", json!(outcome));
    }
    process.of(&mut shared.lock())?;
    Some(Output { stdout, ..Output::of(0) })
}
