//! The whole product on real agent servers: what a user sees from the first request to the agent's reply. The language
//! model and the git host are scripted.
//!
//! Agent servers are expensive, so each test checks many things in few sandboxes.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use shared::sandbox::SandboxService as _;
use shared::user::UserId;
use uuid::Uuid;

use crate::support::git_server::GitServer;
use crate::support::product::{
    AgentConversation, Product, STATUSES, contains, content_text, is_from, logged, saying, text, with,
};
use crate::support::scripted_llm::{COMPLETION_TOKENS, DEFAULT_TITLE, PROMPT_TOKENS, Reply, ScriptedLlm};
use crate::support::wait::wait_until;

/// The SDK retries a model that does not respond for about two minutes.
const DEAD_MODEL_LIMIT: Duration = Duration::from_secs(200);
/// Agent servers send their webhooks within seconds, but the machine may be busy with other tests.
const REPORT_LIMIT: Duration = Duration::from_secs(180);
const TOKEN: &str = "token-that-must-stay-secret-7f3a";

fn settings(model_url: &str) -> Value {
    json!({
        "llm_model": "openai/scripted",
        "llm_api_key": "key-of-the-model",
        "llm_base_url": model_url,
        "git_user_name": "O'Hara \"the user\" $HOME",
        "git_user_email": "user@example.com",
    })
}

fn hex(id: &str) -> String {
    Uuid::parse_str(id).expect("an id").simple().to_string()
}

/// The model's requests of the conversation with this message.
fn requests_with(llm: &ScriptedLlm, said: &str) -> Vec<Value> {
    let about = |request: &Value| {
        let messages = request["messages"].as_array().into_iter().flatten();
        messages
            .filter(|message| message["role"] == "user")
            .any(|message| content_text(&message["content"]).contains(said))
    };
    llm.requests().into_iter().filter(about).collect()
}

#[track_caller]
fn request_with(llm: &ScriptedLlm, said: &str) -> Value {
    requests_with(llm, said).pop().unwrap_or_else(|| panic!("no request to the model contains `{said}`"))
}

fn system_prompt(request: &Value) -> String {
    content_text(&request["messages"][0]["content"])
}

fn tools(conversation: &Value) -> Vec<String> {
    let tools = conversation["agent"]["tools"].as_array().expect("tools");
    tools.iter().map(|tool| text(&tool["name"])).collect()
}

fn ids(page: &Value) -> Vec<String> {
    page["items"].as_array().expect("items").iter().map(|item| text(&item["id"])).collect()
}

#[track_caller]
fn assert_in_order(seen: &[String]) {
    let places: Vec<Option<usize>> =
        seen.iter().map(|status| STATUSES.iter().position(|known| known == status)).collect();
    assert!(places.iter().all(Option::is_some), "unknown statuses: {seen:?}");
    assert!(places.is_sorted_by(|one, next| one < next), "statuses are out of order: {seen:?}");
}

/// Without a model or any other setting, a demo conversation runs to its reply, which says that it is a demo.
#[tokio::test]
async fn a_demo_needs_no_model() {
    let product = Product::demo().await;
    product.show_demo().await.expect("the demo runs to its end");
    let id = ids(&product.get("/search").await).pop().expect("a conversation");
    let conversation = product.conversation_when(&id, "finished").await;
    assert_eq!(conversation["llm_model"], "openai/scripted-demo", "{conversation:#}");
    let agent = product.at_agent(&id).await;
    let said = agent.said_by("agent").await;
    assert!(said.len() == 1 && said[0].contains("a script wrote this answer"), "{said:?}");
    let written = product.get(&format!("/{id}/file?file_path=/workspace/project/hello.txt")).await;
    assert_eq!(written, "Written by an agent that follows a script.\n");
    // Real conversations would use another folder.
    assert!(product.data().join("demo/sandboxes").is_dir() && !product.data().join("sandboxes").exists());
    product.shutdown().await;
}

// One sandbox, from its first conversation to the next run of the program.

