//! Step PREPARING_REPOSITORY of the start saga: clones the repository and checks out its branch, or creates an empty repository.
//!
//! Tokens are stored in a file of git's credential store, not in a command, because the agent server logs and stores commands. The clone's
//! own configuration never contains tokens, and the command removes the file at its end.

use std::time::Duration;

use secrecy::SecretString;

use super::command::{OneCommand, complaint, note_in};
use super::{Folders, StartRun, Step, StepError};
use crate::error::ErrorClass;
use crate::id;
use crate::shell::quoted;
use crate::start::store::Change;
use crate::start::task::StartStatus;
use crate::user::git::{CloneSource, clone_sources};

/// The name of the command.
pub(super) const PREPARE: &str = "prepare-repository";

/// The prefix of the output line that reports whether there is a browser.
const BROWSER: &str = "openhands-browser:";

/// The prefix of the output line that names the scripts of the project.
const SCRIPTS: &str = "openhands-scripts:";

/// The time limit of the command that creates the folder for the credentials.
const MKDIR_TIMEOUT: Duration = Duration::from_secs(15);

/// See [`Preparation::lock_wait`].
const LOCK_WAIT: [Duration; 2] = [Duration::from_secs(30), Duration::from_secs(5)];

impl StartRun<'_> {
    pub(super) async fn prepare_repository(&mut self) -> Result<Step, StepError> {
        let Some((sandbox, agent_server)) = self.running_sandbox().await? else { return Ok(Step::Wait) };
        let folders = self.folders(&sandbox).await?;
        let settings = self.settings().await?;
        let repository = self.task.request.selected_repository.clone().filter(|name| !name.is_empty());
        let sources = match &repository {
            None => Vec::new(),
            Some(name) => {
                let insecure = self.saga.config.allow_insecure_git_access;
                clone_sources(name, self.task.request.git_provider, &settings.provider_tokens, insecure)
                    .map_err(|error| StepError::Failed(ErrorClass::Repository, error.to_string()))?
            }
        };
        self.load_skills_ahead(&sandbox, &agent_server).await?;
        let credentials = format!("{}/credentials", folders.state);
        // The file is uploaded only before the command starts: a later file would stay in the sandbox.
        if !self.is_sent(PREPARE) && sources.iter().any(|source| source.credential.is_some()) {
            let prepare = format!("umask 077; mkdir -p {}", quoted(&folders.state));
            agent_server.execute_command(&prepare, &folders.parent, MKDIR_TIMEOUT, MKDIR_TIMEOUT).await?;
            agent_server.upload(&credentials, &credential_lines(&sources)).await?;
        }
        let workspace = format!("openhands-workspace-{}", id::hex(self.task.record.conversation_id));
        let script = Preparation {
            folders: &folders,
            identity: [settings.git_user_name.as_deref(), settings.git_user_email.as_deref()],
            credentials: &credentials,
            sources: &sources,
            lock_wait: LOCK_WAIT,
            wanted: self.task.request.selected_branch.as_deref().unwrap_or_default().trim(),
            workspace: &workspace,
            init_without_repository: self.saga.config.init_git_in_empty_workspace,
        }
        .script();
        let timeout = self.saga.config.clone_timeout;
        // Every copy of the command removes the file: the attempt that sent a waiting copy may have uploaded it again.
        let finally = format!("rm -f {}", quoted(&credentials));
        let command = OneCommand { name: PREPARE, script: &script, finally: &finally, timeout };
        let Some(output) = self.run_once(&agent_server, &folders, command).await? else {
            return Ok(Step::Wait);
        };
        if output.exit_code != 0 {
            let what = match &repository {
                Some(name) => format!("The repository {name} could not be prepared"),
                None => "The workspace could not be prepared".to_owned(),
            };
            let text = format!("{what}: {}", complaint(&output));
            let class = if repository.is_some() { ErrorClass::Repository } else { ErrorClass::Sandbox };
            return Err(StepError::Failed(class, text));
        }
        let browser = output.stdout.lines().any(|line| line == format!("{BROWSER}yes"));
        self.task.record.browser = Some(browser);
        let scripts = Scripts::in_output(&output.stdout);
        self.scripts = scripts;
        let mut change = Change::default().set("browser", aws_sdk_dynamodb::types::AttributeValue::Bool(browser));
        if let Some(note) = note_in(&output) {
            self.task.record.notes.push(note.clone());
            change = change.note(note);
        }
        let next: &[StartStatus] = match scripts {
            Some(Scripts { has_setup: false, has_pre_commit: false }) => {
                &[StartStatus::RunningSetupScript, StartStatus::SettingUpGitHooks, StartStatus::SettingUpSkills]
            }
            Some(Scripts { has_setup: false, .. }) => {
                &[StartStatus::RunningSetupScript, StartStatus::SettingUpGitHooks]
            }
            _ => &[StartStatus::RunningSetupScript],
        };
        Ok(Step::Next(next, change))
    }
}

/// The scripts of a project for which a start has a step, as the command that prepares the workspace finds them at its end. Without a
/// script its step sends no command. A setup script may create any file, so after it nothing is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scripts {
    /// `.openhands/setup.sh`
    pub(super) has_setup: bool,
    /// `.openhands/pre-commit.sh`
    has_pre_commit: bool,
}

impl Scripts {
    /// Reads the command's report; `None` if there is none.
    fn in_output(output: &str) -> Option<Self> {
        // Programs of the project may have printed lines before.
        let report = output.lines().rev().find_map(|line| line.strip_prefix(SCRIPTS))?;
        let has = |name| report.split(' ').any(|script| script == name);
        Some(Self { has_setup: has("setup.sh"), has_pre_commit: has("pre-commit.sh") })
    }
}

