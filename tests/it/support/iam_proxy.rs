//! A proxy between a function and AWS that evaluates the function's IAM policy. Each call is one or more actions on
//! resources; the proxy records those that IAM would deny, and tests assert that there are none. It forwards all calls,
//! so that one run finds every missing permission, with one exception: S3's response for a missing object depends on
//! the caller's policy, so the proxy returns what S3 returns.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use axum::response::Response;
use http::{Method, StatusCode};
use serde_json::Value;

use super::fault_proxy::forward;
use super::server::{Cut, Request, Server, raw};

/// One statement of an IAM policy. [`Call::resource`] describes the names of resources.
#[derive(Clone, Debug)]
pub struct Statement {
    /// Whether the effect is `Deny`.
    pub denies: bool,
    pub actions: Vec<String>,
    pub resources: Vec<String>,
    /// As in the policy: operators, condition keys, values.
    pub condition: Option<Value>,
}

/// The policies of all functions, by name.
pub type Policies = BTreeMap<String, Vec<Statement>>;

/// One action on one resource.
#[derive(Clone, Debug)]
pub struct Call {
    /// Such as `dynamodb:Query`.
    pub action: String,
    /// A table or an index (`users`, `users/index/undelivered`), `queue`, `export-queue`, `key`, `bucket`, or objects by
    /// the first folder of their key (`exports/`).
    pub resource: String,
    /// The values of condition keys. `None` marks a key whose values this proxy does not determine.
    pub context: BTreeMap<&'static str, Option<Vec<String>>>,
}

impl Call {
    fn new(action: impl Into<String>, resource: impl Into<String>) -> Self {
        Self { action: action.into(), resource: resource.into(), context: BTreeMap::new() }
    }

    fn with(mut self, key: &'static str, values: Option<Vec<String>>) -> Self {
        self.context.insert(key, values);
        self
    }
}

/// Evaluates a policy as IAM does: an explicit deny wins, otherwise one allow is enough.
pub fn allows(policy: &[Statement], call: &Call) -> bool {
    let applies = |statement: &&Statement| {
        statement.actions.contains(&call.action)
            && statement.resources.contains(&call.resource)
            && statement.condition.as_ref().is_none_or(|condition| holds(condition, call))
    };
    !policy.iter().filter(|statement| statement.denies).any(|statement| applies(&statement))
        && policy.iter().filter(|statement| !statement.denies).any(|statement| applies(&statement))
}

/// Whether all operators of a condition match. An unsupported operator fails the test.
fn holds(condition: &Value, call: &Call) -> bool {
    condition.as_object().expect("operators").iter().all(|(operator, keys)| {
        keys.as_object().expect("condition keys").iter().all(|(key, allowed)| {
            let allowed: Vec<&str> = match allowed {
                Value::Array(values) => values.iter().map(|value| value.as_str().expect("a text")).collect(),
                value => vec![value.as_str().expect("a text")],
            };
            let found = match call.context.get(key.as_str()) {
                None => &[][..],
                Some(Some(values)) => values.as_slice(),
                Some(None) => panic!("{}: this proxy does not determine the values of {key}", call.action),
            };
            let (quantifier, comparison) = operator.split_once(':').unwrap_or(("", operator));
            let matches = |value: &String| match comparison {
                "StringEquals" => allowed.contains(&value.as_str()),
                "StringLike" => allowed.iter().any(|pattern| is_like(pattern, value)),
                _ => panic!("the operator {operator} is not supported"),
            };
            match quantifier {
                // For a key with one value, which has to be present.
                "" => !found.is_empty() && found.iter().all(matches),
                "ForAllValues" => found.iter().all(matches),
                "ForAnyValue" => found.iter().any(matches),
                _ => panic!("the operator {operator} is not supported"),
            }
        })
    })
}

