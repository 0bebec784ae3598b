//! Secrets in requests: how they are read, and how large they may be. No violation contains a secret.
//!
//! A secret is a variable in the agent's terminal: the agent server types `export NAME=$'value'` into bash, in one line for all
//! secrets that a command names. A name that bash rejects ends the line, so that the agent does not get the secrets after it.
//! A command names a secret wherever its text contains the name, in any case of letters: `$MY_KEY` also names `KEY`.

use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::pydantic::validation::{self, Checker};

/// The text that responses show in place of a secret's value. A client that sends it back leaves the secret unchanged.
pub const MASK: &str = "**********";
/// The most secrets of a user, or of the request of a start.
pub const MAX_SECRETS: usize = 50;
/// A secret without its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = SecretName))]
pub struct SecretNameOut {
    pub name: String,
    /// What the secret is for.
    pub description: Option<String>,
}

/// The longest name, in characters.
pub const MAX_NAME: usize = 256;
/// The longest value, in bytes.
pub const MAX_VALUE: usize = 64 * 1024;

/// The longest line of `export`s that the agent's terminal accepts, in bytes: tmux refuses messages of more than 16 KiB.
const MAX_EXPORT: usize = 16_000;
/// The separator between two exports of a line.
const SEPARATOR: &str = " && ";
const TOO_LONG: &str = "the agent's terminal accepts 16,000 bytes at once, quotes and name included";
const TOO_LONG_WITH_OTHERS: &str = "the agent's terminal accepts 16,000 bytes at once, and other secrets are set with this one, because \
                                    their names are parts of its name";

/// Variables that bash keeps read-only, sets itself, or changes its behavior with, as tried in the terminals of agent servers.
const OF_SHELL: &[&str] = &[
    "BASH",
    "BASHOPTS",
    "BASHPID",
    "CDPATH",
    "COLUMNS",
    "COMPREPLY",
    "DIRSTACK",
    "ENV",
    "EPOCHREALTIME",
    "EPOCHSECONDS",
    "EUID",
    "EXECIGNORE",
    "FUNCNAME",
    "FUNCNEST",
    "GLOBIGNORE",
    "GROUPS",
    "HISTCMD",
    "IFS",
    "LINENO",
    "LINES",
    "MAILCHECK",
    "OLDPWD",
    "OPTIND",
    "PIPESTATUS",
    "POSIXLY_CORRECT",
    "PPID",
    "PROMPT_COMMAND",
    "PS0",
    "PS1",
    "PS2",
    "PS4",
    "PWD",
    "RANDOM",
    "SECONDS",
    "SHELLOPTS",
    "SRANDOM",
    "TMOUT",
    "UID",
    "_",
    "histchars",
];
const OF_SHELL_PREFIXES: &[&str] = &["BASH_", "COMP_"];
/// Variables without which programs do not run, and those of the dynamic linker.
const OF_PROGRAMS: &[&str] = &["HOME", "PATH", "SHELL", "TERM", "TMPDIR"];
const OF_PROGRAMS_PREFIXES: &[&str] = &["LD_"];
/// Variables that configure the sandbox, and the prefix of those that control models. The reference rejects them in any case of letters.
const OF_SANDBOX: &[&str] = &[
    "ENV_LOG_LEVEL",
    "LOG_JSON",
    "OH_ALLOW_CORS_ORIGINS_0",
    "OH_BASH_EVENTS_DIR",
    "OH_CONVERSATIONS_PATH",
    "OH_ENABLE_VNC",
    "OH_WEBHOOKS_0_BASE_URL",
    "OPENVSCODE_SERVER_ROOT",
    "PYTHONUNBUFFERED",
    "WORKER_1",
    "WORKER_2",
];
const OF_SANDBOX_PREFIXES: &[&str] = &["LLM_"];

/// Returns why a name is invalid; `None` when it is valid.
#[must_use]
pub fn fault_of_name(name: &str) -> Option<&'static str> {
    let is_variable = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && name.bytes().next().is_some_and(|first| !first.is_ascii_digit());
    let is_one_of = |name: &str, names: &[&str], prefixes: &[&str]| {
        names.contains(&name) || prefixes.iter().any(|prefix| name.starts_with(prefix))
    };
    if !is_variable {
        Some(
            "a secret becomes an environment variable; its name must contain only letters, digits and underscores \
             (A-Z, a-z, 0-9, _) and must not start with a digit",
        )
    } else if is_one_of(name, OF_SHELL, OF_SHELL_PREFIXES) {
        Some("bash sets a variable of this name itself, or changes its behavior with it")
    } else if is_one_of(name, OF_PROGRAMS, OF_PROGRAMS_PREFIXES)
        || is_one_of(&name.to_ascii_uppercase(), OF_SANDBOX, OF_SANDBOX_PREFIXES)
    {
        Some("programs in the sandbox depend on the variable of this name")
    } else {
        None
    }
}

