//! A reverse proxy as the public address of a server: it forwards requests to the server and records them.

use std::sync::{Arc, Mutex, MutexGuard};

use axum::response::Response;
use http::StatusCode;
use reqwest::Client;
use serde_json::json;

use super::server::{self, Cut, Request, Server};

#[derive(Debug, Default)]
struct State {
    target: Option<String>,
    requests: Vec<Request>,
}

/// The proxy. Dropping it closes its port.
#[derive(Debug)]
pub struct PublicAddress {
    server: Server,
    state: Arc<Mutex<State>>,
}

impl PublicAddress {
    /// Starts; until a server is set, every response is 503.
    pub async fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        let http = Client::builder().no_proxy().build().expect("a client");
        let server = Server::start(move |request| pass_on(request, http.clone(), Arc::clone(&shared))).await;
        Self { server, state }
    }

    /// `http://127.0.0.1:PORT`.
    pub fn url(&self) -> String {
        self.server.url()
    }

    /// Sets the server, as `http://HOST:PORT`.
    pub fn lead_to(&self, target: String) {
        self.state().target = Some(target);
    }

    /// Method and path of the requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.state().requests.iter().map(|request| format!("{} {}", request.method, request.path)).collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the state")
    }
}

async fn pass_on(request: Request, http: Client, state: Arc<Mutex<State>>) -> Result<Response, Cut> {
    let target = {
        let mut state = state.lock().expect("the state");
        state.requests.push(request.clone());
        state.target.clone()
    };
    let Some(target) = target else { return Ok(server::json(StatusCode::SERVICE_UNAVAILABLE, &json!({}))) };
    let mut headers = request.headers.clone();
    headers.remove(http::header::HOST);
    let url = format!("{target}{}?{}", request.path, request.query);
    let sent = http.request(request.method.clone(), url).headers(headers).body(request.body.clone()).send().await;
    let answer = sent.map_err(|_| Cut)?;
    let status = answer.status();
    let content_type =
        answer.headers().get("content-type").and_then(|value| value.to_str().ok()).unwrap_or("text/plain").to_owned();
    Ok(server::raw(status, &content_type, answer.bytes().await.map_err(|_| Cut)?))
}
