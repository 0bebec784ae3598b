//! Lists: pages of items, and the size of responses.
//!
//! Lambda returns at most 6 MB (6,291,456 bytes) from an invocation. API Gateway receives a text body as a JSON string, in
//! which quotes, backslashes and control characters are escaped, so the escaped size counts. All sizes in this module are
//! escaped sizes.

use std::io;
use std::marker::PhantomData;

use serde::Serialize;
use serde_json::value::RawValue;

use crate::error::{Error, Result};

/// The largest list, in bytes. The rest of Lambda's 6 MB is for headers, page ids and what is added to rows after they were
/// measured.
pub const PAGE_SIZE: u64 = 5_000_000;

/// The largest body that Lambda returns, in bytes, less 64 KiB for the JSON around it.
pub const MAX_BODY: u64 = 6 * 1024 * 1024 - 64 * 1024;

/// A page of a list.
#[derive(Debug, Serialize)]
#[serde(bound = "")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PageOut<T> {
    #[cfg_attr(feature = "openapi", schema(value_type = Vec<T>))]
    items: Vec<Box<RawValue>>,
    /// The `page_id` of the next page; null on the last one.
    next_page_id: Option<String>,
    #[serde(skip)]
    kind: PhantomData<T>,
}

impl<T> PageOut<T> {
    /// A page of items that are JSON already.
    #[must_use]
    pub fn new(items: Vec<Box<RawValue>>, next_page_id: Option<String>) -> Self {
        Self { items, next_page_id, kind: PhantomData }
    }
}

/// The items of a page, serialised as JSON, and their total size.
#[derive(Debug)]
pub struct Items<T> {
    json: Vec<Box<RawValue>>,
    size: u64,
    kind: PhantomData<T>,
}

impl<T> Default for Items<T> {
    fn default() -> Self {
        Self { json: Vec::new(), size: 0, kind: PhantomData }
    }
}

impl<T: Serialize> Items<T> {
    /// Adds an item, unless the page is not empty and would exceed [`PAGE_SIZE`] with it. Returns whether it was added. The
    /// first item is always added, so that every page makes progress.
    ///
    /// # Errors
    /// [`Error::Internal`] when the item cannot be serialised.
    pub fn push(&mut self, item: &T) -> Result<bool> {
        let item = serde_json::value::to_raw_value(item).map_err(Error::internal)?;
        let size = size_of_text(item.get().as_bytes()) + 1;
        if !self.json.is_empty() && self.size + size > PAGE_SIZE {
            return Ok(false);
        }
        self.size += size;
        self.json.push(item);
        Ok(true)
    }

    /// The number of items.
    #[must_use]
    pub fn len(&self) -> usize {
        self.json.len()
    }

    /// Whether there are no items.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.json.is_empty()
    }

    /// The remaining bytes up to [`PAGE_SIZE`].
    #[must_use]
    pub fn left(&self) -> u64 {
        PAGE_SIZE.saturating_sub(self.size)
    }

    /// Makes a page of the items.
    #[must_use]
    pub fn into_page(self, next_page_id: Option<String>) -> PageOut<T> {
        PageOut::new(self.json, next_page_id)
    }
}

/// Serialises the first items, as many as fit into one page.
///
/// # Errors
/// [`Error::Internal`] when an item cannot be serialised.
pub fn fitting<T: Serialize>(items: &[T]) -> Result<Items<T>> {
    let mut page = Items::default();
    for item in items {
        if !page.push(item)? {
            break;
        }
    }
    Ok(page)
}

/// Checks that a batch fits into one response. A single element is always accepted, because the caller cannot request less.
///
/// # Errors
/// [`Error::TooLarge`], with a message that names what was requested (`plural`); [`Error::Internal`] when an element cannot be
/// serialised.
pub fn check_batch<T: Serialize>(batch: &[Option<T>], plural: &str) -> Result<()> {
    let found = batch.iter().flatten().count();
    if found > 1 && size_of(&batch)? > PAGE_SIZE {
        return Err(too_large(plural));
    }
    Ok(())
}

/// The error for a batch that does not fit into one response.
#[must_use]
pub fn too_large(plural: &str) -> Error {
    Error::TooLarge(format!("These {plural} are too large for one response; request fewer at once"))
}

/// The size of a value as JSON.
///
/// # Errors
/// [`Error::Internal`] when the value cannot be serialised.
pub fn size_of(value: &impl Serialize) -> Result<u64> {
    struct Size(u64);
    impl io::Write for Size {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += size_of_text(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut size = Size(0);
    serde_json::to_writer(&mut size, value).map_err(Error::internal)?;
    Ok(size.0)
}

/// The size of a text inside a JSON string.
#[must_use]
pub fn size_of_text(text: &[u8]) -> u64 {
    let size = |byte: &u8| match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 0x08 | 0x0c => 2,
        0..0x20 => 6,
        _ => 1,
    };
    text.iter().map(size).sum()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn sizes_are_those_of_the_text_in_a_json_string() {
        for value in [json!({"a": "\u{1}\n\"\\é😀\u{7f}\u{8}\u{c}\r\t/"}), json!([1, null, {"b": [true]}]), json!("")]
        {
            let text = value.to_string();
            let in_a_string = serde_json::to_string(&text).expect("JSON").len() as u64 - 2;
            assert_eq!(size_of(&value).expect("a size"), in_a_string, "{text}");
            assert_eq!(size_of_text(text.as_bytes()), in_a_string, "{text}");
        }
        let controls: String = (0_u8..0x20).map(char::from).collect();
        assert_eq!(
            size_of_text(controls.as_bytes()),
            serde_json::to_string(&controls).expect("JSON").len() as u64 - 2,
            "each control character"
        );
    }

    #[test]
    fn a_page_ends_before_its_bound_and_is_never_empty() {
        let third = "x".repeat(2_000_000);
        let items = fitting(&[&third, &third, &third]).expect("JSON");
        assert_eq!((items.len(), items.left()), (2, PAGE_SIZE - 2 * 2_000_005));
        let page = serde_json::to_value(items.into_page(Some("next".to_owned()))).expect("JSON");
        assert_eq!((page["items"].as_array().map(Vec::len), &page["next_page_id"]), (Some(2), &json!("next")));
        let huge = "x".repeat(7_000_000);
        let items = fitting(&[&huge, &huge]).expect("JSON");
        assert_eq!((items.len(), items.left()), (1, 0));
        assert!(fitting::<Value>(&[]).expect("JSON").is_empty());
    }

    #[test]
    fn a_batch_of_one_always_fits() {
        let huge = Some("x".repeat(7_000_000));
        assert!(check_batch(&[None, huge.clone()], "rows").is_ok());
        assert!(matches!(check_batch(&[huge.clone(), huge], "rows"), Err(Error::TooLarge(_))));
    }
}
