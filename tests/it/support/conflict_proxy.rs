//! A proxy between an SDK and DynamoDB that lets writes of the same item conflict, as DynamoDB does. The embedded engine executes one
//! request after the other, so writes never meet there.

use std::collections::HashSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::response::Response;
use http::StatusCode;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::fault_proxy::forward;
use super::server::{Cut, Request, Server, raw};

/// How long a transaction is in progress.
const TRANSACTION: Duration = Duration::from_millis(10);

#[derive(Debug, Default)]
struct State {
    /// The items of transactions in progress.
    written: Mutex<HashSet<String>>,
    conflicts: AtomicUsize,
    http: reqwest::Client,
}

/// Clones share their state.
#[derive(Clone, Debug, Default)]
pub struct ConflictProxy(Arc<State>);

impl ConflictProxy {
    /// Starts a proxy to DynamoDB.
    pub async fn to(&self, upstream: &str) -> Server {
        let (proxy, upstream) = (self.clone(), upstream.to_owned());
        Server::start(move |request| {
            let (proxy, upstream) = (proxy.clone(), upstream.clone());
            async move { proxy.pass(request, &upstream).await }
        })
        .await
    }

    /// The number of requests that were refused because of a transaction in progress.
    pub fn conflicts(&self) -> usize {
        self.0.conflicts.load(Ordering::SeqCst)
    }

    async fn pass(&self, request: Request, upstream: &str) -> Result<Response, Cut> {
        let state = &self.0;
        let target = request.header("x-amz-target").unwrap_or_default();
        let operation = target.rsplit('.').next().unwrap_or(target).to_owned();
        let body = request.json();
        let items: Vec<String> = match operation.as_str() {
            "TransactWriteItems" => {
                let writes = body["TransactItems"].as_array().cloned().unwrap_or_default();
                writes
                    .iter()
                    .flat_map(|write| write.as_object().into_iter().flat_map(|write| write.values()))
                    .map(item)
                    .collect()
            }
            "PutItem" | "UpdateItem" | "DeleteItem" => vec![item(&body)],
            _ => return forward(&state.http, request, upstream).await,
        };
        let is_transaction = operation == "TransactWriteItems";
        let reasons: Vec<Value> = {
            let mut written = state.written.lock().expect("items");
            let reason = |item: &String| if written.contains(item) { "TransactionConflict" } else { "None" };
            let reasons: Vec<Value> = items.iter().map(|item| json!({"Code": reason(item)})).collect();
            let is_free = items.iter().all(|item| !written.contains(item));
            if is_free && is_transaction {
                written.extend(items.iter().cloned());
            }
            if is_free { Vec::new() } else { reasons }
        };
        if !reasons.is_empty() {
            state.conflicts.fetch_add(1, Ordering::SeqCst);
            return Ok(refusal(is_transaction, &reasons));
        }
        if !is_transaction {
            return forward(&state.http, request, upstream).await;
        }
        sleep(TRANSACTION).await;
        let response = forward(&state.http, request, upstream).await;
        state.written.lock().expect("items").retain(|item| !items.contains(item));
        response
    }
}

fn refusal(is_transaction: bool, reasons: &[Value]) -> Response {
    let name = if is_transaction { "TransactionCanceledException" } else { "TransactionConflictException" };
    let mut body =
        json!({"__type": format!("com.amazonaws.dynamodb.v20120810#{name}"), "Message": "a conflict of a test"});
    if is_transaction {
        body["CancellationReasons"] = json!(reasons);
    }
    raw(StatusCode::BAD_REQUEST, "application/x-amz-json-1.0", body.to_string())
}

/// The item that a write is about.
fn item(write: &Value) -> String {
    let key = |keys: &Value| {
        let sort_key = ["id", "kind"].map(|name| keys[name]["S"].as_str().unwrap_or_default().to_owned());
        format!("{} {} {}", write["TableName"], keys["user"], sort_key.concat())
    };
    if write["Key"].is_object() { key(&write["Key"]) } else { key(&write["Item"]) }
}
