//! API keys, by which programs authenticate as a user. The store holds only the hash of a key, so that no one can read a key there.

use aws_sdk_dynamodb::Client;
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::UserId;
use crate::clock::Time;
use crate::digest::sha256_hex;
use crate::dynamo::{Condition, Item, Table, from_item, store_error, text, to_item, transact, unless_written};
use crate::error::{Error, Result};
use crate::id;

/// The prefix of every key, by which scanners for leaked secrets recognize one.
const PREFIX: &str = "oh-";
/// Base-62 digits after the prefix: 256 bits.
const DIGITS: usize = 43;
/// The call that creates a key, for the log.
const CREATE: &str = "TransactWriteItems users";
/// The longest name of a key, in characters.
pub const MAX_NAME: usize = 100;
/// The most keys that one user may have.
pub const MAX_KEYS: usize = 100;

/// `kind` of the row by which a key is looked up. Its `user` is made of the key's hash.
const BY_HASH: &str = "api-key";
/// The prefix of `kind` of the row that the key's owner sees.
const OWNED: &str = "api-key#";

/// A key's record, without the key itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKey {
    /// The id by which it is revoked.
    #[serde(with = "id::as_hex")]
    pub id: Uuid,
    /// The name that its owner gave it.
    pub name: String,
    /// The time of its creation.
    pub created_at: Time,
    /// The first characters of the key, by which its owner recognizes it.
    pub begins_with: String,
}

#[derive(Serialize, Deserialize)]
struct Owned {
    user: UserId,
    kind: String,
    hash: String,
    #[serde(flatten)]
    key: ApiKey,
}

#[derive(Serialize, Deserialize)]
struct ByHash {
    /// See [`hash_key`].
    user: String,
    kind: String,
    owner: UserId,
}

/// API keys in the `users` table. Each has a row by which it is looked up, and one for its owner.
#[derive(Clone, Debug)]
pub struct ApiKeyStore {
    table: Table,
}

impl ApiKeyStore {
    /// A store on the `users` table.
    #[must_use]
    pub fn new(dynamodb: Client, users: String) -> Self {
        Self { table: Table::new(dynamodb, users) }
    }

    /// Whether a text has the form of a key. Tokens of other kinds have another form.
    #[must_use]
    pub fn looks_like_one(text: &str) -> bool {
        text.strip_prefix(PREFIX)
            .is_some_and(|digits| digits.len() == DIGITS && digits.bytes().all(|digit| digit.is_ascii_alphanumeric()))
    }

    /// Creates a key for the user. The key itself, which is returned beside its record, is not stored.
    ///
    /// # Errors
    /// [`Error::Refused`] when the name is empty or too long, or the user has too many keys; [`Error::Store`].
    pub async fn create(&self, user: &UserId, name: &str) -> Result<(ApiKey, SecretString)> {
        let name = name.trim();
        if name.is_empty() || name.chars().count() > MAX_NAME {
            return Err(Error::Refused(format!("The name of a key must have 1 to {MAX_NAME} characters.")));
        }
        if self.list(user).await?.len() >= MAX_KEYS {
            return Err(Error::Refused(format!("There are {MAX_KEYS} keys already; revoke one first.")));
        }
        let secret = format!("{PREFIX}{}", id::random_base62(DIGITS));
        let key = ApiKey {
            id: id::new_uuid(),
            name: name.to_owned(),
            created_at: Time::now(),
            begins_with: secret[..PREFIX.len() + 4].to_owned(),
        };
        let hash = sha256_hex(&secret);
        let by_hash = ByHash { user: hash_key(&hash), kind: BY_HASH.into(), owner: user.clone() };
        let owned = Owned { user: user.clone(), kind: owned_kind(key.id), hash, key: key.clone() };
        let is_new = Condition::Missing("kind");
        let writes = vec![
            self.table.put_in_transaction(to_item(&by_hash)?, &is_new)?,
            self.table.put_in_transaction(to_item(&owned)?, &is_new)?,
        ];
        let written = transact(&self.table.client, writes, CREATE).await.and_then(|written| written.require(CREATE));
        // Otherwise the user has a key that no one knows.
        let row = row(user.as_str(), &owned.kind);
        unless_written(written, async || Ok(self.table.get(row).await?.is_some())).await?;
        Ok((key, secret.into()))
    }

    /// The user's keys, oldest first.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn list(&self, user: &UserId) -> Result<Vec<ApiKey>> {
        let mut keys: Vec<ApiKey> = self.owned(user).await?.into_iter().map(|owned| owned.key).collect();
        keys.sort_by_key(|key| (key.created_at, key.id));
        Ok(keys)
    }

    /// Revokes a key. Returns false when the user has no such key.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn revoke(&self, user: &UserId, key: Uuid) -> Result<bool> {
        let found = self.table.get(row(user.as_str(), &owned_kind(key))).await?;
        let Some(owned) = found.map(from_item::<Owned>).transpose()? else { return Ok(false) };
        let exists = Condition::Exists("kind");
        let writes = vec![
            self.table.delete_in_transaction(row(&hash_key(&owned.hash), BY_HASH), None)?,
            self.table.delete_in_transaction(row(user.as_str(), &owned.kind), Some(&exists))?,
        ];
        // Where the condition does not hold, another request has revoked it.
        Ok(transact(&self.table.client, writes, "TransactWriteItems users").await?.is_written())
    }

    /// The owner of a key. `None` when the text is no key, or the key was revoked: the read is consistent, so that a revocation takes
    /// effect at once.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn owner(&self, key: &SecretString) -> Result<Option<UserId>> {
        if !Self::looks_like_one(key.expose_secret()) {
            return Ok(None);
        }
        let found = self.table.get(row(&hash_key(&sha256_hex(key.expose_secret())), BY_HASH)).await?;
        Ok(found.map(from_item::<ByHash>).transpose()?.map(|found| found.owner))
    }

    async fn owned(&self, user: &UserId) -> Result<Vec<Owned>> {
        let mut items = self
            .table
            .query()
            .key_condition_expression("#user = :user AND begins_with(kind, :kind)")
            .expression_attribute_names("#user", "user")
            .expression_attribute_values(":user", text(user.as_str()))
            .expression_attribute_values(":kind", text(OWNED))
            .consistent_read(true)
            .into_paginator()
            .items()
            .send();
        let mut owned = Vec::new();
        while let Some(item) = items.next().await {
            owned.push(from_item(item.map_err(store_error("Query users"))?)?);
        }
        Ok(owned)
    }
}

fn owned_kind(key: Uuid) -> String {
    format!("{OWNED}{}", id::hex(key))
}

/// The partition of the row by which a key is looked up. It is no user's: no user's id is the hash of a key that they know.
fn hash_key(hash: &str) -> String {
    format!("{OWNED}{hash}")
}

fn row(user: &str, kind: &str) -> Item {
    Item::from([("user".into(), text(user)), ("kind".into(), text(kind))])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_distinguished_from_other_tokens() {
        let key = format!("{PREFIX}{}", id::random_base62(DIGITS));
        assert!(ApiKeyStore::looks_like_one(&key));
        for other in ["", "oh-", &key[1..], &key[..key.len() - 1], &format!("{key}0"), &key.replace("oh-", "oh_")] {
            assert!(!ApiKeyStore::looks_like_one(other), "{other}");
        }
        assert!(!ApiKeyStore::looks_like_one(&format!("{}.", &key[..key.len() - 1])));
    }
}
