//! The start task: what a client polls, and what a worker needs to go on with the start.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::abridged;
use super::request::StartRequest;
use crate::clock::{Time, sortable};
use crate::http::page::size_of_text;
use crate::http::pydantic::validation::wire_enum;
use crate::id::{UserId, as_hex};

wire_enum! {
    /// How far a start is. The status is also the step that is to be done next.
    pub enum StartStatus {
        /// A sandbox is chosen, and made if need be.
        Working = "WORKING",
        /// Its agent server is waited for.
        WaitingForSandbox = "WAITING_FOR_SANDBOX",
        /// The repository is cloned, or an empty one made.
        PreparingRepository = "PREPARING_REPOSITORY",
        /// `.openhands/setup.sh` runs.
        RunningSetupScript = "RUNNING_SETUP_SCRIPT",
        /// `.openhands/pre-commit.sh` is installed as a git hook.
        SettingUpGitHooks = "SETTING_UP_GIT_HOOKS",
        /// Skills and hooks are read.
        SettingUpSkills = "SETTING_UP_SKILLS",
        /// The agent server creates the conversation.
        StartingConversation = "STARTING_CONVERSATION",
        /// Done.
        Ready = "READY",
        /// Failed; `detail` says why.
        Error = "ERROR",
    }
}

impl StartStatus {
    /// Whether nothing more will happen.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Ready | Self::Error)
    }
}

/// The parts of a task that change, as they were at one change of status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The status from then on.
    pub status: StartStatus,
    /// When it changed.
    #[serde(serialize_with = "sortable::serialize")]
    pub updated_at: Time,
    /// For a person: why it failed, or what is to know of a start that did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// The conversation, once it is ready.
    #[serde(default, with = "as_hex::option", skip_serializing_if = "Option::is_none")]
    pub app_conversation_id: Option<Uuid>,
    /// The sandbox, once it is chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// Its agent server, once the conversation is being created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_server_url: Option<String>,
}

/// A command that runs in the sandbox while no worker waits for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingCommand {
    /// Which of the start's commands it is.
    pub name: String,
    /// The agent server's id of it.
    pub id: String,
    /// When it was started. Records of earlier versions do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
}

/// The record of a start.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartTaskRecord {
    /// Its owner.
    pub user: UserId,
    /// Its id.
    #[serde(with = "as_hex")]
    pub id: Uuid,
    /// The current state.
    #[serde(flatten)]
    pub now: Snapshot,
    /// When it was asked for.
    #[serde(serialize_with = "sortable::serialize")]
    pub created_at: Time,
    /// The states up to now, oldest first.
    #[serde(default)]
    pub history: Vec<Snapshot>,
    /// The conversation to be; chosen before anything is done, so that a repeated step makes no second one.
    #[serde(default = "Uuid::nil", with = "as_hex")]
    pub conversation_id: Uuid,
    /// The sandbox to be, should a new one be needed; chosen likewise.
    #[serde(default)]
    pub new_sandbox_id: String,
    /// What is to know of the start although it goes on.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Whether the sandbox has a browser, once that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub browser: Option<bool>,
    /// Names of the MCP servers that the agent does not get, because they failed the probe.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mcp_servers_left_out: Vec<String>,
    /// A command that is waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<PendingCommand>,
    /// Why the start fails, while what it made is cleaned up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// How often the current step has failed.
    #[serde(default)]
    pub attempts: u32,
    /// How often in a row an agent server answered the current step with an error of its own.
    #[serde(default)]
    pub refusals: u32,
    /// How often the task was claimed since a worker last got on with it or released it: more than once when workers die at it.
    #[serde(default)]
    pub open_claims: u32,
    /// When the current step must be done.
    #[serde(default, serialize_with = "sortable_option", skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Time>,
    /// The request as JSON, in the form in which the contract shows it. If [`StartTaskRecord::request_object`] is set, a record
    /// that was read from the store has the short form here (see [`super::abridged`]); records of earlier versions have nothing.
    #[serde(default)]
    pub(super) request: String,
    /// The key of the bucket's object that holds a large request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) request_object: Option<String>,
    /// Secrets of the request, sealed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) secrets_sealed: Option<String>,
}

