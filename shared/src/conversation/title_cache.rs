//! The titles of accounts that are searched repeatedly, in memory.
//!
//! No index serves `title__contains`: a search without a hit evaluates all index entries of an account. A client that searches while its
//! user types does that for each letter. After one expensive search of an account, its next search therefore reads all entries of its lists
//! and keeps them; later searches in this process read only the entries that have changed since, which are last in the index by change.
//!
//! The cache decides only which rows are read, like an index: each row is read from the table before it is listed, so a deleted
//! conversation is not. An entry that appears late in the index is found if it is late by less than [`OVERLAP`]; an import of old conversations, whose
//! time of change is long past, is found after [`LIFETIME`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex as AsyncMutex;
use uuid::Uuid;

use super::search::CLOCK_SKEW;
use super::store::{CREATED, SEARCH, UPDATED_SORT, id_of};
use crate::clock::Time;
use crate::dynamo::Item;

/// The time after which all entries are read again.
const LIFETIME: Duration = Duration::from_secs(300);
/// How long before the last refresh an entry may have been changed that the refresh did not find: the index lags, and the clocks of the
/// machines that write the times differ.
const OVERLAP: Duration = CLOCK_SKEW.saturating_add(Duration::from_secs(30));
/// The number of evaluated entries from which a search is expensive.
const EXPENSIVE: usize = 1_000;
/// The most entries of a list that are kept.
pub(super) const MAX_TITLES: usize = 20_000;
/// The approximate memory of all lists in bytes.
const MAX_BYTES: usize = 16 << 20;
/// The approximate memory of an entry in bytes, without its title.
const ENTRY_SIZE: usize = 160;

/// What the index has of one conversation.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// The time of creation, in its compact form.
    pub created: String,
    /// The sort key by the time of the last change.
    pub updated_sort: String,
    /// The title in its searchable form.
    pub search: Option<String>,
}

impl Entry {
    fn of(item: &Item) -> Option<(Uuid, Self)> {
        let attribute = |name| item.get(name).and_then(|value| value.as_s().ok()).cloned();
        let (created, updated_sort) = (attribute(CREATED)?, attribute(UPDATED_SORT)?);
        Some((id_of(item)?, Self { created, updated_sort, search: attribute(SEARCH) }))
    }
}

/// The entries of one list.
#[derive(Debug, Default)]
pub(super) struct CachedList {
    pub entries: HashMap<Uuid, Entry>,
    /// All entries that were changed before this time are known; `None` for a list that was not read.
    refreshed: Option<Time>,
    read: Option<Time>,
}

impl CachedList {
    /// The time from which changed entries are to be read; `None` if all are.
    pub fn changed_from(&self, now: Time) -> Option<Time> {
        let is_current = self.read.is_some_and(|read| now.since(read) < LIFETIME);
        self.refreshed.filter(|_| is_current).map(|refreshed| refreshed.minus(OVERLAP))
    }

    /// Replaces all entries.
    pub fn replace(&mut self, begun: Time, items: &[Item]) {
        *self = Self { read: Some(begun), ..Self::default() };
        self.refresh(begun, items);
    }

    /// Adds the entries that have changed, as they were read at `begun` or later.
    pub fn refresh(&mut self, begun: Time, items: &[Item]) {
        self.entries.extend(items.iter().filter_map(Entry::of));
        self.refreshed = Some(begun);
    }

    fn bytes(&self) -> usize {
        self.entries.values().map(|entry| ENTRY_SIZE + entry.search.as_ref().map_or(0, String::len)).sum()
    }
}

#[derive(Debug)]
struct Slot {
    list: Arc<AsyncMutex<CachedList>>,
    used: Time,
    bytes: usize,
    /// A list that has too many entries is not kept until this time.
    too_long_until: Option<Time>,
}

/// The lists that are searched repeatedly, by their partitions of the index. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct TitleCache(Arc<Mutex<HashMap<String, Slot>>>);

impl TitleCache {
    /// Notes how many entries a search of these partitions has evaluated: after an expensive one they are kept.
    pub fn note_search(&self, partitions: &[String], evaluated: usize, now: Time) {
        if evaluated < EXPENSIVE {
            return;
        }
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for partition in partitions {
            slots.entry(partition.clone()).or_insert_with(|| Slot {
                list: Arc::default(),
                used: now,
                bytes: 0,
                too_long_until: None,
            });
        }
    }

