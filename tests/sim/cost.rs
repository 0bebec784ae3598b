//! Counted costs, by the function that causes them, their budgets, and what they cost at AWS's list prices.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use crate::aws::services::Services;

tokio::task_local! {
    /// The function whose invocation a task belongs to.
    static CALLER: &'static str;
}

/// The scheduled invocations of the worker. They do not depend on the number of starts alone.
pub const SWEEP: &str = "sweep";

/// The function that answers clients who poll their starts.
const POLLS: &str = "start-tasks";

/// The function that a call belongs to; `client` outside of all functions.
pub fn caller() -> &'static str {
    CALLER.try_with(|caller| *caller).unwrap_or("client")
}

/// Charges the calls of `work` to a function.
pub async fn charged_to<F: Future>(caller: &'static str, work: F) -> F::Output {
    CALLER.scope(caller, work).await
}

/// What a function has used.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cost {
    pub invocations: u64,
    /// The time that Lambda bills.
    pub busy: Duration,
    pub read_units: f64,
    pub write_units: f64,
    /// Requests by what they were sent to: `dynamodb`, `s3`, `sqs`, `provider`, `agents`, `others`. They contain failed ones.
    pub calls: BTreeMap<&'static str, u64>,
}

impl Cost {
    pub fn calls_to(&self, service: &str) -> u64 {
        self.calls.get(service).copied().unwrap_or_default()
    }
}

/// What all functions have used, and the requests of Lambda's event source mappings.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Costs {
    pub functions: BTreeMap<&'static str, Cost>,
    /// Requests in which messages are sent, received and deleted.
    pub queue_requests: u64,
}

impl Costs {
    pub fn of(services: &Services) -> Self {
        let mut functions: BTreeMap<&'static str, Cost> = BTreeMap::new();
        for (name, (invocations, busy)) in services.lambda.billed() {
            let cost = functions.entry(name).or_default();
            (cost.invocations, cost.busy) = (invocations, busy);
        }
        for (name, usage) in services.dynamodb.usage_by_caller() {
            let cost = functions.entry(name).or_default();
            (cost.read_units, cost.write_units) = (usage.read_units, usage.write_units);
        }
        for ((name, service), calls) in services.trace.calls_by_caller() {
            functions.entry(name).or_default().calls.insert(service, calls);
        }
        let queues = services.sqs.usage();
        let requests =
            queues.values().map(|usage| usage.send_requests + usage.receive_requests + usage.delete_requests);
        Self { functions, queue_requests: requests.sum() }
    }

    pub fn of_function(&self, name: &str) -> Cost {
        self.functions.get(name).cloned().unwrap_or_default()
    }

    /// The costs of all functions but the sweep, which runs without starts, too, and the polls of clients, which depend on how long and how
    /// often they ask.
    fn caused(&self) -> impl Iterator<Item = (&'static str, &Cost)> {
        self.functions
            .iter()
            .filter(|(name, _)| !matches!(**name, SWEEP | POLLS | "client"))
            .map(|(name, cost)| (*name, cost))
    }

    /// The averages of one start: its own requests, its worker, its agent's turns and its deletion.
    #[allow(clippy::cast_precision_loss, reason = "counted numbers are small")]
    pub fn per_start(&self, starts: usize) -> PerStart {
        let of = |value: f64| value / starts.max(1) as f64;
        let sum = |value: &dyn Fn(&Cost) -> f64| of(self.caused().map(|(_, cost)| value(cost)).sum());
        let worker = self.of_function("worker");
        PerStart {
            worker_invocations: of(worker.invocations as f64),
            worker_seconds: of(worker.busy.as_secs_f64()),
            webhook_invocations: of(self.of_function("events").invocations as f64),
            read_units: sum(&|cost| cost.read_units),
            write_units: sum(&|cost| cost.write_units),
            queue_requests: of(self.queue_requests as f64),
            provider_calls: sum(&|cost| cost.calls_to("provider") as f64),
            agent_calls: sum(&|cost| cost.calls_to("agents") as f64),
        }
    }

    /// A table with one line for each function.
    pub fn table(&self) -> String {
        let mut text = format!(
            "  {:14} {:>11} {:>10} {:>10} {:>10} {:>9} {:>7} {:>7} {:>9} {:>7}\n",
            "function", "invocations", "busy s", "reads", "writes", "dynamodb", "sqs", "s3", "provider", "agents"
        );
        for (name, cost) in &self.functions {
            let [dynamodb, sqs, s3, provider, agents] =
                ["dynamodb", "sqs", "s3", "provider", "agents"].map(|service| cost.calls_to(service));
            let _infallible = writeln!(
                text,
                "  {name:14} {:>11} {:>10.1} {:>10.1} {:>10.1} {dynamodb:>9} {sqs:>7} {s3:>7} {provider:>9} {agents:>7}",
                cost.invocations,
                cost.busy.as_secs_f64(),
                cost.read_units,
                cost.write_units,
            );
        }
        text
    }
}

/// Averages of one start.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PerStart {
    pub worker_invocations: f64,
    pub worker_seconds: f64,
    pub webhook_invocations: f64,
    pub read_units: f64,
    pub write_units: f64,
    pub queue_requests: f64,
    pub provider_calls: f64,
    pub agent_calls: f64,
}

impl PerStart {
    fn named(&self) -> [(&'static str, f64); 8] {
        [
            ("invocations of the worker", self.worker_invocations),
            ("seconds of the worker", self.worker_seconds),
            ("invocations of the webhook function", self.webhook_invocations),
            ("read units", self.read_units),
            ("write units", self.write_units),
            ("requests to the queues", self.queue_requests),
            ("calls to the provider", self.provider_calls),
            ("calls to agent servers", self.agent_calls),
        ]
    }

    /// What is over the budget.
    pub fn over(&self, budget: &Self) -> Vec<String> {
        let both = self.named().into_iter().zip(budget.named());
        let over = both.filter(|((_, value), (_, most))| value > most);
        over.map(|((name, value), (_, most))| format!("a start costs {value:.1} {name}, its budget is {most}"))
            .collect()
    }

    pub fn line(&self) -> String {
        let parts: Vec<String> = self.named().iter().map(|(name, value)| format!("{value:.1} {name}")).collect();
        parts.join(", ")
    }
}
