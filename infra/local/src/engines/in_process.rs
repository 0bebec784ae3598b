//! An HTTP client for the AWS SDK that calls the engines of this process directly, without a socket.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use http::header::HOST;
use http::{HeaderValue, Method};
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use tower::ServiceExt as _;

/// Selects the engine by the authority (host and port) of a request's URL. Requests to other authorities fail.
#[derive(Clone, Debug)]
pub(super) struct InProcessClient(Arc<[(String, Router)]>);

impl InProcessClient {
    /// `engines` are pairs of an endpoint URL and the engine's handler.
    pub(super) fn new(engines: impl IntoIterator<Item = (String, Router)>) -> Self {
        let by_authority = engines.into_iter().map(|(url, router)| {
            let authority = url.split_once("://").map_or(url.as_str(), |(_, rest)| rest);
            (authority.trim_end_matches('/').to_owned(), router)
        });
        Self(by_authority.collect())
    }

    async fn send(self, request: HttpRequest) -> Result<HttpResponse, ConnectorError> {
        let request = request.try_into_http1x().map_err(|error| ConnectorError::user(error.into()))?;
        let authority = request.uri().authority().map_or("", http::uri::Authority::as_str);
        let Some((_, router)) = self.0.iter().find(|(known, _)| known == authority) else {
            let text = format!("no engine of this process has the endpoint {authority}");
            return Err(ConnectorError::user(text.into()));
        };
        let router = router.clone();
        let is_head = *request.method() == Method::HEAD;
        let request = in_origin_form(request).map_err(|error| ConnectorError::user(error.into()))?;
        // A router cannot fail: its error type has no values.
        let response = router.oneshot(request).await.map_err(|error| ConnectorError::other(error.into(), None))?;
        // Responses to HEAD have headers but no body.
        let response = response.map(|body| if is_head { Body::empty() } else { body });
        let response = response.map(|body| SdkBody::from_body_1_x(SyncBody(Mutex::new(body))));
        HttpResponse::try_from(response).map_err(|error| ConnectorError::other(error.into(), None))
    }
}

impl HttpClient for InProcessClient {
    fn http_connector(&self, _: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
        SharedHttpConnector::new(self.clone())
    }
}

impl HttpConnector for InProcessClient {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        HttpConnectorFuture::new(self.clone().send(request))
    }
}

/// Converts the request to the form that a server reads from a connection: the path as the URI, the authority as `Host`.
fn in_origin_form(request: http::Request<SdkBody>) -> Result<Request, http::Error> {
    let (mut parts, body) = request.into_parts();
    if let Some(authority) = parts.uri.authority()
        && !parts.headers.contains_key(HOST)
    {
        let host = HeaderValue::from_str(authority.as_str())?;
        parts.headers.insert(HOST, host);
    }
    let path = parts.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
    parts.uri = path.parse::<http::Uri>()?;
    Ok(Request::from_parts(parts, Body::new(body)))
}

/// The SDK requires bodies to be `Sync`; axum's are not. The mutex is never locked: polling has exclusive access.
struct SyncBody(Mutex<Body>);

impl SyncBody {
    fn body(&mut self) -> Pin<&mut Body> {
        Pin::new(self.0.get_mut().unwrap_or_else(PoisonError::into_inner))
    }
}

impl HttpBody for SyncBody {
    type Data = Bytes;
    type Error = aws_smithy_types::body::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.body().poll_frame(context).map_err(Into::into)
    }

    // `is_end_stream` and `size_hint` have a shared reference, with which the mutex would have to be locked. Their defaults are always
    // correct; the SDK reads the length of a response from its `content-length`.
    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
