//! Search and count of conversations: the filters, the indexes that serve them, pagination, and the cost limits of a request.
//!
//! The indexes by time have the title and the time of creation of each conversation, so most filters are applied to their entries, and
//! only the rows of the page are read from the table, eventually consistent. Bounds of the attribute that an index is sorted by are key
//! conditions: entries outside them are not read.
//!
//! No index has both times in an order of creation, the indexes by time do not have the sandbox, and none has the tags. A list that needs
//! them is *inexact*: the rows of entries are read to decide. It tries three ways, in this order:
//!
//! 1. the next [`FIRST_CANDIDATES`] rows, which are enough where most rows match;
//! 2. the index of the filter, if there is one: if it has few entries in the filter's range, they are read and sorted;
//! 3. more rows in the order of the list, up to [`MAX_CANDIDATES`]; the page may be short or empty then.
//!
//! A list that is filtered by tags never reads more rows than [`MAX_CANDIDATES`] for a page, whichever way it takes.

use std::collections::HashMap;
use std::time::Duration;

use aws_sdk_dynamodb::operation::query::builders::QueryFluentBuilder;
use aws_sdk_dynamodb::types::AttributeValue;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::store::{
    BY_CREATED, BY_SANDBOX, BY_UPDATED, CREATED, CREATED_SORT, ConversationStore, LIST, List, SANDBOX_KEY, SEARCH,
    UPDATED_SORT, id_in_sort_value, id_of, key, searchable, sort_value, sort_value_of,
};
use super::tags::TagFilter;
use super::title_cache::{Entry, MAX_TITLES};
use super::{AppConversation, ConversationRecord, MetricsSnapshot};
use crate::clock::Time;
use crate::dynamo::{BATCH_GET_LIMIT, Item, from_item, text};
use crate::error::{Error, Result};
pub use crate::http::sort_order::SortOrder;
use crate::http::{page, page_token};
use crate::id::UserId;
use crate::paging::{self, Bounds, COUNT_BUDGET, MAX_CANDIDATES, MAX_EVALUATED, Source};
use crate::user::counters::{self, Counter};

/// The name of the reads of lists, for the log.
const OPERATION: &str = "Query conversations";

/// The error for a count that would read too many rows.
const TOO_MANY: &str = "Too many conversations to count with these filters. Narrow them with created_at__gte and created_at__lt, or read the pages of search";

/// The most bytes that the live status adds to a conversation: its URL, its session key and its statuses.
const LIVE_STATUS_SIZE: u64 = 2048;

/// The size in a response up to which a bound of a record's size is enough: a page of 100 such records fits into it.
const SMALL: u64 = page::PAGE_SIZE / 100;
/// More than the size of a record in a response without its texts, its lists and its live status: names, ids, times and numbers.
const FIXED_SIZE: u64 = 2048;
/// The most bytes that a byte of a text has in a response: `\\u0001`.
const LONGEST_ESCAPE: usize = 7;
/// The most bytes of a number with its comma.
const LONGEST_NUMBER: usize = 22;
/// More than the quotes, the colon and the comma of an entry of an object.
const QUOTES: usize = 12;

/// The longest partition key that DynamoDB accepts, in bytes.
const LONGEST_KEY: usize = 2048;

/// How much earlier than its creation a row may have been updated, because two machines with different clocks wrote the times.
pub(crate) const CLOCK_SKEW: Duration = Duration::from_secs(60);

/// The rows that an inexact list reads in its order before it tries the index of the filter.
const FIRST_CANDIDATES: usize = 40;

/// The most rows that are read and sorted in memory.
const MAX_SORTED_ROWS: usize = 200;

/// The filters of a list or a count.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// The title contains this text; ASCII letters match in either case. An empty text matches every conversation with a title.
    pub title_contains: Option<String>,
    /// Created at or after this instant.
    pub created_at_gte: Option<Time>,
    /// Created before this instant.
    pub created_at_lt: Option<Time>,
    /// Last changed at or after this instant.
    pub updated_at_gte: Option<Time>,
    /// Last changed before this instant.
    pub updated_at_lt: Option<Time>,
    /// In this sandbox.
    pub sandbox_id: Option<String>,
    /// With all of these tags.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<TagFilter>,
    /// Whether conversations with a parent are included.
    pub include_sub_conversations: bool,
}

