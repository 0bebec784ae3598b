//! Sandbox records in DynamoDB: owner, encrypted session key, desired state, and the provider's data.

use std::collections::HashMap;

use aws_sdk_dynamodb::Client;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use crate::clock::{Time, sortable};
use crate::digest::sha256_hex;
use crate::dynamo::{Condition, Item, Table, Update, from_item, number, store_error, text, to_item};
use crate::error::Result;
use crate::id::UserId;
use crate::sandbox::MAX_ID;
use crate::user::seal::Sealer;

/// Index for session key lookup: a sandbox by the hash of its session key.
pub const BY_SESSION_KEY: &str = "by-session-key";
/// Index: a user's sandboxes by creation time.
pub const BY_CREATED: &str = "by-created";

/// The desired state of a sandbox. Its actual state is computed on read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// Running.
    Running,
    /// Suspended in memory.
    Paused,
    /// Terminated. A resume launches it again.
    Stopped,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// The owner.
    pub user: UserId,
    pub id: String,
    /// The sandbox spec (the image).
    pub spec_id: String,
    /// The session key, encrypted.
    pub session_key_sealed: String,
    /// The hash of the session key, for session key lookup.
    pub session_key_hash: String,
    #[serde(serialize_with = "sortable::serialize")]
    pub created_at: Time,
    /// The time of the latest start of a conversation in the sandbox.
    #[serde(serialize_with = "sortable::serialize")]
    pub used_at: Time,
    /// The desired state.
    pub wanted: Wanted,
    /// The port of its agent server on this machine (process sandboxes, Docker sandboxes on the host network).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// The store of sandbox records.
#[derive(Clone, Debug)]
pub struct SandboxStore {
    table: Table,
    sealer: Sealer,
}

impl SandboxStore {
    /// Creates a store on the `sandboxes` table.
    #[must_use]
    pub(crate) fn new(dynamodb: Client, table: String, sealer: Sealer) -> Self {
        Self { table: Table::new(dynamodb, table), sealer }
    }

    /// Creates a record with an encrypted session key. Does not store it.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the key cannot be encrypted.
    pub async fn new_record(
        &self,
        user: &UserId,
        id: &str,
        spec_id: &str,
        key: &SecretString,
    ) -> Result<SandboxRecord> {
        let now = Time::now();
        Ok(SandboxRecord {
            user: user.clone(),
            id: id.to_owned(),
            spec_id: spec_id.to_owned(),
            session_key_sealed: self.sealer.seal(&purpose(user, id), key).await?,
            session_key_hash: sha256_hex(key.expose_secret()),
            created_at: now,
            used_at: now,
            wanted: Wanted::Running,
            port: None,
        })
    }

    /// Decrypts the record's session key.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when it was encrypted under another key.
    pub async fn session_key(&self, record: &SandboxRecord) -> Result<SecretString> {
        self.sealer.open(&purpose(&record.user, &record.id), &record.session_key_sealed).await
    }

