//! Events of conversations.

use crate::schema::{COUNT, IDS, LIMIT, PAGE_ID, query, time};
use crate::{CONTENT_TOO_LARGE, Group, INVALID, Response, Route, Schema};

pub(crate) const GROUP: Group = Group { tag: "Events", routes: ROUTES };

const ROUTES: &[Route] = &[
    Route::get("/api/v1/conversation/{conversation_id}/events", "events", "batch_get_events")
        .summary("Get events by id")
        .parameters(&[IDS])
        .returns(&[Response::json(Schema::NullableListOf("Event"))])
        .errors(&[CONTENT_TOO_LARGE, INVALID]),
    Route::get("/api/v1/conversation/{conversation_id}/events/search", "events", "search_events")
        .summary("Search events")
        .parameters(&[
            query("kind__eq", Schema::Component("EventKind")),
            time("timestamp__gte"),
            time("timestamp__lt"),
            query("sort_order", Schema::Choice(&["TIMESTAMP", "TIMESTAMP_DESC"])),
            PAGE_ID,
            LIMIT,
        ])
        .returns(&[Response::json(Schema::Component("EventPage"))])
        .errors(&[INVALID]),
    Route::get("/api/v1/conversation/{conversation_id}/events/count", "events", "count_events")
        .summary("Count events")
        .parameters(&[query("kind__eq", Schema::Component("EventKind")), time("timestamp__gte"), time("timestamp__lt")])
        .returns(&[Response::json(COUNT)])
        .errors(&[INVALID]),
];
