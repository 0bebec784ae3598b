//! A stub server for KMS: it creates and decrypts data keys for callers that send the right key id and encryption
//! context.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::StatusCode;
use serde_json::{Value, json};

use super::server::{Cut, Request, Server};

pub const KEY: &str = "alias/test";
/// `purpose` in the encryption context of every call. The template's policies require it as a condition.
pub const PURPOSE: &str = "openhands-secrets";

/// The server, with counters of its calls.
#[derive(Debug)]
pub struct Kms {
    server: Server,
    made: Arc<AtomicUsize>,
    decrypted: Arc<AtomicUsize>,
    disabled: Arc<AtomicBool>,
}

impl Kms {
    pub async fn start() -> Self {
        let (made, decrypted) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counters, disabled) = ((made.clone(), decrypted.clone()), Arc::new(AtomicBool::new(false)));
        let is_disabled = disabled.clone();
        let server = Server::start(move |request| {
            let (counters, disabled) = (counters.clone(), is_disabled.load(Ordering::SeqCst));
            async move {
                Ok::<_, Cut>(if disabled {
                    refused("DisabledException")
                } else {
                    answer(&request, &counters.0, &counters.1)
                })
            }
        })
        .await;
        Self { server, made, decrypted, disabled }
    }

    pub fn url(&self) -> String {
        self.server.url()
    }

    /// Sets whether the key is disabled, as an administrator can do.
    pub fn disable(&self, disabled: bool) {
        self.disabled.store(disabled, Ordering::SeqCst);
    }

    /// How many data keys were created and how many decrypted.
    pub fn asked(&self) -> (usize, usize) {
        (self.made.load(Ordering::SeqCst), self.decrypted.load(Ordering::SeqCst))
    }
}

/// The stub's encryption: this marker byte, then the key's bytes reversed.
const MARK: u8 = 0xA5;

fn answer(request: &Request, made: &AtomicUsize, decrypted: &AtomicUsize) -> Response {
    let asked = request.json();
    // Decryption does not need the key id: the ciphertext names the key.
    let names_it = match request.header("x-amz-target") {
        Some("TrentService.Decrypt") => asked["KeyId"].is_null() || asked["KeyId"] == KEY,
        _ => asked["KeyId"] == KEY,
    };
    if !names_it || asked["EncryptionContext"] != json!({"purpose": PURPOSE}) {
        return refused("AccessDeniedException");
    }
    match request.header("x-amz-target") {
        Some("TrentService.GenerateDataKey") => {
            made.fetch_add(1, Ordering::SeqCst);
            let plain: Vec<u8> = uuid::Uuid::new_v4().as_bytes().repeat(2);
            let mut encrypted = vec![MARK];
            encrypted.extend(plain.iter().rev());
            let (plain, encrypted) = (BASE64.encode(plain), BASE64.encode(encrypted));
            reply(StatusCode::OK, &json!({"KeyId": KEY, "Plaintext": plain, "CiphertextBlob": encrypted}))
        }
        Some("TrentService.Decrypt") => {
            decrypted.fetch_add(1, Ordering::SeqCst);
            let encrypted = BASE64.decode(asked["CiphertextBlob"].as_str().unwrap_or_default()).unwrap_or_default();
            let Some((&MARK, reversed)) = encrypted.split_first() else {
                return refused("InvalidCiphertextException");
            };
            let plain: Vec<u8> = reversed.iter().rev().copied().collect();
            reply(StatusCode::OK, &json!({"KeyId": KEY, "Plaintext": BASE64.encode(plain)}))
        }
        _ => refused("UnsupportedOperationException"),
    }
}

fn refused(kind: &str) -> Response {
    reply(StatusCode::BAD_REQUEST, &json!({"__type": kind, "message": "refused"}))
}

fn reply(status: StatusCode, body: &Value) -> Response {
    Response::builder()
        .status(status)
        .header("content-type", "application/x-amz-json-1.1")
        .body(body.to_string().into())
        .expect("a response")
}
