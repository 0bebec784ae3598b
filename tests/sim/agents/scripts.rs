//! Recognises the commands that starts send, by the scripts in them. The model does not run them: it reproduces their effects. A command
//! that it does not know, or whose script has changed in a line on which the model depends, is a panic, so that the model is changed with
//! the product.

use std::time::Duration;

use uuid::Uuid;

/// Text that each script of a command must contain, because the model reproduces it.
const COPY_LINES: [&str; 8] = [
    "trap 'if [ -f \"$d/exit\" ]; then eval \"$finally\"; fi' EXIT\n",
    "(lead sh -c \"$functions\n$supervisor\" sh \"$d\" \"$n\" \"$limit\" \"$mask\" \"$script\" \"$finally\" \"$task\" \"$token\" $$)",
    "  if [ \"$n\" -gt \"$max_runs\" ]; then\n    echo \"137 $max_runs\" >\"$d/exit.$$\"",
    "  elif mkdir \"$r\" 2>/dev/null; then\n    run\n",
    "[ -f \"$d/exit\" ] || n=$((n + 1))\n",
    "tail -c \"$output_limit\" \"$d/run.$n/out\"\ntail -c \"$output_limit\" \"$d/run.$n/err\" >&2\n",
    "if [ \"$code\" = timeout ]; then\n  printf '\\n%s\\n' \"$timed_out\"\n  exit 124\nfi\n",
    "exit \"$code\"\n",
];
const SUPERVISOR_LINES: [&str; 6] = [
    "while [ \"$left\" -gt 0 ] && is_alive",
    "  stop \"$leader\"\n  code=timeout\n",
    "echo \"$code $n\" >\"$d/exit.new\" && mv \"$d/exit.new\" \"$d/exit\"\neval \"$finally\"\n",
    "if [ -z \"$token\" ] || [ -z \"$url\" ] || [ $(($(date +%s) - began)) -lt 2 ]; then return 0; fi",
    "  url=${url%/}/commands/$task\n",
    "curl -s -m 5 -o /dev/null -X POST -H \"X-Access-Token: $token\" \"$url\"",
];

/// A command of a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Script {
    /// Creates a folder.
    MakeFolder,
    /// A copy of an idempotent command.
    Once(Box<Once>),
    /// The probe of MCP servers, which waits for its file.
    Probe { file: String, wait: Duration },
}

/// A copy of an idempotent command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Once {
    /// The folder with its state.
    pub(super) folder: String,
    /// The start, whose id is the name of the folder's parent.
    pub(super) start: Uuid,
    pub(super) name: String,
    pub(super) limit: Duration,
    pub(super) max_runs: u32,
    /// The last line of the output of a copy whose script timed out.
    pub(super) timed_out: String,
    /// The token for the notification of the end.
    pub(super) token: Option<String>,
    /// The file that every copy and the supervisor remove at the end.
    pub(super) removes: Option<String>,
    pub(super) kind: Kind,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    PrepareRepository {
        working_dir: String,
        project_dir: String,
        credentials: String,
        /// The addresses from which the repository is cloned; empty if there is none.
        urls: Vec<String>,
    },
    SetupScript {
        project_dir: String,
    },
    GitHooks {
        project_dir: String,
    },
}

/// Recognises a command.
///
/// # Panics
/// If the command is unknown.
pub(super) fn recognise(command: &str) -> Script {
    if let Some(rest) = command.strip_prefix("umask 077; mkdir -p ")
        && word(rest).is_some_and(|(_, rest)| rest.is_empty())
    {
        return Script::MakeFolder;
    }
    once(command).map(|once| Script::Once(Box::new(once))).or_else(|| probe(command)).unwrap_or_else(|| {
        panic!("the model of agent servers does not know this command:\n{command}");
    })
}

/// Reads a word in single quotes, as `shared::shell::quoted` writes it. Returns it and the text after it.
fn word(text: &str) -> Option<(String, &str)> {
    let mut rest = text.strip_prefix('\'')?;
    let mut word = String::new();
    loop {
        let (part, after) = rest.split_once('\'')?;
        word += part;
        match after.strip_prefix(r"\''") {
            Some(after) => {
                word.push('\'');
                rest = after;
            }
            None => return Some((word, after)),
        }
    }
}

/// Reads assignments of quoted words to these variables, one in each line. Returns the values and the text after them.
fn assignments<'a, const N: usize>(text: &'a str, names: [&str; N]) -> Option<([String; N], &'a str)> {
    let mut rest = text;
    let mut values = names.map(|_| String::new());
    for (name, value) in names.into_iter().zip(&mut values) {
        let (read, after) = word(rest.strip_prefix(name)?.strip_prefix('=')?)?;
        *value = read;
        rest = after.strip_prefix('\n')?;
    }
    Some((values, rest))
}

