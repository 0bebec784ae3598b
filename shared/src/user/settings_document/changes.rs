//! Reads the changes of `POST /api/v1/settings`.

use serde_json::{Map, Value, json};

use super::fields::{FIELDS, Kind, MCP_PATHS, NULL_KEEPS};
use super::nested::{AGENT, AGENT_KIND, AGENT_SETTINGS, CONVERSATION, CONVERSATION_SETTINGS};
use super::{MAX_TEXT, SettingsDocument, TOKENS};
use crate::error::{Error, Result};
use crate::http::pydantic::body::FromJson;
use crate::http::pydantic::validation::{self, Checked, Checker, Loc};
use crate::http::secret::{self, MASK};
use crate::user::declared::{self, Secrets};
use crate::user::git;
use crate::user::git::ProviderType;
use crate::user::mcp::McpChange;
use crate::user::settings::SandboxGroupingStrategy;

/// The most entries of a list.
const MAX_LIST: usize = 1_000;

/// The fields of a marketplace.
const MARKETPLACE: &[declared::Field] = &[
    declared::Field::optional("name", declared::Kind::Text),
    declared::Field::optional("source", declared::Kind::Text),
    declared::Field::optional("ref", declared::Kind::Text),
    declared::Field::optional("repo_path", declared::Kind::Text),
    declared::Field::with("auto_load", declared::Kind::Flag, declared::Preset::Flag(false)),
    declared::Field::with("scope", declared::Kind::Text, declared::Preset::Text("personal")),
];

/// The type of a violation for a key in place of which later versions accept a merge patch.
pub const LEGACY_KEY: &str = "legacy_key";
const USE_DIFFS: &str = "Use *_diff nested settings payloads instead of legacy keys";

/// The merge patches of nested settings.
const AGENT_DIFF: &str = "agent_settings_diff";
const CONVERSATION_DIFF: &str = "conversation_settings_diff";

/// The checked changes of one request. A field with the value `null` is cleared.
#[derive(Debug)]
pub struct SettingsChanges {
    pub(super) fields: Map<String, Value>,
    /// The merge patch of `agent_settings`, without MCP servers.
    pub(super) agent: Option<Map<String, Value>>,
    pub(super) conversation: Option<Map<String, Value>>,
    /// Whole nested objects, which are accepted only if they change nothing.
    legacy: Vec<(&'static str, Value)>,
    /// The path in the body, and the change there.
    pub(super) mcp: Option<(&'static [&'static str], McpChange)>,
    pub(super) tokens: Option<Map<String, Value>>,
}

impl SettingsChanges {
    /// Reads a body. An absent field stays unchanged, `null` or a blank secret clears it, and [`MASK`] leaves a secret unchanged. Unknown
    /// fields are ignored.
    ///
    /// # Errors
    /// Every violation; none contains a secret.
    pub fn read(body: &Value) -> Checked<Self> {
        let mut check = Checker::new("body");
        let read = Self::from_json(&mut check, body);
        check.finish(read)
    }
}

impl FromJson for SettingsChanges {
    fn from_json(check: &mut Checker, body: &Value) -> Option<Self> {
        if !body.is_object() {
            check.report("dict_type", "Input should be a valid dictionary", MASK.into(), None);
            return None;
        }
        let mut fields = Map::new();
        for field in FIELDS.iter().filter(|field| !matches!(field.kind, Kind::Fixed | Kind::Mcp)) {
            let Some(value) = body.get(field.name) else { continue };
            if value.is_null() && NULL_KEEPS.contains(&field.name) {
                continue;
            }
            if let Some(read) = check.within(field.name, |check| read_field(check, field.kind, value)) {
                fields.insert(field.name.to_owned(), read);
            }
        }
        let agent = check.within(AGENT_DIFF, |check| read_agent_diff(check, body.get(AGENT_DIFF)));
        let conversation = check.within(CONVERSATION_DIFF, |check| match body.get(CONVERSATION_DIFF) {
            None => Some(Value::Null),
            Some(patch) => declared::read_object(check, CONVERSATION, patch),
        });
        let legacy = [AGENT_SETTINGS, CONVERSATION_SETTINGS];
        let legacy = legacy.into_iter().filter_map(|key| Some((key, body.get(key)?.clone()))).collect();
        let mcp = MCP_PATHS.into_iter().find_map(|path| Some((path, value_at(body, path)?)));
        let mcp = match mcp {
            Some((path, value)) => at(check, path, |check| McpChange::read(check, value)).map(|change| (path, change)),
            None => None,
        };
        let tokens = match body.get(TOKENS) {
            None => None,
            Some(Value::Null) => Some(Map::new()),
            Some(value) => check.within(TOKENS, |check| read_tokens(check, value)),
        };
        let object = |patch: Value| match patch {
            Value::Object(patch) => Some(patch),
            _ => None,
        };
        Some(Self { fields, agent: object(agent?), conversation: object(conversation?), legacy, mcp, tokens })
    }
}

