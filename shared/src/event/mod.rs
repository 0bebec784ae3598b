//! The event log of conversations, webhook ingestion, and follow-up jobs.

mod batch;
pub mod follow_up;
pub mod ingest;
pub mod store;
