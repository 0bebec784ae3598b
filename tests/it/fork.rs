//! Sandboxes that boot by fork: what a forked agent server sees, and what happens when the supervisor or an agent server ends.
//! `tests/supervisor_test.py` has the tests of the supervisor alone.
#![cfg(target_os = "linux")]

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead as _, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use local::agent_server::find_python;
use reqwest::StatusCode;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use shared::http_client::HttpClient;
use shared::sandbox::{Sandbox, SandboxService as _, SandboxStatus};
use shared::user::UserId;

use crate::support::product::{Product, logged, text};
use crate::support::wait::{wait_for, wait_until};

const LIMIT: Duration = Duration::from_secs(120);

/// Reports from inside an agent server. It is imported as the module of a tool.
const PROBE: &str = r#"
import gc, json, os, pathlib, random, ssl, sys, uuid
import openhands.sdk.skills.skill as skill
from openhands.sdk.tool.registry import register_tool  # the agent server has it

def hello(context):
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    try:
        context.wrap_bio(incoming, outgoing, server_hostname="example.com").do_handshake()
    except ssl.SSLWantReadError:
        pass
    return outgoing.read().hex()

gc.unfreeze()  # otherwise those of before the fork are not listed
objects = gc.get_objects()
contexts = [o for o in objects if isinstance(o, ssl.SSLContext) and o.protocol != ssl.PROTOCOL_TLS_SERVER]
generators = [o for o in objects if isinstance(o, random.Random)]
try:
    import fastuuid
    fast = [str(fastuuid.uuid4())]
except ImportError:
    fast = []
found = {
    "environment": dict(os.environ),
    "arguments": sys.argv,
    "random": [random.random(), random.getrandbits(64), str(uuid.uuid4()), ssl.RAND_bytes(16).hex(), os.urandom(8).hex()]
        + fast + [hello(context) for context in contexts] + [generator.random() for generator in generators],
    "contexts": len(contexts),
    "generators": len(generators),
    "skills": [str(path) for path in skill.USER_SKILLS_DIRS],
    "paths": sorted({str(o) for o in objects if isinstance(o, pathlib.PurePath) and "home" in str(o)}),
    "homes": sorted({str(o) for o in objects if isinstance(o, pathlib.PurePath) and "home-of-the-sandbox" in str(o)}),
    "session": os.getsid(0),
}
with open(os.environ["HOME"] + "/probe.json.new", "w") as file:
    json.dump(found, file)
os.rename(file.name, os.environ["HOME"] + "/probe.json")
"#;

async fn product() -> Product {
    let product = Product::start(json!({"llm_model": "openai/any", "llm_api_key": "key-of-the-model"})).await;
    forks(&product).await;
    product
}

/// How sandboxes boot, as `/ready` reports it.
async fn boot_state(product: &Product) -> String {
    text(&product.get_from("/ready").await["parts"]["sandbox_boot"])
}

async fn forks(product: &Product) {
    wait_until("sandboxes boot by fork", LIMIT, async || boot_state(product).await == "fork").await;
}

fn supervisor(product: &Product) -> Pid {
    let file = fs::read_to_string(product.data().join("sandboxes/.boot/supervisor.pid")).expect("its process id");
    let pid = file.split(' ').next().and_then(|pid| pid.parse().ok());
    Pid::from_raw(pid.expect("a number")).expect("a process id")
}

fn folder(product: &Product, id: &str) -> PathBuf {
    product.data().join("sandboxes").join(id)
}

fn agent_server(product: &Product, id: &str) -> Pid {
    let pid = fs::read_to_string(folder(product, id).join("agent-server.pid")).expect("its process id");
    Pid::from_raw(pid.trim().parse().expect("a number")).expect("a process id")
}

fn of_process(pid: Pid, file: &str) -> PathBuf {
    format!("/proc/{}/{file}", pid.as_raw_nonzero()).into()
}

/// Whether the process exists, as a zombie or not.
fn exists(pid: Pid) -> bool {
    of_process(pid, "stat").exists()
}

/// Whether a running agent server was forked: it shows the command line of the supervisor.
fn was_forked(product: &Product, id: &str) -> bool {
    let command = fs::read(of_process(agent_server(product, id), "cmdline")).expect("it runs");
    String::from_utf8_lossy(&command).contains("/.boot/supervisor-")
}

