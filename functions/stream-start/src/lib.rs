//! `POST /api/v1/app-conversations/stream-start`: starts a conversation and streams every change of the start task's status.

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State};
use axum::response::Response;
use axum::routing::post;
use bytes::Bytes;
use futures::stream::{self, Stream};
use http::header::{CONTENT_TYPE, HeaderValue};
use serde_json::value::RawValue;
use shared::aws::Aws;
use shared::config::Config;
use shared::error::Error;
use shared::http::caller::Caller;
use shared::http::extract::JsonBody;
use shared::http::idempotency_key::IdempotencyKey;
use shared::http::page::PAGE_SIZE;
use shared::http::request_trace::RequestTrace;
use shared::start::create::StartService;
use shared::start::request::StartRequest;
use shared::start::store::StartTaskStore;
use shared::start::task::StartTaskRecord;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tokio::time::{Instant, sleep_until};
use tracing::{Instrument as _, Span};

/// The shortest pause between two polls of the task, after a change of its status.
const SHORTEST_POLL: Duration = Duration::from_millis(200);
/// The longest pause between two polls, when the status has not changed for some time.
const LONGEST_POLL: Duration = Duration::from_secs(2);
/// An API Gateway stream lasts at most 15 minutes; the array is closed before that.
const STREAM_LIMIT: Duration = Duration::from_secs(14 * 60);
/// A request larger than this, in bytes, is shown completely in the first element only.
const REPEATED_REQUEST: u64 = 64 * 1024;

/// What this function can access: everything that a start needs, and read access to start tasks.
#[derive(Clone, Debug)]
pub struct Context {
    start_service: StartService,
    keep_alive: Duration,
}

impl Context {
    /// A context on the configured tables and queue.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        Self { start_service: start::start_service(config, aws, sealer), keep_alive: config.start.keep_alive }
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
    key: IdempotencyKey,
    trace: RequestTrace,
    JsonBody(request): JsonBody<StartRequest>,
) -> Result<Response, Error> {
    // An error before the task exists is an ordinary error response with its status; the reference cuts the stream.
    let record = context.start_service.create(&user, request, &key, &trace).await?;
    let states = States::new(context.start_service.tasks, user, record, context.keep_alive);
    let mut response = Response::new(Body::from_stream(states.stream()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    Ok(response)
}

/// The states of a task as a JSON array in chunks. The start continues when the client disconnects.
struct States {
    tasks: StartTaskStore,
    user: UserId,
    record: StartTaskRecord,
    /// The request for the first element.
    first_request: Option<Box<RawValue>>,
    /// The request for all other elements.
    request: Box<RawValue>,
    /// The number of states that have been sent.
    sent: usize,
    stage: Stage,
    /// The current pause between two polls.
    poll: Duration,
    next_poll: Instant,
    keep_alive: Duration,
    /// The time at which a newline is due, which keeps the connection alive.
    idle_at: Instant,
    /// The latest time at which the array is closed.
    until: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Nothing has been sent yet.
    Opening,
    /// States are sent as they occur.
    Open,
    /// The array is complete.
    Closed,
}

impl States {
    fn new(tasks: StartTaskStore, user: UserId, record: StartTaskRecord, keep_alive: Duration) -> Self {
        let now = Instant::now();
        Self {
            first_request: Some(record.request_within(PAGE_SIZE)),
            request: record.request_within(REPEATED_REQUEST),
            tasks,
            user,
            record,
            sent: 0,
            stage: Stage::Opening,
            poll: SHORTEST_POLL,
            next_poll: now + SHORTEST_POLL,
            keep_alive,
            idle_at: now + keep_alive,
            until: now + STREAM_LIMIT,
        }
    }

    /// The chunks of the array, which is always closed.
    fn stream(self) -> impl Stream<Item = Result<Bytes, std::convert::Infallible>> {
        // The body is polled after the request's log span has ended.
        let span = Span::current();
        stream::unfold((self, span), async |(mut states, span)| {
            let piece = states.piece().instrument(span.clone()).await?;
            states.idle_at = Instant::now() + states.keep_alive;
            Some((Ok(piece), (states, span)))
        })
    }

    /// The next chunk, as soon as there is one; `None` after the end.
    async fn piece(&mut self) -> Option<Bytes> {
        loop {
            match self.stage {
                Stage::Opening => {
                    self.stage = Stage::Open;
                    return Some(Bytes::from_static(b"[\n"));
                }
                Stage::Closed => return None,
                Stage::Open => {}
            }
            if let Some(state) = self.next_state() {
                self.poll = SHORTEST_POLL;
                self.next_poll = Instant::now() + self.poll;
                return Some(state);
            }
            let is_final = self.record.history.last().is_some_and(|last| last.status.is_final());
            if is_final || Instant::now() >= self.until {
                self.stage = Stage::Closed;
                return Some(Bytes::from_static(b"]"));
            }
            sleep_until(self.next_poll.min(self.idle_at)).await;
            if Instant::now() >= self.next_poll {
                self.read().await;
                self.poll = (self.poll * 3 / 2).min(LONGEST_POLL);
                self.next_poll = Instant::now() + self.poll;
            }
            if self.sent == self.record.history.len() && Instant::now() >= self.idle_at {
                // JSON permits white space between the elements of an array.
                return Some(Bytes::from_static(b"\n"));
            }
        }
    }

    /// The next state that has not been sent.
    fn next_state(&mut self) -> Option<Bytes> {
        let snapshot = self.record.history.get(self.sent)?;
        let request = self.first_request.take().unwrap_or_else(|| self.request.clone());
        let separator = if self.sent == 0 { "" } else { ",\n" };
        let json = serde_json::to_string(&self.record.show_at(snapshot, request)).unwrap_or_else(|error| {
            tracing::error!(%error, "stream_start.state_not_serialised");
            "null".to_owned()
        });
        self.sent += 1;
        Some(Bytes::from(format!("{separator}{json}")))
    }

    /// Polls the states of the task. Nothing else of it is read, because nothing else is shown that changes.
    async fn read(&mut self) {
        match self.tasks.history(&self.user, self.record.id).await {
            Ok(Some(history)) => self.record.history = history,
            // The owner has deleted the task, so it has no more states.
            Ok(None) => self.until = Instant::now(),
            // The next read may succeed; the array ends at its time limit.
            Err(error) => tracing::warn!(error = %error.context(), "stream_start.read_failed"),
        }
    }
}
