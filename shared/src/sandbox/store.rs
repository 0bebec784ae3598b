//! Records of sandboxes: whose they are, their sealed session keys, and what their service needs to find them again.

use std::collections::HashMap;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::AttributeValue;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};

use crate::clock::{Time, sortable};
use crate::digest::sha256_hex;
use crate::dynamo::{
    BATCH_GET_LIMIT, Item, batch_get_items, from_item, is_condition_failure, store_error, text, to_item,
};
use crate::error::Result;
use crate::id::UserId;
use crate::sandbox::MAX_ID;
use crate::user::seal::Sealer;

/// Index: a sandbox by the hash of its session key.
pub const BY_SESSION_KEY: &str = "by-session-key";
/// Index: a user's sandboxes by creation.
pub const BY_CREATED: &str = "by-created";

/// What the service wants the sandbox to be; what it is shows on looking.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// Running.
    Running,
    /// Frozen in memory.
    Paused,
    /// Ended, to be started again on resume.
    Stopped,
}

/// The record of a sandbox.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// Its owner.
    pub user: UserId,
    /// Its id.
    pub id: String,
    /// What it was made from.
    pub spec_id: String,
    /// Its session key, sealed.
    pub session_key_sealed: String,
    /// The hash by which a webhook's caller is found.
    pub session_key_hash: String,
    /// When it was made.
    #[serde(serialize_with = "sortable::serialize")]
    pub created_at: Time,
    /// When a conversation was last started in it.
    #[serde(serialize_with = "sortable::serialize")]
    pub used_at: Time,
    /// Whether it should run.
    pub wanted: Wanted,
    /// The port of its agent server on this machine (process sandboxes).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// The records of all sandboxes.
#[derive(Clone, Debug)]
pub struct SandboxStore {
    dynamodb: Client,
    table: String,
    sealer: Sealer,
}

impl SandboxStore {
    /// A store on the `sandboxes` table.
    #[must_use]
    pub(crate) fn new(dynamodb: Client, table: String, sealer: Sealer) -> Self {
        Self { dynamodb, table, sealer }
    }

    /// A new record, not stored yet, with its key sealed.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the key cannot be sealed.
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

    /// The record's session key.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when it was sealed under another key.
    pub async fn session_key(&self, record: &SandboxRecord) -> Result<SecretString> {
        self.sealer.open(&purpose(&record.user, &record.id), &record.session_key_sealed).await
    }

