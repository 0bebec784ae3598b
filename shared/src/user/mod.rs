//! Who calls, and what is known of them: settings, secrets, git providers.

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

/// The single user of a local server. The id never shows: answers say `null`, as the reference does.
const LOCAL: &str = "local";

impl UserId {
    /// A user by the id that the authorizer gave.
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

    /// A key for what belongs to one of the user's things. The length keeps two users' keys apart whatever characters
    /// their ids hold.
    #[must_use]
    pub fn key_of(&self, id: &str) -> String {
        format!("{}:{}#{id}", self.0.len(), self.0)
    }

    /// The id as answers show it: `None` for the single local user.
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
