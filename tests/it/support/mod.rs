//! Test fixtures: stub servers (language model, git host, agent server, KMS, Docker, …), proxies that inject faults or
//! evaluate IAM policies, and the product itself. Each server listens on a port of its own, which closes when its value
//! is dropped.

// Each test uses only some of them.
#![allow(dead_code)]

pub mod account;
pub mod api;
pub mod conflict_proxy;
pub mod docker_engine;
pub mod edge;
pub mod engines;
pub mod fault_proxy;
pub mod git_server;
pub mod hostile_aws;
pub mod iam_proxy;
pub mod key_value_store;
pub mod kms;
pub mod lagging_indexes;
pub mod lambda;
pub mod log;
pub mod mcp_server;
pub mod meter;
pub mod microvm_api;
pub mod microvm_cloud;
pub mod product;
pub mod public_address;
pub mod raw_http;
pub mod recorder;
pub mod recurring_faults;
pub mod runtime_api;
pub mod scripted_llm;
pub mod seed;
pub mod server;
pub mod sigv4;
pub mod stand_in_agent;
pub mod wait;
pub mod websocket;
pub mod worker_harness;
