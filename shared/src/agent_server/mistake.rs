//! Known causes of an agent server's errors: classifies an error as permanent or temporary, and as the user's or the operator's.
//!
//! An agent server (1.15 to 1.58) returns 500 for every exception that its code does not catch: a plugin that does not exist, a full disk,
//! a bug. The response has only the exception's text, not its type, so known causes are recognised by their texts. The texts were recorded
//! from running agent servers. A text that is not listed here is an unknown cause, which is retried a few times.

use serde_json::Value;

use crate::error::Fault;

/// A known cause of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// Who can correct the mistake.
    pub fault: Fault,
    /// Whether every retry of the same request fails again.
    pub is_permanent: bool,
    /// A message with the problem and the remedy. It repeats nothing of the response.
    pub advice: &'static str,
}

const fn user(is_permanent: bool, advice: &'static str) -> Mistake {
    Mistake { fault: Fault::User, is_permanent, advice }
}

const fn server(is_permanent: bool, advice: &'static str) -> Mistake {
    Mistake { fault: Fault::Server, is_permanent, advice }
}

const PLUGIN: Mistake =
    user(true, "A plugin cannot be loaded; correct its source, ref and repo_path in the request, or leave it out");
// Not permanent: a git server may be unreachable for a moment.
const PLUGIN_NOT_FETCHED: Mistake = user(
    false,
    "A plugin cannot be fetched; check that its source and ref exist and that the sandbox can read them without a password",
);
const MCP_SERVER_UNREACHABLE: Mistake =
    user(false, "An MCP server of the settings cannot be reached; correct it, or switch it off in the settings");
const MCP_SERVER: Mistake =
    user(true, "An MCP server of the settings is invalid; correct it, or switch it off in the settings");
const MODEL: Mistake =
    user(true, "The model's settings are invalid; correct the model, its key and its base URL in the settings");
const VERSION: Mistake = server(
    true,
    "The agent server lacks a tool or a prompt that the conversation uses; its version may not be one that this server supports",
);
const DISK_FULL: Mistake =
    server(true, "The disk of the sandbox is full; delete files or conversations in it, or use another sandbox");
const READ_ONLY: Mistake = server(true, "The agent server cannot write to the disk of its sandbox");
const NO_PERMISSION: Mistake =
    server(true, "The agent server lacks the permission for a file or folder of its sandbox");
const FOLDER: Mistake =
    server(true, "A file is where the agent server needs a folder, such as the working folder of the conversation");

/// Exception texts and their causes. A text matches a row if it contains all parts and starts with the first one.
const KNOWN_TEXTS: [(&[&str], Mistake); 19] = [
    (&["Local plugin path does not exist"], PLUGIN),
    (&["Subdirectory '", "not found in plugin repository"], PLUGIN),
    (&["Unable to parse plugin source"], PLUGIN),
    (&["Invalid GitHub shorthand format"], PLUGIN),
    (&["repo_path is not supported for local plugin sources"], PLUGIN),
    (&["Plugin directory not found"], PLUGIN),
    (&["Invalid JSON in ", "plugin.json"], PLUGIN),
    (&["Failed to parse manifest "], PLUGIN),
    (&["Failed to fetch plugin from "], PLUGIN_NOT_FETCHED),
    (&["Client failed to connect"], MCP_SERVER_UNREACHABLE),
    (&["No MCP servers defined in the config"], MCP_SERVER),
    (&["", "validation error", " for MCPConfig"], MCP_SERVER),
    (&["\"ToolDefinition '", "is not registered"], VERSION),
    (&["Unknown built-in tool class"], VERSION),
    (&["Prompt file ", " not found"], VERSION),
    (&["[Errno 28]"], DISK_FULL),
    (&["[Errno 30]"], READ_ONLY),
    (&["[Errno 13]"], NO_PERMISSION),
    (&["[Errno 17]"], FOLDER),
];

