//! The token with which an agent looks up a provider token through `/webhooks/secrets`: a JWS (RFC 7515) with HS256.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretString};
use serde::Deserialize;
use serde_json::json;
use sha2::Sha256;

use super::UserId;
use super::seal::{Sealer, hash};
use crate::clock::Time;
use crate::error::{Error, Result};
use crate::start::request::ProviderType;

const PURPOSE: &str = "secret-access-token";

/// A token that gives its bearer one provider token of one user, until it expires.
///
/// # Errors
/// [`Error::Internal`] when it cannot be signed, which does not happen with a sealer's key.
pub fn secret_access_token(
    sealer: &Sealer,
    user: &UserId,
    provider: ProviderType,
    lifetime: Duration,
) -> Result<SecretString> {
    let key = sealer.derived_key(PURPOSE);
    let now = Time::now();
    let header = json!({"alg": "HS256", "kid": key_id(key.expose_secret()), "typ": "JWT"});
    let claims = json!({
        "user_id": user.shown(),
        "provider_type": provider,
        "iat": now.unix_seconds(),
        "exp": now.plus(lifetime).unix_seconds(),
    });
    let signed = format!("{}.{}", BASE64URL.encode(header.to_string()), BASE64URL.encode(claims.to_string()));
    let mut mac = Hmac::<Sha256>::new_from_slice(key.expose_secret()).map_err(Error::internal)?;
    mac.update(signed.as_bytes());
    Ok(format!("{signed}.{}", BASE64URL.encode(mac.finalize().into_bytes())).into())
}

/// Whose token of which provider a token from [`secret_access_token`] gives; `None` when it is none of ours, was changed, or
/// has expired.
#[must_use]
pub fn read_secret_access_token(sealer: &Sealer, token: &str) -> Option<(UserId, ProviderType)> {
    #[derive(Deserialize)]
    struct Header {
        alg: String,
        kid: String,
    }
    #[derive(Deserialize)]
    struct Claims {
        user_id: Option<String>,
        provider_type: ProviderType,
        exp: i64,
    }
    let key = sealer.derived_key(PURPOSE);
    let (signed, signature) = token.rsplit_once('.')?;
    let (header, claims) = signed.split_once('.')?;
    let header: Header = serde_json::from_slice(&BASE64URL.decode(header).ok()?).ok()?;
    if header.alg != "HS256" || header.kid != key_id(key.expose_secret()) {
        return None;
    }
    let mut mac = Hmac::<Sha256>::new_from_slice(key.expose_secret()).ok()?;
    mac.update(signed.as_bytes());
    mac.verify_slice(&BASE64URL.decode(signature).ok()?).ok()?;
    let claims: Claims = serde_json::from_slice(&BASE64URL.decode(claims).ok()?).ok()?;
    if claims.exp <= Time::now().unix_seconds() {
        return None;
    }
    Some((claims.user_id.map_or_else(UserId::local, UserId::new), claims.provider_type))
}

fn key_id(key: &[u8]) -> String {
    hash(&BASE64URL.encode(key))[..16].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_says_whose_it_is_until_it_expires_or_is_changed() {
        let folder = std::env::temp_dir().join(crate::id::new_sandbox_id());
        std::fs::create_dir_all(&folder).expect("a folder");
        let sealer = |name: &str| Sealer::from_file(&folder.join(name)).expect("a key");
        let (ours, theirs) = (sealer("ours"), sealer("theirs"));
        let make = |sealer: &Sealer, user: &UserId, seconds| {
            let token = secret_access_token(sealer, user, ProviderType::Github, Duration::from_secs(seconds));
            token.expect("a token").expose_secret().to_owned()
        };
        for user in [UserId::local(), UserId::new("somebody")] {
            let token = make(&ours, &user, 60);
            assert_eq!(read_secret_access_token(&ours, &token), Some((user.clone(), ProviderType::Github)));
            assert_eq!(read_secret_access_token(&theirs, &token), None);
            assert_eq!(read_secret_access_token(&ours, &make(&ours, &user, 0)), None);
            // Any other claims, header or signature.
            let other = make(&ours, &UserId::new("another"), 60);
            let (ours_parts, others): (Vec<&str>, Vec<&str>) = (token.split('.').collect(), other.split('.').collect());
            for (header, claims, signature) in [
                (ours_parts[0], others[1], ours_parts[2]),
                (ours_parts[0], ours_parts[1], others[2]),
                (ours_parts[0], ours_parts[1], ""),
                ("eyJhbGciOiJub25lIn0", ours_parts[1], ours_parts[2]),
                ("", "", ""),
            ] {
                assert_eq!(read_secret_access_token(&ours, &format!("{header}.{claims}.{signature}")), None);
            }
        }
        for nonsense in ["", "x", ".", "..", "...", "é.é.é"] {
            assert_eq!(read_secret_access_token(&ours, nonsense), None);
        }
        std::fs::remove_dir_all(folder).expect("removed");
    }
}
