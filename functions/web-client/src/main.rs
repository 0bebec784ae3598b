//! The Lambda function around [`web_client::router`].

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    let router = web_client::router(web_client::Context::from_env()).merge(web_client::health_router());
    lambda_bootstrap::serve_static(router).await
}
