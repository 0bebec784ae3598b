//! Webhook ingestion: how reports of agent servers update conversation records, which jobs they enqueue, and what they
//! must not change.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use futures::future::join_all;
use http::Request;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use shared::Time;
use shared::agent_server::AgentServer;
use shared::config::SandboxConfig;
use shared::conversation::reports::{AgentStats, Lookup, ReportTime, StoredConversation, Touch};
use shared::conversation::search::{Filter, SortOrder};
use shared::conversation::store::ConversationChange;
use shared::conversation::tags::Tags;
use shared::conversation::{ConversationRecord, MAX_NAME};
use shared::event::store::Event;
use shared::http_client::{AddressPolicy, HttpClient};
use shared::jobs::process_events::ProcessEvents;
use shared::jobs::queue::Job;
use shared::jobs::refresh_conversation::RefreshConversation;
use shared::sandbox::SandboxStatus;
use shared::start::task::StartStatus;
use shared::user::UserId;
use shared::user::git::ProviderType;
use shared::user::token::TokenKey;
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::api::Api;
use crate::support::hostile_aws::AwsFaults;
use crate::support::log::{all_events, log_to};
use crate::support::seed;
use crate::support::stand_in_agent::{Fault, Kind, Nth};
use crate::support::worker_harness::{SESSION_KEY, WorkerHarness, quick};

const SANDBOX: &str = "6osgGulToTzNONWACSWMZh";
const WEBHOOKS_1_58_2: &str = include_str!("../data/contract/webhooks-1.58.2.jsonl");
const WEBHOOKS_1_58_2_SWITCH_TOOL: &str = include_str!("../data/contract/webhooks-1.58.2-switch-tool.jsonl");

/// The API, and a sandbox of the local user whose session key is its id.
struct Fixture {
    api: Api,
    user: UserId,
    _folder: TempDir,
}

impl Fixture {
    async fn new() -> Self {
        let folder = TempDir::new().expect("a folder");
        let api = Api::at(folder.path(), SandboxConfig::None).await;
        let fixture = Self { api, user: UserId::local(), _folder: folder };
        fixture.has_sandbox(&fixture.user, SANDBOX).await;
        fixture
    }

    async fn has_sandbox(&self, user: &UserId, id: &str) {
        let api = &self.api;
        let sandboxes = api.stores.sandboxes();
        let record = sandboxes.new_record(user, id, "spec", &SecretString::from(id)).await.expect("a record");
        sandboxes.create(record, None).await.expect("stored");
    }

    async fn has_conversation(&self, user: &UserId, id: Uuid, sandbox: &str) -> ConversationRecord {
        let data = json!({"id": id.simple().to_string(), "sandbox_id": sandbox, "public": true,
            "title": format!("Conversation {}", &id.simple().to_string()[..5]), "selected_repository": "o/r",
            "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z"});
        let record = seed::conversation(user, data);
        assert_eq!(
            self.api.stores.conversations().import(user, std::slice::from_ref(&record)).await.expect("stored"),
            [true]
        );
        record
    }

    /// A conversation whose events are logged.
    async fn has_logged_conversation(&self, id: Uuid) {
        let data = json!({"id": id.simple().to_string(), "sandbox_id": SANDBOX, "title": "Mine",
            "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z"});
        let record = seed::conversation(&self.user, data);
        let processors = [shared::conversation::fields::EventCallbackProcessor::Logging];
        let writes = self.api.stores.conversations().put_started(&record, &processors).expect("writes").writes;
        let written = self.api.aws.dynamodb.transact_write_items().set_transact_items(Some(writes)).send().await;
        written.expect("stored");
    }

    /// Posts as the sandbox.
    async fn post(&self, sandbox: &str, path: &str, body: &Value) -> (u16, Value) {
        self.post_text(sandbox, path, &body.to_string()).await
    }

    /// As [`Self::post`], with a body of exactly this text.
    async fn post_text(&self, sandbox: &str, path: &str, body: &str) -> (u16, Value) {
        let request = Request::post(format!("/api/v1/webhooks/{path}"))
            .header("content-type", "application/json")
            .header("x-session-api-key", sandbox)
            .body(Body::from(body.to_owned()));
        self.api.send(request.expect("a request")).await
    }

    /// The texts of all stored events, by id.
    async fn stored(&self, user: &UserId, id: Uuid) -> BTreeMap<String, String> {
        let api = &self.api;
        let store = api.stores.events();
        all_events(&store, user, id).await.into_iter().map(|event| (event.id, event.json)).collect()
    }

    async fn post_events(&self, sandbox: &str, id: Uuid, events: &[Value]) {
        let answer = self.post(sandbox, &format!("events/{id}"), &json!(events)).await;
        assert_eq!(answer, (200, json!({"success": true})));
    }

    async fn report(&self, sandbox: &str, report: &Value) {
        assert_eq!(self.post(sandbox, "conversations", report).await, (200, json!({"success": true})));
    }

    /// Changes a row of the user directly, without the store.
    async fn change_row(&self, id: Uuid, expression: &str) {
        let text = |name: &str| aws_sdk_dynamodb::types::AttributeValue::S(name.to_owned());
        let update = self.api.aws.dynamodb.update_item().table_name(&self.api.names.conversations);
        let update = update.key("user", text(self.user.as_str())).key("id", text(&id.simple().to_string()));
        let update = update.update_expression(expression);
        let update = if expression.contains(":long_ago") {
            let long_ago = Time::now().minus(Duration::from_secs(16 * 60)).sortable();
            update.expression_attribute_values(":long_ago", text(&long_ago))
        } else {
            update
        };
        update.send().await.expect("changed");
    }

    async fn record(&self, user: &UserId, id: Uuid) -> ConversationRecord {
        self.api.stores.conversations().get(user, id).await.expect("the store").expect("a record")
    }

    async fn count(&self) -> u64 {
        self.api.stores.conversations().count(&self.user, &Filter::default()).await.expect("a count")
    }

    async fn events(&self, user: &UserId, id: Uuid) -> Value {
        let (status, page) =
            self.api.call(user, "GET", &format!("/api/v1/conversation/{id}/events/search"), None).await;
        assert_eq!(status, 200, "{page}");
        page["items"].clone()
    }

    /// Returns the jobs in the queue, delayed ones included, and removes them.
    async fn jobs(&self) -> Vec<Job> {
        let api = &self.api;
        let mut jobs = Vec::new();
        loop {
            let received = api.aws.sqs.receive_message().queue_url(&api.names.job_queue_url).wait_time_seconds(4);
            let Some(message) = received.send().await.expect("the queue").messages.unwrap_or_default().pop() else {
                return jobs;
            };
            jobs.push(Job::from_body(&message.body.unwrap_or_default()).expect("a job"));
        }
    }
}

/// The body of a recorded exchange, exactly as the agent server sent it.
fn raw_body(line: &str) -> &str {
    serde_json::from_str::<BTreeMap<String, &RawValue>>(line).expect("an exchange")["body"].get()
}

/// The texts of all recorded events, by id.
fn raw_events(lines: &str) -> BTreeMap<String, String> {
    let events =
        lines.lines().map(raw_body).filter_map(|body| serde_json::from_str::<Vec<&RawValue>>(body).ok()).flatten();
    let id = |event: &RawValue| {
        let event: Value = serde_json::from_str(event.get()).expect("an event");
        event["id"].as_str().expect("an id").to_owned()
    };
    events.map(|event| (id(event), event.get().to_owned())).collect()
}

fn usage(tokens: u64) -> Value {
    let plus = |more| if tokens == 0 { 0 } else { tokens + more };
    json!({"model_name": "m", "accumulated_cost": tokens as f64 / 1000.0, "max_budget_per_task": null,
        "accumulated_token_usage": {"model": "m", "prompt_tokens": tokens, "completion_tokens": plus(1),
            "cache_read_tokens": plus(2), "cache_write_tokens": plus(3), "reasoning_tokens": plus(4),
            "context_window": plus(5), "per_turn_token": plus(6), "response_id": "r"},
        "costs": [1], "response_latencies": []})
}

/// Metrics of an agent whose condenser has no usage.
fn metrics(agent: u64) -> Value {
    json!({"usage_to_metrics": {"agent": usage(agent), "condenser": usage(0)}})
}

fn stats(id: &str, timestamp: &str, tokens: u64) -> Value {
    json!({"id": id, "timestamp": timestamp, "source": "environment", "key": "stats", "value": metrics(tokens),
        "kind": "ConversationStateUpdateEvent"})
}

fn full_state(id: &str, timestamp: &str, value: &Value) -> Value {
    json!({"id": id, "timestamp": timestamp, "source": "environment", "key": "full_state", "value": value,
        "kind": "ConversationStateUpdateEvent"})
}

fn message(id: &str) -> Value {
    json!({"id": id, "timestamp": "2026-01-01T00:00:00", "source": "user", "kind": "MessageEvent"})
}

fn prompt_tokens(record: &ConversationRecord) -> u64 {
    record.metrics.accumulated_token_usage.as_ref().expect("usage").prompt_tokens
}

/// Asserts that the record is unchanged, apart from what an agent server may change.
fn untouched(record: &ConversationRecord, before: &ConversationRecord) {
    let same = ConversationRecord {
        metrics: before.metrics.clone(),
        updated_at: before.updated_at,
        llm_model: before.llm_model.clone(),
        ..record.clone()
    };
    assert_eq!(same, *before);
}

