//! The settings document: what clients can change in it, how responses show it, and which of its parts are never shown.
//!
//! The document is the contract's flat settings object. Clients of later versions nest the same fields in `agent_settings_diff`
//! and `conversation_settings_diff`; the server moves them to their flat names.

mod changes;
mod fields;
mod secrets;
mod show;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value, json};

use self::changes::at;
use self::fields::{FIELDS, Kind, MCP, STORE};
use super::mcp::{self, Servers};
use crate::error::{Error, Result};
use crate::http::pydantic::validation::Checker;
use crate::http::secret::MASK;

pub use self::changes::SettingsChanges;
pub use self::fields::{SettingsOut, UserOut};
pub use self::secrets::SecretChange;
pub use self::show::AgentSettingsOut;

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
    /// Parses a stored document. Tokens and secrets may be at the top level or in `secrets_store`; they are moved to the top level. MCP
    /// servers may have any form that was ever stored; they are converted to a map by name.
    ///
    /// # Errors
    /// When the text is not a JSON object.
    pub fn parse(json: &str) -> Result<Self, serde_json::Error> {
        let mut document: Map<String, Value> = serde_json::from_str(json)?;
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

    /// Merges another document into this one: its fields replace fields, its tokens and secrets are added.
    pub fn merge(&mut self, other: &Self) {
        for (name, value) in &other.0 {
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
        let json = Value::Object(self.0.clone()).to_string();
        if json.len() > MAX_DOCUMENT {
            let kib = MAX_DOCUMENT / 1024;
            return Err(Error::TooLarge(format!("Settings and secrets must not exceed {kib} KiB in total")));
        }
        Ok(json)
    }

    /// Applies changes.
    ///
    /// # Errors
    /// [`Error::Invalid`] when an MCP server would be incomplete, or would send a stored secret to another host.
    pub fn change(&mut self, changes: &SettingsChanges) -> Result<()> {
        if let Some((path, change)) = &changes.mcp {
            let mut servers = self.mcp_servers().cloned().unwrap_or_default();
            let mut check = Checker::new("body");
            at(&mut check, path, |check| change.apply(check, &mut servers));
            check.finish(Some(())).map_err(Error::Invalid)?;
            self.0.insert(MCP.to_owned(), servers.into());
        }
        for (name, value) in &changes.fields {
            let field = FIELDS.iter().find(|field| field.name == name);
            let mut value = value.clone();
            match field.map(|field| field.kind) {
                Some(Kind::Secret) if value == MASK => continue,
                Some(Kind::Secret) if value == "" => value = Value::Null,
                _ => {}
            }
            if value.is_null() {
                self.0.remove(name);
            } else {
                self.0.insert(name.clone(), value);
            }
        }
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
