//! Sandboxes that are MicroVMs: what a crash after any call leaves, concurrent workers, orphans, the renewal of access tokens, contended
//! routes, quotas, the longest life of a MicroVM, and what the front door lets through.

use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_sdk_dynamodb::types::AttributeValue;
use axum::body::Body;
use futures::future::{join, join_all};
use http::{Request, StatusCode};
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::clock::Time;
use shared::config::{MicrovmSandboxConfig, Names, SandboxConfig};
use shared::error::Error;
use shared::http_client::{AddressPolicy, HttpClient};
use shared::sandbox::orphans::PERIOD;
use shared::sandbox::reconciler::SandboxReconciler;
use shared::sandbox::store::{Desired, SandboxRecord, SandboxStore};
use shared::sandbox::{Launch, Sandbox, SandboxService, SandboxStatus, service, viewer};
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tempfile::TempDir;
use tokio::sync::OnceCell;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use crate::support::api::Api;
use crate::support::engines::Engines;
use crate::support::fault_proxy::{FaultProxy, Moment, Stop};
use crate::support::hostile_aws::clients;
use crate::support::microvm_api::{Fault, Machines};
use crate::support::microvm_cloud::{MicrovmCloud, agent_server_python};
use crate::support::scripted_llm::{Reply, ScriptedLlm};
use crate::support::server::{Cut, Server};
use crate::support::stand_in_agent::StandInAgent;
use crate::support::wait::wait_for;
use crate::support::websocket::WebSocket;

const PREFIX: &str = "microvms-";
const DEPLOYMENT: &str = "deployment-one";
const SESSION_KEY: &str = "key-of-the-stand-in";
const LIMIT: Duration = Duration::from_secs(60);
/// The most calls of one verb.
const MOST_CALLS: usize = 60;

/// Sandboxes whose MicroVMs are all one stand-in agent server, and a proxy that can stop any call of a worker.
struct Rig {
    cloud: MicrovmCloud,
    proxy: FaultProxy,
    config: MicrovmSandboxConfig,
    stores: Stores,
    /// The service of a worker whose calls can be stopped.
    gated: Arc<dyn SandboxService>,
    service: Arc<dyn SandboxService>,
    /// A proxy that can stop calls of another worker to the API of MicroVMs alone.
    at_api: FaultProxy,
    held: Arc<dyn SandboxService>,
    user: UserId,
    aws: Aws,
    names: Names,
    engines: Engines,
    _agent: StandInAgent,
    _ways: Vec<Server>,
    _folder: TempDir,
}

impl Rig {
    async fn start() -> Self {
        let agent = StandInAgent::start(SESSION_KEY).await;
        let port = agent.url().rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a port");
        let cloud = MicrovmCloud::start(Machines::At(port)).await;
        cloud.api.set_lag(Duration::ZERO);
        cloud.api.set_boot(Duration::ZERO);
        let folder = TempDir::new().expect("a folder");
        let engines = Engines::start(folder.path()).await;
        let aws = Aws::new(&engines.sdk_config().await);
        let names = engines.names(PREFIX);
        schema::make_all(&aws, &names, PREFIX).await.expect("a schema");
        let proxy = FaultProxy::new();
        let at_api = FaultProxy::new();
        let ways = vec![
            proxy.to(&engines.dynamodb).await,
            proxy.to(&cloud.api.url()).await,
            proxy.to(&cloud.routes.url()).await,
            at_api.to(&cloud.api.url()).await,
        ];
        let network = engines.network_sdk_config().await;
        let gated_aws = clients(&network, [&ways[0].url(), &engines.s3, &engines.sqs]);
        let sealer = Sealer::ephemeral();
        let gated_config = cloud.config_at(DEPLOYMENT, &ways[1].url(), &ways[2].url()).await;
        let gated_config = MicrovmSandboxConfig { max_sandboxes: 100, ..gated_config };
        let config = MicrovmSandboxConfig { max_sandboxes: 100, ..cloud.config(DEPLOYMENT).await };
        let gated_stores = Stores::new(&names, &gated_aws, &sealer);
        let stores = Stores::new(&names, &aws, &sealer);
        let held_config = cloud.config_at(DEPLOYMENT, &ways[3].url(), &cloud.routes.url()).await;
        Self {
            held: service(&SandboxConfig::Microvm(Box::new(held_config)), stores.sandboxes()),
            at_api,
            gated: service(&SandboxConfig::Microvm(Box::new(gated_config)), gated_stores.sandboxes()),
            service: service(&SandboxConfig::Microvm(Box::new(config.clone())), stores.sandboxes()),
            cloud,
            proxy,
            config,
            stores,
            user: UserId::new("user-one"),
            aws,
            names,
            engines,
            _agent: agent,
            _ways: ways,
            _folder: folder,
        }
    }

    fn records(&self) -> SandboxStore {
        self.stores.sandboxes()
    }

    fn reconciler(&self) -> SandboxReconciler {
        self.stores.sandbox_reconciler(self.service.clone())
    }

    async fn record(&self, id: &str) -> SandboxRecord {
        self.records().get(&self.user, id).await.expect("the store").expect("a record")
    }

    async fn get(&self, id: &str) -> Sandbox {
        self.service.get(&self.user, id).await.expect("an answer").expect("a sandbox")
    }

    async fn running(&self, id: &str) -> Sandbox {
        wait_for(&format!("{id} runs"), LIMIT, async || {
            let sandbox = self.get(id).await;
            (sandbox.status == SandboxStatus::Running).then_some(sandbox)
        })
        .await
    }

