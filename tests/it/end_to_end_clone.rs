//! A clone as the agent finds it on real agent servers: file modes, the branch, and the hooks that its commits run.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::support::git_server::GitServer;
use crate::support::product::{Product, Start, contains, logged, saying, with};
use crate::support::scripted_llm::{Reply, ScriptedLlm};

const TOKEN: &str = "token-that-must-stay-secret-c5e1";
/// A hook that needs bash and works only in its own folder, next to the project.
const OWN: &str =
    "#!/bin/bash\nwords=(own); cd \"$(dirname \"${BASH_SOURCE[0]}\")/..\" && echo \"${words[0]}\" >>../ran\n";
const OWN_SAYS: &str = "own\n";

#[tokio::test]
async fn agent_gets_its_clone_with_the_modes_branch_and_hooks_of_git() {
    let llm = ScriptedLlm::start().await;
    let git = GitServer::start().await;
    git.require("someone", TOKEN);
    make_repositories(&git).await;
    let product = Product::start(json!({
        "llm_model": "openai/scripted",
        "llm_api_key": "key-of-the-model",
        "llm_base_url": llm.base_url(),
        "git_user_name": "Jane",
        "git_user_email": "jane@example.com",
        "provider_tokens": {"github": {"token": TOKEN, "host": git.url()}},
    }))
    .await;

    let mut sandbox = Value::Null;
    for (repository, expected, note) in [
        ("owner/plain", OWN_SAYS.to_owned(), ""),
        ("owner/crlf", OWN_SAYS.to_owned(), ""),
        ("owner/kept", format!("{OWN_SAYS}kept\n"), ""),
        ("owner/local", format!("{OWN_SAYS}tool\nusers\n"), ""),
        ("owner/husky", "husky\n".to_owned(), "Call it from .husky/pre-commit"),
        ("owner/calls", format!("husky\n{OWN_SAYS}"), ""),
    ] {
        let request = json!({"selected_repository": repository, "selected_branch": "release", "sandbox_id": sandbox});
        let (start, folder) = commit_by_the_agent(&product, &llm, repository, request).await;
        sandbox = start.sandbox_id().into();
        assert_eq!(read(&folder.join("../ran")), expected, "{repository}");
        let hooks: Vec<&str> = start.detail().lines().filter(|line| line.contains("pre-commit")).collect();
        assert_eq!(hooks.len(), usize::from(!note.is_empty()), "{hooks:?}");
        assert!(hooks.concat().contains(note), "{hooks:?}");
        let first = read(&folder.join("../first"));
        let base = format!("{} refs/heads/release\n", first.trim());
        assert_eq!(read(&folder.join(".git/openhands-base")), base, "the base commit");
        // A tag has the same name.
        assert_eq!(read(&folder.join(".git/HEAD")), "ref: refs/heads/release\n");
        assert_eq!(read(&folder.join("branch.txt")), "release");
        the_umask_is_the_same_everywhere(&product, &folder);
    }
    assert_token_is_not_exposed(&product);
    product.shutdown().await;
}

async fn make_repositories(git: &GitServer) {
    let setup = "umask >../umask-of-setup\n: >../made-by-setup\n";
    let hooked = "printf '#!/bin/sh\\necho kept >>../ran\\n' >.git/hooks/pre-commit; chmod +x .git/hooks/pre-commit\n";
    // A hook of the project's own tool, which calls one of the user's.
    let local = "cd .git/hooks\nprintf '#!/bin/sh\\necho tool >>../ran\\nexec .git/hooks/pre-commit.local\\n' >pre-commit\n\
        printf '#!/bin/sh\\necho users >>../ran\\n' >pre-commit.local\nchmod +x pre-commit pre-commit.local\n";
    let husky = "git config core.hooksPath .husky\n";
    for (name, script, pre_commit, husky) in [
        ("owner/plain", setup.to_owned(), OWN.to_owned(), ""),
        ("owner/crlf", setup.replace('\n', "\r\n"), OWN.replace('\n', "\r\n"), ""),
        ("owner/kept", format!("\u{feff}{setup}{hooked}"), format!("\u{feff}{OWN}"), ""),
        ("owner/local", format!("{setup}{local}"), OWN.to_owned(), ""),
        ("owner/husky", format!("#!/bin/zsh\n{setup}{husky}"), OWN.to_owned(), "echo husky >>../ran\n"),
        (
            "owner/calls",
            format!("{setup}{husky}"),
            OWN.to_owned(),
            "echo husky >>../ran\nbash .openhands/pre-commit.sh\n",
        ),
    ] {
        let files = [
            (".openhands/setup.sh", script.as_str(), false),
            (".openhands/pre-commit.sh", &pre_commit, false),
            (".husky/pre-commit", husky, true),
            ("run.sh", "true\n", true),
        ];
        git.create_repository(name, &files, &["release"]).await;
        git.git(name, &["tag", "release", "main"]).await;
    }
}

/// The agent checks whether the clone is clean, commits, and reports what it saw.
async fn commit_by_the_agent(product: &Product, llm: &ScriptedLlm, name: &str, request: Value) -> (Start, PathBuf) {
    let command = "rm -f ../ran; git status --porcelain --ignored >../status; git rev-parse HEAD >../first; umask >../umask-of-agent; : >../made-by-agent; \
        echo changed >>run.sh; git commit -q -a -m Changed; git log -1 --format='%an: %s' >../log";
    llm.reply_with(vec![Reply::tool_call("terminal", json!({"command": command})), Reply::text("Committed")]);
    let start = product.start_conversation(with(saying(&format!("Commit to {name}")), request)).await;
    product.conversation_when(&start.conversation_id(), "finished").await;
    let folder = product.at_agent(&start.conversation_id()).await.folder().await;
    assert_eq!(read(&folder.join("../status")), "", "{name}: the start left the clone clean");
    assert_eq!(read(&folder.join("../log")), "Jane: Changed\n", "{name}");
    (start, folder)
}

/// The umask of the setup script, the agent and the clone is that of the agent server, which is ours.
fn the_umask_is_the_same_everywhere(product: &Product, folder: &Path) {
    let mode = |path: &Path| {
        path.metadata().unwrap_or_else(|error| panic!("{}: {error}", path.display())).permissions().mode() & 0o777
    };
    let plain = product.data().join("made-by-the-test");
    std::fs::create_dir_all(&plain).expect("a folder");
    std::fs::write(plain.join("file"), "").expect("a file");
    let (of_files, of_folders) = (mode(&plain.join("file")), mode(&plain));
    assert_eq!(read(&folder.join("../umask-of-setup")), read(&folder.join("../umask-of-agent")));
    for file in
        ["../made-by-setup", "../made-by-agent", ".openhands/pre-commit.sh", ".openhands/setup.sh", ".git/config"]
    {
        assert_eq!(mode(&folder.join(file)), of_files, "{file}");
    }
    for file in ["", ".openhands", ".git", "run.sh", "..", ".git/hooks/pre-commit"] {
        assert_eq!(mode(&folder.join(file)), of_folders, "{file}");
    }
    assert_eq!(mode(&folder.join("../../.openhands-start")), 0o700);
}

fn read(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn assert_token_is_not_exposed(product: &Product) {
    let files = product.files();
    let exposing: Vec<_> =
        files.iter().filter(|file| std::fs::read(file).is_ok_and(|bytes| contains(&bytes, TOKEN.as_bytes()))).collect();
    assert!(files.len() > 100 && exposing.is_empty(), "the token is in {exposing:#?}");
    assert!(!logged().contains(TOKEN), "the token is in the log");
}
