//! Routes that a web front end reads before a user logs in: `GET /api/v1/web-client/config`, the schemas of the settings, health checks; and
//! lists that front ends read: models and providers of models, and some that are empty here: repositories, profiles.

mod models;
mod schema;

use axum::extract::{RawQuery, State};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use serde_json::Value;
use shared::clock::Time;
use shared::config;
use shared::error::{Error, Result};
use shared::http::extract::PageRequest;
use shared::http::page::PageOut;
use shared::http::pydantic::query::Query;

pub use crate::models::{ModelOut, ProviderOut};
pub use crate::schema::SettingsSchemaOut;

/// The configuration of this function.
#[derive(Clone, Debug)]
pub struct Context {
    app_mode: String,
    started_at: Time,
}

impl Context {
    /// Reads `OH_APP_MODE`, which front ends read to decide whether to show a login: `oss`, the default, means no login.
    #[must_use]
    pub fn from_env() -> Self {
        Self { app_mode: config::text("OH_APP_MODE").unwrap_or_else(|| "oss".to_owned()), started_at: Time::now() }
    }

    fn server_info(&self) -> ServerInfoOut {
        ServerInfoOut {
            title: "openhands-lambda",
            version: env!("CARGO_PKG_VERSION"),
            uptime: Time::now().since(self.started_at).as_secs_f64(),
            idle_time: 0,
        }
    }
}

/// The routes of this function. None of them reveals data of a user.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/web-client/config", get(web_client_config))
        .route("/api/v1/config/models/search", get(models::search_models))
        .route("/api/v1/config/providers/search", get(models::search_providers))
        .route("/api/v1/git/repositories/search", get(empty_page))
        .route("/api/v1/git/branches/search", get(empty_page))
        .route("/api/v1/git/installations/search", get(empty_page))
        .route("/api/v1/git/suggested-tasks/search", get(empty_page))
        .route("/api/v1/settings/agent-schema", get(async || Json(schema::agent())))
        .route("/api/v1/settings/conversation-schema", get(async || Json(schema::conversation())))
        .route("/server_info", get(server_info))
        .with_state(context)
}

/// The health checks of a Lambda function, which has no other parts that must start first.
pub fn health_router() -> Router {
    Router::new()
        .route("/alive", get(alive))
        .route("/health", get(async || Json("OK")))
        .route("/ready", get(async || Json(ReadyOut { ready: true })))
}

/// The configuration of a web front end: `WebClientConfig` of the contract.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = WebClientConfig))]
pub struct WebClientConfigOut {
    /// `oss` or `saas`.
    app_mode: String,
    posthog_client_key: Option<String>,
    feature_flags: FeatureFlagsOut,
    providers_configured: Vec<String>,
    maintenance_start_time: Option<String>,
    auth_url: Option<String>,
    recaptcha_site_key: Option<String>,
    faulty_models: Vec<String>,
    error_message: Option<String>,
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    updated_at: Time,
    github_app_slug: Option<String>,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    kind: &'static str,
}

/// The optional features of a web front end. This server supports none of them, and hides no page.
#[derive(Clone, Debug, Default, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = FeatureFlags))]
#[expect(clippy::struct_excessive_bools, reason = "the contract's form")]
pub struct FeatureFlagsOut {
    enable_billing: bool,
    hide_llm_settings: bool,
    enable_jira: bool,
    enable_jira_dc: bool,
    enable_linear: bool,
    hide_users_page: bool,
    hide_billing_page: bool,
    hide_integrations_page: bool,
}

async fn web_client_config(State(context): State<Context>) -> Json<WebClientConfigOut> {
    Json(WebClientConfigOut {
        app_mode: context.app_mode,
        posthog_client_key: None,
        feature_flags: FeatureFlagsOut::default(),
        providers_configured: Vec::new(),
        maintenance_start_time: None,
        auth_url: None,
        recaptcha_site_key: None,
        faulty_models: Vec::new(),
        error_message: None,
        updated_at: context.started_at,
        github_app_slug: None,
        kind: "WebClientConfig",
    })
}

/// Returns a list that is empty here: users type the names of repositories.
async fn empty_page(RawQuery(query): RawQuery) -> Result<Json<PageOut<Value>>> {
    let mut query = Query::parse(query.as_deref());
    let page = PageRequest::read(&mut query);
    query.finish().map_err(Error::Invalid)?;
    page.only_page()?;
    Ok(Json(PageOut::new(Vec::new(), None)))
}

/// The response of `/alive`.
#[derive(Clone, Copy, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Alive))]
pub struct AliveOut {
    /// `ok`.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    status: &'static str,
}

async fn alive() -> Json<AliveOut> {
    Json(AliveOut { status: "ok" })
}

/// The response of `/ready`.
#[derive(Clone, Copy, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Ready))]
pub struct ReadyOut {
    ready: bool,
}

/// The version of the server and how long it has been running.
#[derive(Clone, Copy, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = ServerInfo))]
pub struct ServerInfoOut {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    title: &'static str,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    version: &'static str,
    /// In seconds.
    uptime: f64,
    /// In seconds: always 0, because the request itself is activity.
    idle_time: u64,
}

async fn server_info(State(context): State<Context>) -> Json<ServerInfoOut> {
    Json(context.server_info())
}
