//! The Lambda function around [`sandboxes::router`] and [`sandboxes::secrets_router`].

use shared::user::seal::Sealer;

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(async |config, aws| {
        let sealer = Sealer::from_file(&config.sealing_key_file)?;
        let context = sandboxes::Context::new(&config, &aws, &sealer)?;
        Ok(sandboxes::router(context.clone()).merge(sandboxes::secrets_router(context)))
    })
    .await
}
