//! Extractors of request parts that several routes have in common: the conversation id of a path, a JSON body, and the page
//! (`page_id` and `limit`) of a list.
//!
//! Each fails with an [`Error`]. A handler that reports the violations of several parts at once takes `Result<Extractor>` and
//! joins the results with [`both`].

use axum::extract::rejection::BytesRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::request::Parts;
use http::{HeaderMap, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use uuid::Uuid;

use super::page_token;
use super::pydantic::body::{self, FromJson};
use super::pydantic::query::{Bounds, Query};
use super::pydantic::validation::{self, Checked, Checker};
use super::response::BODY_TOO_LARGE;
use crate::error::{Error, Result};
use crate::id::UserId;

/// The `{conversation_id}` of a path. Violation: `uuid_parsing`, also for a text that is not UTF-8, which the violation shows as
/// U+FFFD.
#[derive(Clone, Copy, Debug)]
pub struct ConversationId(pub Uuid);

impl<S: Send + Sync> FromRequestParts<S> for ConversationId {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        path_id(parts, state, "conversation_id").await.map(Self)
    }
}

/// The `{task_id}` of a path, with the same violations.
#[derive(Clone, Copy, Debug)]
pub struct TaskId(pub Uuid);

impl<S: Send + Sync> FromRequestParts<S> for TaskId {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self> {
        path_id(parts, state, "task_id").await.map(Self)
    }
}

async fn path_id<S: Send + Sync>(parts: &mut Parts, state: &S, name: &'static str) -> Result<Uuid> {
    let text = Path::<String>::from_request_parts(parts, state).await;
    let text = text.map_or_else(|_| char::REPLACEMENT_CHARACTER.into(), |Path(text)| text);
    validation::path_uuid(name, &text).map_err(Error::Invalid)
}

/// A JSON body that its model has accepted. The violations are those of [`body::json`] and of the model.
#[derive(Clone, Debug)]
pub struct JsonBody<T>(pub T);

impl<S: Send + Sync, T: FromJson> FromRequest<S> for JsonBody<T> {
    type Rejection = Error;

    async fn from_request(request: Request, state: &S) -> Result<Self> {
        let raw = RawBody::from_request(request, state).await?;
        raw.read(T::from_json).map(Self).map_err(Error::Invalid)
    }
}

/// The bytes of a body, with the content type that says how to read them.
#[derive(Clone, Debug)]
pub struct RawBody {
    content_type: Option<String>,
    /// As they were sent.
    pub bytes: Bytes,
}

impl RawBody {
    /// Decodes the bytes with [`body::json`] and reads the value.
    ///
    /// # Errors
    /// Every violation, at `["body", …]`.
    pub fn read<T>(&self, read: impl FnOnce(&mut Checker, &Value) -> Option<T>) -> Checked<T> {
        body::read_with(self.content_type.as_deref(), &self.bytes, read)
    }
}

impl<S: Send + Sync> FromRequest<S> for RawBody {
    type Rejection = Error;

    async fn from_request(request: Request, state: &S) -> Result<Self> {
        let content_type = content_type(request.headers()).map(str::to_owned);
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| not_received(&rejection))?;
        Ok(Self { content_type, bytes })
    }
}

fn content_type(headers: &HeaderMap) -> Option<&str> {
    headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok())
}

/// The error for a body that exceeds the route's limit, or that ends early.
fn not_received(rejection: &BytesRejection) -> Error {
    match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Error::TooLarge(BODY_TOO_LARGE.to_owned()),
        status => Error::Refused(status.canonical_reason().unwrap_or_default().to_owned()),
    }
}

/// Joins two parts of a request: both values, or the violations of the first part followed by those of the second. Another error
/// than violations takes precedence.
///
/// # Errors
/// Those of the parts.
pub fn both<A, B>(first: Result<A>, second: Result<B>) -> Result<(A, B)> {
    match (first, second) {
        (Ok(first), Ok(second)) => Ok((first, second)),
        (Err(Error::Invalid(mut violations)), Err(Error::Invalid(others))) => {
            violations.extend(others);
            Err(Error::Invalid(violations))
        }
        (Err(Error::Invalid(_)) | Ok(_), Err(error)) | (Err(error), _) => Err(error),
    }
}

/// The page that a request asks for: the parameters `page_id` and `limit` (1 to 100, 100 by default).
#[derive(Clone, Debug)]
pub struct PageRequest {
    page_id: Option<String>,
    /// The most items of the page.
    pub limit: usize,
}

impl PageRequest {
    const DEFAULT_LIMIT: i64 = 100;

    /// Reads both parameters; the query reports the violations of `limit`.
    pub fn read(query: &mut Query) -> Self {
        let page_id = query.string("page_id");
        let limit = query.integer("limit", Self::DEFAULT_LIMIT, Bounds::PAGE);
        // The bounds make this conversion infallible.
        Self { page_id, limit: usize::try_from(limit).unwrap_or(100) }
    }

