//! The Lambda function around [`conversations::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(async |config, aws, sealer| {
        Ok(conversations::router(conversations::Context::new(&config, &aws, &sealer)))
    })
    .await
}
