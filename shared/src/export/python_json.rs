//! Formats JSON as Python does (`json.dump(json.loads(text), file, indent=2)`), without building the value in memory.
//!
//! - The indent is two spaces, the separators are `": "` and `",\n"`; an empty list is `[]`, an empty object `{}`; there is no final
//!   newline.
//! - Strings are ASCII. Escapes are `\"`, `\\`, `\n`, `\r`, `\t`, `\b`, `\f`; every other character outside the range from space to `~`,
//!   including DEL, is `\uXXXX` in lower case, and a character outside the Basic Multilingual Plane is a surrogate pair. A lone surrogate
//!   is kept.
//! - Integers of any size keep their digits (`-0` is `0`). All other numbers are the shortest text of their double (`1e2` is `100.0`,
//!   `1e16` is `1e+16`). A number beyond the range of doubles is `Infinity`, which no JSON parser except Python's accepts.
//! - Keys keep their order. Of duplicate keys, Python keeps the last; this module keeps all, as they were sent.

use std::io::{self, Write};

/// Writes `json` in Python's format.
///
/// # Errors
/// The errors of `out`; [`io::ErrorKind::InvalidData`] for invalid JSON. A part of the output may be written then.
pub fn write(json: &str, out: &mut dyn Write) -> io::Result<()> {
    Transcoder { json: json.as_bytes(), text: json, at: 0, open: Vec::new(), out }.run()
}

struct Transcoder<'a> {
    json: &'a [u8],
    text: &'a str,
    at: usize,
    /// The closing brackets of the open lists and objects, outermost first.
    open: Vec<u8>,
    out: &'a mut dyn Write,
}

