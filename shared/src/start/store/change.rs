//! Changes of a start task's record.

use aws_sdk_dynamodb::types::AttributeValue;
use uuid::Uuid;

use super::sort_key;
use crate::dynamo::{Update, number, text, to_item};
use crate::error::Result;
use crate::id;
use crate::id::UserId;
use crate::start::task::{PendingCommand, Snapshot};

/// A change of a record's attributes.
#[derive(Clone, Debug, Default)]
pub struct Change(pub(super) Update);

impl Change {
    /// Sets an attribute.
    #[must_use]
    pub fn set(self, name: &str, value: AttributeValue) -> Self {
        Self(self.0.set(name, value))
    }

    /// Removes an attribute.
    #[must_use]
    pub fn remove(self, name: &str) -> Self {
        Self(self.0.remove(name))
    }

    /// Adds a note for the user.
    #[must_use]
    pub fn note(self, note: impl Into<String>) -> Self {
        Self(self.0.append("notes", [text(note)]))
    }

    /// Sets the command whose end the start waits for.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the command cannot be written as an attribute.
    pub fn command(self, command: &PendingCommand) -> Result<Self> {
        Ok(self.set("command", AttributeValue::M(to_item(command)?)))
    }

    /// Moves the task to another state: the current attributes and the history change together.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the snapshot cannot be written as an item.
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
        Ok(Self(change.0.append("history", [AttributeValue::M(item)])))
    }

    /// Ends the task: no worker processes it again.
    #[must_use]
    pub fn finished(self) -> Self {
        Self(self.0.remove_all(&[
            "unfinished_shard",
            "due_at",
            "lease_owner",
            "lease_until",
            "command",
            "deadline",
            "failure",
            "secrets_sealed",
            "open_claims",
        ]))
    }

    /// The change that makes a task READY.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the snapshot cannot be written as an item.
    pub(super) fn ready(user: &UserId, id: Uuid, conversation: Uuid, snapshot: &Snapshot) -> Result<Self> {
        let conversation = text(user.key_of(&id::hex(conversation)));
        Ok(Self::default().state(id, snapshot)?.set("conversation_key", conversation).finished())
    }
}

/// A counter of attempts as an attribute.
#[must_use]
pub fn attempts(count: u32) -> AttributeValue {
    number(count)
}
