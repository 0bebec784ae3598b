//! Agent profiles and the list of skills, over HTTP through the routers.

use serde_json::{Value, json};
use shared::config::SandboxConfig;
use shared::user::UserId;
use tempfile::TempDir;

use crate::support::api::Api;

const PROFILES: &str = "/api/agent-profiles";
const STARTS: &str = "/api/v1/app-conversations";

struct Fixture {
    api: Api,
    user: UserId,
    _folder: TempDir,
}

impl Fixture {
    /// A user with the LLM profiles `fast`, which is active, and `slow`.
    async fn new() -> Self {
        let folder = TempDir::new().expect("a folder");
        let api = Api::at(folder.path(), SandboxConfig::None).await;
        let user = UserId::new("somebody");
        let settings = json!({
            "llm_profiles": {"active": "fast", "profiles": {
                "fast": {"model": "openai/fast", "api_key": "canary-key"}, "slow": {"model": "openai/slow"}}},
            "mcp_config": {"one": {"url": "https://one.example", "headers": {"X-Key": "canary-header"}}},
            "disabled_skills": ["docker", "mine"],
        });
        api.stores.settings().put(&user, &settings.to_string().into()).await.expect("stored");
        Self { api, user, _folder: folder }
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        self.api.call(&self.user, "GET", path, None).await
    }

    async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.api.call(&self.user, "POST", path, Some(&body)).await
    }

    async fn delete(&self, path: &str) -> (u16, Value) {
        self.api.call(&self.user, "DELETE", path, None).await
    }

    async fn active(&self) -> Value {
        self.get(PROFILES).await.1["active_agent_profile_id"].clone()
    }
}

#[tokio::test]
async fn the_first_list_makes_one_profile_which_follows_the_active_llm_profile() {
    let fixture = Fixture::new().await;
    let lists = futures::future::join_all((0..4).map(|_| fixture.get(PROFILES))).await;
    let (status, list) = &lists[0];
    assert_eq!(*status, 200);
    assert!(lists.iter().all(|other| other == &lists[0]), "simultaneous requests make one profile: {lists:?}");
    let id = list["active_agent_profile_id"].clone();
    assert_eq!(
        list["profiles"],
        json!([{"id": id, "name": "default", "agent_kind": "openhands", "revision": 0, "llm_profile_ref": "fast", "mcp_server_refs": null}])
    );
    fixture.post("/api/v1/settings/profiles/slow/activate", json!({})).await;
    assert_eq!(fixture.get(PROFILES).await.1["profiles"][0]["llm_profile_ref"], "slow");
    // It holds no reference: the LLM profile can be deleted.
    assert_eq!(fixture.delete("/api/v1/settings/profiles/slow").await.0, 200);
    let (_, settings) = fixture.get("/api/v1/settings").await;
    assert_eq!((&settings["active_agent_profile_id"], &settings["active_agent_profile_revision"]), (&id, &json!(0)));

    let newcomer = UserId::new("newcomer");
    let list = fixture.api.call(&newcomer, "GET", PROFILES, None).await;
    assert_eq!(list, (200, json!({"profiles": [], "active_agent_profile_id": null})));
    let settings = fixture.api.call(&newcomer, "GET", "/api/v1/settings", None).await;
    assert_eq!(settings.0, 404, "the list makes no settings");
    fixture.api.stop().await;
}

