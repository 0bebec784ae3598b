//! Agent profiles: named choices of what an agent is started with. A profile names an LLM profile, MCP servers and secrets of its user; it
//! contains no secrets itself.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::declared::{self, Field, Kind, Preset, Secrets};
use super::llm_profiles::{self, LlmProfiles};
use super::settings::Settings;
use super::settings_document::{CONDENSER, VERIFICATION_WITHOUT_KEY};
use crate::error::{Error, Result};
use crate::http::pydantic::body::FromJson;
use crate::http::pydantic::validation::{Checker, Fields, literal, string_up_to, wire_enum};
use crate::id;

wire_enum! {
    /// The kind of an agent that requests may name.
    pub enum AgentKind {
        Openhands = "openhands",
    }
}

/// The most profiles of a user.
pub const MAX_AGENT_PROFILES: usize = 50;
/// The largest profile, in bytes of its JSON.
pub const MAX_AGENT_PROFILE: usize = 16 * 1024;
/// The name of the profile that is made without its user's request.
pub const DEFAULT_NAME: &str = "default";

/// The version of the form of profiles: that of agent server 1.58.
const SCHEMA_VERSION: u64 = 4;
const PROFILES: &str = "profiles";
const ACTIVE: &str = "active";
const LLM_PROFILE: &str = "llm_profile_ref";
/// Keys that this server sets. Clients send them back with a profile.
const SET_HERE: [&str; 4] = ["id", "name", "revision", "schema_version"];
/// The longest name of a tool, in characters.
const MAX_TOOL_NAME: usize = 100;

/// The fields of agent servers from 1.34 to 1.58, without the LLM profile.
const FIELDS: &[Field] = &[
    Field::with("agent", Kind::Choice(&["CodeActAgent"]), Preset::Text("CodeActAgent")),
    Field::optional("tools", Kind::List),
    Field::optional("system_message_suffix", Kind::Text),
    Field::with("disabled_skills", Kind::Texts, Preset::List),
    Field::with("condenser", Kind::Object(CONDENSER), Preset::Object),
    Field::with("verification", Kind::Object(VERIFICATION_WITHOUT_KEY), Preset::Object),
    Field::optional("mcp_server_refs", Kind::Texts),
    Field::optional("secret_refs", Kind::Texts),
    Field::with("enable_sub_agents", Kind::Flag, Preset::Flag(false)),
    Field::with("enable_switch_llm_tool", Kind::Flag, Preset::Flag(true)),
    Field::with("tool_concurrency_limit", Kind::Integer(1), Preset::Integer(1)),
    Field::optional("persona", Kind::Text),
    Field::optional("public_skills", Kind::Texts),
    Field::optional("meta_profile_ref", Kind::Text),
    Field::with("enable_classify_and_switch_llm_tool", Kind::Flag, Preset::Flag(false)),
];

/// Fields that would have no effect on an agent that is started here: a profile may have only their defaults.
const WITHOUT_EFFECT: [(&[&str], &str); 7] = [
    (&["enable_sub_agents"], "agents have no sub-agents here"),
    (&["persona"], "use system_message_suffix, or system_prompt of a start"),
    (&["public_skills"], "use disabled_skills"),
    (&["meta_profile_ref"], "agents cannot route tasks to models here"),
    (&["enable_classify_and_switch_llm_tool"], "agents cannot route tasks to models here"),
    (&["verification", "critic_enabled"], "agents have no critic here"),
    (&["verification", "enable_iterative_refinement"], "agents have no critic here"),
];

/// An agent profile.
#[derive(Clone, Debug, PartialEq)]
pub struct AgentProfile {
    pub id: Uuid,
    pub name: String,
    /// The number of changes since it was made.
    pub revision: u64,
    /// The LLM profile; `None` for the one that is active. Only a profile that its user has never saved has `None`.
    llm_profile: Option<String>,
    /// The other fields, without those that have their default.
    fields: Map<String, Value>,
}

