//! The component schemas of the OpenAPI document.
//!
//! Types of responses derive `utoipa::ToSchema` with their crate's feature `openapi` and are registered in [`components`].
//! `schemas.json` has the others: requests, which are validated by hand and have limits that no type shows, events, and the health
//! checks of `cargo local`.

use std::collections::BTreeMap;

use sandboxes::{MessageQueuedOut, SandboxOut, SecretNamesOut};
use serde_json::{Map, Value, json};
use settings::{
    AgentProfileActivatedOut, AgentProfileChangedOut, AgentProfileDiagnosticsOut, AgentProfileOut, AgentProfilesOut,
    CurrentKeyOut, OrganizationMeOut, OrganizationMemberOut, OrganizationOut, OrganizationsOut, ProfileActivatedOut,
    ProfileChangedOut, ProfileOut, ProfilesOut, SkillInfoOut,
};
use shared::conversation::AppConversation;
use shared::conversation::git::{Change, Diff};
use shared::http::response::{DetailOut, InvalidOut, MessageOut, SuccessOut};
use shared::http::secret::SecretNameOut;
use shared::http::sort_order::SortOrder;
use shared::sandbox::spec::SandboxSpec;
use shared::start::request::AgentType;
use shared::start::task::AppConversationStartTask;
use shared::user::git::ProviderType;
use shared::user::settings_document::{SettingsOut, UserOut};
use skills::{HooksOut, LegacyErrorOut, MessageSentOut, SkillsOut};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};
use web_client::{AliveOut, ModelOut, ProviderOut, ServerInfoOut, SettingsSchemaOut, WebClientConfigOut};

/// Lists whose pages are schemas: the schema of a page, and of its items.
const PAGES: [(&str, &str); 9] = [
    ("AppConversationPage", "AppConversation"),
    ("AppConversationStartTaskPage", "AppConversationStartTask"),
    ("CustomSecretPage", "SecretName"),
    ("EventPage", "Event"),
    ("LLMModelPage", "LLMModel"),
    ("LLMProviderPage", "LLMProvider"),
    ("SandboxPage", "SandboxInfo"),
    ("SandboxSpecInfoPage", "SandboxSpecInfo"),
    ("SkillInfoPage", "SkillInfo"),
];

/// Fields that a response may lack.
const OPTIONAL: [(&str, &str); 1] = [("Violation", "ctx")];

/// All component schemas, by name.
///
/// # Errors
/// If a schema cannot be represented in JSON, two have the same name, or a field that is named here does not exist.
pub fn components() -> Result<Map<String, Value>, Box<dyn std::error::Error>> {
    let mut types = Types::default();
    types.add::<AgentType>();
    types.add::<ProviderType>();
    types.add::<SortOrder>();
    types.add::<AppConversation>();
    types.add::<AppConversationStartTask>();
    types.add::<Change>();
    types.add::<Diff>();
    types.add::<SandboxSpec>();
    types.add::<DetailOut>();
    types.add::<InvalidOut>();
    types.add::<MessageOut>();
    types.add::<SuccessOut>();
    types.add::<SecretNameOut>();
    types.add::<SettingsOut>();
    types.add::<UserOut>();
    types.add::<MessageQueuedOut>();
    types.add::<SandboxOut>();
    types.add::<SecretNamesOut>();
    types.add::<CurrentKeyOut>();
    types.add::<OrganizationMeOut>();
    types.add::<OrganizationMemberOut>();
    types.add::<OrganizationOut>();
    types.add::<OrganizationsOut>();
    types.add::<ProfileActivatedOut>();
    types.add::<ProfileChangedOut>();
    types.add::<ProfileOut>();
    types.add::<ProfilesOut>();
    types.add::<HooksOut>();
    types.add::<LegacyErrorOut>();
    types.add::<MessageSentOut>();
    types.add::<SkillsOut<'_>>();
    types.add::<SkillInfoOut>();
    types.add::<AgentProfileActivatedOut>();
    types.add::<AgentProfileChangedOut>();
    types.add::<AgentProfileDiagnosticsOut>();
    types.add::<AgentProfileOut>();
    types.add::<AgentProfilesOut>();
    types.add::<AliveOut>();
    types.add::<ModelOut>();
    types.add::<ProviderOut>();
    types.add::<ServerInfoOut>();
    types.add::<SettingsSchemaOut>();
    types.add::<WebClientConfigOut>();
    let mut all: Map<String, Value> = serde_json::from_str(include_str!("schemas.json"))?;
    let pages = PAGES.map(|(page, item)| (page.to_owned(), page_of(item)));
    for (name, schema) in pages.into_iter().chain(types.schemas()?) {
        if all.insert(name.clone(), schema).is_some() {
            return Err(format!("two schemas are named {name}").into());
        }
    }
    all.sort_keys();
    Ok(all)
}

