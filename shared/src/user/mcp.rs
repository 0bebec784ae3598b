//! MCP servers in a user's settings: what clients send, what is stored, what is shown, and what an agent server gets.
//!
//! Servers are stored by name, each as an object with the fields of the SDK's `MCPServer`. Clients send a merge patch of that map
//! (RFC 7396), the same map inside `mcpServers`, or the three lists of older clients; see [`McpChange`]. A secret of a server
//! stays valid only for the endpoint that it was given for: a change of the endpoint demands its secrets again, so that a stored
//! secret never reaches another host or program.

use std::collections::BTreeSet;
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderName, HeaderValue};
use secrecy::SecretString;
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Number, Value, json};

use crate::http::secret::{self, MASK};
use crate::http::validation::{self, Checked, Checker, Fields, Loc};

/// Servers by name, as they are stored. Holds secrets in clear text.
pub type Servers = Map<String, Value>;

/// The most servers of a user.
const MAX_SERVERS: usize = 100;
/// The most headers, or variables, of a server.
const MAX_ENTRIES: usize = 100;
/// The most arguments of a command, and the most entries of a list of older clients.
const MAX_LIST: usize = 1_000;
/// Characters of a text that is not a secret.
const MAX_TEXT: usize = 10_000;
/// The longest timeout, in seconds.
const MAX_SECONDS: f64 = 86_400.0;
/// The shortest part of a URL's query that counts as a secret, in bytes.
const LEAST_URL_SECRET: usize = 8;

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
/// Fields of a server that runs as a process alone.
const OF_PROCESSES: [&str; 3] = ["args", "cwd", "env"];
/// Fields of a server with a URL alone.
const OF_REMOTES: [&str; 3] = ["headers", "auth", "sse_read_timeout"];
/// Keys of OAuth settings that hold no secret.
const PUBLIC_OAUTH: [&str; 5] = ["type", "client_auth_method", "scopes", "client_id", "client_name"];

const SEND_AGAIN: &str = "The server's endpoint (its url, or its command, args and cwd) has changed, and a stored secret is not \
                          sent to another endpoint: send this value again, or null to remove it";
const NO_STORED_VALUE: &str = "A masked value stands for a stored one, and none is stored for this server. (A renamed server keeps \
                               its secrets only if its url, or its command, args and cwd, stay the same.) Send the value itself";

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
        let mut names = BTreeSet::new();
        for list in LISTS {
            let servers = match given.get(list) {
                None | Some(Value::Null) => &json!([]),
                Some(servers) => servers,
            };
            let read = check.within(list, |check| read_list(check, list, servers, &mut names));
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

// ----- Reading --------------------------------------------------------------------------------------------------------------

/// Runs a reader whose reports must not quote what they are about.
fn without_input<T>(check: &mut Checker, read: impl FnOnce(&mut Checker) -> Option<T>) -> Option<T> {
    fn report(check: &mut Checker, loc: &[Loc], violation: validation::Violation) {
        match loc {
            [] => check.report(violation.kind, violation.msg, MASK.into(), violation.ctx),
            [Loc::Key(key), rest @ ..] => {
                check.within(key.clone().into_owned(), |check| report(check, rest, violation))
            }
            [Loc::Index(index), rest @ ..] => check.within(*index, |check| report(check, rest, violation)),
        }
    }
    let mut inner = Checker::new("");
    let value = read(&mut inner);
    match inner.finish(value) {
        Ok(value) => Some(value),
        Err(violations) => {
            for violation in violations {
                let loc = violation.loc.clone();
                report(check, loc.get(1..).unwrap_or_default(), violation);
            }
            None
        }
    }
}

fn report_no_dictionary<T>(check: &mut Checker) -> Option<T> {
    check.report("dict_type", "Input should be a valid dictionary", MASK.into(), None);
    None
}

fn report_unknown(check: &mut Checker) {
    check.report("extra_forbidden", "Extra inputs are not permitted", MASK.into(), None);
}

fn read_servers<'v>(check: &mut Checker, given: impl Iterator<Item = (&'v String, &'v Value)>) -> Option<Servers> {
    let mut servers = Servers::new();
    let mut complete = true;
    for (name, server) in given {
        let read = check.within(name.clone(), |check| {
            if LISTS.contains(&name.as_str())
                || name == WRAPPER
                || name.trim().is_empty()
                || name.chars().count() > secret::MAX_NAME
                || name.chars().any(char::is_control)
            {
                let most = secret::MAX_NAME;
                check.report_value_error(
                    format_args!(
                        "A server's name has 1 to {most} characters, no control characters, and is not a list's name"
                    ),
                    MASK.into(),
                );
                return None;
            }
            match server {
                Value::Null => Some(Value::Null),
                Value::Object(fields) => read_server(check, fields).map(Value::Object),
                _ => report_no_dictionary(check),
            }
        });
        match read {
            Some(read) => {
                servers.insert(name.clone(), read);
            }
            None => complete = false,
        }
    }
    complete.then_some(servers)
}

/// Reads the patch of one server: `type` becomes `transport`, `api_key` and a text in `auth` become an object in `auth`.
fn read_server(check: &mut Checker, given: &Map<String, Value>) -> Option<Map<String, Value>> {
    let mut patch = Map::new();
    let mut complete = true;
    for (name, value) in given {
        let field = match name.as_str() {
            "type" => "transport",
            "api_key" => "auth",
            name => name,
        };
        let read = check.within(name.clone(), |check| {
            let read = read_field(check, name, value)?;
            match patch.get(field) {
                Some(other) if *other != read => {
                    check.report_value_error(format_args!("It contradicts {field}"), MASK.into());
                    None
                }
                _ => Some(read),
            }
        });
        match read {
            Some(read) => {
                patch.insert(field.to_owned(), read);
            }
            None => complete = false,
        }
    }
    complete.then_some(patch)
}

fn read_field(check: &mut Checker, name: &str, value: &Value) -> Option<Value> {
    if value.is_null() && (FIELDS.contains(&name) || matches!(name, "type" | "api_key")) {
        return Some(Value::Null);
    }
    match name {
        "url" => read_url(check, value).map(Value::from),
        "command" | "cwd" => read_word(check, value).map(Value::from),
        "args" => read_args(check, value).map(Value::from),
        "env" => read_entries(check, value, read_variable).map(Value::from),
        "headers" => read_entries(check, value, read_header).map(Value::from),
        "auth" => read_auth(check, value),
        "api_key" => read_header_value(check, value).map(|key| match key.as_str() {
            "" => Value::Null,
            MASK => json!({}),
            _ => json!({"strategy": "api_key", "value": key}),
        }),
        "timeout" | "sse_read_timeout" => read_seconds(check, value).map(Value::from),
        "keep_alive" | "enabled" => validation::boolean(check, value).map(Value::from),
        "description" | "icon" => validation::string_up_to(MAX_TEXT, check, value).map(Value::from),
        "transport" | "type" => {
            const TRANSPORTS: [&str; 4] = ["stdio", "http", "streamable-http", "sse"];
            let known = value.as_str().filter(|transport| TRANSPORTS.contains(transport));
            if known.is_none() {
                validation::report_not_one_of("literal_error", TRANSPORTS, check, MASK.into());
            }
            known.map(Value::from)
        }
        _ => {
            report_unknown(check);
            None
        }
    }
}

