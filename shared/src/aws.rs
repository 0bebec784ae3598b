//! The AWS clients, made once a process.

use aws_config::SdkConfig;

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

impl Aws {
    /// Clients configured by the environment (region, credentials, `AWS_ENDPOINT_URL_*`).
    pub async fn from_env() -> Self {
        Self::new(&aws_config::load_from_env().await)
    }

    /// Clients on a given configuration.
    #[must_use]
    pub fn new(config: &SdkConfig) -> Self {
        // Path style works for every endpoint, an embedded one on loopback included.
        let s3 = aws_sdk_s3::config::Builder::from(config).force_path_style(true).build();
        Self {
            dynamodb: aws_sdk_dynamodb::Client::new(config),
            s3: aws_sdk_s3::Client::from_conf(s3),
            sqs: aws_sdk_sqs::Client::new(config),
        }
    }
}
