//! Reads the changes of `POST /api/v1/settings`.

use serde_json::{Map, Value, json};

use super::fields::{FIELDS, Kind, MCP_PATHS, NESTED};
use super::{MAX_TEXT, TOKENS};
use crate::http::pydantic::body::FromJson;
use crate::http::pydantic::validation::{self, Checked, Checker, Fields, Loc};
use crate::http::secret::{self, MASK};
use crate::user::git;
use crate::user::git::ProviderType;
use crate::user::mcp::McpChange;
use crate::user::settings::SandboxGroupingStrategy;

/// The most entries of a list.
const MAX_LIST: usize = 1_000;

/// The checked changes of one request. A field with the value `null` is cleared.
#[derive(Debug)]
pub struct SettingsChanges {
    pub(super) fields: Map<String, Value>,
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
        Some(Self { fields, mcp, tokens })
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

/// Reads the host of a git provider; null for the provider's own.
fn read_host(check: &mut Checker, provider: ProviderType, value: &Value) -> Option<Value> {
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
