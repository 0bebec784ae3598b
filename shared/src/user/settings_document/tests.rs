use serde_json::{Value, json};

use super::*;
use crate::error::Error;
use crate::id::UserId;

fn settings(document: &SettingsDocument) -> Value {
    serde_json::to_value(document.show_settings()).expect("JSON")
}

fn user(document: &SettingsDocument, expose: bool) -> Value {
    serde_json::to_value(document.show_user(&UserId::new("me"), expose)).expect("JSON")
}

fn changed(document: &mut SettingsDocument, body: &Value) {
    document.change(&SettingsChanges::read(body).expect("valid")).expect("changed");
}

#[test]
fn absent_fields_stay_and_null_clears() {
    let mut document = SettingsDocument::default();
    changed(&mut document, &json!({"llm_model": "m", "llm_api_key": " sk ", "language": "de", "unknown": 1}));
    changed(&mut document, &json!({"language": null, "llm_api_key": MASK}));
    let shown = settings(&document);
    assert_eq!((&shown["llm_model"], &shown["language"]), (&json!("m"), &Value::Null));
    assert_eq!((&shown["llm_api_key"], &shown["llm_api_key_set"]), (&json!(MASK), &json!(true)));
    assert_eq!(user(&document, true)["llm_api_key"], "sk");
    changed(&mut document, &json!({"llm_api_key": ""}));
    assert_eq!(settings(&document)["llm_api_key_set"], false);
    assert!(shown.get("unknown").is_none());
    assert_eq!(shown["enable_default_condenser"], true);
    assert_eq!(shown["sandbox_grouping_strategy"], "NO_GROUPING");
}

#[test]
fn nested_fields_of_later_clients_are_moved_to_their_flat_names() {
    let mut document = SettingsDocument::default();
    changed(
        &mut document,
        &json!({
            "agent_settings_diff": {"llm": {"model": "m", "api_key": "sk", "base_url": null, "temperature": 1},
                                    "condenser": {"enabled": false, "max_size": 100},
                                    "mcp_config": {"mcpServers": {"a": {"url": "http://a", "api_key": "k"},
                                        "b": {"command": "x", "env": {"T": "v"}},
                                        "c": {"url": "http://c", "transport": "sse"}}}},
            "conversation_settings_diff": {"confirmation_mode": true, "max_iterations": 5},
            "language": "en",
        }),
    );
    let shown = user(&document, false);
    assert_eq!((&shown["llm_model"], &shown["condenser_max_size"]), (&json!("m"), &json!(100)));
    assert_eq!((&shown["enable_default_condenser"], &shown["confirmation_mode"]), (&json!(false), &json!(true)));
    let servers = json!({
        "a": {"url": "http://a", "auth": {"strategy": "api_key", "value": MASK}},
        "b": {"command": "x", "env": {"T": MASK}},
        "c": {"transport": "sse", "url": "http://c"},
    });
    assert_eq!(
        shown["agent_settings"],
        json!({"agent_kind": "openhands", "llm": {"model": "m", "api_key": MASK}, "condenser": {"enabled": false, "max_size": 100},
               "mcp_config": servers})
    );
    assert_eq!(settings(&document)["agent_settings"]["llm"], json!({"model": "m", "api_key": null}));
    let mut beside = servers;
    beside["sse_servers"] = json!([{"url": "http://c", "api_key": null}]);
    beside["stdio_servers"] = json!([{"name": "b", "command": "x", "args": [], "env": {"T": MASK}}]);
    beside["shttp_servers"] = json!([{"url": "http://a", "api_key": MASK, "timeout": null}]);
    assert_eq!(shown["mcp_config"], beside);
    // Sent back as shown, with a server more: the keys stay.
    let mut back = shown["mcp_config"].clone();
    back["sse_servers"].as_array_mut().expect("a list").push(json!("https://d"));
    changed(&mut document, &json!({"mcp_config": back}));
    let exposed = &user(&document, true)["mcp_config"];
    assert_eq!(exposed["shttp_servers"][0]["api_key"], "k");
    assert_eq!(exposed["stdio_servers"][0]["env"]["T"], "v");
    assert_eq!(exposed["sse_servers"][1]["url"], "https://d");
    // In one body only the first counts, as in the reference.
    let both = json!({"agent_settings_diff": {"mcp_config": {"a": null}}, "mcp_config": null});
    changed(&mut document, &both);
    let names: Vec<_> = document.mcp_servers().expect("servers").keys().cloned().collect();
    assert_eq!(names, ["b", "c", "sse"]);
}

