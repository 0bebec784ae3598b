//! Health checks, and the OpenAPI document.

use crate::{Authentication, Group, LOCAL_SERVER, Response, Route, Schema};

pub(crate) const GROUP: Group = Group { tag: "Health", routes: ROUTES };

const ROUTES: &[Route] = &[
    Route::get("/alive", "web-client", "alive")
        .authentication(Authentication::None)
        .summary("Check whether the server runs")
        .returns(&[
            Response::json(Schema::Component("Alive")),
            Response::json(Schema::Component("Starting"))
                .status(503)
                .described("A part of the server is not ready. Only `cargo local` returns this."),
        ]),
    Route::get("/health", "web-client", "health")
        .authentication(Authentication::None)
        .summary("Check whether the server runs")
        .returns(&[Response::json(Schema::Component("Health"))]),
    Route::get("/ready", "web-client", "ready")
        .authentication(Authentication::None)
        .summary("Check whether every part of the server is ready")
        .returns(&[
            Response::json(Schema::Component("Ready")),
            Response::json(Schema::Component("NotReady"))
                .status(503)
                .described("A part of the server is not ready. Only `cargo local` returns this."),
        ]),
    Route::get("/server_info", "web-client", "server_info")
        .authentication(Authentication::None)
        .summary("Get the version and uptime of the server")
        .returns(&[Response::json(Schema::Component("ServerInfo"))]),
];

/// The document itself.
pub(crate) const LOCAL: Group = Group {
    tag: "Health",
    routes: &[Route::get("/openapi.json", LOCAL_SERVER, "openapi")
        .authentication(Authentication::None)
        .summary("Get this document (only in `cargo local`)")
        .returns(&[Response::json(Schema::Object)])],
};
