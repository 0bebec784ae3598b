//! Domain logic of the conversation control plane: records, rules, and the AWS clients that they use.
//!
//! The functions (`functions/*`) and `cargo local` (`infra/local`) use this crate, which does not depend on Lambda events. Each folder is
//! one subject: `conversation`, `start`, `sandbox`, `agent_server`, `event`, `user`, `http`.

#![recursion_limit = "256"]

pub mod agent_server;
pub mod aws;
mod blocking;
pub mod clock;
pub mod config;
pub mod conversation;
pub mod deletion;
pub mod digest;
pub mod dynamo;
pub mod env;
pub mod error;
pub mod event;
pub mod export;
pub mod http;
pub mod http_client;
pub mod id;
pub mod jobs;
pub mod logging;
pub mod mask;
pub mod metrics;
#[cfg(test)]
mod module_graph;
pub mod objects;
pub mod paging;
pub mod pending_message;
pub mod random;
pub mod sandbox;
pub mod shell;
#[cfg(feature = "simulation")]
pub mod simulation;
pub mod start;
pub mod stores;
pub mod trace;
pub mod user;
pub mod violation;

pub use clock::Time;
pub use error::{Error, Result};
