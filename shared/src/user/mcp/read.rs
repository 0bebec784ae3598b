//! Reads MCP servers of requests, value by value.

use std::collections::BTreeSet;

use http::{HeaderName, HeaderValue};
use reqwest::Url;
use serde_json::{Map, Number, Value, json};

use super::server::whole_seconds;
use super::{FIELDS, HTTP, LISTS, SSE, STDIO, Servers, WRAPPER, fields_of_strategy};
use crate::http::pydantic::validation::{self, Checker, Fields, Loc};
use crate::http::secret::{self, MASK};

/// The most headers, and the most variables, of a server.
const MAX_ENTRIES: usize = 100;
/// The most arguments of a command, and the most entries of a list of older clients.
const MAX_LIST: usize = 1_000;
/// The longest text that is not a secret, in characters.
const MAX_TEXT: usize = 10_000;
/// The longest timeout, in seconds.
const MAX_SECONDS: f64 = 86_400.0;

/// Runs a reader whose violations must not contain the input.
pub(super) fn without_input<T>(check: &mut Checker, read: impl FnOnce(&mut Checker) -> Option<T>) -> Option<T> {
    fn report(check: &mut Checker, loc: &[Loc], violation: validation::Violation) {
        match loc {
            [] => check.report(violation.kind, violation.msg, MASK.into(), violation.ctx),
            [Loc::Key(key), rest @ ..] => {
                check.within(key.clone().into_owned(), |check| report(check, rest, violation));
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

pub(super) fn report_no_dictionary<T>(check: &mut Checker) -> Option<T> {
    check.report("dict_type", "Input should be a valid dictionary", MASK.into(), None);
    None
}

pub(super) fn report_unknown(check: &mut Checker) {
    check.report("extra_forbidden", "Extra inputs are not permitted", MASK.into(), None);
}

pub(super) fn read_servers<'v>(
    check: &mut Checker,
    given: impl Iterator<Item = (&'v String, &'v Value)>,
) -> Option<Servers> {
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
                        "A server's name must have 1 to {most} characters, none of them a control character, and must not be the name of a list"
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
                    check.report_value_error(format_args!("Contradicts {field}; send only one of them"), MASK.into());
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
        "cwd" if value.as_str().is_some_and(|folder| folder.trim().is_empty()) => Some(Value::Null),
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
    let url = url.trim();
    let parts = url.split_once("://").map(|(scheme, rest)| (scheme.to_ascii_lowercase(), rest));
    let read = parts.filter(|(scheme, rest)| {
        // URL parsers skip slashes before a host, and characters that HTTP clients reject.
        matches!(scheme.as_str(), "http" | "https" | "ws" | "wss")
            && !rest.starts_with(['/', '\\'])
            && !url.contains(char::is_control)
            && Url::parse(url).is_ok_and(|url| url.has_host())
    });
    let Some((scheme, rest)) = read else {
        check.report_value_error("URL must start with http, https, ws or wss and contain a host", MASK.into());
        return None;
    };
    // Agent servers compare the scheme case-sensitively.
    Some(format!("{scheme}://{rest}"))
}

/// Reads a text that is not blank.
fn read_word(check: &mut Checker, value: &Value) -> Option<String> {
    let text = validation::string_up_to(MAX_TEXT, check, value)?;
    let word = text.trim();
    if word.is_empty() || word.contains('\0') {
        check.report_value_error("Must not be blank or contain null characters", MASK.into());
        return None;
    }
    Some(word.to_owned())
}

fn read_args(check: &mut Checker, value: &Value) -> Option<Vec<String>> {
    let args = validation::list(check, value, |check, arg| {
        let arg = validation::string_up_to(MAX_TEXT, check, arg)?;
        if arg.contains('\0') {
            check.report_value_error("An argument must not contain null characters", MASK.into());
            return None;
        }
        Some(arg)
    })?;
    if args.len() > MAX_LIST {
        secret::report_too_long(check, "List", MAX_LIST, args.len());
        return None;
    }
    Some(args)
}

/// Reads a number of seconds. Whole numbers become integers, as older agent servers require.
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
        check.report_value_error(
            "A variable must have a name without =, and a value without null characters",
            MASK.into(),
        );
        return None;
    }
    Some(value.to_owned())
}

fn read_header(check: &mut Checker, name: &str, value: &Value) -> Option<String> {
    if name.len() > secret::MAX_NAME || HeaderName::from_bytes(name.as_bytes()).is_err() {
        check.report_value_error("Not a valid name of an HTTP header", MASK.into());
        return None;
    }
    read_header_value(check, value)
}

/// Reads a secret that is sent in a header, without the blanks around it.
fn read_header_value(check: &mut Checker, value: &Value) -> Option<String> {
    let value = secret::value(check, value)?.trim();
    if !value.is_ascii() || HeaderValue::from_str(value).is_err() {
        check.report_value_error("A header's value must contain only printable ASCII characters", MASK.into());
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
            ("username" | "password", value) => {
                let text = secret::value(check, value)?;
                if name == "username" && text.contains(':') {
                    check.report_value_error("A username must not contain a colon", MASK.into());
                    return None;
                }
                Some(text.into())
            }
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
pub(super) fn read_list(
    check: &mut Checker,
    list: &str,
    servers: &Value,
    names: &mut BTreeSet<String>,
) -> Option<Vec<Value>> {
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
                    check.report_value_error("Another server has the same name", MASK.into());
                }
                read
            })
        })
        .collect();
    read.into_iter().collect()
}

