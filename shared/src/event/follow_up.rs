//! Follow-up jobs of events, which run outside the webhook request: polling the agent server for the title and metrics that it does not
//! report, and running event callback processors.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use uuid::Uuid;

use super::backfill::{self, Backfill, Backfilled, Reports};
use super::ingest::{ConversationReport, EventIngestor};
use super::store::{Cursor, Event, EventFilter, EventStore, SortOrder};
use crate::agent_server::AgentServer;
use crate::conversation::ConversationRecord;
use crate::conversation::fields::EventCallbackProcessor;
use crate::conversation::reports::{Lookup, Touch};
use crate::conversation::store::ConversationStore;
use crate::error::Result;
use crate::http_client::HttpClient;
use crate::id::UserId;
use crate::jobs::backfill_events::{BackfillEvents, TIME_LIMIT};
use crate::jobs::queue::JobQueue;
use crate::jobs::refresh_conversation::RefreshConversation;
use crate::sandbox::SandboxService;

/// From this attempt on, the job requests a generated title from the agent server. An agent's own title arrives within seconds after the
/// first message; or never, if version 1.15 has searched for that message before it was saved.
const GENERATE_FROM: usize = 3;
/// The timeout of generating a title, which needs a response of the model.
const GENERATE_TIMEOUT: Duration = Duration::from_secs(30);
const AGENT_SERVER_TIMEOUT: Duration = Duration::from_secs(10);
/// The number of events that are claimed in one write.
const PAGE: usize = 100;

/// Runs the jobs that follow events.
#[derive(Clone, Debug)]
pub struct FollowUp {
    pub conversations: ConversationStore,
    pub events: EventStore,
    pub sandboxes: Arc<dyn SandboxService>,
    pub queue: JobQueue,
    /// Applies the events that have not arrived.
    pub ingestor: EventIngestor,
    /// The client for agent servers.
    pub http: HttpClient,
}

impl FollowUp {
    /// Polls the conversation's agent server for values that it does not report by itself: the agent's metrics, and the title that it has
    /// found, which is stored unless a user has set a title. While there is no title, the job enqueues another attempt, up to a limit;
    /// later attempts make the agent server generate a title.
    ///
    /// # Errors
    /// [`crate::Error::Store`] or an error of the sandboxes; the call may be repeated.
    pub async fn refresh_from_agent_server(&self, job: &RefreshConversation) -> Result<()> {
        let RefreshConversation { user, conversation, attempt } = job;
        let (conversation, attempt) = (*conversation, *attempt);
        match self.conversations.lookup(user, conversation).await? {
            Lookup::Deleting => return Ok(()),
            // The start has not recorded the conversation yet, or has failed.
            Lookup::Absent => {}
            Lookup::Present(known) => {
                let wants_title = known.has_default_title();
                if attempt == 0 {
                    // A batch before the one that called for this job may have been lost.
                    backfill::enqueue(&self.events, &self.queue, user, conversation).await?;
                }
                if attempt > 0 && !wants_title && known.is_stats_reported {
                    return Ok(());
                }
                let agent_server = self.agent_server(&known.record).await?;
                let report = match &agent_server {
                    Some(agent_server) => report(agent_server, conversation).await,
                    None => None,
                };
                // If no event reports metrics, polling is their only source.
                let wants_stats = report.is_none() && agent_server.is_some() && !known.is_stats_reported;
                if let Some(report) = &report {
                    report.apply(&self.conversations, user, Touch::Now).await?;
                }
                let title = match (report, agent_server) {
                    (Some(ConversationReport { title: None, .. }), Some(agent_server)) if attempt >= GENERATE_FROM => {
                        generated_title(&agent_server, conversation).await
                    }
                    (report, _) => report.and_then(|report| report.title),
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
        let Some((next, delay)) = job.retry() else {
            tracing::info!(%conversation, "conversation.refresh_ended");
            return Ok(());
        };
        self.queue.send(&next.into(), delay).await
    }

    /// Fetches the events that the conversation's agent server has and that have not arrived, and applies them like those of a webhook. If
    /// the agent server does not respond, the job enqueues another attempt, up to a limit.
    ///
    /// # Errors
    /// [`crate::Error::Store`]; the call may be repeated.
    pub async fn fetch_missing_events(&self, job: &BackfillEvents) -> Result<()> {
        let BackfillEvents { user, conversation, .. } = job;
        let Lookup::Present(known) = self.conversations.lookup(user, *conversation).await? else { return Ok(()) };
        let run = async {
            let record = &known.record;
            let sandbox = self.sandboxes.inspect(&record.user, &record.sandbox_id).await?;
            let Some(agent_server) = sandbox.and_then(|sandbox| sandbox.agent_server(&self.http)) else {
                return Ok(Backfilled::default());
            };
            let (sandboxes, http, events) = (self.sandboxes.clone(), self.http.clone(), self.events.clone());
            let backfill = Backfill { sandboxes, http, events };
            backfill.run(&agent_server, record, Reports::Applied(&self.ingestor, &known)).await
        };
        let problem = match timeout(TIME_LIMIT, run).await {
            Ok(Ok(Backfilled { appended, unreadable })) => {
                if appended > 0 || unreadable > 0 {
                    tracing::info!(%conversation, appended, unreadable, "event.backfilled");
                }
                return Ok(());
            }
            Ok(Err(error)) if error.is_upstream() => error.context(),
            Ok(Err(error)) => return Err(error),
            Err(_elapsed) => "it took too long".to_owned(),
        };
        tracing::warn!(%conversation, attempt = job.attempt, problem, "event.backfill_failed");
        match job.retry() {
            Some((next, delay)) => self.queue.send(&next.into(), delay).await,
            None => Ok(()),
        }
    }

    async fn agent_server(&self, record: &ConversationRecord) -> Result<Option<AgentServer>> {
        let sandbox = self.sandboxes.get(&record.user, &record.sandbox_id).await?;
        Ok(sandbox.and_then(|sandbox| sandbox.agent_server(&self.http)))
    }

    /// Logs the events up to a position that were not logged yet, in order, if the conversation's start requested it. Each event is claimed before it is
    /// logged and is therefore logged at most once, also by concurrent calls. A late event with a position before the claimed ones is not
    /// logged.
    ///
    /// # Errors
    /// [`crate::Error::Store`]; the call may be repeated.
    pub async fn process_events(&self, user: &UserId, conversation: Uuid, up_to: Option<&str>) -> Result<()> {
        loop {
            let Lookup::Present(known) = self.conversations.lookup(user, conversation).await? else { return Ok(()) };
            if !known.processors.contains(&EventCallbackProcessor::Logging) {
                return Ok(());
            }
            let from = known.processed_to;
            let after = from.clone().map(|position| Cursor { position });
            let everything = EventFilter::default();
            let order = SortOrder::Timestamp;
            let mut page = self.events.page(user, conversation, &everything, order, after.as_ref(), PAGE).await?;
            page.events.retain(|event| up_to.is_none_or(|up_to| event.position().as_str() <= up_to));
            let next =
                page.next.map(|next| next.position).filter(|next| up_to.is_none_or(|up_to| next.as_str() <= up_to));
            let Some(to) = next.or_else(|| page.events.last().map(Event::position)) else { return Ok(()) };
            if self.conversations.move_processed_to(user, conversation, from.as_deref(), &to).await? {
                for event in page.events {
                    tracing::info!(%conversation, event = event.id, kind = event.kind, "event.logged");
                }
            }
        }
    }
}

async fn report(agent_server: &AgentServer, conversation: Uuid) -> Option<ConversationReport> {
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
