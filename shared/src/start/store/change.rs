//! Conditional updates of start task records.

use aws_sdk_dynamodb::types::AttributeValue;
use uuid::Uuid;

use super::sort_key;
use crate::dynamo::{Update, number, text, to_item};
use crate::error::Result;
use crate::id::{self, UserId};
use crate::start::task::{PendingCommand, Snapshot};

/// An update of a record's attributes.
#[derive(Clone, Debug, Default)]
pub struct Change(Box<Update>);

impl Change {
    pub(super) fn update(&self) -> Update {
        Update::clone(&self.0)
    }

    pub(super) fn map(self, change: impl FnOnce(Update) -> Update) -> Self {
        Self(Box::new(change(*self.0)))
    }

    #[must_use]
    pub fn set(self, name: &str, value: AttributeValue) -> Self {
        self.map(|update| update.set(name, value))
    }

    #[must_use]
    pub fn remove(self, name: &str) -> Self {
        self.map(|update| update.remove(name))
    }

    /// Appends a note for the user.
    #[must_use]
    pub fn note(self, note: impl Into<String>) -> Self {
        self.map(|update| update.append("notes", [text(note)]))
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
        Ok(change.map(|update| update.append("history", [AttributeValue::M(item)])))
    }

    /// Ends the task: no worker processes it again.
    #[must_use]
    pub fn finished(self) -> Self {
        self.map(|update| {
            update.remove_all(&[
                "unfinished_shard",
                "due_at",
                "lease_owner",
                "lease_until",
                "command",
                "deadline",
                "failure",
                "secrets_sealed",
                "open_claims",
            ])
        })
    }

    /// The change that makes a task READY.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if the snapshot cannot be serialised.
    pub(super) fn ready(user: &UserId, id: Uuid, conversation: Uuid, snapshot: &Snapshot) -> Result<Self> {
        let conversation = text(user.key_of(&id::hex(conversation)));
        Ok(Self::default().state(id, snapshot)?.set("conversation_key", conversation).finished())
    }
}

/// Converts a counter of attempts to an attribute.
#[must_use]
pub fn attempts(count: u32) -> AttributeValue {
    number(count)
}
