//! The instructions that a request costs its function, without the network and AWS: each route's router on a stub store.
//!
//! ```sh
//! cargo bench -p tests --bench instructions                        # a table; needs valgrind
//! cargo bench -p tests --bench instructions -- search              # one route
//! valgrind --tool=callgrind PROGRAM replay FOLDER search 100       # a profile; the table prints the program and the folder
//! ```
//!
//! First it sends each request to routers on the embedded engines, and records the responses of AWS. Then it runs itself under callgrind, once
//! with a few requests and once with many, on a stub that repeats the recorded responses. The difference, divided by the number of requests, is
//! the table: the SDK with its signatures is in it, sockets, TLS and the engines are not.

#![allow(clippy::expect_used, clippy::disallowed_methods, reason = "a benchmark fails by panicking")]

#[path = "../it/support"]
#[allow(dead_code, reason = "shared with the tests")]
mod support {
    pub mod account;
    pub mod engines;
    pub mod seed;
}

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_dynamodb::config::Credentials;
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpClient, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::body::SdkBody;
use axum::Router;
use axum::body::Body;
use http::{Request, header};
use http_body_util::BodyExt as _;
use secrecy::SecretString;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::config::{Config, ExportConfig, Names, SandboxConfig, SealingConfig, StartConfig};
use shared::http::caller::Caller;
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use support::account;
use support::engines::Engines;
use tempfile::TempDir;
use tower::ServiceExt as _;
use uuid::Uuid;

const PREFIX: &str = "instructions-";
const CONVERSATIONS: u64 = 200;
const SESSION_KEY: &str = "key-of-the-sandbox";
/// The numbers of requests of the two runs.
const FEW: u64 = 10;
const MANY: u64 = 60;

/// The requests, by name.
const ROUTES: [&str; 8] = ["search", "search-100", "count", "batch", "task", "start", "webhook-1", "webhook-10"];

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.first().map(String::as_str) {
        Some("replay") => {
            let [_, folder, route, count] = &arguments[..] else { panic!("replay FOLDER ROUTE COUNT") };
            replay(Path::new(folder), route, count.parse().expect("a number")).await;
        }
        only => {
            let folder = TempDir::new().expect("a folder").keep();
            let routes: Vec<&str> = ROUTES.into_iter().filter(|route| only.is_none_or(|only| only == *route)).collect();
            for route in &routes {
                record(&folder, route).await;
            }
            let program = std::env::current_exe().expect("this program");
            println!("program {}\nfolder {}\n", program.display(), folder.display());
            println!("| request | calls to AWS | instructions |\n|---|---|---|");
            for route in routes {
                let few = instructions(&program, &folder, route, FEW);
                let many = instructions(&program, &folder, route, MANY);
                let each = (many - few) / (MANY - FEW);
                println!(
                    "| {route} | {} | {}.{:02} million |",
                    calls(&folder, route),
                    each / 1_000_000,
                    each % 1_000_000 / 10_000
                );
            }
        }
    }
}

/// The instructions of a run under callgrind.
fn instructions(program: &Path, folder: &Path, route: &str, count: u64) -> u64 {
    let ran = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(program)
        .arg("replay")
        .arg(folder)
        .args([route, &count.to_string()])
        .stdout(Stdio::null())
        .output()
        .expect("valgrind is installed");
    let text = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "{text}");
    let collected = text.lines().find_map(|line| line.split_once("Collected : ")).expect("the number of instructions");
    collected.1.trim().parse().expect("a number")
}

/// The request of a route; `number` makes what it adds unique.
fn request(user: &UserId, route: &str, number: u64) -> Request<Body> {
    let get = |target: String| Request::get(target).body(Body::empty()).expect("a request");
    let post = |target: String, body: &Value| {
        Request::post(target)
            .header(header::CONTENT_TYPE, "application/json")
            .header("X-Session-API-Key", SESSION_KEY)
            .body(Body::from(body.to_string()))
            .expect("a request")
    };
    let conversations = "/api/v1/app-conversations";
    let mut request = match route {
        "search" => get(format!("{conversations}/search?limit=20")),
        "search-100" => get(format!("{conversations}/search?limit=100")),
        "count" => get(format!("{conversations}/count")),
        "batch" => {
            let ids = (0..10).map(|number| format!("ids={}", account::conversation_id(number * 7)));
            get(format!("{conversations}?{}", ids.collect::<Vec<_>>().join("&")))
        }
        "task" => get(format!("{conversations}/start-tasks?ids={}", Uuid::nil())),
        "start" => {
            let message = json!({"role": "user", "content": [{"type": "text", "text": "x".repeat(500)}]});
            post(conversations.to_owned(), &json!({"initial_message": message, "title": "A title"}))
        }
        "webhook-1" | "webhook-10" => {
            let size = if route == "webhook-1" { 1 } else { 10 };
            let events: Vec<Value> = (number * size..(number + 1) * size).map(event).collect();
            post(format!("/api/v1/webhooks/events/{}", account::conversation_id(0).simple()), &events.into())
        }
        _ => panic!("{route}"),
    };
    request.extensions_mut().insert(Caller(user.clone()));
    request
}

