//! Query parameters, decoded and converted as the reference does.

use jiff::Timestamp;
use jiff::civil::{Date, DateTime};
use jiff::tz::Offset;
use serde_json::{Value, json};
use uuid::Uuid;

use super::validation::{
    Checked, Checker, Choice, IntegerText, boolean_from_text, choice, parse_integer, report_int_parsing,
    report_int_size, uuid_from_text,
};

/// Unix times beyond this, either way, are milliseconds, others seconds.
const MILLISECONDS_FROM: i64 = 20_000_000_000;
/// The number of characters that a violation shows of a text that is too long.
const SHOWN_OF_TOO_LONG: usize = 100;

/// A decoded query string, and the violations of the parameters read so far.
///
/// A handler reads its parameters in the order in which the contract declares them, then calls [`Query::finish`]. Until that has
/// returned `Ok`, the values that the getters have returned may be placeholders. The last value of a repeated key counts, except for
/// lists. Parameters that the handler does not read are ignored.
#[derive(Debug)]
pub struct Query {
    pairs: Vec<(String, String)>,
    check: Checker,
}

/// Limits of an integer parameter. The first limit that is broken, in the order of the fields, is reported.
#[derive(Clone, Copy, Debug, Default)]
pub struct Bounds {
    /// At most. Violation: `less_than_equal`.
    pub le: Option<i64>,
    /// At least. Violation: `greater_than_equal`.
    pub ge: Option<i64>,
    /// More than. Violation: `greater_than`.
    pub gt: Option<i64>,
}

impl Bounds {
    /// The bounds of `limit`: 1 to 100.
    pub const PAGE: Self = Self { le: Some(100), ge: None, gt: Some(0) };
}

impl Query {
    /// Decodes a raw query string: pairs split at `&`, `+` is a space, percent escapes are UTF-8, with U+FFFD for invalid bytes,
    /// malformed escapes stay unchanged, and a key without `=` has the empty value.
    #[must_use]
    pub fn parse(raw: Option<&str>) -> Self {
        let raw = raw.unwrap_or_default();
        Self { pairs: form_urlencoded::parse(raw.as_bytes()).into_owned().collect(), check: Checker::new("query") }
    }

    /// # Errors
    /// All violations of the parameters read, in the order of reading.
    pub fn finish(self) -> Checked<()> {
        let clean = self.check.is_clean().then_some(());
        self.check.finish(clean)
    }

    /// A text without any checks; it may be empty.
    #[must_use]
    pub fn string(&self, name: &str) -> Option<String> {
        self.last(name).map(str::to_owned)
    }

    /// A text of at most `longest` characters; violation `string_too_long`, which shows the beginning of the text.
    pub fn string_up_to(&mut self, longest: usize, name: &'static str) -> Option<String> {
        self.read(name, |check, text| {
            if text.chars().count() <= longest {
                return Some(text.to_owned());
            }
            let beginning: String = text.chars().take(SHOWN_OF_TOO_LONG).chain(['…']).collect();
            let msg = format!("String should have at most {longest} characters");
            check.report("string_too_long", msg, beginning.into(), Some(json!({"max_length": longest})));
            None
        })
    }

    /// A required text; violation `missing`.
    pub fn required_string(&mut self, name: &'static str) -> String {
        let text = self.string(name);
        if text.is_none() {
            self.report_missing(name);
        }
        text.unwrap_or_default()
    }

    /// A boolean in one of its spellings (`true`, `1`, `yes`, `on`, `t`, `y` and their opposites, any case); violation
    /// `bool_parsing`.
    pub fn boolean(&mut self, name: &'static str, default: bool) -> bool {
        self.read(name, |check, text| {
            let flag = boolean_from_text(text);
            if flag.is_none() {
                let msg = "Input should be a valid boolean, unable to interpret input";
                check.report("bool_parsing", msg, text.into(), None);
            }
            flag
        })
        .unwrap_or(default)
    }

