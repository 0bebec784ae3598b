//! The probe of MCP servers during a start, on a stand-in agent server that really runs its commands.

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

/// Long: a machine that runs all tests at once may take seconds to start a Python.
const LONG: Duration = Duration::from_secs(40);
const KEY: &str = "canary-of-an-mcp-server";

fn with_probe(limit: Duration) -> StartConfig {
    StartConfig { mcp_probe_timeout: limit, inline_wait: Duration::from_secs(50), ..quick() }
}

async fn set_servers(rig: &WorkerHarness, servers: &Value) {
    rig.set_settings(json!({"llm_model": "openai/scripted", "llm_api_key": "sk-rig", "mcp_config": servers})).await;
}

/// The names of the servers that the agent of the newest conversation got.
fn given(rig: &WorkerHarness) -> Vec<String> {
    let conversation = rig.agent.conversations().pop().expect("a conversation");
    conversation.body["agent"]["mcp_config"].as_object().expect("a map").keys().cloned().collect()
}

#[track_caller]
fn detail_of(task: &StartTaskRecord) -> String {
    assert_eq!(task.now.status, StartStatus::Ready, "{:?}", task.now.detail);
    task.now.detail.clone().unwrap_or_default()
}

/// The file with the servers' configuration, if it is anywhere.
fn configuration_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .flat_map(|entry| {
            let path = entry.path();
            // Files come and go while this looks.
            if path.is_dir() {
                return configuration_files(&path);
            }
            let holds_key = std::fs::read_to_string(&path).is_ok_and(|text| text.contains(KEY));
            if holds_key { vec![path] } else { Vec::new() }
        })
        .collect()
}

async fn no_configuration_stays(rig: &WorkerHarness, case: &str) {
    wait_until(&format!("{case}: no file with the configuration is left"), LONG, async || {
        configuration_files(rig.agent.root()).is_empty()
    })
    .await;
}

fn probes(rig: &WorkerHarness) -> usize {
    rig.agent.commands().iter().filter(|command| command.contains("mcp-")).count()
}

/// A stdio server that works.
fn process(rig: &WorkerHarness) -> Value {
    let program = rig.agent.root().join("words.py");
    write_process(&program);
    json!({"command": "python3", "args": [program], "env": {"WORDS": KEY}})
}

