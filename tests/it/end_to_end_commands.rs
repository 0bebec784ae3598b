//! Setup scripts on real agent servers: one is interrupted by a restart of its agent server, one exceeds its time limit.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use shared::sandbox::SandboxService as _;
use shared::user::UserId;

use crate::support::git_server::GitServer;
use crate::support::product::{Product, Start, agent_servers, text};
use crate::support::wait::{is_running, wait_until};

const LIMIT: Duration = Duration::from_secs(180);

async fn product(git: &GitServer, limit: Duration) -> Product {
    git.require("someone", "token");
    let settings = json!({
        "llm_model": "openai/scripted",
        "llm_api_key": "key-of-the-model",
        "provider_tokens": {"github": {"token": "token", "host": git.url()}},
    });
    Product::start_with_setup_limit(limit, settings).await
}

async fn begin(product: &Product, repository: &str) -> String {
    let answer = product.post("", &json!({"selected_repository": repository})).send().await.expect("an answer");
    text(&answer.json::<Value>().await.expect("JSON")["id"])
}

fn lines(file: &Path) -> Vec<String> {
    std::fs::read_to_string(file).unwrap_or_default().lines().map(str::to_owned).collect()
}

#[tokio::test]
async fn setup_script_runs_again_after_its_agent_server_has_restarted() {
    let git = GitServer::start().await;
    let product = product(&git, Duration::from_secs(600)).await;
    let [runs, go] = ["runs", "go"].map(|name| product.data().join(name));
    let script = format!("echo $$ >>{}\nuntil [ -f {} ]; do sleep 0.1; done\n", runs.display(), go.display());
    git.create_repository("owner/slow", &[(".openhands/setup.sh", &script, false)], &[]).await;
    let id = begin(&product, "owner/slow").await;
    wait_until("the script runs", LIMIT, async || runs.exists()).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let task = product.get(&format!("/start-tasks?ids={id}")).await;
    let sandbox = text(&task[0]["sandbox_id"]);
    let user = UserId::local();
    product.sandboxes().stop_all(&user).await.expect("stopped");
    wait_until("all processes of the sandbox have ended", LIMIT, async || !is_running(&lines(&runs)[0])).await;
    assert!(product.sandboxes().resume(&user, &sandbox).await.expect("resumed"));
    wait_until("a second run", LIMIT, async || lines(&runs).len() == 2).await;
    std::fs::write(&go, "").expect("written");
    let start: Start = product.follow(&id).await;
    start.conversation_id();
    assert!(!start.detail().contains("setup.sh"), "{}", start.detail());
    assert_eq!(lines(&runs).len(), 2);
    product.shutdown().await;
}

#[tokio::test]
async fn a_start_survives_its_agent_server() {
    let git = GitServer::start().await;
    let product = product(&git, Duration::from_secs(600)).await;
    let [runs, go] = ["runs", "go"].map(|name| product.data().join(name));
    let script = format!("echo $$ >>{}\nuntil [ -f {} ]; do sleep 0.1; done\n", runs.display(), go.display());
    git.create_repository("owner/slow", &[(".openhands/setup.sh", &script, false)], &[]).await;
    let id = begin(&product, "owner/slow").await;
    wait_until("the script runs", LIMIT, async || runs.exists()).await;
    let agent_servers = agent_servers(&product.data().join("sandboxes"));
    assert_eq!(agent_servers.len(), 1);
    rustix::process::kill_process(agent_servers[0], rustix::process::Signal::KILL).expect("killed");
    std::fs::write(&go, "").expect("written");
    let start = product.follow(&id).await;
    start.conversation_id();
    assert!(!start.detail().contains("setup.sh"), "{}", start.detail());
    product.shutdown().await;
}

/// The supervisor of the command notifies the API, in every supported version of the agent server.
#[tokio::test]
async fn the_end_of_a_command_continues_its_start_at_once() {
    let git = GitServer::start().await;
    git.require("someone", "token");
    let product = Product::start_with_waits_of_aws(json!({
        "llm_model": "openai/scripted",
        "llm_api_key": "key-of-the-model",
        "provider_tokens": {"github": {"token": "token", "host": git.url()}},
    }))
    .await;
    let ended = product.data().join("ended");
    let script = format!("sleep 26\ntouch {}\n", ended.display());
    git.create_repository("owner/slow", &[(".openhands/setup.sh", &script, false)], &[]).await;
    let id = begin(&product, "owner/slow").await;
    wait_until("the script has ended", LIMIT, async || ended.exists()).await;
    // The worker polls 2 s, 7 s, 22 s and 62 s after the beginning of the script.
    wait_until("the start continues", Duration::from_secs(25), async || {
        let task = product.get(&format!("/start-tasks?ids={id}")).await;
        task[0]["status"] != "RUNNING_SETUP_SCRIPT"
    })
    .await;
    product.follow(&id).await.conversation_id();
    product.shutdown().await;
}

#[tokio::test]
async fn overlong_setup_script_leaves_a_note_and_no_process() {
    let git = GitServer::start().await;
    let product = product(&git, Duration::from_secs(3)).await;
    let pids = product.data().join("pids");
    let script =
        format!("echo said\necho $$ >>{0}\nsleep 600 & echo $! >>{0}\nwhile :; do sleep 1; done\n", pids.display());
    git.create_repository("owner/overlong", &[(".openhands/setup.sh", &script, false)], &[]).await;
    let id = begin(&product, "owner/overlong").await;
    let start = product.follow(&id).await;
    start.conversation_id();
    let notes: Vec<&str> = start.detail().lines().filter(|line| line.contains("setup.sh")).collect();
    assert_eq!(notes, [".openhands/setup.sh failed: timed out; last output: said"]);
    let pids = lines(&pids);
    assert!(pids.len() == 2 && !pids.iter().any(|pid| is_running(pid)), "{pids:?}");
    product.shutdown().await;
}
