//! `GET /api/v1/app-conversations/start-tasks`, `…/search`, `…/count`: the progress of start tasks. `DELETE …/start-tasks/{id}`: cancels
//! a start.

use axum::extract::{RawQuery, State};
use axum::routing::{delete, get};
use axum::{Json, Router};
use shared::aws::Aws;
use shared::config::Config;
use shared::error::Error;
use shared::http::caller::Caller;
use shared::http::extract::{PageRequest, TaskId};
use shared::http::page::PageOut;
use shared::http::pydantic::query::Query;
use shared::http::response::SuccessOut;
use shared::start::cancel::Canceller;
use shared::start::store::{Filter, SortOrder, StartTaskStore};
use shared::start::task::AppConversationStartTask;
use shared::stores::Stores;

/// The most ids that one request may name.
const MAX_IDS: usize = 100;

/// What this function can access: it reads, ends and removes start tasks, and enqueues jobs.
#[derive(Clone, Debug)]
pub struct Context {
    tasks: StartTaskStore,
    canceller: Canceller,
}

impl Context {
    /// A context on the configured tables. It has no key that could decrypt the secrets of starts, because it does not need them.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws) -> Self {
        let stores = Stores::without_key(&config.names, aws);
        let tasks = stores.start_tasks_without_secrets();
        Self { canceller: Canceller { tasks: tasks.clone(), queue: stores.queue() }, tasks }
    }
}

/// The routes of this function.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/app-conversations/start-tasks", get(batch_get))
        .route("/api/v1/app-conversations/start-tasks/search", get(search))
        .route("/api/v1/app-conversations/start-tasks/count", get(count))
        .route("/api/v1/app-conversations/start-tasks/{task_id}", delete(cancel))
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
) -> Result<Json<PageOut<AppConversationStartTask>>, Error> {
    let mut query = Query::parse(query.as_deref());
    let filter = filter(&mut query);
    let order: SortOrder = query.choice("sort_order").unwrap_or(SortOrder::CreatedAtDesc);
    let page = PageRequest::read(&mut query);
    query.finish().map_err(Error::Invalid)?;
    let page = page.of(&user, ("start-tasks".to_owned(), filter, order));
    let after = page.after()?;
    let (records, mut next) = context.tasks.list(&user, &page.list.1, order, after.as_ref(), page.limit).await?;
    let items = context.tasks.show_page(&records).await?;
    if items.len() < records.len() {
        next = items.len().checked_sub(1).map(|last| StartTaskStore::place(&records[last], order));
    }
    Ok(Json(items.into_page(page.next_page_id(next)?)))
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

async fn cancel(
    State(context): State<Context>,
    Caller(user): Caller,
    TaskId(task): TaskId,
) -> Result<Json<SuccessOut>, Error> {
    context.canceller.cancel(&user, task).await?;
    Ok(SuccessOut::json())
}

fn filter(query: &mut Query) -> Filter {
    Filter {
        conversation_id: query.uuid("conversation_id__eq"),
        created_at_gte: query.datetime("created_at__gte").map(Into::into),
    }
}
