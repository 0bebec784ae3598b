//! Step WORKING of the start saga: selects the sandbox. It is the requested one, or one that the grouping strategy picks, or a new one.
//!
//! The start joins the sandbox in the transaction that records the choice, so that no other start and no deletion of a conversation can
//! delete the sandbox. If the sandbox is deleted before that, the transaction fails, and the step chooses again.

use futures::future::join_all;

use super::{StartRun, Step, StepError};
use crate::dynamo::text;
use crate::error::ErrorClass;
use crate::id;
use crate::sandbox::{Launch, Sandbox, SandboxStatus};
use crate::start::conversation_body::llm_of_start;
use crate::start::store::Change;
use crate::user::settings::SandboxGroupingStrategy;

impl StartRun<'_> {
    pub(super) async fn choose_sandbox(&mut self) -> Result<Step, StepError> {
        // A missing model fails the start here, before a sandbox is created.
        let settings = self.settings().await?;
        llm_of_start(&self.task.request, &settings)
            .map_err(|missing| StepError::Failed(ErrorClass::User, missing.to_string()))?;
        // As in the reference, a client can use the id of a deleted conversation again.
        if let Some(conversation) = self.task.request.conversation_id
            && !self.saga.conversations.reuse_id(&self.task.record.user, conversation).await?
        {
            return Ok(Step::Wait);
        }
        self.chosen = None;
        let id = self.sandbox_to_use().await?;
        let records = &self.saga.reconciler.records;
        let (user, task, own) = (&self.task.record.user, self.task.record.id, &self.task.record.new_sandbox_id);
        let mut writes = vec![records.joining(user, &id, task)?];
        // An earlier attempt may have created a sandbox that has ended since.
        if id != *own && records.get(user, own).await?.is_some() {
            writes.push(records.leaving(user, own, task)?);
        }
        self.task.record.now.sandbox_id = Some(id);
        Ok(Step::Join(writes))
    }

    async fn sandbox_to_use(&mut self) -> Result<String, StepError> {
        let user = self.task.record.user.clone();
        let sandboxes = &self.saga.sandboxes;
        if let Some(id) = self.task.request.sandbox_id.clone().filter(|id| !id.is_empty()) {
            return match sandboxes.inspect(&user, &id).await? {
                Some(sandbox) => {
                    self.chosen = Some(sandbox).filter(|sandbox| sandbox.status == SandboxStatus::Running);
                    Ok(id)
                }
                None => Err(StepError::Failed(ErrorClass::User, format!("Sandbox not found: {id}"))),
            };
        }
        let new_id = self.task.record.new_sandbox_id.clone();
        // An earlier attempt at this step, or an earlier start of the same conversation, may have created the sandbox.
        if let Some(made) = sandboxes.inspect(&user, &new_id).await? {
            match made.status {
                SandboxStatus::Running | SandboxStatus::Paused => return Ok(new_id),
                // Possibly only its record was created. A repeated start of a sandbox that is starting has no effect.
                SandboxStatus::Starting => return self.start_own_sandbox().await,
                SandboxStatus::Error | SandboxStatus::Missing => {}
            }
        }
        // An existing conversation keeps its sandbox while that sandbox exists.
        if let Some(existing) = self.saga.conversations.get(&user, self.task.record.conversation_id).await?
            && let Some(home) = sandboxes.inspect(&user, &existing.sandbox_id).await?
            && matches!(home.status, SandboxStatus::Starting | SandboxStatus::Running | SandboxStatus::Paused)
        {
            let id = home.id.clone();
            self.chosen = Some(home).filter(|sandbox| sandbox.status == SandboxStatus::Running);
            return Ok(id);
        }
        if let Some(shared) = self.sandbox_to_share().await? {
            return Ok(shared);
        }
        self.start_own_sandbox().await
    }

    /// Creates the sandbox of this start. If the sandbox with the chosen id is being deleted, because another start of the same
    /// conversation has failed, the start chooses another id, and records it before anything is created under it.
    async fn start_own_sandbox(&mut self) -> Result<String, StepError> {
        let (user, task) = (self.task.record.user.clone(), self.task.record.id);
        loop {
            let id = self.task.record.new_sandbox_id.clone();
            match self.saga.sandboxes.start(&user, &id, Some(task)).await? {
                Launch::Started => return Ok(id),
                Launch::Deleted => {}
                Launch::Full => return Err(StepError::AtCapacity),
            }
            let id = id::new_sandbox_id();
            let change = Change::default().set("new_sandbox_id", text(&id));
            self.saga.tasks.save(&user, task, &self.lease.worker, &change).await??;
            self.task.record.new_sandbox_id = id;
        }
    }

    /// Returns the running sandbox that the user's grouping strategy picks.
    async fn sandbox_to_share(&mut self) -> Result<Option<String>, StepError> {
        let strategy = self.settings().await?.sandbox_grouping_strategy;
        if strategy == SandboxGroupingStrategy::NoGrouping {
            return Ok(None);
        }
        let user = &self.task.record.user;
        let mut running = self.saga.sandboxes.list(user).await?;
        running.retain(|sandbox| sandbox.status == SandboxStatus::Running);
        let ids: Vec<String> = running.iter().map(|sandbox| sandbox.id.clone()).collect();
        let records = self.saga.reconciler.records.batch_get(user, &ids).await?;
        let limit = self.saga.config.max_conversations_per_sandbox;
        let below_limit = running.into_iter().zip(records).filter_map(|(sandbox, record)| {
            let count = record?.members();
            (count < limit).then_some((sandbox, count))
        });
        // A sandbox may have died or may hang although its provider still reports it as running.
        let answering = join_all(below_limit.map(async |(sandbox, count)| {
            let agent_server = sandbox.agent_server(&self.saga.http)?;
            agent_server.is_alive().await.then_some((sandbox, count))
        }));
        Ok(pick(strategy, answering.await.into_iter().flatten().collect()))
    }
}

