//! The workspace's integration tests: one binary, because each linked one carries the SDKs and the engines.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "a test fails by panicking")]

mod end_to_end;
mod support;
mod support_tests;
