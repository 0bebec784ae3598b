//! A model of DynamoDB. [`Engine`] executes calls; the model adds what makes DynamoDB hard to use:
//!
//! - Secondary indexes lag, each by a delay of its own that changes with time, and items overtake each other. The tables have no indexes.
//!   Each index is a *shadow table*, into which items are copied when their delay is over, so an index is never a consistent snapshot.
//! - A read without `ConsistentRead` is sometimes served by a late replica, which is a shadow table too.
//! - Partitions are throttled, transactions conflict, batches stay unprocessed, calls take effect and fail.
//! - Items expire hours late.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Map, Value, json};

use super::engine::{Done, Engine, Written};
use super::sdk_client::hash_of;
use super::{Call, Clock, Decider, Faults, Happened, detached, lock, pause};
use crate::net::{Failure, Pending, Reply, Request, Server};
use crate::{cost, dice};

/// The number of writes of a table after which the delays of its indexes change.
const WRITES_PER_DELAY: u64 = 5;
/// The period of time in which a partition is throttled at most once.
const BURST_PERIOD: Duration = Duration::from_secs(20);
/// What DynamoDB allows of a partition in a second.
const PARTITION_READS: f64 = 3000.0;
const PARTITION_WRITES: f64 = 1000.0;
/// Milliseconds.
const LATENCY: [u64; 2] = [2, 30];
/// The items of a shadow that no one has read for some time.
const MOST_PENDING: usize = 2000;
/// How long a transaction's token is known.
const TOKEN_LIFETIME: Duration = Duration::from_secs(600);

/// The values of an item's key. The second one is empty in a table without a sort key.
pub(super) type Key = [String; 2];

/// A partition of a table or of an index: the shadow's name and the partition key.
type Partition = (String, String);

/// Counted calls of an operation on a table.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Usage {
    pub calls: u64,
    pub read_units: f64,
    pub write_units: f64,
}

impl Usage {
    fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.read_units += other.read_units;
        self.write_units += other.write_units;
    }
}

/// The load of a partition in one second.
#[derive(Clone, Copy, Debug, Default)]
struct Load {
    second: u64,
    reads: f64,
    writes: f64,
    /// The highest units of a second, relative to what DynamoDB allows.
    peak: f64,
}

#[derive(Debug, Default)]
struct State {
    tables: BTreeMap<String, Table>,
    writes: u64,
    /// Items in transactions that are in progress.
    locked: BTreeSet<(String, Key)>,
    /// The tokens of these transactions.
    tokens: BTreeSet<String>,
    /// Transactions by their token, and the tokens in the order of time.
    transacted: BTreeMap<String, Transacted>,
    transacted_at: VecDeque<(Duration, String)>,
    loads: BTreeMap<Partition, Load>,
    /// Items that may have expired, by the time at which they are removed.
    expiring: BTreeMap<(Duration, u64), (String, Key)>,
    /// By the function that calls, table and operation. A call that concerns several tables is counted for the first one.
    usage: BTreeMap<(&'static str, String, String), Usage>,
    /// The calls that had their effect when their callers no longer waited for it.
    late: Vec<Value>,
}

/// A transaction that was written, and which its client may repeat with the same token.
#[derive(Clone, Debug)]
struct Transacted {
    actions: u64,
    answer: Value,
}

#[derive(Debug)]
struct Table {
    /// The names of the key's attributes.
    key: Vec<String>,
    indexes: Vec<Index>,
    /// What eventually consistent reads may read.
    replica: Shadow,
    /// The attribute with the time at which an item expires.
    expires: Option<String>,
}

#[derive(Debug)]
struct Index {
    name: String,
    partition_key: String,
    sort_key: Option<String>,
    /// The attributes of an entry; `None` if all.
    attributes: Option<BTreeSet<String>>,
    shadow: Shadow,
    entries: BTreeMap<Key, Entry>,
}

/// The entry of an item in an index, once the index has caught up.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    partition: String,
    sort: String,
    hash: u64,
    size: usize,
}

#[derive(Debug, Default)]
struct Shadow {
    name: String,
    /// Never without copies.
    pending: BTreeMap<Key, Vec<Copy>>,
    /// The times at which copies of these items are due. Some may have been made already.
    due: BTreeSet<(Duration, Key)>,
    /// The version of each item in the shadow table.
    copied: BTreeMap<Key, u64>,
}

