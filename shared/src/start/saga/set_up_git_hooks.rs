//! Step SETTING_UP_GIT_HOOKS of the start saga: installs `.openhands/pre-commit.sh` of the project as git's pre-commit hook.

use super::command::{OneCommand, RUN_SCRIPT, complaint, note_in};
use super::{StartRun, Step, StepError};
use crate::shell::quoted;
use crate::start::store::Change;
use crate::start::task::StartStatus;

/// Marks our hook, to distinguish it from an existing hook; the reference marks its hooks with the same text.
const MARK: &str = "This hook was installed by OpenHands";

impl StartRun<'_> {
    pub(super) async fn set_up_git_hooks(&mut self) -> Result<Step, StepError> {
        let Some((sandbox, agent_server)) = self.running_sandbox().await? else { return Ok(Step::Wait) };
        let folders = self.folders(&sandbox).await?;
        let script = script(&folders.project_dir);
        let timeout = self.saga.config.step_timeout;
        let command = OneCommand { name: "git-hooks", script: &script, finally: "", timeout };
        let Some(output) = self.run_once(&agent_server, &folders, command).await? else {
            return Ok(Step::Wait);
        };
        let mut change = Change::default();
        let note = match output.exit_code {
            0 => note_in(&output),
            _ => Some(format!("The git hook of .openhands/pre-commit.sh was not installed: {}", complaint(&output))),
        };
        if let Some(note) = note {
            self.task.record.notes.push(note.clone());
            change = change.note(note);
        }
        Ok(Step::Next(&[StartStatus::SettingUpSkills], change))
    }
}

fn script(project_dir: &str) -> String {
    let hook = format!("#!/bin/sh\n# {MARK}. {HOOK_HEAD}{RUN_SCRIPT}mark={}\n{HOOK}", quoted(MARK));
    format!("project_dir={}\nmark={}\nnew_hook={}\n{INSTALL}", quoted(project_dir), quoted(MARK), quoted(&hook))
}

const HOOK_HEAD: &str = "It runs the project's own .openhands/pre-commit.sh, and then openhands-kept-pre-commit,
# the hook that was here before.
";

const HOOK: &str = r#"
unset CDPATH
hooks=$(cd "$(dirname "$0")" && pwd) || exit 1
# A tool that replaced this hook may call it, and be called by it.
case :$OPENHANDS_PRE_COMMIT: in *":$hooks:"*) exit 0 ;; esac
export OPENHANDS_PRE_COMMIT="$OPENHANDS_PRE_COMMIT:$hooks"
cd "$(git rev-parse --show-toplevel)" || exit 1
if [ -f .openhands/pre-commit.sh ]; then
  (run_script .openhands/pre-commit.sh) || exit
else
  echo 'warning: .openhands/pre-commit.sh is missing; it was not run' >&2
fi
# git runs no hook that is not executable. The one that was here may be .openhands/pre-commit.sh itself, or have been replaced by this
# hook, of this version or an earlier one.
kept=$hooks/openhands-kept-pre-commit
if [ -f "$kept" ] && [ -x "$kept" ] && ! cmp -s "$kept" .openhands/pre-commit.sh && ! cmp -s "$kept" "$hooks/pre-commit" &&
  ! grep -qF "$mark" "$kept"; then
  exec "$kept" "$@"
fi
"#;

/// Installs the hook in the hooks folder of the git directory and changes no file of the project. It does not use `core.hooksPath`, which
/// often is a folder of the working tree.
const INSTALL: &str = r#"unset CDPATH
cd "$project_dir" || exit 1
[ -f .openhands/pre-commit.sh ] || exit 0
set -e
if [ -n "$(git rev-parse --show-prefix)" ]; then
  echo 'the project is not a repository of its own' >&2
  exit 1
