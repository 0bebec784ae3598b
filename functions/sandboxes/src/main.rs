//! The Lambda function around [`sandboxes::router`] and [`sandboxes::secrets_router`].

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    lambda_bootstrap::serve(|config, aws, sealer| {
        let context = sandboxes::Context::new(config, aws, sealer);
        sandboxes::router(context.clone()).merge(sandboxes::secrets_router(context))
    })
    .await
}
