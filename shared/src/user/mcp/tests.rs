use serde_json::{Map, Value, json};

use super::show::shown_server;
use super::*;
use crate::http::pydantic::validation::Loc;
use crate::http::secret::MASK;
use crate::mask;

/// Sends a change: the places of its faults, without the servers' names in front if there are none.
fn change(servers: &mut Servers, value: &Value) -> Vec<String> {
    let mut check = Checker::new("");
    if let Some(change) = McpChange::read(&mut check, value) {
        change.apply(&mut check, servers);
    }
    let Err(violations) = check.finish(Some(())) else { return Vec::new() };
    let shown = serde_json::to_string(&violations).expect("JSON");
    assert!(!shown.contains("canary"), "{shown}");
    violations
        .iter()
        .map(|violation| {
            let steps = violation.loc[1..].iter().map(|step| match step {
                Loc::Key(key) => key.to_string(),
                Loc::Index(index) => index.to_string(),
            });
            format!("{} {}", steps.collect::<Vec<_>>().join("."), violation.kind)
        })
        .collect()
}

#[track_caller]
fn changed(servers: &mut Servers, value: &Value) {
    assert_eq!(change(servers, value), Vec::<String>::new(), "{value}");
}

/// One server of every kind.
fn every_kind() -> Servers {
    let mut servers = Servers::new();
    changed(
        &mut servers,
        &json!({
            "plain": {"url": "https://plain.example/mcp"},
            "sse": {"url": "https://sse.example/sse", "transport": "sse"},
            "keyed": {"url": "https://keyed.example/mcp", "api_key": "canary-1", "timeout": 30.0},
            "other header": {"url": "https://o.example", "auth": {"strategy": "api_key", "value": "canary-2", "header_name": "X-Key"}},
            "bearer": {"url": "https://b.example", "transport": "streamable-http", "headers": {"Authorization": "Bearer canary-3", "X-A": "canary-4"}},
            "basic": {"url": "https://basic.example", "auth": {"strategy": "basic", "username": "canary-5", "password": ""}},
            "headers": {"url": "https://h.example", "auth": {"strategy": "header", "headers": {"X-B": "canary-6"}}},
            "open": {"url": "https://open.example", "auth": {"strategy": "none"}},
            "oauth": {"url": "https://oauth.example", "auth": {"strategy": "oauth2",
                "authentication": {"type": "oauth", "client_id": "id", "client_secret": "canary-7"},
                "state": {"tokens": {"access_token": "canary-8", "expires_in": 5, "more": ["canary-9"]}}}},
            "oauth-new": {"url": "https://oauth.example/new", "auth": "oauth"},
            "off": {"url": "https://off.example", "type": "http", "enabled": false, "sse_read_timeout": 1.5, "keep_alive": false,
                    "description": "d", "icon": "i"},
            "process": {"command": "npx", "args": ["-y", "x"], "env": {"T": "canary-10"}},
            "process with all": {"type": "stdio", "command": "/opt/my tool", "args": ["a"], "cwd": "/workspace", "env": {"U": "canary-11"},
                    "timeout": 2.5, "description": "d"},
            "bare": {"command": "uvx", "args": [], "env": {}},
        }),
    );
    servers
}

#[test]
fn what_is_shown_and_sent_back_changes_nothing() {
    let before = every_kind();
    let by_name = Value::Object(shown(&before, false));
    assert!(!by_name.to_string().contains("canary"), "{by_name:#}");
    let whole = shown_with_lists(&before, false);
    assert!(!whole.to_string().contains("canary"), "{whole:#}");
    for (what, back) in [
        ("by name", by_name.clone()),
        ("in mcpServers", json!({"mcpServers": by_name})),
        ("lists and names", whole),
        ("by name, in clear", Value::Object(shown(&before, true))),
        ("lists and names, in clear", shown_with_lists(&before, true)),
    ] {
        let mut servers = before.clone();
        changed(&mut servers, &back);
        assert_eq!(servers, before, "{what}");
        assert!(servers.keys().eq(before.keys()), "{what}: the order");
    }
    for (name, server) in shown(&before, false) {
        let mut servers = before.clone();
        changed(&mut servers, &Value::Object(Map::from_iter([(name.clone(), server)])));
        assert_eq!(servers, before, "{name}");
    }
    assert_eq!(stored(&Value::Object(before.clone())), before, "what is stored is read as it is");
}

