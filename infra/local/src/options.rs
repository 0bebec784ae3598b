//! The command line of `cargo local`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use shared::agent_server::version::AgentServerVersion;
use shared::sandbox::spec::AGENT_SERVER_VERSION;

/// The oldest supported version of the agent server.
const OLDEST_AGENT_SERVER: AgentServerVersion = AgentServerVersion::new(1, 15, 0);

/// Runs the OpenHands app server's conversation API on this machine.
#[derive(Clone, Debug, Parser)]
#[command(name = "cargo local", version)]
pub struct Options {
    /// Without a command, the server runs.
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub common: CommonOptions,
}

/// Commands other than running the server.
#[derive(Clone, Debug, Subcommand)]
pub enum Command {
    /// Runs the embedded engines, the queue poller and the sandboxes without the API, and prints the environment variables for
    /// functions under `cargo lambda watch`.
    Engines {
        /// The address of `cargo lambda watch`: its worker then handles the messages of the queue, instead of a worker in
        /// this process.
        #[arg(long, value_name = "URL")]
        invoke_url: Option<String>,
        /// Write the environment variables to this file, for `cargo lambda watch --env-file`, instead of to standard output.
        #[arg(long, value_name = "FILE")]
        env_file: Option<PathBuf>,
    },
    /// Imports conversations, start tasks and events from files of JSON lines.
    ///
    /// Each line is an object: {"type": "conversation", "data": {…}}, {"type": "start_task", "data": {…}} or
    /// {"type": "event", "conversation_id": "…", "data": {…}}, with the data as the API returns it. Existing rows are not
    /// changed, so the same command can be repeated, for example after it was stopped. The server must not run on the data
    /// folder at the same time. The exit status is 0 if every row was imported or already present, otherwise 1.
    Import {
        /// Files to read; - means standard input.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        #[command(flatten)]
        into: TargetOptions,
    },
    /// Imports conversations, start tasks and events from the data folder of an OpenHands app server.
    ///
    /// Reads openhands.db, which may be in use, and the event files of its conversations, and writes nothing to that folder.
    /// Conversations of version V0 are skipped. Existing rows are not changed, so the same command can be repeated, for example
    /// after it was stopped. The server of this project must not run on its own data folder at the same time. The exit status is
    /// 0 if every row was imported or already present, otherwise 1.
    ImportOpenhands {
        /// The app server's data folder, by default ~/.openhands in its installation.
        #[arg(value_name = "FOLDER")]
        folder: PathBuf,
        #[command(flatten)]
        into: TargetOptions,
    },
    /// Writes the web UI that --ui serves to a folder, for hosting it elsewhere.
    ///
    /// npm downloads it once from the npm registry into the data folder. The host has to return index.html for every path that is
    /// not a file.
    WebUi {
        /// The folder to write to.
        #[arg(value_name = "FOLDER")]
        folder: PathBuf,
        /// The address of the API, for example https://example.org/v1; by default the address of the page.
        #[arg(long, value_name = "URL")]
        api: Option<String>,
    },
    /// Creates, lists and revokes API keys, with which programs authenticate as a user.
    ///
    /// Deployed functions accept them as `Authorization: Bearer KEY`, `X-Access-Token: KEY` or `X-Session-API-Key: KEY`. A server
    /// on this machine has a single user and accepts no API keys.
    ApiKey {
        #[command(subcommand)]
        command: ApiKeyCommand,
    },
    /// Computes a user's counters again from the rows: conversations, starts, unfinished starts.
    ///
    /// Counters change together with the rows that they count. They differ only after rows were changed by other means, for
    /// example in the AWS console. The command is safe while nothing else changes the user's rows: stop the server, or, with
    /// --stack, keep the user from using the API. Repeat it if it was interrupted.
    Recount {
        #[command(flatten)]
        target: TargetOptions,
    },
    /// Replaces the key under which secrets are sealed.
    DataKey {
        #[command(subcommand)]
        command: DataKeyCommand,
    },
}

/// Commands for data keys.
#[derive(Clone, Debug, Subcommand)]
pub enum DataKeyCommand {
    /// Adds a key under which new secrets are sealed. Older keys are kept to open the secrets that they sealed.
    Rotate {
        /// --user has no effect here.
        #[command(flatten)]
        target: TargetOptions,
    },
}

/// Commands for API keys.
#[derive(Clone, Debug, Subcommand)]
pub enum ApiKeyCommand {
    /// Creates a key and prints it. The key cannot be shown again later.
    Create {
        /// A name for the key.
        #[arg(value_name = "NAME")]
        name: String,
        #[command(flatten)]
        target: TargetOptions,
    },
    /// Lists a user's keys: id, time of creation, first characters, name.
    List {
        #[command(flatten)]
        target: TargetOptions,
    },
    /// Revokes a key immediately.
    Revoke {
        /// The id of the key, as `list` shows it.
        #[arg(value_name = "ID")]
        id: uuid::Uuid,
        #[command(flatten)]
        target: TargetOptions,
    },
}

