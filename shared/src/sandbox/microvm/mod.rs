//! MicroVM sandbox provider: runs one AWS Lambda MicroVM per sandbox, and opens a route to it in a CloudFront distribution, the *front door*.
//!
//! AWS ends a MicroVM [`LONGEST_LIFE`] after its start, also while it is suspended, and nothing of it is kept. MicroVMs have no names: AWS
//! finds one by the idempotency token with which it was run, so a call that is repeated after a crash returns the same MicroVM. The token is
//! the sandbox's name and its *generation*, which changes when the sandbox needs another MicroVM.
//!
//! The record of the sandbox decides which MicroVM is its own. One transaction enters the MicroVM into the record, provided that the sandbox
//! still exists and has the same generation, and into a row of the MicroVM, provided that it is not marked as an orphan. What AWS runs and no
//! record has is marked and terminated by [`SandboxService::end_orphans`].
//!
//! The address of a sandbox is `<front door>/<name>`, for as long as the sandbox exists. The route behind it has an access token, which is renewed
//! before it expires whenever a running sandbox is inspected; [`SandboxService::inspection_period`] sees to it that this is often enough.

mod api;
mod routes;

use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_lambdamicrovms::Client;
use aws_sdk_lambdamicrovms::types::MicrovmState;
use futures::future::{join_all, try_join_all};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Map, Value, json};
use tokio::time::sleep;
use uuid::Uuid;

pub use self::api::LONGEST_LIFE;
use self::api::{ApiError, Microvm, Run, TOKEN_LIFE, unavailable};
use self::routes::{Route, Routes};
use super::capacity::{others_at_the_limit, to_evict};
use super::circuit::CircuitBreaker;
use super::config::MicrovmSandboxConfig;
use super::store::{Desired, SandboxRecord, SandboxStore};
use super::{
    AGENT_SERVER, ExposedUrl, Launch, Sandbox, SandboxService, SandboxStatus, distinct, in_order, name_of, new_name,
};
use crate::clock::Time;
use crate::error::{Error, Result};
use crate::http_client::{AddressPolicy, HttpClient};
use crate::id::{self, UserId};

/// The program that answers AWS's hooks in a MicroVM and runs the agent server, as `guest.py`.
pub const GUEST_PROGRAM: &str = include_str!("guest.py");
/// The working directory of conversations in the image.
pub(super) const WORKING_DIR: &str = "/workspace/project";
/// The environment variables that all sandboxes have in common. `LOG_JSON` is not among them: modules read it while they are imported, so
/// with it an agent server could not be forked, and its log goes nowhere.
pub(super) const ENVIRONMENT: [(&str, &str); 5] = [
    ("OPENVSCODE_SERVER_ROOT", "/openhands/.openvscode-server"),
    ("OH_ENABLE_VNC", "0"),
    ("OH_CONVERSATIONS_PATH", "/workspace/conversations"),
    ("OH_BASH_EVENTS_DIR", "/workspace/bash_events"),
    ("PYTHONUNBUFFERED", "1"),
];
/// The port of the agent server in a MicroVM. The front door has no other port: pages of all sandboxes would share one web origin.
pub const AGENT_SERVER_PORT: u16 = 8000;
/// The most bytes that a MicroVM receives at its start. The documentation has 16 KB; others have seen that AWS refuses more than this.
pub const LONGEST_PAYLOAD: usize = 4096;

/// The time limit of a request to an agent server that is to show whether it responds.
const HEALTH: Duration = Duration::from_secs(3);
/// While a launch is younger than this, a sandbox without a MicroVM counts as starting.
const LAUNCH_GRACE: Duration = Duration::from_secs(60);
/// While the launch or the resume is younger than this, an agent server that does not respond counts as starting.
const STARTUP_GRACE: Duration = Duration::from_secs(120);
/// How long AWS may report a MicroVM as suspended after it was resumed.
const RESUME_LAG: Duration = Duration::from_secs(15);
/// A route is renewed when its token expires within this time.
const RENEWED_BEFORE: Duration = Duration::from_secs(20 * 60);
/// How much earlier than AWS we regard a token as expired.
const TOKEN_MARGIN: Duration = Duration::from_secs(5 * 60);
/// The longest time between two inspections of a running sandbox, so that its token is renewed in time, also if an inspection fails.
const INSPECTION_PERIOD: Duration = Duration::from_secs(10 * 60);
/// The calls to AWS at the same time.
const AT_ONCE: usize = 8;
/// How often a launch is repeated with the next generation.
const LAUNCHES: usize = 4;
/// How often a call is repeated while AWS still suspends the MicroVM or reports an earlier state, and the pause between two attempts. A
/// suspension takes 1 to 2 s.
const REPEATS: usize = 8;
const REPEAT_PAUSE: Duration = Duration::from_millis(500);
/// See [`SandboxService::confirmation_delay`].
const CONFIRMATION_DELAY: Duration = Duration::from_secs(60);
/// A MicroVM without a record is an orphan once it is older than this. It is longer than a worker may take between the call that runs a
/// MicroVM and the write that enters it into the record.
const ORPHAN_AGE: Duration = Duration::from_secs(10 * 60);
/// The most orphans that are terminated at once; the next comparison continues.
const ORPHANS: usize = 100;

