//! Sandboxes, their specs, and the secrets that agents look up.

use crate::schema::{IDS, LIMIT, PAGE_ID, TEXT, query};
use crate::{
    Authentication, BAD_GATEWAY, BAD_REQUEST, CONTENT_TOO_LARGE, FORBIDDEN, Group, INVALID, NOT_FOUND, Response, Route,
    Schema,
};

pub(crate) const GROUP: Group = Group { tag: "Sandboxes", routes: ROUTES };

const ROUTES: &[Route] = &[
    Route::get("/api/v1/sandboxes", "sandboxes", "batch_get_sandboxes")
        .summary("Get sandboxes by id")
        .parameters(&[IDS])
        .returns(&[Response::json(Schema::NullableListOf("SandboxInfo"))])
        .errors(&[BAD_REQUEST, CONTENT_TOO_LARGE, INVALID]),
    Route::post("/api/v1/sandboxes", "sandboxes", "start_sandbox")
        .summary("Create a sandbox")
        .parameters(&[query("sandbox_spec_id", TEXT)])
        .returns(&[Response::json(Schema::Component("SandboxInfo"))])
        .errors(&[NOT_FOUND, BAD_GATEWAY]),
    Route::delete("/api/v1/sandboxes", "sandboxes", "delete_sandbox")
        .summary("Delete a sandbox")
        .parameters(&[query("sandbox_id", TEXT).required()])
        .returns(&[Response::json(Schema::Component("Success"))])
        .errors(&[NOT_FOUND, INVALID, BAD_GATEWAY]),
    Route::get("/api/v1/sandboxes/search", "sandboxes", "search_sandboxes")
        .summary("List sandboxes")
        .parameters(&[PAGE_ID, LIMIT])
        .returns(&[Response::json(Schema::Component("SandboxPage"))])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::delete("/api/v1/sandboxes/{sandbox_id}", "sandboxes", "delete_named_sandbox")
        .summary("Delete a sandbox")
        .parameters(&[query("sandbox_id", TEXT).described("The same id as in the path, if present.")])
        .returns(&[Response::json(Schema::Component("Success"))])
        .errors(&[NOT_FOUND, BAD_GATEWAY]),
    Route::post("/api/v1/sandboxes/{sandbox_id}/pause", "sandboxes", "pause_sandbox")
        .summary("Pause a sandbox")
        .returns(&[Response::json(Schema::Component("Success"))])
        .errors(&[NOT_FOUND, BAD_GATEWAY]),
    Route::post("/api/v1/sandboxes/{sandbox_id}/resume", "sandboxes", "resume_sandbox")
        .summary("Resume a sandbox")
        .returns(&[Response::json(Schema::Component("Success"))])
        .errors(&[NOT_FOUND, BAD_GATEWAY]),
    Route::get("/api/v1/sandboxes/{sandbox_id}/settings/secrets", "sandboxes", "list_secrets_of_sandbox")
        .authentication(Authentication::SandboxKey)
        .summary("List the names of the secrets of the sandbox's owner")
        .returns(&[Response::json(Schema::Component("SecretNames"))])
        .errors(&[FORBIDDEN]),
    Route::get("/api/v1/sandboxes/{sandbox_id}/settings/secrets/{secret_name}", "sandboxes", "secret_of_sandbox")
        .authentication(Authentication::SandboxKey)
        .summary("Get a secret of the sandbox's owner")
        .returns(&[Response::new(200, Some(("text/plain", TEXT))).described("The value.")])
        .errors(&[FORBIDDEN, NOT_FOUND]),
    Route::get("/api/v1/sandbox-specs", "sandboxes", "batch_get_sandbox_specs")
        .summary("Get sandbox specs by id")
        .parameters(&[IDS])
        .returns(&[Response::json(Schema::NullableListOf("SandboxSpecInfo"))])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::get("/api/v1/sandbox-specs/search", "sandboxes", "search_sandbox_specs")
        .summary("List sandbox specs")
        .parameters(&[PAGE_ID, LIMIT])
        .returns(&[Response::json(Schema::Component("SandboxSpecInfoPage"))])
        .errors(&[BAD_REQUEST, INVALID]),
];
