//! The token with which an agent looks up a provider token through `/webhooks/secrets`: a JWS (RFC 7515) with HS256.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::json;
use sha2::Sha256;

use super::UserId;
use super::seal::{Sealer, hash};
use crate::clock::Time;
use crate::error::{Error, Result};
use crate::start::request::ProviderType;

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
    let key = sealer.derived_key("secret-access-token");
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

fn key_id(key: &[u8]) -> String {
    hash(&BASE64URL.encode(key))[..16].to_owned()
}