/// Returns why a value is invalid; `None` when it is valid.
#[must_use]
pub fn fault_of_value(value: &str) -> Option<&'static str> {
    let is_typed = |byte: u8| !byte.is_ascii_control() || matches!(byte, b'\t' | b'\n' | b'\r');
    (!value.bytes().all(is_typed)).then_some(
        "the agent's terminal accepts no control characters except tabs and line breaks; encode it, for example as Base64",
    )
}

/// Which secrets the agent's terminal cannot set.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct InTerminal {
    /// The names of secrets that cannot be set, by the reason. They are left out, because no secret of a command is set if one of them fails.
    pub left_out: BTreeMap<&'static str, Vec<String>>,
    /// The names of the longest other secrets, which are too long together: a command that names all of them gets no secret.
    pub too_long_together: Vec<String>,
}

/// Checks which secrets, given as names and values, the agent's terminal can set.
#[must_use]
pub fn in_terminal<'a>(secrets: impl IntoIterator<Item = (&'a str, &'a str)>) -> InTerminal {
    let mut secrets = secrets.into_iter().collect::<Vec<_>>();
    // Sorted so that a name comes after the names that are part of it.
    secrets.sort_by_key(|(name, _)| (name.len(), *name));
    let mut found = InTerminal::default();
    let mut set: Vec<(&str, String, usize)> = Vec::new();
    for (name, value) in secrets {
        let (lower, length) = (name.to_ascii_lowercase(), export_length(name, value));
        let fault = fault_of_name(name).or_else(|| fault_of_value(value)).or_else(|| {
            let parts = set.iter().filter(|(_, part, _)| lower.contains(part.as_str()));
            let with_parts = length + parts.map(|(_, _, length)| SEPARATOR.len() + length).sum::<usize>();
            (length > MAX_EXPORT)
                .then_some(TOO_LONG)
                .or_else(|| (with_parts > MAX_EXPORT).then_some(TOO_LONG_WITH_OTHERS))
        });
        match fault {
            Some(fault) => found.left_out.entry(fault).or_default().push(name.to_owned()),
            None => set.push((name, lower, length)),
        }
    }
    set.sort_by_key(|(_, _, length)| std::cmp::Reverse(*length));
    let (mut line, mut is_too_long) = (0, false);
    for (name, _, length) in set {
        let with_this = line + length + if line == 0 { 0 } else { SEPARATOR.len() };
        if with_this > MAX_EXPORT {
            is_too_long = true;
        } else if is_too_long {
            return found;
        } else {
            line = with_this;
        }
        found.too_long_together.push(name.to_owned());
    }
    if !is_too_long {
        found.too_long_together.clear();
    }
    found
}

/// The size of a secret's `export`, in bytes.
fn export_length(name: &str, value: &str) -> usize {
    let escapes = value.bytes().filter(|byte| matches!(byte, b'\\' | b'\'' | b'\t' | b'\n' | b'\r')).count();
    "export =$''".len() + name.len() + value.len() + escapes
}

/// Reads a name. Violations: `string_type`, `string_too_long`, `value_error`.
pub fn name(check: &mut Checker, value: &Value) -> Option<String> {
    let name = validation::string_up_to(MAX_NAME, check, value)?;
    if let Some(fault) = fault_of_name(&name) {
        check.report_value_error(fault, value.clone());
        return None;
    }
    Some(name)
}

/// Reads the value of a variable, untrimmed. Violations: those of [`value`], and `value_error`.
pub fn value_of_variable<'v>(check: &mut Checker, given: &'v Value) -> Option<&'v str> {
    let text = value(check, given)?;
    if let Some(fault) = fault_of_value(text) {
        check.report_value_error(fault, MASK.into());
        return None;
    }
    Some(text)
}

/// Reads a value, untrimmed. Violations: `string_type`, `too_long`.
pub fn value<'v>(check: &mut Checker, value: &'v Value) -> Option<&'v str> {
    let Value::String(text) = value else {
        check.report("string_type", "Input should be a valid string", MASK.into(), None);
        return None;
    };
    if text.len() > MAX_VALUE {
        report_too_long(check, "Value", MAX_VALUE, text.len());
        return None;
    }
    Some(text)
}