impl Transcoder<'_> {
    fn run(mut self) -> io::Result<()> {
        loop {
            self.skip_space();
            match self.peek() {
                Some(opening @ (b'{' | b'[')) => {
                    let closing = if opening == b'{' { b'}' } else { b']' };
                    self.at += 1;
                    self.skip_space();
                    self.out.write_all(&[opening])?;
                    if self.peek() != Some(closing) {
                        self.open.push(closing);
                        self.begin_item()?;
                        continue;
                    }
                    self.at += 1;
                    self.out.write_all(&[closing])?;
                }
                Some(b'"') => self.string()?,
                Some(b'-' | b'0'..=b'9') => self.number()?,
                _ => self.word()?,
            }
            if self.end_value()? {
                return Ok(());
            }
        }
    }

    /// Continues after a value with the next one. Returns true at the end of the text.
    fn end_value(&mut self) -> io::Result<bool> {
        loop {
            self.skip_space();
            let Some(&closing) = self.open.last() else {
                return if self.peek().is_none() { Ok(true) } else { Err(self.fault()) };
            };
            match self.peek() {
                Some(b',') => {
                    self.at += 1;
                    self.out.write_all(b",")?;
                    self.begin_item()?;
                    return Ok(false);
                }
                Some(byte) if byte == closing => {
                    self.at += 1;
                    self.open.pop();
                    self.new_line()?;
                    self.out.write_all(&[closing])?;
                }
                _ => return Err(self.fault()),
            }
        }
    }

    /// Starts a line and, in an object, writes the key.
    fn begin_item(&mut self) -> io::Result<()> {
        self.new_line()?;
        if self.open.last() == Some(&b'}') {
            self.skip_space();
            if self.peek() != Some(b'"') {
                return Err(self.fault());
            }
            self.string()?;
            self.skip_space();
            if self.peek() != Some(b':') {
                return Err(self.fault());
            }
            self.at += 1;
            self.out.write_all(b": ")?;
        }
        Ok(())
    }

    fn new_line(&mut self) -> io::Result<()> {
        const SPACES: &[u8] = &[b' '; 64];
        self.out.write_all(b"\n")?;
        let mut left = self.open.len() * 2;
        while left > 0 {
            let now = left.min(SPACES.len());
            self.out.write_all(&SPACES[..now])?;
            left -= now;
        }
        Ok(())
    }

    /// Writes the string that starts at the current quotation mark.
    fn string(&mut self) -> io::Result<()> {
        self.out.write_all(b"\"")?;
        self.at += 1;
        loop {
            let plain = self.json[self.at..].iter().take_while(|byte| is_plain(**byte)).count();
            self.out.write_all(&self.json[self.at..self.at + plain])?;
            self.at += plain;
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return self.out.write_all(b"\"");
                }
                Some(b'\\') => self.escape()?,
                Some(0x7f) => {
                    self.at += 1;
                    self.unit(0x7f)?;
                }
                Some(0x80..) => {
                    let character = self.text.get(self.at..).and_then(|rest| rest.chars().next());
                    let character = character.ok_or_else(|| self.fault())?;
                    self.at += character.len_utf8();
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        self.unit(*unit)?;
                    }
                }
                _ => return Err(self.fault()),
            }
        }
    }

    /// Writes the escape that starts at the current backslash.
    fn escape(&mut self) -> io::Result<()> {
        let unit = match self.json.get(self.at + 1) {
            Some(byte @ (b'"' | b'\\' | b'/')) => u16::from(*byte),
            Some(b'b') => 8,
            Some(b'f') => 12,
            Some(b'n') => 10,
            Some(b'r') => 13,
            Some(b't') => 9,
            Some(b'u') => {
                let digits = self.text.get(self.at + 2..self.at + 6);
                let digits = digits.filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
                let unit = digits.and_then(|digits| u16::from_str_radix(digits, 16).ok());
                self.at += 4;
                unit.ok_or_else(|| self.fault())?
            }
            _ => return Err(self.fault()),
        };
        self.at += 2;
        self.unit(unit)
    }

    /// Writes one UTF-16 code unit of a string.
    fn unit(&mut self, unit: u16) -> io::Result<()> {
        let short = match unit {
            0x22 => br#"\""#,
            0x5c => br"\\",
            8 => br"\b",
            9 => br"\t",
            10 => br"\n",
            12 => br"\f",
            13 => br"\r",
            _ => {
                return match u8::try_from(unit) {
                    Ok(byte) if is_plain(byte) => self.out.write_all(&[byte]),
                    _ => write!(self.out, "\\u{unit:04x}"),
                };
            }
        };
        self.out.write_all(short)
    }

    fn number(&mut self) -> io::Result<()> {
        let start = self.at;
        self.skip_if(b"-");
        let whole = self.digits();
        if whole == 0 || (whole > 1 && self.json[self.at - whole] == b'0') {
            return Err(self.fault());
        }
        let mut is_float = false;
        if self.skip_if(b".") {
            is_float = true;
            if self.digits() == 0 {
                return Err(self.fault());
            }
        }
        if self.skip_if(b"eE") {
            is_float = true;
            self.skip_if(b"+-");
            if self.digits() == 0 {
                return Err(self.fault());
            }
        }
        let text = &self.text[start..self.at];
        if is_float {
            let number: f64 = text.parse().map_err(|_| self.fault())?;
            return self.out.write_all(float(number).as_bytes());
        }
        self.out.write_all(if text == "-0" { b"0" } else { text.as_bytes() })
    }

    fn word(&mut self) -> io::Result<()> {
        for word in [&b"true"[..], b"false", b"null"] {
            if self.json[self.at..].starts_with(word) {
                self.at += word.len();
                return self.out.write_all(word);
            }
        }
        Err(self.fault())
    }

    fn digits(&mut self) -> usize {
        let count = self.json[self.at..].iter().take_while(|byte| byte.is_ascii_digit()).count();
        self.at += count;
        count
    }

    fn skip_if(&mut self, bytes: &[u8]) -> bool {
        let found = self.peek().is_some_and(|byte| bytes.contains(&byte));
        self.at += usize::from(found);
        found
    }

    fn skip_space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn peek(&self) -> Option<u8> {
        self.json.get(self.at).copied()
    }

    fn fault(&self) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, format!("not JSON at byte {}", self.at))
    }
}

/// Whether Python writes the character unescaped.
fn is_plain(byte: u8) -> bool {
    matches!(byte, b' '..=b'~') && byte != b'"' && byte != b'\\'
}

