//! The API's description: it names the routes that there are, and the answers that they give.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use local::docs::DOCUMENT;
use local::options::{CommonOptions, SandboxKind};
use local::server::{Environment, Server};
use regex_lite::Regex;
use serde_json::{Value, json};
use shared::config::{SandboxConfig, SealingConfig};
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tempfile::TempDir;
use tokio::process::Command;

use crate::support::api::Api;
use crate::support::seed;
use crate::tenants::{By, furnish, request, routes};

/// What `cargo local` serves beside the functions.
pub const OF_THIS_MACHINE: [&str; 1] = ["/openapi.json"];
/// The version that the document was last compared with.
const SCHEMATHESIS: &str = "schemathesis==4.32.5";
/// What is not checked: the values of `page_id` that hold cannot be described, and what is refused beyond the document is refused by
/// rules that it names in words.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,\
                      response_schema_conformance,unsupported_method";
/// The making of sandboxes, and the document itself, which is read and not tried.
const LEFT_OUT: usize = 2;
const CONVERSATION: &str = "0123456789abcdef0123456789abcdef";
/// A machine that has other things to do may take long.
const LIMIT: Duration = Duration::from_secs(20 * 60);

pub fn document() -> Value {
    serde_json::from_str(DOCUMENT).expect("JSON")
}

/// Each operation: its method, its path, what it is.
pub fn operations(document: &Value) -> Vec<(String, &String, &Value)> {
    let paths = document["paths"].as_object().expect("paths");
    let operations = paths.iter().flat_map(|(path, methods)| {
        methods.as_object().expect("methods").iter().map(move |(method, operation)| (path, method, operation))
    });
    operations.map(|(path, method, operation)| (method.to_uppercase(), path, operation)).collect()
}

/// Whom an operation lets in, as the document says.
fn by(operation: &Value) -> Option<By> {
    match operation.get("security").map(|security| security[0].as_object().and_then(|one| one.keys().next())) {
        // As all do.
        None => Some(By::Caller),
        Some(None) => None,
        Some(Some(scheme)) if scheme == "sandbox" => Some(By::Sandbox),
        Some(Some(scheme)) if scheme == "agent" => Some(By::Agent),
        Some(Some(scheme)) if scheme == "start" => Some(By::Start),
        Some(Some(scheme)) => panic!("{scheme} is unknown"),
    }
}

#[test]
fn operations_and_references_are_complete() {
    let document = document();
    let operations = operations(&document);
    let ids: BTreeSet<&str> =
        operations.iter().filter_map(|(.., operation)| operation["operationId"].as_str()).collect();
    assert_eq!(ids.len(), operations.len(), "every operation has an operationId of its own");
    let in_functions = operations.iter().filter(|(method, path, _)| ::routes::find(method, path).is_some()).count();
    assert_eq!(in_functions, ::routes::routes().count());
    assert_eq!(operations.len(), in_functions + OF_THIS_MACHINE.len());
    for (method, path, operation) in &operations {
        assert!(operation["summary"].as_str().is_some_and(|summary| !summary.is_empty()), "{method} {path}");
        let named = operation["parameters"].as_array().into_iter().flatten();
        let named: BTreeSet<&str> =
            named.filter(|one| one["in"] == "path").filter_map(|one| one["name"].as_str()).collect();
        let in_path: BTreeSet<&str> =
            path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')).collect();
        assert_eq!(named, in_path, "{method} {path}");
    }
    let text = document.to_string();
    let pattern = Regex::new(r##""\$ref":"#([^"]+)""##).expect("a pattern");
    let used: BTreeSet<&str> = pattern.captures_iter(&text).filter_map(|found| Some(found.get(1)?.as_str())).collect();
    for pointer in &used {
        assert!(document.pointer(pointer).is_some(), "{pointer} does not exist");
    }
    for kind in ["schemas", "responses"] {
        for name in document["components"][kind].as_object().expect("components").keys() {
            let pointer = format!("/components/{kind}/{name}");
            // `sort_order` of searches names it in words: other values are ignored, not refused.
            assert!(used.contains(pointer.as_str()) || name == "SortOrder", "nothing refers to {pointer}");
        }
    }
}

/// A path with its parameters unnamed.
fn unnamed(path: &str) -> String {
    Regex::new(r"\{[^}]*\}").expect("a pattern").replace_all(path, "{}").into_owned()
}

/// The operations of app server 1.11.0 are served, or listed with a reason in docs/deviations.md.
#[test]
fn every_operation_of_the_later_version_is_served_or_listed_with_a_reason() {
    let recorded = include_str!("../data/contract/operations-1.11.txt");
    let document = document();
    let served: BTreeSet<String> =
        operations(&document).iter().map(|(method, path, _)| format!("{method} {}", unnamed(path))).collect();
    let page = include_str!("../../docs/deviations.md");
    let section = page.split("\n## Routes that are not served\n").nth(1).expect("the section");
    let row = Regex::new(r"(?m)^\| `([A-Z]+ /[^`]*)` \| (.+) \|$").expect("a pattern");
    let mut listed: BTreeSet<String> = row
        .captures_iter(section.split("\n## ").next().expect("a section"))
        .map(|row| {
            assert!(row[2].len() > 20, "{} has no reason", &row[1]);
            row[1].to_owned()
        })
        .collect();
    assert!(recorded.lines().count() > 60);
    for operation in recorded.lines() {
        let is_served = served.contains(&unnamed(operation));
        assert_ne!(is_served, listed.remove(operation), "{operation}: served or listed, and not both");
    }
    assert!(listed.is_empty(), "app server 1.11.0 does not have {listed:?}");
}

/// The answers of the whole table of tenants, to owners and to strangers.
#[tokio::test(flavor = "multi_thread")]
async fn every_answer_has_a_status_that_the_document_names() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let [owner, stranger] = ["actor", "stranger"].map(UserId::new);
    furnish(&api, &owner).await;
    let document = document();
    for route in routes() {
        let operation = &document["paths"][route.path][route.method.to_lowercase()];
        assert_eq!(by(operation).unwrap_or(By::Caller), route.by, "{} {}", route.method, route.path);
        for user in [&stranger, &owner] {
            let (status, answer) = request(&api, user, &route).await;
            let named = &operation["responses"][status.to_string()];
            assert!(!named.is_null(), "{} {}: {status} is not in the document: {answer}", route.method, route.path);
        }
    }
    api.stop().await;
}

