//! Changes stored MCP servers. It ensures that each server is complete and that its secrets are sent to no other endpoint.

use std::collections::BTreeSet;
use std::fmt;

use serde_json::{Map, Value, json};

use super::server::{at, auth_of, endpoint, entries_of, header_names, secret_places};
use super::show::{listed, shown_server};
use super::{HTTP, SSE, STDIO, Servers, fields_of_strategy};
use crate::http::pydantic::validation::Checker;
use crate::http::secret::MASK;

/// Fields that only a server that runs as a process has.
const OF_PROCESSES: [&str; 3] = ["args", "cwd", "env"];
/// Fields that only a server with a URL has.
const OF_REMOTES: [&str; 3] = ["headers", "auth", "sse_read_timeout"];

const SEND_AGAIN: &str = "The server's endpoint (its url, or its command, args and cwd) has changed, and a stored secret is not \
                          sent to another endpoint. Send this value again, or null to remove it";
const NO_STORED_VALUE: &str = "A masked value refers to a stored one, but none is stored for this server. (A renamed server keeps \
                               its secrets only if its url, or its command, args and cwd, stay the same.) Send the value itself";

/// Applies a merge patch to `next`. `stored` are the servers before the request.
pub(super) fn patched(check: &mut Checker, stored: &Servers, mut next: Servers, patch: &Servers) -> Option<Servers> {
    let removed: Vec<&Map<String, Value>> = patch
        .iter()
        .filter(|(_, change)| change.is_null())
        .filter_map(|(name, _)| stored.get(name)?.as_object())
        .collect();
    let mut complete = true;
    for (name, change) in patch {
        let Value::Object(change) = change else {
            next.shift_remove(name);
            continue;
        };
        let changed = check.within(name.clone(), |check| {
            if let Some(Value::Object(base)) = next.get(name) {
                let change = aligned(base, change.clone());
                return complete_server(check, Some(base), &change, merged(base, &change));
            }
            let mut change = change.clone();
            // A server that replaces a removed one with the same endpoint keeps its masked secrets.
            if let Some(old) = removed.iter().find(|old| endpoint(old) == endpoint(&change)) {
                unmask(&mut change, old);
            }
            let change = aligned(&Map::new(), change);
            complete_server(check, None, &change, merged(&Map::new(), &change))
        });
        match changed {
            Some(changed) => {
                next.insert(name.clone(), Value::Object(changed));
            }
            None => complete = false,
        }
    }
    complete.then_some(next)
}

/// Resolves conflicts between the headers and `auth` of a patch, which can describe the same header.
///
/// - `Authorization: Bearer X` becomes `auth`, as the reference stores it.
/// - A header that the stored `auth` makes replaces that `auth`; null removes it, and `headers: null` as well.
/// - A masked header that is stored, in either form, is removed from the patch, because it is unchanged.
/// - A header whose name differs from a stored one in case only replaces it.
fn aligned(base: &Map<String, Value>, mut patch: Map<String, Value>) -> Map<String, Value> {
    let has_auth = patch.get("auth").is_some_and(|auth| !auth.is_null());
    let (headers, keeps_auth) = match patch.get("headers") {
        Some(Value::Null) => {
            patch.entry("auth").or_insert(Value::Null);
            return patch;
        }
        Some(Value::Object(headers)) => (headers.clone(), !patch.contains_key("auth")),
        _ => return patch,
    };
    let made: Vec<String> = auth_of(base).map(header_names).unwrap_or_default();
    let is_made = |name: &str| made.iter().any(|made| made.eq_ignore_ascii_case(name));
    let mut kept = Map::new();
    for (name, value) in headers {
        let stored =
            entries_of(base, "headers").find(|(stored, _)| stored.eq_ignore_ascii_case(&name)).map(|(name, _)| name);
        let text = value.as_str().unwrap_or_default();
        let token = text.strip_prefix("Bearer ").map(str::trim).filter(|token| !token.is_empty());
        if text == MASK || token == Some(MASK) {
            if stored.is_none() && !(keeps_auth && is_made(&name)) {
                kept.insert(name, MASK.into());
            }
            continue;
        }
        if let Some(stored) = stored.filter(|stored| **stored != name) {
            kept.insert(stored.clone(), Value::Null);
        }
        if keeps_auth && is_made(&name) {
            patch.insert("auth".to_owned(), Value::Null);
        }
        match token {
            Some(token) if name.eq_ignore_ascii_case("authorization") && !has_auth => {
                kept.insert(stored.cloned().unwrap_or(name), Value::Null);
                patch.insert("auth".to_owned(), json!({"strategy": "bearer", "value": token}));
            }
            _ => {
                kept.insert(name, value);
            }
        }
    }
    patch.insert("headers".to_owned(), kept.into());
    patch
}

