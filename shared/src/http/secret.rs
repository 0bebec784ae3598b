//! Secrets in requests: how they are read, how large they may be, and that no violation shows one.

use serde_json::{Value, json};

use super::validation::Checker;

/// Stands for a secret's value wherever one is shown. Sent back, it leaves the secret as it is.
pub const MASK: &str = "**********";
/// The most secrets that a user has, or that a start brings.
pub const MAX_SECRETS: usize = 50;
/// The longest name, in characters.
pub const MAX_NAME: usize = 256;
/// The longest value, in bytes.
pub const MAX_VALUE: usize = 64 * 1024;

/// Reads a value, as it is. Violations: `string_type`, `too_long`.
pub fn value<'v>(check: &mut Checker, value: &'v Value) -> Option<&'v str> {
    let Value::String(text) = value else {
        check.report("string_type", "Input should be a valid string", MASK.into(), None);
        return None;
    };
    if text.len() > MAX_VALUE {
        report_too_long(check, "Value", MAX_VALUE, text.len());
        return None;
    }
    Some(text)
}

/// Reports `too_long` for something that is, or holds, secrets.
pub fn report_too_long(check: &mut Checker, what: &str, most: usize, found: usize) {
    let msg = format!("{what} should have at most {most} items after validation, not {found}");
    let ctx = json!({"field_type": what, "max_length": most, "actual_length": found});
    check.report("too_long", msg, MASK.into(), Some(ctx));
}
