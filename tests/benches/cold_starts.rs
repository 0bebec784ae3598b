//! Cold starts: `cargo bench -p tests --bench cold_starts`, after `cargo build --profile lambda --target-dir
//! target/cold-starts --workspace --exclude local --exclude tests --exclude generate --bins --examples`.
//!
//! Measures each function's binary, and for comparison a bare `lambda_http` of the same profile
//! (`infra/lambda/examples/hello.rs`), in turns: the time from the start of the process to its first poll of Lambda's
//! runtime API, the time to its first response, the memory at rest after that, and the size zipped. Embedded engines
//! and a KMS stub on this machine serve what a function reads when it starts, so the times include no network.

#![allow(clippy::expect_used, clippy::cast_precision_loss, reason = "a benchmark fails by panicking")]

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::response::Response;
use axum::routing::{get, post};
use flate2::Compression;
use flate2::write::DeflateEncoder;
use local::access::Origins;
use local::engines::{EnginePorts, Engines};
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::config::{Config, ExportConfig, Names, SandboxConfig, SealingConfig, StartConfig};
use shared::http_client::AddressPolicy;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::Notify;

#[path = "../it/support"]
#[allow(dead_code, reason = "shared with the tests")]
mod support {
    pub mod kms;
    pub mod server;
}

use support::kms::{KEY, Kms};

const ROUNDS: usize = 15;
const HELLO: &str = "hello";
/// A first request that reads the store, unlike those of the other rows: it sets up TLS.
const COUNT: &str = "conversations, a count";
const FUNCTIONS: [&str; 14] = [
    "authorizer",
    "conversations",
    COUNT,
    "download",
    "events",
    "exports",
    "sandboxes",
    "settings",
    "skills",
    "start",
    "start-tasks",
    "worker",
    "stream-start",
    "web-client",
];

#[derive(Debug, Default)]
struct Moments {
    polled: Mutex<Option<Instant>>,
    answered: Mutex<Option<Instant>>,
    done: Notify,
}

/// One cold start.
struct Start {
    to_poll: Duration,
    to_answer: Duration,
    kib: u64,
}

