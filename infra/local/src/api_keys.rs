//! `cargo local api-key`: creates, lists and revokes API keys.

use std::fmt::Write as _;
use std::path::Path;

use secrecy::ExposeSecret as _;
use shared::stores::Stores;

use crate::options::ApiKeyCommand;
use crate::target::{Target, TargetError};

/// Why the command failed. Each message is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum ApiKeyError {
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The store failed, or the request is invalid.
    #[error("{}", .0.context())]
    Domain(#[from] shared::Error),
}

/// Runs the command on the target that it names, or else on the data folder. Returns the text to print, which contains a new
/// key in clear; `None` when no key has the given id.
///
/// # Errors
/// See [`ApiKeyError`].
pub async fn run(command: &ApiKeyCommand, data: &Path) -> Result<Option<String>, ApiKeyError> {
    let options = match command {
        ApiKeyCommand::Create { target, .. }
        | ApiKeyCommand::List { target }
        | ApiKeyCommand::Revoke { target, .. } => target,
    };
    let user = options.owner()?;
    let target = Target::open(options, data).await?;
    let keys = Stores::without_key(&target.names, &target.aws).api_keys();
    let done = match command {
        ApiKeyCommand::Create { name, .. } => {
            keys.create(&user, name).await.map(|(_, secret)| Some(format!("{}\n", secret.expose_secret())))
        }
        ApiKeyCommand::List { .. } => keys.list(&user).await.map(|keys| {
            let mut lines = String::new();
            for key in keys {
                let at = &key.created_at.sortable()[..19];
                // Writing to a `String` does not fail.
                let _written = writeln!(lines, "{}  {at}Z  {}…  {}", key.id, key.begins_with, key.name);
            }
            Some(lines)
        }),
        ApiKeyCommand::Revoke { id, .. } => {
            keys.revoke(&user, *id).await.map(|revoked| revoked.then(|| format!("revoked {id}\n")))
        }
    };
    target.close().await;
    Ok(done?)
}