/// What is known of a sandbox's MicroVM.
#[derive(Debug)]
enum Look {
    /// None is recorded: the launch has not got that far, or was cut off.
    NotRun,
    /// AWS does not know it (any more).
    Gone,
    Found(Microvm),
    /// AWS does not respond; with a message for the user.
    Unknown(String),
}

/// Shows MicroVM sandboxes, for functions that do not change them: it needs no other permission than `lambda:GetMicrovm`.
#[derive(Debug)]
pub struct MicrovmViewer {
    config: MicrovmSandboxConfig,
    store: SandboxStore,
    client: Client,
    http: HttpClient,
}

impl MicrovmViewer {
    /// Creates the viewer.
    #[must_use]
    pub fn new(config: MicrovmSandboxConfig, store: SandboxStore) -> Self {
        let client = api::client(&config.aws);
        // The operator has configured the address of the front door.
        Self { config, store, client, http: HttpClient::new(AddressPolicy::Any) }
    }

    fn url_of(&self, record: &SandboxRecord) -> String {
        format!("{}/{}", self.config.front_door_url.trim_end_matches('/'), name_of(record))
    }

    async fn look(&self, record: &SandboxRecord) -> Result<Look, ApiError> {
        let Some(id) = &record.vm else { return Ok(Look::NotRun) };
        Ok(api::get(&self.client, id).await?.map_or(Look::Gone, Look::Found))
    }

    /// Looks at the MicroVMs of records, whatever AWS responds.
    async fn look_at_all(&self, records: &[&SandboxRecord]) -> Vec<Look> {
        let mut looks = Vec::with_capacity(records.len());
        for some in records.chunks(AT_ONCE) {
            let found = join_all(some.iter().map(async |record| self.look(record).await)).await;
            looks.extend(found.into_iter().map(|found| {
                found.unwrap_or_else(|error| {
                    let error = error.into_error();
                    tracing::warn!(error = %error.context(), "sandbox.provider_failed");
                    Look::Unknown(error.to_string())
                })
            }));
        }
        looks
    }

    async fn show_all(&self, records: &[&SandboxRecord], looks: &[Look]) -> Result<Vec<Sandbox>> {
        let pairs: Vec<(&SandboxRecord, &Look)> = records.iter().copied().zip(looks).collect();
        let mut shown = Vec::with_capacity(pairs.len());
        for some in pairs.chunks(AT_ONCE) {
            shown.extend(try_join_all(some.iter().map(async |(record, look)| self.show(record, look).await)).await?);
        }
        Ok(shown)
    }

    /// Combines a record and the state of its MicroVM into a sandbox.
    async fn show(&self, record: &SandboxRecord, look: &Look) -> Result<Sandbox> {
        let now = Time::now();
        let (status, detail) = status(record, look, now);
        let mut sandbox = Sandbox { detail, ..Sandbox::of(record, status, &self.config.working_dir) };
        if status != SandboxStatus::Running {
            return Ok(sandbox);
        }
        let url = self.url_of(record);
        if self.http.succeeds(&format!("{url}/alive"), HEALTH).await {
            sandbox.session_api_key = Some(self.store.session_key(record).await?);
            sandbox.exposed_urls =
                Some(vec![ExposedUrl { name: AGENT_SERVER.to_owned(), url, port: AGENT_SERVER_PORT }]);
        } else if now.since(turned_at(record)) < STARTUP_GRACE {
            sandbox.status = SandboxStatus::Starting;
        } else {
            sandbox.status = SandboxStatus::Error;
            sandbox.detail = Some("Its MicroVM is running, but its agent server does not respond".to_owned());
        }
        Ok(sandbox)
    }

    async fn observe(&self, records: &[&SandboxRecord]) -> Result<Vec<Sandbox>> {
        let looks = self.look_at_all(records).await;
        self.show_all(records, &looks).await
    }
}

/// When the sandbox was launched or resumed last.
fn turned_at(record: &SandboxRecord) -> Time {
    record.turned_at.unwrap_or(record.created_at)
}

