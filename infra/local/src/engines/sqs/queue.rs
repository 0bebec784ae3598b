//! The queues of the embedded SQS: visibility, retention, dead letters.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use md5::{Digest, Md5};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    ACCOUNT, Failure, MAX_BYTES, MAX_DELAY_SECONDS, MAX_VISIBILITY_SECONDS, NewMessage, Outcome, ReceiveMessage,
};
use crate::engines::REGION;

/// A message is removed after four days, the default of SQS.
const RETENTION_MILLIS: u64 = 4 * 24 * 3600 * 1000;

/// The queues by name.
pub(super) type Queues = BTreeMap<String, Queue>;

fn arn(name: &str) -> String {
    format!("arn:aws:sqs:{REGION}:{ACCOUNT}:{name}")
}

pub(super) fn seconds(name: &str, value: i64, max: u64) -> Result<Duration, Failure> {
    u64::try_from(value).ok().filter(|value| *value <= max).map(Duration::from_secs).ok_or_else(|| {
        Failure::parameter(format!(
            "Value {value} for parameter {name} is invalid. Reason: Must be between 0 and {max}, if provided."
        ))
    })
}

fn now_millis() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Receives up to `limit` messages, and moves those with too many receives to the dead-letter queue.
pub(super) fn receive(
    queues: &mut Queues,
    name: &str,
    limit: usize,
    visibility: Option<Duration>,
    input: &ReceiveMessage,
) -> Result<Vec<Value>, Failure> {
    let queue = queues.get_mut(name).ok_or_else(Failure::no_queue)?;
    queue.advance();
    let visibility = visibility.unwrap_or(queue.settings.visibility_timeout);
    let redrive = queue.settings.redrive.clone();
    let (mut received, mut dead) = (Vec::new(), Vec::new());
    while received.len() < limit {
        let Some(&seq) = queue.visible.first() else {
            break;
        };
        let deliveries = queue.messages.get(&seq).map_or(0, |message| message.receives);
        if redrive.as_ref().is_some_and(|redrive| deliveries >= redrive.max_receives) {
            dead.extend(queue.remove(seq));
        } else if let Some(message) = queue.receive(seq, visibility, input) {
            received.push(message);
        } else {
            queue.unindex(seq);
        }
    }
    if let Some(target) = redrive.and_then(|redrive| queues.get_mut(redrive.target_name())) {
        for message in dead {
            // In the dead-letter queue it is a new message, but retention is measured from the first send.
            let source = Some(arn(name));
            let moved = Message { receives: 0, first_received: None, receipt: None, source, ..message };
            target.add(moved, Visibility::Visible);
        }
    }
    Ok(received)
}

/// The attribute `RedrivePolicy`. Queues cannot be deleted, so the target exists.
#[derive(Clone, Debug, PartialEq)]
struct Redrive {
    target: String,
    max_receives: u32,
}

impl Redrive {
    fn parse(text: &str) -> Option<Self> {
        let policy: Value = serde_json::from_str(text).ok()?;
        let target = policy.get("deadLetterTargetArn")?.as_str()?.to_owned();
        // Clients write the number as a JSON number or as a string.
        let max_receives = match policy.get("maxReceiveCount")? {
            Value::String(text) => text.parse().ok()?,
            other => u32::try_from(other.as_u64()?).ok()?,
        };
        (1..=1000).contains(&max_receives).then_some(Self { target, max_receives })
    }

    fn target_name(&self) -> &str {
        self.target.rsplit(':').next().unwrap_or_default()
    }
}

/// The attributes of a queue that can be set: `VisibilityTimeout` and `RedrivePolicy`.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Settings {
    visibility_timeout: Duration,
    redrive: Option<Redrive>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { visibility_timeout: Duration::from_secs(30), redrive: None }
    }
}

