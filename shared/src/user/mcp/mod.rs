//! MCP servers in a user's settings: the forms that clients send, that are stored, that responses show, and that agent servers receive.
//!
//! Servers are stored by name, each as an object with the fields of the SDK's `MCPServer`. Clients send a merge patch of that map
//! (RFC 7396), the same map inside `mcpServers`, or the three lists of older clients; see [`McpChange`]. A secret of a server
//! is valid only for the endpoint for which it was sent: after a change of the endpoint the client must send the secrets again, so that a
//! stored secret never reaches another host or program.

mod agent;
mod change;
mod read;
mod server;
mod show;
#[cfg(test)]
mod tests;
mod words;

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::http::pydantic::validation::{Checked, Checker};
use crate::http::secret;

pub use agent::McpServers;
use change::{patched, replaced};
use read::{read_list, read_servers, report_no_dictionary, report_unknown, without_input};
pub use show::{shown, shown_with_lists};

/// Servers by name, as they are stored. Holds secrets in clear text.
pub type Servers = Map<String, Value>;

/// The most servers of a user.
const MAX_SERVERS: usize = 100;

const SSE: &str = "sse_servers";
const STDIO: &str = "stdio_servers";
const HTTP: &str = "shttp_servers";
/// The lists of older clients.
const LISTS: [&str; 3] = [SSE, STDIO, HTTP];
/// The key below which other clients' configuration files keep the map.
const WRAPPER: &str = "mcpServers";

/// The fields of a server, in the order in which they are shown.
const FIELDS: [&str; 14] = [
    "transport",
    "url",
    "command",
    "args",
    "cwd",
    "env",
    "headers",
    "auth",
    "timeout",
    "sse_read_timeout",
    "keep_alive",
    "description",
    "icon",
    "enabled",
];

/// How a server authenticates its clients, and the fields that describe it.
fn fields_of_strategy(strategy: &str) -> Option<&'static [&'static str]> {
    Some(match strategy {
        "none" => &[],
        "api_key" => &["value", "header_name"],
        "bearer" => &["value"],
        "basic" => &["username", "password"],
        "header" => &["headers"],
        "oauth2" => &["authentication", "state"],
        _ => return None,
    })
}

/// A change of the servers, with each value checked by itself.
#[derive(Debug)]
pub enum McpChange {
    /// Removes every server.
    Clear,
    /// A merge patch: a server that is null is removed, one that is not named stays as it is.
    Patch {
        /// The patch.
        servers: Servers,
        /// Whether it came inside `mcpServers`.
        wrapped: bool,
    },
    /// The lists of older clients, which replace all servers. Servers by name beside them are those that do not fit into a list,
    /// as answers show them.
    Lists {
        /// The lists.
        lists: Map<String, Value>,
        /// A merge patch for the others.
        named: Servers,
    },
}

impl McpChange {
    /// Reads the value of `mcp_config`.
    ///
    /// Reports every fault; no report quotes a value.
    pub fn read(check: &mut Checker, value: &Value) -> Option<Self> {
        without_input(check, |check| match value {
            Value::Null => Some(Self::Clear),
            Value::Object(given) => Self::read_object(check, given),
            _ => report_no_dictionary(check),
        })
    }

    fn read_object(check: &mut Checker, given: &Map<String, Value>) -> Option<Self> {
        if let Some(servers) = given.get(WRAPPER) {
            for name in given.keys().filter(|name| *name != WRAPPER) {
                check.within(name.clone(), report_unknown);
            }
            let servers = check.within(WRAPPER, |check| match servers {
                Value::Object(servers) => read_servers(check, servers.iter()),
                _ => report_no_dictionary(check),
            })?;
            return check.is_clean().then_some(Self::Patch { servers, wrapped: true });
        }
        let is_list = |name: &str| LISTS.contains(&name);
        let named = read_servers(check, given.iter().filter(|(name, _)| !is_list(name)));
        if !given.keys().any(|name| is_list(name)) {
            return named.map(|servers| Self::Patch { servers, wrapped: false });
        }
        let mut lists = Map::new();
        let mut processes = BTreeSet::new();
        for list in LISTS {
            let servers = match given.get(list) {
                None | Some(Value::Null) => &json!([]),
                Some(servers) => servers,
            };
            let read = check.within(list, |check| read_list(check, list, servers, &mut processes));
            lists.insert(list.to_owned(), read.into());
        }
        named.filter(|_| check.is_clean()).map(|named| Self::Lists { lists, named })
    }