fn needs_route(record: &SandboxRecord, now: Time) -> bool {
    record.desired == Desired::Running && record.route_until.is_none_or(|until| until < now.plus(RENEWED_BEFORE))
}

/// The status of a sandbox, provided that the agent server of one that is running responds, and a message for the user.
fn status(record: &SandboxRecord, look: &Look, now: Time) -> (SandboxStatus, Option<String>) {
    let vm = match look {
        Look::Found(vm) => vm,
        Look::Unknown(detail) => return (SandboxStatus::Error, Some(detail.clone())),
        Look::NotRun if now.since(turned_at(record)) < LAUNCH_GRACE => return (SandboxStatus::Starting, None),
        Look::NotRun => return (SandboxStatus::Missing, Some("Its start was interrupted".to_owned())),
        Look::Gone => return (SandboxStatus::Missing, Some(ended(None, true))),
    };
    match vm.state {
        // AWS does not report its suspension yet.
        MicrovmState::Running if record.desired == Desired::Paused => (SandboxStatus::Paused, Some(kept(vm))),
        MicrovmState::Running if record.route_until.is_some_and(|until| until > now) => (SandboxStatus::Running, None),
        MicrovmState::Pending | MicrovmState::Running => (SandboxStatus::Starting, None),
        MicrovmState::Suspending | MicrovmState::Suspended => {
            let is_resumed = record.desired == Desired::Running
                && record.turned_at.is_some_and(|turned_at| now.since(turned_at) < RESUME_LAG);
            match is_resumed {
                true => (SandboxStatus::Starting, None),
                false => (SandboxStatus::Paused, Some(kept(vm))),
            }
        }
        MicrovmState::Terminating | MicrovmState::Terminated => {
            let is_old = now.since(vm.started_at) >= LONGEST_LIFE;
            (SandboxStatus::Missing, Some(ended(vm.reason.as_deref(), is_old)))
        }
        ref unknown => {
            (SandboxStatus::Error, Some(format!("AWS reports the state {} of its MicroVM", unknown.as_str())))
        }
    }
}

/// The message about what a pause keeps.
fn kept(vm: &Microvm) -> String {
    format!(
        "Its files and processes are kept until {}: AWS ends a MicroVM 8 hours after its start",
        vm.started_at.plus(LONGEST_LIFE)
    )
}

/// The message about a MicroVM that has ended.
fn ended(reason: Option<&str>, is_old: bool) -> String {
    let reason = reason.filter(|reason| !reason.is_empty()).map(|reason| format!(" ({reason})")).unwrap_or_default();
    let rule = if is_old { ": AWS ends a MicroVM 8 hours after its start" } else { "" };
    format!("Its MicroVM has ended{reason}{rule}")
}

/// The error of a function that only shows sandboxes.
fn only_shows<T>() -> Result<T> {
    Err(Error::internal("this function only shows sandboxes and must not change them"))
}

#[async_trait]
impl SandboxService for MicrovmViewer {
    async fn start(&self, _: &UserId, _: &str, _: Option<Uuid>) -> Result<Launch> {
        only_shows()
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

    async fn pause(&self, _: &UserId, _: &str) -> Result<bool> {
        only_shows()
    }

    async fn resume(&self, _: &UserId, _: &str) -> Result<bool> {
        only_shows()
    }

    async fn terminate(&self, _: &UserId, _: &str) -> Result<bool> {
        only_shows()
    }

    async fn mark_used(&self, user: &UserId, id: &str) -> Result<()> {
        self.store.mark_used(user, id).await.map(|_| ())
    }

    async fn inspect(&self, user: &UserId, id: &str) -> Result<Option<Sandbox>> {
        let Some(record) = self.store.get(user, id).await? else { return Ok(None) };
        let look = self.look(&record).await?;
        self.show(&record, &look).await.map(Some)
    }

    fn sends_webhooks(&self) -> bool {
        self.config.web_url.is_some()
    }
}

/// The MicroVM sandbox provider.
#[derive(Debug)]
pub struct MicrovmSandboxes {
    viewer: MicrovmViewer,
    circuit: CircuitBreaker,
    routes: Routes,
}

impl MicrovmSandboxes {
    /// Creates the provider.
    #[must_use]
    pub fn new(config: MicrovmSandboxConfig, store: SandboxStore) -> Self {
        let circuit = store.circuit();
        let routes = Routes::new(&config.aws, config.routes.clone(), config.routes_endpoint.as_deref());
        Self { viewer: MicrovmViewer::new(config, store), circuit, routes }
    }

