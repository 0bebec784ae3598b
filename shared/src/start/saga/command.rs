//! Idempotent commands in the sandbox: a command that is sent twice still runs once.
//!
//! The agent server chooses the ids of commands, so the id is lost if a worker dies after it sends a command and before it records the id.
//! An agent server also forgets the commands that run when it restarts. Therefore each command has a name, and a folder in the sandbox whose
//! path is made of the task's id and that name. Each copy of the command that is sent uses this folder: the first one starts a run of the
//! script, every copy waits for the run and repeats its outcome (`command_copy.sh`).
//!
//! A run has a supervisor in a session of its own (`command_supervisor.sh`), so it survives the copy that started it: an agent server kills its
//! commands when it ends. The supervisor ends the script and its child processes when the time is up, records the outcome, and notifies
//! this API. If the supervisor was killed, one copy starts the next run.

use std::time::Duration;

use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::Instant;

use super::{COMMAND_MARGIN, Folders, StartRun, StepError};
use crate::agent_server::{AgentServer, CommandOutput};
use crate::clock::Time;
use crate::id;
use crate::shell::quoted;
use crate::start::task::PendingCommand;
use crate::user::token::NotificationToken;

/// The largest size of a command's recorded output, in bytes.
const OUTPUT_LIMIT: usize = 16 * 1024;
/// The maximum number of runs of a script: all but the last were killed with their supervisor.
const MAX_RUNS: u32 = 5;
/// How often a command is sent again after the agent server has forgotten or killed it.
const MAX_RESENDS: u32 = 5;
/// The shortest time limit of a command.
const SHORTEST_LIMIT: Duration = Duration::from_secs(1);
/// The agent server's time limit of a copy exceeds the script's limit by this much, so that the supervisor ends the script before: it needs
/// up to 10 s for that. It is shorter than [`COMMAND_MARGIN`].
const COPY_GRACE: Duration = Duration::from_secs(15);
/// The age from which the agent server is asked for its uptime, which shows whether it still knows a command, and the interval of these
/// requests.
const ASK_AFTER: Duration = Duration::from_secs(3);
/// The longest time for which a request waits for the end of its command. It is not longer than a worker may wait.
const LONGEST_EXECUTION: Duration = Duration::from_secs(2);
/// A request does not wait for less: no command would end in this time.
const SHORTEST_EXECUTION: Duration = Duration::from_millis(50);
/// How long the token with which a command notifies this API is valid after the command's time limit.
const TOKEN_GRACE: Duration = Duration::from_secs(60);
/// The agent server reports its uptime in whole seconds.
const UPTIME_PRECISION: Duration = Duration::from_secs(1);
/// The exit code of a copy whose script was ended because its time was up, together with [`TIMED_OUT`]. Scripts can end with this code, too.
const TIMED_OUT_CODE: i64 = 124;
/// The last line of such a copy's output.
const TIMED_OUT: &str = "openhands-timed-out";

/// A shell function that runs a script of the project.
pub(super) const RUN_SCRIPT: &str = include_str!("run_script.sh");

const FUNCTIONS: &str = include_str!("command.sh");
const SUPERVISOR: &str = include_str!("command_supervisor.sh");
const COPY: &str = include_str!("command_copy.sh");

/// What became of a copy of a command.
enum Sent {
    Ended(CommandOutput),
    /// It runs, under this id.
    Runs(String),
}

/// An idempotent command of a start.
pub(super) struct OneCommand<'a> {
    /// The name among the start's commands.
    pub(super) name: &'static str,
    pub(super) script: &'a str,
    /// A script that every copy of the command runs after the outcome is recorded, and so does the supervisor.
    pub(super) finally: &'a str,
    /// The time limit of the script. Shorter if less time is left until the step's deadline.
    pub(super) timeout: Duration,
}

