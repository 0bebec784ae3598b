//! What must hold at the end of a simulation: what is stored, what has happened in the models, and what clients know are compared.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use uuid::Uuid;

use crate::agents::history::{ConversationHistory, Life, SandboxHistory};
use crate::scenario::Start;
use crate::world::{EPOCH, WORKER, World};

/// How long a start may wait while the provider responds and its sandbox is usable or could be resumed.
const LONGEST_NEGLECT: Duration = Duration::from_secs(45);
/// How much longer for each worker that crashed, failed or stood still meanwhile with a message about it, for each such message that came late, and for each minute in which
/// enqueueing may have failed: until the sweep after the next one, which may not see the row yet.
const INTERRUPTION: Duration = Duration::from_secs(70);

/// Compares what is stored and what has happened with what clients know.
pub fn check(world: &World, starts: &[Start], violations: &mut Vec<String>) {
    violations.extend(world.services().lambda.panics().into_iter().map(|panic| format!("panic: {panic}")));
    let overruns = world.services().lambda.overruns(WORKER);
    if overruns > 0 {
        let which = world.services().lambda.overran();
        violations
            .push(format!("{overruns} invocations of the worker ran into its time limit by themselves: {which:?}"));
    }
    let facts = Facts::of(world, starts);
    for start in starts {
        match start.status.as_str() {
            "READY" => facts.check_messages(start, violations),
            "ERROR" => violations.extend(facts.unjustified(start)),
            _ => violations.push(format!("{} has not ended after {:?}", start.name(), start.took)),
        }
        facts.check_kept(start, violations);
    }
    facts.check_tasks(violations);
    facts.check_waits(violations);
    facts.check_conversations(violations);
    facts.check_events(world, violations);
    facts.check_sandboxes(violations);
    facts.check_counters(violations);
}

/// Rows that are to be processed: starts, deletions, queues of messages, sandboxes that are marked for deletion.
pub fn unfinished(world: &World) -> Vec<String> {
    let names = &world.services().names;
    let rows = |table: &str| world.services().dynamodb.items(table);
    let mut left = Vec::new();
    for row in rows(&names.start_tasks) {
        if is_lease(&row) && row["expires_at"].is_null() {
            left.push(format!("start {}", id_of(&row)));
        }
    }
    for row in rows(&names.conversations) {
        if !row["due_at"].is_null() && row["expires_at"].is_null() {
            left.push(format!("conversation {}", id_of(&row)));
        }
    }
    for row in rows(&names.sandboxes) {
        if text(&row, "desired") == Some("deleted") {
            left.push(format!("sandbox {}", id_of(&row)));
        }
    }
    left
}

/// All that the checks compare.
struct Facts<'a> {
    starts: &'a [Start],
    /// The rows of starts, without their lease rows, by the start's id.
    tasks: BTreeMap<String, Value>,
    /// The rows of conversations that were not deleted, by id.
    conversations: BTreeMap<String, Value>,
    events: Vec<Value>,
    /// The records of sandboxes, and the rows of their names.
    records: BTreeMap<String, Value>,
    /// The id of a sandbox's record, by its name at the provider.
    names: BTreeMap<String, String>,
    /// The keys of events that were written when the caller no longer waited. After the deletion of their conversation they stay until its
    /// tombstone expires.
    late_events: BTreeSet<(String, String)>,
    users: Vec<Value>,
    sandboxes: Vec<SandboxHistory>,
    copies: BTreeMap<Uuid, Vec<ConversationHistory>>,
    /// The starts whose repository could not be cloned.
    refused: BTreeSet<Uuid>,
    /// When the provider had an outage, and when all workers were busy.
    unavailable: Vec<(Duration, Duration)>,
    /// When workers crashed or stood still, when messages were delayed, each with the bodies of the messages, and the minutes of outages
    /// of DynamoDB and SQS.
    interruptions: Vec<(Duration, String)>,
}