    fn config(&self) -> &MicrovmSandboxConfig {
        &self.viewer.config
    }

    fn store(&self) -> &SandboxStore {
        &self.viewer.store
    }

    fn client(&self) -> &Client {
        &self.viewer.client
    }

    /// Makes a call to AWS unless the circuit is open.
    async fn call<T>(&self, call: impl Future<Output = Result<T, ApiError>> + Send) -> Result<T, ApiError> {
        let permit = self.circuit.permit().await.map_err(ApiError::NotCalled)?;
        let outcome = call.await;
        match &outcome {
            Err(ApiError::Unavailable { context, retry_after }) => {
                self.circuit.failed(&permit, *retry_after, context).await;
            }
            _ => self.circuit.succeeded(&permit).await,
        }
        outcome
    }

    async fn look(&self, record: &SandboxRecord) -> Result<Look> {
        Ok(self.call(self.viewer.look(record)).await?)
    }

    /// Returns the sandboxes of records, or an error when AWS does not respond. Opens the routes of those that need one.
    async fn inspect_records(&self, records: &[&SandboxRecord]) -> Result<Vec<Sandbox>> {
        let mut looks = Vec::with_capacity(records.len());
        for some in records.chunks(AT_ONCE) {
            looks.extend(try_join_all(some.iter().map(async |record| self.look(record).await)).await?);
        }
        self.route_and_show(records, &looks).await
    }

    /// Returns the sandboxes of records for a user. Where AWS does not respond, a sandbox has status ERROR and a message about that.
    async fn observe(&self, records: &[&SandboxRecord]) -> Result<Vec<Sandbox>> {
        let looks = self.viewer.look_at_all(records).await;
        self.route_and_show(records, &looks).await
    }

    async fn route_and_show(&self, records: &[&SandboxRecord], looks: &[Look]) -> Result<Vec<Sandbox>> {
        let mut owned: Vec<SandboxRecord> = records.iter().map(|record| (*record).clone()).collect();
        if let Err(error) = self.open_routes(&mut owned, looks).await {
            // A route that was not renewed is valid for a while. Without a route the sandbox counts as starting.
            tracing::warn!(error = %error.context(), "sandbox.route_not_opened");
        }
        self.viewer.show_all(&owned.iter().collect::<Vec<_>>(), looks).await
    }

    /// Opens or renews the routes of running sandboxes, all with one write, and notes in the records until when they are valid.
    async fn open_routes(&self, records: &mut [SandboxRecord], looks: &[Look]) -> Result<()> {
        let now = Time::now();
        let mut wanted: Vec<(&mut SandboxRecord, &Microvm)> = Vec::new();
        for (record, look) in records.iter_mut().zip(looks) {
            if let Look::Found(vm) = look
                && vm.state == MicrovmState::Running
                && needs_route(record, now)
            {
                wanted.push((record, vm));
            }
        }
        if wanted.is_empty() {
            return Ok(());
        }
        let mut opened: Vec<Route> = Vec::with_capacity(wanted.len());
        for some in wanted.chunks(AT_ONCE) {
            let made = some.iter().map(async |(record, vm)| {
                let token = self.call(api::access_token(self.client(), &vm.id, AGENT_SERVER_PORT)).await?;
                Ok::<_, Error>(Route { name: name_of(record), host: vm.endpoint.clone(), token })
            });
            opened.extend(try_join_all(made).await?);
        }
        self.routes.open(&opened).await?;
        let until = now.plus(TOKEN_LIFE.saturating_sub(TOKEN_MARGIN));
        for (record, vm) in wanted {
            // Noted after the write. A worker that crashes in between leaves a route that is written again.
            if self.store().set_route(&record.user, &record.id, &vm.id, Some(until)).await? {
                record.route_until = Some(until);
            }
        }
        Ok(())
    }

