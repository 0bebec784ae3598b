//! HTTP at the edge: reading requests in the contract's way, and answering in its shapes.

pub mod body;
pub mod caller;
pub mod cors;
pub mod page;
pub mod page_id;
pub mod query;
pub mod response;
pub mod secret;
pub mod sort_order;
pub mod validation;
