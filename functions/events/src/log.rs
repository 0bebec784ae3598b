//! `GET /api/v1/conversation/{id}/events`, `…/search` and `…/count`: the log of a conversation of the caller's. One that they
//! do not have has an empty log.

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, RawQuery, State};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use serde_json::value::RawValue;
use shared::Time;
use shared::error::Error;
use shared::event::store::{Event, EventFilter, SortOrder};
use shared::http::caller::Caller;
use shared::http::page_token;
use shared::http::pydantic::query::{Bounds, Query};
use shared::http::pydantic::validation::Checked;
use uuid::Uuid;

use crate::{Context, conversation_id};

/// The most ids that one request may name.
const MAX_IDS: usize = 100;
/// The most characters of a kind that one can ask for. Any kind can be asked for, because later agent servers have others.
const MAX_KIND: usize = 100;

/// The routes that read events, for the caller that the edge has found.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/conversation/{conversation_id}/events", get(batch_get))
        .route("/api/v1/conversation/{conversation_id}/events/search", get(search))
        .route("/api/v1/conversation/{conversation_id}/events/count", get(count))
        .with_state(context)
}

#[derive(Serialize)]
struct EventPage {
    items: Vec<Box<RawValue>>,
    next_page_id: Option<String>,
}

async fn search(
    State(context): State<Context>,
    Caller(user): Caller,
    conversation: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    let mut query = Query::parse(query.as_deref());
    let filter = filter(&mut query);
    let order = query.choice("sort_order").unwrap_or(SortOrder::Timestamp);
    let page = query.string("page_id");
    let limit = query.integer("limit", 100, Bounds::PAGE);
    let conversation = both(conversation_id(conversation), query.finish())?;
    let list =
        ("events".to_owned(), conversation, filter.kind.clone(), filter.timestamp_gte, filter.timestamp_lt, order);
    let after = page.map(|page| page_token::decode(&user, &page, &list)).transpose()?;
    let limit = usize::try_from(limit).unwrap_or(100);
    let found = context.events.page(&user, conversation, &filter, order, after.as_ref(), limit).await?;
    let items = found.events.into_iter().map(as_sent).collect::<Result<_, _>>()?;
    let next_page_id = found.next.map(|next| page_token::encode(&user, &list, &next)).transpose()?;
    Ok(Json(EventPage { items, next_page_id }).into_response())
}

async fn count(
    State(context): State<Context>,
    Caller(user): Caller,
    conversation: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
) -> Result<Json<u64>, Error> {
    let mut query = Query::parse(query.as_deref());
    let filter = filter(&mut query);
    let conversation = both(conversation_id(conversation), query.finish())?;
    context.events.count(&user, conversation, &filter).await.map(Json)
}

async fn batch_get(
    State(context): State<Context>,
    Caller(user): Caller,
    conversation: Result<Path<String>, PathRejection>,
    RawQuery(query): RawQuery,
) -> Result<Response, Error> {
    let mut query = Query::parse(query.as_deref());
    let ids = query.strings("id");
    let conversation = both(conversation_id(conversation), query.finish())?;
    if ids.len() > MAX_IDS {
        let text = format!("Cannot request more than {MAX_IDS} events at once, got {}", ids.len());
        return Err(Error::Refused(text));
    }
    let found = context.events.batch_get(&user, conversation, &ids).await?;
    let shown = found.into_iter().map(|event| event.map(as_sent).transpose()).collect::<Result<Vec<_>, _>>()?;
    Ok(Json(shown).into_response())
}

fn filter(query: &mut Query) -> EventFilter {
    EventFilter {
        kind: query.string_up_to(MAX_KIND, "kind__eq"),
        timestamp_gte: query.datetime("timestamp__gte").map(Time::from),
        timestamp_lt: query.datetime("timestamp__lt").map(Time::from),
    }
}

/// Faults of the path, then those of the query.
fn both(conversation: Checked<Uuid>, query: Checked<()>) -> Result<Uuid, Error> {
    match (conversation, query) {
        (Ok(conversation), Ok(())) => Ok(conversation),
        (conversation, query) => {
            let mut violations = conversation.err().unwrap_or_default();
            violations.extend(query.err().unwrap_or_default());
            Err(Error::Invalid(violations))
        }
    }
}

/// Byte for byte.
fn as_sent(event: Event) -> Result<Box<RawValue>, Error> {
    RawValue::from_string(event.json).map_err(Error::internal)
}
