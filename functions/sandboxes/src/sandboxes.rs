//! Sandboxes, and what they are made from.

use axum::Router;

use crate::Context;

pub(crate) fn router() -> Router<Context> {
    Router::new()
}
