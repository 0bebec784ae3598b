//! Data folders that earlier commits have written: after the migration everything is there over HTTP, and unfinished work goes on.
//! tests/data/data-folders/README.md describes the folders.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use aws_sdk_dynamodb::types::AttributeValue;
use local::options::{CommonOptions, SandboxKind};
use local::server::{Environment, Server};
use reqwest::{Client, Method, StatusCode};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Map, Value, json};
use shared::config::{ExportConfig, SealingConfig};
use shared::stores::Stores;
use shared::user::UserId;
use shared::user::seal::Sealer;
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::wait::{wait_for, wait_until};

const FOLDERS: [&str; 2] = ["6132741", "efb6cde"];
const CONVERSATIONS: &str = "/api/v1/app-conversations";
/// The sweep finds unfinished work after its first interval; a start then needs up to eight attempts.
const SOON: Duration = Duration::from_secs(90);

type Item = std::collections::HashMap<String, AttributeValue>;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("data/data-folders")
}

/// A server on an unpacked data folder.
struct Opened {
    server: Server,
    http: Client,
    expected: Value,
    _folder: TempDir,
}

impl Opened {
    async fn new(name: &str) -> Self {
        let folder = TempDir::new().expect("a folder");
        let archive = fixtures().join(format!("{name}.tar.gz"));
        // With the present time as the files' time, because old exports are removed.
        let unpacked = Command::new("tar").arg("-xzmf").arg(archive).arg("-C").arg(folder.path()).status();
        assert!(unpacked.expect("tar").success());
        let expected = std::fs::read(fixtures().join("expected.json")).expect("the list of contents");
        let mut expected: Value = serde_json::from_slice(&expected).expect("JSON");
        let options = CommonOptions::on(folder.path().to_owned(), SandboxKind::None);
        let environment = Environment {
            export: ExportConfig { settle: Duration::ZERO, ..ExportConfig::default() },
            ..Environment::default()
        };
        let server = Server::start(&options, environment, true, None).await.expect("the server starts");
        Self {
            server,
            http: Client::builder().no_proxy().build().expect("a client"),
            expected: expected[name].take(),
            _folder: folder,
        }
    }

    async fn send(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Vec<u8>) {
        let mut request = self.http.request(method, format!("http://{}{path}", self.server.address));
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.expect("a response");
        (response.status(), response.bytes().await.expect("a body").to_vec())
    }

    async fn get(&self, path: &str) -> Value {
        let (status, body) = self.send(Method::GET, path, None).await;
        assert_eq!(status, 200, "{path}: {}", String::from_utf8_lossy(&body));
        serde_json::from_slice(&body).expect("JSON")
    }

    /// All items of a list.
    async fn pages(&self, path: &str) -> Vec<Value> {
        let (mut items, mut page) = (Vec::new(), String::new());
        loop {
            let mut found = self.get(&format!("{path}&limit=5{page}")).await;
            items.extend(found["items"].take().as_array().expect("items").clone());
            match found["next_page_id"].as_str() {
                Some(next) => {
                    let next: String = form_urlencoded::byte_serialize(next.as_bytes()).collect();
                    page = format!("&page_id={next}");
                }
                None => return items,
            }
        }
    }

    fn object(&self, name: &str) -> Map<String, Value> {
        self.expected[name].as_object().expect("an object").clone()
    }

    async fn user_row(&self, user: &str, kind: String) -> Option<Item> {
        let get = self.server.aws.dynamodb.get_item().table_name(&self.server.config.names.users).consistent_read(true);
        let get = get.key("user", AttributeValue::S(user.to_owned())).key("kind", AttributeValue::S(kind));
        get.send().await.expect("a row").item
    }

    /// The sum of a count of a user.
    async fn count_of(&self, user: &str, name: &str) -> i64 {
        let query = self.server.aws.dynamodb.query().table_name(&self.server.config.names.users);
        let found = query
            .key_condition_expression("#user = :user AND begins_with(kind, :counters)")
            .expression_attribute_names("#user", "user")
            .expression_attribute_values(":user", AttributeValue::S(user.to_owned()))
            .expression_attribute_values(":counters", AttributeValue::S("counters".to_owned()))
            .send()
            .await
            .expect("rows");
        let count = |item: &Item| item.get(name).and_then(|count| count.as_n().ok()?.parse::<i64>().ok());
        found.items().iter().filter_map(count).sum()
    }

    async fn status_of(&self, task: &str) -> Value {
        self.get(&format!("{CONVERSATIONS}/start-tasks?ids={task}")).await[0].take()
    }

