//! A proxy to AWS in which calls fail again and again, as they do under load: throttled calls, colliding transactions, batches
//! that are done in part, and responses that are lost after the call took effect.
//!
//! Which calls fail depends on a seed and on the number of the call alone.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use axum::response::Response;
use http::StatusCode;
use serde_json::{Value, json};

use super::fault_proxy::forward;
use super::lagging_indexes::random;
use super::server::{Cut, Request, Server, raw};

const DYNAMODB: &str = "com.amazonaws.dynamodb.v20120810";

#[derive(Debug)]
struct State {
    seed: u64,
    /// The share of calls that are throttled, and the share that lose their response.
    throttled: f64,
    lost: f64,
    calls: AtomicU64,
    /// How often each fault happened.
    faults: Mutex<BTreeMap<String, usize>>,
    http: reqwest::Client,
}

/// The proxy. Clones share their state.
#[derive(Clone, Debug)]
pub struct RecurringFaults(Arc<State>);

impl RecurringFaults {
    pub fn new(seed: u64, throttled: f64, lost: f64) -> Self {
        let (calls, faults, http) = (AtomicU64::new(0), Mutex::default(), reqwest::Client::new());
        Self(Arc::new(State { seed, throttled, lost, calls, faults, http }))
    }

    /// Starts a proxy to DynamoDB, S3 or SQS.
    pub async fn to(&self, upstream: &str) -> Server {
        let (proxy, upstream) = (self.clone(), upstream.to_owned());
        Server::start(move |request| {
            let (proxy, upstream) = (proxy.clone(), upstream.clone());
            async move { proxy.pass(request, &upstream).await }
        })
        .await
    }

    /// How often each fault happened so far.
    pub fn faults(&self) -> BTreeMap<String, usize> {
        self.0.faults.lock().expect("faults").clone()
    }

    fn count(&self, fault: &str) {
        *self.0.faults.lock().expect("faults").entry(fault.to_owned()).or_default() += 1;
    }

    async fn pass(&self, request: Request, upstream: &str) -> Result<Response, Cut> {
        let state = &*self.0;
        let number = state.calls.fetch_add(1, Ordering::SeqCst);
        let (chance, kind) = (random(state.seed, &("fault", number)), random(state.seed, &("kind", number)));
        if chance < state.throttled {
            let (name, response) = throttled(&request, kind);
            self.count(name);
            return Ok(response);
        }
        let response = forward(&state.http, request.clone(), upstream).await?;
        // The client does not retry what was refused, so losing it proves nothing.
        if chance >= state.throttled + state.lost || !response.status().is_success() {
            return Ok(response);
        }
        self.count(&format!("lost {}", service(&request)));
        if kind < 0.5 { Err(Cut) } else { Ok(internal_error(&request)) }
    }
}

fn service(request: &Request) -> &'static str {
    match request.header("x-amz-target") {
        Some(target) if target.starts_with("AmazonSQS") => "SQS",
        Some(_) => "DynamoDB",
        None => "S3",
    }
}

/// The response of a call that has no effect because of the load. `kind` picks one of those that are possible.
fn throttled(request: &Request, kind: f64) -> (&'static str, Response) {
    let target = request.header("x-amz-target").unwrap_or_default();
    let operation = target.rsplit('.').next().unwrap_or_default();
    let body = request.json();
    let is_first = kind < 0.5;
    match (service(request), operation) {
        ("S3", _) => {
            let body = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>";
            ("SlowDown", raw(StatusCode::SERVICE_UNAVAILABLE, "application/xml", body))
        }
        ("SQS", _) => ("RequestThrottled", error("com.amazonaws.sqs", "RequestThrottled", None)),
        (_, "TransactWriteItems") => {
            let items = body["TransactItems"].as_array().map_or(0, Vec::len);
            let code = if is_first { "TransactionConflict" } else { "ThrottlingError" };
            let reasons = (0..items).map(|index| json!({"Code": if index == 0 { code } else { "None" }}));
            (code, error(DYNAMODB, "TransactionCanceledException", Some(reasons.collect())))
        }
        (_, "BatchWriteItem") if is_first => {
            let left = json!({"UnprocessedItems": body["RequestItems"]});
            ("UnprocessedItems", raw(StatusCode::OK, "application/x-amz-json-1.0", left.to_string()))
        }
        (_, "BatchGetItem") if is_first => {
            let left = json!({"Responses": {}, "UnprocessedKeys": body["RequestItems"]});
            ("UnprocessedKeys", raw(StatusCode::OK, "application/x-amz-json-1.0", left.to_string()))
        }
        (_, "PutItem" | "UpdateItem" | "DeleteItem") if is_first => {
            ("TransactionConflictException", error(DYNAMODB, "TransactionConflictException", None))
        }
        _ if kind < 0.75 => {
            ("ThrottlingException", error("com.amazon.coral.availability", "ThrottlingException", None))
        }
        _ => {
            let name = "ProvisionedThroughputExceededException";
            (name, error(DYNAMODB, name, None))
        }
    }
}

fn error(namespace: &str, name: &str, reasons: Option<Vec<Value>>) -> Response {
    let mut body = json!({"__type": format!("{namespace}#{name}"), "message": "by a test", "Message": "by a test"});
    if let Some(reasons) = reasons {
        body["CancellationReasons"] = reasons.into();
    }
    raw(StatusCode::BAD_REQUEST, "application/x-amz-json-1.0", body.to_string())
}

fn internal_error(request: &Request) -> Response {
    let status = StatusCode::INTERNAL_SERVER_ERROR;
    match service(request) {
        "S3" => raw(status, "application/xml", "<Error><Code>InternalError</Code><Message>by a test</Message></Error>"),
        "SQS" => raw(status, "application/x-amz-json-1.0", r#"{"__type":"com.amazonaws.sqs#InternalError"}"#),
        _ => {
            let body = json!({"__type": format!("{DYNAMODB}#InternalServerError"), "message": "by a test"});
            raw(status, "application/x-amz-json-1.0", body.to_string())
        }
    }
}
