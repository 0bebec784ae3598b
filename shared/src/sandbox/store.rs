//! Sandbox records in DynamoDB: owner, encrypted session key, desired state, members, and the provider's data.
//!
//! The record decides whether its sandbox may be deleted. It holds the members of the sandbox: the unfinished starts that use it, and its
//! conversations. A start joins by a conditional write before it depends on the sandbox, and a sandbox is marked for deletion on the
//! condition that it has no member; both are writes of this one item, so exactly one of them succeeds. A sandbox that is marked
//! ([`Desired::Deleted`]) no longer exists for its user: only the [`super::reconciler`] reads its record, until nothing is left of it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::{AttributeValue, TransactWriteItem};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::clock::{Time, sortable};
use crate::digest::sha256_hex;
use crate::dynamo::lease::{self, Lease};
use crate::dynamo::{
    Condition, DueIndex, Item, Outcome, Table, Update, from_item, number, store_error, text, to_item, transact,
};
use crate::error::{Error, Result};
use crate::id::{self, UserId};
use crate::sandbox::MAX_ID;
use crate::sandbox::boots::BootStore;
use crate::sandbox::circuit::CircuitBreaker;
use crate::user::seal::Sealer;

/// Index for session key lookup: a sandbox by the hash of its session key.
pub const BY_SESSION_KEY: &str = "by-session-key";
/// Index: a user's sandboxes by creation time.
pub const BY_CREATED: &str = "by-created";
/// Index: sandboxes that the reconciler has to look at, by the time from which the sweep enqueues their jobs. Sparse; in [`DUE_SHARDS`]
/// partitions.
pub const DUE: &str = "due";
/// Partitions of the index of due sandboxes.
pub const DUE_SHARDS: u8 = 4;

/// The attribute that puts a record into the index of due sandboxes.
const DUE_SHARD: &str = "due_shard";
const DUE_AT: &str = "due_at";
/// The attributes with the ids of a sandbox's members, two sets: an update cannot both add to one set and remove from it.
const STARTS: &str = "starts";
const CONVERSATIONS: &str = "conversations";
const DELETE_WHEN_EMPTY: &str = "delete_when_empty";
const GONE_SINCE: &str = "gone_since";
const ATTEMPTS: &str = "attempts";
const DESIRED: &str = "desired";
/// The attributes of sandboxes that are MicroVMs.
const GENERATION: &str = "generation";
const VM: &str = "vm";
const ENDPOINT: &str = "endpoint";
const TURNED_AT: &str = "turned_at";
const ROUTE_UNTIL: &str = "route_until";
/// The attributes of rows of MicroVMs, besides [`EXPIRES_AT`]: the sandbox, or that no sandbox may use the MicroVM.
const OWNER: &str = "owner";
const SANDBOX: &str = "sandbox";
const ORPHAN: &str = "orphan";
/// How long the row of a MicroVM stays. It is longer than a MicroVM can exist.
const VMS_EXPIRE: Duration = Duration::from_secs(2 * 24 * 3600);

/// The attributes of rows of names, besides `owner` and `sandbox`.
const SEEN_AT: &str = "seen_at";
const EXPIRES_AT: &str = "expires_at";
/// The attribute of the row of comparisons.
const COMPARED_TO: &str = "compared_to";
/// How long the row of a name stays after its sandbox's record was removed.
const NAMES_EXPIRE: Duration = Duration::from_secs(30 * 24 * 3600);
/// The name of the transactions here, for the log.
const OPERATION: &str = "TransactWriteItems sandboxes";

/// The delay between a change that the reconciler has to look at and the sweep's job for it. It leaves time for the message that the
/// change itself enqueues.
const SWEEP_DELAY: Duration = Duration::from_secs(2);
/// The delay between the time when a sandbox runs without a start and the first check whether it is idle.
const FIRST_IDLE_CHECK: Duration = Duration::from_secs(600);
/// The attempts to create or join a record that another worker removes at the same time.
const CREATE_ATTEMPTS: usize = 3;

/// The desired state of a sandbox. Its actual state is computed on read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Desired {
    /// Running.
    Running,
    /// Suspended in memory.
    Paused,
    /// Terminated. A resume launches it again.
    Stopped,
    /// Deleted, with its content. The state is final.
    Deleted,
}

