//! The runtime API of the provider, and the life of its sandboxes: boots, pauses, evictions, restarts of their agent servers.

use std::sync::Arc;
use std::time::Duration;

use http::{StatusCode, header};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::history::{Life, Outcome};
use super::server::AgentServer;
use super::{
    API_KEY, Shared, State, conversations, detail, json_body, ok, query_values, reply, request_header, server,
};
use crate::dice;
use crate::net::{Failure, Reply, Request};

/// The interval in which at most one outage begins.
const OUTAGE_INTERVAL: Duration = Duration::from_secs(600);
/// How much later the effect of a late request comes.
const LATE: [Duration; 2] = [Duration::from_millis(500), Duration::from_secs(60)];
/// The time for which an agent server is down in a restart.
const RESTART: [Duration; 2] = [Duration::from_secs(2), Duration::from_secs(15)];

/// The status of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Starting,
    Running,
    Paused,
    Stopped,
    Error,
}

impl Status {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Error => "error",
        }
    }

    /// Whether it occupies a machine.
    pub(super) fn is_active(self) -> bool {
        matches!(self, Self::Starting | Self::Running)
    }
}

/// A sandbox.
pub(super) struct Runtime {
    pub(super) session: String,
    pub(super) id: String,
    pub(super) key: String,
    /// The base URL of webhooks (`OH_WEBHOOKS_0_BASE_URL`).
    pub(super) webhooks: Option<String>,
    pub(super) status: Status,
    /// The number of its boots and their ends. What belongs to an earlier boot has ended.
    pub(super) boot: u64,
    pub(super) life: Vec<(Duration, Life)>,
    pub(super) server: AgentServer,
    /// Whether the provider has forgotten it after its end.
    is_forgotten: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Throttled { retry_after: Option<u64> },
    Status(StatusCode),
    StatusAfter(StatusCode),
    Late,
    Cut,
    Refused,
    Hang,
}

/// Handles a request to the runtime API.
pub(super) async fn handle(shared: &Arc<Shared>, request: &Request) -> Reply {
    let segments: Vec<&str> = request.path.trim_matches('/').split('/').collect();
    let (route, is_change) = match (request.method.as_str(), &segments[..]) {
        ("POST", ["start"]) => ("POST /start", true),
        ("POST", ["pause"]) => ("POST /pause", true),
        ("POST", ["resume"]) => ("POST /resume", true),
        ("POST", ["stop"]) => ("POST /stop", true),
        ("GET", ["list"]) => ("GET /list", false),
        ("GET", ["sessions", "batch"]) => ("GET /sessions/batch", false),
        ("GET", ["sessions", _]) => ("GET /sessions/{id}", false),
        _ => panic!("the model of the provider does not know {} {}", request.method, request.path),
    };
    let body = json_body(request);
    let subject = match route {
        "POST /start" => text(&body, "session_id"),
        "GET /sessions/{id}" => segments[1].to_owned(),
        "GET /list" | "GET /sessions/batch" => String::new(),
        _ => text(&body, "runtime_id"),
    };
    let subject = format!("{route} {subject}");
    let (latency, fault) = {
        let state = &mut *shared.lock();
        *state.calls.entry(route.to_owned()).or_default() += 1;
        let latency = shared.between(state, "latency", &subject, shared.settings.pace.provider);
        (latency, fault(shared, state, &subject, is_change))
    };
    sleep(latency).await;
    if request_header(request, "x-api-key") != Some(API_KEY) {
        return detail(StatusCode::UNAUTHORIZED, "Invalid API key");
    }
    let apply = || respond(shared, &mut shared.lock(), &segments, request, &body);
    match fault {
        None => apply(),
        Some(Fault::Throttled { retry_after }) => {
            let mut throttled = detail(StatusCode::TOO_MANY_REQUESTS, "Too many requests")?;
            if let Some(seconds) = retry_after {
                throttled.headers_mut().insert(header::RETRY_AFTER, seconds.into());
            }
            Ok(throttled)
        }
        Some(Fault::Status(status)) => detail(status, "an injected fault"),
        Some(Fault::StatusAfter(status)) => {
            drop(apply());
            detail(status, "an injected fault")
        }
        Some(Fault::Late) => {
            let later = shared.between(&mut shared.lock(), "late effect", &subject, LATE);
            let (shared, request) = (shared.clone(), request.clone());
            tokio::spawn(async move {
                sleep(later).await;
                let segments: Vec<&str> = request.path.trim_matches('/').split('/').collect();
                let mut state = shared.lock();
                state.counters.late_effects += 1;
                drop(respond(&shared, &mut state, &segments, &request, &json_body(&request)));
            });
            detail(StatusCode::GATEWAY_TIMEOUT, "an injected fault")
        }
        Some(Fault::Cut) => {
            drop(apply());
            Err(Failure::Cut)
        }
        Some(Fault::Refused) => Err(Failure::Refused),
        Some(Fault::Hang) => Err(Failure::Hang),
    }
}

