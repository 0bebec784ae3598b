//! The functions' programs under Lambda's runtime API, with the events of a REST API, a queue and a schedule.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::future::join_all;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::config::{Config, ExportConfig, SandboxConfig, SealingConfig, StartConfig};
use shared::user::UserId;
use shared::user::data_key::DataKey;
use shared::user::seal::Sealer;
use tempfile::TempDir;
use tokio::time::timeout;
use uuid::Uuid;

use crate::support::engines::Engines;
use crate::support::kms::{KEY, Kms};
use crate::support::lambda::{Function, Part};
use crate::support::product::contains;
use crate::support::seed::Stores;
use crate::template::function_of;
use crate::tenants::{By, Route, furnish_in, key_of, routes, token_of};

const BASE: &str = "/api/v1/app-conversations";
const PATIENCE: Duration = Duration::from_secs(60);

/// An event as recorded in `tests/data/lambda`.
fn event(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/lambda").join(format!("{name}.json"));
    serde_json::from_str(&fs::read_to_string(path).expect("an event")).expect("JSON")
}

/// What the functions work on.
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
        names.start_queue_url = schema::make_all(&aws, &names, "oh-").await.expect("a schema").starts;
        let config = Config {
            start: StartConfig::default(),
            sandbox: SandboxConfig::None,
            names,
            sealing: SealingConfig::Kms(KEY.to_owned()),
            single_user: false,
            live_status_budget: Duration::from_secs(1),
            look_budget: Duration::from_secs(2),
            reach: shared::outbound::Reach::Anywhere,
            export: ExportConfig::default(),
        };
        Self { folder, kms: Kms::start().await, engines, aws, config }
    }

    async fn function(&self, name: &str) -> Function {
        let mut environment = self.engines.environment();
        environment.extend(self.config.to_env().into_iter().map(|(name, value)| (name.to_owned(), value)));
        environment.push(("AWS_ENDPOINT_URL_KMS".to_owned(), self.kms.url()));
        environment.push(("METRICS_NAMESPACE".to_owned(), "test".to_owned()));
        environment.push(("PERMITTED_CORS_ORIGINS".to_owned(), "https://app.example.org".to_owned()));
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

/// A header of an answer; empty when it is not there.
fn header<'a>(answer: &'a Value, name: &str) -> &'a str {
    answer["multiValueHeaders"][name][0].as_str().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_caller_is_whom_the_authorizer_named() {
    let cloud = Cloud::start().await;
    let function = cloud.function("settings").await;
    let missing = (404, json!({"detail": "Settings not found"}));
    assert_eq!(status_and_body(&function.invoke(event("settings-get")).await), missing);
    let stored = function.invoke(event("settings-post")).await;
    assert_eq!(status_and_body(&stored), (200, json!({"message": "Settings stored"})));
    assert_eq!(header(&stored, "cache-control"), "no-cache, no-store, must-revalidate, max-age=0");
    let (status, shown) = status_and_body(&function.invoke(event("settings-get")).await);
    assert_eq!((status, &shown["llm_model"], &shown["llm_api_key_set"]), (200, &json!("openai/x"), &json!(true)));
    assert_eq!(status_and_body(&function.invoke(event("settings-of-another")).await), missing);
    for nobody in ["settings-of-nobody", "settings-of-the-local-user"] {
        let answer = status_and_body(&function.invoke(event(nobody)).await);
        assert_eq!(answer, (401, json!({"detail": "Unauthorized"})), "{nobody}");
    }

    // One line a request, which tells no secrets.
    let log = function.logged();
    let lines: Vec<Value> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let requests: Vec<&Value> = lines.iter().filter(|line| line["message"] == "http.request").collect();
    let told: Vec<_> = requests.iter().map(|line| (line["user"].as_str(), line["status"].as_u64())).collect();
    let expected = [("u1", 404), ("u1", 200), ("u1", 200), ("u2", 404), ("", 401), ("", 401)];
    assert_eq!(told, expected.map(|(user, status)| (Some(user), Some(status))), "{log}");
    assert_eq!((&requests[0]["cold_start"], &requests[1]["cold_start"]), (&json!(true), &json!(false)));
    for line in &requests {
        assert_eq!(line["route"], "/api/v1/settings");
        assert_eq!(line["request_id"].as_str().map(str::len), Some(36), "{line}");
        assert!(line["duration_ms"].is_u64(), "{line}");
    }
    assert!(!log.contains("canary"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_callers_show_is_in_no_log() {
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
    assert!(function.logged().contains("http.request"), "this is where the log is");
}

#[tokio::test(flavor = "multi_thread")]
async fn queries_and_bodies_arrive_as_they_were_sent() {
    let cloud = Cloud::start().await;
    let start = cloud.function("start").await;
    // In base64, as the gateway sends what it takes for binary.
    let answer = start.invoke(event("start-base64")).await;
    let (status, task) = status_and_body(&answer);
    assert_eq!((status, &task["status"]), (200, &json!("WORKING")), "{answer}");
    assert_eq!(task["request"]["initial_message"]["content"][0]["text"], "Grüße 👋");
    let (status, told) = status_and_body(&start.invoke(event("start-broken")).await);
    assert_eq!((status, &told["detail"][0]["type"]), (422, &json!("json_invalid")));

    let sealer = cloud.sealer().await;
    let stores = Stores::new(&cloud.aws, &cloud.config.names, &sealer);
    let rows = [10_u128, 11].map(|number| {
        json!({"type": "conversation", "data": {"id": Uuid::from_u128(number).to_string(), "sandbox_id": "s",
            "title": if number == 10 { "x a b&c=d/é y" } else { "another" },
            "created_at": "2025-01-01T00:00:00Z", "updated_at": "2025-01-01T00:00:00Z"}})
    });
    stores.load(&UserId::new("u1"), rows).await;
    let conversations = cloud.function("conversations").await;
    let (status, rows) = status_and_body(&conversations.invoke(event("batch-get")).await);
    assert_eq!(
        (status, rows[0]["title"].as_str(), rows[1]["title"].as_str()),
        (200, Some("x a b&c=d/é y"), Some("another"))
    );
    let (status, page) = status_and_body(&conversations.invoke(event("search")).await);
    assert_eq!((status, page["items"].as_array().map(Vec::len)), (200, Some(1)), "{page}");
    let (status, told) = status_and_body(&conversations.invoke(event("unknown-path")).await);
    assert_eq!((status, told), (404, json!({"detail": "Not Found"})));
}

#[tokio::test(flavor = "multi_thread")]
async fn browsers_are_answered_before_anybody_is_known() {
    let cloud = Cloud::start().await;
    let function = cloud.function("web-client").await;
    let preflight = function.invoke(event("preflight")).await;
    assert_eq!(preflight["statusCode"], 200);
    assert_eq!(header(&preflight, "access-control-allow-origin"), "https://app.example.org");
    assert_eq!(header(&preflight, "access-control-allow-methods"), "POST");
    assert_eq!(header(&preflight, "access-control-allow-headers"), "content-type,authorization");
    let (status, config) = status_and_body(&function.invoke(event("config")).await);
    assert_eq!((status, &config["kind"]), (200, &json!("WebClientConfig")));
    let mut foreign = event("preflight");
    foreign["headers"]["Origin"] = json!("https://evil.example.org");
    foreign["multiValueHeaders"]["Origin"] = json!(["https://evil.example.org"]);
    let refused = function.invoke(foreign).await;
    assert_eq!(header(&refused, "access-control-allow-origin"), "", "{refused}");
    assert_eq!(cloud.kms.asked(), (0, 0), "it has no use for the key");
}

/// The event with which the gateway hands a request to a route's function.
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
    // Who comes without a user has no authorizer before the route.
    context["authorizer"] = match route.by {
        By::Caller => json!({"user_id": user.as_str(), "principalId": user.as_str(), "integrationLatency": 12}),
        By::Sandbox | By::Agent => Value::Null,
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

/// All of them, each in the program that has it. (One that streams has a test of its own.)
#[tokio::test(flavor = "multi_thread")]
async fn every_route_is_answered_by_the_program_of_its_function() {
    let cloud = Cloud::start().await;
    let (owner, sealer) = (UserId::new("actor"), cloud.sealer().await);
    furnish_in(&cloud.aws, &cloud.config.names, &sealer, &owner).await;
    let manifest = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml")).expect("a manifest");
    let mut functions: BTreeMap<String, Function> = BTreeMap::new();
    for (number, route) in routes().into_iter().enumerate() {
        let name = function_of(&manifest, route.path, route.method);
        if name == "stream-start" {
            continue;
        }
        if !functions.contains_key(&name) {
            functions.insert(name.clone(), cloud.function(&name).await);
        }
        let credential = match route.by {
            By::Caller => None,
            By::Sandbox => Some(("X-Session-API-Key", key_of(&owner))),
            By::Agent => Some(("X-Access-Token", token_of(&sealer, &owner).await)),
        };
        let shown = credential.as_ref().map(|(name, secret)| (*name, secret.expose_secret()));
        let answer = functions[&name].invoke(event_of(&route, &owner, shown, number % 2 == 0)).await;
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
    for elsewhere in ["authorizer", "start-worker", "stream-start"] {
        assert!(expected.remove(elsewhere));
    }
    assert_eq!(functions.into_keys().collect::<BTreeSet<_>>(), expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_worker_reports_what_failed_of_a_batch_alone() {
    let cloud = Cloud::start().await;
    let start = cloud.function("start").await;
    let (_, task) = status_and_body(&start.invoke(event("start-base64")).await);
    let id = task["id"].as_str().expect("an id");
    let received = cloud.aws.sqs.receive_message().queue_url(&cloud.config.names.start_queue_url).send().await;
    let message = received.expect("the queue").messages.unwrap_or_default().pop().expect("a message");

    let worker = cloud.function("start-worker").await;
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
    assert_eq!((status, &rows[0]["status"]), (200, &json!("ERROR")), "there are no sandboxes here: {rows}");
    // What was measured, as CloudWatch reads it from the log.
    let metric = |name: &str| {
        let documents = worker.measured();
        let found = documents.into_iter().find(|document| document.get(name).is_some());
        found.unwrap_or_else(|| panic!("{name} is not measured: {:?}", worker.measured()))
    };
    let ended = metric("StartsEnded");
    let format = &ended["_aws"]["CloudWatchMetrics"][0];
    assert_eq!((&format["Namespace"], &ended["Function"]), (&json!("test"), &json!("start-worker")));
    assert_eq!((&ended["Outcome"], &ended["StartsEnded"]), (&json!("ERROR"), &json!(1)));
    assert!(
        format["Metrics"].as_array().is_some_and(|all| all.contains(&json!({"Name": "StartsEnded", "Unit": "Count"})))
    );
    assert_eq!(metric("StartStepDuration")["Step"], "WORKING");
    assert!(metric("ReadUnits")["_aws"].is_object() && metric("WriteUnits")["_aws"].is_object());

    // The schedule, and what is dead.
    assert_eq!(worker.invoke(event("schedule")).await, json!({"batchItemFailures": []}));
    let mut dead = event("queue");
    for record in dead["Records"].as_array_mut().expect("records") {
        record["eventSourceARN"] = json!("arn:aws:sqs:eu-central-1:123456789012:oh-starts-dead-letters");
    }
    assert_eq!(worker.invoke(dead).await, json!({"batchItemFailures": []}), "dead letters are not delivered for ever");
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_start_answers_chunk_by_chunk() {
    let cloud = Cloud::start().await;
    let function = cloud.function("stream-start").await;
    let (id, mut parts) = function.send(event("stream-start"));
    let mut text = Vec::new();
    let mut chunks = 0;
    // The first state comes before anything has been done about the start.
    while !String::from_utf8_lossy(&text).contains("WORKING") {
        let Some(Part::Chunk(chunk)) = timeout(PATIENCE, parts.recv()).await.expect("a chunk") else {
            panic!("an end")
        };
        text.extend_from_slice(&chunk);
        chunks += 1;
    }
    let worker = cloud.function("start-worker").await;
    let received = cloud.aws.sqs.receive_message().queue_url(&cloud.config.names.start_queue_url).send().await;
    let message = received.expect("the queue").messages.unwrap_or_default().pop().expect("a message");
    worker.invoke(json!({"Records": [{"messageId": "1", "body": message.body}]})).await;
    loop {
        match timeout(PATIENCE, parts.recv()).await.expect("a part").expect("the runtime API runs") {
            Part::Chunk(chunk) => {
                text.extend_from_slice(&chunk);
                chunks += 1;
            }
            Part::End => break,
            Part::Error(error) => panic!("{error}"),
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
    let states: Value = serde_json::from_slice(&text[separator + 8..]).expect("a JSON array");
    let states: Vec<_> = states.as_array().expect("an array").iter().map(|state| state["status"].as_str()).collect();
    assert_eq!((states.first(), states.last()), (Some(&Some("WORKING")), Some(&Some("ERROR"))), "{states:?}");
}

/// What needs no secrets goes on without KMS, and all else as soon as it is back.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_disabled_stops_secrets_alone() {
    let cloud = Cloud::start().await;
    let before = cloud.function("settings").await;
    assert_eq!(status_and_body(&before.invoke(event("settings-post")).await).0, 200);
    cloud.kms.disable(true);
    assert_eq!(status_and_body(&before.invoke(event("settings-get")).await).0, 200, "whoever has the key keeps it");
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
async fn a_deployment_has_one_data_key_whoever_comes_first() {
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
    assert_eq!(cloud.kms.asked(), (made, asked), "a sealer that seals nothing asks for no key");
    another.open("p", sealed).await.expect("the same key");
    assert_eq!(cloud.kms.asked().0, made, "the second time none is made");

    // Neither another key of KMS nor a changed row opens anything.
    let sdk = cloud.engines.network_sdk_config().await.to_builder().endpoint_url(cloud.kms.url()).build();
    let users = cloud.config.names.users.clone();
    let wrong = DataKey::new(&sdk, cloud.aws.dynamodb.clone(), users.clone(), "alias/other".to_owned());
    let refused = wrong.key().await.expect_err("refused");
    assert!(refused.context().contains("AccessDenied") && !refused.to_string().contains("KMS"), "{refused:?}");
    let rows = cloud.aws.dynamodb.scan().table_name(users).send().await.expect("rows").items.unwrap_or_default();
    let stored = rows[0]["encrypted"].as_b().expect("bytes").as_ref().to_vec();
    assert!(!sealed.contains(&BASE64.encode(&stored)));
    assert_eq!((rows.len(), rows[0]["user"].as_s().map(String::as_str)), (1, Ok("#deployment")));
}
