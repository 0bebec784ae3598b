//! Conversations of agent servers, and the agents that work in them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Response, StatusCode};
use serde_json::{Map, Value, json};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::history::{ConversationHistory, Message};
use super::provider::Runtime;
use super::server::Process;
use super::webhooks::{self, Queued};
use super::{Shared, State, detail, json_body, naive, ok, query_value, raw, reply};
use crate::net::{Failure, Reply, Request};

/// Until the title is generated, after the first message.
const TITLE: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(20)];
/// Until a client renames a conversation, after a turn.
const RENAME: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(60)];
/// The probability that a turn ends with an error of its model.
const ERRORS: f64 = 0.05;
/// The tokens of each request to a model.
const TOKENS: u64 = 100;
const RUNNING: &str = "running";
const IDLE: &str = "idle";

/// A conversation.
pub(super) struct Conversation {
    id: Uuid,
    created: Duration,
    deleted: Option<Duration>,
    posts: u64,
    working_dir: Value,
    model: Value,
    usage_id: Value,
    tags: Value,
    execution_status: &'static str,
    title: Option<String>,
    created_at: String,
    updated_at: String,
    security_analyzer: Value,
    last_message: Option<String>,
    messages: Vec<Message>,
    /// The requests to the model so far.
    model_requests: u64,
    events: Vec<(String, String)>,
    /// Whether an agent works in it.
    works: bool,
    /// Messages wait for it, in their order, while an agent works.
    turns: Arc<tokio::sync::Mutex<()>>,
    /// The events that wait to be posted.
    pub(super) queue: VecDeque<Queued>,
    /// Whether a future posts them.
    pub(super) is_flushing: bool,
    /// Wakes that future when enough wait.
    pub(super) is_full: Arc<Notify>,
}

impl Conversation {
    fn new(shared: &Shared, state: &mut State, id: Uuid, body: &Value) -> Self {
        let time = shared.timestamp(state);
        Self {
            id,
            created: shared.elapsed(),
            deleted: None,
            posts: 1,
            working_dir: body["workspace"]["working_dir"].clone(),
            model: body["agent"]["llm"]["model"].clone(),
            usage_id: body["agent"]["llm"]["usage_id"].clone(),
            tags: if body["tags"].is_object() { body["tags"].clone() } else { json!({}) },
            execution_status: IDLE,
            title: None,
            created_at: format!("{time:.6}"),
            updated_at: format!("{time:.6}"),
            security_analyzer: body["security_analyzer"].clone(),
            last_message: None,
            messages: Vec::new(),
            model_requests: 0,
            events: Vec::new(),
            works: false,
            turns: Arc::default(),
            queue: VecDeque::new(),
            is_flushing: false,
            is_full: Arc::default(),
        }
    }

    pub(super) fn works(&self) -> bool {
        self.works
    }

    /// What the end of the agent server does. Returns the number of events that no webhook will report.
    pub(super) fn end_process(&mut self) -> u64 {
        (self.works, self.is_flushing) = (false, false);
        self.queue.drain(..).count() as u64
    }

    pub(super) fn history(&self, runtime: &Runtime) -> ConversationHistory {
        ConversationHistory {
            id: self.id,
            session: runtime.session.clone(),
            runtime_id: runtime.id.clone(),
            created: self.created,
            deleted: self.deleted,
            posts: self.posts,
            execution_status: self.execution_status.to_owned(),
            title: self.title.clone(),
            working_dir: self.working_dir.as_str().unwrap_or_default().to_owned(),
            messages: self.messages.clone(),
            events: self.events.clone(),
        }
    }

    fn stats(&self) -> Value {
        if self.model_requests == 0 {
            return json!({"usage_to_metrics": {}});
        }
        let usage = self.usage_id.as_str().unwrap_or("agent").to_owned();
        let metrics = json!({
            "model_name": self.model,
            "accumulated_cost": self.model_requests as f64 / 1000.0,
            "max_budget_per_task": null,
            "accumulated_token_usage": {
                "model": self.model, "prompt_tokens": TOKENS * self.model_requests,
                "completion_tokens": TOKENS / 5 * self.model_requests, "cache_read_tokens": 0, "cache_write_tokens": 0,
                "reasoning_tokens": 0, "context_window": 0, "per_turn_token": TOKENS, "response_id": "",
            },
        });
        json!({"usage_to_metrics": Map::from_iter([(usage, metrics)])})
    }

