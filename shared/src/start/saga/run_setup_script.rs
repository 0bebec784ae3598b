//! Step RUNNING_SETUP_SCRIPT of the start saga: runs `.openhands/setup.sh` of the project, if there is one.

use super::command::{OneCommand, RUN_SCRIPT, complaint};
use super::{StartRun, Step, StepError};
use crate::shell::quoted;
use crate::start::store::Change;
use crate::start::task::StartStatus;

impl StartRun<'_> {
    pub(super) async fn run_setup_script(&mut self) -> Result<Step, StepError> {
        let Some((sandbox, agent_server)) = self.running_sandbox().await? else { return Ok(Step::Wait) };
        let folders = self.folders(&sandbox).await?;
        let script = script(&folders.project_dir);
        let timeout = self.saga.config.setup_script_timeout;
        let command = OneCommand { name: "setup-script", script: &script, finally: "", timeout };
        let Some(output) = self.run_once(&agent_server, &folders, command).await? else {
            return Ok(Step::Wait);
        };
        let mut change = Change::default();
        if output.exit_code != 0 {
            // The start continues: the conversation is still useful, because the agent can investigate the failure.
            let note = format!(".openhands/setup.sh failed: {}", complaint(&output));
            self.task.record.notes.push(note.clone());
            change = change.note(note);
        }
        Ok(Step::Next(&[StartStatus::SettingUpGitHooks], change))
    }
}

fn script(project_dir: &str) -> String {
    format!(
        "{RUN_SCRIPT}cd {} || exit 1\nif [ -f .openhands/setup.sh ]; then run_script .openhands/setup.sh; fi\n",
        quoted(project_dir)
    )
}

#[cfg(test)]
mod tests {
    use super::super::scratch::{Scratch, shells};
    use super::script;

    /// Prints the name by which it runs and the project's path, and verifies that bash runs it.
    const BODY: &str = "words=(a b)\nhere=$(cd \"$(dirname \"${BASH_SOURCE[0]}\")/..\" && pwd)\nname() { echo \"${BASH_SOURCE[0]}\"; }\n\
        if [[ $0 == \"${BASH_SOURCE[0]}\" ]]; then\n  echo \"$0 $(name) $here $PWD ${words[1]} $LINENO\"\nfi\n";

    fn with_line_ends(script: &str, ends: &str) -> String {
        script.replace('\n', ends)
    }

