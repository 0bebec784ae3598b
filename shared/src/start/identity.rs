//! The identity of a start: the id of its task. With an `Idempotency-Key` it follows from the key and the user, so that a repeated request
//! finds the task of the first one.

use std::collections::BTreeMap;

use secrecy::ExposeSecret as _;
use sha2::{Digest as _, Sha256};
use uuid::{Builder, Uuid};

use super::request::StartRequest;
use crate::digest::sha256_hex;
use crate::error::{Error, Result};
use crate::id::{self, UserId};

/// The identity of a start that is to be created.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartIdentity {
    /// The id of the task.
    pub task: Uuid,
    /// The digest of the request, if the request has a key: the same key with another request is an error.
    pub(super) digest: Option<String>,
}

impl StartIdentity {
    /// The identity of a request as the client sent it, with or without a key.
    ///
    /// # Errors
    /// [`Error::Internal`] if the request cannot be serialised.
    pub fn of(user: &UserId, key: Option<&str>, request: &StartRequest) -> Result<Self> {
        let Some(key) = key else { return Ok(Self::random()) };
        // The length separates user and key.
        let hash = Sha256::digest(format!("start-task:{}:{user}:{key}", user.as_str().len()));
        let bytes = std::array::from_fn(|index| hash[index]);
        Ok(Self { task: Builder::from_custom_bytes(bytes).into_uuid(), digest: Some(digest(request)?) })
    }

    /// A new identity for a request without a key.
    #[must_use]
    pub fn random() -> Self {
        Self { task: id::new_uuid(), digest: None }
    }
}

/// A digest of everything that the client sent. The form of the JSON does not matter.
fn digest(request: &StartRequest) -> Result<String> {
    let mut json = serde_json::to_value(request).map_err(Error::internal)?;
    // They are serialised without their values, and in any order.
    if let Some(request) = json.as_object_mut() {
        request.remove("secrets");
    }
    json.sort_all_objects();
    let secrets: BTreeMap<&str, &str> = match &request.secrets {
        Some(secrets) => secrets.values().map(|(name, value)| (name, value.expose_secret())).collect(),
        None => BTreeMap::new(),
    };
    let secrets = serde_json::to_string(&secrets).map_err(Error::internal)?;
    Ok(sha256_hex(&format!("{json}\n{secrets}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(user: &str, key: &str, body: &str) -> StartIdentity {
        let request = StartRequest::from_body(Some("application/json"), body.as_bytes()).expect("a request");
        StartIdentity::of(&UserId::new(user), Some(key), &request).expect("an identity")
    }

    #[test]
    fn the_task_follows_from_user_and_key_and_the_digest_from_the_request() {
        let one = identity("u", "k", r#"{"title": "a", "secrets": {"A": "1", "B": "2"}}"#);
        assert_eq!(one, identity("u", "k", r#"{"secrets":{"B":"2","A":"1"},"title":"a"}"#));
        for other in [identity("u", "l", "{}"), identity("v", "k", "{}"), identity("u:", "k", "{}")] {
            assert_ne!(one.task, other.task);
        }
        assert_ne!(identity("u:1", "k", "{}").task, identity("u", "1:k", "{}").task);
        for body in [r#"{"title": "b"}"#, r#"{"title": "a", "secrets": {"A": "1", "B": "3"}}"#, "{}"] {
            let other = identity("u", "k", body);
            assert_eq!(one.task, other.task);
            assert_ne!(one.digest, other.digest, "{body}");
        }
        let random = || StartIdentity::of(&UserId::new("u"), None, &StartRequest::default()).expect("an identity");
        assert_ne!(random().task, random().task);
    }
}
