//! The caller's agent profiles.

use crate::schema::{Parameter, TEXT, path};
use crate::{CONFLICT, Group, INVALID, NOT_FOUND, Response, Route, Schema};

pub(crate) const GROUP: Group = Group { tag: "Agent profiles", routes: ROUTES };

const NAME: &[Parameter] = &[path("agent_profile", TEXT).described("The name of the profile.")];
const ID: &[Parameter] = &[path("agent_profile", TEXT).described("The id of the profile.")];

const ROUTES: &[Route] = &[
    Route::get("/api/agent-profiles", "settings", "agent_profiles")
        .summary("List agent profiles")
        .description("If no profile is active, the profile `default` is. It is made if it is missing, and follows the active LLM profile until it is saved.")
        .returns(&[Response::json(Schema::Component("AgentProfiles"))]),
    Route::get("/api/agent-profiles/{agent_profile}", "settings", "agent_profile")
        .summary("Get an agent profile")
        .parameters(NAME)
        .returns(&[Response::json(Schema::Component("AgentProfile"))])
        .errors(&[NOT_FOUND, INVALID]),
    Route::post("/api/agent-profiles/{agent_profile}", "settings", "save_agent_profile")
        .summary("Save an agent profile")
        .description("A profile of the same name is replaced: it keeps its id, and its revision grows by 1.")
        .parameters(NAME)
        .body("AgentProfileSave")
        .returns(&[Response::json(Schema::Component("AgentProfileChanged")).status(201)])
        .errors(&[NOT_FOUND, CONFLICT, INVALID]),
    Route::delete("/api/agent-profiles/{agent_profile}", "settings", "delete_agent_profile")
        .summary("Delete an agent profile")
        .parameters(NAME)
        .returns(&[
            Response::json(Schema::Component("AgentProfileChanged")).described("The profile does not exist any more.")
        ])
        .errors(&[INVALID]),
    Route::post("/api/agent-profiles/{agent_profile}/rename", "settings", "rename_agent_profile")
        .summary("Rename an agent profile")
        .parameters(NAME)
        .body("ProfileRename")
        .returns(&[Response::json(Schema::Component("AgentProfileChanged"))])
        .errors(&[NOT_FOUND, CONFLICT, INVALID]),
    Route::post("/api/agent-profiles/{agent_profile}/activate", "settings", "activate_agent_profile")
        .summary("Make an agent profile the active one")
        .description("Settings do not change: the profile counts at the next start.")
        .parameters(ID)
        .returns(&[Response::json(Schema::Component("AgentProfileActivated"))])
        .errors(&[NOT_FOUND, INVALID]),
    Route::post("/api/agent-profiles/{agent_profile}/materialize", "settings", "materialize_agent_profile")
        .summary("Get what a start with an agent profile would use")
        .parameters(NAME)
        .body("AgentProfileMaterialize")
        .returns(&[Response::json(Schema::Component("AgentProfileDiagnostics"))])
        .errors(&[NOT_FOUND, INVALID]),
];