#[test]
fn older_clients_see_the_servers_that_work_the_same_in_their_lists() {
    let all = shown_with_lists(&every_kind(), false);
    assert_eq!(all["sse_servers"], json!([{"url": "https://sse.example/sse", "api_key": null}]));
    assert_eq!(
        all["shttp_servers"],
        json!([{"url": "https://plain.example/mcp", "api_key": null, "timeout": null},
               {"url": "https://keyed.example/mcp", "api_key": MASK, "timeout": 30}])
    );
    assert_eq!(
        all["stdio_servers"],
        json!([{"name": "process", "command": "npx", "args": ["-y", "x"], "env": {"T": MASK}},
               {"name": "bare", "command": "uvx", "args": [], "env": {}}])
    );
    assert_eq!(
        all["oauth"]["auth"]["authentication"],
        json!({"type": "oauth", "client_id": "id", "client_secret": MASK})
    );
    assert_eq!(all["oauth"]["auth"]["state"]["tokens"], json!({"access_token": MASK, "expires_in": 5, "more": [MASK]}));
    assert_eq!(shown_with_lists(&Servers::new(), false), Value::Null);
}

#[test]
fn lists_replace_all_servers_and_keep_what_they_mask() {
    let mut servers = every_kind();
    changed(
        &mut servers,
        &json!({
            "sse_servers": ["https://sse.example/sse", {"url": "https://new.example/sse", "api_key": "k"}],
            "stdio_servers": [{"name": "process", "command": "npx", "args": ["-y", "x"], "env": {"T": MASK, "V": "v"}}],
            "shttp_servers": [{"url": "https://keyed.example/mcp", "api_key": MASK, "timeout": 9}, {"url": "https://n.example"}],
        }),
    );
    assert_eq!(
        Value::Object(servers.clone()),
        json!({
            "sse": {"url": "https://sse.example/sse", "transport": "sse"},
            "keyed": {"url": "https://keyed.example/mcp", "auth": {"strategy": "api_key", "value": "canary-1"}, "timeout": 9},
            "process": {"command": "npx", "args": ["-y", "x"], "env": {"T": "canary-10", "V": "v"}},
            "sse_1": {"transport": "sse", "url": "https://new.example/sse", "auth": {"strategy": "api_key", "value": "k"}},
            "shttp": {"transport": "http", "url": "https://n.example", "timeout": 60},
        })
    );
    // A masked key does not go to another address, nor a masked variable to another program.
    assert_eq!(
        change(&mut servers, &json!({"shttp_servers": [{"url": "https://evil.example", "api_key": MASK}]})),
        ["shttp_servers.0.api_key value_error"]
    );
    let other = json!({"stdio_servers": [{"name": "process", "command": "sh", "args": [], "env": {"T": MASK}}]});
    assert_eq!(change(&mut servers, &other), ["stdio_servers.0.env.T value_error"]);
    changed(&mut servers, &json!({"sse_servers": []}));
    assert!(servers.is_empty());
}

/// Clients that know nothing of the servers by name beside the lists send them back.
#[test]
fn lists_with_servers_by_name_change_what_differs_from_what_was_shown() {
    let before = every_kind();
    let mut back = shown_with_lists(&before, false);
    back["shttp_servers"].as_array_mut().expect("a list").retain(|server| server["timeout"] == 30);
    back["sse_servers"] = json!([]);
    back["stdio_servers"][0]["args"] = json!(["-y", "x"]);
    back["off"]["enabled"] = json!(true);
    back["oauth"] = Value::Null;
    back["added"] = json!({"url": "https://added.example"});
    let mut servers = before.clone();
    changed(&mut servers, &back);
    let mut expected = before;
    for gone in ["plain", "sse", "oauth"] {
        expected.shift_remove(gone);
    }
    expected["off"].as_object_mut().expect("a server").shift_remove("enabled");
    expected.insert("added".to_owned(), json!({"url": "https://added.example"}));
    assert_eq!(servers, expected);
}

#[test]
fn a_patch_is_merged_at_every_depth() {
    let mut servers = every_kind();
    changed(
        &mut servers,
        &json!({
            "bearer": {"headers": {"x-a": "canary-20", "X-C": "c"}, "timeout": 5},
            "process": {"env": {"V": "v"}, "args": ["-y", "x"]},
            "oauth": {"auth": {"state": {"tokens": {"expires_in": 6}}, "authentication": {"client_secret": null}}},
            "other header": {"auth": {"strategy": "bearer"}},
            "plain": null,
            "unknown": null,
            "off": {"enabled": true, "icon": null, "description": null, "keep_alive": null, "sse_read_timeout": null, "transport": null},
        }),
    );
    assert_eq!(
        servers["bearer"],
        json!({"url": "https://b.example", "transport": "streamable-http", "timeout": 5,
               "auth": {"strategy": "bearer", "value": "canary-3"}, "headers": {"x-a": "canary-20", "X-C": "c"}})
    );
    assert_eq!(servers["process"]["env"], json!({"T": "canary-10", "V": "v"}));
    assert_eq!(
        servers["oauth"]["auth"]["state"]["tokens"],
        json!({"access_token": "canary-8", "expires_in": 6, "more": ["canary-9"]})
    );
    assert_eq!(servers["oauth"]["auth"]["authentication"], json!({"type": "oauth", "client_id": "id"}));
    assert_eq!(servers["other header"]["auth"], json!({"strategy": "bearer", "value": "canary-2"}));
    assert_eq!(servers["off"], json!({"url": "https://off.example"}));
    assert!(!servers.contains_key("plain") && !servers.contains_key("unknown"));
    changed(&mut servers, &json!({}));
    assert_eq!(servers.len(), 13);
    changed(&mut servers, &Value::Null);
    assert!(servers.is_empty());
}

