//! Commands of a start in the sandbox: restarts of the agent server, time limits, notifications, and what waiting for them costs.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Body;
use futures::future::join_all;
use http::{Request, StatusCode};
use secrecy::ExposeSecret as _;
use serde_json::json;
use shared::Time;
use shared::config::{SandboxConfig, StartConfig};
use shared::start::identity::StartIdentity;
use shared::start::request::StartRequest;
use shared::start::store::{Abandoned, NewStart};
use shared::start::task::{StartStatus, StartTaskRecord};
use shared::user::UserId;
use shared::user::token::NotificationToken;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::support::api::Api;
use crate::support::fault_proxy::Stop;
use crate::support::meter::Meter;
use crate::support::server::{Server, raw};
use crate::support::stand_in_agent::{Fault, Kind, Nth, Restart};
use crate::support::wait::{is_running, wait_until};
use crate::support::worker_harness::{ALL_STATUSES, WorkerHarness, quick};

const LIMIT: Duration = Duration::from_secs(60);
const EXECUTE: &str = "POST /api/bash/execute_bash_command";
const POLL: &str = "GET /api/bash/bash_events/search";

/// Makes the project's setup script.
fn set_up_with(harness: &WorkerHarness, script: &str) {
    let folder = PathBuf::from(harness.agent.working_dir()).join(".openhands");
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("setup.sh"), script).expect("a script");
}

/// A setup script that records that it runs, and ends when a file exists.
fn set_up_until_released(harness: &WorkerHarness) -> [PathBuf; 2] {
    let [runs, go] = ["runs", "go"].map(|name| harness.agent.root().join(name));
    set_up_with(
        harness,
        &format!("echo $$ >>{}\nuntil [ -f {} ]; do sleep 0.05; done\n", runs.display(), go.display()),
    );
    [runs, go]
}

fn lines(file: &Path) -> Vec<String> {
    std::fs::read_to_string(file).unwrap_or_default().lines().map(str::to_owned).collect()
}

fn kill(pid: &str, signal: rustix::process::Signal) {
    let pid = pid.parse().ok().and_then(rustix::process::Pid::from_raw).expect("an id");
    rustix::process::kill_process(pid, signal).expect("killed");
}

/// The supervisor of the setup script, and the copy of the command that started it.
fn supervisor_and_copy(harness: &WorkerHarness, task: Uuid) -> [String; 2] {
    let state = harness.agent.root().join("workspace/.openhands-start").join(task.simple().to_string());
    let owner = std::fs::read_to_string(state.join("setup-script/run.1/owner")).expect("an owner");
    let supervisor = owner.split(' ').next().expect("an id").to_owned();
    let arguments = std::fs::read_to_string(format!("/proc/{supervisor}/cmdline")).expect("its arguments");
    let copy = arguments.trim_end_matches('\0').rsplit('\0').next().expect("an argument").to_owned();
    [supervisor, copy]
}

/// How often the setup script's command was sent.
fn copies(harness: &WorkerHarness) -> usize {
    harness.agent.commands().iter().filter(|command| command.contains("/setup-script'\n")).count()
}

/// Drives the start while `disturb` runs; returns how it ended.
async fn while_driven(harness: &WorkerHarness, task: Uuid, disturb: impl AsyncFnOnce()) -> StartTaskRecord {
    tokio::join!(harness.drive(task), disturb()).0
}

#[tokio::test]
async fn command_is_sent_again_after_a_restart_of_the_agent_server_and_its_run_continues() {
    let harness = WorkerHarness::start(quick()).await;
    let [runs, go] = set_up_until_released(&harness);
    let task = harness.begin(&json!({})).await;
    let ended = while_driven(&harness, task.id, async || {
        wait_until("the script runs", LIMIT, async || runs.exists()).await;
        // Uptimes are whole seconds.
        sleep(Duration::from_secs(3)).await;
        harness.agent.restart(Restart::Server).await;
        wait_until("another copy", LIMIT, async || copies(&harness) == 2).await;
        std::fs::write(&go, "").expect("written");
    })
    .await;
    assert_eq!((ended.now.status, ended.now.detail), (StartStatus::Ready, None));
    assert_eq!(lines(&runs).len(), 1, "the run outlived the agent server");
    harness.finish().await;
}