/// The cursor of a page: it starts after the row with this value of the sort attribute.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Cursor(String);

impl Cursor {
    /// The cursor of a conversation.
    #[must_use]
    pub fn of(conversation: &AppConversation, order: SortOrder) -> Self {
        let at = if order.is_by_created() { conversation.created_at } else { conversation.updated_at };
        Self::at(at, conversation.id)
    }

    /// The cursor of the conversation with this id and this time, by which the list is sorted.
    #[must_use]
    pub fn at(at: Time, id: Uuid) -> Self {
        Self(sort_value(at, id))
    }
}

/// A page of records.
#[derive(Clone, Debug)]
pub struct Page {
    /// The records. They may be empty even if there is a next page.
    pub records: Vec<ConversationRecord>,
    /// The cursor of the next page, if there is one.
    pub next: Option<Cursor>,
}

/// The queries of a list: the index, its partitions, the range of its keys, and the filter conditions on its entries.
#[derive(Debug)]
struct QueryPlan {
    index: &'static str,
    partition_key: &'static str,
    partitions: Vec<String>,
    sort_key: &'static str,
    low: Option<String>,
    high: Option<String>,
    conditions: Vec<&'static str>,
    names: HashMap<String, String>,
    values: HashMap<String, AttributeValue>,
    /// Whether the conditions include the whole filter.
    is_exact: bool,
}

impl Filter {
    /// Whether the filter excludes nothing, except possibly sub-conversations.
    fn is_unfiltered(&self) -> bool {
        let open = Self { include_sub_conversations: self.include_sub_conversations, ..Self::default() };
        *self == open
    }

    fn has_updated_bound(&self) -> bool {
        self.updated_at_gte.is_some() || self.updated_at_lt.is_some()
    }

    /// Whether the titles of the user's lists decide.
    fn searches_titles(&self) -> bool {
        self.title_contains.is_some() && self.sandbox_id.is_none()
    }

    /// The partitions of the indexes by time.
    fn lists(&self, user: &UserId) -> Vec<String> {
        match self.include_sub_conversations {
            true => vec![List::TopLevel.key(user), List::SubConversations.key(user)],
            false => vec![List::TopLevel.key(user)],
        }
    }

    /// Decides which entries of the user's lists match.
    fn entry_filter(&self) -> impl Fn(&Entry) -> bool {
        let within = |from: Option<Time>, before: Option<Time>| {
            let (from, before) = (from.map(Time::compact), before.map(Time::compact));
            move |at: &str| {
                from.as_deref().is_none_or(|from| at >= from) && before.as_deref().is_none_or(|before| at < before)
            }
        };
        let part = self.title_contains.as_deref().map(searchable);
        let is_created_within = within(self.created_at_gte, self.created_at_lt);
        let is_updated_within = within(self.updated_at_gte, self.updated_at_lt);
        move |entry| {
            let has_part = |part: &String| entry.search.as_ref().is_some_and(|title| title.contains(part.as_str()));
            part.as_ref().is_none_or(has_part)
                && is_created_within(&entry.created)
                && is_updated_within(&entry.updated_sort)
        }
    }

    /// The order whose index has most of what the filter needs.
    fn order_for_counting(&self) -> SortOrder {
        let is_by_updated = self.has_updated_bound() && self.sandbox_id.is_none();
        if is_by_updated { SortOrder::UpdatedAtDesc } else { SortOrder::CreatedAtDesc }
    }

    /// Whether a record is in the list.
    fn matches(&self, record: &ConversationRecord) -> bool {
        let is_within = |at: Time, from: Option<Time>, before: Option<Time>| {
            from.is_none_or(|from| at >= from) && before.is_none_or(|before| at < before)
        };
        let has_title = |part: &String| {
            record.title.as_ref().is_some_and(|title| searchable(title).contains(searchable(part).as_str()))
        };
        self.title_contains.as_ref().is_none_or(has_title)
            && is_within(record.created_at, self.created_at_gte, self.created_at_lt)
            && is_within(record.updated_at, self.updated_at_gte, self.updated_at_lt)
            && self.sandbox_id.as_ref().is_none_or(|sandbox| *sandbox == record.sandbox_id)
            && self.tags.iter().all(|filter| filter.matches(&record.tags))
            && (self.include_sub_conversations || record.parent_conversation_id.is_none())
    }

