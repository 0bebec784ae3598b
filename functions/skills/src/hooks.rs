//! Returns the current hooks of a conversation's project.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde::Serialize;
use serde_json::Value;
use shared::agent_server::Failure;
use shared::error::Result;
use shared::http::caller::Caller;
use shared::http::extract::ConversationId;

use crate::{Context, legacy_error, workspace_or_legacy_error};

/// The events that have hooks, in the order of the response.
const EVENTS: [&str; 6] =
    ["pre_tool_use", "post_tool_use", "user_prompt_submit", "session_start", "session_end", "stop"];

pub(crate) async fn hooks(
    State(context): State<Context>,
    Caller(user): Caller,
    ConversationId(id): ConversationId,
) -> Result<Response> {
    let lookup = context.locator.find(&user, id).await?;
    let workspace = match workspace_or_legacy_error(lookup, id, || response(Vec::new())) {
        Ok(workspace) => workspace,
        Err(error) => return Ok(*error),
    };
    let loaded = context.within(async { workspace.agent_server.hooks(&workspace.folder().await?).await });
    let failure = match loaded.await {
        Ok(None) => return Ok(response(Vec::new())),
        Ok(Some(config)) => match read_hooks(&config) {
            Some(hooks) => return Ok(response(hooks)),
            None => Failure::Malformed("not a hook configuration".to_owned()),
        },
        Err(error) => {
            tracing::warn!(conversation = %id, %error, "hooks.load_failed");
            error.failure
        }
    };
    let error = match failure {
        Failure::Status(status, _) => format!("Agent-server returned status {} when loading hooks", status.as_u16()),
        Failure::Unreachable | Failure::TimedOut | Failure::CutOff => {
            "Failed to reach agent-server when loading hooks".to_owned()
        }
        Failure::Malformed(_) | Failure::TooLarge(_) => {
            "Agent-server returned an invalid response when loading hooks".to_owned()
        }
    };
    Ok(legacy_error(StatusCode::BAD_GATEWAY, error))
}

fn response(hooks: Vec<HookEventOut>) -> Response {
    Json(HooksOut { hooks }).into_response()
}

/// The hooks of a project: one element for each event that has hooks.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Hooks))]
pub struct HooksOut {
    hooks: Vec<HookEventOut>,
}

/// The hooks of one event.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = HookEvent))]
pub struct HookEventOut {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    event_type: &'static str,
    matchers: Vec<HookMatcherOut>,
}

/// The hooks that run for the tools that a pattern matches. Values are those of the configuration, of whatever type.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = HookMatcher))]
pub struct HookMatcherOut {
    /// `*` unless the configuration has a pattern.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    matcher: Value,
    hooks: Vec<HookOut>,
}

/// A command that runs at an event.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Hook))]
pub struct HookOut {
    /// `command` by default.
    #[serde(rename = "type")]
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    kind: Value,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    command: Value,
    /// In seconds; 60 by default.
    #[cfg_attr(feature = "openapi", schema(value_type = i64))]
    timeout: Value,
    #[serde(rename = "async")]
    #[cfg_attr(feature = "openapi", schema(value_type = bool))]
    is_async: Value,
}

/// Reads a configuration as an agent server returns it; `None` when it is malformed.
fn read_hooks(config: &Value) -> Option<Vec<HookEventOut>> {
    let config = config.as_object()?;
    let mut events = Vec::new();
    for event_type in EVENTS {
        let matchers = match config.get(event_type) {
            None | Some(Value::Null) => continue,
            Some(matchers) => matchers.as_array()?.iter().map(read_matcher).collect::<Option<Vec<_>>>()?,
        };
        if !matchers.is_empty() {
            events.push(HookEventOut { event_type, matchers });
        }
    }
    Some(events)
}

fn read_matcher(matcher: &Value) -> Option<HookMatcherOut> {
    let matcher = matcher.as_object()?;
    let hooks = matcher.get("hooks").map_or(Some([].as_slice()), |hooks| hooks.as_array().map(Vec::as_slice))?;
    let hooks = hooks.iter().map(read_hook).collect::<Option<_>>()?;
    Some(HookMatcherOut { matcher: value_or(matcher.get("matcher"), "*"), hooks })
}

fn read_hook(hook: &Value) -> Option<HookOut> {
    let hook = hook.as_object()?;
    Some(HookOut {
        kind: value_or(hook.get("type"), "command"),
        command: hook.get("command")?.clone(),
        timeout: value_or(hook.get("timeout"), 60),
        is_async: value_or(hook.get("async").or_else(|| hook.get("async_")), false),
    })
}

fn value_or(value: Option<&Value>, default: impl Into<Value>) -> Value {
    value.filter(|value| !value.is_null()).cloned().unwrap_or_else(|| default.into())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_are_listed_in_order_with_defaults() {
        let config = json!({
            "stop": [{"hooks": [{"command": "bye"}]}],
            "session_end": [],
            "session_start": null,
            "pre_tool_use": [{"matcher": "terminal", "hooks": [
                {"type": "command", "command": "true", "timeout": 5, "async": true, "new": 1},
                {"command": "false", "async_": true},
            ]}],
        });
        assert_eq!(
            json!(read_hooks(&config).expect("hooks")),
            json!([
                {"event_type": "pre_tool_use", "matchers": [{"matcher": "terminal", "hooks": [
                    {"type": "command", "command": "true", "timeout": 5, "async": true},
                    {"type": "command", "command": "false", "timeout": 60, "async": true},
                ]}]},
                {"event_type": "stop", "matchers": [{"matcher": "*", "hooks": [
                    {"type": "command", "command": "bye", "timeout": 60, "async": false},
                ]}]},
            ])
        );
        assert_eq!(read_hooks(&json!({})), Some(vec![]));
        for malformed in [
            json!([]),
            json!("hooks"),
            json!({"stop": {}}),
            json!({"stop": [1]}),
            json!({"stop": [{"hooks": 1}]}),
            json!({"stop": [{"hooks": [{}]}]}),
        ] {
            assert_eq!(read_hooks(&malformed), None, "{malformed}");
        }
    }
}
