//! Encryption of secrets at rest: AES-256-GCM under a key that is not in the store.
//!
//! A sealer holds one or more *data keys*. It seals (encrypts) with the newest one and opens (decrypts) with all of them, so that a key can
//! be rotated while data that it sealed is still in the store. No data key is used directly: HKDF-SHA-256 (RFC 5869) derives a key for
//! each use.
//!
//! | sealed form | key | associated data |
//! |---|---|---|
//! | `v2.<key id>.<nonce>.<ciphertext>` | derived from the data key with this id | `v2.<key id>.<purpose>` |
//! | `v1.<nonce>.<ciphertext>`, read only | any of the data keys itself | the purpose |

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use aes_gcm::aead::{Aead, Payload};
use aes_gcm::{Aes256Gcm, KeyInit as _};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hkdf::Hkdf;
use secrecy::{ExposeSecret as _, SecretSlice, SecretString};
use sha2::{Digest as _, Sha256};
use tokio::sync::RwLock;
use tokio::time::Instant;

use super::data_key::DataKey;
use crate::digest::hex;
use crate::error::{Error, Result};
use crate::random;

const NONCE_BYTES: usize = 12;
const KEY_BYTES: usize = 32;
/// The sealed form that is written.
const VERSION: &str = "v2";
/// The sealed form from before keys had ids.
const WITHOUT_ID: &str = "v1";
/// The size of a key's id before hex encoding.
const ID_BYTES: usize = 8;
/// HKDF's `info` for the id of a data key and for the cipher's key.
const FOR_ID: &[u8] = b"openhands-lambda data key id";
const FOR_SEALING: &[u8] = b"openhands-lambda seal v2";
/// The prefix of the purpose of any other derived key.
const FOR_PURPOSE: &str = "openhands-lambda derived key: ";
/// The most data keys that a sealer holds.
pub const MAX_KEYS: usize = 20;
/// The shortest time between two reads of the data keys because of an unknown id: data that was sealed with a lost key must not cause
/// a call to KMS each time it is read.
const READ_AGAIN_AFTER: Duration = Duration::from_secs(10);

/// Seals and opens secrets. Clones share the keys.
#[derive(Clone)]
pub struct Sealer(Arc<Inner>);

struct Inner {
    keys: RwLock<Option<Read>>,
    source: Source,
}

/// The source of data keys. They are read when the first one is needed, because most requests need none.
enum Source {
    /// The keys are in memory only.
    Given,
    /// A file with one key per line, in base64, the newest last.
    File(PathBuf),
    /// The table of the deployment.
    DataKey(DataKey),
}

/// The data keys, and when they were last reread.
struct Read {
    keys: Arc<[Key]>,
    again_at: Option<Instant>,
}

/// A data key and its id.
struct Key {
    id: String,
    bytes: SecretSlice<u8>,
}

/// Keys that are derived from a sealer's data keys for one purpose.
#[derive(Clone, Debug)]
pub struct DerivedKeys {
    /// The key to sign with, derived from the newest data key.
    pub newest: SecretSlice<u8>,
    /// The keys to verify with, derived from all data keys, the newest first: by HKDF, and as versions before HKDF derived them.
    pub accepted: Vec<SecretSlice<u8>>,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str("Sealer")
    }
}

