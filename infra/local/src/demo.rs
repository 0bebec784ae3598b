//! `cargo local --demo`: agents whose language model is a script in this process. It shows the whole product without a key, and
//! says of itself that it is a script.
//!
//! Everything else is real: the agent server, its sandbox, the command that the agent runs.

use std::time::{Duration, Instant};

use axum::routing::{get, post};
use axum::{Json, Router};
use http::StatusCode;
use reqwest::RequestBuilder;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Map, Value, json};

use crate::scripted_llm::{self, Reply, answer, asks_for_title, text_of};

/// The folder in the data folder where a demo has its records, apart from those of real conversations.
pub const FOLDER: &str = "demo";
/// Where the script is served, below the server's own address.
const PATH: &str = "/demo/llm/v1";
/// The title of every conversation.
const TITLE: &str = "Demo: a script answers";
/// What is said in the conversation that the terminal shows.
const MESSAGE: &str = "Say hello";
const POLL: Duration = Duration::from_millis(300);
const ANSWER_LIMIT: Duration = Duration::from_secs(180);
/// How much of a message is quoted.
const QUOTED: usize = 200;
const COMMAND: &str = "echo 'Written by an agent that follows a script.' > hello.txt && ls -l && cat hello.txt";

/// The user's settings: the script as a model.
#[must_use]
pub fn settings(base: &str) -> Map<String, Value> {
    let settings = [
        ("llm_model", "openai/scripted-demo".to_owned()),
        ("llm_api_key", "none-needed".to_owned()),
        ("llm_base_url", format!("{base}{PATH}")),
    ];
    settings.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect()
}

/// The script as an OpenAI-compatible server.
pub fn router() -> Router {
    Router::new().route(&format!("{PATH}/models"), get(async || Json(scripted_llm::models()))).route(
        &format!("{PATH}/chat/completions"),
        post(async |Json(request): Json<Value>| match next(&request) {
            Some(reply) => answer(&request, reply).await,
            None => scripted_llm::failure(StatusCode::BAD_REQUEST, "messages is missing"),
        }),
    )
}

/// What comes next in the script, told from the messages alone: a command for each message of the user, then the end.
fn next(request: &Value) -> Option<Reply> {
    let messages = request["messages"].as_array()?;
    if asks_for_title(request) {
        return Some(Reply::text(TITLE));
    }
    let from_user = messages.iter().rposition(|message| message["role"] == "user");
    let (said, since) = match from_user {
        Some(place) => (text_of(&messages[place]["content"]), &messages[place + 1..]),
        None => (String::new(), &messages[..]),
    };
    let has_run = since.iter().any(|message| message["role"] == "tool");
    let can_run = request["tools"]
        .as_array()
        .is_some_and(|tools| tools.iter().any(|tool| tool["function"]["name"] == "terminal"));
    Some(if can_run && !has_run {
        Reply::tool_call("terminal", json!({"command": COMMAND, "security_risk": "LOW"}))
    } else {
        Reply::text(farewell(&said))
    })
}

fn farewell(said: &str) -> String {
    let said = said.trim();
    let mut quoted: String = said.chars().take(QUOTED).collect();
    if quoted.len() < said.len() {
        quoted.push('…');
    }
    format!(
        "This is a demo: a script wrote this answer, no language model was asked. You said: “{quoted}”\n\n\
         The rest is real. Your conversation was started in a sandbox of its own, an agent server runs in it, and the agent \
         just ran a command there and wrote hello.txt, whatever you asked for. Rename this conversation, download it, pause \
         its sandbox, delete it: all of that works as it does with a model.\n\n\
         For a real one, end this server and run: LLM_MODEL=anthropic/claude-sonnet-4-5 LLM_API_KEY=… cargo local --ui"
    )
}

