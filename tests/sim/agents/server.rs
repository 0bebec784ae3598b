//! The routes of agent servers, version 1.58.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::StatusCode;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::commands::{self, Command, Folder};
use super::conversations::{self, Conversation};
use super::provider::{Runtime, Status, pick};
use super::{Shared, State, VERSION, detail, json_body, ok, query_value, query_values, raw, reply, request_header};
use crate::net::{Failure, Reply, Request};

/// The maximum numbers of faults that the requests to one sandbox meet in this time, and of those that are errors of the agent server. A
/// start gives up on a step after eight failed attempts, or after three if the agent server responds with an error of its own.
const FAULTS: usize = 3;
const ERRORS: usize = 2;
const FAULTS_WITHIN: Duration = Duration::from_secs(600);
/// How long the agent server takes to load skills and hooks.
const SKILLS: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(10)];
const HOOKS: [Duration; 2] = [Duration::from_millis(10), Duration::from_millis(500)];

/// The agent server of a sandbox, and the disk of the sandbox.
pub(super) struct AgentServer {
    pub(super) is_up: bool,
    /// The number of its processes and their ends. What belongs to an earlier process has ended.
    pub(super) process: u64,
    started: Instant,
    /// When an agent or a client has used it last.
    pub(super) used: Instant,
    /// The commands and their outputs, by id. Outputs are on the disk.
    pub(super) commands: BTreeMap<Uuid, Command>,
    /// The folders with the state of the commands of starts, by path.
    pub(super) folders: BTreeMap<String, Folder>,
    /// The folders of projects that were prepared.
    pub(super) projects: BTreeSet<String>,
    /// The uploaded files, by path.
    pub(super) files: BTreeMap<String, Bytes>,
    pub(super) conversations: BTreeMap<Uuid, Conversation>,
    /// The conversations that were deleted, oldest first.
    pub(super) deleted: Vec<Conversation>,
    /// The latest faults that requests have met.
    faults: Vec<(Instant, Fault)>,
}

/// A process of an agent server. Its futures end when it has ended.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) runtime: String,
    pub(super) number: u64,
}

impl Process {
    /// The runtime, unless the process has ended.
    pub(super) fn of<'s>(&self, state: &'s mut State) -> Option<&'s mut Runtime> {
        state.runtimes.get_mut(&self.runtime).filter(|runtime| runtime.server.process == self.number)
    }

    /// A conversation, unless the process has ended or the conversation was deleted.
    pub(super) fn conversation<'s>(&self, state: &'s mut State, id: Uuid) -> Option<&'s mut Conversation> {
        self.of(state)?.server.conversations.get_mut(&id)
    }
}

impl AgentServer {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self {
            is_up: false,
            process: 0,
            started: now,
            used: now,
            commands: BTreeMap::new(),
            folders: BTreeMap::new(),
            projects: BTreeSet::new(),
            files: BTreeMap::new(),
            conversations: BTreeMap::new(),
            deleted: Vec::new(),
            faults: Vec::new(),
        }
    }

    pub(super) fn come_up(&mut self) {
        (self.is_up, self.started, self.used) = (true, Instant::now(), Instant::now());
    }

    /// Ends the process: what it has in memory is lost. Returns the number of events that no webhook will report.
    pub(super) fn end_process(&mut self) -> u64 {
        self.is_up = false;
        self.process += 1;
        self.conversations.values_mut().map(Conversation::end_process).sum()
    }

    /// Ends the runs of all commands, as the end of the sandbox does. Returns their indices in [`State::runs`].
    pub(super) fn end_runs(&mut self) -> Vec<usize> {
        self.folders.values_mut().filter_map(Folder::end_run).collect()
    }
}

impl State {
    /// Counts events that no webhook will report.
    pub(super) fn lose_events(&mut self, lost: u64) {
        self.counters.events_lost += lost;
        self.counters.posts_open -= lost;
    }
}

/// Ends the agent server alone. An orderly end stores the exit code -15 for the commands that run, and posts what waits.
pub(super) fn end_server(shared: &Arc<Shared>, state: &mut State, id: &str, is_orderly: bool) {
    if is_orderly {
        commands::interrupt(shared, state, id);
        conversations::flush(shared, state, id);
    }
    let runtime = state.runtimes.get_mut(id).expect("the runtime");
    let lost = runtime.server.end_process();
    state.lose_events(lost);
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    Refused,
    Status(StatusCode),
    StatusAfter(StatusCode),
    CutBefore,
    CutAfter,
    HangBefore,
    HangAfter,
}

