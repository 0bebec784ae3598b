//! Tokens that this API issues to sandboxes: JWTs (RFC 7519) signed with HS256. Each kind has keys of its own, so that none is valid as
//! another.
//!
//! With an access token ([`TokenKey`]), an agent requests a provider token at `/webhooks/secrets`. With a notification token
//! ([`NotificationToken`]), a command in a sandbox notifies this API of its end at `/webhooks/commands`.
//!
//! An access token names the sandbox for which it was issued, and is valid as long as that sandbox exists. Tokens of earlier versions name no
//! sandbox; they are valid until they expire, 14 days after they were issued.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation, decode, decode_header, encode};
use secrecy::{ExposeSecret, SecretSlice, SecretString};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::UserId;
use super::seal::{DerivedKeys, Sealer};
use crate::clock::Time;
use crate::digest::sha256_hex;
use crate::error::{Error, Result};
use crate::id::as_hex;
use crate::user::git::ProviderType;

const PURPOSE: &str = "secret-access-token";
const NOTIFICATION_PURPOSE: &str = "command-notification-token";
const ALGORITHM: Algorithm = Algorithm::HS256;

/// The keys that sign and verify tokens.
#[derive(Clone, Debug)]
pub struct TokenKey(DerivedKeys);

impl From<SecretSlice<u8>> for TokenKey {
    fn from(key: SecretSlice<u8>) -> Self {
        Self(DerivedKeys { newest: key.clone(), accepted: vec![key] })
    }
}

/// The provider token that an access token grants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenClaims {
    /// The owner of the provider token.
    pub user: UserId,
    /// The git provider.
    pub provider: ProviderType,
    /// The sandbox that must exist; `None` in tokens of versions that did not name one.
    pub sandbox_id: Option<String>,
}

/// The claims on the wire.
#[derive(Serialize, Deserialize)]
struct Claims {
    user_id: Option<String>,
    provider_type: ProviderType,
    #[serde(default)]
    sandbox_id: Option<String>,
    #[serde(default)]
    iat: i64,
    exp: i64,
}

impl TokenKey {
    /// Derives the keys from those of a sealer.
    ///
    /// # Errors
    /// Those of [`Sealer::derived_keys`].
    pub async fn of(sealer: &Sealer) -> Result<Self> {
        sealer.derived_keys(PURPOSE).await.map(Self)
    }

    /// Issues a token that grants one provider token of one user, until it expires or the sandbox is deleted.
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
        let now = Time::now();
        let claims = Claims {
            user_id: user.shown().map(str::to_owned),
            provider_type: provider,
            sandbox_id: Some(sandbox_id.to_owned()),
            iat: now.unix_seconds(),
            exp: now.plus(lifetime).unix_seconds(),
        };
        signed(&self.0, &claims)
    }

    /// Verifies a token as [`TokenKey::read`] does, also one that was signed with a key that another process has added since this process
    /// read the keys.
    ///
    /// # Errors
    /// Those of [`Sealer::derived_keys`].
    pub async fn verify(sealer: &Sealer, token: &str) -> Result<Option<TokenClaims>> {
        Ok(keys_of(sealer, PURPOSE, token).await?.and_then(|keys| Self(keys).read(token)))
    }

    /// Verifies a token from [`TokenKey::sign`]; `None` when it was signed with another key, was changed, or has expired.
    #[must_use]
    pub fn read(&self, token: &str) -> Option<TokenClaims> {
        let claims: Claims = verified(&self.0, token)?;
        Some(TokenClaims {
            user: claims.user_id.map_or_else(UserId::local, UserId::new),
            provider: claims.provider_type,
            sandbox_id: claims.sandbox_id,
        })
    }
}

/// The permission of a command in a sandbox to notify this API of its end. It is good for nothing but to enqueue the job of the start that
/// sent the command, which this API also does by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotificationToken {
    /// The owner of the start.
    pub user: UserId,
    /// The start.
    pub task: Uuid,
}

#[derive(Serialize, Deserialize)]
struct NotificationClaims {
    user_id: Option<String>,
    #[serde(with = "as_hex")]
    task: Uuid,
    exp: i64,
}

