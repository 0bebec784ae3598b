//! LLM profiles on real agent servers: which model gets the requests of a conversation, and with which key. Each profile has a scripted
//! model of its own.

use serde_json::{Value, json};

use crate::support::product::{Product, is_from, saying, with};
use crate::support::scripted_llm::{PROMPT_TOKENS, ScriptedLlm};
use crate::support::wait::wait_until;

const PROFILES: &str = "/api/v1/settings/profiles";
/// Generous, because other tests share the machine.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(180);

/// The texts of users that reached a model, with the model's name and the key of each request.
fn heard(llm: &ScriptedLlm, said: &str) -> Vec<(Value, String)> {
    let requests = llm.requests().into_iter().zip(llm.keys());
    let about = requests.filter(|(request, _)| request["messages"].to_string().contains(said));
    about.map(|(request, key)| (request["model"].clone(), key)).collect()
}

async fn post(product: &Product, path: &str, body: &Value) -> (u16, Value) {
    let answer = product.post_to(path, body).send().await.expect("an answer");
    let status = answer.status().as_u16();
    (status, answer.json().await.expect("JSON"))
}

async fn save(product: &Product, name: &str, llm: &ScriptedLlm) {
    let llm =
        json!({"model": format!("openai/{name}"), "api_key": format!("key-of-{name}"), "base_url": llm.base_url()});
    let saved = post(product, &format!("{PROFILES}/{name}"), &json!({"llm": llm})).await;
    assert_eq!(saved.0, 201, "{}", saved.1);
}

#[tokio::test]
async fn a_start_uses_the_active_profile_or_the_profile_of_the_requests_model() {
    let (first, fast, slow) = tokio::join!(ScriptedLlm::start(), ScriptedLlm::start(), ScriptedLlm::start());
    let product = Product::start(json!({
        "llm_model": "openai/first", "llm_api_key": "key-of-first", "llm_base_url": first.base_url(),
    }))
    .await;
    // The model of the settings file has become a profile.
    let listed = product.get_from(PROFILES).await;
    assert_eq!((&listed["profiles"][0]["name"], &listed["active_profile"]), (&json!("default"), &json!("default")));
    save(&product, "fast", &fast).await;
    save(&product, "slow", &slow).await;
    let of_first = product.start_conversation(saying("Of the first")).await;
    let id = of_first.conversation_id();
    let shown = product.conversation_when(&id, "finished").await;
    assert_eq!(shown["llm_model"], "openai/first");
    let once = |name: &str| vec![(json!(name), format!("key-of-{name}"))];
    assert_eq!(heard(&first, "Of the first"), once("first"));

    // Two conversations in one sandbox, at once: one with the active profile, one with the model of another profile.
    let activated = post(&product, &format!("{PROFILES}/fast/activate"), &json!({})).await;
    assert_eq!((activated.0, &activated.1["model"]), (200, &json!("openai/fast")));
    let sandbox = json!({"sandbox_id": of_first.sandbox_id()});
    let active = product.start_conversation(with(saying("Of the active one"), sandbox.clone()));
    let named = with(with(saying("Of the named one"), sandbox.clone()), json!({"llm_model": "openai/slow"}));
    let (active, named) = tokio::join!(active, product.start_conversation(named));
    for (start, llm, name, said) in
        [(&active, &fast, "fast", "Of the active one"), (&named, &slow, "slow", "Of the named one")]
    {
        let shown = product.conversation_when(&start.conversation_id(), "finished").await;
        assert_eq!(shown["llm_model"], format!("openai/{name}"));
        assert_eq!(heard(llm, said), once(name));
    }
    for (llm, said) in [
        (&first, "Of the active one"),
        (&first, "Of the named one"),
        (&fast, "Of the named one"),
        (&slow, "Of the active one"),
    ] {
        assert_eq!(heard(llm, said), [], "{said}");
    }

    // A running conversation is switched; the others are not.
    let switched =
        post(&product, &format!("/api/v1/app-conversations/{id}/switch_profile"), &json!({"profile_name": "slow"}))
            .await;
    if !is_from(21) {
        assert_eq!(switched, (502, json!({"detail": "Agent server error: 404"})));
        product.shutdown().await;
        return;
    }
    assert_eq!(switched, (200, json!({"success": true})));
    assert_eq!(product.conversation(&id).await["llm_model"], "openai/slow");
    let agent = product.at_agent(&id).await;
    agent.send_message("After the switch").await;
    wait_until("the message reached the other model", LIMIT, async || !heard(&slow, "After the switch").is_empty())
        .await;
    product.conversation_when(&id, "finished").await;
    assert_eq!(heard(&slow, "After the switch"), once("slow"));
    assert_eq!(heard(&first, "After the switch"), []);
    // Both usages count, and the model stays the one that was chosen.
    let titles = u64::try_from(first.title_requests().len()).expect("a number");
    let tokens =
        async || product.conversation(&id).await["metrics"]["accumulated_token_usage"]["prompt_tokens"].as_u64();
    let both = (2 + titles) * PROMPT_TOKENS;
    wait_until("both models are counted", LIMIT, async || tokens().await == Some(both)).await;
    assert_eq!(product.conversation(&id).await["llm_model"], "openai/slow");
    // Back to a profile whose key has changed since.
    let changed = json!({"llm": {"model": "openai/first", "api_key": "key-of-first-2", "base_url": first.base_url()}});
    assert_eq!(post(&product, &format!("{PROFILES}/default"), &changed).await.0, 201);
    for _ in 0..2 {
        let back = post(
            &product,
            &format!("/api/v1/app-conversations/{id}/switch_profile"),
            &json!({"profile_name": "default"}),
        )
        .await;
        assert_eq!(back.0, 200, "{}", back.1);
    }
    agent.send_message("Back again").await;
    wait_until("the message reached the first model", LIMIT, async || !heard(&first, "Back again").is_empty()).await;
    assert_eq!(heard(&first, "Back again"), [(json!("first"), "key-of-first-2".to_owned())]);
    let acp = post(&product, &format!("/api/v1/app-conversations/{id}/switch_acp_model"), &json!({"model": "m"})).await;
    if is_from(34) {
        assert_eq!(acp, (400, json!({"detail": "Agent server error: 400"})));
    }
    // The other conversation still uses its own.
    product.at_agent(&active.conversation_id()).await.send_message("Still the same").await;
    wait_until("the message reached the active profile's model", LIMIT, async || {
        !heard(&fast, "Still the same").is_empty()
    })
    .await;
    assert_eq!(heard(&fast, "Still the same"), once("fast"));
    product.shutdown().await;
}
