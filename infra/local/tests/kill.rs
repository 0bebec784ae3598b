//! The real program: `kill -9` and what the next run makes of it, on real agent servers; its ports; the modes of its files.
//!
//! The agent server is installed into `target/agent-server` on first use, or `OPENHANDS_AGENT_SERVER_FOLDER`.
#![cfg(target_os = "linux")] // processes are found in /proc
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, reason = "tests")]

use std::fs::{self, Permissions};
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;

const LLM_API_KEY: &str = "sk-canary-5b1f0c7e9d";
/// The first boot of an agent server on a busy machine.
const BOOT: Duration = Duration::from_secs(150);
/// An install, when there is none yet.
const INSTALL: Duration = Duration::from_secs(900);
const SOON: Duration = Duration::from_secs(20);

/// For tests that boot agent servers: two at once take longer than one after the other.
static ONE_AT_A_TIME: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A data folder and whatever processes come to live on it; they end with it.
struct Data {
    folder: TempDir,
}

impl Drop for Data {
    fn drop(&mut self) {
        let left = self.processes();
        for pid in &left {
            let _gone = kill_process(*pid, Signal::KILL);
        }
        // Their files can be removed once they are gone.
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

    /// All processes of this data folder: it is in their command line or environment. Zombies are none.
    fn processes(&self) -> Vec<Pid> {
        self.find(|_, own| own)
    }

    /// Its agent servers, without processes that they forked.
    fn agent_servers(&self) -> Vec<Pid> {
        let all = self.find(|command, own| own && command.contains("-m openhands.agent_server "));
        all.iter().copied().filter(|pid| !all.iter().any(|other| Some(*other) == parent(*pid))).collect()
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
            // A group of its own, as a shell gives it: Ctrl-C goes to all of the group.
            .process_group(0)
            .env("OPENHANDS_AGENT_SERVER_FOLDER", agent_server)
            .env("LLM_MODEL", "openai/none")
            .env("LLM_API_KEY", LLM_API_KEY)
            .env("LLM_BASE_URL", "http://127.0.0.1:9")
            // The next run goes on when the killed one's claims have run out.
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
        let mut said = BufReader::new(child.stdout.take().unwrap());
        // Made at once, so that it is ended should the rest fail.
        let mut server = Server { child, base: String::new(), http: reqwest::Client::new() };
        let mut line = String::new();
        while said.read_line(&mut line).unwrap() > 0 {
            if let Some(base) = line.trim().strip_prefix("Listening on ") {
                base.clone_into(&mut server.base);
                // Whatever else it says must find a reader.
                thread::spawn(move || said.read_to_end(&mut Vec::new()));
                return server;
            }
            line.clear();
        }
        panic!("the server did not say where it listens:\n{}", fs::read_to_string(self.logs()).unwrap());
    }

    /// Runs the program for what it says as it refuses to run.
    fn refusal(&self, arguments: &[&str]) -> String {
        let mut child = self.command(arguments).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut said = child.stderr.take().unwrap();
        let reader = thread::spawn(move || {
            let mut text = String::new();
            said.read_to_string(&mut text).map(|_| text).unwrap()
        });
        let mut server = Server { child, base: String::new(), http: reqwest::Client::new() };
        let status = server.ended(SOON);
        let text = reader.join().unwrap();
        assert_eq!(status.code(), Some(1), "{arguments:?} must be refused: {text}");
        assert!(!text.contains("panicked"), "{text}");
        text
    }

    /// Files below the data folder, without those of the sandboxes, that hold this text in clear.
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

fn parent(pid: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    Pid::from_raw(fields.split(' ').nth(1)?.parse().ok()?)
}

/// A run of the program; killed when it is dropped.
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

    /// Sends a signal to its process group, as a terminal does, and returns how it ended.
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

    /// Begins a start; returns the id of its task.
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

    /// The only conversation there is.
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
        assert!(Instant::now() < end, "still not so after {within:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// How many conversations the conversation's agent server has, asked with the key that we show.
async fn conversations_there(conversation: &Value) -> usize {
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

#[tokio::test]
async fn a_start_outlives_two_killed_servers_and_later_runs_adopt_its_agent_server_until_that_dies_too() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let data = Data::new();
    let server = data.run(&[]);
    server.alive(INSTALL).await;
    let task = server.start(&json!({"title": "Killed twice"})).await;
    server.kill();

    let server = data.run(&[]);
    wait_for("the agent server is launched and waited for", BOOT, async || {
        (server.task(&task).await["status"] == "WAITING_FOR_SANDBOX" && !data.agent_servers().is_empty()).then_some(())
    })
    .await;
    let agent_servers = data.agent_servers();
    server.kill();

    let server = data.run(&[]);
    let ready = server.ready(&task).await;
    assert_eq!(data.agent_servers(), agent_servers, "the one that the killed server had launched");
    assert_eq!(agent_servers.len(), 1);
    let before = server.conversation().await;
    assert_eq!(before["id"], ready["app_conversation_id"]);
    assert_eq!(before["sandbox_status"], "RUNNING");
    assert_eq!(conversations_there(&before).await, 1);
    server.kill();

    let server = data.run(&[]);
    let after = server.conversation().await;
    for field in ["id", "sandbox_id", "sandbox_status", "conversation_url", "session_api_key"] {
        assert_eq!(after[field], before[field], "{field}");
    }
    assert_eq!(conversations_there(&after).await, 1);
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

    // As early as can be: the agent server's process is an instant old.
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
    assert_eq!(conversations_there(&running).await, 1);
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
    // The search finds what is there.
    assert_ne!(data.files_with(running["id"].as_str().unwrap()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn a_server_without_sandboxes_is_alive_at_once_and_its_starts_say_that_it_has_none() {
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
fn what_cannot_work_is_refused_with_a_sentence() {
    let data = Data::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let said = data.refusal(&["--sandbox", "none", "--port", &port]);
    assert!(said.contains(&format!("Port {port}")) && said.contains("--port"), "{said}");

    let said = data.refusal(&["--port", "0", "--python", "/nonexistent/python"]);
    assert!(said.contains("--python /nonexistent/python: no such file"), "{said}");
    let said = data.refusal(&["--port", "0", "--python", "/bin/sh"]);
    assert!(said.contains("--python /bin/sh"), "{said}");

    let said = data.refusal(&["--port", "0", "--settings", "/nonexistent/settings.json"]);
    assert!(said.contains("/nonexistent/settings.json cannot be used"), "{said}");
    let settings = data.folder.path().join("settings.json");
    for text in ["[1, 2]", "{\"llm_model\": ", ""] {
        fs::write(&settings, text).unwrap();
        let said = data.refusal(&["--port", "0", "--settings", settings.to_str().unwrap()]);
        assert!(said.contains("settings.json cannot be used"), "{text}: {said}");
    }
}

#[test]
fn options_may_stand_before_and_behind_a_command() {
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
        // A descriptor may be closed meanwhile.
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

/// As `/proc/net/tcp` writes it.
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
    // Whatever else belongs to the product listens on loopback alone.
    for pid in data.processes() {
        for address in listening(pid) {
            assert!(address.starts_with("tcp 0100007F:"), "{pid:?} listens on {address}");
        }
    }
    assert!(server.stop(Signal::TERM).success());
}

/// For the functions under `cargo lambda watch`.
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

/// The files and folders of a data folder that others than its owner may use, without what agents make.
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
async fn a_data_folder_that_was_open_to_all_is_its_owners_alone_and_workspaces_stay_as_they_are() {
    let data = Data::new();
    let folder = data.path();
    let server = data.run(&["--sandbox", "none"]);
    server.alive(SOON).await;
    let content =
        json!({"title": "large", "initial_message": {"content": [{"type": "text", "text": "x".repeat(9000)}]}});
    server.start(&content).await;
    assert_eq!(open_to_others(&folder), []);
    assert!(server.stop(Signal::TERM).success());

    // As an earlier version left it, or a copy.
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
    assert_eq!(left, [(workspace.clone(), 0o755), (workspace.join("run.sh"), 0o644)], "what git has made stays");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!([mode(&folder), mode(&sandbox), mode(&folder.join("functions.env"))], [0o700, 0o700, 0o600]);
    // Files that the server's children make have the modes that they would have without it.
    let umask = |pid: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        status.lines().find_map(|line| Some(line.strip_prefix("Umask:")?.trim().to_owned())).unwrap()
    };
    assert_eq!(umask(&server.child.id().to_string()), umask("self"));
    assert!(server.stop(Signal::TERM).success());
}