/// The schemas of types and of the types of their fields.
#[derive(Default)]
struct Types(Vec<(String, RefOr<Schema>)>);

impl Types {
    fn add<T: ToSchema + PartialSchema>(&mut self) {
        self.0.push((T::name().into_owned(), T::schema()));
        T::schemas(&mut self.0);
    }

    fn schemas(self) -> Result<BTreeMap<String, Value>, Box<dyn std::error::Error>> {
        let mut all = BTreeMap::new();
        for (name, schema) in self.0 {
            let mut schema = serde_json::to_value(schema)?;
            normalise(&mut schema);
            complete(&name, &mut schema);
            // Types share the types of their fields.
            if all.get(&name).is_some_and(|other| *other != schema) {
                return Err(format!("two schemas are named {name}").into());
            }
            all.insert(name, schema);
        }
        for (schema, name) in OPTIONAL {
            field(&mut all, schema, name)?;
        }
        for (schema, name, value) in narrower() {
            *field(&mut all, schema, name)? = value;
        }
        Ok(all)
    }
}

/// Completes the schema of a response: serde writes every field except the optional ones, and no other.
fn complete(name: &str, schema: &mut Value) {
    let Some(fields) = schema.get_mut("properties").and_then(Value::as_object_mut) else { return };
    for field in fields.values_mut().filter_map(Value::as_object_mut) {
        // Defaults of fields are for reading stored records.
        field.remove("default");
    }
    let required: Vec<&String> = fields.keys().filter(|field| !OPTIONAL.contains(&(name, field))).collect();
    let required = json!(required);
    schema["required"] = required;
    schema["additionalProperties"] = json!(false);
}

/// The schemas of fields that say more than the fields' types.
fn narrower() -> [(&'static str, &'static str, Value); 13] {
    let component = |name: &str| json!({"$ref": format!("#/components/schemas/{name}")});
    let max_size = json!({"type": ["integer", "null"], "minimum": 20});
    let mcp_config = json!({"anyOf": [component("McpConfig"), {"type": "null"}]});
    let mcp_servers = json!({"type": "object", "description": "MCP servers by name.", "additionalProperties": component("McpServer")});
    let llm_profiles =
        json!({"type": "object", "description": "Configurations by name.", "additionalProperties": component("Llm")});
    [
        ("AgentSettings", "agent_kind", json!({"const": "openhands"})),
        ("LlmProfiles", "profiles", llm_profiles),
        ("AgentSettings", "mcp_config", mcp_servers),
        ("Alive", "status", json!({"const": "ok"})),
        ("MessageQueued", "position", json!({"type": "integer", "minimum": 1})),
        ("MessageQueued", "queued", json!({"const": true})),
        ("MessageSent", "success", json!({"const": true})),
        ("Settings", "condenser_max_size", max_size.clone()),
        ("Settings", "mcp_config", mcp_config.clone()),
        ("Success", "success", json!({"const": true})),
        ("UserInfo", "condenser_max_size", max_size),
        ("UserInfo", "mcp_config", mcp_config),
        ("WebClientConfig", "app_mode", json!({"type": "string", "enum": ["oss", "saas"]})),
    ]
}

/// The schema of a field.
fn field<'s>(schemas: &'s mut BTreeMap<String, Value>, schema: &str, name: &str) -> Result<&'s mut Value, String> {
    let found = schemas.get_mut(schema).and_then(|found| found.get_mut("properties")?.get_mut(name));
    found.ok_or_else(|| format!("the schema {schema} has no field {name}"))
}

fn page_of(item: &str) -> Value {
    json!({
        "type": "object",
        "properties": {
            "items": {"type": "array", "items": {"$ref": format!("#/components/schemas/{item}")}},
            "next_page_id": {"type": ["string", "null"], "description": "The `page_id` of the next page; null on the last one."},
        },
        "required": ["items", "next_page_id"],
        "additionalProperties": false,
    })
}

/// Removes what depends on Rust alone: the widths of numbers, and the line breaks of doc comments.
fn normalise(schema: &mut Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(normalise),
        Value::Object(fields) => {
            let is_width = |format: &Value| {
                format.as_str().is_some_and(|name| name.starts_with("int") || name == "float" || name == "double")
            };
            if fields.get("format").is_some_and(is_width) {
                fields.remove("format");
            }
            // The keys of objects are texts without being described so.
            if fields.get("propertyNames").is_some_and(|names| *names == json!({"type": "string"})) {
                fields.remove("propertyNames");
            }
            if let Some(Value::String(description)) = fields.get_mut("description") {
                *description = description.replace('\n', " ");
            }
            fields.values_mut().for_each(normalise);
        }
        _ => {}
    }
}