impl AgentProfile {
    fn stored(name: &str, value: &Value) -> Option<Self> {
        let stored = value.as_object()?;
        Some(Self {
            id: Uuid::try_parse(stored.get("id")?.as_str()?).ok()?,
            name: name.to_owned(),
            revision: stored.get("revision").and_then(Value::as_u64).unwrap_or_default(),
            llm_profile: stored.get(LLM_PROFILE).and_then(Value::as_str).map(str::to_owned),
            fields: declared::sparse(FIELDS, stored),
        })
    }

    fn to_json(&self) -> Value {
        let mut stored = self.fields.clone();
        stored.insert("id".to_owned(), id::dashed(self.id).into());
        stored.insert("revision".to_owned(), self.revision.into());
        if let Some(profile) = &self.llm_profile {
            stored.insert(LLM_PROFILE.to_owned(), profile.as_str().into());
        }
        stored.into()
    }

    /// The LLM profile that a start uses; `None` if the user has none that is active.
    #[must_use]
    pub fn llm_profile<'p>(&'p self, profiles: &'p LlmProfiles) -> Option<&'p str> {
        self.llm_profile.as_deref().or_else(|| profiles.active())
    }

    /// As responses show it: every field.
    #[must_use]
    pub fn shown(&self, profiles: &LlmProfiles) -> Map<String, Value> {
        let mut shown = Map::from_iter([
            ("schema_version".to_owned(), SCHEMA_VERSION.into()),
            ("agent_kind".to_owned(), AgentKind::Openhands.as_str().into()),
            ("id".to_owned(), id::dashed(self.id).into()),
            ("name".to_owned(), self.name.as_str().into()),
            ("revision".to_owned(), self.revision.into()),
            (LLM_PROFILE.to_owned(), self.llm_profile(profiles).into()),
        ]);
        shown.extend(declared::shown(FIELDS, &self.fields, Secrets::Hidden));
        shown
    }

    fn texts(&self, name: &str) -> Option<BTreeSet<&str>> {
        let list = self.fields.get(name)?.as_array()?;
        Some(list.iter().filter_map(Value::as_str).collect())
    }

    /// The MCP servers of the settings that the agent gets; `None` for all.
    #[must_use]
    pub fn mcp_servers(&self) -> Option<BTreeSet<&str>> {
        self.texts("mcp_server_refs")
    }

    /// The secrets and provider tokens of the settings that the agent gets, by the names of their variables; `None` for all.
    #[must_use]
    pub fn secrets(&self) -> Option<BTreeSet<&str>> {
        self.texts("secret_refs")
    }

    /// Skills that the agent does not get.
    #[must_use]
    pub fn disabled_skills(&self) -> BTreeSet<&str> {
        self.texts("disabled_skills").unwrap_or_default()
    }

    /// Text after the system prompt.
    #[must_use]
    pub fn system_message_suffix(&self) -> Option<&str> {
        self.fields.get("system_message_suffix").and_then(Value::as_str).filter(|text| !text.trim().is_empty())
    }

    /// The tools of an agent that writes code, in the form of agent servers; `None` for the usual ones.
    #[must_use]
    pub fn tools(&self) -> Option<&Value> {
        self.fields.get("tools").filter(|tools| tools.is_array())
    }

    /// How many tools the agent may use at once.
    #[must_use]
    pub fn tool_concurrency_limit(&self) -> Option<i64> {
        self.fields.get("tool_concurrency_limit").and_then(Value::as_i64)
    }

    /// The fields of the condenser that the profile sets.
    #[must_use]
    pub fn condenser(&self) -> Option<&Map<String, Value>> {
        self.fields.get("condenser").and_then(Value::as_object)
    }
}

/// The profiles of a user, in the order in which they were made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AgentProfiles {
    profiles: Vec<AgentProfile>,
    active: Option<Uuid>,
}

