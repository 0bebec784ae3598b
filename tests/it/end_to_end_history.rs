//! The event history of a conversation on a real agent server: our store is complete soon after each turn, and does not
//! contain the tokens that are streamed to clients.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde_json::{Value, json};
use shared::agent_server::version::AgentServerVersion;
use uuid::Uuid;

use crate::support::product::{AgentConversation, Product, agent_server_version, content_text, logged, saying, text};
use crate::support::scripted_llm::{PROMPT_TOKENS, Reply, ScriptedLlm};
use crate::support::wait::wait_until;
use crate::support::websocket::WebSocket;

const TURNS: usize = 10;
/// Generous, because other tests share the machine. The measured time is printed.
const LIMIT: Duration = Duration::from_secs(180);
/// The interval between two comparisons of the stores.
const LOOK: Duration = Duration::from_millis(50);

fn settings(llm: &ScriptedLlm) -> Value {
    json!({"llm_model": "openai/scripted", "llm_api_key": "key-of-the-model", "llm_base_url": llm.base_url()})
}

/// Whether the tests' agent server has at least this version.
fn has(major: u32, minor: u32) -> bool {
    let version: AgentServerVersion = agent_server_version().parse().expect("a version");
    version >= AgentServerVersion::new(major, minor, 0)
}

/// All events of the agent server, by id.
async fn events_of_agent(agent: &AgentConversation) -> BTreeMap<String, Value> {
    let events = agent.all_events().await;
    events.into_iter().map(|event| (text(&event["id"]), event)).collect()
}

/// The times at which turns ended, according to the agent server's events. They are in the local time of this machine.
fn ends(events: &BTreeMap<String, Value>) -> BTreeSet<Timestamp> {
    let finished = events.values().filter(|event| event["key"] == "execution_status" && event["value"] == "finished");
    let local = |event: &Value| text(&event["timestamp"]).parse::<DateTime>().expect("a time without a zone");
    finished.map(|event| local(event).to_zoned(TimeZone::system()).expect("a time").timestamp()).collect()
}

#[tokio::test]
async fn all_events_of_each_turn_are_stored_soon() {
    let llm = ScriptedLlm::start().await;
    let product = Product::start(settings(&llm)).await;
    llm.reply_with(vec![Reply::text("turn 0")]);
    let id = product.start_conversation(saying("Begin")).await.conversation_id();
    product.conversation_when(&id, "finished").await;
    let agent = product.at_agent(&id).await;
    let mut times = Vec::new();
    for turn in 1..=TURNS {
        // Turns of different lengths, so that batches end at different points of a turn.
        let commands =
            (0..turn % 4).map(|step| Reply::tool_call("terminal", json!({"command": format!("echo {turn}.{step}")})));
        llm.reply_with(commands.chain([Reply::text(format!("turn {turn}"))]).collect());
        let earlier = ends(&events_of_agent(&agent).await);
        agent.send_message(&format!("Turn {turn}")).await;
        // The agent server may add events after the end of a turn, so the test reads them until they are the same
        // twice.
        let mut complete: Option<(BTreeMap<String, Value>, Timestamp)> = None;
        wait_until("the turn is stored", LIMIT, async || {
            let expected = events_of_agent(&agent).await;
            let stored: BTreeSet<String> = product.events_of(&id).await.into_iter().map(|event| event.id).collect();
            let at = Timestamp::now();
            let has_ended = ends(&expected).len() > earlier.len();
            if !has_ended || !expected.keys().all(|id| stored.contains(id)) {
                complete = None;
            } else if complete.as_ref().is_some_and(|(before, _)| *before == expected) {
                return true;
            } else {
                complete = Some((expected, at));
            }
            tokio::time::sleep(LOOK).await;
            false
        })
        .await;
        let (events, at) = complete.expect("a complete turn");
        assert!(agent.said_by("agent").await.contains(&format!("turn {turn}")));
        times.push(at.duration_since(*ends(&events).last().expect("an end")));
    }
    let shown: Vec<String> = times.iter().map(|time| format!("{:.2}", time.as_secs_f64())).collect();
    println!("agent server {}: seconds until each turn is stored: {}", agent_server_version(), shown.join(" "));

    // At the end both stores have the same events.
    let at_agent = events_of_agent(&agent).await;
    wait_until("everything is stored", LIMIT, async || {
        let stored = product.events_of(&id).await;
        at_agent.keys().all(|id| stored.iter().any(|event| event.id == *id))
    })
    .await;
    let stored = product.events_of(&id).await;
    for (id, event) in &at_agent {
        let ours = stored.iter().find(|event| event.id == *id).expect("stored");
        // The agent server's API omits nulls that its webhooks contain, so whole events cannot be compared.
        let head = (event["kind"].as_str(), event["timestamp"].as_str());
        assert_eq!((Some(ours.kind.as_str()), Some(ours.timestamp.as_str())), head, "{id}");
        let ours: Value = serde_json::from_str(&ours.json).expect("JSON");
        assert_eq!(ours["llm_message"]["content"], event["llm_message"]["content"], "{id}");
    }
    // Our store also has states of the whole conversation, which agent servers post and do not keep.
    for event in stored.iter().filter(|event| !at_agent.contains_key(&event.id)) {
        let key = serde_json::from_str::<Value>(&event.json).expect("JSON")["key"].clone();
        assert!(key == "full_state" || key == "stats", "{}", event.json);
    }
    // The tokens of a title may be counted, too.
    let asked = u64::try_from(llm.requests().len()).expect("a number");
    wait_until("the metrics are complete", LIMIT, async || {
        let usage = product.conversation(&id).await["metrics"]["accumulated_token_usage"].clone();
        let titles = u64::try_from(llm.title_requests().len()).expect("a number");
        let prompt = usage["prompt_tokens"].as_u64().unwrap_or_default();
        (asked * PROMPT_TOKENS..=(asked + titles) * PROMPT_TOKENS).contains(&prompt)
    })
    .await;
    product.shutdown().await;
}

