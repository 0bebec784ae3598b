//! DynamoDB: dynoxide on a SQLite file.

use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dynoxide::{Database, server};
use tokio::sync::{oneshot, watch};

use super::{EngineError, GRACE, stopped};

/// How often expired items are looked for. AWS promises days.
const SWEEP: Duration = Duration::from_secs(60);
/// How long to wait for another program, a backup say, that has the file locked.
const BUSY: Duration = Duration::from_secs(2);

/// Opens the database and serves it. What is returned ends once the database is closed.
///
/// dynoxide does its SQLite work inside its request handlers, one at a time. It gets a thread of its own, so that
/// a slow disk holds up no other task; and the thread's end is the moment when every handle is closed, which
/// dynoxide itself cannot tell.
pub(super) async fn start(
    path: PathBuf,
    listener: TcpListener,
    lock: File,
    stop: watch::Receiver<bool>,
) -> Result<oneshot::Receiver<()>, EngineError> {
    let (ready, is_ready) = oneshot::channel();
    let (closed, is_closed) = oneshot::channel();
    let named = path.clone();
    let failed = move |reason: String| EngineError::Database { path: named, reason };
    let thread = std::thread::Builder::new().name("dynamodb".to_owned()).spawn(move || {
        match open(&path) {
            Ok((database, runtime)) => {
                let _ = ready.send(Ok(()));
                run(database, runtime, listener, stop);
            }
            Err(reason) => {
                let _ = ready.send(Err(reason));
            }
        }
        // In this order: the folder is free only now, and whoever waits for the end may take it.
        drop(lock);
        drop(closed);
    });
    match thread {
        Err(error) => Err(failed(error.to_string())),
        Ok(_) => match is_ready.await {
            Ok(Ok(())) => Ok(is_closed),
            Ok(Err(reason)) => Err(failed(reason)),
            Err(_) => Err(failed("its thread ended".to_owned())),
        },
    }
}

fn open(path: &Path) -> Result<(Database, tokio::runtime::Runtime), String> {
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
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    Ok((database, runtime))
}

/// Sees that the file can be written and read. dynoxide would wait half a minute for a locked one.
fn probe(path: &Path) -> rusqlite::Result<()> {
    let connection = rusqlite::Connection::open(path)?;
    connection.busy_timeout(BUSY)?;
    connection.execute_batch("BEGIN IMMEDIATE; SELECT count(*) FROM sqlite_master; ROLLBACK;")
}

#[expect(clippy::needless_pass_by_value, reason = "the watch is the run's own")]
fn run(database: Database, runtime: tokio::runtime::Runtime, listener: TcpListener, stop: watch::Receiver<bool>) {
    runtime.block_on(async {
        let listener = match tokio::net::TcpListener::from_std(listener) {
            Ok(listener) => listener,
            Err(error) => return tracing::error!(%error, "the embedded DynamoDB cannot listen"),
        };
        let sweeper = tokio::spawn(sweep(database.clone()));
        let overdue = async {
            stopped(stop.clone()).await;
            tokio::time::sleep(GRACE).await;
        };
        tokio::select! {
            served = server::serve_with_shutdown(listener, database, stopped(stop.clone())) => {
                if let Err(error) = served {
                    tracing::error!(%error, "the embedded DynamoDB stopped");
                }
            }
            () = overdue => tracing::warn!("the embedded DynamoDB stopped with requests unanswered"),
        }
        sweeper.abort();
    });
    // Connections still open go here, and with the last one the database: SQLite moves its log into the file.
    runtime.shutdown_timeout(GRACE);
}

async fn sweep(database: Database) {
    let mut ticks = tokio::time::interval(SWEEP);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let database = database.clone();
        match tokio::task::spawn_blocking(move || database.sweep_ttl()).await {
            Ok(Ok(0)) => {}
            Ok(Ok(removed)) => tracing::debug!(removed, "expired items removed"),
            Ok(Err(error)) => tracing::warn!(%error, "expired items could not be removed"),
            Err(error) => tracing::warn!(%error, "the search for expired items failed"),
        }
    }
}