    /// Stores a new record, or returns the one that is there under this id.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn put_new(&self, record: SandboxRecord) -> Result<SandboxRecord> {
        let put = self
            .dynamodb
            .put_item()
            .table_name(&self.table)
            .set_item(Some(to_item(&record)?))
            .condition_expression("attribute_not_exists(id)")
            .send()
            .await
            .map_err(store_error("PutItem sandboxes"));
        match put {
            Ok(_) => Ok(record),
            Err(error) if is_condition_failure(&error) => {
                Ok(self.get(&record.user, &record.id).await?.unwrap_or(record))
            }
            Err(error) => Err(error),
        }
    }

    /// One record.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn get(&self, user: &UserId, id: &str) -> Result<Option<SandboxRecord>> {
        Ok(self.batch_get(user, &[id.to_owned()]).await?.pop().flatten())
    }

    /// Whether the user has a sandbox with this id now; reads consistently.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn exists(&self, user: &UserId, id: &str) -> Result<bool> {
        if !is_id(id) {
            return Ok(false);
        }
        let found = self
            .dynamodb
            .get_item()
            .table_name(&self.table)
            .set_key(Some(self.key(user, id)))
            .projection_expression("id")
            .consistent_read(true)
            .send()
            .await
            .map_err(store_error("GetItem sandboxes"))?;
        Ok(found.item.is_some())
    }

    /// Records in the order of the ids.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn batch_get(&self, user: &UserId, ids: &[String]) -> Result<Vec<Option<SandboxRecord>>> {
        let mut found: HashMap<String, SandboxRecord> = HashMap::new();
        let mut wanted: Vec<&String> = ids.iter().filter(|id| is_id(id)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        for chunk in wanted.chunks(BATCH_GET_LIMIT) {
            let keys = chunk.iter().map(|id| self.key(user, id)).collect();
            for item in batch_get_items(&self.dynamodb, &self.table, keys, "BatchGetItem sandboxes").await? {
                let record: SandboxRecord = from_item(item)?;
                found.insert(record.id.clone(), record);
            }
        }
        Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
    }

    /// All records of a user, newest first.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn list(&self, user: &UserId) -> Result<Vec<SandboxRecord>> {
        let mut records = Vec::new();
        let mut pages = self
            .dynamodb
            .query()
            .table_name(&self.table)
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

    /// The sandbox with this session key, whoever's it is.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn find_by_session_key(&self, key: &str) -> Result<Option<SandboxRecord>> {
        let found = self
            .dynamodb
            .query()
            .table_name(&self.table)
            .index_name(BY_SESSION_KEY)
            .key_condition_expression("session_key_hash = :hash")
            .expression_attribute_values(":hash", text(sha256_hex(key)))
            .limit(1)
            .send()
            .await
            .map_err(store_error("Query sandboxes"))?;
        found.items.unwrap_or_default().pop().map(from_item).transpose()
    }

    /// Sets what the sandbox should be. False when there is no record.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_wanted(&self, user: &UserId, id: &str, wanted: Wanted) -> Result<bool> {
        let value = match wanted {
            Wanted::Running => "running",
            Wanted::Paused => "paused",
            Wanted::Stopped => "stopped",
        };
        self.set(user, id, &[("wanted", text(value))]).await
    }

    /// Sets the port of the sandbox's agent server. False when there is no record.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_port(&self, user: &UserId, id: &str, port: u16) -> Result<bool> {
        self.set(user, id, &[("port", crate::dynamo::number(u32::from(port)))]).await
    }

    /// Notes what the sandbox's agent server is launched from and where it listens. False when there is no record.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_launched(&self, user: &UserId, id: &str, port: u16, spec_id: &str) -> Result<bool> {
        let port = crate::dynamo::number(u32::from(port));
        self.set(user, id, &[("port", port), ("spec_id", text(spec_id))]).await
    }

    /// Sets the sandbox's session key. False when there is no record.
    ///
    /// # Errors
    /// [`crate::Error::Store`]; [`crate::Error::Internal`] when the key cannot be sealed.
    pub async fn set_session_key(&self, user: &UserId, id: &str, key: &SecretString) -> Result<bool> {
        let sealed = self.sealer.seal(&purpose(user, id), key).await?;
        let hash = sha256_hex(key.expose_secret());
        self.set(user, id, &[("session_key_sealed", text(sealed)), ("session_key_hash", text(hash))]).await
    }

    /// Notes that the sandbox is used now. False when there is no record.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn mark_used(&self, user: &UserId, id: &str) -> Result<bool> {
        self.set(user, id, &[("used_at", text(Time::now().sortable()))]).await
    }

    /// Removes the record. False when there is none.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn delete(&self, user: &UserId, id: &str) -> Result<bool> {
        if !is_id(id) {
            return Ok(false);
        }
        let removed = self
            .dynamodb
            .delete_item()
            .table_name(&self.table)
            .set_key(Some(self.key(user, id)))
            .return_values(aws_sdk_dynamodb::types::ReturnValue::AllOld)
            .send()
            .await
            .map_err(store_error("DeleteItem sandboxes"))?;
        Ok(removed.attributes.is_some())
    }

    async fn set(&self, user: &UserId, id: &str, attributes: &[(&str, AttributeValue)]) -> Result<bool> {
        if !is_id(id) {
            return Ok(false);
        }
        let parts: Vec<String> = attributes.iter().map(|(name, _)| format!("#{name} = :{name}")).collect();
        let names = attributes.iter().map(|(name, _)| (format!("#{name}"), (*name).to_owned())).collect();
        let values = attributes.iter().map(|(name, value)| (format!(":{name}"), value.clone())).collect();
        let updated = self
            .dynamodb
            .update_item()
            .table_name(&self.table)
            .set_key(Some(self.key(user, id)))
            .update_expression(format!("SET {}", parts.join(", ")))
            .condition_expression("attribute_exists(id)")
            .set_expression_attribute_names(Some(names))
            .set_expression_attribute_values(Some(values))
            .send()
            .await
            .map_err(store_error("UpdateItem sandboxes"));
        match updated {
            Ok(_) => Ok(true),
            Err(error) if is_condition_failure(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    #[expect(clippy::unused_self, reason = "keys are the store's business")]
    fn key(&self, user: &UserId, id: &str) -> Item {
        Item::from([("user".into(), text(user.as_str())), ("id".into(), text(id))])
    }
}

/// Whether a text can be an id at all; DynamoDB refuses keys that are empty, or longer than 1 KB.
fn is_id(text: &str) -> bool {
    (1..=MAX_ID).contains(&text.len())
}

fn purpose(user: &UserId, id: &str) -> String {
    format!("session-key:{user}:{id}")
}