impl<'a> Facts<'a> {
    fn of(world: &World, starts: &'a [Start]) -> Self {
        let tables = &world.services().names;
        let rows = |table: &str| world.services().dynamodb.items(table);
        let by_id = |row: Value| (id_of(&row).to_owned(), row);
        let (names, records): (Vec<Value>, Vec<Value>) =
            rows(&tables.sandboxes).into_iter().partition(|row| row["desired"].is_null());
        let name = |row: &Value| {
            let name = text(row, "user")?.strip_prefix("#name#")?;
            Some((name.to_owned(), text(row, "sandbox")?.to_owned()))
        };
        let mut copies: BTreeMap<Uuid, Vec<ConversationHistory>> = BTreeMap::new();
        for copy in world.sandboxes().conversations() {
            copies.entry(copy.id).or_default().push(copy);
        }
        let runs = world.sandboxes().runs();
        let conversations = rows(&tables.conversations).into_iter();
        Self {
            starts,
            tasks: rows(&tables.start_tasks).into_iter().filter(|row| !is_lease(row)).map(by_id).collect(),
            conversations: conversations.filter(|row| row["expires_at"].is_null()).map(by_id).collect(),
            events: rows(&tables.events),
            records: records.into_iter().map(by_id).collect(),
            names: names.iter().filter_map(name).collect(),
            late_events: world.services().dynamodb.put_late().iter().map(event_key).collect(),
            users: rows(&tables.users),
            sandboxes: world.sandboxes().history(),
            copies,
            refused: runs.iter().filter(|run| run.is_refused).map(|run| run.task).collect(),
            unavailable: [world.sandboxes().outages(), world.services().lambda.busy()].concat(),
            interruptions: {
                let services = world.services();
                let outages = services.sqs.outages().into_iter().chain(services.dynamodb.outages());
                let outages = outages.map(|at| (at, String::new())).collect();
                [services.lambda.interruptions(), services.sqs.delays(), outages].concat()
            },
        }
    }

    /// What the provider has had under the id of a sandbox, oldest first.
    fn runtimes<'s>(&'s self, sandbox: &'s str) -> impl Iterator<Item = &'s SandboxHistory> {
        let is_of = move |runtime: &&SandboxHistory| self.names.get(&runtime.session).is_some_and(|id| id == sandbox);
        self.sandboxes.iter().filter(is_of)
    }

    /// When one of several things has happened to a sandbox.
    fn times(&self, sandbox: &str, things: &[Life]) -> Vec<Duration> {
        let life = self.runtimes(sandbox).flat_map(|runtime| &runtime.life);
        life.filter(|(_, what)| things.contains(what)).map(|(at, _)| *at).collect()
    }

    /// Messages arrive once and in order; the first one before it is READY, the others unless the sandbox ends.
    fn check_messages(&self, start: &Start, violations: &mut Vec<String>) {
        let name = start.name();
        let copies = self.copies.get(&start.conversation).map_or(&[][..], Vec::as_slice);
        if copies.len() != 1 {
            violations.push(format!("{name}: {} agent servers have had its conversation", copies.len()));
        }
        let received: Vec<&str> =
            copies.iter().flat_map(|copy| &copy.messages).map(|message| message.text.as_str()).collect();
        if let Some(first) = &start.message {
            let times = received.iter().filter(|text| *text == first).count();
            if times != 1 {
                violations.push(format!("{name}: the first message arrived {times} times"));
            }
        }
        let mine: Vec<&str> =
            received.iter().copied().filter(|text| start.accepted.iter().any(|one| one == text)).collect();
        let arrived: BTreeSet<&str> = mine.iter().copied().collect();
        if arrived.len() != mine.len() {
            violations.push(format!("{name}: a message arrived twice: {received:?}"));
        }
        let in_order: Vec<&str> =
            start.accepted.iter().map(String::as_str).filter(|text| arrived.contains(text)).collect();
        if in_order != mine && arrived.len() == mine.len() {
            violations.push(format!("{name}: messages arrived in another order: {received:?}"));
        }
        let is_dead = copies.iter().any(|copy| {
            let sandbox = self.sandboxes.iter().find(|sandbox| sandbox.runtime_id == copy.runtime_id);
            sandbox.is_none_or(|sandbox| sandbox.life.iter().any(|(_, what)| ENDS.contains(what)))
        });
        if !start.is_deleted() && !is_dead && arrived.len() != start.accepted.len() {
            violations.push(format!("{name}: of {:?} arrived {received:?}", start.accepted));
        }
    }

