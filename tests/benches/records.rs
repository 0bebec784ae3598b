//! The capacity units that reading lists consumes, by the size of the account and the depth of the page. The embedded
//! engine counts them by DynamoDB's rules.
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

use std::time::Instant;

use local::import::{Entry, Importer, Pace};
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
    println!("| request | rows | queries and other reads | read units |\n|---|---|---|---|");
    let meter = Meter::new();
    let _way = api.measure(&meter).await;
    for (what, path, query) in requests(&user, size) {
        let (status, answer) = api.get(&user, path, &query).await;
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
        println!("| {what} | {rows} | {reads} | {units:.1} |");
    }
    api.stop().await;
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
    // Rows with the same instant are ordered by the complements of their ids.
    let id = uuid::Uuid::from_u128(!account::conversation_id(number).as_u128());
    let row = format!("{}#{}", account::created_at(number), id.simple());
    let after: Cursor = serde_json::from_value(json!(row)).expect("a place");
    let list = ("conversations".to_owned(), Filter::default(), SortOrder::CreatedAtDesc);
    page_token::encode(user, &list, &after).expect("a page id")
}
