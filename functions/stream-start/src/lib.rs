//! `POST /api/v1/app-conversations/stream-start`: begins a start and tells of every change of its status.

use std::collections::VecDeque;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State};
use axum::response::Response;
use axum::routing::post;
use bytes::Bytes;
use futures::stream::{self, Stream};
use http::HeaderMap;
use http::header::{CONTENT_TYPE, HeaderValue};
use shared::aws::Aws;
use shared::config::Config;
use shared::error::Error;
use shared::http::caller::Caller;
use shared::start::begin::StartBeginner;
use shared::start::store::StartTaskStore;
use shared::start::task::StartTaskRecord;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tokio::time::{Instant, sleep};

/// Pause between two looks at the task.
const POLL: Duration = Duration::from_millis(200);
/// A streamed answer of API Gateway lasts 15 minutes at most; the array is closed before that.
const PATIENCE: Duration = Duration::from_secs(14 * 60);

/// What this function may touch: all that a start does, and it reads start tasks.
#[derive(Clone, Debug)]
pub struct Context {
    beginner: StartBeginner,
}

impl Context {
    /// A context on the configured tables and queue.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        Self { beginner: start::beginner(config, aws, sealer) }
    }
}

/// The routes of this function.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/app-conversations/stream-start", post(stream_start))
        .layer(DefaultBodyLimit::max(start::BODY_LIMIT))
        .with_state(context)
}

async fn stream_start(
    State(context): State<Context>,
    Caller(user): Caller,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Response, Error> {
    let request = start::request_from(&headers, &body)?;
    // Errors before the task exists are answers like any other, with a status; the reference cuts the stream.
    let record = context.beginner.begin(&user, request).await?;
    let mut response = Response::new(Body::from_stream(snapshots(context.beginner.tasks, user, record)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

struct Progress {
    tasks: StartTaskStore,
    user: UserId,
    record: StartTaskRecord,
    /// How many of the record's states have been told.
    told: usize,
    ready: VecDeque<Bytes>,
    closed: bool,
    until: Instant,
}

/// A JSON array of the task's states, closed whatever happens. The worker goes on when the client leaves.
fn snapshots(
    tasks: StartTaskStore,
    user: UserId,
    record: StartTaskRecord,
) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
    let ready = VecDeque::from([Bytes::from_static(b"[\n")]);
    let until = Instant::now() + PATIENCE;
    let progress = Progress { tasks, user, record, told: 0, ready, closed: false, until };
    stream::unfold(progress, async |mut progress| {
        loop {
            if let Some(chunk) = progress.ready.pop_front() {
                return Some((Ok(chunk), progress));
            }
            if progress.closed {
                return None;
            }
            progress.tell();
            if progress.record.now.status.is_final() || Instant::now() > progress.until {
                progress.closed = true;
                progress.ready.push_back(Bytes::from_static(b"]"));
            } else if progress.ready.is_empty() {
                sleep(POLL).await;
                progress.look().await;
            }
        }
    })
}

impl Progress {
    fn tell(&mut self) {
        for snapshot in &self.record.history[self.told.min(self.record.history.len())..] {
            let separator = if self.told == 0 { "" } else { ",\n" };
            let json = serde_json::to_string(&self.record.show_at(snapshot)).unwrap_or_else(|error| {
                tracing::error!(%error, "stream_start.not_shown");
                "null".to_owned()
            });
            self.ready.push_back(Bytes::from(format!("{separator}{json}")));
            self.told += 1;
        }
    }

    async fn look(&mut self) {
        match self.tasks.get(&self.user, self.record.id).await {
            Ok(Some(record)) => self.record = record,
            // Deleted by its owner: there is nothing more to tell.
            Ok(None) => self.until = Instant::now(),
            // The store may be back at the next look; the array ends when the time is up.
            Err(error) => tracing::warn!(error = %error.context(), "stream_start.not_looked"),
        }
    }
}
