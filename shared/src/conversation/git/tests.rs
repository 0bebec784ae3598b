//! Tests of the git scripts: `sh` runs them on repositories that each test creates with git.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;
use crate::http_client::{AddressPolicy, HttpClient};

/// A workspace with the repository `repo`, whose first commit is on its remote.
struct Workspace {
    folder: PathBuf,
    root: PathBuf,
    agent_server: AgentServer,
    /// The shells that run the scripts.
    shells: &'static [&'static str],
}

impl Drop for Workspace {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.folder).expect("removed");
    }
}

/// Both sides of a diff, or the beginning of its error message.
type Sides<'a> = Result<(&'a str, &'a str), &'a str>;

impl Workspace {
    /// `first` is a script that creates the files of the first commit.
    fn new(first: &str) -> Self {
        let folder = std::env::temp_dir().join(crate::id::new_sandbox_id());
        let root = folder.join("work space's");
        fs::create_dir_all(root.join("repo")).expect("folders");
        fs::create_dir(folder.join("tmp")).expect("a folder");
        let agent_server = AgentServer::new(HttpClient::new(AddressPolicy::Any), "", None);
        let workspace = Self { folder, root, agent_server, shells: &["sh", "bash"] };
        workspace.sh(&format!(
            "cd repo; git init -q -b main; git commit -q --allow-empty -m Empty; {first}\ngit add -A; git commit -q --allow-empty -m First
            cd ..; git clone -q --bare repo ../remote.git; cd repo; git remote add origin ../../remote.git; git fetch -q
            git remote set-head origin main"
        ));
        workspace
    }

    fn command(&self, script: &str, shell: &str) -> Command {
        let mut command = Command::new(shell);
        command.arg("-c").arg(script).current_dir(&self.root);
        // Excludes the developer's git configuration, and the variables that git sets when a hook runs the tests.
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").expect("a path"))
            .env("HOME", &self.folder)
            .env("TMPDIR", self.folder.join("tmp"))
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("REMOTE", self.folder.join("remote.git"));
        for role in ["AUTHOR", "COMMITTER"] {
            command.env(format!("GIT_{role}_NAME"), "A").env(format!("GIT_{role}_EMAIL"), "a@example.org");
        }
        command
    }

    /// Runs a script of the test in the workspace.
    fn sh(&self, script: &str) {
        let ran = self.command(&format!("set -e\n{script}"), "bash").output().expect("run");
        assert!(ran.status.success(), "{script}: {ran:?}");
    }

    fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        self.write_at(path.as_bytes(), content);
    }

    fn write_at(&self, path: &[u8], content: impl AsRef<[u8]>) {
        let path = self.root.join(OsStr::from_bytes(path));
        fs::create_dir_all(path.parent().expect("a folder")).expect("folders");
        fs::write(path, content).expect("a file");
    }

    fn at(&self, path: &str) -> String {
        format!("{}/{path}", self.root.display())
    }

    /// Returns the result of a script, as [`WorkspaceGit::run`] receives it, from each available shell.
    fn result(&self, script: impl Fn(&WorkspaceGit<'_>) -> Result<String, Error>) -> Result<Vec<u8>, Error> {
        let root = self.root.display().to_string();
        let script = script(&WorkspaceGit { agent_server: &self.agent_server, root: &root })?;
        let run = |shell: &str| {
            // Each shell also runs the script itself, possibly on a loaded machine.
            let script = script.replace(&format!("seconds={SECONDS}\n"), "seconds=300\n");
            let script = script.replace("sh -c \"$body\"", &format!("{shell} -c \"$body\""));
            let ran = self.command(&script, shell).output().expect("run");
            assert!(ran.status.success(), "{shell}: {ran:?}");
            let stdout = String::from_utf8(ran.stdout).expect("text");
            let stderr = String::from_utf8_lossy(&ran.stderr).into_owned();
            assert_eq!(stderr, "", "{shell}");
            match stdout.split_once('\n').expect("lines") {
                ("inline", text) => {
                    assert!(text.len() < 45_000, "an agent server keeps it");
                    STANDARD.decode(text.replace('\n', "")).expect("base64")
                }
                (line, "") => {
                    let path = Path::new(line.strip_prefix("file ").expect("a file"));
                    let result = fs::read(path).expect("a result");
                    fs::remove_dir_all(path.parent().expect("a folder")).expect("removed");
                    result
                }
                other => panic!("{other:?}"),
            }
        };
        let result = run(self.shells[0]);
        for other in &self.shells[1..] {
            assert_eq!(run(other), result, "all shells");
        }
        let left = fs::read_dir(self.folder.join("tmp")).expect("a folder").count();
        assert_eq!(left, 0, "temporary files are removed");
        Ok(result)
    }

    fn changes(&self, folder: &str, reference: Option<&str>) -> Result<Changes, Error> {
        let result = self.result(|git| git.changes_script(&self.at(folder), reference))?;
        read_changes(&result, reference)
    }

    /// The changes as `A path`, `M path` or `D path`.
    fn list(&self, folder: &str) -> Vec<String> {
        let changes = self.changes(folder, None).expect("a list");
        assert!(!changes.is_truncated);
        let letter = |status| match status {
            Status::Added => 'A',
            Status::Updated => 'M',
            Status::Deleted => 'D',
        };
        changes.list.iter().map(|change| format!("{} {}", letter(change.status), change.path)).collect()
    }

    fn diff(&self, path: &str, reference: Option<&str>) -> Result<(String, String), Error> {
        let result = self.result(|git| git.diff_script(&self.at(path), reference))?;
        let diff = read_diff(&result, reference)?;
        Ok((diff.original.expect("an original"), diff.modified.expect("a text")))
    }

    fn assert_diff(&self, path: &str, expected: Sides<'_>) {
        self.assert_diff_to(path, None, expected);
    }

    fn assert_diff_to(&self, path: &str, reference: Option<&str>, expected: Sides<'_>) {
        match (self.diff(path, reference), expected) {
            (Ok((original, modified)), Ok(expected)) => {
                assert_eq!((original.as_str(), modified.as_str()), expected, "{path}");
            }
            (Err(error), Err(expected)) => assert!(error.to_string().starts_with(expected), "{path}: {error}"),
            (found, expected) => panic!("{path}: {found:?} instead of {expected:?}"),
        }
    }

    /// Checks that every path of the list has a diff, whose sides match its status.
    fn every_change_has_a_diff(&self, folder: &str, except: &[&str]) {
        for change in self.changes(folder, None).expect("a list").list {
            let path = format!("{folder}/{}", change.path);
            match (self.diff(&path, None), except.contains(&change.path.as_str())) {
                (Ok((original, modified)), false) => match change.status {
                    Status::Added => assert_eq!(original, "", "{path}"),
                    Status::Deleted => assert_eq!(modified, "", "{path}"),
                    Status::Updated => {}
                },
                (Err(error), true) => {
                    assert!(matches!(error, Error::Refused(_) | Error::TooLarge(_)), "{path}: {error:?}");
                }
                other => panic!("{path}: {other:?}"),
            }
        }
    }
}

