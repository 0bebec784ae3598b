//! Conversations: their records, the store, search and live status.

pub mod fields;
pub mod git;
pub mod live_status;
pub mod reports;
pub mod search;
pub mod store;
pub mod tags;
mod title_cache;
pub mod update_request;
pub mod workspace;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use self::fields::Trigger;
use self::tags::Tags;
use crate::clock::{Time, sortable};
use crate::id::{UserId, as_hex};
use crate::sandbox::SandboxStatus;
use crate::user::git::ProviderType;

/// The most characters of a title, a repository or a branch: a record must stay far below DynamoDB's limit of 400 KB.
pub const MAX_NAME: usize = 10_000;

/// The agent kind of conversations that are started here.
pub const OPENHANDS_AGENT: &str = "openhands";
/// The agent kind of conversations whose agent is another program, which the agent server reaches through the Agent Client Protocol. Only
/// imported conversations, and those that were created on an agent server, have it.
pub const ACP_AGENT: &str = "acp";
/// The most characters of an agent kind and of the name of an ACP server.
pub const MAX_AGENT_NAME: usize = 100;

/// The first [`MAX_NAME`] characters of a text. Text that an agent server reports is truncated and not refused, because the agent server
/// would resend a refused report forever.
#[must_use]
pub fn within_max_name(text: &str) -> &str {
    text.char_indices().nth(MAX_NAME).map_or(text, |(end, _)| &text[..end])
}

/// What a conversation has cost so far.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct MetricsSnapshot {
    /// Always `default`, as in the reference.
    pub model_name: String,
    /// US dollars.
    pub accumulated_cost: f64,
    /// US dollars.
    pub max_budget_per_task: Option<f64>,
    /// Tokens.
    pub accumulated_token_usage: Option<TokenUsage>,
}

impl Default for MetricsSnapshot {
    fn default() -> Self {
        Self {
            model_name: "default".to_owned(),
            accumulated_cost: 0.0,
            max_budget_per_task: None,
            accumulated_token_usage: Some(TokenUsage::default()),
        }
    }
}

/// Tokens used so far.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(missing_docs, reason = "the names are the contract's and say all")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct TokenUsage {
    pub model: String,
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
    pub cache_read_tokens: u64,
    pub cache_write_tokens: u64,
    pub reasoning_tokens: u64,
    pub context_window: u64,
    pub per_turn_token: u64,
    pub response_id: String,
}

/// The agent profile that a conversation was started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct LaunchedAgentProfile {
    /// With dashes.
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = "uuid"))]
    pub agent_profile_id: Uuid,
    /// The number of changes of the profile before the start.
    pub revision: u64,
}

/// The kind of agent of records that name none.
fn openhands_agent() -> String {
    OPENHANDS_AGENT.to_owned()
}

