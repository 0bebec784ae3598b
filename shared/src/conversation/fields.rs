//! Enums and text fields of conversation records that requests set, and their validation.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::MAX_NAME;
use crate::http::pydantic::validation::{Checker, Fields, string_up_to, wire_enum};
use crate::user::git::without_credentials;

wire_enum! {
    /// What started a conversation.
    pub enum Trigger {
        /// The issue resolver.
        Resolver = "resolver",
        Gui = "gui",
        /// A task that the UI suggested.
        SuggestedTask = "suggested_task",
        OpenhandsApi = "openhands_api",
        Slack = "slack",
        /// The microagent management of the UI.
        MicroagentManagement = "microagent_management",
        Jira = "jira",
        JiraDc = "jira_dc",
        Linear = "linear",
        Bitbucket = "bitbucket",
        /// An automation. Only later versions of the reference have it.
        Automation = "automation",
    }
}

/// An event callback processor (`{"kind": …}`), which runs on the events of a conversation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum EventCallbackProcessor {
    /// Logs the events.
    #[serde(rename = "LoggingCallbackProcessor")]
    Logging,
    /// Sets a title for the conversation.
    #[serde(rename = "SetTitleCallbackProcessor")]
    SetTitle,
}

impl EventCallbackProcessor {
    /// Reports `value_error` for an unknown or missing kind, and `model_attributes_type` for any value that is not an object (the reference
    /// responds to that with 500).
    pub(crate) fn read(check: &mut Checker, value: &Value) -> Option<Self> {
        Fields::of(check, value)?;
        let kind = value.get("kind").unwrap_or(&Value::Null);
        match kind.as_str() {
            Some("LoggingCallbackProcessor") => return Some(Self::Logging),
            Some("SetTitleCallbackProcessor") => return Some(Self::SetTitle),
            _ => {}
        }
        let kind = match kind {
            Value::Null => String::new(),
            Value::String(kind) => kind.clone(),
            Value::Bool(true) => "True".to_owned(),
            Value::Bool(false) => "False".to_owned(),
            other => other.to_string(),
        };
        // The reference removes the kind before it detects that the kind is unknown, so the violation shows the input without it.
        let mut rest = value.as_object().cloned().unwrap_or_default();
        rest.shift_remove("kind");
        let error = format_args!(
            "Unknown kind '{kind}' for openhands.app_server.event_callback.event_callback_models.EventCallbackProcessor; \
             Expected one of: ['LoggingCallbackProcessor', 'SetTitleCallbackProcessor']"
        );
        check.report_value_error(error, Value::Object(rest));
        None
    }
}

/// Reads a text that is stored in the conversation's record.
pub(crate) fn name(check: &mut Checker, value: &Value) -> Option<String> {
    string_up_to(MAX_NAME, check, value)
}

/// Reads a repository and removes credentials from its URL, because the request is stored and shown.
pub(crate) fn repository(check: &mut Checker, value: &Value) -> Option<String> {
    match value {
        Value::String(text) => name(check, &without_credentials(text).into()),
        other => name(check, other),
    }
}
