//! `cargo local data-key`: adds a key under which new secrets are sealed.

use std::io;
use std::path::Path;

use shared::user::data_key::DataKey;
use shared::user::seal::Sealer;

use crate::engines::EngineError;
use crate::migration;
use crate::options::{DataKeyCommand, TargetOptions};
use crate::server::SEALING_KEY;
use crate::target::{Target, TargetError};

/// Why no key was added. Each message is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum DataKeyError {
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The data folder is newer than this program.
    #[error(transparent)]
    DataFolder(#[from] EngineError),
    /// The key file of the data folder cannot be read or written.
    #[error("The sealing key of the data folder cannot be replaced: {0}")]
    File(#[from] io::Error),
    /// The store or KMS failed.
    #[error("{}", .0.context())]
    Domain(#[from] shared::Error),
}

/// Runs the command on the stack that it names, or else on the data folder. Returns the text to print.
///
/// # Errors
/// See [`DataKeyError`].
pub async fn run(command: &DataKeyCommand, data: &Path) -> Result<String, DataKeyError> {
    let DataKeyCommand::Rotate { target } = command;
    let count = match &target.stack {
        Some(_) => rotate_on_aws(target, data).await?,
        None => {
            migration::refuse_newer(data)?;
            Sealer::rotate_file(&data.join(SEALING_KEY))?
        }
    };
    Ok(format!(
        "There are now {count} keys. New secrets are sealed under the newest one; running processes use it after a restart.\n"
    ))
}

async fn rotate_on_aws(options: &TargetOptions, data: &Path) -> Result<usize, DataKeyError> {
    let target = Target::open(options, data).await?;
    let Some(sdk) = &target.sdk else { return Err(TargetError::Options("Give --stack.").into()) };
    let keys = DataKey::stored_in(sdk, target.aws.dynamodb.clone(), target.names.users.clone());
    let count = keys.rotate().await?;
    target.close().await;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_key_of_a_data_folder_is_replaced() {
        let folder = tempfile::TempDir::new().expect("a folder");
        let command = DataKeyCommand::Rotate { target: TargetOptions::default() };
        assert!(run(&command, folder.path()).await.is_err(), "there is no key yet");
        let before = Sealer::from_file(&folder.path().join(SEALING_KEY)).expect("a key");
        let sealed = before.seal("p", &"text".into()).await.expect("sealed");
        assert!(run(&command, folder.path()).await.expect("done").starts_with("There are now 2 keys"));
        let after = Sealer::from_file(&folder.path().join(SEALING_KEY)).expect("keys");
        after.open("p", &sealed).await.expect("open");
    }
}
