//! Runs one job. An error makes SQS deliver the message again.

use shared::error::Result;
use shared::jobs::delete_conversation::DeleteConversation;
use shared::jobs::process_events::ProcessEvents;
use shared::jobs::queue::Job;
use shared::jobs::reconcile_sandbox::ReconcileSandbox;
use shared::start::saga::Attempt;
use tracing::Span;
use tracing::field::display;

use crate::Context;

pub(crate) async fn run(context: &Context, job: Job) -> Result<()> {
    match job {
        Job::AdvanceStart(job) => {
            Span::current().record("task", display(job.task));
            let attempt = context.saga.advance(&job).await?;
            tracing::info!(task = %job.task, ?attempt, "worker.attempt_finished");
            match attempt {
                Attempt::Finished | Attempt::Compensating => context.messages.start_ended(&job.user, job.task).await,
                Attempt::Waiting | Attempt::Busy | Attempt::Unknown => Ok(()),
            }
        }
        // This code enqueues exports in the queue `exports` only.
        Job::Export { conversation, .. } => {
            tracing::error!(%conversation, "worker.message_dropped");
            Ok(())
        }
        Job::DeliverMessages(job) => context.messages.deliver(&job).await,
        Job::DeleteConversation(DeleteConversation { user, conversation }) => {
            context.deletion.finish(&user, conversation).await
        }
        Job::ReconcileSandbox(ReconcileSandbox { user, sandbox }) => {
            context.reconciler.reconcile(&user, &sandbox).await
        }
        Job::BackfillEvents(job) => context.follow_up.fetch_missing_events(&job).await,
        Job::ObserveBoots(_) => context.saga.boots.observe().await,
        Job::RefreshConversation(job) => context.follow_up.refresh_from_agent_server(&job).await,
        Job::ProcessEvents(ProcessEvents { user, conversation, up_to }) => {
            context.follow_up.process_events(&user, conversation, up_to.as_deref()).await
        }
    }
}