/// Starts a sandbox without a conversation, and waits until it runs.
async fn sandbox(product: &Product, id: &str) -> Sandbox {
    let sandboxes = product.sandboxes();
    sandboxes.start(&UserId::local(), id, None).await.expect("started");
    running(product, id).await
}

async fn running(product: &Product, id: &str) -> Sandbox {
    wait_for(&format!("{id} runs"), LIMIT, async || {
        let found = product.sandboxes().get(&UserId::local(), id).await.expect("an answer").expect("a sandbox");
        assert!(matches!(found.status, SandboxStatus::Starting | SandboxStatus::Running), "{found:?}");
        (found.status == SandboxStatus::Running).then_some(found)
    })
    .await
}

fn key(sandbox: &Sandbox) -> String {
    use secrecy::ExposeSecret as _;
    sandbox.session_api_key.as_ref().expect("a key").expose_secret().to_owned()
}

/// What the sandbox's agent server sees of itself.
async fn probe(product: &Product, sandbox: &Sandbox) -> Value {
    let folder = folder(product, &sandbox.id);
    // The working directory of an agent server is in its module path.
    fs::write(folder.join("probe_of_the_test.py"), PROBE).expect("written");
    let body = json!({
        "agent": {"kind": "Agent", "llm": {"model": "openai/any", "api_key": "any", "usage_id": "agent"}, "tools": []},
        "workspace": {"kind": "LocalWorkspace", "working_dir": sandbox.working_dir},
        "tool_module_qualnames": {"probe": "probe_of_the_test"},
    });
    let url = format!("{}/api/conversations", sandbox.agent_server_url().expect("a URL"));
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let answer = http.post(url).header("x-session-api-key", key(sandbox)).json(&body).send().await.expect("an answer");
    let status = answer.status();
    let body = answer.text().await.expect("a body");
    let result = folder.join("home/probe.json");
    assert!(result.exists(), "the probe was not imported: {status} {body}");
    serde_json::from_slice(&fs::read(result).expect("read")).expect("JSON")
}

/// What the descriptors of a process refer to.
fn descriptors(pid: Pid) -> BTreeSet<String> {
    let entries = fs::read_dir(of_process(pid, "fd")).expect("descriptors");
    let targets = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    targets.map(|target| target.display().to_string()).collect()
}

/// Whether the memory of a process contains each of these texts.
fn memory_contains(pid: Pid, texts: &[&str]) -> Vec<bool> {
    let maps = fs::read_to_string(of_process(pid, "maps")).expect("its maps");
    let mut memory = fs::File::open(of_process(pid, "mem")).expect("its memory");
    let mut found = vec![false; texts.len()];
    for line in maps.lines().filter(|line| !line.contains("[v")) {
        let mut words = line.split_whitespace();
        let (range, modes) = (words.next().expect("a range"), words.next().expect("modes"));
        // Files of the system are not of interest.
        if !modes.starts_with("rw") {
            continue;
        }
        let (begin, end) = range.split_once('-').expect("a range");
        let address = |text| u64::from_str_radix(text, 16).expect("an address");
        let mut content = vec![0; usize::try_from(address(end) - address(begin)).expect("a size")];
        memory.seek(SeekFrom::Start(address(begin))).expect("an address");
        if memory.read_exact(&mut content).is_err() {
            continue;
        }
        for (text, found) in texts.iter().zip(&mut found) {
            *found = *found || is_in(&content, text);
        }
    }
    found
}

/// As `windows().any()`, which is too slow for gigabytes in the development profile.
fn is_in(mut content: &[u8], text: &str) -> bool {
    let (first, others) = text.as_bytes().split_first().expect("a text");
    while !content.is_empty() {
        content.skip_until(*first).expect("memory");
        if content.starts_with(others) {
            return true;
        }
    }
    false
}

#[tokio::test]
async fn the_supervisor_alone() {
    let python = find_python(None).await.expect("a Python");
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace");
    let ran = tokio::process::Command::new(python.path)
        .args(["-m", "unittest", "tests/supervisor_test.py"])
        .current_dir(workspace)
        .output()
        .await
        .expect("run");
    let output = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success() && output.contains("\nOK"), "{output}");
}

