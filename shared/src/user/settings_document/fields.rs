//! The fields of the settings: their names, kinds and defaults, and where clients of later versions nest them.

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::show::AgentSettingsOut;
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
            pub(super) llm_api_key_set: bool,
            pub(super) search_api_key_set: bool,
            /// The providers that have a token, each with its host, or null for the provider's own.
            #[cfg_attr(feature = "openapi", schema(value_type = std::collections::HashMap<String, Option<String>>))]
            pub(super) provider_tokens_set: Map<String, Value>,
        }

        impl SettingsOut {
            pub(super) fn new(mut fields: Map<String, Value>, agent_settings: AgentSettingsOut) -> Self {
                Self {
                    $($name: fields.remove(stringify!($name)).unwrap_or_default(),)+
                    agent_settings,
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
            /// Null on a server of a single user.
            id: Option<String>,
        }

        impl UserOut {
            pub(super) fn new(mut fields: Map<String, Value>, agent_settings: AgentSettingsOut, user: &UserId) -> Self {
                Self {
                    $($name: fields.remove(stringify!($name)).unwrap_or_default(),)+
                    agent_settings,
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
    v1_enabled: bool = Kind::Flag, true.into();
    sandbox_grouping_strategy: SandboxGroupingStrategy = Kind::Grouping, json!(SandboxGroupingStrategy::default());
}

/// Where clients of later versions nest fields: the path in the body, and the flat name.
pub(super) const NESTED: [(&[&str], &str); 9] = [
    (&["agent_settings_diff", "llm", "model"], "llm_model"),
    (&["agent_settings_diff", "llm", "api_key"], "llm_api_key"),
    (&["agent_settings_diff", "llm", "base_url"], "llm_base_url"),
    (&["agent_settings_diff", "agent"], "agent"),
    (&["agent_settings_diff", "condenser", "enabled"], "enable_default_condenser"),
    (&["agent_settings_diff", "condenser", "max_size"], "condenser_max_size"),
    (&["conversation_settings_diff", "confirmation_mode"], "confirmation_mode"),
    (&["conversation_settings_diff", "security_analyzer"], "security_analyzer"),
    (&["conversation_settings_diff", "max_iterations"], "max_iterations"),
];

/// The paths of MCP servers in a body. Only the first one that is present counts, as in the reference.
pub(super) const MCP_PATHS: [&[&str]; 2] = [&["agent_settings_diff", MCP], &[MCP]];