    /// The conversation in responses and snapshots.
    pub(super) fn info(&self) -> Value {
        json!({
            "id": self.id.hyphenated().to_string(),
            "workspace": {"working_dir": self.working_dir, "kind": "LocalWorkspace"},
            "execution_status": self.execution_status,
            "security_analyzer": self.security_analyzer,
            "last_user_message_id": self.last_message,
            "stats": self.stats(),
            "title": self.title,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            "tags": self.tags,
            "agent": {"llm": {"model": self.model, "usage_id": self.usage_id, "api_key": null}, "kind": "Agent"},
        })
    }

    /// The value of events with the whole state.
    fn state(&self) -> Value {
        json!({
            "id": self.id.hyphenated().to_string(),
            "agent": {"llm": {"model": self.model, "usage_id": self.usage_id}, "kind": "Agent"},
            "workspace": {"working_dir": self.working_dir, "kind": "LocalWorkspace"},
            "execution_status": self.execution_status,
            "stats": self.stats(),
            "tags": self.tags,
        })
    }
}

/// A conversation in a process of its agent server.
#[derive(Clone)]
struct Hosted {
    shared: Arc<Shared>,
    process: Process,
    id: Uuid,
    /// When it was created: a conversation with this id may be created again after a deletion.
    created: Duration,
}

