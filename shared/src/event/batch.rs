//! What a batch of events reports of its conversation: metrics, the model, tags, and what calls for a look at the agent server.

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::store::{Event, local_instant, sortable, sortable_instant, zoned_instant};
use crate::clock::Time;
use crate::conversation::tags::Tags;
use crate::conversation::told::{AgentStats, ReportTime};
use crate::conversation::{MAX_NAME, within_max_name};

/// Offsets of time zones are multiples of this, in seconds.
const ZONE_STEP: i64 = 15 * 60;
/// Zones are at most so far behind UTC, and so far ahead of it, in seconds.
const ZONES_BEHIND: i64 = 12 * 3600;
const ZONES_AHEAD: i64 = 14 * 3600;

/// Observations of tools by which an agent changes its own model.
const SWITCHES: [&str; 2] = ["SwitchLLMObservation", "ClassifyAndSwitchLLMObservation"];

/// A reported value, and when it was reported.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Reported<T> {
    position: String,
    pub(super) time: ReportTime,
    pub(super) value: T,
}

/// What is of interest in a batch of events. Of several reports the newest counts; their order in the batch does not matter.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// What models have been used for.
    pub(super) stats: Option<Reported<AgentStats>>,
    /// The model that the agent uses.
    pub(super) model: Option<Reported<String>>,
    /// The conversation's tags.
    pub(super) tags: Option<Reported<Tags>>,
    pub(super) has_message: bool,
    /// Whether the agent has come to a halt: finished, paused, failed, waiting for somebody.
    pub(super) has_stopped: bool,
    pub(super) is_empty: bool,
}

impl Batch {
    /// Reads a batch that was received at `now`.
    pub(super) fn of(events: &[Event], now: Time) -> Self {
        let mut batch = Self { is_empty: events.is_empty(), ..Self::default() };
        let shift = zone_shift(events, now);
        for event in events {
            match event.kind.as_str() {
                "MessageEvent" => batch.has_message = true,
                "ConversationStateUpdateEvent" => batch.read_state(event, shift),
                "ObservationEvent" => batch.read_observation(event, shift),
                _ => {}
            }
        }
        batch
    }

    fn read_state(&mut self, event: &Event, shift: i64) {
        #[derive(Deserialize)]
        struct StateUpdate<'a> {
            key: String,
            #[serde(borrow)]
            value: &'a RawValue,
        }
        #[derive(Deserialize)]
        struct State<'a> {
            #[serde(borrow, default)]
            agent: Option<&'a RawValue>,
            #[serde(borrow, default)]
            stats: Option<&'a RawValue>,
            #[serde(borrow, default)]
            tags: Option<&'a RawValue>,
        }
        let Ok(StateUpdate { key, value }) = serde_json::from_str(&event.json) else { return };
        match key.as_str() {
            "stats" => self.report_stats(value, None, event, shift, false),
            "agent" => self.report_model(read_llm(value).model, event, shift),
            "tags" => self.report_tags(value, event, shift),
            // Reports all of it again: when the conversation is loaded, and in newer versions at the end of each turn. Metrics of a
            // model that the agent was switched to are in nothing else.
            "full_state" => {
                let Ok(state) = serde_json::from_str::<State<'_>>(value.get()) else { return };
                let llm = state.agent.map(read_llm).unwrap_or_default();
                if let Some(stats) = state.stats {
                    self.report_stats(stats, llm.usage_id.as_deref(), event, shift, true);
                }
                if let Some(tags) = state.tags {
                    self.report_tags(tags, event, shift);
                }
                self.report_model(llm.model, event, shift);
            }
            "execution_status" => {
                self.has_stopped |= serde_json::from_str::<String>(value.get()).is_ok_and(|status| status != "running");
            }
            _ => {}
        }
    }

    fn read_observation(&mut self, event: &Event, shift: i64) {
        #[derive(Deserialize)]
        struct Observed {
            observation: Observation,
        }
        #[derive(Deserialize)]
        struct Observation {
            kind: String,
            #[serde(default)]
            is_error: bool,
            #[serde(default)]
            active_model: Option<String>,
        }
        // Others are many, and large.
        if !event.json.contains("active_model") {
            return;
        }
        if let Ok(Observed { observation }) = serde_json::from_str(&event.json)
            && SWITCHES.contains(&observation.kind.as_str())
            && !observation.is_error
        {
            self.report_model(observation.active_model, event, shift);
        }
    }

    fn report_stats(&mut self, stats: &RawValue, usage: Option<&str>, event: &Event, shift: i64, is_state: bool) {
        let read = serde_json::from_str::<Value>(stats.get()).ok();
        if let Some(stats) = read.and_then(|stats| AgentStats::read(&stats, usage)) {
            keep_newest(&mut self.stats, stats, event, shift, is_state);
        }
    }

    fn report_model(&mut self, model: Option<String>, event: &Event, shift: i64) {
        if let Some(model) = model.and_then(|model| reported_model(&model, &event.id)) {
            keep_newest(&mut self.model, model, event, shift, false);
        }
    }

    fn report_tags(&mut self, tags: &RawValue, event: &Event, shift: i64) {
        let read = serde_json::from_str::<Value>(tags.get()).ok();
        if let Some(tags) = read.and_then(|tags| reported_tags(&tags, &event.id)) {
            keep_newest(&mut self.tags, tags, event, shift, false);
        }
    }
}

