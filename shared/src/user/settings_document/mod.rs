//! The settings document: what clients can change in it, how responses show it, and which of its parts are never shown.
//!
//! The document is the flat settings object of version 1.6. Clients of later versions send the same fields nested, in `agent_settings_diff`
//! and `conversation_settings_diff`; see [`nested`] for where they are stored. LLM profiles are a part of the document.

mod agent_profiles;
mod changes;
mod fields;
mod git_providers;
mod nested;
mod profiles;
mod secrets;
mod show;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value, json};

use self::changes::at;
use self::fields::{FIELDS, Kind, MCP, STORE};
use self::nested::AGENT_SETTINGS;
use super::mcp::{self, Servers};
use super::settings::Settings;
use crate::error::{Error, Result};
use crate::http::pydantic::validation::Checker;
use crate::http::secret::MASK;

pub use self::changes::{LEGACY_KEY, SettingsChanges};
pub use self::fields::{SettingsOut, UserOut};
pub use self::git_providers::GitProvidersChange;
pub use self::nested::{CONDENSER, VERIFICATION_WITHOUT_KEY};
pub use self::profiles::{ProfileRename, ProfileSave};
pub use self::secrets::SecretChange;
pub use self::show::{AgentSettingsOut, ConversationSettingsOut, LlmOut, LlmProfilesOut};

/// The longest text, in characters.
const MAX_TEXT: usize = 10_000;
/// The largest document, in bytes: a row of the store holds 400 KB, and sealing adds a third.
const MAX_DOCUMENT: usize = 256 * 1024;

const TOKENS: &str = "provider_tokens";
const SECRETS: &str = "custom_secrets";

/// A user's settings, tokens and secrets.
#[derive(Clone, Debug, Default)]
pub struct SettingsDocument(Map<String, Value>);

impl SettingsDocument {
    /// Parses a stored document, or a settings file. Tokens and secrets may be at the top level or in `secrets_store`; they are moved to the
    /// top level. MCP servers may have any form that was ever stored; they are converted to a map by name. Nested settings are moved to
    /// the names under which they are stored. Settings that are older than LLM profiles get one.
    ///
    /// # Errors
    /// When the text is not a JSON object.
    pub fn parse(json: &str) -> Result<Self, serde_json::Error> {
        let mut document = Self::parse_given(json)?;
        document.add_profiles();
        Ok(document)
    }

    /// As [`Self::parse`], without profiles that the text does not have.
    ///
    /// # Errors
    /// When the text is not a JSON object.
    pub fn parse_given(json: &str) -> Result<Self, serde_json::Error> {
        let mut document = Self(serde_json::from_str(json)?);
        document.flatten();
        let Self(mut document) = document;
        if let Some(servers) = document.get_mut(MCP) {
            *servers = mcp::stored(servers).into();
        }
        if let Some(Value::Object(store)) = document.remove(STORE) {
            for (part, entries) in store {
                let (TOKENS | SECRETS, Value::Object(entries)) = (part.as_str(), entries) else { continue };
                let entry = document.entry(part).or_insert_with(|| json!({}));
                if entry.is_null() {
                    *entry = json!({});
                }
                if let Value::Object(entry) = entry {
                    entry.extend(entries);
                }
            }
        }
        Ok(Self(document))
    }

    /// Merges another document into this one: its fields replace fields, its tokens, secrets and profiles are added. Its model is the one
    /// that the server is started with: it becomes a profile the first time, and whenever it has changed.
    pub fn merge(&mut self, other: &Self) {
        self.merge_models(other);
        if let Some(Value::Object(patch)) = other.0.get(AGENT_SETTINGS) {
            let without_model: Map<String, Value> = patch
                .iter()
                .filter(|(name, _)| *name != nested::LLM)
                .map(|(name, value)| (name.clone(), value.clone()))
                .collect();
            self.merge_agent_settings(&without_model);
        }
        for (name, value) in other.0.iter().filter(|(name, _)| !Self::is_of_model(name)) {
            match (name.as_str(), value) {
                (TOKENS, Value::Object(entries)) => self.part(TOKENS).extend(entries.clone()),
                (SECRETS, Value::Object(entries)) => self.part(SECRETS).extend(entries.clone()),
                (TOKENS | SECRETS, _) => {}
                _ => {
                    self.0.insert(name.clone(), value.clone());
                }
            }
        }
    }

