//! The models of the sandbox provider and of the agent servers in its sandboxes.
//!
//! [`Sandboxes`] is a [`Server`] for the authority of the provider's runtime API and for those of all agent servers
//! (`agent-<runtime id>.sim`). It calls back: agent servers post webhooks, and commands post notifications, to the server that
//! [`Sandboxes::connect`] is given. Every decision is drawn from the seed, its name and a counter of its subject (a sandbox, a conversation, a
//! command), so that the same calls at the same times get the same responses.

mod commands;
mod conversations;
pub mod faults;
pub mod history;
mod provider;
mod scripts;
mod server;
mod tests;
mod webhooks;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode, header};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;
use uuid::Uuid;

pub use self::faults::{Faults, Pace};
use self::history::{Counters, Notification, RunHistory};
use self::provider::Runtime;
use crate::dice;
use crate::net::{Failure, Pending, Reply, Request, Server};

/// The URL of the provider's runtime API.
pub const PROVIDER_URL: &str = "http://runtimes.sim";
/// The API key that the provider requires.
pub const API_KEY: &str = "key-of-the-runtime-api";
/// The version that agent servers report.
pub const VERSION: &str = "1.58.2";

/// The authority of the provider's runtime API.
const PROVIDER: &str = "runtimes.sim";

/// The settings of a simulation.
#[derive(Clone, Debug)]
pub struct Settings {
    pub seed: u64,
    /// The time of the agent servers' clocks when the model is created.
    pub epoch: Timestamp,
    pub faults: Faults,
    pub pace: Pace,
    /// The maximum number of sandboxes that start or run at a time; more are refused with 429.
    pub cap: Option<usize>,
}

impl Settings {
    /// Without faults, and without a limit of sandboxes.
    pub fn new(seed: u64, epoch: Timestamp) -> Self {
        Self { seed, epoch, faults: Faults::default(), pace: Pace::default(), cap: None }
    }
}

/// The models. Clones share their state.
#[derive(Clone)]
pub struct Sandboxes(Arc<Shared>);

struct Shared {
    settings: Settings,
    /// When the model was created.
    start: Instant,
    webhooks: OnceLock<Arc<dyn Server>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The ids of the runtimes that were created for a session, oldest first.
    sessions: BTreeMap<String, Vec<String>>,
    /// By id.
    runtimes: BTreeMap<String, Runtime>,
    /// How often each decision was drawn, by the hash of its name and its subject.
    draws: BTreeMap<u64, u64>,
    /// Whether no more faults happen.
    is_healed: bool,
    calls: BTreeMap<String, u64>,
    counters: Counters,
    notifications: Vec<Notification>,
    /// Runs of commands, of all sandboxes.
    runs: Vec<RunHistory>,
    /// The ids of the events in batches that were acknowledged, by conversation.
    acknowledged: BTreeMap<Uuid, BTreeSet<String>>,
    last_timestamp: i64,
}

impl Sandboxes {
    /// Creates the models. Must be called inside of a runtime, whose clock they use.
    pub fn new(settings: Settings) -> Self {
        let (start, webhooks, state) = (Instant::now(), OnceLock::new(), Mutex::default());
        Self(Arc::new(Shared { settings, start, webhooks, state }))
    }

    /// Sets the server that receives webhooks and notifications. Without it they are lost.
    pub fn connect(&self, webhooks: Arc<dyn Server>) {
        assert!(self.0.webhooks.set(webhooks).is_ok(), "the models are connected already");
    }

    /// Ends all faults: from now on none is drawn. What has happened already is not undone, and ends by itself.
    pub fn heal(&self) {
        self.0.lock().is_healed = true;
    }

    /// The number of requests of each kind so far, such as `POST /start` of the provider and `agent POST /api/conversations`.
    pub fn calls(&self) -> BTreeMap<String, u64> {
        self.0.lock().calls.clone()
    }

    pub fn counters(&self) -> Counters {
        self.0.lock().counters.clone()
    }
}

impl Server for Sandboxes {
    fn handle(&self, request: Request) -> Pending {
        let shared = self.0.clone();
        Box::pin(async move {
            if request.authority == PROVIDER {
                provider::handle(&shared, &request).await
            } else if let Some(id) = agent_id(&request.authority) {
                let id = id.to_owned();
                server::handle(&shared, &id, request).await
            } else {
                Err(Failure::Refused)
            }
        })
    }
}

