//! The MCP server probe of the start saga, a part of the step SETTING_UP_SKILLS.
//!
//! One MCP server that fails breaks a conversation: agent servers of version 1.15 end the conversation minutes later, those of version 1.58
//! drop the tools of *all* MCP servers, and neither names the server that failed. Therefore one command in the sandbox probes all servers
//! in parallel (`probe_mcp_servers.py`). A server that fails is left out of the conversation, and a note gives the reason. The probe never
//! fails a start: if it cannot determine whether a server works, the agent gets the server.
//!
//! The servers' secrets reach the command in an uploaded file. The command starts before the upload. It waits for the file and removes it
//! as soon as it has read it, so that a worker that dies at any point leaves no copy in the sandbox. Each attempt has its own file and
//! command; the probe is idempotent.

use std::collections::HashMap;
use std::time::Duration;

use aws_sdk_dynamodb::types::AttributeValue;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{StartRun, StepError};
use crate::agent_server::{AgentServer, AgentServerError, CommandOutput, Retry};
use crate::clock::Time;
use crate::digest::sha256_hex;
use crate::dynamo::text;
use crate::error::ErrorClass;
use crate::id;
use crate::mask;
use crate::sandbox::Sandbox;
use crate::shell::quoted;
use crate::start::conversation_body::mcp_servers;
use crate::start::store::Change;
use crate::start::task::PendingCommand;

const NAME: &str = "probe-mcp-servers";
const PROGRAM: &str = include_str!("probe_mcp_servers.py");
/// The prefix of output lines that hold outcomes.
const MARK: &str = "openhands-mcp-probe:";
/// The time that the command waits for its file.
const FILE_WAIT: Duration = Duration::from_secs(30);
/// The timeout of the file's upload. It is shorter than the command's wait, so that no file arrives after the command has ended.
const UPLOAD_LIMIT: Duration = Duration::from_secs(15);
/// The time that the command may need in addition to the wait and the probe: the interpreter starts, and the commands of MCP servers are
/// terminated.
const COMMAND_GRACE: Duration = Duration::from_secs(20);
/// The time after the command's own timeout during which its output is still polled.
const OUTPUT_GRACE: Duration = Duration::from_secs(10);
/// Exit codes of the command's script.
const NO_INTERPRETER: i64 = 69;
const NO_FILE: i64 = 75;
/// The maximum lengths of names and reasons, in characters. Longer ones are cut.
const NAME_LENGTH: usize = 60;
const REASON_LENGTH: usize = 200;
/// Parts of a URL's path with at least this many bytes count as keys.
const SHORTEST_KEY: usize = 16;
/// The number of failed servers that are noted with their reasons; the others are only named.
const REASONS: usize = 10;

/// The outcome of an attempt to start the probe.
#[derive(PartialEq, Eq)]
pub(super) enum ProbeStart {
    /// The command runs, and the start waits for it.
    Started,
    /// A command from an earlier poll still runs.
    Pending,
    /// There are no servers to probe, or no probe is possible.
    Skipped,
}

/// An outcome in the form that the command prints. It is untrusted: any program in the sandbox may have printed it.
#[derive(Deserialize)]
struct Outcome {
    /// The result of [`key`] for the server.
    server: String,
    works: Option<bool>,
    reason: Option<String>,
}