    /// An integer as [`parse_integer`] reads it, within bounds; violations `int_parsing`, `int_parsing_size` and those of
    /// [`Bounds`]. A number outside of 64 bits counts as the nearest 64-bit number.
    pub fn integer(&mut self, name: &'static str, default: i64, bounds: Bounds) -> i64 {
        self.read(name, |check, text| read_integer(check, text, bounds)).unwrap_or(default)
    }

    /// A point in time, see [`read_datetime`]; violations `datetime_from_date_parsing` and `datetime_parsing`.
    pub fn datetime(&mut self, name: &'static str) -> Option<Timestamp> {
        self.read(name, read_datetime)
    }

    /// A UUID; violation `uuid_parsing`.
    pub fn uuid(&mut self, name: &'static str) -> Option<Uuid> {
        self.read(name, uuid_from_text)
    }

    /// A repeated UUID, required at least once; violations `missing` and, with the index in the list, `uuid_parsing`.
    pub fn uuids(&mut self, name: &'static str) -> Vec<Uuid> {
        let texts = self.strings(name);
        self.check.within(name, |check| {
            let read = |(index, text): (usize, &String)| check.within(index, |check| uuid_from_text(check, text));
            texts.iter().enumerate().filter_map(read).collect()
        })
    }

    /// A repeated text, required at least once; violation `missing`.
    pub fn strings(&mut self, name: &'static str) -> Vec<String> {
        let texts: Vec<String> =
            self.pairs.iter().filter(|(key, _)| key == name).map(|(_, text)| text.clone()).collect();
        if texts.is_empty() {
            self.report_missing(name);
        }
        texts
    }

    /// A repeated parameter that may be absent; `read` reports violations of each value at its index. More than `most` values are
    /// `too_long`.
    pub fn list<T>(
        &mut self,
        name: &'static str,
        most: usize,
        read: impl Fn(&mut Checker, &str) -> Option<T>,
    ) -> Vec<T> {
        let texts: Vec<&str> =
            self.pairs.iter().filter(|(key, _)| key == name).map(|(_, text)| text.as_str()).collect();
        self.check.within(name, |check| {
            if texts.len() > most {
                check.report_too_long("List", most, texts.len(), Value::Null);
                return Vec::new();
            }
            let read = |(index, text): (usize, &&str)| check.within(index, |check| read(check, text));
            texts.iter().enumerate().filter_map(read).collect()
        })
    }

    /// A value of an enum; violation `enum`.
    pub fn choice<T: Choice>(&mut self, name: &'static str) -> Option<T> {
        self.read(name, |check, text| choice(check, &text.into()))
    }

    fn last(&self, name: &str) -> Option<&str> {
        self.pairs.iter().rev().find(|(key, _)| key == name).map(|(_, text)| text.as_str())
    }

    fn read<T>(&mut self, name: &'static str, read: impl FnOnce(&mut Checker, &str) -> Option<T>) -> Option<T> {
        let text = self.string(name)?;
        self.check.within(name, |check| read(check, &text))
    }

    fn report_missing(&mut self, name: &'static str) {
        self.check.within(name, |check| check.report_missing(Value::Null));
    }
}

fn read_integer(check: &mut Checker, text: &str, bounds: Bounds) -> Option<i64> {
    let integer = match parse_integer(text) {
        IntegerText::Value(integer) => integer,
        IntegerText::TooSmall => i64::MIN,
        IntegerText::TooLarge => i64::MAX,
        IntegerText::TooLong => {
            report_int_size(check, text.into());
            return None;
        }
        IntegerText::Invalid => {
            report_int_parsing(check, text.into());
            return None;
        }
    };
    let mut broken = |kind, words: &str, name: &str, limit: i64| {
        check.report(kind, format!("Input should be {words} {limit}"), text.into(), Some(json!({ name: limit })));
        None
    };
    if let Some(le) = bounds.le.filter(|le| integer > *le) {
        return broken("less_than_equal", "less than or equal to", "le", le);
    }
    if let Some(ge) = bounds.ge.filter(|ge| integer < *ge) {
        return broken("greater_than_equal", "greater than or equal to", "ge", ge);
    }
    if let Some(gt) = bounds.gt.filter(|gt| integer <= *gt) {
        return broken("greater_than", "greater than", "gt", gt);
    }
    Some(integer)
}

