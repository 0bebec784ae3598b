//! A running conversation is switched to another model, with a stand-in for the agent server: what each state and failure is answered
//! with, and what reaches the agent server.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::Request;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use shared::agent_server::AgentServer;
use shared::aws::Aws;
use shared::config::{Config, ExportConfig, SandboxConfig, SealingConfig, StartConfig};
use shared::http::caller::Caller;
use shared::http::response::with_common_answers;
use shared::http_client::{AddressPolicy, HttpClient};
use shared::sandbox::{SandboxService as _, SandboxStatus};
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tempfile::TempDir;
use tower::ServiceExt as _;
use uuid::Uuid;

use crate::support::api::documented;
use crate::support::engines::Engines;
use crate::support::seed;
use crate::support::stand_in_agent::{Fault, Kind, Nth, StandInAgent};
use crate::support::worker_harness::{SESSION_KEY, StandInSandboxes};

const SANDBOX: &str = "sandbox";
const BUDGET: Duration = Duration::from_secs(30);
const ID: Uuid = Uuid::from_u128(0x11);

struct Harness {
    user: UserId,
    agent: StandInAgent,
    sandboxes: Arc<StandInSandboxes>,
    stores: Stores,
    router: Router,
    engines: Engines,
    _folder: TempDir,
}

impl Harness {
    async fn start() -> Self {
        let folder = TempDir::new().expect("a folder");
        let engines = Engines::start(folder.path()).await;
        let aws = Aws::new(&engines.sdk_config().await);
        let mut names = engines.names("switch-");
        names.job_queue_url = schema::make_all(&aws, &names, "switch-").await.expect("a schema").jobs;
        let sealing = folder.path().join("sealing-key");
        let sealer = Sealer::from_file(&sealing).expect("a key");
        let agent = StandInAgent::start(SESSION_KEY).await;
        agent.set_version("1.58.2");
        let user = UserId::new("u");
        let sandboxes = Arc::new(StandInSandboxes::at(agent.url(), agent.working_dir()));
        sandboxes.start(&user, SANDBOX, None).await.expect("a sandbox");
        let config = Config {
            start: StartConfig::default(),
            sandbox: SandboxConfig::None,
            names: names.clone(),
            sealing: SealingConfig::File(sealing),
            single_user: false,
            live_status_budget: Duration::from_secs(1),
            sandbox_request_budget: BUDGET,
            sandbox_idle_limit: None,
            address_policy: AddressPolicy::Any,
            export: ExportConfig::default(),
        };
        let stores = Stores::new(&names, &aws, &sealer);
        let context = conversations::Context::with_sandboxes(&config, &stores, sandboxes.clone());
        let router = with_common_answers(documented(conversations::router(context)));
        Self { user, agent, sandboxes, stores, router, engines, _folder: folder }
    }

    /// A conversation that the agent server has, too.
    async fn conversation(&self) {
        let time = "2025-01-01T00:00:00Z";
        let row = json!({"type": "conversation", "data": {"id": ID.simple().to_string(), "sandbox_id": SANDBOX,
            "llm_model": "openai/first", "created_at": time, "updated_at": time}});
        seed::load(&self.stores, &self.user, [row]).await;
        let body = json!({"conversation_id": ID, "agent": {},
            "workspace": {"kind": "LocalWorkspace", "working_dir": self.agent.working_dir()}});
        let agent = AgentServer::new(HttpClient::new(AddressPolicy::Any), &self.agent.url(), Some(SESSION_KEY.into()));
        agent.create_conversation(&body, BUDGET).await.expect("created");
    }

    async fn post(&self, route: &str, body: &Value) -> (u16, Value) {
        let request = Request::post(format!("/api/v1/app-conversations/{ID}/{route}"))
            .extension(Caller(self.user.clone()))
            .header("content-type", "application/json")
            .body(Body::from(body.to_string()))
            .expect("a request");
        let answer = self.router.clone().oneshot(request).await.expect("an answer");
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.expect("a body").to_bytes();
        (status, serde_json::from_slice(&body).expect("JSON"))
    }

    async fn to_profile(&self, name: &str) -> (u16, Value) {
        self.post("switch_profile", &json!({"profile_name": name})).await
    }

    async fn settings(&self, settings: &Value) {
        self.stores.settings().put(&self.user, &settings.to_string().into()).await.expect("stored");
    }

    async fn model(&self) -> Option<String> {
        self.stores.conversations().get(&self.user, ID).await.expect("the store").expect("a record").llm_model
    }

    fn switches(&self) -> Vec<Value> {
        let requests = self.agent.requests_to("POST /api/conversations/{id}/switch_llm");
        requests.iter().map(|request| request.json()["llm"].clone()).collect()
    }
}

fn detail(text: &str) -> Value {
    json!({"detail": text})
}

