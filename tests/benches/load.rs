//! Load test of a running server, as a client sees it: requests per second, and latency.
//!
//! ```sh
//! cargo bench -p tests --bench load -- make-data 10000 > data.jsonl
//! cargo run --release -p local -- import --data bench data.jsonl
//! cargo run --release -p local -- --data bench --sandbox none &
//! cargo bench -p tests --bench load -- run
//! ```

#![allow(clippy::expect_used, reason = "a benchmark fails by panicking")]

#[path = "../it/support"]
#[allow(dead_code, reason = "shared with the tests")]
mod support {
    pub mod account;
    pub mod raw_http;
}

use std::io::{self, BufWriter, ErrorKind, Write as _};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use serde_json::Value;
use support::account;
use support::raw_http::Connection;

#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    command: Command,
    /// `cargo bench` passes it.
    #[arg(long, hide = true, global = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Command {
    /// Writes an account of N conversations and as many start tasks to standard output, for `cargo local import`.
    MakeData { count: u64 },
    /// Sends requests to a server that holds such an account, and prints a Markdown table.
    Run {
        /// Where the server listens.
        #[arg(long, default_value = "127.0.0.1:3000")]
        address: SocketAddr,
        /// How long each line of the table takes, in seconds.
        #[arg(long, default_value_t = 10)]
        seconds: u64,
        /// The maximum number of requests per line.
        #[arg(long, default_value_t = usize::MAX)]
        requests: usize,
        /// The number of concurrent connections; each is kept open.
        #[arg(long, value_delimiter = ',', default_values_t = [1, 16])]
        connections: Vec<usize>,
        /// The number of pages of 20 rows before the deep page.
        #[arg(long, default_value_t = 450)]
        deep: usize,
        /// The server's SESSION_API_KEY, if it has one.
        #[arg(long, env = "SESSION_API_KEY")]
        key: Option<String>,
    },
}

#[tokio::main]
async fn main() {
    match Options::parse().command {
        Command::MakeData { count } => match make_data(count) {
            // The reader may have closed the pipe.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
            written => written.expect("standard output"),
        },
        Command::Run { address, seconds, requests, connections, deep, key } => {
            let headers = key.map(|key| ("x-session-api-key".to_owned(), key)).into_iter().collect();
            let server = Server { address, headers };
            let cases = server.cases(deep).await;
            println!("| | c | requests | errors | requests/s | p50 ms | p99 ms |\n|---|---|---|---|---|---|---|");
            let limit = Limit { time: Duration::from_secs(seconds), requests };
            for (name, target) in cases {
                for &count in &connections {
                    println!("| {name} | {count} | {} |", server.ask(&target, count, limit).await);
                }
            }
        }
    }
}

fn make_data(count: u64) -> io::Result<()> {
    let mut out = BufWriter::new(io::stdout().lock());
    for number in 0..count {
        writeln!(out, "{}", account::conversation(number))?;
        writeln!(out, "{}", account::start_task(number))?;
    }
    out.flush()
}

#[derive(Clone, Copy)]
struct Limit {
    time: Duration,
    requests: usize,
}

#[derive(Clone)]
struct Server {
    address: SocketAddr,
    headers: Vec<(String, String)>,
}

impl Server {
    /// The targets of the table's lines, by name.
    async fn cases(&self, deep: usize) -> Vec<(String, String)> {
        const BASE: &str = "/api/v1/app-conversations";
        let search = format!("{BASE}/search?limit=20");
        let mut cases = vec![("search limit=20".to_owned(), search.clone())];
        let mut newest = Vec::new();
        let mut page = String::new();
        // A page id is valid for any page size.
        let mut rows = deep * 20;
        while rows > 0 {
            let step = rows.min(100);
            let answer = self.get(&format!("{BASE}/search?limit={step}{page}")).await;
            if newest.is_empty() {
                let items = answer["items"].as_array().expect("items");
                newest = items.iter().filter_map(|item| item["id"].as_str().map(|id| format!("ids={id}"))).collect();
            }
            let next = answer["next_page_id"].as_str().expect("the account has too few rows for the deep page");
            page = format!("&page_id={next}");
            rows -= step;
        }
        newest.truncate(10);
        cases.extend([
            (format!("search limit=20, page {deep}"), format!("{search}{page}")),
            ("search limit=100".to_owned(), format!("{BASE}/search?limit=100")),
            (
                "search title__contains, in many titles".to_owned(),
                format!("{search}&title__contains={}", account::COMMON),
            ),
            ("search title__contains, in one of 500".to_owned(), format!("{search}&title__contains={}", account::RARE)),
            ("search title__contains, in no title".to_owned(), format!("{search}&title__contains=nowhere")),
            ("count".to_owned(), format!("{BASE}/count")),
            ("batch of 10".to_owned(), format!("{BASE}?{}", newest.join("&"))),
            ("start-tasks/search limit=20".to_owned(), format!("{BASE}/start-tasks/search?limit=20")),
            ("`/alive`".to_owned(), "/alive".to_owned()),
        ]);
        cases
    }

    async fn get(&self, target: &str) -> Value {
        let answer = Connection::to(self.address).send("GET", target, &self.headers, None).await;
        let answer = answer.expect("the server answers");
        assert_eq!(answer.status, 200, "{target}: {}", String::from_utf8_lossy(&answer.body));
        serde_json::from_slice(&answer.body).expect("JSON")
    }

    /// Sends requests over `count` connections until a limit is reached; returns the rest of the line.
    async fn ask(&self, target: &str, count: usize, limit: Limit) -> String {
        let started = Instant::now();
        let left = Arc::new(AtomicUsize::new(limit.requests));
        let connections: Vec<_> = (0..count)
            .map(|_| {
                let (server, target, left) = (self.clone(), target.to_owned(), Arc::clone(&left));
                tokio::spawn(async move { server.ask_on_one(&target, started + limit.time, &left).await })
            })
            .collect();
        let (mut times, mut errors) = (Vec::new(), 0);
        for connection in connections {
            let (took, failed) = connection.await.expect("a connection's task");
            times.extend(took);
            errors += failed;
        }
        let seconds = started.elapsed().as_secs_f64();
        times.sort_unstable();
        let quantile =
            |percent: usize| match times.get((times.len() * percent / 100).min(times.len().saturating_sub(1))) {
                Some(time) => format!("{:.1}", time.as_secs_f64() * 1000.0),
                None => "–".to_owned(),
            };
        let rate = f64::from(u32::try_from(times.len()).unwrap_or(u32::MAX)) / seconds;
        format!("{} | {errors} | {rate:.0} | {} | {}", times.len() + errors, quantile(50), quantile(99))
    }

    /// The durations of requests with status 200, and the number of other results.
    async fn ask_on_one(&self, target: &str, until: Instant, left: &AtomicUsize) -> (Vec<Duration>, usize) {
        let mut connection = Connection::to(self.address);
        let (mut times, mut errors) = (Vec::new(), 0);
        let one_less = |left: usize| left.checked_sub(1);
        while Instant::now() < until && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).is_ok() {
            let sent = Instant::now();
            match connection.send("GET", target, &self.headers, None).await {
                Ok(answer) if answer.status == 200 => times.push(sent.elapsed()),
                Ok(_) => errors += 1,
                Err(_) => {
                    errors += 1;
                    // If the server has stopped, do not send the remaining requests.
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
        }
        (times, errors)
    }
}