impl Hosted {
    fn conversation<'s>(&self, state: &'s mut State) -> Option<&'s mut Conversation> {
        self.process.conversation(state, self.id).filter(|conversation| conversation.created == self.created)
    }

    fn subject(&self) -> String {
        format!("{} {}", self.process.runtime, self.id.simple())
    }

    /// Adds an event, and lets it be posted. The search shows it without the nulls with which it is posted. Returns its id, or `None` if
    /// the conversation or the process has ended.
    fn emit(&self, state: &mut State, kind: &str, source: &str, fields: &Value) -> Option<String> {
        let time = self.shared.timestamp(state);
        let nth = self.conversation(state)?.events.len() as u64;
        let id = self.shared.id("event", &self.subject(), nth).hyphenated().to_string();
        let mut event = Map::new();
        event.insert("id".to_owned(), json!(id));
        event.insert("timestamp".to_owned(), json!(naive(time)));
        event.insert("source".to_owned(), json!(source));
        event.extend(fields.as_object().cloned().unwrap_or_default());
        event.insert("kind".to_owned(), json!(kind));
        let shown = json!(event).to_string();
        event.insert("parent_id".to_owned(), Value::Null);
        let is_activity = kind != "ConversationStateUpdateEvent";
        let reports = {
            let runtime = self.process.of(state)?;
            if is_activity {
                runtime.server.used = Instant::now();
            }
            runtime.webhooks.is_some()
        };
        let conversation = self.conversation(state)?;
        conversation.events.push((id.clone(), shown));
        if is_activity {
            conversation.updated_at = format!("{time:.6}");
        }
        if reports {
            conversation.queue.push_back(Queued { json: json!(event).to_string() });
            conversation.is_full.notify_waiters();
            if !std::mem::replace(&mut conversation.is_flushing, true) {
                tokio::spawn(webhooks::flush(self.shared.clone(), self.process.clone(), self.id));
            }
            state.counters.posts_open += 1;
        }
        Some(id)
    }

    fn emit_state(&self, state: &mut State, key: &str, value: &Value) -> Option<String> {
        self.emit(state, "ConversationStateUpdateEvent", "environment", &json!({"key": key, "value": value}))
    }

    fn set_status(&self, state: &mut State, status: &'static str) -> Option<()> {
        self.conversation(state)?.execution_status = status;
        self.emit_state(state, "execution_status", &json!(status)).map(drop)
    }

    fn emit_stats(&self, state: &mut State) -> Option<()> {
        let conversation = self.conversation(state)?;
        conversation.model_requests += 1;
        let usage = conversation.stats();
        self.emit_state(state, "stats", &usage).map(drop)
    }

    fn emit_whole_state(&self, state: &mut State) -> Option<()> {
        let whole = self.conversation(state)?.state();
        self.emit_state(state, "full_state", &whole).map(drop)
    }

    fn snapshot(&self, state: &mut State) -> Option<()> {
        let body = self.conversation(state)?.info().to_string();
        webhooks::report(&self.shared, state, &self.process, self.id, body);
        Some(())
    }

    /// Adds a user's message, and lets the agent work.
    fn receive(&self, state: &mut State, message: &Value, is_initial: bool) -> Option<()> {
        let (at, runs) = (self.shared.elapsed(), message["run"].as_bool().unwrap_or(is_initial));
        let role = message["role"].as_str().unwrap_or("user").to_owned();
        let parts = message["content"].as_array().into_iter().flatten();
        let text = parts.filter_map(|part| part["text"].as_str()).collect::<Vec<_>>().join("\n");
        let (is_first, status) = {
            let conversation = self.conversation(state)?;
            (conversation.messages.is_empty(), conversation.execution_status)
        };
        if is_first {
            let prompt = json!({"system_prompt": {"type": "text", "text": "You are an agent."}, "tools": []});
            self.emit(state, "SystemPromptEvent", "agent", &prompt)?;
        } else if status != RUNNING && status != IDLE {
            self.set_status(state, IDLE)?;
        }
        let fields = json!({"llm_message": {"role": role, "content": message["content"]}, "activated_skills": []});
        let id = self.emit(state, "MessageEvent", "user", &fields)?;
        self.emit_state(state, "last_user_message_id", &json!(id))?;
        let conversation = self.conversation(state)?;
        conversation.last_message = Some(id);
        conversation.messages.push(Message { at, role, text, is_initial });
        let begins = runs && !conversation.works;
        conversation.works |= runs;
        if is_first {
            tokio::spawn(self.clone().generate_title());
        }
        if begins {
            tokio::spawn(self.clone().work());
        }
        Some(())
    }

    async fn generate_title(self) {
        let wait = self.shared.between(&mut self.shared.lock(), "title", &self.subject(), TITLE);
        sleep(wait).await;
        let mut state = self.shared.lock();
        let title = format!("Simulated {}", &self.id.simple().to_string()[..8]);
        let time = self.shared.timestamp(&mut state);
        if let Some(conversation) = self.conversation(&mut state).filter(|conversation| conversation.title.is_none()) {
            conversation.title = Some(title);
            conversation.updated_at = format!("{time:.6}");
        }
    }

    async fn work(self) {
        // The end of the conversation or of the process ends the work.
        let _ = self.try_to_work().await;
    }

    async fn step(&self) {
        let step =
            self.shared.between(&mut self.shared.lock(), "step", &self.subject(), self.shared.settings.pace.step);
        sleep(step).await;
    }

    /// Works until no message is left: calls tools, responds, and then rests.
    async fn try_to_work(&self) -> Option<()> {
        let (shared, subject) = (&self.shared, self.subject());
        self.set_status(&mut shared.lock(), RUNNING)?;
        loop {
            let (seen, steps) = {
                let state = &mut *shared.lock();
                let steps = shared.number(state, "steps", &subject, shared.settings.pace.steps) - 1;
                (self.conversation(state)?.messages.len(), steps)
            };
            for number in 0..steps {
                self.step().await;
                let action = {
                    let state = &mut *shared.lock();
                    self.emit_stats(state)?;
                    let call = format!("call-{number}");
                    let fields = json!({
                        "action": {"command": "make", "kind": "TerminalAction"}, "tool_name": "terminal",
                        "tool_call_id": call,
                    });
                    self.emit(state, "ActionEvent", "agent", &fields)?
                };
                self.step().await;
                let fields = json!({
                    "observation": {"content": [{"type": "text", "text": "done"}], "kind": "TerminalObservation"},
                    "action_id": action, "tool_name": "terminal", "tool_call_id": format!("call-{number}"),
                });
                self.emit(&mut shared.lock(), "ObservationEvent", "environment", &fields)?;
            }
            self.step().await;
            let state = &mut *shared.lock();
            let fails = shared.chance(state, "turn fails", &subject, ERRORS);
            self.emit_stats(state)?;
            if !fails {
                let text = format!("Response to {seen} messages");
                let message = json!({"role": "assistant", "content": [{"type": "text", "text": text}]});
                self.emit(state, "MessageEvent", "agent", &json!({"llm_message": message}))?;
            }
            if !fails && self.conversation(state)?.messages.len() > seen {
                continue;
            }
            self.conversation(state)?.works = false;
            self.set_status(state, if fails { "error" } else { "finished" })?;
            if fails {
                let fields = json!({"code": "LLMError", "detail": "The model does not respond"});
                self.emit(state, "ConversationErrorEvent", "environment", &fields)?;
            }
            self.emit_whole_state(state)?;
            if shared.chance(state, "client renames", &subject, shared.settings.pace.renames) {
                tokio::spawn(self.clone().rename());
            }
            return Some(());
        }
    }

    /// A client renames the conversation, directly at the agent server.
    async fn rename(self) {
        let wait = self.shared.between(&mut self.shared.lock(), "rename", &self.subject(), RENAME);
        sleep(wait).await;
        let state = &mut *self.shared.lock();
        let time = self.shared.timestamp(state);
        let nth = self.shared.number(state, "name", &self.subject(), 1000);
        let Some(conversation) = self.conversation(state) else { return };
        conversation.title = Some(format!("Renamed {nth}"));
        conversation.updated_at = format!("{time:.6}");
        self.snapshot(state);
    }
}

