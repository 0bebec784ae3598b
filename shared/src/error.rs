//! What can go wrong, told apart by what happened, not by HTTP status: `http::response` maps it once, at the edge.

use std::fmt;

use crate::violation::Violation;

/// The result of everything that can fail in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What happened. Each variant's message is for the caller; context for the log is kept apart and never shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request does not fit its model: every violation, in the order of the fields.
    #[error("the request is not valid")]
    Invalid(Vec<Violation>),
    /// The request is well-formed, but asks for something that cannot be; the text says what.
    #[error("{0}")]
    Refused(String),
    /// The caller did not say who they are, or not credibly.
    #[error("{0}")]
    Unauthenticated(String),
    /// The caller is known, and may not do this.
    #[error("{0}")]
    Forbidden(String),
    /// No such thing, or not the caller's: the two are not told apart.
    #[error("{0}")]
    NotFound(String),
    /// It cannot be done in the state that things are in; the text says what would change that.
    #[error("{0}")]
    Conflict(String),
    /// It was there, and will not be again.
    #[error("{0}")]
    Gone(String),
    /// There are too many of these already.
    #[error("{0}")]
    TooMany(String),
    /// What it needs does not work now.
    #[error("{0}")]
    Unavailable(String),
    /// The request is larger than is accepted.
    #[error("{0}")]
    TooLarge(String),
    /// The store, the bucket or the queue failed.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// Another service that this one needs (an agent server, a sandbox provider) failed.
    #[error("{message}")]
    Upstream {
        /// For the caller: which service and, in general terms, what.
        message: String,
        /// For the log.
        context: String,
    },
    /// A fault of our own.
    #[error("Internal Server Error")]
    Internal {
        /// For the log.
        context: String,
    },
}

impl Error {
    /// A fault of our own, with context for the log.
    pub fn internal(context: impl fmt::Display) -> Self {
        Self::Internal { context: context.to_string() }
    }

    /// Whose fault a failed request is. An upstream service is in most cases the user's own sandbox, and what is unavailable
    /// for a while (an export that is being built) is so by design.
    #[must_use]
    pub fn fault(&self) -> Fault {
        match self {
            Self::Store(_) | Self::Internal { .. } => Fault::Server,
            _ => Fault::User,
        }
    }

    /// What the log should hold: the context where there is one, else the message.
    #[must_use]
    pub fn context(&self) -> String {
        match self {
            Self::Internal { context } | Self::Upstream { context, .. } => context.clone(),
            Self::Store(error) => error.context.clone(),
            other => other.to_string(),
        }
    }
}

/// Who can remedy a failure. The log says it, so that alarms leave out what callers can cause by themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The user, or what belongs to them: their request, their settings, their repository, their sandbox.
    User,
    /// The operator of this server.
    Server,
}

impl Fault {
    /// The value of the log field `fault`. Metric filters in `template.yaml` match it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Server => "server",
        }
    }
}

/// A failed call to DynamoDB, S3 or SQS.
#[derive(Debug)]
pub struct StoreError {
    /// The call that failed, e.g. `PutItem start-tasks`.
    pub operation: &'static str,
    /// For the log.
    pub context: String,
    /// Whether a condition of the write did not hold.
    pub condition_failed: bool,
    /// Whether the write certainly did not happen. When false it may or may not have.
    pub certainly_not_written: bool,
}

impl fmt::Display for StoreError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "The store is not available right now")
    }
}

impl std::error::Error for StoreError {}
