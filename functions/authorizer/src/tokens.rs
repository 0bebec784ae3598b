//! Tokens of an OpenID Connect issuer: JWTs (RFC 7519, RFC 8725) that are signed with a key of its JWKS.

use std::sync::Arc;
use std::time::{Duration, Instant};

use jsonwebtoken::jwk::{Jwk, JwkSet, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode, decode_header};
use reqwest::{Method, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use shared::config::OidcConfig;
use shared::error::{Error, Result};
use shared::http_client::{AddressPolicy, HttpClient};
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
/// Keys that were read longer ago hold no more: whoever the issuer has revoked since must not get in because it cannot be reached.
pub const STALE: Duration = Duration::from_secs(24 * 3600);
/// The least time between two readings because a token names a key that is not among those that were read: anybody can make such
/// names up, and there may be a thousand processes.
pub const UNKNOWN_KEY_PAUSE: Duration = Duration::from_secs(60);
/// The least time before a reading that has failed is repeated. Until then the failure is the answer, where there are no keys.
pub const FAILURE_PAUSE: Duration = Duration::from_secs(5);
/// To each pause a random part of it is added, up to this fraction, so that processes do not all read at once.
const JITTER: f64 = 0.5;
/// For each of the two requests. The function has 10 s, so that it answers even when both take as long as they may.
const TIMEOUT: Duration = Duration::from_secs(3);
/// Bytes.
const MAX_DOCUMENT: usize = 512 * 1024;
/// The longest `sub`, in bytes (OpenID Connect Core, 2).
const MAX_SUBJECT: usize = 255;

#[derive(Default)]
struct Keys {
    /// Those that were read last, and when.
    read: Option<(Arc<JwkSet>, Instant)>,
    /// When they were last asked for, and whether that failed.
    tried: Option<(Instant, bool)>,
    /// How much longer than their least time pauses are, as a fraction.
    jitter: f64,
}

/// Tells the time.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

/// Verifies tokens. Keys are kept for an hour, and read again when a token names one that is not among them, though not more often
/// than once a minute.
pub struct Tokens {
    config: OidcConfig,
    http: HttpClient,
    keys: Mutex<Keys>,
    clock: Clock,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Tokens").field("config", &self.config).finish_non_exhaustive()
    }
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
        Self::with_clock(config, Arc::new(Instant::now))
    }

    /// The same with another clock.
    #[must_use]
    pub fn with_clock(config: OidcConfig, clock: Clock) -> Self {
        Self { config, http: HttpClient::new(AddressPolicy::Any), keys: Mutex::default(), clock }
    }

    /// Whose token it is; `None` when it does not hold.
    ///
    /// # Errors
    /// [`Error::Upstream`] when the issuer's keys cannot be read now, and have not been for a day.
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
        let now = (self.clock)();
        let mut keys = self.keys.lock().await;
        let since = |at: Instant| now.saturating_duration_since(at);
        keys.read.take_if(|(_, read_at)| since(*read_at) >= STALE);
        let find = |keys: &Keys| keys.read.as_ref().and_then(|(set, _)| choose(set, id, algorithm).cloned());
        let found = find(&keys);
        let is_fresh = keys.read.as_ref().is_some_and(|(_, read_at)| since(*read_at) < FRESH);
        if is_fresh && found.is_some() {
            return Ok(found);
        }
        if let Some((tried_at, failed)) = keys.tried {
            // Keys that are no longer fresh are read again as soon as they can be; a name that may be made up waits longer.
            let pause = match (failed, is_fresh) {
                (true, false) => FAILURE_PAUSE,
                (_, true) => UNKNOWN_KEY_PAUSE,
                (false, false) => Duration::ZERO,
            };
            if since(tried_at) < pause.mul_f64(1.0 + keys.jitter) {
                return match keys.read {
                    Some(_) => Ok(found),
                    None => Err(upstream("it could not be asked a moment ago")),
                };
            }
        }
        let read = self.read_keys().await;
        keys.tried = Some((now, read.is_err()));
        keys.jitter = rand::random_range(0.0..JITTER);
        match read {
            Ok(set) => keys.read = Some((Arc::new(set), now)),
            // Those that were read before still hold.
            Err(error) if keys.read.is_some() => {
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
            return Err(upstream(format!("it calls itself {}", begin(&discovery.issuer))));
        }
        let scheme = |url: &str| Url::parse(url).map(|url| url.scheme().to_owned()).ok();
        if scheme(&discovery.jwks_uri) != Some("https".into()) && scheme(&discovery.jwks_uri) != scheme(issuer) {
            return Err(upstream(format!("its keys are at {}", begin(&discovery.jwks_uri))));
        }
        self.read(&discovery.jwks_uri).await
    }

    async fn read<T: DeserializeOwned>(&self, url: &str) -> Result<T> {
        let request = self.http.request(Method::GET, url).map_err(Error::internal)?;
        let answer = request.send(TIMEOUT, |_| MAX_DOCUMENT).await.map_err(upstream)?;
        if !answer.status.is_success() {
            return Err(upstream(format!("{url} answered {}", answer.status)));
        }
        if !answer.is_whole {
            return Err(upstream(format!("{url} answered more than {MAX_DOCUMENT} bytes")));
        }
        // The error would quote the document.
        serde_json::from_slice(&answer.body)
            .map_err(|error| upstream(format!("{url} answered something else (column {})", error.column())))
    }
}

/// The beginning of a text that may be long.
fn begin(text: &str) -> String {
    text.chars().take(200).collect()
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
