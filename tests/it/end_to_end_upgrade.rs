//! Sandboxes made with older versions of the agent server, resumed with newer ones.
//!
//! Needs installs of three versions, so it runs on request only: `tests/agent-server-versions.sh`.

use std::time::Duration;

use serde_json::json;
use shared::sandbox::spec::{AGENT_SERVER_VERSION, published_image};

use crate::support::product::{Product, saying, text, with};
use crate::support::scripted_llm::{Reply, ScriptedLlm};
use crate::support::wait::wait_until;

/// An agent server boots within minutes on a machine that it shares with other tests.
const BOOT_LIMIT: Duration = Duration::from_secs(180);
const SECRET: &str = "secret-value-5b1e";
/// The secret of the request that starts a conversation: only the agent server keeps it.
const REQUEST_SECRET: &str = "request-secret-value-93ac";

/// A conversation, and the version of the agent server that created it.
struct Created {
    version: String,
    id: String,
}

#[tokio::test]
#[ignore = "installs agent servers 1.15.0 and 1.49.1: tests/agent-server-versions.sh runs it"]
async fn conversations_of_older_agent_servers_continue_after_an_upgrade() {
    let llm = ScriptedLlm::start().await;
    let settings = json!({
        "llm_model": "openai/scripted",
        "llm_api_key": "key-of-the-model",
        "llm_base_url": llm.base_url(),
        "custom_secrets": {"DEPLOY_KEY": {"secret": SECRET}},
    });
    let mut product = Product::start_with_agent_server("1.15.0", settings).await;
    let first = create(&product, &llm, "1.15.0", None).await;
    let sandbox = text(&product.conversation(&first.id).await["sandbox_id"]);
    let mut conversations = vec![first];
    for version in ["1.49.1", AGENT_SERVER_VERSION] {
        let before = spec_id(&product, &sandbox).await;
        pause(&product, &sandbox).await;
        product.restart_with_agent_server(version).await;
        assert_eq!(spec_id(&product, &sandbox).await, before, "nothing has been launched yet");
        resume(&product, &sandbox).await;
        assert_eq!(spec_id(&product, &sandbox).await, published_image(version));
        for conversation in &conversations {
            continues(&product, &llm, conversation, version).await;
        }
        conversations.push(create(&product, &llm, version, Some(&sandbox)).await);
    }
    product.shutdown().await;
}

async fn spec_id(product: &Product, sandbox: &str) -> String {
    let shown = product.get_from(&format!("/api/v1/sandboxes?id={sandbox}")).await;
    text(&shown[0]["sandbox_spec_id"])
}

async fn pause(product: &Product, sandbox: &str) {
    let path = format!("/api/v1/sandboxes/{sandbox}/pause");
    let answer = product.post_to(&path, &json!({})).send().await.expect("an answer");
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap_or_default());
}

async fn resume(product: &Product, sandbox: &str) {
    let path = format!("/api/v1/sandboxes/{sandbox}/resume");
    let answer = product.post_to(&path, &json!({})).send().await.expect("an answer");
    assert!(answer.status().is_success(), "{}", answer.text().await.unwrap_or_default());
    wait_until("the sandbox runs", BOOT_LIMIT, async || {
        product.get_from(&format!("/api/v1/sandboxes?id={sandbox}")).await[0]["status"] == "RUNNING"
    })
    .await;
}

/// The command prints both secrets reversed, because agent servers mask them in what their commands print.
fn read_secrets(file: &str) -> Reply {
    let command = format!("printf %s \"$DEPLOY_KEY $REQUEST_KEY\" | rev > {file}");
    Reply::tool_call("terminal", json!({"command": command}))
}

async fn secrets_were_read(product: &Product, id: &str, file: &str) {
    let seen = std::fs::read_to_string(product.at_agent(id).await.folder().await.join(file));
    let expected: String = format!("{SECRET} {REQUEST_SECRET}").chars().rev().collect();
    assert_eq!(seen.expect("the command has run"), expected);
}

async fn create(product: &Product, llm: &ScriptedLlm, version: &str, sandbox: Option<&str>) -> Created {
    let file = format!("created-{version}.txt");
    llm.reply_with(vec![read_secrets(&file), Reply::text("Created")]);
    let more = json!({"sandbox_id": sandbox, "secrets": {"REQUEST_KEY": REQUEST_SECRET}});
    let start = product.start_conversation(with(saying(&format!("Created by {version}")), more)).await;
    let id = start.conversation_id();
    product.conversation_when(&id, "finished").await;
    assert_eq!(product.at_agent(&id).await.server_version().await, version);
    secrets_were_read(product, &id, &file).await;
    Created { version: version.to_owned(), id }
}

/// Its history exists, a new message gets a reply, secrets are readable, and the new events reach our store.
async fn continues(product: &Product, llm: &ScriptedLlm, conversation: &Created, version: &str) {
    let Created { version: created_by, id } = conversation;
    let agent = product.at_agent(id).await;
    assert_eq!(agent.server_version().await, version);
    assert_eq!(agent.said_by("user").await[0], format!("Created by {created_by}"));
    let (file, answer) = (format!("{created_by}-with-{version}.txt"), format!("Continued by {version}"));
    llm.reply_with(vec![read_secrets(&file), Reply::text(&answer)]);
    let message = json!({"role": "user", "content": [{"type": "text", "text": "Continue"}]});
    let sent = product.post(&format!("/{id}/send-message"), &message).send().await.expect("an answer");
    assert!(sent.status().is_success(), "{}", sent.text().await.unwrap_or_default());
    wait_until("the message is answered", BOOT_LIMIT, async || agent.said_by("agent").await.contains(&answer)).await;
    product.conversation_when(id, "finished").await;
    secrets_were_read(product, id, &file).await;
    wait_until("the answer is stored", BOOT_LIMIT, async || {
        product.events_of(id).await.iter().any(|event| event.json.contains(&answer))
    })
    .await;
}
