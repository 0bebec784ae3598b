//! A start with an agent profile, and with the fields that later versions have, on a real agent server.

use serde_json::{Value, json};

use crate::support::product::{Product, content_text, is_from, saying, text, with};
use crate::support::scripted_llm::ScriptedLlm;

const PROFILES: &str = "/api/agent-profiles";

/// The whole text of the request that contains what the user said, with the names of its tools.
fn request(llm: &ScriptedLlm, said: &str) -> Option<(String, String, Vec<String>)> {
    let request = llm.requests().into_iter().find(|request| request["messages"].to_string().contains(said))?;
    let tools = request["tools"].as_array().into_iter().flatten();
    let tools = tools.map(|tool| text(&tool["function"]["name"])).collect();
    Some((content_text(&request["messages"][0]["content"]), request["messages"].to_string(), tools))
}

async fn post(product: &Product, path: &str, body: &Value) -> Value {
    let answer = product.post_to(path, body).send().await.expect("an answer");
    assert!(answer.status().is_success(), "{path}: {}", answer.text().await.unwrap_or_default());
    answer.json().await.expect("JSON")
}

#[tokio::test]
async fn a_start_gets_what_its_agent_profile_chooses_and_no_disabled_skill() {
    let (usual, fast) = tokio::join!(ScriptedLlm::start(), ScriptedLlm::start());
    let product = Product::start(json!({
        "llm_model": "openai/usual", "llm_api_key": "key-of-usual", "llm_base_url": usual.base_url(),
        "disabled_skills": ["of-the-settings"],
        "mcp_config": {"unreachable": {"url": "http://127.0.0.1:1/mcp", "transport": "http"}},
    }))
    .await;
    let llm = json!({"llm": {"model": "openai/fast", "api_key": "key-of-fast", "base_url": fast.base_url()}});
    post(&product, "/api/v1/settings/profiles/fast", &llm).await;
    let profile = json!({
        "agent_kind": "openhands", "llm_profile_ref": "fast", "mcp_server_refs": ["unknown"], "disabled_skills": ["of-the-profile"],
        "tools": [{"name": "terminal", "params": {}}], "system_message_suffix": "Suffix of the profile.",
    });
    post(&product, &format!("{PROFILES}/reviewer"), &profile).await;
    post(&product, &format!("{PROFILES}/reviewer"), &profile).await;
    let listed = product.get_from(PROFILES).await;
    let reviewer = listed["profiles"].as_array().expect("profiles").iter().find(|one| one["name"] == "reviewer");
    let reviewer = reviewer.expect("the profile")["id"].clone();

    // A sandbox with four skills of the user. Its conversation has no message, and the profile that the settings make.
    let first = product.start_conversation(json!({"agent_profile_id": listed["active_agent_profile_id"]})).await;
    let agent = product.at_agent(&first.conversation_id()).await;
    for name in ["of-the-settings", "of-the-profile", "of-the-request", "kept-skill"] {
        let skill = format!(
            "mkdir -p ~/.agents/skills/{name} && printf -- '---\\nname: {name}\\ndescription: Mine.\\n---\\nBody.\\n' > ~/.agents/skills/{name}/SKILL.md"
        );
        let ran = agent.run(&agent.folder().await, &skill).await;
        assert_eq!(ran.exit_code, 0, "{ran:?}");
    }
    let sandbox = json!({"sandbox_id": first.sandbox_id()});

    let fields = json!({"agent_profile_id": reviewer, "disabled_skills": ["of-the-request"], "tags": {"team": "red", "run": "7"},
        "system_message_suffix": "Suffix of the request.", "trigger": "automation"});
    let start = product.start_conversation(with(with(saying("With a profile"), sandbox.clone()), fields)).await;
    let id = start.conversation_id();
    assert!(start.detail().contains("MCP servers that the settings do not have: \"unknown\""), "{}", start.detail());
    let shown = product.conversation_when(&id, "finished").await;
    let launched = json!({"agent_profile_id": reviewer, "revision": 1});
    assert_eq!((&shown["launched_agent_profile"], &shown["llm_model"]), (&launched, &json!("openai/fast")));
    assert_eq!((&shown["tags"], &shown["trigger"]), (&json!({"team": "red", "run": "7"}), &json!("automation")));
    assert!(request(&usual, "With a profile").is_none(), "the model is that of the profile");
    let (_, messages, tools) = request(&fast, "With a profile").expect("a request");
    for (words, is_sent) in [
        ("Suffix of the profile.", true),
        ("Suffix of the request.", true),
        ("kept-skill", true),
        ("of-the-settings", false),
        ("of-the-profile", false),
        ("of-the-request", false),
    ] {
        assert_eq!(messages.contains(words), is_sent, "{words} in {messages}");
    }
    assert!(tools.contains(&"terminal".to_owned()) && !tools.contains(&"file_editor".to_owned()), "{tools:?}");
    let found = product.get("/search?tag=team:red&tag=run").await;
    assert_eq!(found["items"].as_array().map(Vec::len), Some(1), "{found}");
    assert_eq!((&found["items"][0]["id"], product.get("/count?tag=team:blue").await), (&shown["id"], json!(0)));
    if is_from(34) {
        assert_eq!(product.at_agent(&id).await.info().await["tags"], shown["tags"]);
    }

    // The first profile follows the settings; a system prompt replaces the agent's own.
    let fields = json!({"system_prompt": "You answer in one word."});
    let body = with(with(saying("With a prompt"), sandbox), fields);
    if is_from(34) {
        let start = product.start_conversation(body).await;
        let shown = product.conversation_when(&start.conversation_id(), "finished").await;
        assert_eq!(shown["launched_agent_profile"]["agent_profile_id"], listed["active_agent_profile_id"]);
        let (prompt, _, tools) = request(&usual, "With a prompt").expect("a request");
        assert!(prompt.starts_with("You answer in one word."), "{prompt}");
        assert!(tools.contains(&"file_editor".to_owned()), "{tools:?}");
    } else {
        let task = post(&product, "/api/v1/app-conversations", &body).await;
        let error = product.follow(&text(&task["id"])).await.error();
        assert!(error.contains("from version 1.34.0 on"), "{error}");
    }
    product.shutdown().await;
}
