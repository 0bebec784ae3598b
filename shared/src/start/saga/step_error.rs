//! The error of a step, and the one place that derives from an error what it means for the start: whether the step is retried, and the class
//! of its cause.

use crate::agent_server::{AgentServerError, Retry};
use crate::error::{Error, ErrorClass, Fault};
use crate::start::store::LeaseLost;

/// The error of a step. Each text is for the user.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum StepError {
    /// Permanent.
    Failed(ErrorClass, String),
    /// Transient: the step is retried. The text is shown if the retries fail.
    Retry(ErrorClass, String),
    /// The provider of the sandbox does not respond, so the state of the sandbox is unknown. The step waits until its deadline.
    Unreachable(String),
    /// No sandbox can be created, because starts use all sandboxes that the user may have. The step waits until one of them ends.
    AtCapacity,
    /// The agent server returned an error of its own. The step is retried a few times; the error is usually permanent.
    Refusal(ErrorClass, String),
    /// Another worker holds the lease now.
    LeaseLost,
}

impl From<LeaseLost> for StepError {
    fn from(_: LeaseLost) -> Self {
        Self::LeaseLost
    }
}

impl From<Error> for StepError {
    fn from(error: Error) -> Self {
        match error {
            Error::Store(_) => {
                tracing::warn!(error = %error.context(), "start.step_failed");
                Self::Retry(ErrorClass::Store, error.to_string())
            }
            // Logged once for all callers, as `provider.circuit_opened`.
            Error::CircuitOpen => Self::Unreachable(error.to_string()),
            Error::Upstream { .. } => {
                tracing::warn!(error = %error.context(), "start.provider_unreachable");
                Self::Unreachable(error.to_string())
            }
            Error::Internal { context } => {
                tracing::error!(error = %context, "start.step_failed");
                let text = "Internal error while starting the conversation; see the server log.";
                Self::Failed(ErrorClass::Ours, text.to_owned())
            }
            // Of the dependencies of a start, only sandboxes have no error of their own.
            Error::Unavailable(_) => Self::Failed(ErrorClass::Sandbox, error.to_string()),
            Error::Invalid(_)
            | Error::Refused(_)
            | Error::Unauthenticated(_)
            | Error::Forbidden(_)
            | Error::NotFound(_)
            | Error::Conflict(_)
            | Error::Gone(_)
            | Error::TooMany(_)
            | Error::Saturated { .. }
            | Error::TooLarge(_) => Self::Failed(ErrorClass::User, error.to_string()),
        }
    }
}

impl From<AgentServerError> for StepError {
    fn from(error: AgentServerError) -> Self {
        let class = match error.fault() {
            Fault::User => ErrorClass::User,
            Fault::Server => ErrorClass::AgentServer,
        };
        match error.retry() {
            Retry::Often => Self::Retry(class, error.to_string()),
            Retry::Few => Self::Refusal(class, error.explanation()),
            Retry::Never => Self::Failed(class, error.explanation()),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::StatusCode;

    use super::*;
    use crate::agent_server::Failure;
    use crate::error::{StoreError, StoreErrorKind};

    fn class(error: impl Into<StepError>) -> Option<ErrorClass> {
        match error.into() {
            StepError::Failed(class, _) | StepError::Retry(class, _) | StepError::Refusal(class, _) => Some(class),
            StepError::Unreachable(_) | StepError::AtCapacity | StepError::LeaseLost => None,
        }
    }

    #[test]
    fn errors_have_the_class_of_their_cause() {
        for (error, expected) in [
            (Error::Store(StoreError::new(StoreErrorKind::Throttled, "x")), Some(ErrorClass::Store)),
            (Error::internal("x"), Some(ErrorClass::Ours)),
            (Error::Upstream { message: String::new(), context: String::new() }, None),
            (Error::Unavailable(String::new()), Some(ErrorClass::Sandbox)),
            (Error::Refused(String::new()), Some(ErrorClass::User)),
            (Error::NotFound(String::new()), Some(ErrorClass::User)),
        ] {
            assert_eq!(class(error), expected);
        }
        for (failure, expected) in [
            (Failure::Unreachable, ErrorClass::AgentServer),
            (Failure::Status(StatusCode::INTERNAL_SERVER_ERROR, String::new()), ErrorClass::AgentServer),
            (Failure::Status(StatusCode::UNPROCESSABLE_ENTITY, String::new()), ErrorClass::AgentServer),
            (
                Failure::Status(StatusCode::INTERNAL_SERVER_ERROR, "Failed to fetch plugin from x".to_owned()),
                ErrorClass::User,
            ),
        ] {
            assert_eq!(class(AgentServerError { request: String::new(), failure }), Some(expected));
        }
    }
}
