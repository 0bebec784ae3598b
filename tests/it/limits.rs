//! Limits on sizes, lengths, counts and nesting: a request at each limit is accepted, and one beyond it gets a 4xx that
//! names the limit, in the contract's format.

use std::collections::BTreeSet;

use axum::body::Body;
use http::Request;
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use shared::config::SandboxConfig;
use shared::conversation::MAX_NAME;
use shared::http::caller::Caller;
use shared::http::response::MAX_HEADERS;
use shared::sandbox::MAX_ID;
use shared::user::UserId;
use shared::user::organization::organization_of;
use tempfile::TempDir;
use uuid::Uuid;

use crate::openapi::{document, operations};
use crate::support::api::Api;
use crate::tenants::{furnish, key_of, routes};

const API: &str = "/api/v1/app-conversations";
const MIB: usize = 1024 * 1024;

struct Fixture {
    api: Api,
    user: UserId,
    _folder: TempDir,
}

impl Fixture {
    async fn new() -> Self {
        let folder = TempDir::new().expect("a folder");
        let api = Api::at(folder.path(), SandboxConfig::None).await;
        let user = UserId::new("u");
        furnish(&api, &user).await;
        Self { api, user, _folder: folder }
    }

    async fn get(&self, target: &str) -> (u16, Value) {
        self.api.call(&self.user, "GET", target, None).await
    }

    async fn send(&self, method: &str, target: &str, body: String) -> (u16, Value) {
        let request = Request::builder().method(method).uri(target).header("content-type", "application/json");
        let request = request.header("x-session-api-key", secrecy::ExposeSecret::expose_secret(&key_of(&self.user)));
        self.api.send(request.extension(Caller(self.user.clone())).body(Body::from(body)).expect("a request")).await
    }
}