/// The id of the runtime with this authority.
fn agent_id(authority: &str) -> Option<&str> {
    authority.strip_prefix("agent-")?.strip_suffix(".sim")
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the state of the models: an earlier call has panicked")
    }

    /// The time since the model was created.
    fn elapsed(&self) -> Duration {
        self.start.elapsed()
    }

    /// A number from 0 to 1 for a decision about this subject.
    fn draw(&self, state: &mut State, what: &'static str, subject: &str) -> f64 {
        let nth = state.draws.entry(dice::seeded(0, &(what, subject))).or_default();
        *nth += 1;
        dice::random(self.settings.seed, &(what, subject, *nth))
    }

    /// Decides whether something happens that has this probability.
    fn chance(&self, state: &mut State, what: &'static str, subject: &str, probability: f64) -> bool {
        // The decision is drawn in any case, so that other probabilities change no later decision.
        let drawn = self.draw(state, what, subject);
        drawn < probability
    }

    /// As [`Self::chance`], for a fault.
    fn fails(&self, state: &mut State, what: &'static str, subject: &str, probability: f64) -> bool {
        self.chance(state, what, subject, probability) && !state.is_healed
    }

    /// A time between both, short ones more often than long ones.
    fn between(&self, state: &mut State, what: &'static str, subject: &str, [least, most]: [Duration; 2]) -> Duration {
        let drawn = self.draw(state, what, subject);
        least + most.saturating_sub(least).mul_f64(drawn * drawn)
    }

    /// A number from 1 to `most`.
    fn number(&self, state: &mut State, what: &'static str, subject: &str, most: u32) -> u32 {
        let drawn = self.draw(state, what, subject);
        (1..most).rev().find(|number| drawn >= f64::from(*number) / f64::from(most)).map_or(1, |number| number + 1)
    }

    /// An id that is made of its name.
    fn id(&self, what: &str, subject: &str, nth: u64) -> Uuid {
        let half = |which: u8| dice::seeded(self.settings.seed, &(what, subject, nth, which));
        Uuid::from_u64_pair(half(0), half(1))
    }

    /// A time of the agent servers' clocks, later than all before it.
    fn timestamp(&self, state: &mut State) -> Timestamp {
        let elapsed = i64::try_from(self.elapsed().as_micros()).expect("a time");
        let now = self.settings.epoch.as_microsecond() + elapsed;
        state.last_timestamp = now.max(state.last_timestamp + 1);
        Timestamp::from_microsecond(state.last_timestamp).expect("a time")
    }

    /// Sends a request to the product and waits for its response at most this long.
    async fn send(&self, request: Request, timeout: Duration) -> Option<StatusCode> {
        let webhooks = self.webhooks.get()?;
        match tokio::time::timeout(timeout, webhooks.handle(request)).await {
            Ok(Ok(response)) => Some(response.status()),
            Ok(Err(Failure::Hang)) => {
                tokio::time::sleep(timeout).await;
                None
            }
            Ok(Err(Failure::Refused | Failure::Cut)) | Err(_) => None,
        }
    }
}

/// A time as agent servers write it in events: without a zone.
fn naive(time: Timestamp) -> String {
    format!("{time:.6}").trim_end_matches('Z').to_owned()
}

#[expect(clippy::unnecessary_wraps, reason = "the result of handlers")]
fn reply(status: StatusCode, body: &Value) -> Reply {
    Ok(raw(status, "application/json", body.to_string().into()))
}

fn raw(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Bytes> {
    Response::builder().status(status).header(header::CONTENT_TYPE, kind).body(body).expect("a response")
}

fn ok(body: &Value) -> Reply {
    reply(StatusCode::OK, body)
}

/// An error in the format of agent servers and of the provider.
fn detail(status: StatusCode, detail: &str) -> Reply {
    reply(status, &json!({"detail": detail}))
}

/// The values of a parameter of the query.
fn query_values(request: &Request, name: &str) -> Vec<String> {
    let pairs = form_urlencoded::parse(request.query.as_bytes());
    pairs.filter(|(key, _)| key == name).map(|(_, value)| value.into_owned()).collect()
}

fn query_value(request: &Request, name: &str) -> Option<String> {
    query_values(request, name).into_iter().next()
}

fn json_body(request: &Request) -> Value {
    serde_json::from_slice(&request.body).unwrap_or_default()
}

fn request_header<'a>(request: &'a Request, name: &str) -> Option<&'a str> {
    request.headers.get(name)?.to_str().ok()
}
