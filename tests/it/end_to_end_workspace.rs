//! The workspace of a sandbox over the API, on a real agent server: messages sent before the conversation existed,
//! skills of all sources, hooks, files, git and messages, in a grouped sandbox that is then paused, resumed and
//! deleted. Where versions of the agent server differ, the test has both responses.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use shared::user::UserId;

use crate::support::git_server::GitServer;
use crate::support::product::{AgentConversation, Product, is_from, saying, text, with};
use crate::support::scripted_llm::{Reply, ScriptedLlm};
use crate::support::wait::wait_until;

const AGENT_SKILL: &str = "---\nname: from-agents\ndescription: A skill of the repository.\n---\nThe skill's body.\n";
const MICROAGENT: &str = "---\nname: from-microagents\ntriggers:\n- bridge\n- tunnel\n---\nThe microagent's body.\n";
const HOOKS: &str = r#"{"PreToolUse": [{"matcher": "terminal", "hooks": [{"type": "command", "command": "true", "timeout": 5, "async": true}]}]}"#;

#[tokio::test]
async fn workspace_is_readable_until_its_sandbox_is_paused_or_deleted() {
    let llm = ScriptedLlm::start().await;
    let git = GitServer::start().await;
    let files = [
        ("README.md", "Read me\n", false),
        ("AGENTS.md", "Rules of the repository\n", false),
        (".agents/skills/from-agents/SKILL.md", AGENT_SKILL, false),
        (".openhands/microagents/from-microagents.md", MICROAGENT, false),
        (".openhands/hooks.json", HOOKS, false),
    ];
    git.create_repository("owner/project", &files, &[]).await;
    let product = Product::start(json!({
        "llm_model": "openai/scripted",
        "llm_api_key": "key-of-the-model",
        "llm_base_url": llm.base_url(),
        "sandbox_grouping_strategy": "ADD_TO_ANY",
        "disabled_skills": ["from-microagents"],
        "provider_tokens": {"github": {"token": null, "host": git.url()}},
    }))
    .await;
    llm.reply_with(vec![Reply::text("Hello")]);
    let request = with(saying("Look around"), json!({"selected_repository": "owner/project"}));
    let answer = product.post("", &request).send().await.expect("an answer");
    let task: Value = answer.json().await.expect("a task");
    assert_eq!(task["status"], "WORKING", "{task:#}");
    // Messages that are sent before the conversation exists.
    for (position, said) in ["One more thing", "And another"].iter().enumerate() {
        let message = json!({"content": [{"type": "text", "text": said}]});
        let to = format!("/api/v1/conversations/task-{}/pending-messages", text(&task["id"]));
        let answer = product.post_to(&to, &message).send().await.expect("an answer");
        assert_eq!(answer.status(), 201);
        let kept: Value = answer.json().await.expect("JSON");
        assert_eq!((&kept["queued"], &kept["position"]), (&json!(true), &json!(position + 1)), "{kept}");
    }
    let start = product.follow(&text(&task["id"])).await;
    let id = start.conversation_id();
    let agent = product.at_agent(&id).await;
    let first = ["Look around", "One more thing", "And another"];
    wait_until("the messages arrive", Duration::from_secs(180), async || agent.said_by("user").await == first).await;
    product.conversation_when(&id, "finished").await;
    let folder = agent.folder().await;
    let user_skill = "mkdir -p ~/.agents/skills/of-the-user && printf -- '---\\nname: of-the-user\\ndescription: Mine.\\n---\\nMy body.\\n' > ~/.agents/skills/of-the-user/SKILL.md";
    let work = "echo more >> README.md && mkdir -p src .agents_tmp && echo 'fn main() {}' > src/main.rs && printf '# Plan' > .agents_tmp/PLAN.md && ln -s /etc/hostname way-out";
    for command in [user_skill, work] {
        let ran = agent.run(&folder, command).await;
        assert_eq!(ran.exit_code, 0, "{ran:?}");
    }

    let skills = product.get(&format!("/{id}/skills")).await;
    let skill = |name: &str| {
        let skills = skills["skills"].as_array().expect("skills");
        skills.iter().find(|skill| skill["name"] == name).unwrap_or_else(|| panic!("no {name} in {skills:#?}")).clone()
    };
    assert_eq!(skill("agents")["type"], "repo");
    assert_eq!(text(&skill("agents")["content"]).trim(), "Rules of the repository");
    assert_eq!((&skill("from-agents")["type"], &skill("from-agents")["triggers"]), (&json!("agentskills"), &json!([])));
    let microagent = skill("from-microagents");
    assert_eq!((&microagent["type"], &microagent["triggers"]), (&json!("knowledge"), &json!(["bridge", "tunnel"])));
    assert!(text(&skill("of-the-user")["content"]).contains("My body."));
    // The list has all skills; the model gets those that the user has not disabled and that existed when the
    // conversation started.
    let asked = json!(llm.requests()).to_string();
    for (words, is_sent) in
        [("Rules of the repository", true), ("from-agents", true), ("from-microagents", false), ("of-the-user", false)]
    {
        assert_eq!(asked.contains(words), is_sent, "{words} in {asked}");
    }

    assert_eq!(
        product.get(&format!("/{id}/hooks")).await,
        json!({"hooks": [{"event_type": "pre_tool_use", "matchers": [{"matcher": "terminal", "hooks": [
            {"type": "command", "command": "true", "timeout": 5, "async": true},
        ]}]}]})
    );

    assert_eq!(product.get(&format!("/{id}/file")).await, "# Plan", "the conversation's own plan, in its own folder");
    let at = |path: &str| folder.join(path).display().to_string();
    assert_eq!(product.get(&format!("/{id}/file?file_path={}", at("src/main.rs"))).await, "fn main() {}\n");
    for outside in [at("way-out"), "/etc/hostname".to_owned()] {
        assert_eq!(product.get(&format!("/{id}/file?file_path={outside}")).await, "", "{outside}");
    }
    let files = product.get(&format!("/{id}/files")).await;
    for name in ["README.md", "src/main.rs", "way-out", ".openhands/hooks.json"] {
        assert!(files.as_array().expect("names").contains(&json!(name)), "no {name} in {files}");
    }

    let changes = product.get(&format!("/{id}/git/changes?path={}", folder.display())).await;
    let change = |path: &str| {
        let changes = changes.as_array().expect("changes");
        changes
            .iter()
            .find(|change| change["path"] == path)
            .unwrap_or_else(|| panic!("no {path} in {changes:?}"))
            .clone()
    };
    assert_eq!(change("README.md")["status"], "UPDATED");
    assert_eq!(change("src/main.rs")["status"], "ADDED");
    let diff = product.get(&format!("/{id}/git/diff?path={}", at("README.md"))).await;
    assert!(text(&diff["original"]).starts_with("Read me") && !text(&diff["original"]).contains("more"), "{diff}");
    assert!(text(&diff["modified"]).contains("more"), "{diff}");
    git_routes_handle_missing_repositories_and_refs(&product, &id, &folder).await;
    commits_are_listed_through_the_cloud_proxy(&product, &id, &agent, &folder).await;

    llm.reply_with(vec![Reply::text("Welcome back")]);
    let message = json!({"role": "user", "content": [{"type": "text", "text": "Are you there?"}]});
    let sent = post(&product, &id, &message).await;
    assert_eq!(sent, (200, json!({"success": true, "sandbox_status": "RUNNING", "message": null})));
    wait_until("the agent answers", Duration::from_secs(180), async || {
        agent.said_by("agent").await.contains(&"Welcome back".to_owned())
    })
    .await;
    assert_eq!(agent.said_by("user").await, first.into_iter().chain(["Are you there?"]).collect::<Vec<_>>());

    // While the sandbox is paused, no request reaches the agent server, and every caller gets the same response.
    let sandbox = start.sandbox_id();
    let change = async |what: &str| {
        let answer = product.post_to(&format!("/api/v1/sandboxes/{sandbox}/{what}"), &json!({})).send().await;
        let answer: Value = answer.expect("an answer").json().await.expect("JSON");
        assert_eq!(answer, json!({"success": true}), "{what}");
    };
    change("pause").await;
    let shown = product.get_from(&format!("/api/v1/sandboxes?id={sandbox}")).await;
    assert_eq!((&shown[0]["status"], &shown[0]["session_api_key"]), (&json!("PAUSED"), &Value::Null), "{shown}");
    assert_eq!(product.get(&format!("/{id}/skills")).await, json!({"skills": []}));
    assert_eq!(product.get(&format!("/{id}/hooks")).await, json!({"hooks": []}));
    assert_eq!(product.get(&format!("/{id}/file")).await, "");
    let (status, answer) = post(&product, &id, &message).await;
    assert_eq!(status, 409, "{answer}");
    assert!(text(&answer["detail"]).contains(&format!("/sandboxes/{sandbox}/resume")), "{answer}");

    change("resume").await;
    wait_until("the sandbox runs again", Duration::from_secs(180), async || {
        product.conversation(&id).await["sandbox_status"] == "RUNNING"
    })
    .await;
    assert_eq!(product.get(&format!("/{id}/file")).await, "# Plan", "its files are still there");

    let user = UserId::local();
    assert!(product.reconciler().delete(&user, &sandbox).await.expect("deleted"));
    let (status, answer) = post(&product, &id, &message).await;
    assert_eq!(status, 404, "{answer}");
    assert!(text(&answer["detail"]).starts_with("Sandbox not found for conversation"), "{answer}");
    assert_eq!(product.get(&format!("/{id}/file")).await, "");
    product.shutdown().await;
}

