//! Stub MCP servers with one tool: over HTTP, with correct or faulty behavior, and the same tool as a process.

use std::path::Path;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::response::Response;
use futures::StreamExt as _;
use http::{HeaderValue, Method, StatusCode};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::server::{self, Cut, Request, Server};

/// The tool's name: it accepts a `word` and returns its [`meaning`].
pub const TOOL: &str = "look_up";

/// What the tool returns for a word.
pub fn meaning(word: &str) -> String {
    format!("the meaning of {word}")
}

/// How a server handles requests.
#[derive(Clone, Debug)]
pub enum Behavior {
    /// It works; its responses are JSON.
    Works,
    /// It works; its responses are event streams.
    Streams,
    /// It works over the older transport (HTTP with SSE), at `/sse`.
    Sse,
    /// It issues a session id and refuses requests without it.
    Sessions,
    /// Every response has this status.
    Status(u16),
    /// Every response redirects with this status to this address.
    Redirects(u16, String),
    /// It works at `/mcp/`, to which `/mcp` redirects with 307.
    RedirectsToSlash,
    /// Every response is an HTML page.
    Page,
    /// It never responds.
    Hangs,
    /// It sends the head of an event stream, and nothing more.
    HangsInStream,
    /// It responds to `tools/list` with an error of this text.
    NoList(String),
    /// It works, but these fields replace those of this method's result; null removes a field.
    Answers(&'static str, Value),
    /// It works, but this text is the response to `tools/list`; `ID` in it stands for the request's id.
    RawList(&'static str),
    /// The list of tools has a second page, which is an error.
    BreaksOnSecondPage,
    /// It sets a cookie with its first response, and requires it afterwards.
    Sticky,
    /// It closes the connection without a response.
    Cuts,
}

/// The server. Dropping it closes its port.
#[derive(Debug)]
pub struct McpServer {
    server: Server,
    path: &'static str,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl McpServer {
    /// Starts a server that responds with 401 to requests without this header.
    pub async fn start(name: &'static str, value: &str) -> Self {
        Self::start_with(Behavior::Works, Some((name, value))).await
    }

    /// Starts a server with this behavior and without authentication.
    pub async fn behaving(behavior: Behavior) -> Self {
        Self::start_with(behavior, None).await
    }

    async fn start_with(behavior: Behavior, header: Option<(&'static str, &str)>) -> Self {
        let requests = Arc::new(Mutex::new(Vec::new()));
        let path = if matches!(behavior, Behavior::Sse) { "/sse" } else { "/mcp" };
        let (kept, header) = (Arc::clone(&requests), header.map(|(name, value)| (name, value.to_owned())));
        // For the older transport: the streams that carry the responses to posted messages.
        let streams: Streams = Arc::default();
        let server = Server::start(move |request| {
            kept.lock().expect("the requests").push(request.clone());
            let (behavior, header, streams) = (behavior.clone(), header.clone(), Arc::clone(&streams));
            async move {
                match header {
                    Some((name, value)) if request.header(name) != Some(&value) => {
                        Ok(server::json(StatusCode::UNAUTHORIZED, &json!({"error": "unauthorized"})))
                    }
                    _ => answer(&request, &behavior, &streams).await,
                }
            }
        })
        .await;
        Self { server, path, requests }
    }

    /// The URL of its endpoint.
    pub fn url(&self) -> String {
        format!("{}{}", self.server.url(), self.path)
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("the requests").clone()
    }

    /// The parameters of the tool calls so far.
    pub fn calls(&self) -> Vec<Value> {
        let requests = self.requests.lock().expect("the requests");
        let calls = requests.iter().map(Request::json).filter(|message| message["method"] == "tools/call");
        calls.map(|mut message| message["params"].take()).collect()
    }
}

type Streams = Arc<Mutex<Vec<mpsc::UnboundedSender<String>>>>;
const SESSION: &str = "session-1";
const COOKIE: &str = "sticky=1";

async fn answer(request: &Request, behavior: &Behavior, streams: &Streams) -> Result<Response, Cut> {
    let status = |code: u16| StatusCode::from_u16(code).expect("a status");
    match behavior {
        Behavior::Status(code) => return Ok(server::json(status(*code), &json!({"error": "by a test"}))),
        Behavior::Redirects(code, to) => return Ok(redirect(status(*code), to)),
        Behavior::RedirectsToSlash if request.path == "/mcp" => {
            return Ok(redirect(StatusCode::TEMPORARY_REDIRECT, "/mcp/"));
        }
        Behavior::Page => return Ok(server::raw(StatusCode::OK, "text/html", "<html>Sign in</html>")),
        Behavior::Hangs => return server::hang().await,
        Behavior::HangsInStream => return Ok(stream(futures::stream::pending())),
        Behavior::Cuts => return Err(Cut),
        Behavior::Sse if request.method == Method::GET && request.path == "/sse" => {
            let (send, receive) = mpsc::unbounded_channel();
            send.send("event: endpoint\ndata: /messages?session=1\n\n".to_owned()).expect("it is received");
            streams.lock().expect("the streams").push(send);
            let events = futures::stream::unfold(receive, async |mut receive| Some((receive.recv().await?, receive)));
            return Ok(stream(events));
        }
        _ => {}
    }
    if request.method != Method::POST || (matches!(behavior, Behavior::Sse) && request.path != "/messages") {
        // It offers no stream of its own.
        return Ok(server::json(StatusCode::METHOD_NOT_ALLOWED, &json!({})));
    }
    let message = request.json();
    let is_first = message["method"] == "initialize";
    if matches!(behavior, Behavior::Sessions) && !is_first && request.header("mcp-session-id") != Some(SESSION) {
        return Ok(server::json(StatusCode::BAD_REQUEST, &json!({"error": "no session"})));
    }
    let has_cookie = request.header("cookie").is_some_and(|cookie| cookie == COOKIE);
    if matches!(behavior, Behavior::Sticky) && !is_first && !has_cookie {
        return Ok(server::json(StatusCode::NOT_FOUND, &json!({"error": "no such session"})));
    }
    let is_list = message["method"] == "tools/list";
    let response = match behavior {
        Behavior::RawList(text) if is_list => {
            let text = text.replace("ID", &message["id"].to_string());
            return Ok(server::raw(StatusCode::OK, "application/json", text));
        }
        Behavior::Answers(method, fields) if message["method"] == *method => result(&message).map(|mut result| {
            for (name, value) in fields.as_object().expect("fields") {
                result[name] = value.clone();
            }
            result.as_object_mut().expect("an object").retain(|_, value| !value.is_null());
            json!({"jsonrpc": "2.0", "id": message["id"], "result": result})
        }),
        Behavior::BreaksOnSecondPage if is_list && message["params"]["cursor"].is_null() => {
            result(&message).map(|mut result| {
                result["nextCursor"] = "2".into();
                json!({"jsonrpc": "2.0", "id": message["id"], "result": result})
            })
        }
        Behavior::BreaksOnSecondPage if is_list => {
            Some(json!({"jsonrpc": "2.0", "id": message["id"], "error": {"code": -32602, "message": "no such page"}}))
        }
        Behavior::NoList(text) if is_list => {
            Some(json!({"jsonrpc": "2.0", "id": message["id"], "error": {"code": -32000, "message": text}}))
        }
        _ => result(&message).map(|result| json!({"jsonrpc": "2.0", "id": message["id"], "result": result})),
    };
    let Some(response) = response else { return Ok(server::json(StatusCode::ACCEPTED, &json!({}))) };
    Ok(match behavior {
        Behavior::Streams => {
            // The server sends a message of its own first.
            let note =
                json!({"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "x"}});
            let events = format!(": comment\n\nevent: message\ndata: {note}\n\nevent: message\ndata: {response}\n\n");
            server::raw(StatusCode::OK, "text/event-stream", events)
        }
        Behavior::Sse => {
            let event = format!("event: message\r\ndata: {response}\r\n\r\n");
            streams.lock().expect("the streams").retain(|stream| stream.send(event.clone()).is_ok());
            server::json(StatusCode::ACCEPTED, &json!({}))
        }
        Behavior::Sticky if is_first => {
            let mut answer = server::json(StatusCode::OK, &response);
            answer.headers_mut().insert("set-cookie", HeaderValue::from_static("sticky=1; Path=/; HttpOnly"));
            answer
        }
        Behavior::Sessions if is_first => {
            let mut answer = server::json(StatusCode::OK, &response);
            answer.headers_mut().insert("mcp-session-id", HeaderValue::from_static(SESSION));
            answer
        }
        _ => server::json(StatusCode::OK, &response),
    })
}

fn redirect(status: StatusCode, to: &str) -> Response {
    let mut answer = server::raw(status, "text/plain", "");
    answer.headers_mut().insert("location", to.parse().expect("an address"));
    answer
}

fn stream(events: impl futures::Stream<Item = String> + Send + 'static) -> Response {
    let body = Body::from_stream(events.map(Ok::<_, Cut>));
    Response::builder().header("content-type", "text/event-stream").body(body).expect("an answer")
}

/// The result of a request; `None` for a notification.
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

/// Writes the stdio server, a Python program. Its tool returns the word, the variable `WORDS` reversed, and its working
/// directory.
pub fn write_process(file: &Path) {
    std::fs::write(file, PROCESS).expect("the program is written");
}
