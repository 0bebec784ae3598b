//! SQS: standard queues in memory, over the AWS JSON 1.0 protocol.
//!
//! Nothing runs while nothing is asked: a message becomes visible, expires or is dead-lettered when a call next
//! looks, and only a waiting receive holds a timer, set to the next moment at which its queue changes by itself.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use md5::{Digest, Md5};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use uuid::Uuid;

use super::{REGION, stopped};

/// The account that the queues are in.
const ACCOUNT: &str = "000000000000";
/// The largest message, and the largest batch in all.
const MAX_BYTES: usize = 1024 * 1024;
/// JSON may write a byte of the message in six.
pub(super) const MAX_REQUEST: usize = 8 * MAX_BYTES;
const MAX_BATCH: usize = 10;
const MAX_VISIBILITY: u64 = 43_200;
const MAX_DELAY: u64 = 900;
const MAX_WAIT: u64 = 20;

/// The AWS JSON protocol, without authentication. Waiting receives return once `stop` says so.
pub(super) fn router(url: &str, stop: watch::Receiver<bool>) -> Router {
    let sqs = Arc::new(Sqs { url: url.to_owned(), queues: Mutex::default(), stop });
    Router::new().route("/", post(handle)).layer(DefaultBodyLimit::max(MAX_REQUEST)).with_state(sqs)
}

async fn handle(State(sqs): State<Arc<Sqs>>, headers: HeaderMap, body: Bytes) -> Response {
    let (status, error, body) = match sqs.call(&headers, &body).await {
        Ok(body) => (StatusCode::OK, None, body),
        Err(failure) => {
            let fault = if failure.status.is_server_error() { "Receiver" } else { "Sender" };
            let body = json!({ "__type": failure.shape, "message": failure.message });
            (failure.status, Some(format!("{};{fault}", failure.code)), body)
        }
    };
    let mut response = (
        status,
        [
            (header::CONTENT_TYPE, "application/x-amz-json-1.0".to_owned()),
            (HeaderName::from_static("x-amzn-requestid"), Uuid::new_v4().to_string()),
        ],
        body.to_string(),
    )
        .into_response();
    // The SDKs take the type of an error from this header, a relic of the protocol before, where there is one.
    if let Some(error) = error.and_then(|error| error.parse().ok()) {
        response.headers_mut().insert("x-amzn-query-error", error);
    }
    response
}

/// An error answer.
#[derive(Debug)]
struct Failure {
    status: StatusCode,
    /// `__type` in the body.
    shape: &'static str,
    /// The code in the header, and in the entries of a batch.
    code: &'static str,
    message: String,
}

impl Failure {
    fn new(shape: &'static str, code: &'static str, message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, shape, code, message: message.into() }
    }

    fn no_queue() -> Self {
        Self::new(
            "com.amazonaws.sqs#QueueDoesNotExist",
            "AWS.SimpleQueueService.NonExistentQueue",
            "The specified queue does not exist.",
        )
    }

    fn parameter(message: impl Into<String>) -> Self {
        Self::new("com.amazon.coral.service#InvalidParameterValueException", "InvalidParameterValue", message)
    }

    fn missing(name: &str) -> Self {
        Self::new(
            "com.amazon.coral.service#MissingRequiredParameterException",
            "MissingParameter",
            format!("The request must contain the parameter {name}."),
        )
    }

    fn attribute_value(name: &str, reason: &str) -> Self {
        Self::new(
            "com.amazonaws.sqs#InvalidAttributeValue",
            "InvalidAttributeValue",
            format!("Invalid value for the parameter {name}. {reason}").trim_end().to_owned(),
        )
    }

    fn receipt(handle: &str) -> Self {
        Self::new(
            "com.amazonaws.sqs#ReceiptHandleIsInvalid",
            "ReceiptHandleIsInvalid",
            format!("The input receipt handle \"{handle}\" is not a valid receipt handle."),
        )
    }
}

type Answer = Result<Value, Failure>;

struct Sqs {
    url: String,
    queues: Mutex<Queues>,
    stop: watch::Receiver<bool>,
}

/// The queues by name.
type Queues = BTreeMap<String, Queue>;

