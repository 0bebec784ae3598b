//! Locates the live workspace of a conversation (its sandbox, agent server and folder) and resolves paths in it, with a path traversal
//! check.

use std::sync::Arc;

use uuid::Uuid;

use super::ConversationRecord;
use super::store::ConversationStore;
use crate::agent_server::{AgentServer, AgentServerError};
use crate::error::Result;
use crate::http_client::HttpClient;
use crate::id::UserId;
use crate::sandbox::{Sandbox, SandboxService, SandboxStatus};
use crate::shell::quoted;

/// The path of the workspace that clients use, whatever its real path in the sandbox.
const KNOWN_AS: &str = "/workspace/project";
/// The timeout of a command or request that only reads.
const INSPECT_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Locates the workspaces of conversations.
#[derive(Clone, Debug)]
pub struct WorkspaceLocator {
    conversations: ConversationStore,
    sandboxes: Arc<dyn SandboxService>,
    http: HttpClient,
}

/// The result of locating a workspace.
#[derive(Clone, Debug)]
pub enum WorkspaceLookup {
    /// The user has no such conversation.
    NoConversation,
    /// The record of its sandbox no longer exists.
    NoSandbox,
    /// Its sandbox is not running.
    NotRunning(Box<Sandbox>),
    /// Its sandbox is running and has no exposed URLs.
    NoAddresses,
    /// Its sandbox is running, and none of its exposed URLs is an agent server's.
    NoAgentServer,
    /// Its sandbox is running and has an agent server.
    Found(Box<Workspace>),
}

/// The live workspace of a conversation.
#[derive(Clone, Debug)]
pub struct Workspace {
    pub record: ConversationRecord,
    /// The sandbox, which is running.
    pub sandbox: Sandbox,
    pub agent_server: AgentServer,
}

/// The result of resolving a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResolvedPath {
    /// A file, or anything else that is not a folder, at this path without links.
    File(String),
    /// A folder, at this path without links.
    Folder(String),
    /// Nothing exists at this path.
    Nothing(String),
    /// The path leads outside the workspace.
    Outside,
}

impl WorkspaceLocator {
    /// A locator on these records and sandboxes.
    #[must_use]
    pub fn new(conversations: ConversationStore, sandboxes: Arc<dyn SandboxService>, http: HttpClient) -> Self {
        Self { conversations, sandboxes, http }
    }

    /// Locates the workspace of one of the user's conversations.
    ///
    /// # Errors
    /// When the store or the sandbox provider does not respond.
    pub async fn find(&self, user: &UserId, conversation: Uuid) -> Result<WorkspaceLookup> {
        let Some(record) = self.conversations.get(user, conversation).await? else {
            return Ok(WorkspaceLookup::NoConversation);
        };
        let Some(sandbox) = self.sandboxes.get(user, &record.sandbox_id).await? else {
            return Ok(WorkspaceLookup::NoSandbox);
        };
        if sandbox.status != SandboxStatus::Running {
            return Ok(WorkspaceLookup::NotRunning(Box::new(sandbox)));
        }
        if sandbox.exposed_urls.as_ref().is_none_or(Vec::is_empty) {
            return Ok(WorkspaceLookup::NoAddresses);
        }
        Ok(match sandbox.agent_server(&self.http) {
            Some(agent_server) => WorkspaceLookup::Found(Box::new(Workspace { record, sandbox, agent_server })),
            None => WorkspaceLookup::NoAgentServer,
        })
    }
}

impl Workspace {
    /// The absolute path of the folder in which the conversation's agent works, as its agent server reports it. If the agent server does
    /// not have the conversation, the folder that it would have without grouping.
    ///
    /// # Errors
    /// When the agent server does not respond.
    pub async fn folder(&self) -> Result<String, AgentServerError> {
        let snapshot = self.agent_server.whole_conversation(self.record.id, INSPECT_TIMEOUT).await?;
        let folder = snapshot.as_ref().and_then(|snapshot| snapshot["workspace"]["working_dir"].as_str());
        let absolute = folder.filter(|folder| folder.starts_with('/')).map(|folder| folder.trim_end_matches('/'));
        Ok(absolute.map_or_else(|| self.usual_folder(), ToOwned::to_owned))
    }

    fn usual_folder(&self) -> String {
        let root = self.root();
        let repository = self.record.selected_repository.as_deref().and_then(|name| name.rsplit('/').next());
        repository.filter(|name| !name.is_empty()).map_or_else(|| root.to_owned(), |name| format!("{root}/{name}"))
    }

    /// The folder that contains all conversations of the sandbox.
    #[must_use]
    pub fn root(&self) -> &str {
        self.sandbox.working_dir.trim_end_matches('/')
    }

    /// Converts a client's path to an absolute path below the workspace in the sandbox; a textual path traversal check that does not follow
    /// links. Clients address the workspace as `/workspace/project`. `None` for an invalid path.
    #[must_use]
    pub fn path(&self, given: &str) -> Option<String> {
        path_in_workspace(self.root(), given)
    }

