//! SETTING_UP_GIT_HOOKS: `.openhands/pre-commit.sh` of the project becomes git's pre-commit hook.

use super::command::{OneCommand, complaint, quoted};
use super::{Step, StepError, Work};
use crate::start::store::Change;
use crate::start::task::StartStatus;

/// Tells our hook from one that was there before; the reference marks its hooks with the same words.
const MARK: &str = "This hook was installed by OpenHands";

impl Work<'_> {
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
        if output.exit_code != 0 {
            let note = format!("The git hook of .openhands/pre-commit.sh was not installed: {}", complaint(&output));
            self.task.record.notes.push(note.clone());
            change = change.note(note);
        }
        Ok(Step::Next(StartStatus::SettingUpSkills, change))
    }
}

fn script(project_dir: &str) -> String {
    let hook = format!(
        "#!/bin/sh\n# {MARK}. It runs the project's own .openhands/pre-commit.sh.\n\
         cd \"$(git rev-parse --show-toplevel)\" || exit 1\n\
         if [ -x .openhands/pre-commit.sh ]; then exec .openhands/pre-commit.sh; fi\n\
         echo 'warning: .openhands/pre-commit.sh is missing or not executable; nothing was checked' >&2\n"
    );
    format!(
        "cd {} || exit 1\n[ -f .openhands/pre-commit.sh ] || exit 0\nset -e\nchmod +x .openhands/pre-commit.sh\n\
         hooks=$(git rev-parse --git-path hooks)\nmkdir -p \"$hooks\"\n\
         if [ -f \"$hooks/pre-commit\" ] && ! grep -qF {} \"$hooks/pre-commit\"; then\n  \
         mv \"$hooks/pre-commit\" \"$hooks/pre-commit.local\"\n  chmod +x \"$hooks/pre-commit.local\"\nfi\n\
         printf %s {} >\"$hooks/pre-commit.new\"\nchmod +x \"$hooks/pre-commit.new\"\nmv \"$hooks/pre-commit.new\" \"$hooks/pre-commit\"\n",
        quoted(project_dir),
        quoted(MARK),
        quoted(&hook),
    )
}
