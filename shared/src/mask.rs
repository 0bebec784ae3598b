//! Masks secrets (redaction) in texts from other services before the texts are stored, returned in responses or logged.
//!
//! A service that refuses a request may quote the request in its error. [`secrets_in`] collects the secrets of a request, and [`masked`]
//! replaces them in a text.

use std::collections::BTreeSet;

use percent_encoding::percent_decode_str;
use reqwest::Url;
use serde_json::Value;

/// The replacement of a secret, as in the API's responses.
pub const MASK: &str = "**********";
/// The minimum length of a secret. Shorter texts are not masked: they would match everywhere, and are not secrets.
const SHORTEST: usize = 4;
/// The minimum length of a line from which the lines of a multi-line secret (a private key) are also masked individually.
const SHORTEST_LINE: usize = 12;
/// A string is a secret if its key contains one of these names.
const SECRET_NAMES: [&str; 8] =
    ["key", "token", "secret", "password", "passwd", "credential", "authorization", "cookie"];
/// Every string below one of these keys is a secret, at any depth.
const SECRET_CONTAINERS: [&str; 4] = ["headers", "extra_headers", "env", "args"];

/// Returns the strings of a JSON document that may be secrets by the names of their keys, and the user information and query of URLs.
#[must_use]
pub fn secrets_in(document: &Value) -> Vec<String> {
    let mut found = BTreeSet::new();
    collect(document, false, &mut found);
    found.into_iter().collect()
}

fn collect(value: &Value, is_secret: bool, found: &mut BTreeSet<String>) {
    match value {
        Value::String(text) if is_secret => {
            // An error may quote `Bearer TOKEN` without the scheme.
            found.extend(text.split_once(' ').map(|(_, token)| token.to_owned()));
            found.insert(text.clone());
            collect_from_url(text, found);
        }
        Value::String(text) => collect_from_url(text, found),
        Value::Array(items) => items.iter().for_each(|item| collect(item, is_secret, found)),
        Value::Object(fields) => {
            for (name, value) in fields {
                let name = name.to_ascii_lowercase();
                let is_container = is_secret || SECRET_CONTAINERS.contains(&name.as_str());
                let is_named = !name.contains("keyword")
                    && (name == "value" || SECRET_NAMES.iter().any(|secret| name.contains(secret)));
                // `secrets` may also contain descriptions and kinds, so its nested objects are searched by key.
                let holds_strings = match value {
                    Value::Object(fields) => fields.values().all(Value::is_string) && name == "secrets",
                    Value::String(_) | Value::Array(_) => true,
                    _ => false,
                };
                collect(value, is_container || (is_named && holds_strings), found);
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn collect_from_url(text: &str, found: &mut BTreeSet<String>) {
    if !text.contains("://") {
        return;
    }
    let Ok(url) = Url::parse(text) else { return };
    let query = url.query().unwrap_or_default();
    found.extend(url.query().map(ToOwned::to_owned));
    // Query values, both as written and decoded.
    found.extend(query.split('&').filter_map(|pair| Some(pair.split_once('=')?.1.to_owned())));
    found.extend(url.query_pairs().map(|(_, value)| value.into_owned()));
    // User name and password, both as written and decoded. The user name may be a key.
    for text in [Some(url.username()), url.password()].into_iter().flatten().filter(|text| !text.is_empty()) {
        found.insert(text.to_owned());
        found.insert(percent_decode_str(text).decode_utf8_lossy().into_owned());
    }
}

/// Returns the strings that [`masked`] replaces, the longest first: the secrets, their long lines, and the JSON-escaped form of both.
#[must_use]
pub fn forms<'a>(secrets: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let mut forms = BTreeSet::new();
    for secret in secrets {
        let lines = secret.lines().map(str::trim).filter(|line| line.len() >= SHORTEST_LINE);
        for form in lines.chain([secret]).filter(|form| form.len() >= SHORTEST) {
            forms.insert(form.to_owned());
            forms.insert(Value::from(form).to_string().trim_matches('"').to_owned());
        }
    }
    // Replace the longest first, because one secret may contain another.
    let mut forms: Vec<String> = forms.into_iter().collect();
    forms.sort_by_key(|form| std::cmp::Reverse(form.len()));
    forms
}

/// Replaces every secret in the text by [`MASK`], also in JSON-escaped form.
#[must_use]
pub fn masked<'a>(text: &str, secrets: impl IntoIterator<Item = &'a str>) -> String {
    forms(secrets)
        .iter()
        .fold(text.to_owned(), |text, form| if text.contains(form) { text.replace(form, MASK) } else { text })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn secrets_are_found_by_the_names_of_their_keys_and_in_urls() {
        let found = secrets_in(&json!({
            "llm": {"model": "openai/gpt-5", "api_key": "sk-1", "aws_secret_access_key": "aws-1", "base_url": "https://llm.example/v1"},
            "secrets": {
                "NPM": {"description": "for npm", "value": "npm-1", "kind": "StaticSecret"},
                "GITHUB_TOKEN": {"url": "https://app.example", "headers": {"X-Access-Token": "jws-1"}, "kind": "LookupSecret"},
            },
            "mcp_config": {"mcpServers": {
                "tavily": {"url": "https://mcp.tavily.com/mcp/?tavilyApiKey=tvly-1"},
                "stdio": {"command": "npx", "args": ["--token=arg-1"], "env": {"ANY": "env-1"}},
                "mine": {"url": "https://token-1:p%23w-1@mcp.example/", "headers": {"Authorization": "Bearer b-1"}},
            }},
            "skills": [{"name": "k", "content": "text", "trigger": {"keywords": ["word"]}}],
            "initial_message": {"content": [{"type": "text", "text": "hello"}]},
        }));
        let expected = [
            "--token=arg-1",
            "Bearer b-1",
            "aws-1",
            "b-1",
            "env-1",
            "jws-1",
            "npm-1",
            "p#w-1",
            "p%23w-1",
            "sk-1",
            "tavilyApiKey=tvly-1",
            "token-1",
            "tvly-1",
        ];
        assert_eq!(found, expected);
        assert_eq!(secrets_in(&json!({"secrets": {"PLAIN": "plain-1"}})), ["plain-1"]);
    }

    #[test]
    fn secrets_are_masked_in_every_form_in_which_they_may_come_back() {
        let key = "-----BEGIN KEY-----\nabcdefghijklmnop\n-----END KEY-----";
        for (text, secrets, expected) in [
            ("the key sk-1234 is bad", vec!["sk-1234"], "the key ********** is bad"),
            ("sk-1234-long and sk-1234", vec!["sk-1234", "sk-1234-long"], "********** and **********"),
            (r#"{"k": "a\"b\\c"}"#, vec![r#"a"b\c"#], r#"{"k": "**********"}"#),
            ("line abcdefghijklmnop of it", vec![key], "line ********** of it"),
            ("a 1 and on", vec!["1", "on", ""], "a 1 and on"),
        ] {
            assert_eq!(masked(text, secrets), expected);
        }
    }
}
