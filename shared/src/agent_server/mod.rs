//! The typed client of an agent server, the one place for its timeouts and errors.
//!
//! It speaks to versions 1.15 to 1.58: of the routes that changed between them, it uses the forms that both have.

pub mod conversation_body;

use std::fmt;
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderValue};
use reqwest::{Method, RequestBuilder, StatusCode};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::id;
use crate::outbound::Outbound;

const ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
const COMMAND_START_TIMEOUT: Duration = Duration::from_secs(15);
const LOOK_TIMEOUT: Duration = Duration::from_secs(15);
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(60);
const SKILLS_TIMEOUT: Duration = Duration::from_secs(60);
const HOOKS_TIMEOUT: Duration = Duration::from_secs(30);
/// Characters of a title that is found; agents find theirs within as many.
const GENERATED_TITLE: usize = 50;
/// An answer larger than this is not read on.
const ANSWER_LIMIT: usize = 16 * 1024 * 1024;
/// How much of an error's body is kept.
const ERROR_TEXT_LIMIT: usize = 2000;

/// What went wrong with a request to an agent server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No connection: it certainly did nothing.
    Unreachable,
    /// No answer in time: it may have done it.
    TimedOut,
    /// The connection broke before the whole answer was there: it may have done it.
    CutOff,
    /// It answered with an error, and this text.
    Status(StatusCode, String),
    /// It answered with success and something that is not what it should be.
    Malformed(String),
}

/// A failed request: what was asked for, and how it failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentServerError {
    /// `POST /api/conversations`
    pub request: String,
    /// How it failed.
    pub failure: Failure,
}

impl AgentServerError {
    /// A request whose answer makes no sense.
    #[must_use]
    pub fn malformed(request: &str, what: &str) -> Self {
        Self { request: request.to_owned(), failure: Failure::Malformed(what.to_owned()) }
    }

    /// Whether the same request may succeed later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match &self.failure {
            Failure::Unreachable | Failure::TimedOut | Failure::CutOff | Failure::Malformed(_) => true,
            Failure::Status(status, _) => {
                status.is_server_error()
                    || *status == StatusCode::TOO_MANY_REQUESTS
                    || *status == StatusCode::REQUEST_TIMEOUT
            }
        }
    }

    /// Whether it is unknown if the request had its effect.
    #[must_use]
    pub fn is_ambiguous(&self) -> bool {
        matches!(self.failure, Failure::TimedOut | Failure::CutOff | Failure::Malformed(_))
    }
}

impl fmt::Display for AgentServerError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let request = &self.request;
        match &self.failure {
            Failure::Unreachable => write!(out, "The agent server cannot be reached ({request})"),
            Failure::TimedOut => write!(out, "The agent server did not answer in time ({request})"),
            Failure::CutOff => write!(out, "The agent server's answer was cut off ({request})"),
            Failure::Status(status, text) if text.is_empty() => {
                write!(out, "The agent server answered {status} to {request}")
            }
            Failure::Status(status, text) => write!(out, "The agent server answered {status} to {request}: {text}"),
            Failure::Malformed(what) => write!(out, "The agent server's answer to {request} makes no sense: {what}"),
        }
    }
}

impl std::error::Error for AgentServerError {}

type Result<T> = std::result::Result<T, AgentServerError>;

/// What a finished command left behind.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandOutput {
    /// Its exit code; −1 when the agent server ended it because its time was up.
    pub exit_code: i64,
    /// Its output.
    pub stdout: String,
    /// Its error output.
    pub stderr: String,
}

/// A conversation as its agent server tells it; only what this product uses.
#[derive(Clone, Debug, Deserialize)]
pub struct ConversationInfo {
    /// Its id.
    pub id: Uuid,
    /// `idle`, `running`, …
    #[serde(default)]
    pub execution_status: Option<String>,
    /// Its title, if it has one.
    #[serde(default)]
    pub title: Option<String>,
    /// The last message that a user sent, if any.
    #[serde(default)]
    pub last_user_message_id: Option<String>,
    /// The agent; only its model is of interest.
    #[serde(default)]
    pub agent: Value,
}

