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
mod step_error;
mod wait_for_sandbox;

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_sdk_dynamodb::types::TransactWriteItem;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use uuid::Uuid;

use self::prepare_repository::Scripts;
use self::start_conversation::Loaded;
use self::step_error::StepError;
use super::request::StartRequest;
use super::store::{Abandoned, Change, Claim, LeaseLost, StartTaskStore, attempts};
use super::task::{Snapshot, StartStatus, StartTask};
use crate::agent_server::{AgentServer, SkillInfo};
use crate::clock::Time;
use crate::config::StartConfig;
use crate::conversation::ConversationRecord;
use crate::conversation::reports::Lookup;
use crate::conversation::store::ConversationStore;
use crate::dynamo::DueRow;
use crate::error::{Error, ErrorClass, Result};
use crate::http_client::HttpClient;
use crate::id::{self, UserId};
use crate::jobs::advance_start::{self, AdvanceStart, MAX_ATTEMPTS, MAX_REFUSALS};
use crate::jobs::queue::JobQueue;
use crate::jobs::sweep::sweep_and_observe;
use crate::metrics::{self, Age, Outcome};
use crate::sandbox::boots::{BootObserver, BootWaiter, LONGEST_WAIT};
use crate::sandbox::reconciler::SandboxReconciler;
use crate::sandbox::store::SandboxRecord;
use crate::sandbox::{Sandbox, SandboxService, SandboxStatus};
use crate::user::seal::Sealer;
use crate::user::settings::{SandboxGroupingStrategy, Settings, SettingsStore};

/// Upper limit of the poll backoff: the interval is at most this multiple of the base interval.
const MAX_POLL_FACTOR: u32 = 10;
/// The same limit while a sandbox boots.
const MAX_BOOT_POLL_FACTOR: u32 = 3;
/// Time that a step has after its deadline to end by itself.
const STEP_GRACE: Duration = Duration::from_secs(30);
/// The longest time after a step's deadline in which failed requests are repeated. In it, a provider recovers from a short outage.
const LONGEST_GRACE: Duration = Duration::from_secs(60);
/// The part of a lease's duration that work has to complete after the lease was lost.
const LAST_MOMENT: u32 = 15;
/// An alarm is raised each time after this number of failed attempts to undo what a start made.
const COMPENSATION_ALARM: u32 = 8;
/// The time by which clocks and leases may delay the due time of a start after its wait.
const OBSERVATION_MARGIN: Duration = Duration::from_secs(30);
/// The time within which a worker ends a run. Lambda ends the worker after 150 s (`schema::WORKER_TIMEOUT`), with whatever it waits for.
const LONGEST_RUN: Duration = Duration::from_secs(140);
/// The smallest delay of a queue message.
const QUEUE_DELAY: Duration = Duration::from_secs(1);
/// The delays between the polls of a start that waits without a worker: they grow with each wait in a step, up to
/// [`StartConfig::max_poll_delay`].
const WAIT_DELAYS: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
    Duration::from_secs(15),
];
/// The same delays for a command that notifies this API of its end. The polls are for notifications that are lost.
const COMMAND_WAIT_DELAYS: [Duration; 4] =
    [Duration::from_secs(5), Duration::from_secs(15), Duration::from_secs(40), Duration::from_secs(60)];
/// A worker that resumes a waiting start waits this fraction of [`StartConfig::inline_wait`]: enough for a second poll of a command that has
/// just notified this API.
const RESUMED_INLINE_WAIT: u32 = 10;
/// The time between the time limit of a step's command and the deadline of the step. In this time the supervisor ends the command, and a
/// worker polls its outcome, so that a command whose time is up always ends before its step does.
const COMMAND_MARGIN: Duration = Duration::from_secs(30);

/// The dependencies of the start saga.
#[derive(Clone, Debug)]
pub struct Saga {
    pub tasks: StartTaskStore,
    pub conversations: ConversationStore,
    pub sandboxes: Arc<dyn SandboxService>,
    /// Holds the records of sandboxes, which starts join and leave.
    pub reconciler: SandboxReconciler,
    /// Observes the sandboxes that starts wait for.
    pub boots: BootObserver,
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
    /// The task is READY, or ERROR and what it made has been undone.
    Finished,
    /// The task is ERROR, and what it made could not be undone yet; a delayed job is enqueued.
    Compensating,
    /// The start waits; a delayed job is enqueued.
    Waiting,
    /// Another worker holds the lease.
    Busy,
    /// No task with this id exists.
    Unknown,
}

