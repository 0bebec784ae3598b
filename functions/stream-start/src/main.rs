//! The Lambda function around [`stream_start::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve_streaming(async |config, aws, sealer| {
        Ok(stream_start::router(stream_start::Context::new(&config, &aws, &sealer)))
    })
    .await
}
