//! Settings as a document: what clients may change in it, what they see of it, and which of its parts never show.
//!
//! The document is the contract's flat settings object. Clients of later versions nest the same fields in `agent_settings_diff`
//! and `conversation_settings_diff`; they are put into their places.

use serde_json::{Map, Value, json};

use super::git;
use super::mcp::{self, McpChange, Servers};
use super::settings::SandboxGroupingStrategy;
use crate::error::{Error, Result};
use crate::http::pydantic::validation::{self, Checked, Checker, Fields, Loc};
use crate::http::secret::{self, MASK, MAX_SECRETS};
use crate::user::git::ProviderType;

/// Characters of a text.
const MAX_TEXT: usize = 10_000;
/// Entries of a list.
const MAX_LIST: usize = 1_000;
/// Bytes of a whole document: a row of the store has 400 KB, and sealing adds a third.
const MAX_DOCUMENT: usize = 256 * 1024;

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Secret,
    Integer {
        least: i64,
    },
    Float,
    Flag,
    Texts,
    Mcp,
    /// Not changed by clients: always the default.
    Fixed,
    Grouping,
}

/// A field: its name, what it holds, what it is when nobody set it.
struct Field {
    name: &'static str,
    kind: Kind,
    default: fn() -> Value,
}

const fn field(name: &'static str, kind: Kind) -> Field {
    Field { name, kind, default: || Value::Null }
}

const fn on(name: &'static str) -> Field {
    Field { name, kind: Kind::Flag, default: || Value::Bool(true) }
}

const fn off(name: &'static str) -> Field {
    Field { name, kind: Kind::Flag, default: || Value::Bool(false) }
}

const ANY: Kind = Kind::Integer { least: i64::MIN };

/// In the order in which answers show them.
static FIELDS: [Field; 30] = [
    field("language", Kind::Text),
    field("agent", Kind::Text),
    field("max_iterations", ANY),
    field("security_analyzer", Kind::Text),
    field("confirmation_mode", Kind::Flag),
    field("llm_model", Kind::Text),
    field("llm_api_key", Kind::Secret),
    field("llm_base_url", Kind::Text),
    field("user_version", ANY),
    field("remote_runtime_resource_factor", ANY),
    // Never more than this: what is in it has routes of its own.
    Field { name: STORE, kind: Kind::Fixed, default: || json!({"provider_tokens": {}}) },
    on("enable_default_condenser"),
    off("enable_sound_notifications"),
    on("enable_proactive_conversation_starters"),
    on("enable_solvability_analysis"),
    field("user_consents_to_analytics", Kind::Flag),
    field("sandbox_base_container_image", Kind::Text),
    field("sandbox_runtime_container_image", Kind::Text),
    field(MCP, Kind::Mcp),
    field("disabled_skills", Kind::Texts),
    field("search_api_key", Kind::Secret),
    field("sandbox_api_key", Kind::Secret),
    field("max_budget_per_task", Kind::Float),
    field("condenser_max_size", Kind::Integer { least: 20 }),
    field("email", Kind::Text),
    field("email_verified", Kind::Flag),
    field("git_user_name", Kind::Text),
    field("git_user_email", Kind::Text),
    on("v1_enabled"),
    Field { name: GROUPING, kind: Kind::Grouping, default: || json!(SandboxGroupingStrategy::default()) },
];

const MCP: &str = "mcp_config";
const GROUPING: &str = "sandbox_grouping_strategy";
const STORE: &str = "secrets_store";
const TOKENS: &str = "provider_tokens";
const SECRETS: &str = "custom_secrets";

/// Where clients of later versions put fields: the path in the body, and the flat name.
const NESTED: [(&[&str], &str); 9] = [
    (&["agent_settings_diff", "llm", "model"], "llm_model"),
    (&["agent_settings_diff", "llm", "api_key"], "llm_api_key"),
    (&["agent_settings_diff", "llm", "base_url"], "llm_base_url"),
    (&["agent_settings_diff", "agent"], "agent"),
    (&["agent_settings_diff", "condenser", "enabled"], "enable_default_condenser"),
    (&["agent_settings_diff", "condenser", "max_size"], "condenser_max_size"),
    (&["conversation_settings_diff", "confirmation_mode"], "confirmation_mode"),
    (&["conversation_settings_diff", "security_analyzer"], "security_analyzer"),
    (&["conversation_settings_diff", "max_iterations"], "max_iterations"),
];

