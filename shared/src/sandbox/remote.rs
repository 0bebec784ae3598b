//! Remote sandbox provider: runs sandboxes through a runtime API, a service that runs images. The runtime API creates the session keys and
//! is the source of truth for the status of a sandbox; the record here stores its owner.

use std::collections::HashMap;
use std::time::Duration;

use async_trait::async_trait;
use futures::future::try_join_all;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Method, StatusCode, Url};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::capacity::{others_at_the_limit, to_evict};
use super::circuit::CircuitBreaker;
use super::config::RemoteSandboxConfig;
use super::store::{Desired, SandboxRecord, SandboxStore};
use super::{
    AGENT_SERVER, ExposedUrl, Launch, ProviderSandbox, Sandbox, SandboxService, SandboxStatus, distinct, in_order,
    name_of, new_name, prefix_of,
};
use crate::clock::Time;
use crate::digest::sha256_hex;
use crate::error::{Error, Result};
use crate::http_client::{AddressPolicy, Answer, HttpClient};
use crate::id::{self, UserId};

/// The agent server's command line in the image.
pub(super) const COMMAND: [&str; 3] = ["/usr/local/bin/openhands-agent-server", "--port", "60000"];
/// The working directory of conversations in the image.
pub(super) const WORKING_DIR: &str = "/workspace/project";
/// The environment variables that all sandboxes have in common.
pub(super) const ENVIRONMENT: [(&str, &str); 6] = [
    ("OPENVSCODE_SERVER_ROOT", "/openhands/.openvscode-server"),
    ("LOG_JSON", "true"),
    ("OH_ENABLE_VNC", "0"),
    ("OH_CONVERSATIONS_PATH", "/workspace/conversations"),
    ("OH_BASH_EVENTS_DIR", "/workspace/bash_events"),
    ("OH_VSCODE_PORT", "60001"),
];
/// The name of an exposed URL, its port in the sandbox, and the runtime API's name of the service.
const SERVICES: [(&str, u16, &str); 3] =
    [("VSCODE", 60001, "vscode"), ("WORKER_1", 12000, "work-1"), ("WORKER_2", 12001, "work-2")];
const AGENT_SERVER_PORT: u16 = 60000;
/// The user id under which the image runs.
const RUN_AS: u32 = 10001;

/// The timeout of calls that change something.
const CHANGE: Duration = Duration::from_secs(15);
/// The timeout of calls that only read, because responses to users depend on them.
const LOOK: Duration = Duration::from_secs(5);
/// While a record is younger than this, a sandbox that the runtime API does not have counts as starting.
const LAUNCH_GRACE: Duration = Duration::from_secs(30);
/// See [`SandboxService::confirmation_delay`].
const CONFIRMATION_DELAY: Duration = Duration::from_secs(600);
/// The maximum number of ids per request.
const BATCH: usize = 50;
/// The batches that are requested at the same time.
const BATCHES_AT_ONCE: usize = 4;
/// The maximum size of a response in bytes.
const ANSWER_LIMIT: usize = 4 * 1024 * 1024;

/// The remote sandbox provider.
#[derive(Debug)]
pub struct RemoteSandboxes {
    config: RemoteSandboxConfig,
    store: SandboxStore,
    circuit: CircuitBreaker,
    http: HttpClient,
}

/// Why the runtime API is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// To decide about a sandbox or to change it. The call obeys the circuit breaker, and its outcome counts.
    Act,
    /// To show sandboxes to a user, whose request is a small load and shows the actual state as soon as there is one.
    Show,
}

/// A runtime as the runtime API reports it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Runtime {
    session_id: Option<String>,
    #[serde(rename = "runtime_id")]
    id: Option<String>,
    session_api_key: Option<SecretString>,
    url: Option<String>,
    status: Option<String>,
}

/// The runtimes of all deployments that use the same API key.
#[derive(Deserialize)]
struct RuntimeList {
    runtimes: Vec<Runtime>,
}

/// The outcome of a call.
enum ApiResponse<T> {
    Success(T),
    /// The response status is 404.
    NotFound,
    /// The response status is another 4xx: the runtime API refuses the call.
    Refused(StatusCode),
}

