//! Conversations: lookup, search, update, deletion, export.

use crate::schema::{BOOLEAN, COUNT, INTEGER, LIMIT, PAGE_ID, Parameter, TEXT, header, query, text_up_to, time, uuids};
use crate::{
    BAD_GATEWAY, BAD_REQUEST, CONFLICT, CONTENT_TOO_LARGE, Group, INVALID, NOT_FOUND, Response, Route, Schema,
};

pub(crate) const GROUP: Group = Group { tag: "Conversations", routes: ROUTES };

/// A filter by tags.
const TAG: Parameter = query("tag", Schema::TextList { format: None, max_items: Some(10) }).described(
    "`name:value`, or `name` for any value. Repeated, up to 10 times, it selects the conversations that have all of these tags.",
);

const ROUTES: &[Route] = &[
    Route::get("/api/v1/app-conversations", "conversations", "batch_get_conversations")
        .summary("Get conversations by id")
        .parameters(&[uuids("ids", 99, "At most 99.")])
        .returns(&[Response::json(Schema::NullableListOf("AppConversation"))
            .described("The conversations in the order of the ids; null for an id without one.")])
        .errors(&[BAD_REQUEST, CONTENT_TOO_LARGE, INVALID]),
    Route::get("/api/v1/app-conversations/search", "conversations", "search_conversations")
        .summary("Search conversations")
        .parameters(&[
            query("title__contains", text_up_to(10000)),
            time("created_at__gte"),
            time("created_at__lt"),
            time("updated_at__gte"),
            time("updated_at__lt"),
            query("sandbox_id__eq", TEXT),
            TAG,
            PAGE_ID,
            LIMIT,
            query("include_sub_conversations", BOOLEAN),
            query("sort_order", TEXT)
                .described("One of `SortOrder`. Any other value is ignored and sorts the newest first."),
        ])
        .returns(&[Response::json(Schema::Component("AppConversationPage"))])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::get("/api/v1/app-conversations/count", "conversations", "count_conversations")
        .summary("Count conversations")
        .parameters(&[
            query("title__contains", text_up_to(10000)),
            time("created_at__gte"),
            time("created_at__lt"),
            time("updated_at__gte"),
            time("updated_at__lt"),
            query("sandbox_id__eq", TEXT),
            TAG,
            query("include_sub_conversations", BOOLEAN),
        ])
        .returns(&[Response::json(COUNT)])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::patch("/api/v1/app-conversations/{conversation_id}", "conversations", "update_conversation")
        .summary("Update a conversation")
        .body("AppConversationUpdateRequest")
        .returns(&[Response::json(Schema::Component("AppConversation"))])
        .errors(&[NOT_FOUND, INVALID]),
    Route::delete("/api/v1/app-conversations/{conversation_id}", "conversations", "delete_conversation")
        .summary("Delete a conversation and its sub-conversations")
        .returns(&[Response::json(Schema::Component("Success"))])
        .errors(&[NOT_FOUND]),
    Route::post("/api/v1/app-conversations/{conversation_id}/switch_profile", "conversations", "switch_profile")
        .summary("Switch a running conversation to the model of a profile")
        .description("Needs an agent server of version 1.21 or later.")
        .body("ProfileSwitch")
        .returns(&[Response::json(Schema::Component("Success"))])
        .errors(&[NOT_FOUND, CONFLICT, INVALID, BAD_GATEWAY]),
    Route::post("/api/v1/app-conversations/{conversation_id}/switch_acp_model", "conversations", "switch_acp_model")
        .summary("Switch a running conversation with an ACP agent to another model")
        .body("AcpModelSwitch")
        .returns(&[
            Response::json(Schema::Component("Success")),
            Response::json(Schema::Component("Detail"))
                .status(504)
                .described("The agent server did not switch the model in time."),
        ])
        .errors(&[BAD_REQUEST, NOT_FOUND, CONFLICT, INVALID, BAD_GATEWAY]),
    Route::get("/api/v1/app-conversations/{conversation_id}/download", "download", "download_conversation")
        .streamed(300)
        .summary("Download a conversation as a zip")
        .description(
            "Returns 503 with `Retry-After` while the function `exports` builds a large zip, \
            which is then returned for 10 minutes. A conversation with more than 1,000,000 events is a 413.",
        )
        .returns(&[
            Response::new(200, Some(("application/zip", Schema::Binary)))
                .described("A zip of `meta.json` and one file for each event.")
                .headers(&[
                    header("Content-Disposition", TEXT),
                    header("X-Export-Warning", TEXT).described("Describes what may be missing."),
                    header("Content-Length", INTEGER),
                ]),
            Response::new(302, None)
                .described("The location of a zip over 64 MiB. The link is valid for 15 minutes.")
                .headers(&[header("Location", TEXT).required()]),
        ])
        .errors(&[NOT_FOUND, CONTENT_TOO_LARGE, INVALID, BAD_GATEWAY]),
];
