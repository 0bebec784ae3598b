//! LLM profiles: `/api/v1/settings/profiles…`, and the same profiles at `/api/organizations/{org_id}/profiles…`.
//!
//! The two families of paths come from different versions of the reference. They differ in the status of a save, and in the deletion of a
//! profile that does not exist; responses have the fields of both.

use std::collections::HashMap;

use axum::extract::{FromRequestParts, Path, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http::StatusCode;
use http::request::Parts;
use serde::Serialize;
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::extract::{JsonBody, RawBody, both};
use shared::http::pydantic::body::FromJson as _;
use shared::user::declared::Secrets;
use shared::user::llm::Llm;
use shared::user::llm_profiles::{LlmProfiles, name_in_path};
use shared::user::settings_document::{LlmOut, ProfileRename, ProfileSave, SettingsDocument};

use crate::Context;
use crate::organizations;

/// The routes of profiles under both paths.
pub(crate) fn router() -> Router<Context> {
    let of = |base: &str| {
        Router::new()
            .route(base, get(list))
            .route(&format!("{base}/{{profile_name}}"), get(show).post(save).delete(delete))
            .route(&format!("{base}/{{profile_name}}/activate"), post(activate))
            .route(&format!("{base}/{{profile_name}}/rename"), post(rename))
    };
    of("/api/v1/settings/profiles").merge(of("/api/organizations/{org_id}/profiles"))
}

/// Whose profiles a path means: the caller's, or those of an organization, which must be the caller's own.
struct Scope {
    is_organization: bool,
}

impl FromRequestParts<Context> for Scope {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, context: &Context) -> Result<Self> {
        let parameters = parameters(parts, context).await?;
        let Some(id) = parameters.get("org_id") else { return Ok(Self { is_organization: false }) };
        let Caller(user) = Caller::from_request_parts(parts, context).await?;
        organizations::check(&user, id)?;
        Ok(Self { is_organization: true })
    }
}

/// The `{profile_name}` of a path. Violations: those of names.
struct ProfileName(String);

impl FromRequestParts<Context> for ProfileName {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, context: &Context) -> Result<Self> {
        let parameters = parameters(parts, context).await?;
        let name = parameters.get("profile_name").map(String::as_str).unwrap_or_default();
        // In the reference a name with a slash is another path.
        if name.contains('/') {
            return Err(Error::NotFound("Not Found".to_owned()));
        }
        name_in_path(name).map(Self).map_err(Error::Invalid)
    }
}

async fn parameters(parts: &mut Parts, context: &Context) -> Result<HashMap<String, String>> {
    let read = Path::<HashMap<String, String>>::from_request_parts(parts, context).await;
    read.map(|Path(parameters)| parameters).map_err(|_| Error::Refused("The path is not UTF-8".to_owned()))
}

/// A profile in a list.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = ProfileInfo))]
pub struct ProfileInfoOut {
    name: String,
    model: Option<String>,
    /// The profile's own address, or the default of its model's provider; null if this server does not know it.
    base_url: Option<String>,
    api_key_set: bool,
}

/// The LLM profiles of a user, in the order in which they were created.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Profiles))]
pub struct ProfilesOut {
    profiles: Vec<ProfileInfoOut>,
    active_profile: Option<String>,
}

async fn list(scope: Scope, State(context): State<Context>, Caller(user): Caller) -> Result<Json<ProfilesOut>> {
    // The other path is older than the web UI's pages of profiles, and its clients expect no profile that they did not save.
    let profiles = match scope.is_organization {
        true => context.document_with_profile(&user).await?.unwrap_or_default().llm_profiles(),
        false => context.profiles(&user).await?,
    };
    let info = |(name, llm): (&str, &Llm)| ProfileInfoOut {
        name: name.to_owned(),
        model: llm.model().map(str::to_owned),
        base_url: llm.resolved_base_url().map(str::to_owned),
        api_key_set: llm.has_api_key(),
    };
    Ok(Json(ProfilesOut {
        profiles: profiles.iter().map(info).collect(),
        active_profile: profiles.active().map(str::to_owned),
    }))
}

/// A profile. Its configuration has two names, because clients read one or the other. Secrets that are set are masked: a client that sends
/// the configuration back leaves them unchanged.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Profile))]
pub struct ProfileOut {
    name: String,
    config: LlmOut,
    llm: LlmOut,
    api_key_set: bool,
}

