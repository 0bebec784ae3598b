//! `cargo local`: sets up what is missing and runs the product until Ctrl-C.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser as _;
use local::options::{Command, LogKind, Options};
use local::server::{Environment, Server, ServerError};
use shared::telemetry::{self, LogFormat};
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main]
async fn main() -> ExitCode {
    let options = Options::parse();
    telemetry::init(match options.common.log {
        LogKind::Text => LogFormat::Text,
        LogKind::Json => LogFormat::Json,
    });
    match run(options).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run(options: Options) -> Result<(), ServerError> {
    let environment = Environment::read()?;
    let server = match options.command {
        None => {
            let server = Server::start(&options.common, environment, true, None).await?;
            println!("{}", welcome(&server));
            server
        }
        Some(Command::Engines { invoke_url, env_file }) => {
            let server = Server::start(&options.common, environment, false, invoke_url).await?;
            let environment = server.environment().into_iter().fold(String::new(), |mut lines, (name, value)| {
                // Writing to a string does not fail.
                let _written = writeln!(lines, "{name}={value}");
                lines
            });
            match env_file {
                Some(path) => {
                    std::fs::write(&path, environment).map_err(|source| ServerError::File { path, source })?
                }
                None => print!("{environment}"),
            }
            server
        }
    };
    let told = tokio::spawn(tell_when_ready(server.readiness().clone()));
    wait_for_signal().await;
    told.abort();
    eprintln!("Stopping: sandboxes are kept and can be resumed by the next run.");
    server.shutdown().await;
    Ok(())
}

fn welcome(server: &Server) -> String {
    let base = format!("http://{}", server.address);
    format!(
        "Listening on {base}\n\nStart a conversation:\n  curl -X POST {base}/api/v1/app-conversations -H 'content-type: application/json' \\\n    \
         -d '{{\"initial_message\": {{\"content\": [{{\"type\": \"text\", \"text\": \"Say hello\"}}]}}}}'\n\
         Watch it become READY (with the id of the answer):\n  curl '{base}/api/v1/app-conversations/start-tasks?ids=ID'\n"
    )
}

async fn tell_when_ready(readiness: local::server::Readiness) {
    while !readiness.is_ready() {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
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