/// The outcome of a step.
enum Step {
    /// The step is done: enter these statuses, one after the other, with these changes. All but the last one have nothing to do.
    Next(&'static [StartStatus], Change),
    /// The step has chosen a sandbox: enter the next status together with these writes, by which the start joins that sandbox and leaves
    /// its own one if that is another.
    Join(Vec<TransactWriteItem>),
    /// The step waits for an event in the sandbox and is polled again.
    Wait,
    /// The start is done and recorded.
    Ready,
}

/// One worker's run of one task, with a cache of the data that it has read.
#[expect(clippy::struct_excessive_bools, reason = "independent facts about one run")]
struct StartRun<'a> {
    saga: &'a Saga,
    lease: Lease<'a>,
    task: StartTask,
    sandbox: Option<Sandbox>,
    /// The sandbox that the first step has chosen and found running, for the step after it.
    chosen: Option<Sandbox>,
    /// The last known status of the sandbox while the step waits for it.
    boot: Option<SandboxStatus>,
    /// Whether this run has resumed the sandbox. A provider needs some time for that, and reports the sandbox as paused meanwhile.
    has_resumed: bool,
    settings: Option<Settings>,
    skills: Option<Vec<SkillInfo>>,
    /// The skills that do not depend on the project, which are loaded while the workspace is prepared.
    skills_ahead: JoinSet<Option<Vec<SkillInfo>>>,
    /// What the step that creates the conversation needs, if it was loaded together with the skills.
    loaded: Option<Loaded>,
    /// The scripts of the project, as the command that prepared the workspace saw them. `None` if another worker ran that command.
    scripts: Option<Scripts>,
    has_normal_selection: bool,
    /// Whether the deadline of the step was moved while the start waits for capacity.
    has_moved_deadline: bool,
    /// Whether the agent server may have received the request to create the conversation. The status is written before the request, so a
    /// worker that finds the task in this status must assume that an earlier worker has sent it.
    is_create_sent: bool,
    /// When this worker began with the task.
    began: Instant,
    /// When this worker last asked the agent server for its uptime.
    asked_uptime_at: Option<Instant>,
}

impl Saga {
    /// Advances a start as far as possible without long waits.
    ///
    /// # Errors
    /// [`Error::Store`] if the outcome could not be written: the queue should deliver the message again.
    pub async fn advance(&self, job: &AdvanceStart) -> Result<Attempt> {
        let (user, id) = (&job.user, job.task);
        let worker = id::random_base62(12);
        let task = match self.tasks.claim(user, id, &worker, self.config.lease, job.due_at).await? {
            Claim::Claimed(task) => *task,
            // Compensation does not need the request.
            Claim::Failed(record) => StartTask { record: *record, request: StartRequest::default() },
            Claim::Expired(record) => {
                if self.tasks.remove_failed(user, &record).await? {
                    tracing::info!(task = %id, "start.expired");
                }
                return Ok(Attempt::Finished);
            }
            Claim::Held => return Ok(Attempt::Busy),
            Claim::Finished => return Ok(Attempt::Finished),
            Claim::Unknown => return Ok(Attempt::Unknown),
        };
        task.record.record_in_log();
        let is_create_sent = task.record.now.status == StartStatus::StartingConversation;
        let lease =
            Lease { saga: self, user: user.clone(), id, worker, renewed_at: Arc::new(Mutex::new(Instant::now())) };
        let mut work = StartRun {
            saga: self,
            lease,
            task,
            sandbox: None,
            chosen: None,
            boot: None,
            has_resumed: false,
            settings: None,
            skills: None,
            skills_ahead: JoinSet::new(),
            loaded: None,
            scripts: None,
            has_normal_selection: false,
            has_moved_deadline: false,
            is_create_sent,
            began: Instant::now(),
            asked_uptime_at: None,
        };
        work.run().await
    }

