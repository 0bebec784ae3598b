//! A stand-in for AWS Lambda MicroVMs: its API, the VMs, and the proxy in front of their endpoints. It is strict where emulators are lenient:
//! idempotency tokens, states that take time and are reported late, limits of parameters, quotas, conflicts, the longest life of a VM by a
//! clock that tests turn.
//!
//! A VM is a folder and the processes of the product's own supervisor (`guest.py`), whose hooks are called as AWS calls them; suspended, its
//! processes are stopped by a signal. For tests that need no agent, all VMs are one stand-in agent server.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::response::Response;
use http::StatusCode;
use percent_encoding::percent_decode_str;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use shared::sandbox::microvm::{AGENT_SERVER_PORT, GUEST_PROGRAM};
use shared::sandbox::supervisor::PROGRAM as SUPERVISOR_PROGRAM;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use uuid::Uuid;

use super::edge::{Incomings, Passing, pass, plain};
use super::server::{Cut, Request, Server, json as answer};

pub const IMAGE: &str = "arn:aws:lambda:us-east-1:123456789012:microvm-image:stack-sandbox";
const CONNECTORS: [(&str, &str); 2] = [
    ("ingressNetworkConnectors", "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:HTTP_INGRESS"),
    ("egressNetworkConnectors", "arn:aws:lambda:us-east-1:aws:network-connector:aws-network-connector:INTERNET_EGRESS"),
];
const HOOKS: &str = "/aws/lambda-microvms/runtime/v1";
const DOMAIN: &str = ".lambda-microvm.us-east-1.on.aws";
/// The memory of a VM in MB, which counts until it has ended.
const MEMORY: usize = 2048;
/// How long a VM that has ended is visible.
const VISIBLE: Duration = Duration::from_secs(600);

/// What the VMs are.
#[derive(Clone, Debug)]
pub enum Machines {
    /// The supervisor, with agent servers of this interpreter.
    Guests(PathBuf),
    /// One agent server at this port, which ignores the payload.
    At(u16),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// This status and error without an effect.
    Refuse(u16, &'static str),
    /// The effect, and a 500.
    Lose,
}

#[derive(Debug)]
struct Vm {
    parameters: Value,
    /// The states since its start, and when the API reports them.
    states: Vec<(Instant, &'static str)>,
    /// On the turned clock.
    started: Duration,
    ended: Option<Duration>,
    reason: Option<String>,
    port: u16,
    folder: Option<TempDir>,
}

impl Vm {
    fn state(&self) -> &'static str {
        self.states.last().expect("a state").1
    }

    fn shown(&self) -> &'static str {
        let now = Instant::now();
        self.states.iter().rev().find(|(at, _)| *at <= now).map_or("PENDING", |(_, state)| state)
    }
}

#[derive(Debug)]
struct State {
    machines: Machines,
    vms: BTreeMap<String, Vm>,
    tokens: HashMap<String, String>,
    /// Access tokens: the VM, the port, and when it expires on the turned clock.
    access: HashMap<String, (String, u16, Duration)>,
    began: Instant,
    turned: Duration,
    /// How late states are reported.
    lag: Duration,
    /// How long a VM without a guest starts.
    boot: Duration,
    quota: usize,
    faults: Vec<(String, usize, Fault)>,
    calls: Vec<String>,
    made: usize,
}

impl State {
    fn now(&self) -> Duration {
        self.began.elapsed() + self.turned
    }

    fn set(&mut self, id: &str, state: &'static str) {
        let (lag, now) = (self.lag, self.now());
        let Some(vm) = self.vms.get_mut(id) else { return };
        if vm.state() == "TERMINATED" {
            return;
        }
        vm.states.push((Instant::now() + lag, state));
        if state == "TERMINATED" {
            vm.ended = Some(now);
            signal(id, Signal::KILL);
        }
    }

