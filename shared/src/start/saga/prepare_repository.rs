//! PREPARING_REPOSITORY: the repository is cloned and its branch checked out, or an empty one made.
//!
//! Tokens go into a file of git's credential store, not into a command: the agent server logs and keeps commands. The
//! clone's own configuration never holds them, and the file is gone when the command ends.

use secrecy::SecretString;

use super::command::{OneCommand, complaint, quoted};
use super::{Folders, Step, StepError, Work};
use crate::id;
use crate::start::store::Change;
use crate::start::task::StartStatus;
use crate::user::git::{CloneSource, clone_sources};
use crate::user::settings::Settings;

/// Marks the line of the output that says whether there is a browser.
const BROWSER: &str = "openhands-browser:";

impl Work<'_> {
    pub(super) async fn prepare_repository(&mut self) -> Result<Step, StepError> {
        let Some((sandbox, agent_server)) = self.running_sandbox().await? else { return Ok(Step::Wait) };
        let folders = self.folders(&sandbox).await?;
        let settings = self.settings().await?;
        let repository = self.task.request.selected_repository.clone().filter(|name| !name.is_empty());
        let sources = match &repository {
            None => Vec::new(),
            Some(name) => {
                let insecure = self.saga.config.allow_insecure_git_access;
                clone_sources(name, self.task.request.git_provider, &settings.provider_tokens, insecure)
                    .map_err(|error| StepError::Refused(error.to_string()))?
            }
        };
        let credentials = format!("{}/credentials", folders.state);
        // Only while the clone is not under way: what is written later would stay.
        if self.task.record.command.is_none() && sources.iter().any(|source| source.credential.is_some()) {
            let prepare = format!("umask 077; mkdir -p {}", quoted(&folders.state));
            let timeout = self.saga.config.clone_timeout;
            let started = agent_server.start_command(&prepare, &folders.parent, timeout).await?;
            while agent_server.command_output(&started).await?.is_none() {
                tokio::time::sleep(self.saga.config.poll / 4).await;
            }
            agent_server.upload(&credentials, &credential_lines(&sources)).await?;
        }
        let script = self.script(&folders, &settings, repository.as_deref(), &sources, &credentials);
        let timeout = self.saga.config.clone_timeout;
        // By every copy: one that only waited may have come with credentials of its own.
        let finally = format!("rm -f {}", quoted(&credentials));
        let command = OneCommand { name: "prepare-repository", script: &script, finally: &finally, timeout };
        let Some(output) = self.run_once(&agent_server, &folders, command).await? else {
            return Ok(Step::Wait);
        };
        if output.exit_code != 0 {
            let what = match &repository {
                Some(name) => format!("The repository {name} could not be prepared"),
                None => "The workspace could not be prepared".to_owned(),
            };
            let text = format!("{what}: {}", complaint(&output));
            return Err(if repository.is_some() { StepError::Refused(text) } else { StepError::Fatal(text) });
        }
        let browser = output.stdout.lines().any(|line| line == format!("{BROWSER}yes"));
        self.task.record.browser = Some(browser);
        let change = Change::default().set("browser", aws_sdk_dynamodb::types::AttributeValue::Bool(browser));
        Ok(Step::Next(StartStatus::RunningSetupScript, change))
    }

    fn script(
        &self,
        folders: &Folders,
        settings: &Settings,
        repository: Option<&str>,
        sources: &[CloneSource],
        credentials: &str,
    ) -> String {
        let working_dir = quoted(&folders.working_dir);
        let project_dir = quoted(&folders.project_dir);
        let mut script = format!("{AGAIN}set -e\nmkdir -p {working_dir}\ncd {working_dir}\n");
        let identity = [("user.name", &settings.git_user_name), ("user.email", &settings.git_user_email)];
        for (key, value) in identity {
            if let Some(value) = value.as_deref().filter(|value| !value.trim().is_empty()) {
                script += &format!(
                    "again 20 git config --global {key} {} || echo 'git identity was not set' >&2\n",
                    quoted(value)
                );
            }
        }
        script += BROWSER_PROBE;
        if repository.is_none() {
            if self.saga.config.init_git_in_empty_workspace {
                script += "command -v git >/dev/null || exit 0\n[ -e .git ] || again 20 git init -q\n";
                script += &trust(&working_dir);
            }
            return script;
        }
        // A clone that was cut off is in the temporary folder, which is made anew; the final name appears with all in it.
        let temporary = quoted(&format!("{}/clone", folders.state));
        script += &format!(
            "credentials={credentials}\ntrap 'rm -f \"$credentials\"' EXIT\nexport GIT_TERMINAL_PROMPT=0 GIT_ASKPASS=true\n\
             if [ ! -e {project_dir}/.git ]; then\n  cloned=\n",
            credentials = quoted(credentials),
        );
        for source in sources {
            let url = quoted(&source.url);
            script += &format!(
                "  if [ -z \"$cloned\" ]; then rm -rf {temporary}\n    \
                 if git -c credential.helper= -c credential.helper=\"store --file='$credentials'\" clone -q {url} {temporary}; then cloned=yes; fi; fi\n"
            );
        }
        script += &format!(
            "  [ -n \"$cloned\" ] || exit 1\n  if [ -e {project_dir}/.git ]; then rm -rf {temporary}; else\n    \
             if [ -d {project_dir} ]; then rmdir {project_dir}; fi\n    mv {temporary} {project_dir}\n  fi\nfi\n"
        );
        script += &trust(&project_dir);
        script += &format!("cd {project_dir}\n");
        // What was cloned earlier may be another repository of the same name. Its address is not shown: an agent may have
        // put a token into it. Without one it is what an agent made of it.
        let same: Vec<String> = sources.iter().flat_map(|source| endings(&source.url)).collect();
        script += &format!(
            "case \"$(git remote get-url origin 2>/dev/null)\" in ''|{}) ;; *) echo {} >&2; exit 1;; esac\n",
            same.join("|"),
            quoted(&format!("{} holds another repository; start in another sandbox", folders.project_dir))
        );
        match self.task.request.selected_branch.as_deref().filter(|branch| !branch.is_empty()) {
            // Already there: a second conversation in the same folder must not disturb the first.
            Some(branch) => {
                let branch = quoted(branch);
                script += &format!(
                    "if [ \"$(git symbolic-ref --short -q HEAD)\" != {branch} ]; then again 5 git checkout -q {branch} --; fi\n"
                );
            }
            None => {
                let name = quoted(&format!("openhands-workspace-{}", id::hex(self.task.record.conversation_id)));
                script += &format!(
                    "case \"$(git symbolic-ref --short -q HEAD)\" in openhands-workspace-*) ;; *) again 5 git checkout -q -b {name};; esac\n"
                );
            }
        }
        script
    }
}