impl RemoteSandboxes {
    /// Creates the provider for the configured runtime API.
    #[must_use]
    pub fn new(config: RemoteSandboxConfig, store: SandboxStore) -> Self {
        let circuit = store.circuit();
        Self { config, store, circuit, http: HttpClient::new(AddressPolicy::Any) }
    }

    fn new_name(&self, user: &UserId, id: &str) -> String {
        new_name(user, id, self.config.deployment.as_deref())
    }

    async fn runtime(&self, name: &str) -> Result<Option<Runtime>> {
        let path = format!("/sessions/{name}");
        match self.call(Method::GET, &path, LOOK, None).await? {
            ApiResponse::Success(runtime) => Ok(Some(runtime)),
            ApiResponse::NotFound => Ok(None),
            ApiResponse::Refused(status) => Err(upstream(format!("GET /sessions: {status}"))),
        }
    }

    /// Returns the runtimes of these records, by session id.
    async fn runtimes(&self, records: &[&SandboxRecord], purpose: Purpose) -> Result<HashMap<String, Runtime>> {
        let ids: Vec<String> = records.iter().map(|record| name_of(record)).collect();
        let batch = async |ids: &[String]| {
            let query: String =
                form_urlencoded::Serializer::new(String::new()).extend_pairs(ids.iter().map(|id| ("ids", id))).finish();
            let path = format!("/sessions/batch?{query}");
            let found = match purpose {
                Purpose::Act => self.call::<Vec<Option<Runtime>>>(Method::GET, &path, LOOK, None).await?,
                Purpose::Show => self.send(Method::GET, &path, LOOK, None).await.map_err(CallFailed::into_error)?,
            };
            match found {
                ApiResponse::Success(runtimes) => Ok(runtimes),
                // Unknown sessions are nulls in the list, so this 404 is about the route and not about any session.
                ApiResponse::NotFound => Err(upstream("GET /sessions/batch: 404")),
                ApiResponse::Refused(status) => Err(upstream(format!("GET /sessions/batch: {status}"))),
            }
        };
        let mut runtimes = Vec::new();
        for some in ids.chunks(BATCH * BATCHES_AT_ONCE) {
            runtimes.extend(try_join_all(some.chunks(BATCH).map(batch)).await?.into_iter().flatten().flatten());
        }
        Ok(runtimes.into_iter().filter_map(|runtime| Some((runtime.session_id.clone()?, runtime))).collect())
    }

    /// Returns the sandboxes of records. When the runtime API does not respond, every sandbox has status ERROR and a message about that,
    /// because its status is unknown.
    async fn observe(&self, records: &[&SandboxRecord]) -> Result<Vec<Sandbox>> {
        match self.try_to_observe(records, Purpose::Show).await {
            Err(error) if error.is_upstream() => {
                tracing::warn!(error = %error.context(), "sandbox.runtime_api_failed");
                let detail = Some(error.to_string());
                let unknown = |record: &&SandboxRecord| Sandbox {
                    detail: detail.clone(),
                    ..Sandbox::of(record, SandboxStatus::Error, WORKING_DIR)
                };
                Ok(records.iter().map(unknown).collect())
            }
            observed => observed,
        }
    }

    /// Returns the sandboxes of records, or an error when the runtime API does not respond.
    async fn try_to_observe(&self, records: &[&SandboxRecord], purpose: Purpose) -> Result<Vec<Sandbox>> {
        if records.is_empty() {
            return Ok(Vec::new());
        }
        let runtimes = self.runtimes(records, purpose).await?;
        try_join_all(records.iter().map(async |record| {
            let runtime = runtimes.get(&name_of(record));
            if let Some(key) = runtime.and_then(|runtime| runtime.session_api_key.as_ref()) {
                self.keep_key(record, key).await?;
            }
            Ok(show(record, runtime))
        }))
        .await
    }

    /// Stores the session key that the runtime API has created. Webhooks are authenticated with it.
    async fn keep_key(&self, record: &SandboxRecord, key: &SecretString) -> Result<()> {
        if sha256_hex(key.expose_secret()) == record.session_key_hash {
            return Ok(());
        }
        self.store.set_session_key(&record.user, &record.id, key).await.map(|_| ())
    }