fn all_hosted(shared: &Arc<Shared>, state: &State, runtime: &str) -> Vec<Hosted> {
    let server = &state.runtimes[runtime].server;
    let process = Process { runtime: runtime.to_owned(), number: server.process };
    let hosted = |conversation: &Conversation| Hosted {
        shared: shared.clone(),
        process: process.clone(),
        id: conversation.id,
        created: conversation.created,
    };
    server.conversations.values().map(hosted).collect()
}

/// What an agent server does with its conversations as it comes up: an agent that worked when the last process ended has failed.
pub(super) fn load(shared: &Arc<Shared>, state: &mut State, runtime: &str) {
    for hosted in all_hosted(shared, state, runtime) {
        let Some(conversation) = hosted.conversation(state) else { continue };
        if conversation.execution_status == RUNNING {
            conversation.execution_status = "error";
            let _ = hosted.emit_whole_state(state);
        }
    }
}

/// Posts the events that wait, as an agent server does that ends in an orderly way.
pub(super) fn flush(shared: &Arc<Shared>, state: &mut State, runtime: &str) {
    for hosted in all_hosted(shared, state, runtime) {
        webhooks::post_last(shared, state, &hosted.process, hosted.id);
    }
}

/// Creates a conversation, unless one has its id, and sends its first message. The agent server finishes that even if the client does not
/// wait for the response.
pub(super) async fn create(shared: &Arc<Shared>, process: &Process, body: Value) -> Reply {
    let (shared, process) = (shared.clone(), process.clone());
    let created = tokio::spawn(async move { try_to_create(&shared, &process, &body).await });
    created.await.expect("the creation").unwrap_or(Err(Failure::Cut))
}

async fn try_to_create(shared: &Arc<Shared>, process: &Process, body: &Value) -> Option<Reply> {
    let id = body["conversation_id"].as_str().and_then(|id| Uuid::parse_str(id).ok()).expect("an id");
    assert!(body["workspace"].is_object() && body["agent"].is_object(), "a workspace and an agent");
    let subject = format!("{} {}", process.runtime, id.simple());
    let found = |state: &mut State| {
        let conversation = process.conversation(state, id)?;
        conversation.posts += 1;
        Some(ok(&conversation.info()))
    };
    let pace = &shared.settings.pace;
    let (setup, message) = {
        let state = &mut *shared.lock();
        if let Some(found) = found(state) {
            return Some(found);
        }
        let setup = shared.between(state, "creation", &subject, pace.create);
        (setup, shared.between(state, "first message", &subject, pace.create))
    };
    sleep(setup).await;
    let hosted = {
        let state = &mut *shared.lock();
        // Another request may have created it meanwhile.
        if let Some(found) = found(state) {
            return Some(found);
        }
        let conversation = Conversation::new(shared, state, id, body);
        let hosted = Hosted { shared: shared.clone(), process: process.clone(), id, created: conversation.created };
        process.of(state)?.server.conversations.insert(id, conversation);
        hosted.emit_whole_state(state)?;
        hosted
    };
    // The first message waits for no lock: another message may arrive before it.
    let initial = &body["initial_message"];
    if initial.is_object() {
        sleep(message).await;
        hosted.receive(&mut shared.lock(), initial, true)?;
    }
    let state = &mut *shared.lock();
    hosted.snapshot(state)?;
    Some(reply(StatusCode::CREATED, &hosted.conversation(state)?.info()))
}