impl Fault {
    /// Whether it is an error of the agent server itself.
    fn is_error(self) -> bool {
        matches!(
            self,
            Self::Status(StatusCode::INTERNAL_SERVER_ERROR) | Self::StatusAfter(StatusCode::INTERNAL_SERVER_ERROR)
        )
    }
}

/// The kind of a request: its method and its path without ids.
fn kind_of(request: &Request, segments: &[&str]) -> String {
    let path = match segments {
        ["alive" | "server_info"]
        | ["api", "bash", "start_bash_command" | "execute_bash_command"]
        | ["api", "bash", "bash_events", "search"]
        | ["api", "file", "upload" | "download"]
        | ["api", "skills" | "hooks" | "conversations"] => format!("/{}", segments.join("/")),
        ["api", "conversations", _, rest @ ..] => {
            ["/api/conversations/{id}"].iter().chain(rest).copied().collect::<Vec<_>>().join("/")
        }
        _ => panic!("the model of agent servers does not know {} {}", request.method, request.path),
    };
    format!("{} {path}", request.method)
}

/// Handles a request to the agent server of a runtime.
pub(super) async fn handle(shared: &Arc<Shared>, id: &str, request: Request) -> Reply {
    let path = request.path.clone();
    let segments: Vec<&str> = path.trim_matches('/').split('/').collect();
    let kind = kind_of(&request, &segments);
    let subject = format!("{id} {kind}");
    let (latency, fault, proxy) = {
        let state = &mut *shared.lock();
        *state.calls.entry(format!("agent {kind}")).or_default() += 1;
        let latency = shared.between(state, "latency", &subject, shared.settings.pace.agent);
        let proxy = shared.chance(state, "a proxy responds", &subject, 0.5);
        (latency, fault(shared, state, id, &subject), proxy)
    };
    sleep(latency / 2).await;
    let process = {
        let mut state = shared.lock();
        match state.runtimes.get_mut(id) {
            Some(runtime) if runtime.status == Status::Running && runtime.server.is_up => {
                Process { runtime: id.to_owned(), number: runtime.server.process }
            }
            // The proxy of the provider responds for a sandbox that does not run, or there is none.
            _ if proxy => return detail(StatusCode::SERVICE_UNAVAILABLE, "no such sandbox"),
            _ => return Err(Failure::Refused),
        }
    };
    match fault {
        Some(Fault::Refused) => return Err(Failure::Refused),
        Some(Fault::Status(status)) => return reply(status, &json!({"detail": "an injected fault"})),
        Some(Fault::CutBefore) => return Err(Failure::Cut),
        Some(Fault::HangBefore) => return Err(Failure::Hang),
        _ => {}
    }
    let response = respond(shared, &process, &kind, &segments, request).await;
    sleep(latency / 2).await;
    if process.of(&mut shared.lock()).is_none() {
        return Err(Failure::Cut);
    }
    match fault {
        Some(Fault::StatusAfter(status)) => reply(status, &json!({"detail": "an injected fault"})),
        Some(Fault::CutAfter) => Err(Failure::Cut),
        Some(Fault::HangAfter) => Err(Failure::Hang),
        _ => response,
    }
}

/// Decides which fault a request meets, if not too many have met one lately.
fn fault(shared: &Shared, state: &mut State, id: &str, subject: &str) -> Option<Fault> {
    let faults = &shared.settings.faults.network;
    let drawn = shared.draw(state, "network fault", subject);
    let found = pick(
        drawn,
        [
            (faults.refusals, Fault::Refused),
            (faults.unavailable, Fault::Status(StatusCode::SERVICE_UNAVAILABLE)),
            (faults.errors, Fault::Status(StatusCode::INTERNAL_SERVER_ERROR)),
            (faults.errors_after, Fault::StatusAfter(StatusCode::INTERNAL_SERVER_ERROR)),
            (faults.cuts_before, Fault::CutBefore),
            (faults.cuts_after, Fault::CutAfter),
            (faults.hangs_before, Fault::HangBefore),
            (faults.hangs_after, Fault::HangAfter),
        ],
    );
    let found = found.filter(|_| !state.is_healed)?;
    let now = Instant::now();
    let recent = &mut state.runtimes.get_mut(id)?.server.faults;
    recent.retain(|(at, _)| *at + FAULTS_WITHIN > now);
    let errors = recent.iter().filter(|(_, fault)| fault.is_error()).count();
    if recent.len() >= FAULTS || found.is_error() && errors >= ERRORS {
        return None;
    }
    recent.push((now, found));
    state.counters.network_faults += 1;
    Some(found)
}

