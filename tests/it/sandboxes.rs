//! Sandboxes of every kind: one suite that each implementation of `SandboxService` passes, the routes, and what is shown of
//! sandboxes that are gone.

use std::time::{Duration, Instant};

use axum::body::Body;
use http::Request;
use rustix::process::{Signal, kill_process_group};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use shared::config::{DockerSandboxConfig, RemoteSandboxConfig, SandboxConfig};
use shared::digest::sha256_hex;
use shared::sandbox::spec::AGENT_SERVER_VERSION;
use shared::sandbox::store::SandboxStore;
use shared::sandbox::{Sandbox, SandboxService, SandboxStatus, service};
use shared::user::UserId;
use tempfile::TempDir;

use crate::support::api::Api;
use crate::support::docker_engine::DockerEngine;
use crate::support::product::Product;
use crate::support::runtime_api::{API_KEY, Fault, RuntimeApi};
use crate::support::seed;
use crate::support::stand_in_agent::{Fault as AgentFault, Kind, Nth, StandInAgent};
use crate::support::wait::{wait_for, wait_until};
use crate::support::worker_harness::SESSION_KEY;

const BOOT: Duration = Duration::from_secs(180);
/// What an answer may take while a provider hangs, on a busy machine.
const AT_MOST: Duration = Duration::from_secs(20);

// The suite.

/// What a kind of sandbox has beside the service.
trait Place {
    /// Lets a sandbox that is starting go on to run.
    async fn let_run(&self, id: &str);
    /// Ends a sandbox behind its service's back.
    async fn kill(&self, id: &str);
}

async fn status(service: &dyn SandboxService, user: &UserId, id: &str) -> SandboxStatus {
    service.get(user, id).await.expect("an answer").expect("a sandbox").status
}

async fn running(service: &dyn SandboxService, user: &UserId, id: &str) -> Sandbox {
    wait_for(&format!("{id} runs"), BOOT, async || {
        let sandbox = service.get(user, id).await.expect("an answer").expect("a sandbox");
        assert!(matches!(sandbox.status, SandboxStatus::Starting | SandboxStatus::Running), "{sandbox:?}");
        (sandbox.status == SandboxStatus::Running).then_some(sandbox)
    })
    .await
}

/// What every implementation does.
async fn conforms(service: &dyn SandboxService, user: &UserId, place: &impl Place) {
    let stranger = UserId::new("a-stranger");
    let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<String>>();
    // Nothing.
    assert!(service.get(user, "none").await.expect("an answer").is_none());
    assert!(service.batch_get(user, &[]).await.expect("an answer").is_empty());
    assert!(service.list(user).await.expect("an answer").is_empty());
    for done in
        [service.pause(user, "none").await, service.resume(user, "none").await, service.delete(user, "none").await]
    {
        assert!(!done.expect("an answer"), "there is none");
    }
    service.mark_used(user, "none").await.expect("an answer");
    assert!(service.get(user, "none").await.expect("an answer").is_none(), "nothing was made");

    // One, made twice.
    for _ in 0..2 {
        service.start(user, "one").await.expect("started");
    }
    let made = service.get(user, "one").await.expect("an answer").expect("a sandbox");
    assert!(matches!(made.status, SandboxStatus::Starting | SandboxStatus::Running), "{made:?}");
    place.let_run("one").await;
    let one = running(service, user, "one").await;
    assert!(one.agent_server_url().is_some_and(|url| url.starts_with("http")), "{one:?}");
    assert!(one.session_api_key.as_ref().is_some_and(|key| key.expose_secret().len() > 10), "{one:?}");
    assert!(one.working_dir.starts_with('/'), "{one:?}");
    assert_eq!(one.created_at, made.created_at);
    service.start(user, "one").await.expect("started");
    assert_eq!(status(service, user, "one").await, SandboxStatus::Running, "one that runs is left as it is");

    // A second one, and whose they are.
    service.start(user, "two").await.expect("started");
    place.let_run("two").await;
    running(service, user, "two").await;
    let list: Vec<String> = service.list(user).await.expect("a list").into_iter().map(|sandbox| sandbox.id).collect();
    assert_eq!(list, ["two", "one"], "newest first");
    let asked = ids(&["one", "none", "two", "one", ""]);
    let found = service.batch_get(user, &asked).await.expect("an answer");
    let found: Vec<Option<&str>> = found.iter().map(|found| found.as_ref().map(|found| found.id.as_str())).collect();
    assert_eq!(found, [Some("one"), None, Some("two"), Some("one"), None]);
    assert!(service.list(&stranger).await.expect("a list").is_empty());
    assert!(service.get(&stranger, "one").await.expect("an answer").is_none());
    assert!(!service.pause(&stranger, "one").await.expect("an answer"));
    assert!(!service.resume(&stranger, "one").await.expect("an answer"));
    assert!(!service.delete(&stranger, "one").await.expect("an answer"));
    assert_eq!(status(service, user, "one").await, SandboxStatus::Running);

    service.mark_used(user, "one").await.expect("noted");
    let marked = service.get(user, "one").await.expect("an answer").expect("a sandbox");
    assert!(marked.used_at > one.used_at && marked.created_at == one.created_at, "{marked:?}");

    // Paused, twice, and resumed, twice.
    for _ in 0..2 {
        assert!(service.pause(user, "one").await.expect("an answer"));
        let paused = service.get(user, "one").await.expect("an answer").expect("a sandbox");
        assert_eq!(paused.status, SandboxStatus::Paused);
        assert!(paused.exposed_urls.is_none() && paused.session_api_key.is_none(), "{paused:?}");
    }
    assert_eq!(status(service, user, "two").await, SandboxStatus::Running);
    for _ in 0..2 {
        assert!(service.resume(user, "one").await.expect("an answer"));
    }
    let resumed = running(service, user, "one").await;
    let key = |sandbox: &Sandbox| sandbox.session_api_key.as_ref().map(|key| key.expose_secret().to_owned());
    assert_eq!(key(&resumed), key(&one), "the key stays");

    // Gone behind our back: it does not show as running for ever, and says what happened.
    place.kill("two").await;
    let gone = wait_for("it shows", Duration::from_secs(20), async || {
        let sandbox = service.get(user, "two").await.expect("an answer").expect("its record");
        (sandbox.status != SandboxStatus::Running).then_some(sandbox)
    })
    .await;
    assert!(matches!(gone.status, SandboxStatus::Missing | SandboxStatus::Error), "{gone:?}");
    assert!(gone.exposed_urls.is_none() && gone.session_api_key.is_none(), "{gone:?}");
    assert!(gone.detail.is_some_and(|detail| !detail.is_empty()));

    // Deleted, also the one that was gone.
    for id in ["one", "two"] {
        assert!(service.delete(user, id).await.expect("an answer"), "{id}");
        assert!(service.get(user, id).await.expect("an answer").is_none(), "{id}");
        assert!(!service.delete(user, id).await.expect("an answer"), "{id}");
    }
    assert!(service.list(user).await.expect("a list").is_empty());
}

