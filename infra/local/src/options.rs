//! The command line of `cargo local`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use shared::agent_server::version::AgentServerVersion;
use shared::sandbox::spec::AGENT_SERVER_VERSION;

/// The oldest version of the agent server that is supported.
const OLDEST_AGENT_SERVER: AgentServerVersion = AgentServerVersion::new(1, 15, 0);

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
        /// Where `cargo lambda watch` listens: the queue is polled into its worker instead of one in this process.
        #[arg(long, value_name = "URL")]
        invoke_url: Option<String>,
        /// A file to write the environment to, for `cargo lambda watch --env-file`, instead of standard output.
        #[arg(long, value_name = "FILE")]
        env_file: Option<PathBuf>,
    },
    /// Takes conversations, start tasks and events from files of JSON lines.
    ///
    /// A line is an object: {"type": "conversation", "data": {…}}, {"type": "start_task", "data": {…}} or
    /// {"type": "event", "conversation_id": "…", "data": {…}}, the data as the API shows it. Rows that are there already
    /// are left as they are, so the same command can be run again, also after it was stopped. The server must not run on the
    /// data folder meanwhile. Ends with 0 when every row was taken or there already, else with 1.
    Import {
        /// Files to read; - is standard input.
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Where to.
        #[command(flatten)]
        into: PlaceOptions,
    },
    /// Takes conversations, start tasks and events from the data folder of an OpenHands app server.
    ///
    /// Reads openhands.db, which may be in use, and the event files of its conversations; writes nothing there.
    /// Conversations of version V0 are not taken. Rows that are there already are left as they are, so the same command can be
    /// run again, also after it was stopped. The server of this project must not run on its data folder meanwhile. Ends with 0
    /// when every row was taken or there already, else with 1.
    ImportOpenhands {
        /// The folder, ~/.openhands by default there.
        #[arg(value_name = "FOLDER")]
        folder: PathBuf,
        /// Where to.
        #[command(flatten)]
        into: PlaceOptions,
    },
    /// Writes the web UI that --ui serves to a folder, to be hosted elsewhere.
    ///
    /// It is fetched once from the npm registry, with npm, into the data folder. Every path that is no file has to be answered with
    /// index.html.
    WebUi {
        /// Where to write it.
        #[arg(value_name = "FOLDER")]
        folder: PathBuf,
        /// The address of the API, as in https://example.org/v1; by default that of the page.
        #[arg(long, value_name = "URL")]
        api: Option<String>,
    },
    /// Makes, lists and revokes API keys, with which programs say whose they are.
    ///
    /// Deployed functions take them as `Authorization: Bearer KEY`, `X-Access-Token: KEY` or `X-Session-API-Key: KEY`. A server on
    /// this machine serves a single user and takes none.
    ApiKey {
        /// What to do.
        #[command(subcommand)]
        command: ApiKeyCommand,
    },
    /// Replaces the key under which secrets are sealed.
    DataKey {
        /// What to do.
        #[command(subcommand)]
        command: DataKeyCommand,
    },
}

/// What to do with data keys.
#[derive(Clone, Debug, Subcommand)]
pub enum DataKeyCommand {
    /// Adds a key, under which new secrets are sealed. Those before it are kept: they open what they sealed.
    Rotate {
        /// Where; --user has no meaning here.
        #[command(flatten)]
        place: PlaceOptions,
    },
}

/// What to do with API keys.
#[derive(Clone, Debug, Subcommand)]
pub enum ApiKeyCommand {
    /// Makes a key and prints it: it is shown this once.
    Create {
        /// What to call it.
        #[arg(value_name = "NAME")]
        name: String,
        /// Whose, and where.
        #[command(flatten)]
        place: PlaceOptions,
    },
    /// Lists a user's keys: id, when each was made, how it begins, name.
    List {
        /// Whose, and where.
        #[command(flatten)]
        place: PlaceOptions,
    },
    /// Makes a key worthless, at once.
    Revoke {
        /// The id that `list` shows.
        #[arg(value_name = "ID")]
        id: uuid::Uuid,
        /// Whose, and where.
        #[command(flatten)]
        place: PlaceOptions,
    },
}

/// Whose rows, and where they are.
#[derive(Args, Clone, Debug, Default)]
pub struct PlaceOptions {
    /// Whose the rows are, or those that name no owner. By default the local user's; needed with --stack.
    #[arg(long, value_name = "ID")]
    pub user: Option<String>,
    /// Use the tables NAME-conversations, NAME-start-tasks, NAME-events and NAME-users and the bucket NAME-data on AWS
    /// instead of the data folder.
    #[arg(long, value_name = "NAME")]
    pub stack: Option<String>,
    /// The profile of the AWS configuration to use with --stack.
    #[arg(long, value_name = "PROFILE", requires = "stack")]
    pub profile: Option<String>,
    /// The AWS region to use with --stack.
    #[arg(long, value_name = "REGION", requires = "stack")]
    pub region: Option<String>,
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
    /// The version of the agent server that sandboxes run: 1.15.0 or newer. 1.58.2, 1.49.1 and 1.15.0 are tested, and installed
    /// with pinned dependencies. It is also the tag of the image that containers are made from.
    #[arg(
        long,
        global = true,
        env = "OPENHANDS_AGENT_SERVER_VERSION",
        value_name = "VERSION",
        default_value = AGENT_SERVER_VERSION,
        value_parser = agent_server_version,
    )]
    pub agent_server_version: String,
    /// Where the agent server is installed; by default in the data folder. Several data folders can share one.
    #[arg(long, global = true, env = "OPENHANDS_AGENT_SERVER_FOLDER", value_name = "FOLDER")]
    pub agent_server: Option<PathBuf>,
    /// A JSON file with the user's settings, in the shape of the API's settings.
    #[arg(long, global = true, value_name = "FILE")]
    pub settings: Option<PathBuf>,
    /// How the log is written.
    #[arg(long, global = true, value_enum, default_value_t = LogKind::Text)]
    pub log: LogKind,
    /// Serve a web UI, too, on the same port. It is fetched once from the npm registry, with npm, into the data folder.
    #[arg(long)]
    pub ui: bool,
    /// Let a script answer in place of a language model: everything can be tried, without a key. Records are kept apart from
    /// those of real conversations, in the folder `demo` of the data folder.
    #[arg(long)]
    pub demo: bool,
}

impl CommonOptions {
    /// Those of a server on any free port, with nothing but what it must have.
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

/// How sandboxes are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SandboxKind {
    /// One agent-server process each.
    Process,
    /// One container each, of the Docker engine on this machine or at `DOCKER_HOST`.
    Docker,
    /// By a runtime API, which the environment names (`SANDBOX_REMOTE_RUNTIME_API_URL`, `SANDBOX_API_KEY`).
    Remote,
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

/// Reads a version of the agent server: a release's three numbers and nothing else, since they name a package, a folder and an image.
fn agent_server_version(text: &str) -> Result<String, String> {
    let version: Option<AgentServerVersion> =
        text.parse().ok().filter(|version: &_| ToString::to_string(version) == text);
    match version {
        Some(version) if version < OLDEST_AGENT_SERVER => {
            Err(format!("{OLDEST_AGENT_SERVER} is the oldest version that is supported"))
        }
        Some(_) => Ok(text.to_owned()),
        None => Err(format!("a version looks like {AGENT_SERVER_VERSION}")),
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
