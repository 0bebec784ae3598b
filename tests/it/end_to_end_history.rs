//! The history of a conversation on a real agent server: our store has all of it soon after each turn, and the tokens that clients
//! watch are not in it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use shared::agent_server::version::AgentServerVersion;

use crate::support::product::{AgentConversation, Product, agent_server_version, content_text, saying, text};
use crate::support::scripted_llm::{PROMPT_TOKENS, Reply, ScriptedLlm};
use crate::support::wait::wait_until;
use crate::support::websocket::WebSocket;

const TURNS: usize = 10;
/// Generous: other tests share the machine. The time that it takes is printed.
const LIMIT: Duration = Duration::from_secs(180);
/// How often the store is compared.
const LOOK: Duration = Duration::from_millis(50);

fn settings(llm: &ScriptedLlm) -> Value {
    json!({"llm_model": "openai/scripted", "llm_api_key": "key-of-the-model", "llm_base_url": llm.base_url()})
}

/// Whether the tests' agent server has at least this version.
fn has(major: u32, minor: u32) -> bool {
    let version: AgentServerVersion = agent_server_version().parse().expect("a version");
    version >= AgentServerVersion::new(major, minor, 0)
}

/// The ids of all events that the agent server has, with those events.
async fn events_of_agent(agent: &AgentConversation) -> Vec<(String, Value)> {
    let events = agent.all_events().await;
    events.into_iter().map(|event| (text(&event["id"]), event)).collect()
}

#[tokio::test]
async fn ten_turns_are_stored_completely_soon_after_each() {
    let llm = ScriptedLlm::start().await;
    let product = Product::start(settings(&llm)).await;
    llm.reply_with(vec![Reply::text("turn 0")]);
    let id = product.start_conversation(saying("Begin")).await.conversation_id();
    product.conversation_when(&id, "finished").await;
    let agent = product.at_agent(&id).await;
    let mut times = Vec::new();
    for turn in 1..=TURNS {
        // Turns of different lengths, so that batches are cut in different places.
        let commands =
            (0..turn % 4).map(|step| Reply::tool_call("terminal", json!({"command": format!("echo {turn}.{step}")})));
        let answer = format!("turn {turn}");
        llm.reply_with(commands.chain([Reply::text(&answer)]).collect());
        agent.send_message(&format!("Turn {turn}")).await;
        wait_until("the turn ends", LIMIT, async || {
            agent.said_by("agent").await.contains(&answer) && agent.info().await["execution_status"] == "finished"
        })
        .await;
        let ended = Instant::now();
        // The turn has ended, so that the agent server has all of its events but metrics that it may add.
        let expected = events_of_agent(&agent).await;
        let mut first = None;
        wait_until("the turn is stored", LIMIT, async || {
            let stored: BTreeSet<String> = product.events_of(&id).await.into_iter().map(|event| event.id).collect();
            let complete = expected.iter().all(|(id, _)| stored.contains(id));
            if complete {
                first.get_or_insert_with(|| ended.elapsed());
            } else {
                tokio::time::sleep(LOOK).await;
            }
            complete
        })
        .await;
        times.push(first.unwrap_or_default());
    }
    let shown: Vec<String> = times.iter().map(|time| format!("{:.2}", time.as_secs_f64())).collect();
    println!("agent server {}: seconds until each turn is stored: {}", agent_server_version(), shown.join(" "));

    // At the end both have the same events.
    let at_agent = events_of_agent(&agent).await;
    wait_until("everything is stored", LIMIT, async || {
        let stored = product.events_of(&id).await;
        at_agent.iter().all(|(id, _)| stored.iter().any(|event| event.id == *id))
    })
    .await;
    let stored = product.events_of(&id).await;
    for (id, event) in &at_agent {
        let ours = stored.iter().find(|event| event.id == *id).expect("stored");
        // An answer of the agent server lacks nulls that its webhooks have, so that whole events cannot be compared.
        let head = (event["kind"].as_str(), event["timestamp"].as_str());
        assert_eq!((Some(ours.kind.as_str()), Some(ours.timestamp.as_str())), head, "{id}");
        let ours: Value = serde_json::from_str(&ours.json).expect("JSON");
        assert_eq!(ours["llm_message"]["content"], event["llm_message"]["content"], "{id}");
    }
    // Ours has states of the whole conversation beside them, which agent servers post and do not keep.
    let known: BTreeSet<&String> = at_agent.iter().map(|(id, _)| id).collect();
    for event in stored.iter().filter(|event| !known.contains(&event.id)) {
        assert!(event.json.contains("full_state") || event.json.contains("stats"), "{}", event.json);
    }
    // A title may be counted, too.
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
async fn tokens_reach_clients_that_watch_and_no_store() {
    if !has(1, 49) {
        println!("skipped: agent servers before 1.49 stream no tokens, or post them to webhooks");
        return;
    }
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
    assert_eq!((said.as_str(), streamed.as_str()), (answer, answer));
    let asked = llm.requests().pop().expect("a request");
    assert_eq!(asked["stream"], true, "{asked:#}");

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
    product.shutdown().await;
}

#[tokio::test]
async fn a_switch_of_the_model_and_tags_show_in_the_conversation() {
    if !has(1, 34) {
        println!("skipped: agent servers before 1.34 have no tags");
        return;
    }
    let llm = ScriptedLlm::start().await;
    let product = Product::start(settings(&llm)).await;
    let id = product.start_conversation(saying("Begin")).await.conversation_id();
    let before = product.conversation_when(&id, "finished").await;
    assert_eq!((&before["llm_model"], &before["tags"]), (&json!("openai/scripted"), &json!({})), "{before:#}");
    let agent = product.at_agent(&id).await;
    agent.patch(&json!({"tags": {"team": "blue"}})).await;
    let other = json!({"model": "openai/other", "api_key": "key-of-the-model", "base_url": llm.base_url(), "usage_id": "profile:other"});
    agent.post("switch_llm", &json!({"llm": other})).await;
    wait_until("model and tags are shown", LIMIT, async || {
        let shown = product.conversation(&id).await;
        shown["llm_model"] == "openai/other" && shown["tags"] == json!({"team": "blue"})
    })
    .await;
    // What the other model is used for counts, too.
    let prompt =
        async || product.conversation(&id).await["metrics"]["accumulated_token_usage"]["prompt_tokens"].as_u64();
    let first = u64::try_from(1 + llm.title_requests().len()).expect("a number") * PROMPT_TOKENS;
    agent.send_message("Go on").await;
    wait_until("both models are counted", LIMIT, async || prompt().await == Some(first + PROMPT_TOKENS)).await;
    assert_eq!(llm.requests().pop().expect("a request")["model"], "other");
    product.shutdown().await;
}
