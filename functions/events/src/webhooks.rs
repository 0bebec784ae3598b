//! Webhooks: `POST /api/v1/webhooks/conversations` and `POST /api/v1/webhooks/events/{conversation_id}` receive the reports of agent
//! servers; `POST /api/v1/webhooks/commands/{task_id}` is the notification of a command that a start waits for;
//! `GET /api/v1/webhooks/secrets` returns provider tokens to agents.
//!
//! A report is acknowledged once it is stored and applied, so that an agent server resends one that was not.

use std::time::Duration;

use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use secrecy::ExposeSecret as _;
use serde_json::Value;
use serde_json::value::RawValue;
use shared::error::{Error, Result};
use shared::event::ingest::ConversationReport;
use shared::event::store::Event;
use shared::http::extract::{ConversationId, JsonBody, RawBody, both};
use shared::http::pydantic::body::FromJson;
use shared::http::pydantic::validation::{self, Checked, Checker, Fields};
use shared::http::response::SuccessOut;
use shared::jobs::advance_start::AdvanceStart;
use shared::metrics;
use shared::sandbox::session_key;
use shared::sandbox::store::SandboxRecord;
use shared::user::token::{NotificationToken, TokenClaims, TokenKey};
use uuid::Uuid;

use crate::Context;

/// The header that carries the access token with which an agent requests a provider token, or the token of a command's notification.
const ACCESS_TOKEN: &str = "x-access-token";
/// The largest body, in bytes. A batch holds every event since the last one, and may hold a snapshot of the whole state. Lambda itself
/// accepts 6 MB at most.
const BODY_LIMIT: usize = 32 * 1024 * 1024;

/// The routes for sandboxes and the agents in them, authenticated by a session key or an access token. All other credentials of a request
/// are ignored.
pub fn webhooks_router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/webhooks/conversations", post(conversations))
        .route("/api/v1/webhooks/secrets", get(secret))
        .route("/api/v1/webhooks/events/{conversation_id}", post(events))
        .route("/api/v1/webhooks/commands/{task_id}", post(command_ended))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(context)
}

/// The sandbox whose session key the request sends. It is looked up before the body is read.
struct FromSandbox(SandboxRecord);

/// A snapshot of a conversation.
struct ConversationIn(ConversationReport);

impl FromJson for ConversationIn {
    fn from_json(check: &mut Checker, value: &Value) -> Option<Self> {
        let id = Fields::of(check, value)?.required(check, "id", validation::uuid)?;
        Some(Self(ConversationReport::read(id, value)))
    }
}

impl FromRequestParts<Context> for FromSandbox {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, context: &Context) -> Result<Self> {
        session_key::sandbox_of_request(&context.sandboxes, &parts.headers).await.map(Self)
    }
}

/// Applies a snapshot of a conversation, which its agent server posts when it starts, pauses, renames or deletes it.
async fn conversations(
    State(context): State<Context>,
    FromSandbox(sandbox): FromSandbox,
    JsonBody(ConversationIn(report)): JsonBody<ConversationIn>,
) -> Result<Json<SuccessOut>> {
    context.ingestor.ingest_report(&sandbox, &report).await?;
    Ok(SuccessOut::json())
}

/// Stores a batch of events. An agent server resends a batch that was not acknowledged, and batches may overlap.
async fn events(
    State(context): State<Context>,
    FromSandbox(sandbox): FromSandbox,
    conversation: Result<ConversationId>,
    body: RawBody,
) -> Result<Json<SuccessOut>> {
    // A conversation of another sandbox is reported before any violation of the body.
    let conversation = match conversation {
        Ok(ConversationId(id)) => Ok((id, context.ingestor.lookup(&sandbox, id).await?)),
        Err(error) => Err(error),
    };
    let ((id, lookup), events) = both(conversation, batch(&body).map_err(Error::Invalid))?;
    metrics::batch_received(events.len());
    context.ingestor.ingest_events(&sandbox, id, &lookup, events).await?;
    Ok(SuccessOut::json())
}

/// Enqueues a job for a start whose command has ended, so that it does not wait for the next poll. The token of the start, which the command
/// sends, permits nothing else. The body is ignored: a sandbox is untrusted, and the worker polls the command's outcome anyway.
async fn command_ended(
    State(context): State<Context>,
    headers: HeaderMap,
    Path(task): Path<String>,
) -> Result<StatusCode> {
    let refused = || Error::Unauthenticated("Unauthorized".into());
    let token = access_token(&headers).ok_or_else(refused)?;
    let NotificationToken { user, task } = NotificationToken::verify(&context.sealer, token)
        .await?
        .filter(|token| Uuid::parse_str(&task) == Ok(token.task))
        .ok_or_else(refused)?;
    let record = context.tasks.get(&user, task).await?;
    let record = record.ok_or_else(|| Error::NotFound("No such start task".into()))?;
    record.record_in_log();
    if !record.now.status.is_final() {
        context.queue.send(&AdvanceStart { user, task, due_at: None }.into(), Duration::ZERO).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Returns the user's current token of the git provider that the access token names, as long as the sandbox exists for which the
/// access token was issued.
async fn secret(State(context): State<Context>, headers: HeaderMap) -> Result<String> {
    let refused = || Error::Unauthenticated("Unauthorized".into());
    let token = access_token(&headers).ok_or_else(refused)?;
    let TokenClaims { user, provider, sandbox_id } =
        TokenKey::verify(&context.sealer, token).await?.ok_or_else(refused)?;
    if let Some(sandbox) = sandbox_id
        && !context.sandboxes.exists(&user, &sandbox).await?
    {
        return Err(refused());
    }
    let settings = context.settings.get(&user).await?.unwrap_or_default();
    let mut tokens = settings.provider_tokens.0.into_iter().filter(|(name, _)| *name == provider);
    let token = tokens.find_map(|(_, token)| token.token).filter(|token| !token.expose_secret().is_empty());
    token.map(|token| token.expose_secret().to_owned()).ok_or_else(|| Error::NotFound("No such provider".into()))
}

fn access_token(headers: &HeaderMap) -> Option<&str> {
    headers.get(ACCESS_TOKEN)?.to_str().ok()
}

/// Reads the events of a body, of whatever kind, and keeps the bytes of each as they were sent.
fn batch(body: &RawBody) -> Checked<Vec<Event>> {
    body.read(|check, value| {
        let mut events = validation::list(check, value, event)?;
        let text = std::str::from_utf8(&body.bytes).unwrap_or_default();
        // This cannot fail, because the same text has been parsed. If it did, the events would be stored as serialised again.
        let sent: Vec<&RawValue> = serde_json::from_str(text.trim_start_matches('\u{feff}')).unwrap_or_default();
        for (number, event) in events.iter_mut().enumerate() {
            event.json = sent.get(number).map_or_else(|| value[number].to_string(), |sent| sent.get().to_owned());
        }
        Some(events)
    })
}

/// Reads an event without its text, which [`batch`] adds.
fn event(check: &mut Checker, value: &Value) -> Option<Event> {
    let fields = Fields::of(check, value)?;
    let id = fields.required(check, "id", validation::string);
    let timestamp = fields.required(check, "timestamp", validation::string);
    let kind = fields.required(check, "kind", validation::string);
    let event = Event { id: id?, timestamp: timestamp?, kind: kind?, json: String::new() };
    if let Some(fault) = event.fault() {
        check.report_value_error(fault, value.clone());
        return None;
    }
    Some(event)
}