impl StartRun<'_> {
    /// Starts the probe, unless it already runs or there are no servers to probe.
    pub(super) async fn start_mcp_probe(
        &mut self,
        sandbox: &Sandbox,
        agent_server: &AgentServer,
    ) -> Result<ProbeStart, StepError> {
        if self.task.record.command.as_ref().is_some_and(|command| command.name == NAME) {
            return Ok(ProbeStart::Pending);
        }
        let settings = self.settings().await?;
        let servers = mcp_servers(&settings, &self.saga.config);
        if servers.is_empty() || self.saga.config.mcp_probe_timeout.is_zero() {
            return Ok(ProbeStart::Skipped);
        }
        let folders = self.folders(sandbox).await?;
        let limit = self.saga.config.mcp_probe_timeout;
        let file = format!("{}/mcp-{}.json", folders.state, id::random_base62(12));
        let timeout = FILE_WAIT + limit + COMMAND_GRACE;
        let command = script(&folders.state, &file);
        match agent_server.start_command(&command, &folders.parent, timeout).await {
            Ok(id) => {
                let started_at = Some(Time::now());
                self.task.record.command =
                    Some(PendingCommand { name: NAME.to_owned(), id, started_at, ..PendingCommand::default() });
            }
            Err(error) => return self.not_probed(&servers, &error),
        }
        let document = document(&servers, limit).to_string().into();
        match tokio::time::timeout(UPLOAD_LIMIT, agent_server.upload(&file, &document)).await {
            Ok(Ok(())) => Ok(ProbeStart::Started),
            // The file may exist despite the error; the command then removes it.
            Ok(Err(error)) => {
                self.task.record.command = None;
                self.not_probed(&servers, &error)
            }
            Err(_elapsed) => {
                self.task.record.command = None;
                self.note_unprobed(&servers, "their configuration could not be uploaded in time");
                Ok(ProbeStart::Skipped)
            }
        }
    }

    /// Returns the change that records the failed servers and the notes; `None` while the probe runs.
    pub(super) async fn end_mcp_probe(&mut self, agent_server: &AgentServer) -> Result<Option<Change>, StepError> {
        let settings = self.settings().await?;
        for name in settings.mcp_config.without_token() {
            self.add_note(format!("MCP server {} was left out: it needs an OAuth token and has none", shown(name)));
        }
        let pending = self.task.record.command.as_ref().filter(|command| command.name == NAME).cloned();
        if let Some(pending) = pending {
            let servers = mcp_servers(&settings, &self.saga.config);
            let limit = self.saga.config.mcp_probe_timeout;
            match agent_server.command_output(&pending.id).await {
                Ok(None) => {
                    // The limit is shorter than the step's deadline, which would end the start.
                    let limit = FILE_WAIT + limit + COMMAND_GRACE + OUTPUT_GRACE;
                    let limit = limit.min(self.saga.config.step_timeout / 2);
                    if pending.started_at.is_some_and(|at| Time::now().since(at) < limit) {
                        return Ok(None);
                    }
                    self.note_unprobed(&servers, "the probe did not end in time");
                }
                Ok(Some(output)) => self.take_outcomes(&servers, &output),
                Err(error) if error.retry() != Retry::Never && self.task.record.attempts < 2 => {
                    return Err(StepError::Retry(
                        ErrorClass::AgentServer,
                        without_secrets(&servers, &error.to_string()),
                    ));
                }
                Err(error) => self.note_unprobed(&servers, &error.to_string()),
            }
            self.task.record.command = None;
        }
        let record = &self.task.record;
        let left_out = record.mcp_servers_left_out.iter().map(text).collect();
        let notes = record.notes.iter().map(text).collect();
        // The change contains all notes, not only the probe's: no other write contains the earlier notes of this step.
        let change = Change::default().set("notes", AttributeValue::L(notes));
        Ok(Some(change.set("mcp_servers_left_out", AttributeValue::L(left_out))))
    }

    /// Masks the secrets of MCP servers in an error. The failed request may lack the servers that were left out, but the sandbox received
    /// their secrets for the probe and may repeat them.
    pub(super) async fn without_mcp_secrets(&mut self, error: StepError) -> Result<StepError, StepError> {
        let settings = self.settings().await?;
        let servers = mcp_servers(&settings, &self.saga.config);
        let masked = |text: String| without_secrets(&servers, &text);
        Ok(match error {
            StepError::Failed(class, text) => StepError::Failed(class, masked(text)),
            StepError::Retry(class, text) => StepError::Retry(class, masked(text)),
            StepError::Refusal(class, text) => StepError::Refusal(class, masked(text)),
            StepError::Unreachable(text) => StepError::Unreachable(masked(text)),
            waiting @ (StepError::AtCapacity | StepError::LeaseLost) => waiting,
        })
    }

    fn take_outcomes(&mut self, servers: &Map<String, Value>, output: &CommandOutput) {
        match output.exit_code {
            0 => {}
            NO_INTERPRETER => return self.note_unprobed(servers, "the sandbox has no Python 3.8 or later"),
            NO_FILE => return self.note_unprobed(servers, "their configuration did not arrive in the sandbox"),
            code => return self.note_unprobed(servers, &format!("the probe ended with exit code {code}")),
        }
        let outcomes = outcomes(servers, &output.stdout);
        self.task.record.mcp_servers_left_out = outcomes.failed.iter().map(|(name, _)| name.clone()).collect();
        tracing::info!(
            task = %self.task.record.id, servers = servers.len(), left_out = outcomes.failed.len(), unsure = outcomes.unsure.len(),
            "start.mcp_servers_probed"
        );
        for note in notes(&outcomes) {
            self.add_note(note);
        }
    }

    fn not_probed(&mut self, servers: &Map<String, Value>, error: &AgentServerError) -> Result<ProbeStart, StepError> {
        if error.retry() != Retry::Never && self.task.record.attempts < 2 {
            return Err(StepError::Retry(ErrorClass::AgentServer, without_secrets(servers, &error.to_string())));
        }
        self.note_unprobed(servers, &error.to_string());
        Ok(ProbeStart::Skipped)
    }

    /// Notes that the servers were not probed. An earlier attempt may have uploaded the secrets, so the reason is masked: the sandbox may
    /// repeat them in any error.
    fn note_unprobed(&mut self, servers: &Map<String, Value>, why: &str) {
        let why = without_secrets(servers, why);
        tracing::warn!(task = %self.task.record.id, reason = why, "start.mcp_servers_not_probed");
        self.add_note(format!("The MCP servers were not checked: {why}"));
    }
}

