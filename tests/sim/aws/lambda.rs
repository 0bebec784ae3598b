//! A model of Lambda: functions with time limits, crashes, concurrency and execution environments; event source mappings that deliver
//! messages of a queue; schedules.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use futures::FutureExt as _;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep};

use super::sqs::{Received, Sqs};
use super::{Clock, Decider, Faults, Happened, lock, pause};
use crate::cost::{SWEEP, charged_to};

/// The batches that Lambda processes at the same time when a queue begins to have messages, and how many more in each second after.
const FIRST_POLLERS: usize = 5;
const POLLERS_PER_SECOND: f64 = 5.0;
const MOST_POLLERS: usize = 1250;
/// Lambda stops an idle environment after some minutes.
const ENVIRONMENT_LIFETIME: Duration = Duration::from_secs(600);
const LONG_POLL: Duration = Duration::from_secs(20);

/// An invocation of a function.
#[derive(Clone, Debug)]
pub struct Invocation {
    /// The execution environment. A handler may keep state for each environment, as a process does; after a crash Lambda uses another.
    pub environment: u64,
    pub event: Value,
}

pub type Handling = Pin<Box<dyn Future<Output = Result<Value, String>> + Send>>;
pub type Handler = Arc<dyn Fn(Invocation) -> Handling + Send + Sync>;

/// A function. Its values are those of `template.yaml`.
#[derive(Clone)]
pub struct Function {
    pub name: &'static str,
    pub timeout: Duration,
    /// Its reserved concurrency, which is also the most that it may use.
    pub reserved: Option<usize>,
    pub handler: Handler,
}

/// Delivers the messages of a queue to a function.
#[derive(Clone, Debug)]
pub struct Mapping {
    pub queue: String,
    pub function: &'static str,
    pub batch_size: usize,
    pub maximum_concurrency: usize,
}

/// Counted invocations of a function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub invocations: u64,
    pub cold_starts: u64,
    /// The time that is billed, in simulated time. It contains the start of environments.
    pub busy: Duration,
    pub throttled: u64,
    pub timed_out: u64,
    /// Those of them whose process nothing had stopped.
    pub overruns: u64,
    pub crashed: u64,
    /// Invocations whose handler returned an error.
    pub errors: u64,
    pub most_concurrent: usize,
}

/// Why an invocation has no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// It did not begin.
    Throttled,
    TimedOut,
    Crashed,
}

#[derive(Default)]
struct FunctionState {
    running: usize,
    /// Idle environments by the time of their last use.
    idle: BTreeSet<(Duration, u64)>,
    usage: Usage,
}

struct Inner {
    clock: Clock,
    faults: Faults,
    decider: Decider,
    happened: Happened,
    /// The concurrent executions of the account.
    concurrency: usize,
    functions: Mutex<BTreeMap<&'static str, Function>>,
    state: Mutex<BTreeMap<&'static str, FunctionState>>,
    environments: Mutex<u64>,
    panics: Mutex<Vec<String>>,
    /// The times at which an event source mapping could not invoke its function more often.
    busy: Mutex<Vec<(Duration, Duration)>>,
    interruptions: Mutex<Vec<(Duration, String)>>,
    overran: Mutex<Vec<String>>,
    /// Invocations and their billed time. The scheduled ones of a function are not among its others.
    billed: Mutex<BTreeMap<&'static str, (u64, Duration)>>,
}

/// Lambda. Clones are the same service.
#[derive(Clone)]
pub struct Lambda(Arc<Inner>);

impl Lambda {
    /// `concurrency` is the account's quota of concurrent executions.
    pub fn new(seed: u64, clock: Clock, faults: Faults, concurrency: usize) -> Self {
        Self(Arc::new(Inner {
            clock,
            faults,
            decider: Decider::new(seed, "lambda"),
            happened: Happened::default(),
            concurrency,
            functions: Mutex::default(),
            state: Mutex::default(),
            environments: Mutex::default(),
            panics: Mutex::default(),
            busy: Mutex::default(),
            interruptions: Mutex::default(),
            overran: Mutex::default(),
            billed: Mutex::default(),
        }))
    }

    pub fn add(&self, function: Function) {
        lock(&self.0.state).entry(function.name).or_default();
        lock(&self.0.functions).insert(function.name, function);
    }

