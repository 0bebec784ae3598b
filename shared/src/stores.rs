//! The composition root: builds every store and client of a deployment from its configuration.
//!
//! A process without the sealing key gets a [`Stores<NoKey>`], which has no method for a store that seals or opens secrets.

use std::sync::Arc;

use crate::aws::Aws;
use crate::config::{Config, ExportConfig, Names, SandboxConfig, StartConfig};
use crate::conversation::store::ConversationStore;
use crate::deletion::{Deleter, Deletion};
use crate::dynamo::INDEX_LAG;
use crate::event::follow_up::FollowUp;
use crate::event::ingest::EventIngestor;
use crate::event::store::EventStore;
use crate::export::store::ExportStore;
use crate::export::{ExportJobs, Exporter};
use crate::http_client::HttpClient;
use crate::jobs::queue::JobQueue;
use crate::pending_message::delivery::{Messages, Timing};
use crate::pending_message::store::MessageStore;
use crate::sandbox::boots::BootObserver;
use crate::sandbox::reconciler::SandboxReconciler;
use crate::sandbox::store::SandboxStore;
use crate::sandbox::{self, SandboxService};
use crate::start::create::StartService;
use crate::start::saga::Saga;
use crate::start::store::StartTaskStore;
use crate::user::api_key::ApiKeyStore;
use crate::user::seal::Sealer;
use crate::user::settings::SettingsStore;

/// In place of a [`Sealer`]: the process has no sealing key.
#[derive(Clone, Copy, Debug)]
pub struct NoKey;

/// The stores of one deployment. `K` is its [`Sealer`], or [`NoKey`].
#[derive(Clone, Debug)]
pub struct Stores<K = Sealer> {
    names: Names,
    aws: Aws,
    key: K,
}

impl Stores<NoKey> {
    #[must_use]
    pub fn without_key(names: &Names, aws: &Aws) -> Self {
        Self { names: names.clone(), aws: aws.clone(), key: NoKey }
    }

    /// Start tasks, to be listed. Secrets of their requests cannot be opened.
    #[must_use]
    pub fn start_tasks_without_secrets(&self) -> StartTaskStore {
        self.start_tasks_with(Sealer::ephemeral())
    }
}

impl<K> Stores<K> {
    #[must_use]
    pub fn conversations(&self) -> ConversationStore {
        let Names { conversations, users, .. } = &self.names;
        ConversationStore::new(self.aws.dynamodb.clone(), conversations.clone(), users.clone())
    }

    #[must_use]
    pub fn events(&self) -> EventStore {
        let Names { events, bucket, .. } = &self.names;
        EventStore::new(self.aws.dynamodb.clone(), events.clone(), self.aws.s3.clone(), bucket.clone())
    }

    #[must_use]
    pub fn exports(&self) -> ExportStore {
        let Names { users, bucket, .. } = &self.names;
        ExportStore::new(self.aws.dynamodb.clone(), users.clone(), self.aws.s3.clone(), bucket.clone())
    }

    /// Pending messages.
    #[must_use]
    pub fn messages(&self) -> MessageStore {
        let Names { users, bucket, .. } = &self.names;
        MessageStore::new(self.aws.dynamodb.clone(), users.clone(), self.aws.s3.clone(), bucket.clone())
    }

    #[must_use]
    pub fn api_keys(&self) -> ApiKeyStore {
        ApiKeyStore::new(self.aws.dynamodb.clone(), self.names.users.clone())
    }

    /// The job queue.
    #[must_use]
    pub fn queue(&self) -> JobQueue {
        JobQueue::new(self.aws.sqs.clone(), self.names.job_queue_url.clone())
    }

    /// The queue of exports.
    #[must_use]
    pub fn export_queue(&self) -> JobQueue {
        JobQueue::new(self.aws.sqs.clone(), self.names.export_queue_url.clone())
    }

    /// Builds exports outside requests.
    #[must_use]
    pub fn export_jobs(&self, config: &ExportConfig) -> ExportJobs {
        ExportJobs::new(config, self.conversations(), self.events(), self.exports())
    }

    #[must_use]
    pub fn deleter(&self) -> Deleter {
        Deleter { conversations: self.conversations(), queue: self.queue() }
    }

    /// Builds exports of conversations that run in these sandboxes.
    #[must_use]
    pub fn exporter(&self, config: &ExportConfig, sandboxes: Arc<dyn SandboxService>, http: HttpClient) -> Exporter {
        let (conversations, events) = (self.conversations(), self.events());
        Exporter::new(config, conversations, events, self.exports(), self.export_queue(), sandboxes, http)
    }