fn event(number: u64) -> Value {
    let (hours, minutes, seconds) = (number / 3600, number / 60 % 60, number % 60);
    json!({
        "id": Uuid::from_u64_pair(1, number), "timestamp": format!("2025-01-01T{hours:02}:{minutes:02}:{seconds:02}"),
        "source": "agent", "kind": "MessageEvent",
        "llm_message": {"role": "assistant", "content": [{"type": "text", "text": "x".repeat(1900)}]},
    })
}

/// Sends each request twice, and records the calls of the second one: the first one may fill caches of the process.
async fn record(folder: &Path, route: &str) {
    let data = TempDir::new().expect("a folder");
    let engines = Engines::start(data.path()).await;
    let sdk = engines.sdk_config().await;
    let calls = Arc::default();
    let recorder = Recorder { inner: sdk.http_client().expect("a client"), calls: Arc::clone(&calls) };
    let sdk = sdk.into_builder().http_client(SharedHttpClient::new(recorder)).build();
    let aws = Aws::new(&sdk);
    let mut names = Names { bucket: engines.names(PREFIX).bucket, ..Names::with_prefix(PREFIX) };
    let queues = schema::make_all(&aws, &names, PREFIX).await.expect("a schema");
    (names.job_queue_url, names.export_queue_url) = (queues.jobs, queues.exports);
    let user = UserId::new("user-one");
    let sealer = Sealer::from_file(&folder.join("sealing-key")).expect("a key");
    let stores = Stores::new(&names, &aws, &sealer);
    let mut lines: Vec<Value> = (0..CONVERSATIONS).map(account::conversation).collect();
    lines[0]["data"]["sandbox_id"] = "sandbox".into();
    support::seed::load(&stores, &user, lines).await;
    let sandboxes = stores.sandboxes();
    let record =
        sandboxes.new_record(&user, "sandbox", "spec", &SecretString::from(SESSION_KEY)).await.expect("a record");
    sandboxes.create(record, None).await.expect("stored");

    let router = router(folder, names.clone(), &aws, &sealer);
    let mut last = Vec::new();
    for number in 0..2 {
        *calls.lock().expect("the calls") = Vec::new();
        send(&router, request(&user, route, number)).await;
        last = std::mem::take(&mut *calls.lock().expect("the calls"));
    }
    let file = Recording { names: [names.bucket, names.job_queue_url, names.export_queue_url], calls: last };
    fs::write(folder.join(route), serde_json::to_vec(&file).expect("JSON")).expect("written");
    drop((router, stores, sandboxes));
    engines.shutdown().await;
}

/// Sends a request many times to routers whose calls to AWS have the recorded responses.
async fn replay(folder: &Path, route: &str, count: u64) {
    let Recording { names: [bucket, job_queue_url, export_queue_url], calls } = recording(folder, route);
    let names = Names { bucket, job_queue_url, export_queue_url, ..Names::with_prefix(PREFIX) };
    let aws = Aws::new(&stub_config(calls));
    let sealer = Sealer::from_file(&folder.join("sealing-key")).expect("a key");
    let router = router(folder, names, &aws, &sealer);
    let user = UserId::new("user-one");
    for number in 0..count {
        send(&router, request(&user, route, number)).await;
    }
}

async fn send(router: &Router, request: Request<Body>) {
    let response = router.clone().oneshot(request).await.expect("a response");
    let status = response.status();
    let body = response.into_body().collect().await.expect("a body").to_bytes();
    assert!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&body));
}

