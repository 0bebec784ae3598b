//! Size limits for untrusted JSON: refuses a list or a text that is too long before it uses memory.
//!
//! A limit on bytes is not enough: an element of `[0,0,…]` has two bytes, and an element of a `Vec` has up to a hundred.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// A list of at most `MAX` elements.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bounded<T, const MAX: usize>(pub Vec<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for Bounded<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        list::<D, T, MAX>(deserializer).map(Self)
    }
}

/// Reads a list of at most `MAX` elements; for `deserialize_with`.
///
/// # Errors
/// When there are more elements, or the value is not a list.
pub fn list<'de, D: Deserializer<'de>, T: Deserialize<'de>, const MAX: usize>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    struct List<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for List<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(out, "a list of at most {MAX} elements")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Self::Value, A::Error> {
            let mut read = Vec::new();
            while let Some(element) = elements.next_element()? {
                if read.len() == MAX {
                    return Err(A::Error::custom(format_args!("more than {MAX} elements")));
                }
                read.push(element);
            }
            Ok(read)
        }
    }

    deserializer.deserialize_seq(List::<T, MAX>(PhantomData))
}

/// Reads the first `MAX` entries of an object, and null as an empty object; for `deserialize_with`.
///
/// # Errors
/// When the value is not an object, or an entry is not of the type `T`.
pub fn map<'de, D: Deserializer<'de>, T: Deserialize<'de>, const MAX: usize>(
    deserializer: D,
) -> Result<BTreeMap<String, T>, D::Error> {
    struct Entries<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Entries<T, MAX> {
        type Value = BTreeMap<String, T>;

        fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
            out.write_str("an object")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(BTreeMap::new())
        }

        fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
            let mut read = BTreeMap::new();
            while read.len() < MAX {
                let Some((key, value)) = entries.next_entry()? else { return Ok(read) };
                read.insert(key, value);
            }
            while entries.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            Ok(read)
        }
    }

    deserializer.deserialize_any(Entries::<T, MAX>(PhantomData))
}

/// Reads a text of at most `MAX` bytes, or null; for `deserialize_with`.
///
/// # Errors
/// When the text is longer, or the value is not a text.
pub fn text<'de, D: Deserializer<'de>, const MAX: usize>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    if text.as_ref().is_some_and(|text| text.len() > MAX) {
        return Err(D::Error::custom(format_args!("a text of more than {MAX} bytes")));
    }
    Ok(text)
}

/// Reads a text of at most `MAX` bytes; null and a longer text are `None`. For `deserialize_with`.
///
/// # Errors
/// When the value is not a text.
pub fn short<'de, D: Deserializer<'de>, const MAX: usize>(deserializer: D) -> Result<Option<String>, D::Error> {
    Ok(Option::<String>::deserialize(deserializer)?.filter(|text| text.len() <= MAX))
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Texts {
        #[serde(default, deserialize_with = "text::<_, 3>")]
        text: Option<String>,
        #[serde(default, deserialize_with = "short::<_, 3>")]
        short: Option<String>,
    }

    #[test]
    fn lists_and_texts_have_a_greatest_length() {
        assert_eq!(serde_json::from_str::<Bounded<u8, 2>>("[1,2]").expect("a list"), Bounded(vec![1, 2]));
        assert!(serde_json::from_str::<Bounded<u8, 2>>("[1,2,3]").is_err());
        assert!(serde_json::from_str::<Bounded<u8, 2>>("{}").is_err());

        let read = |json: &str| serde_json::from_str::<Texts>(json);
        let of = |text: Option<&str>, short: Option<&str>| Texts {
            text: text.map(str::to_owned),
            short: short.map(str::to_owned),
        };
        assert_eq!(read("{}").expect("texts"), of(None, None));
        assert_eq!(read(r#"{"text": "abc", "short": "abc"}"#).expect("texts"), of(Some("abc"), Some("abc")));
        assert_eq!(read(r#"{"text": null, "short": "abcd"}"#).expect("texts"), of(None, None));
        assert!(read(r#"{"text": "abcd"}"#).is_err());
        assert!(read(r#"{"short": 1}"#).is_err());
    }

    #[test]
    fn of_an_object_the_first_entries_are_read() {
        #[derive(Debug, Deserialize, PartialEq)]
        struct Object {
            #[serde(default, deserialize_with = "map::<_, _, 2>")]
            of: BTreeMap<String, u8>,
        }
        let read = |json: &str| serde_json::from_str::<Object>(json);
        let of = |entries: &[(&str, u8)]| Object {
            of: entries.iter().map(|(key, value)| ((*key).to_owned(), *value)).collect(),
        };
        assert_eq!(read("{}").expect("nothing"), of(&[]));
        assert_eq!(read(r#"{"of": null}"#).expect("nothing"), of(&[]));
        assert_eq!(read(r#"{"of": {"b": 1, "a": 2}}"#).expect("all"), of(&[("a", 2), ("b", 1)]));
        assert_eq!(read(r#"{"of": {"b": 1, "c": 2, "a": [3]}}"#).expect("two"), of(&[("b", 1), ("c", 2)]));
        assert!(read(r#"{"of": {"b": "1"}}"#).is_err() && read(r#"{"of": []}"#).is_err());
    }
}