struct Processes<'a>(&'a Product);

impl Place for Processes<'_> {
    async fn let_run(&self, _: &str) {}

    async fn kill(&self, id: &str) {
        let pid = std::fs::read_to_string(self.0.data().join(format!("sandboxes/{id}/agent-server.pid")));
        let pid = pid.expect("a process id").trim().parse().expect("a number");
        let pid = rustix::process::Pid::from_raw(pid).expect("a process id");
        kill_process_group(pid, Signal::KILL).expect("killed");
    }
}

#[tokio::test]
async fn processes_conform() {
    let product = Product::start(json!({"llm_model": "any", "llm_api_key": "any"})).await;
    conforms(&product.sandboxes(), &UserId::local(), &Processes(&product)).await;
    wait_until("their processes are gone", Duration::from_secs(20), async || product.processes().is_empty()).await;
    product.shutdown().await;
}

impl Place for RuntimeApi {
    async fn let_run(&self, _: &str) {
        let (session, _) = self.newest();
        self.set_status(&session, "running");
    }

    async fn kill(&self, _: &str) {
        let (session, _) = self.newest();
        self.set_status(&session, "stopped");
    }
}

fn remote(runtimes: &RuntimeApi) -> RemoteSandboxConfig {
    RemoteSandboxConfig {
        api_url: format!("{}/", runtimes.url()),
        api_key: Some(API_KEY.into()),
        image: "registry.example.com/agent-server:1".to_owned(),
        resource_factor: 2,
        runtime_class: "sysbox".to_owned(),
        image_pull_secrets: vec!["registry".to_owned()],
        max_sandboxes: 2,
        web_url: Some("https://app.example.com/v1/".to_owned()),
        allow_cors_origins: vec!["https://ui.example.com".to_owned()],
    }
}

struct Remote {
    api: Api,
    runtimes: RuntimeApi,
    agent: StandInAgent,
    user: UserId,
    _folder: TempDir,
}

impl Remote {
    async fn start() -> Self {
        Self::with_key(SESSION_KEY).await
    }

    /// With an agent server that takes this session key.
    async fn with_key(key: &str) -> Self {
        let folder = TempDir::new().expect("a folder");
        let agent = StandInAgent::start(key).await;
        let runtimes = RuntimeApi::start(agent.url()).await;
        let api = Api::at(folder.path(), SandboxConfig::Remote(remote(&runtimes))).await;
        Self { api, runtimes, agent, user: UserId::new("somebody"), _folder: folder }
    }

    fn records(&self) -> SandboxStore {
        self.api.stores.sandboxes()
    }

    fn service(&self) -> std::sync::Arc<dyn SandboxService> {
        service(&SandboxConfig::Remote(remote(&self.runtimes)), self.records())
    }

    async fn call(&self, method: &str, target: &str) -> (u16, Value) {
        self.api.call(&self.user, method, &format!("/api/v1{target}"), None).await
    }

    /// A sandbox that runs, and its session.
    async fn sandbox(&self) -> (String, String) {
        self.runtimes.begin_as("running");
        let (status, made) = self.call("POST", "/sandboxes").await;
        assert_eq!(status, 200, "{made}");
        (made["id"].as_str().expect("an id").to_owned(), self.runtimes.newest().0)
    }
}

#[tokio::test]
async fn those_of_a_runtime_api_conform() {
    let rig = Remote::start().await;
    conforms(&*rig.service(), &rig.user, &rig.runtimes).await;
    rig.api.stop().await;
}