#[derive(Default)]
struct Outcomes {
    /// The name of each failed server, and the reason of its failure.
    failed: Vec<(String, String)>,
    /// The servers whose state the probe could not determine.
    unsure: Vec<String>,
}

/// The content of the uploaded file: the program and its input.
fn document(servers: &Map<String, Value>, limit: Duration) -> Value {
    json!({
        "program": PROGRAM,
        "limit": limit.as_secs_f64(),
        "secrets": mask::forms(secrets_of(servers).iter().map(String::as_str)),
        "servers": servers.values().collect::<Vec<_>>(),
        "keys": servers.iter().map(|(name, server)| key(name, server)).collect::<Vec<_>>(),
    })
}

/// The identifier of a server in the output. It is a hash of the server's settings, so that outcomes for changed settings are ignored.
fn key(name: &str, server: &Value) -> String {
    sha256_hex(&json!([name, server]).to_string())[..16].to_owned()
}

/// Parses the outcomes of these servers from the output.
fn outcomes(servers: &Map<String, Value>, output: &str) -> Outcomes {
    let secrets = secrets_of(servers);
    let lines = output.lines().filter_map(|line| serde_json::from_str::<Outcome>(line.strip_prefix(MARK)?).ok());
    let mut said: HashMap<String, Outcome> = lines.map(|outcome| (outcome.server.clone(), outcome)).collect();
    let mut outcomes = Outcomes::default();
    for (name, server) in servers {
        match said.remove(&key(name, server)) {
            Some(Outcome { works: Some(true), .. }) => {}
            Some(Outcome { works: Some(false), reason, .. }) => {
                let reason = mask::masked(&reason.unwrap_or_default(), secrets.iter().map(String::as_str));
                outcomes.failed.push((name.clone(), cut(&on_one_line(&reason), REASON_LENGTH)));
            }
            Some(Outcome { works: None, .. }) | None => outcomes.unsure.push(name.clone()),
        }
    }
    outcomes
}

/// The texts that are masked in reasons. Commands may repeat the value of an option without its name, and some services have a key in the
/// path of their URL.
fn secrets_of(servers: &Map<String, Value>) -> Vec<String> {
    let mut secrets = mask::secrets_in(&json!({"mcp_config": servers}));
    let values: Vec<String> = secrets.iter().filter_map(|secret| Some(secret.split_once('=')?.1.to_owned())).collect();
    let urls = servers.values().filter_map(|server| server["url"].as_str());
    let parts = urls.flat_map(|url| url.split(['/', '?', '#']).skip(3));
    let keys: Vec<String> = parts.filter(|part| part.len() >= SHORTEST_KEY).map(str::to_owned).collect();
    secrets.extend(values.into_iter().chain(keys));
    secrets
}

fn without_secrets(servers: &Map<String, Value>, text: &str) -> String {
    mask::masked(text, secrets_of(servers).iter().map(String::as_str))
}

fn notes(outcomes: &Outcomes) -> Vec<String> {
    let mut notes = Vec::new();
    for (name, reason) in outcomes.failed.iter().take(REASONS) {
        notes.push(format!("MCP server {} was left out: {reason}", shown(name)));
    }
    let names = |names: &mut dyn Iterator<Item = &String>| names.map(|name| shown(name)).collect::<Vec<_>>().join(", ");
    if outcomes.failed.len() > REASONS {
        let others = names(&mut outcomes.failed.iter().skip(REASONS).map(|(name, _)| name));
        notes.push(format!("These MCP servers were left out, too: {others}"));
    }
    if !outcomes.unsure.is_empty() {
        notes.push(format!("These MCP servers could not be checked: {}", names(&mut outcomes.unsure.iter())));
    }
    notes
}

