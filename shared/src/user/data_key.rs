//! The deployment's data keys: stored in one row of the `users` table, encrypted under a KMS key, without which no one can decrypt
//! them.
//!
//! The first key is the attribute `encrypted`. The keys that have replaced it since are the list `rotated`, the newest last.

use std::time::Duration;

use aws_config::SdkConfig;
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::primitives::Blob as DynamoBlob;
use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::DataKeySpec;
use futures::future::try_join_all;

use super::seal::MAX_KEYS;
use crate::dynamo::{Condition, Item, Table, Update, store_error, text};
use crate::error::{Error, Result};

/// The row's key. Functions whose policies exclude the rows of users may still read and write this row.
const USER: &str = "#deployment";
const KIND: &str = "data-key";
/// The encryption context: KMS decrypts the keys only for a caller that passes the same.
const CONTEXT: (&str, &str) = ("purpose", "openhands-secrets");
/// KMS responds in milliseconds.
const ATTEMPT: Duration = Duration::from_secs(5);

/// The store of the data keys.
#[derive(Debug)]
pub struct DataKey {
    table: Table,
    kms: aws_sdk_kms::Client,
    kms_key: Option<String>,
}

/// A data key as KMS generates it.
struct Made {
    plain: Vec<u8>,
    encrypted: Vec<u8>,
}

impl DataKey {
    /// The data keys in the table, under the KMS key with this id, alias or ARN.
    #[must_use]
    pub fn new(sdk: &SdkConfig, dynamodb: Client, table: String, kms_key: String) -> Self {
        Self { kms_key: Some(kms_key), ..Self::stored_in(sdk, dynamodb, table) }
    }

    /// The data keys in the table, under the KMS key with which the first of them was encrypted. No first key is made.
    #[must_use]
    pub fn stored_in(sdk: &SdkConfig, dynamodb: Client, table: String) -> Self {
        let timeouts = crate::aws::timeouts(ATTEMPT);
        let config = aws_sdk_kms::config::Builder::from(sdk).timeout_config(timeouts).build();
        Self { table: Table::new(dynamodb, table), kms: aws_sdk_kms::Client::from_conf(config), kms_key: None }
    }

    /// The bytes of the keys, the newest last. The first process of a deployment makes the first key. When several processes are first
    /// at the same time, they use the key of one of them.
    ///
    /// # Errors
    /// [`Error::Store`], also when KMS refuses or fails: what is stored cannot be read or written for now.
    pub async fn keys(&self) -> Result<Vec<Vec<u8>>> {
        if let Some(encrypted) = self.stored().await? {
            return self.decrypt_all(encrypted).await;
        }
        let kms_key = self.kms_key.as_deref().ok_or_else(|| Error::internal("there is no data key"))?;
        let made = self.make(kms_key).await?;
        let mut item = row();
        item.insert("encrypted".into(), binary(made.encrypted));
        if self.table.put(item, Condition::Missing("encrypted")).await? {
            return Ok(vec![made.plain]);
        }
        // Another process was quicker; its key is the key.
        let encrypted = self.stored().await?;
        self.decrypt_all(encrypted.ok_or_else(|| Error::internal("the data key is gone"))?).await
    }

    /// Adds a data key. Every process that reads the keys from then on seals new secrets under it; the other keys stay, for what they
    /// sealed. Returns the number of keys.
    ///
    /// # Errors
    /// [`Error::Conflict`] when there is none yet, there are [`MAX_KEYS`] already, or another one was added at the same time;
    /// [`Error::Store`].
    pub async fn rotate(&self) -> Result<usize> {
        let stored = self.stored().await?;
        let stored = stored.ok_or_else(|| Error::Conflict("There is no data key yet".to_owned()))?;
        let [first, rotated @ ..] = &stored[..] else { return Err(Error::internal("a row without a data key")) };
        if stored.len() >= MAX_KEYS {
            return Err(Error::Conflict(format!("There are {MAX_KEYS} data keys already")));
        }
        let kms_key = match &self.kms_key {
            Some(key) => key.clone(),
            None => self.decrypt(first.clone()).await?.1,
        };
        let made = self.make(&kms_key).await?;
        let with_new: Vec<Vec<u8>> = stored.iter().cloned().chain([made.encrypted.clone()]).collect();
        let list = |keys: &[Vec<u8>]| AttributeValue::L(keys.iter().cloned().map(binary).collect());
        let update = Update::new()
            .set("rotated", list(&with_new[1..]))
            .condition(Condition::equal("encrypted", binary(first.clone())))
            .condition(Condition::unchanged("rotated", (!rotated.is_empty()).then(|| list(rotated))));
        // The SDK repeats an update whose response was lost.
        if self.table.apply(row(), update).await? || self.stored().await?.as_ref() == Some(&with_new) {
            return Ok(with_new.len());
        }
        Err(Error::Conflict("Another data key was added at the same time".to_owned()))
    }

    /// The encrypted keys, the newest last.
    async fn stored(&self) -> Result<Option<Vec<Vec<u8>>>> {
        let Some(item) = self.table.get(row()).await? else { return Ok(None) };
        let bytes = |value: &AttributeValue| value.as_b().ok().map(|blob| blob.as_ref().to_vec());
        let Some(first) = item.get("encrypted").and_then(bytes) else { return Ok(None) };
        let rotated = item.get("rotated").and_then(|value| value.as_l().ok()).map(Vec::as_slice).unwrap_or_default();
        Ok(Some(std::iter::once(first).chain(rotated.iter().filter_map(bytes)).collect()))
    }

    async fn make(&self, kms_key: &str) -> Result<Made> {
        let made = self
            .kms
            .generate_data_key()
            .key_id(kms_key)
            .key_spec(DataKeySpec::Aes256)
            .encryption_context(CONTEXT.0, CONTEXT.1)
            .send()
            .await
            .map_err(store_error("KMS GenerateDataKey"))?;
        match (made.plaintext, made.ciphertext_blob) {
            (Some(plain), Some(encrypted)) => Ok(Made { plain: plain.into_inner(), encrypted: encrypted.into_inner() }),
            _ => Err(Error::internal("KMS made a data key without its parts")),
        }
    }

    async fn decrypt_all(&self, encrypted: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        try_join_all(encrypted.into_iter().map(async |key| Ok(self.decrypt(key).await?.0))).await
    }

    /// The key's bytes, and the KMS key under which it was encrypted.
    async fn decrypt(&self, encrypted: Vec<u8>) -> Result<(Vec<u8>, String)> {
        let decrypted = self
            .kms
            .decrypt()
            .set_key_id(self.kms_key.clone())
            .ciphertext_blob(Blob::new(encrypted))
            .encryption_context(CONTEXT.0, CONTEXT.1)
            .send()
            .await
            .map_err(store_error("KMS Decrypt"))?;
        let plain = decrypted.plaintext.map(Blob::into_inner);
        let plain = plain.ok_or_else(|| Error::internal("KMS decrypted to nothing"))?;
        Ok((plain, decrypted.key_id.unwrap_or_default()))
    }
}

fn row() -> Item {
    Item::from([("user".into(), text(USER)), ("kind".into(), text(KIND))])
}

fn binary(bytes: Vec<u8>) -> AttributeValue {
    AttributeValue::B(DynamoBlob::new(bytes))
}