    /// Ends VMs whose time is over, and forgets those that ended long ago.
    fn expire(&mut self) {
        let now = self.now();
        let ids: Vec<String> = self.vms.keys().cloned().collect();
        for id in ids {
            let vm = &self.vms[&id];
            let life = Duration::from_secs(vm.parameters["maximumDurationInSeconds"].as_u64().expect("a life"));
            if vm.ended.is_some_and(|ended| now >= ended + VISIBLE) {
                self.vms.remove(&id);
            } else if vm.ended.is_none() && now >= vm.started + life {
                self.vms.get_mut(&id).expect("a VM").reason = Some("Maximum duration reached".to_owned());
                self.set(&id, "TERMINATED");
            }
        }
    }
}

/// Sends a signal to all processes of a VM.
fn signal(id: &str, signal: Signal) {
    for pid in processes(id) {
        let _gone = kill_process(pid, signal);
    }
}

/// The processes of a VM: those that have its mark in their environment, and their descendants.
fn processes(id: &str) -> Vec<Pid> {
    let mark = format!("GUEST_MARK={id}");
    let mut parents: Vec<(i32, i32)> = Vec::new();
    let mut found: HashSet<i32> = HashSet::new();
    for entry in fs::read_dir("/proc").expect("processes").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        if environment.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes()) {
            found.insert(pid);
        }
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let parent = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)?.parse().ok());
        parents.push((pid, parent.unwrap_or_default()));
    }
    loop {
        let more: Vec<i32> = parents
            .iter()
            .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            return found.into_iter().filter_map(Pid::from_raw).collect();
        }
        found.extend(more);
    }
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a free port").port()
}

/// The service.
#[derive(Debug)]
pub struct MicrovmApi {
    server: Server,
    endpoints: Passing,
    state: Arc<Mutex<State>>,
}

impl Drop for MicrovmApi {
    fn drop(&mut self) {
        for id in self.state().vms.keys() {
            signal(id, Signal::KILL);
        }
    }
}

impl MicrovmApi {
    pub async fn start(machines: Machines) -> Self {
        let state = Arc::new(Mutex::new(State {
            machines,
            vms: BTreeMap::new(),
            tokens: HashMap::new(),
            access: HashMap::new(),
            began: Instant::now(),
            turned: Duration::ZERO,
            lag: Duration::from_millis(200),
            boot: Duration::from_millis(300),
            quota: 16 * 1024,
            faults: Vec::new(),
            calls: Vec::new(),
            made: 0,
        }));
        let shared = state.clone();
        let server = Server::start(move |request| {
            let response = respond(&request, &shared);
            async move { Ok::<Response, Cut>(response) }
        })
        .await;
        let shared = state.clone();
        let endpoints = Passing::start(move |request| {
            let state = shared.clone();
            async move { at_endpoint(request, &state).await }
        })
        .await;
        Self { server, endpoints, state }
    }

    pub fn url(&self) -> String {
        self.server.url()
    }

    /// The address of all endpoints.
    pub fn endpoints(&self) -> String {
        self.endpoints.url.trim_start_matches("http://").to_owned()
    }

    /// Turns the clock, on which VMs and tokens get older.
    pub fn turn(&self, time: Duration) {
        let mut state = self.state();
        state.turned += time;
        state.expire();
    }

    /// The memory that all VMs may have, in MB.
    pub fn set_quota(&self, megabytes: usize) {
        self.state().quota = megabytes;
    }

    /// States are reported this late.
    pub fn set_lag(&self, lag: Duration) {
        self.state().lag = lag;
    }

    /// VMs without a guest start for this long.
    pub fn set_boot(&self, boot: Duration) {
        self.state().boot = boot;
    }

    /// The next so many calls of an operation fail.
    pub fn fail(&self, operation: &str, times: usize, fault: Fault) {
        self.state().faults.push((operation.to_owned(), times, fault));
    }

    /// The operations that were called, in order.
    pub fn calls(&self) -> Vec<String> {
        self.state().calls.clone()
    }

    pub fn calls_of(&self, operation: &str) -> usize {
        self.state().calls.iter().filter(|call| *call == operation).count()
    }

