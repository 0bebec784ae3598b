//! A model of SQS: standard queues with fair delivery between message groups, delays, visibility timeouts, dead letters, duplicates and
//! another order than that of sending.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use md5::{Digest as _, Md5};
use serde_json::{Map, Value, json};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::sdk_client::{REGION, SQS, hash_of};
use super::{Call, Clock, Decider, Faults, Happened, detached, lock, pause};
use crate::net::{Failure, Pending, Reply, Request, Server};

const ACCOUNT: &str = "000000000000";
/// Milliseconds.
const LATENCY: [u64; 2] = [5, 50];
/// How often SQS delivers a message of a group with many messages in flight, although one of another group waits.
const UNFAIR: f64 = 0.05;
/// Messages are lost after four days, SQS's default.
const RETENTION: Duration = Duration::from_secs(4 * 24 * 3600);

/// Counted requests and messages of a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Requests that send, each for up to ten messages.
    pub send_requests: u64,
    /// Requests that received at least one message.
    pub receive_requests: u64,
    pub delete_requests: u64,
    pub sent: u64,
    pub received: u64,
    pub deleted: u64,
    pub dead_letters: u64,
}

/// The messages of a queue at one time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depth {
    pub visible: usize,
    /// Messages that were sent with a delay that is not over.
    pub delayed: usize,
    /// Messages that were received and are hidden.
    pub in_flight: usize,
}

/// A message as its receiver gets it.
#[derive(Clone, Debug)]
pub struct Received {
    pub id: String,
    pub receipt: String,
    pub body: String,
    pub group: Option<String>,
    pub receives: u32,
    pub sent_at: Duration,
    pub first_received_at: Duration,
}

#[derive(Clone, Debug)]
struct Message {
    id: String,
    body: String,
    group: Option<String>,
    sent_at: Duration,
    receives: u32,
    first_received_at: Option<Duration>,
    place: Place,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Visible { order: Duration },
    Hidden { until: Duration, in_flight: bool },
}

#[derive(Debug)]
struct Queue {
    name: String,
    visibility: Duration,
    /// The name of the queue of dead letters, and the number of receives.
    redrive: Option<(String, u32)>,
    messages: BTreeMap<u64, Message>,
    /// Visible messages by group, in the order of delivery.
    visible: BTreeMap<String, BTreeSet<(Duration, u64)>>,
    hidden: BTreeSet<(Duration, u64)>,
    in_flight: BTreeMap<String, usize>,
    sequence: u64,
    changed: Arc<Notify>,
    usage: Usage,
}

struct Inner {
    clock: Clock,
    faults: Faults,
    decider: Decider,
    happened: Happened,
    queues: Mutex<BTreeMap<String, Queue>>,
    /// When messages were sent that are delivered late, and their bodies.
    late: Mutex<Vec<(Duration, String)>>,
}

/// SQS. Clones are the same service.
#[derive(Clone)]
pub struct Sqs(Arc<Inner>);

