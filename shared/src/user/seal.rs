//! Secrets at rest: sealed with AES-256-GCM under a key that is not in the store.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit as _};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use secrecy::{ExposeSecret as _, SecretSlice, SecretString};
use sha2::{Digest as _, Sha256};
use tokio::sync::OnceCell;

use super::data_key::DataKey;
use crate::error::{Error, Result};

const NONCE_BYTES: usize = 12;
const KEY_BYTES: usize = 32;
const VERSION: &str = "v1";

/// Seals and opens secrets. Clones share the key.
#[derive(Clone)]
pub struct Sealer(Arc<Inner>);

struct Inner {
    key: OnceCell<SecretSlice<u8>>,
    /// Where the key is had from once it is needed: most requests need none, and their process then does not ask for one.
    source: Option<DataKey>,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Sealer")
    }
}

impl Sealer {
    /// Reads the key file, and makes it (readable by its owner alone) when there is none.
    ///
    /// # Errors
    /// When the file can be neither read nor made, or does not hold a key.
    pub fn from_file(path: &Path) -> io::Result<Self> {
        match fs::read_to_string(path) {
            Ok(text) => {
                let key = BASE64.decode(text.trim()).ok().filter(|key| key.len() == KEY_BYTES).ok_or_else(|| {
                    io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!("{} does not hold a sealing key", path.display()),
                    )
                })?;
                Ok(Self::with_key(key))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key: [u8; KEY_BYTES] = rand::random();
                let mut options = OpenOptions::new();
                match options.write(true).create_new(true).mode(0o600).open(path) {
                    Ok(mut file) => {
                        file.write_all(BASE64.encode(key).as_bytes())?;
                        file.sync_all()?;
                        Ok(Self::with_key(key.to_vec()))
                    }
                    // Another process was quicker; its key is the key.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Self::from_file(path),
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Seals under a key that is asked for when the first secret is sealed or opened.
    #[must_use]
    pub fn from_data_key(source: DataKey) -> Self {
        Self(Arc::new(Inner { key: OnceCell::new(), source: Some(source) }))
    }

    fn with_key(key: Vec<u8>) -> Self {
        Self(Arc::new(Inner { key: OnceCell::new_with(Some(key.into())), source: None }))
    }

    /// A key of this process alone: nobody can open later what it seals. For stores that are given nothing to seal.
    #[must_use]
    pub fn ephemeral() -> Self {
        let key: [u8; KEY_BYTES] = rand::random();
        Self::with_key(key.to_vec())
    }

    /// Seals a text for one purpose; a text sealed for another purpose does not open.
    ///
    /// # Errors
    /// [`Error::Internal`] when the cipher fails, which it does not for texts under 64 GiB; those of [`DataKey::key`].
    pub async fn seal(&self, purpose: &str, secret: &SecretString) -> Result<String> {
        let nonce: [u8; NONCE_BYTES] = rand::random();
        let payload = Payload { msg: secret.expose_secret().as_bytes(), aad: purpose.as_bytes() };
        let sealed = self
            .cipher()
            .await?
            .encrypt(&nonce.into(), payload)
            .map_err(|_| Error::internal("a secret could not be sealed"))?;
        Ok(format!("{VERSION}.{}.{}", BASE64.encode(nonce), BASE64.encode(sealed)))
    }

    /// Opens what [`Sealer::seal`] made for the same purpose.
    ///
    /// # Errors
    /// [`Error::Internal`] when the text was sealed under another key or for another purpose, or was changed; those of
    /// [`DataKey::key`].
    pub async fn open(&self, purpose: &str, sealed: &str) -> Result<SecretString> {
        let broken = || Error::internal(format!("a sealed secret ({purpose}) does not open with this key"));
        let mut parts = sealed.split('.');
        let (Some(VERSION), Some(nonce), Some(body), None) = (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(broken());
        };
        let nonce: [u8; NONCE_BYTES] =
            BASE64.decode(nonce).ok().and_then(|nonce| nonce.try_into().ok()).ok_or_else(broken)?;
        let body = BASE64.decode(body).map_err(|_| broken())?;
        let payload = Payload { msg: &body, aad: purpose.as_bytes() };
        let open = self.cipher().await?.decrypt(&nonce.into(), payload).map_err(|_| broken())?;
        String::from_utf8(open).map(SecretString::from).map_err(|_| broken())
    }

    /// A key for another algorithm, derived from this one.
    ///
    /// # Errors
    /// Those of [`DataKey::key`].
    pub async fn derived_key(&self, purpose: &str) -> Result<SecretSlice<u8>> {
        let mut hash = Sha256::new();
        hash.update(self.key().await?.expose_secret());
        hash.update(purpose.as_bytes());
        Ok(hash.finalize().to_vec().into())
    }

    /// The key. Should it not be had now, the next one who needs it asks again.
    async fn key(&self) -> Result<&SecretSlice<u8>> {
        self.0
            .key
            .get_or_try_init(async || match &self.0.source {
                Some(source) => checked(source.key().await?).map(Into::into),
                None => Err(Error::internal("a sealer without a key")),
            })
            .await
    }

    async fn cipher(&self) -> Result<Aes256Gcm> {
        Aes256Gcm::new_from_slice(self.key().await?.expose_secret())
            .map_err(|_| Error::internal("the sealing key has the wrong length"))
    }
}

fn checked(key: Vec<u8>) -> Result<Vec<u8>> {
    match key.len() {
        KEY_BYTES => Ok(key),
        length => Err(Error::internal(format!("a sealing key has {KEY_BYTES} bytes, not {length}"))),
    }
}

/// The SHA-256 of a secret in lower-case hex: how a session key is looked up without being stored.
#[must_use]
pub fn hash(secret: &str) -> String {
    Sha256::digest(secret.as_bytes()).iter().fold(String::with_capacity(64), |mut hex, byte| {
        hex += &format!("{byte:02x}");
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sealer(folder: &Path) -> Sealer {
        Sealer::from_file(&folder.join("key")).expect("a key file")
    }

    #[tokio::test]
    async fn a_sealed_text_opens_for_its_purpose_alone() {
        let folder = std::env::temp_dir().join(crate::id::new_sandbox_id());
        fs::create_dir_all(&folder).expect("a folder");
        let sealed = sealer(&folder).seal("settings:u1", &"sk-secret".into()).await.expect("sealed");
        assert!(!sealed.contains("secret"));
        assert_eq!(sealer(&folder).open("settings:u1", &sealed).await.expect("open").expose_secret(), "sk-secret");
        assert!(sealer(&folder).open("settings:u2", &sealed).await.is_err());
        let mut changed = sealed.into_bytes();
        let last = changed.len() - 3;
        changed[last] ^= 1;
        assert!(sealer(&folder).open("settings:u1", &String::from_utf8_lossy(&changed)).await.is_err());
        fs::remove_dir_all(folder).expect("removed");
    }

    #[test]
    fn the_key_file_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = std::env::temp_dir().join(crate::id::new_sandbox_id());
        fs::create_dir_all(&folder).expect("a folder");
        let _sealer = sealer(&folder);
        let mode = fs::metadata(folder.join("key")).expect("metadata").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::remove_dir_all(folder).expect("removed");
    }
}
