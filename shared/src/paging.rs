//! Pagination: reads pages and counts of DynamoDB queries within limits of rows, bytes and time.
//!
//! The indexes of lists are narrow: they have the keys of rows and what filters need. A page reads the entries of an index in the order of
//! the list, and then the rows of those entries from the table. An index lags, so a row may have been deleted, or may no longer match.
//!
//! DynamoDB applies a filter after it has read an entry. A query whose filter matches few entries would therefore read a whole account.
//! Instead a page ends early: it may be short or empty, and its page token marks the start of the next page.

use std::collections::VecDeque;
use std::time::Duration;

use aws_sdk_dynamodb::operation::query::builders::QueryFluentBuilder;
use aws_sdk_dynamodb::types::Select;
use futures::future::try_join_all;
use tokio::time::Instant;

use crate::dynamo::{BATCH_GET_LIMIT, Item, store_error};
use crate::error::{Error, Result};
use crate::http::page::PAGE_SIZE;

/// The maximum number of index entries that one page evaluates.
pub const MAX_EVALUATED: usize = 10_000;
/// The maximum number of rows that one page reads if the index does not have all attributes that the filter needs.
pub const MAX_CANDIDATES: usize = 2_000;
/// The time limit for reading the rows of one page.
const PAGE_BUDGET: Duration = Duration::from_secs(5);
/// The time limit of a count. API Gateway ends a request after 29 s.
pub const COUNT_BUDGET: Duration = Duration::from_secs(20);
/// The factor by which a filtered page increases the limit of its next query if the page is not full.
const GROWTH: usize = 4;
/// The maximum number of entries that one query of a filtered page evaluates.
const LONGEST_STEP: usize = 2_500;
/// The minimum number of rows that are read at once if not all of them may match.
const MIN_CANDIDATES: usize = 20;

/// The limits of one page.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The maximum number of rows to return.
    pub rows: usize,
    /// The maximum number of index entries to evaluate.
    pub evaluated: usize,
    /// The maximum number of rows to read.
    pub candidates: usize,
    /// The maximum size of the rows in a response in bytes, see [`crate::http::page`].
    pub bytes: u64,
    /// The time limit for reading.
    pub time: Duration,
}

impl Bounds {
    /// Returns the default limits of a page with at most `rows` rows.
    #[must_use]
    pub fn of_page(rows: usize) -> Self {
        Self { rows, evaluated: MAX_EVALUATED, candidates: usize::MAX, bytes: PAGE_SIZE, time: PAGE_BUDGET }
    }
}

/// The index entries of a list, in one or several partitions.
#[derive(Clone, Debug)]
pub struct Source {
    /// The query of each partition, without its limit and start.
    pub queries: Vec<QueryFluentBuilder>,
    /// The sort key of the index. Its values are unique.
    pub sort_key: &'static str,
    pub is_ascending: bool,
    /// Whether the queries have filters.
    pub is_filtered: bool,
    /// Whether each entry that passes the filters has a row that matches, as far as the index is up to date.
    pub is_exact: bool,
}

/// A page of a list.
#[derive(Clone, Debug, PartialEq)]
pub struct Page<T> {
    pub rows: Vec<T>,
    /// The sort key after which the next page starts, if there may be one.
    pub next: Option<String>,
    /// Whether a limit of the response ended the page, not one of the reads.
    pub is_full: bool,
    /// The number of index entries that were evaluated.
    pub evaluated: usize,
}

/// Reads a page of a list.
///
/// `starts` has the exclusive start key of each query, if the page is not the first one. `fetch` returns the row of each entry, if there is
/// one and it matches; `size` returns the size of a row in the response.
///
/// # Errors
/// [`Error::Store`], and what `fetch` and `size` return.
pub async fn page<T, F: Future<Output = Result<Vec<Option<T>>>>>(
    operation: &'static str,
    bounds: Bounds,
    source: Source,
    starts: Option<Vec<Item>>,
    fetch: impl Fn(Vec<Item>) -> F,
    size: impl Fn(&T) -> Result<u64>,
) -> Result<Page<T>> {
    let is_exact = source.is_exact;
    let mut entries = Entries::new(operation, bounds, source, starts);
    let (mut rows, mut last): (Vec<T>, Option<String>) = (Vec::new(), None);
    let (mut bytes, mut candidates) = (0, 0);
    loop {
        let missing = bounds.rows - rows.len();
        let wanted = if is_exact { missing } else { missing.max(MIN_CANDIDATES) };
        let found = entries.next(wanted.min(BATCH_GET_LIMIT)).await?;
        candidates += found.len();
        let (positions, items): (Vec<String>, Vec<Item>) = found.into_iter().unzip();
        let fetched = if items.is_empty() { Vec::new() } else { fetch(items).await? };
        for (position, row) in positions.into_iter().zip(fetched) {
            if let Some(row) = row {
                let size = size(&row)?;
                // Every page contains at least one row, so that every page makes progress.
                if rows.len() == bounds.rows || (!rows.is_empty() && bytes + size > bounds.bytes) {
                    return Ok(Page { rows, next: last, is_full: true, evaluated: entries.evaluated });
                }
                bytes += size;
                rows.push(row);
            }
            last = Some(position);
        }
        let is_full = rows.len() == bounds.rows;
        if entries.is_finished() {
            return Ok(Page { rows, next: None, is_full, evaluated: entries.evaluated });
        }
        // If not all rows match, more are read to find out whether there is a next page.
        if is_full && is_exact && entries.has_ready() {
            return Ok(Page { rows, next: last, is_full, evaluated: entries.evaluated });
        }
        if entries.is_over_limit() || candidates >= bounds.candidates {
            let next = if entries.has_ready() { last } else { entries.reached().or(last) };
            return Ok(Page { rows, next, is_full, evaluated: entries.evaluated });
        }
    }
}