type Answer = Result<Value, (u16, &'static str, String)>;

impl Server for Sqs {
    fn handle(&self, request: Request) -> Pending {
        let service = self.clone();
        Box::pin(async move { service.serve(request).await })
    }
}

/// The ARN of a queue.
pub fn arn(queue: &str) -> String {
    format!("arn:aws:sqs:{REGION}:{ACCOUNT}:{queue}")
}

/// The URL of a queue.
pub fn url(queue: &str) -> String {
    format!("http://{SQS}/{ACCOUNT}/{queue}")
}

impl Sqs {
    pub fn new(seed: u64, clock: Clock, faults: Faults) -> Self {
        Self(Arc::new(Inner {
            clock,
            faults,
            decider: Decider::new(seed, "sqs"),
            happened: Happened::default(),
            queues: Mutex::default(),
            late: Mutex::default(),
        }))
    }

    pub fn happened(&self) -> BTreeMap<&'static str, u64> {
        self.0.happened.all()
    }

    /// The minutes in which calls failed because of an outage, since the simulation began.
    pub fn outages(&self) -> BTreeSet<Duration> {
        let times = self.0.happened.times(self.0.clock, &["outage"]);
        times.into_iter().map(|at| Duration::from_secs(at.as_secs() / 60 * 60)).collect()
    }

    /// When messages were sent that are delivered late, since the simulation began, and their bodies.
    pub fn delays(&self) -> Vec<(Duration, String)> {
        lock(&self.0.late).clone()
    }

    /// By queue.
    pub fn usage(&self) -> BTreeMap<String, Usage> {
        lock(&self.0.queues).iter().map(|(name, queue)| (name.clone(), queue.usage)).collect()
    }

    pub fn depth(&self, name: &str) -> Depth {
        let mut queues = lock(&self.0.queues);
        let Some(queue) = queues.get_mut(name) else { return Depth::default() };
        self.0.advance(queue);
        let in_flight = queue.in_flight.values().sum();
        Depth {
            visible: queue.visible.values().map(BTreeSet::len).sum(),
            delayed: queue.hidden.len() - in_flight,
            in_flight,
        }
    }

    /// The bodies of all messages of a queue.
    pub fn bodies(&self, name: &str) -> Vec<String> {
        let queues = lock(&self.0.queues);
        queues.get(name).into_iter().flat_map(|queue| queue.messages.values()).map(|one| one.body.clone()).collect()
    }

    /// Receives up to `limit` visible messages, for the queue's visibility timeout.
    pub fn receive(&self, name: &str, limit: usize) -> Vec<Received> {
        self.0.receive(&mut lock(&self.0.queues), name, limit, None)
    }

    /// Deletes a message. With the receipt of an earlier receive it has no effect, which SQS does not report.
    pub fn delete(&self, name: &str, receipt: &str) {
        let mut queues = lock(&self.0.queues);
        let Some(queue) = queues.get_mut(name) else { return };
        queue.usage.delete_requests += 1;
        let mut numbers = receipt.rsplit('-').map(|number| number.parse::<u64>().unwrap_or_default());
        let (receives, sequence) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
        if queue.messages.get(&sequence).is_some_and(|message| u64::from(message.receives) == receives) {
            queue.remove(sequence);
            queue.usage.deleted += 1;
        }
    }

    /// Waits until a message may be visible that was not when the function was called, or until `latest`.
    pub async fn changed(&self, name: &str, latest: Instant) {
        let (notify, next) = {
            let queues = lock(&self.0.queues);
            let queue = queues.get(name).expect("a queue");
            let next = queue.hidden.first().map(|(at, _)| *at);
            (queue.changed.clone(), next)
        };
        let wake_at = next.map_or(latest, |next| {
            latest.min(Instant::now() + next.saturating_sub(self.0.clock.elapsed()) + Duration::from_millis(1))
        });
        let _either = tokio::time::timeout_at(wake_at, notify.notified()).await;
    }

    async fn serve(self, request: Request) -> Reply {
        let target = request.headers.get("x-amz-target").and_then(|target| target.to_str().ok()).unwrap_or_default();
        let operation = target.rsplit('.').next().unwrap_or_default().to_owned();
        let body: Value = serde_json::from_slice(&request.body).expect("the SDK sends JSON");
        if matches!(&*operation, "CreateQueue" | "GetQueueAttributes" | "SetQueueAttributes") {
            return Ok(respond(0, Ok(self.0.control(&operation, &body))));
        }
        let (inner, faults) = (self.0.clone(), self.0.faults.clone());
        let call = inner.decider.call(&(&*operation, hash_of(&body)));
        if call.happens("refused", faults.refused) {
            inner.happened.count("refused");
            return Err(Failure::Refused);
        }
        let [there, back] = call.latency(&faults, LATENCY);
        pause(there).await;
        let internal = || Err((500, "InternalFailure", "Internal failure".to_owned()));
        let is_hung = call.happens("hung", faults.hung);
        if is_hung && call.happens("hung before the effect", 0.5) {
            inner.happened.count("hung");
            return Err(Failure::Hang);
        }
        let answer = if inner.decider.is_out(&faults, call, inner.clock.elapsed()) {
            inner.happened.count("outage");
            internal()
        } else if call.happens("failed", faults.failed) {
            inner.happened.count("failed");
            internal()
        } else if call.happens("throttled", faults.throttled) {
            inner.happened.count("throttled");
            Err((400, "RequestThrottled", "Rate exceeded".to_owned()))
        } else if operation == "ReceiveMessage" {
            // A client that is gone receives nothing.
            self.receive_message(&body).await
        } else {
            let service = self.clone();
            detached(async move {
                if let Some(stall) = call.stall(&service.0.faults) {
                    service.0.happened.count("stalled");
                    pause(stall).await;
                }
                service.effect(&operation, &body, call)
            })
            .await
        };
        if is_hung {
            inner.happened.count("hung");
            return Err(Failure::Hang);
        }
        pause(back).await;
        if answer.is_ok() && call.happens("lost", faults.lost) {
            inner.happened.count("lost");
            if call.happens("cut", 0.5) {
                return Err(Failure::Cut);
            }
            return Ok(respond(call.id(), internal()));
        }
        Ok(respond(call.id(), answer))
    }

    fn effect(&self, operation: &str, body: &Value, call: Call) -> Answer {
        let name = queue_name(body);
        match operation {
            "DeleteMessage" => {
                self.delete(&name, body["ReceiptHandle"].as_str().unwrap_or_default());
                return Ok(json!({}));
            }
            "PurgeQueue" => {
                if let Some(queue) = lock(&self.0.queues).get_mut(&name) {
                    for sequence in queue.messages.keys().copied().collect::<Vec<_>>() {
                        queue.remove(sequence);
                    }
                }
                return Ok(json!({}));
            }
            _ => {}
        }
        let mut queues = lock(&self.0.queues);
        let Some(queue) = queues.get_mut(&name) else {
            return Err((400, "QueueDoesNotExist", "The specified queue does not exist.".to_owned()));
        };
        match operation {
            "SendMessage" => {
                queue.usage.send_requests += 1;
                Ok(self.0.send(queue, body, call, 0))
            }
            "SendMessageBatch" => {
                queue.usage.send_requests += 1;
                let (mut successful, mut failed) = (Vec::new(), Vec::new());
                let entries = body["Entries"].as_array().into_iter().flatten();
                for (number, entry) in entries.enumerate() {
                    if call.happens(&format!("refused {number}"), self.0.faults.unprocessed) {
                        self.0.happened.count("entry_failed");
                        failed.push(json!({ "Id": entry["Id"], "Code": "InternalError", "SenderFault": false }));
                        continue;
                    }
                    let mut sent = self.0.send(queue, entry, call, number);
                    sent["Id"] = entry["Id"].clone();
                    successful.push(sent);
                }
                Ok(json!({ "Successful": successful, "Failed": failed }))
            }
            other => panic!("the model of SQS has no {other}"),
        }
    }

    async fn receive_message(&self, body: &Value) -> Answer {
        let name = queue_name(body);
        let limit = body["MaxNumberOfMessages"].as_u64().unwrap_or(1);
        let limit = usize::try_from(limit).unwrap_or(1);
        let visibility = body["VisibilityTimeout"].as_u64().map(Duration::from_secs);
        let end = Instant::now() + Duration::from_secs(body["WaitTimeSeconds"].as_u64().unwrap_or_default());
        loop {
            let received = self.0.receive(&mut lock(&self.0.queues), &name, limit, visibility);
            if !received.is_empty() || Instant::now() >= end {
                let messages: Vec<Value> = received.iter().map(|message| message.to_json(&self.0.clock)).collect();
                return Ok(if messages.is_empty() { json!({}) } else { json!({ "Messages": messages }) });
            }
            self.changed(&name, end).await;
        }
    }
}