/// Why a demo was not shown to its end. Each one reads as a sentence.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// A request to this server.
    #[error("The demo's request failed: {}.", .0.to_string().trim_end_matches('.'))]
    Request(#[from] reqwest::Error),
    /// The start ended in ERROR.
    #[error("The demo's conversation did not start: {0}")]
    Start(String),
    /// Nothing came.
    #[error("The demo's agent did not answer within {} seconds.", ANSWER_LIMIT.as_secs())]
    Silent,
}

/// Starts a conversation over the API, and tells its course as it becomes known: what a client does.
///
/// # Errors
/// It did not come to its end.
pub async fn show(base: &str, key: Option<&SecretString>) -> Result<(), ShowError> {
    #[expect(
        clippy::disallowed_methods,
        reason = "it is a client as others are, of a server that keeps its connections"
    )]
    let http = reqwest::Client::builder().no_proxy().build()?;
    let api = format!("{base}/api/v1");
    let ask = async |request: RequestBuilder| {
        let request = match key {
            Some(key) => request.header("X-Session-API-Key", key.expose_secret()),
            None => request,
        };
        request.send().await?.error_for_status()?.json::<Value>().await
    };

    println!("You: {MESSAGE}");
    let body = json!({"initial_message": {"content": [{"type": "text", "text": MESSAGE}]}});
    let mut task = ask(http.post(format!("{api}/app-conversations")).json(&body)).await?;
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
            _ => tokio::time::sleep(POLL).await,
        }
        let id = text_of(&task["id"]);
        task = ask(http.get(format!("{api}/app-conversations/start-tasks?ids={id}"))).await?[0].take();
    }

    let id = text_of(&task["app_conversation_id"]);
    let mut told = 0;
    let begun = Instant::now();
    loop {
        let page = ask(http.get(format!("{api}/conversation/{id}/events/search?limit=100"))).await?;
        let events = page["items"].as_array().map(Vec::as_slice).unwrap_or_default();
        for event in events.iter().skip(told) {
            if let Some(line) = line_of(event) {
                println!("{line}");
            }
        }
        told = told.max(events.len());
        if events.iter().any(is_answer) {
            break;
        }
        if begun.elapsed() > ANSWER_LIMIT {
            return Err(ShowError::Silent);
        }
        tokio::time::sleep(POLL).await;
    }
    println!(
        "\nThat was a conversation from its start to its answer. It goes on being here:\n  \
         curl '{api}/app-conversations/search'\n  curl -OJ '{api}/app-conversations/{id}/download'\n\
         Ctrl-C ends the server."
    );
    Ok(())
}

/// What a person wants to know of an event.
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
    fn a_command_for_each_message_and_then_an_answer_that_says_what_it_is() {
        let tools = json!([{"type": "function", "function": {"name": "terminal"}}]);
        let user = json!({"role": "user", "content": [{"type": "text", "text": "Say hello"}]});
        let call = json!({"role": "assistant", "tool_calls": []});
        let ran = json!({"role": "tool", "content": "hello"});
        let with = |messages: &[&Value]| next(&json!({"tools": tools, "messages": messages}));
        for before in [&[][..], &[&user, &call, &ran, &call][..]] {
            let first = with(&[before, &[&user]].concat());
            assert!(matches!(first, Some(Reply::ToolCall { ref name, .. }) if name == "terminal"), "{first:?}");
            let last = text(with(&[before, &[&user, &call, &ran]].concat()));
            assert!(last.contains("a script wrote this answer") && last.contains("“Say hello”"), "{last}");
        }
        // An agent without the tool, such as one that plans.
        text(next(&json!({"messages": [user]})));
        assert!(next(&json!({})).is_none());
    }

    #[test]
    fn long_messages_are_quoted_in_part() {
        let answer = farewell(&"é".repeat(QUOTED + 1));
        assert!(answer.contains(&format!("“{}…”", "é".repeat(QUOTED))));
    }

    #[test]
    fn titles_are_asked_for_apart() {
        let system = json!({"role": "system", "content": "You write titles for conversations."});
        assert_eq!(text(next(&json!({"messages": [system]}))), TITLE);
    }
}