/// What a skills request may name beside the project's folder.
#[derive(Clone, Debug, Default)]
pub struct SkillsQuery {
    /// The folder whose skills count as the project's.
    pub project_dir: String,
    /// The organisation's skills repository, in the agent server's form.
    pub org_config: Option<Value>,
    /// The sandbox's addresses, in the agent server's form.
    pub sandbox_config: Option<Value>,
}

/// A skill as the agent server lists it.
#[derive(Clone, Debug, Deserialize)]
pub struct SkillInfo {
    /// Its name, by which later ones replace earlier ones.
    pub name: String,
    /// Its text.
    pub content: String,
    /// Words that call it up; task skills start with `/`.
    #[serde(default)]
    pub triggers: Vec<String>,
    /// Where it came from.
    #[serde(default)]
    pub source: Option<String>,
    /// What it is for.
    #[serde(default)]
    pub description: Option<String>,
    /// Whether it is in the format of agentskills.io.
    #[serde(default)]
    pub is_agentskills_format: bool,
}

/// A page of an agent server's events.
#[derive(Debug, Deserialize)]
pub struct EventPage {
    /// The events.
    pub items: Vec<Box<RawValue>>,
    /// Where the next page starts, if there is one.
    #[serde(default)]
    pub next_page_id: Option<String>,
}

/// One agent server.
#[derive(Clone, Debug)]
pub struct AgentServer {
    http: Outbound,
    url: String,
    key: Option<SecretString>,
}

impl AgentServer {
    /// The agent server at `url`; `key` is its session key.
    #[must_use]
    pub fn new(http: Outbound, url: &str, key: Option<SecretString>) -> Self {
        Self { http, url: url.trim_end_matches('/').to_owned(), key }
    }

    /// `GET /alive`: whether it answers.
    pub async fn is_alive(&self) -> bool {
        let Ok(request) = self.http.request(Method::GET, &format!("{}/alive", self.url)) else { return false };
        let asked = request.timeout(ALIVE_TIMEOUT).send().await;
        asked.is_ok_and(|answer| answer.status().is_success())
    }