/// The items that are copied into a shadow table.
enum Wanted<'a> {
    All,
    Items(&'a BTreeSet<Key>),
    Partition(&'a str),
}

/// An item that will be in a shadow table.
#[derive(Clone, Debug)]
struct Copy {
    due_at: Duration,
    version: u64,
    /// `None` if the item was deleted.
    item: Option<Arc<Value>>,
}

struct Inner {
    engine: Mutex<Engine>,
    clock: Clock,
    faults: Faults,
    decider: Decider,
    happened: Happened,
    state: Mutex<State>,
}

/// DynamoDB. Clones are the same service.
#[derive(Clone)]
pub struct DynamoDb(Arc<Inner>);

/// An error response.
#[derive(Debug)]
pub(super) struct Refusal {
    pub status: u16,
    pub body: String,
    /// The size in bytes of the item for which a condition does not hold; 0 if there is none.
    failed_condition: Option<usize>,
}

impl Refusal {
    pub(super) fn new(status: u16, kind: &str, message: &str) -> Self {
        let body = json!({ "__type": format!("com.amazonaws.dynamodb.v20120810#{kind}"), "message": message });
        Self { status, body: body.to_string(), failed_condition: None }
    }

    /// A condition does not hold for the present item, which is shown if it is wanted.
    pub(super) fn condition_failed(present: Option<&Value>, is_wanted: bool) -> Self {
        let mut body = json!({
            "__type": "com.amazonaws.dynamodb.v20120810#ConditionalCheckFailedException",
            "message": "The conditional request failed",
        });
        if let Some(item) = present.filter(|_| is_wanted) {
            body["Item"] = item.clone();
        }
        Self { status: 400, body: body.to_string(), failed_condition: Some(present.map_or(0, size_of)) }
    }

    fn throttled() -> Self {
        Self::new(400, "ProvisionedThroughputExceededException", "The level of throughput of a partition is exceeded.")
    }

    /// A cancelled transaction of `count` items, of which this one has this reason.
    fn cancelled(count: usize, index: usize, code: &str) -> Self {
        let reason = |number| json!({ "Code": if number == index { code } else { "None" } });
        Self::cancelled_for((0..count).map(reason).collect())
    }

    /// A transaction that was cancelled for these reasons, one for each of its actions.
    pub(super) fn cancelled_for(reasons: Vec<Value>) -> Self {
        let codes: Vec<&str> = reasons.iter().filter_map(|reason| reason["Code"].as_str()).collect();
        let codes = codes.join(", ");
        let body = json!({
            "__type": "com.amazonaws.dynamodb.v20120810#TransactionCanceledException",
            "Message": format!("Transaction cancelled, please refer cancellation reasons for specific reasons [{codes}]"),
            "CancellationReasons": reasons,
        });
        Self { status: 400, body: body.to_string(), failed_condition: None }
    }
}

type Answer = Result<Value, Refusal>;

impl Server for DynamoDb {
    fn handle(&self, request: Request) -> Pending {
        let service = self.clone();
        Box::pin(async move { service.serve(request).await })
    }
}

impl DynamoDb {
    pub fn new(seed: u64, clock: Clock, faults: Faults) -> Self {
        Self(Arc::new(Inner {
            engine: Mutex::default(),
            clock,
            faults,
            decider: Decider::new(seed, "dynamodb"),
            happened: Happened::default(),
            state: Mutex::default(),
        }))
    }

    /// The faults that happened so far.
    pub fn happened(&self) -> BTreeMap<&'static str, u64> {
        self.0.happened.all()
    }

    /// What was consumed so far, by table and operation.
    pub fn usage(&self) -> BTreeMap<(String, String), Usage> {
        let mut usage: BTreeMap<(String, String), Usage> = BTreeMap::new();
        for ((_, table, operation), part) in &lock(&self.0.state).usage {
            usage.entry((table.clone(), operation.clone())).or_default().add(part);
        }
        usage
    }

    /// What was consumed so far, by the function that called.
    pub fn usage_by_caller(&self) -> BTreeMap<&'static str, Usage> {
        let mut usage: BTreeMap<&'static str, Usage> = BTreeMap::new();
        for ((caller, _, _), part) in &lock(&self.0.state).usage {
            usage.entry(caller).or_default().add(part);
        }
        usage
    }

    /// The highest load of a second of each table's and index's busiest partition, relative to what DynamoDB allows a partition.
    pub fn peaks(&self) -> BTreeMap<String, (f64, String)> {
        let mut peaks: BTreeMap<String, (f64, String)> = BTreeMap::new();
        for ((table, partition), load) in &lock(&self.0.state).loads {
            let peak = peaks.entry(table.clone()).or_default();
            if load.peak > peak.0 {
                *peak = (load.peak, partition.clone());
            }
        }
        peaks
    }

    /// The items that were put by calls which had their effect when their callers no longer waited for it.
    pub fn put_late(&self) -> Vec<Value> {
        let put = |call: &Value| -> Vec<Value> {
            let batches = call["RequestItems"].as_object().into_iter().flat_map(|tables| tables.values());
            let requests = batches.filter_map(Value::as_array).flatten();
            let items = requests.map(|request| &request["PutRequest"]["Item"]);
            items.chain([&call["Item"]]).filter(|item| item.is_object()).cloned().collect()
        };
        lock(&self.0.state).late.iter().flat_map(put).collect()
    }

    /// The minutes in which calls failed because of an outage, since the simulation began.
    pub fn outages(&self) -> BTreeSet<Duration> {
        let times = self.0.happened.times(self.0.clock, &["outage"]);
        times.into_iter().map(|at| Duration::from_secs(at.as_secs() / 60 * 60)).collect()
    }

    /// Lets items of a table expire: at the time in this attribute they may be removed. They are removed up to 48 hours later.
    pub fn expire(&self, table: &str, attribute: &str) {
        lock(&self.0.state).tables.get_mut(table).expect("a table").expires = Some(attribute.to_owned());
    }

    /// All items of a table in the order of their keys, current, without a call that is counted.
    pub fn items(&self, table: &str) -> Vec<Value> {
        let mut state = lock(&self.0.state);
        self.0.remove_expired(&mut state);
        drop(state);
        let engine = lock(&self.0.engine);
        engine.items(table).map(|item| (**item).clone()).collect()
    }

    /// The current items of a partition, without a call that is counted.
    pub fn partition(&self, table: &str, partition: &str) -> Vec<Arc<Value>> {
        lock(&self.0.engine).partition(table, partition).cloned().collect()
    }

    /// Lets all indexes and replicas catch up with all writes.
    pub fn catch_up(&self) {
        let mut state = lock(&self.0.state);
        for table in state.tables.values_mut() {
            let shadows = table.indexes.iter_mut().map(|index| &mut index.shadow).chain([&mut table.replica]);
            for shadow in shadows.filter(|shadow| !shadow.name.is_empty()) {
                self.0.copy(shadow, Duration::MAX, &Wanted::All);
            }
        }
    }

    async fn serve(self, request: Request) -> Reply {
        let target = request.headers.get("x-amz-target").and_then(|target| target.to_str().ok()).unwrap_or_default();
        let operation = target.rsplit('.').next().unwrap_or_default().to_owned();
        let body: Value = serde_json::from_slice(&request.body).expect("the SDK sends JSON");
        if operation == "CreateTable" {
            return Ok(respond(0, Ok(self.0.create_table(body))));
        }
        let (inner, faults) = (&self.0, &self.0.faults);
        let call = inner.decider.call(&subject(&operation, &body));
        if call.happens("refused", faults.refused) {
            inner.happened.count("refused");
            return Err(Failure::Refused);
        }
        let [there, back] = call.latency(faults, LATENCY);
        pause(there).await;
        let is_hung = call.happens("hung", faults.hung);
        if is_hung && call.happens("hung before the effect", 0.5) {
            inner.happened.count("hung");
            return Err(Failure::Hang);
        }
        let answer = if inner.decider.is_out(faults, call, inner.clock.elapsed()) {
            inner.happened.count("outage");
            Err(Refusal::new(500, "InternalServerError", "Internal server error"))
        } else if call.happens("failed", faults.failed) {
            inner.happened.count("failed");
            Err(Refusal::new(500, "InternalServerError", "Internal server error"))
        } else {
            detached(cost::charged_to(cost::caller(), inner.clone().execute(operation, body, call))).await
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
            return Ok(respond(call.id(), Err(Refusal::new(500, "InternalServerError", "Internal server error"))));
        }
        Ok(respond(call.id(), answer))
    }
}