    async fn make(&self, record: &SandboxRecord) -> Result<()> {
        let mut body = json!({
            "image": record.spec_id,
            "command": COMMAND,
            "working_dir": "/workspace",
            "environment": self.environment(),
            "session_id": name_of(record),
            "resource_factor": self.config.resource_factor,
            "run_as_user": RUN_AS,
            "run_as_group": RUN_AS,
            "fs_group": RUN_AS,
        });
        if self.config.runtime_class == "sysbox" {
            body["runtime_class"] = json!("sysbox-runc");
        }
        if !self.config.image_pull_secrets.is_empty() {
            body["image_pull_secrets"] = json!(self.config.image_pull_secrets);
        }
        match self.call::<Runtime>(Method::POST, "/start", CHANGE, Some(&body)).await? {
            ApiResponse::Success(runtime) => match &runtime.session_api_key {
                Some(key) => self.keep_key(record, key).await,
                None => Ok(()),
            },
            ApiResponse::NotFound => Err(upstream("POST /start: 404")),
            ApiResponse::Refused(status) => Err(Error::Refused(format!(
                "The sandbox provider refused to create a sandbox (status {})",
                status.as_u16()
            ))),
        }
    }

    fn environment(&self) -> Map<String, Value> {
        let mut environment: Map<String, Value> =
            ENVIRONMENT.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        environment.extend(super::STORAGE_VARIABLES.map(|(name, value)| (name.to_owned(), json!(value))));
        for (name, port, _) in &SERVICES[1..] {
            environment.insert((*name).to_owned(), json!(port.to_string()));
        }
        if let Some(url) = &self.config.web_url {
            let url = url.trim_end_matches('/');
            environment.insert("OH_WEBHOOKS_0_BASE_URL".to_owned(), json!(format!("{url}/api/v1/webhooks")));
            environment.extend(super::WEBHOOK_VARIABLES.map(|(name, value)| (name.to_owned(), json!(value))));
            // The public address may have a path (a stage of API Gateway); an origin has none.
            let own =
                url.parse::<reqwest::Url>().map_or_else(|_| url.to_owned(), |url| url.origin().ascii_serialization());
            let origins = std::iter::once(&own).chain(&self.config.allow_cors_origins);
            for (index, origin) in origins.enumerate() {
                environment.insert(format!("OH_ALLOW_CORS_ORIGINS_{index}"), json!(origin));
            }
        }
        environment
    }

    /// Evicts (pauses) sandboxes of the user until one more may run. Returns false if that is not possible now.
    async fn ensure_capacity(&self, newcomer: &SandboxRecord) -> Result<bool> {
        let user = &newcomer.user;
        let max = self.config.max_sandboxes;
        let Some(others) = others_at_the_limit(&self.store, newcomer, max, |_| true).await? else { return Ok(true) };
        let observed = self.try_to_observe(&others.iter().collect::<Vec<_>>(), Purpose::Act).await?;
        let others = others.into_iter().zip(observed).collect();
        let Some(evicted) = to_evict(&self.http, newcomer, others, max).await else {
            return Ok(false);
        };
        for id in evicted {
            tracing::info!(sandbox = id, "sandbox.evicted");
            self.pause(user, &id).await?;
        }
        Ok(true)
    }

    /// Requests a change of a sandbox's runtime. Returns false when the runtime does not exist.
    async fn change(&self, name: &str, path: &str) -> Result<bool> {
        let Some(runtime) = self.runtime(name).await? else { return Ok(false) };
        let Some(runtime_id) = runtime.id else { return Ok(false) };
        match self.call::<Value>(Method::POST, path, CHANGE, Some(&json!({"runtime_id": runtime_id}))).await? {
            ApiResponse::Success(_) => Ok(true),
            ApiResponse::NotFound => Ok(false),
            ApiResponse::Refused(status) => Err(upstream(format!("POST {path}: {status}"))),
        }
    }

