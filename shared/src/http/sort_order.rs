//! Sort orders of conversations and start tasks.

use super::pydantic::validation::wire_enum;

wire_enum! {
    /// The order of a list.
    pub enum SortOrder {
        /// Oldest first.
        CreatedAt = "CREATED_AT",
        /// Newest first.
        CreatedAtDesc = "CREATED_AT_DESC",
        /// Least recently changed first.
        UpdatedAt = "UPDATED_AT",
        /// Most recently changed first.
        UpdatedAtDesc = "UPDATED_AT_DESC",
    }
}

impl SortOrder {
    /// Whether the time of creation decides, not that of the last change.
    #[must_use]
    pub fn is_by_created(self) -> bool {
        matches!(self, Self::CreatedAt | Self::CreatedAtDesc)
    }

    /// Whether the oldest come first.
    #[must_use]
    pub fn is_ascending(self) -> bool {
        matches!(self, Self::CreatedAt | Self::UpdatedAt)
    }
}
