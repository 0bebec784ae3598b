//! Clones, scripts and hooks of starts, on a git host that asks for credentials.

use std::path::PathBuf;
use std::process::Command;

use serde_json::json;
use shared::config::StartConfig;
use shared::start::task::{StartStatus, StartTaskRecord};

use crate::support::git_server::GitServer;
use crate::support::worker_harness::{WorkerHarness, quick};

const TOKEN: &str = "token-that-nobody-may-see-93b0";

async fn rig(git: &GitServer) -> WorkerHarness {
    let rig = WorkerHarness::start(StartConfig { allow_insecure_git_access: true, ..quick() }).await;
    let tokens = json!({"github": {"token": TOKEN, "host": git.url()}});
    rig.set_settings(json!({"llm_model": "openai/x", "provider_tokens": tokens})).await;
    rig
}

/// A start to its end, in the sandbox of the start before if there was one.
async fn start(rig: &WorkerHarness, repository: &str, branch: Option<&str>) -> StartTaskRecord {
    let sandbox = rig.sandboxes.made().keys().next().cloned();
    let body = json!({"selected_repository": repository, "selected_branch": branch, "sandbox_id": sandbox});
    rig.drive(rig.begin(&body).await.id).await
}

async fn ready(rig: &WorkerHarness, repository: &str, branch: Option<&str>) -> String {
    let done = start(rig, repository, branch).await;
    assert_eq!(done.now.status, StartStatus::Ready, "{repository} {branch:?}: {:?}", done.now.detail);
    // Whether this machine has a browser is another matter.
    let detail = done.now.detail.unwrap_or_default();
    detail.lines().filter(|line| !line.contains("Chromium")).collect::<Vec<_>>().join("\n")
}

async fn error(rig: &WorkerHarness, repository: &str, branch: Option<&str>) -> String {
    let done = start(rig, repository, branch).await;
    assert_eq!(done.now.status, StartStatus::Error, "{repository} {branch:?}: {:?}", done.now.detail);
    done.now.detail.expect("a detail")
}

fn folder(rig: &WorkerHarness, name: &str) -> PathBuf {
    PathBuf::from(rig.agent.working_dir()).join(name)
}