impl OneCommand<'_> {
    /// The shell script of one copy of the command, which runs the command's script once, however many copies are sent. `state` is the
    /// folder for the state of the start's commands. `notification` is the id of the start and the token with which the supervisor notifies
    /// this API; without them it does not.
    ///
    /// The token is a part of the command, which agent servers store and other processes of the sandbox can read, and not a file or a
    /// variable: it permits nothing but to enqueue the start's job while the start is unfinished, which this API also does by itself. Agent
    /// servers from 1.49 on hide their session key from commands, so that key is not available.
    ///
    /// The recorded output is readable only by its owner. The command's script runs with the umask of the agent server, because the files
    /// that it creates belong to the user.
    fn copy(&self, state: &str, limit: Duration, notification: Option<(&str, &SecretString)>) -> String {
        let (task, token) = notification.map_or(("", ""), |(task, token)| (task, token.expose_secret()));
        let mut copy = String::new();
        for (name, value) in [
            ("d", format!("{state}/{}", self.name).as_str()),
            ("limit", &limit.as_secs().to_string()),
            ("max_runs", &MAX_RUNS.to_string()),
            ("output_limit", &OUTPUT_LIMIT.to_string()),
            ("timed_out", TIMED_OUT),
            ("task", task),
            ("token", token),
            ("finally", self.finally),
            ("script", self.script),
            ("functions", FUNCTIONS),
            ("supervisor", SUPERVISOR),
        ] {
            copy += &format!("{name}={}\n", quoted(value));
        }
        copy + COPY
    }
}

/// The outcome of a copy, with exit code −1 if the script's time was up.
fn outcome(mut output: CommandOutput) -> CommandOutput {
    let text = output.stdout.trim_end_matches('\n');
    if output.exit_code == TIMED_OUT_CODE
        && let Some(rest) = text.strip_suffix(TIMED_OUT).and_then(|rest| rest.strip_suffix('\n'))
    {
        output = CommandOutput { exit_code: -1, stdout: rest.to_owned(), ..output };
    }
    output
}

