//! Replay of the contract: the requests recorded from the reference (openhands-ai 1.6.0) are sent to the whole server,
//! and every response must be the recorded one, or a deviation that `tests/data/contract/deviations.json` lists
//! together with our response.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use local::import::command::import;
use local::options::{CommonOptions, SandboxKind, TargetOptions};
use local::server::{Environment, Server};
use regex_lite::Regex;
use serde_json::{Map, Value};
use tempfile::TempDir;

use crate::support::raw_http::{Answer, Connection};

/// In this order, because the last two change records. Deletions come after all of them.
const RECORDINGS: [&str; 8] = ["batch", "byid", "count", "search", "tz", "start-tasks", "patch", "post"];

/// Values that the server chooses when it creates a start task.
const MADE_BY_POST: &[&str] = &["id", "created_at", "updated_at", "timestamp"];
/// Our server updates it with every change, the reference does not.
const MADE_BY_PATCH: &[&str] = &["updated_at"];

/// A list: its path, and its query without `page_id`.
type List = (String, Vec<(String, String)>);

struct Case {
    file: String,
    label: String,
    method: String,
    path: String,
    query: String,
    headers: Map<String, Value>,
    body: Value,
    status: u16,
    content_type: String,
    answer: Value,
}

impl Case {
    fn read(file: &str, line: &str) -> Self {
        let line: Value = serde_json::from_str(line).expect("a recording is JSON");
        let (request, response) = (&line["request"], &line["response"]);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Self {
            file: file.to_owned(),
            label: text(&line["label"]),
            method: text(&request["method"]),
            path: text(&request["path"]),
            query: text(&request["query"]),
            headers: request["headers"].as_object().cloned().unwrap_or_default(),
            body: request["body"].clone(),
            status: response["status"].as_u64().and_then(|status| status.try_into().ok()).expect("a status"),
            content_type: text(&response["headers"]["content-type"]),
            answer: response["body"].clone(),
        }
    }

    fn made(&self) -> &'static [&'static str] {
        match self.method.as_str() {
            "POST" => MADE_BY_POST,
            _ if self.file.contains("replay-patch") => MADE_BY_PATCH,
            _ => &[],
        }
    }

    /// The list whose page the case requests, and the page id.
    fn walk(&self) -> (List, Option<String>) {
        let (pages, mut rest): (Vec<_>, Vec<_>) = pairs(&self.query).into_iter().partition(|(key, _)| key == "page_id");
        rest.sort();
        ((self.path.clone(), rest), pages.into_iter().next_back().map(|(_, page)| page))
    }

    /// Sends the request exactly as recorded, with this query.
    async fn send(&self, connection: &mut Connection, query: &str) -> Answer {
        let mut target = quote(&self.path, "/%{}:@!$&'()*+,;=~");
        if !query.is_empty() {
            target = format!("{target}?{}", quote(query, "%/:=&?~+!$,;'@()*[]{}|"));
        }
        let ours = ["host", "content-length", "connection", "accept-encoding", "user-agent"];
        let mut headers: Vec<(String, String)> = self
            .headers
            .iter()
            .map(|(name, value)| (name.to_ascii_lowercase(), value.as_str().expect("a header is text").to_owned()))
            .filter(|(name, _)| !ours.contains(&name.as_str()))
            .collect();
        let body = match &self.body {
            // In recordings of bytes that are not valid text, each character stands for one byte.
            Value::String(raw) if self.label.starts_with("raw:") && self.label.contains("utf8") => {
                Some(raw.chars().map(|char| u8::try_from(char).expect("a byte")).collect())
            }
            Value::String(raw) if self.label.starts_with("raw:") => Some(raw.clone().into_bytes()),
            Value::Null if ["POST", "PATCH", "PUT"].contains(&self.method.as_str()) => Some(Vec::new()),
            Value::Null => None,
            json => {
                if !headers.iter().any(|(name, _)| name == "content-type") {
                    headers.push(("content-type".to_owned(), "application/json".to_owned()));
                }
                Some(json.to_string().into_bytes())
            }
        };
        connection.send(&self.method, &target, &headers, body.as_deref()).await.expect("an answer")
    }
}

