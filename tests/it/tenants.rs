//! Tenants whose rows have the same ids: on no route do they see, count, change or delete each other's.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_sdk_dynamodb::types::AttributeValue;
use axum::body::Body;
use http::Request;
use regex_lite::Regex;
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::config::{Names, SandboxConfig};
use shared::event::store::{Event, EventStore};
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::git::ProviderType;
use shared::user::seal::Sealer;
use shared::user::token::TokenKey;
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::api::Api;
use crate::support::seed;

const PARENT: Uuid = Uuid::from_u128(1);
const CHILD: Uuid = Uuid::from_u128(2);
const TASK: Uuid = Uuid::from_u128(3);
const SANDBOX: &str = "one";

/// Who a request shows itself to be from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// The user.
    Caller,
    /// The user's sandbox, by its session key.
    Sandbox,
    /// An agent, by the token with which it looks up the user's secrets.
    Agent,
}

/// A route, a request to it about rows that several tenants have, and what each gets.
pub struct Route {
    pub method: &'static str,
    /// As in the router table of `Cargo.toml`.
    pub path: &'static str,
    /// What stands for the path's parameters, and the query.
    pub target: String,
    pub by: By,
    pub body: Option<Value>,
    /// What an owner of such rows gets; `{owner}` stands for their name.
    pub owner: (u16, &'static str),
    /// What one without rows gets: status, and body where it is always the same.
    pub stranger: (u16, Option<Value>),
}

pub fn routes() -> Vec<Route> {
    const BASE: &str = "/api/v1/app-conversations";
    let empty_page = json!({"items": [], "next_page_id": null});
    let start = json!({"parent_conversation_id": PARENT, "title": "another"});
    let unknown_parent = (404, None);
    let row = |method, path: &'static str, target: String, body: Option<Value>, owner, stranger| Route {
        method,
        path,
        target,
        by: By::Caller,
        body,
        owner,
        stranger,
    };
    vec![
        row(
            "GET",
            BASE,
            format!("{BASE}?ids={PARENT}&ids={CHILD}"),
            None,
            (200, "conversation of {owner}"),
            (200, Some(json!([null, null]))),
        ),
        row(
            "GET",
            "/api/v1/app-conversations/search",
            format!("{BASE}/search?include_sub_conversations=true&sandbox_id__eq={SANDBOX}"),
            None,
            (200, "conversation of {owner}"),
            (200, Some(empty_page.clone())),
        ),
        row("GET", "/api/v1/app-conversations/count", format!("{BASE}/count"), None, (200, "2"), (200, Some(json!(0)))),
        row(
            "GET",
            "/api/v1/app-conversations/count",
            format!("{BASE}/count?title__contains=conversation&include_sub_conversations=false"),
            None,
            (200, "1"),
            (200, Some(json!(0))),
        ),
        row(
            "GET",
            "/api/v1/app-conversations/start-tasks",
            format!("{BASE}/start-tasks?ids={TASK}"),
            None,
            (200, "task of {owner}"),
            (200, Some(json!([null]))),
        ),
        row(
            "GET",
            "/api/v1/app-conversations/start-tasks/search",
            format!("{BASE}/start-tasks/search?conversation_id__eq={PARENT}"),
            None,
            (200, "task of {owner}"),
            (200, Some(empty_page.clone())),
        ),
        row(
            "GET",
            "/api/v1/app-conversations/start-tasks/count",
            format!("{BASE}/start-tasks/count"),
            None,
            (200, "1"),
            (200, Some(json!(0))),
        ),
        // The name of a member is not compressed.
        row(
            "GET",
            "/api/v1/app-conversations/{conversation_id}/download",
            format!("{BASE}/{PARENT}/download"),
            None,
            (200, "meta.json"),
            (404, None),
        ),
        row(
            "GET",
            "/api/v1/app-conversations/{conversation_id}/skills",
            format!("{BASE}/{PARENT}/skills"),
            None,
            (404, "Sandbox not found for conversation"),
            (404, Some(json!({"error": format!("Conversation {PARENT} not found")}))),
        ),
        row(
            "GET",
            "/api/v1/app-conversations/{conversation_id}/hooks",
            format!("{BASE}/{PARENT}/hooks"),
            None,
            (404, "Sandbox not found for conversation"),
            (404, Some(json!({"error": format!("Conversation {PARENT} not found")}))),
        ),
        row(
            "GET",
            "/api/v1/app-conversations/{conversation_id}/file",
            format!("{BASE}/{PARENT}/file"),
            None,
            (200, ""),
            (200, Some(json!(""))),
        ),
        row(
            "GET",
            "/api/v1/app-conversations/{conversation_id}/files",
            format!("{BASE}/{PARENT}/files"),
            None,
            (404, "Sandbox not found for conversation"),
            (404, Some(json!({"detail": format!("Conversation {PARENT} not found")}))),
        ),
        row(
            "GET",
            "/api/v1/app-conversations/{conversation_id}/git/changes",
            format!("{BASE}/{PARENT}/git/changes?path=."),
            None,
            (404, "Sandbox not found for conversation"),
            (404, Some(json!({"detail": format!("Conversation {PARENT} not found")}))),
        ),
        row(
            "GET",
            "/api/v1/app-conversations/{conversation_id}/git/diff",
            format!("{BASE}/{PARENT}/git/diff?path=a"),
            None,
            (404, "Sandbox not found for conversation"),
            (404, Some(json!({"detail": format!("Conversation {PARENT} not found")}))),
        ),
        row(
            "POST",
            "/api/v1/app-conversations/{conversation_id}/send-message",
            format!("{BASE}/{PARENT}/send-message"),
            Some(json!({"content": [{"type": "text", "text": "Hello"}]})),
            (404, "Sandbox not found for conversation"),
            (404, Some(json!({"detail": format!("Conversation {PARENT} not found")}))),
        ),
        row(
            "PATCH",
            "/api/v1/app-conversations/{conversation_id}",
            format!("{BASE}/{CHILD}"),
            Some(json!({"public": true})),
            (200, "conversation of {owner}"),
            (404, Some(json!({"detail": "unknown_app_conversation"}))),
        ),
        Route {
            by: By::Sandbox,
            ..row(
                "POST",
                "/api/v1/webhooks/conversations",
                "/api/v1/webhooks/conversations".to_owned(),
                Some(json!({"id": PARENT, "execution_status": "running"})),
                (200, "success"),
                (401, None),
            )
        },
        Route {
            by: By::Sandbox,
            ..row(
                "POST",
                "/api/v1/webhooks/events/{conversation_id}",
                format!("/api/v1/webhooks/events/{PARENT}"),
                Some(json!([{"id": "first", "timestamp": "2025-01-01T00:00:00", "kind": "MessageEvent"}])),
                (200, "success"),
                (401, None),
            )
        },
        Route {
            by: By::Agent,
            ..row(
                "GET",
                "/api/v1/webhooks/secrets",
                "/api/v1/webhooks/secrets".to_owned(),
                None,
                (200, "token of {owner}"),
                // The token is of a sandbox that the stranger does not have.
                (401, None),
            )
        },
        row(
            "GET",
            "/api/v1/conversation/{conversation_id}/events",
            format!("/api/v1/conversation/{PARENT}/events?id=first&id=second"),
            None,
            (200, "event of {owner}"),
            (200, Some(json!([null, null]))),
        ),
        row(
            "GET",
            "/api/v1/conversation/{conversation_id}/events/search",
            format!("/api/v1/conversation/{PARENT}/events/search"),
            None,
            (200, "event of {owner}"),
            (200, Some(empty_page.clone())),
        ),
        row(
            "GET",
            "/api/v1/conversation/{conversation_id}/events/count",
            format!("/api/v1/conversation/{PARENT}/events/count"),
            None,
            (200, "2"),
            (200, Some(json!(0))),
        ),
        row("POST", BASE, BASE.to_owned(), Some(start.clone()), (200, "another"), unknown_parent.clone()),
        row(
            "POST",
            "/api/v1/app-conversations/stream-start",
            format!("{BASE}/stream-start"),
            Some(start),
            (200, "another"),
            unknown_parent,
        ),
        row(
            "GET",
            "/api/v1/sandboxes",
            format!("/api/v1/sandboxes?id={SANDBOX}"),
            None,
            (200, "null"),
            (200, Some(json!([null]))),
        ),
        row(
            "GET",
            "/api/v1/sandboxes/search",
            "/api/v1/sandboxes/search".to_owned(),
            None,
            (200, "[]"),
            (200, Some(empty_page.clone())),
        ),
        row("POST", "/api/v1/sandboxes", "/api/v1/sandboxes".to_owned(), None, (503, "without sandboxes"), (503, None)),
        row(
            "POST",
            "/api/v1/sandboxes/{sandbox_id}/pause",
            format!("/api/v1/sandboxes/{SANDBOX}/pause"),
            None,
            (404, "Not Found"),
            (404, Some(json!({"detail": "Not Found"}))),
        ),
        row(
            "POST",
            "/api/v1/sandboxes/{sandbox_id}/resume",
            format!("/api/v1/sandboxes/{SANDBOX}/resume"),
            None,
            (404, "Not Found"),
            (404, Some(json!({"detail": "Not Found"}))),
        ),
        row(
            "DELETE",
            "/api/v1/sandboxes",
            "/api/v1/sandboxes?sandbox_id=none".to_owned(),
            None,
            (404, "Not Found"),
            (404, Some(json!({"detail": "Not Found"}))),
        ),
        row(
            "GET",
            "/api/v1/settings",
            "/api/v1/settings".to_owned(),
            None,
            (200, "host of {owner}"),
            (404, Some(json!({"detail": "Settings not found"}))),
        ),
        row("GET", "/api/v1/users/me", "/api/v1/users/me".to_owned(), None, (200, "\"id\":\"{owner}\""), (200, None)),
        row(
            "GET",
            "/api/v1/secrets/search",
            "/api/v1/secrets/search".to_owned(),
            None,
            (200, "secret of {owner}"),
            (200, Some(empty_page.clone())),
        ),
        row(
            "PUT",
            "/api/v1/secrets/{secret_name}",
            "/api/v1/secrets/SECRET".to_owned(),
            Some(json!({"description": "changed"})),
            (200, "Secret updated"),
            (404, Some(json!({"detail": "Secret SECRET not found"}))),
        ),
        row(
            "DELETE",
            "/api/v1/secrets/{secret_name}",
            "/api/v1/secrets/SECRET".to_owned(),
            None,
            (200, "Secret deleted"),
            (404, Some(json!({"detail": "Secret SECRET not found"}))),
        ),
        row(
            "POST",
            "/api/v1/secrets",
            "/api/v1/secrets".to_owned(),
            Some(json!({"name": "ANOTHER", "value": "v"})),
            (201, "Secret stored"),
            (201, None),
        ),
        row(
            "POST",
            "/api/v1/settings",
            "/api/v1/settings".to_owned(),
            Some(json!({"language": "en"})),
            (200, "Settings stored"),
            (200, None),
        ),
        row(
            "GET",
            "/api/v1/sandbox-specs",
            "/api/v1/sandbox-specs?id=none".to_owned(),
            None,
            (200, "null"),
            (200, Some(json!([null]))),
        ),
        row(
            "GET",
            "/api/v1/sandbox-specs/search",
            "/api/v1/sandbox-specs/search".to_owned(),
            None,
            (200, "[]"),
            (200, Some(empty_page.clone())),
        ),
        Route {
            by: By::Sandbox,
            ..row(
                "GET",
                "/api/v1/sandboxes/{sandbox_id}/settings/secrets",
                format!("/api/v1/sandboxes/{SANDBOX}/settings/secrets"),
                None,
                (200, "github_token"),
                (401, None),
            )
        },
        Route {
            by: By::Sandbox,
            ..row(
                "GET",
                "/api/v1/sandboxes/{sandbox_id}/settings/secrets/{secret_name}",
                format!("/api/v1/sandboxes/{SANDBOX}/settings/secrets/github_token"),
                None,
                (200, "token of {owner}"),
                (401, None),
            )
        },
        row(
            "POST",
            "/api/v1/conversations/{conversation_id}/pending-messages",
            format!("/api/v1/conversations/{PARENT}/pending-messages"),
            Some(json!({"content": [{"type": "text", "text": "Hello"}]})),
            (201, "queued"),
            (404, Some(json!({"detail": "There is no such conversation"}))),
        ),
        row(
            "GET",
            "/api/v1/web-client/config",
            "/api/v1/web-client/config".to_owned(),
            None,
            (200, "oss"),
            (200, None),
        ),
        row(
            "GET",
            "/api/v1/skills/search",
            "/api/v1/skills/search".to_owned(),
            None,
            (200, "[]"),
            (200, Some(empty_page.clone())),
        ),
        row(
            "GET",
            "/api/agent-profiles",
            "/api/agent-profiles".to_owned(),
            None,
            (200, "profiles"),
            (200, Some(json!({"profiles": [], "active_agent_profile_id": null}))),
        ),
        row(
            "GET",
            "/api/v1/config/models/search",
            "/api/v1/config/models/search?limit=100".to_owned(),
            None,
            (200, "[]"),
            (200, Some(empty_page.clone())),
        ),
        row(
            "GET",
            "/api/v1/config/providers/search",
            "/api/v1/config/providers/search?limit=100".to_owned(),
            None,
            (200, "[]"),
            (200, Some(empty_page.clone())),
        ),
        row(
            "GET",
            "/api/v1/git/repositories/search",
            "/api/v1/git/repositories/search?limit=100".to_owned(),
            None,
            (200, "[]"),
            (200, Some(empty_page.clone())),
        ),
        row(
            "GET",
            "/api/v1/git/branches/search",
            "/api/v1/git/branches/search?provider=github&repository=a/b&query=&limit=30".to_owned(),
            None,
            (200, "[]"),
            (200, Some(empty_page.clone())),
        ),
        row(
            "GET",
            "/api/v1/git/installations/search",
            "/api/v1/git/installations/search?limit=100".to_owned(),
            None,
            (200, "[]"),
            (200, Some(empty_page.clone())),
        ),
        row(
            "GET",
            "/api/v1/git/suggested-tasks/search",
            "/api/v1/git/suggested-tasks/search?limit=100".to_owned(),
            None,
            (200, "[]"),
            (200, Some(empty_page.clone())),
        ),
        row(
            "GET",
            "/api/v1/settings/profiles",
            "/api/v1/settings/profiles".to_owned(),
            None,
            (200, "active_profile"),
            (200, Some(json!({"profiles": [], "active_profile": null}))),
        ),
        row(
            "GET",
            "/api/v1/settings/agent-schema",
            "/api/v1/settings/agent-schema".to_owned(),
            None,
            (200, "llm.model"),
            (200, None),
        ),
        row(
            "GET",
            "/api/v1/settings/conversation-schema",
            "/api/v1/settings/conversation-schema".to_owned(),
            None,
            (200, "confirmation_mode"),
            (200, None),
        ),
        row("GET", "/api/keys/current", "/api/keys/current".to_owned(), None, (200, "{owner}"), (200, None)),
        row(
            "GET",
            "/api/organizations",
            "/api/organizations".to_owned(),
            None,
            (200, "items"),
            (200, Some(json!({"items": [], "current_org_id": null}))),
        ),
        row("GET", "/alive", "/alive".to_owned(), None, (200, "ok"), (200, Some(json!({"status": "ok"})))),
        row("GET", "/health", "/health".to_owned(), None, (200, "OK"), (200, Some(json!("OK")))),
        row("GET", "/ready", "/ready".to_owned(), None, (200, "true"), (200, Some(json!({"ready": true})))),
        row("GET", "/server_info", "/server_info".to_owned(), None, (200, "openhands-lambda"), (200, None)),
        row(
            "POST",
            "/api/cloud-proxy",
            "/api/cloud-proxy".to_owned(),
            Some(json!({
                "host": "http://127.0.0.1:1",
                "method": "GET",
                "path": "/api/conversations",
                "headers": {"X-Session-API-Key": "session-key-of-actor"},
            })),
            (404, "Sandbox one not found"),
            (403, Some(json!({"detail": "headers must hold your own sandbox's X-Session-API-Key"}))),
        ),
        // Last: it takes the rows that the others are about.
        row(
            "DELETE",
            "/api/v1/sandboxes/{sandbox_id}",
            format!("/api/v1/sandboxes/{SANDBOX}?sandbox_id={SANDBOX}"),
            None,
            (200, "success"),
            (404, Some(json!({"detail": "Not Found"}))),
        ),
        row(
            "DELETE",
            "/api/v1/app-conversations/{conversation_id}",
            format!("{BASE}/{PARENT}"),
            None,
            (200, "success"),
            (404, None),
        ),
    ]
}