#[expect(clippy::ref_option, reason = "the signature that serde calls")]
fn sortable_option<S: serde::Serializer>(time: &Option<Time>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => sortable::serialize(time, serializer),
        None => serializer.serialize_none(),
    }
}

/// A start with its request read.
#[derive(Clone, Debug)]
pub struct StartTask {
    /// The record.
    pub record: StartTaskRecord,
    /// What was asked for, with what it inherited from its parent.
    pub request: StartRequest,
}

/// A start in responses, with the fields in the contract's order.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the contract's fields, described at `StartTaskRecord`")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AppConversationStartTask {
    /// A UUID without dashes.
    #[serde(with = "as_hex")]
    #[cfg_attr(feature = "openapi", schema(value_type = String, pattern = "^[0-9a-f]{32}$"))]
    pub id: Uuid,
    pub created_by_user_id: Option<String>,
    pub status: StartStatus,
    /// The reason of a failure, or remarks about a start that is READY.
    pub detail: Option<String>,
    /// Set when the start is READY.
    #[serde(with = "as_hex::option")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, pattern = "^[0-9a-f]{32}$"))]
    pub app_conversation_id: Option<Uuid>,
    pub sandbox_id: Option<String>,
    pub agent_server_url: Option<String>,
    #[cfg_attr(feature = "openapi", schema(schema_with = request_schema))]
    pub request: Box<RawValue>,
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub created_at: Time,
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub updated_at: Time,
}

/// The request of a start is stored as text and has no type; `infra/generate/src/schemas.json` has its schema.
#[cfg(feature = "openapi")]
fn request_schema() -> utoipa::openapi::Ref {
    utoipa::openapi::Ref::from_schema_name("AppConversationStartTaskRequest")
}

/// The most bytes of a task in an answer with its request abridged, see [`crate::http::page`].
pub const ABRIDGED_SIZE: u64 = 3 * abridged::MAX_LENGTH as u64;

impl StartTaskRecord {
    /// The record as the contract shows it, with the request that it holds.
    #[must_use]
    pub fn show(&self) -> AppConversationStartTask {
        self.show_at(&self.now, raw(self.request.clone()))
    }

    /// The record as the contract shows it. The request is abridged if it takes more than `room` bytes of an answer.
    #[must_use]
    pub fn show_within(&self, room: u64) -> AppConversationStartTask {
        self.show_at(&self.now, self.request_within(room))
    }

    /// The request that the record holds, abridged if it takes more than `room` bytes of an answer.
    #[must_use]
    pub fn request_within(&self, room: u64) -> Box<RawValue> {
        let fits = size_of_text(self.request.as_bytes()) <= room;
        raw(if fits { self.request.clone() } else { abridged::abridged(&self.request) })
    }

    /// The record as it was at one of its states, with this request.
    #[must_use]
    pub fn show_at(&self, at: &Snapshot, request: Box<RawValue>) -> AppConversationStartTask {
        AppConversationStartTask {
            id: self.id,
            created_by_user_id: self.user.shown().map(ToOwned::to_owned),
            status: at.status,
            detail: at.detail.clone(),
            app_conversation_id: at.app_conversation_id,
            sandbox_id: at.sandbox_id.clone(),
            agent_server_url: at.agent_server_url.clone(),
            request,
            created_at: self.created_at,
            updated_at: at.updated_at,
        }
    }
}

/// A stored request as a part of an answer.
pub(super) fn raw(request: String) -> Box<RawValue> {
    RawValue::from_string(request).unwrap_or_else(|_| RawValue::NULL.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_of_an_earlier_version_is_read() {
        let row = r#"{"user": "ann", "id": "0513cae843c04dd7aebcf1c2dc0f9b8f", "status": "SETTING_UP_SKILLS",
            "updated_at": "2026-11-20T10:00:00.000000Z", "created_at": "2026-11-20T10:00:00.000000Z",
            "command": {"name": "git-hooks", "id": "c-1"}}"#;
        let record: StartTaskRecord = serde_json::from_str(row).expect("a record");
        assert_eq!(record.mcp_servers_left_out, [""; 0]);
        let command = PendingCommand { name: "git-hooks".to_owned(), id: "c-1".to_owned(), started_at: None };
        assert_eq!(record.command, Some(command));
    }
}
