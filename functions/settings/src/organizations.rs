//! `/api/organizations`: each user is the owner of one organization, which has no other members. Front ends offer profiles only to those
//! who may edit an organization.

use axum::extract::{Path, RawQuery, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde::Serialize;
use serde_json::{Map, Value};
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::extract::PageRequest;
use shared::http::pydantic::query::Query;
use shared::http::pydantic::validation;
use shared::http::secret::MASK;
use shared::user::UserId;
use shared::user::organization::{OWN_NAME, organization_of};
use uuid::Uuid;

use crate::Context;

/// The role of a user in their own organization, with its id and rank in the reference.
const ROLE: &str = "owner";
const ROLE_ID: u32 = 1;
const ROLE_RANK: u32 = 10;
/// Allows clients to offer the profiles of the organization.
const EDIT: &str = "edit_org_settings";

pub(crate) fn router() -> Router<Context> {
    Router::new()
        .route("/api/organizations", get(organizations))
        .route("/api/organizations/{org_id}/me", get(me))
        .route("/api/organizations/{org_id}/members/{user_id}", get(member))
        .route("/api/organizations/{org_id}/switch", post(switch))
}

/// Checks that an organization is the user's own.
///
/// # Errors
/// [`Error::NotFound`] for any other; [`Error::Invalid`] for a text that is not a UUID.
pub(crate) fn check(user: &UserId, id: &str) -> Result<Uuid> {
    let id = validation::path_uuid("org_id", id).map_err(Error::Invalid)?;
    if id == organization_of(user) { Ok(id) } else { Err(Error::NotFound("Organization not found".to_owned())) }
}

/// An organization, with the fields of the reference. Those that this server has no values for are null.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Organization))]
#[expect(clippy::struct_excessive_bools, reason = "the contract's form")]
pub struct OrganizationOut {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    id: Uuid,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    name: &'static str,
    contact_name: String,
    contact_email: String,
    conversation_expiration: Option<i64>,
    remote_runtime_resource_factor: Option<i64>,
    billing_margin: Option<f64>,
    enable_proactive_conversation_starters: bool,
    sandbox_base_container_image: Option<String>,
    sandbox_runtime_container_image: Option<String>,
    org_version: u32,
    /// Always empty: the settings are the user's.
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    agent_settings: Map<String, Value>,
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    conversation_settings: Map<String, Value>,
    search_api_key: Option<String>,
    sandbox_api_key: Option<String>,
    max_budget_per_task: Option<f64>,
    v1_enabled: bool,
    credits: Option<f64>,
    credits_available: bool,
    is_personal: bool,
}

impl OrganizationOut {
    fn of(user: &UserId) -> Self {
        Self {
            id: organization_of(user),
            name: OWN_NAME,
            contact_name: String::new(),
            contact_email: String::new(),
            conversation_expiration: None,
            remote_runtime_resource_factor: None,
            billing_margin: None,
            enable_proactive_conversation_starters: true,
            sandbox_base_container_image: None,
            sandbox_runtime_container_image: None,
            org_version: 0,
            agent_settings: Map::new(),
            conversation_settings: Map::new(),
            search_api_key: None,
            sandbox_api_key: None,
            max_budget_per_task: None,
            v1_enabled: true,
            credits: None,
            credits_available: false,
            is_personal: true,
        }
    }
}

/// The organizations of a user: their own.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = Organizations))]
pub struct OrganizationsOut {
    items: Vec<OrganizationOut>,
    next_page_id: Option<String>,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    current_org_id: Uuid,
}

async fn organizations(Caller(user): Caller, RawQuery(query): RawQuery) -> Result<Json<OrganizationsOut>> {
    let mut query = Query::parse(query.as_deref());
    let page = PageRequest::read(&mut query);
    query.finish().map_err(Error::Invalid)?;
    page.only_page()?;
    let own = OrganizationOut::of(&user);
    let current_org_id = own.id;
    Ok(Json(OrganizationsOut { items: vec![own], next_page_id: None, current_org_id }))
}

/// The caller as a member of their organization.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = OrganizationMe))]
pub struct OrganizationMeOut {
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    org_id: Uuid,
    user_id: String,
    email: String,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    role: &'static str,
    #[cfg_attr(feature = "openapi", schema(value_type = Vec<String>))]
    permissions: [&'static str; 1],
    /// A mask if a key is set, otherwise empty.
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    llm_api_key: &'static str,
    llm_api_key_for_byor: Option<String>,
    /// Always empty: the settings are the user's.
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    agent_settings_diff: Map<String, Value>,
    #[cfg_attr(feature = "openapi", schema(value_type = Object))]
    conversation_settings_diff: Map<String, Value>,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    status: &'static str,
}

async fn me(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(id): Path<String>,
) -> Result<Json<OrganizationMeOut>> {
    let org_id = check(&user, &id)?;
    let document = context.settings.document(&user).await?.unwrap_or_default();
    Ok(Json(OrganizationMeOut {
        org_id,
        user_id: user.as_str().to_owned(),
        email: document.email().unwrap_or_default().to_owned(),
        role: ROLE,
        permissions: [EDIT],
        llm_api_key: if document.llm().has_api_key() { MASK } else { "" },
        llm_api_key_for_byor: None,
        agent_settings_diff: Map::new(),
        conversation_settings_diff: Map::new(),
        status: "active",
    }))
}

/// A member of an organization.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema), schema(as = OrganizationMember))]
pub struct OrganizationMemberOut {
    user_id: String,
    email: Option<String>,
    role_id: u32,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    role: &'static str,
    role_rank: u32,
    #[cfg_attr(feature = "openapi", schema(value_type = String))]
    status: &'static str,
}

async fn member(
    State(context): State<Context>,
    Caller(user): Caller,
    Path((id, member)): Path<(String, String)>,
) -> Result<Json<OrganizationMemberOut>> {
    check(&user, &id)?;
    if member != user.as_str() {
        return Err(Error::NotFound("Member not found".to_owned()));
    }
    let document = context.settings.document(&user).await?.unwrap_or_default();
    Ok(Json(OrganizationMemberOut {
        user_id: member,
        email: document.email().map(str::to_owned),
        role_id: ROLE_ID,
        role: ROLE,
        role_rank: ROLE_RANK,
        status: "active",
    }))
}

/// A user has one organization, so there is nothing to change.
async fn switch(Caller(user): Caller, Path(id): Path<String>) -> Result<Json<OrganizationOut>> {
    check(&user, &id)?;
    Ok(Json(OrganizationOut::of(&user)))
}