/// The rows that each owner has, under the same ids.
pub async fn furnish(api: &Api, owner: &UserId) {
    furnish_in(&api.aws, &api.names, &api.sealer, owner).await;
}

/// As [`furnish`], wherever the tables are.
pub async fn furnish_in(aws: &Aws, names: &Names, sealer: &Sealer, owner: &UserId) {
    let time = "2025-01-01T00:00:00Z";
    let conversation = |id: Uuid, parent: Option<Uuid>| {
        json!({"type": "conversation", "data": {
            "id": id.simple().to_string(),
            "sandbox_id": SANDBOX,
            "title": format!("conversation of {owner}"),
            "parent_conversation_id": parent.map(|parent| parent.simple().to_string()),
            "created_at": time,
            "updated_at": time,
        }})
    };
    let task = json!({"type": "start_task", "data": {
        "id": TASK.simple().to_string(),
        "status": "READY",
        "app_conversation_id": PARENT.simple().to_string(),
        "sandbox_id": SANDBOX,
        "request": {"title": format!("task of {owner}")},
        "created_at": time,
        "updated_at": time,
    }});
    let rows = [conversation(PARENT, None), conversation(CHILD, Some(PARENT)), task];
    let stores = Stores::new(names, aws, sealer);
    seed::load(&stores, owner, rows).await;
    let sandboxes = stores.sandboxes();
    let record = sandboxes.new_record(owner, SANDBOX, "spec", &key_of(owner)).await.expect("a record");
    sandboxes.put_new(record).await.expect("stored");
    let settings = stores.settings();
    let tokens = json!({
        "provider_tokens": {"github": {"token": format!("token of {owner}"), "host": format!("host of {owner}")}},
        "custom_secrets": {"SECRET": {"secret": "s", "description": format!("secret of {owner}")}},
    });
    settings.put(owner, &tokens.to_string().into()).await.expect("stored");
    // One event in the row, one in the bucket.
    let event = |id: &str, size: usize| Event {
        id: id.to_owned(),
        timestamp: "2025-01-01T00:00:00".to_owned(),
        kind: "MessageEvent".to_owned(),
        json: json!({"id": id, "text": format!("event of {owner} {}", "x".repeat(size))}).to_string(),
    };
    let events = vec![event("first", 1), event("second", 400_000)];
    store_of_events(aws, names).append(owner, PARENT, events).await.expect("stored");
}

