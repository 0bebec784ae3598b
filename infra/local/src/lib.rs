//! `cargo local`: the whole product in one process. The routers of all functions share one port, DynamoDB, S3 and SQS are
//! embedded engines, a poller invokes the worker, and agent servers run as processes of this machine.

pub mod access;
pub mod agent_server;
pub mod api_keys;
pub mod data_key;
pub mod demo;
pub mod docs;
pub mod engines;
pub mod gateway;
pub mod import;
pub mod links;
mod migration;
pub mod options;
pub mod private_file;
pub mod recount;
pub mod scripted_llm;
pub mod server;
pub mod target;
pub mod web_ui;
pub mod worker;
