//! The capacity units that reading lists and writing conversations consume, by the size of the account and the depth of the page. The
//! embedded engine counts them by DynamoDB's rules.
//!
//! ```sh
//! cargo bench -p tests --bench records --profile dev -- 100 10000 1000000
//! ```

#![allow(clippy::expect_used, clippy::disallowed_methods, reason = "a benchmark fails by panicking")]

#[path = "../it/support"]
#[allow(dead_code, reason = "shared with the tests")]
mod support {
    pub mod account;
    pub mod api;
    pub mod engines;
    pub mod fault_proxy;
    pub mod hostile_aws;
    pub mod iam_proxy;
    pub mod lagging_indexes;
    pub mod meter;
    pub mod recurring_faults;
    pub mod seed;
    pub mod server;
    pub mod sigv4;
}

use std::time::{Duration, Instant};

use http::Request;
use local::import::{Entry, Importer, Pace};
use secrecy::SecretString;
use serde_json::{Value, json};
use shared::config::SandboxConfig;
use shared::conversation::search::{Cursor, Filter, SortOrder};
use shared::http::page_token;
use shared::user::UserId;
use support::account;
use support::api::Api;
use support::meter::Meter;
use tempfile::TempDir;

#[tokio::main]
async fn main() {
    let sizes: Vec<u64> = std::env::args().skip(1).filter_map(|size| size.replace('_', "").parse().ok()).collect();
    assert!(!sizes.is_empty(), "pass the size of the account, e.g. 10000");
    for size in sizes {
        measure(size).await;
    }
}

async fn measure(size: u64) {
    let folder = TempDir::new().expect("a folder");
    let mut api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("user-one");
    let started = Instant::now();
    load(&api, &user, size).await;
    let took = started.elapsed().as_secs_f64();
    let rows = u32::try_from(size).expect("an account of this size");
    println!("\n### {size} conversations\n");
    println!("Loaded in {took:.1} s, {:.2} ms a row; a row of {} bytes.\n", took * 1000.0 / f64::from(rows), bytes(0));
    println!("| request | rows | queries and other reads | read units | ms |\n|---|---|---|---|---|");
    let meter = Meter::new();
    let _way = api.measure(&meter).await;
    for (what, path, query) in requests(&user, size) {
        let sent = Instant::now();
        let (status, answer) = api.get(&user, path, &query).await;
        let took = sent.elapsed().as_millis();
        // A filtered count of a large account may be refused after its time limit.
        assert!(status == 200 || (status == 400 && what.starts_with("count, ")), "{what}: {status} {answer}");
        let rows = match &answer {
            Value::Array(items) => items.len(),
            Value::Object(page) => page["items"].as_array().map_or(0, Vec::len),
            _ => 0,
        };
        let rows = if rows > 0 { rows.to_string() } else { format!("({answer:.40})") };
        let costs = meter.take();
        let reads: usize = costs.values().map(|cost| cost.requests).sum();
        let units: f64 = costs.values().map(|cost| cost.units).sum();
        println!("| {what} | {rows} | {reads} | {units:.1} | {took} |");
    }
    writes(&api, &user, &meter).await;
    api.stop().await;
}

/// The session key of the newest conversation's sandbox.
const KEY: &str = "session-key";

