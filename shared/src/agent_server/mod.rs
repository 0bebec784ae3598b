//! HTTP client of the agent server API, with its timeouts, size limits, retry classification and errors.
//!
//! It supports versions 1.15 to 1.58: where a route has changed between them, it uses the form that both have.
//!
//! A sandbox runs unreviewed code, so every response is untrusted. Each request limits the bytes of its response and reads them into types
//! whose memory use is proportional to those bytes: lists have a maximum length ([`bounded`]), and values that are only passed on stay
//! text. Error texts are truncated and secrets are masked before they leave this module.

pub mod bounded;
mod error_text;
mod mistake;
pub mod version;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderValue};
use reqwest::{Method, RequestBuilder, StatusCode};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::error::Category;
use serde_json::value::RawValue;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use self::bounded::Bounded;
pub use self::mistake::Mistake;
use self::version::AgentServerVersion;
use crate::error::Fault;
use crate::http_client::{self, Answer, Cause, HttpClient, HttpError};
use crate::id;
use crate::mask;

/// The header with the session key of a sandbox, both in requests to its agent server and in requests from the sandbox to this API.
pub const SESSION_API_KEY: &str = "x-session-api-key";

const ALIVE_TIMEOUT: Duration = Duration::from_secs(5);
const COMMAND_START_TIMEOUT: Duration = Duration::from_secs(15);
const LOOK_TIMEOUT: Duration = Duration::from_secs(15);
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(60);
const SKILLS_TIMEOUT: Duration = Duration::from_secs(60);
const HOOKS_TIMEOUT: Duration = Duration::from_secs(30);
/// The maximum length of a generated title in characters; the agent server generates its own titles with the same limit.
const GENERATED_TITLE: usize = 50;
const KIB: usize = 1024;
const MIB: usize = 1024 * KIB;
/// The default limit of a response in bytes.
const ANSWER_LIMIT: usize = MIB;
/// The response limit for a short command's output in JSON: a list of files has half a mebibyte of names.
const SHORT_COMMAND_LIMIT: usize = 2 * MIB;
/// The response limit for a list of skills with their texts.
const SKILLS_LIMIT: usize = 4 * MIB;
/// The response limit for one conversation: it repeats its initial skills, and grows with the requests to its model.
const CONVERSATION_LIMIT: usize = 8 * MIB;
/// The response limit for several conversations, and for a page of events.
const LIST_LIMIT: usize = 16 * MIB;
/// The maximum size of an uploaded file that is searched for secrets as JSON; settings are much smaller.
const JSON_FILE_LIMIT: usize = 4 * MIB;
/// The limit of an error response; the rest is cut off.
const ERROR_LIMIT: usize = 64 * KIB;
/// The maximum number of pages of a command's output, and the maximum size of all pages in bytes. The commands of a start print 32 KiB at
/// most.
const OUTPUT_PAGES: usize = 20;
const OUTPUT_LIMIT: usize = MIB;
/// The maximum number of output pieces per page: twice the requested number.
const PIECES: usize = 200;
/// The number of commands among which the id of a command is looked for, and the response limit for them. Those of starts have about 25 KiB.
const LAST_COMMANDS: &str = "20";
const COMMANDS_LIMIT: usize = 2 * MIB;
/// The maximum number of skills in a list, and of triggers per skill.
const SKILLS: usize = 2000;
const TRIGGERS: usize = 1000;
/// The maximum number of conversations in a response; requests are for 99 at most.
const CONVERSATIONS: usize = 100;
/// The maximum number of model usages in the metrics of a conversation.
const USAGES: usize = 1000;
/// The maximum size of a conversation's part in bytes, including its tags, which are the longest.
const PART_LIMIT: usize = 64 * KIB;
/// The maximum number of events per page; requests are for 50 at most.
const EVENTS: usize = 100;
/// The maximum length in bytes of an id that the agent server generates: of a command, of a page.
const ID_LENGTH: usize = 256;
/// The maximum length in bytes of a title and of an execution status. Longer values are ignored.
const TITLE_LENGTH: usize = 1000;
const STATUS_LENGTH: usize = 64;
/// The maximum length of a version in bytes. Longer values are ignored.
const VERSION_LENGTH: usize = 128;

/// The ways in which a request to an agent server fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The connection failed: the request certainly had no effect.
    Unreachable,
    /// The request timed out: it may have had its effect.
    TimedOut,
    /// The connection broke before the response was complete: the request may have had its effect.
    CutOff,
    /// The agent server returned an error status, with this text.
    Status(StatusCode, String),
    /// The agent server returned a success status and an invalid response.
    Malformed(String),
    /// The response has more than this many bytes. The request may have had its effect.
    TooLarge(usize),
}

/// How often a failed request should be retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// Retry often: the connection failed, or the server is busy, which is temporary.
    Often,
    /// Retry a few times: the agent server has returned an error, which may be temporary but is probably permanent.
    Few,
    /// Do not retry: the same request fails again.
    Never,
}

/// The error of a failed request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentServerError {
    /// The method and the path, such as `POST /api/conversations`.
    pub request: String,
    pub failure: Failure,
}