#[tokio::test]
async fn recorded_exchanges_get_the_recorded_responses() {
    let fixture = Fixture::new().await;
    let lines = include_str!("../data/contract/webhooks.jsonl").lines();
    for line in lines.map(|line| serde_json::from_str::<Value>(line).expect("a line")) {
        let (label, path) = (line["label"].as_str().expect("a label"), line["path"].as_str().expect("a path"));
        let mut expected = line["answer"].clone();
        if label == "before webhook" {
            let record = seed::conversation(&fixture.user, expected[0].clone());
            fixture.api.stores.conversations().import(&fixture.user, &[record]).await.expect("stored");
        }
        let (status, mut answer) = if line["method"] == "GET" {
            fixture.api.call(&fixture.user, "GET", path, None).await
        } else {
            let mut request = Request::post(path).header("content-type", "application/json");
            if line["key"] == true {
                request = request.header("x-session-api-key", SANDBOX);
            }
            fixture.api.send(request.body(Body::from(line["body"].to_string())).expect("a request")).await
        };
        if expected[0]["sandbox_id"].is_string() {
            // Fields of later versions.
            expected[0]["agent_kind"] = json!("openhands");
            expected[0]["tags"] = json!({});
            expected[0]["acp_server"] = Value::Null;
            expected[0]["launched_agent_profile"] = Value::Null;
        }
        match label {
            // Fields that are not requested are not reported as missing; and the reference reports the bad id twice.
            "empty body" | "bad id" => expected["detail"].as_array_mut().expect("faults").truncate(1),
            "before webhook" | "after webhook" | "created by webhook" => {
                for name in ["sandbox_status", "execution_status", "conversation_url", "session_api_key", "updated_at"]
                {
                    answer[0].as_object_mut().expect("a conversation").remove(name);
                    expected[0].as_object_mut().expect("a conversation").remove(name);
                }
            }
            _ => {}
        }
        if label == "after webhook" {
            // The reference replaces the record, and adds up the tokens of all turns but the last.
            expected[0]["created_at"] = json!("2026-11-22T15:20:43.871853Z");
            expected[0]["public"] = json!(true);
            expected[0]["metrics"]["accumulated_token_usage"]["per_turn_token"] = json!(120);
        }
        if label == "created by webhook" {
            // The reference ignores the agent's title.
            expected[0]["title"] = json!("Stub title");
            expected[0]["metrics"]["accumulated_token_usage"]["per_turn_token"] = json!(120);
            expected[0]["created_at"] = answer[0]["created_at"].clone();
        }
        assert_eq!((u64::from(status), &answer), (line["status"].as_u64().expect("a status"), &expected), "{label}");
    }
    // A newer agent server has reported a whole conversation: its record has the usage.
    let newer = Uuid::parse_str("f1f4915452704339b32cd4234496120e").expect("an id");
    let record = fixture.record(&fixture.user, newer).await;
    assert_eq!((prompt_tokens(&record), record.llm_model.as_deref()), (200, Some("openai/stub")));
    assert_eq!(fixture.events(&fixture.user, newer).await.as_array().map(Vec::len), Some(8));
    fixture.api.stop().await;
}

/// The webhooks of an agent server 1.58.2: a turn with a tool, tags, a rename, a switch to another model by a request
/// and by the agent itself, a pause, an interrupt, a turn that fails, and the deletion.
#[tokio::test]
async fn recorded_webhooks_of_version_1_58_2_update_the_record() {
    let fixture = Fixture::new().await;
    let user = &fixture.user;
    let lines: Vec<Value> = WEBHOOKS_1_58_2.lines().map(|line| serde_json::from_str(line).expect("a line")).collect();
    let whole = lines.iter().find(|line| line["body"]["id"].is_string()).expect("a conversation");
    let id = Uuid::parse_str(whole["body"]["id"].as_str().expect("an id")).expect("an id");
    let bodies: Vec<&str> = WEBHOOKS_1_58_2.lines().map(raw_body).collect();
    let send = async |index: usize| {
        let path = lines[index]["path"].as_str().and_then(|path| path.strip_prefix("/api/v1/webhooks/"));
        let answer = fixture.post_text(SANDBOX, path.expect("a path"), bodies[index]).await;
        assert_eq!(answer, (200, json!({"success": true})));
    };
    let tags = json!({"origin": "x", "team": "a1"});
    let (first, second) = ("openai/scripted", "openai/other");
    for (label, model, tags, prompt) in [
        ("create", first, json!({}), 0),
        ("turn", first, json!({}), 300),
        ("tags", first, tags.clone(), 300),
        ("rename", first, tags.clone(), 300),
        ("switch", second, tags.clone(), 300),
        ("after switch", second, tags.clone(), 400),
        ("pause", second, tags.clone(), 500),
        ("interrupt", second, tags.clone(), 500),
        ("error", second, tags.clone(), 500),
        ("delete", second, tags.clone(), 500),
        // Sent late and again, the newest first.
        ("", second, tags.clone(), 500),
    ] {
        let again = label.is_empty();
        for index in (0..lines.len()).rev().filter(|_| again) {
            send(index).await;
        }
        for index in (0..lines.len()).filter(|index| lines[*index]["label"] == label) {
            send(index).await;
        }
        let record = fixture.record(user, id).await;
        assert_eq!((record.llm_model.as_deref(), json!(record.tags)), (Some(model), tags), "after {label}");
        assert_eq!(prompt_tokens(&record), prompt, "after {label}");
        if label == "tags" {
            assert_eq!(record.title.as_deref(), Some("✅ Scripted title"));
        }
    }
    let mut posted: Vec<&Value> = lines.iter().flat_map(|line| line["body"].as_array().into_iter().flatten()).collect();
    posted.sort_by_key(|event| (event["timestamp"].as_str(), event["id"].as_str()));
    assert_eq!(fixture.events(user, id).await, json!(posted));
    assert_eq!(fixture.stored(user, id).await, raw_events(WEBHOOKS_1_58_2), "byte for byte");
    // Every kind can be used as a filter.
    for kind in ["InterruptEvent", "ConversationErrorEvent", "PauseEvent", "ActionEvent"] {
        let path = format!("/api/v1/conversation/{id}/events/count?kind__eq={kind}");
        let expected = posted.iter().filter(|event| event["kind"] == kind).count();
        assert_eq!(fixture.api.call(user, "GET", &path, None).await, (200, json!(expected)), "{kind}");
        assert!(expected > 0, "{kind}");
    }
    let (_, shown) = fixture.api.get(user, "", &[("ids", id.to_string())]).await;
    assert_eq!((&shown[0]["tags"], &shown[0]["agent_kind"]), (&tags, &json!("openhands")));
    fixture.api.stop().await;
}

/// The same webhooks, the last one first.
#[tokio::test]
async fn webhooks_in_reverse_order_end_with_the_newest_model_and_tags() {
    let fixture = Fixture::new().await;
    for (recording, model, tags) in [
        (WEBHOOKS_1_58_2, "openai/other", json!({"origin": "x", "team": "a1"})),
        (WEBHOOKS_1_58_2_SWITCH_TOOL, "openai/other", json!({})),
    ] {
        let lines: Vec<&str> = recording.lines().collect();
        let whole = lines.iter().find_map(|line| {
            let line: Value = serde_json::from_str(line).expect("a line");
            Uuid::parse_str(line["body"]["id"].as_str()?).ok()
        });
        let id = whole.expect("a conversation");
        fixture.has_conversation(&fixture.user, id, SANDBOX).await;
        for line in lines.iter().rev() {
            let path = serde_json::from_str::<Value>(line).expect("a line")["path"].clone();
            let path = path.as_str().and_then(|path| path.strip_prefix("/api/v1/webhooks/")).expect("a path");
            assert_eq!(fixture.post_text(SANDBOX, path, raw_body(line)).await, (200, json!({"success": true})));
        }
        let record = fixture.record(&fixture.user, id).await;
        assert_eq!((record.llm_model.as_deref(), json!(record.tags)), (Some(model), tags));
        assert_eq!(fixture.stored(&fixture.user, id).await, raw_events(recording));
    }
    fixture.api.stop().await;
}

/// An agent server 1.58.2 whose agent switches to another model with its own tool.
#[tokio::test]
async fn recorded_model_switch_by_the_agent_updates_model_and_metrics() {
    let fixture = Fixture::new().await;
    let lines = WEBHOOKS_1_58_2_SWITCH_TOOL.lines();
    let mut id = None;
    for line in lines.map(|line| serde_json::from_str::<Value>(line).expect("a line")) {
        let path = line["path"].as_str().and_then(|path| path.strip_prefix("/api/v1/webhooks/")).expect("a path");
        id = id.or_else(|| Uuid::parse_str(line["body"]["id"].as_str()?).ok());
        // The observation alone, without the state event that reports the same.
        let body = match line["body"].as_array() {
            Some(events) => {
                events.iter().filter(|event| event["key"] != "agent" && event["key"] != "full_state").cloned().collect()
            }
            None => line["body"].clone(),
        };
        assert_eq!(fixture.post(SANDBOX, path, &body).await, (200, json!({"success": true})));
    }
    let id = id.expect("a conversation");
    let record = fixture.record(&fixture.user, id).await;
    assert_eq!((record.llm_model.as_deref(), prompt_tokens(&record)), (Some("openai/other"), 200));
    // With the state event, the usage of the other model counts too.
    for line in WEBHOOKS_1_58_2_SWITCH_TOOL.lines() {
        let line: Value = serde_json::from_str(line).expect("a line");
        if line["body"].is_array() {
            fixture.post(SANDBOX, &format!("events/{id}"), &line["body"]).await;
        }
    }
    let record = fixture.record(&fixture.user, id).await;
    assert_eq!((record.llm_model.as_deref(), prompt_tokens(&record)), (Some("openai/other"), 300));
    fixture.api.stop().await;
}