    fn plan(&self, user: &UserId, order: SortOrder) -> QueryPlan {
        let (mut conditions, mut names, mut values) = (Vec::new(), HashMap::new(), HashMap::new());
        let mut require = |condition, (placeholder, name): (&str, &str), value: Option<(&str, String)>| {
            conditions.push(condition);
            names.insert(placeholder.to_owned(), name.to_owned());
            values.extend(value.map(|(name, value)| (name.to_owned(), text(value))));
        };
        let lists = self.lists(user);
        let (index, partition_key, partitions) = match (order.is_by_created(), self.sandbox_id.as_deref()) {
            (true, Some(sandbox)) => (BY_SANDBOX, SANDBOX_KEY, vec![user.key_of(sandbox)]),
            (true, None) => (BY_CREATED, LIST, lists),
            (false, _) => (BY_UPDATED, LIST, lists),
        };
        // A row is created before it is updated, so a bound of one time is a bound of the other, too, and fewer entries are read.
        let (sort_key, low, high) = if order.is_by_created() {
            let created_before = self.updated_at_lt.map(|time| time.plus(CLOCK_SKEW));
            (CREATED_SORT, self.created_at_gte, self.created_at_lt.into_iter().chain(created_before).min())
        } else {
            let updated_from = self.created_at_gte.map(|time| time.minus(CLOCK_SKEW));
            (UPDATED_SORT, self.updated_at_gte.into_iter().chain(updated_from).max(), self.updated_at_lt)
        };
        if !order.is_by_created() {
            if let Some(from) = self.created_at_gte {
                require("#created >= :from", ("#created", CREATED), Some((":from", from.compact())));
            }
            if let Some(before) = self.created_at_lt {
                require("#created < :before", ("#created", CREATED), Some((":before", before.compact())));
            }
        }
        match self.title_contains.as_deref() {
            Some("") => require("attribute_exists(#search)", ("#search", SEARCH), None),
            Some(part) => require("contains(#search, :title)", ("#search", SEARCH), Some((":title", searchable(part)))),
            None => {}
        }
        if index == BY_SANDBOX && !self.include_sub_conversations {
            require("#list = :list", ("#list", LIST), Some((":list", List::TopLevel.key(user))));
        }
        let has_index = if order.is_by_created() { !self.has_updated_bound() } else { self.sandbox_id.is_none() };
        let is_exact = has_index && self.tags.is_empty();
        // A sort key is an instant and more digits, so it never equals an instant.
        let [low, high] = [low, high].map(|time| time.map(Time::compact));
        QueryPlan { index, partition_key, partitions, sort_key, low, high, conditions, names, values, is_exact }
    }
}

impl QueryPlan {
    /// The entries of a list that were changed at or after a time; all of them without one.
    fn of_changes(list: &str, from: Option<Time>) -> Self {
        Self {
            index: BY_UPDATED,
            partition_key: LIST,
            partitions: vec![list.to_owned()],
            sort_key: UPDATED_SORT,
            low: from.map(Time::compact),
            high: None,
            conditions: Vec::new(),
            names: HashMap::new(),
            values: HashMap::new(),
            is_exact: true,
        }
    }

    /// Whether no row can match, because the range is empty or the key is too long. DynamoDB refuses such a query.
    fn is_empty(&self) -> bool {
        self.partitions.iter().any(|partition| partition.len() > LONGEST_KEY)
            || matches!((&self.low, &self.high), (Some(low), Some(high)) if low >= high)
    }

    fn queries(&self, store: &ConversationStore) -> Vec<QueryFluentBuilder> {
        self.partitions.iter().map(|partition| self.query(store, partition)).collect()
    }

