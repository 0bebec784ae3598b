//! The Lambda function around [`conversations::router`].

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    lambda_bootstrap::serve(|config, aws, sealer| {
        conversations::router(conversations::Context::new(config, aws, sealer))
    })
    .await
}