/// Events keep fields and kinds that later versions add; only streamed tokens are dropped.
#[tokio::test]
async fn unknown_event_kinds_are_stored_and_streamed_tokens_are_dropped() {
    let lines = Lines::default();
    let _logging = lines.capture("shared=debug");
    let fixture = Fixture::new().await;
    let (id, user) = (Uuid::new_v4(), &fixture.user);
    fixture.has_conversation(user, id, SANDBOX).await;
    let kinds = ["ServerErrorEvent", "InterruptEvent", "SecurityAnalysisEvent", "HookExecutionEvent", "KindOfTomorrow"];
    let of_kind = |kind: &str, second: usize| {
        json!({"id": format!("id-{kind}"), "timestamp": format!("2026-01-01T00:00:{second:02}"), "source": "environment",
            "code": kind, "kind": kind})
    };
    let events: Vec<Value> = kinds.iter().enumerate().map(|(second, kind)| of_kind(kind, second)).collect();
    let delta = of_kind("StreamingDeltaEvent", 30);
    fixture.post_events(SANDBOX, id, std::slice::from_ref(&delta)).await;
    fixture.post_events(SANDBOX, id, &[events.clone(), vec![delta.clone(), delta]].concat()).await;
    let dropped = lines.with("event.streamed_tokens_dropped");
    assert_eq!(dropped.len(), 2, "{dropped:?}");
    for (line, count) in dropped.iter().zip(["dropped=1", "dropped=2"]) {
        assert!(line.contains(count) && line.contains(&format!("conversation={id}")), "{line}");
    }
    assert_eq!(fixture.events(user, id).await, json!(events));
    for (kind, event) in kinds.iter().zip(&events) {
        let path = format!("/api/v1/conversation/{id}/events/search?kind__eq={kind}");
        let answer = fixture.api.call(user, "GET", &path, None).await;
        assert_eq!(answer, (200, json!({"items": [event], "next_page_id": null})), "{kind}");
    }
    let path = format!("/api/v1/conversation/{id}/events/count?kind__eq=StreamingDeltaEvent");
    assert_eq!(fixture.api.call(user, "GET", &path, None).await, (200, json!(0)));
    assert_eq!(fixture.jobs().await, [], "none of them enqueues a job");
    fixture.api.stop().await;
}

#[tokio::test]
async fn metrics_cover_all_models_and_the_context_window_is_the_current_models() {
    let fixture = Fixture::new().await;
    let (id, user) = (Uuid::new_v4(), &fixture.user);
    fixture.has_conversation(user, id, SANDBOX).await;
    let usages = json!({"usage_to_metrics": {"agent": usage(100), "condenser": usage(20), "profile:b": usage(3), "broken": [1],
        "huge": {"accumulated_cost": 1e300, "accumulated_token_usage": {"prompt_tokens": u64::MAX}}}});
    let shown = async || {
        let metrics = fixture.record(user, id).await.metrics;
        let usage = metrics.accumulated_token_usage.clone().expect("usage");
        (
            (metrics.accumulated_cost * 1000.0).round(),
            usage.completion_tokens,
            usage.context_window,
            usage.per_turn_token,
            usage.prompt_tokens,
        )
    };
    let event = |second: u64, usages: &Value| {
        json!({"id": second.to_string(), "timestamp": format!("2026-01-01T00:00:0{second}"), "key": "stats", "value": usages,
            "kind": "ConversationStateUpdateEvent"})
    };
    // An event with stats alone does not say which model the agent uses. If there are usages other than the agent's and
    // condensers', it may be any of them.
    fixture.post_events(SANDBOX, id, &[event(1, &usages)]).await;
    assert_eq!(shown().await, (123.0, 126, 0, 0, u64::MAX));
    let plain =
        json!({"usage_to_metrics": {"agent": usage(100), "condenser": usage(20), "planning_condenser": usage(3)}});
    fixture.post_events(SANDBOX, id, &[event(2, &plain)]).await;
    assert_eq!(shown().await, (123.0, 126, 105, 106, 123));
    // The state event names it.
    let state = json!({"stats": usages, "agent": {"llm": {"model": "m", "usage_id": "profile:b"}}});
    fixture.post_events(SANDBOX, id, &[full_state("3", "2026-01-01T00:00:03", &state)]).await;
    assert_eq!(shown().await, (123.0, 126, 8, 9, u64::MAX));
    let mut budget = json!({"usage_to_metrics": {"agent": usage(200), "profile:b": usage(3)}});
    budget["usage_to_metrics"]["agent"]["max_budget_per_task"] = json!(7.5);
    fixture.post_events(SANDBOX, id, &[event(4, &budget)]).await;
    assert_eq!(shown().await, (203.0, 205, 8, 9, 203));
    assert_eq!(fixture.record(user, id).await.metrics.max_budget_per_task, None, "the agent may have another model");
    // So does a snapshot of the conversation.
    let polled = Uuid::new_v4();
    let whole = json!({"id": polled, "stats": usages, "agent": {"llm": {"model": "m", "usage_id": "condenser"}}});
    fixture.report(SANDBOX, &whole).await;
    let usage = fixture.record(user, polled).await.metrics.accumulated_token_usage.expect("usage");
    assert_eq!((usage.context_window, usage.per_turn_token), (25, 26));
    fixture.api.stop().await;
}

#[tokio::test]
async fn late_and_repeated_reports_do_not_replace_newer_model_and_tags() {
    let fixture = Fixture::new().await;
    let (id, user) = (Uuid::new_v4(), &fixture.user);
    let before = fixture.has_conversation(user, id, SANDBOX).await;
    let event = |second: u64, key: &str, value: Value| {
        json!({"id": format!("{key}-{second}"), "timestamp": format!("2026-01-01T00:00:{second:02}"), "key": key, "value": value,
            "kind": "ConversationStateUpdateEvent"})
    };
    let reports = |second: u64, name: &str| {
        vec![event(second, "agent", json!({"llm": {"model": name}})), event(second, "tags", json!({"name": name}))]
    };
    let whole = |second: u64, name: &str| json!({"id": id, "updated_at": format!("2026-01-01T00:00:{second:02}Z"), "tags": {"name": name}, "agent": {"llm": {"model": name}}});
    let expect = async |name: &str| {
        let record = fixture.record(user, id).await;
        assert_eq!((record.llm_model.as_deref(), json!(record.tags)), (Some(name), json!({"name": name})));
    };
    // Until an event reports them, the newest snapshot counts; of two with the same time, the last one received counts.
    for (second, name, expected) in
        [(10, "a", "a"), (9, "b", "a"), (10, "c", "c"), (11, "d", "d"), (10, "a", "d"), (11, "d", "d")]
    {
        fixture.report(SANDBOX, &whole(second, name)).await;
        expect(expected).await;
    }
    for (second, is_event, name, expected) in [
        (5, true, "e", "e"),
        (59, false, "f", "e"),
        (12, true, "g", "g"),
        (11, true, "h", "g"),
        (12, true, "g", "g"),
        // The same value again, and then another one that is older.
        (14, true, "g", "g"),
        (13, true, "i", "g"),
        (59, false, "f", "g"),
        (15, true, "j", "j"),
    ] {
        if is_event {
            fixture.post_events(SANDBOX, id, &reports(second, name)).await;
        } else {
            fixture.report(SANDBOX, &whole(second, name)).await;
        }
        expect(expected).await;
    }
    // The newest of several events in a batch counts, whatever their order; so does the agent's own switch.
    let switch = json!({"id": "switch", "timestamp": "2026-01-01T00:00:20", "kind": "ObservationEvent",
        "observation": {"kind": "SwitchLLMObservation", "profile_name": "p", "active_model": "event-20", "is_error": false}});
    let mut batch = reports(19, "event-19");
    batch.push(switch);
    batch.push(full_state(
        "state",
        "2026-01-01T00:00:18",
        &json!({"agent": {"llm": {"model": "event-18"}}, "tags": {"name": "event-18"}}),
    ));
    batch.push(event(20, "tags", json!({"name": "event-20"})));
    fixture.post_events(SANDBOX, id, &batch).await;
    expect("event-20").await;
    // Empty tags are valid tags; a value that is not an object is ignored.
    fixture.post_events(SANDBOX, id, &[event(31, "tags", json!("none"))]).await;
    expect("event-20").await;
    fixture.post_events(SANDBOX, id, &[event(32, "tags", json!({}))]).await;
    let record = fixture.record(user, id).await;
    assert!(record.tags.is_empty());
    untouched(&ConversationRecord { tags: before.tags.clone(), ..record }, &before);
    // Tags of any size are cut so that the record fits into the store's limit.
    let huge: serde_json::Map<String, Value> =
        (0..10_000).map(|n| (format!("{n:0>90}"), json!("é".repeat(200)))).collect();
    fixture.post_events(SANDBOX, id, &[event(40, "tags", huge.into())]).await;
    let kept = fixture.record(user, id).await.tags;
    assert!(!kept.is_empty() && kept.size() <= shared::conversation::tags::MAX_TAGS_SIZE, "{}", kept.size());
    fixture.api.stop().await;
}