/// The inputs of the command that prepares the workspace.
struct Preparation<'a> {
    folders: &'a Folders,
    /// The user's name and e-mail address for git.
    identity: [Option<&'a str>; 2],
    /// The file of git's credential store.
    credentials: &'a str,
    /// The addresses from which the repository may be cloned; empty if there is no repository.
    sources: &'a [CloneSource],
    /// The time limits for waits on git's locks: those of the repository, and those of the user's configuration.
    lock_wait: [Duration; 2],
    /// The requested branch, tag or commit, or an empty text.
    wanted: &'a str,
    /// The branch that is created if none is requested.
    workspace: &'a str,
    /// Whether `git init` runs in a workspace without a repository.
    init_without_repository: bool,
}

impl Preparation<'_> {
    fn script(&self) -> String {
        let Folders { working_dir, project_dir, state, .. } = self.folders;
        let mut script = String::new();
        for (name, value) in [
            ("state", state.as_str()),
            ("working_dir", working_dir),
            ("project_dir", project_dir),
            ("credentials", self.credentials),
            ("wanted", self.wanted),
            ("workspace", self.workspace),
        ] {
            script += &format!("{name}={}\n", quoted(value));
        }
        for (name, lock_wait) in ["lock_wait", "config_lock_wait"].into_iter().zip(self.lock_wait) {
            script += &format!("{name}={}\n", lock_wait.as_secs());
        }
        script += FUNCTIONS;
        script += "set -e\nmkdir -p \"$working_dir\"\ncd \"$working_dir\"\n";
        for (key, value) in ["user.name", "user.email"].into_iter().zip(self.identity) {
            if let Some(value) = value.filter(|value| !value.trim().is_empty()) {
                script += &format!("set_identity {key} {}\n", quoted(value));
            }
        }
        script += BROWSER_PROBE;
        if self.sources.is_empty() {
            script += REPORT_SCRIPTS;
            if self.init_without_repository {
                script += "command -v git >/dev/null || exit 0\n[ -e .git ] || init\ntrust \"$working_dir\"\n";
            }
            return script;
        }
        let same: Vec<String> = self.sources.iter().flat_map(|source| endings(&source.url)).collect();
        let urls: Vec<String> = self.sources.iter().map(|source| quoted(&source.url)).collect();
        script += &format!(
            "trap 'rm -f \"$credentials\"' EXIT\nexport GIT_TERMINAL_PROMPT=0 GIT_ASKPASS=true\n\
             is_expected_origin() {{\n  case $1 in ''|{}) ;; *) return 1 ;; esac\n}}\nprepare {}\n{REPORT_SCRIPTS}",
            same.join("|"),
            urls.join(" "),
        );
        script
    }
}

/// Shell patterns for the ends of a repository's addresses, whatever host alias, protocol or token they start with.
fn endings(url: &str) -> [String; 2] {
    let path = url.split_once("://").map_or(url, |(_, rest)| rest).split_once('/').map_or(url, |(_, path)| path);
    let path = path.trim_end_matches(".git");
    [format!("*[/:]{}", quoted(path)), format!("*[/:]{}", quoted(&format!("{path}.git")))]
}

/// The shell functions of the script. They are the same for all starts.
const FUNCTIONS: &str = include_str!("prepare_repository.sh");

fn credential_lines(sources: &[CloneSource]) -> SecretString {
    let lines: Vec<&str> = sources
        .iter()
        .filter_map(|source| source.credential.as_ref())
        .map(secrecy::ExposeSecret::expose_secret)
        .collect();
    SecretString::from(format!("{}\n", lines.join("\n")))
}

/// Searches the paths that the agent server's browser tool searches. Without a browser, that tool would make the whole start fail.
const BROWSER_PROBE: &str = r#"browser=no
for b in google-chrome chrome chromium chromium-browser; do
  if command -v "$b" >/dev/null 2>&1; then browser=yes; fi
done
for b in /usr/bin/google-chrome /usr/bin/google-chrome-stable /usr/bin/chromium /usr/bin/chromium-browser \
  "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" /Applications/Chromium.app/Contents/MacOS/Chromium \
  "$HOME"/.cache/ms-playwright/chromium-*/chrome-linux*/chrome "$HOME"/Library/Caches/ms-playwright/chromium-*/chrome-mac*; do
  if [ -e "$b" ]; then browser=yes; fi
done
echo "openhands-browser:$browser"
"#;

/// Reports the scripts of the project, see [`Scripts`]. It is the last part that looks at the project: `git init` changes none of its files.
const REPORT_SCRIPTS: &str = include_str!("report_scripts.sh");

#[cfg(test)]
mod tests {
    use super::super::scratch::{Ran, Scratch, shells};
    use super::*;
    use crate::user::git::ProviderType;

