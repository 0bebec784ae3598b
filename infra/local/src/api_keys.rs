//! The command that makes, lists and revokes API keys.

use std::fmt::Write as _;
use std::path::Path;

use secrecy::ExposeSecret as _;
use shared::stores::Stores;

use crate::options::ApiKeyCommand;
use crate::place::{Place, PlaceError};

/// Why nothing was done. Each one reads as a sentence.
#[derive(Debug, thiserror::Error)]
pub enum ApiKeyError {
    /// Where to.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The store, or what was asked of it.
    #[error("{}", .0.context())]
    Domain(#[from] shared::Error),
}

/// Does it, in the place that the command names or else in the data folder. Returns what is to be printed, which holds the key
/// when one was made; `None` when there is no key with the id.
///
/// # Errors
/// See [`ApiKeyError`].
pub async fn run(command: &ApiKeyCommand, data: &Path) -> Result<Option<String>, ApiKeyError> {
    let options = match command {
        ApiKeyCommand::Create { place, .. } | ApiKeyCommand::List { place } | ApiKeyCommand::Revoke { place, .. } => {
            place
        }
    };
    let user = options.owner()?;
    let place = Place::open(options, data).await?;
    let keys = Stores::without_key(&place.names, &place.aws).api_keys();
    let done = match command {
        ApiKeyCommand::Create { name, .. } => {
            keys.create(&user, name).await.map(|(_, secret)| Some(format!("{}\n", secret.expose_secret())))
        }
        ApiKeyCommand::List { .. } => keys.list(&user).await.map(|keys| {
            let mut lines = String::new();
            for key in keys {
                let at = &key.created_at.sortable()[..19];
                // Writing into a text does not fail.
                let _written = writeln!(lines, "{}  {at}Z  {}…  {}", key.id, key.begins_with, key.name);
            }
            Some(lines)
        }),
        ApiKeyCommand::Revoke { id, .. } => {
            keys.revoke(&user, *id).await.map(|revoked| revoked.then(|| format!("revoked {id}\n")))
        }
    };
    place.close().await;
    Ok(done?)
}
