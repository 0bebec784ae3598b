//! A scripted language model for the demo and for tests: serves given replies as OpenAI's chat completions, in the form that the agent
//! server uses (model `openai/<name>`).

use std::time::{Duration, SystemTime};

use axum::Json;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};
use uuid::Uuid;

/// One reply of the model.
#[derive(Clone, Debug)]
pub enum Reply {
    /// A text without a tool call, which ends the agent's turn as `finished`.
    Text(String),
    /// A call of a tool, such as `terminal` with `{"command": "pwd"}`. The agent then sends another request.
    ToolCall { name: String, arguments: Value },
    /// A failure with this status. The agent server retries 429 and 5xx, by default at least 8 s apart, and ends the conversation as
    /// `error` on any other status.
    Status(u16),
    /// The other reply after a delay, which keeps the conversation `running`.
    After(Duration, Box<Reply>),
}

impl Reply {
    pub fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    pub fn tool_call(name: impl Into<String>, arguments: Value) -> Self {
        Self::ToolCall { name: name.into(), arguments }
    }

    /// Delays this reply.
    #[must_use]
    pub fn after(self, delay: Duration) -> Self {
        Self::After(delay, Box::new(self))
    }
}

/// The usage that each reply reports.
pub const PROMPT_TOKENS: u64 = 100;
pub const COMPLETION_TOKENS: u64 = 20;

/// The response with the list of models, which contains one.
#[must_use]
pub fn models() -> Value {
    let models = [json!({"id": "scripted", "object": "model", "created": 0, "owned_by": "openhands-lambda"})];
    json!({"object": "list", "data": models})
}

/// The response to a request for a completion.
pub async fn answer(request: &Value, mut reply: Reply) -> Response {
    loop {
        match reply {
            Reply::After(delay, later) => {
                tokio::time::sleep(delay).await;
                reply = *later;
            }
            Reply::Text(text) => {
                return complete(request, json!({"role": "assistant", "content": text}), "stop");
            }
            Reply::ToolCall { name, arguments } => {
                let call = json!({
                    "id": format!("call_{}", Uuid::new_v4().simple()),
                    "type": "function",
                    "function": {"name": name, "arguments": arguments.to_string()},
                });
                let message = json!({"role": "assistant", "content": null, "tool_calls": [call]});
                return complete(request, message, "tool_calls");
            }
            Reply::Status(status) => {
                let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
                return failure(status, "scripted failure");
            }
        }
    }
}

/// Whether the agent server requests a title: such requests have a special system prompt and no tools.
#[must_use]
pub fn is_title_request(body: &Value) -> bool {
    let system = &body["messages"][0];
    let tools = body["tools"].as_array().is_some_and(|tools| !tools.is_empty());
    system["role"] == "system" && !tools && text_of(&system["content"]).contains("titles for conversations")
}

/// The text of a message's content, which is a string or a list of parts.
#[must_use]
pub fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        _ => String::new(),
    }
}

/// An error response in OpenAI's format.
#[must_use]
pub fn failure(status: StatusCode, message: &str) -> Response {
    let error = json!({"message": message, "type": "scripted", "param": null, "code": status.as_u16()});
    (status, Json(json!({"error": error}))).into_response()
}

fn complete(request: &Value, message: Value, finish_reason: &str) -> Response {
    let head = |object: &str| {
        json!({
            "id": format!("chatcmpl-{}", Uuid::new_v4().simple()),
            "object": object,
            "created": SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs(),
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
        return Json(answer).into_response();
    }
    let chunk = head("chat.completion.chunk");
    let mut delta = message;
    if let Some(call) = delta.pointer_mut("/tool_calls/0") {
        call["index"] = json!(0);
    }
    let deltas = deltas(delta)
        .into_iter()
        .map(|delta| (json!([{"index": 0, "delta": delta, "finish_reason": null}]), Value::Null));
    let end = [(json!([{"index": 0, "delta": {}, "finish_reason": finish_reason}]), Value::Null), (json!([]), usage)];
    let mut events = String::new();
    for (choices, usage) in deltas.chain(end) {
        let mut event = chunk.clone();
        event["choices"] = choices;
        event["usage"] = usage;
        events.push_str(&format!("data: {event}\n\n"));
    }
    events.push_str("data: [DONE]\n\n");
    ([(CONTENT_TYPE, "text/event-stream")], events).into_response()
}

/// The deltas in which a message is streamed: a text word by word, anything else in one piece.
fn deltas(message: Value) -> Vec<Value> {
    match message["content"].as_str() {
        Some(text) if !text.is_empty() => {
            text.split_inclusive(' ').map(|word| json!({"role": "assistant", "content": word})).collect()
        }
        _ => vec![message],
    }
}