    /// Makes the change. Servers stay as they are when any fault is reported.
    ///
    /// Reports servers that are not complete or contradict themselves, and secrets that have to be sent again; no report quotes
    /// a value.
    pub fn apply(&self, check: &mut Checker, servers: &mut Servers) {
        let next = match self {
            Self::Clear => Some(Servers::new()),
            Self::Patch { servers: patch, wrapped: true } => {
                check.within(WRAPPER, |check| patched(check, servers, servers.clone(), patch))
            }
            Self::Patch { servers: patch, wrapped: false } => patched(check, servers, servers.clone(), patch),
            Self::Lists { lists, named } => replaced(check, servers, lists, named),
        };
        let Some(next) = next.filter(|_| check.is_clean()) else { return };
        if next.len() > MAX_SERVERS.max(servers.len()) {
            secret::report_too_long(check, "Dictionary", MAX_SERVERS, next.len());
            return;
        }
        *servers = next;
    }
}

/// Reads servers from outside of a request, such as a settings file, in any of the forms that requests have.
///
/// # Errors
/// Every fault, none with a value.
pub fn given(value: &Value) -> Checked<Servers> {
    let mut servers = Servers::new();
    let mut check = Checker::new("mcp_config");
    if let Some(change) = McpChange::read(&mut check, value) {
        change.apply(&mut check, &mut servers);
    }
    check.finish(Some(servers))
}

/// Reads what is stored, in any form that a version of this program or a settings file has had: by name, inside `mcpServers`, or
/// in three lists. What cannot be understood stays as it is, and no agent gets it.
#[must_use]
pub fn stored(value: &Value) -> Servers {
    let Value::Object(given) = value else { return Servers::new() };
    let mut servers = Servers::new();
    // Processes first: they have names of their own.
    for list in [STDIO, SSE, HTTP] {
        for server in given.get(list).and_then(Value::as_array).into_iter().flatten() {
            add_listed(&mut servers, list, server);
        }
    }
    let wrapped = given.get(WRAPPER).and_then(Value::as_object);
    let named = wrapped.into_iter().flatten().chain(given);
    for (name, server) in named.filter(|(name, server)| server.is_object() && *name != WRAPPER) {
        servers.insert(name.clone(), canonical(name, server));
    }
    servers
}

/// A server by name in the form in which it is stored now, or as it is where it cannot be read.
fn canonical(name: &str, server: &Value) -> Value {
    let one = Value::Object(Map::from_iter([(name.to_owned(), server.clone())]));
    let read = given(&one).ok().and_then(|mut servers| servers.shift_remove(name));
    read.unwrap_or_else(|| server.clone())
}

fn add_listed(servers: &mut Servers, list: &str, server: &Value) {
    let text = |name: &str| server.get(name).and_then(Value::as_str);
    if list == STDIO {
        let (Some(name), Some(command)) = (text("name"), text("command")) else { return };
        let mut read = json!({"transport": "stdio", "command": command});
        for part in ["args", "env"] {
            let value = &server[part];
            if value.as_array().is_some_and(|items| !items.is_empty())
                || value.as_object().is_some_and(|env| !env.is_empty())
            {
                read[part] = value.clone();
            }
        }
        servers.insert(name.to_owned(), read);
        return;
    }
    let Some(url) = server.as_str().or_else(|| text("url")) else { return };
    let (kind, transport) = if list == SSE { ("sse", "sse") } else { ("shttp", "http") };
    let mut read = json!({"transport": transport, "url": url});
    if let Some(key) = text("api_key").filter(|key| !key.trim().is_empty()) {
        read["auth"] = json!({"strategy": "api_key", "value": key});
    }
    if list == HTTP {
        match server.get("timeout") {
            None => read["timeout"] = json!(60),
            Some(timeout) if timeout.is_number() => read["timeout"] = timeout.clone(),
            Some(_) => {}
        }
    }
    let names = (0..).map(|n| if n == 0 { kind.to_owned() } else { format!("{kind}_{n}") });
    if let Some(name) = names.into_iter().find(|name| !servers.contains_key(name)) {
        servers.insert(name, read);
    }
}