    pub fn happened(&self) -> BTreeMap<&'static str, u64> {
        self.0.happened.all()
    }

    /// The invocations of a function that ran into its time limit although nothing had stopped their process.
    pub fn overruns(&self, name: &str) -> u64 {
        lock(&self.0.state).get(name).map_or(0, |state| state.usage.overruns)
    }

    /// When invocations ran into their time limit by themselves, and what they were to do.
    pub fn overran(&self) -> Vec<String> {
        lock(&self.0.overran).clone()
    }

    /// When invocations that had events crashed, were frozen or failed, since the simulation began, and the bodies of their messages, or
    /// the event if it has no messages.
    pub fn interruptions(&self) -> Vec<(Duration, String)> {
        lock(&self.0.interruptions).clone()
    }

    /// By function.
    pub fn usage(&self) -> BTreeMap<&'static str, Usage> {
        lock(&self.0.state).iter().map(|(name, state)| (*name, state.usage)).collect()
    }

    /// Invocations and their billed time by function; scheduled ones are [`SWEEP`]'s.
    pub fn billed(&self) -> BTreeMap<&'static str, (u64, Duration)> {
        lock(&self.0.billed).clone()
    }

    /// The times at which messages may have waited because an event source mapping could not invoke its function more often.
    pub fn busy(&self) -> Vec<(Duration, Duration)> {
        lock(&self.0.busy).clone()
    }

    /// The messages of handlers' panics. A correct product has none.
    pub fn panics(&self) -> Vec<String> {
        lock(&self.0.panics).clone()
    }

    /// Invokes a function and waits for its result.
    pub async fn invoke(&self, name: &'static str, event: Value) -> Result<Result<Value, String>, Ended> {
        self.invoke_for(name, name, event).await
    }

    async fn invoke_for(
        &self,
        account: &'static str,
        name: &'static str,
        event: Value,
    ) -> Result<Result<Value, String>, Ended> {
        let handler = lock(&self.0.functions)[name].handler.clone();
        let bodies: Vec<&str> =
            event["Records"].as_array().into_iter().flatten().filter_map(|record| record["body"].as_str()).collect();
        let work = if bodies.is_empty() { event.to_string() } else { bodies.join("\n") };
        let overruns = self.overruns(name);
        let handle = |environment| handler(Invocation { environment, event });
        let result = self.run_for(account, name, Some(&work), handle).await;
        if matches!(result, Err(Ended::TimedOut)) && self.overruns(name) > overruns {
            lock(&self.0.overran).push(format!("until {:?}: {work}", self.0.clock.elapsed()));
        }
        if matches!(result, Ok(Err(_))) {
            lock(&self.0.state).entry(name).or_default().usage.errors += 1;
        }
        result
    }

    /// Runs work as an invocation of a function: in an execution environment, with the function's time limit. When the time is up or the
    /// process crashes, the work is dropped wherever it waits.
    pub async fn run<T, F>(&self, name: &'static str, work: impl FnOnce(u64) -> F) -> Result<T, Ended>
    where
        F: Future<Output = T>,
    {
        self.run_for(name, name, None, work).await
    }

    /// Costs are charged to `account`. `event` describes what is interrupted.
    async fn run_for<T, F>(
        &self,
        account: &'static str,
        name: &'static str,
        event: Option<&str>,
        work: impl FnOnce(u64) -> F,
    ) -> Result<T, Ended>
    where
        F: Future<Output = T>,
    {
        let inner = &self.0;
        let call = inner.decider.call(&("invoke", name));
        let timeout = lock(&inner.functions)[name].timeout;
        let (environment, is_cold) = self.begin(name)?;
        let mut running = Running { inner, account, name, environment: Some(environment), began: Instant::now() };
        if is_cold {
            pause(call.duration("cold start", Duration::from_millis(120), Duration::from_millis(900))).await;
        }
        let interrupted =
            || lock(&inner.interruptions).extend(event.map(|event| (inner.clock.elapsed(), event.to_owned())));
        let mut is_frozen = false;
        let freeze = call.happens("frozen", inner.faults.frozen).then(|| {
            inner.happened.count("frozen");
            interrupted();
            is_frozen = true;
            let at = call.duration("time of freeze", Duration::from_millis(1), Duration::from_secs(10));
            let length = call.duration("length of freeze", Duration::from_secs(2), Duration::from_secs(120));
            (Instant::now() + at, length)
        });
        let work = Freezing { work: Box::pin(charged_to(account, work(environment))), freeze, thaw: None };
        let work = AssertUnwindSafe(work).catch_unwind();
        let longest = timeout.min(Duration::from_secs(30));
        let crash = call
            .happens("crashed", inner.faults.crashed)
            .then(|| call.duration("time of crash", Duration::from_millis(1), longest));
        let limit = crash.unwrap_or(timeout);
        match tokio::time::timeout(limit, work).await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(panic)) => {
                lock(&inner.panics).push(format!("{name}: {}", message_of(&*panic)));
                running.crash();
                Err(Ended::Crashed)
            }
            Err(_) if crash.is_some() => {
                inner.happened.count("crashed");
                interrupted();
                running.crash();
                Err(Ended::Crashed)
            }
            Err(_) => {
                inner.happened.count(if is_frozen { "timed_out_frozen" } else { "timed_out" });
                running.environment = None;
                let mut states = lock(&inner.state);
                let usage = &mut states.entry(name).or_default().usage;
                usage.timed_out += 1;
                usage.overruns += u64::from(!is_frozen);
                Err(Ended::TimedOut)
            }
        }
    }

    /// An environment for an invocation, and whether it is new.
    fn begin(&self, name: &'static str) -> Result<(u64, bool), Ended> {
        let functions = lock(&self.0.functions);
        let mut states = lock(&self.0.state);
        let reserved_by_all: usize = functions.values().filter_map(|function| function.reserved).sum();
        let is_unreserved = |name: &str| functions[name].reserved.is_none();
        let (used, most) = match functions[name].reserved {
            Some(reserved) => (states[name].running, reserved),
            None => {
                let running = states.iter().filter(|(name, _)| is_unreserved(name)).map(|(_, state)| state.running);
                (running.sum(), self.0.concurrency.saturating_sub(reserved_by_all))
            }
        };
        let state = states.entry(name).or_default();
        if used >= most {
            self.0.happened.count("throttled");
            state.usage.throttled += 1;
            return Err(Ended::Throttled);
        }
        state.running += 1;
        state.usage.invocations += 1;
        state.usage.most_concurrent = state.usage.most_concurrent.max(state.running);
        let now = self.0.clock.elapsed();
        state.idle.retain(|(used_at, _)| now.saturating_sub(*used_at) < ENVIRONMENT_LIFETIME);
        if let Some((_, environment)) = state.idle.pop_last() {
            return Ok((environment, false));
        }
        state.usage.cold_starts += 1;
        let mut environments = lock(&self.0.environments);
        *environments += 1;
        Ok((*environments, true))
    }

    /// Delivers messages from now on, in a task.
    pub fn map(&self, sqs: &Sqs, mapping: Mapping) {
        let mapping = Arc::new(mapping);
        let (lambda, sqs) = (self.clone(), sqs.clone());
        tokio::spawn(async move { lambda.poll(sqs, mapping).await });
    }

    async fn poll(self, sqs: Sqs, mapping: Arc<Mapping>) {
        let ended = Arc::new(Notify::new());
        let running = Arc::new(Mutex::new(0_usize));
        // Since when all pollers have been busy.
        let mut busy_since: Option<Instant> = None;
        loop {
            let now_running = *lock(&running);
            if now_running == 0 {
                busy_since = None;
            }
            let allowed = busy_since.map_or(FIRST_POLLERS, |since| ramp(since.elapsed()));
            let allowed = allowed.min(mapping.maximum_concurrency).min(MOST_POLLERS);
            if now_running >= allowed {
                busy_since.get_or_insert_with(Instant::now);
                let begin = self.0.clock.elapsed();
                let _either = tokio::time::timeout(Duration::from_secs(1), ended.notified()).await;
                lock(&self.0.busy).push((begin, self.0.clock.elapsed()));
                continue;
            }
            let messages = sqs.receive(&mapping.queue, mapping.batch_size);
            if messages.is_empty() {
                sqs.changed(&mapping.queue, Instant::now() + LONG_POLL).await;
                continue;
            }
            *lock(&running) += 1;
            let (lambda, sqs, mapping) = (self.clone(), sqs.clone(), mapping.clone());
            let (ended, running) = (ended.clone(), running.clone());
            tokio::spawn(async move {
                lambda.deliver(&sqs, &mapping, messages).await;
                *lock(&running) -= 1;
                ended.notify_one();
            });
        }
    }

    fn note_failures<'a>(&self, bodies: impl Iterator<Item = &'a str>) {
        let now = self.0.clock.elapsed();
        lock(&self.0.interruptions).extend(bodies.map(|body| (now, body.to_owned())));
    }

    /// Invokes the function with a batch, and deletes the messages that it processed. The others stay hidden until their visibility
    /// timeout is over.
    async fn deliver(&self, sqs: &Sqs, mapping: &Mapping, messages: Vec<Received>) {
        let ids: Vec<&str> = messages.iter().map(|message| &*message.id).collect();
        let call = self.0.decider.call(&("deliver", &ids));
        pause(call.duration("poll", Duration::from_millis(5), Duration::from_millis(50))).await;
        let records: Vec<Value> =
            messages.iter().map(|message| message.to_record(&self.0.clock, &mapping.queue)).collect();
        let event = json!({ "Records": records });
        let mut backoff = Duration::from_secs(1);
        let response = loop {
            match self.invoke(mapping.function, event.clone()).await {
                // Lambda tries again for a time, and then leaves the messages to their visibility timeout.
                Err(Ended::Throttled) if backoff < Duration::from_secs(60) => {
                    pause(backoff.mul_f64(0.5 + call.random("backoff"))).await;
                    backoff *= 2;
                }
                Ok(Ok(response)) => break response,
                Ok(Err(_)) => {
                    self.note_failures(messages.iter().map(|message| &*message.body));
                    return;
                }
                Err(_) => return,
            }
        };
        let failures = response["batchItemFailures"].as_array().cloned().unwrap_or_default();
        let failed: BTreeSet<&str> =
            failures.iter().map(|failure| failure["itemIdentifier"].as_str().unwrap_or_default()).collect();
        self.note_failures(messages.iter().filter(|one| failed.contains(&*one.id)).map(|message| &*message.body));
        // A failure of an unknown message fails the batch.
        if failed.iter().any(|id| !ids.contains(id)) {
            return;
        }
        pause(call.duration("delete", Duration::from_millis(5), Duration::from_millis(50))).await;
        for (number, message) in messages.iter().enumerate() {
            if failed.contains(&*message.id) {
                continue;
            }
            if call.happens(&format!("undeleted {number}"), self.0.faults.undeleted) {
                self.0.happened.count("undeleted");
                continue;
            }
            sqs.delete(&mapping.queue, &message.receipt);
        }
    }

    /// Invokes a function in intervals, in a task. As EventBridge does, it repeats a failed invocation twice, and rarely invokes twice.
    pub fn schedule(&self, function: &'static str, every: Duration, event: Value) {
        let lambda = self.clone();
        tokio::spawn(async move {
            let offset = lambda.0.decider.random(&("schedule", function));
            pause(every.mul_f64(offset)).await;
            loop {
                let call = lambda.0.decider.call(&("scheduled", function));
                let times = if call.happens("twice", lambda.0.faults.duplicated) { 2 } else { 1 };
                for _ in 0..times {
                    let (lambda, event) = (lambda.clone(), event.clone());
                    tokio::spawn(async move {
                        for delay in [60, 120, 0] {
                            if let Ok(Ok(_)) = lambda.invoke_for(SWEEP, function, event.clone()).await {
                                return;
                            }
                            pause(Duration::from_secs(delay)).await;
                        }
                    });
                }
                pause(every).await;
            }
        });
    }
}

