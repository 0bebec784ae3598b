//! Embedded engines in process compared with the same engines over sockets: requests per second of the routes that read
//! lists. Both read the same records in the same run, in turns. The API's own HTTP server is not included.
//!
//! ```sh
//! cargo bench -p tests --bench engines                  # 10,000 conversations, 5 s a line
//! cargo bench -p tests --bench engines -- 1000 2        # 1,000 conversations, 2 s a line
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

use futures::future::join_all;
use local::import::{Entry, Importer, Pace};
use shared::config::SandboxConfig;
use shared::user::UserId;
use support::account;
use support::api::Api;
use tempfile::TempDir;

const CONVERSATIONS: u64 = 10_000;
const SECONDS: u64 = 5;
/// The number of concurrent requests.
const CONCURRENCY: [usize; 2] = [1, 16];

/// Rounds of each kind of client, for one line of the table.
const TURNS: u32 = 4;

type Query = Vec<(&'static str, String)>;

#[tokio::main]
async fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|number| number.replace('_', "").parse().ok());
    let size = numbers.next().unwrap_or(CONVERSATIONS);
    let time = Duration::from_secs(numbers.next().unwrap_or(SECONDS));
    let folder = TempDir::new().expect("a folder");
    let mut api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("user-one");
    load(&api, &user, size).await;

    println!("{size} conversations, requests/s (p50 ms, p99 ms):\n");
    println!("| request | at a time | in process | sockets | ratio |\n|---|---|---|---|---|");
    for (what, path, query) in requests(size) {
        for concurrency in CONCURRENCY {
            // In turns, so that other load on the machine affects both alike.
            let (mut here, mut there) = (Measured::default(), Measured::default());
            for _ in 0..TURNS {
                api.use_no_sockets();
                measure(&api, &user, path, &query, concurrency, time / TURNS, &mut here).await;
                api.use_sockets().await;
                measure(&api, &user, path, &query, concurrency, time / TURNS, &mut there).await;
            }
            println!("| {what} | {concurrency} | {here} | {there} | {:.2} |", here.rate() / there.rate());
        }
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

fn requests(size: u64) -> [(&'static str, &'static str, Query); 4] {
    let ids = (0..10).map(|number| ("ids", account::conversation_id(number * size / 10).to_string())).collect();
    let limit = |limit: u64| vec![("limit", limit.to_string())];
    [
        ("search, limit=20", "/search", limit(20)),
        ("search, limit=100", "/search", limit(100)),
        ("count", "/count", Vec::new()),
        ("batch of 10", "", ids),
    ]
}

/// The measurements of all rounds.
#[derive(Default)]
struct Measured {
    took: Vec<Duration>,
    time: Duration,
}

impl Measured {
    fn rate(&self) -> f64 {
        f64::from(u32::try_from(self.took.len()).expect("a number of requests")) / self.time.as_secs_f64()
    }
}

impl std::fmt::Display for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut took = self.took.clone();
        took.sort_unstable();
        let quantile = |percent: usize| took[took.len() * percent / 100].as_secs_f64() * 1000.0;
        write!(f, "{:.0} ({:.1}, {:.1})", self.rate(), quantile(50), quantile(99))
    }
}

async fn measure(
    api: &Api,
    user: &UserId,
    path: &str,
    query: &[(&str, String)],
    concurrency: usize,
    time: Duration,
    measured: &mut Measured,
) {
    let started = Instant::now();
    let one = async || {
        let mut took = Vec::new();
        while started.elapsed() < time {
            let sent = Instant::now();
            let (status, answer) = api.get(user, path, query).await;
            assert_eq!(status, 200, "{answer}");
            took.push(sent.elapsed());
        }
        took
    };
    let took = join_all((0..concurrency).map(|_| one())).await;
    measured.took.extend(took.into_iter().flatten());
    measured.time += started.elapsed();
}
