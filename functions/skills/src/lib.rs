//! `/api/v1/app-conversations/{conversation_id}/…`: the workspace of a conversation, inside its sandbox. The routes are `skills`, `hooks`,
//! `file`, `files`, `git/changes` and `git/diff`, and `send-message` to the agent.
//!
//! Each of them queries the agent server, within one budget of time, and reports why when the agent server does not respond.

mod file;
mod files;
mod git;
mod hooks;
mod message;
mod skills;

use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use http::StatusCode;
use serde::Serialize;
use shared::agent_server::{AgentServerError, Failure, Mistake};
use shared::aws::Aws;
use shared::config::Config;
use shared::conversation::workspace::{Workspace, WorkspaceLocator, WorkspaceLookup};
use shared::error::{Error, Result};
use shared::http_client::HttpClient;
use shared::id;
use shared::sandbox::SandboxStatus;
use shared::stores::Stores;
use shared::user::seal::Sealer;
use uuid::Uuid;

pub use crate::hooks::HooksOut;
pub use crate::message::MessageSentOut;
pub use crate::skills::SkillsOut;

/// The largest body, in bytes: a message may hold images.
const BODY_LIMIT: usize = 5 * 1024 * 1024;

/// What this function can access: it reads conversations and sandboxes, and queries agent servers.
#[derive(Clone, Debug)]
pub struct Context {
    locator: WorkspaceLocator,
    budget: Duration,
}

impl Context {
    /// A context on the configured tables and sandboxes.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let stores = Stores::new(&config.names, aws, sealer);
        let sandboxes = stores.sandbox_viewer(&config.sandbox);
        let http = HttpClient::new(config.address_policy);
        let locator = WorkspaceLocator::new(stores.conversations(), sandboxes, http);
        Self::with_locator(locator, config.sandbox_request_budget)
    }

    /// A context that finds workspaces with this locator. `budget` limits the total time of a request's calls to an agent server.
    #[must_use]
    pub fn with_locator(locator: WorkspaceLocator, budget: Duration) -> Self {
        Self { locator, budget }
    }

    /// Runs calls to an agent server within the budget.
    async fn within<T>(&self, calls: impl Future<Output = Result<T, AgentServerError>>) -> Result<T, AgentServerError> {
        tokio::time::timeout(self.budget, calls).await.unwrap_or_else(|_| {
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

/// The body of an error response of `skills` and `hooks`. The contract has this form for them; all other routes use `detail`.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = LegacyError))]
pub struct LegacyErrorOut {
    error: String,
}

fn legacy_error(status: StatusCode, error: impl Into<String>) -> Response {
    (status, axum::Json(LegacyErrorOut { error: error.into() })).into_response()
}

/// Returns the conversation's workspace or the legacy error for its state. `paused` makes the response for a paused sandbox.
fn workspace_or_legacy_error(
    lookup: WorkspaceLookup,
    conversation: Uuid,
    paused: impl FnOnce() -> Response,
) -> std::result::Result<Box<Workspace>, Box<Response>> {
    let id = id::dashed(conversation);
    let missing = |error: String| Err(Box::new(legacy_error(StatusCode::NOT_FOUND, error)));
    match lookup {
        WorkspaceLookup::NoConversation => missing(format!("Conversation {id} not found")),
        WorkspaceLookup::NoSandbox => missing(format!("Sandbox not found for conversation {id}")),
        WorkspaceLookup::NotRunning(sandbox) if sandbox.status == SandboxStatus::Paused => Err(Box::new(paused())),
        WorkspaceLookup::NotRunning(_) => missing(format!("Sandbox not ready for conversation {id}")),
        WorkspaceLookup::NoAddresses => missing("No agent server URL found for sandbox".to_owned()),
        WorkspaceLookup::NoAgentServer => missing("Agent server URL not found in sandbox".to_owned()),
        WorkspaceLookup::Found(workspace) => Ok(workspace),
    }
}

/// Returns the conversation's workspace or the error for its state.
fn workspace_or_error(lookup: WorkspaceLookup, conversation: Uuid) -> Result<Box<Workspace>> {
    let id = id::dashed(conversation);
    match lookup {
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
                SandboxStatus::Missing => {
                    Error::Gone(format!("The sandbox of conversation {id} no longer exists; start a new conversation"))
                }
                SandboxStatus::Error | SandboxStatus::Running => {
                    Error::Unavailable(format!("The sandbox of conversation {id} has failed; start a new conversation"))
                }
            })
        }
        WorkspaceLookup::NoAddresses | WorkspaceLookup::NoAgentServer => {
            Err(Error::Unavailable(format!("The sandbox of conversation {id} has no agent server; try again later")))
        }
        WorkspaceLookup::Found(workspace) => Ok(workspace),
    }
}

/// The error for an agent server that did not respond as expected. The log gets the agent server's own message; the caller gets our
/// advice, if the cause is known.
fn upstream(error: &AgentServerError) -> Error {
    let mut message = match &error.failure {
        Failure::Unreachable => "The agent server cannot be reached".to_owned(),
        Failure::TimedOut => "The agent server did not respond in time".to_owned(),
        Failure::CutOff => "The agent server's response was cut off".to_owned(),
        Failure::Status(status, _) => format!("The agent server returned status {}", status.as_u16()),
        Failure::Malformed(_) => "The agent server returned an invalid response".to_owned(),
        Failure::TooLarge(_) => "The agent server's response is too large".to_owned(),
    };
    if let Some(Mistake { advice, .. }) = error.mistake() {
        message += &format!(". {advice}");
    }
    Error::Upstream { message, context: error.to_string() }
}