/// Where MCP servers may stand in a body. The first that is there counts, as in the reference.
const MCP_PLACES: [&[&str]; 2] = [&["agent_settings_diff", MCP], &[MCP]];

/// The changes of one request, checked: field by field, `null` where one is cleared.
#[derive(Debug)]
pub struct SettingsChanges {
    fields: Map<String, Value>,
    mcp: Option<(&'static [&'static str], McpChange)>,
    tokens: Option<Map<String, Value>>,
}

impl SettingsChanges {
    /// Reads the body of `POST /api/v1/settings`. Fields that are absent stay as they are, `null` and blank secrets clear, a
    /// [`MASK`] leaves a secret as it is; unknown fields are ignored.
    ///
    /// # Errors
    /// Every violation; none shows a secret.
    pub fn read(body: &Value) -> Checked<Self> {
        let mut check = Checker::new("body");
        let read = Self::read_object(&mut check, body);
        check.finish(read)
    }

    fn read_object(check: &mut Checker, body: &Value) -> Option<Self> {
        if !body.is_object() {
            Fields::of(check, &MASK.into())?;
        }
        let mut fields = Map::new();
        for field in FIELDS.iter().filter(|field| !matches!(field.kind, Kind::Fixed | Kind::Mcp)) {
            let nested = NESTED.iter().filter(|(_, name)| *name == field.name).map(|(path, _)| *path);
            for path in nested.chain([&[field.name][..]]) {
                let Some(value) = value_at(body, path) else { continue };
                if let Some(read) = at(check, path, |check| read_field(check, field.kind, value)) {
                    fields.insert(field.name.to_owned(), read);
                }
            }
        }
        let mcp = MCP_PLACES.into_iter().find_map(|path| Some((path, value_at(body, path)?)));
        let mcp = match mcp {
            Some((path, value)) => at(check, path, |check| McpChange::read(check, value)).map(|change| (path, change)),
            None => None,
        };
        let tokens = match body.get(TOKENS) {
            None => None,
            Some(Value::Null) => Some(Map::new()),
            Some(value) => check.within(TOKENS, |check| read_tokens(check, value)),
        };
        Some(Self { fields, mcp, tokens })
    }
}

fn value_at<'v>(body: &'v Value, path: &[&str]) -> Option<&'v Value> {
    path.iter().try_fold(body, |value, step| value.get(step))
}