    /// Calls the runtime API unless the circuit is open.
    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        timeout: Duration,
        body: Option<&Value>,
    ) -> Result<ApiResponse<T>> {
        let permit = self.circuit.permit().await?;
        match self.send(method, path, timeout, body).await {
            Ok(response) => {
                self.circuit.succeeded(&permit).await;
                Ok(response)
            }
            Err(CallFailed::Unsent(error)) => Err(error),
            Err(CallFailed::Sent { context, retry_after }) => {
                self.circuit.failed(&permit, retry_after, &context).await;
                Err(upstream(context))
            }
        }
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        timeout: Duration,
        body: Option<&Value>,
    ) -> Result<ApiResponse<T>, CallFailed> {
        let url = format!("{}{path}", self.config.api_url.trim_end_matches('/'));
        let route = path.split('?').next().unwrap_or_default();
        let request =
            self.http.request(method.clone(), &url).map_err(|error| CallFailed::Unsent(Error::internal(error)))?.with(
                |mut request| {
                    if let Some(key) = &self.config.api_key {
                        request = request.header("X-API-Key", key.expose_secret());
                    }
                    if let Some(body) = body {
                        request = request.json(body);
                    }
                    request
                },
            );
        // Leave out the URL, because errors are logged and the URL is configuration.
        let failed = |what: &dyn std::fmt::Display, headers: Option<&HeaderMap>| CallFailed::Sent {
            context: format!("{method} {route}: {what}"),
            retry_after: headers.and_then(retry_after),
        };
        let Answer { status, body: bytes, is_whole, headers } =
            request.send(timeout, |_| ANSWER_LIMIT).await.map_err(|error| failed(&error, None))?;
        if !is_whole {
            return Err(failed(&format_args!("more than {ANSWER_LIMIT} bytes"), None));
        }
        match status {
            StatusCode::NOT_FOUND => Ok(ApiResponse::NotFound),
            status if status.is_success() => {
                // The response body to a change is not used, and may be empty.
                let bytes = if bytes.is_empty() { b"null".as_slice() } else { &bytes };
                serde_json::from_slice(bytes).map(ApiResponse::Success).map_err(|error| failed(&error, None))
            }
            status if status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS => {
                Ok(ApiResponse::Refused(status))
            }
            status => Err(failed(&status, Some(&headers))),
        }
    }
}

fn is_stopped(runtime: &Runtime) -> bool {
    runtime.status.as_deref().is_some_and(|status| status.eq_ignore_ascii_case("stopped"))
}

/// The failure of a call: the provider could not be asked, or did not respond as it should.
#[derive(Debug)]
enum CallFailed {
    /// Nothing was sent.
    Unsent(Error),
    Sent {
        context: String,
        /// When the provider accepts the next call.
        retry_after: Option<Duration>,
    },
}

impl CallFailed {
    fn into_error(self) -> Error {
        match self {
            Self::Unsent(error) => error,
            Self::Sent { context, .. } => upstream(context),
        }
    }
}

/// The header `Retry-After` in seconds. Its other form, a date, is ignored.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok().map(Duration::from_secs)
}

fn upstream(context: impl std::fmt::Display) -> Error {
    Error::Upstream {
        message: "The sandbox provider does not respond; try again later".to_owned(),
        context: format!("runtime API: {context}"),
    }
}

/// Combines a record and the runtime API's report into a sandbox.
fn show(record: &SandboxRecord, runtime: Option<&Runtime>) -> Sandbox {
    let said = runtime.and_then(|runtime| runtime.status.as_deref()).map(str::to_ascii_lowercase);
    let (status, detail) = match said.as_deref() {
        Some("running") => (SandboxStatus::Running, None),
        Some("paused") => (SandboxStatus::Paused, None),
        Some("starting") => (SandboxStatus::Starting, None),
        Some("error") => (SandboxStatus::Error, Some("Its provider reports that it has failed")),
        None if runtime.is_none() && Time::now().since(record.created_at) < LAUNCH_GRACE => {
            (SandboxStatus::Starting, None)
        }
        Some("stopped") => (SandboxStatus::Missing, Some("Its provider has stopped it")),
        _ => (SandboxStatus::Missing, Some("Its provider no longer knows it")),
    };
    let mut sandbox = Sandbox { detail: detail.map(str::to_owned), ..Sandbox::of(record, status, WORKING_DIR) };
    if status == SandboxStatus::Running
        && let Some(runtime) = runtime
    {
        sandbox.session_api_key.clone_from(&runtime.session_api_key);
        sandbox.exposed_urls = Some(exposed_urls(runtime));
    }
    sandbox
}