    /// A sandbox that runs.
    async fn started(&self, id: &str) -> Sandbox {
        assert_eq!(self.service.start(&self.user, id, None).await.expect("an answer"), Launch::Started);
        self.running(id).await
    }

    /// Sets a time of a record.
    async fn set_time(&self, id: &str, attribute: &str, time: Time) {
        let key = |text: &str| AttributeValue::S(text.to_owned());
        let update = self.aws.dynamodb.update_item().table_name(&self.names.sandboxes);
        update
            .key("user", key(self.user.as_str()))
            .key("id", key(id))
            .update_expression("SET #time = :time")
            .expression_attribute_names("#time", attribute)
            .expression_attribute_values(":time", key(&time.sortable()))
            .send()
            .await
            .expect("updated");
    }

    /// Starts the sandbox `one`, by a worker that is stopped at its call that runs a MicroVM.
    async fn start_until_run(&self, stop: Stop) -> JoinHandle<Result<Launch, Error>> {
        self.at_api.arm(1, stop);
        let (held, user) = (self.held.clone(), self.user.clone());
        let worker = tokio::spawn(async move { held.start(&user, "one", None).await });
        self.at_api.reached().await;
        assert_eq!(self.at_api.calls(), ["POST /2025-09-09/microvms"]);
        worker
    }

    async fn stop(self) {
        let Self { engines, .. } = self;
        engines.shutdown().await;
    }
}

fn ago(time: Duration) -> Time {
    Time::now().minus(time)
}

/// A change of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Start,
    /// An inspection, which opens the route.
    Open,
    Pause,
    Resume,
    Terminate,
}

async fn call(service: &dyn SandboxService, user: &UserId, id: &str, verb: Verb) -> bool {
    match verb {
        Verb::Start => service.start(user, id, None).await.expect("an answer") == Launch::Started,
        Verb::Open => service.inspect(user, id).await.expect("an answer").is_some(),
        Verb::Pause => service.pause(user, id).await.expect("an answer"),
        Verb::Resume => service.resume(user, id).await.expect("an answer"),
        Verb::Terminate => service.terminate(user, id).await.expect("an answer"),
    }
}

/// Brings a new sandbox into the state in which the verb changes something.
async fn prepare(rig: &Rig, id: &str, verb: Verb) {
    match verb {
        Verb::Start => {}
        Verb::Open => {
            rig.service.start(&rig.user, id, None).await.expect("started");
            // It runs by now, and nothing has opened its route.
            let until = Instant::now() + LIMIT;
            while rig.cloud.api.living().iter().any(|(_, state, _)| state == "PENDING") {
                assert!(Instant::now() < until);
                sleep(Duration::from_millis(10)).await;
            }
        }
        Verb::Pause => drop(rig.started(id).await),
        Verb::Resume => {
            rig.started(id).await;
            assert!(rig.service.pause(&rig.user, id).await.expect("paused"));
        }
        Verb::Terminate => {
            rig.started(id).await;
            assert!(rig.records().mark_deleted(&rig.user, id).await.expect("marked"));
        }
    }
}

async fn crashes(verb: Verb) {
    let rig = Rig::start().await;
    rig.cloud.api.set_quota(usize::MAX);
    let mut seen: Vec<String> = Vec::new();
    for moment in [Moment::Before, Moment::After] {
        for number in 1..MOST_CALLS {
            let id = format!("{verb:?}-{moment:?}-{number}").to_lowercase();
            prepare(&rig, &id, verb).await;
            rig.proxy.arm(number, Stop::Hang(moment));
            let (gated, user, name) = (rig.gated.clone(), rig.user.clone(), id.clone());
            let mut worker = tokio::spawn(async move { call(&*gated, &user, &name, verb).await });
            let has_ended = tokio::select! {
                () = rig.proxy.reached() => false,
                ended = &mut worker => {
                    assert!(ended.expect("no panic"), "{id}");
                    true
                }
            };
            // The worker crashes here.
            worker.abort();
            let calls = rig.proxy.calls();
            rig.proxy.disarm();
            assert!(call(&*rig.service, &rig.user, &id, verb).await, "{id}: {calls:?}");
            holds(&rig, &id, verb, &calls).await;
            if verb != Verb::Terminate {
                assert!(rig.records().mark_deleted(&rig.user, &id).await.expect("marked"));
                assert!(rig.service.terminate(&rig.user, &id).await.expect("terminated"));
            }
            assert_eq!(rig.cloud.api.living(), [], "{id}: {calls:?}");
            assert!(rig.cloud.routes.keys().is_empty(), "{id}: {calls:?}");
            if has_ended {
                seen = calls;
                break;
            }
            assert!(number + 1 < MOST_CALLS, "{calls:?}");
        }
    }
    println!("{verb:?}: {seen:#?}");
    rig.stop().await;
}

/// Asserts that a verb that was repeated after a crash has had its effect, once.
async fn holds(rig: &Rig, id: &str, verb: Verb, calls: &[String]) {
    let living = rig.cloud.api.living();
    match verb {
        Verb::Start | Verb::Open | Verb::Resume => {
            let sandbox = rig.running(id).await;
            assert_eq!(living.len(), 1, "{id}: one MicroVM; {calls:?}");
            let record = rig.record(id).await;
            assert_eq!((record.vm.as_ref(), record.generation), (Some(&living[0].0), 0), "{id}: {calls:?}");
            assert_eq!(record.desired, Desired::Running);
            let payload: Value =
                serde_json::from_str(living[0].2["runHookPayload"].as_str().expect("a payload")).expect("JSON");
            let key = sandbox.session_api_key.expect("a key");
            assert_eq!(payload["environment"]["OH_SESSION_API_KEYS_0"], key.expose_secret(), "{id}: {calls:?}");
        }
        Verb::Pause => {
            let sandbox = rig.get(id).await;
            assert_eq!(sandbox.status, SandboxStatus::Paused, "{id}: {calls:?}");
            assert!(sandbox.detail.is_some_and(|detail| detail.contains("are kept until")), "{id}");
            assert!(living.len() == 1 && living[0].1 != "RUNNING", "{id}: {living:?}");
            assert!(rig.cloud.routes.keys().is_empty(), "{id}: {calls:?}");
        }
        Verb::Terminate => assert_eq!(living, [], "{id}: {calls:?}"),
    }
}

