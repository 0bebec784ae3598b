//! The Lambda function around [`authorizer::Authorizer`].

use authorizer::{Authorizer, Refusal};
use lambda_runtime::{LambdaEvent, service_fn};
use serde_json::Value;
use shared::config::AuthorizerConfig;
use shared::logging::{self, LogFormat};
use shared::user::api_key::ApiKeyStore;

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    logging::init(LogFormat::Json);
    let config = AuthorizerConfig::from_env()?;
    let keys = ApiKeyStore::new(shared::aws::dynamodb_from_env(), config.users.clone());
    let authorizer = Authorizer::new(&config, keys);
    let authorizer = &authorizer;
    lambda_runtime::run(service_fn(async |event: LambdaEvent<Value>| {
        authorizer.handle(event.payload).await.map_err(|refusal| {
            if let Refusal::Unknown(error) = &refusal {
                tracing::error!(error = %error.context(), "authorizer.failed");
            }
            refusal.to_string()
        })
    }))
    .await
}
