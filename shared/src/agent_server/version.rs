//! Agent server versions: parsing, comparison, and the features that depend on them.

use std::fmt;
use std::str::FromStr;

/// The first version that does not send streaming deltas to webhooks. Versions from 1.34 on send one event per token to webhooks; earlier
/// versions have no deltas.
pub const STREAMING: AgentServerVersion = AgentServerVersion::new(1, 49, 0);

/// The first tested version that reads `security_analyzer` and `agent.system_prompt` of the body that creates a conversation;
/// 1.15 ignores them.
pub const EXTENDED_CREATE: AgentServerVersion = AgentServerVersion::new(1, 34, 0);

/// The version of an agent server. Suffixes (`rc1`, `.dev3`, `+local`) are ignored: a pre-release has the routes of its release.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AgentServerVersion {
    major: u32,
    minor: u32,
    patch: u32,
}

impl AgentServerVersion {
    /// Creates the version `major.minor.patch`.
    #[must_use]
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { major, minor, patch }
    }

    /// Returns whether this version sends streaming deltas to websocket clients only.
    #[must_use]
    pub fn streams_to_clients_only(self) -> bool {
        self >= STREAMING
    }

    /// Returns whether a conversation can be created with a security analyzer and a system prompt.
    #[must_use]
    pub fn has_extended_create(self) -> bool {
        self >= EXTENDED_CREATE
    }
}

impl fmt::Display for AgentServerVersion {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// The error for a text that does not start with a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a version: it has to begin with two or three numbers, as in 1.58.2")]
pub struct InvalidVersion;

impl FromStr for AgentServerVersion {
    type Err = InvalidVersion;

    /// Parses `1.58.2`, `v1.58`, `1.58.2rc1`, `1.59.0.dev3+local`.
    fn from_str(text: &str) -> Result<Self, InvalidVersion> {
        let text = text.trim();
        let mut parts = text.strip_prefix('v').unwrap_or(text).split('.');
        // Only the last number may have a suffix: `1.58rc1` has no third part, and `1x.2` is not a version.
        let mut ended = false;
        let mut next = || -> Result<Option<u32>, InvalidVersion> {
            if ended {
                return Ok(None);
            }
            let Some(part) = parts.next() else { return Ok(None) };
            let digits = part.find(|character: char| !character.is_ascii_digit()).unwrap_or(part.len());
            ended = digits < part.len();
            if digits == 0 {
                return Ok(None);
            }
            part[..digits].parse().map(Some).map_err(|_| InvalidVersion)
        };
        let major = next()?.ok_or(InvalidVersion)?;
        let minor = next()?.ok_or(InvalidVersion)?;
        Ok(Self { major, minor, patch: next()?.unwrap_or_default() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_whatever_follows_their_numbers() {
        for (text, expected) in [
            ("1.58.2", (1, 58, 2)),
            (" v1.58.2 ", (1, 58, 2)),
            ("1.58", (1, 58, 0)),
            ("1.58.2rc1", (1, 58, 2)),
            ("1.58rc1", (1, 58, 0)),
            ("1.59.0.dev3", (1, 59, 0)),
            ("1.59.dev3", (1, 59, 0)),
            ("1.58.2+abc.1", (1, 58, 2)),
            ("1.58.2-python", (1, 58, 2)),
            ("10.0.100.7", (10, 0, 100)),
        ] {
            let (major, minor, patch) = expected;
            assert_eq!(text.parse(), Ok(AgentServerVersion::new(major, minor, patch)), "{text}");
        }
        for text in ["", "unknown", "1", "1.", "1x.2", ".1.2", "-1.2", "1.x", "99999999999.1", "one.two", "١.٢"] {
            assert_eq!(text.parse::<AgentServerVersion>(), Err(InvalidVersion), "{text}");
        }
    }

    #[test]
    fn versions_sort_as_numbers_and_show_as_they_are_written() {
        let version = |text: &str| text.parse::<AgentServerVersion>().expect("a version");
        assert!(version("1.9.0") < version("1.15.0") && version("1.58.2") < version("2.0.0"));
        assert!(version("1.49.1").streams_to_clients_only() && version("1.49.0rc1").streams_to_clients_only());
        assert!(!version("1.48.9").streams_to_clients_only() && !version("1.15.0").streams_to_clients_only());
        assert_eq!(version("1.58.2rc1").to_string(), "1.58.2");
    }
}
