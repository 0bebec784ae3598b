//! HTTP at the edge: reading requests in the contract's way, and answering in its shapes.

pub mod caller;
pub mod cors;
pub mod page;
pub mod page_token;
pub mod pydantic;
pub mod response;
pub mod secret;
pub mod sort_order;
pub mod truncated;
