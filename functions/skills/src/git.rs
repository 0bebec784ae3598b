//! Changes and diffs of a conversation's workspace, from git in its sandbox.

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use shared::agent_server::{AgentServerError, Failure};
use shared::conversation::git::WorkspaceGit;
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::extract::ConversationId;
use shared::http::pydantic::query::Query;
use shared::http::truncated::changes_response;
use shared::user::UserId;
use uuid::Uuid;

use crate::{Context, upstream, workspace_or_error};

pub(crate) async fn changes(
    State(context): State<Context>,
    Caller(user): Caller,
    ConversationId(id): ConversationId,
    RawQuery(query): RawQuery,
) -> Result<Response> {
    let request = GitRequest::read(id, query.as_deref())?;
    let reference = request.reference.as_deref();
    let changes =
        context.git(&user, &request, async |git: WorkspaceGit<'_>, path: &str| git.changes(path, reference).await);
    let changes = changes.await?;
    Ok(changes_response(&changes.list, changes.is_truncated))
}

pub(crate) async fn diff(
    State(context): State<Context>,
    Caller(user): Caller,
    ConversationId(id): ConversationId,
    RawQuery(query): RawQuery,
) -> Result<Response> {
    let request = GitRequest::read(id, query.as_deref())?;
    let reference = request.reference.as_deref();
    let diff = context.git(&user, &request, async |git: WorkspaceGit<'_>, path: &str| git.diff(path, reference).await);
    Ok(Json(diff.await?).into_response())
}

/// The parameters of both routes.
struct GitRequest {
    conversation: Uuid,
    path: String,
    reference: Option<String>,
}

impl GitRequest {
    fn read(conversation: Uuid, query: Option<&str>) -> Result<Self> {
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
        request: &GitRequest,
        run: impl AsyncFnOnce(WorkspaceGit<'_>, &str) -> Result<Result<T>, AgentServerError>,
    ) -> Result<T> {
        let workspace = workspace_or_error(self.locator.find(user, request.conversation).await?, request.conversation)?;
        let result = self.within(async {
            let git = WorkspaceGit { agent_server: &workspace.agent_server, root: workspace.root() };
            // A relative path is one from a list of changes.
            if request.path.starts_with('/') {
                run(git, &request.path).await
            } else {
                run(git, &format!("{}/{}", workspace.folder().await?, request.path)).await
            }
        });
        match result.await {
            Ok(result) => result,
            Err(error @ AgentServerError { failure: Failure::Unreachable, .. }) => {
                tracing::warn!(conversation = %request.conversation, %error, "git.request_failed");
                Err(Error::NotFound("The agent server cannot be reached".to_owned()))
            }
            Err(error) => Err(upstream(&error)),
        }
    }
}
