//! The repository steps of a start: clone, setup script and git hook, with a git host that requires credentials.

use std::path::PathBuf;
use std::process::Command;

use serde_json::json;
use shared::config::StartConfig;
use shared::start::task::{StartStatus, StartTaskRecord};

use crate::alarms::Log;
use crate::support::git_server::GitServer;
use crate::support::worker_harness::{WorkerHarness, quick};

const TOKEN: &str = "token-that-must-stay-secret-93b0";

async fn harness(git: &GitServer) -> WorkerHarness {
    let harness = WorkerHarness::start(StartConfig { allow_insecure_git_access: true, ..quick() }).await;
    let tokens = json!({"github": {"token": TOKEN, "host": git.url()}});
    harness.set_settings(json!({"llm_model": "openai/x", "provider_tokens": tokens})).await;
    harness
}

/// Runs a start to its end, in the sandbox of the previous start if there is one.
async fn start(harness: &WorkerHarness, repository: &str, branch: Option<&str>) -> StartTaskRecord {
    let sandbox = harness.sandboxes.made().keys().next().cloned();
    let body = json!({"selected_repository": repository, "selected_branch": branch, "sandbox_id": sandbox});
    harness.drive(harness.begin(&body).await.id).await
}

async fn ready(harness: &WorkerHarness, repository: &str, branch: Option<&str>) -> String {
    let done = start(harness, repository, branch).await;
    assert_eq!(done.now.status, StartStatus::Ready, "{repository} {branch:?}: {:?}", done.now.detail);
    // The note about a missing browser depends on the machine.
    let detail = done.now.detail.unwrap_or_default();
    detail.lines().filter(|line| !line.contains("Chromium")).collect::<Vec<_>>().join("\n")
}

async fn error(harness: &WorkerHarness, repository: &str, branch: Option<&str>) -> String {
    let done = start(harness, repository, branch).await;
    assert_eq!(done.now.status, StartStatus::Error, "{repository} {branch:?}: {:?}", done.now.detail);
    done.now.detail.expect("a detail")
}

fn folder(harness: &WorkerHarness, name: &str) -> PathBuf {
    PathBuf::from(harness.agent.working_dir()).join(name)
}

fn git(folder: &PathBuf, arguments: &[&str]) -> String {
    let output = Command::new("git").arg("-C").arg(folder).args(arguments).output().expect("git runs");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn assert_token_is_not_exposed(harness: &WorkerHarness) {
    let (mut folders, mut files) = (vec![harness.agent.root().to_owned()], 0);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder").flatten() {
            if entry.file_type().expect("a type").is_dir() {
                folders.push(entry.path());
            } else if let Ok(bytes) = std::fs::read(entry.path()) {
                files += 1;
                let is_in = bytes.windows(TOKEN.len()).any(|window| window == TOKEN.as_bytes());
                assert!(!is_in, "{}", entry.path().display());
            }
        }
    }
    assert!(files > 10);
    assert!(harness.agent.commands().iter().all(|command| !command.contains(TOKEN)));
}

