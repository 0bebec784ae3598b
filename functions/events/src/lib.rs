//! Events: what agent servers tell (`/api/v1/webhooks`), and how it is read (`/api/v1/conversation/{id}/events`).

mod log;
mod webhooks;

use axum::extract::Path;
use axum::extract::rejection::PathRejection;
pub use log::router;
use shared::aws::Aws;
use shared::config::Config;
use shared::event::ingest::EventIngestor;
use shared::event::store::EventStore;
use shared::http::pydantic::validation::{self, Checked};
use shared::sandbox::store::SandboxStore;
use shared::stores::Stores;
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;
use uuid::Uuid;
pub use webhooks::webhooks_router;

/// What this function may touch: it reads sandboxes, settings and events, writes events and what they say of conversations,
/// and rings for what is to be done on them.
#[derive(Clone, Debug)]
pub struct Context {
    sandboxes: SandboxStore,
    settings: SettingsStore,
    events: EventStore,
    intake: EventIngestor,
    sealer: Sealer,
}

impl Context {
    /// A context on the configured tables and queue.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let stores = Stores::new(&config.names, aws, sealer);
        let events = stores.events();
        Self {
            sandboxes: stores.sandboxes(),
            settings: stores.settings(),
            intake: EventIngestor {
                conversations: stores.conversations(),
                events: events.clone(),
                queue: stores.queue(),
            },
            events,
            sealer: sealer.clone(),
        }
    }
}

/// The conversation in the path; one that is not UTF-8 is no UUID either.
fn conversation_id(path: Result<Path<String>, PathRejection>) -> Checked<Uuid> {
    let text = path.map_or_else(|_| char::REPLACEMENT_CHARACTER.into(), |Path(text)| text);
    validation::path_uuid("conversation_id", &text)
}
