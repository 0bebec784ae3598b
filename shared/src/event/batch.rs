//! Reads the reports in a batch of events: metrics, the model, tags, and whether the agent server must be polled.

use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use uuid::Uuid;

use super::store::Event;
use crate::conversation::reports::{AGENT_USAGE, AgentStats, ReportTime};
use crate::conversation::tags::Tags;
use crate::conversation::{MAX_NAME, within_max_name};

/// The observations of tools with which an agent switches its own model.
const SWITCHES: [&str; 2] = ["SwitchLLMObservation", "ClassifyAndSwitchLLMObservation"];

/// A reported value, and the position of the event that reported it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Reported<T> {
    pub(super) position: String,
    pub(super) value: T,
}

/// The reports of a batch of events. The newest report of each value is used; the order of the batch is irrelevant.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "independent facts, not a state")]
pub(super) struct Batch {
    conversation: Uuid,
    /// The usage of the models.
    pub(super) stats: Option<Reported<AgentStats>>,
    /// Whether an event about stats alone is in the batch.
    pub(super) has_stats_event: bool,
    /// The model of the agent.
    pub(super) model: Option<Reported<String>>,
    pub(super) tags: Option<Reported<Tags>>,
    pub(super) has_message: bool,
    /// Whether the agent has stopped: finished, paused, failed, or waits for a confirmation.
    pub(super) has_stopped: bool,
    /// Whether metrics may have increased: the agent has stopped, or an event with the whole state contains stats of models that were used.
    pub(super) may_have_stats: bool,
}

impl Batch {
    /// Reads the events of a conversation.
    pub(super) fn of(conversation: Uuid, events: &[Event]) -> Self {
        let mut batch = Self { conversation, ..Self::default() };
        for event in events {
            match event.kind.as_str() {
                "MessageEvent" => batch.has_message = true,
                "ConversationStateUpdateEvent" => batch.read_state(event),
                "ObservationEvent" => batch.read_observation(event),
                _ => {}
            }
        }
        batch
    }

    /// The source of [`Self::stats`] at this position. If the batch also contains an event about stats alone, stats of the whole state
    /// count as such an event.
    pub(super) fn stats_source(&self, position: String) -> ReportTime {
        if self.has_stats_event { ReportTime::Event(position) } else { ReportTime::State(position) }
    }

    fn read_state(&mut self, event: &Event) {
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
            "stats" => self.has_stats_event |= self.report_stats(value, None, event),
            "agent" => self.report_model(read_llm(value).model, event),
            "tags" => self.report_tags(value, event),
            // Contains the whole state: an agent server sends it when it loads the conversation, and newer versions also at the end of each
            // turn. No other event contains the metrics of a model that the agent was switched to.
            "full_state" => {
                let Ok(state) = serde_json::from_str::<State<'_>>(value.get()) else { return };
                let llm = state.agent.map(read_llm).unwrap_or_default();
                if let Some(stats) = state.stats {
                    self.report_stats(stats, Some(llm.usage_id.as_deref().unwrap_or(AGENT_USAGE)), event);
                    self.may_have_stats |= self.stats.as_ref().is_some_and(|stats| stats.value.has_usage());
                }
                if let Some(tags) = state.tags {
                    self.report_tags(tags, event);
                }
                self.report_model(llm.model, event);
            }
            "execution_status" => {
                self.has_stopped |= serde_json::from_str::<String>(value.get()).is_ok_and(|status| status != "running");
                self.may_have_stats |= self.has_stopped;
            }
            _ => {}
        }
    }

    fn read_observation(&mut self, event: &Event) {
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
        // Other observations are frequent and large, so they are not parsed.
        if !event.json.contains("active_model") {
            return;
        }
        if let Ok(Observed { observation }) = serde_json::from_str(&event.json)
            && SWITCHES.contains(&observation.kind.as_str())
            && !observation.is_error
        {
            self.report_model(observation.active_model, event);
        }
    }

    /// Reports stats. Returns whether there are any.
    fn report_stats(&mut self, stats: &RawValue, usage: Option<&str>, event: &Event) -> bool {
        let read = serde_json::from_str::<Value>(stats.get()).ok();
        let stats = read.and_then(|stats| AgentStats::read(&stats, usage));
        let has_stats = stats.is_some();
        keep_newest(&mut self.stats, stats, event);
        has_stats
    }

    fn report_model(&mut self, model: Option<String>, event: &Event) {
        let model = model.and_then(|model| reported_model(&model, self.conversation));
        keep_newest(&mut self.model, model, event);
    }

    fn report_tags(&mut self, tags: &RawValue, event: &Event) {
        let read = serde_json::from_str::<Value>(tags.get()).ok();
        let tags = read.and_then(|tags| reported_tags(&tags, self.conversation));
        keep_newest(&mut self.tags, tags, event);
    }
}

fn keep_newest<T>(newest: &mut Option<Reported<T>>, value: Option<T>, event: &Event) {
    let Some(value) = value else { return };
    let position = event.position();
    if newest.as_ref().is_none_or(|newest| newest.position < position) {
        *newest = Some(Reported { position, value });
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

/// The name of a model without surrounding white space; `None` if it is empty or too long for a record.
pub(super) fn reported_model(model: &str, conversation: Uuid) -> Option<String> {
    let model = model.trim();
    if within_max_name(model).len() < model.len() {
        tracing::warn!(%conversation, bytes = model.len(), limit = MAX_NAME, "conversation.reported_model_ignored");
        return None;
    }
    (!model.is_empty()).then(|| model.to_owned())
}

/// The tags within the limits of a record; `None` if none are reported.
pub(super) fn reported_tags(tags: &Value, conversation: Uuid) -> Option<Tags> {
    let (tags, left_out) = Tags::read(tags)?;
    if left_out > 0 {
        tracing::warn!(%conversation, left_out, "conversation.reported_tags_left_out");
    }
    Some(tags)
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

    fn model(events: &[Event]) -> Option<String> {
        Batch::of(Uuid::nil(), events).model.map(|model| model.value)
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
        // A failed switch, other tools, and values that are not a model.
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
    fn stats_of_the_whole_state_count_as_an_event_beside_an_event_about_stats() {
        let stats = |tokens: u64| json!({"usage_to_metrics": {"agent": {"accumulated_token_usage": {"prompt_tokens": tokens}}}});
        let whole =
            |second: u64| state(&format!("2026-01-01T00:00:0{second}"), "full_state", &json!({"stats": stats(second)}));
        let alone = |second: u64| state(&format!("2026-01-01T00:00:0{second}"), "stats", &stats(second));
        let nothing = state("2026-01-01T00:00:09", "stats", &json!({"usage_to_metrics": {}}));
        for (events, newest, is_event) in [
            (vec![alone(1), whole(2)], 2, true),
            (vec![whole(2), alone(1)], 2, true),
            (vec![alone(2), whole(1)], 2, true),
            (vec![whole(1), whole(2)], 2, false),
            (vec![whole(1), nothing], 1, false),
        ] {
            let batch = Batch::of(Uuid::nil(), &events);
            let reported = batch.stats.clone().expect("stats");
            assert!(reported.position.starts_with(&format!("2026-01-01T00:00:0{newest}")), "{events:?}");
            let position = reported.position.clone();
            let expected = if is_event { ReportTime::Event(position) } else { ReportTime::State(position) };
            assert_eq!(
                (batch.stats_source(reported.position), batch.has_stats_event),
                (expected, is_event),
                "{events:?}"
            );
        }
    }
}