#[tokio::test(flavor = "multi_thread")]
async fn servers_that_work_are_given_to_the_agent_and_the_others_are_left_out_by_name() {
    let rig = WorkerHarness::start(with_probe(LONG)).await;
    // What hangs has a limit of its own, so that the others may take their time on a slow machine.
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
    std::fs::write(rig.agent.root().join("no-program"), "text").expect("written");
    for (name, server, reason) in [
        ("refuses", json!({"url": "http://127.0.0.1:1/mcp"}), "the connection was refused"),
        ("refuses-sse", json!({"url": "http://127.0.0.1:1/x", "transport": "sse"}), "the connection was refused"),
        ("unknown-host", json!({"url": "https://no-such-host.invalid/mcp"}), "its host name cannot be resolved"),
        ("no-tls", json!({"url": running[0].url().replace("http:", "https:")}), "the TLS connection failed"),
        ("no-url", json!({"url": "wss://mcp.example/mcp"}), "its URL is not an HTTP URL"),
        ("process", process(&rig), ""),
        ("missing", json!({"command": "no-such-command-here"}), "its command was not found"),
        (
            "not-executable",
            json!({"command": rig.agent.root().join("no-program").display().to_string()}),
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
            server["cwd"] = rig.agent.root().display().to_string().into();
        }
        servers.insert(name.to_owned(), server);
        expected.push((name.to_owned(), reason.to_owned()));
    }
    servers.insert("off".to_owned(), json!({"url": "http://127.0.0.1:1/mcp", "enabled": false}));
    servers.insert("signed-out".to_owned(), json!({"url": "http://127.0.0.1:1/mcp", "auth": {"strategy": "oauth2"}}));
    set_servers(&rig, &servers.clone().into()).await;

    let task = rig.begin(&json!({})).await;
    let done = rig.drive(task.id).await;
    let detail = detail_of(&done);
    assert_eq!(probes(&rig), 1, "one command");
    let mut working: Vec<&String> =
        expected.iter().filter(|(_, reason)| reason.is_empty()).map(|(name, _)| name).collect();
    let mut given = given(&rig);
    given.sort();
    working.sort();
    assert_eq!(given.iter().collect::<Vec<_>>(), working, "{detail}");
    let failing: Vec<&(String, String)> = expected.iter().filter(|(_, reason)| !reason.is_empty()).collect();
    let with_reason =
        |(name, reason): &(String, String)| detail.contains(&format!("MCP server \"{name}\" was left out: {reason}\n"));
    // The first ten have their reasons; all are named.
    assert_eq!(failing.iter().filter(|one| with_reason(one)).count(), 10, "{detail}");
    assert!(failing.iter().all(|(name, _)| detail.contains(&format!("\"{name}\""))), "{detail}");
    assert!(
        detail.contains("MCP server \"signed-out\" was left out: it needs an OAuth token and has none"),
        "{detail}"
    );
    assert!(!detail.contains("\"off\""), "{detail}");
    assert_eq!(done.mcp_servers_left_out.len(), failing.len());
    // Every reason, ten servers at a time.
    for failing in failing.chunks(10) {
        let some: Map<String, Value> = failing.iter().map(|(name, _)| (name.clone(), servers[name].clone())).collect();
        set_servers(&rig, &some.into()).await;
        let task = rig.begin(&json!({})).await;
        let detail = detail_of(&rig.drive(task.id).await);
        for (name, reason) in failing {
            assert!(
                detail.lines().any(|line| line == format!("MCP server \"{name}\" was left out: {reason}")),
                "{name}: {reason}\n{detail}"
            );
        }
    }
    assert!(!detail.contains(KEY) && rig.agent.commands().iter().all(|command| !command.contains(KEY)));
    for file in ["slow.pid", "child.pid"] {
        let pid = std::fs::read_to_string(rig.agent.root().join(file)).expect("it ran");
        wait_until("the slow server's processes are ended", LONG, async || {
            let pid = rustix::process::Pid::from_raw(pid.trim().parse().expect("a process id")).expect("a process id");
            rustix::process::test_kill_process(pid).is_err()
        })
        .await;
    }
    no_configuration_stays(&rig, "the matrix").await;
    rig.finish().await;
}

/// What MCP clients of agent servers refuse: fields that are missing or of another type, versions that they do not know. With what
/// they accept beside it.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_left_out_if_agent_servers_cannot_read_its_answers() {
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
        // Agent servers go on only if there is another server beside it, and it has no tools.
        (
            Behavior::RawList(r#"{"jsonrpc": "2.0", "id": ID, "error": {"code": -32601, "message": "unknown"}}"#),
            "it answered tools/list with an error: unknown".to_owned(),
        ),
        // A text that is no Unicode, and one that is longer than all output may be.
        (
            Behavior::RawList(r#"{"jsonrpc": "2.0", "id": ID, "error": {"code": 1, "message": "\ud800 broken"}}"#),
            "it answered tools/list with an error: ? broken".to_owned(),
        ),
        (
            Behavior::NoList("x".repeat(2 << 20)),
            format!("it answered tools/list with an error: {}…", "x".repeat(200 - 38)),
        ),
    ]);
    let rig = WorkerHarness::start(with_probe(LONG)).await;
    for some in behaviors.chunks(10) {
        let mut running = Vec::new();
        let mut servers = Map::new();
        for (number, (behavior, _)) in some.iter().enumerate() {
            let server = McpServer::behaving(behavior.clone()).await;
            servers.insert(number.to_string(), json!({"url": server.url()}));
            running.push(server);
        }
        set_servers(&rig, &servers.into()).await;
        let task = rig.begin(&json!({})).await;
        let detail = detail_of(&rig.drive(task.id).await);
        let expected: Vec<String> = some
            .iter()
            .enumerate()
            .filter(|(_, (_, reason))| !reason.is_empty())
            .map(|(number, (_, reason))| format!("MCP server \"{number}\" was left out: {reason}"))
            .collect();
        assert_eq!(detail.lines().collect::<Vec<_>>(), expected, "{some:?}");
    }
    rig.finish().await;
}

