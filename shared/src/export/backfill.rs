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

/// The warning of an export that lacks events that the log does not accept.
pub const UNREADABLE: &str = "The agent server returned events that cannot be read: the export lacks them.";

/// Events per request to an agent server. One event can be large, and so can a response with many.
const PAGE: usize = 20;

/// Compares an agent server's log with the stored log, newest first.
#[derive(Clone, Debug)]
pub(super) struct Backfill {
    pub(super) sandboxes: Arc<dyn SandboxService>,
    pub(super) http: HttpClient,
    pub(super) events: EventStore,
}

/// The events of one or more pages of an agent server.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Backfilled {
    /// The number of events that the log accepts.
    accepted: usize,
    /// The number of those that it did not have.
    pub(super) appended: usize,
    /// The number of events that the log does not accept.
    pub(super) unreadable: usize,
}

impl Backfilled {
    fn add(&mut self, page: Self) {
        self.accepted += page.accepted;
        self.appended += page.appended;
        self.unreadable += page.unreadable;
    }

    /// Whether no earlier event is missing: batches arrive in order, and the log has every event of this page.
    fn is_complete(&self) -> bool {
        self.accepted > 0 && self.appended == 0
    }
}

impl Backfill {
    /// Appends the missing events and returns what it has found. When the newest event is stored already, one request is enough.
    ///
    /// # Errors
    /// When the agent server or the store does not respond; events that were fetched before stay stored.
    pub(super) async fn run(&self, record: &ConversationRecord) -> Result<Backfilled> {
        let sandbox = self.sandboxes.get(&record.user, &record.sandbox_id).await?;
        let Some(agent_server) = sandbox.and_then(|sandbox| sandbox.agent_server(&self.http)) else {
            return Ok(Backfilled::default());
        };
        let request = async |page: Option<&str>, limit| agent_server.newest_events(record.id, page, limit).await;
        let newest = match request(None, 1).await {
            // The agent server does not have the conversation, so it has no events of it.
            Err(AgentServerError { failure: Failure::Status(status, _), .. })
                if status == http::StatusCode::NOT_FOUND =>
            {
                return Ok(Backfilled::default());
            }
            newest => newest.map_err(upstream)?,
        };
        let mut backfilled = self.append_missing(record, &newest).await?;
        if backfilled.is_complete() {
            return Ok(backfilled);
        }
        let mut page_id = newest.next_page_id;
        while let Some(id) = page_id.take() {
            let page = request(Some(&id), PAGE).await.map_err(upstream)?;
            let appended = self.append_missing(record, &page).await?;
            backfilled.add(appended);
            page_id = page.next_page_id.filter(|next| !appended.is_complete() && *next != id);
        }
        Ok(backfilled)
    }

    async fn append_missing(&self, record: &ConversationRecord, page: &EventPage) -> Result<Backfilled> {
        let (mut events, mut unreadable) = (Vec::new(), 0);
        for item in &page.items {
            match event(item) {
                Some(event) if event.is_transient() => {}
                Some(event) => events.push(event),
                None => unreadable += 1,
            }
        }
        let ids: Vec<String> = events.iter().map(|event| event.id.clone()).collect();
        let known = self.events.known(&record.user, record.id, &ids).await?;
        let known: HashSet<String> = known.into_iter().collect();
        let missing: Vec<Event> = events.into_iter().filter(|event| !known.contains(&event.id)).collect();
        let backfilled = Backfilled { accepted: ids.len(), appended: missing.len(), unreadable };
        self.events.append(&record.user, record.id, missing).await?;
        Ok(backfilled)
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
    Some(event)
}

#[expect(clippy::needless_pass_by_value, reason = "the signature that `map_err` calls")]
fn upstream(error: AgentServerError) -> Error {
    Error::Upstream { message: "The agent server did not respond".into(), context: error.to_string() }
}
