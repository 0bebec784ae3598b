//! Sandboxes that a provider runs without a record: which of them are deleted, and when.

use std::time::Duration;

use shared::Time;
use shared::digest::sha256_hex;
use shared::sandbox::Launch;
use shared::sandbox::orphans::{MIN_AGE, PERIOD};
use shared::sandbox::reconciler::SandboxReconciler;
use shared::sandbox::store::Desired;

use crate::support::fault_proxy::{Moment, Stop};
use crate::support::runtime_api::Fault;
use crate::support::worker_harness::{WorkerHarness, quick};

const SANDBOXES: usize = 100;

/// Creates a sandbox and removes its record, as if its deletion had been confirmed before the provider created it. Returns its name at the
/// provider.
async fn orphan(harness: &WorkerHarness, id: &str) -> String {
    let reconciler = &harness.other_worker.reconciler;
    assert_eq!(reconciler.sandboxes.start(&harness.user, id, None).await.expect("started"), Launch::Started);
    remove_record(harness, id).await;
    harness.provider().newest().0
}

async fn remove_record(harness: &WorkerHarness, id: &str) {
    let (records, user) = (&harness.records, &harness.user);
    assert!(records.mark_deleted(user, id).await.expect("marked"));
    let claim = records.claim(user, id, Duration::from_secs(60)).await.expect("the store").expect("it is due");
    assert!(records.remove(&claim).await.expect("removed"));
}

fn status(harness: &WorkerHarness, name: &str) -> String {
    harness.provider().sessions()[name].status.clone()
}

async fn find(reconciler: &SandboxReconciler, now: Time) -> usize {
    reconciler.find_orphans(now).await.expect("compared")
}

/// A creation whose response was lost takes effect after the record of its sandbox was removed.
#[tokio::test]
async fn a_late_sandbox_is_deleted_when_it_was_seen_twice_and_is_old_enough() {
    let harness = WorkerHarness::with_provider(quick(), SANDBOXES).await;
    let reconciler = &harness.context.reconciler;
    let late = orphan(&harness, "late").await;
    let first = Time::now();
    assert_eq!(find(reconciler, first).await, 0, "it is seen for the first time");
    assert_eq!(find(reconciler, first.plus(PERIOD)).await, 0, "it is young");
    let old = first.plus(MIN_AGE);
    assert_eq!(find(reconciler, old).await, 1);
    assert_eq!(find(reconciler, old).await, 0, "the next comparison is not due");
    // From now on it cannot be used again, and the reconciler deletes it.
    let other = &harness.other_worker.reconciler.sandboxes;
    let again = other.start(&harness.user, "late", None).await.expect("an answer");
    assert_eq!(again, Launch::Deleted);
    assert!(harness.records.get(&harness.user, "late").await.expect("the store").is_none(), "its user does not see it");
    harness.settle_sandboxes().await;
    assert_eq!(status(&harness, &late), "stopped");
    harness.finish().await;
}

#[tokio::test]
async fn what_has_a_record_or_is_not_of_this_deployment_is_kept() {
    let harness = WorkerHarness::with_provider(quick(), SANDBOXES).await;
    let (reconciler, provider) = (&harness.context.reconciler, harness.provider());
    // A sandbox of this deployment, one without a deployment's id, one of another deployment, and one whose name was never given out.
    reconciler.sandboxes.start(&harness.user, "used", None).await.expect("started");
    let used = provider.newest().0;
    let prefix = used.split_once('-').expect("a prefix").0;
    let hash = &sha256_hex("anything")[..32];
    let others = [hash.to_owned(), format!("{}-{hash}", &sha256_hex("another")[..12]), format!("{prefix}-{hash}")];
    for name in &others {
        provider.add(name);
    }
    let first = Time::now();
    for round in 0..10 {
        assert_eq!(find(reconciler, first.plus(PERIOD * round)).await, 0);
    }
    harness.settle_sandboxes().await;
    for name in others.iter().chain([&used]) {
        assert_eq!(status(&harness, name), "running", "{name}");
    }
    assert_eq!(provider.requests_to("GET /list").len(), 10);
    assert!(provider.requests_to("POST /stop").is_empty());
    harness.finish().await;
}

