//! Tags of a conversation: short texts by name, which its start sets and its agent server reports; filters of lists by tag.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::http::pydantic::validation::{Checker, string_up_to};

/// The most tags of a conversation.
pub const MAX_TAGS: usize = 100;
/// The longest name of a tag, in bytes.
pub const MAX_TAG_NAME: usize = 100;
/// The longest value of a tag, in characters; agent servers have the same limit.
pub const MAX_TAG_VALUE: usize = 256;
/// The most bytes of all names and values together: a record must stay far below DynamoDB's item limit, and a page of records below
/// Lambda's response limit.
pub const MAX_TAGS_SIZE: usize = 16 * 1024;

/// The most tags that one list is filtered by.
pub const MAX_TAG_FILTERS: usize = 10;

/// The tags of a conversation, within the limits of this module.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tags(BTreeMap<String, String>);

#[cfg(feature = "openapi")]
pub(super) fn schema() -> utoipa::openapi::Object {
    use utoipa::openapi::schema::{ObjectBuilder, Type};

    let value = ObjectBuilder::new().schema_type(Type::String).max_length(Some(MAX_TAG_VALUE));
    ObjectBuilder::new()
        .schema_type(Type::Object)
        .additional_properties(Some(value))
        .max_properties(Some(MAX_TAGS))
        .description(Some("Set by the start; change them at the agent server with PATCH on the conversation."))
        .build()
}

impl Tags {
    /// The names and values.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &String)> {
        self.0.iter()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The total size in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.0.iter().map(|(name, value)| name.len() + value.len()).sum()
    }

    /// Reads reported tags; `None` if they are not an object. A tag that exceeds a limit or is not text is skipped, because an agent server
    /// would resend a refused report forever. The second value is the number of skipped tags.
    #[must_use]
    pub fn read(tags: &Value) -> Option<(Self, usize)> {
        let tags = tags.as_object()?;
        let (mut read, mut size) = (BTreeMap::new(), 0);
        for (name, value) in tags {
            let Some(value) = value.as_str() else { continue };
            let fits = !name.is_empty() && name.len() <= MAX_TAG_NAME && value.chars().nth(MAX_TAG_VALUE).is_none();
            if !fits || read.len() == MAX_TAGS || size + name.len() + value.len() > MAX_TAGS_SIZE {
                continue;
            }
            size += name.len() + value.len();
            read.insert(name.clone(), value.to_owned());
        }
        let left_out = tags.len() - read.len();
        Some((Self(read), left_out))
    }

    /// Reads the tags of a request. Names are lower-case ASCII letters and digits, as agent servers require. Violations: `dict_type`,
    /// `string_type`, `string_too_long`, `value_error` for a name, and `too_long` for too many tags or bytes.
    pub fn requested(check: &mut Checker, value: &Value) -> Option<Self> {
        let Value::Object(entries) = value else {
            check.report("dict_type", "Input should be a valid dictionary", value.clone(), None);
            return None;
        };
        if entries.len() > MAX_TAGS {
            check.report_too_long("Dictionary", MAX_TAGS, entries.len(), Value::Null);
            return None;
        }
        let read: Vec<_> = entries
            .iter()
            .map(|(name, value)| check.within(name.clone(), |check| requested_tag(check, name, value)))
            .collect();
        let tags = Self(read.into_iter().collect::<Option<_>>()?);
        if tags.size() > MAX_TAGS_SIZE {
            let error = format!("names and values of tags may have {MAX_TAGS_SIZE} bytes in total");
            check.report_value_error(error, Value::Null);
            return None;
        }
        Some(tags)
    }
}

fn requested_tag(check: &mut Checker, name: &str, value: &Value) -> Option<(String, String)> {
    let is_valid = |name: &str| {
        (1..=MAX_TAG_NAME).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    };
    if !is_valid(name) {
        let error = format!("the name of a tag has 1 to {MAX_TAG_NAME} lower-case letters and digits");
        check.within("[key]", |check| check.report_value_error(error, name.into()));
        return None;
    }
    Some((name.to_owned(), string_up_to(MAX_TAG_VALUE, check, value)?))
}

/// A filter by tag: conversations that have a tag with this name and, if there is one, this value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TagFilter {
    pub name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
}

