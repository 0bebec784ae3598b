//! The names of the files in a conversation's workspace.

use std::time::Duration;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use http::{HeaderName, HeaderValue};
use shared::agent_server::AgentServerError;
use shared::conversation::workspace::{ResolvedPath, Workspace};
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::pydantic::query::Query;
use shared::shell::quoted;

use crate::{Context, ConversationPath, conversation, inside, upstream};

/// Whether there are more files than are named: `true`, or the header is absent.
const TRUNCATED: HeaderName = HeaderName::from_static("x-files-truncated");
/// The most names.
const MAX_FILES: usize = 5000;
/// Of their names together, in bytes: the agent server keeps what commands print.
const MAX_NAMES: usize = 512 * 1024;
/// A workspace may be large.
const LIST: Duration = Duration::from_secs(15);

pub(crate) async fn files(
    State(context): State<Context>,
    Caller(user): Caller,
    path: ConversationPath,
    RawQuery(query): RawQuery,
) -> Result<Response> {
    let id = conversation(path)?;
    let given = Query::parse(query.as_deref()).string("path").filter(|path| !path.is_empty());
    let inside = inside(context.places.find(&user, id).await?, id)?;
    let listed = context.within(list(&inside, given.as_deref())).await.map_err(|error| upstream(&error))??;
    let mut answer = Json(&listed.names).into_response();
    if listed.truncated {
        answer.headers_mut().insert(TRUNCATED, HeaderValue::from_static("true"));
    }
    Ok(answer)
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Listed {
    names: Vec<String>,
    truncated: bool,
}

/// The files below a folder, by their paths from there: the conversation's folder, or one that is named from there or from the
/// root. Links are named and not followed; git's own files are left out.
async fn list(inside: &Workspace, given: Option<&str>) -> Result<Result<Listed>, AgentServerError> {
    let folder = match given {
        Some(given) if given.starts_with('/') => inside.path(given),
        given => inside.path(&format!("{}/{}", inside.folder().await?, given.unwrap_or_default())),
    };
    let Some(folder) = folder else {
        return Ok(Err(Error::Refused("The path must be in the workspace".to_owned())));
    };
    let folder = match inside.look(&folder).await? {
        ResolvedPath::Folder(folder) => folder,
        ResolvedPath::Outside => return Ok(Err(Error::Refused("The path must be in the workspace".to_owned()))),
        ResolvedPath::File(_) | ResolvedPath::Nothing(_) => {
            return Ok(Err(Error::NotFound("There is no such folder".to_owned())));
        }
    };
    let output = inside.agent_server.run_command(&find(&folder), LIST).await?;
    if output.exit_code != 0 {
        return Err(AgentServerError::malformed("POST /api/bash/execute_bash_command", "files were not listed"));
    }
    Ok(Ok(read(&output.stdout)))
}

/// A command that prints the names, one a line, and `end` behind all of them. Names with line breaks are left out.
fn find(folder: &str) -> String {
    format!(
        "cd {} || exit 1\nlisted=$(find . -name .git -prune -o ! -type d ! -name '*\n*' -print 2>/dev/null | head -n {} | head -c {})\n\
         printf '%s\\nend\\n' \"$listed\"",
        quoted(folder),
        MAX_FILES + 1,
        MAX_NAMES + 1,
    )
}

fn read(output: &str) -> Listed {
    let names = output.strip_suffix("\nend\n").or_else(|| output.strip_suffix("\nend")).unwrap_or(output);
    let too_long = names.len() > MAX_NAMES;
    let mut names: Vec<String> =
        names.lines().filter_map(|name| name.strip_prefix("./")).map(ToOwned::to_owned).collect();
    if too_long {
        // The last one may be cut off.
        names.pop();
    }
    let truncated = too_long || names.len() > MAX_FILES;
    names.truncate(MAX_FILES);
    names.sort_unstable();
    Listed { names, truncated }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn files_are_named_from_the_folder_up_to_a_bound() {
        let folder = std::env::temp_dir().join(shared::id::new_sandbox_id());
        for path in ["a/b", ".git/objects", "it's", "a/sub/.git"] {
            std::fs::create_dir_all(folder.join(path)).expect("a folder");
        }
        for path in ["a/b/c.txt", ".git/config", "it's/$(x)", ".hidden", "end", "new\nline", "a/sub/.git/config"] {
            std::fs::write(folder.join(path), "").expect("a file");
        }
        std::os::unix::fs::symlink("/etc", folder.join("link")).expect("a link");
        let list = || {
            let ran = Command::new("sh").arg("-c").arg(find(&folder.display().to_string())).output().expect("run");
            assert!(ran.status.success(), "{ran:?}");
            read(&String::from_utf8(ran.stdout).expect("text"))
        };
        assert_eq!(
            list(),
            Listed {
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

        assert_eq!(read("\nend\n"), Listed::default());
        let long = format!("./{}\n./{}", "x".repeat(MAX_NAMES - 6), "cut");
        assert_eq!(read(&long), Listed { names: vec!["x".repeat(MAX_NAMES - 6)], truncated: true });
    }
}
