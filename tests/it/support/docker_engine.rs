//! A stub server for the Docker Engine API: images, containers and their states, without real processes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use axum::response::Response;
use http::StatusCode;
use serde_json::{Value, json};

use super::server::{Cut, Request, Server, json as answer, raw};

/// When all containers were created, in seconds since 1970: 2025-01-01.
const CREATED: i64 = 1_735_689_600;

#[derive(Clone, Debug)]
pub struct Container {
    pub state: String,
    pub exit_code: i64,
    /// The body of the create request.
    pub body: Value,
}

#[derive(Debug, Default)]
struct State {
    images: BTreeSet<String>,
    containers: BTreeMap<String, Container>,
    /// The port on this machine that all agent servers are published at.
    agent_port: String,
    pulled: Vec<String>,
    broken: bool,
}

#[derive(Debug)]
pub struct DockerEngine {
    server: Server,
    state: Arc<Mutex<State>>,
}

impl DockerEngine {
    /// Starts without images; port 8000 of each container is published at the port of this address.
    pub async fn start(agent_url: &str) -> Self {
        let agent_port = agent_url.rsplit(':').next().expect("a port").to_owned();
        let state = Arc::new(Mutex::new(State { agent_port, ..State::default() }));
        let shared = state.clone();
        let server = Server::start(move |request| {
            let answered = handle(&request, &mut shared.lock().expect("the stand-in's state"));
            async move { answered }
        })
        .await;
        Self { server, state }
    }

    pub fn url(&self) -> String {
        self.server.url()
    }

    pub fn containers(&self) -> BTreeMap<String, Container> {
        self.state().containers.clone()
    }

    pub fn pulled(&self) -> Vec<String> {
        self.state().pulled.clone()
    }

    /// Runs a container that no request to this server has created.
    pub fn add(&self, name: &str) {
        let container = Container { state: "running".to_owned(), exit_code: 0, body: Value::Null };
        self.state().containers.insert(name.to_owned(), container);
    }

    /// Stops a container as a crash of its agent server does.
    pub fn kill(&self, name: &str) {
        let mut state = self.state();
        let container = state.containers.get_mut(name).expect("a container");
        (container.state, container.exit_code) = ("exited".to_owned(), 137);
    }

    /// Sets whether connections are closed without a response.
    pub fn break_down(&self, broken: bool) {
        self.state().broken = broken;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the stand-in's state")
    }
}

fn nothing(status: StatusCode) -> Response {
    raw(status, "application/json", "")
}

fn refused(status: StatusCode, message: &str) -> Response {
    answer(status, &json!({"message": message}))
}

fn handle(request: &Request, state: &mut State) -> Result<Response, Cut> {
    if state.broken {
        return Err(Cut);
    }
    let segments = request.segments();
    // The version prefix of the negotiated API is optional.
    let path = match segments.first() {
        Some(version) if version.starts_with("v1.") => &segments[1..],
        _ => &segments[..],
    };
    let no_such = |name: &str| refused(StatusCode::NOT_FOUND, &format!("No such container: {name}"));
    Ok(match (request.method.as_str(), path) {
        ("GET", ["version"]) => {
            answer(StatusCode::OK, &json!({"Version": "27.0.0", "ApiVersion": "1.46", "MinAPIVersion": "1.24"}))
        }
        ("POST", ["images", "create"]) => {
            let image = request.query_value("fromImage").expect("an image");
            if !image.starts_with("registry.example.com/") {
                return Ok(refused(StatusCode::NOT_FOUND, "pull access denied"));
            }
            state.images.insert(image.clone());
            state.pulled.push(image);
            raw(StatusCode::OK, "application/json", "{\"status\":\"Pulling\"}\n{\"status\":\"Done\"}\n")
        }
        ("POST", ["containers", "create"]) => {
            let (name, body) = (request.query_value("name").expect("a name"), request.json());
            let image = body["Image"].as_str().expect("an image");
            if !state.images.contains(image) {
                return Ok(refused(StatusCode::NOT_FOUND, &format!("No such image: {image}")));
            }
            if state.containers.contains_key(&name) {
                return Ok(refused(StatusCode::CONFLICT, "the name is in use"));
            }
            state.containers.insert(name.clone(), Container { state: "created".to_owned(), exit_code: 0, body });
            answer(StatusCode::CREATED, &json!({"Id": name, "Warnings": []}))
        }
        ("GET", ["containers", "json"]) => {
            let filters: Value = serde_json::from_str(&request.query_value("filters").expect("filters")).expect("JSON");
            let part = filters["name"][0].as_str().expect("a part of a name").trim_start_matches('/').to_owned();
            let listed: Vec<Value> = state
                .containers
                .iter()
                .filter(|(name, _)| name.contains(&part))
                .map(|(name, container)| {
                    json!({"Id": name, "Names": [format!("/{name}")], "Created": CREATED, "State": container.state})
                })
                .collect();
            answer(StatusCode::OK, &json!(listed))
        }
        ("GET", ["containers", name, "json"]) => match state.containers.get(*name) {
            None => no_such(name),
            Some(container) => answer(
                StatusCode::OK,
                &json!({
                    "Id": name,
                    "Name": format!("/{name}"),
                    "State": {"Status": container.state, "ExitCode": container.exit_code,
                        "StartedAt": "2025-01-01T00:00:00.123456789Z"},
                    "NetworkSettings": {"Ports": {
                        "8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": state.agent_port}],
                        "8001/tcp": [{"HostIp": "127.0.0.1", "HostPort": "18001"}],
                        "8011/tcp": null,
                    }},
                }),
            ),
        },
        ("DELETE", ["containers", name]) => match state.containers.remove(*name) {
            None => no_such(name),
            Some(_) => nothing(StatusCode::NO_CONTENT),
        },
        ("POST", ["containers", name, change]) => {
            let Some(container) = state.containers.get_mut(*name) else { return Ok(no_such(name)) };
            let next = match (*change, container.state.as_str()) {
                ("start", "created" | "exited") | ("unpause", "paused") => "running",
                ("pause", "running") => "paused",
                ("stop", "running") => "exited",
                ("start", "running") | ("stop", "exited") => return Ok(nothing(StatusCode::NOT_MODIFIED)),
                (change, state) => {
                    return Ok(refused(StatusCode::CONFLICT, &format!("cannot {change} what is {state}")));
                }
            };
            container.state = next.to_owned();
            nothing(StatusCode::NO_CONTENT)
        }
        ("DELETE", ["volumes", _]) => refused(StatusCode::NOT_FOUND, "no such volume"),
        _ => refused(StatusCode::NOT_FOUND, "page not found"),
    })
}