#[test]
fn a_header_and_auth_that_stand_for_the_same_credential_replace_each_other() {
    let with = |auth: Value| Servers::from_iter([("a".to_owned(), json!({"url": "https://a.example", "auth": auth}))]);
    let bearer = json!({"strategy": "bearer", "value": "old"});
    let key = json!({"strategy": "api_key", "value": "old", "header_name": "X-Key"});
    let basic = json!({"strategy": "basic", "username": "u", "password": "p"});
    for (stored, patch, expected) in [
        (
            &bearer,
            json!({"headers": {"authorization": "Bearer new"}}),
            json!({"auth": {"strategy": "bearer", "value": "new"}}),
        ),
        (
            &basic,
            json!({"headers": {"Authorization": "Bearer new"}}),
            json!({"auth": {"strategy": "bearer", "value": "new"}}),
        ),
        (
            &bearer,
            json!({"headers": {"Authorization": "Token new"}}),
            json!({"headers": {"Authorization": "Token new"}}),
        ),
        (&bearer, json!({"headers": {"Authorization": MASK}}), json!({"auth": bearer})),
        (
            &bearer,
            json!({"headers": {"Authorization": format!("Bearer {MASK}"), "X-A": "1"}}),
            json!({"auth": bearer, "headers": {"X-A": "1"}}),
        ),
        (&bearer, json!({"headers": {"Authorization": null}}), json!({})),
        (&bearer, json!({"headers": null}), json!({})),
        (&bearer, json!({"auth": null}), json!({})),
        (&key, json!({"headers": {"x-key": "new"}}), json!({"headers": {"x-key": "new"}})),
        (&key, json!({"headers": {"X-Other": "new"}}), json!({"auth": key, "headers": {"X-Other": "new"}})),
        (
            &key,
            json!({"auth": {"strategy": "bearer", "value": "new", "header_name": null}}),
            json!({"auth": {"strategy": "bearer", "value": "new"}}),
        ),
        (&key, json!({"auth": "text"}), json!({"auth": {"strategy": "bearer", "value": "text"}})),
        (&key, json!({"auth": MASK}), json!({"auth": key})),
        (&key, json!({"api_key": MASK}), json!({"auth": key})),
        (&bearer, json!({"api_key": "new"}), json!({"auth": {"strategy": "api_key", "value": "new"}})),
    ] {
        let mut servers = with(stored.clone());
        changed(&mut servers, &json!({"a": patch}));
        let mut expected = expected;
        expected["url"] = json!("https://a.example");
        assert_eq!(servers["a"], expected, "{stored} and {patch}");
    }
}

