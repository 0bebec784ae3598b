//! Validates request data by pydantic's rules and reports violations with pydantic's messages.
//!
//! The reference validates with pydantic in lax mode (`"1"` is an integer, `"yes"` a boolean) and returns 422 with all violations of a
//! request at once, in the order in which the fields are declared. Clients read `type`, `loc` and `msg` of those responses, so the
//! functions here produce the same ones.
//!
//! A reader is a function `fn(&mut Checker, &Value) -> Option<T>`. It returns `None` exactly when it has reported at least
//! one violation; its caller continues with the other fields.

use std::fmt::Display;

use serde_json::{Map, Number, Value, json};
use uuid::Uuid;

pub use crate::violation::{Loc, Violation};

/// The longest integer in a text: Python rejects longer ones without parsing them.
const MAX_INTEGER_TEXT: usize = 4300;

/// The value that was read, or every violation (never an empty list).
pub type Checked<T> = Result<T, Vec<Violation>>;

/// An enumeration with one spelling per value on the wire. `wire_enum!` declares such types.
pub trait Choice: Copy + Sized + 'static {
    /// All values, in the order of error messages.
    const ALL: &'static [Self];

    /// The spelling on the wire, which is case-sensitive.
    fn as_str(self) -> &'static str;

    /// The value with a spelling.
    fn from_wire(text: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|choice| choice.as_str() == text)
    }
}

/// Declares an enum by its wire spellings, with `Choice`, `Display`, `as_str`, `Serialize` and `Deserialize`.
macro_rules! wire_enum {
    ($(#[$meta:meta])* pub enum $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $($(#[$variant_meta])* #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// The spelling on the wire.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl $crate::http::pydantic::validation::Choice for $name {
            const ALL: &'static [Self] = &[$(Self::$variant,)+];

            fn as_str(self) -> &'static str {
                $name::as_str(self)
            }
        }

        // Not derived: utoipa does not read the spelling from a macro's argument.
        #[cfg(feature = "openapi")]
        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
                utoipa::openapi::ObjectBuilder::new()
                    .schema_type(utoipa::openapi::schema::Type::String)
                    .enum_values(Some([$($text,)+]))
                    .into()
            }
        }

        #[cfg(feature = "openapi")]
        impl utoipa::ToSchema for $name {}

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }
    };
}
pub(crate) use wire_enum;

/// Collects violations and tracks the location of the reader.
#[derive(Debug)]
pub struct Checker {
    loc: Vec<Loc>,
    violations: Vec<Violation>,
}

impl Checker {
    /// Starts with a part of the request: `body`, `query` or `path`.
    #[must_use]
    pub fn new(part: &'static str) -> Self {
        Self { loc: vec![part.into()], violations: Vec::new() }
    }

    /// Reads a value one step below the current location.
    pub fn within<T>(&mut self, step: impl Into<Loc>, read: impl FnOnce(&mut Self) -> T) -> T {
        self.loc.push(step.into());
        let result = read(self);
        self.loc.pop();
        result
    }

    /// Reports a violation at the current location.
    pub fn report(&mut self, kind: &'static str, msg: impl Into<String>, input: Value, ctx: Option<Value>) {
        self.violations.push(Violation { kind, loc: self.loc.clone(), msg: msg.into(), input, ctx });
    }

    /// Reports `too_long`: a list or a dictionary (`what`) has more than `most` items. `input` is what the violation shows of it.
    pub fn report_too_long(&mut self, what: &str, most: usize, found: usize, input: Value) {
        let msg = format!("{what} should have at most {most} items after validation, not {found}");
        let ctx = json!({"field_type": what, "max_length": most, "actual_length": found});
        self.report("too_long", msg, input, Some(ctx));
    }

    /// Reports `missing`. `parent` is the object that lacks the value, or null for a parameter.
    pub fn report_missing(&mut self, parent: Value) {
        self.report("missing", "Field required", parent, None);
    }

    /// Reports the violation of a rule that pydantic does not have, as pydantic reports an exception of a custom validator.
    pub fn report_value_error(&mut self, text: impl Display, input: Value) {
        // pydantic puts the exception into `ctx`; as JSON that is an empty object.
        self.report("value_error", format!("Value error, {text}"), input, Some(json!({"error": {}})));
    }

