//! Tokens of an OpenID Connect issuer: JWTs (RFC 7519, RFC 8725) that are signed with a key of its JWKS.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use reqwest::Url;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use shared::config::OidcConfig;
use shared::error::{Error, Result};
use shared::outbound::LazyClient;
use shared::user::UserId;
use tokio::sync::Mutex;

/// What issuers sign with. None of them can be verified with a key that is public and made with it, too.
const ALGORITHMS: [Algorithm; 9] = [
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
    Algorithm::ES256,
    Algorithm::ES384,
    Algorithm::EdDSA,
];
/// How far clocks may be apart, in seconds.
const LEEWAY: u64 = 30;
/// Keys are read again after this time.
const FRESH: Duration = Duration::from_secs(3600);
/// How long keys hold while the issuer does not answer.
const STALE: Duration = Duration::from_secs(24 * 3600);
/// The least time between two tries: a token with a made-up key id must not cause more.
const PAUSE: Duration = Duration::from_secs(10);
/// For each of the two requests.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes.
const MAX_DOCUMENT: usize = 512 * 1024;
/// The longest `sub`, in bytes (OpenID Connect Core, 2).
const MAX_SUBJECT: usize = 255;

#[derive(Debug, Default)]
struct Keys {
    set: Option<Arc<JwkSet>>,
    read_at: Option<Instant>,
    tried_at: Option<Instant>,
}

/// Verifies tokens. Keys are kept for an hour, and read again when a token names one that is not among them.
#[derive(Debug)]
pub struct Tokens {
    config: OidcConfig,
    http: LazyClient,
    keys: Mutex<Keys>,
}

#[derive(Deserialize)]
struct Claims {
    sub: String,
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

impl Tokens {
    /// For tokens of one issuer and one audience.
    #[must_use]
    pub fn new(config: OidcConfig) -> Self {
        let http =
            LazyClient::new(|| reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).timeout(TIMEOUT));
        Self { config, http, keys: Mutex::default() }
    }

    /// Whose token it is; `None` when it does not hold.
    ///
    /// # Errors
    /// [`Error::Upstream`] when the issuer's keys have never been read and cannot be read now.
    pub async fn user(&self, token: &str) -> Result<Option<UserId>> {
        let Ok(header) = decode_header(token) else { return Ok(None) };
        // What `crit` names must be understood (RFC 7515, 4.1.11), and nothing is.
        if !ALGORITHMS.contains(&header.alg) || has_critical_extension(token) {
            return Ok(None);
        }
        let Some(key) = self.key(header.kid.as_deref(), header.alg).await? else { return Ok(None) };
        let Ok(key) = DecodingKey::from_jwk(&key) else { return Ok(None) };
        let mut validation = Validation::new(header.alg);
        validation.leeway = LEEWAY;
        validation.validate_nbf = true;
        validation.set_issuer(&[&self.config.issuer]);
        validation.set_audience(&[&self.config.audience]);
        validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
        let subject = match decode::<Claims>(token, &key, &validation) {
            Ok(token) => token.claims.sub,
            Err(error) => {
                tracing::info!(%error, "authorizer.token_refused");
                return Ok(None);
            }
        };
        Ok((!subject.is_empty() && subject.len() <= MAX_SUBJECT).then(|| UserId::new(subject)))
    }

    /// The key that a token names, or the only one there is for its algorithm.
    async fn key(&self, id: Option<&str>, algorithm: Algorithm) -> Result<Option<Jwk>> {
        let mut keys = self.keys.lock().await;
        let find = |keys: &Keys| keys.set.as_deref().and_then(|set| choose(set, id, algorithm).cloned());
        let is_fresh = keys.read_at.is_some_and(|at| at.elapsed() < FRESH);
        let found = find(&keys);
        let may_try = keys.tried_at.is_none_or(|at| at.elapsed() >= PAUSE);
        if (is_fresh && found.is_some()) || (!may_try && keys.set.is_some()) {
            return Ok(found);
        }
        keys.tried_at = Some(Instant::now());
        match self.read_keys().await {
            Ok(set) => {
                keys.set = Some(Arc::new(set));
                keys.read_at = Some(Instant::now());
            }
            // Those that were read before still hold.
            Err(error) if keys.read_at.is_some_and(|at| at.elapsed() < STALE) => {
                tracing::warn!(error = %error.context(), "authorizer.keys_not_read");
            }
            Err(error) => return Err(error),
        }
        Ok(find(&keys))
    }

    async fn read_keys(&self) -> Result<JwkSet> {
        let issuer = &self.config.issuer;
        let discovery: Discovery =
            self.read(&format!("{}/.well-known/openid-configuration", issuer.trim_end_matches('/'))).await?;
        if discovery.issuer != *issuer {
            return Err(upstream(format!("it calls itself {}", discovery.issuer)));
        }
        let scheme = |url: &str| Url::parse(url).map(|url| url.scheme().to_owned()).ok();
        if scheme(&discovery.jwks_uri) != Some("https".into()) && scheme(&discovery.jwks_uri) != scheme(issuer) {
            return Err(upstream(format!("its keys are at {}", discovery.jwks_uri)));
        }
        self.read(&discovery.jwks_uri).await
    }

    async fn read<T: DeserializeOwned>(&self, url: &str) -> Result<T> {
        let mut answer = self
            .http
            .get()
            .map_err(Error::internal)?
            .get(url)
            .send()
            .await
            .map_err(upstream)?
            .error_for_status()
            .map_err(upstream)?;
        if !answer.status().is_success() {
            return Err(upstream(format!("{url} answered {}", answer.status())));
        }
        let mut document = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(upstream)? {
            document.extend_from_slice(&chunk);
            if document.len() > MAX_DOCUMENT {
                return Err(upstream(format!("{url} answered more than {MAX_DOCUMENT} bytes")));
            }
        }
        serde_json::from_slice(&document).map_err(upstream)
    }
}

fn upstream(error: impl std::fmt::Display) -> Error {
    Error::Upstream {
        message: "The token's issuer cannot be asked now".into(),
        context: format!("OIDC issuer: {error}"),
    }
}

fn choose<'a>(set: &'a JwkSet, id: Option<&str>, algorithm: Algorithm) -> Option<&'a Jwk> {
    let fits = |key: &&Jwk| {
        let common = &key.common;
        let is_for_signatures = common.public_key_use.as_ref().is_none_or(|wanted| *wanted == PublicKeyUse::Signature);
        let named = common.key_algorithm.map(|algorithm| algorithm.to_string());
        is_for_signatures && named.is_none_or(|named| named.parse().is_ok_and(|named: Algorithm| named == algorithm))
    };
    match id {
        Some(id) => set.keys.iter().filter(fits).find(|key| key.common.key_id.as_deref() == Some(id)),
        None => {
            let mut fitting = set.keys.iter().filter(fits);
            fitting.next().filter(|_| fitting.next().is_none())
        }
    }
}

fn has_critical_extension(token: &str) -> bool {
    use base64::Engine as _;
    let header = token.split('.').next().unwrap_or_default();
    let header = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(header).unwrap_or_default();
    serde_json::from_slice::<serde_json::Value>(&header).is_ok_and(|header| header.get("crit").is_some())
}
