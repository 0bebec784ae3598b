//! A world: the product's functions on the models of AWS, of the sandbox provider and of agent servers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use http::{Response, StatusCode, header};
use http_body_util::BodyExt as _;
use jiff::Timestamp;
use secrecy::SecretString;
use serde_json::{Value, json};
use shared::config::{Config, ExportConfig, RemoteSandboxConfig, SandboxConfig, SealingConfig, StartConfig};
use shared::http::caller::Caller;
use shared::http::response::with_common_answers;
use shared::http_client::AddressPolicy;
use shared::simulation::{Entered, Exchange, Network};
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tower::ServiceExt as _;
use uuid::Uuid;

use crate::agents::{API_KEY, PROVIDER_URL, Pace, Sandboxes, Settings};
use crate::aws::lambda::{Ended, Function, Handler, Invocation};
use crate::aws::sdk_client::{Detail, Trace};
use crate::aws::services::Services;
use crate::aws::{self, Clock, lock};
use crate::net::{Pending, Reply, Request, Server, to_client};

/// When every simulation begins.
pub const EPOCH: Timestamp = Timestamp::constant(1_800_000_000, 0);
/// What API Gateway waits for a function.
const GATEWAY_TIMEOUT: Duration = Duration::from_secs(29);
const WORKER_TIMEOUT: Duration = Duration::from_secs(150);
const EXPORT_TIMEOUT: Duration = Duration::from_secs(900);
/// `ExportConcurrency`.
const EXPORTS: usize = 2;
const MINUTE: Duration = Duration::from_secs(60);
/// The concurrent executions of an account.
const ACCOUNT_CONCURRENCY: usize = 1000;
/// The name of the worker's function.
pub const WORKER: &str = "worker";

/// The conditions of a world.
#[derive(Clone, Debug)]
pub struct Conditions {
    pub seed: u64,
    pub aws: aws::Faults,
    pub agents: crate::agents::Faults,
    pub pace: Pace,
    /// The maximum number of sandboxes that the provider runs.
    pub cap: Option<usize>,
    /// The worker's `MaximumConcurrency`.
    pub workers: usize,
}

impl Conditions {
    /// Whether nothing fails.
    pub fn is_calm(&self) -> bool {
        self.aws == aws::Faults::none() && self.agents == crate::agents::Faults::default()
    }
}

/// The product and its surroundings.
#[derive(Clone)]
pub struct World(Arc<Inner>);