    fn query(&self, store: &ConversationStore, partition: &str) -> QueryFluentBuilder {
        // Below and above every text that begins a time.
        let low = self.low.clone().unwrap_or_else(|| "!".to_owned());
        let high = self.high.clone().unwrap_or_else(|| "~".to_owned());
        let ranged = self.low.is_some() || self.high.is_some();
        let mut query = store
            .table
            .query()
            .index_name(self.index)
            .expression_attribute_names("#partition", self.partition_key)
            .expression_attribute_values(":partition", text(partition));
        query = if ranged {
            query
                .key_condition_expression("#partition = :partition AND #sort BETWEEN :low AND :high")
                .expression_attribute_names("#sort", self.sort_key)
                .expression_attribute_values(":low", text(low))
                .expression_attribute_values(":high", text(high))
        } else {
            query.key_condition_expression("#partition = :partition")
        };
        if !self.conditions.is_empty() {
            query = query.filter_expression(self.conditions.join(" AND "));
            for (placeholder, name) in &self.names {
                query = query.expression_attribute_names(placeholder, name);
            }
            for (name, value) in &self.values {
                query = query.expression_attribute_values(name, value.clone());
            }
        }
        query
    }

    /// The exclusive start key of a page in each partition.
    fn starts(&self, user: &UserId, after: &Cursor) -> Result<Vec<Item>> {
        let id = id_in_sort_value(&after.0).ok_or_else(page_token::invalid)?;
        let below = self.low.as_ref().is_some_and(|low| after.0 < *low);
        let above = self.high.as_ref().is_some_and(|high| after.0 > *high);
        if below || above {
            return Err(page_token::invalid());
        }
        let start = |partition: &String| {
            let mut start = key(user, id);
            start.insert(self.partition_key.to_owned(), text(partition));
            start.insert(self.sort_key.to_owned(), text(&after.0));
            start
        };
        Ok(self.partitions.iter().map(start).collect())
    }
}

/// A row that may be in a list: its sort value, its id, and the row itself if it was read.
type Candidate = (String, Uuid, Option<ConversationRecord>);

/// A list: whose, which and in which order.
#[derive(Clone, Copy, Debug)]
struct ListRequest<'r> {
    user: &'r UserId,
    filter: &'r Filter,
    order: SortOrder,
}

impl ConversationStore {
    /// Returns a page of the user's conversations.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Refused`] when `after` is not a cursor of this list.
    pub async fn search(
        &self,
        user: &UserId,
        filter: &Filter,
        order: SortOrder,
        after: Option<&Cursor>,
        limit: usize,
    ) -> Result<Page> {
        let list = ListRequest { user, filter, order };
        let plan = filter.plan(user, order);
        let all = Bounds::of_page(limit);
        if !plan.is_empty()
            && let Some(found) = self.titles_in_memory(list).await?
        {
            after.map(|after| plan.starts(user, after)).transpose()?;
            return self.page_of_sorted(list, found, after, all).await;
        }
        let first = match plan.is_exact {
            true => all,
            false => Bounds { candidates: FIRST_CANDIDATES.max(limit), ..all },
        };
        let mut page = self.page_in_order(list, &plan, after, first).await?;
        if filter.searches_titles() {
            self.titles.note_search(&filter.lists(user), page.evaluated, Time::now());
        }
        if plan.is_exact || page.is_full || page.next.is_none() {
            return Ok(Page { records: page.rows, next: page.next.map(Cursor) });
        }
        if let Some(sorted) = self.sorted_page(list, after, all).await? {
            return Ok(sorted);
        }
        let next = page.next.take().map(Cursor);
        let read = page.rows.iter().map(size_of).sum::<Result<u64>>()?;
        let bytes = all.bytes.saturating_sub(read);
        let left = Bounds { rows: limit - page.rows.len(), candidates: MAX_CANDIDATES, bytes, ..all };
        let rest = self.page_in_order(list, &plan, next.as_ref(), left).await?;
        page.rows.extend(rest.rows);
        Ok(Page { records: page.rows, next: rest.next.map(Cursor) })
    }