impl Sqs {
    async fn call(&self, headers: &HeaderMap, body: &[u8]) -> Answer {
        let target = headers.get("x-amz-target").and_then(|value| value.to_str().ok()).unwrap_or_default();
        let Some(operation) = target.strip_prefix("AmazonSQS.") else {
            return Err(unknown(if target.is_empty() { "a request without x-amz-target" } else { target }));
        };
        match operation {
            "CreateQueue" => self.create_queue(read(body)?),
            "GetQueueUrl" => self.get_queue_url(&read(body)?),
            "GetQueueAttributes" => self.get_queue_attributes(&read(body)?),
            "SetQueueAttributes" => self.set_queue_attributes(&read(body)?),
            "ListQueues" => self.list_queues(&read(body)?),
            "PurgeQueue" => self.purge_queue(&read(body)?),
            "DeleteQueue" => self.delete_queue(&read(body)?),
            "SendMessage" => self.send_message(read(body)?),
            "SendMessageBatch" => self.send_message_batch(read(body)?),
            "ReceiveMessage" => self.receive_message(read(body)?).await,
            "DeleteMessage" => self.delete_message(&read(body)?),
            "DeleteMessageBatch" => self.delete_message_batch(read(body)?),
            "ChangeMessageVisibility" => self.change_message_visibility(&read(body)?),
            "ChangeMessageVisibilityBatch" => self.change_message_visibility_batch(read(body)?),
            other => Err(unknown(other)),
        }
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        // No code panics between two changes that belong together, so what a panic leaves is still sound.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue_url(&self, name: &str) -> String {
        format!("{}/{ACCOUNT}/{name}", self.url)
    }

    fn create_queue(&self, input: CreateQueue) -> Answer {
        let name = input.queue_name;
        let fits = (1..=80).contains(&name.len())
            && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_');
        if name.ends_with(".fifo") || input.attributes.contains_key("FifoQueue") {
            return Err(Failure::new(
                "com.amazonaws.sqs#UnsupportedOperation",
                "AWS.SimpleQueueService.UnsupportedOperation",
                "The embedded SQS has standard queues only.",
            ));
        }
        if !fits {
            return Err(Failure::parameter(
                "Can only include alphanumeric characters, hyphens, or underscores. 1 to 80 in length",
            ));
        }
        let mut queues = self.queues();
        let answer = json!({ "QueueUrl": self.queue_url(&name) });
        if let Some(queue) = queues.get(&name) {
            let mut asked = queue.settings.clone();
            asked.change(&input.attributes, &queues)?;
            if asked != queue.settings {
                return Err(Failure::new(
                    "com.amazonaws.sqs#QueueNameExists",
                    "QueueAlreadyExists",
                    "A queue already exists with the same name and a different value for an attribute.",
                ));
            }
            return Ok(answer);
        }
        let mut settings = Settings::default();
        settings.change(&input.attributes, &queues)?;
        queues.insert(name.clone(), Queue::new(name, settings));
        Ok(answer)
    }

    fn get_queue_url(&self, input: &QueueName) -> Answer {
        match self.queues().contains_key(&input.queue_name) {
            true => Ok(json!({ "QueueUrl": self.queue_url(&input.queue_name) })),
            false => Err(Failure::no_queue()),
        }
    }

    fn get_queue_attributes(&self, input: &GetQueueAttributes) -> Answer {
        let mut queues = self.queues();
        let queue = find(&mut queues, &input.queue_url)?;
        queue.catch_up();
        let all = queue.attributes();
        if let Some(name) = input.attribute_names.iter().find(|name| *name != "All" && !known_attribute(name)) {
            return Err(unknown_attribute(name));
        }
        let asked = |name: &String| input.attribute_names.iter().any(|asked| asked == "All" || asked == name);
        let attributes: Map<_, _> = all.into_iter().filter(|(name, _)| asked(name)).collect();
        Ok(if attributes.is_empty() { json!({}) } else { json!({ "Attributes": attributes }) })
    }

    fn set_queue_attributes(&self, input: &SetQueueAttributes) -> Answer {
        let mut queues = self.queues();
        let mut settings = find(&mut queues, &input.queue_url)?.settings.clone();
        settings.change(&input.attributes, &queues)?;
        let queue = find(&mut queues, &input.queue_url)?;
        queue.settings = settings;
        queue.modified = now_millis();
        // Waiting receives may have to reckon anew.
        queue.bell.notify_waiters();
        Ok(json!({}))
    }

    fn list_queues(&self, input: &ListQueues) -> Answer {
        let limit = input.max_results.unwrap_or(1000);
        if !(1..=1000).contains(&limit) {
            return Err(Failure::parameter("MaxResults must be from 1 to 1000."));
        }
        let queues = self.queues();
        let after = input.next_token.as_deref().unwrap_or_default();
        let prefix = input.queue_name_prefix.as_deref().unwrap_or_default();
        let mut names = queues.keys().filter(|name| name.starts_with(prefix) && name.as_str() > after).peekable();
        let page: Vec<_> = names.by_ref().take(limit).collect();
        let mut answer = json!({ "QueueUrls": page.iter().map(|name| self.queue_url(name)).collect::<Vec<_>>() });
        // As on AWS, pages are for those who ask for them.
        if let (Some(last), Some(_), true) = (page.last(), names.peek(), input.max_results.is_some()) {
            answer["NextToken"] = json!(last);
        }
        Ok(answer)
    }

    fn purge_queue(&self, input: &QueueUrl) -> Answer {
        find(&mut self.queues(), &input.queue_url)?.clear();
        Ok(json!({}))
    }

