//! Reads from the past: a proxy to DynamoDB whose secondary indexes lag, as those of AWS do, each by a delay of its own that
//! changes with time. Items appear in an index in another order than they were written in. A read of a table without
//! `ConsistentRead` is sometimes from the past too.
//!
//! The proxy observes every write, and reads the item back. It serves a query of an index from a *shadow table*, into which it
//! copies the items whose delay is over, so filters, projections and pages are the engine's own. One delayed copy of everything
//! would be a consistent snapshot, and would hide most faults.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{
    AttributeDefinition, AttributeValue, BillingMode, GlobalSecondaryIndex, GlobalSecondaryIndexDescription,
    KeySchemaElement, KeyType, ScalarAttributeType,
};
use axum::body::Body;
use axum::response::Response;
use http::header;
use local::engines::EngineCredentials;
use serde_json::Value;
use tokio::sync::Mutex;

use super::engines::Engines;
use super::fault_proxy::forward;
use super::server::{Cut, Request, Server};
use super::sigv4::sign;

/// The shadow of the table itself, for reads that are not strongly consistent.
const ROWS: &str = "rows";
/// The number of writes after which an index's delay changes.
const WRITES_PER_DELAY: u64 = 5;

/// The reads that a client of the proxy gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    /// As on AWS.
    Lagging,
    /// All reads are current. For the test itself, whose writes have to be observed too.
    Current,
}

#[derive(Debug)]
struct State {
    url: String,
    credentials: EngineCredentials,
    /// Calls the engine without the proxy.
    client: Client,
    http: reqwest::Client,
    /// The prefix of the tables' names.
    prefix: &'static str,
    longest: Duration,
    seed: u64,
    writes: AtomicU64,
    reads: AtomicU64,
    /// By name.
    shadows: Mutex<HashMap<String, Shadow>>,
}

/// What is known of a shadow table.
#[derive(Debug, Default)]
struct Shadow {
    pending: Vec<Copy>,
    /// The version of each item in the table.
    copied: HashMap<[String; 2], u64>,
}

/// An item that will be in a shadow table.
#[derive(Clone, Debug)]
struct Copy {
    due_at: Instant,
    version: u64,
    values: [String; 2],
    key: HashMap<String, AttributeValue>,
    /// `None` if the item was deleted.
    item: Option<HashMap<String, AttributeValue>>,
}

/// The proxy. Clones share their state.
#[derive(Clone, Debug)]
pub struct LaggingIndexes(Arc<State>);

impl LaggingIndexes {
    /// Prepares the shadow tables of the schema's tables, which have to exist and to be empty. No read lags by more than
    /// `longest`. The seed decides the delays.
    pub async fn new(engines: &Engines, prefix: &'static str, longest: Duration, seed: u64) -> Self {
        let client = Client::new(&engines.sdk_config().await);
        for table in &schema::TABLES {
            let name = format!("{prefix}{}", table.name);
            let described = client.describe_table().table_name(&name).send().await.expect("the table");
            let indexes = described.table.and_then(|table| table.global_secondary_indexes).unwrap_or_default();
            for index in &indexes {
                let index_name = index.index_name.as_deref().expect("a name");
                make_shadow(&client, table, &shadow(&name, index_name), Some(index)).await;
            }
            make_shadow(&client, table, &shadow(&name, ROWS), None).await;
        }
        Self(Arc::new(State {
            url: engines.dynamodb.clone(),
            credentials: engines.credentials.clone(),
            client,
            http: reqwest::Client::new(),
            prefix,
            longest,
            seed,
            writes: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            shadows: Mutex::default(),
        }))
    }

    /// Starts a proxy to DynamoDB.
    pub async fn to_dynamodb(&self, reads: Reads) -> Server {
        let proxy = self.clone();
        Server::start(move |request| {
            let proxy = proxy.clone();
            async move { proxy.pass(request, reads).await }
        })
        .await
    }

    /// Lets the indexes catch up with all writes.
    pub async fn catch_up(&self) {
        let names: Vec<String> = self.0.shadows.lock().await.keys().cloned().collect();
        for name in names {
            self.copy_due(&name, None).await;
        }
    }

    async fn pass(&self, request: Request, reads: Reads) -> Result<Response, Cut> {
        let target = request.header("x-amz-target").unwrap_or_default();
        let operation = target.rsplit('.').next().unwrap_or(target).to_owned();
        let body = request.json();
        let written = written(&operation, &body);
        if operation == "BatchGetItem" && reads == Reads::Lagging {
            return self.read_batch(request, body).await;
        }
        if written.is_empty() {
            return match self.lagging_read(&operation, body).filter(|_| reads == Reads::Lagging) {
                Some(body) => {
                    self.copy_due(body["TableName"].as_str().expect("a table"), Some(Instant::now())).await;
                    self.send(&request, &body).await
                }
                None => forward(&self.0.http, request, &self.0.url).await,
            };
        }
        let answer = forward(&self.0.http, request, &self.0.url).await?;
        for (table, item) in written {
            self.replicate(&table, &item).await;
        }
        Ok(answer)
    }

