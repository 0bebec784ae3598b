//! The functions' real binaries under Lambda's runtime API, with the events of a REST API, a queue and a schedule.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::future::join_all;
use http::StatusCode;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use shared::Time;
use shared::aws::Aws;
use shared::config::{Config, ExportConfig, SandboxConfig, SealingConfig, StartConfig};
use shared::conversation::MAX_NAME;
use shared::export::store::ExportStore;
use shared::metrics::{Age, METRICS};
use shared::stores::Stores;
use shared::trace::TraceId;
use shared::user::UserId;
use shared::user::data_key::DataKey;
use shared::user::seal::Sealer;
use shared::user::token::NotificationToken;
use tempfile::TempDir;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use crate::alarms::values_of;
use crate::support::engines::Engines;
use crate::support::kms::{KEY, Kms};
use crate::support::lambda::{Function, Part, Streamed};
use crate::support::product::contains;
use crate::support::seed;
use crate::support::server;
use crate::tenants::{By, Route, furnish_in, key_of, routes, start_token_of, token_of};

const BASE: &str = "/api/v1/app-conversations";
const TIME_LIMIT: Duration = Duration::from_secs(60);
/// The user in the recorded events.
const CALLER: &str = "u1";
/// The largest response that Lambda returns, in bytes.
const PAYLOAD: usize = 6 * 1024 * 1024;
/// The memory size of the functions, in bytes. (Those that serve exports have more.)
const MEMORY: u64 = 256 * 1024 * 1024;

/// An event recorded in `tests/data/lambda`.
fn event(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/lambda").join(format!("{name}.json"));
    serde_json::from_str(&fs::read_to_string(path).expect("an event")).expect("JSON")
}

/// The AWS services that the functions use.
struct Cloud {
    folder: TempDir,
    kms: Kms,
    engines: Engines,
    aws: Aws,
    config: Config,
}

impl Cloud {
    async fn start() -> Self {
        let folder = TempDir::new().expect("a folder");
        let engines = Engines::start(folder.path()).await;
        let aws = Aws::new(&engines.sdk_config().await);
        let mut names = engines.names("oh-");
        let queues = schema::make_all(&aws, &names, "oh-").await.expect("a schema");
        (names.job_queue_url, names.export_queue_url) = (queues.jobs, queues.exports);
        let config = Config {
            start: StartConfig::default(),
            sandbox: SandboxConfig::None,
            names,
            sealing: SealingConfig::Kms(KEY.to_owned()),
            single_user: false,
            live_status_budget: Duration::from_secs(1),
            sandbox_request_budget: Duration::from_secs(2),
            sandbox_idle_limit: None,
            address_policy: shared::http_client::AddressPolicy::Any,
            export: ExportConfig::default(),
        };
        Self { folder, kms: Kms::start().await, engines, aws, config }
    }

    async fn function(&self, name: &str) -> Function {
        self.function_with(name, &[]).await
    }