impl AgentProfiles {
    /// Reads the stored form, `{"profiles": {name: profile}, "active": id}`.
    #[must_use]
    pub fn stored(value: &Value) -> Self {
        let stored = value.get(PROFILES).and_then(Value::as_object).into_iter().flatten();
        let profiles = stored.filter_map(|(name, profile)| AgentProfile::stored(name, profile)).collect();
        let active = value.get(ACTIVE).and_then(Value::as_str).and_then(|id| Uuid::try_parse(id).ok());
        Self { profiles, active }
    }

    /// The stored form.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let profiles: Map<String, Value> =
            self.iter().map(|profile| (profile.name.clone(), profile.to_json())).collect();
        json!({PROFILES: profiles, ACTIVE: self.active.map(id::dashed)})
    }

    /// The profiles.
    pub fn iter(&self) -> impl Iterator<Item = &AgentProfile> {
        self.profiles.iter()
    }

    /// The profile that starts use which name none.
    #[must_use]
    pub fn active(&self) -> Option<&AgentProfile> {
        self.with_id(self.active?)
    }

    #[must_use]
    pub fn with_id(&self, id: Uuid) -> Option<&AgentProfile> {
        self.iter().find(|profile| profile.id == id)
    }

    /// The profile with a name.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn find(&self, name: &str) -> Result<&AgentProfile> {
        self.iter().find(|profile| profile.name == name).ok_or_else(|| not_found(name))
    }

    /// The names of profiles that refer to an LLM profile.
    #[must_use]
    pub fn of_llm_profile(&self, llm_profile: &str) -> Vec<&str> {
        let refers = |profile: &&AgentProfile| profile.llm_profile.as_deref() == Some(llm_profile);
        self.iter().filter(refers).map(|profile| profile.name.as_str()).collect()
    }

    /// Lets every reference to an LLM profile follow its new name.
    pub fn rename_llm_profile(&mut self, name: &str, new_name: &str) {
        for profile in self.profiles.iter_mut().filter(|profile| profile.llm_profile.as_deref() == Some(name)) {
            profile.llm_profile = Some(new_name.to_owned());
        }
    }

    /// Ensures that a profile is active, if there is any or the user has an active LLM profile. Without a valid choice it is the profile
    /// [`DEFAULT_NAME`], which is made if it is missing and follows the LLM profile that is active. Returns whether anything changed.
    pub fn ensure_active(&mut self, llm_profiles: &LlmProfiles) -> bool {
        if self.active().is_some() {
            return false;
        }
        let has_default = self.find(DEFAULT_NAME).is_ok();
        if !has_default && self.profiles.len() < MAX_AGENT_PROFILES && llm_profiles.active().is_some() {
            let (id, name) = (id::new_uuid(), DEFAULT_NAME.to_owned());
            self.profiles.push(AgentProfile { id, name, revision: 0, llm_profile: None, fields: Map::new() });
        }
        let default = self.iter().find(|profile| profile.name == DEFAULT_NAME);
        let active = default.or_else(|| self.iter().next()).map(|profile| profile.id);
        let is_changed = self.active != active;
        self.active = active;
        is_changed
    }

    /// Saves a profile under its name. One that has the name keeps its id, and its revision grows.
    ///
    /// # Errors
    /// [`Error::Conflict`] when there are too many; [`Error::TooLarge`].
    pub fn put(&mut self, name: &str, save: &AgentProfileSave) -> Result<()> {
        let is_full = self.profiles.len() >= MAX_AGENT_PROFILES;
        let known = self.profiles.iter_mut().find(|profile| profile.name == name);
        let new = AgentProfile {
            id: known.as_ref().map_or_else(id::new_uuid, |known| known.id),
            name: name.to_owned(),
            revision: known.as_ref().map_or(0, |known| known.revision + 1),
            llm_profile: Some(save.llm_profile.clone()),
            fields: save.fields.clone(),
        };
        if new.to_json().to_string().len() > MAX_AGENT_PROFILE {
            return Err(Error::TooLarge(format!("An agent profile must not exceed {} KiB", MAX_AGENT_PROFILE / 1024)));
        }
        match known {
            Some(known) => *known = new,
            None if is_full => {
                return Err(Error::Conflict(format!(
                    "Agent profile limit reached ({MAX_AGENT_PROFILES}). Delete a profile before saving a new one."
                )));
            }
            None => self.profiles.push(new),
        }
        Ok(())
    }

    /// Makes a profile the active one.
    ///
    /// # Errors
    /// [`Error::NotFound`].
    pub fn activate(&mut self, id: Uuid) -> Result<&AgentProfile> {
        if self.with_id(id).is_some() {
            self.active = Some(id);
        }
        self.with_id(id).ok_or_else(|| not_found(&id::dashed(id)))
    }

    /// Deletes a profile. If it was active, none is, until the list is read again. Returns whether there was one.
    pub fn delete(&mut self, name: &str) -> bool {
        let before = self.profiles.len();
        if self.active().is_some_and(|active| active.name == name) {
            self.active = None;
        }
        self.profiles.retain(|profile| profile.name != name);
        self.profiles.len() < before
    }

    /// Renames a profile, which keeps its id.
    ///
    /// # Errors
    /// [`Error::NotFound`]; [`Error::Conflict`] when another has the new name.
    pub fn rename(&mut self, name: &str, new_name: &str) -> Result<()> {
        self.find(name)?;
        if name != new_name && self.find(new_name).is_ok() {
            return Err(Error::Conflict(format!("Agent profile '{new_name}' already exists")));
        }
        for profile in self.profiles.iter_mut().filter(|profile| profile.name == name) {
            new_name.clone_into(&mut profile.name);
        }
        Ok(())
    }
}

