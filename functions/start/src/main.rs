//! The Lambda function around [`start::router`].

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    lambda_bootstrap::serve(|config, aws, sealer| start::router(start::Context::new(config, aws, sealer))).await
}
