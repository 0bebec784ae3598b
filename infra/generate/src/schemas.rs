//! The component schemas of the OpenAPI document.
//!
//! Types that derive `utoipa::ToSchema` with their crate's feature `openapi` are registered in [`components`]. `schemas.json` has the
//! others: responses that have no type yet, and requests, which are validated by hand and have limits that no type shows.

use serde_json::{Map, Value, json};
use shared::conversation::fields::Trigger;
use shared::conversation::git::{Change, Diff, Status as ChangeStatus};
use shared::conversation::{AppConversation, MetricsSnapshot, TokenUsage};
use shared::http::pydantic::validation::{Loc, Violation};
use shared::http::sort_order::SortOrder;
use shared::sandbox::spec::SandboxSpec;
use shared::sandbox::{ExposedUrl, SandboxStatus};
use shared::start::request::AgentType;
use shared::start::task::{AppConversationStartTask, StartStatus};
use shared::user::git::ProviderType;
use shared::user::settings::SandboxGroupingStrategy;
use utoipa::{PartialSchema, ToSchema};

/// Lists whose pages are schemas: the schema of a page, and of its items.
const PAGES: [(&str, &str); 6] = [
    ("AppConversationPage", "AppConversation"),
    ("AppConversationStartTaskPage", "AppConversationStartTask"),
    ("CustomSecretPage", "SecretName"),
    ("EventPage", "Event"),
    ("SandboxPage", "SandboxInfo"),
    ("SandboxSpecInfoPage", "SandboxSpecInfo"),
];

/// All component schemas, by name.
///
/// # Errors
/// If a schema cannot be represented in JSON, or two have the same name.
pub fn components() -> Result<Map<String, Value>, Box<dyn std::error::Error>> {
    let written: Map<String, Value> = serde_json::from_str(include_str!("schemas.json"))?;
    let mut all: Vec<(String, Value)> = written.into_iter().collect();
    all.extend(PAGES.map(|(page, item)| (page.to_owned(), page_of(item))));
    all.extend([
        value::<AgentType>()?,
        value::<ChangeStatus>()?,
        value::<Loc>()?,
        value::<ProviderType>()?,
        value::<SandboxGroupingStrategy>()?,
        value::<SandboxStatus>()?,
        value::<SortOrder>()?,
        value::<StartStatus>()?,
        value::<Trigger>()?,
        response::<AppConversation>(&[])?,
        response::<AppConversationStartTask>(&[])?,
        response::<Change>(&[])?,
        response::<Diff>(&[])?,
        response::<ExposedUrl>(&[])?,
        response::<MetricsSnapshot>(&[])?,
        response::<SandboxSpec>(&[])?,
        response::<TokenUsage>(&[])?,
        response::<Violation>(&["ctx"])?,
    ]);
    all.sort_by(|(one, _), (other, _)| one.cmp(other));
    if let Some(pair) = all.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(format!("two schemas are named {}", pair[0].0).into());
    }
    Ok(all.into_iter().collect())
}

/// The schema of a value that requests and responses share.
fn value<T: ToSchema + PartialSchema>() -> serde_json::Result<(String, Value)> {
    let mut schema = serde_json::to_value(T::schema())?;
    normalise(&mut schema);
    Ok((T::name().into_owned(), schema))
}

/// The schema of a response: serde writes every field but the optional ones, and no other.
fn response<T: ToSchema + PartialSchema>(optional: &[&str]) -> serde_json::Result<(String, Value)> {
    let (name, mut schema) = value::<T>()?;
    let fields = schema["properties"].as_object().into_iter().flat_map(Map::keys);
    let required: Vec<String> = fields.filter(|field| !optional.contains(&field.as_str())).cloned().collect();
    schema["required"] = json!(required);
    // Defaults of fields are for reading stored records.
    for field in schema["properties"].as_object_mut().into_iter().flat_map(Map::values_mut) {
        if let Some(field) = field.as_object_mut() {
            field.remove("default");
        }
    }
    schema["additionalProperties"] = json!(false);
    Ok((name, schema))
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
