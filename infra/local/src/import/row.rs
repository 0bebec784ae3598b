//! Parses rows of imported data strictly, so that no value is guessed and the store accepts every parsed row.
//!
//! A row that cannot be imported is an error with the reason. The reason contains no values of the row: reasons are grouped in a
//! summary, and values may be secrets.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::Value;
use shared::Time;
use shared::conversation::tags::Tags;
use shared::conversation::{
    ConversationRecord, LaunchedAgentProfile, MAX_AGENT_NAME, MetricsSnapshot, OPENHANDS_AGENT, TokenUsage,
};
use shared::event::store::Event;
use shared::http::pydantic::query::read_datetime;
use shared::http::pydantic::validation::{
    Checker, Fields, Loc, Violation, boolean, choice, float, integer, list, string, string_up_to, uuid, uuid_from_text,
};
use shared::http::secret::{MAX_NAME, MAX_SECRETS};
use shared::start::request::{Secrets, StartRequest};
use shared::start::store::ImportedTask;
use shared::start::task::{Snapshot, StartStatus};
use shared::user::UserId;
use shared::user::git::without_credentials;
use uuid::Uuid;

/// Owners and sandbox ids are parts of keys, whose length DynamoDB limits to 1024 or 2048 bytes.
const MAX_KEY_PART_BYTES: usize = 512;
/// DynamoDB limits items to 400 KB, and a start task stores its `detail` twice.
const MAX_TEXT_BYTES: usize = 150 * 1024;
const MAX_PULL_REQUESTS: usize = 1000;
/// A range within that of DynamoDB's numbers, which is from 10^-130 to 10^125.
const FLOATS: std::ops::RangeInclusive<f64> = 1e-100..=1e100;

/// The owner of rows that name none; with `None`, such rows are skipped.
pub(super) type DefaultOwner<'o> = Option<&'o UserId>;

/// How to import a start that was not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unfinished {
    /// Its status is not changed.
    Keep,
    /// Its status becomes ERROR, with a `detail` that explains it.
    Fail,
}

/// Parses an `AppConversationInfo` of the contract. An `AppConversation` is accepted as well; its live fields are ignored.
pub(super) fn conversation(data: &Value, default: DefaultOwner<'_>) -> Result<ConversationRecord, String> {
    read("conversation", data, |check, fields| {
        let user = owner(check, fields, default);
        let id = fields.required(check, "id", uuid);
        let sandbox_id = fields.required(check, "sandbox_id", key_part);
        let selected_repository = fields.nullable(check, "selected_repository", repository);
        let selected_branch = fields.nullable(check, "selected_branch", string);
        let git_provider = fields.nullable(check, "git_provider", choice);
        let title = fields.nullable(check, "title", string);
        let trigger = fields.nullable(check, "trigger", choice);
        let pr_number = fields.nullable(check, "pr_number", |check, value| list(check, value, integer));
        let llm_model = fields.nullable(check, "llm_model", string);
        let metrics = fields.nullable(check, "metrics", metrics);
        let parent_conversation_id = fields.nullable(check, "parent_conversation_id", uuid);
        let public = fields.nullable(check, "public", boolean);
        let tags = fields.nullable(check, "tags", tags);
        let agent_kind = fields.nullable(check, "agent_kind", agent_name);
        let acp_server = fields.nullable(check, "acp_server", agent_name);
        let launched_agent_profile = fields.nullable(check, "launched_agent_profile", launched_agent_profile);
        let created_at = fields.required(check, "created_at", time);
        let updated_at = fields.nullable(check, "updated_at", time);
        let (tags, left_out) = tags?.unwrap_or_default();
        if let Some(conversation) = id.filter(|_| left_out > 0) {
            tracing::warn!(%conversation, left_out, "conversation.imported_tags_left_out");
        }
        let record = ConversationRecord {
            user: user?,
            id: id?,
            sandbox_id: sandbox_id?,
            selected_repository: selected_repository?,
            selected_branch: selected_branch?,
            git_provider: git_provider?,
            title: title?,
            trigger: trigger?,
            pr_number: pr_number?.unwrap_or_default(),
            llm_model: llm_model?,
            metrics: metrics?.unwrap_or_default(),
            parent_conversation_id: parent_conversation_id?,
            public: public?,
            tags,
            agent_kind: agent_kind?.unwrap_or_else(|| OPENHANDS_AGENT.to_owned()),
            acp_server: acp_server?,
            launched_agent_profile: launched_agent_profile?,
            created_at: created_at?,
            updated_at: last_change(created_at?, updated_at?),
        };
        if text_bytes(&record) > MAX_TEXT_BYTES || record.pr_number.len() > MAX_PULL_REQUESTS {
            refuse(check, "it is too large for the store");
        }
        Some(record)
    })
}

