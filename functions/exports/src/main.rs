//! The Lambda function around [`exports::handle`].

#![recursion_limit = "256"]

use lambda_runtime::{LambdaEvent, service_fn};
use serde_json::Value;

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    let (config, aws, _sealer) = lambda_bootstrap::set_up()?;
    let context = exports::Context::new(&config, &aws);
    let context = &context;
    let handle = async |event: LambdaEvent<Value>| {
        let handled = exports::handle(context, event.payload).await.map_err(lambda_bootstrap::Error::from);
        lambda_bootstrap::flush_metrics();
        handled
    };
    lambda_runtime::run(service_fn(handle)).await
}