    async fn check_conversations(&self) {
        let conversations = self.object("conversations");
        assert_eq!(self.get(&format!("{CONVERSATIONS}/count")).await, self.expected["counts"]["conversations"]);
        for (id, attributes) in &conversations {
            let mut found = self.get(&format!("{CONVERSATIONS}?ids={id}")).await[0].take();
            found["accumulated_cost"] = found["metrics"]["accumulated_cost"].take();
            for (name, value) in attributes.as_object().expect("attributes") {
                assert_eq!(&found[name], value, "{name} of {id}");
            }
        }
        for order in ["CREATED_AT_DESC", "UPDATED_AT"] {
            let found =
                self.pages(&format!("{CONVERSATIONS}/search?include_sub_conversations=true&sort_order={order}")).await;
            let mut found: Vec<&str> =
                found.iter().map(|conversation| conversation["id"].as_str().expect("an id")).collect();
            found.sort_unstable();
            assert_eq!(found, conversations.keys().collect::<Vec<_>>(), "{order}");
        }
        let top_level = conversations.values().filter(|known| known["parent_conversation_id"].is_null()).count();
        assert_eq!(self.pages(&format!("{CONVERSATIONS}/search?sort_order=CREATED_AT")).await.len(), top_level);
        let titled = self.pages(&format!("{CONVERSATIONS}/search?title__contains=PUBLIC")).await;
        assert_eq!(titled.len(), 1);
        assert_eq!(titled[0]["title"], "Public, with a repository");
    }

    async fn check_events(&self) {
        for (conversation, events) in self.object("events") {
            let path = format!("/api/v1/conversation/{conversation}/events");
            assert_eq!(self.get(&format!("{path}/count")).await, events["count"], "{conversation}");
            let found = self.pages(&format!("{path}/search?sort_order=TIMESTAMP")).await;
            assert_eq!(json!(found.len()), events["count"]);
            assert_eq!(found[0]["id"], events["first"]);
            if let Some(large) = events["large"].as_str() {
                let found = self.get(&format!("{path}?id={large}")).await;
                assert_eq!(found[0]["text"].as_str().expect("a text").len(), 400 * 1024);
            }
        }
    }

    async fn check_settings(&self) {
        let secrets = &self.expected["secrets"];
        let shown = self.get("/api/v1/secrets/search").await;
        assert_eq!(shown["items"][0]["name"], "A_SECRET");
        let SealingConfig::File(key) = &self.server.config.sealing else { panic!("a key file") };
        let sealer = Sealer::from_file(key).expect("the sealing key");
        let stores = Stores::new(&self.server.config.names, &self.server.aws, &sealer);
        let settings = stores.settings().get(&UserId::local()).await.expect("settings").expect("settings");
        assert_eq!(settings.llm_api_key.expect("a key").expose_secret(), secrets["llm_api_key"]);
        // Settings that are older than profiles have one.
        let active = settings.llm_profiles.active_llm().expect("a profile");
        assert_eq!(
            (settings.llm_profiles.active(), active.api_key()),
            (Some("default"), secrets["llm_api_key"].as_str())
        );
        assert_eq!(settings.custom_secrets["A_SECRET"].secret.expose_secret(), secrets["A_SECRET"]);
        let start_tasks = stores.start_tasks();
        for task in self.object("unfinished").keys() {
            let id = Uuid::try_parse(task).expect("an id");
            start_tasks.get(&UserId::local(), id).await.expect("a row").expect("a task");
        }
        for (user, known) in self.object("api_keys") {
            let secret = SecretString::from(known["key"].as_str().expect("a key"));
            let keys = stores.api_keys();
            assert_eq!(keys.owner(&secret).await.expect("a read"), Some(UserId::new(&user)));
            assert_eq!(keys.list(&UserId::new(&user)).await.expect("keys")[0].name, known["name"]);
        }
    }

    /// Unfinished starts end, because this server has no sandboxes.
    async fn check_start_tasks(&self) {
        let total = self.start_count();
        assert_eq!(self.get(&format!("{CONVERSATIONS}/start-tasks/count")).await, total);
        let listed = self.pages(&format!("{CONVERSATIONS}/start-tasks/search?sort_order=CREATED_AT")).await;
        assert_eq!(u64::try_from(listed.len()).expect("a number"), total);
        for (task, status) in self.object("start_tasks").into_iter().filter(|(_, status)| status != "failing") {
            assert_eq!(self.status_of(&task).await["status"], status, "{task}");
        }
        let failing = self.object("start_tasks").into_iter().filter(|(_, status)| status == "failing");
        for (task, status) in failing.chain(self.object("unfinished")) {
            let ended = wait_for(&format!("the start in {status} ends"), SOON, async || {
                let found = self.status_of(&task).await;
                (found["status"] == "ERROR").then_some(found)
            })
            .await;
            assert_ne!(ended["detail"], Value::Null, "{task}");
            assert!(ended["request"]["selected_repository"].is_string(), "{ended}");
        }
    }

    /// Sandboxes of starts that have ended are deleted; those of conversations have these as members.
    async fn check_sandboxes(&self) {
        let mut members: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (id, known) in self.object("conversations") {
            members.entry(known["sandbox_id"].as_str().expect("an id").to_owned()).or_default().insert(id);
        }
        let rows =
            self.server.aws.dynamodb.scan().table_name(&self.server.config.names.sandboxes).consistent_read(true);
        wait_until("only sandboxes with conversations are left", SOON, async || {
            let rows = rows.clone().send().await.expect("rows");
            let found: BTreeMap<String, BTreeSet<String>> = rows
                .items()
                .iter()
                .map(|row| {
                    let ids = row.get("conversations").and_then(|ids| ids.as_ss().ok()).cloned().unwrap_or_default();
                    (row["id"].as_s().expect("an id").clone(), ids.into_iter().collect())
                })
                .collect();
            found == members && rows.items().iter().all(|row| !row.contains_key("starts"))
        })
        .await;
    }

