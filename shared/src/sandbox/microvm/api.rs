//! The calls to the API of Lambda MicroVMs, with typed failures.

use std::time::Duration;

use aws_sdk_lambdamicrovms::Client;
use aws_sdk_lambdamicrovms::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_lambdamicrovms::operation::run_microvm::RunMicrovmError;
use aws_sdk_lambdamicrovms::types::{Logging, LoggingDisabled, MicrovmState, PortSpecification};
use aws_smithy_runtime_api::client::orchestrator::HttpResponse;
use aws_types::SdkConfig;
use secrecy::{ExposeSecret as _, SecretString};

use crate::aws::timeouts;
use crate::clock::Time;
use crate::error::Error;
use crate::mask::masked;

/// How long AWS lets a MicroVM exist, in seconds, from its start and whatever its state. It is the longest time that AWS permits.
pub const LONGEST_LIFE: Duration = Duration::from_secs(8 * 3600);
/// The longest time for which AWS issues an access token.
pub(super) const TOKEN_LIFE: Duration = Duration::from_secs(3600);
/// The timeout of one attempt. `RunMicrovm` responds while the MicroVM still starts.
const ATTEMPT: Duration = Duration::from_secs(6);
/// The header with an access token in a response to `CreateMicrovmAuthToken`, which is a map of headers.
const TOKEN_HEADER: &str = "X-aws-proxy-auth";
/// The most characters of a reason that AWS gives.
const REASON: usize = 300;

/// A MicroVM as AWS reports it. Reads are eventually consistent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Microvm {
    pub id: String,
    /// The host name of its endpoint.
    pub endpoint: String,
    pub state: MicrovmState,
    pub started_at: Time,
    /// Why AWS has ended it.
    pub reason: Option<String>,
}

impl Microvm {
    /// Whether it has ended or is about to: both are final.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, MicrovmState::Terminating | MicrovmState::Terminated)
    }
}

/// A MicroVM in a list, which has no endpoint.
#[derive(Clone, Debug)]
pub(super) struct Listed {
    pub id: String,
    pub state: MicrovmState,
    pub started_at: Time,
}

/// Why a call has no result.
#[derive(Debug)]
pub(super) enum ApiError {
    /// There is no such MicroVM (any more).
    NotFound,
    /// The state of the MicroVM does not allow the call, or the idempotency token was used with other parameters.
    Conflict,
    /// A quota of the account is exhausted, or AWS has no capacity; the message is for the user.
    Exhausted(String),
    /// AWS refuses the call: a permission is missing, or a parameter is not valid.
    Refused { code: String, context: String },
    /// Throttled, or no usable response.
    Unavailable { context: String, retry_after: Option<Duration> },
    /// The circuit breaker is open.
    NotCalled(Error),
}

impl From<ApiError> for Error {
    fn from(error: ApiError) -> Self {
        error.into_error()
    }
}

impl ApiError {
    /// The error for a caller to which the distinction does not matter.
    pub fn into_error(self) -> Error {
        match self {
            Self::Exhausted(message) => Error::Refused(message),
            Self::Refused { code, context } => {
                tracing::error!(code, error = context, "sandbox.microvm_call_refused");
                Error::Refused(format!("AWS Lambda refused the call for the sandbox ({code}); see the server log"))
            }
            Self::NotFound => unavailable("the MicroVM does not exist"),
            Self::Conflict => unavailable("the state of the MicroVM does not allow the call"),
            Self::Unavailable { context, .. } => unavailable(&context),
            Self::NotCalled(error) => error,
        }
    }
}

/// The error for a MicroVM whose state is unknown or about to change.
pub(super) fn unavailable(context: &str) -> Error {
    Error::Upstream {
        message: "AWS Lambda does not respond about the sandbox; try again later".to_owned(),
        context: format!("Lambda MicroVMs: {context}"),
    }
}

/// What a MicroVM is run with. The same values give the same MicroVM, so all of them follow from the record and the configuration.
#[derive(Clone, Debug)]
pub(super) struct Run<'a> {
    /// The idempotency token.
    pub token: String,
    /// The ARN of the image.
    pub image: &'a str,
    /// The network connectors for requests to the MicroVM, and for its own.
    pub connectors: [String; 2],
    /// What the supervisor in the MicroVM receives; contains the session key.
    pub payload: &'a SecretString,
    /// The session key, to be masked in what AWS quotes.
    pub key: &'a SecretString,
}

