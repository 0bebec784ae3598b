//! The program `cargo local`: runs the server until Ctrl-C, or a command.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser as _};
use local::api_keys;
use local::data_key;
use local::demo;
use local::import::command;
use local::options::{Command, CommonOptions, LogKind, Options};
use local::private_file;
use local::recount;
use local::server::{Environment, Readiness, Server, ServerError};
use local::web_ui::{self, Connection, WebUiError};
use shared::logging::{self, LogFormat};
use tokio::signal::unix::{SignalKind, signal};

/// The stack size of a worker thread, in bytes. Without optimization, a request to an embedded engine needs more than 1 MiB, because
/// the SDK, the engine and their callers are one call chain.
const THREAD_STACK_BYTES: usize = 8 * 1024 * 1024;

fn main() -> ExitCode {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().thread_stack_size(THREAD_STACK_BYTES).build();
    match runtime {
        Ok(runtime) => runtime.block_on(run_command()),
        Err(error) => {
            eprintln!("The async runtime could not be started: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run_command() -> ExitCode {
    let options = Options::parse();
    if options.command.is_some() && (options.common.ui || options.common.demo) {
        let text = "--ui and --demo are options of the server and cannot be combined with a command.";
        Options::command().error(ErrorKind::ArgumentConflict, text).exit();
    }
    logging::init(match options.common.log {
        LogKind::Text => LogFormat::Text,
        LogKind::Json => LogFormat::Json,
    });
    let data = &options.common.data;
    let done: Result<bool, Box<dyn std::error::Error>> = match options.command {
        None => serve(&options.common).await.map(|()| true).map_err(Into::into),
        Some(Command::Engines { invoke_url, env_file }) => {
            engines(&options.common, invoke_url, env_file).await.map(|()| true).map_err(Into::into)
        }
        Some(Command::Import { files, into }) => {
            command::import(&files, &into, data, wait_for_signal()).await.map_err(Into::into)
        }
        Some(Command::ImportOpenhands { folder, into }) => {
            command::import_openhands(&folder, &into, data, wait_for_signal()).await.map_err(Into::into)
        }
        Some(Command::WebUi { folder, api }) => {
            write_web_ui(data, &folder, api).await.map(|()| true).map_err(Into::into)
        }
        Some(Command::ApiKey { command }) => api_keys::run(&command, data).await.map_err(Into::into).map(|done| {
            match &done {
                Some(text) => print!("{text}"),
                None => eprintln!("No API key has this id."),
            }
            done.is_some()
        }),
        Some(Command::Recount { target }) => recount::run(&target, data).await.map_err(Into::into).map(|done| {
            print!("{done}");
            true
        }),
        Some(Command::DataKey { command }) => data_key::run(&command, data).await.map_err(Into::into).map(|done| {
            print!("{done}");
            true
        }),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(options: &CommonOptions) -> Result<(), ServerError> {
    let environment = Environment::read()?;
    let key = environment.session_api_key.clone();
    let server = Server::start(options, environment, true, None).await?;
    println!("{}", welcome(&server, options));
    // With --ui the demo is shown in the web UI instead.
    if options.demo && !options.ui {
        let (base, readiness) = (format!("http://{}", server.address), server.readiness().clone());
        tokio::spawn(async move {
            wait_until_ready(&readiness).await;
            if let Err(error) = demo::show(&base, key.as_ref()).await {
                eprintln!("{error}");
            }
        });
    }
    run(server).await
}

async fn engines(
    options: &CommonOptions,
    invoke_url: Option<String>,
    env_file: Option<PathBuf>,
) -> Result<(), ServerError> {
    let server = Server::start(options, Environment::read()?, false, invoke_url).await?;
    let environment = environment_lines(&server);
    match env_file {
        // The file contains the engines' keys.
        Some(path) => private_file::write(&path, environment.as_bytes(), 0o600)
            .map_err(|source| ServerError::File { path, source })?,
        None => print!("{environment}"),
    }
    run(server).await
}

async fn write_web_ui(data: &Path, folder: &Path, api: Option<String>) -> Result<(), WebUiError> {
    let connection =
        Connection { host: api, key_prompt: Some("API key:"), has_model: false, connect_src: web_ui::ANYWHERE };
    let installed = data.join(web_ui::FOLDER);
    let mut site = web_ui::ensure(&installed, &connection).await?;
    if let Err(error) = site.add_editor(&installed).await {
        tracing::warn!(
            "{error} The web UI is written without its editor, so diffs are blank. The next run retries the download."
        );
    }
    site.write(folder)?;
    println!("Wrote {} files of the web UI to {}.", site.file_count(), folder.display());
    Ok(())
}

/// Runs the server until a signal, then shuts it down.
async fn run(server: Server) -> Result<(), ServerError> {
    let announcement = tokio::spawn(announce_when_ready(server.readiness().clone()));
    wait_for_signal().await;
    announcement.abort();
    eprintln!("Stopping. Sandboxes are kept, and the next run can resume them.");
    server.shutdown().await;
    Ok(())
}

/// The environment of the functions, in a format that shells and `cargo lambda watch --env-file` read.
fn environment_lines(server: &Server) -> String {
    let line = |(name, value): (String, String)| format!("export {name}='{}'\n", value.replace('\'', r"'\''"));
    server.environment().into_iter().map(line).collect()
}

fn welcome(server: &Server, options: &CommonOptions) -> String {
    let base = format!("http://{}", server.address);
    let demo = match options.demo {
        true => "This is a demo: a script answers every message in place of a language model.\n\n",
        false => "",
    };
    let ui = match options.ui {
        true => format!("Open {base} in a browser.\n\n"),
        false => String::new(),
    };
    format!(
        "Listening on {base}\n\n{demo}{ui}Start a conversation:\n  curl -X POST {base}/api/v1/app-conversations -H 'content-type: application/json' \\\n    \
         -d '{{\"initial_message\": {{\"content\": [{{\"type\": \"text\", \"text\": \"Say hello\"}}]}}}}'\n\
         Follow its status until it is READY (ID is the id in the response):\n  curl '{base}/api/v1/app-conversations/start-tasks?ids=ID'\n"
    )
}

async fn wait_until_ready(readiness: &Readiness) {
    while !readiness.is_ready() {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn announce_when_ready(readiness: Readiness) {
    wait_until_ready(&readiness).await;
    eprintln!("Ready.");
}

async fn wait_for_signal() {
    let interrupted = tokio::signal::ctrl_c();
    match signal(SignalKind::terminate()) {
        Ok(mut terminated) => {
            tokio::select! {
                _ = interrupted => {}
                _ = terminated.recv() => {}
            }
        }
        // Without a handler for SIGTERM, only Ctrl-C shuts down cleanly.
        Err(_) => {
            let _interrupted = interrupted.await;
        }
    }
}
