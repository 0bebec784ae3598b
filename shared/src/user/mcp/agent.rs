//! MCP servers in the form that agent servers receive.

use std::fmt;

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::server::{auth_headers, auth_of, entries_of};
use super::{Servers, stored};

/// The MCP servers of a user's settings, as starts use them.
#[derive(Clone, Default)]
pub struct McpServers(Servers);

/// Shows only names, because everything else may contain secrets.
impl fmt::Debug for McpServers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl<'de> Deserialize<'de> for McpServers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(|value| Self::new(stored(&value)))
    }
}

impl McpServers {
    pub(super) fn new(servers: Servers) -> Self {
        Self(servers)
    }

    /// The names of all servers, including disabled ones.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// Keeps the servers whose names are chosen.
    pub fn retain(&mut self, is_chosen: impl Fn(&str) -> bool) {
        self.0.retain(|name, _| is_chosen(name));
    }

    /// The enabled servers, in the one form that agent servers from 1.15 to 1.58 accept: flat, with headers instead
    /// of `auth`, without nulls, and with the timeout in whole milliseconds. A server that needs an OAuth token and has none is left
    /// out: it has no header to send, and agent servers of 1.15 end a conversation whose MCP server rejects them.
    #[must_use]
    pub fn for_agent(&self) -> Map<String, Value> {
        let described = |(name, server): (&String, &Value)| Some((name.clone(), described(server.as_object()?)?));
        self.0.iter().filter_map(described).collect()
    }

    /// The names of the enabled servers that need an OAuth token and have none, which [`Self::for_agent`] leaves out.
    pub fn without_token(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter(|(_, server)| server.as_object().is_some_and(lacks_token)).map(|(name, _)| name.as_str())
    }
}

/// The unit in which the MCP client of agent servers reads `timeout`, where it reads it at all: those of 1.15 and 1.58 ignore it, that
/// of 1.49 gives a server with `timeout: 30` 30 ms to respond.
fn milliseconds(seconds: f64) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is clamped to the type's range")]
    let whole = (seconds * 1000.0).ceil().clamp(1.0, f64::from(u32::MAX)) as u32;
    whole
}

fn lacks_token(server: &Map<String, Value>) -> bool {
    let auth = auth_of(server).filter(|auth| auth.get("strategy").and_then(Value::as_str) == Some("oauth2"));
    is_enabled(server) && auth.is_some_and(|auth| auth_headers(auth).is_none())
}

fn is_enabled(server: &Map<String, Value>) -> bool {
    server.get("enabled") != Some(&Value::Bool(false))
}

fn described(server: &Map<String, Value>) -> Option<Value> {
    if !is_enabled(server) {
        return None;
    }
    let texts = |name: &str| -> Map<String, Value> {
        let texts = entries_of(server, name).filter(|(_, value)| value.is_string());
        texts.map(|(name, value)| (name.clone(), value.clone())).collect()
    };
    let timeout = server.get("timeout").and_then(Value::as_f64).map(|seconds| Value::from(milliseconds(seconds)));
    let (fields, entries) = match (server.get("url"), server.get("command")) {
        (Some(Value::String(_)), None) => {
            let mut headers = texts("headers");
            if let Some(auth) = auth_of(server) {
                for (name, value) in auth_headers(auth)? {
                    headers.retain(|other, _| !other.eq_ignore_ascii_case(&name));
                    headers.insert(name, value.into());
                }
            }
            (&["url", "transport", "sse_read_timeout", "keep_alive"][..], ("headers", headers))
        }
        (None, Some(Value::String(_))) => (&["command", "args", "cwd"][..], ("env", texts("env"))),
        _ => return None,
    };
    let known = fields.iter().filter_map(|name| Some(((*name).to_owned(), server.get(*name)?.clone())));
    let mut described: Map<String, Value> = known.filter(|(_, value)| !value.is_null()).collect();
    if let (name, entries) = entries
        && !entries.is_empty()
    {
        described.insert(name.to_owned(), entries.into());
    }
    if let Some(timeout) = timeout {
        described.insert("timeout".to_owned(), timeout);
    }
    Some(Value::Object(described))
}
