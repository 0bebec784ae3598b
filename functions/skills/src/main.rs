//! The Lambda function around [`skills::router`].

use shared::user::seal::Sealer;

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(async |config, aws| {
        let sealer = Sealer::from_file(&config.sealing_key_file)?;
        Ok(skills::router(skills::Context::new(&config, &aws, &sealer)?))
    })
    .await
}
