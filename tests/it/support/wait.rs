//! Polls for a condition with a timeout, instead of sleeping for a fixed time.

use std::panic::Location;
use std::time::{Duration, Instant};

/// Polls `condition` at growing intervals until it holds. After `timeout` it panics with `what`, at the caller's line.
#[track_caller]
pub fn wait_until<F>(what: &str, timeout: Duration, mut condition: F) -> impl Future<Output = ()>
where
    F: AsyncFnMut() -> bool,
{
    let caller = Location::caller();
    async move {
        let found = poll(timeout, async || condition().await.then_some(())).await;
        assert!(found.is_some(), "{caller}: not true after {timeout:?}: {what}");
    }
}

/// As [`wait_until`], for a condition that yields something: returns the first `Some`.
#[track_caller]
pub fn wait_for<T, F>(what: &str, timeout: Duration, probe: F) -> impl Future<Output = T>
where
    F: AsyncFnMut() -> Option<T>,
{
    let caller = Location::caller();
    async move {
        match poll(timeout, probe).await {
            Some(value) => value,
            None => panic!("{caller}: no value after {timeout:?}: {what}"),
        }
    }
}

/// The first and the longest pause between two polls. Constant polling would slow an agent server down.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_millis(300));

async fn poll<T>(timeout: Duration, mut probe: impl AsyncFnMut() -> Option<T>) -> Option<T> {
    let started = Instant::now();
    let mut pause = PAUSES.0;
    loop {
        if let Some(value) = probe().await {
            return Some(value);
        }
        if started.elapsed() >= timeout {
            return None;
        }
        tokio::time::sleep(pause).await;
        pause = (pause + pause / 4).min(PAUSES.1);
    }
}

/// Whether a process runs. A process that has ended is a zombie until its parent has waited for it.
pub fn is_running(pid: &str) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}