/// Snapshots have times in UTC, events in the local time of the sandbox, whose clock may be wrong.
#[tokio::test]
async fn reports_are_applied_whatever_the_sandboxs_time_zone_and_clock() {
    let fixture = Fixture::new().await;
    let user = &fixture.user;
    let noon = "2026-07-01T12:00:00Z".parse::<jiff::Timestamp>().expect("a time");
    for minutes in [0, 8, 60, -8, -60, 14 * 60, -12 * 60, 345, 24 * 60] {
        let id = Uuid::new_v4();
        fixture.has_conversation(user, id, SANDBOX).await;
        let local = |second: i64| {
            let local = noon + jiff::SignedDuration::from_secs(minutes * 60 + second);
            local.to_string().trim_end_matches('Z').to_owned()
        };
        let whole = async |second: i64, name: &str, tokens: u64| {
            let updated_at = (noon + jiff::SignedDuration::from_secs(second)).to_string();
            let whole = json!({"id": id, "updated_at": updated_at, "tags": {"name": name}, "stats": metrics(tokens),
                "agent": {"llm": {"model": name}}});
            fixture.report(SANDBOX, &whole).await;
        };
        let events = async |second: i64, name: &str, tokens: u64| {
            let event = |key: &str, value: Value| {
                json!({"id": format!("{key}-{second}"), "timestamp": local(second), "key": key, "value": value,
                    "kind": "ConversationStateUpdateEvent"})
            };
            let batch = [
                event("agent", json!({"llm": {"model": name}})),
                event("tags", json!({"name": name})),
                event("stats", metrics(tokens)),
            ];
            fixture.post_events(SANDBOX, id, &batch).await;
        };
        let expect = async |name: &str, tokens: u64, label: &str| {
            let record = fixture.record(user, id).await;
            let shown = (record.llm_model.as_deref(), json!(record.tags), prompt_tokens(&record));
            assert_eq!(shown, (Some(name), json!({"name": name}), tokens), "{minutes} minutes, {label}");
        };
        whole(0, "created", 0).await;
        expect("created", 0, "the conversation's webhook").await;
        events(1, "first", 10).await;
        expect("first", 10, "an event right after it").await;
        whole(2, "created", 5).await;
        events(3, "second", 20).await;
        expect("second", 20, "an event after a webhook with old values").await;
        events(2, "late", 15).await;
        expect("second", 20, "a late batch").await;
        whole(4, "late", 15).await;
        expect("second", 20, "a webhook").await;
        events(5, "third", 30).await;
        expect("third", 30, "the last").await;
        // The sandbox's local time goes back by an hour. At first its events count as late, because events are posted
        // in order.
        events(10 - 3600, "fourth", 40).await;
        expect("third", 30, "earlier events, right after later ones").await;
        let received = "SET stats_received = :long_ago, model_received = :long_ago, tags_received = :long_ago";
        fixture.change_row(id, received).await;
        events(20 - 3600, "fifth", 50).await;
        expect("fifth", 50, "earlier events, long after later ones").await;
        events(30 - 3600, "sixth", 60).await;
        expect("sixth", 60, "the ones after them").await;
    }
    fixture.api.stop().await;
}

/// An agent server 1.15 sends its whole state when it loads or pauses a conversation, and is polled for its stats.
#[tokio::test]
async fn stats_come_from_snapshots_if_events_report_none() {
    let fixture = Fixture::new().await;
    let (id, user) = (Uuid::new_v4(), &fixture.user);
    fixture.has_conversation(user, id, SANDBOX).await;
    let state = |second: u64, tokens: u64| {
        let state = json!({"stats": metrics(tokens), "agent": {"llm": {"model": format!("m-{second}")}}});
        full_state(&format!("state-{second}"), &format!("2026-01-01T00:00:{second:02}"), &state)
    };
    let halt = |second: u64| {
        json!({"id": format!("halt-{second}"), "timestamp": format!("2026-01-01T00:00:{second:02}"), "key": "execution_status",
            "value": "finished", "kind": "ConversationStateUpdateEvent"})
    };
    let polled = |second: u64, tokens: u64| json!({"id": id, "updated_at": format!("2026-01-01T00:00:{second:02}Z"), "stats": metrics(tokens)});
    let tokens = async || prompt_tokens(&fixture.record(user, id).await);
    fixture.post_events(SANDBOX, id, &[state(1, 0), halt(2)]).await;
    fixture.report(SANDBOX, &polled(2, 100)).await;
    assert_eq!(tokens().await, 100);
    fixture.post_events(SANDBOX, id, &[state(3, 50)]).await;
    assert_eq!(tokens().await, 100, "the state event does not replace polled stats");
    assert_eq!(fixture.record(user, id).await.llm_model.as_deref(), Some("m-3"), "but it updates the model");
    // The same time with other metrics: the last one received counts.
    fixture.report(SANDBOX, &polled(2, 110)).await;
    fixture.report(SANDBOX, &polled(1, 90)).await;
    assert_eq!(tokens().await, 110);
    fixture.post_events(SANDBOX, id, &[halt(4)]).await;
    let poll = Job::RefreshConversation(RefreshConversation { user: user.clone(), conversation: id, attempt: 0 });
    assert_eq!(fixture.jobs().await, [poll.clone(), poll.clone(), poll], "each halt, and a state after some use");
    // After an upgrade the events report stats, and the state event counts.
    fixture.post_events(SANDBOX, id, &[stats("s", "2026-01-01T00:00:05", 120)]).await;
    fixture.report(SANDBOX, &polled(59, 1)).await;
    assert_eq!(tokens().await, 120);
    fixture.post_events(SANDBOX, id, &[state(6, 130), halt(6)]).await;
    assert_eq!(tokens().await, 130);
    assert_eq!(fixture.jobs().await, []);
    fixture.api.stop().await;
}

#[tokio::test]
async fn records_of_earlier_versions_are_read_and_updated() {
    let fixture = Fixture::new().await;
    let (by_events, polled, user, api) = (Uuid::new_v4(), Uuid::new_v4(), &fixture.user, &fixture.api);
    let whole = |id: Uuid, second: u64, tokens: u64| {
        json!({"id": id, "updated_at": format!("2026-01-01T00:00:0{second}Z"), "tags": {"a": second.to_string()},
            "stats": metrics(tokens), "agent": {"llm": {"model": format!("m-{second}")}}})
    };
    for id in [by_events, polled] {
        fixture.has_conversation(user, id, SANDBOX).await;
        fixture.report(SANDBOX, &whole(id, 1, 9)).await;
    }
    fixture.post_events(SANDBOX, by_events, &[stats("s", "2026-01-01T00:00:01", 10)]).await;
    // In the format from before tags and the sources of models were stored.
    for id in [by_events, polled] {
        fixture.change_row(id, "REMOVE tags, model_at, model_received, model_snapshot_at, tags_at, tags_received, tags_snapshot_at, stats_received").await;
        assert!(fixture.record(user, id).await.tags.is_empty());
        let (_, shown) = api.get(user, "", &[("ids", id.to_string())]).await;
        assert_eq!(shown[0]["tags"], json!({}));
    }
    let shown = async |id: Uuid| {
        let record = fixture.record(user, id).await;
        (prompt_tokens(&record), record.llm_model.unwrap_or_default(), json!(record.tags))
    };
    // A conversation whose events report its stats.
    fixture.post_events(SANDBOX, by_events, &[stats("r", "2026-01-01T00:00:00", 9)]).await;
    assert_eq!(shown(by_events).await.0, 10);
    fixture.post_events(SANDBOX, by_events, &[stats("t", "2026-01-01T00:00:02", 11)]).await;
    fixture.report(SANDBOX, &whole(by_events, 3, 12)).await;
    assert_eq!(shown(by_events).await, (11, "m-3".to_owned(), json!({"a": "3"})));
    let state = json!({"stats": metrics(13), "agent": {"llm": {"model": "m-4"}}, "tags": {}});
    fixture.post_events(SANDBOX, by_events, &[full_state("u", "2026-01-01T00:00:04", &state)]).await;
    assert_eq!(shown(by_events).await, (13, "m-4".to_owned(), json!({})));
    // A conversation that is polled for its stats.
    fixture.report(SANDBOX, &whole(polled, 0, 8)).await;
    assert_eq!(shown(polled).await, (9, "m-0".to_owned(), json!({"a": "0"})));
    fixture.report(SANDBOX, &whole(polled, 2, 10)).await;
    assert_eq!(shown(polled).await, (10, "m-2".to_owned(), json!({"a": "2"})));
    fixture.api.stop().await;
}

