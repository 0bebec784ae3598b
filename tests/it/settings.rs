//! What users set and keep secret, over the routes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use axum::body::Body;
use futures::future::join_all;
use http::Request;
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use shared::config::SandboxConfig;
use shared::http::caller::Caller;
use shared::user::UserId;
use shared::user::settings::SettingsStore;
use shared::user::settings_document::SecretChange;
use tempfile::TempDir;

use crate::support::api::Api;
use crate::support::engines::skipped_on_ministack;

const MASK: &str = "**********";

async fn api(folder: &TempDir) -> Api {
    Api::at(folder.path(), SandboxConfig::None).await
}

fn store(api: &Api) -> SettingsStore {
    api.stores.settings()
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_are_stored_merged_masked_and_used() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let get = async || api.call(&user, "GET", "/api/v1/settings", None).await;
    let post = async |body: Value| api.call(&user, "POST", "/api/v1/settings", Some(&body)).await;
    assert_eq!(get().await, (404, json!({"detail": "Settings not found"})));

    let first = json!({"llm_model": "openai/x", "llm_api_key": "sk-1", "search_api_key": "tv-1", "git_user_name": "n",
        "provider_tokens": {"github": {"token": "gh-1", "host": "git.example.org"}}, "of_another_version": {"a": 1}});
    assert_eq!(post(first).await, (200, json!({"message": "Settings stored"})));
    let (status, shown) = get().await;
    assert_eq!(status, 200);
    let expected = [
        ("llm_model", json!("openai/x")),
        ("llm_api_key", json!(MASK)),
        ("search_api_key", json!(MASK)),
        ("sandbox_api_key", Value::Null),
        ("llm_api_key_set", json!(true)),
        ("search_api_key_set", json!(true)),
        ("provider_tokens_set", json!({"github": "git.example.org"})),
        ("secrets_store", json!({"provider_tokens": {}})),
        ("enable_sound_notifications", json!(false)),
        ("condenser_max_size", Value::Null),
    ];
    for (name, value) in expected {
        assert_eq!(shown[name], value, "{name}");
    }

    // What was shown, sent back by a form with one field changed.
    let mut form = shown.clone();
    form["llm_model"] = json!("openai/y");
    assert_eq!(post(form).await.0, 200);
    let kept = store(&api).get(&user).await.expect("an answer").expect("settings");
    assert_eq!(kept.llm_model.as_deref(), Some("openai/y"));
    assert_eq!(kept.llm_api_key.as_ref().map(ExposeSecret::expose_secret), Some("sk-1"));
    assert_eq!(kept.provider_tokens.0[0].1.token.as_ref().map(ExposeSecret::expose_secret), Some("gh-1"));

    // As clients of later versions send it.
    let later = json!({"agent_settings_diff": {"llm": {"api_key": "sk-2"}, "condenser": {"max_size": 99}},
        "conversation_settings_diff": {"confirmation_mode": true}, "language": "de"});
    assert_eq!(post(later).await.0, 200);
    let kept = store(&api).get(&user).await.expect("an answer").expect("settings");
    assert_eq!(kept.llm_api_key.as_ref().map(ExposeSecret::expose_secret), Some("sk-2"));
    assert_eq!((kept.condenser_max_size, kept.confirmation_mode), (Some(99), Some(true)));

    // Nothing of what is refused is stored.
    let (status, response) = post(json!({"language": "fr", "condenser_max_size": 5})).await;
    assert_eq!((status, &response["detail"][0]["loc"]), (422, &json!(["body", "condenser_max_size"])));
    assert_eq!(get().await.1["language"], "de");
    let large = "x".repeat(9_000);
    let many: Vec<&str> = vec![&large; 40];
    let (status, response) = post(json!({"disabled_skills": many})).await;
    assert_eq!((status, response), (413, json!({"detail": "Settings and secrets must not exceed 256 KiB in total"})));
    let (status, response) = post(json!({"language": "x".repeat(600_000)})).await;
    assert_eq!(
        (status, response),
        (413, json!({"detail": "The request is larger than this server accepts; send a smaller one"}))
    );
    let other = api.call(&UserId::new("other"), "GET", "/api/v1/settings", None).await;
    assert_eq!(other.0, 404);
    api.stop().await;
}

/// What is stored of the MCP servers, in clear.
async fn stored_servers(api: &Api, user: &UserId) -> Value {
    let document = store(api).document(user).await.expect("an answer").expect("settings");
    let shown = serde_json::to_value(document.show_user(user, true)).expect("JSON");
    shown["agent_settings"]["mcp_config"].clone()
}