    #[test]
    fn every_script_that_bash_can_run_is_run_in_its_place() {
        let with = |shebang: &str| format!("{shebang}\n{BODY}");
        let big = format!("{BODY}{}", "# A line that makes it long, and nothing else.\n".repeat(10_000));
        let cases = [
            ("plain", with("#!/bin/bash")),
            ("no shebang", BODY.to_owned()),
            ("no final newline", with("#!/bin/bash").trim_end().to_owned()),
            ("CRLF", with_line_ends(&with("#!/bin/bash"), "\r\n")),
            ("CRLF, no shebang", with_line_ends(BODY, "\r\n")),
            ("CRLF, env", with_line_ends(&with("#!/usr/bin/env bash"), "\r\n")),
            ("CRLF, no final newline", with_line_ends(&with("#!/bin/bash"), "\r\n").trim_end().to_owned()),
            ("CR at the end of the last line alone", format!("{}\r", BODY.trim_end())),
            ("CR alone", with_line_ends(&with("#!/bin/bash"), "\r")),
            ("CR CR LF", with_line_ends(&with("#!/bin/bash"), "\r\r\n")),
            ("CR in the shebang alone", with("#!/bin/bash\r")),
            ("some lines with CR", with("#!/bin/sh").replace("then\n", "then\r\n")),
            ("BOM", format!("\u{feff}{}", with("#!/bin/bash"))),
            ("BOM, no shebang", format!("\u{feff}{BODY}")),
            ("BOM and CRLF", format!("\u{feff}{}", with_line_ends(&with("#!/usr/bin/env bash"), "\r\n"))),
            ("a plain shell's shebang", with("#!/bin/sh")),
            ("a shell that is not installed", with("#!/no/such/zsh -f")),
            ("a bash elsewhere", with("#!/no/such/bin/bash")),
            ("env and a shell that is not installed", with("#!/usr/bin/env no-such-shell")),
            ("something that is not installed", with("#!/opt/company/run --quiet")),
            ("blanks in the shebang", with("#! \t/usr/bin/env   bash ")),
            ("an empty shebang", with("#!")),
            ("env -S", with("#!/usr/bin/env -S bash -e")),
            ("glued -S and a variable", with("#!/usr/bin/env -SA=1 bash -eu")),
            ("several options", with("#!/bin/bash -e -u")),
            ("an option with a value", with("#!/bin/bash -o pipefail")),
            ("a comment", with("#!/bin/bash # of the team")),
            ("an option that bash does not have", with("#!/bin/dash -E -q")),
            ("an option that would not run a file", with("#!/bin/sh -c")),
            ("an option that would read something else", with("#!/bin/bash -s")),
            ("two BOMs", format!("\u{feff}\u{feff}{}", with("#!/bin/bash"))),
            ("long", big.clone()),
            ("long, CRLF", with_line_ends(&big, "\r\n")),
        ];
        for shell in shells() {
            for folder in ["project", "a project's \"folder\" $HOME"] {
                for (name, content) in &cases {
                    let scratch = Scratch::with(&shell);
                    let file = format!("{folder}/.openhands/setup.sh");
                    scratch.write(&file, content);
                    scratch.set_mode(&file, 0o600);
                    let ran = scratch.run(&script(&scratch.path(folder)));
                    let first = content.trim_start_matches('\u{feff}');
                    let line = 5 + usize::from(first.starts_with("#!"));
                    let project = scratch.path(folder);
                    let own = ".openhands/setup.sh";
                    assert_eq!(ran.stdout, format!("{own} {own} {project} {project} b {line}\n"), "{name}: {ran:?}");
                    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{name}: {ran:?}");
                    assert_eq!(scratch.read(&file), *content, "{name}");
                    assert_eq!(scratch.mode(&file), 0o600, "{name}");
                    assert_eq!(std::fs::read_dir(scratch.at(folder)).expect("a folder").count(), 1, "{name}");
                    assert!(scratch.left().is_empty(), "{name}: {:?}", scratch.left());
                }
            }
        }
    }

    #[test]
    fn a_link_to_a_script_is_run_as_a_script() {
        for content in [BODY.to_owned(), with_line_ends(BODY, "\r\n")] {
            let scratch = Scratch::new();
            scratch.write("project/scripts/install", &content);
            scratch.write("project/.openhands/x", "");
            std::os::unix::fs::symlink("../scripts/install", scratch.at("project/.openhands/setup.sh"))
                .expect("a link");
            let ran = scratch.run(&script(&scratch.path("project")));
            assert!(ran.stdout.starts_with(".openhands/setup.sh .openhands/setup.sh "), "{ran:?}");
        }
    }

    #[test]
    fn a_shebang_chooses_the_interpreter_and_its_options() {
        // An interpreter that prints its arguments.
        let interpreter = "#!/bin/sh\nprintf '%s ' interpreter \"$@\"\nhead -n 1 \"$1\" >/dev/null\n";
        for (shebang, expected) in [
            ("#!{bin}/python9", "interpreter .openhands/setup.sh "),
            ("#!{bin}/python9\r", "interpreter .openhands/setup.sh "),
            ("#!{bin}/python9 -u -X utf8", "interpreter -u -X utf8 .openhands/setup.sh "),
            ("#!/usr/bin/env python9", "interpreter .openhands/setup.sh "),
            ("#!/usr/bin/env -S python9 -u", "interpreter -u .openhands/setup.sh "),
            ("\u{feff}#!/usr/bin/env python9", "interpreter .openhands/setup.sh "),
            ("#!/no/such/bin/python9 -u", "interpreter -u .openhands/setup.sh "),
            ("#!/bin/bash -e", "first\n"),
            ("#!/bin/sh -e", "first\n"),
            ("#!/bin/bash -e\r", "first\n"),
            ("#!/bin/bash", "first\nlast\n"),
        ] {
            let scratch = Scratch::new();
            scratch.write("bin/python9", interpreter);
            scratch.set_mode("bin/python9", 0o755);
            let shebang = shebang.replace("{bin}", &scratch.path("bin"));
            scratch.write("project/.openhands/setup.sh", format!("{shebang}\necho first\nfalse\necho last\n"));
            let ran = scratch.run(&script(&scratch.path("project")));
            assert_eq!(ran.stdout, expected, "{shebang:?}: {ran:?}");
        }
    }

