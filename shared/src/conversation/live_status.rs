//! Live status of conversations: joins a page of records with their sandboxes and the responses of the agent servers.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use secrecy::ExposeSecret as _;
use uuid::Uuid;

use super::{AppConversation, ConversationRecord};
use crate::error::Result;
use crate::http_client::HttpClient;
use crate::id::{self, UserId};
use crate::sandbox::{Sandbox, SandboxService};

/// An agent server accepts fewer than 100 ids per request.
const IDS_PER_REQUEST: usize = 99;

/// Joins records with their live status.
#[derive(Clone, Debug)]
pub struct LiveStatus {
    sandboxes: Arc<dyn SandboxService>,
    http: HttpClient,
    budget: Duration,
}

impl LiveStatus {
    /// `budget` is the total time that all agent servers have to respond for one page.
    #[must_use]
    pub fn new(sandboxes: Arc<dyn SandboxService>, http: HttpClient, budget: Duration) -> Self {
        Self { sandboxes, http, budget }
    }

    /// Sends the record's title to its agent server if the sandbox is running; best effort.
    ///
    /// # Errors
    /// When the lookup of the sandbox fails.
    pub async fn send_title(&self, record: &ConversationRecord, title: &str) -> Result<()> {
        let sandbox = self.sandboxes.get(&record.user, &record.sandbox_id).await?;
        let Some(agent_server) = sandbox.and_then(|sandbox| sandbox.agent_server(&self.http)) else { return Ok(()) };
        if let Err(error) = agent_server.set_title(record.id, title, self.budget).await {
            tracing::warn!(conversation = %record.id, %error, "conversation.title_not_sent");
        }
        Ok(())
    }

    /// Converts records to the contract's form. If an agent server does not respond in time, only its own conversations lack their
    /// `execution_status`.
    ///
    /// # Errors
    /// When the lookup of the sandboxes fails.
    pub async fn show(&self, user: &UserId, records: Vec<ConversationRecord>) -> Result<Vec<AppConversation>> {
        let mut by_sandbox: HashMap<String, Vec<Uuid>> = HashMap::new();
        for record in &records {
            by_sandbox.entry(record.sandbox_id.clone()).or_default().push(record.id);
        }
        let ids: Vec<String> = by_sandbox.keys().cloned().collect();
        let sandboxes: HashMap<String, Sandbox> = self
            .sandboxes
            .batch_get(user, &ids)
            .await?
            .into_iter()
            .flatten()
            .map(|sandbox| (sandbox.id.clone(), sandbox))
            .collect();
        let asked = sandboxes
            .values()
            .filter_map(|sandbox| Some((sandbox, sandbox.agent_server(&self.http)?, by_sandbox.get(&sandbox.id)?)))
            .flat_map(|(sandbox, agent_server, ids)| {
                ids.chunks(IDS_PER_REQUEST).map(move |ids| (sandbox, agent_server.clone(), ids))
            })
            .map(async |(sandbox, agent_server, ids)| {
                agent_server.conversations(ids, self.budget).await.unwrap_or_else(|error| {
                    tracing::warn!(sandbox = %sandbox.id, %error, "conversation.live_status_unknown");
                    Vec::new()
                })
            });
        let statuses: HashMap<Uuid, Option<String>> = join_all(asked)
            .await
            .into_iter()
            .flatten()
            .flatten()
            .map(|conversation| (conversation.id, conversation.execution_status))
            .collect();
        Ok(records
            .into_iter()
            .map(|record| {
                let mut shown = AppConversation::without_sandbox(record);
                if let Some(sandbox) = sandboxes.get(&shown.sandbox_id) {
                    shown.sandbox_status = sandbox.status;
                    shown.execution_status = statuses.get(&shown.id).cloned().flatten();
                    shown.conversation_url =
                        sandbox.agent_server_url().map(|url| format!("{url}/api/conversations/{}", id::hex(shown.id)));
                    if sandbox.exposed_urls.as_ref().is_some_and(|urls| !urls.is_empty()) {
                        shown.session_api_key =
                            sandbox.session_api_key.as_ref().map(|key| key.expose_secret().to_owned());
                    }
                }
                shown
            })
            .collect())
    }
}