/// URLs are requested as agent servers request them.
#[tokio::test(flavor = "multi_thread")]
async fn urls_with_blanks_and_letters_beyond_ascii_are_encoded() {
    let rig = WorkerHarness::start(with_probe(LONG)).await;
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
    set_servers(&rig, &servers.into()).await;
    let task = rig.begin(&json!({})).await;
    let detail = detail_of(&rig.drive(task.id).await);
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
    rig.finish().await;
}

/// A cookie goes to the server that set it, and to no other one on the same host.
#[tokio::test(flavor = "multi_thread")]
async fn cookies_stay_within_their_probe() {
    let rig = WorkerHarness::start(with_probe(LONG)).await;
    let (sticky, other) = (McpServer::behaving(Behavior::Sticky).await, McpServer::behaving(Behavior::Sticky).await);
    set_servers(&rig, &json!({"a": {"url": sticky.url()}, "b": {"url": other.url()}})).await;
    let task = rig.begin(&json!({})).await;
    assert_eq!(detail_of(&rig.drive(task.id).await), "");
    for server in [sticky, other] {
        let requests = server.requests();
        let cookies: Vec<bool> = requests.iter().map(|request| request.header("cookie").is_some()).collect();
        assert_eq!(cookies, [false, true, true]);
    }
    rig.finish().await;
}

/// The sandbox has the secrets once the file is uploaded, and may repeat them in the errors of any later request.
#[tokio::test(flavor = "multi_thread")]
async fn errors_that_repeat_a_secret_of_a_server_are_noted_without_it() {
    let rig = WorkerHarness::start(with_probe(LONG)).await;
    let hung = McpServer::behaving(Behavior::Hangs).await;
    set_servers(&rig, &json!({"hung": {"url": hung.url(), "headers": {"X-Key": KEY}}})).await;
    let task = rig.begin(&json!({})).await;
    let look = async {
        wait_until("the probe runs", LONG, async || !hung.requests().is_empty()).await;
        let body = json!({"exception": format!("bad value {KEY}")}).to_string();
        rig.agent.inject(Fault::new("GET /api/bash/bash_events/search", Nth::Always, Kind::Status(500, body)));
    };
    let (done, ()) = futures::join!(rig.drive(task.id), look);
    let detail = detail_of(&done);
    assert!(detail.starts_with("The MCP servers were not checked: "), "{detail}");
    assert!(detail.contains("bad value **********") && !detail.contains(KEY), "{detail}");
    rig.finish().await;
}

#[tokio::test]
async fn a_start_without_servers_that_are_switched_on_costs_nothing() {
    let rig = WorkerHarness::start(quick()).await;
    let without = rig.begin(&json!({})).await;
    assert_eq!(detail_of(&rig.drive(without.id).await), "");
    let requests = rig.agent.requests().len();
    set_servers(&rig, &json!({"off": {"url": "http://127.0.0.1:1/mcp", "enabled": false}})).await;
    let off = rig.begin(&json!({})).await;
    assert_eq!(detail_of(&rig.drive(off.id).await), "");
    assert_eq!(probes(&rig), 0);
    assert!(rig.agent.requests_to("POST /api/file/upload").is_empty());
    // The same routes as without: only looks at commands may differ in number.
    let looks = |requests: &[crate::support::server::Request]| {
        requests
            .iter()
            .filter(|request| !request.is("GET /api/bash/bash_events/search") && request.path != "/alive")
            .count()
    };
    let all = rig.agent.requests();
    assert_eq!(looks(&all[..requests]), looks(&all[requests..]));
    rig.finish().await;
}

