//! The command that replaces the key under which secrets are sealed.

use std::io;
use std::path::Path;

use shared::user::data_key::DataKey;
use shared::user::seal::Sealer;

use crate::options::{DataKeyCommand, PlaceOptions};
use crate::place::{Place, PlaceError};
use crate::server::SEALING_KEY;

/// Why no key was added. Each one reads as a sentence.
#[derive(Debug, thiserror::Error)]
pub enum DataKeyError {
    /// Where to.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The key file.
    #[error("The sealing key of the data folder cannot be replaced: {0}")]
    File(#[from] io::Error),
    /// The store, or KMS.
    #[error("{}", .0.context())]
    Domain(#[from] shared::Error),
}

/// Runs the command in the stack that it names, or else in the data folder. Returns the text to print.
///
/// # Errors
/// See [`DataKeyError`].
pub async fn run(command: &DataKeyCommand, data: &Path) -> Result<String, DataKeyError> {
    let DataKeyCommand::Rotate { place } = command;
    let count = match &place.stack {
        Some(_) => rotate_on_aws(place, data).await?,
        None => Sealer::rotate_file(&data.join(SEALING_KEY))?,
    };
    Ok(format!(
        "There are {count} keys. New secrets are sealed under the newest one; processes that run use it when they restart.\n"
    ))
}

async fn rotate_on_aws(options: &PlaceOptions, data: &Path) -> Result<usize, DataKeyError> {
    let place = Place::open(options, data).await?;
    let Some(sdk) = &place.sdk else { return Err(PlaceError::Options("Give --stack.").into()) };
    let keys = DataKey::stored_in(sdk, place.aws.dynamodb.clone(), place.names.users.clone());
    let count = keys.rotate().await?;
    place.close().await;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_key_of_a_data_folder_is_replaced() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let command = DataKeyCommand::Rotate { place: PlaceOptions::default() };
        assert!(run(&command, folder.path()).await.is_err(), "there is none");
        let before = Sealer::from_file(&folder.path().join(SEALING_KEY)).expect("a key");
        let sealed = before.seal("p", &"text".into()).await.expect("sealed");
        assert!(run(&command, folder.path()).await.expect("done").starts_with("There are 2 keys"));
        let after = Sealer::from_file(&folder.path().join(SEALING_KEY)).expect("keys");
        after.open("p", &sealed).await.expect("open");
    }
}
