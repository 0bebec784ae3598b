//! Access to a server on this machine: accepted `Host` and `Origin` headers (DNS rebinding, CSRF), presigned links, and
//! what is served without the key.

use std::net::SocketAddr;

use axum::body::Body;
use http::Request;
use http::header::{CONTENT_TYPE, LOCATION};
use local::options::{CommonOptions, SandboxKind};
use local::server::{Environment, Server};
use reqwest::{Client, Method, Response};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use shared::config::{ExportConfig, SandboxConfig, StartConfig};
use shared::http::caller::Caller;
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::openapi::{document, operations};
use crate::support::api::Api;
use crate::support::seed;
use crate::support::sigv4::sign;
use crate::tenants::{By, credential, everything, furnish, routes};

const API: &str = "/api/v1/app-conversations";
const CONVERSATION: &str = "0123456789abcdef0123456789abcdef";
/// The only route whose contract accepts JSON with any content type.
const ANY_CONTENT_TYPE: &str = "/api/v1/conversations/{conversation_id}/pending-messages";
const KEY: &str = "the-key-of-this-server";

struct Running {
    server: Server,
    http: Client,
    folder: TempDir,
}

impl Running {
    async fn start(environment: Environment) -> Self {
        let folder = TempDir::new().expect("a folder");
        let options = CommonOptions::on(folder.path().join("data"), SandboxKind::None);
        let server = Server::start(&options, environment, true, None).await.expect("the server starts");
        let http = Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).build().expect("a client");
        Self { server, http, folder }
    }

    fn address(&self) -> SocketAddr {
        self.server.address
    }

    async fn send(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Response {
        let method = Method::from_bytes(method.as_bytes()).expect("a method");
        let mut request = self.http.request(method, format!("http://{}{target}", self.address()));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.expect("an answer")
    }

    async fn status(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> u16 {
        self.send(method, target, headers).await.status().as_u16()
    }

    /// Sends these bytes and reads the status line.
    async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address()).await.expect("a connection");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.expect("an answer");
        String::from_utf8_lossy(&answer).lines().next().unwrap_or_default().to_owned()
    }

    /// Stores a conversation, and returns the redirect location of its export.
    async fn link(&self, headers: &[(&str, &str)]) -> String {
        let answer = self.send("GET", &format!("{API}/{CONVERSATION}/download"), headers).await;
        let status = answer.status();
        let location = answer.headers().get(LOCATION).map(|location| location.to_str().expect("text").to_owned());
        location.unwrap_or_else(|| panic!("{status}: no link"))
    }

    async fn has_conversation(&self) {
        let Server { aws, config, .. } = &self.server;
        let stores = Stores::new(&config.names, aws, &Sealer::ephemeral());
        let row = json!({"type": "conversation", "data": {"id": CONVERSATION, "sandbox_id": "s", "title": "one",
            "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z"}});
        seed::load(&stores, &UserId::local(), [row]).await;
    }

    async fn starts(&self) -> u64 {
        let count = self.send("GET", &format!("{API}/start-tasks/count"), &[("x-session-api-key", KEY)]).await;
        count.json().await.expect("a number")
    }
}

fn environment() -> Environment {
    Environment {
        start: StartConfig { web_url: Some("https://tunnel.example/openhands".to_owned()), ..StartConfig::default() },
        origins: vec!["https://app.example".to_owned()],
        // Every export is served by a link.
        export: ExportConfig { inline_limit: 0, settle: std::time::Duration::ZERO, ..ExportConfig::default() },
        ..Environment::default()
    }
}

/// Everything that the server serves: method and target.
fn everything_served() -> Vec<(String, String)> {
    let document = document();
    let mut served: Vec<_> = operations(&document)
        .into_iter()
        .map(|(method, path, _)| {
            let target = path.replace("{conversation_id}", CONVERSATION).replace("{sandbox_id}", "s");
            (method, target.replace("{secret_name}", "NAME"))
        })
        .collect();
    let others = [
        "/",
        "/docs",
        "/docs/",
        "/index.html",
        "/unknown",
        "/openhands-data/a?X-Amz-Signature=1",
        "/demo/llm/v1/models",
    ];
    served.extend(others.map(|target| ("GET".to_owned(), target.to_owned())));
    served.push(("PUT".to_owned(), "/openhands-data/a".to_owned()));
    served.push(("POST".to_owned(), API.to_owned()));
    served
}

