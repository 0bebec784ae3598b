//! Starts whose sandbox provider fails: outages, refusals under load, creations that come late, eviction, pauses, a cap.

use std::time::Duration;

use futures::future::join_all;
use serde_json::{Value, json};
use shared::config::StartConfig;
use shared::start::task::StartStatus;
use uuid::Uuid;

use crate::deletion;
use crate::support::runtime_api::Fault;
use crate::support::stand_in_agent::{Fault as AgentFault, Kind, Nth};
use crate::support::wait::wait_until;
use crate::support::worker_harness::{WorkerHarness, quick};

const SOON: Duration = Duration::from_secs(60);

fn message() -> Value {
    json!({"initial_message": {"content": [{"type": "text", "text": "hi"}]}})
}

async fn begin(harness: &WorkerHarness, count: usize) -> Vec<Uuid> {
    let mut ids = Vec::new();
    for _ in 0..count {
        ids.push(harness.begin(&message()).await.id);
    }
    ids
}

/// Handles the jobs of several starts concurrently, as Lambda does, until all of them have ended.
async fn drive_all(harness: &WorkerHarness, tasks: &[Uuid]) {
    join_all(tasks.iter().map(|task| harness.drive(*task))).await;
}

async fn assert_ready(harness: &WorkerHarness, tasks: &[Uuid], case: &str) {
    for task in tasks {
        let ended = harness.task(*task).await;
        assert_eq!(ended.now.status, StartStatus::Ready, "{case}: {:?}", ended.now.detail);
    }
    assert_eq!(harness.provider().active().len(), tasks.len(), "{case}: {:?}", harness.provider().sessions());
}

/// The provider cannot be asked while starts wait for their sandboxes. That says nothing about the sandboxes.
async fn outage(time: Duration, fault: Fault) {
    let case = format!("{fault:?} for {time:?}");
    let harness = WorkerHarness::with_provider(quick(), 10).await;
    harness.provider().begin_as("starting");
    let tasks = begin(&harness, 4).await;
    let outage = async {
        wait_until("all starts wait", SOON, async || harness.provider().sessions().len() == tasks.len()).await;
        harness.provider().fail_for(time, fault);
        tokio::time::sleep(time).await;
        for session in harness.provider().sessions().into_keys() {
            harness.provider().set_status(&session, "running");
        }
    };
    futures::future::join(drive_all(&harness, &tasks), outage).await;
    assert_ready(&harness, &tasks, &case).await;
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_of_the_provider_ends_no_start() {
    for (time, fault) in
        [(500, Fault::Status(503)), (500, Fault::Status(429)), (3000, Fault::Cut), (500, Fault::Garbage)]
    {
        outage(Duration::from_millis(time), fault).await;
    }
}

/// Timeouts that a start reaches within a test, and a worker that soon releases a start that waits.
fn config() -> StartConfig {
    let limit = Duration::from_secs(15);
    StartConfig {
        sandbox_startup_timeout: Duration::from_secs(40),
        clone_timeout: limit,
        setup_script_timeout: limit,
        step_timeout: limit,
        inline_wait: Duration::from_millis(100),
        boot_inline_wait: Duration::ZERO,
        ..quick()
    }
}

const COMMAND: &str = "POST /api/bash/execute_bash_command";
/// Steps after the sandbox has answered, and a request that each of them sends.
const STEPS: [(StartStatus, &str); 2] =
    [(StartStatus::PreparingRepository, COMMAND), (StartStatus::SettingUpSkills, "POST /api/skills")];

/// Makes the first request of a step to a route take a while, so that a start can be met in its step.
fn slow_down(harness: &WorkerHarness, route: &str) {
    // The first request for skills is sent while the workspace is prepared.
    let nth = if route.ends_with("/skills") { 2 } else { 1 };
    harness.agent.inject(AgentFault::new(route, Nth::On(nth), Kind::SlowReply(Duration::from_secs(1))));
}

async fn reached(harness: &WorkerHarness, task: Uuid, status: StartStatus) {
    wait_until("the step", SOON, async || harness.task(task).await.history.iter().any(|state| state.status == status))
        .await;
}

/// The outage begins when the sandbox runs. A request to its agent server fails, so the worker asks the provider again.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_in_a_later_step_ends_no_start() {
    let harness = WorkerHarness::with_provider(config(), 10).await;
    slow_down(&harness, COMMAND);
    let failed = Kind::Status(503, "busy".to_owned());
    // The first request for skills is sent while the command runs.
    harness.agent.inject(AgentFault::new("POST /api/skills", Nth::On(2), failed));
    let task = harness.begin(&message()).await.id;
    let outage = async {
        reached(&harness, task, StartStatus::PreparingRepository).await;
        harness.provider().fail_for(Duration::from_secs(8), Fault::Status(503));
    };
    futures::future::join(harness.drive(task), outage).await;
    assert_ready(&harness, &[task], "an outage in a later step").await;
    harness.finish().await;
}