/// Measures the writes of the newest conversation.
async fn writes(api: &Api, user: &UserId, meter: &Meter) {
    let sandboxes = api.stores.sandboxes();
    let key = SecretString::from(KEY);
    let record = sandboxes.new_record(user, &account::sandbox_id(0), "spec", &key).await.expect("a record");
    sandboxes.create(record, None).await.expect("stored");
    let id = account::conversation_id(0).simple().to_string();
    println!("\n| write | units of conversations | units of all tables |\n|---|---|---|");
    let events = format!("/api/v1/webhooks/events/{id}");
    let spent = |what: &str| {
        let writes = ["PutItem", "UpdateItem", "DeleteItem", "TransactWriteItems", "BatchWriteItem"];
        let (mut conversations, mut all) = (0.0, 0.0);
        for ((operation, table), units) in meter.take_tables() {
            if writes.contains(&operation.as_str()) {
                all += units;
                conversations += if table.ends_with("conversations") { units } else { 0.0 };
            }
        }
        println!("| {what} | {conversations} | {all} |");
    };
    meter.take();
    post(api, &events, &json!([stats(1)])).await;
    spent("a batch with stats");
    post(api, &events, &json!([stats(2)])).await;
    spent("another batch with stats, at once");
    let title = json!({"title": "Another title of the usual length, six words"});
    let (status, answer) = api.call(user, "PATCH", &format!("/api/v1/app-conversations/{id}"), Some(&title)).await;
    assert_eq!(status, 200, "{answer}");
    spent("a rename");
    let report = |status: &str, number: u32| {
        json!({"id": id, "execution_status": status, "stats": stats(number)["value"], "title": "A title of the agent",
            "updated_at": format!("2026-01-01T00:00:{number:02}Z"), "agent": {"llm": {"model": "a/model", "usage_id": "agent"}}})
    };
    post(api, "/api/v1/webhooks/conversations", &report("running", 3)).await;
    spent("a snapshot of the conversation");
    post(api, "/api/v1/webhooks/conversations", &report("running", 4)).await;
    post(api, &events, &json!([event(5, "MessageEvent")])).await;
    for number in 6..16 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let events_of_step = [event(number, "ActionEvent"), event(number, "ObservationEvent"), stats(number)];
        post(api, &events, &json!(events_of_step)).await;
    }
    let mut end = event(16, "ConversationStateUpdateEvent");
    (end["key"], end["value"]) = (json!("execution_status"), json!("finished"));
    post(api, &events, &json!([event(16, "MessageEvent"), end])).await;
    post(api, "/api/v1/webhooks/conversations", &report("finished", 17)).await;
    spent("an agent's turn: two snapshots, twelve batches, ten of them with stats, one per second");
}

async fn post(api: &Api, path: &str, body: &Value) {
    let request = Request::post(path)
        .header("Content-Type", "application/json")
        .header("X-Session-API-Key", KEY)
        .body(body.to_string().into());
    let (status, answer) = api.send(request.expect("a request")).await;
    assert_eq!(status, 200, "{path}: {answer}");
}

fn event(number: u32, kind: &str) -> Value {
    let id = uuid::Uuid::new_v4();
    json!({"id": id, "timestamp": format!("2026-01-01T00:00:{number:02}"), "source": "agent", "kind": kind, "text": "x".repeat(300)})
}

fn stats(number: u32) -> Value {
    let mut event = event(number, "ConversationStateUpdateEvent");
    let usage = json!({"prompt_tokens": 1000 * number, "completion_tokens": 10 * number, "cache_read_tokens": 0,
        "cache_write_tokens": 0, "reasoning_tokens": 0, "context_window": 200_000, "per_turn_token": 1000});
    event["key"] = json!("stats");
    event["value"] = json!({"usage_to_metrics": {"agent": {"accumulated_cost": 0.1 * f64::from(number), "accumulated_token_usage": usage}}});
    event
}

async fn load(api: &Api, user: &UserId, size: u64) {
    let owner = user.clone();
    let entries = (0..size).map(move |number| {
        let data = account::conversation(number)["data"].take();
        Ok(Entry::Conversation(Box::new(support::seed::conversation(&owner, data))))
    });
    let importer = Importer::new(&api.aws, &api.names, Pace::EMBEDDED);
    let (summary, end) = importer.run(entries, std::future::pending(), |_| {}).await;
    assert_eq!(summary.settled(), size, "{end:?}");
}

/// The size of a row's data as JSON, about that of its item without the index attributes.
fn bytes(number: u64) -> usize {
    account::conversation(number)["data"].to_string().len()
}

