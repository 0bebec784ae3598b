//! Users: their ids, API keys, settings, secrets and git providers.

pub mod api_key;
pub mod counters;
pub mod data_key;
pub mod git;
pub mod mcp;
pub mod seal;
pub mod settings;
pub mod settings_document;
pub mod token;

use std::fmt;

use serde::{Deserialize, Serialize};

/// The owner of records, and the first part of every key in the store.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UserId(String);

/// The single user of a local server. Responses show `null` in place of this id, as the reference does.
const LOCAL: &str = "local";

impl UserId {
    /// A user with the id that the authorizer has determined.
    pub fn new(id: impl Into<String>) -> Self {
        Self(id.into())
    }

    /// The single user of a local server.
    #[must_use]
    pub fn local() -> Self {
        Self(LOCAL.to_owned())
    }

    /// The id, for keys in the store.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The key of a record that belongs to the user. The length of the id separates the keys of two users, whatever characters their ids
    /// contain.
    #[must_use]
    pub fn key_of(&self, id: &str) -> String {
        format!("{}:{}#{id}", self.0.len(), self.0)
    }

    /// The id as responses show it: `None` for the single local user.
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
