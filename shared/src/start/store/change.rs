//! Conditional updates of a start task's two rows.

use aws_sdk_dynamodb::types::AttributeValue;
use uuid::Uuid;

use super::{LEASE_ATTRIBUTES, sort_key};
use crate::dynamo::{Update, number, text, to_item};
use crate::error::Result;
use crate::id::{self, UserId};
use crate::start::task::{Compensation, PendingCommand, Snapshot};

/// An update of a task's attributes. Each attribute is changed in the row that contains it, see [`LEASE_ATTRIBUTES`].
#[derive(Clone, Debug, Default)]
pub struct Change {
    /// The change of the task's own row.
    pub(super) task: Box<Update>,
    /// The change of its lease row.
    pub(super) lease: Box<Update>,
}

impl Change {
    pub(super) fn map_task(self, change: impl FnOnce(Update) -> Update) -> Self {
        Self { task: Box::new(change(*self.task)), lease: self.lease }
    }

    pub(super) fn map_lease(self, change: impl FnOnce(Update) -> Update) -> Self {
        Self { task: self.task, lease: Box::new(change(*self.lease)) }
    }

    fn map(self, name: &str, change: impl FnOnce(Update) -> Update) -> Self {
        if LEASE_ATTRIBUTES.contains(&name) { self.map_lease(change) } else { self.map_task(change) }
    }

    #[must_use]
    pub fn set(self, name: &str, value: AttributeValue) -> Self {
        self.map(name, |update| update.set(name, value))
    }

    #[must_use]
    pub fn remove(self, name: &str) -> Self {
        self.map(name, |update| update.remove(name))
    }

    /// Appends a note for the user.
    #[must_use]
    pub fn note(self, note: impl Into<String>) -> Self {
        self.map_task(|update| update.append("notes", [text(note)]))
    }

    /// Sets the command that the start waits for.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if the command cannot be serialised.
    pub fn command(self, command: &PendingCommand) -> Result<Self> {
        Ok(self.set("command", AttributeValue::M(to_item(command)?)))
    }

    /// Changes the task's state: the current attributes and the history change in one update.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if the snapshot cannot be serialised.
    pub fn state(mut self, id: Uuid, snapshot: &Snapshot) -> Result<Self> {
        let item = to_item(snapshot)?;
        for name in ["detail", "app_conversation_id", "sandbox_id", "agent_server_url"] {
            if let Some(value) = item.get(name) {
                self = self.set(name, value.clone());
            }
        }
        let change = self
            .set("status", item["status"].clone())
            .set("updated_at", item["updated_at"].clone())
            .set("updated_sort", text(sort_key(snapshot.updated_at, id)));
        Ok(change.map_task(|update| update.append("history", [AttributeValue::M(item)])))
    }

    /// Adds a state to the history that the task passes in the update that changes it to a later state, which must follow.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if the snapshot cannot be serialised.
    pub fn passed_state(self, snapshot: &Snapshot) -> Result<Self> {
        let item = to_item(snapshot)?;
        Ok(self.map_task(|update| update.append("history", [AttributeValue::M(item)])))
    }

    /// Replaces the text for the user in the current state and in its entry of the history.
    #[must_use]
    pub(super) fn detail(self, entry: usize, detail: &str) -> Self {
        self.set("detail", text(detail)).set(&format!("history[{entry}].detail"), text(detail))
    }

    /// Removes what only an unfinished task needs.
    fn finished(self) -> Self {
        self.map_task(|update| update.remove_all(&["deadline", "secrets_sealed"]))
    }

    /// The change that makes a task READY.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if the snapshot cannot be serialised.
    pub(super) fn ready(user: &UserId, id: Uuid, conversation: Uuid, snapshot: &Snapshot) -> Result<Self> {
        let conversation = text(user.key_of(&id::hex(conversation)));
        Ok(Self::default().state(id, snapshot)?.set("conversation_key", conversation).finished())
    }

    /// The change that makes a task ERROR. What the start has made remains to be undone.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if the snapshot cannot be serialised.
    pub(super) fn failed(id: Uuid, snapshot: &Snapshot) -> Result<Self> {
        let reason = text(snapshot.detail.clone().unwrap_or_default());
        let failed = Self::default().state(id, snapshot)?.set("failure", reason).finished();
        Ok(failed
            .set("compensation", text(Compensation::Pending.as_str()))
            .map_lease(|update| update.remove_all(&["command", "attempts", "refusals", "waits"])))
    }
}

/// Converts a counter of attempts to an attribute.
#[must_use]
pub fn attempts(count: u32) -> AttributeValue {
    number(count)
}
