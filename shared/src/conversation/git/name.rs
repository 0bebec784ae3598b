//! File names in the quoted forms of git and POSIX shells.

/// A file name for JSON: unchanged, or in double quotes as git quotes it if the name is not UTF-8.
pub(super) fn shown(name: Vec<u8>) -> String {
    String::from_utf8(name).unwrap_or_else(|error| quoted(error.as_bytes()))
}

/// Quotes a name as git does: in double quotes, with C escapes.
fn quoted(name: &[u8]) -> String {
    let mut quoted = String::from('"');
    for byte in name {
        match byte {
            b'"' | b'\\' => quoted.extend(['\\', char::from(*byte)]),
            b'\n' => quoted.push_str("\\n"),
            b'\t' => quoted.push_str("\\t"),
            b'\r' => quoted.push_str("\\r"),
            b' '..=b'~' => quoted.push(char::from(*byte)),
            byte => quoted.push_str(&format!("\\{byte:03o}")),
        }
    }
    quoted.push('"');
    quoted
}

/// Removes git's quoting from the last part of a path, such as `a/"b\tc"`.
pub(super) fn unquoted_end(path: &str) -> Option<Vec<u8>> {
    let starts = path.match_indices('"').map(|(at, _)| at);
    starts.filter(|at| *at == 0 || path[..*at].ends_with('/')).find_map(|at| {
        let end = unquoted(&path.as_bytes()[at..])?;
        Some([&path.as_bytes()[..at], &end].concat())
    })
}

/// Removes git's quoting from a name; `None` if the name is not quoted.
fn unquoted(text: &[u8]) -> Option<Vec<u8>> {
    let mut inner = text.strip_prefix(b"\"")?.strip_suffix(b"\"")?;
    let mut name = Vec::new();
    while let Some((byte, rest)) = inner.split_first() {
        inner = rest;
        match byte {
            b'"' => return None,
            b'\\' => {
                let (escape, rest) = inner.split_first()?;
                inner = rest;
                name.push(match escape {
                    b'a' => 0x07,
                    b'b' => 0x08,
                    b'f' => 0x0c,
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'v' => 0x0b,
                    b'"' | b'\\' => *escape,
                    b'0'..=b'3' => {
                        let (digits, rest) = inner.split_at_checked(2)?;
                        inner = rest;
                        let digit = |digit: u8| matches!(digit, b'0'..=b'7').then(|| digit - b'0');
                        (escape - b'0') * 64 + digit(digits[0])? * 8 + digit(digits[1])?
                    }
                    _ => return None,
                });
            }
            byte => name.push(*byte),
        }
    }
    Some(name)
}

/// A line of POSIX shell that assigns a name of any bytes to a variable.
pub(super) fn assigned(variable: &str, name: &[u8]) -> String {
    match std::str::from_utf8(name) {
        Ok(name) => format!("{variable}={}\n", crate::shell::quoted(name)),
        Err(_) => {
            let escaped = name.iter().fold(String::new(), |escaped, byte| escaped + &format!("\\0{byte:03o}"));
            // Command substitution removes trailing newlines; the dot protects them.
            format!("{variable}=$(printf '%b.' '{escaped}')\n{variable}=${{{variable}%.}}\n")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_not_utf_8_are_quoted_and_every_quoted_one_is_read() {
        for plain in ["a", "文.txt", "\"", "\"a\"", "tab\there", "line\nbreak", " ", "\\", "-x", "é", "e\u{301}"] {
            assert_eq!(shown(plain.into()), plain);
            assert_eq!(unquoted(quoted(plain.as_bytes()).as_bytes()).as_deref(), Some(plain.as_bytes()));
        }
        let all: Vec<u8> = (1..=255).collect();
        assert_eq!(unquoted(shown(all.clone()).as_bytes()), Some(all));
        assert_eq!(shown(b"caf\xe9 \"1\"".to_vec()), r#""caf\351 \"1\"""#);
    }

    #[test]
    fn the_quoted_end_of_a_path_is_found() {
        for (path, expected) in [
            (r#""\346\226\207.txt""#, Some("文.txt".as_bytes())),
            (r#"repo/"a\tb/\"c\".txt""#, Some(b"repo/a\tb/\"c\".txt")),
            (r#"a"b/"c""#, Some(b"a\"b/c")),
            (r#"/"\377\a\b\f\n\r\v\\""#, Some(b"/\xff\x07\x08\x0c\n\r\x0b\\")),
            (r#""文\t""#, Some("文\t".as_bytes())),
            ("plain", None),
            ("\"", None),
            (r#""a"b""#, None),
            (r#"a"b""#, None),
            (r#""\""#, None),
            (r#""\x""#, None),
            (r#""\8""#, None),
            (r#""\18""#, None),
            (r#""\400""#, None),
        ] {
            assert_eq!(unquoted_end(path).as_deref(), expected, "{path}");
        }
    }
}
