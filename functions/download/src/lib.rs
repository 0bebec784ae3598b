//! `GET /api/v1/app-conversations/{conversation_id}/download`: exports a conversation as a zip file.
//!
//! An export up to the configured size is streamed from the bucket; for a larger one the response is a redirect to a presigned link. Only a
//! complete object is streamed, never a running build. A build that exceeds the time of a request is left to the function `exports`, and
//! the client must retry.

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Json, body::Body};
use futures::TryStreamExt as _;
use http::header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RETRY_AFTER};
use http::{HeaderName, HeaderValue, StatusCode};
use shared::aws::Aws;
use shared::config::Config;
use shared::error::Error;
use shared::export::store::{CONTENT_TYPE as ZIP, Failure, FailureReason, Open};
use shared::export::{Answer, Exporter, Ready};
use shared::http::caller::Caller;
use shared::http::extract::ConversationId;
use shared::http::response::DetailOut;
use shared::http_client::HttpClient;
use shared::stores::Stores;
use shared::user::seal::Sealer;
use shared::{Result, id};
use uuid::Uuid;

/// The `Retry-After` of an export that is being built, in seconds.
const RETRY_PENDING_AFTER: u64 = 5;
/// The header with a warning about events that an export may lack.
const WARNING: HeaderName = HeaderName::from_static("x-export-warning");

/// What this function can access: it reads conversations and sandboxes, fetches events from agent servers and stores them, and writes
/// exports.
#[derive(Clone, Debug)]
pub struct Context {
    exporter: Exporter,
    inline_limit: u64,
}

impl Context {
    /// A context on the configured tables, bucket, queue and sandboxes.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let stores = Stores::new(&config.names, aws, sealer);
        let sandboxes = stores.sandbox_viewer(&config.sandbox);
        let exporter = stores.exporter(&config.export, sandboxes, HttpClient::new(config.address_policy));
        Self::with_exporter(exporter, config.export.inline_limit)
    }

    /// A context with an exporter. Zip files up to `inline_limit` bytes are streamed; the response for larger ones is a link.
    #[must_use]
    pub fn with_exporter(exporter: Exporter, inline_limit: u64) -> Self {
        Self { exporter, inline_limit }
    }
}

/// The routes of this function.
pub fn router(context: Context) -> Router {
    Router::new().route("/api/v1/app-conversations/{conversation_id}/download", get(download)).with_state(context)
}

async fn download(
    State(context): State<Context>,
    Caller(user): Caller,
    ConversationId(conversation): ConversationId,
) -> Result<Response> {
    match context.exporter.export(&user, conversation).await? {
        None => Err(Error::NotFound(format!("Conversation not found: {}", id::dashed(conversation)))),
        Some(Answer::Ready(ready)) => context.deliver(conversation, ready).await,
        Some(Answer::Pending) => Ok(pending()),
        Some(Answer::Failed(failure)) => failed(&failure),
    }
}

impl Context {
    async fn deliver(&self, conversation: Uuid, ready: Ready) -> Result<Response> {
        let store = self.exporter.store();
        let disposition = format!("attachment; filename=\"conversation_{}.zip\"", id::dashed(conversation));
        let mut response = if ready.length > self.inline_limit {
            let link = store.link(&ready.key, &disposition).await?;
            (StatusCode::FOUND, [(LOCATION, link)]).into_response()
        } else {
            let (length, body) = match ready.zip {
                Some(zip) => (zip.len() as u64, Body::from(zip)),
                None => match store.open(&ready.key).await? {
                    Some(object) => (object.length, streamed(object)),
                    // The object was removed after it was found.
                    None => return Ok(pending()),
                },
            };
            let mut zip = ([(CONTENT_TYPE, ZIP), (CONTENT_DISPOSITION, &disposition)], body).into_response();
            // The length enables a client to detect a truncated response.
            zip.headers_mut().insert(CONTENT_LENGTH, length.into());
            zip
        };
        if let Some(warning) = ready.warning.and_then(|warning| HeaderValue::from_str(&warning).ok()) {
            response.headers_mut().insert(WARNING, warning);
        }
        Ok(response)
    }
}

/// A body that is read from the bucket while it is sent. If the bucket fails, the body fails, and the connection is closed.
fn streamed(object: Open) -> Body {
    Body::from_stream(
        object
            .into_stream()
            .inspect_err(|error| tracing::error!(error = %error.context(), "download.stream_interrupted")),
    )
}

fn pending() -> Response {
    retry_later(RETRY_PENDING_AFTER, "The export is still being built; retry in a few seconds")
}

fn failed(failure: &Failure) -> Result<Response> {
    match failure.reason {
        FailureReason::TooManyEvents { .. } => Err(Error::TooLarge(failure.message())),
        FailureReason::OutOfTime { .. } | FailureReason::RepeatedFailure { .. } => {
            Ok(retry_later(failure.retry_after(), &failure.message()))
        }
    }
}

fn retry_later(seconds: u64, detail: &str) -> Response {
    let body = Json(DetailOut { detail: detail.to_owned() });
    (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, seconds.to_string())], body).into_response()
}
