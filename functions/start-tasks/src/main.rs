//! The Lambda function around [`start_tasks::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(|config, aws, _| start_tasks::router(start_tasks::Context::new(config, aws))).await
}
