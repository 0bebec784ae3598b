//! Lists, creates, pauses, resumes and deletes sandboxes.

use axum::Json;
use axum::extract::{Path, RawQuery, State};
use secrecy::ExposeSecret as _;
use serde::Serialize;
use shared::clock::Time;
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::extract::PageRequest;
use shared::http::page::{self, PageOut};
use shared::http::pydantic::query::Query;
use shared::http::response::SuccessOut;
use shared::id;
use shared::sandbox::{ExposedUrl, Launch, Sandbox, SandboxStatus};
use shared::user::UserId;

use crate::Context;

/// The most ids that one request may name.
const MAX_IDS: usize = 100;
/// The list to which page ids belong.
const LIST: &str = "sandboxes";

/// A sandbox: `SandboxInfo` of the contract.
#[derive(Clone, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = SandboxInfo))]
pub struct SandboxOut {
    id: String,
    /// Null on a server of a single user.
    created_by_user_id: Option<String>,
    sandbox_spec_id: String,
    status: SandboxStatus,
    /// The key of its agent server.
    session_api_key: Option<String>,
    /// Null unless it is running.
    exposed_urls: Option<Vec<ExposedUrl>>,
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    created_at: Time,
    /// Why it has failed, is missing, or cannot be observed now.
    #[serde(skip_serializing_if = "Option::is_none")]
    detail: Option<String>,
}

impl SandboxOut {
    fn new(user: &UserId, sandbox: &Sandbox) -> Self {
        Self {
            id: sandbox.id.clone(),
            created_by_user_id: user.shown().map(str::to_owned),
            sandbox_spec_id: sandbox.spec_id.clone(),
            status: sandbox.status,
            session_api_key: sandbox.session_api_key.as_ref().map(|key| key.expose_secret().to_owned()),
            exposed_urls: sandbox.exposed_urls.clone(),
            created_at: sandbox.created_at,
            detail: sandbox.detail.clone(),
        }
    }
}

/// Lists sandboxes, the newest first. Every request looks up all sandboxes of the user, because a user has few, and returns one page.
pub(crate) async fn search(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<PageOut<SandboxOut>>> {
    let mut query = Query::parse(query.as_deref());
    let page = PageRequest::read(&mut query);
    query.finish().map_err(Error::Invalid)?;
    let page = page.of(&user, LIST.to_owned());
    let after = page.after()?;
    let mut sandboxes = context.sandboxes.list(&user).await?;
    sandboxes.sort_by_key(|sandbox| std::cmp::Reverse(sort_key(sandbox)));
    sandboxes.retain(|sandbox| after.as_ref().is_none_or(|after| sort_key(sandbox) < *after));
    let has_more = sandboxes.len() > page.limit;
    sandboxes.truncate(page.limit);
    let shown: Vec<SandboxOut> = sandboxes.iter().map(|sandbox| SandboxOut::new(&user, sandbox)).collect();
    let items = page::fitting(&shown)?;
    let has_more = has_more || items.len() < shown.len();
    let last = sandboxes[..items.len()].last().filter(|_| has_more).map(sort_key);
    Ok(Json(items.into_page(page.next_page_id(last)?)))
}

fn sort_key(sandbox: &Sandbox) -> (String, String) {
    (sandbox.created_at.sortable(), sandbox.id.clone())
}

pub(crate) async fn batch_get(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<Option<SandboxOut>>>> {
    let ids = ids(query.as_deref(), "sandboxes")?;
    let sandboxes = context.sandboxes.batch_get(&user, &ids).await?;
    let shown: Vec<Option<SandboxOut>> =
        sandboxes.iter().map(|sandbox| sandbox.as_ref().map(|sandbox| SandboxOut::new(&user, sandbox))).collect();
    page::check_batch(&shown, "sandboxes")?;
    Ok(Json(shown))
}

/// Reads the ids of a batch request. `what` names the things for the error.
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

/// Creates a sandbox, and responds while it is starting.
pub(crate) async fn start(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<SandboxOut>> {
    if let Some(spec) = Query::parse(query.as_deref()).string("sandbox_spec_id")
        && !context.specs.iter().any(|known| known.id == spec)
    {
        return Err(Error::NotFound(format!("Sandbox Spec not found: {spec}")));
    }
    let id = id::new_sandbox_id();
    let launched = match context.sandboxes.start(&user, &id, None).await {
        Ok(Launch::Full) => Err(Error::Unavailable(
            "Starts of conversations use all sandboxes that you may have; try again when one of them has ended"
                .to_owned(),
        )),
        Ok(Launch::Started | Launch::Deleted) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = launched {
        // The client does not get the id, so a sandbox that was partly created would never be used.
        if let Err(error) = context.reconciler.delete(&user, &id).await {
            tracing::warn!(sandbox = id, error = %error.context(), "sandbox.cleanup_failed");
        }
        return Err(match error {
            Error::Refused(why) => Error::Unavailable(why),
            error => error,
        });
    }
    match context.sandboxes.get(&user, &id).await? {
        Some(sandbox) => Ok(Json(SandboxOut::new(&user, &sandbox))),
        None => Err(Error::internal("a sandbox that was just created does not exist")),
    }
}

pub(crate) async fn pause(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(id): Path<String>,
) -> Result<Json<SuccessOut>> {
    success_or_not_found(context.sandboxes.pause(&user, &id).await?)
}

pub(crate) async fn resume(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(id): Path<String>,
) -> Result<Json<SuccessOut>> {
    success_or_not_found(context.sandboxes.resume(&user, &id).await?)
}

/// `DELETE /sandboxes?sandbox_id=`
pub(crate) async fn delete(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<SuccessOut>> {
    let mut query = Query::parse(query.as_deref());
    let id = query.required_string("sandbox_id");
    query.finish().map_err(Error::Invalid)?;
    success_or_not_found(context.reconciler.delete(&user, &id).await?)
}

/// `DELETE /sandboxes/{sandbox_id}`, with or without the same id in the query.
pub(crate) async fn delete_named(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(id): Path<String>,
    RawQuery(query): RawQuery,
) -> Result<Json<SuccessOut>> {
    if Query::parse(query.as_deref()).string("sandbox_id").is_some_and(|other| other != id) {
        return Err(Error::Refused("The path and `sandbox_id` refer to different sandboxes".to_owned()));
    }
    success_or_not_found(context.reconciler.delete(&user, &id).await?)
}

fn success_or_not_found(found: bool) -> Result<Json<SuccessOut>> {
    match found {
        true => Ok(SuccessOut::json()),
        false => Err(Error::NotFound("Not Found".to_owned())),
    }
}
