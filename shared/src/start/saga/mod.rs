//! The start saga: the engine that runs the steps of a start in order, with leases, retries, deadlines and compensation. Each step has a
//! module of its own.
//!
//! A worker claims the task with a short lease, which it renews while it works. It runs the step that the task's status names, records the
//! result, and continues with the next step. After a crash the row still names the step to run, and every step is idempotent: ids are
//! chosen before any resource is created, and commands in the sandbox run once even if they are sent twice (see [`command`]).

mod choose_sandbox;
pub mod command;
mod prepare_repository;
mod probe_mcp_servers;
mod run_setup_script;
#[cfg(test)]
mod scratch;
mod set_up_git_hooks;
mod start_conversation;
mod wait_for_sandbox;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use super::store::{Change, Claim, LeaseLost, StartTaskStore, attempts};
use super::task::{Snapshot, StartStatus, StartTask};
use crate::agent_server::{AgentServer, AgentServerError, Retry, SkillInfo};
use crate::clock::Time;
use crate::config::StartConfig;
use crate::conversation::reports::Lookup;
use crate::conversation::store::ConversationStore;
use crate::error::{Error, Fault, Result};
use crate::http_client::HttpClient;
use crate::id::{self, UserId};
use crate::jobs::advance_start::{self, AdvanceStart, MAX_ATTEMPTS, MAX_REFUSALS};
use crate::jobs::queue::JobQueue;
use crate::jobs::sweep::sweep;
use crate::metrics;
use crate::sandbox::{Sandbox, SandboxService, SandboxStatus};
use crate::user::seal::Sealer;
use crate::user::settings::{SandboxGroupingStrategy, Settings, SettingsStore};

/// Upper limit of the poll backoff: the interval is at most this multiple of the base interval.
const MAX_POLL_FACTOR: u32 = 10;
/// The same limit while a sandbox boots.
const MAX_BOOT_POLL_FACTOR: u32 = 3;
/// Time that a step has after its deadline to end by itself.
const STEP_GRACE: Duration = Duration::from_secs(30);
/// The smallest delay of a queue message.
const QUEUE_DELAY: Duration = Duration::from_secs(1);

/// The dependencies of the start saga.
#[derive(Clone, Debug)]
pub struct Saga {
    pub tasks: StartTaskStore,
    pub conversations: ConversationStore,
    pub sandboxes: Arc<dyn SandboxService>,
    pub settings: SettingsStore,
    pub queue: JobQueue,
    /// The HTTP client for agent servers.
    pub http: HttpClient,
    /// Derives the key that signs access tokens.
    pub sealer: Sealer,
    pub config: StartConfig,
}

/// The outcome of a worker's attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// The task is READY or ERROR.
    Finished,
    /// The start waits; a delayed job is enqueued.
    Waiting,
    /// Another worker holds the lease.
    Busy,
    /// No task with this id exists.
    Unknown,
}

/// The outcome of a step.
enum Step {
    /// The step is done: enter the next status with these changes.
    Next(StartStatus, Change),
    /// The step waits for an event in the sandbox and is polled again.
    Wait,
    /// The start is done and recorded.
    Ready,
}

/// The error of a step.
enum StepError {
    /// Permanent, caused by this server or the sandbox's provider. The text is for the user.
    Fatal(String),
    /// Permanent, caused by the user's request. The text is for the user.
    Refused(String),
    /// Transient: the step is retried. The text is for the user if the retries fail.
    Retry(String),
    /// The agent server returned an error of its own. The step is retried a few times; the error is usually permanent, and the text is then
    /// for the user.
    Refusal(Fault, String),
    /// Another worker holds the lease now.
    LeaseLost,
}

impl From<LeaseLost> for StepError {
    fn from(_: LeaseLost) -> Self {
        Self::LeaseLost
    }
}

