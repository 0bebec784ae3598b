//! Backfill: fetches the events that an agent server has and that have not arrived here. An agent server posts its events some seconds late;
//! and a batch that exceeds the gateway's limit never arrives, nor do those after it, because the agent server resends them together.

use std::sync::Arc;

use serde::Deserialize;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::ingest::EventIngestor;
use super::store::{Event, EventStore};
use crate::agent_server::{AgentServer, AgentServerError, EventPage, Failure};
use crate::clock::Time;
use crate::conversation::ConversationRecord;
use crate::conversation::reports::StoredConversation;
use crate::error::{Error, Result};
use crate::http_client::HttpClient;
use crate::id::UserId;
use crate::jobs::backfill_events::{BackfillEvents, DELAY};
use crate::jobs::queue::JobQueue;
use crate::sandbox::SandboxService;

/// Events per request to an agent server. If the response is too large, fewer are requested.
const PAGES: [usize; 3] = [20, 4, 1];
/// The most pages of one run. Earlier events are not fetched.
const MAX_PAGES: usize = 500;
/// The missing events that a run holds in memory at most, in bytes. Others are fetched a second time.
const HELD_BYTES: usize = 16 * 1024 * 1024;

/// Compares an agent server's log with the stored log, newest first.
#[derive(Clone, Debug)]
pub struct Backfill {
    pub sandboxes: Arc<dyn SandboxService>,
    pub http: HttpClient,
    pub events: EventStore,
}

/// What is done with missing events.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reports<'r> {
    /// They are only stored.
    Ignored,
    /// They are stored and applied like those of a webhook.
    Applied(&'r EventIngestor, &'r StoredConversation),
}

/// The result of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backfilled {
    /// The number of events that the log did not have.
    pub appended: usize,
    /// The number of events that the log does not accept.
    pub unreadable: usize,
}

/// A page of an agent server's log that lacks events in the stored log.
struct MissingPage {
    /// The token with which the page is requested.
    id: Option<String>,
    /// The number of events that it was requested with.
    size: usize,
    /// The missing events, unless they have to be fetched again.
    missing: Option<Vec<Event>>,
}

impl MissingPage {
    fn bytes(&self) -> usize {
        self.missing.iter().flatten().map(|event| event.json.len()).sum()
    }
}

/// The events of a page.
struct Compared {
    missing: Vec<Event>,
    /// Whether no earlier event is missing: batches arrive in order, and the log has every event of this page.
    is_complete: bool,
    unreadable: usize,
}

impl Backfill {
    /// Stores the missing events and returns what it has found. When the newest event is stored already, one request is enough.
    ///
    /// # Errors
    /// When the agent server or the store does not respond; events that were stored before stay stored.
    pub async fn store_missing(&self, record: &ConversationRecord) -> Result<Backfilled> {
        let sandbox = self.sandboxes.get(&record.user, &record.sandbox_id).await?;
        match sandbox.and_then(|sandbox| sandbox.agent_server(&self.http)) {
            Some(agent_server) => self.run(&agent_server, record, Reports::Ignored).await,
            None => Ok(Backfilled::default()),
        }
    }

    /// Stores the missing events of an agent server, the oldest first: if the run is interrupted, the stored log lacks only events after
    /// its newest one, which the next run finds.
    pub(super) async fn run(
        &self,
        agent_server: &AgentServer,
        record: &ConversationRecord,
        reports: Reports<'_>,
    ) -> Result<Backfilled> {
        let newest = match agent_server.newest_events(record.id, None, 1).await {
            // The agent server does not have the conversation, so it has no events of it.
            Err(AgentServerError { failure: Failure::Status(status, _), .. })
                if status == http::StatusCode::NOT_FOUND =>
            {
                return Ok(Backfilled::default());
            }
            newest => newest.map_err(upstream)?,
        };
        let mut done = Backfilled::default();
        let mut pages: Vec<MissingPage> = Vec::new();
        let (mut page, mut id, mut size) = (newest, None, 1);
        for number in 1.. {
            let Compared { missing, is_complete, unreadable } = self.compare(record, &page).await?;
            done.unreadable += unreadable;
            if !missing.is_empty() {
                pages.push(MissingPage { id: id.clone(), size, missing: Some(missing) });
                release_newest(&mut pages);
            }
            let Some(next) = page.next_page_id.filter(|next| !is_complete && id.as_ref() != Some(next)) else { break };
            if number == MAX_PAGES {
                tracing::warn!(conversation = %record.id, pages = MAX_PAGES, "event.backfill_cut_off");
                break;
            }
            (page, size) = fetch(agent_server, record.id, &next).await?;
            id = Some(next);
        }
        while let Some(page) = pages.pop() {
            let missing = match page.missing {
                Some(missing) => missing,
                None => {
                    let again = agent_server.newest_events(record.id, page.id.as_deref(), page.size).await;
                    self.compare(record, &again.map_err(upstream)?).await?.missing
                }
            };
            done.appended += missing.len();
            match reports {
                Reports::Ignored => self.events.append(&record.user, record.id, missing).await?,
                Reports::Applied(ingestor, known) => {
                    ingestor.ingest(&record.user, record.id, Some(known), missing).await?;
                }
            }
        }
        Ok(done)
    }