/// Reads at a path.
fn at<T>(check: &mut Checker, path: &[&'static str], read: impl FnOnce(&mut Checker) -> T) -> T {
    match path {
        [] => read(check),
        [first, rest @ ..] => check.within(Loc::from(*first), |check| at(check, rest, read)),
    }
}

fn read_field(check: &mut Checker, kind: Kind, value: &Value) -> Option<Value> {
    if value.is_null() {
        return Some(Value::Null);
    }
    match kind {
        Kind::Text => validation::string_up_to(MAX_TEXT, check, value).map(Value::from),
        Kind::Secret => read_key(check, value).map(Value::from),
        Kind::Flag => validation::boolean(check, value).map(Value::from),
        Kind::Float => validation::float(check, value).map(Value::from),
        Kind::Grouping => validation::choice::<SandboxGroupingStrategy>(check, value).map(|choice| json!(choice)),
        Kind::Mcp | Kind::Fixed => None,
        Kind::Integer { least } => {
            let integer = validation::integer(check, value)?;
            if integer < least {
                let msg = format!("Input should be greater than or equal to {least}");
                check.report("greater_than_equal", msg, value.clone(), Some(json!({"ge": least})));
                return None;
            }
            Some(integer.into())
        }
        Kind::Texts => {
            let texts = validation::list(check, value, |check, text| validation::string_up_to(MAX_TEXT, check, text))?;
            if texts.len() > MAX_LIST {
                secret::report_too_long(check, "List", MAX_LIST, texts.len());
                return None;
            }
            Some(texts.into())
        }
    }
}

/// A key or token; blanks around it are none of it.
fn read_key(check: &mut Checker, value: &Value) -> Option<String> {
    secret::value(check, value).map(|text| text.trim().to_owned())
}

fn read_tokens(check: &mut Checker, value: &Value) -> Option<Map<String, Value>> {
    let Value::Object(entries) = value else {
        check.report("dict_type", "Input should be a valid dictionary", MASK.into(), None);
        return None;
    };
    let mut tokens = Map::new();
    for (name, token) in entries {
        check.within(name.clone(), |check| {
            let name = Value::from(name.as_str());
            let Some(provider) = validation::choice::<ProviderType>(check, &name).filter(|_| !token.is_null()) else {
                return;
            };
            let Value::Object(given) = token else {
                check.report("dict_type", "Input should be a valid dictionary", MASK.into(), None);
                return;
            };
            let mut read = Map::new();
            for (key, value) in given {
                let value = check.within(key.clone(), |check| match key.as_str() {
                    "token" => read_token(check, value),
                    "host" => read_host(check, provider, value),
                    "user_id" if value.is_null() => Some(Value::Null),
                    "user_id" => validation::string_up_to(MAX_TEXT, check, value).map(Value::from),
                    _ => None,
                });
                if let Some(value) = value {
                    read.insert(key.clone(), value);
                }
            }
            tokens.insert(provider.as_str().to_owned(), Value::Object(read));
        });
        if token.is_null() {
            tokens.insert(name.clone(), Value::Null);
        }
    }
    Some(tokens)
}

/// A token of a git provider; `None` for one that leaves the stored one as it is: a blank, a mask or null.
fn read_token(check: &mut Checker, value: &Value) -> Option<Value> {
    if value.is_null() {
        return None;
    }
    match git::normal_token(secret::value(check, value)?) {
        Ok(token) if matches!(&*token, "" | MASK) => None,
        Ok(token) => Some(token.into()),
        Err(error) => {
            check.report_value_error(error, MASK.into());
            None
        }
    }
}

/// The host of a git provider; null for the provider's own.
fn read_host(check: &mut Checker, provider: ProviderType, value: &Value) -> Option<Value> {
    if value.is_null() {
        return Some(Value::Null);
    }
    // Hosts are pasted with credentials in them.
    let shown = value.as_str().map_or_else(|| value.clone(), |text| git::without_credentials(text).into());
    validation::string_up_to(MAX_TEXT, check, &shown)?;
    match git::normal_host(provider, value.as_str().unwrap_or_default()) {
        Ok(host) => Some(host.map_or(Value::Null, Value::from)),
        Err(error) => {
            check.report_value_error(error, shown);
            None
        }
    }
}

/// What of an object may stand in a violation.
fn without(value: &Value, secret: &str) -> Value {
    match value {
        Value::Object(fields) => Value::Object(
            fields.iter().filter(|(name, _)| *name != secret).map(|(n, v)| (n.clone(), v.clone())).collect(),
        ),
        // No object: what it is instead does not matter.
        _ => MASK.into(),
    }
}

/// A secret that is made, or changed.
#[derive(Debug)]
pub struct SecretChange {
    /// What it is to be called.
    pub name: String,
    /// Its value; `None` leaves it as it is.
    pub value: Option<String>,
    /// What it is for; `None` leaves that as it is.
    pub description: Option<String>,
}

impl SecretChange {
    /// Reads the body of `POST /api/v1/secrets` (`{name, value, description?}`) or, with `new` false, that of
    /// `PUT /api/v1/secrets/{name}`, where each may be missing.
    ///
    /// # Errors
    /// Every violation; none shows a value.
    pub fn read(body: &Value, name_of_path: Option<&str>) -> Checked<Self> {
        let mut check = Checker::new("body");
        let read = Self::read_object(&mut check, body, name_of_path);
        check.finish(read)
    }

    fn read_object(check: &mut Checker, body: &Value, name_of_path: Option<&str>) -> Option<Self> {
        // What is missing is reported with its neighbours: not with the value.
        let harmless = without(body, "value");
        let fields = Fields::of(check, &harmless)?;
        let name = match name_of_path {
            Some(name) => {
                // One that was kept before names were checked: it stays under its name until it is renamed.
                let read = |check: &mut Checker, value: &Value| match value.as_str() {
                    Some(given) if given == name => Some(given.to_owned()),
                    _ => secret::name(check, value),
                };
                fields.nullable(check, "name", read).map(|given| given.unwrap_or_else(|| name.to_owned()))
            }
            None => fields.required(check, "name", secret::name),
        };
        let value = check.within("value", |check| match body.get("value") {
            None | Some(Value::Null) if name_of_path.is_some() => Some(None),
            None => {
                check.report_missing(harmless.clone());
                None
            }
            // Whoever sends back what was shown has no new value.
            Some(Value::String(text)) if text == MASK && name_of_path.is_some() => Some(None),
            // Not trimmed: a key file ends with a line break for a reason.
            Some(value) => secret::value_of_variable(check, value).map(|text| Some(text.to_owned())),
        });
        if let (Some(name), Some(Some(_))) = (&name, &value)
            && let Some(fault) = secret::fault_of_name(name)
        {
            check.within("name", |check| {
                check.report_value_error(
                    format_args!("{fault}: send another name with the value"),
                    name.as_str().into(),
                );
            });
        }
        let description =
            fields.nullable(check, "description", |check, value| validation::string_up_to(MAX_TEXT, check, value));
        Some(Self { name: name?, value: value?, description: description? })
    }
}

/// A user's settings, tokens and secrets.
#[derive(Clone, Debug, Default)]
pub struct SettingsDocument(Map<String, Value>);

impl SettingsDocument {
    /// Of the stored text. Tokens and secrets may stand at the top or under `secrets_store`; here they stand at the top. MCP
    /// servers may have any form that was ever stored; here they stand by name.
    ///
    /// # Errors
    /// When it is no JSON object.
    pub fn parse(json: &str) -> Result<Self, serde_json::Error> {
        let mut document: Map<String, Value> = serde_json::from_str(json)?;
        if let Some(servers) = document.get_mut(MCP) {
            *servers = mcp::stored(servers).into();
        }
        if let Some(Value::Object(store)) = document.remove(STORE) {
            for (part, entries) in store {
                let (TOKENS | SECRETS, Value::Object(entries)) = (part.as_str(), entries) else { continue };
                let place = document.entry(part).or_insert_with(|| json!({}));
                if place.is_null() {
                    *place = json!({});
                }
                if let Value::Object(place) = place {
                    place.extend(entries);
                }
            }
        }
        Ok(Self(document))
    }

    /// Lays another document over this one: its fields replace, its tokens and secrets are added.
    pub fn lay_over(&mut self, other: &Self) {
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

    /// The text to be stored.
    ///
    /// # Errors
    /// [`Error::TooLarge`].
    pub fn to_json(&self) -> Result<String> {
        let json = Value::Object(self.0.clone()).to_string();
        if json.len() > MAX_DOCUMENT {
            let kib = MAX_DOCUMENT / 1024;
            return Err(Error::TooLarge(format!("Settings and secrets of a user may be {kib} KiB together")));
        }
        Ok(json)
    }

    /// Makes the changes.
    ///
    /// # Errors
    /// [`Error::Invalid`] when an MCP server would not be complete, or would send a stored secret elsewhere.
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
            // A provider without a token is none.
            if stored.get("token").and_then(Value::as_str).is_none_or(str::is_empty) {
                tokens.remove(provider);
            }
        }
        Ok(())
    }

    fn mcp_servers(&self) -> Option<&Servers> {
        self.0.get(MCP).and_then(Value::as_object)
    }

    /// The fields as answers show them, in the contract's order; secrets in clear only with `expose`.
    #[must_use]
    pub fn shown(&self, expose: bool) -> Map<String, Value> {
        let mut shown = Map::new();
        for field in &FIELDS {
            let stored = self.0.get(field.name).filter(|value| !value.is_null());
            let mut value = stored.cloned().unwrap_or_else(field.default);
            match field.kind {
                Kind::Secret if value.as_str().is_none_or(|text| text.trim().is_empty()) => value = Value::Null,
                Kind::Secret if !expose => value = MASK.into(),
                Kind::Mcp => {
                    value = self.mcp_servers().map_or(Value::Null, |servers| mcp::shown_with_lists(servers, expose));
                }
                Kind::Fixed => value = (field.default)(),
                _ => {}
            }
            shown.insert(field.name.to_owned(), value);
        }
        let agent_settings = self.agent_settings(&shown, expose);
        shown.insert("agent_settings".to_owned(), agent_settings);
        shown
    }

    /// The fields that later clients read below `agent_settings`.
    fn agent_settings(&self, shown: &Map<String, Value>, expose: bool) -> Value {
        let mut settings = json!({"agent_kind": "openhands"});
        for (path, name) in NESTED {
            let (["agent_settings_diff", place @ ..], Some(value)) = (path, shown.get(name)) else { continue };
            if value.is_null() {
                continue;
            }
            match place {
                [field] => settings[*field] = value.clone(),
                [part, field] => settings[*part][*field] = value.clone(),
                _ => {}
            }
        }
        settings[MCP] = self.mcp_servers().map(|servers| mcp::shown(servers, expose)).unwrap_or_default().into();
        settings
    }

    /// As `GET /api/v1/settings` answers: masked, and with flags for what is set.
    #[must_use]
    pub fn shown_with_flags(&self) -> Value {
        let mut shown = self.shown(false);
        let flag = |name: &str| Value::Bool(shown.get(name).is_some_and(|value| !value.is_null()));
        let (llm, search) = (flag("llm_api_key"), flag("search_api_key"));
        let tokens: Map<String, Value> = self
            .0
            .get(TOKENS)
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .filter(|(_, token)| token["token"].as_str().is_some_and(|token| !token.is_empty()))
            .map(|(provider, token)| {
                // Settings files and earlier versions may have hosts with credentials.
                let host = token["host"].as_str().map(git::without_credentials);
                (provider.clone(), host.map_or(Value::Null, Value::from))
            })
            .collect();
        // As in the reference: the flag tells whether there is one.
        if let Some(key) =
            shown.get_mut("agent_settings").and_then(|settings| settings.get_mut("llm")?.get_mut("api_key"))
        {
            *key = Value::Null;
        }
        shown.insert("llm_api_key_set".to_owned(), llm);
        shown.insert("search_api_key_set".to_owned(), search);
        shown.insert("provider_tokens_set".to_owned(), tokens.into());
        Value::Object(shown)
    }

    /// Names of the custom secrets, in order, each with what it is for.
    pub fn secrets(&self) -> impl Iterator<Item = (&str, Option<&str>)> {
        let mut secrets: Vec<_> = self
            .0
            .get(SECRETS)
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .map(|(name, secret)| (name.as_str(), secret["description"].as_str()))
            .collect();
        secrets.sort_unstable();
        secrets.into_iter()
    }

    /// Makes a secret, or another value of the one with its name. Answers whether it is new.
    ///
    /// # Errors
    /// [`Error::Refused`] when there are too many.
    pub fn put_secret(&mut self, change: &SecretChange) -> Result<bool> {
        let secrets = self.part(SECRETS);
        let stored = secrets.get(&change.name).cloned();
        if stored.is_none() && secrets.len() >= MAX_SECRETS {
            return Err(Error::Refused(format!("A user has at most {MAX_SECRETS} secrets")));
        }
        let new = stored.is_none();
        let mut stored = stored.unwrap_or_else(|| json!({"secret": "", "description": null}));
        set_secret(&mut stored, change);
        secrets.insert(change.name.clone(), stored);
        Ok(new)
    }

    /// Changes the secret, its name included.
    ///
    /// # Errors
    /// [`Error::NotFound`], or [`Error::Conflict`] when the new name is another's.
    pub fn change_secret(&mut self, name: &str, change: &SecretChange) -> Result<()> {
        let secrets = self.part(SECRETS);
        let mut stored = secrets.get(name).cloned().ok_or_else(|| no_secret(name))?;
        if name != change.name && secrets.contains_key(&change.name) {
            return Err(Error::Conflict(format!("There is a secret {} already", change.name)));
        }
        secrets.remove(name);
        set_secret(&mut stored, change);
        secrets.insert(change.name.clone(), stored);
        Ok(())
    }

    /// # Errors
    /// [`Error::NotFound`].
    pub fn delete_secret(&mut self, name: &str) -> Result<()> {
        self.part(SECRETS).remove(name).map(|_| ()).ok_or_else(|| no_secret(name))
    }

    fn part(&mut self, name: &'static str) -> &mut Map<String, Value> {
        let part = self.0.entry(name).or_insert_with(|| json!({}));
        if !part.is_object() {
            *part = json!({});
        }
        part.as_object_mut().unwrap_or_else(|| unreachable!("made an object above"))
    }
}

