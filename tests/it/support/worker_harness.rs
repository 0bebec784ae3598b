//! A worker on real engines and a stub agent server, with a fault-injection proxy between them. It fails a test that
//! leaves messages in the queue.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_sqs::error::SdkError;
use aws_sdk_sqs::operation::delete_message::DeleteMessageError;
use aws_sdk_sqs::types::{Message, QueueAttributeName};
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::config::{Names, RemoteSandboxConfig, SandboxConfig, StartConfig};
use shared::conversation::ConversationRecord;
use shared::conversation::search::{Filter, SortOrder};
use shared::conversation::store::ConversationStore;
use shared::dynamo::{INDEX_LAG, Table};
use shared::event::store::EventStore;
use shared::http::idempotency_key::IdempotencyKey;
use shared::http::request_trace::RequestTrace;
use shared::http_client::{AddressPolicy, HttpClient};
use shared::jobs::advance_start::AdvanceStart;
use shared::jobs::deliver_messages::RetrySchedule;
use shared::jobs::queue::DEAD_LETTER_SUFFIX;
use shared::pending_message::delivery::Timing;
use shared::sandbox::store::SandboxStore;
use shared::sandbox::{AGENT_SERVER, ExposedUrl, Launch, Sandbox, SandboxService, SandboxStatus};
use shared::start::cancel::Canceller;
use shared::start::create::StartService;
use shared::start::request::StartRequest;
use shared::start::store::StartTaskStore;
use shared::start::task::{StartStatus, StartTaskRecord};
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::counters::{self, Counter};
use shared::user::seal::Sealer;
use shared::user::settings::SettingsStore;
use shared::{Result, Time};
use tempfile::TempDir;
use tokio::time::{Instant, sleep};
use uuid::Uuid;
use worker::Context;

use super::engines::{Engines, is_ministack};
use super::fault_proxy::{FaultProxy, Stop};
use super::hostile_aws::{AwsFaults, HostileAws, clients};
use super::iam_proxy::IamProxy;
use super::meter::Meter;
use super::runtime_api::{API_KEY, RuntimeApi};
use super::server::Server;
use super::stand_in_agent::StandInAgent;
use super::wait::wait_until;
use crate::template::{policies, template};

pub const SESSION_KEY: &str = "session-key-of-the-stand-in";
const PREFIX: &str = "harness-";
const WORKER: &str = "worker";
const END_WITHIN: Duration = Duration::from_secs(180);

/// Sandboxes in memory, which share one agent server. With a store they have records in it, as real ones do.
#[derive(Clone, Debug)]
pub struct StandInSandboxes {
    url: String,
    working_dir: String,
    records: Option<SandboxStore>,
    state: Arc<Mutex<BTreeMap<String, Made>>>,
    /// The initial status of new sandboxes.
    pub begins_as: Arc<Mutex<SandboxStatus>>,
    /// The number of deletions that will fail.
    failing_deletions: Arc<AtomicUsize>,
}

/// The state of a sandbox that was created.
#[derive(Clone, Debug)]
pub struct Made {
    pub status: SandboxStatus,
    pub deleted: bool,
    pub resumed: usize,
    created_at: Time,
    used_at: Time,
}

impl StandInSandboxes {
    /// Starts without sandboxes; the agent server of every new one is at `url`.
    pub fn at(url: String, working_dir: String) -> Self {
        Self {
            url,
            working_dir,
            records: None,
            state: Arc::default(),
            begins_as: Arc::new(Mutex::new(SandboxStatus::Running)),
            failing_deletions: Arc::default(),
        }
    }

    /// Every sandbox that was ever created.
    pub fn made(&self) -> BTreeMap<String, Made> {
        self.state.lock().expect("sandboxes").clone()
    }

    /// Lets the next deletions fail without an effect.
    pub fn fail_deletions(&self, count: usize) {
        self.failing_deletions.store(count, Ordering::SeqCst);
    }

    pub fn set_status(&self, id: &str, status: SandboxStatus) {
        self.state.lock().expect("sandboxes").get_mut(id).expect("a sandbox").status = status;
    }

    fn show(&self, id: &str, made: &Made) -> Sandbox {
        let running = made.status == SandboxStatus::Running;
        Sandbox {
            id: id.to_owned(),
            spec_id: "stand-in".to_owned(),
            status: made.status,
            session_api_key: running.then(|| SESSION_KEY.into()),
            exposed_urls: running
                .then(|| vec![ExposedUrl { name: AGENT_SERVER.to_owned(), url: self.url.clone(), port: 8000 }]),
            created_at: made.created_at,
            used_at: made.used_at,
            working_dir: self.working_dir.clone(),
            detail: (made.status == SandboxStatus::Missing).then(|| "It was ended by a test".to_owned()),
        }
    }
}