/// Work that is not polled for a time.
struct Freezing<F> {
    work: Pin<Box<F>>,
    /// When it stands still, and for how long.
    freeze: Option<(Instant, Duration)>,
    thaw: Option<Pin<Box<Sleep>>>,
}

impl<F: Future> Future for Freezing<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let now = Instant::now();
        if let Some((_, length)) = self.freeze.take_if(|(at, _)| *at <= now) {
            self.thaw = Some(Box::pin(sleep(length)));
        }
        if let Some(thaw) = &mut self.thaw {
            if thaw.as_mut().poll(context).is_pending() {
                return Poll::Pending;
            }
            self.thaw = None;
        }
        self.work.as_mut().poll(context)
    }
}

/// Counts an invocation as ended when it is dropped, also when its caller is gone.
struct Running<'a> {
    inner: &'a Inner,
    account: &'static str,
    name: &'static str,
    /// `None` if it is not used again.
    environment: Option<u64>,
    began: Instant,
}

impl Running<'_> {
    fn crash(&mut self) {
        self.environment = None;
        lock(&self.inner.state).entry(self.name).or_default().usage.crashed += 1;
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let mut states = lock(&self.inner.state);
        let state = states.entry(self.name).or_default();
        state.running -= 1;
        state.usage.busy += self.began.elapsed();
        let mut billed = lock(&self.inner.billed);
        let (invocations, busy) = billed.entry(self.account).or_default();
        *invocations += 1;
        *busy += self.began.elapsed();
        if let Some(environment) = self.environment {
            state.idle.insert((self.inner.clock.elapsed(), environment));
        }
    }
}

/// The batches that Lambda processes at the same time after the queue has had a backlog for some time.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]
fn ramp(busy: Duration) -> usize {
    FIRST_POLLERS + (busy.as_secs_f64() * POLLERS_PER_SECOND) as usize
}

fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}
