//! Switches a running conversation to another model: that of a profile (`switch_profile`), or a model of an ACP agent
//! (`switch_acp_model`). The agent uses it from its next call on; settings and the active profile stay as they are.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde_json::{Value, json};
use shared::agent_server::version::AgentServerVersion;
use shared::agent_server::{AgentServer, AgentServerError, Failure};
use shared::config::StartConfig;
use shared::conversation::store::ConversationChange;
use shared::conversation::workspace::{Workspace, WorkspaceLookup};
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::extract::{ConversationId, JsonBody, both};
use shared::http::pydantic::body::FromJson;
use shared::http::pydantic::validation::{Checker, Fields, string_up_to};
use shared::http::response::{DetailOut, SuccessOut};
use shared::id;
use shared::sandbox::SandboxStatus;
use shared::start::llm_body::{LlmUse, switched_llm_body};
use shared::user::UserId;
use tokio::time::timeout;
use uuid::Uuid;

use crate::Context;

/// The longest name of a profile or model, in characters, as in requests of starts.
const MAX_NAME: usize = 10_000;

/// What a switch needs in addition to what the other routes use.
#[derive(Clone, Debug)]
pub(crate) struct SwitchConfig {
    pub(crate) start: StartConfig,
    /// The time limit of all requests to the agent server together.
    pub(crate) budget: Duration,
}

/// `{"profile_name": …}`
pub(crate) struct ProfileIn(String);

impl FromJson for ProfileIn {
    fn from_json(check: &mut Checker, value: &Value) -> Option<Self> {
        Fields::of(check, value)?.required(check, "profile_name", some_text).map(Self)
    }
}

/// `{"model": …}`
pub(crate) struct ModelIn(String);

impl FromJson for ModelIn {
    fn from_json(check: &mut Checker, value: &Value) -> Option<Self> {
        Fields::of(check, value)?.required(check, "model", some_text).map(Self)
    }
}

/// Reads a text that is not empty.
fn some_text(check: &mut Checker, value: &Value) -> Option<String> {
    let text = string_up_to(MAX_NAME, check, value)?;
    if text.is_empty() {
        let msg = "String should have at least 1 character";
        check.report("string_too_short", msg, value.clone(), Some(json!({"min_length": 1})));
        return None;
    }
    Some(text)
}

pub(crate) async fn switch_profile(
    State(context): State<Context>,
    Caller(user): Caller,
    id: Result<ConversationId>,
    body: Result<JsonBody<ProfileIn>>,
) -> Result<Json<SuccessOut>> {
    let (ConversationId(id), JsonBody(ProfileIn(name))) = both(id, body)?;
    let settings = context.settings.get(&user).await?;
    let settings = settings.ok_or_else(|| Error::NotFound("Settings not found".to_owned()))?;
    let llm = settings.llm_profiles.find(&name)?.clone().with_key_of(&settings.llm);
    let workspace = context.reachable(&user, id, "profiles").await?;
    let agent_server = &workspace.agent_server;
    let SwitchConfig { start, budget } = &context.switch;
    let switch = async {
        let streaming = start.token_streaming && streams_to_clients_only(agent_server).await;
        let usage = LlmUse { user: &user, conversation_id: id, config: start };
        let llm = switched_llm_body(usage, &llm, &name, streaming);
        agent_server.switch_llm(id, &llm, *budget).await.map(|()| llm)
    };
    let llm = timeout(*budget, switch).await.map_err(|_| unreachable_agent("timeout"))?;
    let llm = llm.map_err(|error| match &error.failure {
        Failure::Status(status, _) => {
            Error::Upstream { message: format!("Agent server error: {}", status.as_u16()), context: error.to_string() }
        }
        _ => unreachable_agent(error),
    })?;
    context.record_model(&user, id, llm["model"].as_str().unwrap_or_default()).await;
    Ok(SuccessOut::json())
}

pub(crate) async fn switch_acp_model(
    State(context): State<Context>,
    Caller(user): Caller,
    id: Result<ConversationId>,
    body: Result<JsonBody<ModelIn>>,
) -> Result<Response> {
    let (ConversationId(id), JsonBody(ModelIn(model))) = both(id, body)?;
    let workspace = context.reachable(&user, id, "models").await?;
    let switched = workspace.agent_server.switch_acp_model(id, &model, context.switch.budget).await;
    if let Err(error) = switched {
        let AgentServerError { failure: Failure::Status(status, _), .. } = &error else {
            return Err(unreachable_agent(error));
        };
        let message = format!("Agent server error: {}", status.as_u16());
        return match *status {
            // Its agent is no ACP agent.
            StatusCode::BAD_REQUEST => Err(Error::Refused(message)),
            StatusCode::GATEWAY_TIMEOUT => {
                Ok((StatusCode::GATEWAY_TIMEOUT, Json(DetailOut { detail: message })).into_response())
            }
            _ => Err(Error::Upstream { message, context: error.to_string() }),
        };
    }
    context.record_model(&user, id, &model).await;
    Ok(SuccessOut::json().into_response())
}

fn unreachable_agent(context: impl std::fmt::Display) -> Error {
    Error::Upstream { message: "Failed to reach agent server.".to_owned(), context: context.to_string() }
}

async fn streams_to_clients_only(agent_server: &AgentServer) -> bool {
    let version = agent_server.version().await;
    version.ok().flatten().is_some_and(AgentServerVersion::streams_to_clients_only)
}

impl Context {
    /// Returns the workspace of a conversation whose agent server can be reached. `what` names what is switched.
    async fn reachable(&self, user: &UserId, id: Uuid, what: &str) -> Result<Box<Workspace>> {
        match self.locator.find(user, id).await? {
            WorkspaceLookup::Found(workspace) => Ok(workspace),
            WorkspaceLookup::NotRunning(sandbox) if sandbox.status == SandboxStatus::Paused => {
                Err(Error::Conflict(format!("Sandbox is paused; resume it before switching {what}.")))
            }
            _ => Err(Error::NotFound(format!("Conversation {} is not reachable", id::dashed(id)))),
        }
    }

    /// Records the model of a conversation. The agent server reports it as well, so a failure is only logged.
    async fn record_model(&self, user: &UserId, id: Uuid, model: &str) {
        let change = ConversationChange::default().llm_model(model);
        if let Err(error) = self.conversations.update(user, id, change).await {
            tracing::warn!(conversation = %id, error = %error.context(), "conversation.model_not_recorded");
        }
    }
}