/// Parts of a conversation's body that users control, by their location prefixes.
const USER_PARTS: [(&[&str], Mistake); 10] = [
    (&["plugins"], PLUGIN),
    (&["hook_config"], user(true, "The hooks of the repository are invalid; correct its .openhands/hooks.json")),
    (&["secrets"], user(true, "A secret is invalid; correct its name or its value")),
    (&["agent", "agent_context", "secrets"], user(true, "A secret is invalid; correct its name or its value")),
    (
        &["agent", "agent_context", "skills"],
        user(true, "A skill is invalid; correct it, or disable it in the settings"),
    ),
    (&["agent", "mcp_config"], MCP_SERVER),
    (&["agent", "llm", "model"], MODEL),
    (&["agent", "llm", "api_key"], MODEL),
    (&["agent", "llm", "base_url"], MODEL),
    (&["initial_message"], user(true, "The first message is invalid; correct it in the request")),
];

/// Returns the cause of an uncaught exception by its text.
pub(super) fn of_exception(text: &str) -> Option<Mistake> {
    let text = text.trim_start();
    let fits = |parts: &[&str]| {
        parts.first().is_some_and(|first| text.starts_with(first)) && parts.iter().all(|part| text.contains(part))
    };
    KNOWN_TEXTS.iter().find(|(parts, _)| fits(parts)).map(|(_, mistake)| *mistake)
}

/// Returns the cause of a 422, whose text lists violations: a user's mistake if every violation is in a part that users control.
pub(super) fn of_violations(text: &str) -> Option<Mistake> {
    let violations: Vec<Value> = serde_json::from_str(text).ok()?;
    let mut mistakes = violations.iter().map(of_violation);
    let first = mistakes.next()??;
    mistakes.all(|mistake| mistake.is_some()).then_some(first)
}

fn of_violation(violation: &Value) -> Option<Mistake> {
    let place = violation["loc"].as_array()?.strip_prefix(&[Value::from("body")])?;
    // This server decides which fields a part has, and they differ between versions. Only hooks have the fields of a user's file.
    let is_shape = matches!(violation["type"].as_str(), Some("missing" | "extra_forbidden"));
    if is_shape && place.first().is_none_or(|part| part != "hook_config") {
        return None;
    }
    let begins_with =
        |part: &[&str]| part.len() <= place.len() && part.iter().zip(place).all(|(name, found)| found == *name);
    USER_PARTS.iter().find(|(part, _)| begins_with(part)).map(|(_, mistake)| *mistake)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_violation_is_the_users_where_users_decide() {
        let violation = |kind: &str, place: &[&str]| json!({"type": kind, "loc": place, "msg": "no"});
        let plugin = violation("value_error", &["body", "plugins", "0", "repo_path"]);
        let hook = violation("extra_forbidden", &["body", "hook_config", "no_such_event"]);
        let shape = violation("extra_forbidden", &["body", "agent", "mcp_config", "a", "nonsense"]);
        let ours = violation("value_error", &["body", "agent", "system_prompt_filename"]);
        for (violations, fault) in [
            (json!([plugin]), Some(Fault::User)),
            (json!([hook, plugin]), Some(Fault::User)),
            (json!([violation("value_error", &["body", "agent", "mcp_config", "a"])]), Some(Fault::User)),
            (json!([shape]), None),
            (json!([ours]), None),
            (json!([plugin, ours]), None),
            (json!([violation("missing", &["body", "agent"])]), None),
            (json!([violation("value_error", &["query", "plugins"])]), None),
            (json!([{"type": "value_error"}, "x"]), None),
            (json!([]), None),
            (json!("no list"), None),
        ] {
            let found = of_violations(&violations.to_string());
            assert_eq!(found.map(|mistake| mistake.fault), fault, "{violations}");
            assert!(found.is_none_or(|mistake| mistake.is_permanent), "{violations}");
        }
        assert_eq!(of_violations(r#"[{"type":"value_error","loc":["body","plugins"],"msg":"cut o"#), None);
    }

    #[test]
    fn a_text_counts_where_it_begins() {
        assert_eq!(of_exception("Subdirectory 'x' not found in plugin repository"), Some(PLUGIN));
        assert_eq!(of_exception("Subdirectory 'x' not found"), None);
        assert_eq!(of_exception("a step said: Local plugin path does not exist"), None);
        assert_eq!(of_exception(""), None);
    }
}