struct Inner {
    services: Services,
    sandboxes: Sandboxes,
    config: Config,
    sealer: Sealer,
    /// The routes of each function in each execution environment, since a process keeps state.
    routers: Mutex<BTreeMap<(&'static str, u64), Router>>,
    workers: Mutex<BTreeMap<u64, Arc<worker::Context>>>,
    exports: Mutex<BTreeMap<u64, Arc<exports::Context>>>,
}

/// Sends what the product's HTTP client sends to the models.
struct Wire {
    sandboxes: Sandboxes,
    trace: Trace,
}

impl World {
    /// Starts a world. The product is in it until the second value is dropped.
    pub async fn start(conditions: &Conditions) -> (Self, Entered) {
        let Conditions { seed, aws, agents, pace, cap, workers } = conditions.clone();
        let clock = Clock::start(EPOCH);
        let is_set = |name: &str| std::env::var_os(name).is_some();
        let detail = match (is_set("SIM_LINES"), is_set("SIM_BODIES")) {
            (true, _) => Detail::Lines,
            (false, true) => Detail::Bodies,
            (false, false) => Detail::Sizes,
        };
        let trace = Trace::new(clock, detail);
        let sandboxes = Sandboxes::new(Settings { seed, epoch: EPOCH, faults: agents, pace, cap });
        let wire = Wire { sandboxes: sandboxes.clone(), trace: trace.clone() };
        let entered = shared::simulation::enter(seed, EPOCH, Arc::new(wire));
        let services = Services::start(seed, clock, &aws, ACCOUNT_CONCURRENCY, trace).await;
        let remote = RemoteSandboxConfig {
            deployment: Some("simulation".to_owned()),
            api_url: PROVIDER_URL.to_owned(),
            api_key: Some(API_KEY.into()),
            image: "registry.example.com/agent-server:1".to_owned(),
            resource_factor: 1,
            runtime_class: "sysbox".to_owned(),
            image_pull_secrets: Vec::new(),
            max_sandboxes: 1000,
            web_url: Some("http://product.sim".to_owned()),
            allow_cors_origins: Vec::new(),
        };
        // As template.yaml configures the functions, except for the limit of sandboxes.
        let config = Config {
            names: services.names.clone(),
            start: StartConfig { web_url: Some("http://product.sim".to_owned()), ..StartConfig::default() },
            sandbox: SandboxConfig::Remote(remote),
            sealing: SealingConfig::File("unused".into()),
            single_user: false,
            live_status_budget: Duration::from_millis(1500),
            sandbox_request_budget: Duration::from_secs(20),
            sandbox_idle_limit: Some(15 * MINUTE),
            export: ExportConfig::default(),
            address_policy: AddressPolicy::Any,
        };
        let (routers, workers_of_environments) = (Mutex::default(), Mutex::default());
        let sealer = Sealer::ephemeral();
        let world = Self(Arc::new(Inner {
            services: services.clone(),
            sandboxes: sandboxes.clone(),
            config,
            sealer,
            routers,
            workers: workers_of_environments,
            exports: Mutex::default(),
        }));
        let handler: Handler =
            Arc::new(|_: Invocation| Box::pin(async { Err("it is called with a request".to_owned()) }));
        for name in ["start", "start-tasks", "conversations", "sandboxes", "events", "download"] {
            services.lambda.add(Function { name, timeout: GATEWAY_TIMEOUT, reserved: None, handler: handler.clone() });
        }
        let of_worker = world.clone();
        let handler: Handler = Arc::new(move |invocation: Invocation| {
            let context = of_worker.worker(invocation.environment);
            Box::pin(async move {
                let response = worker::handle(&context, invocation.event).await.map_err(|error| error.context())?;
                serde_json::to_value(response).map_err(|error| error.to_string())
            })
        });
        services.lambda.add(Function { name: WORKER, timeout: WORKER_TIMEOUT, reserved: None, handler });
        services.map_worker(WORKER, workers);
        let of_exports = world.clone();
        let handler: Handler = Arc::new(move |invocation: Invocation| {
            let context = of_exports.exports(invocation.environment);
            Box::pin(async move {
                let response = exports::handle(&context, invocation.event).await.map_err(|error| error.context())?;
                serde_json::to_value(response).map_err(|error| error.to_string())
            })
        });
        services.lambda.add(Function { name: "exports", timeout: EXPORT_TIMEOUT, reserved: None, handler });
        services.map_exports("exports", EXPORTS);
        services.lambda.schedule(WORKER, MINUTE, json!({"source": "aws.scheduler"}));
        sandboxes.connect(Arc::new(world.clone()));
        (world, entered)
    }

    pub fn services(&self) -> &Services {
        &self.0.services
    }

    pub fn sandboxes(&self) -> &Sandboxes {
        &self.0.sandboxes
    }

    /// Stores on clients of their own, whose calls meet faults too.
    pub fn stores(&self) -> Stores {
        Stores::new(&self.0.config.names, &self.0.services.aws(), &self.0.sealer)
    }

    /// The ids of a conversation's events that are stored.
    pub fn stored_events(&self, user: &UserId, conversation: Uuid) -> BTreeSet<String> {
        let partition = user.key_of(&conversation.simple().to_string());
        let rows = self.0.services.dynamodb.partition(&self.0.services.names.events, &partition);
        rows.iter().filter_map(|row| row["id"]["S"].as_str().map(str::to_owned)).collect()
    }

    /// The time since the simulation began.
    pub fn elapsed(&self) -> Duration {
        self.0.services.clock.elapsed()
    }

    /// Stores a user's settings: a model, a git provider's token, an MCP server, and how starts share sandboxes.
    pub async fn settings(&self, user: &UserId, grouping: &str) {
        let document = json!({
            "llm_model": "openai/simulated", "llm_api_key": "sk-test", "sandbox_grouping_strategy": grouping,
            "provider_tokens": {"github": {"token": "ghp-1"}},
            "mcp_config": {"mcpServers": {"a": {"url": "https://mcp.example/a"}}},
        });
        let document = SecretString::from(document.to_string());
        for _ in 0..20 {
            if self.stores().settings().put(user, &document).await.is_ok() {
                return;
            }
        }
        panic!("the settings of {user} cannot be stored");
    }

    fn worker(&self, environment: u64) -> Arc<worker::Context> {
        let inner = &*self.0;
        let mut workers = lock(&inner.workers);
        let context = || Arc::new(worker::Context::new(&inner.config, &inner.services.aws(), &inner.sealer));
        workers.entry(environment).or_insert_with(context).clone()
    }