#[test]
fn secrets_stay_with_their_endpoint() {
    for (patch, again) in [
        (json!({"keyed": {"url": "https://evil.example"}}), vec!["keyed.auth.value"]),
        (json!({"keyed": {"url": "https://evil.example", "api_key": MASK}}), vec!["keyed.auth.value"]),
        (json!({"keyed": {"url": "https://evil.example", "auth": {"strategy": "bearer"}}}), vec!["keyed.auth.value"]),
        (
            json!({"bearer": {"url": "https://evil.example", "headers": {"X-A": MASK}}}),
            vec!["bearer.headers.X-A", "bearer.auth.value"],
        ),
        (json!({"bearer": {"url": "https://evil.example", "headers": {"X-A": "new"}}}), vec!["bearer.auth.value"]),
        (json!({"basic": {"url": "https://evil.example"}}), vec!["basic.auth.username", "basic.auth.password"]),
        (json!({"headers": {"url": "https://evil.example"}}), vec!["headers.auth.headers.X-B"]),
        (
            json!({"oauth": {"url": "https://evil.example"}}),
            vec![
                "oauth.auth.authentication.client_secret",
                "oauth.auth.state.tokens.access_token",
                "oauth.auth.state.tokens.more.0",
            ],
        ),
        (json!({"process": {"command": "sh"}}), vec!["process.env.T"]),
        (json!({"process": {"args": ["-c", "env"]}}), vec!["process.env.T"]),
        (json!({"process": {"cwd": "/tmp"}}), vec!["process.env.T"]),
        (json!({"process": {"args": null, "env": {"T": MASK}}}), vec!["process.env.T"]),
        (json!({"process": {"command": null, "args": null, "url": "https://evil.example", "env": null}}), vec![]),
        (json!({"keyed": {"url": "https://evil.example", "auth": null}}), vec![]),
        (json!({"keyed": {"url": "https://evil.example", "api_key": "new"}}), vec![]),
        (json!({"bearer": {"url": "https://evil.example", "headers": null}}), vec![]),
        (
            json!({"bearer": {"url": "https://evil.example", "headers": {"Authorization": "Bearer new", "X-A": null}}}),
            vec![],
        ),
        // A server of another name: masks stand for nothing, unless it takes the place of the one with its endpoint.
        (json!({"new": {"url": "https://keyed.example/mcp", "api_key": MASK}}), vec!["new.auth.strategy"]),
        (json!({"new": {"url": "https://b.example", "headers": {"X-A": MASK}}}), vec!["new.headers.X-A"]),
        (
            json!({"bearer": null, "new": {"url": "https://evil.example", "headers": {"X-A": MASK}}}),
            vec!["new.headers.X-A"],
        ),
        (json!({"process": null, "new": {"command": "npx", "env": {"T": MASK}}}), vec!["new.env.T"]),
        (json!({"new": {"url": "https://n.example", "auth": {"strategy": "bearer"}}}), vec!["new.auth.value"]),
    ] {
        let before = every_kind();
        let mut servers = before.clone();
        let faults = change(&mut servers, &patch);
        let expected: Vec<String> = again.iter().map(|place| format!("{place} value_error")).collect();
        assert_eq!(faults, expected, "{patch}");
        assert_eq!(servers == before, !again.is_empty(), "{patch}: all or nothing");
    }
}

#[test]
fn a_renamed_server_keeps_masked_secrets_while_its_endpoint_is_the_same() {
    let before = every_kind();
    for name in ["keyed", "other header", "bearer", "basic", "headers", "oauth", "process", "process with all", "off"] {
        let mut servers = before.clone();
        let shown = shown_server(&servers[name], false);
        changed(
            &mut servers,
            &Value::Object(Map::from_iter([(name.to_owned(), Value::Null), ("new".to_owned(), shown)])),
        );
        assert_eq!(servers["new"], before[name], "{name}");
        assert!(!servers.contains_key(name));
    }
    let mut servers = before.clone();
    let renamed = json!({"url": "https://b.example", "transport": "streamable-http",
                         "headers": {"Authorization": format!("Bearer {MASK}"), "X-A": MASK}});
    changed(&mut servers, &json!({"bearer": null, "new": renamed}));
    assert_eq!(servers["new"], before["bearer"]);
    // What the new entry does not name is gone: it is a whole entry.
    let mut servers = before;
    changed(&mut servers, &json!({"bearer": null, "new": {"url": "https://b.example"}}));
    assert_eq!(servers["new"], json!({"url": "https://b.example"}));
}

