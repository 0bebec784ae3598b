//! What web front ends need: configuration, schemas of settings, lists of models, and lists that are empty in this server.

use crate::schema::{BOOLEAN, LIMIT, PAGE_ID, Parameter, TEXT, query};
use crate::{
    Authentication, BAD_GATEWAY, BAD_REQUEST, CONFLICT, FORBIDDEN, Group, INVALID, NOT_FOUND, Response, Route, Schema,
};

pub(crate) const GROUP: Group = Group { tag: "Front ends", routes: ROUTES };

/// The page of a list that is the same for every caller.
const CATALOGUE_PAGE_ID: Parameter = query("page_id", TEXT)
    .described("`next_page_id` of the previous page, with the same filters; anything else is the first page.");
const CATALOGUE_LIMIT: Parameter =
    query("limit", Schema::Integer { minimum: Some(1), maximum: Some(100), default: Some(50) });

const ROUTES: &[Route] = &[
    Route::get("/api/v1/web-client/config", "web-client", "web_client_config")
        .authentication(Authentication::None)
        .summary("Get the configuration of web front ends")
        .returns(&[Response::json(Schema::Component("WebClientConfig"))]),
    Route::get("/api/v1/skills/search", "settings", "search_skills")
        .summary("List the skills that a user can disable")
        .description("The public skills, and other skills while the settings of the caller disable them.")
        .parameters(&[PAGE_ID, LIMIT])
        .returns(&[Response::json(Schema::Component("SkillInfoPage"))])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::get("/api/v1/config/models/search", "web-client", "search_models")
        .authentication(Authentication::None)
        .summary("List models")
        .description("The list is part of the server; a model that is not in it can be used as well.")
        .parameters(&[
            CATALOGUE_PAGE_ID,
            CATALOGUE_LIMIT,
            query("query", TEXT).described("A part of the name without its provider, in any case."),
            query("verified__eq", BOOLEAN),
            query("provider__eq", TEXT),
        ])
        .returns(&[Response::json(Schema::Component("LLMModelPage"))])
        .errors(&[INVALID]),
    Route::get("/api/v1/config/providers/search", "web-client", "search_providers")
        .authentication(Authentication::None)
        .summary("List providers of models")
        .parameters(&[
            CATALOGUE_PAGE_ID,
            CATALOGUE_LIMIT,
            query("query", TEXT).described("A part of the name, in any case."),
            query("verified__eq", BOOLEAN),
        ])
        .returns(&[Response::json(Schema::Component("LLMProviderPage"))])
        .errors(&[INVALID]),
    Route::get("/api/v1/git/repositories/search", "web-client", "search_repositories")
        .authentication(Authentication::None)
        .summary("List repositories (always empty)")
        .parameters(&[PAGE_ID, LIMIT])
        .returns(&[Response::json(Schema::Component("EmptyPage"))])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::get("/api/v1/git/branches/search", "web-client", "search_branches")
        .authentication(Authentication::None)
        .summary("List branches (always empty)")
        .parameters(&[PAGE_ID, LIMIT])
        .returns(&[Response::json(Schema::Component("EmptyPage"))])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::get("/api/v1/git/installations/search", "web-client", "search_installations")
        .authentication(Authentication::None)
        .summary("List installations of git providers (always empty)")
        .parameters(&[PAGE_ID, LIMIT])
        .returns(&[Response::json(Schema::Component("EmptyPage"))])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::get("/api/v1/git/suggested-tasks/search", "web-client", "search_suggested_tasks")
        .authentication(Authentication::None)
        .summary("List suggested tasks (always empty)")
        .parameters(&[PAGE_ID, LIMIT])
        .returns(&[Response::json(Schema::Component("EmptyPage"))])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::get("/api/v1/settings/agent-schema", "web-client", "agent_schema")
        .authentication(Authentication::None)
        .summary("Get the schema of agent settings")
        .returns(&[Response::json(Schema::Component("SettingsSchema"))]),
    Route::get("/api/v1/settings/conversation-schema", "web-client", "conversation_schema")
        .authentication(Authentication::None)
        .summary("Get the schema of conversation settings")
        .returns(&[Response::json(Schema::Component("SettingsSchema"))]),
    Route::get("/api/keys/current", "settings", "current_key")
        .summary("Get the owner of the credentials")
        .returns(&[Response::json(Schema::Component("CurrentKey"))]),
    Route::post("/api/cloud-proxy", "sandboxes", "cloud_proxy")
        .summary("Forward a request to the agent server of one of the caller's sandboxes")
        .body("CloudProxyRequest")
        .returns(&[Response::new(200, Some(("*/*", Schema::Any)))
            .described("The agent server's response with its own status.")])
        .errors(&[BAD_REQUEST, FORBIDDEN, NOT_FOUND, CONFLICT, INVALID, BAD_GATEWAY]),
];
