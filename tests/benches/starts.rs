//! The write units that a start consumes in DynamoDB, by step. The embedded engine counts them by DynamoDB's rules.
//!
//! ```sh
//! cargo bench -p tests --bench starts --profile dev
//! ```

#![allow(clippy::expect_used, clippy::disallowed_methods, reason = "a benchmark fails by panicking")]

#[path = "../it/support"]
#[allow(dead_code, reason = "shared with the tests")]
mod support {
    pub mod account;
    pub mod engines;
    pub mod meter;
    pub mod seed;
    pub mod server;
    pub mod sigv4;
}

use std::time::Duration;

use serde_json::json;
use shared::Time;
use shared::aws::Aws;
use shared::start::identity::StartIdentity;
use shared::start::request::StartRequest;
use shared::start::store::{Change, Claim, NewStart, StartTaskStore};
use shared::start::task::{PendingCommand, Snapshot, StartStatus};
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use support::account;
use support::engines::Engines;
use support::meter::Meter;
use tempfile::TempDir;

const PREFIX: &str = "bench-";
const LEASE: Duration = Duration::from_secs(15);
const WORKER: &str = "worker";
/// The statuses that a start enters after WORKING.
const STEPS: [StartStatus; 6] = [
    StartStatus::WaitingForSandbox,
    StartStatus::PreparingRepository,
    StartStatus::RunningSetupScript,
    StartStatus::SettingUpGitHooks,
    StartStatus::SettingUpSkills,
    StartStatus::StartingConversation,
];

#[tokio::main]
async fn main() {
    for bytes in [500, 2_000, 7_000] {
        measure(bytes).await;
    }
}

/// Measures a start whose first message has this length.
async fn measure(bytes: usize) {
    let folder = TempDir::new().expect("a folder");
    let engines = Engines::start(folder.path()).await;
    let aws = Aws::new(&engines.sdk_config().await);
    let names = engines.names(PREFIX);
    schema::make_all(&aws, &names, PREFIX).await.expect("a schema");
    let meter = Meter::new();
    let way = meter.to(&engines).await;
    let sdk = engines.network_sdk_config().await;
    let dynamodb = aws_sdk_dynamodb::config::Builder::from(&sdk).endpoint_url(way.url()).build();
    let aws = Aws { dynamodb: aws_sdk_dynamodb::Client::from_conf(dynamodb), ..aws };
    let tasks = Stores::new(&names, &aws, &Sealer::ephemeral()).start_tasks();
    let user = UserId::new("user");
    let body = json!({"initial_message": {"content": [{"type": "text", "text": "x".repeat(bytes)}]}}).to_string();
    let request = StartRequest::from_body(Some("application/json"), body.as_bytes()).expect("a request");
    let conversations = Stores::without_key(&names, &aws).conversations();
    let total = std::cell::Cell::new(0.0);
    let spent = || {
        let writes = ["PutItem", "UpdateItem", "DeleteItem", "TransactWriteItems"];
        let costs = meter.take().into_iter().filter(|(name, _)| writes.contains(&name.as_str()));
        let units = costs.map(|(_, cost)| cost.units).sum::<f64>();
        total.set(total.get() + units);
        units
    };
    println!("\n### A first message of {bytes} bytes\n\n| write | units |\n|---|---|");
    let new = NewStart {
        identity: StartIdentity::random(),
        deadline: Time::now().plus(LEASE),
        max_unfinished: 500,
        membership: None,
        trace: None,
    };
    let record = tasks.create(&user, &request, &new).await.expect("created");
    println!("| create | {} |", spent());
    let id = record.id;
    let claim = async || match tasks.claim(&user, id, WORKER, LEASE, None).await.expect("the store") {
        Claim::Claimed(_) => {}
        other => panic!("{other:?}"),
    };
    claim().await;
    println!("| claim | {} |", spent());
    tasks.renew(&user, id, WORKER, LEASE).await.expect("the store").expect("renewed");
    println!("| renewal | {} |", spent());
    let snapshot =
        |status| Snapshot { status, updated_at: Time::now(), sandbox_id: Some("5b".to_owned()), ..record.now.clone() };
    let mut entered = 0.0;
    for status in STEPS {
        let change = Change::default().state(id, &snapshot(status)).expect("a change");
        let change = change.set("open_claims", shared::start::store::attempts(1));
        tasks.save(&user, id, WORKER, &change).await.expect("the store").expect("saved");
        entered += spent();
    }
    println!("| next step, six times | {entered} |");
    let command = PendingCommand { name: "clone".to_owned(), id: "c".to_owned(), ..PendingCommand::default() };
    let change = Change::default().command(&command).expect("a change");
    tasks.release(&user, id, WORKER, Time::now(), change).await.expect("the store").expect("released");
    println!("| release | {} |", spent());
    claim().await;
    spent();
    let ready =
        StartTaskStore::ready(&user, id, record.conversation_id, &snapshot(StartStatus::Ready)).expect("a change");
    let mut conversation = account::conversation(0)["data"].take();
    conversation["id"] = json!(record.conversation_id.simple().to_string());
    let conversation = support::seed::conversation(&user, conversation);
    let recorded = conversations.put_started(&conversation, &[]).expect("a record");
    tasks.end(&user, id, WORKER, &ready, recorded).await.expect("the store").expect("ended");
    println!("| READY, with the conversation's record | {} |", spent());
    println!("| the start, with two claims, one renewal and one release | {} |", total.get());
    drop(way);
    engines.shutdown().await;
}