/// Supports `*` only at the end, which is all that the template uses.
fn is_like(pattern: &str, value: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == value,
        Some((prefix, "")) => value.starts_with(prefix),
        Some(_) => panic!("{pattern}: a star is supported only at the end"),
    }
}

#[derive(Debug)]
struct State {
    policies: Policies,
    refused: Mutex<BTreeSet<String>>,
    prefix: &'static str,
    http: reqwest::Client,
}

/// The proxy. Clones share what they recorded.
#[derive(Clone, Debug)]
pub struct IamProxy(Arc<State>);

impl IamProxy {
    /// Takes the policy of each function; `prefix` is that of the tables' names.
    pub fn new(policies: Policies, prefix: &'static str) -> Self {
        Self(Arc::new(State { policies, refused: Mutex::default(), prefix, http: reqwest::Client::new() }))
    }

    pub fn functions(&self) -> impl Iterator<Item = &String> {
        self.0.policies.keys()
    }

    /// Starts a proxy from a function to one of the engines.
    pub async fn to(&self, function: &str, upstream: &str) -> Server {
        let (guard, function, upstream) = (self.clone(), function.to_owned(), upstream.to_owned());
        Server::start(move |request| {
            let (guard, function, upstream) = (guard.clone(), function.clone(), upstream.clone());
            async move { guard.pass(&function, request, &upstream).await }
        })
        .await
    }

    /// The calls that IAM would deny: function, action, resource, condition values.
    pub fn refused(&self) -> BTreeSet<String> {
        self.0.refused.lock().expect("unpoisoned").clone()
    }

    fn refuse(&self, function: &str, call: &Call, why: &str) {
        let context: Vec<_> = call.context.iter().map(|(key, values)| format!(" {key}={values:?}")).collect();
        let line = format!("{function} {} {}{}{why}", call.action, call.resource, context.concat());
        self.0.refused.lock().expect("unpoisoned").insert(line);
    }

    async fn pass(&self, function: &str, request: Request, upstream: &str) -> Result<Response, Cut> {
        let state = &*self.0;
        let policy = &state.policies[function];
        for call in calls(&request, state.prefix) {
            if !allows(policy, &call) {
                self.refuse(function, &call, "");
            }
        }
        let read = object_key(&request).filter(|_| matches!(request.method, Method::GET | Method::HEAD));
        let is_head = request.method == Method::HEAD;
        let answer = forward(&state.http, request, upstream).await?;
        // To callers without `s3:ListBucket`, S3 does not reveal whether an object exists. It compares `s3:prefix` with
        // the whole key: https://github.com/ceph/ceph/pull/68577
        if let Some(key) = read.filter(|_| answer.status() == StatusCode::NOT_FOUND) {
            let list = Call::new("s3:ListBucket", "bucket").with("s3:prefix", Some(vec![key]));
            if !allows(policy, &list) {
                self.refuse(function, &list, ": the response for a missing object is 403, not 404");
                let body = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>";
                return Ok(raw(StatusCode::FORBIDDEN, "application/xml", if is_head { "" } else { body }));
            }
        }
        Ok(answer)
    }
}

