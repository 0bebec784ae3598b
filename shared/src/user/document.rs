//! Settings as a document: what clients may change in it, what they see of it, and which of its parts never show.
//!
//! The document is the contract's flat settings object. Clients of later versions nest the same fields in `agent_settings_diff`
//! and `conversation_settings_diff`; they are put into their places.

use serde_json::{Map, Value, json};

use super::settings::SandboxGroupingStrategy;
use crate::error::{Error, Result};
use crate::http::secret::{self, MASK, MAX_SECRETS};
use crate::http::validation::{self, Checked, Checker, Fields, Loc};
use crate::start::request::ProviderType;

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
    Integer { least: i64 },
    Float,
    Flag,
    Texts,
    Mcp,
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
    Field { name: "secrets_store", kind: Kind::Mcp, default: || json!({"provider_tokens": {}}) },
    on("enable_default_condenser"),
    off("enable_sound_notifications"),
    on("enable_proactive_conversation_starters"),
    on("enable_solvability_analysis"),
    field("user_consents_to_analytics", Kind::Flag),
    field("sandbox_base_container_image", Kind::Text),
    field("sandbox_runtime_container_image", Kind::Text),
    field("mcp_config", Kind::Mcp),
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

const GROUPING: &str = "sandbox_grouping_strategy";
const STORE: &str = "secrets_store";
const TOKENS: &str = "provider_tokens";
const SECRETS: &str = "custom_secrets";

/// Where clients of later versions put fields: the path in the body, and the flat name.
const NESTED: [(&[&str], &str); 10] = [
    (&["agent_settings_diff", "llm", "model"], "llm_model"),
    (&["agent_settings_diff", "llm", "api_key"], "llm_api_key"),
    (&["agent_settings_diff", "llm", "base_url"], "llm_base_url"),
    (&["agent_settings_diff", "agent"], "agent"),
    (&["agent_settings_diff", "mcp_config"], "mcp_config"),
    (&["agent_settings_diff", "condenser", "enabled"], "enable_default_condenser"),
    (&["agent_settings_diff", "condenser", "max_size"], "condenser_max_size"),
    (&["conversation_settings_diff", "confirmation_mode"], "confirmation_mode"),
    (&["conversation_settings_diff", "security_analyzer"], "security_analyzer"),
    (&["conversation_settings_diff", "max_iterations"], "max_iterations"),
];

/// The changes of one request, checked: field by field, `null` where one is cleared.
#[derive(Debug)]
pub struct SettingsChanges {
    fields: Map<String, Value>,
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
        for field in FIELDS.iter().filter(|field| field.name != STORE) {
            let nested = NESTED.iter().filter(|(_, name)| *name == field.name).map(|(path, _)| *path);
            for path in nested.chain([&[field.name][..]]) {
                let Some(value) = path.iter().try_fold(body, |value, step| value.get(step)) else { continue };
                if let Some(read) = at(check, path, |check| read_field(check, field.kind, value)) {
                    fields.insert(field.name.to_owned(), read);
                }
            }
        }
        let tokens = match body.get(TOKENS) {
            None => None,
            Some(Value::Null) => Some(Map::new()),
            Some(value) => check.within(TOKENS, |check| read_tokens(check, value)),
        };
        Some(Self { fields, tokens })
    }
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
        Kind::Mcp => read_mcp(check, value),
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
            if validation::choice::<ProviderType>(check, &name).is_none() || token.is_null() {
                return;
            }
            let Value::Object(given) = token else {
                check.report("dict_type", "Input should be a valid dictionary", MASK.into(), None);
                return;
            };
            let mut read = Map::new();
            for (key, value) in given.iter().filter(|(_, value)| !value.is_null()) {
                let text = match key.as_str() {
                    "token" => check.within("token", |check| read_key(check, value)),
                    "host" => check.within("host", |check| validation::string_up_to(MAX_TEXT, check, value)),
                    "user_id" => check.within("user_id", |check| validation::string_up_to(MAX_TEXT, check, value)),
                    _ => None,
                };
                if let Some(text) = text {
                    read.insert(key.clone(), text.into());
                }
            }
            tokens.insert(name.as_str().unwrap_or_default().to_owned(), Value::Object(read));
        });
        if token.is_null() {
            tokens.insert(name.clone(), Value::Null);
        }
    }
    Some(tokens)
}

