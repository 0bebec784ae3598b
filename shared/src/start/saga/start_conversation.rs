//! Steps SETTING_UP_SKILLS and STARTING_CONVERSATION of the start saga: create the conversation on the agent server and record it.
//! The create is idempotent: all starts of one conversation id give one conversation, with one first message.

use std::time::Duration;

use http::StatusCode;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};
use tracing::Instrument as _;

use super::prepare_repository::PREPARE;
use super::probe_mcp_servers::{ProbeStart, shown};
use super::{LONGEST_RUN, StartRun, Step, StepError};
use crate::agent_server::version::{AgentServerVersion, EXTENDED_CREATE};
use crate::agent_server::{
    AgentServer, AgentServerError, ConversationInfo, Failure, Retry, SkillInfo, SkillSources, SkillsQuery,
};
use crate::clock::Time;
use crate::conversation::fields::EventCallbackProcessor;
use crate::conversation::reports::{Lookup, Recorded, default_titles};
use crate::conversation::store::ConversationChange;
use crate::conversation::{ConversationRecord, LaunchedAgentProfile, MetricsSnapshot, OPENHANDS_AGENT};
use crate::error::{Error, ErrorClass, StoreErrorKind};
use crate::event;
use crate::http::secret::InTerminal;
use crate::id;
use crate::jobs::process_events::{self, ProcessEvents};
use crate::metrics::{self, Outcome};
use crate::sandbox::Sandbox;
use crate::start::conversation_body::{ConversationBody, ConversationInputs, conversation_body, uses_llm_analyzer};
use crate::start::request::AgentType;
use crate::start::store::StartTaskStore;
use crate::start::task::{Snapshot, StartStatus};
use crate::user::token::TokenKey;

/// What the agent server returns about itself and the project, for the request that creates the conversation.
pub(super) struct Loaded {
    /// The hooks of the project.
    hooks: Result<Option<Value>, AgentServerError>,
    version: Result<Option<AgentServerVersion>, AgentServerError>,
}

impl Loaded {
    async fn load(agent_server: &AgentServer, project_dir: &str) -> Self {
        let (hooks, version) = tokio::join!(agent_server.hooks(project_dir), agent_server.version());
        Self { hooks, version }
    }

    fn is_complete(&self) -> bool {
        self.hooks.is_ok() && self.version.is_ok()
    }
}

/// The timeout of a lookup of a conversation.
const FIND_TIMEOUT: Duration = Duration::from_secs(15);
/// The timeout of a creation for which a worker has hardly any time left.
const SHORTEST_CREATE: Duration = Duration::from_secs(30);