#[tokio::test]
async fn a_start_in_a_used_sandbox_probes_again() {
    let rig = WorkerHarness::start(with_probe(LONG)).await;
    set_servers(&rig, &json!({"good": process(&rig), "bad": {"command": "no-such-command-here"}})).await;
    let first = rig.begin(&json!({})).await;
    let first = rig.drive(first.id).await;
    let left_out = "MCP server \"bad\" was left out: its command was not found";
    assert_eq!(detail_of(&first), left_out);
    let parent = first.conversation_id;
    for body in [json!({"sandbox_id": first.now.sandbox_id}), json!({"parent_conversation_id": parent})] {
        let next = rig.begin(&body).await;
        assert_eq!(detail_of(&rig.drive(next.id).await), left_out, "{body}");
        assert_eq!(given(&rig), ["good"]);
    }
    assert_eq!(probes(&rig), 3);
    rig.finish().await;
}

#[tokio::test]
async fn a_worker_without_patience_gives_the_start_back_while_servers_are_probed() {
    let rig = WorkerHarness::start(StartConfig { inline_wait: Duration::ZERO, ..with_probe(LONG) }).await;
    set_servers(&rig, &json!({"good": process(&rig), "bad": {"command": "no-such-command-here"}})).await;
    let task = rig.begin(&json!({})).await;
    let done = rig.drive(task.id).await;
    assert_eq!(detail_of(&done), "MCP server \"bad\" was left out: its command was not found");
    assert_eq!((probes(&rig), given(&rig)), (1, vec!["good".to_owned()]));
    rig.finish().await;
}

