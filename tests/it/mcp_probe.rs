//! The probe of MCP servers during a start, on a stub agent server that really runs its commands.

use std::path::{Path, PathBuf};
use std::time::Duration;

use futures::stream::{self, StreamExt as _};
use serde_json::{Map, Value, json};
use shared::config::StartConfig;
use shared::start::task::{StartStatus, StartTaskRecord};

use crate::support::fault_proxy::{Moment, Stop};
use crate::support::mcp_server::{Behavior, McpServer, write_process};
use crate::support::stand_in_agent::{Fault, Kind, Nth};
use crate::support::wait::wait_until;
use crate::support::worker_harness::{WorkerHarness, quick};

/// Long, because a machine that runs all tests at once may take seconds to start Python.
const LONG: Duration = Duration::from_secs(40);
const KEY: &str = "canary-of-an-mcp-server";

fn with_probe(limit: Duration) -> StartConfig {
    StartConfig { mcp_probe_timeout: limit, inline_wait: Duration::from_secs(50), ..quick() }
}

async fn set_servers(harness: &WorkerHarness, servers: &Value) {
    harness
        .set_settings(json!({"llm_model": "openai/scripted", "llm_api_key": "sk-test", "mcp_config": servers}))
        .await;
}

/// The names of the servers that the agent of the newest conversation got.
fn given(harness: &WorkerHarness) -> Vec<String> {
    let conversation = harness.agent.conversations().pop().expect("a conversation");
    conversation.body["agent"]["mcp_config"].as_object().expect("a map").keys().cloned().collect()
}

#[track_caller]
fn detail_of(task: &StartTaskRecord) -> String {
    assert_eq!(task.now.status, StartStatus::Ready, "{:?}", task.now.detail);
    task.now.detail.clone().unwrap_or_default()
}

/// The files that contain the servers' configuration.
fn configuration_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| {
            let path = entry.path();
            // Files are created and removed during the walk.
            if path.is_dir() {
                return configuration_files(&path);
            }
            let holds_key = std::fs::read_to_string(&path).is_ok_and(|text| text.contains(KEY));
            if holds_key { vec![path] } else { Vec::new() }
        })
        .collect()
}

async fn assert_no_configuration_file(harness: &WorkerHarness, case: &str) {
    wait_until(&format!("{case}: no file with the configuration is left"), LONG, async || {
        configuration_files(harness.agent.root()).is_empty()
    })
    .await;
}

fn probes(harness: &WorkerHarness) -> usize {
    harness.agent.commands().iter().filter(|command| command.contains("mcp-")).count()
}

/// A stdio server that works.
fn process(harness: &WorkerHarness) -> Value {
    let program = harness.agent.root().join("words.py");
    write_process(&program);
    json!({"command": "python3", "args": [program], "env": {"WORDS": KEY}})
}