fn not_found(name: &str) -> Error {
    Error::NotFound(format!("Agent profile '{name}' not found"))
}

/// The body of a request that saves a profile: a whole profile.
#[derive(Clone, Debug)]
pub struct AgentProfileSave {
    pub llm_profile: String,
    /// Without the fields that have their default.
    fields: Map<String, Value>,
}

impl AgentProfileSave {
    /// The profile, as if it were saved.
    #[must_use]
    pub fn draft(self, name: &str) -> AgentProfile {
        let (llm_profile, fields) = (Some(self.llm_profile), self.fields);
        AgentProfile { id: Uuid::nil(), name: name.to_owned(), revision: 0, llm_profile, fields }
    }
}

impl FromJson for AgentProfileSave {
    /// Violations: those of the fields, `missing` and those of names for the LLM profile, `extra_forbidden` for unknown keys,
    /// `literal_error` for another kind of agent, `value_error` for a value that would have no effect here.
    fn from_json(check: &mut Checker, value: &Value) -> Option<Self> {
        let Value::Object(given) = value else {
            let msg = "Input should be a valid dictionary or object to extract fields from";
            check.report("model_attributes_type", msg, value.clone(), None);
            return None;
        };
        if let Some(kind) = given.get("agent_kind") {
            check.within("agent_kind", |check| literal::<AgentKind>(check, kind))?;
        }
        let llm_profile = check.within(LLM_PROFILE, |check| match given.get(LLM_PROFILE) {
            None => {
                check.report_missing(value.clone());
                None
            }
            Some(name) => llm_profiles::read_name(check, name),
        });
        let fields = declared::read(check, FIELDS, given);
        let tools = given.get("tools").is_none_or(|tools| check.within("tools", |check| are_tools(check, tools)));
        let is_known = |name: &str| {
            FIELDS.iter().any(|field| field.name == name)
                || SET_HERE.contains(&name)
                || [LLM_PROFILE, "agent_kind"].contains(&name)
        };
        for (name, value) in given.iter().filter(|(name, _)| !is_known(name)) {
            check.within(name.clone(), |check| {
                check.report("extra_forbidden", "Extra inputs are not permitted", value.clone(), None);
            });
        }
        let fields = declared::sparse(FIELDS, &fields.filter(|_| tools)?);
        for (path, advice) in WITHOUT_EFFECT {
            if let Some(value) = at(&fields, path) {
                report_without_effect(check, path, advice, value);
            }
        }
        check.is_clean().then_some(())?;
        Some(Self { llm_profile: llm_profile?, fields })
    }
}

