//! Helpers that read whole event logs and capture what the product itself logs.

use std::sync::OnceLock;

use shared::event::store::{Event, EventFilter, EventStore, SortOrder};
use shared::user::UserId;
use tracing::subscriber::{DefaultGuard, NoSubscriber};
use tracing::{Dispatch, Subscriber};
use uuid::Uuid;

/// Sends what this thread logs to a subscriber while the guard lives.
#[expect(clippy::disallowed_methods, reason = "the one place with a second dispatcher")]
pub fn log_to(subscriber: impl Subscriber + Send + Sync) -> DefaultGuard {
    // While only one dispatcher exists, tracing evaluates each log statement's interest only on the thread that reaches
    // it first, and caches the result for all threads. That thread may belong to another test, which captures nothing.
    static SECOND: OnceLock<Dispatch> = OnceLock::new();
    SECOND.get_or_init(|| Dispatch::new(NoSubscriber::default()));
    tracing::subscriber::set_default(subscriber)
}

/// All events of a conversation, oldest first.
pub async fn all_events(store: &EventStore, user: &UserId, conversation: Uuid) -> Vec<Event> {
    let (filter, mut events, mut after) = (EventFilter::default(), Vec::new(), None);
    loop {
        let page = store.page(user, conversation, &filter, SortOrder::Timestamp, after.as_ref(), 100);
        let page = page.await.expect("the store");
        events.extend(page.events);
        after = page.next;
        if after.is_none() {
            return events;
        }
    }
}
