//! The Lambda function around [`worker::handle`].

use lambda_runtime::{LambdaEvent, service_fn};
use serde_json::Value;

#[tokio::main]
async fn main() -> Result<(), lambda_bootstrap::Error> {
    let (config, aws, sealer) = lambda_bootstrap::set_up()?;
    let context = worker::Context::new(&config, &aws, &sealer);
    let context = &context;
    let handle = async |event: LambdaEvent<Value>| {
        let request_id = Some(event.context.request_id.as_str());
        let handled = worker::handle_invocation(context, event.payload, request_id).await;
        let handled = handled.map_err(lambda_bootstrap::Error::from);
        lambda_bootstrap::flush_metrics();
        handled
    };
    lambda_runtime::run(service_fn(handle)).await
}