fn text(body: &Value, field: &str) -> String {
    body[field].as_str().unwrap_or_default().to_owned()
}

/// Decides which fault a request meets.
fn fault(shared: &Shared, state: &mut State, subject: &str, is_change: bool) -> Option<Fault> {
    let faults = &shared.settings.faults.provider;
    let drawn = shared.draw(state, "provider fault", subject);
    let found = if state.is_healed {
        None
    } else if is_outage(shared) {
        Some(Fault::Status(StatusCode::SERVICE_UNAVAILABLE))
    } else if let Some(end) = throttled_until(shared) {
        // In whole seconds, not before the end.
        Some(Fault::Throttled { retry_after: Some(end.saturating_sub(shared.elapsed()).as_secs() + 1) })
    } else {
        let late = if is_change { faults.late } else { 0.0 };
        pick(
            drawn,
            [
                (faults.throttles, Fault::Throttled { retry_after: None }),
                (faults.errors, Fault::Status(StatusCode::INTERNAL_SERVER_ERROR)),
                (faults.errors_after, Fault::StatusAfter(StatusCode::INTERNAL_SERVER_ERROR)),
                (late, Fault::Late),
                (faults.cuts, Fault::Cut),
                (faults.refusals, Fault::Refused),
                (faults.hangs, Fault::Hang),
            ],
        )
    };
    state.counters.provider_faults += u64::from(found.is_some());
    found
}

/// Picks one of several alternatives, each with its probability, by a number from 0 to 1.
pub(super) fn pick<T: Copy>(drawn: f64, alternatives: impl IntoIterator<Item = (f64, T)>) -> Option<T> {
    let mut end = 0.0;
    alternatives.into_iter().find_map(|(probability, what)| {
        end += probability;
        (drawn < end).then_some(what)
    })
}

/// Times that depend on the seed alone: in an interval at most one, with this probability.
#[derive(Clone, Copy)]
struct Periods {
    name: &'static str,
    interval: Duration,
    probability: f64,
    length: [Duration; 2],
}

impl Periods {
    fn in_interval(self, seed: u64, number: u64) -> Option<(Duration, Duration)> {
        let drawn = |what: &str| dice::random(seed, &(self.name, what, number));
        if drawn("begins") >= self.probability {
            return None;
        }
        let [least, most] = self.length;
        let length = least + most.saturating_sub(least).mul_f64(drawn("length"));
        let begin = self.interval * u32::try_from(number).expect("an interval")
            + self.interval.saturating_sub(length).mul_f64(drawn("at"));
        Some((begin, begin + length))
    }

    /// The period that goes on at this time.
    fn at(self, seed: u64, now: Duration) -> Option<(Duration, Duration)> {
        let period = self.in_interval(seed, now.as_secs() / self.interval.as_secs());
        period.filter(|(begin, end)| (*begin..*end).contains(&now))
    }

    fn until(self, seed: u64, now: Duration) -> impl Iterator<Item = (Duration, Duration)> {
        (0..=now.as_secs() / self.interval.as_secs()).filter_map(move |number| self.in_interval(seed, number))
    }
}

/// The outages of the provider.
fn outage_periods(shared: &Shared) -> Periods {
    let probability = shared.settings.faults.provider.outages;
    Periods { name: "outage", interval: OUTAGE_INTERVAL, probability, length: shared.settings.pace.outage }
}

/// The times at which the provider refuses all requests.
fn throttled_periods(shared: &Shared) -> Periods {
    let probability = shared.settings.faults.provider.throttled_minutes;
    Periods {
        name: "throttled",
        interval: Duration::from_secs(60),
        probability,
        length: shared.settings.pace.throttled,
    }
}

fn is_outage(shared: &Shared) -> bool {
    outage_periods(shared).at(shared.settings.seed, shared.elapsed()).is_some()
}

fn throttled_until(shared: &Shared) -> Option<Duration> {
    throttled_periods(shared).at(shared.settings.seed, shared.elapsed()).map(|(_, end)| end)
}

/// The times until now at which the provider had an outage or refused all requests.
pub(super) fn outages(shared: &Shared) -> Vec<(Duration, Duration)> {
    let (seed, now) = (shared.settings.seed, shared.elapsed());
    outage_periods(shared).until(seed, now).chain(throttled_periods(shared).until(seed, now)).collect()
}

