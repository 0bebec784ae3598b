//! Background jobs: the queue that drives workers, and one file per job.

pub mod queue;
pub mod sweep;
