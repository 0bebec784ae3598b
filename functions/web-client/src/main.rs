//! The Lambda function around [`web_client::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    let router = web_client::router(web_client::Context::from_env()).merge(web_client::health_router());
    lambda::serve_open(router).await
}
