//! The Lambda function around [`settings::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(async |config, aws, sealer| Ok(settings::router(settings::Context::new(&config, &aws, &sealer))))
        .await
}
