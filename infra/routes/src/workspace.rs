//! What is in a conversation's sandbox: skills, hooks, files, git, and messages to the agent.

use crate::schema::{TEXT, header, path, query};
use crate::{
    BAD_GATEWAY, CONFLICT, CONTENT_TOO_LARGE, GONE, Group, INVALID, LEGACY_BAD_GATEWAY, LEGACY_NOT_FOUND, NOT_FOUND,
    Response, Route, Schema, TOO_MANY_REQUESTS,
};

pub(crate) const GROUP: Group = Group { tag: "Inside a sandbox", routes: ROUTES };

const ROUTES: &[Route] = &[
    Route::get("/api/v1/app-conversations/{conversation_id}/skills", "skills", "skills")
        .summary("Get the skills that apply to a conversation")
        .returns(&[Response::json(Schema::Component("Skills"))
            .headers(&[header("X-Skills-Status", Schema::Choice(&["ok", "not-running", "unreachable"]))])])
        .errors(&[LEGACY_NOT_FOUND, INVALID]),
    Route::get("/api/v1/app-conversations/{conversation_id}/hooks", "skills", "hooks")
        .summary("Get the hooks of a conversation's project")
        .returns(&[Response::json(Schema::Component("Hooks"))])
        .errors(&[LEGACY_NOT_FOUND, INVALID, LEGACY_BAD_GATEWAY]),
    Route::get("/api/v1/app-conversations/{conversation_id}/file", "skills", "file")
        .summary("Read a text file of a conversation's workspace")
        .parameters(&[query("file_path", TEXT).described("The default is the conversation's plan.")])
        .returns(&[Response::json(TEXT)
            .described("The text. It is empty if there is none; the header gives the reason.")
            .headers(&[header(
                "X-File-Status",
                Schema::Choice(&[
                    "ok",
                    "missing",
                    "unreachable",
                    "not-text",
                    "too-large",
                    "outside-workspace",
                    "not-running",
                    "no-conversation",
                ]),
            )])])
        .errors(&[INVALID]),
    Route::get("/api/v1/app-conversations/{conversation_id}/files", "skills", "files")
        .summary("List the files of a conversation's workspace")
        .parameters(&[query("path", TEXT)])
        .returns(&[Response::json(Schema::TextList { format: None, max_items: None }).headers(&[header(
            "X-Files-Truncated",
            TEXT,
        )
        .described("`true` if the list is incomplete.")])])
        .errors(&[NOT_FOUND, CONFLICT, GONE, INVALID, BAD_GATEWAY]),
    Route::get("/api/v1/app-conversations/{conversation_id}/git/changes", "skills", "git_changes")
        .summary("List changed files in a folder of a conversation's workspace")
        .parameters(&[
            query("path", TEXT).required().described(
                "A folder: an absolute path in the workspace, or relative to the conversation's \
                folder.",
            ),
            query("ref", TEXT).described(
                "A commit, in any form that git resolves. The default is the commit that the \
                work started from.",
            ),
        ])
        .returns(&[Response::json(Schema::ListOf("GitChange"))
            .described("The changes, sorted by path.")
            .headers(&[header("X-Changes-Truncated", TEXT).described("`true` if the list is incomplete.")])])
        .errors(&[NOT_FOUND, CONFLICT, GONE, INVALID, BAD_GATEWAY]),
    Route::get("/api/v1/app-conversations/{conversation_id}/git/diff", "skills", "git_diff")
        .summary("Compare a file of the workspace with its original")
        .parameters(&[
            query("path", TEXT).required().described(
                "A file: an absolute path in the workspace, or relative to the conversation's \
                folder, as in `git/changes`.",
            ),
            query("ref", TEXT).described(
                "A commit, in any form that git resolves. The default is the commit that the \
                work started from.",
            ),
        ])
        .returns(&[Response::json(Schema::Component("GitDiff"))
            .described("Both texts. They are null for a file outside every repository.")])
        .errors(&[NOT_FOUND, CONFLICT, GONE, CONTENT_TOO_LARGE, INVALID, BAD_GATEWAY]),
    Route::post("/api/v1/app-conversations/{conversation_id}/send-message", "skills", "send_message")
        .summary("Send a message to a conversation's agent")
        .body("SentMessage")
        .returns(&[Response::json(Schema::Component("MessageSent"))])
        .errors(&[NOT_FOUND, CONFLICT, GONE, INVALID, BAD_GATEWAY]),
    Route::post("/api/v1/conversations/{conversation_id}/pending-messages", "sandboxes", "queue_message")
        .summary("Queue a message for a conversation that is not ready")
        .parameters(&[path("conversation_id", TEXT)
            .described("The id of a conversation, or `task-` followed by the id of its start.")])
        .body("QueuedMessage")
        .returns(&[Response::json(Schema::Component("MessageQueued")).status(201)])
        .errors(&[NOT_FOUND, CONFLICT, TOO_MANY_REQUESTS]),
];