/// Shell patterns for how the addresses of a repository end, whatever host alias, protocol or token is in front.
fn endings(url: &str) -> [String; 2] {
    let path = url.split_once("://").map_or(url, |(_, rest)| rest).split_once('/').map_or(url, |(_, path)| path);
    let path = path.trim_end_matches(".git");
    [format!("*[/:]{}", quoted(path)), format!("*[/:]{}", quoted(&format!("{path}.git")))]
}

/// git does not wait for its locks: of several starts in one sandbox at once, all but one would fail.
const AGAIN: &str = r#"again() {
  tries=$1; shift
  until "$@"; do tries=$((tries - 1)); [ "$tries" -gt 0 ] || return 1; sleep 0.1; done
}
"#;

/// git refuses to work in folders of other users; in a sandbox that is no danger, and common.
fn trust(folder: &str) -> String {
    format!(
        "git config --global --get-all safe.directory 2>/dev/null | grep -qxF {folder} || again 20 git config --global --add safe.directory {folder}\n"
    )
}

fn credential_lines(sources: &[CloneSource]) -> SecretString {
    let lines: Vec<&str> = sources
        .iter()
        .filter_map(|source| source.credential.as_ref())
        .map(secrecy::ExposeSecret::expose_secret)
        .collect();
    SecretString::from(format!("{}\n", lines.join("\n")))
}

/// Looks where the agent server's browser tool looks; without a browser the tool would make the whole start fail.
const BROWSER_PROBE: &str = r#"browser=no
for b in google-chrome chrome chromium chromium-browser; do
  if command -v "$b" >/dev/null 2>&1; then browser=yes; fi
done
for b in /usr/bin/google-chrome /usr/bin/google-chrome-stable /usr/bin/chromium /usr/bin/chromium-browser \
  "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome" /Applications/Chromium.app/Contents/MacOS/Chromium \
  "$HOME"/.cache/ms-playwright/chromium-*/chrome-linux*/chrome "$HOME"/Library/Caches/ms-playwright/chromium-*/chrome-mac*; do
  if [ -e "$b" ]; then browser=yes; fi
done
echo "openhands-browser:$browser"
"#;
