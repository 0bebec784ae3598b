//! Starts of conversations.

use crate::schema::{COUNT, LIMIT, PAGE_ID, UUID, query, time, uuids};
use crate::{BAD_REQUEST, Group, INVALID, NOT_FOUND, Response, Route, Schema};

pub(crate) const GROUP: Group = Group { tag: "Starts", routes: ROUTES };

const ROUTES: &[Route] = &[
    Route::post("/api/v1/app-conversations", "start", "start_conversation")
        .summary("Start a conversation")
        .body("AppConversationStartRequest")
        .returns(&[Response::json(Schema::Component("AppConversationStartTask"))
            .described("The start. Its id serves to follow it.")])
        .errors(&[BAD_REQUEST, NOT_FOUND, INVALID]),
    Route::post("/api/v1/app-conversations/stream-start", "stream-start", "stream_start")
        .streamed(900)
        .summary("Start a conversation and stream its progress")
        .body("AppConversationStartRequest")
        .returns(&[Response::json(Schema::ListOf("AppConversationStartTask")).described(
            "An array of the start's states, each sent when it is reached. READY or ERROR \
            is the last one. A newline is sent every 10 s while the state does not change.",
        )])
        .errors(&[BAD_REQUEST, NOT_FOUND, INVALID]),
    Route::get("/api/v1/app-conversations/start-tasks", "start-tasks", "batch_get_start_tasks")
        .summary("Get starts by id")
        .description("Requests that would make the response larger than 5 MB are abridged.")
        .parameters(&[uuids("ids", 100, "At most 100.")])
        .returns(&[Response::json(Schema::NullableListOf("AppConversationStartTask"))])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::get("/api/v1/app-conversations/start-tasks/search", "start-tasks", "search_start_tasks")
        .summary("Search starts")
        .description("A page ends before 5 MB. A request that is larger than that is abridged.")
        .parameters(&[
            query("conversation_id__eq", UUID),
            time("created_at__gte"),
            query("sort_order", Schema::Component("SortOrder")),
            PAGE_ID,
            LIMIT,
        ])
        .returns(&[Response::json(Schema::Component("AppConversationStartTaskPage"))])
        .errors(&[BAD_REQUEST, INVALID]),
    Route::get("/api/v1/app-conversations/start-tasks/count", "start-tasks", "count_start_tasks")
        .summary("Count starts")
        .parameters(&[query("conversation_id__eq", UUID), time("created_at__gte")])
        .returns(&[Response::json(COUNT)])
        .errors(&[BAD_REQUEST, INVALID]),
];