/// Handles a request about a conversation. `rest` is the path below it.
pub(super) async fn respond(
    shared: &Arc<Shared>,
    process: &Process,
    method: &str,
    rest: &str,
    id: Uuid,
    request: &Request,
) -> Reply {
    let hosted = {
        let state = &mut *shared.lock();
        if process.of(state).is_none() {
            return Err(Failure::Cut);
        }
        process.conversation(state, id).map(|conversation| Hosted {
            shared: shared.clone(),
            process: process.clone(),
            id,
            created: conversation.created,
        })
    };
    let Some(hosted) = hosted else {
        return detail(StatusCode::NOT_FOUND, &format!("Conversation not found: {}", id.hyphenated()));
    };
    let body = json_body(request);
    let done = ok(&json!({"success": true}));
    if (method, rest) == ("POST", "/events") {
        // It receives the message even if the client does not wait for the response.
        let sent = tokio::spawn(async move { hosted.send(&body).await });
        return sent.await.expect("the message").map_or(Err(Failure::Cut), |()| done);
    }
    let state = &mut *shared.lock();
    let time = shared.timestamp(state);
    let Some(conversation) = hosted.conversation(state) else { return Err(Failure::Cut) };
    match (method, rest) {
        ("GET", "/events/search") => Ok(search(conversation, request)),
        ("PATCH", "") => {
            let title = body["title"].as_str().expect("a title");
            conversation.title = Some(title.trim().to_owned());
            conversation.updated_at = format!("{time:.6}");
            hosted.snapshot(state);
            done
        }
        ("POST", "/security_analyzer") => {
            conversation.security_analyzer = body["security_analyzer"].clone();
            done
        }
        // Version 1.58 has no such route.
        ("POST", "/generate_title") => detail(StatusCode::NOT_FOUND, "Not Found"),
        ("DELETE", "") => {
            let mut info = conversation.info();
            info["execution_status"] = json!("deleting");
            webhooks::report(shared, state, process, id, info.to_string());
            webhooks::post_last(shared, state, process, id);
            let server = &mut process.of(state).expect("the process").server;
            let mut gone = server.conversations.remove(&id).expect("the conversation");
            gone.deleted = Some(shared.elapsed());
            gone.works = false;
            server.deleted.push(gone);
            done
        }
        _ => panic!("the model of agent servers does not know {method} {}", request.path),
    }
}

impl Hosted {
    /// Sends a message. While an agent works, a message waits inside of the agent server until the agent's present step has ended; messages
    /// keep their order.
    async fn send(&self, message: &Value) -> Option<()> {
        let (turns, busy) = {
            let state = &mut *self.shared.lock();
            let busy = self.shared.between(state, "busy", &self.subject(), self.shared.settings.pace.busy);
            let conversation = self.conversation(state)?;
            (conversation.turns.clone(), conversation.works.then_some(busy))
        };
        let _turn = turns.lock().await;
        if let Some(busy) = busy {
            sleep(busy).await;
        }
        self.receive(&mut self.shared.lock(), message, false)
    }
}

/// Returns a page of a conversation's events, newest first.
fn search(conversation: &Conversation, request: &Request) -> Response<Bytes> {
    let order = query_value(request, "sort_order");
    assert_eq!(order.as_deref(), Some("TIMESTAMP_DESC"), "the newest events are requested");
    let limit = query_value(request, "limit").and_then(|limit| limit.parse::<usize>().ok()).expect("a limit");
    let first = query_value(request, "page_id");
    let from_first = |(id, _): &&(String, String)| first.as_ref().is_some_and(|first| first != id);
    let mut events = conversation.events.iter().rev().skip_while(from_first);
    let items: Vec<&str> = events.by_ref().take(limit).map(|(_, json)| json.as_str()).collect();
    let next = json!(events.next().map(|(id, _)| id));
    let page = format!(r#"{{"items":[{}],"next_page_id":{next}}}"#, items.join(","));
    raw(StatusCode::OK, "application/json", page.into())
}