fn respond(id: u64, answer: Answer) -> http::Response<Bytes> {
    let (status, body) = match answer {
        Ok(body) => (200, body.to_string()),
        Err(refusal) => (refusal.status, refusal.body),
    };
    let response = http::Response::builder()
        .status(status)
        .header("content-type", "application/x-amz-json-1.0")
        .header("x-amzn-requestid", format!("{id:016x}"))
        .body(Bytes::from(body));
    response.expect("a response")
}

impl Inner {
    /// Executes an operation of the engine.
    fn run(&self, operation: &str, body: &Value) -> Result<Done, Refusal> {
        lock(&self.engine).execute(operation, body)
    }

    /// The response to a call that needs nothing but the engine.
    fn answer(&self, operation: &str, body: &Value) -> Answer {
        self.run(operation, body).map(|done| done.answer)
    }

    /// Creates a table, its indexes and its replica. This has no faults.
    fn create_table(&self, mut body: Value) -> Value {
        let name = text(&body["TableName"]);
        let described = match body["GlobalSecondaryIndexes"].take() {
            Value::Array(indexes) => indexes,
            _ => Vec::new(),
        };
        let key: Vec<String> = elements(&body["KeySchema"]);
        let definitions = body["AttributeDefinitions"].as_array().into_iter().flatten();
        if let Some(other) = { definitions }.find(|definition| definition["AttributeType"] != "S") {
            panic!("the model has keys of strings: {other}");
        }
        let mut engine = lock(&self.engine);
        engine.create(&name, &key, None);
        let mut indexes = Vec::new();
        for described in described {
            let index_key = elements(&described["KeySchema"]);
            let [partition_key, rest @ ..] = &index_key[..] else { panic!("an index without a key") };
            let index_name = text(&described["IndexName"]);
            let shadow = Shadow { name: format!("{name}.{index_name}"), ..Shadow::default() };
            let projection = &described["Projection"];
            let attributes = (projection["ProjectionType"] != "ALL").then(|| {
                let others = projection["NonKeyAttributes"].as_array().into_iter().flatten().map(text);
                key.iter().chain(&index_key).cloned().chain(others).collect()
            });
            engine.create(&shadow.name, &key, Some(&index_key));
            indexes.push(Index {
                name: index_name,
                partition_key: partition_key.clone(),
                sort_key: rest.first().cloned(),
                attributes,
                shadow,
                entries: BTreeMap::new(),
            });
        }
        let mut replica = Shadow::default();
        if self.faults.late_replicas > 0.0 {
            replica.name = format!("{name}.replica");
            engine.create(&replica.name, &key, None);
        }
        drop(engine);
        let created = json!({ "TableDescription": { "TableName": name, "TableStatus": "ACTIVE" } });
        lock(&self.state).tables.insert(name, Table { key, indexes, replica, expires: None });
        created
    }

    /// The service's part of a call.
    async fn execute(self: Arc<Self>, operation: String, mut body: Value, call: Call) -> Answer {
        if let Some(stall) = call.stall(&self.faults) {
            self.happened.count("stalled");
            lock(&self.state).late.push(body.clone());
            pause(stall).await;
        }
        let is_wanted = body["ReturnConsumedCapacity"] == "TOTAL";
        body["ReturnConsumedCapacity"] = "TOTAL".into();
        let answer = match &*operation {
            "GetItem" => self.get(body, call),
            "Query" | "Scan" => self.query(&operation, body, call),
            "BatchGetItem" => self.batch_get(body, call),
            "PutItem" | "UpdateItem" | "DeleteItem" => self.write(&operation, &body, call),
            "BatchWriteItem" => self.batch_write(body, call),
            "TransactWriteItems" => self.clone().transact(body, call).await,
            other => panic!("the model of DynamoDB has no {other}"),
        };
        answer.map(|mut answer| {
            if !is_wanted && let Some(members) = answer.as_object_mut() {
                members.remove("ConsumedCapacity");
            }
            answer
        })
    }

