//! SHA-256 digests as text.

use sha2::{Digest as _, Sha256};

/// The SHA-256 of a text in lower-case hex. Session keys and API keys are looked up by it, so that they are not stored.
#[must_use]
pub fn sha256_hex(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

/// Bytes in lower-case hex.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut hex, byte| {
        hex += &format!("{byte:02x}");
        hex
    })
}
