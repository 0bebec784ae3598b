//! What an operator sees of starts: the trace in the log, and the metrics. (`lambda.rs` has the same with the functions' programs.)

use std::time::Duration;

use serde_json::{Value, json};
use shared::Time;
use shared::config::StartConfig;
use shared::metrics::Age;
use shared::sandbox::SandboxStatus;
use shared::start::task::StartStatus;
use shared::trace;
use tracing::Instrument as _;

use crate::alarms::Log;
use crate::support::recorder::Recorder;
use crate::support::stand_in_agent::{Fault, Kind, Nth};
use crate::support::worker_harness::{WorkerHarness, quick};

fn message() -> Value {
    json!({"initial_message": {"content": [{"type": "text", "text": "Hello"}]}})
}

/// One start of several jobs, from the request to READY.
#[tokio::test]
async fn a_start_of_several_jobs_has_one_trace_and_is_measured_once() {
    let (log, _logging) = Log::of("shared=info,worker=info");
    let recorder = Recorder::default();
    let _measuring = recorder.begin();
    let config = StartConfig { inline_wait: Duration::ZERO, boot_inline_wait: Duration::ZERO, ..quick() };
    let harness = WorkerHarness::start(config).await;
    let task = harness.begin(&message()).instrument(trace::invocation()).await;
    let ended = harness.drive(task.id).await;
    assert_eq!(ended.now.status, StartStatus::Ready, "{:?}", ended.now.detail);

    let lines = log.take();
    let expected = json!({
        "trace": task.trace().to_string(), "task": task.id.to_string(), "conversation": task.conversation_id.to_string(),
    });
    let about = lines.iter().filter(|line| line.to_string().contains(&task.id.to_string()));
    let about: Vec<&Value> = about.collect();
    for line in &about {
        for name in ["trace", "task", "conversation"] {
            // The sweep reads only the lease row, which does not name the conversation.
            let is_unknown = name == "conversation" && line["message"] == "start.requeued";
            assert!(is_unknown || line["span"][name] == expected[name], "{line}");
        }
    }
    let count = |message: &str| about.iter().filter(|line| line["message"] == message).count();
    assert_eq!([count("start.created"), count("start.advanced"), count("start.ready")], [1, 6, 1], "{about:?}");
    let ready = about.iter().find(|line| line["message"] == "start.ready").expect("a line");
    assert_eq!(ready["span"]["sandbox"], json!(ended.now.sandbox_id), "{ready}");

    let jobs = about.iter().filter(|line| line["message"] == "worker.attempt_finished" && line["attempt"] != "Busy");
    let jobs = jobs.count();
    assert!(jobs > 1, "{about:?}");
    assert_eq!(recorder.take("JobsPerStart"), [(String::new(), jobs as f64)]);
    assert_eq!(recorder.take("StartsEnded"), [("READY".to_owned(), 1.0)]);
    assert_eq!(recorder.take("StartErrors"), []);
    let took = ended.now.updated_at.since(ended.created_at).as_secs_f64() * 1000.0;
    let durations = recorder.take("StartDuration");
    assert_eq!((durations.len(), durations[0].0.as_str()), (1, "READY"));
    assert!((durations[0].1 - took).abs() < 1.0, "{durations:?} {took}");
    harness.finish().await;
}

#[tokio::test]
async fn failed_starts_are_counted_by_the_class_of_the_cause() {
    let recorder = Recorder::default();
    let _measuring = recorder.begin();
    let harness = WorkerHarness::start(quick()).await;
    let measured = |outcome: &str| {
        let ended = recorder.take("StartsEnded");
        assert_eq!((ended.len(), ended[0].0.as_str()), (1, outcome));
        let durations = recorder.take("StartDuration");
        assert_eq!((durations.len(), durations[0].0.as_str()), (1, outcome));
        assert_eq!(recorder.take("JobsPerStart").len(), 1);
        recorder.take("StartErrors")
    };
    let one = |class: &str| vec![(class.to_owned(), 1.0)];

    *harness.sandboxes.begins_as.lock().expect("unpoisoned") = SandboxStatus::Error;
    let task = harness.begin(&message()).await;
    harness.drive(task.id).await;
    assert_eq!(measured("ERROR"), one("sandbox"));
    *harness.sandboxes.begins_as.lock().expect("unpoisoned") = SandboxStatus::Running;

    let task = harness.begin(&message()).await;
    harness.context.saga.give_up(&harness.user, task.id).await.expect("given up");
    assert_eq!(measured("ERROR"), one("ours"));

    let task = harness.begin(&message()).await;
    harness.cancel(task.id).await.expect("cancelled");
    assert_eq!(measured("CANCELLED"), []);

    // A second end is none.
    harness.context.saga.give_up(&harness.user, task.id).await.expect("ended before");
    assert_eq!(recorder.take("StartsEnded"), []);
    harness.settle_sandboxes().await;
    harness.finish().await;
}

#[tokio::test]
async fn sweep_records_unfinished_starts_by_age_and_sandboxes_to_be_deleted() {
    let recorder = Recorder::default();
    let _measuring = recorder.begin();
    let harness = WorkerHarness::start(quick()).await;
    let by_age = |counts: [f64; 4]| -> Vec<(String, f64)> {
        Age::ALL.iter().map(|age| age.as_str().to_owned()).zip(counts).collect()
    };
    harness.sweep().await;
    assert_eq!(recorder.take("UnfinishedStarts"), by_age([0.0; 4]));
    assert_eq!(recorder.take("SandboxesWithoutMembers"), [(String::new(), 0.0)]);

    // A failed start is not unfinished. Its sandbox is not deleted at once.
    let refused = Kind::Status(422, r#"{"detail":"no"}"#.into());
    harness.agent.inject(Fault::new("POST /api/conversations", Nth::Always, refused));
    harness.sandboxes.fail_deletions(1);
    let failed = harness.begin(&message()).await;
    assert_eq!(harness.drive(failed.id).await.now.status, StartStatus::Error);
    harness.settle().await;
    recorder.take("UnfinishedStarts");
    recorder.take("SandboxesWithoutMembers");
    harness.sweep().await;
    assert_eq!(recorder.take("UnfinishedStarts"), by_age([0.0; 4]));
    assert_eq!(recorder.take("SandboxesWithoutMembers"), [(String::new(), 1.0)]);
    harness.settle_sandboxes().await;
    recorder.take("SandboxesWithoutMembers");
    harness.sweep().await;
    assert_eq!(recorder.take("SandboxesWithoutMembers"), [(String::new(), 0.0)]);

    let mut starts = Vec::new();
    for minutes in [Some(0), Some(2), Some(2), Some(7), Some(100), None] {
        let task = harness.begin(&message()).await;
        let created_at = minutes.map(|minutes| Time::now().minus(Duration::from_secs(60 * minutes)));
        harness.set_creation_of(task.id, created_at).await;
        starts.push(task.id);
    }
    recorder.take("UnfinishedStarts");
    harness.sweep().await;
    // One of an earlier version counts as old.
    assert_eq!(recorder.take("UnfinishedStarts"), by_age([1.0, 2.0, 1.0, 2.0]));
    for task in starts {
        harness.drive(task).await;
    }
    harness.settle_sandboxes().await;
    harness.finish().await;
}
