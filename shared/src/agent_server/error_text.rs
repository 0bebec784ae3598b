//! Extracts the error message from an agent server's error response, without the parts that repeat the request.
//!
//! The text is stored in records of starts, returned in responses and logged. FastAPI repeats the refused value as `input` (for a missing
//! field the whole object around it, such as the model's settings with its key), pydantic includes it in its message as `input_value=…`,
//! and any exception may quote the value that caused it.

use serde_json::{Value, json};

use crate::mask;

/// The maximum length of a text in characters.
const LIMIT: usize = 2000;
/// The maximum number of violations of a 422.
const VIOLATIONS: usize = 20;
/// Fields that repeat the request, or that have the same value in every error.
const REPEATED: [&str; 3] = ["input", "ctx", "url"];

/// The `detail` of every 500, whatever its cause. It adds nothing to the status.
const NO_DETAIL: &str = "Internal Server Error";

/// Returns the agent server's error message without these secrets. `exception` has more detail than `detail` if both exist. An exception
/// may have no text; `error_id`, which version 1.49 and later add, then finds the exception in the agent server's log.
pub(super) fn of(body: &[u8], secrets: &[String]) -> String {
    let text = match serde_json::from_slice::<Value>(body) {
        Ok(json) => match json.get("exception").or_else(|| json.get("detail")).unwrap_or(&json) {
            Value::String(text) if !text.trim().is_empty() && text != NO_DETAIL => text.clone(),
            Value::String(_) => match json.get("error_id").and_then(Value::as_str) {
                Some(error_id) => format!("an error without a text; its log has it under error_id {error_id}"),
                None => String::new(),
            },
            Value::Array(violations) => {
                violations.iter().take(VIOLATIONS).map(violation).collect::<Value>().to_string()
            }
            other => without_repeated(other).to_string(),
        },
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    // Mask before cutting: otherwise the cut could split a secret, and its first half would remain.
    let text = mask::masked(&without_input_values(&text), secrets.iter().map(String::as_str));
    text.trim().chars().take(LIMIT).collect()
}

/// Reduces a violation to its type, location and message.
fn violation(given: &Value) -> Value {
    match (given.get("type"), given.get("loc"), given.get("msg")) {
        (kind, place, Some(message)) => json!({"type": kind, "loc": place, "msg": message}),
        _ => without_repeated(given),
    }
}

fn without_repeated(value: &Value) -> Value {
    match value {
        Value::Array(items) => items.iter().map(without_repeated).collect(),
        Value::Object(fields) => fields
            .iter()
            .filter(|(name, _)| !REPEATED.contains(&name.as_str()))
            .map(|(name, value)| (name.clone(), without_repeated(value)))
            .collect(),
        other => other.clone(),
    }
}

/// Removes `input_value=…` from each of pydantic's messages: `[type=missing, input_value={'api_key': …}, input_type=dict]`.
fn without_input_values(text: &str) -> String {
    const BEGIN: &str = "input_value=";
    const END: &str = ", input_type=";
    let mut parts = text.split(BEGIN);
    let mut kept = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        // The value may contain any text, including the end marker: use the last marker in the line.
        let line = part.lines().next().unwrap_or_default();
        let skipped = line.rfind(END).unwrap_or(line.len());
        kept.push_str(&part[skipped..]);
    }
    kept.replace(", , ", ", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_repeated_of_the_request_is_left_out() {
        let request = json!({"model": "m", "api_key": "sk-canary"});
        let secrets = ["sk-canary".to_owned()];
        for (body, expected) in [
            (
                json!({"detail": [
                    {"type": "missing", "loc": ["body", "agent", "llm", "model"], "msg": "Field required", "input": request},
                    {"type": "value_error", "loc": ["body"], "msg": "Value error", "input": request, "ctx": {"error": request}},
                ]})
                .to_string(),
                r#"[{"type":"missing","loc":["body","agent","llm","model"],"msg":"Field required"},{"type":"value_error","loc":["body"],"msg":"Value error"}]"#,
            ),
            (
                json!({"detail": {"why": "no", "input": request, "errors": [{"ctx": request, "msg": "x"}]}}).to_string(),
                r#"{"why":"no","errors":[{"msg":"x"}]}"#,
            ),
            (json!({"detail": "Internal Server Error", "exception": "the key sk-canary"}).to_string(), "the key **********"),
            (json!({"detail": "the key sk-canary"}).to_string(), "the key **********"),
            (json!({"detail": "Internal Server Error", "exception": ""}).to_string(), ""),
            (json!({"detail": "Internal Server Error"}).to_string(), ""),
            (
                json!({"detail": "Internal Server Error", "exception": " ", "error_id": "4f"}).to_string(),
                "an error without a text; its log has it under error_id 4f",
            ),
            (json!({"llm": {"input": request}}).to_string(), r#"{"llm":{}}"#),
            ("<html>sk-canary".to_owned(), "<html>**********"),
            (json!("sk-canary").to_string(), "**********"),
            (
                json!({"exception": "1 validation error for LLM\nmodel\n  Field required [type=missing, input_value={'api_key': 'sk-can...ry'}, input_type=dict]\n    For more"})
                    .to_string(),
                "1 validation error for LLM\nmodel\n  Field required [type=missing, input_type=dict]\n    For more",
            ),
            (
                json!({"exception": "a [input_value='sk-, input_type=x', input_type=str] b\nc [input_value='sk-can"}).to_string(),
                "a [, input_type=str] b\nc [",
            ),
        ] {
            let text = of(body.as_bytes(), &secrets);
            assert_eq!(text, expected);
            assert!(!text.contains("sk-"), "{text}");
        }
    }

    #[test]
    fn a_text_is_cut_and_no_secret_with_it() {
        let secret = "s".repeat(100);
        let body = format!("{}{secret}", "x".repeat(LIMIT - 50));
        let text = of(body.as_bytes(), &[secret]);
        assert_eq!(text, format!("{}**********", "x".repeat(LIMIT - 50)));
        assert_eq!(of("é".repeat(5000).as_bytes(), &[]).chars().count(), LIMIT);
        let many = json!({"detail": vec![json!({"type": "t", "loc": [], "msg": "m"}); 1000]}).to_string();
        assert_eq!(
            serde_json::from_str::<Value>(&of(many.as_bytes(), &[])).expect("JSON").as_array().map(Vec::len),
            Some(20)
        );
    }
}
