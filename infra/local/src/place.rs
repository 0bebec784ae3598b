//! Where commands work: in the data folder, or in a stack on AWS.

use std::path::Path;

use aws_config::retry::RetryConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use shared::aws::Aws;
use shared::config::Names;
use shared::user::UserId;

use crate::engines::{Engines, IN_PROCESS_S3};
use crate::options::PlaceOptions;
use crate::server::{PREFIX, ServerError, make_data_folder};

/// Under a long import tables on AWS are scaled up, and say no meanwhile.
const ATTEMPTS: u32 = 10;
/// Of a user's id.
const MAX_USER: usize = 512;

/// Why a place cannot be worked in. Each one reads as a sentence.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The options do not name one.
    #[error("{0}")]
    Options(&'static str),
    /// The data folder.
    #[error(transparent)]
    Folder(#[from] ServerError),
}

impl PlaceOptions {
    /// Whose rows: the user that is named, or else, in the data folder, the local one.
    ///
    /// # Errors
    /// [`PlaceError::Options`].
    pub fn owner(&self) -> Result<UserId, PlaceError> {
        match (&self.user, &self.stack) {
            (Some(user), _) if user.is_empty() || user.len() > MAX_USER => {
                Err(PlaceError::Options("The id given with --user must have 1 to 512 bytes."))
            }
            (Some(user), _) => Ok(UserId::new(user)),
            (None, Some(_)) => Err(PlaceError::Options("A stack has many users: give --user.")),
            (None, None) => Ok(UserId::local()),
        }
    }
}

/// An open place.
#[derive(Debug)]
pub struct Place {
    /// Clients of what is there.
    pub aws: Aws,
    /// What it is called there.
    pub names: Names,
    /// How AWS is reached; `None` for the data folder.
    pub sdk: Option<SdkConfig>,
    engines: Option<Engines>,
}

impl Place {
    /// Opens what the options say. The data folder is made if it is not there, tables on AWS are not.
    ///
    /// # Errors
    /// See [`PlaceError`].
    pub async fn open(options: &PlaceOptions, data: &Path) -> Result<Self, PlaceError> {
        match &options.stack {
            Some(stack) => Self::stack(stack, options).await,
            None => Self::embedded(data).await,
        }
    }

    /// Whether it is the data folder.
    #[must_use]
    pub fn is_embedded(&self) -> bool {
        self.engines.is_some()
    }

    /// Closes the data folder.
    pub async fn close(self) {
        if let Some(engines) = self.engines {
            engines.shutdown().await;
        }
    }

    async fn embedded(data: &Path) -> Result<Self, PlaceError> {
        let data = make_data_folder(data)?;
        let engines = Engines::in_process(&data, IN_PROCESS_S3).await.map_err(ServerError::from)?;
        let aws = Aws::new(&engines.sdk_config().await);
        let names = Names::with_prefix(PREFIX);
        schema::make_all(&aws, &names, PREFIX).await.map_err(ServerError::from)?;
        Ok(Self { aws, names, sdk: None, engines: Some(engines) })
    }

    async fn stack(stack: &str, options: &PlaceOptions) -> Result<Self, PlaceError> {
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .retry_config(RetryConfig::standard().with_max_attempts(ATTEMPTS));
        if let Some(profile) = &options.profile {
            loader = loader.profile_name(profile);
        }
        if let Some(region) = &options.region {
            loader = loader.region(Region::new(region.clone()));
        }
        let config = loader.load().await;
        if config.region().is_none() {
            return Err(PlaceError::Options(
                "There is no AWS region: give --region, or set one in the profile or as AWS_REGION.",
            ));
        }
        let names = Names::with_prefix(&format!("{stack}-"));
        Ok(Self { aws: Aws::new(&config), names, sdk: Some(config), engines: None })
    }
}
