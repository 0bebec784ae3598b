//! What settings there are, in the form from which front ends of later versions draw their pages. Only those that a start reads,
//! under the names by which `POST /api/v1/settings` takes them in its `…_diff` objects.

use serde_json::{Value, json};

/// A setting as a front end draws it.
struct Field {
    key: &'static str,
    label: &'static str,
    description: &'static str,
    kind: &'static str,
    default: Value,
    prominence: &'static str,
}

impl Field {
    fn shown(self, section: &str, section_label: &str) -> Value {
        json!({
            "key": self.key,
            "label": self.label,
            "description": self.description,
            "section": section,
            "section_label": section_label,
            "value_type": self.kind,
            "default": self.default,
            "choices": [],
            "depends_on": [],
            "prominence": self.prominence,
            "secret": self.key == "llm.api_key",
            "required": self.key == "llm.model",
        })
    }
}

fn section(key: &str, label: &str, fields: impl IntoIterator<Item = Field>) -> Value {
    let fields: Vec<Value> = fields.into_iter().map(|field| field.shown(key, label)).collect();
    json!({"key": key, "label": label, "fields": fields})
}

/// Those of the agent: `agent_settings_diff`.
pub fn agent() -> Value {
    let text = |key, label, description| Field {
        key,
        label,
        description,
        kind: "string",
        default: Value::Null,
        prominence: "critical",
    };
    let llm = section(
        "llm",
        "LLM",
        [
            text("llm.model", "Model", "The model to use, as LiteLLM names it."),
            text("llm.api_key", "API key", "The key for it; kept sealed, and never shown."),
            text("llm.base_url", "Base URL", "Where the model is served, if not by its own provider."),
        ],
    );
    let condenser = section(
        "condenser",
        "Condenser",
        [Field {
            key: "condenser.max_size",
            label: "Maximum size",
            description: "How many events a conversation has before older ones are summarised.",
            kind: "integer",
            default: Value::Null,
            prominence: "minor",
        }],
    );
    json!({"model_name": "AgentSettings", "sections": [llm, condenser]})
}

/// Those of a conversation: `conversation_settings_diff`.
pub fn conversation() -> Value {
    let verification = section(
        "verification",
        "Verification",
        [
            Field {
                key: "confirmation_mode",
                label: "Confirmation mode",
                description: "Whether the agent asks before it acts.",
                kind: "boolean",
                default: Value::Bool(false),
                prominence: "major",
            },
            Field {
                key: "security_analyzer",
                label: "Security analyzer",
                description: "Who judges how risky an action is.",
                kind: "string",
                default: Value::Null,
                prominence: "major",
            },
        ],
    );
    json!({"model_name": "ConversationSettings", "sections": [verification]})
}
