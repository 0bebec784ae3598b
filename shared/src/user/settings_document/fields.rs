//! The flat fields of the settings: their names, kinds and defaults.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::show::{AgentSettingsOut, ConversationSettingsOut, LlmProfilesOut, Shown};
use crate::id::UserId;
use crate::user::settings::SandboxGroupingStrategy;

#[derive(Clone, Copy)]
pub(super) enum Kind {
    Text,
    Secret,
    Integer {
        least: i64,
    },
    Float,
    Flag,
    Texts,
    Marketplaces,
    Mcp,
    /// Clients cannot change it: the value is always the default.
    Fixed,
    Grouping,
}

pub(super) struct Field {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// The value of a field that is not set.
    pub(super) default: fn() -> Value,
}

const ANY: Kind = Kind::Integer { least: i64::MIN };

pub(super) const MCP: &str = "mcp_config";
pub(super) const STORE: &str = "secrets_store";

/// Declares the fields in the order of responses: the type in the schema, the kind, and the default. It makes the table [`FIELDS`] and
/// the two response types, so that they have the same fields.
macro_rules! fields {
    ($($(#[$meta:meta])* $name:ident: $type:ty = $kind:expr, $default:expr;)+) => {
        pub(super) static FIELDS: &[Field] = &[
            $(Field { name: stringify!($name), kind: $kind, default: || $default },)+
        ];

        /// The settings of a user, secrets masked, and which secrets are set.
        #[derive(Clone, Debug, Serialize)]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Settings))]
        pub struct SettingsOut {
            $($(#[$meta])* #[cfg_attr(feature = "openapi", schema(value_type = $type))] $name: Value,)+
            agent_settings: AgentSettingsOut,
            conversation_settings: ConversationSettingsOut,
            llm_profiles: LlmProfilesOut,
            pub(super) llm_api_key_set: bool,
            pub(super) search_api_key_set: bool,
            /// The providers that have a token, each with its host, or null for the provider's own.
            #[cfg_attr(feature = "openapi", schema(value_type = std::collections::HashMap<String, Option<String>>))]
            pub(super) provider_tokens_set: Map<String, Value>,
        }

        impl SettingsOut {
            pub(super) fn new(shown: Shown) -> Self {
                let Shown { mut fields, agent_settings, conversation_settings, llm_profiles } = shown;
                Self {
                    $($name: fields.remove(stringify!($name)).unwrap_or_default(),)+
                    agent_settings,
                    conversation_settings,
                    llm_profiles,
                    llm_api_key_set: false,
                    search_api_key_set: false,
                    provider_tokens_set: Map::new(),
                }
            }
        }

        /// A user: their settings and id.
        #[derive(Clone, Debug, Serialize)]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = UserInfo))]
        pub struct UserOut {
            $($(#[$meta])* #[cfg_attr(feature = "openapi", schema(value_type = $type))] $name: Value,)+
            agent_settings: AgentSettingsOut,
            conversation_settings: ConversationSettingsOut,
            llm_profiles: LlmProfilesOut,
            /// Null on a server of a single user.
            id: Option<String>,
        }

        impl UserOut {
            pub(super) fn new(shown: Shown, user: &UserId) -> Self {
                let Shown { mut fields, agent_settings, conversation_settings, llm_profiles } = shown;
                Self {
                    $($name: fields.remove(stringify!($name)).unwrap_or_default(),)+
                    agent_settings,
                    conversation_settings,
                    llm_profiles,
                    id: user.shown().map(str::to_owned),
                }
            }
        }
    };
}

fields! {
    language: Option<String> = Kind::Text, Value::Null;
    agent: Option<String> = Kind::Text, Value::Null;
    max_iterations: Option<i64> = ANY, Value::Null;
    security_analyzer: Option<String> = Kind::Text, Value::Null;
    confirmation_mode: Option<bool> = Kind::Flag, Value::Null;
    llm_model: Option<String> = Kind::Text, Value::Null;
    llm_api_key: Option<String> = Kind::Secret, Value::Null;
    llm_base_url: Option<String> = Kind::Text, Value::Null;
    user_version: Option<i64> = ANY, Value::Null;
    remote_runtime_resource_factor: Option<i64> = ANY, Value::Null;
    /// Always without content: provider tokens and secrets have routes of their own.
    secrets_store: Object = Kind::Fixed, json!({"provider_tokens": {}});
    enable_default_condenser: bool = Kind::Flag, true.into();
    enable_sound_notifications: bool = Kind::Flag, false.into();
    enable_proactive_conversation_starters: bool = Kind::Flag, true.into();
    enable_solvability_analysis: bool = Kind::Flag, true.into();
    user_consents_to_analytics: Option<bool> = Kind::Flag, Value::Null;
    sandbox_base_container_image: Option<String> = Kind::Text, Value::Null;
    sandbox_runtime_container_image: Option<String> = Kind::Text, Value::Null;
    mcp_config: Option<Object> = Kind::Mcp, Value::Null;
    disabled_skills: Option<Vec<String>> = Kind::Texts, Value::Null;
    search_api_key: Option<String> = Kind::Secret, Value::Null;
    sandbox_api_key: Option<String> = Kind::Secret, Value::Null;
    max_budget_per_task: Option<f64> = Kind::Float, Value::Null;
    condenser_max_size: Option<i64> = Kind::Integer { least: 20 }, Value::Null;
    email: Option<String> = Kind::Text, Value::Null;
    email_verified: Option<bool> = Kind::Flag, Value::Null;
    git_user_name: Option<String> = Kind::Text, Value::Null;
    git_user_email: Option<String> = Kind::Text, Value::Null;
    git_full_clone: bool = Kind::Flag, false.into();
    v1_enabled: bool = Kind::Flag, true.into();
    sandbox_grouping_strategy: SandboxGroupingStrategy = Kind::Grouping, json!(SandboxGroupingStrategy::default());
    default_sandbox_spec_id: Option<String> = Kind::Text, Value::Null;
    title_llm_profile: Option<String> = Kind::Text, Value::Null;
    enabled_skills: Option<Vec<String>> = Kind::Texts, Value::Null;
    active_agent_profile_id: Option<String> = Kind::Fixed, Value::Null;
    active_agent_profile_revision: Option<i64> = Kind::Fixed, Value::Null;
    registered_marketplaces: Vec<Object> = Kind::Marketplaces, json!([]);
    /// Always empty: there is nobody from whom a user inherits.
    inherited_marketplaces: Vec<Object> = Kind::Fixed, json!([]);
}

/// Fields for which null means unchanged.
pub(super) const NULL_KEEPS: [&str; 2] = ["disabled_skills", "user_consents_to_analytics"];

/// The paths of MCP servers in a body. Only the first one that is present counts, as in the reference.
pub(super) const MCP_PATHS: [&[&str]; 2] = [&["agent_settings_diff", MCP], &[MCP]];
