//! LLM profiles and organizations over the routes.

use futures::future::join_all;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use secrecy::ExposeSecret as _;
use serde_json::{Map, Value, json};
use shared::config::SandboxConfig;
use shared::user::UserId;
use shared::user::organization::organization_of;
use shared::user::settings_document::{SettingsChanges, SettingsDocument};
use tempfile::TempDir;

use crate::support::api::Api;

const MASK: &str = "**********";
const PROFILES: &str = "/api/v1/settings/profiles";

async fn api(folder: &TempDir) -> Api {
    Api::at(folder.path(), SandboxConfig::None).await
}

#[tokio::test(flavor = "multi_thread")]
async fn both_paths_serve_the_same_profiles() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let call = async |method: &str, path: &str, body: Option<Value>| api.call(&user, method, path, body.as_ref()).await;
    let (_, organizations) = call("GET", "/api/organizations", None).await;
    let organization = organizations["current_org_id"].as_str().expect("an id").to_owned();
    assert_eq!(organization, organization_of(&user).to_string());
    assert_eq!(organizations["items"][0]["id"], organization.as_str());
    let of_organization = format!("/api/organizations/{organization}/profiles");
    assert_eq!(
        call("POST", "/api/v1/settings", Some(json!({"llm_model": "openai/a", "llm_api_key": "k"}))).await.0,
        200
    );

    let named = |name: &str, message: &str| json!({"name": name, "message": message});
    let body = json!({"llm": {"model": "openai/b", "api_key": "kb"}, "include_secrets": true});
    let saved = call("POST", &format!("{of_organization}/one"), Some(body.clone())).await;
    assert_eq!(saved, (200, named("one", "Profile 'one' saved")));
    let saved = call("POST", &format!("{PROFILES}/two"), Some(body)).await;
    assert_eq!(saved, (201, named("two", "Profile 'two' saved")));
    let mut shown = Vec::new();
    for base in [PROFILES, &of_organization] {
        let (status, list) = call("GET", base, None).await;
        assert_eq!((status, &list["profiles"][1]["name"], &list["active_profile"]), (200, &json!("two"), &Value::Null));
        let (status, one) = call("GET", &format!("{base}/one"), None).await;
        assert_eq!((status, &one["api_key_set"], &one["config"]), (200, &json!(true), &one["llm"]));
        assert_eq!(one["llm"]["api_key"], MASK);
        shown.push((list, one));
    }
    assert_eq!(shown[0], shown[1]);
    let (status, activated) = call("POST", &format!("{of_organization}/two/activate"), Some(json!({}))).await;
    assert_eq!(
        (status, &activated["model"], &activated["llm"]["model"]),
        (200, &json!("openai/b"), &json!("openai/b"))
    );
    assert_eq!(activated["llm"]["api_key"], MASK);
    let renamed = call("POST", &format!("{of_organization}/two/rename"), Some(json!({"new_name": "three"}))).await;
    assert_eq!(renamed, (200, named("three", "Profile 'two' renamed to 'three'")));
    assert_eq!(call("GET", PROFILES, None).await.1["active_profile"], "three");
    // The two differ for a profile that does not exist.
    let missing = (404, json!({"detail": "Profile 'none' not found"}));
    assert_eq!(call("DELETE", &format!("{of_organization}/none"), None).await, missing);
    assert_eq!(call("DELETE", &format!("{PROFILES}/none"), None).await.0, 200);
    assert_eq!(call("GET", &format!("{PROFILES}/a%2Fb"), None).await, (404, json!({"detail": "Not Found"})));

    // Other organizations do not exist for this user.
    let other = organization_of(&UserId::new("other"));
    for path in ["profiles", "profiles/one", "me", "members/u"] {
        let (status, answer) = call("GET", &format!("/api/organizations/{other}/{path}"), None).await;
        assert_eq!((status, answer), (404, json!({"detail": "Organization not found"})), "{path}");
    }
    assert_eq!(call("POST", &format!("/api/organizations/{other}/switch"), None).await.0, 404);
    let (status, answer) = call("GET", "/api/organizations/x/me", None).await;
    assert_eq!((status, &answer["detail"][0]["loc"]), (422, &json!(["path", "org_id"])));
    let (_, me) = call("GET", &format!("/api/organizations/{organization}/me"), None).await;
    assert_eq!(
        (&me["role"], &me["permissions"], &me["llm_api_key"]),
        (&json!("owner"), &json!(["edit_org_settings"]), &json!(MASK))
    );
    let member = call("GET", &format!("/api/organizations/{organization}/members/other"), None).await;
    assert_eq!(member, (404, json!({"detail": "Member not found"})));
    let (_, chosen) = call("POST", &format!("/api/organizations/{organization}/switch"), Some(json!({}))).await;
    assert_eq!(chosen, organizations["items"][0]);
    assert_eq!(call("GET", "/api/keys/current", None).await.1["org_id"], organization.as_str());
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_nested_objects_are_refused_in_the_contracts_form() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let body = json!({"conversation_settings": {}, "agent_settings": {"llm": {"api_key": "canary"}}});
    let (status, answer) = api.call(&user, "POST", "/api/v1/settings", Some(&body)).await;
    assert_eq!(status, 422);
    assert_eq!(answer["error"], "Use *_diff nested settings payloads instead of legacy keys");
    assert_eq!(answer["keys"], json!(["agent_settings", "conversation_settings"]));
    assert_eq!(answer["detail"][1]["loc"], json!(["body", "conversation_settings"]));
    assert!(!answer.to_string().contains("canary"), "{answer}");
    assert_eq!(api.call(&user, "GET", "/api/v1/settings", None).await.0, 404, "nothing was stored");
    api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_saves_lose_no_profile() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let start = json!({"llm_model": "openai/a"});
    assert_eq!(api.call(&user, "POST", "/api/v1/settings", Some(&start)).await.0, 200);
    let of_profiles = (0..9).map(async |index| {
        let body = json!({"llm": {"model": format!("openai/m{index}"), "api_key": format!("k{index}")}});
        api.call(&user, "POST", &format!("{PROFILES}/p{index}"), Some(&body)).await.0
    });
    let of_settings = (0..3).map(async |index| {
        let body = json!({"language": format!("l{index}")});
        api.call(&user, "POST", "/api/v1/settings", Some(&body)).await.0
    });
    let (saved, changed) = tokio::join!(join_all(of_profiles), join_all(of_settings));
    assert!(
        saved.iter().all(|status| *status == 201) && changed.iter().all(|status| *status == 200),
        "{saved:?} {changed:?}"
    );
    let stored = api.stores.settings().get(&user).await.expect("the store").expect("settings");
    let mut keys: Vec<&str> = stored.llm_profiles.iter().filter_map(|(_, llm)| llm.api_key()).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "k8"]);
    api.stop().await;
}

