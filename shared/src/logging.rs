//! Logging setup: text on a terminal, JSON for machines. Secrets are `SecretString`s, which print as `[REDACTED]`.

use std::io::IsTerminal as _;
use std::str::FromStr as _;

use tracing_subscriber::filter::{Targets, filter_fn};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer as _, fmt};

/// The format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One coloured line per event.
    #[default]
    Text,
    /// One JSON object per event.
    Json,
}

/// The default log levels.
const DEFAULT: &str = "info,aws_config=warn,aws_smithy=warn,dynoxide=error,s3s=warn,s3s_fs=warn";

/// Initialises logging to standard error for this process. The level comes from `RUST_LOG`, then from `LOG_LEVEL`, and is `info` otherwise.
/// Levels can be set per target: `info,hyper=warn`. A second call has no effect.
pub fn init(format: LogFormat) {
    let level = std::env::var("RUST_LOG").or_else(|_| std::env::var("LOG_LEVEL")).unwrap_or_default();
    let level = if level.is_empty() { DEFAULT } else { level.as_str() };
    // Not `EnvFilter`: its regular expressions are a considerable part of a cold start and of a function's size.
    let targets = Targets::from_str(level);
    let (targets, fault) = match targets {
        Ok(targets) => (targets, None),
        Err(fault) => (Targets::from_str(DEFAULT).unwrap_or_default(), Some(fault)),
    };
    let registry = tracing_subscriber::registry().with(targets);
    let layer = fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal()).with_target(false);
    // An error means that a test or an embedding program has already set a subscriber, which stays in use.
    let _already_set = match format {
        // The fields of the span would fill a line of a terminal. One process has all lines of a start.
        LogFormat::Text => registry.with(layer.with_filter(filter_fn(|metadata| !metadata.is_span()))).try_init(),
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