    fn get(&self, mut body: Value, call: Call) -> Answer {
        let mut state = lock(&self.state);
        self.remove_expired(&mut state);
        let name = text(&body["TableName"]);
        state.usage(&name, "GetItem").calls += 1;
        let Some(table) = state.tables.get(&name) else { return self.answer("GetItem", &body) };
        let key = key_of(&table.key, &body["Key"]);
        self.admit(&state, call, &[(name.clone(), key[0].clone())])?;
        let table = state.tables.get_mut(&name).expect("the table");
        if self.is_late(&body, call, "replica") {
            let wanted = BTreeSet::from([key.clone()]);
            if self.copy(&mut table.replica, self.clock.elapsed(), &Wanted::Items(&wanted)) {
                self.happened.count("late_replica_read");
            }
            body["TableName"] = table.replica.name.clone().into();
        }
        let done = self.run("GetItem", &body)?;
        let partition = (name.clone(), key[0].clone());
        Ok(self.charge_read(&mut state, "GetItem", &name, vec![partition], done))
    }

    fn query(&self, operation: &str, mut body: Value, call: Call) -> Answer {
        let mut state = lock(&self.state);
        self.remove_expired(&mut state);
        let name = text(&body["TableName"]);
        state.usage(&name, operation).calls += 1;
        let now = self.clock.elapsed();
        let index_name = body.get("IndexName").map(text);
        let is_late = index_name.is_none() && self.is_late(&body, call, "replica");
        let Some(table) = state.tables.get_mut(&name) else { return self.answer(operation, &body) };
        let partition = if let Some(index_name) = index_name {
            let Some(index) = table.indexes.iter_mut().find(|index| index.name == index_name) else {
                return Err(Refusal::new(400, "ValidationException", "The table does not have the specified index"));
            };
            if self.copy(&mut index.shadow, now, &Wanted::All) {
                self.happened.count("lagging_index_read");
            }
            body["TableName"] = index.shadow.name.clone().into();
            (index.shadow.name.clone(), partition_of_query(&body, &index.partition_key))
        } else {
            let value = partition_of_query(&body, &table.key[0]);
            if is_late {
                let wanted = if operation == "Scan" { Wanted::All } else { Wanted::Partition(&value) };
                if self.copy(&mut table.replica, now, &wanted) {
                    self.happened.count("late_replica_read");
                }
                body["TableName"] = table.replica.name.clone().into();
            }
            (name.clone(), value)
        };
        self.admit(&state, call, std::slice::from_ref(&partition))?;
        let done = self.run(operation, &body)?;
        Ok(self.charge_read(&mut state, operation, &name, vec![partition], done))
    }

    fn batch_get(&self, mut body: Value, call: Call) -> Answer {
        let mut state = lock(&self.state);
        self.remove_expired(&mut state);
        let requested = tables_of(&mut body);
        let first = requested.keys().next().cloned().unwrap_or_default();
        state.usage(&first, "BatchGetItem").calls += 1;
        let (mut wanted, mut unprocessed, mut partitions) = (Map::new(), Map::new(), Vec::new());
        let mut names_of_replicas = BTreeMap::new();
        for (name, mut request) in requested {
            let Some(table) = state.tables.get(&name) else {
                wanted.insert(name, request);
                continue;
            };
            let keys = request["Keys"].as_array_mut().map(std::mem::take).unwrap_or_default();
            let key_names = table.key.clone();
            let cut = self.cut_of_batch(call, keys.len());
            let (mut left, mut taken) = (Vec::new(), Vec::new());
            for (number, key) in keys.into_iter().enumerate() {
                let partition = (name.clone(), key_of(&key_names, &key)[0].clone());
                if number >= cut || self.admit(&state, call, std::slice::from_ref(&partition)).is_err() {
                    left.push(key);
                } else {
                    partitions.push(partition);
                    taken.push(key);
                }
            }
            if !left.is_empty() {
                let mut rest = request.clone();
                rest["Keys"] = left.into();
                unprocessed.insert(name.clone(), rest);
            }
            if taken.is_empty() {
                continue;
            }
            let is_late = self.is_late(&request, call, &name);
            let table = state.tables.get_mut(&name).expect("the table");
            let read_from = if is_late {
                let keys: BTreeSet<Key> = taken.iter().map(|key| key_of(&key_names, key)).collect();
                if self.copy(&mut table.replica, self.clock.elapsed(), &Wanted::Items(&keys)) {
                    self.happened.count("late_replica_read");
                }
                names_of_replicas.insert(table.replica.name.clone(), name);
                table.replica.name.clone()
            } else {
                name
            };
            request["Keys"] = taken.into();
            wanted.insert(read_from, request);
        }
        if wanted.is_empty() && !unprocessed.is_empty() {
            return Err(Refusal::throttled());
        }
        body["RequestItems"] = wanted.into();
        let mut done = self.run("BatchGetItem", &body)?;
        let answer = &mut done.answer;
        if let Some(tables) = answer["Responses"].as_object_mut() {
            for (replica, name) in &names_of_replicas {
                if let Some(found) = tables.remove(replica) {
                    tables.insert(name.clone(), found);
                }
            }
        }
        // The order of the items is not that of the keys.
        for (name, items) in answer["Responses"].as_object_mut().into_iter().flatten() {
            if let Some(items) = items.as_array_mut() {
                items.sort_by_cached_key(|item| dice::seeded(call.id(), &(name.as_str(), hash_of(item))));
            }
        }
        answer["UnprocessedKeys"] = unprocessed.into();
        Ok(self.charge_read(&mut state, "BatchGetItem", &first, partitions, done))
    }