#[tokio::test]
async fn a_start_survives_a_crash_at_every_call() {
    crashes(Verb::Start).await;
}

#[tokio::test]
async fn opening_a_route_survives_a_crash_at_every_call() {
    crashes(Verb::Open).await;
}

#[tokio::test]
async fn a_pause_survives_a_crash_at_every_call() {
    crashes(Verb::Pause).await;
}

#[tokio::test]
async fn a_resume_survives_a_crash_at_every_call() {
    crashes(Verb::Resume).await;
}

#[tokio::test]
async fn a_termination_survives_a_crash_at_every_call() {
    crashes(Verb::Terminate).await;
}

#[tokio::test]
async fn two_workers_at_once_run_one_microvm() {
    let rig = Rig::start().await;
    for round in 0..5 {
        let id = format!("round-{round}");
        let start = async |service: &Arc<dyn SandboxService>| service.start(&rig.user, &id, None).await;
        let (one, other) = join(start(&rig.service), start(&rig.gated)).await;
        assert_eq!((one.expect("started"), other.expect("started")), (Launch::Started, Launch::Started));
        rig.running(&id).await;
        assert_eq!(rig.cloud.api.living().len(), 1);
        let (one, other) = join(rig.service.pause(&rig.user, &id), rig.gated.pause(&rig.user, &id)).await;
        assert!(one.expect("paused") && other.expect("paused"));
        let (one, other) = join(rig.service.resume(&rig.user, &id), rig.gated.resume(&rig.user, &id)).await;
        assert!(one.expect("resumed") && other.expect("resumed"));
        rig.running(&id).await;
        assert!(rig.records().mark_deleted(&rig.user, &id).await.expect("marked"));
        let (one, other) = join(rig.service.terminate(&rig.user, &id), rig.gated.terminate(&rig.user, &id)).await;
        assert!(one.expect("terminated") && other.expect("terminated"));
        assert_eq!(rig.cloud.api.living(), []);
    }
    rig.stop().await;
}

#[tokio::test]
async fn a_lost_response_does_not_run_another_microvm() {
    let rig = Rig::start().await;
    for operation in ["RunMicrovm", "GetMicrovm", "CreateMicrovmAuthToken"] {
        rig.cloud.api.fail(operation, 1, Fault::Lose);
    }
    rig.started("one").await;
    assert_eq!((rig.cloud.api.living().len(), rig.cloud.api.calls_of("RunMicrovm")), (1, 2));
    // The repeated call conflicts with the effect of the first one.
    for (operation, verb) in
        [("SuspendMicrovm", Verb::Pause), ("ResumeMicrovm", Verb::Resume), ("TerminateMicrovm", Verb::Terminate)]
    {
        rig.cloud.api.fail(operation, 1, Fault::Lose);
        if verb == Verb::Terminate {
            rig.records().mark_deleted(&rig.user, "one").await.expect("marked");
        }
        assert!(call(&*rig.service, &rig.user, "one", verb).await, "{verb:?}");
    }
    assert_eq!(rig.cloud.api.living(), []);
    rig.stop().await;
}

#[tokio::test]
async fn a_start_after_a_deployment_takes_the_next_generation() {
    let rig = Rig::start().await;
    // A worker crashes before it records the MicroVM, and the next one has another configuration.
    let worker = rig.start_until_run(Stop::Hang(Moment::After)).await;
    worker.abort();
    let lost = rig.cloud.api.living();
    assert_eq!(lost.len(), 1);
    let mut config = rig.config.clone();
    config.allow_cors_origins.push("https://another.example.com".to_owned());
    let redeployed = service(&SandboxConfig::Microvm(Box::new(config)), rig.records());
    assert_eq!(redeployed.start(&rig.user, "one", None).await.expect("started"), Launch::Started);
    rig.running("one").await;
    let record = rig.record("one").await;
    assert_eq!(record.generation, 1);
    assert_ne!(record.vm.as_ref(), Some(&lost[0].0));
    // The first one is an orphan once it is old, and the other is not.
    assert_eq!(rig.service.end_orphans(Time::now()).await.expect("listed"), 0);
    rig.cloud.api.turn(Duration::from_secs(11 * 60));
    assert_eq!(rig.service.end_orphans(Time::now()).await.expect("listed"), 1);
    let living = rig.cloud.api.living();
    assert_eq!(living.iter().map(|(id, _, _)| id).collect::<Vec<_>>(), [record.vm.as_ref().expect("a MicroVM")]);
    rig.stop().await;
}

