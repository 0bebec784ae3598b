//! The models as the product sees them: through its own clients.

mod commands;
mod conversations;
mod provider;
mod scenario;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::{Method, Response, StatusCode};
use jiff::Timestamp;
use serde_json::{Value, json};
use shared::agent_server::AgentServer;
use shared::http_client::{AddressPolicy, Cause, HttpClient};
use shared::simulation::{Entered, Exchange, Network};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::history::{Life, Outcome};
use super::*;
use crate::net::{Failure, Pending, Request, Server, to_client};

const EPOCH: Timestamp = Timestamp::constant(1_800_000_000, 0);
const WEBHOOKS: &str = "http://product.sim/api/v1/webhooks";
const LONG: Duration = Duration::from_secs(120);

/// Runs a simulation on a paused clock.
fn simulate<T>(simulation: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.expect("a runtime").block_on(simulation)
}

/// The webhooks of a product: stores what it accepts.
#[derive(Default)]
struct Product {
    state: Mutex<Received>,
    /// The probabilities of a 503 and of a hang, and the seed that decides.
    refusals: f64,
    hangs: f64,
}

#[derive(Default)]
struct Received {
    requests: u64,
    /// The ids of the events of each conversation, in the order of their arrival, and how often each arrived.
    events: BTreeMap<Uuid, Vec<(String, u32)>>,
    snapshots: Vec<Value>,
    notified: Vec<(String, String)>,
}

impl Server for Product {
    fn handle(&self, request: Request) -> Pending {
        let mut received = self.state.lock().expect("the product");
        received.requests += 1;
        let drawn = crate::dice::random(7, &("product", received.requests));
        let status =
            |status: StatusCode| Ok(Response::builder().status(status).body(Bytes::new()).expect("a response"));
        let reply = if drawn < self.refusals {
            status(StatusCode::SERVICE_UNAVAILABLE)
        } else if drawn < self.refusals + self.hangs {
            Err(Failure::Hang)
        } else {
            received.take(&request);
            status(StatusCode::OK)
        };
        Box::pin(async move { reply })
    }
}

impl Received {
    fn take(&mut self, request: &Request) {
        let header = |name: &str| request.headers.get(name).map(|value| value.to_str().expect("text").to_owned());
        let path = request.path.strip_prefix("/api/v1/webhooks/").expect("the path of a webhook");
        match path.split_once('/') {
            Some(("commands", task)) => {
                self.notified.push((task.to_owned(), header("x-access-token").expect("a token")));
            }
            Some(("events", conversation)) => {
                assert!(header("x-session-api-key").is_some_and(|key| key.starts_with("key-")));
                let seen = self.events.entry(Uuid::parse_str(conversation).expect("an id")).or_default();
                let batch: Vec<Value> = serde_json::from_slice(&request.body).expect("a batch");
                for event in batch {
                    let id = event["id"].as_str().expect("an id").to_owned();
                    match seen.iter_mut().find(|(seen, _)| *seen == id) {
                        Some((_, times)) => *times += 1,
                        None => seen.push((id, 1)),
                    }
                }
            }
            None => self.snapshots.push(serde_json::from_slice(&request.body).expect("a snapshot")),
            Some(_) => panic!("{path}"),
        }
    }
}

/// The network between the product's clients and the models. It hashes what it carries.
#[derive(Clone)]
struct Wire {
    sandboxes: Sandboxes,
    began: Instant,
    hash: Arc<Mutex<DefaultHasher>>,
}

impl Wire {
    fn record(&self, what: impl Hash) {
        (self.began.elapsed(), what).hash(&mut *self.hash.lock().expect("the hash"));
    }
}

impl Network for Wire {
    fn send(&self, request: reqwest::Request) -> Exchange {
        let wire = self.clone();
        Box::pin(async move {
            let request = Request::of_client(request).await?;
            // The boundary of a form is random.
            let content = server::multipart_file(&request).unwrap_or(&request.body);
            wire.record((request.method.as_str(), &request.authority, &request.path, &request.query, content));
            let reply = wire.sandboxes.handle(request).await;
            match &reply {
                Ok(response) => wire.record((response.status().as_u16(), response.body())),
                Err(failure) => wire.record(format!("{failure:?}")),
            }
            to_client(reply).await
        })
    }
}