/// The actions that a request to DynamoDB, S3 or SQS performs.
fn calls(request: &Request, prefix: &str) -> Vec<Call> {
    let Some(target) = request.header("x-amz-target") else { return s3(request).into_iter().collect() };
    let body = request.json();
    let (service, operation) = target.split_once('.').expect("a target");
    if service.starts_with("AmazonSQS") {
        // A batch operation needs the permission for the single operation.
        let action = operation.strip_suffix("Batch").unwrap_or(operation);
        let url = body["QueueUrl"].as_str().expect("a queue");
        let queue = if url.ends_with(schema::EXPORT_QUEUE.name) { "export-queue" } else { "queue" };
        return vec![Call::new(format!("sqs:{action}"), queue)];
    }
    let of = |action: &str, name: &Value, items: &[&Value]| {
        let name = name.as_str().expect("a table's name").strip_prefix(prefix).expect("a table of this deployment");
        let table = schema::TABLES.into_iter().find(|table| table.name == name).expect("a table of the schema");
        let keys = items.iter().map(|item| item[table.partition_key]["S"].as_str().expect("a key").to_owned());
        Call::new(format!("dynamodb:{action}"), name).with("dynamodb:LeadingKeys", Some(keys.collect()))
    };
    match operation {
        "TransactWriteItems" => {
            let items = body["TransactItems"].as_array().into_iter().flatten();
            items
                .flat_map(|item| item.as_object().expect("an item"))
                .map(|(kind, item)| match kind.as_str() {
                    "Put" => of("PutItem", &item["TableName"], &[&item["Item"]]),
                    "Update" => of("UpdateItem", &item["TableName"], &[&item["Key"]]),
                    "Delete" => of("DeleteItem", &item["TableName"], &[&item["Key"]]),
                    _ => of("ConditionCheckItem", &item["TableName"], &[&item["Key"]]),
                })
                .collect()
        }
        "BatchGetItem" | "BatchWriteItem" => {
            let tables = body["RequestItems"].as_object().expect("items");
            tables
                .iter()
                .map(|(name, requests)| {
                    let requests = requests["Keys"].as_array().or(requests.as_array()).expect("requests");
                    let items: Vec<&Value> = requests
                        .iter()
                        .map(|one| match (one.get("PutRequest"), one.get("DeleteRequest")) {
                            (Some(put), _) => &put["Item"],
                            (_, Some(delete)) => &delete["Key"],
                            _ => one,
                        })
                        .collect();
                    of(operation, &name.as_str().into(), &items)
                })
                .collect()
        }
        "Query" => {
            let index = body["IndexName"].as_str().map(|name| format!("/index/{name}")).unwrap_or_default();
            // The partition of an index is not that of the table.
            let key = if index.is_empty() { queried_partition(&body) } else { None };
            let keys = key.map(|key| vec![key]);
            let mut call = of("Query", &body["TableName"], &[]).with("dynamodb:LeadingKeys", keys);
            call.resource += &index;
            vec![call]
        }
        "PutItem" => vec![of("PutItem", &body["TableName"], &[&body["Item"]])],
        _ => vec![of(operation, &body["TableName"], &[&body["Key"]])],
    }
}

/// The value of the partition key in a query whose condition begins with it, as in `#user = :user`.
fn queried_partition(body: &Value) -> Option<String> {
    let condition = body["KeyConditionExpression"].as_str()?;
    let placeholder = condition.split_once(" = ")?.1.split(' ').next()?;
    body["ExpressionAttributeValues"][placeholder]["S"].as_str().map(str::to_owned)
}

/// The key of a path-style S3 request: the path is the bucket, then the key.
fn object_key(request: &Request) -> Option<String> {
    if request.header("x-amz-target").is_some() {
        return None;
    }
    let (_, key) = request.path.trim_start_matches('/').split_once('/')?;
    (!key.is_empty()).then(|| key.replace("%2F", "/"))
}

fn s3(request: &Request) -> Option<Call> {
    let Some(key) = object_key(request) else {
        let prefix = request.query_value("prefix");
        return Some(Call::new("s3:ListBucket", "bucket").with("s3:prefix", Some(prefix.into_iter().collect())));
    };
    let folder = key.split_once('/').map(|(folder, _)| format!("{folder}/")).unwrap_or_default();
    let upload = request.query.contains("uploadId=") || request.query.contains("uploads");
    let action = match (&request.method, upload) {
        (&Method::GET | &Method::HEAD, _) => "GetObject",
        (&Method::PUT, _) | (&Method::POST, true) => "PutObject",
        (&Method::DELETE, true) => "AbortMultipartUpload",
        (&Method::DELETE, false) => "DeleteObject",
        _ => return None,
    };
    Some(Call::new(format!("s3:{action}"), folder))
}