fn store_of_events(aws: &Aws, names: &Names) -> EventStore {
    Stores::without_key(names, aws).events()
}

pub fn key_of(user: &UserId) -> SecretString {
    format!("session-key-of-{user}").into()
}

pub async fn token_of(sealer: &Sealer, user: &UserId) -> SecretString {
    let key = TokenKey::of(sealer).await.expect("a key");
    key.sign(user, ProviderType::Github, SANDBOX, Duration::from_secs(60)).expect("a token")
}

/// All rows of all tables, and when all objects were written, by what tells them apart.
pub async fn everything(api: &Api) -> BTreeMap<String, HashMap<String, AttributeValue>> {
    let mut all = BTreeMap::new();
    for table in schema::TABLES {
        let name = api.names.conversations.replace("conversations", table.name);
        let mut items = api.aws.dynamodb.scan().table_name(&name).into_paginator().items().send();
        while let Some(item) = items.next().await {
            let item = item.expect("the store");
            let [partition, sort] =
                [table.partition_key, table.sort_key].map(|key| item[key].as_s().expect("text").clone());
            all.insert(format!("{name} {partition} {sort}"), item);
        }
    }
    let objects = api.aws.s3.list_objects_v2().bucket(&api.names.bucket).send().await.expect("the bucket");
    for object in objects.contents() {
        let written = AttributeValue::S(format!("{:?} {:?}", object.size(), object.last_modified()));
        all.insert(
            format!("object {}", object.key().expect("a key")),
            HashMap::from([("written".to_owned(), written)]),
        );
    }
    all
}

