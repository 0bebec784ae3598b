//! Clients of the AWS SDK that call the servers of a simulation. Their clock, sleeps and retries depend on the simulation alone.

use std::collections::BTreeMap;
use std::fmt;
use std::fmt::Write as _;
use std::hash::Hash;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use aws_config::{AppName, BehaviorVersion, Region, SdkConfig};
use aws_sdk_dynamodb::config::retry::RetryPartition;
use aws_sdk_dynamodb::config::{
    AsyncSleep, Credentials, IdentityCache, SharedAsyncSleep, SharedCredentialsProvider, Sleep,
};
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::auth::{AuthScheme, AuthSchemeEndpointConfig, AuthSchemeId, Sign};
use aws_smithy_runtime_api::client::http::{
    HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::identity::{Identity, SharedIdentityResolver};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_runtime_api::client::result::ConnectorError;
use aws_smithy_runtime_api::client::runtime_components::{GetIdentityResolver, RuntimeComponents};
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::config_bag::ConfigBag;
use aws_smithy_types::retry::ErrorKind;
use aws_types::sdk_config::{SharedTimeSource, TimeSource};
use aws_types::service_config::{LoadServiceConfig, ServiceConfigKey};
use bytes::Bytes;
use http::Method;
use http_body_util::BodyExt as _;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use shared::aws::Aws;

use super::{Clock, lock};
use crate::net::{Failure, Reply, Request, Server};
use crate::{cost, dice};

/// The authorities of the services. Host names below `.invalid` never resolve.
pub const DYNAMODB: &str = "dynamodb.invalid";
pub const S3: &str = "s3.invalid";
pub const SQS: &str = "sqs.invalid";
pub const REGION: &str = "us-east-1";

/// How much of a request and of a response is in the hash of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// Of bodies, the sizes alone. Their JSON is read and hashed in any order of the members otherwise, which takes a fifth of the time of
    /// a simulation.
    Sizes,
    /// Everything.
    Bodies,
    /// Everything, and a line for each call, with which two runs can be compared.
    Lines,
}

/// The calls of a simulation in their order, as a hash. Two runs of one seed have the same.
#[derive(Clone, Debug)]
pub struct Trace {
    clock: Clock,
    detail: Detail,
    state: Arc<Mutex<TraceState>>,
}

#[derive(Debug, Default)]
struct TraceState {
    hash: u64,
    calls: u64,
    /// By the function that calls, and by what it calls.
    by_caller: BTreeMap<(&'static str, &'static str), u64>,
    /// A line for each call, with which two runs can be compared.
    lines: Option<Vec<String>>,
}

impl Trace {
    pub fn new(clock: Clock, detail: Detail) -> Self {
        let lines = (detail == Detail::Lines).then(Vec::new);
        Self { clock, detail, state: Arc::new(Mutex::new(TraceState { lines, ..TraceState::default() })) }
    }

    pub fn hash(&self) -> u64 {
        lock(&self.state).hash
    }

    pub fn calls(&self) -> u64 {
        lock(&self.state).calls
    }

    /// Requests by the function that sent them and by what they were sent to.
    pub fn calls_by_caller(&self) -> BTreeMap<(&'static str, &'static str), u64> {
        lock(&self.state).by_caller.clone()
    }

    pub fn lines(&self) -> Vec<String> {
        lock(&self.state).lines.clone().unwrap_or_default()
    }

    /// Notes a request before it is sent.
    pub fn sent(&self, request: &Request) -> Sent {
        let at = self.clock.elapsed();
        let target = request.headers.get("x-amz-target").map_or(&b""[..], |target| target.as_bytes());
        let address = (request.method.as_str(), &*request.authority, &*request.path, &*request.query);
        let hash = self.hash_of_body(&request.body);
        let hash = dice::seeded(hash, &(at, address, target));
        let service = service_of(&request.authority);
        *lock(&self.state).by_caller.entry((cost::caller(), service)).or_default() += 1;
        let line = lock(&self.state).lines.is_some().then(|| {
            let (method, authority, path, query) = address;
            let (target, body) = (String::from_utf8_lossy(target), canonical_text(&request.body));
            format!("{at:?} {method} {authority}{path}?{query} {target} {body}")
        });
        Sent { hash, line }
    }

    fn hash_of_body(&self, body: &[u8]) -> u64 {
        match self.detail {
            Detail::Sizes => body.len() as u64,
            Detail::Bodies | Detail::Lines => canonical(body),
        }
    }

    /// Adds a call to the trace.
    pub fn received(&self, sent: Sent, reply: &Reply) {
        let (status, answer) = match reply {
            Ok(response) => (response.status().as_u16(), self.hash_of_body(response.body())),
            Err(failure) => (0, *failure as u64),
        };
        let at = self.clock.elapsed();
        let mut state = lock(&self.state);
        state.hash = dice::seeded(state.hash, &(sent.hash, at, status, answer));
        state.calls += 1;
        if let (Some(lines), Some(mut line)) = (&mut state.lines, sent.line) {
            let text = match reply {
                Ok(response) => canonical_text(response.body()),
                Err(failure) => format!("{failure:?}"),
            };
            let _infallible = write!(line, " -> {at:?} {status} {text}");
            lines.push(line);
        }
    }
}