fn at<'v>(fields: &'v Map<String, Value>, path: &[&str]) -> Option<&'v Value> {
    let (first, rest) = path.split_first()?;
    let value = fields.get(*first)?;
    if rest.is_empty() { Some(value) } else { at(value.as_object()?, rest) }
}

fn report_without_effect(check: &mut Checker, path: &[&'static str], advice: &str, value: &Value) {
    match path {
        [] => check.report_value_error(format!("it has no effect here: {advice}"), value.clone()),
        [first, rest @ ..] => check.within(*first, |check| report_without_effect(check, rest, advice, value)),
    }
}

/// Checks a list of `{"name", "params"}`.
fn are_tools(check: &mut Checker, tools: &Value) -> bool {
    let Value::Array(tools) = tools else { return true };
    let is_tool = |check: &mut Checker, tool: &Value| {
        let name = tool.get("name").unwrap_or(&Value::Null);
        let name = check.within("name", |check| string_up_to(MAX_TOOL_NAME, check, name));
        let has_params = tool.get("params").is_none_or(|params| params.is_null() || params.is_object());
        if !has_params {
            check.within("params", |check| {
                check.report("dict_type", "Input should be a valid dictionary", Value::Null, None);
            });
        }
        name.is_some() && has_params
    };
    let mut are_valid = true;
    for (index, tool) in tools.iter().enumerate() {
        are_valid &= check.within(index, |check| is_tool(check, tool));
    }
    are_valid
}

/// The body of a request for what a profile resolves to.
#[derive(Debug, Default)]
pub struct AgentProfileMaterialize {
    /// A profile to look at in place of the stored one.
    pub draft: Option<AgentProfileSave>,
}

impl FromJson for AgentProfileMaterialize {
    fn from_json(check: &mut Checker, value: &Value) -> Option<Self> {
        Fields::of(check, value)?;
        let draft = match value.get("profile") {
            None | Some(Value::Null) => None,
            Some(profile) => Some(check.within("profile", |check| AgentProfileSave::from_json(check, profile))?),
        };
        Some(Self { draft })
    }
}

/// Why a start cannot use an agent profile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AgentProfileError {
    #[error("Agent profile '{}' not found", id::dashed(*.0))]
    Unknown(Uuid),
    #[error(
        "Agent profile '{name}' refers to LLM profile '{llm_profile}', which does not exist: choose another LLM profile for it"
    )]
    NoLlmProfile { name: String, llm_profile: String },
}

/// An agent profile that a start uses.
#[derive(Clone, Debug)]
pub struct LaunchProfile {
    pub profile: AgentProfile,
    /// Names of MCP servers that the settings do not have.
    pub missing_mcp_servers: Vec<String>,
}

