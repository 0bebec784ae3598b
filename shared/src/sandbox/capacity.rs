//! Chooses which sandboxes of a user are evicted so that one more may run, where their number is limited.

use std::cmp::Reverse;
use std::time::Duration;

use futures::future::join_all;

use super::store::{Desired, SandboxRecord, SandboxStore};
use super::{Sandbox, SandboxStatus};
use crate::clock::Time;
use crate::error::Result;
use crate::http_client::HttpClient;

/// Returns the user's other sandboxes that are to run and for which `counts` holds; `None` if they are fewer than `max`, so that nothing has
/// to be evicted. The list comes from an index; which starts use a sandbox is known from a consistent read only.
///
/// # Errors
/// [`crate::Error::Store`].
pub(super) async fn others_at_the_limit(
    store: &SandboxStore,
    newcomer: &SandboxRecord,
    max: usize,
    counts: impl Fn(&SandboxRecord) -> bool,
) -> Result<Option<Vec<SandboxRecord>>> {
    let mut others = store.list(&newcomer.user).await?;
    others.retain(|record| record.id != newcomer.id && record.desired == Desired::Running && counts(record));
    if others.len() < max {
        return Ok(None);
    }
    let ids: Vec<String> = others.into_iter().map(|record| record.id).collect();
    Ok(Some(store.batch_get(&newcomer.user, &ids).await?.into_iter().flatten().collect()))
}

/// Picks the sandboxes to evict so that the newcomer may run: those that have been idle for the longest time, by the agent servers'
/// account, and never one that an unfinished start uses. `None` if there are not enough of them. `others` are the user's other sandboxes
/// that are to run, with their actual states.
pub(super) async fn to_evict(
    http: &HttpClient,
    newcomer: &SandboxRecord,
    others: Vec<(SandboxRecord, Sandbox)>,
    max: usize,
) -> Option<Vec<String>> {
    let age = |record: &SandboxRecord| (record.created_at, record.id.clone());
    let occupies = |(record, sandbox): &(SandboxRecord, Sandbox)| match sandbox.status {
        SandboxStatus::Running => true,
        // Of several newcomers at a time, the older ones count, so that they do not all withdraw.
        SandboxStatus::Starting => age(record) < age(newcomer),
        SandboxStatus::Paused | SandboxStatus::Error | SandboxStatus::Missing => false,
    };
    let occupying: Vec<(SandboxRecord, Sandbox)> = others.into_iter().filter(occupies).collect();
    let excess = (occupying.len() + 1).saturating_sub(max.max(1));
    let candidates: Vec<(SandboxRecord, Sandbox)> = occupying
        .into_iter()
        .filter(|(record, sandbox)| record.starts.is_empty() && sandbox.status == SandboxStatus::Running)
        .collect();
    if excess == 0 || candidates.len() < excess {
        return (excess == 0).then(Vec::new);
    }
    let mut candidates = join_all(candidates.into_iter().map(async |(record, sandbox)| {
        let idle = match sandbox.agent_server(http) {
            Some(agent_server) => agent_server.idle_time().await.ok().flatten(),
            None => None,
        };
        (Reverse(idle.unwrap_or_else(|| unused_for(&record))), record.used_at, record.id)
    }))
    .await;
    candidates.sort();
    candidates.truncate(excess);
    Some(candidates.into_iter().map(|(_, _, id)| id).collect())
}

/// How long no start has used the sandbox.
fn unused_for(record: &SandboxRecord) -> Duration {
    Time::now().since(record.used_at)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::http_client::AddressPolicy;

    /// A sandbox that was created and last used so many seconds ago.
    fn sandbox(id: &str, age: u64, status: SandboxStatus, starts: &[&str]) -> (SandboxRecord, Sandbox) {
        let at = Time::now().minus(Duration::from_secs(age)).sortable();
        let record: SandboxRecord = serde_json::from_value(json!({
            "user": "u", "id": id, "spec_id": "s", "session_key_sealed": "", "session_key_hash": "", "created_at": at,
            "used_at": at, "desired": "running", "starts": starts,
        }))
        .expect("a record");
        let sandbox = Sandbox::of(&record, status, "/w");
        (record, sandbox)
    }

    #[tokio::test]
    async fn the_idlest_sandboxes_without_starts_are_evicted() {
        let http = HttpClient::new(AddressPolicy::PublicOnly);
        let (newcomer, _) = sandbox("new", 5, SandboxStatus::Starting, &["t"]);
        let others = || {
            vec![
                sandbox("a", 10, SandboxStatus::Running, &[]),
                sandbox("b", 100, SandboxStatus::Running, &["t"]),
                sandbox("c", 50, SandboxStatus::Running, &[]),
                sandbox("d", 70, SandboxStatus::Starting, &[]),
                sandbox("younger", 1, SandboxStatus::Starting, &[]),
                sandbox("paused", 1000, SandboxStatus::Paused, &[]),
                sandbox("gone", 1000, SandboxStatus::Missing, &[]),
            ]
        };
        for (max, expected) in [
            (9, Some(vec![])),
            (5, Some(vec![])),
            (4, Some(vec!["c"])),
            (3, Some(vec!["c", "a"])),
            // A start uses one, and another one has not started yet.
            (2, None),
            (0, None),
        ] {
            let evicted = to_evict(&http, &newcomer, others(), max).await;
            assert_eq!(evicted, expected.map(|ids| ids.into_iter().map(str::to_owned).collect()), "{max}");
        }
        assert_eq!(to_evict(&http, &newcomer, Vec::new(), 0).await, Some(Vec::new()), "one may always run");
    }
}
