//! Reads whole event logs.

use shared::event::store::{Event, EventFilter, EventStore, SortOrder};
use shared::user::UserId;
use uuid::Uuid;

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
