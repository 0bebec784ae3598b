//! The Lambda function around [`skills::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(async |config, aws, sealer| Ok(skills::router(skills::Context::new(&config, &aws, &sealer)))).await
}