/// The provider creates a session although it has answered with an error, at once or later.
#[tokio::test(flavor = "multi_thread")]
async fn a_creation_whose_outcome_is_unknown_is_one_sandbox() {
    for fault in [Fault::StatusAfter(502), Fault::StatusBefore(Duration::from_millis(700)), Fault::Status(500)] {
        let harness = WorkerHarness::with_provider(quick(), 10).await;
        harness.provider().fail("POST /start", 1, fault.clone());
        let task = harness.begin(&message()).await.id;
        harness.drive(task).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_ready(&harness, &[task], &format!("{fault:?}")).await;
        harness.finish().await;
    }
}

/// A start fails while the provider cannot be reached: its sandbox is removed when the provider is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_start_leaves_no_sandbox_after_an_outage() {
    let harness = WorkerHarness::with_provider(quick(), 10).await;
    let refused = Kind::Status(422, r#"{"detail": "no"}"#.to_owned());
    harness.agent.inject(AgentFault::new("POST /api/conversations", Nth::Always, refused));
    harness.provider().fail("POST /stop", 3, Fault::Status(503));
    let task = harness.begin(&message()).await.id;
    let ended = harness.drive(task).await;
    assert_eq!(ended.now.status, StartStatus::Error, "{:?}", ended.now.detail);
    wait_until("the sandbox is removed", Duration::from_secs(60), async || {
        if let Some(message) = harness.receive().await {
            harness.handle(&message).await;
        }
        harness.sweep().await;
        harness.provider().active().is_empty()
    })
    .await;
    // The job that confirms the deletion is due in ten minutes.
    harness.purge().await;
    harness.finish().await;
}

/// The sandbox is paused in the middle of a start, and its agent server with it.
#[tokio::test(flavor = "multi_thread")]
async fn a_sandbox_that_is_paused_in_mid_start_is_resumed() {
    for (status, route) in STEPS {
        let harness = WorkerHarness::with_provider(config(), 10).await;
        slow_down(&harness, route);
        let task = harness.begin(&message()).await.id;
        let pause = async {
            reached(&harness, task, status).await;
            let (session, _) = harness.provider().newest();
            harness.agent.set_alive(false);
            harness.provider().set_status(&session, "paused");
            let is_over = async || {
                let is_resumed = harness.provider().active().contains(&session);
                is_resumed || harness.task(task).await.now.status.is_final()
            };
            wait_until("the sandbox is resumed", SOON, is_over).await;
            harness.agent.set_alive(true);
        };
        futures::future::join(harness.drive(task), pause).await;
        assert_ready(&harness, &[task], &format!("paused in {status:?}")).await;
        harness.finish().await;
    }
}

/// The provider has evicted the sandbox: that is definite, and the start ends at once.
#[tokio::test(flavor = "multi_thread")]
async fn an_evicted_sandbox_ends_its_start() {
    let harness = WorkerHarness::with_provider(quick(), 10).await;
    harness.provider().begin_as("starting");
    let task = harness.begin(&message()).await.id;
    let evict = async {
        wait_until("a session", SOON, async || !harness.provider().sessions().is_empty()).await;
        let (session, _) = harness.provider().newest();
        harness.provider().set_status(&session, "stopped");
    };
    let (ended, ()) = futures::future::join(harness.drive(task), evict).await;
    assert_eq!(ended.now.status, StartStatus::Error);
    assert!(ended.now.detail.is_some_and(|detail| detail.contains("Its provider has stopped it")));
    harness.finish().await;
}

