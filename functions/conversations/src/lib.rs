//! `/api/v1/app-conversations`: conversations with their live status. `GET` for some by id, `…/search` and `…/count` for all that
//! a filter lets through, `PATCH …/{id}` to change one, `DELETE …/{id}` to delete it.

use axum::extract::{DefaultBodyLimit, Path, RawQuery, State};
use axum::routing::{get, patch};
use axum::{Json, Router};
use bytes::Bytes;
use futures::future::{try_join, try_join_all};
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::config::Config;
use shared::conversation::live_status::LiveStatus;
use shared::conversation::search::{Cursor, Filter, SortOrder};
use shared::conversation::store::ConversationStore;
use shared::conversation::update_request::UpdateRequest;
use shared::conversation::{AppConversation, ConversationRecord, MAX_NAME};
use shared::deletion::Deleter;
use shared::error::Error;
use shared::http::caller::Caller;
use shared::http::page::{self, Page};
use shared::http::page_token;
use shared::http::pydantic::query::{Bounds, Query, lenient_uuid, lenient_uuids};
use shared::http::pydantic::validation::{self, Choice as _};
use shared::http_client::HttpClient;
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;
use uuid::Uuid;

/// The most ids that one request may name.
const MAX_IDS: usize = 99;

/// An update holds a few names.
const BODY_LIMIT: usize = 1024 * 1024;

/// What this function may touch: it reads and changes conversations, reads settings, looks at sandboxes and their agent servers, and enqueues jobs for
/// the worker that finishes deletions.
#[derive(Clone, Debug)]
pub struct Context {
    conversations: ConversationStore,
    deleter: Deleter,
    live: LiveStatus,
    settings: SettingsStore,
}

impl Context {
    /// A context on the configured tables and sandboxes.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let stores = Stores::new(&config.names, aws, sealer);
        let sandboxes = stores.sandbox_service(&config.sandbox);
        let http = HttpClient::new(config.address_policy);
        Self {
            conversations: stores.conversations(),
            deleter: stores.deleter(),
            live: LiveStatus::new(sandboxes, http, config.live_status_budget),
            settings: stores.settings(),
        }
    }
}

/// The routes of this function.
pub fn router(context: Context) -> Router {
    Router::new()
        .route("/api/v1/app-conversations", get(batch_get))
        .route("/api/v1/app-conversations/search", get(search))
        .route("/api/v1/app-conversations/count", get(count))
        .route("/api/v1/app-conversations/{conversation_id}", patch(update).delete(delete))
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .with_state(context)
}

