//! All AWS services of one simulation, with the tables, queues and the bucket of the product.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use schema::{EXPORT_QUEUE, JOB_QUEUE};
use shared::aws::Aws;
use shared::config::Names;
use shared::jobs::queue::DEAD_LETTER_SUFFIX;

use super::dynamodb::DynamoDb;
use super::lambda::{Lambda, Mapping};
use super::s3::S3;
use super::sdk_client::{DYNAMODB, S3 as S3_AUTHORITY, SQS, SdkClients, SimulatedHttp, Trace};
use super::sqs::{Depth, Sqs};
use super::{Clock, Faults};
use crate::net::Server;

/// The attribute with the time at which an item expires, in the tables that have one.
const EXPIRES_AT: &str = "expires_at";
const DAY: Duration = Duration::from_secs(24 * 3600);

/// The services, and everything that a context of a function needs to reach them.
#[derive(Clone)]
pub struct Services {
    pub clock: Clock,
    pub dynamodb: DynamoDb,
    pub sqs: Sqs,
    pub s3: S3,
    pub lambda: Lambda,
    pub trace: Trace,
    /// Makes the clients of one process. Each execution environment of a function has its own.
    pub clients: SdkClients,
    pub names: Names,
}

impl Services {
    /// Starts the services and creates the tables, the bucket and the queues, without faults. `concurrency` is the account's quota of
    /// concurrent executions.
    pub async fn start(seed: u64, clock: Clock, faults: &Faults, concurrency: usize, trace: Trace) -> Self {
        let dynamodb = DynamoDb::new(seed, clock, faults.clone());
        let sqs = Sqs::new(seed, clock, faults.clone());
        let s3 = S3::new(seed, clock, faults.clone());
        let servers: [(String, Arc<dyn Server>); 3] = [
            (DYNAMODB.to_owned(), Arc::new(dynamodb.clone())),
            (S3_AUTHORITY.to_owned(), Arc::new(s3.clone())),
            (SQS.to_owned(), Arc::new(sqs.clone())),
        ];
        let clients = SdkClients::new(seed, clock, SimulatedHttp::new(servers, trace.clone()));
        let mut names = Names::with_prefix("");
        let queues = schema::make_all(&clients.make(), &names, "").await.expect("the tables and queues");
        names.job_queue_url.clone_from(&queues.jobs);
        names.export_queue_url.clone_from(&queues.exports);
        for table in [&names.conversations, &names.sandboxes] {
            dynamodb.expire(table, EXPIRES_AT);
        }
        s3.expire(schema::EXPORTS_EXPIRE.prefix, DAY * schema::EXPORTS_EXPIRE.days);
        let lambda = Lambda::new(seed, clock, faults.clone(), concurrency);
        Self { clock, dynamodb, sqs, s3, lambda, trace, clients, names }
    }

    /// Clients of a new process.
    pub fn aws(&self) -> Aws {
        self.clients.make()
    }

    /// Delivers the messages of the job queue and of its dead letters to the function `worker`, as `template.yaml` says.
    pub fn map_worker(&self, worker: &'static str, concurrency: usize) {
        self.map(JOB_QUEUE.name, worker, concurrency);
    }

    /// The same for the queue of exports.
    pub fn map_exports(&self, exports: &'static str, concurrency: usize) {
        self.map(EXPORT_QUEUE.name, exports, concurrency);
    }

    fn map(&self, queue: &str, function: &'static str, concurrency: usize) {
        for (queue, maximum_concurrency) in
            [(queue.to_owned(), concurrency), (format!("{queue}{DEAD_LETTER_SUFFIX}"), 2)]
        {
            self.lambda.map(&self.sqs, Mapping { queue, function, batch_size: 1, maximum_concurrency });
        }
    }

    /// Whether no queue of the product has a message. Dead letters that no function receives count as well.
    pub fn queues_are_empty(&self) -> bool {
        self.sqs.usage().into_keys().all(|queue| self.sqs.depth(&queue) == Depth::default())
    }

    /// All faults that happened, by service and name.
    pub fn happened(&self) -> BTreeMap<(&'static str, &'static str), u64> {
        let services = [
            ("dynamodb", self.dynamodb.happened()),
            ("sqs", self.sqs.happened()),
            ("s3", self.s3.happened()),
            ("lambda", self.lambda.happened()),
        ];
        let named = |(service, faults): (&'static str, BTreeMap<&'static str, u64>)| {
            faults.into_iter().map(move |(fault, count)| ((service, fault), count))
        };
        services.into_iter().flat_map(named).collect()
    }
}
