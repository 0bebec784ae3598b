//! The whole product in one process: every function's router on one port, on embedded engines, with the queue polled
//! into the worker and agent servers as processes of this machine.

pub mod access;
pub mod agent_server;
pub mod api_keys;
pub mod data_key;
pub mod demo;
pub mod docs;
pub mod edge;
pub mod engines;
pub mod import;
pub mod links;
pub mod options;
pub mod place;
pub mod private_file;
pub mod scripted_llm;
pub mod server;
pub mod web_ui;
pub mod worker;