    /// The page of one of the user's lists. `list` names the list with its filters and its order: page ids are bound to it.
    #[must_use]
    pub fn of<L>(self, user: &UserId, list: L) -> ListPage<'_, L> {
        ListPage { user, list, page_id: self.page_id, limit: self.limit }
    }

    /// Accepts a request for the only page of a list that is never longer.
    ///
    /// # Errors
    /// [`Error::Refused`] for any page id, because none was issued.
    pub fn only_page(&self) -> Result<()> {
        match self.page_id {
            Some(_) => Err(page_token::invalid()),
            None => Ok(()),
        }
    }
}

/// A page of a list of one user.
#[derive(Clone, Debug)]
pub struct ListPage<'u, L> {
    user: &'u UserId,
    page_id: Option<String>,
    /// Which list, with its filters and its order.
    pub list: L,
    /// The most items of the page.
    pub limit: usize,
}

impl<L: Serialize + DeserializeOwned + PartialEq> ListPage<'_, L> {
    /// The position after which the page starts; `None` for the first page.
    ///
    /// # Errors
    /// Those of [`page_token::decode`].
    pub fn after<P: DeserializeOwned>(&self) -> Result<Option<P>> {
        self.page_id.as_ref().map(|page_id| page_token::decode(self.user, page_id, &self.list)).transpose()
    }

    /// The id of the page that starts after a position; `None` for none, when this is the last page.
    ///
    /// # Errors
    /// Those of [`page_token::encode`].
    pub fn next_page_id<P: Serialize>(&self, position: Option<P>) -> Result<Option<String>> {
        position.map(|position| page_token::encode(self.user, &self.list, &position)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use serde_json::json;

    use super::*;

    fn request(content_type: Option<&str>, body: &'static str) -> Request {
        let request = Request::builder();
        let request = content_type.into_iter().fold(request, |request, kind| request.header(CONTENT_TYPE, kind));
        request.body(Body::from(body)).expect("a request")
    }

    fn violations<T>(result: Result<T>) -> Value {
        match result {
            Err(Error::Invalid(violations)) => serde_json::to_value(violations).expect("JSON"),
            Err(other) => panic!("{other}"),
            Ok(_) => json!([]),
        }
    }

    #[tokio::test]
    async fn a_json_body_is_read_by_its_content_type() {
        let read = async |kind, body| JsonBody::<Value>::from_request(request(kind, body), &()).await;
        let JsonBody(value) = read(Some("application/json; charset=utf-8"), r#"{"a": 1}"#).await.expect("a value");
        assert_eq!(value, json!({"a": 1}));
        let JsonBody(value) = read(None, r#"{"a": 1}"#).await.expect("a value");
        assert_eq!(value, json!(r#"{"a": 1}"#), "without a content type the body is a text");
        for (body, kind) in [("", "missing"), ("null", "missing"), ("{", "json_invalid")] {
            let found = violations(read(Some("application/json"), body).await);
            assert_eq!((&found[0]["type"], &found[0]["loc"][0]), (&json!(kind), &json!("body")), "{body}");
        }
    }

    #[test]
    fn violations_of_both_parts_are_reported_in_order() {
        let invalid = |name| validation::path_uuid(name, "x").map_err(Error::Invalid);
        let found = violations(both(invalid("a"), invalid("b")));
        assert_eq!((&found[0]["loc"][1], &found[1]["loc"][1]), (&json!("a"), &json!("b")));
        assert!(both(Ok(1), invalid("b")).is_err());
        assert!(matches!(both(invalid("a"), Err::<(), _>(Error::TooLarge(String::new()))), Err(Error::TooLarge(_))));
        assert_eq!(both(Ok(1), Ok(2)).expect("both"), (1, 2));
    }

    #[test]
    fn a_page_id_leads_to_the_next_page_of_its_list() {
        let user = UserId::new("me");
        let page = |raw: &str, list: &str| {
            let mut query = Query::parse(Some(raw));
            let page = PageRequest::read(&mut query);
            query.finish().map(|()| page.of(&user, list.to_owned())).map_err(Error::Invalid)
        };
        let first = page("limit=7", "tasks").expect("a page");
        assert_eq!((first.limit, first.after::<String>().expect("no position")), (7, None));
        assert_eq!(first.next_page_id(None::<String>).expect("the last page"), None);
        let next = first.next_page_id(Some("x")).expect("a page id").expect("another page");
        let second = page(&format!("page_id={next}"), "tasks").expect("a page");
        assert_eq!((second.limit, second.after::<String>().expect("a position").as_deref()), (100, Some("x")));
        let other = page(&format!("page_id={next}"), "events").expect("a page");
        assert!(matches!(other.after::<String>(), Err(Error::Refused(_))));
        assert_eq!(violations(page("limit=0", "tasks"))[0]["type"], "greater_than");
        let mut query = Query::parse(Some("page_id=x"));
        assert!(PageRequest::read(&mut query).only_page().is_err());
    }
}
