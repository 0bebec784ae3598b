//! A proxy between an SDK and DynamoDB that measures the capacity units each operation consumes, as DynamoDB counts
//! them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::response::Response;
use http::header;
use local::engines::EngineCredentials;
use serde_json::{Value, json};

use super::engines::Engines;
use super::server::{Cut, Request, Server};
use super::sigv4::sign;

/// What an operation consumed since the last [`Meter::take`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    pub requests: usize,
    /// Read units for reads, write units for writes.
    pub units: f64,
}

#[derive(Debug, Default)]
struct State {
    costs: Mutex<BTreeMap<String, Cost>>,
    /// Units by the operation and the table's name.
    of_tables: Mutex<BTreeMap<(String, String), f64>>,
    http: reqwest::Client,
}

/// Counts consumed capacity. Clones share the counters.
#[derive(Clone, Debug, Default)]
pub struct Meter(Arc<State>);

impl Meter {
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a proxy through the meter to DynamoDB.
    pub async fn to(&self, engines: &Engines) -> Server {
        let (meter, url, credentials) = (self.clone(), engines.dynamodb.clone(), engines.credentials.clone());
        Server::start(move |request| {
            let (meter, url, credentials) = (meter.clone(), url.clone(), credentials.clone());
            async move { meter.pass(request, &url, &credentials).await }
        })
        .await
    }

    /// Returns what was consumed since the last call, by operation, and resets the counters.
    pub fn take(&self) -> BTreeMap<String, Cost> {
        self.take_tables();
        std::mem::take(&mut *self.0.costs.lock().expect("costs"))
    }

    /// Returns the units since the last call, by operation and table, and resets these counters.
    pub fn take_tables(&self) -> BTreeMap<(String, String), f64> {
        std::mem::take(&mut *self.0.of_tables.lock().expect("costs"))
    }

    async fn pass(&self, request: Request, url: &str, credentials: &EngineCredentials) -> Result<Response, Cut> {
        let target = request.header("x-amz-target").unwrap_or_default();
        let operation = target.rsplit('.').next().unwrap_or(target).to_owned();
        let body = match request.json() {
            Value::Object(mut body) => {
                body.insert("ReturnConsumedCapacity".to_owned(), json!("TOTAL"));
                Value::Object(body).to_string().into()
            }
            _ => request.body.clone(),
        };
        let mut headers = request.headers.clone();
        for name in [header::HOST, header::CONTENT_LENGTH, header::AUTHORIZATION] {
            headers.remove(name);
        }
        let url = format!("{url}{}", request.path);
        // The original signature covers the unchanged body, so the request is signed again.
        sign("dynamodb", credentials, "POST", &url, &mut headers, &body);
        let sent = self.0.http.post(url).headers(headers).body(body).send();
        let answer = sent.await.map_err(|_| Cut)?;
        let mut response = Response::builder().status(answer.status());
        for (name, value) in answer.headers() {
            response = response.header(name, value);
        }
        let body = answer.bytes().await.map_err(|_| Cut)?;
        let consumed = serde_json::from_slice::<Value>(&body).unwrap_or_default()["ConsumedCapacity"].take();
        {
            let mut of_tables = self.0.of_tables.lock().expect("costs");
            for table in consumed.as_array().map_or(std::slice::from_ref(&consumed), Vec::as_slice) {
                let name = table["TableName"].as_str().unwrap_or_default().to_owned();
                *of_tables.entry((operation.clone(), name)).or_default() += units(table);
            }
            let mut costs = self.0.costs.lock().expect("costs");
            let cost = costs.entry(operation).or_default();
            cost.requests += 1;
            cost.units += units(&consumed);
        }
        response.body(Body::from(body)).map_err(|_| Cut)
    }
}

/// The units of one table or the sum of several.
fn units(consumed: &Value) -> f64 {
    match consumed {
        Value::Array(tables) => tables.iter().map(units).sum(),
        table => table["CapacityUnits"].as_f64().unwrap_or_default(),
    }
}
