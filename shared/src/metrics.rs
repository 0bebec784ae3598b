//! Metrics: counters and histograms, each with one name. They go to the recorder of the process: on Lambda it writes CloudWatch's embedded
//! metric format into the log, elsewhere there is none.

use std::time::Duration;

use aws_sdk_dynamodb::config::interceptors::{
    AfterDeserializationInterceptorContextRef, BeforeSerializationInterceptorContextMut,
};
use aws_sdk_dynamodb::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_dynamodb::error::BoxError;
use aws_sdk_dynamodb::operation::{
    batch_get_item, batch_write_item, delete_item, get_item, put_item, query, transact_write_items, update_item,
};
use aws_sdk_dynamodb::types::{ConsumedCapacity, ReturnConsumedCapacity};
use metrics::{Unit, counter, describe_counter, describe_histogram, histogram};

const STARTS: &str = "StartsEnded";
const STEP: &str = "StartStepDuration";
const EXPORT: &str = "ExportSize";
const BATCH: &str = "WebhookBatchSize";
const READ: &str = "ReadUnits";
const WRITE: &str = "WriteUnits";

/// Registers the units and descriptions of the metrics with the recorder.
pub fn describe() {
    describe_counter!(STARTS, Unit::Count, "starts that ended, by Outcome");
    describe_histogram!(
        STEP,
        Unit::Milliseconds,
        "how long a step of a start took, by Step; a sandbox is waited for in one"
    );
    describe_histogram!(EXPORT, Unit::Bytes, "zips that were made");
    describe_histogram!(BATCH, Unit::Count, "events that agent servers tell at once");
    describe_histogram!(READ, Unit::Count, "what a read of DynamoDB consumed");
    describe_histogram!(WRITE, Unit::Count, "what a write to DynamoDB consumed");
}

/// Counts a start that has ended with READY or ERROR.
pub(crate) fn start_ended(outcome: &'static str) {
    counter!(STARTS, "Outcome" => outcome).increment(1);
}

/// Records the duration of a step of a start.
pub(crate) fn step_ended(step: &'static str, took: Duration) {
    histogram!(STEP, "Step" => step).record(took.as_secs_f64() * 1000.0);
}

/// Records the size of a new export.
#[expect(clippy::cast_precision_loss, reason = "a zip has less than 2^52 bytes")]
pub(crate) fn export_made(bytes: u64) {
    histogram!(EXPORT).record(bytes as f64);
}

/// Records the number of events in a webhook batch.
#[expect(clippy::cast_precision_loss, reason = "a batch has less than 2^52 events")]
pub fn batch_received(events: usize) {
    histogram!(BATCH).record(events as f64);
}

/// An interceptor that requests the consumed capacity of each DynamoDB call, and records it.
#[derive(Debug)]
pub(crate) struct Units;

/// Calls a macro with the input, the output and the metric of each operation that reports consumed capacity.
macro_rules! for_each_operation {
    ($done:ident) => {
        $done!(
            get_item::GetItemInput, get_item::GetItemOutput, READ;
            query::QueryInput, query::QueryOutput, READ;
            batch_get_item::BatchGetItemInput, batch_get_item::BatchGetItemOutput, READ;
            put_item::PutItemInput, put_item::PutItemOutput, WRITE;
            update_item::UpdateItemInput, update_item::UpdateItemOutput, WRITE;
            delete_item::DeleteItemInput, delete_item::DeleteItemOutput, WRITE;
            batch_write_item::BatchWriteItemInput, batch_write_item::BatchWriteItemOutput, WRITE;
            transact_write_items::TransactWriteItemsInput, transact_write_items::TransactWriteItemsOutput, WRITE
        )
    };
}

impl Intercept for Units {
    fn name(&self) -> &'static str {
        "Units"
    }

    fn modify_before_serialization(
        &self,
        context: &mut BeforeSerializationInterceptorContextMut<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let input = context.input_mut();
        macro_rules! ask {
            ($($input:path, $output:path, $name:ident);+) => {
                $(if let Some(input) = input.downcast_mut::<$input>() {
                    input.return_consumed_capacity = Some(ReturnConsumedCapacity::Total);
                })+
            };
        }
        for_each_operation!(ask);
        Ok(())
    }

    fn read_after_deserialization(
        &self,
        context: &AfterDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let Ok(output) = context.output_or_error() else { return Ok(()) };
        macro_rules! record {
            ($($input:path, $output:path, $name:ident);+) => {
                $(if let Some(output) = output.downcast_ref::<$output>() {
                    let consumed = output.consumed_capacity.iter().map(Consumed::units).sum::<f64>();
                    histogram!($name).record(consumed);
                })+
            };
        }
        for_each_operation!(record);
        Ok(())
    }
}

/// The consumed capacity of one table, or of several tables.
trait Consumed {
    fn units(&self) -> f64;
}

impl Consumed for ConsumedCapacity {
    fn units(&self) -> f64 {
        self.capacity_units.unwrap_or_default()
    }
}

impl Consumed for Vec<ConsumedCapacity> {
    fn units(&self) -> f64 {
        self.iter().map(Consumed::units).sum()
    }
}