#[tokio::test]
async fn orphans_are_terminated_and_nothing_else() {
    let rig = Rig::start().await;
    for id in ["one", "two", "three"] {
        rig.started(id).await;
    }
    rig.service.pause(&rig.user, "two").await.expect("paused");
    let orphan = rig.cloud.api.run_unrecorded();
    rig.cloud.api.turn(Duration::from_secs(11 * 60));
    let young = rig.cloud.api.run_unrecorded();
    let reconciler = rig.reconciler();
    assert_eq!(reconciler.find_orphans(Time::now()).await.expect("compared"), 1);
    let living: Vec<String> = rig.cloud.api.living().into_iter().map(|(id, _, _)| id).collect();
    assert!(!living.contains(&orphan) && living.contains(&young) && living.len() == 4, "{living:?}");
    // The next comparison is not due; then the other one is old, too.
    rig.cloud.api.turn(Duration::from_secs(11 * 60));
    assert_eq!(reconciler.find_orphans(Time::now()).await.expect("compared"), 0);
    let later = Time::now().plus(PERIOD);
    assert_eq!(reconciler.find_orphans(later).await.expect("compared"), 1);
    assert_eq!(rig.cloud.api.living().len(), 3);
    for id in ["one", "three"] {
        rig.running(id).await;
    }
    // While AWS does not respond nothing is terminated, and nothing fails.
    rig.cloud.api.fail("ListMicrovms", 100, Fault::Refuse(500, "InternalServerException"));
    assert_eq!(reconciler.find_orphans(later.plus(PERIOD)).await.expect("compared"), 0);
    rig.stop().await;
}

#[tokio::test]
async fn a_microvm_that_is_marked_as_an_orphan_is_never_used() {
    let rig = Rig::start().await;
    // A worker is stuck between running a MicroVM and recording it.
    let worker = rig.start_until_run(Stop::Hold(Moment::After)).await;
    let vm = rig.cloud.api.living()[0].0.clone();
    rig.cloud.api.turn(Duration::from_secs(11 * 60));
    assert_eq!(rig.service.end_orphans(Time::now()).await.expect("listed"), 1);
    assert_eq!(rig.cloud.api.living(), []);
    rig.at_api.disarm();
    rig.at_api.open();
    assert_eq!(worker.await.expect("no panic").expect("started"), Launch::Started);
    rig.running("one").await;
    let record = rig.record("one").await;
    assert_eq!(record.generation, 1);
    assert_ne!(record.vm, Some(vm));
    rig.stop().await;
}

#[tokio::test]
async fn a_sandbox_that_is_deleted_during_its_start_leaves_no_microvm() {
    let rig = Rig::start().await;
    let worker = rig.start_until_run(Stop::Hold(Moment::After)).await;
    assert!(rig.reconciler().delete(&rig.user, "one").await.expect("deleted"));
    rig.at_api.disarm();
    rig.at_api.open();
    assert_eq!(worker.await.expect("no panic").expect("an answer"), Launch::Deleted);
    assert_eq!(rig.cloud.api.living(), []);
    rig.stop().await;
}

#[tokio::test]
async fn access_tokens_are_renewed_before_they_expire() {
    let rig = Rig::start().await;
    let urls = join_all(["one", "two", "three"].map(|id| rig.started(id))).await;
    let tokens =
        || rig.cloud.routes.keys().into_iter().filter(|(key, _)| key.starts_with("token/")).collect::<Vec<_>>();
    let (first, (updates, _)) = (tokens(), rig.cloud.routes.updates());
    // Fresh tokens are not renewed.
    rig.running("one").await;
    assert_eq!((tokens(), rig.cloud.routes.updates().0), (first.clone(), updates));
    // 41 minutes later: one write renews those of all sandboxes that are inspected.
    rig.cloud.api.turn(Duration::from_secs(41 * 60));
    for id in ["one", "two", "three"] {
        rig.set_time(id, "route_until", Time::now().plus(Duration::from_secs(14 * 60))).await;
    }
    let keys = ["one", "two", "three"].map(|id| (rig.user.clone(), id.to_owned()));
    let inspected = rig.service.inspect_all(&keys).await.expect("inspected");
    assert!(inspected.iter().flatten().all(|sandbox| sandbox.status == SandboxStatus::Running), "{inspected:?}");
    assert_eq!(rig.cloud.routes.updates().0, updates + 1);
    assert!(first.iter().zip(tokens()).all(|(old, new)| old.0 == new.0 && old.1 != new.1));
    // The first tokens have expired, and the addresses are the same.
    rig.cloud.api.turn(Duration::from_secs(20 * 60));
    for before in urls {
        let now = rig.running(&before.id).await;
        assert_eq!(now.agent_server_url(), before.agent_server_url());
    }
    // The reconciler inspects a running sandbox often enough, without an idle policy.
    rig.set_time("one", "due_at", ago(Duration::from_secs(1))).await;
    rig.set_time("one", "route_until", Time::now().plus(Duration::from_secs(60))).await;
    rig.reconciler().reconcile(&rig.user, "one").await.expect("reconciled");
    assert!(rig.record("one").await.route_until > Some(Time::now().plus(Duration::from_secs(50 * 60))));
    let due = rig.records().due().due(Time::now().plus(Duration::from_secs(10 * 60))).await.0;
    assert!(due.iter().any(|row| row.id == "one"), "it is inspected again within ten minutes");
    // One that is paused is not, and its next route has a token of its own.
    rig.service.pause(&rig.user, "one").await.expect("paused");
    rig.set_time("one", "due_at", ago(Duration::from_secs(1))).await;
    rig.reconciler().reconcile(&rig.user, "one").await.expect("reconciled");
    let due = rig.records().due().due(Time::now().plus(Duration::from_secs(24 * 3600))).await.0;
    assert!(!due.iter().any(|row| row.id == "one"));
    rig.stop().await;
}