    /// Resolves a path that [`Workspace::path`] returned, and follows links.
    ///
    /// # Errors
    /// When the agent server does not respond.
    pub async fn look(&self, path: &str) -> Result<ResolvedPath, AgentServerError> {
        let output = self.agent_server.run_command(&look(self.root(), path), INSPECT_TIMEOUT).await?;
        let (kind, real) = output.stdout.split_once('\n').unwrap_or_default();
        // The dot protects a newline at the end of a name.
        let real = real.trim_end_matches('\n').strip_suffix('.').unwrap_or_default().to_owned();
        match kind {
            "file" if output.exit_code == 0 => Ok(ResolvedPath::File(real)),
            "folder" if output.exit_code == 0 => Ok(ResolvedPath::Folder(real)),
            "nothing" if output.exit_code == 0 => Ok(ResolvedPath::Nothing(real)),
            "outside" if output.exit_code == 0 => Ok(ResolvedPath::Outside),
            _ => Err(AgentServerError::malformed("POST /api/bash/execute_bash_command", "a path was not looked up")),
        }
    }
}

/// Path traversal check by text: converts a client's path to a path in the sandbox whose workspace is `root`; see [`Workspace::path`].
#[must_use]
pub fn path_in_workspace(root: &str, given: &str) -> Option<String> {
    if !given.starts_with('/') || given.contains('\0') || given.split('/').any(|part| part == "..") {
        return None;
    }
    let root = root.trim_end_matches('/');
    let below = |root: &str| given.strip_prefix(root).filter(|rest| rest.is_empty() || rest.starts_with('/'));
    let rest = below(root).or_else(|| below(KNOWN_AS))?;
    Some(format!("{root}{}", rest.trim_end_matches('/')))
}

/// A shell command that prints the kind of a path in the first line, and its real path in the rest.
///
/// A missing path is judged by its deepest existing ancestor.
fn look(root: &str, path: &str) -> String {
    format!(
        r#"root=$(readlink -f -- {root}) || exit 1
path={path} rest=
while [ ! -e "$path" ] && [ ! -L "$path" ]; do
  rest="/${{path##*/}}$rest" path=${{path%/*}}
  [ -n "$path" ] || path=/
done
real=$(readlink -f -- "$path" && echo .) || {{ echo outside; exit 0; }}
real=${{real%??}}
case "$real/" in "$root"/*) ;; *) echo outside; exit 0 ;; esac
if [ -n "$rest" ] || [ ! -e "$real" ]; then kind=nothing
elif [ -d "$real" ]; then kind=folder
else kind=file; fi
printf '%s\n%s.\n' "$kind" "$real$rest""#,
        root = quoted(root),
        path = quoted(path),
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    #[test]
    fn links_are_followed_and_lead_no_way_out() {
        let folder = std::env::temp_dir().join(crate::id::new_sandbox_id());
        let root = folder.join("root");
        std::fs::create_dir_all(root.join("a b/c")).expect("folders");
        std::fs::write(root.join("a b/it's $HOME"), "text").expect("a file");
        std::fs::write(root.join("new\nline\n"), "text").expect("a file");
        std::fs::write(folder.join("secret"), "text").expect("a file");
        std::fs::create_dir_all(folder.join("root-too")).expect("a folder");
        std::fs::write(folder.join("root-too/file"), "text").expect("a file");
        for (target, link) in [
            ("a b/c", "inwards"),
            ("../secret", "outwards"),
            ("..", "up"),
            ("/etc", "etc"),
            ("gone", "dangling"),
            ("../gone", "dangling-outwards"),
            ("loop", "loop"),
            ("../root-too/file", "neighbour"),
        ] {
            symlink(target, root.join(link)).expect("a link");
        }
        let real = folder.canonicalize().expect("a path").join("root");
        let at = |path: &str| real.join(path).display().to_string();
        let found = |path: &str| {
            let script = look(&root.display().to_string(), &root.join(path).display().to_string());
            let ran = Command::new("sh").arg("-c").arg(script).output().expect("run");
            assert!(ran.status.success(), "{path}: {ran:?}");
            String::from_utf8(ran.stdout).expect("text")
        };
        for (path, expected) in [
            ("a b/it's $HOME", format!("file\n{}.\n", at("a b/it's $HOME"))),
            ("new\nline\n", format!("file\n{}.\n", at("new\nline\n"))),
            ("a b", format!("folder\n{}.\n", at("a b"))),
            ("inwards", format!("folder\n{}.\n", at("a b/c"))),
            ("inwards/more/yet", format!("nothing\n{}.\n", at("a b/c/more/yet"))),
            ("none", format!("nothing\n{}.\n", at("none"))),
            ("dangling", format!("nothing\n{}.\n", at("gone"))),
            ("outwards", "outside\n".to_owned()),
            ("up", "outside\n".to_owned()),
            ("up/secret", "outside\n".to_owned()),
            ("up/none", "outside\n".to_owned()),
            ("etc/passwd", "outside\n".to_owned()),
            ("dangling-outwards", "outside\n".to_owned()),
            ("loop", "outside\n".to_owned()),
            ("neighbour", "outside\n".to_owned()),
        ] {
            assert_eq!(found(path), expected, "{path}");
        }
        std::fs::remove_dir_all(folder).expect("removed");
    }
}