impl Sealer {
    /// Reads the key file, or creates it (readable only by its owner) when it does not exist.
    ///
    /// # Errors
    /// When the file can be neither read nor created, or does not contain keys.
    pub fn from_file(path: &Path) -> io::Result<Self> {
        let keys = match read_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key: [u8; KEY_BYTES] = random::bytes();
                let mut options = OpenOptions::new();
                match options.write(true).create_new(true).mode(0o600).open(path) {
                    Ok(mut file) => {
                        file.write_all(BASE64.encode(key).as_bytes())?;
                        file.sync_all()?;
                        vec![key.to_vec()]
                    }
                    // Another process has created the file; its key is used.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Self::from_file(path),
                    Err(error) => return Err(error),
                }
            }
            read => read?,
        };
        let keys = keys_of(keys).map_err(|error| io::Error::other(error.context()))?;
        Ok(Self::with(keys, Source::File(path.to_owned())))
    }

    /// Adds a new key to the key file. Running processes continue to seal with the previous key, and open what other processes seal with the
    /// new one.
    ///
    /// # Errors
    /// When the file does not exist, cannot be written, or contains [`MAX_KEYS`] keys.
    pub fn rotate_file(path: &Path) -> io::Result<usize> {
        // Without the lock, of two concurrent rotations one would lose its key. (The key file itself is replaced, so that it cannot be locked.)
        let beside = |suffix: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        fs::metadata(path)?;
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(beside(".lock"))?;
        lock.lock()?;
        let mut keys = read_file(path)?;
        if keys.len() >= MAX_KEYS {
            return Err(io::Error::other(format!(
                "{} contains {MAX_KEYS} keys, the most that are allowed",
                path.display()
            )));
        }
        keys.push(random::bytes::<KEY_BYTES>().to_vec());
        let lines: Vec<String> = keys.iter().map(|key| BASE64.encode(key)).collect();
        // The file is replaced atomically, because a deployment without its keys has lost its secrets.
        let draft = beside(".new");
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
        file.write_all((lines.join("\n") + "\n").as_bytes())?;
        file.sync_all()?;
        fs::rename(&draft, path)?;
        Ok(keys.len())
    }

    /// A sealer that reads the data keys when the first secret is sealed or opened.
    #[must_use]
    pub fn from_data_key(source: DataKey) -> Self {
        Self(Arc::new(Inner { keys: RwLock::new(None), source: Source::DataKey(source) }))
    }

    fn with(keys: Arc<[Key]>, source: Source) -> Self {
        Self(Arc::new(Inner { keys: RwLock::new(Some(Read { keys, again_at: None })), source }))
    }

    /// A sealer with a key of this process only, so that nothing it seals can be opened later. It is for stores that do not seal anything.
    #[must_use]
    pub fn ephemeral() -> Self {
        let key: [u8; KEY_BYTES] = random::bytes();
        Self::with(Arc::new([Key::of(key.to_vec())]), Source::Given)
    }

    /// Seals a text for one purpose with the newest key. It can be opened only for the same purpose.
    ///
    /// # Errors
    /// [`Error::Internal`] when the cipher fails, which it does not for texts under 64 GiB; those of [`DataKey::keys`].
    pub async fn seal(&self, purpose: &str, secret: &SecretString) -> Result<String> {
        let keys = self.keys().await?;
        let key = newest(&keys)?;
        let nonce: [u8; NONCE_BYTES] = random::bytes();
        let associated = associated(&key.id, purpose);
        let payload = Payload { msg: secret.expose_secret().as_bytes(), aad: associated.as_bytes() };
        let sealed = cipher(key.derive(FOR_SEALING)?.expose_secret())?
            .encrypt(&nonce.into(), payload)
            .map_err(|_| Error::internal("a secret could not be sealed"))?;
        Ok(format!("{VERSION}.{}.{}.{}", key.id, BASE64.encode(nonce), BASE64.encode(sealed)))
    }

    /// Opens a text that [`Sealer::seal`] has sealed for the same purpose, in this or an earlier version.
    ///
    /// # Errors
    /// [`Error::Internal`] when the text was sealed with another key or for another purpose, or was changed; those of
    /// [`DataKey::keys`].
    pub async fn open(&self, purpose: &str, sealed: &str) -> Result<SecretString> {
        let broken = || Error::internal(format!("a sealed secret ({purpose}) does not open with this key"));
        let parts: Vec<&str> = sealed.split('.').collect();
        let opened = match parts[..] {
            [VERSION, id, nonce, body] => {
                let keys = self.keys_until(|keys| keys.iter().any(|key| key.id == id)).await?;
                let key = keys.iter().find(|key| key.id == id).ok_or_else(broken)?;
                open(key.derive(FOR_SEALING)?.expose_secret(), &associated(id, purpose), nonce, body)?
            }
            [WITHOUT_ID, nonce, body] => {
                let keys = self.keys().await?;
                let mut opened = None;
                for key in keys.iter() {
                    opened = opened.or(open(key.bytes.expose_secret(), purpose, nonce, body)?);
                }
                opened
            }
            _ => None,
        };
        opened.and_then(|text| String::from_utf8(text).ok()).map(SecretString::from).ok_or_else(broken)
    }

    /// Derives keys for another algorithm from the data keys.
    ///
    /// # Errors
    /// Those of [`DataKey::keys`].
    pub async fn derived_keys(&self, purpose: &str) -> Result<DerivedKeys> {
        derived(&self.keys().await?, purpose)
    }

    /// As [`Sealer::derived_keys`], but rereads the data keys if none of the derived keys `is_wanted`, because another process may have
    /// added one.
    ///
    /// # Errors
    /// Those of [`DataKey::keys`].
    pub async fn derived_keys_until(
        &self,
        purpose: &str,
        is_wanted: impl Fn(&SecretSlice<u8>) -> bool,
    ) -> Result<DerivedKeys> {
        let has = |keys: &[Key]| derived(keys, purpose).is_ok_and(|keys| keys.accepted.iter().any(&is_wanted));
        derived(&self.keys_until(has).await?, purpose)
    }

    /// Returns the data keys. After a failed read, the next caller tries again.
    async fn keys(&self) -> Result<Arc<[Key]>> {
        if let Some(read) = &*self.0.keys.read().await {
            return Ok(read.keys.clone());
        }
        let mut slot = self.0.keys.write().await;
        if let Some(read) = &*slot {
            return Ok(read.keys.clone());
        }
        let keys = self.0.source.read().await?.ok_or_else(|| Error::internal("a sealer without a key"))?;
        *slot = Some(Read { keys: keys.clone(), again_at: None });
        Ok(keys)
    }

    /// Returns the data keys, and rereads them first unless `is_enough` accepts them, because another process may have added one.
    async fn keys_until(&self, is_enough: impl Fn(&[Key]) -> bool) -> Result<Arc<[Key]>> {
        let keys = self.keys().await?;
        if is_enough(&keys) {
            return Ok(keys);
        }
        let mut slot = self.0.keys.write().await;
        if let Some(read) = &*slot
            && (is_enough(&read.keys) || read.again_at.is_some_and(|at| at.elapsed() < READ_AGAIN_AFTER))
        {
            return Ok(read.keys.clone());
        }
        match self.0.source.read().await? {
            Some(keys) => {
                *slot = Some(Read { keys: keys.clone(), again_at: Some(Instant::now()) });
                Ok(keys)
            }
            None => Ok(keys),
        }
    }
}

