//! HTTP client with SSRF protection, retries and a path traversal check, for URLs from untrusted data. A sandbox is untrusted, and its
//! provider supplies its address. With [`AddressPolicy::PublicOnly`] the client connects to public addresses only, so no request reaches
//! this machine, its network or the cloud's metadata service.
//!
//! Addresses are checked when the connection is made, after DNS resolution, so that a later change of the name (DNS rebinding) has no
//! effect. The client does not follow redirects.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use percent_encoding::percent_decode;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::header::HeaderMap;
use reqwest::redirect::Policy;
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use tokio::time::Instant;

#[cfg(feature = "simulation")]
use crate::simulation::{self, NoResponse};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The idle timeout of a pooled connection. Agent servers close idle connections after 5 s, and a request in that moment is lost.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// How long pooled connections to an origin are not used after a failure: until all that were idle at that time have timed out.
const DISTRUST: Duration = Duration::from_secs(5);
/// The maximum number of origins whose failures are remembered.
const MAX_DISTRUSTED: usize = 1_000;
/// The maximum number of bytes that are read of a response if only its status matters. Reading a response to its end returns the connection
/// to the pool.
const ALIVE_LIMIT: usize = 4 * 1024;
/// A URL to which no request can be sent.
const REFUSED: &str = "refused:";
/// The maximum number of times that a path may be percent-encoded.
const MAX_ENCODINGS: usize = 4;

/// The addresses to which the client may connect (SSRF protection).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AddressPolicy {
    /// Public addresses only.
    #[default]
    PublicOnly,
    /// Any address, because sandboxes run on this machine or in its network.
    Any,
}

/// Why a request has no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// There is no connection, or the URL or the policy does not allow one: the request had no effect.
    Unreachable,
    /// The response was not complete in time. The request may have had its effect.
    TimedOut,
    /// The connection ended before the response was complete. The request may have had its effect.
    CutOff,
}

/// A request without a response. Its text does not contain the URL, which may be secret.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct HttpError {
    pub cause: Cause,
    text: String,
}

impl From<reqwest::Error> for HttpError {
    fn from(error: reqwest::Error) -> Self {
        let cause = if error.is_timeout() {
            Cause::TimedOut
        } else if error.is_connect() || error.is_builder() {
            Cause::Unreachable
        } else {
            Cause::CutOff
        };
        Self { cause, text: error.without_url().to_string() }
    }
}

/// A client that is created on first use: TLS setup takes longer than the rest of the start-up, and many requests need no client. Clones
/// share one client.
#[derive(Clone, Debug)]
struct LazyClient {
    builder: fn() -> reqwest::ClientBuilder,
    made: Arc<OnceLock<reqwest::Client>>,
}

impl LazyClient {
    fn new(builder: fn() -> reqwest::ClientBuilder) -> Self {
        Self { builder, made: Arc::default() }
    }

    fn get(&self) -> reqwest::Result<&reqwest::Client> {
        if let Some(client) = self.made.get() {
            return Ok(client);
        }
        let made = (self.builder)().build()?;
        Ok(self.made.get_or_init(|| made))
    }
}

/// The HTTP client for untrusted URLs, and for all other requests of this program that no SDK sends.
///
/// A server may close a pooled connection while the next request is being sent: after an error (uvicorn closes a connection shortly after a
/// 500, without announcing it), at a restart, or because the connection was idle while Lambda had frozen this process. Therefore a request
/// that is not idempotent uses a new connection. An idempotent request is retried once, on a new connection, when the request or its
/// response is cut off. After a failure, pooled connections to that origin are not used for a few seconds (`DISTRUST`).
#[derive(Clone, Debug)]
pub struct HttpClient {
    keeping: LazyClient,
    /// A client whose connections serve one request each.
    once: LazyClient,
    policy: AddressPolicy,
    /// The time until which pooled connections to an origin are not used.
    distrusted: Arc<Mutex<HashMap<String, Instant>>>,
}