fn is_openhands_agent(kind: &String) -> bool {
    kind == OPENHANDS_AGENT
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConversationRecord {
    pub user: UserId,
    #[serde(with = "as_hex")]
    pub id: Uuid,
    /// The sandbox in which it runs.
    pub sandbox_id: String,
    /// `owner/name`
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selected_repository: Option<String>,
    /// A branch of the repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selected_branch: Option<String>,
    /// The provider that hosts the repository.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub git_provider: Option<ProviderType>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// What started it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trigger: Option<Trigger>,
    /// Numbers of the related pull requests.
    #[serde(default)]
    pub pr_number: Vec<i64>,
    /// The model that the agent uses, as reported by its agent server.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub llm_model: Option<String>,
    #[serde(default)]
    pub metrics: MetricsSnapshot,
    /// The parent, if this is a sub-conversation.
    #[serde(default, with = "as_hex::option", skip_serializing_if = "Option::is_none")]
    pub parent_conversation_id: Option<Uuid>,
    /// Whether other users may read it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public: Option<bool>,
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
    /// [`OPENHANDS_AGENT`], [`ACP_AGENT`], or another kind of a later version.
    #[serde(default = "openhands_agent", skip_serializing_if = "is_openhands_agent")]
    pub agent_kind: String,
    /// The program behind the Agent Client Protocol, such as `claude-code`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acp_server: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub launched_agent_profile: Option<LaunchedAgentProfile>,
    #[serde(serialize_with = "sortable::serialize")]
    pub created_at: Time,
    /// The time of the last change.
    #[serde(serialize_with = "sortable::serialize")]
    pub updated_at: Time,
}

/// A conversation in responses, with the fields in the contract's order.
#[derive(Clone, Debug, Serialize)]
#[expect(missing_docs, reason = "the contract's fields, described at `ConversationRecord`")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct AppConversation {
    /// A UUID without dashes.
    #[serde(with = "as_hex")]
    #[cfg_attr(feature = "openapi", schema(value_type = String, pattern = "^[0-9a-f]{32}$"))]
    pub id: Uuid,
    /// Null on a server of a single user.
    pub created_by_user_id: Option<String>,
    pub sandbox_id: String,
    pub selected_repository: Option<String>,
    pub selected_branch: Option<String>,
    pub git_provider: Option<ProviderType>,
    pub title: Option<String>,
    pub trigger: Option<Trigger>,
    pub pr_number: Vec<i64>,
    pub llm_model: Option<String>,
    /// `openhands`, or `acp` for agents of other makers.
    pub agent_kind: String,
    pub metrics: MetricsSnapshot,
    /// A UUID without dashes.
    #[serde(with = "as_hex::option")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>, pattern = "^[0-9a-f]{32}$"))]
    pub parent_conversation_id: Option<Uuid>,
    #[serde(with = "as_hex::list")]
    #[cfg_attr(feature = "openapi", schema(schema_with = schemas::sub_conversation_ids))]
    pub sub_conversation_ids: Vec<Uuid>,
    pub public: Option<bool>,
    #[cfg_attr(feature = "openapi", schema(schema_with = tags::schema))]
    pub tags: Tags,
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub created_at: Time,
    #[cfg_attr(feature = "openapi", schema(value_type = String, format = DateTime))]
    pub updated_at: Time,
    pub sandbox_status: SandboxStatus,
    /// `idle`, `running`, `paused`, `waiting_for_confirmation`, `finished`, `error` or `stuck`; null unless the sandbox runs and its
    /// agent server has responded.
    pub execution_status: Option<String>,
    /// The URL of the conversation at its agent server.
    pub conversation_url: Option<String>,
    /// The key for that agent server, sent as `X-Session-API-Key`.
    pub session_api_key: Option<String>,
    /// The program behind an agent of the kind `acp`, such as `claude-code`.
    pub acp_server: Option<String>,
    pub launched_agent_profile: Option<LaunchedAgentProfile>,
}

/// Schemas that `utoipa::ToSchema` cannot derive from the types of the fields.
#[cfg(feature = "openapi")]
mod schemas {
    use utoipa::openapi::schema::{Array, ArrayBuilder, ObjectBuilder, Type};

    pub(super) fn sub_conversation_ids() -> Array {
        let id = ObjectBuilder::new()
            .schema_type(Type::String)
            .pattern(Some("^[0-9a-f]{32}$"))
            .description(Some("A UUID without dashes."));
        ArrayBuilder::new().items(id).description(Some("Empty in search.")).build()
    }
}

impl AppConversation {
    /// Converts a record whose sandbox is missing.
    #[must_use]
    pub fn without_sandbox(record: ConversationRecord) -> Self {
        Self {
            id: record.id,
            created_by_user_id: record.user.shown().map(ToOwned::to_owned),
            sandbox_id: record.sandbox_id,
            selected_repository: record.selected_repository,
            selected_branch: record.selected_branch,
            git_provider: record.git_provider,
            title: record.title,
            trigger: record.trigger,
            pr_number: record.pr_number,
            llm_model: record.llm_model,
            agent_kind: record.agent_kind,
            metrics: record.metrics,
            parent_conversation_id: record.parent_conversation_id,
            sub_conversation_ids: Vec::new(),
            public: record.public,
            tags: record.tags,
            created_at: record.created_at,
            updated_at: record.updated_at,
            sandbox_status: SandboxStatus::Missing,
            execution_status: None,
            conversation_url: None,
            session_api_key: None,
            acp_server: record.acp_server,
            launched_agent_profile: record.launched_agent_profile,
        }
    }
}
