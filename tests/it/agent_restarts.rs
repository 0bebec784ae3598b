//! Starts whose agent server restarts and forgets its commands, and commands that outlast their time.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::stream::{self, StreamExt as _};
use serde_json::json;
use shared::config::StartConfig;
use shared::start::task::{StartStatus, StartTaskRecord};

use crate::support::git_server::GitServer;
use crate::support::stand_in_agent::Restart;
use crate::support::wait::wait_until;
use crate::support::worker_harness::{WorkerHarness, quick};

const SOON: Duration = Duration::from_secs(60);
const REPOSITORY: &str = "owner/project";

/// A worker that soon releases a start that waits, as on Lambda: the start's command is then in its row.
fn config(setup_script_timeout: Duration) -> StartConfig {
    let inline_wait = Duration::from_millis(200);
    StartConfig { allow_insecure_git_access: true, setup_script_timeout, inline_wait, ..quick() }
}

async fn harness(git: &GitServer, config: StartConfig) -> WorkerHarness {
    let harness = WorkerHarness::start(config).await;
    let tokens = json!({"github": {"token": "t", "host": git.url()}});
    harness.set_settings(json!({"llm_model": "openai/x", "provider_tokens": tokens})).await;
    harness
}

/// A git host with a repository with this setup script.
async fn repository(script: &str) -> GitServer {
    let git = GitServer::start().await;
    git.create_repository(REPOSITORY, &[(".openhands/setup.sh", script, false)], &[]).await;
    git
}

/// A file beside the clone.
fn file(harness: &WorkerHarness, name: &str) -> PathBuf {
    Path::new(&harness.agent.working_dir()).join(name)
}

fn lines(file: &Path) -> Vec<String> {
    fs::read_to_string(file).unwrap_or_default().lines().map(str::to_owned).collect()
}

/// The files of this name in the sandbox.
fn named(harness: &WorkerHarness, name: &str) -> Vec<PathBuf> {
    let (mut folders, mut found) = (vec![harness.agent.root().to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => folders.push(entry.path()),
                _ if entry.file_name() == name => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found
}

/// Restarts the agent server while the setup script runs. The script ends only on a signal, after the restart. Returns the
/// start and what the script has written.
async fn restart_in_mid_script(
    harness: &WorkerHarness,
    restart: Restart,
    then: impl FnOnce(),
) -> (StartTaskRecord, Vec<String>) {
    let task = harness.begin(&json!({"selected_repository": REPOSITORY})).await.id;
    let log = file(harness, "log");
    let restarted = async {
        wait_until("the script runs", SOON, async || !lines(&log).is_empty()).await;
        wait_until("the command is recorded", SOON, async || harness.pending_command(task).await.is_some()).await;
        harness.agent.restart(restart).await;
        then();
        fs::write(file(harness, "go"), "").expect("written");
    };
    let (ended, ()) = futures::future::join(harness.drive(task), restarted).await;
    (ended, lines(&log))
}

const SCRIPT: &str = "echo begin >>../log\nuntil [ -f ../go ]; do sleep 0.05; done\nsleep 0.3\necho end >>../log\n";

fn assert_set_up(ended: &StartTaskRecord, case: &str) {
    assert_eq!(ended.now.status, StartStatus::Ready, "{case}: {:?}", ended.now.detail);
    let detail = ended.now.detail.clone().unwrap_or_default();
    assert!(!detail.contains("setup.sh"), "{case}: {detail}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_setup_script_survives_a_restart_of_the_agent_server() {
    let git = repository(SCRIPT).await;
    for (restart, expected) in
        [(Restart::Sandbox, &["begin", "begin", "end"][..]), (Restart::Server, &["begin", "end"])]
    {
        let harness = harness(&git, config(Duration::from_secs(20))).await;
        let (ended, log) = restart_in_mid_script(&harness, restart, || {}).await;
        assert_set_up(&ended, &format!("{restart:?}"));
        assert_eq!(log, expected, "{restart:?}");
        wait_until("no process is left", SOON, async || harness.agent.processes().is_empty()).await;
        harness.finish().await;
    }
}

/// A provider that has made two machines for one sandbox shows first one, then the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_is_sent_again_to_another_machine() {
    let git = repository(SCRIPT).await;
    let harness = harness(&git, config(Duration::from_secs(20))).await;
    let task = harness.begin(&json!({"selected_repository": REPOSITORY})).await.id;
    let log = file(&harness, "log");
    let moved = async {
        wait_until("the script runs", SOON, async || !lines(&log).is_empty()).await;
        harness.move_pending_command(task).await;
        fs::write(file(&harness, "go"), "").expect("written");
    };
    let (ended, ()) = futures::future::join(harness.drive(task), moved).await;
    assert_set_up(&ended, "another machine");
    // The copy that was sent again has found the run of the first one.
    assert_eq!(lines(&log), ["begin", "end"]);
    harness.finish().await;
}

/// An agent server that shuts down in an orderly way stores an exit code for the commands that it has ended.
#[tokio::test(flavor = "multi_thread")]
async fn a_setup_script_survives_an_orderly_restart() {
    let git = repository(SCRIPT).await;
    let harness = harness(&git, config(Duration::from_secs(20))).await;
    let (ended, log) = restart_in_mid_script(&harness, Restart::Orderly, || {}).await;
    assert_set_up(&ended, "orderly");
    assert_eq!(log.last().map(String::as_str), Some("end"));
    wait_until("no process is left", SOON, async || harness.agent.processes().is_empty()).await;
    harness.finish().await;
}

/// After the restart of a sandbox, another process has the id of the command's process.
#[tokio::test(flavor = "multi_thread")]
async fn another_process_with_the_id_of_the_command_is_not_waited_for() {
    let git = repository(SCRIPT).await;
    let harness = harness(&git, config(Duration::from_secs(20))).await;
    let take = || {
        for pid in named(&harness, "pid") {
            let text = fs::read_to_string(&pid).expect("a file");
            let id = text.split_whitespace().next().expect("an id");
            let taken = text.replacen(id, &std::process::id().to_string(), 1);
            fs::write(&pid, taken).expect("written");
        }
    };
    let (ended, log) = restart_in_mid_script(&harness, Restart::Sandbox, take).await;
    assert_set_up(&ended, "an id that is taken");
    assert_eq!(log, ["begin", "begin", "end"]);
    harness.finish().await;
}

/// The agent server kills only the outer shell of a command whose time is up.
#[tokio::test(flavor = "multi_thread")]
async fn setup_scripts_that_outlast_their_time_all_end_alike_and_are_stopped() {
    let git = repository("echo begin >>../log\nwhile :; do sleep 0.1; done\n").await;
    let details: Vec<String> = stream::iter(0..8)
        .map(|_| async {
            let harness = harness(&git, config(Duration::from_secs(2))).await;
            let ended = harness.drive(harness.begin(&json!({"selected_repository": REPOSITORY})).await.id).await;
            assert_eq!(ended.now.status, StartStatus::Ready, "{:?}", ended.now.detail);
            assert_eq!(lines(&file(&harness, "log")), ["begin"]);
            wait_until("no process is left", SOON, async || harness.agent.processes().is_empty()).await;
            harness.finish().await;
            ended.now.detail.expect("a note")
        })
        .buffer_unordered(4)
        .collect()
        .await;
    assert!(details.iter().all(|detail| detail == &details[0]), "{details:#?}");
    assert!(details[0].contains("setup.sh") && details[0].contains("timed out"), "{}", details[0]);
}