#[tokio::test]
async fn command_is_run_again_after_a_restart_that_killed_everything() {
    let harness = WorkerHarness::start(quick()).await;
    let [runs, go] = set_up_until_released(&harness);
    let task = harness.begin(&json!({})).await;
    let ended = while_driven(&harness, task.id, async || {
        wait_until("the script runs", LIMIT, async || runs.exists()).await;
        sleep(Duration::from_secs(3)).await;
        let [supervisor, _] = supervisor_and_copy(&harness, task.id);
        harness.agent.restart(Restart::Server).await;
        kill(&supervisor, rustix::process::Signal::KILL);
        kill(&lines(&runs)[0], rustix::process::Signal::KILL);
        wait_until("another run", LIMIT, async || lines(&runs).len() == 2).await;
        std::fs::write(&go, "").expect("written");
    })
    .await;
    assert_eq!((ended.now.status, ended.now.detail), (StartStatus::Ready, None));
    assert_eq!((lines(&runs).len(), copies(&harness)), (2, 2));
    harness.finish().await;
}

/// An agent server that ends gracefully ends its commands, and records a negative exit code for them.
#[tokio::test]
async fn command_with_a_negative_exit_code_is_sent_again() {
    let harness = WorkerHarness::start(quick()).await;
    let [runs, go] = set_up_until_released(&harness);
    let task = harness.begin(&json!({})).await;
    let ended = while_driven(&harness, task.id, async || {
        wait_until("the script runs", LIMIT, async || runs.exists()).await;
        let [_, copy] = supervisor_and_copy(&harness, task.id);
        kill(&copy, rustix::process::Signal::TERM);
        wait_until("another copy", LIMIT, async || copies(&harness) == 2).await;
        std::fs::write(&go, "").expect("written");
    })
    .await;
    assert_eq!((ended.now.status, ended.now.detail), (StartStatus::Ready, None));
    assert_eq!(lines(&runs).len(), 1);
    harness.finish().await;
}