#[tokio::test]
async fn conversations_share_a_sandbox_and_survive_a_restart() {
    let llm = ScriptedLlm::start().await;
    let git = GitServer::start().await;
    git.create_repository("owner/project", &[("README.md", "Read me\n", false)], &[]).await;
    let mut product = Product::start(with(
        settings(&llm.base_url()),
        json!({
            "provider_tokens": {"github": {"token": null, "host": git.url()}},
            "custom_secrets": {"DEPLOY_KEY": {"secret": "the-secret-value", "description": "for the deployment"}},
        }),
    ))
    .await;

    let first = a_first_message_is_answered(&product, &llm).await;
    let sandbox = text(&product.conversation(&first).await["sandbox_id"]);
    fields_of_the_request_are_kept(&product, &llm, &sandbox).await;
    secrets_reach_only_the_agent(&product, &llm, &sandbox).await;
    a_planning_sub_conversation_shares_its_parents_workspace(&product, &llm, &sandbox).await;
    a_suggested_task_is_explained_to_the_agent(&product, &llm, &sandbox).await;
    a_stream_sends_every_status_once(&product, &sandbox).await;
    a_start_continues_after_the_client_of_its_stream_disconnects(&product, &sandbox).await;
    an_unknown_sandbox_is_named_in_the_error(&product).await;
    a_model_error_ends_the_conversation_with_its_message(&product, &llm, &sandbox).await;
    configuration_errors_are_reported_where_they_occur(&product, &sandbox).await;
    a_start_resumes_its_paused_sandbox(&product, &llm, &sandbox).await;

    product.restart().await;
    let after = product.conversation(&first).await;
    assert_eq!(after["sandbox_status"], "PAUSED", "a stopped sandbox can be resumed: {after:#}");
    let start = product.start_conversation(with(saying("Still there?"), json!({"sandbox_id": sandbox}))).await;
    assert_eq!(start.sandbox_id(), sandbox);
    product.conversation_when(&start.conversation_id(), "finished").await;
    let old = product.at_agent(&first).await;
    assert!(
        old.said_by("agent").await.contains(&"Hello from the model".to_owned()),
        "old conversations are still there"
    );
    product.shutdown().await;
}

async fn a_first_message_is_answered(product: &Product, llm: &ScriptedLlm) -> String {
    llm.reply_with(vec![Reply::text("Hello from the model")]);
    let start = product.start_conversation(saying("Say hello")).await;
    let id = start.conversation_id();
    assert_in_order(&start.statuses);
    assert!(start.statuses.contains(&"WAITING_FOR_SANDBOX".to_owned()), "{:?}", start.statuses);

    let shown = product.conversation_when(&id, "finished").await;
    assert_eq!(shown["sandbox_status"], "RUNNING", "{shown:#}");
    assert_eq!(shown["sandbox_id"], start.sandbox_id(), "{shown:#}");
    assert_eq!(shown["llm_model"], "openai/scripted", "{shown:#}");
    let default_title = format!("Conversation {}", &hex(&id)[..5]);
    assert!(shown["title"] == default_title.as_str() || shown["title"] == DEFAULT_TITLE, "{shown:#}");
    assert_eq!(shown["sub_conversation_ids"], json!([]), "{shown:#}");
    let found = product.get("/search").await;
    assert_eq!(ids(&found), std::slice::from_ref(&id), "{found:#}");

    let agent = product.at_agent(&id).await;
    let info = agent.info().await;
    assert_eq!(hex(&text(&info["id"])), hex(&id), "{info:#}");
    assert_eq!(agent.said_by("user").await, ["Say hello"]);
    assert_eq!(agent.said_by("agent").await, ["Hello from the model"]);
    assert_eq!(requests_with(llm, "Say hello").len(), 1, "the message is sent once");
    assert!(agent.folder().await.join(".git").is_dir(), "an empty workspace is a git repository");

    wait_until("the events arrive in the store", REPORT_LIMIT, async || {
        let kinds: Vec<String> = product.events_of(&id).await.into_iter().map(|event| event.kind).collect();
        kinds.iter().filter(|kind| *kind == "MessageEvent").count() == 2
    })
    .await;

    events_title_and_metrics_are_recorded(product, &id).await;

    // If there is a browser the agent has its tool; otherwise `detail` says so.
    let browser = tools(&info).contains(&"browser_tool_set".to_owned());
    assert_eq!(start.detail().contains("Chromium"), !browser, "tools {:?}, detail {:?}", tools(&info), start.detail());
    id
}

