//! What agent servers post to the product: batches of events and snapshots of conversations, as version 1.58 does.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, Uri, header};
use serde_json::Value;
use tokio::time::{sleep, timeout};
use uuid::Uuid;

use super::server::Process;
use super::{Shared, State};
use crate::net::Request;

/// The number of events that are posted at once.
const BATCH: usize = 5;
/// How long events wait for others (`OH_WEBHOOKS_0_FLUSH_DELAY`).
const FLUSH_DELAY: Duration = Duration::from_secs(1);
/// The attempts to post a batch before it is put back, and a snapshot before it is dropped.
const ATTEMPTS: usize = 4;
const RETRY_DELAY: Duration = Duration::from_secs(5);
const TIMEOUT: Duration = Duration::from_secs(30);
/// How late a batch or snapshot is that is late or doubled.
const LATE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(60)];

/// An event that waits for its batch.
#[derive(Clone, Debug)]
pub(super) struct Queued {
    pub(super) json: String,
}

/// A request to the product below a base URL.
pub(super) fn request(method: Method, base: &str, path: &str, headers: HeaderMap, body: Bytes) -> Request {
    let url: Uri = format!("{base}{path}").parse().expect("a URL");
    Request {
        method,
        authority: url.authority().expect("an authority").to_string(),
        path: url.path().to_owned(),
        query: url.query().unwrap_or_default().to_owned(),
        headers,
        body,
    }
}

/// What becomes of a batch or a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Posted,
    Late,
    Lost,
}

/// Decides what becomes of a batch or a snapshot, and whether it arrives twice.
fn fate(shared: &Shared, state: &mut State, subject: &str) -> (Fate, bool) {
    let faults = &shared.settings.faults.webhooks;
    let is_lost = shared.fails(state, "webhook is lost", subject, faults.lost);
    let is_late = shared.fails(state, "webhook is late", subject, faults.late);
    let is_doubled = shared.fails(state, "webhook is doubled", subject, faults.doubled);
    let fate = match (is_lost, is_late) {
        (true, _) => Fate::Lost,
        (false, true) => Fate::Late,
        (false, false) => Fate::Posted,
    };
    (fate, is_doubled)
}

/// The request of a sandbox; `None` if it posts no webhooks or has ended.
fn of_sandbox(state: &mut State, process: &Process, path: &str, body: Bytes) -> Option<Request> {
    let runtime = process.of(state)?;
    let mut headers = HeaderMap::new();
    headers.insert(header::CONTENT_TYPE, "application/json".parse().expect("a type"));
    headers.insert("x-session-api-key", runtime.key.parse().expect("a key"));
    Some(request(Method::POST, runtime.webhooks.as_ref()?, path, headers, body))
}

/// Posts once. Returns whether the response is a 2xx.
async fn post(shared: &Shared, subject: &str, request: Request) -> bool {
    let latency = shared.between(&mut shared.lock(), "latency of a webhook", subject, shared.settings.pace.agent);
    sleep(latency).await;
    let is_accepted = shared.send(request, TIMEOUT).await.is_some_and(|status: StatusCode| status.is_success());
    if !is_accepted {
        shared.lock().counters.posts_refused += 1;
    }
    is_accepted
}

/// Posts until a 2xx, at most [`ATTEMPTS`] times and while the process lives.
async fn post_often(shared: &Shared, process: &Process, subject: &str, request: &Request) -> bool {
    for attempt in 1..=ATTEMPTS {
        if post(shared, subject, request.clone()).await {
            return true;
        }
        if attempt < ATTEMPTS {
            sleep(RETRY_DELAY).await;
        }
        if process.of(&mut shared.lock()).is_none() {
            break;
        }
    }
    false
}

/// Posts again what was acknowledged, later.
fn post_again(shared: &Arc<Shared>, state: &mut State, subject: &str, request: Request) {
    state.counters.posts_doubled += 1;
    state.counters.posts_open += 1;
    let later = shared.between(state, "doubled later", subject, LATE);
    let (shared, subject) = (shared.clone(), subject.to_owned());
    tokio::spawn(async move {
        sleep(later).await;
        post(&shared, &subject, request).await;
        shared.lock().counters.posts_open -= 1;
    });
}

/// What the models remember of a batch that was acknowledged.
fn acknowledging(conversation: Uuid, batch: &[Queued]) -> impl FnOnce(&mut State) + use<> {
    let id = |event: &Queued| {
        let event: Value = serde_json::from_str(&event.json).expect("an event");
        event["id"].as_str().expect("an id").to_owned()
    };
    let ids: Vec<String> = batch.iter().map(id).collect();
    move |state: &mut State| {
        let count = ids.len() as u64;
        state.counters.posts_open -= count;
        state.counters.batches_posted += 1;
        state.counters.events_posted += count;
        state.acknowledged.entry(conversation).or_default().extend(ids);
    }
}

