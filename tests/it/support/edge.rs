//! A stand-in for the front door, a CloudFront distribution: runs the text of its function in Node.js, and sends the request to the origin
//! that the function has chosen, websockets included. Also the proxy of requests that other stand-ins use.

use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::response::Response;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Map, Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::Mutex as AsyncMutex;
use tokio::task::{AbortHandle, JoinSet};

use super::key_value_store::KeyValueStore;

pub type Incomings = http::Request<Incoming>;

/// A server for requests that are passed on: bodies are streamed, and connections upgraded.
#[derive(Debug)]
pub struct Passing {
    pub url: String,
    running: AbortHandle,
}

impl Passing {
    pub async fn start<H, F>(handle: H) -> Self
    where
        H: Fn(Incomings) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Response> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let serve = async move {
            let mut connections = JoinSet::new();
            loop {
                let Ok((stream, _)) = listener.accept().await else { continue };
                let handle = handle.clone();
                let service = service_fn(move |request| {
                    let answer = handle(request);
                    async move { Ok::<_, Infallible>(answer.await) }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .with_upgrades();
                connections.spawn(async move { drop(connection.await) });
                while connections.try_join_next().is_some() {}
            }
        };
        Self { url, running: tokio::spawn(serve).abort_handle() }
    }
}

impl Drop for Passing {
    fn drop(&mut self) {
        self.running.abort();
    }
}

pub fn plain(status: u16, text: &str) -> Response {
    let status = StatusCode::from_u16(status).expect("a status");
    Response::builder().status(status).body(Body::from(text.to_owned())).expect("a response")
}

/// Sends a request to an address, and upgrades both connections if the response is an upgrade. 502 without a response.
pub async fn pass(mut request: Incomings, address: &str) -> Response {
    let Ok(stream) = TcpStream::connect(address).await else { return plain(502, "Bad Gateway") };
    let Ok((mut sender, connection)) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await else {
        return plain(502, "Bad Gateway");
    };
    tokio::spawn(async move { drop(connection.with_upgrades().await) });
    let of_client = hyper::upgrade::on(&mut request);
    let Ok(mut response) = sender.send_request(request).await else { return plain(502, "Bad Gateway") };
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let of_server = hyper::upgrade::on(&mut response);
        tokio::spawn(async move {
            if let (Ok(client), Ok(server)) = (of_client.await, of_server.await) {
                drop(copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(server)).await);
            }
        });
    }
    response.map(Body::new)
}

/// The process that runs the function.
struct Function {
    _child: Child,
    stdin: ChildStdin,
    stdout: tokio::io::Lines<BufReader<ChildStdout>>,
    _folder: TempDir,
}

impl Function {
    fn start() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folder = TempDir::new().expect("a folder");
        let file = folder.path().join("function.js");
        std::fs::write(&file, text()).expect("written");
        let mut child = Command::new("node")
            .arg(root.join("data/edge/run-function.mjs"))
            .arg(&file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("Node.js");
        let stdin = child.stdin.take().expect("its input");
        let stdout = BufReader::new(child.stdout.take().expect("its output")).lines();
        Self { _child: child, stdin, stdout, _folder: folder }
    }

    async fn call(&mut self, event: &Value) -> Value {
        self.stdin.write_all(format!("{event}\n").as_bytes()).await.expect("Node.js runs");
        let line = self.stdout.next_line().await.expect("Node.js runs").expect("a line");
        serde_json::from_str(&line).expect("JSON")
    }
}

/// The text of the function, as CloudFormation deploys it in the region of the tests.
pub fn text() -> String {
    let file: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../infra/front-door.js");
    std::fs::read_to_string(file).expect("the function").replace("${AWS::Region}", "us-east-1")
}

/// The distribution.
pub struct Edge {
    passing: Passing,
    log: Arc<Mutex<Vec<String>>>,
}