/// The name under which [`cost`] counts the requests to an authority.
fn service_of(authority: &str) -> &'static str {
    match authority {
        DYNAMODB => "dynamodb",
        S3 => "s3",
        SQS => "sqs",
        "runtimes.sim" => "provider",
        other if other.starts_with("agent-") => "agents",
        _ => "others",
    }
}

/// A request that has no response yet.
#[derive(Debug)]
pub struct Sent {
    hash: u64,
    /// The first half of its line.
    line: Option<String>,
}

/// A hash of a body. The order of the members of a JSON object does not matter.
fn canonical(body: &[u8]) -> u64 {
    match body.first() {
        Some(b'{') => serde_json::from_slice(body).map_or_else(|_| dice::seeded(5, &body), |Hashed(hash)| hash),
        _ => dice::seeded(5, &body),
    }
}

/// The text of a body, with the members of JSON objects in the order of their names.
fn canonical_text(body: &[u8]) -> String {
    fn sorted(value: Value) -> Value {
        match value {
            Value::Object(members) => {
                let members: BTreeMap<String, Value> = members.into_iter().collect();
                Value::Object(members.into_iter().map(|(name, value)| (name, sorted(value))).collect())
            }
            Value::Array(values) => values.into_iter().map(sorted).collect(),
            other => other,
        }
    }
    match serde_json::from_slice(body) {
        Ok(value) => sorted(value).to_string(),
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    }
}

/// A hash of a JSON value, whatever the order of its members.
pub fn hash_of(value: &Value) -> u64 {
    Hashed::deserialize(value).expect("any value").0
}

/// The hash of a JSON value that is read, without the value.
struct Hashed(u64);

impl Hashed {
    fn scalar(value: impl Hash) -> Self {
        Self(dice::seeded(4, &value))
    }
}

impl<'de> Deserialize<'de> for Hashed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(HashVisitor)
    }
}

struct HashVisitor;