/// An intended difference from the reference, for one or several cases.
struct Deviation {
    file: Option<Regex>,
    label: Option<Regex>,
    path: Option<Regex>,
    query: Option<Regex>,
    expect: u16,
    why: String,
    /// The expected body, with `<made>` and `<cursor>` for values that differ between runs.
    body: Option<Value>,
    /// For a page: the ids of its items, in order.
    ids: Option<Value>,
    /// For a page: the recorded one, with its items in any order.
    any_order: bool,
    /// The recorded body with these values replaced, by JSON pointer.
    instead: Option<Map<String, Value>>,
    /// Only the status is compared.
    any_body: bool,
    /// The recorded page without the item at this JSON pointer.
    without: Option<String>,
}

impl Deviation {
    fn read(entry: &Value) -> Self {
        let known = [
            "file",
            "label",
            "path",
            "query",
            "expect",
            "why",
            "body",
            "ids",
            "any_order",
            "instead",
            "without",
            "any_body",
        ];
        for key in entry.as_object().expect("a deviation is an object").keys() {
            assert!(known.contains(&key.as_str()), "deviations.json: nothing reads {key}");
        }
        let expression = |key: &str| entry.get(key).map(|text| Regex::new(text.as_str().unwrap()).expect("a pattern"));
        Self {
            file: expression("file"),
            label: expression("label"),
            path: expression("path"),
            query: expression("query"),
            expect: entry["expect"].as_u64().and_then(|status| status.try_into().ok()).expect("a status"),
            why: entry["why"].as_str().expect("a reason").to_owned(),
            body: entry.get("body").cloned(),
            ids: entry.get("ids").cloned(),
            any_order: entry.get("any_order").is_some_and(|any| any == true),
            instead: entry.get("instead").map(|places| places.as_object().expect("places").clone()),
            any_body: entry.get("any_body").is_some_and(|any| any == true),
            without: entry.get("without").map(|place| place.as_str().expect("a place").to_owned()),
        }
    }

    fn matches(&self, case: &Case, query: &str) -> bool {
        [(&self.file, case.file.as_str()), (&self.label, &case.label), (&self.path, &case.path), (&self.query, query)]
            .iter()
            .all(|(pattern, text)| pattern.as_ref().is_none_or(|pattern| pattern.is_match(text)))
    }

    /// Describes the difference of a response, if any.
    fn difference(&self, case: &Case, status: u16, body: &Value) -> Option<String> {
        if status != self.expect {
            return Some(format!("wanted {}, got {status}: {body}", self.expect));
        }
        let differ = |wanted: &Value, got: &Value| {
            let [wanted, got] = [wanted, got].map(|body| normal(body, false, case.made(), "").to_string());
            (wanted != got).then(|| format!("wanted {wanted}\n    got    {got}"))
        };
        if let Some(wanted) = &self.body {
            return differ(wanted, body);
        }
        if let Some(wanted) = &self.ids {
            let ids = body["items"].as_array().into_iter().flatten().map(|item| item["id"].clone()).collect();
            return differ(wanted, &ids);
        }
        if self.any_body {
            return None;
        }
        if self.any_order {
            return differ(&in_order(&case.answer), &in_order(body));
        }
        let mut wanted = with_zone(&case.answer);
        for (place, value) in self.instead.iter().flatten() {
            *wanted.pointer_mut(place).expect("a place in the recorded body") = value.clone();
        }
        if let Some((list, index)) = self.without.as_deref().and_then(|place| place.rsplit_once('/')) {
            let list = wanted.pointer_mut(list).and_then(Value::as_array_mut).expect("a list in the recorded body");
            list.remove(index.parse().expect("an index"));
        }
        differ(&wanted, body)
    }
}

fn in_order(page: &Value) -> Value {
    let mut page = page.clone();
    if let Some(items) = page["items"].as_array_mut() {
        items.sort_by_key(|item| item["id"].to_string());
    }
    page
}