#[tokio::test]
async fn foreign_hosts_and_origins_are_refused_on_every_path() {
    let running = Running::start(environment()).await;
    let own = running.address().to_string();
    for (method, target) in everything_served() {
        for host in
            ["rebind.example", "rebind.example:3000", "localhost.", "evil@localhost", "host.docker.internal", "::1"]
        {
            let answer = running.send(&method, &target, &[("host", host)]).await;
            assert_eq!(answer.status(), 421, "{method} {target} for {host}");
            let body: Value = answer.json().await.unwrap_or_default();
            assert!(method == "HEAD" || body["detail"].is_string(), "{method} {target}: {body}");
        }
        for origin in ["https://evil.example", "null", "http://localhost.evil.example", "https://app.example.evil"] {
            // Sent by a page without a preflight, and then the preflight itself.
            let simple = [("host", own.as_str()), ("origin", origin), ("content-type", "text/plain")];
            assert_eq!(running.status(&method, &target, &simple).await, 403, "{method} {target} from {origin}");
            let preflight = [
                ("origin", origin),
                ("access-control-request-method", &method),
                ("access-control-request-headers", "x"),
            ];
            let answer = running.send("OPTIONS", &target, &preflight).await;
            assert_eq!(answer.status(), 403, "{target} from {origin}");
            assert!(!answer.headers().contains_key("access-control-allow-origin"));
        }
        // DNS rebinding: a page whose own host name resolves to this server.
        let rebound = [("host", "rebind.example"), ("origin", "http://rebind.example")];
        assert_eq!(running.status(&method, &target, &rebound).await, 421, "{method} {target}");
    }
    assert_eq!(running.starts().await, 0, "no start was created");

    // Requests of allowed pages, and those of programs.
    for (host, origin) in [
        (own.as_str(), Some("http://localhost:5173")),
        (&own, Some("http://127.0.0.1:8000")),
        (&own, Some("https://app.example")),
        (&own, Some("https://tunnel.example")),
        ("tunnel.example", Some("https://tunnel.example")),
        ("tunnel.example", None),
        ("localhost:3000", Some("http://localhost:3000")),
        ("[::1]:3000", None),
        (&own, None),
    ] {
        let mut headers = vec![("host", host)];
        headers.extend(origin.map(|origin| ("origin", origin)));
        let answer = running.send("GET", &format!("{API}/count"), &headers).await;
        assert_eq!(answer.status(), 200, "{host} {origin:?}");
        let readable_by =
            answer.headers().get("access-control-allow-origin").map(|value| value.to_str().expect("text"));
        assert_eq!(readable_by, origin, "{host}");
    }
    running.server.shutdown().await;
}

/// Requests with an effect but no body, which browsers send for a page without a preflight.
#[tokio::test]
async fn cross_site_requests_without_a_body_change_nothing() {
    let running = Running::start(environment()).await;
    let document = document();
    let without_body = operations(&document).into_iter().filter(|(method, _, operation)| {
        matches!(method.as_str(), "POST" | "PUT" | "PATCH" | "DELETE") && operation.get("requestBody").is_none()
    });
    let targets: Vec<_> = without_body.map(|(method, path, _)| (method, path.replace("{sandbox_id}", "s"))).collect();
    for known in ["/api/v1/sandboxes", "/api/v1/sandboxes/s/pause", "/api/v1/sandboxes/s/resume"] {
        assert!(targets.iter().any(|(method, target)| method == "POST" && target == known), "{known}: {targets:?}");
    }
    for (method, target) in &targets {
        for origin in ["https://evil.example", "null"] {
            let answer = running.send(method, target, &[("origin", origin)]).await;
            assert_eq!(answer.status(), 403, "{method} {target}");
        }
        // The same request of a program is not refused.
        assert_ne!(running.status(method, target, &[]).await, 403, "{method} {target}");
    }
    running.server.shutdown().await;
}