/// The event log, the title that the agent generated, and its metrics.
async fn events_title_and_metrics_are_recorded(product: &Product, id: &str) {
    let log = product.get_from(&format!("/api/v1/conversation/{id}/events/search?kind__eq=MessageEvent")).await;
    let said: Vec<&Value> = log["items"].as_array().expect("items").iter().map(|event| &event["source"]).collect();
    assert_eq!(said, ["user", "agent"], "{log:#}");
    let count = product.get_from(&format!("/api/v1/conversation/{id}/events/count")).await;
    assert_eq!(count, product.events_of(id).await.len());
    wait_until("the conversation has the agent's title", REPORT_LIMIT, async || {
        product.conversation(id).await["title"] == DEFAULT_TITLE
    })
    .await;
    wait_until("the metrics are recorded", REPORT_LIMIT, async || {
        let usage = product.conversation(id).await["metrics"]["accumulated_token_usage"].clone();
        // The title request uses as many tokens as the reply, and may come later.
        [1, 2].iter().any(|times| {
            usage["prompt_tokens"] == times * PROMPT_TOKENS && usage["completion_tokens"] == times * COMPLETION_TOKENS
        })
    })
    .await;
}

async fn fields_of_the_request_are_kept(product: &Product, llm: &ScriptedLlm, sandbox: &str) {
    let wished = Uuid::new_v4();
    let request = with(
        saying("Keep all this"),
        json!({
            "sandbox_id": sandbox,
            "conversation_id": wished,
            "title": "My own title",
            "public": true,
            "trigger": "gui",
            "pr_number": [7, 8],
            "llm_model": "openai/another",
            "system_message_suffix": "Always answer in rhymes.",
        }),
    );
    let start = product.start_conversation(request.clone()).await;
    assert_eq!(hex(&start.conversation_id()), wished.simple().to_string());
    assert_eq!(start.sandbox_id(), sandbox);
    let shown = product.conversation_when(&start.conversation_id(), "finished").await;
    for (field, value) in [
        ("title", json!("My own title")),
        ("public", json!(true)),
        ("trigger", json!("gui")),
        ("pr_number", json!([7, 8])),
        ("llm_model", json!("openai/another")),
    ] {
        assert_eq!(shown[field], value, "{field}: {shown:#}");
    }
    let asked = request_with(llm, "Keep all this");
    assert_eq!(asked["model"], "another");
    assert!(system_prompt(&asked).contains("Always answer in rhymes."), "{}", system_prompt(&asked));

    // The same request again, also without the sandbox's id: the conversation is found, and its message is not sent
    // twice.
    for sandbox in [json!(sandbox), Value::Null] {
        let again = product.start_conversation(with(request.clone(), json!({"sandbox_id": sandbox}))).await;
        assert_eq!(again.conversation_id(), start.conversation_id());
        assert_eq!(again.sandbox_id(), start.sandbox_id());
    }
    let agent = product.at_agent(&start.conversation_id()).await;
    assert_eq!(agent.said_by("user").await, ["Keep all this"]);
    assert_eq!(requests_with(llm, "Keep all this").len(), 1);
    let unchanged = product.conversation(&start.conversation_id()).await;
    assert_eq!(unchanged["created_at"], shown["created_at"], "{unchanged:#}");
}

