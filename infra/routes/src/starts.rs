//! Starts of conversations.

use crate::schema::{COUNT, IDEMPOTENCY_KEY, LIMIT, PAGE_ID, RETRY_AFTER, UUID, query, time, uuids};
use crate::{BAD_REQUEST, CONFLICT, Group, INVALID, NOT_FOUND, Response, Route, Schema};

pub(crate) const GROUP: Group = Group { tag: "Starts", routes: ROUTES };

const TOO_MANY_STARTS: Response = Response::json(Schema::Component("Detail"))
    .status(429)
    .described("The user has too many unfinished starts.")
    .headers(&[RETRY_AFTER]);

const ROUTES: &[Route] = &[
    Route::post("/api/v1/app-conversations", "start", "start_conversation")
        .summary("Start a conversation")
        .parameters(&[IDEMPOTENCY_KEY])
        .body("AppConversationStartRequest")
        .returns(&[
            Response::json(Schema::Component("AppConversationStartTask"))
                .described("The start. Its id serves to follow it."),
            TOO_MANY_STARTS,
        ])
        .errors(&[BAD_REQUEST, NOT_FOUND, CONFLICT, INVALID]),
    Route::post("/api/v1/app-conversations/stream-start", "stream-start", "stream_start")
        .streamed(900)
        .summary("Start a conversation and stream its progress")
        .parameters(&[IDEMPOTENCY_KEY])
        .body("AppConversationStartRequest")
        .returns(&[
            Response::json(Schema::ListOf("AppConversationStartTask")).described(
                "An array of the start's states, each sent when it is reached. READY or ERROR \
            is the last one. A newline is sent every 10 s while the state does not change.",
            ),
            TOO_MANY_STARTS,
        ])
        .errors(&[BAD_REQUEST, NOT_FOUND, CONFLICT, INVALID]),
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
    Route::delete("/api/v1/app-conversations/start-tasks/{task_id}", "start-tasks", "cancel_start_task")
        .summary("Cancel a start, or remove a failed one")
        .description(
            "An unfinished start ends with ERROR, and what it made is removed. The record of a failed start is \
            removed, unless what the start made is still being removed. A start that is READY is a 409, which \
            names the conversation to delete instead.",
        )
        .returns(&[Response::json(Schema::Component("Success"))])
        .errors(&[NOT_FOUND, CONFLICT, INVALID]),
];