#[tokio::test(flavor = "multi_thread")]
async fn branches_of_a_private_repository_are_found_even_if_tags_have_the_same_names() {
    let host = GitServer::start().await;
    host.require("someone", TOKEN);
    let files = [("release/notes.txt", "Notes\n", false), ("README.md", "Read me\n", false)];
    host.create_repository("owner/project", &files, &["release", "v2", "feature/größe#1"]).await;
    // Tags with the names of the branches, at another commit.
    for name in ["release", "v2", "v1"] {
        host.git("owner/project", &["tag", name, "main"]).await;
    }
    let harness = harness(&host).await;
    assert_eq!(ready(&harness, "owner/project", Some("release")).await, "");
    let clone = folder(&harness, "project");
    for (branch, expected) in [
        ("release", "refs/heads/release"),
        (" refs/heads/v2 ", "refs/heads/v2"),
        ("origin/feature/größe#1", "refs/heads/feature/größe#1"),
        ("main", "refs/heads/main"),
        ("v1", ""),
    ] {
        assert_eq!(ready(&harness, "owner/project", Some(branch)).await, "", "{branch}");
        assert_eq!(git(&clone, &["symbolic-ref", "-q", "HEAD"]), expected, "{branch}");
        let file = std::fs::read_to_string(clone.join("branch.txt")).unwrap_or_default();
        let own = expected.trim_start_matches("refs/heads/");
        assert_eq!(file, if own == "main" { "" } else { own }, "{branch}");
    }
    // A branch that was created after the clone, and that can be fetched only with the token.
    host.git("owner/project", &["branch", "later", "refs/heads/v2"]).await;
    assert_eq!(ready(&harness, "owner/project", Some("later")).await, "");
    assert_eq!(git(&clone, &["symbolic-ref", "-q", "HEAD"]), "refs/heads/later");
    assert_eq!(git(&clone, &["status", "--porcelain", "--ignored"]), "");
    let error = error(&harness, "owner/project", Some("no-such")).await;
    assert_eq!(error.matches("no-such").count(), 1, "{error}");
    assert_token_is_not_exposed(&harness);
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn repository_without_default_branch_or_commits_is_ready_with_a_note() {
    let host = GitServer::start().await;
    host.require("someone", TOKEN);
    host.create_repository("owner/lost", &[("README.md", "Read me\n", false)], &[]).await;
    host.git("owner/lost", &["branch", "-m", "main", "develop"]).await;
    host.git("owner/lost", &["symbolic-ref", "HEAD", "refs/heads/master"]).await;
    host.create_empty_repository("owner/empty").await;
    host.create_empty_repository("owner/void").await;
    let harness = harness(&host).await;
    let note = ready(&harness, "owner/lost", None).await;
    assert_eq!(note, "The repository's default branch does not exist: develop was checked out");
    let clone = folder(&harness, "lost");
    assert!(clone.join("README.md").exists());
    assert_eq!(git(&clone, &["symbolic-ref", "refs/remotes/origin/HEAD"]), "refs/remotes/origin/develop");
    let note = ready(&harness, "owner/empty", None).await;
    assert_eq!(note, "The repository is empty: it has no commits yet");
    let note = ready(&harness, "owner/void", Some("feature/one")).await;
    assert_eq!(note, "The branch feature/one is new: it has no commits yet");
    assert_eq!(git(&folder(&harness, "void"), &["symbolic-ref", "HEAD"]), "refs/heads/feature/one");
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn git_error_of_each_provider_is_quoted_once() {
    let (one, two) = (GitServer::start().await, GitServer::start().await);
    let harness = harness(&one).await;
    let tokens = json!({"github": {"token": TOKEN, "host": one.url()}, "gitlab": {"token": TOKEN, "host": two.url()}});
    harness.set_settings(json!({"llm_model": "openai/x", "provider_tokens": tokens})).await;
    let (log, _logging) = Log::begin();
    let detail = error(&harness, "owner/none", None).await;
    let lines = log.take();
    let failed = lines.iter().find(|line| line["message"] == "start.failed").expect("a line");
    assert_eq!((&failed["class"], &failed["fault"]), (&json!("repository"), &json!("user")), "{failed}");
    for host in [&one, &two] {
        assert_eq!(detail.matches(&host.url()).count(), 1, "{detail}");
        let clones = host.requests().iter().filter(|request| request.path.ends_with("/info/refs")).count();
        assert!((1..=2).contains(&clones), "a permanent error is not tried again: {:?}", host.requests());
    }
    assert!(!detail.contains(TOKEN), "{detail}");
    harness.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_run_unmodified_and_change_nothing_in_the_clone() {
    let setup = "#!/bin/bash\r\numask >../umask\r\nwords=(set up)\r\necho \"${words[*]} $0\" >../ran\r\ngit config core.hooksPath .husky\r\n";
    let pre_commit = "\u{feff}#!/bin/bash\necho own >>../ran\n";
    let files = [
        (".openhands/setup.sh", setup, false),
        (".openhands/pre-commit.sh", pre_commit, false),
        (".husky/pre-commit", "echo husky >>../ran\n", true),
        ("run.sh", "true\n", true),
    ];
    let host = GitServer::start().await;
    host.require("someone", TOKEN);
    host.create_repository("owner/husky", &files, &[]).await;
    let harness = harness(&host).await;
    let clone = folder(&harness, "husky");
    for _ in 0..2 {
        let note = ready(&harness, "owner/husky", Some("main")).await;
        assert!(note.contains("core.hooksPath") && note.contains("Call it from .husky/pre-commit"), "{note}");
        assert_eq!(std::fs::read_to_string(clone.join("../ran")).expect("it ran"), "set up .openhands/setup.sh\n");
        assert_eq!(git(&clone, &["status", "--porcelain", "--ignored"]), "");
        assert!(!clone.join(".husky/pre-commit.local").exists());
    }
    // With the same modes as everything else that this process creates.
    let plain = harness.agent.root().join("plain");
    std::fs::create_dir(&plain).expect("a folder");
    std::fs::write(plain.join("file"), "").expect("a file");
    let mode = |path: PathBuf| std::os::unix::fs::PermissionsExt::mode(&path.metadata().expect("a file").permissions());
    assert_eq!(mode(clone.clone()), mode(plain.clone()));
    assert_eq!(mode(clone.join(".openhands/setup.sh")), mode(plain.join("file")));
    assert_eq!(mode(clone.join("run.sh")) & 0o777, mode(plain) & 0o777);
    assert_token_is_not_exposed(&harness);
    harness.finish().await;
}

/// A note of one step is kept if a later step fails.
#[tokio::test(flavor = "multi_thread")]
async fn failed_script_is_quoted_together_with_the_other_notes() {
    let files = [(".openhands/setup.sh", "echo 'no compiler' >&2\r\nexit 4\r\n", false)];
    let host = GitServer::start().await;
    host.create_repository("owner/broken", &files, &["develop"]).await;
    host.git("owner/broken", &["branch", "-M", "main", "develop"]).await;
    host.git("owner/broken", &["symbolic-ref", "HEAD", "refs/heads/gone"]).await;
    let harness = harness(&host).await;
    let detail = ready(&harness, "owner/broken", None).await;
    let lines: Vec<&str> = detail.lines().collect();
    assert_eq!(
        lines,
        [
            "The repository's default branch does not exist: develop was checked out",
            ".openhands/setup.sh failed: it ended with exit code 4: no compiler"
        ]
    );
    harness.finish().await;
}
