//! What a web front end asks for before anybody is known: `GET /api/v1/web-client/config`, what settings there are, whether the
//! server runs; and lists that it reads and that are empty here: models, repositories, profiles, skills.

mod schema;

use axum::extract::{RawQuery, State};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use shared::clock::Time;
use shared::config;
use shared::error::{Error, Result};
use shared::http::page_token;
use shared::http::pydantic::query::{Bounds, Query};

/// What this function knows.
#[derive(Clone, Debug)]
pub struct Context {
    app_mode: String,
    began: Time,
}

impl Context {
    /// Reads `OH_APP_MODE`, by which a front end knows whether there is a login: `oss` (there is none) unless it is set.
    #[must_use]
    pub fn from_env() -> Self {
        Self { app_mode: config::text("OH_APP_MODE").unwrap_or_else(|| "oss".to_owned()), began: Time::now() }
    }

    /// What runs, and since when.
    fn server_info(&self) -> Value {
        json!({
            "title": "openhands-lambda",
            "version": env!("CARGO_PKG_VERSION"),
            "uptime": Time::now().since(self.began).as_secs_f64(),
            // Whoever asks ends it.
            "idle_time": 0,
        })
    }
}

/// The routes of this function. None of them tells anything of a user.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/web-client/config", get(web_client_config))
        .route("/api/v1/skills/search", get(empty_page))
        .route("/api/v1/config/models/search", get(empty_page))
        .route("/api/v1/config/providers/search", get(empty_page))
        .route("/api/v1/git/repositories/search", get(empty_page))
        .route("/api/v1/git/branches/search", get(empty_page))
        .route("/api/v1/git/installations/search", get(empty_page))
        .route("/api/v1/git/suggested-tasks/search", get(empty_page))
        .route("/api/v1/settings/profiles", get(profiles))
        .route("/api/v1/settings/agent-schema", get(async || Json(schema::agent())))
        .route("/api/v1/settings/conversation-schema", get(async || Json(schema::conversation())))
        .route("/api/agent-profiles", get(agent_profiles))
        .route("/server_info", get(server_info))
        .with_state(context)
}

/// Whether it runs, where nothing else has to come up with it: a function that answers is all there.
pub fn health_router() -> Router {
    Router::new()
        .route("/alive", get(alive))
        .route("/health", get(async || Json("OK")))
        .route("/ready", get(async || Json(json!({"ready": true}))))
}

/// `WebClientConfig`
async fn web_client_config(State(context): State<Context>) -> Json<Value> {
    Json(json!({
        "app_mode": context.app_mode,
        "posthog_client_key": null,
        "feature_flags": {
            "enable_billing": false,
            "hide_llm_settings": false,
            "enable_jira": false,
            "enable_jira_dc": false,
            "enable_linear": false,
            "hide_users_page": false,
            "hide_billing_page": false,
            "hide_integrations_page": false,
        },
        "providers_configured": [],
        "maintenance_start_time": null,
        "auth_url": null,
        "recaptcha_site_key": null,
        "faulty_models": [],
        "error_message": null,
        "updated_at": context.began,
        "github_app_slug": null,
        "kind": "WebClientConfig",
    }))
}

/// A list that is empty here: models and providers are what a user types, repositories are named by hand, and the skills of
/// agents are in their sandboxes.
async fn empty_page(RawQuery(query): RawQuery) -> Result<Json<Value>> {
    let mut query = Query::parse(query.as_deref());
    let page = query.string("page_id");
    let _limit = query.integer("limit", 100, Bounds::PAGE);
    query.finish().map_err(Error::Invalid)?;
    match page {
        Some(_) => Err(page_token::not_ours()),
        None => Ok(Json(json!({"items": [], "next_page_id": null}))),
    }
}

/// Later versions have profiles of models; here there is one model, in the settings.
async fn profiles() -> Json<Value> {
    Json(json!({"profiles": [], "active_profile": null}))
}

/// Later versions have profiles; front ends send their first message only if this answers.
async fn agent_profiles() -> Json<Value> {
    Json(json!({"profiles": [], "active_agent_profile_id": null}))
}

/// Whether the process runs.
async fn alive() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// What runs, and since when.
async fn server_info(State(context): State<Context>) -> Json<Value> {
    Json(context.server_info())
}
