//! A stand-in for CloudFront KeyValueStore: its data plane, with the ETag of the whole store, and what an edge location sees of it, which
//! lags.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use axum::response::Response;
use http::StatusCode;
use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use super::server::{Cut, Request, Server, json as answer};

pub const ARN: &str = "arn:aws:cloudfront::123456789012:key-value-store/11111111-2222-3333-4444-555555555555";

type Keys = BTreeMap<String, String>;

#[derive(Debug, Default)]
struct State {
    keys: Keys,
    version: usize,
    /// Contents and when edge locations see them, in order.
    seen: Vec<(Instant, Keys)>,
    /// How long a write takes to reach edge locations.
    delay: Duration,
    /// How many of the next updates another writer overtakes.
    contended: usize,
    /// The status with which all calls fail.
    fault: Option<u16>,
    updates: usize,
    refused: usize,
}

#[derive(Debug)]
pub struct KeyValueStore {
    server: Server,
    state: Arc<Mutex<State>>,
}

impl KeyValueStore {
    pub async fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let shared = state.clone();
        let server = Server::start(move |request| {
            let response = handle(&request, &mut shared.lock().expect("the store"));
            async move { Ok::<Response, Cut>(response) }
        })
        .await;
        Self { server, state }
    }

    pub fn url(&self) -> String {
        self.server.url()
    }

    /// What an edge location sees now.
    pub fn at_edge(&self) -> Keys {
        let state = self.state();
        let now = Instant::now();
        state.seen.iter().rev().find(|(at, _)| *at <= now).map(|(_, keys)| keys.clone()).unwrap_or_default()
    }

    /// The keys as they are.
    pub fn keys(&self) -> Keys {
        self.state().keys.clone()
    }

    /// Later writes reach edge locations after this time.
    pub fn delay(&self, delay: Duration) {
        self.state().delay = delay;
    }

    /// Another writer overtakes so many of the next updates.
    pub fn contend(&self, updates: usize) {
        self.state().contended = updates;
    }

    /// Sets a key without a call, at once.
    pub fn poison(&self, key: &str, value: &str) {
        let mut state = self.state();
        state.keys.insert(key.to_owned(), value.to_owned());
        state.version += 1;
        let keys = state.keys.clone();
        state.seen.push((Instant::now(), keys));
    }

    /// All calls fail with this status, or no longer.
    pub fn set_fault(&self, status: Option<u16>) {
        self.state().fault = status;
    }

    /// The number of updates that were written, and of those that were refused because of their ETag.
    pub fn updates(&self) -> (usize, usize) {
        let state = self.state();
        (state.updates, state.refused)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the store")
    }
}

fn refusal(status: u16, code: &str, message: &str) -> Response {
    let mut response = answer(StatusCode::from_u16(status).expect("a status"), &json!({"Message": message}));
    response.headers_mut().insert("x-amzn-errortype", code.parse().expect("a header"));
    response
}

fn handle(request: &Request, state: &mut State) -> Response {
    let authorization = request.header("authorization").unwrap_or_default();
    let is_signed = authorization.starts_with("AWS4-ECDSA-P256-SHA256 ")
        && authorization.contains("/cloudfront-keyvaluestore/aws4_request")
        && request.header("x-amz-region-set") == Some("*");
    if !is_signed {
        return refusal(403, "AccessDeniedException", "The request is not signed with Signature Version 4a");
    }
    if let Some(status) = state.fault {
        return refusal(status, "InternalServerException", "A fault of a test");
    }
    let path = percent_decode_str(&request.path).decode_utf8().expect("UTF-8").into_owned();
    let etag = format!("E{}", state.version);
    let mut response = match (request.method.as_str(), path.strip_prefix("/key-value-stores/")) {
        ("GET", Some(ARN)) => answer(
            StatusCode::OK,
            &json!({
                "ItemCount": state.keys.len(), "TotalSizeInBytes": size(&state.keys), "KvsARN": ARN, "Created": 1_700_000_000,
                "Status": "READY",
            }),
        ),
        ("POST", Some(rest)) if rest == format!("{ARN}/keys") => {
            if state.contended > 0 {
                state.contended -= 1;
                state.version += 1;
            }
            if request.header("if-match") != Some(format!("E{}", state.version).as_str()) {
                state.refused += 1;
                return refusal(409, "ConflictException", "The store has another ETag");
            }
            match updated(&state.keys, &request.json()) {
                Err(refused) => return *refused,
                Ok(keys) => {
                    state.keys = keys;
                    state.version += 1;
                    state.updates += 1;
                    state.seen.push((Instant::now() + state.delay, state.keys.clone()));
                    let body = json!({"ItemCount": state.keys.len(), "TotalSizeInBytes": size(&state.keys)});
                    let mut response = answer(StatusCode::OK, &body);
                    let etag = format!("E{}", state.version);
                    response.headers_mut().insert("etag", etag.parse().expect("a header"));
                    return response;
                }
            }
        }
        _ => return refusal(404, "ResourceNotFoundException", "There is no such store"),
    };
    response.headers_mut().insert("etag", etag.parse().expect("a header"));
    response
}

/// All changes, or none.
fn updated(keys: &Keys, body: &Value) -> Result<Keys, Box<Response>> {
    let invalid = |message: &str| Err(Box::new(refusal(400, "ValidationException", message)));
    let list = |name: &str| body[name].as_array().cloned().unwrap_or_default();
    let (puts, deletes) = (list("Puts"), list("Deletes"));
    if puts.is_empty() && deletes.is_empty() || puts.len() + deletes.len() > 50 {
        return invalid("An update has 1 to 50 keys");
    }
    let mut keys = keys.clone();
    for put in puts {
        let (Some(key), Some(value)) = (put["Key"].as_str(), put["Value"].as_str()) else {
            return invalid("A put has a key and a value");
        };
        if key.is_empty() || key.len() > 512 || value.len() > 1024 {
            return invalid("A key has at most 512 bytes and a value 1 KB");
        }
        keys.insert(key.to_owned(), value.to_owned());
    }
    for delete in deletes {
        let Some(key) = delete["Key"].as_str() else { return invalid("A delete has a key") };
        if keys.remove(key).is_none() {
            return Err(Box::new(refusal(404, "ResourceNotFoundException", "There is no such key")));
        }
    }
    if size(&keys) > 5 * 1024 * 1024 { invalid("A store has at most 5 MB") } else { Ok(keys) }
}

fn size(keys: &Keys) -> usize {
    keys.iter().map(|(key, value)| key.len() + value.len()).sum()
}