    fn write(&self, operation: &str, body: &Value, call: Call) -> Answer {
        let mut state = lock(&self.state);
        self.remove_expired(&mut state);
        let name = text(&body["TableName"]);
        state.usage(&name, operation).calls += 1;
        let Some(table) = state.tables.get(&name) else { return self.answer(operation, body) };
        let key = key_of(&table.key, if operation == "PutItem" { &body["Item"] } else { &body["Key"] });
        self.admit(&state, call, &written_partitions(table, &name, &key))?;
        if state.locked.contains(&(name.clone(), key.clone())) {
            self.happened.count("transaction_conflict_of_write");
            let message = "Transaction is ongoing for the item";
            return Err(Refusal::new(400, "TransactionConflictException", message));
        }
        let partition = (name.clone(), key[0].clone());
        let done = match self.run(operation, body) {
            Ok(done) => done,
            Err(refusal) => {
                if let Some(size) = refusal.failed_condition {
                    // A write whose condition does not hold is charged for the item that exists.
                    let units = write_units(size).max(1.0);
                    state.usage(&name, operation).write_units += units;
                    self.charge(&mut state, partition, 0.0, units);
                }
                return Err(refusal);
            }
        };
        Ok(self.charge_write(&mut state, operation, &name, vec![partition], done))
    }

    fn batch_write(&self, mut body: Value, call: Call) -> Answer {
        let mut state = lock(&self.state);
        self.remove_expired(&mut state);
        let requested = tables_of(&mut body);
        let first = requested.keys().next().cloned().unwrap_or_default();
        state.usage(&first, "BatchWriteItem").calls += 1;
        let (mut wanted, mut unprocessed) = (Map::new(), Map::new());
        let mut partitions = Vec::new();
        for (name, mut writes) in requested {
            let Some(table) = state.tables.get(&name) else {
                wanted.insert(name, writes);
                continue;
            };
            let writes = writes.as_array_mut().map(std::mem::take).unwrap_or_default();
            let cut = self.cut_of_batch(call, writes.len());
            let (mut left, mut taken) = (Vec::new(), Vec::new());
            for (number, write) in writes.into_iter().enumerate() {
                let item = write.pointer("/PutRequest/Item");
                let key = item.or(write.pointer("/DeleteRequest/Key")).expect("a write");
                let key = key_of(&table.key, key);
                let is_admitted = self.admit(&state, call, &written_partitions(table, &name, &key)).is_ok();
                if number >= cut || !is_admitted || state.locked.contains(&(name.clone(), key.clone())) {
                    left.push(write);
                } else {
                    partitions.push((name.clone(), key[0].clone()));
                    taken.push(write);
                }
            }
            if !left.is_empty() {
                unprocessed.insert(name.clone(), left.into());
            }
            if !taken.is_empty() {
                wanted.insert(name, taken.into());
            }
        }
        if wanted.is_empty() && !unprocessed.is_empty() {
            return Err(Refusal::throttled());
        }
        body["RequestItems"] = wanted.into();
        let mut done = self.run("BatchWriteItem", &body)?;
        done.answer["UnprocessedItems"] = unprocessed.into();
        Ok(self.charge_write(&mut state, "BatchWriteItem", &first, partitions, done))
    }

    async fn transact(self: Arc<Self>, mut body: Value, call: Call) -> Answer {
        let actions = body["TransactItems"].as_array().cloned().unwrap_or_default();
        // The engine forgets tokens by the real time, and searches all of them.
        let token = body.as_object_mut().and_then(|members| members.remove("ClientRequestToken"));
        let token = token.as_ref().map(text).unwrap_or_default();
        let hash_of_actions = hash_of(&body["TransactItems"]);
        let mut items: Vec<(String, Key)> = Vec::new();
        {
            let mut state = lock(&self.state);
            self.remove_expired(&mut state);
            let mut partitions = Vec::new();
            for action in &actions {
                let (kind, action) = action.as_object().and_then(|action| action.iter().next()).expect("an action");
                let name = text(&action["TableName"]);
                let Some(table) = state.tables.get(&name) else { return self.answer("TransactWriteItems", &body) };
                let item = &action[if kind == "Put" { "Item" } else { "Key" }];
                let key = key_of(&table.key, item);
                partitions.push(written_partitions(table, &name, &key));
                items.push((name, key));
            }
            let first = items.first().map(|(name, _)| name.clone()).unwrap_or_default();
            state.usage(&first, "TransactWriteItems").calls += 1;
            let now = self.clock.elapsed();
            while state.transacted_at.front().is_some_and(|(at, _)| now > *at + TOKEN_LIFETIME) {
                let (_, token) = state.transacted_at.pop_front().expect("a token");
                state.transacted.remove(&token);
            }
            if let Some(Transacted { actions, answer }) = state.transacted.get(&token) {
                self.happened.count("transaction_repeated");
                if *actions != hash_of_actions {
                    let kind = "IdempotentParameterMismatchException";
                    return Err(Refusal::new(400, kind, "The token was used with other parameters."));
                }
                return Ok(answer.clone());
            }
            for (number, partitions) in partitions.iter().enumerate() {
                if self.admit(&state, call, partitions).is_err() {
                    return Err(Refusal::cancelled(items.len(), number, "ThrottlingError"));
                }
            }
            if !token.is_empty() && state.tokens.contains(&token) {
                self.happened.count("transaction_in_progress");
                let message = "The transaction with the given request token is already in progress.";
                return Err(Refusal::new(400, "TransactionInProgressException", message));
            }
            if let Some(number) = items.iter().position(|item| state.locked.contains(item)) {
                self.happened.count("transaction_conflict");
                return Err(Refusal::cancelled(items.len(), number, "TransactionConflict"));
            }
            if call.happens("conflict", self.faults.conflicts) {
                self.happened.count("seeded_transaction_conflict");
                let number = call.index("item in conflict", items.len());
                return Err(Refusal::cancelled(items.len(), number, "TransactionConflict"));
            }
            state.locked.extend(items.iter().cloned());
            state.tokens.insert(token.clone());
        }
        // The transaction prepares its items, and then commits.
        pause(call.duration("prepare", Duration::from_millis(2), Duration::from_millis(20))).await;
        let mut state = lock(&self.state);
        state.tokens.remove(&token);
        for item in &items {
            state.locked.remove(item);
        }
        let first = items.first().map(|(name, _)| name.clone()).unwrap_or_default();
        let partitions: Vec<Partition> = items.iter().map(|(name, key)| (name.clone(), key[0].clone())).collect();
        let done = match self.run("TransactWriteItems", &body) {
            Ok(done) => done,
            Err(refusal) => {
                // What was prepared is charged.
                for partition in partitions {
                    state.usage(&first, "TransactWriteItems").write_units += 2.0;
                    self.charge(&mut state, partition, 0.0, 2.0);
                }
                return Err(refusal);
            }
        };
        let answer = self.charge_write(&mut state, "TransactWriteItems", &first, partitions, done);
        if !token.is_empty() {
            state.transacted_at.push_back((self.clock.elapsed(), token.clone()));
            state.transacted.insert(token, Transacted { actions: hash_of_actions, answer: answer.clone() });
        }
        Ok(answer)
    }