/// The places of the violations, below `mcp_config`.
fn places(response: &Value) -> Vec<String> {
    let violations = response["detail"].as_array().expect("violations");
    violations
        .iter()
        .map(|violation| {
            let place: Vec<_> = violation["loc"]
                .as_array()
                .expect("a place")
                .iter()
                .map(|step| step.as_str().expect("a name"))
                .collect();
            assert_eq!(place[..3], ["body", "agent_settings_diff", "mcp_config"], "{response:#}");
            place[3..].join(".")
        })
        .collect()
}

/// The web UI's own requests, recorded from its code: each one changes what it means to change, and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn mcp_servers_change_as_the_web_ui_means_it() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let get = async |path: &str| api.call(&user, "GET", path, None).await.1;
    let post = async |body: &Value| api.call(&user, "POST", "/api/v1/settings", Some(body)).await;
    let script: Value = serde_json::from_str(include_str!("../data/settings/web-ui-mcp.json")).expect("JSON");
    for step in script["steps"].as_array().expect("steps") {
        let what = &step["what"];
        let (status, response) = post(&step["request"]).await;
        assert_eq!(status, step["status"], "{what}: {response:#}");
        if status == 422 {
            assert_eq!(json!(places(&response)), step["send_again"], "{what}: {response:#}");
            assert!(!response.to_string().contains("key-"), "{what}: {response:#}");
        }
        assert_eq!(stored_servers(&api, &user).await, step["stored"], "{what}");
        for path in ["/api/v1/settings", "/api/v1/users/me"] {
            let shown = get(path).await;
            assert_eq!(shown["agent_settings"]["mcp_config"], step["shown"], "{what}: {path}");
            // At the top the UI skips the lists, which are for older clients.
            let top = shown["mcp_config"].as_object().into_iter().flatten().filter(|(_, entry)| !entry.is_array());
            let top: serde_json::Map<_, _> = top.map(|(name, entry)| (name.clone(), entry.clone())).collect();
            assert_eq!(Value::Object(top), step["shown"], "{what}: {path}");
        }
        // What was shown, sent back whole.
        let mut back = get("/api/v1/settings").await;
        assert_eq!(post(&back).await.0, 200, "{what}");
        assert_eq!(stored_servers(&api, &user).await, step["stored"], "{what}: sent back");
        let by_name = json!({"agent_settings_diff": back["agent_settings"].take()});
        let (status, response) = post(&by_name).await;
        assert_eq!(status, 200, "{what}: {response:#}");
        assert_eq!(stored_servers(&api, &user).await, step["stored"], "{what}: sent back by name");
    }
    api.stop().await;
}

