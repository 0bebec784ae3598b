//! The circuit breaker of the sandbox provider: after failures in a row, no worker calls the provider for a while.
//!
//! Its state is an item that all workers share. A failure is a call without a usable response: a 429, a 5xx, a timeout, a cut connection.
//! After [`THRESHOLD`] of them in a row, for at least [`PERIOD`], the circuit is *open* and calls fail at once. When the pause is over, one
//! caller makes a *probe*: if it succeeds the circuit is closed, otherwise the next pause is longer. A response with `Retry-After` opens the
//! circuit at once.
//!
//! The period is what many workers need: of a thousand calls some fail in every second, also if the provider responds to nearly all. A
//! number of failures alone would then open the circuit again and again. Other processes see a failure after [`CACHED`], and the next
//! success of one of them ends the row, so a row that lasts for the whole period had no success in it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use serde::Deserialize;
use tokio::time::Instant;

use super::boots::control_key;
use crate::clock::Time;
use crate::dynamo::{Backoff, Condition, Item, Outcome, Table, Update, from_item, number, text};
use crate::error::{Error, Result};

/// Failures in a row that open the circuit.
const THRESHOLD: u32 = 3;
/// How long a row of failures lasts at least before it opens the circuit. Longer than [`CACHED`] and a call.
const PERIOD: Duration = Duration::from_secs(1);
/// The pauses of an open circuit, with jitter.
const PAUSES: Backoff = Backoff { first: Duration::from_secs(1), longest: Duration::from_secs(30), attempts: u32::MAX };
/// The longest `Retry-After` that is honoured.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(120);
/// How long the other callers wait for the outcome of a probe. It is longer than a call can take.
const PROBE: Duration = Duration::from_secs(20);
/// How long a process uses the state that it has read.
const CACHED: Duration = Duration::from_millis(500);

const FAILURES: &str = "failures";
const FAILING_SINCE: &str = "failing_since";
const OPENINGS: &str = "openings";
const OPEN_UNTIL: &str = "open_until";

/// The stored state.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct State {
    /// Failures in a row.
    failures: u32,
    /// The time of the first one of them.
    failing_since: Option<Time>,
    /// How often the circuit has been opened in a row.
    openings: u32,
    /// The end of the pause or of the probe. Without it the circuit is closed.
    open_until: Option<Time>,
}

/// The permission to call the provider.
#[derive(Debug)]
pub(super) struct Permit {
    state: State,
    is_probe: bool,
}

/// The circuit breaker. Clones share what they have read.
#[derive(Clone, Debug)]
pub struct CircuitBreaker {
    table: Table,
    read: Arc<Mutex<Option<(Instant, State)>>>,
}

impl CircuitBreaker {
    pub(super) fn new(table: Table) -> Self {
        Self { table, read: Arc::default() }
    }

    /// Permits a call, unless the circuit is open. A state that cannot be read permits it.
    ///
    /// # Errors
    /// [`Error::CircuitOpen`].
    pub(super) async fn permit(&self) -> Result<Permit> {
        let state = match self.state().await {
            Ok(state) => state,
            Err(error) => {
                tracing::warn!(error = %error.context(), "provider.circuit_unknown");
                State::default()
            }
        };
        let Some(open_until) = state.open_until else { return Ok(Permit { state, is_probe: false }) };
        let probe_until = Time::now().plus(PROBE);
        let is_own = Time::now() >= open_until && {
            let update = Update::new()
                .set(OPEN_UNTIL, text(probe_until.sortable()))
                .condition(Condition::equal(OPEN_UNTIL, text(open_until.sortable())));
            let probe = self.table.update_once(control_key(), update).await?;
            self.note(None);
            probe.is_applied()
        };
        if !is_own {
            return Err(Error::CircuitOpen);
        }
        Ok(Permit { state: State { open_until: Some(probe_until), ..state }, is_probe: true })
    }

    /// Records that a permitted call was answered, and closes the circuit if the call was its probe. Writes nothing if there was no failure
    /// before. A call that had begun before the circuit was opened does not close it.
    pub(super) async fn succeeded(&self, permit: &Permit) {
        if permit.state.failures == 0 && permit.state.open_until.is_none() {
            return;
        }
        let open_until = permit.state.open_until.map(|until| text(until.sortable()));
        let update = Update::new()
            .remove_all(&[FAILURES, FAILING_SINCE, OPENINGS, OPEN_UNTIL])
            .condition(Condition::unchanged(OPEN_UNTIL, open_until));
        match self.table.apply(control_key(), update).await {
            Ok(true) => {
                self.note(Some(State::default()));
                if permit.is_probe {
                    tracing::info!("provider.circuit_closed");
                }
            }
            Ok(false) => self.note(None),
            Err(error) => tracing::warn!(error = %error.context(), "provider.circuit_not_recorded"),
        }
    }

    /// Records that a permitted call has failed, and opens the circuit if it was the last one that is allowed to.
    pub(super) async fn failed(&self, permit: &Permit, retry_after: Option<Duration>, context: &str) {
        match self.open_if_needed(permit, retry_after).await {
            Ok(None) => {}
            Ok(Some((openings, pause))) => {
                let pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
                tracing::warn!(openings, pause_ms, error = context, "provider.circuit_opened");
            }
            Err(error) => tracing::warn!(error = %error.context(), "provider.circuit_not_recorded"),
        }
    }

    /// Returns the number of openings in a row and the pause, if the circuit was opened.
    async fn open_if_needed(&self, permit: &Permit, retry_after: Option<Duration>) -> Result<Option<(u32, Duration)>> {
        self.note(None);
        let now = Time::now();
        let count = Update::new().add(FAILURES, 1).set_if_missing(FAILING_SINCE, text(now.sortable()));
        let counted = self.table.update(control_key(), count).await?;
        let Outcome::Applied(item) = counted else { return Ok(None) };
        let state: State = from_item(item)?;
        // Calls that had begun before the circuit was opened do not make its pause longer.
        let expected = if permit.is_probe { permit.state.open_until } else { None };
        let lasted = state.failing_since.map(|since| now.since(since)).unwrap_or_default();
        let is_due = permit.is_probe || retry_after.is_some() || (state.failures >= THRESHOLD && lasted >= PERIOD);
        if !is_due || state.open_until != expected {
            return Ok(None);
        }
        let openings = state.openings.saturating_add(1);
        let pause = PAUSES.pause_after(openings).max(retry_after.unwrap_or_default().min(LONGEST_RETRY_AFTER));
        let update = Update::new()
            .set(OPEN_UNTIL, text(now.plus(pause).sortable()))
            .set(OPENINGS, number(openings))
            .condition(Condition::unchanged(OPEN_UNTIL, expected.map(|until| text(until.sortable()))));
        let opened = self.table.update_once(control_key(), update).await?;
        Ok(opened.is_applied().then_some((openings, pause)))
    }

    async fn state(&self) -> Result<State> {
        let read = self.read.lock().ok().and_then(|read| read.clone());
        if let Some((_, state)) = read.filter(|(at, _)| at.elapsed() < CACHED) {
            return Ok(state);
        }
        let item: Item = self.table.get(control_key()).await?.unwrap_or_default();
        let state: State = from_item(item)?;
        self.note(Some(state.clone()));
        Ok(state)
    }

    /// Replaces what this process has read.
    fn note(&self, state: Option<State>) {
        if let Ok(mut read) = self.read.lock() {
            *read = state.map(|state| (Instant::now(), state));
        }
    }
}