    /// Serialises the document for the store.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn to_json(&self) -> Result<String> {
        let mut document = self.clone();
        // A document without this key is older than profiles.
        document.set_llm_profiles(&self.llm_profiles());
        let json = Value::Object(document.0).to_string();
        if json.len() > MAX_DOCUMENT {
            let kib = MAX_DOCUMENT / 1024;
            return Err(Error::TooLarge(format!("Settings and secrets must not exceed {kib} KiB in total")));
        }
        Ok(json)
    }

    /// Applies changes.
    ///
    /// # Errors
    /// [`Error::Invalid`] when an MCP server would be incomplete, or would send a stored secret to another host, and for keys that later
    /// versions do not accept.
    pub fn change(&mut self, changes: &SettingsChanges) -> Result<()> {
        self.check_legacy(changes)?;
        let model_before = self.llm();
        if let Some((path, change)) = &changes.mcp {
            let mut servers = self.mcp_servers().cloned().unwrap_or_default();
            let mut check = Checker::new("body");
            at(&mut check, path, |check| change.apply(check, &mut servers));
            check.finish(Some(())).map_err(Error::Invalid)?;
            self.0.insert(MCP.to_owned(), servers.into());
        }
        if let Some(patch) = &changes.agent {
            self.merge_agent_settings(patch);
        }
        if let Some(patch) = &changes.conversation {
            self.merge_conversation_settings(patch);
        }
        for (name, value) in &changes.fields {
            let field = FIELDS.iter().find(|field| field.name == name);
            let mut value = value.clone();
            match field.map(|field| field.kind) {
                Some(Kind::Secret) if value == MASK => continue,
                Some(Kind::Secret) if value == "" => value = Value::Null,
                _ => {}
            }
            set_or_remove(&mut self.0, name, (!value.is_null()).then_some(value));
        }
        self.model_changed_from(&model_before);
        let Some(changes) = &changes.tokens else { return Ok(()) };
        let tokens = self.part(TOKENS);
        if changes.is_empty() {
            tokens.clear();
        }
        for (provider, change) in changes {
            let Value::Object(change) = change else {
                tokens.remove(provider);
                continue;
            };
            let stored = tokens.entry(provider).or_insert_with(|| json!({}));
            for (key, value) in change {
                stored[key] = value.clone();
            }
            // A provider without a token is removed.
            if stored.get("token").and_then(Value::as_str).is_none_or(str::is_empty) {
                tokens.remove(provider);
            }
        }
        Ok(())
    }

    /// The settings as starts use them.
    ///
    /// # Errors
    /// Names a field that is not as it should be.
    pub fn into_settings(self) -> Result<Settings, serde_json::Error> {
        let (llm, llm_profiles, agent_profiles) = (self.llm(), self.llm_profiles(), self.agent_profiles());
        let mut agent = self.agent_settings();
        let condenser = match agent.shift_remove("condenser") {
            Some(Value::Object(condenser)) => condenser,
            _ => Map::new(),
        };
        let settings: Settings = serde_json::from_value(Value::Object(self.0))?;
        Ok(Settings { llm, llm_profiles, agent_profiles, condenser, ..settings })
    }

    fn mcp_servers(&self) -> Option<&Servers> {
        self.0.get(MCP).and_then(Value::as_object)
    }

    fn part(&mut self, name: &'static str) -> &mut Map<String, Value> {
        let part = self.0.entry(name).or_insert_with(|| json!({}));
        if !part.is_object() {
            *part = json!({});
        }
        part.as_object_mut().unwrap_or_else(|| unreachable!("it was made an object above"))
    }
}

fn set_or_remove(fields: &mut Map<String, Value>, name: &str, value: Option<Value>) {
    match value {
        Some(value) => {
            fields.insert(name.to_owned(), value);
        }
        None => {
            fields.shift_remove(name);
        }
    }
}
