//! A stub server for the runtime API of remote sandboxes: sessions that start, run, pause and stop, in the contract's
//! format.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

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
}

/// A fault that applies to every request.
#[derive(Clone, Debug)]
pub enum Fault {
    Status(u16),
    Garbage,
    Hang,
    Cut,
}

#[derive(Debug, Default)]
struct State {
    sessions: BTreeMap<String, Session>,
    agent_url: String,
    begins_as: String,
    fault: Option<Fault>,
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

    /// Removes a session, as if it had never existed.
    pub fn forget(&self, session: &str) {
        self.state().sessions.remove(session).expect("a session");
    }

    pub fn set_fault(&self, fault: Option<Fault>) {
        self.state().fault = fault;
    }

    /// The requests to a route so far.
    pub fn requests_to(&self, route: &str) -> Vec<Request> {
        self.state().requests.iter().filter(|request| request.is(route)).cloned().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the stand-in's state")
    }
}

async fn respond(request: Request, state: Arc<Mutex<State>>) -> Result<Response, Cut> {
    let fault = {
        let mut state = state.lock().expect("the stand-in's state");
        state.requests.push(request.clone());
        state.fault.clone()
    };
    match fault {
        None => Ok(handle(&request, &mut state.lock().expect("the stand-in's state"))),
        Some(Fault::Status(status)) => {
            Ok(raw(StatusCode::from_u16(status).expect("a status"), "text/plain", "secret words"))
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
    match (request.method.as_str(), &request.segments()[..]) {
        ("POST", ["start"]) => {
            let id = body["session_id"].as_str().expect("a session id").to_owned();
            state.made += 1;
            let session = Session {
                runtime_id: format!("runtime-{:04}", state.made),
                key: format!("key-of-session-{}", state.made),
                status: state.begins_as.clone(),
                start: body,
            };
            state.sessions.insert(id.clone(), session.clone());
            answer(StatusCode::OK, &shown(&id, &session, &agent_url))
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
            session.status = match *change {
                "pause" => "paused",
                "resume" => "running",
                _ => "stopped",
            }
            .to_owned();
            answer(StatusCode::OK, &json!({"status": "success"}))
        }
        _ => answer(StatusCode::NOT_FOUND, &json!({"detail": "Not Found"})),
    }
}
