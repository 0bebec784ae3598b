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

/// The accepted signature algorithms. All are asymmetric, so that a public key can verify tokens and cannot sign them.
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
/// The accepted difference between clocks, in seconds.
const LEEWAY: u64 = 30;
/// The age at which keys are reread.
const FRESH: Duration = Duration::from_secs(3600);
/// The age at which keys become invalid: a key that the issuer has revoked must not stay valid because the issuer is unreachable.
pub const STALE: Duration = Duration::from_secs(24 * 3600);
/// The shortest time between two reads because of a token with an unknown key id: anyone can invent such ids, and there may be a thousand
/// processes.
pub const UNKNOWN_KEY_PAUSE: Duration = Duration::from_secs(60);
/// The shortest time before a failed read is repeated. Until then requests fail, unless there are older keys.
pub const FAILURE_PAUSE: Duration = Duration::from_secs(5);
/// The largest jitter: a random fraction of each pause that is added to it, so that processes do not all read at once.
const JITTER: f64 = 0.5;
/// The timeout of each of the two requests. The function has 10 s, so that it can respond even after two timeouts.
const TIMEOUT: Duration = Duration::from_secs(3);
/// The largest document of the issuer, in bytes.
const MAX_DOCUMENT: usize = 512 * 1024;
/// The longest `sub`, in bytes (OpenID Connect Core, 2).
const MAX_SUBJECT: usize = 255;

#[derive(Default)]
struct Keys {
    /// The keys of the last successful read, and its time.
    read: Option<(Arc<JwkSet>, Instant)>,
    /// The time of the last read, and whether it failed.
    tried: Option<(Instant, bool)>,
    /// The jitter of the current pauses, as a fraction of their length.
    jitter: f64,
}

/// A source of the current time.
pub type Clock = Arc<dyn Fn() -> Instant + Send + Sync>;

/// Verifies tokens. Keys are cached for an hour, and reread when a token has an unknown key id, at most once a minute.
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
    /// A verifier of the tokens of one issuer for one audience.
    #[must_use]
    pub fn new(config: OidcConfig) -> Self {
        Self::with_clock(config, Arc::new(Instant::now))
    }

    /// The same with another clock.
    #[must_use]
    pub fn with_clock(config: OidcConfig, clock: Clock) -> Self {
        Self { config, http: HttpClient::new(AddressPolicy::Any), keys: Mutex::default(), clock }
    }

    /// Verifies a token and returns its user; `None` when it is invalid.
    ///
    /// # Errors
    /// [`Error::Upstream`] when the issuer's keys cannot be read, and were not read within the last day.
    pub async fn user(&self, token: &str) -> Result<Option<UserId>> {
        let Ok(header) = decode_header(token) else { return Ok(None) };
        // Extensions in `crit` must be supported (RFC 7515, 4.1.11); this verifier supports none.
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
                tracing::info!(%error, "authorizer.token_rejected");
                return Ok(None);
            }
        };
        Ok((!subject.is_empty() && subject.len() <= MAX_SUBJECT).then(|| UserId::new(subject)))
    }

    /// Finds the key that a token names, or the only key for its algorithm.
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
            // Old keys are reread as soon as possible; an unknown key id, which may be made up, waits longer.
            let pause = match (failed, is_fresh) {
                (true, false) => FAILURE_PAUSE,
                (_, true) => UNKNOWN_KEY_PAUSE,
                (false, false) => Duration::ZERO,
            };
            if since(tried_at) < pause.mul_f64(1.0 + keys.jitter) {
                return match keys.read {
                    Some(_) => Ok(found),
                    None => Err(upstream("it did not respond a moment ago")),
                };
            }
        }
        let read = self.read_keys().await;
        keys.tried = Some((now, read.is_err()));
        keys.jitter = JITTER * shared::random::fraction();
        match read {
            Ok(set) => keys.read = Some((Arc::new(set), now)),
            // The previous keys stay valid.
            Err(error) if keys.read.is_some() => {
                tracing::warn!(error = %error.context(), "authorizer.keys_read_failed");
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
            return Err(upstream(format!("its document names the issuer {}", begin(&discovery.issuer))));
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
            return Err(upstream(format!("{url} returned status {}", answer.status)));
        }
        if !answer.is_whole {
            return Err(upstream(format!("{url} returned more than {MAX_DOCUMENT} bytes")));
        }
        // The message of the error itself could quote the document.
        serde_json::from_slice(&answer.body)
            .map_err(|error| upstream(format!("{url} returned an unexpected document (column {})", error.column())))
    }
}

/// Truncates a text that may be long.
fn begin(text: &str) -> String {
    text.chars().take(200).collect()
}

fn upstream(error: impl std::fmt::Display) -> Error {
    Error::Upstream {
        message: "The token issuer does not respond; try again later".into(),
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
