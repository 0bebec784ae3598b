//! MCP servers as agent servers get them.

use std::fmt;

use secrecy::SecretString;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::server::{auth_headers, auth_of, entries_of, secret_places, whole_seconds};
use super::{Servers, stored};

/// The shortest part of a URL's query that counts as a secret, in bytes.
const LEAST_URL_SECRET: usize = 8;

/// The MCP servers of a user's settings, as starts use them.
#[derive(Clone, Default)]
pub struct McpServers {
    servers: Servers,
    secrets: Vec<SecretString>,
}

/// Names alone: everything else may hold secrets.
impl fmt::Debug for McpServers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.servers.keys()).finish()
    }
}

impl<'de> Deserialize<'de> for McpServers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(|value| Self::new(stored(&value)))
    }
}

impl McpServers {
    pub(super) fn new(servers: Servers) -> Self {
        let mut secrets = Vec::new();
        for server in servers.values().filter_map(Value::as_object) {
            let places = secret_places(server);
            secrets.extend(places.iter().filter_map(|(_, value)| value.as_str()).map(SecretString::from));
            secrets.extend(auth_of(server).and_then(auth_headers).into_iter().flatten().map(|(_, value)| value.into()));
            secrets
                .extend(server.get("url").and_then(Value::as_str).into_iter().flat_map(secrets_in_url).map(Into::into));
        }
        Self { servers, secrets }
    }

    /// Every secret value: variables, headers, credentials, and what URLs hold in their queries and user information.
    pub fn secrets(&self) -> impl Iterator<Item = &SecretString> {
        self.secrets.iter()
    }

    /// The names of all servers, those that are switched off included.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.servers.keys().map(String::as_str)
    }

    /// The servers that are switched on, in the one form that agent servers from 1.15 to 1.58 accept: flat, with headers instead
    /// of `auth`, without nulls, and with whole seconds as the timeout. A server that needs an OAuth token and has none is left
    /// out: no header can stand for it, and agent servers of 1.15 end a conversation whose server refuses them.
    #[must_use]
    pub fn for_agent(&self) -> Map<String, Value> {
        let described = |(name, server): (&String, &Value)| Some((name.clone(), described(server.as_object()?)?));
        self.servers.iter().filter_map(described).collect()
    }
}

fn described(server: &Map<String, Value>) -> Option<Value> {
    if server.get("enabled") == Some(&Value::Bool(false)) {
        return None;
    }
    let texts = |name: &str| -> Map<String, Value> {
        let texts = entries_of(server, name).filter(|(_, value)| value.is_string());
        texts.map(|(name, value)| (name.clone(), value.clone())).collect()
    };
    let timeout = server.get("timeout").and_then(Value::as_f64).map(|seconds| Value::from(whole_seconds(seconds)));
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

/// What of a URL is secret in all likelihood: the password, and values of the query, both as written and decoded.
fn secrets_in_url(url: &str) -> Vec<String> {
    let Ok(url) = reqwest::Url::parse(url) else { return Vec::new() };
    let written =
        url.query().unwrap_or_default().split('&').filter_map(|pair| Some(pair.split_once('=')?.1.to_owned()));
    let decoded = url.query_pairs().map(|(_, value)| value.into_owned());
    let password = url.password().map(ToOwned::to_owned);
    let mut found: Vec<String> =
        written.chain(decoded).filter(|value| value.len() >= LEAST_URL_SECRET).chain(password).collect();
    found.sort();
    found.dedup();
    found
}
