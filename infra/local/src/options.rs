//! The command line of `cargo local`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs the OpenHands app server's conversation API on this machine.
#[derive(Clone, Debug, Parser)]
#[command(name = "cargo local", version)]
pub struct Options {
    /// What to do; without a command: run the server.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Options of all commands.
    #[command(flatten)]
    pub common: CommonOptions,
}

/// What to do other than to run the server.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Runs the embedded engines, the queue poller and the sandbox set-up without the routers, and prints the environment
    /// that functions under `cargo lambda watch` need.
    Engines {
        /// Where `cargo lambda watch` listens: the queue is polled into its start-worker instead of one in this process.
        #[arg(long, value_name = "URL")]
        invoke_url: Option<String>,
        /// A file to write the environment to, for `cargo lambda watch --env-file`, instead of standard output.
        #[arg(long, value_name = "FILE")]
        env_file: Option<PathBuf>,
    },
}

/// Options that every command takes, before it or behind it.
#[derive(Args, Clone, Debug)]
pub struct CommonOptions {
    /// The folder that holds everything: records, objects, keys, sandboxes, the agent server.
    #[arg(long, global = true, default_value = ".local", value_name = "FOLDER")]
    pub data: PathBuf,
    /// The port on 127.0.0.1 where the API is served; 0 takes any free one.
    #[arg(long, global = true, default_value_t = 3000)]
    pub port: u16,
    /// How sandboxes are made.
    #[arg(long, global = true, value_enum, default_value_t = SandboxKind::Process)]
    pub sandbox: SandboxKind,
    /// A Python 3.12 or newer for the agent server, instead of one that is looked for.
    #[arg(long, global = true, value_name = "PATH")]
    pub python: Option<PathBuf>,
    /// Where the agent server is installed; by default in the data folder. Several data folders can share one.
    #[arg(long, global = true, env = "OPENHANDS_AGENT_SERVER_FOLDER", value_name = "FOLDER")]
    pub agent_server: Option<PathBuf>,
    /// A JSON file with the user's settings, in the shape of the API's settings.
    #[arg(long, global = true, value_name = "FILE")]
    pub settings: Option<PathBuf>,
    /// How the log is written.
    #[arg(long, global = true, value_enum, default_value_t = LogKind::Text)]
    pub log: LogKind,
}

/// How sandboxes are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SandboxKind {
    /// One agent-server process each.
    Process,
    /// Not at all: the server only keeps records.
    None,
}

/// How the log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogKind {
    /// For people.
    Text,
    /// For machines.
    Json,
}
