//! Checks the `Host` and the `Origin` of each request, against DNS rebinding and requests from other web sites.
//!
//! The server listens on loopback, but every page in the user's browser can send requests to it. Two checks refuse those of other
//! sites, whether or not the API needs a key:
//!
//! - `Host` has to be this machine or the server's public address. Otherwise a page that resolves its own host name to this machine
//!   (DNS rebinding) would have the same origin as the API.
//! - A request whose `Origin` may not read the API's responses is refused before it is executed, including requests that browsers
//!   send without a preflight.

use std::net::Ipv6Addr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::{Json, Router};
use http::header::{HOST, ORIGIN};
use http::request::Parts;
use http::{HeaderMap, HeaderName, StatusCode};
use reqwest::Url;
use serde_json::json;

/// The name by which containers reach the machine that they run on.
const CONTAINERS_HOST: &str = "host.docker.internal";

/// A host and a port, as in `Host` headers and origins.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Authority {
    /// In lower case; an IPv6 address in brackets, in its canonical form.
    host: String,
    port: Option<u16>,
}

impl Authority {
    /// Parses `host` or `host:port`. Rejects input that browsers never send: user information, an empty label (and therefore a
    /// trailing dot), characters that are invalid in host names, a port that is not a number.
    fn parse(text: &str) -> Option<Self> {
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (address, rest) = rest.split_once(']')?;
                let port = if rest.is_empty() { None } else { Some(rest.strip_prefix(':')?) };
                (format!("[{}]", address.parse::<Ipv6Addr>().ok()?), port)
            }
            None => {
                let (host, port) = text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)));
                let is_name = |label: &str| {
                    !label.is_empty()
                        && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
                };
                if !host.split('.').all(is_name) {
                    return None;
                }
                (host.to_ascii_lowercase(), port)
            }
        };
        let port = match port {
            None => None,
            Some(digits) if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) => {
                Some(digits.parse().ok()?)
            }
            Some(_) => return None,
        };
        Some(Self { host, port })
    }

    /// Whether this is a name or an address of the loopback interface.
    fn is_loopback(&self) -> bool {
        matches!(self.host.as_str(), "127.0.0.1" | "localhost" | "[::1]") || self.host.ends_with(".localhost")
    }

    fn port_or(&self, default: u16) -> u16 {
        self.port.unwrap_or(default)
    }
}

/// The origin of a web page. `default_port` is that of its scheme.
struct Origin {
    default_port: u16,
    authority: Authority,
}

impl Origin {
    /// Parses `http://host:port` or `https://host:port`. Returns `None` for `null` and for other schemes.
    fn parse(text: &str) -> Option<Self> {
        let (scheme, authority) = text.split_once("://")?;
        let default_port = match scheme {
            "http" => 80,
            "https" => 443,
            _ => return None,
        };
        Some(Self { default_port, authority: Authority::parse(authority)? })
    }

    /// Whether the page has the host and port of the request. (The scheme may differ because of a proxy.)
    fn is_at(&self, authority: &Authority) -> bool {
        self.authority.host == authority.host
            && self.authority.port_or(self.default_port) == authority.port_or(self.default_port)
    }
}

/// The origins that may use the API: those of this machine, and those that the operator permits.
#[derive(Clone, Debug, Default)]
pub struct Origins(Arc<[String]>);

impl Origins {
    /// `permitted` are origins in addition to those of this machine.
    #[must_use]
    pub fn new(permitted: impl IntoIterator<Item = String>) -> Self {
        Self(permitted.into_iter().collect())
    }

    /// Whether pages of this origin may send requests and read the responses.
    #[must_use]
    pub fn allows(&self, origin: &str) -> bool {
        self.0.iter().any(|permitted| permitted == origin)
            || Origin::parse(origin).is_some_and(|origin| origin.authority.is_loopback())
    }
}

/// The address at which other machines reach the server, through a tunnel or a reverse proxy.
#[derive(Clone, Debug)]
pub struct PublicAddress {
    /// Without a trailing slash.
    url: String,
    origin: String,
    authority: Authority,
}

