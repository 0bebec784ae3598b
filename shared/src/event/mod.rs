//! The event log: what agents did, kept as they told it; and what follows from it.

mod batch;
pub mod effects;
pub mod processors;
pub mod store;
