//! An MCP server over streamable HTTP with one tool, for clients that send the right header; and the same tool in a process.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::response::Response;
use http::{Method, StatusCode};
use serde_json::{Value, json};

use super::server::{self, Cut, Request, Server};

/// The tool: it takes a `word` and answers with [`meaning`].
pub const TOOL: &str = "look_up";

/// What the tool answers for a word.
pub fn meaning(word: &str) -> String {
    format!("the meaning of {word}")
}

#[derive(Debug, Default)]
struct State {
    header: Option<(&'static str, String)>,
    requests: Vec<Request>,
}

/// The server. Gone when dropped.
#[derive(Debug)]
pub struct McpServer {
    server: Server,
    state: Arc<Mutex<State>>,
}

impl McpServer {
    /// Starts; a request without this header is answered with 401.
    pub async fn start(name: &'static str, value: &str) -> Self {
        let state = State { header: Some((name, value.to_owned())), ..State::default() };
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        let server = Server::start(move |request| handle(request, Arc::clone(&shared))).await;
        Self { server, state }
    }

    /// Its endpoint.
    pub fn url(&self) -> String {
        format!("{}/mcp", self.server.url())
    }

    /// The parameters of the tool calls so far.
    pub fn calls(&self) -> Vec<Value> {
        let requests = self.state().requests.clone();
        let calls = requests.iter().map(Request::json).filter(|message| message["method"] == "tools/call");
        calls.map(|mut message| message["params"].take()).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the state")
    }
}

async fn handle(request: Request, state: Arc<Mutex<State>>) -> Result<Response, Cut> {
    let (name, value) = {
        let mut state = state.lock().expect("the state");
        state.requests.push(request.clone());
        state.header.clone().expect("a header")
    };
    if request.header(name) != Some(&value) {
        return Ok(server::json(StatusCode::UNAUTHORIZED, &json!({"error": "unauthorized"})));
    }
    if request.method != Method::POST {
        // No stream of its own, and no sessions to end.
        return Ok(server::json(StatusCode::METHOD_NOT_ALLOWED, &json!({})));
    }
    let message = request.json();
    let Some(result) = result(&message) else {
        return Ok(server::json(StatusCode::ACCEPTED, &json!({})));
    };
    Ok(server::json(StatusCode::OK, &json!({"jsonrpc": "2.0", "id": message["id"], "result": result})))
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
