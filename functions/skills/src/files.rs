//! Lists the files in a conversation's workspace.

use std::time::Duration;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use http::{HeaderName, HeaderValue};
use shared::agent_server::AgentServerError;
use shared::conversation::workspace::{ResolvedPath, Workspace};
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::extract::ConversationId;
use shared::http::pydantic::query::Query;
use shared::shell::quoted;

use crate::{Context, upstream, workspace_or_error};

/// Whether the list was truncated: `true`, or the header is absent.
const TRUNCATED: HeaderName = HeaderName::from_static("x-files-truncated");
const MAX_FILES: usize = 5000;
/// The total size of all names, in bytes: the agent server keeps the output of commands.
const MAX_NAMES: usize = 512 * 1024;
/// The timeout of the command. A workspace may be large.
const LIST_TIMEOUT: Duration = Duration::from_secs(15);

pub(crate) async fn files(
    State(context): State<Context>,
    Caller(user): Caller,
    ConversationId(id): ConversationId,
    RawQuery(query): RawQuery,
) -> Result<Response> {
    let given = Query::parse(query.as_deref()).string("path").filter(|path| !path.is_empty());
    let workspace = workspace_or_error(context.locator.find(&user, id).await?, id)?;
    let listed = context.within(list(&workspace, given.as_deref())).await.map_err(|error| upstream(&error))??;
    let mut response = Json(&listed.names).into_response();
    if listed.truncated {
        response.headers_mut().insert(TRUNCATED, HeaderValue::from_static("true"));
    }
    Ok(response)
}

#[derive(Debug, Default, PartialEq, Eq)]
struct FileList {
    names: Vec<String>,
    truncated: bool,
}

/// Lists the files below a folder by their relative paths. The folder is the conversation's, unless `given` names another one by an
/// absolute path or a path relative to it. Links are listed and not followed; git's own files are excluded.
async fn list(workspace: &Workspace, given: Option<&str>) -> Result<Result<FileList>, AgentServerError> {
    let folder = match given {
        Some(given) if given.starts_with('/') => workspace.path(given),
        given => workspace.path(&format!("{}/{}", workspace.folder().await?, given.unwrap_or_default())),
    };
    let Some(folder) = folder else {
        return Ok(Err(Error::Refused("The path must be inside the workspace".to_owned())));
    };
    let folder = match workspace.look(&folder).await? {
        ResolvedPath::Folder(folder) => folder,
        ResolvedPath::Outside => return Ok(Err(Error::Refused("The path must be inside the workspace".to_owned()))),
        ResolvedPath::File(_) | ResolvedPath::Nothing(_) => {
            return Ok(Err(Error::NotFound("The folder does not exist".to_owned())));
        }
    };
    let output = workspace.agent_server.run_command(&find_command(&folder), LIST_TIMEOUT).await?;
    if output.exit_code != 0 {
        return Err(AgentServerError::malformed("POST /api/bash/execute_bash_command", "files were not listed"));
    }
    Ok(Ok(read(&output.stdout)))
}

/// A command that prints one name per line, and `end` after the last one. Names with line breaks are excluded.
fn find_command(folder: &str) -> String {
    format!(
        "cd {} || exit 1\nlisted=$(find . -name .git -prune -o ! -type d ! -name '*\n*' -print 2>/dev/null | head -n {} | head -c {})\n\
         printf '%s\\nend\\n' \"$listed\"",
        quoted(folder),
        MAX_FILES + 1,
        MAX_NAMES + 1,
    )
}

fn read(output: &str) -> FileList {
    let names = output.strip_suffix("\nend\n").or_else(|| output.strip_suffix("\nend")).unwrap_or(output);
    let too_long = names.len() > MAX_NAMES;
    let mut names: Vec<String> =
        names.lines().filter_map(|name| name.strip_prefix("./")).map(ToOwned::to_owned).collect();
    if too_long {
        // The last name may be incomplete.
        names.pop();
    }
    let truncated = too_long || names.len() > MAX_FILES;
    names.truncate(MAX_FILES);
    names.sort_unstable();
    FileList { names, truncated }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn files_are_listed_by_relative_paths_up_to_a_limit() {
        let folder = std::env::temp_dir().join(shared::id::new_sandbox_id());
        for path in ["a/b", ".git/objects", "it's", "a/sub/.git"] {
            std::fs::create_dir_all(folder.join(path)).expect("a folder");
        }
        for path in ["a/b/c.txt", ".git/config", "it's/$(x)", ".hidden", "end", "new\nline", "a/sub/.git/config"] {
            std::fs::write(folder.join(path), "").expect("a file");
        }
        std::os::unix::fs::symlink("/etc", folder.join("link")).expect("a link");
        let list = || {
            let ran =
                Command::new("sh").arg("-c").arg(find_command(&folder.display().to_string())).output().expect("run");
            assert!(ran.status.success(), "{ran:?}");
            read(&String::from_utf8(ran.stdout).expect("text"))
        };
        assert_eq!(
            list(),
            FileList {
                names: [".hidden", "a/b/c.txt", "end", "it's/$(x)", "link"].map(str::to_owned).to_vec(),
                truncated: false
            }
        );
        let many = folder.join("many");
        std::fs::create_dir(&many).expect("a folder");
        for number in 0..=MAX_FILES {
            std::fs::write(many.join(number.to_string()), "").expect("a file");
        }
        let listed = list();
        assert_eq!((listed.names.len(), listed.truncated), (MAX_FILES, true));
        std::fs::remove_dir_all(folder).expect("removed");

        assert_eq!(read("\nend\n"), FileList::default());
        let long = format!("./{}\n./{}", "x".repeat(MAX_NAMES - 6), "cut");
        assert_eq!(read(&long), FileList { names: vec!["x".repeat(MAX_NAMES - 6)], truncated: true });
    }
}