impl From<Error> for StepError {
    fn from(error: Error) -> Self {
        match error {
            Error::Store(_) | Error::Upstream { .. } => {
                tracing::warn!(error = %error.context(), "start.step_failed");
                Self::Retry(error.to_string())
            }
            Error::Internal { context } => {
                tracing::error!(error = %context, "start.step_failed");
                Self::Fatal("Internal error while starting the conversation; see the server log.".into())
            }
            unavailable @ Error::Unavailable(_) => Self::Fatal(unavailable.to_string()),
            refused => Self::Refused(refused.to_string()),
        }
    }
}

impl From<AgentServerError> for StepError {
    fn from(error: AgentServerError) -> Self {
        match (error.retry(), error.fault()) {
            (Retry::Often, _) => Self::Retry(error.to_string()),
            (Retry::Few, fault) => Self::Refusal(fault, error.explanation()),
            (Retry::Never, Fault::User) => Self::Refused(error.explanation()),
            (Retry::Never, Fault::Server) => Self::Fatal(error.explanation()),
        }
    }
}

/// One worker's run of one task, with a cache of the data that it has read.
struct StartRun<'a> {
    saga: &'a Saga,
    lease: Lease<'a>,
    task: StartTask,
    sandbox: Option<Sandbox>,
    settings: Option<Settings>,
    skills: Option<Vec<SkillInfo>>,
    has_normal_selection: bool,
}

impl Saga {
    /// Advances a start as far as possible without long waits.
    ///
    /// # Errors
    /// [`Error::Store`] if the outcome could not be written: the queue should deliver the message again.
    pub async fn advance(&self, user: &UserId, id: Uuid) -> Result<Attempt> {
        let worker = id::random_base62(12);
        let task = match self.tasks.claim(user, id, &worker, self.config.lease).await? {
            Claim::Claimed(task) => *task,
            Claim::Held => return Ok(Attempt::Busy),
            Claim::Finished => return Ok(Attempt::Finished),
            Claim::Unknown => return Ok(Attempt::Unknown),
        };
        let lease =
            Lease { saga: self, user: user.clone(), id, worker, renewed_at: Arc::new(Mutex::new(Instant::now())) };
        let mut work = StartRun {
            saga: self,
            lease,
            task,
            sandbox: None,
            settings: None,
            skills: None,
            has_normal_selection: false,
        };
        work.run().await
    }

    /// Enqueues the jobs of overdue tasks again, up to the sweep's limit. Returns their number.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn sweep(&self) -> Result<usize> {
        sweep(&self.tasks.unfinished(), &self.queue, |row| AdvanceStart { user: row.user.clone(), task: row.id }).await
    }

    /// Ends a start with ERROR after workers have repeatedly failed at it.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn give_up(&self, user: &UserId, id: Uuid) -> Result<()> {
        let detail = "The conversation could not be started after several attempts. Please try again.";
        if self.tasks.give_up(user, id, detail).await? {
            metrics::start_ended(StartStatus::Error.as_str());
            tracing::error!(task = %id, "start.abandoned");
        }
        Ok(())
    }

    fn budget(&self, status: StartStatus) -> Duration {
        match status {
            StartStatus::WaitingForSandbox => self.config.sandbox_startup_timeout,
            StartStatus::PreparingRepository => self.config.clone_timeout,
            StartStatus::RunningSetupScript => self.config.setup_script_timeout,
            _ => self.config.step_timeout,
        }
    }
}

