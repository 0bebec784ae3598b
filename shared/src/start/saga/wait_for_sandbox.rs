//! Step WAITING_FOR_SANDBOX of the start saga: waits until the sandbox's agent server responds.

use super::{StartRun, Step, StepError, with_detail};
use crate::sandbox::SandboxStatus;
use crate::start::store::Change;
use crate::start::task::StartStatus;

impl StartRun<'_> {
    pub(super) async fn wait_for_sandbox(&mut self) -> Result<Step, StepError> {
        let user = self.task.record.user.clone();
        let id = self.task.record.now.sandbox_id.clone().unwrap_or_default();
        self.boot = Some(SandboxStatus::Starting);
        let chosen = self.chosen.take().filter(|sandbox| sandbox.id == id);
        let is_chosen = chosen.is_some();
        let found = match chosen {
            Some(sandbox) => Some(sandbox),
            None => self.saga.sandboxes.inspect(&user, &id).await?,
        };
        let sandbox = found.ok_or_else(|| self.lost_sandbox(format!("Sandbox not found: {id}")))?;
        self.boot = Some(sandbox.status);
        match sandbox.status {
            SandboxStatus::Starting => Ok(Step::Wait),
            SandboxStatus::Paused => {
                self.resume(&id).await?;
                Ok(Step::Wait)
            }
            SandboxStatus::Missing if self.saga.sandboxes.relaunches() => {
                self.resume(&id).await?;
                Ok(Step::Wait)
            }
            SandboxStatus::Error => {
                Err(self.lost_sandbox(with_detail(format!("Sandbox entered error state: {id}"), &sandbox)))
            }
            SandboxStatus::Missing => {
                Err(self.lost_sandbox(with_detail(format!("Sandbox not startable: {id}"), &sandbox)))
            }
            SandboxStatus::Running => {
                self.sandbox = Some(sandbox);
                let Some((_, agent_server)) = self.running_sandbox().await? else { return Ok(Step::Wait) };
                let is_alive = if is_chosen {
                    // It ran a moment ago, so it most probably responds.
                    let (is_alive, marked) =
                        tokio::join!(agent_server.is_alive(), self.saga.sandboxes.mark_used(&user, &id));
                    marked?;
                    is_alive
                } else {
                    agent_server.is_alive().await
                };
                if !is_alive {
                    self.boot = Some(SandboxStatus::Running);
                    return Ok(Step::Wait);
                }
                self.boot = None;
                if !is_chosen {
                    self.saga.sandboxes.mark_used(&user, &id).await?;
                }
                Ok(Step::Next(&[StartStatus::PreparingRepository], Change::default()))
            }
        }
    }
}