    /// Runs the MicroVM of a record, and enters it into the record. Returns false if the sandbox is being deleted.
    async fn launch(&self, mut record: SandboxRecord) -> Result<bool> {
        let key = self.store().session_key(&record).await?;
        let payload = self.config().payload(&key)?;
        for _ in 0..LAUNCHES {
            let run = Run {
                token: format!("{}-{}", name_of(&record), record.generation),
                image: &self.config().image,
                connectors: self.config().connectors(),
                payload: &payload,
                key: &key,
            };
            let vm = match self.call(api::run(self.client(), &run)).await {
                Ok(vm) if !vm.has_ended() => Some(vm),
                // The MicroVM of an earlier attempt has ended meanwhile. A conflict: it was run with another configuration.
                Ok(_) | Err(ApiError::Conflict) => None,
                Err(error) => return Err(error.into()),
            };
            let next = match vm {
                None => self.store().next_generation(&record).await?,
                Some(vm) => {
                    if self.store().record_vm(&record, &vm.id, &vm.endpoint).await? {
                        return Ok(true);
                    }
                    let current = self.store().get(&record.user, &record.id).await?;
                    match current {
                        Some(current) if current.vm.as_ref() == Some(&vm.id) => return Ok(true),
                        // Marked as an orphan: it is being terminated.
                        Some(current) if current.generation == record.generation => {
                            self.store().next_generation(&current).await?
                        }
                        current => {
                            // Nothing uses it: the sandbox is deleted, or another worker has launched the next generation.
                            self.call(api::terminate(self.client(), &vm.id)).await?;
                            current
                        }
                    }
                }
            };
            match next {
                None => return Ok(false),
                // Another worker has launched it.
                Some(next) if next.vm.is_some() => return Ok(true),
                Some(next) => record = next,
            }
        }
        Err(unavailable("a MicroVM cannot be run with the next idempotency tokens either"))
    }

    /// Evicts (pauses) sandboxes of the user until one more may run. Returns false if that is not possible now.
    async fn ensure_capacity(&self, newcomer: &SandboxRecord) -> Result<bool> {
        let max = self.config().max_sandboxes;
        let Some(others) = others_at_the_limit(self.store(), newcomer, max, |_| true).await? else { return Ok(true) };
        let observed = self.inspect_records(&others.iter().collect::<Vec<_>>()).await?;
        let others = others.into_iter().zip(observed).collect();
        let Some(evicted) = to_evict(&self.viewer.http, newcomer, others, max).await else { return Ok(false) };
        for id in evicted {
            tracing::info!(sandbox = id, "sandbox.evicted");
            self.pause(&newcomer.user, &id).await?;
        }
        Ok(true)
    }

    /// Suspends a MicroVM. Returns false when it has ended.
    async fn suspend(&self, vm: &Microvm) -> Result<bool> {
        match vm.state {
            MicrovmState::Suspending | MicrovmState::Suspended => return Ok(true),
            MicrovmState::Terminating | MicrovmState::Terminated => return Ok(false),
            _ => {}
        }
        match self.call(api::suspend(self.client(), &vm.id)).await {
            Ok(()) => return Ok(true),
            Err(ApiError::NotFound) => return Ok(false),
            Err(ApiError::Conflict) => {}
            Err(error) => return Err(error.into()),
        }
        // A concurrent call has suspended it, which AWS may report late, or it still starts.
        for attempt in 0..REPEATS {
            if attempt > 0 {
                sleep(REPEAT_PAUSE).await;
            }
            match self.call(api::get(self.client(), &vm.id)).await? {
                None => return Ok(false),
                Some(vm) if vm.has_ended() => return Ok(false),
                Some(vm) if matches!(vm.state, MicrovmState::Suspending | MicrovmState::Suspended) => return Ok(true),
                Some(vm) if vm.state == MicrovmState::Running => {}
                Some(vm) => {
                    return Err(unavailable(&format!("a MicroVM that is {} cannot be suspended", vm.state.as_str())));
                }
            }
        }
        Err(unavailable("the MicroVM cannot be suspended, although AWS reports that it runs"))
    }

    /// Resumes a MicroVM. Returns false when it has ended.
    async fn wake(&self, id: &str) -> Result<bool> {
        let mut is_running = false;
        for attempt in 0..REPEATS {
            if attempt > 0 {
                sleep(REPEAT_PAUSE).await;
            }
            match self.call(api::resume(self.client(), id)).await {
                Ok(()) => return Ok(true),
                Err(ApiError::NotFound) => return Ok(false),
                Err(ApiError::Conflict) => {}
                Err(error) => return Err(error.into()),
            }
            match self.call(api::get(self.client(), id)).await? {
                None => return Ok(false),
                Some(vm) if vm.has_ended() => return Ok(false),
                Some(vm) if vm.state == MicrovmState::Pending => return Ok(true),
                // It runs because of a concurrent call, or AWS suspends it and does not report that yet.
                Some(vm) => is_running = vm.state == MicrovmState::Running,
            }
        }
        if is_running { Ok(true) } else { Err(unavailable("AWS still suspends the MicroVM")) }
    }
}

#[async_trait]
impl SandboxService for MicrovmSandboxes {
    async fn start(&self, user: &UserId, id: &str, task: Option<Uuid>) -> Result<Launch> {
        let key = SecretString::from(id::new_session_key());
        let mut new = self.store().new_record(user, id, &self.config().spec, &key).await?;
        new.name = Some(new_name(user, id, self.config().deployment.as_deref()));
        let new_key = new.session_key_hash.clone();
        let Some(mut record) = self.store().create(new, task).await? else { return Ok(Launch::Deleted) };
        match self.look(&record).await? {
            Look::Found(vm) if !vm.has_ended() => return Ok(Launch::Started),
            Look::Found(_) | Look::Gone => {
                let Some(next) = self.store().next_generation(&record).await? else { return Ok(Launch::Deleted) };
                record = next;
            }
            Look::NotRun | Look::Unknown(_) => {}
        }
        if !self.ensure_capacity(&record).await? {
            // A record from an earlier call may have a MicroVM.
            if record.session_key_hash == new_key {
                self.store().withdraw(&record).await?;
            }
            return Ok(Launch::Full);
        }
        Ok(if self.launch(record).await? { Launch::Started } else { Launch::Deleted })
    }