impl Desired {
    fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Deleted => "deleted",
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SandboxRecord {
    /// The owner.
    pub user: UserId,
    pub id: String,
    /// The name at a provider that owners and deployments share, and that is found by its name ([`SandboxStore::names`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The sandbox spec (the image).
    pub spec_id: String,
    /// The session key, encrypted.
    pub session_key_sealed: String,
    /// The hash of the session key, for session key lookup.
    pub session_key_hash: String,
    #[serde(serialize_with = "sortable::serialize")]
    pub created_at: Time,
    /// The time of the latest start of a conversation in the sandbox.
    #[serde(serialize_with = "sortable::serialize")]
    pub used_at: Time,
    pub desired: Desired,
    /// The ids (hex) of the unfinished starts in the sandbox.
    #[serde(default, with = "serde_dynamo::string_set", skip_serializing_if = "BTreeSet::is_empty")]
    pub starts: BTreeSet<String>,
    /// The ids (hex) of the conversations in the sandbox.
    #[serde(default, with = "serde_dynamo::string_set", skip_serializing_if = "BTreeSet::is_empty")]
    pub conversations: BTreeSet<String>,
    /// Whether the sandbox is deleted once it has no member: a start has created it, or a conversation in it was deleted. A sandbox that
    /// its user has created stays when a start in it fails.
    #[serde(default)]
    pub delete_when_empty: bool,
    /// The failed attempts of the reconciler in a row.
    #[serde(default)]
    pub attempts: u32,
    /// Since when the provider has reported without interruption that nothing is left of the sandbox.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gone_since: Option<Time>,
    /// Whether its agent server has answered since the sandbox was created (Docker sandboxes).
    #[serde(default)]
    pub answered: bool,
    /// The number of launches before the current one (MicroVMs). Each launch has an idempotency token of its own.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub generation: u32,
    /// The id of its MicroVM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    /// The host name of its MicroVM's endpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The time of its latest launch or resume (MicroVMs).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub turned_at: Option<Time>,
    /// Until when the front door has a valid route to its MicroVM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route_until: Option<Time>,
    /// The port of its agent server on this machine (process sandboxes, Docker sandboxes on the host network).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

impl SandboxRecord {
    /// The number of starts and conversations in the sandbox.
    #[must_use]
    pub fn members(&self) -> usize {
        self.starts.len() + self.conversations.len()
    }

    /// Whether the sandbox has no member and is to be deleted for that reason.
    #[must_use]
    pub fn is_unused(&self) -> bool {
        self.delete_when_empty && self.members() == 0
    }

    /// Whether a conversation is a member.
    #[must_use]
    pub fn has_conversation(&self, conversation: Uuid) -> bool {
        self.conversations.contains(&id::hex(conversation))
    }
}

/// The right of one reconciler to process a sandbox, until its lease expires.
#[derive(Clone, Debug)]
pub struct SandboxClaim {
    lease: Lease,
    /// The due time that the claim has set. A change that the reconciler has to look at sets another one.
    due_at: Time,
    pub record: SandboxRecord,
}

/// A sandbox that was found by its name at the provider.
#[derive(Clone, Debug)]
pub struct NamedSandbox {
    /// The owner.
    pub user: UserId,
    pub id: String,
    /// Whether it has a record, which may be marked for deletion.
    pub has_record: bool,
    /// Since when the provider has it although it has no record.
    pub seen_at: Option<Time>,
}

/// The row of a name.
#[derive(Deserialize)]
struct NameRow {
    /// The name.
    id: String,
    owner: UserId,
    sandbox: String,
    #[serde(default)]
    seen_at: Option<Time>,
    #[serde(default)]
    expires_at: Option<i64>,
}

/// The store of sandbox records.
#[derive(Clone, Debug)]
pub struct SandboxStore {
    table: Table,
    sealer: Sealer,
}

impl SandboxStore {
    /// Creates a store on the `sandboxes` table.
    #[must_use]
    pub(crate) fn new(dynamodb: Client, table: String, sealer: Sealer) -> Self {
        Self { table: Table::new(dynamodb, table), sealer }
    }

    /// Creates a record with an encrypted session key. Does not store it.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the key cannot be encrypted.
    pub async fn new_record(
        &self,
        user: &UserId,
        id: &str,
        spec_id: &str,
        key: &SecretString,
    ) -> Result<SandboxRecord> {
        let now = Time::now();
        Ok(SandboxRecord {
            user: user.clone(),
            id: id.to_owned(),
            name: None,
            spec_id: spec_id.to_owned(),
            session_key_sealed: self.sealer.seal(&purpose(user, id), key).await?,
            session_key_hash: sha256_hex(key.expose_secret()),
            created_at: now,
            used_at: now,
            desired: Desired::Running,
            starts: BTreeSet::new(),
            conversations: BTreeSet::new(),
            delete_when_empty: false,
            attempts: 0,
            gone_since: None,
            answered: false,
            generation: 0,
            vm: None,
            endpoint: None,
            turned_at: None,
            route_until: None,
            port: None,
        })
    }

    /// Decrypts the record's session key.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when it was encrypted under another key.
    pub async fn session_key(&self, record: &SandboxRecord) -> Result<SecretString> {
        self.sealer.open(&purpose(&record.user, &record.id), &record.session_key_sealed).await
    }

    /// Stores a new record, or finds the existing record with the same id. If a start needs the sandbox, it becomes a member by the same
    /// write. Returns the stored record; `None` if the sandbox with this id is being deleted.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn create(&self, mut record: SandboxRecord, task: Option<Uuid>) -> Result<Option<SandboxRecord>> {
        record.starts = task.map(id::hex).into_iter().collect();
        record.delete_when_empty = task.is_some();
        let mut item = to_item(&record)?;
        if task.is_none() {
            item.insert(DUE_SHARD.into(), text(shard(&record.id)));
            item.insert(DUE_AT.into(), text(Time::now().plus(FIRST_IDLE_CHECK).sortable()));
        }
        let (user, id) = (record.user.clone(), record.id.clone());
        for _ in 0..CREATE_ATTEMPTS {
            if self.put_new(&record, item.clone()).await? {
                return Ok(Some(record));
            }
            let found = match task {
                Some(task) => match self.table.update(key(&user, &id), joined(task)).await? {
                    Outcome::Applied(item) => Some(item),
                    Outcome::ConditionFailed(item) => item,
                },
                None => self.table.get(key(&user, &id)).await?,
            };
            // Without an item, the record of a deleted sandbox was removed after the attempt to store the new one.
            if let Some(item) = found {
                let record: SandboxRecord = from_item(item)?;
                return Ok((record.desired != Desired::Deleted).then_some(record));
            }
        }
        Err(Error::internal(format!("the record of sandbox {id} is created and removed all the time")))
    }

    /// Writes the item of a new record, and the row of its name. Returns false if there is a record with the same id.
    async fn put_new(&self, record: &SandboxRecord, item: Item) -> Result<bool> {
        let is_new = Condition::Missing("id");
        let Some(name) = &record.name else { return self.table.put(item, is_new).await };
        let row = named(&record.user, &record.id).remove(EXPIRES_AT).remove(SEEN_AT);
        let writes =
            vec![self.table.put_in_transaction(item, &is_new)?, row.in_transaction(&self.table.name, name_key(name))?];
        Ok(transact(&self.table.client, writes, OPERATION).await?.is_written())
    }

    /// Removes a record on a condition. The row of its name stays for [`NAMES_EXPIRE`]: the provider may create the sandbox late. Returns
    /// whether the record no longer exists.
    async fn delete(&self, record: &SandboxRecord, condition: Condition) -> Result<bool> {
        let key = key(&record.user, &record.id);
        let Some(name) = &record.name else {
            // If the item does not exist, an attempt whose response was lost has deleted it.
            return Ok(!matches!(self.table.delete(key, condition).await?, Err(Some(_))));
        };
        let expires_at = Time::now().plus(NAMES_EXPIRE).unix_seconds().to_string();
        let row = named(&record.user, &record.id).set(EXPIRES_AT, AttributeValue::N(expires_at));
        let writes = vec![
            self.table.delete_in_transaction(key.clone(), Some(&condition))?,
            row.in_transaction(&self.table.name, name_key(name))?,
        ];
        if transact(&self.table.client, writes, OPERATION).await?.is_written() {
            return Ok(true);
        }
        Ok(self.table.batch_get(vec![key]).await?.is_empty())
    }

    /// Returns a record, also of a sandbox that is being deleted.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn find(&self, user: &UserId, id: &str) -> Result<Option<SandboxRecord>> {
        if !is_id(id) {
            return Ok(None);
        }
        self.table.batch_get(vec![key(user, id)]).await?.pop().map(from_item).transpose()
    }

