//! Git changes and diffs of a workspace, computed by git inside its sandbox, with the same result on every version of the agent server.
//!
//! The agent server's own git routes are not used: they omit files, fail on some file names, and access the network, and each version
//! differs.
//!
//! A request is one shell command (`git/*.sh`). Its result is a file in the sandbox; a short result is printed as base64, because agent
//! servers store the output of commands, split it into pieces, and replace bytes that are not UTF-8.

mod name;
mod text;

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use super::workspace::path_in_workspace;
use crate::agent_server::{AgentServer, AgentServerError};
use crate::error::Error;
use crate::http::page::{PAGE_SIZE, size_of, size_of_text};
use crate::mask;
use crate::shell::quoted;

const COMMON: &str = include_str!("git/common.sh");
const CHANGES: &str = include_str!("git/changes.sh");
const DIFF: &str = include_str!("git/diff.sh");
const RUN: &str = include_str!("git/run.sh");
/// The time limit of git, in seconds. A workspace may be large.
const SECONDS: u64 = 14;
/// The timeout after which the agent server stops a script that has not stopped itself.
const TIMEOUT: Duration = Duration::from_secs(SECONDS + 1);
const CLEANUP: Duration = Duration::from_secs(5);
/// The largest result, in bytes, that is printed. Agent servers never remove the output of commands, and search through all of it.
const INLINE: usize = 32 * 1024;
/// The longest list, in bytes of names and statuses.
const LIST_LIMIT: usize = 4 * 1024 * 1024;
/// The largest file that has a diff, and the most bytes of both sides together. As JSON they may be larger: see [`PAGE_SIZE`].
const FILE_LIMIT: usize = 5_000_000;
/// The most nested repositories that are listed with a folder. Each one requires several processes.
const NESTED: usize = 50;
/// The longest path and the longest `ref`, in bytes, because the length of a command is limited.
const ARGUMENT_LIMIT: usize = 16 * 1024;
/// The number of characters of git's own error message that are shown.
const REASON: usize = 500;
const REQUEST: &str = "POST /api/bash/execute_bash_command";

type Asked<T> = Result<Result<T, Error>, AgentServerError>;

/// The name of a repository in a folder (empty for the folder's own repository), and its changes by path.
type Repository = (Vec<u8>, BTreeMap<Vec<u8>, Status>);

/// Runs git in a workspace.
#[derive(Clone, Copy, Debug)]
pub struct WorkspaceGit<'a> {
    pub agent_server: &'a AgentServer,
    /// The absolute path of the workspace.
    pub root: &'a str,
}

/// A file that has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(as = GitChange))]
pub struct Change {
    pub status: Status,
    /// The path relative to the requested folder. A name that is not UTF-8 is in double quotes, as git quotes it.
    pub path: String,
}

/// How a file has changed. A renamed file is deleted and added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "UPPERCASE")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(as = GitChangeStatus))]
pub enum Status {
    /// It is new.
    Added,
    /// It has other contents, another mode, or is of another kind.
    Updated,
    /// It is gone.
    Deleted,
}

/// The changes in a folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Sorted by path.
    pub list: Vec<Change>,
    /// Whether the list is incomplete.
    pub is_truncated: bool,
}

/// A file before and after the change. Both texts are null for a file outside every repository.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(as = GitDiff))]
pub struct Diff {
    /// The current text; empty if the file was deleted.
    pub modified: Option<String>,
    /// The original text; empty if the file is new.
    pub original: Option<String>,
}

