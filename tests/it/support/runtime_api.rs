//! A stub server for the runtime API of remote sandboxes: sessions that start, run, pause and stop, in the contract's
//! format.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use axum::response::Response;
use http::StatusCode;
use serde_json::{Value, json};

use super::server::{Cut, Request, Server, hang, json as answer, raw};

/// The API key that it requires.
pub const API_KEY: &str = "key-of-the-runtime-api";

#[derive(Clone, Debug)]
pub struct Session {
    pub runtime_id: String,
    pub key: String,
    pub status: String,
    /// The body of the start request.
    pub start: Value,
    /// When it becomes `running` by itself.
    runs_at: Option<Instant>,
}

impl Session {
    /// Whether it needs a machine.
    fn is_active(&self) -> bool {
        matches!(self.status.as_str(), "starting" | "running")
    }
}

/// A fault of the provider.
#[derive(Clone, Debug)]
pub enum Fault {
    /// This status and no effect: 429 under load, 5xx in an outage.
    Status(u16),
    /// The status 429, and after how many seconds the request may be repeated.
    RetryAfter(u64),
    /// The effect, and this status.
    StatusAfter(u16),
    /// The status 504 at once, and the effect this much later.
    StatusBefore(Duration),
    Garbage,
    Hang,
    Cut,
}

/// The requests that a fault applies to.
#[derive(Debug)]
struct Injected {
    /// Such as `POST /start`; `None` for every request.
    route: Option<String>,
    /// The number of requests that it still applies to.
    left: usize,
    /// The end of an outage.
    until: Option<Instant>,
    fault: Fault,
}

impl Injected {
    /// Whether the fault applies to the request, which is then counted.
    fn strikes(&mut self, request: &Request) -> bool {
        let is_over = self.until.is_some_and(|until| Instant::now() >= until);
        if is_over || self.left == 0 || self.route.as_ref().is_some_and(|route| !request.is(route)) {
            return false;
        }
        self.left -= 1;
        true
    }
}

#[derive(Debug, Default)]
struct State {
    sessions: BTreeMap<String, Session>,
    agent_url: String,
    begins_as: String,
    /// How long a new or resumed session is `starting` before it runs by itself.
    boots_in: Option<Duration>,
    /// The key of every session; without it each has one of its own.
    key: Option<String>,
    /// The most sessions that may run; more are refused with 429.
    cap: Option<usize>,
    fault: Option<Fault>,
    injected: Vec<Injected>,
    requests: Vec<Request>,
    made: usize,
}

#[derive(Debug)]
pub struct RuntimeApi {
    server: Server,
    state: Arc<Mutex<State>>,
}

impl RuntimeApi {
    /// Starts; the agent server of every session has this address.
    pub async fn start(agent_url: String) -> Self {
        let state = Arc::new(Mutex::new(State { agent_url, begins_as: "starting".to_owned(), ..State::default() }));
        let shared = state.clone();
        let server = Server::start(move |request| respond(request, shared.clone())).await;
        Self { server, state }
    }

    pub fn url(&self) -> String {
        self.server.url()
    }

    /// The sessions, by id.
    pub fn sessions(&self) -> BTreeMap<String, Session> {
        self.state().sessions.clone()
    }

    /// The session that was started last.
    pub fn newest(&self) -> (String, Session) {
        let newest = self.sessions().into_iter().max_by_key(|(_, session)| session.runtime_id.clone());
        newest.expect("a session")
    }

    /// Sets the initial status of new sessions.
    pub fn begin_as(&self, status: &str) {
        self.state().begins_as = status.to_owned();
    }

    pub fn set_status(&self, session: &str, status: &str) {
        self.state().sessions.get_mut(session).expect("a session").status = status.to_owned();
    }

    /// Lets a session run that no request to this server has started.
    pub fn add(&self, id: &str) {
        let mut state = self.state();
        state.made += 1;
        let session = Session {
            runtime_id: format!("runtime-{:04}", state.made),
            key: format!("key-of-session-{}", state.made),
            status: "running".to_owned(),
            start: Value::Null,
            runs_at: None,
        };
        state.sessions.insert(id.to_owned(), session);
    }

    /// Removes a session, as if it had never existed.
    pub fn forget(&self, session: &str) {
        self.state().sessions.remove(session).expect("a session");
    }

    /// Sets or clears a fault that applies to every request.
    pub fn set_fault(&self, fault: Option<Fault>) {
        self.state().fault = fault;
    }

    /// The next so many requests to the route fail.
    pub fn fail(&self, route: &str, times: usize, fault: Fault) {
        let route = Some(route.to_owned());
        self.state().injected.push(Injected { route, left: times, until: None, fault });
    }

    /// An outage: every request fails for this long.
    pub fn fail_for(&self, time: Duration, fault: Fault) {
        let until = Some(Instant::now() + time);
        self.state().injected.push(Injected { route: None, left: usize::MAX, until, fault });
    }

    /// New and resumed sessions run by themselves after this time.
    pub fn boot_in(&self, time: Duration) {
        self.state().boots_in = Some(time);
    }

    /// All sessions have this key.
    pub fn set_key(&self, key: &str) {
        self.state().key = Some(key.to_owned());
    }

    /// At most so many sessions may start or run at a time.
    pub fn set_cap(&self, cap: usize) {
        self.state().cap = Some(cap);
    }

