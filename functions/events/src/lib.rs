//! `POST /api/v1/webhooks/conversations` and `POST /api/v1/webhooks/events/{conversation_id}`: what agent servers tell.
//!
//! Events are stored before they are acknowledged, so that an agent server keeps and sends again what could not be stored.
//! They have no effect on the conversation's record yet: titles, metrics and unknown conversations are left alone, and what
//! is said of a conversation as a whole is accepted without an effect.

use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, FromRequestParts, Path, State};
use axum::routing::post;
use axum::{Json, Router};
use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::config::Config;
use shared::conversation::store::ConversationStore;
use shared::error::Error;
use shared::event::store::{Event, EventStore};
use shared::http::body;
use shared::http::validation::{self, Checked, Checker, Fields};
use shared::sandbox::store::{SandboxRecord, SandboxStore};
use shared::user::seal::Sealer;
use uuid::Uuid;

/// The header by which an agent server shows which sandbox it is in.
const SESSION_API_KEY: &str = "x-session-api-key";
/// A batch holds what was buffered in the meantime, with a snapshot of the whole state. Lambda itself takes 6 MB at most.
const BODY_LIMIT: usize = 32 * 1024 * 1024;

/// What this function may touch: it reads sandboxes and conversations, and writes events.
#[derive(Clone, Debug)]
pub struct Context {
    sandboxes: SandboxStore,
    conversations: ConversationStore,
    events: EventStore,
}

impl Context {
    /// A context on the configured tables.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let (names, dynamodb) = (&config.names, &aws.dynamodb);
        Self {
            sandboxes: SandboxStore::new(dynamodb.clone(), names.sandboxes.clone(), sealer.clone()),
            conversations: ConversationStore::new(dynamodb.clone(), names.conversations.clone(), names.users.clone()),
            events: EventStore::new(dynamodb.clone(), names.events.clone(), aws.s3.clone(), names.bucket.clone()),
        }
    }

    /// A sandbox tells only of its own conversations, and of such as are not known (yet).
    async fn must_be_in(&self, sandbox: &SandboxRecord, conversation: Uuid) -> Result<(), Error> {
        match self.conversations.get(&sandbox.user, conversation).await? {
            Some(known) if known.sandbox_id != sandbox.id => Err(Error::Unauthenticated("Unauthorized".into())),
            _ => Ok(()),
        }
    }
}

/// The routes of this function. Their callers are sandboxes, which show their session key; whoever else the request may be
/// from does not count.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/webhooks/conversations", post(conversations))
        .route("/api/v1/webhooks/events/{conversation_id}", post(events))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(context)
}

/// The sandbox whose session key the request shows; found before the body is read.
struct FromSandbox(SandboxRecord);

impl FromRequestParts<Context> for FromSandbox {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, context: &Context) -> Result<Self, Error> {
        let refused = |text: &str| Error::Unauthenticated(text.to_owned());
        let key = parts.headers.get(SESSION_API_KEY).filter(|key| !key.is_empty());
        let key = key.ok_or_else(|| refused("X-Session-API-Key header is required"))?;
        let invalid = || refused("Invalid session API key");
        let key = key.to_str().map_err(|_| invalid())?;
        context.sandboxes.find_by_session_key(key).await?.map(Self).ok_or_else(invalid)
    }
}

/// What an agent server says of a conversation when it starts, pauses, is renamed or is deleted. No effect yet.
async fn conversations(
    State(context): State<Context>,
    FromSandbox(sandbox): FromSandbox,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, Error> {
    let id =
        read_body(&headers, &body, |check, value| Fields::of(check, value)?.required(check, "id", validation::uuid));
    context.must_be_in(&sandbox, id.map_err(Error::Invalid)?).await?;
    Ok(success())
}

/// Stores a batch of events; it comes again when it was not acknowledged, and may overlap with others.
async fn events(
    State(context): State<Context>,
    FromSandbox(sandbox): FromSandbox,
    conversation: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<Value>, Error> {
    // A path that is not UTF-8 is no UUID either.
    let conversation = conversation.map_or_else(|_| char::REPLACEMENT_CHARACTER.into(), |Path(text)| text);
    let conversation = validation::path_uuid("conversation_id", &conversation);
    if let Ok(id) = conversation {
        context.must_be_in(&sandbox, id).await?;
    }
    match (conversation, batch(&headers, &body)) {
        (Ok(id), Ok(events)) => context.events.append(&sandbox.user, id, events).await?,
        (conversation, events) => {
            let mut violations = conversation.err().unwrap_or_default();
            violations.extend(events.err().unwrap_or_default());
            return Err(Error::Invalid(violations));
        }
    }
    Ok(success())
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