impl Received {
    fn attributes(&self, clock: &Clock) -> Map<String, Value> {
        let millis =
            |at: Duration| (u128::from(clock.unix_millis()) + at.as_millis() - clock.elapsed().as_millis()).to_string();
        let mut attributes = Map::new();
        attributes.insert("ApproximateReceiveCount".to_owned(), self.receives.to_string().into());
        attributes.insert("SentTimestamp".to_owned(), millis(self.sent_at).into());
        attributes.insert("SenderId".to_owned(), ACCOUNT.into());
        attributes.insert("ApproximateFirstReceiveTimestamp".to_owned(), millis(self.first_received_at).into());
        if let Some(group) = &self.group {
            attributes.insert("MessageGroupId".to_owned(), group.clone().into());
        }
        attributes
    }

    fn to_json(&self, clock: &Clock) -> Value {
        json!({
            "MessageId": self.id,
            "ReceiptHandle": self.receipt,
            "MD5OfBody": md5(&self.body),
            "Body": self.body,
            "Attributes": self.attributes(clock),
        })
    }

    /// The record of an event that Lambda passes to a function.
    pub fn to_record(&self, clock: &Clock, queue: &str) -> Value {
        json!({
            "messageId": self.id,
            "receiptHandle": self.receipt,
            "body": self.body,
            "attributes": self.attributes(clock),
            "messageAttributes": {},
            "md5OfBody": md5(&self.body),
            "eventSource": "aws:sqs",
            "eventSourceARN": arn(queue),
            "awsRegion": REGION,
        })
    }
}