/// The target of a command and the owner of its rows.
#[derive(Args, Clone, Debug, Default)]
pub struct TargetOptions {
    /// Owner of the rows, or of rows without one. Default: the local user; required with --stack.
    #[arg(long, value_name = "ID")]
    pub user: Option<String>,
    /// Use the tables NAME-conversations, NAME-start-tasks, NAME-events and NAME-users and the bucket NAME-data on AWS
    /// instead of the data folder.
    #[arg(long, value_name = "NAME")]
    pub stack: Option<String>,
    /// Profile of the AWS configuration, for --stack.
    #[arg(long, value_name = "PROFILE", requires = "stack")]
    pub profile: Option<String>,
    /// AWS region, for --stack.
    #[arg(long, value_name = "REGION", requires = "stack")]
    pub region: Option<String>,
}

/// Global options; may precede or follow the command.
#[derive(Args, Clone, Debug)]
pub struct CommonOptions {
    /// Folder for all data: records, objects, keys, sandboxes, the agent server.
    #[arg(long, global = true, default_value = ".local", value_name = "FOLDER")]
    pub data: PathBuf,
    /// Port of the API on 127.0.0.1; 0 selects a free port.
    #[arg(long, global = true, default_value_t = 3000)]
    pub port: u16,
    /// Kind of sandboxes.
    #[arg(long, global = true, value_enum, default_value_t = SandboxKind::Process)]
    pub sandbox: SandboxKind,
    /// Python 3.12 or newer for the agent server. By default one is searched for.
    #[arg(long, global = true, value_name = "PATH")]
    pub python: Option<PathBuf>,
    /// Version of the agent server in sandboxes: 1.15.0 or newer. 1.58.2, 1.49.1 and 1.15.0 are tested, and installed with
    /// pinned dependencies. It is also the tag of the container image.
    #[arg(
        long,
        global = true,
        env = "OPENHANDS_AGENT_SERVER_VERSION",
        value_name = "VERSION",
        default_value = AGENT_SERVER_VERSION,
        value_parser = agent_server_version,
    )]
    pub agent_server_version: String,
    /// Folder in which the agent server is installed; by default in the data folder. Several data folders can share it.
    #[arg(long, global = true, env = "OPENHANDS_AGENT_SERVER_FOLDER", value_name = "FOLDER")]
    pub agent_server: Option<PathBuf>,
    /// JSON file with the user's settings, in the format of the API's settings.
    #[arg(long, global = true, value_name = "FILE")]
    pub settings: Option<PathBuf>,
    /// Log format.
    #[arg(long, global = true, value_enum, default_value_t = LogKind::Text)]
    pub log: LogKind,
    /// Also serve a web UI on the same port. npm downloads it once from the npm registry into the data folder.
    #[arg(long)]
    pub ui: bool,
    /// Run a demo without an API key: a script answers in place of a language model. Its records are separate from those of real
    /// conversations, in the folder `demo` of the data folder.
    #[arg(long)]
    pub demo: bool,
}

impl CommonOptions {
    /// Default options, with this data folder, this kind of sandboxes and any free port.
    #[must_use]
    pub fn on(data: PathBuf, sandbox: SandboxKind) -> Self {
        Self {
            data,
            port: 0,
            sandbox,
            python: None,
            agent_server_version: AGENT_SERVER_VERSION.to_owned(),
            agent_server: None,
            settings: None,
            log: LogKind::Text,
            ui: false,
            demo: false,
        }
    }
}

/// Kinds of sandboxes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SandboxKind {
    /// Each sandbox is an agent-server process on this machine.
    Process,
    /// Each sandbox is a container of the Docker engine on this machine or at `DOCKER_HOST`.
    Docker,
    /// A remote runtime API creates sandboxes; `SANDBOX_REMOTE_RUNTIME_API_URL` and `SANDBOX_API_KEY` configure it.
    Remote,
    /// No sandboxes: the server only stores records.
    None,
}

/// Log formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogKind {
    /// Lines to read in a terminal.
    Text,
    /// One JSON object per line.
    Json,
}

/// Parses a version of the agent server. Accepts only a release's three numbers, because the text becomes part of the names of a
/// package, a folder and an image.
fn agent_server_version(text: &str) -> Result<String, String> {
    let version: Option<AgentServerVersion> =
        text.parse().ok().filter(|version: &_| ToString::to_string(version) == text);
    match version {
        Some(version) if version < OLDEST_AGENT_SERVER => {
            Err(format!("the oldest supported version is {OLDEST_AGENT_SERVER}"))
        }
        Some(_) => Ok(text.to_owned()),
        None => Err(format!("use the three numbers of a release, for example {AGENT_SERVER_VERSION}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_three_numbers_and_not_too_old() {
        for version in ["1.15.0", AGENT_SERVER_VERSION, "1.100.0", "2.0.0"] {
            assert_eq!(agent_server_version(version).as_deref(), Ok(version));
        }
        for other in [
            "1.14.9",
            "0.99.0",
            "1.58",
            "1.58.2rc1",
            "1.+58.2",
            "",
            "latest",
            "1.58.2/..",
            "1..2",
            "v1.58.2",
            "1.058.2",
        ] {
            assert!(agent_server_version(other).is_err(), "{other}");
        }
    }
}
