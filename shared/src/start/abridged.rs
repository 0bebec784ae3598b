//! The abridged start request: a short form for responses that the whole request would make too large.
//!
//! A request may hold images of several megabytes, and a list shows a hundred of them. The abridged form has the request's fields and at
//! most [`MAX_LENGTH`] bytes: long texts are cut, a long message is reduced to the beginning of its first text, and other long values are
//! left out.

use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};

/// The largest size in bytes of an abridged request, as JSON.
pub const MAX_LENGTH: usize = 6 * 1024;
/// A field is shown unchanged if its JSON has at most this many bytes.
const KEPT: usize = 448;
/// The largest size in bytes of a cut text's JSON, without the note at its end.
const TEXT: usize = 300;

/// Abridges a request, which is in the form that start tasks show. A short request stays unchanged.
#[must_use]
pub fn abridged(request: &str) -> String {
    if request.len() <= KEPT {
        return request.to_owned();
    }
    let Ok(fields) = serde_json::from_str::<Fields<'_>>(request) else {
        tracing::error!("start.request_not_readable");
        return "null".to_owned();
    };
    let mut short = Map::new();
    for (name, value) in fields.0 {
        let text = value.get();
        let value = if text.len() <= KEPT {
            serde_json::from_str(text).unwrap_or_default()
        } else {
            match name.as_str() {
                "initial_message" => message(text),
                "pr_number" => json!([]),
                // The field is optional in responses, so it is left out.
                "secrets" => continue,
                _ if text.starts_with('"') => Value::String(cut(text)),
                _ => Value::Null,
            }
        };
        short.insert(name, value);
    }
    Value::Object(short).to_string()
}

/// Reduces a message to its role and the beginning of its first text.
fn message(message: &str) -> Value {
    #[derive(Deserialize)]
    struct Message<'m> {
        role: Value,
        #[serde(borrow)]
        content: Vec<&'m RawValue>,
        run: bool,
    }
    #[derive(Deserialize)]
    struct Text<'t> {
        #[serde(borrow)]
        text: &'t RawValue,
    }
    let Ok(Message { role, content, run }) = serde_json::from_str(message) else { return Value::Null };
    let first = content.iter().find_map(|part| serde_json::from_str::<Text<'_>>(part.get()).ok());
    let beginning = first.map(|part| cut(part.text.get())).filter(|text| !text.is_empty());
    let note = format!("[{} parts, {} bytes in all, are not shown here]", content.len(), message.len());
    let parts: Vec<Value> = beginning
        .into_iter()
        .chain([note])
        .map(|text| json!({"cache_prompt": false, "type": "text", "text": text}))
        .collect();
    json!({"role": role, "content": parts, "run": run})
}

/// Cuts a text to its beginning and appends its size in bytes. `json` is the text's JSON.
fn cut(json: &str) -> String {
    let Ok(text) = serde_json::from_str::<String>(json) else { return String::new() };
    if json.len() <= KEPT {
        return text;
    }
    let mut length = 0;
    let end = text
        .char_indices()
        .find(|(_, character)| {
            // The size of the longest JSON escape of this character.
            length += if character.is_control() { 6 } else { character.len_utf8() + 1 };
            length > TEXT
        })
        .map_or(text.len(), |(index, _)| index);
    format!("{}… [{} bytes]", &text[..end], text.len())
}

/// The fields of an object in their order, with unparsed values.
struct Fields<'f>(Vec<(String, &'f RawValue)>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> serde::de::Visitor<'de> for Visitor {
            type Value = Fields<'de>;

            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("an object")
            }

            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(Fields(fields))
            }
        }
        deserializer.deserialize_map(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::start::request::StartRequest;

    /// The request in the form that a start task shows.
    fn shown(body: &Value) -> String {
        let request =
            StartRequest::from_body(Some("application/json"), body.to_string().as_bytes()).expect("a request");
        serde_json::to_string(&request).expect("JSON")
    }

    #[test]
    fn the_longest_requests_have_a_short_form_with_the_same_fields() {
        let long = "\u{1}é\"".repeat(500_000);
        let parts: Vec<Value> = (0..100_000).map(|_| json!({"text": ""})).collect();
        for body in [
            json!({"initial_message": {"content": [{"type": "image", "image_urls": [long]}, {"type": "text", "text": long}]}}),
            json!({"initial_message": {"role": "user", "run": true, "content": parts}}),
            json!({"title": "é".repeat(10_000), "selected_repository": "\u{1}".repeat(10_000),
                "selected_branch": "\\".repeat(10_000), "system_message_suffix": long, "llm_model": "😀".repeat(9_000),
                "sandbox_id": long, "secrets": {"A": "x".repeat(1000), "B": "y".repeat(1000)},
                "pr_number": (0..200_000).collect::<Vec<i64>>(),
                "plugins": (0..1000).map(|_| json!({"source": "x".repeat(1000)})).collect::<Vec<_>>()}),
        ] {
            let whole = shown(&body);
            let short = abridged(&whole);
            assert!(short.len() <= MAX_LENGTH, "{}", short.len());
            let fields = |json: &str| -> Vec<String> {
                let value: Value = serde_json::from_str(json).expect("JSON");
                value.as_object().expect("an object").keys().filter(|name| *name != "secrets").cloned().collect()
            };
            assert_eq!(fields(&short), fields(&whole));
            // The abridged form is still a valid request.
            serde_json::from_str::<StartRequest>(&short).expect("a request");
        }
    }

    #[test]
    fn the_beginning_of_a_message_stays() {
        let text = format!("Fix the bug. {}", "x".repeat(10_000));
        let short = abridged(&shown(&json!({"title": "a title", "initial_message": {"content": [
            {"type": "image", "image_urls": ["data:image/png;base64,xx"]}, {"type": "text", "text": text}]}})));
        let short: Value = serde_json::from_str(&short).expect("JSON");
        assert_eq!(short["title"], "a title");
        let content = &short["initial_message"]["content"];
        assert!(content[0]["text"].as_str().is_some_and(|text| text.starts_with("Fix the bug. xxx")), "{short}");
        assert!(content[1]["text"].as_str().is_some_and(|text| text.starts_with("[2 parts, ")), "{short}");
    }

    #[test]
    fn a_short_request_stays_as_it_is() {
        let request = shown(&json!({"title": "x"}));
        let (short, whole): (Value, Value) =
            (serde_json::from_str(&abridged(&request)).expect("JSON"), serde_json::from_str(&request).expect("JSON"));
        assert_eq!(short, whole);
        assert_eq!(abridged("nonsense".repeat(100).as_str()), "null");
    }
}