fn once(command: &str) -> Option<Once> {
    let names = [
        "d",
        "limit",
        "max_runs",
        "output_limit",
        "timed_out",
        "task",
        "token",
        "finally",
        "script",
        "functions",
        "supervisor",
    ];
    let (values, copy) = assignments(command, names)?;
    let [folder, limit, max_runs, output_limit, timed_out, task, token, finally, script, functions, supervisor] =
        values;
    require("the copy of a command", copy, &COPY_LINES);
    require("the supervisor of a command", &supervisor, &SUPERVISOR_LINES);
    require("the functions of commands", &functions, &["stop() {\n", "lead() {\n", "is_alive() {\n"]);
    output_limit.parse::<usize>().ok()?;
    let (state, name) = folder.rsplit_once('/')?;
    let start = Uuid::parse_str(state.rsplit_once('/')?.1).ok()?;
    assert!(task.is_empty() || Uuid::parse_str(&task).ok() == Some(start), "a command notifies of its own start");
    assert_eq!(task.is_empty(), token.is_empty(), "a notification has a token");
    let removes = match finally.as_str() {
        "" => None,
        finally => Some(word(finally.strip_prefix("rm -f ")?).filter(|(_, rest)| rest.is_empty())?.0),
    };
    let kind = match name {
        "prepare-repository" => preparation(&script)?,
        "setup-script" => setup_script(&script)?,
        "git-hooks" => git_hooks(&script)?,
        _ => return None,
    };
    Some(Once {
        start,
        name: name.to_owned(),
        limit: Duration::from_secs(limit.parse().ok()?),
        max_runs: max_runs.parse().ok()?,
        timed_out,
        token: Some(token).filter(|token| !token.is_empty()),
        removes,
        kind,
        folder,
    })
}

fn require(what: &str, script: &str, lines: &[&str]) {
    for line in lines {
        assert!(script.contains(line), "{what} has changed, and the model has to be changed with it: it lacks {line}");
    }
}

fn preparation(script: &str) -> Option<Kind> {
    let names = ["state", "working_dir", "project_dir", "credentials", "wanted", "workspace"];
    let ([_, working_dir, project_dir, credentials, _, _], rest) = assignments(script, names)?;
    require(
        "the preparation of a repository",
        rest,
        &[
            "note() {\n  echo \"openhands-note:$1\"\n}\n",
            "mkdir -p \"$working_dir\"\ncd \"$working_dir\"\n",
            "echo \"openhands-browser:$browser\"\n",
            "  if [ -f \"$project_dir/.openhands/$name\" ]; then scripts=\"$scripts $name\"; fi\n",
            "echo \"openhands-scripts:$scripts\"\n",
        ],
    );
    let mut urls = Vec::new();
    if let Some((_, words)) = rest.rsplit_once("\n}\nprepare '") {
        require("the preparation of a repository", rest, &["trap 'rm -f \"$credentials\"' EXIT\n"]);
        let mut words = format!("'{words}");
        while let Some((url, after)) = word(words.trim_start()) {
            urls.push(url);
            words = after.to_owned();
        }
        assert!(words.starts_with("\nscripts=\n"), "only addresses follow, and the report of scripts");
    }
    Some(Kind::PrepareRepository { working_dir, project_dir, credentials, urls })
}

fn setup_script(script: &str) -> Option<Kind> {
    let (_, rest) = script.rsplit_once("\n}\ncd ")?;
    let (project_dir, rest) = word(rest)?;
    let expected = " || exit 1\nif [ -f .openhands/setup.sh ]; then run_script .openhands/setup.sh; fi\n";
    (rest == expected).then_some(Kind::SetupScript { project_dir })
}

fn git_hooks(script: &str) -> Option<Kind> {
    let ([project_dir, _, _], rest) = assignments(script, ["project_dir", "mark", "new_hook"])?;
    let expected = "unset CDPATH\ncd \"$project_dir\" || exit 1\n[ -f .openhands/pre-commit.sh ] || exit 0\n";
    rest.starts_with(expected).then_some(Kind::GitHooks { project_dir })
}

fn probe(command: &str) -> Option<Script> {
    let ([file], rest) = assignments(command, ["f"])?;
    let rest = rest.strip_prefix("trap 'rm -f \"$f\"' EXIT\n")?;
    require(
        "the probe of MCP servers",
        rest,
        &["\nexit 69\n", "        if time.monotonic() > end:\n            sys.exit(75)\n"],
    );
    let (_, rest) = rest.split_once("\n' \"$f\" ")?;
    let seconds: u64 = rest.split_whitespace().next()?.parse().ok()?;
    Some(Script::Probe { file, wait: Duration::from_secs(seconds) })
}
