//! `POST /api/v1/conversations/{conversation_id}/pending-messages`: a message for a conversation that cannot take it yet.

use axum::Json;
use axum::extract::{Path, State};
use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::id;
use shared::pending_message::delivery::Addressee;
use shared::pending_message::read_body;

use crate::Context;

pub(crate) async fn keep(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(to): Path<String>,
    body: Bytes,
) -> Result<(StatusCode, Json<Value>)> {
    let parts = read_body(&body).map_err(Error::Refused)?;
    let to = Addressee::from_path(&to).ok_or_else(|| Error::NotFound("There is no such conversation".to_owned()))?;
    let queued = context.messages.keep(&user, to, &parts).await?;
    let told = json!({"id": id::dashed(queued.id), "queued": true, "position": queued.position});
    Ok((StatusCode::CREATED, Json(told)))
}
