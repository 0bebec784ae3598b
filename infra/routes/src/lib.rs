//! The route table: every route of the API, declared once, as data.
//!
//! A route names its method, path, function, authentication, timeout, parameters and responses. `cargo run -p generate` writes API
//! Gateway's definition, the router table of `cargo lambda watch` and `docs/openapi.json` from it. Tests
//! compare the functions' routers, and the authentication of the local gateway, with the table.
//!
//! Some responses follow from the rest of a route and are not listed in it, see [`Route::error_responses`].

mod agent_profiles;
mod conversations;
mod events;
mod front_ends;
mod health;
mod profiles;
mod sandboxes;
mod schema;
mod settings;
mod starts;
mod webhooks;
mod workspace;

pub use schema::{Location, Parameter, Schema};

/// The function that answers requests for unknown paths.
pub const FALLBACK: &str = "web-client";

/// API Gateway's limit for a response that is not streamed, in seconds.
pub const TIMEOUT: u32 = 29;

/// Routes about one subject, in one file, under one tag of the OpenAPI document.
#[derive(Debug)]
pub struct Group {
    pub tag: &'static str,
    pub routes: &'static [Route],
}

/// All groups, in the order of the OpenAPI document.
pub const GROUPS: &[Group] = &[
    conversations::GROUP,
    starts::GROUP,
    workspace::GROUP,
    events::GROUP,
    sandboxes::GROUP,
    settings::GROUP,
    profiles::GROUP,
    agent_profiles::GROUP,
    webhooks::GROUP,
    front_ends::GROUP,
    health::GROUP,
];

/// What stands for a function in the routes that `cargo local` itself serves.
pub const LOCAL_SERVER: &str = "local";

/// The routes that `cargo local` serves in addition. The OpenAPI document describes them; no Lambda function has them.
pub const LOCAL: Group = health::LOCAL;

/// All routes of the functions.
pub fn routes() -> impl Iterator<Item = &'static Route> {
    GROUPS.iter().flat_map(|group| group.routes)
}

/// Returns the route with this method and path template. Methods are in upper case.
#[must_use]
pub fn find(method: &str, path: &str) -> Option<&'static Route> {
    routes().find(|route| route.method.as_str() == method && route.path == path)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    Get,
    Post,
    Put,
    Patch,
    Delete,
}

impl Method {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Post => "POST",
            Self::Put => "PUT",
            Self::Patch => "PATCH",
            Self::Delete => "DELETE",
        }
    }
}

/// The credentials that a route requires, and what checks them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Authentication {
    /// A user's API key or token. The authorizer checks it before the function runs.
    Caller,
    /// The session key of a sandbox. The function checks it.
    SandboxKey,
    /// The token with which an agent looks up a secret. The function checks it.
    AgentToken,
    /// The token of a start, with which a command in the sandbox notifies of its end. The function checks it.
    StartToken,
    None,
}

/// One route. [`Route::get`] and its siblings make one that requires a caller, is not streamed and returns JSON; the other methods
/// change that.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    pub method: Method,
    /// The path template, with parameters in braces.
    pub path: &'static str,
    /// The folder of the function in `functions/`.
    pub function: &'static str,
    /// The `operationId` of the OpenAPI document.
    pub operation: &'static str,
    pub authentication: Authentication,
    /// How long API Gateway waits for the end of the response, in seconds.
    pub timeout: u32,
    /// Whether the function streams its response.
    pub is_streamed: bool,
    pub summary: &'static str,
    pub description: Option<&'static str>,
    /// The parameters, see [`Route::all_parameters`].
    own_parameters: &'static [Parameter],
    /// The component schema of the JSON request body, if the route has one.
    pub body: Option<&'static str>,
    /// The responses with a success or redirect status, and others that this route alone has.
    pub own_responses: &'static [Response],
    /// The shared error responses that do not follow from the rest of the route.
    own_errors: &'static [ErrorResponse],
}

