//! `/api/v1/sandboxes` and `/api/v1/sandbox-specs` (`sandboxes`), and messages for conversations that are not ready
//! (`pending_messages`).

mod pending_messages;
mod sandboxes;

use axum::Router;
use shared::aws::Aws;
use shared::config::Config;
use shared::user::seal::Sealer;

/// What this function may touch.
#[derive(Clone, Debug)]
pub struct Context {}

impl Context {
    /// A context on the configured tables and sandboxes.
    #[must_use]
    pub fn new(_config: &Config, _aws: &Aws, _sealer: &Sealer) -> Self {
        Self {}
    }
}

/// The routes of this function.
pub fn router(context: Context) -> Router {
    Router::new().merge(sandboxes::router()).merge(pending_messages::router()).with_state(context)
}