impl StartRun<'_> {
    async fn run(&mut self) -> Result<Attempt> {
        if let Some((fault, reason)) = self.reason_to_end() {
            return self.fail(fault, &reason).await;
        }
        let mut waiting_since = None;
        let mut polls = 0;
        loop {
            if self.task.record.failure.is_some() {
                return self.clean_up_and_end().await;
            }
            let (pause, change) = match self.step().await {
                Ok(Step::Ready) => return Ok(Attempt::Finished),
                Ok(Step::Next(status, change)) => {
                    (waiting_since, polls) = (None, 0);
                    match self.enter(status, change).await? {
                        Ok(()) => continue,
                        Err(LeaseLost) => return Ok(Attempt::Busy),
                    }
                }
                Ok(Step::Wait) if self.is_overdue() => {
                    return self.fail(self.fault_of_overdue(), &self.overdue_text()).await;
                }
                Ok(Step::Wait) => {
                    polls += 1;
                    let is_first_success = std::mem::take(&mut self.task.record.refusals) > 0;
                    let change = Change::default();
                    let change = if is_first_success { change.set("refusals", attempts(0)) } else { change };
                    (self.pause_after(polls), change)
                }
                Err(StepError::LeaseLost) => return Ok(Attempt::Busy),
                Err(StepError::Fatal(text)) => return self.fail(Fault::Server, &text).await,
                Err(StepError::Refused(text)) => return self.fail(Fault::User, &text).await,
                Err(StepError::Retry(text)) => match self.retry(&text) {
                    Some((delay, change)) => {
                        self.task.record.refusals = 0;
                        (delay, change.set("refusals", attempts(0)))
                    }
                    None => return self.fail(Fault::Server, &text).await,
                },
                Err(StepError::Refusal(fault, text)) => {
                    let refusals = self.task.record.refusals + 1;
                    self.task.record.refusals = refusals;
                    match self.retry(&text).filter(|_| refusals < MAX_REFUSALS) {
                        Some((_, change)) => {
                            let delay = advance_start::delay_after_refusal(refusals);
                            (delay, change.set("refusals", attempts(refusals)))
                        }
                        None => return self.fail(fault, &text).await,
                    }
                }
            };
            let waiting_since = waiting_since.get_or_insert_with(Instant::now);
            if waiting_since.elapsed() + pause > self.saga.config.inline_wait {
                return self.suspend(pause.max(QUEUE_DELAY), change).await;
            }
            if self.lease.keep_during(sleep(pause)).await.is_err() {
                return Ok(Attempt::Busy);
            }
        }
    }

    /// Counts a failed attempt at the step. Returns the backoff delay before the next attempt and the change that records the count, or
    /// `None` if there is no further attempt.
    fn retry(&mut self, reason: &str) -> Option<(Duration, Change)> {
        self.task.record.attempts += 1;
        let count = self.task.record.attempts;
        tracing::warn!(task = %self.task.record.id, status = ?self.status(), attempt = count, reason, "start.step_retried");
        if count >= MAX_ATTEMPTS || self.is_overdue() {
            return None;
        }
        // The cached state of the sandbox may be the cause.
        self.sandbox = None;
        let delay = advance_start::delay_after(count);
        Some((delay, Change::default().set("attempts", attempts(count))))
    }

    /// The poll interval after the n-th poll. Each poll of a command costs the agent server a scan of all its commands, so the interval
    /// grows with the wait (backoff). The limit is smaller while a sandbox boots, so that its first response is detected early.
    fn pause_after(&self, polls: u32) -> Duration {
        let slowest = match self.status() {
            StartStatus::WaitingForSandbox => MAX_BOOT_POLL_FACTOR,
            _ => MAX_POLL_FACTOR,
        };
        self.saga.config.poll * (polls / 2 + 1).min(slowest)
    }

    fn status(&self) -> StartStatus {
        self.task.record.now.status
    }

    /// The reason to end the start after workers have died during the step, if any. The step itself may kill them, so that no worker
    /// survives to check its deadline. One death proves nothing: a deployment also ends workers, and the step may be complete by now.
    fn reason_to_end(&self) -> Option<(Fault, String)> {
        let record = &self.task.record;
        if record.failure.is_some() || record.open_claims < 2 {
            return None;
        }
        let count = record.open_claims - 1;
        tracing::warn!(task = %record.id, status = ?self.status(), attempt = count, "start.worker_lost");
        if count >= MAX_ATTEMPTS {
            return Some((Fault::Server, format!("The step {:?} was interrupted {count} times", self.status())));
        }
        (count > 1 && self.is_overdue()).then(|| (self.fault_of_overdue(), self.overdue_text()))
    }

    fn is_overdue(&self) -> bool {
        self.task.record.deadline.is_some_and(|deadline| Time::now() > deadline)
    }

    /// The user's repository determines the duration of a clone and a setup script.
    fn fault_of_overdue(&self) -> Fault {
        match self.status() {
            StartStatus::PreparingRepository | StartStatus::RunningSetupScript => Fault::User,
            _ => Fault::Server,
        }
    }

    fn overdue_text(&self) -> String {
        let seconds = self.saga.budget(self.status()).as_secs();
        match self.status() {
            StartStatus::WaitingForSandbox => {
                let sandbox = self.task.record.now.sandbox_id.as_deref().unwrap_or_default();
                format!("Sandbox failed to start within {seconds}s: {sandbox}")
            }
            status => format!("The step {status:?} did not finish within {seconds}s"),
        }
    }

    /// Runs the step that the status names, and renews the lease meanwhile.
    async fn step(&mut self) -> Result<Step, StepError> {
        let (lease, overdue) = (self.lease.clone(), self.overdue_text());
        let time_left = self.task.record.deadline.map_or(STEP_GRACE, |deadline| deadline.since(Time::now()));
        // The futures are boxed: a step that calls other functions uses so much of the thread's stack that little is left for its caller.
        let step = async {
            self.use_normal_selection().await?;
            match self.status() {
                StartStatus::Working => Box::pin(self.choose_sandbox()).await,
                StartStatus::WaitingForSandbox => Box::pin(self.wait_for_sandbox()).await,
                StartStatus::PreparingRepository => Box::pin(self.prepare_repository()).await,
                StartStatus::RunningSetupScript => Box::pin(self.run_setup_script()).await,
                StartStatus::SettingUpGitHooks => Box::pin(self.set_up_git_hooks()).await,
                StartStatus::SettingUpSkills => Box::pin(self.set_up_skills()).await,
                StartStatus::StartingConversation => Box::pin(self.start_conversation()).await,
                StartStatus::Ready | StartStatus::Error => Ok(Step::Ready),
            }
        };
        // A step ends even if one of its calls hangs; otherwise the lease would be renewed forever.
        match lease.keep_during(tokio::time::timeout(time_left + STEP_GRACE, step)).await {
            Ok(Ok(done)) => done,
            Ok(Err(_elapsed)) => Err(StepError::Retry(overdue)),
            Err(LeaseLost) => Err(StepError::LeaseLost),
        }
    }

    /// Records that a step is done, and enters the next one.
    async fn enter(&mut self, status: StartStatus, change: Change) -> Result<Result<(), LeaseLost>> {
        let record = &mut self.task.record;
        let now = Time::now();
        let deadline = now.plus(self.saga.budget(status));
        let (step, took) = (record.now.status, now.since(record.now.updated_at));
        record.now = Snapshot { status, updated_at: now, ..record.now.clone() };
        (record.deadline, record.attempts, record.refusals, record.command) = (Some(deadline), 0, 0, None);
        let change = change
            .state(record.id, &record.now)?
            .set("deadline", crate::dynamo::text(deadline.sortable()))
            .set("attempts", attempts(0))
            .set("open_claims", attempts(1))
            .remove("refusals")
            .remove("command");
        let saved = self.saga.tasks.save(&record.user, record.id, &self.lease.worker, &change).await?;
        if saved.is_ok() {
            tracing::info!(task = %record.id, ?status, "start.advanced");
            metrics::step_ended(step.as_str(), took);
        }
        Ok(saved)
    }

    /// Releases the task and enqueues a delayed job.
    async fn suspend(&self, delay: Duration, change: Change) -> Result<Attempt> {
        let record = &self.task.record;
        let mut change = change;
        if let Some(command) = &record.command {
            change = change.command(command)?;
        }
        let released = self
            .saga
            .tasks
            .release(&record.user, record.id, &self.lease.worker, Time::now().plus(delay), change)
            .await?;
        if released.is_err() {
            return Ok(Attempt::Busy);
        }
        let job = AdvanceStart { user: record.user.clone(), task: record.id }.into();
        if let Err(error) = self.saga.queue.send(&job, delay).await {
            tracing::warn!(task = %record.id, error = %error.context(), "start.enqueue_failed");
        }
        Ok(Attempt::Waiting)
    }

    /// Ends the start with ERROR. It records the reason first, so that a crash does not change it, then runs the compensation (clean-up).
    async fn fail(&mut self, fault: Fault, reason: &str) -> Result<Attempt> {
        let record = &mut self.task.record;
        let status = record.now.status;
        tracing::warn!(task = %record.id, ?status, fault = fault.as_str(), reason, "start.failed");
        let notes = record.notes.iter().map(String::as_str);
        let failure = notes.chain([reason]).collect::<Vec<_>>().join("\n");
        let change = Change::default().set("failure", crate::dynamo::text(&failure));
        if self.saga.tasks.save(&record.user, record.id, &self.lease.worker, &change).await?.is_err() {
            return Ok(Attempt::Busy);
        }
        record.failure = Some(failure);
        self.clean_up_and_end().await
    }

    async fn clean_up_and_end(&self) -> Result<Attempt> {
        let record = &self.task.record;
        let mut detail = record.failure.clone().unwrap_or_default();
        match self.lease.keep_during(self.clean_up()).await {
            Ok(Ok(None)) => {}
            Ok(Ok(Some(left))) => detail += &format!("\n{left}"),
            Ok(Err(error)) => {
                tracing::warn!(task = %record.id, error = %error.context(), "start.not_cleaned_up");
                let of_others = record.now.sandbox_id.as_deref().filter(|id| *id != record.new_sandbox_id);
                detail += &match of_others {
                    Some(sandbox) if record.now.status == StartStatus::StartingConversation => {
                        format!("\n{}", self.conversation_left_in(sandbox))
                    }
                    Some(_) => String::new(),
                    None => format!("\nIts sandbox {} could not be removed and may still run", record.new_sandbox_id),
                };
            }
            Err(LeaseLost) => return Ok(Attempt::Busy),
        }
        let snapshot = Snapshot {
            status: StartStatus::Error,
            updated_at: Time::now(),
            detail: Some(detail),
            ..record.now.clone()
        };
        let change = Change::default().state(record.id, &snapshot)?.finished();
        match self.saga.tasks.save(&record.user, record.id, &self.lease.worker, &change).await? {
            Ok(()) => {
                metrics::step_ended(record.now.status.as_str(), snapshot.updated_at.since(record.now.updated_at));
                metrics::start_ended(snapshot.status.as_str());
                Ok(Attempt::Finished)
            }
            Err(LeaseLost) => Ok(Attempt::Busy),
        }
    }

    /// Compensation: removes the sandbox that this start created, unless it holds a conversation, or else removes this start's conversation
    /// from a shared sandbox. Returns a text for the user about resources that could not be removed.
    async fn clean_up(&self) -> Result<Option<String>> {
        let record = &self.task.record;
        let (user, id) = (&record.user, &record.new_sandbox_id);
        if self.saga.sandboxes.get(user, id).await?.is_none() {
            return self.clean_up_conversation().await;
        }
        // A stub from the agent server's webhook does not keep the sandbox alive: the stub belongs to this start.
        if let Lookup::Present(known) = self.saga.conversations.lookup(user, record.conversation_id).await?
            && known.is_stub
            && known.record.sandbox_id == *id
        {
            self.saga.conversations.begin_deletion(user, &[known.record], Time::now()).await?;
        }
        if self.saga.conversations.count_in_sandbox(user, id).await? > 0 {
            return self.clean_up_conversation().await;
        }
        self.saga.sandboxes.delete(user, id).await.map(|_| None)
    }

    fn conversation_left_in(&self, sandbox: &str) -> String {
        format!("Its conversation {} may still be in the sandbox {sandbox}", self.task.record.conversation_id)
    }

    /// Removes this start's conversation from a sandbox that outlives the start. An agent server keeps a conversation whose agent could not
    /// be set up, so without the removal it would stay forever.
    async fn clean_up_conversation(&self) -> Result<Option<String>> {
        let record = &self.task.record;
        let (user, conversation) = (&record.user, record.conversation_id);
        let Some(sandbox) =
            record.now.sandbox_id.as_deref().filter(|_| self.status() == StartStatus::StartingConversation)
        else {
            return Ok(None);
        };
        let stub = match self.saga.conversations.lookup(user, conversation).await? {
            Lookup::Absent => None,
            Lookup::Present(known) if known.is_stub && known.record.sandbox_id == sandbox => Some(known.record),
            // The conversation belongs to another start, or is being deleted.
            Lookup::Present(_) | Lookup::Deleting => return Ok(None),
        };
        let found = self.saga.sandboxes.get(user, sandbox).await?;
        let Some(agent_server) = found.and_then(|sandbox| sandbox.agent_server(&self.saga.http)) else {
            return Ok(None);
        };
        match self.remove_from(&agent_server).await {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            // The conversation stays, so its record stays as well.
            Err(error) => {
                tracing::warn!(task = %record.id, %error, "start.conversation_not_removed");
                return Ok(Some(self.conversation_left_in(sandbox)));
            }
        }
        let Some(stub) = stub else { return Ok(None) };
        // The deletion of a sandbox's last conversation also deletes the sandbox. A failed start must not cause that.
        if self.saga.conversations.count_in_sandbox(user, sandbox).await? > 1 {
            self.saga.conversations.begin_deletion(user, &[stub], Time::now()).await?;
            return Ok(None);
        }
        Ok(Some(format!(
            "Its conversation {conversation} stays listed, without messages; deleting it also deletes the sandbox {sandbox}"
        )))
    }

    /// Normalises the repository selection for all steps; the stored request keeps the form that the client sent.
    async fn use_normal_selection(&mut self) -> Result<(), StepError> {
        let is_given = self.task.request.selected_repository.as_deref().is_some_and(|text| !text.is_empty());
        if is_given && !std::mem::replace(&mut self.has_normal_selection, true) {
            let settings = self.settings().await?;
            self.task.request.use_normal_selection(&settings.provider_tokens);
        }
        Ok(())
    }

    /// The user's settings, read once per attempt.
    async fn settings(&mut self) -> Result<Settings, StepError> {
        if self.settings.is_none() {
            self.settings = Some(self.saga.settings.get(&self.task.record.user).await?.unwrap_or_default());
        }
        Ok(self.settings.clone().unwrap_or_default())
    }

    /// The error for a sandbox that is missing or in a final state. The user is responsible for a sandbox that they chose.
    fn lost_sandbox(&self, text: String) -> StepError {
        let chosen = self.task.request.sandbox_id.as_deref().is_some_and(|id| !id.is_empty());
        if chosen { StepError::Refused(text) } else { StepError::Fatal(text) }
    }

    /// Returns the running sandbox and its agent server; `None` while the sandbox starts.
    async fn running_sandbox(&mut self) -> Result<Option<(Sandbox, AgentServer)>, StepError> {
        if self.sandbox.is_none() {
            let id = self.task.record.now.sandbox_id.clone().unwrap_or_default();
            let found = self.saga.sandboxes.get(&self.task.record.user, &id).await?;
            let sandbox = found.ok_or_else(|| self.lost_sandbox(format!("Sandbox not found: {id}")))?;
            match sandbox.status {
                SandboxStatus::Running => self.sandbox = Some(sandbox),
                SandboxStatus::Starting | SandboxStatus::Paused => return Ok(None),
                SandboxStatus::Error | SandboxStatus::Missing => {
                    let text = with_detail(format!("The sandbox {id} ended during the start"), &sandbox);
                    return Err(self.lost_sandbox(text));
                }
            }
        }
        let Some(sandbox) = self.sandbox.clone() else { return Ok(None) };
        let agent_server = sandbox
            .agent_server(&self.saga.http)
            .ok_or_else(|| StepError::Fatal(format!("The sandbox {} has no agent server address", sandbox.id)))?;
        Ok(Some((sandbox, agent_server)))
    }

    /// The folders of this conversation. With grouping, each conversation of a sandbox has a working directory of its own.
    async fn folders(&mut self, sandbox: &Sandbox) -> Result<Folders, StepError> {
        let grouped = self.settings().await?.sandbox_grouping_strategy != SandboxGroupingStrategy::NoGrouping;
        let root = sandbox.working_dir.trim_end_matches('/');
        let working_dir =
            if grouped { format!("{root}/{}", id::hex(self.task.record.conversation_id)) } else { root.to_owned() };
        let repository = self.task.request.selected_repository.as_deref().filter(|name| !name.is_empty());
        let name = repository.and_then(|name| name.rsplit('/').next()).map(ToOwned::to_owned);
        let parent = root.rsplit_once('/').map_or("/", |(parent, _)| if parent.is_empty() { "/" } else { parent });
        Ok(Folders {
            project_dir: name.as_ref().map_or_else(|| working_dir.clone(), |name| format!("{working_dir}/{name}")),
            state: format!("{}/.openhands-start/{}", parent.trim_end_matches('/'), id::hex(self.task.record.id)),
            parent: parent.to_owned(),
            working_dir,
        })
    }
}