#[test]
fn tokens_are_merged_provider_by_provider() {
    let mut document = SettingsDocument::parse(
        r#"{"secrets_store": {"provider_tokens": {"gitlab": {"token": "t0"}}, "custom_secrets": {"A": {"secret": "s"}}}}"#,
    )
    .expect("a document");
    changed(&mut document, &json!({"provider_tokens": {"github": {"token": "t1", "host": "h"}}}));
    changed(&mut document, &json!({"provider_tokens": {"github": {"token": MASK, "host": "g"}}}));
    assert_eq!(settings(&document)["provider_tokens_set"], json!({"gitlab": null, "github": "g"}));
    changed(&mut document, &json!({"provider_tokens": {"gitlab": null, "azure_devops": {"token": ""}}}));
    let json = document.to_json().expect("small");
    assert!(json.contains(r#""token":"t1""#) && !json.contains("gitlab") && !json.contains("azure"), "{json}");
    assert_eq!(document.secrets().collect::<Vec<_>>(), [("A", None)]);
}

#[test]
fn a_stored_host_is_shown_without_credentials() {
    let stored = r#"{"provider_tokens": {"github": {"token": "t", "host": "https://me:canary@git.example/api/v3"}}}"#;
    let document = SettingsDocument::parse(stored).expect("a document");
    assert_eq!(settings(&document)["provider_tokens_set"], json!({"github": "https://git.example/api/v3"}));
}

#[test]
fn a_document_is_merged_into_another() {
    let parse = |json: &str| SettingsDocument::parse(json).expect("a document");
    let mut document = parse(
        r#"{"llm_model": "a", "language": "de", "custom_secrets": {"A": {"secret": "1"}, "B": {"secret": "2"}}}"#,
    );
    document.merge(&parse(
        r#"{"llm_model": "b", "provider_tokens": null,
            "secrets_store": {"custom_secrets": {"B": {"secret": "3"}}, "provider_tokens": {"github": {"token": "t"}}}}"#,
    ));
    let json: Value = serde_json::from_str(&document.to_json().expect("small")).expect("JSON");
    assert_eq!((&json["llm_model"], &json["language"]), (&json!("b"), &json!("de")));
    assert_eq!(json["custom_secrets"], json!({"A": {"secret": "1"}, "B": {"secret": "3"}}));
    assert_eq!(json["provider_tokens"], json!({"github": {"token": "t"}}));
}

#[test]
fn violations_have_a_location_and_no_secret() {
    for (body, kind, place) in [
        (json!([]), "model_attributes_type", json!(["body"])),
        (json!({"llm_api_key": ["sk-canary"]}), "string_type", json!(["body", "llm_api_key"])),
        (json!({"llm_api_key": "sk-canary".repeat(10_000)}), "too_long", json!(["body", "llm_api_key"])),
        (json!({"condenser_max_size": 19}), "greater_than_equal", json!(["body", "condenser_max_size"])),
        (json!({"sandbox_grouping_strategy": "x"}), "enum", json!(["body", "sandbox_grouping_strategy"])),
        (
            json!({"agent_settings_diff": {"llm": {"model": 1}}}),
            "string_type",
            json!(["body", "agent_settings_diff", "llm", "model"]),
        ),
        (
            json!({"provider_tokens": {"nowhere": {"token": "sk-canary"}}}),
            "enum",
            json!(["body", "provider_tokens", "nowhere"]),
        ),
        (
            json!({"provider_tokens": {"github": "sk-canary"}}),
            "dict_type",
            json!(["body", "provider_tokens", "github"]),
        ),
        (json!({"mcp_config": {"other": ["sk-canary"]}}), "dict_type", json!(["body", "mcp_config", "other"])),
        (
            json!({"agent_settings_diff": {"mcp_config": {"other": {"url": "http://x", "secret": "sk-canary"}}}}),
            "extra_forbidden",
            json!(["body", "agent_settings_diff", "mcp_config", "other", "secret"]),
        ),
        (
            json!({"mcp_config": {"sse_servers": ["ftp://x"]}}),
            "value_error",
            json!(["body", "mcp_config", "sse_servers", 0, "url"]),
        ),
        (
            json!({"mcp_config": {"stdio_servers": [{"name": "a b", "command": "c"}]}}),
            "value_error",
            json!(["body", "mcp_config", "stdio_servers", 0, "name"]),
        ),
    ] {
        let violations = SettingsChanges::read(&body).expect_err("not valid");
        let shown = serde_json::to_value(&violations).expect("JSON");
        assert_eq!((&shown[0]["type"], &shown[0]["loc"]), (&json!(kind), &place), "{shown}");
        assert!(!shown.to_string().contains("canary"), "{shown}");
    }
    let violations = SecretChange::read(&json!({"value": "canary", "description": 1}), None).expect_err("not valid");
    let shown = serde_json::to_string(&violations).expect("JSON");
    assert!(shown.contains("missing") && !shown.contains("canary"), "{shown}");
}

#[test]
fn secrets_are_created_renamed_and_deleted() {
    let mut document = SettingsDocument::default();
    let made = |body: Value| SecretChange::read(&body, None).expect("valid");
    assert!(document.put_secret(&made(json!({"name": "A", "value": "1", "description": "d"}))).expect("new"));
    assert!(!document.put_secret(&made(json!({"name": "A", "value": "2"}))).expect("not new"));
    assert!(document.put_secret(&made(json!({"name": "B", "value": "3"}))).expect("new"));
    let rename = SecretChange::read(&json!({"name": "B"}), Some("A")).expect("valid");
    assert!(matches!(document.change_secret("A", &rename), Err(Error::Conflict(_))));
    let rename = SecretChange::read(&json!({"name": "C", "value": MASK}), Some("A")).expect("valid");
    document.change_secret("A", &rename).expect("renamed");
    assert!(matches!(document.change_secret("A", &rename), Err(Error::NotFound(_))));
    document.delete_secret("B").expect("deleted");
    assert!(matches!(document.delete_secret("B"), Err(Error::NotFound(_))));
    assert_eq!(document.secrets().collect::<Vec<_>>(), [("C", Some("d"))]);
    assert!(document.to_json().expect("small").contains(r#""secret":"2""#));
    for index in 0..49 {
        document.put_secret(&made(json!({"name": format!("N{index}"), "value": ""}))).expect("within the limit");
    }
    let one_more = document.put_secret(&made(json!({"name": "N49", "value": ""})));
    assert!(matches!(one_more, Err(Error::Refused(_))));
}