fn keep_newest<T>(newest: &mut Option<Reported<T>>, value: T, event: &Event, shift: i64, is_state: bool) {
    let position = event.position();
    if newest.as_ref().is_none_or(|newest| newest.position < position) {
        let instant = utc(&event.timestamp, shift);
        let time = match is_state {
            true => ReportTime::State { position: position.clone(), instant },
            false => ReportTime::Event { position: position.clone(), instant },
        };
        *newest = Some(Reported { position, time, value });
    }
}

/// The model and usage of an agent's LLM.
#[derive(Default, Deserialize)]
struct Llm {
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    usage_id: Option<String>,
}

fn read_llm(agent: &RawValue) -> Llm {
    #[derive(Deserialize)]
    struct Agent {
        llm: Llm,
    }
    serde_json::from_str::<Agent>(agent.get()).map(|agent| agent.llm).unwrap_or_default()
}

/// The name of a model without space around it; `None` for an empty one, and for one that a record has no space for. `source` is the
/// id of the event or conversation that reports it.
pub(super) fn reported_model(model: &str, source: &str) -> Option<String> {
    let model = model.trim();
    if within_max_name(model).len() < model.len() {
        tracing::warn!(source, bytes = model.len(), limit = MAX_NAME, "conversation.reported_model_ignored");
        return None;
    }
    (!model.is_empty()).then(|| model.to_owned())
}

/// Tags within the limits of a record; `None` where none are reported. `source` as in [`reported_model`].
pub(super) fn reported_tags(tags: &Value, source: &str) -> Option<Tags> {
    let (tags, left_out) = Tags::read(tags)?;
    if left_out > 0 {
        tracing::warn!(source, left_out, "conversation.reported_tags_left_out");
    }
    Some(tags)
}

/// An event's instant in UTC, in a form that sorts; earlier than all others if its timestamp does not read.
fn utc(timestamp: &str, shift: i64) -> String {
    if zoned_instant(timestamp).is_none()
        && let Some(instant) = local_instant(timestamp)
        && let Ok(instant) = instant.checked_add(jiff::SignedDuration::from_secs(shift))
    {
        return sortable(instant);
    }
    sortable_instant(timestamp).unwrap_or_else(|| "!".to_owned())
}

