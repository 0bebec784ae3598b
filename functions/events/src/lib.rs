//! Events: ingestion of agent servers' webhooks (`/api/v1/webhooks`) and the event log of a conversation
//! (`/api/v1/conversation/{id}/events`).

mod log;
mod webhooks;

pub use log::router;
use shared::aws::Aws;
use shared::config::Config;
use shared::event::ingest::EventIngestor;
use shared::event::store::EventStore;
use shared::jobs::queue::JobQueue;
use shared::sandbox::store::SandboxStore;
use shared::start::store::StartTaskStore;
use shared::stores::Stores;
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;
pub use webhooks::webhooks_router;

/// What this function can access: it reads sandboxes, settings, start tasks and events, writes events, updates conversation records
/// from them, and enqueues jobs.
#[derive(Clone, Debug)]
pub struct Context {
    sandboxes: SandboxStore,
    settings: SettingsStore,
    events: EventStore,
    ingestor: EventIngestor,
    tasks: StartTaskStore,
    queue: JobQueue,
    sealer: Sealer,
}

impl Context {
    /// A context on the configured tables and queue.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let stores = Stores::new(&config.names, aws, sealer);
        Self {
            sandboxes: stores.sandboxes(),
            settings: stores.settings(),
            ingestor: stores.event_ingestor(),
            events: stores.events(),
            tasks: stores.start_tasks(),
            queue: stores.queue(),
            sealer: sealer.clone(),
        }
    }
}