fn derived(keys: &[Key], purpose: &str) -> Result<DerivedKeys> {
    let info = format!("{FOR_PURPOSE}{purpose}");
    let mut accepted = Vec::with_capacity(2 * keys.len());
    for key in keys.iter().rev() {
        accepted.push(key.derive(info.as_bytes())?);
        accepted.push(key.derive_without_hkdf(purpose));
    }
    Ok(DerivedKeys { newest: newest(keys)?.derive(info.as_bytes())?, accepted })
}

impl Source {
    /// Reads the data keys, the oldest first; `None` for a source that has nothing to read.
    async fn read(&self) -> Result<Option<Arc<[Key]>>> {
        match self {
            Self::Given => Ok(None),
            // Blocking is acceptable: the file is small and rarely read.
            Self::File(path) => keys_of(read_file(path).map_err(Error::internal)?).map(Some),
            Self::DataKey(source) => keys_of(source.keys().await?).map(Some),
        }
    }
}

impl Key {
    fn of(bytes: Vec<u8>) -> Self {
        let mut id = [0; ID_BYTES];
        // This does not fail, because HKDF provides up to 8 KiB.
        let _derived = Hkdf::<Sha256>::new(None, &bytes).expand(FOR_ID, &mut id);
        Self { id: hex(&id), bytes: bytes.into() }
    }

    fn derive(&self, info: &[u8]) -> Result<SecretSlice<u8>> {
        let mut derived = vec![0; KEY_BYTES];
        let done = Hkdf::<Sha256>::new(None, self.bytes.expose_secret()).expand(info, &mut derived);
        done.map_err(Error::internal)?;
        Ok(derived.into())
    }

    /// Derives a key as versions before HKDF did.
    fn derive_without_hkdf(&self, purpose: &str) -> SecretSlice<u8> {
        let mut hash = Sha256::new();
        hash.update(self.bytes.expose_secret());
        hash.update(purpose.as_bytes());
        hash.finalize().to_vec().into()
    }
}

