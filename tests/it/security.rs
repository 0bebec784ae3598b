//! Authentication of every operation of the API, with the authorizer and the routers combined as in `template.yaml`;
//! and confidentiality of secrets.

use std::collections::{BTreeMap, BTreeSet};

use authorizer::{Authorizer, Refusal};
use axum::body::Body;
use http::Request;
use secrecy::ExposeSecret as _;
use serde_json::{Value, json};
use shared::config::{AuthorizerConfig, OidcConfig, SandboxConfig};
use shared::http::caller::Caller;
use shared::user::UserId;
use shared::user::api_key::ApiKeyStore;
use shared::user::organization::organization_of;
use tempfile::TempDir;

use crate::authorizer::{AUDIENCE, Issuer, Signer, forged, invalid};
use crate::openapi::{OF_THIS_MACHINE, document, operations};
use crate::support::api::Api;
use crate::support::git_server::GitServer;
use crate::support::product::{Product, contains, logged, saying, with};
use crate::support::scripted_llm::ScriptedLlm;
use crate::template::template;
use crate::tenants::{By, Route, everything, furnish, key_of, routes, start_token_of, token_of, with_worker};

/// Headers that may carry credentials.
const HEADERS: [&str; 3] = ["authorization", "x-access-token", "x-session-api-key"];
/// Routes that need no credentials and return nothing about any user. This list may only become shorter.
const OPEN: [&str; 13] = [
    "/alive",
    "/api/v1/config/models/search",
    "/api/v1/config/providers/search",
    "/api/v1/git/branches/search",
    "/api/v1/git/installations/search",
    "/api/v1/git/repositories/search",
    "/api/v1/git/suggested-tasks/search",
    "/api/v1/settings/agent-schema",
    "/api/v1/settings/conversation-schema",
    "/api/v1/web-client/config",
    "/health",
    "/ready",
    "/server_info",
];

/// API Gateway as in `template.yaml`: the authorizer in front of the routes that require it, then the router.
struct Gateway {
    api: Api,
    authorizer: Authorizer,
    template: Value,
}

impl Gateway {
    fn definition(&self) -> &Value {
        &self.template["Resources"]["Api"]["Properties"]["DefinitionBody"]
    }

    async fn send(&self, route: &Route, headers: &[(&str, String)]) -> (u16, Value) {
        let operation = &self.definition()["paths"][route.path][route.method.to_lowercase()];
        assert!(operation.is_object(), "{} {} is not in the template", route.method, route.path);
        let mut request = Request::builder().method(route.method).uri(&route.target);
        if let Some(wanted) = operation.get("security") {
            assert_eq!(*wanted, json!([{"caller": []}]));
            let given: BTreeMap<&str, &String> = headers.iter().map(|(name, value)| (*name, value)).collect();
            let event = json!({"type": "REQUEST", "methodArn": "arn", "headers": given});
            match self.authorizer.handle(event).await {
                Ok(answer) => {
                    let user = answer["context"]["user_id"].as_str().expect("a user");
                    request = request.extension(Caller(UserId::new(user)));
                }
                Err(refusal @ Refusal::Unauthorized) => {
                    assert_eq!(refusal.to_string(), "Unauthorized", "API Gateway responds with 401 to this text");
                    let refusal = &self.definition()["x-amazon-apigateway-gateway-responses"]["UNAUTHORIZED"];
                    let body = refusal["responseTemplates"]["application/json"].as_str().expect("a body");
                    return (401, serde_json::from_str(body).expect("JSON"));
                }
                Err(refusal) => panic!("{refusal:?}"),
            }
        }
        for (name, value) in headers {
            request = request.header(*name, value);
        }
        let body = route.body.as_ref().map_or_else(Body::empty, |body| Body::from(body.to_string()));
        let request = request.header("content-type", "application/json").body(body).expect("a request");
        with_worker(&self.api, self.api.send(request)).await
    }
}

fn in_header(name: &'static str, credential: &str) -> (&'static str, String) {
    let value = if name == "authorization" { format!("Bearer {credential}") } else { credential.to_owned() };
    (name, value)
}

