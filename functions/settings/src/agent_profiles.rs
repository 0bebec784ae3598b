//! Agent profiles: `/api/agent-profiles…`.

use axum::extract::{Path, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::StatusCode;
use serde::Serialize;
use serde_json::{Map, Value};
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::extract::{JsonBody, RawBody, both};
use shared::http::pydantic::body::FromJson as _;
use shared::http::pydantic::validation::path_uuid;
use shared::id;
use shared::user::agent_profiles::{AgentKind, AgentProfile, AgentProfileMaterialize, AgentProfileSave, AgentProfiles};
use shared::user::llm_profiles::{LlmProfiles, name_in_path};
use shared::user::settings_document::{ProfileRename, SettingsDocument};

use crate::Context;

pub(crate) fn router() -> Router<Context> {
    Router::new()
        .route("/api/agent-profiles", get(list))
        .route("/api/agent-profiles/{agent_profile}", get(show).post(save).delete(delete))
        .route("/api/agent-profiles/{agent_profile}/rename", post(rename))
        .route("/api/agent-profiles/{agent_profile}/activate", post(activate))
        .route("/api/agent-profiles/{agent_profile}/materialize", post(materialize))
}

fn name(text: &str) -> Result<String> {
    name_in_path(text).map_err(Error::Invalid)
}

/// An agent profile in a list.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = AgentProfileInfo))]
pub struct AgentProfileInfoOut {
    /// A UUID with dashes, which stays when the profile is renamed.
    id: String,
    name: String,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    agent_kind: &'static str,
    revision: u64,
    llm_profile_ref: Option<String>,
    /// Null for all MCP servers.
    mcp_server_refs: Option<Vec<String>>,
}

/// The agent profiles of a user, in the order in which they were made.
#[derive(Clone, Debug, Default, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = AgentProfiles))]
pub struct AgentProfilesOut {
    profiles: Vec<AgentProfileInfoOut>,
    active_agent_profile_id: Option<String>,
}

impl AgentProfilesOut {
    fn of(profiles: &AgentProfiles, llm_profiles: &LlmProfiles) -> Self {
        let info = |profile: &AgentProfile| AgentProfileInfoOut {
            id: id::dashed(profile.id),
            name: profile.name.clone(),
            agent_kind: AgentKind::Openhands.as_str(),
            revision: profile.revision,
            llm_profile_ref: profile.llm_profile(llm_profiles).map(str::to_owned),
            mcp_server_refs: profile.mcp_servers().map(|names| names.into_iter().map(str::to_owned).collect()),
        };
        Self {
            profiles: profiles.iter().map(info).collect(),
            active_agent_profile_id: profiles.active().map(|active| id::dashed(active.id)),
        }
    }
}

async fn list(State(context): State<Context>, Caller(user): Caller) -> Result<Json<AgentProfilesOut>> {
    let Some(document) = context.document_with_profile(&user).await? else {
        return Ok(Json(AgentProfilesOut::default()));
    };
    let (mut profiles, llm_profiles) = (document.agent_profiles(), document.llm_profiles());
    if profiles.ensure_active(&llm_profiles) {
        // The ids that are shown are those that were stored, also when another request has made the profile meanwhile.
        let ensure = |document: &mut SettingsDocument| {
            let llm_profiles = document.llm_profiles();
            document.change_agent_profiles(|profiles| {
                profiles.ensure_active(&llm_profiles);
                Ok(profiles.clone())
            })
        };
        profiles = context.settings.change(&user, ensure).await?;
    }
    Ok(Json(AgentProfilesOut::of(&profiles, &llm_profiles)))
}

/// An agent profile, with every field.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = AgentProfile))]
pub struct AgentProfileOut {
    name: String,
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    profile: Map<String, Value>,
}

async fn show(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(text): Path<String>,
) -> Result<Json<AgentProfileOut>> {
    let name = name(&text)?;
    let document = context.settings.document(&user).await?.unwrap_or_default();
    let profile = document.agent_profiles().find(&name)?.shown(&document.llm_profiles());
    Ok(Json(AgentProfileOut { name, profile }))
}

/// What was done with an agent profile.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = AgentProfileChanged))]
pub struct AgentProfileChangedOut {
    name: String,
    message: String,
}

impl AgentProfileChangedOut {
    fn json(name: String, done: &str) -> Json<Self> {
        let message = format!("Agent profile '{name}' {done}");
        Json(Self { name, message })
    }
}

async fn save(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(text): Path<String>,
    body: Result<JsonBody<AgentProfileSave>>,
) -> Result<(StatusCode, Json<AgentProfileChangedOut>)> {
    let (name, JsonBody(save)) = both(name(&text), body)?;
    context.change_existing(&user, |document| document.save_agent_profile(&name, &save)).await?;
    Ok((StatusCode::CREATED, AgentProfileChangedOut::json(name, "saved")))
}

async fn delete(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(text): Path<String>,
) -> Result<Json<AgentProfileChangedOut>> {
    let name = name(&text)?;
    let document = context.settings.document(&user).await?.unwrap_or_default();
    if document.agent_profiles().find(&name).is_ok() {
        let delete = |document: &mut SettingsDocument| document.change_agent_profiles(|all| Ok(all.delete(&name)));
        context.settings.change(&user, delete).await?;
    }
    Ok(AgentProfileChangedOut::json(name, "deleted"))
}

async fn rename(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(text): Path<String>,
    body: Result<JsonBody<ProfileRename>>,
) -> Result<Json<AgentProfileChangedOut>> {
    let (name, JsonBody(ProfileRename { new_name })) = both(name(&text), body)?;
    let rename =
        |document: &mut SettingsDocument| document.change_agent_profiles(|profiles| profiles.rename(&name, &new_name));
    context.change_existing(&user, rename).await?;
    let message = format!("Agent profile '{name}' renamed to '{new_name}'");
    Ok(Json(AgentProfileChangedOut { name: new_name, message }))
}

/// The agent profile that is active now.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = AgentProfileActivated))]
pub struct AgentProfileActivatedOut {
    id: String,
    message: String,
    /// Always false: the profile counts at the next start.
    agent_settings_applied: bool,
}

async fn activate(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(text): Path<String>,
) -> Result<Json<AgentProfileActivatedOut>> {
    let id = path_uuid("id", &text).map_err(Error::Invalid)?;
    let activate = |document: &mut SettingsDocument| {
        document.change_agent_profiles(|profiles| profiles.activate(id).map(|profile| profile.name.clone()))
    };
    // Without settings there is no profile, and none must come into being by this request.
    let document = context.settings.document(&user).await?.unwrap_or_default();
    document.agent_profiles().activate(id)?;
    let name = context.settings.change(&user, activate).await?;
    let message = format!("Agent profile '{name}' activated");
    Ok(Json(AgentProfileActivatedOut { id: id::dashed(id), message, agent_settings_applied: false }))
}

/// What a start with an agent profile would use.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = AgentProfileDiagnostics))]
pub struct AgentProfileDiagnosticsOut {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    agent_kind: &'static str,
    /// Whether a start can use the profile.
    valid: bool,
    errors: Vec<String>,
    llm_profile_ref: Option<String>,
    llm_profile_resolved: bool,
    llm_api_key_set: bool,
    mcp_server_refs: Option<Vec<String>>,
    resolved_mcp_config_keys: Vec<String>,
    /// MCP servers that the settings do not have. A start leaves them out.
    dangling_mcp_server_refs: Vec<String>,
    disabled_skills: Vec<String>,
    secret_refs: Option<Vec<String>>,
    /// The agent settings of such a start, secrets hidden; null if the profile is not valid.
    #[cfg_attr(feature = "openapi", schema(value_type = Option<Object>))]
    resolved_settings: Option<Map<String, Value>>,
}

async fn materialize(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(text): Path<String>,
    body: RawBody,
) -> Result<Json<AgentProfileDiagnosticsOut>> {
    let request = match body.bytes.is_empty() {
        true => Ok(AgentProfileMaterialize::default()),
        false => body.read(AgentProfileMaterialize::from_json).map_err(Error::Invalid),
    };
    let (name, AgentProfileMaterialize { draft }) = both(name(&text), request)?;
    let document = context.settings.document(&user).await?.unwrap_or_default();
    let profile = match draft {
        Some(draft) => draft.draft(&name),
        None => document.agent_profiles().find(&name)?.clone(),
    };
    let llm_profiles = document.llm_profiles();
    let named = profile.llm_profile(&llm_profiles).map(str::to_owned);
    let llm = named.as_deref().and_then(|name| llm_profiles.get(name));
    let errors = match (&named, llm) {
        (_, Some(_)) => Vec::new(),
        (Some(named), None) => vec![format!("LLM profile '{named}' not found")],
        (None, None) => vec!["No LLM profile is active".to_owned()],
    };
    let owned = |names: std::collections::BTreeSet<&str>| names.into_iter().map(str::to_owned).collect::<Vec<String>>();
    let chosen = profile.mcp_servers().map(owned);
    let (mut resolved, mut dangling) = (document.mcp_server_names(), Vec::new());
    if let Some(chosen) = &chosen {
        dangling = chosen.iter().filter(|name| !resolved.contains(name)).cloned().collect();
        resolved.retain(|name| chosen.contains(name));
    }
    let resolved_settings = match (&named, errors.is_empty()) {
        (Some(named), true) => Some(document.show_for_agent(named, chosen.as_deref())),
        _ => None,
    };
    Ok(Json(AgentProfileDiagnosticsOut {
        agent_kind: AgentKind::Openhands.as_str(),
        valid: errors.is_empty(),
        errors,
        llm_profile_resolved: llm.is_some(),
        llm_api_key_set: llm.is_some_and(shared::user::llm::Llm::has_api_key),
        llm_profile_ref: named.clone(),
        mcp_server_refs: chosen,
        resolved_mcp_config_keys: resolved,
        dangling_mcp_server_refs: dangling,
        disabled_skills: owned(profile.disabled_skills()),
        secret_refs: profile.secrets().map(owned),
        resolved_settings,
    }))
}