#[tokio::test]
async fn an_expired_route_shows_a_sandbox_that_starts() {
    let rig = Rig::start().await;
    rig.started("one").await;
    // CloudFront fails while the token expires.
    rig.cloud.routes.set_fault(Some(500));
    rig.set_time("one", "route_until", ago(Duration::from_secs(1))).await;
    assert_eq!(rig.get("one").await.status, SandboxStatus::Starting);
    let inspected = rig.service.inspect(&rig.user, "one").await.expect("an answer").expect("a sandbox");
    assert_eq!(inspected.status, SandboxStatus::Starting);
    rig.cloud.routes.set_fault(None);
    rig.running("one").await;
    rig.stop().await;
}

#[tokio::test]
async fn contended_writes_of_routes_all_succeed() {
    let rig = Rig::start().await;
    let ids: Vec<String> = (0..6).map(|number| format!("sandbox-{number}")).collect();
    rig.cloud.api.set_quota(usize::MAX);
    for id in &ids {
        rig.service.start(&rig.user, id, None).await.expect("started");
    }
    rig.cloud.routes.contend(3);
    join_all(ids.iter().map(|id| rig.running(id))).await;
    assert_eq!(rig.cloud.routes.keys().len(), 2 * ids.len());
    assert!(rig.cloud.routes.updates().1 >= 3, "{:?}", rig.cloud.routes.updates());
    let paused = join_all(ids.iter().map(|id| rig.service.pause(&rig.user, id))).await;
    assert!(paused.into_iter().all(|paused| paused.expect("an answer")));
    assert!(rig.cloud.routes.keys().is_empty());
    rig.stop().await;
}

#[tokio::test]
async fn an_exhausted_quota_is_named() {
    let rig = Rig::start().await;
    rig.cloud.api.set_quota(2048);
    rig.started("one").await;
    let Err(Error::Refused(message)) = rig.service.start(&rig.user, "two", None).await else { panic!("it starts") };
    for words in ["quota", "Memory of all MicroVMs exceeds 2048 MB", "L-0MICROVM", "Service Quotas"] {
        assert!(message.contains(words), "{message}");
    }
    // A paused one counts as well.
    rig.service.pause(&rig.user, "one").await.expect("paused");
    assert!(matches!(rig.service.start(&rig.user, "two", None).await, Err(Error::Refused(_))));
    rig.reconciler().delete(&rig.user, "one").await.expect("deleted");
    rig.started("two").await;
    rig.stop().await;
}

#[tokio::test]
async fn throttling_is_not_a_state_of_a_sandbox() {
    let rig = Rig::start().await;
    rig.started("one").await;
    rig.cloud.api.fail("GetMicrovm", 1000, Fault::Refuse(429, "ThrottlingException"));
    let shown = rig.get("one").await;
    assert_eq!(shown.status, SandboxStatus::Error);
    assert!(shown.detail.expect("a message").contains("does not respond"));
    let inspected = rig.service.inspect(&rig.user, "one").await.expect_err("unknown");
    assert!(inspected.is_upstream(), "{inspected:?}");
    assert_eq!(rig.record("one").await.desired, Desired::Running);
    rig.stop().await;
}

#[tokio::test]
async fn a_missing_permission_is_named() {
    let rig = Rig::start().await;
    rig.cloud.api.fail("RunMicrovm", 1, Fault::Refuse(403, "AccessDeniedException"));
    let Err(Error::Refused(message)) = rig.service.start(&rig.user, "one", None).await else { panic!("it starts") };
    assert!(message.contains("AccessDeniedException"), "{message}");
    rig.started("one").await;
    rig.stop().await;
}

#[tokio::test]
async fn a_microvm_lives_for_eight_hours_and_a_start_replaces_it() {
    let rig = Rig::start().await;
    let before = rig.started("one").await;
    rig.service.pause(&rig.user, "one").await.expect("paused");
    rig.cloud.api.turn(Duration::from_secs(7 * 3600 + 3500));
    assert_eq!(rig.get("one").await.status, SandboxStatus::Paused);
    // Suspended or not.
    rig.cloud.api.turn(Duration::from_secs(200));
    let ended = rig.get("one").await;
    assert_eq!(ended.status, SandboxStatus::Missing);
    let detail = ended.detail.expect("a message");
    assert!(detail.contains("8 hours after its start") && detail.contains("Maximum duration reached"), "{detail}");
    assert!(!rig.service.resume(&rig.user, "one").await.expect("an answer"), "nothing is left");
    assert!(!rig.service.pause(&rig.user, "one").await.expect("an answer"));
    // AWS forgets it after a while.
    rig.cloud.api.turn(Duration::from_secs(3600));
    assert_eq!(rig.get("one").await.status, SandboxStatus::Missing);
    rig.service.start(&rig.user, "one", None).await.expect("started");
    let after = rig.running("one").await;
    assert_eq!(after.agent_server_url(), before.agent_server_url(), "the address is stable");
    let key = |sandbox: &Sandbox| sandbox.session_api_key.as_ref().map(|key| key.expose_secret().to_owned());
    assert_eq!(key(&after), key(&before), "so is the key");
    assert_eq!(rig.record("one").await.generation, 1);
    rig.stop().await;
}

#[tokio::test]
async fn a_viewer_shows_sandboxes_and_only_reads() {
    let rig = Rig::start().await;
    rig.started("one").await;
    let calls = rig.cloud.api.calls().len();
    let viewer = viewer(&SandboxConfig::Microvm(Box::new(rig.config.clone())), rig.records());
    let shown = viewer.get(&rig.user, "one").await.expect("an answer").expect("a sandbox");
    assert_eq!(shown.status, SandboxStatus::Running);
    assert!(shown.session_api_key.is_some());
    assert_eq!(viewer.list(&rig.user).await.expect("a list").len(), 1);
    assert_eq!(rig.cloud.api.calls()[calls..], ["GetMicrovm", "GetMicrovm"]);
    for refused in [
        viewer.pause(&rig.user, "one").await.expect_err("refused"),
        viewer.resume(&rig.user, "one").await.expect_err("refused"),
        viewer.terminate(&rig.user, "one").await.expect_err("refused"),
        viewer.start(&rig.user, "two", None).await.map(drop).expect_err("refused"),
    ] {
        assert!(matches!(refused, Error::Internal { .. }));
    }
    assert_eq!(rig.cloud.api.calls().len(), calls + 2);
    rig.stop().await;
}