    fn delete_queue(&self, input: &QueueUrl) -> Answer {
        let mut queues = self.queues();
        let name = find(&mut queues, &input.queue_url)?.name.clone();
        if let Some(queue) = queues.remove(&name) {
            // Waiting receives learn that it is gone.
            queue.bell.notify_waiters();
        }
        Ok(json!({}))
    }

    fn send_message(&self, input: SendMessage) -> Answer {
        let mut queues = self.queues();
        find(&mut queues, &input.queue_url)?.send(input.message)
    }

    fn send_message_batch(&self, input: Batch<NewMessage>) -> Answer {
        let mut queues = self.queues();
        let queue = find(&mut queues, &input.queue_url)?;
        check_batch(&input.entries)?;
        let bytes: usize = input.entries.iter().map(|entry| entry.of.bytes()).sum();
        if bytes > MAX_BYTES {
            return Err(Failure::new(
                "com.amazonaws.sqs#BatchRequestTooLong",
                "AWS.SimpleQueueService.BatchRequestTooLong",
                format!("Batch requests cannot be longer than {MAX_BYTES} bytes. You have sent {bytes} bytes."),
            ));
        }
        Ok(each(input.entries, |message| queue.send(message)))
    }

    async fn receive_message(&self, input: ReceiveMessage) -> Answer {
        let most = input.max_number_of_messages.unwrap_or(1);
        let most = usize::try_from(most).ok().filter(|most| (1..=MAX_BATCH).contains(most)).ok_or_else(|| {
            Failure::parameter(format!(
                "Value {most} for parameter MaxNumberOfMessages is invalid. Reason: Must be between 1 and 10, if provided."
            ))
        })?;
        let visibility =
            input.visibility_timeout.map(|n| seconds("VisibilityTimeout", n, MAX_VISIBILITY)).transpose()?;
        let wait = input.wait_time_seconds.map(|n| seconds("WaitTimeSeconds", n, MAX_WAIT)).transpose()?;
        let start = Instant::now();
        let (name, bell) = {
            let mut queues = self.queues();
            let queue = find(&mut queues, &input.queue_url)?;
            (queue.name.clone(), Arc::clone(&queue.bell))
        };
        loop {
            // Listening starts before looking, so that no send falls between the two.
            let mut rung = std::pin::pin!(bell.notified());
            rung.as_mut().enable();
            let wake = {
                let mut queues = self.queues();
                let taken = take(&mut queues, &name, most, visibility, &input)?;
                if !taken.is_empty() {
                    return Ok(json!({ "Messages": taken }));
                }
                let queue = queues.get(&name).ok_or_else(Failure::no_queue)?;
                let end = start + wait.unwrap_or(queue.settings.wait());
                if Instant::now() >= end {
                    return Ok(json!({}));
                }
                queue.next_change().map_or(end, |change| change.min(end))
            };
            tokio::select! {
                () = rung => {}
                () = tokio::time::sleep_until(wake) => {}
                () = stopped(self.stop.clone()) => return Ok(json!({})),
            }
        }
    }

    fn delete_message(&self, input: &DeleteMessage) -> Answer {
        find(&mut self.queues(), &input.queue_url)?.delete(&input.receipt)
    }

    fn delete_message_batch(&self, input: Batch<Receipt>) -> Answer {
        let mut queues = self.queues();
        let queue = find(&mut queues, &input.queue_url)?;
        check_batch(&input.entries)?;
        Ok(each(input.entries, |receipt| queue.delete(&receipt)))
    }

    fn change_message_visibility(&self, input: &ChangeMessageVisibility) -> Answer {
        find(&mut self.queues(), &input.queue_url)?.change_visibility(&input.change)
    }

    fn change_message_visibility_batch(&self, input: Batch<Change>) -> Answer {
        let mut queues = self.queues();
        let queue = find(&mut queues, &input.queue_url)?;
        check_batch(&input.entries)?;
        Ok(each(input.entries, |change| queue.change_visibility(&change)))
    }
}

fn unknown(what: &str) -> Failure {
    Failure::new(
        "com.amazon.coral.service#UnknownOperationException",
        "InvalidAction",
        format!("The embedded SQS does not know {what}."),
    )
}

fn unknown_attribute(name: &str) -> Failure {
    Failure::new("com.amazonaws.sqs#InvalidAttributeName", "InvalidAttributeName", format!("Unknown Attribute {name}."))
}

fn read<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        let message = error.to_string();
        match message.strip_prefix("missing field `").and_then(|rest| rest.split_once('`')) {
            Some((name, _)) => Failure::missing(name),
            None => Failure::new("com.amazon.coral.service#SerializationException", "MalformedInput", message),
        }
    })
}

/// The queue that a URL names. Its host is not looked at: a URL stays good when the port changes.
fn find<'a>(queues: &'a mut Queues, url: &str) -> Result<&'a mut Queue, Failure> {
    let name = url.rsplit('/').next().unwrap_or_default();
    queues.get_mut(name).ok_or_else(Failure::no_queue)
}