impl HttpClient {
    /// Creates a client with this policy.
    #[must_use]
    pub fn new(policy: AddressPolicy) -> Self {
        let (keeping, once) = match policy {
            AddressPolicy::Any => (LazyClient::new(builder), LazyClient::new(|| for_one_request(builder()))),
            AddressPolicy::PublicOnly => {
                (LazyClient::new(public_builder), LazyClient::new(|| for_one_request(public_builder())))
            }
        };
        Self { keeping, once, policy, distrusted: Arc::default() }
    }

    /// Creates a request. If the policy does not allow the URL, sending the request fails.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn request(&self, method: Method, url: &str) -> Result<Request, HttpError> {
        let url = Url::parse(url).ok().filter(|url| self.policy == AddressPolicy::Any || may_name(url));
        let is_repeatable = method.is_safe();
        let origin = url.as_ref().map(|url| url.origin().ascii_serialization()).unwrap_or_default();
        let client = if is_repeatable { &self.keeping } else { &self.once };
        let builder = client.get()?.request(method, url.as_ref().map_or(REFUSED, Url::as_str));
        Ok(Request { outbound: self.clone(), origin, builder, is_repeatable })
    }

    /// Returns whether `GET url` returns a success status within `timeout`.
    pub async fn succeeds(&self, url: &str, timeout: Duration) -> bool {
        let Ok(request) = self.request(Method::GET, url) else { return false };
        request.send(timeout, |_| ALIVE_LIMIT).await.is_ok_and(|answer| answer.status.is_success())
    }

    fn trusts(&self, origin: &str) -> bool {
        let distrusted = self.distrusted.lock().unwrap_or_else(PoisonError::into_inner);
        distrusted.get(origin).is_none_or(|until| *until < Instant::now())
    }

    fn distrust(&self, origin: &str) {
        let now = Instant::now();
        let mut distrusted = self.distrusted.lock().unwrap_or_else(PoisonError::into_inner);
        if distrusted.len() >= MAX_DISTRUSTED {
            distrusted.retain(|_, until| *until >= now);
        }
        // Above the maximum number of origins, the retry has to suffice.
        if distrusted.len() < MAX_DISTRUSTED || distrusted.contains_key(origin) {
            distrusted.insert(origin.to_owned(), now + DISTRUST);
        }
    }
}

/// A request that has not been sent yet.
#[derive(Debug)]
pub struct Request {
    outbound: HttpClient,
    origin: String,
    builder: RequestBuilder,
    is_repeatable: bool,
}

#[derive(Debug)]
pub struct Answer {
    /// The status, which may be an error.
    pub status: StatusCode,
    pub headers: HeaderMap,
    /// The body, or its first bytes.
    pub body: Vec<u8>,
    /// Whether the body is complete; otherwise it has more bytes than the limit.
    pub is_whole: bool,
}

impl Request {
    /// Applies `add` to the request, for headers and a body.
    #[must_use]
    pub fn with(self, add: impl FnOnce(RequestBuilder) -> RequestBuilder) -> Self {
        Self { builder: add(self.builder), ..self }
    }

    /// Marks the request as idempotent, so that it may be retried. GET requests always are.
    #[must_use]
    pub fn repeatable(self) -> Self {
        Self { is_repeatable: true, ..self }
    }

    /// Sends the request and reads the response within `timeout`. `limit` returns the maximum number of bytes to read of the body, by the
    /// status.
    ///
    /// # Errors
    /// When the response is missing or incomplete. An error status is not an error here.
    pub async fn send(self, timeout: Duration, limit: impl Fn(StatusCode) -> usize) -> Result<Answer, HttpError> {
        let deadline = Instant::now() + timeout;
        let Self { outbound, origin, builder, is_repeatable } = self;
        let mut request = builder.build()?;
        *request.timeout_mut() = Some(timeout);
        let again = if is_repeatable { request.try_clone() } else { None };
        let keeps = is_repeatable && outbound.trusts(&origin);
        let exchange = Exchange { outbound: &outbound, origin: &origin, limit };
        let error = match exchange.make(request, keeps).await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        match again {
            Some(mut again) if error.cause == Cause::CutOff && !left.is_zero() => {
                *again.timeout_mut() = Some(left);
                exchange.make(again, false).await
            }
            _ => Err(error),
        }
    }
}

