//! Starts that wait for their sandboxes: observed together, continued when there is something to do, and not lost with a worker; and the
//! circuit breaker of the provider.

use std::time::Duration;

use aws_sdk_sqs::types::Message;
use futures::future::join_all;
use serde_json::{Value, json};
use shared::config::StartConfig;
use shared::start::task::StartStatus;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use crate::support::fault_proxy::{Moment, Stop};
use crate::support::runtime_api::Fault;
use crate::support::wait::wait_until;
use crate::support::worker_harness::{WorkerHarness, quick};

const LIMIT: Duration = Duration::from_secs(180);
const BATCH: &str = "GET /sessions/batch";

/// A worker that waits for no sandbox in its own process, as on AWS.
fn config() -> StartConfig {
    StartConfig {
        sandbox_startup_timeout: LIMIT,
        step_timeout: LIMIT,
        boot_inline_wait: Duration::ZERO,
        inline_wait: Duration::from_millis(100),
        ..quick()
    }
}

fn message() -> Value {
    json!({"initial_message": {"content": [{"type": "text", "text": "hi"}]}})
}

async fn begin(harness: &WorkerHarness, count: usize) -> Vec<Uuid> {
    join_all((0..count).map(|_| async { harness.begin(&message()).await.id })).await
}

async fn drive_all(harness: &WorkerHarness, tasks: &[Uuid]) {
    join_all(tasks.iter().map(|task| harness.drive(*task))).await;
    for task in tasks {
        let ended = harness.task(*task).await;
        assert_eq!((ended.now.status, ended.now.detail), (StartStatus::Ready, None));
    }
}

/// Handles jobs, without a sweep, until the starts wait and no other job is in the queue.
async fn drive_until_waiting(harness: &WorkerHarness, tasks: &[Uuid]) {
    for task in tasks {
        while harness.task(*task).await.now.status != StartStatus::WaitingForSandbox {
            let Some(message) = harness.receive().await else { continue };
            harness.handle(&message).await;
        }
    }
}

/// Handles jobs for a while; returns the number of observations and of other jobs.
async fn handle_for(harness: &WorkerHarness, time: Duration) -> (usize, usize) {
    let (mut observations, mut others) = (0, 0);
    let end = Instant::now() + time;
    while Instant::now() < end {
        let Some(message) = harness.receive().await else { continue };
        let body = message.body.as_deref().unwrap_or_default();
        *(if body.contains("observe_boots") { &mut observations } else { &mut others }) += 1;
        harness.handle(&message).await;
    }
    (observations, others)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_calls_to_the_provider_do_not_grow_with_the_number_of_waiting_starts() {
    for (starts, batches) in [(1, 1), (50, 1), (51, 2)] {
        let harness = WorkerHarness::with_provider(config(), 60).await;
        harness.provider().begin_as("starting");
        let tasks = begin(&harness, starts).await;
        drive_until_waiting(&harness, &tasks).await;
        let before = harness.provider().requests();
        let (observations, others) = handle_for(&harness, Duration::from_secs(6)).await;
        let calls = harness.provider().requests() - before;
        assert!(observations >= 2, "{starts} starts: {observations}");
        assert_eq!(others, 0, "{starts} starts: no start is continued while its sandbox boots");
        assert!(calls <= observations * batches, "{starts} starts: {calls} calls in {observations} observations");
        for session in harness.provider().sessions().into_keys() {
            harness.provider().set_status(&session, "running");
        }
        drive_all(&harness, &tasks).await;
        harness.finish().await;
    }
}

/// The observer is killed at each of its calls, before or after the effect of the call.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_observer_loses_no_start() {
    let harness = WorkerHarness::with_provider(config(), 100).await;
    for moment in [Moment::Before, Moment::After] {
        for call in 1.. {
            harness.provider().begin_as("starting");
            let task = harness.begin(&message()).await.id;
            drive_until_waiting(&harness, &[task]).await;
            harness.provider().set_status(&harness.provider().newest().0, "running");
            let observation = loop {
                let Some(message) = harness.receive().await else {
                    // The observer that was killed before may have moved the time of the next observation.
                    harness.sweep().await;
                    continue;
                };
                if message.body.as_deref().is_some_and(|body| body.contains("observe_boots")) {
                    break message;
                }
                harness.handle(&message).await;
            };
            harness.gate.arm(call, Stop::Hang(moment));
            let (context, event) = (harness.context.clone(), WorkerHarness::event(&observation));
            let mut worker = tokio::spawn(async move { worker::handle(&context, event).await });
            tokio::select! {
                handled = &mut worker => drop(handled.expect("no panic").expect("handled")),
                () = harness.gate.reached() => {
                    worker.abort();
                    let _dropped = worker.await;
                }
            }
            harness.gate.disarm();
            let is_reached = harness.gate.is_reached();
            if !is_reached {
                harness.delete(&observation).await;
            }
            drive_all(&harness, &[task]).await;
            if !is_reached {
                assert!(call > 5, "the observer makes more calls");
                break;
            }
        }
    }
    harness.finish().await;
}