    /// The number of items of a batch that are processed.
    fn cut_of_batch(&self, call: Call, items: usize) -> usize {
        if items > 1 && call.happens("unprocessed", self.faults.unprocessed) {
            self.happened.count("unprocessed");
            return 1 + call.index("processed", items - 1);
        }
        items
    }

    /// Whether a late replica serves a read.
    fn is_late(&self, body: &Value, call: Call, decision: &str) -> bool {
        body["ConsistentRead"] != true && call.happens(decision, self.faults.late_replicas)
    }

    /// Refuses a call if one of these partitions is throttled.
    fn admit(&self, state: &State, call: Call, partitions: &[Partition]) -> Result<(), Refusal> {
        for partition in partitions {
            if self.is_in_burst(partition) && call.happens("in burst", 0.8) {
                self.happened.count("throttled");
                return Err(Refusal::throttled());
            }
            let second = self.clock.elapsed().as_secs();
            let load = state.loads.get(partition).filter(|load| load.second == second);
            if load.is_some_and(|load| load.reads >= PARTITION_READS || load.writes >= PARTITION_WRITES) {
                self.happened.count("partition_limit");
                return Err(Refusal::throttled());
            }
        }
        Ok(())
    }

    fn is_in_burst(&self, partition: &Partition) -> bool {
        if self.faults.throttled == 0.0 {
            return false;
        }
        let now = self.clock.elapsed();
        let period = now.as_secs() / BURST_PERIOD.as_secs();
        if self.decider.random(&("burst", partition, period)) >= self.faults.throttled {
            return false;
        }
        let length = Duration::from_secs(5).mul_f64(self.decider.random(&("length of burst", partition, period)));
        let latest = BURST_PERIOD.saturating_sub(length);
        let begin = latest.mul_f64(self.decider.random(&("begin of burst", partition, period)));
        let now = now.saturating_sub(BURST_PERIOD * u32::try_from(period).unwrap_or_default());
        (begin..begin + length).contains(&now)
    }

    fn charge(&self, state: &mut State, partition: Partition, reads: f64, writes: f64) {
        let second = self.clock.elapsed().as_secs();
        let load = state.loads.entry(partition).or_default();
        if load.second != second {
            *load = Load { second, peak: load.peak, ..Load::default() };
        }
        load.reads += reads;
        load.writes += writes;
        load.peak = load.peak.max(load.reads / PARTITION_READS).max(load.writes / PARTITION_WRITES);
    }

    /// Charges a read, and returns its response.
    fn charge_read(
        &self,
        state: &mut State,
        operation: &str,
        table: &str,
        partitions: Vec<Partition>,
        done: Done,
    ) -> Value {
        let Done { answer, units, .. } = done;
        state.usage(table, operation).read_units += units;
        let each = share(units, &partitions);
        for partition in partitions {
            self.charge(state, partition, each, 0.0);
        }
        with_capacity(answer, operation, table, units)
    }

    /// Charges a write and those of the indexes, lets copies be made, and returns the response.
    fn charge_write(
        &self,
        state: &mut State,
        operation: &str,
        table: &str,
        partitions: Vec<Partition>,
        done: Done,
    ) -> Value {
        let Done { answer, units, written } = done;
        let mut of_indexes = Vec::new();
        for Written { table, key, item } in written {
            of_indexes.extend(self.replicate(state, &table, &key, item));
        }
        let sum: f64 = of_indexes.iter().map(|(_, units)| units).sum();
        state.usage(table, operation).write_units += units + sum;
        let each = share(units, &partitions);
        for partition in partitions {
            self.charge(state, partition, 0.0, each);
        }
        for (partition, units) in of_indexes {
            self.charge(state, partition, 0.0, units);
        }
        with_capacity(answer, operation, table, units + sum)
    }