impl StartRun<'_> {
    pub(super) async fn set_up_skills(&mut self) -> Result<Step, StepError> {
        let Some((sandbox, agent_server)) = self.running_sandbox().await? else { return Ok(Step::Wait) };
        let url = sandbox.agent_server_url().unwrap_or_default().to_owned();
        let probe = self.start_mcp_probe(&sandbox, &agent_server).await?;
        // This step reads the skills, and the next step uses them. Within one attempt they are cached; after a crash the next step reads
        // them again. The probe runs meanwhile; polls of a pending probe do not read them again.
        if self.skills.is_none() && probe != ProbeStart::Pending {
            let project_dir = self.folders(&sandbox).await?.project_dir;
            let (skills, loaded) =
                tokio::join!(self.load_skills(&sandbox, &agent_server), Loaded::load(&agent_server, &project_dir));
            self.skills = Some(skills?);
            // The next step requests what has failed again.
            self.loaded = Some(loaded).filter(Loaded::is_complete);
        }
        let Some(change) = self.end_mcp_probe(&agent_server).await? else { return Ok(Step::Wait) };
        self.task.record.now.agent_server_url = Some(url);
        Ok(Step::Next(&[StartStatus::StartingConversation], change))
    }

    pub(super) async fn start_conversation(&mut self) -> Result<Step, StepError> {
        let Some((sandbox, agent_server)) = self.running_sandbox().await? else { return Ok(Step::Wait) };
        if self.skills.is_none() {
            self.skills = Some(self.load_skills(&sandbox, &agent_server).await?);
        }
        let body = self.body(&sandbox, &agent_server).await?;
        if let Err(error) = self.create(&agent_server, &body).await {
            return Err(self.without_mcp_secrets(error).await?);
        }
        let settings = self.settings().await?;
        if uses_llm_analyzer(&settings)
            && body.json.get("security_analyzer").is_none()
            && let Err(error) = agent_server.set_llm_security_analyzer(self.task.record.conversation_id).await
        {
            self.add_note(format!("The security analyzer was not set: {error}"));
        }
        self.record_conversation(&sandbox, body.llm_model).await
    }

    /// Starts to load the skills that do not depend on the project, while a command prepares the workspace. Agent servers update their copy
    /// of the public skills from the network for each request. Only a setup script can change these skills, so without one they are still
    /// valid when those of the project are loaded.
    pub(super) async fn load_skills_ahead(
        &mut self,
        sandbox: &Sandbox,
        agent_server: &AgentServer,
    ) -> Result<(), StepError> {
        if self.skills_ahead.is_empty() && self.scripts.is_none() && !self.is_sent(PREPARE) {
            let query = self.skills_query(sandbox, SkillSources::WithoutProject).await?;
            let agent_server = agent_server.clone();
            self.skills_ahead.spawn(async move { agent_server.skills(&query).await.ok() }.in_current_span());
        }
        Ok(())
    }

    async fn skills_query(&mut self, sandbox: &Sandbox, sources: SkillSources) -> Result<SkillsQuery, StepError> {
        Ok(SkillsQuery {
            sources,
            project_dir: self.folders(sandbox).await?.project_dir,
            sandbox_config: sandbox.exposed_urls.as_ref().map(|urls| json!({"exposed_urls": urls})),
        })
    }

    async fn load_skills(
        &mut self,
        sandbox: &Sandbox,
        agent_server: &AgentServer,
    ) -> Result<Vec<SkillInfo>, StepError> {
        let mut ahead = std::mem::take(&mut self.skills_ahead);
        let is_valid = self.scripts.is_some_and(|scripts| !scripts.has_setup);
        let query =
            self.skills_query(sandbox, if is_valid { SkillSources::Project } else { SkillSources::All }).await?;
        let loaded = if is_valid && !ahead.is_empty() {
            let (base, of_project) = tokio::join!(ahead.join_next(), agent_server.skills(&query));
            match base.and_then(Result::ok).flatten() {
                Some(base) => of_project.map(|of_project| merged(base, of_project)),
                // Its error is unknown here, and may be permanent.
                None => agent_server.skills(&SkillsQuery { sources: SkillSources::All, ..query }).await,
            }
        } else {
            drop(ahead);
            agent_server.skills(&SkillsQuery { sources: SkillSources::All, ..query }).await
        };
        match loaded {
            Ok(skills) => Ok(skills),
            // This retry limit is separate, so that every transient error counts alike.
            Err(error) if error.retry() != Retry::Never && self.task.record.attempts < 2 => {
                Err(StepError::Retry(ErrorClass::AgentServer, error.to_string()))
            }
            // As in the reference, a conversation without skills is better than none, but a note reports it.
            Err(error) => {
                self.add_note(format!("The conversation has no skills: {error}"));
                Ok(Vec::new())
            }
        }
    }

    async fn body(&mut self, sandbox: &Sandbox, agent_server: &AgentServer) -> Result<ConversationBody, StepError> {
        let folders = self.folders(sandbox).await?;
        let settings = self.settings().await?;
        let Loaded { hooks, version } = match self.loaded.take() {
            Some(loaded) => loaded,
            None => Loaded::load(agent_server, &folders.project_dir).await,
        };
        let hooks = match hooks {
            Ok(hooks) => hooks,
            Err(error) if error.retry() != Retry::Never && self.task.record.attempts < 2 => {
                return Err(StepError::Retry(ErrorClass::AgentServer, error.to_string()));
            }
            Err(error) => {
                self.add_note(format!("The conversation has no hooks: {error}"));
                None
            }
        };
        let missing = settings.agent_profile.as_ref().map(|launch| launch.missing_mcp_servers.as_slice());
        if let Some(missing @ [_, ..]) = missing {
            let names = missing.iter().map(|name| shown(name)).collect::<Vec<_>>().join(", ");
            self.add_note(format!("The agent profile names MCP servers that the settings do not have: {names}"));
        }
        let browser = self.task.record.browser.unwrap_or(true);
        if !browser && self.task.request.agent_type == AgentType::Default {
            self.add_note("The agent has no browser tool: no Chromium was found in its sandbox".to_owned());
        }
        let version = self.agent_server_version(version)?;
        let streaming =
            self.saga.config.token_streaming && version.is_some_and(AgentServerVersion::streams_to_clients_only);
        let token_key = TokenKey::of(&self.saga.sealer).await?;
        let body = conversation_body(&ConversationInputs {
            user: &self.task.record.user,
            sandbox_id: &sandbox.id,
            conversation_id: self.task.record.conversation_id,
            request: &self.task.request,
            settings: &settings,
            project_dir: &folders.project_dir,
            skills: self.skills.as_deref().unwrap_or_default(),
            hooks,
            browser,
            streaming,
            extended: version.is_some_and(AgentServerVersion::has_extended_create),
            mcp_servers_left_out: &self.task.record.mcp_servers_left_out,
            config: &self.saga.config,
            token_key: &token_key,
            now: Time::now(),
        })?;
        let body = body.map_err(|missing| StepError::Failed(ErrorClass::User, missing.to_string()))?;
        let listed = |names: &[String]| names.iter().map(|name| shown(name)).collect::<Vec<_>>().join(", ");
        let InTerminal { left_out, too_long_together } = &body.secrets_in_terminal;
        for (reason, names) in left_out {
            self.add_note(format!("The agent does not get these secrets: {}: {reason}", listed(names)));
        }
        if !too_long_together.is_empty() {
            self.add_note(format!(
                "These secrets are too long for one command of the agent: {}: its terminal accepts 16,000 bytes at once, and no secret is \
                 set for a command that names more",
                listed(too_long_together)
            ));
        }
        Ok(body)
    }

    /// Returns the version of the agent server, or `None` if it cannot be determined. That does not fail the start, unless its request
    /// needs a feature that a version may lack: the conversation uses no such feature.
    fn agent_server_version(
        &self,
        version: Result<Option<AgentServerVersion>, AgentServerError>,
    ) -> Result<Option<AgentServerVersion>, StepError> {
        if self.task.request.system_prompt.is_some() {
            return match version? {
                Some(version) if version.has_extended_create() => Ok(Some(version)),
                version => {
                    let found = version.map_or_else(|| "another version".to_owned(), |version| version.to_string());
                    let text = format!(
                        "The request has a system_prompt, which agent servers accept from version {EXTENDED_CREATE} on, and the sandbox runs \
                         {found}. Use system_message_suffix, or a sandbox with a newer agent server"
                    );
                    Err(StepError::Failed(ErrorClass::User, text))
                }
            };
        }
        if let Err(error) = &version {
            tracing::warn!(task = %self.task.record.id, %error, "start.agent_server_version_unknown");
        }
        Ok(version.ok().flatten())
    }

    /// Creates the conversation once, and ensures that it has its first message.
    async fn create(&mut self, agent_server: &AgentServer, body: &ConversationBody) -> Result<(), StepError> {
        match self.try_to_create(agent_server, body).await {
            Err(AgentServerError { failure: Failure::Status(_, said), .. })
                if said.contains("Chromium") && self.task.record.browser != Some(false) =>
            {
                // The agent server's browser tool searches more paths than our probe does, so its result overrides the probe's.
                self.task.record.browser = Some(false);
                // An agent server keeps a conversation whose agent could not be set up, and returns it with that agent when the same id is
                // created again.
                self.remove_from(agent_server).await?;
                Err(StepError::Retry(ErrorClass::AgentServer, said))
            }
            done => Ok(done?),
        }
    }

    async fn try_to_create(
        &mut self,
        agent_server: &AgentServer,
        body: &ConversationBody,
    ) -> Result<(), AgentServerError> {
        // Time is left to find out what became of a request without a response.
        let left = LONGEST_RUN.saturating_sub(self.began.elapsed() + FIND_TIMEOUT + self.time_for_first_message());
        let timeout = self.saga.config.agent_request_timeout.min(left.max(SHORTEST_CREATE));
        let was_sent = std::mem::replace(&mut self.is_create_sent, true);
        // After an attempt with an unknown outcome, the conversation may exist or may still be in creation: the agent server finds a
        // conversation by its id only after it has created it.
        let mut info = None;
        if was_sent {
            info = self.find(agent_server).await?;
        }
        let mut is_certain = !was_sent;
        let info = match info {
            Some(info) => info,
            None => match agent_server.create_conversation(&body.json, timeout).await {
                Ok(info) => info,
                Err(error) if error.is_ambiguous() => {
                    is_certain = false;
                    self.find(agent_server).await?.ok_or(error)?
                }
                Err(error) => return Err(error),
            },
        };
        if !is_certain && !body.json["initial_message"].is_null() {
            self.ensure_first_message(agent_server, info, &body.json["initial_message"]).await?;
        }
        Ok(())
    }

    /// Sends the first message if an attempt was interrupted after it created the conversation and before it sent the message. An attempt
    /// that the agent server still processes gets time to send it itself; an attempt that ended with an error response gets none.
    async fn ensure_first_message(
        &self,
        agent_server: &AgentServer,
        mut info: ConversationInfo,
        message: &serde_json::Value,
    ) -> Result<(), AgentServerError> {
        let deadline = Instant::now() + self.time_for_first_message();
        while info.last_user_message_id.is_none() {
            if Instant::now() >= deadline {
                let role = message["role"].as_str().unwrap_or("user");
                return agent_server.send_message(info.id, role, &message["content"], true).await;
            }
            sleep(self.saga.config.poll).await;
            info = self.find(agent_server).await?.unwrap_or(info);
        }
        Ok(())
    }

    /// How long an agent server may take to send the first message of a conversation that it has created.
    fn time_for_first_message(&self) -> Duration {
        match self.task.record.refusals {
            0 => self.saga.config.agent_request_timeout / 8,
            _ => Duration::ZERO,
        }
    }

    async fn find(&self, agent_server: &AgentServer) -> Result<Option<ConversationInfo>, AgentServerError> {
        let id = self.task.record.conversation_id;
        let timeout = self.saga.config.agent_request_timeout.min(FIND_TIMEOUT);
        Ok(agent_server.conversations(&[id], timeout).await?.pop().flatten())
    }

    /// Removes this start's conversation from the agent server. Returns false if it has a user's message: a user works with it, possibly
    /// since before this start.
    pub(super) async fn remove_from(&self, agent_server: &AgentServer) -> Result<bool, AgentServerError> {
        let id = self.task.record.conversation_id;
        match self.find(agent_server).await? {
            None => return Ok(true),
            Some(info) if info.last_user_message_id.is_some() => return Ok(false),
            Some(_) => {}
        }
        match agent_server.delete_conversation(id, self.saga.config.agent_request_timeout).await {
            // Version 1.15 returns 400 where later versions return 404.
            Err(AgentServerError {
                failure: Failure::Status(StatusCode::NOT_FOUND | StatusCode::BAD_REQUEST, _),
                ..
            }) => Ok(true),
            done => done.map(|()| true),
        }
    }

    /// Records the conversation and the task's end in one transaction.
    async fn record_conversation(&mut self, sandbox: &Sandbox, llm_model: String) -> Result<Step, StepError> {
        let launch = self.settings().await?.agent_profile;
        let launched_agent_profile = launch.map(|launch| LaunchedAgentProfile {
            agent_profile_id: launch.profile.id,
            revision: launch.profile.revision,
        });
        let saga = self.saga;
        let (record, request) = (&self.task.record, &self.task.request);
        let (user, conversation_id) = (&record.user, record.conversation_id);
        let now = Time::now();
        let [default_title, _] = default_titles(conversation_id);
        let conversation = ConversationRecord {
            user: user.clone(),
            id: conversation_id,
            sandbox_id: sandbox.id.clone(),
            selected_repository: request.selected_repository.clone(),
            selected_branch: request.selected_branch.clone(),
            git_provider: request.git_provider,
            title: Some(request.title.clone().unwrap_or(default_title)),
            trigger: request.trigger,
            pr_number: request.pr_number.clone(),
            llm_model: Some(llm_model),
            metrics: MetricsSnapshot::default(),
            parent_conversation_id: request.parent_conversation_id,
            public: request.public,
            tags: request.tags.clone().unwrap_or_default(),
            agent_kind: OPENHANDS_AGENT.to_owned(),
            acp_server: None,
            launched_agent_profile,
            created_at: now,
            updated_at: now,
        };
        let detail = (!record.notes.is_empty()).then(|| record.notes.join("\n"));
        let snapshot = Snapshot {
            status: StartStatus::Ready,
            updated_at: now,
            detail,
            app_conversation_id: Some(conversation_id),
            ..record.now.clone()
        };
        let ready = StartTaskStore::ready(user, record.id, conversation_id, &snapshot)?;
        let conversations = &saga.conversations;
        let processors = request.processors.as_deref().unwrap_or_default();
        let lookup = conversations.lookup(user, conversation_id).await?;
        let records = &saga.reconciler.records;
        let mut recorded = match &lookup {
            Lookup::Present(known) if known.is_stub => {
                self.under_parent(conversations.complete_stub(known, &conversation, processors)?)?
            }
            Lookup::Present(known) => {
                // The conversation was started before: it keeps its record and its history, and only its sandbox changes.
                let moved = ConversationChange::default().sandbox(user, &sandbox.id);
                let mut writes = vec![conversations.update_in_transaction(user, conversation_id, moved)?];
                let before = &known.record.sandbox_id;
                if *before != sandbox.id && records.get(user, before).await?.is_some() {
                    writes.push(records.moving_out(user, before, conversation_id)?);
                }
                Recorded { writes, ..Recorded::default() }
            }
            Lookup::Absent => self.under_parent(conversations.put_started(&conversation, processors)?)?,
            Lookup::Deleting => {
                let text = "The conversation with this id was deleted during the start";
                return Err(StepError::Failed(ErrorClass::User, text.to_owned()));
            }
        };
        recorded.writes.push(records.completing(user, &sandbox.id, record.id, conversation_id)?);
        let ended = match saga.tasks.end(user, record.id, &self.lease.worker, &ready, recorded).await {
            Ok(ended) => ended,
            // Many starts of one user end at the same time. This is no failed attempt: the conversation exists, and this step only
            // has to be repeated, if necessary until its deadline.
            Err(Error::Store(error))
                if matches!(error.kind(), StoreErrorKind::Conflict | StoreErrorKind::Throttled) =>
            {
                tracing::warn!(task = %record.id, error = error.context(), "start.end_postponed");
                return Ok(Step::Wait);
            }
            Err(error) => return Err(error.into()),
        };
        if ended.is_err() {
            // A concurrent writer may have changed the record (another start of the same conversation, or the agent server's webhook), so
            // the failed condition need not mean a lost lease.
            if differs(&lookup, &conversations.lookup(user, conversation_id).await?) {
                let text = "Another request recorded the conversation at the same time";
                return Err(StepError::Retry(ErrorClass::Ours, text.to_owned()));
            }
            if let Some(parent) = request.parent_conversation_id
                && conversations.get(user, parent).await?.is_none()
            {
                let parent = id::dashed(parent);
                let text = format!("Parent conversation {parent} was deleted during the start");
                return Err(StepError::Failed(ErrorClass::User, text));
            }
            if records.get(user, &sandbox.id).await?.is_none() {
                return Err(self.lost_sandbox(format!("The sandbox {} was deleted during the start", sandbox.id)));
            }
            return Err(StepError::LeaseLost);
        }
        if processors.contains(&EventCallbackProcessor::Logging) {
            // This job processes the events that arrived before the record existed. Later events enqueue their own jobs.
            let up_to = Some(event::store::last_position_at(now));
            let job = ProcessEvents { user: user.clone(), conversation: conversation_id, up_to }.into();
            if let Err(error) = saga.queue.send(&job, process_events::DELAY).await {
                tracing::warn!(task = %record.id, error = %error.context(), "start.enqueue_failed");
            }
        }
        metrics::step_ended(record.now.status.as_str(), now.since(record.now.updated_at));
        metrics::start_ended(Outcome::Ready, now.since(record.created_at), record.claims);
        tracing::info!(task = %record.id, conversation = %conversation_id, "start.ready");
        Ok(Step::Ready)
    }

    /// Adds the condition that the parent of the conversation exists. The deletion of the parent therefore finds each of its
    /// sub-conversations, as soon as the index of sub-conversations contains all that was written before.
    fn under_parent(&self, mut recorded: Recorded) -> crate::error::Result<Recorded> {
        let record = &self.task.record;
        let parent = self.task.request.parent_conversation_id.filter(|parent| *parent != record.conversation_id);
        if let Some(parent) = parent {
            recorded.writes.push(self.saga.conversations.existing(&record.user, parent)?);
        }
        Ok(recorded)
    }

    /// Adds a note unless an earlier attempt has added it.
    pub(super) fn add_note(&mut self, note: String) {
        if !self.task.record.notes.contains(&note) {
            self.task.record.notes.push(note);
        }
    }
}

