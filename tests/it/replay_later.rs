//! Replay of a later version of the contract: the requests recorded from app server 1.11.0 about profiles, settings and MCP servers. Every
//! response has everything that the recorded one has, or a deviation of `tests/data/contract/app-1.11-deviations.json` says what it has
//! instead, and why. (Our responses may have more fields, because older clients read others.)

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use axum::body::Body;
use http::Request;
use serde_json::{Map, Value, json};
use shared::config::SandboxConfig;
use shared::http::caller::Caller;
use shared::user::UserId;
use tempfile::TempDir;

use crate::support::api::Api;

/// Each recording begins without settings.
const RECORDINGS: [&str; 4] = ["profiles", "settings", "mcp-settings", "switch"];

/// Values that differ in each run.
const CHANGING: [&str; 1] = ["current_datetime"];

struct Case {
    file: &'static str,
    index: usize,
    label: String,
    method: String,
    target: String,
    headers: Map<String, Value>,
    body: Option<Value>,
    status: u16,
    answer: Value,
}

impl Case {
    fn request(&self) -> Request<Body> {
        let mut request = Request::builder().method(&*self.method).uri(&self.target);
        request = request.extension(Caller(UserId::local()));
        for (name, value) in &self.headers {
            request = request.header(name, value.as_str().expect("text"));
        }
        if self.body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let body = self.body.as_ref().map_or_else(Body::empty, |body| Body::from(body.to_string()));
        request.body(body).expect("a request")
    }
}

fn cases(file: &'static str) -> Vec<Case> {
    let text = fs::read_to_string(recorded(&format!("app-1.11-{file}.jsonl"))).expect("a recording");
    let read = |(index, line): (usize, &str)| {
        let line: Value = serde_json::from_str(line).expect("a recording is JSON");
        let (request, response) = (&line["request"], &line["response"]);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let (path, query) = (text(&request["path"]), text(&request["query"]));
        Case {
            file,
            index,
            label: text(&line["label"]),
            method: text(&request["method"]),
            target: if query.is_empty() { path } else { format!("{path}?{query}") },
            headers: request["headers"].as_object().cloned().unwrap_or_default(),
            body: Some(request["body"].clone()).filter(|body| !body.is_null()),
            status: response["status"].as_u64().and_then(|status| status.try_into().ok()).expect("a status"),
            answer: response["body"].clone(),
        }
    };
    text.lines().enumerate().map(read).collect()
}

/// An intended difference, for some cases of a recording.
struct Deviation {
    file: String,
    cases: BTreeSet<u64>,
    why: String,
    /// Our status, if it is another one.
    status: Option<u16>,
    /// What our response has, by JSON pointer, in place of what was recorded there. The pointer `""` is the whole response.
    instead: Vec<(String, Value)>,
    /// What our response lacks, by JSON pointer.
    absent: Vec<String>,
    /// The request is not sent.
    is_skipped: bool,
}

