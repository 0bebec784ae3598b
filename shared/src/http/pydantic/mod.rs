//! Validation that behaves like pydantic's: the same requests are accepted, and errors have the same `type`, `loc`, `msg` and `ctx`, because
//! clients of the reference read them.

pub mod body;
pub mod query;
pub mod validation;