#[tokio::test(flavor = "multi_thread")]
async fn working_servers_are_passed_to_the_agent_and_failed_ones_are_named_in_a_note() {
    let harness = WorkerHarness::start(with_probe(LONG)).await;
    // A server that hangs has a time limit of its own, so that the others have enough time on a slow machine.
    let behaviors = [
        ("works", Behavior::Works, ""),
        ("streams", Behavior::Streams, ""),
        ("sse", Behavior::Sse, ""),
        ("sessions", Behavior::Sessions, ""),
        ("to-slash", Behavior::RedirectsToSlash, ""),
        ("sticky", Behavior::Sticky, ""),
        ("401", Behavior::Status(401), "it answered 401 Unauthorized"),
        ("403", Behavior::Status(403), "it answered 403 Forbidden"),
        ("404", Behavior::Status(404), "it answered 404 Not Found"),
        ("500", Behavior::Status(500), "it answered 500 Internal Server Error"),
        (
            "moved",
            Behavior::Redirects(301, "/mcp/".to_owned()),
            "it answered 301: agent servers do not follow this redirect",
        ),
        (
            "elsewhere",
            Behavior::Redirects(307, "http://127.0.0.2:1/".to_owned()),
            "it answered 307: agent servers do not follow this redirect",
        ),
        ("loop", Behavior::Redirects(308, "/mcp".to_owned()), "it redirects in a loop"),
        ("page", Behavior::Page, "its answer is not an MCP message"),
        ("hangs", Behavior::Hangs, "it did not answer within 2 s"),
        ("hangs-in-stream", Behavior::HangsInStream, "it did not answer within 2 s"),
        ("no-list", Behavior::NoList("no database".to_owned()), "it answered tools/list with an error: no database"),
        ("cuts", Behavior::Cuts, "it closed the connection without a complete HTTP response"),
    ];
    let mut expected: Vec<(String, String)> = Vec::new();
    let mut servers = Map::new();
    let mut running = Vec::new();
    for (name, behavior, reason) in behaviors {
        let server = McpServer::behaving(behavior).await;
        let timeout = reason.contains("within").then_some(2);
        servers.insert(name.to_owned(), json!({"url": server.url(), "timeout": timeout, "headers": {"X-Key": KEY}}));
        expected.push((name.to_owned(), reason.to_owned()));
        running.push(server);
    }
    let shell = |script: &str| json!({"command": "sh", "args": ["-c", script], "env": {"K": KEY}});
    let slow = |mut server: Value| {
        server["timeout"] = 2.into();
        server
    };
    std::fs::write(harness.agent.root().join("no-program"), "text").expect("written");
    for (name, server, reason) in [
        ("refuses", json!({"url": "http://127.0.0.1:1/mcp"}), "the connection was refused"),
        ("refuses-sse", json!({"url": "http://127.0.0.1:1/x", "transport": "sse"}), "the connection was refused"),
        ("unknown-host", json!({"url": "https://no-such-host.invalid/mcp"}), "its host name cannot be resolved"),
        ("no-tls", json!({"url": running[0].url().replace("http:", "https:")}), "the TLS connection failed"),
        ("no-url", json!({"url": "wss://mcp.example/mcp"}), "its URL is not an HTTP URL"),
        ("process", process(&harness), ""),
        ("missing", json!({"command": "no-such-command-here"}), "its command was not found"),
        (
            "not-executable",
            json!({"command": harness.agent.root().join("no-program").display().to_string()}),
            "its command is not executable",
        ),
        ("no-folder", json!({"command": "sh", "cwd": "/no/such/folder"}), "its working directory does not exist"),
        (
            "exits",
            shell("echo \"no access with $K\" >&2; exit 3"),
            "it ended with exit code 3: no access with **********",
        ),
        (
            "chatters",
            shell("echo hello; echo '{\"jsonrpc\": \"2.0\", \"method\": \"x\"}'"),
            "it ended with exit code 0",
        ),
        (
            "slow",
            slow(shell("echo $$ >slow.pid; sleep 300 & echo $! >child.pid; wait")),
            "it did not answer within 2 s",
        ),
    ] {
        let mut server = server;
        if name == "slow" {
            server["cwd"] = harness.agent.root().display().to_string().into();
        }
        servers.insert(name.to_owned(), server);
        expected.push((name.to_owned(), reason.to_owned()));
    }
    servers.insert("off".to_owned(), json!({"url": "http://127.0.0.1:1/mcp", "enabled": false}));
    servers.insert("signed-out".to_owned(), json!({"url": "http://127.0.0.1:1/mcp", "auth": {"strategy": "oauth2"}}));
    set_servers(&harness, &servers.clone().into()).await;

    let task = harness.begin(&json!({})).await;
    let done = harness.drive(task.id).await;
    let detail = detail_of(&done);
    assert_eq!(probes(&harness), 1, "one command");
    let mut working: Vec<&String> =
        expected.iter().filter(|(_, reason)| reason.is_empty()).map(|(name, _)| name).collect();
    let mut given = given(&harness);
    given.sort();
    working.sort();
    assert_eq!(given.iter().collect::<Vec<_>>(), working, "{detail}");
    let failing: Vec<&(String, String)> = expected.iter().filter(|(_, reason)| !reason.is_empty()).collect();
    let with_reason =
        |(name, reason): &(String, String)| detail.contains(&format!("MCP server \"{name}\" was left out: {reason}\n"));
    // `detail` gives the reasons of the first ten failed servers, and the names of all.
    assert_eq!(failing.iter().filter(|one| with_reason(one)).count(), 10, "{detail}");
    assert!(failing.iter().all(|(name, _)| detail.contains(&format!("\"{name}\""))), "{detail}");
    assert!(
        detail.contains("MCP server \"signed-out\" was left out: it needs an OAuth token and has none"),
        "{detail}"
    );
    assert!(!detail.contains("\"off\""), "{detail}");
    assert_eq!(done.mcp_servers_left_out.len(), failing.len());
    // Every reason, with ten servers per start.
    for failing in failing.chunks(10) {
        let some: Map<String, Value> = failing.iter().map(|(name, _)| (name.clone(), servers[name].clone())).collect();
        set_servers(&harness, &some.into()).await;
        let task = harness.begin(&json!({})).await;
        let detail = detail_of(&harness.drive(task.id).await);
        for (name, reason) in failing {
            assert!(
                detail.lines().any(|line| line == format!("MCP server \"{name}\" was left out: {reason}")),
                "{name}: {reason}\n{detail}"
            );
        }
    }
    assert!(!detail.contains(KEY) && harness.agent.commands().iter().all(|command| !command.contains(KEY)));
    for file in ["slow.pid", "child.pid"] {
        let pid = std::fs::read_to_string(harness.agent.root().join(file)).expect("it ran");
        wait_until("the slow server's processes are ended", LONG, async || {
            let pid = rustix::process::Pid::from_raw(pid.trim().parse().expect("a process id")).expect("a process id");
            rustix::process::test_kill_process(pid).is_err()
        })
        .await;
    }
    assert_no_configuration_file(&harness, "the matrix").await;
    harness.finish().await;
}