    /// The VMs that have not ended: ids, states and parameters.
    pub fn living(&self) -> Vec<(String, String, Value)> {
        let state = self.state();
        let living = state.vms.iter().filter(|(_, vm)| vm.state() != "TERMINATED");
        living.map(|(id, vm)| (id.clone(), vm.state().to_owned(), vm.parameters.clone())).collect()
    }

    /// Ends a VM without a call.
    pub fn end(&self, id: &str) {
        let mut state = self.state();
        state.vms.get_mut(id).expect("a VM").reason = Some("Out of memory".to_owned());
        state.set(id, "TERMINATED");
    }

    /// What the supervisors of all VMs have logged.
    pub fn logs(&self) -> String {
        let state = self.state();
        let folders = state.vms.values().filter_map(|vm| vm.folder.as_ref());
        folders.map(|folder| fs::read_to_string(folder.path().join("guest.log")).unwrap_or_default()).collect()
    }

    /// Kills the agent servers of all VMs, but not their supervisors.
    pub fn kill_agent(&self) {
        for id in self.state().vms.keys() {
            for pid in processes(id) {
                let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap_or_default();
                if name.trim() == "agent-server" {
                    kill_process(pid, Signal::KILL).expect("killed");
                }
            }
        }
    }

    /// Runs a VM as a worker does that crashes before it records it.
    pub fn run_unrecorded(&self) -> String {
        let body = json!({
            "clientToken": Uuid::new_v4().to_string(), "imageIdentifier": IMAGE, "maximumDurationInSeconds": 28800,
            "ingressNetworkConnectors": [CONNECTORS[0].1], "egressNetworkConnectors": [CONNECTORS[1].1],
            "runHookPayload": "{}", "logging": {"disabled": {}},
        });
        let mut state = self.state();
        run(&body, &mut state, &self.state).expect("it is not refused")
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the state")
    }
}

fn refusal(status: u16, code: &str, body: &Value) -> Response {
    let mut response = answer(StatusCode::from_u16(status).expect("a status"), body);
    response.headers_mut().insert("x-amzn-errortype", code.parse().expect("a header"));
    response
}

fn respond(request: &Request, shared: &Arc<Mutex<State>>) -> Response {
    let path = percent_decode_str(&request.path).decode_utf8().expect("UTF-8").into_owned();
    let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let operation = match (request.method.as_str(), &segments[..]) {
        ("POST", ["2025-09-09", "microvms"]) => "RunMicrovm",
        ("GET", ["2025-09-09", "microvms"]) => "ListMicrovms",
        ("GET", ["2025-09-09", "microvms", _]) => "GetMicrovm",
        ("DELETE", ["2025-09-09", "microvms", _]) => "TerminateMicrovm",
        ("POST", ["2025-09-09", "microvms", _, "suspend"]) => "SuspendMicrovm",
        ("POST", ["2025-09-09", "microvms", _, "resume"]) => "ResumeMicrovm",
        ("POST", ["2025-09-09", "microvms", _, "auth-token"]) => "CreateMicrovmAuthToken",
        _ => return refusal(404, "UnknownOperationException", &json!({})),
    };
    let authorization = request.header("authorization").unwrap_or_default();
    if !authorization.starts_with("AWS4-HMAC-SHA256 ") || !authorization.contains("/us-east-1/lambda/aws4_request") {
        return refusal(403, "AccessDeniedException", &json!({"message": "The request is not signed for lambda"}));
    }
    let mut state = shared.lock().expect("the state");
    state.calls.push(operation.to_owned());
    state.expire();
    let fault =
        state.faults.iter_mut().find(|(name, left, _)| name == operation && *left > 0).map(|(_, left, fault)| {
            *left -= 1;
            *fault
        });
    if let Some(Fault::Refuse(status, code)) = fault {
        return refusal(status, code, &json!({"message": "A fault of a test"}));
    }
    let response = handle(operation, segments.get(2).copied().unwrap_or_default(), request, &mut state, shared);
    if fault == Some(Fault::Lose) {
        refusal(500, "InternalServerException", &json!({"message": "Lost"}))
    } else {
        response
    }
}

