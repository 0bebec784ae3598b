//! The settings as responses show them.

use serde::Serialize;
use serde_json::{Map, Value};

use super::fields::{FIELDS, Field, Kind, SettingsOut, UserOut};
use super::{SettingsDocument, TOKENS};
use crate::http::secret::MASK;
use crate::user::{UserId, git, mcp};

/// The settings that later clients read below `agent_settings`. Fields without a value are absent.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = AgentSettings))]
pub struct AgentSettingsOut {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    agent_kind: &'static str,
    #[serde(skip_serializing_if = "LlmSettingsOut::is_empty")]
    llm: LlmSettingsOut,
    #[serde(skip_serializing_if = "Value::is_null")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    agent: Value,
    condenser: CondenserSettingsOut,
    /// MCP servers by name.
    #[cfg_attr(feature = "openapi", schema(value_type = std::collections::HashMap<String, Object>))]
    mcp_config: Map<String, Value>,
}

/// The settings of the model.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = LlmSettings))]
pub struct LlmSettingsOut {
    #[serde(skip_serializing_if = "Value::is_null")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    model: Value,
    /// Null in `GET /settings`, where `llm_api_key_set` says whether there is a key.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    api_key: Option<Value>,
    #[serde(skip_serializing_if = "Value::is_null")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<String>))]
    base_url: Value,
}

impl LlmSettingsOut {
    fn is_empty(&self) -> bool {
        self.model.is_null() && self.api_key.is_none() && self.base_url.is_null()
    }
}

/// The settings of the condenser, which summarises the history of a conversation.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = CondenserSettings))]
pub struct CondenserSettingsOut {
    #[cfg_attr(feature = "openapi", schema(value_type = bool))]
    enabled: Value,
    #[serde(skip_serializing_if = "Value::is_null")]
    #[cfg_attr(feature = "openapi", schema(value_type = Option<i64>))]
    max_size: Value,
}

impl SettingsDocument {
    /// The response of `GET /api/v1/users/me`; secrets are in clear only with `expose`.
    #[must_use]
    pub fn show_user(&self, user: &UserId, expose: bool) -> UserOut {
        let fields = self.show_fields(expose);
        let agent_settings = self.show_agent_settings(&fields, expose);
        UserOut::new(fields, agent_settings, user)
    }

    /// The response of `GET /api/v1/settings`: secrets are masked, and flags say which are set.
    #[must_use]
    pub fn show_settings(&self) -> SettingsOut {
        let fields = self.show_fields(false);
        let is_set = |name: &str| fields.get(name).is_some_and(|value| !value.is_null());
        let (llm_api_key_set, search_api_key_set) = (is_set("llm_api_key"), is_set("search_api_key"));
        let mut agent_settings = self.show_agent_settings(&fields, false);
        // As in the reference, which shows the flag only.
        if let Some(key) = &mut agent_settings.llm.api_key {
            *key = Value::Null;
        }
        let mut settings = SettingsOut::new(fields, agent_settings);
        settings.llm_api_key_set = llm_api_key_set;
        settings.search_api_key_set = search_api_key_set;
        settings.provider_tokens_set = self.hosts_of_tokens();
        settings
    }

    fn show_fields(&self, expose: bool) -> Map<String, Value> {
        let show = |field: &Field| {
            let stored = self.0.get(field.name).filter(|value| !value.is_null());
            let value = stored.cloned().unwrap_or_else(field.default);
            match field.kind {
                Kind::Secret if value.as_str().is_none_or(|text| text.trim().is_empty()) => Value::Null,
                Kind::Secret if !expose => MASK.into(),
                Kind::Mcp => self.mcp_servers().map_or(Value::Null, |servers| mcp::shown_with_lists(servers, expose)),
                Kind::Fixed => (field.default)(),
                _ => value,
            }
        };
        FIELDS.iter().map(|field| (field.name.to_owned(), show(field))).collect()
    }

    fn show_agent_settings(&self, fields: &Map<String, Value>, expose: bool) -> AgentSettingsOut {
        let field = |name: &str| fields.get(name).cloned().unwrap_or_default();
        AgentSettingsOut {
            agent_kind: "openhands",
            llm: LlmSettingsOut {
                model: field("llm_model"),
                api_key: Some(field("llm_api_key")).filter(|key| !key.is_null()),
                base_url: field("llm_base_url"),
            },
            agent: field("agent"),
            condenser: CondenserSettingsOut {
                enabled: field("enable_default_condenser"),
                max_size: field("condenser_max_size"),
            },
            mcp_config: self.mcp_servers().map(|servers| mcp::shown(servers, expose)).unwrap_or_default(),
        }
    }

    /// The providers that have a token, each with its host.
    fn hosts_of_tokens(&self) -> Map<String, Value> {
        let tokens = self.0.get(TOKENS).and_then(Value::as_object).into_iter().flatten();
        tokens
            .filter(|(_, token)| token["token"].as_str().is_some_and(|token| !token.is_empty()))
            .map(|(provider, token)| {
                // Settings files and earlier versions may have hosts that contain credentials.
                let host = token["host"].as_str().map(git::without_credentials);
                (provider.clone(), host.map_or(Value::Null, Value::from))
            })
            .collect()
    }
}