/// Quotes a name and escapes its control characters.
pub(super) fn shown(name: &str) -> String {
    format!("{:?}", cut(name, NAME_LENGTH))
}

fn on_one_line(text: &str) -> String {
    let visible = text.chars().map(|character| if character.is_control() { ' ' } else { character });
    visible.collect::<String>().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn cut(text: &str, length: usize) -> String {
    match text.char_indices().nth(length) {
        Some((at, _)) => format!("{}…", &text[..at]),
        None => text.to_owned(),
    }
}

/// The shell command of the probe. It prefers the Python interpreter that runs the agent server, because MCP clients there use its TLS and
/// its folder; images that bundle the agent server as one program also have a `python3`. `-I` excludes modules of the workspace.
fn script(state: &str, file: &str) -> String {
    format!(
        r#"f={file}
trap 'rm -f "$f"' EXIT
trap 'exit 143' HUP INT TERM
(umask 077 && mkdir -p {state})
agent=$(readlink "/proc/$PPID/exe" 2>/dev/null || ps -o comm= -p "$PPID" 2>/dev/null)
case "${{agent##*/}}" in python*|Python) ;; *) agent=python3;; esac
cd "/proc/$PPID/cwd" 2>/dev/null
for p in "$agent" python3 python; do
  "$p" -I -c 'import json, ssl, sys; sys.exit(sys.version_info < (3, 8))' >/dev/null 2>&1 || continue
  "$p" -I -c {loader} "$f" {wait} </dev/null
  exit
done
n=0
while [ ! -s "$f" ] && [ "$n" -lt {tries} ]; do sleep 0.1; n=$((n + 1)); done
exit {NO_INTERPRETER}
"#,
        file = quoted(file),
        state = quoted(state),
        loader = quoted(LOADER),
        wait = FILE_WAIT.as_secs(),
        tries = FILE_WAIT.as_secs() * 10,
    )
}

/// The Python loader. It waits until the file is complete, removes it, and runs the program in it. The agent server stores the text of
/// commands, so the program is in the file and the command stays short.
const LOADER: &str = r#"import json, os, sys, time
file, end = sys.argv[1], time.monotonic() + float(sys.argv[2])
while True:
    try:
        with open(file, encoding="utf-8") as opened:
            document = json.load(opened)
        break
    except (OSError, ValueError):
        if time.monotonic() > end:
            sys.exit(75)
        time.sleep(0.02)
