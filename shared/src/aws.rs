//! AWS SDK clients and their configuration, created once per process.

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

/// The timeout of one attempt. By default the SDK waits forever for a response; a call to DynamoDB finishes within milliseconds or is lost.
const DYNAMODB_ATTEMPT: Duration = Duration::from_secs(5);
/// The timeout of one attempt, which is longer than a long poll.
const SQS_ATTEMPT: Duration = Duration::from_secs(30);
/// The timeout of one attempt: of an upload of a part of 8 MiB, or until the headers of a download.
const S3_ATTEMPT: Duration = Duration::from_secs(60);

/// The clients for stores and queues. A function's context decides which of them the function uses.
#[derive(Clone, Debug)]
pub struct Aws {
    pub dynamodb: aws_sdk_dynamodb::Client,
    pub s3: aws_sdk_s3::Client,
    pub sqs: aws_sdk_sqs::Client,
}

/// Returns the SDK configuration from the environment, as Lambda sets it: `AWS_REGION`, credentials, and `AWS_ENDPOINT_URL_*` for other
/// endpoints. The SDK's default configuration also reads files and requests the instance metadata, which functions do not need and which
/// makes them larger.
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
        text(&format!("AWS_ENDPOINT_URL_{}", key.service_id().to_uppercase().replace(' ', "_")))
    }
}

/// Creates a DynamoDB client, for functions that need no other client.
#[must_use]
pub fn dynamodb_from_env() -> aws_sdk_dynamodb::Client {
    dynamodb(&sdk_config_from_env())
}

/// Creates one TLS setup and one connection pool for all clients, on the first request. The SDK's default sets up TLS for each client
/// separately, and once more when each client is created, which is most of a cold start. Clients share connections only if their connect
/// timeouts are equal.
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
    /// Creates the clients from a configuration.
    #[must_use]
    pub fn new(config: &SdkConfig) -> Self {
        // Path-style addresses work with every endpoint, including an embedded one on the loopback interface.
        let s3 = aws_sdk_s3::config::Builder::from(config)
            .timeout_config(timeouts(S3_ATTEMPT))
            .force_path_style(true)
            .build();
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