    /// Reads entries and rows in the order of the list.
    async fn page_in_order(
        &self,
        list: ListRequest<'_>,
        plan: &QueryPlan,
        after: Option<&Cursor>,
        bounds: Bounds,
    ) -> Result<paging::Page<ConversationRecord>> {
        let starts = after.map(|after| plan.starts(list.user, after)).transpose()?;
        if plan.is_empty() {
            return Ok(paging::Page { rows: Vec::new(), next: None, is_full: false, evaluated: 0 });
        }
        let source = Source {
            queries: plan.queries(self),
            sort_key: plan.sort_key,
            is_ascending: list.order.is_ascending(),
            is_filtered: !plan.conditions.is_empty(),
            is_exact: plan.is_exact,
        };
        let fetch = |entries: Vec<Item>| async move {
            let ids: Vec<Uuid> = entries.iter().map(|entry| id_of(entry).unwrap_or_default()).collect();
            self.matching(list, &ids).await
        };
        paging::page(OPERATION, bounds, source, starts, fetch, size_of).await
    }

    /// The row of each id, if it exists and is in the list. The read is eventually consistent.
    async fn matching(&self, list: ListRequest<'_>, ids: &[Uuid]) -> Result<Vec<Option<ConversationRecord>>> {
        let keys = ids.iter().map(|id| key(list.user, *id)).collect();
        let mut found: HashMap<Uuid, ConversationRecord> = HashMap::new();
        for item in self.table.batch_get_eventually(keys).await? {
            if item.contains_key("deleting_since") {
                continue;
            }
            let record: ConversationRecord = from_item(item)?;
            if list.filter.matches(&record) {
                found.insert(record.id, record);
            }
        }
        Ok(ids.iter().map(|id| found.remove(id)).collect())
    }

    /// The page of a list that is sorted in memory, from the index of its filter; `None` if that has too many entries in the filter's range.
    async fn sorted_page(&self, list: ListRequest<'_>, after: Option<&Cursor>, bounds: Bounds) -> Result<Option<Page>> {
        let ListRequest { user, filter, order } = list;
        let is_by_created = order.is_by_created();
        if is_by_created && filter.sandbox_id.is_some() {
            // The list is in the index of this filter already.
            return Ok(None);
        }
        if !filter.has_updated_bound() && filter.sandbox_id.is_none() {
            // No index has the tags.
            return Ok(None);
        }
        // The entries by the time of the last change have the time of creation; those of a sandbox do not have the time of the last change.
        let (other, limit) = match is_by_created {
            true => (SortOrder::UpdatedAtDesc, MAX_EVALUATED),
            false => (SortOrder::CreatedAtDesc, MAX_SORTED_ROWS),
        };
        let plan = filter.plan(user, other);
        let entries = match plan.is_empty() {
            true => Vec::new(),
            false => match paging::entries(OPERATION, limit, plan.queries(self)).await? {
                Some(entries) => entries,
                None => return Ok(None),
            },
        };
        let mut rows: Vec<Candidate> = Vec::with_capacity(entries.len());
        if is_by_created {
            for entry in &entries {
                let created = entry.get(CREATED).and_then(|value| value.as_s().ok());
                rows.extend(id_of(entry).zip(created).map(|(id, created)| (sort_value_of(created, id), id, None)));
            }
        } else {
            let ids: Vec<Uuid> = entries.iter().filter_map(id_of).collect();
            for record in self.matching(list, &ids).await?.into_iter().flatten() {
                rows.push((sort_value(record.updated_at, record.id), record.id, Some(record)));
            }
        }
        self.page_of_sorted(list, rows, after, bounds).await.map(Some)
    }