    async fn inspect(&self, user: &UserId, id: &str) -> Result<Option<Sandbox>> {
        let Some(record) = self.store().get(user, id).await? else { return Ok(None) };
        Ok(self.inspect_records(&[&record]).await?.pop())
    }

    async fn inspect_all(&self, keys: &[(UserId, String)]) -> Result<Vec<Option<Sandbox>>> {
        let records = self.store().batch_get_of_users(keys).await?;
        let known: Vec<&SandboxRecord> = records.iter().flatten().collect();
        let mut observed = self.inspect_records(&known).await?.into_iter();
        Ok(records.iter().map(|record| record.as_ref().and_then(|_| observed.next())).collect())
    }

    fn sends_webhooks(&self) -> bool {
        self.viewer.sends_webhooks()
    }

    async fn batch_get(&self, user: &UserId, ids: &[String]) -> Result<Vec<Option<Sandbox>>> {
        let records = self.store().batch_get(user, ids).await?;
        let observed = self.observe(&distinct(&records)).await?;
        Ok(in_order(&records, &observed))
    }

    async fn list(&self, user: &UserId) -> Result<Vec<Sandbox>> {
        let records = self.store().list(user).await?;
        self.observe(&records.iter().collect::<Vec<_>>()).await
    }

    async fn pause(&self, user: &UserId, id: &str) -> Result<bool> {
        let Some(record) = self.store().get(user, id).await? else { return Ok(false) };
        let Look::Found(vm) = self.look(&record).await? else { return Ok(false) };
        // The provider first: after a crash in between, the sandbox is shown as paused and costs nothing. The other way round it would run
        // on, and nothing would look at it.
        if !self.suspend(&vm).await? {
            return Ok(false);
        }
        self.routes.close(&name_of(&record)).await?;
        self.store().set_route(user, id, &vm.id, None).await?;
        self.store().set_desired(user, id, Desired::Paused).await
    }

    async fn resume(&self, user: &UserId, id: &str) -> Result<bool> {
        let Some(record) = self.store().get(user, id).await? else { return Ok(false) };
        let vm = match self.look(&record).await? {
            Look::Found(vm) if !vm.has_ended() => vm,
            _ => return Ok(false),
        };
        if vm.state == MicrovmState::Running && record.desired == Desired::Running {
            return Ok(true);
        }
        // Its user wants it to run, so it runs even beyond the limit.
        self.ensure_capacity(&record).await?;
        // The record first, with a due time: a sandbox that runs is inspected soon, and then from time to time.
        if !self.store().set_turned(user, id, &vm.id).await? {
            return Ok(false);
        }
        if vm.state == MicrovmState::Pending {
            return Ok(true);
        }
        // It is suspended, or what was reported is out of date.
        if !self.wake(&vm.id).await? {
            return Ok(false);
        }
        // A client that only looks at conversations does not open the route. If this fails, the reconciler does it within a minute or two.
        if let Some(record) = self.store().get(user, id).await? {
            let look = Look::Found(Microvm { state: MicrovmState::Running, ..vm });
            if let Err(error) = self.open_routes(&mut [record], &[look]).await {
                tracing::warn!(error = %error.context(), "sandbox.route_not_opened");
            }
        }
        Ok(true)
    }

    async fn terminate(&self, user: &UserId, id: &str) -> Result<bool> {
        let Some(record) = self.store().find(user, id).await? else { return Ok(true) };
        // Without a MicroVM in the record: one that is being run now is terminated by its worker, or is an orphan.
        let is_left = match self.look(&record).await? {
            Look::Found(vm) if vm.has_ended() => false,
            Look::Found(vm) => match self.call(api::terminate(self.client(), &vm.id)).await {
                // AWS has accepted it. The call after the confirmation delay finds out whether it has ended.
                Ok(()) => false,
                Err(ApiError::Conflict) => true,
                Err(error) => return Err(error.into()),
            },
            Look::NotRun | Look::Gone | Look::Unknown(_) => false,
        };
        // Always, because a concurrent inspection may have opened the route again.
        self.routes.close(&name_of(&record)).await?;
        Ok(!is_left)
    }

