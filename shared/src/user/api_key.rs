//! API keys: how programs say whose they are. Of a key the store has nothing but its hash, so that nobody can read it there.

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{Delete, Put, TransactWriteItem};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::UserId;
use crate::clock::Time;
use crate::digest::sha256_hex;
use crate::dynamo::{Item, from_item, is_condition_failure, store_error, text, to_item, transact};
use crate::error::{Error, Result};
use crate::id;

/// The beginning of every key, by which scanners for leaked secrets recognise one.
const PREFIX: &str = "oh-";
/// Base-62 digits behind the prefix: 256 bits.
const DIGITS: usize = 43;
/// The longest name of a key, in characters.
pub const MAX_NAME: usize = 100;
/// The most keys that one user may have.
pub const MAX_KEYS: usize = 100;

/// `kind` of the row that a key is found by; its `user` is the key's hash.
const BY_HASH: &str = "api-key";
/// The beginning of `kind` of the row that its owner sees.
const OWNED: &str = "api-key#";

/// A key, without what makes it one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiKey {
    /// By which it is revoked.
    #[serde(with = "id::as_hex")]
    pub id: Uuid,
    /// What its owner calls it.
    pub name: String,
    /// When it was made.
    pub created_at: Time,
    /// The first characters of the key, by which its owner recognises it.
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

/// API keys in the `users` table: a row by which each is found, and one for its owner.
#[derive(Clone, Debug)]
pub struct ApiKeyStore {
    dynamodb: Client,
    table: String,
}

impl ApiKeyStore {
    /// A store on the `users` table.
    #[must_use]
    pub fn new(dynamodb: Client, users: String) -> Self {
        Self { dynamodb, table: users }
    }

    /// Whether a text has the form of a key; a token of another kind has not.
    #[must_use]
    pub fn looks_like_one(text: &str) -> bool {
        text.strip_prefix(PREFIX)
            .is_some_and(|digits| digits.len() == DIGITS && digits.bytes().all(|digit| digit.is_ascii_alphanumeric()))
    }

    /// Makes a key for the user. What is returned beside it is shown once, and nowhere kept.
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
        let writes = [to_item(&by_hash)?, to_item(&owned)?].map(|item| {
            let put = Put::builder().table_name(&self.table).set_item(Some(item));
            put.condition_expression("attribute_not_exists(kind)").build().map_err(Error::internal)
        });
        let writes: Vec<TransactWriteItem> =
            writes.into_iter().map(|put| Ok(TransactWriteItem::builder().put(put?).build())).collect::<Result<_>>()?;
        transact(&self.dynamodb, writes, "TransactWriteItems users").await?;
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

    /// Makes a key worthless. False when the user has no such key.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn revoke(&self, user: &UserId, key: Uuid) -> Result<bool> {
        let found = self
            .dynamodb
            .get_item()
            .table_name(&self.table)
            .set_key(Some(row(user.as_str(), &owned_kind(key))))
            .consistent_read(true)
            .send()
            .await
            .map_err(store_error("GetItem users"))?;
        let Some(owned) = found.item.map(from_item::<Owned>).transpose()? else { return Ok(false) };
        let delete = |key: Item, condition: Option<&str>| {
            let delete = Delete::builder().table_name(&self.table).set_key(Some(key));
            let delete = delete.set_condition_expression(condition.map(str::to_owned)).build();
            Ok::<_, Error>(TransactWriteItem::builder().delete(delete.map_err(Error::internal)?).build())
        };
        let writes = vec![
            delete(row(&hash_key(&owned.hash), BY_HASH), None)?,
            delete(row(user.as_str(), &owned.kind), Some("attribute_exists(kind)"))?,
        ];
        match transact(&self.dynamodb, writes, "TransactWriteItems users").await {
            Ok(()) => Ok(true),
            // Somebody else was quicker.
            Err(error) if is_condition_failure(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whose a key is; `None` when it is no key, or was revoked.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn owner(&self, key: &SecretString) -> Result<Option<UserId>> {
        if !Self::looks_like_one(key.expose_secret()) {
            return Ok(None);
        }
        let found = self
            .dynamodb
            .get_item()
            .table_name(&self.table)
            .set_key(Some(row(&hash_key(&sha256_hex(key.expose_secret())), BY_HASH)))
            // A key that was revoked a moment ago is worthless.
            .consistent_read(true)
            .send()
            .await
            .map_err(store_error("GetItem users"))?;
        Ok(found.item.map(from_item::<ByHash>).transpose()?.map(|found| found.owner))
    }

    async fn owned(&self, user: &UserId) -> Result<Vec<Owned>> {
        let mut items = self
            .dynamodb
            .query()
            .table_name(&self.table)
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

/// The partition of a key's row. Users cannot have it: their ids are no hashes of keys that they know.
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
    fn a_key_is_told_from_other_tokens() {
        let key = format!("{PREFIX}{}", id::random_base62(DIGITS));
        assert!(ApiKeyStore::looks_like_one(&key));
        for other in ["", "oh-", &key[1..], &key[..key.len() - 1], &format!("{key}0"), &key.replace("oh-", "oh_")] {
            assert!(!ApiKeyStore::looks_like_one(other), "{other}");
        }
        assert!(!ApiKeyStore::looks_like_one(&format!("{}.", &key[..key.len() - 1])));
    }
}
