//! Measures exports by the number of events: time, size, and the memory of the process that builds the export. The embedded engines
//! and the log are in another process. Fails when an export needs more memory than it may.
//!
//! ```sh
//! cargo bench -p tests --bench exports --profile dev -- 10000 100000 300000
//! cargo bench -p tests --bench exports --profile dev -- members=1000000
//! ```
//!
//! The second command writes the zip alone, without a store: its memory is what the members need.

#![allow(clippy::expect_used, clippy::disallowed_methods, reason = "a benchmark fails by panicking")]

use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use local::access::Origins;
use local::engines::{EnginePorts, Engines};
use serde_json::json;
use shared::Time;
use shared::aws::Aws;
use shared::config::{ExportConfig, Names};
use shared::conversation::{ConversationRecord, MetricsSnapshot};
use shared::event::store::Event;
use shared::export::Answer;
use shared::export::archive::ArchiveWriter;
use shared::http_client::{AddressPolicy, HttpClient};
use shared::sandbox::none::NoSandboxes;
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tempfile::TempDir;
use uuid::Uuid;

const PREFIX: &str = "bench-";
/// In the environment of the process that exports: the conversation.
const CONVERSATION: &str = "BENCH_CONVERSATION";
/// The same: a folder.
const FOLDER: &str = "BENCH_FOLDER";
/// Long enough for everything.
const BUDGET: Duration = Duration::from_secs(3600);
/// In the environment of the process that writes a zip without a store: how many members.
const MEMBERS: &str = "BENCH_MEMBERS";
/// The most memory of an export with at most so many events, in MiB.
const LIMITS: [(usize, f64); 2] = [(100_000, 96.0), (300_000, 192.0)];
const WORDS: [&str; 8] = ["the", "agent", "reads", "a", "file", "naïve", "and", "writes"];

#[tokio::main]
async fn main() {
    if let Ok(conversation) = std::env::var(CONVERSATION) {
        export(Uuid::parse_str(&conversation).expect("an id")).await;
        return;
    }
    if let Ok(members) = std::env::var(MEMBERS) {
        write_members(members.parse().expect("a number")).await;
        return;
    }
    let number = |text: &str| text.replace('_', "").parse::<usize>().ok();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let lengths: Vec<usize> = arguments.iter().filter_map(|argument| number(argument)).collect();
    let members: Vec<usize> =
        arguments.iter().filter_map(|argument| number(argument.strip_prefix("members=")?)).collect();
    assert!(!(lengths.is_empty() && members.is_empty()), "name a number of events, for example 10000 or members=10000");
    if !lengths.is_empty() {
        println!(
            "| events | bytes of JSON | bytes of the zip | seconds | memory before | memory, largest |\n|---|---|---|---|---|---|"
        );
    }
    for length in lengths {
        measure(length).await;
    }
    if !members.is_empty() {
        println!("| members | bytes of the zip | seconds | memory before | memory, largest |\n|---|---|---|---|---|");
    }
    for members in members {
        let program = std::env::current_exe().expect("this program");
        let child = tokio::process::Command::new(program).env(MEMBERS, members.to_string()).output().await;
        let child = child.expect("ended");
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&child.stderr));
        println!("| {members} | {} |", String::from_utf8_lossy(&child.stdout).trim());
    }
}

/// In a process of its own: a zip with so many events, whose bytes are dropped.
async fn write_members(members: usize) {
    let before = memory();
    let started = Instant::now();
    let (mut archive, mut chunks) = ArchiveWriter::new(Time::now());
    let writing = tokio::task::spawn_blocking(move || {
        for number in 0..members {
            archive.add_event(&event(number)).expect("added");
        }
        archive.finish().expect("finished");
    });
    let mut length = 0;
    while let Some(chunk) = chunks.recv().await {
        length += chunk.len();
    }
    writing.await.expect("written");
    let took = started.elapsed().as_secs_f64();
    println!("{length} | {took:.1} | {before:.1} MiB | {:.1} MiB", memory());
}