#[async_trait]
impl SandboxService for StandInSandboxes {
    async fn start(&self, user: &UserId, id: &str, task: Option<Uuid>) -> Result<Launch> {
        if let Some(records) = &self.records {
            let record = records.new_record(user, id, "stand-in", &SESSION_KEY.into()).await?;
            if records.create(record, task).await?.is_none() {
                return Ok(Launch::Deleted);
            }
        }
        let now = Time::now();
        let status = *self.begins_as.lock().expect("status");
        let made = Made { status, deleted: false, resumed: 0, created_at: now, used_at: now };
        let mut state = self.state.lock().expect("sandboxes");
        if state.get(id).is_none_or(|made| made.deleted) {
            state.insert(id.to_owned(), made);
        }
        Ok(Launch::Started)
    }

    async fn batch_get(&self, user: &UserId, ids: &[String]) -> Result<Vec<Option<Sandbox>>> {
        let known: Vec<bool> = match &self.records {
            Some(records) => records.batch_get(user, ids).await?.iter().map(Option::is_some).collect(),
            None => vec![true; ids.len()],
        };
        let state = self.state.lock().expect("sandboxes");
        let made = |id: &String| state.get(id).filter(|made| !made.deleted).map(|made| self.show(id, made));
        Ok(ids.iter().zip(known).map(|(id, known)| made(id).filter(|_| known)).collect())
    }

    async fn list(&self, _user: &UserId) -> Result<Vec<Sandbox>> {
        let state = self.state.lock().expect("sandboxes");
        let mut all: Vec<Sandbox> =
            state.iter().filter(|(_, made)| !made.deleted).map(|(id, made)| self.show(id, made)).collect();
        all.sort_by_key(|sandbox| std::cmp::Reverse(sandbox.created_at));
        Ok(all)
    }

    async fn pause(&self, _user: &UserId, id: &str) -> Result<bool> {
        self.set_status(id, SandboxStatus::Paused);
        Ok(true)
    }

    async fn resume(&self, _user: &UserId, id: &str) -> Result<bool> {
        let mut state = self.state.lock().expect("sandboxes");
        let made = state.get_mut(id).expect("a sandbox");
        (made.status, made.resumed) = (SandboxStatus::Running, made.resumed + 1);
        Ok(true)
    }

    async fn terminate(&self, _user: &UserId, id: &str) -> Result<bool> {
        let one_less = |count: usize| count.checked_sub(1);
        if self.failing_deletions.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok() {
            let message = "The sandbox provider does not respond".to_owned();
            return Err(shared::Error::Upstream { message, context: "a deletion failed by a test".to_owned() });
        }
        if let Some(made) = self.state.lock().expect("sandboxes").get_mut(id) {
            made.deleted = true;
        }
        Ok(true)
    }

    async fn mark_used(&self, _user: &UserId, id: &str) -> Result<()> {
        self.state.lock().expect("sandboxes").get_mut(id).expect("a sandbox").used_at = Time::now();
        Ok(())
    }
}

/// The harness. End every test with [`WorkerHarness::finish`].
pub struct WorkerHarness {
    pub user: UserId,
    pub gate: FaultProxy,
    guard: IamProxy,
    pub agent: StandInAgent,
    pub sandboxes: Arc<StandInSandboxes>,
    provider: Option<RuntimeApi>,
    pub tasks: StartTaskStore,
    pub conversations: ConversationStore,
    /// Records of sandboxes.
    pub records: SandboxStore,
    pub settings: SettingsStore,
    /// The worker whose calls pass through the fault proxy.
    pub context: Arc<Context>,
    /// A worker whose calls bypass the fault proxy and the faults of AWS.
    pub other_worker: Context,
    /// What the worker's calls to AWS meet after the fault proxy.
    pub hostile: HostileAws,
    start_service: StartService,
    aws: Aws,
    names: Names,
    queues: schema::QueueUrls,
    finished: bool,
    engines: Option<Engines>,
    _ways: Vec<Server>,
    _folder: TempDir,
}

/// Short timeouts, so that tests reach them soon.
pub fn quick() -> StartConfig {
    StartConfig {
        sandbox_startup_timeout: Duration::from_secs(20),
        agent_request_timeout: Duration::from_secs(3),
        inline_wait: Duration::from_secs(5),
        boot_inline_wait: Duration::from_secs(5),
        max_poll_delay: Duration::from_secs(1),
        lease: Duration::from_millis(900),
        poll: Duration::from_millis(20),
        ..StartConfig::default()
    }
}

/// The same for pending messages.
pub fn quick_messages() -> Timing {
    Timing {
        sweep_delay: Duration::from_millis(300),
        lease: Duration::from_secs(20),
        message_timeout: Duration::from_millis(500),
        send_timeout: Duration::from_secs(3),
        retry: RetrySchedule {
            first_delay: Duration::from_millis(100),
            max_delay: Duration::from_millis(500),
            later_delay: Duration::from_secs(5),
            max_refusals: 3,
        },
    }
}

impl WorkerHarness {
    pub async fn start(config: StartConfig) -> Self {
        Self::start_on(config, AwsFaults::none()).await
    }