    fn confirmation_delay(&self) -> Duration {
        CONFIRMATION_DELAY
    }

    fn inspection_period(&self) -> Option<Duration> {
        Some(INSPECTION_PERIOD)
    }

    fn can_list_provider(&self) -> bool {
        true
    }

    async fn end_orphans(&self, now: Time) -> Result<usize> {
        let listed = self.call(api::list(self.client(), &self.config().image)).await?;
        let mut old: Vec<api::Listed> = listed
            .into_iter()
            .filter(|vm| !matches!(vm.state, MicrovmState::Terminating | MicrovmState::Terminated))
            .filter(|vm| now.since(vm.started_at) >= ORPHAN_AGE)
            .collect();
        let ids: Vec<String> = old.iter().map(|vm| vm.id.clone()).collect();
        let used = self.store().used_vms(&ids).await?;
        old.retain(|vm| !used.contains(&vm.id));
        old.truncate(ORPHANS);
        let mut ended = 0;
        for vm in old {
            // From now on no worker can enter it into a record.
            if !self.store().mark_orphan(&vm.id).await? {
                continue;
            }
            self.call(api::terminate(self.client(), &vm.id)).await?;
            tracing::warn!(microvm = vm.id, state = vm.state.as_str(), "sandbox.orphan_terminated");
            ended += 1;
        }
        Ok(ended)
    }

    async fn mark_used(&self, user: &UserId, id: &str) -> Result<()> {
        self.store().mark_used(user, id).await.map(|_| ())
    }
}

impl MicrovmSandboxConfig {
    /// What the supervisor in a MicroVM receives: the environment of the agent server, as JSON.
    pub(super) fn payload(&self, key: &SecretString) -> Result<SecretString> {
        let text = json!({"v": 1, "environment": self.environment(key)}).to_string();
        match text.len() <= LONGEST_PAYLOAD {
            true => Ok(text.into()),
            false => Err(Error::internal(format!("the environment of a sandbox exceeds {LONGEST_PAYLOAD} bytes"))),
        }
    }

    fn environment(&self, key: &SecretString) -> Map<String, Value> {
        let mut environment: Map<String, Value> =
            ENVIRONMENT.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
        environment.extend(super::STORAGE_VARIABLES.map(|(name, value)| (name.to_owned(), json!(value))));
        for name in ["OH_SESSION_API_KEYS_0", "OH_SECRET_KEY"] {
            environment.insert(name.to_owned(), json!(key.expose_secret()));
        }
        let mut origins: Vec<String> = Vec::new();
        if let Some(url) = &self.web_url {
            let url = url.trim_end_matches('/');
            environment.insert("OH_WEBHOOKS_0_BASE_URL".to_owned(), json!(format!("{url}/api/v1/webhooks")));
            environment.extend(super::WEBHOOK_VARIABLES.map(|(name, value)| (name.to_owned(), json!(value))));
            // The public address may have a path (a stage of API Gateway); an origin has none.
            origins.push(
                url.parse::<reqwest::Url>().map_or_else(|_| url.to_owned(), |url| url.origin().ascii_serialization()),
            );
        }
        origins.extend(self.allow_cors_origins.iter().cloned());
        for (index, origin) in origins.iter().enumerate() {
            environment.insert(format!("OH_ALLOW_CORS_ORIGINS_{index}"), json!(origin));
        }
        environment
    }
}

#[cfg(test)]
mod tests {
    use aws_types::SdkConfig;

    use super::*;

    fn config() -> MicrovmSandboxConfig {
        MicrovmSandboxConfig {
            deployment: None,
            image: "arn:aws-cn:lambda:cn-north-1:123456789012:microvm-image:one".to_owned(),
            front_door_url: "https://front.example.com".to_owned(),
            routes: String::new(),
            spec: "image:1".to_owned(),
            max_sandboxes: 1,
            web_url: Some("https://api.example.com/v1/".to_owned()),
            allow_cors_origins: vec!["https://ui.example.com".to_owned()],
            working_dir: WORKING_DIR.to_owned(),
            aws: SdkConfig::builder().build(),
            routes_endpoint: None,
        }
    }

