//! The Lambda function around [`settings::router`].

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    lambda_bootstrap::serve(|config, aws, sealer| settings::router(settings::Context::new(config, aws, sealer))).await
}