#[tokio::test]
async fn every_recorded_exchange_gets_the_recorded_response_or_a_listed_deviation() {
    // Cases that delete run last, because the reference lacks these routes and other cases read the deleted rows.
    replay("deviations.json", |cases| cases.sort_by_key(|case| case.method == "DELETE")).await;
}

/// In recording order later cases read what an earlier one has deleted. Tools that replay the cases in this order need
/// the complete list of differences, too.
#[tokio::test]
async fn in_recording_order_only_deleted_rows_differ_in_addition() {
    let read = |name: &str| -> Vec<Value> {
        serde_json::from_str(&fs::read_to_string(recorded(name)).expect("deviations")).expect("JSON")
    };
    let all = read("deviations-recorded-order.json");
    let (deleted, others): (Vec<Value>, Vec<Value>) =
        all.into_iter().partition(|entry| entry.get("any_body").is_some());
    assert_eq!(others, read("deviations.json"));
    assert!(deleted.iter().all(|entry| entry["why"] == "an earlier case has deleted the conversation"));
    replay("deviations-recorded-order.json", |_| {}).await;
}

async fn replay(deviations: &str, reorder: impl FnOnce(&mut Vec<Case>)) {
    let folder = TempDir::new().expect("a folder");
    let data = folder.path().join("data");
    let imported = import(&[recorded("seed.jsonl")], &TargetOptions::default(), &data, std::future::pending()).await;
    assert!(imported.expect("an import"), "rows were skipped");
    let server = serve(&data).await;
    let entries: Value =
        serde_json::from_str(&fs::read_to_string(recorded(deviations)).expect("deviations")).expect("JSON");
    let deviations: Vec<Deviation> = entries.as_array().expect("a list").iter().map(Deviation::read).collect();
    let shadowed = deviations.iter().any(|deviation| deviation.any_body);
    let mut used = vec![0; deviations.len()];
    let (mut faults, mut cursors) = (Vec::new(), HashMap::new());
    let mut cases = Vec::new();
    for name in RECORDINGS.map(|name| format!("replay-{name}.jsonl")) {
        let lines = fs::read_to_string(recorded(&name)).expect("a recording");
        cases.extend(lines.lines().map(|line| Case::read(&name, line)));
    }
    reorder(&mut cases);
    let mut connection = Connection::to(server.address);
    for case in &cases {
        let (walk, page) = case.walk();
        let mine = page.and_then(|page| cursors.get(&(walk.clone(), page))).cloned();
        let query = mine.map_or_else(|| case.query.clone(), |mine| with_page(&case.query, mine));
        let answer = case.send(&mut connection, &query).await;
        let body = serde_json::from_slice(&answer.body)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&answer.body).into_owned()));
        if let (Some(theirs), Some(ours)) = (case.answer["next_page_id"].as_str(), body.get("next_page_id")) {
            cursors.insert((walk, theirs.to_owned()), ours.as_str().map(str::to_owned).unwrap_or_default());
        }
        let difference = match deviations.iter().position(|deviation| deviation.matches(case, &query)) {
            Some(index) => {
                used[index] += 1;
                let deviation = &deviations[index];
                let difference = deviation.difference(case, answer.status, &body);
                difference.map(|text| format!("deviation \"{}\": {text}", deviation.why))
            }
            None => difference(case, &answer, &body),
        };
        if let Some(text) = difference {
            let Case { file, label, method, path, .. } = case;
            faults.push(format!("{file} [{label}] {method} {path}?{query:.200}\n    {text:.1500}"));
        }
    }
    // If a deviation precedes others, the others may match no case.
    let idle = deviations.iter().zip(used).filter(|(deviation, used)| *used == 0 && (!shadowed || deviation.any_body));
    for (deviation, _) in idle {
        faults.push(format!("deviations.json: nothing deviates like this: {}", deviation.why));
    }
    assert!(faults.is_empty(), "{} of {} cases:\n{}", faults.len(), cases.len(), faults.join("\n"));
    server.shutdown().await;
}

