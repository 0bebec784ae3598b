//! HTTP: extractors, pagination, responses and errors in the contract's shapes, and validation that is compatible with pydantic.

pub mod caller;
pub mod cors;
pub mod extract;
pub mod idempotency_key;
pub mod page;
pub mod page_token;
pub mod pydantic;
pub mod request_trace;
pub mod response;
pub mod secret;
pub mod sort_order;
pub mod truncated;