    /// Whether no violation was reported so far.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.violations.is_empty()
    }

    /// # Errors
    /// All violations, in the order in which they were reported.
    pub fn finish<T>(self, value: Option<T>) -> Checked<T> {
        match value {
            Some(value) if self.violations.is_empty() => Ok(value),
            _ => Err(self.violations),
        }
    }
}

/// Reads a string. Violation: `string_type`.
pub fn string(check: &mut Checker, value: &Value) -> Option<String> {
    let Value::String(text) = value else {
        check.report("string_type", "Input should be a valid string", value.clone(), None);
        return None;
    };
    Some(text.clone())
}

/// Reads a text of at most `longest` characters. Violations: those of [`string`], `string_too_long`.
pub fn string_up_to(longest: usize, check: &mut Checker, value: &Value) -> Option<String> {
    let text = string(check, value)?;
    if text.chars().count() > longest {
        let msg = format!("String should have at most {longest} characters");
        check.report("string_too_long", msg, value.clone(), Some(json!({"max_length": longest})));
        return None;
    }
    Some(text)
}

/// Reads a boolean: true and false, 0 and 1 (also as floats), and the words of [`boolean_from_text`].
/// Violations: `bool_parsing` for other integers and words, `bool_type` for other types.
pub fn boolean(check: &mut Checker, value: &Value) -> Option<bool> {
    let number = match value {
        Value::Bool(flag) => return Some(*flag),
        Value::String(text) => {
            let flag = boolean_from_text(text);
            if flag.is_none() {
                report_bool_parsing(check, value);
            }
            return flag;
        }
        Value::Number(number) => number.as_i64().or_else(|| number.as_f64().and_then(whole)),
        _ => None,
    };
    match number {
        Some(0) => Some(false),
        Some(1) => Some(true),
        Some(_) => {
            report_bool_parsing(check, value);
            None
        }
        None => {
            check.report("bool_type", "Input should be a valid boolean", value.clone(), None);
            None
        }
    }
}

fn report_bool_parsing(check: &mut Checker, value: &Value) {
    let msg = "Input should be a valid boolean, unable to interpret input";
    check.report("bool_parsing", msg, value.clone(), None);
}

/// Reads the words for true and false, in any case, without spaces around them.
#[must_use]
pub fn boolean_from_text(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "true" | "t" | "yes" | "y" | "on" => Some(true),
        "0" | "false" | "f" | "no" | "n" | "off" => Some(false),
        _ => None,
    }
}

/// Reads an integer: numbers without a fraction, booleans, and text that [`parse_integer`] accepts.
/// Violations: `int_type`, `int_parsing`, `int_from_float`, `int_parsing_size`.
///
/// pydantic accepts integers of any size; here those outside of 64 bits are `int_parsing_size`.
pub fn integer(check: &mut Checker, value: &Value) -> Option<i64> {
    match value {
        Value::Bool(flag) => Some(i64::from(*flag)),
        Value::Number(number) => integer_from_number(check, number),
        Value::String(text) => match parse_integer(text) {
            IntegerText::Value(integer) => Some(integer),
            IntegerText::TooSmall | IntegerText::TooLarge | IntegerText::TooLong => {
                report_int_size(check, value.clone());
                None
            }
            IntegerText::Invalid => {
                report_int_parsing(check, value.clone());
                None
            }
        },
        _ => {
            check.report("int_type", "Input should be a valid integer", value.clone(), None);
            None
        }
    }
}

fn integer_from_number(check: &mut Checker, number: &Number) -> Option<i64> {
    if let Some(integer) = number.as_i64() {
        return Some(integer);
    }
    let float = number.as_f64()?;
    let input = Value::Number(number.clone());
    if float.fract() != 0.0 {
        let msg = "Input should be a valid integer, got a number with a fractional part";
        check.report("int_from_float", msg, input, None);
        return None;
    }
    let fitting = whole(float);
    if fitting.is_none() {
        report_int_size(check, input);
    }
    fitting
}

/// Converts a float without a fraction to an integer, if it fits.
fn whole(float: f64) -> Option<i64> {
    // 2^63 is the first value that does not fit; -2^63 fits.
    const LIMIT: f64 = 9_223_372_036_854_775_808.0;
    if float.fract() != 0.0 || !(-LIMIT..LIMIT).contains(&float) {
        return None;
    }
    #[expect(clippy::cast_possible_truncation, reason = "whole and in range, checked above")]
    let integer = float as i64;
    Some(integer)
}

