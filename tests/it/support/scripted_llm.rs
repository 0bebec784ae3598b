//! A stub language model that replies from a script, over OpenAI's chat completions API as the agent server uses it
//! (model `openai/<name>`, base URL [`ScriptedLlm::base_url`]).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::response::Response;
use http::{Method, StatusCode};
pub use local::scripted_llm::{COMPLETION_TOKENS, PROMPT_TOKENS, Reply};
use local::scripted_llm::{answer, failure, is_title_request, models};
use serde_json::Value;

use super::server::{self, Cut, Request, Server};

/// The reply after the end of the script.
pub const DEFAULT_TEXT: &str = "All done.";
/// The title until another one is set.
pub const DEFAULT_TITLE: &str = "✅ Scripted title";
#[derive(Debug, Default)]
struct State {
    script: VecDeque<Reply>,
    title: Option<String>,
    requests: Vec<Value>,
    keys: Vec<String>,
    title_requests: Vec<Value>,
}

/// The server. Dropping it closes its port.
#[derive(Debug)]
pub struct ScriptedLlm {
    server: Server,
    state: Arc<Mutex<State>>,
}

impl ScriptedLlm {
    /// Starts with an empty script: the reply to every request is [`DEFAULT_TEXT`].
    pub async fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        let server = Server::start(move |request| handle(request, Arc::clone(&shared))).await;
        Self { server, state }
    }

    /// The `base_url` for clients: it ends in `/v1`.
    pub fn base_url(&self) -> String {
        format!("{}/v1", self.server.url())
    }

    /// Appends to the script. Each request consumes one reply, except requests for a title.
    pub fn reply_with(&self, replies: Vec<Reply>) {
        self.state().script.extend(replies);
    }

    /// Sets the reply to requests for a title.
    pub fn set_title(&self, title: impl Into<String>) {
        self.state().title = Some(title.into());
    }

    /// The bodies of the requests so far, without those for a title.
    pub fn requests(&self) -> Vec<Value> {
        self.state().requests.clone()
    }

    /// The keys that the requests so far had, in the order of [`Self::requests`].
    pub fn keys(&self) -> Vec<String> {
        self.state().keys.clone()
    }

    /// The bodies of the requests for a title so far.
    pub fn title_requests(&self) -> Vec<Value> {
        self.state().title_requests.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the script")
    }
}

async fn handle(request: Request, state: Arc<Mutex<State>>) -> Result<Response, Cut> {
    Ok(match (&request.method, request.path.as_str()) {
        (&Method::GET, "/v1/models") => server::json(StatusCode::OK, &models()),
        (&Method::POST, "/v1/chat/completions") => {
            let body = request.json();
            if !body["messages"].is_array() {
                return Ok(failure(StatusCode::BAD_REQUEST, "messages is missing"));
            }
            let key = request.header("authorization").unwrap_or_default();
            let key = key.strip_prefix("Bearer ").unwrap_or(key).to_owned();
            let reply = next_reply(&body, key, &mut state.lock().expect("the script"));
            answer(&body, reply).await
        }
        _ => failure(StatusCode::NOT_FOUND, "no such route"),
    })
}

fn next_reply(body: &Value, key: String, state: &mut State) -> Reply {
    if is_title_request(body) {
        state.title_requests.push(body.clone());
        return Reply::text(state.title.as_deref().unwrap_or(DEFAULT_TITLE));
    }
    state.requests.push(body.clone());
    state.keys.push(key);
    state.script.pop_front().unwrap_or_else(|| Reply::text(DEFAULT_TEXT))
}
