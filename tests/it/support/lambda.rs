//! Lambda's runtime API, which a function's process polls for events and posts responses to, whole or chunk by chunk.
//! It runs the binaries that `cargo build` builds.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path as InPath, State};
use axum::response::Response;
use axum::routing::{get, post};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::StreamExt as _;
use http::{HeaderMap, StatusCode};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::{Mutex as AsyncMutex, mpsc};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use uuid::Uuid;

/// The longest time that a response may take on a busy machine.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// Builds the functions' binaries once and returns their folder.
fn programs() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let built = Command::new(env!("CARGO"))
            .args(["build", "--workspace", "--bins", "--locked"])
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .output()
            .expect("cargo runs");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        // …/debug/deps/it-…
        let this = std::env::current_exe().expect("this program");
        this.ancestors().nth(2).expect("a target folder").to_owned()
    })
}

/// A part of a response.
#[derive(Debug, PartialEq)]
pub enum Part {
    /// Bytes, in the chunks in which they arrived.
    Chunk(Bytes),
    /// The response is complete.
    End,
    /// The process aborted the response.
    Cut,
    /// The process reported an error instead of a response.
    Error(Value),
}

#[derive(Debug)]
struct Shared {
    events: mpsc::UnboundedSender<(String, Value)>,
    waiting: AsyncMutex<mpsc::UnboundedReceiver<(String, Value)>>,
    answers: Mutex<HashMap<String, mpsc::UnboundedSender<Part>>>,
    /// Whether each response was a stream.
    streamed: Mutex<HashMap<String, bool>>,
}

/// A running function.
#[derive(Debug)]
pub struct Function {
    shared: Arc<Shared>,
    process: Child,
    log: PathBuf,
    serving: AbortHandle,
}

impl Function {
    /// Starts the binary with this name and environment; the log goes to a file in the folder.
    pub async fn start(name: &str, folder: &Path, environment: &[(String, String)]) -> Self {
        let programs = tokio::task::spawn_blocking(programs).await.expect("programs");
        let (events, waiting) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared {
            events,
            waiting: AsyncMutex::new(waiting),
            answers: Mutex::default(),
            streamed: Mutex::default(),
        });
        let router = Router::new()
            .route("/2018-06-01/runtime/invocation/next", get(next))
            .route("/2018-06-01/runtime/invocation/{id}/response", post(respond))
            .route("/2018-06-01/runtime/invocation/{id}/error", post(fail))
            .with_state(shared.clone());
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let serving = tokio::spawn(async move { axum::serve(listener, router).await }).abort_handle();
        let log = folder.join(format!("{name}.log"));
        let process = Command::new(programs.join(name))
            .env_clear()
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .env("AWS_LAMBDA_RUNTIME_API", address)
            .env("AWS_LAMBDA_FUNCTION_NAME", name)
            .env("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST")
            .env("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "256")
            .env("AWS_LAMBDA_LOG_GROUP_NAME", "group")
            .env("AWS_LAMBDA_LOG_STREAM_NAME", "stream")
            .env("AWS_LAMBDA_HTTP_IGNORE_STAGE_IN_PATH", "true")
            .stdout(File::create(folder.join(format!("{name}.metrics"))).expect("a file"))
            .stderr(File::create(&log).expect("a log"))
            .spawn()
            .expect("the function starts");
        Self { shared, process, log, serving }
    }

    /// Sends an event. Returns its id, and the parts of the response as they arrive.
    pub fn send(&self, event: Value) -> (String, mpsc::UnboundedReceiver<Part>) {
        let id = Uuid::new_v4().to_string();
        let (sender, parts) = mpsc::unbounded_channel();
        self.shared.answers.lock().expect("unpoisoned").insert(id.clone(), sender);
        self.shared.events.send((id.clone(), event)).expect("the runtime API runs");
        (id, parts)
    }

    /// Sends an event and returns the response as JSON. A streamed response is converted to the form of a buffered one.
    pub async fn invoke(&self, event: Value) -> Value {
        self.invoke_sized(event).await.0
    }

    /// As [`Self::invoke`], with the size of the response in bytes.
    pub async fn invoke_sized(&self, event: Value) -> (Value, usize) {
        let (id, mut parts) = self.send(event);
        let mut whole = Vec::new();
        loop {
            let part =
                timeout(TIME_LIMIT, parts.recv()).await.unwrap_or_else(|_| panic!("no response: {}", self.logged()));
            match part.expect("the runtime API runs") {
                Part::Chunk(bytes) => whole.extend_from_slice(&bytes),
                Part::End if self.was_streamed(&id) => return (Streamed::read(&whole).as_whole(), whole.len()),
                Part::End => return (serde_json::from_slice(&whole).expect("JSON"), whole.len()),
                Part::Cut => panic!("the response was aborted: {}", self.logged()),
                Part::Error(error) => panic!("{error}"),
            }
        }
    }