/// Absolute folders in the sandbox.
struct Folders {
    /// The conversation's folder, or the folder into which its repository is cloned.
    working_dir: String,
    /// The agent's working directory: the clone if there is one.
    project_dir: String,
    /// A folder that exists in every sandbox.
    parent: String,
    /// The folder for state of the start's commands.
    state: String,
}

/// A worker's lease on a task, renewed while it works.
#[derive(Clone)]
struct Lease<'a> {
    saga: &'a Saga,
    user: UserId,
    id: Uuid,
    worker: String,
    /// Clones share it, so that a sequence of short operations renews the lease like one long operation.
    renewed_at: Arc<Mutex<Instant>>,
}

impl Lease<'_> {
    /// Runs the work and renews the lease. If the lease is lost, the work is dropped.
    async fn keep_during<T>(&self, work: impl Future<Output = T>) -> Result<T, LeaseLost> {
        let mut work = std::pin::pin!(work);
        let duration = self.saga.config.lease;
        loop {
            let renewed_at = self.renewed_at();
            // A renewal after a third of the lease leaves time for two failed attempts.
            let next = renewed_at + duration / 3;
            tokio::select! {
                biased;
                done = &mut work => return Ok(done),
                () = sleep_until(next) => {}
            }
            match self.saga.tasks.renew(&self.user, self.id, &self.worker, duration).await {
                Ok(Ok(())) => self.note_renewal(),
                Err(error) if renewed_at.elapsed() < duration => {
                    tracing::warn!(task = %self.id, error = %error.context(), "start.lease_not_renewed");
                    sleep(duration / 10).await;
                }
                Ok(Err(LeaseLost)) | Err(_) => return Err(LeaseLost),
            }
        }
    }

    fn renewed_at(&self) -> Instant {
        self.renewed_at.lock().map_or_else(|_| Instant::now(), |at| *at)
    }

    fn note_renewal(&self) {
        if let Ok(mut at) = self.renewed_at.lock() {
            *at = Instant::now();
        }
    }
}

fn with_detail(text: String, sandbox: &Sandbox) -> String {
    match &sandbox.detail {
        Some(detail) => format!("{text}. {detail}"),
        None => text,
    }
}