pub(super) fn report_int_parsing(check: &mut Checker, input: Value) {
    let msg = "Input should be a valid integer, unable to parse string as an integer";
    check.report("int_parsing", msg, input, None);
}

pub(super) fn report_int_size(check: &mut Checker, input: Value) {
    let msg = "Unable to parse input string as an integer, exceeded maximum size";
    check.report("int_parsing_size", msg, input, None);
}

/// The result of reading a text as an integer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IntegerText {
    /// An integer of 64 bits.
    Value(i64),
    /// An integer below those of 64 bits.
    TooSmall,
    /// An integer above those of 64 bits.
    TooLarge,
    /// Longer than the limit for parsing.
    TooLong,
    /// Not an integer.
    Invalid,
}

/// Reads an integer from text: spaces around it, a sign, leading zeros, single underscores between digits and a fraction of
/// zeros are allowed (` 5`, `+5`, `007`, `1_0`, `5.0`).
#[must_use]
pub fn parse_integer(text: &str) -> IntegerText {
    let text = text.trim();
    if text.len() > MAX_INTEGER_TEXT {
        return IntegerText::TooLong;
    }
    let (negative, rest) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let digits = match rest.split_once('.') {
        Some((digits, zeros)) if !zeros.is_empty() && zeros.bytes().all(|b| b == b'0') => digits,
        Some(_) => return IntegerText::Invalid,
        None => rest,
    };
    let groups_are_digits =
        digits.split('_').all(|group| !group.is_empty() && group.bytes().all(|b| b.is_ascii_digit()));
    if !groups_are_digits {
        return IntegerText::Invalid;
    }
    let mut value: i64 = 0;
    for digit in digits.bytes().filter(u8::is_ascii_digit).map(|b| i64::from(b - b'0')) {
        // Negative numbers are built by subtraction, because i64::MIN has no positive counterpart.
        let signed = if negative { -digit } else { digit };
        let Some(next) = value.checked_mul(10).and_then(|value| value.checked_add(signed)) else {
            return if negative { IntegerText::TooSmall } else { IntegerText::TooLarge };
        };
        value = next;
    }
    IntegerText::Value(value)
}

/// Reads a float: numbers, booleans, and text with a decimal number (underscores between digits allowed).
/// Violations: `float_type`, `float_parsing`, and `finite_number` for numbers that JSON cannot express in the response.
pub fn float(check: &mut Checker, value: &Value) -> Option<f64> {
    let parsed = match value {
        Value::Bool(flag) => return Some(f64::from(u8::from(*flag))),
        Value::Number(number) => number.as_f64(),
        Value::String(text) => float_from_text(text),
        _ => {
            check.report("float_type", "Input should be a valid number", value.clone(), None);
            return None;
        }
    };
    match parsed {
        Some(float) if float.is_finite() => Some(float),
        Some(_) => {
            check.report("finite_number", "Input should be a finite number", value.clone(), None);
            None
        }
        None => {
            let msg = "Input should be a valid number, unable to parse string as a number";
            check.report("float_parsing", msg, value.clone(), None);
            None
        }
    }
}

fn float_from_text(text: &str) -> Option<f64> {
    if let Ok(float) = text.trim().parse() {
        return Some(float);
    }
    if text.starts_with('_') || text.ends_with('_') || text.contains("__") {
        return None;
    }
    text.replace('_', "").parse().ok()
}

/// Reads a UUID: dashed, 32 hex digits, in braces or after `urn:uuid:`. Violations: `uuid_type`, `uuid_parsing`.
pub fn uuid(check: &mut Checker, value: &Value) -> Option<Uuid> {
    let Value::String(text) = value else {
        check.report("uuid_type", "UUID input should be a string, bytes or UUID object", value.clone(), None);
        return None;
    };
    uuid_from_text(check, text)
}

/// Reads a UUID from text. Violation: `uuid_parsing`.
pub fn uuid_from_text(check: &mut Checker, text: &str) -> Option<Uuid> {
    let error = match parse_uuid(text) {
        Ok(uuid) => return Some(uuid),
        Err(error) => error,
    };
    check.report(
        "uuid_parsing",
        format!("Input should be a valid UUID, {error}"),
        text.into(),
        Some(json!({"error": error})),
    );
    None
}