#[tokio::test]
async fn forked_agent_servers_share_nothing() {
    let product = product().await;
    let started = Instant::now();
    let (one, two) = (sandbox(&product, "one").await, sandbox(&product, "two").await);
    assert!(was_forked(&product, "one") && was_forked(&product, "two"), "{}", logged());
    let supervisor = supervisor(&product);
    let sees = [probe(&product, &one).await, probe(&product, &two).await];
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let get = async |sandbox: &Sandbox, key: &str| {
        let url = format!("{}/api/conversations/count", sandbox.agent_server_url().expect("a URL"));
        http.get(url).header("x-session-api-key", key).send().await.expect("an answer").status()
    };

    for (mine, other, seen) in [(&one, &two, &sees[0]), (&two, &one, &sees[1])] {
        let own_folder = folder(&product, &mine.id).display().to_string();
        let other_folder = folder(&product, &other.id).display().to_string();
        let pid = agent_server(&product, &mine.id);

        // The environment is the one that a plain boot has, without anything of the supervisor or of the other.
        let environment = seen["environment"].as_object().expect("variables");
        assert_eq!(environment["HOME"], format!("{own_folder}/home"));
        assert_eq!(environment["OH_SESSION_API_KEYS_0"], key(mine));
        for name in ["LITELLM_LOCAL_MODEL_COST_MAP", "OPENHANDS_SUPPRESS_BANNER", "PYTHON_DOTENV_DISABLED"] {
            assert!(!environment.contains_key(name), "{name} is of the supervisor");
        }
        let shown = seen["environment"].to_string();
        for foreign in [&key(other), &other_folder, ".boot", "key-of-the-model"] {
            assert!(!shown.contains(foreign), "{foreign} is in the environment of {}", mine.id);
        }
        assert_eq!(seen["session"], pid.as_raw_nonzero().get());
        let port = mine.agent_server_url().expect("a URL");
        let port = port.rsplit(':').next().expect("a port");
        let arguments = seen["arguments"].as_array().expect("arguments");
        assert_eq!(arguments[1..], ["--host", "127.0.0.1", "--port", port]);

        // Paths that were computed before the fork are below its own home directory.
        let skills = seen["skills"].as_array().expect("folders");
        assert!(!skills.is_empty() && skills.iter().all(|path| text(path).starts_with(&own_folder)), "{skills:?}");
        assert_eq!(seen["homes"], json!([]));
        // So are times: an agent server that seemed idle since then would be paused.
        let url = mine.agent_server_url().expect("a URL");
        let info: Value =
            http.get(format!("{url}/server_info")).send().await.expect("sent").json().await.expect("JSON");
        for name in ["uptime", "idle_time"] {
            let seconds = info[name].as_f64().expect("a number");
            assert!(seconds < started.elapsed().as_secs_f64() + 1.0, "{name} of {}: {info:#}", mine.id);
        }
        let paths = seen["paths"].to_string();
        assert!(!paths.contains(&other_folder), "{paths}");

        // Files and sockets.
        let (own, others) = (descriptors(pid), descriptors(agent_server(&product, &other.id)));
        let is_shareable = |target: &&String| !target.starts_with('/') && !target.starts_with("anon_inode:");
        for (whose, foreign) in [("the other", &others), ("the supervisor", &descriptors(supervisor))] {
            let shared: Vec<_> = own.intersection(foreign).filter(is_shareable).collect();
            assert!(shared.is_empty(), "{} has {shared:?} of {whose}", mine.id);
        }
        let sandboxes = product.data().join("sandboxes").display().to_string();
        for file in own.iter().filter(|target| target.starts_with(&sandboxes)) {
            assert!(file.starts_with(&own_folder), "{} has {file}", mine.id);
        }

        assert_eq!(memory_contains(pid, &[&key(mine), &key(other)]), [true, false]);
    }
    assert_eq!(memory_contains(supervisor, &[&key(&one), &key(&two), "home-of-the-sandbox"]), [false, false, true]);

    // Keys. Not earlier, because a key that is refused is in the memory of the agent server, too.
    for (mine, other) in [(&one, &two), (&two, &one)] {
        assert_eq!(get(mine, &key(mine)).await, StatusCode::OK);
        assert_eq!(get(mine, &key(other)).await, StatusCode::UNAUTHORIZED);
    }

    // Random states.
    let random = sees.each_ref().map(|seen| seen["random"].as_array().expect("values").clone());
    assert!(sees.iter().all(|seen| seen["contexts"].as_u64() > Some(0) && seen["generators"].as_u64() > Some(1)));
    assert_eq!(random[0].len(), random[1].len());
    for (one, two) in random[0].iter().zip(&random[1]) {
        assert_ne!(one, two, "{sees:#?}");
    }
    product.shutdown().await;
    assert!(!exists(supervisor));
}