fn docker(host: Option<String>) -> DockerSandboxConfig {
    DockerSandboxConfig {
        host,
        image: "registry.example.com/agent-server:1".to_owned(),
        url_pattern: "http://127.0.0.1:{port}".to_owned(),
        host_port: 3000,
        container_name_prefix: "oh-agent-server-".to_owned(),
        max_sandboxes: 2,
        volumes: vec!["/data:/data:ro".to_owned()],
        startup_grace: Duration::from_secs(60),
        use_host_network: false,
        allow_cors_origins: vec!["https://ui.example.com".to_owned()],
    }
}

impl Place for DockerEngine {
    async fn let_run(&self, _: &str) {}

    async fn kill(&self, _: &str) {
        // The conformance suite ends the second of two.
        let running = self.containers().into_iter().filter(|(_, container)| container.state == "running");
        let names: Vec<String> = running.map(|(name, _)| name).collect();
        let user = UserId::new("somebody");
        let two = names.into_iter().find(|name| name.ends_with(&sha256_hex(&user.key_of("two"))[..32]));
        Self::kill(self, &two.expect("it runs"));
    }
}

#[tokio::test]
async fn containers_conform() {
    let rig = Remote::start().await;
    let engine = DockerEngine::start(&rig.agent.url()).await;
    let config = SandboxConfig::Docker(docker(Some(engine.url())));
    let service = service(&config, rig.records());
    conforms(&*service, &rig.user, &engine).await;
    assert_eq!(engine.pulled(), ["registry.example.com/agent-server:1"], "once");
    assert!(engine.containers().is_empty(), "nothing is left");

    // What containers are made with.
    service.start(&rig.user, "one").await.expect("started");
    let (name, container) = engine.containers().pop_first().expect("a container");
    assert_eq!(name, format!("oh-agent-server-{}", &sha256_hex(&rig.user.key_of("one"))[..32]));
    let body = &container.body;
    assert_eq!(body["Cmd"], json!(["--port", "8000"]));
    assert_eq!(body["WorkingDir"], "/workspace/project");
    assert_eq!(body["Labels"], json!({"sandbox_spec_id": "registry.example.com/agent-server:1"}));
    assert_eq!(body["HostConfig"]["Init"], true);
    assert_eq!(body["HostConfig"]["Binds"], json!(["/data:/data:ro"]));
    assert_eq!(body["HostConfig"]["ExtraHosts"], json!(["host.docker.internal:host-gateway"]));
    let binding = json!([{"HostIp": "127.0.0.1", "HostPort": ""}]);
    for port in ["8000/tcp", "8001/tcp", "8011/tcp", "8012/tcp"] {
        assert_eq!(body["HostConfig"]["PortBindings"][port], binding, "{port}");
    }
    let key = service.get(&rig.user, "one").await.expect("an answer").expect("a sandbox").session_api_key;
    let key = key.expect("it runs").expose_secret().to_owned();
    for variable in [
        format!("OH_SESSION_API_KEYS_0={key}"),
        "OH_WEBHOOKS_0_BASE_URL=http://host.docker.internal:3000/api/v1/webhooks".to_owned(),
        "OH_WEBHOOKS_0_FLUSH_DELAY=1".to_owned(),
        "OH_LEASE_TTL_SECONDS=0".to_owned(),
        "OH_ALLOW_CORS_ORIGINS_0=https://ui.example.com".to_owned(),
        "WORKER_2=8012".to_owned(),
    ] {
        assert!(body["Env"].as_array().expect("variables").contains(&json!(variable)), "no {variable} in {body:#}");
    }
    // The one that was used least lately makes room.
    for id in ["two", "three"] {
        service.start(&rig.user, id).await.expect("started");
    }
    let statuses: Vec<SandboxStatus> =
        service.list(&rig.user).await.expect("a list").iter().map(|sandbox| sandbox.status).collect();
    assert_eq!(statuses, [SandboxStatus::Running, SandboxStatus::Running, SandboxStatus::Paused]);
    // An agent server that does not answer any more, and an engine that does not.
    rig.agent.set_alive(false);
    let three = service.get(&rig.user, "three").await.expect("an answer").expect("its record");
    assert_eq!(three.status, SandboxStatus::Error, "long after its start");
    assert!(three.exposed_urls.is_none() && three.detail.is_some(), "{three:?}");
    rig.agent.set_alive(true);
    engine.break_down(true);
    let three = service.get(&rig.user, "three").await.expect("an answer").expect("its record");
    assert_eq!(
        (three.status, three.detail.as_deref()),
        (SandboxStatus::Error, Some("The Docker engine does not answer"))
    );
    assert!(service.pause(&rig.user, "three").await.is_err());
    engine.break_down(false);

    // An image that nobody has.
    let unknown = DockerSandboxConfig { image: "nowhere/none:1".to_owned(), ..docker(Some(engine.url())) };
    let service = self::service(&SandboxConfig::Docker(unknown), rig.records());
    let refused = service.start(&rig.user, "four").await.expect_err("no image");
    assert_eq!(refused.to_string(), "The image nowhere/none:1 cannot be pulled");
    rig.api.stop().await;
}

/// A real engine; the beginning of its containers' names.
struct Real(String);
impl Place for Real {
    async fn let_run(&self, _: &str) {}

    async fn kill(&self, id: &str) {
        let name = format!("{}{}", self.0, &sha256_hex(&UserId::new("somebody").key_of(id))[..32]);
        let killed = tokio::process::Command::new("docker").args(["kill", &name]).output().await.expect("run");
        assert!(killed.status.success(), "{killed:?}");
    }
}

