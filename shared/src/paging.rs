//! Pagination: reads pages and counts of DynamoDB queries within limits of rows, bytes and time.
//!
//! DynamoDB applies a filter after it has read a row. A query whose filter matches few rows would therefore read a whole account. Instead a
//! page ends early: it may be short or empty, and its page token marks the start of the next page.

use std::time::Duration;

use aws_sdk_dynamodb::operation::query::builders::QueryFluentBuilder;
use aws_sdk_dynamodb::types::Select;
use tokio::time::Instant;

use crate::dynamo::{Item, store_error};
use crate::error::{Error, Result};
use crate::http::page::PAGE_SIZE;

/// The maximum number of rows that one page evaluates.
pub const MAX_EVALUATED: usize = 10_000;
/// The time limit for reading the rows of one page.
const PAGE_BUDGET: Duration = Duration::from_secs(5);
/// The time limit of a count. API Gateway ends a request after 29 s.
const COUNT_BUDGET: Duration = Duration::from_secs(20);
/// The factor by which a filtered page increases the limit of its next query if the page is not full.
const GROWTH: usize = 4;
/// The maximum number of rows that one query of a filtered page evaluates.
const LONGEST_STEP: usize = 1_000;

/// The limits of one page.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The maximum number of rows to return.
    pub rows: usize,
    /// The maximum number of rows to evaluate.
    pub evaluated: usize,
    /// The maximum size of the rows in a response in bytes, see [`crate::http::page`].
    pub bytes: u64,
    /// The time limit for reading.
    pub time: Duration,
}

impl Bounds {
    /// Returns the default limits of a page with at most `rows` rows.
    #[must_use]
    pub fn of_page(rows: usize) -> Self {
        Self { rows, evaluated: MAX_EVALUATED, bytes: PAGE_SIZE, time: PAGE_BUDGET }
    }
}

/// Reads a page of a query.
///
/// `query` creates the query, without its limit and start. `is_filtered` means that the query evaluates rows that do not match. `read`
/// returns a row and its size in the response; `after` returns the position of a row in the list, from the row or from its keys.
///
/// Returns the rows, and the position after which the next page starts if there may be one.
///
/// # Errors
/// [`Error::Store`], and what `read` and `after` return.
pub async fn page<T, A>(
    operation: &'static str,
    bounds: Bounds,
    start: Option<Item>,
    is_filtered: bool,
    query: impl Fn() -> QueryFluentBuilder,
    read: impl Fn(Item) -> Result<(T, u64)>,
    after: impl Fn(&Item) -> Result<A>,
) -> Result<(Vec<T>, Option<A>)> {
    let (mut rows, mut last): (Vec<T>, Option<A>) = (Vec::new(), None);
    let (mut evaluated, mut bytes) = (0, 0);
    let deadline = Instant::now() + bounds.time;
    let mut start = start;
    // One additional row shows whether the page is the last one.
    let mut step = bounds.rows + 1;
    loop {
        let answer = query()
            .limit(i32::try_from(step).unwrap_or(i32::MAX))
            .set_exclusive_start_key(start.take())
            .send()
            .await
            .map_err(store_error(operation))?;
        evaluated += usize::try_from(answer.scanned_count).unwrap_or_default();
        for item in answer.items.unwrap_or_default() {
            if rows.len() == bounds.rows {
                return Ok((rows, last));
            }
            let position = after(&item)?;
            let (row, size) = read(item)?;
            // Every page contains at least one row, so that every page makes progress.
            if !rows.is_empty() && bytes + size > bounds.bytes {
                return Ok((rows, last));
            }
            bytes += size;
            last = Some(position);
            rows.push(row);
        }
        let Some(key) = answer.last_evaluated_key else { return Ok((rows, None)) };
        if evaluated >= bounds.evaluated || Instant::now() > deadline {
            return Ok((rows, Some(after(&key)?)));
        }
        step = if is_filtered {
            (step * GROWTH).min(LONGEST_STEP).min(bounds.evaluated - evaluated)
        } else {
            bounds.rows + 1 - rows.len()
        };
        start = Some(key);
    }
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