    /// The sessions that start or run, by id.
    pub fn active(&self) -> Vec<String> {
        let sessions = self.sessions();
        sessions.into_iter().filter(|(_, session)| session.is_active()).map(|(id, _)| id).collect()
    }

    /// The requests to a route so far.
    pub fn requests_to(&self, route: &str) -> Vec<Request> {
        self.state().requests.iter().filter(|request| request.is(route)).cloned().collect()
    }

    /// The number of requests so far.
    pub fn requests(&self) -> usize {
        self.state().requests.len()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the stand-in's state")
    }
}

async fn respond(request: Request, state: Arc<Mutex<State>>) -> Result<Response, Cut> {
    let fault = {
        let mut state = state.lock().expect("the stand-in's state");
        state.requests.push(request.clone());
        let injected = state.injected.iter_mut().find_map(|one| one.strikes(&request).then(|| one.fault.clone()));
        injected.or_else(|| state.fault.clone())
    };
    let status = |status: u16| StatusCode::from_u16(status).expect("a status");
    match fault {
        None => Ok(handle(&request, &mut state.lock().expect("the stand-in's state"))),
        Some(Fault::Status(code)) => Ok(raw(status(code), "text/plain", "secret words")),
        Some(Fault::RetryAfter(seconds)) => {
            let mut response = raw(status(429), "text/plain", "secret words");
            response.headers_mut().insert(http::header::RETRY_AFTER, seconds.into());
            Ok(response)
        }
        Some(Fault::StatusAfter(code)) => {
            drop(handle(&request, &mut state.lock().expect("the stand-in's state")));
            Ok(raw(status(code), "text/plain", "secret words"))
        }
        Some(Fault::StatusBefore(delay)) => {
            tokio::spawn(async move {
                tokio::time::sleep(delay).await;
                drop(handle(&request, &mut state.lock().expect("the stand-in's state")));
            });
            Ok(raw(status(504), "text/plain", "secret words"))
        }
        Some(Fault::Garbage) => Ok(raw(StatusCode::OK, "text/html", "<html>secret words")),
        Some(Fault::Hang) => hang().await,
        Some(Fault::Cut) => Err(Cut),
    }
}

fn shown(id: &str, session: &Session, agent_url: &str) -> Value {
    json!({
        "session_id": id,
        "runtime_id": session.runtime_id,
        "session_api_key": session.key,
        "url": agent_url,
        "status": session.status,
        "pod_status": "ready",
    })
}

fn handle(request: &Request, state: &mut State) -> Response {
    let not_found = || answer(StatusCode::NOT_FOUND, &json!({"detail": "Runtime not found"}));
    if request.header("x-api-key") != Some(API_KEY) {
        return answer(StatusCode::UNAUTHORIZED, &json!({"detail": "Invalid API key"}));
    }
    let body = request.json();
    let agent_url = state.agent_url.clone();
    let now = Instant::now();
    for session in state.sessions.values_mut().filter(|session| session.status == "starting") {
        if session.runs_at.is_some_and(|runs_at| now >= runs_at) {
            session.status = "running".to_owned();
        }
    }
    let is_full = state.cap.is_some_and(|cap| state.sessions.values().filter(|one| one.is_active()).count() >= cap);
    let full = || answer(StatusCode::TOO_MANY_REQUESTS, &json!({"detail": "No capacity"}));
    let runs_at = state.boots_in.map(|time| now + time);
    match (request.method.as_str(), &request.segments()[..]) {
        ("POST", ["start"]) => {
            let id = body["session_id"].as_str().expect("a session id").to_owned();
            if is_full {
                return full();
            }
            state.made += 1;
            let session = Session {
                runtime_id: format!("runtime-{:04}", state.made),
                key: state.key.clone().unwrap_or_else(|| format!("key-of-session-{}", state.made)),
                status: state.begins_as.clone(),
                start: body,
                runs_at,
            };
            state.sessions.insert(id.clone(), session.clone());
            answer(StatusCode::OK, &shown(&id, &session, &agent_url))
        }
        ("GET", ["list"]) => {
            let active = state.sessions.iter().filter(|(_, session)| session.status != "stopped");
            let runtimes: Vec<Value> = active.map(|(id, session)| shown(id, session, &agent_url)).collect();
            answer(StatusCode::OK, &json!({"runtimes": runtimes}))
        }
        ("GET", ["sessions", "batch"]) => {
            let ids = request.query_values("ids");
            let found: Vec<Value> = ids
                .iter()
                .map(|id| state.sessions.get(id).map_or(Value::Null, |session| shown(id, session, &agent_url)))
                .collect();
            answer(StatusCode::OK, &json!(found))
        }
        ("GET", ["sessions", id]) => match state.sessions.get(*id) {
            Some(session) => answer(StatusCode::OK, &shown(id, session, &agent_url)),
            None => not_found(),
        },
        ("POST", [change @ ("pause" | "resume" | "stop")]) => {
            let found = state.sessions.values_mut().find(|session| json!(session.runtime_id) == body["runtime_id"]);
            let Some(session) = found else { return not_found() };
            if *change == "resume" && !session.is_active() && is_full {
                return full();
            }
            session.runs_at = runs_at;
            session.status = match *change {
                "pause" => "paused",
                "resume" if runs_at.is_some() => "starting",
                "resume" => "running",
                _ => "stopped",
            }
            .to_owned();
            answer(StatusCode::OK, &json!({"status": "success"}))
        }
        _ => answer(StatusCode::NOT_FOUND, &json!({"detail": "Not Found"})),
    }
}