/// Whether a response contains a user's name as a word, as each of the user's rows does.
fn mentions(answer: &Value, user: &UserId) -> bool {
    answer.to_string().split(|c: char| !c.is_alphanumeric()).any(|word| word == user.as_str())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_operation_accepts_only_authorized_callers() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let issuer = Issuer::start().await;
    let (rsa, ec) = (Signer::rsa("one"), Signer::ec("two"));
    issuer.publish(&[&rsa, &ec]);
    let keys = ApiKeyStore::new(api.aws.dynamodb.clone(), api.names.users.clone());
    let oidc = OidcConfig { issuer: issuer.server.url(), audience: AUDIENCE.into() };
    let config = AuthorizerConfig { users: api.names.users.clone(), oidc: Some(oidc) };
    let authorizer = Authorizer::new(&config, keys.clone());
    // The owner in the table of tenants.
    let [owner, stranger] = ["actor", "stranger"].map(UserId::new);
    furnish(&api, &owner).await;

    let (revoked, revoked_key) = keys.create(&owner, "revoked").await.expect("a key");
    assert!(keys.revoke(&owner, revoked.id).await.expect("the store"));
    let (_, of_stranger) = keys.create(&stranger, "a key").await.expect("a key");
    let agents = token_of(&api.sealer, &owner).await.expose_secret().to_owned();
    let mut bad = invalid(&issuer, &ec);
    bad.extend(forged(&issuer, &rsa, &ec).into_iter().filter(|(_, token)| token.is_ascii()));
    bad.push(("a revoked key".to_owned(), revoked_key.expose_secret().to_owned()));
    bad.push(("an unknown key".to_owned(), format!("oh-{}", shared::id::random_base62(43))));
    bad.push(("nonsense".to_owned(), "x".to_owned()));
    // Credentials that are valid elsewhere.
    bad.push(("the session key of a sandbox".to_owned(), key_of(&owner).expose_secret().to_owned()));
    bad.push(("the token of an agent".to_owned(), agents));
    let of_start = start_token_of(&api.sealer, &owner).await;
    bad.push(("the token of a start".to_owned(), of_start.expose_secret().to_owned()));
    bad.push(("a user's name".to_owned(), owner.as_str().to_owned()));

    let gateway = Gateway { api, authorizer, template: template() };
    let routes = routes();
    let covered: BTreeSet<(&str, &str)> = routes.iter().map(|route| (route.path, route.method)).collect();
    let document = document();
    for (method, path, _) in operations(&document) {
        let is_local = OF_THIS_MACHINE.contains(&path.as_str());
        assert!(is_local || covered.contains(&(path.as_str(), method.as_str())), "{method} {path} is not tried here");
    }

    let stored = everything(&gateway.api).await;
    for route in &routes {
        let what = format!("{} {}", route.method, route.path);
        if OPEN.contains(&route.path) {
            let (status, answer) = gateway.send(route, &[]).await;
            assert_eq!((status, mentions(&answer, &owner)), (200, false), "{what}: {answer}");
            continue;
        }
        let (status, answer) = gateway.send(route, &[]).await;
        assert!(status == 401 && answer["detail"].is_string(), "{what} without credentials: {status} {answer}");
        for (which, credential) in &bad {
            for header in HEADERS {
                // The credentials that these routes are for.
                let holds = match route.by {
                    By::Sandbox => header == "x-session-api-key" && which.starts_with("the session key"),
                    By::Agent => header == "x-access-token" && which.starts_with("the token of an agent"),
                    By::Start => header == "x-access-token" && which.starts_with("the token of a start"),
                    By::Caller => false,
                };
                if !holds {
                    let (status, answer) = gateway.send(route, &[in_header(header, credential)]).await;
                    assert!(
                        status == 401 && answer["detail"].is_string(),
                        "{what} with {which} in {header}: {status} {answer}"
                    );
                }
            }
        }
        // What callers claim about themselves is ignored.
        for header in ["x-user-id", "x-amzn-oidc-identity", "cookie", "x-forwarded-user", "x-org-id"] {
            let (status, _) = gateway.send(route, &[(header, owner.as_str().to_owned())]).await;
            assert_eq!(status, 401, "{what} with {header}");
        }
    }
    assert_eq!(everything(&gateway.api).await, stored, "refused requests changed nothing");

    for route in &routes {
        let what = format!("{} {}", route.method, route.path);
        if route.by == By::Caller {
            // Another tenant, with a key and with a token, accesses the owner's rows.
            for credential in [of_stranger.expose_secret().to_owned(), ec.sign(&issuer.claims("stranger"))] {
                let (status, answer) = gateway.send(route, &[in_header("x-access-token", &credential)]).await;
                assert!(!mentions(&answer, &owner), "{what} of another tenant: {answer}");
                let expected = if what == "POST /api/v1/secrets" { [201, 200] } else { [route.stranger.0; 2] };
                // The first request of the table's stranger has been sent already.
                let again = status == 200 && ["/api/v1/settings", "/api/v1/secrets/search"].contains(&route.path);
                let deleted = what.starts_with("DELETE /api/v1/secrets") || what.starts_with("PUT /api/v1/secrets");
                assert!(again || deleted || expected.contains(&status), "{what} of another tenant: {status} {answer}");
            }
        }
        // The owner's request succeeds, so everything above was refused because of the credentials.
        let header = match route.by {
            By::Caller => in_header("authorization", &ec.sign(&issuer.claims(owner.as_str()))),
            By::Sandbox => in_header("x-session-api-key", key_of(&owner).expose_secret()),
            By::Agent => in_header("x-access-token", token_of(&gateway.api.sealer, &owner).await.expose_secret()),
            By::Start => in_header("x-access-token", start_token_of(&gateway.api.sealer, &owner).await.expose_secret()),
        };
        let (status, answer) = gateway.send(route, &[header]).await;
        assert_eq!(status, route.owner.0, "{what} of the owner: {answer}");
    }
    gateway.api.stop().await;
}