/// An agent server that kills each copy at once does not keep a start forever.
#[tokio::test]
async fn command_is_sent_again_a_bounded_number_of_times() {
    let harness = WorkerHarness::start(quick()).await;
    let killed = json!({"kind": "BashOutput", "exit_code": -9, "order": 0});
    harness.agent.inject(Fault::new(EXECUTE, Nth::Always, Kind::Status(200, killed.to_string())));
    let task = harness.begin(&json!({})).await;
    let ended = harness.drive(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    let detail = ended.now.detail.expect("a detail");
    assert_eq!(detail, "The workspace could not be prepared: it ended with exit code -9");
    assert_eq!(harness.agent.commands().len(), 6);
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn overlong_setup_scripts_all_end_alike_and_leave_no_process() {
    let config = StartConfig { setup_script_timeout: Duration::from_secs(2), ..quick() };
    let harness = WorkerHarness::start(config).await;
    let pids = harness.agent.root().join("pids");
    set_up_with(
        &harness,
        &format!("echo $$ >>{0}\nsleep 600 & echo $! >>{0}\nwhile :; do sleep 1; done\n", pids.display()),
    );
    let tasks = join_all((0..8).map(|_| async { harness.begin(&json!({})).await.id })).await;
    let ended = join_all(tasks.iter().map(|task| harness.drive(*task))).await;
    for task in ended {
        let ended = (task.now.status, task.now.detail.as_deref());
        assert_eq!(ended, (StartStatus::Ready, Some(".openhands/setup.sh failed: timed out")));
    }
    let pids = lines(&pids);
    assert_eq!(pids.len(), 16);
    assert!(pids.iter().all(|pid| !is_running(pid)), "{pids:?}");
    harness.finish().await;
}

/// A request does not wait long for its command. The command goes on, and is polled under its id, which its text finds.
#[tokio::test]
async fn long_command_is_sent_once_and_then_polled() {
    let harness = WorkerHarness::start(quick()).await;
    let [runs, go] = set_up_until_released(&harness);
    let task = harness.begin(&json!({})).await;
    let ended = while_driven(&harness, task.id, async || {
        wait_until("the script runs", LIMIT, async || runs.exists()).await;
        wait_until("polls", LIMIT, async || harness.agent.requests_to(POLL).len() > 3).await;
        std::fs::write(&go, "").expect("written");
    })
    .await;
    assert_eq!((ended.now.status, ended.now.detail), (StartStatus::Ready, None));
    assert_eq!((lines(&runs).len(), copies(&harness)), (1, 1));
    harness.finish().await;
}

/// The names of the commands so far, in order.
fn names(harness: &WorkerHarness) -> Vec<String> {
    let name = |command: &String| {
        let folder = command.lines().next()?.strip_prefix("d='")?.strip_suffix('\'')?.to_owned();
        folder.rsplit('/').next().map(str::to_owned)
    };
    harness.agent.commands().iter().filter_map(name).collect()
}

/// The command that prepares the workspace sees which scripts the project has. All states are in the history nevertheless.
#[tokio::test(flavor = "multi_thread")]
async fn steps_without_a_script_of_the_project_send_no_command() {
    let makes_a_hook = "mkdir -p .openhands && echo true >.openhands/pre-commit.sh\n";
    for (files, expected) in [
        (&[][..], &["prepare-repository"][..]),
        (&[("pre-commit.sh", "true\n")], &["prepare-repository", "git-hooks"]),
        (&[("setup.sh", makes_a_hook)], &["prepare-repository", "setup-script", "git-hooks"]),
        (&[("setup.sh", "true\n"), ("pre-commit.sh", "true\n")], &["prepare-repository", "setup-script", "git-hooks"]),
    ] {
        let harness = WorkerHarness::start(quick()).await;
        let project = PathBuf::from(harness.agent.working_dir());
        std::fs::create_dir_all(project.join(".openhands")).expect("a folder");
        for (name, content) in files {
            std::fs::write(project.join(".openhands").join(name), content).expect("a script");
        }
        let ended = harness.drive(harness.begin(&json!({})).await.id).await;
        assert_eq!((ended.now.status, ended.now.detail), (StartStatus::Ready, None), "{files:?}");
        assert_eq!(names(&harness), expected, "{files:?}");
        let statuses: Vec<StartStatus> = ended.history.iter().map(|snapshot| snapshot.status).collect();
        assert_eq!(statuses, ALL_STATUSES, "{files:?}");
        assert_eq!(project.join(".git/hooks/pre-commit").exists(), expected.contains(&"git-hooks"), "{files:?}");
        // A setup script may have installed skills, so none that were loaded before are used.
        let loads = harness.agent.requests_to("POST /api/skills");
        let last = loads.last().expect("skills are loaded").json();
        let has_setup = expected.contains(&"setup-script");
        assert_eq!((&last["load_public"], &last["load_project"]), (&json!(has_setup), &json!(true)), "{files:?}");
        harness.finish().await;
    }
}

/// Only failures in a row end a start.
#[tokio::test]
async fn failures_between_successful_polls_do_not_end_a_start() {
    let harness = WorkerHarness::start(quick()).await;
    let [runs, go] = set_up_until_released(&harness);
    let task = harness.begin(&json!({})).await;
    let ended = while_driven(&harness, task.id, async || {
        wait_until("the script runs", LIMIT, async || runs.exists()).await;
        for nth in 1..=12 {
            harness.agent.inject(Fault::new(POLL, Nth::On(2 * nth), Kind::Status(503, String::new())));
        }
        let before = harness.agent.requests_to(POLL).len();
        wait_until("twelve failures", LIMIT, async || harness.agent.requests_to(POLL).len() >= before + 26).await;
        std::fs::write(&go, "").expect("written");
    })
    .await;
    assert_eq!((ended.now.status, ended.now.detail), (StartStatus::Ready, None));
    harness.finish().await;
}

/// The count survives a crash of the worker in the pause after a failure.
#[tokio::test]
async fn count_of_failures_survives_a_crash() {
    let harness = WorkerHarness::start(quick()).await;
    harness.agent.inject(Fault::new(EXECUTE, Nth::Always, Kind::Status(503, String::new())));
    let task = harness.begin(&json!({})).await;
    let mut crashes = 0;
    while !harness.task(task.id).await.now.status.is_final() {
        let Some(message) = harness.receive().await else {
            harness.sweep().await;
            continue;
        };
        let before = harness.attempts(task.id).await;
        let (context, event) = (harness.context.clone(), WorkerHarness::event(&message));
        let worker = tokio::spawn(async move { worker::handle(&context, event).await });
        wait_until("another failure", LIMIT, async || {
            harness.attempts(task.id).await > before
                || harness.task(task.id).await.now.status.is_final()
                || worker.is_finished()
        })
        .await;
        worker.abort();
        crashes += 1;
        assert!(crashes < 12, "the failures of all workers count");
    }
    assert_eq!(harness.task(task.id).await.now.status, StartStatus::Error);
    harness.finish().await;
}

/// The agent server fails after it created the conversation and before it took its first message, and the worker dies before it reads the
/// response.
#[tokio::test]
async fn first_message_is_sent_even_if_the_worker_dies_during_a_create_that_fails() {
    let harness = WorkerHarness::start(quick()).await;
    harness.agent.fail_setup(None, 503, "{}");
    harness.agent.inject(Fault::new("POST /api/conversations", Nth::Next, Kind::SlowReply(LIMIT)));
    let task = harness.begin(&json!({"initial_message": {"content": [{"type": "text", "text": "hi"}]}})).await;
    let message = harness.receive().await.expect("a message");
    let (context, event) = (harness.context.clone(), WorkerHarness::event(&message));
    let worker = tokio::spawn(async move { worker::handle(&context, event).await });
    wait_until("the conversation is created", LIMIT, async || !harness.agent.conversations().is_empty()).await;
    worker.abort();
    assert!(worker.await.is_err_and(|error| error.is_cancelled()), "the worker waited for the response");
    assert_eq!(harness.agent.messages_delivered(task.conversation_id).len(), 0);
    harness.agent.clear_setup_failure();
    harness.drive(task.id).await;
    harness.assert_one(task.id, 1, "a create that failed").await;
    harness.finish().await;
}

/// The delay is stored, so that it grows although each poll is made by another worker.
#[tokio::test]
async fn polls_of_a_waiting_start_are_counted_across_workers() {
    let config = StartConfig { inline_wait: Duration::ZERO, max_poll_delay: Duration::from_secs(60), ..quick() };
    let harness = WorkerHarness::start(config).await;
    let running = json!({"items": []}).to_string();
    harness.agent.inject(Fault::new(POLL, Nth::Always, Kind::Status(200, running)));
    let task = harness.begin(&json!({})).await;
    for (waits, delay) in (1_u32..).zip([5, 15, 40]) {
        let message = loop {
            if let Some(message) = harness.receive().await {
                break message;
            }
        };
        harness.handle(&message).await;
        let now = harness.task(task.id).await;
        assert_eq!((now.now.status, harness.waits(task.id).await), (StartStatus::PreparingRepository, waits));
        let delay = Duration::from_secs(delay);
        let due = harness.tasks.unfinished().due(Time::now().plus(delay)).await.0;
        assert!(due.is_empty(), "the sweep leaves a start alone that waits {delay:?}");
    }
    harness.agent.clear_faults();
    harness.enqueue(task.id).await;
    let ended = harness.drive(task.id).await;
    harness.purge().await;
    let statuses: Vec<StartStatus> = ended.history.iter().map(|snapshot| snapshot.status).collect();
    assert_eq!(statuses, ALL_STATUSES);
    harness.finish().await;
}

/// Posts a notification; returns the status.
async fn notify(api: &Api, task: &str, token: Option<&str>) -> u16 {
    let mut request = Request::post(format!("/api/v1/webhooks/commands/{task}"));
    if let Some(token) = token {
        request = request.header("X-Access-Token", token);
    }
    api.send(request.body(Body::empty()).expect("a request")).await.0
}

/// Removes the jobs of starts from the queue; returns their number.
async fn jobs(api: &Api) -> usize {
    let mut count = 0;
    while let Some(message) =
        api.aws.sqs.receive_message().queue_url(&api.names.job_queue_url).send().await.expect("the queue").messages
    {
        for message in message {
            let receipt = message.receipt_handle.expect("a receipt");
            let delete = api.aws.sqs.delete_message().queue_url(&api.names.job_queue_url).receipt_handle(receipt);
            delete.send().await.expect("deleted");
            assert!(message.body.expect("a body").contains("advance_start"));
            count += 1;
        }
    }
    count
}

#[tokio::test]
async fn end_of_a_command_enqueues_a_job_only_for_the_unfinished_start_of_its_token() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("user");
    let tasks = api.stores.start_tasks();
    let request = StartRequest::from_body(Some("application/json"), b"{}").expect("a request");
    let new = NewStart {
        identity: StartIdentity::random(),
        deadline: Time::now().plus(LIMIT),
        max_unfinished: 500,
        membership: None,
        trace: None,
    };
    let task = tasks.create(&user, &request, &new).await.expect("a task");
    let id = task.id.to_string();
    let token = async |user: &UserId, task, seconds| {
        let token = NotificationToken { user: user.clone(), task };
        let token = token.issue(&api.sealer, Duration::from_secs(seconds)).await.expect("a token");
        token.expose_secret().to_owned()
    };
    let of_start = token(&user, task.id, 60).await;
    let unknown = Uuid::new_v4();

    assert_eq!(notify(&api, &id, Some(&of_start)).await, 204);
    assert_eq!(notify(&api, &task.id.simple().to_string(), Some(&of_start)).await, 204);
    assert_eq!(jobs(&api).await, 2);
    assert_eq!(notify(&api, &id, None).await, 401);
    assert_eq!(notify(&api, &id, Some("unknown")).await, 401);
    assert_eq!(notify(&api, &id, Some(&token(&user, task.id, 0).await)).await, 401, "expired");
    assert_eq!(notify(&api, &id, Some(&token(&user, unknown, 60).await)).await, 401, "of another start");
    for other in [unknown.to_string(), "x".to_owned()] {
        assert_eq!(notify(&api, &other, Some(&of_start)).await, 401);
    }
    assert_eq!(notify(&api, &unknown.to_string(), Some(&token(&user, unknown, 60).await)).await, 404, "deleted");
    assert_eq!(notify(&api, &id, Some(&token(&UserId::new("another"), task.id, 60).await)).await, 404);
    assert!(matches!(tasks.abandon(&user, task.id, "ended").await, Ok(Abandoned::Now { .. })));
    assert_eq!(notify(&api, &id, Some(&of_start)).await, 204);
    assert_eq!(jobs(&api).await, 0);
    api.stop().await;
}

/// The waits of the functions on AWS.
fn waits_of_lambda() -> StartConfig {
    let StartConfig { inline_wait, boot_inline_wait, max_poll_delay, lease, poll, .. } = StartConfig::default();
    let sandbox_startup_timeout = Duration::from_secs(120);
    StartConfig { sandbox_startup_timeout, inline_wait, boot_inline_wait, max_poll_delay, lease, poll, ..quick() }
}

/// What a start cost until it was READY.
#[derive(Debug, Default)]
struct Cost {
    /// Invocations of the worker, without scheduled sweeps.
    invocations: usize,
    busy: Duration,
    /// Invocations of the webhook.
    notifications: usize,
    provider_calls: usize,
    /// Sent messages, and the receipt and the deletion of each.
    queue_requests: usize,
    write_units: f64,
    read_units: f64,
    calls: BTreeMap<String, usize>,
}

/// Drives a start whose sandbox needs `boot` seconds, and whose setup script needs `script` seconds.
async fn cost_of_waits(boot: u64, script: u64, notifies: bool) -> Cost {
    let meter = Meter::new();
    let harness = WorkerHarness::metered(waits_of_lambda(), 10, &meter).await;
    harness.provider().begin_as("starting");
    harness.provider().boot_in(Duration::from_secs(boot));
    set_up_with(&harness, &format!("sleep {script}\n"));
    let (sender, mut received) = mpsc::unbounded_channel();
    let webhooks = Server::start(move |request| {
        // The receiver lives as long as the server.
        let _sent = sender.send(request);
        async { Ok(raw(StatusCode::NO_CONTENT, "text/plain", "")) }
    })
    .await;
    if notifies {
        harness.agent.set_variable("OH_WEBHOOKS_0_BASE_URL", &format!("{}/api/v1/webhooks", webhooks.url()));
    }
    let task = harness.begin(&json!({})).await;
    harness.gate.arm(usize::MAX, Stop::Refuse);
    meter.take();
    let mut cost = Cost::default();
    let mut swept_at = Instant::now();
    while !harness.task(task.id).await.now.status.is_final() {
        while let Ok(request) = received.try_recv() {
            assert!(request.is("POST /api/v1/webhooks/commands/{task}"), "{request:?}");
            assert!(request.path.ends_with(&task.id.simple().to_string()), "{request:?}");
            assert!(request.header("x-access-token").is_some(), "{request:?}");
            cost.notifications += 1;
            cost.queue_requests += 1;
            harness.enqueue(task.id).await;
        }
        if swept_at.elapsed() >= Duration::from_secs(60) {
            swept_at = Instant::now();
            harness.sweep_unmetered().await;
        }
        let Some(message) = harness.receive().await else { continue };
        let began = Instant::now();
        harness.handle(&message).await;
        cost.busy += began.elapsed();
        cost.invocations += 1;
    }
    for call in harness.gate.calls() {
        *cost.calls.entry(call.split('?').next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    let sent = |name: &str| cost.calls.get(name).copied().unwrap_or_default();
    cost.queue_requests += sent("SendMessage") + sent("SendMessageBatch") + 2 * cost.invocations;
    cost.provider_calls = harness.provider().requests();
    for (operation, consumed) in meter.take() {
        let is_read = ["GetItem", "BatchGetItem", "Query"].contains(&operation.as_str());
        *(if is_read { &mut cost.read_units } else { &mut cost.write_units }) += consumed.units;
    }
    assert_eq!(harness.task(task.id).await.now.status, StartStatus::Ready);
    harness.purge().await;
    harness.finish().await;
    cost
}

#[tokio::test]
async fn notification_of_a_command_ends_the_wait() {
    // The polls are 7 s and 22 s after the script has started.
    let cost = cost_of_waits(0, 13, true).await;
    assert_eq!(cost.notifications, 1);
}

/// Prints what a start costs that waits a minute for its sandbox and a minute for a setup script.
#[tokio::test]
#[ignore = "a measurement that takes more than two minutes"]
async fn cost_of_two_minutes() {
    let waits = [(0, 0), (60, 0), (0, 60), (60, 60)];
    let costs = join_all(waits.map(|(boot, script)| Box::pin(cost_of_waits(boot, script, true)))).await;
    for ((boot, script), cost) in waits.into_iter().zip(costs) {
        println!("{boot} s for the sandbox, {script} s for the script: {cost:#?}");
    }
}
