//! Records for a server to begin with, from lines of `{"type", "data"}` in the API's shape.

use local::server::Server;
use serde_json::Value;
use shared::conversation::ConversationRecord;
use shared::conversation::store::ConversationStore;
use shared::user::UserId;

/// Puts the lines into the store as rows of the local user.
pub async fn load(server: &Server, lines: &str) {
    let names = &server.config.names;
    let conversations =
        ConversationStore::new(server.aws.dynamodb.clone(), names.conversations.clone(), names.users.clone());
    for line in lines.lines() {
        let mut line: Value = serde_json::from_str(line).expect("JSON");
        if line["type"] == "conversation" {
            line["data"]["user"] = UserId::local().as_str().into();
            let record: ConversationRecord = serde_json::from_value(line["data"].take()).expect("a conversation");
            let writes = conversations.put_new(&record).expect("writes").to_vec();
            server.aws.dynamodb.transact_write_items().set_transact_items(Some(writes)).send().await.expect("stored");
        }
    }
}
