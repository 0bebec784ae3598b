//! A server with a public address, and MCP servers in the settings, on real agent servers.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::support::mcp_server::{Behavior, McpServer, meaning, write_process};
use crate::support::product::{Product, content_text, saying, text, with};
use crate::support::public_address::PublicAddress;
use crate::support::scripted_llm::{Reply, ScriptedLlm};
use crate::support::wait::wait_until;

/// Long, because a machine that runs all tests at once may give an agent server a tenth of a processor.
const LIMIT: Duration = Duration::from_secs(180);
const TOKEN: &str = "token-of-the-git-host-4d1c";
const KEY: &str = "key-of-the-words-81ab";

#[tokio::test]
async fn a_server_with_a_public_address_runs_conversations_and_their_mcp_servers() {
    let llm = ScriptedLlm::start().await;
    let public = PublicAddress::start().await;
    let settings = json!({
        "llm_model": "openai/scripted",
        "llm_api_key": "key-of-the-model",
        "llm_base_url": llm.base_url(),
        "provider_tokens": {"github": {"token": TOKEN}},
    });
    let product = Product::start_at(Some(public.url()), settings).await;
    public.lead_to(product.address());

    let sandbox = a_start_with_a_message_is_answered(&product, &llm).await;
    a_start_without_a_message_accepts_one_later(&product, &llm, &sandbox).await;
    a_token_is_looked_up_at_the_public_address(&product, &llm, &public, &sandbox).await;
    let words = mcp_servers_of_the_settings_serve_the_agent(&product, &llm, &sandbox).await;
    mcp_servers_that_fail_are_left_out_and_named(&product, &llm, &sandbox).await;
    drop(words);
    agent_servers_send_their_events_within_a_second(&product);

    // The public address serves no MCP, and no agent is configured to connect to it.
    let asked = public.requests();
    assert!(asked.iter().all(|request| request == "GET /api/v1/webhooks/secrets"), "{asked:?}");
    product.shutdown().await;
}

async fn a_start_with_a_message_is_answered(product: &Product, llm: &ScriptedLlm) -> String {
    llm.reply_with(vec![Reply::text("Hello from the model")]);
    let start = product.start_conversation(saying("Say hello")).await;
    let id = start.conversation_id();
    product.conversation_when(&id, "finished").await;
    assert_eq!(product.at_agent(&id).await.said_by("agent").await, ["Hello from the model"]);
    all_events_arrive(product, &id).await;
    start.sandbox_id()
}

/// Our store receives every event of the turn that the agent server has, the last one included.
async fn all_events_arrive(product: &Product, id: &str) {
    let agent = product.at_agent(id).await;
    wait_until("all events of the turn are stored", LIMIT, async || {
        let stored: BTreeSet<String> = product.events_of(id).await.into_iter().map(|event| event.id).collect();
        let there: BTreeSet<String> = agent.all_events().await.iter().map(|event| text(&event["id"])).collect();
        !there.is_empty() && there.is_subset(&stored)
    })
    .await;
}

async fn a_start_without_a_message_accepts_one_later(product: &Product, llm: &ScriptedLlm, sandbox: &str) {
    let start = product.start_conversation(json!({"sandbox_id": sandbox})).await;
    let id = start.conversation_id();
    llm.reply_with(vec![Reply::text("Better late")]);
    let message = json!({"role": "user", "content": [{"type": "text", "text": "Now speak"}]});
    let answer = product.post(&format!("/{id}/send-message"), &message).send().await.expect("an answer");
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap_or_default());
    product.conversation_when(&id, "finished").await;
    assert_eq!(product.at_agent(&id).await.said_by("agent").await, ["Better late"]);
}

async fn a_token_is_looked_up_at_the_public_address(
    product: &Product,
    llm: &ScriptedLlm,
    public: &PublicAddress,
    sandbox: &str,
) {
    llm.reply_with(vec![
        Reply::tool_call("terminal", json!({"command": "printf %s \"$GITHUB_TOKEN\" | rev > seen.txt"})),
        Reply::text("Read"),
    ]);
    let start = product.start_conversation(with(saying("Read the token"), json!({"sandbox_id": sandbox}))).await;
    let id = start.conversation_id();
    product.conversation_when(&id, "finished").await;
    let seen = std::fs::read_to_string(product.at_agent(&id).await.folder().await.join("seen.txt"));
    assert_eq!(seen.expect("the command has run"), TOKEN.chars().rev().collect::<String>());
    assert!(public.requests().contains(&"GET /api/v1/webhooks/secrets".to_owned()), "{:?}", public.requests());
}