fi
git_dir=$(git rev-parse --git-common-dir)
git_dir=$(cd "$git_dir" && pwd -P)
mkdir -p "$git_dir/hooks"
hooks=$(cd "$git_dir/hooks" && pwd -P)
case $hooks/ in "$git_dir"/*) ;; *)
  echo "openhands-note:.openhands/pre-commit.sh does not run at commits: git's folder of hooks is a link to $hooks. Call it from the pre-commit hook there"
  exit 0 ;;
esac
is_ours() {
  [ -f "$1" ] && [ ! -L "$1" ] && grep -qF "$mark" "$1"
}
is_there() {
  [ -e "$1" ] || [ -L "$1" ]
}
# Whether both are files of the same content, or the same links.
is_same() {
  if [ -L "$1" ] || [ -L "$2" ]; then [ "$(readlink "$1")" = "$(readlink "$2")" ]; else cmp -s "$1" "$2" 2>/dev/null; fi
}
hook=$hooks/pre-commit
# A name that neither tools nor users have for theirs, and that no pattern for names of hooks matches.
kept=$hooks/openhands-kept-pre-commit
# Tools that a setup script installs over ours, at a later start, keep it under another name. It would run twice.
for other in "$hook".*; do
  if is_ours "$other"; then rm -f "$other"; fi
done
if is_there "$hook.local" && ! is_there "$kept"; then
  # An earlier version kept the hook that was here as pre-commit.local, which may be a name that this hook itself calls.
  if is_ours "$hook" && ! grep -qF openhands-kept-pre-commit "$hook"; then
    mv "$hook.local" "$kept"
  elif is_there "$hook" && is_same "$hook" "$hook.local"; then
    rm -f "$hook.local"
  fi
fi
if is_there "$hook" && ! is_ours "$hook"; then
  if is_there "$kept"; then
    if is_same "$hook" "$kept"; then rm -f "$kept"; else
      # A tool has replaced its hook. Nothing is overwritten.
      number=1
      while is_there "$kept.$number"; do number=$((number + 1)); done
      mv "$kept" "$kept.$number"
    fi
  fi
  mv "$hook" "$kept"
fi
draft=$hooks/.pre-commit.$$
printf %s "$new_hook" >"$draft"
if [ -x "$hook" ] && cmp -s "$draft" "$hook"; then rm -f "$draft"; else
  chmod +x "$draft"
  mv -f "$draft" "$hook"
fi
used=$(git rev-parse --git-path hooks)
[ "$(cd "$used" 2>/dev/null && pwd -P)" != "$hooks" ] || exit 0
used=${used%/}
own=${used%/_}
# Earlier versions put their hook there, and the one that was there beside it.
theirs=$used/pre-commit
if is_ours "$theirs"; then
  if is_there "$theirs.local" && [ -z "$(git ls-files -- "$theirs.local" 2>/dev/null)" ]; then before=$theirs.local; else before=; fi
  tracked=$(git ls-files -s -- "$theirs" 2>/dev/null | cut -d ' ' -f 2)
  if [ -n "$tracked" ] && git cat-file blob "$tracked" | grep -qF "$mark"; then tracked=; fi
  if [ -n "$tracked" ] && { [ -z "$before" ] || [ "$(git hash-object "$before")" = "$tracked" ]; }; then
    # With the mode that it has there.
    git checkout -q -- "$theirs"
    if [ -n "$before" ]; then rm -f "$before"; fi
  elif [ -n "$before" ]; then
    mv -f "$before" "$theirs"
  else
    rm -f "$theirs"
  fi
  echo "openhands-note:$theirs is the project's own again: an earlier version had replaced it"
fi
if configured=$(git config core.hooksPath) && [ -z "$configured" ]; then
  echo "openhands-note:.openhands/pre-commit.sh does not run at commits: core.hooksPath is empty, so that git runs no hooks. Unset it"
elif ! grep -qsF .openhands/pre-commit.sh "$theirs" && ! grep -qsF .openhands/pre-commit.sh "$own/pre-commit"; then
  echo "openhands-note:.openhands/pre-commit.sh does not run at commits: git takes its hooks from $used (core.hooksPath). Call it from $own/pre-commit, or unset core.hooksPath"
fi
"#;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::super::scratch::{Ran, Scratch, shells};
    use super::script;

    /// Creates a repository that contains this pre-commit.sh, committed unchanged, and the files of a project.
    fn repository(scratch: &Scratch, pre_commit: &str) {
        scratch.write("project/.openhands/pre-commit.sh", pre_commit);
        scratch.set_mode("project/.openhands/pre-commit.sh", 0o644);
        scratch.write("project/.husky/pre-commit", "echo husky >>../ran\n");
        scratch.set_mode("project/.husky/pre-commit", 0o755);
        scratch.write("project/.githooks/README", "Hooks\n");
        scratch.write("project/scripts/check", "#!/bin/sh\necho link >>../ran\n");
        scratch.set_mode("project/scripts/check", 0o755);
        scratch.must("cd project && git init -q && git add -A && git commit -q -m First");
    }

    fn install(scratch: &Scratch) -> Ran {
        scratch.run(&script(&scratch.path("project")))
    }

    /// Makes a commit, and returns its exit code and the output of its hooks in `ran`.
    fn commit(scratch: &Scratch, folder: &str) -> (Option<i32>, String) {
        let ran =
            scratch.run(&format!("cd {folder} && : >../ran && date >>file && git add file && git commit -q -m Next"));
        (ran.code, scratch.read("ran").replace('\n', " "))
    }

    const KEPT: &str = ".git/hooks/openhands-kept-pre-commit";
    const PRE_COMMIT: &str = "echo \"own $0 $PWD\" >>../ran\n";

    fn own(scratch: &Scratch) -> String {
        format!("own .openhands/pre-commit.sh {} ", scratch.path("project"))
    }

    #[test]
    fn the_hook_runs_any_script_and_the_tree_stays_as_it_was() {
        let bash = "words=(own); [[ $0 == \"${BASH_SOURCE[0]}\" ]] && echo \"${words[0]} $0 $PWD\" >>../ran\n";
        for shell in shells() {
            for content in [
                PRE_COMMIT.to_owned(),
                format!("#!/bin/bash\n{bash}"),
                format!("#!/bin/bash\n{bash}").replace('\n', "\r\n"),
                format!("\u{feff}#!/usr/bin/env bash\n{bash}"),
                format!("#!/bin/zsh-that-is-not-installed\n{}", bash.trim_end()),
                format!("#!/bin/sh\n{bash}"),
            ] {
                let scratch = Scratch::with(&shell);
                repository(&scratch, &content);
                let before = scratch.tree("project");
                for _ in 0..2 {
                    let ran = install(&scratch);
                    assert_eq!((ran.code, ran.stdout.as_str(), ran.stderr.as_str()), (Some(0), "", ""), "{ran:?}");
                    assert_eq!(scratch.tree("project"), before);
                }
                assert_eq!(commit(&scratch, "project"), (Some(0), own(&scratch)), "{content:?}");
                // This shell runs the hook, not the machine's `/bin/sh`.
                scratch.must("cd project && : >../ran && sh .git/hooks/pre-commit");
                assert_eq!(scratch.read("ran").replace('\n', " "), own(&scratch), "{content:?}");
                assert!(scratch.left().is_empty());
                assert!(!scratch.at(&format!("project/{KEPT}")).exists());
            }
        }
    }

    #[test]
    fn a_refusal_of_the_script_refuses_the_commit() {
        for content in ["exit 3\n", "#!/bin/bash\r\nexit 3\r\n", "#!/no/such-python\nprint('x')\n"] {
            let scratch = Scratch::new();
            repository(&scratch, content);
            install(&scratch);
            scratch.write(&format!("project/{KEPT}"), "#!/bin/sh\necho kept >>../ran\n");
            scratch.set_mode(&format!("project/{KEPT}"), 0o755);
            assert_eq!(commit(&scratch, "project"), (Some(1), String::new()), "{content:?}");
        }
    }

    #[test]
    fn a_hook_that_was_there_before_runs_after_the_script() {
        let hook = scratch_hook("kept");
        for (name, content, mode, expected) in [
            ("a shell script", hook.as_str(), 0o755, "kept "),
            ("no shebang", "echo kept >>../ran\n", 0o755, "kept "),
            ("another language", "#!/usr/bin/awk -f\nBEGIN { print \"kept\" >> \"../ran\" }\n", 0o755, "kept "),
            ("not executable", hook.as_str(), 0o644, ""),
            ("the same script", PRE_COMMIT, 0o755, ""),
        ] {
            let scratch = Scratch::new();
            repository(&scratch, PRE_COMMIT);
            let install_hook = || {
                scratch.write("hook", content);
                scratch.set_mode("hook", mode);
                scratch.must("cp -p hook project/.git/hooks/pre-commit");
            };
            let before = scratch.tree("project");
            // A setup script installs its hook at each start.
            for times in 0..3 {
                install_hook();
                for _ in 0..2 {
                    let ran = install(&scratch);
                    assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""), "{name}: {ran:?}");
                }
                let ran = (Some(0), format!("{}{expected}", own(&scratch)));
                assert_eq!(commit(&scratch, "project"), ran, "{name}, time {times}");
                assert_eq!(scratch.mode(&format!("project/{KEPT}")), mode, "{name}");
                scratch.must("cd project && git reset -q --hard HEAD~1");
                assert_eq!(scratch.tree("project"), before, "{name}");
            }
        }
    }

    fn scratch_hook(says: &str) -> String {
        format!("#!/bin/sh\necho {says} >>../ran\n")
    }

    #[test]
    fn links_are_kept_as_links_and_what_they_lead_to_is_left_alone() {
        for (target, expected) in
            [("../../scripts/check", "link "), ("../../.openhands/pre-commit.sh", ""), ("../../no/such/file", "")]
        {
            let scratch = Scratch::new();
            repository(&scratch, PRE_COMMIT);
            symlink(target, scratch.at("project/.git/hooks/pre-commit")).expect("a link");
            let before = scratch.tree("project");
            for _ in 0..2 {
                assert_eq!(install(&scratch).code, Some(0), "{target}");
            }
            assert_eq!(scratch.tree("project"), before, "{target}");
            let kept = std::fs::read_link(scratch.at(&format!("project/{KEPT}"))).expect("a link");
            assert_eq!(kept, std::path::Path::new(target));
            assert_eq!(commit(&scratch, "project"), (Some(0), format!("{}{expected}", own(&scratch))), "{target}");
        }
    }

    /// Tools that wrap hooks rename an existing hook and may call it.
    #[test]
    fn tools_that_wrap_hooks_and_ours_do_not_call_each_other_forever() {
        for kept_as in ["pre-commit.legacy", "pre-commit.old"] {
            let scratch = Scratch::new();
            repository(&scratch, PRE_COMMIT);
            // Like some real tools, it refuses a recursive call.
            let wrapper = format!(
                "#!/bin/sh\n[ -z \"$TOOL\" ] || exit 9\nexport TOOL=runs\nkept=$(dirname \"$0\")/{kept_as}\n[ ! -x \"$kept\" ] || \"$kept\" || exit\necho tool >>../ran\n"
            );
            scratch.write("tool", &wrapper);
            scratch.set_mode("tool", 0o755);
            for times in 0..3 {
                let hooks = "cd project/.git/hooks";
                scratch.must(&format!(
                    "{hooks}; if [ -e pre-commit ]; then mv pre-commit {kept_as}; fi; cp -p ../../../tool pre-commit"
                ));
                if times > 0 {
                    // Before this start installs its hook, the tool runs ours, which must not run the tool a second time.
                    let (code, ran) = commit(&scratch, "project");
                    assert_eq!((code, ran), (Some(0), format!("{}tool ", own(&scratch))), "{kept_as} {times}");
                }
                assert_eq!(install(&scratch).code, Some(0));
                assert_eq!(
                    commit(&scratch, "project"),
                    (Some(0), format!("{}tool ", own(&scratch))),
                    "{kept_as} {times}"
                );
                assert!(!scratch.at(&format!("project/.git/hooks/{kept_as}")).exists());
            }
        }
    }

    #[test]
    fn hooks_that_git_takes_from_elsewhere_are_left_alone_and_the_detail_says_so() {
        for (place, hooks_path) in [
            ("--local", ".husky"),
            ("--local", ".githooks"),
            ("--local", ".husky/_"),
            ("--global", ".husky"),
            ("--local", "{project}/.husky"),
            ("--local", "../hooks of all"),
            ("--global", "~/hooks"),
            ("--local", "/dev/null"),
            ("--local", "no/such/folder"),
        ] {
            let scratch = Scratch::new();
            repository(&scratch, PRE_COMMIT);
            for folder in ["hooks of all", "home/hooks"] {
                scratch.write(&format!("{folder}/pre-commit"), scratch_hook("theirs"));
                scratch.set_mode(&format!("{folder}/pre-commit"), 0o755);
            }
            let path = hooks_path.replace("{project}", &scratch.path("project"));
            scratch.must(&format!("cd project && git config {place} core.hooksPath '{path}'"));
            let before = scratch.tree("project");
            for _ in 0..2 {
                let ran = install(&scratch);
                assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
                let shown = path.replace('~', &scratch.path("home"));
                let own = shown.trim_end_matches("/_");
                assert_eq!(
                    ran.stdout,
                    format!(
                        "openhands-note:.openhands/pre-commit.sh does not run at commits: git takes its hooks from {shown} (core.hooksPath). Call it from {own}/pre-commit, or unset core.hooksPath\n"
                    )
                );
                assert_eq!(scratch.tree("project"), before, "{path}");
                assert_eq!(scratch.read("hooks of all/pre-commit"), scratch_hook("theirs"));
                assert!(!scratch.at("hooks of all/pre-commit.local").exists());
            }
            // The hook is installed, so it becomes effective when the path is unset.
            scratch.must(&format!("cd project && git config {place} --unset core.hooksPath"));
            assert_eq!(commit(&scratch, "project"), (Some(0), own(&scratch)), "{path}");
        }
    }

    #[test]
    fn a_hooks_path_that_leads_to_the_script_needs_no_note() {
        for (hooks_path, file) in [
            (".git/hooks", ".husky/x"),
            ("{project}/.git/hooks", ".husky/x"),
            (".githooks", ".githooks/pre-commit"),
            (".husky/_", ".husky/pre-commit"),
        ] {
            let scratch = Scratch::new();
            repository(&scratch, PRE_COMMIT);
            scratch.write(&format!("project/{file}"), "#!/bin/sh\n. .openhands/pre-commit.sh\n");
            let path = hooks_path.replace("{project}", &scratch.path("project"));
            scratch.must(&format!("cd project && git config core.hooksPath '{path}'"));
            let ran = install(&scratch);
            assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""), "{ran:?}");
        }
    }

    #[test]
    fn a_folder_of_hooks_that_is_a_link_into_the_project_is_left_alone() {
        for target in ["../.githooks", "../.husky", "{elsewhere}"] {
            let scratch = Scratch::new();
            repository(&scratch, PRE_COMMIT);
            scratch.write("elsewhere/pre-commit", scratch_hook("theirs"));
            let target = target.replace("{elsewhere}", &scratch.path("elsewhere"));
            scratch.must("rm -rf project/.git/hooks");
            symlink(&target, scratch.at("project/.git/hooks")).expect("a link");
            let before = scratch.tree("project");
            let ran = install(&scratch);
            assert_eq!(ran.code, Some(0), "{ran:?}");
            assert!(ran.stdout.starts_with("openhands-note:") && ran.stdout.contains("is a link to"), "{ran:?}");
            assert_eq!(scratch.tree("project"), before);
            assert_eq!(scratch.read("elsewhere/pre-commit"), scratch_hook("theirs"));
        }
    }

    #[test]
    fn worktrees_and_submodules_have_the_hook_in_their_git_directory() {
        let scratch = Scratch::new();
        repository(&scratch, PRE_COMMIT);
        scratch.must("mv project main && cd main && git worktree add -q ../project && git -c protocol.file.allow=always submodule --quiet add ../main sub 2>/dev/null; git reset -q --hard HEAD; git -C ../main -c protocol.file.allow=always submodule --quiet add -f ../main sub");
        assert!(scratch.at("project/.git").is_file());
        let before = scratch.tree("project");
        let ran = install(&scratch);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""), "{ran:?}");
        assert_eq!(scratch.tree("project"), before);
        assert!(scratch.at("main/.git/hooks/pre-commit").is_file());
        assert_eq!(commit(&scratch, "project"), (Some(0), own(&scratch)));
        let ran = scratch.run(&script(&scratch.path("main/sub")));
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""), "{ran:?}");
        assert!(scratch.at("main/.git/modules/sub/hooks/pre-commit").is_file());
        let ran = scratch.run("cd main/sub && date >>file && git add file && git commit -q -m Next && cat ../ran");
        assert_eq!(ran.stdout, format!("own .openhands/pre-commit.sh {}\n", scratch.path("main/sub")), "{ran:?}");
    }

    #[test]
    fn nothing_is_installed_without_a_script_and_a_foreign_repository_is_not_touched() {
        let scratch = Scratch::new();
        repository(&scratch, PRE_COMMIT);
        scratch.must("cd project && git rm -rq .openhands && git commit -q -m Gone");
        assert_eq!(install(&scratch).code, Some(0));
        assert!(!scratch.at("project/.git/hooks/pre-commit").exists());
        scratch.write("project/inner/.openhands/pre-commit.sh", PRE_COMMIT);
        let ran = scratch.run(&script(&scratch.path("project/inner")));
        assert_eq!(
            (ran.code, ran.stderr.as_str()),
            (Some(1), "the project is not a repository of its own\n"),
            "{ran:?}"
        );
        assert!(!scratch.at("project/.git/hooks/pre-commit").exists());
    }

    /// Hooks of the reference and of earlier versions have the same mark.
    #[test]
    fn an_earlier_hook_of_ours_is_replaced() {
        let scratch = Scratch::new();
        repository(&scratch, PRE_COMMIT);
        let earlier = "#!/bin/sh\n# This hook was installed by OpenHands. It runs\nif [ -x .openhands/pre-commit.sh ]; then exec .openhands/pre-commit.sh; fi\n";
        scratch.write("project/.git/hooks/pre-commit", earlier);
        install(&scratch);
        assert!(!scratch.at(&format!("project/{KEPT}")).exists());
        assert_eq!(scratch.mode("project/.git/hooks/pre-commit"), 0o755);
        assert_eq!(commit(&scratch, "project"), (Some(0), own(&scratch)));
        // The branch that is checked out lacks the script: the earlier hook still runs.
        scratch.write(&format!("project/{KEPT}"), scratch_hook("kept"));
        scratch.set_mode(&format!("project/{KEPT}"), 0o755);
        scratch.must("cd project && rm -r .openhands");
        assert_eq!(commit(&scratch, "project"), (Some(0), "kept ".to_owned()));
    }

    const EARLIER: [&str; 2] = [
        "#!/bin/sh\n# This hook was installed by OpenHands. It runs the project's own .openhands/pre-commit.sh.\nif [ -x .openhands/pre-commit.sh ]; then exec .openhands/pre-commit.sh; fi\n",
        "#!/bin/sh\n# This hook was installed by OpenHands. It runs the project's own, and then pre-commit.local,\nexec .git/hooks/pre-commit.local\n",
    ];

    fn executable(scratch: &Scratch, file: &str, content: &str) {
        scratch.write(file, content);
        scratch.set_mode(file, 0o755);
    }

    /// Makes a commit with a time limit, because the hooks might call each other forever.
    fn limited_commit(scratch: &Scratch) -> (Option<i32>, String) {
        let ran =
            scratch.run("cd project && : >../ran && date >>file && git add file && timeout 20 git commit -q -m Next");
        (ran.code, scratch.read("ran").replace('\n', " "))
    }

    #[test]
    fn a_hook_that_calls_pre_commit_local_still_finds_it() {
        for shell in shells() {
            for call in [
                "exec .git/hooks/pre-commit.local\n",
                "exec \"$(dirname \"$0\")/pre-commit.local\" \"$@\"\n",
                "for hook in .git/hooks/pre-commit.*; do case $hook in *.sample) ;; *) \"$hook\" || exit ;; esac; done\n",
                "for hook in .git/hooks/pre-commit?*; do case $hook in *.sample) ;; *) \"$hook\" || exit ;; esac; done\n",
                // The kept hook calls the hook that git calls.
                "[ -z \"$AGAIN\" ] || exit 0; AGAIN=1 .git/hooks/pre-commit; exec .git/hooks/pre-commit.local\n",
            ] {
                let scratch = Scratch::with(&shell);
                repository(&scratch, PRE_COMMIT);
                for _ in 0..3 {
                    executable(
                        &scratch,
                        "project/.git/hooks/pre-commit",
                        &format!("#!/bin/sh\necho tool >>../ran\n{call}"),
                    );
                    executable(&scratch, "project/.git/hooks/pre-commit.local", &scratch_hook("users"));
                    for _ in 0..2 {
                        assert_eq!(install(&scratch).code, Some(0), "{call}");
                    }
                    assert_eq!(scratch.read("project/.git/hooks/pre-commit.local"), scratch_hook("users"), "{call}");
                    let expected = format!("{}tool users ", own(&scratch));
                    assert_eq!(limited_commit(&scratch), (Some(0), expected), "{call}");
                }
            }
        }
    }

    #[test]
    fn nothing_that_is_in_the_folder_of_hooks_is_overwritten() {
        // A folder has the name that earlier versions gave kept hooks.
        let scratch = Scratch::new();
        repository(&scratch, PRE_COMMIT);
        scratch.write("project/.git/hooks/pre-commit.local/users", "its");
        executable(&scratch, "project/.git/hooks/pre-commit", &scratch_hook("tool"));
        assert_eq!(install(&scratch).code, Some(0));
        assert_eq!(limited_commit(&scratch), (Some(0), format!("{}tool ", own(&scratch))));
        assert_eq!(scratch.read("project/.git/hooks/pre-commit.local/users"), "its");
        // A tool writes a different hook each time: the newest one runs, and the others are kept.
        for name in ["two", "three"] {
            executable(&scratch, "project/.git/hooks/pre-commit", &scratch_hook(name));
            for _ in 0..2 {
                assert_eq!(install(&scratch).code, Some(0));
            }
            assert_eq!(limited_commit(&scratch), (Some(0), format!("{}{name} ", own(&scratch))));
        }
        assert_eq!(scratch.read(&format!("project/{KEPT}.1")), scratch_hook("tool"));
        assert_eq!(scratch.read(&format!("project/{KEPT}.2")), scratch_hook("two"));
        assert!(!scratch.at(&format!("project/{KEPT}.3")).exists());
        // The paths of the hook and of the kept hook are folders.
        let scratch = Scratch::new();
        repository(&scratch, PRE_COMMIT);
        scratch.write("project/.git/hooks/pre-commit/users", "its");
        scratch.write(&format!("project/{KEPT}/users"), "kept");
        assert_eq!(install(&scratch).code, Some(0));
        assert_eq!(limited_commit(&scratch), (Some(0), own(&scratch)));
        assert_eq!(scratch.read(&format!("project/{KEPT}/users")), "its");
        assert_eq!(scratch.read(&format!("project/{KEPT}.1/users")), "kept");
    }

    #[test]
    fn what_an_earlier_version_kept_goes_on() {
        for earlier in EARLIER {
            // The files are in the state that the earlier version created.
            let scratch = Scratch::new();
            repository(&scratch, PRE_COMMIT);
            executable(&scratch, "project/.git/hooks/pre-commit", earlier);
            executable(&scratch, "project/.git/hooks/pre-commit.local", &scratch_hook("kept"));
            for _ in 0..2 {
                assert_eq!(install(&scratch).code, Some(0));
                assert!(!scratch.at("project/.git/hooks/pre-commit.local").exists());
                assert_eq!(limited_commit(&scratch), (Some(0), format!("{}kept ", own(&scratch))));
            }
            // A hook that the user adds later stays.
            executable(&scratch, "project/.git/hooks/pre-commit.local", &scratch_hook("users"));
            assert_eq!(install(&scratch).code, Some(0));
            assert_eq!(scratch.read("project/.git/hooks/pre-commit.local"), scratch_hook("users"));
            // The setup script has installed its hook again, and that hook calls the name that the earlier version gave it.
            let scratch = Scratch::new();
            repository(&scratch, PRE_COMMIT);
            let tool = "#!/bin/sh\necho tool >>../ran\nif [ -x .git/hooks/pre-commit.local ]; then exec .git/hooks/pre-commit.local; fi\n";
            for name in ["pre-commit", "pre-commit.local"] {
                executable(&scratch, &format!("project/.git/hooks/{name}"), tool);
            }
            assert_eq!(install(&scratch).code, Some(0));
            assert_eq!(limited_commit(&scratch), (Some(0), format!("{}tool ", own(&scratch))));
            // One of our hooks has the name of the kept hook.
            executable(&scratch, &format!("project/{KEPT}"), earlier);
            assert_eq!(limited_commit(&scratch), (Some(0), own(&scratch)));
        }
    }

    #[test]
    fn what_an_earlier_version_replaced_in_a_project_s_folder_of_hooks_is_restored() {
        let husky = "echo husky >>../ran\n";
        for (hooks_path, tracked, kept, expected) in [
            // The project's own hook, unchanged since its commit.
            (".husky", Some(husky), Some(husky), Some(husky)),
            ("{project}/.husky", Some(husky), Some(husky), Some(husky)),
            // A hook that was changed before the earlier version replaced it.
            (".husky", Some(husky), Some("echo changed\n"), Some("echo changed\n")),
            (".husky", Some(husky), None, Some(husky)),
            // A hook that is not in the repository.
            (".husky/_", None, Some("echo tool\n"), Some("echo tool\n")),
            ("../elsewhere", None, Some("echo theirs\n"), Some("echo theirs\n")),
            (".husky/_", None, None, None),
            // A hook of the earlier version that an agent committed.
            (".husky", Some(EARLIER[0]), Some(husky), Some(husky)),
        ] {
            let scratch = Scratch::new();
            repository(&scratch, PRE_COMMIT);
            let path = hooks_path.replace("{project}", &scratch.path("project"));
            let file = if hooks_path.starts_with('{') {
                "project/.husky/pre-commit".to_owned()
            } else {
                format!("project/{path}/pre-commit")
            };
            if let Some(tracked) = tracked {
                scratch.write(&file, tracked);
                scratch.set_mode(&file, 0o644);
                scratch.must("cd project && git add -A && git commit -q --allow-empty -m Hooks");
            }
            let clean = scratch.must("git -C project status --porcelain");
            let mode = tracked.map(|_| scratch.mode(&file));
            scratch.must(&format!("git -C project config core.hooksPath '{path}'"));
            executable(&scratch, &file, EARLIER[0]);
            if let Some(kept) = kept {
                executable(&scratch, &format!("{file}.local"), kept);
            }
            let ran = install(&scratch);
            assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{hooks_path}: {ran:?}");
            let notes: Vec<&str> = ran.stdout.lines().collect();
            assert!(notes.len() == 2 && notes[0].contains("is the project's own again"), "{ran:?}");
            assert!(notes[1].contains("core.hooksPath"), "{ran:?}");
            assert_eq!(scratch.at(&file).exists(), expected.is_some());
            assert_eq!(scratch.read(&file), expected.unwrap_or_default());
            assert!(!scratch.at(&format!("{file}.local")).exists());
            if tracked == expected {
                assert_eq!(scratch.must("git -C project status --porcelain"), clean, "{hooks_path}");
                assert!(mode.is_none_or(|mode| mode == scratch.mode(&file)));
            }
            assert_eq!(install(&scratch).stdout.lines().count(), 1);
        }
    }

    #[test]
    fn a_tracked_file_that_has_the_name_of_a_kept_hook_stays() {
        let scratch = Scratch::new();
        repository(&scratch, PRE_COMMIT);
        scratch.write("project/.husky/pre-commit.local", "users\n");
        scratch.must("cd project && git add -A && git commit -q -m Local && git config core.hooksPath .husky");
        executable(&scratch, "project/.husky/pre-commit", EARLIER[0]);
        assert_eq!(install(&scratch).code, Some(0));
        assert_eq!(scratch.must("git -C project status --porcelain"), "");
    }

    #[test]
    fn an_empty_hooks_path_is_called_so() {
        for place in ["--local", "--global"] {
            let scratch = Scratch::new();
            repository(&scratch, PRE_COMMIT);
            scratch.must(&format!("git -C project config {place} core.hooksPath ''"));
            let ran = install(&scratch);
            assert_eq!(
                ran.stdout,
                "openhands-note:.openhands/pre-commit.sh does not run at commits: core.hooksPath is empty, so that git runs no hooks. Unset it\n"
            );
        }
    }
}
