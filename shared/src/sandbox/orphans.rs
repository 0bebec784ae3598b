//! Orphans: sandboxes that a provider runs and that have no record here, for example because a creation took effect after its record was
//! removed. They cost money, and no request can reach them.
//!
//! The name of a sandbox at a provider begins with a digest of the deployment's id, and a row of this deployment maps the name to its owner
//! and id. A sandbox with such a name is an orphan if a consistent read finds no record, twice, and it is old enough that no call can still
//! be about to write one. It then gets a record that is marked for deletion, by a conditional write: either this write or that of a start
//! with the same id succeeds. From there on the reconciler deletes it like any other sandbox.
//!
//! Whatever else the provider runs may belong to someone else, and is only reported.
//!
//! A provider whose sandboxes have no names finds its orphans itself ([`super::SandboxService::end_orphans`]).

use std::time::Duration;

use super::ProviderSandbox;
use super::reconciler::SandboxReconciler;
use super::store::NamedSandbox;
use crate::clock::Time;
use crate::error::Result;

/// The time between two comparisons of the provider's sandboxes with the records.
pub const PERIOD: Duration = Duration::from_secs(600);
/// An orphan that is younger is kept. If the provider does not report the age, it counts from the first time that the orphan was seen.
pub const MIN_AGE: Duration = Duration::from_secs(3600);
/// The most sandboxes that one comparison looks up; the next one continues.
const AT_ONCE: usize = 1000;
/// The most names in a line of the log.
const SHOWN: usize = 10;

impl SandboxReconciler {
    /// Compares the provider's sandboxes with the records, unless that was done within [`PERIOD`]. Marks orphans for deletion and returns
    /// their number.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub async fn find_orphans(&self, now: Time) -> Result<usize> {
        if !self.sandboxes.can_list_provider() {
            return Ok(0);
        }
        let Some(after) = self.records.claim_comparison(now, PERIOD).await? else { return Ok(0) };
        let mut orphans = match self.sandboxes.end_orphans(now).await {
            Err(error) if error.is_upstream() => {
                tracing::warn!(error = %error.context(), "sandbox.provider_not_listed");
                0
            }
            ended => ended?,
        };
        let found = match self.sandboxes.list_provider().await {
            Err(error) if error.is_upstream() => {
                tracing::warn!(error = %error.context(), "sandbox.provider_not_listed");
                return Ok(orphans);
            }
            found => found?,
        };
        let (mut own, mut unknown): (Vec<ProviderSandbox>, Vec<ProviderSandbox>) =
            found.into_iter().partition(|found| found.is_own);
        own.sort_by(|one, other| one.name.cmp(&other.name));
        own.retain(|found| found.name > after);
        let is_cut_off = own.len() > AT_ONCE;
        own.truncate(AT_ONCE);
        let next = own.last().filter(|_| is_cut_off).map_or("", |last| &last.name).to_owned();
        let looked_up: Vec<String> = own.iter().map(|found| found.name.clone()).collect();
        let mut known = self.records.names(&looked_up).await?;
        for found in own {
            match known.remove(&found.name) {
                Some(sandbox) => orphans += usize::from(self.check(&found, &sandbox, now).await?),
                // Without a row of its name nothing shows that this deployment has created it.
                None => unknown.push(found),
            }
        }
        self.records.set_compared_to(&next).await?;
        if !unknown.is_empty() {
            let names: Vec<&str> = unknown.iter().map(|found| found.name.as_str()).take(SHOWN).collect();
            tracing::warn!(count = unknown.len(), names = names.join(" "), "sandbox.unknown_at_provider");
        }
        Ok(orphans)
    }

    /// Checks one sandbox of the provider. Returns whether it is an orphan and is marked for deletion now.
    async fn check(&self, found: &ProviderSandbox, sandbox: &NamedSandbox, now: Time) -> Result<bool> {
        if sandbox.has_record {
            if sandbox.seen_at.is_some() {
                self.records.set_seen_at(&found.name, None).await?;
            }
            return Ok(false);
        }
        let Some(seen_at) = sandbox.seen_at else {
            tracing::info!(name = found.name, sandbox = sandbox.id, "sandbox.orphan_seen");
            self.records.set_seen_at(&found.name, Some(now)).await?;
            return Ok(false);
        };
        let age = now.since(found.created_at.unwrap_or(seen_at));
        if age < MIN_AGE || now.since(seen_at) < PERIOD {
            return Ok(false);
        }
        let is_marked = self.records.create_deleted(&found.name, sandbox).await?;
        if is_marked {
            tracing::warn!(name = found.name, sandbox = sandbox.id, "sandbox.orphan_deleted");
            self.enqueue(&sandbox.user, &sandbox.id, Duration::ZERO).await;
        }
        Ok(is_marked)
    }
}
