//! Reads JSON request bodies as the reference does, including its messages for malformed JSON.

use serde_json::{Value, json};

use super::validation::{Checked, Checker, Violation};

/// The deepest nesting of a value: code that walks values is recursive.
const MAX_DEPTH: usize = 127;

/// A model of a request body.
pub trait FromJson: Sized {
    /// Reads the model; `None` exactly when it has reported a violation.
    fn from_json(check: &mut Checker, value: &Value) -> Option<Self>;
}

/// Any value, for a handler that reads it itself.
impl FromJson for Value {
    fn from_json(_: &mut Checker, value: &Value) -> Option<Self> {
        Some(value.clone())
    }
}

/// Decodes a body with [`json`] and reads the model.
///
/// # Errors
/// Every violation, at `["body", …]`.
pub fn read<T: FromJson>(content_type: Option<&str>, body: &[u8]) -> Checked<T> {
    read_with(content_type, body, T::from_json)
}

/// Decodes a body with [`json`] and reads its value.
///
/// # Errors
/// Every violation, at `["body", …]`.
pub fn read_with<T>(
    content_type: Option<&str>,
    body: &[u8],
    read: impl FnOnce(&mut Checker, &Value) -> Option<T>,
) -> Checked<T> {
    let value = json(content_type, body)?;
    let mut check = Checker::new("body");
    let read = read(&mut check, &value);
    check.finish(read)
}

/// Decodes the body of a request that must have one.
///
/// * No body, or `null`: violation `missing` at `["body"]`.
/// * A content type other than `application/json` or `application/…+json`, or none: the body as a string, which no model
///   accepts (`model_attributes_type`).
/// * JSON: its value, of whatever type. The last one of repeated keys counts.
///
/// # Errors
/// Besides `missing`: `json_invalid` at `["body", <characters before the fault>]`, with the message of Python's parser in
/// `ctx.error`. This function rejects more than the reference: `NaN` and `Infinity`, numbers too large for a float, halves of
/// surrogate pairs, nesting deeper than 127, and bytes that are not UTF-8 (400 in the reference).
pub fn json(content_type: Option<&str>, body: &[u8]) -> Checked<Value> {
    if body.is_empty() {
        return Err(missing());
    }
    if !content_type.is_some_and(is_json) {
        return Ok(Value::String(String::from_utf8_lossy(body).into_owned()));
    }
    let text = match std::str::from_utf8(body) {
        Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
        Err(error) => {
            let before = String::from_utf8_lossy(&body[..error.valid_up_to()]).chars().count();
            return Err(invalid(before, EXPECTING_VALUE));
        }
    };
    match serde_json::from_str(text) {
        Ok(Value::Null) => Err(missing()),
        Ok(value) => Ok(value),
        Err(_) => {
            let fault = find_fault(text);
            Err(invalid(fault.at, fault.what))
        }
    }
}

fn missing() -> Vec<Violation> {
    let mut check = Checker::new("body");
    check.report_missing(Value::Null);
    check.finish::<()>(None).err().unwrap_or_default()
}

fn invalid(at: usize, what: &'static str) -> Vec<Violation> {
    let mut check = Checker::new("body");
    check.within(at, |check| {
        check.report("json_invalid", "JSON decode error", json!({}), Some(json!({"error": what})));
    });
    check.finish::<()>(None).err().unwrap_or_default()
}

fn is_json(content_type: &str) -> bool {
    let media_type = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    media_type
        .strip_prefix("application/")
        .is_some_and(|subtype| !subtype.contains('/') && (subtype == "json" || subtype.ends_with("+json")))
}

