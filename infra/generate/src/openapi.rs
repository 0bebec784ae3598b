//! The OpenAPI document: the route table's operations, with the component schemas of [`crate::schemas`].

use routes::{Authentication, ErrorResponse, Group, Location, Parameter, Response, Route, Schema};
use serde_json::{Map, Value, json};

use crate::schemas;

const DESCRIPTION: &str = "The conversation API of the OpenHands app server. Ids are accepted with and without dashes. Unknown \
    parameters and fields are ignored. docs/deviations.md lists the differences from the reference.";

pub(crate) fn document() -> Result<String, Box<dyn std::error::Error>> {
    let groups = || routes::GROUPS.iter().chain([&routes::LOCAL]);
    let mut tags: Vec<&str> = groups().map(|group| group.tag).collect();
    tags.dedup();
    let mut paths = Map::new();
    for group in groups() {
        for route in group.routes {
            let methods = paths.entry(route.path).or_insert_with(|| json!({}));
            methods[route.method.as_str().to_lowercase()] = operation(group, route);
        }
    }
    let document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "openhands-lambda",
            "version": env!("CARGO_PKG_VERSION"),
            "license": {"name": "MIT", "identifier": "MIT"},
            "description": DESCRIPTION,
        },
        "servers": [{"url": "/"}],
        "security": [{"bearer": []}, {"accessToken": []}, {"sessionApiKey": []}],
        "tags": tags.iter().map(|tag| json!({"name": tag})).collect::<Vec<_>>(),
        "paths": paths,
        "components": {
            "securitySchemes": security_schemes(),
            "schemas": schemas::components()?,
            "responses": shared_responses(),
        },
    });
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}

/// A caller may use each of the first three headers; the document's own `security` lists them.
fn security_schemes() -> Value {
    let in_header = |name: &str, description: &str| json!({"type": "apiKey", "in": "header", "name": name, "description": description});
    json!({
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, or a token of the configured issuer."},
        "accessToken": in_header("X-Access-Token", "An API key, or a token of the configured issuer."),
        "sessionApiKey": in_header("X-Session-API-Key", "An API key, or a token of the configured issuer."),
        "sandbox": in_header("X-Session-API-Key", "The session key of a sandbox."),
        "agent": in_header("X-Access-Token", "The token that an agent received for one provider."),
        "start": in_header("X-Access-Token", "The token that the commands of a start received."),
    })
}

fn operation(group: &Group, route: &Route) -> Value {
    let mut operation = Map::new();
    let mut put = |name: &str, value: Value| operation.insert(name.to_owned(), value);
    put("operationId", json!(route.operation));
    put("summary", json!(route.summary));
    put("tags", json!([group.tag]));
    match route.authentication {
        Authentication::Caller => {}
        Authentication::SandboxKey => {
            put("security", json!([{"sandbox": []}]));
        }
        Authentication::AgentToken => {
            put("security", json!([{"agent": []}]));
        }
        Authentication::StartToken => {
            put("security", json!([{"start": []}]));
        }
        Authentication::None => {
            put("security", json!([]));
        }
    }
    if let Some(description) = route.description {
        put("description", json!(description));
    }
    let parameters: Vec<Value> = route.all_parameters().map(parameter).collect();
    if !parameters.is_empty() {
        put("parameters", Value::Array(parameters));
    }
    if let Some(body) = route.body {
        put("requestBody", json!({"required": true, "content": content("application/json", &Schema::Component(body))}));
    }
    put("responses", responses(route));
    Value::Object(operation)
}

fn responses(route: &Route) -> Value {
    let mut responses: Vec<(u16, Value)> = route.own_responses.iter().map(|own| (own.status, response(own))).collect();
    for error in route.error_responses() {
        if responses.iter().all(|(status, _)| *status != error.status) {
            responses.push((error.status, json!({"$ref": format!("#/components/responses/{}", error.name)})));
        }
    }
    responses.sort_by_key(|(status, _)| *status);
    responses.into_iter().map(|(status, response)| (status.to_string(), response)).collect::<Map<_, _>>().into()
}

fn response(response: &Response) -> Value {
    let mut value = json!({"description": response.description});
    if !response.headers.is_empty() {
        let headers = response.headers.iter().map(|header| (header.name.to_owned(), parameter(header)));
        value["headers"] = headers.collect::<Map<_, _>>().into();
    }
    if let Some((media_type, schema)) = &response.content {
        value["content"] = content(media_type, schema);
    }
    value
}

fn shared_responses() -> Value {
    let response = |error: &ErrorResponse| {
        let mut value = json!({"description": error.description});
        if let Some(schema) = error.schema {
            value["content"] = content("application/json", &Schema::Component(schema));
        }
        (error.name.to_owned(), value)
    };
    routes::ERROR_RESPONSES.iter().map(response).collect::<Map<_, _>>().into()
}

fn content(media_type: &str, schema: &Schema) -> Value {
    json!({media_type: {"schema": schema_of(schema)}})
}

fn parameter(parameter: &Parameter) -> Value {
    let mut value = Map::new();
    let mut put = |name: &str, field: Value| value.insert(name.to_owned(), field);
    match parameter.location {
        Location::Path | Location::Query | Location::RequestHeader => {
            put("name", json!(parameter.name));
            put(
                "in",
                json!(match parameter.location {
                    Location::Path => "path",
                    Location::Query => "query",
                    Location::RequestHeader | Location::Header => "header",
                }),
            );
            put("required", json!(parameter.is_required));
        }
        Location::Header if parameter.is_required => {
            put("required", json!(true));
        }
        Location::Header => {}
    }
    put("schema", schema_of(&parameter.schema));
    if let Some(description) = parameter.description {
        put("description", json!(description));
    }
    Value::Object(value)
}

fn schema_of(schema: &Schema) -> Value {
    let component = |name: &str| json!({"$ref": format!("#/components/schemas/{name}")});
    let of_type = |name: &str, fields: &[(&str, Option<Value>)]| {
        let mut value = json!({"type": name});
        for (field, given) in fields {
            if let Some(given) = given {
                value[*field] = given.clone();
            }
        }
        value
    };
    match schema {
        Schema::Component(name) => component(name),
        Schema::ListOf(name) => json!({"type": "array", "items": component(name)}),
        Schema::NullableListOf(name) => {
            json!({"type": "array", "items": {"anyOf": [component(name), {"type": "null"}]}})
        }
        Schema::Text { format, max_length } => {
            of_type("string", &[("format", format.map(Value::from)), ("maxLength", max_length.map(Value::from))])
        }
        Schema::Choice(choices) => json!({"type": "string", "enum": choices}),
        Schema::TextList { format, max_items } => {
            let items = of_type("string", &[("format", format.map(Value::from))]);
            of_type("array", &[("items", Some(items)), ("maxItems", max_items.map(Value::from))])
        }
        Schema::Integer { minimum, maximum, default } => {
            let [minimum, maximum, default] = [minimum, maximum, default].map(|bound| bound.map(Value::from));
            of_type("integer", &[("minimum", minimum), ("maximum", maximum), ("default", default)])
        }
        Schema::Boolean { default } => of_type("boolean", &[("default", default.map(Value::from))]),
        Schema::Binary => json!({"type": "string", "format": "binary"}),
        Schema::Object => json!({"type": "object"}),
        Schema::Any => json!({}),
    }
}