    /// The page of a list whose candidates are all known.
    async fn page_of_sorted(
        &self,
        list: ListRequest<'_>,
        mut rows: Vec<Candidate>,
        after: Option<&Cursor>,
        bounds: Bounds,
    ) -> Result<Page> {
        let order = list.order;
        if let Some(Cursor(after)) = after {
            rows.retain(|(position, ..)| if order.is_ascending() { position > after } else { position < after });
        }
        rows.sort_unstable_by(
            |(one, ..), (other, ..)| if order.is_ascending() { one.cmp(other) } else { other.cmp(one) },
        );
        let mut page = Page { records: Vec::new(), next: None };
        let (mut bytes, mut candidates, mut reached) = (0, 0, None);
        // All filters but tags were applied to the candidates, of which most therefore match.
        let (chunk_size, most) =
            if list.filter.tags.is_empty() { (1, usize::MAX) } else { (BATCH_GET_LIMIT, MAX_CANDIDATES) };
        let mut rest = rows.as_mut_slice();
        while !rest.is_empty() {
            if candidates >= most {
                page.next = reached.map(Cursor);
                return Ok(page);
            }
            let (chunk, later) = rest.split_at_mut(rest.len().min((bounds.rows - page.records.len()).max(chunk_size)));
            candidates += chunk.len();
            let missing: Vec<Uuid> = chunk.iter().filter(|(.., row)| row.is_none()).map(|(_, id, _)| *id).collect();
            let mut fetched = match missing.is_empty() {
                true => Vec::new(),
                false => self.matching(list, &missing).await?,
            }
            .into_iter();
            for (position, _, row) in chunk {
                let row = row.take().or_else(|| fetched.next().flatten());
                if let Some(row) = row {
                    let size = size_of(&row)?;
                    if page.records.len() == bounds.rows || (!page.records.is_empty() && bytes + size > bounds.bytes) {
                        page.next = reached.map(Cursor);
                        return Ok(page);
                    }
                    bytes += size;
                    page.records.push(row);
                }
                reached = Some(std::mem::take(position));
            }
            rest = later;
        }
        Ok(page)
    }

    /// The candidates of a title search, if the titles of the user's lists are kept in memory, see [`super::title_cache`].
    async fn titles_in_memory(&self, list: ListRequest<'_>) -> Result<Option<Vec<Candidate>>> {
        let ListRequest { user, filter, order } = list;
        if !filter.searches_titles() {
            return Ok(None);
        }
        let (partitions, matches) = (filter.lists(user), filter.entry_filter());
        let Some(lists) = self.titles.lists(&partitions, Time::now()) else { return Ok(None) };
        let mut candidates: HashMap<Uuid, String> = HashMap::new();
        for (partition, list) in partitions.iter().zip(lists) {
            let mut list = list.lock().await;
            let begun = Time::now();
            let changed_from = list.changed_from(begun);
            let plan = QueryPlan::of_changes(partition, changed_from);
            let Some(items) = paging::entries(OPERATION, MAX_TITLES, plan.queries(self)).await? else {
                self.titles.refuse(partition, begun);
                return Ok(None);
            };
            match changed_from {
                Some(_) => list.refresh(begun, &items),
                None => list.replace(begun, &items),
            }
            self.titles.keep(partition, &list);
            for (id, entry) in list.entries.iter().filter(|(_, entry)| matches(entry)) {
                let by_created = || sort_value_of(&entry.created, *id);
                candidates.insert(*id, if order.is_by_created() { by_created() } else { entry.updated_sort.clone() });
            }
        }
        Ok(Some(candidates.into_iter().map(|(id, position)| (position, id, None)).collect()))
    }

    /// Counts the user's conversations that match the filter. Without filters it reads one counter item; otherwise it reads all entries in
    /// the filter's key range.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Refused`] when there are too many rows to read in one request.
    pub async fn count(&self, user: &UserId, filter: &Filter) -> Result<u64> {
        if filter.is_unfiltered() {
            let counter = match filter.include_sub_conversations {
                true => Counter::Conversations,
                false => Counter::TopLevelConversations,
            };
            return counters::read(&self.users, user, counter).await;
        }
        let order = filter.order_for_counting();
        let plan = filter.plan(user, order);
        if plan.is_empty() {
            return Ok(0);
        }
        if !plan.is_exact {
            let bounds = Bounds { rows: MAX_EVALUATED, bytes: u64::MAX, time: COUNT_BUDGET, ..Bounds::of_page(0) };
            let page = self.page_in_order(ListRequest { user, filter, order }, &plan, None, bounds).await?;
            return match page.next {
                None => Ok(u64::try_from(page.rows.len()).unwrap_or(u64::MAX)),
                Some(_) => Err(Error::Refused(TOO_MANY.to_owned())),
            };
        }
        let mut count = 0;
        for query in plan.queries(self) {
            count += paging::count(OPERATION, query, TOO_MANY).await?;
        }
        Ok(count)
    }
}