    /// As [`Self::start`], with a worker whose calls to AWS meet these faults.
    pub async fn start_on(config: StartConfig, faults: AwsFaults) -> Self {
        Self::build(config, faults, None, None).await
    }

    /// As [`Self::start`], with sandboxes of a [`Self::provider`], of which a user may have so many at a time.
    pub async fn with_provider(config: StartConfig, max_sandboxes: usize) -> Self {
        Self::build(config, AwsFaults::none(), Some(max_sandboxes), None).await
    }

    /// As [`Self::with_provider`], with a meter of what the worker consumes of DynamoDB.
    pub async fn metered(config: StartConfig, max_sandboxes: usize, meter: &Meter) -> Self {
        Self::build(config, AwsFaults::none(), Some(max_sandboxes), Some(meter)).await
    }

    async fn build(
        config: StartConfig,
        faults: AwsFaults,
        max_sandboxes: Option<usize>,
        meter: Option<&Meter>,
    ) -> Self {
        let folder = TempDir::new().expect("a folder");
        let engines = Engines::start(folder.path()).await;
        let mut names = engines.names(PREFIX);
        let aws = Aws::new(&engines.sdk_config().await);
        let queues = schema::make_all(&aws, &names, PREFIX).await.expect("a schema");
        let lag = faults.lag.min(INDEX_LAG);
        let mut hostile = HostileAws::start(&engines, PREFIX, faults).await;
        let aws = hostile.clients_of_test(&engines).await;
        names.job_queue_url.clone_from(&queues.jobs);
        names.export_queue_url.clone_from(&queues.exports);
        // SQS redelivers a crashed worker's message after one second.
        aws.sqs
            .set_queue_attributes()
            .queue_url(&queues.jobs)
            .attributes(QueueAttributeName::VisibilityTimeout, "1")
            .attributes(
                QueueAttributeName::RedrivePolicy,
                format!(
                    r#"{{"deadLetterTargetArn":"arn:aws:sqs:us-east-1:{}:{PREFIX}jobs{DEAD_LETTER_SUFFIX}","maxReceiveCount":100}}"#,
                    engines.account
                ),
            )
            .send()
            .await
            .expect("attributes");

        let gate = FaultProxy::new();
        let agent = StandInAgent::start(SESSION_KEY).await;
        let guard = IamProxy::new(policies(&template()), PREFIX);
        let metered = match meter {
            Some(meter) => Some(meter.to(&engines).await),
            None => None,
        };
        let dynamodb = metered.as_ref().map_or_else(|| hostile.dynamodb.clone(), Server::url);
        let held = [
            guard.to(WORKER, &dynamodb).await,
            guard.to(WORKER, &hostile.sqs).await,
            guard.to(WORKER, &hostile.s3).await,
        ];
        let mut ways = vec![gate.to(&held[0].url()).await, gate.to(&held[1].url()).await, gate.to(&agent.url()).await];
        // Without the product's time limits: a call that the fault proxy stops must stay stopped.
        let network = hostile.retry(engines.network_sdk_config().await);
        let gated = clients(&network, [&ways[0].url(), &held[2].url(), &ways[1].url()]);
        ways.extend(held.into_iter().chain(metered));
        let sealer = Sealer::from_file(&folder.path().join("sealing-key")).expect("a key");
        let stores = |aws: &Aws| Stores::new(&names, aws, &sealer);
        let sandboxes = Arc::new(StandInSandboxes {
            records: Some(stores(&gated).sandboxes()),
            ..StandInSandboxes::at(ways[2].url(), agent.working_dir())
        });
        let beside_the_gate = Arc::new(StandInSandboxes {
            url: agent.url(),
            records: Some(stores(&aws).sandboxes()),
            ..StandInSandboxes::clone(&sandboxes)
        });
        let mut provider = None;
        if let Some(max_sandboxes) = max_sandboxes {
            let runtimes = RuntimeApi::start(ways[2].url()).await;
            runtimes.set_key(SESSION_KEY);
            runtimes.begin_as("running");
            let way = gate.to(&runtimes.url()).await;
            let remote = RemoteSandboxConfig {
                deployment: Some("deployment-of-harness".to_owned()),
                api_url: way.url(),
                api_key: Some(API_KEY.into()),
                image: "registry.example.com/agent-server:1".to_owned(),
                resource_factor: 1,
                runtime_class: "sysbox".to_owned(),
                image_pull_secrets: Vec::new(),
                max_sandboxes,
                web_url: Some("https://app.example.com".to_owned()),
                allow_cors_origins: Vec::new(),
            };
            ways.push(way);
            provider = Some((runtimes, SandboxConfig::Remote(remote)));
        }
        let worker = |aws: &Aws, sandboxes: &Arc<StandInSandboxes>| {
            let sandboxes: Arc<dyn SandboxService> = match &provider {
                Some((_, remote)) => stores(aws).sandbox_service(remote),
                None => sandboxes.clone(),
            };
            let http = HttpClient::new(AddressPolicy::Any);
            let mut context = Context::with_sandboxes(&stores(aws), &sandboxes, &http, &config);
            context.messages.timing = quick_messages();
            context.deletion.index_lag = lag;
            context
        };
        let harness = Self {
            user: UserId::new("user-of-harness"),
            gate,
            guard,
            agent,
            sandboxes: sandboxes.clone(),
            tasks: stores(&aws).start_tasks(),
            conversations: stores(&aws).conversations(),
            records: stores(&aws).sandboxes(),
            settings: stores(&aws).settings(),
            context: Arc::new(worker(&gated, &sandboxes)),
            other_worker: worker(&aws, &beside_the_gate),
            hostile,
            start_service: StartService {
                conversations: stores(&aws).conversations(),
                tasks: stores(&aws).start_tasks(),
                sandboxes: stores(&aws).sandboxes(),
                queue: stores(&aws).queue(),
                settings: stores(&aws).settings(),
                allow_insecure_git_access: config.allow_insecure_git_access,
                step_timeout: config.step_timeout,
                max_unfinished: config.max_unfinished_starts,
            },
            provider: provider.map(|(runtimes, _)| runtimes),
            aws,
            names,
            queues,
            finished: false,
            engines: Some(engines),
            _ways: ways,
            _folder: folder,
        };
        harness.set_settings(json!({"llm_model": "openai/scripted", "llm_api_key": "sk-test"})).await;
        harness
    }