fn read_url(check: &mut Checker, value: &Value) -> Option<String> {
    let url = validation::string_up_to(MAX_TEXT, check, value)?;
    let parts = url.trim().split_once("://");
    if !parts.is_some_and(|(scheme, rest)| matches!(scheme, "http" | "https" | "ws" | "wss") && !rest.is_empty()) {
        check.report_value_error("URL must begin with http, https, ws or wss and name a host", MASK.into());
        return None;
    }
    Some(url.trim().to_owned())
}

/// A text that is not blank.
fn read_word(check: &mut Checker, value: &Value) -> Option<String> {
    let text = validation::string_up_to(MAX_TEXT, check, value)?;
    if text.trim().is_empty() || text.contains('\0') {
        check.report_value_error("It must not be blank", MASK.into());
        return None;
    }
    Some(text)
}

fn read_args(check: &mut Checker, value: &Value) -> Option<Vec<String>> {
    let args = validation::list(check, value, |check, arg| validation::string_up_to(MAX_TEXT, check, arg))?;
    if args.len() > MAX_LIST {
        secret::report_too_long(check, "List", MAX_LIST, args.len());
        return None;
    }
    Some(args)
}

/// A number of seconds; whole ones as integers, which is what older agent servers demand.
fn read_seconds(check: &mut Checker, value: &Value) -> Option<Number> {
    let seconds = validation::float(check, value)?;
    if !(seconds > 0.0 && seconds <= MAX_SECONDS) {
        check.report_value_error(
            format_args!("Timeout must be more than 0 and at most {MAX_SECONDS} seconds"),
            MASK.into(),
        );
        return None;
    }
    if seconds.fract() == 0.0 { Some(Number::from(whole_seconds(seconds))) } else { Number::from_f64(seconds) }
}

/// Seconds, rounded up to whole ones.
fn whole_seconds(seconds: f64) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is clamped to the type's range")]
    let whole = seconds.ceil().clamp(1.0, f64::from(u32::MAX)) as u32;
    whole
}

/// Reads an object of secrets by name; null removes one.
fn read_entries(
    check: &mut Checker,
    value: &Value,
    read: impl Fn(&mut Checker, &str, &Value) -> Option<String>,
) -> Option<Map<String, Value>> {
    let Value::Object(given) = value else { return report_no_dictionary(check) };
    if given.len() > MAX_ENTRIES {
        secret::report_too_long(check, "Dictionary", MAX_ENTRIES, given.len());
        return None;
    }
    let mut entries = Map::new();
    let mut complete = true;
    for (name, value) in given {
        let read = check.within(name.clone(), |check| match value {
            Value::Null => Some(Value::Null),
            value => read(check, name, value).map(Value::from),
        });
        match read {
            Some(read) => {
                entries.insert(name.clone(), read);
            }
            None => complete = false,
        }
    }
    complete.then_some(entries)
}

fn read_variable(check: &mut Checker, name: &str, value: &Value) -> Option<String> {
    let value = secret::value(check, value)?;
    if name.is_empty() || name.len() > secret::MAX_NAME || name.contains(['=', '\0']) || value.contains('\0') {
        check
            .report_value_error("A variable needs a name, without =, and a value without null characters", MASK.into());
        return None;
    }
    Some(value.to_owned())
}

fn read_header(check: &mut Checker, name: &str, value: &Value) -> Option<String> {
    if name.len() > secret::MAX_NAME || HeaderName::from_bytes(name.as_bytes()).is_err() {
        check.report_value_error("This is not the name of an HTTP header", MASK.into());
        return None;
    }
    read_header_value(check, value)
}

/// A secret that is sent in a header. Blanks around it are not part of it.
fn read_header_value(check: &mut Checker, value: &Value) -> Option<String> {
    let value = secret::value(check, value)?.trim();
    if HeaderValue::from_str(value).is_err() {
        check.report_value_error("A header's value has printable ASCII characters only", MASK.into());
        return None;
    }
    Some(value.to_owned())
}

fn read_auth(check: &mut Checker, value: &Value) -> Option<Value> {
    let given = match value {
        Value::String(_) => {
            return read_header_value(check, value).map(|text| match text.as_str() {
                "" => Value::Null,
                MASK => json!({}),
                "oauth" => json!({"strategy": "oauth2"}),
                _ => json!({"strategy": "bearer", "value": text}),
            });
        }
        Value::Object(given) => given,
        _ => return report_no_dictionary(check),
    };
    let mut auth = Map::new();
    let mut complete = true;
    for (name, value) in given {
        let read = check.within(name.clone(), |check| match (name.as_str(), value) {
            (_, Value::Null) => Some(Value::Null),
            ("strategy", value) => {
                const STRATEGIES: [&str; 6] = ["none", "api_key", "bearer", "basic", "header", "oauth2"];
                let known = value.as_str().filter(|strategy| fields_of_strategy(strategy).is_some());
                if known.is_none() {
                    validation::report_not_one_of("literal_error", STRATEGIES, check, MASK.into());
                }
                known.map(Value::from)
            }
            ("value", value) => read_header_value(check, value).map(Value::from),
            ("username" | "password", value) => secret::value(check, value).map(Value::from),
            ("header_name", value) => {
                let name = validation::string_up_to(secret::MAX_NAME, check, value)?;
                read_header(check, &name, &json!(""))?;
                Some(name.into())
            }
            ("headers", value) => read_entries(check, value, read_header).map(Value::from),
            ("authentication" | "state", Value::Object(_)) => Some(value.clone()),
            ("authentication" | "state", _) => report_no_dictionary(check),
            _ => {
                report_unknown(check);
                None
            }
        });
        match read {
            Some(read) => {
                auth.insert(name.clone(), read);
            }
            None => complete = false,
        }
    }
    complete.then_some(Value::Object(auth))
}

/// Reads a list of older clients. `names` are those of its processes.
fn read_list(check: &mut Checker, list: &str, servers: &Value, names: &mut BTreeSet<String>) -> Option<Vec<Value>> {
    let Value::Array(servers) = servers else {
        check.report("list_type", "Input should be a valid list", MASK.into(), None);
        return None;
    };
    if servers.len() > MAX_LIST {
        secret::report_too_long(check, "List", MAX_LIST, servers.len());
        return None;
    }
    let read: Vec<Option<Value>> = servers
        .iter()
        .enumerate()
        .map(|(index, server)| {
            check.within(index, |check| {
                let read = if list == STDIO {
                    read_listed_process(check, server)
                } else {
                    read_listed_url(check, list, server)
                };
                if let Some(name) = read.as_ref().and_then(|read| read["name"].as_str())
                    && !names.insert(name.to_owned())
                {
                    check.report_value_error("Another server has this name", MASK.into());
                }
                read
            })
        })
        .collect();
    read.into_iter().collect()
}