/// The size of a record in a response, or more if it is small: to serialise a record only for its size would be a large part of the work for
/// a page. As many records as a page may have, with [`SMALL`] bytes each, fit into it.
fn size_of(record: &ConversationRecord) -> Result<u64> {
    let bound = size_bound(record);
    if bound <= SMALL {
        return Ok(bound);
    }
    Ok(page::size_of(&AppConversation::without_sandbox(record.clone()))? + LIVE_STATUS_SIZE)
}

/// A size that a record does not exceed in a response.
fn size_bound(record: &ConversationRecord) -> u64 {
    // Destructured, so that no text of a later version is forgotten.
    let ConversationRecord {
        user,
        id: _,
        sandbox_id,
        selected_repository,
        selected_branch,
        git_provider: _,
        title,
        trigger: _,
        pr_number,
        llm_model,
        metrics: MetricsSnapshot { model_name, accumulated_cost: _, max_budget_per_task: _, accumulated_token_usage },
        parent_conversation_id: _,
        public: _,
        tags,
        agent_kind,
        acp_server,
        launched_agent_profile: _,
        created_at: _,
        updated_at: _,
    } = record;
    let given = [selected_repository, selected_branch, title, llm_model, acp_server].into_iter().flatten();
    let usage = accumulated_token_usage.iter().flat_map(|usage| [&usage.model, &usage.response_id]);
    let tags: Vec<usize> = tags.iter().map(|(name, value)| name.len() + value.len()).collect();
    let texts = given.chain(usage).chain([sandbox_id, model_name, agent_kind]).map(String::len);
    let texts = texts.sum::<usize>() + user.as_str().len() + tags.iter().sum::<usize>();
    let lists = pr_number.len() * LONGEST_NUMBER + tags.len() * QUOTES;
    FIXED_SIZE + LIVE_STATUS_SIZE + (texts * LONGEST_ESCAPE + lists) as u64
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    fn time(text: &str) -> Time {
        serde_json::from_value(text.into()).expect("a time")
    }

    #[test]
    fn the_bound_of_a_size_is_not_exceeded_and_a_page_of_small_records_fits() {
        // The byte that has the longest form.
        let text = |length: usize| "\u{1}".repeat(length);
        let token_usage = |text: String| {
            serde_json::json!({
                "model": text, "prompt_tokens": u64::MAX, "completion_tokens": u64::MAX, "cache_read_tokens": u64::MAX,
                "cache_write_tokens": u64::MAX, "reasoning_tokens": u64::MAX, "context_window": u64::MAX,
                "per_turn_token": u64::MAX, "response_id": text,
            })
        };
        for length in [0, 1, 10, 500, 10_000] {
            let tags: serde_json::Map<String, serde_json::Value> =
                (0..length.min(50)).map(|number| (format!("tag{number}"), text(length).into())).collect();
            let record: ConversationRecord = serde_json::from_value(serde_json::json!({
                "user": text(length), "id": Uuid::max().simple().to_string(), "sandbox_id": text(length),
                "selected_repository": text(length), "selected_branch": text(length), "git_provider": "bitbucket_data_center",
                "title": text(length), "trigger": "gui", "pr_number": vec![i64::MIN; length], "llm_model": text(length),
                "metrics": {
                    "model_name": text(length), "accumulated_cost": 1.234_567_890_123_456_7e-300, "max_budget_per_task": 1.0e300,
                    "accumulated_token_usage": token_usage(text(length)),
                },
                "parent_conversation_id": Uuid::max().simple().to_string(), "public": false, "tags": tags,
                "agent_kind": text(length), "acp_server": text(length),
                "launched_agent_profile": {"agent_profile_id": Uuid::max(), "revision": u64::MAX},
                "created_at": "2025-01-01T00:00:00.123456Z", "updated_at": "2025-01-01T00:00:00.123456Z",
            }))
            .expect("a record");
            let shown = AppConversation::without_sandbox(record.clone());
            let size = page::size_of(&shown).expect("a size");
            assert!(size + LIVE_STATUS_SIZE <= size_bound(&record), "{length}: {size}");
            let exact = size + LIVE_STATUS_SIZE;
            let found = size_of(&record).expect("a size");
            assert!(found == exact || found <= SMALL, "{length}: {found} instead of {exact}");
        }
        const { assert!(SMALL * 100 <= page::PAGE_SIZE) };
    }

    #[test]
    fn filters_are_conditions_on_keys_where_an_index_has_them() {
        let user = UserId::new("u");
        let compact = |text: &str| Some(time(text).compact());
        let filter = Filter {
            title_contains: Some("A_b".into()),
            created_at_gte: Some(time("2025-01-01T00:00:00Z")),
            updated_at_lt: Some(time("2025-01-02T00:00:00Z")),
            ..Filter::default()
        };
        let by_created = filter.plan(&user, SortOrder::CreatedAt);
        assert_eq!((by_created.index, by_created.sort_key), (BY_CREATED, CREATED_SORT));
        assert_eq!(by_created.partitions, ["u/t"]);
        assert_eq!(by_created.low, compact("2025-01-01T00:00:00Z"));
        assert_eq!(by_created.high, compact("2025-01-02T00:01:00Z"), "none is created after its update");
        assert_eq!(by_created.conditions, ["contains(#search, :title)"]);
        assert_eq!(by_created.values[":title"], text("a_b"));
        assert!(!by_created.is_exact, "the index does not have the time of the update");
        let by_updated = filter.plan(&user, SortOrder::UpdatedAtDesc);
        assert_eq!((by_updated.index, by_updated.sort_key), (BY_UPDATED, UPDATED_SORT));
        assert_eq!(by_updated.low, compact("2024-12-31T23:59:00Z"), "none is updated before its creation");
        assert_eq!(by_updated.high, compact("2025-01-02T00:00:00Z"));
        assert_eq!(by_updated.conditions, ["#created >= :from", "contains(#search, :title)"]);
        assert!(by_updated.is_exact);
        let in_sandbox = Filter { sandbox_id: Some("s".into()), ..Filter::default() };
        let plan = in_sandbox.plan(&user, SortOrder::CreatedAtDesc);
        assert_eq!((plan.index, plan.partitions.as_slice()), (BY_SANDBOX, ["1:u#s".to_owned()].as_slice()));
        assert_eq!(plan.conditions, ["#list = :list"]);
        assert!(plan.is_exact && !in_sandbox.plan(&user, SortOrder::UpdatedAt).is_exact);
        let all = Filter { include_sub_conversations: true, ..Filter::default() };
        assert_eq!(all.plan(&user, SortOrder::CreatedAt).partitions, ["u/t", "u/s"]);
    }

    #[test]
    fn a_range_that_holds_nothing_is_not_asked_for() {
        let filter = Filter {
            created_at_gte: Some(time("2025-01-02T00:00:00Z")),
            created_at_lt: Some(time("2025-01-01T00:00:00Z")),
            ..Filter::default()
        };
        assert!(filter.plan(&UserId::new("u"), SortOrder::CreatedAt).is_empty());
        let filter = Filter { sandbox_id: Some("x".repeat(2048)), ..Filter::default() };
        assert!(filter.plan(&UserId::new("u"), SortOrder::CreatedAt).is_empty());
    }

    #[test]
    fn only_places_in_the_list_can_be_started_from() {
        let filter = Filter { created_at_gte: Some(time("2025-01-02T00:00:00Z")), ..Filter::default() };
        let plan = filter.plan(&UserId::new("u"), SortOrder::CreatedAt);
        let row = |at: &str| Cursor::at(time(at), Uuid::from_u128(1));
        assert!(plan.starts(&UserId::new("u"), &row("2025-01-02T00:00:00.000000Z")).is_ok());
        let foreign = ["", "2025#x", "2025-01-02T00:00:00.000000Z#00000000000000000000000000000001"];
        let foreign = foreign.map(|text| Cursor(text.to_owned()));
        for after in [row("2025-01-01T00:00:00.000000Z")].into_iter().chain(foreign) {
            assert!(matches!(plan.starts(&UserId::new("u"), &after), Err(Error::Refused(_))), "{after:?}");
        }
    }
}