    /// The provider of a harness from [`Self::with_provider`].
    pub fn provider(&self) -> &RuntimeApi {
        self.provider.as_ref().expect("a harness with a provider")
    }

    pub async fn set_settings(&self, settings: Value) {
        self.settings.put(&self.user, &settings.to_string().into()).await.expect("settings");
    }

    /// Creates a start with this body, as the `POST` route does.
    pub async fn begin(&self, body: &Value) -> StartTaskRecord {
        self.try_to_begin(body).await.expect("a start")
    }

    /// As [`Self::begin`], for a body that may be refused.
    pub async fn try_to_begin(&self, body: &Value) -> Result<StartTaskRecord> {
        let request =
            StartRequest::from_body(Some("application/json"), body.to_string().as_bytes()).expect("a request");
        self.start_service.create(&self.user, request, &IdempotencyKey(None), &RequestTrace(None)).await
    }

    /// Enqueues a job for a start, as the notification of a command does.
    pub async fn enqueue(&self, task: Uuid) {
        let job = AdvanceStart { user: self.user.clone(), task, due_at: None }.into();
        self.start_service.queue.send(&job, Duration::ZERO).await.expect("the queue");
    }

    pub async fn task(&self, id: Uuid) -> StartTaskRecord {
        self.tasks.get(&self.user, id).await.expect("the store").expect("the task")
    }

    /// The number of starts that have not ended.
    pub async fn unfinished(&self) -> usize {
        self.tasks.unfinished().due(Time::now().plus(Duration::from_secs(3600))).await.0.len()
    }

    /// Receives a message from the queue; waits at most a second.
    pub async fn receive(&self) -> Option<Message> {
        self.receive_from(&self.queues.jobs, 1).await
    }

    async fn receive_from(&self, url: &str, wait: i32) -> Option<Message> {
        let received = self.aws.sqs.receive_message().queue_url(url).wait_time_seconds(wait).send().await;
        received.expect("the queue").messages.unwrap_or_default().pop()
    }

    /// The event log, accessed as the webhooks' function does: the worker's policy does not allow it to add events.
    pub fn events(&self) -> EventStore {
        Stores::without_key(&self.names, &self.aws).events()
    }

    pub async fn purge(&self) {
        self.aws.sqs.purge_queue().queue_url(&self.queues.jobs).send().await.expect("purged");
    }

    /// The event with which Lambda passes the message to a worker.
    pub fn event(message: &Message) -> Value {
        Self::event_of("jobs", message)
    }

    fn event_of(queue: &str, message: &Message) -> Value {
        json!({"Records": [{
            "messageId": message.message_id, "receiptHandle": message.receipt_handle, "body": message.body,
            "attributes": {}, "messageAttributes": {}, "eventSource": "aws:sqs",
            "eventSourceARN": format!("arn:aws:sqs:us-east-1:000000000000:{PREFIX}{queue}"), "awsRegion": "us-east-1",
        }]})
    }

    /// Passes a message to a worker as one of the dead-letter queue.
    pub async fn bury(&self, message: &Message) {
        let event = Self::event_of(&format!("jobs{DEAD_LETTER_SUFFIX}"), message);
        let response = worker::handle(&self.context, event).await.expect("handled");
        assert!(response.batch_item_failures.is_empty());
        self.delete(message).await;
    }

