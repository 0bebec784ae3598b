//! Users: their ids, API keys, settings, secrets and git providers.

pub mod agent_profiles;
pub mod api_key;
pub mod counters;
pub mod data_key;
pub mod declared;
pub mod git;
pub mod llm;
pub mod llm_profiles;
pub mod mcp;
pub mod organization;
pub mod seal;
pub mod settings;
pub mod settings_document;
pub mod token;

pub use crate::id::UserId;