os.unlink(file)
scope = {"__name__": "probe"}
exec(document["program"], scope)
scope["main"](document)
"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn servers(names: &[&str]) -> Map<String, Value> {
        let server = json!({"url": "https://user-token:pass-word@mcp.example/s/key-in-the-path-01/?key=query-key", "headers": {"X-Key": "header-key"}});
        names.iter().map(|name| ((*name).to_owned(), server.clone())).collect()
    }

    /// The key of the n-th server.
    fn nth(servers: &Map<String, Value>, nth: usize) -> String {
        servers.iter().nth(nth).map(|(name, server)| key(name, server)).expect("a server")
    }

    fn line(outcome: &Value) -> String {
        format!("{MARK}{outcome}\n")
    }

    #[test]
    fn a_server_is_left_out_only_where_the_output_says_that_it_fails() {
        let four = servers(&["a", "b", "c", "d"]);
        let output = [
            "noise\n".to_owned(),
            line(&json!({"server": nth(&four, 0), "works": true})),
            line(&json!({"server": nth(&four, 1), "works": false, "reason": "it answered 401 Unauthorized"})),
            line(&json!({"server": nth(&four, 2), "unsure": "why"})),
            line(&json!({"server": "unknown", "works": false})),
            // This server's settings have changed since the probe started.
            line(&json!({"server": key("d", &json!({"url": "https://before.example"})), "works": false})),
            line(&json!(["server"])),
            format!("{MARK}{{"),
        ]
        .concat();
        let outcomes = outcomes(&four, &output);
        assert_eq!(outcomes.failed, [("b".to_owned(), "it answered 401 Unauthorized".to_owned())]);
        assert_eq!(outcomes.unsure, ["c", "d"]);
        assert_eq!(
            notes(&outcomes),
            [
                r#"MCP server "b" was left out: it answered 401 Unauthorized"#,
                r#"These MCP servers could not be checked: "c", "d""#
            ]
        );
    }

    #[test]
    fn reasons_are_short_and_on_one_line_and_without_secrets() {
        let one = servers(&["a\n\"b\"\u{1b}"]);
        let reason = format!(
            "bad header-key\n\u{1b}[31m query-key pass-word user-token key-in-the-path-01 {}",
            "x".repeat(9000)
        );
        let outcomes = outcomes(&one, &line(&json!({"server": nth(&one, 0), "works": false, "reason": reason})));
        let notes = notes(&outcomes);
        let [note] = notes.as_slice() else { panic!("{notes:?}") };
        assert!(
            note.starts_with(
                r#"MCP server "a\n\"b\"\u{1b}" was left out: bad ********** [31m ********** ********** ********** ********** xxx"#
            ),
            "{note}"
        );
        assert!(note.chars().count() < 300, "{note}");
        let process = json!({"p": {"command": "c", "args": ["--token=argument"], "env": {"T": "variable"}}});
        let process = process.as_object().expect("a map");
        let said = line(&json!({"server": nth(process, 0), "works": false, "reason": "argument and variable"}));
        assert_eq!(super::outcomes(process, &said).failed[0].1, "********** and **********");
    }

    #[test]
    fn of_many_servers_all_are_named_in_a_bounded_text() {
        let names: Vec<String> = (0..100).map(|number| format!("{number}-{}", "n".repeat(500))).collect();
        let many = servers(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let output: String = (0..100)
            .map(|number| line(&json!({"server": nth(&many, number), "works": false, "reason": "r".repeat(5000)})))
            .collect();
        let outcomes = outcomes(&many, &output);
        assert_eq!(outcomes.failed.len(), 100);
        let notes = notes(&outcomes).join("\n");
        assert!((0..100).all(|number| notes.contains(&format!("\"{number}-n"))), "{notes}");
        assert!(notes.len() < 12 * 1024, "{}", notes.len());
    }

    /// Runs the command in a sandbox that has only a few programs and the given `programs`.
    fn run_in_bare_sandbox(programs: &[(&str, &str)], document: Option<&str>) -> (i32, String, bool) {
        use std::os::unix::fs::{PermissionsExt as _, symlink};
        use std::process::{Command, Stdio};

        let folder = std::env::temp_dir().join(id::new_sandbox_id());
        let (state, bin) = (folder.join("state"), folder.join("bin"));
        std::fs::create_dir_all(&bin).expect("a folder");
        std::fs::create_dir_all(&state).expect("a folder");
        for name in ["rm", "mkdir", "sleep", "readlink"] {
            let known = ["/bin", "/usr/bin"].map(|folder| std::path::Path::new(folder).join(name));
            let path = known.into_iter().find(|path| path.exists()).expect("the program");
            symlink(path, bin.join(name)).expect("a link");
        }
        for (name, text) in programs {
            std::fs::write(bin.join(name), text).expect("a program");
            std::fs::set_permissions(bin.join(name), std::fs::Permissions::from_mode(0o755)).expect("a mode");
        }
        let file = state.join("mcp-1.json");
        let (state, name) = (state.display().to_string(), file.display().to_string());
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &script(&state, &name)]).env("PATH", &bin).stdin(Stdio::null()).stdout(Stdio::piped());
        let child = command.spawn().expect("a shell");
        if let Some(document) = document {
            // The file is written in two parts, as in a slow upload.
            let (half, rest) = document.split_at(document.len() / 2);
            std::fs::write(&file, half).expect("written");
            std::thread::sleep(Duration::from_millis(200));
            if file.exists() {
                std::fs::write(&file, [half, rest].concat()).expect("written");
            }
        }
        let output = child.wait_with_output().expect("an end");
        let is_left = file.exists();
        // Remaining files in the temporary folder do no harm.
        let _removed = std::fs::remove_dir_all(&folder);
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stdout).into_owned(), is_left)
    }

    #[test]
    fn without_an_interpreter_the_file_is_removed_and_the_exit_code_says_so() {
        let old = [("python3", "#!/bin/sh\nexit 1\n"), ("python", "#!/bin/sh\nexit 1\n")];
        for programs in [&[][..], &old] {
            let (code, output, is_left) = run_in_bare_sandbox(programs, Some("{}"));
            assert_eq!((i64::from(code), output.as_str(), is_left), (NO_INTERPRETER, "", false));
        }
    }

    /// The path of the interpreter itself: `python3` may be a script that needs more programs than the sandbox has.
    fn python() -> Option<String> {
        let find = "python3 -c 'import sys; print(sys.executable)'";
        let python = std::process::Command::new("sh").args(["-c", find]).output().expect("a shell");
        let python = String::from_utf8_lossy(&python.stdout).trim().to_owned();
        if python.is_empty() {
            eprintln!("skipped: there is no python3");
        }
        (!python.is_empty()).then_some(python)
    }

    /// Runs a Python text in the same module, after the program.
    fn run_with_program(check: &str) {
        let Some(python) = python() else { return };
        let text = format!("{PROGRAM}\n{check}");
        let output = std::process::Command::new(python).args(["-I", "-c", &text]).output().expect("it runs");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    #[test]
    fn addresses_of_a_host_share_the_timeout() {
        run_with_program(
            r#"
tried = []
class Fake:
    def __init__(self, *_):
        self.timeouts = []
    def settimeout(self, timeout):
        self.timeouts.append(timeout)
    def connect(self, where):
        tried.append((where, self.timeouts[-1]))
        if where != "good":
            raise socket.timeout()
    def close(self):
        pass
socket.socket = Fake
found = lambda *names: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", name) for name in names]
socket.getaddrinfo = lambda *_: found("dead", "dead", "good")
connected = connect(("host", 80), 300)
assert [where for where, _ in tried] == ["dead", "dead", "good"], tried
# A third of the time, half of the rest, the rest.
assert tried[0][1] <= 100 and tried[1][1] <= 150 and tried[2][1] <= 300, tried
assert connected.timeouts[-1] <= 300
socket.getaddrinfo = lambda *_: found("dead")
try:
    connect(("host", 80), 300)
    assert False
except socket.timeout:
    pass
"#,
        );
    }

    #[test]
    fn dots_are_taken_out_of_a_path_and_nothing_else() {
        run_with_program(
            r#"
for path, expected in [
    ("", ""), ("/", "/"), ("/mcp", "/mcp"), ("/.well-known//mcp", "/.well-known//mcp"), ("/a//b/./c", "/a//b/c"),
    ("/a/../b", "/b"), ("/../b", "/b"), ("/a/..", "/"), ("/a/.", "/a/"), ("/a/.b/c..", "/a/.b/c.."),
]:
    assert without_dots(path) == expected, (path, without_dots(path))
"#,
        );
    }

    #[test]
    fn reasons_are_masked_before_they_are_cut() {
        let secret = "s".repeat(990);
        let servers = json!({"a": {"url": "https://h/", "headers": {"X-Key": secret}}});
        let document = document(servers.as_object().expect("a map"), Duration::ZERO);
        run_with_program(&format!(
            r#"
reason = clean("bad %s and %s" % ("s" * 990, "s" * 990) + "\ud800" + "x" * 5000, {secrets})
assert len(reason) == 250, len(reason)
assert reason.startswith("bad ********** and **********?xxx"), reason
"#,
            secrets = document["secrets"],
        ));
    }

    #[test]
    fn the_program_starts_once_its_file_is_complete() {
        let Some(python) = python() else { return };
        let program = format!("#!/bin/sh\nexec {} \"$@\"\n", quoted(&python));
        let servers: Map<String, Value> =
            [("a".to_owned(), json!({"command": "no-such-command"}))].into_iter().collect();
        let document = document(&servers, Duration::from_secs(20)).to_string();
        let (code, output, is_left) = run_in_bare_sandbox(&[("python", &program)], Some(&document));
        let failed = outcomes(&servers, &output).failed;
        assert_eq!((code, is_left), (0, false), "{output}");
        assert_eq!(failed, [("a".to_owned(), "its command was not found".to_owned())]);
    }

    #[test]
    fn the_loader_the_script_and_the_program_agree_on_their_constants() {
        assert!(LOADER.contains(&format!("sys.exit({NO_FILE})")));
        assert!(script("/s", "/s/f").ends_with(&format!("exit {NO_INTERPRETER}\n")));
        assert!(PROGRAM.contains(&format!("MARK = \"{MARK}\"")));
        assert!(PROGRAM.contains(&format!("\nMASK = \"{}\"", mask::MASK)));
    }
}