    /// The keys of all objects in the bucket.
    pub async fn objects(&self) -> Vec<String> {
        let listed = self.aws.s3.list_objects_v2().bucket(&self.names.bucket).send().await.expect("the bucket");
        listed.contents.unwrap_or_default().into_iter().filter_map(|object| object.key).collect()
    }

    pub async fn delete(&self, message: &Message) {
        let receipt = message.receipt_handle.clone().unwrap_or_default();
        let delete = self.aws.sqs.delete_message().queue_url(&self.queues.jobs).receipt_handle(receipt);
        let refused = delete.send().await.err();
        // SQS accepts the receipt of a message that was deleted or received again since. The other engine does not.
        let known = |refused: &SdkError<DeleteMessageError>| {
            is_ministack() && refused.as_service_error().is_some_and(DeleteMessageError::is_receipt_handle_is_invalid)
        };
        assert!(refused.as_ref().is_none_or(known), "not deleted: {refused:?}");
    }

    /// Handles a message as the queue's poller does: it is deleted unless the worker reports it as failed.
    pub async fn handle(&self, message: &Message) {
        self.handle_with(&self.context, message).await;
    }

    async fn handle_with(&self, worker: &Context, message: &Message) {
        let response = worker::handle(worker, Self::event(message)).await.expect("handled");
        if response.batch_item_failures.is_empty() {
            self.delete(message).await;
        }
    }

    pub async fn sweep(&self) {
        // Through the fault proxy a sweep may fail, as in production: the next scheduled one follows.
        let _swept = worker::handle(&self.context, json!({"source": "aws.scheduler"})).await;
    }

    /// A sweep by another worker, whose calls are not counted.
    pub async fn sweep_unmetered(&self) {
        worker::handle(&self.other_worker, json!({"source": "aws.scheduler"})).await.expect("swept");
    }

    /// Delivers messages, and sweeps when there are none, until the task has ended.
    pub async fn drive(&self, task: Uuid) -> StartTaskRecord {
        self.drive_with(&self.context, task).await
    }

    /// As [`Self::drive`], with another worker.
    pub async fn drive_with(&self, worker: &Context, task: Uuid) -> StartTaskRecord {
        let deadline = Instant::now() + END_WITHIN;
        loop {
            let now = self.task(task).await;
            if now.now.status.is_final() {
                return now;
            }
            assert!(
                Instant::now() < deadline,
                "the start is still {:?}: {now:?}\ncalls {:?}",
                now.now.status,
                self.gate.calls()
            );
            match self.receive().await {
                Some(message) => self.handle_with(worker, &message).await,
                None => drop(worker::handle(worker, json!({"source": "aws.scheduler"})).await),
            }
        }
    }

    /// Ends a start as its user does.
    pub async fn cancel(&self, task: Uuid) -> Result<()> {
        let stores = Stores::without_key(&self.names, &self.aws);
        Canceller { tasks: stores.start_tasks_without_secrets(), queue: stores.queue() }.cancel(&self.user, task).await
    }

    /// Delivers messages, and sweeps when there are none, until what a failed start made has been undone.
    pub async fn undone(&self, task: Uuid) {
        let deadline = Instant::now() + END_WITHIN;
        while self.lease_row(task).await.is_some_and(|row| row.contains_key("compensation")) {
            assert!(Instant::now() < deadline, "what the start made is not undone: {:?}", self.lease_row(task).await);
            match self.receive().await {
                Some(message) => self.handle(&message).await,
                None => self.sweep().await,
            }
        }
        self.settle_sandboxes().await;
    }

    /// Enqueues jobs of overdue starts, and returns how many.
    pub async fn sweep_starts(&self) -> usize {
        self.context.saga.sweep().await.expect("swept")
    }

    /// Makes a failed start as old as one that is removed.
    pub async fn expire(&self, id: Uuid) {
        let past = AttributeValue::S("2020-01-01T00:00:00.000000Z".to_owned());
        let update = self.aws.dynamodb.update_item().table_name(&self.names.start_tasks);
        let update =
            update.set_key(Some(self.lease_key(id))).update_expression("SET due_at = :past, expires_at = :second");
        let update =
            update.condition_expression("attribute_exists(expires_at)").expression_attribute_values(":past", past);
        update
            .expression_attribute_values(":second", AttributeValue::N("1".to_owned()))
            .send()
            .await
            .expect("the store");
    }

    /// Changes the time of creation in the lease row of an unfinished start. Rows of earlier versions have none.
    pub async fn set_creation_of(&self, id: Uuid, created_at: Option<Time>) {
        let update = self.aws.dynamodb.update_item().table_name(&self.names.start_tasks);
        let update = update.set_key(Some(self.lease_key(id))).condition_expression("attribute_exists(created_at)");
        let update = match created_at {
            None => update.update_expression("REMOVE created_at"),
            Some(at) => update
                .update_expression("SET created_at = :at")
                .expression_attribute_values(":at", AttributeValue::S(at.sortable())),
        };
        update.send().await.expect("the store");
    }

