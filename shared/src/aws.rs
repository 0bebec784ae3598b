//! The AWS clients, made once a process.

use std::time::Duration;

use aws_config::SdkConfig;
use aws_config::timeout::TimeoutConfig;

use crate::measure::Units;

/// By default the SDK waits for ever for an answer. A call to DynamoDB is done in milliseconds, or was lost.
const DYNAMODB_ATTEMPT: Duration = Duration::from_secs(5);
/// Longer than a long poll.
const SQS_ATTEMPT: Duration = Duration::from_secs(30);

/// The clients that stores and queues are built on. Which of them a function uses is decided by its context.
#[derive(Clone, Debug)]
pub struct Aws {
    /// Records.
    pub dynamodb: aws_sdk_dynamodb::Client,
    /// Large values.
    pub s3: aws_sdk_s3::Client,
    /// The start queue.
    pub sqs: aws_sdk_sqs::Client,
}

/// The SDK's configuration in the environment: region, credentials, `AWS_ENDPOINT_URL_*`.
pub async fn sdk_config_from_env() -> SdkConfig {
    aws_config::load_from_env().await
}

/// The DynamoDB client alone, for functions that need no other.
pub async fn dynamodb_from_env() -> aws_sdk_dynamodb::Client {
    dynamodb(&aws_config::load_from_env().await)
}

fn dynamodb(config: &SdkConfig) -> aws_sdk_dynamodb::Client {
    let config = aws_sdk_dynamodb::config::Builder::from(config)
        .timeout_config(timeouts(DYNAMODB_ATTEMPT))
        .interceptor(Units)
        .build();
    aws_sdk_dynamodb::Client::from_conf(config)
}

impl Aws {
    /// Clients on a given configuration.
    #[must_use]
    pub fn new(config: &SdkConfig) -> Self {
        // Path style works for every endpoint, an embedded one on loopback included.
        let s3 = aws_sdk_s3::config::Builder::from(config).force_path_style(true).build();
        let sqs = aws_sdk_sqs::config::Builder::from(config).timeout_config(timeouts(SQS_ATTEMPT)).build();
        Self {
            dynamodb: dynamodb(config),
            s3: aws_sdk_s3::Client::from_conf(s3),
            sqs: aws_sdk_sqs::Client::from_conf(sqs),
        }
    }
}

pub(crate) fn timeouts(attempt: Duration) -> TimeoutConfig {
    TimeoutConfig::builder().connect_timeout(Duration::from_secs(3)).operation_attempt_timeout(attempt).build()
}