/// MCP servers in the contract's three lists, or by name under `mcpServers` as the field's clients write them.
fn read_mcp(check: &mut Checker, value: &Value) -> Option<Value> {
    const LISTS: [&str; 3] = ["sse_servers", "stdio_servers", "shttp_servers"];
    let Value::Object(given) = value else {
        check.report("dict_type", "Input should be a valid dictionary", MASK.into(), None);
        return None;
    };
    if let Some(servers) = given.get("mcpServers") {
        return check.within("mcpServers", |check| read_mcp_servers(check, servers));
    }
    let mut lists = Map::new();
    for (name, servers) in given {
        check.within(name.clone(), |check| {
            if !LISTS.contains(&name.as_str()) {
                check.report("extra_forbidden", "Extra inputs are not permitted", MASK.into(), None);
                return;
            }
            let Value::Array(servers) = servers else {
                check.report("list_type", "Input should be a valid list", MASK.into(), None);
                return;
            };
            if servers.len() > MAX_LIST {
                secret::report_too_long(check, "List", MAX_LIST, servers.len());
                return;
            }
            let read: Vec<Value> = servers
                .iter()
                .enumerate()
                .filter_map(|(index, server)| check.within(index, |check| read_mcp_server(check, name, server)))
                .collect();
            lists.insert(name.clone(), read.into());
        });
    }
    for name in LISTS {
        lists.entry(name).or_insert_with(|| json!([]));
    }
    Some(Value::Object(lists))
}