#[tokio::test]
async fn sandboxes_go_on_without_the_supervisor_that_forked_them() {
    let product = product().await;
    let user = UserId::local();
    let sandboxes = product.sandboxes();
    let one = sandbox(&product, "one").await;
    let (first, pid) = (supervisor(&product), agent_server(&product, "one"));

    // A child that ends is reaped, and seen.
    sandbox(&product, "two").await;
    let two = agent_server(&product, "two");
    kill_process(two, Signal::KILL).expect("killed");
    wait_until("it is reaped", LIMIT, async || !exists(two)).await;
    let gone = sandboxes.get(&user, "two").await.expect("an answer").expect("a sandbox");
    assert_eq!(gone.status, SandboxStatus::Missing);

    // The supervisor is killed while it is idle: another one replaces it, and its children go on.
    kill_process(first, Signal::KILL).expect("killed");
    wait_until("another supervisor", LIMIT, async || supervisor(&product) != first).await;
    forks(&product).await;
    assert_eq!(running(&product, "one").await.exposed_urls, one.exposed_urls);
    for _ in 0..2 {
        assert!(sandboxes.pause(&user, "one").await.expect("an answer"));
        assert!(sandboxes.resume(&user, "one").await.expect("an answer"));
    }
    assert_eq!(agent_server(&product, "one"), pid);
    assert!(
        HttpClient::new(shared::http_client::AddressPolicy::Any)
            .succeeds(&format!("{}/alive", one.agent_server_url().expect("a URL")), Duration::from_secs(10))
            .await
    );

    // The one that has ended is launched again, by the other supervisor.
    assert!(sandboxes.resume(&user, "two").await.expect("an answer"));
    running(&product, "two").await;
    assert!(was_forked(&product, "two"));

    // The supervisor is killed while it forks: the boot is a plain one.
    let second = supervisor(&product);
    kill_process(second, Signal::STOP).expect("stopped");
    let starting = async {
        sandboxes.start(&user, "three", None).await.expect("started");
    };
    let killing = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        kill_process(second, Signal::KILL).expect("killed");
    };
    tokio::join!(starting, killing);
    running(&product, "three").await;
    assert!(!was_forked(&product, "three"));
    assert!(logged().contains("sandbox.not_forked"));

    // A deletion ends what a forked agent server has left, also if it does not end by itself.
    for id in ["one", "two", "three"] {
        let pid = agent_server(&product, id);
        assert!(product.reconciler().delete(&user, id).await.expect("deleted"), "{id}");
        wait_until("it has ended", LIMIT, async || !is_running(pid)).await;
        assert!(!folder(&product, id).exists(), "{id}");
    }
    // Shutdown asserts that none is left.
    product.shutdown().await;
}

/// Whether the process exists and has not ended.
fn is_running(pid: Pid) -> bool {
    let stat = fs::read_to_string(of_process(pid, "stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, fields)| !fields.starts_with('Z'))
}

#[tokio::test]
async fn an_agent_server_that_dies_at_once_is_an_error_with_its_output() {
    let product = product().await;
    let user = UserId::local();
    let folder = folder(&product, "one");
    // It cannot create its folder of conversations.
    fs::create_dir_all(folder.join("workspace")).expect("created");
    fs::write(folder.join("workspace/conversations"), "a file").expect("written");
    product.sandboxes().start(&user, "one", None).await.expect("started");
    let pid = agent_server(&product, "one");
    let failed = wait_for("it fails", LIMIT, async || {
        let found = product.sandboxes().get(&user, "one").await.expect("an answer").expect("a sandbox");
        (found.status != SandboxStatus::Starting).then_some(found)
    })
    .await;
    assert_eq!(failed.status, SandboxStatus::Error);
    assert!(failed.detail.as_deref().is_some_and(|detail| detail.contains("before its first response")), "{failed:?}");
    assert!(failed.detail.is_some_and(|detail| detail.contains("conversations")), "its output");
    assert!(folder.join("agent-server.start").exists(), "it was forked");
    wait_until("it is reaped", LIMIT, async || !exists(pid)).await;

    // The next launch works.
    fs::remove_file(folder.join("workspace/conversations")).expect("removed");
    assert!(product.sandboxes().resume(&user, "one").await.expect("an answer"));
    wait_for("it runs", LIMIT, async || {
        let found = product.sandboxes().get(&user, "one").await.expect("an answer").expect("a sandbox");
        (found.status == SandboxStatus::Running).then_some(())
    })
    .await;
    product.shutdown().await;
}
