//! AWS with the faults that it has and that the embedded engines do not have. A harness puts it between the functions and the
//! engines.

use std::collections::BTreeMap;
use std::time::Duration;

use aws_sdk_dynamodb::config::retry::{RetryConfig, RetryPartition, TokenBucket};
use aws_types::SdkConfig;
use shared::aws::Aws;

use super::engines::Engines;
use super::lagging_indexes::{LaggingIndexes, Reads};
use super::recurring_faults::RecurringFaults;
use super::server::Server;

/// What AWS does to the calls of a harness.
#[derive(Clone, Copy, Debug, Default)]
pub struct AwsFaults {
    /// Decides which calls fail, and how long each index lags.
    pub seed: u64,
    /// The longest lag of an index; zero if all reads are current.
    pub lag: Duration,
    /// The share of calls that are throttled or collide.
    pub throttled: f64,
    /// The share of calls whose response is lost after they took effect.
    pub lost: f64,
}

impl AwsFaults {
    /// No faults.
    pub fn none() -> Self {
        Self::default()
    }

    /// Indexes and eventually consistent reads lag.
    pub fn lagging(seed: u64) -> Self {
        Self { seed, lag: Duration::from_millis(600), ..Self::default() }
    }

    /// One call in three is throttled. Of the calls of the SDK, which tries three times, one in 27 fails.
    pub fn throttling(seed: u64) -> Self {
        Self { seed, throttled: 0.33, ..Self::default() }
    }

    /// One call in three loses its response.
    pub fn losing_responses(seed: u64) -> Self {
        Self { seed, lost: 0.33, ..Self::default() }
    }

    /// All faults together.
    pub fn all(seed: u64) -> Self {
        Self { seed, lag: Duration::from_millis(300), throttled: 0.15, lost: 0.15 }
    }

    /// Each fault alone, and all together.
    pub fn each(seed: u64) -> [Self; 4] {
        [Self::lagging(seed), Self::throttling(seed), Self::losing_responses(seed), Self::all(seed)]
    }

    pub fn is_none(&self) -> bool {
        self.lag.is_zero() && self.throttled == 0.0 && self.lost == 0.0
    }
}

/// Clients of DynamoDB, S3 and SQS at these addresses.
pub fn clients(sdk: &SdkConfig, [dynamodb, s3, sqs]: [&str; 3]) -> Aws {
    let dynamodb = aws_sdk_dynamodb::config::Builder::from(sdk).endpoint_url(dynamodb).retry_partition(retries());
    let s3 = aws_sdk_s3::config::Builder::from(sdk).endpoint_url(s3).force_path_style(true).retry_partition(retries());
    let sqs = aws_sdk_sqs::config::Builder::from(sdk).endpoint_url(sqs).retry_partition(retries());
    Aws {
        dynamodb: aws_sdk_dynamodb::Client::from_conf(dynamodb.build()),
        s3: aws_sdk_s3::Client::from_conf(s3.build()),
        sqs: aws_sdk_sqs::Client::from_conf(sqs.build()),
    }
}

/// Retries that no other client uses up. By default the SDK's clients in one process share a quota of retries, so that the faults of one
/// test would leave another without any.
pub fn retries() -> RetryPartition {
    RetryPartition::custom("test").token_bucket(TokenBucket::unlimited()).build()
}

/// The addresses of AWS with faults.
#[derive(Debug)]
pub struct HostileAws {
    pub dynamodb: String,
    pub s3: String,
    pub sqs: String,
    faults: AwsFaults,
    indexes: Option<LaggingIndexes>,
    recurring: RecurringFaults,
    ways: Vec<Server>,
}

impl HostileAws {
    /// Starts in front of engines with the tables of the schema, which are empty. `prefix` is that of the tables' names.
    pub async fn start(engines: &Engines, prefix: &'static str, faults: AwsFaults) -> Self {
        let recurring = RecurringFaults::new(faults.seed, faults.throttled, faults.lost);
        let (dynamodb, s3, sqs) = (engines.dynamodb.clone(), engines.s3.clone(), engines.sqs.clone());
        let mut hostile = Self { dynamodb, s3, sqs, faults, indexes: None, recurring, ways: Vec::new() };
        if !faults.lag.is_zero() {
            let indexes = LaggingIndexes::new(engines, prefix, faults.lag, faults.seed).await;
            let way = indexes.to_dynamodb(Reads::Lagging).await;
            hostile.dynamodb = way.url();
            hostile.ways.push(way);
            hostile.indexes = Some(indexes);
        }
        if faults.throttled > 0.0 || faults.lost > 0.0 {
            for url in [&mut hostile.dynamodb, &mut hostile.s3, &mut hostile.sqs] {
                let way = hostile.recurring.to(url).await;
                *url = way.url();
                hostile.ways.push(way);
            }
        }
        hostile
    }

    /// Clients for the test itself: none of their calls fails, and their reads are current.
    pub async fn clients_of_test(&mut self, engines: &Engines) -> Aws {
        let aws = Aws::new(&engines.sdk_config().await);
        let Some(indexes) = &self.indexes else { return aws };
        // Their writes have to reach the indexes, too.
        let way = indexes.to_dynamodb(Reads::Current).await;
        let network = engines.network_sdk_config().await;
        let dynamodb = aws_sdk_dynamodb::config::Builder::from(&network).endpoint_url(way.url()).build();
        self.ways.push(way);
        Aws { dynamodb: aws_sdk_dynamodb::Client::from_conf(dynamodb), ..aws }
    }

    /// A configuration for clients of functions. Where calls fail, the SDK retries them soon, so that tests are quick.
    pub fn retry(&self, network: SdkConfig) -> SdkConfig {
        if self.faults.is_none() {
            return network;
        }
        let retries = RetryConfig::standard().with_initial_backoff(Duration::from_millis(5));
        network.into_builder().retry_config(retries).build()
    }

    /// Lets the indexes catch up with all writes.
    pub async fn catch_up(&self) {
        if let Some(indexes) = &self.indexes {
            indexes.catch_up().await;
        }
    }

    /// How often each fault happened so far.
    pub fn counted(&self) -> BTreeMap<String, usize> {
        self.recurring.faults()
    }
}