/// Reads `8-4-4-4-12` hex digits, alone, in braces or after `urn:uuid:`, or 32 hex digits alone. The messages are those of the uuid crate
/// that pydantic 2.12 was built with; later versions of the crate have other messages and accept other texts.
fn parse_uuid(text: &str) -> Result<Uuid, String> {
    const GROUPS: [usize; 5] = [8, 4, 4, 4, 12];
    // A text of exactly the right length is unwrapped first; the messages for other lengths count the wrapping.
    let text = match text.len() {
        38 => in_braces(text).unwrap_or(text),
        45 => text.strip_prefix("urn:uuid:").unwrap_or(text),
        _ => text,
    };
    let wrapped =
        in_braces(text).map(|inner| (inner, 1)).or_else(|| text.strip_prefix("urn:uuid:").map(|inner| (inner, 9)));
    let (inner, prefix) = wrapped.unwrap_or((text, 0));
    if let Some((index, c)) = inner.char_indices().find(|(_, c)| *c != '-' && !c.is_ascii_hexdigit()) {
        let at = prefix + index + 1;
        return Err(format!(
            "invalid character: expected an optional prefix of `urn:uuid:` followed by [0-9a-fA-F-], found `{c}` at {at}"
        ));
    }
    let groups: Vec<&str> = inner.split('-').collect();
    if groups.len() == 1 && wrapped.is_none() {
        return match text.len() {
            32 => uuid_from_hex(text),
            found => Err(format!("invalid length: expected length 32 for simple format, found {found}")),
        };
    }
    if groups.len() != GROUPS.len() {
        return Err(format!("invalid group count: expected {}, found {}", GROUPS.len(), groups.len()));
    }
    let mut lengths: Vec<usize> = groups.iter().map(|group| group.len()).collect();
    lengths[4] += text.len() - inner.len();
    if let Some(group) = (0..5).find(|group| lengths[*group] != GROUPS[*group]).or(wrapped.map(|_| 4)) {
        let (expected, found) = (GROUPS[group], lengths[group]);
        return Err(format!("invalid group length in group {group}: expected {expected}, found {found}"));
    }
    uuid_from_hex(&groups.concat())
}

fn in_braces(text: &str) -> Option<&str> {
    text.strip_prefix('{')?.strip_suffix('}')
}

/// Converts 32 hex digits, which the caller has checked.
fn uuid_from_hex(digits: &str) -> Result<Uuid, String> {
    u128::from_str_radix(digits, 16).map(Uuid::from_u128).map_err(|error| error.to_string())
}

/// Reads the UUID in a path, e.g. `conversation_id`.
///
/// # Errors
/// `uuid_parsing` at `["path", name]`.
pub fn path_uuid(name: &'static str, text: &str) -> Checked<Uuid> {
    let mut check = Checker::new("path");
    let uuid = check.within(name, |check| uuid_from_text(check, text));
    check.finish(uuid)
}

/// Reads a value of an enum. Violation: `enum`.
pub fn choice<T: Choice>(check: &mut Checker, value: &Value) -> Option<T> {
    one_of("enum", check, value)
}

/// Reads a value of an enum that the reference declares as a literal. Violation: `literal_error`.
pub fn literal<T: Choice>(check: &mut Checker, value: &Value) -> Option<T> {
    one_of("literal_error", check, value)
}

fn one_of<T: Choice>(kind: &'static str, check: &mut Checker, value: &Value) -> Option<T> {
    let known = value.as_str().and_then(T::from_wire);
    if known.is_none() {
        report_not_one_of(kind, T::ALL.iter().map(|choice| choice.as_str()), check, value.clone());
    }
    known
}

/// Reads a field that has only one valid value. Violation: `literal_error`.
pub fn constant(check: &mut Checker, value: &Value, expected: &'static str) -> Option<()> {
    if value == expected {
        return Some(());
    }
    report_not_one_of("literal_error", [expected], check, value.clone());
    None
}

/// One way to read a value: the name of the shape, and its reader.
pub type Shape<'a, T> = (&'static str, &'a dyn Fn(&mut Checker) -> Option<T>);