#[tokio::test]
async fn a_record_between_two_comparisons_keeps_its_sandbox() {
    let harness = WorkerHarness::with_provider(quick(), SANDBOXES).await;
    let reconciler = &harness.context.reconciler;
    let name = orphan(&harness, "again").await;
    let first = Time::now();
    assert_eq!(find(reconciler, first).await, 0);
    // A start uses the same id.
    assert_eq!(reconciler.sandboxes.start(&harness.user, "again", None).await.expect("started"), Launch::Started);
    let second = first.plus(MIN_AGE);
    assert_eq!(find(reconciler, second).await, 0);
    // When the record is removed again, the time begins again.
    remove_record(&harness, "again").await;
    let third = second.plus(PERIOD);
    assert_eq!(find(reconciler, third).await, 0);
    assert_eq!(find(reconciler, third.plus(PERIOD)).await, 0);
    assert_eq!(status(&harness, &name), "running");
    assert_eq!(find(reconciler, third.plus(MIN_AGE)).await, 1);
    harness.settle_sandboxes().await;
    assert_eq!(status(&harness, &name), "stopped");
    harness.finish().await;
}

/// A provider that does not respond says nothing about its sandboxes.
#[tokio::test]
async fn a_provider_that_cannot_be_listed_fails_no_sweep() {
    let harness = WorkerHarness::with_provider(quick(), SANDBOXES).await;
    let (reconciler, provider) = (&harness.context.reconciler, harness.provider());
    let name = orphan(&harness, "late").await;
    let first = Time::now();
    assert_eq!(find(reconciler, first).await, 0);
    // A request that is cut off is repeated once.
    let faults = [(1, Fault::Status(503)), (1, Fault::Status(404)), (1, Fault::Garbage), (2, Fault::Cut)];
    for (round, (times, fault)) in faults.into_iter().enumerate() {
        provider.fail("GET /list", times, fault);
        let round = u32::try_from(round).expect("small");
        assert_eq!(find(reconciler, first.plus(MIN_AGE + PERIOD * round)).await, 0);
    }
    assert_eq!(find(reconciler, first.plus(MIN_AGE * 2)).await, 1);
    harness.settle_sandboxes().await;
    assert_eq!(status(&harness, &name), "stopped");
    harness.finish().await;
}

/// The worker dies at each call of a comparison in turn.
async fn crash_everywhere(moment: Moment) {
    let harness = WorkerHarness::with_provider(quick(), SANDBOXES).await;
    let mut now = Time::now();
    let mut calls = 0;
    for call in 1.. {
        let id = format!("late-{call}");
        let name = orphan(&harness, &id).await;
        find(&harness.other_worker.reconciler, now).await;
        now = now.plus(MIN_AGE);
        harness.gate.arm(call, Stop::Hang(moment));
        let context = harness.context.clone();
        let mut worker = tokio::spawn(async move { find(&context.reconciler, now).await });
        let is_reached = tokio::select! {
            found = &mut worker => {
                assert_eq!(found.expect("no panic"), 1);
                false
            }
            () = harness.gate.reached() => {
                worker.abort();
                let _dropped = worker.await;
                true
            }
        };
        harness.gate.disarm();
        now = now.plus(PERIOD);
        find(&harness.context.reconciler, now).await;
        now = now.plus(PERIOD);
        let record = harness.records.find(&harness.user, &id).await.expect("the store");
        assert!(record.is_some_and(|record| record.desired == Desired::Deleted), "call {call}");
        harness.other_worker.reconciler.reconcile(&harness.user, &id).await.expect("reconciled");
        assert_eq!(status(&harness, &name), "stopped", "call {call}");
        if !is_reached {
            break;
        }
        calls = call;
    }
    assert!(calls > 4, "only {calls} calls");
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_before_any_call_delays_a_deletion() {
    crash_everywhere(Moment::Before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_after_any_call_delays_a_deletion() {
    crash_everywhere(Moment::After).await;
}
