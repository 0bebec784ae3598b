//! Sends a message to the agent of a conversation that is ready.

use axum::Json;
use axum::extract::State;
use serde::Serialize;
use serde_json::{Value, json};
use shared::agent_server::{Failure, Mistake};
use shared::error::{Error, Fault, Result};
use shared::http::caller::Caller;
use shared::http::extract::{ConversationId, JsonBody};
use shared::http::pydantic::body::FromJson;
use shared::http::pydantic::validation::{Checker, Fields, boolean, constant};
use shared::sandbox::SandboxStatus;
use shared::start::request::Content;

use crate::{Context, upstream, workspace_or_error};

/// `{role: "user", content: [at least one part], run: bool = true}`
pub(crate) struct MessageIn {
    content: Vec<Content>,
    run: bool,
}

impl FromJson for MessageIn {
    fn from_json(check: &mut Checker, value: &Value) -> Option<Self> {
        let fields = Fields::of(check, value)?;
        let role = fields.or(check, "role", (), |check, value| constant(check, value, "user"));
        let content = fields.required(check, "content", |check, value| {
            if value.as_array().is_some_and(Vec::is_empty) {
                let ctx = json!({"field_type": "List", "min_length": 1, "actual_length": 0});
                let msg = "List should have at least 1 item after validation, not 0";
                check.report("too_short", msg, value.clone(), Some(ctx));
                return None;
            }
            Content::read_list(check, value)
        });
        let run = fields.or(check, "run", true, boolean);
        role?;
        Some(Self { content: content?, run: run? })
    }
}

/// The response to a message that the agent server has accepted.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = MessageSent))]
pub struct MessageSentOut {
    success: bool,
    sandbox_status: SandboxStatus,
    /// Always null.
    message: Option<String>,
}

pub(crate) async fn send(
    State(context): State<Context>,
    Caller(user): Caller,
    ConversationId(id): ConversationId,
    JsonBody(message): JsonBody<MessageIn>,
) -> Result<Json<MessageSentOut>> {
    let workspace = workspace_or_error(context.locator.find(&user, id).await?, id)?;
    let parts = serde_json::to_value(&message.content).map_err(Error::internal)?;
    let sent = context.within(workspace.agent_server.send_message(id, "user", &parts, message.run)).await;
    sent.map_err(|error| match error.failure {
        // The settings with which a conversation was created cannot change.
        Failure::Status(..) if error.fault() == Fault::User => match error.mistake() {
            Some(Mistake { advice, is_permanent: true, .. }) => {
                Error::Conflict(format!("{advice}. Then start a new conversation"))
            }
            _ => upstream(&error),
        },
        // An agent server accepts no request while its agent calls the model.
        Failure::TimedOut => Error::Upstream {
            message:
                "The agent server did not respond in time; its agent may be busy, and the message may still arrive"
                    .to_owned(),
            context: error.to_string(),
        },
        _ => upstream(&error),
    })?;
    Ok(Json(MessageSentOut { success: true, sandbox_status: workspace.sandbox.status, message: None }))
}
