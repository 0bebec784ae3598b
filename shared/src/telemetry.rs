//! Logs: for people on a terminal, JSON for machines. Secrets are `SecretString`s, which print as `[REDACTED]`.

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// One coloured line an event.
    #[default]
    Text,
    /// One JSON object an event.
    Json,
}

/// Sets up logging to standard error for this process; the level comes from `RUST_LOG`, else `LOG_LEVEL`, else `info`.
/// A second call does nothing.
pub fn init(format: LogFormat) {
    let level = std::env::var("RUST_LOG").or_else(|_| std::env::var("LOG_LEVEL")).unwrap_or_default();
    let level = if level.is_empty() {
        "info,aws_config=warn,aws_smithy=warn,dynoxide=error,s3s=warn,s3s_fs=warn".to_owned()
    } else {
        level
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new(level))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    // An error here says that a subscriber is set already, by a test or an embedding program: theirs stays.
    let _already_set = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).with_current_span(true).try_init(),
    };
}
