//! The Lambda function around [`events::router`] and [`events::webhooks_router`].

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    lambda_bootstrap::serve(|config, aws, sealer| {
        let context = events::Context::new(config, aws, sealer);
        events::router(context.clone()).merge(events::webhooks_router(context))
    })
    .await
}