/// Names that git, JSON or a shell represents in a special form.
const NAMES: [&str; 40] = [
    "plain.txt",
    "文.txt",
    "é nfc",
    "e\u{301} nfd",
    "😀",
    "with blank",
    " leading",
    "trailing ",
    "two  blanks",
    "tab\there",
    "line\nbreak",
    "ends in a line break\n",
    "return\r",
    "\u{1}\u{7f}\u{85}\u{2028}",
    "double \" quote",
    "\"quoted\"",
    "\"\\346\\226\\207\"",
    "single ' quote",
    "back\\slash",
    "\\346\\226\\207",
    "-x",
    "--help",
    "-",
    ":(glob)*",
    ":(exclude)plain.txt",
    ":!x",
    ":0:x",
    "*",
    "?",
    "[a-z]",
    "{a,b}",
    "$(id)",
    "`id`",
    "$HOME",
    "%41%00",
    "a+b&c=d#e;f",
    "a -> b",
    "~",
    "..x",
    ".gitx",
];

#[test]
fn every_name_that_is_listed_has_a_diff() {
    let mut workspace = Workspace::new("echo kept >kept");
    let at = |name: &str, folder: &str| format!("repo/{folder}/{name}");
    for name in NAMES {
        for folder in ["-updated \"in\" 文", "deleted"] {
            workspace.write(&at(name, folder), format!("first {name}\n"));
        }
    }
    // Names that git could interpret as pathspecs, revisions or options, at the top of the repository.
    let at_top = [":(glob)*", ":!x", ":0:x", "*", "-x", "[a-z]"];
    for name in at_top {
        workspace.write(&format!("repo/{name}"), "first\n");
    }
    workspace.write_at(b"repo/not utf-8 \xff\xe9\n", "first\n");
    workspace.write_at(b"repo/\xe9/\"", "first\n");
    workspace.sh("cd repo; git add -A; git commit -q -m Names; git push -q origin main");
    assert_eq!(workspace.list("repo"), Vec::<String>::new());
    for name in NAMES {
        workspace.write(&at(name, "-updated \"in\" 文"), format!("then {name}"));
        workspace.write(&at(name, "untracked"), "new\n");
    }
    workspace.write_at(b"repo/not utf-8 \xff\xe9\n", "then\n");
    workspace.write_at(b"repo/\xe9/\xe8\n", "new\n");
    for name in at_top {
        workspace.write(&format!("repo/{name}"), "then\n");
    }
    workspace.sh("cd repo; rm -r deleted; rm $'\\351/\"'");

    let mut expected: Vec<String> = NAMES
        .iter()
        .flat_map(|name| {
            [("A", "untracked"), ("D", "deleted"), ("M", "-updated \"in\" 文")]
                .map(|(status, folder)| format!("{status} {folder}/{name}"))
        })
        .collect();
    expected.extend([r#"M "not utf-8 \377\351\n""#, r#"A "\351/\350\n""#, r#"D "\351/\"""#].map(str::to_owned));
    expected.extend(at_top.map(|name| format!("M {name}")));
    expected.sort_by(|one, other| one[2..].cmp(&other[2..]));
    assert_eq!(workspace.list("repo"), expected);
    // The paths of a folder's list are relative to the folder.
    assert_eq!(workspace.list("repo/untracked").len(), NAMES.len());
    workspace.assert_diff("repo/untracked/", Err("The path is a folder"));

    // Git's quoted form, which agent servers and their clients displayed.
    let quoted =
        workspace.command("cd repo; git ls-files -- '-updated \"in\" 文'", "bash").output().expect("run").stdout;
    let quoted = String::from_utf8(quoted).expect("text");
    let mut names = NAMES.to_vec();
    names.sort_unstable();
    workspace.shells = &["sh"];
    for (name, quoted) in names.into_iter().zip(quoted.lines()) {
        let (first, then) = (format!("first {name}\n"), format!("then {name}"));
        workspace.assert_diff(&at(name, "-updated \"in\" 文"), Ok((&first, &then)));
        workspace.assert_diff(&format!("repo/{quoted}"), Ok((&first, &then)));
        workspace.assert_diff(&at(name, "deleted"), Ok((&first, "")));
        workspace.assert_diff(&at(name, "untracked"), Ok(("", "new\n")));
    }
    for name in at_top {
        workspace.assert_diff(&format!("repo/{name}"), Ok(("first\n", "then\n")));
    }
    workspace.shells = &["bash"];
    workspace.assert_diff(&at("line\nbreak", "untracked"), Ok(("", "new\n")));
    workspace.shells = &["sh", "bash"];
    workspace.assert_diff(r#"repo/"not utf-8 \377\351\n""#, Ok(("first\n", "then\n")));
    workspace.assert_diff(r#"repo/"\351/\350\n""#, Ok(("", "new\n")));
    workspace.assert_diff(r#"repo/"\351/\"""#, Ok(("first\n", "")));
}

#[test]
fn every_kind_of_change_has_a_diff() {
    let workspace = Workspace::new(
        r#"mkdir folder to-file to-link ignored
        echo -n 'no last line' >unchanged; printf 'one\r\ntwo\r\n' >crlf; printf '\357\273\277mark\n' >bom; echo x >emptied; touch empty filled
        printf '\n\n  edges  \n\n\n' >edges; printf 'caf\351\n' >latin-1; printf '\377\376a\0' >utf-16; printf 'a\0b' >binary
        echo a >folder/a; echo b >to-file/b; echo c >to-link/c; echo d >file-to-link; echo e >file-to-folder; echo f >renamed
        ln -s target link; ln -s gone link-to-file; ln -s / link-out; ln -s folder dangling; echo 'ignored/' >.gitignore; echo g >executable
        echo h >to-pipe; : >empty-to-pipe; echo i >forgotten; echo j >intended-away
        printf '*.win eol=crlf\n*.enc working-tree-encoding=UTF-16 eol=lf\n' >.gitattributes; echo k >lines.win; echo 'encodé' | iconv -f UTF-8 -t UTF-16 >text.enc; cp text.enc changed.enc; printf 'k\r\n' >changed.win
        for i in $(seq 100000); do echo "$i line"; done >large"#,
    );
    workspace.sh(
        r#"cd repo
        printf 'one\r\nthree\r\n' >crlf; printf 'no mark\n' >bom; echo full >empty; : >emptied; rm filled; printf '  edges' >edges
        printf 'caf\351s\n' >latin-1; printf '\377\376b\0' >utf-16; printf 'a\0c' >binary; rm -r folder; ln -sfn elsewhere link
        rm -r to-file; echo file >to-file; rm -r to-link; ln -s /etc to-link; ln -sfn nowhere file-to-link
        rm file-to-folder; mkdir file-to-folder; echo new >file-to-folder/new; git mv renamed 'renamed -> new'
        rm link-to-file; echo file >link-to-file; rm link-out; chmod +x executable; rm to-pipe empty-to-pipe; mkfifo to-pipe empty-to-pipe pipe
        git rm -q --cached forgotten; rm intended-away; echo intended >intended; git add -N intended
        echo ignored >ignored/file; mkdir untracked; echo new >untracked/new; ln -s /etc/passwd new-link; ln -s . loop
        sed 's/^1 line/first line/' large >edited; mv edited large; head -c 6000000 /dev/zero | tr '\0' x >too-large; head -c 3000000 /dev/zero | tr '\0' '"' >quotes
        touch unchanged lines.win text.enc; printf 'l\r\n' >changed.win; echo 'édité' | iconv -f UTF-8 -t UTF-16 >changed.enc; git init -q nested; echo inside >nested/file"#,
    );
    let expected = [
        "M binary",
        "M bom",
        "M changed.enc",
        "M changed.win",
        "M crlf",
        "M edges",
        "M emptied",
        "M empty",
        "M executable",
        "D file-to-folder",
        "A file-to-folder/new",
        "M file-to-link",
        "D filled",
        "D folder/a",
        "M forgotten",
        "A intended",
        "D intended-away",
        "M large",
        "M latin-1",
        "M link",
        "D link-out",
        "M link-to-file",
        "A loop",
        "A nested/file",
        "A new-link",
        "A quotes",
        "D renamed",
        "A renamed -> new",
        "A to-file",
        "D to-file/b",
        "A to-link",
        "D to-link/c",
        "M to-pipe",
        "A too-large",
        "A untracked/new",
        "M utf-16",
    ];
    assert_eq!(workspace.list("repo"), expected);
    workspace.every_change_has_a_diff("repo", &["binary", "to-pipe", "too-large", "quotes"]);
    for (path, expected) in [
        ("unchanged", Ok(("no last line", "no last line"))),
        ("crlf", Ok(("one\r\ntwo\r\n", "one\r\nthree\r\n"))),
        ("bom", Ok(("\u{feff}mark\n", "no mark\n"))),
        ("empty", Ok(("", "full\n"))),
        ("emptied", Ok(("x\n", ""))),
        ("filled", Ok(("", ""))),
        ("edges", Ok(("\n\n  edges  \n\n\n", "  edges"))),
        ("latin-1", Ok(("café\n", "cafés\n"))),
        ("utf-16", Ok(("a", "b"))),
        ("binary", Err("The file is binary (3 bytes before, 3 bytes now)")),
        ("folder/a", Ok(("a\n", ""))),
        ("folder", Err("The path is a folder")),
        ("file-to-folder", Ok(("e\n", ""))),
        ("file-to-folder/new", Ok(("", "new\n"))),
        ("file-to-link", Ok(("d\n", "nowhere"))),
        ("to-file", Ok(("", "file\n"))),
        ("to-file/b", Ok(("b\n", ""))),
        ("to-link", Ok(("", "/etc"))),
        ("to-link/c", Ok(("c\n", ""))),
        ("to-link/passwd", Err("The path must be absolute and inside the workspace")),
        ("loop/loop/bom", Ok(("\u{feff}mark\n", "no mark\n"))),
        ("link", Ok(("target", "elsewhere"))),
        ("link-to-file", Ok(("gone", "file\n"))),
        ("link-out", Ok(("/", ""))),
        ("dangling", Ok(("folder", "folder"))),
        ("dangling/none", Err("The file exists neither now nor")),
        ("new-link", Ok(("", "/etc/passwd"))),
        ("executable", Ok(("g\n", "g\n"))),
        ("to-pipe", Err("The path is neither a file nor a link")),
        // Git reports this file as unchanged.
        ("empty-to-pipe", Err("The path is neither a file nor a link")),
        ("pipe", Err("The path is neither a file nor a link")),
        ("forgotten", Ok(("i\n", "i\n"))),
        ("intended", Ok(("", "intended\n"))),
        ("renamed", Ok(("f\n", ""))),
        ("renamed -> new", Ok(("", "f\n"))),
        ("ignored/file", Ok(("", "ignored\n"))),
        ("lines.win", Ok(("k\n", "k\n"))),
        ("text.enc", Ok(("encodé\n", "encodé\n"))),
        ("changed.win", Ok(("k\r\n", "l\r\n"))),
        ("changed.enc", Ok(("encodé\n", "édité\n"))),
        ("untracked", Err("The path is a folder")),
        ("nested/file", Ok(("", "inside\n"))),
        ("gone", Err("The file exists neither now nor when the work began")),
        ("too-large", Err("The file is too large for a diff: 0 bytes before, 6000000 bytes now")),
        ("quotes", Err("The file is too large for a diff: 0 bytes before, 3000000 bytes now")),
        (".git/config", Err("Git's own files")),
        ("nested/.git/HEAD", Err("Git's own files")),
        ("../../outside", Err("The path must be absolute")),
        ("", Err("The path is a folder")),
    ] {
        workspace.assert_diff(&format!("repo/{path}"), expected);
    }
    let (original, modified) = workspace.diff("repo/large", None).expect("a diff");
    assert!(original.len() > 2 * INLINE && modified == original.replacen("1 line", "first line", 1));
}

#[test]
fn changes_are_those_since_the_work_began() {
    let commit = "git add -A; git commit -q -m More";
    // Commits of other users on the remote, fetched or not.
    let others = |branch: &str| {
        format!(
            "git clone -q ../../remote.git ../../other; (cd ../../other; git checkout -q -B {branch}; echo o >theirs; {commit}; git push -q origin {branch})"
        )
    };
    // Records the base as a start does. The branch `release` is ahead of the remote's default branch.
    let begin = "echo \"$(git rev-parse HEAD) $(git symbolic-ref -q HEAD || echo HEAD)\" >>\"$(git rev-parse --git-common-dir)/openhands-base\"";
    let release = format!("git checkout -q -b release; echo r >r; {commit}; git push -q -u origin release");
    for (what, script, expected) in [
        ("nothing was done", String::new(), &[][..]),
        ("a start on a branch that is ahead", format!("{release}; {begin}"), &[]),
        ("that, dirty", format!("{release}; {begin}; echo b >a"), &["M a"]),
        ("that, committed", format!("{release}; {begin}; echo b >a; {commit}"), &["M a"]),
        ("that, pushed and clean", format!("{release}; {begin}; echo b >a; {commit}; git push -q"), &["M a"]),
        ("that, pushed and dirty", format!("{release}; {begin}; echo b >a; {commit}; git push -q; echo c >c"), &["M a", "A c"]),
        ("that, in a shallow clone", format!("{release}; cd ..; rm -rf repo; git clone -q --depth 1 -b release --no-single-branch \"file://$REMOTE\" repo; cd repo; {begin}; echo b >a; {commit}"), &["M a"]),
        ("that, on a branch that was made for the work", format!("{release}; git checkout -q -b openhands-workspace-1; {begin}; echo b >a; {commit}"), &["M a"]),
        ("that, detached", format!("{release}; git checkout -q --detach; {begin}; echo b >a; {commit}"), &["M a"]),
        ("that, in a worktree", format!("{release}; git worktree add -q ../tree -b work; cd ../tree; {begin}; echo b >a; cd ../repo; git worktree move ../tree tree; cd ..; mv repo main-repo; printf 'gitdir: %s\n' \"$PWD/main-repo/.git/worktrees/tree\" >main-repo/tree/.git; mv main-repo/tree repo"), &["M a"]),
        ("that, and the agent made a branch", format!("{release}; {begin}; git checkout -q -b fix; echo b >a; {commit}"), &["M a"]),
        ("that, and pushed it", format!("{release}; {begin}; git checkout -q -b fix; echo b >a; {commit}; git push -q origin fix"), &["M a"]),
        ("that, and detached", format!("{release}; {begin}; echo b >a; {commit}; git checkout -q --detach"), &["M a"]),
        ("the agent's branch left the default one later than the start", format!("{begin}; {}; git fetch -q; git checkout -q -b work origin/main; echo b >a", others("main")), &["M a"]),
        ("a later start", format!("{release}; {begin}; echo b >a; {commit}; {begin}; echo c >c"), &["A c"]),
        ("a later start whose commit was taken back", format!("{release}; {begin}; echo b >a; {commit}; {begin}; git reset -q --hard HEAD~1; echo c >c"), &["A c"]),
        ("the only start's commit was taken back", format!("{release}; echo b >a; {commit}; {begin}; git reset -q --hard origin/release; echo c >c"), &["A c", "A r"]),
        ("a later start on another branch", format!("{release}; {begin}; echo b >a; {commit}; git checkout -q -b other; {begin}; git checkout -q release; echo c >c; {commit}"), &["M a", "A c"]),
        ("a start after commits without one", format!("git checkout -q -b work; echo b >a; {commit}; {begin}; echo c >c"), &["A c"]),
        ("a start without a remote", format!("git remote remove origin; echo b >a; {commit}; {begin}; echo c >c; {commit}"), &["A c"]),
        ("a start with a line without its end", format!("{release}; {begin}; printf %s \"$(cat .git/openhands-base)\" >.git/openhands-base; echo b >a"), &["M a"]),
        ("a start after and before junk", format!("{release}; head -c 100000 /dev/urandom >.git/openhands-base; echo >>.git/openhands-base; {begin}; printf '\\0\\n\\n \\n%040d refs/heads/release\\n' 0 >>.git/openhands-base; git rev-parse main >>.git/openhands-base; git rev-parse HEAD: >>.git/openhands-base; echo '$(touch ../ran) refs/heads/release' >>.git/openhands-base; echo '-- refs/heads/release' >>.git/openhands-base; echo \"main refs/heads/release\" >>.git/openhands-base; echo \"$(git rev-parse --short main) refs/heads/release\" >>.git/openhands-base; echo b >a"), &["M a"]),
        ("junk alone", format!("{release}; git push -q origin :release; git rev-parse main HEAD HEAD: >.git/openhands-base; yes \"$(git rev-parse main:) refs/heads/release\" | head -n 1000 >>.git/openhands-base; echo b >a"), &["M a", "A r"]),
        ("lines without a branch", format!("{release}; git push -q origin :release; git rev-parse HEAD HEAD >.git/openhands-base; echo b >a"), &["M a", "A r"]),
        ("a folder in place of starts", format!("{release}; git push -q origin :release; mkdir .git/openhands-base; echo b >a"), &["M a", "A r"]),
        ("a pipe in place of starts", format!("{release}; git push -q origin :release; mkfifo .git/openhands-base; echo b >a"), &["M a", "A r"]),
        ("a start on a branch without a commit", format!("{begin} 2>/dev/null; git checkout -q --orphan alone; {begin} 2>/dev/null; echo b >a"), &["A a", "A unchanged"]),
        ("on the remote's branch, dirty", "echo b >a; echo new >new".to_owned(), &["M a", "A new"]),
        ("committed", format!("echo b >a; {commit}; echo new >new"), &["M a", "A new"]),
        ("pushed and clean, a new file beside it", format!("git checkout -q -b work; echo b >a; {commit}; git push -q origin work; echo new >new"), &["M a", "A new"]),
        ("pushed and dirty", format!("git checkout -q -b work; echo b >a; {commit}; git push -q origin work; echo c >c; git add c"), &["A c"]),
        ("on a branch of its own", "git checkout -q -b openhands-workspace-1; echo b >a".to_owned(), &["M a"]),
        ("the remote's branch has moved on", format!("git checkout -q -b work; echo b >a; {commit}; {}; git fetch -q", others("main")), &["M a"]),
        ("the branch's counterpart has moved on", format!("{}; git fetch -q", others("main")), &["D theirs"]),
        ("detached", format!("git checkout -q --detach; echo b >a; {commit}"), &["M a"]),
        ("the remote has no HEAD here", format!("git remote set-head origin --delete; git checkout -q -b work; echo b >a; {commit}"), &["M a"]),
        ("the remote's HEAD names nothing", format!("git symbolic-ref refs/remotes/origin/HEAD refs/remotes/origin/gone; git checkout -q -b work; echo b >a; {commit}"), &["M a"]),
        ("the remote has one branch, of another name", format!("git branch -q -m develop; git push -q origin develop; git remote set-head origin --delete; git update-ref -d refs/remotes/origin/main; git checkout -q -b work; echo b >a; {commit}"), &["M a"]),
        ("shallow, with another branch", format!("echo b >a; {commit}; git push -q origin HEAD:feature; cd ..; rm -rf repo; git clone -q --depth 1 --no-single-branch \"file://$REMOTE\" repo; cd repo; git checkout -q -b work origin/feature; echo c >c"), &["M a", "A c"]),
        ("a branch and a tag have one name", format!("git tag main; git tag origin/main; git checkout -q -b HEAD 2>/dev/null || git checkout -q -b other; echo b >a; {commit}"), &["M a"]),
        ("the remote is not there", format!("git remote set-url origin https://127.0.0.1:9/private.git; git checkout -q -b work; echo b >a; {commit}"), &["M a"]),
        ("no remote, on main", format!("git remote remove origin; echo b >a; {commit}; echo c >c"), &["A c"]),
        ("no remote, on another branch", format!("git remote remove origin; git checkout -q -b work; echo b >a; {commit}; echo c >c"), &["M a", "A c"]),
        ("no remote, main has moved on", format!("git remote remove origin; git checkout -q -b work; echo b >a; {commit}; git checkout -q main; echo m >m; {commit}; git checkout -q work; echo c >c"), &["A c"]),
        ("no commit", "rm -rf .git; git init -q; git add a; echo c >c".to_owned(), &["A a", "A c", "A unchanged"]),
        ("an orphan", "git checkout -q --orphan alone; echo b >a".to_owned(), &["A a", "A unchanged"]),
        ("a conflict", format!("git checkout -q -b work; echo b >a; {commit}; git checkout -q main; echo c >a; {commit}; git merge -q work >/dev/null || true"), &["M a"]),
        ("a conflict with a deletion", format!("git checkout -q -b work; git rm -q a; {commit}; git checkout -q main; echo c >a; {commit}; git merge -q work >/dev/null || true; rm a"), &["D a"]),
        ("a sparse checkout", "mkdir in out; echo i >in/i; echo o >out/o; git add -A; git commit -q -m More; git push -q origin main; git sparse-checkout set in; echo more >in/i".to_owned(), &["M in/i"]),
        ("a lock of another git", "touch .git/index.lock; echo b >a; touch -t 200101010000 unchanged".to_owned(), &["M a"]),
        ("configuration", "git config core.quotePath true; git config diff.external false; git config diff.noprefix true; git config color.ui always; git config diff.renames copies; git config core.fsmonitor 'touch ../ran; false'; git config diff.relative true; git config diff.autoRefreshIndex false; git config status.showUntrackedFiles no; git config core.pager false; echo b >a; cp a é; touch -t 200101010000 unchanged".to_owned(), &["M a", "A é"]),
        ("a worktree", "git worktree add -q ../tree -b work; cd ../tree; echo b >a; cd ..; rm -rf repo.git; mv repo main-repo; sed 's|/repo/.git/|/main-repo/.git/|' tree/.git >moved; mv moved tree/.git; mv tree repo".to_owned(), &["M a"]),
    ] {
        let workspace = Workspace::new("echo a >a; echo u >unchanged");
        workspace.sh(&format!("cd repo; {script}"));
        assert_eq!(workspace.list("repo"), expected, "{what}");
        workspace.every_change_has_a_diff("repo", &[]);
        workspace.assert_diff("repo/none", Err("The file exists neither now nor when the work began"));
        assert!(!workspace.root.join("ran").exists(), "{what}: a program of the configuration was run");
        if what == "a sparse checkout" {
            workspace.assert_diff("repo/out/o", Ok(("o\n", "o\n")));
        }
    }
}

#[test]
fn programs_and_settings_that_fail_are_left_out() {
    let with_filter = |settings: &str| {
        format!(
            "git config filter.x.required true; {settings}; echo v2 >b.bin; touch -t 200101010000 c.bin; cp a.bin new.bin"
        )
    };
    for (what, script, listed, original) in [
        ("a process that is missing", with_filter("git config filter.x.process 'no-such-program %f'"), "M b.bin", "b\n"),
        ("a program that is missing", with_filter("git config filter.x.clean no-such-program"), "M b.bin", "b\n"),
        ("a program that fails", with_filter("git config filter.x.clean 'cat; false'; git config filter.x.smudge false"), "M b.bin", "b\n"),
        ("a process that ends", with_filter("git config filter.x.process true"), "M b.bin", "b\n"),
        ("a filter without a program", with_filter("git config filter.x.smudge cat"), "M b.bin", "b\n"),
        ("another one beside it", with_filter("git config filter.'y = \"é\" z'.process no-such-program; git config filter.x.clean false"), "M b.bin", "b\n"),
        ("an order that is missing", "git config diff.orderFile /none/order; echo v2 >b.bin; touch new.bin".to_owned(), "M b.bin", "b\n"),
        ("no such algorithm", "git config diff.algorithm none; echo v2 >b.bin; touch new.bin".to_owned(), "M b.bin", "b\n"),
        ("no such kind of submodule", "git config diff.ignoreSubmodules sometimes; git config diff.colorMoved what; echo v2 >b.bin; touch new.bin".to_owned(), "M b.bin", "b\n"),
    ] {
        let workspace =
            Workspace::new("echo '*.bin filter=x' >.gitattributes; for i in a b c; do echo $i >$i.bin; done; echo u >unchanged");
        workspace.sh(&format!("cd repo; {script}"));
        assert_eq!(workspace.list("repo"), [listed, "A new.bin"], "{what}");
        workspace.assert_diff("repo/b.bin", Ok((original, "v2\n")));
        workspace.every_change_has_a_diff("repo", &[]);
        // The base, too: a branch that is pushed and clean is compared with its fork point from the default branch.
        workspace.sh(
            "cd repo; git symbolic-ref HEAD refs/heads/work; mv .git/config .git/kept; cp \"$REMOTE/config\" .git/config; git config core.bare false
            git config remote.origin.url \"$REMOTE\"; git config remote.origin.fetch '+refs/heads/*:refs/remotes/origin/*'
            git add -A; git commit -qm More; git push -q origin work; mv .git/kept .git/config; touch -t 200101010000 c.bin",
        );
        let expected: &[&str] = &[listed, "A new.bin"];
        // Git's plumbing reports a file as changed if its modification time has changed.
        if what.starts_with("no such") {
            assert_eq!(workspace.list("repo"), ["M c.bin"], "{what}");
        } else {
            assert_eq!(workspace.list("repo"), expected, "{what}");
        }
    }
    // A filter program that works is used, because only git can determine what has changed.
    let workspace = Workspace::new(
        "echo '*.up filter=x' >.gitattributes; git config filter.x.clean 'tr a-z A-Z'; echo text >a.up; echo text >b.up",
    );
    workspace.sh("cd repo; touch -t 200101010000 a.up; echo more >b.up");
    assert_eq!(workspace.list("repo"), ["M b.up"]);
    workspace.assert_diff("repo/a.up", Ok(("text\n", "text\n")));
    workspace.assert_diff("repo/b.up", Ok(("TEXT\n", "more\n")));
}

#[test]
fn a_repository_that_git_cannot_read_does_not_hide_the_others() {
    for (what, broken) in [
        ("an index of junk", "echo junk >.git/index"),
        (
            "an index of junk, detached",
            "git add -A; git commit -qm F; git checkout -q --detach; echo junk >.git/index; touch f",
        ),
        ("configuration of junk", "echo '[core' >.git/config"),
        ("another format", "git config core.repositoryFormatVersion 99"),
        ("a repository that was moved away", "mv .git ../moved.git; echo 'gitdir: ../gone' >.git; rm -rf ../moved.git"),
    ] {
        let workspace = Workspace::new("echo a >a");
        workspace.sh(&format!("echo b >repo/a; git init -q bad; cd bad; echo f >f; {broken}"));
        let changes = workspace.changes("", None).unwrap_or_else(|error| panic!("{what}: {error}"));
        let change = |status, path: &str| Change { status, path: path.to_owned() };
        assert_eq!(changes.list, [change(Status::Updated, "repo/a")], "{what}");
        assert!(changes.is_truncated, "{what}: the list says that it is not whole");
        // Without a fallback, or where the path was requested directly, git's error is returned.
        let error = workspace.changes("bad", None).expect_err(what).to_string();
        assert!(error.starts_with("Git cannot list the changes: "), "{what}: {error}");
        workspace.sh("rm -rf repo");
        let error = workspace.changes("", None).expect_err(what).to_string();
        assert!(error.starts_with("Git cannot list the changes: "), "{what}: {error}");
        // Inside another repository it is a folder, or an entry of that repository.
        workspace.sh("git init -q; echo t >top");
        let changes = workspace.changes("", None).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(changes.list.contains(&change(Status::Added, "top")), "{what}: {changes:?}");
        assert!(changes.list.iter().any(|change| change.path.starts_with("bad")), "{what}: {changes:?}");
    }
}

#[test]
fn files_beside_what_only_looks_like_a_repository_have_a_diff() {
    let workspace = Workspace::new("mkdir t; echo t >t/x; echo a >a");
    workspace.sh(
        "cd repo; mkdir -p n/deep/er m t/.git-not; echo 'gitdir: gone' >n/.git; echo x >n/x; echo y >n/deep/er/y; ln -s x n/link
        echo 'gitdir: gone' >t/.git; echo changed >t/x; echo junk >m/.git; echo 'z' >m/'z \"'; mkdir -p n/deep/q; echo 'gitdir: ../gone' >n/deep/q/.git; echo w >n/deep/q/w",
    );
    let expected = ["A m/z \"", "A n/deep/er/y", "A n/deep/q/w", "A n/link", "A n/x", "M t/x"];
    assert_eq!(workspace.list("repo"), expected);
    workspace.every_change_has_a_diff("repo", &[]);
    for (path, expected) in [
        ("n/x", Ok(("", "x\n"))),
        ("n/link", Ok(("", "x"))),
        ("n/deep/er/y", Ok(("", "y\n"))),
        ("n/deep/q/w", Ok(("", "w\n"))),
        ("t/x", Ok(("t\n", "changed\n"))),
        ("n/none", Err("The file exists neither now nor")),
        ("n/deep", Err("The path is a folder")),
    ] {
        workspace.assert_diff(&format!("repo/{path}"), expected);
    }
    // Without a repository above it, git's error is returned.
    workspace.sh("mkdir broken; echo 'gitdir: gone' >broken/.git; echo x >broken/x");
    workspace.assert_diff("broken/x", Err("Git cannot compare this file: fatal: "));
}

#[test]
fn what_takes_too_long_is_stopped_with_all_that_it_started() {
    let is_in = |workspace: &Workspace| {
        let processes = fs::read_dir("/proc").expect("processes").filter_map(Result::ok);
        let places = processes.filter_map(|process| fs::read_link(process.path().join("cwd")).ok());
        places.filter(|place| place.starts_with(&workspace.folder)).count()
    };
    for (what, script) in [
        ("a filter", "git config filter.x.clean 'sleep 300; cat'"),
        ("a filter with children", "git config filter.x.clean 'sh -c \"sleep 300 | cat\" | cat; true'"),
        ("a filter that is a process", "git config filter.x.process 'sleep 300'"),
        ("a filter that ignores signals", "git config filter.x.clean 'trap \"\" TERM; sleep 300; cat'"),
    ] {
        let workspace = Workspace::new("echo '*.bin filter=x' >.gitattributes; echo a >a.bin");
        workspace.sh(&format!("cd repo; {script}; echo b >a.bin"));
        for shell in ["sh", "bash"] {
            let root = workspace.root.display().to_string();
            let git = WorkspaceGit { agent_server: &workspace.agent_server, root: &root };
            for script in
                [git.changes_script(&workspace.at("repo"), None), git.diff_script(&workspace.at("repo/a.bin"), None)]
            {
                let script = script.expect("a script").replace(&format!("seconds={SECONDS}\n"), "seconds=1\n");
                let script = script.replace("sh -c \"$body\"", &format!("{shell} -c \"$body\""));
                let begun = std::time::Instant::now();
                let ran = workspace.command(&script, shell).output().expect("run");
                assert!(matches!(ran.status.code(), Some(124 | 137)), "{what}: {ran:?}");
                assert!(begun.elapsed() < Duration::from_secs(30), "{what}: the limit is 1 s");
                let started = std::time::Instant::now();
                while is_in(&workspace) > 0 {
                    assert!(started.elapsed() < Duration::from_secs(10), "{what}: a process is left");
                    std::thread::sleep(Duration::from_millis(50));
                }
            }
        }
        assert_eq!(fs::read_dir(workspace.folder.join("tmp")).expect("a folder").count(), 0, "{what}");
    }
}

#[test]
fn without_a_timeout_program_there_are_lists_and_diffs() {
    let workspace = Workspace::new("echo a >a");
    workspace.sh("cd repo; echo \"it's\" >a");
    for timeout in ["timeout() { return 127; }", "timeout() { echo 'Usage: timeout [-t SECS]'; return 1; } >&2"] {
        let with = |script: Result<String, Error>| Ok(format!("{timeout}\n{}", script?));
        let result = workspace.result(|git| with(git.changes_script(&workspace.at("repo"), None))).expect("a result");
        assert_eq!(read_changes(&result, None).expect("a list").list.len(), 1);
        let result = workspace.result(|git| with(git.diff_script(&workspace.at("repo/a"), None))).expect("a result");
        let diff = Diff { modified: Some("it's\n".to_owned()), original: Some("a\n".to_owned()) };
        assert_eq!(read_diff(&result, None).expect("a diff"), diff);
    }
}

#[test]
fn a_folder_has_the_base_of_its_repository() {
    let workspace = Workspace::new("echo a >a; mkdir sub; echo b >sub/b");
    workspace
        .sh("cd repo; git config diff.relative true; git checkout -q -b work; echo c >sub/b; git commit -qam Pushed
        git push -q origin work; echo c >a");
    assert_eq!(workspace.list("repo"), ["M a"]);
    assert_eq!(workspace.list("repo/sub"), Vec::<String>::new());
    workspace.assert_diff("repo/sub/b", Ok(("c\n", "c\n")));
    workspace.sh("cd repo; git commit -qam More; git push -q origin work");
    assert_eq!(workspace.list("repo/sub"), ["M b"]);
    workspace.assert_diff("repo/sub/b", Ok(("b\n", "c\n")));
}

#[test]
fn a_reference_is_a_commit_or_refused() {
    let workspace = Workspace::new("echo a >a");
    workspace.sh("cd repo; echo b >a; git commit -qam Second; git tag v1; git branch 文; echo c >a; rm -f none; git init -q ../empty; echo e >../empty/e");
    for (reference, expected) in [
        (Some("HEAD"), Ok(("b\n", "c\n"))),
        (Some("v1"), Ok(("b\n", "c\n"))),
        (Some("文"), Ok(("b\n", "c\n"))),
        (Some("HEAD~1"), Ok(("a\n", "c\n"))),
        (Some("origin/main"), Ok(("a\n", "c\n"))),
        (None, Ok(("a\n", "c\n"))),
        (Some("gone"), Err("The ref \"gone\" is not a commit of this repository")),
        (Some("--output=x"), Err("The ref \"--output=x\" is not a commit")),
        (Some("-"), Err("The ref \"-\" is not a commit")),
        (Some("^HEAD"), Err("The ref \"^HEAD\" is not a commit")),
        (Some("HEAD~1..HEAD"), Err("The ref \"HEAD~1..HEAD\" is not a commit")),
        (Some("HEAD:a"), Err("The ref \"HEAD:a\" is not a commit")),
        (Some("'; touch ../ran; '"), Err("The ref ")),
        (Some("$(touch ../ran)"), Err("The ref ")),
        (Some("line\nbreak"), Err("The ref ")),
        (Some("nul\0"), Err("The ref ")),
    ] {
        workspace.assert_diff_to("repo/a", reference, expected);
        let changes = workspace.changes("repo", reference);
        match (changes, expected) {
            (Ok(changes), Ok(_)) => assert_eq!(changes.list.len(), 1, "{reference:?}"),
            (Err(Error::Refused(text)), Err(expected)) => assert!(text.starts_with(expected), "{reference:?}: {text}"),
            (changes, _) => panic!("{reference:?}: {changes:?}"),
        }
    }
    assert!(matches!(workspace.changes("repo", Some(&"x".repeat(200_000))), Err(Error::Refused(_))));
    assert!(!workspace.root.join("ran").exists());
    workspace.assert_diff_to("repo/none", Some("HEAD"), Err("The file exists neither now nor at HEAD"));
    // HEAD is also a valid reference without any commit, and each repository of a folder has its own HEAD.
    workspace.assert_diff_to("empty/e", Some("HEAD"), Ok(("", "e\n")));
    workspace.assert_diff_to("empty/e", Some("v1"), Err("The ref \"v1\""));
    let paths = |reference: &str| {
        workspace
            .changes("", Some(reference))
            .map(|changes| changes.list.into_iter().map(|change| change.path).collect::<Vec<_>>())
    };
    assert_eq!(paths("HEAD").expect("a list"), ["empty/e", "repo/a"]);
    assert_eq!(paths("v1").expect("a list"), ["repo/a"]);
    assert!(matches!(paths("gone"), Err(Error::Refused(_))));
}

#[test]
fn repositories_in_a_folder_are_listed_with_it() {
    let workspace = Workspace::new("echo a >a; mkdir sub; echo b >sub/b");
    workspace.sh("cd repo; echo b >a; echo c >sub/b; echo n >sub/n; cd ..
        git clone -q ../remote.git other; echo o >other/o; mkdir plain; echo p >plain/p; ln -s repo link; ln -s / out
        mkdir -p deep/er; git clone -q ../remote.git deep/er/repo; git init -q -- '-x y'; echo x >'-x y/\"'
        mkdir empty-git; mkdir empty-git/.git; git init -q .hidden; touch .hidden/h");
    let all = ["A -x y/\"", "A other/o", "M repo/a", "M repo/sub/b", "A repo/sub/n"];
    for folder in ["", ".", "./", "//"] {
        assert_eq!(workspace.list(folder), all, "{folder}");
    }
    workspace.every_change_has_a_diff(".", &[]);
    assert_eq!(workspace.list("repo/sub"), ["M b", "A n"]);
    assert_eq!(workspace.list("link/./sub/"), ["M b", "A n"]);
    for nowhere in ["plain", "deep", "repo/.git"] {
        assert_eq!(workspace.list(nowhere), Vec::<String>::new(), "{nowhere}");
    }
    let refused = |folder: &str| workspace.changes(folder, None).expect_err("a refusal");
    assert!(matches!(refused("none"), Error::NotFound(_)));
    assert!(matches!(refused("repo/a"), Error::Refused(_)));
    for outside in ["out", "out/etc", "..", "../other"] {
        assert!(
            refused(outside).to_string().starts_with("The path must be absolute and inside the workspace"),
            "{outside}"
        );
    }
    // A file outside every repository has no sides.
    let result = workspace.result(|git| git.diff_script(&workspace.at("plain/p"), None)).expect("a result");
    assert_eq!(read_diff(&result, None).expect("a diff"), Diff::default());
    workspace.assert_diff("plain/none", Err("The file exists neither now nor"));
    workspace.assert_diff("link/a", Ok(("a\n", "b\n")));
    workspace.assert_diff("link/sub/b", Ok(("b\n", "c\n")));
    workspace.assert_diff("out/etc/passwd", Err("The path must be absolute and inside the workspace"));

    // The workspace itself becomes a repository: files of the nested repositories stay in those.
    workspace.sh("rm -r empty-git; git init -q; echo t >top; cd deep/er/repo; echo d >d");
    let mut with_top: Vec<&str> =
        all.into_iter().chain(["A deep/er/repo", "A link", "A out", "A plain/p", "A top"]).collect();
    with_top.push("A .hidden");
    with_top.sort_by_key(|line| &line[2..]);
    assert_eq!(workspace.list(""), with_top);
    workspace.every_change_has_a_diff(".", &[]);
    let (original, modified) = workspace.diff("deep/er/repo", None).expect("a diff");
    assert!(original.is_empty() && modified.starts_with("Subproject commit "), "{modified}");

    // There is no repository above the workspace.
    let workspace = Workspace::new("");
    workspace.sh("git init -q ..; mv repo ../repo; mkdir plain; echo p >plain/p");
    assert_eq!(workspace.list("plain"), Vec::<String>::new());
}

#[test]
fn submodules_are_commits_and_have_changes_of_their_own() {
    let workspace = Workspace::new("echo a >a");
    workspace.sh("allow='-c protocol.file.allow=always'; git clone -q ../remote.git library; cd repo
        git $allow submodule --quiet add \"$REMOTE\" one; git $allow submodule --quiet add \"$REMOTE\" two
        git $allow submodule --quiet add \"$REMOTE\" gone; git commit -qm Submodules; git push -q origin main
        cd one; echo more >a; git commit -qam More; cd ../two; echo b >b; echo c >a; cd ..; git rm -q gone
        git $allow submodule --quiet add \"$REMOTE\" three");
    assert_eq!(
        workspace.list("repo"),
        ["M .gitmodules", "D gone", "M one", "M one/a", "A three", "M two/a", "A two/b"]
    );
    workspace.every_change_has_a_diff("repo", &[]);
    let (original, modified) = workspace.diff("repo/one", None).expect("a diff");
    assert!(
        original.starts_with("Subproject commit ")
            && modified.starts_with("Subproject commit ")
            && original != modified
    );
    workspace.sh(
        "cd repo; git commit -qam All; git push -q origin main; cd ..; rm -rf repo; git clone -q ../remote.git repo",
    );
    assert_eq!(workspace.list("repo"), Vec::<String>::new());
    let (original, modified) = workspace.diff("repo/one", None).expect("a diff of a submodule that is not fetched");
    assert_eq!(original, modified);
}

#[test]
fn nothing_is_asked_of_the_network() {
    let workspace = Workspace::new("for i in a b c; do echo $i >$i; done");
    workspace.sh(
        "git -C ../remote.git config uploadpack.allowFilter true; rm -rf repo; git clone -q --filter=blob:none --no-checkout \"file://$REMOTE\" repo
        cd repo; git sparse-checkout set --no-cone /a; git checkout -q main; rm a; git update-index --no-skip-worktree b",
    );
    assert_eq!(workspace.list("repo"), ["D a", "D b"]);
    workspace.assert_diff("repo/a", Ok(("a\n", "")));
    let error = workspace.diff("repo/b", None).expect_err("its text is on the remote alone").to_string();
    assert!(error.starts_with("Git cannot compare this file: "), "{error}");
}

#[test]
fn a_list_that_is_too_long_is_cut_and_says_so() {
    let name = |number: usize| format!("{number:06}{}", "\"".repeat(200));
    let all = |count: usize| -> Vec<u8> {
        let names: Vec<String> = (0..count).map(|number| name(number) + "\0").collect();
        format!("repository\0\0changed\0M\0z\0\0untracked\0{}\0end\0", names.concat()).into_bytes()
    };
    let changes = read_changes(&all(10), None).expect("a list");
    assert_eq!((changes.list.len(), changes.is_truncated), (11, false));
    let changes = read_changes(&all(10_000), None).expect("a list");
    let size = size_of(&changes.list).expect("a size");
    assert!(changes.is_truncated && size <= PAGE_SIZE && size > PAGE_SIZE - 100_000, "{size}");
    // Truncated in the sandbox, inside a name or a status, and by the limit of nested repositories.
    for (result, count) in [
        (&b"repository\0\0changed\0\0untracked\0whole\0cut"[..], 1),
        (b"repository\0\0changed\0M", 0),
        (b"repository\0\0changed\0M\0whole\0\0untracked\0\0more\0end\0", 1),
        (b"", 0),
    ] {
        let changes = read_changes(result, None).expect("a list");
        assert_eq!((changes.list.len(), changes.is_truncated), (count, true), "{result:?}");
    }
    let workspace = Workspace::new("");
    workspace.sh(&format!("for i in $(seq {}); do git init -q n$i; touch n$i/f; done", NESTED + 1));
    assert!(workspace.changes("", None).expect("a list").is_truncated);
}

#[test]
fn where_git_is_missing_there_are_no_changes() {
    let mut workspace = Workspace::new("echo a >a");
    workspace.sh("mkdir ../bin; for tool in cat find mktemp rm wc head base64 readlink tr cmp; do ln -s $(command -v $tool) ../bin/$tool; done");
    workspace.shells = &["/bin/sh", "/bin/bash"];
    let bin = workspace.folder.join("bin").display().to_string();
    let without = |script: Result<String, Error>| Ok(format!("PATH={}\n{}", quoted(&bin), script?));
    let result = workspace.result(|git| without(git.changes_script(&workspace.at("repo"), None))).expect("a result");
    assert_eq!(read_changes(&result, None).expect("a list"), Changes::default());
    let result = workspace.result(|git| without(git.diff_script(&workspace.at("repo/a"), None))).expect("a result");
    assert_eq!(read_diff(&result, None).expect("a diff"), Diff::default());
    // The script also works without base64.
    fs::remove_file(workspace.folder.join("bin/base64")).expect("removed");
    let result = workspace.result(|git| without(git.diff_script(&workspace.at("repo/a"), None))).expect("a result");
    assert_eq!(read_diff(&result, None).expect("a diff"), Diff::default());
}

#[test]
fn reasons_of_gits_are_short_and_without_credentials() {
    let long = format!("fatal: https://user:pass-word-1@host/x\n\n  {}", "x".repeat(10_000));
    let Error::Conflict(text) = failed("Git cannot", long.as_bytes()) else { panic!("a conflict") };
    assert!(text.len() < 600 && text.starts_with("Git cannot: fatal: ") && !text.contains("pass-word-1"), "{text}");
}
