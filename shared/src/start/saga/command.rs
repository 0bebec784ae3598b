//! Idempotent commands in the sandbox: a command that is sent twice still runs once.
//!
//! The agent server chooses the ids of commands, so the id is lost if a worker dies after it sends a command and before it records the id.
//! Therefore each command has a name, and a folder in the sandbox whose path is made of the task's id and that name. The copy of the script
//! that creates the folder does the work; any later copy waits for it and repeats its output. If the working copy was killed, the next copy
//! restarts the work.

use std::time::Duration;

use super::{Folders, StartRun, StepError};
use crate::agent_server::{AgentServer, CommandOutput};
use crate::clock::Time;
use crate::shell::quoted;
use crate::start::task::PendingCommand;

/// The largest size of a command's recorded output, in bytes.
const OUTPUT_LIMIT: usize = 16 * 1024;

/// A shell function that runs a script of the project.
pub(super) const RUN_SCRIPT: &str = include_str!("run_script.sh");

/// Wraps `script` so that it runs once, however often it is sent. Each copy runs `finally` at its end.
///
/// The recorded output is readable only by its owner. `script` runs with the umask of the agent server, because the files that it creates
/// belong to the user.
#[must_use]
pub fn once(state: &str, name: &str, script: &str, finally: &str) -> String {
    let (state, folder) = (quoted(state), quoted(&format!("{state}/{name}")));
    // A child shell runs `script`, so that no `exit` or `set` in it prevents the recording of the exit code.
    format!(
        r#"mask=$(umask)
umask 077
trap {finally} EXIT
mkdir -p {state} || exit 1
d={folder}
work() {{
  echo $$ >"$d/pid"
  (umask "$mask"; exec sh -c {script}) >"$d/out" 2>"$d/err" </dev/null
  echo $? >"$d/exit.new" && mv "$d/exit.new" "$d/exit"
}}
if mkdir "$d" 2>/dev/null; then work; else
  while [ ! -f "$d/exit" ]; do
    p=$(cat "$d/pid" 2>/dev/null)
    if [ -n "$p" ] && ! kill -0 "$p" 2>/dev/null && [ ! -f "$d/exit" ]; then work; else sleep 0.1; fi
  done
fi
tail -c {OUTPUT_LIMIT} "$d/out"
tail -c {OUTPUT_LIMIT} "$d/err" >&2
exit "$(cat "$d/exit")""#,
        script = quoted(script),
        finally = quoted(finally),
    )
}

/// An idempotent command of a start.
pub(super) struct OneCommand<'a> {
    /// The name among the start's commands.
    pub(super) name: &'static str,
    pub(super) script: &'a str,
    /// A script that every copy of the command runs at its end.
    pub(super) finally: &'a str,
    pub(super) timeout: Duration,
}

impl StartRun<'_> {
    /// Runs a command of this start once; returns `None` while it runs.
    pub(super) async fn run_once(
        &mut self,
        agent_server: &AgentServer,
        folders: &Folders,
        OneCommand { name, script, finally, timeout }: OneCommand<'_>,
    ) -> Result<Option<CommandOutput>, StepError> {
        let id = match &self.task.record.command {
            Some(command) if command.name == name => command.id.clone(),
            _ => {
                let script = once(&folders.state, name, script, finally);
                let id = agent_server.start_command(&script, &folders.parent, timeout).await?;
                self.task.record.command =
                    Some(PendingCommand { name: name.to_owned(), id: id.clone(), started_at: Some(Time::now()) });
                id
            }
        };
        let output = agent_server.command_output(&id).await?;
        if output.is_some() {
            self.task.record.command = None;
        }
        Ok(output)
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
mod tests {
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

    #[test]
    fn ten_copies_at_once_run_the_script_once_and_all_tell_its_outcome() {
        let scratch = Scratch::new();
        let runs = scratch.path("runs");
        let script = once(
            &scratch.path("state"),
            "x",
            &format!("echo run >>{runs}; sleep 0.3; echo out; echo err >&2; exit 7"),
            "",
        );
        let copies: Vec<_> = (0..10).map(|_| scratch.command(&script).spawn().expect("a shell")).collect();
        for copy in copies {
            let output = copy.wait_with_output().expect("output");
            assert_eq!(output.status.code(), Some(7));
            assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
        }
        assert_eq!(std::fs::read_to_string(runs).expect("runs"), "run\n");
        let again = scratch.command(&script).output().expect("a shell");
        assert_eq!(again.status.code(), Some(7));
    }

    #[test]
    fn a_killed_copy_is_taken_over() {
        let scratch = Scratch::new();
        let (runs, go) = (scratch.path("runs"), scratch.path("go"));
        // The child of the first copy does not end before that copy is killed.
        let script = format!("echo run >>{runs}; until [ -f {go} ]; do sleep 0.05; done");
        let script = once(&scratch.path("state"), "x", &script, "");
        let mut first = scratch.command(&script).spawn().expect("a shell");
        while !std::path::Path::new(&runs).exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
        first.kill().expect("killed");
        first.wait().expect("reaped");
        std::fs::write(&go, "").expect("written");
        let second = scratch.command(&script).output().expect("a shell");
        assert_eq!(second.status.code(), Some(0));
        assert_eq!(std::fs::read_to_string(runs).expect("runs"), "run\nrun\n");
    }

    #[test]
    fn what_is_kept_is_private_and_what_the_script_makes_is_not() {
        for shell in shells() {
            for mask in ["0022", "0002", "0027", "0077"] {
                let scratch = Scratch::with(&shell);
                let script = format!("umask; mkdir made; : >made/file; {} -c umask", scratch.path("bin/sh"));
                let script = once(&scratch.path("state/of/a/start"), "x", &script, "umask >finally");
                let ran = scratch.run(&format!("umask {mask}\n{script}"));
                assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), format!("{mask}\n{mask}\n").as_str()), "{ran:?}");
                let mask = u32::from_str_radix(mask, 8).expect("a number");
                assert_eq!((scratch.mode("made"), scratch.mode("made/file")), (0o777 & !mask, 0o666 & !mask));
                assert_eq!(scratch.mode("state/of/a/start"), 0o700);
                for name in ["pid", "out", "err", "exit"] {
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
