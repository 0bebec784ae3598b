//! `/api/v1/app-conversations`: conversations with their live status. `GET` returns conversations by id, `…/search` (with pagination) and
//! `…/count` those that match a filter, `PATCH …/{id}` updates one, and `DELETE …/{id}` deletes one.
//! `POST …/{id}/switch_profile` and `…/switch_acp_model` change the model of a running one.

mod switch;

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Path, RawQuery, State};
use axum::routing::{get, patch, post};
use axum::{Json, Router};
use futures::future::{try_join, try_join_all};
use shared::aws::Aws;
use shared::config::Config;
use shared::conversation::live_status::LiveStatus;
use shared::conversation::search::{Cursor, Filter, SortOrder};
use shared::conversation::store::ConversationStore;
use shared::conversation::tags::{MAX_TAG_FILTERS, TagFilter};
use shared::conversation::update_request::UpdateRequest;
use shared::conversation::workspace::WorkspaceLocator;
use shared::conversation::{AppConversation, ConversationRecord, MAX_NAME};
use shared::deletion::Deleter;
use shared::error::Error;
use shared::http::caller::Caller;
use shared::http::extract::{JsonBody, PageRequest};
use shared::http::page::{self, PageOut};
use shared::http::pydantic::query::{Query, lenient_uuid, lenient_uuids};
use shared::http::pydantic::validation::{self, Choice as _};
use shared::http::response::SuccessOut;
use shared::http_client::HttpClient;
use shared::sandbox::SandboxService;
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;
use uuid::Uuid;

use crate::switch::SwitchConfig;

/// The most ids that one request may name.
const MAX_IDS: usize = 99;

/// The largest body, in bytes: an update holds a few names.
const BODY_LIMIT: usize = 1024 * 1024;

/// What this function can access: it reads and changes conversations, reads settings, queries sandboxes and their agent servers, and
/// enqueues jobs for the worker that completes deletions.
#[derive(Clone, Debug)]
pub struct Context {
    conversations: ConversationStore,
    deleter: Deleter,
    live: LiveStatus,
    settings: SettingsStore,
    locator: WorkspaceLocator,
    switch: SwitchConfig,
}

impl Context {
    /// A context on the configured tables and sandboxes.
    #[must_use]
    pub fn new(config: &Config, aws: &Aws, sealer: &Sealer) -> Self {
        let stores = Stores::new(&config.names, aws, sealer);
        let sandboxes = stores.sandbox_viewer(&config.sandbox);
        Self::with_sandboxes(config, &stores, sandboxes)
    }

    /// A context on these records and sandboxes.
    #[must_use]
    pub fn with_sandboxes(config: &Config, stores: &Stores, sandboxes: Arc<dyn SandboxService>) -> Self {
        let http = HttpClient::new(config.address_policy);
        Self {
            conversations: stores.conversations(),
            deleter: stores.deleter(),
            live: LiveStatus::new(sandboxes.clone(), http.clone(), config.live_status_budget),
            settings: stores.settings(),
            locator: WorkspaceLocator::new(stores.conversations(), sandboxes, http),
            switch: SwitchConfig { start: config.start.clone(), budget: config.sandbox_request_budget },
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
        .route("/api/v1/app-conversations/{conversation_id}/switch_profile", post(switch::switch_profile))
        .route("/api/v1/app-conversations/{conversation_id}/switch_acp_model", post(switch::switch_acp_model))
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
) -> Result<Json<PageOut<AppConversation>>, Error> {
    let mut query = Query::parse(query.as_deref());
    let mut filter = filter(&mut query);
    let page = PageRequest::read(&mut query);
    filter.include_sub_conversations = query.boolean("include_sub_conversations", false);
    // An unknown order is not a violation, because the reference ignores the parameter.
    let order =
        query.string("sort_order").and_then(|order| SortOrder::from_wire(&order)).unwrap_or(SortOrder::CreatedAtDesc);
    query.finish().map_err(Error::Invalid)?;
    let page = page.of(&user, ("conversations".to_owned(), filter, order));
    let after = page.after()?;
    let found = context.conversations.search(&user, &page.list.1, order, after.as_ref(), page.limit).await?;
    let shown = context.live.show(&user, found.records).await?;
    // The store has bounded the page and has reserved space for the usual live status, so that this rarely drops an item.
    let items = page::fitting(&shown)?;
    let next = match shown.get(items.len()..) {
        Some([_, ..]) => shown[..items.len()].last().map(|last| Cursor::of(last, order)),
        _ => found.next,
    };
    Ok(Json(items.into_page(page.next_page_id(next)?)))
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
    JsonBody(request): JsonBody<UpdateRequest>,
) -> Result<Json<AppConversation>, Error> {
    let id = validation::path_uuid("conversation_id", &id).map_err(Error::Invalid)?;
    context.update(&user, id, request).await.map(Json)
}

async fn delete(
    State(context): State<Context>,
    Caller(user): Caller,
    Path(id): Path<String>,
) -> Result<Json<SuccessOut>, Error> {
    let id = lenient_uuid(&id).ok_or_else(|| Error::Refused("Invalid conversation ID format".into()))?;
    match context.deleter.delete(&user, id).await? {
        true => Ok(SuccessOut::json()),
        false => Err(Error::NotFound("Conversation not found".into())),
    }
}

/// Reads the filters that search and count have in common.
fn filter(query: &mut Query) -> Filter {
    Filter {
        title_contains: query.string_up_to(MAX_NAME, "title__contains"),
        created_at_gte: query.datetime("created_at__gte").map(Into::into),
        created_at_lt: query.datetime("created_at__lt").map(Into::into),
        updated_at_gte: query.datetime("updated_at__gte").map(Into::into),
        updated_at_lt: query.datetime("updated_at__lt").map(Into::into),
        sandbox_id: query.string("sandbox_id__eq"),
        tags: query.list("tag", MAX_TAG_FILTERS, TagFilter::read),
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

    /// Applies the changes of a request, and sends a new title to the agent server.
    async fn update(&self, user: &UserId, id: Uuid, mut request: UpdateRequest) -> Result<AppConversation, Error> {
        let unknown = || Error::NotFound("unknown_app_conversation".into());
        if request.selects() {
            // A missing conversation is reported before any violation.
            let stored = self.conversations.get(user, id).await?.ok_or_else(unknown)?;
            let tokens = self.settings.get(user).await?.unwrap_or_default().provider_tokens;
            let selected = (stored.selected_repository.as_deref(), stored.git_provider);
            request = request.normal(selected, &tokens).map_err(Error::Invalid)?;
        }
        let change = request.change();
        let record = match change.is_empty() {
            true => self.conversations.get(user, id).await?,
            false => self.conversations.update(user, id, change).await?,
        };
        let record = record.ok_or_else(unknown)?;
        let title = request.title.as_ref().and_then(Option::as_deref);
        let send_title = async {
            match title {
                Some(title) => self.live.send_title(&record, title).await,
                None => Ok(()),
            }
        };
        let (shown, ()) = try_join(self.show(user, vec![record.clone()]), send_title).await?;
        shown.into_iter().next().ok_or_else(unknown)
    }

    /// Adds the live status and the sub-conversations to records.
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