fn deviations() -> Vec<Deviation> {
    let text = fs::read_to_string(recorded("app-1.11-deviations.json")).expect("deviations");
    let entries: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    let read = |entry: &Value| {
        for key in entry.as_object().expect("an object").keys() {
            let known = ["file", "cases", "why", "status", "instead", "absent", "skipped"];
            assert!(known.contains(&key.as_str()), "nothing reads {key}");
        }
        let instead = entry["instead"].as_object().into_iter().flatten();
        Deviation {
            file: entry["file"].as_str().expect("a file").to_owned(),
            cases: entry["cases"].as_array().expect("cases").iter().filter_map(Value::as_u64).collect(),
            why: entry["why"].as_str().expect("a reason").to_owned(),
            status: entry["status"].as_u64().and_then(|status| status.try_into().ok()),
            instead: instead.map(|(place, value)| (place.clone(), value.clone())).collect(),
            absent: entry["absent"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect(),
            is_skipped: entry["skipped"] == true,
        }
    };
    entries.iter().map(read).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_recorded_exchange_of_the_later_version_gets_the_recorded_response_or_a_listed_deviation() {
    let deviations = deviations();
    let mut used = BTreeSet::new();
    let mut faults = Vec::new();
    let mut total = 0;
    for file in RECORDINGS {
        let folder = TempDir::new().expect("a folder");
        let api = Api::at(folder.path(), SandboxConfig::None).await;
        for case in cases(file) {
            total += 1;
            let index = u64::try_from(case.index).expect("a number");
            let own: Vec<(usize, &Deviation)> = deviations
                .iter()
                .enumerate()
                .filter(|(_, deviation)| deviation.file == case.file && deviation.cases.contains(&index))
                .collect();
            used.extend(own.iter().map(|(place, _)| (*place, index)));
            if own.iter().any(|(_, deviation)| deviation.is_skipped) {
                continue;
            }
            let (status, answer) = api.send(case.request()).await;
            let mut wanted = case.answer.clone();
            for (place, value) in own.iter().flat_map(|(_, deviation)| &deviation.instead) {
                match place.as_str() {
                    "" => wanted = value.clone(),
                    place => *at(&mut wanted, place) = value.clone(),
                }
            }
            for place in own.iter().flat_map(|(_, deviation)| &deviation.absent) {
                remove(&mut wanted, place);
            }
            let wanted_status = own.iter().find_map(|(_, deviation)| deviation.status).unwrap_or(case.status);
            let mut missing = Vec::new();
            lacks(&wanted, &answer, String::new(), &mut missing);
            if status != wanted_status || !missing.is_empty() {
                faults.push(format!(
                    "{} {} [{}] {} {}\n    status {wanted_status}, ours {status}\n    {}\n    ours {answer:.600}",
                    case.file,
                    case.index,
                    case.label,
                    case.method,
                    case.target,
                    missing.join("\n    ")
                ));
            }
        }
        api.stop().await;
    }
    for (place, deviation) in deviations.iter().enumerate() {
        for index in &deviation.cases {
            if !used.contains(&(place, *index)) {
                faults.push(format!("{} has no case {index}: {}", deviation.file, deviation.why));
            }
        }
    }
    assert!(faults.is_empty(), "{} of {total} cases:\n{}", faults.len(), faults.join("\n"));
}

/// A place in a recorded response; it may be a new one in an object.
fn at<'v>(value: &'v mut Value, place: &str) -> &'v mut Value {
    let (parent, key) = place.rsplit_once('/').expect("a pointer");
    let parent = value.pointer_mut(parent).expect("a place in the recorded response");
    match parent {
        Value::Array(_) => parent.get_mut(key.parse::<usize>().expect("an index")).expect("an item"),
        parent => &mut parent[key.replace("~1", "/")],
    }
}

fn remove(value: &mut Value, place: &str) {
    let (parent, key) = place.rsplit_once('/').expect("a pointer");
    let parent = value.pointer_mut(parent).and_then(Value::as_object_mut).expect("an object in the recorded response");
    parent.shift_remove(key).expect("a key of the recorded response");
}

/// Collects what a response lacks of the wanted one.
fn lacks(wanted: &Value, got: &Value, place: String, missing: &mut Vec<String>) {
    match (wanted, got) {
        (Value::Object(wanted), Value::Object(got)) => {
            for (key, value) in wanted.iter().filter(|(key, _)| !CHANGING.contains(&key.as_str())) {
                match got.get(key) {
                    Some(got) => lacks(value, got, format!("{place}/{key}"), missing),
                    None => missing.push(format!("{place}/{key}: wanted {value:.200}, got nothing")),
                }
            }
            // What is in a map with free names must be the same.
            if ["/mcp_config", "/profiles", "/provider_tokens_set"].iter().any(|map| place.ends_with(map)) {
                for key in got.keys().filter(|key| !wanted.contains_key(*key)) {
                    missing.push(format!("{place}/{key}: wanted nothing, got {:.200}", got[key]));
                }
            }
        }
        (Value::Array(wanted), Value::Array(got)) if wanted.len() == got.len() => {
            for (index, (wanted, got)) in wanted.iter().zip(got).enumerate() {
                lacks(wanted, got, format!("{place}/{index}"), missing);
            }
        }
        (wanted, got) if number(wanted) == number(got) => {}
        _ => missing.push(format!("{place}: wanted {wanted:.300}, got {got:.300}")),
    }
}

/// 30 and 30.0 are the same number.
fn number(value: &Value) -> Value {
    value.as_f64().map_or_else(|| value.clone(), |number| json!(number))
}

fn recorded(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/contract").join(name)
}