    /// A count of the user's rows.
    pub async fn count(&self, counter: Counter) -> u64 {
        let users = Table::new(self.aws.dynamodb.clone(), self.names.users.clone());
        counters::read(&users, &self.user, counter).await.expect("a count")
    }

    fn lease_key(&self, id: Uuid) -> HashMap<String, AttributeValue> {
        let key = [("user", self.user.as_str().to_owned()), ("id", format!("{}#lease", shared::id::hex(id)))];
        key.map(|(name, value)| (name.to_owned(), AttributeValue::S(value))).into()
    }

    async fn lease_row(&self, id: Uuid) -> Option<HashMap<String, AttributeValue>> {
        let read = self.aws.dynamodb.get_item().table_name(&self.names.start_tasks).set_key(Some(self.lease_key(id)));
        read.send().await.expect("the store").item
    }

    /// Runs the task until the fault proxy stops the chosen call, then drops the worker: a crash at that point. Returns
    /// whether the call was reached.
    pub async fn crash_at(&self, task: Uuid, call: usize, stop: Stop) -> bool {
        self.gate.arm(call, stop);
        let deadline = Instant::now() + END_WITHIN;
        while !self.task(task).await.now.status.is_final() {
            assert!(Instant::now() < deadline, "call {call} was not reached and the start did not end");
            let Some(message) = self.receive().await else {
                // The chosen call may be one of the sweep's.
                tokio::select! {
                    () = self.sweep() => continue,
                    () = self.gate.reached() => break,
                }
            };
            let (context, event) = (self.context.clone(), Self::event(&message));
            let mut worker = tokio::spawn(async move { worker::handle(&context, event).await });
            tokio::select! {
                handled = &mut worker => {
                    if handled.expect("no panic").expect("handled").batch_item_failures.is_empty() {
                        self.delete(&message).await;
                    }
                }
                () = self.gate.reached() => {
                    worker.abort();
                    let _dropped = worker.await;
                    break;
                }
            }
        }
        self.gate.disarm();
        self.gate.is_reached()
    }

    /// Asserts that the task is READY and that there is exactly one of everything: sandbox, conversation, record,
    /// initial message.
    pub async fn assert_one(&self, task: Uuid, messages: usize, case: &str) {
        let record = self.task(task).await;
        assert_eq!(record.now.status, StartStatus::Ready, "{case}: {:?}", record.now.detail);
        let id = record.now.app_conversation_id.expect("a READY task has its conversation");
        assert_eq!(id, record.conversation_id, "{case}");
        let made = self.sandboxes.made();
        assert_eq!(made.len(), 1, "{case}: sandboxes {made:?}");
        assert!(made.values().all(|made| !made.deleted), "{case}");
        let conversations: Vec<Uuid> = self.agent.conversations().iter().map(|conversation| conversation.id).collect();
        assert_eq!(conversations, [id], "{case}");
        assert_eq!(self.agent.messages_delivered(id).len(), messages, "{case}: messages");
        let everything = Filter { include_sub_conversations: true, ..Filter::default() };
        let page = self
            .conversations
            .search(&self.user, &everything, SortOrder::CreatedAtDesc, None, 10)
            .await
            .expect("a list");
        assert_eq!(page.records.iter().map(|record| record.id).collect::<Vec<_>>(), [id], "{case}");
        assert_eq!(self.conversations.count(&self.user, &everything).await.expect("a count"), 1, "{case}");
        let statuses: Vec<StartStatus> = record.history.iter().map(|snapshot| snapshot.status).collect();
        assert_eq!(statuses, ALL_STATUSES, "{case}: each status once, in order");
    }

