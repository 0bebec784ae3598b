//! Sparse indexes of due rows, which the sweep reads.

use std::collections::HashMap;
use std::time::Duration;

use futures::future::join_all;
use uuid::Uuid;

use super::error::store_error;
use super::update::{Condition, Update};
use super::{Item, Table, text};
use crate::clock::Time;
use crate::error::{Error, Result};
use crate::id::UserId;

/// A sparse index of the rows that a worker has to process, by the time at which they are due. It is partitioned by a shard and sorted
/// by `due_at`.
#[derive(Clone, Debug)]
pub struct DueIndex {
    pub table: Table,
    pub index: &'static str,
    /// The attribute that holds the shard.
    pub shard_attribute: &'static str,
    /// The names of all shards.
    pub shards: Vec<String>,
    /// The name of the table's sort key.
    pub sort_key: &'static str,
    /// Whether the ids of rows are UUIDs. A row with another id is malformed.
    pub has_uuids: bool,
}

/// A row that is due.
#[derive(Clone, Debug, PartialEq)]
pub struct DueRow {
    pub user: UserId,
    /// The id of a start, a conversation or a sandbox: the attribute `id` of the row, of a start's lease row without its suffix.
    pub id: String,
    due_at: String,
    key: Item,
}

impl DueRow {
    /// The id of a start or a conversation. `None` if the row is malformed.
    #[must_use]
    pub fn uuid(&self) -> Option<Uuid> {
        Uuid::try_parse(&self.id).ok()
    }
}

/// The result of [`DueIndex::due_and_next`].
#[derive(Debug, Default)]
pub struct Due {
    /// The rows to process.
    pub rows: Vec<DueRow>,
    /// The others.
    pub others: Vec<DueRow>,
    /// The first error.
    pub failed: Option<Error>,
}

/// The most rows of a shard that are read at once. The returned rows alternate between the users among them.
const DUE_READ: usize = 500;
/// The most rows of a shard that are returned at once.
pub const DUE_LIMIT: usize = 100;

impl DueIndex {
    /// Reads the rows of all users that were due before `now`: the oldest of each shard, up to [`DUE_LIMIT`], alternating between users. A
    /// shard that cannot be read does not delay the others; the first error is returned together with the rows.
    pub async fn due(&self, now: Time) -> (Vec<DueRow>, Option<Error>) {
        let Due { rows, failed, .. } = self.due_and_next(now, Duration::ZERO).await;
        (rows, failed)
    }

    /// As [`DueIndex::due`], together with the other rows that are due or become due within `ahead`, as far as they are among those that
    /// are read of a shard.
    pub async fn due_and_next(&self, now: Time, ahead: Duration) -> Due {
        let mut due = Due::default();
        let (now, until) = (now.sortable(), now.plus(ahead).sortable());
        for read in join_all(self.shards.iter().map(|shard| self.due_in(shard, &until))).await {
            match read {
                Ok(mut read) => {
                    due.others.extend(read.split_off(read.partition_point(|row| row.due_at < now)));
                    let (rows, others) = in_turn(read, DUE_LIMIT);
                    due.rows.extend(rows);
                    due.others.extend(others);
                }
                Err(error) => due.failed = due.failed.or(Some(error)),
            }
        }
        due
    }

    /// Reads the rows themselves, eventually consistent.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn read(&self, rows: &[DueRow]) -> Result<Vec<Item>> {
        self.table.batch_get_eventually(rows.iter().map(|row| row.key.clone()).collect()).await
    }

    async fn due_in(&self, shard: &str, until: &str) -> Result<Vec<DueRow>> {
        let mut rows = Vec::new();
        let mut start = None;
        loop {
            let left = i32::try_from(DUE_READ - rows.len()).map_err(Error::internal)?;
            let page = self
                .table
                .query()
                .index_name(self.index)
                .key_condition_expression("#shard = :shard AND due_at < :until")
                .expression_attribute_names("#shard", self.shard_attribute)
                .expression_attribute_values(":shard", text(shard))
                .expression_attribute_values(":until", text(until))
                .limit(left)
                .set_exclusive_start_key(start)
                .send()
                .await
                .map_err(store_error(self.table.operation("Query")))?;
            let items = page.items.unwrap_or_default();
            let read = items.len();
            for item in items {
                match self.row(&item) {
                    Some(row) => rows.push(row),
                    // Such a row must not delay the others.
                    None => tracing::error!(index = self.index, "store.row_without_owner_or_id"),
                }
            }
            start = page.last_evaluated_key.filter(|_| read > 0 && rows.len() < DUE_READ);
            if start.is_none() {
                return Ok(rows);
            }
        }
    }

    fn row(&self, item: &Item) -> Option<DueRow> {
        let attribute = |name: &str| item.get(name).and_then(|value| value.as_s().ok());
        let user = attribute("user")?;
        let key = [("user", user), (self.sort_key, attribute(self.sort_key)?)];
        let mut id = attribute("id")?.as_str();
        if self.has_uuids {
            id = id.split('#').next().filter(|id| Uuid::try_parse(id).is_ok())?;
        }
        Some(DueRow {
            user: UserId::new(user),
            id: id.to_owned(),
            due_at: attribute("due_at")?.clone(),
            key: key.into_iter().map(|(name, value)| (name.to_owned(), text(value))).collect(),
        })
    }

    /// Postpones a row to `until`, so that rows that are due earlier come first, unless another worker has changed its time meanwhile.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn postpone(&self, row: &DueRow, until: Time) -> Result<()> {
        let update = Update::new()
            .set("due_at", text(until.sortable()))
            .condition(Condition::equal("due_at", text(&row.due_at)));
        self.table.apply(row.key.clone(), update).await?;
        Ok(())
    }
}

/// Returns the first `limit` rows, alternating between users (round robin), and the others. The rows of one user keep their order.
fn in_turn(rows: Vec<DueRow>, limit: usize) -> (Vec<DueRow>, Vec<DueRow>) {
    let mut of_users: HashMap<UserId, usize> = HashMap::new();
    let mut turns: Vec<(usize, DueRow)> = rows
        .into_iter()
        .map(|row| {
            let turn = of_users.entry(row.user.clone()).or_default();
            *turn += 1;
            (*turn, row)
        })
        .collect();
    // The sort is stable: within a round, the oldest row comes first.
    turns.sort_by_key(|(turn, _)| *turn);
    let mut rows: Vec<DueRow> = turns.into_iter().map(|(_, row)| row).collect();
    let others = rows.split_off(limit.min(rows.len()));
    (rows, others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_take_turns() {
        let row = |user: &str, number: u128| DueRow {
            user: UserId::new(user),
            id: Uuid::from_u128(number).to_string(),
            due_at: String::new(),
            key: Item::new(),
        };
        let rows: Vec<DueRow> =
            (0..500).map(|number| row("flood", number)).chain([row("a", 500), row("b", 501), row("a", 502)]).collect();
        let taken: Vec<u128> =
            in_turn(rows.clone(), 6).0.iter().filter_map(DueRow::uuid).map(|id| id.as_u128()).collect();
        assert_eq!(taken, [0, 500, 501, 1, 502, 2]);
        assert_eq!(in_turn(rows.clone(), 6).1.len(), 497);
        assert_eq!(in_turn(rows, usize::MAX).0.len(), 503);
    }
}