    /// Why a start must not have ended with ERROR; `None` if the models have injected a permanent cause.
    fn unjustified(&self, start: &Start) -> Option<String> {
        let (name, detail) = (start.name(), start.detail.as_deref().unwrap_or_default());
        if self.refused.contains(&start.task) {
            return None;
        }
        let Some(task) = self.tasks.get(&start.task.simple().to_string()) else {
            return Some(format!("{name} has failed and has no record"));
        };
        let states = states(task);
        let [.., (step, entered), (_, ended)] = states.as_slice() else {
            return Some(format!("{name} is ERROR without a step before: {task}"));
        };
        let own = text(task, "new_sandbox_id").into_iter();
        let sandboxes: Vec<&str> =
            text(task, "sandbox_id").into_iter().chain(start.named.as_deref()).chain(own).collect();
        let is_lost =
            |sandbox: &&str| detail.contains(sandbox) && self.times(sandbox, &ENDS).into_iter().any(|at| at < *ended);
        if sandboxes.iter().any(is_lost) {
            return None;
        }
        let is_late = |line: &str| {
            ["The sandbox provider does not respond", "Sandbox failed to start within"]
                .iter()
                .any(|text| line.starts_with(text))
        };
        if detail.lines().any(is_late) {
            let sandbox = sandboxes.first().copied().unwrap_or_default();
            let neglect = self.neglect(sandbox, (*entered, *ended))?;
            return Some(format!("{name} is ERROR at {step}, {detail}: {neglect}"));
        }
        // A command whose time is up ends before its step does, but its end is not seen in a sandbox that boots at that time.
        if detail.starts_with("The step ") && detail.contains("did not finish within") {
            let last = (ended.saturating_sub(LONGEST_NEGLECT), *ended);
            let sandbox = sandboxes.first().copied().unwrap_or_default();
            let usable: Duration =
                self.usable(sandbox, last).into_iter().map(|(begin, end)| end.saturating_sub(begin)).sum();
            if usable < LONGEST_NEGLECT / 2 {
                return None;
            }
        }
        // It may have come too late to join the sandbox that it names.
        if let Some(named) = &start.named
            && detail.contains(&format!("Sandbox not found: {named}"))
            && states.len() == 2
            && !self.is_kept_by_another(start, named)
        {
            return None;
        }
        Some(format!("{name} is ERROR at {step} without an injected cause: {detail}"))
    }

    /// No start waits for a sandbox that it could use, and the sandbox of a start does not stay paused.
    fn check_waits(&self, violations: &mut Vec<String>) {
        for (id, task) in &self.tasks {
            let (sandbox, states) = (text(task, "sandbox_id").unwrap_or_default(), states(task));
            for step in states.windows(2).filter(|step| step[0].0 != "WORKING") {
                let (entered, ended) = (step[0].1, step[1].1);
                let neglect = match step[0].0.as_str() {
                    "WAITING_FOR_SANDBOX" => self.neglect(sandbox, (entered, ended)),
                    _ => self.paused(sandbox).into_iter().find_map(|(begin, end)| {
                        (begin < ended && end > entered)
                            .then(|| self.neglect(sandbox, (begin.max(entered), end.min(ended))))?
                    }),
                };
                if let Some(neglect) = neglect {
                    violations.push(format!("start {id} waited for its sandbox in {}: {neglect}", step[0].0));
                }
            }
        }
    }

