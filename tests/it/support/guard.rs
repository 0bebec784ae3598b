//! What stands between a function and AWS: its policy. Each call is one or more actions on resources; which of them IAM would
//! refuse is kept for a test to look at.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use axum::response::Response;
use http::Method;
use serde_json::Value;

use super::gate::forward;
use super::server::{Cut, Request, Server};

/// An action on a resource, as policies and calls name it: `dynamodb:Query users/index/undelivered`, `s3:GetObject exports/`,
/// `s3:ListBucket bucket`.
pub type Permission = String;

#[derive(Debug)]
struct State {
    allowed: BTreeMap<String, BTreeSet<Permission>>,
    refused: Mutex<BTreeSet<String>>,
    prefix: &'static str,
    http: reqwest::Client,
}

/// Watches. Clones are the same guard.
#[derive(Clone, Debug)]
pub struct Guard(Arc<State>);

impl Guard {
    /// With what each function may do; `prefix` is the one of tables' names.
    pub fn new(allowed: BTreeMap<String, BTreeSet<Permission>>, prefix: &'static str) -> Self {
        Self(Arc::new(State { allowed, refused: Mutex::default(), prefix, http: reqwest::Client::new() }))
    }

    pub fn functions(&self) -> impl Iterator<Item = &String> {
        self.0.allowed.keys()
    }

    /// A function's way to one of the engines.
    pub async fn to(&self, function: &str, upstream: &str) -> Server {
        let (guard, function, upstream) = (self.clone(), function.to_owned(), upstream.to_owned());
        Server::start(move |request| {
            let (guard, function, upstream) = (guard.clone(), function.clone(), upstream.clone());
            async move { guard.pass(&function, request, &upstream).await }
        })
        .await
    }

    /// What IAM would refuse: function, action, resource.
    pub fn refused(&self) -> BTreeSet<String> {
        self.0.refused.lock().expect("unpoisoned").clone()
    }

    async fn pass(&self, function: &str, request: Request, upstream: &str) -> Result<Response, Cut> {
        let state = &*self.0;
        let needed = needed(&request, state.prefix);
        for permission in needed {
            if !state.allowed[function].contains(&permission) {
                state.refused.lock().expect("unpoisoned").insert(format!("{function} {permission}"));
            }
        }
        // Not refused here: one run tells all that is missing.
        forward(&state.http, request, upstream).await
    }
}

fn needed(request: &Request, prefix: &str) -> BTreeSet<Permission> {
    let Some(target) = request.header("x-amz-target") else { return object(request).into_iter().collect() };
    let body = request.json();
    let (service, operation) = target.split_once('.').expect("a target");
    if service.starts_with("AmazonSQS") {
        // A batch needs the permission of its single operation.
        return [format!("sqs:{} queue", operation.trim_end_matches("Batch"))].into();
    }
    let table = |name: &Value| {
        let name = name.as_str().expect("a table's name");
        name.strip_prefix(prefix).expect("a table of this deployment").to_owned()
    };
    match operation {
        "TransactWriteItems" => {
            let items = body["TransactItems"]
                .as_array()
                .into_iter()
                .flatten()
                .flat_map(|item| item.as_object().expect("an item"));
            items
                .map(|(kind, item)| {
                    let action = match kind.as_str() {
                        "Put" => "PutItem",
                        "Update" => "UpdateItem",
                        "Delete" => "DeleteItem",
                        _ => "ConditionCheckItem",
                    };
                    format!("dynamodb:{action} {}", table(&item["TableName"]))
                })
                .collect()
        }
        "BatchGetItem" | "BatchWriteItem" => {
            let tables = body["RequestItems"].as_object().expect("items").keys();
            tables.map(|name| format!("dynamodb:{operation} {}", table(&name.as_str().into()))).collect()
        }
        _ => {
            let index = body["IndexName"].as_str().map(|name| format!("/index/{name}")).unwrap_or_default();
            [format!("dynamodb:{operation} {}{index}", table(&body["TableName"]))].into()
        }
    }
}

/// Path style: the bucket, then the key.
fn object(request: &Request) -> Option<Permission> {
    let key = request.path.trim_start_matches('/').split_once('/').map(|(_, key)| key).unwrap_or_default();
    let folder =
        |key: &str| key.replace("%2F", "/").split_once('/').map(|(folder, _)| format!("{folder}/")).unwrap_or_default();
    if key.is_empty() {
        return Some("s3:ListBucket bucket".to_owned());
    }
    let upload = request.query.contains("uploadId=") || request.query.contains("uploads");
    let action = match (&request.method, upload) {
        (&Method::GET | &Method::HEAD, _) => "GetObject",
        (&Method::PUT, _) | (&Method::POST, true) => "PutObject",
        (&Method::DELETE, true) => "AbortMultipartUpload",
        (&Method::DELETE, false) => "DeleteObject",
        _ => return None,
    };
    Some(format!("s3:{action} {}", folder(key)))
}