#[tokio::test]
async fn a_profile_is_saved_renamed_activated_and_deleted() {
    let fixture = Fixture::new().await;
    fixture.get(PROFILES).await;
    let reviewer = format!("{PROFILES}/reviewer");
    let body = json!({"agent_kind": "openhands", "llm_profile_ref": "slow", "mcp_server_refs": ["one", "two"]});
    let saved = fixture.post(&reviewer, body.clone()).await;
    assert_eq!(saved, (201, json!({"name": "reviewer", "message": "Agent profile 'reviewer' saved"})));
    let (_, shown) = fixture.get(&reviewer).await;
    let (profile, id) = (&shown["profile"], shown["profile"]["id"].as_str().expect("an id").to_owned());
    assert_eq!(
        (&shown["name"], &profile["llm_profile_ref"], &profile["revision"]),
        (&json!("reviewer"), &json!("slow"), &json!(0))
    );
    // The web UI sends back what it was shown, without what the server sets.
    let mut merged = profile.as_object().expect("a profile").clone();
    for name in ["id", "name", "revision"] {
        merged.remove(name);
    }
    merged.insert("system_message_suffix".to_owned(), "Be brief.".into());
    assert_eq!(fixture.post(&reviewer, Value::Object(merged)).await.0, 201);
    let (_, shown) = fixture.get(&reviewer).await;
    assert_eq!((&shown["profile"]["id"], &shown["profile"]["revision"]), (&json!(id), &json!(1)));

    let activated = fixture.post(&format!("{PROFILES}/{id}/activate"), json!({})).await;
    assert_eq!(
        activated,
        (200, json!({"id": id, "message": "Agent profile 'reviewer' activated", "agent_settings_applied": false}))
    );
    assert_eq!(fixture.active().await, json!(id));
    let renamed = fixture.post(&format!("{reviewer}/rename"), json!({"new_name": "critic"})).await;
    assert_eq!(renamed, (200, json!({"name": "critic", "message": "Agent profile 'reviewer' renamed to 'critic'"})));
    assert_eq!(fixture.active().await, json!(id), "the id stays");

    let (_, resolved) = fixture.post(&format!("{PROFILES}/critic/materialize"), json!({})).await;
    assert_eq!((&resolved["valid"], &resolved["errors"]), (&json!(true), &json!([])));
    assert_eq!(resolved["resolved_mcp_config_keys"], json!(["one"]));
    assert_eq!(resolved["dangling_mcp_server_refs"], json!(["two"]));
    assert_eq!(resolved["resolved_settings"]["llm"]["model"], "openai/slow");
    assert!(!resolved.to_string().contains("canary"), "{resolved}");
    let draft = json!({"profile": {"llm_profile_ref": "none"}});
    let (_, resolved) = fixture.post(&format!("{PROFILES}/new/materialize"), draft).await;
    assert_eq!((&resolved["valid"], &resolved["errors"]), (&json!(false), &json!(["LLM profile 'none' not found"])));

    // An LLM profile that is referred to stays; its new name is followed.
    for path in ["/api/v1/settings/profiles/slow"] {
        let (status, answer) = fixture.delete(path).await;
        assert_eq!(status, 409, "{answer}");
        assert!(answer["detail"].as_str().expect("a text").contains("critic"), "{answer}");
    }
    fixture.post("/api/v1/settings/profiles/slow/rename", json!({"new_name": "slower"})).await;
    assert_eq!(fixture.get(&format!("{PROFILES}/critic")).await.1["profile"]["llm_profile_ref"], "slower");
    assert_eq!(fixture.delete(&format!("{PROFILES}/critic")).await.0, 200);
    assert_eq!(fixture.delete(&format!("{PROFILES}/critic")).await.0, 200, "also when there is none");
    assert_eq!(fixture.delete("/api/v1/settings/profiles/slower").await.0, 200);
    assert_ne!(fixture.active().await, json!(id));
    fixture.api.stop().await;
}

/// The first dialog of the web UI saves the settings' model, and its pages list profiles.
#[tokio::test]
async fn a_model_that_was_chosen_before_any_profile_becomes_one_once() {
    let fixture = Fixture::new().await;
    let newcomer = UserId::new("newcomer");
    let call =
        async |method, path: &str, body: Option<Value>| fixture.api.call(&newcomer, method, path, body.as_ref()).await;
    let organization = call("GET", "/api/organizations", None).await.1["current_org_id"].clone();
    let in_ui = format!("/api/organizations/{}/profiles", organization.as_str().expect("an id"));
    assert_eq!(call("GET", &in_ui, None).await, (200, json!({"profiles": [], "active_profile": null})));

    let llm = json!({"model": "anthropic/claude", "api_key": "canary-key", "base_url": null});
    assert_eq!(call("POST", "/api/v1/settings", Some(json!({"agent_settings_diff": {"llm": llm}}))).await.0, 200);
    let made = json!({"profiles": [{"name": "default", "model": "anthropic/claude", "base_url": "https://api.anthropic.com", "api_key_set": true}],
        "active_profile": "default"});
    assert_eq!(
        call("GET", "/api/v1/settings/profiles", None).await.1["profiles"],
        json!([]),
        "clients of 1.11 see none"
    );
    assert_eq!(call("GET", &in_ui, None).await, (200, made.clone()));
    assert_eq!(call("GET", "/api/v1/settings/profiles", None).await, (200, made));
    assert_eq!(call("GET", PROFILES, None).await.1["profiles"][0]["llm_profile_ref"], "default");

    assert_eq!(call("DELETE", &format!("{in_ui}/default"), None).await.0, 200);
    assert_eq!(call("GET", &in_ui, None).await.1["profiles"], json!([]), "a deleted profile stays deleted");
}

