//! `POST /api/v1/webhooks/conversations` and `POST /api/v1/webhooks/events/{conversation_id}`: reports of agent servers; and
//! `GET /api/v1/webhooks/secrets`: provider tokens for agents.
//!
//! A report is acknowledged once it is stored and applied, so that an agent server resends one that was not.

use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use secrecy::ExposeSecret as _;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use shared::error::Error;
use shared::event::ingest::ConversationReport;
use shared::event::store::Event;
use shared::http::pydantic::body;
use shared::http::pydantic::validation::{self, Checked, Checker, Fields};
use shared::metrics;
use shared::sandbox::session_key;
use shared::sandbox::store::SandboxRecord;
use shared::user::token::{TokenClaims, TokenKey};

use crate::{Context, conversation_id};

/// The header by which an agent shows that it may have a provider token.
const ACCESS_TOKEN: &str = "x-access-token";
/// A batch holds what was buffered in the meantime, with a snapshot of the whole state. Lambda itself takes 6 MB at most.
const BODY_LIMIT: usize = 32 * 1024 * 1024;

/// The routes for sandboxes and the agents in them, authenticated by a session key or an access token. Other credentials of a
/// request are ignored.
pub fn webhooks_router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/webhooks/conversations", post(conversations))
        .route("/api/v1/webhooks/secrets", get(secret))
        .route("/api/v1/webhooks/events/{conversation_id}", post(events))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(context)
}

/// The sandbox whose session key the request shows; found before the body is read.
struct FromSandbox(SandboxRecord);

impl FromRequestParts<Context> for FromSandbox {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, context: &Context) -> Result<Self, Error> {
        session_key::sandbox_of_request(&context.sandboxes, &parts.headers).await.map(Self)
    }
}

/// Applies a snapshot of a conversation, which its agent server posts when it starts, pauses, renames or deletes it.
async fn conversations(
    State(context): State<Context>,
    FromSandbox(sandbox): FromSandbox,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, Error> {
    let told = read_body(&headers, &body, |check, value| {
        let id = Fields::of(check, value)?.required(check, "id", validation::uuid)?;
        Some(ConversationReport::read(id, value))
    });
    context.intake.ingest_report(&sandbox, &told.map_err(Error::Invalid)?).await?;
    Ok(success())
}

/// Stores a batch of events. An agent server resends a batch that was not acknowledged, and batches may overlap.
async fn events(
    State(context): State<Context>,
    FromSandbox(sandbox): FromSandbox,
    conversation: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, Error> {
    let conversation = conversation_id(conversation);
    let lookup = match conversation {
        Ok(id) => Some(context.intake.lookup(&sandbox, id).await?),
        Err(_) => None,
    };
    match (conversation, lookup, batch(&headers, &body)) {
        (Ok(id), Some(lookup), Ok(events)) => {
            metrics::batch_received(events.len());
            context.intake.ingest_events(&sandbox, id, &lookup, events).await?;
        }
        (conversation, _, events) => {
            let mut violations = conversation.err().unwrap_or_default();
            violations.extend(events.err().unwrap_or_default());
            return Err(Error::Invalid(violations));
        }
    }
    Ok(success())
}

/// The current token of the user for the git provider that the access token names, as long as the sandbox exists that the access
/// token was given to.
async fn secret(State(context): State<Context>, headers: HeaderMap) -> Result<String, Error> {
    let refused = || Error::Unauthenticated("Unauthorized".into());
    let token = headers.get(ACCESS_TOKEN).and_then(|token| token.to_str().ok()).ok_or_else(refused)?;
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

fn success() -> Json<Value> {
    Json(json!({"success": true}))
}

fn read_body<T>(headers: &HeaderMap, body: &[u8], read: impl FnOnce(&mut Checker, &Value) -> Option<T>) -> Checked<T> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let value = body::json(content_type, body)?;
    let mut check = Checker::new("body");
    let read = read(&mut check, &value);
    check.finish(read)
}

/// The events of a body, each with its bytes as they came. Of what kind they are does not matter.
fn batch(headers: &HeaderMap, body: &[u8]) -> Checked<Vec<Event>> {
    let mut events = read_body(headers, body, |check, value| validation::list(check, value, event))?;
    let text = std::str::from_utf8(body).unwrap_or_default();
    // Read once already, so this cannot fail; if it could, what was read would be stored.
    let sent: Vec<&RawValue> = serde_json::from_str(text.trim_start_matches('\u{feff}')).unwrap_or_default();
    for (event, sent) in events.iter_mut().zip(sent) {
        sent.get().clone_into(&mut event.json);
    }
    Ok(events)
}

fn event(check: &mut Checker, value: &Value) -> Option<Event> {
    let fields = Fields::of(check, value)?;
    let id = fields.required(check, "id", validation::string);
    let timestamp = fields.required(check, "timestamp", validation::string);
    let kind = fields.required(check, "kind", validation::string);
    let event = Event { id: id?, timestamp: timestamp?, kind: kind?, json: value.to_string() };
    if let Some(fault) = event.fault() {
        check.report_value_error(fault, value.clone());
        return None;
    }
    Some(event)
}
