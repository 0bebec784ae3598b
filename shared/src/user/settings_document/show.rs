//! The settings as responses show them.

use serde::Serialize;
use serde_json::{Map, Value};

use super::fields::{self, FIELDS, MCP, SettingsOut, UserOut};
use super::nested::{AGENT, AGENT_KIND, CONVERSATION, LLM};
use super::{SettingsDocument, TOKENS};
use crate::http::secret::MASK;
use crate::id;
use crate::user::declared::{self, Secrets};
#[cfg(feature = "openapi")]
use crate::user::declared::{Field, Kind, Preset};
use crate::user::llm::{self, Llm};
use crate::user::{UserId, git, mcp};

const ACTIVE_AGENT_PROFILE_ID: &str = "active_agent_profile_id";
const ACTIVE_AGENT_PROFILE_REVISION: &str = "active_agent_profile_revision";

/// The parts that both responses have.
pub(super) struct Shown {
    pub(super) fields: Map<String, Value>,
    pub(super) agent_settings: AgentSettingsOut,
    pub(super) conversation_settings: ConversationSettingsOut,
    pub(super) llm_profiles: LlmProfilesOut,
}

/// Declares a part of a response whose fields are in a table.
macro_rules! declared_out {
    ($($(#[$meta:meta])* $name:ident as $schema:literal = $of:expr;)+) => { $(
        $(#[$meta])*
        #[derive(Clone, Debug, Serialize)]
        #[serde(transparent)]
        pub struct $name(pub(crate) Map<String, Value>);

        #[cfg(feature = "openapi")]
        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
                $of
            }
        }

        #[cfg(feature = "openapi")]
        impl utoipa::ToSchema for $name {
            fn name() -> std::borrow::Cow<'static, str> {
                $schema.into()
            }
        }
    )+ };
}

declared_out! {
    /// The settings that later clients read below `agent_settings`.
    AgentSettingsOut as "AgentSettings" = declared::schema::of(AGENT, &[("schema_version", "integer"), ("agent_kind", "string"), ("mcp_config", "object")]);
    /// The settings that later clients read below `conversation_settings`.
    ConversationSettingsOut as "ConversationSettings" = declared::schema::of(CONVERSATION, &[("schema_version", "integer")]);
    /// The configuration of a model.
    LlmOut as "Llm" = declared::schema::of(llm::FIELDS, &[("is_subscription", "boolean")]);
    /// The LLM profiles by name, and the name of the active one.
    LlmProfilesOut as "LlmProfiles" = declared::schema::of(&[Field::with("profiles", Kind::Open, Preset::Object), Field::optional("active", Kind::Text)], &[]);
}

impl LlmOut {
    /// A configuration with every field.
    #[must_use]
    pub fn of(llm: &Llm, secrets: Secrets) -> Self {
        Self(llm.shown(secrets))
    }
}

impl SettingsDocument {
    /// The user's e-mail address, if they have set it.
    #[must_use]
    pub fn email(&self) -> Option<&str> {
        self.0.get("email").and_then(Value::as_str)
    }

    /// The response of `GET /api/v1/users/me`; secrets are in clear only with `expose`.
    #[must_use]
    pub fn show_user(&self, user: &UserId, expose: bool) -> UserOut {
        UserOut::new(self.show(if expose { Secrets::Clear } else { Secrets::Masked }), user)
    }

    /// The response of `GET /api/v1/settings`: secrets are masked, and flags say which are set. As in the reference, the keys of nested
    /// models are null.
    #[must_use]
    pub fn show_settings(&self) -> SettingsOut {
        let shown = self.show(Secrets::Hidden);
        let is_set = |name: &str| shown.fields.get(name).is_some_and(|value| !value.is_null());
        let (llm_api_key_set, search_api_key_set) = (is_set("llm_api_key"), is_set("search_api_key"));
        let mut settings = SettingsOut::new(shown);
        settings.llm_api_key_set = llm_api_key_set;
        settings.search_api_key_set = search_api_key_set;
        settings.provider_tokens_set = self.hosts_of_tokens();
        settings
    }

    fn show(&self, secrets: Secrets) -> Shown {
        Shown {
            fields: self.show_fields(secrets == Secrets::Clear),
            agent_settings: self.show_agent_settings(secrets),
            conversation_settings: self.show_conversation_settings(),
            llm_profiles: LlmProfilesOut(match self.llm_profiles().shown(secrets) {
                Value::Object(shown) => shown,
                _ => Map::new(),
            }),
        }
    }

    fn show_fields(&self, expose: bool) -> Map<String, Value> {
        let agent_profiles = self.agent_profiles();
        let active = agent_profiles.active();
        let show = |field: &fields::Field| {
            let stored = self.0.get(field.name).filter(|value| !value.is_null());
            let value = stored.cloned().unwrap_or_else(field.default);
            match field.kind {
                fields::Kind::Secret if value.as_str().is_none_or(|text| text.trim().is_empty()) => Value::Null,
                fields::Kind::Secret if !expose => MASK.into(),
                fields::Kind::Mcp => {
                    self.mcp_servers().map_or(Value::Null, |servers| mcp::shown_with_lists(servers, expose))
                }
                fields::Kind::Fixed => match field.name {
                    ACTIVE_AGENT_PROFILE_ID => active.map_or(Value::Null, |active| id::dashed(active.id).into()),
                    ACTIVE_AGENT_PROFILE_REVISION => active.map_or(Value::Null, |active| active.revision.into()),
                    _ => (field.default)(),
                },
                _ => value,
            }
        };
        FIELDS.iter().map(|field| (field.name.to_owned(), show(field))).collect()
    }

    pub(super) fn show_agent_settings(&self, secrets: Secrets) -> AgentSettingsOut {
        let mut shown = Map::new();
        shown.insert("schema_version".to_owned(), 4.into());
        shown.insert("agent_kind".to_owned(), AGENT_KIND.into());
        for (name, mut value) in declared::shown(AGENT, &self.agent_settings(), secrets) {
            if name == "agent_context" {
                let servers = self.mcp_servers().map(|servers| mcp::shown(servers, secrets == Secrets::Clear));
                shown.insert(MCP.to_owned(), servers.unwrap_or_default().into());
            }
            if name == LLM {
                let llm = self.llm();
                let mut fields = llm.shown(secrets);
                if llm.base_url().is_some() && llm.base_url() == llm.model().and_then(llm::default_base_url) {
                    fields.insert("base_url".to_owned(), Value::Null);
                }
                value = fields.into();
            }
            shown.insert(name, value);
        }
        AgentSettingsOut(shown)
    }

    pub(super) fn show_conversation_settings(&self) -> ConversationSettingsOut {
        let mut shown = Map::from_iter([("schema_version".to_owned(), 1.into())]);
        shown.extend(declared::shown(CONVERSATION, &self.conversation_settings(), Secrets::Masked));
        ConversationSettingsOut(shown)
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
