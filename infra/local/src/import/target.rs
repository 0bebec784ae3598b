//! What imports go into: the data folder, or tables on AWS.

use std::path::Path;

use aws_config::retry::RetryConfig;
use aws_config::{BehaviorVersion, Region};
use shared::aws::Aws;
use shared::config::Names;
use shared::user::UserId;

use super::{ImportError, Importer, Pace};
use crate::engines::{EnginePorts, Engines};
use crate::options::ImportOptions;
use crate::server::{PREFIX, ServerError, make_data_folder};

/// Under a long import tables on AWS are scaled up, and say no meanwhile.
const ATTEMPTS: u32 = 10;

/// Who owns rows that name no owner; `None` when each has to name one.
pub(super) fn default_owner(options: &ImportOptions) -> Result<Option<UserId>, ImportError> {
    match (&options.user, &options.stack) {
        (Some(user), _) if user.is_empty() || user.len() > 512 => {
            Err(ImportError::Target("The id given with --user must have 1 to 512 bytes.".into()))
        }
        (Some(user), _) => Ok(Some(UserId::new(user))),
        (None, Some(_)) => Ok(None),
        (None, None) => Ok(Some(UserId::local())),
    }
}

/// An open target.
pub(super) struct Target {
    pub(super) importer: Importer,
    engines: Option<Engines>,
}

impl Target {
    /// Opens what the options say. The data folder is made if it is not there, tables on AWS are not.
    pub(super) async fn open(options: &ImportOptions, data: &Path) -> Result<Self, ImportError> {
        match &options.stack {
            Some(stack) => Self::stack(stack, options).await,
            None => Self::embedded(data).await,
        }
    }

    async fn embedded(data: &Path) -> Result<Self, ImportError> {
        let data = make_data_folder(data)?;
        let engines = Engines::start(&data, EnginePorts::default()).await.map_err(ServerError::from)?;
        let aws = Aws::new(&engines.sdk_config().await);
        let names = Names::with_prefix(PREFIX);
        schema::make_all(&aws, &names, PREFIX).await.map_err(ServerError::from)?;
        Ok(Self { importer: Importer::new(&aws, &names, Pace::EMBEDDED), engines: Some(engines) })
    }

    async fn stack(stack: &str, options: &ImportOptions) -> Result<Self, ImportError> {
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
            return Err(ImportError::Target(
                "There is no AWS region: give --region, or set one in the profile or as AWS_REGION.".into(),
            ));
        }
        let names = Names::with_prefix(&format!("{stack}-"));
        Ok(Self { importer: Importer::new(&Aws::new(&config), &names, Pace::AWS), engines: None })
    }

    /// Closes the data folder.
    pub(super) async fn close(self) {
        if let Some(engines) = self.engines {
            engines.shutdown().await;
        }
    }
}