/// The suite on a real engine, with the real image, where there are both.
#[tokio::test]
async fn containers_of_a_real_engine_conform() {
    let image = shared::sandbox::spec::image(AGENT_SERVER_VERSION);
    let has_image = tokio::process::Command::new("docker").args(["image", "inspect", &image]).output().await;
    if !has_image.is_ok_and(|output| output.status.success()) {
        println!("not run: no Docker engine with the image {image} answers here (docker pull {image})");
        return;
    }
    let rig = Remote::start().await;
    let config = DockerSandboxConfig {
        image,
        url_pattern: "http://localhost:{port}".to_owned(),
        container_name_prefix: format!("oh-test-{}-", shared::id::random_base62(8).to_lowercase()),
        startup_grace: BOOT,
        volumes: Vec::new(),
        ..docker(std::env::var("DOCKER_HOST").ok())
    };
    let place = Real(config.container_name_prefix.clone());
    conforms(&*service(&SandboxConfig::Docker(config), rig.records()), &rig.user, &place).await;
    rig.api.stop().await;
}

#[tokio::test]
async fn a_runtime_api_is_told_all_that_it_needs() {
    let rig = Remote::start().await;
    let (id, session) = rig.sandbox().await;
    let start = rig.runtimes.sessions()[&session].start.clone();
    assert_eq!(
        start,
        json!({
            "image": "registry.example.com/agent-server:1",
            "command": ["/usr/local/bin/openhands-agent-server", "--port", "60000"],
            "working_dir": "/workspace",
            "environment": {
                "OPENVSCODE_SERVER_ROOT": "/openhands/.openvscode-server",
                "LOG_JSON": "true",
                "OH_ENABLE_VNC": "0",
                "OH_CONVERSATIONS_PATH": "/workspace/conversations",
                "OH_BASH_EVENTS_DIR": "/workspace/bash_events",
                "OH_VSCODE_PORT": "60001",
                "WORKER_1": "12000",
                "WORKER_2": "12001",
                "OH_WEBHOOKS_0_BASE_URL": "https://app.example.com/v1/api/v1/webhooks",
                "OH_WEBHOOKS_0_FLUSH_DELAY": "1",
                "OH_WEBHOOKS_0_MAX_BATCH_BYTES": "2097152",
                "OH_LEASE_TTL_SECONDS": "0",
                "OH_ALLOW_CORS_ORIGINS_0": "https://app.example.com",
                "OH_ALLOW_CORS_ORIGINS_1": "https://ui.example.com",
            },
            "session_id": session,
            "resource_factor": 2,
            "run_as_user": 10001,
            "run_as_group": 10001,
            "fs_group": 10001,
            "runtime_class": "sysbox-runc",
            "image_pull_secrets": ["registry"],
        })
    );
    assert_ne!(session, id, "another user's sandbox may have the same id");
    // The key that the runtime API made is the one by which its webhooks are recognised.
    let key = rig.runtimes.sessions()[&session].key.clone();
    let record = rig.records().find_by_session_key(&key).await.expect("the store").expect("a sandbox");
    assert_eq!((record.user, record.id), (rig.user.clone(), id.clone()));
    let (_, shown) = rig.call("GET", &format!("/sandboxes?id={id}")).await;
    let url = rig.agent.url();
    let host = url.trim_start_matches("http://");
    assert_eq!(
        shown[0]["exposed_urls"],
        json!([
            {"name": "AGENT_SERVER", "url": url, "port": 60000},
            {"name": "VSCODE", "url": format!("http://vscode-{host}/?tkn={key}&folder=%2Fworkspace%2Fproject"), "port": 60001},
            {"name": "WORKER_1", "url": format!("http://work-1-{host}/"), "port": 12000},
            {"name": "WORKER_2", "url": format!("http://work-2-{host}/"), "port": 12001},
        ])
    );
    rig.api.stop().await;
}