#[tokio::test]
async fn late_and_repeated_reports_do_not_replace_newer_stats() {
    let fixture = Fixture::new().await;
    let (id, user) = (Uuid::new_v4(), &fixture.user);
    let before = fixture.has_conversation(user, id, SANDBOX).await;
    let budget = |mut event: Value, budget: f64| {
        event["value"]["usage_to_metrics"]["agent"]["max_budget_per_task"] = json!(budget);
        event
    };
    let (first, second) = (stats("s1", "2026-01-01T00:00:01", 10), stats("s2", "2026-01-01T00:00:01.5", 20));
    let third = stats("s3", "2026-01-01T00:00:02", 15);
    for (events, tokens, limit) in [
        (vec![first.clone(), message("m")], 10, None),
        // The last of several counts, whatever their order in the batch.
        (vec![budget(second.clone(), 3.5), first.clone()], 20, Some(3.5)),
        (vec![first], 20, Some(3.5)),
        // A smaller value can be newer. An event without a budget does not change it.
        (vec![third], 15, Some(3.5)),
        (vec![second], 15, Some(3.5)),
        (vec![stats("s4", "who knows", 99)], 15, Some(3.5)),
        // No usage at all.
        (
            vec![
                json!({"id": "s5", "timestamp": "2026-01-01T00:00:03", "key": "stats", "kind": "ConversationStateUpdateEvent",
                "value": {"usage_to_metrics": {"condenser": 1}}}),
            ],
            15,
            Some(3.5),
        ),
        // State events that are older and newer.
        (vec![full_state("s6", "2026-01-01T00:00:01", &json!({"stats": metrics(16)}))], 15, Some(3.5)),
        (vec![full_state("s6", "2026-01-01T00:00:03", &json!({"stats": metrics(16)}))], 16, Some(3.5)),
        (vec![stats("s2", "2026-01-01T00:00:02.5", 14)], 16, Some(3.5)),
        (
            vec![json!({"id": "s7", "timestamp": "2026-01-01T00:00:03", "key": 1, "value": metrics(1),
            "kind": "ConversationStateUpdateEvent"})],
            16,
            Some(3.5),
        ),
    ] {
        fixture.post_events(SANDBOX, id, &events).await;
        let record = fixture.record(user, id).await;
        let usage = record.metrics.accumulated_token_usage.clone().expect("usage");
        assert_eq!(usage.prompt_tokens, tokens, "{events:?}");
        let shown = [
            usage.completion_tokens,
            usage.cache_read_tokens,
            usage.cache_write_tokens,
            usage.reasoning_tokens,
            usage.context_window,
            usage.per_turn_token,
        ];
        assert_eq!(shown, [tokens + 1, tokens + 2, tokens + 3, tokens + 4, tokens + 5, tokens + 6]);
        assert!((record.metrics.accumulated_cost - tokens as f64 / 1000.0).abs() < 1e-9);
        assert_eq!((record.metrics.max_budget_per_task, usage.model.as_str()), (limit, ""));
        untouched(&record, &before);
        assert!(record.updated_at > before.updated_at);
    }
    // A snapshot does not replace newer stats either: the events of this agent server report every change.
    for updated_at in ["2026-01-01T00:00:02.9Z", "2026-01-01T00:00:04Z"] {
        fixture.report(SANDBOX, &json!({"id": id, "stats": metrics(1), "updated_at": updated_at})).await;
        assert_eq!(prompt_tokens(&fixture.record(user, id).await), 16, "{updated_at}");
    }
    // Stats of an unknown conversation create no record.
    let unknown = Uuid::new_v4();
    fixture.post_events(SANDBOX, unknown, &[stats("s1", "2026-01-01T00:00:01", 10)]).await;
    assert_eq!(fixture.count().await, 1);
    assert_eq!(fixture.events(user, unknown).await.as_array().map(Vec::len), Some(1));
    fixture.api.stop().await;
}

/// A running agent reports its stats all the time; each move in the lists costs more than the report.
#[tokio::test]
async fn stream_of_stats_moves_the_record_at_intervals() {
    let fixture = Fixture::new().await;
    let (user, id) = (&fixture.user, Uuid::new_v4());
    let before = fixture.has_conversation(user, id, SANDBOX).await;
    let batch = async |events: &[Value], tokens: u64| {
        fixture.post_events(SANDBOX, id, events).await;
        let record = fixture.record(user, id).await;
        assert_eq!(prompt_tokens(&record), tokens, "the report itself is applied");
        record.updated_at
    };
    let first = batch(&[stats("a", "2026-01-01T00:00:01", 1)], 1).await;
    assert!(first > before.updated_at);
    assert_eq!(batch(&[stats("b", "2026-01-01T00:00:02", 2)], 2).await, first);
    // A message and the end of a turn move it at once.
    let message = batch(&[message("m"), stats("c", "2026-01-01T00:00:03", 3)], 3).await;
    assert!(message > first);
    let end = json!({"id": "e", "timestamp": "2026-01-01T00:00:04", "source": "environment", "key": "execution_status",
        "value": "finished", "kind": "ConversationStateUpdateEvent"});
    let ended = batch(&[end, stats("d", "2026-01-01T00:00:04", 4)], 4).await;
    assert!(ended > message);
    // The last move was long ago.
    fixture.change_row(id, "SET updated_at = :long_ago").await;
    assert!(batch(&[stats("f", "2026-01-01T00:00:05", 5)], 5).await >= ended);
    // Lists have the record where its time says.
    let query = [("sort_order", "UPDATED_AT_DESC".to_owned())];
    let (status, page) = fixture.api.get(user, "/search", &query).await;
    assert_eq!((status, &page["items"][0]["updated_at"]), (200, &json!(fixture.record(user, id).await.updated_at)));
}

#[tokio::test]
async fn snapshot_of_a_conversation_updates_only_model_title_and_stats() {
    let fixture = Fixture::new().await;
    let (id, user) = (Uuid::new_v4(), &fixture.user);
    let before = fixture.has_conversation(user, id, SANDBOX).await;
    let snapshot = |title: Value, updated_at: &str, tokens: u64| {
        json!({"id": id, "execution_status": "paused", "title": title, "updated_at": updated_at, "stats": metrics(tokens),
            "agent": {"llm": {"model": "openai/new"}}})
    };
    let deleting = json!({"id": id, "execution_status": "deleting", "title": "x", "agent": {"llm": {"model": "x"}}});
    fixture.report(SANDBOX, &deleting).await;
    assert_eq!(fixture.record(user, id).await, before);
    fixture.report(SANDBOX, &json!({"id": id})).await;
    let record = fixture.record(user, id).await;
    assert_eq!(ConversationRecord { updated_at: before.updated_at, ..record.clone() }, before);
    assert!(record.updated_at > before.updated_at);

    fixture.report(SANDBOX, &snapshot(Value::Null, "2026-01-01T00:00:02Z", 50)).await;
    fixture.report(SANDBOX, &snapshot(json!(" "), "2026-01-01T00:00:01Z", 40)).await;
    let record = fixture.record(user, id).await;
    assert_eq!((prompt_tokens(&record), record.llm_model.as_deref()), (50, Some("openai/new")));
    untouched(&record, &before);

    // The agent's title is applied once; it never replaces the user's.
    fixture.report(SANDBOX, &snapshot(json!("🐛 The agent's"), "2026-01-01T00:00:03Z", 60)).await;
    fixture.report(SANDBOX, &snapshot(json!("Another"), "2026-01-01T00:00:03Z", 60)).await;
    assert_eq!(fixture.record(user, id).await.title.as_deref(), Some("🐛 The agent's"));
    let found = fixture.api.get(user, "/search", &[("title__contains", "the AGENT".to_owned())]).await.1;
    assert_eq!(found["items"].as_array().map(Vec::len), Some(1), "the new title is searched: {found}");
    let store = &fixture.api.stores.conversations();
    let rename = |title| store.update(user, id, ConversationChange::default().title(title));
    rename(Some("Mine")).await.expect("renamed");
    fixture.report(SANDBOX, &snapshot(json!("Another"), "2026-01-01T00:00:04Z", 60)).await;
    assert_eq!(fixture.record(user, id).await.title.as_deref(), Some("Mine"));
    rename(None).await.expect("renamed");
    fixture.report(SANDBOX, &snapshot(json!("Another"), "2026-01-01T00:00:04Z", 60)).await;
    assert_eq!(fixture.record(user, id).await.title.as_deref(), Some("Another"));

    // A sandbox may report only its own conversations.
    fixture.has_sandbox(user, "other").await;
    let answer = fixture.post("other", "conversations", &snapshot(json!("x"), "2026-01-01T00:00:09Z", 99)).await;
    assert_eq!(answer, (401, json!({"detail": "Unauthorized"})));
    assert_eq!(prompt_tokens(&fixture.record(user, id).await), 60);

    // A report of a conversation that is being deleted is ignored.
    let record = fixture.record(user, id).await;
    assert!(store.begin_deletion(user, &[record], Time::now()).await.expect("the store"));
    fixture.report(SANDBOX, &snapshot(json!("x"), "2026-01-01T00:00:09Z", 99)).await;
    fixture.post_events(SANDBOX, id, &[message("m"), stats("s", "2026-01-01T00:00:09", 9)]).await;
    assert_eq!(store.lookup(user, id).await.expect("the store"), Lookup::Deleting);
    assert_eq!((fixture.count().await, fixture.events(user, id).await), (0, json!([])));
    fixture.api.stop().await;
}