/// Replaces the masks in the patch of a renamed server by the secrets of the removed one.
fn unmask(patch: &mut Map<String, Value>, old: &Map<String, Value>) {
    let is_mask =
        |value: &Value| value == MASK || value.as_str().is_some_and(|text| text.strip_prefix("Bearer ") == Some(MASK));
    if let Some(Value::Object(variables)) = patch.get_mut("env") {
        for (name, value) in variables.iter_mut().filter(|(_, value)| is_mask(value)) {
            if let Some((_, known)) = entries_of(old, "env").find(|(known, _)| *known == name) {
                *value = known.clone();
            }
        }
    }
    let has_auth = patch.contains_key("auth");
    let mut old_auth = None;
    if let Some(Value::Object(headers)) = patch.get_mut("headers") {
        headers.retain(|name, value| {
            if !is_mask(value) {
                return true;
            }
            if let Some((_, known)) = entries_of(old, "headers").find(|(known, _)| known.eq_ignore_ascii_case(name)) {
                *value = known.clone();
                return true;
            }
            let auth =
                auth_of(old).filter(|auth| header_names(auth).iter().any(|made| made.eq_ignore_ascii_case(name)));
            if has_auth || auth.is_none() {
                return true;
            }
            old_auth = auth.cloned();
            false
        });
    }
    if let Some(auth) = old_auth {
        patch.insert("auth".to_owned(), auth.into());
    }
    if let (Some(Value::Object(auth)), Some(known)) = (patch.get_mut("auth"), auth_of(old))
        && auth.get("strategy").is_none_or(|strategy| Some(strategy) == known.get("strategy"))
    {
        let given = auth.clone();
        *auth = merged(known, &given);
    }
}

/// Applies a merge patch (RFC 7396), except that a masked text leaves a stored value unchanged.
fn merged(base: &Map<String, Value>, patch: &Map<String, Value>) -> Map<String, Value> {
    let mut merged_fields = base.clone();
    for (name, value) in patch {
        match value {
            Value::Null => {
                merged_fields.shift_remove(name);
            }
            Value::Object(changes) => {
                let before = merged_fields.get(name).and_then(Value::as_object).cloned().unwrap_or_default();
                merged_fields.insert(name.clone(), merged(&before, changes).into());
            }
            Value::Array(items) => {
                let stored = merged_fields.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
                let unmasked = items.iter().enumerate().map(|(index, item)| match stored.get(index) {
                    Some(known) if item == MASK => known.clone(),
                    _ => item.clone(),
                });
                merged_fields.insert(name.clone(), unmasked.collect());
            }
            value if value == MASK && merged_fields.contains_key(name) => {}
            value => {
                merged_fields.insert(name.clone(), value.clone());
            }
        }
    }
    merged_fields
}

/// Checks a complete server, and converts it to its stored form. `base` is the server before the change by `patch`.
fn complete_server(
    check: &mut Checker,
    base: Option<&Map<String, Value>>,
    patch: &Map<String, Value>,
    mut server: Map<String, Value>,
) -> Option<Map<String, Value>> {
    server.retain(|name, value| match value {
        Value::Object(entries) if name != "auth" => !entries.is_empty(),
        Value::Array(items) => !items.is_empty(),
        // The default.
        Value::Bool(true) => name != "enabled",
        _ => true,
    });
    let mut faults = Faults { check, clean: true };
    let (has_url, has_command) = (server.contains_key("url"), server.contains_key("command"));
    if has_url == has_command {
        let text = if has_url {
            "A server must have a url or a command, not both"
        } else {
            "A server must have a url or a command"
        };
        faults.report(&[], text);
        return None;
    }
    let transport = server.get("transport").and_then(Value::as_str);
    if transport.is_some_and(|transport| (transport == "stdio") != has_command) {
        faults.report(
            &["transport"],
            "A server with a command must have the transport stdio; one with a url must have another transport",
        );
    }
    let foreign: &[&str] = if has_url { &OF_PROCESSES } else { &OF_REMOTES };
    for name in foreign.iter().filter(|name| server.contains_key(**name)) {
        let kind = if has_url { "a url" } else { "a command" };
        faults.report(&[name], format!("A server with {kind} must not have {name}; send null to remove it"));
    }
    complete_auth(&mut faults, patch, &mut server);
    let mut lower: BTreeSet<String> = BTreeSet::new();
    for (name, _) in entries_of(&server, "headers") {
        if !lower.insert(name.to_ascii_lowercase()) {
            faults.report(&["headers", name], "Another header has the same name");
        }
    }
    let has_moved = base.is_some_and(|base| endpoint(base) != endpoint(&server));
    for (place, value) in secret_places(&server) {
        let place: Vec<&str> = place.iter().map(String::as_str).collect();
        let sent = at(patch, &place).is_some_and(|sent| *sent != MASK);
        if *value == MASK {
            faults.report(&place, NO_STORED_VALUE);
        } else if has_moved && !sent && base.and_then(|base| at(base, &place)) == Some(value) {
            faults.report(&place, SEND_AGAIN);
        }
    }
    faults.clean.then_some(server)
}