    /// When a sandbox was paused.
    fn paused(&self, sandbox: &str) -> Vec<(Duration, Duration)> {
        let life = self.runtimes(sandbox).last().map_or(&[][..], |runtime| &runtime.life);
        let pauses =
            life.iter().enumerate().filter(|(_, (_, what))| matches!(what, Life::Paused | Life::PausedByProvider));
        pauses.map(|(index, (at, _))| (*at, life.get(index + 1).map_or(Duration::MAX, |(end, _)| *end))).collect()
    }

    /// Describes the longest time within a period in which nothing was in the way of a start, if it is too long.
    fn neglect(&self, sandbox: &str, (from, to): (Duration, Duration)) -> Option<String> {
        let usable = self.usable(sandbox, (from, to));
        let longest = usable.into_iter().map(|(begin, end)| end.saturating_sub(begin)).max().unwrap_or_default();
        if longest <= LONGEST_NEGLECT {
            return None;
        }
        // An outage lasts for a minute.
        let begin = from.saturating_sub(Duration::from_secs(60));
        let concerned = self.concerned(sandbox);
        let interrupts = |(at, work): &&(Duration, String)| {
            // A sweep, an observation of boots and an outage concern every start.
            let is_for_all = !work.contains(r#""type":"#) || work.contains("observe_boots");
            (begin..to).contains(at) && (is_for_all || concerned.iter().any(|id| work.contains(*id)))
        };
        let interruptions = self.interruptions.iter().filter(interrupts).count();
        let tolerated = LONGEST_NEGLECT + INTERRUPTION * u32::try_from(interruptions).expect("a small number");
        (longest > tolerated).then(|| {
            let life: Vec<_> = self.runtimes(sandbox).map(|runtime| &runtime.life).collect();
            format!("nothing was in its way for {longest:?} of {from:?} to {to:?}, {life:?}")
        })
    }

    /// The ids that are in messages about a sandbox: its own one, and those of the starts that use it.
    fn concerned<'s>(&'s self, sandbox: &'s str) -> Vec<&'s str> {
        let starts = self.tasks.iter().filter(|(_, task)| text(task, "sandbox_id") == Some(sandbox));
        [sandbox].into_iter().chain(starts.map(|(id, _)| id.as_str())).collect()
    }

    /// Whether a sandbox certainly had a member when a start was accepted: a READY conversation whose deletion was not requested before.
    fn is_kept_by_another(&self, start: &Start, sandbox: &str) -> bool {
        self.starts.iter().any(|other| {
            other.task != start.task
                && other.status == "READY"
                && other.sandbox.as_deref() == Some(sandbox)
                && other.began + other.took <= start.began
                && other.deleted_at.is_none_or(|at| at > start.began_to_wait)
        })
    }

    /// The times within a period at which a sandbox could be used, or could have been resumed: the provider had no outage, a worker was
    /// free, and no boot and no restart was going on.
    fn usable(&self, sandbox: &str, (from, to): (Duration, Duration)) -> Vec<(Duration, Duration)> {
        let mut blocked: Vec<(Duration, Duration)> = Vec::new();
        if let Some(runtime) = self.runtimes(sandbox).last() {
            for (index, (at, what)) in runtime.life.iter().enumerate() {
                if matches!(what, Life::Created | Life::Resumed | Life::Crashed | Life::Restarted) {
                    let mut later = runtime.life[index + 1..].iter();
                    blocked.push((*at, later.find(|(_, what)| *what != Life::Running).map_or(to, |(at, _)| *at)));
                }
            }
        }
        blocked.extend(&self.unavailable);
        blocked.retain(|(begin, end)| *end > from && *begin < to);
        blocked.sort_unstable();
        let (mut free, mut at) = (Vec::new(), from);
        for (begin, end) in blocked {
            if begin > at {
                free.push((at, begin));
            }
            at = at.max(end);
        }
        if at < to {
            free.push((at, to));
        }
        free
    }

    /// No sandbox is deleted under a member.
    fn check_kept(&self, start: &Start, violations: &mut Vec<String>) {
        let task = self.tasks.get(&start.task.simple().to_string());
        let states = task.map(states).unwrap_or_default();
        // The record of a READY start is deleted together with its conversation.
        let ready = (start.status == "READY").then_some(start.began + start.took);
        let joined = states.iter().find(|(status, _)| status == "WAITING_FOR_SANDBOX").map(|(_, at)| *at).or(ready);
        let left = match start.status.as_str() {
            "ERROR" => states.last().map_or(Duration::ZERO, |(_, at)| *at),
            _ => start.deleted_at.unwrap_or(Duration::MAX),
        };
        let (Some(sandbox), Some(joined)) = (&start.sandbox, joined) else { return };
        if let Some(at) = self.times(sandbox, &[Life::Stopped]).into_iter().find(|at| (joined..left).contains(at)) {
            violations
                .push(format!("{}: its sandbox {sandbox} was deleted at {at:?}, and it had joined it", start.name()));
        }
    }

    /// The history of a start has each state once: a repeated write has no further effect.
    fn check_tasks(&self, violations: &mut Vec<String>) {
        for (id, task) in &self.tasks {
            let states = states(task);
            let distinct: BTreeSet<&String> = states.iter().map(|(status, _)| status).collect();
            if distinct.len() != states.len() {
                violations.push(format!("start {id} has a state twice in its history: {states:?}"));
            }
        }
    }

    /// Nothing is left of what was deleted, and everything else is there.
    fn check_conversations(&self, violations: &mut Vec<String>) {
        let mut expected = BTreeSet::new();
        let mut events_of: BTreeMap<String, usize> = BTreeMap::new();
        for row in self.events.iter().filter(|row| !self.late_events.contains(&event_key(row))) {
            for id in ids_in(&row.to_string()) {
                *events_of.entry(id.to_owned()).or_default() += 1;
            }
        }
        for start in self.starts.iter().filter(|start| start.status == "READY") {
            let id = start.conversation.simple().to_string();
            if start.is_deleted() {
                if self.conversations.contains_key(&id) {
                    violations.push(format!("conversation {id} was deleted and is there"));
                }
                if let Some(left) = events_of.get(&id) {
                    violations.push(format!("conversation {id} was deleted and has {left} events"));
                }
                let is_queue = |row: &&Value| text(row, "kind") == Some(format!("messages#{id}").as_str());
                if let Some(queue) = self.users.iter().find(is_queue) {
                    violations.push(format!("conversation {id} was deleted and has messages: {queue}"));
                }
                continue;
            }
            if !self.conversations.contains_key(&id) {
                violations.push(format!("conversation {id} is READY and is not there"));
            }
            expected.insert(id);
        }
        for (id, row) in &self.conversations {
            if !expected.contains(id) {
                violations.push(format!("conversation {id} belongs to no start: {row}"));
            }
        }
    }

    /// An event that was acknowledged is stored.
    fn check_events(&self, world: &World, violations: &mut Vec<String>) {
        let mut stored: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for row in &self.events {
            let conversation = text(row, "conversation").and_then(|key| key.rsplit('#').next()).unwrap_or_default();
            stored.entry(conversation).or_default().insert(id_of(row));
        }
        for (id, acknowledged) in world.sandboxes().acknowledged() {
            let id = id.simple().to_string();
            if !self.conversations.contains_key(&id) {
                continue;
            }
            let stored = stored.get(id.as_str());
            let is_lost = |event: &&String| !stored.is_some_and(|stored| stored.contains(event.as_str()));
            let lost = acknowledged.iter().filter(is_lost).count();
            if lost > 0 {
                let all = acknowledged.len();
                violations
                    .push(format!("conversation {id}: of {all} events that were acknowledged {lost} are not stored"));
            }
        }
    }

    /// The members of sandboxes are the conversations that exist. No sandbox runs without a member or without a record.
    fn check_sandboxes(&self, violations: &mut Vec<String>) {
        for (id, record) in &self.records {
            let members = |set: &str| record[set]["SS"].as_array().cloned().unwrap_or_default();
            let (starts, conversations) = (members("starts"), members("conversations"));
            if starts.is_empty() && conversations.is_empty() {
                violations.push(format!("sandbox {id} has no member"));
            }
            for start in starts {
                violations.push(format!("sandbox {id} has the start {start} as a member, which has ended"));
            }
            for conversation in conversations.iter().filter_map(Value::as_str) {
                let found = self.conversations.get(conversation).and_then(|row| text(row, "sandbox_id"));
                if found != Some(id) {
                    violations.push(format!("sandbox {id} has the member {conversation}, which is in {found:?}"));
                }
            }
        }
        for (id, row) in &self.conversations {
            let record = text(row, "sandbox_id").and_then(|sandbox| self.records.get(sandbox));
            let is_member = |record: &Value| {
                record["conversations"]["SS"].as_array().is_some_and(|set| set.contains(&id.as_str().into()))
            };
            if !record.is_some_and(is_member) {
                violations.push(format!("conversation {id} is no member of its sandbox {:?}", row["sandbox_id"]));
            }
        }
        for sandbox in &self.sandboxes {
            let is_left = matches!(sandbox.status, "starting" | "running" | "paused");
            let has_record = self.names.get(&sandbox.session).is_some_and(|id| self.records.contains_key(id));
            if is_left && !has_record {
                violations.push(format!(
                    "sandbox {} is {} and has no record: {:?}",
                    sandbox.session, sandbox.status, sandbox.life
                ));
            }
        }
    }

    /// The counts of a user are the numbers of the user's rows.
    fn check_counters(&self, violations: &mut Vec<String>) {
        let users: BTreeSet<String> = self.starts.iter().map(|start| start.user.to_string()).collect();
        for user in &users {
            let is_own = |row: &&Value| text(row, "user") == Some(user.as_str());
            let counters = || {
                self.users
                    .iter()
                    .filter(is_own)
                    .filter(|row| text(row, "kind").is_some_and(|kind| kind.starts_with("counters")))
            };
            for (counter, count) in [
                ("unfinished_starts", 0),
                ("start_tasks", self.tasks.values().filter(is_own).count()),
                ("conversations", self.conversations.values().filter(is_own).count()),
            ] {
                let value = |row: &Value| row[counter]["N"].as_str().and_then(|number| number.parse::<i64>().ok());
                let counted: i64 = counters().filter_map(value).sum();
                if i64::try_from(count) != Ok(counted) {
                    violations.push(format!("{user} has {count} {counter}, and {counted} are counted"));
                }
            }
        }
    }
}

/// What ends a sandbox without a client's doing.
const ENDS: [Life; 2] = [Life::Evicted, Life::Failed];

fn text<'v>(item: &'v Value, name: &str) -> Option<&'v str> {
    item[name]["S"].as_str()
}

fn id_of(row: &Value) -> &str {
    text(row, "id").unwrap_or_default()
}

/// The key of a row of the table of events.
fn event_key(row: &Value) -> (String, String) {
    (text(row, "conversation").unwrap_or_default().to_owned(), id_of(row).to_owned())
}

/// The ids without dashes in a text.
fn ids_in(text: &str) -> BTreeSet<&str> {
    text.split(|one: char| !one.is_ascii_hexdigit()).filter(|run| run.len() == 32).collect()
}

fn is_lease(row: &Value) -> bool {
    id_of(row).ends_with("#lease")
}

/// The states of a start, oldest first, each with the time since the simulation began.
fn states(task: &Value) -> Vec<(String, Duration)> {
    let states = task["history"]["L"].as_array().into_iter().flatten();
    let state = |state: &Value| {
        let at: Timestamp = text(&state["M"], "updated_at")?.parse().ok()?;
        let since = Duration::try_from(at.duration_since(EPOCH)).unwrap_or_default();
        Some((text(&state["M"], "status")?.to_owned(), since))
    };
    states.filter_map(state).collect()
}
