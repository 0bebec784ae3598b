//! Serves the description of the API: `/openapi.json` for programs, and `/docs`, which is Swagger UI.

use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use axum::{Router, response::IntoResponse as _};
use utoipa_swagger_ui::{Config, SwaggerUi};

/// The OpenAPI document of `docs/`. `tests/it/openapi.rs` compares it with the routers and with their responses.
pub const DOCUMENT: &str = include_str!("../../../docs/openapi.json");

/// Both routes are public: they return no user's data.
pub fn router() -> Router {
    Router::new()
        .route("/openapi.json", get(async || ([(CONTENT_TYPE, "application/json")], DOCUMENT).into_response()))
        .merge(SwaggerUi::new("/docs").config(Config::from("/openapi.json")))
}