fn handle(operation: &str, id: &str, request: &Request, state: &mut State, shared: &Arc<Mutex<State>>) -> Response {
    let body = request.json();
    match operation {
        "RunMicrovm" => {
            return match run(&body, state, shared) {
                Ok(id) => answer(StatusCode::OK, &shown(&id, state, true)),
                Err(refused) => *refused,
            };
        }
        "ListMicrovms" => {
            let image = request.query_value("imageIdentifier").unwrap_or_default();
            if image != IMAGE {
                return refusal(404, "ResourceNotFoundException", &json!({"message": "There is no such image"}));
            }
            // Pages of two.
            let after = request.query_value("nextToken").unwrap_or_default();
            let ids: Vec<String> = state.vms.keys().filter(|id| **id > after).cloned().collect();
            let items: Vec<Value> = ids.iter().take(2).map(|id| shown(id, state, false)).collect();
            let next = if ids.len() > 2 { json!(ids[1]) } else { Value::Null };
            return answer(StatusCode::OK, &json!({"items": items, "nextToken": next}));
        }
        _ => {}
    }
    let Some(vm) = state.vms.get(id) else {
        return refusal(404, "ResourceNotFoundException", &json!({"message": "There is no such MicroVM"}));
    };
    let conflict = |message: &str| refusal(409, "ConflictException", &json!({"message": message}));
    match (operation, vm.state()) {
        ("GetMicrovm", _) => answer(StatusCode::OK, &shown(id, state, true)),
        ("SuspendMicrovm", "RUNNING") => {
            state.set(id, "SUSPENDING");
            signal(id, Signal::STOP);
            let (shared, id) = (shared.clone(), id.to_owned());
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_millis(300)).await;
                let mut state = shared.lock().expect("the state");
                if state.vms.get(&id).is_some_and(|vm| vm.state() == "SUSPENDING") {
                    state.set(&id, "SUSPENDED");
                }
            });
            answer(StatusCode::OK, &json!({}))
        }
        ("SuspendMicrovm", other) => conflict(&format!("A MicroVM that is {other} cannot be suspended")),
        ("ResumeMicrovm", "SUSPENDED") => {
            signal(id, Signal::CONT);
            state.set(id, "RUNNING");
            answer(StatusCode::OK, &json!({}))
        }
        ("ResumeMicrovm", other) => conflict(&format!("A MicroVM that is {other} cannot be resumed")),
        ("TerminateMicrovm", _) => {
            state.set(id, "TERMINATED");
            answer(StatusCode::OK, &json!({}))
        }
        ("CreateMicrovmAuthToken", "RUNNING") => {
            let minutes = body["expirationInMinutes"].as_u64().unwrap_or_default();
            let ports = body["allowedPorts"].as_array().cloned().unwrap_or_default();
            let port = match &ports[..] {
                [port] => port["port"].as_u64().and_then(|port| u16::try_from(port).ok()),
                _ => None,
            };
            let (1..=60, Some(port)) = (minutes, port) else {
                return refusal(400, "ValidationException", &json!({"message": "Minutes or ports are not valid"}));
            };
            // As long as one of AWS.
            let token = format!("{}{}", Uuid::new_v4().simple(), "x".repeat(836));
            let expires = state.now() + Duration::from_secs(60 * minutes);
            state.access.insert(token.clone(), (id.to_owned(), port, expires));
            answer(StatusCode::OK, &json!({"authToken": {"X-aws-proxy-auth": token}}))
        }
        ("CreateMicrovmAuthToken", other) => conflict(&format!("A MicroVM that is {other} has no endpoint")),
        _ => refusal(404, "UnknownOperationException", &json!({})),
    }
}