    /// Returns the sandboxes with these names, by a consistent read. Names that expired or are unknown are left out.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn names(&self, names: &[String]) -> Result<HashMap<String, NamedSandbox>> {
        let now = Time::now().unix_seconds();
        let mut rows: Vec<NameRow> = Vec::with_capacity(names.len());
        for item in self.table.batch_get(names.iter().map(|name| name_key(name)).collect()).await? {
            rows.push(from_item(item)?);
        }
        // DynamoDB removes an expired row within a few days, and the local engine removes none.
        rows.retain(|row| row.expires_at.is_none_or(|expires_at| expires_at > now));
        // Several names may have been those of one sandbox.
        let keys: BTreeSet<(&UserId, &str)> = rows.iter().map(|row| (&row.owner, row.sandbox.as_str())).collect();
        let keys = keys.into_iter().map(|(owner, sandbox)| key(owner, sandbox)).collect();
        let mut recorded: HashSet<String> = HashSet::new();
        for item in self.table.batch_get(keys).await? {
            let record: SandboxRecord = from_item(item)?;
            recorded.insert(record.user.key_of(&record.id));
        }
        let found = rows.into_iter().map(|row| {
            let has_record = recorded.contains(&row.owner.key_of(&row.sandbox));
            (row.id, NamedSandbox { user: row.owner, id: row.sandbox, has_record, seen_at: row.seen_at })
        });
        Ok(found.collect())
    }

    /// Sets or clears since when the provider has the sandbox with this name although it has no record.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_seen_at(&self, name: &str, seen_at: Option<Time>) -> Result<()> {
        let update = Update::new().set_or_remove(SEEN_AT, seen_at.map(|time| text(time.sortable())));
        self.table.apply(name_key(name), update.condition(Condition::Exists("id"))).await?;
        Ok(())
    }

    /// Creates the record of a sandbox that is marked for deletion, and is due. Returns false if there is a record meanwhile.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn create_deleted(&self, name: &str, sandbox: &NamedSandbox) -> Result<bool> {
        let key = SecretString::from(id::new_session_key());
        let mut record = self.new_record(&sandbox.user, &sandbox.id, "", &key).await?;
        (record.desired, record.name) = (Desired::Deleted, Some(name.to_owned()));
        let mut item = to_item(&record)?;
        item.insert(DUE_SHARD.into(), text(shard(&record.id)));
        item.insert(DUE_AT.into(), text(Time::now().plus(SWEEP_DELAY).sortable()));
        self.put_new(&record, item).await
    }

    /// Claims the next comparison of the provider's sandboxes with the records. Returns the name after which it begins; `None` if the last
    /// one was claimed less than `period` ago.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn claim_comparison(&self, now: Time, period: Duration) -> Result<Option<String>> {
        let is_due = vec![Condition::Missing(DUE_AT), Condition::Compare(DUE_AT, "<=", text(now.sortable()))];
        let update = Update::new().set(DUE_AT, text(now.plus(period).sortable())).condition(Condition::Any(is_due));
        let claimed = self.table.update_once(comparison_key(), update).await?.applied();
        let after = |item: Item| item.get(COMPARED_TO).and_then(|name| name.as_s().ok()).cloned().unwrap_or_default();
        Ok(claimed.map(after))
    }

    /// Sets the name after which the next comparison begins.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_compared_to(&self, name: &str) -> Result<()> {
        self.table.apply(comparison_key(), Update::new().set(COMPARED_TO, text(name))).await?;
        Ok(())
    }

    /// Removes the record of a sandbox that was not created at its provider, unless something else has joined the sandbox meanwhile.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn withdraw(&self, record: &SandboxRecord) -> Result<()> {
        let starts = record.starts.iter().cloned().collect::<Vec<_>>();
        let starts = (!starts.is_empty()).then_some(AttributeValue::Ss(starts));
        let is_unchanged = Condition::All(vec![
            Condition::equal(DESIRED, text(Desired::Running.as_str())),
            Condition::unchanged(STARTS, starts),
            Condition::Missing(CONVERSATIONS),
        ]);
        let _removed = self.delete(record, is_unchanged).await?;
        Ok(())
    }

    /// The write by which a start joins a sandbox, for a transaction. It fails if the sandbox does not exist or is being deleted.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the update cannot be built.
    pub fn joining(&self, user: &UserId, id: &str, task: Uuid) -> Result<TransactWriteItem> {
        joined(task).in_transaction(&self.table.name, key(user, id))
    }

    /// As [`SandboxStore::joining`], for an id that a client has given. `None` if no sandbox can have it.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the update cannot be built.
    pub fn joining_given(&self, user: &UserId, id: &str, task: Uuid) -> Result<Option<TransactWriteItem>> {
        is_id(id).then(|| self.joining(user, id, task)).transpose()
    }

    /// The write by which a conversation becomes a member in place of the start that has created it, for a transaction. It fails if the
    /// sandbox does not exist or is being deleted.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the update cannot be built.
    pub fn completing(&self, user: &UserId, id: &str, task: Uuid, conversation: Uuid) -> Result<TransactWriteItem> {
        is_open(due_later(Update::new(), id))
            .add_to_set(CONVERSATIONS, &id::hex(conversation))
            .remove_from_set(STARTS, &id::hex(task))
            .in_transaction(&self.table.name, key(user, id))
    }

    /// The write by which a conversation becomes a member, for a transaction. It fails if the sandbox does not exist or is being deleted.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the update cannot be built.
    pub fn adding(&self, user: &UserId, id: &str, conversation: Uuid) -> Result<TransactWriteItem> {
        is_open(Update::new())
            .add_to_set(CONVERSATIONS, &id::hex(conversation))
            .in_transaction(&self.table.name, key(user, id))
    }

    /// The write by which a start leaves the sandbox that it has created, because it uses another one; for a transaction. It fails if the
    /// sandbox does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the update cannot be built.
    pub fn leaving(&self, user: &UserId, id: &str, task: Uuid) -> Result<TransactWriteItem> {
        left_by_start(id, task, true).condition(Condition::Exists("id")).in_transaction(&self.table.name, key(user, id))
    }

    /// The write by which a conversation leaves a sandbox because it moves to another one, for a transaction. It fails if the sandbox
    /// does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] when the update cannot be built.
    pub fn moving_out(&self, user: &UserId, id: &str, conversation: Uuid) -> Result<TransactWriteItem> {
        due_now(Update::new(), id)
            .remove_from_set(CONVERSATIONS, &id::hex(conversation))
            .condition(Condition::Exists("id"))
            .in_transaction(&self.table.name, key(user, id))
    }

    /// Ends the membership of a start. `delete_when_empty` marks the sandbox as one that is deleted once it has no member. Returns the
    /// record, from which the reconciler decides later; `None` if there is none.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn leave(
        &self,
        user: &UserId,
        id: &str,
        task: Uuid,
        delete_when_empty: bool,
    ) -> Result<Option<SandboxRecord>> {
        if !is_id(id) {
            return Ok(None);
        }
        let is_member = Condition::Contains(STARTS, text(id::hex(task)));
        let update = left_by_start(id, task, delete_when_empty).condition(is_member);
        self.updated(user, id, update).await
    }

    /// Ends the membership of a conversation. `delete_when_empty` as in [`SandboxStore::leave`]. Returns the record; `None` if there is
    /// none.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn remove_conversation(
        &self,
        user: &UserId,
        id: &str,
        conversation: Uuid,
        delete_when_empty: bool,
    ) -> Result<Option<SandboxRecord>> {
        if !is_id(id) {
            return Ok(None);
        }
        let conversation = id::hex(conversation);
        let mut update = due_now(Update::new(), id)
            .remove_from_set(CONVERSATIONS, &conversation)
            .condition(Condition::Contains(CONVERSATIONS, text(conversation)));
        if delete_when_empty {
            update = update.set(DELETE_WHEN_EMPTY, true_value());
        }
        self.updated(user, id, update).await
    }

    /// Updates a record, and returns it whether the conditions held or not.
    async fn updated(&self, user: &UserId, id: &str, update: Update) -> Result<Option<SandboxRecord>> {
        match self.table.update(key(user, id), update).await? {
            Outcome::Applied(item) | Outcome::ConditionFailed(Some(item)) => from_item(item).map(Some),
            Outcome::ConditionFailed(None) => Ok(None),
        }
    }

    /// Marks a sandbox for deletion, with whatever members it has. Returns false if it does not exist or is being deleted already.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn mark_deleted(&self, user: &UserId, id: &str) -> Result<bool> {
        let update = is_open(deleted(due_now(Update::new(), id)));
        Ok(is_id(id) && self.table.update_once(key(user, id), update).await?.is_applied())
    }

    /// The index of sandboxes that the reconciler has to look at.
    #[must_use]
    pub fn due(&self) -> DueIndex {
        DueIndex {
            table: self.table.clone(),
            index: DUE,
            shard_attribute: DUE_SHARD,
            shards: (0..DUE_SHARDS).map(|shard| shard.to_string()).collect(),
            sort_key: "id",
            has_uuids: false,
        }
    }

    /// Claims a sandbox that the reconciler has to look at. `None` if it is not due, does not exist, or another worker has it.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn claim(&self, user: &UserId, id: &str, duration: Duration) -> Result<Option<SandboxClaim>> {
        if !is_id(id) {
            return Ok(None);
        }
        let lease = Lease::random(duration);
        let due_at = lease.until.plus(SWEEP_DELAY);
        let update =
            Update::new().set(DUE_AT, text(due_at.sortable())).add(ATTEMPTS, 1).condition(Condition::Exists(DUE_SHARD));
        let claimed = lease.claim(&self.table, key(user, id), update).await?.applied();
        Ok(match claimed {
            Some(item) => Some(SandboxClaim { lease, due_at, record: from_item(item)? }),
            None => None,
        })
    }

    /// Marks a claimed sandbox for deletion if it still has no member. Returns whether it is marked.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn mark_unused_deleted(&self, claim: &SandboxClaim) -> Result<bool> {
        let update = is_open(deleted(Update::new()))
            .condition(Condition::Missing(STARTS))
            .condition(Condition::Missing(CONVERSATIONS));
        Ok(self.write(claim, update).await?.is_applied())
    }

    /// Ends a claim: the reconciler has nothing left to do, unless something has changed since the claim.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn settle(&self, claim: &SandboxClaim) -> Result<()> {
        self.end(claim, Update::new().remove_all(&[DUE_SHARD, DUE_AT, ATTEMPTS])).await
    }

    /// Ends a claim: the sandbox is due again at `due_at`, unless a change since the claim has made it due earlier. `gone_since` and
    /// `attempts` are the new values of these attributes.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn postpone(
        &self,
        claim: &SandboxClaim,
        due_at: Time,
        gone_since: Option<Time>,
        attempts: u32,
    ) -> Result<()> {
        let update = Update::new()
            .set(DUE_AT, text(due_at.sortable()))
            .set(ATTEMPTS, number(attempts))
            .set_or_remove(GONE_SINCE, gone_since.map(|time| text(time.sortable())));
        self.end(claim, update).await
    }

    /// Releases a claim with an update, or without it if a change since the claim has set another due time, which stays then.
    async fn end(&self, claim: &SandboxClaim, update: Update) -> Result<()> {
        let is_unchanged = Condition::equal(DUE_AT, text(claim.due_at.sortable()));
        if !self.write(claim, lease::release(update).condition(is_unchanged)).await?.is_applied() {
            // If the lease is lost, another worker has the sandbox.
            let _released = self.write(claim, lease::release(Update::new())).await?;
        }
        Ok(())
    }

    /// Removes the record of a deleted sandbox.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn remove(&self, claim: &SandboxClaim) -> Result<bool> {
        let is_deleted = Condition::equal(DESIRED, text(Desired::Deleted.as_str()));
        let is_own = lease::is_of(&claim.lease.owner);
        self.delete(&claim.record, Condition::All(vec![is_own, is_deleted])).await
    }

    async fn write(&self, claim: &SandboxClaim, update: Update) -> Result<Outcome> {
        lease::write(&self.table, key(&claim.record.user, &claim.record.id), &claim.lease.owner, update).await
    }

    /// Returns one record.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn get(&self, user: &UserId, id: &str) -> Result<Option<SandboxRecord>> {
        Ok(self.batch_get(user, &[id.to_owned()]).await?.pop().flatten())
    }

    /// Returns whether the user has a sandbox with this id, by a consistent read.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn exists(&self, user: &UserId, id: &str) -> Result<bool> {
        if !is_id(id) {
            return Ok(false);
        }
        let found = self.table.get(key(user, id)).await?;
        Ok(found.is_some_and(|item| item.get(DESIRED) != Some(&text(Desired::Deleted.as_str()))))
    }

    /// Returns records in the order of the ids, by a consistent read; `None` for sandboxes that do not exist or are being deleted.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn batch_get(&self, user: &UserId, ids: &[String]) -> Result<Vec<Option<SandboxRecord>>> {
        let mut found: HashMap<String, SandboxRecord> = HashMap::new();
        let mut wanted: Vec<&String> = ids.iter().filter(|id| is_id(id)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        for item in self.table.batch_get(wanted.into_iter().map(|id| key(user, id)).collect()).await? {
            let record: SandboxRecord = from_item(item)?;
            if record.desired != Desired::Deleted {
                found.insert(record.id.clone(), record);
            }
        }
        Ok(ids.iter().map(|id| found.get(id).cloned()).collect())
    }

    /// Returns records of several users in the order of the keys, as [`SandboxStore::batch_get`] does.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn batch_get_of_users(&self, keys: &[(UserId, String)]) -> Result<Vec<Option<SandboxRecord>>> {
        let mut found: HashMap<(UserId, String), SandboxRecord> = HashMap::new();
        let wanted: BTreeSet<&(UserId, String)> = keys.iter().filter(|(_, id)| is_id(id)).collect();
        for item in self.table.batch_get(wanted.into_iter().map(|(user, id)| key(user, id)).collect()).await? {
            let record: SandboxRecord = from_item(item)?;
            if record.desired != Desired::Deleted {
                found.insert((record.user.clone(), record.id.clone()), record);
            }
        }
        Ok(keys.iter().map(|key| found.get(key).cloned()).collect())
    }

    /// The starts that wait for sandboxes.
    #[must_use]
    pub fn boots(&self) -> BootStore {
        BootStore::new(self.table.clone())
    }

    /// The circuit breaker of the provider.
    #[must_use]
    pub fn circuit(&self) -> CircuitBreaker {
        CircuitBreaker::new(self.table.clone())
    }

    /// Returns all records of a user, newest first.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn list(&self, user: &UserId) -> Result<Vec<SandboxRecord>> {
        let mut records = self.list_all(user).await?;
        records.retain(|record| record.desired != Desired::Deleted);
        Ok(records)
    }

    /// Returns all records of a user, including those of sandboxes that are being deleted.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn list_all(&self, user: &UserId) -> Result<Vec<SandboxRecord>> {
        let mut records = Vec::new();
        let mut pages = self
            .table
            .query()
            .index_name(BY_CREATED)
            .key_condition_expression("#user = :user")
            .expression_attribute_names("#user", "user")
            .expression_attribute_values(":user", text(user.as_str()))
            .scan_index_forward(false)
            .into_paginator()
            .items()
            .send();
        while let Some(item) = pages.next().await {
            records.push(from_item(item.map_err(store_error("Query sandboxes"))?)?);
        }
        Ok(records)
    }

    /// Returns the sandbox with this session key, of any user.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn find_by_session_key(&self, key: &str) -> Result<Option<SandboxRecord>> {
        let found = self
            .table
            .query()
            .index_name(BY_SESSION_KEY)
            .key_condition_expression("session_key_hash = :hash")
            .expression_attribute_values(":hash", text(sha256_hex(key)))
            .limit(1)
            .send()
            .await
            .map_err(store_error("Query sandboxes"))?;
        let found: Option<SandboxRecord> = found.items.unwrap_or_default().pop().map(from_item).transpose()?;
        Ok(found.filter(|record| record.desired != Desired::Deleted))
    }

    /// Sets the desired state. Returns false when the record does not exist or the sandbox is being deleted.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_desired(&self, user: &UserId, id: &str, desired: Desired) -> Result<bool> {
        let update = Update::new().set(DESIRED, text(desired.as_str()));
        let update = if desired == Desired::Running { due_later(update, id) } else { update };
        self.apply(user, id, update).await
    }

    /// Records that the sandbox's agent server has answered. Returns false when the record does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_answered(&self, user: &UserId, id: &str) -> Result<bool> {
        self.apply(user, id, Update::new().set("answered", true_value())).await
    }

    /// Sets the port of the sandbox's agent server. Returns false when the record does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_port(&self, user: &UserId, id: &str, port: u16) -> Result<bool> {
        self.apply(user, id, Update::new().set("port", number(port.into()))).await
    }

    /// Enters the MicroVM of the record's generation into the record, and the sandbox into the row of the MicroVM. Returns false if the
    /// sandbox is being deleted, has another generation meanwhile, or the MicroVM is marked as an orphan.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn record_vm(&self, record: &SandboxRecord, vm: &str, endpoint: &str) -> Result<bool> {
        let (user, id) = (&record.user, record.id.as_str());
        let expires_at = Time::now().plus(VMS_EXPIRE).unix_seconds().to_string();
        // Its route has to be opened once it runs, also if no one looks at it.
        let update = is_open(due_now(Update::new(), id))
            .set(VM, text(vm))
            .set(ENDPOINT, text(endpoint))
            .set(TURNED_AT, text(Time::now().sortable()))
            .condition(has_generation(record));
        let row = named(user, id).set(EXPIRES_AT, AttributeValue::N(expires_at)).condition(Condition::Missing(ORPHAN));
        let writes = vec![
            update.in_transaction(&self.table.name, key(user, id))?,
            row.in_transaction(&self.table.name, vm_key(vm))?,
        ];
        Ok(transact(&self.table.client, writes, OPERATION).await?.is_written())
    }

    /// Begins the next generation of a sandbox, which is to run and has no MicroVM yet, unless that was done already. Returns the record, whichever
    /// generation it has now; `None` if the sandbox does not exist or is being deleted.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn next_generation(&self, record: &SandboxRecord) -> Result<Option<SandboxRecord>> {
        let update = is_open(due_now(Update::new(), &record.id))
            .set(DESIRED, text(Desired::Running.as_str()))
            .set(GENERATION, number(record.generation.saturating_add(1)))
            .set(TURNED_AT, text(Time::now().sortable()))
            .remove_all(&[VM, ENDPOINT, ROUTE_UNTIL])
            .condition(has_generation(record));
        let found = self.updated(&record.user, &record.id, update).await?;
        Ok(found.filter(|record| record.desired != Desired::Deleted))
    }

    /// Records that a sandbox with this MicroVM is to run from now on. Returns false when it is being deleted or has another MicroVM.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_turned(&self, user: &UserId, id: &str, vm: &str) -> Result<bool> {
        let update = due_now(Update::new(), id)
            .set(DESIRED, text(Desired::Running.as_str()))
            .set(TURNED_AT, text(Time::now().sortable()))
            .condition(Condition::equal(VM, text(vm)));
        self.apply(user, id, update).await
    }

    /// Sets until when the front door has a valid route to this MicroVM. Returns false when the sandbox is being deleted or has another
    /// MicroVM.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_route(&self, user: &UserId, id: &str, vm: &str, until: Option<Time>) -> Result<bool> {
        let update = Update::new()
            .set_or_remove(ROUTE_UNTIL, until.map(|until| text(until.sortable())))
            .condition(Condition::equal(VM, text(vm)));
        self.apply(user, id, update).await
    }

    /// Returns those of these MicroVMs that are in the record of a sandbox, by consistent reads. The sandbox may be marked for deletion.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn used_vms(&self, vms: &[String]) -> Result<HashSet<String>> {
        let mut sandboxes: BTreeSet<(String, String)> = BTreeSet::new();
        for item in self.table.batch_get(vms.iter().map(|vm| vm_key(vm)).collect()).await? {
            let attribute = |name: &str| item.get(name).and_then(|value| value.as_s().ok()).cloned();
            if let (Some(owner), Some(sandbox)) = (attribute(OWNER), attribute(SANDBOX)) {
                sandboxes.insert((owner, sandbox));
            }
        }
        let keys = sandboxes.into_iter().map(|(owner, sandbox)| key(&UserId::new(owner), &sandbox)).collect();
        let mut used = HashSet::new();
        for item in self.table.batch_get(keys).await? {
            used.extend(from_item::<SandboxRecord>(item)?.vm);
        }
        Ok(used)
    }

    /// Marks a MicroVM that no record has as an orphan, which no sandbox can use any more. Returns false if a sandbox uses it meanwhile.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn mark_orphan(&self, vm: &str) -> Result<bool> {
        let expires_at = Time::now().plus(VMS_EXPIRE).unix_seconds().to_string();
        let mark = Update::new().set(ORPHAN, true_value()).set(EXPIRES_AT, AttributeValue::N(expires_at));
        if self.table.apply(vm_key(vm), mark.condition(Condition::Missing(OWNER))).await? {
            return Ok(true);
        }
        // The row has been written together with the record. A record that has another MicroVM now never gets this one again, because
        // its generation has changed.
        Ok(!self.used_vms(&[vm.to_owned()]).await?.contains(vm))
    }

    /// Sets the spec and the port with which the agent server is launched. Returns false when the record does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn set_launched(&self, user: &UserId, id: &str, port: u16, spec_id: &str) -> Result<bool> {
        self.apply(user, id, Update::new().set("port", number(port.into())).set("spec_id", text(spec_id))).await
    }

    /// Sets the sandbox's session key. Returns false when the record does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`]; [`crate::Error::Internal`] when the key cannot be encrypted.
    pub async fn set_session_key(&self, user: &UserId, id: &str, key: &SecretString) -> Result<bool> {
        let sealed = self.sealer.seal(&purpose(user, id), key).await?;
        let hash = sha256_hex(key.expose_secret());
        let update = Update::new().set("session_key_sealed", text(sealed)).set("session_key_hash", text(hash));
        self.apply(user, id, update).await
    }

    /// Sets the time of use to now. Returns false when the record does not exist.
    ///
    /// # Errors
    /// [`crate::Error::Store`].
    pub async fn mark_used(&self, user: &UserId, id: &str) -> Result<bool> {
        self.apply(user, id, Update::new().set("used_at", text(Time::now().sortable()))).await
    }

    /// Updates a record. Returns false when it does not exist or its sandbox is being deleted.
    async fn apply(&self, user: &UserId, id: &str, update: Update) -> Result<bool> {
        Ok(is_id(id) && self.table.apply(key(user, id), is_open(update)).await?)
    }
}

