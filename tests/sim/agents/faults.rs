//! What goes wrong, how often, and how long things take.

use std::time::Duration;

/// The probabilities of faults; none by default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Faults {
    pub provider: ProviderFaults,
    pub sandbox: SandboxFaults,
    pub network: NetworkFaults,
    pub commands: CommandFaults,
    pub webhooks: WebhookFaults,
}

/// Faults of the provider's runtime API, each per request unless it says otherwise.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ProviderFaults {
    /// 429 without an effect and without `Retry-After`.
    pub throttles: f64,
    /// A minute has some seconds in which all requests are refused with 429 and `Retry-After`, as by a limit of requests per minute.
    pub throttled_minutes: f64,
    /// 500 without an effect.
    pub errors: f64,
    /// The effect, and then 500.
    pub errors_after: f64,
    /// 504 at once, and the effect up to a minute later. For changes.
    pub late: f64,
    /// The effect, and then a cut connection.
    pub cuts: f64,
    pub refusals: f64,
    pub hangs: f64,
    /// A creation makes two runtimes of one session.
    pub doubles: f64,
    /// An outage (503) begins in an interval of ten minutes.
    pub outages: f64,
}

/// Faults of sandboxes, each per boot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SandboxFaults {
    /// The sandbox never runs: its status is `error`.
    pub boot_failures: f64,
    /// The provider pauses it.
    pub pauses: f64,
    /// The provider stops it for good.
    pub evictions: f64,
    /// The agent server crashes and starts again.
    pub crashes: f64,
    /// The agent server is restarted in an orderly way.
    pub restarts: f64,
}

/// Faults between the product and agent servers, each per request. In ten minutes at most three requests to one sandbox meet a fault, and
/// at most two of them a 500.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NetworkFaults {
    pub refusals: f64,
    /// 503 of a proxy, without an effect.
    pub unavailable: f64,
    /// 500 of the agent server, without an effect.
    pub errors: f64,
    /// The effect, and then 500.
    pub errors_after: f64,
    pub cuts_before: f64,
    pub cuts_after: f64,
    pub hangs_before: f64,
    pub hangs_after: f64,
}

/// Faults of commands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CommandFaults {
    /// The repository cannot be cloned: the start has to fail. Per start.
    pub clone_refusals: f64,
    /// The setup script fails. Per start.
    pub setup_failures: f64,
    /// The setup script runs longer than its limit. Per start.
    pub setup_timeouts: f64,
    /// The run of a script is killed together with its supervisor. Per run.
    pub kills: f64,
    /// An MCP server fails. Per server.
    pub mcp_failures: f64,
    /// The notification of an end is lost. Per run.
    pub lost_notifications: f64,
}

/// Faults of webhooks, each per batch or snapshot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WebhookFaults {
    /// It never arrives. Batches are left to the backfill.
    pub lost: f64,
    /// It arrives again after it was acknowledged.
    pub doubled: f64,
    /// It arrives up to a minute later, after later ones.
    pub late: f64,
}

impl Faults {
    /// Everything that goes wrong in a bad week, at once. Some of it makes starts fail: failed boots, evictions and refused clones.
    pub fn usual() -> Self {
        Self {
            provider: ProviderFaults {
                throttles: 0.01,
                throttled_minutes: 0.1,
                errors: 0.01,
                errors_after: 0.01,
                late: 0.01,
                cuts: 0.005,
                refusals: 0.005,
                hangs: 0.003,
                doubles: 0.005,
                outages: 0.1,
            },
            sandbox: SandboxFaults {
                boot_failures: 0.01,
                pauses: 0.05,
                evictions: 0.01,
                crashes: 0.05,
                restarts: 0.05,
            },
            network: NetworkFaults {
                refusals: 0.005,
                unavailable: 0.01,
                errors: 0.002,
                errors_after: 0.002,
                cuts_before: 0.005,
                cuts_after: 0.005,
                hangs_before: 0.002,
                hangs_after: 0.002,
            },
            commands: CommandFaults {
                clone_refusals: 0.02,
                setup_failures: 0.05,
                setup_timeouts: 0.01,
                kills: 0.02,
                mcp_failures: 0.1,
                lost_notifications: 0.05,
            },
            webhooks: WebhookFaults { lost: 0.02, doubled: 0.03, late: 0.05 },
        }
    }
}

/// How long things take: the shortest and the longest time of each.
#[derive(Clone, Debug)]
pub struct Pace {
    /// Until a sandbox runs.
    pub boot: [Duration; 2],
    /// Until the agent server of a sandbox that runs responds.
    pub ready: [Duration; 2],
    /// A response of the provider.
    pub provider: [Duration; 2],
    /// A response of an agent server.
    pub agent: [Duration; 2],
    /// An outage of the provider. A longer one than the product's limit for boots makes starts fail.
    pub outage: [Duration; 2],
    /// The time in a minute for which all requests to the provider are refused with `Retry-After`.
    pub throttled: [Duration; 2],
    pub clone: [Duration; 2],
    pub setup: [Duration; 2],
    /// Until a conversation is created, and until its first message is delivered.
    pub create: [Duration; 2],
    /// A step of an agent: the response of its model, or a tool.
    pub step: [Duration; 2],
    /// The maximum number of tool calls in a turn.
    pub steps: u32,
    /// How long a message waits inside of the agent server while an agent works.
    pub busy: [Duration; 2],
    /// The time of a sandbox's own faults, counted from its boot.
    pub trouble: [Duration; 2],
    /// The probability that a client renames the conversation after a turn, so that a snapshot reports its halted agent.
    pub renames: f64,
}

impl Default for Pace {
    fn default() -> Self {
        let milliseconds = |least: u64, most: u64| [Duration::from_millis(least), Duration::from_millis(most)];
        Self {
            boot: milliseconds(5_000, 90_000),
            ready: milliseconds(0, 15_000),
            provider: milliseconds(20, 800),
            agent: milliseconds(5, 300),
            outage: milliseconds(10_000, 240_000),
            throttled: milliseconds(1_000, 20_000),
            clone: milliseconds(500, 60_000),
            setup: milliseconds(100, 120_000),
            create: milliseconds(100, 8_000),
            step: milliseconds(500, 15_000),
            steps: 5,
            busy: milliseconds(0, 25_000),
            trouble: milliseconds(0, 900_000),
            renames: 0.3,
        }
    }
}