/// Reports the faults of a server, and tracks whether there are any.
struct Faults<'c> {
    check: &'c mut Checker,
    clean: bool,
}

impl Faults<'_> {
    fn report(&mut self, place: &[&str], text: impl fmt::Display) {
        fn report(check: &mut Checker, place: &[&str], text: &dyn fmt::Display) {
            match place {
                [] => check.report_value_error(text, MASK.into()),
                [first, rest @ ..] => check.within((*first).to_owned(), |check| report(check, rest, text)),
            }
        }
        self.clean = false;
        report(self.check, place, &text);
    }
}

/// Removes fields of another strategy from `auth`, and a header that `auth` replaces; reports missing fields.
fn complete_auth(faults: &mut Faults<'_>, patch: &Map<String, Value>, server: &mut Map<String, Value>) {
    let Some(Value::Object(auth)) = server.get_mut("auth") else { return };
    let Some(fields) = auth.get("strategy").and_then(Value::as_str).and_then(fields_of_strategy) else {
        faults.report(&["auth", "strategy"], "The strategy is missing");
        return;
    };
    auth.retain(|name, _| name == "strategy" || fields.contains(&name.as_str()));
    let sent = patch.get("auth").and_then(Value::as_object).into_iter().flatten();
    for (name, _) in sent.filter(|(name, value)| !value.is_null() && name.as_str() != "strategy") {
        if !fields.contains(&name.as_str()) {
            faults.report(&["auth", name], "This strategy does not have this field");
        }
    }
    for name in fields.iter().filter(|name| matches!(**name, "value" | "username" | "password" | "headers")) {
        let is_there = match auth.get(*name) {
            Some(Value::String(text)) => !text.is_empty() || *name != "value",
            Some(Value::Object(entries)) => !entries.is_empty(),
            _ => false,
        };
        if !is_there {
            faults.report(&["auth", name], "The field is missing, and no value is stored for it");
        }
    }
    let made = header_names(auth);
    if let Some(Value::Object(headers)) = server.get_mut("headers") {
        headers.retain(|name, _| !made.iter().any(|made| made.eq_ignore_ascii_case(name)));
        if headers.is_empty() {
            server.shift_remove("headers");
        }
    }
}

