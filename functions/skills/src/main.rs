//! The Lambda function around [`skills::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(|config, aws, sealer| skills::router(skills::Context::new(config, aws, sealer))).await
}