#[tokio::test]
async fn the_door_is_no_open_proxy_and_keeps_its_tokens() {
    let rig = Rig::start().await;
    // Writes reach edge locations late.
    rig.cloud.routes.delay(Duration::from_secs(1));
    rig.service.start(&rig.user, "one", None).await.expect("started");
    let (mut statuses, until) = (Vec::new(), Instant::now() + LIMIT);
    let sandbox = loop {
        let sandbox = rig.get("one").await;
        statuses.push(sandbox.status);
        if sandbox.status == SandboxStatus::Running {
            break sandbox;
        }
        assert!(Instant::now() < until);
        sleep(Duration::from_millis(100)).await;
    };
    assert!(
        statuses.len() > 4 && statuses[..statuses.len() - 1].iter().all(|status| *status == SandboxStatus::Starting),
        "{statuses:?}"
    );
    let url = sandbox.agent_server_url().expect("an address").to_owned();
    let http = reqwest::Client::new();
    let get = async |url: String, name: &'static str, value: &'static str| {
        let response = http.get(url).header(name, value).send().await.expect("an answer");
        let text = format!("{:?}", response.headers());
        (response.status(), text + &response.text().await.expect("a body"))
    };
    let door = rig.cloud.edge.url();
    assert_eq!(get(format!("{url}/alive"), "accept", "*/*").await.0, StatusCode::OK);
    // Unknown paths, unknown names, and names of other forms. Web pages can read the response.
    for path in ["", "/", "/alive", "/host/one", "/0123456789abcdef", "/0123456789ABCDEF0123456789ABCDEF/alive"] {
        assert_eq!(
            get(format!("{door}{path}"), "origin", "https://ui.example.com").await.0,
            StatusCode::NOT_FOUND,
            "{path}"
        );
    }
    let (status, text) = get(format!("{door}/{}/alive", "0".repeat(32)), "origin", "https://ui.example.com").await;
    assert!(status == StatusCode::SERVICE_UNAVAILABLE && text.contains("https://ui.example.com"), "{status} {text}");
    // A client chooses neither the port nor the token, and does not see the latter.
    let tokens: Vec<String> = rig.cloud.routes.keys().into_values().collect();
    for (name, value) in
        [("x-aws-proxy-port", "9000"), ("x-aws-proxy-auth", "mine"), ("X-Aws-Proxy-Force-H2", "1"), ("cookie", "a=b")]
    {
        let (status, text) = get(format!("{url}/alive"), name, value).await;
        assert_eq!(status, StatusCode::OK, "{name}");
        assert!(tokens.iter().all(|token| !text.contains(token.as_str())), "{name}");
    }
    // Whatever the store contains: requests go to MicroVMs of the region.
    let name = url.rsplit('/').next().expect("a name");
    let hosts = [
        "example.com",
        "a.lambda-microvm.us-east-1.on.aws.example.com",
        "169.254.169.254",
        "a.lambda-microvm.eu-west-1.on.aws",
    ];
    let before = rig.cloud.edge.origins();
    for host in hosts {
        rig.cloud.routes.poison(&format!("host/{name}"), host);
        assert_eq!(get(format!("{url}/alive"), "accept", "*/*").await.0, StatusCode::BAD_GATEWAY, "{host}");
    }
    assert_eq!(rig.cloud.edge.origins(), before);
    rig.stop().await;
}

#[tokio::test]
async fn neither_tokens_nor_keys_are_logged_or_shown() {
    let rig = Rig::start().await;
    let one = rig.started("one").await;
    let key = one.session_api_key.as_ref().expect("a key").expose_secret().to_owned();
    let token = rig.cloud.routes.keys().into_iter().find(|(name, _)| name.starts_with("token/")).expect("a token").1;
    // AWS quotes the payload in an error.
    let mut config = rig.config.clone();
    config.image = "arn:aws:lambda:us-east-1:123456789012:microvm-image:another".to_owned();
    let other = service(&SandboxConfig::Microvm(Box::new(config.clone())), rig.records());
    let refused = other.start(&rig.user, "two", None).await.expect_err("refused");
    let texts =
        [format!("{one:?}"), format!("{refused:?}"), refused.context(), format!("{config:?}"), format!("{other:?}")];
    for text in texts {
        assert!(!text.contains(&key) && !text.contains(&token) && !text.contains("secret-of-tests"), "{text}");
    }
    rig.stop().await;
}

