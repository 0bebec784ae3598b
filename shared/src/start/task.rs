//! The start task: the record of a start. Clients poll it, and workers resume the start from it.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tracing::Span;
use tracing::field::display;
use uuid::Uuid;

use super::abridged;
use super::request::StartRequest;
use crate::clock::{Time, sortable};
use crate::http::page::size_of_text;
use crate::http::pydantic::validation::wire_enum;
use crate::id::{UserId, as_hex};
use crate::trace::{self, TraceId};

wire_enum! {
    /// The status of a start. It also names the step that is done next.
    pub enum StartStatus {
        /// The step chooses a sandbox, and creates it if necessary.
        Working = "WORKING",
        /// The step waits until the sandbox's agent server responds.
        WaitingForSandbox = "WAITING_FOR_SANDBOX",
        /// The step clones the repository, or creates an empty one.
        PreparingRepository = "PREPARING_REPOSITORY",
        /// The step runs `.openhands/setup.sh`.
        RunningSetupScript = "RUNNING_SETUP_SCRIPT",
        /// The step installs `.openhands/pre-commit.sh` as a git hook.
        SettingUpGitHooks = "SETTING_UP_GIT_HOOKS",
        /// The step reads skills and probes MCP servers.
        SettingUpSkills = "SETTING_UP_SKILLS",
        /// The agent server creates the conversation, and the step records it.
        StartingConversation = "STARTING_CONVERSATION",
        Ready = "READY",
        /// Failed; `detail` holds the reason.
        Error = "ERROR",
    }
}

impl StartStatus {
    /// Whether the start has ended. A final status never changes.
    #[must_use]
    pub fn is_final(self) -> bool {
        matches!(self, Self::Ready | Self::Error)
    }
}

/// The changeable attributes of a task after one change of status.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub status: StartStatus,
    /// The time of the change.
    #[serde(serialize_with = "sortable::serialize")]
    pub updated_at: Time,
    /// Text for the user: the reason of a failure, or the notes of a successful start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Set when the conversation is READY.
    #[serde(default, with = "as_hex::option", skip_serializing_if = "Option::is_none")]
    pub app_conversation_id: Option<Uuid>,
    /// Set when the sandbox is chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox_id: Option<String>,
    /// The agent server's URL. Set when the start enters STARTING_CONVERSATION.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_server_url: Option<String>,
}

/// A command that runs in the sandbox while no worker waits for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingCommand {
    /// The command's name among the commands of the start.
    pub name: String,
    /// The id that the agent server gave the command. Empty if the agent server has forgotten or killed the command, and the next poll sends it
    /// again.
    pub id: String,
    /// Records of earlier versions lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Time>,
    /// How often the command was sent again.
    #[serde(default)]
    pub resends: u32,
    /// The URL of the agent server that it was sent to. Records of earlier versions lack it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent_server: Option<String>,
}

/// The undoing of what a failed start made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compensation {
    /// It has not succeeded yet.
    Pending,
}

impl Compensation {
    /// Its form in the record.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
        }
    }
}