fn arn(name: &str) -> String {
    format!("arn:aws:sqs:{REGION}:{ACCOUNT}:{name}")
}

fn seconds(name: &str, value: i64, most: u64) -> Result<Duration, Failure> {
    u64::try_from(value).ok().filter(|value| *value <= most).map(Duration::from_secs).ok_or_else(|| {
        Failure::parameter(format!(
            "Value {value} for parameter {name} is invalid. Reason: Must be between 0 and {most}, if provided."
        ))
    })
}

fn now_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn check_batch<T>(entries: &[Entry<T>]) -> Result<(), Failure> {
    if entries.is_empty() {
        return Err(Failure::new(
            "com.amazonaws.sqs#EmptyBatchRequest",
            "AWS.SimpleQueueService.EmptyBatchRequest",
            "There should be at least one entry in the request.",
        ));
    }
    if entries.len() > MAX_BATCH {
        return Err(Failure::new(
            "com.amazonaws.sqs#TooManyEntriesInBatchRequest",
            "AWS.SimpleQueueService.TooManyEntriesInBatchRequest",
            format!("Maximum number of entries per request are {MAX_BATCH}. You have sent {}.", entries.len()),
        ));
    }
    let mut seen = HashSet::new();
    for Entry { id, .. } in entries {
        if !(1..=80).contains(&id.len()) || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
            return Err(Failure::new(
                "com.amazonaws.sqs#InvalidBatchEntryId",
                "AWS.SimpleQueueService.InvalidBatchEntryId",
                "A batch entry id can only contain alphanumeric characters, hyphens and underscores. It can be at most 80 letters long.",
            ));
        }
        if !seen.insert(id) {
            return Err(Failure::new(
                "com.amazonaws.sqs#BatchEntryIdsNotDistinct",
                "AWS.SimpleQueueService.BatchEntryIdsNotDistinct",
                format!("Id {id} repeated."),
            ));
        }
    }
    Ok(())
}

/// Does each entry of a batch, and sorts what came of it.
fn each<T>(entries: Vec<Entry<T>>, mut act: impl FnMut(T) -> Answer) -> Value {
    let (mut successful, mut failed) = (Vec::new(), Vec::new());
    for Entry { id, of } in entries {
        match act(of) {
            Ok(mut answer) => {
                answer["Id"] = json!(id);
                successful.push(answer);
            }
            Err(failure) => failed.push(json!({
                "Id": id, "Code": failure.code, "Message": failure.message, "SenderFault": true,
            })),
        }
    }
    json!({ "Successful": successful, "Failed": failed })
}

/// Takes messages for a receive, and moves those that were received too often to where they belong.
fn take(
    queues: &mut Queues,
    name: &str,
    most: usize,
    visibility: Option<Duration>,
    input: &ReceiveMessage,
) -> Result<Vec<Value>, Failure> {
    let queue = queues.get(name).ok_or_else(Failure::no_queue)?;
    // Without its target a policy cannot be followed, and messages stay.
    let redrive = queue.settings.redrive.clone().filter(|redrive| queues.contains_key(redrive.target_name()));
    let queue = queues.get_mut(name).ok_or_else(Failure::no_queue)?;
    queue.catch_up();
    let visibility = visibility.unwrap_or(queue.settings.visibility());
    let (mut taken, mut dead) = (Vec::new(), Vec::new());
    while taken.len() < most {
        let Some(&seq) = queue.ready.first() else {
            break;
        };
        let receives = queue.messages.get(&seq).map_or(0, |message| message.receives);
        if redrive.as_ref().is_some_and(|redrive| receives >= redrive.max) {
            dead.extend(queue.remove(seq));
        } else if let Some(message) = queue.receive(seq, visibility, input) {
            taken.push(message);
        } else {
            queue.unindex(seq);
        }
    }
    if let Some(redrive) = redrive.filter(|_| !dead.is_empty()) {
        let source = arn(name);
        if let Some(target) = queues.get_mut(redrive.target_name()) {
            for message in dead {
                // It is a new message there, but as old as it was: retention counts from the first send.
                let fresh = Message {
                    receives: 0,
                    first_received: None,
                    receipt: None,
                    source: Some(source.clone()),
                    ..message
                };
                target.add(fresh, Place::Ready);
            }
        }
    }
    Ok(taken)
}

/// What `RedrivePolicy` says.
#[derive(Clone, Debug, PartialEq)]
struct Redrive {
    target: String,
    max: u32,
}

impl Redrive {
    fn read(text: &str) -> Option<Self> {
        let policy: Value = serde_json::from_str(text).ok()?;
        let target = policy.get("deadLetterTargetArn")?.as_str()?.to_owned();
        // Consoles and templates write the number as either.
        let max = match policy.get("maxReceiveCount")? {
            Value::String(text) => text.parse().ok()?,
            other => u32::try_from(other.as_u64()?).ok()?,
        };
        (1..=1000).contains(&max).then_some(Self { target, max })
    }

