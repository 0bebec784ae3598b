//! The Lambda function around [`web_client::router`].

#[tokio::main]
async fn main() -> Result<(), lambda::Error> {
    lambda::serve_open(web_client::router(web_client::Context::from_env())).await
}