    /// Starts a shell command; returns the id under which its output is found.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn start_command(&self, command: &str, cwd: &str, timeout: Duration) -> Result<String> {
        #[derive(Deserialize)]
        struct Started {
            id: String,
        }
        let body = json!({"command": command, "timeout": timeout.as_secs(), "cwd": cwd});
        let started: Started = self
            .call(Method::POST, "/api/bash/start_bash_command", COMMAND_START_TIMEOUT, |request| request.json(&body))
            .await?;
        Ok(started.id)
    }

    /// The output of a command, or `None` while it runs.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn command_output(&self, command_id: &str) -> Result<Option<CommandOutput>> {
        #[derive(Deserialize)]
        struct Page {
            items: Vec<Piece>,
            #[serde(default)]
            next_page_id: Option<String>,
        }
        #[derive(Deserialize)]
        struct Piece {
            exit_code: Option<i64>,
            stdout: Option<String>,
            stderr: Option<String>,
            #[serde(default)]
            order: i64,
        }
        let mut pieces = Vec::new();
        let mut page_id: Option<String> = None;
        loop {
            let page: Page = self
                .call(Method::GET, "/api/bash/bash_events/search", LOOK_TIMEOUT, |request| {
                    request
                        .query(&[
                            ("command_id__eq", command_id),
                            ("sort_order", "TIMESTAMP"),
                            ("limit", "100"),
                            ("kind__eq", "BashOutput"),
                        ])
                        .query(&page_id.as_ref().map(|id| [("page_id", id)]))
                })
                .await?;
            pieces.extend(page.items);
            match page.next_page_id {
                Some(next) if page_id.as_ref() != Some(&next) => page_id = Some(next),
                _ => break,
            }
        }
        pieces.sort_by_key(|piece| piece.order);
        let Some(exit_code) = pieces.iter().find_map(|piece| piece.exit_code) else { return Ok(None) };
        Ok(Some(CommandOutput {
            exit_code,
            stdout: pieces.iter().filter_map(|piece| piece.stdout.as_deref()).collect(),
            stderr: pieces.iter().filter_map(|piece| piece.stderr.as_deref()).collect(),
        }))
    }

    /// Runs a short command and waits for its end.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn run_command(&self, command: &str, timeout: Duration) -> Result<CommandOutput> {
        #[derive(Deserialize)]
        struct Output {
            exit_code: Option<i64>,
            stdout: Option<String>,
            stderr: Option<String>,
        }
        let body = json!({"command": command, "timeout": timeout.as_secs().max(1)});
        let output: Output = self
            .call(Method::POST, "/api/bash/execute_bash_command", timeout + COMMAND_START_TIMEOUT, |request| {
                request.json(&body)
            })
            .await?;
        Ok(CommandOutput {
            exit_code: output.exit_code.unwrap_or(-1),
            stdout: output.stdout.unwrap_or_default(),
            stderr: output.stderr.unwrap_or_default(),
        })
    }

    /// The bytes of the file at an absolute path, or `None` when it has more than `limit`.
    ///
    /// # Errors
    /// See [`Failure`]; 404 when there is no such file.
    pub async fn download(&self, path: &str, limit: usize) -> Result<Option<Vec<u8>>> {
        let route = "/api/file/download";
        let answer = self.send(Method::GET, route, UPLOAD_TIMEOUT, |request| request.query(&[("path", path)])).await?;
        let (status, body) = answer.read(limit).await?;
        match body {
            Body::TooLarge => Ok(None),
            Body::Whole(body) if status.is_success() => Ok(Some(body)),
            Body::Whole(body) => Err(fail(&Method::GET, route, Failure::Status(status, error_text(&body)))),
        }
    }

    /// What git says has changed in the repository that holds an absolute path: the agent server's own JSON.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn git_changes(&self, path: &str, reference: Option<&str>, timeout: Duration) -> Result<Value> {
        self.git("/api/git/changes", path, reference, timeout).await
    }

    /// How the file at an absolute path differs from what was committed: the agent server's own JSON.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn git_diff(&self, path: &str, reference: Option<&str>, timeout: Duration) -> Result<Value> {
        self.git("/api/git/diff", path, reference, timeout).await
    }

    async fn git(&self, route: &str, path: &str, reference: Option<&str>, timeout: Duration) -> Result<Value> {
        self.call(Method::GET, route, timeout, |request| {
            request.query(&[("path", path)]).query(&reference.map(|reference| [("ref", reference)]))
        })
        .await
    }

    /// Writes a file at an absolute path.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn upload(&self, path: &str, content: &SecretString) -> Result<()> {
        let content = content.expose_secret().to_owned();
        let _done: Value = self
            .call(Method::POST, "/api/file/upload", UPLOAD_TIMEOUT, |request| {
                let part = reqwest::multipart::Part::text(content.clone()).file_name("file");
                request.query(&[("path", path)]).multipart(reqwest::multipart::Form::new().part("file", part))
            })
            .await?;
        Ok(())
    }

    /// All skills that apply to a project, merged.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn skills(&self, query: &SkillsQuery) -> Result<Vec<SkillInfo>> {
        #[derive(Deserialize)]
        struct Found {
            skills: Vec<Value>,
        }
        let body = json!({
            "load_public": true, "load_user": true, "load_project": true, "load_org": true,
            "project_dir": query.project_dir, "org_config": query.org_config, "sandbox_config": query.sandbox_config,
        });
        let found: Found =
            self.call(Method::POST, "/api/skills", SKILLS_TIMEOUT, |request| request.json(&body)).await?;
        Ok(found
            .skills
            .into_iter()
            .filter_map(|skill| {
                serde_json::from_value(skill)
                    .inspect_err(|error| tracing::warn!(%error, "agent_server.skill_not_understood"))
                    .ok()
            })
            .collect())
    }

    /// The hooks of a project in the agent server's own form, or `None`.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn hooks(&self, project_dir: &str) -> Result<Option<Value>> {
        #[derive(Deserialize)]
        struct Found {
            hook_config: Option<Value>,
        }
        let body = json!({"project_dir": project_dir});
        let found: Found = self.call(Method::POST, "/api/hooks", HOOKS_TIMEOUT, |request| request.json(&body)).await?;
        Ok(found.hook_config)
    }

    /// Creates a conversation, or finds the one with the body's id, which then stays as it is.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn create_conversation(&self, body: &Value, timeout: Duration) -> Result<ConversationInfo> {
        self.call(Method::POST, "/api/conversations", timeout, |request| request.json(body)).await
    }

    /// Conversations by id, in the same order, `None` for those that it does not have.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn conversations(&self, ids: &[Uuid], timeout: Duration) -> Result<Vec<Option<ConversationInfo>>> {
        let ids: Vec<(&str, String)> = ids.iter().map(|id| ("ids", id::dashed(*id))).collect();
        self.call(Method::GET, "/api/conversations", timeout, |request| request.query(&ids)).await
    }

    /// A conversation with all that the agent server tells of it, `None` if it does not have it.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn whole_conversation(&self, id: Uuid, timeout: Duration) -> Result<Option<Value>> {
        let ids = [("ids", id::dashed(id))];
        let mut found: Vec<Option<Value>> =
            self.call(Method::GET, "/api/conversations", timeout, |request| request.query(&ids)).await?;
        Ok(found.pop().flatten())
    }

    /// Sends a message to a conversation; `run` lets the agent answer it.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn send_message(&self, conversation: Uuid, role: &str, content: &Value, run: bool) -> Result<()> {
        let path = format!("/api/conversations/{}/events", id::dashed(conversation));
        let body = json!({"role": role, "content": content, "run": run});
        let _done: Value = self.call(Method::POST, &path, HOOKS_TIMEOUT, |request| request.json(&body)).await?;
        Ok(())
    }

    /// Gives a conversation a title; it takes up to 200 characters.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn set_title(&self, conversation: Uuid, title: &str, timeout: Duration) -> Result<()> {
        let path = format!("/api/conversations/{}", id::dashed(conversation));
        let body = json!({"title": title});
        let _done: Value = self.call(Method::PATCH, &path, timeout, |request| request.json(&body)).await?;
        Ok(())
    }

    /// Has the agent's model find a title for a conversation; the agent server itself does not take it on. `None` where it cannot be
    /// asked for one, as newer versions cannot, or has no such conversation.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn generate_title(&self, conversation: Uuid, timeout: Duration) -> Result<Option<String>> {
        #[derive(Deserialize)]
        struct Generated {
            title: String,
        }
        let path = format!("/api/conversations/{}/generate_title", id::dashed(conversation));
        let body = json!({"max_length": GENERATED_TITLE});
        match self.call::<Generated>(Method::POST, &path, timeout, |request| request.json(&body)).await {
            Ok(generated) => Ok(Some(generated.title)),
            Err(AgentServerError { failure: Failure::Status(StatusCode::NOT_FOUND, _), .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Ends a conversation and removes what the agent server has of it.
    ///
    /// # Errors
    /// See [`Failure`]; 404 when it has no such conversation.
    pub async fn delete_conversation(&self, conversation: Uuid, timeout: Duration) -> Result<()> {
        let path = format!("/api/conversations/{}", id::dashed(conversation));
        let _done: Value = self.call(Method::DELETE, &path, timeout, |request| request).await?;
        Ok(())
    }

    /// Lets the conversation's model judge the risk of its own actions.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn set_llm_security_analyzer(&self, conversation: Uuid) -> Result<()> {
        let path = format!("/api/conversations/{}/security_analyzer", id::dashed(conversation));
        let body = json!({"security_analyzer": {"kind": "LLMSecurityAnalyzer"}});
        let _done: Value = self.call(Method::POST, &path, HOOKS_TIMEOUT, |request| request.json(&body)).await?;
        Ok(())
    }

    /// A page of a conversation's events, newest first, each as it came; `page_id` is the earlier page's `next_page_id`.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn newest_events(&self, conversation: Uuid, page_id: Option<&str>, limit: usize) -> Result<EventPage> {
        let path = format!("/api/conversations/{}/events/search", id::dashed(conversation));
        self.call(Method::GET, &path, LOOK_TIMEOUT, |request| {
            let request = request.query(&[("sort_order", "TIMESTAMP_DESC"), ("limit", &limit.to_string())]);
            request.query(&page_id.map(|id| [("page_id", id)]))
        })
        .await
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        timeout: Duration,
        fill: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> Result<T> {
        let (status, body) = self.send(method.clone(), path, timeout, fill).await?.read(ANSWER_LIMIT).await?;
        match body {
            Body::TooLarge => {
                Err(fail(&method, path, Failure::Malformed(format!("it is longer than {ANSWER_LIMIT} bytes"))))
            }
            Body::Whole(body) if status.is_success() => serde_json::from_slice(&body)
                .map_err(|error| fail(&method, path, Failure::Malformed(error.to_string()))),
            Body::Whole(body) => Err(fail(&method, path, Failure::Status(status, error_text(&body)))),
        }
    }

    /// Makes a request that somebody else thought of, and gives the answer as it is: status, content type, body; `None` where the
    /// body is larger than `limit`.
    ///
    /// # Errors
    /// See [`Failure`]; a status is none.
    pub async fn pass_on(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        limit: usize,
        timeout: Duration,
    ) -> Result<Option<(StatusCode, Option<HeaderValue>, Vec<u8>)>> {
        let fill = |request: RequestBuilder| match body {
            Some(body) => request.json(body),
            None => request,
        };
        let answer = self.send(method, path, timeout, fill).await?;
        let kind = answer.response.headers().get(CONTENT_TYPE).cloned();
        Ok(match answer.read(limit).await? {
            (status, Body::Whole(body)) => Some((status, kind, body)),
            (_, Body::TooLarge) => None,
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        timeout: Duration,
        fill: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> Result<Answer> {
        let request = self.http.request(method.clone(), &format!("{}{path}", self.url));
        let request = request.map_err(|error| fail(&method, path, transport_failure(&error)))?;
        let mut request = fill(request).timeout(timeout);
        if let Some(key) = &self.key {
            request = request.header("X-Session-API-Key", key.expose_secret());
        }
        let response = request.send().await;
        let response = response.map_err(|error| fail(&method, path, transport_failure(&error)))?;
        Ok(Answer { response, name: format!("{method} {path}") })
    }
}

/// An answer whose body is still to come.
struct Answer {
    response: reqwest::Response,
    name: String,
}

/// A body, unless it was too large to be read on.
enum Body {
    Whole(Vec<u8>),
    TooLarge,
}

impl Answer {
    async fn read(mut self, limit: usize) -> Result<(StatusCode, Body)> {
        let status = self.response.status();
        let mut body = Vec::new();
        loop {
            match self.response.chunk().await {
                Ok(Some(chunk)) if body.len() + chunk.len() > limit => return Ok((status, Body::TooLarge)),
                Ok(Some(chunk)) => body.extend_from_slice(&chunk),
                Ok(None) => return Ok((status, Body::Whole(body))),
                Err(error) => {
                    return Err(AgentServerError { request: self.name, failure: transport_failure(&error) });
                }
            }
        }
    }
}

fn fail(method: &Method, path: &str, failure: Failure) -> AgentServerError {
    AgentServerError { request: format!("{method} {path}"), failure }
}

fn transport_failure(error: &reqwest::Error) -> Failure {
    if error.is_timeout() {
        Failure::TimedOut
    } else if error.is_connect() || error.is_builder() {
        Failure::Unreachable
    } else {
        Failure::CutOff
    }
}

/// The agent server's own words: `exception` says more than `detail` where both are there.
fn error_text(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let told = serde_json::from_slice::<Value>(body).ok().and_then(|json| {
        let said = json.get("exception").or_else(|| json.get("detail"))?;
        Some(said.as_str().map_or_else(|| said.to_string(), ToOwned::to_owned))
    });
    told.unwrap_or_else(|| text.into_owned()).trim().chars().take(ERROR_TEXT_LIMIT).collect()
}