    /// The request that reads a shadow table instead, if it may read from the past.
    fn lagging_read(&self, operation: &str, mut body: Value) -> Option<Value> {
        let table = body["TableName"].as_str()?.to_owned();
        let index = match (operation, body["IndexName"].as_str()) {
            ("Query" | "Scan", Some(index)) => index.to_owned(),
            ("Query" | "Scan" | "GetItem", None) if body["ConsistentRead"] != true => {
                self.is_replica_late().then(|| ROWS.to_owned())?
            }
            _ => return None,
        };
        body["TableName"] = shadow(&table, &index).into();
        Some(body)
    }

    /// Whether the replica that serves a read is behind; it may be current.
    fn is_replica_late(&self) -> bool {
        let number = self.0.reads.fetch_add(1, Ordering::Relaxed);
        self.random(&("read", number)) < 0.5
    }

    /// Sends a batch of reads, those of tables without consistency to the shadow of the table.
    async fn read_batch(&self, request: Request, mut body: Value) -> Result<Response, Cut> {
        let tables = body["RequestItems"].as_object().cloned().unwrap_or_default();
        let is_late = |keys: &Value| keys["ConsistentRead"] != true && self.is_replica_late();
        let late: Vec<String> =
            tables.iter().filter(|(_, keys)| is_late(keys)).map(|(table, _)| table.clone()).collect();
        if late.is_empty() {
            return forward(&self.0.http, request, &self.0.url).await;
        }
        for table in &late {
            let (name, tables) = (shadow(table, ROWS), body["RequestItems"].as_object_mut().expect("tables"));
            let keys = tables.remove(table).expect("keys");
            tables.insert(name.clone(), keys);
            self.copy_due(&name, Some(Instant::now())).await;
        }
        let (mut parts, answer) = self.send(&request, &body).await?.into_parts();
        let answer = axum::body::to_bytes(answer, usize::MAX).await.map_err(|_| Cut)?;
        let Ok(mut answer) = serde_json::from_slice::<Value>(&answer) else {
            return Ok(Response::from_parts(parts, Body::from(answer)));
        };
        // The client does not know the shadow tables.
        for name in ["Responses", "UnprocessedKeys"] {
            let Some(tables) = answer[name].as_object_mut() else { continue };
            for table in &late {
                if let Some(found) = tables.remove(&shadow(table, ROWS)) {
                    tables.insert(table.clone(), found);
                }
            }
        }
        // The checksum and the length are those of the other body.
        for name in ["content-length", "x-amz-crc32"] {
            parts.headers.remove(name);
        }
        Ok(Response::from_parts(parts, Body::from(answer.to_string())))
    }

    /// Sends another body than the client's. The client's signature does not cover it.
    async fn send(&self, request: &Request, body: &Value) -> Result<Response, Cut> {
        let body = body.to_string().into_bytes();
        let mut headers = request.headers.clone();
        for name in [header::HOST, header::CONTENT_LENGTH, header::AUTHORIZATION] {
            headers.remove(name);
        }
        let url = format!("{}{}", self.0.url, request.path);
        sign("dynamodb", &self.0.credentials, "POST", &url, &mut headers, &body);
        let answer = self.0.http.post(url).headers(headers).body(body).send().await.map_err(|_| Cut)?;
        let mut response = Response::builder().status(answer.status());
        for (name, value) in answer.headers() {
            response = response.header(name, value);
        }
        response.body(Body::from(answer.bytes().await.map_err(|_| Cut)?)).map_err(|_| Cut)
    }

    /// Lets an item be copied into all shadows of its table, into each after a delay of its own.
    async fn replicate(&self, table_name: &str, item: &Value) {
        let name = table_name.strip_prefix(self.0.prefix).expect("a table of this deployment");
        let table = schema::TABLES.into_iter().find(|table| table.name == name).expect("a table of the schema");
        let key = [table.partition_key, table.sort_key];
        let values = key.map(|name| item[name]["S"].as_str().expect("a key").to_owned());
        // Counted before the item is read: of two copies of an item the one with the higher number was read later than the
        // write of the other one.
        let version = self.0.writes.fetch_add(1, Ordering::SeqCst) + 1;
        let keys: HashMap<String, AttributeValue> = key
            .into_iter()
            .zip(&values)
            .map(|(name, value)| (name.to_owned(), AttributeValue::S(value.clone())))
            .collect();
        let read = self.0.client.get_item().table_name(table_name).set_key(Some(keys.clone())).consistent_read(true);
        // The engine may have been stopped.
        let Ok(found) = read.send().await else { return };
        let mut shadows = self.0.shadows.lock().await;
        for index in table.indexes.iter().map(|index| index.name).chain([ROWS]) {
            let shadow = shadow(table_name, index);
            let due_at = Instant::now() + self.delay(&shadow, &values, version);
            let copy = Copy { due_at, version, values: values.clone(), key: keys.clone(), item: found.item.clone() };
            shadows.entry(shadow).or_default().pending.push(copy);
        }
    }

