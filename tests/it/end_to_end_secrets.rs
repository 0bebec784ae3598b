//! Secrets in the terminal of a real agent server's agent: a secret whose name is no valid variable name does not
//! affect the others.

use serde_json::json;

use crate::support::product::{Product, saying, text, with};
use crate::support::scripted_llm::{Reply, ScriptedLlm};

/// Stored names from before names were validated.
const UNUSABLE: [&str; 7] = ["1ST", "HISTCMD", "MY-X", "PATH", "SHELLOPTS", "UID", "with space"];

#[tokio::test]
async fn secrets_with_invalid_variable_names_do_not_affect_others() {
    let llm = ScriptedLlm::start().await;
    let mut secrets = json!({
        "FIRST_KEY": {"secret": "the-first-value"},
        "LAST_KEY": {"secret": "the 'last'\n\"value\" \\ with $HOME and `id`"},
        "TYPED": {"secret": "mangled\u{1a}"},
        "TOO_LONG": {"secret": "x".repeat(20_000)},
    });
    for name in UNUSABLE {
        secrets[name] = json!({"secret": "unusable"});
    }
    let product = Product::start(json!({
        "llm_model": "openai/scripted",
        "llm_api_key": "key-of-the-model",
        "llm_base_url": llm.base_url(),
        "custom_secrets": secrets,
    }))
    .await;
    let command = format!(
        "printf '%s|%s|%s' \"$FIRST_KEY\" \"$LAST_KEY\" \"$OF_START\" | base64 -w0 > seen.txt; : TYPED TOO_LONG {}",
        UNUSABLE.map(|name| format!("'{name}'")).join(" ")
    );
    llm.reply_with(vec![Reply::tool_call("terminal", json!({"command": command})), Reply::text("Done")]);
    let start = product.start_conversation(with(saying("Go"), json!({"secrets": {"OF_START": "of-the-start"}}))).await;
    let id = start.conversation_id();
    product.conversation_when(&id, "finished").await;

    let folder = product.at_agent(&id).await.folder().await;
    let decoded = std::process::Command::new("base64").arg("-d").arg(folder.join("seen.txt")).output().expect("it ran");
    let seen = String::from_utf8(decoded.stdout).expect("text");
    let expected = "the-first-value|the 'last'\n\"value\" \\ with $HOME and `id`|of-the-start";
    if crate::support::product::is_from(49) {
        assert_eq!(seen, expected);
    } else {
        // Older versions expand what is in double quotes.
        assert!(seen.starts_with("the-first-value|the 'last'") && seen.ends_with("|of-the-start"), "{seen}");
    }
    let detail = start.detail();
    for name in UNUSABLE.into_iter().chain(["TYPED", "TOO_LONG"]) {
        assert!(detail.contains(&format!("\"{name}\"")), "no {name} in {detail}");
    }
    assert!(!detail.contains("FIRST_KEY") && !detail.contains("unusable"), "{detail}");
    assert_eq!(text(&start.task["status"]), "READY");
    product.shutdown().await;
}