async fn show(
    _: Scope,
    State(context): State<Context>,
    Caller(user): Caller,
    ProfileName(name): ProfileName,
) -> Result<Json<ProfileOut>> {
    let profiles = context.profiles(&user).await?;
    let llm = profiles.find(&name)?;
    let shown = LlmOut::of(llm, Secrets::Masked);
    let api_key_set = llm.has_api_key();
    Ok(Json(ProfileOut { name, config: shown.clone(), llm: shown, api_key_set }))
}

/// What was done with a profile.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = ProfileChanged))]
pub struct ProfileChangedOut {
    name: String,
    message: String,
}

async fn save(
    scope: Scope,
    State(context): State<Context>,
    Caller(user): Caller,
    name: Result<ProfileName>,
    body: RawBody,
) -> Result<Response> {
    // A save without a body is one of the settings' model.
    let save = match body.bytes.is_empty() {
        true => Ok(ProfileSave::default()),
        false => body.read(ProfileSave::from_json).map_err(Error::Invalid),
    };
    let (ProfileName(name), save) = both(name, save)?;
    context.change_existing(&user, |document| document.save_profile(&name, &save)).await?;
    let status = if scope.is_organization { StatusCode::OK } else { StatusCode::CREATED };
    let message = format!("Profile '{name}' saved");
    Ok((status, Json(ProfileChangedOut { name, message })).into_response())
}

async fn delete(
    scope: Scope,
    State(context): State<Context>,
    Caller(user): Caller,
    ProfileName(name): ProfileName,
) -> Result<Json<ProfileChangedOut>> {
    // Without the profile there is nothing to write.
    let is_known = context.profiles(&user).await?.get(&name).is_some();
    if is_known {
        let delete = |document: &mut SettingsDocument| {
            document.check_llm_profile_is_unused(&name)?;
            Ok(document.delete_profile(&name))
        };
        context.settings.change(&user, delete).await?;
    } else if scope.is_organization {
        return Err(Error::NotFound(format!("Profile '{name}' not found")));
    }
    let message = format!("Profile '{name}' deleted");
    Ok(Json(ProfileChangedOut { name, message }))
}

/// The profile that is active now. Clients take the model as proof that it was applied.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = ProfileActivated))]
pub struct ProfileActivatedOut {
    name: String,
    message: String,
    model: Option<String>,
    llm: LlmOut,
}

async fn activate(
    _: Scope,
    State(context): State<Context>,
    Caller(user): Caller,
    ProfileName(name): ProfileName,
) -> Result<Json<ProfileActivatedOut>> {
    // Also without settings, which must not come into being by this request.
    context.profiles(&user).await?.find(&name)?;
    let llm = context.settings.change(&user, |document| document.activate_profile(&name)).await?;
    let message = format!("Switched to profile '{name}'");
    let model = llm.model().map(str::to_owned);
    Ok(Json(ProfileActivatedOut { name, message, model, llm: LlmOut::of(&llm, Secrets::Masked) }))
}

async fn rename(
    _: Scope,
    State(context): State<Context>,
    Caller(user): Caller,
    name: Result<ProfileName>,
    body: Result<JsonBody<ProfileRename>>,
) -> Result<Json<ProfileChangedOut>> {
    let (ProfileName(name), JsonBody(ProfileRename { new_name })) = both(name, body)?;
    context.change_existing(&user, |document| document.rename_profile(&name, &new_name)).await?;
    let message = format!("Profile '{name}' renamed to '{new_name}'");
    Ok(Json(ProfileChangedOut { name: new_name, message }))
}

impl Context {
    async fn profiles(&self, user: &shared::user::UserId) -> Result<LlmProfiles> {
        let document = self.settings.document(user).await?;
        Ok(document.map(|document| document.llm_profiles()).unwrap_or_default())
    }

    /// The user's settings, with a profile for a model that was chosen before any; see [`SettingsDocument::offer_first_profile`].
    pub(crate) async fn document_with_profile(&self, user: &shared::user::UserId) -> Result<Option<SettingsDocument>> {
        let document = self.settings.document(user).await?;
        if !document.as_ref().is_some_and(|document| document.clone().offer_first_profile()) {
            return Ok(document);
        }
        let offer = |document: &mut SettingsDocument| {
            document.offer_first_profile();
            Ok(document.clone())
        };
        self.settings.change(user, offer).await.map(Some)
    }
}
