//! The parts of a stored MCP server: its endpoint, its secrets, and the headers made from its credentials.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};

/// Keys of OAuth settings that contain no secret.
const PUBLIC_OAUTH: [&str; 5] = ["type", "client_auth_method", "scopes", "client_id", "client_name"];

pub(super) fn at<'v>(fields: &'v Map<String, Value>, place: &[&str]) -> Option<&'v Value> {
    let (first, rest) = place.split_first()?;
    rest.iter().try_fold(fields.get(*first)?, |value, step| match value {
        Value::Array(items) => items.get(step.parse::<usize>().ok()?),
        value => value.get(step),
    })
}

pub(super) fn auth_of(server: &Map<String, Value>) -> Option<&Map<String, Value>> {
    server.get("auth")?.as_object()
}

pub(super) fn entries_of<'v>(
    server: &'v Map<String, Value>,
    name: &str,
) -> impl Iterator<Item = (&'v String, &'v Value)> {
    server.get(name).and_then(Value::as_object).into_iter().flatten()
}

/// The endpoint to which a server's secrets belong: its URL, or its command with arguments and folder.
pub(super) fn endpoint(server: &Map<String, Value>) -> [Option<&Value>; 4] {
    let args = server.get("args").filter(|args| args.as_array().is_some_and(|args| !args.is_empty()));
    let given = |name| server.get(name).filter(|value| !value.is_null());
    [given("url"), given("command"), args, given("cwd")]
}

/// Every secret of a server, with its path.
pub(super) fn secret_places(server: &Map<String, Value>) -> Vec<(Vec<String>, &Value)> {
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
    // Stored by an earlier version in an unknown form.
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

/// The names of the headers made from `auth`.
pub(super) fn header_names(auth: &Map<String, Value>) -> Vec<String> {
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

/// The headers made from `auth`; `None` if `auth` is incomplete, such as OAuth without a token.
pub(super) fn auth_headers(auth: &Map<String, Value>) -> Option<Vec<(String, String)>> {
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

/// Rounds seconds up.
pub(super) fn whole_seconds(seconds: f64) -> u32 {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is clamped to the type's range")]
    let whole = seconds.ceil().clamp(1.0, f64::from(u32::MAX)) as u32;
    whole
}