/// A refused report would be resent forever.
#[tokio::test]
async fn titles_and_models_of_any_length_are_accepted() {
    let lines = Lines::default();
    let _logging = lines.capture("shared=warn");
    let fixture = Fixture::new().await;
    let (known, unknown, user) = (Uuid::new_v4(), Uuid::new_v4(), &fixture.user);
    let before = fixture.has_conversation(user, known, SANDBOX).await;
    let change = ConversationChange::default().title(None);
    fixture.api.stores.conversations().update(user, known, change).await.expect("the store");
    let long = "é".repeat(500_000);
    for id in [known, unknown] {
        fixture.report(SANDBOX, &json!({"id": id, "title": long, "agent": {"llm": {"model": long}}})).await;
        let record = fixture.record(user, id).await;
        assert_eq!(record.title, Some("é".repeat(MAX_NAME)));
        assert_eq!(record.llm_model, before.llm_model.clone().filter(|_| id == known));
        let at_the_limit = "m".repeat(MAX_NAME);
        fixture.report(SANDBOX, &json!({"id": id, "agent": {"llm": {"model": at_the_limit}}})).await;
        assert_eq!(fixture.record(user, id).await.llm_model, Some(at_the_limit));
    }
    let events = ["agent", "tags"].map(|key| {
        json!({"id": key, "timestamp": "2026-01-01T00:00:01", "key": key, "kind": "ConversationStateUpdateEvent",
            "value": {"llm": {"model": long}, "tag": long}})
    });
    fixture.post_events(SANDBOX, known, &events).await;
    for (event, count) in [("conversation.reported_model_ignored", 2), ("conversation.reported_tags_left_out", 1)] {
        let warnings = lines.with(event).into_iter();
        let warnings: Vec<String> = warnings.filter(|line| line.contains(&format!("conversation={known}"))).collect();
        assert_eq!(warnings.len(), count, "{event}: {warnings:?}");
    }
    // The title that an agent server generates on request.
    let third = Uuid::new_v4();
    fixture.report(SANDBOX, &json!({"id": third})).await;
    assert!(fixture.api.stores.conversations().set_agent_title(user, third, &long).await.expect("the store"));
    assert_eq!(fixture.record(user, third).await.title, Some("é".repeat(MAX_NAME)));
    fixture.api.stop().await;
}

#[tokio::test]
async fn unknown_conversation_gets_one_stub_record_however_often_it_is_reported() {
    let fixture = Fixture::new().await;
    let (plain, titled, user) = (Uuid::new_v4(), Uuid::new_v4(), &fixture.user);
    fixture.report(SANDBOX, &json!({"id": plain, "execution_status": "deleting"})).await;
    assert_eq!(fixture.count().await, 0);
    let report = json!({"id": plain, "stats": metrics(5), "updated_at": "2026-01-01T00:00:00Z",
        "agent": {"llm": {"model": "openai/x"}}});
    join_all((0..5).map(|_| fixture.report(SANDBOX, &report))).await;
    fixture.report(SANDBOX, &json!({"id": titled, "title": " Its title "})).await;
    assert_eq!(fixture.count().await, 2);
    let record = fixture.record(user, plain).await;
    assert_eq!(record.title, Some(format!("Conversation {}", plain.simple())));
    assert_eq!((record.sandbox_id.as_str(), prompt_tokens(&record)), (SANDBOX, 5));
    assert_eq!((record.llm_model.as_deref(), record.public), (Some("openai/x"), None));
    assert_eq!(fixture.record(user, titled).await.title.as_deref(), Some("Its title"));
    // It is listed like any other conversation.
    let (_, shown) = fixture.api.get(user, "/search", &[]).await;
    assert_eq!(shown["items"].as_array().map(Vec::len), Some(2), "{shown}");
    fixture.report(SANDBOX, &json!({"id": plain, "title": "Found later"})).await;
    assert_eq!(fixture.record(user, plain).await.title.as_deref(), Some("Found later"));
    fixture.api.stop().await;
}

#[tokio::test]
async fn tenants_with_the_same_conversation_id_are_isolated() {
    let fixture = Fixture::new().await;
    let id = Uuid::new_v4();
    let tenants = [UserId::new("a"), UserId::new("b")];
    for (index, tenant) in tenants.iter().enumerate() {
        let sandbox = format!("sandbox-of-{tenant}");
        fixture.has_sandbox(tenant, &sandbox).await;
        fixture.has_conversation(tenant, id, &sandbox).await;
        let large = json!({"id": "large", "timestamp": "2026-01-01T00:00:00", "kind": "ObservationEvent",
            "text": tenant.as_str().repeat(400_000)});
        let tokens = 10 + index as u64;
        fixture.post_events(&sandbox, id, &[large, stats("s", "2026-01-01T00:00:01", tokens)]).await;
    }
    for (index, tenant) in tenants.iter().enumerate() {
        assert_eq!(prompt_tokens(&fixture.record(tenant, id).await), 10 + index as u64);
        let events = fixture.events(tenant, id).await;
        assert_eq!(events.as_array().map(Vec::len), Some(2));
        assert!(events[0]["text"].as_str().is_some_and(|text| text.starts_with(tenant.as_str())));
    }
    // Nor does either tenant see the other's events, or a third one any of them.
    assert_eq!(fixture.events(&UserId::new("c"), id).await, json!([]));
    fixture.api.stop().await;
}

#[tokio::test]
async fn fifty_concurrent_updates_of_one_record_lose_nothing() {
    let fixture = Fixture::new().await;
    let (id, user) = (Uuid::new_v4(), &fixture.user);
    let before = fixture.has_conversation(user, id, SANDBOX).await;
    let store = &fixture.api.stores.conversations();
    let read = |tokens| AgentStats::read(&metrics(tokens), None).expect("stats");
    join_all((0..50_u64).map(async |number| match number % 5 {
        0 => {
            let at = ReportTime::Event(format!("2026-01-01T00:00:{number:02}.000000000Z#s"));
            let _newest = store.set_stats(user, id, &read(number), &at, Touch::Now).await.expect("the store");
        }
        1 => {
            let change = ConversationChange::default().title(Some("Mine"));
            assert!(store.update(user, id, change).await.expect("the store").is_some());
        }
        2 => {
            let change = ConversationChange::default().sandbox(user, "moved");
            assert!(store.update(user, id, change).await.expect("the store").is_some());
        }
        3 => {
            let _first = store.set_agent_title(user, id, "The agent's").await.expect("the store");
        }
        _ => {
            let at = ReportTime::Snapshot("2026".into());
            assert!(store.set_reported_model(user, id, "openai/new", &at, Touch::Now).await.expect("the store"));
        }
    }))
    .await;
    let record = fixture.record(user, id).await;
    assert_eq!((record.title.as_deref(), record.sandbox_id.as_str()), (Some("Mine"), "moved"));
    assert_eq!((prompt_tokens(&record), record.llm_model.as_deref()), (45, Some("openai/new")));
    assert_eq!(
        (record.created_at, record.public, &record.selected_repository),
        (before.created_at, Some(true), &before.selected_repository)
    );
    fixture.api.stop().await;
}

#[tokio::test]
async fn halt_enqueues_a_poll_for_stats_unless_events_report_them() {
    let fixture = Fixture::new().await;
    let (quiet, reporting, user) = (Uuid::new_v4(), Uuid::new_v4(), &fixture.user);
    for id in [quiet, reporting] {
        fixture.has_conversation(user, id, SANDBOX).await;
    }
    fixture.post_events(SANDBOX, reporting, &[stats("s", "2026-01-01T00:00:00", 1)]).await;
    let status = |status: &str| {
        json!({"id": format!("status-{status}"), "timestamp": "2026-01-01T00:00:01", "key": "execution_status",
            "value": status, "kind": "ConversationStateUpdateEvent"})
    };
    for id in [quiet, reporting] {
        fixture.post_events(SANDBOX, id, &[status("running")]).await;
        fixture.post_events(SANDBOX, id, &[status("finished")]).await;
    }
    let expected =
        Job::RefreshConversation(RefreshConversation { user: user.clone(), conversation: quiet, attempt: 0 });
    assert_eq!(fixture.jobs().await, [expected]);
    fixture.api.stop().await;
}

#[tokio::test]
async fn message_enqueues_a_poll_for_a_title_unless_there_is_one() {
    let fixture = Fixture::new().await;
    let (id, named, unknown, user) = (Uuid::new_v4(), Uuid::new_v4(), Uuid::new_v4(), &fixture.user);
    fixture.has_conversation(user, id, SANDBOX).await;
    fixture.has_conversation(user, named, SANDBOX).await;
    let change = ConversationChange::default().title(Some("Mine"));
    fixture.api.stores.conversations().update(user, named, change).await.expect("renamed");
    for id in [id, named, unknown] {
        fixture.post_events(SANDBOX, id, &[]).await;
        fixture.post_events(SANDBOX, id, &[stats("s", "2026-01-01T00:00:00", 1)]).await;
        fixture.post_events(SANDBOX, id, &[message("m")]).await;
    }
    let mut asked: Vec<Uuid> = fixture
        .jobs()
        .await
        .into_iter()
        .map(|job| match job {
            Job::RefreshConversation(RefreshConversation { conversation, attempt: 0, .. }) => conversation,
            other => panic!("{other:?}"),
        })
        .collect();
    asked.sort_unstable();
    let mut expected = [id, unknown];
    expected.sort_unstable();
    assert_eq!(asked, expected);
    fixture.api.stop().await;
}

