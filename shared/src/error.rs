//! The error type of this crate. Errors are classified by cause, not by HTTP status; `http::response` maps them to responses.

use std::fmt;
use std::time::Duration;

use crate::violation::Violation;

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error. Each variant's message is for the caller. Context for the log is separate, and callers never see it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request is not valid. Contains every violation, in the order of the fields.
    #[error("the request is not valid")]
    Invalid(Vec<Violation>),
    /// The request is well-formed, but cannot be fulfilled; the message says why.
    #[error("{0}")]
    Refused(String),
    /// The caller's credentials are missing or not valid.
    #[error("{0}")]
    Unauthenticated(String),
    /// The caller is authenticated, but not permitted to do this.
    #[error("{0}")]
    Forbidden(String),
    /// The resource does not exist, or belongs to another user. Callers cannot distinguish the two.
    #[error("{0}")]
    NotFound(String),
    /// The current state does not allow the request; the message says which change would allow it.
    #[error("{0}")]
    Conflict(String),
    /// The resource existed, and is permanently unavailable.
    #[error("{0}")]
    Gone(String),
    /// A limit on the number of such resources is reached. (The rate limit of requests is API Gateway's.)
    #[error("{0}")]
    TooMany(String),
    /// The user has too much work in progress; the request may be repeated after a while.
    #[error("{message}")]
    Saturated {
        message: String,
        /// When to repeat the request.
        retry_after: Duration,
    },
    /// A dependency of the request does not work at the moment.
    #[error("{0}")]
    Unavailable(String),
    /// The request is too large.
    #[error("{0}")]
    TooLarge(String),
    /// DynamoDB, S3, SQS or KMS failed.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// Another service failed (an agent server, a sandbox provider).
    #[error("{message}")]
    Upstream {
        /// For the caller: the service, and what failed in general terms.
        message: String,
        /// For the log.
        context: String,
    },
    /// The sandbox provider does not respond, so this call to it was not made (see [`crate::sandbox::circuit`]).
    #[error("The sandbox provider does not respond; try again later")]
    CircuitOpen,
    /// A defect of this server.
    #[error("Internal Server Error")]
    Internal {
        /// For the log.
        context: String,
    },
}

impl Error {
    /// A defect of this server, with context for the log.
    pub fn internal(context: impl fmt::Display) -> Self {
        Self::Internal { context: context.to_string() }
    }

    /// Whether another service failed, or is not called because it fails: whether the call succeeds later does not depend on us.
    #[must_use]
    pub fn is_upstream(&self) -> bool {
        matches!(self, Self::Upstream { .. } | Self::CircuitOpen)
    }

    /// Returns who can correct the cause. An upstream service is in most cases the user's own sandbox, and a temporarily unavailable
    /// resource (an export that is being built) is intended behaviour.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Store(_) | Self::Internal { .. } => Fault::Server,
            _ => Fault::User,
        }
    }

    /// Returns the text for the log: the context if there is one, otherwise the message.
    #[must_use]
    pub fn context(&self) -> String {
        match self {
            Self::Internal { context } | Self::Upstream { context, .. } => context.clone(),
            Self::Store(error) => error.context().to_owned(),
            Self::CircuitOpen => "the circuit breaker is open".to_owned(),
            other => other.to_string(),
        }
    }
}

/// Who can correct the cause of an error. Logs contain it, so that alarms exclude errors that callers cause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The user: their request, settings, repository or sandbox is the cause.
    User,
    /// The operator of this server.
    Server,
}

impl Fault {
    /// Returns the value of the log field `fault`. Metric filters in `template.yaml` match it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Server => "server",
        }
    }
}

/// Where the cause of a failed start is. The log field `class` and the metric `StartErrors` have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorClass {
    /// The user's request or settings.
    User,
    /// The user's repository or its setup script.
    Repository,
    /// The sandbox or its provider.
    Sandbox,
    /// The agent server, which does not respond or returns an error of its own.
    AgentServer,
    /// DynamoDB, S3, SQS or KMS.
    Store,
    /// This server.
    Ours,
}

impl ErrorClass {
    /// All classes.
    pub const ALL: [Self; 6] =
        [Self::User, Self::Repository, Self::Sandbox, Self::AgentServer, Self::Store, Self::Ours];

    /// Returns the value of the log field and of the metric's dimension.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Repository => "repository",
            Self::Sandbox => "sandbox",
            Self::AgentServer => "agent_server",
            Self::Store => "store",
            Self::Ours => "ours",
        }
    }

    /// Returns who can correct the cause.
    #[must_use]
    pub fn fault(self) -> Fault {
        match self {
            Self::User | Self::Repository => Fault::User,
            Self::Sandbox | Self::AgentServer | Self::Store | Self::Ours => Fault::Server,
        }
    }
}

/// A failed call to DynamoDB, S3, SQS or KMS.
///
/// No kind means that a write certainly did not happen: the SDK retries calls, so an earlier attempt may have succeeded although the last
/// one was refused. Writes are therefore idempotent, and a failed create is followed by a lookup (`dynamo::unless_written`).
#[derive(Debug, thiserror::Error)]
#[error("The store is not available right now")]
pub struct StoreError {
    kind: StoreErrorKind,
    context: String,
    #[source]
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// What a failed call means for its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// A condition of the write does not hold. A retry does not help.
    ConditionFailed,
    /// The table or the account is over its capacity. The call may be retried after a backoff.
    Throttled,
    /// A concurrent write of the same item was in progress. The call may be retried after a backoff.
    Conflict,
    /// Everything else, such as a lost response, a missing permission or a failed disk.
    Other,
}

impl StoreError {
    /// Creates an error with its context for the log: the failed call and the known part of the reason.
    #[must_use]
    pub fn new(kind: StoreErrorKind, context: impl Into<String>) -> Self {
        Self { kind, context: context.into(), source: None }
    }

    /// Adds the error that caused this one.
    #[must_use]
    pub fn with_source(self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self { source: Some(Box::new(source)), ..self }
    }

    /// Returns the same error with another kind.
    #[must_use]
    pub fn with_kind(self, kind: StoreErrorKind) -> Self {
        Self { kind, ..self }
    }

    /// Returns the meaning of the failure for the caller.
    #[must_use]
    pub fn kind(&self) -> StoreErrorKind {
        self.kind
    }

    /// Returns the text for the log: the failed call and the reason, down to the root cause.
    #[must_use]
    pub fn context(&self) -> &str {
        &self.context
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;

    #[test]
    fn a_store_error_keeps_its_source_and_hides_it_from_callers() {
        let cause = std::io::Error::other("connection reset");
        let store = StoreError::new(StoreErrorKind::Other, "GetItem users: connection reset").with_source(cause);
        let error = Error::from(store.with_kind(StoreErrorKind::Throttled));
        assert_eq!(error.to_string(), "The store is not available right now");
        assert_eq!(error.context(), "GetItem users: connection reset");
        let store = error.source().expect("the store's error");
        assert_eq!(store.source().expect("its cause").to_string(), "connection reset");
    }
}
