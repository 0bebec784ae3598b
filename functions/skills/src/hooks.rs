//! The hooks of a conversation's project, as they are now.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::StatusCode;
use serde_json::{Value, json};
use shared::agent_server::Failure;
use shared::error::Result;
use shared::http::caller::Caller;

use crate::{Context, ConversationPath, conversation, legacy_error, workspace_or_legacy_error};

/// In the order in which they are shown.
const EVENTS: [&str; 6] =
    ["pre_tool_use", "post_tool_use", "user_prompt_submit", "session_start", "session_end", "stop"];

pub(crate) async fn hooks(
    State(context): State<Context>,
    Caller(user): Caller,
    path: ConversationPath,
) -> Result<Response> {
    let id = conversation(path)?;
    let place = context.places.find(&user, id).await?;
    let inside = match workspace_or_legacy_error(place, id, || answer(&[])) {
        Ok(inside) => inside,
        Err(error) => return Ok(*error),
    };
    let asked = context.within(async { inside.agent_server.hooks(&inside.folder().await?).await });
    let failure = match asked.await {
        Ok(None) => return Ok(answer(&[])),
        Ok(Some(config)) => match shown(&config) {
            Some(hooks) => return Ok(answer(&hooks)),
            None => Failure::Malformed("no hook configuration".to_owned()),
        },
        Err(error) => {
            tracing::warn!(conversation = %id, %error, "hooks.not_loaded");
            error.failure
        }
    };
    let error = match failure {
        Failure::Status(status, _) => format!("Agent-server returned status {} when loading hooks", status.as_u16()),
        Failure::Unreachable | Failure::TimedOut | Failure::CutOff => {
            "Failed to reach agent-server when loading hooks".to_owned()
        }
        Failure::Malformed(_) | Failure::TooLarge(_) => {
            "Agent-server's answer made no sense when loading hooks".to_owned()
        }
    };
    Ok(legacy_error(StatusCode::BAD_GATEWAY, error))
}

fn answer(hooks: &[Value]) -> Response {
    Json(json!({"hooks": hooks})).into_response()
}

/// A configuration as it is shown: one element for each event that has hooks. `None` when it is none.
fn shown(config: &Value) -> Option<Vec<Value>> {
    let config = config.as_object()?;
    let mut events = Vec::new();
    for event in EVENTS {
        let matchers = match config.get(event) {
            None | Some(Value::Null) => continue,
            Some(matchers) => matchers.as_array()?.iter().map(shown_matcher).collect::<Option<Vec<Value>>>()?,
        };
        if !matchers.is_empty() {
            events.push(json!({"event_type": event, "matchers": matchers}));
        }
    }
    Some(events)
}

fn shown_matcher(matcher: &Value) -> Option<Value> {
    let given = matcher.as_object()?;
    let or = |value: Option<&Value>, default: Value| value.filter(|value| !value.is_null()).cloned().unwrap_or(default);
    let hooks = given.get("hooks").map_or(Some([].as_slice()), |hooks| hooks.as_array().map(Vec::as_slice))?;
    let hooks: Vec<Value> = hooks
        .iter()
        .map(|hook| {
            let hook = hook.as_object()?;
            Some(json!({
                "type": or(hook.get("type"), json!("command")),
                "command": hook.get("command")?,
                "timeout": or(hook.get("timeout"), json!(60)),
                "async": or(hook.get("async").or_else(|| hook.get("async_")), json!(false)),
            }))
        })
        .collect::<Option<_>>()?;
    Some(json!({"matcher": or(given.get("matcher"), json!("*")), "hooks": hooks}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_shown_in_their_order_with_all_that_is_known_of_them() {
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
            json!(shown(&config).expect("hooks")),
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
        assert_eq!(shown(&json!({})), Some(vec![]));
        for nonsense in [
            json!([]),
            json!("hooks"),
            json!({"stop": {}}),
            json!({"stop": [1]}),
            json!({"stop": [{"hooks": 1}]}),
            json!({"stop": [{"hooks": [{}]}]}),
        ] {
            assert_eq!(shown(&nonsense), None, "{nonsense}");
        }
    }
}