/// Reads the merge patch of `agent_settings`. MCP servers are read elsewhere.
fn read_agent_diff(check: &mut Checker, patch: Option<&Value>) -> Option<Value> {
    let patch = patch.unwrap_or(&Value::Null);
    if let Some(kind) = patch.get("agent_kind").filter(|kind| !kind.is_null() && **kind != AGENT_KIND) {
        let kind = if kind.is_string() { kind.clone() } else { MASK.into() };
        check.within("agent_kind", |check| {
            check.report_value_error("this server starts agents of the kind openhands only", kind);
        });
        return None;
    }
    declared::read_object(check, AGENT, patch)
}

impl SettingsDocument {
    /// Refuses whole nested objects, as later versions do. Forms of older clients send back everything that they have read: an object is
    /// accepted if it is what responses show.
    pub(super) fn check_legacy(&self, changes: &SettingsChanges) -> Result<()> {
        let mut check = Checker::new("body");
        for (key, given) in &changes.legacy {
            let is_shown = |secrets| match *key {
                AGENT_SETTINGS => json!(self.show_agent_settings(secrets)) == *given,
                _ => json!(self.show_conversation_settings()) == *given,
            };
            if ![Secrets::Hidden, Secrets::Masked].into_iter().any(is_shown) {
                check.within(*key, |check| check.report(LEGACY_KEY, USE_DIFFS, MASK.into(), None));
            }
        }
        check.finish(Some(())).map_err(Error::Invalid)
    }
}

fn value_at<'v>(body: &'v Value, path: &[&str]) -> Option<&'v Value> {
    path.iter().try_fold(body, |value, step| value.get(step))
}

/// Reads a value at a path.
pub(super) fn at<T>(check: &mut Checker, path: &[&'static str], read: impl FnOnce(&mut Checker) -> T) -> T {
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
        Kind::Marketplaces => read_marketplaces(check, value),
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

/// Reads the marketplaces that a user has registered.
fn read_marketplaces(check: &mut Checker, value: &Value) -> Option<Value> {
    let read = validation::list(check, value, |check, marketplace| {
        let Value::Object(given) = marketplace else {
            check.report("dict_type", "Input should be a valid dictionary", marketplace.clone(), None);
            return None;
        };
        let read = declared::read(check, MARKETPLACE, given);
        let fields = validation::Fields::of(check, marketplace)?;
        let name = fields.required(check, "name", |check, value| {
            let name = validation::string_up_to(MAX_TEXT, check, value)?;
            let is_valid = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
                && name.bytes().next().is_some_and(|first| first.is_ascii_alphabetic());
            if !is_valid {
                let text = "name must start with a letter and contain only letters, numbers, hyphens, and underscores";
                check.report_value_error(text, value.clone());
            }
            is_valid.then_some(name)
        });
        let source = fields.required(check, "source", |check, value| {
            let source = validation::string_up_to(MAX_TEXT, check, value)?;
            let is_valid = !source.trim().is_empty() && !source.contains(char::is_whitespace);
            if !is_valid {
                check.report_value_error("source must be github:owner/repository, a git URL or a path", value.clone());
            }
            is_valid.then_some(source)
        });
        let read = read.zip(name.and(source))?.0;
        Some(Value::Object(declared::shown(MARKETPLACE, &read, Secrets::Masked)))
    })?;
    if read.len() > MAX_LIST {
        secret::report_too_long(check, "List", MAX_LIST, read.len());
        return None;
    }
    Some(read.into())
}

/// Reads a key or token, without the blanks around it.
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

/// Reads a token of a git provider; `None` for one that leaves the stored token unchanged: a blank, a mask or null.
pub(super) fn read_token(check: &mut Checker, value: &Value) -> Option<Value> {
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

/// Reads the host of a git provider; null for the provider's own.
pub(super) fn read_host(check: &mut Checker, provider: ProviderType, value: &Value) -> Option<Value> {
    if value.is_null() {
        return Some(Value::Null);
    }
    // Users paste hosts that contain credentials.
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