#[track_caller]
fn is_too_long(answer: &(u16, Value), field: &str, longest: usize) {
    let (status, body) = answer;
    let violation = &body["detail"][0];
    assert_eq!((*status, &violation["type"]), (422, &json!("string_too_long")), "{body}");
    assert_eq!(violation["loc"].as_array().expect("a place").last(), Some(&json!(field)), "{body}");
    assert_eq!(violation["msg"], format!("String should have at most {longest} characters"));
    assert_eq!(violation["ctx"], json!({"max_length": longest}));
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_are_accepted_up_to_the_limit_of_their_route() {
    let fixture = Fixture::new().await;
    let conversation = Uuid::from_u128(1);
    let organization = organization_of(&fixture.user).to_string();
    let limits = [
        ("POST", API.to_owned(), 6 * MIB),
        ("POST", format!("{API}/stream-start"), 6 * MIB),
        ("PATCH", format!("{API}/{conversation}"), MIB),
        ("POST", format!("{API}/{conversation}/send-message"), 5 * MIB),
        ("POST", format!("/api/v1/conversations/{conversation}/pending-messages"), 5 * MIB),
        ("POST", "/api/v1/settings".to_owned(), MIB / 2),
        ("POST", "/api/v1/secrets".to_owned(), MIB / 2),
        ("POST", "/api/v1/secrets/git-providers".to_owned(), MIB / 2),
        ("PUT", "/api/v1/secrets/SECRET".to_owned(), MIB / 2),
        ("POST", "/api/v1/webhooks/conversations".to_owned(), 32 * MIB),
        ("POST", format!("/api/v1/webhooks/events/{conversation}"), 32 * MIB),
        ("POST", "/api/cloud-proxy".to_owned(), 5 * MIB),
        ("POST", format!("{API}/{conversation}/switch_profile"), MIB),
        ("POST", format!("{API}/{conversation}/switch_acp_model"), MIB),
        ("POST", "/api/v1/settings/profiles/NAME".to_owned(), MIB / 2),
        ("POST", "/api/v1/settings/profiles/NAME/rename".to_owned(), MIB / 2),
        ("POST", format!("/api/organizations/{organization}/profiles/NAME"), MIB / 2),
        ("POST", format!("/api/organizations/{organization}/profiles/NAME/rename"), MIB / 2),
        ("POST", "/api/agent-profiles/NAME".to_owned(), MIB / 2),
        ("POST", "/api/agent-profiles/NAME/rename".to_owned(), MIB / 2),
        ("POST", "/api/agent-profiles/NAME/materialize".to_owned(), MIB / 2),
    ];
    let document = document();
    let with_body = operations(&document).into_iter().filter(|(.., operation)| operation.get("requestBody").is_some());
    let parameters = [
        ("{conversation_id}", conversation.to_string()),
        ("{org_id}", organization),
        ("{secret_name}", "SECRET".to_owned()),
        ("{profile_name}", "NAME".to_owned()),
        ("{agent_profile}", "NAME".to_owned()),
    ];
    let target =
        |path: &str| parameters.iter().fold(path.to_owned(), |path, (parameter, value)| path.replace(parameter, value));
    let with_body: BTreeSet<(String, String)> = with_body.map(|(method, path, _)| (method, target(path))).collect();
    let tried = limits.iter().map(|(method, target, _)| ((*method).to_owned(), target.clone())).collect();
    assert_eq!(with_body, tried, "every route that reads a body");
    for (method, target, limit) in limits {
        // White space is not JSON, so the request has no effect.
        let (status, answer) = fixture.send(method, &target, " ".repeat(limit)).await;
        assert!(matches!(status, 400 | 422), "{method} {target}: {status} {answer}");
        let (status, answer) = fixture.send(method, &target, " ".repeat(limit + 1)).await;
        let expected = json!({"detail": "The request is larger than this server accepts; send a smaller one"});
        assert_eq!((status, answer), (413, expected), "{method} {target}");
    }
    fixture.api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_filters_and_ids_are_accepted_up_to_their_limits() {
    let fixture = Fixture::new().await;
    let target = format!("{API}/{}", Uuid::from_u128(1));
    let patch = async |body: Value| fixture.send("PATCH", &target, body.to_string()).await;
    for field in ["title", "selected_branch"] {
        let of = |length| json!({field: "é".repeat(length), "selected_repository": "a/b"});
        assert_eq!(patch(of(MAX_NAME)).await.0, 200, "{field}");
        is_too_long(&patch(of(MAX_NAME + 1)).await, field, MAX_NAME);
    }
    let start = |length| json!({"title": "é".repeat(length)}).to_string();
    assert_eq!(fixture.send("POST", API, start(MAX_NAME)).await.0, 200);
    is_too_long(&fixture.send("POST", API, start(MAX_NAME + 1)).await, "title", MAX_NAME);

    for list in ["search", "count"] {
        let asked = |filter: &str, length| format!("{API}/{list}?{filter}={}", "x".repeat(length));
        assert_eq!(fixture.get(&asked("title__contains", MAX_NAME)).await.0, 200, "{list}");
        let refused = fixture.get(&asked("title__contains", MAX_NAME + 1)).await;
        is_too_long(&refused, "title__contains", MAX_NAME);
        // The error message does not repeat the long value.
        assert!(refused.1.to_string().len() < 500, "{}", refused.1);
        let nothing = if list == "search" { json!({"items": [], "next_page_id": null}) } else { json!(0) };
        assert_eq!(fixture.get(&asked("sandbox_id__eq", 3000)).await, (200, nothing), "{list}");
    }
    is_too_long(
        &fixture.get(&format!("/api/v1/secrets/search?name__contains={}", "x".repeat(257))).await,
        "name__contains",
        256,
    );

    // An id that DynamoDB would refuse as a key belongs to no one, wherever it appears.
    for id in [String::new(), "x".repeat(MAX_ID + 1), "x".repeat(3000)] {
        assert_eq!(fixture.get(&format!("/api/v1/sandboxes?id={id}")).await, (200, json!([null])));
        for (method, target) in [
            ("DELETE", format!("/api/v1/sandboxes?sandbox_id={id}")),
            ("POST", format!("/api/v1/sandboxes/{id}/pause")),
            ("POST", format!("/api/v1/sandboxes/{id}/resume")),
        ] {
            let answer = fixture.api.call(&fixture.user, method, &target, None).await;
            assert_eq!(answer, (404, json!({"detail": "Not Found"})), "{method} {}", &target[..30]);
        }
        let events = format!("/api/v1/conversation/{}/events?id={id}", Uuid::from_u128(1));
        assert_eq!(fixture.get(&events).await, (200, json!([null])));
    }
    fixture.api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_are_accepted_up_to_the_maximum_number_of_ids() {
    let fixture = Fixture::new().await;
    let conversation = Uuid::from_u128(1);
    for (target, name, most, expected) in [
        (API.to_owned(), "ids", 99, "Too many ids requested. Maximum is 99."),
        (format!("{API}/start-tasks"), "ids", 100, "Cannot request more than 100 start tasks at once, got 101"),
        ("/api/v1/sandboxes".to_owned(), "id", 100, "Cannot request more than 100 sandboxes at once, got 101"),
        ("/api/v1/sandbox-specs".to_owned(), "id", 100, "Cannot request more than 100 sandbox specs at once, got 101"),
        (
            format!("/api/v1/conversation/{conversation}/events"),
            "id",
            100,
            "Cannot request more than 100 events at once, got 101",
        ),
    ] {
        let of = |count: u128| {
            let ids: Vec<String> = (0..count).map(|number| format!("{name}={}", Uuid::from_u128(number + 9))).collect();
            format!("{target}?{}", ids.join("&"))
        };
        let (status, found) = fixture.get(&of(most)).await;
        assert_eq!((status, found.as_array().map(Vec::len)), (200, usize::try_from(most).ok()), "{target}");
        assert_eq!(fixture.get(&of(most + 1)).await, (400, json!({"detail": expected})), "{target}");
    }
    fixture.api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_and_json_nesting_are_accepted_up_to_their_limits() {
    let fixture = Fixture::new().await;
    let with_header = async |length: usize| {
        let request = Request::get(format!("{API}/count")).header("x-filler", "x".repeat(length));
        fixture.api.send(request.extension(Caller(fixture.user.clone())).body(Body::empty()).expect("a request")).await
    };
    let name = "x-filler".len();
    assert_eq!(with_header(MAX_HEADERS - name).await.0, 200);
    let expected = json!({"detail": "Request Header Fields Too Large"});
    assert_eq!(with_header(MAX_HEADERS - name + 1).await, (431, expected));

    let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    // Within the limit the JSON is parsed, and the violation is that it is not an object. (The response repeats it, and
    // so is nested as deeply.)
    let (status, answer) = fixture.send("POST", API, nested(127)).await;
    assert!(status == 422 && answer.to_string().contains("model_attributes_type"), "{answer}");
    for depth in [128, 100_000] {
        let (status, answer) = fixture.send("POST", API, nested(depth)).await;
        assert_eq!((status, &answer["detail"][0]["ctx"]["error"]), (422, &json!("Nested too deeply")), "{answer}");
    }
    fixture.api.stop().await;
}

/// Malformed requests get JSON errors, too, whichever part of the server refuses them.
#[tokio::test(flavor = "multi_thread")]
async fn errors_of_the_http_framework_are_json() {
    let fixture = Fixture::new().await;
    let conversation = Uuid::from_u128(1);
    for (method, target, status) in [
        ("GET", "/nothing".to_owned(), 404),
        ("PUT", API.to_owned(), 405),
        ("DELETE", format!("{API}/stream-start/x"), 404),
        ("PATCH", format!("{API}/%FF"), 400),
        ("DELETE", "/api/v1/sandboxes/%FF".to_owned(), 400),
        ("POST", "/api/v1/sandboxes/%FF/pause".to_owned(), 400),
        ("PUT", "/api/v1/secrets/%FF".to_owned(), 400),
        ("POST", "/api/v1/conversations/%FF/pending-messages".to_owned(), 400),
        ("GET", format!("/api/v1/conversation/{conversation}/events/search?limit=x"), 422),
    ] {
        let (found, answer) = fixture.send(method, &target, String::new()).await;
        assert_eq!(found, status, "{method} {target}: {answer}");
        assert!(!answer["detail"].is_null(), "{method} {target}: {answer}");
    }
    fixture.api.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn trailing_slash_redirects_to_the_route() {
    let fixture = Fixture::new().await;
    for route in routes() {
        let (path, query) =
            route.target.split_once('?').map_or((route.target.as_str(), ""), |(path, query)| (path, query));
        let slash = |query: &str| format!("{path}/{}{query}", if query.is_empty() { "" } else { "?" });
        let request = Request::builder().method(route.method).uri(slash(query));
        let request = request.extension(Caller(fixture.user.clone())).body(Body::empty()).expect("a request");
        let answer = fixture.api.response(request).await;
        assert_eq!(answer.status(), 307, "{} {}", route.method, slash(query));
        let location = answer.headers()["location"].to_str().expect("text");
        // Resolved as a client does, here and below a stage.
        for base in ["https://host", "https://host/v1/base"] {
            let from = reqwest::Url::parse(&format!("{base}{}", slash(query))).expect("an address");
            let to = from.join(location).expect("a reference");
            assert_eq!(to, reqwest::Url::parse(&format!("{base}{}", route.target)).expect("an address"), "{location}");
        }
    }
    // Unknown paths are redirected as well, to a 404.
    let answer = fixture.api.response(Request::get("/nothing/").body(Body::empty()).expect("a request")).await;
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["location"]),
        (307, &"../nothing".parse().expect("a value"))
    );
    assert_eq!(fixture.get("/").await.0, 404);
    fixture.api.stop().await;
}

/// No document describes HEAD; HTTP defines it for every path that has GET.
#[tokio::test(flavor = "multi_thread")]
async fn head_is_get_without_a_body() {
    let fixture = Fixture::new().await;
    for (method, caller, status) in [("GET", true, 200), ("HEAD", true, 200), ("GET", false, 401), ("HEAD", false, 401)]
    {
        let mut request = Request::builder().method(method).uri(format!("{API}/search"));
        if caller {
            request = request.extension(Caller(fixture.user.clone()));
        }
        let answer = fixture.api.response(request.body(Body::empty()).expect("a request")).await;
        assert_eq!(answer.status(), status, "{method}");
        let length = answer.headers()["content-length"].to_str().expect("text").parse::<usize>().expect("a number");
        let body = answer.into_body().collect().await.expect("a body").to_bytes();
        assert_eq!(body.len(), if method == "HEAD" { 0 } else { length }, "{method}");
    }
    fixture.api.stop().await;
}

/// The size as API Gateway receives it: a JSON text in a JSON string.
fn size_on_aws(answer: &Value) -> usize {
    serde_json::to_string(&answer.to_string()).expect("JSON").len()
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_of_large_start_tasks_fit_into_one_response() {
    const LAMBDA: usize = 6 * 1024 * 1024;
    let fixture = Fixture::new().await;
    let image = |length: usize| format!("data:image/png;base64,{}", "A".repeat(length));
    let images = |images: &[usize]| {
        let images: Vec<String> = images.iter().map(|length| image(*length)).collect();
        json!({"initial_message": {"content": [{"type": "text", "text": "look"}, {"type": "image", "image_urls": images}]}})
    };
    let text = |text: String| json!({"initial_message": {"content": [{"type": "text", "text": text}]}});
    let mut ids = Vec::new();
    // One image and many; quotes and line breaks, which become longer within a string; small requests between large
    // ones.
    for request in [
        images(&[3_000_000]),
        images(&[1_000_000, 1_000_000, 1_000_000]),
        json!({"title": "small"}),
        images(&[5_000_000]),
        text("\"".repeat(1_300_000)),
        text("\n".repeat(2_000_000)),
        json!({"system_message_suffix": "x".repeat(2_900_000)}),
        json!({"title": "small, too"}),
    ] {
        let (status, task) = fixture.send("POST", API, request.to_string()).await;
        assert_eq!(status, 200, "{}", task.to_string().chars().take(300).collect::<String>());
        ids.push(task["id"].as_str().expect("an id").to_owned());
    }

    for ids in [&ids[..], &ids[..3], &ids[3..4], &ids[4..6]] {
        let query = ids.iter().map(|id| format!("ids={id}")).collect::<Vec<_>>().join("&");
        let (status, batch) = fixture.get(&format!("{API}/start-tasks?{query}")).await;
        assert!(status == 200 && size_on_aws(&batch) < LAMBDA, "{status}, {}", size_on_aws(&batch));
        let found: Vec<&str> = batch.as_array().expect("tasks").iter().filter_map(|task| task["id"].as_str()).collect();
        assert_eq!(found, ids.iter().map(String::as_str).collect::<Vec<_>>());
    }
    for (order, limit) in [("CREATED_AT", 100), ("CREATED_AT_DESC", 100), ("CREATED_AT_DESC", 2)] {
        let (mut found, mut page_id) = (Vec::new(), String::new());
        loop {
            let (status, page) =
                fixture.get(&format!("{API}/start-tasks/search?sort_order={order}&limit={limit}{page_id}")).await;
            assert!(status == 200 && size_on_aws(&page) < LAMBDA, "{status}, {}", size_on_aws(&page));
            let items = page["items"].as_array().expect("items");
            assert!(!items.is_empty(), "every page has items");
            found.extend(items.iter().filter_map(|task| task["id"].as_str().map(str::to_owned)));
            let Some(next) = page["next_page_id"].as_str() else { break };
            page_id = format!("&page_id={next}");
        }
        found.retain(|id| ids.contains(id));
        if order == "CREATED_AT_DESC" {
            found.reverse();
        }
        assert_eq!(found, ids, "{order} {limit}");
    }
    fixture.api.stop().await;
}

/// All states of a start, as one array.
async fn states(fixture: &Fixture, body: &Value, meanwhile: impl AsyncFn()) -> Vec<Value> {
    let request = Request::post(format!("{API}/stream-start")).header("content-type", "application/json");
    let request = request.extension(Caller(fixture.user.clone())).body(Body::from(body.to_string()));
    let answer = fixture.api.response(request.expect("a request")).await;
    assert_eq!(answer.status(), 200);
    let (body, ()) = tokio::join!(answer.into_body().collect(), meanwhile());
    serde_json::from_slice(&body.expect("a body").to_bytes()).expect("a JSON array")
}

#[tokio::test(flavor = "multi_thread")]
async fn stream_of_states_abridges_large_requests_and_always_closes() {
    let fixture = Fixture::new().await;
    // There are no sandboxes, so the start fails.
    let work = async || fixture.api.work().await;
    for (length, is_repeated) in [(60_000, true), (2_000_000, false)] {
        let body = json!({"system_message_suffix": "x".repeat(length)});
        let states = states(&fixture, &body, work).await;
        assert!(states.len() >= 2, "{states:?}");
        assert_eq!((&states[0]["status"], &states[states.len() - 1]["status"]), (&json!("WORKING"), &json!("ERROR")));
        for (index, state) in states.iter().enumerate() {
            let shown = state["request"]["system_message_suffix"].as_str().expect("a text");
            let is_whole = shown.len() == length;
            assert_eq!(is_whole, index == 0 || is_repeated, "state {index} of {length}");
        }
    }
    // The owner deletes the task.
    let delete = async || {
        let dynamodb = &fixture.api.aws.dynamodb;
        let table = &fixture.api.names.start_tasks;
        let rows = dynamodb.scan().table_name(table).send().await.expect("rows").items.unwrap_or_default();
        for row in rows
            .into_iter()
            .filter(|row| row.get("status").is_some_and(|status| status.as_s().is_ok_and(|status| status == "WORKING")))
        {
            let keys = ["user", "id"].map(|name| (name.to_owned(), row[name].clone())).into();
            dynamodb.delete_item().table_name(table).set_key(Some(keys)).send().await.expect("deleted");
        }
    };
    let states = states(&fixture, &json!({"title": "x"}), delete).await;
    assert_eq!(states.iter().map(|state| &state["status"]).collect::<Vec<_>>(), ["WORKING"]);
    fixture.api.stop().await;
}