/// Reports `too_long` for a value that is a secret or contains secrets.
pub fn report_too_long(check: &mut Checker, what: &str, most: usize, found: usize) {
    check.report_too_long(what, most, found, MASK.into());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_must_be_variables_that_a_shell_can_set() {
        for name in [
            "A",
            "_A",
            "a1",
            "GITHUB_TOKEN",
            "github_token",
            "AWS_SECRET_ACCESS_KEY",
            "OPENAI_API_KEY",
            "HOMEPAGE",
            "PATHS",
            "BASHFUL",
            "LDAP_PASSWORD",
            "COMPANY",
            "REPLY",
            "USER",
            "OH_MY_KEY",
            "__",
            "LANG",
            "Path",
            "uid",
            "LLM",
            "WORKER_10",
        ] {
            assert_eq!(fault_of_name(name), None, "{name}");
        }
        for name in [
            "",
            " ",
            "A B",
            " A",
            "A ",
            "MY_DUMMY-SECRET",
            "1ST",
            "$(id)",
            "ünï",
            "A=B",
            "A/B",
            "A.B",
            "A\n",
            "A\0",
            "-A",
            "A;B",
            "Ａ",
            "UID",
            "EUID",
            "PPID",
            "SHELLOPTS",
            "BASHOPTS",
            "BASH_VERSINFO",
            "BASH_ENV",
            "IFS",
            "PATH",
            "HOME",
            "LD_PRELOAD",
            "LD_LIBRARY_PATH",
            "PS1",
            "PROMPT_COMMAND",
            "TMOUT",
            "_",
            "COMP_WORDS",
            "histchars",
            "HISTCMD",
            "LLM_MODEL",
            "llm_api_key",
            "WORKER_1",
            "OH_WEBHOOKS_0_BASE_URL",
            "log_json",
        ] {
            assert!(fault_of_name(name).is_some(), "{name}");
        }
    }

    #[test]
    fn values_are_texts_that_a_terminal_accepts() {
        for value in ["", "x", "-----BEGIN KEY-----\r\nAA==\r\n", "a\tb", "'\"\\$`!", "ünï 😀", "\u{85}\u{2028}"] {
            assert_eq!(fault_of_value(value), None, "{value:?}");
        }
        for value in ["a\0b", "\u{1b}[31m", "\u{3}", "\u{4}", "\u{1a}", "\u{7f}", "\u{8}", "\u{7}"] {
            assert!(fault_of_value(value).is_some(), "{value:?}");
        }
    }

    /// Names that are left out, and those that are too long together.
    fn judged(secrets: &[(&str, &str)]) -> (Vec<String>, Vec<String>) {
        let found = in_terminal(secrets.iter().copied());
        (found.left_out.into_values().flatten().collect(), found.too_long_together)
    }

    #[test]
    fn a_line_of_exports_has_a_length() {
        for (length, letter, fits) in
            [(15_988, "x", true), (15_989, "x", false), (7_994, "'", true), (7_995, "\n", false), (7_994, "é", true)]
        {
            let (left_out, together) = judged(&[("A", &letter.repeat(length))]);
            assert_eq!((left_out.is_empty(), together.len()), (fits, 0), "{length} of {letter:?}");
        }
    }

    #[test]
    fn secrets_share_the_line_of_a_command_that_names_them() {
        /// Secrets, those that are left out, and those that are too long together.
        type Case<'a> = (&'a [(&'a str, &'a str)], &'a [&'a str], &'a [&'a str]);
        let (half, long, third) = ("x".repeat(7_986), "x".repeat(9_000), "x".repeat(6_000));
        let cases: [Case<'_>; 11] = [
            (&[], &[], &[]),
            (&[("A", &half), ("B", &half)], &[], &[]),
            (&[("A", &half), ("BC", &half), ("D", "small")], &[], &["BC", "A"]),
            (&[("A", &long), ("D", "small"), ("B", &long)], &[], &["A", "B"]),
            (&[("A", &long), ("D", "small"), ("B", &long), ("C", &long)], &[], &["A", "B", "C"]),
            (&[("C", &third), ("A", &third), ("B", &third)], &[], &["A", "B", "C"]),
            (&[("C", &third), ("A", &long), ("B", &third), ("D", "small")], &[], &["A", "B", "C"]),
            // A command that contains the longer name contains the shorter one as well.
            (&[("MY_KEY", &long), ("KEY", &long)], &["MY_KEY"], &[]),
            (&[("key", &long), ("KEYS", &long)], &["KEYS"], &[]),
            (&[("KEY", &long), ("key", &long)], &["key"], &[]),
            (&[("A_B", &third), ("A", &third), ("B", &third)], &["A_B"], &[]),
        ];
        for (secrets, left_out, together) in cases {
            let names = secrets.iter().map(|(name, _)| name).collect::<Vec<_>>();
            let (found_left_out, found_together) = judged(secrets);
            assert_eq!(found_left_out, left_out, "{names:?}");
            assert_eq!(found_together, together, "{names:?}");
        }
    }
}