impl Route {
    const fn new(method: Method, path: &'static str, function: &'static str, operation: &'static str) -> Self {
        Self {
            method,
            path,
            function,
            operation,
            authentication: Authentication::Caller,
            timeout: TIMEOUT,
            is_streamed: false,
            summary: "",
            description: None,
            own_parameters: &[],
            body: None,
            own_responses: &[],
            own_errors: &[],
        }
    }

    const fn get(path: &'static str, function: &'static str, operation: &'static str) -> Self {
        Self::new(Method::Get, path, function, operation)
    }

    const fn post(path: &'static str, function: &'static str, operation: &'static str) -> Self {
        Self::new(Method::Post, path, function, operation)
    }

    const fn put(path: &'static str, function: &'static str, operation: &'static str) -> Self {
        Self::new(Method::Put, path, function, operation)
    }

    const fn patch(path: &'static str, function: &'static str, operation: &'static str) -> Self {
        Self::new(Method::Patch, path, function, operation)
    }

    const fn delete(path: &'static str, function: &'static str, operation: &'static str) -> Self {
        Self::new(Method::Delete, path, function, operation)
    }

    const fn authentication(self, authentication: Authentication) -> Self {
        Self { authentication, ..self }
    }

    /// Streams the response, for at most this many seconds. The function's `Timeout` in `template.yaml` must be the same.
    const fn streamed(self, timeout: u32) -> Self {
        Self { is_streamed: true, timeout, ..self }
    }

    const fn summary(self, summary: &'static str) -> Self {
        Self { summary, ..self }
    }

    const fn description(self, description: &'static str) -> Self {
        Self { description: Some(description), ..self }
    }

    /// Adds parameters. Parameters of the path need not be listed if [`schema::PATH_PARAMETERS`] has them.
    const fn parameters(self, own_parameters: &'static [Parameter]) -> Self {
        Self { own_parameters, ..self }
    }

    const fn body(self, schema: &'static str) -> Self {
        Self { body: Some(schema), ..self }
    }

    const fn returns(self, own_responses: &'static [Response]) -> Self {
        Self { own_responses, ..self }
    }

    const fn errors(self, own_errors: &'static [ErrorResponse]) -> Self {
        Self { own_errors, ..self }
    }

    /// All parameters: those of the path, in its order, then the others.
    pub fn all_parameters(&self) -> impl Iterator<Item = &'static Parameter> {
        let own = self.own_parameters;
        let in_path = path_parameters(self.path).filter_map(move |name| {
            let of_path = |one: &&Parameter| one.location == Location::Path && one.name == name;
            own.iter().find(of_path).or_else(|| schema::PATH_PARAMETERS.iter().find(of_path))
        });
        in_path.chain(own.iter().filter(|one| one.location != Location::Path))
    }

    /// All error responses, by status: those that the route lists, and those that follow from it. Every route can fail (500), and API
    /// Gateway refuses long addresses and headers. A route with a body can refuse it for its size, and one with parameters in its path refuses
    /// those that are not UTF-8. A route with credentials refuses
    /// wrong ones, and is unavailable when they cannot be checked.
    #[must_use]
    pub fn error_responses(&self) -> Vec<ErrorResponse> {
        if self.function == LOCAL_SERVER {
            return Vec::new();
        }
        let mut all = self.own_errors.to_vec();
        all.extend([URI_TOO_LONG, HEADERS_TOO_LARGE, INTERNAL_SERVER_ERROR]);
        if self.body.is_some() {
            all.push(CONTENT_TOO_LARGE);
        }
        if path_parameters(self.path).next().is_some() {
            all.push(BAD_REQUEST);
        }
        if self.authentication != Authentication::None {
            all.extend([UNAUTHORIZED, SERVICE_UNAVAILABLE]);
        }
        all.sort_by_key(|error| error.status);
        all.dedup_by_key(|error| error.status);
        all
    }
}

