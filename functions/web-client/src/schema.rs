//! The schemas of the settings, from which front ends of later versions draw their pages. They list only the settings that a start reads,
//! under the names with which `POST /api/v1/settings` accepts them in its `…_diff` objects.

use serde::Serialize;
use serde_json::Value;

/// The settings that a front end shows on one page.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = SettingsSchema))]
pub struct SettingsSchemaOut {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    model_name: &'static str,
    sections: Vec<SettingsSectionOut>,
}

/// A group of settings.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = SettingsSection))]
pub struct SettingsSectionOut {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    key: &'static str,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    label: &'static str,
    fields: Vec<SettingsFieldOut>,
}

/// A setting as a front end draws it.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = SettingsField))]
pub struct SettingsFieldOut {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    key: &'static str,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    label: &'static str,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    description: &'static str,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    section: &'static str,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    section_label: &'static str,
    value_type: ValueType,
    default: Value,
    /// Always empty: no setting here has a fixed set of values.
    choices: Vec<Value>,
    /// Always empty: no setting here depends on another one.
    depends_on: Vec<String>,
    prominence: Prominence,
    secret: bool,
    required: bool,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
enum ValueType {
    String,
    Integer,
    Boolean,
}

#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
enum Prominence {
    Critical,
    Major,
    Minor,
}

/// What a setting does not have in common with the others of its section.
struct Field {
    key: &'static str,
    label: &'static str,
    description: &'static str,
    value_type: ValueType,
    default: Value,
    prominence: Prominence,
}

impl Field {
    fn text(key: &'static str, label: &'static str, description: &'static str, prominence: Prominence) -> Self {
        Self { key, label, description, value_type: ValueType::String, default: Value::Null, prominence }
    }
}

fn section(key: &'static str, label: &'static str, fields: impl IntoIterator<Item = Field>) -> SettingsSectionOut {
    let fields = fields.into_iter().map(|field| SettingsFieldOut {
        key: field.key,
        label: field.label,
        description: field.description,
        section: key,
        section_label: label,
        value_type: field.value_type,
        default: field.default,
        choices: Vec::new(),
        depends_on: Vec::new(),
        prominence: field.prominence,
        secret: field.key == "llm.api_key",
        required: field.key == "llm.model",
    });
    SettingsSectionOut { key, label, fields: fields.collect() }
}

/// The settings of the agent: `agent_settings_diff`.
pub(crate) fn agent() -> SettingsSchemaOut {
    let text = |key, label, description| Field::text(key, label, description, Prominence::Critical);
    let llm = section(
        "llm",
        "LLM",
        [
            text("llm.model", "Model", "The model to use, as LiteLLM names it."),
            text("llm.api_key", "API key", "The key for the model; stored encrypted, and never shown."),
            text("llm.base_url", "Base URL", "The URL that serves the model, unless its own provider does."),
        ],
    );
    let condenser = section(
        "condenser",
        "Condenser",
        [Field {
            key: "condenser.max_size",
            label: "Maximum size",
            description: "How many events a conversation has before older ones are summarised.",
            value_type: ValueType::Integer,
            default: Value::Null,
            prominence: Prominence::Minor,
        }],
    );
    SettingsSchemaOut { model_name: "AgentSettings", sections: vec![llm, condenser] }
}

/// The settings of a conversation: `conversation_settings_diff`.
pub(crate) fn conversation() -> SettingsSchemaOut {
    let verification = section(
        "verification",
        "Verification",
        [
            Field {
                key: "confirmation_mode",
                label: "Confirmation mode",
                description: "Whether the agent asks for confirmation before it acts.",
                value_type: ValueType::Boolean,
                default: Value::Bool(false),
                prominence: Prominence::Major,
            },
            Field::text(
                "security_analyzer",
                "Security analyzer",
                "The analyzer that assesses the risk of an action.",
                Prominence::Major,
            ),
        ],
    );
    SettingsSchemaOut { model_name: "ConversationSettings", sections: vec![verification] }
}
