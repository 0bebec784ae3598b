//! Requests of agent servers and agents.

use crate::schema::TEXT;
use crate::{Authentication, CONFLICT, FORBIDDEN, Group, INVALID, NOT_FOUND, Response, Route, Schema};

pub(crate) const GROUP: Group = Group { tag: "Webhooks", routes: ROUTES };

const ROUTES: &[Route] = &[
    Route::post("/api/v1/webhooks/conversations", "events", "receive_conversation")
        .authentication(Authentication::SandboxKey)
        .summary("Receive the state of a conversation from an agent server")
        .body("ConversationReport")
        .returns(&[Response::json(Schema::Component("Success"))])
        .errors(&[FORBIDDEN, NOT_FOUND, CONFLICT, INVALID]),
    Route::post("/api/v1/webhooks/events/{conversation_id}", "events", "receive_events")
        .authentication(Authentication::SandboxKey)
        .summary("Receive a batch of events from an agent server")
        .body("EventBatch")
        .returns(&[Response::json(Schema::Component("Success"))])
        .errors(&[FORBIDDEN, NOT_FOUND, CONFLICT, INVALID]),
    Route::post("/api/v1/webhooks/commands/{task_id}", "events", "receive_command_end")
        .authentication(Authentication::StartToken)
        .summary("Receive the notification that a command of a start has ended")
        .returns(&[Response::new(204, None)])
        .errors(&[NOT_FOUND]),
    Route::get("/api/v1/webhooks/secrets", "events", "provider_token")
        .authentication(Authentication::AgentToken)
        .summary("Get an agent's token for a git provider")
        .returns(&[Response::new(200, Some(("text/plain", TEXT))).described("The token.")])
        .errors(&[NOT_FOUND]),
];
