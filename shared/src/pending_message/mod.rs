//! Pending messages: a queue per conversation of messages that are sent, in order, when the conversation is ready.

pub mod delivery;
pub mod store;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use uuid::Uuid;

use crate::http::pydantic::validation::{Checker, Loc, Violation};
use crate::id::as_hex;
use crate::start::request::Content;

/// The most pending messages of a conversation.
pub const MAX_MESSAGES: usize = 10;

/// A message in the queue.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PendingMessage {
    #[serde(with = "as_hex")]
    pub id: Uuid,
    /// The parts as JSON; `None` if they are in the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// The key of the object that contains the parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub object: Option<String>,
}

/// Reads the body of a message: `{content: [at least one part], role: "user"}`.
///
/// # Errors
/// The contract's message for the violation.
pub fn read_body(body: &[u8]) -> Result<Vec<Content>, String> {
    let given: Value = serde_json::from_slice(body).map_err(|_| "Invalid request body".to_owned())?;
    let given = given.as_object().ok_or_else(|| "Invalid request body".to_owned())?;
    let parts = given.get("content").filter(|content| content.as_array().is_some_and(|parts| !parts.is_empty()));
    let parts = parts.ok_or_else(|| "content must be a non-empty list".to_owned())?;
    let mut check = Checker::new("content");
    let read = Content::read_list(&mut check, parts);
    let content = check.finish(read).map_err(|violations| {
        let lines: Vec<String> = violations.iter().map(one_line).collect();
        format!("Invalid content format: {}", lines.join("; "))
    })?;
    match given.get("role") {
        None | Some(Value::Null) => Ok(content),
        // Agents accept only messages of users.
        Some(role) if role == "user" => Ok(content),
        Some(_) => Err("role must be user".to_owned()),
    }
}

/// Formats the location and the message of a violation.
fn one_line(violation: &Violation) -> String {
    let location: Vec<String> = violation
        .loc
        .iter()
        .map(|step| match step {
            Loc::Key(key) => key.clone().into_owned(),
            Loc::Index(index) => index.to_string(),
        })
        .collect();
    format!("{}: {}", location.join("."), violation.msg)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_invalid_message_gets_the_contracts_error() {
        let read = |body: &str| read_body(body.as_bytes());
        for (body, expected) in [
            ("", "Invalid request body"),
            ("{", "Invalid request body"),
            ("[1]", "Invalid request body"),
            ("{}", "content must be a non-empty list"),
            (r#"{"content": []}"#, "content must be a non-empty list"),
            (r#"{"content": "Hello"}"#, "content must be a non-empty list"),
            (
                r#"{"content": [{"type": "text"}]}"#,
                "Invalid content format: content.0.TextContent.text: Field required",
            ),
            (r#"{"content": [{"text": "x"}], "role": "assistant"}"#, "role must be user"),
        ] {
            let error = read(body).expect_err(body);
            assert!(error.starts_with(expected), "{body}: {error}");
        }
        let parts =
            r#"{"content": [{"type": "text", "text": "x"}, {"type": "image", "image_urls": ["y"]}], "role": null}"#;
        assert_eq!(read(parts).map(|content| content.len()), Ok(2));
    }
}