impl Inner {
    /// Operations on queues. They have no faults.
    fn control(&self, operation: &str, body: &Value) -> Value {
        let mut queues = lock(&self.queues);
        match operation {
            "CreateQueue" => {
                let name = body["QueueName"].as_str().unwrap_or_default().to_owned();
                let queue = queues.entry(name.clone()).or_insert_with(|| Queue::new(&name));
                queue.set(&body["Attributes"]);
                json!({ "QueueUrl": url(&name) })
            }
            "SetQueueAttributes" => {
                queues.get_mut(&queue_name(body)).expect("a queue").set(&body["Attributes"]);
                json!({})
            }
            _ => {
                let name = queue_name(body);
                let queue = queues.get_mut(&name).expect("a queue");
                self.advance(queue);
                let in_flight: usize = queue.in_flight.values().sum();
                let visible: usize = queue.visible.values().map(BTreeSet::len).sum();
                let mut attributes = json!({
                    "QueueArn": arn(&name),
                    "VisibilityTimeout": queue.visibility.as_secs().to_string(),
                    "ApproximateNumberOfMessages": visible.to_string(),
                    "ApproximateNumberOfMessagesNotVisible": in_flight.to_string(),
                    "ApproximateNumberOfMessagesDelayed": (queue.hidden.len() - in_flight).to_string(),
                });
                let names = body["AttributeNames"].as_array().cloned().unwrap_or_default();
                if let Some(attributes) = attributes.as_object_mut() {
                    attributes.retain(|name, _| names.iter().any(|wanted| wanted == "All" || wanted == name.as_str()));
                }
                json!({ "Attributes": attributes })
            }
        }
    }

    fn send(&self, queue: &mut Queue, message: &Value, call: Call, number: usize) -> Value {
        let decision = |name: &str| format!("{name} {number}");
        let now = self.clock.elapsed();
        let body = message["MessageBody"].as_str().unwrap_or_default().to_owned();
        let mut until = now + Duration::from_secs(message["DelaySeconds"].as_u64().unwrap_or_default());
        if call.happens(&decision("delayed"), self.faults.delayed) {
            self.happened.count("delivered_late");
            lock(&self.late).push((now, body.clone()));
            until += Duration::from_secs(60).mul_f64(call.random(&decision("delay")));
        }
        let id = format!("{:016x}-{number}-{}", call.id(), queue.sequence);
        let sent = json!({ "MessageId": id, "MD5OfMessageBody": md5(&body) });
        queue.usage.sent += 1;
        queue.add(Message {
            id,
            body,
            group: message["MessageGroupId"].as_str().map(ToOwned::to_owned),
            sent_at: now,
            receives: 0,
            first_received_at: None,
            place: Place::Hidden { until, in_flight: false },
        });
        queue.changed.notify_waiters();
        sent
    }

