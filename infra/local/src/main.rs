//! `cargo local`: sets up what is missing and runs the product until Ctrl-C.

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
use local::server::{Environment, Readiness, Server, ServerError};
use local::web_ui::{self, Connection, WebUiError};
use shared::logging::{self, LogFormat};
use tokio::signal::unix::{SignalKind, signal};

/// The stack of a worker thread, in bytes. Without optimization, a request to an embedded engine takes more than 1 MiB: the SDK, the
/// engine and what calls them are one call chain.
const THREAD_STACK: usize = 8 * 1024 * 1024;

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_stack_size(THREAD_STACK).build();
    match runtime {
        Ok(runtime) => runtime.block_on(run_command()),
        Err(error) => {
            eprintln!("No threads can be started: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run_command() -> ExitCode {
    let options = Options::parse();
    if options.command.is_some() && (options.common.ui || options.common.demo) {
        let text = "--ui and --demo are of the server: they go with no command.";
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
                None => eprintln!("There is no such key."),
            }
            done.is_some()
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
    // Where there is a web UI, that shows it.
    if options.demo && !options.ui {
        let (base, readiness) = (format!("http://{}", server.address), server.readiness().clone());
        tokio::spawn(async move {
            until_ready(&readiness).await;
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
        // It holds the engines' keys.
        Some(path) => private_file::write(&path, environment.as_bytes(), 0o600)
            .map_err(|source| ServerError::File { path, source })?,
        None => print!("{environment}"),
    }
    run(server).await
}

async fn write_web_ui(data: &Path, folder: &Path, api: Option<String>) -> Result<(), WebUiError> {
    let connection = Connection { host: api, question: Some("API key:"), has_model: false, reach: web_ui::ANYWHERE };
    let installed = data.join(web_ui::FOLDER);
    let mut site = web_ui::ensure(&installed, &connection).await?;
    if let Err(error) = site.add_editor(&installed).await {
        tracing::warn!("{error} The web UI is written without it: diffs are blank. The next run tries again.");
    }
    site.write(folder)?;
    println!("{} files of the web UI are in {}.", site.files(), folder.display());
    Ok(())
}

/// Until a signal.
async fn run(server: Server) -> Result<(), ServerError> {
    let told = tokio::spawn(tell_when_ready(server.readiness().clone()));
    wait_for_signal().await;
    told.abort();
    eprintln!("Stopping: sandboxes are kept and can be resumed by the next run.");
    server.shutdown().await;
    Ok(())
}

/// For shells and for `cargo lambda watch --env-file`.
fn environment_lines(server: &Server) -> String {
    let line = |(name, value): (String, String)| format!("export {name}='{}'\n", value.replace('\'', r"'\''"));
    server.environment().into_iter().map(line).collect()
}

fn welcome(server: &Server, options: &CommonOptions) -> String {
    let base = format!("http://{}", server.address);
    let demo = match options.demo {
        true => "A demo: a script answers in place of a language model, whatever you ask for.\n\n",
        false => "",
    };
    let ui = match options.ui {
        true => format!("Open {base} in a browser.\n\n"),
        false => String::new(),
    };
    format!(
        "Listening on {base}\n\n{demo}{ui}Start a conversation:\n  curl -X POST {base}/api/v1/app-conversations -H 'content-type: application/json' \\\n    \
         -d '{{\"initial_message\": {{\"content\": [{{\"type\": \"text\", \"text\": \"Say hello\"}}]}}}}'\n\
         Watch it become READY (with the id of the answer):\n  curl '{base}/api/v1/app-conversations/start-tasks?ids=ID'\n"
    )
}

async fn until_ready(readiness: &Readiness) {
    while !readiness.is_ready() {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

async fn tell_when_ready(readiness: Readiness) {
    until_ready(&readiness).await;
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
        // Without a handler for it, Ctrl-C alone ends us cleanly.
        Err(_) => {
            let _interrupted = interrupted.await;
        }
    }
}
