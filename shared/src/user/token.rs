//! The token with which an agent looks up a provider token through `/webhooks/secrets`: a JWS (RFC 7515) with HS256.
//!
//! A token names the sandbox that it was given to, and holds as long as that sandbox is there. Tokens of versions before this one
//! name none; they hold until they expire, 14 days after they were made.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use hmac::{Hmac, KeyInit as _, Mac as _};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use serde::Deserialize;
use serde_json::json;
use sha2::Sha256;

use super::UserId;
use super::seal::{DerivedKeys, Sealer};
use crate::clock::Time;
use crate::digest::sha256_hex;
use crate::error::{Error, Result};
use crate::user::git::ProviderType;

const PURPOSE: &str = "secret-access-token";

/// What such tokens are signed and verified with.
#[derive(Clone, Debug)]
pub struct TokenKey(DerivedKeys);

impl From<SecretSlice<u8>> for TokenKey {
    fn from(key: SecretSlice<u8>) -> Self {
        Self(DerivedKeys { newest: key.clone(), accepted: vec![key] })
    }
}

/// What a token gives its bearer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenClaims {
    /// Whose provider token.
    pub user: UserId,
    /// Of which provider.
    pub provider: ProviderType,
    /// The sandbox that has to be there; `None` in tokens of versions that did not name one.
    pub sandbox_id: Option<String>,
}

impl TokenKey {
    /// The keys that belong to a sealer's.
    ///
    /// # Errors
    /// Those of [`Sealer::derived_keys`].
    pub async fn of(sealer: &Sealer) -> Result<Self> {
        sealer.derived_keys(PURPOSE).await.map(Self)
    }

    /// A token that gives its bearer one provider token of one user, until it expires or the sandbox is gone.
    ///
    /// # Errors
    /// [`Error::Internal`] when it cannot be signed, which does not happen with a sealer's key.
    pub fn sign(
        &self,
        user: &UserId,
        provider: ProviderType,
        sandbox_id: &str,
        lifetime: Duration,
    ) -> Result<SecretString> {
        let key = self.0.newest.expose_secret();
        let now = Time::now();
        let header = json!({"alg": "HS256", "kid": key_id(key), "typ": "JWT"});
        let claims = json!({
            "user_id": user.shown(),
            "provider_type": provider,
            "sandbox_id": sandbox_id,
            "iat": now.unix_seconds(),
            "exp": now.plus(lifetime).unix_seconds(),
        });
        let signed = format!("{}.{}", BASE64URL.encode(header.to_string()), BASE64URL.encode(claims.to_string()));
        let mut mac = Hmac::<Sha256>::new_from_slice(key).map_err(Error::internal)?;
        mac.update(signed.as_bytes());
        Ok(format!("{signed}.{}", BASE64URL.encode(mac.finalize().into_bytes())).into())
    }

    /// What a token from [`TokenKey::sign`] gives, also one that was signed under a key that another process has added since this
    /// one read the keys. `None` when it is none of ours, was changed, or has expired.
    ///
    /// # Errors
    /// Those of [`Sealer::derived_keys`].
    pub async fn verify(sealer: &Sealer, token: &str) -> Result<Option<TokenClaims>> {
        let Some(header) = header(token) else { return Ok(None) };
        let is_meant = |key: &SecretSlice<u8>| header.kid == key_id(key.expose_secret());
        let keys = sealer.derived_keys_until(PURPOSE, is_meant).await?;
        Ok(Self(keys).read(token))
    }

