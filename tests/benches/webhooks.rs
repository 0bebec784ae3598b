//! Webhook throughput: events per second over HTTP to the whole server, by batch size.
//!
//! ```sh
//! cargo bench -p tests --bench webhooks
//! ```

#![allow(clippy::expect_used, clippy::disallowed_methods, reason = "a benchmark fails by panicking")]

use std::time::Instant;

use futures::future::join_all;
use local::options::{CommonOptions, SandboxKind};
use local::server::{Environment, Server};
use reqwest::Client;
use secrecy::SecretString;
use serde_json::{Value, json};
use shared::config::SealingConfig;
use shared::event::store::EventFilter;
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tempfile::TempDir;
use uuid::Uuid;

const KEY: &str = "session-key";
/// Events per line of the table.
const EVENTS: usize = 2_000;
/// Bytes of text per event.
const TEXT: usize = 1_800;

#[tokio::main]
async fn main() {
    let folder = TempDir::new().expect("a folder");
    let options = CommonOptions::on(folder.path().join("data"), SandboxKind::None);
    let server = Server::start(&options, Environment::default(), true, None).await.expect("the server starts");
    let (aws, names) = (&server.aws, &server.config.names);
    let SealingConfig::File(key) = &server.config.sealing else { panic!("a key file") };
    let sealer = Sealer::from_file(key).expect("the sealing key");
    let sandboxes = Stores::new(names, aws, &sealer).sandboxes();
    let user = UserId::local();
    let record = sandboxes.new_record(&user, "sandbox", "spec", &SecretString::from(KEY)).await.expect("a record");
    sandboxes.create(record, None).await.expect("stored");
    let events = Stores::without_key(names, aws).events();
    println!("| events in a batch | connections | events/s |\n|---|---|---|");
    for connections in [1, 8] {
        for size in [1, 10, 100] {
            let conversation = Uuid::new_v4();
            let url = format!("http://{}/api/v1/webhooks/events/{}", server.address, conversation.simple());
            let share = EVENTS / size / connections;
            let began = Instant::now();
            join_all((0..connections).map(|connection| post_batches(&url, connection * share, share, size))).await;
            let took = began.elapsed().as_secs_f64();
            let kept = events.count(&user, conversation, &EventFilter::default()).await.expect("a count");
            assert_eq!(usize::try_from(kept).expect("a count"), share * connections * size, "every event is kept");
            let count = u32::try_from(kept).expect("few");
            println!("| {size} | {connections} | {:.0} |", f64::from(count) / took);
        }
    }
    server.shutdown().await;
}

/// Posts batches one after the other, as one agent server does.
async fn post_batches(url: &str, first: usize, batches: usize, size: usize) {
    let http = Client::builder().no_proxy().build().expect("a client");
    for batch in first..first + batches {
        let events: Vec<Value> = (batch * size..(batch + 1) * size).map(event).collect();
        let answer = http.post(url).header("X-Session-API-Key", KEY).json(&events).send().await.expect("an answer");
        assert_eq!(answer.status(), 200);
    }
}

fn event(number: usize) -> Value {
    let (hours, minutes, seconds) = (number / 3600, number / 60 % 60, number % 60);
    json!({
        "id": Uuid::new_v4(), "timestamp": format!("2025-01-01T{hours:02}:{minutes:02}:{seconds:02}"),
        "source": "agent", "text": "x".repeat(TEXT), "kind": "MessageEvent",
    })
}
