//! Environment variables: parsing, and the error that names an invalid variable.

use std::env;
use std::str::FromStr;

/// The error for a missing or invalid variable.
#[derive(Debug, thiserror::Error)]
#[error("environment variable {name}: {problem}")]
pub struct ConfigError {
    pub(crate) name: &'static str,
    pub(crate) problem: String,
}

/// Returns the public URL of this API: `OH_WEB_URL`, or `https://` and `WEB_HOST`; a `WEB_HOST` with a scheme is used unchanged.
pub(crate) fn web_url() -> Option<String> {
    let of_host = |host: String| if host.contains("://") { host } else { format!("https://{host}") };
    text("OH_WEB_URL").or_else(|| text("WEB_HOST").map(of_host))
}

/// Reads a comma-separated list.
pub(crate) fn list(name: &str) -> Vec<String> {
    text(name)
        .map(|list| list.split(',').map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect())
        .unwrap_or_default()
}

/// Returns the CORS origins of hosted front ends: `PERMITTED_CORS_ORIGINS`, a comma-separated list.
#[must_use]
pub fn permitted_origins() -> Vec<String> {
    list("PERMITTED_CORS_ORIGINS")
}

/// Returns a variable if it is set and not blank.
#[must_use]
pub fn text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.trim().is_empty())
}

pub(crate) fn required(name: &'static str) -> Result<String, ConfigError> {
    text(name).ok_or_else(|| ConfigError { name, problem: "is not set".into() })
}

pub(crate) fn parsed<T: FromStr>(name: &'static str) -> Result<Option<T>, ConfigError> {
    text(name)
        .map(|value| {
            value.trim().parse().map_err(|_| ConfigError { name, problem: format!("`{value}` is not a number") })
        })
        .transpose()
}

pub(crate) fn flag(name: &'static str, default: bool) -> Result<bool, ConfigError> {
    match text(name).map(|value| value.trim().to_ascii_lowercase()).as_deref() {
        None => Ok(default),
        Some("1" | "true" | "yes" | "on") => Ok(true),
        Some("0" | "false" | "no" | "off") => Ok(false),
        Some(other) => Err(ConfigError { name, problem: format!("`{other}` is neither true nor false") }),
    }
}