    fn target_name(&self) -> &str {
        self.target.rsplit(':').next().unwrap_or_default()
    }
}

/// The attributes of a queue that can be set.
#[derive(Clone, Debug, PartialEq)]
struct Settings {
    numbers: BTreeMap<&'static str, u64>,
    redrive: Option<Redrive>,
    /// Kept and shown, without effect.
    inert: BTreeMap<&'static str, String>,
}

/// Name, least, most and default.
const NUMBERS: [(&str, u64, u64, u64); 5] = [
    ("VisibilityTimeout", 0, MAX_VISIBILITY, 30),
    ("DelaySeconds", 0, MAX_DELAY, 0),
    ("ReceiveMessageWaitTimeSeconds", 0, MAX_WAIT, 0),
    ("MessageRetentionPeriod", 60, 1_209_600, 345_600),
    ("MaximumMessageSize", 1024, MAX_BYTES as u64, MAX_BYTES as u64),
];
const INERT: [&str; 5] =
    ["Policy", "RedriveAllowPolicy", "KmsMasterKeyId", "KmsDataKeyReusePeriodSeconds", "SqsManagedSseEnabled"];
const COMPUTED: [&str; 6] = [
    "QueueArn",
    "CreatedTimestamp",
    "LastModifiedTimestamp",
    "ApproximateNumberOfMessages",
    "ApproximateNumberOfMessagesNotVisible",
    "ApproximateNumberOfMessagesDelayed",
];

fn known_attribute(name: &str) -> bool {
    NUMBERS.iter().any(|(known, ..)| *known == name)
        || INERT.contains(&name)
        || COMPUTED.contains(&name)
        || ["RedrivePolicy", "FifoQueue", "ContentBasedDeduplication", "DeduplicationScope", "FifoThroughputLimit"]
            .contains(&name)
}

impl Default for Settings {
    fn default() -> Self {
        let numbers = NUMBERS.iter().map(|(name, _, _, default)| (*name, *default)).collect();
        Self { numbers, redrive: None, inert: BTreeMap::new() }
    }
}

impl Settings {
    fn change(&mut self, attributes: &BTreeMap<String, String>, queues: &Queues) -> Result<(), Failure> {
        for (name, value) in attributes {
            if let Some((name, least, most, _)) = NUMBERS.iter().find(|(known, ..)| known == name) {
                let number = value.parse().ok().filter(|number| (least..=most).contains(&number));
                let number = number
                    .ok_or_else(|| Failure::attribute_value(name, &format!("Must be between {least} and {most}.")))?;
                self.numbers.insert(name, number);
            } else if name == "RedrivePolicy" {
                self.redrive = match value.as_str() {
                    "" => None,
                    text => {
                        let redrive = Redrive::read(text).ok_or_else(|| {
                            Failure::attribute_value(
                                name,
                                "It needs deadLetterTargetArn and maxReceiveCount, from 1 to 1000.",
                            )
                        })?;
                        if redrive.target != arn(redrive.target_name()) || !queues.contains_key(redrive.target_name()) {
                            return Err(Failure::parameter(format!(
                                "Value {text} for parameter RedrivePolicy is invalid. Reason: Dead letter target does not exist."
                            )));
                        }
                        Some(redrive)
                    }
                };
            } else if let Some(name) = INERT.iter().find(|inert| *inert == name) {
                self.inert.insert(name, value.clone());
            } else {
                return Err(unknown_attribute(name));
            }
        }
        Ok(())
    }

    fn number(&self, name: &str) -> u64 {
        self.numbers.get(name).copied().unwrap_or_default()
    }

    fn visibility(&self) -> Duration {
        Duration::from_secs(self.number("VisibilityTimeout"))
    }

    fn delay(&self) -> Duration {
        Duration::from_secs(self.number("DelaySeconds"))
    }

    fn wait(&self) -> Duration {
        Duration::from_secs(self.number("ReceiveMessageWaitTimeSeconds"))
    }

    fn retention_millis(&self) -> u64 {
        self.number("MessageRetentionPeriod") * 1000
    }

    fn max_bytes(&self) -> usize {
        usize::try_from(self.number("MaximumMessageSize")).unwrap_or(MAX_BYTES)
    }
}

/// Where a message is.
#[derive(Clone, Copy, Debug)]
enum Place {
    Ready,
    Delayed(Instant),
    InFlight(Instant),
}

struct Message {
    id: Uuid,
    body: String,
    attributes: BTreeMap<String, MessageAttribute>,
    system: BTreeMap<String, MessageAttribute>,
    /// Milliseconds since 1970, like the other times that are told to callers.
    sent: u64,
    first_received: Option<u64>,
    receives: u32,
    /// The last receive: only its handle still counts.
    receipt: Option<Uuid>,
    /// The queue that gave it up.
    source: Option<String>,
}