fn shown(id: &str, state: &State, is_whole: bool) -> Value {
    let vm = &state.vms[id];
    let seconds = |time: Duration| {
        let ago = state.now().saturating_sub(time);
        (SystemTime::now() - ago).duration_since(UNIX_EPOCH).expect("a time").as_secs_f64()
    };
    let mut shown = json!({
        "microvmId": id, "state": vm.shown(), "imageArn": IMAGE, "imageVersion": "1", "startedAt": seconds(vm.started),
    });
    if is_whole {
        shown["endpoint"] = json!(format!("{id}{DOMAIN}"));
        shown["maximumDurationInSeconds"] = vm.parameters["maximumDurationInSeconds"].clone();
        if let Some(ended) = vm.ended.filter(|_| vm.shown() == "TERMINATED") {
            shown["terminatedAt"] = json!(seconds(ended));
            shown["stateReason"] = json!(vm.reason);
        }
    }
    shown
}

fn run(body: &Value, state: &mut State, shared: &Arc<Mutex<State>>) -> Result<String, Box<Response>> {
    let invalid = |message: &str| Err(Box::new(refusal(400, "ValidationException", &json!({"message": message}))));
    let token = body["clientToken"].as_str().unwrap_or_default().to_owned();
    if !(1..=128).contains(&token.len()) {
        return invalid("A token has 1 to 128 characters");
    }
    if let Some(id) = state.tokens.get(&token).cloned()
        && let Some(vm) = state.vms.get(&id)
    {
        let conflict = json!({"message": "The token was used with other parameters", "resourceId": id});
        return match vm.parameters == *body {
            true => Ok(id),
            false => Err(Box::new(refusal(409, "ConflictException", &conflict))),
        };
    }
    if body["imageIdentifier"] != IMAGE {
        return invalid("The image is not an ARN");
    }
    let payload = body["runHookPayload"].as_str().unwrap_or_default().to_owned();
    if payload.len() > 4096 {
        return invalid("The payload has more than 4096 bytes");
    }
    if !(1..=28800).contains(&body["maximumDurationInSeconds"].as_u64().unwrap_or_default()) {
        return invalid("A MicroVM lives for at most 8 hours");
    }
    if CONNECTORS.iter().any(|(name, arn)| body[*name] != json!([arn])) {
        return invalid("A connector is missing");
    }
    for field in ["executionRoleArn", "idlePolicy"] {
        assert!(body[field].is_null(), "{field}: the product gives none");
    }
    assert_eq!(body["logging"], json!({"disabled": {}}));
    let used = state.vms.values().filter(|vm| vm.state() != "TERMINATED").count() * MEMORY;
    if used + MEMORY > state.quota {
        let body = json!({
            "message": format!("Memory of all MicroVMs exceeds {} MB", state.quota), "quotaCode": "L-0MICROVM", "serviceCode": "lambda",
            "resourceId": "", "resourceType": "microvm",
        });
        return Err(Box::new(refusal(402, "ServiceQuotaExceededException", &body)));
    }
    state.made += 1;
    let id = format!("vm-{:04}-{}", state.made, &Uuid::new_v4().simple().to_string()[..12]);
    let (port, folder) = match &state.machines {
        Machines::At(port) => (*port, None),
        Machines::Guests(_) => (free_port(), Some(TempDir::new().expect("a folder"))),
    };
    let task = match &state.machines {
        Machines::At(_) => None,
        Machines::Guests(python) => Some((python.clone(), folder.as_ref().expect("a folder").path().to_owned())),
    };
    let vm = Vm {
        parameters: body.clone(),
        states: vec![(Instant::now(), "PENDING")],
        started: state.now(),
        ended: None,
        reason: None,
        port,
        folder,
    };
    state.vms.insert(id.clone(), vm);
    state.tokens.insert(token, id.clone());
    let (shared, boot, name) = (shared.clone(), state.boot, id.clone());
    tokio::spawn(async move {
        let booted = match task {
            None => {
                tokio::time::sleep(boot).await;
                Ok(())
            }
            Some((python, folder)) => boot_guest(&name, &python, &folder, port, &payload).await,
        };
        let mut state = shared.lock().expect("the state");
        match booted {
            Ok(()) if state.vms.get(&name).is_some_and(|vm| vm.state() == "PENDING") => state.set(&name, "RUNNING"),
            Ok(()) => {}
            Err(reason) => {
                if let Some(vm) = state.vms.get_mut(&name) {
                    vm.reason = Some(reason);
                }
                state.set(&name, "TERMINATED");
            }
        }
    });
    Ok(id)
}

