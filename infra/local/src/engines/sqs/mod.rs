//! SQS: standard queues in memory, over the AWS JSON 1.0 protocol, with the operations that the product and its tests use.
//!
//! No background task runs. Messages become visible, expire and move to the dead-letter queue when the next call processes their
//! queue. Only a waiting receive has a timer, which is set to the next time at which a message of its queue becomes visible.

mod queue;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tokio::time::Instant;
use uuid::Uuid;

use self::queue::{Queue, Queues, Settings, receive, seconds};
use super::stopped;

/// The AWS account of the queues.
const ACCOUNT: &str = "000000000000";
/// The maximum size of a message, and of all messages of a batch.
const MAX_BYTES: usize = 1024 * 1024;
/// The maximum size of a request: JSON may encode a byte of the message as six bytes.
pub(super) const MAX_REQUEST: usize = 8 * MAX_BYTES;
const MAX_BATCH: usize = 10;
const MAX_VISIBILITY_SECONDS: u64 = 43_200;
const MAX_DELAY_SECONDS: u64 = 900;
const MAX_WAIT_SECONDS: u64 = 20;

/// The AWS JSON protocol, without authentication. Waiting receives return when `stop` becomes true.
pub(super) fn router(url: &str, stop: watch::Receiver<bool>) -> Router {
    let sqs = Arc::new(Sqs { url: url.to_owned(), queues: Mutex::default(), stop });
    Router::new().route("/", post(handle)).layer(DefaultBodyLimit::max(MAX_REQUEST)).with_state(sqs)
}