fn router(folder: &Path, names: Names, aws: &Aws, sealer: &Sealer) -> Router {
    let config = Config {
        start: StartConfig::default(),
        sandbox: SandboxConfig::None,
        names,
        sealing: SealingConfig::File(folder.join("sealing-key")),
        single_user: false,
        live_status_budget: std::time::Duration::from_secs(1),
        sandbox_request_budget: std::time::Duration::from_secs(2),
        sandbox_idle_limit: None,
        address_policy: shared::http_client::AddressPolicy::Any,
        export: ExportConfig::default(),
    };
    local::server::functions(&config, aws, sealer).merge(local::server::functions_without_user(&config, aws, sealer))
}

#[derive(Serialize, Deserialize)]
struct Recording {
    /// The bucket and the URLs of the queues.
    names: [String; 3],
    calls: Vec<Call>,
}

/// A call to AWS and its response.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Call {
    /// The operation, or the method and the path.
    what: String,
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

fn recording(folder: &Path, route: &str) -> Recording {
    serde_json::from_slice(&fs::read(folder.join(route)).expect("a recording")).expect("JSON")
}

/// The calls of a route by operation.
fn calls(folder: &Path, route: &str) -> String {
    let mut counts = BTreeMap::<String, usize>::new();
    for call in recording(folder, route).calls {
        *counts.entry(call.what.rsplit('.').next().unwrap_or_default().to_owned()).or_default() += 1;
    }
    counts.iter().map(|(what, count)| format!("{count} {what}")).collect::<Vec<_>>().join(", ")
}

fn what(request: &HttpRequest) -> String {
    let target = request.headers().get("x-amz-target").map(str::to_owned);
    target.unwrap_or_else(|| format!("{} {}", request.method(), request.uri().split('?').next().unwrap_or_default()))
}

/// Records the calls that pass.
#[derive(Clone, Debug)]
struct Recorder {
    inner: SharedHttpClient,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl HttpClient for Recorder {
    fn http_connector(&self, settings: &HttpConnectorSettings, components: &RuntimeComponents) -> SharedHttpConnector {
        let inner = self.inner.http_connector(settings, components);
        SharedHttpConnector::new(RecordingConnector { inner, calls: Arc::clone(&self.calls) })
    }
}

#[derive(Debug)]
struct RecordingConnector {
    inner: SharedHttpConnector,
    calls: Arc<Mutex<Vec<Call>>>,
}

impl HttpConnector for RecordingConnector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let (what, calls) = (what(&request), Arc::clone(&self.calls));
        let response = self.inner.call(request);
        HttpConnectorFuture::new(async move {
            let mut response = response.await?;
            let headers = response.headers().iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
            let body = std::mem::replace(response.body_mut(), SdkBody::empty());
            let body = body.collect().await.map_err(|error| ConnectorError::other(error, None))?.to_bytes();
            let text = String::from_utf8(body.to_vec()).expect("text");
            *response.body_mut() = SdkBody::from(body);
            let call = Call { what, status: response.status().as_u16(), headers, body: text };
            calls.lock().expect("the calls").push(call);
            Ok(response)
        })
    }
}

fn stub_config(calls: Vec<Call>) -> SdkConfig {
    let mut responses = HashMap::<String, Responses>::new();
    for call in calls {
        responses.entry(call.what.clone()).or_default().calls.push(call);
    }
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::from_static(local::engines::REGION))
        .credentials_provider(aws_types::sdk_config::SharedCredentialsProvider::new(Credentials::new(
            "key", "secret", None, None, "stub",
        )))
        .endpoint_url("http://stub.invalid")
        .http_client(SharedHttpClient::new(Stub(Arc::new(Mutex::new(responses)))))
        .build()
}

/// The responses to an operation, which are repeated in their order.
#[derive(Debug, Default)]
struct Responses {
    calls: Vec<Call>,
    next: usize,
}

/// Responds to each call as to the recorded one.
#[derive(Clone, Debug)]
struct Stub(Arc<Mutex<HashMap<String, Responses>>>);

impl HttpClient for Stub {
    fn http_connector(&self, _: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
        SharedHttpConnector::new(self.clone())
    }
}

impl HttpConnector for Stub {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let what = what(&request);
        let mut responses = self.0.lock().expect("the responses");
        let responses = responses.get_mut(&what).unwrap_or_else(|| panic!("{what} was not recorded"));
        let call = responses.calls[responses.next % responses.calls.len()].clone();
        responses.next += 1;
        let mut response = HttpResponse::new(call.status.try_into().expect("a status"), SdkBody::from(call.body));
        for (name, value) in call.headers {
            response.headers_mut().append(name, value);
        }
        HttpConnectorFuture::ready(Ok(response))
    }
}
