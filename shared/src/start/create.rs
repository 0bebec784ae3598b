//! Creates start tasks: checks the request's repository and branch, inherits missing fields from the parent conversation, stores the task
//! and enqueues its job.

use std::time::Duration;

use super::identity::StartIdentity;
use super::request::{Content, Role, SendMessageRequest, StartRequest, TextContent};
use super::store::{NewStart, StartTaskStore};
use super::suggested_task;
use super::task::StartTaskRecord;
use crate::clock::Time;
use crate::conversation::fields::Trigger;
use crate::conversation::store::ConversationStore;
use crate::error::{Error, Result};
use crate::http::idempotency_key::IdempotencyKey;
use crate::http::pydantic::validation::Checker;
use crate::http::request_trace::RequestTrace;
use crate::id::{self, UserId};
use crate::jobs::advance_start::AdvanceStart;
use crate::jobs::queue::JobQueue;
use crate::sandbox::store::SandboxStore;
use crate::user::agent_profiles::AgentProfileError;
use crate::user::git::{self, Repository, Selection};
use crate::user::settings::{ProviderTokens, SettingsStore};

/// Creates start tasks.
#[derive(Clone, Debug)]
pub struct StartService {
    /// For lookups of parent conversations.
    pub conversations: ConversationStore,
    pub tasks: StartTaskStore,
    /// For the membership of a start in the sandbox that its request names.
    pub sandboxes: SandboxStore,
    /// Receives the job that advances the start.
    pub queue: JobQueue,
    /// For lookups of users' git providers.
    pub settings: SettingsStore,
    /// Whether git hosts may be reached without encryption.
    pub allow_insecure_git_access: bool,
    /// Time limit of the first step.
    pub step_timeout: Duration,
    /// The user's unfinished starts at which no more are created.
    pub max_unfinished: u32,
}

impl StartService {
    /// Stores the task and enqueues its job. After this function returns, the start is durable: no crash loses it.
    ///
    /// If an earlier request of the user with the same idempotency key has created a task, that task is returned, in its current state,
    /// and nothing else happens. `trace` becomes the trace of a new start.
    ///
    /// # Errors
    /// [`Error::Conflict`] for a key of another request, [`Error::NotFound`] for an unknown parent or agent profile, [`Error::Refused`] for
    /// an unsupported suggested task or an agent profile without its LLM profile, [`Error::Invalid`] for an invalid repository or branch,
    /// [`Error::Saturated`] for too many unfinished starts; then nothing is stored. [`Error::Store`].
    pub async fn create(
        &self,
        user: &UserId,
        request: StartRequest,
        key: &IdempotencyKey,
        trace: &RequestTrace,
    ) -> Result<StartTaskRecord> {
        let identity = StartIdentity::of(user, key.0.as_deref(), &request)?;
        if let Some(record) = self.tasks.find(user, &identity).await? {
            record.record_in_log();
            tracing::info!(task = %record.id, "start.repeated");
            return Ok(record);
        }
        if request.agent_profile_id.is_some() {
            let settings = self.settings.get(user).await?.unwrap_or_default();
            settings.with_agent_profile(request.agent_profile_id).map_err(|error| match error {
                AgentProfileError::Unknown(_) => Error::NotFound(error.to_string()),
                AgentProfileError::NoLlmProfile { .. } => Error::Refused(error.to_string()),
            })?;
        }
        let request = self.with_selection(user, with_suggested_task(request)?).await?;
        let deadline = Time::now().plus(self.step_timeout);
        // From now on no deletion of a conversation deletes that sandbox, although the worker has not begun yet.
        let membership = match request.sandbox_id.as_deref() {
            Some(sandbox) => self.sandboxes.joining_given(user, sandbox, identity.task)?,
            None => None,
        };
        let (max_unfinished, trace) = (self.max_unfinished, trace.0.clone());
        let new = NewStart { identity, deadline, max_unfinished, membership, trace };
        let record = self.tasks.create(user, &request, &new).await?;
        record.record_in_log();
        let job = AdvanceStart { user: user.clone(), task: record.id, due_at: None }.into();
        if let Err(error) = self.queue.send(&job, Duration::ZERO).await {
            // The stored row is authoritative: the sweep finds it and enqueues the job again.
            tracing::warn!(task = %record.id, error = %error.context(), "start.enqueue_failed");
        }
        tracing::info!(task = %record.id, conversation = %record.conversation_id, "start.created");
        Ok(record)
    }

