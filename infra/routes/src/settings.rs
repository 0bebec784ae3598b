//! The caller's settings and secrets.

use crate::schema::{LIMIT, PAGE_ID, query, text_up_to};
use crate::{
    BAD_GATEWAY, BAD_REQUEST, CONFLICT, FORBIDDEN, Group, INVALID, NOT_FOUND, Response, Route, Schema,
    TOO_MANY_REQUESTS,
};

pub(crate) const GROUP: Group = Group { tag: "Settings", routes: ROUTES };

const ROUTES: &[Route] = &[
    Route::get("/api/v1/settings", "settings", "settings")
        .summary("Get the caller's settings")
        .returns(&[Response::json(Schema::Component("Settings"))])
        .errors(&[NOT_FOUND]),
    Route::post("/api/v1/settings", "settings", "change_settings")
        .summary("Update settings")
        .body("SettingsChange")
        .returns(&[Response::json(Schema::Component("Message"))])
        .errors(&[INVALID]),
    Route::get("/api/v1/users/me", "settings", "me")
        .summary("Get the caller with settings")
        .parameters(&[query("expose_secrets", Schema::Boolean { default: Some(false) }).described(
            "Whether to return secrets unmasked. Requires the session key of one of the \
            caller's sandboxes.",
        )])
        .returns(&[Response::json(Schema::Component("UserInfo"))])
        .errors(&[FORBIDDEN, INVALID]),
    Route::get("/api/v1/secrets/search", "settings", "search_secrets")
        .summary("Search the names of secrets")
        .parameters(&[query("name__contains", text_up_to(256)), PAGE_ID, LIMIT])
        .returns(&[Response::json(Schema::Component("CustomSecretPage"))])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::post("/api/v1/secrets", "settings", "put_secret")
        .summary("Store a secret for agents")
        .body("SecretRequest")
        .returns(&[
            Response::json(Schema::Component("Message")).described("The secret is replaced."),
            Response::json(Schema::Component("Message")).status(201).described("The secret is created."),
        ])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::post("/api/v1/secrets/git-providers", "settings", "put_git_providers")
        .summary("Replace the tokens of git providers")
        .description(
            "Each provider accepts its new token before any is stored; a token that it refuses is a 401. A provider that is not named is \
            removed. One that is named without a token keeps its stored token, for the same host.",
        )
        .body("GitProvidersRequest")
        .returns(&[Response::json(Schema::Component("Message"))])
        .errors(&[BAD_REQUEST, INVALID, TOO_MANY_REQUESTS, BAD_GATEWAY]),
    Route::delete("/api/v1/secrets/git-providers", "settings", "delete_git_providers")
        .summary("Remove the tokens of all git providers")
        .returns(&[Response::json(Schema::Component("Message"))]),
    Route::put("/api/v1/secrets/{secret_name}", "settings", "change_secret")
        .summary("Update a secret")
        .body("SecretChange")
        .returns(&[Response::json(Schema::Component("Message"))])
        .errors(&[NOT_FOUND, CONFLICT, INVALID]),
    Route::delete("/api/v1/secrets/{secret_name}", "settings", "delete_secret")
        .summary("Delete a secret")
        .returns(&[Response::json(Schema::Component("Message"))])
        .errors(&[NOT_FOUND]),
];