impl Settings {
    /// The settings as a start uses them that names this agent profile, or names none and so uses the active one.
    ///
    /// A profile that its user has saved chooses the LLM profile and the condenser; every profile chooses among the MCP servers and the
    /// skills. Its other fields take effect where the request for the agent server is built.
    ///
    /// # Errors
    /// [`AgentProfileError`].
    pub fn with_agent_profile(mut self, named: Option<Uuid>) -> Result<Self, AgentProfileError> {
        let profile = match named {
            Some(id) => self.agent_profiles.with_id(id).ok_or(AgentProfileError::Unknown(id))?.clone(),
            None => match self.agent_profiles.active() {
                Some(active) => active.clone(),
                None => return Ok(self),
            },
        };
        if let Some(llm_profile) = &profile.llm_profile {
            if self.llm_profiles.activate(llm_profile).is_err() {
                let (name, llm_profile) = (profile.name, llm_profile.clone());
                return Err(AgentProfileError::NoLlmProfile { name, llm_profile });
            }
            let mut condenser = profile.condenser().cloned().unwrap_or_default();
            self.enable_default_condenser = condenser.shift_remove("enabled").and_then(|enabled| enabled.as_bool());
            let size = condenser.shift_remove("max_size").and_then(|size| size.as_u64());
            self.condenser_max_size = size.and_then(|size| size.try_into().ok());
            self.condenser = condenser;
        }
        let mut missing_mcp_servers = Vec::new();
        if let Some(chosen) = profile.mcp_servers() {
            let known: BTreeSet<&str> = self.mcp_config.names().collect();
            missing_mcp_servers = chosen.difference(&known).map(|name| (*name).to_owned()).collect();
            self.mcp_config.retain(|name| chosen.contains(name));
        }
        let disabled = profile.disabled_skills().into_iter().map(str::to_owned);
        self.disabled_skills.get_or_insert_default().extend(disabled);
        self.agent_profile = Some(LaunchProfile { profile, missing_mcp_servers });
        Ok(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::pydantic::body;
    use crate::http::pydantic::validation::Checked;

    fn read(value: &Value) -> Checked<AgentProfileSave> {
        body::read(Some("application/json"), value.to_string().as_bytes())
    }

    fn save(value: &Value) -> AgentProfileSave {
        read(value).expect("a profile")
    }

    fn llm_profiles() -> LlmProfiles {
        LlmProfiles::stored(
            &json!({"profiles": {"a": {"model": "openai/a"}, "b": {"model": "openai/b"}}, "active": "a"}),
        )
    }

    #[test]
    fn a_profile_is_stored_without_defaults_and_shown_with_every_field() {
        let given = json!({"agent_kind": "openhands", "llm_profile_ref": "b", "mcp_server_refs": [], "disabled_skills": ["docker"],
            "tools": [{"name": "terminal", "params": {}}], "condenser": {"max_size": 80, "keep_first": 2},
            "tool_concurrency_limit": 1, "enable_switch_llm_tool": true, "persona": null});
        let mut profiles = AgentProfiles::default();
        profiles.put("reviewer", &save(&given)).expect("stored");
        let stored = profiles.to_json();
        let fields: Vec<&String> = stored["profiles"]["reviewer"].as_object().expect("fields").keys().collect();
        let expected =
            ["mcp_server_refs", "disabled_skills", "tools", "condenser", "id", "revision", "llm_profile_ref"];
        assert_eq!(fields.iter().copied().collect::<BTreeSet<_>>(), expected.map(String::from).iter().collect());
        assert_eq!(AgentProfiles::stored(&stored), profiles);
        let shown = profiles.find("reviewer").expect("a profile").shown(&llm_profiles());
        assert_eq!((&shown["llm_profile_ref"], &shown["mcp_server_refs"]), (&json!("b"), &json!([])));
        assert_eq!((&shown["condenser"]["max_size"], &shown["condenser"]["enabled"]), (&json!(80), &json!(true)));
        assert_eq!((&shown["persona"], &shown["secret_refs"]), (&Value::Null, &Value::Null));
        // A client sends back what it was shown, with a change.
        let (id, revision) = (shown["id"].clone(), shown["revision"].clone());
        let again = AgentProfileSave { llm_profile: "a".to_owned(), ..save(&Value::Object(shown)) };
        profiles.put("reviewer", &again).expect("stored");
        let shown = profiles.find("reviewer").expect("a profile").shown(&llm_profiles());
        assert_eq!((&shown["id"], &shown["llm_profile_ref"]), (&id, &json!("a")));
        assert_eq!((revision, &shown["revision"]), (json!(0), &json!(1)));
    }

    #[test]
    fn what_has_no_effect_is_refused() {
        for (given, kind, loc) in [
            (json!({}), "missing", json!(["body", "llm_profile_ref"])),
            (json!({"llm_profile_ref": 1}), "string_type", json!(["body", "llm_profile_ref"])),
            (json!({"llm_profile_ref": "../a"}), "string_pattern_mismatch", json!(["body", "llm_profile_ref"])),
            (json!({"agent_kind": "acp", "acp_server": "codex"}), "literal_error", json!(["body", "agent_kind"])),
            (json!({"llm_profile_ref": "a", "acp_server": "codex"}), "extra_forbidden", json!(["body", "acp_server"])),
            (json!({"llm_profile_ref": "a", "agent": "Other"}), "literal_error", json!(["body", "agent"])),
            (json!({"llm_profile_ref": "a", "tools": [{}]}), "string_type", json!(["body", "tools", 0, "name"])),
            (
                json!({"llm_profile_ref": "a", "tools": [{"name": "x", "params": 1}]}),
                "dict_type",
                json!(["body", "tools", 0, "params"]),
            ),
            (
                json!({"llm_profile_ref": "a", "condenser": {"max_size": 1}}),
                "greater_than_equal",
                json!(["body", "condenser", "max_size"]),
            ),
            (json!({"llm_profile_ref": "a", "persona": "x"}), "value_error", json!(["body", "persona"])),
            (
                json!({"llm_profile_ref": "a", "enable_sub_agents": true}),
                "value_error",
                json!(["body", "enable_sub_agents"]),
            ),
            (
                json!({"llm_profile_ref": "a", "verification": {"critic_enabled": true}}),
                "value_error",
                json!(["body", "verification", "critic_enabled"]),
            ),
            (json!([]), "model_attributes_type", json!(["body"])),
        ] {
            let violations = read(&given).expect_err("a violation");
            let violation = json!(violations[0]);
            assert_eq!((&violation["type"], &violation["loc"]), (&json!(kind), &loc), "{given}");
        }
    }

    #[test]
    fn the_first_profile_follows_the_active_llm_profile_until_its_user_saves_it() {
        let (mut profiles, mut llms) = (AgentProfiles::default(), llm_profiles());
        assert!(!profiles.ensure_active(&LlmProfiles::default()), "there is no model");
        assert!(profiles.ensure_active(&llms) && !profiles.ensure_active(&llms));
        let active = |profiles: &AgentProfiles, llms: &LlmProfiles| {
            let active = profiles.active().expect("a profile");
            (active.name.clone(), active.llm_profile(llms).map(str::to_owned))
        };
        assert_eq!(active(&profiles, &llms), ("default".to_owned(), Some("a".to_owned())));
        llms.activate("b").expect("a profile");
        assert_eq!(active(&profiles, &llms).1.as_deref(), Some("b"));
        assert!(profiles.of_llm_profile("b").is_empty(), "it holds no reference");
        profiles.put("default", &save(&json!({"llm_profile_ref": "a"}))).expect("stored");
        assert_eq!(active(&profiles, &llms).1.as_deref(), Some("a"));
        assert_eq!(profiles.of_llm_profile("a"), ["default"]);
        profiles.rename_llm_profile("a", "c");
        assert_eq!(active(&profiles, &llms).1.as_deref(), Some("c"));
        // The pointer does not stay at a deleted profile.
        profiles.put("other", &save(&json!({"llm_profile_ref": "a"}))).expect("stored");
        assert!(profiles.delete("default") && !profiles.delete("default"));
        assert!(profiles.active().is_none() && profiles.ensure_active(&llms));
        assert_eq!(active(&profiles, &llms), ("default".to_owned(), Some("b".to_owned())), "it is made again");
        assert!(profiles.delete("default") && profiles.ensure_active(&LlmProfiles::default()));
        assert_eq!(active(&profiles, &llms).0, "other");
        let id = profiles.active().expect("a profile").id;
        profiles.rename("other", "default").expect("renamed");
        assert_eq!(profiles.active().expect("a profile").id, id);
        assert!(matches!(profiles.rename("none", "x"), Err(Error::NotFound(_))));
        assert!(matches!(profiles.activate(Uuid::nil()), Err(Error::NotFound(_))));
    }

    #[test]
    fn profiles_are_limited_in_number_and_size() {
        let mut profiles = AgentProfiles::default();
        let one = save(&json!({"llm_profile_ref": "a"}));
        for number in 0..MAX_AGENT_PROFILES {
            profiles.put(&number.to_string(), &one).expect("stored");
        }
        assert!(matches!(profiles.put("more", &one), Err(Error::Conflict(_))));
        profiles.put("7", &one).expect("an existing one is replaced");
        assert!(matches!(profiles.rename("7", "8"), Err(Error::Conflict(_))));
        let names: Vec<String> = (0..500).map(|number| format!("{number:040}")).collect();
        let large = save(&json!({"llm_profile_ref": "a", "disabled_skills": names}));
        assert!(matches!(profiles.put("7", &large), Err(Error::TooLarge(_))));
    }

    #[test]
    fn a_start_gets_the_choices_of_its_profile() {
        let id = "b704a292-9166-4871-83f0-f2c3a805d5d4";
        let document = json!({
            "llm_profiles": {"profiles": {"a": {"model": "openai/a", "api_key": "k-a"}, "b": {"model": "openai/b"}}, "active": "a"},
            "mcp_config": {"one": {"url": "https://one.example"}, "two": {"url": "https://two.example"}},
            "disabled_skills": ["docker"], "condenser_max_size": 100,
            "agent_profiles": {"profiles": {
                "default": {"id": "00000000-0000-4000-8000-000000000001", "revision": 0},
                "p": {"id": id, "revision": 3, "llm_profile_ref": "b", "mcp_server_refs": ["two", "three"], "disabled_skills": ["npm"],
                    "condenser": {"keep_first": 4}},
                "lost": {"id": "00000000-0000-4000-8000-000000000002", "revision": 0, "llm_profile_ref": "gone"},
            }, "active": "00000000-0000-4000-8000-000000000001"},
        });
        let settings = || Settings::from_json(&document.to_string()).expect("settings");
        let of_default = settings().with_agent_profile(None).expect("a profile");
        assert_eq!(of_default.llm_of_start(None).model(), Some("openai/a"));
        assert_eq!((of_default.mcp_config.names().count(), of_default.condenser_max_size), (2, Some(100)));

        let of_profile = settings().with_agent_profile(Some(Uuid::parse_str(id).expect("an id"))).expect("a profile");
        assert_eq!(of_profile.llm_of_start(None).model(), Some("openai/b"));
        assert_eq!(of_profile.llm_of_start(Some("openai/a")).api_key(), Some("k-a"), "a request names a model");
        assert_eq!(of_profile.mcp_config.names().collect::<Vec<_>>(), ["two"]);
        assert_eq!((of_profile.condenser_max_size, &of_profile.condenser["keep_first"]), (None, &json!(4)));
        assert_eq!(of_profile.disabled_skills.expect("skills"), ["docker", "npm"]);
        let launch = of_profile.agent_profile.expect("a profile");
        assert_eq!((launch.profile.revision, launch.missing_mcp_servers), (3, vec!["three".to_owned()]));

        let unknown = settings().with_agent_profile(Some(Uuid::nil())).expect_err("no profile");
        assert_eq!(unknown, AgentProfileError::Unknown(Uuid::nil()));
        let lost = Uuid::parse_str("00000000-0000-4000-8000-000000000002").expect("an id");
        let error = settings().with_agent_profile(Some(lost)).expect_err("no LLM profile");
        assert!(error.to_string().contains("'gone'"), "{error}");
        assert!(Settings::default().with_agent_profile(None).expect("settings").agent_profile.is_none());
    }
}