    /// Runs an interpreter that prints its arguments and its environment.
    fn env_says(scratch: &Scratch, shebang: &str) -> super::super::scratch::Ran {
        scratch.write("bin/python9", "#!/bin/sh\necho \"$* A=$A B=$B FOO=${FOO-none}\"\n");
        scratch.set_mode("bin/python9", 0o755);
        scratch.write("project/.openhands/setup.sh", format!("{shebang}\nimport os\n"));
        scratch.run(&format!("export FOO=foo\n{}", script(&scratch.path("project"))))
    }

    #[test]
    fn options_of_env_are_read_as_env_reads_them() {
        for shell in shells() {
            for (shebang, expected) in [
                ("-S python9 -u", "-u .openhands/setup.sh A= B= FOO=foo"),
                ("-S -u FOO python9 -u", "-u .openhands/setup.sh A= B= FOO=none"),
                ("-S -uFOO A=1 python9", ".openhands/setup.sh A=1 B= FOO=none"),
                ("-S --unset FOO B=2 python9", ".openhands/setup.sh A= B=2 FOO=none"),
                ("-S --unset=FOO python9", ".openhands/setup.sh A= B= FOO=none"),
                ("-S -C / python9 -u", "-u .openhands/setup.sh A= B= FOO=foo"),
                ("-S --chdir / python9", ".openhands/setup.sh A= B= FOO=foo"),
                ("-S --chdir=/ python9", ".openhands/setup.sh A= B= FOO=foo"),
                ("--split-string=python9 -u", "-u .openhands/setup.sh A= B= FOO=foo"),
                ("--split-string=A=1 python9 -u", "-u .openhands/setup.sh A=1 B= FOO=foo"),
                ("--split-string python9 -u", "-u .openhands/setup.sh A= B= FOO=foo"),
                ("-vSpython9 -u", "-u .openhands/setup.sh A= B= FOO=foo"),
                ("-iS A=1 python9", ".openhands/setup.sh A=1 B= FOO=foo"),
                ("-S -- A=1 B=2 python9", ".openhands/setup.sh A=1 B=2 FOO=foo"),
                ("-S FOO=* python9", ".openhands/setup.sh A= B= FOO=*"),
            ] {
                let scratch = Scratch::with(&shell);
                let ran = env_says(&scratch, &format!("#!/usr/bin/env {shebang}"));
                assert_eq!((ran.code, ran.stdout.trim_end()), (Some(0), expected), "{shebang}: {ran:?}");
            }
        }
    }

    #[test]
    fn variables_of_env_are_the_script_s_and_not_ours() {
        for shell in shells() {
            for (shebang, ends) in
                [("PATH=/nowhere", "\n"), ("-S PATH=/nowhere", "\r\n"), ("-S -u PATH", "\n"), ("-S -u PATH", "\r\n")]
            {
                let scratch = Scratch::with(&shell);
                let content =
                    format!("#!/usr/bin/env {shebang} bash -e\necho \"${{PATH-none}} $0\"\n").replace('\n', ends);
                scratch.write("project/.openhands/setup.sh", content);
                let ran = scratch.run(&script(&scratch.path("project")));
                let set = ran.stdout.strip_suffix(" .openhands/setup.sh\n");
                assert_eq!(ran.code, Some(0), "{shebang}: {ran:?}");
                // bash sets a default PATH if there is none.
                let is_expected =
                    |path| if shebang.contains("-u") { path != scratch.path("bin") } else { path == "/nowhere" };
                assert!(set.is_some_and(|path| is_expected(path.to_owned())), "{shebang}: {ran:?}");
                assert!(scratch.left().is_empty(), "{:?}", scratch.left());
            }
        }
    }

