//! The Lambda function around [`conversations::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(|config, aws, sealer| conversations::router(conversations::Context::new(config, aws, sealer))).await
}