/// What a web page asks of an agent server by way of us gets to those of the caller's own sandboxes, and nowhere else.
#[tokio::test]
async fn requests_of_pages_are_passed_on_to_the_callers_own_sandboxes_alone() {
    let rig = Remote::with_key("key-of-session-1").await;
    let (id, session) = rig.sandbox().await;
    let pass = async |user: &UserId, changes: Value| {
        let mut body = json!({
            "host": rig.agent.url(),
            "method": "POST",
            "path": "/api/conversations/search?limit=1",
            "headers": {"x-session-api-key": "key-of-session-1", "x-other": "stays here"},
            "body": {"asked": "something"},
            "timeout_seconds": 10,
        });
        let (Some(fields), Value::Object(changes)) = (body.as_object_mut(), changes) else { panic!("objects") };
        fields.extend(changes);
        rig.api.call(user, "POST", "/api/cloud-proxy", Some(&body)).await
    };

    // As it comes, whatever the agent server makes of it.
    let path = "/api/git/changes?path=%2Fworkspace";
    let (status, _) = pass(&rig.user, json!({"method": "get", "path": path, "body": null})).await;
    let asked = rig.agent.requests().pop().expect("a request");
    assert_eq!(
        (asked.method.as_str(), asked.path.as_str(), asked.query.as_str()),
        ("GET", "/api/git/changes", "path=%2Fworkspace")
    );
    assert_eq!((asked.header("x-session-api-key"), asked.header("x-other")), (Some("key-of-session-1"), None));
    assert!(status != 401 && status != 403, "{status}");
    rig.agent.inject(AgentFault::new(
        "POST /api/conversations/search",
        Nth::Always,
        Kind::Status(409, json!({"busy": true}).to_string()),
    ));
    for host in [rig.agent.url(), rig.agent.url().replace("http:", "https:") + "/"] {
        assert_eq!(pass(&rig.user, json!({"host": host})).await, (409, json!({"busy": true})));
        let asked = rig.agent.requests().pop().expect("a request");
        assert_eq!((asked.method.as_str(), asked.json()), ("POST", json!({"asked": "something"})));
    }

    // Changes and diffs of the workspace are made with git there; those of one commit are the agent server's.
    let (status, told) =
        pass(&rig.user, json!({"method": "GET", "path": "/api/git/diff?path=/workspace/project/a&commit=abcd"})).await;
    let asked = rig.agent.requests().pop().expect("a request");
    assert_eq!((status, asked.path.as_str()), (404, "/api/git/diff"), "{told}");
    for (path, detail) in [
        ("/api/git/changes?path=%2Fworkspace%2Fproject", "There is no such folder"),
        ("/api/git/diff?path=/workspace/project/a&ref=HEAD", "There is no such file, neither now nor at HEAD"),
        ("/api/git/diff?path=/workspace/project/a&ref=-x", "The ref \"-x\" is no commit of this repository"),
    ] {
        let (status, told) = pass(&rig.user, json!({"method": "GET", "path": path, "body": null})).await;
        assert!((400..500).contains(&status) && told == json!({"detail": detail}), "{path}: {status} {told}");
        let asked = rig.agent.requests().pop().expect("a request");
        assert_ne!(asked.path, "/api/git/changes");
    }

    // Nowhere else.
    let before = rig.agent.requests().len();
    let stranger = UserId::new("a-stranger");
    let other_key = json!({"headers": {"X-Session-API-Key": "another"}});
    for (user, changes, expected) in [
        (&stranger, json!({}), 403),
        (&rig.user, other_key, 403),
        (&rig.user, json!({"headers": {}}), 403),
        (&rig.user, json!({"headers": null}), 403),
        (&rig.user, json!({"host": "http://169.254.169.254"}), 403),
        (&rig.user, json!({"host": format!("{}.example.org", rig.agent.url())}), 403),
        (&stranger, json!({"method": "GET", "path": "/api/git/changes?path=/workspace/project"}), 403),
        (&rig.user, json!({"host": null}), 422),
        (&rig.user, json!({"path": "/alive"}), 422),
        (&rig.user, json!({"path": "@example.org/api/"}), 422),
        (&rig.user, json!({"path": "/api/../alive"}), 422),
        (&rig.user, json!({"path": "/api/x/../../alive"}), 422),
        (&rig.user, json!({"path": "/api/./x"}), 422),
        (&rig.user, json!({"path": "/api/%2e%2e/docs"}), 422),
        (&rig.user, json!({"path": "/api/%2E./docs"}), 422),
        (&rig.user, json!({"path": "/api/%252e%252e/docs"}), 422),
        (&rig.user, json!({"path": "/api/\\..\\docs"}), 422),
        (&rig.user, json!({"path": "/api/..%5cdocs"}), 422),
        (&rig.user, json!({"path": "/api//docs"}), 422),
        (&rig.user, json!({"path": "/api/..%2fdocs"}), 422),
        (&rig.user, json!({"path": "/api/.\t./docs"}), 422),
        (&rig.user, json!({"path": "/api/x#/../y"}), 422),
        (&rig.user, json!({"method": "CONNECT"}), 422),
        (&rig.user, json!({"timeout_seconds": "soon"}), 422),
    ] {
        let (status, answer) = pass(user, changes.clone()).await;
        assert_eq!(status, expected, "{user} {changes}: {answer}");
        assert!(answer["detail"].is_string() || answer["detail"].is_array(), "{answer}");
    }
    assert_eq!(rig.agent.requests().len(), before, "nothing was passed on");

    // A sandbox that does not run, an answer that is too large, and one that does not come.
    rig.runtimes.set_status(&session, "paused");
    assert_eq!(pass(&rig.user, json!({})).await, (409, json!({"detail": format!("Sandbox {id} does not run")})));
    rig.runtimes.set_status(&session, "running");
    rig.agent.inject(AgentFault::new("GET /api/large", Nth::Always, Kind::Huge(5 * 1024 * 1024)));
    let (status, answer) = pass(&rig.user, json!({"method": "GET", "path": "/api/large"})).await;
    assert_eq!(status, 413, "{answer}");
    rig.agent.inject(AgentFault::new("GET /api/skills", Nth::Always, Kind::Hang));
    let begun = Instant::now();
    let slow = pass(&rig.user, json!({"method": "GET", "path": "/api/skills", "timeout_seconds": 0.2})).await;
    assert_eq!(slow, (502, json!({"detail": "The agent server did not answer in time"})));
    assert!(begun.elapsed() < AT_MOST);
    rig.api.stop().await;
}

