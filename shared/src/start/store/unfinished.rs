//! What lease rows show of unfinished starts, for the gauges of the sweep and for the log.

use serde::Deserialize;
use tracing::Span;
use tracing::field::display;
use uuid::Uuid;

use super::{LEASE_SUFFIX, StartTaskStore};
use crate::clock::Time;
use crate::dynamo::{DueRow, Item, from_item};
use crate::error::Result;
use crate::trace::{self, TraceId};

/// The attributes of a lease row that describe its start.
#[derive(Deserialize)]
pub(super) struct LeaseRow {
    id: String,
    /// Rows of earlier versions lack it.
    created_at: Option<Time>,
    trace: Option<TraceId>,
    /// Present after the start has failed.
    compensation: Option<String>,
    /// Present after what a failed start made has been undone.
    expires_at: Option<u64>,
}

impl LeaseRow {
    pub(super) fn read(row: &Item) -> Option<Self> {
        from_item(row.clone()).ok()
    }

    /// The trace of the start; `None` in rows of earlier versions.
    pub(super) fn trace(&self, task: Uuid) -> Option<TraceId> {
        self.trace.clone().or_else(|| Some(TraceId::of_start(self.created_at?, task)))
    }
}

/// A start that has not ended, or that has failed and is to be undone or removed.
#[derive(Clone, Debug, PartialEq)]
pub struct UnfinishedStart {
    pub task: Uuid,
    /// `None` for starts of earlier versions.
    pub created_at: Option<Time>,
    /// `None` for starts of earlier versions.
    pub trace: Option<TraceId>,
    /// Whether it has failed.
    pub has_failed: bool,
}

impl StartTaskStore {
    /// Reads the starts of rows of the index [`StartTaskStore::unfinished`], eventually consistent.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn unfinished_starts(&self, rows: &[DueRow]) -> Result<Vec<UnfinishedStart>> {
        let items = self.unfinished().read(rows).await?;
        Ok(items.iter().filter_map(|item| UnfinishedStart::of(&LeaseRow::read(item)?)).collect())
    }
}

impl UnfinishedStart {
    /// A log span of its own.
    #[must_use]
    pub fn span(&self) -> Span {
        let span = trace::invocation();
        span.record("task", display(self.task));
        if let Some(trace) = &self.trace {
            span.record("trace", display(trace));
        }
        span
    }

    fn of(row: &LeaseRow) -> Option<Self> {
        let task = Uuid::try_parse(row.id.strip_suffix(LEASE_SUFFIX)?).ok()?;
        Some(Self {
            task,
            created_at: row.created_at,
            trace: row.trace(task),
            has_failed: row.compensation.is_some() || row.expires_at.is_some(),
        })
    }
}