/// Requests that were made up from the document, against the whole server: about conversations that there are not, and about one
/// that there is. It has no sandboxes, and making one is left out: it would be a 503.
#[tokio::test(flavor = "multi_thread")]
async fn requests_made_up_from_the_document_get_the_answers_that_it_names() {
    let folder = TempDir::new().expect("a folder");
    let options = CommonOptions::on(folder.path().join("data"), SandboxKind::None);
    let server = Server::start(&options, Environment::default(), true, None).await.expect("the server starts");
    let program = schemathesis().await;
    let base = format!("http://{}", server.address);
    let http = reqwest::Client::builder().no_proxy().build().expect("a client");
    let api = format!("{base}/api/v1/app-conversations");
    let start = http.post(&api).json(&json!({"title": "one"})).send().await;
    let start: Value = start.expect("an answer").json().await.expect("a start");
    let stores = Stores::new(&server.config.names, &server.aws, &sealer(&server));
    let row = json!({"type": "conversation", "data": {"id": CONVERSATION, "sandbox_id": "s", "title": "one",
        "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z"}});
    seed::load(&stores, &UserId::local(), [row]).await;
    let known = json!({"path.conversation_id": CONVERSATION, "query.ids": [CONVERSATION, start["id"]]});
    for (parameters, phases, left_out) in
        [(json!({}), "examples,coverage,fuzzing", LEFT_OUT), (known, "fuzzing", LEFT_OUT + 1)]
    {
        let parameters: Vec<String> = parameters
            .as_object()
            .expect("an object")
            .iter()
            .map(|(name, value)| format!("\"{name}\" = {value}\n"))
            .collect();
        let settings = folder.path().join("schemathesis.toml");
        std::fs::write(&settings, format!("[parameters]\n{}", parameters.concat())).expect("written");
        let mut command = Command::new(&program);
        command
            .args(["--config-file".as_ref(), settings.as_os_str()])
            .args(["run", &format!("{base}/openapi.json"), "--phases", phases])
            .args(["--max-examples", "10", "--seed", "1", "--no-shrink", "--continue-on-failure", "--workers", "2"])
            .args(["--checks", CHECKS, "--warnings", "off", "--exclude-operation-id", "start_sandbox"])
            .current_dir(folder.path())
            .env("NO_COLOR", "1")
            .env("COLUMNS", "200")
            .stdin(Stdio::null());
        if left_out > LEFT_OUT {
            // It would be gone for all others.
            command.args(["--exclude-operation-id", "delete_conversation"]);
        }
        let run = tokio::time::timeout(LIMIT, command.output()).await.expect("in time").expect("it runs");
        let output = String::from_utf8_lossy(&run.stdout);
        let output: String =
            output.lines().map(|line| line.chars().take(300).chain(['\n']).collect::<String>()).collect();
        assert!(run.status.success(), "{output}{}", String::from_utf8_lossy(&run.stderr));
        // It must have asked: a document without operations has no faults.
        let tested = format!("Tested: {}", operations(&document()).len() - left_out);
        assert!(output.contains(&tested), "{output}");
    }
    // It has also sent requests about the existing conversation, and changed it.
    let found = http.get(format!("{api}?ids={CONVERSATION}")).send().await.expect("an answer");
    let found: Value = found.json().await.expect("JSON");
    assert!(found[0].is_object() && found[0]["updated_at"] != "2025-01-01T00:00:00Z", "{found}");
    server.shutdown().await;
}

fn sealer(server: &Server) -> Sealer {
    let SealingConfig::File(key) = &server.config.sealing else { panic!("a key file") };
    Sealer::from_file(key).expect("the key")
}

/// The program, installed on first use into a folder that the next build finds again.
async fn schemathesis() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("schemathesis");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/python-tools.sh");
    let installed = Command::new(script).arg(&folder).args(["schemathesis", SCHEMATHESIS]).output().await;
    let installed = installed.expect("it runs");
    let (said, failed) = (String::from_utf8_lossy(&installed.stdout), String::from_utf8_lossy(&installed.stderr));
    assert!(folder.join("installed").is_file(), "{said}{failed}");
    folder.join("bin/schemathesis")
}