#[tokio::test]
async fn the_one_that_was_used_least_lately_makes_room() {
    let rig = Remote::start().await;
    let (one, _) = rig.sandbox().await;
    let (two, _) = rig.sandbox().await;
    rig.service().mark_used(&rig.user, &one).await.expect("noted");
    let (three, _) = rig.sandbox().await;
    let statuses = async || {
        let (_, shown) = rig.call("GET", &format!("/sandboxes?id={one}&id={two}&id={three}")).await;
        [0, 1, 2].map(|index| shown[index]["status"].as_str().expect("a status").to_owned())
    };
    assert_eq!(statuses().await, ["RUNNING", "PAUSED", "RUNNING"], "two may run");
    assert_eq!(rig.call("POST", &format!("/sandboxes/{two}/resume")).await, (200, json!({"success": true})));
    assert_eq!(statuses().await, ["PAUSED", "RUNNING", "RUNNING"]);
    rig.api.stop().await;
}

#[tokio::test]
async fn whatever_a_runtime_api_says_is_shown_and_whatever_it_does_answers_come_in_time() {
    let rig = Remote::start().await;
    let (id, session) = rig.sandbox().await;
    let shown = async || {
        let begun = Instant::now();
        let (status, shown) = rig.call("GET", &format!("/sandboxes?id={id}")).await;
        assert!(begun.elapsed() < AT_MOST, "{:?}", begun.elapsed());
        assert_eq!(status, 200, "{shown}");
        shown[0].clone()
    };
    for (said, expected) in [
        ("running", "RUNNING"),
        ("RUNNING", "RUNNING"),
        ("paused", "PAUSED"),
        ("starting", "STARTING"),
        ("stopped", "MISSING"),
        ("error", "ERROR"),
        ("something new", "MISSING"),
    ] {
        rig.runtimes.set_status(&session, said);
        let sandbox = shown().await;
        assert_eq!(sandbox["status"], expected, "{said}");
        let runs = expected == "RUNNING";
        assert_eq!(sandbox["exposed_urls"].is_array(), runs, "{sandbox}");
        assert_eq!(sandbox["session_api_key"].is_string(), runs, "a key is shown only while it opens something");
    }
    rig.runtimes.set_status(&session, "running");
    let time = "2025-01-01T00:00:00Z";
    let data =
        json!({"id": "000000000000000000000000000000aa", "sandbox_id": id, "created_at": time, "updated_at": time});
    let seed = json!({"type": "conversation", "data": data});
    seed::load(&rig.api.stores, &rig.user, [seed]).await;
    for fault in [Fault::Status(401), Fault::Status(500), Fault::Status(503), Fault::Garbage, Fault::Cut, Fault::Hang] {
        rig.runtimes.set_fault(Some(fault.clone()));
        let sandbox = shown().await;
        assert_eq!(sandbox["status"], "ERROR", "{fault:?}: nobody knows");
        // Records can be read all the same.
        let (status, page) = rig.call("GET", "/app-conversations/search").await;
        assert_eq!((status, &page["items"][0]["sandbox_status"]), (200, &json!("ERROR")), "{fault:?}: {page}");
        if matches!(fault, Fault::Hang) {
            continue;
        }
        for (method, target) in [("POST", format!("/sandboxes/{id}/pause")), ("DELETE", format!("/sandboxes/{id}"))] {
            let (status, told) = rig.call(method, &target).await;
            let expected = json!({"detail": "The sandboxes' provider does not answer"});
            assert_eq!((status, told), (502, expected), "{fault:?}: {method}");
        }
        let (status, told) = rig.call("POST", "/sandboxes").await;
        assert_eq!(status, 502, "{fault:?}: {told}");
        assert!(!told.to_string().contains("secret words"), "{told}");
    }
    rig.runtimes.set_fault(None);
    assert_eq!(shown().await["status"], "RUNNING", "and when it is back, so is the sandbox");
    // Whatever began to be made meanwhile was given up.
    let (_, list) = rig.call("GET", "/sandboxes/search").await;
    let left: Vec<&Value> = list["items"].as_array().expect("items").iter().map(|sandbox| &sandbox["status"]).collect();
    assert!(left.iter().filter(|status| **status == "RUNNING").count() == 1, "{list:#}");
    rig.api.stop().await;
}

#[tokio::test]
async fn a_start_joins_no_sandbox_that_is_dead() {
    let rig = Remote::start().await;
    let (id, session) = rig.sandbox().await;
    let settings = rig.api.stores.settings();
    let grouping = json!({"llm_model": "any", "sandbox_grouping_strategy": "ADD_TO_ANY"});
    settings.put(&rig.user, &grouping.to_string().into()).await.expect("stored");
    let joined = async || {
        let (status, task) = rig.api.call(&rig.user, "POST", "/api/v1/app-conversations", Some(&json!({}))).await;
        assert_eq!(status, 200, "{task}");
        let ids = format!("/app-conversations/start-tasks?ids={}", task["id"].as_str().expect("an id"));
        wait_for("a sandbox is chosen", Duration::from_secs(60), async || {
            rig.api.work_once().await;
            let (_, tasks) = rig.call("GET", &ids).await;
            tasks[0]["sandbox_id"].as_str().map(str::to_owned)
        })
        .await
    };
    assert_eq!(joined().await, id, "it answers");
    // Its provider says that it runs, and it does not answer.
    rig.agent.set_alive(false);
    rig.runtimes.begin_as("starting");
    assert_ne!(joined().await, id, "it hangs");
    rig.agent.set_alive(true);
    rig.runtimes.set_status(&session, "stopped");
    assert_ne!(joined().await, id, "it is gone");
    rig.api.stop().await;
}