/// A simulation without the product: its HTTP client, the models, and a receiver of webhooks.
struct World {
    sandboxes: Sandboxes,
    product: Arc<Product>,
    http: HttpClient,
    wire: Wire,
    _entered: Entered,
}

impl World {
    fn new(settings: Settings) -> Self {
        Self::with(settings, Product::default())
    }

    fn with(settings: Settings, product: Product) -> Self {
        let (seed, epoch, product) = (settings.seed, settings.epoch, Arc::new(product));
        let sandboxes = Sandboxes::new(settings);
        sandboxes.connect(product.clone());
        let wire = Wire { sandboxes: sandboxes.clone(), began: Instant::now(), hash: Arc::default() };
        let entered = shared::simulation::enter(seed, epoch, Arc::new(wire.clone()));
        Self { sandboxes, product, http: HttpClient::new(AddressPolicy::Any), wire, _entered: entered }
    }

    /// Requests something of the provider: the status and the body of the response.
    async fn provider(&self, method: Method, path: &str, body: Value) -> Result<(u16, Value), Cause> {
        let request = self.http.request(method, &format!("{PROVIDER_URL}{path}")).map_err(|error| error.cause)?;
        let request = request.with(|request| request.header("X-API-Key", API_KEY).json(&body));
        let answer = request.send(Duration::from_secs(15), |_| 1 << 20).await.map_err(|error| error.cause)?;
        Ok((answer.status.as_u16(), serde_json::from_slice(&answer.body).unwrap_or_default()))
    }

    async fn start(&self, session: &str) -> Result<(u16, Value), Cause> {
        let environment = json!({"OH_WEBHOOKS_0_BASE_URL": WEBHOOKS});
        self.provider(Method::POST, "/start", json!({"session_id": session, "environment": environment})).await
    }

    async fn change(&self, change: &str, runtime: &Value) -> Result<(u16, Value), Cause> {
        let body = json!({"runtime_id": runtime["runtime_id"]});
        self.provider(Method::POST, &format!("/{change}"), body).await
    }

    fn agent_server(&self, runtime: &Value) -> AgentServer {
        let text = |field: &str| runtime[field].as_str().expect("a text").to_owned();
        AgentServer::new(self.http.clone(), &text("url"), Some(text("session_api_key").into()))
    }

    /// Starts a sandbox, and waits for its agent server.
    async fn sandbox(&self, session: &str) -> (Value, AgentServer) {
        let (status, runtime) = self.start(session).await.expect("a response");
        assert_eq!(status, 200, "{runtime}");
        let agent_server = self.agent_server(&runtime);
        self.alive(&agent_server).await;
        (runtime, agent_server)
    }

    async fn alive(&self, agent_server: &AgentServer) {
        let deadline = Instant::now() + LONG;
        while !agent_server.is_alive().await {
            assert!(Instant::now() < deadline, "the agent server does not respond");
            sleep(Duration::from_secs(1)).await;
        }
    }

    /// Waits until nothing happens any more.
    async fn quiet(&self) {
        let deadline = Instant::now() + Duration::from_secs(24 * 3600);
        while !self.sandboxes.is_quiet() {
            assert!(Instant::now() < deadline, "{:?}", self.sandboxes.counters());
            sleep(Duration::from_secs(1)).await;
        }
    }

    fn hash(&self) -> u64 {
        self.wire.hash.lock().expect("the hash").finish()
    }

    fn received(&self) -> std::sync::MutexGuard<'_, Received> {
        self.product.state.lock().expect("the product")
    }
}

fn settings(seed: u64) -> Settings {
    Settings::new(seed, EPOCH)
}

/// The request that creates a conversation.
fn body(id: Uuid, message: Option<&str>) -> Value {
    json!({
        "conversation_id": id.hyphenated().to_string(),
        "workspace": {"working_dir": "/workspace/project", "kind": "LocalWorkspace"},
        "agent": {"llm": {"model": "openai/simulated", "usage_id": "agent"}, "kind": "Agent"},
        "initial_message": message.map(|text| json!({"role": "user", "content": content(text), "run": true})),
    })
}

fn content(text: &str) -> Value {
    json!([{"type": "text", "text": text}])
}

/// The lives of all sandboxes.
fn lives(world: &World) -> BTreeSet<Life> {
    world.sandboxes.history().into_iter().flat_map(|sandbox| sandbox.life).map(|(_, what)| what).collect()
}