/// By how many seconds the times of a sandbox without a zone are behind UTC. Agent servers write events in the local time of their
/// sandbox and conversations in UTC, and name the zone nowhere. A batch is received seconds after its newest event, so that the
/// difference, rounded, is the zone's offset. For a batch that comes minutes or hours late the result is too large, which lets its
/// reports pass for newer than they are; a difference that no zone explains counts as none.
fn zone_shift(events: &[Event], now: Time) -> i64 {
    let newest = events.iter().filter_map(|event| local_instant(&event.timestamp)).max();
    let Some(newest) = newest else { return 0 };
    let behind = now.unix_seconds() - newest.as_second();
    let shift = (behind + ZONE_STEP / 2).div_euclid(ZONE_STEP) * ZONE_STEP;
    if (-ZONES_AHEAD..=ZONES_BEHIND).contains(&shift) { shift } else { 0 }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(value: &Value) -> Event {
        let text = |name: &str| value[name].as_str().unwrap_or_default().to_owned();
        Event { id: text("id"), timestamp: text("timestamp"), kind: text("kind"), json: value.to_string() }
    }

    fn state(timestamp: &str, key: &str, value: &Value) -> Event {
        event(
            &json!({"id": key, "timestamp": timestamp, "kind": "ConversationStateUpdateEvent", "key": key, "value": value}),
        )
    }

    fn now() -> Time {
        serde_json::from_str("\"2026-07-01T12:00:00Z\"").expect("a time")
    }

    fn model(events: &[Event]) -> Option<String> {
        Batch::of(events, now()).model.map(|model| model.value)
    }

    #[test]
    fn a_model_is_reported_in_three_ways_and_the_newest_counts() {
        let llm = |model: Value| json!({"llm": {"model": model, "usage_id": "u"}});
        let switch = |kind: &str, is_error: bool, model: Value| {
            event(&json!({"id": "o", "timestamp": "2026-01-01T00:00:03", "kind": "ObservationEvent",
                "observation": {"kind": kind, "is_error": is_error, "active_model": model}}))
        };
        let (first, second) = (
            state("2026-01-01T00:00:01", "agent", &llm(json!("first"))),
            state(
                "2026-01-01T00:00:02",
                "full_state",
                &json!({"agent": llm(json!("second")), "stats": 3, "tags": null}),
            ),
        );
        assert_eq!(model(std::slice::from_ref(&first)).as_deref(), Some("first"));
        assert_eq!(model(&[second.clone(), first.clone()]).as_deref(), Some("second"));
        for kind in SWITCHES {
            let third = switch(kind, false, json!("third"));
            assert_eq!(model(&[third, second.clone()]).as_deref(), Some("third"));
        }
        // A switch that failed, other tools, and what is no model.
        for other in [
            switch(SWITCHES[0], true, json!("no")),
            switch(SWITCHES[0], false, json!(null)),
            switch(SWITCHES[0], false, json!(7)),
            switch("TerminalObservation", false, json!("no")),
            state("2026-01-01T00:00:03", "agent", &llm(json!(" "))),
            state("2026-01-01T00:00:03", "agent", &llm(json!(["no"]))),
            state("2026-01-01T00:00:03", "agent", &json!("no")),
            state("2026-01-01T00:00:03", "agent", &llm(json!("x".repeat(MAX_NAME + 1)))),
            state("2026-01-01T00:00:03", "full_state", &json!([])),
            state("2026-01-01T00:00:03", "full_state", &json!({"agent": {"kind": "ACPAgent"}})),
        ] {
            assert_eq!(model(&[second.clone(), other.clone()]).as_deref(), Some("second"), "{other:?}");
        }
    }

    #[test]
    fn times_without_a_zone_are_read_in_the_zone_of_the_sandbox() {
        let instant = |timestamp: &str, newest: &str| {
            let events = [state(timestamp, "tags", &json!({})), state(newest, "x", &json!(1))];
            match Batch::of(&events, now()).tags.expect("tags").time {
                ReportTime::Event { instant, .. } => instant,
                other => panic!("{other:?}"),
            }
        };
        for (timestamp, newest, expected) in [
            ("2026-07-01T11:59:50", "2026-07-01T11:59:58.5", "2026-07-01T11:59:50.000000000Z"),
            // Minutes late.
            ("2026-07-01T11:50:00", "2026-07-01T11:54:00", "2026-07-01T11:50:00.000000000Z"),
            ("2026-07-01T06:59:50", "2026-07-01T06:59:58.5", "2026-07-01T11:59:50.000000000Z"),
            ("2026-07-01T17:44:50", "2026-07-01T17:44:58.5", "2026-07-01T11:59:50.000000000Z"),
            ("2026-07-02T01:59:00", "2026-07-02T01:59:30", "2026-07-01T11:59:00.000000000Z"),
            // It names its zone.
            ("2026-07-01T13:59:50+02:00", "2026-07-01T06:59:58", "2026-07-01T11:59:50.000000000Z"),
            // No zone is so far away.
            ("2026-01-01T00:00:00", "2026-01-01T00:00:01", "2026-01-01T00:00:00.000000000Z"),
            ("2026-07-03T00:00:00", "2026-07-03T00:00:01", "2026-07-03T00:00:00.000000000Z"),
            ("who knows", "2026-07-01T11:59:58.5", "!"),
        ] {
            assert_eq!(instant(timestamp, newest), expected, "{timestamp}");
        }
    }
}
