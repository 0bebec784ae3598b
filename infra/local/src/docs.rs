//! The API's description for machines, `/openapi.json`, and for people, `/docs`.

use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use axum::{Router, response::IntoResponse as _};
use utoipa_swagger_ui::{Config, SwaggerUi};

/// The OpenAPI document, as it is in `docs/`. `tests/it/openapi.rs` compares it with the routers and with what they answer.
pub const DOCUMENT: &str = include_str!("../../../docs/openapi.json");

/// The routes; nobody needs credentials for them, and they tell nothing of anybody.
pub fn router() -> Router {
    Router::new()
        .route("/openapi.json", get(async || ([(CONTENT_TYPE, "application/json")], DOCUMENT).into_response()))
        .merge(SwaggerUi::new("/docs").config(Config::from("/openapi.json")))
}
