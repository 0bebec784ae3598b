//! The Lambda function around [`start::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(async |config, aws, sealer| Ok(start::router(start::Context::new(&config, &aws, &sealer)))).await
}
