//! What is done on the events of a conversation, off the request that brings them: the agent server is asked for what it does
//! not tell, and, for starts that asked for it, events are logged.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::ingest::ConversationReport;
use super::store::{Cursor, EventFilter, EventStore, SortOrder};
use crate::agent_server::AgentServer;
use crate::conversation::ConversationRecord;
use crate::conversation::fields::EventCallbackProcessor;
use crate::conversation::reports::Lookup;
use crate::conversation::store::ConversationStore;
use crate::error::Result;
use crate::http_client::HttpClient;
use crate::id::UserId;
use crate::jobs::queue::{Job, JobQueue};
use crate::sandbox::SandboxService;

/// How long after an event that calls for it the agent server is asked first.
pub const FIRST_DELAY: Duration = Duration::from_secs(3);
/// How long after one attempt the next one is, while there is no title: an agent makes its title without telling. The next
/// message begins anew.
const DELAYS: [Duration; 5] = [
    Duration::from_secs(3),
    Duration::from_secs(6),
    Duration::from_secs(12),
    Duration::from_secs(30),
    Duration::from_secs(60),
];
/// The attempt from which on the agent server is asked to find a title: an agent's own comes with the first message within seconds, or,
/// where version 1.15 has looked for that message before it was saved, never.
const GENERATE_FROM: usize = 3;
/// To find a title takes an answer of the model.
const GENERATE_TIMEOUT: Duration = Duration::from_secs(30);
const AGENT_SERVER_TIMEOUT: Duration = Duration::from_secs(10);
/// Events that are claimed at once.
const PAGE: usize = 100;

/// Does what is to be done on events.
#[derive(Clone, Debug)]
pub struct FollowUp {
    /// The conversations' records.
    pub conversations: ConversationStore,
    /// The log.
    pub events: EventStore,
    /// Where conversations run.
    pub sandboxes: Arc<dyn SandboxService>,
    /// Where later work is asked for.
    pub queue: JobQueue,
    /// For agent servers.
    pub http: HttpClient,
}

impl FollowUp {
    /// Asks the conversation's agent server for what it does not tell by itself: what its agent has used, and the title that
    /// it has found, which is taken unless somebody gave the conversation one. While there is no title, another attempt is
    /// asked for, up to a bound; later ones have it find one.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or what the sandboxes answer; it may be done again.
    pub async fn refresh_from_agent_server(&self, user: &UserId, conversation: Uuid, attempt: usize) -> Result<()> {
        match self.conversations.lookup(user, conversation).await? {
            Lookup::Deleting => return Ok(()),
            // Its start is about to record it, or nobody ever will.
            Lookup::Absent => {}
            Lookup::Present(known) => {
                let wants_title = known.has_default_title();
                if attempt > 0 && !wants_title && known.is_stats_reported {
                    return Ok(());
                }
                let agent_server = self.agent_server(&known.record).await?;
                let told = match &agent_server {
                    Some(agent_server) => told(agent_server, conversation).await,
                    None => None,
                };
                // Metrics that no event reports come from here alone.
                let wants_stats = told.is_none() && agent_server.is_some() && !known.is_stats_reported;
                if let Some(told) = &told {
                    told.apply(&self.conversations, user).await?;
                }
                let title = match (told, agent_server) {
                    (Some(ConversationReport { title: None, .. }), Some(agent_server)) if attempt >= GENERATE_FROM => {
                        generated_title(&agent_server, conversation).await
                    }
                    (told, _) => told.and_then(|told| told.title),
                };
                if let Some(title) = title.filter(|_| wants_title) {
                    let set = self.conversations.set_agent_title(user, conversation, &title).await?;
                    tracing::info!(%conversation, set, "conversation.title_found");
                    return Ok(());
                }
                if !wants_title && !wants_stats {
                    return Ok(());
                }
            }
        }
        let Some(delay) = DELAYS.get(attempt) else {
            tracing::info!(%conversation, "conversation.refresh_ended");
            return Ok(());
        };
        let job = Job::RefreshConversation { user: user.clone(), conversation, attempt: attempt + 1 };
        self.queue.send(&job, *delay).await
    }

    async fn agent_server(&self, record: &ConversationRecord) -> Result<Option<AgentServer>> {
        let sandbox = self.sandboxes.get(&record.user, &record.sandbox_id).await?;
        Ok(sandbox.and_then(|sandbox| sandbox.agent_server(&self.http)))
    }

    /// Logs the events that were not logged yet, in their order, if the conversation's start asked for it. Each is claimed
    /// before it is logged, so it is logged once at most, however often this is called and whoever calls it at the same
    /// time. An event whose place is before what was claimed already came too late and is not logged.
    ///
    /// # Errors
    /// [`crate::Error::Store`]; it may be done again.
    pub async fn process_events(&self, user: &UserId, conversation: Uuid) -> Result<()> {
        loop {
            let Lookup::Present(known) = self.conversations.lookup(user, conversation).await? else { return Ok(()) };
            if !known.processors.contains(&EventCallbackProcessor::Logging) {
                return Ok(());
            }
            let from = known.processed_to;
            let after = from.clone().map(|position| Cursor { position });
            let everything = EventFilter::default();
            let order = SortOrder::Timestamp;
            let page = self.events.page(user, conversation, &everything, order, after.as_ref(), PAGE).await?;
            let last =
                page.next.map(|next| next.position).or_else(|| page.events.last().map(super::store::Event::position));
            let Some(to) = last else { return Ok(()) };
            if self.conversations.move_processed_to(user, conversation, from.as_deref(), &to).await? {
                for event in page.events {
                    tracing::info!(%conversation, event = event.id, kind = event.kind, "event.logged");
                }
            }
        }
    }
}

async fn told(agent_server: &AgentServer, conversation: Uuid) -> Option<ConversationReport> {
    match agent_server.whole_conversation(conversation, AGENT_SERVER_TIMEOUT).await {
        Ok(found) => found.map(|found| ConversationReport::read(conversation, &found)),
        Err(error) => {
            tracing::warn!(%conversation, %error, "conversation.refresh_failed");
            None
        }
    }
}

async fn generated_title(agent_server: &AgentServer, conversation: Uuid) -> Option<String> {
    match agent_server.generate_title(conversation, GENERATE_TIMEOUT).await {
        Ok(title) => title.map(|title| title.trim().to_owned()).filter(|title| !title.is_empty()),
        Err(error) => {
            tracing::warn!(%conversation, %error, "conversation.no_title_generated");
            None
        }
    }
}