    /// Enqueues the jobs of overdue tasks again, up to the sweep's limit. Returns their number.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn sweep(&self) -> Result<usize> {
        let job = |row: &DueRow| Some(AdvanceStart { user: row.user.clone(), task: row.uuid()?, due_at: None });
        // Every unfinished start is due before this, because no wait is longer.
        let ahead = LONGEST_WAIT.max(self.config.max_poll_delay) + OBSERVATION_MARGIN;
        let swept = sweep_and_observe(&self.tasks.unfinished(), &self.queue, ahead, job).await;
        if let Some(observed) = &swept.observed
            && let Err(error) = self.observe(observed, &swept.enqueued).await
        {
            tracing::warn!(error = %error.context(), "start.not_observed");
        }
        swept.result()
    }

    /// Records the number of unfinished starts, and logs those whose jobs were enqueued again.
    async fn observe(&self, rows: &[DueRow], enqueued: &[DueRow]) -> Result<()> {
        let enqueued: HashSet<Uuid> = enqueued.iter().filter_map(DueRow::uuid).collect();
        let (now, mut counts) = (Time::now(), [0; Age::ALL.len()]);
        for start in self.tasks.unfinished_starts(rows).await? {
            if !start.has_failed {
                let age = start.created_at.map_or(Age::Older, |at| Age::of(now.since(at)));
                counts[age as usize] += 1;
            }
            if enqueued.contains(&start.task) {
                start.span().in_scope(|| tracing::info!(task = %start.task, "start.requeued"));
            }
        }
        metrics::unfinished_starts(counts);
        Ok(())
    }

    /// Ends a start with ERROR after workers have repeatedly failed at it, and enqueues the job that undoes what it made. If workers fail
    /// repeatedly at that as well, the sweep enqueues the job again.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn give_up(&self, user: &UserId, id: Uuid) -> Result<()> {
        let detail = "The conversation could not be started after several attempts. Please try again.";
        match self.tasks.abandon(user, id, detail).await? {
            Abandoned::Now { free_at, record } => {
                record.record_in_log();
                let class = ErrorClass::Ours;
                metrics::start_ended(Outcome::Error, Time::now().since(record.created_at), record.claims);
                metrics::start_failed(class);
                tracing::error!(task = %id, class = class.as_str(), "start.abandoned");
                enqueue(&self.queue, user, id, free_at.since(Time::now()), None).await;
            }
            Abandoned::Before(record) if record.compensation.is_some() => {
                record.record_in_log();
                tracing::error!(task = %id, attempt = record.compensation_attempts, "start.compensation_failing");
            }
            Abandoned::Before(_) | Abandoned::Unknown => {}
        }
        Ok(())
    }

    /// The configured time limit of a step.
    fn limit(&self, status: StartStatus) -> Duration {
        match status {
            StartStatus::WaitingForSandbox => self.config.sandbox_startup_timeout,
            StartStatus::PreparingRepository => self.config.clone_timeout,
            StartStatus::RunningSetupScript => self.config.setup_script_timeout,
            _ => self.config.step_timeout,
        }
    }

    /// The time from a step's beginning to its deadline.
    fn budget(&self, status: StartStatus) -> Duration {
        let runs_command = matches!(
            status,
            StartStatus::PreparingRepository | StartStatus::RunningSetupScript | StartStatus::SettingUpGitHooks
        );
        self.limit(status) + if runs_command { COMMAND_MARGIN } else { Duration::ZERO }
    }
}