/// Picks a sandbox. The sandboxes are in the order newest first, each with the number of its members.
fn pick(strategy: SandboxGroupingStrategy, sandboxes: Vec<(Sandbox, usize)>) -> Option<String> {
    let sandboxes = sandboxes.into_iter();
    let picked = match strategy {
        SandboxGroupingStrategy::NoGrouping => None,
        SandboxGroupingStrategy::AddToAny => sandboxes.into_iter().next(),
        SandboxGroupingStrategy::GroupByNewest => sandboxes.max_by_key(|(sandbox, _)| sandbox.created_at),
        SandboxGroupingStrategy::LeastRecentlyUsed => sandboxes.min_by_key(|(sandbox, _)| sandbox.used_at),
        SandboxGroupingStrategy::FewestConversations => sandboxes.min_by_key(|(_, count)| *count),
    };
    picked.map(|(sandbox, _)| sandbox.id)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::Time;

    fn sandbox(id: &str, created: u64, used: u64) -> Sandbox {
        let start: Time = serde_json::from_str("\"2025-01-01T00:00:00Z\"").expect("a time");
        Sandbox {
            id: id.into(),
            spec_id: String::new(),
            status: SandboxStatus::Running,
            session_api_key: None,
            exposed_urls: None,
            created_at: start.plus(Duration::from_secs(created)),
            used_at: start.plus(Duration::from_secs(used)),
            working_dir: "/w".into(),
            detail: None,
        }
    }

    #[test]
    fn every_strategy_picks_what_its_name_says() {
        let sandboxes =
            || vec![(sandbox("new", 30, 31), 3), (sandbox("middle", 20, 99), 1), (sandbox("old", 10, 40), 2)];
        for (strategy, expected) in [
            (SandboxGroupingStrategy::NoGrouping, None),
            (SandboxGroupingStrategy::AddToAny, Some("new")),
            (SandboxGroupingStrategy::GroupByNewest, Some("new")),
            // The oldest sandbox was used more recently.
            (SandboxGroupingStrategy::LeastRecentlyUsed, Some("new")),
            (SandboxGroupingStrategy::FewestConversations, Some("middle")),
        ] {
            assert_eq!(pick(strategy, sandboxes()).as_deref(), expected, "{strategy:?}");
            assert_eq!(pick(strategy, Vec::new()), None);
        }
    }
}
