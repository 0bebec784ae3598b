//! The Lambda function around [`start::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(|config, aws, sealer| start::router(start::Context::new(config, aws, sealer))).await
}
