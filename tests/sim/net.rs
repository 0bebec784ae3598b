//! The simulated network: requests and responses between the product and the models of the servers that it calls.

use std::pin::Pin;

use bytes::Bytes;
use http::{HeaderMap, Method, Response};

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
