//! The Lambda function around [`events::router`].

use shared::user::seal::Sealer;

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(async |config, aws| {
        let sealer = Sealer::from_file(&config.sealing_key_file)?;
        Ok(events::router(events::Context::new(&config, &aws, &sealer)))
    })
    .await
}
