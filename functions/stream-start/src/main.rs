//! The Lambda function around [`stream_start::router`].

use shared::user::seal::Sealer;

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve_streaming(async |config, aws| {
        let sealer = Sealer::from_file(&config.sealing_key_file)?;
        Ok(stream_start::router(stream_start::Context::new(&config, &aws, &sealer)))
    })
    .await
}