/// Secrets that are unique for each input, so that a leaked one shows where it came from.
struct Canaries(BTreeSet<String>);

impl Canaries {
    fn for_input(&mut self, input: &str) -> String {
        let canary = format!("canary-{input}-{}", shared::id::random_base62(16));
        self.0.insert(canary.clone());
        canary
    }

    #[track_caller]
    fn are_not_in(&self, bytes: &[u8], what: &str) {
        let found: Vec<&String> = self.0.iter().filter(|canary| contains(bytes, canary.as_bytes())).collect();
        assert!(found.is_empty(), "{what} contains {found:?}");
    }
}

/// On a real agent server, from the settings file to the error of a failed start.
#[tokio::test]
async fn secrets_of_every_input_are_in_no_response_log_or_store() {
    let mut canaries = Canaries(BTreeSet::new());
    let llm = ScriptedLlm::start().await;
    let git = GitServer::start().await;
    let token = canaries.for_input("token-of-file");
    git.create_repository("owner/private", &[("README.md", "Read me\n", false)], &[]).await;
    git.require("someone", &token);
    let product = Product::start(json!({
        "llm_model": "openai/scripted",
        "llm_api_key": canaries.for_input("model-of-file"),
        "llm_base_url": llm.base_url(),
        "search_api_key": canaries.for_input("search-of-file"),
        // The test does not call the search service.
        "mcp_config": {"tavily": {"url": "https://mcp.tavily.com/mcp/", "enabled": false}},
        "provider_tokens": {"github": {"token": token, "host": git.url()}},
        "custom_secrets": {"OF_FILE": {"secret": canaries.for_input("secret-of-file"), "description": "d"}},
    }))
    .await;

    // A start that succeeds, and two that fail.
    let secret = canaries.for_input("secret-of-start");
    let start = with(saying("Hello"), json!({"selected_repository": "owner/private", "secrets": {"OF_START": secret}}));
    let started = product.start_conversation(start.clone()).await;
    let id = started.conversation_id();
    product.conversation_when(&id, "finished").await;
    let sandbox = started.sandbox_id();
    let missing = with(start.clone(), json!({"selected_repository": "owner/missing", "sandbox_id": sandbox}));
    let failed = product.start_conversation(missing).await;
    assert!(failed.error().contains("owner/missing"), "{:#}", failed.task);
    let (key, used) = (canaries.for_input("model-of-api"), canaries.for_input("token-of-api"));
    let mut answers = vec![started.task.to_string(), failed.task.to_string()];

    // Valid and invalid settings and secrets.
    let value = canaries.for_input("broken");
    let long = format!("{value}{}", "x".repeat(70_000));
    let bodies = [
        (
            "POST",
            "/api/v1/settings",
            json!({"llm_api_key": key, "search_api_key": canaries.for_input("search"),
            "sandbox_api_key": canaries.for_input("sandbox"), "provider_tokens": {"gitlab": {"token": used}},
            "mcp_config": {"shttp_servers": [{"url": "https://mcp.example.org", "api_key": canaries.for_input("mcp")}],
                "sse_servers": [{"url": "https://sse.example.org", "api_key": canaries.for_input("sse")}],
                "stdio_servers": [{"name": "one", "command": "true", "env": {"KEY": canaries.for_input("env")}}]}}),
        ),
        (
            "POST",
            "/api/v1/settings",
            json!({"agent_settings_diff": {"llm": {"api_key": canaries.for_input("nested")}}}),
        ),
        (
            "POST",
            "/api/v1/settings",
            json!({"llm_api_key": {"key": value}, "search_api_key": [value], "sandbox_api_key": long}),
        ),
        (
            "POST",
            "/api/v1/settings",
            json!({"provider_tokens": {"github": {"token": [value]}, "nowhere": {"token": value}}}),
        ),
        ("POST", "/api/v1/settings", json!({"provider_tokens": value, "mcp_config": value})),
        (
            "POST",
            "/api/v1/settings",
            json!({"mcp_config": {"shttp_servers": [{"api_key": value}], "stdio_servers": [{"env": {"A": [value]}}]}}),
        ),
        (
            "POST",
            "/api/v1/settings",
            json!({"agent_settings_diff": {"llm": {"aws_secret_access_key": canaries.for_input("aws-of-settings"),
                "extra_headers": {"X-Key": canaries.for_input("header-of-settings")}},
                "verification": {"critic_api_key": canaries.for_input("critic")},
                "agent_context": {"secrets": {"OF_CONTEXT": canaries.for_input("context")}}}}),
        ),
        (
            "POST",
            "/api/v1/settings",
            json!({"agent_settings_diff": {"llm": {"api_key": [value], "extra_headers": value, "aws_session_token": {"a": value}},
                "verification": value, "agent_context": {"secrets": [value]}}, "agent_settings": {"llm": {"api_key": value}},
                "conversation_settings_diff": [value]}),
        ),
        (
            "POST",
            "/api/v1/settings/profiles/other",
            json!({"llm": {"model": "openai/other", "base_url": llm.base_url(), "api_key": canaries.for_input("profile"),
                "aws_access_key_id": canaries.for_input("aws-id"), "aws_secret_access_key": canaries.for_input("aws-secret"),
                "aws_session_token": canaries.for_input("aws-token")}}),
        ),
        // No conversation uses this one: agent servers keep headers in clear text in their sandbox.
        (
            "POST",
            "/api/v1/settings/profiles/headers",
            json!({"llm": {"model": "m", "extra_headers": {"Authorization": format!("Bearer {}", canaries.for_input("header"))}}}),
        ),
        (
            "POST",
            "/api/v1/settings/profiles/broken",
            json!({"llm": {"model": "m", "api_key": [value], "extra_headers": [value], "key": value}}),
        ),
        ("POST", "/api/v1/settings/profiles/broken", json!({"llm": {"api_key": value}})),
        ("POST", "/api/v1/settings/profiles/broken", json!({"llm": value})),
        ("POST", "/api/v1/settings/profiles/broken", json!(value)),
        ("POST", "/api/v1/settings/profiles/broken", json!({"llm": {"model": "m", "api_key": long}})),
        ("POST", &format!("/api/v1/app-conversations/{id}/switch_profile"), json!({"profile_name": "other"})),
        ("POST", "/api/v1/settings/profiles/other/activate", json!({})),
        ("POST", "/api/v1/settings/profiles/other/rename", json!({"new_name": "renamed"})),
        ("POST", "/api/v1/secrets", json!({"name": "OF_API", "value": canaries.for_input("secret-of-api")})),
        ("PUT", "/api/v1/secrets/OF_API", json!({"value": canaries.for_input("changed-secret")})),
        ("POST", "/api/v1/secrets", json!({"value": value})),
        ("POST", "/api/v1/secrets", json!({"name": "LONG", "value": long})),
        ("PUT", "/api/v1/secrets/NONE", json!({"value": value})),
        ("POST", "/api/v1/app-conversations", json!({"secrets": {"A": [value], "": value, "B": long}})),
        ("POST", "/api/v1/app-conversations", json!({"secrets": [value]})),
        ("POST", "/api/v1/app-conversations/stream-start", json!({"secrets": value})),
    ];
    for (method, path, body) in bodies {
        answers.push(product.answer_to(method, path, &[], Some(&body.to_string())).await);
    }
    // Truncated, so that it is not valid JSON.
    for path in ["/api/v1/settings", "/api/v1/settings/profiles/p", "/api/v1/secrets", "/api/v1/app-conversations"] {
        answers.push(product.answer_to("POST", path, &[], Some(&format!("{{\"llm_api_key\": \"{value}"))).await);
    }
    let organization = format!("/api/organizations/{}", organization_of(&UserId::local()));
    for path in [
        "/api/v1/settings",
        "/api/v1/users/me",
        "/api/v1/secrets/search",
        "/api/v1/sandbox-specs/search",
        "/api/v1/settings/profiles",
        "/api/v1/settings/profiles/headers",
        "/api/v1/settings/profiles/renamed",
        &format!("{organization}/me"),
        &format!("{organization}/profiles"),
        &format!("{organization}/profiles/renamed"),
    ] {
        answers.push(product.answer_to("GET", path, &[], None).await);
    }
    assert!(answers.last().is_some_and(|answer| answer.contains("openai/other")), "the profile was stored");
    // Invalid credentials, in every header and query parameter.
    let shown = canaries.for_input("credential");
    let cookie = format!("session={shown}");
    for route in routes() {
        let bearer = format!("Bearer {shown}");
        let headers = [
            ("authorization", bearer.as_str()),
            ("x-access-token", shown.as_str()),
            ("x-session-api-key", shown.as_str()),
            ("cookie", cookie.as_str()),
        ];
        let separator = if route.target.contains('?') { '&' } else { '?' };
        let target = format!("{}{separator}session_api_key={shown}&api_key={shown}", route.target);
        let body = route.body.as_ref().map(Value::to_string);
        // Deletions would remove what the rest of this test needs.
        if route.method != "DELETE" {
            answers.push(product.answer_to(route.method, &target, &headers, body.as_deref()).await);
        }
    }
    for path in ["/search", "/count", "/start-tasks/search", &format!("/{id}/skills"), &format!("/{id}/hooks")] {
        answers.push(product.get(path).await.to_string());
    }
    answers.push(product.get_from(&format!("/api/v1/conversation/{id}/events/search")).await.to_string());
    for answer in &answers {
        canaries.are_not_in(answer.as_bytes(), answer);
    }

    // The session key is in responses, because clients authenticate with it. It must be nowhere else.
    let session_key = product.conversation(&id).await["session_api_key"].as_str().expect("a key").to_owned();
    product.stop_sandboxes().await;
    canaries.0.insert(session_key);
    canaries.are_not_in(logged().as_bytes(), "the log");
    let files = product.files();
    assert!(files.iter().any(|file| file.ends_with("dynamodb.sqlite")), "{files:?}");
    for file in &files {
        canaries.are_not_in(&std::fs::read(file).unwrap_or_default(), &file.display().to_string());
    }
    product.shutdown().await;
}
