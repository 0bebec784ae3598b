//! A message to the agent of a conversation that is ready.

use axum::Json;
use axum::extract::State;
use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};
use shared::agent_server::{Failure, Mistake};
use shared::error::{Error, Fault, Result};
use shared::http::caller::Caller;
use shared::http::pydantic::body;
use shared::http::pydantic::validation::{Checked, Checker, Fields, boolean, constant};
use shared::start::request::Content;

use crate::{Context, ConversationPath, conversation, inside, upstream};

/// `{role: "user", content: [at least one part], run: bool = true}`
struct Message {
    content: Vec<Content>,
    run: bool,
}

impl Message {
    fn from_body(content_type: Option<&str>, body: &[u8]) -> Checked<Self> {
        let value = body::json(content_type, body)?;
        let mut check = Checker::new("body");
        let message = Self::read(&mut check, &value);
        check.finish(message)
    }

    fn read(check: &mut Checker, value: &Value) -> Option<Self> {
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

pub(crate) async fn send(
    State(context): State<Context>,
    Caller(user): Caller,
    path: ConversationPath,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let message = Message::from_body(content_type, &body);
    let id = conversation(path)?;
    let message = message.map_err(Error::Invalid)?;
    let inside = inside(context.places.find(&user, id).await?, id)?;
    let parts = serde_json::to_value(&message.content).map_err(Error::internal)?;
    let sent = context.within(inside.agent_server.send_message(id, "user", &parts, message.run)).await;
    sent.map_err(|error| match error.failure {
        // What a conversation was created with stays as it is.
        Failure::Status(..) if error.fault() == Fault::User => match error.mistake() {
            Some(Mistake { advice, is_permanent: true, .. }) => {
                Error::Conflict(format!("{advice}. Then start a new conversation"))
            }
            _ => upstream(&error),
        },
        // An agent server lets nobody in while its agent thinks.
        Failure::TimedOut => Error::Upstream {
            message:
                "The agent server did not answer in time: its agent may be at work, and the message may still arrive"
                    .to_owned(),
            context: error.to_string(),
        },
        _ => upstream(&error),
    })?;
    Ok(Json(json!({"success": true, "sandbox_status": inside.sandbox.status, "message": null})))
}