/// Reads a point in time:
///
/// * `2025-03-02`, the beginning of that day;
/// * a date, one of `T`, `t`, `_` or a space, and `12:34`, `12:34:56` or `12:34:56.789` (or a comma; digits beyond microseconds are
///   ignored), then optionally `Z`, `z`, `+05:30` or `-0530`;
/// * a number: unix time in seconds, or in milliseconds from 2·10¹⁰ on.
///
/// Without an offset the time is UTC. Violations: `datetime_from_date_parsing`, and `datetime_parsing` for the year 0. Their messages
/// are those for a date, because pydantic tries a date last.
///
/// Times at the end of the year 9999 that jiff cannot represent become [`Timestamp::MAX`].
pub fn read_datetime(check: &mut Checker, text: &str) -> Option<Timestamp> {
    let error = match parse_datetime(text) {
        Ok(timestamp) => return Some(timestamp),
        Err(error) => error,
    };
    let (kind, what) = match error {
        YEAR_ZERO => ("datetime_parsing", "a valid datetime"),
        _ => ("datetime_from_date_parsing", "a valid datetime or date"),
    };
    check.report(kind, format!("Input should be {what}, {error}"), text.into(), Some(json!({"error": error})));
    None
}

const YEAR_ZERO: &str = "year 0 is out of range";
const EXTRA_CHARACTERS: &str = "unexpected extra characters at the end of the input";

fn parse_datetime(text: &str) -> Result<Timestamp, &'static str> {
    if let Some(number) = UnixTime::parse(text) {
        match (number.timestamp(), number) {
            (Ok(timestamp), _) => return Ok(timestamp),
            (Err(error), UnixTime::Integer(_)) => return Err(error),
            // pydantic does not accept a float as a date, so the violation is the one for the text.
            (Err(_), UnixTime::Float(_)) => {}
        }
    }
    let (date, rest) = parse_date(text.as_bytes())?;
    let (datetime, offset) = if rest.is_empty() {
        (DateTime::from_parts(date, jiff::civil::Time::midnight()), Offset::UTC)
    } else {
        parse_time(date, rest).ok_or(EXTRA_CHARACTERS)?
    };
    if date.year() == 0 {
        return Err(YEAR_ZERO);
    }
    // Fails only after the last time that jiff can represent.
    Ok(offset.to_timestamp(datetime).unwrap_or(Timestamp::MAX))
}

#[derive(Clone, Copy)]
enum UnixTime {
    Integer(i64),
    Float(f64),
}

impl UnixTime {
    /// A sign, digits and at most one dot: no exponent, no spaces, no infinity.
    fn parse(text: &str) -> Option<Self> {
        let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
        let plain = unsigned.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        if !plain || !unsigned.bytes().any(|b| b.is_ascii_digit()) {
            return None;
        }
        if unsigned.contains('.') {
            return text.parse().ok().map(Self::Float);
        }
        // The magnitude must fit into an i64, which excludes i64::MIN.
        let magnitude: i64 = unsigned.parse().ok()?;
        Some(Self::Integer(if text.starts_with('-') { -magnitude } else { magnitude }))
    }

