//! `/api/v1/app-conversations/{conversation_id}/…`: what is inside a conversation's sandbox. `skills`, `hooks`, `file`, `files`,
//! `git/changes`, `git/diff`, and `send-message` to the agent.
//!
//! Each of them asks the agent server, within one budget, and says what is the matter when it does not answer.

mod file;
mod files;
mod git;
mod hooks;
mod message;
mod skills;

use std::time::Duration;

use axum::Router;
use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, Path};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use http::StatusCode;
use serde_json::json;
use shared::agent_server::{AgentServerError, Failure, Mistake};
use shared::aws::Aws;
use shared::config::Config;
use shared::conversation::workspace::{Workspace, WorkspaceLocator, WorkspaceLookup};
use shared::error::{Error, Result};
use shared::http::pydantic::validation;
use shared::http_client::HttpClient;
use shared::id;
use shared::sandbox::SandboxStatus;
use shared::stores::Stores;
use shared::user::seal::Sealer;
use uuid::Uuid;

/// A message may hold images.
const BODY_LIMIT: usize = 5 * 1024 * 1024;

/// What this function may touch: it reads conversations and sandboxes, and asks agent servers.
#[derive(Clone, Debug)]
pub struct Context {
    places: WorkspaceLocator,
    budget: Duration,
}

impl Context {
    /// A context on the configured tables and sandboxes.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let stores = Stores::new(&config.names, aws, sealer);
        let sandboxes = stores.sandbox_service(&config.sandbox);
        let http = HttpClient::new(config.address_policy);
        let places = WorkspaceLocator::new(stores.conversations(), sandboxes, http);
        Self::with_locator(places, config.sandbox_request_budget)
    }

    /// A context that finds conversations in these places; each request has `budget` for what it asks of them.
    #[must_use]
    pub fn with_locator(places: WorkspaceLocator, budget: Duration) -> Self {
        Self { places, budget }
    }

    /// What is asked of an agent server within a request's budget.
    async fn within<T>(&self, asked: impl Future<Output = Result<T, AgentServerError>>) -> Result<T, AgentServerError> {
        tokio::time::timeout(self.budget, asked).await.unwrap_or_else(|_| {
            Err(AgentServerError { request: "all requests together".to_owned(), failure: Failure::TimedOut })
        })
    }
}

/// The routes of this function.
pub fn router(context: Context) -> Router {
    let of = |route: &str| format!("/api/v1/app-conversations/{{conversation_id}}/{route}");
    Router::new()
        .route(&of("skills"), get(skills::skills))
        .route(&of("hooks"), get(hooks::hooks))
        .route(&of("file"), get(file::file))
        .route(&of("files"), get(files::files))
        .route(&of("git/changes"), get(git::changes))
        .route(&of("git/diff"), get(git::diff))
        .route(&of("send-message"), post(message::send))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(context)
}

type ConversationPath = std::result::Result<Path<String>, PathRejection>;

/// The conversation that a path names.
fn conversation(path: ConversationPath) -> Result<Uuid> {
    // A path that is not UTF-8 is no UUID either.
    let text = path.map_or_else(|_| char::REPLACEMENT_CHARACTER.into(), |Path(text)| text);
    validation::path_uuid("conversation_id", &text).map_err(Error::Invalid)
}

/// How the older of these routes tell what is the matter: `{"error": …}`.
fn legacy_error(status: StatusCode, error: impl Into<String>) -> Response {
    (status, axum::Json(json!({"error": error.into()}))).into_response()
}

/// The inside of the conversation's sandbox, or what those older routes answer where there is none; `paused` is their answer of a
/// paused sandbox.
fn workspace_or_legacy_error(
    place: WorkspaceLookup,
    conversation: Uuid,
    paused: impl FnOnce() -> Response,
) -> std::result::Result<Box<Workspace>, Box<Response>> {
    let id = id::dashed(conversation);
    let missing = |error: String| Err(Box::new(legacy_error(StatusCode::NOT_FOUND, error)));
    match place {
        WorkspaceLookup::NoConversation => missing(format!("Conversation {id} not found")),
        WorkspaceLookup::NoSandbox => missing(format!("Sandbox not found for conversation {id}")),
        WorkspaceLookup::NotRunning(sandbox) if sandbox.status == SandboxStatus::Paused => Err(Box::new(paused())),
        WorkspaceLookup::NotRunning(_) => missing(format!("Sandbox not ready for conversation {id}")),
        WorkspaceLookup::NoAddresses => missing("No agent server URL found for sandbox".to_owned()),
        WorkspaceLookup::NoAgentServer => missing("Agent server URL not found in sandbox".to_owned()),
        WorkspaceLookup::Found(inside) => Ok(inside),
    }
}

/// The inside of the conversation's sandbox, or what the newer routes answer where there is none.
fn inside(place: WorkspaceLookup, conversation: Uuid) -> Result<Box<Workspace>> {
    let id = id::dashed(conversation);
    match place {
        WorkspaceLookup::NoConversation => Err(Error::NotFound(format!("Conversation {id} not found"))),
        WorkspaceLookup::NoSandbox => Err(Error::NotFound(format!("Sandbox not found for conversation {id}"))),
        WorkspaceLookup::NotRunning(sandbox) => {
            let resume = format!("POST /api/v1/sandboxes/{}/resume", sandbox.id);
            Err(match sandbox.status {
                SandboxStatus::Paused => {
                    Error::Conflict(format!("The sandbox of conversation {id} is paused; {resume} resumes it"))
                }
                SandboxStatus::Starting => {
                    Error::Conflict(format!("The sandbox of conversation {id} is starting; try again in a few seconds"))
                }
                SandboxStatus::Missing => Error::Gone(format!("The sandbox of conversation {id} is gone")),
                SandboxStatus::Error | SandboxStatus::Running => {
                    Error::Unavailable(format!("The sandbox of conversation {id} has failed"))
                }
            })
        }
        WorkspaceLookup::NoAddresses | WorkspaceLookup::NoAgentServer => {
            Err(Error::Unavailable(format!("The sandbox of conversation {id} has no agent server")))
        }
        WorkspaceLookup::Found(inside) => Ok(inside),
    }
}

/// What the newer routes answer when an agent server did not. Its own words are for the log; of a known cause there is our advice.
fn upstream(error: &AgentServerError) -> Error {
    let mut message = match &error.failure {
        Failure::Unreachable => "The agent server cannot be reached".to_owned(),
        Failure::TimedOut => "The agent server did not answer in time".to_owned(),
        Failure::CutOff => "The agent server's answer was cut off".to_owned(),
        Failure::Status(status, _) => format!("The agent server answered {}", status.as_u16()),
        Failure::Malformed(_) => "The agent server's answer makes no sense".to_owned(),
        Failure::TooLarge(_) => "The agent server's answer is too large".to_owned(),
    };
    if let Some(Mistake { advice, .. }) = error.mistake() {
        message += &format!(". {advice}");
    }
    Error::Upstream { message, context: error.to_string() }
}
