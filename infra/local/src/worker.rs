//! Stands in for Lambda's event source mapping and for EventBridge Scheduler: polls the queues, invokes their
//! consumers with each message, and runs the sweep on a schedule.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use aws_lambda_events::event::sqs::SqsBatchResponse;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::Message;
use http::Method;
use serde_json::{Value, json};
use shared::http_client::HttpClient;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep};

/// The number of concurrent invocations of the worker.
pub const WORKER_CONCURRENCY: usize = 64;
/// The number of concurrent builds of exports. Each may need as much memory as its function has on AWS.
pub const EXPORT_CONCURRENCY: usize = 2;
/// The time limit of an invocation, as on AWS.
const INVOCATION_TIMEOUT: Duration = Duration::from_secs(900);
const MAX_RESPONSE_BYTES: usize = 6 * 1024 * 1024;
const LONG_POLL_SECONDS: i32 = 20;
const FAILED_POLL_DELAY: Duration = Duration::from_secs(1);
/// The interval is a minute on AWS, where each sweep costs money.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// A function that consumes a queue.
#[derive(Clone, Debug)]
pub enum Consumer {
    /// The worker, in this process.
    Worker(Arc<worker::Context>),
    /// The function `exports`, in this process.
    Exports(Arc<exports::Context>),
    /// The function of this name, invoked through the API that `cargo lambda watch` serves at this address.
    Remote(HttpClient, String, &'static str),
}

impl Consumer {
    /// Invokes the function. Returns the ids of the messages that have to be redelivered.
    async fn invoke(&self, event: Value) -> Result<Vec<String>, String> {
        let ids = |response: SqsBatchResponse| {
            response.batch_item_failures.into_iter().map(|failure| failure.item_identifier).collect()
        };
        let failures = match self {
            Self::Worker(context) => ids(worker::handle(context, event).await.map_err(|error| error.context())?),
            Self::Exports(context) => ids(exports::handle(context, event).await.map_err(|error| error.context())?),
            Self::Remote(http, url, name) => {
                let url = format!("{}/2015-03-31/functions/{name}/invocations", url.trim_end_matches('/'));
                let request = http.request(Method::POST, &url).map_err(|error| error.to_string())?;
                let request = request.with(|request| request.json(&event));
                let answer = request
                    .send(INVOCATION_TIMEOUT, |_| MAX_RESPONSE_BYTES)
                    .await
                    .map_err(|error| error.to_string())?;
                if !answer.status.is_success() {
                    return Err(format!("{url} returned {}", answer.status));
                }
                let response: Value = serde_json::from_slice(&answer.body).map_err(|error| error.to_string())?;
                let failures = response["batchItemFailures"].as_array().cloned().unwrap_or_default();
                failures
                    .iter()
                    .filter_map(|failure| failure["itemIdentifier"].as_str().map(ToOwned::to_owned))
                    .collect()
            }
        };
        Ok(failures)
    }
}

/// Sweeps immediately, for work that an earlier run left unfinished, and then at each interval. Runs until it is dropped.
pub async fn sweep(worker: Consumer) {
    let mut timer = interval(SWEEP_INTERVAL);
    timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        if let Err(error) = worker.invoke(json!({"source": "aws.scheduler"})).await {
            tracing::warn!(%error, "local.sweep_failed");
        }
    }
}

/// Polls a queue and invokes its consumer with each message, with at most `concurrency` concurrent invocations. Runs until it is
/// dropped, which also cancels running invocations.
pub async fn poll(sqs: Client, queue_url: String, consumer: Consumer, concurrency: usize) {
    let permits = Arc::new(Semaphore::new(concurrency));
    let mut running = JoinSet::new();
    loop {
        while let Some(done) = running.try_join_next() {
            if let Err(error) = done {
                tracing::error!(%error, "local.worker_panicked");
            }
        }
        let Ok(permit) = permits.clone().acquire_owned().await else { return };
        let received = sqs
            .receive_message()
            .queue_url(&queue_url)
            .max_number_of_messages(1)
            .wait_time_seconds(LONG_POLL_SECONDS)
            .message_system_attribute_names(aws_sdk_sqs::types::MessageSystemAttributeName::All)
            .send()
            .await;
        let message = match received {
            Ok(received) => received.messages.unwrap_or_default().pop(),
            Err(error) => {
                tracing::warn!(error = %aws_sdk_sqs::error::DisplayErrorContext(&error), "local.poll_failed");
                sleep(FAILED_POLL_DELAY).await;
                None
            }
        };
        let Some(message) = message else { continue };
        let (sqs, queue_url, consumer) = (sqs.clone(), queue_url.clone(), consumer.clone());
        running.spawn(async move {
            handle(&sqs, &queue_url, &consumer, message).await;
            drop(permit);
        });
    }
}

async fn handle(sqs: &Client, queue_url: &str, consumer: &Consumer, message: Message) {
    let event = json!({"Records": [record(queue_url, &message)]});
    match consumer.invoke(event).await {
        Ok(failures) if failures.is_empty() => {
            let receipt = message.receipt_handle.unwrap_or_default();
            if let Err(error) = sqs.delete_message().queue_url(queue_url).receipt_handle(receipt).send().await {
                // Harmless: the message is redelivered, and its job finds nothing left to do.
                tracing::warn!(error = %aws_sdk_sqs::error::DisplayErrorContext(&error), "local.message_not_deleted");
            }
        }
        // The message stays in flight until its visibility timeout. Usually the sweep, or a client of an export, enqueues the job earlier.
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "local.worker_failed"),
    }
}

/// The message as a record of Lambda's SQS event.
fn record(queue_url: &str, message: &Message) -> Value {
    let queue = queue_url.rsplit('/').next().unwrap_or_default();
    let attributes: HashMap<String, String> =
        message.attributes.iter().flatten().map(|(name, value)| (name.as_str().to_owned(), value.clone())).collect();
    json!({
        "messageId": message.message_id,
        "receiptHandle": message.receipt_handle,
        "body": message.body,
        "attributes": attributes,
        "messageAttributes": {},
        "md5OfBody": message.md5_of_body,
        "eventSource": "aws:sqs",
        "eventSourceARN": format!("arn:aws:sqs:{}:000000000000:{queue}", crate::engines::REGION),
        "awsRegion": crate::engines::REGION,
    })
}