    /// A start with the repository `o/r` of a scratch folder.
    struct Start<'a> {
        scratch: &'a Scratch,
        urls: Vec<String>,
    }

    impl<'a> Start<'a> {
        fn new(scratch: &'a Scratch) -> Self {
            Self { scratch, urls: vec![format!("file://{}", scratch.path("o/r.git"))] }
        }

        fn script(&self, wanted: &str) -> String {
            let scratch = self.scratch;
            let folders = Folders {
                working_dir: scratch.path("workspace/project"),
                project_dir: scratch.path("workspace/project/r"),
                parent: scratch.path("workspace"),
                state: scratch.path("workspace/.openhands-start/1"),
            };
            let source =
                |url: &String| CloneSource { provider: ProviderType::Github, url: url.clone(), credential: None };
            let sources: Vec<CloneSource> = self.urls.iter().map(source).collect();
            Preparation {
                folders: &folders,
                identity: [Some("A user"), Some("user@example.com")],
                credentials: &format!("{}/credentials", folders.state),
                sources: &sources,
                lock_wait: [Duration::from_secs(60), Duration::from_secs(2)],
                wanted,
                workspace: "openhands-workspace-1",
                init_without_repository: true,
            }
            .script()
        }

        fn run(&self, wanted: &str) -> Ran {
            std::fs::create_dir_all(self.scratch.at("workspace/.openhands-start/1")).expect("a folder");
            self.scratch.run(&self.script(wanted))
        }

        /// Runs a start that must succeed, and returns its notes.
        #[track_caller]
        fn ready(&self, wanted: &str) -> String {
            let ran = self.run(wanted);
            assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{wanted:?}: {ran:?}");
            let notes = ran.stdout.lines().filter_map(|line| line.strip_prefix("openhands-note:"));
            notes.collect::<Vec<_>>().join("\n")
        }

        /// Runs a start that must fail, and returns its error.
        #[track_caller]
        fn error(&self, wanted: &str) -> String {
            let ran = self.run(wanted);
            assert_eq!(ran.code, Some(1), "{wanted:?}: {ran:?}");
            ran.stderr
        }

        /// The checked-out branch or commit, and the subject of the last commit.
        fn head(&self) -> String {
            let head = self.scratch.run(
                "cd workspace/project/r && { git symbolic-ref -q HEAD || echo detached; } && git log -1 --format=%s HEAD 2>/dev/null",
            );
            head.stdout.trim().replace('\n', " ")
        }

        #[track_caller]
        fn git(&self, arguments: &str) -> String {
            self.scratch.must(&format!("cd workspace/project/r && git {arguments}")).trim().to_owned()
        }
    }

    /// Creates `o/r.git`, with a first commit on main, and `work`, from which tests push to it.
    fn remote(scratch: &Scratch) {
        scratch.write("work/README.md", "Read me\n");
        scratch.write("work/docs/index", "Index\n");
        scratch.must("mkdir -p workspace o && git init -q --bare -b main o/r.git");
        scratch.must("cd work && git init -q -b main && git remote add origin ../o/r.git && git add -A && git commit -q -m First && git push -q origin main 2>&1");
    }

    /// Makes a commit and pushes it to references of the remote.
    fn push(scratch: &Scratch, subject: &str, references: &[&str]) {
        let references: Vec<String> = references.iter().map(|name| quoted(&format!("+HEAD:{name}"))).collect();
        scratch.must(&format!(
            "cd work && git commit -q --allow-empty -m {} && git push -q origin {} 2>&1",
            quoted(subject),
            references.join(" ")
        ));
    }

    #[test]
    fn the_branch_that_is_asked_for_is_checked_out_whatever_else_has_its_name() {
        let scratch = Scratch::new();
        remote(&scratch);
        let hash = scratch.must("git -C work rev-parse HEAD");
        let names = [
            "v1",
            "docs",
            "README.md",
            "feature/a+b",
            "fix#12",
            "user@host",
            "größe/ü",
            "it's",
            "say\"hi\"",
            "dollar$HOME",
            "semi;colon",
            "origin/x",
            "heads/y",
            "tags/z",
            "refs/heads/w",
            "FETCH_HEAD",
            "ORIG_HEAD",
            "head",
            "dead",
            "beefbeef",
            "100%",
            "a&b",
            "paren(1)",
            "stash",
            "main-2",
            hash.trim(),
            &hash[..8],
        ];
        push(&scratch, "the tag", &names.map(|name| format!("refs/tags/{name}")).each_ref().map(String::as_str));
        for name in names {
            push(&scratch, name, &[&format!("refs/heads/{name}")]);
        }
        for shell in shells() {
            for name in names {
                let fresh = Scratch::with(&shell);
                let start = Start { urls: Start::new(&scratch).urls, ..Start::new(&fresh) };
                for wanted in [name.to_owned(), format!("refs/heads/{name}")] {
                    // The first start clones the repository; the second one finds the branch checked out.
                    assert_eq!(start.ready(&wanted), "", "{wanted}");
                    assert_eq!(start.head(), format!("refs/heads/{name} {name}"), "{wanted}");
                }
                assert_eq!(
                    start.git(&format!("rev-parse --symbolic-full-name {}@{{upstream}}", quoted(name))),
                    format!("refs/remotes/origin/{name}")
                );
                assert_eq!(start.git("status --porcelain --ignored"), "");
                assert_eq!(start.git("symbolic-ref refs/remotes/origin/HEAD"), "refs/remotes/origin/main");
            }
        }
    }

    #[test]
    fn a_branch_may_be_written_with_the_place_where_git_keeps_it() {
        let scratch = Scratch::new();
        remote(&scratch);
        push(&scratch, "one", &["refs/heads/feature/one"]);
        for (wanted, expected) in [
            ("origin/feature/one", "refs/heads/feature/one one"),
            ("refs/heads/feature/one", "refs/heads/feature/one one"),
            ("refs/remotes/origin/feature/one", "refs/heads/feature/one one"),
            ("remotes/origin/feature/one", "refs/heads/feature/one one"),
            ("heads/feature/one", "refs/heads/feature/one one"),
            ("HEAD", "refs/heads/main First"),
            ("origin/HEAD", "refs/heads/main First"),
            ("@", "refs/heads/main First"),
            ("", "refs/heads/openhands-workspace-1 First"),
        ] {
            let fresh = Scratch::new();
            let start = Start { urls: Start::new(&scratch).urls, ..Start::new(&fresh) };
            assert_eq!(start.ready(wanted), "");
            assert_eq!(start.head(), expected, "{wanted}");
        }
    }

    #[test]
    fn a_tag_and_a_commit_are_checked_out_where_no_branch_has_the_name() {
        let scratch = Scratch::new();
        remote(&scratch);
        push(&scratch, "released", &["refs/heads/main", "refs/tags/v1", "refs/tags/docs"]);
        scratch.must("cd work && git tag -a -m Annotated annotated && git push -q origin annotated 2>&1");
        let hash = scratch.must("git -C work rev-parse HEAD").trim().to_owned();
        push(&scratch, "reviewed", &["refs/pull/7/head", "refs/tags/on/no/branch"]);
        let unreachable = scratch.must("git -C work rev-parse HEAD").trim().to_owned();
        push(&scratch, "after", &["refs/heads/main"]);
        for (wanted, expected) in [
            ("v1", "released"),
            ("docs", "released"),
            ("refs/tags/v1", "released"),
            ("tags/v1", "released"),
            ("annotated", "released"),
            ("on/no/branch", "reviewed"),
            (&hash, "released"),
            (&hash[..7], "released"),
            (&hash.to_uppercase(), "released"),
            (&unreachable, "reviewed"),
        ] {
            let fresh = Scratch::new();
            let start = Start { urls: Start::new(&scratch).urls, ..Start::new(&fresh) };
            for _ in 0..2 {
                assert_eq!(start.ready(wanted), "");
                assert_eq!(start.head(), format!("detached {expected}"), "{wanted}");
            }
        }
    }

    #[test]
    fn what_came_to_the_repository_after_its_clone_is_fetched() {
        for shell in shells() {
            let scratch = Scratch::with(&shell);
            remote(&scratch);
            let start = Start::new(&scratch);
            assert_eq!(start.ready(""), "");
            push(&scratch, "later", &["refs/heads/later", "refs/tags/a-tag", "refs/tags/later"]);
            push(&scratch, "cafe", &["refs/heads/cafe"]);
            push(&scratch, "no branch's", &["refs/tags/alone", "refs/pull/1/head"]);
            let hash = scratch.must("git -C work rev-parse HEAD").trim().to_owned();
            for (wanted, expected) in [
                ("later", "refs/heads/later later"),
                ("origin/cafe", "refs/heads/cafe cafe"),
                ("a-tag", "detached later"),
                ("alone", "detached no branch's"),
                (&hash, "detached no branch's"),
                ("main", "refs/heads/main First"),
            ] {
                assert_eq!(start.ready(wanted), "");
                assert_eq!(start.head(), expected, "{wanted}");
            }
            // The clone is limited to one branch.
            start.git("config remote.origin.fetch +refs/heads/main:refs/remotes/origin/main");
            push(&scratch, "last", &["refs/heads/last"]);
            assert_eq!(start.ready("last"), "");
            assert_eq!(start.head(), "refs/heads/last last");
        }
    }

    #[test]
    fn what_is_nowhere_is_an_error_that_names_it_once() {
        let scratch = Scratch::new();
        remote(&scratch);
        push(&scratch, "x", &["refs/heads/-x"]);
        let start = Start::new(&scratch);
        for wanted in [
            "no-such",
            "origin/no-such",
            "refs/tags/no",
            "deadbeef",
            &"a".repeat(40),
            "FETCH_HEAD",
            "stash",
            "main^",
            "x y",
            "-x",
            "--help",
            "refs/heads/-x",
        ] {
            let error = start.error(wanted);
            let named = wanted.trim_start_matches("refs/heads/");
            assert_eq!(error.matches(named).count(), 1, "{wanted}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        let other = Scratch::new();
        let start = Start { urls: vec![format!("file://{}", other.path("none/r.git"))], scratch: &other };
        let error = start.error("x");
        assert_eq!(error.matches("does not appear").count(), 1, "{error}");
    }

    #[test]
    fn of_several_addresses_each_error_is_quoted_once_and_none_of_one_that_worked() {
        let scratch = Scratch::new();
        remote(&scratch);
        let [good] = Start::new(&scratch).urls.try_into().expect("one");
        let bad = |name: &str| format!("file://{}", scratch.path(name));
        let start = |urls: Vec<String>| Start { scratch: &scratch, urls };
        let error = start(vec![bad("one/r.git"), bad("two/r.git")]).error("");
        for name in ["one/r.git", "two/r.git"] {
            assert_eq!(error.matches(&format!("{name}' does not appear")).count(), 1, "{error}");
        }
        let two = start(vec![bad("one/r.git"), good]);
        let error = two.error("no-such");
        assert!(!error.contains("one/r.git") && error.contains("no-such"), "{error}");
        assert_eq!(two.ready("main"), "");
        // A start fetches into an existing clone from the address that works.
        push(&scratch, "later", &["refs/heads/later"]);
        assert_eq!(two.ready("later"), "");
        scratch.must("mv o gone");
        let error = two.error("much-later");
        assert_eq!(
            (error.matches("one/r.git' does not appear").count(), error.matches("/o/r.git' does not appear").count()),
            (1, 1),
            "{error}"
        );
        // A branch that exists in the clone needs no address.
        assert_eq!(two.ready("main"), "");
    }

    #[test]
    fn an_empty_repository_is_ready_with_a_branch_without_commits_and_a_note() {
        for shell in shells() {
            for (wanted, branch) in [
                ("", "openhands-workspace-1"),
                ("develop", "develop"),
                ("refs/heads/a/b", "a/b"),
                ("origin/x", "x"),
                ("main", "main"),
                ("HEAD", "main"),
            ] {
                let scratch = Scratch::with(&shell);
                scratch.must("mkdir -p workspace o && git init -q --bare -b main o/r.git");
                let start = Start::new(&scratch);
                for _ in 0..2 {
                    let notes = start.ready(wanted);
                    assert!(notes.ends_with("no commits yet") && notes.lines().count() == 1, "{notes:?}");
                    assert!(wanted.is_empty() || notes.contains(&format!(" {branch} ")), "{notes:?}");
                    assert_eq!(start.head(), format!("refs/heads/{branch}"), "{wanted}");
                }
                // Another user pushes the first commits.
                scratch.write("work/file", "");
                scratch.must("cd work && git init -q -b main && git add file && git commit -q -m First && git push -q ../o/r.git main:main main:other 2>&1");
                let begun = ["", "HEAD", "main"].contains(&wanted);
                assert_eq!(start.ready(wanted).is_empty(), begun, "{wanted}");
                assert_eq!(
                    start.head(),
                    format!("refs/heads/{branch}{}", if begun { " First" } else { "" }),
                    "{wanted}"
                );
                assert_eq!(scratch.at("workspace/project/r/file").exists(), begun);
                assert_eq!(start.git("status --porcelain --ignored"), "");
                assert_eq!(start.ready("other"), "");
                assert_eq!(start.head(), "refs/heads/other First");
            }
        }
    }

    #[test]
    fn what_an_agent_has_begun_in_an_empty_repository_is_left_alone() {
        for wanted in ["", "main"] {
            let scratch = Scratch::new();
            scratch.must("mkdir -p workspace o && git init -q --bare -b main o/r.git");
            let start = Start::new(&scratch);
            start.ready(wanted);
            scratch.write("workspace/project/r/file", "of the agent");
            start.git("add file");
            let before = start.head();
            scratch.write("work/file", "of somebody");
            scratch.must("cd work && git init -q -b main && git add file && git commit -q -m First && git push -q ../o/r.git main 2>&1");
            start.ready(wanted);
            assert_eq!((start.head(), scratch.read("workspace/project/r/file")), (before, "of the agent".to_owned()));
            assert_eq!(start.git("status --porcelain"), "A  file");
        }
    }

    #[test]
    fn a_remote_head_without_a_branch_is_replaced_by_a_branch_that_is_there() {
        for shell in shells() {
            for (branches, expected) in [
                (&["develop"][..], "develop"),
                (&["trunk/one"], "trunk/one"),
                (&["zzz", "main", "aaa"], "main"),
                (&["master", "newer"], "master"),
                (&["old", "older", "newest"], "newest"),
            ] {
                let make = || {
                    let scratch = Scratch::with(&shell);
                    remote(&scratch);
                    for (days, branch) in branches.iter().enumerate() {
                        scratch.must(&format!(
                            "cd work && GIT_COMMITTER_DATE='2026-01-0{} 00:00 +0000' git commit -q --amend --allow-empty -m {branch} && git push -q origin +HEAD:refs/heads/{branch} 2>&1",
                            days + 1
                        ));
                    }
                    scratch.must("cd o/r.git && git symbolic-ref HEAD refs/heads/gone");
                    if !branches.contains(&"main") {
                        scratch.must("cd o/r.git && git branch -q -D main");
                    }
                    scratch
                };
                let scratch = make();
                let start = Start::new(&scratch);
                let notes = start.ready("");
                assert!(notes.contains("default branch does not exist") && notes.contains(expected), "{notes:?}");
                assert_eq!(start.head(), format!("refs/heads/openhands-workspace-1 {expected}"));
                assert!(scratch.at("workspace/project/r/README.md").exists());
                assert_eq!(
                    start.git("symbolic-ref refs/remotes/origin/HEAD"),
                    format!("refs/remotes/origin/{expected}")
                );
                assert_eq!(start.ready(""), "", "a second start finds it done");
                let scratch = make();
                let start = Start::new(&scratch);
                let error = start.error("gone");
                assert!(error.contains("no branch, tag or commit 'gone'"), "{error}");
                let scratch = make();
                let start = Start::new(&scratch);
                assert_eq!(start.ready(branches[0]), "", "what was asked for is there");
                assert_eq!(start.head(), format!("refs/heads/{0} {0}", branches[0]));
                assert_eq!(
                    start.git("symbolic-ref refs/remotes/origin/HEAD"),
                    format!("refs/remotes/origin/{expected}")
                );
                // An earlier version left a READY start with an empty clone.
                let scratch = make();
                let start = Start::new(&scratch);
                scratch.must(&format!(
                    "mkdir -p workspace/project && cd workspace/project && git clone -q {} 2>/dev/null && cd r && git checkout -q -b openhands-workspace-0",
                    start.urls[0]
                ));
                assert!(start.ready("").contains(expected));
                assert_eq!(start.head(), format!("refs/heads/openhands-workspace-1 {expected}"));
            }
        }
    }

    #[test]
    fn a_detached_remote_head_is_checked_out_as_it_is() {
        for (wanted, expected) in [
            ("", "refs/heads/openhands-workspace-1 detached"),
            ("main", "refs/heads/main First"),
            ("HEAD", "detached detached"),
        ] {
            let scratch = Scratch::new();
            remote(&scratch);
            push(&scratch, "detached", &["refs/tags/x"]);
            scratch.must("cd o/r.git && git update-ref --no-deref HEAD refs/tags/x");
            let start = Start::new(&scratch);
            assert_eq!(start.ready(wanted), "");
            assert_eq!(start.head(), expected, "{wanted}");
        }
    }

    #[test]
    fn the_clone_has_the_modes_that_git_gives_it() {
        for shell in shells() {
            for mask in ["022", "002", "077"] {
                let scratch = Scratch::with(&shell);
                remote(&scratch);
                scratch.write("work/run", "");
                scratch.set_mode("work/run", 0o755);
                std::os::unix::fs::symlink("run", scratch.at("work/link")).expect("a link");
                scratch.must("cd work && git add -A && git commit -q -m Run && git push -q origin main 2>&1");
                scratch.must(&format!("umask {mask}; git clone -q o/r.git plain"));
                let start = Start::new(&scratch);
                let folders = scratch.path("workspace/.openhands-start/1");
                let ran = scratch.run(&format!(
                    "umask {mask}\n{}",
                    super::super::command::once(&folders, "x", &start.script(""), "")
                ));
                assert_eq!(ran.code, Some(0), "{ran:?}");
                assert_eq!(scratch.tree("workspace/project/r"), scratch.tree("plain"), "{mask}");
                for name in ["", "/.git", "/.git/config", "/.git/HEAD", "/.git/objects", "/.git/hooks"] {
                    assert_eq!(
                        scratch.mode(&format!("workspace/project/r{name}")),
                        scratch.mode(&format!("plain{name}")),
                        "{name}"
                    );
                }
                let mask = u32::from_str_radix(mask, 8).expect("a number");
                assert_eq!(
                    (scratch.mode("workspace/project"), scratch.mode("home/.gitconfig")),
                    (0o777 & !mask, 0o666 & !mask)
                );
                assert_eq!(scratch.mode("workspace/.openhands-start/1"), 0o700);
            }
        }
    }

    #[test]
    fn a_repository_of_tags_alone_is_ready_with_a_note() {
        let scratch = Scratch::new();
        remote(&scratch);
        scratch.must("cd o/r.git && git tag v1 main && git branch -q -D main");
        let start = Start::new(&scratch);
        assert_eq!(start.ready(""), "The repository has no branches, only tags");
        assert_eq!(start.ready("v1"), "");
        assert_eq!(start.head(), "detached First");
    }

    /// Installs a `git` that counts its calls in `calls`, and that holds a lock until so many calls have failed on it.
    fn git_with_lock(scratch: &Scratch, lock: &str, failures: usize) {
        scratch.write(lock, "");
        scratch.write("calls", "");
        scratch.write("failures", "");
        let git = scratch.must("PATH=${PATH#*:} command -v git");
        let (calls, failed, said, lock) = (
            quoted(&scratch.path("calls")),
            quoted(&scratch.path("failures")),
            quoted(&scratch.path("said")),
            quoted(&scratch.path(lock)),
        );
        // Without LC_ALL=C its output is in another language.
        scratch.write(
            "bin/git",
            format!(
                "#!/bin/sh\necho \"$*\" >>{calls}\nLC_ALL=C {git} \"$@\" 2>{said}.$$\ncode=$?\n\
                 if grep -q 'File exists' {said}.$$; then\n  echo failed >>{failed}\n  [ $(($(wc -l <{failed}))) -lt {failures} ] || rm -f {lock}\nfi\n\
                 if [ \"$LC_ALL\" = C ] || [ $code = 0 ]; then cat {said}.$$ >&2; else echo 'Datei existiert' >&2; fi\nrm -f {said}.$$\nexit $code\n",
                git = git.trim()
            ),
        );
        scratch.set_mode("bin/git", 0o755);
    }

    /// Retries apply only to errors that are caused by locks.
    #[test]
    fn locks_are_waited_for_and_other_errors_are_not() {
        for shell in shells() {
            for (lock, wanted, failures) in [
                ("workspace/project/r/.git/index.lock", "one", 1),
                ("workspace/project/r/.git/index.lock", "two", 8),
                ("home/.gitconfig.lock", "", 1),
                ("workspace/project/r/.git/HEAD.lock", "two", 8),
                ("workspace/project/r/.git/refs/remotes/origin/later.lock", "later", 6),
                ("workspace/project/r/.git/config.lock", "three", 1),
            ] {
                let scratch = Scratch::with(&shell);
                remote(&scratch);
                push(&scratch, "x", &["refs/heads/one", "refs/heads/two", "refs/heads/three"]);
                let start = Start::new(&scratch);
                assert_eq!(start.ready("main"), "");
                push(&scratch, "later", &["refs/heads/later"]);
                if wanted.is_empty() {
                    scratch.must("rm home/.gitconfig");
                }
                git_with_lock(&scratch, lock, failures);
                assert_eq!(start.ready(wanted), "", "{lock}");
                let failed = scratch.read("failures").lines().count();
                assert_eq!(failed, failures, "{lock}");
                let upstream = start.git("rev-parse --symbolic-full-name @{upstream} 2>/dev/null || echo none");
                let expected = if wanted.is_empty() { "none" } else { &format!("refs/remotes/origin/{wanted}") };
                assert_eq!(upstream.lines().last(), Some(expected), "{lock}");
            }
            let scratch = Scratch::with(&shell);
            remote(&scratch);
            scratch.write("work/in the way", "");
            scratch.must("cd work && git add -A");
            push(&scratch, "x", &["refs/heads/one", "refs/heads/openhands-workspace-1/below"]);
            let start = Start::new(&scratch);
            assert_eq!(start.ready("main"), "");
            scratch.write("workspace/project/r/in the way", "of somebody");
            // The lock is never released.
            git_with_lock(&scratch, "workspace/project/r/.git/index.lock", 1000);
            let script = start.script("one").replace("\nlock_wait=60\n", "\nlock_wait=3\n");
            let ran = scratch.run(&script);
            assert_eq!(ran.code, Some(1), "{ran:?}");
            let error = ran.stderr;
            let tries = scratch.read("calls").matches("checkout -q one").count();
            assert!(error.matches("index.lock").count() == 1 && tries > 5, "{tries}: {error}");
            std::fs::remove_file(scratch.at("workspace/project/r/.git/index.lock")).expect("removed");
            scratch.write("calls", "");
            let error = start.error("one");
            assert_eq!(
                (error.matches("in the way").count(), scratch.read("calls").matches("checkout -q one").count()),
                (1, 1),
                "{error}"
            );
        }
    }

    #[test]
    fn a_conversation_that_is_started_again_finds_its_branch() {
        let scratch = Scratch::new();
        remote(&scratch);
        let start = Start::new(&scratch);
        assert_eq!(start.ready(""), "");
        start.git("commit -q --allow-empty -m Work");
        for other in ["-b other", "main", "--detach main", "--orphan new"] {
            start.git(&format!("checkout -q {other}"));
            assert_eq!(start.ready(""), "");
            assert_eq!(start.head(), "refs/heads/openhands-workspace-1 Work", "{other}");
        }
    }

    /// The configured wait for locks is longer than an agent's commit with a slow hook.
    #[test]
    fn a_commit_with_a_slow_hook_is_waited_for() {
        assert!(LOCK_WAIT[0] >= Duration::from_secs(30));
        let scratch = Scratch::new();
        remote(&scratch);
        push(&scratch, "x", &["refs/heads/one"]);
        let start = Start::new(&scratch);
        assert_eq!(start.ready("main"), "");
        scratch.write("workspace/project/r/.git/hooks/pre-commit", "#!/bin/sh\n: >../../../hook\nsleep 1.5\n");
        scratch.set_mode("workspace/project/r/.git/hooks/pre-commit", 0o755);
        scratch.write("workspace/project/r/README.md", "changed");
        let mut commit =
            scratch.command("cd workspace/project/r && git commit -q -a -m Slow").spawn().expect("a shell");
        while !scratch.at("hook").exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(start.ready("one"), "");
        assert!(commit.wait().expect("ended").success());
        assert_eq!(start.head(), "refs/heads/one x");
    }

    /// The script matches texts of git, so git's output must be in English.
    #[test]
    fn the_sandbox_s_language_does_not_matter() {
        let scratch = Scratch::new();
        remote(&scratch);
        let start = Start::new(&scratch);
        for (locale, lock) in [("de_DE.UTF-8", "index.lock"), ("C.UTF-8", "index.lock"), ("fr_FR", "HEAD.lock")] {
            assert_eq!(start.ready(""), "");
            start.git("checkout -q main");
            start.git("branch -q -D openhands-workspace-1");
            git_with_lock(&scratch, &format!("workspace/project/r/.git/{lock}"), 1);
            let ran = scratch
                .command(&format!("export LC_ALL={locale} LANG={locale} LANGUAGE=de\n{}", start.script("")))
                .output();
            assert_eq!(ran.expect("a shell").status.code(), Some(0), "{locale}");
            assert_eq!(scratch.read("failures"), "failed\n");
            std::fs::remove_file(scratch.at("bin/git")).expect("removed");
        }
    }

    #[test]
    fn a_configuration_that_cannot_be_written_is_noted_and_the_start_goes_on() {
        for (name, prepare) in [
            ("a lock that stays", ": >home/.gitconfig.lock"),
            ("a lock that is a folder", "mkdir home/.gitconfig.lock"),
            ("a home that does not exist", "rmdir home"),
            ("a home that is a file", "rmdir home; : >home"),
        ] {
            let scratch = Scratch::new();
            remote(&scratch);
            scratch.must(prepare);
            let start = Start::new(&scratch);
            let notes = start.ready("main");
            let lines: Vec<&str> = notes.lines().collect();
            assert_eq!(lines.len(), 2, "{name}: {notes}");
            for (line, key) in lines.into_iter().zip(["user.name", "user.email"]) {
                assert!(line.starts_with(&format!("The git configuration {key} was not set: ")), "{name}: {notes}");
            }
            assert_eq!(start.head(), "refs/heads/main First", "{name}");
        }
        // git does not work with a configuration that it cannot read.
        let scratch = Scratch::new();
        remote(&scratch);
        scratch.must("mkdir home/.gitconfig");
        let error = Start::new(&scratch).error("main");
        assert!(error.contains("Is a directory"), "{error}");
        // A folder that git refuses because another user owns it is an error.
        let scratch = Scratch::new();
        remote(&scratch);
        let start = Start::new(&scratch);
        assert_eq!(start.ready("main"), "");
        scratch.must("rm home/.gitconfig && : >home/.gitconfig.lock");
        let git = scratch.must("PATH=${PATH#*:} command -v git");
        scratch.write(
            "bin/git",
            format!("#!/bin/sh\nexport GIT_TEST_ASSUME_DIFFERENT_OWNER=1\nexec {} \"$@\"\n", git.trim()),
        );
        scratch.set_mode("bin/git", 0o755);
        let error = start.error("main");
        assert_eq!(error.matches(".gitconfig").count(), 1, "{error}");
    }

    #[test]
    fn an_empty_clone_whose_remote_cannot_be_reached_is_not_called_new() {
        for shell in shells() {
            for first in ["", "main", "develop"] {
                let make = || {
                    let scratch = Scratch::with(&shell);
                    scratch.must("mkdir -p workspace o && git init -q --bare -b main o/r.git");
                    let start = Start::new(&scratch);
                    assert!(start.ready(first).contains("no commits yet"));
                    scratch.must("mv o gone");
                    scratch
                };
                for wanted in ["feature", "origin/x", "refs/heads/a/b", "0abc123"] {
                    let scratch = make();
                    let start = Start::new(&scratch);
                    let before = start.head();
                    let error = start.error(wanted);
                    assert_eq!(error.matches("does not appear to be a git repository").count(), 1, "{error}");
                    assert_eq!(start.head(), before);
                }
                // A checkout of the current branch needs no remote; whether the repository is empty is unknown.
                let scratch = make();
                let start = Start::new(&scratch);
                let note = start.ready(first);
                assert!(note.contains("could not be fetched: ") && note.contains("does not appear"), "{note}");
                assert_eq!(note.lines().count(), 1, "{note}");
                assert!(!note.contains("new") && !note.contains("yet"), "{note}");
            }
        }
    }

    #[test]
    fn a_branch_that_is_gone_from_the_remote_is_in_no_branch_s_way() {
        for shell in shells() {
            for (gone, wanted) in [("a", "a/b"), ("a", "a/b/c"), ("a/b", "a"), ("x/y/z", "x/y")] {
                let make = || {
                    let scratch = Scratch::with(&shell);
                    remote(&scratch);
                    push(&scratch, "gone", &[&format!("refs/heads/{gone}"), "refs/heads/other"]);
                    scratch
                };
                let replace = |scratch: &Scratch| {
                    scratch.must(&format!("git -C o/r.git branch -q -D {gone}"));
                    push(scratch, "wanted", &[&format!("refs/heads/{wanted}")]);
                };
                let scratch = make();
                let start = Start::new(&scratch);
                assert_eq!(start.ready("main"), "");
                replace(&scratch);
                assert_eq!(start.ready(wanted), "", "{gone} {wanted}");
                assert_eq!(start.head(), format!("refs/heads/{wanted} wanted"));
                assert_eq!(start.git("symbolic-ref refs/remotes/origin/HEAD"), "refs/remotes/origin/main");
                // A local branch may hold work: it stays, and the error names it.
                let scratch = make();
                let start = Start::new(&scratch);
                assert_eq!(start.ready(gone), "");
                replace(&scratch);
                let error = start.error(wanted);
                let expected = format!(
                    "git cannot have the branch '{wanted}' beside the branch '{gone}' of this clone: rename that one, or start in another sandbox\n"
                );
                assert_eq!(error, expected);
                assert_eq!(start.head(), format!("refs/heads/{gone} gone"));
            }
        }
    }

    #[test]
    fn where_the_work_began_is_recorded_once_for_each_branch() {
        for shell in shells() {
            let scratch = Scratch::with(&shell);
            remote(&scratch);
            push(&scratch, "release", &["refs/heads/release", "refs/tags/v1"]);
            let release = scratch.must("git -C work rev-parse HEAD").trim().to_owned();
            push(&scratch, "two", &["refs/tags/v2"]);
            let two = scratch.must("git -C work rev-parse HEAD").trim().to_owned();
            let first = scratch.must("git -C work rev-parse HEAD~2").trim().to_owned();
            let start = Start::new(&scratch);
            let mut expected = String::new();
            for (wanted, line) in [
                ("", format!("{first} refs/heads/openhands-workspace-1")),
                ("", String::new()),
                ("release", format!("{release} refs/heads/release")),
                ("release", String::new()),
                ("v1", format!("{release} HEAD")),
                ("v1", String::new()),
                // v1 is an ancestor of v2, but no agent made the commits between them.
                ("v2", format!("{two} HEAD")),
                ("v2", String::new()),
                ("v1", format!("{release} HEAD")),
                ("main", format!("{first} refs/heads/main")),
            ] {
                assert_eq!(start.ready(wanted), "");
                if !line.is_empty() {
                    expected += &line;
                    expected.push('\n');
                }
                assert_eq!(scratch.read("workspace/project/r/.git/openhands-base"), expected, "{wanted}");
                if start.head().starts_with("refs") {
                    start.git("commit -q --allow-empty -m Work");
                }
            }
            // Another branch of the same name replaced the branch.
            start.git("checkout -q --orphan new");
            start.git("commit -q -m Other");
            start.git("branch -q -M new release");
            assert_eq!(start.ready("release"), "");
            expected += &format!("{} refs/heads/release\n", start.git("rev-parse HEAD"));
            assert_eq!(scratch.read("workspace/project/r/.git/openhands-base"), expected);
            assert_eq!(start.git("status --porcelain --ignored"), "");
        }
    }

    #[test]
    fn a_record_that_cannot_be_written_or_read_is_no_error() {
        for (junk, expected) in [
            ("mkdir .git/openhands-base", ""),
            ("ln -s /no/such/folder/x .git/openhands-base", ""),
            (
                "printf 'junk\\n\\n--all refs/heads/main\\n' >.git/openhands-base",
                "junk\n\n--all refs/heads/main\n{first} refs/heads/main\n",
            ),
            (
                "printf '%s\\n' '0000000000000000000000000000000000000000 refs/heads/main' >.git/openhands-base",
                "0000000000000000000000000000000000000000 refs/heads/main\n{first} refs/heads/main\n",
            ),
        ] {
            let scratch = Scratch::new();
            remote(&scratch);
            let start = Start::new(&scratch);
            let first = scratch.must("git -C work rev-parse HEAD").trim().to_owned();
            assert_eq!(start.ready("main"), "");
            scratch.must(&format!("cd workspace/project/r && rm .git/openhands-base && {junk}"));
            assert_eq!(start.ready("main"), "", "{junk}");
            assert_eq!(scratch.read("workspace/project/r/.git/openhands-base"), expected.replace("{first}", &first));
        }
        // Without a commit, no base is recorded.
        let scratch = Scratch::new();
        scratch.must("mkdir -p workspace o && git init -q --bare -b main o/r.git");
        Start::new(&scratch).ready("main");
        assert!(!scratch.at("workspace/project/r/.git/openhands-base").exists());
        // A worktree's base is recorded in the git directory of the repository.
        let scratch = Scratch::new();
        remote(&scratch);
        scratch.must("mkdir -p workspace/project && git clone -q o/r.git elsewhere && git -C elsewhere worktree add -q -b wt ../workspace/project/r");
        assert_eq!(Start::new(&scratch).ready("wt"), "");
        assert!(scratch.read("elsewhere/.git/openhands-base").ends_with(" refs/heads/wt\n"));
    }

    #[test]
    fn another_repository_of_the_same_name_is_refused_and_one_without_an_origin_is_not() {
        let scratch = Scratch::new();
        remote(&scratch);
        let start = Start::new(&scratch);
        assert_eq!(start.ready(""), "");
        start.git("remote set-url origin https://user:secret@example.com/other/r.git");
        let error = start.error("main");
        assert!(error.contains("holds another repository") && !error.contains("secret"), "{error}");
        start.git("remote remove origin");
        assert_eq!(start.ready("main"), "");
    }

    #[test]
    fn the_scripts_of_the_project_are_reported() {
        for (files, has_setup, has_pre_commit) in [
            (&[][..], false, false),
            (&["setup.sh"], true, false),
            (&["pre-commit.sh"], false, true),
            (&["pre-commit.sh", "setup.sh"], true, true),
            // A folder is no script.
            (&["setup.sh/x"], false, false),
        ] {
            for shell in shells() {
                let scratch = Scratch::with(&shell);
                let add = files
                    .iter()
                    .map(|file| format!("mkdir -p $(dirname .openhands/{file}); echo true >.openhands/{file}\n"));
                let add: String = add.collect();
                scratch.must(&format!(
                    "mkdir -p o w && git init -q w && cd w && {{ echo x >x\n{add}}}\ngit add -A && git commit -q -m First && git clone -q --bare . ../o/r.git"
                ));
                let ran = Start::new(&scratch).run("");
                assert_eq!(ran.code, Some(0), "{ran:?}");
                let expected = Some(Scripts { has_setup, has_pre_commit });
                assert_eq!(Scripts::in_output(&ran.stdout), expected, "{files:?} {ran:?}");
            }
        }
        let expected = Some(Scripts { has_setup: true, has_pre_commit: false });
        let output = "openhands-scripts:\nopenhands-scripts: setup.sh\nopenhands-note:x\n";
        assert_eq!(Scripts::in_output(output), expected, "what came before is no report");
        assert_eq!(Scripts::in_output("openhands-browser:yes\n"), None);
    }
}
