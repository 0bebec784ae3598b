//! Metrics: counters and histograms, all listed in [`METRICS`]. They go to the recorder of the process: on Lambda it writes CloudWatch's embedded
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

use crate::error::ErrorClass;

const STARTS: &str = "StartsEnded";
const START: &str = "StartDuration";
const JOBS: &str = "JobsPerStart";
const ERRORS: &str = "StartErrors";
const STEP: &str = "StartStepDuration";
const UNFINISHED: &str = "UnfinishedStarts";
const WITHOUT_MEMBERS: &str = "SandboxesWithoutMembers";
const EXPORT: &str = "ExportSize";
const BATCH: &str = "WebhookBatchSize";
const READ: &str = "ReadUnits";
const WRITE: &str = "WriteUnits";

const OUTCOME: &str = "Outcome";
const CLASS: &str = "Class";
const STEP_NAME: &str = "Step";
const AGE: &str = "Age";

/// A metric. On Lambda each one has the dimension `Function` as well.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    pub name: &'static str,
    /// The dimension by which it is distinguished.
    pub dimension: Option<&'static str>,
    is_counter: bool,
    unit: Unit,
    description: &'static str,
}

const fn counted(name: &'static str, dimension: &'static str, description: &'static str) -> Metric {
    Metric { name, dimension: Some(dimension), is_counter: true, unit: Unit::Count, description }
}

const fn recorded(
    name: &'static str,
    dimension: Option<&'static str>,
    unit: Unit,
    description: &'static str,
) -> Metric {
    Metric { name, dimension, is_counter: false, unit, description }
}

/// All metrics.
///
/// Gauges are histograms with one value per sweep: the collector on Lambda repeats the last value of a gauge after each invocation, for as long
/// as the process lives, although other processes run the later sweeps.
pub const METRICS: [Metric; 11] = [
    counted(STARTS, OUTCOME, "starts that ended"),
    counted(ERRORS, CLASS, "starts that ended in ERROR, by the class of the cause"),
    recorded(START, Some(OUTCOME), Unit::Milliseconds, "how long a start took, from the request to its final state"),
    recorded(JOBS, None, Unit::Count, "the jobs that worked on a start until it ended"),
    recorded(STEP, Some(STEP_NAME), Unit::Milliseconds, "how long a step of a start took"),
    recorded(UNFINISHED, Some(AGE), Unit::Count, "unfinished starts, in each sweep"),
    recorded(
        WITHOUT_MEMBERS,
        None,
        Unit::Count,
        "sandboxes without members that still have to be deleted, in each sweep",
    ),
    recorded(EXPORT, None, Unit::Bytes, "zips that were made"),
    recorded(BATCH, None, Unit::Count, "events that agent servers report at once"),
    recorded(READ, None, Unit::Count, "what a read of DynamoDB consumed"),
    recorded(WRITE, None, Unit::Count, "what a write to DynamoDB consumed"),
];

/// Registers the units and descriptions of the metrics with the recorder.
pub fn describe() {
    for Metric { name, is_counter, unit, description, .. } in METRICS {
        match is_counter {
            true => describe_counter!(name, unit, description),
            false => describe_histogram!(name, unit, description),
        }
    }
}

/// How a start ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ready,
    Error,
    /// Its user has ended it.
    Cancelled,
}

impl Outcome {
    /// All outcomes.
    pub const ALL: [Self; 3] = [Self::Ready, Self::Error, Self::Cancelled];

    /// The value of the dimension.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "READY",
            Self::Error => "ERROR",
            Self::Cancelled => "CANCELLED",
        }
    }
}

/// The age of an unfinished start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Age {
    UnderOneMinute,
    UnderFiveMinutes,
    UnderFifteenMinutes,
    Older,
}

impl Age {
    /// All ages.
    pub const ALL: [Self; 4] = [Self::UnderOneMinute, Self::UnderFiveMinutes, Self::UnderFifteenMinutes, Self::Older];

    /// The age after a duration.
    #[must_use]
    pub fn of(duration: Duration) -> Self {
        match duration.as_secs() / 60 {
            0 => Self::UnderOneMinute,
            1..5 => Self::UnderFiveMinutes,
            5..15 => Self::UnderFifteenMinutes,
            _ => Self::Older,
        }
    }

    /// The value of the dimension.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::UnderOneMinute => "under 1 minute",
            Self::UnderFiveMinutes => "1 to 5 minutes",
            Self::UnderFifteenMinutes => "5 to 15 minutes",
            Self::Older => "15 minutes and more",
        }
    }
}

/// Records a start that has ended: how, how long after its request, and by how many jobs.
pub(crate) fn start_ended(outcome: Outcome, took: Duration, jobs: u32) {
    counter!(STARTS, OUTCOME => outcome.as_str()).increment(1);
    histogram!(START, OUTCOME => outcome.as_str()).record(milliseconds(took));
    histogram!(JOBS).record(jobs);
}

/// Counts a start that has ended in ERROR.
pub(crate) fn start_failed(class: ErrorClass) {
    counter!(ERRORS, CLASS => class.as_str()).increment(1);
}

/// Records the numbers of unfinished starts, in the order of [`Age::ALL`].
pub(crate) fn unfinished_starts(counts: [u32; Age::ALL.len()]) {
    for (age, count) in Age::ALL.into_iter().zip(counts) {
        histogram!(UNFINISHED, AGE => age.as_str()).record(count);
    }
}

/// Records the number of sandboxes that no start and no conversation uses, and that still have to be deleted.
pub(crate) fn sandboxes_without_members(count: u32) {
    histogram!(WITHOUT_MEMBERS).record(count);
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Records the duration of a step of a start.
pub(crate) fn step_ended(step: &'static str, took: Duration) {
    histogram!(STEP, STEP_NAME => step).record(milliseconds(took));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_begin_at_their_minute() {
        let ages =
            [0, 59, 60, 299, 300, 899, 900, 100_000].map(|seconds| Age::of(Duration::from_secs(seconds)).as_str());
        let [first, second, third, fourth] = Age::ALL.map(Age::as_str);
        assert_eq!(ages, [first, first, second, second, third, third, fourth, fourth]);
    }
}