impl WorkspaceGit<'_> {
    /// Lists the files below the folder at an absolute path that have changed since `reference`, or by default since the work began.
    ///
    /// # Errors
    /// The outer error when the agent server does not respond; the inner error when there is no list.
    pub async fn changes(&self, folder: &str, reference: Option<&str>) -> Asked<Changes> {
        let script = match self.changes_script(folder, reference) {
            Ok(script) => script,
            Err(refused) => return Ok(Err(refused)),
        };
        Ok(match self.run(&script, LIST_LIMIT).await? {
            Ok(result) => read_changes(&result, reference),
            Err(refused) => Err(refused),
        })
    }

    /// Compares the file at an absolute path with its version at `reference`, or by default with its version when the work began.
    ///
    /// # Errors
    /// The outer error when the agent server does not respond; the inner error when there is no diff.
    pub async fn diff(&self, file: &str, reference: Option<&str>) -> Asked<Diff> {
        let script = match self.diff_script(file, reference) {
            Ok(script) => script,
            Err(refused) => return Ok(Err(refused)),
        };
        Ok(match self.run(&script, FILE_LIMIT + 1024).await? {
            Ok(result) => read_diff(&result, reference),
            Err(refused) => Err(refused),
        })
    }

    fn changes_script(&self, folder: &str, reference: Option<&str>) -> Result<String, Error> {
        let rest = self.below_root(folder)?;
        let variables = format!("rest={} limit={LIST_LIMIT} most={NESTED}\n", quoted(&rest));
        self.script(reference, &variables, CHANGES)
    }

    fn diff_script(&self, file: &str, reference: Option<&str>) -> Result<String, Error> {
        let rest = self.below_root(file)?;
        // The path may be quoted in git's format: it may come from a list that an agent server made, or may not be UTF-8.
        let other = name::unquoted_end(&rest).filter(|path| is_below(path)).unwrap_or_default();
        let names = [rest.as_bytes(), &other];
        if rest.is_empty() {
            return Err(folder());
        }
        if names.iter().any(|path| path.split(|byte| *byte == b'/').any(|part| part == b".git")) {
            return Err(Error::Refused("Git's own files have no diff; choose another file".to_owned()));
        }
        let variables = format!("rest={} limit={FILE_LIMIT}\n{}", quoted(&rest), name::assigned("other", &other));
        self.script(reference, &variables, DIFF)
    }

    /// Builds the command: the variables of both scripts, the script's own variables, and the script.
    fn script(&self, reference: Option<&str>, variables: &str, script: &str) -> Result<String, Error> {
        let reference = reference.unwrap_or_default();
        if reference.starts_with('-') || reference.contains('\0') || reference.len() > ARGUMENT_LIMIT {
            return Err(unknown(Some(reference)));
        }
        let body = quoted(&(code(COMMON) + &code(script)));
        Ok(format!(
            "root={} ref={} inline={INLINE} seconds={SECONDS}\n{variables}export root ref inline seconds rest limit most other\n\
             body={body}\n{}",
            quoted(self.root),
            quoted(reference),
            code(RUN)
        ))
    }

    /// Path traversal check: returns the path relative to the workspace, without empty segments and `.` segments.
    fn below_root(&self, path: &str) -> Result<String, Error> {
        let root = self.root.trim_end_matches('/');
        let path = path_in_workspace(root, path).filter(|path| path.len() <= ARGUMENT_LIMIT).ok_or_else(outside)?;
        let rest = path.strip_prefix(root).unwrap_or_default();
        let parts: Vec<&str> = rest.split('/').filter(|part| !matches!(*part, "" | ".")).collect();
        Ok(parts.join("/"))
    }

    /// Runs a script and returns its result, of at most `limit` bytes.
    async fn run(&self, script: &str, limit: usize) -> Asked<Vec<u8>> {
        let output = self.agent_server.run_command(script, TIMEOUT).await?;
        match (output.exit_code, output.stdout.split_once('\n')) {
            (0, Some(("inline", text))) => {
                let text: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
                let decoded = STANDARD.decode(text);
                decoded.map(Ok).map_err(|_| AgentServerError::malformed(REQUEST, "the result is not base64"))
            }
            (0, Some((line, _))) if line.starts_with("file /") => {
                let path = &line["file ".len()..];
                let Some(folder) = path.strip_suffix("/result").filter(|folder| folder.contains("/openhands-git."))
                else {
                    return Err(AgentServerError::malformed(REQUEST, "the result is somewhere else"));
                };
                let result = self.agent_server.download(path, limit).await;
                // If this fails, a later script removes the folder.
                if let Err(error) = self.agent_server.run_command(&format!("rm -rf {}", quoted(folder)), CLEANUP).await
                {
                    tracing::info!(%error, "git.result_not_removed");
                }
                result?.map(Ok).ok_or_else(|| AgentServerError::malformed(REQUEST, "the result is too long"))
            }
            // The agent server has stopped the script, or the script's own time limit has killed it.
            (-1 | 124 | 137, _) => Ok(Err(Error::Unavailable(format!(
                "Git did not finish within {SECONDS} s in this sandbox; try again, or choose a smaller folder"
            )))),
            (3, _) => Ok(Err(Error::Conflict(
                "The sandbox has no space or no folder for temporary files; free some space and try again".to_owned(),
            ))),
            _ => Err(AgentServerError::malformed(REQUEST, "git was not asked")),
        }
    }
}