type Query = Vec<(&'static str, String)>;

fn requests(user: &UserId, size: u64) -> Vec<(String, &'static str, Query)> {
    let all: Query = vec![("limit", "20".to_owned())];
    let with = |name: &'static str, value: String| {
        let mut query = all.clone();
        query.push((name, value));
        query
    };
    let after = |number: u64| with("page_id", page_id_after(user, number));
    let middle = account::created_at(size / 2);
    let ids = (0..10).map(|number| ("ids", account::conversation_id(number * size / 10).to_string())).collect();
    let mut requests = vec![("search, page 1".to_owned(), "/search", all.clone())];
    // One row in twenty is not in this list.
    let deep = (1000 * 20 * 20 / 19).min(size.saturating_sub(25));
    requests.push(("search, the page in the middle".to_owned(), "/search", after(size / 2)));
    requests.push((format!("search, after {deep} rows"), "/search", after(deep)));
    requests.push(("search, limit=100".to_owned(), "/search", vec![("limit", "100".to_owned())]));
    requests.push(("search, created before the middle".to_owned(), "/search", with("created_at__lt", middle.clone())));
    requests.push((
        "search, updated before the middle, by creation".to_owned(),
        "/search",
        with("updated_at__lt", middle.clone()),
    ));
    let by_change = |mut query: Query| {
        query.push(("sort_order", "UPDATED_AT_DESC".to_owned()));
        query
    };
    requests.push((
        "search, updated since the middle, oldest first".to_owned(),
        "/search",
        [with("updated_at__gte", middle.clone()), vec![("sort_order", "CREATED_AT".to_owned())]].concat(),
    ));
    requests.push((
        "search, updated in the future, by creation".to_owned(),
        "/search",
        with("updated_at__gte", "2099-01-01T00:00:00Z".to_owned()),
    ));
    requests.push((
        "search, created before the middle, last changed first".to_owned(),
        "/search",
        by_change(with("created_at__lt", middle.clone())),
    ));
    requests.push((
        "search, created before the oldest, last changed first".to_owned(),
        "/search",
        by_change(with("created_at__lt", "1999-01-01T00:00:00Z".to_owned())),
    ));
    requests.push((
        "search, one sandbox, last changed first".to_owned(),
        "/search",
        by_change(with("sandbox_id__eq", account::sandbox_id(size / 2))),
    ));
    requests.push((
        "search, a word of no title, last changed first".to_owned(),
        "/search",
        by_change(with("title__contains", "nowhere".to_owned())),
    ));
    requests.push(("search, one sandbox".to_owned(), "/search", with("sandbox_id__eq", account::sandbox_id(size / 2))));
    requests.push((
        "search, last changed first".to_owned(),
        "/search",
        with("sort_order", "UPDATED_AT_DESC".to_owned()),
    ));
    requests.push((
        "search, a word of one title in three".to_owned(),
        "/search",
        with("title__contains", account::COMMON.to_owned()),
    ));
    requests.push((
        "search, a word of one title in 500".to_owned(),
        "/search",
        with("title__contains", account::RARE.to_owned()),
    ));
    requests.push(("search, a word of no title".to_owned(), "/search", with("title__contains", "nowhere".to_owned())));
    requests.push(("count".to_owned(), "/count", Vec::new()));
    requests.push((
        "count without sub-conversations".to_owned(),
        "/count",
        vec![("include_sub_conversations", "false".to_owned())],
    ));
    requests.push(("count, one sandbox".to_owned(), "/count", vec![("sandbox_id__eq", account::sandbox_id(size / 2))]));
    requests.push(("count, created since the middle".to_owned(), "/count", vec![("created_at__gte", middle)]));
    requests.push(("batch of 10".to_owned(), "", ids));
    requests
}

/// The page id that `/search` returns with a page that ends with this conversation.
fn page_id_after(user: &UserId, number: u64) -> String {
    let number = if account::is_sub_conversation(number) { number + 1 } else { number };
    let created_at = serde_json::from_value(json!(account::created_at(number))).expect("a time");
    let after = Cursor::at(created_at, account::conversation_id(number));
    let list = ("conversations".to_owned(), Filter::default(), SortOrder::CreatedAtDesc);
    page_token::encode(user, &list, &after).expect("a page id")
}