/// More starts than sandboxes: those that are under way are not paused for the others.
#[tokio::test(flavor = "multi_thread")]
async fn starts_beyond_the_cap_wait_and_pause_none_that_is_under_way() {
    let harness = WorkerHarness::with_provider(config(), 2).await;
    harness.provider().boot_in(Duration::from_millis(300));
    harness.provider().begin_as("starting");
    harness.agent.inject(AgentFault::new(COMMAND, Nth::Always, Kind::SlowReply(Duration::from_secs(1))));
    let mut tasks = begin(&harness, 2).await;
    let first = tasks.clone();
    let more = async {
        for task in &first {
            reached(&harness, *task, StartStatus::PreparingRepository).await;
        }
        let more = begin(&harness, 2).await;
        drive_all(&harness, &more).await;
        more
    };
    let started = async {
        let ((), more) = futures::future::join(drive_all(&harness, &first), more).await;
        tasks.extend(more);
    };
    // Each start has a sandbox of its own.
    let watched = async {
        loop {
            let sessions = harness.provider().sessions();
            let paused = sessions.values().filter(|session| session.status == "paused").count();
            let unfinished = harness.unfinished().await;
            assert!(paused + unfinished <= 4, "{paused} are paused, {unfinished} starts are unfinished");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        () = started => {}
        () = watched => {}
    }
    for task in &tasks {
        let ended = harness.task(*task).await;
        assert_eq!(ended.now.status, StartStatus::Ready, "{:?}", ended.now.detail);
    }
    harness.finish().await;
}

/// Deletions that are requested in an outage are finished by their own jobs soon after it, without a sweep.
#[tokio::test(flavor = "multi_thread")]
async fn deletions_in_an_outage_are_finished_soon_after_it() {
    let harness = WorkerHarness::with_provider(quick(), 10).await;
    let tasks = begin(&harness, 4).await;
    drive_all(&harness, &tasks).await;
    assert_ready(&harness, &tasks, "before the outage").await;
    harness.provider().fail_for(Duration::from_secs(5), Fault::Status(503));
    for task in &tasks {
        let conversation = harness.task(*task).await.conversation_id;
        assert!(harness.context.deletion.deleter.delete(&harness.user, conversation).await.expect("deleted"));
    }
    wait_until("the end of the deletions", SOON, async || {
        if let Some(message) = harness.receive().await {
            harness.handle(&message).await;
        }
        harness.provider().active().is_empty()
    })
    .await;
    deletion::settle(&harness).await;
    harness.finish().await;
}

/// Only calls that the provider has received count as attempts to delete a sandbox: many raise an alarm about this sandbox.
#[tokio::test(flavor = "multi_thread")]
async fn attempts_that_the_open_circuit_prevents_do_not_count() {
    let harness = WorkerHarness::with_provider(quick(), 10).await;
    let tasks = begin(&harness, 4).await;
    drive_all(&harness, &tasks).await;
    let mut sandboxes = Vec::new();
    for task in &tasks {
        sandboxes.push(harness.task(*task).await.now.sandbox_id.expect("a sandbox"));
    }
    let before = harness.provider().requests();
    harness.provider().fail_for(Duration::from_secs(4), Fault::Status(503));
    for sandbox in &sandboxes {
        assert!(harness.context.reconciler.delete(&harness.user, sandbox).await.expect("marked"));
    }
    // The circuit opens when calls have failed for a second.
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(1200)).await;
        for sandbox in &sandboxes {
            harness.context.reconciler.reconcile(&harness.user, sandbox).await.expect("reconciled");
        }
    }
    let calls = harness.provider().requests() - before;
    let mut attempts = 0;
    for sandbox in &sandboxes {
        // The claim adds one.
        let claim = harness.records.claim(&harness.user, sandbox, Duration::ZERO).await.expect("the store");
        attempts += usize::try_from(claim.expect("a claim").record.attempts - 1).expect("small");
    }
    assert!((1..=calls).contains(&attempts), "{attempts} attempts, {calls} calls");
    assert!(calls < sandboxes.len() * 3, "the circuit is open: {calls} calls");
    deletion::settle(&harness).await;
    harness.finish().await;
}