/// Applies a request and returns its response.
fn respond(shared: &Arc<Shared>, state: &mut State, segments: &[&str], request: &Request, body: &Value) -> Reply {
    let not_found = || detail(StatusCode::NOT_FOUND, "Runtime not found");
    let full = || detail(StatusCode::TOO_MANY_REQUESTS, "No capacity");
    match segments {
        ["start"] => {
            let session = text(body, "session_id");
            assert!(!session.is_empty(), "a start names its session: {body}");
            let found = of_session(state, &session).filter(|id| is_usable(state.runtimes[id].status));
            if let Some(id) = found {
                return ok(&shown(&state.runtimes[&id]));
            }
            if is_full(shared, state) {
                return full();
            }
            let id = create(shared, state, &session, body);
            let is_doubled = shared.fails(state, "double", &session, shared.settings.faults.provider.doubles);
            if is_doubled && !is_full(shared, state) {
                state.counters.doubled_runtimes += 1;
                create(shared, state, &session, body);
            }
            ok(&shown(&state.runtimes[&id]))
        }
        ["list"] => {
            let ids = state.sessions.values().flatten();
            let all = ids.map(|id| &state.runtimes[id]).filter(|runtime| runtime.status != Status::Stopped);
            ok(&json!({"runtimes": all.map(shown).collect::<Vec<_>>()}))
        }
        ["sessions", "batch"] => {
            let ids = query_values(request, "ids");
            let found = ids
                .iter()
                .map(|session| of_session(state, session).map_or(Value::Null, |id| shown(&state.runtimes[&id])));
            ok(&found.collect())
        }
        ["sessions", session] => match of_session(state, session) {
            Some(id) => ok(&shown(&state.runtimes[&id])),
            None => not_found(),
        },
        [change] => {
            let id = text(body, "runtime_id");
            let Some(status) = state.runtimes.get(&id).map(|runtime| runtime.status) else { return not_found() };
            match (*change, status) {
                ("pause", Status::Starting | Status::Running) => end(shared, state, &id, Status::Paused, Life::Paused),
                ("resume", Status::Paused) => {
                    if is_full(shared, state) {
                        return full();
                    }
                    boot(shared, state, &id, Life::Resumed);
                }
                ("stop", status) if status != Status::Stopped => {
                    end(shared, state, &id, Status::Stopped, Life::Stopped);
                }
                ("pause" | "resume", Status::Stopped) => return not_found(),
                _ => {}
            }
            reply(StatusCode::OK, &json!({"status": "success"}))
        }
        _ => unreachable!("the route was checked"),
    }
}

fn is_usable(status: Status) -> bool {
    matches!(status, Status::Starting | Status::Running | Status::Paused)
}

fn is_full(shared: &Shared, state: &State) -> bool {
    let active = || state.runtimes.values().filter(|runtime| runtime.status.is_active()).count();
    shared.settings.cap.is_some_and(|cap| active() >= cap)
}

/// The runtime of a session: the newest that has not ended, otherwise the newest that the provider has not forgotten.
fn of_session(state: &State, session: &str) -> Option<String> {
    let ids = state.sessions.get(session)?;
    let runtime = |id: &&String| &state.runtimes[*id];
    let left = ids.iter().rev().find(|id| runtime(id).status != Status::Stopped);
    left.or_else(|| ids.iter().rev().find(|id| !runtime(id).is_forgotten)).cloned()
}

fn shown(runtime: &Runtime) -> Value {
    json!({
        "session_id": runtime.session,
        "runtime_id": runtime.id,
        "session_api_key": runtime.key,
        "url": format!("http://agent-{}.sim", runtime.id),
        "status": runtime.status.as_str(),
        "pod_status": "ready",
    })
}

/// Creates a runtime. Its id and its key are made of the session and of the number of runtimes that the session had.
fn create(shared: &Arc<Shared>, state: &mut State, session: &str, body: &Value) -> String {
    let ids = state.sessions.entry(session.to_owned()).or_default();
    let number = ids.len() as u64;
    let id = shared.id("runtime", session, number).simple().to_string()[..16].to_owned();
    ids.push(id.clone());
    let webhooks = body["environment"]["OH_WEBHOOKS_0_BASE_URL"].as_str();
    let runtime = Runtime {
        session: session.to_owned(),
        id: id.clone(),
        key: format!("key-{}", shared.id("key", session, number).simple()),
        webhooks: webhooks.map(|url| url.trim_end_matches('/').to_owned()),
        status: Status::Stopped,
        boot: 0,
        life: Vec::new(),
        server: AgentServer::new(),
        is_forgotten: false,
    };
    assert!(state.runtimes.insert(id.clone(), runtime).is_none(), "ids of runtimes are unique");
    boot(shared, state, &id, Life::Created);
    id
}

