//! Starting conversations: the request, the task that tells how far a start is, and the saga that carries it out.

pub mod abridged;
pub mod conversation_body;
pub mod create;
pub mod request;
pub mod saga;
pub mod store;
pub mod suggested_task;
pub mod task;
