//! The Lambda function around [`events::router`] and [`events::webhooks_router`].

use shared::user::seal::Sealer;

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve(async |config, aws| {
        let sealer = Sealer::from_file(&config.sealing_key_file)?;
        let context = events::Context::new(&config, &aws, &sealer);
        Ok(events::router(context.clone()).merge(events::webhooks_router(context)))
    })
    .await
}