async fn batch_get(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<Option<AppConversation>>>, Error> {
    let mut query = Query::parse(query.as_deref());
    let ids = query.strings("ids");
    query.finish().map_err(Error::Invalid)?;
    if ids.len() > MAX_IDS {
        return Err(Error::Refused(format!("Too many ids requested. Maximum is {MAX_IDS}.")));
    }
    let ids = lenient_uuids(&ids).map_err(Error::Refused)?;
    let found = context.batch_get(&user, &ids).await?;
    page::check_batch(&found, "conversations")?;
    Ok(Json(found))
}

async fn search(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Page>, Error> {
    let mut query = Query::parse(query.as_deref());
    let mut filter = filter(&mut query);
    let page_id = query.string("page_id");
    let limit = query.integer("limit", 100, Bounds::PAGE);
    filter.include_sub_conversations = query.boolean("include_sub_conversations", false);
    // The reference ignores the parameter, so that what is none of these is no fault.
    let order =
        query.string("sort_order").and_then(|order| SortOrder::from_wire(&order)).unwrap_or(SortOrder::CreatedAtDesc);
    query.finish().map_err(Error::Invalid)?;
    let list = ("conversations".to_owned(), filter, order);
    let after = page_id.map(|page| page_token::decode(&user, &page, &list)).transpose()?;
    let limit = usize::try_from(limit).unwrap_or(100);
    let found = context.conversations.search(&user, &list.1, order, after.as_ref(), limit).await?;
    let shown = context.live.show(&user, found.records).await?;
    // The store has bounded the page, with room for the usual live status.
    let items = page::fitting(&shown)?;
    let next = match shown.get(items.len()..) {
        Some([_, ..]) => shown[..items.len()].last().map(|last| Cursor::of(last, order)),
        _ => found.next,
    };
    let next = next.map(|next| page_token::encode(&user, &list, &next)).transpose()?;
    Ok(Json(items.into_page(next)))
}

async fn count(
    State(context): State<Context>,
    Caller(user): Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<u64>, Error> {
    let mut query = Query::parse(query.as_deref());
    let mut filter = filter(&mut query);
    filter.include_sub_conversations = query.boolean("include_sub_conversations", true);
    query.finish().map_err(Error::Invalid)?;
    Ok(Json(context.conversations.count(&user, &filter).await?))
}

async fn update(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(id): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Result<Json<AppConversation>, Error> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let request = UpdateRequest::from_body(content_type, &body).map_err(Error::Invalid)?;
    let id = validation::path_uuid("conversation_id", &id).map_err(Error::Invalid)?;
    context.update(&user, id, request).await.map(Json)
}

async fn delete(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(id): Path<String>,
) -> Result<Json<Value>, Error> {
    let id = lenient_uuid(&id).ok_or_else(|| Error::Refused("Invalid conversation ID format".into()))?;
    match context.deleter.delete(&user, id).await? {
        true => Ok(Json(json!({"success": true}))),
        false => Err(Error::NotFound("Conversation not found".into())),
    }
}

/// The filters that search and count have in common.
fn filter(query: &mut Query) -> Filter {
    Filter {
        title_contains: query.string_up_to(MAX_NAME, "title__contains"),
        created_at_gte: query.datetime("created_at__gte").map(Into::into),
        created_at_lt: query.datetime("created_at__lt").map(Into::into),
        updated_at_gte: query.datetime("updated_at__gte").map(Into::into),
        updated_at_lt: query.datetime("updated_at__lt").map(Into::into),
        sandbox_id: query.string("sandbox_id__eq"),
        include_sub_conversations: false,
    }
}

impl Context {
    async fn batch_get(&self, user: &UserId, ids: &[Uuid]) -> Result<Vec<Option<AppConversation>>, Error> {
        let records = self.conversations.batch_get(user, ids).await?;
        let mut known: Vec<_> = records.into_iter().flatten().collect();
        known.sort_by_key(|record| record.id);
        known.dedup_by_key(|record| record.id);
        let shown = self.show(user, known).await?;
        Ok(ids.iter().map(|id| shown.iter().find(|conversation| conversation.id == *id).cloned()).collect())
    }

    /// Changes what the request names, and tells the agent server of a new title.
    async fn update(&self, user: &UserId, id: Uuid, mut request: UpdateRequest) -> Result<AppConversation, Error> {
        let unknown = || Error::NotFound("unknown_app_conversation".into());
        if request.selects() {
            // What does not exist cannot be changed badly either.
            let kept = self.conversations.get(user, id).await?.ok_or_else(unknown)?;
            let tokens = self.settings.get(user).await?.unwrap_or_default().provider_tokens;
            let kept = (kept.selected_repository.as_deref(), kept.git_provider);
            request = request.normal(kept, &tokens).map_err(Error::Invalid)?;
        }
        let change = request.change();
        let record = match change.is_empty() {
            true => self.conversations.get(user, id).await?,
            false => self.conversations.update(user, id, change).await?,
        };
        let record = record.ok_or_else(unknown)?;
        let title = request.title.as_ref().and_then(Option::as_deref);
        let told = async {
            match title {
                Some(title) => self.live.send_title(&record, title).await,
                None => Ok(()),
            }
        };
        let (shown, ()) = try_join(self.show(user, vec![record.clone()]), told).await?;
        shown.into_iter().next().ok_or_else(unknown)
    }

    /// Records with their live status and their sub-conversations.
    async fn show(&self, user: &UserId, records: Vec<ConversationRecord>) -> Result<Vec<AppConversation>, Error> {
        let mut shown = self.live.show(user, records).await?;
        let children =
            try_join_all(shown.iter().map(|conversation| self.conversations.sub_conversations(user, conversation.id)))
                .await?;
        for (conversation, children) in shown.iter_mut().zip(children) {
            conversation.sub_conversation_ids = children;
        }
        Ok(shown)
    }
}
