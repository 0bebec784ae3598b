//! Validation that is compatible with pydantic: it accepts the same requests, and its errors have the same `type`, `loc`, `msg` and `ctx`,
//! because clients of the reference read them.

pub mod body;
pub mod query;
pub mod validation;
