//! The skills that apply to a conversation.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderName, HeaderValue};
use serde_json::{Value, json};
use shared::agent_server::{SkillInfo, SkillsQuery};
use shared::error::Result;
use shared::http::caller::Caller;

use crate::{Context, ConversationPath, conversation, workspace_or_legacy_error};

/// What an empty list means: `ok`, `not-running`, `unreachable`.
const STATUS: HeaderName = HeaderName::from_static("x-skills-status");

pub(crate) async fn skills(
    State(context): State<Context>,
    Caller(user): Caller,
    path: ConversationPath,
) -> Result<Response> {
    let id = conversation(path)?;
    let place = context.places.find(&user, id).await?;
    let inside = match workspace_or_legacy_error(place, id, || answer("not-running", &[])) {
        Ok(inside) => inside,
        Err(error) => return Ok(*error),
    };
    let asked = context.within(async {
        let query = SkillsQuery {
            project_dir: inside.folder().await?,
            sandbox_config: inside.sandbox.exposed_urls.as_ref().map(|urls| json!({"exposed_urls": urls})),
        };
        inside.agent_server.skills(&query).await
    });
    Ok(match asked.await {
        Ok(skills) => answer("ok", &skills),
        Err(error) => {
            tracing::warn!(conversation = %id, %error, "skills.not_loaded");
            answer("unreachable", &[])
        }
    })
}

fn answer(status: &'static str, skills: &[SkillInfo]) -> Response {
    let skills: Vec<Value> = skills.iter().map(shown).collect();
    ([(STATUS, HeaderValue::from_static(status))], Json(json!({"skills": skills}))).into_response()
}

fn shown(skill: &SkillInfo) -> Value {
    let kind = match (skill.is_agentskills_format, skill.triggers.is_empty()) {
        (true, _) => "agentskills",
        (false, true) => "repo",
        (false, false) => "knowledge",
    };
    json!({"name": skill.name, "type": kind, "content": skill.content, "triggers": skill.triggers})
}