async fn mcp_servers_of_the_settings_serve_the_agent(product: &Product, llm: &ScriptedLlm, sandbox: &str) -> McpServer {
    let words = McpServer::start("authorization", &format!("Bearer {KEY}")).await;
    let program = product.data().join("words.py");
    write_process(&program);
    let folder = product.data().canonicalize().expect("the data folder");
    let python = product.agent_server_python();
    // In the form of the web UI's requests, one after the other, and one server that agent servers cannot reach.
    for patch in [
        json!({"words": {"transport": "http", "url": words.url(), "headers": {"Authorization": format!("Bearer {KEY}")}}}),
        json!({"process": {"transport": "stdio", "command": python, "args": [program], "cwd": folder, "env": {"WORDS": KEY}, "timeout": 120.5}}),
        json!({"gone": {"transport": "sse", "url": "http://127.0.0.1:1/sse", "enabled": false}}),
    ] {
        set_mcp_servers(product, &patch).await;
    }
    llm.reply_with(vec![
        Reply::tool_call("words_look_up", json!({"word": "serendipity"})),
        Reply::tool_call("process_look_up", json!({"word": "loquacious"})),
        Reply::text("Looked up"),
    ]);
    let start = product.start_conversation(with(saying("Look them up"), json!({"sandbox_id": sandbox}))).await;
    let id = start.conversation_id();
    product.conversation_when(&id, "finished").await;
    assert_eq!(start.detail(), "");
    let last = llm.requests().pop().expect("a request");
    let tools = tools_of(&last);
    assert!(tools.contains("words_look_up") && tools.contains("process_look_up"), "{tools:?}");
    let said: Vec<String> = last["messages"]
        .as_array()
        .expect("messages")
        .iter()
        .filter(|message| message["role"] == "tool")
        .map(|message| content_text(&message["content"]))
        .collect();
    let from_process = format!("loquacious with {} in {}", KEY.chars().rev().collect::<String>(), folder.display());
    for expected in [meaning("serendipity"), from_process] {
        assert!(said.iter().any(|said| said.contains(&expected)), "{expected}: {said:?}");
    }
    let called: Vec<Value> = words.calls().iter().map(|call| json!([call["name"], call["arguments"]])).collect();
    assert_eq!(called, [json!(["look_up", {"word": "serendipity"}])]);
    for shown in [
        product.get_from("/api/v1/settings").await.to_string(),
        product.get_from("/api/v1/users/me").await.to_string(),
        product.conversation(&id).await.to_string(),
        start.task.to_string(),
    ] {
        assert!(!shown.contains(KEY), "{shown}");
    }
    words
}

fn tools_of(request: &Value) -> BTreeSet<String> {
    let tools = request["tools"].as_array().expect("tools");
    tools.iter().map(|tool| text(&tool["function"]["name"])).collect()
}

/// Each broken server next to working ones: the start is READY with the tools of those that work, and its detail names
/// the other.
async fn mcp_servers_that_fail_are_left_out_and_named(product: &Product, llm: &ScriptedLlm, sandbox: &str) {
    let refused = McpServer::behaving(Behavior::Status(401)).await;
    let hung = McpServer::behaving(Behavior::Hangs).await;
    let stream = McpServer::behaving(Behavior::HangsInStream).await;
    let slow = json!({"command": "sleep", "args": ["300"], "timeout": 5});
    let cases = [
        ("refused", json!({"url": "http://127.0.0.1:1/mcp"}), "the connection was refused"),
        ("unauthorized", json!({"url": refused.url(), "headers": {"X-Key": KEY}}), "it answered 401 Unauthorized"),
        ("hung", json!({"url": hung.url(), "timeout": 5}), "it did not answer within 5 s"),
        ("stream", json!({"url": stream.url(), "timeout": 5}), "it did not answer within 5 s"),
        ("missing", json!({"command": "no-such-command-here", "env": {"K": KEY}}), "its command was not found"),
        ("slow", slow, "it did not answer within 5 s"),
    ];
    let mut all = json!({});
    for (name, server, reason) in &cases {
        all[*name] = server.clone();
        start_with_two_working_servers_and(product, llm, sandbox, &json!({*name: server}), &[(*name, *reason)]).await;
    }
    let expected: Vec<(&str, &str)> = cases.iter().map(|(name, _, reason)| (*name, *reason)).collect();
    start_with_two_working_servers_and(product, llm, sandbox, &all, &expected).await;
}

/// The two working servers are in the settings already.
async fn start_with_two_working_servers_and(
    product: &Product,
    llm: &ScriptedLlm,
    sandbox: &str,
    broken: &Value,
    expected: &[(&str, &str)],
) {
    set_mcp_servers(product, broken).await;
    llm.reply_with(vec![Reply::text("Here")]);
    let began = Instant::now();
    let start = product.start_conversation(with(saying("Say here"), json!({"sandbox_id": sandbox}))).await;
    let took = began.elapsed();
    let id = start.conversation_id();
    eprintln!("a start with {:?}: {took:.1?}", expected.iter().map(|(name, _)| name).collect::<Vec<_>>());
    let mut lines: Vec<&str> = start.detail().lines().collect();
    lines.sort_unstable();
    let mut notes: Vec<String> =
        expected.iter().map(|(name, reason)| format!("MCP server \"{name}\" was left out: {reason}")).collect();
    notes.sort_unstable();
    assert_eq!(lines, notes);
    product.conversation_when(&id, "finished").await;
    let tools = tools_of(&llm.requests().pop().expect("a request"));
    assert!(tools.contains("words_look_up") && tools.contains("process_look_up"), "{tools:?}");
    let removed: Map<String, Value> = expected.iter().map(|(name, _)| ((*name).to_owned(), Value::Null)).collect();
    set_mcp_servers(product, &removed.into()).await;
}

async fn set_mcp_servers(product: &Product, patch: &Value) {
    let body = json!({"agent_settings_diff": {"mcp_config": patch}});
    let answer = product.post_to("/api/v1/settings", &body).send().await.expect("an answer");
    assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap_or_default());
}

fn agent_servers_send_their_events_within_a_second(product: &Product) {
    let environments: Vec<Vec<u8>> = product
        .processes()
        .into_iter()
        .filter_map(|pid| std::fs::read(format!("/proc/{}/environ", pid.as_raw_nonzero())).ok())
        .collect();
    let has =
        |environment: &[u8], variable: &str| environment.split(|byte| *byte == 0).any(|one| one == variable.as_bytes());
    // Systems without `/proc` have nothing to check.
    assert!(
        environments.is_empty() || environments.iter().any(|one| has(one, "OH_WEBHOOKS_0_FLUSH_DELAY=1")),
        "no agent server has the variable"
    );
}