/// Adds the conditions that the sandbox exists and is not being deleted.
fn is_open(update: Update) -> Update {
    let is_kept = Condition::Compare(DESIRED, "<>", text(Desired::Deleted.as_str()));
    update.condition(Condition::Exists("id")).condition(is_kept)
}

fn joined(task: Uuid) -> Update {
    is_open(Update::new()).add_to_set(STARTS, &id::hex(task))
}

fn left_by_start(id: &str, task: Uuid, delete_when_empty: bool) -> Update {
    let update = due_now(Update::new(), id).remove_from_set(STARTS, &id::hex(task));
    if delete_when_empty { update.set(DELETE_WHEN_EMPTY, true_value()) } else { update }
}

fn deleted(update: Update) -> Update {
    update.set(DESIRED, text(Desired::Deleted.as_str()))
}

/// Makes a sandbox due: the sweep enqueues its job if no worker processes it before.
fn due_now(update: Update, id: &str) -> Update {
    update.set(DUE_SHARD, text(shard(id))).set(DUE_AT, text(Time::now().plus(SWEEP_DELAY).sortable()))
}

/// Makes a sandbox that runs due after a while: the reconciler checks whether it is idle.
fn due_later(update: Update, id: &str) -> Update {
    update.set(DUE_SHARD, text(shard(id))).set(DUE_AT, text(Time::now().plus(FIRST_IDLE_CHECK).sortable()))
}

