//! Sandboxes as the contract shows them.

use axum::Json;
use axum::extract::{Path, RawQuery, State};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use shared::clock::Time;
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::page::{self, Page};
use shared::http::page_token;
use shared::http::pydantic::query::{Bounds, Query};
use shared::id;
use shared::sandbox::Sandbox;
use shared::user::UserId;

use crate::Context;

/// The most ids that one request may name.
const MAX_IDS: usize = 100;
/// Which list page ids are of.
const LIST: &str = "sandboxes";

/// Newest first. A user has few sandboxes: all of them are looked up, and a page of them shown.
pub(crate) async fn search(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Page>> {
    let mut query = Query::parse(query.as_deref());
    let page_id = query.string("page_id");
    let limit = query.integer("limit", 100, Bounds::PAGE);
    query.finish().map_err(Error::Invalid)?;
    let list = LIST.to_owned();
    let after: Option<(String, String)> = page_id.map(|page| page_token::decode(&user, &page, &list)).transpose()?;
    let limit = usize::try_from(limit).unwrap_or(100);
    let mut sandboxes = context.sandboxes.list(&user).await?;
    sandboxes.sort_by_key(|sandbox| std::cmp::Reverse(place(sandbox)));
    sandboxes.retain(|sandbox| after.as_ref().is_none_or(|after| place(sandbox) < *after));
    let more = sandboxes.len() > limit;
    sandboxes.truncate(limit);
    let shown: Vec<Value> = sandboxes.iter().map(|sandbox| shown(&user, sandbox)).collect();
    let items = page::fitting(&shown)?;
    let more = more || items.len() < shown.len();
    let end = sandboxes[..items.len()].last().filter(|_| more).map(place);
    let next = end.map(|end| page_token::encode(&user, &list, &end)).transpose()?;
    Ok(Json(items.into_page(next)))
}

/// Where a sandbox is in the list, from its end.
fn place(sandbox: &Sandbox) -> (String, String) {
    (sandbox.created_at.sortable(), sandbox.id.clone())
}

pub(crate) async fn batch_get(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<Option<Value>>>> {
    let ids = ids(query.as_deref(), "sandboxes")?;
    let sandboxes = context.sandboxes.batch_get(&user, &ids).await?;
    let shown: Vec<Option<Value>> =
        sandboxes.iter().map(|sandbox| sandbox.as_ref().map(|sandbox| shown(&user, sandbox))).collect();
    page::check_batch(&shown, "sandboxes")?;
    Ok(Json(shown))
}

/// The ids of a batch.
pub(crate) fn ids(query: Option<&str>, what: &str) -> Result<Vec<String>> {
    let mut query = Query::parse(query);
    let ids = query.strings("id");
    query.finish().map_err(Error::Invalid)?;
    if ids.len() > MAX_IDS {
        let count = ids.len();
        return Err(Error::Refused(format!("Cannot request more than {MAX_IDS} {what} at once, got {count}")));
    }
    Ok(ids)
}

/// Answers as soon as the sandbox is on its way.
pub(crate) async fn start(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>> {
    if let Some(spec) = Query::parse(query.as_deref()).string("sandbox_spec_id")
        && !context.specs.iter().any(|known| known.id == spec)
    {
        return Err(Error::NotFound(format!("Sandbox Spec not found: {spec}")));
    }
    let id = id::new_sandbox_id();
    if let Err(error) = context.sandboxes.start(&user, &id).await {
        // Nobody knows its id: what was made of it would never be used.
        if let Err(error) = context.sandboxes.delete(&user, &id).await {
            tracing::warn!(sandbox = id, error = %error.context(), "sandbox.not_cleaned_up");
        }
        return Err(match error {
            Error::Refused(why) => Error::Unavailable(why),
            error => error,
        });
    }
    match context.sandboxes.get(&user, &id).await? {
        Some(sandbox) => Ok(Json(shown(&user, &sandbox))),
        None => Err(Error::internal("a sandbox that was just made is not there")),
    }
}

pub(crate) async fn pause(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>> {
    success(context.sandboxes.pause(&user, &id).await?)
}

pub(crate) async fn resume(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>> {
    success(context.sandboxes.resume(&user, &id).await?)
}

/// `DELETE /sandboxes?sandbox_id=`
pub(crate) async fn delete(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>> {
    let mut query = Query::parse(query.as_deref());
    let id = query.required_string("sandbox_id");
    query.finish().map_err(Error::Invalid)?;
    success(context.sandboxes.delete(&user, &id).await?)
}

/// `DELETE /sandboxes/{sandbox_id}`, with or without the same id in the query.
pub(crate) async fn delete_named(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>> {
    if Query::parse(query.as_deref()).string("sandbox_id").is_some_and(|other| other != id) {
        return Err(Error::Refused("The path and sandbox_id name two sandboxes: which one is meant?".to_owned()));
    }
    success(context.sandboxes.delete(&user, &id).await?)
}

fn success(done: bool) -> Result<Json<Value>> {
    match done {
        true => Ok(Json(json!({"success": true}))),
        false => Err(Error::NotFound("Not Found".to_owned())),
    }
}

/// `SandboxInfo`
fn shown(user: &UserId, sandbox: &Sandbox) -> Value {
    let Sandbox { id, spec_id, status, session_api_key, exposed_urls, created_at, .. } = sandbox;
    let created_at: &Time = created_at;
    json!({
        "id": id,
        "created_by_user_id": user.shown(),
        "sandbox_spec_id": spec_id,
        "status": status,
        "session_api_key": session_api_key.as_ref().map(|key| key.expose_secret().to_owned()),
        "exposed_urls": exposed_urls,
        "created_at": created_at,
    })
}
