//! Returns the skills that apply to a conversation.

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use http::{HeaderName, HeaderValue};
use serde::Serialize;
use serde_json::json;
use shared::agent_server::{SkillInfo, SkillsQuery};
use shared::error::Result;
use shared::http::caller::Caller;
use shared::http::extract::ConversationId;

use crate::{Context, workspace_or_legacy_error};

/// Explains an empty list: `ok`, `not-running`, `unreachable`.
const STATUS: HeaderName = HeaderName::from_static("x-skills-status");

pub(crate) async fn skills(
    State(context): State<Context>,
    Caller(user): Caller,
    ConversationId(id): ConversationId,
) -> Result<Response> {
    let lookup = context.locator.find(&user, id).await?;
    let workspace = match workspace_or_legacy_error(lookup, id, || response("not-running", &[])) {
        Ok(workspace) => workspace,
        Err(error) => return Ok(*error),
    };
    let loaded = context.within(async {
        let query = SkillsQuery {
            project_dir: workspace.folder().await?,
            sandbox_config: workspace.sandbox.exposed_urls.as_ref().map(|urls| json!({"exposed_urls": urls})),
            ..SkillsQuery::default()
        };
        workspace.agent_server.skills(&query).await
    });
    Ok(match loaded.await {
        Ok(skills) => response("ok", &skills),
        Err(error) => {
            tracing::warn!(conversation = %id, %error, "skills.load_failed");
            response("unreachable", &[])
        }
    })
}

/// The skills that apply to a conversation.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Skills))]
pub struct SkillsOut<'a> {
    skills: Vec<SkillOut<'a>>,
}

/// A skill.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Skill))]
pub struct SkillOut<'a> {
    name: &'a str,
    #[serde(rename = "type")]
    kind: SkillKind,
    content: &'a str,
    triggers: &'a [String],
}

/// When a skill applies.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub enum SkillKind {
    /// Always.
    Repo,
    /// When a message contains one of its triggers.
    Knowledge,
    /// When the agent chooses it: a skill in the AgentSkills format.
    AgentSkills,
}

impl<'a> SkillOut<'a> {
    fn of(skill: &'a SkillInfo) -> Self {
        let kind = match (skill.is_agentskills_format, skill.triggers.is_empty()) {
            (true, _) => SkillKind::AgentSkills,
            (false, true) => SkillKind::Repo,
            (false, false) => SkillKind::Knowledge,
        };
        Self { name: &skill.name, kind, content: &skill.content, triggers: &skill.triggers }
    }
}

fn response(status: &'static str, skills: &[SkillInfo]) -> Response {
    let skills = skills.iter().map(SkillOut::of).collect();
    ([(STATUS, HeaderValue::from_static(status))], Json(SkillsOut { skills })).into_response()
}
