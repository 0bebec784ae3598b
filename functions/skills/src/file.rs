//! A text file of a conversation's workspace. Always 200 and a JSON string, as clients expect; a header says what an empty one
//! means.

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use http::{HeaderName, HeaderValue};
use shared::agent_server::{AgentServerError, Failure};
use shared::conversation::workspace::{ResolvedPath, Workspace, WorkspaceLookup};
use shared::error::Result;
use shared::http::caller::Caller;
use shared::http::pydantic::query::Query;

use crate::{Context, ConversationPath, conversation};

const STATUS: HeaderName = HeaderName::from_static("x-file-status");
/// The most bytes of a file, and of the JSON string that it becomes: Lambda answers up to 6 MB.
const LIMIT: usize = 5 * 1024 * 1024;
/// Where a conversation's plan is, in its folder.
const OWN_PLAN: &str = ".agents_tmp/PLAN.md";
/// Where the contract looks for one, in the workspace.
const COMMON_PLAN: &str = "PLAN.md";

/// What became of a request for a file: the values of the header.
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
    path: ConversationPath,
    RawQuery(query): RawQuery,
) -> Result<Response> {
    let id = conversation(path)?;
    let given = Query::parse(query.as_deref()).string("file_path");
    let read = match context.places.find(&user, id).await? {
        WorkspaceLookup::NoConversation => Err(FileStatus::NoConversation),
        WorkspaceLookup::NoSandbox | WorkspaceLookup::NotRunning(_) => Err(FileStatus::NotRunning),
        WorkspaceLookup::NoAddresses | WorkspaceLookup::NoAgentServer => Err(FileStatus::Unreachable),
        WorkspaceLookup::Found(inside) => {
            context.within(read(&inside, given.as_deref())).await.unwrap_or_else(|error| {
                tracing::warn!(conversation = %id, %error, "file.not_read");
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

/// The text of the file that is asked for, or of the first plan that is there.
async fn read(inside: &Workspace, given: Option<&str>) -> Result<Result<String, FileStatus>, AgentServerError> {
    if let Some(given) = given {
        return read_at(inside, inside.path(given)).await;
    }
    let own = inside.path(&format!("{}/{OWN_PLAN}", inside.folder().await?));
    match read_at(inside, own).await? {
        Err(FileStatus::Missing | FileStatus::OutsideWorkspace) => {
            read_at(inside, inside.path(&format!("{}/{COMMON_PLAN}", inside.root()))).await
        }
        read => Ok(read),
    }
}

async fn read_at(inside: &Workspace, path: Option<String>) -> Result<Result<String, FileStatus>, AgentServerError> {
    let Some(path) = path else { return Ok(Err(FileStatus::OutsideWorkspace)) };
    let path = match inside.look(&path).await? {
        ResolvedPath::File(path) => path,
        ResolvedPath::Folder(_) | ResolvedPath::Nothing(_) => return Ok(Err(FileStatus::Missing)),
        ResolvedPath::Outside => return Ok(Err(FileStatus::OutsideWorkspace)),
    };
    match inside.agent_server.download(&path, LIMIT).await {
        Ok(Some(bytes)) => Ok(text(bytes)),
        Ok(None) => Ok(Err(FileStatus::TooLarge)),
        // It went meanwhile, or is a pipe or something of that kind.
        Err(AgentServerError { failure: Failure::Status(status, _), .. }) if matches!(status.as_u16(), 400 | 404) => {
            Ok(Err(FileStatus::Missing))
        }
        Err(error) => Err(error),
    }
}

fn text(bytes: Vec<u8>) -> Result<String, FileStatus> {
    let text = String::from_utf8(bytes).map_err(|_| FileStatus::NotText)?;
    // What has to be escaped becomes longer.
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
    fn a_text_is_as_long_as_the_json_that_it_becomes() {
        let all: String = (0..=0x7f_u8).map(char::from).chain("é€😀".chars()).collect();
        let expected = serde_json::to_string(&all).expect("JSON").len() - 2;
        assert_eq!(all.bytes().map(escaped_length).sum::<usize>(), expected);
        assert_eq!(text(vec![b'x'; LIMIT]).map(|text| text.len()), Ok(LIMIT));
        assert_eq!(text(vec![b'\n'; LIMIT / 2 + 1]), Err(FileStatus::TooLarge));
        assert_eq!(text(vec![0xff]), Err(FileStatus::NotText));
    }
}