#[tokio::test]
async fn invalid_profiles_are_refused() {
    let fixture = Fixture::new().await;
    let fine = || json!({"llm_profile_ref": "fast"});
    for (method, path, body, status, found) in [
        ("POST", "/x", json!({"llm_profile_ref": "none"}), 400, "LLM profile 'none' not found"),
        ("POST", "/x", json!({"agent_kind": "acp", "acp_server": "codex"}), 422, "'openhands'"),
        ("POST", "/x", json!({}), 422, "Field required"),
        ("POST", "/.x", fine(), 422, "string_pattern_mismatch"),
        ("POST", "/x/rename", json!({"new_name": "y"}), 404, "Agent profile 'x' not found"),
        ("POST", "/x/rename", json!({}), 422, "new_name"),
        ("POST", "/x/activate", json!({}), 422, "uuid_parsing"),
        ("POST", "/00000000-0000-0000-0000-000000000000/activate", json!({}), 404, "not found"),
        ("POST", "/x/materialize", json!({}), 404, "Agent profile 'x' not found"),
        ("GET", "/x", Value::Null, 404, "Agent profile 'x' not found"),
    ] {
        let path = format!("{PROFILES}{path}");
        let body = (method == "POST").then_some(&body);
        let (got, answer) = fixture.api.call(&fixture.user, method, &path, body).await;
        assert_eq!(got, status, "{method} {path}: {answer}");
        assert!(answer.to_string().contains(found), "{method} {path}: {answer}");
    }
    for number in 0..50 {
        assert_eq!(fixture.post(&format!("{PROFILES}/p{number}"), fine()).await.0, 201);
    }
    assert_eq!(fixture.post(&format!("{PROFILES}/p50"), fine()).await.0, 409);
    let names: Vec<String> = (0..500).map(|number| format!("{number:040}")).collect();
    let large = json!({"llm_profile_ref": "fast", "disabled_skills": names});
    assert_eq!(fixture.post(&format!("{PROFILES}/p0"), large).await.0, 413);

    // A start refuses a profile that it cannot use, before anything is stored.
    let start = |id: &str| json!({"agent_profile_id": id});
    let (status, answer) = fixture.post(STARTS, start("00000000-0000-0000-0000-000000000000")).await;
    assert_eq!(
        (status, &answer["detail"]),
        (404, &json!("Agent profile '00000000-0000-0000-0000-000000000000' not found"))
    );
    assert_eq!(fixture.get(&format!("{STARTS}/start-tasks/count")).await, (200, json!(0)));
    let id = fixture.active().await;
    let (status, answer) = fixture.post(STARTS, start(id.as_str().expect("an id"))).await;
    assert_eq!((status, &answer["request"]["agent_profile_id"]), (200, &id), "{answer}");
    fixture.api.stop().await;
}

#[tokio::test]
async fn skills_are_listed_with_those_that_the_user_has_disabled() {
    let fixture = Fixture::new().await;
    let (mut all, mut next) = (Vec::new(), String::new());
    loop {
        let (status, page) = fixture.get(&format!("/api/v1/skills/search?limit=25{next}")).await;
        assert_eq!(status, 200);
        all.extend(page["items"].as_array().expect("items").clone());
        match page["next_page_id"].as_str() {
            Some(page_id) => next = format!("&page_id={page_id}"),
            None => break,
        }
    }
    let disabled: Vec<&str> =
        all.iter().filter(|skill| skill["disabled"] == true).filter_map(|skill| skill["name"].as_str()).collect();
    assert_eq!(disabled, ["docker", "mine"]);
    let mine = all.last().expect("a skill");
    assert_eq!((&mine["name"], &mine["source"], &mine["type"]), (&json!("mine"), &json!("user"), &json!("knowledge")));
    let (_, whole) = fixture.get("/api/v1/skills/search").await;
    assert_eq!((whole["items"].as_array(), &whole["next_page_id"]), (Some(&all), &Value::Null));
    let (_, others) = fixture.api.call(&UserId::new("other"), "GET", "/api/v1/skills/search", None).await;
    assert_eq!(others["items"].as_array().map(Vec::len), Some(all.len() - 1));
    assert!(!others.to_string().contains("\"disabled\":true"));
    for (query, status) in [("limit=0", 422), ("page_id=x", 400)] {
        assert_eq!(fixture.get(&format!("/api/v1/skills/search?{query}")).await.0, status, "{query}");
    }
    fixture.api.stop().await;
}
