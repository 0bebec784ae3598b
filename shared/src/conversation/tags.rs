//! Tags of a conversation: short texts by name, reported by its agent server.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The most tags of a conversation.
pub const MAX_TAGS: usize = 100;
/// The longest name of a tag, in bytes.
pub const MAX_TAG_NAME: usize = 100;
/// The longest value of a tag, in characters; agent servers have the same limit.
pub const MAX_TAG_VALUE: usize = 256;
/// The most bytes of all names and values together: a record must stay far below DynamoDB's item limit, and a page of records below
/// Lambda's response limit.
pub const MAX_TAGS_SIZE: usize = 16 * 1024;

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
        .description(Some("Read-only here; change them at the agent server with PATCH on the conversation."))
        .build()
}

impl Tags {
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
