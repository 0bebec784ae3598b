//! Returns a text file of a conversation's workspace. The response is always 200 and a JSON string, as clients expect; a header explains an
//! empty one.

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use http::{HeaderName, HeaderValue};
use shared::agent_server::{AgentServerError, Failure};
use shared::conversation::workspace::{ResolvedPath, Workspace, WorkspaceLookup};
use shared::error::Result;
use shared::http::caller::Caller;
use shared::http::extract::ConversationId;
use shared::http::pydantic::query::Query;

use crate::Context;

const STATUS: HeaderName = HeaderName::from_static("x-file-status");
/// The largest file, in bytes, and the largest JSON string made of it: Lambda returns up to 6 MB.
const LIMIT: usize = 5 * 1024 * 1024;
/// The path of a conversation's plan in its folder.
const OWN_PLAN: &str = ".agents_tmp/PLAN.md";
/// The path of the plan in the workspace, as the contract has it.
const COMMON_PLAN: &str = "PLAN.md";

/// The outcome of a request for a file: the values of the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FileStatus {
    Ok,
    Missing,
    Unreachable,
    NotText,
    TooLarge,
    OutsideWorkspace,
    NotRunning,
    NoConversation,
}

impl FileStatus {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Missing => "missing",
            Self::Unreachable => "unreachable",
            Self::NotText => "not-text",
            Self::TooLarge => "too-large",
            Self::OutsideWorkspace => "outside-workspace",
            Self::NotRunning => "not-running",
            Self::NoConversation => "no-conversation",
        }
    }
}

pub(crate) async fn file(
    State(context): State<Context>,
    Caller(user): Caller,
    ConversationId(id): ConversationId,
    RawQuery(query): RawQuery,
) -> Result<Response> {
    let given = Query::parse(query.as_deref()).string("file_path");
    let read = match context.locator.find(&user, id).await? {
        WorkspaceLookup::NoConversation => Err(FileStatus::NoConversation),
        WorkspaceLookup::NoSandbox | WorkspaceLookup::NotRunning(_) => Err(FileStatus::NotRunning),
        WorkspaceLookup::NoAddresses | WorkspaceLookup::NoAgentServer => Err(FileStatus::Unreachable),
        WorkspaceLookup::Found(workspace) => {
            context.within(read(&workspace, given.as_deref())).await.unwrap_or_else(|error| {
                tracing::warn!(conversation = %id, %error, "file.read_failed");
                Err(FileStatus::Unreachable)
            })
        }
    };
    let (status, text) = match read {
        Ok(text) => (FileStatus::Ok, text),
        Err(status) => (status, String::new()),
    };
    Ok(([(STATUS, HeaderValue::from_static(status.as_str()))], Json(text)).into_response())
}

/// Reads the requested file or, without one, the first plan that exists.
async fn read(workspace: &Workspace, given: Option<&str>) -> Result<Result<String, FileStatus>, AgentServerError> {
    if let Some(given) = given {
        return read_at(workspace, workspace.path(given)).await;
    }
    let own = workspace.path(&format!("{}/{OWN_PLAN}", workspace.folder().await?));
    match read_at(workspace, own).await? {
        Err(FileStatus::Missing | FileStatus::OutsideWorkspace) => {
            read_at(workspace, workspace.path(&format!("{}/{COMMON_PLAN}", workspace.root()))).await
        }
        read => Ok(read),
    }
}

async fn read_at(workspace: &Workspace, path: Option<String>) -> Result<Result<String, FileStatus>, AgentServerError> {
    let Some(path) = path else { return Ok(Err(FileStatus::OutsideWorkspace)) };
    let path = match workspace.look(&path).await? {
        ResolvedPath::File(path) => path,
        ResolvedPath::Folder(_) | ResolvedPath::Nothing(_) => return Ok(Err(FileStatus::Missing)),
        ResolvedPath::Outside => return Ok(Err(FileStatus::OutsideWorkspace)),
    };
    match workspace.agent_server.download(&path, LIMIT).await {
        Ok(Some(bytes)) => Ok(text(bytes)),
        Ok(None) => Ok(Err(FileStatus::TooLarge)),
        // The file was removed meanwhile, or is a pipe, socket or device.
        Err(AgentServerError { failure: Failure::Status(status, _), .. }) if matches!(status.as_u16(), 400 | 404) => {
            Ok(Err(FileStatus::Missing))
        }
        Err(error) => Err(error),
    }
}

fn text(bytes: Vec<u8>) -> Result<String, FileStatus> {
    let text = String::from_utf8(bytes).map_err(|_| FileStatus::NotText)?;
    // Escapes make the JSON string longer than the text.
    let length: usize = text.bytes().map(escaped_length).sum();
    if length > LIMIT { Err(FileStatus::TooLarge) } else { Ok(text) }
}

fn escaped_length(byte: u8) -> usize {
    match byte {
        b'"' | b'\\' | 0x08 | b'\t' | b'\n' | 0x0c | b'\r' => 2,
        0..=0x1f => 6,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_a_text_is_that_of_its_json() {
        let all: String = (0..=0x7f_u8).map(char::from).chain("é€😀".chars()).collect();
        let expected = serde_json::to_string(&all).expect("JSON").len() - 2;
        assert_eq!(all.bytes().map(escaped_length).sum::<usize>(), expected);
        assert_eq!(text(vec![b'x'; LIMIT]).map(|text| text.len()), Ok(LIMIT));
        assert_eq!(text(vec![b'\n'; LIMIT / 2 + 1]), Err(FileStatus::TooLarge));
        assert_eq!(text(vec![0xff]), Err(FileStatus::NotText));
    }
}
