//! Commands in the sandbox that can be sent twice and still run once.
//!
//! The agent server chooses the ids of commands, so a worker that dies between sending one and writing down its id
//! cannot find it again. Therefore a command has a name of its own, a folder in the sandbox made from the task's id and
//! the command's name, and the script that makes the folder is the one that does the work; any later copy waits for that
//! one and repeats its output. If the one that did the work was killed, the next copy takes over.

use std::time::Duration;

use super::{Folders, StepError, Work};
use crate::agent_server::{AgentServer, CommandOutput};
use crate::clock::Time;
use crate::start::task::PendingCommand;

/// How much of a command's output is kept, in bytes.
const OUTPUT_LIMIT: usize = 16 * 1024;

/// Quotes a text as one word of a POSIX shell.
#[must_use]
pub fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// The script around `script` that makes it run once, however often it is sent. `finally` is done at the end of each copy.
#[must_use]
pub fn once(state: &str, name: &str, script: &str, finally: &str) -> String {
    let (state, folder) = (quoted(state), quoted(&format!("{state}/{name}")));
    // The shell that runs `script` is a child, so that nothing it does (exit, set) keeps the exit code from being kept.
    format!(
        r#"umask 077
trap {finally} EXIT
mkdir -p {state} || exit 1
d={folder}
work() {{
  echo $$ >"$d/pid"
  sh -c {script} >"$d/out" 2>"$d/err" </dev/null
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

/// A command of a start.
pub(super) struct OneCommand<'a> {
    /// Its name among the start's commands.
    pub(super) name: &'static str,
    /// What it does.
    pub(super) script: &'a str,
    /// What is done when it has ended, by every copy of it.
    pub(super) finally: &'a str,
    /// How long it may take.
    pub(super) timeout: Duration,
}

impl Work<'_> {
    /// Runs a command of this start once; `None` while it runs.
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

/// What a failed command said, for a person.
#[must_use]
pub fn complaint(output: &CommandOutput) -> String {
    const LIMIT: usize = 1500;
    let said = if output.stderr.trim().is_empty() { output.stdout.trim() } else { output.stderr.trim() };
    let skipped = said.chars().count().saturating_sub(LIMIT);
    let said: String = said.chars().skip(skipped).collect();
    match (output.exit_code, said.is_empty()) {
        (-1, true) => "it was stopped because its time was up".to_owned(),
        (-1, false) => format!("it was stopped because its time was up, having said: {said}"),
        (code, true) => format!("it ended with exit code {code}"),
        (code, false) => format!("it ended with exit code {code}: {said}"),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new() -> Self {
            let path = std::env::temp_dir().join(crate::id::new_sandbox_id());
            std::fs::create_dir_all(&path).expect("a folder");
            Self(path)
        }

        fn path(&self, name: &str) -> String {
            self.0.join(name).display().to_string()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            // Left-overs in the temporary folder hurt nobody.
            let _removed = std::fs::remove_dir_all(&self.0);
        }
    }

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    #[test]
    fn quoting_survives_every_character() {
        for text in ["plain", "it's", "$(touch x)", "a\nb", "\\", "`id`;&|", "ü \"q\"", "''"] {
            let output = shell(&format!("printf %s {}", quoted(text))).output().expect("a shell");
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
        let copies: Vec<_> = (0..10).map(|_| shell(&script).spawn().expect("a shell")).collect();
        for copy in copies {
            let output = copy.wait_with_output().expect("output");
            assert_eq!(output.status.code(), Some(7));
            assert_eq!((output.stdout.as_slice(), output.stderr.as_slice()), (&b"out\n"[..], &b"err\n"[..]));
        }
        assert_eq!(std::fs::read_to_string(runs).expect("runs"), "run\n");
        let again = shell(&script).output().expect("a shell");
        assert_eq!(again.status.code(), Some(7));
    }

    #[test]
    fn a_killed_copy_is_taken_over() {
        let scratch = Scratch::new();
        let (runs, go) = (scratch.path("runs"), scratch.path("go"));
        let script = once(&scratch.path("state"), "x", &format!("echo run >>{runs}; [ -f {go} ] || sleep 60"), "");
        let mut first = shell(&script).spawn().expect("a shell");
        while !std::path::Path::new(&runs).exists() {
            std::thread::sleep(Duration::from_millis(10));
        }
        std::fs::write(&go, "").expect("written");
        first.kill().expect("killed");
        first.wait().expect("reaped");
        let second = shell(&script).output().expect("a shell");
        assert_eq!(second.status.code(), Some(0));
        assert_eq!(std::fs::read_to_string(runs).expect("runs"), "run\nrun\n");
    }
}
