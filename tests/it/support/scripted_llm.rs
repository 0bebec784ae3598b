//! A language model that says what it is told: OpenAI's chat completions as the agent server
//! uses them (model `openai/<name>`, base URL [`ScriptedLlm::base_url`]).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::response::Response;
use http::{Method, StatusCode};
use serde_json::{Value, json};
use uuid::Uuid;

use super::server::{self, Cut, Request, Server};

/// One answer of the model.
#[derive(Clone, Debug)]
pub enum Reply {
    /// Says something and calls no tool, which ends the agent's turn as `finished`.
    Text(String),
    /// Calls a tool, such as `terminal` with `{"command": "pwd"}`; the agent then asks again.
    ToolCall { name: String, arguments: Value },
    /// Fails with this status. The agent server retries 429 and 5xx, at least 8 s apart by
    /// default, and ends the conversation as `error` on any other.
    Status(u16),
    /// The other reply, after a while: keeps the conversation `running`.
    After(Duration, Box<Reply>),
}

impl Reply {
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    pub fn tool_call(name: impl Into<String>, arguments: Value) -> Self {
        Self::ToolCall { name: name.into(), arguments }
    }

    pub fn after(self, delay: Duration) -> Self {
        Self::After(delay, Box::new(self))
    }
}

/// What it says when the script has run out.
pub const DEFAULT_TEXT: &str = "All done.";
/// The title it gives unless told another.
pub const DEFAULT_TITLE: &str = "✅ Scripted title";
/// The usage each answer reports.
pub const PROMPT_TOKENS: u64 = 100;
pub const COMPLETION_TOKENS: u64 = 20;

#[derive(Debug, Default)]
struct State {
    script: VecDeque<Reply>,
    title: Option<String>,
    requests: Vec<Value>,
    title_requests: Vec<Value>,
}

/// The server. Gone when dropped.
#[derive(Debug)]
pub struct ScriptedLlm {
    server: Server,
    state: Arc<Mutex<State>>,
}

impl ScriptedLlm {
    /// Starts with an empty script: every request is answered with [`DEFAULT_TEXT`].
    pub async fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        let server = Server::start(move |request| handle(request, Arc::clone(&shared))).await;
        Self { server, state }
    }

    /// The `base_url` to give to the client: ends in `/v1`.
    pub fn base_url(&self) -> String {
        format!("{}/v1", self.server.url())
    }

    /// Appends to the script. Each request takes one reply; requests for a title take none.
    pub fn reply_with(&self, replies: Vec<Reply>) {
        self.state().script.extend(replies);
    }

    /// The title to answer requests for a title with.
    pub fn set_title(&self, title: impl Into<String>) {
        self.state().title = Some(title.into());
    }

    /// The bodies of the requests so far, without those for a title.
    pub fn requests(&self) -> Vec<Value> {
        self.state().requests.clone()
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
        (&Method::GET, "/v1/models") => {
            let models = [json!({"id": "scripted", "object": "model", "created": 0, "owned_by": "tests"})];
            server::json(StatusCode::OK, &json!({"object": "list", "data": models}))
        }
        (&Method::POST, "/v1/chat/completions") => {
            let body = request.json();
            if !body["messages"].is_array() {
                return Ok(failure(StatusCode::BAD_REQUEST, "messages is missing"));
            }
            let mut reply = next_reply(&body, &mut state.lock().expect("the script"));
            while let Reply::After(delay, later) = reply {
                tokio::time::sleep(delay).await;
                reply = *later;
            }
            complete(&body, reply)
        }
        _ => failure(StatusCode::NOT_FOUND, "no such route"),
    })
}

fn next_reply(body: &Value, state: &mut State) -> Reply {
    if asks_for_title(body) {
        state.title_requests.push(body.clone());
        return Reply::text(state.title.as_deref().unwrap_or(DEFAULT_TITLE));
    }
    state.requests.push(body.clone());
    state.script.pop_front().unwrap_or_else(|| Reply::text(DEFAULT_TEXT))
}

/// The agent server asks for titles with a system prompt of its own and without tools.
fn asks_for_title(body: &Value) -> bool {
    let system = &body["messages"][0];
    let tools = body["tools"].as_array().is_some_and(|tools| !tools.is_empty());
    system["role"] == "system" && !tools && text_of(&system["content"]).contains("titles for conversations")
}

/// A message's text, given as a string or as parts.
fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        _ => String::new(),
    }
}

fn failure(status: StatusCode, message: &str) -> Response {
    let error = json!({"message": message, "type": "scripted", "param": null, "code": status.as_u16()});
    server::json(status, &json!({"error": error}))
}

fn complete(request: &Value, reply: Reply) -> Response {
    let (message, finish_reason) = match reply {
        Reply::Text(text) => (json!({"role": "assistant", "content": text}), "stop"),
        Reply::ToolCall { name, arguments } => {
            let call = json!({
                "id": format!("call_{}", Uuid::new_v4().simple()),
                "type": "function",
                "function": {"name": name, "arguments": arguments.to_string()},
            });
            (json!({"role": "assistant", "content": null, "tool_calls": [call]}), "tool_calls")
        }
        Reply::Status(status) => {
            let status = StatusCode::from_u16(status).expect("a status code");
            return failure(status, "scripted failure");
        }
        Reply::After(..) => unreachable!("waited for already"),
    };
    let head = |object: &str| {
        json!({
            "id": format!("chatcmpl-{}", Uuid::new_v4().simple()),
            "object": object,
            "created": jiff::Timestamp::now().as_second(),
            "model": request["model"],
        })
    };
    let usage = json!({
        "prompt_tokens": PROMPT_TOKENS,
        "completion_tokens": COMPLETION_TOKENS,
        "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
    });
    if request["stream"] != true {
        let mut answer = head("chat.completion");
        answer["choices"] = json!([{"index": 0, "message": message, "finish_reason": finish_reason}]);
        answer["usage"] = usage;
        return server::json(StatusCode::OK, &answer);
    }
    let chunk = head("chat.completion.chunk");
    let mut delta = message;
    if let Some(call) = delta.pointer_mut("/tool_calls/0") {
        call["index"] = json!(0);
    }
    let mut events = String::new();
    for (choices, usage) in [
        (json!([{"index": 0, "delta": delta, "finish_reason": null}]), Value::Null),
        (json!([{"index": 0, "delta": {}, "finish_reason": finish_reason}]), Value::Null),
        (json!([]), usage),
    ] {
        let mut event = chunk.clone();
        event["choices"] = choices;
        event["usage"] = usage;
        events.push_str(&format!("data: {event}\n\n"));
    }
    events.push_str("data: [DONE]\n\n");
    server::raw(StatusCode::OK, "text/event-stream", events)
}
