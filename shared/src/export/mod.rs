//! Exports.
pub mod python_json;
pub mod zip;
