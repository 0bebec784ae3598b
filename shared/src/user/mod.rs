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

pub use crate::id::UserId;