#[tokio::test]
async fn requests_need_exactly_one_valid_host() {
    let running = Running::start(Environment::default()).await;
    let own = running.address();
    for (request, status) in [
        (format!("GET /alive HTTP/1.1\r\nhost: {own}\r\nconnection: close\r\n\r\n"), "200"),
        (format!("GET http://{own}/alive HTTP/1.1\r\nhost: {own}\r\nconnection: close\r\n\r\n"), "200"),
        ("GET /alive HTTP/1.0\r\n\r\n".to_owned(), "421"),
        ("GET /alive HTTP/1.1\r\nconnection: close\r\n\r\n".to_owned(), "421"),
        ("GET /alive HTTP/1.1\r\nhost:\r\nconnection: close\r\n\r\n".to_owned(), "421"),
        (format!("GET /alive HTTP/1.1\r\nhost: {own}\r\nhost: evil\r\nconnection: close\r\n\r\n"), "421"),
        (format!("GET http://evil.example/alive HTTP/1.1\r\nhost: {own}\r\nconnection: close\r\n\r\n"), "421"),
        (format!("GET http://{own}/alive HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n"), "421"),
    ] {
        let line = running.raw(&request).await;
        assert_eq!(line.split(' ').nth(1), Some(status), "{request:?}: {line}");
    }
    running.server.shutdown().await;
}

#[tokio::test]
async fn only_presigned_links_of_s3_are_served_without_the_key() {
    let running = Running::start(Environment { session_api_key: Some(SecretString::from(KEY)), ..environment() }).await;
    running.has_conversation().await;
    let key = ("x-session-api-key", KEY);
    let own = format!("http://{}", running.address());
    let link = running.link(&[key]).await;
    // Clients resolve the link relative to the address that they requested.
    let target = link.clone();
    assert!(target.starts_with("/openhands-data/exports/"), "{target}");

    let whole = running.send("GET", &target, &[("origin", "https://app.example"), ("range", "bytes=0-")]).await;
    assert_eq!(whole.status(), 206);
    assert_eq!(whole.headers()["access-control-allow-origin"], "https://app.example");
    let whole = running.send("GET", &target, &[]).await;
    assert_eq!(
        (whole.status().as_u16(), &whole.headers()[CONTENT_TYPE]),
        (200, &"application/zip".parse().expect("text"))
    );
    let whole = whole.bytes().await.expect("a zip");
    assert!(whole.starts_with(b"PK"));
    let part = running.send("GET", &target, &[("range", "bytes=2-9")]).await;
    assert_eq!(part.status(), 206);
    assert_eq!(part.bytes().await.expect("a part"), whole.slice(2..10));

    // A client is redirected to the address that it uses, and the object is served at each address.
    for (host, base) in [("localhost:4000", ""), ("tunnel.example", "https://tunnel.example/openhands")] {
        let link = running.link(&[key, ("host", host)]).await;
        let target = link.strip_prefix(base).unwrap_or_else(|| panic!("{link} is not at {base}"));
        assert_eq!(running.status("GET", target, &[("host", host)]).await, 200, "{host}");
    }

    // A client that sends the key as a bearer token also sends it when the server redirects to itself.
    let bearer = ("authorization", format!("Bearer {KEY}"));
    let url = format!("{own}{API}/{CONVERSATION}/download");
    let following = Client::builder().no_proxy().build().expect("a client");
    let followed = following.get(url).header(bearer.0, bearer.1).send().await.expect("an answer");
    assert_eq!((followed.status().as_u16(), followed.url().path()), (200, target.split('?').next().expect("a path")));

    let (path, query) = target.split_once('?').expect("a query");
    let forged = target.replace("X-Amz-Signature=", "X-Amz-Signature=0");
    let other_object = target.replace("exports/", "other/");
    for (what, method, target) in [
        ("unsigned", "GET", path.to_owned()),
        ("list", "GET", "/openhands-data?list-type=2".to_owned()),
        ("list with the signature", "GET", format!("/openhands-data/?{query}")),
        ("all buckets", "GET", format!("/?{query}&x-id=ListBuckets")),
        ("forged", "GET", forged),
        ("another object", "GET", other_object),
        ("another operation", "GET", format!("{target}&uploads")),
        ("changed headers of the answer", "GET", target.replace("attachment", "inline")),
        ("HEAD with a link for GET", "HEAD", target.clone()),
        ("upload", "PUT", target.clone()),
        ("deletion", "DELETE", target.clone()),
        ("form", "POST", "/openhands-data/".to_owned()),
        ("a new bucket", "PUT", "/openhands-data".to_owned()),
    ] {
        let status = running.status(method, &target, &[]).await;
        // Below `/` are the API's own paths.
        assert!(matches!(status, 400 | 403 | 404 | 405), "{what}: {status}");
    }
    // The engines' key pair gives no access here, either.
    let stored = std::fs::read(running.folder.path().join("data/engine-credentials.json")).expect("credentials");
    let credentials = serde_json::from_slice(&stored).expect("credentials");
    for (method, target) in [("GET", path), ("PUT", path), ("DELETE", path), ("GET", "/openhands-data?list-type=2")] {
        let url = format!("{own}{target}");
        let mut headers = http::HeaderMap::new();
        sign("s3", &credentials, method, &url, &mut headers, b"");
        let request = running.http.request(Method::from_bytes(method.as_bytes()).expect("a method"), &url);
        let status = request.headers(headers).send().await.expect("an answer").status();
        assert!(matches!(status.as_u16(), 403 | 405), "{method} {target}: {status}");
    }
    assert_eq!(running.status("GET", &target, &[("origin", "null")]).await, 403);
    assert_eq!(running.status("GET", &target, &[]).await, 200, "the object still exists");
    running.server.shutdown().await;
}