/// The header in which the user's sandbox, or an agent in it, shows who it is.
pub async fn credential(api: &Api, user: &UserId, by: By) -> (&'static str, SecretString) {
    match by {
        By::Agent => ("x-access-token", token_of(&api.sealer, user).await),
        By::Sandbox | By::Caller => ("x-session-api-key", key_of(user)),
    }
}

/// A request of a route's.
pub async fn request(api: &Api, user: &UserId, route: &Route) -> (u16, Value) {
    let asked = async {
        match route.by {
            By::Caller => api.call(user, route.method, &route.target, route.body.as_ref()).await,
            By::Sandbox | By::Agent => {
                let (header, secret) = credential(api, user, route.by).await;
                let body = route.body.as_ref().map_or_else(Body::empty, |body| Body::from(body.to_string()));
                let request = Request::builder()
                    .method(route.method)
                    .uri(&route.target)
                    .header("content-type", "application/json")
                    .header(header, secret.expose_secret());
                api.send(request.body(body).expect("a request")).await
            }
        }
    };
    with_worker(api, asked).await
}

/// What was asked for, and what is left to do behind it.
pub async fn with_worker<T>(api: &Api, asked: impl Future<Output = T>) -> T {
    let answered = AtomicBool::new(false);
    let asked = async {
        let answer = asked.await;
        answered.store(true, Ordering::Relaxed);
        answer
    };
    // An answer may wait for the worker.
    let working = async {
        while !answered.load(Ordering::Relaxed) {
            api.work().await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        api.work().await;
    };
    tokio::join!(asked, working).0
}

#[tokio::test]
async fn tenants_with_the_same_ids_never_meet() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let [actor, bystander, stranger] = ["actor", "bystander", "stranger"].map(UserId::new);
    let mut before = everything(&api).await;
    furnish(&api, &bystander).await;
    let mut untouched = everything(&api).await;
    untouched.retain(|key, _| before.remove(key).is_none());
    assert!(untouched.len() >= 8, "{untouched:?}");
    furnish(&api, &actor).await;
    for route in routes() {
        let (method, target) = (route.method, &route.target);
        let seen = everything(&api).await;
        let (status, answer) = request(&api, &stranger, &route).await;
        let expected = route.stranger.1.clone().unwrap_or_else(|| answer.clone());
        assert_eq!((status, &answer), (route.stranger.0, &expected), "{method} {target}");
        assert!(!answer.to_string().contains(" of "), "{method} {target}: {answer}");
        let now = everything(&api).await;
        // What a stranger has made may change by the stranger's requests.
        let differing: Vec<&String> = seen
            .iter()
            .filter(|(key, row)| !key.contains(" stranger ") && now.get(*key) != Some(*row))
            .map(|(key, _)| key)
            .collect();
        assert_eq!(differing, Vec::<&String>::new(), "{method} {target} of a stranger");
        assert!(
            now.keys().filter(|key| !seen.contains_key(*key)).all(|key| key.contains("stranger")),
            "{method} {target}"
        );

        let (status, answer) = request(&api, &actor, &route).await;
        let holds = route.owner.1.replace("{owner}", actor.as_str());
        assert_eq!(status, route.owner.0, "{method} {target}: {answer}");
        assert!(answer.to_string().contains(&holds), "{method} {target}: {answer}");
        assert!(!answer.to_string().contains("bystander"), "{method} {target}: {answer}");
        let now = everything(&api).await;
        for (key, row) in &untouched {
            assert_eq!(now.get(key), Some(row), "{method} {target} of another owner changed {key}");
        }
    }
    // What the actor deleted is gone for them, and there for the bystander, as it always was.
    let read = Route { body: None, ..routes().swap_remove(0) };
    assert_eq!(request(&api, &actor, &read).await, (200, json!([null, null])));
    let (_, answer) = request(&api, &bystander, &read).await;
    assert_eq!(answer[1]["title"], "conversation of bystander");
    assert_eq!(answer[0]["sub_conversation_ids"], json!([CHILD.simple().to_string()]));
    api.stop().await;
}