impl PublicAddress {
    /// Parses the value of `OH_WEB_URL`.
    ///
    /// # Errors
    /// A sentence, if the value is not an HTTP address.
    pub fn parse(url: &str) -> Result<Self, String> {
        let invalid =
            || format!("OH_WEB_URL (or WEB_HOST) must be an address like https://example.org, not \"{url}\".");
        let parsed = Url::parse(url).map_err(|_| invalid())?;
        let host = parsed.host_str().filter(|_| matches!(parsed.scheme(), "http" | "https")).ok_or_else(invalid)?;
        let port = parsed.port().map(|port| format!(":{port}")).unwrap_or_default();
        let authority = Authority::parse(&format!("{host}{port}")).ok_or_else(invalid)?;
        let origin = parsed.origin().ascii_serialization();
        Ok(Self { url: url.trim_end_matches('/').to_owned(), origin, authority })
    }

    /// The origin of pages at this address.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }
}

/// The outermost layer of the server.
#[derive(Clone, Debug)]
pub struct Access(Arc<Rules>);

#[derive(Debug)]
struct Rules {
    containers: bool,
    public: Option<PublicAddress>,
    origins: Origins,
}

/// Why a request is refused before it is routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `Host` is missing, malformed, or names another host.
    Host,
    /// The request comes from a page that may not use the API.
    Origin,
}

impl Refusal {
    fn status(self) -> StatusCode {
        match self {
            Self::Host => StatusCode::MISDIRECTED_REQUEST,
            Self::Origin => StatusCode::FORBIDDEN,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Host => {
                "This server does not serve the requested Host. Use 127.0.0.1 or localhost, or set OH_WEB_URL to the public \
                 address of the server"
            }
            Self::Origin => {
                "Pages of this Origin may not use this server. To permit the origin, add it to PERMITTED_CORS_ORIGINS"
            }
        }
    }

    /// The response, in the format of the API's errors.
    #[must_use]
    pub fn response(self) -> Response {
        (self.status(), Json(json!({"detail": self.text()}))).into_response()
    }
}

impl Access {
    /// `containers` is whether sandboxes are containers, which have another name for this machine.
    #[must_use]
    pub fn new(containers: bool, public: Option<PublicAddress>, permitted: &[String]) -> Self {
        let own = public.as_ref().map(|public| public.origin.clone());
        let origins = Origins::new(permitted.iter().cloned().chain(own));
        Self(Arc::new(Rules { containers, public, origins }))
    }

    /// The origins that may use the API.
    #[must_use]
    pub fn origins(&self) -> &Origins {
        &self.0.origins
    }

    /// Adds the layer that refuses requests for other hosts (421) and from other pages (403). It has to be outside all other layers.
    pub fn layer(&self, router: Router) -> Router {
        router.layer(middleware::from_fn_with_state(self.clone(), check))
    }

    /// The prefix of links to this server in the response to a request: the public address for requests to it, since a proxy may have
    /// removed its path, and an empty text for other requests. Clients resolve a link without scheme and host relative to their request.
    #[must_use]
    pub fn link_base(&self, request: &Parts) -> String {
        let authority = authority(&request.uri, &request.headers);
        let public = self.0.public.as_ref().filter(|public| authority.is_some_and(|one| one == public.authority));
        public.map(|public| public.url.clone()).unwrap_or_default()
    }

    fn refusal(&self, request: &Request) -> Option<Refusal> {
        let Some(authority) = authority(request.uri(), request.headers()) else { return Some(Refusal::Host) };
        if !self.serves(&authority) {
            return Some(Refusal::Host);
        }
        match single(request.headers(), &ORIGIN) {
            Header::Missing => None,
            Header::One(origin) if self.0.origins.allows(origin) => None,
            Header::One(origin) if Origin::parse(origin).is_some_and(|origin| origin.is_at(&authority)) => None,
            Header::One(_) | Header::Malformed => Some(Refusal::Origin),
        }
    }