async fn measure(length: usize) {
    let folder = TempDir::new().expect("a folder");
    let engines =
        Engines::listening(folder.path(), EnginePorts::default(), &Origins::default()).await.expect("engines");
    let aws = Aws::new(&engines.sdk_config().await);
    let names = Names::with_prefix(PREFIX);
    schema::make_all(&aws, &names, PREFIX).await.expect("a schema");
    let (user, id, now) = (UserId::local(), Uuid::new_v4(), Time::now());
    let conversations = Stores::without_key(&names, &aws).conversations();
    let record = ConversationRecord {
        user: user.clone(),
        id,
        sandbox_id: "none".to_owned(),
        selected_repository: None,
        selected_branch: None,
        git_provider: None,
        title: Some("A benchmark".to_owned()),
        trigger: None,
        pr_number: Vec::new(),
        llm_model: None,
        metrics: MetricsSnapshot::default(),
        parent_conversation_id: None,
        public: None,
        tags: shared::conversation::tags::Tags::default(),
        agent_kind: "openhands".to_owned(),
        acp_server: None,
        launched_agent_profile: None,
        created_at: now,
        updated_at: now,
    };
    assert_eq!(conversations.import(&user, &[record]).await.expect("stored"), [true]);
    let store = Stores::without_key(&names, &aws).events();
    let (mut bytes, mut batch) = (0, Vec::new());
    for number in 0..length {
        let event = event(number);
        bytes += event.json.len();
        batch.push(event);
        if batch.len() == 500 || number + 1 == length {
            store.append(&user, id, std::mem::take(&mut batch)).await.expect("stored");
        }
    }
    let child = tokio::process::Command::new(std::env::current_exe().expect("this program"))
        .envs(engines.environment())
        .env(CONVERSATION, id.to_string())
        .env(FOLDER, folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("started");
    let output = child.wait_with_output().await.expect("ended");
    assert!(output.status.success(), "the export failed");
    println!("| {length} | {bytes} | {} |", String::from_utf8_lossy(&output.stdout).trim());
    let largest = String::from_utf8_lossy(&output.stdout);
    let largest = largest.trim().rsplit('|').next().and_then(|text| text.trim().strip_suffix(" MiB")?.parse().ok());
    let largest: f64 = largest.expect("a figure");
    if let Some((_, limit)) = LIMITS.into_iter().find(|(events, _)| length <= *events) {
        assert!(largest <= limit, "{length} events need {largest} MiB, and may need {limit} MiB");
    }
    engines.shutdown().await;
}

/// About 2 KB, of which some is said again and some is not.
fn event(number: usize) -> Event {
    let (minutes, seconds) = (number / 60, number % 60);
    let timestamp =
        format!("2025-01-{:02}T{:02}:{:02}:{seconds:02}", 1 + minutes / 1440, minutes / 60 % 24, minutes % 60);
    let id =
        Uuid::from_u128(u128::try_from(number).expect("small").wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835));
    let text: Vec<&str> = (0..300).map(|word: usize| WORDS[(word * word + number * 7 + word / 3) % 8]).collect();
    let json = json!({
        "id": id,
        "timestamp": timestamp,
        "source": "agent",
        "llm_message": {"role": "assistant", "content": [{"type": "text", "text": text.join(" ")}]},
        "tool_call": {"id": format!("call_{id}"), "arguments": {"command": format!("cat file-{number}.txt")}},
        "usage": {"cost": f64::from(u32::try_from(number).expect("small")) / 7.0, "tokens": number * 31},
        "kind": "MessageEvent",
    });
    Event { id: id.to_string(), timestamp, kind: "MessageEvent".to_owned(), json: json.to_string() }
}

/// In a process of its own: as the function does it.
async fn export(conversation: Uuid) {
    let aws = Aws::new(&shared::aws::sdk_config_from_env());
    let names = Names::with_prefix(PREFIX);
    let folder = std::env::var(FOLDER).expect("a folder");
    let sealer = Sealer::from_file(&std::path::Path::new(&folder).join("sealing-key")).expect("a key");
    let stores = Stores::new(&names, &aws, &sealer);
    let config = ExportConfig { budget: BUDGET, ..ExportConfig::default() };
    let sandboxes = Arc::new(NoSandboxes);
    let exporter = stores.exporter(&config, sandboxes, HttpClient::new(AddressPolicy::PublicOnly));
    let before = memory();
    let started = Instant::now();
    let answer = exporter.export(&UserId::local(), conversation).await.expect("an export");
    let took = started.elapsed().as_secs_f64();
    let Some(Answer::Ready(ready)) = answer else { panic!("no export") };
    println!("{} | {took:.1} | {before:.1} MiB | {:.1} MiB", ready.length, memory());
}

/// The most memory that this process has had, in MiB.
fn memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("a system with /proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a figure");
    line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}
