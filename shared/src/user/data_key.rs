//! The deployment's data key: kept in the `users` table, encrypted under a key of KMS, which alone can decrypt it.

use std::time::Duration;

use aws_config::SdkConfig;
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::primitives::Blob as DynamoBlob;
use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::DataKeySpec;

use crate::dynamo::{is_condition_failure, store_error, text};
use crate::error::{Error, Result};

/// The row's key. Functions that have no business with rows of users may still read and write those of this one.
const USER: &str = "#deployment";
const KIND: &str = "data-key";
/// KMS decrypts the key only for who says the same.
const CONTEXT: (&str, &str) = ("purpose", "openhands-secrets");
/// KMS answers in milliseconds.
const ATTEMPT: Duration = Duration::from_secs(5);

/// Where the data key is.
#[derive(Debug)]
pub struct DataKey {
    dynamodb: Client,
    table: String,
    kms: aws_sdk_kms::Client,
    kms_key: String,
}

impl DataKey {
    /// The data key in the table, under the key of KMS with this id, alias or ARN.
    #[must_use]
    pub fn new(sdk: &SdkConfig, dynamodb: Client, table: String, kms_key: String) -> Self {
        let timeouts = crate::aws::timeouts(ATTEMPT);
        let config = aws_sdk_kms::config::Builder::from(sdk).timeout_config(timeouts).build();
        Self { dynamodb, table, kms: aws_sdk_kms::Client::from_conf(config), kms_key }
    }

    /// Its bytes. The first process of a deployment makes the key; of several that are first at the same time, one.
    ///
    /// # Errors
    /// [`Error::Store`], also when it is KMS that refuses or fails: what is stored cannot be read or written for now.
    pub async fn key(&self) -> Result<Vec<u8>> {
        if let Some(encrypted) = self.stored().await? {
            return self.decrypt(encrypted).await;
        }
        let made = self
            .kms
            .generate_data_key()
            .key_id(&self.kms_key)
            .key_spec(DataKeySpec::Aes256)
            .encryption_context(CONTEXT.0, CONTEXT.1)
            .send()
            .await
            .map_err(store_error("KMS GenerateDataKey"))?;
        let (Some(plain), Some(encrypted)) = (made.plaintext, made.ciphertext_blob) else {
            return Err(Error::internal("KMS made a data key without its parts"));
        };
        let put = self
            .dynamodb
            .put_item()
            .table_name(&self.table)
            .item("user", text(USER))
            .item("kind", text(KIND))
            .item("encrypted", AttributeValue::B(DynamoBlob::new(encrypted.into_inner())))
            .condition_expression("attribute_not_exists(encrypted)")
            .send()
            .await
            .map_err(store_error("PutItem users"));
        match put {
            Ok(_) => Ok(plain.into_inner()),
            // Another process was quicker; its key is the key.
            Err(error) if is_condition_failure(&error) => {
                let encrypted = self.stored().await?;
                self.decrypt(encrypted.ok_or_else(|| Error::internal("the data key is gone"))?).await
            }
            Err(error) => Err(error),
        }
    }

    async fn stored(&self) -> Result<Option<Vec<u8>>> {
        let found = self
            .dynamodb
            .get_item()
            .table_name(&self.table)
            .key("user", text(USER))
            .key("kind", text(KIND))
            .consistent_read(true)
            .send()
            .await
            .map_err(store_error("GetItem users"))?;
        let encrypted = found.item.as_ref().and_then(|item| item.get("encrypted"));
        Ok(encrypted.and_then(|value| value.as_b().ok()).map(|blob| blob.as_ref().to_vec()))
    }

    async fn decrypt(&self, encrypted: Vec<u8>) -> Result<Vec<u8>> {
        let decrypted = self
            .kms
            .decrypt()
            .key_id(&self.kms_key)
            .ciphertext_blob(Blob::new(encrypted))
            .encryption_context(CONTEXT.0, CONTEXT.1)
            .send()
            .await
            .map_err(store_error("KMS Decrypt"))?;
        decrypted.plaintext.map(Blob::into_inner).ok_or_else(|| Error::internal("KMS decrypted to nothing"))
    }
}