/// The kind of an agent, or the name of an ACP server.
fn agent_name(check: &mut Checker, value: &Value) -> Option<String> {
    string_up_to(MAX_AGENT_NAME, check, value)
}

fn launched_agent_profile(check: &mut Checker, value: &Value) -> Option<LaunchedAgentProfile> {
    let fields = Fields::of(check, value)?;
    let agent_profile_id = fields.required(check, "agent_profile_id", uuid);
    let revision = fields.required(check, "revision", |check, value| {
        let revision = u64::try_from(integer(check, value)?).ok();
        if revision.is_none() {
            refuse(check, "it is not a revision");
        }
        revision
    });
    Some(LaunchedAgentProfile { agent_profile_id: agent_profile_id?, revision: revision? })
}

/// A repository, which is not validated because it is history. Credentials in its URL are removed.
fn repository(check: &mut Checker, value: &Value) -> Option<String> {
    string(check, value).map(|text| without_credentials(&text))
}

/// The size of a conversation's texts in bytes.
pub(super) fn text_bytes(record: &ConversationRecord) -> usize {
    let usage = record.metrics.accumulated_token_usage.as_ref();
    let texts = [
        record.title.as_ref(),
        record.selected_repository.as_ref(),
        record.selected_branch.as_ref(),
        record.llm_model.as_ref(),
        Some(&record.metrics.model_name),
        usage.map(|usage| &usage.model),
        usage.map(|usage| &usage.response_id),
    ];
    texts.into_iter().flatten().map(String::len).sum::<usize>() + record.tags.size()
}

/// The tags within the limits of a record, and the number of those that were left out. The same limits apply to tags from agent servers.
fn tags(check: &mut Checker, value: &Value) -> Option<(Tags, usize)> {
    let tags = Tags::read(value);
    if tags.is_none() {
        check.report("dict_type", "Input should be a valid dictionary", value.clone(), None);
    }
    tags
}

/// Parses an `AppConversationStartTask` of the contract. The names of the secrets in its request are kept, their values are dropped.
pub(super) fn start_task(
    data: &Value,
    default: DefaultOwner<'_>,
    unfinished: Unfinished,
) -> Result<(UserId, ImportedTask), String> {
    read("start task", data, |check, fields| {
        let user = owner(check, fields, default);
        let id = fields.required(check, "id", uuid);
        let status = fields.required(check, "status", status);
        let detail = fields.nullable(check, "detail", string);
        let app_conversation_id = fields.nullable(check, "app_conversation_id", uuid);
        let sandbox_id = fields.nullable(check, "sandbox_id", string);
        let agent_server_url = fields.nullable(check, "agent_server_url", string);
        let request = fields.required(check, "request", request);
        let created_at = fields.required(check, "created_at", time);
        let updated_at = fields.nullable(check, "updated_at", time);
        let mut now = Snapshot {
            status: status?,
            updated_at: last_change(created_at?, updated_at?),
            detail: detail?,
            app_conversation_id: app_conversation_id?,
            sandbox_id: sandbox_id?,
            agent_server_url: agent_server_url?,
        };
        if unfinished == Unfinished::Fail && !now.status.is_final() {
            let at = serde_json::to_value(now.status).ok()?;
            now.detail = Some(format!(
                "This start was not finished (status {}) when it was imported from another server, and cannot be continued here.",
                at.as_str().unwrap_or_default()
            ));
            now.status = StartStatus::Error;
        }
        let task = ImportedTask { id: id?, now, created_at: created_at?, request: request? };
        if task_text_bytes(&task) > MAX_TEXT_BYTES {
            refuse(check, "it is too large for the store");
        }
        Some((user?, task))
    })
}

/// The size of a task's texts in bytes, without its request.
pub(super) fn task_text_bytes(task: &ImportedTask) -> usize {
    let texts = [&task.now.detail, &task.now.sandbox_id, &task.now.agent_server_url];
    texts.into_iter().flatten().map(String::len).sum()
}

