//! Page ids: opaque, versioned, and bound to the list that they continue.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::id::UserId;

const VERSION: u32 = 1;

/// Bytes of the digest in front of the token.
const DIGEST: usize = 8;

#[derive(Serialize, Deserialize)]
struct Token<L, P> {
    v: u32,
    list: L,
    after: P,
}

/// A page id for the place `after` in the user's list described by `list` (which list, its filters, its order).
///
/// # Errors
/// [`Error::Internal`] when the parts have no form as JSON.
pub fn encode<L: Serialize, P: Serialize>(user: &UserId, list: &L, after: &P) -> Result<String> {
    let json = serde_json::to_vec(&Token { v: VERSION, list, after }).map_err(Error::internal)?;
    let mut bytes = digest(user, &json);
    bytes.extend(json);
    Ok(BASE64URL.encode(bytes))
}

/// The place that a page id names.
///
/// # Errors
/// [`Error::Refused`] when it is none of ours, was damaged, is another user's, or is one of another list.
pub fn decode<L: DeserializeOwned + PartialEq, P: DeserializeOwned>(
    user: &UserId,
    page_id: &str,
    list: &L,
) -> Result<P> {
    let token: Token<L, P> = BASE64URL
        .decode(page_id)
        .ok()
        .and_then(|bytes| {
            let (claimed, json) = bytes.split_at_checked(DIGEST)?;
            (claimed == digest(user, json)).then(|| serde_json::from_slice(json).ok())?
        })
        .filter(|token: &Token<L, P>| token.v == VERSION)
        .ok_or_else(not_ours)?;
    if token.list != *list {
        return Err(refused("page_id belongs to a list with other filters: leave it out to start at the first page"));
    }
    Ok(token.after)
}

/// What is answered to a page id that this server did not make.
#[must_use]
pub fn not_ours() -> Error {
    refused("page_id is not one that this server gave out: leave it out to start at the first page")
}

fn refused(text: &str) -> Error {
    Error::Refused(text.into())
}

/// Tells damage and other users' page ids. It has no key: who makes up a page id gets to a place in their own list,
/// for every read starts with the caller.
fn digest(user: &UserId, json: &[u8]) -> Vec<u8> {
    let mut hash = Sha256::new();
    hash.update(user.key_of("page"));
    hash.update(json);
    hash.finalize()[..DIGEST].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_id_leads_back_to_its_place_in_its_list_alone() {
        let me = UserId::new("me");
        let page_id = encode(&me, &("tasks", "CREATED_AT"), &"x").expect("a page id");
        let decode = |user: &UserId, text: &str, order: &str| {
            decode::<(String, String), String>(user, text, &("tasks".into(), order.into()))
        };
        assert_eq!(decode(&me, &page_id, "CREATED_AT").expect("a place"), "x");
        for (user, text, order) in [
            ("me", page_id.as_str(), "UPDATED_AT"),
            ("you", &page_id, "CREATED_AT"),
            ("me", "3", "CREATED_AT"),
            ("me", "", "CREATED_AT"),
            ("me", &page_id[1..], "CREATED_AT"),
        ] {
            assert!(matches!(decode(&UserId::new(user), text, order), Err(Error::Refused(_))), "{text}");
        }
    }

    #[test]
    fn any_changed_character_is_noticed() {
        let me = UserId::new("me");
        let page_id = encode(&me, &"list", &"2025-01-01T00:00:00.000000Z#1").expect("a page id");
        for index in 0..page_id.len() {
            for other in ["A", "b", "0", "_", "=", "é"] {
                let mut changed = page_id.clone();
                changed.replace_range(index..=index, other);
                if changed != page_id {
                    let read = decode::<String, String>(&me, &changed, &"list".to_owned());
                    assert!(matches!(read, Err(Error::Refused(_))), "{changed}");
                }
            }
        }
    }
}
