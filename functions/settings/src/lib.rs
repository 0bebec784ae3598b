//! `/api/v1/settings`, `/api/v1/secrets`, `/api/v1/users/me`: what a user has set, and keeps secret; and by which front ends find
//! out whether their credentials are good, `/api/keys/current` and `/api/organizations`.

use axum::extract::{DefaultBodyLimit, Path, RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, StatusCode};
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::config::Config;
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::page_token;
use shared::http::pydantic::body;
use shared::http::pydantic::query::{Bounds, Query};
use shared::http::secret;
use shared::sandbox::session_key;
use shared::sandbox::store::SandboxStore;
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;
use shared::user::settings_document::{SecretChange, SettingsChanges};

/// More than a user may store.
const BODY_LIMIT: usize = 512 * 1024;
/// Which list page ids are of.
const LIST: &str = "secrets";
/// What this function may touch: settings, and sandboxes' session keys.
#[derive(Clone, Debug)]
pub struct Context {
    settings: SettingsStore,
    sandboxes: SandboxStore,
}

impl Context {
    /// A context on the configured tables.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let stores = Stores::new(&config.names, aws, sealer);
        Self { settings: stores.settings(), sandboxes: stores.sandboxes() }
    }
}

/// The routes of this function.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/settings", get(show).post(change))
        .route("/api/v1/secrets", post(put_secret))
        .route("/api/v1/secrets/search", get(search_secrets))
        .route("/api/v1/secrets/{secret_name}", put(change_secret).delete(delete_secret))
        .route("/api/v1/users/me", get(me))
        .route("/api/keys/current", get(current_key))
        .route("/api/organizations", get(organizations))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(context)
}

async fn show(State(context): State<Context>, Caller(user): Caller) -> Result<Json<Value>> {
    let document = context.settings.document(&user).await?;
    // Front ends open their first dialog then.
    let document = document.ok_or_else(|| Error::NotFound("Settings not found".to_owned()))?;
    Ok(Json(document.shown_with_flags()))
}

async fn change(
    State(context): State<Context>,
    Caller(user): Caller,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Json<Value>> {
    let changes = SettingsChanges::read(&json_body(&headers, &bytes)?).map_err(Error::Invalid)?;
    context.settings.change(&user, |document| document.change(&changes)).await?;
    Ok(Json(json!({"message": "Settings stored"})))
}

async fn search_secrets(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Value>> {
    let mut query = Query::parse(query.as_deref());
    let contains = query.string_up_to(secret::MAX_NAME, "name__contains");
    let page = query.string("page_id");
    let limit = query.integer("limit", 100, Bounds::PAGE);
    query.finish().map_err(Error::Invalid)?;
    let list = (LIST.to_owned(), contains);
    let after: Option<String> = page.map(|page| page_token::decode(&user, &page, &list)).transpose()?;
    let limit = usize::try_from(limit).unwrap_or(100);
    let document = context.settings.document(&user).await?.unwrap_or_default();
    let wanted = list.1.as_deref().unwrap_or_default().to_lowercase();
    let mut found: Vec<_> = document
        .secrets()
        .filter(|(name, _)| name.to_lowercase().contains(&wanted))
        .filter(|(name, _)| after.as_deref().is_none_or(|after| *name > after))
        .collect();
    let more = found.len() > limit;
    found.truncate(limit);
    let end = found.last().filter(|_| more).map(|(name, _)| (*name).to_owned());
    let next = end.map(|end| page_token::encode(&user, &list, &end)).transpose()?;
    let items: Vec<Value> =
        found.into_iter().map(|(name, description)| json!({"name": name, "description": description})).collect();
    Ok(Json(json!({"items": items, "next_page_id": next})))
}

/// Also for one that is there: front ends send a new value this way.
async fn put_secret(
    State(context): State<Context>,
    Caller(user): Caller,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Response> {
    let secret = SecretChange::read(&json_body(&headers, &bytes)?, None).map_err(Error::Invalid)?;
    let new = context.settings.change(&user, |document| document.put_secret(&secret)).await?;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(json!({"message": "Secret stored"}))).into_response())
}

async fn change_secret(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(name): Path<String>,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Json<Value>> {
    let secret = SecretChange::read(&json_body(&headers, &bytes)?, Some(&name)).map_err(Error::Invalid)?;
    context.settings.change(&user, |document| document.change_secret(&name, &secret)).await?;
    Ok(Json(json!({"message": "Secret updated"})))
}

async fn delete_secret(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(name): Path<String>,
) -> Result<Json<Value>> {
    context.settings.change(&user, |document| document.delete_secret(&name)).await?;
    Ok(Json(json!({"message": "Secret deleted"})))
}

/// The caller's settings and id. Secrets in clear are for the caller's own sandboxes alone, who show a session key.
async fn me(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Json<Value>> {
    let mut query = Query::parse(query.as_deref());
    let expose = query.boolean("expose_secrets", false);
    query.finish().map_err(Error::Invalid)?;
    if expose {
        context.check_session_key(&user, &headers).await?;
    }
    let document = context.settings.document(&user).await?.unwrap_or_default();
    let mut shown = document.shown(expose);
    shown.insert("id".to_owned(), user.shown().into());
    Ok(Json(Value::Object(shown)))
}

/// Whose credentials the request came with. Front ends take any answer for a sign that it is a good one, and look no further than
/// the organization, of which there are none.
async fn current_key(Caller(user): Caller) -> Json<Value> {
    Json(json!({"id": null, "name": null, "org_id": null, "user_id": user.shown(), "auth_type": null}))
}

/// Users are by themselves here.
async fn organizations(Caller(_): Caller) -> Json<Value> {
    Json(json!({"items": [], "current_org_id": null}))
}

impl Context {
    async fn check_session_key(&self, user: &UserId, headers: &HeaderMap) -> Result<()> {
        let sandbox = session_key::sandbox_of_request(&self.sandboxes, headers).await?;
        if sandbox.user != *user {
            let text = "Session API key does not belong to the authenticated user";
            return Err(Error::Forbidden(text.to_owned()));
        }
        Ok(())
    }
}

fn json_body(headers: &HeaderMap, bytes: &Bytes) -> Result<Value> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    body::json(content_type, bytes).map_err(Error::Invalid)
}