    fn timestamp(self) -> Result<Timestamp, &'static str> {
        match self {
            Self::Integer(integer) => unix_timestamp(integer, 0),
            Self::Float(float) => {
                #[expect(clippy::cast_precision_loss, reason = "exact: far below 2^53")]
                let milliseconds = float.abs() > MILLISECONDS_FROM as f64;
                let seconds = if milliseconds { float / 1000.0 } else { float };
                let whole = seconds.floor();
                #[expect(clippy::cast_possible_truncation, reason = "saturates, and is then out of range")]
                let (whole, microseconds) = (whole as i64, ((seconds - whole) * 1e6).round() as i64);
                unix_timestamp(whole, microseconds)
            }
        }
    }
}

/// Checks the range, and again for floats whether the number is in milliseconds.
fn unix_timestamp(number: i64, microseconds: i64) -> Result<Timestamp, &'static str> {
    const FIRST_OF_YEAR_0: i64 = -62_167_219_200;
    const FIRST_OF_YEAR_1: i64 = -62_135_596_800;
    const LAST_OF_YEAR_9999: i64 = 253_402_300_799;
    let (seconds, microseconds) = if number.unsigned_abs() > MILLISECONDS_FROM.unsigned_abs() {
        (number.div_euclid(1000), number.rem_euclid(1000) * 1000 + microseconds)
    } else {
        (number, microseconds)
    };
    if seconds < FIRST_OF_YEAR_0 {
        return Err("dates before 0000 are not supported as unix timestamps");
    }
    if seconds < FIRST_OF_YEAR_1 {
        return Err(YEAR_ZERO);
    }
    if seconds > LAST_OF_YEAR_9999 {
        return Err("dates after 9999 are not supported as unix timestamps");
    }
    Ok(Timestamp::from_microsecond(seconds * 1_000_000 + microseconds).unwrap_or(Timestamp::MAX))
}

fn number(digits: &[u8]) -> Option<i16> {
    digits.iter().try_fold(0_i16, |number, b| {
        let digit = b.is_ascii_digit().then(|| i16::from(b - b'0'))?;
        Some(number * 10 + digit)
    })
}

fn small_number(digits: &[u8]) -> Option<i8> {
    number(digits).and_then(|number| i8::try_from(number).ok())
}

/// Reads `2025-03-02`, and returns the rest of the text.
fn parse_date(text: &[u8]) -> Result<(Date, &[u8]), &'static str> {
    const SEPARATOR: &str = "invalid date separator, expected `-`";
    let Some((date, rest)) = text.split_at_checked(10) else {
        return Err("input is too short");
    };
    let year = number(&date[..4]).ok_or("invalid character in year")?;
    if date[4] != b'-' {
        return Err(SEPARATOR);
    }
    let month = small_number(&date[5..7]).ok_or("invalid character in month")?;
    if date[7] != b'-' {
        return Err(SEPARATOR);
    }
    let day = small_number(&date[8..]).ok_or("invalid character in day")?;
    if !(1..=12).contains(&month) {
        return Err("month value is outside expected range of 1-12");
    }
    let date = Date::new(year, month, day).map_err(|_| "day value is outside expected range")?;
    Ok((date, rest))
}

/// Reads the separator, the time and the offset.
fn parse_time(date: Date, rest: &[u8]) -> Option<(DateTime, Offset)> {
    let (b'T' | b't' | b'_' | b' ', rest) = rest.split_first()? else {
        return None;
    };
    let (minutes, mut rest) = rest.split_at_checked(5)?;
    if minutes[2] != b':' {
        return None;
    }
    let (hour, minute) = (small_number(&minutes[..2])?, small_number(&minutes[3..])?);
    let (mut second, mut nanosecond) = (0, 0);
    if let [b':', seconds @ ..] = rest {
        let (digits, after) = seconds.split_at_checked(2)?;
        second = small_number(digits)?;
        rest = after;
        if let [b'.' | b',', fraction @ ..] = rest {
            let length = fraction.iter().take_while(|b| b.is_ascii_digit()).count();
            if length == 0 {
                return None;
            }
            let microseconds = (0..6).fold(0, |micros, place| {
                let digit = fraction[..length].get(place).map_or(0, |b| i32::from(b - b'0'));
                micros * 10 + digit
            });
            nanosecond = microseconds * 1000;
            rest = &fraction[length..];
        }
    }
    let time = jiff::civil::Time::new(hour, minute, second, nanosecond).ok()?;
    Some((DateTime::from_parts(date, time), parse_offset(rest)?))
}