fn shard(id: &str) -> String {
    let sum = id.bytes().fold(0_u8, u8::wrapping_add);
    (sum % DUE_SHARDS).to_string()
}

fn true_value() -> AttributeValue {
    AttributeValue::Bool(true)
}

/// The row of a sandbox's name. Like the row of comparisons, it is in the table's partitions whose key no user has.
fn named(user: &UserId, id: &str) -> Update {
    Update::new().set(OWNER, text(user.as_str())).set(SANDBOX, text(id))
}

fn vm_key(vm: &str) -> Item {
    key(&UserId::new(format!("#vm#{vm}")), vm)
}

fn has_generation(record: &SandboxRecord) -> Condition {
    Condition::unchanged(GENERATION, (record.generation > 0).then(|| number(record.generation)))
}

/// For serde.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(number: &u32) -> bool {
    *number == 0
}

fn name_key(name: &str) -> Item {
    key(&UserId::new(format!("#name#{name}")), name)
}

fn comparison_key() -> Item {
    key(&UserId::new("#comparison"), "provider")
}

fn key(user: &UserId, id: &str) -> Item {
    Item::from([("user".into(), text(user.as_str())), ("id".into(), text(id))])
}

/// Returns whether a text can be a sandbox id. DynamoDB refuses keys that are empty or longer than 1 KB.
fn is_id(text: &str) -> bool {
    (1..=MAX_ID).contains(&text.len())
}

fn purpose(user: &UserId, id: &str) -> String {
    format!("session-key:{user}:{id}")
}
