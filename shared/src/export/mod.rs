//! Exports: a conversation's record and events as a zip file in the bucket.
//!
//! The object's key is derived from its contents: the record as the API returns it and the version of the event log. The object is reused
//! while both are unchanged. The zip is streamed into a multipart upload, in bounded memory: a page of events is read, compressed and
//! uploaded before the page after the next is read. The object exists only after the upload is complete. A short build runs in the request;
//! otherwise the request enqueues a job, and the function `exports` restarts the build.

pub mod archive;
mod builder;
mod exporter;
mod job;
pub mod python_json;
pub mod store;

pub use exporter::{Answer, Exporter, OLDER_EXPORT, Ready, UNREADABLE, WARNING};
pub use job::ExportJobs;