impl AgentServerError {
    /// Creates the error for an invalid response.
    #[must_use]
    pub fn malformed(request: &str, what: &str) -> Self {
        Self { request: request.to_owned(), failure: Failure::Malformed(what.to_owned()) }
    }

    /// Returns how often the same request should be retried.
    ///
    /// 429, 502, 503 and 504 come from a busy server, or from a proxy in front of a sandbox that is starting; 408 is a timeout. An agent
    /// server returns every other 5xx for an exception in its own code, while it is alive: in most cases it raises the same exception
    /// again. 409 has several causes, some of which are temporary.
    #[must_use]
    pub fn retry(&self) -> Retry {
        match &self.failure {
            Failure::Unreachable
            | Failure::TimedOut
            | Failure::CutOff
            | Failure::Malformed(_)
            | Failure::Status(
                StatusCode::REQUEST_TIMEOUT
                | StatusCode::TOO_MANY_REQUESTS
                | StatusCode::BAD_GATEWAY
                | StatusCode::SERVICE_UNAVAILABLE
                | StatusCode::GATEWAY_TIMEOUT,
                _,
            ) => Retry::Often,
            Failure::Status(status, _) if status.is_server_error() || *status == StatusCode::CONFLICT => {
                if self.mistake().is_some_and(|mistake| mistake.is_permanent) { Retry::Never } else { Retry::Few }
            }
            Failure::TooLarge(_) | Failure::Status(..) => Retry::Never,
        }
    }

    /// Returns the cause of the error if the response matches a known one.
    #[must_use]
    pub fn mistake(&self) -> Option<Mistake> {
        match &self.failure {
            Failure::Status(StatusCode::UNPROCESSABLE_ENTITY, text) => mistake::of_violations(text),
            Failure::Status(StatusCode::INTERNAL_SERVER_ERROR, text) => mistake::of_exception(text),
            _ => None,
        }
    }

    /// Returns who can correct the error: the operator, unless the response matches a user's mistake.
    #[must_use]
    pub fn fault(&self) -> Fault {
        self.mistake().map_or(Fault::Server, |mistake| mistake.fault)
    }

    /// Returns a message for the user: the advice if the cause is known, then the agent server's own message.
    #[must_use]
    pub fn explanation(&self) -> String {
        match self.mistake() {
            Some(Mistake { advice, .. }) => format!("{advice}. {self}"),
            None => self.to_string(),
        }
    }

    /// Returns whether the request may or may not have had its effect.
    #[must_use]
    pub fn is_ambiguous(&self) -> bool {
        matches!(self.failure, Failure::TimedOut | Failure::CutOff | Failure::Malformed(_) | Failure::TooLarge(_))
    }
}

impl fmt::Display for AgentServerError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let request = &self.request;
        match &self.failure {
            Failure::Unreachable => write!(out, "The agent server cannot be reached ({request})"),
            Failure::TimedOut => write!(out, "The agent server did not respond in time ({request})"),
            Failure::CutOff => write!(out, "The agent server's answer was cut off ({request})"),
            Failure::Status(status, text) if text.is_empty() => {
                write!(out, "The agent server answered {status} to {request}")
            }
            Failure::Status(status, text) => write!(out, "The agent server answered {status} to {request}: {text}"),
            Failure::Malformed(what) => write!(out, "The agent server's answer to {request} makes no sense: {what}"),
            Failure::TooLarge(limit) => {
                write!(out, "The agent server's answer to {request} is longer than {limit} bytes")
            }
        }
    }
}

impl std::error::Error for AgentServerError {}

type Result<T> = std::result::Result<T, AgentServerError>;

/// The result of a finished command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandOutput {
    /// The exit code; −1 when the agent server terminated the command because of its timeout.
    pub exit_code: i64,
    pub stdout: String,
    pub stderr: String,
}

/// The response to a request that waits for the end of its command.
#[derive(Deserialize)]
struct ExecutedCommand {
    exit_code: Option<i64>,
    stdout: Option<String>,
    stderr: Option<String>,
}

impl From<ExecutedCommand> for CommandOutput {
    fn from(executed: ExecutedCommand) -> Self {
        Self {
            exit_code: executed.exit_code.unwrap_or(-1),
            stdout: executed.stdout.unwrap_or_default(),
            stderr: executed.stderr.unwrap_or_default(),
        }
    }
}

/// A conversation in the agent server's response, reduced to the fields that this product uses.
#[derive(Clone, Debug, Deserialize)]
pub struct ConversationInfo {
    pub id: Uuid,
    /// The execution status: `idle`, `running`, …
    #[serde(default, deserialize_with = "bounded::short::<_, STATUS_LENGTH>")]
    pub execution_status: Option<String>,
    #[serde(default, deserialize_with = "bounded::short::<_, TITLE_LENGTH>")]
    pub title: Option<String>,
    /// The id of the last message that a user sent, if any.
    #[serde(default)]
    pub last_user_message_id: Option<String>,
}

