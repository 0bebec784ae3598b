//! Splits a line into words as a POSIX shell does, without expansions and comments.

/// Splits a line into words; `None` if it ends within a quote or after a backslash.
pub(super) fn split(line: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    // A quoted word may be empty.
    let mut word: Option<String> = None;
    let mut rest = line.chars();
    while let Some(letter) = rest.next() {
        match letter {
            ' ' | '\t' | '\r' | '\n' => words.extend(word.take()),
            '\\' => word.get_or_insert_default().push(rest.next()?),
            '\'' => {
                let word = word.get_or_insert_default();
                loop {
                    match rest.next()? {
                        '\'' => break,
                        letter => word.push(letter),
                    }
                }
            }
            '"' => {
                let word = word.get_or_insert_default();
                loop {
                    match rest.next()? {
                        '"' => break,
                        '\\' => {
                            let escaped = rest.next()?;
                            if !matches!(escaped, '"' | '\\') {
                                word.push('\\');
                            }
                            word.push(escaped);
                        }
                        letter => word.push(letter),
                    }
                }
            }
            letter => word.get_or_insert_default().push(letter),
        }
    }
    words.extend(word);
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn a_line_is_split_as_a_shell_does() {
        for (line, words) in [
            ("", &[][..]),
            ("  \t\r\n", &[]),
            ("-y mcp-remote https://x", &["-y", "mcp-remote", "https://x"]),
            (r#"--config "a b" --d"#, &["--config", "a b", "--d"]),
            (r"a 'b c' \ d", &["a", "b c", " d"]),
            ("a # b", &["a", "#", "b"]),
            (r#"a"b"'c'd"#, &["abcd"]),
            (r#"'' "" x"#, &["", "", "x"]),
            (r#""a\"b" "c\\d" "e\f" 'g\h'"#, &["a\"b", "c\\d", "e\\f", "g\\h"]),
            (r"\a\'\\", &["a'\\"]),
            (r"$HOME `x` *", &["$HOME", "`x`", "*"]),
        ] {
            assert_eq!(
                split(line).as_deref(),
                Some(&words.iter().map(ToString::to_string).collect::<Vec<_>>()[..]),
                "{line}"
            );
        }
        for line in ["\"open", "'open", "a\\", "\"a\\", "a 'b\" c"] {
            assert_eq!(split(line), None, "{line}");
        }
    }
}
