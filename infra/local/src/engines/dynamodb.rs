//! DynamoDB: dynoxide on a SQLite file.
//!
//! [`Database`] blocks and executes one operation at a time, so it runs in its own thread, and a slow disk blocks no task. Requests
//! reach the thread through a channel. When the thread ends, every handle to the file is closed; dynoxide itself cannot report that.

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
use serde_json::{Value, json};
use tokio::sync::oneshot;
use uuid::Uuid;

use super::EngineError;

/// The interval at which expired items are removed. AWS removes them within days.
const TTL_SWEEP_INTERVAL: Duration = Duration::from_secs(60);
/// How long to wait for another program, such as a backup, that has locked the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(2);
/// The maximum size of a request, which is DynamoDB's.
pub(super) const MAX_REQUEST: usize = 16 * 1024 * 1024;
const TARGET: &str = "DynamoDB_20120810.";
const AMZ_JSON: &str = "application/x-amz-json-1.0";

/// A message to the database's thread.
enum Message {
    Call(Call),
    Stop,
}

struct Call {
    operation: String,
    body: Bytes,
    reply: oneshot::Sender<Result<String, DynoxideError>>,
}

/// The running engine. When it is dropped, the thread executes the queued requests, closes the database and ends.
#[derive(Debug)]
pub(super) struct DynamoDb {
    calls: mpsc::Sender<Message>,
    closed: Option<oneshot::Receiver<()>>,
}

