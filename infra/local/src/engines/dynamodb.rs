//! DynamoDB: dynoxide on a SQLite file.
//!
//! [`Database`] blocks, one operation at a time, so it has a thread of its own: a slow disk holds up no task. Requests reach the
//! thread through a channel. The end of the thread is the moment when every handle to the file is closed, which
//! dynoxide itself cannot report.

use std::fs::File;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use dynoxide::errors::DynoxideError;
use dynoxide::{Database, actions};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderName, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::EngineError;

/// How often expired items are removed. AWS promises days.
const SWEEP: Duration = Duration::from_secs(60);
/// How long to wait for another program, a backup say, that has the file locked.
const BUSY: Duration = Duration::from_secs(2);
/// The largest request. DynamoDB has the same limit.
pub(super) const MAX_REQUEST: usize = 16 * 1024 * 1024;
const TARGET: &str = "DynamoDB_20120810.";
const AMZ_JSON: &str = "application/x-amz-json-1.0";

/// A request on its way to the database's thread.
enum Message {
    Call(Call),
    Stop,
}

struct Call {
    operation: String,
    body: Bytes,
    reply: oneshot::Sender<Result<String, DynoxideError>>,
}

/// The running engine. When it is dropped, the thread answers the requests that are queued, closes the database and ends.
#[derive(Debug)]
pub(super) struct DynamoDb {
    calls: mpsc::Sender<Message>,
    closed: Option<oneshot::Receiver<()>>,
}

impl DynamoDb {
    /// Opens the database. `lock` is released once it is closed again.
    pub(super) async fn start(path: PathBuf, lock: File) -> Result<Self, EngineError> {
        let (calls, queue) = mpsc::channel();
        let (ready, is_ready) = oneshot::channel();
        let (closed, is_closed) = oneshot::channel();
        let named = path.clone();
        let failed = move |reason: String| EngineError::Database { path: named, reason };
        let database_thread = thread::Builder::new().name("dynamodb".to_owned()).spawn(move || {
            match open(&path) {
                Ok(database) => {
                    // The receiver is gone if the start was cancelled; the queue's sender is gone then, too.
                    let _cancelled = ready.send(Ok(()));
                    run(database, &queue);
                }
                Err(reason) => {
                    let _cancelled = ready.send(Err(reason));
                }
            }
            // In this order: the folder is free only now, and whoever waits for the end may open it.
            drop(lock);
            drop(closed);
        });
        match database_thread {
            Err(error) => Err(failed(error.to_string())),
            Ok(_) => match is_ready.await {
                Ok(Ok(())) => Ok(Self { calls, closed: Some(is_closed) }),
                Ok(Err(reason)) => Err(failed(reason)),
                Err(_) => Err(failed("its thread ended".to_owned())),
            },
        }
    }

    /// DynamoDB's JSON protocol, without authentication.
    pub(super) fn router(&self) -> Router {
        Router::new()
            .route("/", post(handle))
            .layer(DefaultBodyLimit::max(MAX_REQUEST))
            .with_state(Calls(self.calls.clone()))
    }

    /// Stops the engine and waits until the database is closed and its lock is released.
    pub(super) async fn shutdown(mut self) {
        let closed = self.closed.take();
        drop(self);
        if let Some(closed) = closed {
            // The sender is dropped, never used: the thread's end is the message.
            let _ended = closed.await;
        }
    }
}

impl Drop for DynamoDb {
    fn drop(&mut self) {
        // The thread may have ended by itself.
        let _ended = self.calls.send(Message::Stop);
    }
}

fn open(path: &Path) -> Result<Database, String> {
    probe(path).map_err(|error| match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
            "another program has it locked".to_owned()
        }
        Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) => {
            format!("it is damaged ({error}). Put a backup in its place, or move it away to start empty")
        }
        _ => error.to_string(),
    })?;
    let path = path.to_str().ok_or("its path is not valid UTF-8")?;
    let database = Database::new(path).map_err(|error| error.to_string())?;
    database.database_info().map_err(|error| error.to_string())?;
    Ok(database)
}

