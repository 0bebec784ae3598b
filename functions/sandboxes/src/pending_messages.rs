//! Messages that are kept until a conversation is ready.

use axum::Router;

use crate::Context;

pub(crate) fn router() -> Router<Context> {
    Router::new()
}