struct Exchange<'a, L> {
    outbound: &'a HttpClient,
    origin: &'a str,
    limit: L,
}

impl<L: Fn(StatusCode) -> usize> Exchange<'_, L> {
    async fn make(&self, request: reqwest::Request, keeps: bool) -> Result<Answer, HttpError> {
        let made = match self.execute(request, keeps).await {
            Ok(response) => self.read(response).await,
            Err(error) => Err(error),
        };
        // Only after the body is read, the connection is in the pool again.
        if made.as_ref().map_or(true, |answer| answer.status.is_server_error()) {
            self.outbound.distrust(self.origin);
        }
        made
    }

    async fn execute(&self, request: reqwest::Request, keeps: bool) -> Result<Response, HttpError> {
        #[cfg(feature = "simulation")]
        if let Some(network) = simulation::network() {
            return simulated(&*network, request).await;
        }
        let client = if keeps { &self.outbound.keeping } else { &self.outbound.once };
        Ok(client.get()?.execute(request).await?)
    }

    async fn read(&self, mut response: Response) -> Result<Answer, HttpError> {
        let status = response.status();
        if status.is_server_error() {
            self.outbound.distrust(self.origin);
        }
        let limit = (self.limit)(status);
        let mut body = Vec::new();
        let mut is_whole = true;
        while let Some(chunk) = response.chunk().await? {
            let fitting: Bytes = chunk.slice(..chunk.len().min(limit - body.len()));
            body.extend_from_slice(&fitting);
            if fitting.len() < chunk.len() {
                is_whole = false;
                break;
            }
        }
        Ok(Answer { status, headers: std::mem::take(response.headers_mut()), body, is_whole })
    }
}

/// Sends a request to a server of the simulation. As on the real network, it ends at its timeout.
#[cfg(feature = "simulation")]
async fn simulated(network: &dyn simulation::Network, request: reqwest::Request) -> Result<Response, HttpError> {
    let failed = |cause: Cause| HttpError { cause, text: format!("{cause:?} in the simulation") };
    if !request.url().has_host() {
        return Err(failed(Cause::Unreachable));
    }
    let timeout = request.timeout().copied().unwrap_or(Duration::MAX);
    match tokio::time::timeout(timeout, network.send(request)).await {
        Ok(Ok(response)) => Ok(Response::from(response)),
        Ok(Err(NoResponse::Unreachable)) => Err(failed(Cause::Unreachable)),
        Ok(Err(NoResponse::CutOff)) => Err(failed(Cause::CutOff)),
        Err(_) => Err(failed(Cause::TimedOut)),
    }
}

/// Joins a path and its optional query to a base URL, with a path traversal check. Returns `None` unless the result stays on the base's
/// host and below the base's path, and [`is_plain`] accepts the path.
///
/// Every path that contains an id or a caller's text passes this function before it becomes part of a URL.
#[must_use]
pub fn join(base: &str, path: &str) -> Option<Url> {
    if !is_plain(path) {
        return None;
    }
    let base = Url::parse(base).ok()?;
    let below = base.path().trim_end_matches('/');
    let mut root = base.clone();
    root.set_query(None);
    root.set_fragment(None);
    let joined = Url::parse(&format!("{}{path}", root.as_str().trim_end_matches('/'))).ok()?;
    let same_place = joined.origin() == base.origin()
        && (joined.scheme(), joined.username(), joined.password()) == (base.scheme(), base.username(), base.password())
        && joined.path().strip_prefix(below).is_some_and(|rest| rest.starts_with('/'))
        && joined.fragment().is_none();
    same_place.then_some(joined)
}