async fn secrets_reach_only_the_agent(product: &Product, llm: &ScriptedLlm, sandbox: &str) {
    llm.reply_with(vec![
        Reply::tool_call(
            "terminal",
            json!({"command": "printf %s \"$DEPLOY_KEY\" | rev > seen.txt; echo key: $DEPLOY_KEY"}),
        ),
        Reply::text("Deployed"),
    ]);
    let start = product.start_conversation(with(saying("Deploy it"), json!({"sandbox_id": sandbox}))).await;
    let id = start.conversation_id();
    product.conversation_when(&id, "finished").await;
    let agent = product.at_agent(&id).await;
    let seen = std::fs::read_to_string(agent.folder().await.join("seen.txt")).expect("the agent's command has run");
    assert_eq!(seen, "the-secret-value".chars().rev().collect::<String>());
    let info = agent.info().await;
    let secret = &info["secret_registry"]["secret_sources"]["DEPLOY_KEY"];
    assert_eq!(secret["description"], "for the deployment", "{info:#}");
    for (what, said) in [
        ("the agent server's answer", info.to_string()),
        ("the events", json!(agent.events("ObservationEvent").await).to_string()),
        ("the model", json!(requests_with(llm, "Deploy it")).to_string()),
        ("our answer", product.conversation(&id).await.to_string()),
        ("the start task", start.task.to_string()),
    ] {
        assert!(!said.contains("the-secret-value"), "{what} contains the secret: {said}");
    }
}

async fn a_planning_sub_conversation_shares_its_parents_workspace(product: &Product, llm: &ScriptedLlm, sandbox: &str) {
    let parent = product
        .start_conversation(with(
            saying("Build a bridge"),
            json!({"sandbox_id": sandbox, "selected_repository": "owner/project", "llm_model": "openai/builder"}),
        ))
        .await;
    let parent_id = parent.conversation_id();
    let parent_folder = product.at_agent(&parent_id).await.folder().await;
    assert!(parent_folder.ends_with("project/project"), "{}", parent_folder.display());
    let branch = branch_of(&parent_folder);
    assert!(branch.starts_with("openhands-workspace-"), "{branch}");

    // Another repository of the same name must not be confused with this one.
    let request = json!({"sandbox_id": sandbox, "selected_repository": "stranger/project"});
    let error = product.start_conversation(with(saying("Tear it down"), request)).await.error();
    assert!(error.contains("stranger/project") && error.contains("holds another repository"), "{error}");
    assert!(requests_with(llm, "Tear it down").is_empty(), "no request is sent to the model");

    let child = product
        .start_conversation(with(
            saying("Plan the bridge"),
            json!({"parent_conversation_id": parent_id, "agent_type": "plan", "system_message_suffix": "Prefer stone."}),
        ))
        .await;
    let child_id = child.conversation_id();
    assert_eq!(child.sandbox_id(), sandbox, "a sub-conversation is in its parent's sandbox");
    let shown = product.conversation_when(&child_id, "finished").await;
    assert_eq!(hex(&text(&shown["parent_conversation_id"])), hex(&parent_id), "{shown:#}");
    assert_eq!(shown["selected_repository"], "owner/project", "{shown:#}");
    assert_eq!(shown["llm_model"], "openai/builder", "{shown:#}");
    let parent = product.conversation(&parent_id).await;
    assert_eq!(parent["sub_conversation_ids"], json!([child_id]), "{parent:#}");
    assert!(!ids(&product.get("/search").await).contains(&child_id), "sub-conversations are hidden");
    assert!(ids(&product.get("/search?include_sub_conversations=true").await).contains(&child_id));

    let agent = product.at_agent(&child_id).await;
    let info = agent.info().await;
    assert_eq!(tools(&info), ["glob", "grep", "planning_file_editor"], "{info:#}");
    assert_eq!(agent.folder().await, parent_folder, "both use the same folder");
    assert_eq!(branch_of(&parent_folder), branch, "the parent's branch is unchanged");
    let plan = parent_folder.join(".agents_tmp/PLAN.md");
    let editor = &info["agent"]["tools"][2];
    assert_eq!(editor["params"]["plan_path"], plan.display().to_string(), "{editor:#}");
    let prompt = system_prompt(&request_with(llm, "Plan the bridge"));
    for expected in ["IMPORTANT_PLANNING_BOUNDARIES", "APPROACH OVERVIEW", "Prefer stone."] {
        assert!(prompt.contains(expected), "no `{expected}` in {prompt}");
    }
}