#[tokio::test]
async fn invalid_public_address_is_an_error() {
    let folder = TempDir::new().expect("a folder");
    let options = CommonOptions::on(folder.path().join("data"), SandboxKind::None);
    let start = StartConfig { web_url: Some("tunnel.example".to_owned()), ..StartConfig::default() };
    let environment = Environment { start, ..Environment::default() };
    let error = Server::start(&options, environment, true, None).await.expect_err("no address");
    assert!(error.to_string().contains("OH_WEB_URL"), "{error}");
}

/// Browsers send these content types without a preflight, so a route that read JSON from them could be called by any
/// page.
#[tokio::test]
async fn routes_that_read_json_refuse_other_content_types() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let owner = UserId::new("actor");
    furnish(&api, &owner).await;
    let document = document();
    let with_body: Vec<_> =
        operations(&document).into_iter().filter(|(_, _, operation)| operation.get("requestBody").is_some()).collect();
    assert!(with_body.len() > 10, "{with_body:?}");
    let routes = routes();
    let before = everything(&api).await;
    for (method, path, _) in with_body {
        let mut tried =
            routes.iter().filter(|route| route.path == path && route.method == method && route.body.is_some());
        let route = tried.next().unwrap_or_else(|| panic!("{method} {path} has no request with a body"));
        let body = route.body.as_ref().expect("a body").to_string();
        for content_type in [
            None,
            Some("text/plain"),
            Some("text/plain;charset=UTF-8"),
            Some("application/x-www-form-urlencoded"),
            Some("multipart/form-data; boundary=x"),
            Some("text/json"),
            Some("application/jsonp"),
        ] {
            if path == ANY_CONTENT_TYPE {
                continue;
            }
            let mut request = Request::builder().method(route.method).uri(&route.target);
            match route.by {
                By::Caller => request = request.extension(Caller(owner.clone())),
                By::Sandbox | By::Agent | By::Start => {
                    let (header, secret) = credential(&api, &owner, route.by).await;
                    request = request.header(header, secret.expose_secret());
                }
            }
            if let Some(content_type) = content_type {
                request = request.header(CONTENT_TYPE, content_type);
            }
            let request = request.body(Body::from(body.clone())).expect("a request");
            let (status, answer) = api.send(request).await;
            assert_eq!(status, 422, "{method} {path} as {content_type:?}: {answer}");
        }
    }
    assert_eq!(everything(&api).await, before, "no request changed anything");
    api.stop().await;
}
