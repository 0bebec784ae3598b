//! Fields of conversation records that requests set, and how they are read.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::MAX_NAME;
use crate::http::pydantic::validation::{Checker, Fields, string_up_to, wire_enum};
use crate::user::git::without_credentials;

wire_enum! {
    /// What caused the start of a conversation.
    pub enum Trigger {
        /// The resolver of issues.
        Resolver = "resolver",
        /// The web UI.
        Gui = "gui",
        /// A task the UI suggested.
        SuggestedTask = "suggested_task",
        /// The API.
        OpenhandsApi = "openhands_api",
        /// Slack.
        Slack = "slack",
        /// The UI's microagent management.
        MicroagentManagement = "microagent_management",
        /// Jira Cloud.
        Jira = "jira",
        /// Jira Data Center.
        JiraDc = "jira_dc",
        /// Linear.
        Linear = "linear",
        /// Bitbucket.
        Bitbucket = "bitbucket",
        /// An automation; of later versions.
        Automation = "automation",
    }
}

/// An event callback processor, which runs on events of a conversation: `{"kind": …}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind")]
pub enum EventCallbackProcessor {
    /// Logs them.
    #[serde(rename = "LoggingCallbackProcessor")]
    Logging,
    /// Gives the conversation a title.
    #[serde(rename = "SetTitleCallbackProcessor")]
    SetTitle,
}

impl EventCallbackProcessor {
    /// Violations: `value_error` for an unknown or missing kind, `model_attributes_type` for anything but an object (the
    /// reference answers 500 to that).
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
        // The reference removes the kind before it finds that it is unknown.
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

/// A text that becomes part of the conversation's record.
pub(crate) fn name(check: &mut Checker, value: &Value) -> Option<String> {
    string_up_to(MAX_NAME, check, value)
}

/// A repository, without the credentials that an address may have: the request is stored and shown.
pub(crate) fn repository(check: &mut Checker, value: &Value) -> Option<String> {
    match value {
        Value::String(text) => name(check, &without_credentials(text).into()),
        other => name(check, other),
    }
}