/// Merges skills as agent servers do: a later one replaces an earlier one with the same name, in its place.
fn merged(mut skills: Vec<SkillInfo>, later: Vec<SkillInfo>) -> Vec<SkillInfo> {
    for skill in later {
        match skills.iter_mut().find(|known| known.name == skill.name) {
            Some(known) => *known = skill,
            None => skills.push(skill),
        }
    }
    skills
}

/// Whether a record was created, deleted or, in the case of a stub, changed since it was read.
fn differs(before: &Lookup, now: &Lookup) -> bool {
    match (before, now) {
        (Lookup::Present(before), Lookup::Present(now)) => {
            let is_same = before.record.title == now.record.title && before.is_tagged() == now.is_tagged();
            before.is_stub && (!now.is_stub || !is_same)
        }
        (before, now) => before != now,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_skill_of_the_project_replaces_another_one_in_its_place() {
        let skill = |name: &str, content: &str| SkillInfo {
            name: name.to_owned(),
            content: content.to_owned(),
            triggers: Vec::new(),
            source: None,
            description: None,
            is_agentskills_format: false,
        };
        let skills = merged(
            vec![skill("a", "public"), skill("b", "public"), skill("c", "public")],
            vec![skill("d", "project"), skill("b", "project")],
        );
        let skills: Vec<(&str, &str)> =
            skills.iter().map(|skill| (skill.name.as_str(), skill.content.as_str())).collect();
        assert_eq!(skills, [("a", "public"), ("b", "project"), ("c", "public"), ("d", "project")]);
    }
}
