//! The Lambda function around [`start_tasks::router`].

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    lambda_bootstrap::serve(|config, aws, _| start_tasks::router(start_tasks::Context::new(config, aws))).await
}