fn no_secret(name: &str) -> Error {
    Error::NotFound(format!("Secret {name} not found"))
}

fn set_secret(stored: &mut Value, change: &SecretChange) {
    if let Some(value) = &change.value {
        if let Some(fields) = stored.as_object_mut() {
            // The other name that stored documents may have for it.
            fields.remove("value");
        }
        stored["secret"] = value.as_str().into();
    }
    if let Some(description) = &change.description {
        stored["description"] = description.as_str().into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(document: &mut SettingsDocument, body: &Value) {
        document.change(&SettingsChanges::read(body).expect("valid")).expect("changed");
    }

    #[test]
    fn what_is_absent_stays_and_null_clears() {
        let mut document = SettingsDocument::default();
        changed(&mut document, &json!({"llm_model": "m", "llm_api_key": " sk ", "language": "de", "unknown": 1}));
        changed(&mut document, &json!({"language": null, "llm_api_key": MASK}));
        let shown = document.shown_with_flags();
        assert_eq!((&shown["llm_model"], &shown["language"]), (&json!("m"), &Value::Null));
        assert_eq!((&shown["llm_api_key"], &shown["llm_api_key_set"]), (&json!(MASK), &json!(true)));
        assert_eq!(document.shown(true)["llm_api_key"], "sk");
        changed(&mut document, &json!({"llm_api_key": ""}));
        assert_eq!(document.shown_with_flags()["llm_api_key_set"], false);
        assert!(shown.get("unknown").is_none());
        assert_eq!(shown["enable_default_condenser"], true);
        assert_eq!(shown["sandbox_grouping_strategy"], "NO_GROUPING");
    }

    #[test]
    fn fields_of_later_clients_are_put_into_their_places() {
        let mut document = SettingsDocument::default();
        changed(
            &mut document,
            &json!({
                "agent_settings_diff": {"llm": {"model": "m", "api_key": "sk", "base_url": null, "temperature": 1},
                                        "condenser": {"enabled": false, "max_size": 100},
                                        "mcp_config": {"mcpServers": {"a": {"url": "http://a", "api_key": "k"},
                                            "b": {"command": "x", "env": {"T": "v"}},
                                            "c": {"url": "http://c", "transport": "sse"}}}},
                "conversation_settings_diff": {"confirmation_mode": true, "max_iterations": 5},
                "language": "en",
            }),
        );
        let shown = document.shown(false);
        assert_eq!((&shown["llm_model"], &shown["condenser_max_size"]), (&json!("m"), &json!(100)));
        assert_eq!((&shown["enable_default_condenser"], &shown["confirmation_mode"]), (&json!(false), &json!(true)));
        let servers = json!({
            "a": {"url": "http://a", "auth": {"strategy": "api_key", "value": MASK}},
            "b": {"command": "x", "env": {"T": MASK}},
            "c": {"transport": "sse", "url": "http://c"},
        });
        assert_eq!(
            shown["agent_settings"],
            json!({"agent_kind": "openhands", "llm": {"model": "m", "api_key": MASK}, "condenser": {"enabled": false, "max_size": 100},
                   "mcp_config": servers})
        );
        assert_eq!(document.shown_with_flags()["agent_settings"]["llm"], json!({"model": "m", "api_key": null}));
        let mut beside = servers;
        beside["sse_servers"] = json!([{"url": "http://c", "api_key": null}]);
        beside["stdio_servers"] = json!([{"name": "b", "command": "x", "args": [], "env": {"T": MASK}}]);
        beside["shttp_servers"] = json!([{"url": "http://a", "api_key": MASK, "timeout": null}]);
        assert_eq!(shown["mcp_config"], beside);
        // Sent back as shown, with a server more: the keys stay.
        let mut back = shown["mcp_config"].clone();
        back["sse_servers"].as_array_mut().expect("a list").push(json!("https://d"));
        changed(&mut document, &json!({"mcp_config": back}));
        let exposed = &document.shown(true)["mcp_config"];
        assert_eq!(exposed["shttp_servers"][0]["api_key"], "k");
        assert_eq!(exposed["stdio_servers"][0]["env"]["T"], "v");
        assert_eq!(exposed["sse_servers"][1]["url"], "https://d");
        // In one body only the first counts, as in the reference.
        let both = json!({"agent_settings_diff": {"mcp_config": {"a": null}}, "mcp_config": null});
        changed(&mut document, &both);
        let names: Vec<_> = document.mcp_servers().expect("servers").keys().cloned().collect();
        assert_eq!(names, ["b", "c", "sse"]);
    }

    #[test]
    fn tokens_are_merged_provider_by_provider() {
        let mut document = SettingsDocument::parse(
            r#"{"secrets_store": {"provider_tokens": {"gitlab": {"token": "t0"}}, "custom_secrets": {"A": {"secret": "s"}}}}"#,
        )
        .expect("a document");
        changed(&mut document, &json!({"provider_tokens": {"github": {"token": "t1", "host": "h"}}}));
        changed(&mut document, &json!({"provider_tokens": {"github": {"token": MASK, "host": "g"}}}));
        assert_eq!(document.shown_with_flags()["provider_tokens_set"], json!({"gitlab": null, "github": "g"}));
        changed(&mut document, &json!({"provider_tokens": {"gitlab": null, "azure_devops": {"token": ""}}}));
        let json = document.to_json().expect("small");
        assert!(json.contains(r#""token":"t1""#) && !json.contains("gitlab") && !json.contains("azure"), "{json}");
        assert_eq!(document.secrets().collect::<Vec<_>>(), [("A", None)]);
    }

    #[test]
    fn a_stored_host_shows_no_credentials() {
        let stored =
            r#"{"provider_tokens": {"github": {"token": "t", "host": "https://me:canary@git.example/api/v3"}}}"#;
        let document = SettingsDocument::parse(stored).expect("a document");
        assert_eq!(document.shown_with_flags()["provider_tokens_set"], json!({"github": "https://git.example/api/v3"}));
    }

    #[test]
    fn a_document_is_laid_over_another() {
        let parse = |json: &str| SettingsDocument::parse(json).expect("a document");
        let mut document = parse(
            r#"{"llm_model": "a", "language": "de", "custom_secrets": {"A": {"secret": "1"}, "B": {"secret": "2"}}}"#,
        );
        document.lay_over(&parse(
            r#"{"llm_model": "b", "provider_tokens": null,
                "secrets_store": {"custom_secrets": {"B": {"secret": "3"}}, "provider_tokens": {"github": {"token": "t"}}}}"#,
        ));
        let json: Value = serde_json::from_str(&document.to_json().expect("small")).expect("JSON");
        assert_eq!((&json["llm_model"], &json["language"]), (&json!("b"), &json!("de")));
        assert_eq!(json["custom_secrets"], json!({"A": {"secret": "1"}, "B": {"secret": "3"}}));
        assert_eq!(json["provider_tokens"], json!({"github": {"token": "t"}}));
    }

    #[test]
    fn violations_name_the_place_and_no_secret() {
        for (body, kind, place) in [
            (json!([]), "model_attributes_type", json!(["body"])),
            (json!({"llm_api_key": ["sk-canary"]}), "string_type", json!(["body", "llm_api_key"])),
            (json!({"llm_api_key": "sk-canary".repeat(10_000)}), "too_long", json!(["body", "llm_api_key"])),
            (json!({"condenser_max_size": 19}), "greater_than_equal", json!(["body", "condenser_max_size"])),
            (json!({"sandbox_grouping_strategy": "x"}), "enum", json!(["body", "sandbox_grouping_strategy"])),
            (
                json!({"agent_settings_diff": {"llm": {"model": 1}}}),
                "string_type",
                json!(["body", "agent_settings_diff", "llm", "model"]),
            ),
            (
                json!({"provider_tokens": {"nowhere": {"token": "sk-canary"}}}),
                "enum",
                json!(["body", "provider_tokens", "nowhere"]),
            ),
            (
                json!({"provider_tokens": {"github": "sk-canary"}}),
                "dict_type",
                json!(["body", "provider_tokens", "github"]),
            ),
            (json!({"mcp_config": {"other": ["sk-canary"]}}), "dict_type", json!(["body", "mcp_config", "other"])),
            (
                json!({"agent_settings_diff": {"mcp_config": {"other": {"url": "http://x", "secret": "sk-canary"}}}}),
                "extra_forbidden",
                json!(["body", "agent_settings_diff", "mcp_config", "other", "secret"]),
            ),
            (
                json!({"mcp_config": {"sse_servers": ["ftp://x"]}}),
                "value_error",
                json!(["body", "mcp_config", "sse_servers", 0, "url"]),
            ),
            (
                json!({"mcp_config": {"stdio_servers": [{"name": "a b", "command": "c"}]}}),
                "value_error",
                json!(["body", "mcp_config", "stdio_servers", 0, "name"]),
            ),
        ] {
            let violations = SettingsChanges::read(&body).expect_err("not valid");
            let shown = serde_json::to_value(&violations).expect("JSON");
            assert_eq!((&shown[0]["type"], &shown[0]["loc"]), (&json!(kind), &place), "{shown}");
            assert!(!shown.to_string().contains("canary"), "{shown}");
        }
        let violations =
            SecretChange::read(&json!({"value": "canary", "description": 1}), None).expect_err("not valid");
        let shown = serde_json::to_string(&violations).expect("JSON");
        assert!(shown.contains("missing") && !shown.contains("canary"), "{shown}");
    }

    #[test]
    fn secrets_are_made_renamed_and_deleted() {
        let mut document = SettingsDocument::default();
        let made = |body: Value| SecretChange::read(&body, None).expect("valid");
        assert!(document.put_secret(&made(json!({"name": "A", "value": "1", "description": "d"}))).expect("new"));
        assert!(!document.put_secret(&made(json!({"name": "A", "value": "2"}))).expect("not new"));
        assert!(document.put_secret(&made(json!({"name": "B", "value": "3"}))).expect("new"));
        let rename = SecretChange::read(&json!({"name": "B"}), Some("A")).expect("valid");
        assert!(matches!(document.change_secret("A", &rename), Err(Error::Conflict(_))));
        let rename = SecretChange::read(&json!({"name": "C", "value": MASK}), Some("A")).expect("valid");
        document.change_secret("A", &rename).expect("renamed");
        assert!(matches!(document.change_secret("A", &rename), Err(Error::NotFound(_))));
        document.delete_secret("B").expect("deleted");
        assert!(matches!(document.delete_secret("B"), Err(Error::NotFound(_))));
        assert_eq!(document.secrets().collect::<Vec<_>>(), [("C", Some("d"))]);
        assert!(document.to_json().expect("small").contains(r#""secret":"2""#));
        for index in 0..49 {
            document.put_secret(&made(json!({"name": format!("N{index}"), "value": ""}))).expect("room");
        }
        let one_more = document.put_secret(&made(json!({"name": "N49", "value": ""})));
        assert!(matches!(one_more, Err(Error::Refused(_))));
    }
}
