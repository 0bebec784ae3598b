//! The dead-letter (DLQ) policy of every job: what a worker does with a message that SQS moved to the dead-letter queue because its
//! attempts failed too often (`infra/schema` says how often), and what enqueues the job again.

use super::queue::Job;
use super::{
    advance_start, backfill_events, delete_conversation, deliver_messages, observe_boots, process_events,
    reconcile_sandbox, refresh_conversation,
};

/// What happens when a message of a job becomes a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeadLetterPolicy {
    /// The worker ends the subject of the job with an error that its user sees. Nothing enqueues the job again.
    Fail,
    /// The worker logs an error, which raises an alarm. The job is not lost: something enqueues it again.
    LogUntil(Requeue),
}

/// What enqueues a job again after its message became a dead letter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Requeue {
    /// The sweep, because the row stays in an index of due rows.
    Sweep,
    /// The next request of a client for the same thing.
    NextRequest,
    /// The next event of the conversation.
    NextEvent,
}

impl Job {
    /// What happens when a message of this job becomes a dead letter.
    #[must_use]
    pub fn dead_letter_policy(&self) -> DeadLetterPolicy {
        match self {
            Self::AdvanceStart(_) => advance_start::DEAD_LETTER_POLICY,
            Self::Export { .. } => DeadLetterPolicy::LogUntil(Requeue::NextRequest),
            Self::RefreshConversation(_) => refresh_conversation::DEAD_LETTER_POLICY,
            Self::ProcessEvents(_) => process_events::DEAD_LETTER_POLICY,
            Self::DeliverMessages(_) => deliver_messages::DEAD_LETTER_POLICY,
            Self::DeleteConversation(_) => delete_conversation::DEAD_LETTER_POLICY,
            Self::ReconcileSandbox(_) => reconcile_sandbox::DEAD_LETTER_POLICY,
            Self::BackfillEvents(_) => backfill_events::DEAD_LETTER_POLICY,
            Self::ObserveBoots(_) => observe_boots::DEAD_LETTER_POLICY,
        }
    }
}