#[tokio::main]
async fn main() {
    let folder = TempDir::new().expect("a folder");
    let engines =
        Engines::listening(folder.path(), EnginePorts::default(), &Origins::default()).await.expect("engines");
    let aws = Aws::new(&engines.sdk_config().await);
    let mut names = Names::with_prefix("oh-");
    let queues = schema::make_all(&aws, &names, "oh-").await.expect("a schema");
    (names.job_queue_url, names.export_queue_url) = (queues.jobs, queues.exports);
    let kms = Kms::start().await;
    let config = Config {
        start: StartConfig::default(),
        sandbox: SandboxConfig::None,
        names,
        sealing: SealingConfig::Kms(KEY.to_owned()),
        single_user: false,
        live_status_budget: Duration::from_secs(1),
        sandbox_request_budget: Duration::from_secs(2),
        sandbox_idle_limit: None,
        address_policy: AddressPolicy::PublicOnly,
        export: ExportConfig::default(),
    };
    let mut environment = engines.environment();
    environment.extend(config.to_env().into_iter().map(|(name, value)| (name.to_owned(), value)));
    environment.push(("AWS_ENDPOINT_URL_KMS".to_owned(), kms.url()));
    environment.push(("AWS_LAMBDA_HTTP_IGNORE_STAGE_IN_PATH".to_owned(), "true".to_owned()));

    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/cold-starts/lambda");
    let program = |name: &str| match name {
        HELLO => target.join("examples/hello"),
        COUNT => target.join("conversations"),
        name => target.join(name),
    };
    let mut starts: HashMap<&str, Vec<Start>> = HashMap::new();
    // In turns, so that other load on the machine affects all functions alike.
    for round in 0..=ROUNDS {
        for name in std::iter::once(HELLO).chain(FUNCTIONS) {
            let start = cold_start(&program(name), name, &environment).await;
            // The first round warms the disk cache.
            if round > 0 {
                starts.entry(name).or_default().push(start);
            }
        }
    }
    let median = |name: &str, of: fn(&Start) -> f64| {
        let mut values: Vec<f64> = starts[name].iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let milliseconds = |duration: Duration| duration.as_secs_f64() * 1000.0;
    let (hello_poll, hello_answer) = (
        median(HELLO, |start| start.to_poll.as_secs_f64() * 1000.0),
        median(HELLO, |start| start.to_answer.as_secs_f64() * 1000.0),
    );
    println!(
        "| function | zipped, KiB | to the first poll, ms | x hello | to the first answer, ms | x hello | at rest, MiB |"
    );
    println!("|---|---|---|---|---|---|---|");
    for name in std::iter::once(HELLO).chain(FUNCTIONS) {
        let poll = median(name, |start| start.to_poll.as_secs_f64() * 1000.0);
        let answer = median(name, |start| start.to_answer.as_secs_f64() * 1000.0);
        let memory = median(name, |start| start.kib as f64 / 1024.0);
        println!(
            "| {name} | {} | {poll:.1} | {:.1} | {answer:.1} | {:.1} | {memory:.1} |",
            zipped(&program(name)) / 1024,
            poll / hello_poll,
            answer / hello_answer,
        );
    }
    let whole: Duration = starts.values().flatten().map(|start| start.to_answer).sum();
    println!("\n{ROUNDS} rounds, medians; {:.0} ms of starting in all", milliseconds(whole));
}

async fn cold_start(program: &Path, name: &str, environment: &[(String, String)]) -> Start {
    let moments = Arc::new(Moments::default());
    let event = event(name);
    let router = Router::new()
        .route("/2018-06-01/runtime/invocation/next", get(move |state| next(state, event)))
        .route("/2018-06-01/runtime/invocation/{id}/response", post(answered))
        .route("/2018-06-01/runtime/invocation/{id}/error", post(answered))
        .with_state(moments.clone());
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    let serving = tokio::spawn(async move { axum::serve(listener, router).await });
    let began = Instant::now();
    let mut process = Command::new(program)
        .env_clear()
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .env("AWS_LAMBDA_RUNTIME_API", address)
        .env("AWS_LAMBDA_FUNCTION_NAME", name)
        .env("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST")
        .env("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "256")
        .env("AWS_LAMBDA_LOG_GROUP_NAME", "group")
        .env("AWS_LAMBDA_LOG_STREAM_NAME", "stream")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the program was built");
    tokio::time::timeout(Duration::from_secs(30), moments.done.notified()).await.expect("an answer");
    let kib = resident(&process);
    end(&mut process);
    serving.abort();
    let since = |moment: &Mutex<Option<Instant>>| moment.lock().expect("unpoisoned").expect("it happened") - began;
    Start { to_poll: since(&moments.polled), to_answer: since(&moments.answered), kib }
}

fn end(process: &mut Child) {
    process.kill().expect("killed");
    process.wait().expect("waited for");
}

/// An event that needs no records: only the start is measured.
fn event(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/lambda");
    if name == COUNT {
        let search = fs::read_to_string(folder.join("search.json")).expect("an event");
        let mut event: Value = serde_json::from_str(&search).expect("JSON");
        event["path"] = json!("/api/v1/app-conversations/count");
        event["multiValueQueryStringParameters"] = Value::Null;
        event["queryStringParameters"] = Value::Null;
        return event.to_string();
    }
    let file = match name {
        "worker" => "schedule.json",
        "exports" => return r#"{"Records": []}"#.to_owned(),
        "authorizer" => return r#"{"methodArn": "arn", "headers": {}}"#.to_owned(),
        _ => "unknown-path.json",
    };
    fs::read_to_string(folder.join(file)).expect("an event")
}

async fn next(State(moments): State<Arc<Moments>>, event: String) -> Response {
    let now = Instant::now();
    let first = *moments.polled.lock().expect("unpoisoned").get_or_insert(now);
    if first != now {
        // Only the start is measured, so no further event follows.
        std::future::pending::<()>().await;
    }
    Response::builder()
        .header("lambda-runtime-aws-request-id", "c6af9ac6-7b61-11e6-9a41-93e8deadbeef")
        .header("lambda-runtime-deadline-ms", "4102444800000")
        .header("lambda-runtime-invoked-function-arn", "arn:aws:lambda:eu-central-1:123456789012:function:f")
        .header("lambda-runtime-trace-id", "Root=1-65a1-0123456789abcdef01234567")
        .body(event.into())
        .expect("a response")
}

async fn answered(State(moments): State<Arc<Moments>>, _answer: Bytes) -> http::StatusCode {
    *moments.answered.lock().expect("unpoisoned") = Some(Instant::now());
    moments.done.notify_one();
    http::StatusCode::ACCEPTED
}

/// Resident memory in KiB, as the kernel reports it.
fn resident(process: &Child) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id())).expect("Linux");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("a line");
    line.split_whitespace().next().and_then(|kib| kib.parse().ok()).expect("a number")
}

fn zipped(program: &Path) -> usize {
    let mut deflated = DeflateEncoder::new(Vec::new(), Compression::best());
    deflated.write_all(&fs::read(program).expect("a program")).expect("memory");
    deflated.finish().expect("memory").len()
}