/// Replaces the servers by lists of older clients.
pub(super) fn replaced(
    check: &mut Checker,
    stored: &Servers,
    lists: &Map<String, Value>,
    named: &Servers,
) -> Option<Servers> {
    let listed: Vec<(&String, &str)> =
        stored.iter().filter_map(|(name, server)| Some((name, listed(name, server, false)?.0))).collect();
    let servers = |list: &str| lists.get(list).and_then(Value::as_array).into_iter().flatten().enumerate();
    let mut kept: Servers = Servers::new();
    let mut added: Vec<(String, Value)> = Vec::new();
    for (index, server) in servers(STDIO) {
        let name = server["name"].as_str().unwrap_or_default();
        let is_listed = listed.iter().any(|(listed, list)| *listed == name && *list == STDIO);
        let known = stored.get(name).filter(|_| is_listed).and_then(Value::as_object);
        let read = check.within(STDIO, |check| check.within(index, |check| process_of_list(check, known, server)));
        match read {
            Some(read) if stored.contains_key(name) => {
                kept.insert(name.to_owned(), read);
            }
            Some(read) => added.push((name.to_owned(), read)),
            None => {}
        }
    }
    for (list, kind) in [(SSE, "sse"), (HTTP, "shttp")] {
        for (index, server) in servers(list) {
            let known = listed.iter().find(|(name, of)| {
                *of == list
                    && !kept.contains_key(*name)
                    && stored.get(*name).is_some_and(|known| known["url"] == server["url"])
            });
            let base = known.and_then(|(name, _)| stored.get(*name)?.as_object());
            let read =
                check.within(list, |check| check.within(index, |check| remote_of_list(check, list, base, server)));
            match (read, known) {
                (Some(read), Some((name, _))) => {
                    kept.insert((*name).clone(), read);
                }
                (Some(read), None) => {
                    let is_taken = |name: &str| {
                        stored.contains_key(name)
                            || named.contains_key(name)
                            || added.iter().any(|(taken, _)| taken == name)
                    };
                    let name = (0..).map(|n| if n == 0 { kind.to_owned() } else { format!("{kind}_{n}") });
                    if let Some(name) = name.into_iter().find(|name| !is_taken(name)) {
                        added.push((name, read));
                    }
                }
                (None, _) => {}
            }
        }
    }
    // A body can contain servers by name next to the lists. A server that is also in a list has the list's values, unless it differs from
    // what responses show; a server that fits into no list stays.
    let fits = |name: &str| listed.iter().any(|(listed, _)| *listed == name);
    let changes: Servers = named
        .iter()
        .filter(|(name, patch)| {
            !(fits(name) && stored.get(*name).is_some_and(|server| shown_server(server, false) == **patch))
        })
        .map(|(name, patch)| (name.clone(), patch.clone()))
        .collect();
    let mut next: Servers = stored
        .iter()
        .filter_map(|(name, server)| {
            let by_name = changes.contains_key(name).then(|| server.clone());
            Some((name.clone(), kept.get(name).cloned().or(by_name)?))
        })
        .collect();
    next.extend(added);
    patched(check, stored, next, &changes)
}

fn process_of_list(check: &mut Checker, known: Option<&Map<String, Value>>, server: &Value) -> Option<Value> {
    let mut read = known.cloned().unwrap_or_else(|| Map::from_iter([("transport".to_owned(), json!("stdio"))]));
    for name in ["command", "args"] {
        read.insert(name.to_owned(), server[name].clone());
    }
    read.retain(|_, value| value.as_array().is_none_or(|items| !items.is_empty()));
    let known = known.filter(|known| endpoint(known) == endpoint(&read));
    let known_env = known.and_then(|known| known.get("env")).and_then(Value::as_object).cloned().unwrap_or_default();
    let mut env = server["env"].as_object().cloned().unwrap_or_else(|| known_env.clone());
    let mut complete = true;
    for (name, value) in &mut env {
        if *value == MASK {
            match known_env.get(name) {
                Some(known) => *value = known.clone(),
                None => {
                    check.within("env", |check| {
                        check.within(name.clone(), |check| check.report_value_error(NO_STORED_VALUE, MASK.into()));
                    });
                    complete = false;
                }
            }
        }
    }
    read.shift_remove("env");
    if !env.is_empty() {
        read.insert("env".to_owned(), env.into());
    }
    complete.then_some(Value::Object(read))
}

fn remote_of_list(check: &mut Checker, list: &str, base: Option<&Map<String, Value>>, server: &Value) -> Option<Value> {
    let new = || {
        let transport = if list == SSE { "sse" } else { "http" };
        let mut new =
            Map::from_iter([("transport".to_owned(), json!(transport)), ("url".to_owned(), server["url"].clone())]);
        if list == HTTP {
            new.insert("timeout".to_owned(), json!(60));
        }
        new
    };
    let mut read = base.cloned().unwrap_or_else(new);
    match server.get("api_key") {
        None => {}
        Some(key) if key == MASK && auth_of(&read).is_some() => {}
        Some(key) if key == MASK => {
            check.within("api_key", |check| check.report_value_error(NO_STORED_VALUE, MASK.into()));
            return None;
        }
        Some(Value::Null) => {
            read.shift_remove("auth");
        }
        Some(key) => {
            read.insert("auth".to_owned(), json!({"strategy": "api_key", "value": key}));
        }
    }
    match server.get("timeout") {
        None => {}
        Some(Value::Null) => {
            read.shift_remove("timeout");
        }
        Some(timeout) => {
            read.insert("timeout".to_owned(), timeout.clone());
        }
    }
    Some(Value::Object(read))
}
