//! Page ids (pagination tokens): opaque, versioned, and bound to the list that they continue.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::id::UserId;

const VERSION: u32 = 1;

/// Size in bytes of the digest before the token.
const DIGEST_SIZE: usize = 8;

#[derive(Serialize, Deserialize)]
struct Token<L, P> {
    v: u32,
    list: L,
    after: P,
}

/// Makes a page id for the position `after` in one of the user's lists. `list` says which list, with its filters and its order.
///
/// # Errors
/// [`Error::Internal`] when the parts cannot be serialised as JSON.
pub fn encode<L: Serialize, P: Serialize>(user: &UserId, list: &L, after: &P) -> Result<String> {
    let json = serde_json::to_vec(&Token { v: VERSION, list, after }).map_err(Error::internal)?;
    let mut bytes = digest(user, &json);
    bytes.extend(json);
    Ok(BASE64URL.encode(bytes))
}

/// Reads the position from a page id.
///
/// # Errors
/// [`Error::Refused`] when the page id is malformed or damaged, or belongs to another user or to another list.
pub fn decode<L: DeserializeOwned + PartialEq, P: DeserializeOwned>(
    user: &UserId,
    page_id: &str,
    list: &L,
) -> Result<P> {
    let token: Token<L, P> = BASE64URL
        .decode(page_id)
        .ok()
        .and_then(|bytes| {
            let (claimed, json) = bytes.split_at_checked(DIGEST_SIZE)?;
            (claimed == digest(user, json)).then(|| serde_json::from_slice(json).ok())?
        })
        .filter(|token: &Token<L, P>| token.v == VERSION)
        .ok_or_else(invalid)?;
    if token.list != *list {
        return Err(refused("page_id was issued for different filters. Omit it to start from the first page."));
    }
    Ok(token.after)
}

/// The error for a page id that this server did not issue.
#[must_use]
pub fn invalid() -> Error {
    refused("Invalid page_id. Omit it to start from the first page.")
}

fn refused(text: &str) -> Error {
    Error::Refused(text.into())
}

/// Detects damage and other users' page ids. It needs no secret key: a forged page id leads to a position in the forger's own list,
/// because every read starts with the caller's id.
fn digest(user: &UserId, json: &[u8]) -> Vec<u8> {
    let mut hash = Sha256::new();
    hash.update(user.key_of("page"));
    hash.update(json);
    hash.finalize()[..DIGEST_SIZE].to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_id_holds_for_its_user_and_its_list_only() {
        let me = UserId::new("me");
        let page_id = encode(&me, &("tasks", "CREATED_AT"), &"x").expect("a page id");
        let decode = |user: &UserId, text: &str, order: &str| {
            decode::<(String, String), String>(user, text, &("tasks".into(), order.into()))
        };
        assert_eq!(decode(&me, &page_id, "CREATED_AT").expect("a position"), "x");
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
