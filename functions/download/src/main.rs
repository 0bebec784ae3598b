//! The Lambda function around [`download::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve_streaming(|config, aws, sealer| download::router(download::Context::new(config, aws, sealer))).await
}