fn branch_of(folder: &Path) -> String {
    let head = std::fs::read_to_string(folder.join(".git/HEAD")).expect("a clone");
    head.trim().trim_start_matches("ref: refs/heads/").to_owned()
}

async fn a_suggested_task_is_explained_to_the_agent(product: &Product, llm: &ScriptedLlm, sandbox: &str) {
    let task = json!({
        "git_provider": "github",
        "task_type": "FAILING_CHECKS",
        "repo": "owner/project",
        "issue_number": 42,
        "title": "Mend the roof",
    });
    let start = product.start_conversation(json!({"sandbox_id": sandbox, "suggested_task": task})).await;
    let shown = product.conversation_when(&start.conversation_id(), "finished").await;
    assert_eq!(shown["trigger"], "suggested_task", "{shown:#}");
    assert_eq!(shown["selected_repository"], "owner/project", "{shown:#}");
    let message = product.at_agent(&start.conversation_id()).await.said_by("user").await.concat();
    for expected in ["Pull Request #42", "Mend the roof", "owner/project", "GITHUB_TOKEN"] {
        assert!(message.contains(expected), "no `{expected}` in {message}");
    }
    request_with(llm, "Pull Request #42");
}

async fn a_stream_sends_every_status_once(product: &Product, sandbox: &str) {
    let request = with(saying("Stream it"), json!({"sandbox_id": sandbox}));
    let answer = product.post("/stream-start", &request).send().await.expect("an answer");
    assert_eq!(answer.status(), 200);
    let body = answer.text().await.expect("a body");
    let states: Vec<Value> = serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}"));
    let statuses: Vec<String> = states.iter().map(|task| text(&task["status"])).collect();
    assert_eq!(statuses, STATUSES);
    assert!(states.iter().all(|task| task["id"] == states[0]["id"]), "{body}");
    let ready = states.last().expect("at least one");
    product.conversation_when(&text(&ready["app_conversation_id"]), "finished").await;
}

async fn a_start_continues_after_the_client_of_its_stream_disconnects(product: &Product, sandbox: &str) {
    let request = with(saying("Do not wait for me"), json!({"sandbox_id": sandbox}));
    let mut stream = product.post("/stream-start", &request).send().await.expect("an answer");
    let mut received = Vec::new();
    let task = loop {
        received.extend(stream.chunk().await.expect("the stream continues").expect("another chunk"));
        let beginning = String::from_utf8_lossy(&received).trim_start_matches(['[', '\n']).to_owned();
        if let Some(Ok(task)) = serde_json::Deserializer::from_str(&beginning).into_iter::<Value>().next() {
            break task;
        }
    };
    drop(stream);
    assert_ne!(task["status"], "READY", "the start ended before the client disconnected: {task:#}");
    let start = product.follow(&text(&task["id"])).await;
    product.conversation_when(&start.conversation_id(), "finished").await;
}

async fn an_unknown_sandbox_is_named_in_the_error(product: &Product) {
    let start = product.start_conversation(with(saying("Anyone?"), json!({"sandbox_id": "NoSuchSandbox"}))).await;
    assert_eq!(start.error(), "Sandbox not found: NoSuchSandbox");
}

async fn a_model_error_ends_the_conversation_with_its_message(product: &Product, llm: &ScriptedLlm, sandbox: &str) {
    llm.reply_with(vec![Reply::Status(400)]);
    let start = product.start_conversation(with(saying("Refuse this"), json!({"sandbox_id": sandbox}))).await;
    let id = start.conversation_id();
    product.conversation_when(&id, "error").await;
    let errors = product.at_agent(&id).await.events("ConversationErrorEvent").await;
    assert!(json!(errors).to_string().contains("scripted failure"), "{errors:#?}");
}