/// A route that is not in the table would be one whose tenants nobody keeps apart.
#[tokio::test]
async fn every_route_is_in_the_table_of_tenants() {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let manifest = std::fs::read_to_string(manifest).expect("the workspace's manifest");
    let (_, router) = manifest.split_once("[workspace.metadata.lambda.watch.router]").expect("a router table");
    let router = router.split("\n[").next().unwrap_or_default();
    let paths: Vec<&str> = Regex::new(r#"(?m)^"([^"]+)" ="#)
        .expect("a pattern")
        .captures_iter(router)
        .filter_map(|found| found.get(1).map(|path| path.as_str()))
        .collect();
    assert!(paths.len() >= 10, "{paths:?}");
    let table = routes();
    for route in &table {
        assert!(paths.contains(&route.path), "{} is in the table, but not in the router", route.path);
    }
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let nobody = UserId::new("nobody");
    let parameter = Regex::new(r"\{[^}]*\}").expect("a pattern");
    for path in paths {
        let target = parameter.replace_all(path, "00000000-0000-0000-0000-00000000000f");
        let mut is_there = false;
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
            let (status, answer) = api.call(&nobody, method, &target, None).await;
            // Some routes answer as if they were none, where their thing is not there.
            let is_route = (status, &answer) != (404, &json!({"detail": "Not Found"}));
            is_there |= is_route;
            let known = table.iter().any(|route| route.path == path && route.method == method);
            assert!(status == 405 || known, "{method} {path} ({status}) is not in the table of tenants");
        }
        assert!(is_there, "{path} is in the router, but no function has it");
    }
    api.stop().await;
}
