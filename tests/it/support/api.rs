//! The routers of all functions on embedded engines, for many tenants. Each request carries its caller, as API Gateway
//! passes it on.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;

use axum::Router;
use axum::body::Body;
use axum::extract::MatchedPath;
use axum::middleware::{self, Next};
use http::{Request, header};
use http_body_util::BodyExt as _;
use regex_lite::Regex;
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::config::{Config, ExportConfig, Names, SandboxConfig, SealingConfig, StartConfig};
use shared::http::caller::Caller;
use shared::http::response::with_common_answers;
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tower::ServiceExt as _;

use super::engines::Engines;
use super::hostile_aws::{AwsFaults, HostileAws, clients, retries};
use super::iam_proxy::IamProxy;
use super::meter::Meter;
use super::server::Server;

pub const PREFIX: &str = "api-";

/// The API without a server: it listens on no port, and jobs stay in the queue until a test calls [`Api::work`].
#[derive(Debug)]
pub struct Api {
    pub aws: Aws,
    pub names: Names,
    pub sealer: Sealer,
    pub stores: Stores,
    config: Config,
    router: Router,
    worker: worker::Context,
    queue: String,
    engines: Engines,
    /// What the functions' calls to AWS meet.
    pub hostile: HostileAws,
}

impl Api {
    /// Starts the API on the engines of a folder, which keeps all data when [`Api::stop`] is called.
    pub async fn at(folder: &Path, sandbox: SandboxConfig) -> Self {
        Self::with_faults(folder, sandbox, AwsFaults::none()).await
    }

    /// As [`Api::at`], on an empty folder, with functions whose calls to AWS meet these faults.
    pub async fn with_faults(folder: &Path, sandbox: SandboxConfig, faults: AwsFaults) -> Self {
        let engines = Engines::start(folder).await;
        let mut names = engines.names(PREFIX);
        let aws = Aws::new(&engines.sdk_config().await);
        let queues = schema::make_all(&aws, &names, PREFIX).await.expect("a schema");
        let mut hostile = HostileAws::start(&engines, PREFIX, faults).await;
        let aws = hostile.clients_of_test(&engines).await;
        let of_functions = match faults.is_none() {
            true => aws.clone(),
            false => {
                let urls = [&*hostile.dynamodb, &hostile.s3, &hostile.sqs];
                clients(&hostile.retry(engines.network_sdk_config().await), urls)
            }
        };
        names.job_queue_url.clone_from(&queues.jobs);
        names.export_queue_url.clone_from(&queues.exports);
        let sealing_key_file = folder.join("sealing-key");
        let sealer = Sealer::from_file(&sealing_key_file).expect("a key");
        let config = Config {
            start: StartConfig::default(),
            sandbox,
            names: names.clone(),
            sealing: SealingConfig::File(sealing_key_file),
            single_user: false,
            live_status_budget: std::time::Duration::from_secs(1),
            sandbox_request_budget: std::time::Duration::from_secs(2),
            sandbox_idle_limit: None,
            address_policy: shared::http_client::AddressPolicy::Any,
            export: ExportConfig::default(),
        };
        let router = router(&config, &of_functions, &sealer);
        let stores = Stores::new(&names, &aws, &sealer);
        let worker = worker::Context::new(&config, &of_functions, &sealer);
        Self { aws, names, sealer, stores, config, router, worker, queue: queues.jobs, engines, hostile }
    }

    /// Sends the AWS calls of each function, the worker included, through a proxy that evaluates the function's IAM
    /// policy.
    pub async fn guard(&mut self, guard: &IamProxy) -> Vec<Server> {
        let (config, sealer, engines) = (&self.config, &self.sealer, &self.engines);
        let mut ways = Vec::new();
        let mut aws = HashMap::new();
        for function in guard.functions() {
            let mut way = async |upstream: &str| {
                let server = guard.to(function, upstream).await;
                let url = server.url();
                ways.push(server);
                url
            };
            let urls = [way(&engines.dynamodb).await, way(&engines.s3).await, way(&engines.sqs).await];
            aws.insert(
                function.clone(),
                clients(&engines.network_sdk_config().await, urls.each_ref().map(String::as_str)),
            );
        }
        let aws = |function: &str| &aws[function];
        let routers = Router::new()
            .merge(conversations::router(conversations::Context::new(config, aws("conversations"), sealer)))
            .merge(download::router(download::Context::new(config, aws("download"), sealer)))
            .merge(start::router(start::Context::new(config, aws("start"), sealer)))
            .merge(stream_start::router(stream_start::Context::new(config, aws("stream-start"), sealer)))
            .merge(start_tasks::router(start_tasks::Context::new(config, aws("start-tasks"))))
            .merge(skills::router(skills::Context::new(config, aws("skills"), sealer)))
            .merge(sandboxes::router(sandboxes::Context::new(config, aws("sandboxes"), sealer)))
            .merge(sandboxes::secrets_router(sandboxes::Context::new(config, aws("sandboxes"), sealer)))
            .merge(settings::router(settings::Context::new(config, aws("settings"), sealer)))
            .merge(events::router(events::Context::new(config, aws("events"), sealer)))
            .merge(events::webhooks_router(events::Context::new(config, aws("events"), sealer)))
            .merge(web_client::router(web_client::Context::from_env()))
            .merge(web_client::health_router());
        self.worker = worker::Context::new(config, aws("worker"), sealer);
        self.router = with_common_answers(documented(routers));
        ways
    }

    /// Sends all later requests to DynamoDB through a meter.
    pub async fn measure(&mut self, meter: &Meter) -> Server {
        let way = meter.to(&self.engines).await;
        self.use_dynamodb_at(&way.url()).await;
        way
    }

