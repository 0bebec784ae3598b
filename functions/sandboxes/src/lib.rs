//! `/api/v1/sandboxes` and `/api/v1/sandbox-specs`: the machines that conversations run in.

mod sandboxes;
mod secrets;
mod specs;

use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post};
use shared::aws::Aws;
use shared::config::Config;
use shared::sandbox::spec::{SandboxSpec, specs};
use shared::sandbox::store::SandboxStore;
use shared::sandbox::{self, SandboxService};
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;

/// What this function may touch: it makes and changes sandboxes, and reads the settings of their owners for the agents in them.
#[derive(Clone, Debug)]
pub struct Context {
    sandboxes: Arc<dyn SandboxService>,
    records: SandboxStore,
    settings: SettingsStore,
    specs: Vec<SandboxSpec>,
}

impl Context {
    /// A context on the configured tables and sandboxes.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let names = &config.names;
        let records = SandboxStore::new(aws.dynamodb.clone(), names.sandboxes.clone(), sealer.clone());
        Self {
            sandboxes: sandbox::service(&config.sandbox, records.clone()),
            records,
            settings: SettingsStore::new(aws.dynamodb.clone(), names.users.clone(), sealer.clone()),
            specs: specs(&config.sandbox),
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
        .route("/api/v1/sandbox-specs", get(specs::batch_get))
        .route("/api/v1/sandbox-specs/search", get(specs::search))
        .with_state(context)
}

/// The routes of this function for the agents in sandboxes, who show their sandbox's session key; whoever else the request may be
/// from does not count.
pub fn secrets_router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/sandboxes/{sandbox_id}/settings/secrets", get(secrets::list))
        .route("/api/v1/sandboxes/{sandbox_id}/settings/secrets/{secret_name}", get(secrets::value))
        .with_state(context)
}