/// Removes comments and indentation from a script, because agent servers store every command.
fn code(script: &str) -> String {
    let lines = script.lines().map(str::trim_start).filter(|line| !line.starts_with('#') && !line.is_empty());
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// Path traversal check: whether a path below the workspace stays below it.
fn is_below(path: &[u8]) -> bool {
    !path.contains(&0)
        && path.len() <= ARGUMENT_LIMIT
        && path.split(|byte| *byte == b'/').all(|part| !matches!(part, b"" | b"." | b".."))
}

fn outside() -> Error {
    Error::Refused("The path must be absolute and inside the workspace".to_owned())
}

fn folder() -> Error {
    Error::Refused("The path is a folder; choose a file for a diff".to_owned())
}

fn unknown(reference: Option<&str>) -> Error {
    let shown: String = reference.unwrap_or_default().chars().take(REASON).collect();
    Error::Refused(format!("The ref {shown:?} is not a commit of this repository"))
}

fn failed(what: &str, reason: &[u8]) -> Error {
    let reason = String::from_utf8_lossy(reason);
    let secrets: Vec<String> = reason.split_whitespace().flat_map(|word| mask::secrets_in(&word.into())).collect();
    let masked = mask::masked(&reason, secrets.iter().map(String::as_str));
    let reason: String = masked.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(REASON).collect();
    Error::Conflict(format!("{what}: {reason}"))
}

/// Converts an outcome that both scripts can have in place of a result.
fn refused(word: &[u8], reason: &[u8], reference: Option<&str>, what: &str) -> Error {
    match word {
        b"outside" => outside(),
        b"unknown" => unknown(reference),
        b"failed" => failed(what, reason),
        word => Error::internal(format!("a script of git's ended with {:?}", String::from_utf8_lossy(word))),
    }
}

fn read_changes(result: &[u8], reference: Option<&str>) -> Result<Changes, Error> {
    const WHAT: &str = "Git cannot list the changes";
    // The text after the last NUL may be a truncated name, so it is ignored.
    let mut fields = result.split_inclusive(|byte| *byte == 0).filter_map(|field| field.strip_suffix(&[0]));
    let mut repositories: Vec<Repository> = Vec::new();
    let mut is_truncated = true;
    let mut are_skipped = false;
    let mut failure = None;
    while let Some(word) = fields.next() {
        match (word, repositories.last_mut()) {
            (b"repository", _) => repositories.push((fields.next().unwrap_or_default().to_vec(), BTreeMap::new())),
            (b"changed", Some((_, changes))) => {
                while let Some(status) = fields.next().filter(|status| !status.is_empty()) {
                    let Some(path) = fields.next() else { break };
                    let status = match status {
                        b"A" => Status::Added,
                        b"D" => Status::Deleted,
                        _ => Status::Updated,
                    };
                    // Git lists a file with a merge conflict twice: as unmerged, and with its difference from the base.
                    changes.entry(path.to_vec()).and_modify(|earlier| *earlier = status).or_insert(status);
                }
            }
            (b"untracked", Some((_, changes))) => {
                while let Some(path) = fields.next().filter(|path| !path.is_empty()) {
                    // The file was removed from the index (`git rm --cached`) and still exists.
                    changes
                        .entry(path.to_vec())
                        .and_modify(|status| *status = Status::Updated)
                        .or_insert(Status::Added);
                }
            }
            // The other repositories in the folder are listed without this one.
            (b"failed", Some((name, _))) if !name.is_empty() => {
                repositories.pop();
                failure.get_or_insert(failed(WHAT, fields.next().unwrap_or_default()));
            }
            (b"failed", _) => return Err(failed(WHAT, fields.next().unwrap_or_default())),
            (b"skipped", _) => are_skipped = true,
            (b"more", _) => break,
            (b"end", _) => {
                is_truncated = false;
                break;
            }
            (b"nothing", _) => return Err(Error::NotFound("The folder does not exist".to_owned())),
            (b"file", _) => return Err(Error::Refused("The path is not a folder".to_owned())),
            (word, _) => return Err(refused(word, fields.next().unwrap_or_default(), reference, WHAT)),
        }
    }
    is_truncated |= failure.is_some();
    match failure {
        Some(failure) if repositories.is_empty() => Err(failure),
        None if are_skipped && repositories.is_empty() => Err(unknown(reference)),
        _ => Ok(fitting(merged(repositories), is_truncated)),
    }
}

/// Merges the changes of a folder's own repository and of its nested repositories. A nested repository's files appear only in its own list.
fn merged(repositories: Vec<Repository>) -> Vec<Change> {
    let nested: Vec<Vec<u8>> =
        repositories.iter().map(|(name, _)| name.clone()).filter(|name| !name.is_empty()).collect();
    // Git lists an untracked repository with a trailing slash. The commit of a submodule belongs to the outer repository.
    let is_of_nested = |path: &[u8]| {
        nested.iter().any(|name| path.strip_prefix(name.as_slice()).is_some_and(|rest| rest.starts_with(b"/")))
    };
    let mut list = Vec::new();
    for (repository, changes) in repositories {
        for (mut path, status) in changes {
            if repository.is_empty() && is_of_nested(&path) {
                continue;
            }
            if path.ends_with(b"/") {
                path.pop();
            }
            if !repository.is_empty() {
                path = [repository.as_slice(), &path].join(&b'/');
            }
            list.push(Change { status, path: name::shown(path) });
        }
    }
    list.sort_by(|one, other| one.path.cmp(&other.path));
    list
}

/// Truncates the list to what one response can hold.
fn fitting(mut list: Vec<Change>, is_truncated: bool) -> Changes {
    let mut size = 0;
    let fit = list.iter().take_while(|change| {
        // The JSON of an item is `{"status":"UPDATED","path":…},`, with escaped quotes.
        size += 40 + serde_json::to_string(&change.path).map_or(0, |path| size_of_text(path.as_bytes()));
        size <= PAGE_SIZE
    });
    let fit = fit.count();
    let is_truncated = is_truncated || fit < list.len();
    list.truncate(fit);
    Changes { list, is_truncated }
}

fn read_diff(result: &[u8], reference: Option<&str>) -> Result<Diff, Error> {
    const WHAT: &str = "Git cannot compare this file";
    let (word, rest) = field(result);
    if word != b"diff" {
        let (reason, _) = field(rest);
        return match word {
            b"none" => Ok(Diff::default()),
            b"nothing" => {
                let at = reference.map_or_else(|| "when the work began".to_owned(), |name| format!("at {name}"));
                Err(Error::NotFound(format!("The file exists neither now nor {at}")))
            }
            b"folder" => Err(folder()),
            b"special" => {
                Err(Error::Refused("The path is neither a file nor a link, but a pipe, socket or device".to_owned()))
            }
            b"unreadable" => Err(Error::Conflict("The file cannot be read by the sandbox's user".to_owned())),
            b"large" => {
                let sizes = String::from_utf8_lossy(reason);
                let (before, after) = sizes.split_once(' ').unwrap_or_default();
                Err(too_large(before, after))
            }
            word => Err(refused(word, reason, reference, WHAT)),
        };
    }
    let (kind_before, rest) = field(rest);
    let (size_before, rest) = field(rest);
    let (kind_after, rest) = field(rest);
    let (size_after, contents) = field(rest);
    let number = |field: &[u8]| std::str::from_utf8(field).ok().and_then(|text| text.parse::<usize>().ok());
    let (Some(before), Some(after)) = (number(size_before), number(size_after)) else {
        return Err(Error::internal("the result of a diff has no sizes"));
    };
    if before.checked_add(after) != Some(contents.len()) {
        return Err(Error::internal("the result of a diff has other sizes than it says"));
    }
    let (original, modified) = contents.split_at(before);
    let read = |kind: &[u8], bytes: &[u8]| match kind {
        b"file" => text::decoded(bytes),
        // The target of a link is a path, so it may contain any bytes.
        _ => Some(String::from_utf8_lossy(bytes).into_owned()),
    };
    let (Some(original), Some(modified)) = (read(kind_before, original), read(kind_after, modified)) else {
        return Err(Error::Refused(format!(
            "The file is binary ({before} bytes before, {after} bytes now), so it has no text diff"
        )));
    };
    let diff = Diff { modified: Some(modified), original: Some(original) };
    if size_of(&diff)? > PAGE_SIZE { Err(too_large(&before.to_string(), &after.to_string())) } else { Ok(diff) }
}

/// Splits the first NUL-terminated field from the rest.
fn field(bytes: &[u8]) -> (&[u8], &[u8]) {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    (&bytes[..end], bytes.get(end + 1..).unwrap_or_default())
}

fn too_large(before: &str, after: &str) -> Error {
    Error::TooLarge(format!(
        "The file is too large for a diff: {before} bytes before, {after} bytes now; together they must not exceed {PAGE_SIZE} \
         bytes as JSON"
    ))
}

#[cfg(test)]
mod tests;
