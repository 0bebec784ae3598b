//! `GET /api/v1/conversation/{id}/events`, `…/search` and `…/count`: the event log of one of the caller's conversations. The log of
//! an unknown conversation is empty.

use axum::extract::{RawQuery, State};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::value::RawValue;
use shared::Time;
use shared::error::{Error, Result};
use shared::event::store::{Event, EventFilter, SortOrder};
use shared::http::caller::Caller;
use shared::http::extract::{ConversationId, PageRequest, both};
use shared::http::page::PageOut;
use shared::http::pydantic::query::Query;

use crate::Context;

/// The most ids that one request may name.
const MAX_IDS: usize = 100;
/// The most characters of `kind__eq`. Any kind is accepted, because later agent servers have other kinds.
const MAX_KIND: usize = 100;

/// The routes that read events. They need an authenticated caller.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/conversation/{conversation_id}/events", get(batch_get))
        .route("/api/v1/conversation/{conversation_id}/events/search", get(search))
        .route("/api/v1/conversation/{conversation_id}/events/count", get(count))
        .with_state(context)
}

async fn search(
    State(context): State<Context>,
    Caller(user): Caller,
    conversation: Result<ConversationId>,
    RawQuery(query): RawQuery,
) -> Result<Json<PageOut<Event>>> {
    let mut query = Query::parse(query.as_deref());
    let filter = filter(&mut query);
    let order = query.choice("sort_order").unwrap_or(SortOrder::Timestamp);
    let page = PageRequest::read(&mut query);
    let (ConversationId(conversation), ()) = both(conversation, query.finish().map_err(Error::Invalid))?;
    let list =
        ("events".to_owned(), conversation, filter.kind.clone(), filter.timestamp_gte, filter.timestamp_lt, order);
    let page = page.of(&user, list);
    let after = page.after()?;
    let found = context.events.page(&user, conversation, &filter, order, after.as_ref(), page.limit).await?;
    let items = found.events.into_iter().map(raw_json).collect::<Result<_>>()?;
    Ok(Json(PageOut::new(items, page.next_page_id(found.next)?)))
}

async fn count(
    State(context): State<Context>,
    Caller(user): Caller,
    conversation: Result<ConversationId>,
    RawQuery(query): RawQuery,
) -> Result<Json<u64>> {
    let mut query = Query::parse(query.as_deref());
    let filter = filter(&mut query);
    let (ConversationId(conversation), ()) = both(conversation, query.finish().map_err(Error::Invalid))?;
    context.events.count(&user, conversation, &filter).await.map(Json)
}

async fn batch_get(
    State(context): State<Context>,
    Caller(user): Caller,
    conversation: Result<ConversationId>,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<Option<Box<RawValue>>>>> {
    let mut query = Query::parse(query.as_deref());
    let ids = query.strings("id");
    let (ConversationId(conversation), ()) = both(conversation, query.finish().map_err(Error::Invalid))?;
    if ids.len() > MAX_IDS {
        let text = format!("Cannot request more than {MAX_IDS} events at once, got {}", ids.len());
        return Err(Error::Refused(text));
    }
    let found = context.events.batch_get(&user, conversation, &ids).await?;
    let shown = found.into_iter().map(|event| event.map(raw_json).transpose()).collect::<Result<_>>()?;
    Ok(Json(shown))
}

fn filter(query: &mut Query) -> EventFilter {
    EventFilter {
        kind: query.string_up_to(MAX_KIND, "kind__eq"),
        timestamp_gte: query.datetime("timestamp__gte").map(Time::from),
        timestamp_lt: query.datetime("timestamp__lt").map(Time::from),
    }
}

/// The JSON of an event, byte for byte as the agent server sent it.
fn raw_json(event: Event) -> Result<Box<RawValue>> {
    RawValue::from_string(event.json).map_err(Error::internal)
}
