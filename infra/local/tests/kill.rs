//! Tests of the real program with real agent servers: recovery after `kill -9`, its ports, the modes of its files.
//!
//! The agent server is installed into `target/agent-server` on first use, or `OPENHANDS_AGENT_SERVER_FOLDER`.
#![cfg(target_os = "linux")] // processes are found in /proc
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests")]

use std::collections::BTreeMap;
use std::fs::{self, Permissions, TryLockError};
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use dynoxide::{Database, ImportOptions};
use rusqlite::Connection;
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;

const LLM_API_KEY: &str = "sk-canary-5b1f0c7e9d";
/// The first boot of an agent server on a busy machine.
const BOOT: Duration = Duration::from_secs(150);
/// An install of the agent server.
const INSTALL: Duration = Duration::from_secs(900);
const SOON: Duration = Duration::from_secs(20);

/// Serializes tests that boot agent servers: two concurrent boots are slower than two consecutive ones.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A data folder. Dropping it kills all processes that use it.
struct Data {
    folder: TempDir,
}

impl Drop for Data {
    fn drop(&mut self) {
        let left = self.processes();
        for pid in &left {
            let _gone = kill_process(*pid, Signal::KILL);
        }
        // The folder can be removed after the processes have ended.
        let end = Instant::now() + SOON;
        while !self.processes().is_empty() && Instant::now() < end {
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Data {
    fn new() -> Self {
        Self { folder: TempDir::new().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn logs(&self) -> PathBuf {
        self.folder.path().join("server.log")
    }

    /// The processes of this data folder, which have its path in their command line or environment. Zombies have neither.
    fn processes(&self) -> Vec<Pid> {
        self.find(|_, own| own)
    }

    /// The agent servers of this data folder: those that hold the locks of their folders.
    fn agent_servers(&self) -> Vec<Pid> {
        let folders = fs::read_dir(self.path().join("sandboxes")).into_iter().flatten().flatten();
        let running = folders.map(|entry| entry.path()).filter(|folder| {
            fs::File::open(folder.join("agent-server.lock"))
                .is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
        });
        running
            .filter_map(|folder| {
                let pid = fs::read_to_string(folder.join("agent-server.pid")).ok()?;
                Pid::from_raw(pid.trim().parse().ok()?)
            })
            .collect()
    }

    /// The process that forks agent servers.
    fn supervisor(&self) -> Pid {
        let text = fs::read_to_string(self.path().join("sandboxes/.boot/supervisor.pid")).unwrap();
        Pid::from_raw(text.split(' ').next().unwrap().parse().unwrap()).unwrap()
    }

    fn find(&self, wanted: impl Fn(&str, bool) -> bool) -> Vec<Pid> {
        let folder = self.folder.path().to_str().unwrap();
        let read = |pid: &str, file: &str| {
            let text = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            String::from_utf8_lossy(&text).replace('\0', " ")
        };
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()))
            .filter(|pid| {
                let command = read(pid, "cmdline");
                let own = command.contains(folder) || read(pid, "environ").contains(folder);
                wanted(&command, own)
            })
            .filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
            .collect()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let agent_server = std::env::var_os("OPENHANDS_AGENT_SERVER_FOLDER")
            .map_or_else(|| workspace.join("target/agent-server"), PathBuf::from);
        let mut command = Command::new(env!("CARGO_BIN_EXE_local"));
        command
            .arg("--data")
            .arg(self.path())
            .args(arguments)
            // A separate process group, as in a shell: Ctrl-C signals the whole group.
            .process_group(0)
            .env("OPENHANDS_AGENT_SERVER_FOLDER", agent_server)
            .env("LLM_MODEL", "openai/none")
            .env("LLM_API_KEY", LLM_API_KEY)
            .env("LLM_BASE_URL", "http://127.0.0.1:9")
            // The next run continues a start after the lease of the killed run has expired.
            .env("START_LEASE_SECONDS", "5")
            .env("RUST_LOG", "debug,hyper=info,hyper_util=info")
            .env_remove("SESSION_API_KEY");
        command
    }

    /// Runs the server on a free port.
    fn run(&self, arguments: &[&str]) -> Server {
        let log = fs::OpenOptions::new().create(true).append(true).open(self.logs()).unwrap();
        let mut child = self
            .command(&["--port", "0"])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::from(log))
            .spawn()
            .unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        // Created first, so that the process is killed if the rest fails.
        let mut server = Server { child, base: String::new(), http: reqwest::Client::new() };
        let mut line = String::new();
        while output.read_line(&mut line).unwrap() > 0 {
            if let Some(base) = line.trim().strip_prefix("Listening on ") {
                base.clone_into(&mut server.base);
                // The pipe has to be read to its end, or the server would block when it is full.
                thread::spawn(move || output.read_to_end(&mut Vec::new()));
                return server;
            }
            line.clear();
        }
        panic!("the server did not print its address:\n{}", fs::read_to_string(self.logs()).unwrap());
    }

    /// Runs the program with arguments that it refuses, and returns its error output.
    fn refusal(&self, arguments: &[&str]) -> String {
        let mut child = self.command(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut output = child.stderr.take().unwrap();
        let reader = thread::spawn(move || {
            let mut text = String::new();
            output.read_to_string(&mut text).map(|_| text).unwrap()
        });
        let mut server = Server { child, base: String::new(), http: reqwest::Client::new() };
        let status = server.ended(SOON);
        let text = reader.join().unwrap();
        assert_eq!(status.code(), Some(1), "{arguments:?} must be refused: {text}");
        assert!(!text.contains("panicked"), "{text}");
        text
    }

    /// The files below the data folder, except those of sandboxes, that contain this text.
    fn files_with(&self, text: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.path()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(&folder).unwrap().map(Result::unwrap) {
                let kind = entry.file_type().unwrap();
                if kind.is_dir() && entry.path() != self.path().join("sandboxes") {
                    folders.push(entry.path());
                } else if kind.is_file() && contains(&fs::read(entry.path()).unwrap(), text) {
                    found.push(entry.path());
                }
            }
        }
        found
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|window| window == text.as_bytes())
}

/// A running server process. Dropping it kills the process.
struct Server {
    child: Child,
    base: String,
    http: reqwest::Client,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

impl Server {
    /// `kill -9`.
    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends a signal to the process group, as a terminal does, and returns the exit status.
    fn stop(mut self, signal: Signal) -> ExitStatus {
        kill_process_group(Pid::from_child(&self.child), signal).unwrap();
        self.ended(SOON)
    }

    fn ended(&mut self, within: Duration) -> ExitStatus {
        let end = Instant::now() + within;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "the program still runs after {within:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    async fn get(&self, path: &str) -> Value {
        let answer = self.http.get(format!("{}{path}", self.base)).send().await.unwrap();
        assert_eq!(answer.status(), 200, "GET {path}");
        answer.json().await.unwrap()
    }

    async fn alive(&self, within: Duration) {
        wait_for("/alive answers 200", within, async || {
            let answer = self.http.get(format!("{}/alive", self.base)).send().await.ok()?;
            (answer.status() == 200).then_some(())
        })
        .await;
    }

    /// Creates a start and returns the id of its task.
    async fn start(&self, request: &Value) -> String {
        let url = format!("{}/api/v1/app-conversations", self.base);
        let answer = self.http.post(url).json(request).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        answer.json::<Value>().await.unwrap()["id"].as_str().unwrap().to_owned()
    }

    async fn task(&self, id: &str) -> Value {
        self.get(&format!("/api/v1/app-conversations/start-tasks?ids={id}")).await[0].take()
    }

    async fn finished(&self, id: &str) -> Value {
        wait_for("the start is READY or ERROR", BOOT, async || {
            Some(self.task(id).await).filter(|task| task["status"] == "READY" || task["status"] == "ERROR")
        })
        .await
    }

    async fn ready(&self, id: &str) -> Value {
        let task = self.finished(id).await;
        assert_eq!(task["status"], "READY", "{task:#}");
        task
    }

    /// The only conversation of the server.
    async fn conversation(&self) -> Value {
        let mut found = self.get("/api/v1/app-conversations/search").await;
        assert_eq!(found["items"].as_array().map(Vec::len), Some(1), "{found:#}");
        found["items"][0].take()
    }
}

async fn wait_for<T>(what: &str, within: Duration, mut probe: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + within;
    loop {
        if let Some(found) = probe().await {
            return found;
        }
        assert!(Instant::now() < end, "after {within:?} still not: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The number of conversations that the conversation's agent server has, requested with the key in the API's response.
async fn conversations_of_agent_server(conversation: &Value) -> usize {
    let url = conversation["conversation_url"].as_str().unwrap();
    let (server, id) = url.split_once("/api/conversations/").unwrap();
    assert_eq!(id, conversation["id"].as_str().unwrap());
    let key = conversation["session_api_key"].as_str().unwrap();
    let http = reqwest::Client::new();
    let get = async |url: String| {
        http.get(url).header("x-session-api-key", key).send().await.unwrap().error_for_status().unwrap()
    };
    get(url.to_owned()).await;
    let count = get(format!("{server}/api/conversations/count")).await.json::<Value>().await.unwrap();
    usize::try_from(count.as_u64().unwrap()).unwrap()
}

/// Versions before the supervisor booted each agent server as a new Python, and so does this one where no supervisor can run. What both leave
/// on disk is the same. The next run that has a supervisor adopts these agent servers, uses, pauses and ends them.
#[tokio::test]
async fn agent_servers_that_booted_plainly_are_adopted_by_a_run_that_forks() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let data = Data::new();
    let boot = data.path().join("sandboxes/.boot");
    fs::create_dir_all(data.path().join("sandboxes")).unwrap();
    fs::write(&boot, "no folder, so that there is no supervisor").unwrap();
    let how = async |server: &Server, expected: &str| {
        wait_for(&format!("/ready says {expected}"), BOOT, async || {
            let how = server.get("/ready").await["parts"]["sandbox_boot"].as_str().unwrap_or_default().to_owned();
            how.starts_with(expected).then_some(how)
        })
        .await
    };
    let server = data.run(&[]);
    server.alive(INSTALL).await;
    let reason = how(&server, "plain: ").await;
    assert!(reason.starts_with("plain: the supervisor cannot be started: "), "{reason}");
    let task = server.ready(&server.start(&json!({"title": "Before the supervisor"})).await).await;
    let sandbox = task["sandbox_id"].as_str().unwrap().to_owned();
    let start_time = data.path().join("sandboxes").join(&sandbox).join("agent-server.start");
    assert!(!start_time.exists(), "it is of forked ones");
    let agent_servers = data.agent_servers();
    assert_eq!(agent_servers.len(), 1);
    server.kill();

    fs::remove_file(&boot).unwrap();
    let server = data.run(&[]);
    server.alive(INSTALL).await;
    how(&server, "fork").await;
    assert_eq!(data.agent_servers(), agent_servers, "it is adopted");
    assert_eq!(conversations_of_agent_server(&server.conversation().await).await, 1);
    server.ready(&server.start(&json!({"sandbox_id": sandbox})).await).await;
    for action in ["pause", "resume"] {
        let url = format!("{}/api/v1/sandboxes/{sandbox}/{action}", server.base);
        assert_eq!(server.http.post(url).send().await.unwrap().status(), 200, "{action}");
    }
    server.ready(&server.start(&json!({"sandbox_id": sandbox})).await).await;
    assert_eq!(data.agent_servers(), agent_servers, "neither has replaced it");
    assert!(server.stop(Signal::INT).success());
    assert!(data.agent_servers().is_empty(), "the end of a run ends it");

    // It boots by fork from then on.
    let server = data.run(&[]);
    server.alive(INSTALL).await;
    server.ready(&server.start(&json!({"sandbox_id": sandbox})).await).await;
    assert!(start_time.exists(), "it was forked");
    assert_ne!(data.agent_servers(), agent_servers);
}

#[tokio::test]
async fn a_start_survives_two_killed_servers_and_later_runs_adopt_its_agent_server() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let data = Data::new();
    let server = data.run(&[]);
    server.alive(INSTALL).await;
    let task = server.start(&json!({"title": "Killed twice"})).await;
    server.kill();

    let server = data.run(&[]);
    wait_for("the start waits for the launched agent server", BOOT, async || {
        (server.task(&task).await["status"] == "WAITING_FOR_SANDBOX" && !data.agent_servers().is_empty()).then_some(())
    })
    .await;
    let agent_servers = data.agent_servers();
    let supervisor = data.supervisor();
    server.kill();
    // It may still import modules, and ends then.
    wait_for("the supervisor ends with the server", BOOT, async || {
        (!data.processes().contains(&supervisor)).then_some(())
    })
    .await;

    let server = data.run(&[]);
    let ready = server.ready(&task).await;
    assert_eq!(data.agent_servers(), agent_servers, "the one that the killed server had launched");
    assert_eq!(agent_servers.len(), 1);
    let before = server.conversation().await;
    assert_eq!(before["id"], ready["app_conversation_id"]);
    assert_eq!(before["sandbox_status"], "RUNNING");
    assert_eq!(conversations_of_agent_server(&before).await, 1);
    server.kill();

    let server = data.run(&[]);
    let after = server.conversation().await;
    for field in ["id", "sandbox_id", "sandbox_status", "conversation_url", "session_api_key"] {
        assert_eq!(after[field], before[field], "{field}");
    }
    assert_eq!(conversations_of_agent_server(&after).await, 1);
    assert_eq!(data.agent_servers(), agent_servers);
    server.kill();
    kill_process(agent_servers[0], Signal::KILL).unwrap();

    let server = data.run(&[]);
    let gone = server.conversation().await;
    assert_eq!(gone["sandbox_status"], "MISSING");
    assert_eq!(gone["session_api_key"], Value::Null);
    assert_eq!(data.agent_servers(), []);
    assert!(server.stop(Signal::TERM).success());
}

#[tokio::test]
async fn a_stopped_server_leaves_no_process_and_keeps_its_sandboxes_and_its_secrets() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let data = Data::new();
    let server = data.run(&["--log", "json"]);
    server.alive(INSTALL).await;
    let task = server.start(&json!({"secrets": {"TOKEN": "canary-of-the-request-77"}})).await;

    // As early as possible: the agent server's process has just been created.
    wait_for("the agent server is launched", BOOT, async || {
        fs::read_to_string(data.logs()).unwrap().contains("sandbox.launched").then_some(())
    })
    .await;
    assert!(server.stop(Signal::INT).success());
    assert_eq!(data.processes(), [], "after Ctrl-C in mid-start");

    let server = data.run(&["--log", "json"]);
    server.ready(&task).await;
    let running = server.conversation().await;
    assert_eq!(running["sandbox_status"], "RUNNING");
    assert_eq!(conversations_of_agent_server(&running).await, 1);
    assert!(server.stop(Signal::TERM).success());
    assert_eq!(data.processes(), [], "after SIGTERM with a running sandbox");

    let server = data.run(&["--log", "json"]);
    let paused = server.conversation().await;
    assert_eq!(paused["sandbox_status"], "PAUSED");
    assert_eq!(paused["session_api_key"], Value::Null);
    assert!(server.stop(Signal::INT).success());

    let log = fs::read_to_string(data.logs()).unwrap();
    for line in log.lines().filter(|line| line.starts_with('{')) {
        serde_json::from_str::<Value>(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    }
    assert!(log.lines().filter(|line| line.contains("start.advanced")).all(|line| line.starts_with('{')), "{log}");
    let session_key = running["session_api_key"].as_str().unwrap();
    for secret in [LLM_API_KEY, session_key, "canary-of-the-request-77"] {
        assert!(!log.contains(secret), "{secret} is in the log");
        assert_eq!(data.files_with(secret), Vec::<PathBuf>::new(), "{secret} is in clear");
    }
    // Checks the search itself: it finds a text that the files contain.
    assert_ne!(data.files_with(running["id"].as_str().unwrap()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_server_without_sandboxes_is_alive_at_once_and_its_starts_fail_with_the_reason() {
    let data = Data::new();
    let server = data.run(&["--sandbox", "none", "--log", "json", "--agent-server", "/nonexistent/agent-server"]);
    server.alive(SOON).await;
    let task = server.start(&json!({})).await;
    let failed = server.finished(&task).await;
    assert_eq!(failed["status"], "ERROR");
    assert!(failed["detail"].as_str().unwrap().contains("--sandbox none"), "{failed:#}");

    let text = data.refusal(&["--sandbox", "none", "--port", "0"]);
    assert!(text.contains("in use by another process"), "{text}");

    assert!(server.stop(Signal::TERM).success());
    assert_eq!(data.processes(), []);
    let log = fs::read_to_string(data.logs()).unwrap();
    let lines: Vec<&str> = log.lines().filter(|line| line.starts_with('{')).collect();
    assert!(!lines.is_empty());
    assert!(lines.iter().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{log}");
}

#[test]
fn invalid_options_are_refused_with_a_message() {
    let data = Data::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    let text = data.refusal(&["--sandbox", "none", "--port", &port]);
    assert!(text.contains(&format!("Port {port}")) && text.contains("--port"), "{text}");

    let text = data.refusal(&["--port", "0", "--python", "/nonexistent/python"]);
    assert!(text.contains("--python /nonexistent/python: no such file"), "{text}");
    let text = data.refusal(&["--port", "0", "--python", "/bin/sh"]);
    assert!(text.contains("--python /bin/sh"), "{text}");

    let text = data.refusal(&["--port", "0", "--settings", "/nonexistent/settings.json"]);
    assert!(text.contains("/nonexistent/settings.json cannot be used"), "{text}");
    let settings = data.folder.path().join("settings.json");
    for content in ["[1, 2]", "{\"llm_model\": ", ""] {
        fs::write(&settings, content).unwrap();
        let text = data.refusal(&["--port", "0", "--settings", settings.to_str().unwrap()]);
        assert!(text.contains("settings.json cannot be used"), "{content}: {text}");
    }
}

#[test]
fn options_may_precede_or_follow_a_command() {
    let data = Data::new();
    for arguments in
        [["--sandbox", "none", "--port", "4321", "engines"], ["engines", "--sandbox", "none", "--port", "4321"]]
    {
        let environment = data.folder.path().join("environment");
        let mut command = data.command(&arguments);
        let child = command.arg("--env-file").arg(&environment).stderr(Stdio::null()).spawn().unwrap();
        let server = Server { child, base: String::new(), http: reqwest::Client::new() };
        let end = Instant::now() + SOON;
        while !environment.exists() {
            assert!(Instant::now() < end, "{arguments:?}: no environment was written");
            thread::sleep(Duration::from_millis(20));
        }
        let text = fs::read_to_string(&environment).unwrap();
        for line in ["SANDBOX_KIND='none'\n", "SINGLE_USER='true'\n", "AWS_ENDPOINT_URL_SQS='http://127.0.0.1:"] {
            assert!(text.contains(line), "{text}");
        }
        assert!(server.stop(Signal::INT).success());
        fs::remove_file(&environment).unwrap();
    }
}

/// The addresses that a process listens on with TCP.
fn listening(pid: Pid) -> Vec<String> {
    let pid = pid.as_raw_nonzero();
    let sockets: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        // The descriptor may have been closed meanwhile.
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter_map(|target| Some(target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let mut found = Vec::new();
    for table in ["tcp", "tcp6"] {
        // Without IPv6 there is no such table.
        for line in fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default().lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            // State 0A is LISTEN; the tenth field is the inode.
            if fields[3] == "0A" && sockets.iter().any(|socket| socket == fields[9]) {
                found.push(format!("{table} {}", fields[1]));
            }
        }
    }
    found
}

/// The format of `/proc/net/tcp`.
fn loopback(port: u16) -> String {
    format!("tcp 0100007F:{port:04X}")
}

#[tokio::test]
async fn the_process_listens_on_one_port_and_each_agent_server_on_one() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let data = Data::new();
    let server = data.run(&[]);
    server.alive(INSTALL).await;
    let task = server.start(&json!({})).await;
    server.ready(&task).await;
    let port = server.base.rsplit(':').next().unwrap().parse().unwrap();
    assert_eq!(listening(Pid::from_child(&server.child)), [loopback(port)]);
    let agent_servers = data.agent_servers();
    assert_eq!(agent_servers.len(), 1);
    let conversation = server.conversation().await;
    let url = conversation["conversation_url"].as_str().unwrap();
    let (address, _) = url.split_once("/api/").unwrap();
    let port = address.rsplit(':').next().unwrap().parse().unwrap();
    assert!(listening(agent_servers[0]).contains(&loopback(port)), "{:?}", listening(agent_servers[0]));
    // All other processes of the data folder listen on loopback only.
    for pid in data.processes() {
        for address in listening(pid) {
            assert!(address.starts_with("tcp 0100007F:"), "{pid:?} listens on {address}");
        }
    }
    assert!(server.stop(Signal::TERM).success());
}

/// The engines for functions under `cargo lambda watch`.
#[test]
fn engines_listen_on_three_ports_of_loopback() {
    let data = Data::new();
    let environment = data.folder.path().join("environment");
    let mut command = data.command(&["--sandbox", "none", "engines"]);
    let child = command.arg("--env-file").arg(&environment).stderr(Stdio::null()).spawn().unwrap();
    let server = Server { child, base: String::new(), http: reqwest::Client::new() };
    let end = Instant::now() + SOON;
    while !environment.exists() {
        assert!(Instant::now() < end, "no environment was written");
        thread::sleep(Duration::from_millis(20));
    }
    let addresses = listening(Pid::from_child(&server.child));
    assert_eq!(addresses.len(), 3, "{addresses:?}");
    assert!(addresses.iter().all(|address| address.starts_with("tcp 0100007F:")), "{addresses:?}");
    assert_eq!(fs::metadata(&environment).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(server.stop(Signal::INT).success());
}

/// The files and folders of a data folder to which other users than the owner have access. Symbolic links are skipped.
fn open_to_others(data: &Path) -> Vec<(PathBuf, u32)> {
    let (mut found, mut folders) = (Vec::new(), vec![data.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            let metadata = entry.metadata().unwrap();
            let mode = metadata.permissions().mode() & 0o777;
            if metadata.is_symlink() {
                continue;
            }
            if mode & 0o077 != 0 {
                found.push((entry.path(), mode));
            }
            if metadata.is_dir() {
                folders.push(entry.path());
            }
        }
    }
    found
}

#[tokio::test]
async fn a_data_folder_becomes_private_and_workspaces_keep_their_modes() {
    let data = Data::new();
    let folder = data.path();
    let server = data.run(&["--sandbox", "none"]);
    server.alive(SOON).await;
    let content =
        json!({"title": "large", "initial_message": {"content": [{"type": "text", "text": "x".repeat(9000)}]}});
    server.start(&content).await;
    assert_eq!(open_to_others(&folder), []);
    assert!(server.stop(Signal::TERM).success());

    // The modes of a data folder of an earlier version, or of a copy.
    let sandbox = folder.join("sandboxes/one");
    let workspace = sandbox.join("workspace/project");
    fs::create_dir_all(&workspace).unwrap();
    for file in [sandbox.join("agent-server.log"), sandbox.join("agent-server.lock"), workspace.join("run.sh")] {
        fs::write(file, "").unwrap();
    }
    fs::write(folder.join("functions.env"), "export AWS_SECRET_ACCESS_KEY='…'").unwrap();
    let mut folders = vec![folder.clone()];
    while let Some(folder) = folders.pop() {
        fs::set_permissions(&folder, Permissions::from_mode(0o755)).unwrap();
        for entry in fs::read_dir(&folder).unwrap().map(Result::unwrap) {
            match entry.file_type().unwrap().is_dir() {
                true => folders.push(entry.path()),
                false => fs::set_permissions(entry.path(), Permissions::from_mode(0o644)).unwrap(),
            }
        }
    }
    assert!(open_to_others(&folder).len() > 10);

    let server = data.run(&["--sandbox", "none"]);
    server.alive(SOON).await;
    server.start(&content).await;
    let left: Vec<_> =
        open_to_others(&folder).into_iter().filter(|(path, _)| *path != sandbox.join("workspace")).collect();
    assert_eq!(
        left,
        [(workspace.clone(), 0o755), (workspace.join("run.sh"), 0o644)],
        "files of a workspace keep their modes"
    );
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!([mode(&folder), mode(&sandbox), mode(&folder.join("functions.env"))], [0o700, 0o700, 0o600]);
    // The umask is unchanged, so child processes create files with the usual modes.
    let umask = |pid: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find_map(|line| Some(line.strip_prefix("Umask:")?.trim().to_owned())).unwrap()
    };
    assert_eq!(umask(&server.child.id().to_string()), umask("self"));
    assert!(server.stop(Signal::TERM).success());
}

/// Unpacks the data folder of an earlier commit, and adds rows, so that its migration takes a while.
fn large_data_folder(folder: &Path) {
    let archive = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/data-folders/6132741.tar.gz");
    fs::create_dir_all(folder).unwrap();
    assert!(Command::new("tar").arg("-xzf").arg(archive).arg("-C").arg(folder).status().unwrap().success());
    let database = Database::new(folder.join("dynamodb.sqlite").to_str().unwrap()).unwrap();
    let text = |text: String| json!({"S": text});
    let rows =
        |row: &dyn Fn(u128) -> Value| (0..3000).map(|number| serde_json::from_value(row(number)).unwrap()).collect();
    let user = |number: u128| text(format!("user-{}", number % 50));
    let id = |number: u128| text(format!("{:032x}", number << 64));
    let conversations = rows(
        &|number| json!({"user": user(number), "id": id(number), "sandbox_id": id(number % 50), "created_sort": id(number)}),
    );
    let sandboxes =
        rows(&|number| json!({"user": user(number), "id": id(number % 100), "wanted": text("running".into())}));
    let users = rows(
        &|number| json!({"user": user(number), "kind": text(format!("export#{number}")), "sealed": text("x".repeat(200))}),
    );
    for (table, rows) in [("conversations", conversations), ("sandboxes", sandboxes), ("users", users)] {
        database.import_items(&format!("openhands-{table}"), rows, ImportOptions::default()).unwrap();
    }
}

/// The items of a table or the entries of an index, by their keys.
type Rows = BTreeMap<(String, String), Value>;

/// The version of a database, and its items and index entries.
fn contents(file: &Path) -> (u32, BTreeMap<String, Rows>) {
    let connection = Connection::open(file).unwrap();
    let version = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
    let names = "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'openhands-%'";
    let mut names = connection.prepare(names).unwrap();
    let names: Vec<String> = names.query_map([], |row| row.get(0)).unwrap().map(Result::unwrap).collect();
    let in_20_days = shared::Time::now().plus(Duration::from_secs(20 * 24 * 3600)).sortable();
    let items = |name: &String| {
        let mut rows = connection.prepare(&format!("SELECT * FROM \"{name}\"")).unwrap();
        let item_column = rows.column_index("item_json").unwrap();
        let rows = rows.query_map([], |row| {
            let item: String = row.get(item_column)?;
            let keys: (String, String) = (row.get(0)?, row.get(1)?);
            Ok((keys.0, keys.1, item))
        });
        let items = rows.unwrap().map(Result::unwrap);
        let items = items.map(|(first, mut second, item)| {
            let mut item: Value = serde_json::from_str(&item).unwrap();
            // The time of the migration decides when a failed start expires: those times differ from run to run, in the rows and in the
            // keys of the index of unfinished starts.
            let due = item["due_at"]["S"].as_str().filter(|due| **due > *in_20_days).map(str::to_owned);
            if let Some(due) = due {
                second = second.replace(&due, "later");
                let attributes = item.as_object_mut().unwrap();
                attributes.remove("due_at");
                attributes.remove("expires_at");
            }
            // An index may have several entries with the same keys.
            let id = format!("{} {}", item["id"], item["kind"]);
            ((first, format!("{second} {id}")), item)
        });
        items.collect()
    };
    (version, names.iter().map(|name| (name.clone(), items(name))).collect())
}

#[test]
fn a_migration_that_is_killed_loses_nothing() {
    const ROUNDS: u32 = 6;
    let list = ["api-key", "list"];
    let migrate = |data: &Data| {
        let child = data.command(&list).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        Server { child, base: String::new(), http: reqwest::Client::new() }
    };
    let (template, reference) = (TempDir::new().unwrap(), Data::new());
    large_data_folder(template.path());
    let copy = |data: &Data| {
        let copied = Command::new("cp").arg("-a").arg(template.path()).arg(data.path()).status();
        assert!(copied.unwrap().success());
    };
    let (_, before) = contents(&template.path().join("dynamodb.sqlite"));
    copy(&reference);
    let start = Instant::now();
    assert!(migrate(&reference).ended(INSTALL).success());
    let duration = start.elapsed();
    let after = contents(&reference.path().join("dynamodb.sqlite"));
    assert_eq!(after.0, 2);
    assert_ne!(after.1, before);

    let mut interrupted = 0;
    for round in 0..ROUNDS {
        let data = Data::new();
        copy(&data);
        // Twice, so that a migration that starts again is killed as well.
        for _ in 0..2 {
            let server = migrate(&data);
            thread::sleep(duration * (round + 1) / (ROUNDS + 1));
            server.kill();
            interrupted += u32::from(data.path().join("dynamodb.sqlite.migrating").exists());
            // SQLite would finish the transaction of the killed process in the original, so a copy is read.
            let looked_at = TempDir::new().unwrap();
            for name in ["dynamodb.sqlite", "dynamodb.sqlite-wal"] {
                if data.path().join(name).exists() {
                    fs::copy(data.path().join(name), looked_at.path().join(name)).unwrap();
                }
            }
            let found = contents(&looked_at.path().join("dynamodb.sqlite"));
            match found.0 {
                0 => assert_eq!(found.1, before, "round {round}"),
                _ => assert_eq!(found, after, "round {round}"),
            }
        }
        assert!(migrate(&data).ended(INSTALL).success());
        assert_eq!(contents(&data.path().join("dynamodb.sqlite")), after, "round {round}");
        assert_eq!(contents(&data.path().join("dynamodb.sqlite.before-2")).1, before, "round {round}");
        assert!(!data.path().join("dynamodb.sqlite.migrating").exists());
    }
    assert!(interrupted > 0, "no migration was interrupted");
}
