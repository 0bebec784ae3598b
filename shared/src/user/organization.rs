//! Organizations. Each user has one, which has no record of its own.

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::UserId;

/// The name of every user's organization.
pub const OWN_NAME: &str = "Personal";

/// The id of a user's organization: a UUID of version 8 from a digest of the user's id, so that it is always the same and reveals nothing.
#[must_use]
pub fn organization_of(user: &UserId) -> Uuid {
    let digest = Sha256::digest(user.key_of("organization").as_bytes());
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&digest[..16]);
    uuid::Builder::from_custom_bytes(bytes).into_uuid()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_has_one_of_their_own_that_stays_the_same() {
        let id = organization_of(&UserId::new("a"));
        assert_eq!(id.to_string(), organization_of(&UserId::new("a")).to_string());
        assert_eq!((id.get_version_num(), id.get_variant()), (8, uuid::Variant::RFC4122));
        assert_ne!(id, organization_of(&UserId::new("b")));
        assert_ne!(id, organization_of(&UserId::local()));
    }
}