fn newest(keys: &[Key]) -> Result<&Key> {
    keys.last().ok_or_else(|| Error::internal("a sealer without a key"))
}

fn associated(id: &str, purpose: &str) -> String {
    format!("{VERSION}.{id}.{purpose}")
}

/// Decrypts a text; `None` when it was not sealed with this key for this purpose.
fn open(key: &[u8], associated: &str, nonce: &str, body: &str) -> Result<Option<Vec<u8>>> {
    let nonce: Option<[u8; NONCE_BYTES]> = BASE64.decode(nonce).ok().and_then(|nonce| nonce.try_into().ok());
    let (Some(nonce), Ok(body)) = (nonce, BASE64.decode(body)) else { return Ok(None) };
    let payload = Payload { msg: &body, aad: associated.as_bytes() };
    Ok(cipher(key)?.decrypt(&nonce.into(), payload).ok())
}

fn cipher(key: &[u8]) -> Result<Aes256Gcm> {
    Aes256Gcm::new_from_slice(key).map_err(|_| Error::internal("the sealing key has the wrong length"))
}

/// Reads the keys of a file, the oldest first.
fn read_file(path: &Path) -> io::Result<Vec<Vec<u8>>> {
    let text = fs::read_to_string(path)?;
    let keys: Option<Vec<Vec<u8>>> = text.split_ascii_whitespace().map(|line| BASE64.decode(line).ok()).collect();
    keys.filter(|keys| !keys.is_empty() && keys.iter().all(|key| key.len() == KEY_BYTES)).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{} does not hold a sealing key", path.display()))
    })
}