    /// Lets an item be copied into the shadows of its table, into each after a delay of its own. Returns the units that the indexes
    /// consume.
    fn replicate(
        &self,
        state: &mut State,
        table_name: &str,
        key: &Key,
        item: Option<Arc<Value>>,
    ) -> Vec<(Partition, f64)> {
        state.writes += 1;
        let version = state.writes;
        let now = self.clock.elapsed();
        let table = state.tables.get_mut(table_name).expect("the table");
        let mut consumed = Vec::new();
        for index in &mut table.indexes {
            let entry = item.as_ref().and_then(|item| index.entry(item));
            let before = index.entries.get(key);
            if before == entry.as_ref().map(|(entry, _)| entry) {
                continue;
            }
            let largest = before.map_or(0, |one| one.size).max(entry.as_ref().map_or(0, |(one, _)| one.size));
            let mut changed: Vec<&Entry> = before.into_iter().chain(entry.as_ref().map(|(entry, _)| entry)).collect();
            if let [old, new] = changed[..]
                && (&old.partition, &old.sort) == (&new.partition, &new.sort)
            {
                changed.pop();
            }
            for one in changed {
                consumed.push(((index.shadow.name.clone(), one.partition.clone()), write_units(largest)));
            }
            let (entry, projected) = entry.unzip();
            match entry {
                Some(entry) => drop(index.entries.insert(key.clone(), entry)),
                None => drop(index.entries.remove(key)),
            }
            let delay = self.index_delay(&index.shadow.name, key, version);
            index.shadow.push(now, key, Copy { due_at: now + delay, version, item: projected });
            if index.shadow.pending.len() > MOST_PENDING {
                self.copy(&mut index.shadow, now, &Wanted::All);
            }
        }
        if !table.replica.name.is_empty() {
            let share = self.decider.random(&("replica", table_name, key, version));
            let due_at = now + self.faults.replica_lag.mul_f64(share);
            table.replica.push(now, key, Copy { due_at, version, item: item.clone() });
            if table.replica.pending.len() > MOST_PENDING {
                self.copy(&mut table.replica, now, &Wanted::All);
            }
        }
        if let Some(attribute) = &table.expires
            && let Some(expires_at) = item.as_ref().and_then(|item| item[attribute]["N"].as_str()?.parse::<f64>().ok())
        {
            let late = self.decider.random(&("expiry", table_name, key, version)) * 48.0 * 3600.0;
            let left = (expires_at - self.clock.unix_seconds()).max(0.0);
            let removed_at = now + Duration::from_secs_f64(left + late);
            state.expiring.insert((removed_at, version), (table_name.to_owned(), key.clone()));
        }
        consumed
    }

    /// Most of it is the delay of the index, which changes with the number of writes; the rest is that of the item, so that items
    /// overtake each other.
    fn index_delay(&self, shadow: &str, key: &Key, version: u64) -> Duration {
        let period = version / WRITES_PER_DELAY;
        let is_long = self.decider.random(&("long lag", shadow, period)) < self.faults.long_lags;
        let longest = if is_long { self.faults.longest_lag } else { self.faults.lag };
        let of_index = self.decider.random(&("lag", shadow, period));
        let of_item = self.decider.random(&("lag of item", shadow, key, version));
        longest.mul_f64(0.6 * of_index + 0.4 * of_item)
    }

    /// Copies the wanted items that are due at this time. Returns whether the shadow is still behind.
    fn copy(&self, shadow: &mut Shadow, now: Duration, wanted: &Wanted) -> bool {
        let keys: BTreeSet<Key> = match wanted {
            Wanted::All => {
                let later = shadow.due.split_off(&(now.saturating_add(Duration::from_nanos(1)), Key::default()));
                std::mem::replace(&mut shadow.due, later).into_iter().map(|(_, key)| key).collect()
            }
            Wanted::Items(keys) => (*keys).clone(),
            Wanted::Partition(value) => {
                let from = shadow.pending.range([(*value).to_owned(), String::new()]..);
                from.map(|(key, _)| key.clone()).take_while(|key| key[0] == *value).collect()
            }
        };
        let mut engine = lock(&self.engine);
        let mut is_behind = matches!(wanted, Wanted::All) && !shadow.due.is_empty();
        for key in keys {
            let Some(copies) = shadow.pending.get_mut(&key) else { continue };
            // Of the versions of an item the newest one that is due.
            let newest = copies.iter().filter(|copy| copy.due_at <= now).max_by_key(|copy| copy.version).cloned();
            copies.retain(|copy| copy.due_at > now);
            is_behind |= !copies.is_empty();
            if copies.is_empty() {
                shadow.pending.remove(&key);
            }
            let Some(Copy { version, item, .. }) = newest else { continue };
            let present = shadow.copied.entry(key.clone()).or_default();
            if *present > version {
                continue;
            }
            *present = version;
            engine.store(&shadow.name, key, item);
        }
        is_behind
    }

    /// Removes the items that expired long enough ago.
    fn remove_expired(&self, state: &mut State) {
        let now = self.clock.elapsed();
        while let Some(first) = state.expiring.first_entry().filter(|first| first.key().0 <= now) {
            let (name, key) = first.remove();
            let Some(table) = state.tables.get(&name) else { continue };
            let Some(attribute) = &table.expires else { continue };
            let item = lock(&self.engine).item(&name, &key);
            let expires_at = item.as_ref().and_then(|item| item[attribute]["N"].as_str()?.parse::<f64>().ok());
            // It may have been changed since.
            if expires_at.is_none_or(|expires_at| expires_at > self.clock.unix_seconds()) {
                continue;
            }
            self.happened.count("expired");
            lock(&self.engine).store(&name, key.clone(), None);
            self.replicate(state, &name, &key, None);
        }
    }
}

impl State {
    fn usage(&mut self, table: &str, operation: &str) -> &mut Usage {
        self.usage.entry((cost::caller(), table.to_owned(), operation.to_owned())).or_default()
    }
}

