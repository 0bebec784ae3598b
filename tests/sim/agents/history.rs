//! What has happened, for the invariants of a simulation. All times are since the creation of the models.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use uuid::Uuid;

use super::conversations::Conversation;
use super::{Sandboxes, provider};

/// Numbers of what has happened, besides [`Sandboxes::calls`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests of the provider that failed by an injected fault, and those in its outages.
    pub provider_faults: u64,
    /// Effects of provider requests that came after an error response.
    pub late_effects: u64,
    /// Creations of a second runtime for a session that had one.
    pub doubled_runtimes: u64,
    /// Requests to agent servers that failed by an injected fault.
    pub network_faults: u64,
    /// Restarts of agent servers alone.
    pub restarts: u64,
    /// Sandboxes that the provider has paused, stopped or failed to start by itself.
    pub pauses_by_provider: u64,
    pub evictions: u64,
    pub failed_boots: u64,
    /// Events in all batches that were acknowledged, and the number of batches and of snapshots.
    pub events_posted: u64,
    pub batches_posted: u64,
    pub snapshots_posted: u64,
    /// Requests that did not get a 2xx, batches and snapshots together.
    pub posts_refused: u64,
    pub posts_doubled: u64,
    pub posts_late: u64,
    /// Events that no webhook will report: those of lost batches, and those in the memory of agent servers that crashed.
    pub events_lost: u64,
    pub snapshots_lost: u64,
    /// Posts that were sent but not yet finished, and events that wait for their batch.
    pub posts_open: u64,
}

/// What happens to a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Life {
    /// A client has created it.
    Created,
    /// Its status has become `running`.
    Running,
    /// Its agent server responds, for the first time since the boot or a restart.
    Alive,
    Paused,
    PausedByProvider,
    Resumed,
    /// A client has stopped it for good.
    Stopped,
    /// The provider has stopped it for good.
    Evicted,
    /// It did not boot. Its status is `error`.
    Failed,
    /// Its agent server has crashed.
    Crashed,
    /// Its agent server is restarted in an orderly way.
    Restarted,
}

/// A sandbox that exists or has existed.
#[derive(Clone, Debug, PartialEq)]
pub struct SandboxHistory {
    /// The name that the product gave it (`session_id`).
    pub session: String,
    pub runtime_id: String,
    /// `starting`, `running`, `paused`, `stopped` or `error`.
    pub status: &'static str,
    pub life: Vec<(Duration, Life)>,
    /// The files that clients have uploaded and nothing has removed.
    pub files: Vec<String>,
}

/// The outcome of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Exit(i64),
    TimedOut,
    /// It was killed together with its supervisor: its sandbox was stopped, or a fault was injected.
    Killed,
}

/// A run of a command's script.
#[derive(Clone, Debug, PartialEq)]
pub struct RunHistory {
    pub runtime_id: String,
    /// The start whose command it is, and the command's name.
    pub task: Uuid,
    pub name: String,
    /// Counted from 1.
    pub number: u32,
    pub started: Duration,
    /// The end; `None` while it runs.
    pub ended: Option<(Duration, Outcome)>,
    /// Whether the outcome is a refusal that has to end the start with an error.
    pub is_refused: bool,
}

/// A notification of a command's end.
#[derive(Clone, Debug, PartialEq)]
pub struct Notification {
    pub at: Duration,
    pub runtime_id: String,
    pub task: Uuid,
    /// The status of the response; `None` if there was none.
    pub status: Option<u16>,
}

/// A message that an agent has received.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub at: Duration,
    pub role: String,
    /// The texts of all its parts.
    pub text: String,
    /// Whether it came with the request that created the conversation.
    pub is_initial: bool,
}

/// A conversation that an agent server has or had.
#[derive(Clone, Debug, PartialEq)]
pub struct ConversationHistory {
    pub id: Uuid,
    pub session: String,
    pub runtime_id: String,
    pub created: Duration,
    pub deleted: Option<Duration>,
    /// How often a request has created it or found it.
    pub posts: u64,
    pub execution_status: String,
    pub title: Option<String>,
    pub working_dir: String,
    /// In the order in which its agent received them.
    pub messages: Vec<Message>,
    /// The ids of all its events, oldest first, and their JSON as the agent server's search shows it.
    pub events: Vec<(String, String)>,
}

impl Sandboxes {
    /// All sandboxes that exist or have existed, by the names of their sessions and in the order of creation.
    pub fn history(&self) -> Vec<SandboxHistory> {
        let state = self.0.lock();
        let ids = state.sessions.values().flatten();
        ids.map(|id| {
            let runtime = &state.runtimes[id];
            SandboxHistory {
                session: runtime.session.clone(),
                runtime_id: id.clone(),
                status: runtime.status.as_str(),
                life: runtime.life.clone(),
                files: runtime.server.files.keys().cloned().collect(),
            }
        })
        .collect()
    }

    /// All conversations that exist or have existed, by sandbox.
    pub fn conversations(&self) -> Vec<ConversationHistory> {
        let state = self.0.lock();
        let runtimes = state.runtimes.values();
        let all = runtimes.flat_map(|runtime| {
            let server = &runtime.server;
            server.deleted.iter().chain(server.conversations.values()).map(|conversation| conversation.history(runtime))
        });
        all.collect()
    }

    /// The runs of all commands of starts, in the order in which they started.
    pub fn runs(&self) -> Vec<RunHistory> {
        self.0.lock().runs.clone()
    }

    /// The ids of the events in batches that were acknowledged, by conversation.
    pub fn acknowledged(&self) -> BTreeMap<Uuid, BTreeSet<String>> {
        self.0.lock().acknowledged.clone()
    }

    /// The outages of the provider until now, from their beginnings to their ends.
    pub fn outages(&self) -> Vec<(Duration, Duration)> {
        provider::outages(&self.0)
    }

    /// The notifications of commands that were sent, in their order.
    pub fn notifications(&self) -> Vec<Notification> {
        self.0.lock().notifications.clone()
    }

    /// Whether no agent works, no command runs and no webhook is on its way.
    pub fn is_quiet(&self) -> bool {
        let state = self.0.lock();
        let runtimes = || state.runtimes.values().filter(|runtime| runtime.status.is_active());
        state.counters.posts_open == 0
            && !state.runs.iter().any(|run| run.ended.is_none())
            && !runtimes().any(|runtime| runtime.server.conversations.values().any(Conversation::works))
    }
}
