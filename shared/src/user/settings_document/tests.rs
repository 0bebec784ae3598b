use serde_json::{Value, json};

use super::*;
use crate::error::Error;
use crate::id::UserId;
use crate::user::llm::Llm;
use crate::user::llm_profiles::LlmProfiles;

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
    let agent = &shown["agent_settings"];
    for (place, value) in [
        ("/agent_kind", json!("openhands")),
        ("/agent", json!("CodeActAgent")),
        ("/llm/model", json!("m")),
        ("/llm/api_key", json!(MASK)),
        ("/llm/temperature", json!(1.0)),
        ("/llm/num_retries", json!(5)),
        ("/condenser/enabled", json!(false)),
        ("/condenser/max_size", json!(100)),
        ("/condenser/keep_first", json!(2)),
        ("/verification/critic_enabled", json!(false)),
        ("/mcp_config", servers.clone()),
    ] {
        assert_eq!(agent.pointer(place), Some(&value), "{place}");
    }
    let conversation =
        json!({"schema_version": 1, "max_iterations": 5, "confirmation_mode": true, "security_analyzer": null});
    assert_eq!(shown["conversation_settings"], conversation);
    assert_eq!(settings(&document)["agent_settings"]["llm"]["api_key"], Value::Null);
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
        (json!([]), "dict_type", json!(["body"])),
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
            json!({"agent_settings_diff": {"llm": {"api_key": ["sk-canary"], "temperature": 1}}}),
            "string_type",
            json!(["body", "agent_settings_diff", "llm", "api_key"]),
        ),
        (
            json!({"agent_settings_diff": {"llm": {"temperature": "hot"}}}),
            "float_parsing",
            json!(["body", "agent_settings_diff", "llm", "temperature"]),
        ),
        (json!({"agent_settings_diff": "sk-canary"}), "dict_type", json!(["body", "agent_settings_diff"])),
        (
            json!({"agent_settings_diff": {"agent_kind": "acp"}}),
            "value_error",
            json!(["body", "agent_settings_diff", "agent_kind"]),
        ),
        (
            json!({"conversation_settings_diff": {"max_iterations": 0}}),
            "greater_than_equal",
            json!(["body", "conversation_settings_diff", "max_iterations"]),
        ),
        (
            json!({"registered_marketplaces": [{"name": "1m", "source": "x y"}]}),
            "value_error",
            json!(["body", "registered_marketplaces", 0, "name"]),
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

fn profile(json: &Value) -> ProfileSave {
    let mut check = crate::http::pydantic::validation::Checker::new("body");
    let read = crate::http::pydantic::body::FromJson::from_json(&mut check, json);
    check.finish(read).expect("valid")
}

#[test]
fn a_null_in_a_patch_restores_the_default_and_secrets_stay_unless_they_are_cleared() {
    let mut document = SettingsDocument::default();
    let first = json!({"agent_settings_diff": {"llm": {"model": "openai/a", "api_key": "k", "temperature": 0.2},
        "condenser": {"max_size": 100, "keep_first": 4}, "verification": {"critic_api_key": "c", "critic_enabled": true}}});
    changed(&mut document, &first);
    let agent = |document: &SettingsDocument| user(document, true)["agent_settings"].clone();
    changed(
        &mut document,
        &json!({"agent_settings_diff": {"condenser": null, "verification": {"critic_api_key": MASK}}}),
    );
    let shown = agent(&document);
    assert_eq!((&shown["condenser"]["max_size"], &shown["condenser"]["keep_first"]), (&json!(240), &json!(2)));
    assert_eq!(shown["verification"]["critic_api_key"], "c");
    changed(
        &mut document,
        &json!({"agent_settings_diff": {"llm": {"api_key": null, "temperature": null}, "verification": null}}),
    );
    let shown = agent(&document);
    assert_eq!(
        (&shown["llm"]["api_key"], &shown["llm"]["temperature"], &shown["llm"]["model"]),
        (&json!(null), &json!(null), &json!("openai/a"))
    );
    assert_eq!(shown["verification"]["critic_enabled"], false);
    changed(
        &mut document,
        &json!({"disabled_skills": ["a"], "user_consents_to_analytics": true, "title_llm_profile": "x"}),
    );
    changed(
        &mut document,
        &json!({"disabled_skills": null, "user_consents_to_analytics": null, "title_llm_profile": null}),
    );
    let shown = settings(&document);
    assert_eq!((&shown["disabled_skills"], &shown["user_consents_to_analytics"]), (&json!(["a"]), &json!(true)));
    assert_eq!(shown["title_llm_profile"], Value::Null);
}

#[test]
fn a_default_address_does_not_stay_for_a_model_of_another_provider() {
    let mut document = SettingsDocument::default();
    changed(&mut document, &json!({"llm_model": "openai/a", "llm_base_url": "https://api.openai.com"}));
    assert_eq!(settings(&document)["agent_settings"]["llm"]["base_url"], Value::Null);
    changed(&mut document, &json!({"agent_settings_diff": {"llm": {"model": "anthropic/b"}}}));
    assert_eq!(settings(&document)["llm_base_url"], Value::Null);
    changed(&mut document, &json!({"llm_base_url": "https://proxy.example"}));
    changed(&mut document, &json!({"llm_model": "openai/a"}));
    assert_eq!(settings(&document)["llm_base_url"], "https://proxy.example");
}

#[test]
fn whole_nested_objects_are_refused_unless_they_are_what_was_shown() {
    let mut document = SettingsDocument::default();
    changed(&mut document, &json!({"llm_model": "m", "llm_api_key": "k"}));
    for shown in [settings(&document), user(&document, false)] {
        let back = json!({"agent_settings": shown["agent_settings"], "conversation_settings": shown["conversation_settings"], "language": "de"});
        changed(&mut document, &back);
    }
    let mut other = settings(&document)["agent_settings"].clone();
    other["llm"]["model"] = json!("other");
    for (body, keys) in [
        (json!({"agent_settings": other}), vec!["agent_settings"]),
        (json!({"conversation_settings": {}, "agent_settings": {}}), vec!["agent_settings", "conversation_settings"]),
    ] {
        let changes = SettingsChanges::read(&body).expect("valid");
        let Err(Error::Invalid(violations)) = document.change(&changes) else { panic!("accepted: {body}") };
        let shown = serde_json::to_value(&violations).expect("JSON");
        assert!(violations.len() == keys.len() && violations.iter().all(|one| one.kind == LEGACY_KEY), "{shown}");
        for (index, key) in keys.iter().enumerate() {
            assert_eq!(shown[index]["loc"], json!(["body", key]));
        }
    }
    assert_eq!(settings(&document)["llm_model"], "m");
}

#[test]
fn the_settings_have_the_model_of_the_active_profile() {
    let mut document = SettingsDocument::default();
    changed(&mut document, &json!({"llm_model": "openai/a", "llm_api_key": "k"}));
    assert_eq!(document.llm_profiles().iter().count(), 0, "profiles come only by request");
    document.save_profile("one", &profile(&json!({}))).expect("saved");
    document
        .save_profile("two", &profile(&json!({"llm": {"model": "openai/b", "api_key": "k2", "temperature": 0.5}})))
        .expect("saved");
    document.activate_profile("two").expect("active");
    let shown = user(&document, true);
    assert_eq!((&shown["llm_model"], &shown["llm_api_key"]), (&json!("openai/b"), &json!("k2")));
    assert_eq!(shown["agent_settings"]["llm"]["temperature"], 0.5);
    // Both ways of changing the model change the active profile, and leave it active.
    changed(&mut document, &json!({"agent_settings_diff": {"llm": {"temperature": 0.7}}}));
    changed(&mut document, &json!({"llm_model": "openai/c"}));
    changed(&mut document, &json!({"language": "de"}));
    let profiles = document.llm_profiles();
    let two = profiles.get("two").expect("a profile");
    assert_eq!(
        (profiles.active(), two.model(), &two.fields()["temperature"]),
        (Some("two"), Some("openai/c"), &json!(0.7))
    );
    assert_eq!(profiles.get("one").and_then(Llm::model), Some("openai/a"));
    document.save_profile("two", &profile(&json!({"llm": {"model": "openai/d"}}))).expect("saved");
    assert_eq!(user(&document, true)["llm_model"], "openai/d");
    assert_eq!(user(&document, true)["llm_api_key"], "k2", "a key that is not sent stays");
    changed(&mut document, &json!({"title_llm_profile": "two"}));
    document.rename_profile("two", "three").expect("renamed");
    assert_eq!(settings(&document)["title_llm_profile"], "three");
    assert!(document.delete_profile("three"));
    let shown = user(&document, true);
    assert_eq!((&shown["llm_model"], &shown["title_llm_profile"]), (&json!("openai/a"), &Value::Null));
    assert_eq!(document.llm_profiles().active(), Some("one"));
    assert!(document.delete_profile("one") && !document.delete_profile("one"));
    assert_eq!((document.llm_profiles().active(), document.llm().model()), (None, Some("openai/a")));
}

#[test]
fn the_key_of_a_profile_stays_until_it_is_cleared() {
    let mut document = SettingsDocument::default();
    changed(&mut document, &json!({"llm_model": "openai/a", "llm_api_key": "of settings"}));
    let key = |document: &SettingsDocument| document.llm_profiles().get("p").and_then(Llm::api_key).map(str::to_owned);
    for (body, expected) in [
        (json!({"llm": {"model": "m", "api_key": "k"}}), Some("k")),
        (json!({"llm": {"model": "m"}}), Some("k")),
        (json!({"llm": {"model": "m", "api_key": MASK}}), Some("k")),
        (json!({"llm": {"model": "m", "api_key": "new"}, "preserve_existing_api_key": true}), Some("k")),
        (json!({"preserve_existing_api_key": true}), Some("k")),
        (json!({}), Some("of settings")),
        (json!({"llm": {"model": "m", "api_key": null}}), None),
        (json!({"llm": {"model": "m", "api_key": "k"}}), Some("k")),
        (json!({"llm": {"model": "m", "api_key": " "}}), None),
        (json!({"llm": {"model": "m", "api_key": "k"}, "include_secrets": false}), None),
        (json!({"llm": {"model": "m", "api_key": MASK}}), None),
    ] {
        document.save_profile("p", &profile(&body)).expect("saved");
        assert_eq!(key(&document).as_deref(), expected, "{body}");
    }
    let large = profile(&json!({"llm": {"model": "m", "extra_headers": {"X": "x".repeat(17_000)}}}));
    assert!(matches!(document.save_profile("p", &large), Err(Error::TooLarge(_))));
    let mut empty = SettingsDocument::default();
    assert!(matches!(empty.save_profile("p", &profile(&json!({}))), Err(Error::Refused(_))));
}

#[test]
fn settings_that_are_older_than_profiles_get_one() {
    let document =
        SettingsDocument::parse(r#"{"llm_model": "openai/a", "llm_api_key": "k", "condenser_max_size": 90}"#);
    let document = document.expect("a document");
    let profiles = document.llm_profiles();
    assert_eq!((profiles.active(), profiles.active_llm().and_then(Llm::api_key)), (Some("default"), Some("k")));
    let again = SettingsDocument::parse(&document.to_json().expect("small")).expect("a document");
    assert_eq!(again.llm_profiles(), profiles);
    assert_eq!(SettingsDocument::parse("{}").expect("a document").llm_profiles(), LlmProfiles::default());
    // Settings that are written now have none, and get none.
    let mut new = SettingsDocument::default();
    changed(&mut new, &json!({"llm_model": "openai/a"}));
    let new = SettingsDocument::parse(&new.to_json().expect("small")).expect("a document");
    assert_eq!(new.llm_profiles(), LlmProfiles::default());
}

#[test]
fn a_settings_file_may_have_the_form_of_later_versions() {
    let mut shown = SettingsDocument::default();
    changed(
        &mut shown,
        &json!({"agent_settings_diff": {"llm": {"model": "m", "api_key": "k", "temperature": 0.3},
        "mcp_config": {"a": {"url": "https://a.example"}}}, "conversation_settings_diff": {"max_iterations": 7}}),
    );
    shown.save_profile("p", &profile(&json!({}))).expect("saved");
    let mut file = user(&shown, true);
    for name in ["llm_model", "llm_api_key", "mcp_config", "max_iterations"] {
        file[name] = Value::Null;
    }
    let read = SettingsDocument::parse(&file.to_string()).expect("a document");
    assert_eq!((read.llm(), read.llm_profiles()), (shown.llm(), shown.llm_profiles()));
    assert_eq!(user(&read, true)["max_iterations"], 7);
    assert_eq!(user(&read, true)["agent_settings"], user(&shown, true)["agent_settings"]);
}

#[test]
fn the_model_of_the_environment_becomes_a_profile_once() {
    let given = |model: &str, key: &str| {
        SettingsDocument::parse_given(&json!({"llm_model": model, "llm_api_key": key}).to_string()).expect("a document")
    };
    let state = |document: &SettingsDocument| {
        let profiles = document.llm_profiles();
        let names: Vec<String> = profiles.iter().map(|(name, _)| name.to_owned()).collect();
        (names.join(","), profiles.active().map(str::to_owned), document.llm().model().map(str::to_owned))
    };
    let some = |text: &str| Some(text.to_owned());
    let mut document = SettingsDocument::default();
    document.merge(&given("openai/a", "k"));
    assert_eq!(state(&document), ("default".to_owned(), some("default"), some("openai/a")));
    // The user's later choice stays while the environment is the same.
    document.save_profile("own", &profile(&json!({"llm": {"model": "openai/own"}}))).expect("saved");
    document.activate_profile("own").expect("active");
    document.merge(&given("openai/a", "k"));
    assert_eq!(state(&document), ("default,own".to_owned(), some("own"), some("openai/own")));
    // Another one changes the profile, not the choice.
    document.merge(&given("openai/b", "k2"));
    assert_eq!(state(&document), ("default,own".to_owned(), some("own"), some("openai/own")));
    assert_eq!(document.llm_profiles().get("default").and_then(Llm::api_key), Some("k2"));
    // A profile that the user has deleted is not made again.
    document.delete_profile("default");
    document.merge(&given("openai/b", "k2"));
    document.merge(&given("openai/c", "k3"));
    assert_eq!(state(&document), ("own".to_owned(), some("own"), some("openai/own")));
    // Without any profile the settings get the model.
    document.delete_profile("own");
    document.merge(&given("openai/d", "k4"));
    assert_eq!(state(&document), (String::new(), None, some("openai/d")));
    // A key alone completes the model of the settings.
    let mut older =
        SettingsDocument::parse(r#"{"llm_model": "openai/a", "llm_base_url": "http://x"}"#).expect("a document");
    older.merge(&SettingsDocument::parse_given(r#"{"llm_api_key": "k"}"#).expect("a document"));
    assert_eq!(state(&older), ("default".to_owned(), some("default"), some("openai/a")));
    assert_eq!((older.llm().api_key(), older.llm().base_url()), (Some("k"), Some("http://x")));
}