/// A plugin is loaded before the first message, so its errors end the start. A model is called after it, so its errors
/// end the conversation.
async fn configuration_errors_are_reported_where_they_occur(product: &Product, sandbox: &str) {
    let before: BTreeSet<String> = ids(&product.get("/search?limit=100").await).into_iter().collect();
    let plugin = json!({"sandbox_id": sandbox, "plugins": [{"source": "/no/such/plugin"}]});
    let error = product.start_conversation(with(saying("Load this"), plugin)).await.error();
    assert!(error.starts_with("A plugin cannot be loaded; correct its source"), "{error}");
    assert!(error.ends_with("Local plugin path does not exist: /no/such/plugin"), "{error}");
    // The agent server had created the conversation, and its webhook had created a record.
    wait_until("the conversation is removed", Duration::from_secs(120), async || {
        ids(&product.get("/search?limit=100").await).into_iter().collect::<BTreeSet<_>>() == before
    })
    .await;

    let model = json!({"sandbox_id": sandbox, "llm_model": "no-such-provider/model"});
    let id = product.start_conversation(with(saying("Which provider?"), model)).await.conversation_id();
    product.conversation_when(&id, "error").await;
    let errors = json!(product.at_agent(&id).await.events("ConversationErrorEvent").await).to_string();
    assert!(errors.contains("LLM Provider NOT provided") && errors.contains("no-such-provider/model"), "{errors}");
}

async fn a_start_resumes_its_paused_sandbox(product: &Product, llm: &ScriptedLlm, sandbox: &str) {
    assert!(product.sandboxes().pause(&UserId::local(), sandbox).await.expect("paused"), "it ran");
    let any = ids(&product.get("/search").await).pop().expect("a conversation");
    let shown = product.conversation(&any).await;
    assert_eq!(shown["sandbox_status"], "PAUSED", "{shown:#}");
    assert_eq!(shown["execution_status"], Value::Null, "{shown:#}");
    let start = product.start_conversation(with(saying("Wake up"), json!({"sandbox_id": sandbox}))).await;
    product.conversation_when(&start.conversation_id(), "finished").await;
    request_with(llm, "Wake up");
}

// Repositories, with grouped sandboxes.

