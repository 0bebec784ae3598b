//! Violations of a request's model: the entries of `detail` in a 422 response, in pydantic's terms.

use std::borrow::Cow;

use serde::Serialize;
use serde_json::Value;

/// A violation of the request's schema: an entry of `detail` in a 422 response.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Violation {
    /// Name of the rule, e.g. `missing`, `uuid_parsing`.
    #[serde(rename = "type")]
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    pub kind: &'static str,
    /// The location: `body`, `query` or `path`, then the keys and indices that lead to the faulty value.
    pub loc: Vec<Loc>,
    /// The error message.
    pub msg: String,
    /// The faulty value as it was sent; for `missing`, the object that lacks the field.
    pub input: Value,
    /// Parameters of the rule. Absent if the rule has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    pub ctx: Option<Value>,
}

/// One step of the path of a value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum Loc {
    /// Key of an object, or the part of the request.
    Key(Cow<'static, str>),
    /// Index in a list.
    Index(usize),
}

impl From<&'static str> for Loc {
    fn from(key: &'static str) -> Self {
        Self::Key(Cow::Borrowed(key))
    }
}

impl From<String> for Loc {
    fn from(key: String) -> Self {
        Self::Key(Cow::Owned(key))
    }
}

impl From<usize> for Loc {
    fn from(index: usize) -> Self {
        Self::Index(index)
    }
}
