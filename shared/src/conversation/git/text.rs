//! Decodes the text of a file: UTF-8, UTF-16 or Latin-1.

/// The number of leading bytes in which git searches for a NUL, which makes a file binary.
const LOOKED_AT: usize = 8000;

/// Decodes UTF-8, UTF-16 with a byte order mark, or else Latin-1, without any normalisation; `None` for a binary file.
pub(super) fn decoded(bytes: &[u8]) -> Option<String> {
    if let Some(rest) = bytes.strip_prefix(&[0xff, 0xfe]) {
        return utf_16(rest, u16::from_le_bytes);
    }
    if let Some(rest) = bytes.strip_prefix(&[0xfe, 0xff]) {
        return utf_16(rest, u16::from_be_bytes);
    }
    if bytes.iter().take(LOOKED_AT).any(|byte| *byte == 0) {
        return None;
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => Some(text.to_owned()),
        // A short binary file may contain no NUL. Texts contain no control characters except white space, backspace and escape.
        Err(_) if bytes.iter().any(|byte| matches!(byte, 0..=7 | 0x0e..=0x1a | 0x1c..=0x1f | 0x7f)) => None,
        Err(_) => Some(bytes.iter().copied().map(char::from).collect()),
    }
}

fn utf_16(bytes: &[u8], unit: fn([u8; 2]) -> u16) -> Option<String> {
    let (pairs, rest) = bytes.as_chunks::<2>();
    let text = String::from_utf16(&pairs.iter().map(|pair| unit(*pair)).collect::<Vec<_>>()).ok()?;
    (rest.is_empty() && !text.contains('\0')).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_as_they_are_and_binary_files_are_not() {
        let utf_16 = |text: &str, order: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(order).collect::<Vec<u8>>();
        for (bytes, expected) in [
            (b"".to_vec(), Some("")),
            (b"\n\n no last line".to_vec(), Some("\n\n no last line")),
            (b"a\r\nb\rc\n\x0c\x1b[0m".to_vec(), Some("a\r\nb\rc\n\x0c\x1b[0m")),
            ("\u{feff}BOM 文\u{2028}\n".into(), Some("\u{feff}BOM 文\u{2028}\n")),
            (b"caf\xe9\x80\n".to_vec(), Some("café\u{80}\n")),
            (utf_16("\u{feff}a文😀\n", u16::to_le_bytes), Some("a文😀\n")),
            (utf_16("\u{feff}a文😀\n", u16::to_be_bytes), Some("a文😀\n")),
            (b"\xff\xfe".to_vec(), Some("")),
            (b"\xff\xfea".to_vec(), None),
            (b"\xff\xfe\0\0a\0\0\0".to_vec(), None),
            (b"\xff\xfe\0\xd8a\0".to_vec(), None),
            (b"text\0".to_vec(), None),
            (b"\x89PNG\r\n\x1a\n".to_vec(), None),
            (b"\x01 is not of Latin-1 \xe9".to_vec(), None),
            (b"\x01 of UTF-8".to_vec(), Some("\x01 of UTF-8")),
            (utf_16("no mark", u16::to_le_bytes), None),
        ] {
            assert_eq!(decoded(&bytes).as_deref(), expected, "{bytes:?}");
        }
        let late = [b"x".repeat(LOOKED_AT), b"\0".to_vec()].concat();
        assert_eq!(decoded(&late).map(|text| text.len()), Some(LOOKED_AT + 1));
    }
}
