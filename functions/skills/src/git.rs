//! What has changed in a conversation's workspace, by git in its sandbox.

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use shared::agent_server::{AgentServerError, Failure};
use shared::conversation::git::WorkspaceGit;
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::pydantic::query::Query;
use shared::http::truncated::changes_response;
use shared::user::UserId;
use uuid::Uuid;

use crate::{Context, ConversationPath, conversation, inside, upstream};

pub(crate) async fn changes(
    State(context): State<Context>,
    Caller(user): Caller,
    path: ConversationPath,
    RawQuery(query): RawQuery,
) -> Result<Response> {
    let asked = Asked::read(path, query.as_deref())?;
    let reference = asked.reference.as_deref();
    let changes =
        context.git(&user, &asked, async |git: WorkspaceGit<'_>, path: &str| git.changes(path, reference).await);
    let changes = changes.await?;
    Ok(changes_response(&changes.list, changes.is_truncated))
}

pub(crate) async fn diff(
    State(context): State<Context>,
    Caller(user): Caller,
    path: ConversationPath,
    RawQuery(query): RawQuery,
) -> Result<Response> {
    let asked = Asked::read(path, query.as_deref())?;
    let reference = asked.reference.as_deref();
    let diff = context.git(&user, &asked, async |git: WorkspaceGit<'_>, path: &str| git.diff(path, reference).await);
    Ok(Json(diff.await?).into_response())
}

/// What a request asks for.
struct Asked {
    conversation: Uuid,
    path: String,
    reference: Option<String>,
}

impl Asked {
    fn read(path: ConversationPath, query: Option<&str>) -> Result<Self> {
        let conversation = conversation(path)?;
        let mut query = Query::parse(query);
        let path = query.required_string("path");
        let reference = query.string("ref").filter(|reference| !reference.is_empty());
        query.finish().map_err(Error::Invalid)?;
        Ok(Self { conversation, path, reference })
    }
}

impl Context {
    async fn git<T>(
        &self,
        user: &UserId,
        asked: &Asked,
        ask: impl AsyncFnOnce(WorkspaceGit<'_>, &str) -> Result<Result<T>, AgentServerError>,
    ) -> Result<T> {
        let inside = inside(self.places.find(user, asked.conversation).await?, asked.conversation)?;
        let answered = self.within(async {
            let git = WorkspaceGit { agent_server: &inside.agent_server, root: inside.root() };
            // Relative paths are those that the changes name.
            if asked.path.starts_with('/') {
                ask(git, &asked.path).await
            } else {
                ask(git, &format!("{}/{}", inside.folder().await?, asked.path)).await
            }
        });
        match answered.await {
            Ok(answer) => answer,
            Err(error @ AgentServerError { failure: Failure::Unreachable, .. }) => {
                tracing::warn!(conversation = %asked.conversation, %error, "git.request_failed");
                Err(Error::NotFound("The agent server cannot be reached".to_owned()))
            }
            Err(error) => Err(upstream(&error)),
        }
    }
}