    /// With these variables in its environment.
    async fn function_with(&self, name: &str, variables: &[(&str, &str)]) -> Function {
        let mut environment = self.engines.environment();
        environment.extend(self.config.to_env().into_iter().map(|(name, value)| (name.to_owned(), value)));
        environment.push(("AWS_ENDPOINT_URL_KMS".to_owned(), self.kms.url()));
        environment.push(("METRICS_NAMESPACE".to_owned(), "test".to_owned()));
        environment.push(("PERMITTED_CORS_ORIGINS".to_owned(), "https://app.example.org".to_owned()));
        environment.extend(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        Function::start(name, self.folder.path(), &environment).await
    }

    async fn data_key(&self) -> DataKey {
        let sdk = self.engines.network_sdk_config().await.to_builder().endpoint_url(self.kms.url()).build();
        DataKey::new(&sdk, self.aws.dynamodb.clone(), self.config.names.users.clone(), KEY.to_owned())
    }

    async fn sealer(&self) -> Sealer {
        Sealer::from_data_key(self.data_key().await)
    }
}

fn status_and_body(answer: &Value) -> (u64, Value) {
    assert_eq!(answer["isBase64Encoded"], false, "{answer}");
    let body = answer["body"].as_str().unwrap_or_default();
    (answer["statusCode"].as_u64().expect("a status"), serde_json::from_str(body).unwrap_or_else(|_| body.into()))
}

/// A header of a response; empty if it is missing.
fn header<'a>(answer: &'a Value, name: &str) -> &'a str {
    answer["multiValueHeaders"][name][0].as_str().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn caller_comes_only_from_the_authorizers_context() {
    let cloud = Cloud::start().await;
    let function = cloud.function("settings").await;
    let missing = (404, json!({"detail": "Settings not found"}));
    assert_eq!(status_and_body(&function.invoke(event("settings-get")).await), missing);
    let stored = function.invoke(event("settings-post")).await;
    assert_eq!(status_and_body(&stored), (200, json!({"message": "Settings stored"})));
    assert_eq!(header(&stored, "cache-control"), "no-cache, no-store, must-revalidate, max-age=0");
    assert_eq!(header(&stored, "strict-transport-security"), "max-age=31536000");
    assert_eq!(header(&stored, "x-content-type-options"), "nosniff");
    let (status, shown) = status_and_body(&function.invoke(event("settings-get")).await);
    assert_eq!((status, &shown["llm_model"], &shown["llm_api_key_set"]), (200, &json!("openai/x"), &json!(true)));
    assert_eq!(status_and_body(&function.invoke(event("settings-of-another")).await), missing);
    for recorded in ["settings-of-nobody", "settings-of-the-local-user"] {
        let answer = status_and_body(&function.invoke(event(recorded)).await);
        assert_eq!(answer, (401, json!({"detail": "Unauthorized"})), "{recorded}");
    }

    // One log line per request, without secrets.
    let log = function.logged();
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let requests: Vec<&Value> = lines.iter().filter(|line| line["message"] == "http.request").collect();
    let logged: Vec<_> = requests.iter().map(|line| (line["user"].as_str(), line["status"].as_u64())).collect();
    let expected = [("u1", 404), ("u1", 200), ("u1", 200), ("u2", 404), ("", 401), ("", 401)];
    assert_eq!(logged, expected.map(|(user, status)| (Some(user), Some(status))), "{log}");
    assert_eq!((&requests[0]["cold_start"], &requests[1]["cold_start"]), (&json!(true), &json!(false)));
    for line in &requests {
        assert_eq!(line["route"], "/api/v1/settings");
        assert_eq!(line["request_id"].as_str().map(str::len), Some(36), "{line}");
        assert!(line["duration_ms"].is_u64(), "{line}");
    }
    assert!(!log.contains("canary"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_of_callers_are_not_logged() {
    let cloud = Cloud::start().await;
    let authorizer = cloud.function("authorizer").await;
    let canaries = ["canary-0a", "oh-canary0a", "canary.0a.x", "eyJhbGciOiJSUzI1NiIsImtpZCI6ImNhbmFyeSJ9.canary.0a"];
    for canary in canaries {
        for (name, value) in [
            ("Authorization", format!("Bearer {canary}")),
            ("X-Access-Token", canary.to_owned()),
            ("X-Session-API-Key", canary.to_owned()),
            ("Cookie", format!("session={canary}")),
        ] {
            let refused = authorizer.fail(json!({"methodArn": "arn", "headers": {name: value}})).await;
            assert_eq!(refused["errorMessage"], "Unauthorized", "{refused}");
        }
    }
    let function = cloud.function("conversations").await;
    let mut event = event("search");
    for canary in canaries {
        for name in ["Authorization", "X-Access-Token", "X-Session-API-Key", "Cookie"] {
            event["headers"][name] = canary.into();
            event["multiValueHeaders"][name] = json!([canary]);
        }
        event["multiValueQueryStringParameters"]["session_api_key"] = json!([canary]);
        assert_eq!(status_and_body(&function.invoke(event.clone()).await).0, 200);
    }
    for (name, log) in [("authorizer", authorizer.logged()), ("conversations", function.logged())] {
        assert!(!log.to_lowercase().contains("canary"), "{name}: {log}");
    }
    assert!(function.logged().contains("http.request"), "the log has the request");
}

#[tokio::test(flavor = "multi_thread")]
async fn queries_and_bodies_arrive_as_they_were_sent() {
    let cloud = Cloud::start().await;
    let start = cloud.function("start").await;
    // In base64, as API Gateway sends bodies that it treats as binary.
    let answer = start.invoke(event("start-base64")).await;
    let (status, task) = status_and_body(&answer);
    assert_eq!((status, &task["status"]), (200, &json!("WORKING")), "{answer}");
    assert_eq!(task["request"]["initial_message"]["content"][0]["text"], "Grüße 👋");
    let (status, error) = status_and_body(&start.invoke(event("start-broken")).await);
    assert_eq!((status, &error["detail"][0]["type"]), (422, &json!("json_invalid")));

    let sealer = cloud.sealer().await;
    let stores = Stores::new(&cloud.config.names, &cloud.aws, &sealer);
    let rows = [10_u128, 11].map(|number| {
        json!({"type": "conversation", "data": {"id": Uuid::from_u128(number).to_string(), "sandbox_id": "s",
            "title": if number == 10 { "x a b&c=d/é y" } else { "another" },
            "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z"}})
    });
    seed::load(&stores, &UserId::new("u1"), rows).await;
    let conversations = cloud.function("conversations").await;
    let (status, rows) = status_and_body(&conversations.invoke(event("batch-get")).await);
    assert_eq!(
        (status, rows[0]["title"].as_str(), rows[1]["title"].as_str()),
        (200, Some("x a b&c=d/é y"), Some("another"))
    );
    let (status, page) = status_and_body(&conversations.invoke(event("search")).await);
    assert_eq!((status, page["items"].as_array().map(Vec::len)), (200, Some(1)), "{page}");
    let (status, error) = status_and_body(&conversations.invoke(event("unknown-path")).await);
    assert_eq!((status, error), (404, json!({"detail": "Not Found"})));
}

#[tokio::test(flavor = "multi_thread")]
async fn preflight_requests_and_redirects_need_no_caller() {
    let cloud = Cloud::start().await;
    let function = cloud.function("web-client").await;
    let preflight = function.invoke(event("preflight")).await;
    assert_eq!(preflight["statusCode"], 200);
    assert_eq!(header(&preflight, "access-control-allow-origin"), "https://app.example.org");
    assert_eq!(header(&preflight, "access-control-allow-methods"), "POST");
    assert_eq!(header(&preflight, "access-control-allow-headers"), "content-type,authorization");
    // Unknown paths, which API Gateway sends to this function.
    let mut slash = get("/api/v1/app-conversations/", &[("ids", "a b")]);
    slash["httpMethod"] = json!("POST");
    let redirect = function.invoke(slash).await;
    assert_eq!((&redirect["statusCode"], redirect["body"].as_str()), (&json!(307), Some("")));
    assert_eq!(header(&redirect, "location"), "../app-conversations?ids=a+b");
    let (status, config) = status_and_body(&function.invoke(event("config")).await);
    assert_eq!((status, &config["kind"]), (200, &json!("WebClientConfig")));
    let mut foreign = event("preflight");
    foreign["headers"]["Origin"] = json!("https://evil.example.org");
    foreign["multiValueHeaders"]["Origin"] = json!(["https://evil.example.org"]);
    let refused = function.invoke(foreign).await;
    assert_eq!(header(&refused, "access-control-allow-origin"), "", "{refused}");
    assert_eq!(cloud.kms.asked(), (0, 0), "the function does not need the key");
}

/// The event of a `GET` request by [`CALLER`].
fn get(path: &str, query: &[(&str, &str)]) -> Value {
    let mut event = event("search");
    let mut values: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (name, value) in query {
        values.entry(name).or_default().push(value);
    }
    event["resource"] = json!(path);
    event["path"] = json!(path);
    event["queryStringParameters"] = Value::Null;
    event["multiValueQueryStringParameters"] = if values.is_empty() { Value::Null } else { json!(values) };
    event["requestContext"]["resourcePath"] = json!(path);
    event["requestContext"]["path"] = json!(format!("/v1{path}"));
    event
}

/// The event with which API Gateway passes a request to a route's function.
fn event_of(route: &Route, user: &UserId, credential: Option<(&str, &str)>, in_base64: bool) -> Value {
    let mut event = event("search");
    let (path, query) = route.target.split_once('?').unwrap_or((&route.target, ""));
    let mut values: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, value) in form_urlencoded::parse(query.as_bytes()).into_owned() {
        values.entry(name).or_default().push(value);
    }
    let last: BTreeMap<&String, &String> =
        values.iter().filter_map(|(name, values)| Some((name, values.last()?))).collect();
    let empty = values.is_empty();
    event["queryStringParameters"] = if empty { Value::Null } else { json!(last) };
    event["multiValueQueryStringParameters"] = if empty { Value::Null } else { json!(values) };
    let parameters: BTreeMap<&str, &str> = route
        .path
        .split('/')
        .zip(path.split('/'))
        .filter_map(|(name, value)| Some((name.strip_prefix('{')?.strip_suffix('}')?, value)))
        .collect();
    event["pathParameters"] = if parameters.is_empty() { Value::Null } else { json!(parameters) };
    event["resource"] = json!(route.path);
    event["path"] = json!(path);
    event["httpMethod"] = json!(route.method);
    let context = &mut event["requestContext"];
    context["resourcePath"] = json!(route.path);
    context["httpMethod"] = json!(route.method);
    context["path"] = json!(format!("/v1{path}"));
    // A request without a user comes from a route without the authorizer.
    context["authorizer"] = match route.by {
        By::Caller => json!({"user_id": user.as_str(), "principalId": user.as_str(), "integrationLatency": 12}),
        By::Sandbox | By::Agent | By::Start => Value::Null,
    };
    for (name, value) in [Some(("Content-Type", "application/json")), credential].into_iter().flatten() {
        event["headers"][name] = json!(value);
        event["multiValueHeaders"][name] = json!([value]);
    }
    event["body"] = match &route.body {
        None => Value::Null,
        Some(body) if in_base64 => json!(BASE64.encode(body.to_string())),
        Some(body) => json!(body.to_string()),
    };
    event["isBase64Encoded"] = json!(in_base64 && route.body.is_some());
    event
}

/// Every route, in the binary of its function. (Streaming has a test of its own.)
#[tokio::test(flavor = "multi_thread")]
async fn every_route_is_served_by_the_binary_of_its_function() {
    let cloud = Cloud::start().await;
    let (owner, sealer) = (UserId::new("actor"), cloud.sealer().await);
    furnish_in(&cloud.aws, &cloud.config.names, &sealer, &owner).await;
    let mut functions: BTreeMap<&str, Function> = BTreeMap::new();
    for (number, route) in routes().into_iter().enumerate() {
        let name = route.function;
        if name == "stream-start" {
            continue;
        }
        if !functions.contains_key(name) {
            functions.insert(name, cloud.function(name).await);
        }
        let credential = match route.by {
            By::Caller => None,
            By::Sandbox => Some(("X-Session-API-Key", key_of(&owner))),
            By::Agent => Some(("X-Access-Token", token_of(&sealer, &owner).await)),
            By::Start => Some(("X-Access-Token", start_token_of(&sealer, &owner).await)),
        };
        let shown = credential.as_ref().map(|(name, secret)| (*name, secret.expose_secret()));
        let answer = functions[name].invoke(event_of(&route, &owner, shown, number % 2 == 0)).await;
        let what = format!("{} {} of {name}", route.method, route.path);
        assert_eq!(answer["statusCode"], route.owner.0, "{what}: {answer}");
        let body = answer["body"].as_str().unwrap_or_default();
        let body = match answer["isBase64Encoded"].as_bool() {
            Some(true) => BASE64.decode(body).expect("base64"),
            _ => body.as_bytes().to_vec(),
        };
        let holds = route.owner.1.replace("{owner}", owner.as_str());
        assert!(holds.is_empty() || contains(&body, holds.as_bytes()), "{what}: {}", String::from_utf8_lossy(&body));
    }
    let mut expected: BTreeSet<String> = fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../functions"))
        .expect("functions")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
        .collect();
    for elsewhere in ["authorizer", "exports", "stream-start", "worker"] {
        assert!(expected.remove(elsewhere));
    }
    assert_eq!(functions.into_keys().map(ToOwned::to_owned).collect::<BTreeSet<_>>(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn worker_reports_only_the_failed_messages_of_a_batch() {
    let cloud = Cloud::start().await;
    let start = cloud.function("start").await;
    let (_, task) = status_and_body(&start.invoke(event("start-base64")).await);
    let id = task["id"].as_str().expect("an id");
    let received = cloud.aws.sqs.receive_message().queue_url(&cloud.config.names.job_queue_url).send().await;
    let message = received.expect("the queue").messages.unwrap_or_default().pop().expect("a message");

    let worker = cloud.function("worker").await;
    let mut batch = event("queue");
    let mut good = batch["Records"][0].clone();
    good["messageId"] = json!("the good one");
    good["body"] = json!(message.body);
    batch["Records"].as_array_mut().expect("records").insert(1, good);
    let answer = worker.invoke(batch.clone()).await;
    let failed: Vec<&Value> =
        batch["Records"].as_array().expect("records").iter().map(|record| &record["messageId"]).collect();
    let failed: Vec<Value> = [0, 2, 3].map(|index| json!({"itemIdentifier": failed[index]})).into();
    assert_eq!(answer, json!({"batchItemFailures": failed}));

    let tasks = cloud.function("start-tasks").await;
    let mut get = event("batch-get");
    for part in ["path", "resource"] {
        get[part] = json!(format!("{BASE}/start-tasks"));
    }
    get["multiValueQueryStringParameters"] = json!({"ids": [id]});
    get["queryStringParameters"] = json!({"ids": id});
    let (status, rows) = status_and_body(&tasks.invoke(get).await);
    assert_eq!((status, &rows[0]["status"]), (200, &json!("ERROR")), "this deployment has no sandboxes: {rows}");
    // The metrics, as CloudWatch extracts them from the log.
    assert_eq!(worker.invoke(event("schedule")).await, json!({"batchItemFailures": []}));
    for document in worker.measured() {
        assert_is_listed(&document);
    }
    let metric = |name: &str| {
        let documents = worker.measured();
        let found = documents.into_iter().find(|document| document.get(name).is_some());
        found.unwrap_or_else(|| panic!("{name} is not measured: {:?}", worker.measured()))
    };
    let ended = metric("StartsEnded");
    let format = &ended["_aws"]["CloudWatchMetrics"][0];
    assert_eq!((&format["Namespace"], &ended["Function"]), (&json!("test"), &json!("worker")));
    assert_eq!((&ended["Outcome"], &ended["StartsEnded"]), (&json!("ERROR"), &json!(1)));
    assert!(
        format["Metrics"].as_array().is_some_and(|all| all.contains(&json!({"Name": "StartsEnded", "Unit": "Count"})))
    );
    assert_eq!(metric("StartStepDuration")["Step"], "WORKING");
    assert_eq!(metric("StartDuration")["Outcome"], "ERROR");
    assert_eq!(
        (&metric("StartErrors")["Class"], &metric("JobsPerStart")["JobsPerStart"]),
        (&json!("user"), &json!([1.0]))
    );
    // Each sweep writes the gauges, also those that are zero.
    let ages: BTreeSet<String> = (worker.measured().iter())
        .filter(|document| document.get("UnfinishedStarts").is_some())
        .map(|document| document["Age"].as_str().expect("an age").to_owned())
        .collect();
    assert_eq!(ages, Age::ALL.map(|age| age.as_str().to_owned()).into());
    assert_eq!(metric("SandboxesWithoutMembers")["SandboxesWithoutMembers"], json!([0.0]));
    let documents = worker.measured().len();
    // The failed message of the batch writes no metric of a sweep: a later invocation does not repeat the gauges.
    worker.invoke(event("queue")).await;
    let later = worker.measured().split_off(documents);
    assert!(later.iter().all(|document| document.get("UnfinishedStarts").is_none()), "{later:?}");
    assert!(metric("ReadUnits")["_aws"].is_object() && metric("WriteUnits")["_aws"].is_object());

    // The scheduled event, and dead letters.
    assert_eq!(worker.invoke(event("schedule")).await, json!({"batchItemFailures": []}));
    let mut dead = event("queue");
    for record in dead["Records"].as_array_mut().expect("records") {
        record["eventSourceARN"] = json!("arn:aws:sqs:eu-central-1:123456789012:oh-jobs-dead-letters");
    }
    assert_eq!(worker.invoke(dead).await, json!({"batchItemFailures": []}), "dead letters are not redelivered forever");
}

/// Asserts that the metrics of a document are listed, each with its dimension and a known value of it.
fn assert_is_listed(document: &Value) {
    let format = &document["_aws"]["CloudWatchMetrics"][0];
    let dimensions: Vec<&str> =
        format["Dimensions"][0].as_array().expect("dimensions").iter().filter_map(Value::as_str).collect();
    for metric in format["Metrics"].as_array().expect("metrics") {
        let name = metric["Name"].as_str().expect("a name");
        let listed =
            METRICS.iter().find(|listed| listed.name == name).unwrap_or_else(|| panic!("{name} is not listed"));
        let expected: Vec<&str> = ["Function"].into_iter().chain(listed.dimension).collect();
        assert_eq!(dimensions, expected, "{name}");
        if let Some(dimension) = listed.dimension {
            let value = document[dimension].as_str().expect("a value");
            assert!(values_of(dimension).contains(&value), "{name}: {value}");
        }
    }
}

/// A request like the recorded one, with this trace header.
fn traced(mut event: Value, header: &str) -> Value {
    event["headers"]["X-Amzn-Trace-Id"] = json!(header);
    event["multiValueHeaders"]["X-Amzn-Trace-Id"] = json!([header]);
    event
}

/// The functions that see a start write one trace with all lines about it: that of its request, if its header is valid.
#[tokio::test(flavor = "multi_thread")]
async fn every_log_line_of_a_start_carries_its_trace() {
    const ROOT: &str = "1-6a041d20-0123456789abcdef01234567";
    let cloud = Cloud::start().await;
    let sealer = cloud.sealer().await;
    let (start, events) = (cloud.function("start").await, cloud.function("events").await);
    let worker = cloud.function("worker").await;
    for (header, given) in [
        (format!("Root={ROOT};Parent=53995c3f42cd8ad8;Sampled=1"), Some(ROOT)),
        (format!("Root=1-6a041d20-{}{{injected}}", "0".repeat(300)), None),
        ("Root=\"injected\"; trace=injected".to_owned(), None),
    ] {
        let (status, task) = status_and_body(&start.invoke(traced(event("start-base64"), &header)).await);
        assert_eq!(status, 200, "{task}");
        let id = Uuid::parse_str(task["id"].as_str().expect("an id")).expect("an id");
        let created_at: Time = serde_json::from_value(task["created_at"].clone()).expect("a time");
        let trace = given.map_or_else(|| TraceId::of_start(created_at, id).to_string(), ToOwned::to_owned);

        // The end of a command, which another request reports.
        let token = NotificationToken { user: UserId::new(CALLER), task: id };
        let token = token.issue(&sealer, Duration::from_secs(60)).await.expect("a token");
        let path = format!("/api/v1/webhooks/commands/{}", id.simple());
        let mut notification = traced(event("start-base64"), "Root=1-6a041d21-ffffffffffffffffffffffff");
        notification["path"] = json!(path);
        notification["requestContext"]["path"] = json!(format!("/v1{path}"));
        for headers in ["headers", "multiValueHeaders"] {
            let token = token.expose_secret();
            notification[headers]["X-Access-Token"] = if headers == "headers" { json!(token) } else { json!([token]) };
        }
        assert_eq!(events.invoke(notification).await["statusCode"], 204);

        // The sweep finds the start, and a worker ends it. It finds no more to do with the other messages.
        let of_task = |function: &Function| {
            let lines = function.lines().into_iter();
            lines.filter(|line| line.to_string().contains(&id.to_string())).collect::<Vec<Value>>()
        };
        let has = |message: &str| of_task(&worker).iter().any(|line| line["message"] == message);
        let deadline = Instant::now() + TIME_LIMIT;
        while !has("start.requeued") {
            assert!(Instant::now() < deadline, "{}", worker.logged());
            worker.invoke(event("schedule")).await;
            sleep(Duration::from_millis(200)).await;
        }
        let mut messages = 0;
        while messages < 3 {
            let received = cloud.aws.sqs.receive_message().queue_url(&cloud.config.names.job_queue_url).send().await;
            for message in received.expect("the queue").messages.unwrap_or_default() {
                worker.invoke(json!({"Records": [{"messageId": "1", "body": message.body}]})).await;
                messages += 1;
            }
        }
        for message in ["start.requeued", "start.failed", "worker.attempt_finished"] {
            assert!(has(message), "{message}: {}", worker.logged());
        }
        for (name, function) in [("start", &start), ("events", &events), ("worker", &worker)] {
            let with_trace = function.lines().iter().filter(|line| line["span"]["trace"] == trace.as_str()).count();
            let lines = of_task(function);
            assert!(with_trace > 0, "{name}: {}", function.logged());
            for line in lines {
                assert_eq!(line["span"]["trace"], trace.as_str(), "{name}: {line}");
                assert_eq!(line["span"]["task"], id.to_string(), "{name}: {line}");
            }
            let requests: Vec<Value> =
                function.lines().into_iter().filter(|line| line["message"] == "http.request").collect();
            if let Some(last) = requests.last() {
                assert_eq!(last["span"]["trace"], trace.as_str(), "{name}: {last}");
                assert_eq!(last["span"]["request_id"], last["request_id"], "{name}: {last}");
            }
            assert!(!function.logged().contains("injected"), "{name}: {}", function.logged());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_start_responds_chunk_by_chunk() {
    let cloud = Cloud::start().await;
    let function = cloud.function_with("stream-start", &[("STREAM_KEEP_ALIVE_MS", "20")]).await;
    let (id, mut parts) = function.send(event("stream-start"));
    let mut text = Vec::new();
    let mut chunks = 0;
    // The first state is sent before the start has made progress; then newlines until it does.
    while !String::from_utf8_lossy(&text).contains("WORKING") || !text.ends_with(b"\n\n\n") {
        let Some(Part::Chunk(chunk)) = timeout(TIME_LIMIT, parts.recv()).await.expect("a chunk") else {
            panic!("the response has ended")
        };
        text.extend_from_slice(&chunk);
        chunks += 1;
    }
    let worker = cloud.function("worker").await;
    let received = cloud.aws.sqs.receive_message().queue_url(&cloud.config.names.job_queue_url).send().await;
    let message = received.expect("the queue").messages.unwrap_or_default().pop().expect("a message");
    worker.invoke(json!({"Records": [{"messageId": "1", "body": message.body}]})).await;
    loop {
        match timeout(TIME_LIMIT, parts.recv()).await.expect("a part").expect("the runtime API runs") {
            Part::Chunk(chunk) => {
                text.extend_from_slice(&chunk);
                chunks += 1;
            }
            Part::End => break,
            other => panic!("{other:?}"),
        }
    }
    assert!(function.was_streamed(&id));
    assert!(chunks > 2, "{chunks}");
    let separator = text.windows(8).position(|eight| eight == [0; 8]).expect("a separator");
    let prelude: Value = serde_json::from_slice(&text[..separator]).expect("JSON");
    assert_eq!(
        (&prelude["statusCode"], &prelude["headers"]["content-type"]),
        (&json!(200), &json!("application/json"))
    );
    assert_eq!(prelude["headers"].get("content-length"), None, "the length is not known in advance");
    let states: Value = serde_json::from_slice(&text[separator + 8..]).expect("a JSON array");
    let states: Vec<_> = states.as_array().expect("an array").iter().map(|state| state["status"].as_str()).collect();
    assert_eq!((states.first(), states.last()), (Some(&Some("WORKING")), Some(&Some("ERROR"))), "{states:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_before_a_stream_starts_have_an_error_status() {
    let cloud = Cloud::start().await;
    let function = cloud.function("stream-start").await;
    let mut broken = event("stream-start");
    broken["body"] = json!("{");
    broken["isBase64Encoded"] = json!(false);
    let (status, error) = status_and_body(&function.invoke(broken.clone()).await);
    assert_eq!((status, &error["detail"][0]["type"]), (422, &json!("json_invalid")));
    broken["body"] = json!(" ".repeat(6 * 1024 * 1024 + 1));
    let too_large = (413, json!({"detail": "The request is larger than this server accepts; send a smaller one"}));
    assert_eq!(status_and_body(&function.invoke(broken).await), too_large);
    let mut anonymous = event("stream-start");
    anonymous["requestContext"]["authorizer"] = Value::Null;
    let refused = (401, json!({"detail": "Unauthorized"}));
    assert_eq!(status_and_body(&function.invoke(anonymous).await), refused);
}

/// Stores a finished export of a conversation, its row and its object.
async fn finished_export(cloud: &Cloud, conversation: Uuid, zip: Vec<u8>) {
    let user = UserId::new(CALLER);
    let stores = Stores::new(&cloud.config.names, &cloud.aws, &cloud.sealer().await);
    let row = json!({"type": "conversation", "data": {"id": conversation.to_string(), "sandbox_id": "s", "title": "t",
        "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z"}});
    seed::load(&stores, &user, [row]).await;
    let key = ExportStore::key(&user, conversation, "a test");
    let put = cloud.aws.s3.put_object().bucket(&cloud.config.names.bucket).key(&key).body(zip.into());
    put.send().await.expect("stored");
    let item = json!({
        "user": CALLER, "kind": format!("export#{}", conversation.simple()), "wanted": false,
        "finished": {"key": key, "at": Time::now().sortable()},
    });
    let item = shared::dynamo::to_item(&item).expect("an item");
    let put = cloud.aws.dynamodb.put_item().table_name(&cloud.config.names.users).set_item(Some(item));
    put.send().await.expect("stored");
}

/// The export is larger than the memory that the function may use for it.
#[tokio::test(flavor = "multi_thread")]
async fn export_up_to_the_limit_is_streamed_and_larger_one_is_a_redirect() {
    const LIMIT: usize = 60 * 1024 * 1024;
    let cloud = Cloud::start().await;
    let [fits, too_large] = [1, 2].map(Uuid::from_u128);
    let zip: Vec<u8> =
        (0_u32..).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).take(LIMIT).collect();
    finished_export(&cloud, fits, zip.clone()).await;
    finished_export(&cloud, too_large, [&zip[..], b"x"].concat()).await;
    let function = cloud.function_with("download", &[("EXPORT_INLINE_LIMIT", &LIMIT.to_string())]).await;
    let path = |id: Uuid| format!("{BASE}/{id}/download");

    let before = function.invoke(get(&path(Uuid::nil()), &[])).await;
    let not_found = (404, json!({"detail": format!("Conversation not found: {}", Uuid::nil())}));
    assert_eq!(status_and_body(&before), not_found);
    let memory_before = function.peak_memory();

    let (id, mut parts) = function.send(get(&path(fits), &[]));
    let (mut bytes, mut chunks) = (Vec::new(), 0);
    loop {
        match timeout(TIME_LIMIT, parts.recv()).await.expect("a part").expect("the runtime API runs") {
            Part::Chunk(chunk) => bytes.extend_from_slice(&chunk),
            Part::End => break,
            other => panic!("{other:?}"),
        }
        chunks += 1;
    }
    assert!(function.was_streamed(&id) && chunks > 100, "{chunks}");
    let Streamed { prelude, body } = Streamed::read(&bytes);
    let headers = &prelude["headers"];
    assert_eq!((&prelude["statusCode"], &headers["content-type"]), (&json!(200), &json!("application/zip")));
    assert_eq!(headers["content-length"], LIMIT.to_string());
    assert_eq!(headers["content-disposition"], format!("attachment; filename=\"conversation_{fits}.zip\""));
    assert!(body == zip, "byte for byte");
    let memory = function.peak_memory();
    println!("memory of download: {memory_before} before, {memory} after {LIMIT} bytes");
    assert!(memory < memory_before + 24 * 1024 * 1024, "{memory_before}, then {memory}");

    let linked = function.invoke(get(&path(too_large), &[])).await;
    assert_eq!(linked["statusCode"], 302);
    let link = header(&linked, "location");
    assert!(link.contains("X-Amz-Signature=") && link.contains("/exports/"), "{link}");
    let (status, error) = status_and_body(&function.invoke(get(&path(fits).replace("00000001", "x"), &[])).await);
    assert_eq!((status, &error["detail"][0]["type"]), (422, &json!("uuid_parsing")));
    let mut head = get(&path(fits), &[]);
    head["httpMethod"] = json!("HEAD");
    let answer = function.invoke(head).await;
    assert_eq!((&answer["statusCode"], answer["body"].as_str()), (&json!(200), Some("")));
    assert_eq!(header(&answer, "content-length"), LIMIT.to_string());

    // A worker is building this export.
    let item = json!({
        "user": CALLER, "kind": format!("export#{}", fits.simple()), "wanted": true,
        "lease_owner": "worker", "lease_until": Time::now().plus(TIME_LIMIT).sortable(),
    });
    let item = shared::dynamo::to_item(&item).expect("an item");
    let put = cloud.aws.dynamodb.put_item().table_name(&cloud.config.names.users).set_item(Some(item));
    put.send().await.expect("stored");
    let pending = function.invoke(get(&path(fits), &[])).await;
    assert_eq!((&pending["statusCode"], header(&pending, "retry-after")), (&json!(503), "5"));
}

#[tokio::test(flavor = "multi_thread")]
async fn export_stream_is_aborted_if_the_bucket_aborts_the_object() {
    let cloud = Cloud::start().await;
    let conversation = Uuid::from_u128(1);
    finished_export(&cloud, conversation, b"zip".to_vec()).await;
    let path = format!("{BASE}/{conversation}/download");
    // A bucket with one large object, of which half the bytes arrive, or none.
    let bucket = |refuses: bool| {
        server::Server::start(move |request| async move {
            let whole = server::raw(StatusCode::OK, "application/zip", vec![7; 4_000_000]);
            match request.method.as_str() {
                "HEAD" => Ok(whole),
                _ if refuses => Ok(server::raw(StatusCode::SERVICE_UNAVAILABLE, "application/xml", "")),
                _ => Ok(server::cut_in_half(whole).await),
            }
        })
    };
    let cutting = bucket(false).await;
    let function = cloud.function_with("download", &[("AWS_ENDPOINT_URL_S3", &cutting.url())]).await;
    let (_, mut parts) = function.send(get(&path, &[]));
    let mut bytes = Vec::new();
    loop {
        match timeout(TIME_LIMIT, parts.recv()).await.expect("a part") {
            Some(Part::Chunk(chunk)) => bytes.extend_from_slice(&chunk),
            Some(Part::Cut) => break,
            other => panic!("{other:?}: {}", function.logged()),
        }
    }
    let Streamed { prelude, body } = Streamed::read(&bytes);
    assert_eq!((&prelude["statusCode"], &prelude["headers"]["content-length"]), (&json!(200), &json!("4000000")));
    assert!(body.len() < 4_000_000 && body.iter().all(|byte| *byte == 7), "{}: only bytes of the zip", body.len());
    assert!(function.logged().contains("lambda.stream_aborted"), "{}", function.logged());

    let refusing = bucket(true).await;
    let function = cloud.function_with("download", &[("AWS_ENDPOINT_URL_S3", &refusing.url())]).await;
    let answer = status_and_body(&function.invoke(get(&path, &[])).await);
    assert_eq!(answer, (503, json!({"detail": "The store is not available right now"})));
}

fn start_task(number: u128, request: &Value) -> Value {
    json!({"type": "start_task", "data": {
        "id": Uuid::from_u128(number).to_string(), "status": "WORKING", "request": request,
        "created_at": format!("2025-01-01T{:02}:{:02}:00Z", number / 60, number % 60),
        "updated_at": format!("2025-01-01T{:02}:{:02}:00Z", number / 60, number % 60),
    }})
}

fn message(text: &str) -> Value {
    json!({"initial_message": {"content": [{"type": "text", "text": text}]}})
}

/// Reads all pages of a list with the function's binary. Returns its items, and the size of the largest response.
async fn walk(function: &Function, path: &str) -> (Vec<Value>, usize) {
    let (mut items, mut largest) = (Vec::new(), 0);
    let mut page_id: Option<String> = None;
    loop {
        let query: Vec<(&str, &str)> = page_id.iter().map(|page| ("page_id", page.as_str())).collect();
        let (answer, size) = function.invoke_sized(get(path, &query)).await;
        let (status, mut page) = status_and_body(&answer);
        assert_eq!(status, 200, "{page}");
        largest = largest.max(size);
        let found = page["items"].take();
        let found = found.as_array().expect("items");
        assert!(!found.is_empty(), "every page makes progress");
        items.extend(found.iter().cloned());
        page_id = page["next_page_id"].as_str().map(ToOwned::to_owned);
        if page_id.is_none() {
            return (items, largest);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn largest_start_tasks_fit_into_responses_and_memory() {
    let cloud = Cloud::start().await;
    let stores = Stores::new(&cloud.config.names, &cloud.aws, &cloud.sealer().await);
    let user = UserId::new(CALLER);
    let large = "x".repeat(1_600_000);
    // In JSON that is embedded in JSON, this becomes four times as long.
    let escaped = "\"".repeat(3_000_000);
    let requests = [&large, &large, &large, &large, &escaped, &large];
    let tasks = (1..).zip(requests).map(|(number, text)| start_task(number, &message(text)));
    seed::load(&stores, &user, tasks.chain((10..110).map(|number| start_task(number, &message(&"y".repeat(40_000))))))
        .await;
    let function = cloud.function("start-tasks").await;

    let (items, largest) = walk(&function, &format!("{BASE}/start-tasks/search")).await;
    assert_eq!(items.len(), 106);
    assert!(largest < PAYLOAD, "{largest}");
    let text_of =
        |task: &Value| task["request"]["initial_message"]["content"][0]["text"].as_str().map(ToOwned::to_owned);
    let whole = |task: &Value, text: &str| text_of(task).as_deref() == Some(text);
    let by_id = |number: u128| {
        let id = Uuid::from_u128(number).simple().to_string();
        items.iter().find(|task| task["id"] == id.as_str()).expect("a task")
    };
    for number in [1, 2, 3, 4, 6] {
        assert!(whole(by_id(number), &large), "{number}");
    }
    assert!((10..110).all(|number| whole(by_id(number), &"y".repeat(40_000))));
    let short = text_of(by_id(5)).expect("a text");
    assert!(short.starts_with("\"\"\"") && short.ends_with("… [3000000 bytes]"), "{short}");

    // A single task is always returned, whole if it fits at all; of many, as many as fit.
    let batch = async |numbers: &[u128]| {
        let ids: Vec<String> = numbers.iter().map(|number| Uuid::from_u128(*number).to_string()).collect();
        let query: Vec<(&str, &str)> = ids.iter().map(|id| ("ids", id.as_str())).collect();
        let (answer, size) = function.invoke_sized(get(&format!("{BASE}/start-tasks"), &query)).await;
        assert!(size < PAYLOAD, "{size}");
        let (status, tasks) = status_and_body(&answer);
        assert_eq!(status, 200, "{tasks}");
        let tasks = tasks.as_array().expect("tasks").clone();
        for (number, task) in numbers.iter().zip(&tasks) {
            let id = Uuid::from_u128(*number).simple().to_string();
            assert_eq!((&task["id"], &task["status"]), (&json!(id), &json!("WORKING")));
        }
        tasks
    };
    assert!(whole(&batch(&[1]).await[0], &large));
    assert_eq!(text_of(&batch(&[5]).await[0]), Some(short));
    let four = batch(&[1, 2, 3, 4]).await;
    assert_eq!(four.iter().map(|task| whole(task, &large)).collect::<Vec<_>>(), [true, true, true, false]);
    let title = four[3]["request"]["initial_message"]["content"][1]["text"].as_str().expect("a note");
    assert!(title.starts_with("[1 parts, 1600"), "{title}");
    batch(&[1; 100]).await;
    batch(&(10..110).collect::<Vec<_>>()).await;
    let memory = function.peak_memory();
    println!("memory of start-tasks: {memory}; the largest page: {largest}");
    assert!(memory < MEMORY * 3 / 4, "{memory}");
}

/// A start whose response would be too large has been created, so the client must still get its id.
#[tokio::test(flavor = "multi_thread")]
async fn largest_start_gets_a_response() {
    let cloud = Cloud::start().await;
    let mut start = event("stream-start");
    // Each part becomes four times as long in the response.
    let parts = vec!["{\"text\":\"\"}"; 300_000].join(",");
    start["body"] = json!(format!("{{\"initial_message\":{{\"content\":[{parts}]}}}}"));
    start["isBase64Encoded"] = json!(false);
    start["path"] = json!(BASE);
    let function = cloud.function("start").await;
    let (answer, size) = function.invoke_sized(start).await;
    let (status, task) = status_and_body(&answer);
    assert_eq!((status, &task["status"]), (200, &json!("WORKING")));
    assert!(size < PAYLOAD, "{size}");
    let note = task["request"]["initial_message"]["content"][0]["text"].as_str().expect("a note");
    assert!(note.starts_with("[300000 parts, "), "{note}");
    let memory = function.peak_memory();
    println!("memory of start: {memory}");
    assert!(memory < MEMORY, "{memory}");
}

#[tokio::test(flavor = "multi_thread")]
async fn largest_conversations_fit_into_responses_and_memory() {
    let cloud = Cloud::start().await;
    let stores = Stores::new(&cloud.config.names, &cloud.aws, &cloud.sealer().await);
    let id = |number: u128| Uuid::from_u128(number + 1).to_string();
    let rows = (0..100).map(|number| {
        // Four bytes, or seven after escaping twice.
        let text = if number % 10 == 0 { "\u{1}" } else { "😀" }.repeat(MAX_NAME);
        json!({"type": "conversation", "data": {"id": id(number), "sandbox_id": "s", "title": text,
            "selected_repository": text, "selected_branch": text, "llm_model": text,
            "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z"}})
    });
    for row in rows {
        // A transaction may have 4 MB.
        seed::load(&stores, &UserId::new(CALLER), [row]).await;
    }
    let function = cloud.function("conversations").await;
    let (items, largest) = walk(&function, &format!("{BASE}/search")).await;
    let ids: BTreeSet<&str> = items.iter().filter_map(|item| item["id"].as_str()).collect();
    assert_eq!((items.len(), ids.len()), (100, 100));
    assert!((PAYLOAD / 2..PAYLOAD).contains(&largest), "{largest}");
    let batch = async |count: u128| {
        let ids: Vec<String> = (0..count).map(id).collect();
        let query: Vec<(&str, &str)> = ids.iter().map(|id| ("ids", id.as_str())).collect();
        let (answer, size) = function.invoke_sized(get(BASE, &query)).await;
        assert!(size < PAYLOAD, "{size}");
        status_and_body(&answer)
    };
    let (status, found) = batch(20).await;
    assert_eq!((status, found.as_array().map(Vec::len)), (200, Some(20)));
    let error = json!({"detail": "These conversations are too large for one response; request fewer at once"});
    assert_eq!(batch(99).await, (413, error));
    let memory = function.peak_memory();
    println!("memory of conversations: {memory}; the largest page: {largest}");
    assert!(memory < MEMORY * 3 / 4, "{memory}");
}

/// Requests that need no secrets work without KMS, and all others as soon as KMS works again.
#[tokio::test(flavor = "multi_thread")]
async fn disabled_kms_key_affects_only_requests_that_need_secrets() {
    let cloud = Cloud::start().await;
    let before = cloud.function("settings").await;
    assert_eq!(status_and_body(&before.invoke(event("settings-post")).await).0, 200);
    cloud.kms.disable(true);
    assert_eq!(
        status_and_body(&before.invoke(event("settings-get")).await).0,
        200,
        "a running function keeps its cached key"
    );
    let settings = cloud.function("settings").await;
    let refused = status_and_body(&settings.invoke(event("settings-get")).await);
    assert_eq!(refused, (503, json!({"detail": "The store is not available right now"})));
    assert!(settings.logged().contains("KMS Decrypt: DisabledException"), "{}", settings.logged());
    let conversations = cloud.function("conversations").await;
    assert_eq!(status_and_body(&conversations.invoke(event("search")).await).0, 200);
    cloud.kms.disable(false);
    let (status, shown) = status_and_body(&settings.invoke(event("settings-get")).await);
    assert_eq!((status, &shown["llm_api_key_set"]), (200, &json!(true)));
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_first_requests_create_one_data_key() {
    let cloud = Cloud::start().await;
    let sealers = join_all((0..6).map(|_| cloud.sealer())).await;
    let secret = "secret".into();
    let sealed = join_all(sealers.iter().map(|sealer| sealer.seal("p", &secret))).await;
    let sealed: Vec<String> = sealed.into_iter().map(|sealed| sealed.expect("sealed")).collect();
    for (sealer, sealed) in sealers.iter().zip(sealed.iter().rev()) {
        sealer.open("p", sealed).await.expect("the same key");
    }
    let [sealed, ..] = &sealed[..] else { panic!("six") };
    let (made, asked) = cloud.kms.asked();
    let another = cloud.sealer().await;
    assert_eq!(cloud.kms.asked(), (made, asked), "a sealer requests the key only when it needs it");
    another.open("p", sealed).await.expect("the same key");
    assert_eq!(cloud.kms.asked().0, made, "no second key is created");

    // Neither another KMS key nor a changed row decrypts anything.
    let sdk = cloud.engines.network_sdk_config().await.to_builder().endpoint_url(cloud.kms.url()).build();
    let users = cloud.config.names.users.clone();
    let wrong = DataKey::new(&sdk, cloud.aws.dynamodb.clone(), users.clone(), "alias/other".to_owned());
    let refused = wrong.keys().await.expect_err("refused");
    assert!(refused.context().contains("AccessDenied") && !refused.to_string().contains("KMS"), "{refused:?}");
    let rows = cloud.aws.dynamodb.scan().table_name(users).send().await.expect("rows").items.unwrap_or_default();
    let stored = rows[0]["encrypted"].as_b().expect("bytes").as_ref().to_vec();
    assert!(!sealed.contains(&BASE64.encode(&stored)));
    assert_eq!((rows.len(), rows[0]["user"].as_s().map(String::as_str)), (1, Ok("#deployment")));
}

#[tokio::test(flavor = "multi_thread")]
async fn rotated_data_key_still_opens_what_it_sealed() {
    let cloud = Cloud::start().await;
    let sdk = cloud.engines.network_sdk_config().await.to_builder().endpoint_url(cloud.kms.url()).build();
    // As an operator, who need not know the KMS key.
    let operator = DataKey::stored_in(&sdk, cloud.aws.dynamodb.clone(), cloud.config.names.users.clone());
    let refused = operator.rotate().await.expect_err("there is none");
    assert!(matches!(refused, shared::Error::Conflict(_)), "{refused:?}");
    let first = cloud.sealer().await;
    let id = |sealed: &str| sealed.split('.').nth(1).expect("an id").to_owned();
    let mut sealed = vec![first.seal("p", &"0".into()).await.expect("sealed")];
    for number in 1..=2 {
        assert_eq!(operator.rotate().await.expect("rotated"), number + 1);
        sealed.push(cloud.sealer().await.seal("p", &number.to_string().into()).await.expect("sealed"));
    }
    let now = cloud.sealer().await;
    for (number, sealed) in sealed.iter().enumerate() {
        assert_eq!(now.open("p", sealed).await.expect("open").expose_secret(), number.to_string());
    }
    assert_eq!(sealed.iter().map(|sealed| id(sealed)).collect::<std::collections::HashSet<_>>().len(), 3);
    // Of several concurrent operators each adds a key or gets a conflict, and no key is lost.
    let done = join_all((0..4).map(|_| operator.rotate())).await;
    let added = done.iter().filter(|done| done.is_ok()).count();
    assert!(added >= 1);
    assert!(done.iter().flatten().all(|count| *count <= 3 + added), "{done:?}");
    assert!(done.iter().all(|done| matches!(done, Ok(_) | Err(shared::Error::Conflict(_)))), "{done:?}");
    assert_eq!(operator.keys().await.expect("keys").len(), 3 + added);
    cloud.kms.disable(true);
    assert!(matches!(operator.rotate().await.expect_err("no KMS"), shared::Error::Store(_)));
}