/// Checks that the file can be written and read. dynoxide would wait half a minute for a locked one.
fn probe(path: &Path) -> rusqlite::Result<()> {
    let connection = rusqlite::Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    connection.execute_batch("BEGIN IMMEDIATE; SELECT count(*) FROM sqlite_master; ROLLBACK;")
}

/// Executes calls until [`Message::Stop`], then closes the database.
#[expect(clippy::needless_pass_by_value, reason = "the database is closed when this returns")]
fn run(database: Database, queue: &mpsc::Receiver<Message>) {
    thread::scope(|scope| {
        let (stop_sweeping, stopped) = mpsc::channel::<()>();
        let sweeping = &database;
        // A sweep lets requests in between its pages, so it needs a thread beside theirs.
        let sweeper = thread::Builder::new()
            .name("dynamodb-ttl".to_owned())
            .spawn_scoped(scope, move || sweep(sweeping, &stopped));
        if let Err(error) = sweeper {
            tracing::warn!(%error, "engines.ttl_sweep_not_started");
        }
        while let Ok(Message::Call(call)) = queue.recv() {
            // The caller has given up: its timeout has passed while the call was queued.
            if call.reply.is_closed() {
                continue;
            }
            // A panic fails the request that caused it, not those behind it.
            let executed = panic::catch_unwind(AssertUnwindSafe(|| execute(&database, &call.operation, &call.body)));
            let outcome =
                executed.unwrap_or_else(|_| Err(DynoxideError::InternalServerError("the operation panicked".into())));
            // The caller may give up meanwhile.
            let _gone = call.reply.send(outcome);
        }
        drop(stop_sweeping);
    });
}

fn sweep(database: &Database, stopped: &mpsc::Receiver<()>) {
    loop {
        match database.sweep_ttl() {
            Ok(0) => {}
            Ok(removed) => tracing::debug!(removed, "engines.expired_items_removed"),
            Err(error) => tracing::warn!(%error, "engines.ttl_sweep_failed"),
        }
        if stopped.recv_timeout(SWEEP) != Err(mpsc::RecvTimeoutError::Timeout) {
            return;
        }
    }
}

#[derive(Clone)]
struct Calls(mpsc::Sender<Message>);