    async fn check_counters(&self) {
        for (count, path) in [("conversations", "count"), ("start_tasks", "start-tasks/count")] {
            let shown = self.get(&format!("{CONVERSATIONS}/{path}")).await;
            assert_eq!(json!(self.count_of("local", count).await), shown, "{count}");
        }
        assert_eq!(self.count_of("local", "unfinished_starts").await, 0);
        for (user, known) in self.object("other_users") {
            assert_eq!(json!(self.count_of(&user, "conversations").await), known["conversations"], "{user}");
        }
    }

    async fn check_export(&self) {
        let conversation = self.expected["export"]["conversation"].as_str().expect("an id");
        let zip = wait_for("the export is built", SOON, async || {
            let (status, body) =
                self.send(Method::GET, &format!("{CONVERSATIONS}/{conversation}/download"), None).await;
            (status == 200).then_some(body)
        })
        .await;
        // The end of the central directory has the number of members.
        let end = zip.windows(4).rposition(|bytes| bytes == b"PK\x05\x06").expect("an archive");
        assert_eq!(json!(u16::from_le_bytes([zip[end + 10], zip[end + 11]])), self.expected["export"]["members"]);
    }

    async fn check_pending_messages(&self) {
        let pending = &self.expected["pending_messages"];
        let task = self.status_of(pending["task"].as_str().expect("an id")).await;
        assert_eq!(task["status"], "ERROR");
        let conversation = pending["conversation"].as_str().expect("an id");
        let row = self.user_row("local", format!("messages#{conversation}")).await.expect("the queue");
        assert_eq!(json!(row["messages"].as_l().expect("messages").len()), pending["count"]);
        let path = format!("/api/v1/conversations/{}/pending-messages", Uuid::try_parse(conversation).expect("an id"));
        let message = json!({"content": [{"type": "text", "text": "one more"}]});
        let (status, body) = self.send(Method::POST, &path, Some(message)).await;
        assert_eq!(status, 201);
        let queued: Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(queued["position"].as_u64(), pending["count"].as_u64().map(|count| count + 1));
    }

    /// The deletion that an earlier run has begun is finished.
    async fn check_deletion(&self) {
        let [id, task] = ["conversation", "task"].map(|name| self.expected["deleting"][name].as_str().expect("an id"));
        assert_eq!(self.get(&format!("{CONVERSATIONS}?ids={id}")).await, json!([null]));
        let events = self.server.aws.dynamodb.query().table_name(&self.server.config.names.events);
        let events = events
            .key_condition_expression("conversation = :conversation")
            .expression_attribute_values(":conversation", AttributeValue::S(UserId::local().key_of(id)));
        wait_until("the events and the start of the deleted conversation are gone", SOON, async || {
            events.clone().send().await.expect("rows").items().is_empty() && self.status_of(task).await.is_null()
        })
        .await;
    }

    fn start_count(&self) -> u64 {
        self.expected["counts"]["start_tasks"].as_u64().expect("a number") - 1
    }

    /// New work goes on.
    async fn check_changes(&self) {
        let (id, _) = self.object("conversations").into_iter().next().expect("a conversation");
        let (status, _) =
            self.send(Method::PATCH, &format!("{CONVERSATIONS}/{id}"), Some(json!({"title": "Renamed"}))).await;
        assert_eq!(status, 200);
        let newest = self
            .pages(&format!("{CONVERSATIONS}/search?include_sub_conversations=true&sort_order=UPDATED_AT_DESC"))
            .await;
        assert_eq!((&newest[0]["id"], &newest[0]["title"]), (&json!(id), &json!("Renamed")));
        let (status, _) = self.send(Method::POST, CONVERSATIONS, Some(json!({}))).await;
        assert_eq!(status, 200);
        assert_eq!(self.get(&format!("{CONVERSATIONS}/start-tasks/count")).await, self.start_count() + 1);
        let (status, _) = self.send(Method::DELETE, &format!("{CONVERSATIONS}/{id}"), None).await;
        assert_eq!(status, 200);
        let conversations = self.expected["counts"]["conversations"].as_u64().expect("a number");
        assert!(self.get(&format!("{CONVERSATIONS}/count")).await.as_u64().expect("a number") < conversations);
    }
}

#[tokio::test]
async fn everything_in_an_older_data_folder_is_there_after_its_migration() {
    for name in FOLDERS {
        eprintln!("{name}");
        let opened = Opened::new(name).await;
        opened.check_conversations().await;
        opened.check_events().await;
        opened.check_settings().await;
        opened.check_deletion().await;
        opened.check_start_tasks().await;
        opened.check_sandboxes().await;
        opened.check_counters().await;
        opened.check_export().await;
        opened.check_pending_messages().await;
        opened.check_changes().await;
        opened.server.shutdown().await;
    }
}
