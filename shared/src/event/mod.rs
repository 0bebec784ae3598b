//! The event log of conversations, webhook ingestion, and follow-up jobs.

pub mod backfill;
mod batch;
pub mod follow_up;
pub mod ingest;
pub mod store;