/// The names of a path's parameters, in their order.
pub fn path_parameters(path: &'static str) -> impl Iterator<Item = &'static str> {
    path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
}

/// A response that is described at its route.
#[derive(Clone, Copy, Debug)]
pub struct Response {
    pub status: u16,
    pub description: &'static str,
    /// The media type and schema of the body, if there is one.
    pub content: Option<(&'static str, Schema)>,
    pub headers: &'static [Parameter],
}

impl Response {
    /// A response with status 200 and a JSON body.
    const fn json(schema: Schema) -> Self {
        Self::new(200, Some(("application/json", schema)))
    }

    const fn new(status: u16, content: Option<(&'static str, Schema)>) -> Self {
        Self { status, description: "The request succeeded.", content, headers: &[] }
    }

    const fn status(self, status: u16) -> Self {
        Self { status, ..self }
    }

    const fn described(self, description: &'static str) -> Self {
        Self { description, ..self }
    }

    const fn headers(self, headers: &'static [Parameter]) -> Self {
        Self { headers, ..self }
    }
}

/// An error response that routes share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ErrorResponse {
    pub status: u16,
    /// Its name among the document's shared responses.
    pub name: &'static str,
    pub description: &'static str,
    /// The component schema of its JSON body, if it has one.
    pub schema: Option<&'static str>,
}

impl ErrorResponse {
    const fn new(status: u16, name: &'static str, description: &'static str) -> Self {
        Self { status, name, description, schema: Some("Detail") }
    }
}

macro_rules! error_responses {
    ($($constant:ident = $value:expr;)+) => {
        $(const $constant: ErrorResponse = $value;)+

        /// All shared error responses.
        pub const ERROR_RESPONSES: &[ErrorResponse] = &[$($constant),+];
    };
}

error_responses! {
    BAD_REQUEST = ErrorResponse::new(400, "BadRequest", "The request is invalid; `detail` gives the reason.");
    UNAUTHORIZED = ErrorResponse::new(401, "Unauthorized", "The credentials are missing or invalid.");
    FORBIDDEN = ErrorResponse::new(403, "Forbidden", "The credentials belong to another user or sandbox.");
    NOT_FOUND = ErrorResponse::new(404, "NotFound", "The resource does not exist or belongs to another user.");
    CONFLICT = ErrorResponse::new(
        409,
        "Conflict",
        "The request conflicts with the state of the resource; `detail` says what must change first.",
    );
    GONE = ErrorResponse::new(410, "Gone", "The resource was removed permanently.");
    CONTENT_TOO_LARGE =
        ErrorResponse::new(413, "ContentTooLarge", "The request or its response exceeds the size limit.");
    URI_TOO_LONG = ErrorResponse {
        schema: None,
        ..ErrorResponse::new(414, "UriTooLong", "The URL is longer than this server or the gateway accepts.")
    };
    INVALID = ErrorResponse {
        schema: Some("Invalid"),
        ..ErrorResponse::new(422, "Invalid", "The request does not match its schema; `detail` lists every violation.")
    };
    TOO_MANY_REQUESTS = ErrorResponse::new(429, "TooManyRequests", "A limit on the number is reached; retry later.");
    HEADERS_TOO_LARGE = ErrorResponse::new(431, "HeadersTooLarge", "The headers exceed the size limit.");
    INTERNAL_SERVER_ERROR =
        ErrorResponse::new(500, "InternalServerError", "The server failed; the response has no internal details.");
    BAD_GATEWAY = ErrorResponse::new(
        502,
        "BadGateway",
        "A server that this one depends on did not respond, or its response was invalid.",
    );
    SERVICE_UNAVAILABLE = ErrorResponse::new(
        503,
        "ServiceUnavailable",
        "The service is temporarily unavailable; retry the same request.",
    );
    LEGACY_NOT_FOUND = ErrorResponse {
        schema: Some("LegacyError"),
        ..ErrorResponse::new(404, "LegacyNotFound", "The conversation does not exist, or its sandbox cannot be reached.")
    };
    LEGACY_BAD_GATEWAY = ErrorResponse {
        schema: Some("LegacyError"),
        ..ErrorResponse::new(502, "LegacyBadGateway", "The agent server did not respond, or its response was invalid.")
    };
}