fn read_mcp_server(check: &mut Checker, list: &str, server: &Value) -> Option<Value> {
    if list == "stdio_servers" {
        return read_mcp_process(check, server);
    }
    let server = match server {
        Value::String(url) => &json!({"url": url}),
        other => other,
    };
    let harmless = without(server, "api_key");
    let fields = Fields::of(check, &harmless)?;
    let url = fields.required(check, "url", read_mcp_url);
    let key = Fields::of(check, server)?.nullable(check, "api_key", read_key);
    let (url, key) = (url?, key?);
    if list == "sse_servers" {
        return Some(json!({"url": url, "api_key": key}));
    }
    let timeout = fields.nullable(check, "timeout", |check, value| {
        let seconds = validation::integer(check, value)?;
        if !(1..=3600).contains(&seconds) {
            check.report_value_error("Timeout must be between 1 and 3600 seconds", value.clone());
            return None;
        }
        Some(seconds)
    })?;
    Some(json!({"url": url, "api_key": key, "timeout": timeout.unwrap_or(60)}))
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

fn read_mcp_url(check: &mut Checker, value: &Value) -> Option<String> {
    let url = validation::string_up_to(MAX_TEXT, check, value)?;
    let parts = url.trim().split_once("://");
    if !parts.is_some_and(|(scheme, rest)| matches!(scheme, "http" | "https" | "ws" | "wss") && !rest.is_empty()) {
        check.report_value_error("URL must begin with http, https, ws or wss and name a host", value.clone());
        return None;
    }
    Some(url.trim().to_owned())
}

fn read_mcp_process(check: &mut Checker, server: &Value) -> Option<Value> {
    let harmless = without(server, "env");
    let fields = Fields::of(check, &harmless)?;
    let name = fields.required(check, "name", |check, value| {
        let name = validation::string_up_to(secret::MAX_NAME, check, value)?;
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
        if name.is_empty() || !name.bytes().all(plain) {
            check
                .report_value_error("Server names are made of letters, digits, hyphens and underscores", value.clone());
            return None;
        }
        Some(name)
    });
    let command = fields.required(check, "command", |check, value| {
        let command = validation::string_up_to(MAX_TEXT, check, value)?;
        if command.is_empty() || command.contains(char::is_whitespace) {
            check.report_value_error("A command is a single word; its arguments belong into args", value.clone());
            return None;
        }
        Some(command)
    });
    let args = fields.or(check, "args", Vec::new(), |check, value| {
        validation::list(check, value, |check, arg| validation::string_up_to(MAX_TEXT, check, arg))
    });
    let env = Fields::of(check, server)?.or(check, "env", Map::new(), |check, value| {
        let Value::Object(variables) = value else {
            check.report("dict_type", "Input should be a valid dictionary", MASK.into(), None);
            return None;
        };
        let read = variables.iter().filter_map(|(name, value)| {
            let value = check.within(name.clone(), |check| read_key(check, value))?;
            Some((name.clone(), value.into()))
        });
        Some(read.collect())
    });
    Some(json!({"name": name?, "command": command?, "args": args?, "env": env?}))
}

/// Servers by name: with a `url` over streamable HTTP, or over server-sent events where `transport` says so; else processes.
fn read_mcp_servers(check: &mut Checker, servers: &Value) -> Option<Value> {
    let Value::Object(servers) = servers else {
        check.report("dict_type", "Input should be a valid dictionary", MASK.into(), None);
        return None;
    };
    let mut lists = json!({"sse_servers": [], "stdio_servers": [], "shttp_servers": []});
    for (name, server) in servers {
        check.within(name.clone(), |check| {
            let mut server = server.clone();
            let list = match (server.get("url"), server.get("transport").and_then(Value::as_str)) {
                (Some(_), Some("sse")) => "sse_servers",
                (Some(_), _) => "shttp_servers",
                (None, _) => "stdio_servers",
            };
            if let Some(fields) = server.as_object_mut() {
                fields.insert("name".to_owned(), name.as_str().into());
            }
            if let Some(read) = read_mcp_server(check, list, &server)
                && let Some(list) = lists[list].as_array_mut()
            {
                list.push(read);
            }
        });
    }
    Some(lists)
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
                fields.nullable(check, "name", read_name).map(|given| given.unwrap_or_else(|| name.to_owned()))
            }
            None => fields.required(check, "name", read_name),
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
            Some(value) => secret::value(check, value).map(|text| Some(text.to_owned())),
        });
        let description =
            fields.nullable(check, "description", |check, value| validation::string_up_to(MAX_TEXT, check, value));
        Some(Self { name: name?, value: value?, description: description? })
    }
}

/// Names become variables in sandboxes.
fn read_name(check: &mut Checker, value: &Value) -> Option<String> {
    let name = validation::string_up_to(secret::MAX_NAME, check, value)?;
    if name.trim().is_empty() || name.contains(|c: char| c.is_control() || matches!(c, '=' | '/')) {
        check.report_value_error(
            "A secret's name must not be blank and has no control characters, = or /",
            value.clone(),
        );
        return None;
    }
    Some(name)
}

/// A user's settings, tokens and secrets.
#[derive(Clone, Debug, Default)]
pub struct SettingsDocument(Map<String, Value>);