struct Queue {
    name: String,
    settings: Settings,
    created: u64,
    modified: u64,
    next_seq: u64,
    messages: BTreeMap<u64, Message>,
    /// Messages that a receive may take.
    ready: BTreeSet<u64>,
    /// Messages that come back at a time of their own.
    waiting: BTreeSet<(Instant, u64)>,
    /// Where each message is; says of those that wait what for.
    places: BTreeMap<u64, Place>,
    /// Rung when a waiting receive has to look again.
    bell: Arc<Notify>,
}

impl Queue {
    fn new(name: String, settings: Settings) -> Self {
        let now = now_millis();
        Self {
            name,
            settings,
            created: now,
            modified: now,
            next_seq: 0,
            messages: BTreeMap::new(),
            ready: BTreeSet::new(),
            waiting: BTreeSet::new(),
            places: BTreeMap::new(),
            bell: Arc::default(),
        }
    }

    fn add(&mut self, message: Message, place: Place) {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.messages.insert(seq, message);
        self.put(seq, place);
    }

    fn put(&mut self, seq: u64, place: Place) {
        self.unindex(seq);
        let ring = match place {
            Place::Ready => self.ready.insert(seq),
            Place::Delayed(until) | Place::InFlight(until) => {
                // Timers that are set fire no later than the first of these; an earlier one has to be told.
                let first = self.next_change().is_none_or(|first| until < first);
                self.waiting.insert((until, seq));
                first
            }
        };
        self.places.insert(seq, place);
        if ring {
            self.bell.notify_waiters();
        }
    }

    fn unindex(&mut self, seq: u64) {
        match self.places.remove(&seq) {
            Some(Place::Ready) => {
                self.ready.remove(&seq);
            }
            Some(Place::Delayed(until) | Place::InFlight(until)) => {
                self.waiting.remove(&(until, seq));
            }
            None => {}
        }
    }

    fn remove(&mut self, seq: u64) -> Option<Message> {
        self.unindex(seq);
        self.messages.remove(&seq)
    }

    fn clear(&mut self) {
        self.messages.clear();
        self.ready.clear();
        self.waiting.clear();
        self.places.clear();
    }

    fn next_change(&self) -> Option<Instant> {
        self.waiting.first().map(|(until, _)| *until)
    }

    /// Does what time has done since the last call.
    fn catch_up(&mut self) {
        let now = Instant::now();
        while let Some(&(until, seq)) = self.waiting.first() {
            if until > now {
                break;
            }
            // Receives that wait have a timer for this moment too, so nobody needs ringing.
            self.waiting.remove(&(until, seq));
            self.ready.insert(seq);
            self.places.insert(seq, Place::Ready);
        }
        let oldest = now_millis().saturating_sub(self.settings.retention_millis());
        while let Some((&seq, _)) = self.messages.first_key_value().filter(|(_, message)| message.sent < oldest) {
            self.remove(seq);
        }
    }

    fn attributes(&self) -> BTreeMap<String, Value> {
        let delayed = self.places.values().filter(|place| matches!(place, Place::Delayed(_))).count();
        let mut all: BTreeMap<_, _> = [
            ("QueueArn", arn(&self.name)),
            ("CreatedTimestamp", (self.created / 1000).to_string()),
            ("LastModifiedTimestamp", (self.modified / 1000).to_string()),
            ("ApproximateNumberOfMessages", self.ready.len().to_string()),
            ("ApproximateNumberOfMessagesNotVisible", (self.waiting.len() - delayed).to_string()),
            ("ApproximateNumberOfMessagesDelayed", delayed.to_string()),
        ]
        .into();
        all.extend(self.settings.numbers.iter().map(|(name, number)| (*name, number.to_string())));
        all.extend(self.settings.inert.iter().map(|(name, value)| (*name, value.clone())));
        if let Some(Redrive { target, max }) = &self.settings.redrive {
            let policy = json!({ "deadLetterTargetArn": target, "maxReceiveCount": max });
            all.insert("RedrivePolicy", policy.to_string());
        }
        all.into_iter().map(|(name, value)| (name.to_owned(), Value::String(value))).collect()
    }