/// What the version before stored, and what a settings file gives: servers in three lists.
#[tokio::test(flavor = "multi_thread")]
async fn settings_stored_with_three_lists_open_and_change() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let old = include_str!("../data/settings/stored-with-three-lists.json");
    store(&api).put(&user, &old.into()).await.expect("stored as it is");
    let expected = json!({
        "files": {"transport": "stdio", "command": "npx", "args": ["-y", "files"], "env": {"TOKEN": "t-1"}},
        "bare": {"transport": "stdio", "command": "uvx"},
        "sse": {"transport": "sse", "url": "https://a.example/sse"},
        "sse_1": {"transport": "sse", "url": "https://b.example/sse", "auth": {"strategy": "api_key", "value": "key-b"}},
        "shttp": {"transport": "http", "url": "https://c.example/mcp?token=url-secret", "auth": {"strategy": "api_key", "value": "key-c"},
                  "timeout": 60},
    });
    assert_eq!(stored_servers(&api, &user).await, expected);
    let kept = store(&api).get(&user).await.expect("an answer").expect("settings");
    assert_eq!(kept.llm_api_key.as_ref().map(ExposeSecret::expose_secret), Some("sk-1"));
    assert_eq!(kept.mcp_config.for_agent()["sse_1"]["headers"], json!({"Authorization": "Bearer key-b"}));
    let token = kept.provider_tokens.0.first().and_then(|(_, token)| token.token.as_ref());
    assert_eq!(token.map(ExposeSecret::expose_secret), Some("gh-1"));
    let secrets: Vec<&str> = kept.custom_secrets.values().map(|secret| secret.secret.expose_secret()).collect();
    assert_eq!(secrets, ["s"]);
    let (_, shown) = api.call(&user, "GET", "/api/v1/settings", None).await;
    assert_eq!(
        shown["mcp_config"]["stdio_servers"],
        json!([{"name": "files", "command": "npx", "args": ["-y", "files"], "env": {"TOKEN": MASK}},
               {"name": "bare", "command": "uvx", "args": [], "env": {}}])
    );
    // A client that knows the lists alone adds one.
    let mut lists = shown["mcp_config"].clone();
    lists.as_object_mut().expect("an object").retain(|_, entry| entry.is_array());
    lists["sse_servers"].as_array_mut().expect("a list").push(json!({"url": "https://new.example/sse"}));
    let (status, response) = api.call(&user, "POST", "/api/v1/settings", Some(&json!({"mcp_config": lists}))).await;
    assert_eq!(status, 200, "{response:#}");
    let mut expected = expected;
    expected["sse_2"] = json!({"transport": "sse", "url": "https://new.example/sse"});
    assert_eq!(stored_servers(&api, &user).await, expected);
    // A file with servers that cannot run is refused, and the message contains none of their secrets.
    for (servers, place) in [
        (json!({"a": {"url": "https://a.example", "headers": {"X Y": "canary"}}}), "mcp_config.a.headers.X Y"),
        (json!({"a": {}}), "mcp_config.a"),
        (json!({"sse_servers": [{"url": "canary"}]}), "mcp_config.sse_servers.0.url"),
    ] {
        let file = json!({"mcp_config": servers}).to_string().into();
        let refused = store(&api).lay_over(&user, &file).await.expect_err("not valid").to_string();
        assert!(refused.contains(place) && !refused.contains("canary"), "{refused}");
    }
    let file = json!({"mcp_config": {"mcpServers": {"b": {"command": "c"}}}}).to_string().into();
    store(&api).lay_over(&user, &file).await.expect("valid");
    assert_eq!(stored_servers(&api, &user).await, json!({"b": {"command": "c"}}), "a file replaces the field");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_at_the_same_time_lose_nothing_of_each_other() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let put = async |number: usize| {
        let body = json!({"name": format!("SECRET_{number}"), "value": format!("value {number}")});
        let (status, answer) = api.call(&user, "POST", "/api/v1/secrets", Some(&body)).await;
        assert_eq!((status, answer), (201, json!({"message": "Secret stored"})));
    };
    join_all((0..12).map(put)).await;
    let kept = store(&api).get(&user).await.expect("an answer").expect("settings");
    let names: BTreeSet<_> = kept.custom_secrets.keys().cloned().collect();
    assert_eq!(names, (0..12).map(|number| format!("SECRET_{number}")).collect());
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_listed_page_by_page_and_never_shown() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let (user, other) = (UserId::new("u"), UserId::new("other"));
    let call = async |method: &str, target: &str, body: Option<Value>| {
        api.call(&user, method, &format!("/api/v1/secrets{target}"), body.as_ref()).await
    };
    for name in ["B", "A", "C/x", "", "=", "c"] {
        let (status, _) = call("POST", "", Some(json!({"name": name, "value": "v", "description": "d"}))).await;
        assert_eq!(status, if ["A", "B", "c"].contains(&name) { 201 } else { 422 }, "{name}");
    }
    assert_eq!(call("POST", "", Some(json!({"name": "B", "value": "w"}))).await.0, 200);
    let (_, page) = call("GET", "/search?limit=2", None).await;
    assert_eq!(page["items"], json!([{"name": "A", "description": "d"}, {"name": "B", "description": "d"}]));
    let next = page["next_page_id"].as_str().expect("a page id").to_owned();
    let (_, page) = call("GET", &format!("/search?limit=2&page_id={next}"), None).await;
    assert_eq!(page, json!({"items": [{"name": "c", "description": "d"}], "next_page_id": null}));
    let foreign = api.call(&other, "GET", &format!("/api/v1/secrets/search?page_id={next}"), None).await;
    assert_eq!(foreign.0, 400);
    assert_eq!(call("GET", "/search?name__contains=b", None).await.1["items"].as_array().map(Vec::len), Some(1));

    assert_eq!(call("PUT", "/A", Some(json!({"name": "B"}))).await.0, 409);
    assert_eq!(call("PUT", "/A", Some(json!({"name": "D", "description": "e", "value": null}))).await.0, 200);
    assert_eq!(call("PUT", "/A", Some(json!({"name": "E"}))).await.0, 404);
    assert_eq!(call("DELETE", "/c", None).await.0, 200);
    assert_eq!(call("DELETE", "/c", None).await, (404, json!({"detail": "Secret c not found"})));
    assert_eq!(api.call(&other, "DELETE", "/api/v1/secrets/D", None).await.0, 404);
    let kept = store(&api).get(&user).await.expect("an answer").expect("settings").custom_secrets;
    let kept: Vec<_> = kept.iter().map(|(name, secret)| (name.as_str(), secret.secret.expose_secret())).collect();
    assert_eq!(kept, [("B", "w"), ("D", "v")]);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_that_no_sandbox_can_use_is_refused_and_one_that_is_stored_can_be_repaired() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let call = async |method: &str, target: &str, body: Option<Value>| {
        api.call(&user, method, &format!("/api/v1/secrets{target}"), body.as_ref()).await
    };
    assert_eq!(call("POST", "", Some(json!({"name": "GOOD", "value": "v"}))).await.0, 201);
    for name in
        ["MY_DUMMY-SECRET", "with space", "1ST", "$(id)", "ünï", "UID", "SHELLOPTS", "PATH", "LD_PRELOAD", "BASH_ENV"]
    {
        for (method, target) in [("POST", ""), ("PUT", "/GOOD")] {
            let (status, answer) = call(method, target, Some(json!({"name": name, "value": "canary"}))).await;
            let fault = &answer["detail"][0];
            assert_eq!((status, &fault["loc"]), (422, &json!(["body", "name"])), "{method} {name}: {answer}");
            assert!(!answer.to_string().contains("canary"), "{answer}");
        }
    }
    for value in ["canary\0", "canary\u{1b}[0m", "canary\u{1a}", "\u{7f}canary"] {
        for (method, target) in [("POST", ""), ("PUT", "/GOOD")] {
            let (status, answer) = call(method, target, Some(json!({"name": "GOOD", "value": value}))).await;
            assert_eq!((status, &answer["detail"][0]["loc"]), (422, &json!(["body", "value"])), "{method}: {answer}");
            assert!(!answer.to_string().contains("canary"), "{answer}");
        }
    }
    let keys = json!({"name": "KEY", "value": "-----BEGIN KEY-----\n\tAA==\r\n-----END KEY-----\n"});
    assert_eq!(call("POST", "", Some(keys)).await.0, 201);

    // From a time when names were not checked.
    for name in ["MY-X", "UID", "c c"] {
        let change = SecretChange { name: name.to_owned(), value: Some("old".to_owned()), description: None };
        store(&api).change(&user, |document| document.put_secret(&change)).await.expect("stored");
    }
    let (_, page) = call("GET", "/search", None).await;
    assert_eq!(page["items"].as_array().map(Vec::len), Some(5), "{page}");
    // Pages send the name with every change.
    let described = json!({"name": "MY-X", "description": "d", "value": MASK});
    assert_eq!(call("PUT", "/MY-X", Some(described)).await.0, 200);
    for body in [json!({"value": "new"}), json!({"name": "MY-X", "value": "new"}), json!({"name": "MY-Y"})] {
        let (status, answer) = call("PUT", "/MY-X", Some(body)).await;
        assert_eq!((status, &answer["detail"][0]["loc"]), (422, &json!(["body", "name"])), "{answer}");
    }
    assert_eq!(call("PUT", "/MY-X", Some(json!({"name": "MY_X"}))).await.0, 200);
    assert_eq!(call("PUT", "/UID", Some(json!({"name": "USER_ID", "value": "new"}))).await.0, 200);
    assert_eq!(call("DELETE", "/c%20c", None).await.0, 200);
    let kept = store(&api).get(&user).await.expect("an answer").expect("settings").custom_secrets;
    let kept: Vec<_> = kept.iter().map(|(name, secret)| (name.as_str(), secret.secret.expose_secret())).collect();
    assert_eq!(kept[..1], [("GOOD", "v")]);
    assert_eq!(kept[2..], [("MY_X", "old"), ("USER_ID", "new")]);
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_me_shows_secrets_to_the_users_own_sandboxes_alone() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let (user, other) = (UserId::new("u"), UserId::new("other"));
    let (status, me) = api.call(&user, "GET", "/api/v1/users/me", None).await;
    assert_eq!((status, &me["id"], &me["llm_api_key"]), (200, &json!("u"), &Value::Null));
    assert_eq!(api.call(&UserId::local(), "GET", "/api/v1/users/me", None).await.1["id"], Value::Null);
    api.call(&user, "POST", "/api/v1/settings", Some(&json!({"llm_api_key": "sk-1"}))).await;
    assert_eq!(api.call(&user, "GET", "/api/v1/users/me", None).await.1["llm_api_key"], MASK);

    let sandboxes = api.stores.sandboxes();
    for (owner, key) in [(&user, "key of u"), (&other, "key of other")] {
        let record = sandboxes.new_record(owner, "s", "spec", &key.into()).await.expect("a record");
        sandboxes.create(record, None).await.expect("stored");
    }
    for (key, expected) in [
        (None, (401, json!("X-Session-API-Key header is required"))),
        (Some("no key"), (401, json!("Invalid session API key"))),
        (Some("key of other"), (403, json!("Session API key does not belong to the authenticated user"))),
        (Some("key of u"), (200, json!("sk-1"))),
    ] {
        let mut request = Request::get("/api/v1/users/me?expose_secrets=true").extension(Caller(user.clone()));
        if let Some(key) = key {
            request = request.header("x-session-api-key", key);
        }
        let (status, answer) = api.send(request.body(Body::empty()).expect("a request")).await;
        let response = if status == 200 { &answer["llm_api_key"] } else { &answer["detail"] };
        assert_eq!((status, response), (expected.0, &expected.1), "{key:?}");
    }
    api.stop().await;
}

