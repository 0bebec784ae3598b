//! Background jobs: the queue that workers receive them from, and one file per job with its retry schedule and its dead-letter
//! policy.
//!
//! A message only says which row to work on; the row in the table is the truth. A lost message therefore delays its job and does
//! nothing else: the [`sweep`] enqueues jobs again whose rows are overdue.
//!
//! A job is retried in two ways. Its own *retry schedule* applies to failures that it expects (a sandbox that does not answer): it
//! records the attempt, enqueues itself again with a delay, and the message counts as processed. When a worker fails or dies, SQS
//! delivers the message again after its visibility timeout, and moves it to the dead-letter queue once it was received
//! `max_receive_count` times (`infra/schema`). Then the *dead-letter policy* of the job applies ([`dead_letter`]).
//!
//! What a worker does for each job is in `functions/worker/src/`.

pub mod advance_start;
pub mod backfill_events;
pub mod dead_letter;
pub mod delete_conversation;
pub mod deliver_messages;
pub mod observe_boots;
pub mod process_events;
pub mod queue;
pub mod reconcile_sandbox;
pub mod refresh_conversation;
pub mod sweep;
