//! `GET /api/v1/app-conversations/start-tasks`, `…/search`, `…/count`: how far starts are.

use axum::extract::{RawQuery, State};
use axum::routing::get;
use axum::{Json, Router};
use shared::aws::Aws;
use shared::config::Config;
use shared::error::Error;
use shared::http::caller::Caller;
use shared::http::page::Page;
use shared::http::page_token;
use shared::http::pydantic::query::{Bounds, Query};
use shared::start::store::{Filter, SortOrder, StartTaskStore};
use shared::start::task::AppConversationStartTask;
use shared::stores::Stores;

/// The most ids that one request may name.
const MAX_IDS: usize = 100;

/// What this function may touch: it reads start tasks.
#[derive(Clone, Debug)]
pub struct Context {
    tasks: StartTaskStore,
}

impl Context {
    /// A context on the configured tables. Secrets of starts are not its business: it has no key that opens them.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws) -> Self {
        Self { tasks: Stores::without_key(&config.names, aws).start_tasks_without_secrets() }
    }
}

/// The routes of this function.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/app-conversations/start-tasks", get(batch_get))
        .route("/api/v1/app-conversations/start-tasks/search", get(search))
        .route("/api/v1/app-conversations/start-tasks/count", get(count))
        .with_state(context)
}

async fn batch_get(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<Option<AppConversationStartTask>>>, Error> {
    let mut query = Query::parse(query.as_deref());
    let ids = query.uuids("ids");
    query.finish().map_err(Error::Invalid)?;
    if ids.len() > MAX_IDS {
        return Err(Error::Refused(format!(
            "Cannot request more than {MAX_IDS} start tasks at once, got {}",
            ids.len()
        )));
    }
    let records = context.tasks.batch_get(&user, &ids).await?;
    Ok(Json(context.tasks.show_all(&records).await?))
}

async fn search(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Page>, Error> {
    let mut query = Query::parse(query.as_deref());
    let filter = filter(&mut query);
    let order: SortOrder = query.choice("sort_order").unwrap_or(SortOrder::CreatedAtDesc);
    let page = query.string("page_id");
    let limit = query.integer("limit", 100, Bounds::PAGE);
    query.finish().map_err(Error::Invalid)?;
    let list = ("start-tasks".to_owned(), filter, order);
    let after = page.map(|page| page_token::decode(&user, &page, &list)).transpose()?;
    let limit = usize::try_from(limit).unwrap_or(100);
    let (records, mut next) = context.tasks.list(&user, &list.1, order, after.as_ref(), limit).await?;
    let items = context.tasks.show_page(&records).await?;
    if items.len() < records.len() {
        next = items.len().checked_sub(1).map(|last| StartTaskStore::place(&records[last], order));
    }
    let next = next.map(|next| page_token::encode(&user, &list, &next)).transpose()?;
    Ok(Json(items.into_page(next)))
}

async fn count(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<u64>, Error> {
    let mut query = Query::parse(query.as_deref());
    let filter = filter(&mut query);
    query.finish().map_err(Error::Invalid)?;
    Ok(Json(context.tasks.count(&user, &filter).await?))
}

fn filter(query: &mut Query) -> Filter {
    Filter {
        conversation_id: query.uuid("conversation_id__eq"),
        created_at_gte: query.datetime("created_at__gte").map(Into::into),
    }
}