/// Posts the events of a conversation in batches until none waits.
pub(super) async fn flush(shared: Arc<Shared>, process: Process, conversation: Uuid) {
    let subject = format!("{} {}", process.runtime, conversation.simple());
    loop {
        let full = {
            let state = &mut *shared.lock();
            let Some(conversation) = process.conversation(state, conversation) else { return };
            (conversation.queue.len() < BATCH).then(|| conversation.is_full.clone())
        };
        if let Some(full) = full {
            // It ends early if the buffer is full.
            let _ = timeout(FLUSH_DELAY, full.notified()).await;
        }
        if !flush_once(&shared, &process, conversation, &subject).await {
            return;
        }
    }
}

/// Posts one batch. Returns whether events are left.
async fn flush_once(shared: &Arc<Shared>, process: &Process, conversation: Uuid, subject: &str) -> bool {
    let (batch, request, fate, is_doubled) = {
        let state = &mut *shared.lock();
        let (fate, is_doubled) = fate(shared, state, subject);
        let Some(posting) = process.conversation(state, conversation) else { return false };
        let batch: Vec<Queued> = posting.queue.drain(..BATCH.min(posting.queue.len())).collect();
        let events: Vec<&str> = batch.iter().map(|event| event.json.as_str()).collect();
        let body = format!("[{}]", events.join(","));
        let path = format!("/events/{}", conversation.simple());
        let request = of_sandbox(state, process, &path, body.into());
        (batch, request, fate, is_doubled)
    };
    let count = batch.len() as u64;
    let posted = acknowledging(conversation, &batch);
    match (request, fate) {
        (None, _) | (_, Fate::Lost) => shared.lock().lose_events(count),
        (Some(request), Fate::Late) => {
            let later = {
                let state = &mut *shared.lock();
                state.counters.posts_late += 1;
                shared.between(state, "late", subject, LATE)
            };
            let (shared, process, subject) = (shared.clone(), process.clone(), subject.to_owned());
            tokio::spawn(async move {
                sleep(later).await;
                let is_posted = post_often(&shared, &process, &subject, &request).await;
                let state = &mut *shared.lock();
                if is_posted { posted(state) } else { state.lose_events(count) }
            });
        }
        (Some(request), Fate::Posted) => {
            let is_posted = post_often(shared, process, subject, &request).await;
            let state = &mut *shared.lock();
            if is_posted {
                posted(state);
                if is_doubled {
                    post_again(shared, state, subject, request);
                }
            } else {
                match process.conversation(state, conversation) {
                    Some(posting) => batch.into_iter().rev().for_each(|event| posting.queue.push_front(event)),
                    None => state.lose_events(count),
                }
            }
        }
    }
    let state = &mut *shared.lock();
    let Some(posting) = process.conversation(state, conversation) else { return false };
    posting.is_flushing = !posting.queue.is_empty();
    posting.is_flushing
}

/// Posts events that an agent server posts as it ends or deletes their conversation, in one attempt.
pub(super) fn post_last(shared: &Arc<Shared>, state: &mut State, process: &Process, conversation: Uuid) {
    let Some(ending) = process.conversation(state, conversation) else { return };
    let batch: Vec<Queued> = ending.queue.drain(..).collect();
    if batch.is_empty() {
        return;
    }
    let events: Vec<&str> = batch.iter().map(|event| event.json.as_str()).collect();
    let body = format!("[{}]", events.join(","));
    let path = format!("/events/{}", conversation.simple());
    let count = batch.len() as u64;
    let Some(request) = of_sandbox(state, process, &path, body.into()) else { return state.lose_events(count) };
    let posted = acknowledging(conversation, &batch);
    let (shared, subject) = (shared.clone(), format!("{} {}", process.runtime, conversation.simple()));
    tokio::spawn(async move {
        let is_posted = post(&shared, &subject, request).await;
        let state = &mut *shared.lock();
        if is_posted { posted(state) } else { state.lose_events(count) }
    });
}

/// Posts a snapshot of a conversation.
pub(super) fn report(shared: &Arc<Shared>, state: &mut State, process: &Process, conversation: Uuid, body: String) {
    let subject = format!("{} {} snapshot", process.runtime, conversation.simple());
    let (fate, is_doubled) = fate(shared, state, &subject);
    let later = shared.between(state, "late", &subject, LATE);
    let request = of_sandbox(state, process, "/conversations", body.into());
    let Some(request) = request.filter(|_| fate != Fate::Lost) else {
        state.counters.snapshots_lost += 1;
        return;
    };
    state.counters.posts_open += 1;
    state.counters.posts_late += u64::from(fate == Fate::Late);
    let (shared, process) = (shared.clone(), process.clone());
    tokio::spawn(async move {
        if fate == Fate::Late {
            sleep(later).await;
        }
        let is_posted = post_often(&shared, &process, &subject, &request).await;
        let state = &mut *shared.lock();
        state.counters.posts_open -= 1;
        if !is_posted {
            state.counters.snapshots_lost += 1;
            return;
        }
        state.counters.snapshots_posted += 1;
        if is_doubled {
            post_again(&shared, state, &subject, request);
        }
    });
}
