//! The beginning of a start: what is inherited is filled in, the task is stored, the bell is rung.

use std::time::Duration;

use super::queue::{Job, StartQueue};
use super::request::{Content, Role, SendMessageRequest, StartRequest, TextContent, Trigger};
use super::store::StartTaskStore;
use super::suggested_task;
use super::task::StartTaskRecord;
use crate::clock::Time;
use crate::conversation::store::ConversationStore;
use crate::error::{Error, Result};
use crate::id;
use crate::user::UserId;

/// Begins starts.
#[derive(Clone, Debug)]
pub struct StartBeginner {
    /// Where parents are looked up.
    pub conversations: ConversationStore,
    /// Where the task is stored.
    pub tasks: StartTaskStore,
    /// Where the bell is rung.
    pub queue: StartQueue,
    /// How long the first step may take.
    pub step_timeout: Duration,
}

impl StartBeginner {
    /// Stores the task and rings for a worker. Once this returns the start cannot be lost any more.
    ///
    /// # Errors
    /// [`Error::NotFound`] for an unknown parent, [`Error::Refused`] for a suggested task that cannot be, both before
    /// anything is stored; [`Error::Store`].
    pub async fn begin(&self, user: &UserId, request: StartRequest) -> Result<StartTaskRecord> {
        let request = self.with_inheritance(user, with_suggested_task(request)?).await?;
        let record = self.tasks.create(user, &request, Time::now().plus(self.step_timeout)).await?;
        let job = Job::AdvanceStart { user: user.clone(), task: record.id };
        if let Err(error) = self.queue.send(&job, Duration::ZERO).await {
            // The row is the truth: the sweep finds it.
            tracing::warn!(task = %record.id, error = %error.context(), "start.bell_not_rung");
        }
        tracing::info!(task = %record.id, conversation = %record.conversation_id, "start.begun");
        Ok(record)
    }

    /// Fills in from the parent what the request leaves open.
    async fn with_inheritance(&self, user: &UserId, mut request: StartRequest) -> Result<StartRequest> {
        let Some(parent_id) = request.parent_conversation_id else { return Ok(request) };
        let parent = self
            .conversations
            .get(user, parent_id)
            .await?
            .ok_or_else(|| Error::NotFound(format!("Parent conversation not found: {}", id::dashed(parent_id))))?;
        let fill = |field: &mut Option<String>, value: Option<String>| {
            if field.as_deref().is_none_or(str::is_empty) {
                *field = value;
            }
        };
        fill(&mut request.sandbox_id, Some(parent.sandbox_id));
        fill(&mut request.selected_repository, parent.selected_repository);
        fill(&mut request.selected_branch, parent.selected_branch);
        fill(&mut request.llm_model, parent.llm_model);
        request.git_provider = request.git_provider.or(parent.git_provider);
        Ok(request)
    }
}

fn with_suggested_task(mut request: StartRequest) -> Result<StartRequest> {
    let Some(task) = &request.suggested_task else { return Ok(request) };
    if request.initial_message.is_some() {
        return Err(Error::Refused("A start has either an initial_message or a suggested_task, not both".into()));
    }
    let text = suggested_task::prompt(task).map_err(|error| Error::Refused(error.to_string()))?;
    let content = vec![Content::Text(TextContent { cache_prompt: false, text })];
    request.initial_message = Some(SendMessageRequest { role: Role::User, content, run: false });
    request.trigger = Some(Trigger::SuggestedTask);
    if request.selected_repository.as_deref().is_none_or(str::is_empty) {
        request.selected_repository = Some(task.repo.clone());
    }
    request.git_provider = request.git_provider.or(Some(task.git_provider));
    Ok(request)
}