impl TagFilter {
    /// Reads `name:value`, or `name` for any value. Violation: `value_error` for a text that no tag can match.
    pub fn read(check: &mut Checker, text: &str) -> Option<Self> {
        let (name, value) = text.split_once(':').map_or((text, None), |(name, value)| (name, Some(value)));
        let is_too_long = |value: &str| value.chars().nth(MAX_TAG_VALUE).is_some();
        if name.is_empty() || name.len() > MAX_TAG_NAME || value.is_some_and(is_too_long) {
            let error = format!(
                "write name:value, or the name alone; a name has 1 to {MAX_TAG_NAME} bytes, a value at most {MAX_TAG_VALUE} characters"
            );
            check.report_value_error(error, text.chars().take(MAX_TAG_VALUE).collect::<String>().into());
            return None;
        }
        Some(Self { name: name.to_owned(), value: value.map(ToOwned::to_owned) })
    }

    #[must_use]
    pub fn matches(&self, tags: &Tags) -> bool {
        let found = tags.0.get(&self.name);
        found.is_some_and(|found| self.value.as_ref().is_none_or(|value| value == found))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(tags: &Value) -> (Value, usize) {
        let (read, left_out) = Tags::read(tags).expect("tags");
        (json!(read), left_out)
    }

    #[test]
    fn what_is_no_tag_is_left_out() {
        assert_eq!(read(&json!({})), (json!({}), 0));
        let tags = json!({"team": "a1", "note": "", "number": 1, "nothing": null, "": "x", "list": []});
        assert_eq!(read(&tags), (json!({"team": "a1", "note": ""}), 4));
        for other in [json!(null), json!([]), json!("x"), json!(1)] {
            assert_eq!(Tags::read(&other), None);
        }
    }

    #[test]
    fn requested_tags_are_refused_where_an_agent_server_would_refuse_them() {
        let read = |tags: &Value| {
            let mut check = Checker::new("body");
            let read = Tags::requested(&mut check, tags);
            check.finish(read).map_err(|violations| json!(violations[0]))
        };
        let fine = json!({"team": "a1", "2": "", "x": "é".repeat(MAX_TAG_VALUE)});
        assert_eq!(json!(read(&fine).expect("tags")), fine);
        let many: Value = (0..=MAX_TAGS).map(|number| (number.to_string(), json!(""))).collect();
        let large: Value = (0..MAX_TAGS).map(|number| (number.to_string(), json!("é".repeat(MAX_TAG_VALUE)))).collect();
        for (tags, kind, loc) in [
            (json!([]), "dict_type", json!(["body"])),
            (json!({"a": 1}), "string_type", json!(["body", "a"])),
            (json!({"a": null}), "string_type", json!(["body", "a"])),
            (json!({"a": "x".repeat(257)}), "string_too_long", json!(["body", "a"])),
            (json!({"Team": "x"}), "value_error", json!(["body", "Team", "[key]"])),
            (json!({"a-b": "x"}), "value_error", json!(["body", "a-b", "[key]"])),
            (json!({"": "x"}), "value_error", json!(["body", "", "[key]"])),
            (many, "too_long", json!(["body"])),
            (large, "value_error", json!(["body"])),
        ] {
            let violation = read(&tags).expect_err("a violation");
            assert_eq!((&violation["type"], &violation["loc"]), (&json!(kind), &loc));
        }
    }

    #[test]
    fn a_filter_names_a_tag_with_or_without_its_value() {
        let (tags, _) = Tags::read(&json!({"team": "a:b", "empty": ""})).expect("tags");
        let matches = |text: &str| {
            let mut check = Checker::new("query");
            TagFilter::read(&mut check, text).map(|filter| filter.matches(&tags))
        };
        for text in ["team:a:b", "team", "empty", "empty:"] {
            assert_eq!(matches(text), Some(true), "{text}");
        }
        for text in ["team:a", "team:", "TEAM", "tea", "other", "empty:x"] {
            assert_eq!(matches(text), Some(false), "{text}");
        }
        for text in ["", ":", ":a", &"n".repeat(101), &format!("a:{}", "é".repeat(257))] {
            assert_eq!(matches(text), None, "{text}");
        }
    }

    #[test]
    fn tags_keep_every_limit() {
        let (name, value) = ("n".repeat(MAX_TAG_NAME), "é".repeat(MAX_TAG_VALUE));
        assert_eq!(read(&json!({&name: value, "long": format!("{value}x"), format!("{name}n"): ""})).1, 2);
        let many: Value =
            (0..=MAX_TAGS).map(|number| (number.to_string(), json!(""))).collect::<serde_json::Map<_, _>>().into();
        assert_eq!(read(&many).1, 1);
        let large: Value =
            (0..MAX_TAGS).map(|number| (number.to_string(), json!(value))).collect::<serde_json::Map<_, _>>().into();
        let (kept, left_out) = Tags::read(&large).expect("tags");
        assert!(left_out > 0 && kept.size() <= MAX_TAGS_SIZE && kept.size() > MAX_TAGS_SIZE - 600, "{}", kept.size());
    }
}