    async fn compare(&self, record: &ConversationRecord, page: &EventPage) -> Result<Compared> {
        let (mut events, mut unreadable) = (Vec::new(), 0);
        for item in &page.items {
            match event(item) {
                Some(event) if event.is_transient() => {}
                Some(event) => events.push(event),
                None => unreadable += 1,
            }
        }
        let accepted = events.len();
        let missing = self.events.unknown(&record.user, record.id, events).await?;
        Ok(Compared { is_complete: accepted > 0 && missing.is_empty(), missing, unreadable })
    }
}

/// Enqueues the job that fetches missing events of a conversation, unless one is enqueued already. A call that is repeated after a failure
/// enqueues it at least once.
///
/// # Errors
/// [`Error::Store`].
pub(super) async fn enqueue(events: &EventStore, queue: &JobQueue, user: &UserId, conversation: Uuid) -> Result<()> {
    let now = Time::now();
    if events.backfill_enqueued_until(user, conversation).await?.is_some_and(|until| until > now) {
        return Ok(());
    }
    let job = BackfillEvents { user: user.clone(), conversation, attempt: 0 }.into();
    queue.send(&job, DELAY).await?;
    events.set_backfill_enqueued_until(user, conversation, now.plus(DELAY)).await
}

/// Releases the events of the newest pages while those in memory exceed the limit. The oldest page, which is stored first, is kept.
fn release_newest(pages: &mut [MissingPage]) {
    let mut held: usize = pages.iter().map(MissingPage::bytes).sum();
    let Some((_, newer)) = pages.split_last_mut() else { return };
    for page in newer {
        if held <= HELD_BYTES {
            break;
        }
        held -= page.bytes();
        page.missing = None;
    }
}

/// Fetches a page, with as many events as the limit of a response allows. Returns it with the number of events that were requested.
async fn fetch(agent_server: &AgentServer, conversation: Uuid, id: &str) -> Result<(EventPage, usize)> {
    let mut sizes = PAGES.into_iter().peekable();
    loop {
        let size = sizes.next().unwrap_or(1);
        match agent_server.newest_events(conversation, Some(id), size).await {
            Err(AgentServerError { failure: Failure::TooLarge(_), .. }) if sizes.peek().is_some() => {}
            page => return Ok((page.map_err(upstream)?, size)),
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn page(id: &str, bytes: usize) -> MissingPage {
        let event = Event { id: id.to_owned(), timestamp: String::new(), kind: String::new(), json: "x".repeat(bytes) };
        MissingPage { id: Some(id.to_owned()), size: 20, missing: Some(vec![event]) }
    }

    #[test]
    fn the_newest_pages_are_released_until_the_others_fit_into_memory() {
        let half = HELD_BYTES / 2;
        let held = |sizes: &[usize]| {
            let mut pages: Vec<MissingPage> = sizes.iter().map(|bytes| page("p", *bytes)).collect();
            release_newest(&mut pages);
            pages.into_iter().map(|page| page.missing.is_some()).collect::<Vec<_>>()
        };
        assert_eq!(held(&[]), Vec::<bool>::new());
        assert_eq!(held(&[half, half]), [true, true]);
        assert_eq!(held(&[half, half, 1]), [false, true, true]);
        assert_eq!(held(&[1, half, half, half]), [false, false, true, true]);
        assert_eq!(held(&[1, 3 * half]), [false, true], "the page that is stored first");
    }
}