/// `{"url", "api_key"?, "timeout"?}`, or the URL alone. What is absent stays absent.
fn read_listed_url(check: &mut Checker, list: &str, server: &Value) -> Option<Value> {
    let server = match server {
        Value::String(url) => &json!({"url": url}),
        other => other,
    };
    let fields = Fields::of(check, server)?;
    let url = fields.required(check, "url", read_url);
    let key = fields.nullable(check, "api_key", read_header_value);
    let timeout = if list == SSE {
        Some(None)
    } else {
        fields.nullable(check, "timeout", |check, value| {
            let seconds = validation::integer(check, value)?;
            if !(1..=3600).contains(&seconds) {
                check.report_value_error("Timeout must be between 1 and 3600 seconds", MASK.into());
                return None;
            }
            Some(seconds)
        })
    };
    let (url, key, timeout) = (url?, key?, timeout?);
    let mut read = json!({"url": url});
    if fields.has("api_key") {
        read["api_key"] = key.filter(|key| !key.is_empty()).into();
    }
    if list == HTTP && fields.has("timeout") {
        read["timeout"] = timeout.into();
    }
    Some(read)
}

/// `{"name", "command", "args"?, "env"?}`.
fn read_listed_process(check: &mut Checker, server: &Value) -> Option<Value> {
    let fields = Fields::of(check, server)?;
    let name = fields.required(check, "name", |check, value| {
        let name = validation::string_up_to(secret::MAX_NAME, check, value)?;
        if !is_listed_name(&name) {
            check.report_value_error("Server names are made of letters, digits, hyphens and underscores", MASK.into());
            return None;
        }
        Some(name)
    });
    let command = fields.required(check, "command", |check, value| {
        let command = read_word(check, value)?;
        if command.contains(char::is_whitespace) {
            check.report_value_error("A command is a single word; its arguments belong into args", MASK.into());
            return None;
        }
        Some(command)
    });
    let args = fields.or(check, "args", Vec::new(), read_args);
    let env = fields.nullable(check, "env", |check, value| {
        let entries = read_entries(check, value, read_variable)?;
        Some(entries.into_iter().filter(|(_, value)| !value.is_null()).collect::<Map<_, _>>())
    });
    let (name, command, args, env) = (name?, command?, args?, env?);
    let mut read = json!({"name": name, "command": command, "args": args});
    if let Some(env) = env {
        read["env"] = env.into();
    }
    Some(read)
}

fn is_listed_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    !name.is_empty()
        && name.len() <= secret::MAX_NAME
        && name.bytes().all(plain)
        && !LISTS.contains(&name)
        && name != WRAPPER
}

// ----- Changing -------------------------------------------------------------------------------------------------------------