// The routes.

#[tokio::test]
async fn sandboxes_are_listed_made_paused_resumed_and_deleted() {
    let rig = Remote::start().await;
    let not_found = (404, json!({"detail": "Not Found"}));
    let success = (200, json!({"success": true}));
    assert_eq!(rig.call("GET", "/sandboxes/search").await, (200, json!({"items": [], "next_page_id": null})));
    let (status, one) = rig.call("POST", "/sandboxes").await;
    assert_eq!(status, 200, "{one}");
    let id = one["id"].as_str().expect("an id");
    let created = one["created_at"].as_str().expect("a time");
    assert!(created.ends_with('Z'), "{created}");
    assert_eq!(
        one,
        json!({"id": id, "created_by_user_id": "somebody", "sandbox_spec_id": "registry.example.com/agent-server:1",
            "status": "STARTING", "session_api_key": null, "exposed_urls": null, "created_at": created})
    );
    let (session, _) = rig.runtimes.newest();
    rig.runtimes.set_status(&session, "running");
    let (_, two) = rig.call("POST", "/sandboxes?sandbox_spec_id=registry.example.com/agent-server:1").await;
    let two = two["id"].as_str().expect("an id").to_owned();

    // Pages, newest first.
    let (_, first) = rig.call("GET", "/sandboxes/search?limit=1").await;
    assert_eq!((&first["items"][0]["id"], first["items"].as_array().map(Vec::len)), (&json!(two), Some(1)));
    let next = first["next_page_id"].as_str().expect("a page id");
    let (_, second) = rig.call("GET", &format!("/sandboxes/search?limit=1&page_id={next}")).await;
    assert_eq!((&second["items"][0]["id"], &second["next_page_id"]), (&json!(id), &Value::Null));
    for (target, expected) in [
        ("/sandboxes/search?limit=0", 422),
        ("/sandboxes/search?limit=101", 422),
        ("/sandboxes/search?page_id=1", 400),
        ("/sandboxes", 422),
        ("/sandbox-specs/search?limit=x", 422),
        ("/sandbox-specs/search?page_id=1", 400),
    ] {
        assert_eq!(rig.call("GET", target).await.0, expected, "{target}");
    }
    for (route, what) in [("sandboxes", "sandboxes"), ("sandbox-specs", "sandbox specs")] {
        let many = vec!["id=x"; 101].join("&");
        let told = json!({"detail": format!("Cannot request more than 100 {what} at once, got 101")});
        assert_eq!(rig.call("GET", &format!("/{route}?{many}")).await, (400, told));
    }
    let (_, batch) = rig.call("GET", &format!("/sandboxes?id={id}&id=none&id={id}")).await;
    assert_eq!((&batch[0]["status"], &batch[1], &batch[2]["id"]), (&json!("RUNNING"), &Value::Null, &json!(id)));

    assert_eq!(rig.call("POST", &format!("/sandboxes/{id}/pause")).await, success);
    let (_, batch) = rig.call("GET", &format!("/sandboxes?id={id}")).await;
    assert_eq!((&batch[0]["status"], &batch[0]["session_api_key"]), (&json!("PAUSED"), &Value::Null));
    assert_eq!(rig.call("POST", &format!("/sandboxes/{id}/resume")).await, success);
    for change in ["pause", "resume"] {
        assert_eq!(rig.call("POST", &format!("/sandboxes/nope/{change}")).await, not_found);
    }

    // Deleted by the path, the query, or both.
    assert_eq!(rig.call("DELETE", "/sandboxes/nope").await, not_found);
    assert_eq!(rig.call("DELETE", "/sandboxes?sandbox_id=nope").await, not_found);
    let (status, told) = rig.call("DELETE", "/sandboxes").await;
    assert_eq!((status, &told["detail"][0]["loc"]), (422, &json!(["query", "sandbox_id"])));
    assert_eq!(rig.call("DELETE", &format!("/sandboxes/{id}?sandbox_id={two}")).await.0, 400);
    assert_eq!(rig.call("DELETE", &format!("/sandboxes/{id}?sandbox_id={id}")).await, success);
    assert_eq!(rig.runtimes.sessions()[&session].status, "stopped");
    assert_eq!(rig.call("DELETE", &format!("/sandboxes?sandbox_id={two}")).await, success);
    assert_eq!(rig.call("GET", "/sandboxes/search").await, (200, json!({"items": [], "next_page_id": null})));

    let unknown = json!({"detail": "Sandbox Spec not found: another"});
    assert_eq!(rig.call("POST", "/sandboxes?sandbox_spec_id=another").await, (404, unknown));
    let (_, specs) = rig.call("GET", "/sandbox-specs/search").await;
    let spec = &specs["items"][0];
    assert_eq!((&spec["id"], &specs["next_page_id"]), (&json!("registry.example.com/agent-server:1"), &Value::Null));
    assert_eq!(spec["working_dir"], "/workspace/project");
    assert_eq!(spec["initial_env"]["OH_VSCODE_PORT"], "60001");
    let (_, found) = rig.call("GET", "/sandbox-specs?id=none&id=registry.example.com/agent-server:1").await;
    assert_eq!(found, json!([null, spec]));
    rig.api.stop().await;
}