/// Creates a client.
pub(super) fn client(config: &SdkConfig) -> Client {
    let config = aws_sdk_lambdamicrovms::config::Builder::from(config).timeout_config(timeouts(ATTEMPT)).build();
    Client::from_conf(config)
}

/// Returns a MicroVM; `None` when AWS does not know it (any more).
pub(super) async fn get(client: &Client, id: &str) -> Result<Option<Microvm>, ApiError> {
    let found = client.get_microvm().microvm_identifier(id).send().await;
    let found = match found.map_err(|error| failed("GetMicrovm", &error)) {
        Err(ApiError::NotFound) => return Ok(None),
        found => found?,
    };
    Ok(Some(Microvm {
        id: found.microvm_id,
        endpoint: host_of(&found.endpoint),
        state: found.state,
        started_at: time(&found.started_at),
        reason: found.state_reason.map(|reason| bounded(&reason)),
    }))
}

/// Runs a MicroVM, or returns the one that was run with the same token and the same parameters, whatever its state.
pub(super) async fn run(client: &Client, run: &Run<'_>) -> Result<Microvm, ApiError> {
    let [ingress, egress] = &run.connectors;
    let life = i32::try_from(LONGEST_LIFE.as_secs()).unwrap_or(i32::MAX);
    let made = client
        .run_microvm()
        .client_token(&run.token)
        .image_identifier(run.image)
        .maximum_duration_in_seconds(life)
        .ingress_network_connectors(ingress)
        .egress_network_connectors(egress)
        .run_hook_payload(run.payload.expose_secret())
        // Without a role AWS could not write logs; with one every process in the sandbox would have its credentials.
        .logging(Logging::Disabled(LoggingDisabled::builder().build()))
        .send()
        .await;
    let made = made.map_err(|error| run_failed(&error, run.key))?;
    Ok(Microvm {
        id: made.microvm_id,
        endpoint: host_of(&made.endpoint),
        state: made.state,
        started_at: time(&made.started_at),
        reason: made.state_reason.map(|reason| bounded(&reason)),
    })
}

/// Freezes a MicroVM.
pub(super) async fn suspend(client: &Client, id: &str) -> Result<(), ApiError> {
    let done = client.suspend_microvm().microvm_identifier(id).send().await;
    done.map(drop).map_err(|error| failed("SuspendMicrovm", &error))
}

/// Lets a frozen MicroVM continue.
pub(super) async fn resume(client: &Client, id: &str) -> Result<(), ApiError> {
    let done = client.resume_microvm().microvm_identifier(id).send().await;
    done.map(drop).map_err(|error| failed("ResumeMicrovm", &error))
}

/// Ends a MicroVM. One that AWS does not know counts as ended.
pub(super) async fn terminate(client: &Client, id: &str) -> Result<(), ApiError> {
    let done = client.terminate_microvm().microvm_identifier(id).send().await;
    match done.map(drop).map_err(|error| failed("TerminateMicrovm", &error)) {
        Err(ApiError::NotFound) => Ok(()),
        done => done,
    }
}

/// Issues a token for [`TOKEN_LIFE`] with which one port of a MicroVM can be reached.
pub(super) async fn access_token(client: &Client, id: &str, port: u16) -> Result<SecretString, ApiError> {
    let minutes = i32::try_from(TOKEN_LIFE.as_secs() / 60).unwrap_or(i32::MAX);
    let made = client
        .create_microvm_auth_token()
        .microvm_identifier(id)
        .expiration_in_minutes(minutes)
        .allowed_ports(PortSpecification::Port(port.into()))
        .send()
        .await
        .map_err(|error| failed("CreateMicrovmAuthToken", &error))?;
    let mut headers = made.auth_token.into_iter();
    let found = headers.find(|(name, _)| name.eq_ignore_ascii_case(TOKEN_HEADER)).map(|(_, token)| token);
    found.map(SecretString::from).ok_or_else(|| ApiError::Unavailable {
        context: format!("CreateMicrovmAuthToken: the response has no {TOKEN_HEADER}"),
        retry_after: None,
    })
}

/// Returns the MicroVMs of an image, also those that have ended.
pub(super) async fn list(client: &Client, image: &str) -> Result<Vec<Listed>, ApiError> {
    let mut listed = Vec::new();
    let mut items = client.list_microvms().image_identifier(image).into_paginator().items().send();
    while let Some(item) = items.next().await {
        let item = item.map_err(|error| failed("ListMicrovms", &error))?;
        listed.push(Listed { id: item.microvm_id, state: item.state, started_at: time(&item.started_at) });
    }
    Ok(listed)
}