    /// Stores a new record. Returns it, or the existing record with the same id.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn put_new(&self, record: SandboxRecord) -> Result<SandboxRecord> {
        if self.table.put(to_item(&record)?, Condition::Missing("id")).await? {
            return Ok(record);
        }
        Ok(self.get(&record.user, &record.id).await?.unwrap_or(record))
    }

    /// Returns one record.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn get(&self, user: &UserId, id: &str) -> Result<Option<SandboxRecord>> {
        Ok(self.batch_get(user, &[id.to_owned()]).await?.pop().flatten())
    }

    /// Returns whether the user has a sandbox with this id, by a consistent read.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn exists(&self, user: &UserId, id: &str) -> Result<bool> {
        if !is_id(id) {
            return Ok(false);
        }
        Ok(self.table.get(key(user, id)).await?.is_some())
    }

    /// Returns records in the order of the ids.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn batch_get(&self, user: &UserId, ids: &[String]) -> Result<Vec<Option<SandboxRecord>>> {
        let mut found: HashMap<String, SandboxRecord> = HashMap::new();
        let mut wanted: Vec<&String> = ids.iter().filter(|id| is_id(id)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        for item in self.table.batch_get(wanted.into_iter().map(|id| key(user, id)).collect()).await? {
            let record: SandboxRecord = from_item(item)?;
            found.insert(record.id.clone(), record);
        }
        Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
    }

    /// Returns all records of a user, newest first.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn list(&self, user: &UserId) -> Result<Vec<SandboxRecord>> {
        let mut records = Vec::new();
        let mut pages = self
            .table
            .query()
            .index_name(BY_CREATED)
            .key_condition_expression("#user = :user")
            .expression_attribute_names("#user", "user")
            .expression_attribute_values(":user", text(user.as_str()))
            .scan_index_forward(false)
            .into_paginator()
            .items()
            .send();
        while let Some(item) = pages.next().await {
            records.push(from_item(item.map_err(store_error("Query sandboxes"))?)?);
        }
        Ok(records)
    }

    /// Returns the sandbox with this session key, of any user.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn find_by_session_key(&self, key: &str) -> Result<Option<SandboxRecord>> {
        let found = self
            .table
            .query()
            .index_name(BY_SESSION_KEY)
            .key_condition_expression("session_key_hash = :hash")
            .expression_attribute_values(":hash", text(sha256_hex(key)))
            .limit(1)
            .send()
            .await
            .map_err(store_error("Query sandboxes"))?;
        found.items.unwrap_or_default().pop().map(from_item).transpose()
    }

    /// Sets the desired state. Returns false when the record does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_wanted(&self, user: &UserId, id: &str, wanted: Wanted) -> Result<bool> {
        let value = match wanted {
            Wanted::Running => "running",
            Wanted::Paused => "paused",
            Wanted::Stopped => "stopped",
        };
        self.apply(user, id, Update::new().set("wanted", text(value))).await
    }

    /// Sets the port of the sandbox's agent server. Returns false when the record does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_port(&self, user: &UserId, id: &str, port: u16) -> Result<bool> {
        self.apply(user, id, Update::new().set("port", number(port.into()))).await
    }

    /// Sets the spec and the port with which the agent server is launched. Returns false when the record does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_launched(&self, user: &UserId, id: &str, port: u16, spec_id: &str) -> Result<bool> {
        self.apply(user, id, Update::new().set("port", number(port.into())).set("spec_id", text(spec_id))).await
    }

    /// Sets the sandbox's session key. Returns false when the record does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`]; [`crate::Error::Internal`] when the key cannot be encrypted.
    pub async fn set_session_key(&self, user: &UserId, id: &str, key: &SecretString) -> Result<bool> {
        let sealed = self.sealer.seal(&purpose(user, id), key).await?;
        let hash = sha256_hex(key.expose_secret());
        let update = Update::new().set("session_key_sealed", text(sealed)).set("session_key_hash", text(hash));
        self.apply(user, id, update).await
    }

    /// Sets the time of use to now. Returns false when the record does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn mark_used(&self, user: &UserId, id: &str) -> Result<bool> {
        self.apply(user, id, Update::new().set("used_at", text(Time::now().sortable()))).await
    }

    /// Deletes the record. Returns false when it does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn delete(&self, user: &UserId, id: &str) -> Result<bool> {
        Ok(is_id(id) && self.table.delete(key(user, id), Condition::Exists("id")).await?.is_ok())
    }

    /// Updates a record. Returns false when it does not exist.
    async fn apply(&self, user: &UserId, id: &str, update: Update) -> Result<bool> {
        Ok(is_id(id) && self.table.apply(key(user, id), update.condition(Condition::Exists("id"))).await?)
    }
}

fn key(user: &UserId, id: &str) -> Item {
    Item::from([("user".into(), text(user.as_str())), ("id".into(), text(id))])
}

/// Returns whether a text can be a sandbox id. DynamoDB refuses keys that are empty or longer than 1 KB.
fn is_id(text: &str) -> bool {
    (1..=MAX_ID).contains(&text.len())
}

fn purpose(user: &UserId, id: &str) -> String {
    format!("session-key:{user}:{id}")
}