impl Runtime {
    fn lives(&mut self, shared: &Shared, what: Life) {
        self.life.push((shared.elapsed(), what));
    }
}

/// Begins a boot.
fn boot(shared: &Arc<Shared>, state: &mut State, id: &str, how: Life) {
    let runtime = state.runtimes.get_mut(id).expect("the runtime");
    runtime.status = Status::Starting;
    runtime.boot += 1;
    runtime.lives(shared, how);
    tokio::spawn(live(shared.clone(), id.to_owned(), runtime.boot));
}

/// Ends everything in a sandbox: its processes, and what they had in memory. A paused sandbox keeps its files and conversations.
fn end(shared: &Shared, state: &mut State, id: &str, status: Status, how: Life) {
    let forgets = shared.chance(state, "forgets", id, 0.5);
    let (lost, runs) = {
        let runtime = state.runtimes.get_mut(id).expect("the runtime");
        runtime.status = status;
        runtime.boot += 1;
        runtime.lives(shared, how);
        runtime.is_forgotten = status == Status::Stopped && forgets;
        if status == Status::Stopped {
            runtime.server.files.clear();
        }
        (runtime.server.end_process(), runtime.server.end_runs())
    };
    state.lose_events(lost);
    for run in runs {
        state.runs[run].ended = Some((shared.elapsed(), Outcome::Killed));
    }
}

/// What happens to a sandbox by itself in one boot: it runs, its agent server responds, and then the faults that this boot has.
async fn live(shared: Arc<Shared>, id: String, boot: u64) {
    let pace = &shared.settings.pace;
    let faults = &shared.settings.faults.sandbox;
    let (wait, fails) = {
        let state = &mut *shared.lock();
        let fails = shared.fails(state, "boot fails", &id, faults.boot_failures);
        (shared.between(state, "boot", &id, pace.boot), fails)
    };
    sleep(wait).await;
    let ready = {
        let state = &mut *shared.lock();
        let ready = shared.between(state, "ready", &id, pace.ready);
        let Some(runtime) = in_boot(state, &id, boot) else { return };
        if fails {
            runtime.status = Status::Error;
            runtime.lives(&shared, Life::Failed);
            state.counters.failed_boots += 1;
            return;
        }
        runtime.status = Status::Running;
        runtime.lives(&shared, Life::Running);
        ready
    };
    sleep(ready).await;
    if !come_up(&shared, &id, boot) {
        return;
    }
    let mut troubles = {
        let state = &mut *shared.lock();
        let mut troubles: Vec<(Duration, Life)> = Vec::new();
        for (name, probability, what) in [
            ("pauses by the provider", faults.pauses, Life::PausedByProvider),
            ("eviction", faults.evictions, Life::Evicted),
            ("crash", faults.crashes, Life::Crashed),
            ("restart", faults.restarts, Life::Restarted),
        ] {
            let at = shared.between(state, name, &id, pace.trouble);
            if shared.fails(state, name, &id, probability) {
                troubles.push((at, what));
            }
        }
        troubles
    };
    troubles.sort();
    let alive_at = Instant::now();
    for (at, what) in troubles {
        tokio::time::sleep_until(alive_at + at).await;
        let down = {
            let state = &mut *shared.lock();
            let down = shared.between(state, "downtime", &id, RESTART);
            if state.is_healed || in_boot(state, &id, boot).is_none() {
                return;
            }
            match what {
                Life::PausedByProvider => {
                    state.counters.pauses_by_provider += 1;
                    return end(&shared, state, &id, Status::Paused, what);
                }
                Life::Evicted => {
                    state.counters.evictions += 1;
                    return end(&shared, state, &id, Status::Stopped, what);
                }
                _ => {}
            }
            state.counters.restarts += 1;
            server::end_server(&shared, state, &id, what == Life::Restarted);
            in_boot(state, &id, boot).expect("the runtime").lives(&shared, what);
            down
        };
        sleep(down).await;
        if !come_up(&shared, &id, boot) {
            return;
        }
    }
}

/// The runtime, unless its boot has ended.
pub(super) fn in_boot<'s>(state: &'s mut State, id: &str, boot: u64) -> Option<&'s mut Runtime> {
    state.runtimes.get_mut(id).filter(|runtime| runtime.boot == boot)
}

/// Lets the agent server respond. Returns false if the boot has ended.
fn come_up(shared: &Arc<Shared>, id: &str, boot: u64) -> bool {
    let state = &mut *shared.lock();
    let Some(runtime) = in_boot(state, id, boot) else { return false };
    runtime.server.come_up();
    runtime.lives(shared, Life::Alive);
    conversations::load(shared, state, id);
    true
}