impl DynamoDb {
    /// Opens the database. `lock` is released after the database is closed.
    pub(super) async fn start(path: PathBuf, lock: File) -> Result<Self, EngineError> {
        let (calls, queue) = mpsc::channel();
        let (ready, is_ready) = oneshot::channel();
        let (closed, is_closed) = oneshot::channel();
        let named = path.clone();
        let failed = move |reason: String| EngineError::Database { path: named, reason };
        let database_thread = thread::Builder::new().name("dynamodb".to_owned()).spawn(move || {
            match open(&path) {
                Ok(database) => {
                    // The receiver is gone if the start was cancelled. The sender of the queue is then gone as well.
                    let _cancelled = ready.send(Ok(()));
                    run(database, &queue);
                }
                Err(reason) => {
                    let _cancelled = ready.send(Err(reason));
                }
            }
            // In this order: a caller that waits for `closed` may open the folder at once, so the lock has to be released before.
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
            // The sender is dropped when the thread ends, and never sends a value.
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

/// DynamoDB in memory, without a thread and without a file. Each operation blocks its caller. The simulation compares its model of
/// DynamoDB with it.
pub struct InMemoryDynamoDb(Database);

impl InMemoryDynamoDb {
    /// Creates a database without tables.
    ///
    /// # Errors
    /// When SQLite cannot be set up.
    pub fn new() -> Result<Self, EngineError> {
        let failed =
            |error: DynoxideError| EngineError::Database { path: PathBuf::from(":memory:"), reason: error.to_string() };
        Database::memory().map(Self).map_err(failed)
    }

    /// Executes an operation of DynamoDB's JSON protocol, and returns the body of its response.
    ///
    /// # Errors
    /// The status and the body of an error response.
    pub fn execute(&self, operation: &str, body: &Value) -> Result<Value, (u16, String)> {
        execute_value(&self.0, operation, body).map_err(|error| (error.status_code(), error.to_json()))
    }
}

fn open(path: &Path) -> Result<Database, String> {
    probe(path).map_err(|error| open_failure(&error))?;
    let path = path.to_str().ok_or("its path is not valid UTF-8")?;
    let database = Database::new(path).map_err(|error| error.to_string())?;
    database.database_info().map_err(|error| error.to_string())?;
    Ok(database)
}

/// The reason why a database cannot be opened, as part of a sentence.
pub(crate) fn open_failure(error: &rusqlite::Error) -> String {
    match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
            "another program has it locked".to_owned()
        }
        Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) => {
            format!(
                "it is damaged ({error}). Replace it with a backup, or move it to another place to start with an empty database"
            )
        }
        _ => error.to_string(),
    }
}

/// Checks that the file can be written and read. dynoxide would wait half a minute for a locked file.
fn probe(path: &Path) -> rusqlite::Result<()> {
    let connection = rusqlite::Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.execute_batch("BEGIN IMMEDIATE; SELECT count(*) FROM sqlite_master; ROLLBACK;")
}

/// Executes calls until [`Message::Stop`], then closes the database.
#[expect(clippy::needless_pass_by_value, reason = "the database is closed when this returns")]
fn run(database: Database, queue: &mpsc::Receiver<Message>) {
    thread::scope(|scope| {
        let (stop_sweeping, stopped) = mpsc::channel::<()>();
        let sweeping = &database;
        // The sweep allows requests between its pages, so it needs another thread than they do.
        let sweeper = thread::Builder::new()
            .name("dynamodb-ttl".to_owned())
            .spawn_scoped(scope, move || sweep(sweeping, &stopped));
        if let Err(error) = sweeper {
            tracing::warn!(%error, "engines.ttl_sweep_not_started");
        }
        while let Ok(Message::Call(call)) = queue.recv() {
            // The caller cancelled the call, for example by a timeout, while it was queued.
            if call.reply.is_closed() {
                continue;
            }
            // A panic fails the request that caused it, but not later ones.
            let executed = panic::catch_unwind(AssertUnwindSafe(|| execute(&database, &call.operation, &call.body)));
            let outcome =
                executed.unwrap_or_else(|_| Err(DynoxideError::InternalServerError("the operation panicked".into())));
            // The caller may have cancelled the call meanwhile.
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
        if stopped.recv_timeout(TTL_SWEEP_INTERVAL) != Err(mpsc::RecvTimeoutError::Timeout) {
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
    let (reply, outcome) = oneshot::channel();
    let call = Call { operation: operation.to_owned(), body, reply };
    if calls.0.send(Message::Call(call)).is_err() {
        return closed();
    }
    match outcome.await {
        Ok(Ok(text)) => respond(StatusCode::OK, text),
        Ok(Err(error)) => {
            let status = StatusCode::from_u16(error.status_code()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            if status.is_server_error() {
                tracing::warn!(operation, %error, "engines.dynamodb_failed");
            }
            respond(status, error.to_json())
        }
        // The call was still queued when the database was closed.
        Err(_) => closed(),
    }
}

fn respond(status: StatusCode, body: String) -> Response {
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
    respond(StatusCode::BAD_REQUEST, body.to_string())
}

/// A response that SDKs retry.
fn closed() -> Response {
    let body = json!({
        "__type": "com.amazonaws.dynamodb.v20120810#InternalServerError",
        "message": "The embedded DynamoDB is closed.",
    });
    respond(StatusCode::SERVICE_UNAVAILABLE, body.to_string())
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
                // `handle` has checked `is_known`.
                other => Err(DynoxideError::UnsupportedCapability(other.to_owned())),
            }
        }

        /// As [`execute`], without the JSON text.
        fn execute_value(database: &Database, operation: &str, body: &Value) -> Result<Value, DynoxideError> {
            match operation {
                $($name => write_value(&database.$method(read_value::<$request>(body)?)?),)*
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

fn write(output: &impl Serialize) -> Result<String, DynoxideError> {
    serde_json::to_string(output).map_err(|error| DynoxideError::InternalServerError(error.to_string()))
}

fn write_value(output: &impl Serialize) -> Result<Value, DynoxideError> {
    serde_json::to_value(output).map_err(|error| DynoxideError::InternalServerError(error.to_string()))
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, DynoxideError> {
    serde_json::from_slice(body).map_err(|error| deserialization_error(&error.to_string()))
}

fn read_value<T: DeserializeOwned>(body: &Value) -> Result<T, DynoxideError> {
    T::deserialize(body).map_err(|error| deserialization_error(&error.to_string()))
}

/// The error for a body that does not deserialize. dynoxide's request types report DynamoDB's error message as the text of a serde
/// error, after a marker. serde_json appends a position to it.
fn deserialization_error(text: &str) -> DynoxideError {
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

/// Removes serde_json's suffix ` at line N column N`.
fn without_position(text: &str) -> &str {
    match text.rfind(" at line ") {
        Some(end) if text[end..].contains(" column ") => &text[..end],
        _ => text,
    }
}