    fn record(changes: &Value) -> SandboxRecord {
        let now = Time::now().sortable();
        let mut record = json!({
            "user": "u", "id": "one", "spec_id": "s", "session_key_sealed": "", "session_key_hash": "", "created_at": now, "used_at": now,
            "desired": "running",
        });
        for (name, value) in changes.as_object().expect("changes") {
            record[name] = value.clone();
        }
        serde_json::from_value(record).expect("a record")
    }

    #[test]
    fn the_payload_follows_from_key_and_configuration() {
        let (config, key) = (config(), SecretString::from("key"));
        let payload = |config: &MicrovmSandboxConfig| config.payload(&key).map(|text| text.expose_secret().to_owned());
        let text = payload(&config).expect("a payload");
        assert_eq!(text, payload(&config).expect("a payload"), "AWS compares it with that of an earlier call");
        let environment = &serde_json::from_str::<Value>(&text).expect("JSON")["environment"];
        assert_eq!(environment["OH_WEBHOOKS_0_BASE_URL"], "https://api.example.com/v1/api/v1/webhooks");
        assert_eq!(environment["OH_ALLOW_CORS_ORIGINS_0"], "https://api.example.com");
        assert_eq!(environment["OH_ALLOW_CORS_ORIGINS_1"], "https://ui.example.com");
        assert_eq!(
            (&environment["OH_SESSION_API_KEYS_0"], &environment["OH_SECRET_KEY"]),
            (&json!("key"), &json!("key"))
        );
        // Up to the limit.
        let mut long = config.clone();
        long.allow_cors_origins = vec!["x".repeat("https://ui.example.com".len() + LONGEST_PAYLOAD - text.len())];
        assert_eq!(payload(&long).expect("a payload").len(), LONGEST_PAYLOAD);
        long.allow_cors_origins[0].push('x');
        assert!(payload(&long).is_err());
        assert!(config.connectors()[0].starts_with("arn:aws-cn:lambda:cn-north-1:aws:network-connector:"));
    }

    #[test]
    fn states_of_a_microvm_are_statuses_of_its_sandbox() {
        use MicrovmState::{Pending, Running, Suspended, Suspending, Terminated, Terminating};
        let now = Time::now();
        let vm = |state: &MicrovmState| {
            Look::Found(Microvm {
                id: "vm".to_owned(),
                endpoint: "host".to_owned(),
                state: state.clone(),
                started_at: now,
                reason: Some("Out of memory".to_owned()),
            })
        };
        let (soon, past) =
            (now.plus(Duration::from_secs(60)).sortable(), now.minus(Duration::from_secs(60)).sortable());
        let routed = json!({"vm": "vm", "route_until": soon});
        let expired = json!({"vm": "vm", "route_until": past});
        let paused = json!({"vm": "vm", "desired": "paused", "route_until": soon});
        let resumed = json!({"vm": "vm", "turned_at": now.sortable()});
        let resumed_before = json!({"vm": "vm", "turned_at": past});
        for (changes, state, expected) in [
            (&routed, Pending, SandboxStatus::Starting),
            (&routed, Running, SandboxStatus::Running),
            (&expired, Running, SandboxStatus::Starting),
            (&paused, Running, SandboxStatus::Paused),
            (&paused, Suspending, SandboxStatus::Paused),
            (&paused, Suspended, SandboxStatus::Paused),
            (&resumed, Suspended, SandboxStatus::Starting),
            (&resumed_before, Suspended, SandboxStatus::Paused),
            (&routed, Terminating, SandboxStatus::Missing),
            (&routed, Terminated, SandboxStatus::Missing),
            (&routed, MicrovmState::from("NEW"), SandboxStatus::Error),
        ] {
            let (status, detail) = status(&record(changes), &vm(&state), now);
            assert_eq!(status, expected, "{changes} {state:?}");
            let has_detail = matches!(status, SandboxStatus::Paused | SandboxStatus::Missing | SandboxStatus::Error);
            assert_eq!(detail.is_some(), has_detail, "{changes} {state:?}");
        }
        let ended = status(&record(&routed), &vm(&Terminated), now).1;
        assert_eq!(ended.as_deref(), Some("Its MicroVM has ended (Out of memory)"));
        assert_eq!(status(&record(&json!({})), &Look::NotRun, now).0, SandboxStatus::Starting);
        let later = now.plus(LAUNCH_GRACE + Duration::from_secs(1));
        assert_eq!(status(&record(&json!({})), &Look::NotRun, later).0, SandboxStatus::Missing);
        assert_eq!(status(&record(&json!({"vm": "vm"})), &Look::Gone, now).0, SandboxStatus::Missing);
    }
}
