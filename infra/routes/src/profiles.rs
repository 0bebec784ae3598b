//! The caller's LLM profiles, and the organization whose profiles they are for clients that know organizations.

use crate::schema::{LIMIT, PAGE_ID};
use crate::{BAD_REQUEST, CONFLICT, Group, INVALID, NOT_FOUND, Response, Route, Schema};

pub(crate) const GROUP: Group = Group { tag: "Profiles", routes: ROUTES };

const ROUTES: &[Route] = &[
    Route::get("/api/v1/settings/profiles", "settings", "profiles")
        .summary("List LLM profiles")
        .returns(&[Response::json(Schema::Component("Profiles"))]),
    Route::get("/api/v1/settings/profiles/{profile_name}", "settings", "profile")
        .summary("Get an LLM profile")
        .returns(&[Response::json(Schema::Component("Profile"))])
        .errors(&[NOT_FOUND, INVALID]),
    Route::post("/api/v1/settings/profiles/{profile_name}", "settings", "save_profile")
        .summary("Save an LLM profile")
        .description(
            "Without a configuration, the profile gets that of the settings. A profile of the same name is replaced.",
        )
        .body("ProfileSave")
        .returns(&[Response::json(Schema::Component("ProfileChanged")).status(201)])
        .errors(&[NOT_FOUND, CONFLICT, INVALID]),
    Route::delete("/api/v1/settings/profiles/{profile_name}", "settings", "delete_profile")
        .summary("Delete an LLM profile")
        .returns(&[
            Response::json(Schema::Component("ProfileChanged")).described("The profile does not exist any more.")
        ])
        .errors(&[CONFLICT, INVALID]),
    Route::post("/api/v1/settings/profiles/{profile_name}/activate", "settings", "activate_profile")
        .summary("Make an LLM profile the active one")
        .returns(&[Response::json(Schema::Component("ProfileActivated"))])
        .errors(&[NOT_FOUND, INVALID]),
    Route::post("/api/v1/settings/profiles/{profile_name}/rename", "settings", "rename_profile")
        .summary("Rename an LLM profile")
        .body("ProfileRename")
        .returns(&[Response::json(Schema::Component("ProfileChanged"))])
        .errors(&[NOT_FOUND, CONFLICT, INVALID]),
    Route::get("/api/organizations", "settings", "organizations")
        .summary("List the caller's organization")
        .parameters(&[PAGE_ID, LIMIT])
        .returns(&[Response::json(Schema::Component("Organizations"))])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::get("/api/organizations/{org_id}/me", "settings", "organization_me")
        .summary("Get the caller's role in their organization")
        .returns(&[Response::json(Schema::Component("OrganizationMe"))])
        .errors(&[NOT_FOUND, INVALID]),
    Route::get("/api/organizations/{org_id}/members/{user_id}", "settings", "organization_member")
        .summary("Get a member of an organization")
        .returns(&[Response::json(Schema::Component("OrganizationMember"))])
        .errors(&[NOT_FOUND, INVALID]),
    Route::post("/api/organizations/{org_id}/switch", "settings", "switch_organization")
        .summary("Choose an organization")
        .returns(&[Response::json(Schema::Component("Organization"))])
        .errors(&[NOT_FOUND, INVALID]),
    Route::get("/api/organizations/{org_id}/profiles", "settings", "organization_profiles")
        .summary("List LLM profiles")
        .returns(&[Response::json(Schema::Component("Profiles"))])
        .errors(&[NOT_FOUND, INVALID]),
    Route::get("/api/organizations/{org_id}/profiles/{profile_name}", "settings", "organization_profile")
        .summary("Get an LLM profile")
        .returns(&[Response::json(Schema::Component("Profile"))])
        .errors(&[NOT_FOUND, INVALID]),
    Route::post("/api/organizations/{org_id}/profiles/{profile_name}", "settings", "save_organization_profile")
        .summary("Save an LLM profile")
        .body("ProfileSave")
        .returns(&[Response::json(Schema::Component("ProfileChanged"))])
        .errors(&[NOT_FOUND, CONFLICT, INVALID]),
    Route::delete("/api/organizations/{org_id}/profiles/{profile_name}", "settings", "delete_organization_profile")
        .summary("Delete an LLM profile")
        .returns(&[Response::json(Schema::Component("ProfileChanged"))])
        .errors(&[NOT_FOUND, CONFLICT, INVALID]),
    Route::post(
        "/api/organizations/{org_id}/profiles/{profile_name}/activate",
        "settings",
        "activate_organization_profile",
    )
    .summary("Make an LLM profile the active one")
    .returns(&[Response::json(Schema::Component("ProfileActivated"))])
    .errors(&[NOT_FOUND, INVALID]),
    Route::post(
        "/api/organizations/{org_id}/profiles/{profile_name}/rename",
        "settings",
        "rename_organization_profile",
    )
    .summary("Rename an LLM profile")
    .body("ProfileRename")
    .returns(&[Response::json(Schema::Component("ProfileChanged"))])
    .errors(&[NOT_FOUND, CONFLICT, INVALID]),
];
