//! Agent profiles in the settings document.

use serde_json::{Map, Value};

use super::SettingsDocument;
use crate::error::{Error, Result};
use crate::user::agent_profiles::{AgentProfileSave, AgentProfiles};

const AGENT_PROFILES: &str = "agent_profiles";

impl SettingsDocument {
    /// The user's agent profiles.
    #[must_use]
    pub fn agent_profiles(&self) -> AgentProfiles {
        self.0.get(AGENT_PROFILES).map(AgentProfiles::stored).unwrap_or_default()
    }

    /// Changes the agent profiles.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn change_agent_profiles<T>(&mut self, change: impl FnOnce(&mut AgentProfiles) -> Result<T>) -> Result<T> {
        let mut profiles = self.agent_profiles();
        let done = change(&mut profiles)?;
        self.0.insert(AGENT_PROFILES.to_owned(), profiles.to_json());
        Ok(done)
    }

    /// Saves an agent profile.
    ///
    /// # Errors
    /// [`Error::Refused`] for an LLM profile that does not exist; [`Error::Conflict`] when there are too many; [`Error::TooLarge`].
    pub fn save_agent_profile(&mut self, name: &str, save: &AgentProfileSave) -> Result<()> {
        if self.llm_profiles().get(&save.llm_profile).is_none() {
            return Err(Error::Refused(format!("LLM profile '{}' not found; save it first", save.llm_profile)));
        }
        self.change_agent_profiles(|profiles| profiles.put(name, save))
    }

    /// Checks that no agent profile refers to an LLM profile that is to be deleted.
    ///
    /// # Errors
    /// [`Error::Conflict`], which names those that do.
    pub fn check_llm_profile_is_unused(&self, llm_profile: &str) -> Result<()> {
        let profiles = self.agent_profiles();
        let users = profiles.of_llm_profile(llm_profile);
        if users.is_empty() {
            return Ok(());
        }
        Err(Error::Conflict(format!(
            "Profile '{llm_profile}' is used by these agent profiles: {}. Choose another LLM profile for them first.",
            users.join(", ")
        )))
    }

    /// Lets agent profiles follow the new name of an LLM profile.
    pub(super) fn rename_llm_profile_of_agents(&mut self, name: &str, new_name: &str) {
        let mut profiles = self.agent_profiles();
        if !profiles.of_llm_profile(name).is_empty() {
            profiles.rename_llm_profile(name, new_name);
            self.0.insert(AGENT_PROFILES.to_owned(), profiles.to_json());
        }
    }

    /// The names of all MCP servers.
    #[must_use]
    pub fn mcp_server_names(&self) -> Vec<String> {
        self.mcp_servers().into_iter().flat_map(|servers| servers.keys().cloned()).collect()
    }

    /// The settings that a start with an agent profile would use, as responses show them: secrets hidden.
    #[must_use]
    pub fn show_for_agent(&self, llm_profile: &str, mcp_servers: Option<&[String]>) -> Map<String, Value> {
        let mut document = self.clone();
        if let Some(llm) = self.llm_profiles().get(llm_profile) {
            document.set_llm(llm.clone());
        }
        let mut shown = document.show_agent_settings(crate::user::declared::Secrets::Hidden).0;
        if let (Some(chosen), Some(Value::Object(servers))) = (mcp_servers, shown.get_mut(super::MCP)) {
            servers.retain(|name, _| chosen.contains(name));
        }
        shown
    }
}