fn keys_of(keys: Vec<Vec<u8>>) -> Result<Arc<[Key]>> {
    if let Some(key) = keys.iter().find(|key| key.len() != KEY_BYTES) {
        return Err(Error::internal(format!("a sealing key has {KEY_BYTES} bytes, not {}", key.len())));
    }
    Ok(keys.into_iter().map(Key::of).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Folder(PathBuf);

    impl Folder {
        fn new() -> Self {
            let folder = std::env::temp_dir().join(crate::id::new_sandbox_id());
            fs::create_dir_all(&folder).expect("a folder");
            Self(folder)
        }

        fn key(&self) -> PathBuf {
            self.0.join("key")
        }

        fn sealer(&self) -> Sealer {
            Sealer::from_file(&self.key()).expect("a key file")
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            // Left-over files in the temporary folder are harmless.
            let _removed = fs::remove_dir_all(&self.0);
        }
    }

    async fn opened(by: &Sealer, purpose: &str, text: &str) -> Option<String> {
        by.open(purpose, text).await.ok().map(|secret| secret.expose_secret().to_owned())
    }

    #[tokio::test]
    async fn a_sealed_text_opens_for_its_purpose_alone() {
        let folder = Folder::new();
        let sealed = folder.sealer().seal("settings:u1", &"sk-secret".into()).await.expect("sealed");
        assert!(!sealed.contains("secret"));
        assert_eq!(opened(&folder.sealer(), "settings:u1", &sealed).await.as_deref(), Some("sk-secret"));
        assert_eq!(opened(&folder.sealer(), "settings:u2", &sealed).await, None);
        // Any other key id, nonce, body or form.
        let parts: Vec<&str> = sealed.split('.').collect();
        let [version, id, nonce, body] = parts[..] else { panic!("four parts: {sealed}") };
        let other = folder.sealer().seal("settings:u1", &"other".into()).await.expect("sealed");
        let others: Vec<&str> = other.split('.').collect();
        for changed in [
            format!("{version}.0000000000000000.{nonce}.{body}"),
            format!("{version}.{id}.{}.{body}", others[2]),
            format!("{version}.{id}.{nonce}.{}", others[3]),
            format!("{version}.{id}.{nonce}.{}A{}", &body[..3], &body[4..]),
            format!("{WITHOUT_ID}.{nonce}.{body}"),
            format!("v3.{id}.{nonce}.{body}"),
            format!("{version}.{id}.{nonce}.{body}."),
            format!("{version}.{id}.é.{body}"),
            String::new(),
        ] {
            if changed != sealed {
                assert_eq!(opened(&folder.sealer(), "settings:u1", &changed).await, None, "{changed}");
            }
        }
    }

    #[tokio::test]
    async fn what_the_version_before_sealed_still_opens() {
        // A server of the version before made this key file, and this row of settings.
        let folder = Folder::new();
        fs::write(folder.key(), "ofYNdcubWOPGuNbU8TFbdlZdzBSB4b12FizQrrMAHEI=").expect("written");
        let sealed = "v1.qmsaCgJx2J4uE12g.InDb9XkaI+uY7qO1rrp9UiJZYVcKyZ0hN+z4rcffpFECvUeP+x4b6YxNwl/7s+b9wXi7c07kYzCCyfAoXQjzEByNXaZ1kOd0BEjS8w==";
        let yesterdays = r#"{"llm_model":"openai/gpt-5","llm_api_key":"sk-of-yesterday"}"#;
        let before = folder.sealer();
        assert_eq!(opened(&before, "settings:local", sealed).await.as_deref(), Some(yesterdays));
        assert_eq!(opened(&before, "settings:other", sealed).await, None);
        assert_eq!(Sealer::rotate_file(&folder.key()).expect("rotated"), 2);
        assert_eq!(opened(&folder.sealer(), "settings:local", sealed).await.as_deref(), Some(yesterdays));
        assert_eq!(opened(&Sealer::ephemeral(), "settings:local", sealed).await, None);
    }

    #[tokio::test]
    async fn the_newest_key_seals_and_all_open() {
        let folder = Folder::new();
        let old = folder.sealer();
        let id = |sealed: &str| sealed.split('.').nth(1).expect("an id").to_owned();
        let mut all = vec![old.seal("p", &"0".into()).await.expect("sealed")];
        for number in 1..=3 {
            assert_eq!(Sealer::rotate_file(&folder.key()).expect("rotated"), number + 1);
            all.push(folder.sealer().seal("p", &number.to_string().into()).await.expect("sealed"));
        }
        let ids: std::collections::HashSet<String> = all.iter().map(|sealed| id(sealed)).collect();
        assert_eq!(ids.len(), 4, "each under a key of its own");
        for (number, sealed) in all.iter().enumerate() {
            assert_eq!(opened(&folder.sealer(), "p", sealed).await, Some(number.to_string()));
        }
        // A process that read the keys before seals under the one it knows, and soon reads them again when it meets another.
        assert_eq!(id(&old.seal("p", &"x".into()).await.expect("sealed")), id(&all[0]));
        assert_eq!(opened(&old, "p", &all[3]).await.as_deref(), Some("3"));
        assert_eq!(id(&old.seal("p", &"x".into()).await.expect("sealed")), id(&all[3]));
        Sealer::rotate_file(&folder.key()).expect("rotated");
        let newer = folder.sealer().seal("p", &"4".into()).await.expect("sealed");
        assert_eq!(opened(&old, "p", &newer).await, None, "read again a moment ago");
        old.0.keys.write().await.as_mut().expect("keys").again_at = Instant::now().checked_sub(READ_AGAIN_AFTER);
        assert_eq!(opened(&old, "p", &newer).await.as_deref(), Some("4"));
    }

    #[test]
    fn keys_are_as_many_as_are_allowed_and_whole() {
        let folder = Folder::new();
        assert!(Sealer::rotate_file(&folder.key()).is_err(), "there is none");
        let _made = folder.sealer();
        for _ in 1..MAX_KEYS {
            Sealer::rotate_file(&folder.key()).expect("rotated");
        }
        let before = fs::read_to_string(folder.key()).expect("keys");
        assert!(Sealer::rotate_file(&folder.key()).is_err(), "one too many");
        assert_eq!(fs::read_to_string(folder.key()).expect("keys"), before);
        for nonsense in ["", "\n", "x", "AAAA", &format!("{before}AAAA\n")] {
            fs::write(folder.key(), nonsense).expect("written");
            assert!(Sealer::from_file(&folder.key()).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn the_key_file_is_its_owners_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = Folder::new();
        let mode = || fs::metadata(folder.key()).expect("metadata").permissions().mode() & 0o777;
        let _sealer = folder.sealer();
        assert_eq!(mode(), 0o600);
        Sealer::rotate_file(&folder.key()).expect("rotated");
        assert_eq!(mode(), 0o600);
    }
}
