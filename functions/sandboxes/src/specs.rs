//! What sandboxes are made from: the same for everybody.

use axum::Json;
use axum::extract::{RawQuery, State};
use serde_json::{Value, json};
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::page_token;
use shared::http::pydantic::query::{Bounds, Query};
use shared::sandbox::spec::SandboxSpec;

use crate::Context;
use crate::sandboxes::ids;

/// All of them are one page: there is one to each kind of sandbox.
pub(crate) async fn search(
    State(context): State<Context>,
    Caller(_): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>> {
    let mut query = Query::parse(query.as_deref());
    let page = query.string("page_id");
    let _limit = query.integer("limit", 100, Bounds::PAGE);
    query.finish().map_err(Error::Invalid)?;
    match page {
        Some(_) => Err(page_token::not_ours()),
        None => Ok(Json(json!({"items": context.specs, "next_page_id": null}))),
    }
}

pub(crate) async fn batch_get(
    State(context): State<Context>,
    Caller(_): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<Option<SandboxSpec>>>> {
    let ids = ids(query.as_deref(), "sandbox specs")?;
    Ok(Json(ids.iter().map(|id| context.specs.iter().find(|spec| spec.id == *id).cloned()).collect()))
}