async fn handle(State(calls): State<Calls>, headers: HeaderMap, body: Bytes) -> Response {
    let target = headers.get("x-amz-target").and_then(|target| target.to_str().ok()).unwrap_or_default();
    let Some(operation) = target.strip_prefix(TARGET) else { return unknown(target) };
    if !is_known(operation) {
        return unknown(target);
    }
    let (reply, answered) = oneshot::channel();
    let call = Call { operation: operation.to_owned(), body, reply };
    if calls.0.send(Message::Call(call)).is_err() {
        return closed();
    }
    match answered.await {
        Ok(Ok(text)) => answer(StatusCode::OK, text),
        Ok(Err(error)) => {
            let status = StatusCode::from_u16(error.status_code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            if status.is_server_error() {
                tracing::warn!(operation, %error, "engines.dynamodb_failed");
            }
            answer(status, error.to_json())
        }
        // It was still queued when the database was closed.
        Err(_) => closed(),
    }
}

fn answer(status: StatusCode, body: String) -> Response {
    let headers = [
        (CONTENT_TYPE, AMZ_JSON.to_owned()),
        (HeaderName::from_static("x-amzn-requestid"), Uuid::new_v4().to_string()),
    ];
    (status, headers, body).into_response()
}

fn unknown(target: &str) -> Response {
    let body = json!({
        "__type": "com.amazon.coral.service#UnknownOperationException",
        "message": format!("The embedded DynamoDB does not support \"{target}\"."),
    });
    answer(StatusCode::BAD_REQUEST, body.to_string())
}

/// A status that SDKs retry.
fn closed() -> Response {
    let body = json!({
        "__type": "com.amazonaws.dynamodb.v20120810#InternalServerError",
        "message": "The embedded DynamoDB is closed.",
    });
    answer(StatusCode::SERVICE_UNAVAILABLE, body.to_string())
}

/// Declares the supported operations: the name in `X-Amz-Target`, and the method of [`Database`] with its request type.
macro_rules! operations {
    ($($name:literal => $method:ident($request:ty)),* $(,)?) => {
        fn is_known(operation: &str) -> bool {
            matches!(operation, $($name)|*)
        }

        fn execute(database: &Database, operation: &str, body: &[u8]) -> Result<String, DynoxideError> {
            match operation {
                $($name => write(&database.$method(read::<$request>(body)?)?),)*
                // `handle` has asked `is_known`.
                other => Err(DynoxideError::UnsupportedCapability(other.to_owned())),
            }
        }
    };
}

operations! {
    "BatchGetItem" => batch_get_item(actions::batch_get_item::BatchGetItemRequest),
    "BatchWriteItem" => batch_write_item(actions::batch_write_item::BatchWriteItemRequest),
    "CreateTable" => create_table(actions::create_table::CreateTableRequest),
    "DeleteItem" => delete_item(actions::delete_item::DeleteItemRequest),
    "DeleteTable" => delete_table(actions::delete_table::DeleteTableRequest),
    "DescribeTable" => describe_table(actions::describe_table::DescribeTableRequest),
    "DescribeTimeToLive" => describe_time_to_live(actions::describe_time_to_live::DescribeTimeToLiveRequest),
    "GetItem" => get_item(actions::get_item::GetItemRequest),
    "ListTables" => list_tables(actions::list_tables::ListTablesRequest),
    "PutItem" => put_item(actions::put_item::PutItemRequest),
    "Query" => query(actions::query::QueryRequest),
    "Scan" => scan(actions::scan::ScanRequest),
    "TransactGetItems" => transact_get_items(actions::transact_get_items::TransactGetItemsRequest),
    "TransactWriteItems" => transact_write_items(actions::transact_write_items::TransactWriteItemsRequest),
    "UpdateItem" => update_item(actions::update_item::UpdateItemRequest),
    "UpdateTable" => update_table(actions::update_table::UpdateTableRequest),
    "UpdateTimeToLive" => update_time_to_live(actions::update_time_to_live::UpdateTimeToLiveRequest),
}

fn write(answer: &impl Serialize) -> Result<String, DynoxideError> {
    serde_json::to_string(answer).map_err(|error| DynoxideError::InternalServerError(error.to_string()))
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, DynoxideError> {
    serde_json::from_slice(body).map_err(|error| refusal(&error.to_string()))
}

/// The error for a body that does not deserialise. dynoxide's request types report what DynamoDB would answer as the text of a
/// serde error, behind a marker; serde_json appends a position.
fn refusal(text: &str) -> DynoxideError {
    let marked = |marker| text.strip_prefix(marker);
    if let Some(text) = marked("VALIDATION:").or_else(|| marked("VALIDATION_REQUEST:")) {
        DynoxideError::ValidationException(without_position(text).to_owned())
    } else if let Some(text) = marked("VALIDATION_AS_READ:") {
        DynoxideError::ValidationException(text.to_owned())
    } else if let Some(text) = marked("SERIALIZATION:") {
        DynoxideError::SerializationException(without_position(text).to_owned())
    } else if let Some(text) = marked("SERIALIZATION_AS_READ:") {
        DynoxideError::SerializationException(text.to_owned())
    } else if ["missing field", "unknown variant", "invalid type: null", "AttributeValue"]
        .iter()
        .any(|part| text.contains(part))
    {
        DynoxideError::ValidationException(without_position(text).to_owned())
    } else {
        DynoxideError::SerializationException(without_position(text).to_owned())
    }
}

/// Without serde_json's ` at line N column N`.
fn without_position(text: &str) -> &str {
    match text.rfind(" at line ") {
        Some(end) if text[end..].contains(" column ") => &text[..end],
        _ => text,
    }
}
