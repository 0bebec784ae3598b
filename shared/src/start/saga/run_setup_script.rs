//! RUNNING_SETUP_SCRIPT: `.openhands/setup.sh` of the project, if there is one.

use super::command::{OneCommand, complaint, quoted};
use super::{Step, StepError, Work};
use crate::start::store::Change;
use crate::start::task::StartStatus;

impl Work<'_> {
    pub(super) async fn run_setup_script(&mut self) -> Result<Step, StepError> {
        let Some((sandbox, agent_server)) = self.running_sandbox().await? else { return Ok(Step::Wait) };
        let folders = self.folders(&sandbox).await?;
        // With bash, as its users expect; the agent server's own shell is a plain POSIX one.
        let script = format!(
            "cd {} || exit 1\nif [ -f .openhands/setup.sh ]; then chmod +x .openhands/setup.sh && exec bash .openhands/setup.sh; fi\n",
            quoted(&folders.project_dir)
        );
        let timeout = self.saga.config.setup_script_timeout;
        let command = OneCommand { name: "setup-script", script: &script, finally: "", timeout };
        let Some(output) = self.run_once(&agent_server, &folders, command).await? else {
            return Ok(Step::Wait);
        };
        let mut change = Change::default();
        if output.exit_code != 0 {
            // The conversation is still worth having: the agent can look at what went wrong.
            let note = format!(".openhands/setup.sh failed: {}", complaint(&output));
            self.task.record.notes.push(note.clone());
            change = change.note(note);
        }
        Ok(Step::Next(StartStatus::SettingUpGitHooks, change))
    }
}