    fn exports(&self, environment: u64) -> Arc<exports::Context> {
        let inner = &*self.0;
        let mut contexts = lock(&inner.exports);
        let context = || Arc::new(exports::Context::new(&inner.config, &inner.services.aws()));
        contexts.entry(environment).or_insert_with(context).clone()
    }

    fn router(&self, function: &'static str, environment: u64) -> Router {
        let inner = &*self.0;
        let make = || {
            let (config, aws, sealer) = (&inner.config, &inner.services.aws(), &inner.sealer);
            let routes = match function {
                "start" => start::router(start::Context::new(config, aws, sealer)),
                "start-tasks" => start_tasks::router(start_tasks::Context::new(config, aws)),
                "conversations" => conversations::router(conversations::Context::new(config, aws, sealer)),
                "sandboxes" => sandboxes::router(sandboxes::Context::new(config, aws, sealer)),
                "download" => download::router(download::Context::new(config, aws, sealer)),
                _ => events::webhooks_router(events::Context::new(config, aws, sealer)),
            };
            with_common_answers(routes)
        };
        lock(&inner.routers).entry((function, environment)).or_insert_with(make).clone()
    }

    /// Sends a request through API Gateway to a function. Without a status there was no response in time, or only one of the gateway.
    pub async fn call(
        &self,
        function: &'static str,
        request: http::Request<Body>,
    ) -> Result<(StatusCode, Bytes), Ended> {
        let run = self.0.services.lambda.run(function, |environment| {
            let router = self.router(function, environment);
            async move {
                let response = router.oneshot(request).await.expect("a response");
                let status = response.status();
                (status, response.into_body().collect().await.expect("a body").to_bytes())
            }
        });
        match tokio::time::timeout(GATEWAY_TIMEOUT, run).await {
            Ok(ended) => ended,
            Err(_elapsed) => Err(Ended::TimedOut),
        }
    }

    /// Sends a user's request with a JSON body.
    pub async fn send(
        &self,
        function: &'static str,
        user: &UserId,
        method: &str,
        path: &str,
        key: Option<&str>,
        body: &Value,
    ) -> Result<(u16, Value), Ended> {
        let mut request = http::Request::builder().method(method).uri(path).extension(Caller(user.clone()));
        if let Some(key) = key {
            request = request.header("idempotency-key", key);
        }
        let body = match body {
            Value::Null => Body::empty(),
            body => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Body::from(body.to_string())
            }
        };
        let (status, body) = self.call(function, request.body(body).expect("a request")).await?;
        Ok((status.as_u16(), serde_json::from_slice(&body).unwrap_or_default()))
    }
}

/// API Gateway's webhook routes, for agent servers.
impl Server for World {
    fn handle(&self, request: Request) -> Pending {
        let world = self.clone();
        Box::pin(async move {
            let mut call = http::Request::new(Body::from(request.body));
            *call.method_mut() = request.method;
            *call.uri_mut() = request.path.parse().expect("a path");
            *call.headers_mut() = request.headers;
            let (status, body) = match world.call("events", call).await {
                Ok(answer) => answer,
                Err(Ended::Throttled) => (StatusCode::TOO_MANY_REQUESTS, Bytes::new()),
                Err(Ended::TimedOut) => (StatusCode::GATEWAY_TIMEOUT, Bytes::new()),
                Err(Ended::Crashed) => (StatusCode::BAD_GATEWAY, Bytes::new()),
            };
            Ok(Response::builder().status(status).body(body).expect("a response"))
        })
    }
}

impl Network for Wire {
    fn send(&self, request: reqwest::Request) -> Exchange {
        let (sandboxes, trace) = (self.sandboxes.clone(), self.trace.clone());
        Box::pin(async move {
            let request = Request::of_client(request).await?;
            let sent = trace.sent(&without_boundary(&request));
            let reply: Reply = sandboxes.handle(request).await;
            trace.received(sent, &reply);
            to_client(reply).await
        })
    }
}

/// The request as it is traced: the boundary of a form is random, and reqwest takes it from a generator of its own.
fn without_boundary(request: &Request) -> Request {
    let kind = request.headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let Some((_, boundary)) = kind.split_once("boundary=") else { return request.clone() };
    let body = String::from_utf8_lossy(&request.body).replace(boundary, "boundary").into_bytes();
    Request { body: body.into(), ..request.clone() }
}
