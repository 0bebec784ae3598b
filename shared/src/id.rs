//! Identifiers: UUIDs, sandbox ids, session keys and user ids, and the two UUID formats of the API contract.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::random;

const BASE62: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";

/// Creates a random UUID (version 4).
#[must_use]
pub fn new_uuid() -> Uuid {
    uuid::Builder::from_random_bytes(random::bytes()).into_uuid()
}

/// Formats an id as 32 lower-case hex digits, the contract's usual format.
#[must_use]
pub fn hex(id: Uuid) -> String {
    id.simple().to_string()
}

/// Formats an id as 8-4-4-4-12, the format of agent servers, file names and messages.
#[must_use]
pub fn dashed(id: Uuid) -> String {
    id.hyphenated().to_string()
}

/// Creates a random sandbox id: 22 base-62 digits (slightly more than 128 bits).
#[must_use]
pub fn new_sandbox_id() -> String {
    random_base62(22)
}

/// Creates a random session key: 43 base-62 digits (256 bits).
#[must_use]
pub fn new_session_key() -> String {
    random_base62(43)
}

/// Returns `length` random base-62 digits from a cryptographic random number generator.
#[must_use]
pub fn random_base62(length: usize) -> String {
    (0..length).map(|_| char::from(BASE62[random::below(BASE62.len())])).collect()
}

/// Writes a number with this many base-62 digits, most significant first. Texts of equal length are in the order of their numbers.
#[must_use]
pub fn base62(mut number: u128, digits: usize) -> String {
    let mut text = vec![BASE62[0]; digits];
    for digit in text.iter_mut().rev() {
        *digit = BASE62[usize::try_from(number % 62).unwrap_or_default()];
        number /= 62;
    }
    text.into_iter().map(char::from).collect()
}

/// Reads the number in a text of [`base62`]; `None` if it is not one, or exceeds 128 bits.
#[must_use]
pub fn from_base62(text: &str) -> Option<u128> {
    text.bytes().try_fold(0u128, |number, byte| {
        let digit = BASE62.iter().position(|digit| *digit == byte)?;
        number.checked_mul(62)?.checked_add(u128::try_from(digit).ok()?)
    })
}

/// The owner of records (the tenant), and the first part of every key in the store: tenant isolation rests on it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UserId(String);

/// The id of the single user of a local server. It is never visible: responses contain `null`, as the reference's do.
const LOCAL: &str = "local";

impl UserId {
    /// Creates a user id from the authorizer's user id.
    pub fn new(id: impl Into<String>) -> Self {
        Self(id.into())
    }

    /// The single user of a local server.
    #[must_use]
    pub fn local() -> Self {
        Self(LOCAL.to_owned())
    }

    /// Returns the id for keys in the store.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns a key for a resource of the user. It includes the length of the user id, so that keys of two users differ whatever
    /// characters their ids contain.
    #[must_use]
    pub fn key_of(&self, id: &str) -> String {
        format!("{}:{}#{id}", self.0.len(), self.0)
    }

    /// Returns the id for responses: `None` for the single local user.
    #[must_use]
    pub fn shown(&self) -> Option<&str> {
        (self.0 != LOCAL).then_some(self.0.as_str())
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// Serde functions for ids with 32 hex digits in JSON.
pub mod as_hex {
    use serde::{Deserialize, Deserializer, Serializer};
    use uuid::Uuid;

    /// Writes 32 hex digits.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(id: &Uuid, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&id.simple())
    }

    /// Reads a UUID in any format.
    ///
    /// # Errors
    /// When the text is not a UUID.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uuid, D::Error> {
        Uuid::parse_str(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }

    /// Serde functions for an optional id.
    pub mod option {
        use serde::{Deserialize, Deserializer, Serializer};
        use uuid::Uuid;

        /// Writes 32 hex digits or null.
        ///
        /// # Errors
        /// Those of the serializer.
        #[allow(clippy::ref_option, reason = "the signature that serde calls")]
        pub fn serialize<S: Serializer>(id: &Option<Uuid>, serializer: S) -> Result<S::Ok, S::Error> {
            match id {
                Some(id) => serializer.collect_str(&id.simple()),
                None => serializer.serialize_none(),
            }
        }

        /// Reads a UUID in any format, or null.
        ///
        /// # Errors
        /// When the text is not a UUID.
        pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Uuid>, D::Error> {
            Option::<String>::deserialize(deserializer)?
                .map(|text| Uuid::parse_str(&text).map_err(serde::de::Error::custom))
                .transpose()
        }
    }

    /// Serde functions for a list of ids.
    pub mod list {
        use serde::ser::SerializeSeq as _;
        use serde::{Deserialize, Deserializer, Serializer};
        use uuid::Uuid;

        /// Writes a list of ids with 32 hex digits each.
        ///
        /// # Errors
        /// Those of the serializer.
        pub fn serialize<S: Serializer>(ids: &[Uuid], serializer: S) -> Result<S::Ok, S::Error> {
            let mut list = serializer.serialize_seq(Some(ids.len()))?;
            for id in ids {
                list.serialize_element(&super::super::hex(*id))?;
            }
            list.end()
        }

        /// Reads a list of UUIDs in any format.
        ///
        /// # Errors
        /// When one of the texts is not a UUID.
        pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Uuid>, D::Error> {
            Vec::<String>::deserialize(deserializer)?
                .iter()
                .map(|text| Uuid::parse_str(text).map_err(serde::de::Error::custom))
                .collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_ids_have_their_length_and_alphabet() {
        let id = new_sandbox_id();
        assert_eq!(id.len(), 22);
        assert!(id.bytes().all(|byte| BASE62.contains(&byte)));
        assert_ne!(new_session_key(), new_session_key());
        assert_eq!(new_uuid().get_version_num(), 4);
    }
}