/// Reads the index entries of a list, in its order: those of all partitions, merged.
struct Entries {
    operation: &'static str,
    partitions: Vec<Partition>,
    sort_key: &'static str,
    is_ascending: bool,
    is_filtered: bool,
    /// Merged entries that were not returned yet.
    ready: VecDeque<(String, Item)>,
    /// The limit of the next query of a filtered list.
    step: Option<usize>,
    evaluated: usize,
    limit: usize,
    deadline: Instant,
}

struct Partition {
    query: QueryFluentBuilder,
    start: Option<Item>,
    /// Entries that were read.
    entries: VecDeque<(String, Item)>,
    /// The sort key up to which the partition was evaluated.
    reached: Option<String>,
    is_exhausted: bool,
}

impl Entries {
    fn new(operation: &'static str, bounds: Bounds, source: Source, starts: Option<Vec<Item>>) -> Self {
        let starts = starts.into_iter().flatten().map(Some).chain(std::iter::repeat(None));
        let partitions = source.queries.into_iter().zip(starts).map(|(query, start)| Partition {
            query: query.scan_index_forward(source.is_ascending),
            start,
            entries: VecDeque::new(),
            reached: None,
            is_exhausted: false,
        });
        Self {
            operation,
            partitions: partitions.collect(),
            sort_key: source.sort_key,
            is_ascending: source.is_ascending,
            is_filtered: source.is_filtered,
            ready: VecDeque::new(),
            step: None,
            evaluated: 0,
            limit: bounds.evaluated,
            deadline: Instant::now() + bounds.time,
        }
    }

    /// Returns the next entries with their sort keys, at most `wanted`. Fewer are all that there are, or all within the limits. One more
    /// entry is read, which shows whether there are more.
    async fn next(&mut self, wanted: usize) -> Result<Vec<(String, Item)>> {
        loop {
            self.merge();
            if self.ready.len() > wanted || self.is_exhausted() || (self.evaluated > 0 && self.is_over_limit()) {
                let count = wanted.min(self.ready.len());
                return Ok(self.ready.drain(..count).collect());
            }
            self.read(wanted + 1 - self.ready.len()).await?;
        }
    }

    /// Reads more entries of each partition of which all entries are merged.
    async fn read(&mut self, missing: usize) -> Result<()> {
        let step = match self.step.filter(|_| self.is_filtered) {
            Some(last) => (last * GROWTH).min(LONGEST_STEP).min(self.limit.saturating_sub(self.evaluated)).max(1),
            None => missing,
        };
        self.step = Some(step);
        let (operation, sort_key) = (self.operation, self.sort_key);
        let reads = self.partitions.iter_mut().filter(|partition| partition.needs_read());
        let evaluated = try_join_all(reads.map(|partition| partition.read(operation, sort_key, step))).await?;
        self.evaluated += evaluated.iter().sum::<usize>();
        Ok(())
    }

    /// Moves the entries whose place in the list is known to `ready`: none that was not read yet can be before them.
    fn merge(&mut self) {
        let is_before = |one: &str, other: &str| if self.is_ascending { one < other } else { one > other };
        loop {
            let mut first: Option<(usize, &str)> = None;
            for (index, partition) in self.partitions.iter().enumerate() {
                if let Some((position, _)) = partition.entries.front()
                    && first.is_none_or(|(_, first)| is_before(position, first))
                {
                    first = Some((index, position));
                }
            }
            let Some((index, position)) = first else { return };
            let may_be_before = |partition: &Partition| {
                partition.needs_read() && partition.reached.as_ref().is_none_or(|reached| is_before(reached, position))
            };
            if self.partitions.iter().any(may_be_before) {
                return;
            }
            self.ready.extend(self.partitions[index].entries.pop_front());
        }
    }

    fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether all partitions have been read to their ends.
    fn is_exhausted(&self) -> bool {
        self.partitions.iter().all(|partition| partition.is_exhausted && partition.entries.is_empty())
    }

    /// Whether all entries have been returned.
    fn is_finished(&self) -> bool {
        self.ready.is_empty() && self.is_exhausted()
    }

    fn is_over_limit(&self) -> bool {
        self.evaluated >= self.limit || Instant::now() > self.deadline
    }

    /// The sort key up to which all entries have been returned or excluded, if `ready` is empty.
    fn reached(&self) -> Option<String> {
        let reached = self.partitions.iter().filter(|partition| partition.needs_read());
        let reached = reached.map(|partition| partition.reached.clone());
        if self.is_ascending { reached.min().flatten() } else { reached.max().flatten() }
    }
}

impl Partition {
    fn needs_read(&self) -> bool {
        self.entries.is_empty() && !self.is_exhausted
    }

    /// Evaluates at most `limit` entries, and returns their number.
    async fn read(&mut self, operation: &'static str, sort_key: &'static str, limit: usize) -> Result<usize> {
        let query = self.query.clone().limit(i32::try_from(limit).unwrap_or(i32::MAX));
        let answer = query.set_exclusive_start_key(self.start.take()).send().await.map_err(store_error(operation))?;
        for item in answer.items.unwrap_or_default() {
            self.entries.push_back((position(&item, sort_key)?, item));
        }
        match answer.last_evaluated_key {
            Some(key) => {
                self.reached = Some(position(&key, sort_key)?);
                self.start = Some(key);
            }
            None => self.is_exhausted = true,
        }
        Ok(usize::try_from(answer.scanned_count).unwrap_or_default())
    }
}

fn position(item: &Item, sort_key: &str) -> Result<String> {
    let value = item.get(sort_key).and_then(|value| value.as_s().ok()).cloned();
    value.ok_or_else(|| Error::internal(format!("an index entry is without {sort_key}")))
}

/// Reads the entries of queries, in no particular order; `None` if there are more than `limit`, or reading exceeds the time limit of a page.
///
/// # Errors
/// [`Error::Store`].
pub async fn entries(
    operation: &'static str,
    limit: usize,
    queries: Vec<QueryFluentBuilder>,
) -> Result<Option<Vec<Item>>> {
    let deadline = Instant::now() + PAGE_BUDGET;
    let (mut entries, mut evaluated) = (Vec::new(), 0);
    for query in queries {
        let mut start = None;
        loop {
            // One more than the limit shows that there are more.
            let left = i32::try_from((limit - evaluated).saturating_add(1)).unwrap_or(i32::MAX);
            let query = query.clone().limit(left).set_exclusive_start_key(start);
            let answer = query.send().await.map_err(store_error(operation))?;
            evaluated += usize::try_from(answer.scanned_count).unwrap_or_default();
            entries.extend(answer.items.unwrap_or_default());
            if evaluated > limit {
                return Ok(None);
            }
            start = answer.last_evaluated_key;
            if start.is_none() {
                break;
            }
            if Instant::now() > deadline {
                return Ok(None);
            }
        }
    }
    Ok(Some(entries))
}

/// Counts the rows that match a query. `too_many` is the error message when counting exceeds the time limit of a request.
///
/// # Errors
/// [`Error::Store`]; [`Error::Refused`] when there are too many rows to evaluate in one request.
pub async fn count(operation: &'static str, query: QueryFluentBuilder, too_many: &str) -> Result<u64> {
    count_within(COUNT_BUDGET, operation, query, too_many).await
}

/// Like [`count`], within a time limit that the caller sets.
///
/// # Errors
/// See [`count`].
pub async fn count_within(
    budget: Duration,
    operation: &'static str,
    query: QueryFluentBuilder,
    too_many: &str,
) -> Result<u64> {
    let deadline = Instant::now() + budget;
    let mut pages = query.select(Select::Count).into_paginator().send();
    let mut count = 0;
    while let Some(page) = pages.next().await {
        let page = page.map_err(store_error(operation))?;
        count += u64::try_from(page.count).unwrap_or_default();
        if page.last_evaluated_key.is_some() && Instant::now() > deadline {
            return Err(Error::Refused(too_many.to_owned()));
        }
    }
    Ok(count)
}