async fn handle(State(sqs): State<Arc<Sqs>>, headers: HeaderMap, body: Bytes) -> Response {
    let (status, error, body) = match sqs.call(&headers, &body).await {
        Ok(body) => (StatusCode::OK, None, body),
        Err(failure) => {
            let body = json!({ "__type": failure.shape, "message": failure.message });
            (StatusCode::BAD_REQUEST, Some(format!("{};Sender", failure.code)), body)
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
    // SDKs read the error code from this header, which is compatible with the earlier query protocol, if it is present.
    if let Some(error) = error.and_then(|error| error.parse().ok()) {
        response.headers_mut().insert("x-amzn-query-error", error);
    }
    response
}

/// An error response.
#[derive(Debug)]
struct Failure {
    /// `__type` in the body.
    shape: String,
    /// The code in the header, and in the entries of a batch.
    code: String,
    message: String,
}

impl Failure {
    /// An error of the service's own, whose code in the header is `code`.
    fn sqs(shape: &str, code: &str, message: impl Into<String>) -> Self {
        Self { shape: format!("com.amazonaws.sqs#{shape}"), code: code.to_owned(), message: message.into() }
    }

    /// An error whose code in the header has the prefix of the query protocol.
    fn prefixed(name: &str, message: impl Into<String>) -> Self {
        Self::sqs(name, &format!("AWS.SimpleQueueService.{name}"), message)
    }

    /// An error that all AWS services have.
    fn common(shape: &str, code: &str, message: impl Into<String>) -> Self {
        Self { shape: format!("com.amazon.coral.service#{shape}"), code: code.to_owned(), message: message.into() }
    }

    fn no_queue() -> Self {
        let code = "AWS.SimpleQueueService.NonExistentQueue";
        Self::sqs("QueueDoesNotExist", code, "The specified queue does not exist.")
    }

    fn parameter(message: impl Into<String>) -> Self {
        Self::common("InvalidParameterValueException", "InvalidParameterValue", message)
    }

    fn missing(name: &str) -> Self {
        let message = format!("The request must contain the parameter {name}.");
        Self::common("MissingRequiredParameterException", "MissingParameter", message)
    }

    fn attribute_value(name: &str, reason: &str) -> Self {
        let message = format!("Invalid value for the parameter {name}. {reason}");
        Self::sqs("InvalidAttributeValue", "InvalidAttributeValue", message)
    }

    fn unknown_attribute(name: &str) -> Self {
        let message = format!("The embedded SQS does not support the attribute {name}.");
        Self::sqs("InvalidAttributeName", "InvalidAttributeName", message)
    }

    fn unknown_operation(target: &str) -> Self {
        let message = format!("The embedded SQS does not support {target}.");
        Self::common("UnknownOperationException", "InvalidAction", message)
    }
}

type Outcome = Result<Value, Failure>;

struct Sqs {
    url: String,
    queues: Mutex<Queues>,
    stop: watch::Receiver<bool>,
}

impl Sqs {
    async fn call(&self, headers: &HeaderMap, body: &[u8]) -> Outcome {
        let target = headers.get("x-amz-target").and_then(|value| value.to_str().ok()).unwrap_or_default();
        match target.strip_prefix("AmazonSQS.").unwrap_or_default() {
            "CreateQueue" => self.create_queue(parse(body)?),
            "GetQueueAttributes" => self.get_queue_attributes(&parse(body)?),
            "SetQueueAttributes" => self.set_queue_attributes(&parse(body)?),
            "PurgeQueue" => self.purge_queue(&parse(body)?),
            "SendMessage" => self.send_message(parse(body)?),
            "SendMessageBatch" => self.send_message_batch(parse(body)?),
            "ReceiveMessage" => self.receive_message(parse(body)?).await,
            "DeleteMessage" => self.delete_message(&parse(body)?),
            _ => Err(Failure::unknown_operation(if target.is_empty() {
                "requests without x-amz-target"
            } else {
                target
            })),
        }
    }

    fn queues(&self) -> MutexGuard<'_, Queues> {
        // No code panics between two changes that belong together, so the queues are consistent after a panic.
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn create_queue(&self, input: CreateQueue) -> Outcome {
        let name = input.queue_name;
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if !(1..=80).contains(&name.len()) || !name.bytes().all(is_allowed) {
            return Err(Failure::parameter(
                "Can only include alphanumeric characters, hyphens, or underscores. 1 to 80 in length",
            ));
        }
        let mut queues = self.queues();
        let output = json!({ "QueueUrl": format!("{}/{ACCOUNT}/{name}", self.url) });
        if let Some(queue) = queues.get(&name) {
            let mut requested = queue.settings.clone();
            requested.change(&input.attributes, &queues)?;
            if requested != queue.settings {
                let message = "A queue already exists with the same name and a different value for an attribute.";
                return Err(Failure::sqs("QueueNameExists", "QueueAlreadyExists", message));
            }
            return Ok(output);
        }
        let mut settings = Settings::default();
        settings.change(&input.attributes, &queues)?;
        queues.insert(name.clone(), Queue::new(name, settings));
        Ok(output)
    }

    fn get_queue_attributes(&self, input: &GetQueueAttributes) -> Outcome {
        let mut queues = self.queues();
        let queue = find(&mut queues, &input.queue_url)?;
        queue.advance();
        let all = queue.attributes();
        let requested = &input.attribute_names;
        let is_known = |name: &str| name == "All" || name == "RedrivePolicy" || all.contains_key(name);
        if let Some(name) = requested.iter().find(|name| !is_known(name)) {
            return Err(Failure::unknown_attribute(name));
        }
        let is_requested = |name: &String| requested.iter().any(|requested| requested == "All" || requested == name);
        let attributes: Map<_, _> = all.into_iter().filter(|(name, _)| is_requested(name)).collect();
        Ok(json!({ "Attributes": attributes }))
    }

    fn set_queue_attributes(&self, input: &SetQueueAttributes) -> Outcome {
        let mut queues = self.queues();
        let mut settings = find(&mut queues, &input.queue_url)?.settings.clone();
        settings.change(&input.attributes, &queues)?;
        let queue = find(&mut queues, &input.queue_url)?;
        queue.settings = settings;
        // Waiting receives may have to wait for another time.
        queue.changed.notify_waiters();
        Ok(json!({}))
    }

    fn purge_queue(&self, input: &QueueUrl) -> Outcome {
        find(&mut self.queues(), &input.queue_url)?.clear();
        Ok(json!({}))
    }

    fn send_message(&self, input: SendMessage) -> Outcome {
        find(&mut self.queues(), &input.queue_url)?.send(input.message)
    }

    /// Sends each entry on its own, and reports those that are rejected.
    fn send_message_batch(&self, input: SendMessageBatch) -> Outcome {
        let mut queues = self.queues();
        let queue = find(&mut queues, &input.queue_url)?;
        check_batch(&input.entries)?;
        let (mut successful, mut failed) = (Vec::new(), Vec::new());
        for Entry { id, message } in input.entries {
            match queue.send(message) {
                Ok(mut output) => {
                    output["Id"] = json!(id);
                    successful.push(output);
                }
                Err(failure) => failed.push(json!({
                    "Id": id, "Code": failure.code, "Message": failure.message, "SenderFault": true,
                })),
            }
        }
        Ok(json!({ "Successful": successful, "Failed": failed }))
    }

    async fn receive_message(&self, input: ReceiveMessage) -> Outcome {
        let limit = input.max_number_of_messages.unwrap_or(1);
        let limit = usize::try_from(limit).ok().filter(|limit| (1..=MAX_BATCH).contains(limit)).ok_or_else(|| {
            Failure::parameter(format!(
                "Value {limit} for parameter MaxNumberOfMessages is invalid. Reason: Must be between 1 and 10, if provided."
            ))
        })?;
        let visibility =
            input.visibility_timeout.map(|n| seconds("VisibilityTimeout", n, MAX_VISIBILITY_SECONDS)).transpose()?;
        let wait = seconds("WaitTimeSeconds", input.wait_time_seconds.unwrap_or_default(), MAX_WAIT_SECONDS)?;
        let end = Instant::now() + wait;
        let (name, changed) = {
            let mut queues = self.queues();
            let queue = find(&mut queues, &input.queue_url)?;
            (queue.name.clone(), Arc::clone(&queue.changed))
        };
        loop {
            // The notification is enabled before the queue is read, so that no send in between is missed.
            let mut notified = std::pin::pin!(changed.notified());
            notified.as_mut().enable();
            let wake_at = {
                let mut queues = self.queues();
                let messages = receive(&mut queues, &name, limit, visibility, &input)?;
                if !messages.is_empty() {
                    return Ok(json!({ "Messages": messages }));
                }
                let queue = queues.get(&name).ok_or_else(Failure::no_queue)?;
                if Instant::now() >= end {
                    return Ok(json!({}));
                }
                queue.next_change().map_or(end, |change| change.min(end))
            };
            tokio::select! {
                () = notified => {}
                () = tokio::time::sleep_until(wake_at) => {}
                () = stopped(self.stop.clone()) => return Ok(json!({})),
            }
        }
    }

    fn delete_message(&self, input: &DeleteMessage) -> Outcome {
        find(&mut self.queues(), &input.queue_url)?.delete(&input.receipt_handle)
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| {
        let message = error.to_string();
        match message.strip_prefix("missing field `").and_then(|rest| rest.split_once('`')) {
            Some((name, _)) => Failure::missing(name),
            None => Failure::common("SerializationException", "MalformedInput", message),
        }
    })
}

/// The queue with this URL. The host in the URL is ignored, so that a URL stays valid when the port changes.
fn find<'a>(queues: &'a mut Queues, url: &str) -> Result<&'a mut Queue, Failure> {
    let name = url.rsplit('/').next().unwrap_or_default();
    queues.get_mut(name).ok_or_else(Failure::no_queue)
}

