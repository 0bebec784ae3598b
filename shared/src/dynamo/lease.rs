//! Leases (locks with an expiry): the exclusive right of one worker to change an item, until the worker releases the lease or it expires.
//!
//! The item's attributes `lease_owner` and `lease_until` contain the lease. A worker that crashes releases nothing; its lease expires, and
//! another worker claims the item. Claims and writes under a lease are idempotent: a retry by the SDK has no further effect.

use std::time::Duration;

use super::{Condition, Item, Outcome, Table, Update, text};
use crate::clock::Time;
use crate::error::Result;
use crate::id;

/// The attribute that identifies the worker.
const OWNER: &str = "lease_owner";
/// The attribute that contains the expiry time.
const UNTIL: &str = "lease_until";

/// A worker's lease on an item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The id of the worker in the item.
    pub owner: String,
    /// The expiry time, unless the lease is renewed.
    pub until: Time,
}

impl Lease {
    /// A lease for a new, random owner, to be claimed now.
    #[must_use]
    pub fn random(duration: Duration) -> Self {
        Self::of(id::random_base62(16), duration)
    }

    /// A lease for this owner, to be claimed or renewed now.
    #[must_use]
    pub fn of(owner: impl Into<String>, duration: Duration) -> Self {
        Self { owner: owner.into(), until: Time::now().plus(duration) }
    }

    /// Claims the lease together with an update, if no other owner has it. Returns the updated item.
    ///
    /// An owner that has the lease may claim it again: its own earlier claim may have failed after it took effect.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn claim(&self, table: &Table, key: Item, update: Update) -> Result<Outcome> {
        table.update_once(key, self.claimed(update)).await
    }

    fn claimed(&self, update: Update) -> Update {
        let is_free_or_own = Condition::Any(vec![is_free(), Condition::equal(OWNER, text(&self.owner))]);
        update.set(OWNER, text(&self.owner)).set(UNTIL, text(self.until.sortable())).condition(is_free_or_own)
    }

    /// Moves the expiry to [`Lease::until`] with an update, if the owner still has the lease.
    pub fn renew(&self, update: Update) -> Update {
        guard(update.set(UNTIL, text(self.until.sortable())), &self.owner)
    }
}

/// The condition that no owner has the lease, or that it has expired.
#[must_use]
pub fn is_free() -> Condition {
    let has_expired = Condition::Compare(UNTIL, "<", text(Time::now().sortable()));
    Condition::Any(vec![Condition::Missing(UNTIL), has_expired])
}

/// The condition that the row of a job is due: by now, or by the time at which it was due when the job was enqueued. If neither holds, a
/// job that was enqueued later continues the work.
#[must_use]
pub fn is_due(attribute: &'static str, due_at: Time) -> Condition {
    let by = |time: Time| Condition::Compare(attribute, "<=", text(time.sortable()));
    Condition::Any(vec![by(due_at), by(Time::now())])
}

/// The condition that the owner has the lease.
#[must_use]
pub fn is_of(owner: &str) -> Condition {
    Condition::equal(OWNER, text(owner))
}

/// The expiry time of the lease that an item contains, if it contains one.
#[must_use]
pub fn until(item: &Item) -> Option<Time> {
    item.get(UNTIL)?.as_s().ok()?.parse::<jiff::Timestamp>().ok().map(Time::from)
}

/// Takes the lease from its owner with an update. The lease itself stays until it expires, so that no other worker gets it while the
/// former owner completes a call.
pub fn revoke(update: Update) -> Update {
    update.set(OWNER, text(id::random_base62(16)))
}

/// Adds the condition that the owner has the lease to an update. Use it for parts of transactions, and for idempotent updates; use
/// [`write`] for all others.
pub fn guard(update: Update, owner: &str) -> Update {
    update.condition(is_of(owner))
}

/// Releases a lease with an update.
pub fn release(update: Update) -> Update {
    update.remove(OWNER).remove(UNTIL)
}

/// Updates an item under a lease, exactly once, and returns it. The update may append to a list or release the lease.
///
/// # Errors
/// [`crate::Error::Store`].
pub async fn write(table: &Table, key: Item, owner: &str, update: Update) -> Result<Outcome> {
    table.update_once(key, guard(update, owner)).await
}

/// Deletes an item under a lease, if the further conditions hold. Returns whether the item no longer exists.
///
/// # Errors
/// [`crate::Error::Store`].
pub async fn delete(
    table: &Table,
    key: Item,
    owner: &str,
    conditions: impl IntoIterator<Item = Condition>,
) -> Result<bool> {
    let condition = Condition::All([is_of(owner)].into_iter().chain(conditions).collect());
    // If the item does not exist, an attempt whose response was lost has deleted it: no one else deletes it during the lease.
    Ok(!matches!(table.delete(key, condition).await?, Err(Some(_))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_may_be_repeated_by_its_owner() {
        let lease = Lease::of("w1", Duration::from_secs(60));
        let (update, condition, expression) = lease.claimed(Update::new().remove("finished")).expressions();
        assert_eq!(update.expect("an update"), "SET #n1 = :v0, #n2 = :v1 REMOVE #n0");
        assert_eq!(condition.expect("a condition"), "((attribute_not_exists(#n2) OR #n2 < :v2) OR #n1 = :v3)");
        assert_eq!(expression.names["#n1"], "lease_owner");
        assert_eq!(expression.names["#n2"], "lease_until");
        assert_eq!(expression.values[":v3"], text("w1"));
    }

    #[test]
    fn renewal_and_release_depend_on_the_owner() {
        let lease = Lease::of("w1", Duration::from_secs(60));
        let (update, condition, _) = lease.renew(Update::new()).expressions();
        assert_eq!((update.as_deref(), condition.as_deref()), (Some("SET #n0 = :v0"), Some("#n1 = :v1")));
        let (update, condition, _) = guard(release(Update::new()), "w1").expressions();
        assert_eq!((update.as_deref(), condition.as_deref()), (Some("REMOVE #n0, #n1"), Some("#n0 = :v0")));
        assert_ne!(Lease::random(Duration::ZERO).owner, Lease::random(Duration::ZERO).owner);
    }
}