/// A record as the version before profiles wrote it.
#[tokio::test(flavor = "multi_thread")]
async fn settings_of_the_version_before_profiles_are_read_and_changed() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let before = include_str!("../data/settings/before-profiles.json");
    api.stores.settings().put(&user, &before.into()).await.expect("stored");
    let get = async |path: &str| api.call(&user, "GET", path, None).await.1;
    let list = get(PROFILES).await;
    let info =
        json!({"name": "default", "model": "openai/gpt-5", "base_url": "https://llm.example/v1", "api_key_set": true});
    assert_eq!(list, json!({"profiles": [info], "active_profile": "default"}));
    let settings = get("/api/v1/settings").await;
    for (place, value) in [
        ("/llm_model", json!("openai/gpt-5")),
        ("/confirmation_mode", json!(true)),
        ("/condenser_max_size", json!(120)),
        ("/agent_settings/llm/base_url", json!("https://llm.example/v1")),
        ("/agent_settings/condenser/max_size", json!(120)),
        ("/conversation_settings/confirmation_mode", json!(true)),
        ("/conversation_settings/max_iterations", json!(80)),
        ("/provider_tokens_set/github", json!("git.example.org")),
        ("/agent_settings/mcp_config/docs/url", json!("https://mcp.example.org/mcp")),
    ] {
        assert_eq!(settings.pointer(place), Some(&value), "{place}");
    }
    let change = json!({"agent_settings_diff": {"llm": {"model": "openai/gpt-6"}}});
    assert_eq!(api.call(&user, "POST", "/api/v1/settings", Some(&change)).await.0, 200);
    let stored = api.stores.settings().get(&user).await.expect("the store").expect("settings");
    let active = stored.llm_profiles.active_llm().expect("a profile");
    assert_eq!((active.model(), active.api_key()), (Some("openai/gpt-6"), Some("sk-of-yesterday")));
    assert_eq!(stored.provider_tokens.0.len(), 1);
    assert_eq!(stored.custom_secrets["NPM_TOKEN"].secret.expose_secret(), "npm");
    assert_eq!(api.call(&user, "DELETE", &format!("{PROFILES}/default"), None).await.0, 200);
    assert_eq!(get(PROFILES).await, json!({"profiles": [], "active_profile": null}), "it is made once");
    api.stop().await;
}

/// A value of a field, or null.
fn or_null(value: impl Strategy<Value = Value> + 'static) -> BoxedStrategy<Value> {
    prop_oneof![3 => value, 1 => Just(Value::Null)].boxed()
}

