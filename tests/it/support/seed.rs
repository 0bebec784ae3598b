//! Records for a store to begin with, from lines of `{"type", "data"}` in the API's shape.

use serde_json::{Value, json};
use shared::conversation::ConversationRecord;
use shared::conversation::store::IMPORT_LIMIT;
use shared::start::request::StartRequest;
use shared::start::store::ImportedTask;
use shared::start::task::Snapshot;
use shared::stores::Stores;
use shared::user::UserId;

/// Adds the rows of the lines to those of the user.
pub async fn load(stores: &Stores, user: &UserId, lines: impl IntoIterator<Item = Value>) {
    let (mut conversations, mut tasks) = (Vec::new(), Vec::new());
    for mut line in lines {
        match line["type"].as_str() {
            Some("conversation") => conversations.push(conversation(user, line["data"].take())),
            Some("start_task") => tasks.push(task(line["data"].take())),
            other => panic!("unknown type {other:?}"),
        }
    }
    for records in conversations.chunks(IMPORT_LIMIT) {
        let added = stores.conversations().import(user, records).await.expect("conversations are stored");
        assert!(added.into_iter().all(|added| added), "ids are taken");
    }
    for tasks in tasks.chunks(IMPORT_LIMIT) {
        let added = stores.start_tasks().import(user, tasks).await.expect("start tasks are stored");
        assert!(added.into_iter().all(|added| added), "ids are taken");
    }
}

/// A record from what the API shows of it.
pub fn conversation(user: &UserId, mut data: Value) -> ConversationRecord {
    data["user"] = json!(user);
    serde_json::from_value(data).expect("a conversation")
}

fn task(mut data: Value) -> ImportedTask {
    let request = data["request"].take().to_string();
    let id = data["id"].as_str().and_then(|id| id.parse().ok()).expect("an id");
    ImportedTask {
        id,
        created_at: serde_json::from_value(data["created_at"].clone()).expect("a time"),
        request: StartRequest::from_body(Some("application/json"), request.as_bytes()).expect("a request"),
        now: serde_json::from_value::<Snapshot>(data).expect("a state"),
    }
}
