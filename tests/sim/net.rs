//! The simulated network: requests and responses between the product and the models of the servers that it calls.

use std::pin::Pin;

use bytes::Bytes;
use http::{HeaderMap, Method, Response};
use http_body_util::BodyExt as _;
use shared::simulation::NoResponse;

/// A request. The authority of its URL selects the server.
#[derive(Clone, Debug)]
pub struct Request {
    pub method: Method,
    pub authority: String,
    pub path: String,
    /// Without the question mark; empty if there is none.
    pub query: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Request {
    /// The request of the product's HTTP client.
    pub async fn of_client(mut request: reqwest::Request) -> Result<Self, NoResponse> {
        let body = match request.body_mut().take() {
            Some(body) => body.collect().await.map_err(|_| NoResponse::CutOff)?.to_bytes(),
            None => Bytes::new(),
        };
        let url = request.url();
        Ok(Self {
            method: request.method().clone(),
            authority: url.authority().to_owned(),
            path: url.path().to_owned(),
            query: url.query().unwrap_or_default().to_owned(),
            headers: request.headers().clone(),
            body,
        })
    }
}

/// What the product's HTTP client gets.
pub async fn to_client(reply: Reply) -> Result<Response<Bytes>, NoResponse> {
    match reply {
        Ok(response) => Ok(response),
        Err(Failure::Refused) => Err(NoResponse::Unreachable),
        Err(Failure::Cut) => Err(NoResponse::CutOff),
        Err(Failure::Hang) => std::future::pending().await,
    }
}

/// The ways in which a request gets no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// No connection: the request certainly has no effect.
    Refused,
    /// The connection was closed without a response: the effect may have happened.
    Cut,
    /// There is never a response.
    Hang,
}

pub type Reply = Result<Response<Bytes>, Failure>;
pub type Pending = Pin<Box<dyn Future<Output = Reply> + Send>>;

/// A simulated server.
pub trait Server: Send + Sync {
    /// Handles a request. Effects happen inside the future, after simulated latency.
    fn handle(&self, request: Request) -> Pending;
}