/// The fields of a conversation that [`AgentServer::whole_conversation`] returns. All others, such as skills and the requests to the model,
/// are skipped.
#[derive(Deserialize)]
struct WholeConversation {
    #[serde(default)]
    execution_status: Option<Box<RawValue>>,
    #[serde(default)]
    title: Option<Box<RawValue>>,
    #[serde(default)]
    updated_at: Option<Box<RawValue>>,
    #[serde(default)]
    workspace: Option<Workspace>,
    #[serde(default)]
    agent: Option<Agent>,
    #[serde(default)]
    stats: Option<Stats>,
    #[serde(default)]
    tags: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct Workspace {
    #[serde(default)]
    working_dir: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct Agent {
    #[serde(default)]
    llm: Option<Llm>,
}

#[derive(Deserialize)]
struct Llm {
    #[serde(default)]
    model: Option<Box<RawValue>>,
    #[serde(default)]
    usage_id: Option<Box<RawValue>>,
}

#[derive(Deserialize)]
struct Stats {
    /// Metrics by usage: the agent, its condenser, and each profile that the conversation was switched to.
    #[serde(default, deserialize_with = "bounded::map::<_, _, USAGES>")]
    usage_to_metrics: BTreeMap<String, AgentMetrics>,
}

#[derive(Deserialize)]
struct AgentMetrics {
    #[serde(default)]
    accumulated_cost: Option<Box<RawValue>>,
    #[serde(default)]
    max_budget_per_task: Option<Box<RawValue>>,
    #[serde(default)]
    accumulated_token_usage: Option<Box<RawValue>>,
}

impl WholeConversation {
    fn into_json(self) -> Value {
        // A valid part is never longer than the limit.
        let part = |raw: Option<Box<RawValue>>| {
            let short = raw.filter(|raw| raw.get().len() <= PART_LIMIT);
            short.and_then(|raw| serde_json::from_str::<Value>(raw.get()).ok()).unwrap_or_default()
        };
        let stats = self.stats.map(|stats| {
            let usages: Map<String, Value> = stats
                .usage_to_metrics
                .into_iter()
                .map(|(usage, metrics)| {
                    let metrics = json!({
                        "accumulated_cost": part(metrics.accumulated_cost),
                        "max_budget_per_task": part(metrics.max_budget_per_task),
                        "accumulated_token_usage": part(metrics.accumulated_token_usage),
                    });
                    (usage, metrics)
                })
                .collect();
            json!({"usage_to_metrics": usages})
        });
        let llm = self.agent.and_then(|agent| agent.llm);
        let (model, usage_id) = llm.map_or((None, None), |llm| (llm.model, llm.usage_id));
        json!({
            "execution_status": part(self.execution_status),
            "title": part(self.title),
            "updated_at": part(self.updated_at),
            "workspace": {"working_dir": part(self.workspace.and_then(|workspace| workspace.working_dir))},
            "agent": {"llm": {"model": part(model), "usage_id": part(usage_id)}},
            "stats": stats,
            "tags": part(self.tags),
        })
    }
}

/// The sources of skills.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SkillSources {
    /// Public skills, the user's skills in the sandbox, and those of the project.
    #[default]
    All,
    /// All but those of the project.
    WithoutProject,
    /// Those of the project alone.
    Project,
}

/// The parameters of a skills request.
#[derive(Clone, Debug, Default)]
pub struct SkillsQuery {
    pub sources: SkillSources,
    /// The folder with the project's skills.
    pub project_dir: String,
    /// The sandbox's exposed URLs in the agent server's format.
    pub sandbox_config: Option<Value>,
}

/// A skill in the agent server's response.
#[derive(Clone, Debug, Deserialize)]
pub struct SkillInfo {
    /// The name. A later skill replaces an earlier one with the same name.
    pub name: String,
    /// The text of the skill.
    pub content: String,
    /// Words that activate the skill; task skills start with `/`.
    #[serde(default, deserialize_with = "bounded::list::<_, _, TRIGGERS>")]
    pub triggers: Vec<String>,
    #[serde(default)]
    pub source: Option<String>,
    #[serde(default)]
    pub description: Option<String>,
    /// Whether the skill is in the format of agentskills.io.
    #[serde(default)]
    pub is_agentskills_format: bool,
}

/// A page of an agent server's events (pagination by page token).
#[derive(Debug, Deserialize)]
pub struct EventPage {
    #[serde(deserialize_with = "bounded::list::<_, _, EVENTS>")]
    pub items: Vec<Box<RawValue>>,
    /// The token of the next page, if there is one.
    #[serde(default, deserialize_with = "bounded::text::<_, ID_LENGTH>")]
    pub next_page_id: Option<String>,
}

/// The fields of `GET /server_info` that this product uses.
#[derive(Deserialize)]
struct ServerInfo {
    #[serde(default, deserialize_with = "bounded::short::<_, VERSION_LENGTH>")]
    version: Option<String>,
    #[serde(default)]
    uptime: Option<f64>,
}

/// A client for one agent server.
#[derive(Clone, Debug)]
pub struct AgentServer {
    http: HttpClient,
    url: String,
    key: Option<SecretString>,
}

impl AgentServer {
    /// Creates a client for the agent server at `url`; `key` is its session key.
    #[must_use]
    pub fn new(http: HttpClient, url: &str, key: Option<SecretString>) -> Self {
        Self { http, url: url.trim_end_matches('/').to_owned(), key }
    }