    fn send(&mut self, new: NewMessage) -> Answer {
        let bytes = new.bytes();
        let max = self.settings.max_bytes();
        if bytes > max {
            return Err(Failure::parameter(format!(
                "One or more parameters are invalid. Reason: Message must be shorter than {max} bytes."
            )));
        }
        if new.message_body.is_empty() {
            return Err(Failure::missing("MessageBody"));
        }
        if !new.message_body.chars().all(allowed) {
            return Err(Failure::new(
                "com.amazonaws.sqs#InvalidMessageContents",
                "InvalidMessageContents",
                "Invalid characters found. Valid unicode characters are #x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF",
            ));
        }
        check_attributes(&new.message_attributes)?;
        let delay = new.delay_seconds.map(|n| seconds("DelaySeconds", n, MAX_DELAY)).transpose()?;
        let delay = delay.unwrap_or(self.settings.delay());
        let message = Message {
            id: Uuid::new_v4(),
            body: new.message_body,
            attributes: new.message_attributes,
            system: new.message_system_attributes,
            sent: now_millis(),
            first_received: None,
            receives: 0,
            receipt: None,
            source: None,
        };
        let mut answer = json!({ "MessageId": message.id, "MD5OfMessageBody": digest(message.body.as_bytes()) });
        if !message.attributes.is_empty() {
            answer["MD5OfMessageAttributes"] = json!(digest_attributes(message.attributes.iter()));
        }
        if !message.system.is_empty() {
            answer["MD5OfMessageSystemAttributes"] = json!(digest_attributes(message.system.iter()));
        }
        self.add(message, if delay.is_zero() { Place::Ready } else { Place::Delayed(Instant::now() + delay) });
        Ok(answer)
    }

    fn receive(&mut self, seq: u64, visibility: Duration, input: &ReceiveMessage) -> Option<Value> {
        let now = now_millis();
        let receipt = Uuid::new_v4();
        let message = self.messages.get_mut(&seq)?;
        message.receives = message.receives.saturating_add(1);
        let first_received = *message.first_received.get_or_insert(now);
        message.receipt = Some(receipt);

        let mut system = BTreeMap::from([
            ("SenderId", ACCOUNT.to_owned()),
            ("SentTimestamp", message.sent.to_string()),
            ("ApproximateReceiveCount", message.receives.to_string()),
            ("ApproximateFirstReceiveTimestamp", first_received.to_string()),
        ]);
        if let Some(source) = &message.source {
            system.insert("DeadLetterQueueSourceArn", source.clone());
        }
        if let Some(trace) = message.system.get("AWSTraceHeader").and_then(|trace| trace.string_value.clone()) {
            system.insert("AWSTraceHeader", trace);
        }
        let asked = |name: &str| {
            input.attribute_names.iter().chain(&input.message_system_attribute_names).any(|a| a == "All" || a == name)
        };
        system.retain(|name, _| asked(name));
        let own: Vec<_> = message.attributes.iter().filter(|(name, _)| input.wants(name)).collect();

        let handle = STANDARD.encode(format!("{}/{seq}/{receipt}", self.name));
        let mut answer = json!({
            "MessageId": message.id,
            "ReceiptHandle": handle,
            "MD5OfBody": digest(message.body.as_bytes()),
            "Body": message.body,
        });
        if !system.is_empty() {
            answer["Attributes"] = json!(system);
        }
        if !own.is_empty() {
            // The digest is of what is handed out, which may be a part.
            answer["MD5OfMessageAttributes"] = json!(digest_attributes(own.iter().copied()));
            answer["MessageAttributes"] = json!(own.into_iter().collect::<BTreeMap<_, _>>());
        }
        // In flight even for no time at all, so that one receive does not take it twice.
        self.put(seq, Place::InFlight(Instant::now() + visibility));
        Some(answer)
    }

    /// The message that a handle is for: none if it is gone or was received again since.
    fn held(&self, handle: &str) -> Result<Option<u64>, Failure> {
        let parse = || {
            let text = String::from_utf8(STANDARD.decode(handle).ok()?).ok()?;
            let mut parts = text.split('/');
            let (queue, seq, receipt) = (parts.next()?, parts.next()?, parts.next()?);
            (queue == self.name).then_some((seq.parse::<u64>().ok()?, receipt.parse::<Uuid>().ok()?))
        };
        let (seq, receipt) = parse().ok_or_else(|| Failure::receipt(handle))?;
        let current = self.messages.get(&seq).is_some_and(|message| message.receipt == Some(receipt));
        Ok(current.then_some(seq))
    }

    fn delete(&mut self, input: &Receipt) -> Answer {
        self.catch_up();
        // As on AWS, a handle that no longer counts is not an error, but deletes nothing.
        if let Some(seq) = self.held(&input.receipt_handle)? {
            self.remove(seq);
        }
        Ok(json!({}))
    }

    fn change_visibility(&mut self, input: &Change) -> Answer {
        self.catch_up();
        let visibility = seconds("VisibilityTimeout", input.visibility_timeout, MAX_VISIBILITY)?;
        let handle = &input.receipt.receipt_handle;
        let Some(seq) = self.held(handle)? else {
            return Err(Failure::parameter(format!(
                "Value {handle} for parameter ReceiptHandle is invalid. Reason: Message does not exist or is not available for visibility timeout change."
            )));
        };
        if !matches!(self.places.get(&seq), Some(Place::InFlight(_))) {
            return Err(Failure::new(
                "com.amazonaws.sqs#MessageNotInflight",
                "AWS.SimpleQueueService.MessageNotInflight",
                "The message is not in flight.",
            ));
        }
        self.put(seq, if visibility.is_zero() { Place::Ready } else { Place::InFlight(Instant::now() + visibility) });
        Ok(json!({}))
    }
}

