//! The token with which an agent looks up a provider token through `/webhooks/secrets`: a JWS (RFC 7515) with HS256.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret as _, SecretSlice, SecretString};
use serde::Deserialize;
use serde_json::json;
use sha2::Sha256;

use super::UserId;
use super::seal::{Sealer, hash};
use crate::clock::Time;
use crate::error::{Error, Result};
use crate::start::request::ProviderType;

const PURPOSE: &str = "secret-access-token";

/// What such tokens are signed with.
#[derive(Clone, Debug)]
pub struct TokenKey(SecretSlice<u8>);

impl From<SecretSlice<u8>> for TokenKey {
    fn from(key: SecretSlice<u8>) -> Self {
        Self(key)
    }
}

impl TokenKey {
    /// The key that belongs to a sealer's.
    ///
    /// # Errors
    /// Those of [`Sealer::derived_key`].
    pub async fn of(sealer: &Sealer) -> Result<Self> {
        sealer.derived_key(PURPOSE).await.map(Self)
    }

    /// A token that gives its bearer one provider token of one user, until it expires.
    ///
    /// # Errors
    /// [`Error::Internal`] when it cannot be signed, which does not happen with a sealer's key.
    pub fn sign(&self, user: &UserId, provider: ProviderType, lifetime: Duration) -> Result<SecretString> {
        let key = self.0.expose_secret();
        let now = Time::now();
        let header = json!({"alg": "HS256", "kid": key_id(key), "typ": "JWT"});
        let claims = json!({
            "user_id": user.shown(),
            "provider_type": provider,
            "iat": now.unix_seconds(),
            "exp": now.plus(lifetime).unix_seconds(),
        });
        let signed = format!("{}.{}", BASE64URL.encode(header.to_string()), BASE64URL.encode(claims.to_string()));
        let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(Error::internal)?;
        mac.update(signed.as_bytes());
        Ok(format!("{signed}.{}", BASE64URL.encode(mac.finalize().into_bytes())).into())
    }

    /// Whose token of which provider a token from [`TokenKey::sign`] gives; `None` when it is none of ours, was changed, or has
    /// expired.
    #[must_use]
    pub fn read(&self, token: &str) -> Option<(UserId, ProviderType)> {
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
        let key = self.0.expose_secret();
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        let header: Header = serde_json::from_slice(&BASE64URL.decode(header).ok()?).ok()?;
        if header.alg != "HS256" || header.kid != key_id(key) {
            return None;
        }
        let mut mac = Hmac::<Sha256>::new_from_slice(key).ok()?;
        mac.update(signed.as_bytes());
        mac.verify_slice(&BASE64URL.decode(signature).ok()?).ok()?;
        let claims: Claims = serde_json::from_slice(&BASE64URL.decode(claims).ok()?).ok()?;
        if claims.exp <= Time::now().unix_seconds() {
            return None;
        }
        Some((claims.user_id.map_or_else(UserId::local, UserId::new), claims.provider_type))
    }
}

fn key_id(key: &[u8]) -> String {
    hash(&BASE64URL.encode(key))[..16].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_says_whose_it_is_until_it_expires_or_is_changed() {
        let folder = std::env::temp_dir().join(crate::id::new_sandbox_id());
        std::fs::create_dir_all(&folder).expect("a folder");
        let key = async |name: &str| {
            TokenKey::of(&Sealer::from_file(&folder.join(name)).expect("a sealer")).await.expect("a key")
        };
        let (ours, theirs) = (key("ours").await, key("theirs").await);
        let make = |key: &TokenKey, user: &UserId, seconds| {
            let token = key.sign(user, ProviderType::Github, Duration::from_secs(seconds));
            token.expect("a token").expose_secret().to_owned()
        };
        for user in [UserId::local(), UserId::new("somebody")] {
            let token = make(&ours, &user, 60);
            assert_eq!(ours.read(&token), Some((user.clone(), ProviderType::Github)));
            assert_eq!(theirs.read(&token), None);
            assert_eq!(ours.read(&make(&ours, &user, 0)), None);
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
                assert_eq!(ours.read(&format!("{header}.{claims}.{signature}")), None);
            }
        }
        for nonsense in ["", "x", ".", "..", "...", "é.é.é"] {
            assert_eq!(ours.read(nonsense), None);
        }
        std::fs::remove_dir_all(folder).expect("removed");
    }
}