    fn serves(&self, authority: &Authority) -> bool {
        authority.is_loopback()
            || (self.0.containers && authority.host == CONTAINERS_HOST)
            || self.0.public.as_ref().is_some_and(|public| public.authority.host == authority.host)
    }
}

async fn check(State(access): State<Access>, request: Request, next: Next) -> Response {
    match access.refusal(&request) {
        Some(refusal) => {
            tracing::debug!(?refusal, method = %request.method(), "http.refused");
            refusal.response()
        }
        None => next.run(request).await,
    }
}

/// Whether the `Host` of a request to a listening engine is this machine.
pub(crate) fn is_for_loopback(request: &Request) -> bool {
    authority(request.uri(), request.headers()).is_some_and(|authority| authority.is_loopback())
}

/// The `Origin` header of a request.
pub(crate) fn origin_of(headers: &HeaderMap) -> Header<'_> {
    single(headers, &ORIGIN)
}

/// A header that may occur once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Header<'a> {
    Missing,
    One(&'a str),
    /// Repeated, or not text.
    Malformed,
}

pub(crate) fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Header<'a> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (None, _) => Header::Missing,
        (Some(value), None) => value.to_str().map_or(Header::Malformed, Header::One),
        (Some(_), Some(_)) => Header::Malformed,
    }
}