    /// Lets messages whose delay or visibility timeout is over become visible.
    fn advance(&self, queue: &mut Queue) {
        let now = self.clock.elapsed();
        while let Some((until, sequence)) = queue.hidden.first().copied().filter(|(until, _)| *until <= now) {
            let Some(mut message) = queue.remove(sequence) else { continue };
            if now.saturating_sub(message.sent_at) > RETENTION {
                continue;
            }
            let random = self.decider.random(&("order", &queue.name, sequence, message.receives));
            message.place = Place::Visible { order: until + self.faults.reordering.mul_f64(random) };
            queue.insert(sequence, message);
        }
    }

    fn receive(
        &self,
        queues: &mut BTreeMap<String, Queue>,
        name: &str,
        limit: usize,
        visibility: Option<Duration>,
    ) -> Vec<Received> {
        let now = self.clock.elapsed();
        let (mut received, mut dead) = (Vec::new(), Vec::new());
        let Some(queue) = queues.get_mut(name) else { return received };
        self.advance(queue);
        let visibility = visibility.unwrap_or(queue.visibility);
        while received.len() < limit {
            let Some(sequence) = self.next(queue) else { break };
            let Some(mut message) = queue.remove(sequence) else { break };
            if queue.redrive.as_ref().is_some_and(|(_, most)| message.receives >= *most) {
                queue.usage.dead_letters += 1;
                dead.push(message);
                continue;
            }
            message.receives += 1;
            let call = Call(self.decider.call(&("receive", &queue.name, sequence)).id());
            let first = *message.first_received_at.get_or_insert(now);
            message.place = Place::Hidden { until: now + visibility, in_flight: true };
            received.push(Received {
                id: message.id.clone(),
                receipt: format!("{name}-{sequence}-{}", message.receives),
                body: message.body.clone(),
                group: message.group.clone(),
                receives: message.receives,
                sent_at: message.sent_at,
                first_received_at: first,
            });
            if call.happens("duplicated", self.faults.duplicated) {
                // A server of SQS that missed the receive delivers its copy too, and does not learn of the deletion.
                self.happened.count("duplicated");
                let delay = call.duration("delay of duplicate", Duration::from_millis(10), Duration::from_secs(60));
                let place = Place::Hidden { until: now + delay, in_flight: false };
                queue.add(Message { place, ..message.clone() });
            }
            queue.insert(sequence, message);
        }
        if !received.is_empty() {
            queue.usage.receive_requests += 1;
            queue.usage.received += u64::try_from(received.len()).unwrap_or_default();
        }
        if let Some((target, _)) = queue.redrive.clone().filter(|_| !dead.is_empty()) {
            let target = queues.get_mut(&target).expect("the queue of dead letters");
            for message in dead {
                self.happened.count("dead_letter");
                let place = Place::Hidden { until: now, in_flight: false };
                target.add(Message { place, receives: 0, first_received_at: None, ..message });
            }
            target.changed.notify_waiters();
        }
        received
    }

