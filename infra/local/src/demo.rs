//! `cargo local --demo`: a script in this process replaces the language model, so that the whole product can be tried without an API
//! key. The script's answers state that they are scripted.
//!
//! Everything else is real: the agent server, its sandbox, the command that the agent runs.

use std::time::{Duration, Instant};

use axum::routing::{get, post};
use axum::{Json, Router};
use http::StatusCode;
use reqwest::RequestBuilder;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Map, Value, json};

use crate::scripted_llm::{self, Reply, answer, is_title_request, text_of};

/// The folder in the data folder that holds the records of demos, separate from those of real conversations.
pub const FOLDER: &str = "demo";
/// The path of the script on this server.
const PATH: &str = "/demo/llm/v1";
/// The title of every conversation.
const TITLE: &str = "Demo: a script answers";
/// The user's message in the conversation that the terminal shows.
const MESSAGE: &str = "Say hello";
const POLL_INTERVAL: Duration = Duration::from_millis(300);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(180);
/// The number of characters of a message that an answer quotes.
const QUOTED_CHARS: usize = 200;
const COMMAND: &str = "echo 'Written by an agent that follows a script.' > hello.txt && ls -l && cat hello.txt";

/// The user's settings with the script as the model.
#[must_use]
pub fn settings(base: &str) -> Map<String, Value> {
    let settings = [
        ("llm_model", "openai/scripted-demo".to_owned()),
        ("llm_api_key", "none-needed".to_owned()),
        ("llm_base_url", format!("{base}{PATH}")),
    ];
    settings.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()
}

/// Serves the script with OpenAI's API.
pub fn router() -> Router {
    Router::new().route(&format!("{PATH}/models"), get(async || Json(scripted_llm::models()))).route(
        &format!("{PATH}/chat/completions"),
        post(async |Json(request): Json<Value>| match next_reply(&request) {
            Some(reply) => answer(&request, reply).await,
            None => scripted_llm::failure(StatusCode::BAD_REQUEST, "messages is missing"),
        }),
    )
}

/// The script's next reply, derived from the messages alone: a command for each user message, then a final text.
fn next_reply(request: &Value) -> Option<Reply> {
    let messages = request["messages"].as_array()?;
    if is_title_request(request) {
        return Some(Reply::text(TITLE));
    }
    let from_user = messages.iter().rposition(|message| message["role"] == "user");
    let (message, since) = match from_user {
        Some(index) => (text_of(&messages[index]["content"]), &messages[index + 1..]),
        None => (String::new(), &messages[..]),
    };
    let has_run = since.iter().any(|message| message["role"] == "tool");
    let can_run = request["tools"]
        .as_array()
        .is_some_and(|tools| tools.iter().any(|tool| tool["function"]["name"] == "terminal"));
    Some(if can_run && !has_run {
        Reply::tool_call("terminal", json!({"command": COMMAND, "security_risk": "LOW"}))
    } else {
        Reply::text(final_text(&message))
    })
}

fn final_text(message: &str) -> String {
    let message = message.trim();
    let mut quoted: String = message.chars().take(QUOTED_CHARS).collect();
    if quoted.len() < message.len() {
        quoted.push('…');
    }
    format!(
        "This is a demo: a script wrote this answer, without a language model. You said: “{quoted}”\n\n\
         The rest is real. Your conversation runs in its own sandbox with an agent server, and the agent just ran a command \
         there that wrote hello.txt. (The script runs the same command for every message.) You can rename this conversation, \
         download it, pause its sandbox and delete it, as with a model.\n\n\
         To use a language model, stop this server and run: LLM_MODEL=anthropic/claude-sonnet-4-5 LLM_API_KEY=… cargo local --ui"
    )
}

/// Why a demo did not finish. Each message is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// A request to this server failed.
    #[error("The demo's request failed: {}.", .0.to_string().trim_end_matches('.'))]
    Request(#[from] reqwest::Error),
    /// The start ended in ERROR. Holds its detail.
    #[error("The demo's conversation did not start: {0}")]
    Start(String),
    /// The agent's answer did not arrive within the time limit.
    #[error("The demo's agent did not answer within {} seconds.", ANSWER_TIMEOUT.as_secs())]
    Silent,
}