/// Describes the difference between a response and the recorded one.
fn difference(case: &Case, answer: &Answer, body: &Value) -> Option<String> {
    let (wanted, got) = (case.status, answer.status);
    if wanted == 500 {
        return Some(format!("the reference fails here; name what we answer instead: {got} {body}"));
    }
    if wanted != got {
        return Some(format!("status {wanted} -> {got}: {body}"));
    }
    let content_type = answer.header("content-type").unwrap_or_default();
    if case.content_type != content_type {
        return Some(format!("content-type {} -> {content_type}", case.content_type));
    }
    // Exports are compared by tests of their own.
    if case.path.ends_with("/download") && got == 200 {
        return None;
    }
    let loose = is_of_the_json_parser(&case.answer);
    let wanted = normal(&with_zone(&case.answer), loose, case.made(), "").to_string();
    let got = normal(body, loose, case.made(), "").to_string();
    (wanted != got).then(|| format!("reference {wanted:.700}\n    ours      {got:.700}"))
}

/// In the reference, times of start tasks have no zone when they are read back; ours are always marked as UTC.
fn with_zone(value: &Value) -> Value {
    let mut value = value.clone();
    match &mut value {
        Value::Object(fields) => {
            for (key, field) in fields.iter_mut() {
                match field.as_str() {
                    Some(time) if ["created_at", "updated_at"].contains(&key.as_str()) && !time.ends_with('Z') => {
                        *field = format!("{time}Z").into();
                    }
                    _ => *field = with_zone(field),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| *item = with_zone(item)),
        _ => {}
    }
    value
}

/// The message for malformed JSON is that of Python's parser.
fn is_of_the_json_parser(answer: &Value) -> bool {
    answer["detail"].as_array().is_some_and(|entries| entries.iter().any(|entry| entry["type"] == "json_invalid"))
}

/// Fields of a conversation that the recorded version lacks.
const LATER_FIELDS: [&str; 4] = ["agent_kind", "tags", "acp_server", "launched_agent_profile"];

/// A body without values that differ between runs; `loose`: without the messages of violations, too. Keeps the order of
/// keys.
fn normal(value: &Value, loose: bool, made: &[&str], key: &str) -> Value {
    match value {
        Value::Object(fields) => fields
            .iter()
            .filter(|(key, _)| !(loose && (*key == "msg" || *key == "ctx")))
            // Conversations have fields of versions after the recordings.
            .filter(|(key, _)| !(fields.contains_key("sandbox_status") && LATER_FIELDS.contains(&key.as_str())))
            .map(|(key, value)| (key.clone(), normal(value, loose, made, key)))
            .collect(),
        Value::Array(items) => items.iter().map(|item| normal(item, loose, made, key)).collect(),
        Value::Null => Value::Null,
        _ if key == "next_page_id" => "<cursor>".into(),
        Value::String(_) if made.contains(&key) => "<made>".into(),
        other => other.clone(),
    }
}

async fn serve(data: &Path) -> Server {
    let options = CommonOptions::on(data.to_owned(), SandboxKind::None);
    Server::start(&options, Environment::default(), true, None).await.expect("the server starts")
}

fn recorded(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/contract").join(name)
}

fn pairs(query: &str) -> Vec<(String, String)> {
    form_urlencoded::parse(query.as_bytes()).into_owned().collect()
}

fn with_page(query: &str, page: String) -> String {
    let pairs = pairs(query).into_iter().map(|(key, value)| match key.as_str() {
        "page_id" => (key, page.clone()),
        _ => (key, value),
    });
    form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish()
}

/// Percent-encodes all characters but letters, digits, `_.-~` and `safe`.
fn quote(text: &str, safe: &str) -> String {
    let mut quoted = String::new();
    for byte in text.bytes() {
        let char = char::from(byte);
        if char.is_ascii_alphanumeric() || "_.-~".contains(char) || (byte.is_ascii() && safe.contains(char)) {
            quoted.push(char);
        } else {
            quoted.push_str(&format!("%{byte:02X}"));
        }
    }
    quoted
}
