//! `/api/v1/settings`, `/api/v1/secrets`, `/api/v1/users/me`: the settings, LLM profiles and secrets of a user. Also `/api/keys/current`
//! and `/api/organizations`, with which front ends check their credentials and permissions, and the list of skills.

mod agent_profiles;
mod git_providers;
mod organizations;
mod profiles;
mod skills;

use axum::extract::{DefaultBodyLimit, Path, RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use http::{HeaderMap, StatusCode};
use serde::Serialize;
use serde_json::Value;
use shared::aws::Aws;
use shared::config::Config;
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::extract::{JsonBody, PageRequest};
use shared::http::page::{self, PageOut};
use shared::http::pydantic::query::Query;
use shared::http::pydantic::validation::{Loc, Violation};
use shared::http::response::MessageOut;
use shared::http::secret::{self, SecretNameOut};
use shared::http_client::HttpClient;
use shared::sandbox::session_key;
use shared::sandbox::store::SandboxStore;
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::git::TokenChecker;
use shared::user::organization::organization_of;
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;
use shared::user::settings_document::{
    LEGACY_KEY, SecretChange, SettingsChanges, SettingsDocument, SettingsOut, UserOut,
};

pub use crate::agent_profiles::{
    AgentProfileActivatedOut, AgentProfileChangedOut, AgentProfileDiagnosticsOut, AgentProfileInfoOut, AgentProfileOut,
    AgentProfilesOut,
};
pub use crate::organizations::{OrganizationMeOut, OrganizationMemberOut, OrganizationOut, OrganizationsOut};
pub use crate::profiles::{ProfileActivatedOut, ProfileChangedOut, ProfileInfoOut, ProfileOut, ProfilesOut};
pub use crate::skills::SkillInfoOut;

/// The largest body, in bytes: more than a user may store.
const BODY_LIMIT: usize = 512 * 1024;
/// The list to which page ids belong.
const LIST: &str = "secrets";

/// What this function can access: settings, the session keys of sandboxes, and the APIs of git providers.
#[derive(Clone, Debug)]
pub struct Context {
    settings: SettingsStore,
    sandboxes: SandboxStore,
    tokens: TokenChecker,
}

impl Context {
    /// A context on the configured tables.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let stores = Stores::new(&config.names, aws, sealer);
        let http = HttpClient::new(config.address_policy);
        let tokens = TokenChecker::new(http, config.start.allow_insecure_git_access);
        Self { settings: stores.settings(), sandboxes: stores.sandboxes(), tokens }
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
        .route("/api/v1/skills/search", get(skills::search))
        .merge(agent_profiles::router())
        .merge(git_providers::router())
        .merge(organizations::router())
        .merge(profiles::router())
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(context)
}

async fn show(State(context): State<Context>, Caller(user): Caller) -> Result<Json<SettingsOut>> {
    let document = context.settings.document(&user).await?;
    // Front ends open their first dialog after this error.
    let document = document.ok_or_else(|| Error::NotFound("Settings not found".to_owned()))?;
    Ok(Json(document.show_settings()))
}

async fn change(
    State(context): State<Context>,
    Caller(user): Caller,
    JsonBody(changes): JsonBody<SettingsChanges>,
) -> Result<Response> {
    match context.settings.change(&user, |document| document.change(&changes)).await {
        Ok(()) => Ok(MessageOut::json("Settings stored").into_response()),
        Err(Error::Invalid(violations)) if violations.iter().all(|violation| violation.kind == LEGACY_KEY) => {
            Ok((StatusCode::UNPROCESSABLE_ENTITY, Json(LegacyKeysOut::of(violations))).into_response())
        }
        Err(error) => Err(error),
    }
}

/// The response to a body with keys in place of which merge patches are accepted: the form of the contract, and the violations.
#[derive(Debug, Serialize)]
struct LegacyKeysOut {
    error: String,
    keys: Vec<String>,
    detail: Vec<Violation>,
}

impl LegacyKeysOut {
    fn of(detail: Vec<Violation>) -> Self {
        let key = |violation: &Violation| match violation.loc.last() {
            Some(Loc::Key(key)) => key.clone().into_owned(),
            _ => String::new(),
        };
        let error = detail.first().map(|violation| violation.msg.clone()).unwrap_or_default();
        Self { error, keys: detail.iter().map(key).collect(), detail }
    }
}

async fn search_secrets(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<PageOut<SecretNameOut>>> {
    let mut query = Query::parse(query.as_deref());
    let contains = query.string_up_to(secret::MAX_NAME, "name__contains");
    let page = PageRequest::read(&mut query);
    query.finish().map_err(Error::Invalid)?;
    let page = page.of(&user, (LIST.to_owned(), contains));
    let after: Option<String> = page.after()?;
    let document = context.settings.document(&user).await?.unwrap_or_default();
    let wanted = page.list.1.as_deref().unwrap_or_default().to_lowercase();
    let mut found: Vec<_> = document
        .secrets()
        .filter(|(name, _)| name.to_lowercase().contains(&wanted))
        .filter(|(name, _)| after.as_deref().is_none_or(|after| *name > after))
        .collect();
    let has_more = found.len() > page.limit;
    found.truncate(page.limit);
    let last = found.last().filter(|_| has_more).map(|(name, _)| (*name).to_owned());
    let shown: Vec<SecretNameOut> = found
        .into_iter()
        .map(|(name, description)| SecretNameOut { name: name.to_owned(), description: description.map(str::to_owned) })
        .collect();
    // A user has few secrets with short descriptions: all of them fit into one response.
    Ok(Json(page::fitting(&shown)?.into_page(page.next_page_id(last)?)))
}

/// Creates a secret, or replaces its value: front ends send a new value this way.
async fn put_secret(
    State(context): State<Context>,
    Caller(user): Caller,
    JsonBody(body): JsonBody<Value>,
) -> Result<Response> {
    let secret = SecretChange::read(&body, None).map_err(Error::Invalid)?;
    let is_new = context.settings.change(&user, |document| document.put_secret(&secret)).await?;
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, MessageOut::json("Secret stored")).into_response())
}

