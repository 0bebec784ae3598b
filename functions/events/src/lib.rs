//! Events: ingestion of agent servers' webhooks (`/api/v1/webhooks`) and the event log of a conversation
//! (`/api/v1/conversation/{id}/events`).

mod log;
mod webhooks;

pub use log::router;
use shared::aws::Aws;
use shared::config::Config;
use shared::conversation::store::ConversationStore;
use shared::event::ingest::EventIngestor;
use shared::event::store::EventStore;
use shared::jobs::queue::JobQueue;
use shared::sandbox::store::SandboxStore;
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;
pub use webhooks::webhooks_router;

/// What this function can access: it reads sandboxes, settings and events, writes events, updates conversation records from them, and
/// enqueues follow-up jobs.
#[derive(Clone, Debug)]
pub struct Context {
    sandboxes: SandboxStore,
    settings: SettingsStore,
    events: EventStore,
    ingestor: EventIngestor,
    sealer: Sealer,
}

impl Context {
    /// A context on the configured tables and queue.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let (names, dynamodb) = (&config.names, &aws.dynamodb);
        let events = EventStore::new(dynamodb.clone(), names.events.clone(), aws.s3.clone(), names.bucket.clone());
        Self {
            sandboxes: SandboxStore::new(dynamodb.clone(), names.sandboxes.clone(), sealer.clone()),
            settings: SettingsStore::new(dynamodb.clone(), names.users.clone(), sealer.clone()),
            ingestor: EventIngestor {
                conversations: ConversationStore::new(
                    dynamodb.clone(),
                    names.conversations.clone(),
                    names.users.clone(),
                ),
                events: events.clone(),
                queue: JobQueue::new(aws.sqs.clone(), names.job_queue_url.clone()),
            },
            events,
            sealer: sealer.clone(),
        }
    }
}