/// Reads a value with the first of several shapes that fits. If none fits, the violations of all shapes stay reported, each below the
/// name of its shape.
pub fn first_of<T, const N: usize>(check: &mut Checker, shapes: [Shape<'_, T>; N]) -> Option<T> {
    let before = check.violations.len();
    for (name, read) in shapes {
        let value = check.within(name, read);
        if value.is_some() {
            check.violations.truncate(before);
            return value;
        }
    }
    None
}

/// Reports that a value is not one of the expected ones. `kind` is `enum` or `literal_error`.
pub fn report_not_one_of(
    kind: &'static str,
    expected: impl IntoIterator<Item = &'static str>,
    check: &mut Checker,
    input: Value,
) {
    let expected = quoted_list(expected);
    check.report(kind, format!("Input should be {expected}"), input, Some(json!({"expected": expected})));
}

/// `'a', 'b' or 'c'`
fn quoted_list(items: impl IntoIterator<Item = &'static str>) -> String {
    let quoted: Vec<String> = items.into_iter().map(|item| format!("'{item}'")).collect();
    match quoted.split_last() {
        None => String::new(),
        Some((only, [])) => only.clone(),
        Some((last, rest)) => format!("{} or {last}", rest.join(", ")),
    }
}

/// Reads a list and each of its items. Violation: `list_type`, besides those of the items.
pub fn list<T>(check: &mut Checker, value: &Value, read: impl Fn(&mut Checker, &Value) -> Option<T>) -> Option<Vec<T>> {
    let Value::Array(items) = value else {
        check.report("list_type", "Input should be a valid list", value.clone(), None);
        return None;
    };
    // Every item is read, also after an invalid one.
    let read: Vec<Option<T>> =
        items.iter().enumerate().map(|(index, item)| check.within(index, |check| read(check, item))).collect();
    read.into_iter().collect()
}

/// Reads an object with any content. Violation: `dict_type`.
pub fn dictionary(check: &mut Checker, value: &Value) -> Option<Map<String, Value>> {
    let Value::Object(entries) = value else {
        check.report("dict_type", "Input should be a valid dictionary", value.clone(), None);
        return None;
    };
    Some(entries.clone())
}

/// The fields of an object with a declared shape. Fields that the reader does not read are ignored.
#[derive(Debug)]
pub struct Fields<'v> {
    whole: &'v Value,
    entries: &'v Map<String, Value>,
}

impl<'v> Fields<'v> {
    /// Violation: `model_attributes_type` for anything but an object.
    pub fn of(check: &mut Checker, value: &'v Value) -> Option<Self> {
        let Value::Object(entries) = value else {
            let msg = "Input should be a valid dictionary or object to extract fields from";
            check.report("model_attributes_type", msg, value.clone(), None);
            return None;
        };
        Some(Self { whole: value, entries })
    }

    /// Reads a required field. Violation: `missing`, besides those of `read`.
    pub fn required<T>(
        &self,
        check: &mut Checker,
        name: &'static str,
        read: impl FnOnce(&mut Checker, &Value) -> Option<T>,
    ) -> Option<T> {
        check.within(name, |check| match self.entries.get(name) {
            Some(value) => read(check, value),
            None => {
                check.report_missing(self.whole.clone());
                None
            }
        })
    }

    /// Reads a field that may be null or absent; both are `Some(None)`. The outer `Option` says whether the value was valid.
    pub fn nullable<T>(
        &self,
        check: &mut Checker,
        name: &'static str,
        read: impl FnOnce(&mut Checker, &Value) -> Option<T>,
    ) -> Option<Option<T>> {
        match self.entries.get(name) {
            None | Some(Value::Null) => Some(None),
            Some(value) => check.within(name, |check| read(check, value)).map(Some),
        }
    }

    /// Reads a field that has a default when it is absent. Null does not select the default: `read` receives it.
    pub fn or<T>(
        &self,
        check: &mut Checker,
        name: &'static str,
        default: T,
        read: impl FnOnce(&mut Checker, &Value) -> Option<T>,
    ) -> Option<T> {
        match self.entries.get(name) {
            None => Some(default),
            Some(value) => check.within(name, |check| read(check, value)),
        }
    }

    /// Whether the field was sent, even as null.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// Reports `extra_forbidden` for every field not among `known`, in the order sent. Returns whether there was none.
    pub fn forbid_others(&self, check: &mut Checker, known: &[&str]) -> bool {
        let mut clean = true;
        for (name, value) in self.entries.iter().filter(|(name, _)| !known.contains(&name.as_str())) {
            check.within(name.clone(), |check| {
                check.report("extra_forbidden", "Extra inputs are not permitted", value.clone(), None);
            });
            clean = false;
        }
        clean
    }
}
