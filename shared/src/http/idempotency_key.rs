//! The header `Idempotency-Key`: a client that repeats a request with the same key does not repeat its effect.

use axum::extract::FromRequestParts;
use http::request::Parts;

use crate::error::{Error, Result};

/// The name of the header.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// The longest key, in characters.
const MAX_LENGTH: usize = 255;

/// The key of a request, if it has one: 1 to 255 visible ASCII characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey(pub Option<String>);

impl<S: Send + Sync> FromRequestParts<S> for IdempotencyKey {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self> {
        let mut values = parts.headers.get_all(IDEMPOTENCY_KEY).into_iter();
        let Some(value) = values.next() else { return Ok(Self(None)) };
        let bytes = value.as_bytes();
        let is_valid = (1..=MAX_LENGTH).contains(&bytes.len()) && bytes.iter().all(u8::is_ascii_graphic);
        match std::str::from_utf8(bytes) {
            Ok(key) if is_valid && values.next().is_none() => Ok(Self(Some(key.to_owned()))),
            _ => Err(Error::Refused(format!(
                "Idempotency-Key must be one header with 1 to {MAX_LENGTH} visible ASCII characters"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, Request};

    use super::*;

    async fn read(values: &[&[u8]]) -> Result<IdempotencyKey> {
        let (mut parts, ()) = Request::new(()).into_parts();
        for value in values {
            parts.headers.append(IDEMPOTENCY_KEY, HeaderValue::from_bytes(value).expect("a value"));
        }
        IdempotencyKey::from_request_parts(&mut parts, &()).await
    }

    #[tokio::test]
    async fn a_key_is_one_header_of_visible_ascii() {
        assert_eq!(read(&[]).await.expect("none"), IdempotencyKey(None));
        let longest = "k".repeat(MAX_LENGTH);
        for key in ["7", "a-b_c.d~!\"{}", &longest] {
            assert_eq!(read(&[key.as_bytes()]).await.expect(key), IdempotencyKey(Some(key.to_owned())));
        }
        let too_long = "k".repeat(MAX_LENGTH + 1);
        let refused: [&[&[u8]]; 5] = [&[b""], &[b"a b"], &["\u{e4}".as_bytes()], &[too_long.as_bytes()], &[b"a", b"a"]];
        for values in refused {
            assert!(matches!(read(values).await, Err(Error::Refused(_))), "{values:?}");
        }
    }
}