impl SettingsDocument {
    /// Of the stored text. Tokens and secrets may stand at the top or under `secrets_store`; here they stand at the top.
    ///
    /// # Errors
    /// When it is no JSON object.
    pub fn parse(json: &str) -> Result<Self, serde_json::Error> {
        let mut document: Map<String, Value> = serde_json::from_str(json)?;
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
    pub fn change(&mut self, changes: &SettingsChanges) {
        for (name, value) in &changes.fields {
            let field = FIELDS.iter().find(|field| field.name == name);
            let mut value = value.clone();
            match field.map(|field| field.kind) {
                Some(Kind::Secret) if value == MASK => continue,
                Some(Kind::Secret) if value == "" => value = Value::Null,
                Some(Kind::Mcp) => unmask_mcp(&mut value, self.0.get(name)),
                _ => {}
            }
            if value.is_null() {
                self.0.remove(name);
            } else {
                self.0.insert(name.clone(), value);
            }
        }
        let Some(changes) = &changes.tokens else { return };
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
                if value != MASK {
                    stored[key] = value.clone();
                }
            }
            // A provider without a token is none.
            if stored.get("token").and_then(Value::as_str).is_none_or(str::is_empty) {
                tokens.remove(provider);
            }
        }
    }

    /// The fields as answers show them, in the contract's order; secrets in clear only with `expose`.
    #[must_use]
    pub fn shown(&self, expose: bool) -> Map<String, Value> {
        let mut shown = Map::new();
        for field in &FIELDS {
            let stored = if field.name == STORE { None } else { self.0.get(field.name) };
            let mut value = stored.filter(|value| !value.is_null()).cloned().unwrap_or_else(field.default);
            match field.kind {
                Kind::Secret if value.as_str().is_none_or(|text| text.trim().is_empty()) => value = Value::Null,
                Kind::Secret if !expose => value = MASK.into(),
                Kind::Mcp if !expose => mask_mcp(&mut value),
                _ => {}
            }
            shown.insert(field.name.to_owned(), value);
        }
        shown
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
            .map(|(provider, token)| (provider.clone(), token["host"].clone()))
            .collect();
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

/// Visits what MCP servers keep secret: with the list, the server's own name in it, and the secret's.
fn each_mcp_secret(config: &mut Value, mut visit: impl FnMut([&str; 3], &mut Value)) {
    let Value::Object(lists) = config else { return };
    for (list, servers) in lists {
        for server in servers.as_array_mut().into_iter().flatten() {
            let own =
                server.get("url").or_else(|| server.get("name")).and_then(Value::as_str).unwrap_or_default().to_owned();
            if let Some(key) = server.get_mut("api_key").filter(|key| key.is_string()) {
                visit([list, &own, ""], key);
            }
            for (name, value) in server.get_mut("env").and_then(Value::as_object_mut).into_iter().flatten() {
                visit([list, &own, name], value);
            }
        }
    }
}

fn mask_mcp(config: &mut Value) {
    each_mcp_secret(config, |_, secret| *secret = MASK.into());
}

/// Puts the secrets of the stored configuration where the new one has a mask.
fn unmask_mcp(config: &mut Value, stored: Option<&Value>) {
    let mut known = std::collections::HashMap::new();
    if let Some(stored) = stored {
        each_mcp_secret(&mut stored.clone(), |place, secret| {
            known.insert(place.map(ToOwned::to_owned), secret.clone());
        });
    }
    each_mcp_secret(config, |place, secret| {
        if secret == MASK {
            *secret = known.get(&place.map(ToOwned::to_owned)).cloned().unwrap_or(Value::Null);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changed(document: &mut SettingsDocument, body: &Value) {
        document.change(&SettingsChanges::read(body).expect("valid"));
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
        assert_eq!(
            shown["mcp_config"],
            json!({"sse_servers": [{"url": "http://c", "api_key": null}],
                   "stdio_servers": [{"name": "b", "command": "x", "args": [], "env": {"T": MASK}}],
                   "shttp_servers": [{"url": "http://a", "api_key": MASK, "timeout": 60}]})
        );
        // Sent back as shown, with a server more: the keys stay.
        let mut back = shown["mcp_config"].clone();
        back["sse_servers"].as_array_mut().expect("a list").push(json!("https://d"));
        changed(&mut document, &json!({"mcp_config": back}));
        let exposed = &document.shown(true)["mcp_config"];
        assert_eq!(exposed["shttp_servers"][0]["api_key"], "k");
        assert_eq!(exposed["stdio_servers"][0]["env"]["T"], "v");
        assert_eq!(exposed["sse_servers"][1]["url"], "https://d");
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
            (
                json!({"mcp_config": {"other": ["sk-canary"]}}),
                "extra_forbidden",
                json!(["body", "mcp_config", "other"]),
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
