//! The Lambda function around [`stream_start::router`].

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    lambda_bootstrap::serve_streaming(|config, aws, sealer| {
        stream_start::router(stream_start::Context::new(config, aws, sealer))
    })
    .await
}