fn profiles() -> Value {
    json!({"llm_model": "openai/first", "llm_api_key": "key-of-settings", "llm_profiles": {"active": null, "profiles": {
        "fast": {"model": "openai/fast", "api_key": "key-of-fast", "base_url": "http://fast.example/v1", "temperature": 0.5},
        "keyless": {"model": "openai/keyless"},
        "elsewhere": {"model": "anthropic/keyless"},
    }}})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_conversation_gets_the_model_of_a_profile() {
    let harness = Harness::start().await;
    harness.settings(&profiles()).await;
    harness.conversation().await;
    assert_eq!(harness.to_profile("fast").await, (200, json!({"success": true})));
    assert_eq!(harness.model().await.as_deref(), Some("openai/fast"));
    let sent = harness.switches().pop().expect("a request");
    for (name, value) in [
        ("model", json!("openai/fast")),
        ("api_key", json!("key-of-fast")),
        ("base_url", json!("http://fast.example/v1")),
        ("temperature", json!(0.5)),
        ("stream", json!(true)),
    ] {
        assert_eq!(sent[name], value, "{name}");
    }
    assert!(sent.as_object().expect("an object").values().all(|value| !value.is_null()), "{sent}");
    let usage = sent["usage_id"].as_str().expect("a usage").to_owned();
    assert!(usage.starts_with("profile:fast:"), "{usage}");

    // The same profile is the same usage; a changed one is another, because the agent server keeps the first configuration of a usage.
    harness.to_profile("fast").await;
    let mut changed = profiles();
    changed["llm_profiles"]["profiles"]["fast"]["temperature"] = json!(0.6);
    harness.settings(&changed).await;
    harness.to_profile("fast").await;
    let usages: Vec<Value> = harness.switches().iter().map(|llm| llm["usage_id"].clone()).collect();
    assert_eq!(usages[1], usage.as_str());
    assert_ne!(usages[2], usage.as_str());

    // A profile without a key gets that of the settings only for the same provider and address.
    harness.to_profile("keyless").await;
    harness.to_profile("elsewhere").await;
    let keys: Vec<Value> = harness.switches()[3..].iter().map(|llm| llm["api_key"].clone()).collect();
    assert_eq!(keys, [json!("key-of-settings"), Value::Null]);

    // Agent servers up to 1.34 would send each token to the webhooks.
    harness.agent.set_version("1.34.0");
    harness.to_profile("fast").await;
    assert_eq!(harness.switches().pop().expect("a request")["stream"], false);
    let settings = harness.stores.settings().get(&harness.user).await.expect("the store").expect("settings");
    assert_eq!((settings.llm.model(), settings.llm_profiles.active()), (Some("openai/first"), None));
    harness.engines.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_obstacle_has_its_answer_in_the_order_of_the_contract() {
    let harness = Harness::start().await;
    let unreachable = detail(&format!("Conversation {ID} is not reachable"));
    let acp = async || harness.post("switch_acp_model", &json!({"model": "m"})).await;
    let (status, answer) = harness.to_profile("").await;
    assert_eq!((status, &answer["detail"][0]["type"]), (422, &json!("string_too_short")), "{answer}");
    assert_eq!(harness.to_profile("fast").await, (404, detail("Settings not found")));
    harness.settings(&profiles()).await;
    assert_eq!(harness.to_profile("none").await, (404, detail("Profile 'none' not found")));
    assert_eq!(harness.to_profile("fast").await, (404, unreachable.clone()));
    assert_eq!(acp().await, (404, unreachable.clone()));
    harness.conversation().await;
    for status in [SandboxStatus::Starting, SandboxStatus::Missing, SandboxStatus::Error] {
        harness.sandboxes.set_status(SANDBOX, status);
        assert_eq!(harness.to_profile("fast").await, (404, unreachable.clone()), "{status:?}");
        assert_eq!(acp().await, (404, unreachable.clone()), "{status:?}");
    }
    harness.sandboxes.set_status(SANDBOX, SandboxStatus::Paused);
    let paused = |what: &str| (409, detail(&format!("Sandbox is paused; resume it before switching {what}.")));
    assert_eq!(harness.to_profile("fast").await, paused("profiles"));
    assert_eq!(acp().await, paused("models"));
    harness.sandboxes.set_status(SANDBOX, SandboxStatus::Running);
    assert_eq!(acp().await, (400, detail("Agent server error: 400")));
    let failed = |status: u16| detail(&format!("Agent server error: {status}"));
    for (status, of_profile, of_acp) in
        [(400, 502, 400), (404, 502, 502), (422, 502, 502), (500, 502, 502), (504, 502, 504)]
    {
        harness.agent.clear_faults();
        let body = r#"{"detail": "secret words"}"#.to_owned();
        for route in ["switch_llm", "switch_acp_model"] {
            let route = format!("POST /api/conversations/{{id}}/{route}");
            harness.agent.inject(Fault::new(&route, Nth::Always, Kind::Status(status, body.clone())));
        }
        assert_eq!(harness.to_profile("fast").await, (of_profile, failed(status)));
        assert_eq!(acp().await, (of_acp, failed(status)));
    }
    for kind in [Kind::CutBefore, Kind::CutAfter] {
        harness.agent.clear_faults();
        for route in ["switch_llm", "switch_acp_model"] {
            let route = format!("POST /api/conversations/{{id}}/{route}");
            harness.agent.inject(Fault::new(&route, Nth::Always, kind.clone()));
        }
        let expected = (502, detail("Failed to reach agent server."));
        assert_eq!(harness.to_profile("fast").await, expected);
        assert_eq!(acp().await, expected);
    }
    assert_eq!(harness.model().await.as_deref(), Some("openai/first"), "nothing was recorded");
    harness.agent.clear_faults();
    assert_eq!(harness.to_profile("fast").await.0, 200);
    harness.engines.shutdown().await;
}