fn parse_offset(text: &[u8]) -> Option<Offset> {
    /// U+2212, which ISO 8601 prefers to the hyphen.
    const MINUS: &[u8] = "−".as_bytes();
    let (sign, digits) = match text {
        [] | [b'Z' | b'z'] => return Some(Offset::UTC),
        [b'+', digits @ ..] => (1, digits),
        [b'-', digits @ ..] => (-1, digits),
        _ => (-1, text.strip_prefix(MINUS)?),
    };
    let (hours, minutes) = match digits {
        [_, _, b':', _, _] => (&digits[..2], &digits[3..]),
        [_, _, _, _] => (&digits[..2], &digits[2..]),
        _ => return None,
    };
    let (hours, minutes) = (i32::from(small_number(hours)?), i32::from(small_number(minutes)?));
    if hours > 23 || minutes > 59 {
        return None;
    }
    Offset::from_seconds(sign * (hours * 3600 + minutes * 60)).ok()
}

/// Reads a UUID as leniently as Python's `UUID()`: every `urn:` and `uuid:`, braces at the ends and all dashes are removed; 32 hex digits
/// of either case must remain.
///
/// Python's integer syntax also accepts spaces, signs, underscores and digits of other scripts among them; this function does not.
#[must_use]
pub fn lenient_uuid(text: &str) -> Option<Uuid> {
    let text = text.replace("urn:", "").replace("uuid:", "");
    let hex = text.trim_matches(['{', '}']).replace('-', "");
    if hex.len() != 32 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u128::from_str_radix(&hex, 16).ok().map(Uuid::from_u128)
}

/// Reads the ids of a batch request for conversations with [`lenient_uuid`].
///
/// # Errors
/// The message of the 400 response: `Invalid UUID format for ids: ['zz', '123']`.
pub fn lenient_uuids(ids: &[String]) -> Result<Vec<Uuid>, String> {
    let read: Vec<Option<Uuid>> = ids.iter().map(|id| lenient_uuid(id)).collect();
    let bad: Vec<&str> = ids.iter().zip(&read).filter(|(_, uuid)| uuid.is_none()).map(|(id, _)| id.as_str()).collect();
    if bad.is_empty() {
        return Ok(read.into_iter().flatten().collect());
    }
    Err(format!("Invalid UUID format for ids: {}", python_list(&bad)))
}

/// Formats a list of texts as Python does: `['a', "it's", 'new\nline']`.
#[must_use]
pub fn python_list(items: &[&str]) -> String {
    let quoted: Vec<String> = items.iter().map(|item| python_string(item)).collect();
    format!("[{}]", quoted.join(", "))
}

fn python_string(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => out.push_str(&escaped(u32::from(c))),
        }
    }
    out.push(quote);
    out
}

fn escaped(code: u32) -> String {
    match code {
        0..=0xff => format!("\\x{code:02x}"),
        0x100..=0xffff => format!("\\u{code:04x}"),
        _ => format!("\\U{code:08x}"),
    }
}

