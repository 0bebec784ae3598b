//! Sandbox specs: what sandboxes are created from. All users have the same ones.

use axum::Json;
use axum::extract::{RawQuery, State};
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::extract::PageRequest;
use shared::http::page::{self, PageOut};
use shared::http::pydantic::query::Query;
use shared::sandbox::spec::SandboxSpec;

use crate::Context;
use crate::sandboxes::ids;

/// Returns all of them in one page, because each kind of sandbox has one.
pub(crate) async fn search(
    State(context): State<Context>,
    Caller(_): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<PageOut<SandboxSpec>>> {
    let mut query = Query::parse(query.as_deref());
    let page = PageRequest::read(&mut query);
    query.finish().map_err(Error::Invalid)?;
    page.only_page()?;
    Ok(Json(page::fitting(&context.specs)?.into_page(None)))
}

pub(crate) async fn batch_get(
    State(context): State<Context>,
    Caller(_): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<Option<SandboxSpec>>>> {
    let ids = ids(query.as_deref(), "sandbox specs")?;
    Ok(Json(ids.iter().map(|id| context.specs.iter().find(|spec| spec.id == *id).cloned()).collect()))
}