    /// Sends an event and returns the error that the function reports.
    pub async fn fail(&self, event: Value) -> Value {
        let (_, mut parts) = self.send(event);
        let part = timeout(TIME_LIMIT, parts.recv()).await.unwrap_or_else(|_| panic!("no response: {}", self.logged()));
        match part.expect("the runtime API runs") {
            Part::Error(error) => error,
            Part::Chunk(_) | Part::End | Part::Cut => panic!("the function did not fail"),
        }
    }

    /// Whether the response with this id was a stream.
    pub fn was_streamed(&self, id: &str) -> bool {
        self.shared.streamed.lock().expect("unpoisoned").get(id).copied().unwrap_or_default()
    }

    /// The lines that the function has logged.
    pub fn lines(&self) -> Vec<Value> {
        self.logged().lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// The metrics documents that the function has written.
    pub fn measured(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.log.with_extension("metrics")).expect("a file");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }

    /// The peak memory of the process so far, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).expect("the process runs");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a line");
        peak.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024
    }

    /// What the function has logged.
    pub fn logged(&self) -> String {
        fs::read_to_string(&self.log).expect("a log")
    }
}

/// A streamed response, or its beginning.
#[derive(Debug)]
pub struct Streamed {
    /// Status and headers.
    pub prelude: Value,
    pub body: Vec<u8>,
}

impl Streamed {
    /// Parses a streamed response: eight NULs separate prelude and body.
    pub fn read(bytes: &[u8]) -> Self {
        let end = bytes.windows(8).position(|eight| eight == [0; 8]).expect("a separator");
        // API Gateway searches no further for the separator.
        assert!(end < 16 * 1024, "{end}");
        Self { prelude: serde_json::from_slice(&bytes[..end]).expect("JSON"), body: bytes[end + 8..].to_vec() }
    }

    fn as_whole(&self) -> Value {
        let headers = self.prelude["headers"].as_object().expect("headers").iter();
        let headers: serde_json::Map<String, Value> =
            headers.map(|(name, value)| (name.clone(), Value::Array(vec![value.clone()]))).collect();
        let (body, in_base64) = match std::str::from_utf8(&self.body) {
            Ok(text) => (text.to_owned(), false),
            Err(_) => (BASE64.encode(&self.body), true),
        };
        serde_json::json!({
            "statusCode": self.prelude["statusCode"], "multiValueHeaders": headers, "body": body,
            "isBase64Encoded": in_base64,
        })
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        self.serving.abort();
        // The process may have ended by itself.
        let _gone = self.process.kill();
        let _waited = self.process.wait();
    }
}

async fn next(State(shared): State<Arc<Shared>>) -> Response {
    let (id, event) = shared.waiting.lock().await.recv().await.expect("the function's handle exists");
    // Of a request it is the trace that API Gateway has passed.
    let trace = event["headers"]["X-Amzn-Trace-Id"].as_str().unwrap_or("Root=1-65a1b2c3-0123456789abcdef01234567");
    Response::builder()
        .header("lambda-runtime-aws-request-id", id)
        .header("lambda-runtime-deadline-ms", "4102444800000")
        .header("lambda-runtime-invoked-function-arn", "arn:aws:lambda:eu-central-1:123456789012:function:f")
        .header("lambda-runtime-trace-id", trace)
        .header("content-type", "application/json")
        .body(Body::from(event.to_string()))
        .expect("a response")
}

async fn respond(
    State(shared): State<Arc<Shared>>,
    InPath(id): InPath<String>,
    headers: HeaderMap,
    body: Body,
) -> StatusCode {
    let mode = headers.get("lambda-runtime-function-response-mode").and_then(|mode| mode.to_str().ok());
    shared.streamed.lock().expect("unpoisoned").insert(id.clone(), mode == Some("streaming"));
    let answer = shared.answers.lock().expect("unpoisoned").remove(&id).expect("a known id");
    let mut chunks = body.into_data_stream();
    while let Some(chunk) = chunks.next().await {
        let part = chunk.map_or(Part::Cut, Part::Chunk);
        let is_cut = part == Part::Cut;
        // The test may have stopped reading already.
        let _gone = answer.send(part);
        if is_cut {
            return StatusCode::BAD_REQUEST;
        }
    }
    let _gone = answer.send(Part::End);
    StatusCode::ACCEPTED
}

async fn fail(State(shared): State<Arc<Shared>>, InPath(id): InPath<String>, body: Bytes) -> StatusCode {
    let answer = shared.answers.lock().expect("unpoisoned").remove(&id).expect("a known id");
    let _gone = answer.send(Part::Error(serde_json::from_slice(&body).unwrap_or_default()));
    StatusCode::ACCEPTED
}