/// Where the probe cannot be made, the agent gets every server, and a note says so.
#[tokio::test(flavor = "multi_thread")]
async fn the_probe_fails_no_start() {
    let broken = || Kind::Status(500, r#"{"detail":"Internal Server Error","exception":"the disk is full"}"#.into());
    let repeats_a_secret = || Kind::Status(422, json!({"detail": format!("bad value {KEY}")}).to_string());
    let upload = "POST /api/file/upload";
    let cases = [
        // The fourth command is the probe's.
        ("POST /api/bash/start_bash_command", Nth::On(4), repeats_a_secret()),
        (upload, Nth::Always, broken()),
        (upload, Nth::Always, repeats_a_secret()),
        (upload, Nth::Always, Kind::Status(404, "{}".into())),
        (upload, Nth::Always, Kind::CutBefore),
        ("POST /api/bash/start_bash_command", Nth::On(4), Kind::Status(404, r#"{"detail":"Not Found"}"#.into())),
    ];
    stream::iter(cases)
        .for_each_concurrent(2, |(route, nth, kind)| async move {
            let name = format!("{route}: {kind:?}");
            let rig = WorkerHarness::start(with_probe(LONG)).await;
            set_servers(&rig, &json!({"one": process(&rig), "two": {"url": "http://127.0.0.1:1/mcp"}})).await;
            rig.agent.inject(Fault::new(route, nth, kind));
            let task = rig.begin(&json!({})).await;
            let detail = detail_of(&rig.drive(task.id).await);
            assert!(detail.starts_with("The MCP servers were not checked: "), "{name}: {detail}");
            assert_eq!(given(&rig), ["one", "two"], "{name}");
            assert!(!detail.contains(KEY), "{name}: {detail}");
            rig.finish().await;
        })
        .await;
}

/// One fault, once: the probe is made all the same, and its file is gone.
#[tokio::test(flavor = "multi_thread")]
async fn any_single_fault_during_the_probe_is_got_over() {
    let kinds = || {
        [
            Kind::SlowReply(Duration::from_millis(700)),
            Kind::StatusAfter(503, "busy".into()),
            Kind::CutBefore,
            Kind::CutAfter,
        ]
    };
    let routes = [("POST /api/file/upload", 1), ("POST /api/bash/start_bash_command", 4)];
    let cases = routes.into_iter().flat_map(|(route, nth)| kinds().map(|kind| (route, nth, kind)));
    stream::iter(cases)
        .for_each_concurrent(2, |(route, nth, kind)| async move {
            let name = format!("{route}: {kind:?}");
            let rig = WorkerHarness::start(with_probe(LONG)).await;
            set_servers(&rig, &json!({"good": process(&rig), "bad": {"command": "no-such-command-here"}})).await;
            rig.agent.inject(Fault::new(route, Nth::On(nth), kind));
            let task = rig.begin(&json!({})).await;
            let detail = detail_of(&rig.drive(task.id).await);
            assert_eq!(detail, "MCP server \"bad\" was left out: its command was not found", "{name}");
            assert_eq!(given(&rig), ["good"], "{name}");
            no_configuration_stays(&rig, &name).await;
            rig.finish().await;
        })
        .await;
}

/// The calls of a start from the one that starts the probe to the one that ends the start.
async fn calls_of_the_probe() -> Vec<(usize, String)> {
    let rig = WorkerHarness::start(with_probe(LONG)).await;
    set_servers(&rig, &json!({"good": process(&rig)})).await;
    let task = rig.begin(&json!({})).await;
    rig.gate.arm(usize::MAX, Stop::Refuse);
    rig.drive(task.id).await;
    let calls = rig.gate.calls();
    rig.finish().await;
    let upload = calls.iter().position(|call| call.starts_with("POST /api/file/upload")).expect("an upload");
    let skills = calls.iter().position(|call| call.starts_with("POST /api/skills")).expect("skills");
    (upload..=skills + 2).map(|call| (call, calls[call - 1].clone())).collect()
}

/// A worker that dies, or is late, at any call of the probe: the start has one outcome, and no file stays.
#[tokio::test(flavor = "multi_thread")]
async fn a_crash_or_a_late_worker_at_any_call_of_the_probe_leaves_no_file_behind() {
    let calls = calls_of_the_probe().await;
    let moments = [Moment::Before, Moment::After];
    let cases = calls.into_iter().flat_map(|call| moments.map(|moment| (call.clone(), moment)));
    stream::iter(cases.flat_map(|case| [true, false].map(|crash| (case.clone(), crash))))
        .for_each_concurrent(2, |(((call, what), moment), crash)| async move {
            let name = format!("{} {moment:?} call {call} ({what})", if crash { "a crash" } else { "held" });
            let rig = WorkerHarness::start(with_probe(LONG)).await;
            set_servers(&rig, &json!({"good": process(&rig), "bad": {"command": "no-such-command-here"}})).await;
            let task = rig.begin(&json!({"initial_message": {"content": [{"type": "text", "text": "hi"}]}})).await;
            if crash {
                rig.crash_at(task.id, call, Stop::Hang(moment)).await;
                rig.drive(task.id).await;
            } else {
                rig.gate.arm(call, Stop::Hold(moment));
                let first = rig.receive().await.expect("a message");
                let (context, event) = (rig.context.clone(), WorkerHarness::event(&first));
                let mut late = tokio::spawn(async move { worker::handle(&context, event).await });
                let ended = tokio::select! {
                    ended = &mut late => Some(ended),
                    () = rig.gate.reached() => None,
                };
                rig.drive_with(&rig.other_worker, task.id).await;
                rig.gate.disarm();
                rig.gate.open();
                let ended = match ended {
                    Some(ended) => ended,
                    None => late.await,
                };
                ended.expect("no panic").expect("handled");
            }
            rig.assert_one(task.id, 1, &name).await;
            let detail = detail_of(&rig.task(task.id).await);
            assert_eq!(detail, "MCP server \"bad\" was left out: its command was not found", "{name}");
            assert_eq!(given(&rig), ["good"], "{name}");
            no_configuration_stays(&rig, &name).await;
            rig.finish().await;
        })
        .await;
}

/// The step's deadline would end the start; the probe is given up before.
#[tokio::test]
async fn a_probe_that_does_not_end_is_given_up() {
    let rig = WorkerHarness::start(StartConfig { step_timeout: Duration::from_secs(20), ..with_probe(LONG) }).await;
    let hung = McpServer::behaving(Behavior::Hangs).await;
    set_servers(&rig, &json!({"hung": {"url": hung.url()}})).await;
    let task = rig.begin(&json!({})).await;
    let detail = detail_of(&rig.drive(task.id).await);
    assert_eq!(detail, "The MCP servers were not checked: the probe did not end in time");
    assert_eq!(given(&rig), ["hung"]);
    rig.finish().await;
}