/// Path traversal check: returns whether every parser reads an absolute path the same way. The path must have no `.` or `..` segments,
/// empty segments, backslashes, control characters or fragments, and no encoded dots, slashes or backslashes, even if they are encoded
/// twice. A query must have no control characters, backslashes and fragments.
#[must_use]
pub fn is_plain(path: &str) -> bool {
    let folder = path.split('?').next().unwrap_or_default();
    folder.starts_with('/')
        && !path.chars().any(|letter| letter.is_control() || matches!(letter, '\\' | '#'))
        && !folder.contains("//")
        && !folder.split('/').any(|segment| matches!(segment, "." | ".."))
        && !encodes_syntax(folder)
}

/// Returns whether decoding a path, once or repeatedly, adds a dot, a slash, a backslash or a control character.
fn encodes_syntax(path: &str) -> bool {
    let syntax =
        |path: &[u8]| path.iter().filter(|byte| matches!(byte, b'.' | b'/' | b'\\') || byte.is_ascii_control()).count();
    let mut current = path.as_bytes().to_vec();
    for _ in 0..MAX_ENCODINGS {
        let decoded: Vec<u8> = percent_decode(&current).collect();
        if syntax(&decoded) > syntax(path.as_bytes()) {
            return true;
        }
        if decoded == current {
            return false;
        }
        current = decoded;
    }
    true
}

#[expect(clippy::disallowed_methods, reason = "this is what the others use")]
fn builder() -> reqwest::ClientBuilder {
    let builder = reqwest::Client::builder();
    // Simulated processes are many, and reading the certificates takes longer than anything else that they do.
    #[cfg(feature = "simulation")]
    let builder = if simulation::is_entered() { builder.tls_certs_only([]) } else { builder };
    builder.connect_timeout(CONNECT_TIMEOUT).pool_idle_timeout(IDLE_TIMEOUT).redirect(Policy::none())
}

fn public_builder() -> reqwest::ClientBuilder {
    // A proxy would resolve the names instead of this process.
    builder().no_proxy().dns_resolver(Arc::new(PublicAddresses))
}

fn for_one_request(builder: reqwest::ClientBuilder) -> reqwest::ClientBuilder {
    builder.pool_max_idle_per_host(0)
}

/// Returns whether a URL's host is a public address, or a name, which is checked when it is resolved.
fn may_name(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let literal = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    matches!(url.scheme(), "http" | "https") && literal.parse::<IpAddr>().map_or(!host.is_empty(), is_public)
}

/// A DNS resolver that returns public addresses only.
#[derive(Debug)]
struct PublicAddresses;

impl Resolve for PublicAddresses {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            public(found).map_err(Into::into)
        })
    }
}

fn public(found: Vec<SocketAddr>) -> std::result::Result<Addrs, std::io::Error> {
    let public: Vec<SocketAddr> = found.into_iter().filter(|address| is_public(address.ip())).collect();
    if public.is_empty() {
        return Err(std::io::Error::other("the name has no public address"));
    }
    Ok(Box::new(public.into_iter()))
}