    fn start_tasks_with(&self, sealer: Sealer) -> StartTaskStore {
        let Names { start_tasks, users, bucket, .. } = &self.names;
        let (dynamodb, s3) = (self.aws.dynamodb.clone(), self.aws.s3.clone());
        StartTaskStore::new(dynamodb, start_tasks.clone(), users.clone(), s3, bucket.clone(), sealer)
    }
}

impl Stores {
    #[must_use]
    pub fn new(names: &Names, aws: &Aws, sealer: &Sealer) -> Self {
        Self { names: names.clone(), aws: aws.clone(), key: sealer.clone() }
    }

    #[must_use]
    pub fn start_tasks(&self) -> StartTaskStore {
        self.start_tasks_with(self.key.clone())
    }

    /// Records of sandboxes, with their session keys.
    #[must_use]
    pub fn sandboxes(&self) -> SandboxStore {
        SandboxStore::new(self.aws.dynamodb.clone(), self.names.sandboxes.clone(), self.key.clone())
    }

    /// The sandboxes of the configured provider.
    #[must_use]
    pub fn sandbox_service(&self, config: &SandboxConfig) -> Arc<dyn SandboxService> {
        sandbox::service(config, self.sandboxes())
    }

    /// The sandboxes of the configured provider, for a function that only shows them.
    #[must_use]
    pub fn sandbox_viewer(&self, config: &SandboxConfig) -> Arc<dyn SandboxService> {
        sandbox::viewer(config, self.sandboxes())
    }

    /// Deletes these sandboxes when they are not used any more.
    #[must_use]
    pub fn sandbox_reconciler(&self, sandboxes: Arc<dyn SandboxService>) -> SandboxReconciler {
        SandboxReconciler { records: self.sandboxes(), sandboxes, queue: self.queue(), idle: None }
    }

    #[must_use]
    pub fn settings(&self) -> SettingsStore {
        SettingsStore::new(self.aws.dynamodb.clone(), self.names.users.clone(), self.key.clone())
    }

    #[must_use]
    pub fn start_service(&self, config: &Config) -> StartService {
        StartService {
            conversations: self.conversations(),
            tasks: self.start_tasks(),
            sandboxes: self.sandboxes(),
            queue: self.queue(),
            settings: self.settings(),
            allow_insecure_git_access: config.start.allow_insecure_git_access,
            step_timeout: config.start.step_timeout,
            max_unfinished: config.start.max_unfinished_starts,
        }
    }

    /// The saga of starts whose conversations run in these sandboxes.
    #[must_use]
    pub fn saga(&self, sandboxes: Arc<dyn SandboxService>, http: HttpClient, config: &StartConfig) -> Saga {
        Saga {
            tasks: self.start_tasks(),
            conversations: self.conversations(),
            reconciler: self.sandbox_reconciler(sandboxes.clone()),
            boots: BootObserver {
                store: self.sandboxes().boots(),
                sandboxes: sandboxes.clone(),
                queue: self.queue(),
                http: http.clone(),
            },
            sandboxes,
            settings: self.settings(),
            queue: self.queue(),
            http,
            sealer: self.key.clone(),
            config: config.clone(),
        }
    }

    /// Deletes conversations that run in these sandboxes.
    #[must_use]
    pub fn deletion(&self, sandboxes: Arc<dyn SandboxService>, http: HttpClient) -> Deletion {
        Deletion {
            deleter: self.deleter(),
            tasks: self.start_tasks(),
            events: self.events(),
            exports: self.exports(),
            messages: self.messages(),
            reconciler: self.sandbox_reconciler(sandboxes.clone()),
            sandboxes,
            http,
            index_lag: INDEX_LAG,
        }
    }

    /// Polls the agent servers in these sandboxes, and processes their events.
    #[must_use]
    pub fn follow_up(&self, sandboxes: Arc<dyn SandboxService>, http: HttpClient) -> FollowUp {
        FollowUp {
            conversations: self.conversations(),
            events: self.events(),
            sandboxes,
            queue: self.queue(),
            ingestor: self.event_ingestor(),
            http,
        }
    }

    /// Ingests the reports of agent servers.
    #[must_use]
    pub fn event_ingestor(&self) -> EventIngestor {
        EventIngestor {
            conversations: self.conversations(),
            events: self.events(),
            sandboxes: self.sandboxes(),
            queue: self.queue(),
        }
    }

    /// Stores and delivers pending messages of conversations that run in these sandboxes.
    #[must_use]
    pub fn message_delivery(&self, sandboxes: Arc<dyn SandboxService>, http: HttpClient) -> Messages {
        Messages {
            store: self.messages(),
            tasks: self.start_tasks(),
            conversations: self.conversations(),
            sandboxes,
            queue: self.queue(),
            http,
            timing: Timing::default(),
        }
    }
}
