//! Starting conversations: the start request, the start task that a client polls, and the saga that carries out the start.

pub mod abridged;
pub mod cancel;
pub mod conversation_body;
pub mod create;
pub mod identity;
pub mod llm_body;
pub mod request;
pub mod saga;
pub mod store;
pub mod suggested_task;
pub mod task;
