//! MCP servers as responses show them.

use serde_json::{Map, Value, json};

use super::read::is_listed_name;
use super::server::{auth_of, entries_of, secret_places};
use super::{FIELDS, HTTP, LISTS, SSE, STDIO, Servers};
use crate::http::secret::MASK;

/// The servers by name as responses show them; secrets are in clear only with `expose`.
#[must_use]
pub fn shown(servers: &Servers, expose: bool) -> Map<String, Value> {
    servers.iter().map(|(name, server)| (name.clone(), shown_server(server, expose))).collect()
}

pub(super) fn shown_server(server: &Value, expose: bool) -> Value {
    let Value::Object(server) = server else { return json!({}) };
    let known = FIELDS.iter().filter_map(|name| Some(((*name).to_owned(), server.get(*name)?.clone())));
    let mut shown = Value::Object(known.collect());
    if expose {
        return shown;
    }
    for (place, _) in secret_places(server) {
        let value = place.iter().try_fold(&mut shown, |value, step| match value {
            Value::Array(items) => items.get_mut(step.parse::<usize>().ok()?),
            value => value.get_mut(step),
        });
        if let Some(value) = value {
            *value = MASK.into();
        }
    }
    shown
}

/// The servers as the field `mcp_config` shows them: in the lists of older clients if they fit there, and all of them by name next to the
/// lists. Null when there are none.
#[must_use]
pub fn shown_with_lists(servers: &Servers, expose: bool) -> Value {
    if servers.is_empty() {
        return Value::Null;
    }
    let mut all: Map<String, Value> = LISTS.iter().map(|list| ((*list).to_owned(), json!([]))).collect();
    for (name, server) in servers {
        if let Some((list, entry)) = listed(name, server, expose)
            && let Some(Value::Array(entries)) = all.get_mut(list)
        {
            entries.push(entry);
        }
    }
    all.extend(shown(servers, expose));
    Value::Object(all)
}

/// A server as an entry of a list of older clients, if a list supports all its fields.
pub(super) fn listed(name: &str, server: &Value, expose: bool) -> Option<(&'static str, Value)> {
    let server = server.as_object()?;
    let hidden = |value: &Value| if expose { value.clone() } else { MASK.into() };
    let only = |fields: &[&str]| {
        server.keys().all(|name| {
            fields.contains(&name.as_str()) || matches!(name.as_str(), "transport" | "description" | "icon")
        })
    };
    if let Some(command) = server.get("command").and_then(Value::as_str) {
        if !only(&["command", "args", "env"]) || !is_listed_name(name) || command.contains(char::is_whitespace) {
            return None;
        }
        let env: Map<String, Value> =
            entries_of(server, "env").map(|(name, value)| (name.clone(), hidden(value))).collect();
        let args = server.get("args").cloned().unwrap_or_else(|| json!([]));
        return Some((STDIO, json!({"name": name, "command": command, "args": args, "env": env})));
    }
    let url = server.get("url")?.as_str()?;
    let key = match auth_of(server) {
        None => Value::Null,
        Some(auth) => {
            let is_key = matches!(auth.get("strategy").and_then(Value::as_str), Some("api_key" | "bearer"));
            if !is_key || auth.contains_key("header_name") {
                return None;
            }
            hidden(auth.get("value")?)
        }
    };
    if server.get("transport").is_some_and(|transport| transport == "sse") {
        return only(&["url", "auth"]).then(|| (SSE, json!({"url": url, "api_key": key})));
    }
    let timeout = match server.get("timeout") {
        None => Value::Null,
        Some(timeout) => timeout.as_i64().filter(|seconds| (1..=3600).contains(seconds))?.into(),
    };
    only(&["url", "auth", "timeout"]).then(|| (HTTP, json!({"url": url, "api_key": key, "timeout": timeout})))
}