/// Applies a merge patch to `next`. `stored` are the servers before the request.
fn patched(check: &mut Checker, stored: &Servers, mut next: Servers, patch: &Servers) -> Option<Servers> {
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
            // A server that takes the place of a removed one with the same endpoint keeps its masked secrets.
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

/// Settles how headers and `auth` of a patch act on a server: both can describe the same header.
///
/// - `Authorization: Bearer X` becomes `auth`, as the reference stores it.
/// - A header that the stored `auth` makes replaces that `auth`; null removes it, and `headers: null` as well.
/// - A masked header that is stored, in either form, is left out of the patch: it is unchanged.
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

/// Puts the secrets of a removed server where the patch of its successor has masks.
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

/// The merge of RFC 7396, except that a masked text leaves a stored value as it is.
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

/// Checks a server as a whole, and brings it into the form in which it is stored. `base` is the server that `patch` has changed.
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
        let text =
            if has_url { "A server has a url or a command, not both" } else { "A server needs a url or a command" };
        faults.report(&[], text);
        return None;
    }
    let transport = server.get("transport").and_then(Value::as_str);
    if transport.is_some_and(|transport| (transport == "stdio") != has_command) {
        faults.report(&["transport"], "A server with a command has the transport stdio, one with a url another");
    }
    let foreign: &[&str] = if has_url { &OF_PROCESSES } else { &OF_REMOTES };
    for name in foreign.iter().filter(|name| server.contains_key(**name)) {
        let kind = if has_url { "a url" } else { "a command" };
        faults.report(&[name], format!("A server with {kind} has no {name}: send null to remove it"));
    }
    complete_auth(&mut faults, patch, &mut server);
    let mut lower: BTreeSet<String> = BTreeSet::new();
    for (name, _) in entries_of(&server, "headers") {
        if !lower.insert(name.to_ascii_lowercase()) {
            faults.report(&["headers", name], "Another header has this name");
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

/// Where faults of a server are reported, and whether there are any.
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

/// Removes what another strategy has left in `auth`, and a header that it replaces; reports what it lacks.
fn complete_auth(faults: &mut Faults<'_>, patch: &Map<String, Value>, server: &mut Map<String, Value>) {
    let Some(Value::Object(auth)) = server.get_mut("auth") else { return };
    let Some(fields) = auth.get("strategy").and_then(Value::as_str).and_then(fields_of_strategy) else {
        faults.report(&["auth", "strategy"], "It is missing");
        return;
    };
    auth.retain(|name, _| name == "strategy" || fields.contains(&name.as_str()));
    let sent = patch.get("auth").and_then(Value::as_object).into_iter().flatten();
    for (name, _) in sent.filter(|(name, value)| !value.is_null() && name.as_str() != "strategy") {
        if !fields.contains(&name.as_str()) {
            faults.report(&["auth", name], "This strategy has no such field");
        }
    }
    for name in fields.iter().filter(|name| matches!(**name, "value" | "username" | "password" | "headers")) {
        let is_there = match auth.get(*name) {
            Some(Value::String(text)) => !text.is_empty() || *name != "value",
            Some(Value::Object(entries)) => !entries.is_empty(),
            _ => false,
        };
        if !is_there {
            faults.report(&["auth", name], "It is missing, and no value is stored for it");
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
fn replaced(check: &mut Checker, stored: &Servers, lists: &Map<String, Value>, named: &Servers) -> Option<Servers> {
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
    // Servers by name beside the lists: those that are in a list, too, are as the list has them, unless they differ from what
    // is shown; those that fit into none stay.
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
        Some(key) if key == MASK => {
            if auth_of(&read).is_none() {
                check.within("api_key", |check| check.report_value_error(NO_STORED_VALUE, MASK.into()));
                return None;
            }
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

// ----- Parts of a stored server ---------------------------------------------------------------------------------------------

fn at<'v>(fields: &'v Map<String, Value>, place: &[&str]) -> Option<&'v Value> {
    let (first, rest) = place.split_first()?;
    rest.iter().try_fold(fields.get(*first)?, |value, step| match value {
        Value::Array(items) => items.get(step.parse::<usize>().ok()?),
        value => value.get(step),
    })
}

fn auth_of(server: &Map<String, Value>) -> Option<&Map<String, Value>> {
    server.get("auth")?.as_object()
}

fn entries_of<'v>(server: &'v Map<String, Value>, name: &str) -> impl Iterator<Item = (&'v String, &'v Value)> {
    server.get(name).and_then(Value::as_object).into_iter().flatten()
}

/// What a server's secrets are for: its URL, or its command with arguments and folder.
fn endpoint(server: &Map<String, Value>) -> [Option<&Value>; 4] {
    let args = server.get("args").filter(|args| args.as_array().is_some_and(|args| !args.is_empty()));
    let given = |name| server.get(name).filter(|value| !value.is_null());
    [given("url"), given("command"), args, given("cwd")]
}

/// Every secret of a server, with its place.
fn secret_places(server: &Map<String, Value>) -> Vec<(Vec<String>, &Value)> {
    fn collect<'v>(place: &[String], value: &'v Value, found: &mut Vec<(Vec<String>, &'v Value)>) {
        let mut below = |step: String, value: &'v Value| collect(&[place, &[step]].concat(), value, found);
        match value {
            Value::Object(fields) => fields.iter().for_each(|(name, value)| below(name.clone(), value)),
            Value::Array(items) => items.iter().enumerate().for_each(|(index, item)| below(index.to_string(), item)),
            Value::String(_) => found.push((place.to_vec(), value)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    for name in ["env", "headers"] {
        if let Some(value) = server.get(name) {
            collect(&[name.to_owned()], value, &mut found);
        }
    }
    // Stored by an earlier version, and not understood.
    if let Some(auth @ Value::String(_)) = server.get("auth") {
        found.push((vec!["auth".to_owned()], auth));
    }
    for (name, value) in auth_of(server).into_iter().flatten() {
        let place = |name: &str| ["auth".to_owned(), name.to_owned()];
        match (name.as_str(), value) {
            ("strategy" | "header_name", _) => {}
            ("authentication", Value::Object(fields)) => {
                for (key, value) in fields.iter().filter(|(key, _)| !PUBLIC_OAUTH.contains(&key.as_str())) {
                    collect(&[&place(name)[..], std::slice::from_ref(key)].concat(), value, &mut found);
                }
            }
            (name, value) => collect(&place(name), value, &mut found),
        }
    }
    found
}

/// Names of the headers that `auth` makes.
fn header_names(auth: &Map<String, Value>) -> Vec<String> {
    match auth.get("strategy").and_then(Value::as_str) {
        Some("api_key") => {
            let name = auth.get("header_name").and_then(Value::as_str).filter(|name| !name.is_empty());
            vec![name.unwrap_or("Authorization").to_owned()]
        }
        Some("bearer" | "basic" | "oauth2") => vec!["Authorization".to_owned()],
        Some("header") => entries_of(auth, "headers").map(|(name, _)| name.clone()).collect(),
        _ => Vec::new(),
    }
}

/// The headers that `auth` makes; `None` where it cannot make them yet, as OAuth without a token.
fn auth_headers(auth: &Map<String, Value>) -> Option<Vec<(String, String)>> {
    let text = |name: &str| auth.get(name).and_then(Value::as_str);
    let authorization = |value: String| vec![("Authorization".to_owned(), value)];
    match auth.get("strategy").and_then(Value::as_str)? {
        "none" => Some(Vec::new()),
        "bearer" => Some(authorization(format!("Bearer {}", text("value")?))),
        "api_key" => match text("header_name").filter(|name| !name.is_empty() && *name != "Authorization") {
            Some(name) => Some(vec![(name.to_owned(), text("value")?.to_owned())]),
            None => Some(authorization(format!("Bearer {}", text("value")?))),
        },
        "basic" => {
            let credentials = format!("{}:{}", text("username")?, text("password")?);
            Some(authorization(format!("Basic {}", STANDARD.encode(credentials))))
        }
        "header" => {
            entries_of(auth, "headers").map(|(name, value)| Some((name.clone(), value.as_str()?.to_owned()))).collect()
        }
        "oauth2" => {
            let token = at(auth, &["state", "tokens", "access_token"])?.as_str().filter(|token| !token.is_empty())?;
            Some(authorization(format!("Bearer {token}")))
        }
        _ => None,
    }
}

// ----- Showing --------------------------------------------------------------------------------------------------------------

/// The servers by name as answers show them; secrets in clear only with `expose`.
#[must_use]
pub fn shown(servers: &Servers, expose: bool) -> Map<String, Value> {
    servers.iter().map(|(name, server)| (name.clone(), shown_server(server, expose))).collect()
}

fn shown_server(server: &Value, expose: bool) -> Value {
    let Value::Object(server) = server else { return json!({}) };
    let known = FIELDS.iter().filter_map(|name| Some(((*name).to_owned(), server.get(*name)?.clone())));
    let mut shown: Value = Map::from_iter(known).into();
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

/// The servers as the field `mcp_config` shows them: in the lists of older clients as far as they fit, and all of them by name
/// beside the lists. Null when there are none.
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

/// A server as an entry of an older client's list, if it fits into one: it then works the same.
fn listed(name: &str, server: &Value, expose: bool) -> Option<(&'static str, Value)> {
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

// ----- Stored ---------------------------------------------------------------------------------------------------------------

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

// ----- For agents -----------------------------------------------------------------------------------------------------------

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
    fn new(servers: Servers) -> Self {
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
    let mut described = Map::from_iter(known.filter(|(_, value)| !value.is_null()));
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Sends a change: the places of its faults, without the servers' names in front if there are none.
    fn change(servers: &mut Servers, value: &Value) -> Vec<String> {
        let mut check = Checker::new("");
        if let Some(change) = McpChange::read(&mut check, value) {
            change.apply(&mut check, servers);
        }
        let Err(violations) = check.finish(Some(())) else { return Vec::new() };
        let shown = serde_json::to_string(&violations).expect("JSON");
        assert!(!shown.contains("canary"), "{shown}");
        violations
            .iter()
            .map(|violation| {
                let steps = violation.loc[1..].iter().map(|step| match step {
                    Loc::Key(key) => key.to_string(),
                    Loc::Index(index) => index.to_string(),
                });
                format!("{} {}", steps.collect::<Vec<_>>().join("."), violation.kind)
            })
            .collect()
    }

    #[track_caller]
    fn changed(servers: &mut Servers, value: &Value) {
        assert_eq!(change(servers, value), Vec::<String>::new(), "{value}");
    }

    /// One server of every kind.
    fn every_kind() -> Servers {
        let mut servers = Servers::new();
        changed(
            &mut servers,
            &json!({
                "plain": {"url": "https://plain.example/mcp"},
                "sse": {"url": "https://sse.example/sse", "transport": "sse"},
                "keyed": {"url": "https://keyed.example/mcp", "api_key": "canary-1", "timeout": 30.0},
                "other header": {"url": "https://o.example", "auth": {"strategy": "api_key", "value": "canary-2", "header_name": "X-Key"}},
                "bearer": {"url": "https://b.example", "transport": "streamable-http", "headers": {"Authorization": "Bearer canary-3", "X-A": "canary-4"}},
                "basic": {"url": "https://basic.example", "auth": {"strategy": "basic", "username": "canary-5", "password": ""}},
                "headers": {"url": "https://h.example", "auth": {"strategy": "header", "headers": {"X-B": "canary-6"}}},
                "open": {"url": "https://open.example", "auth": {"strategy": "none"}},
                "oauth": {"url": "https://oauth.example", "auth": {"strategy": "oauth2",
                    "authentication": {"type": "oauth", "client_id": "id", "client_secret": "canary-7"},
                    "state": {"tokens": {"access_token": "canary-8", "expires_in": 5, "more": ["canary-9"]}}}},
                "oauth-new": {"url": "https://oauth.example/new", "auth": "oauth"},
                "off": {"url": "https://off.example", "type": "http", "enabled": false, "sse_read_timeout": 1.5, "keep_alive": false,
                        "description": "d", "icon": "i"},
                "process": {"command": "npx", "args": ["-y", "x"], "env": {"T": "canary-10"}},
                "process with all": {"type": "stdio", "command": "/opt/my tool", "args": ["a"], "cwd": "/workspace", "env": {"U": "canary-11"},
                        "timeout": 2.5, "description": "d"},
                "bare": {"command": "uvx", "args": [], "env": {}},
            }),
        );
        servers
    }

    #[test]
    fn what_is_shown_and_sent_back_changes_nothing() {
        let before = every_kind();
        let by_name = Value::Object(shown(&before, false));
        assert!(!by_name.to_string().contains("canary"), "{by_name:#}");
        let whole = shown_with_lists(&before, false);
        assert!(!whole.to_string().contains("canary"), "{whole:#}");
        for (what, back) in [
            ("by name", by_name.clone()),
            ("in mcpServers", json!({"mcpServers": by_name})),
            ("lists and names", whole),
            ("by name, in clear", Value::Object(shown(&before, true))),
            ("lists and names, in clear", shown_with_lists(&before, true)),
        ] {
            let mut servers = before.clone();
            changed(&mut servers, &back);
            assert_eq!(servers, before, "{what}");
            assert!(servers.keys().eq(before.keys()), "{what}: the order");
        }
        for (name, server) in shown(&before, false) {
            let mut servers = before.clone();
            changed(&mut servers, &Value::Object(Map::from_iter([(name.clone(), server)])));
            assert_eq!(servers, before, "{name}");
        }
        assert_eq!(stored(&Value::Object(before.clone())), before, "what is stored is read as it is");
    }

    #[test]
    fn older_clients_see_the_servers_that_work_the_same_in_their_lists() {
        let all = shown_with_lists(&every_kind(), false);
        assert_eq!(all["sse_servers"], json!([{"url": "https://sse.example/sse", "api_key": null}]));
        assert_eq!(
            all["shttp_servers"],
            json!([{"url": "https://plain.example/mcp", "api_key": null, "timeout": null},
                   {"url": "https://keyed.example/mcp", "api_key": MASK, "timeout": 30}])
        );
        assert_eq!(
            all["stdio_servers"],
            json!([{"name": "process", "command": "npx", "args": ["-y", "x"], "env": {"T": MASK}},
                   {"name": "bare", "command": "uvx", "args": [], "env": {}}])
        );
        assert_eq!(
            all["oauth"]["auth"]["authentication"],
            json!({"type": "oauth", "client_id": "id", "client_secret": MASK})
        );
        assert_eq!(
            all["oauth"]["auth"]["state"]["tokens"],
            json!({"access_token": MASK, "expires_in": 5, "more": [MASK]})
        );
        assert_eq!(shown_with_lists(&Servers::new(), false), Value::Null);
    }

    #[test]
    fn lists_replace_all_servers_and_keep_what_they_mask() {
        let mut servers = every_kind();
        changed(
            &mut servers,
            &json!({
                "sse_servers": ["https://sse.example/sse", {"url": "https://new.example/sse", "api_key": "k"}],
                "stdio_servers": [{"name": "process", "command": "npx", "args": ["-y", "x"], "env": {"T": MASK, "V": "v"}}],
                "shttp_servers": [{"url": "https://keyed.example/mcp", "api_key": MASK, "timeout": 9}, {"url": "https://n.example"}],
            }),
        );
        assert_eq!(
            Value::Object(servers.clone()),
            json!({
                "sse": {"url": "https://sse.example/sse", "transport": "sse"},
                "keyed": {"url": "https://keyed.example/mcp", "auth": {"strategy": "api_key", "value": "canary-1"}, "timeout": 9},
                "process": {"command": "npx", "args": ["-y", "x"], "env": {"T": "canary-10", "V": "v"}},
                "sse_1": {"transport": "sse", "url": "https://new.example/sse", "auth": {"strategy": "api_key", "value": "k"}},
                "shttp": {"transport": "http", "url": "https://n.example", "timeout": 60},
            })
        );
        // A masked key does not go to another address, nor a masked variable to another program.
        assert_eq!(
            change(&mut servers, &json!({"shttp_servers": [{"url": "https://evil.example", "api_key": MASK}]})),
            ["shttp_servers.0.api_key value_error"]
        );
        let other = json!({"stdio_servers": [{"name": "process", "command": "sh", "args": [], "env": {"T": MASK}}]});
        assert_eq!(change(&mut servers, &other), ["stdio_servers.0.env.T value_error"]);
        changed(&mut servers, &json!({"sse_servers": []}));
        assert!(servers.is_empty());
    }

    /// Clients that know nothing of the servers by name beside the lists send them back.
    #[test]
    fn lists_with_servers_by_name_change_what_differs_from_what_was_shown() {
        let before = every_kind();
        let mut back = shown_with_lists(&before, false);
        back["shttp_servers"].as_array_mut().expect("a list").retain(|server| server["timeout"] == 30);
        back["sse_servers"] = json!([]);
        back["stdio_servers"][0]["args"] = json!(["-y", "x"]);
        back["off"]["enabled"] = json!(true);
        back["oauth"] = Value::Null;
        back["added"] = json!({"url": "https://added.example"});
        let mut servers = before.clone();
        changed(&mut servers, &back);
        let mut expected = before;
        for gone in ["plain", "sse", "oauth"] {
            expected.shift_remove(gone);
        }
        expected["off"].as_object_mut().expect("a server").shift_remove("enabled");
        expected.insert("added".to_owned(), json!({"url": "https://added.example"}));
        assert_eq!(servers, expected);
    }

    #[test]
    fn a_patch_is_merged_at_every_depth() {
        let mut servers = every_kind();
        changed(
            &mut servers,
            &json!({
                "bearer": {"headers": {"x-a": "canary-20", "X-C": "c"}, "timeout": 5},
                "process": {"env": {"V": "v"}, "args": ["-y", "x"]},
                "oauth": {"auth": {"state": {"tokens": {"expires_in": 6}}, "authentication": {"client_secret": null}}},
                "other header": {"auth": {"strategy": "bearer"}},
                "plain": null,
                "unknown": null,
                "off": {"enabled": true, "icon": null, "description": null, "keep_alive": null, "sse_read_timeout": null, "transport": null},
            }),
        );
        assert_eq!(
            servers["bearer"],
            json!({"url": "https://b.example", "transport": "streamable-http", "timeout": 5,
                   "auth": {"strategy": "bearer", "value": "canary-3"}, "headers": {"x-a": "canary-20", "X-C": "c"}})
        );
        assert_eq!(servers["process"]["env"], json!({"T": "canary-10", "V": "v"}));
        assert_eq!(
            servers["oauth"]["auth"]["state"]["tokens"],
            json!({"access_token": "canary-8", "expires_in": 6, "more": ["canary-9"]})
        );
        assert_eq!(servers["oauth"]["auth"]["authentication"], json!({"type": "oauth", "client_id": "id"}));
        assert_eq!(servers["other header"]["auth"], json!({"strategy": "bearer", "value": "canary-2"}));
        assert_eq!(servers["off"], json!({"url": "https://off.example"}));
        assert!(!servers.contains_key("plain") && !servers.contains_key("unknown"));
        changed(&mut servers, &json!({}));
        assert_eq!(servers.len(), 13);
        changed(&mut servers, &Value::Null);
        assert!(servers.is_empty());
    }

    #[test]
    fn a_header_and_auth_that_stand_for_the_same_credential_replace_each_other() {
        let with =
            |auth: Value| Servers::from_iter([("a".to_owned(), json!({"url": "https://a.example", "auth": auth}))]);
        let bearer = json!({"strategy": "bearer", "value": "old"});
        let key = json!({"strategy": "api_key", "value": "old", "header_name": "X-Key"});
        let basic = json!({"strategy": "basic", "username": "u", "password": "p"});
        for (stored, patch, expected) in [
            (
                &bearer,
                json!({"headers": {"authorization": "Bearer new"}}),
                json!({"auth": {"strategy": "bearer", "value": "new"}}),
            ),
            (
                &basic,
                json!({"headers": {"Authorization": "Bearer new"}}),
                json!({"auth": {"strategy": "bearer", "value": "new"}}),
            ),
            (
                &bearer,
                json!({"headers": {"Authorization": "Token new"}}),
                json!({"headers": {"Authorization": "Token new"}}),
            ),
            (&bearer, json!({"headers": {"Authorization": MASK}}), json!({"auth": bearer})),
            (
                &bearer,
                json!({"headers": {"Authorization": format!("Bearer {MASK}"), "X-A": "1"}}),
                json!({"auth": bearer, "headers": {"X-A": "1"}}),
            ),
            (&bearer, json!({"headers": {"Authorization": null}}), json!({})),
            (&bearer, json!({"headers": null}), json!({})),
            (&bearer, json!({"auth": null}), json!({})),
            (&key, json!({"headers": {"x-key": "new"}}), json!({"headers": {"x-key": "new"}})),
            (&key, json!({"headers": {"X-Other": "new"}}), json!({"auth": key, "headers": {"X-Other": "new"}})),
            (
                &key,
                json!({"auth": {"strategy": "bearer", "value": "new", "header_name": null}}),
                json!({"auth": {"strategy": "bearer", "value": "new"}}),
            ),
            (&key, json!({"auth": "text"}), json!({"auth": {"strategy": "bearer", "value": "text"}})),
            (&key, json!({"auth": MASK}), json!({"auth": key})),
            (&key, json!({"api_key": MASK}), json!({"auth": key})),
            (&bearer, json!({"api_key": "new"}), json!({"auth": {"strategy": "api_key", "value": "new"}})),
        ] {
            let mut servers = with(stored.clone());
            changed(&mut servers, &json!({"a": patch}));
            let mut expected = expected;
            expected["url"] = json!("https://a.example");
            assert_eq!(servers["a"], expected, "{stored} and {patch}");
        }
    }

    #[test]
    fn secrets_stay_with_their_endpoint() {
        for (patch, again) in [
            (json!({"keyed": {"url": "https://evil.example"}}), vec!["keyed.auth.value"]),
            (json!({"keyed": {"url": "https://evil.example", "api_key": MASK}}), vec!["keyed.auth.value"]),
            (
                json!({"keyed": {"url": "https://evil.example", "auth": {"strategy": "bearer"}}}),
                vec!["keyed.auth.value"],
            ),
            (
                json!({"bearer": {"url": "https://evil.example", "headers": {"X-A": MASK}}}),
                vec!["bearer.headers.X-A", "bearer.auth.value"],
            ),
            (json!({"bearer": {"url": "https://evil.example", "headers": {"X-A": "new"}}}), vec!["bearer.auth.value"]),
            (json!({"basic": {"url": "https://evil.example"}}), vec!["basic.auth.username", "basic.auth.password"]),
            (json!({"headers": {"url": "https://evil.example"}}), vec!["headers.auth.headers.X-B"]),
            (
                json!({"oauth": {"url": "https://evil.example"}}),
                vec![
                    "oauth.auth.authentication.client_secret",
                    "oauth.auth.state.tokens.access_token",
                    "oauth.auth.state.tokens.more.0",
                ],
            ),
            (json!({"process": {"command": "sh"}}), vec!["process.env.T"]),
            (json!({"process": {"args": ["-c", "env"]}}), vec!["process.env.T"]),
            (json!({"process": {"cwd": "/tmp"}}), vec!["process.env.T"]),
            (json!({"process": {"args": null, "env": {"T": MASK}}}), vec!["process.env.T"]),
            (json!({"process": {"command": null, "args": null, "url": "https://evil.example", "env": null}}), vec![]),
            (json!({"keyed": {"url": "https://evil.example", "auth": null}}), vec![]),
            (json!({"keyed": {"url": "https://evil.example", "api_key": "new"}}), vec![]),
            (json!({"bearer": {"url": "https://evil.example", "headers": null}}), vec![]),
            (
                json!({"bearer": {"url": "https://evil.example", "headers": {"Authorization": "Bearer new", "X-A": null}}}),
                vec![],
            ),
            // A server of another name: masks stand for nothing, unless it takes the place of the one with its endpoint.
            (json!({"new": {"url": "https://keyed.example/mcp", "api_key": MASK}}), vec!["new.auth.strategy"]),
            (json!({"new": {"url": "https://b.example", "headers": {"X-A": MASK}}}), vec!["new.headers.X-A"]),
            (
                json!({"bearer": null, "new": {"url": "https://evil.example", "headers": {"X-A": MASK}}}),
                vec!["new.headers.X-A"],
            ),
            (json!({"process": null, "new": {"command": "npx", "env": {"T": MASK}}}), vec!["new.env.T"]),
            (json!({"new": {"url": "https://n.example", "auth": {"strategy": "bearer"}}}), vec!["new.auth.value"]),
        ] {
            let before = every_kind();
            let mut servers = before.clone();
            let faults = change(&mut servers, &patch);
            let expected: Vec<String> = again.iter().map(|place| format!("{place} value_error")).collect();
            assert_eq!(faults, expected, "{patch}");
            assert_eq!(servers == before, !again.is_empty(), "{patch}: all or nothing");
        }
    }

    #[test]
    fn a_renamed_server_keeps_masked_secrets_while_its_endpoint_is_the_same() {
        let before = every_kind();
        for name in
            ["keyed", "other header", "bearer", "basic", "headers", "oauth", "process", "process with all", "off"]
        {
            let mut servers = before.clone();
            let shown = shown_server(&servers[name], false);
            changed(
                &mut servers,
                &Value::Object(Map::from_iter([(name.to_owned(), Value::Null), ("new".to_owned(), shown)])),
            );
            assert_eq!(servers["new"], before[name], "{name}");
            assert!(!servers.contains_key(name));
        }
        let mut servers = before.clone();
        let renamed = json!({"url": "https://b.example", "transport": "streamable-http",
                             "headers": {"Authorization": format!("Bearer {MASK}"), "X-A": MASK}});
        changed(&mut servers, &json!({"bearer": null, "new": renamed}));
        assert_eq!(servers["new"], before["bearer"]);
        // What the new entry does not name is gone: it is a whole entry.
        let mut servers = before;
        changed(&mut servers, &json!({"bearer": null, "new": {"url": "https://b.example"}}));
        assert_eq!(servers["new"], json!({"url": "https://b.example"}));
    }

    #[test]
    fn faults_name_the_place_and_no_value() {
        let long = "canary".repeat(20_000);
        let many: Map<String, Value> = (0..101).map(|n| (format!("H{n}"), json!("canary"))).collect();
        for (value, expected) in [
            (json!("canary"), " dict_type"),
            (json!(["canary"]), " dict_type"),
            (json!({"a": ["canary"]}), "a dict_type"),
            (json!({"a": "canary"}), "a dict_type"),
            (json!({"a": {"url": "https://a", "secret": "canary"}}), "a.secret extra_forbidden"),
            (json!({"a": {}}), "a value_error"),
            (json!({"a": {"url": "https://a", "command": "canary"}}), "a value_error"),
            (json!({"keyed": {"command": "canary"}}), "keyed value_error"),
            (json!({"keyed": {"url": null}}), "keyed value_error"),
            (json!({"a": {"url": {"k": "canary"}}}), "a.url string_type"),
            (json!({"a": {"url": "ftp://canary"}}), "a.url value_error"),
            (json!({"a": {"url": long}}), "a.url string_too_long"),
            (json!({"a": {"url": "https://a", "transport": "shttp"}}), "a.transport literal_error"),
            (json!({"a": {"url": "https://a", "type": "canary"}}), "a.type literal_error"),
            (json!({"a": {"url": "https://a", "type": "sse", "transport": "http"}}), "a.transport value_error"),
            (json!({"a": {"url": "https://a", "transport": "stdio"}}), "a.transport value_error"),
            (json!({"a": {"command": "a", "transport": "sse"}}), "a.transport value_error"),
            (json!({"a": {"command": "a", "headers": {"X": "canary"}}}), "a.headers value_error"),
            (json!({"a": {"url": "https://a", "env": {"X": "canary"}}}), "a.env value_error"),
            (json!({"a": {"url": "https://a", "headers": {"X Y": "canary"}}}), "a.headers.X Y value_error"),
            (json!({"a": {"url": "https://a", "headers": {"X": "canary\r\nY: z"}}}), "a.headers.X value_error"),
            (json!({"a": {"url": "https://a", "headers": {"X": 1}}}), "a.headers.X string_type"),
            (json!({"a": {"url": "https://a", "headers": {"X": "canary", "x": "canary"}}}), "a.headers.x value_error"),
            (json!({"a": {"url": "https://a", "headers": many}}), "a.headers too_long"),
            (json!({"a": {"url": "https://a", "headers": {"X": "canary".repeat(20_000)}}}), "a.headers.X too_long"),
            (json!({"a": {"url": "https://a", "auth": ["canary"]}}), "a.auth dict_type"),
            (json!({"a": {"url": "https://a", "auth": {"strategy": "canary"}}}), "a.auth.strategy literal_error"),
            (json!({"a": {"url": "https://a", "auth": {"value": "canary"}}}), "a.auth.strategy value_error"),
            (
                json!({"a": {"url": "https://a", "auth": {"strategy": "bearer", "token": "canary"}}}),
                "a.auth.token extra_forbidden",
            ),
            (
                json!({"a": {"url": "https://a", "auth": {"strategy": "none", "value": "canary"}}}),
                "a.auth.value value_error",
            ),
            (
                json!({"a": {"url": "https://a", "auth": {"strategy": "api_key", "value": "canary", "header_name": "X Y"}}}),
                "a.auth.header_name value_error",
            ),
            (json!({"a": {"url": "https://a", "auth": "canary", "api_key": "canary"}}), "a.api_key value_error"),
            (json!({"a": {"command": "a", "env": {"X=Y": "canary"}}}), "a.env.X=Y value_error"),
            (json!({"a": {"command": " "}}), "a.command value_error"),
            (json!({"a": {"command": "a", "args": "canary"}}), "a.args list_type"),
            (json!({"a": {"command": "a", "args": ["a", {"canary": 1}]}}), "a.args.1 string_type"),
            (json!({"a": {"command": "a", "args": vec!["canary"; 1001]}}), "a.args too_long"),
            (json!({"a": {"command": "a", "timeout": 0}}), "a.timeout value_error"),
            (json!({"a": {"command": "a", "timeout": "canary"}}), "a.timeout float_parsing"),
            (json!({"a": {"command": "a", "timeout": 86401}}), "a.timeout value_error"),
            (json!({"a": {"command": "a", "enabled": "canary"}}), "a.enabled bool_parsing"),
            (json!({" ": {"command": "a"}}), "  value_error"),
            (json!({"x".repeat(257): {"command": "a"}}), &format!("{} value_error", "x".repeat(257))),
            (json!({"mcpServers": ["canary"]}), "mcpServers dict_type"),
            (json!({"mcpServers": {"a": {"secret": "canary"}}}), "mcpServers.a.secret extra_forbidden"),
            (json!({"mcpServers": {"a": {}}}), "mcpServers.a value_error"),
            (json!({"mcpServers": {}, "a": {"url": "https://a"}}), "a extra_forbidden"),
            (json!({"sse_servers": ["ftp://canary"]}), "sse_servers.0.url value_error"),
            (json!({"sse_servers": "canary"}), "sse_servers list_type"),
            (
                json!({"shttp_servers": [{"url": "https://a", "api_key": ["canary"]}]}),
                "shttp_servers.0.api_key string_type",
            ),
            (json!({"shttp_servers": [{"url": "https://a", "timeout": 3601}]}), "shttp_servers.0.timeout value_error"),
            (json!({"stdio_servers": [{"name": "a b", "command": "c"}]}), "stdio_servers.0.name value_error"),
            (json!({"stdio_servers": [{"name": "a", "command": "c d"}]}), "stdio_servers.0.command value_error"),
            (
                json!({"stdio_servers": [{"name": "a", "command": "c"}, {"name": "a", "command": "d"}]}),
                "stdio_servers.1 value_error",
            ),
            (
                json!({"stdio_servers": [{"name": "a", "command": "c", "env": {"A": ["canary"]}}]}),
                "stdio_servers.0.env.A string_type",
            ),
        ] {
            let before = every_kind();
            let mut servers = before.clone();
            assert_eq!(change(&mut servers, &value), [expected], "{value}");
            assert_eq!(servers, before);
        }
        let too_many: Map<String, Value> = (0..101).map(|n| (format!("S{n}"), json!({"command": "a"}))).collect();
        assert_eq!(change(&mut Servers::new(), &Value::Object(too_many)), [" too_long"]);
        // All faults of a request at once.
        let both = json!({"a": {"command": "a", "timeout": 0, "secret": "canary"}, "b": {}, "sse_servers": ["x"]});
        assert_eq!(
            change(&mut Servers::new(), &both),
            ["a.timeout value_error", "a.secret extra_forbidden", "sse_servers.0.url value_error"]
        );
    }

    #[test]
    fn agents_get_the_form_that_all_agent_servers_accept() {
        let servers = McpServers::new(every_kind());
        assert_eq!(
            Value::Object(servers.for_agent()),
            json!({
                "plain": {"url": "https://plain.example/mcp"},
                "sse": {"url": "https://sse.example/sse", "transport": "sse"},
                "keyed": {"url": "https://keyed.example/mcp", "headers": {"Authorization": "Bearer canary-1"}, "timeout": 30},
                "other header": {"url": "https://o.example", "headers": {"X-Key": "canary-2"}},
                "bearer": {"url": "https://b.example", "transport": "streamable-http", "headers": {"X-A": "canary-4", "Authorization": "Bearer canary-3"}},
                "basic": {"url": "https://basic.example", "headers": {"Authorization": "Basic Y2FuYXJ5LTU6"}},
                "headers": {"url": "https://h.example", "headers": {"X-B": "canary-6"}},
                "open": {"url": "https://open.example"},
                "oauth": {"url": "https://oauth.example", "headers": {"Authorization": "Bearer canary-8"}},
                "process": {"command": "npx", "args": ["-y", "x"], "env": {"T": "canary-10"}},
                "process with all": {"command": "/opt/my tool", "args": ["a"], "cwd": "/workspace", "env": {"U": "canary-11"}, "timeout": 3},
                "bare": {"command": "uvx"},
            })
        );
        let secrets: Vec<&str> = servers.secrets().map(|secret| secrecy::ExposeSecret::expose_secret(secret)).collect();
        for number in 1..=11 {
            assert!(secrets.contains(&format!("canary-{number}").as_str()), "{number}: {secrets:?}");
        }
        for made in ["Bearer canary-1", "Bearer canary-3", "Basic Y2FuYXJ5LTU6", "Bearer canary-8"] {
            assert!(secrets.contains(&made), "{made}");
        }
        let shown = format!("{servers:?}");
        assert!(shown.contains("keyed") && !shown.contains("canary"), "{shown}");
        let in_urls = json!({"a": {"url": "https://u:canary-12@a.example/mcp?key=canary%2D13&v=1"}});
        let servers = McpServers::new(given(&in_urls).expect("valid"));
        let secrets: Vec<&str> = servers.secrets().map(|secret| secrecy::ExposeSecret::expose_secret(secret)).collect();
        assert_eq!(secrets, ["canary%2D13", "canary-12", "canary-13"]);
    }

    #[test]
    fn every_form_that_was_ever_stored_is_read() {
        let lists = json!({
            "sse_servers": ["https://a.example", {"url": "https://b.example", "api_key": "k"}],
            "stdio_servers": [{"name": "sse", "command": "c"}, {"name": "p", "command": "c", "args": ["x"], "env": {"A": "1"}}],
            "shttp_servers": [{"url": "https://c.example", "api_key": null, "timeout": 60}, {"url": "https://d.example", "timeout": null}],
        });
        assert_eq!(
            Value::Object(stored(&lists)),
            json!({
                "sse": {"transport": "stdio", "command": "c"},
                "p": {"transport": "stdio", "command": "c", "args": ["x"], "env": {"A": "1"}},
                "sse_1": {"transport": "sse", "url": "https://a.example"},
                "sse_2": {"transport": "sse", "url": "https://b.example", "auth": {"strategy": "api_key", "value": "k"}},
                "shttp": {"transport": "http", "url": "https://c.example", "timeout": 60},
                "shttp_1": {"transport": "http", "url": "https://d.example"},
            })
        );
        let wrapped = json!({"mcpServers": {"a": {"url": "https://a.example", "type": "sse"}}});
        assert_eq!(Value::Object(stored(&wrapped)), json!({"a": {"transport": "sse", "url": "https://a.example"}}));
        // What no version understood: it stays, shows no secret, and no agent gets it.
        let odd = json!({"a": {"secret": "canary", "auth": "canary\n", "env": {"A": ["canary"]}, "headers": "canary"}, "b": 1});
        let kept = stored(&odd);
        assert_eq!(kept["a"], odd["a"]);
        assert!(!Value::Object(shown(&kept, false)).to_string().contains("canary"));
        assert!(McpServers::new(kept).for_agent().is_empty());
        for nothing in [Value::Null, json!([]), json!("x"), json!({})] {
            assert!(stored(&nothing).is_empty());
        }
    }
}
