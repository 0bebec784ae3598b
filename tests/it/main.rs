//! The workspace's integration tests, in one binary, because each binary links the AWS SDKs and the engines.

#![allow(
    clippy::expect_used,
    clippy::unwrap_used,
    clippy::needless_pass_by_value,
    clippy::option_option,
    clippy::assigning_clones,
    clippy::cast_precision_loss,
    clippy::disallowed_methods,
    reason = "a test fails by panicking"
)]

mod admission;
mod agent_profiles;
mod agent_restarts;
mod agent_server_errors;
mod alarms;
mod authorizer;
mod backfill;
mod boots;
mod clone;
mod cloud_faults;
mod commands;
mod data_folders;
mod deletion;
mod download;
mod end_to_end;
mod end_to_end_agent_profiles;
mod end_to_end_clone;
mod end_to_end_commands;
mod end_to_end_connections;
mod end_to_end_git;
mod end_to_end_history;
mod end_to_end_mcp;
mod end_to_end_profiles;
mod end_to_end_secrets;
mod end_to_end_upgrade;
mod end_to_end_workspace;
mod events;
mod fork;
mod git_providers;
mod hostile;
mod import;
mod ingest;
mod lambda;
mod limits;
mod local_access;
mod lost_responses;
mod mcp_probe;
mod microvms;
mod observability;
mod openapi;
mod orphans;
mod pending_messages;
mod profiles;
mod provider_faults;
mod providers;
mod records;
mod replay;
mod replay_later;
mod saga;
mod sandboxes;
mod security;
mod settings;
mod support;
mod support_tests;
mod switch;
mod template;
mod tenants;
mod webhooks;
mod workspace;
