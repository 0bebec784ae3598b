//! Requests right after a 500 of a real agent server, which closes the connection a moment later without announcing it.

use serde_json::{Value, json};

use crate::support::product::{Product, saying, text};
use crate::support::scripted_llm::{Reply, ScriptedLlm};

const ROUNDS: usize = 3;

#[tokio::test]
async fn request_after_a_500_of_the_agent_server_arrives_exactly_once() {
    let llm = ScriptedLlm::start().await;
    let product = Product::start(json!({
        "llm_model": "openai/scripted",
        "llm_api_key": "key-of-the-model",
        "llm_base_url": llm.base_url(),
    }))
    .await;
    llm.reply_with(vec![Reply::text("Hello")]);
    let start = product.start_conversation(saying("Begin")).await;
    let id = start.conversation_id();
    product.conversation_when(&id, "finished").await;
    let agent = product.at_agent(&id).await;
    let folder = agent.folder().await;
    // No file system allows such a long name, and no version of the agent server expects the resulting exception: it
    // responds with 500 and then closes the connection, unlike for errors that it expects.
    let impossible = "x".repeat(300);
    let failing = format!("/api/git/changes?path=/{impossible}");
    let ran = agent.run(&folder, &format!("git init -q . && ln -s {impossible} .openhands")).await;
    assert_eq!(ran.exit_code, 0, "{ran:?}");

    let row = product.conversation(&id).await;
    let (host, of_conversation) = {
        let url = text(&row["conversation_url"]);
        let (host, rest) = url.split_once("/api/").expect("an address");
        (host.to_owned(), format!("/api/{rest}"))
    };
    let pass = async |method: &str, path: &str, body: Option<Value>| {
        let headers = json!({"X-Session-API-Key": row["session_api_key"]});
        let request = json!({"host": host, "method": method, "path": path, "headers": headers, "body": body});
        let answer = product.post_to("/api/cloud-proxy", &request).send().await.expect("an answer");
        answer.status().as_u16()
    };
    let message =
        |said: &str, run: bool| json!({"role": "user", "content": [{"type": "text", "text": said}], "run": run});
    let mut expected = vec!["Begin".to_owned()];
    for round in 0..ROUNDS {
        // Through the cloud proxy.
        assert_eq!(pass("GET", &failing, None).await, 500, "the response must come from the agent server itself");
        let said = format!("passed on {round}");
        let status = pass("POST", &format!("{of_conversation}/events"), Some(message(&said, false))).await;
        assert_eq!(status, 200, "round {round}");
        expected.push(said);
        assert_eq!(pass("GET", &failing, None).await, 500);
        assert_eq!(pass("GET", &format!("{of_conversation}/events/count"), None).await, 200, "round {round}");
        // Through routes of the product: the agent server looks for the hooks below the link.
        let hooks_fail = async || {
            let answer = product.answer_to("GET", &format!("/api/v1/app-conversations/{id}/hooks"), &[], None).await;
            assert!(answer.starts_with("502 ") && answer.contains("returned status 500"), "{answer}");
        };
        hooks_fail().await;
        let said = format!("sent {round}");
        let sent = product.post(&format!("/{id}/send-message"), &message(&said, false)).send().await;
        assert_eq!(sent.expect("an answer").status(), 200, "round {round}");
        expected.push(said);
        for path in ["git/changes?path=/workspace/project", "file?file_path=.git/HEAD"] {
            hooks_fail().await;
            let path = format!("/api/v1/app-conversations/{id}/{path}");
            let answer = product.answer_to("GET", &path, &[], None).await;
            assert!(answer.starts_with("200 "), "round {round}: {path}: {answer}");
        }
    }
    assert_eq!(agent.said_by("user").await, expected);
    product.shutdown().await;
}