/// Returns whether an address is public, by IANA's special-purpose address registries. An IPv6 address with an embedded IPv4 address is
/// classified by the latter.
#[must_use]
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !matches!(
        (a, b, c),
        (0 | 10 | 127 | 224..=255, ..)
            | (100, 64..=127, _)
            | (169, 254, _)
            | (172, 16..=31, _)
            | (192, 0, 0 | 2)
            | (192, 31, 196)
            | (192, 52, 193)
            | (192, 88, 99)
            | (192, 168, _)
            | (192, 175, 48)
            | (198, 18 | 19, _)
            | (198, 51, 100)
            | (203, 0, 113)
    )
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let embedded = |high: u16, low: u16| {
        let [[a, b], [c, d]] = [high.to_be_bytes(), low.to_be_bytes()];
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    match address.segments() {
        // IPv4-mapped, NAT64 and 6to4 addresses.
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => {
            embedded(high, low)
        }
        // Protocol assignments (such as Teredo), and documentation.
        [0x2001, 0..=0x1ff | 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => false,
        // All public unicast addresses are in 2000::/3.
        [first, ..] => (0x2000..=0x3fff).contains(&first),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::time::sleep;

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(20);
    /// The time for which uvicorn logs the traceback of an exception before it closes the connection.
    const TRACEBACK: Duration = Duration::from_millis(300);

    /// A server whose behaviour depends on the path: `/500` fails like an exception in an agent server; `/cut` and `/half` close the
    /// connection before and within the response, `/cut-once` and `/half-once` only for the first request; `/last` closes it when the next
    /// request arrives; `/slow-cut` closes it after a delay; all other requests succeed.
    #[derive(Default)]
    struct Server {
        gets: AtomicUsize,
        posts: AtomicUsize,
        connections: AtomicUsize,
        cut: AtomicUsize,
    }

    impl Server {
        async fn start() -> (Arc<Self>, String) {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let url = format!("http://{}", listener.local_addr().expect("an address"));
            let server = Arc::new(Self::default());
            let serving = server.clone();
            tokio::spawn(async move {
                while let Ok((connection, _)) = listener.accept().await {
                    serving.connections.fetch_add(1, Ordering::SeqCst);
                    let server = serving.clone();
                    tokio::spawn(async move { server.serve(connection).await });
                }
            });
            (server, url)
        }

        async fn serve(&self, mut connection: TcpStream) -> Option<()> {
            let mut is_last = false;
            loop {
                let mut request = Vec::new();
                // A request body is always `{}`.
                while !request.ends_with(b"\r\n\r\n") && !request.ends_with(b"\r\n\r\n{}") {
                    if connection.read_buf(&mut request).await.ok()? == 0 {
                        return None;
                    }
                    if request.starts_with(b"POST") && request.ends_with(b"\r\n\r\n") {
                        connection.read_buf(&mut request).await.ok()?;
                    }
                }
                let count = if request.starts_with(b"POST") { &self.posts } else { &self.gets };
                count.fetch_add(1, Ordering::SeqCst);
                if is_last {
                    return None;
                }
                let text = String::from_utf8_lossy(&request).into_owned();
                let path = text.split(' ').nth(1)?;
                let is_first = || self.cut.fetch_add(1, Ordering::SeqCst) == 0;
                let whole = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]".as_slice();
                match path {
                    "/500" => {
                        let answer = b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\n{}";
                        connection.write_all(answer).await.ok()?;
                        sleep(TRACEBACK).await;
                        return None;
                    }
                    "/cut" => return None,
                    "/cut-once" if is_first() => return None,
                    "/slow-cut" => {
                        sleep(TRACEBACK).await;
                        return None;
                    }
                    "/half" => return connection.write_all(&whole[..whole.len() - 1]).await.ok(),
                    "/half-once" if is_first() => return connection.write_all(&whole[..whole.len() - 1]).await.ok(),
                    path => {
                        is_last = path == "/last";
                        connection.write_all(whole).await.ok()?;
                    }
                }
            }
        }

        /// Returns the numbers of GET requests, POST requests and connections since the previous call.
        fn counts(&self) -> (usize, usize, usize) {
            let count = |counter: &AtomicUsize| counter.swap(0, Ordering::SeqCst);
            (count(&self.gets), count(&self.posts), count(&self.connections))
        }
    }

    async fn get(outbound: &HttpClient, url: &str) -> Result<Answer, HttpError> {
        outbound.request(Method::GET, url)?.send(TIMEOUT, |_| 100).await
    }

    async fn post(outbound: &HttpClient, url: &str) -> Result<Answer, HttpError> {
        outbound.request(Method::POST, url)?.with(|request| request.body("{}")).send(TIMEOUT, |_| 100).await
    }

    #[tokio::test]
    async fn connections_are_kept_between_requests_that_may_be_repeated() {
        let (server, url) = Server::start().await;
        let outbound = HttpClient::new(AddressPolicy::Any);
        for _ in 0..5 {
            assert_eq!(get(&outbound, &url).await.expect("an answer").body, b"[]");
        }
        assert_eq!(server.counts(), (5, 0, 1));
        for _ in 0..3 {
            post(&outbound, &url).await.expect("an answer");
        }
        assert_eq!(server.counts(), (0, 3, 3));
        let request = outbound.request(Method::POST, &url).expect("a client").repeatable();
        request.with(|request| request.body("{}")).send(TIMEOUT, |_| 100).await.expect("an answer");
        assert_eq!(server.counts(), (0, 1, 0));
    }

    #[tokio::test]
    async fn what_follows_a_500_arrives_once() {
        const ROUNDS: usize = 10;
        for failing in [Method::GET, Method::POST] {
            let (server, url) = Server::start().await;
            for round in 0..ROUNDS {
                let outbound = HttpClient::new(AddressPolicy::Any);
                let fail = async || {
                    let request = outbound.request(failing.clone(), &format!("{url}/500")).expect("a client");
                    let answer = request.with(|request| request.body("{}")).send(TIMEOUT, |_| 100).await;
                    assert_eq!(answer.expect("an answer").status, 500);
                };
                // The pool has other connections in addition to the one that the server closes.
                let (one, other, ()) = tokio::join!(get(&outbound, &url), get(&outbound, &url), fail());
                assert!(one.is_ok() && other.is_ok(), "{one:?} {other:?}");
                let (gets, posts, _) = server.counts();
                let expected = if failing == Method::GET { (3, 0) } else { (2, 1) };
                assert_eq!((gets, posts), expected, "round {round}");
                post(&outbound, &url).await.expect("arrived");
                get(&outbound, &url).await.expect("an answer");
                let (one, other) = tokio::join!(post(&outbound, &url), post(&outbound, &url));
                assert!(one.is_ok() && other.is_ok(), "{one:?} {other:?}");
                // Each request used its own connection: the GET was not retried.
                assert_eq!(server.counts(), (1, 3, 4), "round {round} after {failing}");
            }
        }
    }

    #[tokio::test]
    async fn what_is_cut_off_is_repeated_once_if_that_does_no_harm() {
        let (server, url) = Server::start().await;
        for (path, arrives) in [("cut-once", true), ("half-once", true), ("cut", false), ("half", false)] {
            let outbound = HttpClient::new(AddressPolicy::Any);
            let url = format!("{url}/{path}");
            let is_whole = |answer: Result<Answer, HttpError>| answer.is_ok_and(|answer| answer.body == b"[]");
            server.cut.store(0, Ordering::SeqCst);
            assert_eq!(is_whole(get(&outbound, &url).await), arrives, "{path}");
            assert_eq!(server.counts(), (2, 0, 2), "{path}");
            server.cut.store(0, Ordering::SeqCst);
            assert!(post(&outbound, &url).await.is_err(), "{path}");
            assert_eq!(server.counts(), (0, 1, 1), "{path}");
            server.cut.store(0, Ordering::SeqCst);
            let request = outbound.request(Method::POST, &url).expect("a client").repeatable();
            let answer = request.with(|request| request.body("{}")).send(TIMEOUT, |_| 100).await;
            assert_eq!(is_whole(answer), arrives, "{path}");
            assert_eq!(server.counts(), (0, 2, 2), "{path}");
        }
    }

    #[tokio::test]
    async fn a_restart_of_the_server_loses_no_request() {
        const KEPT: usize = 8;
        let (server, url) = Server::start().await;
        let outbound = HttpClient::new(AddressPolicy::Any);
        for round in 0..5 {
            let kept = format!("{url}/last");
            let answers = futures::future::join_all((0..KEPT).map(|_| get(&outbound, &kept))).await;
            assert!(answers.iter().all(Result::is_ok), "{answers:?}");
            server.counts();
            // Every pooled connection closes at the next request on it.
            let posts = futures::future::join_all((0..KEPT).map(|_| post(&outbound, &url))).await;
            assert!(posts.iter().all(Result::is_ok), "round {round}: {posts:?}");
            assert_eq!(server.counts(), (0, KEPT, KEPT), "round {round}");
            let gets = futures::future::join_all((0..KEPT).map(|_| get(&outbound, &url))).await;
            assert!(gets.iter().all(Result::is_ok), "round {round}: {gets:?}");
            assert!(server.counts().0 <= 2 * KEPT, "round {round}");
        }
    }

    #[tokio::test]
    async fn a_repetition_has_the_time_that_is_left() {
        let (server, url) = Server::start().await;
        let outbound = HttpClient::new(AddressPolicy::Any);
        let request = outbound.request(Method::GET, &format!("{url}/slow-cut")).expect("a client");
        let began = Instant::now();
        let error = request.send(TRACEBACK * 3 / 2, |_| 100).await.expect_err("no answer");
        assert!(
            error.cause == Cause::TimedOut && began.elapsed() < TRACEBACK * 2,
            "{error:?} after {:?}",
            began.elapsed()
        );
        assert_eq!(server.counts(), (2, 0, 2));
    }

    #[tokio::test]
    async fn of_a_body_as_much_is_read_as_is_wanted() {
        let (_server, url) = Server::start().await;
        let outbound = HttpClient::new(AddressPolicy::Any);
        for (limit, body, is_whole) in [(0, "", false), (1, "[", false), (2, "[]", true), (3, "[]", true)] {
            let request = outbound.request(Method::GET, &url).expect("a client");
            let answer = request.send(TIMEOUT, |_| limit).await.expect("an answer");
            assert_eq!((answer.body.as_slice(), answer.is_whole), (body.as_bytes(), is_whole), "{limit}");
        }
    }

    #[test]
    fn failures_of_many_origins_take_little_memory() {
        let outbound = HttpClient::new(AddressPolicy::Any);
        for port in 0..2 * MAX_DISTRUSTED {
            outbound.distrust(&format!("http://host:{port}"));
        }
        assert_eq!(outbound.distrusted.lock().expect("a map").len(), MAX_DISTRUSTED);
        assert!(!outbound.trusts("http://host:7") && outbound.trusts("http://other"));
        let past = Instant::now();
        std::thread::sleep(Duration::from_millis(2));
        outbound.distrusted.lock().expect("a map").values_mut().for_each(|until| *until = past);
        assert!(outbound.trusts("http://host:7"));
        outbound.distrust("http://other");
        assert_eq!(outbound.distrusted.lock().expect("a map").len(), 1);
    }

    #[test]
    fn addresses_are_public_or_not() {
        for not_public in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.0.1",
            "169.254.0.1",
            "169.254.169.254",
            "169.254.170.2",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "::169.254.169.254",
            "64:ff9b::a00:1",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:1ff::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2002:a9fe:a9fe::1",
            "3fff::1",
            "3fff:fff::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fdff::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "4000::1",
        ] {
            assert!(!is_public(not_public.parse().expect("an address")), "{not_public}");
        }
        for public in [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.1",
            "100.63.255.255",
            "100.128.0.1",
            "126.0.0.1",
            "128.0.0.1",
            "169.253.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "192.167.0.1",
            "192.169.0.1",
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2001:4860:4860::8888",
            "2001:200::1",
            "2a00::1",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
            "2002:808:808::1",
            "3ffe::1",
        ] {
            assert!(is_public(public.parse().expect("an address")), "{public}");
        }
    }

    #[test]
    fn hosts_are_addresses_however_they_are_written() {
        let may = |url: &str| Url::parse(url).is_ok_and(|url| may_name(&url));
        for url in [
            "http://127.0.0.1/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f.0.0.1:80/",
            "http://0177.0.0.1/",
            "http://[::1]/",
            "http://[::ffff:169.254.169.254]/latest",
            "http://0/",
            "http://user@10.0.0.1/",
            "file:///etc/passwd",
            "ftp://1.1.1.1/",
            "http://1.1.1.1@127.0.0.1/",
            "nothing",
            "http://１２７.0.0.1/",
        ] {
            assert!(!may(url), "{url}");
        }
        for url in [
            "http://1.1.1.1/",
            "https://[2606:4700::1111]:8443/x",
            "https://sandbox.example.com/",
            "http://127.0.0.1.example.com/",
        ] {
            assert!(may(url), "{url}");
        }
    }

    #[test]
    fn a_joined_path_stays_below_its_base() {
        for (base, path, expected) in [
            ("http://host:1", "/api/x", "http://host:1/api/x"),
            ("http://host:1/", "/api/x?path=/a/../b&y=//z", "http://host:1/api/x?path=/a/../b&y=//z"),
            ("https://host/runtime/7", "/api/x%20y", "https://host/runtime/7/api/x%20y"),
            ("https://host/runtime/7/", "/api/100%25", "https://host/runtime/7/api/100%25"),
            ("https://host/runtime/7", "/api/a b", "https://host/runtime/7/api/a%20b"),
            ("https://host/runtime/7", "/api/..x/.hidden", "https://host/runtime/7/api/..x/.hidden"),
        ] {
            assert_eq!(join(base, path).as_ref().map(Url::as_str), Some(expected));
        }
        for path in [
            "",
            "api/x",
            "@evil/api/x",
            ":80/api/x",
            "/api/../x",
            "/api/..",
            "/api/.",
            "/api/./x",
            "/api/..?x",
            "/api/%2e%2e/x",
            "/api/%2E%2e/x",
            "/api/.%2E/x",
            "/api/%2e./x",
            "/api/%252e%252e/x",
            "/api/%25252e/x",
            "/api/%25%32%65/x",
            "/api/%%32e/x",
            "/api/..%2fx",
            "/api/%2F..%2Fx",
            "/api/%252fx",
            "/api/..%5cx",
            "/api\\..\\x",
            "/\\evil/api/",
            "//evil/api/x",
            "/api//x",
            "/api//../x",
            "/api/x#y",
            "/api/x?y#z",
            "/api/\t../x",
            "/api/.\n./x",
            "/api/.%09./x",
            "/api/%00",
            "/api/x\r\nhost: evil",
        ] {
            assert_eq!(join("https://host/runtime/7", path), None, "{path}");
        }
        // The check runs in linear time.
        let deep = format!("/api/%{}2e", "25".repeat(2_000_000));
        assert_eq!(join("https://host/runtime/7", &deep), None);
        for base in ["", "host", "data:text/plain,x"] {
            assert_eq!(join(base, "/api/x"), None, "{base}");
        }
    }

    #[tokio::test]
    async fn names_of_private_addresses_are_not_reached() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let mixed = public(vec![at("169.254.169.254:0"), at("1.1.1.1:0"), at("[::1]:0")]).expect("one is left");
        assert_eq!(mixed.collect::<Vec<_>>(), [at("1.1.1.1:0")]);
        assert!(public(vec![at("10.0.0.1:0"), at("[fd00::1]:0")]).is_err());

        // A server listens there and must not receive a connection.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let outbound = HttpClient::new(AddressPolicy::PublicOnly);
        for host in ["localhost", "127.0.0.1", "[::ffff:127.0.0.1]"] {
            let request = outbound.request(Method::GET, &format!("http://{host}:{port}/")).expect("a client");
            let sent = request.send(CONNECT_TIMEOUT, |_| 0).await;
            assert!(sent.is_err(), "{host}");
        }
        let connection = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
        assert!(connection.is_err(), "nothing was connected to");
        let anywhere = HttpClient::new(AddressPolicy::Any);
        let request = anywhere.request(Method::GET, &format!("http://localhost:{port}/")).expect("a client");
        let request = request.send(CONNECT_TIMEOUT, |_| 0);
        let asked = tokio::select! { accepted = listener.accept() => accepted.is_ok(), _ = request => false };
        assert!(asked, "where it is allowed, it is reached");
    }
}