#[tokio::test]
async fn access_token_returns_only_the_current_provider_token() {
    let fixture = Fixture::new().await;
    let api = &fixture.api;
    let settings = api.stores.settings();
    let (with, without) = (UserId::new("with"), UserId::new("without"));
    let stored =
        |token: &str| json!({"provider_tokens": {"github": {"token": token}, "gitlab": {"token": null}}}).to_string();
    settings.put(&with, &stored("ghp-1").into()).await.expect("stored");
    settings.put(&fixture.user, &stored("ghp-local").into()).await.expect("stored");
    let key = TokenKey::of(&api.sealer).await.expect("a key");
    let token = |user: &UserId, provider, seconds| {
        let token = key.sign(user, provider, SANDBOX, Duration::from_secs(seconds)).expect("a token");
        token.expose_secret().to_owned()
    };
    let get = async |token: Option<&str>| {
        let mut request = Request::get("/api/v1/webhooks/secrets");
        if let Some(token) = token {
            request = request.header("x-access-token", token);
        }
        api.send(request.body(Body::empty()).expect("a request")).await
    };
    for user in [&with, &without] {
        fixture.has_sandbox(user, SANDBOX).await;
    }
    let valid = token(&with, ProviderType::Github, 60);
    assert_eq!(get(Some(&valid)).await, (200, json!("ghp-1")));
    settings.put(&with, &stored("ghp-2").into()).await.expect("stored");
    assert_eq!(get(Some(&valid)).await, (200, json!("ghp-2")));
    assert_eq!(get(Some(&token(&fixture.user, ProviderType::Github, 60))).await, (200, json!("ghp-local")));
    for without_token in [
        token(&with, ProviderType::Gitlab, 60),
        token(&with, ProviderType::Bitbucket, 60),
        token(&without, ProviderType::Github, 60),
    ] {
        assert_eq!(get(Some(&without_token)).await, (404, json!({"detail": "No such provider"})));
    }
    let expired = token(&with, ProviderType::Github, 0);
    let changed = format!("{}x", &valid[..valid.len() - 1]);
    for bad in [None, Some(""), Some("x.y.z"), Some(SANDBOX), Some(expired.as_str()), Some(&changed)] {
        assert_eq!(get(bad).await, (401, json!({"detail": "Unauthorized"})), "{bad:?}");
    }

    // The token of another user's sandbox, of none at all, and of a deleted one.
    let elsewhere = |sandbox: &str| {
        let token = key.sign(&with, ProviderType::Github, sandbox, Duration::from_secs(60)).expect("a token");
        token.expose_secret().to_owned()
    };
    fixture.has_sandbox(&without, "of-another").await;
    for sandbox in ["of-another", "nowhere", "", &"x".repeat(300)] {
        assert_eq!(get(Some(&elsewhere(sandbox))).await.0, 401, "{sandbox}");
    }
    let sandboxes = api.stores.sandboxes();
    assert!(sandboxes.mark_deleted(&with, SANDBOX).await.expect("deleted"));
    assert_eq!(get(Some(&valid)).await, (401, json!({"detail": "Unauthorized"})), "its sandbox was deleted");
    assert_eq!(get(Some(&token(&fixture.user, ProviderType::Github, 60))).await.0, 200, "others are not concerned");
    fixture.api.stop().await;
}

#[tokio::test]
async fn oversized_body_is_refused_with_json() {
    let fixture = Fixture::new().await;
    let request = Request::post(format!("/api/v1/webhooks/events/{}", Uuid::new_v4()))
        .header("content-type", "application/json")
        .header("x-session-api-key", SANDBOX)
        .body(Body::from(vec![b' '; 33 * 1024 * 1024]));
    let answer = fixture.api.send(request.expect("a request")).await;
    assert_eq!(answer, (413, json!({"detail": "The request is larger than this server accepts; send a smaller one"})));
    fixture.api.stop().await;
}

fn known(lookup: Lookup) -> StoredConversation {
    match lookup {
        Lookup::Present(known) => *known,
        other => panic!("there is no record: {other:?}"),
    }
}

fn stub_of(harness: &WorkerHarness, id: Uuid, sandbox: &str) -> ConversationRecord {
    let data = json!({"id": id.simple().to_string(), "sandbox_id": sandbox, "title": format!("Conversation {}", id.simple()),
        "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z"});
    seed::conversation(&harness.user, data)
}

#[tokio::test]
async fn start_completes_the_stub_that_its_agent_server_reported_earlier() {
    let harness = WorkerHarness::start(quick()).await;
    let (store, user) = (&harness.conversations, &harness.user);
    let parent = harness.begin(&json!({"title": "Parent"})).await;
    harness.drive(parent.id).await;
    for (title, agent_title, expected) in [
        (None, None, None),
        (None, Some("The agent's"), Some("The agent's")),
        (Some("Mine"), None, Some("Mine")),
        (Some("Mine"), Some("The agent's"), Some("Mine")),
    ] {
        for parent in [None, Some(parent.conversation_id)] {
            let id = Uuid::new_v4();
            assert!(harness.put_stub(&stub_of(&harness, id, "elsewhere")).await);
            let usage = AgentStats::read(&metrics(77), Some("agent")).expect("stats");
            let at = ReportTime::Event("2026".to_owned());
            assert!(store.set_stats(user, id, &usage, &at, Touch::Now).await.expect("stored"));
            assert!(store.set_reported_model(user, id, "openai/switched", &at, Touch::Now).await.expect("stored"));
            // Agent servers that know tags report those of the start, or newer ones.
            let is_tagged = agent_title.is_some();
            if is_tagged {
                let tags = Tags::read(&json!({"a": "b"})).expect("tags").0;
                assert!(store.set_tags(user, id, &tags, &at, Touch::Now).await.expect("stored"));
            }
            let expected_tags = if is_tagged { json!({"a": "b"}) } else { json!({"of": "the start"}) };
            if let Some(title) = agent_title {
                assert!(store.set_agent_title(user, id, title).await.expect("stored"));
            }
            let body = json!({"conversation_id": id, "title": title, "trigger": "gui", "pr_number": [7], "tags": {"of": "the start"},
                "public": true, "parent_conversation_id": parent, "processors": [{"kind": "SetTitleCallbackProcessor"}]});
            let start = harness.begin(&body).await;
            assert_eq!(harness.drive(start.id).await.now.status, StartStatus::Ready);
            let known = known(store.lookup(user, id).await.expect("the store"));
            let record = &known.record;
            let default = format!("Conversation {}", &id.simple().to_string()[..5]);
            assert_eq!(record.title.as_deref(), Some(expected.unwrap_or(&default)));
            assert_eq!((prompt_tokens(record), record.public, &record.pr_number[..]), (77, Some(true), &[7][..]));
            assert_eq!((record.trigger.is_some(), record.parent_conversation_id), (true, parent));
            assert_ne!(record.sandbox_id, "elsewhere");
            assert_eq!((record.llm_model.as_deref(), json!(record.tags)), (Some("openai/switched"), expected_tags));
            assert_eq!((known.is_stub, known.processors.len()), (false, 1));
            for include_sub_conversations in [true, false] {
                let filter = Filter { include_sub_conversations, ..Filter::default() };
                let page = store.search(user, &filter, SortOrder::CreatedAtDesc, None, 100).await.expect("a page");
                let listed = page.records.iter().any(|record| record.id == id);
                assert_eq!(listed, include_sub_conversations || parent.is_none());
                let count = store.count(user, &filter).await.expect("a count");
                assert_eq!(count, page.records.len() as u64, "{include_sub_conversations}");
            }
            assert_eq!(
                store.sub_conversations(user, parent.unwrap_or_default()).await.expect("ids").contains(&id),
                parent.is_some()
            );
            // A second start of the conversation does not change its record.
            let again = harness.begin(&json!({"conversation_id": id, "title": "Again"})).await;
            assert_eq!(harness.drive(again.id).await.now.status, StartStatus::Ready);
            assert_eq!(
                harness.conversations.get(user, id).await.expect("the store").expect("a record").title,
                known.record.title
            );
        }
    }
    harness.finish().await;
}

#[tokio::test]
async fn failed_start_removes_the_stub_that_its_agent_server_reported() {
    let harness = WorkerHarness::start(quick()).await;
    let start = harness.begin(&json!({"title": "Never"})).await;
    let stub = stub_of(&harness, start.conversation_id, &start.new_sandbox_id);
    assert!(harness.put_stub(&stub).await);
    *harness.sandboxes.begins_as.lock().expect("status") = SandboxStatus::Error;
    assert_eq!(harness.drive(start.id).await.now.status, StartStatus::Error);
    harness.settle_sandboxes().await;
    assert!(harness.sandboxes.made()[&start.new_sandbox_id].deleted);
    assert_eq!(harness.conversations.get(&harness.user, start.conversation_id).await.expect("the store"), None);
    assert_eq!(harness.conversations.count(&harness.user, &Filter::default()).await.expect("a count"), 0);
    harness.finish().await;
}