#[test]
fn faults_name_the_place_and_no_value() {
    let long = "canary".repeat(20_000);
    let many: Map<String, Value> = (0..101).map(|n| (format!("H{n}"), json!("canary"))).collect();
    for (value, expected) in [
        (json!("canary"), " dict_type"),
        (json!(["canary"]), " dict_type"),
        (json!({"a": ["canary"]}), "a dict_type"),
        (json!({"a": "canary"}), "a dict_type"),
        (json!({"a": {"url": "https://a", "secret": "canary"}}), "a.secret extra_forbidden"),
        (json!({"a": {}}), "a value_error"),
        (json!({"a": {"url": "https://a", "command": "canary"}}), "a value_error"),
        (json!({"keyed": {"command": "canary"}}), "keyed value_error"),
        (json!({"keyed": {"url": null}}), "keyed value_error"),
        (json!({"a": {"url": {"k": "canary"}}}), "a.url string_type"),
        (json!({"a": {"url": "ftp://canary"}}), "a.url value_error"),
        (json!({"a": {"url": long}}), "a.url string_too_long"),
        (json!({"a": {"url": "https://a", "transport": "shttp"}}), "a.transport literal_error"),
        (json!({"a": {"url": "https://a", "type": "canary"}}), "a.type literal_error"),
        (json!({"a": {"url": "https://a", "type": "sse", "transport": "http"}}), "a.transport value_error"),
        (json!({"a": {"url": "https://a", "transport": "stdio"}}), "a.transport value_error"),
        (json!({"a": {"command": "a", "transport": "sse"}}), "a.transport value_error"),
        (json!({"a": {"command": "a", "headers": {"X": "canary"}}}), "a.headers value_error"),
        (json!({"a": {"url": "https://a", "env": {"X": "canary"}}}), "a.env value_error"),
        (json!({"a": {"url": "https://a", "headers": {"X Y": "canary"}}}), "a.headers.X Y value_error"),
        (json!({"a": {"url": "https://a", "headers": {"X": "canary\r\nY: z"}}}), "a.headers.X value_error"),
        (json!({"a": {"url": "https://a", "headers": {"X": 1}}}), "a.headers.X string_type"),
        (json!({"a": {"url": "https://a", "headers": {"X": "canary", "x": "canary"}}}), "a.headers.x value_error"),
        (json!({"a": {"url": "https://a", "headers": many}}), "a.headers too_long"),
        (json!({"a": {"url": "https://a", "headers": {"X": "canary".repeat(20_000)}}}), "a.headers.X too_long"),
        (json!({"a": {"url": "https://a", "auth": ["canary"]}}), "a.auth dict_type"),
        (json!({"a": {"url": "https://a", "auth": {"strategy": "canary"}}}), "a.auth.strategy literal_error"),
        (json!({"a": {"url": "https://a", "auth": {"value": "canary"}}}), "a.auth.strategy value_error"),
        (
            json!({"a": {"url": "https://a", "auth": {"strategy": "bearer", "token": "canary"}}}),
            "a.auth.token extra_forbidden",
        ),
        (
            json!({"a": {"url": "https://a", "auth": {"strategy": "none", "value": "canary"}}}),
            "a.auth.value value_error",
        ),
        (
            json!({"a": {"url": "https://a", "auth": {"strategy": "api_key", "value": "canary", "header_name": "X Y"}}}),
            "a.auth.header_name value_error",
        ),
        (json!({"a": {"url": "https://a", "auth": "canary", "api_key": "canary"}}), "a.api_key value_error"),
        (json!({"a": {"command": "a", "env": {"X=Y": "canary"}}}), "a.env.X=Y value_error"),
        (json!({"a": {"command": " "}}), "a.command value_error"),
        (json!({"a": {"command": "a", "args": "canary"}}), "a.args list_type"),
        (json!({"a": {"command": "a", "args": ["a", {"canary": 1}]}}), "a.args.1 string_type"),
        (json!({"a": {"command": "a", "args": vec!["canary"; 1001]}}), "a.args too_long"),
        (json!({"a": {"command": "a", "timeout": 0}}), "a.timeout value_error"),
        (json!({"a": {"command": "a", "timeout": "canary"}}), "a.timeout float_parsing"),
        (json!({"a": {"command": "a", "timeout": 86401}}), "a.timeout value_error"),
        (json!({"a": {"command": "a", "enabled": "canary"}}), "a.enabled bool_parsing"),
        (json!({" ": {"command": "a"}}), "  value_error"),
        (json!({"x".repeat(257): {"command": "a"}}), &format!("{} value_error", "x".repeat(257))),
        (json!({"mcpServers": ["canary"]}), "mcpServers dict_type"),
        (json!({"mcpServers": {"a": {"secret": "canary"}}}), "mcpServers.a.secret extra_forbidden"),
        (json!({"mcpServers": {"a": {}}}), "mcpServers.a value_error"),
        (json!({"mcpServers": {}, "a": {"url": "https://a"}}), "a extra_forbidden"),
        (json!({"sse_servers": ["ftp://canary"]}), "sse_servers.0.url value_error"),
        (json!({"sse_servers": "canary"}), "sse_servers list_type"),
        (
            json!({"shttp_servers": [{"url": "https://a", "api_key": ["canary"]}]}),
            "shttp_servers.0.api_key string_type",
        ),
        (json!({"shttp_servers": [{"url": "https://a", "timeout": 3601}]}), "shttp_servers.0.timeout value_error"),
        (json!({"stdio_servers": [{"name": "a b", "command": "c"}]}), "stdio_servers.0.name value_error"),
        (json!({"stdio_servers": [{"name": "a", "command": "c d"}]}), "stdio_servers.0.command value_error"),
        (
            json!({"stdio_servers": [{"name": "a", "command": "c"}, {"name": "a", "command": "d"}]}),
            "stdio_servers.1 value_error",
        ),
        (
            json!({"stdio_servers": [{"name": "a", "command": "c", "env": {"A": ["canary"]}}]}),
            "stdio_servers.0.env.A string_type",
        ),
    ] {
        let before = every_kind();
        let mut servers = before.clone();
        assert_eq!(change(&mut servers, &value), [expected], "{value}");
        assert_eq!(servers, before);
    }
    let too_many: Map<String, Value> = (0..101).map(|n| (format!("S{n}"), json!({"command": "a"}))).collect();
    assert_eq!(change(&mut Servers::new(), &Value::Object(too_many)), [" too_long"]);
    // All faults of a request at once.
    let both = json!({"a": {"command": "a", "timeout": 0, "secret": "canary"}, "b": {}, "sse_servers": ["x"]});
    assert_eq!(
        change(&mut Servers::new(), &both),
        ["a.timeout value_error", "a.secret extra_forbidden", "sse_servers.0.url value_error"]
    );
}