impl Settings {
    pub(super) fn change(&mut self, attributes: &BTreeMap<String, String>, queues: &Queues) -> Result<(), Failure> {
        for (name, value) in attributes {
            let invalid = |reason: &str| Failure::attribute_value(name, reason);
            match name.as_str() {
                "VisibilityTimeout" => {
                    let seconds = value.parse().ok().filter(|seconds| *seconds <= MAX_VISIBILITY_SECONDS);
                    let reason = format!("Must be between 0 and {MAX_VISIBILITY_SECONDS}.");
                    self.visibility_timeout = Duration::from_secs(seconds.ok_or_else(|| invalid(&reason))?);
                }
                "RedrivePolicy" if value.is_empty() => self.redrive = None,
                "RedrivePolicy" => {
                    let reason = "It needs deadLetterTargetArn and maxReceiveCount, from 1 to 1000.";
                    let redrive = Redrive::parse(value).ok_or_else(|| invalid(reason))?;
                    if redrive.target != arn(redrive.target_name()) || !queues.contains_key(redrive.target_name()) {
                        return Err(Failure::parameter(format!(
                            "Value {value} for parameter RedrivePolicy is invalid. Reason: Dead letter target does not exist."
                        )));
                    }
                    self.redrive = Some(redrive);
                }
                _ => return Err(Failure::unknown_attribute(name)),
            }
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug)]
enum Visibility {
    Visible,
    Delayed(Instant),
    InFlight(Instant),
}

/// A message. Times are in milliseconds since 1970, as in responses.
struct Message {
    id: Uuid,
    body: String,
    sent: u64,
    first_received: Option<u64>,
    receives: u32,
    /// Identifies the last receive. Only its receipt handle is valid.
    receipt: Option<Uuid>,
    /// The ARN of the queue from which a dead-letter message was moved.
    source: Option<String>,
}

pub(super) struct Queue {
    pub(super) name: String,
    pub(super) settings: Settings,
    next_seq: u64,
    messages: BTreeMap<u64, Message>,
    visible: BTreeSet<u64>,
    /// Delayed messages and messages in flight, by the time at which they become visible.
    hidden: BTreeSet<(Instant, u64)>,
    /// The state of each message, which is also indexed in `visible` and `hidden`.
    visibility: BTreeMap<u64, Visibility>,
    /// Notified when a waiting receive has to read the queue again.
    pub(super) changed: Arc<Notify>,
}

impl Queue {
    pub(super) fn new(name: String, settings: Settings) -> Self {
        Self {
            name,
            settings,
            next_seq: 0,
            messages: BTreeMap::new(),
            visible: BTreeSet::new(),
            hidden: BTreeSet::new(),
            visibility: BTreeMap::new(),
            changed: Arc::default(),
        }
    }

    fn add(&mut self, message: Message, visibility: Visibility) {
        let seq = self.next_seq;
        self.next_seq += 1;
        self.messages.insert(seq, message);
        self.set_visibility(seq, visibility);
    }

    fn set_visibility(&mut self, seq: u64, visibility: Visibility) {
        self.unindex(seq);
        let notify = match visibility {
            Visibility::Visible => self.visible.insert(seq),
            Visibility::Delayed(until) | Visibility::InFlight(until) => {
                // Waiting receives have timers for the first change of the queue, so only an earlier change needs a notification.
                let is_first = self.next_change().is_none_or(|first| until < first);
                self.hidden.insert((until, seq));
                is_first
            }
        };
        self.visibility.insert(seq, visibility);
        if notify {
            self.changed.notify_waiters();
        }
    }

    fn unindex(&mut self, seq: u64) {
        match self.visibility.remove(&seq) {
            Some(Visibility::Visible) => {
                self.visible.remove(&seq);
            }
            Some(Visibility::Delayed(until) | Visibility::InFlight(until)) => {
                self.hidden.remove(&(until, seq));
            }
            None => {}
        }
    }

    fn remove(&mut self, seq: u64) -> Option<Message> {
        self.unindex(seq);
        self.messages.remove(&seq)
    }

    pub(super) fn clear(&mut self) {
        self.messages.clear();
        self.visible.clear();
        self.hidden.clear();
        self.visibility.clear();
    }

    pub(super) fn next_change(&self) -> Option<Instant> {
        self.hidden.first().map(|(until, _)| *until)
    }

    /// Makes hidden messages visible whose time has passed, and removes expired messages.
    pub(super) fn advance(&mut self) {
        let now = Instant::now();
        while let Some(&(until, seq)) = self.hidden.first() {
            if until > now {
                break;
            }
            // No notification is needed: waiting receives have a timer for this time.
            self.hidden.remove(&(until, seq));
            self.visible.insert(seq);
            self.visibility.insert(seq, Visibility::Visible);
        }
        let oldest = now_millis().saturating_sub(RETENTION_MILLIS);
        while let Some((&seq, _)) = self.messages.first_key_value().filter(|(_, message)| message.sent < oldest) {
            self.remove(seq);
        }
    }

    pub(super) fn attributes(&self) -> BTreeMap<String, Value> {
        let delayed = self.visibility.values().filter(|state| matches!(state, Visibility::Delayed(_))).count();
        let mut all: BTreeMap<_, _> = [
            ("QueueArn", arn(&self.name)),
            ("VisibilityTimeout", self.settings.visibility_timeout.as_secs().to_string()),
            ("ApproximateNumberOfMessages", self.visible.len().to_string()),
            ("ApproximateNumberOfMessagesNotVisible", (self.hidden.len() - delayed).to_string()),
            ("ApproximateNumberOfMessagesDelayed", delayed.to_string()),
        ]
        .into();
        if let Some(Redrive { target, max_receives }) = &self.settings.redrive {
            let policy = json!({ "deadLetterTargetArn": target, "maxReceiveCount": max_receives });
            all.insert("RedrivePolicy", policy.to_string());
        }
        all.into_iter().map(|(name, value)| (name.to_owned(), Value::String(value))).collect()
    }

