//! An MCP server over streamable HTTP with one tool, for clients that send the right header; and the same tool in a process.

use std::path::Path;
use std::sync::{Arc, Mutex};

use axum::response::Response;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::server::{self, Request, Server};

/// The tool: it takes a `word` and answers with [`meaning`].
pub const TOOL: &str = "look_up";

/// What the tool answers for a word.
pub fn meaning(word: &str) -> String {
    format!("the meaning of {word}")
}

/// The server. Gone when dropped.
#[derive(Debug)]
pub struct McpServer {
    server: Server,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl McpServer {
    /// Starts; a request without this header is answered with 401.
    pub async fn start(name: &'static str, value: &str) -> Self {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (kept, value) = (Arc::clone(&requests), value.to_owned());
        let server = Server::start(move |request| {
            let answer = answer(&request, name, &value);
            kept.lock().expect("the requests").push(request);
            async move { Ok(answer) }
        })
        .await;
        Self { server, requests }
    }

    /// Its endpoint.
    pub fn url(&self) -> String {
        format!("{}/mcp", self.server.url())
    }

    /// The parameters of the tool calls so far.
    pub fn calls(&self) -> Vec<Value> {
        let requests = self.requests.lock().expect("the requests");
        let calls = requests.iter().map(Request::json).filter(|message| message["method"] == "tools/call");
        calls.map(|mut message| message["params"].take()).collect()
    }
}

fn answer(request: &Request, name: &str, value: &str) -> Response {
    if request.header(name) != Some(value) {
        return server::json(StatusCode::UNAUTHORIZED, &json!({"error": "unauthorized"}));
    }
    if request.method != Method::POST {
        // No stream of its own, and no sessions to end.
        return server::json(StatusCode::METHOD_NOT_ALLOWED, &json!({}));
    }
    let message = request.json();
    match result(&message) {
        Some(result) => server::json(StatusCode::OK, &json!({"jsonrpc": "2.0", "id": message["id"], "result": result})),
        None => server::json(StatusCode::ACCEPTED, &json!({})),
    }
}

/// The result of a request; none of a notification.
fn result(message: &Value) -> Option<Value> {
    Some(match message["method"].as_str()? {
        "initialize" => json!({
            "protocolVersion": message["params"]["protocolVersion"],
            "capabilities": {"tools": {}},
            "serverInfo": {"name": "words", "version": "1"},
        }),
        "tools/list" => json!({"tools": [{
            "name": TOOL,
            "description": "Looks a word up",
            "inputSchema": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
        }]}),
        "tools/call" => {
            let word = message["params"]["arguments"]["word"].as_str().unwrap_or_default();
            json!({"content": [{"type": "text", "text": meaning(word)}], "isError": false})
        }
        method if method.starts_with("notifications/") => return None,
        _ => json!({}),
    })
}

const PROCESS: &str = r#"
import json, os, sys
for line in sys.stdin:
    message = json.loads(line)
    method = message.get("method", "")
    if "id" not in message:
        continue
    if method == "initialize":
        result = {"protocolVersion": message["params"]["protocolVersion"], "capabilities": {"tools": {}},
                  "serverInfo": {"name": "process", "version": "1"}}
    elif method == "tools/list":
        result = {"tools": [{"name": "look_up", "description": "Looks a word up",
                  "inputSchema": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}}]}
    elif method == "tools/call":
        said = message["params"]["arguments"]["word"] + " with " + os.environ["WORDS"][::-1] + " in " + os.getcwd()
        result = {"content": [{"type": "text", "text": said}], "isError": False}
    else:
        result = {}
    print(json.dumps({"jsonrpc": "2.0", "id": message["id"], "result": result}), flush=True)
"#;

/// Writes the server that runs as a process, for Python. Its tool answers with the word, the variable `WORDS` backwards, and the
/// folder that it runs in.
pub fn write_process(file: &Path) {
    std::fs::write(file, PROCESS).expect("the program is written");
}