#[test]
fn agents_get_the_form_that_all_agent_servers_accept() {
    let servers = McpServers::new(every_kind());
    assert_eq!(
        Value::Object(servers.for_agent()),
        json!({
            "plain": {"url": "https://plain.example/mcp"},
            "sse": {"url": "https://sse.example/sse", "transport": "sse"},
            "keyed": {"url": "https://keyed.example/mcp", "headers": {"Authorization": "Bearer canary-1"}, "timeout": 30_000},
            "other header": {"url": "https://o.example", "headers": {"X-Key": "canary-2"}},
            "bearer": {"url": "https://b.example", "transport": "streamable-http", "headers": {"X-A": "canary-4", "Authorization": "Bearer canary-3"}},
            "basic": {"url": "https://basic.example", "headers": {"Authorization": "Basic Y2FuYXJ5LTU6"}},
            "headers": {"url": "https://h.example", "headers": {"X-B": "canary-6"}},
            "open": {"url": "https://open.example"},
            "oauth": {"url": "https://oauth.example", "headers": {"Authorization": "Bearer canary-8"}},
            "process": {"command": "npx", "args": ["-y", "x"], "env": {"T": "canary-10"}},
            "process with all": {"command": "/opt/my tool", "args": ["a"], "cwd": "/workspace", "env": {"U": "canary-11"}, "timeout": 2500},
            "bare": {"command": "uvx"},
        })
    );
    assert_eq!(servers.without_token().collect::<Vec<_>>(), ["oauth-new"]);
    // What an agent server may repeat of them is masked.
    let secrets = mask::secrets_in(&json!({"agent": {"mcp_config": servers.for_agent()}}));
    for sent in [
        "canary-1",
        "canary-2",
        "canary-3",
        "canary-4",
        "Y2FuYXJ5LTU6",
        "canary-6",
        "canary-8",
        "canary-10",
        "canary-11",
    ] {
        assert!(secrets.iter().any(|secret| secret == sent), "{sent}: {secrets:?}");
    }
    let shown = format!("{servers:?}");
    assert!(shown.contains("keyed") && !shown.contains("canary"), "{shown}");
    let in_urls = json!({"a": {"url": "https://u:canary-12@a.example/mcp?key=canary%2D13&v=1"}});
    let secrets = mask::secrets_in(&Value::Object(McpServers::new(given(&in_urls).expect("valid")).for_agent()));
    for sent in ["canary%2D13", "canary-12", "canary-13"] {
        assert!(secrets.iter().any(|secret| secret == sent), "{sent}: {secrets:?}");
    }
}

#[test]
fn every_form_that_was_ever_stored_is_read() {
    let lists = json!({
        "sse_servers": ["https://a.example", {"url": "https://b.example", "api_key": "k"}],
        "stdio_servers": [{"name": "sse", "command": "c"}, {"name": "p", "command": "c", "args": ["x"], "env": {"A": "1"}}],
        "shttp_servers": [{"url": "https://c.example", "api_key": null, "timeout": 60}, {"url": "https://d.example", "timeout": null}],
    });
    assert_eq!(
        Value::Object(stored(&lists)),
        json!({
            "sse": {"transport": "stdio", "command": "c"},
            "p": {"transport": "stdio", "command": "c", "args": ["x"], "env": {"A": "1"}},
            "sse_1": {"transport": "sse", "url": "https://a.example"},
            "sse_2": {"transport": "sse", "url": "https://b.example", "auth": {"strategy": "api_key", "value": "k"}},
            "shttp": {"transport": "http", "url": "https://c.example", "timeout": 60},
            "shttp_1": {"transport": "http", "url": "https://d.example"},
        })
    );
    let wrapped = json!({"mcpServers": {"a": {"url": "https://a.example", "type": "sse"}}});
    assert_eq!(Value::Object(stored(&wrapped)), json!({"a": {"transport": "sse", "url": "https://a.example"}}));
    // What no version understood: it stays, shows no secret, and no agent gets it.
    let odd =
        json!({"a": {"secret": "canary", "auth": "canary\n", "env": {"A": ["canary"]}, "headers": "canary"}, "b": 1});
    let kept = stored(&odd);
    assert_eq!(kept["a"], odd["a"]);
    assert!(!Value::Object(shown(&kept, false)).to_string().contains("canary"));
    assert!(McpServers::new(kept).for_agent().is_empty());
    for nothing in [Value::Null, json!([]), json!("x"), json!({})] {
        assert!(stored(&nothing).is_empty());
    }
}

