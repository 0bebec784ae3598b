//! The Lambda function around [`start::router`].

use shared::user::seal::Sealer;

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(async |config, aws| {
        let sealer = Sealer::from_file(&config.sealing_key_file)?;
        Ok(start::router(start::Context::new(&config, &aws, &sealer)))
    })
    .await
}