/// Each call of an observation loses its response once, and the SDK repeats it. While a sandbox boots, the next observation follows.
#[tokio::test(flavor = "multi_thread")]
async fn an_observation_whose_responses_are_lost_is_followed_by_another() {
    let harness = WorkerHarness::with_provider(config(), 10).await;
    harness.provider().begin_as("starting");
    let task = harness.begin(&message()).await.id;
    drive_until_waiting(&harness, &[task]).await;
    for call in 1.. {
        let observation = wait_for_observation(&harness, call).await;
        harness.gate.arm(call, Stop::LoseResponses(1));
        harness.handle(&observation).await;
        let is_reached = harness.gate.is_reached();
        harness.gate.disarm();
        if !is_reached {
            assert!(call > 3, "the observer makes more calls");
            break;
        }
    }
    harness.provider().set_status(&harness.provider().newest().0, "running");
    drive_all(&harness, &[task]).await;
    harness.finish().await;
}

/// Receives the next observation. No sweep enqueues it, and the start is due by itself after a minute only.
async fn wait_for_observation(harness: &WorkerHarness, call: usize) -> Message {
    let end = Instant::now() + Duration::from_secs(40);
    while Instant::now() < end {
        match harness.receive().await {
            Some(message) if message.body.as_deref().is_some_and(|body| body.contains("observe_boots")) => {
                return message;
            }
            Some(other) => harness.handle(&other).await,
            None => {}
        }
    }
    panic!("call {call}: the observations have ended");
}

/// The provider fails while nine starts create their sandboxes, or while they wait for them.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_ends_no_start_and_the_provider_is_left_alone_meanwhile() {
    for (is_waiting, milliseconds) in [(false, 500), (true, 500), (false, 20_000), (true, 20_000)] {
        let case = format!("{milliseconds} ms, waiting: {is_waiting}");
        let harness = WorkerHarness::with_provider(config(), 10).await;
        harness.provider().begin_as("starting");
        harness.provider().boot_in(Duration::from_secs(1));
        let tasks = begin(&harness, 9).await;
        if is_waiting {
            drive_until_waiting(&harness, &tasks).await;
        }
        let outage = Duration::from_millis(milliseconds);
        let before = harness.provider().requests();
        harness.provider().fail_for(outage, Fault::Status(503));
        let calls = async {
            sleep(outage).await;
            let calls = harness.provider().requests() - before;
            for task in &tasks {
                assert_eq!(harness.attempts(*task).await, 0, "{case}: a failure of the provider is no attempt");
            }
            calls
        };
        let (calls, ()) = tokio::join!(calls, drive_all(&harness, &tasks));
        // Each start fails once, and once more when the failures have lasted long enough; after that there is one call at the end of each pause.
        assert!(calls <= 2 * 9 + 8, "{case}: {calls} calls");
        harness.finish().await;
    }
}

/// A response with `Retry-After` opens the circuit at once.
#[tokio::test(flavor = "multi_thread")]
async fn retry_after_is_honoured() {
    let harness = WorkerHarness::with_provider(config(), 10).await;
    harness.provider().fail("POST /start", 1, Fault::RetryAfter(4));
    let task = harness.begin(&message()).await.id;
    let failed = async {
        let starts = || harness.provider().requests_to("POST /start").len();
        wait_until("the refusal", LIMIT, async || starts() == 1).await;
        let (began, before) = (Instant::now(), harness.provider().requests());
        wait_until("another call", LIMIT, async || harness.provider().requests() > before).await;
        began.elapsed()
    };
    let tasks = [task];
    let (waited, ()) = tokio::join!(failed, drive_all(&harness, &tasks));
    assert!(waited >= Duration::from_millis(3500), "{waited:?}");
    harness.finish().await;
}

/// A start whose sandbox does not boot ends at its deadline, although no sweep continues it.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_ends_at_the_deadline_of_its_step() {
    let config = StartConfig { sandbox_startup_timeout: Duration::from_secs(4), ..config() };
    let harness = WorkerHarness::with_provider(config, 10).await;
    harness.provider().begin_as("starting");
    let task = harness.begin(&message()).await.id;
    let is_over = async || harness.task(task).await.now.status == StartStatus::Error;
    wait_until("the end", LIMIT, async || {
        if let Some(message) = harness.receive().await {
            harness.handle(&message).await;
        }
        is_over().await
    })
    .await;
    let detail = harness.task(task).await.now.detail.expect("a detail");
    assert!(detail.starts_with("Sandbox failed to start within 4s"), "{detail}");
    assert!(harness.provider().requests_to(BATCH).len() <= 8, "{:?}", harness.provider().requests_to(BATCH).len());
    harness.undone(task).await;
    harness.purge().await;
    harness.finish().await;
}