/// A folder outside of the repository, and a reference that does not exist.
async fn git_routes_handle_missing_repositories_and_refs(product: &Product, id: &str, folder: &Path) {
    let ask = async |route: &str| {
        let answer = product.answer_to("GET", &format!("/api/v1/app-conversations/{id}/git/{route}"), &[], None).await;
        let (status, _) = answer.split_once(' ').expect("a status");
        (status.parse::<u16>().expect("a status"), answer)
    };
    let beside = folder.parent().expect("the conversation's own folder").parent().expect("the workspace").display();
    let (status, answer) = ask(&format!("changes?path={beside}")).await;
    assert!(status == 200 && answer.ends_with("[]"), "{answer}");
    let (status, answer) = ask(&format!("changes?path={}&ref=no-such-branch", folder.display())).await;
    assert!(status == 400 && answer.contains("is not a commit of this repository"), "{answer}");
}

/// Web pages request them with the workspace path that they know.
async fn commits_are_listed_through_the_cloud_proxy(
    product: &Product,
    id: &str,
    agent: &AgentConversation,
    folder: &Path,
) {
    let commit = "git add README.md src && git -c user.name=Ada -c user.email=ada@example.com commit -qm 'Add the main function'";
    let ran = agent.run(folder, commit).await;
    assert_eq!(ran.exit_code, 0, "{ran:?}");
    let row = product.conversation(id).await;
    let url = text(&row["conversation_url"]);
    let host = url.split("/api/").next().expect("a host").to_owned();
    let pass = async |path: &str| {
        let headers = json!({"X-Session-API-Key": row["session_api_key"]});
        let request = json!({"host": host, "method": "GET", "path": path, "headers": headers});
        let answer = product.post_to("/api/cloud-proxy", &request).send().await.expect("an answer");
        (answer.status().as_u16(), answer.json::<Value>().await.expect("JSON"))
    };
    let real = folder.display().to_string();
    let known = real.rsplit_once("/workspace/project/").expect("in the workspace").1;
    let known = format!("%2Fworkspace%2Fproject%2F{}", known.replace('/', "%2F"));
    for path in [&known, &real] {
        let (status, page) = pass(&format!("/api/git/commits?path={path}&limit=50")).await;
        if !is_from(49) {
            assert_eq!((status, page), (404, json!({"detail": "Not Found"})), "this version does not list commits");
            continue;
        }
        assert_eq!((status, &page["has_more"]), (200, &json!(false)), "{page}");
        let newest = &page["commits"][0];
        assert_eq!((&newest["subject"], &newest["author"]), (&json!("Add the main function"), &json!("Ada")), "{page}");
        let sha = text(&newest["sha"]);
        assert!(sha.starts_with(&text(&newest["short_sha"])), "{page}");
        assert_eq!(page["commits"].as_array().map(Vec::len), Some(2), "including the repository's own commit: {page}");
        let (status, changes) = pass(&format!("/api/git/commits/{sha}/changes?path={path}")).await;
        assert_eq!(status, 200, "{changes}");
        assert_eq!(
            changes,
            json!([{"status": "UPDATED", "path": "README.md"}, {"status": "ADDED", "path": "src/main.rs"}])
        );
        let (status, diff) = pass(&format!("/api/git/diff?path={path}%2FREADME.md&commit={sha}")).await;
        assert_eq!(status, 200, "{diff}");
        assert!(text(&diff["modified"]).contains("more") && !text(&diff["original"]).contains("more"), "{diff}");
        let (status, refused) = pass(&format!("/api/git/commits/{}/changes?path={path}", "0".repeat(40))).await;
        assert_eq!(status, 400, "the response is forwarded: {refused}");
    }
    // A committed change is still a change of the conversation, compared with where its branch started.
    let changes = product.get(&format!("/{id}/git/changes?path={real}")).await;
    assert!(changes.to_string().contains("src/main.rs"), "{changes}");
}

async fn post(product: &Product, id: &str, message: &Value) -> (u16, Value) {
    let answer = product.post(&format!("/{id}/send-message"), message).send().await.expect("an answer");
    (answer.status().as_u16(), answer.json().await.expect("JSON"))
}