impl NotificationToken {
    /// Issues the token, which is valid for `lifetime`.
    ///
    /// # Errors
    /// Those of [`Sealer::derived_keys`].
    pub async fn issue(&self, sealer: &Sealer, lifetime: Duration) -> Result<SecretString> {
        let claims = NotificationClaims {
            user_id: self.user.shown().map(str::to_owned),
            task: self.task,
            exp: Time::now().plus(lifetime).unix_seconds(),
        };
        signed(&sealer.derived_keys(NOTIFICATION_PURPOSE).await?, &claims)
    }

    /// Verifies a token; `None` if it is not valid.
    ///
    /// # Errors
    /// Those of [`Sealer::derived_keys`].
    pub async fn verify(sealer: &Sealer, token: &str) -> Result<Option<Self>> {
        let keys = keys_of(sealer, NOTIFICATION_PURPOSE, token).await?;
        let claims = keys.and_then(|keys| verified::<NotificationClaims>(&keys, token));
        Ok(claims
            .map(|claims| Self { user: claims.user_id.map_or_else(UserId::local, UserId::new), task: claims.task }))
    }
}

fn signed(keys: &DerivedKeys, claims: &impl Serialize) -> Result<SecretString> {
    let key = keys.newest.expose_secret();
    let header = Header { kid: Some(key_id(key)), ..Header::new(ALGORITHM) };
    encode(&header, claims, &EncodingKey::from_secret(key)).map(Into::into).map_err(Error::internal)
}

/// The claims of a token that was signed with one of the keys and has not expired.
fn verified<C: DeserializeOwned>(keys: &DerivedKeys, token: &str) -> Option<C> {
    let id = key_id_of(token)?;
    let key = keys.accepted.iter().map(ExposeSecret::expose_secret).find(|key| id == key_id(key))?;
    let mut validation = Validation::new(ALGORITHM);
    // One process issues and verifies tokens, or several with synchronised clocks. A token is invalid from `exp` on.
    validation.leeway = 0;
    validation.reject_tokens_expiring_in_less_than = 1;
    Some(decode(token, &DecodingKey::from_secret(key), &validation).ok()?.claims)
}

/// The keys of a purpose, read again if none of them is the one that the token names. `None` if it names none.
async fn keys_of(sealer: &Sealer, purpose: &str, token: &str) -> Result<Option<DerivedKeys>> {
    let Some(id) = key_id_of(token) else { return Ok(None) };
    let is_wanted = |key: &SecretSlice<u8>| id == key_id(key.expose_secret());
    sealer.derived_keys_until(purpose, is_wanted).await.map(Some)
}

/// The id of the key that a token names.
fn key_id_of(token: &str) -> Option<String> {
    decode_header(token).ok()?.kid
}

