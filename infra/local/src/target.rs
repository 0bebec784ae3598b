//! The target of a command: the data folder on this machine, or the tables and the bucket of a deployed stack.

use std::path::Path;

use aws_config::retry::RetryConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use shared::aws::Aws;
use shared::config::Names;
use shared::user::UserId;

use crate::engines::{Engines, IN_PROCESS_S3};
use crate::options::TargetOptions;
use crate::server::{PREFIX, ServerError, make_data_folder};

/// Attempts at each AWS request. During a long import DynamoDB scales the tables up, and throttles requests until it has.
const MAX_ATTEMPTS: u32 = 10;
const MAX_USER_ID_BYTES: usize = 512;

/// Why a target cannot be opened. Each message is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// The options do not identify a target or a user.
    #[error("{0}")]
    Options(&'static str),
    #[error(transparent)]
    DataFolder(#[from] ServerError),
}

impl TargetOptions {
    /// The owner of the rows: the user given with `--user`, or else, in the data folder, the local user.
    ///
    /// # Errors
    /// [`TargetError::Options`].
    pub fn owner(&self) -> Result<UserId, TargetError> {
        match (&self.user, &self.stack) {
            (Some(user), _) if user.is_empty() || user.len() > MAX_USER_ID_BYTES => {
                Err(TargetError::Options("The id given with --user must have 1 to 512 bytes."))
            }
            (Some(user), _) => Ok(UserId::new(user)),
            (None, Some(_)) => Err(TargetError::Options("A stack has many users: give --user.")),
            (None, None) => Ok(UserId::local()),
        }
    }

    /// The owner of imported rows that name none; `None` in a stack without `--user`, where each row has to name its owner.
    ///
    /// # Errors
    /// [`TargetError::Options`].
    pub fn default_owner(&self) -> Result<Option<UserId>, TargetError> {
        if self.user.is_none() && self.stack.is_some() { Ok(None) } else { self.owner().map(Some) }
    }
}

/// An open target.
#[derive(Debug)]
pub struct Target {
    pub aws: Aws,
    /// The names of the target's tables, bucket and queues.
    pub names: Names,
    /// The SDK configuration of the stack's AWS account; `None` for the data folder.
    pub sdk: Option<SdkConfig>,
    engines: Option<Engines>,
}

impl Target {
    /// Opens the target that the options name. A missing data folder is created; missing tables on AWS are not.
    ///
    /// # Errors
    /// See [`TargetError`].
    pub async fn open(options: &TargetOptions, data: &Path) -> Result<Self, TargetError> {
        match &options.stack {
            Some(stack) => Self::stack(stack, options).await,
            None => Self::data_folder(data).await,
        }
    }

    #[must_use]
    pub fn is_data_folder(&self) -> bool {
        self.engines.is_some()
    }

    /// Stops the engines of a data folder, which releases its lock. A stack needs no closing.
    pub async fn close(self) {
        if let Some(engines) = self.engines {
            engines.shutdown().await;
        }
    }

    async fn data_folder(data: &Path) -> Result<Self, TargetError> {
        let data = make_data_folder(data)?;
        let engines = Engines::in_process(&data, IN_PROCESS_S3).await.map_err(ServerError::from)?;
        let aws = Aws::new(&engines.sdk_config().await);
        let names = Names::with_prefix(PREFIX);
        schema::make_all(&aws, &names, PREFIX).await.map_err(ServerError::from)?;
        Ok(Self { aws, names, sdk: None, engines: Some(engines) })
    }

    async fn stack(stack: &str, options: &TargetOptions) -> Result<Self, TargetError> {
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .retry_config(RetryConfig::standard().with_max_attempts(MAX_ATTEMPTS));
        if let Some(profile) = &options.profile {
            loader = loader.profile_name(profile);
        }
        if let Some(region) = &options.region {
            loader = loader.region(Region::new(region.clone()));
        }
        let config = loader.load().await;
        if config.region().is_none() {
            return Err(TargetError::Options(
                "There is no AWS region: give --region, or set one in the profile or as AWS_REGION.",
            ));
        }
        let names = Names::with_prefix(&format!("{stack}-"));
        Ok(Self { aws: Aws::new(&config), names, sdk: Some(config), engines: None })
    }
}
