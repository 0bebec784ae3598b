//! Exports: a conversation's record and events as a zip in the bucket.
//!
//! An export is an object whose key is made of what is in it: the record as it shows and the version of the event log. While
//! both stay, it is used again. It is written in bounded memory, whatever the length of the log: a page of events is read,
//! zipped, and given away in parts of a multipart upload, and the object is there when the upload is complete, not before.
//! A request works on it itself for a while and then leaves it to the worker, which goes on behind the last part.

mod catch_up;
mod exporter;
mod making;
pub mod python_json;
pub mod store;
pub mod zip;

pub use catch_up::WARNING;
pub use exporter::{Answer, Exporter, Ready};
