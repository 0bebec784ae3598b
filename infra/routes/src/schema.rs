//! Parameters, headers and the schemas that routes need: plain values, and references to component schemas.

/// A JSON schema. Objects are component schemas of `infra/generate/src/schemas.rs`, referenced by name.
#[derive(Clone, Copy, Debug)]
pub enum Schema {
    Component(&'static str),
    ListOf(&'static str),
    /// Each item may be null.
    NullableListOf(&'static str),
    Text {
        format: Option<&'static str>,
        max_length: Option<u32>,
    },
    /// One of these texts.
    Choice(&'static [&'static str]),
    TextList {
        format: Option<&'static str>,
        max_items: Option<u32>,
    },
    Integer {
        minimum: Option<i64>,
        maximum: Option<i64>,
        default: Option<i64>,
    },
    Boolean {
        default: Option<bool>,
    },
    /// Bytes.
    Binary,
    Object,
    Any,
}

pub(crate) const TEXT: Schema = Schema::Text { format: None, max_length: None };
pub(crate) const UUID: Schema = Schema::Text { format: Some("uuid"), max_length: None };
pub(crate) const TIME: Schema = Schema::Text { format: Some("date-time"), max_length: None };
pub(crate) const INTEGER: Schema = Schema::Integer { minimum: None, maximum: None, default: None };
pub(crate) const COUNT: Schema = Schema::Integer { minimum: Some(0), maximum: None, default: None };
pub(crate) const BOOLEAN: Schema = Schema::Boolean { default: None };

pub(crate) const fn text_up_to(max_length: u32) -> Schema {
    Schema::Text { format: None, max_length: Some(max_length) }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    Path,
    Query,
    RequestHeader,
    /// A header of a response.
    Header,
}

/// A parameter of a request, or a header of a response.
#[derive(Clone, Copy, Debug)]
pub struct Parameter {
    pub name: &'static str,
    pub location: Location,
    pub is_required: bool,
    pub schema: Schema,
    pub description: Option<&'static str>,
}

impl Parameter {
    pub(crate) const fn required(self) -> Self {
        Self { is_required: true, ..self }
    }

    pub(crate) const fn described(self, description: &'static str) -> Self {
        Self { description: Some(description), ..self }
    }
}

/// An optional parameter of the query.
pub(crate) const fn query(name: &'static str, schema: Schema) -> Parameter {
    Parameter { name, location: Location::Query, is_required: false, schema, description: None }
}

pub(crate) const fn path(name: &'static str, schema: Schema) -> Parameter {
    Parameter { name, location: Location::Path, is_required: true, schema, description: None }
}

pub(crate) const fn header(name: &'static str, schema: Schema) -> Parameter {
    Parameter { name, location: Location::Header, is_required: false, schema, description: None }
}

/// A key under which a request can be repeated.
pub(crate) const IDEMPOTENCY_KEY: Parameter = Parameter {
    name: "Idempotency-Key",
    location: Location::RequestHeader,
    is_required: false,
    schema: Schema::Text { format: None, max_length: Some(255) },
    description: Some(
        "1 to 255 visible ASCII characters. A repetition with the same key and body returns the start that the first request created, \
        as long as its record exists; with another body it is a 409.",
    ),
};

pub(crate) const RETRY_AFTER: Parameter =
    header("Retry-After", INTEGER).required().described("Seconds after which the request may succeed.");

/// A required list of UUIDs.
pub(crate) const fn uuids(name: &'static str, max_items: u32, description: &'static str) -> Parameter {
    query(name, Schema::TextList { format: Some("uuid"), max_items: Some(max_items) }).required().described(description)
}

/// A limit in time.
pub(crate) const fn time(name: &'static str) -> Parameter {
    query(name, TIME).described("A time without a zone is UTC. A date, or seconds since 1970, is accepted as well.")
}

/// A required list of up to 100 ids that are not UUIDs.
pub(crate) const IDS: Parameter =
    query("id", Schema::TextList { format: None, max_items: Some(100) }).required().described("At most 100.");

pub(crate) const PAGE_ID: Parameter =
    query("page_id", TEXT).described("`next_page_id` of the previous page, with the same filters.");

pub(crate) const LIMIT: Parameter =
    query("limit", Schema::Integer { minimum: Some(1), maximum: Some(100), default: Some(100) });

/// Parameters of paths that mean the same in every route.
pub(crate) const PATH_PARAMETERS: &[Parameter] = &[
    path("conversation_id", UUID).described("With or without dashes."),
    path("task_id", UUID).described("With or without dashes."),
    path("sandbox_id", TEXT),
    path("secret_name", TEXT),
    path("profile_name", TEXT),
    path("org_id", UUID),
    path("user_id", TEXT),
    path("task_id", UUID).described("With or without dashes."),
];