#[tokio::test]
async fn recorded_exchanges_have_the_same_answers() {
    const RECORDED: [&str; 2] = ["6osgGulToTzNONWACSWMZh", "24c66c025a00443db86f62f317a931af"];
    let rig = Remote::start().await;
    let (id, session) = rig.sandbox().await;
    let (_, made) = rig.call("GET", &format!("/sandboxes?id={id}")).await;
    let ours = |text: &str| RECORDED.iter().fold(text.to_owned(), |text, recorded| text.replace(recorded, &id));
    let mut seen = 0;
    for line in include_str!("../data/contract/example-sandboxes.jsonl").lines() {
        let case: Value = serde_json::from_str(&ours(line)).expect("JSON");
        let text = |field: &str| case["request"][field].as_str().expect("text").to_owned();
        let (label, mut target) = (case["label"].as_str().expect("text"), text("path"));
        if !text("query").is_empty() {
            target = format!("{target}?{}", text("query"));
        }
        let mut expected = (case["response"]["status"].clone(), case["response"]["body"].clone());
        match label {
            // Made at another time, of another image, by somebody who has a name.
            "sandboxes paused" => {
                for field in ["created_at", "sandbox_spec_id", "created_by_user_id"] {
                    expected.1["items"][0][field] = made[0][field].clone();
                }
            }
            // Named in docs/deviations.md: the path says which.
            "delete unknown" => expected = (json!(404), json!({"detail": "Not Found"})),
            _ => {}
        }
        let (status, body) = rig.api.call(&rig.user, &text("method"), &target, None).await;
        assert_eq!((json!(status), body), expected, "{label}: {target}");
        seen += 1;
    }
    assert_eq!(seen, 7);
    assert_eq!(rig.runtimes.sessions()[&session].status, "stopped");
    rig.api.stop().await;
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_made_leaves_nothing_behind() {
    let rig = Remote::start().await;
    rig.runtimes.set_fault(Some(Fault::Status(403)));
    let (status, told) = rig.call("POST", "/sandboxes").await;
    // Already the look whether it is there fails.
    assert_eq!((status, told), (502, json!({"detail": "The sandboxes' provider does not answer"})));
    rig.runtimes.set_fault(None);
    assert!(rig.runtimes.sessions().is_empty());
    rig.api.stop().await;
    // Where there are none at all.
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("somebody");
    let (status, told) = api.call(&user, "POST", "/api/v1/sandboxes", None).await;
    assert_eq!(status, 503, "{told}");
    assert!(told["detail"].as_str().expect("a sentence").contains("without sandboxes"), "{told}");
    let empty = json!({"items": [], "next_page_id": null});
    assert_eq!(api.call(&user, "GET", "/api/v1/sandboxes/search", None).await, (200, empty.clone()));
    assert_eq!(api.call(&user, "GET", "/api/v1/sandbox-specs/search", None).await, (200, empty));
    api.stop().await;
}

#[tokio::test]
async fn agents_read_their_owners_secrets_with_their_sandboxs_key() {
    let rig = Remote::start().await;
    let (id, session) = rig.sandbox().await;
    let settings = rig.api.stores.settings();
    let given = json!({
        "custom_secrets": {"DEPLOY_KEY": {"secret": "a value", "description": "to deploy"}, "EMPTY": {"secret": ""}},
        "provider_tokens": {"github": {"token": "a token"}, "gitlab": {"token": ""}},
    });
    settings.put(&rig.user, &given.to_string().into()).await.expect("stored");
    let key = rig.runtimes.sessions()[&session].key.clone();
    let ask = async |sandbox: &str, name: &str, key: Option<&str>| {
        let mut request = Request::get(format!("/api/v1/sandboxes/{sandbox}/settings/secrets{name}"));
        if let Some(key) = key {
            request = request.header("x-session-api-key", key);
        }
        rig.api.send(request.body(Body::empty()).expect("a request")).await
    };
    let listed = json!({"secrets": [
        {"name": "DEPLOY_KEY", "description": "to deploy"},
        {"name": "EMPTY", "description": null},
        {"name": "github_token", "description": "github provider token"},
    ]});
    assert_eq!(ask(&id, "", Some(&key)).await, (200, listed));
    assert_eq!(ask(&id, "/DEPLOY_KEY", Some(&key)).await, (200, json!("a value")));
    assert_eq!(ask(&id, "/github_token", Some(&key)).await, (200, json!("a token")));
    assert_eq!(ask(&id, "/EMPTY", Some(&key)).await, (404, json!({"detail": "Secret has no value"})));
    for unknown in ["/gitlab_token", "/NONE"] {
        assert_eq!(ask(&id, unknown, Some(&key)).await, (404, json!({"detail": "Secret not found"})), "{unknown}");
    }
    for name in ["", "/DEPLOY_KEY"] {
        let needed = json!({"detail": "X-Session-API-Key header is required"});
        assert_eq!(ask(&id, name, None).await, (401, needed.clone()));
        assert_eq!(ask(&id, name, Some("")).await, (401, needed));
        assert_eq!(ask(&id, name, Some("another")).await, (401, json!({"detail": "Invalid session API key"})));
        let mismatch = json!({"detail": "Session API key does not match sandbox"});
        assert_eq!(ask("another", name, Some(&key)).await, (403, mismatch));
    }
    rig.api.stop().await;
}
