//! What imports go into.

use std::path::Path;

use shared::user::UserId;

use super::{ImportError, Importer, Pace};
use crate::options::PlaceOptions;
use crate::place::{Place, PlaceError};

/// Who owns rows that name no owner; `None` when each has to name one.
pub(super) fn default_owner(options: &PlaceOptions) -> Result<Option<UserId>, PlaceError> {
    if options.user.is_none() && options.stack.is_some() { Ok(None) } else { options.owner().map(Some) }
}

/// An open target.
pub(super) struct Target {
    pub(super) importer: Importer,
    place: Place,
}

impl Target {
    /// Opens what the options say.
    pub(super) async fn open(options: &PlaceOptions, data: &Path) -> Result<Self, ImportError> {
        let place = Place::open(options, data).await?;
        let batches = if place.is_embedded() { Pace::EMBEDDED } else { Pace::AWS };
        Ok(Self { importer: Importer::new(&place.aws, &place.names, batches), place })
    }

    pub(super) async fn close(self) {
        self.place.close().await;
    }
}