    /// The message that is delivered next. Groups with more than their share of messages in flight come last: a tenant with many
    /// messages does not delay those of others.
    fn next(&self, queue: &Queue) -> Option<u64> {
        let heads = queue.visible.iter().filter_map(|(group, messages)| Some((group, messages.first().copied()?)));
        let (in_flight, groups): (usize, usize) = (queue.in_flight.values().sum(), queue.visible.len());
        let oldest = heads.clone().map(|(_, head)| head).min()?;
        if self.decider.random(&("unfair", &queue.name, oldest.1, in_flight)) < UNFAIR {
            return Some(oldest.1);
        }
        let is_noisy = |group: &String| {
            let own = queue.in_flight.get(group).copied().unwrap_or_default();
            own >= 2 && own * groups.max(2) > in_flight
        };
        heads.map(|(group, head)| (is_noisy(group), head)).min().map(|(_, (_, sequence))| sequence)
    }
}

impl Queue {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            visibility: Duration::from_secs(30),
            redrive: None,
            messages: BTreeMap::new(),
            visible: BTreeMap::new(),
            hidden: BTreeSet::new(),
            in_flight: BTreeMap::new(),
            sequence: 0,
            changed: Arc::default(),
            usage: Usage::default(),
        }
    }

    fn set(&mut self, attributes: &Value) {
        if let Some(seconds) = attributes["VisibilityTimeout"].as_str().and_then(|text| text.parse().ok()) {
            self.visibility = Duration::from_secs(seconds);
        }
        if let Some(policy) = attributes["RedrivePolicy"].as_str() {
            let policy: Value = serde_json::from_str(policy).expect("a redrive policy");
            let target = policy["deadLetterTargetArn"].as_str().and_then(|arn| arn.rsplit(':').next());
            let most = policy["maxReceiveCount"].as_u64().and_then(|most| u32::try_from(most).ok());
            self.redrive = Some((target.expect("a queue").to_owned(), most.expect("a number")));
        }
    }

    fn add(&mut self, message: Message) {
        self.sequence += 1;
        self.insert(self.sequence, message);
    }

    fn insert(&mut self, sequence: u64, message: Message) {
        let group = message.group.clone().unwrap_or_default();
        match message.place {
            Place::Visible { order } => drop(self.visible.entry(group).or_default().insert((order, sequence))),
            Place::Hidden { until, in_flight } => {
                self.hidden.insert((until, sequence));
                if in_flight {
                    *self.in_flight.entry(group).or_default() += 1;
                }
            }
        }
        self.messages.insert(sequence, message);
    }

    fn remove(&mut self, sequence: u64) -> Option<Message> {
        let message = self.messages.remove(&sequence)?;
        let group = message.group.clone().unwrap_or_default();
        match message.place {
            Place::Visible { order } => {
                if let Some(messages) = self.visible.get_mut(&group) {
                    messages.remove(&(order, sequence));
                    if messages.is_empty() {
                        self.visible.remove(&group);
                    }
                }
            }
            Place::Hidden { until, in_flight } => {
                self.hidden.remove(&(until, sequence));
                if in_flight && let Some(count) = self.in_flight.get_mut(&group) {
                    *count -= 1;
                    if *count == 0 {
                        self.in_flight.remove(&group);
                    }
                }
            }
        }
        Some(message)
    }
}

fn queue_name(body: &Value) -> String {
    body["QueueUrl"].as_str().and_then(|url| url.rsplit('/').next()).unwrap_or_default().to_owned()
}

fn md5(text: &str) -> String {
    let mut hexadecimal = String::with_capacity(32);
    for byte in Md5::digest(text.as_bytes()) {
        let _infallible = write!(hexadecimal, "{byte:02x}");
    }
    hexadecimal
}

fn respond(id: u64, answer: Answer) -> http::Response<Bytes> {
    let response = http::Response::builder()
        .header("content-type", "application/x-amz-json-1.0")
        .header("x-amzn-requestid", format!("{id:016x}"));
    let response = match answer {
        Ok(body) => response.status(200).body(Bytes::from(body.to_string())),
        Err((status, kind, message)) => {
            let body = json!({ "__type": format!("com.amazonaws.sqs#{kind}"), "message": message });
            response.status(status).body(Bytes::from(body.to_string()))
        }
    };
    response.expect("a response")
}