/// Formats a float as Python's `repr`: the shortest digits that parse to the same float, with an exponent below -4 and from 16 on.
fn float(number: f64) -> String {
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    // Of two shortest texts with the same distance, Python and serde_json choose the even one; Rust's own formatting does not.
    let shortest = serde_json::to_string(&number).unwrap_or_default();
    let (sign, shortest) = match shortest.strip_prefix('-') {
        Some(rest) => ("-", rest),
        None => ("", shortest.as_str()),
    };
    let (mantissa, exponent) = shortest.split_once('e').unwrap_or((shortest, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let all_digits = format!("{whole}{fraction}");
    let digits = all_digits.trim_start_matches('0');
    let leading_zeros = all_digits.len() - digits.len();
    let digits = digits.trim_end_matches('0');
    if digits.is_empty() {
        return format!("{sign}0.0");
    }
    // The position of the decimal point: after this number of digits or, if negative, before this number of zeros.
    let place = |length: usize| i32::try_from(length).unwrap_or(i32::MAX);
    let point = exponent.parse::<i32>().unwrap_or_default() + place(whole.len()) - place(leading_zeros);
    let zeros = |count: i32| "0".repeat(usize::try_from(count).unwrap_or_default());
    let count = place(digits.len());
    match point {
        -3..=0 => format!("{sign}0.{}{digits}", zeros(-point)),
        1..=16 if count <= point => format!("{sign}{digits}{}.0", zeros(point - count)),
        1..=16 => {
            let (whole, fraction) = digits.split_at(usize::try_from(point).unwrap_or_default());
            format!("{sign}{whole}.{fraction}")
        }
        _ => {
            let (first, rest) = digits.split_at(1);
            let dot = if rest.is_empty() { "" } else { "." };
            let exponent = point - 1;
            let exponent_sign = if exponent < 0 { '-' } else { '+' };
            format!("{sign}{first}{dot}{rest}e{exponent_sign}{:02}", exponent.unsigned_abs())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn python(json: &str) -> io::Result<String> {
        let mut out = Vec::new();
        write(json, &mut out)?;
        Ok(String::from_utf8(out).expect("ASCII"))
    }

    #[test]
    fn lists_and_objects_are_laid_out_as_python_does() {
        for (given, written) in [
            ("[]", "[]"),
            (" { } ", "{}"),
            ("[[ ],{}]", "[\n  [],\n  {}\n]"),
            (
                r#"{"b":[1,{"c":null}],"a":{"d":true,"e":false}}"#,
                "{\n  \"b\": [\n    1,\n    {\n      \"c\": null\n    }\n  ],\n  \"a\": {\n    \"d\": true,\n    \"e\": false\n  }\n}",
            ),
        ] {
            assert_eq!(python(given).expect("JSON"), written);
        }
        let deep = "[".repeat(5_000) + &"]".repeat(5_000);
        assert!(write(&deep, &mut io::sink()).is_ok(), "no recursion");
    }

    #[test]
    fn strings_are_escaped_as_python_does() {
        for (given, written) in [
            (r#""\u00e9é""#, r#""\u00e9\u00e9""#),
            (r#""😀\uD83D\uDE00""#, r#""\ud83d\ude00\ud83d\ude00""#),
            (r#""\ud800x""#, r#""\ud800x""#),
            (r#""\u001f\n\t\b\f\r\u0000""#, r#""\u001f\n\t\b\f\r\u0000""#),
            ("\"\u{7f}\\u007f\u{80}\"", r#""\u007f\u007f\u0080""#),
            (r#""\/\u002f\u0022\u005c\"\\a\u0041""#, r#""//\"\\\"\\aA""#),
        ] {
            assert_eq!(python(given).expect("JSON"), written);
        }
    }

    #[test]
    fn numbers_are_those_of_python() {
        for (given, written) in [
            ("1e2", "100.0"),
            ("1.10", "1.1"),
            ("-0", "0"),
            ("-0.0", "-0.0"),
            ("0e5", "0.0"),
            ("123456789012345678901234567890", "123456789012345678901234567890"),
            ("1e15", "1000000000000000.0"),
            ("1e16", "1e+16"),
            ("1.5E+22", "1.5e+22"),
            ("0.0001", "0.0001"),
            ("1e-5", "1e-05"),
            ("1.7976931348623157e308", "1.7976931348623157e+308"),
            ("5e-324", "5e-324"),
            ("9007199254740993.0", "9007199254740992.0"),
            ("2101334557016188.223", "2101334557016188.2"),
            ("1e999", "Infinity"),
            ("-1e999", "-Infinity"),
        ] {
            assert_eq!(python(given).expect("JSON"), written);
        }
    }

    #[test]
    fn what_is_not_json_is_refused() {
        for given in [
            "",
            "[1,]",
            "{\"a\"}",
            "{,}",
            "01",
            "1.",
            "-",
            "\"",
            "\"\n\"",
            r#""\x""#,
            r#""\u12""#,
            "nul",
            "1 2",
            "[1}",
            "NaN",
        ] {
            assert!(python(given).is_err(), "{given}");
        }
    }
}