/// An object with some of these fields.
fn some_of(fields: Vec<(&'static str, BoxedStrategy<Value>)>) -> BoxedStrategy<Value> {
    let fields = fields.into_iter().map(|(name, value)| {
        proptest::option::of(value).prop_map(move |value| value.map(|value| (name.to_owned(), value)))
    });
    let fields: Vec<_> = fields.collect();
    fields.prop_map(|fields| Value::Object(fields.into_iter().flatten().collect::<Map<_, _>>())).boxed()
}

/// A merge patch of agent settings, with values other than the defaults.
fn patches() -> BoxedStrategy<Value> {
    let text = || or_null("[a-z]{1,8}".prop_map(Value::from));
    let llm = some_of(vec![
        ("model", text()),
        ("api_key", or_null(prop_oneof![Just(json!(MASK)), Just(json!("")), "[a-z]{1,8}".prop_map(Value::from)])),
        ("base_url", text()),
        ("temperature", or_null((1..9u8).prop_map(|tenths| json!(f64::from(tenths) / 10.0)))),
        ("seed", or_null((1..9u8).prop_map(Value::from))),
        ("litellm_extra_body", or_null(some_of(vec![("a", text()), ("b", or_null(some_of(vec![("c", text())])))]))),
    ]);
    let condenser = some_of(vec![
        ("max_size", or_null((20..99u8).prop_map(Value::from))),
        ("enabled", or_null(Just(false.into()))),
    ]);
    some_of(vec![
        ("llm", or_null(llm)),
        ("condenser", or_null(condenser)),
        ("agent", text()),
        ("tool_concurrency_limit", or_null((2..9u8).prop_map(Value::from))),
        ("unknown", text()),
    ])
}

/// RFC 7396, with the rules for secrets.
fn merged(target: &mut Map<String, Value>, patch: &Map<String, Value>) {
    for (name, value) in patch.iter().filter(|(name, _)| *name != "unknown") {
        match value {
            Value::String(text) if name == "api_key" && text == MASK => {}
            Value::String(text) if name == "api_key" && text.is_empty() => {
                target.shift_remove(name);
            }
            Value::Null => {
                target.shift_remove(name);
            }
            Value::Object(patch) => {
                let below = target.entry(name).or_insert_with(|| json!({}));
                if !below.is_object() {
                    *below = json!({});
                }
                merged(below.as_object_mut().expect("an object"), patch);
            }
            value => {
                target.insert(name.clone(), value.clone());
            }
        }
    }
}

/// What was merged, where the settings show another value than the default.
fn has(shown: &Value, merged: &Map<String, Value>) -> bool {
    merged.iter().all(|(name, value)| match value {
        Value::Object(below) => below.is_empty() || has(&shown[name], below),
        value => shown[name] == *value,
    })
}

#[test]
fn patches_merge_as_rfc_7396_says() {
    let mut runner = TestRunner::new(Config::with_cases(256));
    let cases = proptest::collection::vec(patches(), 1..6);
    let user = UserId::new("u");
    runner
        .run(&cases, |patches| {
            let mut document = SettingsDocument::default();
            let mut expected = Map::new();
            for patch in &patches {
                let body = json!({"agent_settings_diff": patch});
                let changes = SettingsChanges::read(&body).expect("valid");
                document.change(&changes).expect("changed");
                merged(&mut expected, patch.as_object().expect("an object"));
                // Storing and reading it changes nothing, and neither does the same patch again.
                let shown = serde_json::to_value(document.show_user(&user, true)).expect("JSON");
                document.change(&changes).expect("changed");
                document = SettingsDocument::parse(&document.to_json().expect("small")).expect("a document");
                let again = serde_json::to_value(document.show_user(&user, true)).expect("JSON");
                prop_assert_eq!(&shown, &again);
                prop_assert!(
                    has(&shown["agent_settings"], &expected),
                    "{} lacks {:?}",
                    shown["agent_settings"],
                    expected
                );
            }
            // What is not set has its default.
            let shown = serde_json::to_value(document.show_user(&user, true)).expect("JSON");
            let fresh = serde_json::to_value(SettingsDocument::default().show_user(&user, true)).expect("JSON");
            let llm = expected.get("llm").and_then(Value::as_object).cloned().unwrap_or_default();
            for (name, value) in fresh["agent_settings"]["llm"].as_object().expect("an object") {
                if !llm.contains_key(name) {
                    prop_assert_eq!(&shown["agent_settings"]["llm"][name], value, "{}", name);
                }
            }
            Ok(())
        })
        .expect("holds");
}