/// The characters that XML 1.0 allows, and so SQS.
fn allowed(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{FFFD}' | '\u{10000}'..)
}

fn check_attributes(attributes: &BTreeMap<String, MessageAttribute>) -> Result<(), Failure> {
    if attributes.len() > 10 {
        return Err(Failure::parameter("Number of message attributes exceeds the allowed maximum of 10."));
    }
    for (name, attribute) in attributes {
        let kind = attribute.data_type.split('.').next().unwrap_or_default();
        let there = match kind {
            "String" | "Number" => attribute.string_value.as_ref().is_some_and(|value| !value.is_empty()),
            "Binary" => {
                attribute.binary_value.as_ref().is_some_and(|value| STANDARD.decode(value).is_ok_and(|v| !v.is_empty()))
            }
            _ => {
                return Err(Failure::parameter(format!(
                    "The type of message (user) attribute '{name}' is invalid. You must use only the following supported type prefixes: Binary, Number, String."
                )));
            }
        };
        if !there {
            return Err(Failure::parameter(format!(
                "The message (user) attribute '{name}' must contain a non-empty value of type '{kind}'."
            )));
        }
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}

fn digest(bytes: &[u8]) -> String {
    hex(&Md5::digest(bytes))
}

/// The digest of attributes as the developer guide lays it down: sorted by name, every part after its length.
fn digest_attributes<'a>(attributes: impl Iterator<Item = (&'a String, &'a MessageAttribute)>) -> String {
    let mut md5 = Md5::new();
    for (name, attribute) in attributes {
        let (transport, value) = attribute.value();
        for part in [name.as_bytes(), attribute.data_type.as_bytes()] {
            md5.update(length(part));
            md5.update(part);
        }
        md5.update([transport]);
        md5.update(length(&value));
        md5.update(&value);
    }
    hex(&md5.finalize())
}

fn length(part: &[u8]) -> [u8; 4] {
    u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes()
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct CreateQueue {
    queue_name: String,
    #[serde(default)]
    attributes: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct QueueName {
    queue_name: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct QueueUrl {
    queue_url: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct GetQueueAttributes {
    queue_url: String,
    #[serde(default)]
    attribute_names: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SetQueueAttributes {
    queue_url: String,
    attributes: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ListQueues {
    queue_name_prefix: Option<String>,
    next_token: Option<String>,
    max_results: Option<usize>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SendMessage {
    queue_url: String,
    #[serde(flatten)]
    message: NewMessage,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NewMessage {
    message_body: String,
    delay_seconds: Option<i64>,
    #[serde(default)]
    message_attributes: BTreeMap<String, MessageAttribute>,
    #[serde(default)]
    message_system_attributes: BTreeMap<String, MessageAttribute>,
}

impl NewMessage {
    /// What counts against the size limits.
    fn bytes(&self) -> usize {
        let attributes = self.message_attributes.iter();
        let attributes = attributes.map(|(name, a)| name.len() + a.data_type.len() + a.value().1.len());
        self.message_body.len() + attributes.sum::<usize>()
    }
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct MessageAttribute {
    data_type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    string_value: Option<String>,
    /// Base64, as it comes and goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    binary_value: Option<String>,
}

impl MessageAttribute {
    /// How the digest marks the kind of value, and the value itself.
    fn value(&self) -> (u8, Vec<u8>) {
        match (&self.string_value, &self.binary_value) {
            (None, Some(binary)) => (2, STANDARD.decode(binary).unwrap_or_default()),
            (string, _) => (1, string.clone().unwrap_or_default().into_bytes()),
        }
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ReceiveMessage {
    queue_url: String,
    max_number_of_messages: Option<i64>,
    visibility_timeout: Option<i64>,
    wait_time_seconds: Option<i64>,
    #[serde(default)]
    attribute_names: Vec<String>,
    #[serde(default)]
    message_system_attribute_names: Vec<String>,
    #[serde(default)]
    message_attribute_names: Vec<String>,
}

impl ReceiveMessage {
    fn wants(&self, name: &str) -> bool {
        self.message_attribute_names.iter().any(|asked| match asked.strip_suffix(".*") {
            Some(prefix) => name.starts_with(prefix),
            None => asked == "All" || asked == name,
        })
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Receipt {
    receipt_handle: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DeleteMessage {
    queue_url: String,
    #[serde(flatten)]
    receipt: Receipt,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Change {
    #[serde(flatten)]
    receipt: Receipt,
    visibility_timeout: i64,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ChangeMessageVisibility {
    queue_url: String,
    #[serde(flatten)]
    change: Change,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Batch<T> {
    queue_url: String,
    #[serde(default = "Vec::new")]
    entries: Vec<Entry<T>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry<T> {
    id: String,
    #[serde(flatten)]
    of: T,
}