    /// The lists of these partitions, if all of them are kept.
    pub fn lists(&self, partitions: &[String], now: Time) -> Option<Vec<Arc<AsyncMutex<CachedList>>>> {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let list = |partition: &String| {
            let slot = slots.get_mut(partition).filter(|slot| slot.too_long_until.is_none_or(|until| now >= until))?;
            slot.used = now;
            Some(Arc::clone(&slot.list))
        };
        partitions.iter().map(list).collect()
    }

    /// Records the size of a list that was read, and removes those that were not used for the longest time if all are too large.
    pub fn keep(&self, partition: &str, list: &CachedList) {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut(partition) {
            slot.bytes = list.bytes();
        }
        while slots.values().map(|slot| slot.bytes).sum::<usize>() > MAX_BYTES {
            let Some(oldest) = slots.iter().min_by_key(|(_, slot)| slot.used).map(|(key, _)| key.clone()) else {
                return;
            };
            slots.remove(&oldest);
        }
    }

    /// Keeps no entries of this list for a while, because it has more than [`MAX_TITLES`].
    pub fn refuse(&self, partition: &str, now: Time) {
        let mut slots = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = Slot { list: Arc::default(), used: now, bytes: 0, too_long_until: Some(now.plus(LIFETIME)) };
        slots.insert(partition.to_owned(), refused);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dynamo::text;

    fn item(id: u128, updated: &str, title: &str) -> Item {
        let id = Uuid::from_u128(id).simple().to_string();
        [("id", id.as_str()), (CREATED, "created"), (UPDATED_SORT, updated), (SEARCH, title)]
            .map(|(name, value)| (name.to_owned(), text(value)))
            .into()
    }

    #[test]
    fn all_entries_are_read_first_and_then_those_that_changed_since_until_the_list_is_old() {
        let (start, later) = (Time::now(), Time::now().plus(Duration::from_secs(100)));
        let mut list = CachedList::default();
        assert_eq!(list.changed_from(start), None);
        list.replace(start, &[item(1, "a", "one"), item(2, "b", "two")]);
        assert_eq!(list.changed_from(later), Some(start.minus(OVERLAP)));
        list.refresh(later, &[item(2, "c", "second"), item(3, "d", "three")]);
        assert_eq!(list.changed_from(later), Some(later.minus(OVERLAP)));
        let title = |id: u128| list.entries[&Uuid::from_u128(id)].search.clone();
        assert_eq!([1, 2, 3].map(title), ["one", "second", "three"].map(|title| Some(title.to_owned())));
        assert_eq!(list.changed_from(start.plus(LIFETIME)), None);
    }

    #[test]
    fn lists_are_kept_after_an_expensive_search_and_within_the_limit() {
        let (cache, now) = (TitleCache::default(), Time::now());
        let partitions = ["u/t".to_owned(), "u/s".to_owned()];
        cache.note_search(&partitions, EXPENSIVE - 1, now);
        assert!(cache.lists(&partitions, now).is_none());
        cache.note_search(&partitions[..1], EXPENSIVE, now);
        assert!(cache.lists(&partitions, now).is_none(), "one of them is not kept");
        cache.note_search(&partitions, EXPENSIVE, now);
        assert_eq!(cache.lists(&partitions, now).expect("both").len(), 2);
        cache.refuse("u/s", now);
        assert!(cache.lists(&partitions, now).is_none());
        assert!(cache.lists(&partitions, now.plus(LIFETIME)).is_some());
        // The list that was not used for the longest time makes way.
        let mut large = CachedList::default();
        large.replace(now, &[item(1, "a", &"x".repeat(MAX_BYTES * 2 / 3))]);
        let others = ["v/t".to_owned(), "w/t".to_owned()];
        for (seconds, partition) in (1..).zip(&others) {
            let at = now.plus(LIFETIME + Duration::from_secs(seconds));
            cache.note_search(std::slice::from_ref(partition), EXPENSIVE, at);
            cache.keep(partition, &large);
        }
        let kept = |partition: &String| cache.lists(std::slice::from_ref(partition), now.plus(LIFETIME)).is_some();
        assert_eq!([&others[0], &others[1]].map(kept), [false, true]);
    }
}