#[tokio::test]
async fn streamed_tokens_reach_connected_clients_and_are_not_stored() {
    let has_tokens = has(1, 49);
    let llm = ScriptedLlm::start().await;
    let product = Product::start(settings(&llm)).await;
    let id = product.start_conversation(json!({})).await.conversation_id();
    let agent = product.at_agent(&id).await;
    let mut socket = WebSocket::connect(&agent.socket_url()).await;
    let answer = "One word after the other";
    llm.reply_with(vec![Reply::text(answer)]);
    agent.send_message("Speak slowly").await;
    let mut streamed = String::new();
    let watched = async {
        while let Some(event) = socket.next().await {
            match event["kind"].as_str() {
                Some("StreamingDeltaEvent") => streamed.push_str(event["content"].as_str().unwrap_or_default()),
                Some("MessageEvent") if event["source"] == "agent" => {
                    return content_text(&event["llm_message"]["content"]);
                }
                _ => {}
            }
        }
        panic!("the connection ended");
    };
    let said = tokio::time::timeout(LIMIT, watched).await.expect("an answer");
    assert_eq!((said.as_str(), streamed.as_str()), (answer, if has_tokens { answer } else { "" }));
    let requests = llm.requests();
    assert!(
        !requests.is_empty() && requests.iter().all(|request| (request["stream"] == true) == has_tokens),
        "{requests:#?}"
    );

    let of_agent = |kind: &str| {
        let kind = kind.to_owned();
        async { product.events_of(&id).await.into_iter().filter(move |event| event.kind == kind).count() }
    };
    wait_until("the answer is stored", LIMIT, async || of_agent("MessageEvent").await == 2).await;
    wait_until("the end of the turn is stored", LIMIT, async || {
        product.events_of(&id).await.iter().any(|event| event.json.contains("\"finished\""))
    })
    .await;
    assert_eq!(of_agent("StreamingDeltaEvent").await, 0, "tokens are not stored");
    let listed =
        product.get_from(&format!("/api/v1/conversation/{id}/events/search?kind__eq=StreamingDeltaEvent")).await;
    assert_eq!(listed["items"], json!([]));
    assert!(agent.all_events().await.iter().all(|event| event["kind"] != "StreamingDeltaEvent"));
    // Streamed tokens in a webhook would have been dropped: there were none.
    let conversation = format!("conversation={}", Uuid::parse_str(&id).expect("an id"));
    let log = logged();
    let dropped: Vec<&str> = log
        .lines()
        .filter(|line| line.contains("event.streamed_tokens_dropped") && line.contains(&conversation))
        .collect();
    assert_eq!(dropped, [""; 0]);
    product.shutdown().await;
}

#[tokio::test]
async fn model_switch_and_tags_show_in_the_conversation() {
    let llm = ScriptedLlm::start().await;
    let product = Product::start(settings(&llm)).await;
    let id = product.start_conversation(saying("Begin")).await.conversation_id();
    let before = product.conversation_when(&id, "finished").await;
    assert_eq!((&before["llm_model"], &before["tags"]), (&json!("openai/scripted"), &json!({})), "{before:#}");
    let agent = product.at_agent(&id).await;
    if !has(1, 34) {
        // This version has no tags: its update changes the title, which is missing.
        let (status, answer) = agent.try_patch(&json!({"tags": {"team": "blue"}})).await;
        assert_eq!((status, &answer["detail"][0]["loc"]), (422, &json!(["body", "title"])), "{answer:#}");
        assert_eq!(agent.info().await["tags"], Value::Null);
        assert_eq!(product.conversation(&id).await["tags"], json!({}));
        product.shutdown().await;
        return;
    }
    agent.patch(&json!({"tags": {"team": "blue"}})).await;
    let other = json!({"model": "openai/other", "api_key": "key-of-the-model", "base_url": llm.base_url(), "usage_id": "profile:other"});
    agent.post("switch_llm", &json!({"llm": other})).await;
    wait_until("model and tags are shown", LIMIT, async || {
        let shown = product.conversation(&id).await;
        shown["llm_model"] == "openai/other" && shown["tags"] == json!({"team": "blue"})
    })
    .await;
    // The usage of the other model counts, too.
    let prompt =
        async || product.conversation(&id).await["metrics"]["accumulated_token_usage"]["prompt_tokens"].as_u64();
    let first = u64::try_from(1 + llm.title_requests().len()).expect("a number") * PROMPT_TOKENS;
    agent.send_message("Continue").await;
    wait_until("both models are counted", LIMIT, async || prompt().await == Some(first + PROMPT_TOKENS)).await;
    assert_eq!(llm.requests().pop().expect("a request")["model"], "other");
    product.shutdown().await;
}
