//! Tokens of git providers as a whole: each is checked at its own provider before anything is stored, and reaches no other host.

use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::response::Response;
use http::StatusCode;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use shared::config::SandboxConfig;
use shared::user::UserId;
use tempfile::TempDir;

use crate::support::api::Api;
use crate::support::server::Server;

/// The path and authorization of each request, in order.
type Seen = Arc<Mutex<Vec<(String, String)>>>;

/// A git host with the APIs of several providers. What it answers depends on the token.
async fn provider() -> (Server, Seen) {
    provider_that_redirects_to("http://127.0.0.1:9/").await
}

async fn provider_that_redirects_to(location: &str) -> (Server, Seen) {
    let seen = Seen::default();
    let (requests, location) = (seen.clone(), location.to_owned());
    let server = Server::start(move |request| {
        let authorization = request.header("authorization").unwrap_or_default().to_owned();
        requests.lock().expect("the requests").push((request.path.clone(), authorization.clone()));
        let location = location.clone();
        async move {
            let token = authorization.rsplit(' ').next().unwrap_or_default();
            let response = Response::builder();
            let response = match token {
                "good" | "better" | "eC10b2tlbi1hdXRoOmdvb2Q=" | "Omdvb2Q=" => response.status(200),
                "limited" => response.status(403).header("x-ratelimit-remaining", "0"),
                "too-many" => response.status(429).header("retry-after", "17"),
                "broken" => response.status(500),
                "moved" => response.status(302).header("location", location),
                _ => response.status(401),
            };
            Ok(response.body(Body::from("{}")).expect("a response"))
        }
    })
    .await;
    (server, seen)
}

async fn api(folder: &TempDir) -> Api {
    let mut api = Api::at(folder.path(), SandboxConfig::None).await;
    api.configure_starts(|starts| starts.allow_insecure_git_access = true);
    api
}

async fn post(api: &Api, user: &UserId, tokens: Value) -> (u16, Value) {
    let body = json!({"provider_tokens": tokens});
    api.call(user, "POST", "/api/v1/secrets/git-providers", Some(&body)).await
}