    /// Delivers the messages that are still in the queue, and fails if any remain.
    pub async fn finish(mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            while let Some(message) = self.receive_from(&self.queues.jobs, 0).await {
                self.handle(&message).await;
            }
            if self.left_in_queues().await == 0 {
                break;
            }
            assert!(Instant::now() < deadline, "messages were left in the queue");
            sleep(Duration::from_millis(100)).await;
        }
        let (unfinished, failed) = self.tasks.unfinished().due(Time::now().plus(Duration::from_secs(3600))).await;
        assert!(unfinished.is_empty() && failed.is_none(), "a task is left unfinished: {unfinished:?} {failed:?}");
        assert_eq!(self.guard.refused(), BTreeSet::new(), "the worker's policy lacks these permissions");
        self.finished = true;
        if let Some(engines) = self.engines.take() {
            engines.shutdown().await;
        }
    }

    /// Handles messages until the queue has been empty for a while.
    pub async fn settle(&self) {
        while let Some(message) = self.receive().await {
            self.handle(&message).await;
        }
    }

    /// Handles jobs and sweeps until the queue is empty and the reconciler has looked at every sandbox that is due. No worker may run
    /// meanwhile: leases on sandboxes are those of crashed workers, and expire.
    pub async fn settle_sandboxes(&self) {
        let deadline = Instant::now() + END_WITHIN;
        loop {
            while let Some(message) = self.receive_from(&self.queues.jobs, 0).await {
                self.handle(&message).await;
            }
            let (due, failed) = self.records.due().due(Time::now().plus(Duration::from_secs(300))).await;
            if due.is_empty() && failed.is_none() && self.left_in_queues().await == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "sandboxes are still due: {due:?}");
            for row in &due {
                self.expire_sandbox_lease(&row.id).await;
            }
            self.sweep().await;
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Stores the stub of a conversation, as a webhook of its sandbox does. The sandbox gets a record if it has none.
    pub async fn put_stub(&self, stub: &ConversationRecord) -> bool {
        let (user, sandbox) = (&self.user, &stub.sandbox_id);
        let record = self.records.new_record(user, sandbox, "stand-in", &SESSION_KEY.into()).await.expect("a record");
        self.records.create(record, None).await.expect("the store").expect("a sandbox that is not being deleted");
        let membership = self.records.adding(user, sandbox, stub.id).expect("a write");
        self.conversations.put_stub(stub, "!", membership).await.expect("the store")
    }

    /// Lets the tombstone of a deleted conversation expire.
    pub async fn expire_tombstone(&self, conversation: Uuid) {
        let update = self.aws.dynamodb.update_item().table_name(&self.names.conversations);
        let update = update
            .set_key(Some(self.conversation_key(conversation)))
            .update_expression("SET expires_at = :past, due_at = :past_due")
            .condition_expression("attribute_exists(expires_at)")
            .expression_attribute_values(":past", AttributeValue::N("1000000000".to_owned()))
            .expression_attribute_values(":past_due", AttributeValue::S("2001-09-12T00:00:00.000000Z".to_owned()));
        update.send().await.expect("there is a tombstone");
    }

    /// Whether the table has a row of this conversation, of whatever kind.
    pub async fn has_conversation_row(&self, conversation: Uuid) -> bool {
        let get = self.aws.dynamodb.get_item().table_name(&self.names.conversations);
        get.set_key(Some(self.conversation_key(conversation))).send().await.expect("the store").item.is_some()
    }

    fn conversation_key(&self, conversation: Uuid) -> HashMap<String, AttributeValue> {
        let key = [("user", self.user.as_str().to_owned()), ("id", conversation.simple().to_string())];
        key.map(|(name, value)| (name.to_owned(), AttributeValue::S(value))).into()
    }

    /// Expires the reconciler's lease on a sandbox, and makes the sandbox due.
    async fn expire_sandbox_lease(&self, sandbox: &str) {
        let text = |text: &str| AttributeValue::S(text.to_owned());
        let update = self.aws.dynamodb.update_item().table_name(&self.names.sandboxes);
        let update = update
            .key("user", text(self.user.as_str()))
            .key("id", text(sandbox))
            .update_expression("SET lease_until = :past, due_at = :past")
            .condition_expression("attribute_exists(lease_owner)")
            .expression_attribute_values(":past", text("2000-01-01T00:00:00.000000Z"));
        // The update is refused if there is no lease.
        drop(update.send().await);
    }

    /// Expires the lease on a conversation's messages.
    pub async fn expire_message_lease(&self, conversation: Uuid) {
        let text = |text: String| aws_sdk_dynamodb::types::AttributeValue::S(text);
        let update = self.aws.dynamodb.update_item().table_name(&self.names.users);
        let update = update
            .key("user", text(self.user.as_str().to_owned()))
            .key("kind", text(format!("messages#{}", conversation.simple())))
            .update_expression("SET lease_until = :past, due_at = :past")
            .condition_expression("attribute_exists(lease_owner)")
            .expression_attribute_values(":past", text("2000-01-01T00:00:00.000000Z".to_owned()));
        // The update is refused if there is no lease.
        drop(update.send().await);
    }

    /// Whether a conversation has pending messages.
    pub async fn messages_wait(&self, conversation: Uuid) -> bool {
        self.messages_row(conversation).await.is_some_and(|row| row.contains_key("messages"))
    }

    /// Whether the pending messages are due for the worker.
    pub async fn messages_are_due(&self, conversation: Uuid) -> bool {
        self.messages_row(conversation).await.is_some_and(|row| row.contains_key("due_at"))
    }

    async fn messages_row(&self, conversation: Uuid) -> Option<HashMap<String, AttributeValue>> {
        let key = [("user", self.user.as_str().to_owned()), ("kind", format!("messages#{}", conversation.simple()))];
        let key = key.map(|(name, value)| (name.to_owned(), AttributeValue::S(value)));
        let found = self.aws.dynamodb.get_item().table_name(&self.names.users).set_key(Some(key.into())).send().await;
        found.expect("the store").item
    }

    /// Stores the lease row of an unfinished task with only the attributes that make it due.
    pub async fn put_due_task(&self, user: &str, id: &str, due_at: &str) {
        let put = self.aws.dynamodb.put_item().table_name(&self.names.start_tasks);
        let id = &format!("{id}#lease");
        let attributes = [("user", user), ("id", id), ("unfinished_shard", "0"), ("due_at", due_at)];
        let put = attributes.into_iter().fold(put, |put, (name, value)| {
            put.item(name, aws_sdk_dynamodb::types::AttributeValue::S(value.to_owned()))
        });
        put.send().await.expect("the store");
    }

    /// The command for which a start waits, as its lease row names it.
    pub async fn pending_command(&self, id: Uuid) -> Option<AttributeValue> {
        self.lease_row(id).await?.remove("command")
    }

    /// Makes the command for which a start waits one of another machine's agent server, as soon as no worker has the start.
    pub async fn move_pending_command(&self, id: Uuid) {
        let text = |text: &str| AttributeValue::S(text.to_owned());
        wait_until("a start without a worker", END_WITHIN, async || {
            let update = self.aws.dynamodb.update_item().table_name(&self.names.start_tasks);
            let update = update
                .set_key(Some(self.lease_key(id)))
                .update_expression("SET command.agent_server = :other, command.id = :id")
                .condition_expression("attribute_exists(command.agent_server) AND attribute_not_exists(lease_owner)")
                .expression_attribute_values(":other", text("http://127.0.0.1:9"))
                .expression_attribute_values(":id", text(&Uuid::new_v4().to_string()));
            update.send().await.is_ok()
        })
        .await;
    }

    /// How often the start has waited without a worker in its current step.
    pub async fn waits(&self, id: Uuid) -> u32 {
        self.number_in_lease_row(id, "waits").await
    }

    async fn number_in_lease_row(&self, id: Uuid, name: &str) -> u32 {
        let row = self.lease_row(id).await.unwrap_or_default();
        row.get(name).map_or(0, |number| number.as_n().expect("a number").parse().expect("a number"))
    }

    /// The failed attempts at a start's current step, as its lease row counts them.
    pub async fn attempts(&self, id: Uuid) -> u32 {
        self.number_in_lease_row(id, "attempts").await
    }

    /// The claims of an unfinished start that no worker has released, as its lease row counts them.
    pub async fn open_claims(&self, id: Uuid) -> u32 {
        let row = self.lease_row(id).await.expect("an unfinished start");
        row["open_claims"].as_n().expect("a number").parse().expect("a count")
    }

    /// Moves the deadline of a task's current step into the past.
    pub async fn end_time_of(&self, id: Uuid) {
        let text = |text: String| aws_sdk_dynamodb::types::AttributeValue::S(text);
        let user = self.task(id).await.user.to_string();
        let update = self.aws.dynamodb.update_item().table_name(&self.names.start_tasks);
        let update = update.key("user", text(user)).key("id", text(shared::id::hex(id)));
        let update =
            update.update_expression("SET deadline = :past").condition_expression("attribute_exists(deadline)");
        let past = text("2020-01-01T00:00:00.000000Z".to_owned());
        update.expression_attribute_values(":past", past).send().await.expect("the store");
    }

    pub async fn remove_due_task(&self, user: &str, id: &str) {
        let id = &format!("{id}#lease");
        let text = |text: &str| aws_sdk_dynamodb::types::AttributeValue::S(text.to_owned());
        let delete = self.aws.dynamodb.delete_item().table_name(&self.names.start_tasks);
        delete.key("user", text(user)).key("id", text(id)).send().await.expect("the store");
    }

    /// The number of messages in the queue.
    pub async fn waiting_messages(&self) -> i64 {
        self.left_in_queues().await
    }

    async fn left_in_queues(&self) -> i64 {
        let mut left = 0;
        for url in [&self.queues.jobs, &self.queues.dead_letters] {
            let attributes = self
                .aws
                .sqs
                .get_queue_attributes()
                .queue_url(url)
                .attribute_names(QueueAttributeName::All)
                .send()
                .await;
            let attributes = attributes.expect("the queue").attributes.unwrap_or_default();
            for name in [
                QueueAttributeName::ApproximateNumberOfMessages,
                QueueAttributeName::ApproximateNumberOfMessagesNotVisible,
                QueueAttributeName::ApproximateNumberOfMessagesDelayed,
            ] {
                left += attributes[&name].parse::<i64>().expect("a number");
            }
        }
        left
    }
}

/// The statuses of a start that succeeds.
pub const ALL_STATUSES: [StartStatus; 8] = [
    StartStatus::Working,
    StartStatus::WaitingForSandbox,
    StartStatus::PreparingRepository,
    StartStatus::RunningSetupScript,
    StartStatus::SettingUpGitHooks,
    StartStatus::SettingUpSkills,
    StartStatus::StartingConversation,
    StartStatus::Ready,
];

impl Drop for WorkerHarness {
    fn drop(&mut self) {
        assert!(
            self.finished || std::thread::panicking(),
            "end the test with WorkerHarness::finish: it checks the queue"
        );
    }
}