const EXPECTING_VALUE: &str = "Expecting value";
const EXPECTING_COMMA: &str = "Expecting ',' delimiter";
const EXPECTING_COLON: &str = "Expecting ':' delimiter";
const EXPECTING_NAME: &str = "Expecting property name enclosed in double quotes";
const UNTERMINATED: &str = "Unterminated string starting at";
const CONTROL_CHARACTER: &str = "Invalid control character at";
const BAD_ESCAPE: &str = "Invalid \\escape";
const BAD_UNICODE_ESCAPE: &str = "Invalid \\uXXXX escape";
const EXTRA_DATA: &str = "Extra data";
const TOO_DEEP: &str = "Nested too deeply";

struct Fault {
    /// The number of characters before it.
    at: usize,
    what: &'static str,
}

/// Finds where Python's parser would stop. It runs only on text that `serde_json` has rejected, because the errors of `serde_json` have
/// other positions.
fn find_fault(text: &str) -> Fault {
    let chars: Vec<char> = text.chars().collect();
    let mut scan = Scan { chars: &chars, refused: None };
    let start = scan.skip_space(0);
    let end = match scan.value(start, 0) {
        Ok(end) => scan.skip_space(end),
        Err(fault) => return fault,
    };
    if end < chars.len() {
        return Fault { at: end, what: EXTRA_DATA };
    }
    scan.refused.unwrap_or(Fault { at: 0, what: EXPECTING_VALUE })
}

/// Each method starts at an index and returns the index after what it recognised.
struct Scan<'a> {
    chars: &'a [char],
    /// The first fault that Python accepts and we reject.
    refused: Option<Fault>,
}