    /// What a token from [`TokenKey::sign`] gives; `None` when it is none of ours, was changed, or has expired.
    #[must_use]
    pub fn read(&self, token: &str) -> Option<TokenClaims> {
        #[derive(Deserialize)]
        struct Claims {
            user_id: Option<String>,
            provider_type: ProviderType,
            #[serde(default)]
            sandbox_id: Option<String>,
            exp: i64,
        }
        let (signed, signature) = token.rsplit_once('.')?;
        let (_, claims) = signed.split_once('.')?;
        let header = header(token)?;
        if header.alg != "HS256" {
            return None;
        }
        let key = self.0.accepted.iter().map(ExposeSecret::expose_secret).find(|key| header.kid == key_id(key))?;
        let mut mac = Hmac::<Sha256>::new_from_slice(key).ok()?;
        mac.update(signed.as_bytes());
        mac.verify_slice(&BASE64URL.decode(signature).ok()?).ok()?;
        let claims: Claims = serde_json::from_slice(&BASE64URL.decode(claims).ok()?).ok()?;
        if claims.exp <= Time::now().unix_seconds() {
            return None;
        }
        Some(TokenClaims {
            user: claims.user_id.map_or_else(UserId::local, UserId::new),
            provider: claims.provider_type,
            sandbox_id: claims.sandbox_id,
        })
    }
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: String,
}

fn header(token: &str) -> Option<Header> {
    serde_json::from_slice(&BASE64URL.decode(token.split_once('.')?.0).ok()?).ok()
}

fn key_id(key: &[u8]) -> String {
    sha256_hex(&BASE64URL.encode(key))[..16].to_owned()
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
            let token = key.sign(user, ProviderType::Github, "box", Duration::from_secs(seconds));
            token.expect("a token").expose_secret().to_owned()
        };
        for user in [UserId::local(), UserId::new("somebody")] {
            let token = make(&ours, &user, 60);
            let claims =
                TokenClaims { user: user.clone(), provider: ProviderType::Github, sandbox_id: Some("box".to_owned()) };
            assert_eq!(ours.read(&token), Some(claims));
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

    #[tokio::test]
    async fn tokens_hold_when_keys_are_rotated_and_those_of_the_version_before_until_they_expire() {
        let folder = std::env::temp_dir().join(crate::id::new_sandbox_id());
        std::fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("key");
        std::fs::write(&path, "ofYNdcubWOPGuNbU8TFbdlZdzBSB4b12FizQrrMAHEI=").expect("written");
        let key = async || TokenKey::of(&Sealer::from_file(&path).expect("a sealer")).await.expect("a key");
        // Signed under this key as the version before derived it, without a sandbox; it expires in the year 2100.
        let yesterdays = "eyJhbGciOiJIUzI1NiIsImtpZCI6IjNlOGE2NjU1ZjJiZDYzZjMiLCJ0eXAiOiJKV1QifQ.eyJ1c2VyX2lkIjoic29tZWJvZHkiLCJwcm92aWRlcl90eXBlIjoiZ2l0aHViIiwiaWF0IjoxNzY0MDAwMDAwLCJleHAiOjQxMDI0NDQ4MDB9.-qF-kFzEovylIYVkUYKgtwGk7Gbsnr3zYA_yrLZOG4I";
        let user = UserId::new("somebody");
        let without = TokenClaims { user: user.clone(), provider: ProviderType::Github, sandbox_id: None };
        assert_eq!(key().await.read(yesterdays), Some(without.clone()));
        let token = key().await.sign(&user, ProviderType::Gitlab, "box", Duration::from_secs(60)).expect("a token");
        // Of a process that has read the keys by now.
        let warm = Sealer::from_file(&path).expect("a sealer");
        Sealer::rotate_file(&path).expect("rotated");
        assert_eq!(key().await.read(yesterdays), Some(without));
        assert_eq!(key().await.read(token.expose_secret()).expect("it holds").sandbox_id.as_deref(), Some("box"));
        let newer = key().await.sign(&user, ProviderType::Gitlab, "box", Duration::from_secs(60)).expect("a token");
        let kid = |token: &SecretString| token.expose_secret().split('.').next().map(str::to_owned);
        assert_ne!(kid(&newer), kid(&token), "the newest key signs");
        assert!(key().await.read(newer.expose_secret()).is_some());
        assert!(
            TokenKey::of(&warm).await.expect("a key").read(newer.expose_secret()).is_none(),
            "it has not met the key"
        );
        assert!(
            TokenKey::verify(&warm, newer.expose_secret()).await.expect("keys").is_some(),
            "it reads the keys again"
        );
        assert_eq!(TokenKey::verify(&warm, "e30.e30.e30").await.expect("keys"), None);
        std::fs::remove_dir_all(folder).expect("removed");
    }
}