fn run_failed(error: &SdkError<RunMicrovmError, HttpResponse>, key: &SecretString) -> ApiError {
    let mask = |text: &str| masked(text, [key.expose_secret()]);
    match error.as_service_error() {
        Some(RunMicrovmError::ServiceQuotaExceededException(exceeded)) => {
            ApiError::Exhausted(exhausted(exceeded.message().map(mask).as_deref(), exceeded.quota_code()))
        }
        Some(RunMicrovmError::InsufficientCapacityException(_)) => ApiError::Exhausted(
            "AWS has no capacity for another MicroVM in this region at the moment; try again later".to_owned(),
        ),
        _ => match failed("RunMicrovm", error) {
            ApiError::Refused { code, context } => ApiError::Refused { code, context: mask(&context) },
            ApiError::Unavailable { context, retry_after } => {
                ApiError::Unavailable { context: mask(&context), retry_after }
            }
            other => other,
        },
    }
}

/// The message about an exhausted quota, for a user and the owner of the account.
fn exhausted(reason: Option<&str>, code: Option<&str>) -> String {
    let reason = reason.map(|reason| format!(": {}", bounded(reason).trim_end_matches('.'))).unwrap_or_default();
    let quota = code.map(|code| format!(" (quota {})", bounded(code))).unwrap_or_default();
    format!(
        "A quota of the AWS account for Lambda MicroVMs is exhausted{reason}{quota}. Delete sandboxes, paused ones count too, or request a \
         higher quota for AWS Lambda in Service Quotas"
    )
}

/// Classifies a failure by its code, for operations that do not model all of them.
fn failed<E>(operation: &str, error: &SdkError<E, HttpResponse>) -> ApiError
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    let code = error.code().unwrap_or_default().to_owned();
    let status = error.raw_response().map(|response| response.status().as_u16());
    match code.as_str() {
        "ResourceNotFoundException" => return ApiError::NotFound,
        "ConflictException" | "ResourceConflictException" => return ApiError::Conflict,
        "ServiceQuotaExceededException" => return ApiError::Exhausted(exhausted(error.message(), None)),
        _ => {}
    }
    let context = format!("{operation}: {}", DisplayErrorContext(error));
    let is_throttled =
        matches!(code.as_str(), "ThrottlingException" | "TooManyRequestsException") || status == Some(429);
    if !is_throttled && status.is_some_and(|status| (400..500).contains(&status)) {
        return ApiError::Refused { code, context };
    }
    let retry_after = error
        .raw_response()
        .and_then(|response| response.headers().get("retry-after"))
        .and_then(|text| text.parse().ok());
    ApiError::Unavailable { context, retry_after: retry_after.map(Duration::from_secs) }
}

/// AWS returns the host name of an endpoint; a scheme or a path would be no host name.
fn host_of(endpoint: &str) -> String {
    let endpoint = endpoint.split_once("://").map_or(endpoint, |(_, rest)| rest);
    endpoint.split('/').next().unwrap_or_default().to_ascii_lowercase()
}

fn bounded(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(REASON).collect()
}

fn time(time: &aws_sdk_lambdamicrovms::primitives::DateTime) -> Time {
    let timestamp = jiff::Timestamp::from_nanosecond(time.as_nanos()).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    Time::from(timestamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_about_a_quota_names_it() {
        let message = exhausted(Some("Memory of all MicroVMs exceeds 8 GB."), Some("L-1234"));
        assert_eq!(
            message,
            "A quota of the AWS account for Lambda MicroVMs is exhausted: Memory of all MicroVMs exceeds 8 GB (quota L-1234). Delete \
             sandboxes, paused ones count too, or request a higher quota for AWS Lambda in Service Quotas"
        );
        assert!(
            exhausted(None, None).starts_with("A quota of the AWS account for Lambda MicroVMs is exhausted. Delete")
        );
    }

    #[test]
    fn an_endpoint_is_a_host_name() {
        let host = "abc.lambda-microvm.us-east-1.on.aws";
        for endpoint in
            [host, "https://ABC.lambda-microvm.us-east-1.on.aws/", "https://abc.lambda-microvm.us-east-1.on.aws/a/b"]
        {
            assert_eq!(host_of(endpoint), host);
        }
    }
}
