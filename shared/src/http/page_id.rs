//! Page ids: opaque, versioned, and bound to the list that they continue.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Token<L, P> {
    v: u32,
    list: L,
    after: P,
}

/// A page id for the place `after` in the list described by `list` (which list, its filters, its order).
///
/// # Errors
/// [`Error::Internal`] when the parts have no form as JSON.
pub fn encode<L: Serialize, P: Serialize>(list: &L, after: &P) -> Result<String> {
    let json = serde_json::to_vec(&Token { v: VERSION, list, after }).map_err(Error::internal)?;
    Ok(BASE64URL.encode(json))
}

/// The place that a page id names.
///
/// # Errors
/// [`Error::Refused`] when it is none of ours, or one of another list.
pub fn decode<L: DeserializeOwned + PartialEq, P: DeserializeOwned>(page_id: &str, list: &L) -> Result<P> {
    let refused = |text: &str| Error::Refused(text.into());
    let token: Token<L, P> = BASE64URL
        .decode(page_id)
        .ok()
        .and_then(|json| serde_json::from_slice(&json).ok())
        .filter(|token: &Token<L, P>| token.v == VERSION)
        .ok_or_else(|| {
            refused("page_id is not one that this server gave out: leave it out to start at the first page")
        })?;
    if token.list != *list {
        return Err(refused("page_id belongs to a list with other filters: leave it out to start at the first page"));
    }
    Ok(token.after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_id_leads_back_to_its_place_in_its_list_alone() {
        let page_id = encode(&("tasks", "CREATED_AT"), &"x").expect("a page id");
        let decode =
            |text: &str, order: &str| decode::<(String, String), String>(text, &("tasks".into(), order.into()));
        assert_eq!(decode(&page_id, "CREATED_AT").expect("a place"), "x");
        for (text, order) in
            [(page_id.as_str(), "UPDATED_AT"), ("3", "CREATED_AT"), ("", "CREATED_AT"), (&page_id[1..], "CREATED_AT")]
        {
            assert!(matches!(decode(text, order), Err(Error::Refused(_))), "{text}");
        }
    }
}