/// Starts a conversation through the API, as a client does, and prints its progress and its messages.
///
/// # Errors
/// See [`ShowError`].
pub async fn show(base: &str, key: Option<&SecretString>) -> Result<(), ShowError> {
    #[expect(clippy::disallowed_methods, reason = "it is an ordinary client of a server that keeps connections open")]
    let http = reqwest::Client::builder().no_proxy().build()?;
    let api = format!("{base}/api/v1");
    let send = async |request: RequestBuilder| {
        let request = match key {
            Some(key) => request.header("X-Session-API-Key", key.expose_secret()),
            None => request,
        };
        request.send().await?.error_for_status()?.json::<Value>().await
    };

    println!("You: {MESSAGE}");
    let body = json!({"initial_message": {"content": [{"type": "text", "text": MESSAGE}]}});
    let mut task = send(http.post(format!("{api}/app-conversations")).json(&body)).await?;
    let mut status = String::new();
    loop {
        let now = task["status"].as_str().unwrap_or_default();
        if now != status {
            println!("Start: {now}");
            now.clone_into(&mut status);
        }
        match now {
            "READY" => break,
            "ERROR" => return Err(ShowError::Start(text_of(&task["detail"]))),
            _ => tokio::time::sleep(POLL_INTERVAL).await,
        }
        let id = text_of(&task["id"]);
        task = send(http.get(format!("{api}/app-conversations/start-tasks?ids={id}"))).await?[0].take();
    }

    let id = text_of(&task["app_conversation_id"]);
    let mut shown = 0;
    let started_at = Instant::now();
    loop {
        let page = send(http.get(format!("{api}/conversation/{id}/events/search?limit=100"))).await?;
        let events = page["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        for event in events.iter().skip(shown) {
            if let Some(line) = line_of(event) {
                println!("{line}");
            }
        }
        shown = shown.max(events.len());
        if events.iter().any(is_answer) {
            break;
        }
        if started_at.elapsed() > ANSWER_TIMEOUT {
            return Err(ShowError::Silent);
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
    println!(
        "\nThe conversation is complete. You can still use it:\n  \
         curl '{api}/app-conversations/search'\n  curl -OJ '{api}/app-conversations/{id}/download'\n\
         Ctrl-C stops the server."
    );
    Ok(())
}

/// The line that is printed for an event; none for events that do not interest a user.
fn line_of(event: &Value) -> Option<String> {
    match event["kind"].as_str()? {
        "ActionEvent" => Some(format!("The agent runs: {}", event["action"]["command"].as_str()?)),
        "ObservationEvent" => {
            let text = text_of(&event["observation"]["content"]);
            Some(format!("  {}", text.trim().replace('\n', "\n  ")))
        }
        "MessageEvent" if is_answer(event) => Some(format!("Agent: {}", text_of(&event["llm_message"]["content"]))),
        _ => None,
    }
}

fn is_answer(event: &Value) -> bool {
    event["kind"] == "MessageEvent" && event["source"] == "agent"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(reply: Option<Reply>) -> String {
        match reply {
            Some(Reply::Text(text)) => text,
            other => panic!("{other:?} is no text"),
        }
    }

    #[test]
    fn each_message_gets_a_command_and_then_an_answer_that_says_that_it_is_scripted() {
        let tools = json!([{"type": "function", "function": {"name": "terminal"}}]);
        let user = json!({"role": "user", "content": [{"type": "text", "text": "Say hello"}]});
        let call = json!({"role": "assistant", "tool_calls": []});
        let ran = json!({"role": "tool", "content": "hello"});
        let with = |messages: &[&Value]| next_reply(&json!({"tools": tools, "messages": messages}));
        for before in [&[][..], &[&user, &call, &ran, &call][..]] {
            let first = with(&[before, &[&user]].concat());
            assert!(matches!(first, Some(Reply::ToolCall { ref name, .. }) if name == "terminal"), "{first:?}");
            let last = text(with(&[before, &[&user, &call, &ran]].concat()));
            assert!(last.contains("a script wrote this answer") && last.contains("“Say hello”"), "{last}");
        }
        // An agent without the tool, such as a planning agent.
        text(next_reply(&json!({"messages": [user]})));
        assert!(next_reply(&json!({})).is_none());
    }

    #[test]
    fn long_messages_are_quoted_in_part() {
        let answer = final_text(&"é".repeat(QUOTED_CHARS + 1));
        assert!(answer.contains(&format!("“{}…”", "é".repeat(QUOTED_CHARS))));
    }

    #[test]
    fn a_request_for_a_title_is_recognized() {
        let system = json!({"role": "system", "content": "You write titles for conversations."});
        assert_eq!(text(next_reply(&json!({"messages": [system]}))), TITLE);
    }
}
