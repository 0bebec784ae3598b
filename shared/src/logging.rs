//! Logs: for people on a terminal, JSON for machines. Secrets are `SecretString`s, which print as `[REDACTED]`.

use std::io::IsTerminal as _;
use std::str::FromStr as _;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One coloured line an event.
    #[default]
    Text,
    /// One JSON object an event.
    Json,
}

/// What is logged unless the environment says otherwise.
const DEFAULT: &str = "info,aws_config=warn,aws_smithy=warn,dynoxide=error,s3s=warn,s3s_fs=warn";

/// Sets up logging to standard error for this process; the level comes from `RUST_LOG`, else `LOG_LEVEL`, else it is `info`. Levels
/// may be given by target: `info,hyper=warn`. A second call does nothing.
pub fn init(format: LogFormat) {
    let level = std::env::var("RUST_LOG").or_else(|_| std::env::var("LOG_LEVEL")).unwrap_or_default();
    let level = if level.is_empty() { DEFAULT } else { level.as_str() };
    // Not `EnvFilter`, whose regular expressions are a good part of a cold start, and of a function's size.
    let targets = Targets::from_str(level);
    let (targets, fault) = match targets {
        Ok(targets) => (targets, None),
        Err(fault) => (Targets::from_str(DEFAULT).unwrap_or_default(), Some(fault)),
    };
    let registry = tracing_subscriber::registry().with(targets);
    let layer = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal()).with_target(false);
    // An error here says that a subscriber is set already, by a test or an embedding program: theirs stays.
    let _already_set = match format {
        LogFormat::Text => registry.with(layer).try_init(),
        LogFormat::Json => registry.with(layer.json().flatten_event(true).with_span_list(false)).try_init(),
    };
    if let Some(fault) = fault {
        tracing::warn!(%fault, level, "logging.level_invalid");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_understood() {
        let targets = Targets::from_str(DEFAULT).expect("a level");
        assert!(targets.would_enable("shared::start", &tracing::Level::INFO));
        assert!(!targets.would_enable("shared::start", &tracing::Level::DEBUG));
        assert!(!targets.would_enable("aws_config::region", &tracing::Level::INFO));
    }
}
