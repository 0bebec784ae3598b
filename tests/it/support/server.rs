//! The HTTP server that all stub servers and proxies of the tests are built on.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::response::Response;
use http::{HeaderMap, Method, StatusCode, header};
use http_body_util::BodyExt;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{AbortHandle, JoinSet};

type Job = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A request with its complete body.
#[derive(Clone, Debug)]
pub struct Request {
    /// When its last byte was read.
    pub at: Instant,
    pub method: Method,
    /// As sent, still percent-encoded.
    pub path: String,
    /// Without the question mark; empty if there is none.
    pub query: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Request {
    /// The header's text, if it was sent.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    /// The query's last value for `key`.
    pub fn query_value(&self, key: &str) -> Option<String> {
        self.query_values(key).pop()
    }

    /// All of the query's values for `key`, in order.
    pub fn query_values(&self, key: &str) -> Vec<String> {
        form_urlencoded::parse(self.query.as_bytes())
            .filter(|(name, _)| name == key)
            .map(|(_, value)| value.into_owned())
            .collect()
    }

    /// The body as JSON; null if it is not JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    pub fn segments(&self) -> Vec<&str> {
        self.path.split('/').filter(|segment| !segment.is_empty()).collect()
    }

    /// Whether the request matches a route, such as `POST /api/conversations/{id}/events`: a segment in braces matches
    /// any segment.
    pub fn is(&self, route: &str) -> bool {
        let Some((method, path)) = route.split_once(' ') else {
            panic!("a route is a method and a path: {route}");
        };
        let wanted: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
        let got = self.segments();
        method == self.method.as_str()
            && wanted.len() == got.len()
            && wanted.iter().zip(got).all(|(wanted, got)| wanted.starts_with('{') || *wanted == got)
    }
}

/// Instead of a response, the server closes the connection without a byte.
#[derive(Debug)]
pub struct Cut;

impl std::fmt::Display for Cut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("connection cut")
    }
}

impl std::error::Error for Cut {}

/// A server on a free port of the loopback interface. Dropping it closes the port and every connection, and aborts the
/// requests that it is handling.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    running: AbortHandle,
}

impl Server {
    /// Serves `handle`. As with real servers, a request that has been read is handled to its end even if the client
    /// disconnects.
    pub async fn start<H, F>(handle: H) -> Self
    where
        H: Fn(Request) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<Response, Cut>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("the listener's address");
        let running = tokio::spawn(accept(listener, handle)).abort_handle();
        Self { address, running }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.running.abort();
    }
}

async fn accept<H, F>(listener: TcpListener, handle: H)
where
    H: Fn(Request) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Result<Response, Cut>> + Send + 'static,
{
    let (jobs, mut queue) = mpsc::unbounded_channel::<Job>();
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            connection = listener.accept() => {
                let Ok((stream, _)) = connection else { continue };
                let (handle, jobs) = (handle.clone(), jobs.clone());
                let service = service_fn(move |request| answer(request, handle.clone(), jobs.clone()));
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                // The client has disconnected, or the handler returned [`Cut`].
                tasks.spawn(async move { drop(connection.await) });
            }
            Some(job) = queue.recv() => { tasks.spawn(job); }
            Some(_) = tasks.join_next() => {}
        }
    }
}

async fn answer<H, F>(
    request: http::Request<hyper::body::Incoming>,
    handle: H,
    jobs: mpsc::UnboundedSender<Job>,
) -> Result<Response, Cut>
where
    H: Fn(Request) -> F,
    F: Future<Output = Result<Response, Cut>> + Send + 'static,
{
    let (parts, body) = request.into_parts();
    let body = body.collect().await.map_err(|_| Cut)?.to_bytes();
    let handled = handle(Request {
        at: Instant::now(),
        method: parts.method,
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        headers: parts.headers,
        body,
    });
    let (send, receive) = oneshot::channel();
    let job = async move { drop(send.send(handled.await)) };
    jobs.send(Box::pin(job)).map_err(|_| Cut)?;
    receive.await.map_err(|_| Cut)?
}

/// A JSON response.
pub fn json(status: StatusCode, body: &Value) -> Response {
    raw(status, "application/json", body.to_string())
}

/// A response of any type.
pub fn raw(status: StatusCode, content_type: &str, body: impl Into<Bytes>) -> Response {
    let body: Bytes = body.into();
    Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, content_type)
        .header(header::CONTENT_LENGTH, body.len())
        .body(Body::from(body))
        .expect("a well-formed answer")
}

/// Truncates a response: the head and half of the body arrive, then the connection closes.
pub async fn cut_in_half(response: Response) -> Response {
    let (mut parts, body) = response.into_parts();
    let whole = body.collect().await.expect("a body held in memory").to_bytes();
    // At least one byte has to be missing, or the response is complete.
    parts.headers.insert(header::CONTENT_LENGTH, whole.len().max(1).into());
    let half = whole.slice(..whole.len() / 2);
    let stream = futures::stream::unfold(Some(half), |half| async {
        match half {
            Some(half) => Some((Ok(half), None)),
            None => {
                // Sends the first half before the connection closes.
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                Some((Err(Cut), None))
            }
        }
    });
    Response::from_parts(parts, Body::from_stream(stream))
}

/// Never responds.
pub async fn hang() -> Result<Response, Cut> {
    std::future::pending::<Result<Infallible, Cut>>().await.map(|never| match never {})
}