async fn respond(shared: &Arc<Shared>, process: &Process, kind: &str, segments: &[&str], request: Request) -> Reply {
    let (method, path) = kind.split_once(' ').expect("a method and a path");
    let runtime = &process.runtime;
    {
        let mut state = shared.lock();
        let Some(runtime) = process.of(&mut state) else { return Err(Failure::Cut) };
        match path {
            "/alive" => return ok(&json!({"status": "ok"})),
            "/server_info" => return server_info(&runtime.server),
            _ if request_header(&request, "x-session-api-key") != Some(runtime.key.as_str()) => {
                return detail(StatusCode::UNAUTHORIZED, "Unauthorized");
            }
            "/api/bash/start_bash_command"
            | "/api/bash/execute_bash_command"
            | "/api/file/upload"
            | "/api/file/download" => {
                runtime.server.used = Instant::now();
            }
            _ => {}
        }
    }
    match (method, path) {
        ("POST", "/api/bash/start_bash_command") => commands::start(shared, process, &json_body(&request)),
        ("POST", "/api/bash/execute_bash_command") => commands::execute(shared, process, &json_body(&request)).await,
        ("GET", "/api/bash/bash_events/search") => commands::search(shared, process, &request),
        ("POST", "/api/file/upload") => {
            let path = query_value(&request, "path").filter(|path| path.starts_with('/')).expect("an absolute path");
            let content = multipart_file(&request).expect("a file");
            let mut state = shared.lock();
            let Some(runtime) = process.of(&mut state) else { return Err(Failure::Cut) };
            runtime.server.files.insert(path, Bytes::copy_from_slice(content));
            ok(&json!({"success": true}))
        }
        ("GET", "/api/file/download") => {
            let path = query_value(&request, "path").expect("a path");
            let mut state = shared.lock();
            let Some(runtime) = process.of(&mut state) else { return Err(Failure::Cut) };
            match runtime.server.files.get(&path) {
                Some(content) => Ok(raw(StatusCode::OK, "application/octet-stream", content.clone())),
                None => detail(StatusCode::NOT_FOUND, "File not found"),
            }
        }
        ("POST", "/api/skills") => {
            let wait = shared.between(&mut shared.lock(), "skills", runtime, SKILLS);
            sleep(wait).await;
            let skill = json!({
                "name": "simulated", "content": "Use the simulated tools.", "triggers": [], "source": "public",
                "description": null, "is_agentskills_format": false,
            });
            let skills: Vec<Value> =
                json_body(&request)["load_public"].as_bool().unwrap_or(true).then_some(skill).into_iter().collect();
            let count = skills.len();
            ok(&json!({"skills": skills, "sources": {"sandbox": 0, "sdk_base": count, "org": 0, "project": 0}}))
        }
        ("POST", "/api/hooks") => {
            let wait = shared.between(&mut shared.lock(), "hooks", runtime, HOOKS);
            sleep(wait).await;
            ok(&json!({"hook_config": null}))
        }
        ("POST", "/api/conversations") => conversations::create(shared, process, json_body(&request)).await,
        ("GET", "/api/conversations") => {
            let ids = query_values(&request, "ids");
            assert!((1..100).contains(&ids.len()), "from 1 to 99 conversations are requested: {}", ids.len());
            let mut state = shared.lock();
            let Some(runtime) = process.of(&mut state) else { return Err(Failure::Cut) };
            let found = ids.iter().map(|id| {
                let id = Uuid::parse_str(id).expect("an id");
                runtime.server.conversations.get(&id).map_or(Value::Null, Conversation::info)
            });
            ok(&found.collect())
        }
        _ => {
            let id = Uuid::parse_str(segments[2]).expect("the id of a conversation");
            let rest = path.strip_prefix("/api/conversations/{id}").expect("a route of conversations");
            conversations::respond(shared, process, method, rest, id, &request).await
        }
    }
}

fn server_info(server: &AgentServer) -> Reply {
    ok(&json!({
        "uptime": server.started.elapsed().as_secs() as f64,
        "idle_time": server.used.elapsed().as_secs() as f64,
        "title": "OpenHands Agent Server",
        "version": VERSION,
    }))
}

/// The content of the first file of a `multipart/form-data` body.
pub(super) fn multipart_file(request: &Request) -> Option<&[u8]> {
    let kind = request_header(request, "content-type")?.strip_prefix("multipart/form-data")?;
    let boundary = kind.split("boundary=").nth(1)?.split(';').next()?.trim_matches('"');
    let delimiter = format!("\r\n--{boundary}");
    let find = |text: &[u8], what: &[u8]| text.windows(what.len()).position(|window| window == what);
    let head = find(&request.body, b"\r\n\r\n")?;
    let content = &request.body[head + 4..];
    Some(&content[..find(content, delimiter.as_bytes())?])
}