/// Whether Python prints a character unescaped. Python's tables are not available here, so this covers characters that are invisible or
/// break lines (controls, separators, formats, private use, non-characters), and not unassigned ones.
fn is_printable(c: char) -> bool {
    if c.is_control() || (c.is_whitespace() && c != ' ') {
        return false;
    }
    let invisible = matches!(u32::from(c),
        0xad | 0x600..=0x605 | 0x61c | 0x6dd | 0x70f | 0x890..=0x891 | 0x8e2 | 0x180e | 0x200b..=0x200f | 0x202a..=0x202e
        | 0x2060..=0x206f | 0xe000..=0xf8ff | 0xfeff | 0xfff0..=0xfffb | 0x110bd | 0x110cd | 0x1_3430..=0x1_343f
        | 0x1_bca0..=0x1_bca3 | 0x1_d173..=0x1_d17a | 0xe_0000..=0xe_00ff | 0xe_01f0..=0x10_ffff);
    !invisible && u32::from(c) & 0xfffe != 0xfffe
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::http::pydantic::validation::Violation;
    use crate::http::pydantic::validation::path_uuid;
    use crate::http::pydantic::validation::wire_enum;

    wire_enum! {
        pub enum SortOrder {
            CreatedAt = "CREATED_AT",
            CreatedAtDesc = "CREATED_AT_DESC",
            UpdatedAt = "UPDATED_AT",
            UpdatedAtDesc = "UPDATED_AT_DESC",
        }
    }

    fn lines(file: &str) -> impl Iterator<Item = Value> {
        file.lines().map(|line| serde_json::from_str(line).unwrap())
    }

    fn detail(violations: Vec<Violation>) -> Value {
        serde_json::to_value(violations).unwrap()
    }

    fn text<'v>(value: &'v Value, pointer: &str) -> &'v str {
        value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    /// Reads what the route declares, in its order.
    fn read_route(route: &str, raw: &str) -> Checked<()> {
        let mut query = Query::parse(Some(raw));
        match route {
            "search" | "count" => {
                for name in ["created_at__gte", "created_at__lt", "updated_at__gte", "updated_at__lt"] {
                    query.datetime(name);
                }
                if route == "search" {
                    query.integer("limit", 100, Bounds::PAGE);
                    query.boolean("include_sub_conversations", false);
                }
            }
            "start-tasks/search" | "start-tasks/count" => {
                query.uuid("conversation_id__eq");
                query.datetime("created_at__gte");
                if route == "start-tasks/search" {
                    query.choice::<SortOrder>("sort_order");
                    query.integer("limit", 100, Bounds::PAGE);
                }
            }
            "start-tasks" => drop(query.uuids("ids")),
            "" => drop(query.strings("ids")),
            other => {
                let (id, _) = other.split_once('/').unwrap_or((other, ""));
                path_uuid("conversation_id", id)?;
            }
        }
        query.finish()
    }

    #[test]
    fn answers_recorded_requests() {
        let files = [
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/contract/replay-search.jsonl")),
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/contract/replay-count.jsonl")),
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/contract/replay-start-tasks.jsonl")),
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/contract/replay-byid.jsonl")),
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/contract/replay-tz.jsonl")),
            include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/contract/replay-batch.jsonl")),
        ];
        let mut refused = 0;
        for case in files.into_iter().flat_map(lines) {
            let path = text(&case, "/request/path").strip_prefix("/api/v1/app-conversations").unwrap();
            let route = path.trim_start_matches('/');
            if text(&case, "/request/method") != "GET" || route.ends_with("download") {
                continue;
            }
            let raw = text(&case, "/request/query");
            let read = read_route(route, raw);
            let status = case["response"]["status"].as_i64().unwrap();
            let label = format!("{route}?{raw}");
            match (status, read) {
                (422, Err(violations)) => {
                    assert_eq!(detail(violations), case["response"]["body"]["detail"], "{label}");
                    refused += 1;
                }
                (422, Ok(())) => panic!("{label} passed"),
                // 404 and 500 come later than the parameters.
                (_, read) => read.unwrap_or_else(|violations| panic!("{label}: {violations:?}")),
            }
        }
        assert!(refused > 25, "only {refused}");
    }

    /// Recorded with pydantic 2.12.5 under FastAPI 0.128.
    #[test]
    fn coerces_as_recorded() {
        let file = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/contract/coercions.jsonl"));
        let mut wrong = Vec::new();
        for case in lines(file).filter(|case| case.get("query").is_some()) {
            let raw = text(&case, "/query");
            let mut query = Query::parse(Some(raw));
            let read = match text(&case, "/at") {
                "int" => json!(query.integer("limit", 100, Bounds::PAGE)),
                // `lt` is not among our bounds: no parameter of the contract has it.
                "intge" if raw != "limit=9" && raw != "limit=9.0" => {
                    json!(query.integer("limit", 1, Bounds { ge: Some(-5), ..Bounds::default() }))
                }
                "intge" => continue,
                "bool" => json!(query.boolean("b", false)),
                "dt" => json!(query.datetime("d")),
                "uuid" => json!(query.uuid("u")),
                "uuids" => json!(query.uuids("ids")),
                "strs" => json!(query.strings("ids")),
                other => panic!("{other}"),
            };
            let found = match query.finish() {
                Ok(()) => json!({"value": read}),
                Err(violations) => json!({"detail": detail(violations)}),
            };
            let expected = match case.get("value") {
                // Python cannot express these in UTC; a Timestamp can.
                Some(Value::String(text)) if text == "overflow" => continue,
                Some(Value::String(text)) if text.ends_with("+00:00") => {
                    json!({"value": text.parse::<Timestamp>().unwrap_or(Timestamp::MAX)})
                }
                Some(value) => json!({"value": value}),
                None => json!({"detail": case["detail"]}),
            };
            if found != expected {
                wrong.push(format!("{raw}: {found} instead of {expected}"));
            }
        }
        assert!(wrong.is_empty(), "{}:\n{}", wrong.len(), wrong.join("\n"));
    }

    #[test]
    fn reads_ids_as_python_does() {
        let file = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/contract/coercions.jsonl"));
        for case in lines(file).filter(|case| case["at"] == "pyuuid") {
            let id = text(&case, "/text");
            let expected = case["value"].as_str();
            let found = lenient_uuid(id).map(|uuid| uuid.simple().to_string());
            let plain = id.chars().all(|c| c.is_ascii_hexdigit() || "-{}urnid:".contains(c));
            // Not taken over: what Python's integers allow.
            if plain || expected.is_none() {
                assert_eq!(found.as_deref(), expected, "{id:?}");
            } else {
                assert_eq!(found, None, "{id:?}");
            }
        }
    }

    #[test]
    fn lists_bad_ids_as_recorded() {
        let file = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/contract/replay-batch.jsonl"));
        let mut bad = 0;
        for case in lines(file).filter(|case| text(case, "/request/method") == "GET") {
            let mut query = Query::parse(Some(text(&case, "/request/query")));
            let ids = query.strings("ids");
            let expected = text(&case, "/response/body/detail");
            if !expected.starts_with("Invalid UUID") {
                assert!(ids.len() > 99 || lenient_uuids(&ids).is_ok());
                continue;
            }
            assert_eq!(lenient_uuids(&ids).unwrap_err(), expected);
            bad += 1;
        }
        assert!(bad > 6, "only {bad}");
    }

    #[test]
    fn escapes_what_python_does_not_print() {
        let list = python_list(&["\u{0}\u{7f}\u{a0}", "\u{200b}\u{2028}", "\u{e0001}\u{1f642}", "\t\r", ""]);
        assert_eq!(list, r"['\x00\x7f\xa0', '\u200b\u2028', '\U000e0001🙂', '\t\r', '']");
    }

    #[test]
    fn reports_in_the_order_of_reading() {
        let mut query = Query::parse(Some("limit=0&path&kind=abc"));
        assert_eq!(query.required_string("path"), "");
        query.required_string("absent");
        query.string_up_to(2, "kind");
        query.integer("limit", 100, Bounds::PAGE);
        let kinds: Vec<&str> = query.finish().unwrap_err().iter().map(|violation| violation.kind).collect();
        assert_eq!(kinds, ["missing", "string_too_long", "greater_than"]);
    }
}
