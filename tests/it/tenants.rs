//! Tenants whose rows have the same ids: on no route do they see, count, change or delete each other's.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ::routes::Authentication;
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
use shared::user::organization::organization_of;
use shared::user::seal::Sealer;
use shared::user::token::{NotificationToken, TokenKey};
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::api::Api;
use crate::support::seed;

const PARENT: Uuid = Uuid::from_u128(1);
const CHILD: Uuid = Uuid::from_u128(2);
const TASK: Uuid = Uuid::from_u128(3);
const AGENT_PROFILE: Uuid = Uuid::from_u128(0xB704_A292_9166_4871_83F0_F2C3_A805_D5D4);
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
    /// A command of the user's start, by the start's token.
    Start,
}

impl By {
    fn of(authentication: Authentication) -> Self {
        match authentication {
            // A route without authentication accepts a caller as well.
            Authentication::Caller | Authentication::None => Self::Caller,
            Authentication::SandboxKey => Self::Sandbox,
            Authentication::AgentToken => Self::Agent,
            Authentication::StartToken => Self::Start,
        }
    }
}

/// A route, a request to it about rows that several tenants have, and the response that each gets.
pub struct Route {
    pub method: &'static str,
    /// As in the route table.
    pub path: &'static str,
    pub function: &'static str,
    /// The path with values for its parameters, and the query.
    pub target: String,
    pub by: By,
    pub body: Option<Value>,
    /// What an owner of such rows gets: the status, and a part of the body. `{owner}` stands for their name.
    pub owner: (u16, String),
    /// What a user without rows gets: the status, and the body where it is always the same.
    pub stranger: (u16, Option<Value>),
}

/// The requests of `tests/data/tenants.json`, which has at least one for each route. They name the organization of the owner `actor`. Requests that delete the rows that others are about
/// are its last ones.
pub fn routes() -> Vec<Route> {
    let text = include_str!("../data/tenants.json");
    let ids = [("{parent}", PARENT), ("{child}", CHILD), ("{task}", TASK), ("{reviewer}", AGENT_PROFILE)];
    let text = ids.iter().fold(text.to_owned(), |text, (name, id)| text.replace(name, &id.to_string()));
    let text = text.replace("{organization}", &organization_of(&UserId::new("actor")).to_string());
    let requests: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    let status =
        |value: &Value| value["status"].as_u64().and_then(|status| u16::try_from(status).ok()).expect("a status");
    let requests = requests.into_iter().map(|request| {
        let name = request["route"].as_str().expect("a route");
        let (method, path) = name.split_once(' ').expect("a method and a path");
        let route = ::routes::find(method, path).unwrap_or_else(|| panic!("{name} is not in the route table"));
        Route {
            method: route.method.as_str(),
            path: route.path,
            function: route.function,
            target: request["target"].as_str().expect("a target").to_owned(),
            by: By::of(route.authentication),
            body: request.get("body").cloned(),
            owner: (status(&request["owner"]), request["owner"]["contains"].as_str().expect("a text").to_owned()),
            stranger: (status(&request["stranger"]), request["stranger"].get("body").cloned()),
        }
    });
    requests.collect()
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
            "tags": {"team": "red"},
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
    sandboxes.create(record, None).await.expect("stored");
    let settings = stores.settings();
    let tokens = json!({
        "provider_tokens": {"github": {"token": format!("token of {owner}"), "host": format!("host of {owner}")}},
        "llm_profiles": {"profiles": {"own": {"model": format!("model of {owner}")}}, "active": null},
        "custom_secrets": {"SECRET": {"secret": "s", "description": format!("secret of {owner}")}},
        "agent_profiles": {"profiles": {"reviewer": {"id": AGENT_PROFILE, "llm_profile_ref": "own",
            "system_message_suffix": format!("suffix of {owner}")}}},
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

/// The token of the start that each owner has.
pub async fn start_token_of(sealer: &Sealer, user: &UserId) -> SecretString {
    let token = NotificationToken { user: user.clone(), task: TASK };
    token.issue(sealer, Duration::from_secs(60)).await.expect("a token")
}

/// All rows of all tables, and the times at which all objects were written, by key.
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
        By::Start => ("x-access-token", start_token_of(&api.sealer, user).await),
        By::Sandbox | By::Caller => ("x-session-api-key", key_of(user)),
    }
}

/// A request of a route's.
pub async fn request(api: &Api, user: &UserId, route: &Route) -> (u16, Value) {
    let asked = async {
        match route.by {
            By::Caller => api.call(user, route.method, &route.target, route.body.as_ref()).await,
            By::Sandbox | By::Agent | By::Start => {
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

/// The requested change, and the work that is left for the worker.
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
        for owner in [&actor, &bystander] {
            assert!(!answer.to_string().contains(&format!(" of {owner}")), "{method} {target}: {answer}");
        }
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
    let by_ids = routes().into_iter().find(|route| (route.method, route.path) == ("GET", "/api/v1/app-conversations"));
    let read = by_ids.expect("the lookup by ids");
    assert_eq!(request(&api, &actor, &read).await, (200, json!([null, null])));
    let (_, answer) = request(&api, &bystander, &read).await;
    assert_eq!(answer[1]["title"], "conversation of bystander");
    assert_eq!(answer[0]["sub_conversation_ids"], json!([CHILD.simple().to_string()]));
    api.stop().await;
}

/// The route table and the functions' routers are the same, and `tests/data/tenants.json` covers them.
#[tokio::test]
async fn every_route_is_in_the_route_table_in_a_router_and_in_the_table_of_tenants() {
    let folder = TempDir::new().expect("a folder");
    let api = Api::at(folder.path(), SandboxConfig::None).await;
    let declared: BTreeSet<&str> = ::routes::routes().map(|route| route.path).collect();
    let served = api.paths();
    assert_eq!(served.iter().map(String::as_str).collect::<BTreeSet<_>>(), declared);
    let for_callers: BTreeSet<String> = ::routes::routes()
        .filter(|route| route.authentication == Authentication::Caller)
        .map(|route| route.path.to_owned())
        .collect();
    assert_eq!(api.paths_for_callers(), for_callers, "the local gateway authenticates as the route table says");
    let covered = routes();
    let nobody = UserId::new("nobody");
    let parameter = Regex::new(r"\{[^}]*\}").expect("a pattern");
    for path in declared {
        let target = parameter.replace_all(path, "00000000-0000-0000-0000-00000000000f");
        for method in ["GET", "POST", "PUT", "PATCH", "DELETE"] {
            let (status, _) = api.call(&nobody, method, &target, None).await;
            let is_declared = ::routes::find(method, path).is_some();
            assert_eq!(status != 405, is_declared, "{method} {path} ({status}): the router and the route table differ");
            let is_covered = covered.iter().any(|route| route.path == path && route.method == method);
            assert_eq!(is_covered, is_declared, "{method} {path} in tests/data/tenants.json");
        }
    }
    api.stop().await;
}