/// A harness with a running conversation, and its id.
async fn with_conversation(body: Value) -> (WorkerHarness, Uuid) {
    let harness = WorkerHarness::start(quick()).await;
    let start = harness.begin(&body).await;
    assert_eq!(harness.drive(start.id).await.now.status, StartStatus::Ready);
    (harness, start.conversation_id)
}

/// Runs one attempt of the job that refreshes a conversation.
async fn refresh(harness: &WorkerHarness, conversation: Uuid, attempt: usize) -> shared::Result<()> {
    let job = RefreshConversation { user: harness.user.clone(), conversation, attempt };
    harness.other_worker.follow_up.refresh_from_agent_server(&job).await
}

/// The metrics of an agent server whose events report none come only from polls.
#[tokio::test]
async fn failed_poll_is_retried_until_the_metrics_are_known() {
    let (harness, id) = with_conversation(json!({"title": "Mine"})).await;
    let poll = async |attempt| refresh(&harness, id, attempt).await;
    harness.agent.inject(Fault::new("GET /api/conversations", Nth::Next, Kind::Status(500, "{}".into())));
    poll(0).await.expect("polled");
    let message = loop {
        if let Some(message) = harness.receive().await {
            break message;
        }
    };
    harness.delete(&message).await;
    let again = Job::from_body(&message.body.unwrap_or_default()).expect("a job");
    assert_eq!(
        again,
        Job::RefreshConversation(RefreshConversation { user: harness.user.clone(), conversation: id, attempt: 1 })
    );
    poll(1).await.expect("polled");
    harness.agent.inject(Fault::new("GET /api/conversations", Nth::Always, Kind::Status(500, "{}".into())));
    poll(5).await.expect("polled for the last time");
    assert!(harness.receive().await.is_none(), "neither retried forever nor after a successful poll");
    harness.finish().await;
}

#[tokio::test]
async fn the_agents_title_is_fetched_and_a_rename_always_wins() {
    let (harness, id) = with_conversation(json!({})).await;
    let (user, fetch) = (&harness.user, async |attempt| refresh(&harness, id, attempt).await);
    let title = async || harness.conversations.get(user, id).await.expect("the store").expect("a record").title;
    let default = format!("Conversation {}", &id.simple().to_string()[..5]);
    // There is no title yet: another poll is enqueued, but not forever.
    fetch(0).await.expect("looked");
    assert_eq!(title().await.as_deref(), Some(default.as_str()));
    let again = async || loop {
        if let Some(message) = harness.receive().await {
            harness.delete(&message).await;
            let job = Job::from_body(&message.body.unwrap_or_default()).expect("a job");
            // The first poll also looks for events that have not arrived.
            if !matches!(job, Job::BackfillEvents(_)) {
                return job;
            }
        }
    };
    assert_eq!(
        again().await,
        Job::RefreshConversation(RefreshConversation { user: user.clone(), conversation: id, attempt: 1 })
    );
    fetch(5).await.expect("looked");
    // The same applies while the conversation is unknown, or its sandbox does not exist.
    refresh(&harness, Uuid::new_v4(), 0).await.expect("looked");
    assert!(matches!(again().await, Job::RefreshConversation(RefreshConversation { attempt: 1, .. })));

    // The agent may have missed the message that its title is made from: it is requested to generate one, once its own
    // is overdue.
    harness.agent.set_generated_title(" ✨ Made ");
    fetch(2).await.expect("looked");
    assert_eq!(title().await.as_deref(), Some(default.as_str()));
    assert!(matches!(again().await, Job::RefreshConversation(RefreshConversation { attempt: 3, .. })));
    fetch(3).await.expect("looked");
    assert_eq!(title().await.as_deref(), Some("✨ Made"));
    harness.conversations.update(user, id, ConversationChange::default().title(None)).await.expect("cleared");

    let http = HttpClient::new(AddressPolicy::Any);
    let agent = AgentServer::new(http, &harness.agent.url(), Some(SESSION_KEY.into()));
    agent.set_title(id, "🐛 Found", Duration::from_secs(5)).await.expect("a title");
    join_all((0..5).map(fetch)).await.into_iter().for_each(|fetched| fetched.expect("fetched"));
    assert_eq!(title().await.as_deref(), Some("🐛 Found"));
    // Whichever comes first, the user's title wins.
    for round in 0..10 {
        harness.conversations.update(user, id, ConversationChange::default().title(None)).await.expect("cleared");
        let mine = format!("Mine {round}");
        let rename = harness.conversations.update(user, id, ConversationChange::default().title(Some(&mine)));
        let (fetched, renamed) = futures::future::join(fetch(0), rename).await;
        assert!(fetched.is_ok() && renamed.is_ok());
        assert_eq!(title().await, Some(mine));
    }
    harness.finish().await;
}

/// Captures what this thread logs.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("lines").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Lines {
    /// Captures what this thread logs while the guard lives.
    fn capture(&self, filter: &str) -> tracing::subscriber::DefaultGuard {
        let to = self.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_env_filter(filter).with_writer(move || to.clone()).finish();
        log_to(subscriber)
    }

    /// The lines that contain this text, in order.
    fn with(&self, part: &str) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().expect("lines").clone()).expect("text");
        text.lines().filter(|line| line.contains(part)).map(ToOwned::to_owned).collect()
    }

    /// The ids of the logged events, in order.
    fn events(&self) -> Vec<String> {
        let lines = self.with("event.logged").into_iter();
        lines
            .map(|line| {
                line.split("event=\"").nth(1).and_then(|rest| rest.split('"').next()).expect("an id").to_owned()
            })
            .collect()
    }
}

#[tokio::test]
async fn events_are_logged_once_and_in_order_if_the_start_requested_it() {
    let lines = Lines::default();
    let _logging = lines.capture("shared=info");
    let logging = json!({"processors": [{"kind": "LoggingCallbackProcessor"}]});
    for (body, logged) in [(json!({}), false), (logging, true)] {
        let (harness, id) = with_conversation(body).await;
        let processors = &harness.other_worker.follow_up;
        let at = |number: usize| Event {
            id: format!("{logged}-{number}"),
            timestamp: format!("2026-01-01T{:02}:{:02}:00", number / 60, number % 60),
            kind: "K".into(),
            json: format!("{{\"secret\":{number}}}"),
        };
        let come = async |numbers: &[usize]| {
            let events = numbers.iter().map(|number| at(*number)).collect();
            processors.events.append(&harness.user, id, events).await.expect("stored");
            let process = || processors.process_events(&harness.user, id, None);
            join_all((0..5).map(|_| process())).await.into_iter().for_each(|done| done.expect("processed"));
        };
        let first: Vec<usize> = (10..260).collect();
        come(&first).await;
        // The same events again, with a late one and a new one.
        come(&[10, 11, 5, 300]).await;
        let expected: Vec<String> = first.into_iter().chain([300]).map(|number| at(number).id).collect();
        assert_eq!(lines.events(), if logged { expected } else { Vec::new() });
        harness.finish().await;
    }
    assert!(!String::from_utf8_lossy(&lines.0.lock().expect("lines")).contains("secret"));
}

#[tokio::test]
async fn no_event_misses_the_log_on_lagging_indexes() {
    let lines = Lines::default();
    let _logging = lines.capture("shared=info");
    for seed in 1..=3 {
        let folder = TempDir::new().expect("a folder");
        let api = Api::with_faults(folder.path(), SandboxConfig::None, AwsFaults::lagging(seed)).await;
        let fixture = Fixture { api, user: UserId::local(), _folder: folder };
        let (id, user) = (Uuid::new_v4(), &fixture.user);
        fixture.has_sandbox(user, SANDBOX).await;
        fixture.has_logged_conversation(id).await;
        fixture.api.hostile.catch_up().await;
        let event = |number: usize| json!({"id": format!("{seed}-{number:02}"), "timestamp": format!("2026-01-01T00:00:{number:02}"), "kind": "K"});
        for batch in 0..5 {
            let events: Vec<Value> = (batch * 6..batch * 6 + 6).map(event).collect();
            fixture.post_events(SANDBOX, id, &events).await;
            // The worker is at once where there is a job.
            fixture.api.work().await;
        }
        // Nothing comes after the last batch, but its job does.
        let is_of_seed = |event: &String| event.starts_with(&format!("{seed}-"));
        let logged = || lines.events().into_iter().filter(is_of_seed).collect::<Vec<_>>();
        let deadline = Instant::now() + Duration::from_secs(8);
        while Instant::now() < deadline && logged().len() < 30 {
            fixture.api.work().await;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let expected: Vec<String> = (0..30).map(|number| format!("{seed}-{number:02}")).collect();
        assert_eq!(logged(), expected, "seed {seed}");
        fixture.api.stop().await;
    }
}

#[tokio::test]
async fn batch_with_processors_enqueues_a_job_for_them() {
    let fixture = Fixture::new().await;
    let (id, user) = (Uuid::new_v4(), &fixture.user);
    fixture.has_logged_conversation(id).await;
    fixture.post_events(SANDBOX, id, &[]).await;
    fixture.post_events(SANDBOX, id, &[message("m")]).await;
    let up_to = Some("2026-01-01T00:00:00.000000000Z#m".to_owned());
    let job = ProcessEvents { user: user.clone(), conversation: id, up_to };
    assert_eq!(fixture.jobs().await, [Job::ProcessEvents(job)]);
    fixture.api.stop().await;
}