    /// Copies the items that are due at this time, or all.
    async fn copy_due(&self, name: &str, now: Option<Instant>) {
        let mut shadows = self.0.shadows.lock().await;
        let Some(shadow) = shadows.get_mut(name) else { return };
        let (mut due, later): (Vec<Copy>, Vec<Copy>) =
            shadow.pending.drain(..).partition(|copy| now.is_none_or(|now| copy.due_at <= now));
        shadow.pending = later;
        // Of the versions of an item the newest one that is due.
        due.sort_by_key(|copy| std::cmp::Reverse(copy.version));
        for Copy { version, values, key, item, .. } in due {
            let copied = shadow.copied.entry(values).or_default();
            if *copied > version {
                continue;
            }
            *copied = version;
            let client = &self.0.client;
            // An error means that the engine was stopped.
            match item {
                Some(_) => drop(client.put_item().table_name(name).set_item(item).send().await),
                None => drop(client.delete_item().table_name(name).set_key(Some(key)).send().await),
            }
        }
    }

    /// Most of it is the delay of the index, which changes with the number of writes; the rest is that of the item, so that items
    /// overtake each other.
    fn delay(&self, shadow: &str, key: &[String; 2], version: u64) -> Duration {
        let index = self.random(&(shadow, version / WRITES_PER_DELAY));
        let item = self.random(&(shadow, key, version));
        self.0.longest.mul_f64(0.6 * index + 0.4 * item)
    }

    /// A number between 0 and 1 that depends on the seed and on `what`.
    fn random(&self, what: &impl Hash) -> f64 {
        random(self.0.seed, what)
    }
}

/// A number that depends only on the seed and on `what`.
pub fn seeded(seed: u64, what: &impl Hash) -> u32 {
    let mut hasher = DefaultHasher::new();
    (seed, what).hash(&mut hasher);
    u32::try_from(hasher.finish() >> 32).expect("32 bits")
}

/// As [`seeded`], from 0 to 1.
pub fn random(seed: u64, what: &impl Hash) -> f64 {
    f64::from(seeded(seed, what)) / f64::from(u32::MAX)
}

fn shadow(table: &str, index: &str) -> String {
    format!("{table}.{index}")
}

/// Table and key, or whole item, of each item that a request writes.
fn written(operation: &str, body: &Value) -> Vec<(String, Value)> {
    let one = |table: &Value, item: &Value| (table.as_str().expect("a table").to_owned(), item.clone());
    match operation {
        "PutItem" => vec![one(&body["TableName"], &body["Item"])],
        "UpdateItem" | "DeleteItem" => vec![one(&body["TableName"], &body["Key"])],
        "TransactWriteItems" => {
            let actions = body["TransactItems"].as_array().into_iter().flatten();
            actions
                .flat_map(|action| action.as_object().expect("an action"))
                .filter(|(kind, _)| *kind != "ConditionCheck")
                .map(|(kind, action)| one(&action["TableName"], &action[if kind == "Put" { "Item" } else { "Key" }]))
                .collect()
        }
        "BatchWriteItem" => {
            let tables = body["RequestItems"].as_object().into_iter().flatten();
            tables
                .flat_map(|(table, requests)| {
                    requests.as_array().into_iter().flatten().map(move |request| {
                        let item = request.pointer("/PutRequest/Item").or(request.pointer("/DeleteRequest/Key"));
                        (table.clone(), item.expect("a write").clone())
                    })
                })
                .collect()
        }
        _ => Vec::new(),
    }
}

/// Creates a table with the key of `table` and with one of its indexes.
async fn make_shadow(
    client: &Client,
    table: &schema::Table,
    name: &str,
    index: Option<&GlobalSecondaryIndexDescription>,
) {
    let key =
        |name: &str, kind| KeySchemaElement::builder().attribute_name(name).key_type(kind).build().expect("a key");
    let keys = vec![key(table.partition_key, KeyType::Hash), key(table.sort_key, KeyType::Range)];
    let of_index = index.and_then(|index| index.key_schema.clone()).unwrap_or_default();
    let mut attributes: Vec<&str> = keys.iter().chain(&of_index).map(KeySchemaElement::attribute_name).collect();
    attributes.sort_unstable();
    attributes.dedup();
    let attributes = attributes.into_iter().map(|name| {
        let attribute = AttributeDefinition::builder().attribute_name(name).attribute_type(ScalarAttributeType::S);
        attribute.build().expect("an attribute")
    });
    let attributes = attributes.collect();
    let index = index.map(|index| {
        let made = GlobalSecondaryIndex::builder()
            .set_index_name(index.index_name.clone())
            .set_key_schema(index.key_schema.clone())
            .set_projection(index.projection.clone());
        vec![made.build().expect("an index")]
    });
    let made = client.create_table().table_name(name).billing_mode(BillingMode::PayPerRequest);
    let made = made.set_key_schema(Some(keys)).set_attribute_definitions(Some(attributes));
    made.set_global_secondary_indexes(index).send().await.expect("a shadow table");
}
