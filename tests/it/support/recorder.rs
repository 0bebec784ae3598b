//! Records the metrics of this thread.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use metrics::{
    Counter, CounterFn, Gauge, Histogram, HistogramFn, Key, KeyName, LocalRecorderGuard, Metadata, SharedString, Unit,
};

/// A value of a metric, with its dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub dimensions: BTreeMap<String, String>,
    pub value: f64,
}

/// All values so far.
#[derive(Clone, Debug, Default)]
pub struct Recorder(Arc<Mutex<Vec<Sample>>>);

struct Handle {
    recorder: Recorder,
    key: Key,
}

impl Recorder {
    /// Records the metrics of this thread while the guard lives.
    pub fn begin(&self) -> LocalRecorderGuard<'_> {
        metrics::set_default_local_recorder(self)
    }

    /// The values of a metric since the last call, by the value of its dimension, in the order in which they were recorded.
    pub fn take(&self, name: &str) -> Vec<(String, f64)> {
        let mut samples = self.0.lock().expect("unpoisoned");
        let (taken, left) = samples.drain(..).partition(|sample| sample.name == name);
        *samples = left;
        let dimension = |sample: &Sample| sample.dimensions.values().next().cloned().unwrap_or_default();
        taken.into_iter().map(|sample: Sample| (dimension(&sample), sample.value)).collect()
    }

    fn handle(&self, key: &Key) -> Arc<Handle> {
        Arc::new(Handle { recorder: self.clone(), key: key.clone() })
    }
}

impl Handle {
    fn add(&self, value: f64) {
        let dimensions = self.key.labels().map(|label| (label.key().to_owned(), label.value().to_owned())).collect();
        let sample = Sample { name: self.key.name().to_owned(), dimensions, value };
        self.recorder.0.lock().expect("unpoisoned").push(sample);
    }
}

impl HistogramFn for Handle {
    fn record(&self, value: f64) {
        self.add(value);
    }
}

impl CounterFn for Handle {
    fn increment(&self, value: u64) {
        self.add(value as f64);
    }

    fn absolute(&self, value: u64) {
        self.add(value as f64);
    }
}

impl metrics::Recorder for Recorder {
    fn describe_counter(&self, _key: KeyName, _unit: Option<Unit>, _description: SharedString) {}

    fn describe_gauge(&self, _key: KeyName, _unit: Option<Unit>, _description: SharedString) {}

    fn describe_histogram(&self, _key: KeyName, _unit: Option<Unit>, _description: SharedString) {}

    fn register_counter(&self, key: &Key, _metadata: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.handle(key))
    }

    fn register_gauge(&self, _key: &Key, _metadata: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Key, _metadata: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.handle(key))
    }
}