fn git(folder: &PathBuf, arguments: &[&str]) -> String {
    let output = Command::new("git").arg("-C").arg(folder).args(arguments).output().expect("git runs");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn nothing_shows_the_token(rig: &WorkerHarness) {
    let (mut folders, mut files) = (vec![rig.agent.root().to_owned()], 0);
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
    assert!(rig.agent.commands().iter().all(|command| !command.contains(TOKEN)));
}

#[tokio::test(flavor = "multi_thread")]
async fn branches_of_a_private_repository_are_found_whatever_else_has_their_name() {
    let host = GitServer::start().await;
    host.require("someone", TOKEN);
    let files = [("release/notes.txt", "Notes\n", false), ("README.md", "Read me\n", false)];
    host.create_repository("owner/project", &files, &["release", "v2", "feature/größe#1"]).await;
    // Tags of the same names, at another commit.
    for name in ["release", "v2", "v1"] {
        host.git("owner/project", &["tag", name, "main"]).await;
    }
    let rig = rig(&host).await;
    assert_eq!(ready(&rig, "owner/project", Some("release")).await, "");
    let clone = folder(&rig, "project");
    for (branch, expected) in [
        ("release", "refs/heads/release"),
        (" refs/heads/v2 ", "refs/heads/v2"),
        ("origin/feature/größe#1", "refs/heads/feature/größe#1"),
        ("main", "refs/heads/main"),
        ("v1", ""),
    ] {
        assert_eq!(ready(&rig, "owner/project", Some(branch)).await, "", "{branch}");
        assert_eq!(git(&clone, &["symbolic-ref", "-q", "HEAD"]), expected, "{branch}");
        let file = std::fs::read_to_string(clone.join("branch.txt")).unwrap_or_default();
        let own = expected.trim_start_matches("refs/heads/");
        assert_eq!(file, if own == "main" { "" } else { own }, "{branch}");
    }
    // A branch that came after the clone, and that only who has the token can fetch.
    host.git("owner/project", &["branch", "later", "refs/heads/v2"]).await;
    assert_eq!(ready(&rig, "owner/project", Some("later")).await, "");
    assert_eq!(git(&clone, &["symbolic-ref", "-q", "HEAD"]), "refs/heads/later");
    assert_eq!(git(&clone, &["status", "--porcelain", "--ignored"]), "");
    let error = error(&rig, "owner/project", Some("no-such")).await;
    assert_eq!(error.matches("no-such").count(), 1, "{error}");
    nothing_shows_the_token(&rig);
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repository_without_a_default_branch_or_without_commits_is_ready_with_a_note() {
    let host = GitServer::start().await;
    host.require("someone", TOKEN);
    host.create_repository("owner/lost", &[("README.md", "Read me\n", false)], &[]).await;
    host.git("owner/lost", &["branch", "-m", "main", "develop"]).await;
    host.git("owner/lost", &["symbolic-ref", "HEAD", "refs/heads/master"]).await;
    host.create_empty_repository("owner/empty").await;
    host.create_empty_repository("owner/void").await;
    let rig = rig(&host).await;
    let note = ready(&rig, "owner/lost", None).await;
    assert_eq!(note, "The repository's default branch does not exist: develop was checked out");
    let clone = folder(&rig, "lost");
    assert!(clone.join("README.md").exists());
    assert_eq!(git(&clone, &["symbolic-ref", "refs/remotes/origin/HEAD"]), "refs/remotes/origin/develop");
    let note = ready(&rig, "owner/empty", None).await;
    assert_eq!(note, "The repository is empty: it has no commits yet");
    let note = ready(&rig, "owner/void", Some("feature/one")).await;
    assert_eq!(note, "The branch feature/one is new: it has no commits yet");
    assert_eq!(git(&folder(&rig, "void"), &["symbolic-ref", "HEAD"]), "refs/heads/feature/one");
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_provider_s_error_is_quoted_once() {
    let (one, two) = (GitServer::start().await, GitServer::start().await);
    let rig = rig(&one).await;
    let tokens = json!({"github": {"token": TOKEN, "host": one.url()}, "gitlab": {"token": TOKEN, "host": two.url()}});
    rig.set_settings(json!({"llm_model": "openai/x", "provider_tokens": tokens})).await;
    let detail = error(&rig, "owner/none", None).await;
    for host in [&one, &two] {
        assert_eq!(detail.matches(&host.url()).count(), 1, "{detail}");
        let clones = host.requests().iter().filter(|request| request.path.ends_with("/info/refs")).count();
        assert!((1..=2).contains(&clones), "a permanent error is not tried again: {:?}", host.requests());
    }
    assert!(!detail.contains(TOKEN), "{detail}");
    rig.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_run_as_they_are_and_leave_no_trace() {
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
    let rig = rig(&host).await;
    let clone = folder(&rig, "husky");
    for _ in 0..2 {
        let note = ready(&rig, "owner/husky", Some("main")).await;
        assert!(note.contains("core.hooksPath") && note.contains("Call it from .husky/pre-commit"), "{note}");
        assert_eq!(std::fs::read_to_string(clone.join("../ran")).expect("it ran"), "set up .openhands/setup.sh\n");
        assert_eq!(git(&clone, &["status", "--porcelain", "--ignored"]), "");
        assert!(!clone.join(".husky/pre-commit.local").exists());
    }
    // As everything else that this process makes.
    let plain = rig.agent.root().join("plain");
    std::fs::create_dir(&plain).expect("a folder");
    std::fs::write(plain.join("file"), "").expect("a file");
    let mode = |path: PathBuf| std::os::unix::fs::PermissionsExt::mode(&path.metadata().expect("a file").permissions());
    assert_eq!(mode(clone.clone()), mode(plain.clone()));
    assert_eq!(mode(clone.join(".openhands/setup.sh")), mode(plain.join("file")));
    assert_eq!(mode(clone.join("run.sh")) & 0o777, mode(plain) & 0o777);
    nothing_shows_the_token(&rig);
    rig.finish().await;
}

/// A note of a step is not lost when a later step fails.
#[tokio::test(flavor = "multi_thread")]
async fn a_script_that_fails_is_quoted_beside_the_other_notes() {
    let files = [(".openhands/setup.sh", "echo 'no compiler' >&2\r\nexit 4\r\n", false)];
    let host = GitServer::start().await;
    host.create_repository("owner/broken", &files, &["develop"]).await;
    host.git("owner/broken", &["branch", "-M", "main", "develop"]).await;
    host.git("owner/broken", &["symbolic-ref", "HEAD", "refs/heads/gone"]).await;
    let rig = rig(&host).await;
    let detail = ready(&rig, "owner/broken", None).await;
    let lines: Vec<&str> = detail.lines().collect();
    assert_eq!(
        lines,
        [
            "The repository's default branch does not exist: develop was checked out",
            ".openhands/setup.sh failed: it ended with exit code 4: no compiler"
        ]
    );
    rig.finish().await;
}