#[tokio::test]
async fn repositories_are_set_up_and_their_token_stays_secret() {
    let llm = ScriptedLlm::start().await;
    let git = GitServer::start().await;
    // A plain shell supports neither arrays nor `[[ ]]`.
    let setup =
        "words=(it ran); if [[ ${words[1]} == r* ]]; then echo \"${words[*]} in $PWD\" > setup-result.txt; fi\n";
    let hook = "#!/bin/bash\nif git diff --cached --name-only | grep -q forbidden; then echo 'No forbidden files' >&2; exit 1; fi\n";
    let files = [
        ("README.md", "Read me\n", false),
        (".openhands/setup.sh", setup, false),
        (".openhands/pre-commit.sh", hook, false),
    ];
    git.create_repository("owner/well-made", &files, &["feature/one"]).await;
    let broken = "echo 'the compiler is missing' >&2\nexit 3\n";
    git.create_repository("owner/broken", &[(".openhands/setup.sh", broken, true)], &[]).await;
    git.require("someone", TOKEN);
    let product = Product::start(with(
        settings(&llm.base_url()),
        json!({
            "sandbox_grouping_strategy": "ADD_TO_ANY",
            "provider_tokens": {"github": {"token": TOKEN, "host": git.url()}},
        }),
    ))
    .await;

    let request = json!({"selected_repository": "owner/well-made", "selected_branch": "feature/one"});
    let start = product.start_conversation(with(saying("Look around"), request)).await;
    let id = start.conversation_id();
    assert!(!start.detail().contains("setup.sh") && !start.detail().contains("hook"), "{}", start.detail());
    let shown = product.conversation_when(&id, "finished").await;
    assert_eq!(shown["selected_repository"], "owner/well-made", "{shown:#}");
    assert_eq!(shown["selected_branch"], "feature/one", "{shown:#}");
    let agent = product.at_agent(&id).await;
    let folder = agent.folder().await;
    assert!(folder.ends_with(format!("project/{}/well-made", hex(&id))), "{}", folder.display());
    assert_eq!(branch_of(&folder), "feature/one");
    assert_eq!(read(&folder.join("branch.txt")), "feature/one");
    assert_eq!(read(&folder.join("setup-result.txt")), format!("it ran in {}\n", folder.display()));
    git_hook_and_identity_are_configured(&agent, &folder).await;
    fetching_into_the_clone_needs_the_token(&agent, &folder).await;

    // A second start joins the first one's sandbox, in a folder of its own.
    let request = json!({"selected_repository": "owner/broken", "git_provider": "github"});
    let second = product.start_conversation(with(saying("Is it broken?"), request)).await;
    let second_id = second.conversation_id();
    assert_eq!(second.sandbox_id(), start.sandbox_id(), "ADD_TO_ANY uses an existing sandbox");
    for expected in ["setup.sh", "the compiler is missing", "exit code 3"] {
        assert!(second.detail().contains(expected), "no `{expected}` in {}", second.detail());
    }
    product.conversation_when(&second_id, "finished").await;
    let second_folder = product.at_agent(&second_id).await.folder().await;
    assert!(second_folder.ends_with(format!("project/{}/broken", hex(&second_id))), "{}", second_folder.display());
    let branch = branch_of(&second_folder);
    assert!(branch.starts_with("openhands-workspace-"), "{branch}");
    let third = product.start_conversation(saying("Nothing to clone")).await;
    assert_eq!(third.sandbox_id(), start.sandbox_id());
    product.conversation_when(&third.conversation_id(), "finished").await;
    let third_folder = product.at_agent(&third.conversation_id()).await.folder().await;
    assert!(third_folder.ends_with(format!("project/{}", hex(&third.conversation_id()))), "{}", third_folder.display());

    // A failed start does not remove the other conversations' sandbox.
    let request = json!({"selected_repository": "owner/well-made", "selected_branch": "no-such-branch"});
    let failed = product.start_conversation(with(saying("Which branch?"), request)).await;
    let error = failed.error();
    for expected in ["owner/well-made", "no-such-branch"] {
        assert!(error.contains(expected), "no `{expected}` in {error}");
    }
    assert_eq!(failed.sandbox_id(), start.sandbox_id());
    assert!(requests_with(&llm, "Which branch?").is_empty(), "no request is sent to the model");
    let shown = product.conversation(&id).await;
    assert_eq!(shown["sandbox_status"], "RUNNING", "{shown:#}");

    assert_token_is_not_stored(&product, &folder);
    for start in [&start, &second, &third, &failed] {
        assert!(!start.task.to_string().contains(TOKEN), "{:#}", start.task);
    }
    product.shutdown().await;
}