/// Older clients' lists, in every form that the reference's models take, and what they mean.
#[test]
fn lists_are_read_in_the_forms_of_the_reference() {
    let process = |fields: Value| {
        let mut server = json!({"name": "a", "command": "c"});
        server.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        json!({"stdio_servers": [server]})
    };
    let http = |fields: Value| {
        let mut server = json!({"url": "https://a.example"});
        server.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
        json!({"shttp_servers": [server]})
    };
    let plain = json!({"transport": "stdio", "command": "c"});
    let with_args = |args: &[&str]| json!({"transport": "stdio", "command": "c", "args": args});
    let with_env = |env: Value| json!({"transport": "stdio", "command": "c", "env": env});
    let remote = |timeout: Value| json!({"transport": "http", "url": "https://a.example", "timeout": timeout});
    let sse = |url: &str| json!({"transport": "sse", "url": url});
    for (given, expected) in [
        (process(json!({"args": "-y mcp-remote https://x"})), with_args(&["-y", "mcp-remote", "https://x"])),
        (process(json!({"args": "--config \"a b\" --d"})), with_args(&["--config", "a b", "--d"])),
        (process(json!({"args": "  "})), plain.clone()),
        (process(json!({"args": null})), plain.clone()),
        (process(json!({"args": {}})), plain.clone()),
        (process(json!({"env": "A=b,C=d"})), with_env(json!({"A": "b", "C": "d"}))),
        (process(json!({"env": " A = b , C=d=e ,"})), with_env(json!({"A": " b", "C": "d=e"}))),
        (process(json!({"env": ""})), plain.clone()),
        (process(json!({"env": []})), plain.clone()),
        (process(json!({"env": null})), plain.clone()),
        (process(json!({"name": " a ", "command": " c "})), plain.clone()),
        (process(json!({"unknown": 1, "transport": "stdio", "description": "d"})), plain),
        (http(json!({})), remote(json!(60))),
        (http(json!({"timeout": "30"})), remote(json!(30))),
        (http(json!({"timeout": 30.0})), remote(json!(30))),
        (http(json!({"api_key": "  ", "headers": {}, "enabled": true})), remote(json!(60))),
        (json!({"shttp_servers": [" HTTPS://a.example "]}), remote(json!(60))),
        (json!({"sse_servers": ["https://a"]}), sse("https://a")),
        (json!({"sse_servers": ["http://[::1]:1/x"]}), sse("http://[::1]:1/x")),
        (json!({"sse_servers": ["Http://User:p@Host/X?y#z"]}), sse("http://User:p@Host/X?y#z")),
    ] {
        let mut servers = Servers::new();
        assert_eq!(change(&mut servers, &given), [""; 0], "{given}");
        let read: Vec<&Value> = servers.values().collect();
        assert_eq!(read, [&expected], "{given}");
    }
    for (given, fault) in [
        (process(json!({"args": "\"canary"})), "stdio_servers.0.args value_error"),
        (process(json!({"args": "canary\\"})), "stdio_servers.0.args value_error"),
        (process(json!({"args": [1]})), "stdio_servers.0.args.0 string_type"),
        (process(json!({"args": ["canary\0"]})), "stdio_servers.0.args.0 value_error"),
        (process(json!({"env": "canary"})), "stdio_servers.0.env value_error"),
        (process(json!({"env": "=canary"})), "stdio_servers.0.env value_error"),
        (process(json!({"env": "A-B=canary"})), "stdio_servers.0.env value_error"),
        (process(json!({"env": {"A": 1}})), "stdio_servers.0.env.A string_type"),
        (process(json!({"env": {"A": true}})), "stdio_servers.0.env.A string_type"),
        (process(json!({"env": {"A": "canary\0"}})), "stdio_servers.0.env.A value_error"),
        (process(json!({"command": "c\0"})), "stdio_servers.0.command value_error"),
        (process(json!({"cwd": "/canary"})), "stdio_servers.0.cwd value_error"),
        (http(json!({"headers": {"X-A": "canary"}})), "shttp_servers.0.headers value_error"),
        (http(json!({"auth": {"strategy": "bearer", "value": "canary"}})), "shttp_servers.0.auth value_error"),
        (http(json!({"enabled": false})), "shttp_servers.0.enabled value_error"),
        (http(json!({"timeout": 30.5})), "shttp_servers.0.timeout int_from_float"),
    ] {
        assert_eq!(change(&mut Servers::new(), &given), [fault], "{given}");
    }
}