/// Reports fields of a server that an entry of a list does not support: without them the server would fail for no visible reason.
fn report_lost(check: &mut Checker, server: &Value, held: &[&str]) {
    let lost =
        FIELDS.iter().filter(|name| !held.contains(name) && !matches!(**name, "transport" | "description" | "icon"));
    for name in lost {
        let value = server.get(*name).unwrap_or(&Value::Null);
        let is_empty = value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty);
        // `enabled: true` is the default and loses nothing.
        if !(value.is_null() || is_empty || *value == true || *value == "") {
            check.within(*name, |check| {
                check.report_value_error(
                    "The lists do not support this field; send the server by its name, in a map",
                    MASK.into(),
                );
            });
        }
    }
}

/// Splits arguments in one text, which the forms of older clients send, as a shell does.
fn read_words(check: &mut Checker, line: &str) -> Option<Vec<String>> {
    let Some(words) = super::words::split(line) else {
        check.report_value_error("The arguments end within a quote or after a backslash", MASK.into());
        return None;
    };
    read_args(check, &words.into())
}

/// Reads variables in one text, which the forms of older clients send: `A=b,C=d`.
fn read_pairs(check: &mut Checker, pairs: &str) -> Option<Value> {
    let pairs = pairs.split(',').map(str::trim).filter(|pair| !pair.is_empty());
    let read: Option<Map<String, Value>> = pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=')?;
            let name = name.trim();
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
            let is_name =
                name.bytes().all(is_plain) && name.bytes().next().is_some_and(|first| !first.is_ascii_digit());
            is_name.then(|| (name.to_owned(), value.into()))
        })
        .collect();
    if read.is_none() {
        check.report_value_error(
            "Variables in one text must be written as NAME=value, separated by commas",
            MASK.into(),
        );
    }
    read.map(Value::Object)
}

/// Reads `{"url", "api_key"?, "timeout"?}`, or only the URL. Absent fields stay absent.
fn read_listed_url(check: &mut Checker, list: &str, server: &Value) -> Option<Value> {
    let server = match server {
        Value::String(url) => &json!({"url": url}),
        other => other,
    };
    let fields = Fields::of(check, server)?;
    report_lost(check, server, &["url", "api_key", "timeout"]);
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

/// Reads `{"name", "command", "args"?, "env"?}`.
fn read_listed_process(check: &mut Checker, server: &Value) -> Option<Value> {
    let fields = Fields::of(check, server)?;
    report_lost(check, server, &["command", "args", "env"]);
    let name = fields.required(check, "name", |check, value| {
        let name = validation::string_up_to(secret::MAX_NAME, check, value)?;
        let name = name.trim();
        if !is_listed_name(name) {
            check.report_value_error(
                "A server's name must contain only letters, digits, hyphens and underscores",
                MASK.into(),
            );
            return None;
        }
        Some(name.to_owned())
    });
    let command = fields.required(check, "command", |check, value| {
        let command = read_word(check, value)?;
        if command.contains(char::is_whitespace) {
            check.report_value_error("A command must be a single word; put its arguments into args", MASK.into());
            return None;
        }
        Some(command)
    });
    let args = fields.nullable(check, "args", |check, value| match value {
        Value::String(line) => read_words(check, line),
        Value::Object(none) if none.is_empty() => Some(Vec::new()),
        value => read_args(check, value),
    });
    let args = args.map(Option::unwrap_or_default);
    let env = fields.nullable(check, "env", |check, value| {
        let value = match value {
            Value::String(pairs) => &read_pairs(check, pairs)?,
            Value::Array(none) if none.is_empty() => &json!({}),
            value => value,
        };
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

pub(super) fn is_listed_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
    !name.is_empty()
        && name.len() <= secret::MAX_NAME
        && name.bytes().all(plain)
        && !LISTS.contains(&name)
        && name != WRAPPER
}