/// The reason for which streamed tokens are skipped.
pub(super) const STREAMED_TOKEN: &str = "event: it is a streamed token (StreamingDeltaEvent), which is not stored; the message with the whole text is a separate event";

/// Parses an event, which is stored byte for byte as in `json`. Every kind is accepted except streamed tokens.
pub(super) fn event(json: &str) -> Result<Event, String> {
    /// The fields that every event has.
    #[derive(Deserialize)]
    struct Head {
        id: String,
        timestamp: String,
        kind: String,
    }
    let Ok(Head { id, timestamp, kind }) = serde_json::from_str(json) else {
        return Err("event: it is not a JSON object whose id, timestamp and kind are texts".into());
    };
    let event = Event { id, timestamp, kind, json: json.to_owned() };
    match event.fault() {
        None if event.is_transient() => Err(STREAMED_TOKEN.to_owned()),
        None => Ok(event),
        Some(fault) => Err(format!("event: {fault}")),
    }
}

/// Parses the id of an event's conversation.
pub(super) fn conversation_id(text: &str) -> Result<Uuid, String> {
    let mut check = Checker::new("line");
    let id = check.within("conversation_id", |check| uuid_from_text(check, text));
    check.finish(id).map_err(|violations| reason("event", &violations))
}

fn read<T>(what: &str, data: &Value, read: impl FnOnce(&mut Checker, &Fields<'_>) -> Option<T>) -> Result<T, String> {
    let mut check = Checker::new("data");
    let row = Fields::of(&mut check, data).and_then(|fields| read(&mut check, &fields));
    check.finish(row).map_err(|violations| reason(what, &violations))
}

/// Describes the first violation in a row: its field and the rule.
fn reason(what: &str, violations: &[Violation]) -> String {
    let Some(first) = violations.first() else { return format!("{what}: it is invalid") };
    // The detail quotes the value, which must not be part of the reason.
    let detail = first.ctx.as_ref().and_then(|ctx| ctx["error"].as_str()).map(|error| format!(", {error}"));
    let rule = detail.and_then(|detail| first.msg.strip_suffix(detail.as_str())).unwrap_or(&first.msg);
    let rule = rule.strip_prefix("Value error, ").unwrap_or(rule);
    let mut field = String::new();
    for step in first.loc.iter().skip(1) {
        match step {
            Loc::Index(_) => field.push_str("[]"),
            Loc::Key(key) if field.is_empty() => field.push_str(key),
            Loc::Key(key) => field = format!("{field}.{key}"),
        }
        // The next step would be the name of a secret, which a user chose.
        if field.ends_with("secrets") {
            break;
        }
    }
    match field.as_str() {
        "" => format!("{what}: {rule}"),
        field => format!("{what}: {field}: {rule}"),
    }
}

fn refuse(check: &mut Checker, why: &str) {
    check.report_value_error(why, Value::Null);
}

fn owner(check: &mut Checker, fields: &Fields<'_>, default: DefaultOwner<'_>) -> Option<UserId> {
    match fields.nullable(check, "created_by_user_id", key_part)? {
        Some(id) => Some(UserId::new(id)),
        None if default.is_none() => {
            refuse(check, NO_OWNER);
            None
        }
        None => default.cloned(),
    }
}

/// The reason for which a row without an owner is skipped if there is no default owner.
pub(super) const NO_OWNER: &str = "it has no owner; give the owner of such rows with --user ID";

fn key_part(check: &mut Checker, value: &Value) -> Option<String> {
    let text = string(check, value)?;
    if text.is_empty() || text.len() > MAX_KEY_PART_BYTES {
        refuse(check, &format!("it must have 1 to {MAX_KEY_PART_BYTES} bytes"));
        return None;
    }
    Some(text)
}

/// When a row was last changed: no earlier than it was created, which filters rely on.
fn last_change(created_at: Time, updated_at: Option<Time>) -> Time {
    updated_at.map_or(created_at, |updated_at| updated_at.max(created_at))
}

fn time(check: &mut Checker, value: &Value) -> Option<Time> {
    let text = string(check, value)?;
    read_datetime(check, &text).map(Time::from)
}

fn status(check: &mut Checker, value: &Value) -> Option<StartStatus> {
    let status = StartStatus::deserialize(value).ok();
    if status.is_none() {
        refuse(check, "it is not a status of a start task");
    }
    status
}

fn request(check: &mut Checker, value: &Value) -> Option<StartRequest> {
    let (secrets, rest) = split_secrets(value);
    match StartRequest::from_body(Some("application/json"), rest.to_string().as_bytes()) {
        Ok(request) => Some(StartRequest { secrets: secrets.or(request.secrets), ..request }),
        Err(violations) => {
            // Each violation is reported with its path within the row.
            for violation in violations {
                let steps = violation.loc.into_iter().skip(1).collect::<Vec<_>>();
                report_at(check, steps, violation.kind, &violation.msg, violation.ctx);
            }
            None
        }
    }
}

/// Separates the secrets of a request from the rest of it. Names that a start would reject are imported as well, because they are
/// history and no sandbox gets these secrets any more. If `secrets` is not a map of texts, or is too large, it stays in the request,
/// whose parser reports it.
fn split_secrets(request: &Value) -> (Option<Secrets>, Cow<'_, Value>) {
    let fits = |(name, value): (&String, &Value)| value.is_string() && name.chars().count() <= MAX_NAME;
    let secrets = match request.get("secrets") {
        Some(Value::Object(secrets)) if secrets.len() <= MAX_SECRETS && secrets.iter().all(fits) => {
            Secrets::deserialize(Value::Object(secrets.clone())).ok()
        }
        _ => None,
    };
    let mut rest = Cow::Borrowed(request);
    if secrets.is_some()
        && let Some(fields) = rest.to_mut().as_object_mut()
    {
        fields.remove("secrets");
    }
    (secrets, rest)
}

fn report_at(check: &mut Checker, mut steps: Vec<Loc>, kind: &'static str, msg: &str, ctx: Option<Value>) {
    if steps.is_empty() {
        return check.report(kind, msg, Value::Null, ctx);
    }
    let step = steps.remove(0);
    check.within(step, |check| report_at(check, steps, kind, msg, ctx));
}

fn metrics(check: &mut Checker, value: &Value) -> Option<MetricsSnapshot> {
    let fields = Fields::of(check, value)?;
    let default = MetricsSnapshot::default();
    let model_name = fields.or(check, "model_name", default.model_name, string);
    let accumulated_cost = fields.or(check, "accumulated_cost", 0.0, amount);
    let max_budget_per_task = fields.nullable(check, "max_budget_per_task", amount);
    let accumulated_token_usage = fields.nullable(check, "accumulated_token_usage", token_usage);
    Some(MetricsSnapshot {
        model_name: model_name?,
        accumulated_cost: accumulated_cost?,
        max_budget_per_task: max_budget_per_task?,
        accumulated_token_usage: accumulated_token_usage?,
    })
}

/// An amount in US dollars.
fn amount(check: &mut Checker, value: &Value) -> Option<f64> {
    let amount = float(check, value)?;
    if amount != 0.0 && !FLOATS.contains(&amount) {
        refuse(check, "it is not an amount of money");
        return None;
    }
    Some(amount)
}

fn token_usage(check: &mut Checker, value: &Value) -> Option<TokenUsage> {
    let fields = Fields::of(check, value)?;
    let mut count = |name| fields.or(check, name, 0, tokens);
    let prompt_tokens = count("prompt_tokens");
    let completion_tokens = count("completion_tokens");
    let cache_read_tokens = count("cache_read_tokens");
    let cache_write_tokens = count("cache_write_tokens");
    let reasoning_tokens = count("reasoning_tokens");
    let context_window = count("context_window");
    let per_turn_token = count("per_turn_token");
    let model = fields.or(check, "model", String::new(), string);
    let response_id = fields.or(check, "response_id", String::new(), string);
    Some(TokenUsage {
        model: model?,
        prompt_tokens: prompt_tokens?,
        completion_tokens: completion_tokens?,
        cache_read_tokens: cache_read_tokens?,
        cache_write_tokens: cache_write_tokens?,
        reasoning_tokens: reasoning_tokens?,
        context_window: context_window?,
        per_turn_token: per_turn_token?,
        response_id: response_id?,
    })
}

fn tokens(check: &mut Checker, value: &Value) -> Option<u64> {
    let count = u64::try_from(integer(check, value)?).ok();
    if count.is_none() {
        refuse(check, "it is not a number of tokens");
    }
    count
}