async fn change_secret(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(name): Path<String>,
    JsonBody(body): JsonBody<Value>,
) -> Result<Json<MessageOut>> {
    let secret = SecretChange::read(&body, Some(&name)).map_err(Error::Invalid)?;
    context.settings.change(&user, |document| document.change_secret(&name, &secret)).await?;
    Ok(MessageOut::json("Secret updated"))
}

async fn delete_secret(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(name): Path<String>,
) -> Result<Json<MessageOut>> {
    context.settings.change(&user, |document| document.delete_secret(&name)).await?;
    Ok(MessageOut::json("Secret deleted"))
}

/// Returns the caller's settings and id. Secrets in clear are for the caller's own sandboxes only, which send their session key.
async fn me(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
    headers: HeaderMap,
) -> Result<Json<UserOut>> {
    let mut query = Query::parse(query.as_deref());
    let expose = query.boolean("expose_secrets", false);
    query.finish().map_err(Error::Invalid)?;
    if expose {
        context.check_session_key(&user, &headers).await?;
    }
    let document = context.settings.document(&user).await?.unwrap_or_default();
    Ok(Json(document.show_user(&user, expose)))
}

/// The API key of a request. Fields that this server has no values for are null.
#[derive(Clone, Debug, Default, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = CurrentKey))]
pub struct CurrentKeyOut {
    id: Option<String>,
    name: Option<String>,
    org_id: Option<String>,
    /// Null on a server of a single user.
    user_id: Option<String>,
    auth_type: Option<String>,
}

/// Front ends take every successful response as proof that the credentials are valid, and read only the organization: the caller's.
async fn current_key(Caller(user): Caller) -> Json<CurrentKeyOut> {
    Json(CurrentKeyOut {
        org_id: Some(organization_of(&user).to_string()),
        user_id: user.shown().map(str::to_owned),
        ..CurrentKeyOut::default()
    })
}

impl Context {
    /// Changes settings that exist.
    async fn change_existing<T>(
        &self,
        user: &UserId,
        change: impl Fn(&mut SettingsDocument) -> Result<T>,
    ) -> Result<T> {
        // Settings are never deleted: those that exist now exist when the change is stored.
        if self.settings.document(user).await?.is_none() {
            return Err(Error::NotFound("Settings not found".to_owned()));
        }
        self.settings.change(user, change).await
    }

    async fn check_session_key(&self, user: &UserId, headers: &HeaderMap) -> Result<()> {
        let sandbox = session_key::sandbox_of_request(&self.sandboxes, headers).await?;
        if sandbox.user != *user {
            let text = "Session API key does not belong to the authenticated user";
            return Err(Error::Forbidden(text.to_owned()));
        }
        Ok(())
    }
}