fn read(file: &Path) -> String {
    std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

async fn git_hook_and_identity_are_configured(agent: &AgentConversation, folder: &Path) {
    let refused = agent.run(folder, "touch forbidden.txt && git add forbidden.txt && git commit -q -m Forbidden").await;
    assert_ne!(refused.exit_code, 0, "the hook refuses: {refused:?}");
    assert!(refused.stderr.contains("No forbidden files"), "{refused:?}");
    let allowed = "git rm -q --cached forbidden.txt && touch fine.txt && git add fine.txt && git commit -q -m Fine && \
        git log -1 --format='%an <%ae> %s'";
    let allowed = agent.run(folder, allowed).await;
    assert_eq!(allowed.exit_code, 0, "{allowed:?}");
    assert_eq!(allowed.stdout.trim(), "O'Hara \"the user\" $HOME <user@example.com> Fine");
}

async fn fetching_into_the_clone_needs_the_token(agent: &AgentConversation, folder: &Path) {
    // The clone keeps no credential that git would find by itself.
    let fetched = agent.run(folder, "GIT_TERMINAL_PROMPT=0 GIT_ASKPASS=true git fetch origin").await;
    assert_ne!(fetched.exit_code, 0, "{fetched:?}");
}

fn assert_token_is_not_stored(product: &Product, clone: &Path) {
    let configuration = read(&clone.join(".git/config"));
    assert!(configuration.contains("owner/well-made"), "{configuration}");
    let files = product.files();
    for place in ["dynamodb.sqlite", "agent-server.log", "bash_events/", ".git/config"] {
        let is_listed = files.iter().any(|file| file.display().to_string().contains(place));
        assert!(is_listed, "no file matches {place}");
    }
    let exposing: Vec<_> =
        files.iter().filter(|file| std::fs::read(file).is_ok_and(|bytes| contains(&bytes, TOKEN.as_bytes()))).collect();
    assert!(exposing.is_empty(), "the token is in {exposing:#?}");
    let log = logged();
    assert!(log.contains("start.ready"), "the log is captured");
    assert!(!log.contains(TOKEN), "the token is in the log");
}

#[tokio::test]
async fn failed_clone_ends_the_start_and_removes_its_sandbox() {
    let llm = ScriptedLlm::start().await;
    let git = GitServer::start().await;
    git.require("someone", TOKEN);
    let product = Product::start(with(
        settings(&llm.base_url()),
        json!({"provider_tokens": {"github": {"token": TOKEN, "host": git.url()}}}),
    ))
    .await;

    let request = with(saying("Look"), json!({"selected_repository": "owner/no-such-project"}));
    let start = product.start_conversation(request).await;
    let error = start.error();
    for expected in ["owner/no-such-project", "not found"] {
        assert!(error.contains(expected), "no `{expected}` in {error}");
    }
    assert!(!error.contains(TOKEN), "{error}");
    assert_eq!(start.task["app_conversation_id"], Value::Null, "{:#}", start.task);
    assert_eq!(ids(&product.get("/search").await), Vec::<String>::new());
    // The error is reported before the sandbox is removed.
    wait_until("the sandbox is removed", Duration::from_secs(60), async || {
        product.sandboxes().list(&UserId::local()).await.expect("a list").is_empty()
    })
    .await;
    wait_until("its processes have ended", Duration::from_secs(60), async || product.processes().is_empty()).await;
    assert!(llm.requests().is_empty(), "no request was sent to the model");
    product.shutdown().await;
}

#[tokio::test]
async fn unreachable_model_ends_the_conversation_and_missing_model_ends_the_start() {
    // No server listens on this port.
    let dead = ScriptedLlm::start().await.base_url();
    let product = Product::start(settings(&dead)).await;
    let start = product.start_conversation(saying("Are you there?")).await;
    let id = start.conversation_id();

    product.change_settings(&json!({"llm_api_key": "key-of-no-model"})).await;
    let request = with(saying("Which model?"), json!({"sandbox_id": start.sandbox_id()}));
    let error = product.start_conversation(request).await.error();
    assert!(error.contains("LLM_MODEL"), "{error}");
    let shown = product.conversation(&id).await;
    assert_eq!(shown["sandbox_status"], "RUNNING", "the other conversation's sandbox is kept: {shown:#}");

    product.conversation_within(&id, "error", DEAD_MODEL_LIMIT).await;
    let errors = product.at_agent(&id).await.events("ConversationErrorEvent").await;
    // From 1.49 on, a failed title request is an error of its own, before or after that of the reply.
    let of_a_title = usize::from(is_from(49));
    assert!((1..=1 + of_a_title).contains(&errors.len()), "{errors:#?}");
    assert!(errors.iter().all(|error| text(&error["detail"]).contains("Connection error")), "{errors:#?}");
    product.shutdown().await;
}
