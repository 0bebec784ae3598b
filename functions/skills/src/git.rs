//! What git says of a conversation's workspace: the agent server's own JSON.

use axum::Json;
use axum::extract::{RawQuery, State};
use serde_json::value::RawValue;
use shared::agent_server::{AgentServer, AgentServerError, Failure};
use shared::conversation::place::Found;
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::query::Query;
use shared::user::UserId;
use uuid::Uuid;

use crate::{Context, ConversationPath, conversation, inside, upstream};

pub(crate) async fn changes(
    State(context): State<Context>,
    Caller(user): Caller,
    path: ConversationPath,
    RawQuery(query): RawQuery,
) -> Result<Json<Box<RawValue>>> {
    let asked = Asked::read(path, query.as_deref())?;
    context
        .git(&user, &asked, async |agent_server: &AgentServer, path: &str| {
            agent_server.git_changes(path, asked.reference.as_deref(), context.budget).await
        })
        .await
}

pub(crate) async fn diff(
    State(context): State<Context>,
    Caller(user): Caller,
    path: ConversationPath,
    RawQuery(query): RawQuery,
) -> Result<Json<Box<RawValue>>> {
    let asked = Asked::read(path, query.as_deref())?;
    context
        .git(&user, &asked, async |agent_server: &AgentServer, path: &str| {
            agent_server.git_diff(path, asked.reference.as_deref(), context.budget).await
        })
        .await
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
    async fn git(
        &self,
        user: &UserId,
        asked: &Asked,
        ask: impl AsyncFnOnce(&AgentServer, &str) -> Result<Box<RawValue>, AgentServerError>,
    ) -> Result<Json<Box<RawValue>>> {
        let inside = inside(self.places.find(user, asked.conversation).await?, asked.conversation)?;
        let outside = || Error::Refused("The path must be absolute, and in the workspace".to_owned());
        let answered = self.within(async {
            // Relative ones are those that the changes name.
            let path = match asked.path.starts_with('/') {
                true => inside.path(&asked.path),
                false => inside.path(&format!("{}/{}", inside.folder().await?, asked.path)),
            };
            let Some(path) = path else { return Ok(Err(outside())) };
            match inside.look(&path).await? {
                Found::Outside => Ok(Err(outside())),
                // What was deleted differs from what was committed, too.
                Found::File(path) | Found::Folder(path) | Found::Nothing(path) => {
                    ask(&inside.agent_server, &path).await.map(Ok)
                }
            }
        });
        match answered.await {
            Ok(answer) => answer.map(Json),
            Err(error @ AgentServerError { failure: Failure::Unreachable, .. }) => {
                tracing::warn!(conversation = %asked.conversation, %error, "git.not_asked");
                Err(Error::NotFound("The agent server cannot be reached".to_owned()))
            }
            Err(error) => Err(upstream(&error)),
        }
    }
}