    /// Checks repository and branch, and fills missing fields from the parent. The repository keeps the form that the client sent, because
    /// responses show that form. Workers get the normalised form from [`StartRequest::use_normal_selection`].
    async fn with_selection(&self, user: &UserId, mut request: StartRequest) -> Result<StartRequest> {
        let is_blank = |text: &Option<String>| text.as_deref().is_none_or(|text| text.trim().is_empty());
        let tokens = match is_blank(&request.selected_repository) {
            true => ProviderTokens::default(),
            false => self.settings.get(user).await?.unwrap_or_default().provider_tokens,
        };
        let place: &[&'static str] = match &request.suggested_task {
            Some(task) if request.selected_repository.as_ref() == Some(&task.repo) => &["suggested_task", "repo"],
            _ => &["selected_repository"],
        };
        let repository = request.selected_repository.clone();
        let given = (repository.as_deref(), request.selected_branch.as_deref(), request.git_provider);
        let mut check = Checker::new("body");
        let selection = Selection::read(&mut check, place, given, &tokens);
        let selection = check.finish(selection).map_err(Error::Invalid)?;
        // A suggested task always has a provider.
        let given_provider = request.git_provider.filter(|_| request.suggested_task.is_none());
        // `HEAD` selects the repository's default branch, not the parent's branch.
        let is_default = selection.branch.is_none() && !is_blank(&request.selected_branch);
        (request.selected_branch, request.git_provider) = (selection.branch, selection.provider);
        if is_blank(&repository) {
            request.selected_repository = None;
        }
        let request = self.with_inheritance(user, request, &tokens, is_default).await?;
        let mut check = Checker::new("body");
        if let Some(text) = repository.as_deref().filter(|_| selection.repository.is_some()) {
            let insecure = self.allow_insecure_git_access;
            if let Err(error) = git::clone_sources(text, request.git_provider, &tokens, insecure) {
                git::report_at(&mut check, place, &error.to_string(), text);
            }
        } else if is_blank(&request.selected_repository) {
            git::report_without_repository(&mut check, request.selected_branch.as_deref(), given_provider);
        }
        check.finish(Some(request)).map_err(Error::Invalid)
    }

    async fn with_inheritance(
        &self,
        user: &UserId,
        mut request: StartRequest,
        tokens: &ProviderTokens,
        is_default_branch: bool,
    ) -> Result<StartRequest> {
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
        fill(&mut request.llm_model, parent.llm_model);
        let own = request.selected_repository.clone().filter(|text| !text.trim().is_empty());
        // Another repository may not have the parent's branch.
        let of_parent = |text: &str| {
            let read = |text, provider| Repository::read(text, provider, tokens).ok();
            let provider = request.git_provider.or(parent.git_provider);
            let (own, other) =
                (read(text, provider)?, read(parent.selected_repository.as_deref()?, parent.git_provider)?);
            let is_same = other.provider.is_none_or(|provider| own.provider == Some(provider));
            Some(is_same && own.name.eq_ignore_ascii_case(&other.name))
        };
        // A record may keep the branch of a repository that was cleared.
        let has_branch = parent.selected_repository.is_some()
            && !is_default_branch
            && own.as_deref().is_none_or(|text| of_parent(text) == Some(true));
        let parent_branch = parent.selected_branch.filter(|_| has_branch);
        if own.is_none() {
            request.selected_repository = parent.selected_repository;
        }
        fill(&mut request.selected_branch, parent_branch);
        // Another repository may be hosted by another provider than the parent's.
        let fits = |provider| own.as_deref().is_none_or(|text| Repository::read(text, Some(provider), tokens).is_ok());
        request.git_provider = request.git_provider.or(parent.git_provider.filter(|provider| fits(*provider)));
        Ok(request)
    }
}

fn with_suggested_task(mut request: StartRequest) -> Result<StartRequest> {
    let Some(task) = &request.suggested_task else { return Ok(request) };
    if request.initial_message.is_some() {
        return Err(Error::Refused("Send either initial_message or suggested_task, not both".into()));
    }
    let text = suggested_task::prompt(task).map_err(|error| Error::Refused(error.to_string()))?;
    let content = vec![Content::Text(TextContent { cache_prompt: false, text })];
    request.initial_message = Some(SendMessageRequest { role: Role::User, content, run: false });
    request.trigger = Some(Trigger::SuggestedTask);
    if request.selected_repository.as_deref().is_none_or(|text| text.trim().is_empty()) {
        request.selected_repository = Some(task.repo.clone());
    }
    request.git_provider = request.git_provider.or(Some(task.git_provider));
    Ok(request)
}