impl Edge {
    /// Starts in front of the endpoints of MicroVMs, all of which are at one address.
    pub async fn start(store: Arc<KeyValueStore>, endpoints: String) -> Self {
        let function = Arc::new(AsyncMutex::new(Function::start()));
        let log = Arc::new(Mutex::new(Vec::new()));
        let shared = log.clone();
        let passing = Passing::start(move |request| {
            let (function, store, endpoints, log) =
                (function.clone(), store.clone(), endpoints.clone(), shared.clone());
            async move { respond(request, &function, &store, &endpoints, &log).await }
        })
        .await;
        Self { passing, log }
    }

    pub fn url(&self) -> String {
        self.passing.url.clone()
    }

    /// The hosts to which requests were sent.
    pub fn origins(&self) -> Vec<String> {
        self.log.lock().expect("the log").clone()
    }
}

fn event_of(request: &Incomings) -> Value {
    let mut headers = Map::new();
    for name in request.headers().keys() {
        let values: Vec<&str> =
            request.headers().get_all(name).iter().filter_map(|value| value.to_str().ok()).collect();
        if name != header::COOKIE {
            headers.insert(name.as_str().to_owned(), json!({"value": values.join(", ")}));
        }
    }
    let mut query = Map::new();
    for (name, value) in form_urlencoded::parse(request.uri().query().unwrap_or_default().as_bytes()) {
        query.insert(name.into_owned(), json!({"value": value}));
    }
    let request = json!({
        "method": request.method().as_str(), "uri": request.uri().path(), "querystring": query, "headers": headers, "cookies": {},
    });
    json!({"version": "1.0", "context": {"eventType": "viewer-request"}, "viewer": {"ip": "198.51.100.1"}, "request": request})
}

async fn respond(
    mut request: Incomings,
    function: &AsyncMutex<Function>,
    store: &KeyValueStore,
    endpoints: &str,
    log: &Mutex<Vec<String>>,
) -> Response {
    let call = json!({"event": event_of(&request), "store": store.at_edge()});
    let called = function.lock().await.call(&call).await;
    if called.get("error").is_some() {
        return plain(503, &format!("FunctionExecutionError: {}", called["error"]));
    }
    let result = &called["result"];
    if let Some(status) = result["statusCode"].as_u64() {
        let body = result["body"].as_str().unwrap_or_default();
        let mut response = plain(u16::try_from(status).expect("a status"), body);
        add(response.headers_mut(), &result["headers"], |value| value["value"].as_str());
        return response;
    }
    let origin = &called["origin"];
    let Some(host) = origin["domainName"].as_str() else {
        return plain(502, "The distribution's own origin does not exist");
    };
    log.lock().expect("the log").push(host.to_owned());
    let query = request.uri().query().map(|query| format!("?{query}")).unwrap_or_default();
    let uri = format!("{}{query}", result["uri"].as_str().expect("a path"));
    let Ok(uri) = uri.parse() else { return plain(400, "Bad Request") };
    *request.uri_mut() = uri;
    let kept = result["headers"].as_object().expect("headers");
    let upgrade = [header::CONNECTION, header::UPGRADE];
    let removed: Vec<HeaderName> = request
        .headers()
        .keys()
        // The function cannot change the headers of the connection.
        .filter(|name| !kept.contains_key(name.as_str()) && !upgrade.contains(name))
        .cloned()
        .collect();
    for name in removed {
        request.headers_mut().remove(name);
    }
    add(request.headers_mut(), &origin["customHeaders"], Value::as_str);
    let host = HeaderValue::from_str(origin["hostHeader"].as_str().expect("a host")).expect("a header");
    request.headers_mut().insert(header::HOST, host);
    let mut response = pass(request, endpoints).await;
    // The distribution's response headers policy.
    response.headers_mut().remove(header::SET_COOKIE);
    response
}

fn add(headers: &mut HeaderMap, given: &Value, text: impl Fn(&Value) -> Option<&str>) {
    for (name, value) in given.as_object().into_iter().flatten() {
        let value = text(value).expect("a text");
        headers.insert(name.parse::<HeaderName>().expect("a name"), value.parse().expect("a value"));
    }
}
