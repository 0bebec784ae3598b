//! The event log: what agents did, kept as they told it; and what follows from it.

mod batch;
pub mod follow_up;
pub mod ingest;
pub mod store;