/// The providers with their tokens and hosts, as starts use them.
async fn stored(api: &Api, user: &UserId) -> Vec<(String, String, Option<String>)> {
    let settings = api.stores.settings().get(user).await.expect("the store").unwrap_or_default();
    let tokens = settings.provider_tokens.0.into_iter().map(|(provider, token)| {
        let secret = token.token.map(|token| token.expose_secret().to_owned()).unwrap_or_default();
        (provider.to_string(), secret, token.host)
    });
    tokens.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_token_is_checked_at_its_own_provider_and_replaces_all() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let (server, seen) = provider().await;
    let host = server.url();
    let ok = (200, json!({"message": "Git providers stored"}));
    let all = json!({
        "github": {"token": "good", "host": host},
        "gitlab": {"token": "good", "host": host},
        "forgejo": {"token": "good", "host": host},
        "bitbucket_data_center": {"token": "good", "host": host},
        "azure_devops": {"token": "good", "host": format!("{host}/org1")},
    });
    assert_eq!(post(&api, &user, all).await, ok);
    let mut requests = seen.lock().expect("the requests").split_off(0);
    requests.sort();
    let expected = [
        ("/api/v1/user", "token good"),
        ("/api/v3/user", "Bearer good"),
        ("/api/v4/user", "Bearer good"),
        ("/org1/_apis/connectionData", "Basic Omdvb2Q="),
        ("/rest/api/1.0/profile/recent/repos", "Basic eC10b2tlbi1hdXRoOmdvb2Q="),
    ];
    assert_eq!(requests, expected.map(|(path, header)| (path.to_owned(), header.to_owned())));
    assert_eq!(stored(&api, &user).await.len(), 5);

    // Two stay: one without a new token, which is not checked again, and one with another token.
    let some = json!({"github": {"token": "", "host": host}, "gitlab": {"token": "better", "host": host}});
    assert_eq!(post(&api, &user, some).await, ok);
    let requests = seen.lock().expect("the requests").split_off(0);
    assert_eq!(requests, [("/api/v4/user".to_owned(), "Bearer better".to_owned())]);
    let expected = [("github", "good"), ("gitlab", "better")]
        .map(|(provider, token)| (provider.into(), token.into(), Some(host.clone())));
    assert_eq!(stored(&api, &user).await, expected);
    let (_, shown) = api.call(&user, "GET", "/api/v1/settings", None).await;
    assert_eq!(shown["provider_tokens_set"], json!({"github": host, "gitlab": host}));

    // A stored token does not reach a host that it was not given for.
    let (other, others) = provider().await;
    let (status, body) = post(&api, &user, json!({"github": {"host": other.url()}})).await;
    assert_eq!((status, body["detail"].as_str().is_some_and(|text| text.contains("github"))), (400, true), "{body}");
    assert!(others.lock().expect("the requests").is_empty());
    assert_eq!(stored(&api, &user).await.len(), 2);

    assert_eq!(post(&api, &user, json!({})).await, ok);
    assert!(stored(&api, &user).await.is_empty());
    assert_eq!(post(&api, &user, json!({"github": {"token": "good", "host": host}})).await, ok);
    let secret = json!({"name": "KEPT", "value": "v"});
    assert_eq!(api.call(&user, "POST", "/api/v1/secrets", Some(&secret)).await.0, 201);
    let unset = (200, json!({"message": "Unset Git provider tokens"}));
    assert_eq!(api.call(&user, "DELETE", "/api/v1/secrets/git-providers", None).await, unset);
    assert!(stored(&api, &user).await.is_empty());
    let (_, secrets) = api.call(&user, "GET", "/api/v1/secrets/search", None).await;
    assert_eq!(secrets["items"][0]["name"], "KEPT");
    let stranger = UserId::new("stranger");
    assert_eq!(api.call(&stranger, "DELETE", "/api/v1/secrets/git-providers", None).await, unset);
    assert_eq!(api.call(&stranger, "GET", "/api/v1/settings", None).await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_its_provider_does_not_accept_is_not_stored() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let user = UserId::new("u");
    let (target, at_target) = provider().await;
    let (server, _) = provider_that_redirects_to(&target.url()).await;
    let host = server.url();
    let before = json!({"forgejo": {"token": "good", "host": host}});
    assert_eq!(post(&api, &user, before).await.0, 200);
    for (token, status, text) in [
        ("bad-canary", 401, "Invalid token. Please make sure it is a valid gitlab token."),
        // A redirect is not followed.
        ("moved", 401, "Invalid token. Please make sure it is a valid gitlab token."),
        ("limited", 429, "The git provider gitlab accepts no more requests for now; try again later"),
        ("too-many", 429, "The git provider gitlab accepts no more requests for now; try again later"),
        ("broken", 502, "The git provider gitlab did not respond, so the token could not be checked; try again later"),
    ] {
        let tokens = json!({"github": {"token": "good", "host": host}, "gitlab": {"token": token, "host": host}});
        assert_eq!(post(&api, &user, tokens).await, (status, json!({"detail": text})), "{token}");
    }
    assert!(at_target.lock().expect("the requests").is_empty());
    for (provider, host) in [
        ("enterprise_sso", None),
        ("bitbucket_data_center", None),
        ("azure_devops", None),
        ("gitlab", Some("http://127.0.0.1:9")),
    ] {
        let (status, _) = post(&api, &user, json!({provider: {"token": "good", "host": host}})).await;
        assert_eq!(status, if provider == "gitlab" { 502 } else { 401 }, "{provider}");
    }
    assert_eq!(stored(&api, &user).await, [("forgejo".to_owned(), "good".to_owned(), Some(host))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_wait_that_a_provider_asks_for_is_passed_on() {
    let folder = TempDir::new().expect("a folder");
    let api = api(&folder).await;
    let (server, _) = provider().await;
    let body = json!({"provider_tokens": {"github": {"token": "too-many", "host": server.url()}}});
    let request = http::Request::post("/api/v1/secrets/git-providers")
        .header("content-type", "application/json")
        .extension(shared::http::caller::Caller(UserId::new("u")));
    let response = api.response(request.body(Body::from(body.to_string())).expect("a request")).await;
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(response.headers()["retry-after"], "17");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invalid_body_is_refused_without_its_tokens() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let user = UserId::new("u");
    let names =
        "'github', 'gitlab', 'bitbucket', 'bitbucket_data_center', 'forgejo', 'azure_devops' or 'enterprise_sso'";
    let (status, body) = post(&api, &user, json!({"nope": {"token": "canary"}})).await;
    assert_eq!(status, 422);
    let violation = json!({
        "type": "enum", "loc": ["body", "provider_tokens", "nope", "[key]"], "msg": format!("Input should be {names}"),
        "input": "nope", "ctx": {"expected": names},
    });
    assert_eq!(body, json!({"detail": [violation]}));
    let (status, body) = post(&api, &user, json!({"github": "canary"})).await;
    assert_eq!((status, &body["detail"][0]["type"]), (422, &json!("model_attributes_type")));
    assert_eq!(body["detail"][0]["loc"], json!(["body", "provider_tokens", "github"]));
    for tokens in [
        json!("canary"),
        json!({"github": "canary"}),
        json!({"github": {"token": ["canary"]}}),
        json!({"github": {"token": "ca\nnary canary"}}),
    ] {
        let (status, body) = post(&api, &user, tokens).await;
        assert!(status == 422 && !body.to_string().contains("canary"), "{body}");
    }
    // A host without encryption needs the operator's permission.
    let (status, body) = post(&api, &user, json!({"gitlab": {"token": "good", "host": "http://127.0.0.1:9"}})).await;
    assert_eq!(status, 400, "{body}");
    assert!(stored(&api, &user).await.is_empty());
}
