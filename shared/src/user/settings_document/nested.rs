//! The settings that clients of later versions nest: `agent_settings` and `conversation_settings` of app server 1.11.
//!
//! Fields that version 1.6 has are stored under its flat names, so that clients of both versions change the same values. All others are
//! stored in `agent_settings`.

use serde_json::{Map, Value};

use super::{SettingsDocument, set_or_remove};
use crate::user::declared::{self, Field, Kind, Preset};
use crate::user::llm::{self, Llm};

/// The key of the stored fields without a flat name, and of the whole object in responses.
pub(super) const AGENT_SETTINGS: &str = "agent_settings";
pub(super) const CONVERSATION_SETTINGS: &str = "conversation_settings";
pub(super) const LLM: &str = "llm";
/// The only kind of agent that this server starts.
pub(super) const AGENT_KIND: &str = "openhands";

const CONTEXT: &[Field] = &[
    Field::with("skills", Kind::List, Preset::List),
    Field::optional("system_message_suffix", Kind::Text),
    Field::optional("user_message_suffix", Kind::Text),
    Field::with("load_user_skills", Kind::Flag, Preset::Flag(false)),
    Field::with("load_public_skills", Kind::Flag, Preset::Flag(false)),
    Field::with("marketplace_path", Kind::Text, Preset::Text("marketplaces/default.json")),
    Field::with("registered_marketplaces", Kind::List, Preset::List),
    Field::with("load_project_skills", Kind::Flag, Preset::Flag(false)),
    Field::with("disabled_skills", Kind::Texts, Preset::List),
    Field::optional("secrets", Kind::Secrets),
    Field::optional("current_datetime", Kind::Text),
];

/// The fields of a condenser.
pub const CONDENSER: &[Field] = &[
    Field::with("enabled", Kind::Flag, Preset::Flag(true)),
    Field::with("max_size", Kind::Integer(20), Preset::Integer(240)),
    Field::with("condenser_kind", Kind::Choice(&["llm_summarizing", "no_op"]), Preset::Text("llm_summarizing")),
    Field::optional("max_tokens", Kind::Integer(1)),
    Field::with("keep_first", Kind::Integer(0), Preset::Integer(2)),
    Field::with("minimum_progress", Kind::Number(0.0, 1.0), Preset::Number(0.1)),
    Field::with("hard_context_reset_max_retries", Kind::Integer(1), Preset::Integer(5)),
    Field::with("hard_context_reset_context_scaling", Kind::Number(0.0, 1.0), Preset::Number(0.8)),
];

const VERIFICATION: &[Field] = &[
    Field::with("critic_enabled", Kind::Flag, Preset::Flag(false)),
    Field::with(
        "critic_mode",
        Kind::Choice(&["finish_and_message", "all_actions"]),
        Preset::Text("finish_and_message"),
    ),
    Field::with("enable_iterative_refinement", Kind::Flag, Preset::Flag(false)),
    Field::with("critic_threshold", Kind::Number(0.0, 1.0), Preset::Number(0.6)),
    Field::with("max_refinement_iterations", Kind::Integer(1), Preset::Integer(3)),
    Field::optional("critic_server_url", Kind::Text),
    Field::optional("critic_model_name", Kind::Text),
    Field::optional("critic_api_key", Kind::Secret),
];
/// The fields of a critic in an agent profile, which contains no secrets: all but the key, which is the last one.
pub const VERIFICATION_WITHOUT_KEY: &[Field] = VERIFICATION.split_at(VERIFICATION.len() - 1).0;

/// The fields of `agent_settings`, without MCP servers, which have rules of their own.
pub(super) const AGENT: &[Field] = &[
    Field::with("agent", Kind::Text, Preset::Text("CodeActAgent")),
    Field::with(LLM, Kind::Object(llm::FIELDS), Preset::Object),
    Field::optional("tools", Kind::List),
    Field::with("enable_sub_agents", Kind::Flag, Preset::Flag(false)),
    Field::with("enable_switch_llm_tool", Kind::Flag, Preset::Flag(true)),
    Field::with("tool_concurrency_limit", Kind::Integer(1), Preset::Integer(1)),
    Field::with("agent_context", Kind::Object(CONTEXT), Preset::Object),
    Field::with("condenser", Kind::Object(CONDENSER), Preset::Object),
    Field::with("verification", Kind::Object(VERIFICATION), Preset::Object),
];

/// The fields of `conversation_settings`. Without a security analyzer the agent has none, as in version 1.6.
pub(super) const CONVERSATION: &[Field] = &[
    Field::with("max_iterations", Kind::Integer(1), Preset::Integer(500)),
    Field::with("confirmation_mode", Kind::Flag, Preset::Flag(false)),
    Field::optional("security_analyzer", Kind::Choice(&["llm", "none"])),
];

/// The flat names of fields of `agent_settings`.
const FLAT_OF_AGENT: [(&[&str], &str); 6] = [
    (&[LLM, "model"], LLM_MODEL),
    (&[LLM, "api_key"], LLM_API_KEY),
    (&[LLM, "base_url"], LLM_BASE_URL),
    (&["agent"], "agent"),
    (&["condenser", "enabled"], "enable_default_condenser"),
    (&["condenser", "max_size"], "condenser_max_size"),
];
/// The flat names of fields of `conversation_settings`: all of them.
const FLAT_OF_CONVERSATION: [(&[&str], &str); 3] = [
    (&["max_iterations"], "max_iterations"),
    (&["confirmation_mode"], "confirmation_mode"),
    (&["security_analyzer"], "security_analyzer"),
];

