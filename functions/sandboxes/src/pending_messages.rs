//! `POST /api/v1/conversations/{conversation_id}/pending-messages`: queues a message for a conversation that is not ready.

use axum::Json;
use axum::extract::{Path, State};
use bytes::Bytes;
use http::StatusCode;
use serde::Serialize;
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::id;
use shared::pending_message::delivery::Addressee;
use shared::pending_message::read_body;

use crate::Context;

/// The response to a message that was queued.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = MessageQueued))]
pub struct MessageQueuedOut {
    /// A UUID with dashes.
    id: String,
    queued: bool,
    /// From 1.
    position: usize,
}

pub(crate) async fn enqueue(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(to): Path<String>,
    body: Bytes,
) -> Result<(StatusCode, Json<MessageQueuedOut>)> {
    let parts = read_body(&body).map_err(Error::Refused)?;
    let to = Addressee::from_path(&to).ok_or_else(|| Error::NotFound("Conversation not found".to_owned()))?;
    let queued = context.messages.keep(&user, to, &parts).await?;
    let queued = MessageQueuedOut { id: id::dashed(queued.id), queued: true, position: queued.position };
    Ok((StatusCode::CREATED, Json(queued)))
}
