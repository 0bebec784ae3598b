//! The Lambda function around [`download::router`].

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    lambda_bootstrap::serve_streaming(|config, aws, sealer| {
        download::router(download::Context::new(config, aws, sealer))
    })
    .await
}
