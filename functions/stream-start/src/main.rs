//! The Lambda function around [`stream_start::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve_streaming(|config, aws, sealer| stream_start::router(stream_start::Context::new(config, aws, sealer)))
        .await
}