/// Every route that accepts secrets, and every byte that is stored or returned.
#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_stored_or_answered_in_clear() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let mut answers = String::new();
    let canary = |number: usize| format!("canary-{number}-f3b1");
    let settings = json!({
        "llm_api_key": canary(1), "search_api_key": canary(2), "sandbox_api_key": canary(3),
        "provider_tokens": {"github": {"token": canary(4)}},
        "mcp_config": {"sse_servers": [{"url": "http://a", "api_key": canary(5)}],
                       "stdio_servers": [{"name": "s", "command": "c", "env": {"T": canary(6)}}]},
    });
    let wrong =
        json!({"llm_api_key": {"a": canary(7)}, "provider_tokens": {"github": canary(8)}, "mcp_config": canary(9)});
    let later = json!({"agent_settings_diff": {"llm": {"api_key": canary(10)}, "mcp_config": {
        "a": {"url": "http://a", "headers": {"X-A": canary(15)}, "auth": {"strategy": "basic", "username": canary(16), "password": canary(17)}},
        "b": {"url": "http://b", "auth": {"strategy": "oauth2", "state": {"tokens": {"access_token": canary(18)}}}},
        "c": {"command": "c", "cwd": "/", "env": {"A": canary(19)}}}}});
    let moved =
        json!({"agent_settings_diff": {"mcp_config": {"a": {"url": "http://other"}, "c": {"command": "other"}}}});
    let wrong_later = json!({"agent_settings_diff": {"mcp_config": {
        "a": {"url": canary(20), "headers": {"X-A": {"a": canary(21)}}, "auth": [canary(22)], "token": canary(23)}}}});
    for (method, path, body) in [
        ("POST", "/api/v1/settings", Some(settings)),
        ("POST", "/api/v1/settings", Some(wrong)),
        ("POST", "/api/v1/settings", Some(later)),
        ("POST", "/api/v1/settings", Some(moved)),
        ("POST", "/api/v1/settings", Some(wrong_later)),
        ("POST", "/api/v1/secrets", Some(json!({"name": "A", "value": canary(11)}))),
        ("POST", "/api/v1/secrets", Some(json!({"value": canary(12)}))),
        ("PUT", "/api/v1/secrets/A", Some(json!({"value": canary(13), "name": 1}))),
        ("PUT", "/api/v1/secrets/A", Some(json!({"value": canary(14)}))),
        ("GET", "/api/v1/settings", None),
        ("GET", "/api/v1/secrets/search", None),
        ("GET", "/api/v1/users/me", None),
    ] {
        let (status, answer) = api.call(&user, method, path, body.as_ref()).await;
        answers += &format!("{method} {path} {status} {answer}\n");
    }
    let kept = store(&api).get(&user).await.expect("an answer").expect("settings");
    assert_eq!(kept.custom_secrets["A"].secret.expose_secret(), canary(14), "what was kept opens");
    api.stop().await;
    assert!(!answers.contains("canary"), "{answers}");
    if skipped_on_ministack("what is in the embedded engines' files") {
        return;
    }
    let mut files = 0;
    each_file(folder.path(), &mut |path, bytes| {
        files += 1;
        assert!(!bytes.windows(6).any(|six| six == b"canary"), "{}", path.display());
    });
    assert!(files > 1, "the folder holds what was stored");
}

fn each_file(folder: &Path, visit: &mut impl FnMut(&Path, &[u8])) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            each_file(&path, visit);
        } else if path.is_file() {
            visit(&path, &fs::read(&path).expect("a file"));
        }
    }
}