/// Returns the exposed URLs of a runtime; empty when it has no URL.
fn exposed_urls(runtime: &Runtime) -> Vec<ExposedUrl> {
    let Some(url) = runtime.url.as_deref().filter(|url| !url.is_empty()) else { return Vec::new() };
    let agent = url.trim_end_matches('/').to_owned();
    let mut urls = vec![ExposedUrl { name: AGENT_SERVER.to_owned(), url: agent, port: AGENT_SERVER_PORT }];
    let Ok(parsed) = Url::parse(url) else { return urls };
    for (name, port, service) in SERVICES {
        let Some(mut url) = service_url(&parsed, runtime.id.as_deref(), service) else { continue };
        if name == "VSCODE"
            && let Some(key) = &runtime.session_api_key
        {
            url += &format!("?tkn={}&folder=%2Fworkspace%2Fproject", key.expose_secret());
        }
        urls.push(ExposedUrl { name: name.to_owned(), url, port });
    }
    urls
}

/// Returns the URL of a service of a runtime: below the runtime's path if runtimes share a host, otherwise on its own host.
fn service_url(url: &Url, runtime_id: Option<&str>, service: &str) -> Option<String> {
    let host = match url.port() {
        Some(port) => format!("{}:{port}", url.host_str()?),
        None => url.host_str()?.to_owned(),
    };
    let (scheme, path) = (url.scheme(), url.path());
    let own_path = runtime_id.map(|id| format!("/{id}")).filter(|own| path.starts_with(own.as_str()));
    Some(match own_path {
        Some(own) => format!("{scheme}://{host}{own}/{service}"),
        None => format!("{scheme}://{service}-{host}{}", if path.is_empty() { "/" } else { path }),
    })
}

#[async_trait]
impl SandboxService for RemoteSandboxes {
    async fn start(&self, user: &UserId, id: &str, task: Option<Uuid>) -> Result<Launch> {
        // Use a random key that is never disclosed until the runtime API has created one. Write the record first: a runtime without a
        // record could run forever.
        let placeholder = SecretString::from(id::new_session_key());
        let mut new = self.store.new_record(user, id, &self.config.image, &placeholder).await?;
        new.name = Some(self.new_name(user, id));
        let new_key = new.session_key_hash.clone();
        let Some(record) = self.store.create(new, task).await? else { return Ok(Launch::Deleted) };
        let status = self.runtime(&name_of(&record)).await?.and_then(|runtime| runtime.status);
        match status.as_deref().map(str::to_ascii_lowercase).as_deref() {
            Some("running" | "starting" | "paused") => {}
            _ => {
                if !self.ensure_capacity(&record).await? {
                    // A record from an earlier call may have a runtime whose creation is late.
                    if record.session_key_hash == new_key {
                        self.store.withdraw(&record).await?;
                    }
                    return Ok(Launch::Full);
                }
                self.make(&record).await?;
            }
        }
        Ok(Launch::Started)
    }

    async fn inspect(&self, user: &UserId, id: &str) -> Result<Option<Sandbox>> {
        let Some(record) = self.store.get(user, id).await? else { return Ok(None) };
        Ok(self.try_to_observe(&[&record], Purpose::Act).await?.pop())
    }

    async fn inspect_all(&self, keys: &[(UserId, String)]) -> Result<Vec<Option<Sandbox>>> {
        let records = self.store.batch_get_of_users(keys).await?;
        let known: Vec<&SandboxRecord> = records.iter().flatten().collect();
        let mut observed = self.try_to_observe(&known, Purpose::Act).await?.into_iter();
        Ok(records.iter().map(|record| record.as_ref().and_then(|_| observed.next())).collect())
    }

    fn sends_webhooks(&self) -> bool {
        self.config.web_url.is_some()
    }

    async fn batch_get(&self, user: &UserId, ids: &[String]) -> Result<Vec<Option<Sandbox>>> {
        let records = self.store.batch_get(user, ids).await?;
        let observed = self.observe(&distinct(&records)).await?;
        Ok(in_order(&records, &observed))
    }

    async fn list(&self, user: &UserId) -> Result<Vec<Sandbox>> {
        let records = self.store.list(user).await?;
        self.observe(&records.iter().collect::<Vec<_>>()).await
    }

    async fn pause(&self, user: &UserId, id: &str) -> Result<bool> {
        let Some(record) = self.store.get(user, id).await? else { return Ok(false) };
        if !self.change(&name_of(&record), "/pause").await? {
            return Ok(false);
        }
        self.store.set_desired(user, id, Desired::Paused).await
    }

