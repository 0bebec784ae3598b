//! Backfill: fetches the events that an agent server has and has not posted yet. It posts its events some seconds late.

use std::collections::HashSet;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;

use crate::agent_server::{AgentServerError, EventPage, Failure};
use crate::conversation::ConversationRecord;
use crate::error::{Error, Result};
use crate::event::store::{Event, EventStore};
use crate::http_client::HttpClient;
use crate::sandbox::SandboxService;

/// The warning of an export that may lack the latest events.
pub const WARNING: &str =
    "The agent server did not return its latest events in time: the export lacks them unless they had arrived before.";

/// Events per request to an agent server. One event can be large, and so can a response with many.
const PAGE: usize = 20;

/// Compares an agent server's log with the stored log, newest first.
#[derive(Clone, Debug)]
pub(super) struct Backfill {
    pub(super) sandboxes: Arc<dyn SandboxService>,
    pub(super) http: HttpClient,
    pub(super) events: EventStore,
}

impl Backfill {
    /// Appends the missing events and returns their number. When the newest event is stored already, one request is enough.
    ///
    /// # Errors
    /// When the agent server or the store does not respond; events that were fetched before stay stored.
    pub(super) async fn run(&self, record: &ConversationRecord) -> Result<usize> {
        let sandbox = self.sandboxes.get(&record.user, &record.sandbox_id).await?;
        let Some(agent_server) = sandbox.and_then(|sandbox| sandbox.agent_server(&self.http)) else { return Ok(0) };
        let request = async |page: Option<&str>, limit| agent_server.newest_events(record.id, page, limit).await;
        let newest = match request(None, 1).await {
            // The agent server does not have the conversation, so it has no events of it.
            Err(AgentServerError { failure: Failure::Status(status, _), .. })
                if status == http::StatusCode::NOT_FOUND =>
            {
                return Ok(0);
            }
            newest => newest.map_err(upstream)?,
        };
        if self.append_missing(record, &newest).await? == 0 {
            return Ok(0);
        }
        // Batches arrive in order: if no event of a page is missing, no earlier event is missing.
        let (mut fetched, mut page_id) = (1, newest.next_page_id);
        while let Some(id) = page_id.take() {
            let page = request(Some(&id), PAGE).await.map_err(upstream)?;
            let missing = self.append_missing(record, &page).await?;
            fetched += missing;
            page_id = page.next_page_id.filter(|next| missing > 0 && *next != id);
        }
        Ok(fetched)
    }

    async fn append_missing(&self, record: &ConversationRecord, page: &EventPage) -> Result<usize> {
        let events: Vec<Event> = page.items.iter().filter_map(|item| event(item)).collect();
        let ids: Vec<String> = events.iter().map(|event| event.id.clone()).collect();
        let known = self.events.known(&record.user, record.id, &ids).await?;
        let known: HashSet<String> = known.into_iter().collect();
        let missing: Vec<Event> = events.into_iter().filter(|event| !known.contains(&event.id)).collect();
        let count = missing.len();
        self.events.append(&record.user, record.id, missing).await?;
        Ok(count)
    }
}

/// Converts an agent server's event without changes; `None` for one that the log does not accept.
fn event(item: &RawValue) -> Option<Event> {
    #[derive(Deserialize)]
    struct Head {
        id: String,
        timestamp: String,
        kind: String,
    }
    let head: Head =
        serde_json::from_str(item.get()).inspect_err(|error| tracing::warn!(%error, "export.event_unreadable")).ok()?;
    let event = Event { id: head.id, timestamp: head.timestamp, kind: head.kind, json: item.get().to_owned() };
    if let Some(fault) = event.fault() {
        tracing::warn!(fault, "export.event_unreadable");
        return None;
    }
    (!event.is_transient()).then_some(event)
}

#[expect(clippy::needless_pass_by_value, reason = "the signature that `map_err` calls")]
fn upstream(error: AgentServerError) -> Error {
    Error::Upstream { message: "The agent server did not respond".into(), context: error.to_string() }
}