impl Index {
    /// The entry of an item and its projected attributes; `None` if the item lacks the key of the index.
    fn entry(&self, item: &Arc<Value>) -> Option<(Entry, Arc<Value>)> {
        let value = |name: &str| item.get(name).map(value_text);
        let partition = value(&self.partition_key)?;
        let sort = match &self.sort_key {
            Some(name) => value(name)?,
            None => String::new(),
        };
        let projected = match &self.attributes {
            None => item.clone(),
            Some(attributes) => {
                let members = item.as_object().into_iter().flatten();
                let projected: Map<String, Value> = members
                    .filter(|(name, _)| attributes.contains(*name))
                    .map(|(name, value)| (name.clone(), value.clone()))
                    .collect();
                Arc::new(projected.into())
            }
        };
        let entry = Entry { partition, sort, hash: hash_of(&projected), size: size_of(&projected) };
        Some((entry, projected))
    }
}

impl Shadow {
    fn push(&mut self, now: Duration, key: &Key, copy: Copy) {
        let copies = self.pending.entry(key.clone()).or_default();
        // Of those that are due already only the newest one will be copied.
        if let Some(newest) = copies.iter().filter(|copy| copy.due_at <= now).map(|copy| copy.version).max() {
            copies.retain(|copy| copy.due_at > now || copy.version == newest);
        }
        self.due.insert((copy.due_at, key.clone()));
        copies.push(copy);
    }
}

/// The tables of a batch in a fixed order: that of the request is random.
fn tables_of(body: &mut Value) -> BTreeMap<String, Value> {
    match body["RequestItems"].take() {
        Value::Object(tables) => tables.into_iter().collect(),
        _ => BTreeMap::new(),
    }
}

pub(super) fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// The names of a key schema's attributes.
fn elements(schema: &Value) -> Vec<String> {
    schema.as_array().into_iter().flatten().map(|element| text(&element["AttributeName"])).collect()
}

/// The value of a key's attribute.
pub(super) fn value_text(value: &Value) -> String {
    value["S"].as_str().map_or_else(|| value.to_string(), ToOwned::to_owned)
}

pub(super) fn key_of(names: &[String], item: &Value) -> Key {
    let value = |index: usize| names.get(index).map(|name| value_text(&item[name])).unwrap_or_default();
    [value(0), value(1)]
}

/// The partitions that a write of an item concerns: that of the table, and those of its present entries in indexes.
fn written_partitions(table: &Table, name: &str, key: &Key) -> Vec<Partition> {
    let entries = table.indexes.iter().filter_map(|index| {
        let entry = index.entries.get(key)?;
        Some((index.shadow.name.clone(), entry.partition.clone()))
    });
    [(name.to_owned(), key[0].clone())].into_iter().chain(entries).collect()
}

/// The value that a query compares the partition key with.
fn partition_of_query(body: &Value, partition_key: &str) -> String {
    let condition = text(&body["KeyConditionExpression"]);
    let words: Vec<&str> = condition.split([' ', '(', ')']).filter(|word| !word.is_empty()).collect();
    for window in words.windows(3) {
        let [name, "=", value] = window else { continue };
        let resolved = body["ExpressionAttributeNames"][*name].as_str().unwrap_or(name);
        if resolved == partition_key {
            return value_text(&body["ExpressionAttributeValues"][*value]);
        }
    }
    String::new()
}

/// What the decisions about a call depend on: its operation, and the items that it concerns.
fn subject(operation: &str, body: &Value) -> (String, String, u64) {
    let concerned = match operation {
        "GetItem" | "UpdateItem" | "DeleteItem" => hash_of(&body["Key"]),
        "PutItem" => hash_of(&body["Item"]),
        "Query" => hash_of(&json!([body["IndexName"], body["ExpressionAttributeValues"]])),
        "TransactWriteItems" => hash_of(&body["TransactItems"]),
        "BatchGetItem" | "BatchWriteItem" => hash_of(&body["RequestItems"]),
        _ => 0,
    };
    (operation.to_owned(), text(&body["TableName"]), concerned)
}

/// The units of each partition.
#[allow(clippy::cast_precision_loss, reason = "a batch is small")]
fn share(units: f64, partitions: &[Partition]) -> f64 {
    units / partitions.len().max(1) as f64
}

/// A response with the consumed units, which are all reported for one table.
fn with_capacity(mut answer: Value, operation: &str, table: &str, units: f64) -> Value {
    let capacity = json!({ "TableName": table, "CapacityUnits": units });
    let is_list = matches!(operation, "BatchGetItem" | "BatchWriteItem" | "TransactWriteItems");
    answer["ConsumedCapacity"] = if is_list { json!([capacity]) } else { capacity };
    answer
}

#[allow(clippy::cast_precision_loss, reason = "an item has 400 KiB at most")]
fn write_units(size: usize) -> f64 {
    size.div_ceil(1024) as f64
}

/// The size of an item in bytes, as DynamoDB counts it.
pub(super) fn size_of(item: &Value) -> usize {
    fn of(value: &Value) -> usize {
        let Some((kind, value)) = value.as_object().and_then(|members| members.iter().next()) else { return 0 };
        match (&**kind, value) {
            ("N", Value::String(digits)) => digits.len() / 2 + 1,
            ("B", Value::String(encoded)) => encoded.len() * 3 / 4,
            (_, Value::String(text)) => text.len(),
            ("L", Value::Array(values)) => 3 + values.iter().map(|value| 1 + of(value)).sum::<usize>(),
            (_, Value::Array(values)) => values.iter().filter_map(Value::as_str).map(str::len).sum(),
            ("M", Value::Object(members)) => {
                3 + members.iter().map(|(name, value)| 1 + name.len() + of(value)).sum::<usize>()
            }
            _ => 1,
        }
    }
    item.as_object().into_iter().flatten().map(|(name, value)| name.len() + of(value)).sum()
}
