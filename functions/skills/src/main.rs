//! The Lambda function around [`skills::router`].

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    lambda_bootstrap::serve(|config, aws, sealer| skills::router(skills::Context::new(config, aws, sealer))).await
}