/// Addresses that no client can reach, and other values that a process or a request cannot have.
#[test]
fn what_cannot_work_is_refused_when_it_is_stored() {
    for url in [
        "http://",
        "http:///canary",
        "http://?canary",
        "http:canary",
        "canary.example",
        "http://a b",
        "http://a:99999",
        "http://:80",
        "http://#x",
        "http:\\\\canary",
        "http://\\canary",
        "https://a/\nb",
        "https://a/\u{7f}",
        "file:///canary",
        "https://[::1/mcp",
        "//canary",
    ] {
        assert_eq!(change(&mut Servers::new(), &json!({"a": {"url": url}})), ["a.url value_error"], "{url:?}");
    }
    for (given, fault) in [
        (json!({"a": {"command": "c", "args": ["canary\0"]}}), "a.args.0 value_error"),
        (json!({"a": {"command": "c", "cwd": "/canary\0"}}), "a.cwd value_error"),
        (json!({"a": {"command": "c", "env": {"": "canary"}}}), "a.env. value_error"),
        (json!({"a": {"command": "c", "env": {"A": "canary\0"}}}), "a.env.A value_error"),
        (json!({"a": {"url": "https://a", "headers": {"X": "canaryü"}}}), "a.headers.X value_error"),
        (
            json!({"a": {"url": "https://a", "auth": {"strategy": "basic", "username": "can:ary", "password": "p"}}}),
            "a.auth.username value_error",
        ),
    ] {
        assert_eq!(change(&mut Servers::new(), &given), [fault], "{given}");
    }
    let mut servers = Servers::new();
    let odd = json!({"a": {"command": " /opt/my tool ", "cwd": " ", "env": {"npm_config_//r/:_authToken": "canary", "a.b-c": "canary"}}});
    assert_eq!(change(&mut servers, &odd), [""; 0]);
    assert_eq!(servers["a"]["command"], "/opt/my tool");
    assert!(servers["a"].get("cwd").is_none(), "{servers:?}");
}

/// What other clients' configuration files hold: what the server cannot do is refused, not dropped.
#[test]
fn configuration_files_of_other_clients_are_read_or_refused_whole() {
    for (given, expected) in [
        (
            json!({"mcpServers": {"fs": {"command": "npx", "args": ["-y", "fs"], "env": {"A": "b"}}}}),
            json!({"fs": {"command": "npx", "args": ["-y", "fs"], "env": {"A": "b"}}}),
        ),
        (
            json!({"mcpServers": {"a": {"type": "stdio", "command": "uvx", "args": []}}}),
            json!({"a": {"transport": "stdio", "command": "uvx"}}),
        ),
        (
            json!({"mcpServers": {"a": {"type": "http", "url": "https://a", "headers": {"Authorization": "Bearer t"}}}}),
            json!({"a": {"transport": "http", "url": "https://a", "auth": {"strategy": "bearer", "value": "t"}}}),
        ),
        (
            json!({"mcpServers": {"a": {"type": "sse", "url": "https://a", "headers": {"X-Key": "t"}}}}),
            json!({"a": {"transport": "sse", "url": "https://a", "headers": {"X-Key": "t"}}}),
        ),
        (
            json!({"mcpServers": {"a": {"url": "https://a", "timeout": "30", "enabled": "false"}}}),
            json!({"a": {"url": "https://a", "timeout": 30, "enabled": false}}),
        ),
    ] {
        let mut servers = Servers::new();
        assert_eq!(change(&mut servers, &given), [""; 0], "{given}");
        assert_eq!(Value::Object(servers), expected, "{given}");
    }
    for (server, fault) in [
        (json!({"serverUrl": "https://a"}), "serverUrl extra_forbidden"),
        (json!({"url": "https://a", "disabled": true}), "disabled extra_forbidden"),
        (json!({"command": "c", "envFile": ".env"}), "envFile extra_forbidden"),
        (json!({"command": "c", "autoApprove": ["x"]}), "autoApprove extra_forbidden"),
        (json!({"url": "https://a", "type": "streamableHttp"}), "type literal_error"),
        (json!({"url": "https://a", "type": "remote"}), "type literal_error"),
    ] {
        let given = json!({"mcpServers": {"a": server}});
        assert_eq!(change(&mut Servers::new(), &given), [format!("mcpServers.a.{fault}")], "{given}");
    }
}