fn check_batch(entries: &[Entry]) -> Result<(), Failure> {
    let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
    let is_id = |id: &str| (1..=80).contains(&id.len()) && id.bytes().all(is_allowed);
    let mut seen = HashSet::new();
    let repeated = entries.iter().find(|entry| !seen.insert(entry.id.as_str()));
    let bytes: usize = entries.iter().map(|entry| entry.message.message_body.len()).sum();
    let (name, message) = if entries.is_empty() {
        ("EmptyBatchRequest", "There should be at least one entry in the request.".to_owned())
    } else if entries.len() > MAX_BATCH {
        let text = format!("Maximum number of entries per request are {MAX_BATCH}. You have sent {}.", entries.len());
        ("TooManyEntriesInBatchRequest", text)
    } else if !entries.iter().all(|entry| is_id(&entry.id)) {
        let text = "A batch entry id can only contain alphanumeric characters, hyphens and underscores. It can be at most 80 letters long.";
        ("InvalidBatchEntryId", text.to_owned())
    } else if let Some(Entry { id, .. }) = repeated {
        ("BatchEntryIdsNotDistinct", format!("Id {id} repeated."))
    } else if bytes > MAX_BYTES {
        let text = format!("Batch requests cannot be longer than {MAX_BYTES} bytes. You have sent {bytes} bytes.");
        ("BatchRequestTooLong", text)
    } else {
        return Ok(());
    };
    Err(Failure::prefixed(name, message))
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
struct SendMessage {
    queue_url: String,
    #[serde(flatten)]
    message: NewMessage,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SendMessageBatch {
    queue_url: String,
    #[serde(default)]
    entries: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    id: String,
    #[serde(flatten)]
    message: NewMessage,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct NewMessage {
    message_body: String,
    delay_seconds: Option<i64>,
    /// Checked and then ignored: the order of messages does not depend on it.
    message_group_id: Option<String>,
    #[serde(default)]
    message_attributes: Map<String, Value>,
    #[serde(default)]
    message_system_attributes: Map<String, Value>,
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
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DeleteMessage {
    queue_url: String,
    receipt_handle: String,
}
