//! Exports: a conversation's record and events as a zip file in the bucket.
//!
//! The object's key is derived from its contents: the record as the API shows it and the version of the event log. The object is
//! reused while both are unchanged. The zip is written as a stream into a multipart upload, in bounded memory: a page of events is
//! read, compressed and uploaded before the one after the next is read. The object exists once the upload is complete, never
//! before. A request builds the export itself if that is quick; otherwise it enqueues a job, and the function `exports` builds it
//! from the start.

pub mod archive;
mod backfill;
mod builder;
mod exporter;
mod job;
pub mod python_json;
pub mod store;

pub use backfill::WARNING;
pub use exporter::{Answer, Exporter, OLDER_EXPORT, Ready};
pub use job::ExportJobs;