    /// Its URL, without a slash at the end.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// `GET /alive`: returns whether the agent server responds.
    pub async fn is_alive(&self) -> bool {
        self.http.succeeds(&format!("{}/alive", self.url), ALIVE_TIMEOUT).await
    }

    /// `GET /server_info`: returns the version, or `None` if it is missing or cannot be parsed.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn version(&self) -> Result<Option<AgentServerVersion>> {
        Ok(self.info().await?.version.and_then(|version| version.parse().ok()))
    }

    /// `GET /server_info`: returns the time since the agent server started, in whole seconds, or `None` if it is missing.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn uptime(&self) -> Result<Option<Duration>> {
        Ok(self.info().await?.uptime.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()))
    }

    async fn info(&self) -> Result<ServerInfo> {
        self.call(&Call::get("/server_info").within(ALIVE_TIMEOUT)).await
    }

    /// `GET /server_info`: returns how long neither an agent nor a client has used the agent server, or `None` if it does not report that.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn idle_time(&self) -> Result<Option<Duration>> {
        #[derive(Deserialize)]
        struct Info {
            #[serde(default)]
            idle_time: Option<f64>,
        }
        let info: Info = self.call(&Call::get("/server_info").within(ALIVE_TIMEOUT)).await?;
        Ok(info.idle_time.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()))
    }

    /// Starts a shell command; returns the command's id, for [`AgentServer::command_output`].
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn start_command(&self, command: &str, cwd: &str, timeout: Duration) -> Result<String> {
        #[derive(Deserialize)]
        struct Started {
            #[serde(deserialize_with = "bounded::text::<_, ID_LENGTH>")]
            id: Option<String>,
        }
        let body = json!({"command": command, "timeout": timeout.as_secs(), "cwd": cwd});
        let call = Call::post("/api/bash/start_bash_command", &body).within(COMMAND_START_TIMEOUT);
        let started: Started = self.call(&call).await?;
        started.id.ok_or_else(|| call.fail(Failure::Malformed("there is no id".to_owned())))
    }

    /// Runs a shell command, and waits at most `wait` for its end. The command may be sent twice, so it must be idempotent.
    ///
    /// # Errors
    /// See [`Failure`]. If the error is ambiguous the command may still run, and [`AgentServer::command_id`] finds it.
    pub async fn execute_command(
        &self,
        command: &str,
        cwd: &str,
        timeout: Duration,
        wait: Duration,
    ) -> Result<CommandOutput> {
        let body = json!({"command": command, "timeout": timeout.as_secs(), "cwd": cwd});
        let call = Call::post("/api/bash/execute_bash_command", &body).within(wait).at_most(SHORT_COMMAND_LIMIT);
        Ok(self.call::<ExecutedCommand>(&call.repeatable()).await?.into())
    }

    /// Returns the id of the newest command with exactly this text, if it is among the last ones. Commands of other clients are in the same
    /// list, and a list of them that is too long counts as one without this command.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn command_id(&self, command: &str) -> Result<Option<String>> {
        #[derive(Deserialize)]
        struct Page {
            items: Bounded<Started, PIECES>,
        }
        #[derive(Deserialize)]
        struct Started {
            #[serde(default, deserialize_with = "bounded::text::<_, ID_LENGTH>")]
            id: Option<String>,
            command: Option<String>,
        }
        let call = Call::get("/api/bash/bash_events/search").within(LOOK_TIMEOUT).at_most(COMMANDS_LIMIT);
        let found = self.call_with(&call, |request| {
            request.query(&[("sort_order", "TIMESTAMP_DESC"), ("limit", LAST_COMMANDS), ("kind__eq", "BashCommand")])
        });
        let (page, _): (Page, usize) = match found.await {
            Err(AgentServerError { failure: Failure::TooLarge(_), .. }) => return Ok(None),
            found => found?,
        };
        Ok(page
            .items
            .0
            .into_iter()
            .find(|started| started.command.as_deref() == Some(command))
            .and_then(|found| found.id))
    }

    /// Returns the output of a command, or `None` while the command is running.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn command_output(&self, command_id: &str) -> Result<Option<CommandOutput>> {
        #[derive(Deserialize)]
        struct Page {
            items: Bounded<Piece, PIECES>,
            #[serde(default, deserialize_with = "bounded::text::<_, ID_LENGTH>")]
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
        let call = Call::get("/api/bash/bash_events/search").within(LOOK_TIMEOUT);
        let mut pieces = Vec::new();
        let mut page_id: Option<String> = None;
        let mut left = OUTPUT_LIMIT;
        for page_number in 1.. {
            // A process in the sandbox can add any number of events to the command's log.
            if page_number > OUTPUT_PAGES {
                return Err(call.fail(Failure::TooLarge(OUTPUT_LIMIT)));
            }
            let asked = call.clone().at_most(left);
            let (page, length): (Page, usize) = self
                .call_with(&asked, |request| {
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
            left = left.saturating_sub(length);
            pieces.extend(page.items.0);
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

    /// Runs a short read-only command and waits for its end. The command may run twice, because the request is retried.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn run_command(&self, command: &str, timeout: Duration) -> Result<CommandOutput> {
        let body = json!({"command": command, "timeout": timeout.as_secs().max(1)});
        let call =
            Call::post("/api/bash/execute_bash_command", &body).within(timeout + COMMAND_START_TIMEOUT).repeatable();
        Ok(self.call::<ExecutedCommand>(&call.at_most(SHORT_COMMAND_LIMIT)).await?.into())
    }

    /// Returns the content of the file at an absolute path, or `None` when it has more than `limit` bytes.
    ///
    /// # Errors
    /// See [`Failure`]; 404 when there is no such file.
    pub async fn download(&self, path: &str, limit: usize) -> Result<Option<Vec<u8>>> {
        let call = Call::get("/api/file/download").within(UPLOAD_TIMEOUT).at_most(limit);
        match self.read(&call, |request| request.query(&[("path", path)])).await {
            Ok(body) => Ok(Some(body)),
            Err(AgentServerError { failure: Failure::TooLarge(_), .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a file at an absolute path.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn upload(&self, path: &str, content: &SecretString) -> Result<()> {
        let content = content.expose_secret();
        let call = Call { secrets: secrets_of_file(content), ..Call::new(Method::POST, "/api/file/upload") };
        let call = call.within(UPLOAD_TIMEOUT);
        let done = self.call_with::<IgnoredAny>(&call, |request| {
            let part = reqwest::multipart::Part::text(content.to_owned()).file_name("file");
            request.query(&[("path", path)]).multipart(reqwest::multipart::Form::new().part("file", part))
        });
        done.await.map(drop)
    }

    /// Returns the skills that apply to a project, merged.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn skills(&self, query: &SkillsQuery) -> Result<Vec<SkillInfo>> {
        #[derive(Deserialize)]
        struct Found {
            skills: Bounded<Box<RawValue>, SKILLS>,
        }
        // The body names no organization's skills repository: the name of that field depends on the version.
        let base = query.sources != SkillSources::Project;
        let body = json!({
            "load_public": base, "load_user": base, "load_project": query.sources != SkillSources::WithoutProject,
            "load_org": false, "project_dir": query.project_dir,
            "sandbox_config": query.sandbox_config.as_ref().filter(|_| base),
        });
        let call = Call::post("/api/skills", &body).within(SKILLS_TIMEOUT).at_most(SKILLS_LIMIT).repeatable();
        let found: Found = self.call(&call).await?;
        let total = found.skills.0.len();
        let skills: Vec<SkillInfo> =
            found.skills.0.iter().filter_map(|skill| serde_json::from_str(skill.get()).ok()).collect();
        if skills.len() < total {
            // Log one line only, because the sandbox controls the number of skills.
            tracing::warn!(unreadable = total - skills.len(), total, "agent_server.skills_unreadable");
        }
        Ok(skills)
    }

    /// Returns the hooks of a project in the agent server's format, or `None`.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn hooks(&self, project_dir: &str) -> Result<Option<Value>> {
        #[derive(Deserialize)]
        struct Found {
            hook_config: Option<Value>,
        }
        let body = json!({"project_dir": project_dir});
        let found: Found = self.call(&Call::post("/api/hooks", &body).within(HOOKS_TIMEOUT).repeatable()).await?;
        Ok(found.hook_config)
    }

    /// Creates a conversation. An existing conversation with the body's id is returned unchanged (idempotent).
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn create_conversation(&self, body: &Value, timeout: Duration) -> Result<ConversationInfo> {
        let call = Call::post("/api/conversations", body).within(timeout).at_most(CONVERSATION_LIMIT);
        self.call(&call).await
    }

    /// Returns conversations by id, in the same order, with `None` for unknown ids.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn conversations(&self, ids: &[Uuid], timeout: Duration) -> Result<Vec<Option<ConversationInfo>>> {
        let limit = CONVERSATION_LIMIT.saturating_mul(ids.len()).min(LIST_LIMIT);
        let ids: Vec<(&str, String)> = ids.iter().map(|id| ("ids", id::dashed(*id))).collect();
        let call = Call::get("/api/conversations").within(timeout).at_most(limit);
        let (found, _): (Bounded<Option<ConversationInfo>, CONVERSATIONS>, _) =
            self.call_with(&call, |request| request.query(&ids)).await?;
        Ok(found.0)
    }

    /// Returns a conversation, reduced to its status, title, tags, folder, model and metrics; `None` if the agent server does not have it.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn whole_conversation(&self, id: Uuid, timeout: Duration) -> Result<Option<Value>> {
        let ids = [("ids", id::dashed(id))];
        let call = Call::get("/api/conversations").within(timeout).at_most(CONVERSATION_LIMIT);
        let (mut found, _): (Bounded<Option<WholeConversation>, CONVERSATIONS>, _) =
            self.call_with(&call, |request| request.query(&ids)).await?;
        Ok(found.0.pop().flatten().map(WholeConversation::into_json))
    }

    /// Sends a message to a conversation; `run` starts the agent.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn send_message(&self, conversation: Uuid, role: &str, content: &Value, run: bool) -> Result<()> {
        let path = format!("/api/conversations/{}/events", id::dashed(conversation));
        let body = json!({"role": role, "content": content, "run": run});
        self.done(&Call::post(&path, &body).within(HOOKS_TIMEOUT)).await
    }

    /// Sets the title of a conversation, of at most 200 characters.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn set_title(&self, conversation: Uuid, title: &str, timeout: Duration) -> Result<()> {
        let path = format!("/api/conversations/{}", id::dashed(conversation));
        let body = json!({"title": title});
        self.done(&Call { method: Method::PATCH, ..Call::post(&path, &body) }.within(timeout)).await
    }

    /// Generates a title for a conversation with the agent's model. The agent server does not store the title. Returns `None` if the agent
    /// server has no such conversation or does not support the request (newer versions do not).
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn generate_title(&self, conversation: Uuid, timeout: Duration) -> Result<Option<String>> {
        #[derive(Deserialize)]
        struct Generated {
            #[serde(deserialize_with = "bounded::short::<_, TITLE_LENGTH>")]
            title: Option<String>,
        }
        let path = format!("/api/conversations/{}/generate_title", id::dashed(conversation));
        let body = json!({"max_length": GENERATED_TITLE});
        match self.call::<Generated>(&Call::post(&path, &body).within(timeout)).await {
            Ok(generated) => Ok(generated.title),
            Err(AgentServerError { failure: Failure::Status(StatusCode::NOT_FOUND, _), .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Ends a conversation and deletes its data on the agent server.
    ///
    /// # Errors
    /// See [`Failure`]; 404 when it has no such conversation.
    pub async fn delete_conversation(&self, conversation: Uuid, timeout: Duration) -> Result<()> {
        let path = format!("/api/conversations/{}", id::dashed(conversation));
        self.done(&Call::new(Method::DELETE, &path).within(timeout)).await
    }

    /// Switches a conversation to another model, from its next call of a model on. Repeating the request changes nothing.
    ///
    /// # Errors
    /// See [`Failure`]; 404 also from versions before 1.21, which do not support the request.
    pub async fn switch_llm(&self, conversation: Uuid, llm: &Value, timeout: Duration) -> Result<()> {
        let path = format!("/api/conversations/{}/switch_llm", id::dashed(conversation));
        let body = json!({"llm": llm});
        self.done(&Call::post(&path, &body).within(timeout)).await
    }

    /// Switches the model of a conversation whose agent is an ACP agent.
    ///
    /// # Errors
    /// See [`Failure`]; 400 for any other agent.
    pub async fn switch_acp_model(&self, conversation: Uuid, model: &str, timeout: Duration) -> Result<()> {
        let path = format!("/api/conversations/{}/switch_acp_model", id::dashed(conversation));
        let body = json!({"model": model});
        self.done(&Call::post(&path, &body).within(timeout)).await
    }

    /// Sets an LLM security analyzer, so that the conversation's model rates the risk of its own actions.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn set_llm_security_analyzer(&self, conversation: Uuid) -> Result<()> {
        let path = format!("/api/conversations/{}/security_analyzer", id::dashed(conversation));
        let body = json!({"security_analyzer": {"kind": "LLMSecurityAnalyzer"}});
        self.done(&Call::post(&path, &body).within(HOOKS_TIMEOUT)).await
    }

    /// Returns a page of a conversation's events, newest first, each as unparsed JSON; `page_id` is the previous page's `next_page_id`.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn newest_events(&self, conversation: Uuid, page_id: Option<&str>, limit: usize) -> Result<EventPage> {
        let path = format!("/api/conversations/{}/events/search", id::dashed(conversation));
        let call = Call::get(&path).within(LOOK_TIMEOUT).at_most(LIST_LIMIT);
        let asked = self.call_with(&call, |request| {
            let request = request.query(&[("sort_order", "TIMESTAMP_DESC"), ("limit", &limit.to_string())]);
            request.query(&page_id.map(|id| [("page_id", id)]))
        });
        Ok(asked.await?.0)
    }

    /// Sends a request and parses the response as JSON.
    async fn call<T: DeserializeOwned>(&self, call: &Call<'_>) -> Result<T> {
        Ok(self.call_with(call, |request| request).await?.0)
    }

    /// Sends a request and ignores the body of a successful response.
    async fn done(&self, call: &Call<'_>) -> Result<()> {
        self.call::<IgnoredAny>(call).await.map(drop)
    }

    /// Like [`AgentServer::call`], but lets `fill` extend the request; also returns the length of the response in bytes.
    async fn call_with<T: DeserializeOwned>(
        &self,
        call: &Call<'_>,
        fill: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> Result<(T, usize)> {
        let body = self.read(call, fill).await?;
        let read =
            serde_json::from_slice(&body).map_err(|error| call.fail(Failure::Malformed(what_is_wrong(&error))))?;
        Ok((read, body.len()))
    }

    /// Sends a request and returns the body of a successful response.
    async fn read(&self, call: &Call<'_>, fill: impl FnOnce(RequestBuilder) -> RequestBuilder) -> Result<Vec<u8>> {
        let limit = |status: StatusCode| if status.is_success() { call.limit } else { ERROR_LIMIT };
        let Answer { status, body, is_whole, .. } = self.send(call, fill, limit).await?;
        match (status.is_success(), is_whole) {
            (true, true) => Ok(body),
            (true, false) => Err(call.fail(Failure::TooLarge(call.limit))),
            (false, _) => {
                let mut secrets = call.secrets.clone();
                secrets.extend(call.body.map(mask::secrets_in).unwrap_or_default());
                secrets.extend(self.key.as_ref().map(|key| key.expose_secret().to_owned()));
                Err(call.fail(Failure::Status(status, error_text::of(&body, &secrets))))
            }
        }
    }

    /// Sends a client's request (cloud proxy) and returns the response unchanged: status, content type, body. Returns `None` if the body is
    /// larger than `limit`. [`http_client::join`] must accept the path.
    ///
    /// # Errors
    /// See [`Failure`]; an error status is not an error here.
    pub async fn proxy(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        limit: usize,
        timeout: Duration,
    ) -> Result<Option<(StatusCode, Option<HeaderValue>, Vec<u8>)>> {
        let call = Call { body, ..Call::new(method, path) }.within(timeout);
        let answer = self.send(&call, |request| request, |_| limit).await?;
        let kind = answer.headers.get(CONTENT_TYPE).cloned();
        Ok(answer.is_whole.then_some((answer.status, kind, answer.body)))
    }

    async fn send(
        &self,
        call: &Call<'_>,
        fill: impl FnOnce(RequestBuilder) -> RequestBuilder,
        limit: impl Fn(StatusCode) -> usize,
    ) -> Result<Answer> {
        let fail = |error: HttpError| call.fail(transport_failure(&error));
        // No request was sent: the base URL is invalid, or the path fails the path traversal check.
        let url = http_client::join(&self.url, call.path).ok_or_else(|| call.fail(Failure::Unreachable))?;
        let mut request = self.http.request(call.method.clone(), url.as_str()).map_err(fail)?;
        if call.is_repeatable {
            request = request.repeatable();
        }
        let request = request.with(|mut request| {
            if let Some(body) = call.body {
                request = request.json(body);
            }
            if let Some(key) = &self.key {
                request = request.header(SESSION_API_KEY, key.expose_secret());
            }
            fill(request)
        });
        request.send(call.timeout, limit).await.map_err(fail)
    }
}

/// Returns the strings that an error about a file with this content must not repeat.
fn secrets_of_file(content: &str) -> Vec<String> {
    // A git credentials file has a password in each line.
    let mut secrets: Vec<String> = content.lines().flat_map(|line| mask::secrets_in(&line.into())).collect();
    if content.len() <= JSON_FILE_LIMIT
        && let Ok(json) = serde_json::from_str::<Value>(content)
    {
        secrets.extend(mask::secrets_in(&json));
    }
    secrets.push(content.to_owned());
    secrets
}

/// A request with its timeout and its response limit.
#[derive(Clone)]
struct Call<'a> {
    method: Method,
    path: &'a str,
    body: Option<&'a Value>,
    timeout: Duration,
    limit: usize,
    /// Whether the request is idempotent and may be retried. GET requests always are.
    is_repeatable: bool,
    /// Strings that an error must not repeat, in addition to the body's secrets.
    secrets: Vec<String>,
}

impl<'a> Call<'a> {
    fn new(method: Method, path: &'a str) -> Self {
        Self {
            method,
            path,
            body: None,
            timeout: LOOK_TIMEOUT,
            limit: ANSWER_LIMIT,
            is_repeatable: false,
            secrets: Vec::new(),
        }
    }

    fn get(path: &'a str) -> Self {
        Self::new(Method::GET, path)
    }

    fn post(path: &'a str, body: &'a Value) -> Self {
        Self { body: Some(body), ..Self::new(Method::POST, path) }
    }

    fn within(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    fn at_most(self, limit: usize) -> Self {
        Self { limit, ..self }
    }

    fn repeatable(self) -> Self {
        Self { is_repeatable: true, ..self }
    }

    fn fail(&self, failure: Failure) -> AgentServerError {
        // A client may have chosen the path, so keep only its first characters.
        let path: String = self.path.split('?').next().unwrap_or_default().chars().take(ID_LENGTH).collect();
        AgentServerError { request: format!("{} {path}", self.method), failure }
    }
}

fn transport_failure(error: &HttpError) -> Failure {
    match error.cause {
        Cause::TimedOut => Failure::TimedOut,
        Cause::Unreachable => Failure::Unreachable,
        Cause::CutOff => Failure::CutOff,
    }
}

/// Describes why JSON was not parsed, without quoting it: it may be long and may contain secrets.
fn what_is_wrong(error: &serde_json::Error) -> String {
    let what = match error.classify() {
        Category::Io | Category::Syntax => "it is no JSON",
        Category::Eof => "its JSON ends too early",
        Category::Data => "it has an unexpected form",
    };
    format!("{what} (line {}, column {})", error.line(), error.column())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::http_client::AddressPolicy;

    /// Responds to the first request of a connection, and closes the connection when the second arrives. Counts requests and responses.
    async fn closes_early(mut connection: TcpStream, requests: Arc<AtomicUsize>, answers: Arc<AtomicUsize>) {
        for is_first in [true, false] {
            let mut request = Vec::new();
            // The body of a message is one line without a line break.
            while !request.windows(4).any(|end| end == b"\r\n\r\n")
                || request.starts_with(b"POST") && !request.ends_with(b"}")
            {
                match connection.read_buf(&mut request).await {
                    Ok(length) if length > 0 => {}
                    _ => return,
                }
            }
            requests.fetch_add(1, Ordering::SeqCst);
            if is_first {
                let answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n[]";
                connection.write_all(answer).await.expect("written");
                answers.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    #[tokio::test]
    async fn a_look_is_repeated_on_another_connection_and_a_message_arrives_once() {
        const TIMES: usize = 20;
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let url = format!("http://{}", listener.local_addr().expect("an address"));
        let (requests, answers) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let counters = (requests.clone(), answers.clone());
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                tokio::spawn(closes_early(connection, counters.0.clone(), counters.1.clone()));
            }
        });
        let count = || (requests.load(Ordering::SeqCst), answers.load(Ordering::SeqCst));
        let agent_server = AgentServer::new(HttpClient::new(AddressPolicy::Any), &url, None);

        for _ in 0..TIMES {
            let conversation = agent_server.whole_conversation(Uuid::nil(), LOOK_TIMEOUT).await;
            assert_eq!(conversation.expect("an answer"), None);
        }
        let (asked, answered) = count();
        assert_eq!(answered, TIMES);
        assert!(asked > TIMES, "no connection was closed: nothing was shown");

        for _ in 0..TIMES {
            let sent = agent_server.send_message(Uuid::nil(), "user", &json!([]), true).await;
            sent.expect("it arrives, whatever became of the kept connections");
        }
        let (asked_then, answered_then) = count();
        assert_eq!((asked_then - asked, answered_then - answered), (TIMES, TIMES));
    }

    #[test]
    fn errors_of_an_upload_are_without_the_secrets_in_lines_and_in_json() {
        let servers =
            json!([{"url": "https://h/?k=query-1", "headers": {"X": "Bearer header-1"}, "env": {"E": "env-1"}}]);
        for (content, secrets) in [
            ("https://ann:pass-1@git.example\nhttps://bob:pass-2@git.example\n".to_owned(), &["pass-1", "pass-2"][..]),
            (json!({"servers": servers}).to_string(), &["query-1", "header-1", "env-1"]),
        ] {
            let body = json!({"detail": format!("bad: {}", secrets.join(" "))}).to_string();
            let text = error_text::of(body.as_bytes(), &secrets_of_file(&content));
            assert_eq!(text, format!("bad: {}", vec![mask::MASK; secrets.len()].join(" ")));
        }
    }

    #[test]
    fn a_failure_is_retried_as_often_as_it_may_pass() {
        let status =
            |code: u16, text: &str| Failure::Status(StatusCode::from_u16(code).expect("a status"), text.to_owned());
        let missing = "Local plugin path does not exist: /x";
        for (failure, retry, fault) in [
            (Failure::Unreachable, Retry::Often, Fault::Server),
            (Failure::TimedOut, Retry::Often, Fault::Server),
            (Failure::CutOff, Retry::Often, Fault::Server),
            (Failure::Malformed(String::new()), Retry::Often, Fault::Server),
            (Failure::TooLarge(1), Retry::Never, Fault::Server),
            (status(408, ""), Retry::Often, Fault::Server),
            (status(429, ""), Retry::Often, Fault::Server),
            (status(502, ""), Retry::Often, Fault::Server),
            (status(503, missing), Retry::Often, Fault::Server),
            (status(504, ""), Retry::Often, Fault::Server),
            (status(409, ""), Retry::Few, Fault::Server),
            (status(500, ""), Retry::Few, Fault::Server),
            (status(501, ""), Retry::Few, Fault::Server),
            (status(500, missing), Retry::Never, Fault::User),
            (status(500, "Failed to fetch plugin from x"), Retry::Few, Fault::User),
            (status(500, "[Errno 28] No space left on device"), Retry::Never, Fault::Server),
            (status(401, ""), Retry::Never, Fault::Server),
            (status(404, missing), Retry::Never, Fault::Server),
            (status(422, ""), Retry::Never, Fault::Server),
        ] {
            let error = AgentServerError { request: "POST /x".to_owned(), failure };
            assert_eq!((error.retry(), error.fault()), (retry, fault), "{error:?}");
        }
    }
}