/// Starts the supervisor and calls its hooks, in the order of AWS.
async fn boot_guest(id: &str, python: &PathBuf, folder: &PathBuf, port: u16, payload: &str) -> Result<(), String> {
    let hooks = free_port();
    for (name, program) in [("guest.py", GUEST_PROGRAM), ("supervisor.py", SUPERVISOR_PROGRAM)] {
        fs::write(folder.join(name), program).map_err(|error| error.to_string())?;
    }
    let log = fs::File::create(folder.join("guest.log")).map_err(|error| error.to_string())?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Not killed on drop: the stand-in signals all processes of a VM by their mark.
    let mut child = Command::new(python)
        .arg(folder.join("guest.py"))
        .env_clear()
        .env("PATH", path)
        .env("TMPDIR", folder)
        .env("GUEST_MARK", id)
        .env("GUEST_HOOK_PORT", hooks.to_string())
        .env("GUEST_AGENT_PORT", port.to_string())
        .env("GUEST_ADDRESS", "127.0.0.1")
        .env("GUEST_WORKSPACE", folder.join("workspace"))
        .env("GUEST_USER", "")
        .env("AGENT_SERVER_PYTHON", python)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        .spawn()
        .map_err(|error| error.to_string())?;
    tokio::spawn(async move { drop(child.wait().await) });
    let address = format!("127.0.0.1:{hooks}");
    let deadline = Instant::now() + Duration::from_secs(60);
    while tokio::net::TcpStream::connect(&address).await.is_err() {
        if Instant::now() > deadline {
            return Err("The supervisor does not listen".to_owned());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Something probes the port with TLS first.
    if let Ok(mut probe) = tokio::net::TcpStream::connect(&address).await {
        let _sent = probe.write_all(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").await;
    }
    let http = reqwest::Client::new();
    let call = async |hook: &str, body: Value, limit: Duration| {
        let sent = http.post(format!("http://{address}{HOOKS}/{hook}")).json(&body).timeout(limit).send().await;
        match sent {
            Ok(response) if response.status().is_success() => Ok(()),
            Ok(response) => Err(format!("Hook {hook}: status {}", response.status().as_u16())),
            Err(error) => Err(format!("Hook {hook}: {}", error.without_url())),
        }
    };
    for hook in ["ready", "validate"] {
        call(hook, json!({}), Duration::from_secs(600)).await?;
    }
    call("run", json!({"microvmId": id, "runHookPayload": payload}), Duration::from_secs(60)).await?;
    match call("run", json!({"microvmId": id, "runHookPayload": payload}), Duration::from_secs(60)).await {
        Err(reason) if reason.ends_with("409") => Ok(()),
        other => Err(format!("A second run is not refused: {other:?}")),
    }
}

/// The proxy in front of the endpoints of all VMs.
async fn at_endpoint(mut request: Incomings, state: &Mutex<State>) -> Response {
    let header =
        |name: &str| request.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    let (host, token, wanted) = (header("host"), header("x-aws-proxy-auth"), header("x-aws-proxy-port"));
    let port = {
        let mut state = state.lock().expect("the state");
        state.expire();
        let Some(id) = host.strip_suffix(DOMAIN) else { return plain(421, "Misdirected Request") };
        let wanted = wanted.parse::<u16>().unwrap_or(8080);
        match state.access.get(&token) {
            Some((vm, port, expires)) if vm == id && *port == wanted && state.now() < *expires => {}
            _ => return plain(403, "Forbidden"),
        }
        match state.vms.get(id) {
            Some(vm) if vm.state() == "RUNNING" && wanted == AGENT_SERVER_PORT => vm.port,
            _ => return plain(502, "Bad Gateway"),
        }
    };
    let secret: Vec<_> =
        request.headers().keys().filter(|name| name.as_str().starts_with("x-aws-proxy-")).cloned().collect();
    for name in secret {
        request.headers_mut().remove(name);
    }
    pass(request, &format!("127.0.0.1:{port}")).await
}
