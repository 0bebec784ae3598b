//! The trace of a start: one id in all log lines of a start, whichever function writes them.
//!
//! The log span of an invocation has the fields `trace`, `task`, `conversation`, `sandbox` and `request_id`, each as soon as it is known. Log
//! lines have them as `span.trace` and so on. docs/operations.md has the queries.

use std::fmt;

use serde::{Deserialize, Serialize};
use tracing::Span;
use tracing::field::{Empty, display};
use uuid::Uuid;

use crate::clock::Time;
use crate::id;

/// The header by which API Gateway and Lambda pass the trace of a request.
pub const TRACE_HEADER: &str = "x-amzn-trace-id";

/// The lengths of the parts of an id after `1-`: the time in seconds, and a random number.
const LENGTHS: [usize; 2] = [8, 24];

/// The id of a trace in the form of AWS X-Ray: `1-65a1b2c3-0123456789abcdef01234567`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceId(String);

impl TraceId {
    /// Reads the root of a trace header, such as `Root=1-65a1b2c3-0123456789abcdef01234567;Parent=…;Sampled=1`. `None` if it has another
    /// form: clients can send this header, and its text gets into the log.
    #[must_use]
    pub fn of_header(value: &str) -> Option<Self> {
        let root = value.split(';').find_map(|part| part.trim().strip_prefix("Root="))?;
        let is_hex = |text: &str| text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let (time, number) = root.strip_prefix("1-")?.split_once('-')?;
        let is_valid = [time.len(), number.len()] == LENGTHS && is_hex(time) && is_hex(number);
        is_valid.then(|| Self(root.to_owned()))
    }

    /// The trace of a start whose request had none. It is made of the start's own id, so that it need not be stored.
    #[must_use]
    pub fn of_start(created_at: Time, task: Uuid) -> Self {
        let seconds = u32::try_from(created_at.unix_seconds()).unwrap_or_default();
        Self(format!("1-{seconds:08x}-{}", &id::hex(task)[..LENGTHS[1]]))
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.0)
    }
}

/// The log span of one invocation, or of one message of it. Its fields are empty until they are recorded.
#[must_use]
pub fn invocation() -> Span {
    // A span of a lower level would be disabled where `LOG_LEVEL` is `warn`, and warnings would lack its fields.
    tracing::error_span!(
        "invocation",
        request_id = Empty,
        trace = Empty,
        task = Empty,
        conversation = Empty,
        sandbox = Empty
    )
}

/// Records the trace in the log span of the current invocation.
pub fn record_trace(trace: &TraceId) {
    Span::current().record("trace", display(trace));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_root_of_a_valid_header_is_read() {
        let root = "1-65a1b2c3-0123456789abcdef01234567";
        for header in [
            format!("Root={root}"),
            format!("Root={root};Parent=53995c3f42cd8ad8;Sampled=1"),
            format!("Self=1-00000000-000000000000000000000000; Root={root};Root=x"),
        ] {
            assert_eq!(TraceId::of_header(&header).expect("a trace").to_string(), root, "{header}");
        }
        for refused in [
            String::new(),
            root.to_owned(),
            "Root=".to_owned(),
            format!("Root=2{}", &root[1..]),
            format!("Root={root}0"),
            format!("Root={root}-0"),
            format!("Root={}", root.to_uppercase()),
            format!("Root={}\"", &root[..root.len() - 1]),
            format!("Root={}\n", &root[..root.len() - 1]),
            format!("Root={}\u{e9}", &root[..root.len() - 2]),
            format!("Root=1-65a1b2c-{}", "0".repeat(25)),
            format!("Root=1-65a1b2c3-{}", "0".repeat(10_000)),
        ] {
            assert_eq!(TraceId::of_header(&refused), None, "{refused}");
        }
    }

    #[test]
    fn a_start_without_a_traced_request_has_a_trace_of_the_same_form() {
        let created_at: Time = serde_json::from_str("\"2026-11-20T10:00:00.5Z\"").expect("a time");
        let task = Uuid::from_u128(0x0513_cae8_43c0_4dd7_aebc_f1c2_dc0f_9b8f);
        let trace = TraceId::of_start(created_at, task);
        assert_eq!(trace.to_string(), "1-6b001a20-0513cae843c04dd7aebcf1c2");
        assert_eq!(TraceId::of_header(&format!("Root={trace}")), Some(trace));
    }
}