    #[test]
    fn a_restricted_shell_runs_a_script_with_any_line_ends() {
        for shell in shells() {
            for shebang in [
                "#!/bin/bash -r",
                "#!/bin/bash -er",
                "#!/bin/bash --restricted",
                "#!/bin/bash -e -r -u",
                "#!/no/such/rbash",
                "#!/usr/bin/env -S bash -r",
            ] {
                for (start, ends) in [("", "\r\n"), ("\u{feff}", "\n"), ("\u{feff}", "\r\n")] {
                    let scratch = Scratch::with(&shell);
                    scratch.write("bin/rbash", "#!/bin/bash\nexec bash -r \"$@\"\n");
                    scratch.set_mode("bin/rbash", 0o755);
                    let content =
                        format!("{start}{shebang}\necho \"$0 $PWD\"\n(cd /) 2>/dev/null || echo restricted\n");
                    scratch.write("project/.openhands/setup.sh", content.replace('\n', ends));
                    let ran = scratch.run(&script(&scratch.path("project")));
                    let expected = format!(".openhands/setup.sh {}\nrestricted\n", scratch.path("project"));
                    assert_eq!(
                        (ran.code, ran.stdout.as_str()),
                        (Some(0), expected.as_str()),
                        "{shebang} {ends:?}: {ran:?}"
                    );
                    assert!(scratch.left().is_empty(), "{:?}", scratch.left());
                }
            }
        }
    }

    #[test]
    fn a_script_for_something_that_is_not_installed_is_not_given_to_bash() {
        for shell in shells() {
            for (shebang, body) in [
                // bash rejects the script, or the script's interpreter is listed as another language.
                ("no-such-python", "import os\r\nprint(os.getcwd())\r\n"),
                ("python0", "import os\n"),
                ("/no/such/bin/python3.99", "import os\r\n"),
                ("ruby9", "puts 'hello'\n"),
                ("/no/such/perl5.99", "print 'hello';\n"),
                ("node99", "console\n"),
                ("php99", "echo 'hello';\n"),
                ("lua99", "print 'hello'\n"),
                ("pwsh-99", "Write-Host hello\n"),
                ("fish99", "set x 1; echo hello\n"),
                ("tclsh99", "puts hello\n"),
                ("Rscript99", "hello\n"),
                ("/no/such/fish", "set -x A 1\n"),
            ] {
                let scratch = Scratch::with(&shell);
                let line =
                    if shebang.starts_with('/') { shebang.to_owned() } else { format!("/usr/bin/env {shebang}") };
                scratch.write("project/.openhands/setup.sh", format!("#!{line}\n{body}"));
                let ran = scratch.run(&script(&scratch.path("project")));
                let expected = format!(".openhands/setup.sh needs {shebang}, which is not installed here\n");
                assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr), (Some(127), "", expected), "{shebang}");
            }
        }
    }

    #[test]
    fn a_script_that_is_killed_leaves_no_copy() {
        for content in
            ["ls \"$TMPDIR\"\nkill -9 $$\n", "ls \"$TMPDIR\"\r\nkill -9 $$\r\n", "\u{feff}ls \"$TMPDIR\"\nkill -9 $$\n"]
        {
            let scratch = Scratch::new();
            scratch.write("project/.openhands/setup.sh", content);
            let ran = scratch.run(&script(&scratch.path("project")));
            assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (None, "", ""), "{ran:?}");
            assert!(scratch.left().is_empty(), "{content:?}");
        }
    }

    #[test]
    fn a_script_s_exit_code_is_kept_and_no_script_is_none() {
        for content in ["exit 3\n", "exit 3\r\n", "\u{feff}exit 3", "(exit 3)\r\n"] {
            let scratch = Scratch::new();
            scratch.write("project/.openhands/setup.sh", content);
            assert_eq!(scratch.run(&script(&scratch.path("project"))).code, Some(3), "{content:?}");
        }
        let scratch = Scratch::new();
        scratch.write("project/.openhands/setup.sh/is a folder", "");
        assert_eq!(scratch.must(&script(&scratch.path("project"))), "");
        scratch.write("empty/.openhands/setup.sh", "");
        assert_eq!(scratch.must(&script(&scratch.path("empty"))), "");
    }
}