pub(super) const LLM_MODEL: &str = "llm_model";
pub(super) const LLM_API_KEY: &str = "llm_api_key";
pub(super) const LLM_BASE_URL: &str = "llm_base_url";

impl SettingsDocument {
    /// Moves fields of nested objects, as a settings file may have them, to the names under which they are stored.
    pub(super) fn flatten(&mut self) {
        if let Some(Value::Object(nested)) = self.0.shift_remove(CONVERSATION_SETTINGS) {
            self.take_flat(&FLAT_OF_CONVERSATION, &mut declared::sparse(CONVERSATION, &nested));
        }
        let Some(nested) = self.0.shift_remove(AGENT_SETTINGS) else { return };
        let Value::Object(mut nested) = nested else { return };
        let servers = nested.shift_remove(super::MCP).filter(Value::is_object);
        if let Some(servers) = servers.filter(|_| self.0.get(super::MCP).is_none_or(Value::is_null)) {
            self.0.insert(super::MCP.to_owned(), servers);
        }
        if nested.get("agent_kind").is_some_and(|kind| kind != AGENT_KIND) {
            return;
        }
        let mut nested = declared::sparse(AGENT, &nested);
        self.take_flat(&FLAT_OF_AGENT, &mut nested);
        self.put_object(AGENT_SETTINGS, nested);
    }

    /// Moves values to their flat names, unless there are values already.
    fn take_flat(&mut self, names: &[(&[&str], &'static str)], nested: &mut Map<String, Value>) {
        for (path, name) in names {
            let Some(value) = take(nested, path) else { continue };
            if self.0.get(*name).is_none_or(Value::is_null) {
                self.0.insert((*name).to_owned(), value);
            }
        }
    }

    /// `agent_settings` in the sparse form of [`declared`], without MCP servers.
    pub(super) fn agent_settings(&self) -> Map<String, Value> {
        let mut nested = self.0.get(AGENT_SETTINGS).and_then(Value::as_object).cloned().unwrap_or_default();
        self.add_flat(&FLAT_OF_AGENT, &mut nested);
        nested
    }

    /// `conversation_settings` in the same form.
    pub(super) fn conversation_settings(&self) -> Map<String, Value> {
        let mut nested = Map::new();
        self.add_flat(&FLAT_OF_CONVERSATION, &mut nested);
        nested
    }

    fn add_flat(&self, names: &[(&[&str], &'static str)], nested: &mut Map<String, Value>) {
        for (path, name) in names {
            if let Some(value) = self.0.get(*name).filter(|value| !value.is_null()) {
                put_at(nested, path, value.clone());
            }
        }
    }

    /// Applies a checked merge patch of `agent_settings`.
    pub(super) fn merge_agent_settings(&mut self, patch: &Map<String, Value>) {
        let mut nested = self.agent_settings();
        declared::merge(AGENT, &mut nested, patch);
        self.replace_flat(&FLAT_OF_AGENT, &mut nested);
        self.put_object(AGENT_SETTINGS, nested);
    }

    /// Applies a checked merge patch of `conversation_settings`.
    pub(super) fn merge_conversation_settings(&mut self, patch: &Map<String, Value>) {
        let mut nested = self.conversation_settings();
        declared::merge(CONVERSATION, &mut nested, patch);
        self.replace_flat(&FLAT_OF_CONVERSATION, &mut nested);
    }

    fn replace_flat(&mut self, names: &[(&[&str], &'static str)], nested: &mut Map<String, Value>) {
        for (path, name) in names {
            let value = take(nested, path);
            set_or_remove(&mut self.0, name, value);
        }
    }

    fn put_object(&mut self, name: &str, mut object: Map<String, Value>) {
        object.retain(|_, value| value.as_object().is_none_or(|fields| !fields.is_empty()));
        set_or_remove(&mut self.0, name, (!object.is_empty()).then_some(object.into()));
    }

    /// The model of the settings.
    #[must_use]
    pub fn llm(&self) -> Llm {
        let nested = self.agent_settings();
        Llm::stored(nested.get(LLM).and_then(Value::as_object).unwrap_or(&Map::new()))
    }

    /// Replaces the model of the settings.
    pub(super) fn set_llm(&mut self, llm: Llm) {
        let mut nested = self.agent_settings();
        nested.insert(LLM.to_owned(), llm.into_fields().into());
        self.replace_flat(&FLAT_OF_AGENT, &mut nested);
        self.put_object(AGENT_SETTINGS, nested);
    }
}

/// Removes and returns the value at a path.
fn take(nested: &mut Map<String, Value>, path: &[&str]) -> Option<Value> {
    match path {
        [] => None,
        [last] => nested.shift_remove(*last),
        [first, rest @ ..] => take(nested.get_mut(*first)?.as_object_mut()?, rest),
    }
}

fn put_at(nested: &mut Map<String, Value>, path: &[&str], value: Value) {
    match path {
        [] => {}
        [last] => {
            nested.insert((*last).to_owned(), value);
        }
        [first, rest @ ..] => {
            let below = nested.entry(*first).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(below) = below {
                put_at(below, rest, value);
            }
        }
    }
}