impl Scan<'_> {
    fn at(&self, index: usize) -> Option<char> {
        self.chars.get(index).copied()
    }

    fn refuse(&mut self, at: usize, what: &'static str) {
        self.refused.get_or_insert(Fault { at, what });
    }

    fn skip_space(&self, mut index: usize) -> usize {
        while matches!(self.at(index), Some(' ' | '\t' | '\n' | '\r')) {
            index += 1;
        }
        index
    }

    fn value(&mut self, start: usize, depth: usize) -> Result<usize, Fault> {
        match self.at(start) {
            Some('"') => self.string(start),
            Some('{' | '[') if depth >= MAX_DEPTH => Err(Fault { at: start, what: TOO_DEEP }),
            Some('{') => self.object(start, depth + 1),
            Some('[') => self.array(start, depth + 1),
            Some('n') => self.word(start, "null"),
            Some('t') => self.word(start, "true"),
            Some('f') => self.word(start, "false"),
            Some('N') => self.not_finite(start, "NaN"),
            Some('I') => self.not_finite(start, "Infinity"),
            Some('-') if self.at(start + 1) == Some('I') => self.not_finite(start, "-Infinity"),
            _ => self.number(start),
        }
    }

    fn object(&mut self, start: usize, depth: usize) -> Result<usize, Fault> {
        let mut index = self.skip_space(start + 1);
        if self.at(index) == Some('}') {
            return Ok(index + 1);
        }
        loop {
            if self.at(index) != Some('"') {
                return Err(Fault { at: index, what: EXPECTING_NAME });
            }
            index = self.string(index)?;
            index = self.skip_space(index);
            if self.at(index) != Some(':') {
                return Err(Fault { at: index, what: EXPECTING_COLON });
            }
            index = self.skip_space(index + 1);
            index = self.value(index, depth)?;
            index = self.skip_space(index);
            match self.at(index) {
                Some('}') => return Ok(index + 1),
                Some(',') => index = self.skip_space(index + 1),
                _ => {
                    return Err(Fault { at: index, what: EXPECTING_COMMA });
                }
            }
        }
    }

    fn array(&mut self, start: usize, depth: usize) -> Result<usize, Fault> {
        let mut index = self.skip_space(start + 1);
        if self.at(index) == Some(']') {
            return Ok(index + 1);
        }
        loop {
            index = self.value(index, depth)?;
            index = self.skip_space(index);
            match self.at(index) {
                Some(']') => return Ok(index + 1),
                Some(',') => index = self.skip_space(index + 1),
                _ => {
                    return Err(Fault { at: index, what: EXPECTING_COMMA });
                }
            }
        }
    }

    fn word(&self, start: usize, word: &str) -> Result<usize, Fault> {
        let found = word.chars().enumerate().all(|(offset, expected)| self.at(start + offset) == Some(expected));
        if found { Ok(start + word.len()) } else { Err(Fault { at: start, what: EXPECTING_VALUE }) }
    }

    fn not_finite(&mut self, start: usize, word: &str) -> Result<usize, Fault> {
        let end = self.word(start, word)?;
        self.refuse(start, EXPECTING_VALUE);
        Ok(end)
    }

    fn digits(&self, mut index: usize) -> usize {
        while self.at(index).is_some_and(|c| c.is_ascii_digit()) {
            index += 1;
        }
        index
    }

    fn number(&mut self, start: usize) -> Result<usize, Fault> {
        let first = if self.at(start) == Some('-') { start + 1 } else { start };
        let mut end = match self.at(first) {
            // A number ends after a leading zero; the next character is then the fault.
            Some('0') => first + 1,
            Some('1'..='9') => self.digits(first),
            _ => {
                return Err(Fault { at: start, what: EXPECTING_VALUE });
            }
        };
        if self.at(end) == Some('.') && self.digits(end + 1) > end + 1 {
            end = self.digits(end + 1);
        }
        if matches!(self.at(end), Some('e' | 'E')) {
            let exponent = if matches!(self.at(end + 1), Some('+' | '-')) { end + 2 } else { end + 1 };
            if self.digits(exponent) > exponent {
                end = self.digits(exponent);
            }
        }
        let text: String = self.chars[start..end].iter().collect();
        // Python reads 1e999 as infinity, which JSON cannot express.
        if !text.parse().is_ok_and(f64::is_finite) {
            self.refuse(start, EXPECTING_VALUE);
        }
        Ok(end)
    }

    fn string(&mut self, start: usize) -> Result<usize, Fault> {
        let mut index = start + 1;
        loop {
            match self.at(index) {
                None => {
                    return Err(Fault { at: start, what: UNTERMINATED });
                }
                Some('"') => return Ok(index + 1),
                Some('\u{0}'..='\u{1f}') => {
                    return Err(Fault { at: index, what: CONTROL_CHARACTER });
                }
                Some('\\') => index = self.escape(start, index)?,
                Some(_) => index += 1,
            }
        }
    }

    fn escape(&mut self, string: usize, backslash: usize) -> Result<usize, Fault> {
        match self.at(backslash + 1) {
            None => Err(Fault { at: string, what: UNTERMINATED }),
            Some('"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => Ok(backslash + 2),
            Some('u') => self.unicode_escape(backslash + 1),
            Some(_) => Err(Fault { at: backslash, what: BAD_ESCAPE }),
        }
    }

    fn unicode_escape(&mut self, u: usize) -> Result<usize, Fault> {
        let unit = self.code_unit(u).ok_or(Fault { at: u, what: BAD_UNICODE_ESCAPE })?;
        let escape_follows = self.at(u + 5) == Some('\\') && self.at(u + 6) == Some('u');
        match unit {
            0xd800..=0xdbff if escape_follows => match self.code_unit(u + 6) {
                Some(0xdc00..=0xdfff) => return Ok(u + 11),
                Some(_) => self.refuse(u, BAD_UNICODE_ESCAPE),
                None => {
                    return Err(Fault { at: u + 6, what: BAD_UNICODE_ESCAPE });
                }
            },
            0xd800..=0xdfff => self.refuse(u, BAD_UNICODE_ESCAPE),
            _ => {}
        }
        Ok(u + 5)
    }

    /// The four hex digits after a `u`, if more text follows them.
    fn code_unit(&self, u: usize) -> Option<u32> {
        self.at(u + 5)?;
        self.chars[u + 1..u + 5].iter().try_fold(0, |unit, c| Some(unit * 16 + c.to_digit(16)?))
    }
}