impl StartRun<'_> {
    async fn run(&mut self) -> Result<Attempt> {
        if self.task.record.now.status.is_final() {
            return self.compensate().await;
        }
        // Earlier versions recorded the reason before they ended the task.
        if let Some(reason) = self.task.record.failure.take() {
            return self.fail(ErrorClass::Ours, &reason).await;
        }
        if let Some((class, reason)) = self.reason_to_end() {
            return self.fail(class, &reason).await;
        }
        let mut waiting_since = None;
        let mut polls = 0;
        loop {
            let began = Instant::now();
            let (pause, has_failed) = match self.step().await {
                Ok(Step::Ready) => return Ok(Attempt::Finished),
                Ok(Step::Next(statuses, change)) => {
                    (waiting_since, polls) = (None, 0);
                    match self.enter(statuses, change, Vec::new()).await? {
                        Ok(()) => continue,
                        Err(LeaseLost) => return Ok(Attempt::Busy),
                    }
                }
                Ok(Step::Join(writes)) => {
                    let before = self.task.record.clone();
                    if self.enter(&[StartStatus::WaitingForSandbox], Change::default(), writes).await?.is_ok() {
                        (waiting_since, polls) = (None, 0);
                        continue;
                    }
                    let chosen = std::mem::replace(&mut self.task.record, before).now.sandbox_id.unwrap_or_default();
                    let user = &self.task.record.user;
                    if self.saga.reconciler.records.get(user, &chosen).await?.is_some() {
                        return Ok(Attempt::Busy);
                    }
                    // The sandbox was deleted since it was chosen: choose again.
                    polls += 1;
                    (self.pause_after(polls), false)
                }
                Ok(Step::Wait) if self.is_overdue() => {
                    return self.fail(self.class_of_overdue(), &self.overdue_text()).await;
                }
                Ok(Step::Wait) => {
                    polls += 1;
                    // A step may have waited for its command.
                    waiting_since.get_or_insert(began);
                    // Only failures in a row count.
                    (self.task.record.attempts, self.task.record.refusals) = (0, 0);
                    (self.pause_after(polls), false)
                }
                Err(StepError::LeaseLost) => return Ok(Attempt::Busy),
                Err(StepError::Failed(class, text)) => return self.fail(class, &text).await,
                Err(StepError::Unreachable(text)) if self.is_past_grace() => {
                    return self.fail(ErrorClass::Sandbox, &text).await;
                }
                Err(StepError::Unreachable(_)) => {
                    polls += 1;
                    self.sandbox = None;
                    (advance_start::delay_after(polls), false)
                }
                Err(StepError::AtCapacity) => {
                    polls += 1;
                    // The time of the step does not run meanwhile. The other starts have deadlines, so that one of them ends.
                    self.task.record.deadline = Some(Time::now().plus(self.saga.budget(self.status())));
                    self.has_moved_deadline = true;
                    (advance_start::delay_after(polls), false)
                }
                Err(StepError::Retry(class, text)) => {
                    self.task.record.refusals = 0;
                    match self.retry(class, &text) {
                        Some(delay) => (delay, true),
                        None => return self.fail(class, &text).await,
                    }
                }
                Err(StepError::Refusal(class, text)) => {
                    let refusals = self.task.record.refusals + 1;
                    self.task.record.refusals = refusals;
                    match self.retry(class, &text).filter(|_| refusals < MAX_REFUSALS) {
                        Some(_) => (advance_start::delay_after_refusal(refusals), true),
                        None => return self.fail(class, &text).await,
                    }
                }
            };
            let waiting_since = waiting_since.get_or_insert_with(Instant::now);
            if waiting_since.elapsed() + pause > self.inline_wait() {
                let boot = self.boot.filter(|_| !has_failed);
                let delay = match boot {
                    _ if has_failed => pause.max(QUEUE_DELAY),
                    Some(_) => LONGEST_WAIT,
                    None => self.delay_of_wait(),
                };
                return self.suspend(delay, boot).await;
            }
            // A worker that dies during the pause must not reset the count of failures.
            if has_failed && self.save_failures().await?.is_err() {
                return Ok(Attempt::Busy);
            }
            if self.lease.keep_during(sleep(pause)).await.is_err() {
                return Ok(Attempt::Busy);
            }
        }
    }

    /// How long this worker may wait in the current step.
    fn inline_wait(&self) -> Duration {
        match self.task.record.waits {
            _ if self.boot.is_some() => self.saga.config.boot_inline_wait,
            0 => self.saga.config.inline_wait,
            _ => self.saga.config.inline_wait / RESUMED_INLINE_WAIT,
        }
    }

    /// Counts a wait without a worker, and returns its delay.
    fn delay_of_wait(&mut self) -> Duration {
        let record = &mut self.task.record;
        let notifies = record.command.is_some() && self.saga.sandboxes.sends_webhooks();
        let delay = delay_of_wait(notifies, record.waits).min(self.saga.config.max_poll_delay);
        record.waits += 1;
        // The first poll after the step's deadline ends the start.
        let left = record.deadline.map_or(delay, |deadline| deadline.since(Time::now()));
        delay.min(left).max(QUEUE_DELAY)
    }

    async fn save_failures(&self) -> Result<Result<(), LeaseLost>> {
        let record = &self.task.record;
        self.saga.tasks.save(&record.user, record.id, &self.lease.worker, &self.failures()).await
    }

    /// The change that records the failures of the current step.
    fn failures(&self) -> Change {
        let record = &self.task.record;
        Change::default().set("attempts", attempts(record.attempts)).set("refusals", attempts(record.refusals))
    }

    /// Counts a failed attempt at the step. Returns the backoff delay before the next attempt, or `None` if there is no further attempt.
    fn retry(&mut self, class: ErrorClass, reason: &str) -> Option<Duration> {
        self.task.record.attempts += 1;
        let count = self.task.record.attempts;
        tracing::warn!(task = %self.task.record.id, status = ?self.status(), attempt = count, reason, "start.step_retried");
        // Failures of the store are limited by their number alone: the step may be complete, and only a later attempt can record that.
        if count >= MAX_ATTEMPTS || (self.is_past_grace() && class != ErrorClass::Store) {
            return None;
        }
        // The cached state of the sandbox may be the cause.
        self.sandbox = None;
        Some(advance_start::delay_after(count))
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

    /// The step that the start is at, or at which it failed.
    fn status(&self) -> StartStatus {
        self.task.record.step()
    }

    /// The reason to end the start after workers have died during the step, if any. The step itself may kill them, so that no worker
    /// survives to check its deadline. One death proves nothing: a deployment also ends workers, and the step may be complete by now.
    fn reason_to_end(&self) -> Option<(ErrorClass, String)> {
        let record = &self.task.record;
        if record.open_claims < 2 {
            return None;
        }
        let count = record.open_claims - 1;
        tracing::warn!(task = %record.id, status = ?self.status(), attempt = count, "start.worker_lost");
        if count >= MAX_ATTEMPTS {
            return Some((ErrorClass::Ours, format!("The step {:?} was interrupted {count} times", self.status())));
        }
        (count > 1 && self.is_overdue()).then(|| (self.class_of_overdue(), self.overdue_text()))
    }

    fn is_overdue(&self) -> bool {
        self.task.record.deadline.is_some_and(|deadline| Time::now() > deadline)
    }

    /// Whether the step's deadline has passed so long ago that a failed request ends the start. A request that fails says nothing about the
    /// step, which may be complete by now, so the one request after the deadline must not decide.
    fn is_past_grace(&self) -> bool {
        let grace = grace(self.saga.budget(self.status()));
        self.task.record.deadline.is_some_and(|deadline| Time::now() > deadline.plus(grace))
    }

    /// When a start that waits must be continued in any case: at the step's deadline; if that has passed, at the end of the time for
    /// repeated requests.
    fn end_of_wait(&self) -> Option<Time> {
        let deadline = self.task.record.deadline?;
        Some(if self.is_overdue() { deadline.plus(grace(self.saga.budget(self.status()))) } else { deadline })
    }

    /// The class of the cause why a step has not ended before its deadline.
    fn class_of_overdue(&self) -> ErrorClass {
        match self.status() {
            // The user's repository determines the duration of a clone and a setup script.
            StartStatus::PreparingRepository | StartStatus::RunningSetupScript => ErrorClass::Repository,
            StartStatus::WaitingForSandbox => ErrorClass::Sandbox,
            _ if self.boot.is_some() => ErrorClass::Sandbox,
            StartStatus::SettingUpGitHooks | StartStatus::SettingUpSkills => ErrorClass::AgentServer,
            // Only the transaction that records the conversation is waited for.
            StartStatus::StartingConversation => ErrorClass::Store,
            // Only a deletion of the conversation's former record is waited for.
            StartStatus::Working | StartStatus::Ready | StartStatus::Error => ErrorClass::Ours,
        }
    }

    fn overdue_text(&self) -> String {
        let seconds = self.saga.limit(self.status()).as_secs();
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
        self.boot = None;
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
            // Every call of a step has a time limit of its own, so none should last that long.
            Ok(Err(_elapsed)) => Err(StepError::Retry(ErrorClass::Ours, overdue)),
            Err(LeaseLost) => Err(StepError::LeaseLost),
        }
    }

    /// Records that a step is done, and enters the next one, together with other writes. Of several statuses all but the last one are
    /// passed: they are in the history. Returns [`LeaseLost`] also if a condition of the other writes fails.
    async fn enter(
        &mut self,
        statuses: &[StartStatus],
        mut change: Change,
        others: Vec<TransactWriteItem>,
    ) -> Result<Result<(), LeaseLost>> {
        let record = &mut self.task.record;
        let (before, now) = (record.now.clone(), Time::now());
        let states: Vec<Snapshot> =
            statuses.iter().map(|status| Snapshot { status: *status, updated_at: now, ..before.clone() }).collect();
        let Some((state, passed)) = states.split_last() else { return Ok(Ok(())) };
        let deadline = now.plus(self.saga.budget(state.status));
        record.now = state.clone();
        (record.deadline, record.attempts, record.refusals, record.waits, record.command) =
            (Some(deadline), 0, 0, 0, None);
        for state in passed {
            change = change.passed_state(state)?;
        }
        let change = change
            .state(record.id, state)?
            .set("deadline", crate::dynamo::text(deadline.sortable()))
            .set("attempts", attempts(0))
            .set("open_claims", attempts(1))
            .remove("refusals")
            .remove("waits")
            .remove("command");
        let (tasks, user, id, worker) = (&self.saga.tasks, &record.user, record.id, &self.lease.worker);
        let saved = tasks.save_with(user, id, worker, &change, others).await?;
        if saved.is_ok() {
            record.record_in_log();
            let mut since = before;
            for state in states {
                tracing::info!(task = %record.id, status = ?state.status, "start.advanced");
                metrics::step_ended(since.status.as_str(), now.since(since.updated_at));
                record.history.push(state.clone());
                since = state;
            }
        }
        Ok(saved)
    }

    /// Releases the task, and enqueues a delayed job or, if the start waits for its sandbox, leaves it to the observer of boots to continue
    /// the start. `boot` is the status of that sandbox.
    async fn suspend(&self, delay: Duration, boot: Option<SandboxStatus>) -> Result<Attempt> {
        let record = &self.task.record;
        let mut change = self.failures().set("waits", attempts(record.waits));
        if let Some(deadline) = record.deadline.filter(|_| self.has_moved_deadline) {
            change = change.set("deadline", crate::dynamo::text(deadline.sortable()));
        }
        if let Some(command) = &record.command {
            change = change.command(command)?;
        }
        let wake_at = Time::now().plus(delay);
        let released = self.saga.tasks.release(&record.user, record.id, &self.lease.worker, wake_at, change).await?;
        let Ok(due_at) = released else { return Ok(Attempt::Busy) };
        if let Some(seen) = boot {
            let now = Time::now();
            let waiter = BootWaiter {
                task: record.id,
                user: record.user.clone(),
                sandbox: record.now.sandbox_id.clone().unwrap_or_default(),
                seen,
                since: now,
                until: self.end_of_wait().unwrap_or_else(|| now.plus(LONGEST_WAIT)),
            };
            match self.saga.boots.wait(&waiter).await {
                Ok(()) => return Ok(Attempt::Waiting),
                Err(error) => tracing::warn!(task = %record.id, error = %error.context(), "start.boot_not_observed"),
            }
        }
        let delay = if boot.is_some() { delay_of_wait(false, record.waits) } else { delay };
        enqueue(&self.saga.queue, &record.user, record.id, delay, Some(due_at)).await;
        Ok(Attempt::Waiting)
    }

    /// Ends the start with ERROR, which its user sees at once, and then undoes what it made (compensation).
    async fn fail(&mut self, class: ErrorClass, reason: &str) -> Result<Attempt> {
        let record = &mut self.task.record;
        let (step, since) = (record.now.status, record.now.updated_at);
        let fault = class.fault().as_str();
        tracing::warn!(task = %record.id, status = ?step, class = class.as_str(), fault, reason, "start.failed");
        let notes = record.notes.iter().map(String::as_str);
        let failure = notes.chain([reason]).collect::<Vec<_>>().join("\n");
        let snapshot = Snapshot {
            status: StartStatus::Error,
            updated_at: Time::now(),
            detail: Some(failure.clone()),
            ..record.now.clone()
        };
        if self.saga.tasks.fail(&record.user, record.id, &self.lease.worker, &snapshot).await?.is_err() {
            return Ok(Attempt::Busy);
        }
        metrics::step_ended(step.as_str(), snapshot.updated_at.since(since));
        metrics::start_ended(Outcome::Error, snapshot.updated_at.since(record.created_at), record.claims);
        metrics::start_failed(class);
        record.history.push(snapshot.clone());
        (record.now, record.failure) = (snapshot, Some(failure));
        self.compensate().await
    }

    /// Undoes what a failed start made. If that fails it is retried, without end: what is left costs money. The user sees what is left.
    async fn compensate(&self) -> Result<Attempt> {
        let record = &self.task.record;
        let (user, id, worker, tasks) = (&record.user, record.id, &self.lease.worker, &self.saga.tasks);
        let failure = record.failure.clone().unwrap_or_default();
        let with_detail = |left: Option<String>| {
            let detail = left.map_or_else(|| failure.clone(), |left| format!("{failure}\n{left}"));
            let is_shown = record.now.detail.as_ref() == Some(&detail);
            if is_shown { Change::default() } else { StartTaskStore::detail(record, &detail) }
        };
        let error = match self.lease.keep_during(self.clean_up()).await {
            Ok(Ok(left)) => {
                let saved = tasks.compensated(user, id, worker, with_detail(left)).await?;
                return Ok(if saved.is_ok() { Attempt::Finished } else { Attempt::Busy });
            }
            Ok(Err(error)) => error,
            Err(LeaseLost) => return Ok(Attempt::Busy),
        };
        let count = record.compensation_attempts.saturating_add(1);
        tracing::warn!(task = %id, attempt = count, error = %error.context(), "start.not_cleaned_up");
        if count.is_multiple_of(COMPENSATION_ALARM) {
            tracing::error!(task = %id, attempt = count, "start.compensation_failing");
        }
        let of_others = record.now.sandbox_id.as_deref().filter(|id| *id != record.new_sandbox_id);
        let left = match of_others {
            Some(sandbox) if self.status() == StartStatus::StartingConversation => {
                Some(self.conversation_left_in(sandbox))
            }
            Some(_) => None,
            None => Some(format!(
                "Its sandbox {} could not be removed yet and may still run; the removal is retried",
                record.new_sandbox_id
            )),
        };
        let delay = advance_start::delay_after_compensation(count);
        let change = with_detail(left).set("compensation_attempts", attempts(count));
        let Ok(due_at) = tasks.release(user, id, worker, Time::now().plus(delay), change).await? else {
            return Ok(Attempt::Busy);
        };
        enqueue(&self.saga.queue, user, id, delay, Some(due_at)).await;
        Ok(Attempt::Compensating)
    }

    /// Compensation: ends the membership of this start in its sandboxes, and removes its conversation from a sandbox that outlives it. The
    /// reconciler deletes a sandbox that is unused then. Returns a text for the user about what could not be removed.
    async fn clean_up(&self) -> Result<Option<String>> {
        let (record, reconciler) = (&self.task.record, &self.saga.reconciler);
        let (user, own) = (&record.user, record.new_sandbox_id.as_str());
        // A start that fails before it has chosen a sandbox may be a member of the one that its request names.
        let chosen = record.now.sandbox_id.as_deref().or(record.given_sandbox_id.as_deref());
        let mut left = None;
        for sandbox in chosen.filter(|chosen| *chosen != own).into_iter().chain([own]) {
            let Some(kept) = reconciler.records.leave(user, sandbox, record.id, sandbox == own).await? else {
                continue;
            };
            let stub = self.stub_in(sandbox).await?;
            let others = kept.members() - usize::from(stub.as_ref().is_some_and(|stub| kept.has_conversation(stub.id)));
            if others > 0 || !kept.delete_when_empty {
                left = left.or(self.clean_up_conversation(sandbox, stub).await?);
                continue;
            }
            // A stub from the agent server's webhook does not keep the sandbox alive: the stub belongs to this start.
            let kept = match stub {
                Some(stub) => self.delete_stub(sandbox, stub).await?.unwrap_or(kept),
                None => kept,
            };
            reconciler.member_left(&kept).await;
        }
        Ok(left)
    }

    /// The record that a webhook has made of this start's conversation in a sandbox.
    async fn stub_in(&self, sandbox: &str) -> Result<Option<ConversationRecord>> {
        let record = &self.task.record;
        Ok(match self.saga.conversations.lookup(&record.user, record.conversation_id).await? {
            Lookup::Present(known) if known.is_stub && known.record.sandbox_id == sandbox => Some(known.record),
            _ => None,
        })
    }

    /// Deletes the stub of a failed start. Unlike the deletion of a conversation by its user, this does not delete a sandbox that stays
    /// without members. Returns the sandbox's record.
    async fn delete_stub(&self, sandbox: &str, stub: ConversationRecord) -> Result<Option<SandboxRecord>> {
        let user = &self.task.record.user;
        let kept = self.saga.reconciler.records.remove_conversation(user, sandbox, stub.id, false).await?;
        self.saga.conversations.begin_deletion(user, &[stub], Time::now()).await?;
        Ok(kept)
    }

    fn conversation_left_in(&self, sandbox: &str) -> String {
        format!("Its conversation {} may still be in the sandbox {sandbox}", self.task.record.conversation_id)
    }

    /// Removes this start's conversation from a sandbox that outlives the start. An agent server keeps a conversation whose agent could not
    /// be set up, so without the removal it would stay forever.
    async fn clean_up_conversation(&self, sandbox: &str, stub: Option<ConversationRecord>) -> Result<Option<String>> {
        let record = &self.task.record;
        let (user, conversation) = (&record.user, record.conversation_id);
        if self.status() != StartStatus::StartingConversation || record.now.sandbox_id.as_deref() != Some(sandbox) {
            return Ok(None);
        }
        if stub.is_none() && self.saga.conversations.lookup(user, conversation).await? != Lookup::Absent {
            // The conversation belongs to another start, or is being deleted.
            return Ok(None);
        }
        let found = self.saga.sandboxes.inspect(user, sandbox).await?;
        let Some(agent_server) = found.and_then(|sandbox| sandbox.agent_server(&self.saga.http)) else {
            return Ok(None);
        };
        match self.remove_from(&agent_server).await {
            Ok(true) => {}
            Ok(false) => return Ok(None),
            // The conversation stays for now, so its record stays as well.
            Err(error) => {
                return Err(Error::Upstream { message: error.explanation(), context: error.to_string() });
            }
        }
        if let Some(stub) = stub {
            self.delete_stub(sandbox, stub).await?;
        }
        Ok(None)
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

    /// The user's settings with the agent profile of the start, read once per attempt.
    async fn settings(&mut self) -> Result<Settings, StepError> {
        if self.settings.is_none() {
            let stored = self.saga.settings.get(&self.task.record.user).await?.unwrap_or_default();
            let settings = stored.with_agent_profile(self.task.request.agent_profile_id);
            self.settings = Some(settings.map_err(|error| StepError::Failed(ErrorClass::User, error.to_string()))?);
        }
        Ok(self.settings.clone().unwrap_or_default())
    }

    /// The error for a sandbox that is missing or in a final state. The user is responsible for a sandbox that they chose.
    fn lost_sandbox(&self, text: String) -> StepError {
        let chosen = self.task.request.sandbox_id.as_deref().is_some_and(|id| !id.is_empty());
        StepError::Failed(if chosen { ErrorClass::User } else { ErrorClass::Sandbox }, text)
    }

    /// Returns the running sandbox and its agent server; `None` while the sandbox starts. A paused sandbox is resumed.
    async fn running_sandbox(&mut self) -> Result<Option<(Sandbox, AgentServer)>, StepError> {
        if self.sandbox.is_none() {
            let id = self.task.record.now.sandbox_id.clone().unwrap_or_default();
            self.boot = Some(SandboxStatus::Starting);
            let found = self.saga.sandboxes.inspect(&self.task.record.user, &id).await?;
            let sandbox = found.ok_or_else(|| self.lost_sandbox(format!("Sandbox not found: {id}")))?;
            self.boot = Some(sandbox.status).filter(|status| *status != SandboxStatus::Running);
            match sandbox.status {
                SandboxStatus::Running => self.sandbox = Some(sandbox),
                SandboxStatus::Starting => return Ok(None),
                SandboxStatus::Paused => {
                    self.resume(&id).await?;
                    return Ok(None);
                }
                // The start survives the end of its agent server where the files of the sandbox do.
                SandboxStatus::Missing if self.saga.sandboxes.relaunches() => {
                    self.resume(&id).await?;
                    return Ok(None);
                }
                SandboxStatus::Error | SandboxStatus::Missing => {
                    let text = with_detail(format!("The sandbox {id} ended during the start"), &sandbox);
                    return Err(self.lost_sandbox(text));
                }
            }
        }
        let Some(sandbox) = self.sandbox.clone() else { return Ok(None) };
        let agent_server = sandbox.agent_server(&self.saga.http).ok_or_else(|| {
            let text = format!("The sandbox {} has no agent server address", sandbox.id);
            StepError::Failed(ErrorClass::Sandbox, text)
        })?;
        Ok(Some((sandbox, agent_server)))
    }

    /// Resumes a sandbox, once in each run.
    async fn resume(&mut self, id: &str) -> Result<(), StepError> {
        if !self.has_resumed {
            self.saga.sandboxes.resume(&self.task.record.user, id).await?;
            self.has_resumed = true;
        }
        Ok(())
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

/// The time after a step's deadline in which failed requests are repeated, if the step has this much time.
fn grace(budget: Duration) -> Duration {
    (budget / 10).min(LONGEST_GRACE)
}

/// The delay before the next poll of a start that has waited `waits` times without a worker in the current step; `notifies` if it waits for
/// a command that notifies this API of its end.
fn delay_of_wait(notifies: bool, waits: u32) -> Duration {
    let number = usize::try_from(waits).unwrap_or(usize::MAX);
    let delays: &[Duration] = if notifies { &COMMAND_WAIT_DELAYS } else { &WAIT_DELAYS };
    delays.get(number).or(delays.last()).copied().unwrap_or(QUEUE_DELAY)
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
                // The work may have just ended the task, and with it the lease; then only its response is outstanding. Whatever else the
                // work still writes is refused.
                Ok(Err(LeaseLost)) => {
                    return tokio::time::timeout(duration / LAST_MOMENT, &mut work).await.map_err(|_| LeaseLost);
                }
                Err(_) => return Err(LeaseLost),
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

/// Enqueues the job that continues a start, which is due until `due_at` if it waits. If this fails, the sweep enqueues it.
pub(super) async fn enqueue(queue: &JobQueue, user: &UserId, task: Uuid, delay: Duration, due_at: Option<Time>) {
    let job = AdvanceStart { user: user.clone(), task, due_at }.into();
    if let Err(error) = queue.send(&job, delay).await {
        tracing::warn!(%task, error = %error.context(), "start.enqueue_failed");
    }
}

fn with_detail(text: String, sandbox: &Sandbox) -> String {
    match &sandbox.detail {
        Some(detail) => format!("{text}. {detail}"),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_requests_are_repeated_after_the_deadline_of_a_step() {
        let seconds = |budget| grace(Duration::from_secs(budget)).as_secs();
        assert_eq!([30, 120, 630, 3600].map(seconds), [3, 12, 60, 60]);
    }

    #[test]
    fn the_delay_of_polls_grows_up_to_its_bound() {
        let delays = |notifies| (0..7).map(|waits| delay_of_wait(notifies, waits).as_secs()).collect::<Vec<_>>();
        assert_eq!(delays(false), [1, 2, 4, 8, 15, 15, 15]);
        assert_eq!(delays(true), [5, 15, 40, 60, 60, 60, 60]);
    }
}