fn key_id(key: &[u8]) -> String {
    sha256_hex(&BASE64URL.encode(key))[..16].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_token_is_valid_until_it_expires_or_is_changed() {
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
            // Every change of the claims, the header or the signature invalidates the token.
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
        for malformed in ["", "x", ".", "..", "...", "é.é.é"] {
            assert_eq!(ours.read(malformed), None);
        }
        std::fs::remove_dir_all(folder).expect("removed");
    }

    #[tokio::test]
    async fn a_notification_token_is_valid_for_one_start_and_not_as_an_access_token() {
        let folder = std::env::temp_dir().join(crate::id::new_sandbox_id());
        std::fs::create_dir_all(&folder).expect("a folder");
        let sealer = Sealer::from_file(&folder.join("key")).expect("a sealer");
        for user in [UserId::local(), UserId::new("somebody")] {
            let token = NotificationToken { user: user.clone(), task: Uuid::from_u128(1) };
            let issue = async |seconds| {
                token.issue(&sealer, Duration::from_secs(seconds)).await.expect("a token").expose_secret().to_owned()
            };
            let issued = issue(60).await;
            assert_eq!(NotificationToken::verify(&sealer, &issued).await.expect("keys"), Some(token.clone()));
            assert_eq!(NotificationToken::verify(&sealer, &issue(0).await).await.expect("keys"), None);
            assert_eq!(TokenKey::verify(&sealer, &issued).await.expect("keys"), None);
            let key = TokenKey::of(&sealer).await.expect("a key");
            let access = key.sign(&user, ProviderType::Github, "box", Duration::from_secs(60)).expect("a token");
            assert_eq!(NotificationToken::verify(&sealer, access.expose_secret()).await.expect("keys"), None);
        }
        for malformed in ["", "x", "e30.e30.e30"] {
            assert_eq!(NotificationToken::verify(&sealer, malformed).await.expect("keys"), None);
        }
        std::fs::remove_dir_all(folder).expect("removed");
    }

    #[tokio::test]
    async fn tokens_stay_valid_when_keys_are_rotated_and_so_do_tokens_of_earlier_versions() {
        let folder = std::env::temp_dir().join(crate::id::new_sandbox_id());
        std::fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join("key");
        std::fs::write(&path, "ofYNdcubWOPGuNbU8TFbdlZdzBSB4b12FizQrrMAHEI=").expect("written");
        let key = async || TokenKey::of(&Sealer::from_file(&path).expect("a sealer")).await.expect("a key");
        // Both tokens expire in the year 2100. The first one was signed with a key that was derived without HKDF, and names no sandbox.
        let without_hkdf = "eyJhbGciOiJIUzI1NiIsImtpZCI6IjNlOGE2NjU1ZjJiZDYzZjMiLCJ0eXAiOiJKV1QifQ.eyJ1c2VyX2lkIjoic29tZWJvZHkiLCJwcm92aWRlcl90eXBlIjoiZ2l0aHViIiwiaWF0IjoxNzY0MDAwMDAwLCJleHAiOjQxMDI0NDQ4MDB9.-qF-kFzEovylIYVkUYKgtwGk7Gbsnr3zYA_yrLZOG4I";
        // The second one has today's claims, but was not made by the crate that now signs tokens.
        let without_crate = "eyJhbGciOiJIUzI1NiIsImtpZCI6Ijk2NzFmYzJiYTcwMDkzN2IiLCJ0eXAiOiJKV1QifQ.eyJ1c2VyX2lkIjoic29tZWJvZHkiLCJwcm92aWRlcl90eXBlIjoiZ2l0bGFiIiwic2FuZGJveF9pZCI6ImJveCIsImlhdCI6MTc2NDAwMDAwMCwiZXhwIjo0MTAyNDQ0ODAwfQ.FZd2LeiATWNDq7O23e4pPH1TgQWY1BVy9DcVm8XsR-4";
        let user = UserId::new("somebody");
        let with_sandbox =
            TokenClaims { user: user.clone(), provider: ProviderType::Gitlab, sandbox_id: Some("box".to_owned()) };
        assert_eq!(key().await.read(without_crate), Some(with_sandbox.clone()));
        let without = TokenClaims { user: user.clone(), provider: ProviderType::Github, sandbox_id: None };
        assert_eq!(key().await.read(without_hkdf), Some(without.clone()));
        let token = key().await.sign(&user, ProviderType::Gitlab, "box", Duration::from_secs(60)).expect("a token");
        // A sealer of a process that has already read the keys.
        let warm = Sealer::from_file(&path).expect("a sealer");
        Sealer::rotate_file(&path).expect("rotated");
        assert_eq!(key().await.read(without_crate), Some(with_sandbox));
        assert_eq!(key().await.read(without_hkdf), Some(without));
        assert_eq!(key().await.read(token.expose_secret()).expect("it is valid").sandbox_id.as_deref(), Some("box"));
        let newer = key().await.sign(&user, ProviderType::Gitlab, "box", Duration::from_secs(60)).expect("a token");
        let kid = |token: &SecretString| token.expose_secret().split('.').next().map(str::to_owned);
        assert_ne!(kid(&newer), kid(&token), "the newest key signs");
        assert!(key().await.read(newer.expose_secret()).is_some());
        assert!(
            TokenKey::of(&warm).await.expect("a key").read(newer.expose_secret()).is_none(),
            "the process does not know the key"
        );
        assert!(
            TokenKey::verify(&warm, newer.expose_secret()).await.expect("keys").is_some(),
            "the process rereads the keys"
        );
        assert_eq!(TokenKey::verify(&warm, "e30.e30.e30").await.expect("keys"), None);
        std::fs::remove_dir_all(folder).expect("removed");
    }
}
