//! Applies the dead-letter policy of a job whose message SQS moved to the dead-letter queue. The policies themselves, and what
//! enqueues a job again, are in `shared/src/jobs/`.

use shared::error::Result;
use shared::jobs::advance_start::AdvanceStart;
use shared::jobs::backfill_events::BackfillEvents;
use shared::jobs::delete_conversation::DeleteConversation;
use shared::jobs::deliver_messages::DeliverMessages;
use shared::jobs::process_events::ProcessEvents;
use shared::jobs::queue::Job;
use shared::jobs::reconcile_sandbox::ReconcileSandbox;
use shared::jobs::refresh_conversation::RefreshConversation;
use tracing::Span;
use tracing::field::display;

use crate::Context;

pub(crate) async fn handle(context: &Context, job: Job) -> Result<()> {
    let policy = job.dead_letter_policy();
    match job {
        Job::AdvanceStart(AdvanceStart { user, task, .. }) => {
            Span::current().record("task", display(task));
            return context.saga.give_up(&user, task).await;
        }
        Job::Export { conversation, .. } => tracing::error!(%conversation, "worker.message_dropped"),
        Job::DeliverMessages(DeliverMessages { conversation, .. }) => {
            tracing::error!(%conversation, ?policy, "worker.messages_not_delivered");
        }
        Job::DeleteConversation(DeleteConversation { conversation, .. }) => {
            tracing::error!(%conversation, ?policy, "worker.deletion_keeps_failing");
        }
        Job::ReconcileSandbox(ReconcileSandbox { sandbox, .. }) => {
            tracing::error!(sandbox, ?policy, "worker.sandbox_not_reconciled");
        }
        Job::ObserveBoots(_) => tracing::error!(?policy, "worker.boots_not_observed"),
        Job::RefreshConversation(RefreshConversation { conversation, .. })
        | Job::BackfillEvents(BackfillEvents { conversation, .. })
        | Job::ProcessEvents(ProcessEvents { conversation, .. }) => {
            tracing::error!(%conversation, ?policy, "worker.events_not_processed");
        }
    }
    Ok(())
}
