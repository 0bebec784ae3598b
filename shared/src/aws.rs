//! The AWS clients, made once a process.

use std::time::Duration;

use aws_config::environment::EnvironmentVariableCredentialsProvider;
use aws_config::timeout::{TimeoutConfig, TimeoutConfigBuilder};
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_smithy_http_client::tls;
use aws_smithy_runtime_api::client::http::{HttpClient as _, SharedHttpClient, http_client_fn};
use aws_types::sdk_config::SharedCredentialsProvider;
use aws_types::service_config::{LoadServiceConfig, ServiceConfigKey};

use crate::env::text;
use crate::metrics::Units;

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

/// The SDK's configuration as Lambda gives it, in the environment: `AWS_REGION`, credentials, and `AWS_ENDPOINT_URL_*` where the
/// services are elsewhere. The SDK's own way also looks into files and asks the machine's metadata, which functions neither need nor
/// should carry.
#[must_use]
pub fn sdk_config_from_env() -> SdkConfig {
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(text("AWS_REGION").map(Region::new))
        .credentials_provider(SharedCredentialsProvider::new(EnvironmentVariableCredentialsProvider::new()))
        .http_client(http_client())
        .timeout_config(connect_timeout().build())
        .service_config(EndpointsFromEnv)
        .build()
}

#[derive(Debug)]
struct EndpointsFromEnv;

impl LoadServiceConfig for EndpointsFromEnv {
    fn load_config(&self, key: ServiceConfigKey<'_>) -> Option<String> {
        if key.env() != "AWS_ENDPOINT_URL" {
            return None;
        }
        text(&format!("AWS_ENDPOINT_URL_{}", key.service_id().to_uppercase()))
    }
}

/// The DynamoDB client alone, for functions that need no other.
#[must_use]
pub fn dynamodb_from_env() -> aws_sdk_dynamodb::Client {
    dynamodb(&sdk_config_from_env())
}

/// One set-up of TLS and one pool of connections for all clients, made for the first request. The SDK's own sets TLS up for each
/// client anew, and once more as each is made, which is most of what a cold start takes. What clients share goes by their time
/// to connect: it has to be the same.
fn http_client() -> SharedHttpClient {
    let crypto = tls::rustls_provider::CryptoMode::AwsLc;
    let client = aws_smithy_http_client::Builder::new().tls_provider(tls::Provider::Rustls(crypto)).build_https();
    http_client_fn(move |settings, components| client.http_connector(settings, components))
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
    connect_timeout().operation_attempt_timeout(attempt).build()
}

fn connect_timeout() -> TimeoutConfigBuilder {
    TimeoutConfig::builder().connect_timeout(Duration::from_secs(3))
}