    pub(super) fn send(&mut self, new: NewMessage) -> Outcome {
        if new.message_body.len() > MAX_BYTES {
            return Err(Failure::parameter(format!(
                "One or more parameters are invalid. Reason: Message must be shorter than {MAX_BYTES} bytes."
            )));
        }
        if new.message_body.is_empty() {
            return Err(Failure::missing("MessageBody"));
        }
        if !new.message_body.chars().all(is_allowed_in_xml) {
            let message = "Invalid characters found. Valid unicode characters are #x9 | #xA | #xD | #x20 to #xD7FF | #xE000 to #xFFFD | #x10000 to #x10FFFF";
            return Err(Failure::sqs("InvalidMessageContents", "InvalidMessageContents", message));
        }
        if !new.message_attributes.is_empty() || !new.message_system_attributes.is_empty() {
            return Err(Failure::prefixed(
                "UnsupportedOperation",
                "The embedded SQS does not support message attributes.",
            ));
        }
        if new.message_group_id.is_some_and(|group| !is_group(&group)) {
            return Err(Failure::parameter(
                "The request include parameter that is not valid for this queue type. Reason: MessageGroupId can only include alphanumeric and punctuation characters. 1 to 128 in length".to_owned(),
            ));
        }
        let delay = seconds("DelaySeconds", new.delay_seconds.unwrap_or_default(), MAX_DELAY_SECONDS)?;
        let message = Message {
            id: Uuid::new_v4(),
            body: new.message_body,
            sent: now_millis(),
            first_received: None,
            receives: 0,
            receipt: None,
            source: None,
        };
        let output = json!({ "MessageId": message.id, "MD5OfMessageBody": digest(&message.body) });
        let visibility =
            if delay.is_zero() { Visibility::Visible } else { Visibility::Delayed(Instant::now() + delay) };
        self.add(message, visibility);
        Ok(output)
    }

    fn receive(&mut self, seq: u64, visibility: Duration, input: &ReceiveMessage) -> Option<Value> {
        let receipt = Uuid::new_v4();
        let message = self.messages.get_mut(&seq)?;
        message.receives = message.receives.saturating_add(1);
        let first_received = *message.first_received.get_or_insert(now_millis());
        message.receipt = Some(receipt);

        let mut attributes = BTreeMap::from([
            ("SenderId", ACCOUNT.to_owned()),
            ("SentTimestamp", message.sent.to_string()),
            ("ApproximateReceiveCount", message.receives.to_string()),
            ("ApproximateFirstReceiveTimestamp", first_received.to_string()),
        ]);
        if let Some(source) = &message.source {
            attributes.insert("DeadLetterQueueSourceArn", source.clone());
        }
        attributes.retain(|name, _| {
            let mut requested = input.attribute_names.iter().chain(&input.message_system_attribute_names);
            requested.any(|requested| requested == "All" || requested == name)
        });
        let mut output = json!({
            "MessageId": message.id,
            "ReceiptHandle": STANDARD.encode(format!("{}/{seq}/{receipt}", self.name)),
            "MD5OfBody": digest(&message.body),
            "Body": message.body,
        });
        if !attributes.is_empty() {
            output["Attributes"] = json!(attributes);
        }
        // In flight even with a timeout of zero, so that one receive does not return the message twice.
        self.set_visibility(seq, Visibility::InFlight(Instant::now() + visibility));
        Some(output)
    }

    /// The message of a receipt handle; `None` if it is deleted or was received again since.
    fn message_of(&self, handle: &str) -> Result<Option<u64>, Failure> {
        let parse = || {
            let text = String::from_utf8(STANDARD.decode(handle).ok()?).ok()?;
            let mut parts = text.split('/');
            let (queue, seq, receipt) = (parts.next()?, parts.next()?, parts.next()?);
            (queue == self.name).then_some((seq.parse::<u64>().ok()?, receipt.parse::<Uuid>().ok()?))
        };
        let (seq, receipt) = parse().ok_or_else(|| {
            let message = format!("The input receipt handle \"{handle}\" is not a valid receipt handle.");
            Failure::sqs("ReceiptHandleIsInvalid", "ReceiptHandleIsInvalid", message)
        })?;
        let is_current = self.messages.get(&seq).is_some_and(|message| message.receipt == Some(receipt));
        Ok(is_current.then_some(seq))
    }

    pub(super) fn delete(&mut self, receipt_handle: &str) -> Outcome {
        self.advance();
        // As on AWS, an outdated handle is not an error, but deletes nothing.
        if let Some(seq) = self.message_of(receipt_handle)? {
            self.remove(seq);
        }
        Ok(json!({}))
    }
}

/// Whether a text is a valid `MessageGroupId`.
fn is_group(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// The characters that XML 1.0 allows, and therefore SQS.
fn is_allowed_in_xml(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | ' '..='\u{FFFD}' | '\u{10000}'..)
}

/// The MD5 digest of a body, which SDKs compare with that of the message they sent or received.
fn digest(body: &str) -> String {
    Md5::digest(body).iter().fold(String::new(), |hex, byte| hex + &format!("{byte:02x}"))
}