    async fn resume(&self, user: &UserId, id: &str) -> Result<bool> {
        let Some(record) = self.store.get(user, id).await? else { return Ok(false) };
        // Its user wants it to run, so it runs even beyond the limit.
        self.ensure_capacity(&record).await?;
        if !self.change(&name_of(&record), "/resume").await? {
            return Ok(false);
        }
        self.store.set_desired(user, id, Desired::Running).await
    }

    async fn terminate(&self, user: &UserId, id: &str) -> Result<bool> {
        let record = self.store.find(user, id).await?;
        let name = record.map_or_else(|| self.new_name(user, id), |record| name_of(&record));
        if self.runtime(&name).await?.is_none_or(|runtime| is_stopped(&runtime)) {
            return Ok(true);
        }
        // The next call finds out whether the runtime has ended.
        self.change(&name, "/stop").await?;
        Ok(false)
    }

    fn can_list_provider(&self) -> bool {
        self.config.deployment.is_some()
    }

    async fn list_provider(&self) -> Result<Vec<ProviderSandbox>> {
        let own = self.config.deployment.as_deref().map(prefix_of);
        let list: RuntimeList = match self.call(Method::GET, "/list", CHANGE, None).await? {
            ApiResponse::Success(list) => list,
            ApiResponse::NotFound => return Err(upstream("GET /list: 404")),
            ApiResponse::Refused(status) => return Err(upstream(format!("GET /list: {status}"))),
        };
        let left = list.runtimes.into_iter().filter(|runtime| !is_stopped(runtime));
        let named = left.filter_map(|runtime| runtime.session_id);
        Ok(named
            .map(|name| ProviderSandbox {
                is_own: own.as_deref().is_some_and(|own| name.starts_with(own)),
                name,
                created_at: None,
            })
            .collect())
    }

    fn confirmation_delay(&self) -> Duration {
        CONFIRMATION_DELAY
    }

    async fn mark_used(&self, user: &UserId, id: &str) -> Result<()> {
        self.store.mark_used(user, id).await.map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_below_the_runtimes_path_or_at_hosts_of_their_own() {
        let urls = |url: &str, runtime_id: &str| {
            let runtime = Runtime {
                url: Some(url.to_owned()),
                id: Some(runtime_id.to_owned()),
                session_api_key: Some("key".into()),
                ..Runtime::default()
            };
            exposed_urls(&runtime).into_iter().map(|url| (url.name, url.url, url.port)).collect::<Vec<_>>()
        };
        let expected =
            |urls: [(&str, &str, u16); 4]| urls.map(|(name, url, port)| (name.to_owned(), url.to_owned(), port));
        assert_eq!(
            urls("https://abc.runtime.example.com", "abc"),
            expected([
                ("AGENT_SERVER", "https://abc.runtime.example.com", 60000),
                ("VSCODE", "https://vscode-abc.runtime.example.com/?tkn=key&folder=%2Fworkspace%2Fproject", 60001),
                ("WORKER_1", "https://work-1-abc.runtime.example.com/", 12000),
                ("WORKER_2", "https://work-2-abc.runtime.example.com/", 12001),
            ])
        );
        assert_eq!(
            urls("http://runtimes.example.com:8080/abc", "abc"),
            expected([
                ("AGENT_SERVER", "http://runtimes.example.com:8080/abc", 60000),
                ("VSCODE", "http://runtimes.example.com:8080/abc/vscode?tkn=key&folder=%2Fworkspace%2Fproject", 60001),
                ("WORKER_1", "http://runtimes.example.com:8080/abc/work-1", 12000),
                ("WORKER_2", "http://runtimes.example.com:8080/abc/work-2", 12001),
            ])
        );
        assert_eq!(urls("", "abc"), []);
        assert_eq!(urls("no url", "abc").len(), 1);
    }

    #[test]
    fn no_two_owners_have_a_session_in_common() {
        let id = |user: &str, id: &str| new_name(&UserId::new(user), id, None);
        assert_eq!(id("a", "one"), id("a", "one"));
        let ids = [id("a", "one"), id("b", "one"), id("a", "two"), id("a#", "one"), id("", "aone")];
        for (index, one) in ids.iter().enumerate() {
            assert!(!ids[index + 1..].contains(one));
        }
    }
}
