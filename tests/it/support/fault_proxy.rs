//! Fault injection: an HTTP proxy between a worker and every server that it calls. It counts the calls and stops one of
//! them, before or after its effect. A worker that is dropped while its call is stopped has crashed at exactly that
//! point.

use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::response::Response;
use http::StatusCode;
use tokio::sync::watch;

use super::server::{Cut, Request, Server, hang, raw};

/// Whether a call is stopped before or after its effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    Before,
    After,
}

/// What happens to the stopped call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It never returns.
    Hang(Moment),
    /// It waits until the proxy is opened, and so does every later call: the worker is stuck.
    Hold(Moment),
    /// It is refused without an effect, with an error that SDKs do not retry. Applies only to calls to DynamoDB and
    /// SQS.
    Refuse,
    /// The same for calls to S3.
    RefuseObject,
    /// It takes effect, but its response is lost: the client gets a 500, which SDKs retry. This many consecutive calls in
    /// total lose their response.
    LoseResponses(usize),
    /// It has no effect, and the response is this DynamoDB error with status 400.
    Respond(&'static str),
}

#[derive(Debug)]
struct State {
    calls: Mutex<Vec<String>>,
    plan: Mutex<Option<(usize, Stop)>>,
    reached: watch::Sender<bool>,
    open: watch::Sender<bool>,
    http: reqwest::Client,
}

/// Counts calls and stops one. Clones share their state.
#[derive(Clone, Debug)]
pub struct FaultProxy(Arc<State>);

impl FaultProxy {
    pub fn new() -> Self {
        Self(Arc::new(State {
            calls: Mutex::default(),
            plan: Mutex::default(),
            reached: watch::Sender::new(false),
            open: watch::Sender::new(false),
            http: reqwest::Client::new(),
        }))
    }

    /// Starts a proxy to a server, with the shared counter.
    pub async fn to(&self, upstream: &str) -> Server {
        let (gate, upstream) = (self.clone(), upstream.to_owned());
        Server::start(move |request| {
            let (gate, upstream) = (gate.clone(), upstream.clone());
            async move { gate.pass(request, &upstream).await }
        })
        .await
    }

    /// Restarts the count at 1, and stops the call with this number.
    pub fn arm(&self, call: usize, stop: Stop) {
        self.0.calls.lock().expect("calls").clear();
        self.0.reached.send_replace(false);
        self.0.open.send_replace(false);
        *self.0.plan.lock().expect("plan") = Some((call, stop));
    }

    /// Stops no further calls; a call that is stopped already stays stopped.
    pub fn disarm(&self) {
        *self.0.plan.lock().expect("plan") = None;
    }

    /// Releases the calls that [`Stop::Hold`] has stopped.
    pub fn open(&self) {
        self.0.open.send_replace(true);
    }

    /// Waits until the chosen call has arrived.
    pub async fn reached(&self) {
        let mut reached = self.0.reached.subscribe();
        // `self` owns the sender, so the channel is open.
        reached.wait_for(|reached| *reached).await.expect("a gate");
    }

    pub fn is_reached(&self) -> bool {
        *self.0.reached.borrow()
    }

    /// The names of the calls since the proxy was armed.
    pub fn calls(&self) -> Vec<String> {
        self.0.calls.lock().expect("calls").clone()
    }

    async fn pass(&self, request: Request, upstream: &str) -> Result<Response, Cut> {
        let name = match request.header("x-amz-target") {
            Some(target) => target.rsplit('.').next().unwrap_or(target).to_owned(),
            None if request.header("x-amz-content-sha256").is_some() && !request.query.is_empty() => {
                format!("{} {}?{}", request.method, request.path, request.query)
            }
            None => format!("{} {}", request.method, request.path),
        };
        let stop = {
            let mut calls = self.0.calls.lock().expect("calls");
            calls.push(name);
            let plan = self.0.plan.lock().expect("plan");
            plan.filter(|(call, stop)| match stop {
                Stop::Hold(_) => *call <= calls.len(),
                Stop::Hang(_) | Stop::Respond(_) => *call == calls.len(),
                Stop::Refuse => *call == calls.len() && request.header("x-amz-target").is_some(),
                Stop::LoseResponses(count) => (*call..*call + *count).contains(&calls.len()),
                Stop::RefuseObject => *call == calls.len() && request.header("x-amz-content-sha256").is_some(),
            })
            .map(|(_, stop)| stop)
        };
        // A call that is stopped after its effect is reached when it has taken effect: otherwise a test would go on before that.
        let is_after = matches!(stop, Some(Stop::Hang(Moment::After) | Stop::Hold(Moment::After)));
        if stop.is_some() && !is_after {
            self.0.reached.send_replace(true);
        }
        match stop {
            None => self.forward(request, upstream).await,
            Some(Stop::Refuse) => {
                let body = r#"{"__type":"com.amazonaws.dynamodb.v20120810#ValidationException","message":"refused by a test"}"#;
                Ok(raw(StatusCode::BAD_REQUEST, "application/x-amz-json-1.0", body))
            }
            Some(Stop::RefuseObject) => {
                let body = "<Error><Code>AccessDenied</Code><Message>refused by a test</Message></Error>";
                Ok(raw(StatusCode::FORBIDDEN, "application/xml", body))
            }
            Some(Stop::LoseResponses(_)) => {
                let _lost = self.forward(request, upstream).await;
                let body =
                    r#"{"__type":"com.amazonaws.dynamodb.v20120810#InternalServerError","message":"lost by a test"}"#;
                Ok(raw(StatusCode::INTERNAL_SERVER_ERROR, "application/x-amz-json-1.0", body))
            }
            Some(Stop::Respond(body)) => Ok(raw(StatusCode::BAD_REQUEST, "application/x-amz-json-1.0", body)),
            Some(Stop::Hang(Moment::Before)) => hang().await,
            Some(Stop::Hang(Moment::After)) => {
                let _answer = self.forward(request, upstream).await;
                self.0.reached.send_replace(true);
                hang().await
            }
            Some(Stop::Hold(moment)) => {
                let mut open = self.0.open.subscribe();
                if moment == Moment::Before {
                    open.wait_for(|open| *open).await.expect("a gate");
                }
                let answer = self.forward(request, upstream).await;
                self.0.reached.send_replace(true);
                open.wait_for(|open| *open).await.expect("a gate");
                answer
            }
        }
    }
    async fn forward(&self, request: Request, upstream: &str) -> Result<Response, Cut> {
        forward(&self.0.http, request, upstream).await
    }
}

/// Forwards a request to a server and returns its response.
pub async fn forward(http: &reqwest::Client, request: Request, upstream: &str) -> Result<Response, Cut> {
    let query = if request.query.is_empty() { String::new() } else { format!("?{}", request.query) };
    // Keeps the `Host` header, which signatures cover.
    let answer = http
        .request(request.method.clone(), format!("{upstream}{}{query}", request.path))
        .headers(request.headers.clone())
        .body(request.body.clone())
        .send()
        .await
        .map_err(|_| Cut)?;
    let mut response = Response::builder().status(answer.status());
    for (name, value) in answer.headers() {
        response = response.header(name, value);
    }
    let body = answer.bytes().await.map_err(|_| Cut)?;
    response.body(Body::from(body)).map_err(|_| Cut)
}
