//! `/api/v1/sandboxes` and `/api/v1/sandbox-specs`: the sandboxes of conversations. Also the queue of messages for conversations that
//! are not ready, and the cloud proxy, through which web pages reach the agent servers of sandboxes.

mod cloud_proxy;
mod pending_messages;
mod sandboxes;
mod secrets;
mod specs;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use shared::aws::Aws;
use shared::config::Config;
use shared::http_client::HttpClient;
use shared::pending_message::delivery::Messages;
use shared::sandbox::SandboxService;
use shared::sandbox::reconciler::SandboxReconciler;
use shared::sandbox::spec::{SandboxSpec, specs};
use shared::sandbox::store::SandboxStore;
use shared::stores::Stores;
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;

pub use crate::pending_messages::MessageQueuedOut;
pub use crate::sandboxes::SandboxOut;
pub use crate::secrets::SecretNamesOut;

/// The largest body, in bytes: a message may hold images.
const BODY_LIMIT: usize = 5 * 1024 * 1024;

/// What this function can access: it creates and changes sandboxes, reads the settings of their owners for the agents in them, and
/// queues messages.
#[derive(Clone, Debug)]
pub struct Context {
    sandboxes: Arc<dyn SandboxService>,
    reconciler: SandboxReconciler,
    records: SandboxStore,
    settings: SettingsStore,
    specs: Vec<SandboxSpec>,
    messages: Messages,
    sandbox_request_budget: Duration,
}

impl Context {
    /// A context on the configured tables and sandboxes.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let stores = Stores::new(&config.names, aws, sealer);
        let sandboxes = stores.sandbox_service(&config.sandbox);
        let http = HttpClient::new(config.address_policy);
        Self {
            messages: stores.message_delivery(sandboxes.clone(), http),
            reconciler: stores.sandbox_reconciler(sandboxes.clone()),
            sandboxes,
            records: stores.sandboxes(),
            settings: stores.settings(),
            specs: specs(&config.sandbox),
            sandbox_request_budget: config.sandbox_request_budget,
        }
    }
}

/// The routes of this function for users.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/sandboxes", get(sandboxes::batch_get).post(sandboxes::start).delete(sandboxes::delete))
        .route("/api/v1/sandboxes/search", get(sandboxes::search))
        .route("/api/v1/sandboxes/{sandbox_id}", axum::routing::delete(sandboxes::delete_named))
        .route("/api/v1/sandboxes/{sandbox_id}/pause", post(sandboxes::pause))
        .route("/api/v1/sandboxes/{sandbox_id}/resume", post(sandboxes::resume))
        .route("/api/v1/conversations/{conversation_id}/pending-messages", post(pending_messages::enqueue))
        .route("/api/v1/sandbox-specs", get(specs::batch_get))
        .route("/api/v1/sandbox-specs/search", get(specs::search))
        .route("/api/cloud-proxy", post(cloud_proxy::proxy))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(context)
}

/// The routes of this function for the agents in sandboxes, authenticated by the sandbox's session key. All other credentials of a
/// request are ignored.
pub fn secrets_router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/sandboxes/{sandbox_id}/settings/secrets", get(secrets::list))
        .route("/api/v1/sandboxes/{sandbox_id}/settings/secrets/{secret_name}", get(secrets::value))
        .with_state(context)
}
