//! Many clients at once, with all faults: two runs of a seed are the same, and everything that can go wrong does.

use std::rc::Rc;

use super::*;
use crate::agents::history::{ConversationHistory, SandboxHistory};

const CLIENTS: u32 = 40;
const TIMEOUT: Duration = Duration::from_secs(60);

/// One client: starts a sandbox, waits for it, creates a conversation, sends messages and stops the sandbox. It takes every failure as it
/// comes.
async fn client(world: Rc<World>, number: u32) {
    let session = format!("session-{number}");
    sleep(Duration::from_secs(u64::from(number % 7) * 10)).await;
    let mut runtime = Value::Null;
    for _ in 0..30 {
        if let Ok((200, started)) = world.start(&session).await {
            runtime = started;
            break;
        }
        sleep(Duration::from_secs(20)).await;
    }
    if runtime.is_null() {
        return;
    }
    let agent_server = world.agent_server(&runtime);
    let id = Uuid::from_u64_pair(u64::from(number), 1);
    for message in 0..20 {
        sleep(Duration::from_secs(40)).await;
        drop(world.provider(Method::GET, &format!("/sessions/{session}"), json!(null)).await);
        if let Ok((200, shown)) =
            world.provider(Method::GET, &format!("/sessions/batch?ids={session}"), json!(null)).await
            && shown[0]["status"] == "paused"
        {
            drop(world.change("resume", &runtime).await);
        }
        if !agent_server.is_alive().await {
            continue;
        }
        match agent_server.conversations(&[id], TIMEOUT).await.ok().and_then(|mut found| found.pop()?) {
            None => drop(agent_server.create_conversation(&body(id, Some("Go")), TIMEOUT).await),
            Some(_) => {
                let text = format!("Message {message}");
                drop(agent_server.send_message(id, "user", &content(&text), true).await);
                drop(agent_server.newest_events(id, None, 20).await);
            }
        }
    }
    drop(world.change(if number.is_multiple_of(2) { "pause" } else { "stop" }, &runtime).await);
}

/// What has happened in a run.
#[derive(Debug, PartialEq)]
struct Run {
    /// The hash of everything that the clients have sent and got.
    hash: u64,
    counters: Counters,
    calls: BTreeMap<String, u64>,
    sandboxes: Vec<SandboxHistory>,
    conversations: Vec<ConversationHistory>,
}

fn run(seed: u64) -> Run {
    simulate(async {
        let mut settings = settings(seed);
        settings.faults = Faults::usual();
        settings.faults.sandbox.boot_failures = 0.05;
        settings.faults.sandbox.evictions = 0.05;
        settings.faults.provider.doubles = 0.1;
        settings.faults.provider.late = 0.1;
        let world = Rc::new(World::with(settings, Product { refusals: 0.02, hangs: 0.01, ..Product::default() }));
        futures::future::join_all((0..CLIENTS).map(|number| client(world.clone(), number))).await;
        world.sandboxes.heal();
        world.quiet().await;
        for conversation in world.sandboxes.conversations() {
            let initial = conversation.messages.iter().filter(|message| message.is_initial).count();
            assert!(initial <= 1, "{conversation:?}");
            let known = world.received().events.get(&conversation.id).map_or(0, Vec::len);
            assert!(known <= conversation.events.len());
        }
        let sandboxes = &world.sandboxes;
        Run {
            hash: world.hash(),
            counters: sandboxes.counters(),
            calls: sandboxes.calls(),
            sandboxes: sandboxes.history(),
            conversations: sandboxes.conversations(),
        }
    })
}

#[test]
fn two_runs_of_a_seed_are_the_same_and_everything_goes_wrong() {
    let mut happened = BTreeSet::new();
    let mut hashes = BTreeSet::new();
    let mut total = Counters::default();
    for seed in [1, 2] {
        let one = run(seed);
        assert!(one == run(seed), "two runs of seed {seed} differ");
        let Run { hash, counters, calls, sandboxes, .. } = one;
        assert!(calls["POST /start"] >= u64::from(CLIENTS), "{calls:?}");
        assert_eq!(counters.posts_open, 0);
        hashes.insert(hash);
        happened.extend(sandboxes.into_iter().flat_map(|sandbox| sandbox.life).map(|(_, what)| what));
        total.provider_faults += counters.provider_faults;
        total.late_effects += counters.late_effects;
        total.doubled_runtimes += counters.doubled_runtimes;
        total.network_faults += counters.network_faults;
        total.posts_doubled += counters.posts_doubled;
        total.posts_late += counters.posts_late;
        total.posts_refused += counters.posts_refused;
        total.events_lost += counters.events_lost;
        total.snapshots_lost += counters.snapshots_lost;
    }
    assert_eq!(hashes.len(), 2, "other seeds give other runs");
    let all = [
        Life::Created,
        Life::Running,
        Life::Alive,
        Life::Paused,
        Life::PausedByProvider,
        Life::Resumed,
        Life::Stopped,
        Life::Evicted,
        Life::Failed,
        Life::Crashed,
        Life::Restarted,
    ];
    assert_eq!(happened, all.into());
    let counts = [
        total.provider_faults,
        total.late_effects,
        total.doubled_runtimes,
        total.network_faults,
        total.posts_doubled,
        total.posts_late,
        total.posts_refused,
        total.events_lost,
        total.snapshots_lost,
    ];
    assert!(counts.iter().all(|count| *count > 0), "{total:?}");
}
