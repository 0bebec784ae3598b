//! The orders in which conversations and start tasks are listed.

use super::pydantic::validation::wire_enum;

wire_enum! {
    /// The order of a list.
    pub enum SortOrder {
        /// Oldest first.
        CreatedAt = "CREATED_AT",
        /// Newest first.
        CreatedAtDesc = "CREATED_AT_DESC",
        /// Longest unchanged first.
        UpdatedAt = "UPDATED_AT",
        /// Last changed first.
        UpdatedAtDesc = "UPDATED_AT_DESC",
    }
}

impl SortOrder {
    /// Whether it is one by creation, not by change.
    #[must_use]
    pub fn is_by_created(self) -> bool {
        matches!(self, Self::CreatedAt | Self::CreatedAtDesc)
    }

    /// Whether what is older comes first.
    #[must_use]
    pub fn is_ascending(self) -> bool {
        matches!(self, Self::CreatedAt | Self::UpdatedAt)
    }
}