    /// The address of DynamoDB.
    pub fn dynamodb(&self) -> String {
        self.engines.dynamodb.clone()
    }

    /// Sends all later requests to DynamoDB to this address.
    pub async fn use_dynamodb_at(&mut self, url: &str) {
        let sdk = self.engines.network_sdk_config().await;
        let dynamodb =
            aws_sdk_dynamodb::config::Builder::from(&sdk).endpoint_url(url).retry_partition(retries()).build();
        let aws = Aws { dynamodb: aws_sdk_dynamodb::Client::from_conf(dynamodb), ..self.aws.clone() };
        self.router = router(&self.config, &aws, &self.sealer);
    }

    /// Changes the configuration of starts for all later requests.
    pub fn configure_starts(&mut self, change: impl FnOnce(&mut StartConfig)) {
        change(&mut self.config.start);
        self.router = router(&self.config, &self.aws, &self.sealer);
    }

    /// Sends all later requests to the engines over their ports, as other processes do.
    pub async fn use_sockets(&mut self) {
        let aws = Aws::new(&self.engines.network_sdk_config().await);
        self.router = router(&self.config, &aws, &self.sealer);
    }

    /// Sends all later requests to the engines in process again.
    pub fn use_no_sockets(&mut self) {
        self.router = router(&self.config, &self.aws, &self.sealer);
    }

    /// The path templates of all routers.
    pub fn paths(&self) -> BTreeSet<String> {
        paths(&self.router)
    }

    /// The path templates that the local gateway serves only to authenticated callers.
    pub fn paths_for_callers(&self) -> BTreeSet<String> {
        paths(&local::server::functions(&self.config, &self.aws, &self.sealer))
    }

    pub async fn stop(self) {
        drop(self.router);
        self.engines.shutdown().await;
    }

    /// Handles the jobs of the queue until it is empty.
    pub async fn work(&self) {
        while self.work_once().await {}
    }

    /// Handles one job; returns false if there is none.
    pub async fn work_once(&self) -> bool {
        let received = self.aws.sqs.receive_message().queue_url(&self.queue).send().await.expect("the queue");
        let Some(message) = received.messages.unwrap_or_default().pop() else { return false };
        let event = json!({"Records": [{"messageId": message.message_id, "body": message.body}]});
        let handled = worker::handle(&self.worker, event).await.expect("handled");
        assert!(handled.batch_item_failures.is_empty(), "{message:?}");
        let receipt = message.receipt_handle.expect("a receipt");
        self.aws.sqs.delete_message().queue_url(&self.queue).receipt_handle(receipt).send().await.expect("deleted");
        true
    }

    /// Sends one request of a user. Returns the status, and the body as JSON, or as text if it is not JSON.
    pub async fn call(&self, user: &UserId, method: &str, target: &str, body: Option<&Value>) -> (u16, Value) {
        let mut request = Request::builder().method(method).uri(target).extension(Caller(user.clone()));
        if body.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = body.map_or_else(Body::empty, |body| Body::from(body.to_string()));
        self.send(request.body(body).expect("a request")).await
    }

    pub async fn send(&self, request: Request<Body>) -> (u16, Value) {
        let (status, text) = self.answer(request).await;
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Sends a `GET` request of a user. Returns the status and the body as text.
    pub async fn text(&self, user: &UserId, target: &str) -> (u16, String) {
        let request = Request::get(target).extension(Caller(user.clone())).body(Body::empty());
        self.answer(request.expect("a request")).await
    }

    /// Returns the response unread.
    pub async fn response(&self, request: Request<Body>) -> axum::response::Response {
        self.router.clone().oneshot(request).await.expect("an answer")
    }

    async fn answer(&self, request: Request<Body>) -> (u16, String) {
        let answer = self.router.clone().oneshot(request).await.expect("an answer");
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await.expect("a body").to_bytes();
        (status, String::from_utf8_lossy(&body).into_owned())
    }

    pub async fn get(&self, user: &UserId, path: &str, query: &[(&str, String)]) -> (u16, Value) {
        let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(query).finish();
        self.call(user, "GET", &format!("/api/v1/app-conversations{path}?{query}"), None).await
    }
}

/// Fails a test whose request is answered with a status that the route table does not declare for the route.
pub fn documented(router: Router) -> Router {
    router.layer(middleware::from_fn(async |path: MatchedPath, request: axum::extract::Request, next: Next| {
        let method = request.method().to_string();
        let response = next.run(request).await;
        // None: a method that the path does not have.
        if let Some(route) = ::routes::find(&method, path.as_str()) {
            let status = response.status().as_u16();
            let errors = route.error_responses().into_iter().map(|error| error.status);
            let mut declared = route.own_responses.iter().map(|own| own.status).chain(errors);
            assert!(declared.any(|one| one == status), "{method} {}: {status} is undocumented", path.as_str());
        }
        response
    }))
}

/// axum lists the paths of a router only in its debug output.
fn paths(router: &Router) -> BTreeSet<String> {
    let text = format!("{router:?}");
    let (text, _fallbacks) = text.split_once("fallback_router").expect("axum's fields");
    let pattern = Regex::new(r#"RouteId\(\d+\): "([^"]+)""#).expect("a pattern");
    let paths: BTreeSet<String> = pattern.captures_iter(text).map(|found| found[1].to_owned()).collect();
    assert!(!paths.is_empty(), "{text}");
    paths
}

fn router(config: &Config, aws: &Aws, sealer: &Sealer) -> Router {
    let functions = local::server::functions(config, aws, sealer);
    let without_user = local::server::functions_without_user(config, aws, sealer);
    with_common_answers(documented(functions.merge(without_user).merge(web_client::health_router())))
}