#[tokio::test]
async fn a_real_agent_server_is_reached_through_the_door() {
    let python = agent_server_python().await;
    let cloud = MicrovmCloud::start(Machines::Guests(python)).await;
    let folder = TempDir::new().expect("a folder");
    let engines = Engines::start(folder.path()).await;
    let aws = Aws::new(&engines.sdk_config().await);
    let names = engines.names(PREFIX);
    schema::make_all(&aws, &names, PREFIX).await.expect("a schema");
    let stores = Stores::new(&names, &aws, &Sealer::ephemeral());
    let config = MicrovmSandboxConfig { web_url: None, ..cloud.config(DEPLOYMENT).await };
    let service = service(&SandboxConfig::Microvm(Box::new(config)), stores.sandboxes());
    let user = UserId::new("user-one");
    service.start(&user, "one", None).await.expect("started");
    let sandbox = wait_for("it runs", Duration::from_secs(180), async || {
        let sandbox = service.get(&user, "one").await.expect("an answer").expect("a sandbox");
        assert_ne!(sandbox.status, SandboxStatus::Missing, "{sandbox:?}");
        (sandbox.status == SandboxStatus::Running).then_some(sandbox)
    })
    .await;
    assert!(cloud.api.logs().contains(r#""boot": "fork""#), "{}", cloud.api.logs());
    let url = sandbox.agent_server_url().expect("an address").to_owned();
    let key = sandbox.session_api_key.as_ref().expect("a key").expose_secret().to_owned();
    let http = reqwest::Client::new();
    // The session key guards it.
    let count = http.get(format!("{url}/api/conversations/count"));
    assert_eq!(
        count.try_clone().expect("a request").send().await.expect("an answer").status(),
        StatusCode::UNAUTHORIZED
    );
    let counted = count.header("X-Session-API-Key", &key).send().await.expect("an answer");
    assert_eq!((counted.status(), counted.text().await.expect("a body")), (StatusCode::OK, "0".to_owned()));
    // A web page of a permitted origin may call it.
    let origin = "https://ui.example.com";
    let preflight = http
        .request(reqwest::Method::OPTIONS, format!("{url}/api/conversations"))
        .header("origin", origin)
        .header("access-control-request-method", "POST")
        .header("access-control-request-headers", "x-session-api-key");
    let allowed = preflight.send().await.expect("an answer");
    assert_eq!(
        allowed.headers().get("access-control-allow-origin").and_then(|value| value.to_str().ok()),
        Some(origin)
    );
    // A websocket, its key in the query, as browsers do it.
    let mut socket = WebSocket::connect(&format!("{url}/sockets/bash-events?session_api_key={key}")).await;
    let command = json!({"command": "echo said; pwd", "timeout": 20});
    let run = async || {
        let request =
            http.post(format!("{url}/api/bash/start_bash_command")).header("X-Session-API-Key", &key).json(&command);
        assert_eq!(request.send().await.expect("an answer").status(), StatusCode::OK);
    };
    run().await;
    let said = async |socket: &mut WebSocket| loop {
        let event = socket.next().await.expect("an open socket");
        if let Some(text) = event["stdout"].as_str().filter(|text| text.contains("said")) {
            return text.to_owned();
        }
    };
    let output = tokio::time::timeout(LIMIT, said(&mut socket)).await.expect("an event");
    assert!(output.contains("/workspace/project"), "{output}");
    // A pause stops its processes, and closes the route; after a resume the same process answers at the same address.
    let info = async || -> Value {
        let answer = http.get(format!("{url}/server_info")).send().await.expect("an answer");
        answer.json().await.expect("JSON")
    };
    let uptime = |info: &Value| info["uptime"].as_f64().expect("seconds");
    let before = uptime(&info().await);
    assert!(service.pause(&user, "one").await.expect("paused"));
    let refused = http.get(format!("{url}/alive")).send().await.expect("an answer").status();
    assert_eq!(refused, StatusCode::SERVICE_UNAVAILABLE);
    assert!(service.resume(&user, "one").await.expect("resumed"));
    wait_for("it runs again", LIMIT, async || {
        let sandbox = service.get(&user, "one").await.expect("an answer").expect("a sandbox");
        (sandbox.status == SandboxStatus::Running).then_some(())
    })
    .await;
    assert!(uptime(&info().await) >= before, "it was not restarted");
    // Its agent server ends: the supervisor starts it again, with the same key.
    let idle = sandbox.agent_server(&HttpClient::new(AddressPolicy::Any)).expect("a client").idle_time().await;
    assert!(idle.expect("an answer").is_some());
    let aged = uptime(&info().await);
    cloud.api.kill_agent();
    wait_for("another one answers", Duration::from_secs(120), async || {
        let answer = http.get(format!("{url}/server_info")).send().await.ok()?;
        let info: Value = answer.json().await.ok()?;
        (info["uptime"].as_f64()? < aged).then_some(())
    })
    .await;
    run().await;
    let reconciler = stores.sandbox_reconciler(service.clone());
    assert!(reconciler.delete(&user, "one").await.expect("deleted"));
    assert_eq!(cloud.api.living(), []);
    engines.shutdown().await;
}

/// A conversation through the functions, the worker, the front door and a real agent server in a MicroVM.
#[tokio::test]
async fn a_conversation_runs_in_a_microvm() {
    let llm = ScriptedLlm::start().await;
    llm.reply_with(vec![Reply::text("Hello from the MicroVM.")]);
    let cloud = MicrovmCloud::start(Machines::Guests(agent_server_python().await)).await;
    let (folder, workspace) = (TempDir::new().expect("a folder"), TempDir::new().expect("a folder"));
    // Where agent servers send webhooks.
    let api: Arc<OnceCell<Api>> = Arc::default();
    let of_server = api.clone();
    let gateway = Server::start(move |request| {
        let api = of_server.clone();
        async move {
            let api = api.get().ok_or(Cut)?;
            let uri = format!("{}?{}", request.path, request.query);
            let mut forwarded =
                Request::builder().method(request.method).uri(uri).body(Body::from(request.body)).map_err(|_| Cut)?;
            *forwarded.headers_mut() = request.headers;
            Ok(api.response(forwarded).await)
        }
    })
    .await;
    let config = MicrovmSandboxConfig {
        web_url: Some(gateway.url()),
        working_dir: workspace.path().join("project").display().to_string(),
        ..cloud.config(DEPLOYMENT).await
    };
    let made = Api::at(folder.path(), SandboxConfig::Microvm(Box::new(config))).await;
    let api = api.get_or_init(async || made).await;
    let user = UserId::new("user-one");
    let settings =
        json!({"llm_model": "openai/scripted", "llm_api_key": "sk-scripted", "llm_base_url": llm.base_url()})
            .to_string();
    api.stores.settings().put(&user, &settings.into()).await.expect("settings");
    let call = async |method: &str, path: &str, body: Option<Value>| {
        let (status, answer) = api.call(&user, method, &format!("/api/v1{path}"), body.as_ref()).await;
        assert!(status < 300, "{method} {path}: {status} {answer}");
        answer
    };
    let body = json!({"initial_message": {"content": [{"type": "text", "text": "Say hello"}]}});
    let start = call("POST", "/app-conversations", Some(body)).await;
    let task = format!("/app-conversations/start-tasks?ids={}", start["id"].as_str().expect("an id"));
    let ready = wait_for("the start is ready", Duration::from_secs(180), async || {
        api.work().await;
        let task = call("GET", &task, None).await[0].clone();
        assert_ne!(task["status"], "ERROR", "{task:#}");
        (task["status"] == "READY").then_some(task)
    })
    .await;
    let id = ready["app_conversation_id"].as_str().expect("an id").to_owned();
    let sandbox = ready["sandbox_id"].as_str().expect("an id").to_owned();
    let shown = async || call("GET", &format!("/app-conversations?ids={id}"), None).await[0].clone();
    let conversation = shown().await;
    let (url, key) = (conversation["conversation_url"].clone(), conversation["session_api_key"].clone());
    let url = url.as_str().expect("an address").to_owned();
    assert!(url.starts_with(&cloud.edge.url()), "{url}");
    // A browser follows it through the front door.
    let (base, hex) = url.split_once("/api/conversations/").expect("a conversation's address");
    let key = key.as_str().expect("a key").to_owned();
    let socket = format!("{base}/sockets/events/{hex}?session_api_key={key}&resend_all=true");
    let mut socket = WebSocket::connect(&socket).await;
    let followed = async {
        loop {
            let event = socket.next().await.expect("an open socket").to_string();
            if event.contains("Hello from the MicroVM.") {
                return;
            }
        }
    };
    tokio::time::timeout(LIMIT, followed).await.expect("the agent's message");
    // The agent server has posted it, too.
    wait_for("the event is stored", LIMIT, async || {
        api.work().await;
        let events = call("GET", &format!("/conversation/{id}/events/search?limit=100"), None).await;
        events.to_string().contains("Hello from the MicroVM.").then_some(())
    })
    .await;
    assert!(cloud.api.logs().contains(r#""boot": "fork""#), "{}", cloud.api.logs());
    call("POST", &format!("/sandboxes/{sandbox}/pause"), None).await;
    assert_eq!(shown().await["sandbox_status"], "PAUSED");
    call("POST", &format!("/sandboxes/{sandbox}/resume"), None).await;
    let resumed = wait_for("it runs again", LIMIT, async || {
        let conversation = shown().await;
        (conversation["sandbox_status"] == "RUNNING").then_some(conversation)
    })
    .await;
    assert_eq!((&resumed["conversation_url"], &resumed["session_api_key"]), (&json!(url), &json!(key)));
    call("DELETE", &format!("/app-conversations/{id}"), None).await;
    wait_for("nothing is left", LIMIT, async || {
        api.work().await;
        (cloud.api.living().is_empty() && cloud.routes.keys().is_empty()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn the_web_ui_keeps_the_keys_of_sandboxes_that_share_a_host() {
    let script = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../infra/local/src/web_ui/setup.js"));
    let script = script.expect("the script").replace("__SERVER__", "{}");
    // What the script uses of a browser.
    let program = format!(
        r#"
        const opened = [], stored = new Map();
        const conversations = ["one", "two"].map((name) => ({{
            conversation_url: "https://front.example.com/" + name + "/api/conversations/1", session_api_key: "key-of-" + name,
        }}));
        conversations.push({{ conversation_url: "http://127.0.0.1:8000/api/conversations/2", session_api_key: "key-of-three" }});
        globalThis.window = globalThis;
        window.location = {{ href: "http://127.0.0.1:3000/", origin: "http://127.0.0.1:3000" }};
        window.localStorage = {{ getItem: (name) => stored.get(name) ?? null, setItem: (name, value) => stored.set(name, value) }};
        window.document = {{ createElement: () => ({{}}), head: {{ appendChild() {{}} }} }};
        window.fetch = async () => new Response(JSON.stringify(conversations));
        window.WebSocket = class {{ constructor(url) {{ opened.push(url); }} }};
        {script}
        window.fetch("/api/v1/app-conversations").then(() => {{
            for (const url of ["wss://front.example.com/two/sockets/events/1", "wss://front.example.com/one/sockets/events/1",
                "ws://127.0.0.1:8000/sockets/events/2", "wss://front.example.com/other/sockets/events/1"]) new window.WebSocket(url);
            console.log(JSON.stringify(opened));
        }});
        "#
    );
    let output = tokio::process::Command::new("node").arg("-e").arg(program).output().await.expect("Node.js");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let opened: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let expected = json!([
        "wss://front.example.com/two/sockets/events/1?session_api_key=key-of-two",
        "wss://front.example.com/one/sockets/events/1?session_api_key=key-of-one",
        "ws://127.0.0.1:8000/sockets/events/2?session_api_key=key-of-three",
        "wss://front.example.com/other/sockets/events/1",
    ]);
    assert_eq!(opened, expected);
}
