//! The event log: what agents did, kept as they told it.

pub mod store;