/// The stored record of a start. The attributes from `command` to `compensation_attempts` are in its lease row, and only a claim reads
/// them, see [`super::store`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct StartTaskRecord {
    pub user: UserId,
    #[serde(with = "as_hex")]
    pub id: Uuid,
    /// The current state.
    #[serde(flatten)]
    pub now: Snapshot,
    /// The time of the request.
    #[serde(serialize_with = "sortable::serialize")]
    pub created_at: Time,
    /// All states so far, oldest first.
    #[serde(default)]
    pub history: Vec<Snapshot>,
    /// The id of the conversation to create. It is chosen before any step runs, so that a repeated step is idempotent.
    #[serde(default = "Uuid::nil", with = "as_hex")]
    pub conversation_id: Uuid,
    /// The id of the sandbox to create if the start needs a new one. It is chosen before any step runs, for the same reason.
    #[serde(default)]
    pub new_sandbox_id: String,
    /// The sandbox that the request names, which the start has joined when it was created, if the sandbox existed then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub given_sandbox_id: Option<String>,
    /// Notes for the user about problems that did not end the start.
    #[serde(default)]
    pub notes: Vec<String>,
    /// Whether the sandbox has a browser; `None` until the probe has run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub browser: Option<bool>,
    /// Names of the MCP servers that failed the probe. The agent does not get them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mcp_servers_left_out: Vec<String>,
    /// The command that the start waits for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<PendingCommand>,
    /// The number of failed attempts at the current step since its last success.
    #[serde(default)]
    pub attempts: u32,
    /// The number of consecutive error responses of the agent server in the current step.
    #[serde(default)]
    pub refusals: u32,
    /// The number of times that a worker has released the task to wait in the current step. The delay grows with it.
    #[serde(default)]
    pub waits: u32,
    /// The number of claims since a worker last advanced or released the task. More than one means that workers died during the step.
    #[serde(default)]
    pub open_claims: u32,
    /// The number of claims so far, which is the number of jobs that have worked on the start.
    #[serde(default)]
    pub claims: u32,
    /// Present while what a failed start made has not been undone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compensation: Option<Compensation>,
    /// The number of failed attempts to undo it.
    #[serde(default)]
    pub compensation_attempts: u32,
    /// The reason of the failure. The current `detail` may say more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<String>,
    /// The deadline of the current step. Only an unfinished start has one.
    #[serde(default, serialize_with = "sortable_option", skip_serializing_if = "Option::is_none")]
    pub deadline: Option<Time>,
    /// The trace of the request that created the start, if it had one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) trace: Option<TraceId>,
    /// The request as JSON, in the form of the contract. If [`StartTaskRecord::request_object`] is set, a record that was read from the
    /// store has the abridged request here (see [`super::abridged`]); records of earlier versions have an empty text.
    #[serde(default)]
    pub(super) request: String,
    /// The S3 key of the object that holds a large request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) request_object: Option<String>,
    /// The sealed digest of the request, if it has an idempotency key. The digest depends on secrets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) digest_sealed: Option<String>,
    /// The sealed secrets of the request.
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

/// A start task with its parsed request.
#[derive(Clone, Debug)]
pub struct StartTask {
    pub record: StartTaskRecord,
    /// The request, with the fields that it inherited from its parent.
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

/// The request of a start is stored as text and has no Rust type; `infra/generate/src/schemas.json` holds its schema.
#[cfg(feature = "openapi")]
fn request_schema() -> utoipa::openapi::Ref {
    utoipa::openapi::Ref::from_schema_name("AppConversationStartTaskRequest")
}

/// The largest size in bytes of a task with an abridged request in a response, see [`crate::http::page`].
pub const ABRIDGED_SIZE: u64 = 3 * abridged::MAX_LENGTH as u64;

impl StartTaskRecord {
    /// The trace of the start.
    #[must_use]
    pub fn trace(&self) -> TraceId {
        self.trace.clone().unwrap_or_else(|| TraceId::of_start(self.created_at, self.id))
    }

    /// Records the start in the log span of the current invocation.
    pub fn record_in_log(&self) {
        trace::record_trace(&self.trace());
        let span = Span::current();
        span.record("task", display(self.id)).record("conversation", display(self.conversation_id));
        if let Some(sandbox) = &self.now.sandbox_id {
            span.record("sandbox", sandbox);
        }
    }

    /// The step that the start is at, or at which it ended.
    #[must_use]
    pub fn step(&self) -> StartStatus {
        let steps = self.history.iter().map(|snapshot| snapshot.status).rev();
        match self.now.status.is_final() {
            true => steps.into_iter().find(|status| !status.is_final()).unwrap_or(StartStatus::Working),
            false => self.now.status,
        }
    }

    /// The record in the form of the contract, with the request that it holds.
    #[must_use]
    pub fn show(&self) -> AppConversationStartTask {
        self.show_at(&self.now, raw(self.request.clone()))
    }

    /// The record in the form of the contract. The request is abridged if its size exceeds `limit` bytes of the response.
    #[must_use]
    pub fn show_within(&self, limit: u64) -> AppConversationStartTask {
        self.show_at(&self.now, self.request_within(limit))
    }

    /// The request that the record holds, abridged if its size exceeds `limit` bytes of the response.
    #[must_use]
    pub fn request_within(&self, limit: u64) -> Box<RawValue> {
        let fits = size_of_text(self.request.as_bytes()) <= limit;
        raw(if fits { self.request.clone() } else { abridged::abridged(&self.request) })
    }

    /// The record with one of its states and this request.
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

/// Converts a stored request to a part of a response.
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
        let command =
            PendingCommand { name: "git-hooks".to_owned(), id: "c-1".to_owned(), ..PendingCommand::default() };
        assert_eq!(record.command, Some(command));
    }
}