/// The host of a request: its `Host` header or, in HTTP/2 and in requests in absolute form, the authority of its URI. `None` if both
/// are missing, if they differ, or if one is malformed.
fn authority(uri: &http::Uri, headers: &HeaderMap) -> Option<Authority> {
    let in_uri = match uri.authority() {
        Some(authority) => Some(Authority::parse(authority.as_str())?),
        None => None,
    };
    let in_header = match single(headers, &HOST) {
        Header::Missing => None,
        Header::One(host) => Some(Authority::parse(host)?),
        Header::Malformed => return None,
    };
    match (in_uri, in_header) {
        (Some(in_uri), Some(in_header)) => (in_uri == in_header).then_some(in_uri),
        (in_uri, in_header) => in_uri.or(in_header),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(target: &str, headers: &[(&str, &str)]) -> Request {
        let mut request = Request::builder().uri(target);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.body(axum::body::Body::empty()).unwrap()
    }

    fn access() -> Access {
        let public = PublicAddress::parse("https://tunnel.example/openhands/").unwrap();
        Access::new(false, Some(public), &["https://app.example".to_owned()])
    }

    fn refusal_of_host(access: &Access, host: &str) -> Option<Refusal> {
        access.refusal(&request("/", &[("host", host)]))
    }

    #[test]
    fn hosts_are_this_machine_or_the_public_address() {
        for host in [
            "127.0.0.1",
            "127.0.0.1:3000",
            "localhost:1",
            "LocalHost:65535",
            "[::1]:3000",
            "[0:0:0:0:0:0:0:1]",
            "app.localhost:3000",
            "a.b.localhost",
            "tunnel.example",
            "TUNNEL.example:443",
        ] {
            assert_eq!(refusal_of_host(&access(), host), None, "{host}");
        }
        for host in [
            "",
            ":3000",
            "rebind.example:3000",
            "localhost.rebind.example",
            "127.0.0.1.rebind.example",
            "notlocalhost",
            "localhost.",
            "127.0.0.1.",
            "app.localhost.",
            ".localhost",
            "a..localhost",
            "tunnel.example.",
            "sub.tunnel.example",
            "evil@localhost",
            "localhost@evil",
            "user:pass@127.0.0.1",
            "localhost:",
            "localhost:3000:1",
            "localhost:+80",
            "localhost:65536",
            "localhost: 80",
            "localhost/",
            "localhost,evil.example",
            "localhost evil",
            "evil%2elocalhost",
            "[::1",
            "::1",
            "[::1]3000",
            "[::1]:",
            "[::ffff:127.0.0.1]",
            "[::2]",
            "127.1",
            "2130706433",
            "0.0.0.0",
            "127.0.0.2",
            "host.docker.internal",
        ] {
            assert_eq!(refusal_of_host(&access(), host), Some(Refusal::Host), "{host}");
        }
        assert_eq!(refusal_of_host(&Access::new(true, None, &[]), "host.docker.internal:3000"), None);
    }

    #[test]
    fn the_host_is_given_once_in_the_header_or_the_uri() {
        let refusal = |target: &str, headers: &[(&str, &str)]| access().refusal(&request(target, headers));
        assert_eq!(refusal("/", &[]), Some(Refusal::Host));
        assert_eq!(refusal("/", &[("host", "localhost"), ("host", "localhost")]), Some(Refusal::Host));
        assert_eq!(refusal("http://localhost:3000/", &[("host", "localhost:3000")]), None);
        // HTTP/2 has no Host header.
        assert_eq!(refusal("http://localhost:3000/", &[]), None);
        assert_eq!(refusal("http://evil.example/", &[("host", "localhost")]), Some(Refusal::Host));
        assert_eq!(refusal("http://localhost/", &[("host", "evil.example")]), Some(Refusal::Host));
        assert_eq!(refusal("http://evil@localhost/", &[("host", "localhost")]), Some(Refusal::Host));
    }

    #[test]
    fn origins_are_this_machine_the_server_itself_or_permitted() {
        let refusal = |host: &str, origin: &str| access().refusal(&request("/", &[("host", host), ("origin", origin)]));
        for origin in [
            "http://localhost",
            "http://localhost:3001",
            "https://127.0.0.1:8443",
            "http://[::1]:3000",
            "http://app.localhost:1",
            "https://app.example",
            "https://tunnel.example",
        ] {
            assert_eq!(refusal("127.0.0.1:3000", origin), None, "{origin}");
        }
        for origin in [
            "null",
            "",
            "file://",
            "https://evil.example",
            "https://evil.example/.localhost",
            "http://localhost.evil.example",
            "http://127.0.0.1.evil.example:80",
            "http://app.example",
            "https://app.example:8443",
            "https://app.example.evil.example",
            "app.example",
            "chrome-extension://localhost",
            "http://evil@localhost",
            "http://localhost,https://evil.example",
        ] {
            assert_eq!(refusal("127.0.0.1:3000", origin), Some(Refusal::Origin), "{origin}");
        }
        let containers = Access::new(true, None, &[]);
        let from = |origin: &str| {
            containers.refusal(&request("/", &[("host", "host.docker.internal:3000"), ("origin", origin)]))
        };
        assert_eq!(from("http://host.docker.internal:3000"), None);
        assert_eq!(from("http://host.docker.internal:8080"), Some(Refusal::Origin));
        let twice =
            request("/", &[("host", "localhost"), ("origin", "http://localhost"), ("origin", "http://localhost")]);
        assert_eq!(access().refusal(&twice), Some(Refusal::Origin));
    }

    #[test]
    fn links_begin_with_the_address_that_the_client_used() {
        let base = |host: &str| access().link_base(&request("/", &[("host", host)]).into_parts().0);
        assert_eq!(base("localhost:3000"), "");
        assert_eq!(base("[::1]:80"), "");
        assert_eq!(base("tunnel.example:8443"), "");
        assert_eq!(base("tunnel.example"), "https://tunnel.example/openhands");
    }

    #[test]
    fn a_public_address_is_an_http_url() {
        for url in ["example.org", "ftp://example.org", "https://", "/path", "https://ex ample.org"] {
            assert!(PublicAddress::parse(url).unwrap_err().contains("OH_WEB_URL"), "{url}");
        }
        assert_eq!(PublicAddress::parse("https://Example.org:443/").unwrap().origin(), "https://example.org");
        assert_eq!(PublicAddress::parse("http://example.org:8080/x").unwrap().origin(), "http://example.org:8080");
    }
}