/// Responses that the agent servers' MCP clients refuse: missing fields, fields of another type, unknown versions; next
/// to responses that they accept.
#[tokio::test(flavor = "multi_thread")]
async fn server_with_responses_that_agent_servers_refuse_is_left_out() {
    let tool = |fields: Value| {
        let mut tool = json!({"name": "t", "inputSchema": {"type": "object"}});
        for (name, value) in fields.as_object().expect("fields") {
            tool[name] = value.clone();
        }
        tool.as_object_mut().expect("an object").retain(|name, value| name == "description" || !value.is_null());
        json!({"tools": [{"name": "first", "inputSchema": {}}, tool]})
    };
    let (initialize, list) = ("initialize", "tools/list");
    let version = |version: &str| json!({"protocolVersion": version});
    let unsupported = "it chose version 2099-01-01 of MCP, which agent servers do not support";
    let cases = [
        (initialize, version("2024-11-05"), ""),
        (initialize, version("2025-03-26"), ""),
        (initialize, version("2025-06-18"), ""),
        (initialize, version("2025-11-25"), ""),
        (initialize, version("2099-01-01"), unsupported),
        (initialize, version("2026-07-28"), "it chose version 2026-07-28 of MCP, which agent servers do not support"),
        (initialize, version("2024-10-07"), "it chose version 2024-10-07 of MCP, which agent servers do not support"),
        (initialize, json!({"protocolVersion": null}), "its answer is not an MCP message"),
        (initialize, json!({"capabilities": {}}), ""),
        (initialize, json!({"capabilities": null}), "its answer to initialize is not valid: capabilities is missing"),
        (initialize, json!({"capabilities": []}), "its answer to initialize is not valid: capabilities is not valid"),
        (
            initialize,
            json!({"capabilities": {"tools": true}}),
            "its answer to initialize is not valid: capabilities.tools is not valid",
        ),
        (initialize, json!({"serverInfo": null}), "its answer to initialize is not valid: serverInfo is missing"),
        (
            initialize,
            json!({"serverInfo": {"name": "w"}}),
            "its answer to initialize is not valid: serverInfo.version is missing",
        ),
        (
            initialize,
            json!({"serverInfo": {"name": 1, "version": "1"}}),
            "its answer to initialize is not valid: serverInfo.name is not valid",
        ),
        (initialize, json!({"instructions": 1}), "its answer to initialize is not valid: instructions is not valid"),
        (list, json!({"tools": []}), ""),
        (list, tool(json!({"description": null, "more": 1})), ""),
        (list, json!({"tools": null}), "its answer to tools/list is not valid: tools is missing"),
        (list, json!({"tools": ["text"]}), "its answer to tools/list is not valid: tools[0]"),
        (list, tool(json!({"name": null})), "its answer to tools/list is not valid: tools[1].name is missing"),
        (list, tool(json!({"name": 1})), "its answer to tools/list is not valid: tools[1].name is not valid"),
        (
            list,
            tool(json!({"inputSchema": null})),
            "its answer to tools/list is not valid: tools[1].inputSchema is missing",
        ),
        (
            list,
            tool(json!({"inputSchema": []})),
            "its answer to tools/list is not valid: tools[1].inputSchema is not valid",
        ),
        (
            list,
            tool(json!({"description": 1})),
            "its answer to tools/list is not valid: tools[1].description is not valid",
        ),
    ];
    let mut behaviors: Vec<(Behavior, String)> = cases
        .into_iter()
        .map(|(method, fields, reason)| (Behavior::Answers(method, fields), reason.to_owned()))
        .collect();
    behaviors.extend([
        (Behavior::BreaksOnSecondPage, "it answered tools/list with an error: no such page".to_owned()),
        // Agent servers continue only if there is another server as well, and this one then has no tools.
        (
            Behavior::RawList(r#"{"jsonrpc": "2.0", "id": ID, "error": {"code": -32601, "message": "unknown"}}"#),
            "it answered tools/list with an error: unknown".to_owned(),
        ),
        // A text that is not Unicode, and one that is longer than the output limit.
        (
            Behavior::RawList(r#"{"jsonrpc": "2.0", "id": ID, "error": {"code": 1, "message": "\ud800 broken"}}"#),
            "it answered tools/list with an error: ? broken".to_owned(),
        ),
        (
            Behavior::NoList("x".repeat(2 << 20)),
            format!("it answered tools/list with an error: {}…", "x".repeat(200 - 38)),
        ),
    ]);
    let harness = WorkerHarness::start(with_probe(LONG)).await;
    for some in behaviors.chunks(10) {
        let mut running = Vec::new();
        let mut servers = Map::new();
        for (number, (behavior, _)) in some.iter().enumerate() {
            let server = McpServer::behaving(behavior.clone()).await;
            servers.insert(number.to_string(), json!({"url": server.url()}));
            running.push(server);
        }
        set_servers(&harness, &servers.into()).await;
        let task = harness.begin(&json!({})).await;
        let detail = detail_of(&harness.drive(task.id).await);
        let expected: Vec<String> = some
            .iter()
            .enumerate()
            .filter(|(_, (_, reason))| !reason.is_empty())
            .map(|(number, (_, reason))| format!("MCP server \"{number}\" was left out: {reason}"))
            .collect();
        assert_eq!(detail.lines().collect::<Vec<_>>(), expected, "{some:?}");
    }
    harness.finish().await;
}

/// URLs are encoded as agent servers encode them.
#[tokio::test(flavor = "multi_thread")]
async fn urls_with_spaces_and_non_ascii_letters_are_encoded() {
    let harness = WorkerHarness::start(with_probe(LONG)).await;
    let server = McpServer::behaving(Behavior::Works).await;
    let base = server.url().replace("/mcp", "");
    let cases = [
        ("/a b", "/a%20b", ""),
        ("/ü", "/%C3%BC", ""),
        ("/a`{b}|[c]", "/a%60%7Bb%7D|[c]", ""),
        ("/a%20b%zz", "/a%20b%zz", ""),
        ("/x/../y/./z", "/y/z", ""),
        ("/?q=a b\"<>ü|{}`#fragment", "/", "q=a%20b%22%3C%3E%C3%BC|{}`"),
    ];
    let mut servers: Map<String, Value> =
        cases.iter().map(|(url, ..)| ((*url).to_owned(), json!({"url": format!("{base}{url}")}))).collect();
    let moved = McpServer::behaving(Behavior::Redirects(307, "/ö b".to_owned())).await;
    servers.insert("moved".to_owned(), json!({"url": moved.url()}));
    servers.insert("idn".to_owned(), json!({"url": "http://bücher.invalid/mcp"}));
    set_servers(&harness, &servers.into()).await;
    let task = harness.begin(&json!({})).await;
    let detail = detail_of(&harness.drive(task.id).await);
    let mut lines: Vec<&str> = detail.lines().collect();
    lines.sort_unstable();
    let unresolved = "MCP server \"idn\" was left out: its host name cannot be resolved";
    assert_eq!(lines, [unresolved, "MCP server \"moved\" was left out: it redirects in a loop"]);
    let requests = server.requests();
    for (url, path, query) in cases {
        assert!(requests.iter().any(|request| request.path == path && request.query == query), "{url}: {requests:?}");
    }
    let requests = moved.requests();
    assert!(requests.iter().any(|request| request.path == "/%C3%B6%20b"), "{requests:?}");
    harness.finish().await;
}

/// A cookie is sent to the server that set it, and not to another one on the same host.
#[tokio::test(flavor = "multi_thread")]
async fn cookies_stay_within_their_probe() {
    let harness = WorkerHarness::start(with_probe(LONG)).await;
    let (sticky, other) = (McpServer::behaving(Behavior::Sticky).await, McpServer::behaving(Behavior::Sticky).await);
    set_servers(&harness, &json!({"a": {"url": sticky.url()}, "b": {"url": other.url()}})).await;
    let task = harness.begin(&json!({})).await;
    assert_eq!(detail_of(&harness.drive(task.id).await), "");
    for server in [sticky, other] {
        let requests = server.requests();
        let cookies: Vec<bool> = requests.iter().map(|request| request.header("cookie").is_some()).collect();
        assert_eq!(cookies, [false, true, true]);
    }
    harness.finish().await;
}

/// The sandbox has the secrets once the file is uploaded, and may repeat them in the errors of any later request.
#[tokio::test(flavor = "multi_thread")]
async fn secrets_repeated_in_errors_are_masked_in_the_note() {
    let harness = WorkerHarness::start(with_probe(LONG)).await;
    let hung = McpServer::behaving(Behavior::Hangs).await;
    set_servers(&harness, &json!({"hung": {"url": hung.url(), "headers": {"X-Key": KEY}}})).await;
    let task = harness.begin(&json!({})).await;
    let look = async {
        wait_until("the probe runs", LONG, async || !hung.requests().is_empty()).await;
        let body = json!({"exception": format!("bad value {KEY}")}).to_string();
        harness.agent.inject(Fault::new("GET /api/bash/bash_events/search", Nth::Always, Kind::Status(500, body)));
    };
    let (done, ()) = futures::join!(harness.drive(task.id), look);
    let detail = detail_of(&done);
    assert!(detail.starts_with("The MCP servers were not checked: "), "{detail}");
    assert!(detail.contains("bad value **********") && !detail.contains(KEY), "{detail}");
    harness.finish().await;
}

#[tokio::test]
async fn start_without_enabled_servers_makes_no_probe() {
    let harness = WorkerHarness::start(quick()).await;
    let without = harness.begin(&json!({})).await;
    assert_eq!(detail_of(&harness.drive(without.id).await), "");
    let requests = harness.agent.requests().len();
    set_servers(&harness, &json!({"off": {"url": "http://127.0.0.1:1/mcp", "enabled": false}})).await;
    let off = harness.begin(&json!({})).await;
    assert_eq!(detail_of(&harness.drive(off.id).await), "");
    assert_eq!(probes(&harness), 0);
    assert!(harness.agent.requests_to("POST /api/file/upload").is_empty());
    // The same requests as without servers: only the number of polls may differ.
    let count_without_polls = |requests: &[crate::support::server::Request]| {
        requests
            .iter()
            .filter(|request| !request.is("GET /api/bash/bash_events/search") && request.path != "/alive")
            .count()
    };
    let all = harness.agent.requests();
    assert_eq!(count_without_polls(&all[..requests]), count_without_polls(&all[requests..]));
    harness.finish().await;
}

#[tokio::test]
async fn a_start_in_a_used_sandbox_probes_again() {
    let harness = WorkerHarness::start(with_probe(LONG)).await;
    set_servers(&harness, &json!({"good": process(&harness), "bad": {"command": "no-such-command-here"}})).await;
    let first = harness.begin(&json!({})).await;
    let first = harness.drive(first.id).await;
    let left_out = "MCP server \"bad\" was left out: its command was not found";
    assert_eq!(detail_of(&first), left_out);
    let parent = first.conversation_id;
    for body in [json!({"sandbox_id": first.now.sandbox_id}), json!({"parent_conversation_id": parent})] {
        let next = harness.begin(&body).await;
        assert_eq!(detail_of(&harness.drive(next.id).await), left_out, "{body}");
        assert_eq!(given(&harness), ["good"]);
    }
    assert_eq!(probes(&harness), 3);
    harness.finish().await;
}

#[tokio::test]
async fn worker_without_inline_wait_releases_the_start_during_the_probe() {
    let harness = WorkerHarness::start(StartConfig { inline_wait: Duration::ZERO, ..with_probe(LONG) }).await;
    set_servers(&harness, &json!({"good": process(&harness), "bad": {"command": "no-such-command-here"}})).await;
    let task = harness.begin(&json!({})).await;
    let done = harness.drive(task.id).await;
    assert_eq!(detail_of(&done), "MCP server \"bad\" was left out: its command was not found");
    assert_eq!((probes(&harness), given(&harness)), (1, vec!["good".to_owned()]));
    harness.finish().await;
}

/// If the probe cannot run, the agent gets every server, and a note says so.
#[tokio::test(flavor = "multi_thread")]
async fn failed_probe_does_not_fail_the_start() {
    let broken = || Kind::Status(500, r#"{"detail":"Internal Server Error","exception":"the disk is full"}"#.into());
    let repeats_a_secret = || Kind::Status(422, json!({"detail": format!("bad value {KEY}")}).to_string());
    let upload = "POST /api/file/upload";
    let cases = [
        // The probe's command is the only one that is not waited for.
        ("POST /api/bash/start_bash_command", Nth::On(1), repeats_a_secret()),
        (upload, Nth::Always, broken()),
        (upload, Nth::Always, repeats_a_secret()),
        (upload, Nth::Always, Kind::Status(404, "{}".into())),
        (upload, Nth::Always, Kind::CutBefore),
        ("POST /api/bash/start_bash_command", Nth::On(1), Kind::Status(404, r#"{"detail":"Not Found"}"#.into())),
    ];
    stream::iter(cases)
        .for_each_concurrent(2, |(route, nth, kind)| async move {
            let name = format!("{route}: {kind:?}");
            let harness = WorkerHarness::start(with_probe(LONG)).await;
            set_servers(&harness, &json!({"one": process(&harness), "two": {"url": "http://127.0.0.1:1/mcp"}})).await;
            harness.agent.inject(Fault::new(route, nth, kind));
            let task = harness.begin(&json!({})).await;
            let detail = detail_of(&harness.drive(task.id).await);
            assert!(detail.starts_with("The MCP servers were not checked: "), "{name}: {detail}");
            assert_eq!(given(&harness), ["one", "two"], "{name}");
            assert!(!detail.contains(KEY), "{name}: {detail}");
            harness.finish().await;
        })
        .await;
}

/// After one single fault the probe still completes, and its file is removed.
#[tokio::test(flavor = "multi_thread")]
async fn start_recovers_from_any_single_fault_during_the_probe() {
    let kinds = || {
        [
            Kind::SlowReply(Duration::from_millis(700)),
            Kind::StatusAfter(503, "busy".into()),
            Kind::CutBefore,
            Kind::CutAfter,
        ]
    };
    let routes = [("POST /api/file/upload", 1), ("POST /api/bash/start_bash_command", 1)];
    let cases = routes.into_iter().flat_map(|(route, nth)| kinds().map(|kind| (route, nth, kind)));
    stream::iter(cases)
        .for_each_concurrent(2, |(route, nth, kind)| async move {
            let name = format!("{route}: {kind:?}");
            let harness = WorkerHarness::start(with_probe(LONG)).await;
            set_servers(&harness, &json!({"good": process(&harness), "bad": {"command": "no-such-command-here"}}))
                .await;
            harness.agent.inject(Fault::new(route, Nth::On(nth), kind));
            let task = harness.begin(&json!({})).await;
            let detail = detail_of(&harness.drive(task.id).await);
            assert_eq!(detail, "MCP server \"bad\" was left out: its command was not found", "{name}");
            assert_eq!(given(&harness), ["good"], "{name}");
            assert_no_configuration_file(&harness, &name).await;
            harness.finish().await;
        })
        .await;
}

/// The calls of a start, from the one that starts the probe to the one that ends the start.
async fn calls_of_the_probe() -> Vec<(usize, String)> {
    let harness = WorkerHarness::start(with_probe(LONG)).await;
    set_servers(&harness, &json!({"good": process(&harness)})).await;
    let task = harness.begin(&json!({})).await;
    harness.gate.arm(usize::MAX, Stop::Refuse);
    harness.drive(task.id).await;
    let calls = harness.gate.calls();
    harness.finish().await;
    let upload = calls.iter().position(|call| call.starts_with("POST /api/file/upload")).expect("an upload");
    let skills = calls.iter().rposition(|call| call.starts_with("POST /api/skills")).expect("skills");
    (upload..=skills + 2).map(|call| (call, calls[call - 1].clone())).collect()
}

/// A worker crashes, or is late, at any call of the probe: the start has one outcome, and no file is left.
#[tokio::test(flavor = "multi_thread")]
async fn crash_or_late_worker_at_any_call_of_the_probe_leaves_no_configuration_file() {
    let calls = calls_of_the_probe().await;
    let moments = [Moment::Before, Moment::After];
    let cases = calls.into_iter().flat_map(|call| moments.map(|moment| (call.clone(), moment)));
    stream::iter(cases.flat_map(|case| [true, false].map(|crash| (case.clone(), crash))))
        .for_each_concurrent(2, |(((call, what), moment), crash)| async move {
            let name = format!("{} {moment:?} call {call} ({what})", if crash { "a crash" } else { "held" });
            let harness = WorkerHarness::start(with_probe(LONG)).await;
            set_servers(&harness, &json!({"good": process(&harness), "bad": {"command": "no-such-command-here"}}))
                .await;
            let task = harness.begin(&json!({"initial_message": {"content": [{"type": "text", "text": "hi"}]}})).await;
            if crash {
                harness.crash_at(task.id, call, Stop::Hang(moment)).await;
                harness.drive(task.id).await;
            } else {
                harness.gate.arm(call, Stop::Hold(moment));
                let first = harness.receive().await.expect("a message");
                let (context, event) = (harness.context.clone(), WorkerHarness::event(&first));
                let mut late = tokio::spawn(async move { worker::handle(&context, event).await });
                let ended = tokio::select! {
                    ended = &mut late => Some(ended),
                    () = harness.gate.reached() => None,
                };
                harness.drive_with(&harness.other_worker, task.id).await;
                harness.gate.disarm();
                harness.gate.open();
                let ended = match ended {
                    Some(ended) => ended,
                    None => late.await,
                };
                ended.expect("no panic").expect("handled");
            }
            harness.assert_one(task.id, 1, &name).await;
            let detail = detail_of(&harness.task(task.id).await);
            assert_eq!(detail, "MCP server \"bad\" was left out: its command was not found", "{name}");
            assert_eq!(given(&harness), ["good"], "{name}");
            assert_no_configuration_file(&harness, &name).await;
            harness.finish().await;
        })
        .await;
}

/// The step's deadline would end the start; the probe is abandoned earlier.
#[tokio::test]
async fn probe_that_does_not_end_is_abandoned() {
    let harness = WorkerHarness::start(StartConfig { step_timeout: Duration::from_secs(20), ..with_probe(LONG) }).await;
    let hung = McpServer::behaving(Behavior::Hangs).await;
    set_servers(&harness, &json!({"hung": {"url": hung.url()}})).await;
    let task = harness.begin(&json!({})).await;
    let detail = detail_of(&harness.drive(task.id).await);
    assert_eq!(detail, "The MCP servers were not checked: the probe did not end in time");
    assert_eq!(given(&harness), ["hung"]);
    harness.finish().await;
}