impl<'de> Visitor<'de> for HashVisitor {
    type Value = Hashed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Hashed, A::Error> {
        let mut sum: u64 = 1;
        while let Some((Hashed(name), Hashed(value))) = members.next_entry()? {
            sum = sum.wrapping_add(dice::seeded(value, &name));
        }
        Ok(Hashed(sum))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<Hashed, A::Error> {
        let mut hash = 2;
        while let Some(Hashed(value)) = values.next_element()? {
            hash = dice::seeded(hash, &value);
        }
        Ok(Hashed(hash))
    }

    fn visit_str<E>(self, text: &str) -> Result<Hashed, E> {
        Ok(Hashed(dice::seeded(3, &text)))
    }

    fn visit_unit<E>(self) -> Result<Hashed, E> {
        Ok(Hashed::scalar(()))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Hashed, E> {
        Ok(Hashed::scalar(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Hashed, E> {
        Ok(Hashed::scalar(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Hashed, E> {
        Ok(Hashed::scalar(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Hashed, E> {
        Ok(Hashed::scalar(value.to_bits()))
    }
}

/// Sends the requests of SDK clients to servers, by the authority of the URL.
#[derive(Clone)]
pub struct SimulatedHttp {
    servers: Arc<BTreeMap<String, Arc<dyn Server>>>,
    trace: Trace,
}

impl fmt::Debug for SimulatedHttp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimulatedHttp").field("servers", &self.servers.keys()).finish_non_exhaustive()
    }
}

impl SimulatedHttp {
    pub fn new(servers: impl IntoIterator<Item = (String, Arc<dyn Server>)>, trace: Trace) -> Self {
        Self { servers: Arc::new(servers.into_iter().collect()), trace }
    }

    async fn send(self, request: HttpRequest) -> Result<HttpResponse, ConnectorError> {
        let request = request.try_into_http1x().map_err(|error| ConnectorError::user(error.into()))?;
        let (parts, body) = request.into_parts();
        let body = match body.bytes() {
            Some(bytes) => Bytes::copy_from_slice(bytes),
            None => body.collect().await.map_err(ConnectorError::user)?.to_bytes(),
        };
        let is_head = parts.method == Method::HEAD;
        let request = Request {
            method: parts.method,
            authority: parts.uri.authority().map_or_else(String::new, ToString::to_string),
            path: parts.uri.path().to_owned(),
            query: parts.uri.query().unwrap_or_default().to_owned(),
            headers: parts.headers,
            body,
        };
        let Some(server) = self.servers.get(&request.authority) else {
            return Err(ConnectorError::io(format!("there is no server {}", request.authority).into()));
        };
        let sent = self.trace.sent(&request);
        let reply = server.handle(request).await;
        self.trace.received(sent, &reply);
        match reply {
            Ok(response) => {
                // Responses to HEAD have headers but no body.
                let response = response.map(|body| if is_head { SdkBody::empty() } else { SdkBody::from(body) });
                HttpResponse::try_from(response).map_err(|error| ConnectorError::other(error.into(), None))
            }
            Err(Failure::Refused) => Err(ConnectorError::io("connection refused".into())),
            // As the SDK's own client classifies hyper's "incomplete message".
            Err(Failure::Cut) => {
                Err(ConnectorError::other("connection closed".into(), Some(ErrorKind::TransientError)))
            }
            Err(Failure::Hang) => std::future::pending().await,
        }
    }
}

impl HttpClient for SimulatedHttp {
    fn http_connector(&self, _: &HttpConnectorSettings, _: &RuntimeComponents) -> SharedHttpConnector {
        SharedHttpConnector::new(self.clone())
    }
}

impl HttpConnector for SimulatedHttp {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        HttpConnectorFuture::new(self.clone().send(request))
    }
}

#[derive(Debug)]
struct TokioSleep;

impl AsyncSleep for TokioSleep {
    fn sleep(&self, duration: Duration) -> Sleep {
        Sleep::new(tokio::time::sleep(duration))
    }
}

impl TimeSource for Clock {
    fn now(&self) -> SystemTime {
        self.now()
    }
}

/// Replaces the signatures of requests, which the models do not check, by nothing.
#[derive(Debug)]
struct Unsigned;

impl AuthScheme for Unsigned {
    fn scheme_id(&self) -> AuthSchemeId {
        AuthSchemeId::new("sigv4")
    }

    fn identity_resolver(&self, resolvers: &dyn GetIdentityResolver) -> Option<SharedIdentityResolver> {
        resolvers.identity_resolver(self.scheme_id())
    }

    fn signer(&self) -> &dyn Sign {
        self
    }
}

impl Sign for Unsigned {
    fn sign_http_request(
        &self,
        _: &mut HttpRequest,
        _: &Identity,
        _: AuthSchemeEndpointConfig<'_>,
        _: &RuntimeComponents,
        _: &ConfigBag,
    ) -> Result<(), BoxError> {
        Ok(())
    }
}

#[derive(Debug)]
struct Endpoints;

impl LoadServiceConfig for Endpoints {
    fn load_config(&self, key: ServiceConfigKey<'_>) -> Option<String> {
        if key.env() != "AWS_ENDPOINT_URL" {
            return None;
        }
        let authority = match key.service_id().to_ascii_lowercase().as_str() {
            "dynamodb" => DYNAMODB,
            "s3" => S3,
            "sqs" => SQS,
            _ => return None,
        };
        Some(format!("http://{authority}"))
    }
}

/// Makes SDK clients of a simulation.
#[derive(Clone, Debug)]
pub struct SdkClients {
    config: SdkConfig,
}

impl SdkClients {
    /// Seeds this thread's generator of the SDK: the jitter of retries and the ids of requests come from it. So a simulation must not
    /// share its thread with another one that runs at the same time.
    pub fn new(seed: u64, clock: Clock, http: SimulatedHttp) -> Self {
        fastrand::seed(dice::seeded(seed, &"fastrand"));
        let keys = Credentials::new("SIMULATION", "simulation", None, None, "simulation");
        let config = SdkConfig::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::from_static(REGION))
            .app_name(AppName::new("simulation").expect("a name"))
            .credentials_provider(SharedCredentialsProvider::new(keys))
            // The default cache has a lifetime with a jitter of its own, and loads in a task.
            .identity_cache(IdentityCache::no_cache())
            .http_client(http)
            .sleep_impl(SharedAsyncSleep::new(TokioSleep))
            .time_source(SharedTimeSource::new(clock))
            .service_config(Endpoints)
            .build();
        Self { config }
    }

    /// Clients with a quota of retries of their own, as those of one process on AWS have. By default all clients of the test program
    /// would share it, and a simulation would depend on others.
    pub fn make(&self) -> Aws {
        let aws = Aws::new(&self.config);
        let quota = || RetryPartition::custom("simulation").build();
        let dynamodb = aws.dynamodb.config().to_builder().retry_partition(quota()).push_auth_scheme(Unsigned);
        let sqs = aws.sqs.config().to_builder().retry_partition(quota()).push_auth_scheme(Unsigned);
        Aws {
            dynamodb: aws_sdk_dynamodb::Client::from_conf(dynamodb.build()),
            s3: aws_sdk_s3::Client::from_conf(aws.s3.config().to_builder().retry_partition(quota()).build()),
            sqs: aws_sdk_sqs::Client::from_conf(sqs.build()),
        }
    }
}