impl StartRun<'_> {
    /// Whether a command with this name was sent and may still run.
    pub(super) fn is_sent(&self, name: &str) -> bool {
        self.task.record.command.as_ref().is_some_and(|command| command.name == name && !command.id.is_empty())
    }

    /// Runs a command of this start once; returns `None` while it runs.
    pub(super) async fn run_once(
        &mut self,
        agent_server: &AgentServer,
        folders: &Folders,
        command: OneCommand<'_>,
    ) -> Result<Option<CommandOutput>, StepError> {
        let name = command.name;
        let left = self.task.record.deadline.map_or(command.timeout, |at| at.since(Time::now().plus(COMMAND_MARGIN)));
        let limit = command.timeout.min(left).max(SHORTEST_LIMIT);
        let known = self.task.record.command.take().filter(|command| command.name == name);
        let (pending, output) = match known {
            Some(pending) if !pending.id.is_empty() => {
                self.task.record.command = Some(pending.clone());
                // The provider shows another machine for the sandbox, which has never had the command.
                if pending.agent_server.as_deref().is_some_and(|url| url != agent_server.url()) {
                    return Ok((!self.send_again(&pending)).then(|| self.lost(&pending)));
                }
                let Some(output) = agent_server.command_output(&pending.id).await? else {
                    let is_waiting = !self.is_forgotten(agent_server, &pending).await || self.send_again(&pending);
                    return Ok((!is_waiting).then(|| self.lost(&pending)));
                };
                (pending, output)
            }
            known => {
                let token = self.notification_token(limit).await?;
                let task = id::hex(self.task.record.id);
                let notification = token.as_ref().map(|token| (task.as_str(), token));
                let script = command.copy(&folders.state, limit, notification);
                // A lost response is retried, and the count must not start again then.
                self.task.record.command.clone_from(&known);
                let resends = known.map_or(0, |known| known.resends);
                let started_at = Some(Time::now());
                let sent = self.send(agent_server, &script, folders, limit + COPY_GRACE).await?;
                let url = agent_server.url().to_owned();
                let pending =
                    |id| PendingCommand { name: name.to_owned(), id, started_at, resends, agent_server: Some(url) };
                match sent {
                    Sent::Ended(output) => (pending(String::new()), output),
                    Sent::Runs(id) => {
                        self.task.record.command = Some(pending(id));
                        return Ok(None);
                    }
                }
            }
        };
        // The agent server killed the copy, or could not start it. The script's own exit codes are not negative.
        if output.exit_code < 0 && left > SHORTEST_LIMIT && self.send_again(&pending) {
            return Ok(None);
        }
        self.task.record.command = None;
        Ok(Some(outcome(output)))
    }

    /// Sends a copy of a command, and waits a short time for its end: most commands take less time than two requests. The response of a
    /// request that waits is the only one with the output, so for a longer command the id is looked up, and if it is not found (a request
    /// may not have arrived), another copy is sent.
    async fn send(
        &self,
        agent_server: &AgentServer,
        script: &str,
        folders: &Folders,
        timeout: Duration,
    ) -> Result<Sent, StepError> {
        let wait = self.inline_wait().min(LONGEST_EXECUTION);
        if wait >= SHORTEST_EXECUTION {
            match agent_server.execute_command(script, &folders.parent, timeout, wait).await {
                Ok(output) => return Ok(Sent::Ended(output)),
                Err(error) if error.is_ambiguous() => {
                    if let Some(id) = agent_server.command_id(script).await? {
                        return Ok(Sent::Runs(id));
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Sent::Runs(agent_server.start_command(script, &folders.parent, timeout).await?))
    }

    /// The token with which a command with this time limit notifies this API, if the agent server knows its address.
    async fn notification_token(&self, limit: Duration) -> Result<Option<SecretString>, StepError> {
        if !self.saga.sandboxes.sends_webhooks() {
            return Ok(None);
        }
        let record = &self.task.record;
        let token = NotificationToken { user: record.user.clone(), task: record.id };
        Ok(Some(token.issue(&self.saga.sealer, limit + TOKEN_GRACE).await?))
    }

    /// Whether the agent server has restarted since it started the command: it then never reports an outcome, because it keeps running
    /// commands only in memory.
    async fn is_forgotten(&mut self, agent_server: &AgentServer, pending: &PendingCommand) -> bool {
        let Some(age) = pending.started_at.map(|at| Time::now().since(at)).filter(|age| *age >= ASK_AFTER) else {
            return false;
        };
        if self.asked_uptime_at.is_some_and(|at| at.elapsed() < ASK_AFTER) {
            return false;
        }
        self.asked_uptime_at = Some(Instant::now());
        // Ages are compared, because the clocks may differ.
        match agent_server.uptime().await {
            Ok(Some(uptime)) => uptime + UPTIME_PRECISION < age,
            Ok(None) | Err(_) => false,
        }
    }

    /// Notes that the next poll sends another copy of the command. Returns false if it was sent too often.
    fn send_again(&mut self, pending: &PendingCommand) -> bool {
        let resends = pending.resends + 1;
        if resends > MAX_RESENDS {
            return false;
        }
        tracing::warn!(task = %self.task.record.id, command = pending.name, resends, "start.command_resent");
        self.task.record.command = Some(PendingCommand { id: String::new(), resends, ..pending.clone() });
        true
    }

    /// The outcome of a command that the agent server has forgotten too often.
    fn lost(&mut self, pending: &PendingCommand) -> CommandOutput {
        self.task.record.command = None;
        let restarts = pending.resends + 1;
        let stderr = format!("the agent server was restarted {restarts} times while the command ran");
        CommandOutput { exit_code: 137, stderr, ..CommandOutput::default() }
    }
}

/// The prefix of output lines that become notes of the start.
const NOTE: &str = "openhands-note:";

/// Returns the notes in the output of a successful command, for the user.
#[must_use]
pub fn note_in(output: &CommandOutput) -> Option<String> {
    const LIMIT: usize = 500;
    let notes: Vec<String> = output
        .stdout
        .lines()
        .filter_map(|line| line.strip_prefix(NOTE))
        .map(|note| note.chars().filter(|character| !character.is_control()).take(LIMIT).collect())
        .collect();
    (!notes.is_empty()).then(|| notes.join("\n"))
}

/// Describes the failure of a command by its last output, for the user.
#[must_use]
pub fn complaint(output: &CommandOutput) -> String {
    const LIMIT: usize = 1500;
    let said = if output.stderr.trim().is_empty() { output.stdout.trim() } else { output.stderr.trim() };
    let skipped = said.chars().count().saturating_sub(LIMIT);
    let said: String = said.chars().skip(skipped).collect();
    match (output.exit_code, said.is_empty()) {
        (-1, true) => "timed out".to_owned(),
        (-1, false) => format!("timed out; last output: {said}"),
        (code, true) => format!("it ended with exit code {code}"),
        (code, false) => format!("it ended with exit code {code}: {said}"),
    }
}

#[cfg(test)]
pub(super) fn once(state: &str, name: &'static str, script: &str, finally: &str) -> String {
    let timeout = Duration::from_secs(60);
    OneCommand { name, script, finally, timeout }.copy(state, timeout, None)
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;
    use std::os::unix::process::CommandExt as _;
    use std::path::PathBuf;
    use std::process::Command;
    use std::thread::sleep;

    use super::super::scratch::{Scratch, shells};
    use super::*;

    #[test]
    fn quoting_survives_every_character() {
        let scratch = Scratch::new();
        for text in ["plain", "it's", "$(touch x)", "a\nb", "\\", "`id`;&|", "ü \"q\"", "''"] {
            let output = scratch.command(&format!("printf %s {}", quoted(text))).output().expect("a shell");
            assert_eq!(String::from_utf8_lossy(&output.stdout), text);
        }
    }

    /// The shells of images, with busybox if this machine has it.
    fn shells_of_images() -> Vec<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let busybox = std::env::split_paths(&path).map(|folder| folder.join("busybox")).find(|file| file.exists());
        shells().into_iter().chain(busybox).collect()
    }

    fn copy(scratch: &Scratch, limit: u64, script: &str) -> String {
        let command = OneCommand { name: "x", script, finally: "", timeout: Duration::ZERO };
        command.copy(&scratch.path("state"), Duration::from_secs(limit), None)
    }

    #[track_caller]
    fn wait_until(what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !condition() {
            assert!(Instant::now() < deadline, "{what}");
            sleep(Duration::from_millis(10));
        }
    }

    fn lines(scratch: &Scratch, file: &str) -> Vec<String> {
        scratch.read(file).lines().map(str::to_owned).collect()
    }

    fn is_alive(pid: &str) -> bool {
        // A killed process is a zombie until its parent has waited for it.
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
    }

    /// The identity of a process as copies record it: id, boot, start time.
    fn identity(scratch: &Scratch, pid: u32) -> String {
        scratch.must(&format!("{FUNCTIONS}\nidentity {pid}")).trim().to_owned()
    }

    /// Links the named programs into a folder that replaces PATH, as on a machine that has no others.
    fn with_only(scratch: &Scratch, programs: &[&str], mut command: Command) -> Command {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::fs::create_dir_all(scratch.at("only")).expect("a folder");
        for name in programs {
            // The first python3 of PATH may be a script that needs other programs.
            let folders = std::iter::once(PathBuf::from("/usr/bin")).chain(std::env::split_paths(&path));
            let found = folders.map(|folder| folder.join(name)).find(|file| file.exists());
            let found = if *name == "sh" { scratch.at("bin/sh") } else { found.expect("the program") };
            let link = scratch.at("only").join(name);
            if !link.exists() {
                std::os::unix::fs::symlink(found, link).expect("a link");
            }
        }
        command.env("PATH", scratch.at("only"));
        command
    }

    const PROGRAMS: [&str; 9] = ["sh", "bash", "cat", "mkdir", "mv", "sleep", "tail", "date", "ps"];

    #[test]
    fn ten_copies_at_once_run_the_script_once_and_all_repeat_its_outcome() {
        for shell in shells_of_images() {
            let scratch = Scratch::with(&shell);
            let runs = scratch.path("runs");
            let script = copy(&scratch, 60, &format!("echo run >>{runs}; sleep 0.3; echo out; echo err >&2; exit 7"));
            let copies: Vec<_> = (0..10).map(|_| scratch.command(&script).spawn().expect("a shell")).collect();
            for copy in copies {
                let output = copy.wait_with_output().expect("output");
                assert_eq!(output.status.code(), Some(7));
                assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
            }
            assert_eq!(scratch.read("runs"), "run\n");
            let again = scratch.run(&script);
            assert_eq!((again.code, scratch.read("runs").as_str()), (Some(7), "run\n"), "{again:?}");
        }
    }

    #[test]
    fn a_run_outlives_the_copy_that_started_it() {
        for shell in shells_of_images() {
            let scratch = Scratch::with(&shell);
            let (runs, go) = (scratch.path("runs"), scratch.path("go"));
            let script = format!("echo run >>{runs}; until [ -f {go} ]; do sleep 0.05; done; echo done");
            let script = copy(&scratch, 60, &script);
            let mut first = scratch.command(&script).process_group(0).spawn().expect("a shell");
            wait_until("the script runs", || scratch.at("runs").exists());
            // Agent servers kill the shell that they have started, or its process group.
            let group = i32::try_from(first.id()).expect("an id");
            scratch.must(&format!("kill -KILL -{group}"));
            first.wait().expect("reaped");
            let second = scratch.command(&script).spawn().expect("a shell");
            scratch.write("go", "");
            let output = second.wait_with_output().expect("output");
            assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b"done\n"[..]), "{shell:?}");
            assert_eq!(scratch.read("runs"), "run\n", "{shell:?}");
        }
    }

    #[test]
    fn one_copy_takes_over_from_a_killed_supervisor_and_ends_its_script() {
        for shell in shells_of_images() {
            let scratch = Scratch::with(&shell);
            let (pids, go) = (scratch.path("pids"), scratch.path("go"));
            let script = format!("echo $$ >>{pids}; until [ -f {go} ]; do sleep 0.05; done; echo done");
            let script = copy(&scratch, 60, &script);
            let copies: Vec<_> = (0..8).map(|_| scratch.command(&script).spawn().expect("a shell")).collect();
            wait_until("the script runs", || lines(&scratch, "pids").len() == 1);
            let owner = scratch.read("state/x/run.1/owner");
            let (supervisor, _) = owner.split_once(' ').expect("an identity");
            scratch.must(&format!("kill -s KILL {supervisor}"));
            wait_until("a second run", || lines(&scratch, "pids").len() == 2);
            // It was killed before, but a busy machine may not have ended it yet.
            wait_until("the end of the first run's script", || !is_alive(&lines(&scratch, "pids")[0]));
            scratch.write("go", "");
            for copy in copies {
                let output = copy.wait_with_output().expect("output");
                assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b"done\n"[..]), "{shell:?}");
            }
            assert_eq!(lines(&scratch, "pids").len(), 2, "{shell:?}");
        }
    }

    #[test]
    fn an_owner_that_does_not_run_any_more_is_replaced() {
        for shell in shells_of_images() {
            let mut other = Command::new("sleep").arg("60").spawn().expect("a process");
            let of_other = identity(&Scratch::with(&shell), other.id());
            let parts: Vec<&str> = of_other.split(' ').collect();
            let [pid, boot, start] = parts[..] else { panic!("an identity: {of_other}") };
            for (case, owner) in [
                ("a process with the same id", Some(format!("{pid} {boot} 1"))),
                ("a process before the machine restarted", Some(format!("{pid} another-boot {start}"))),
                ("a process that has ended", Some(format!("4194304 {boot} {start}"))),
                ("a file without content", Some(String::new())),
                ("a copy that was killed before it wrote the file", None),
            ] {
                let scratch = Scratch::with(&shell);
                std::fs::create_dir_all(scratch.at("state/x/run.1")).expect("a folder");
                if let Some(owner) = owner {
                    scratch.write("state/x/run.1/owner", format!("{owner}\n"));
                }
                let ran = scratch.run(&copy(&scratch, 60, "echo done"));
                assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), "done\n"), "{case}: {ran:?}");
                assert!(scratch.at("state/x/run.2/out").exists(), "{case}");
            }
            // An owner that still runs is not replaced.
            let scratch = Scratch::with(&shell);
            scratch.write("state/x/run.1/owner", format!("{of_other}\n"));
            let waiting = scratch.command(&copy(&scratch, 60, "echo done")).spawn().expect("a shell");
            sleep(Duration::from_secs(3));
            assert!(!scratch.at("state/x/run.2").exists());
            other.kill().expect("killed");
            other.wait().expect("reaped");
            let output = waiting.wait_with_output().expect("output");
            assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &b"done\n"[..]), "{shell:?}");
        }
    }

    #[test]
    fn a_script_that_kills_its_supervisor_is_not_run_forever() {
        let scratch = Scratch::new();
        let script = format!("echo run >>{}; kill -s KILL $PPID; sleep 60", scratch.path("runs"));
        let ran = scratch.run(&copy(&scratch, 60, &script));
        assert_eq!((ran.code, lines(&scratch, "runs").len()), (Some(137), 5), "{ran:?}");
    }

    /// A child that ignores SIGTERM, one in the background, and one in another process group of the session.
    const STUBBORN: &str = "echo said; trap 'echo ended' TERM\n\
        sh -c 'trap \"\" TERM; echo $$ >>PIDS; while :; do sleep 0.1; done' &\n\
        sleep 600 & echo $! >>PIDS\n\
        bash -c 'set -m; sleep 600 & echo $! >>PIDS; wait' &\n\
        while :; do sleep 0.1; done";

    #[test]
    fn a_script_whose_time_is_up_leaves_no_process() {
        for shell in shells_of_images() {
            let scratch = Scratch::with(&shell);
            let script = STUBBORN.replace("PIDS", &scratch.path("pids"));
            let command =
                OneCommand { name: "x", script: &script, finally: "echo end >>ends", timeout: Duration::ZERO };
            let ran = scratch.run(&command.copy(&scratch.path("state"), Duration::from_secs(1), None));
            let output = CommandOutput {
                exit_code: ran.code.expect("a code").into(),
                stdout: ran.stdout.clone(),
                ..CommandOutput::default()
            };
            let output = outcome(output);
            assert_eq!(output.exit_code, -1, "{ran:?}");
            assert_eq!(complaint(&output).lines().next(), Some("timed out; last output: said"), "{ran:?}");
            let pids = lines(&scratch, "pids");
            assert_eq!(pids.len(), 3, "{pids:?}");
            assert!(pids.iter().all(|pid| !is_alive(pid)), "{shell:?}: {pids:?}");
            // The supervisor runs it as well, because the copy may have been killed.
            wait_until("both run it", || lines(&scratch, "ends").len() == 2);
        }
    }

    #[test]
    fn a_script_may_end_with_the_exit_code_of_a_timeout() {
        let scratch = Scratch::new();
        let ran = scratch.run(&copy(&scratch, 60, "echo said; exit 124"));
        let output = CommandOutput { exit_code: 124, stdout: ran.stdout, ..CommandOutput::default() };
        assert_eq!((ran.code, outcome(output.clone())), (Some(124), output));
    }

    /// macOS has neither setsid nor /proc.
    #[test]
    fn time_limits_and_take_over_work_without_setsid_and_proc() {
        let with_perl = [&PROGRAMS[..], &["perl"]].concat();
        for (shell, programs) in shells()
            .into_iter()
            .map(|shell| (shell, &with_perl[..]))
            .chain([(PathBuf::from("/bin/bash"), &PROGRAMS[..])])
        {
            let scratch = Scratch::with(&shell);
            let without_proc = |script: String| script.replace("/proc/", "/no-such-folder/");
            let script = "sleep 600 & echo $! >>PIDS\nsleep 600".replace("PIDS", &scratch.path("pids"));
            let script = without_proc(copy(&scratch, 1, &script));
            let ran = with_only(&scratch, programs, scratch.command(&script)).output().expect("a shell");
            assert_eq!(ran.status.code(), Some(124), "{shell:?} {programs:?}: {ran:?}");
            let pids = lines(&scratch, "pids");
            assert!(pids.len() == 1 && !is_alive(&pids[0]), "{shell:?} {programs:?}");

            std::fs::remove_dir_all(scratch.at("state")).expect("removed");
            scratch.write("state/x/run.1/owner", format!("{} Mon Jan 1 00:00:00 2001\n", std::process::id()));
            let script = without_proc(copy(&scratch, 60, "echo done"));
            let ran = with_only(&scratch, programs, scratch.command(&script)).output().expect("a shell");
            assert_eq!((ran.status.code(), ran.stdout.as_slice()), (Some(0), &b"done\n"[..]), "{shell:?}: {ran:?}");
        }
    }

    #[test]
    fn the_end_of_a_longer_command_is_posted_with_its_token() {
        for programs in [&["curl"][..], &["python3"]] {
            let scratch = Scratch::new();
            let server = TcpListener::bind("127.0.0.1:0").expect("a port");
            let url = format!("http://{}/api/v1/webhooks", server.local_addr().expect("an address"));
            let token = SecretString::from("a-token");
            let script = |name: &'static str, script: &str, notification| {
                let command = OneCommand { name, script, finally: "", timeout: Duration::ZERO };
                command.copy(&scratch.path("state"), Duration::from_secs(60), notification)
            };
            let notification = Some(("task-1", &token));
            // Neither without a token nor for a short command, whose end the worker polls.
            for script in [
                script("no-token", "sleep 2", None),
                script("short", "true", notification),
                script("long", "sleep 2", notification),
            ] {
                let mut command = scratch.command(&script);
                command.env("OH_WEBHOOKS_0_BASE_URL", &url);
                let programs = [&PROGRAMS[..], &["setsid"], programs].concat();
                let ran = with_only(&scratch, &programs, command).output().expect("a shell");
                assert_eq!(ran.status.code(), Some(0), "{ran:?}");
            }
            let (mut connection, _) = server.accept().expect("a connection");
            let mut request = [0; 4096];
            let length = connection.read(&mut request).expect("a request");
            let request = String::from_utf8_lossy(&request[..length]).to_lowercase();
            assert!(request.starts_with("post /api/v1/webhooks/commands/task-1 http/1.1\r\n"), "{request}");
            assert!(request.contains("\r\nx-access-token: a-token\r\n"), "{request}");
            connection.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").expect("a response");
            server.set_nonblocking(true).expect("set");
            assert!(server.accept().is_err(), "one request");
        }
    }

    #[test]
    fn what_is_kept_is_private_and_what_the_script_makes_is_not() {
        for shell in shells_of_images() {
            for mask in ["0022", "0002", "0027", "0077"] {
                let scratch = Scratch::with(&shell);
                let script = format!("umask; mkdir made; : >made/file; {} -c umask", scratch.path("bin/sh"));
                let script = once(&scratch.path("state/of/a/start"), "x", &script, "umask >finally");
                let ran = scratch.run(&format!("umask {mask}\n{script}"));
                assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), format!("{mask}\n{mask}\n").as_str()), "{ran:?}");
                let mask = u32::from_str_radix(mask, 8).expect("a number");
                assert_eq!((scratch.mode("made"), scratch.mode("made/file")), (0o777 & !mask, 0o666 & !mask));
                assert_eq!(scratch.mode("state/of/a/start"), 0o700);
                for name in ["exit", "run.1/owner", "run.1/script", "run.1/out", "run.1/err"] {
                    assert_eq!(scratch.mode(&format!("state/of/a/start/x/{name}")), 0o600, "{name}");
                }
            }
        }
    }

    #[test]
    fn notes_are_the_marked_lines_without_control_characters() {
        let output = |stdout: &str| CommandOutput { exit_code: 0, stdout: stdout.into(), ..CommandOutput::default() };
        assert_eq!(note_in(&output("openhands-browser:no\nfoo openhands-note:x\n")), None);
        let noted = note_in(&output("x\nopenhands-note:one\u{1b}[1m\nopenhands-note:two\n"));
        assert_eq!(noted.as_deref(), Some("one[1m\ntwo"));
    }
}
