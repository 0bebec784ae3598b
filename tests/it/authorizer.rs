//! The Lambda authorizer: it accepts API keys and the OIDC issuer's JWTs, and refuses forged, expired or revoked
//! credentials.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use authorizer::tokens::{FAILURE_PAUSE, STALE, UNKNOWN_KEY_PAUSE};
use authorizer::{Authorizer, Refusal};
use aws_lc_rs::encoding::{AsDer as _, Pkcs8V1Der};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use http::StatusCode;
use jsonwebtoken::jwk::{AlgorithmParameters, Jwk, PublicKeyUse};
use jsonwebtoken::{Algorithm, EncodingKey, Header, encode};
use local::api_keys;
use local::options::{ApiKeyCommand, TargetOptions};
use secrecy::{ExposeSecret as _, SecretString};
use serde_json::{Value, json};
use shared::aws::Aws;
use shared::clock::Time;
use shared::config::{AuthorizerConfig, OidcConfig};
use shared::user::UserId;
use shared::user::api_key::{ApiKeyStore, MAX_KEYS};
use tempfile::TempDir;
use uuid::Uuid;

use crate::support::engines::{Engines, skipped_on_ministack};
use crate::support::fault_proxy::FaultProxy;
use crate::support::server::{Server, json as json_answer, raw};

pub const AUDIENCE: &str = "openhands";

/// A signing key of an issuer.
pub struct Signer {
    id: &'static str,
    algorithm: Algorithm,
    key: EncodingKey,
}

impl Signer {
    pub fn ec(id: &'static str) -> Self {
        let random = aws_lc_rs::rand::SystemRandom::new();
        let pair = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
        Self { id, algorithm: Algorithm::ES256, key: EncodingKey::from_ec_der(pair.as_ref()) }
    }

    fn ed(id: &'static str) -> Self {
        let random = aws_lc_rs::rand::SystemRandom::new();
        let pair = Ed25519KeyPair::generate_pkcs8v1(&random).expect("a key");
        Self { id, algorithm: Algorithm::EdDSA, key: EncodingKey::from_ed_der(pair.as_ref()) }
    }

    pub fn rsa(id: &'static str) -> Self {
        let pair = KeyPair::generate(KeySize::Rsa2048).expect("a key");
        let pkcs8: Pkcs8V1Der<'_> = pair.as_der().expect("its form");
        // The first 26 bytes identify the algorithm; the key in PKCS #1 format follows.
        Self { id, algorithm: Algorithm::RS256, key: EncodingKey::from_rsa_der(&pkcs8.as_ref()[26..]) }
    }

    fn jwk(&self) -> Jwk {
        let mut jwk = Jwk::from_encoding_key(&self.key, self.algorithm).expect("a public key");
        jwk.common.key_id = Some(self.id.to_owned());
        jwk.common.public_key_use = Some(PublicKeyUse::Signature);
        jwk
    }

    pub fn sign(&self, claims: &Value) -> String {
        self.sign_with(&Header { kid: Some(self.id.to_owned()), ..Header::new(self.algorithm) }, claims)
    }

    fn sign_with(&self, header: &Header, claims: &Value) -> String {
        encode(header, claims, &self.key).expect("a token")
    }
}

/// A stub OIDC issuer whose keys (JWKS) a test can change, and which counts how often they are requested.
pub struct Issuer {
    pub server: Server,
    keys: Arc<Mutex<Value>>,
    asked: Arc<AtomicUsize>,
}

impl Issuer {
    pub async fn start() -> Self {
        let (keys, asked) = (Arc::new(Mutex::new(json!({"keys": []}))), Arc::new(AtomicUsize::new(0)));
        let (served, counted) = (keys.clone(), asked.clone());
        let http = Server::start(move |request| {
            let base = format!("http://{}", request.header("host").expect("a host"));
            let answer = match request.path.as_str() {
                "/.well-known/openid-configuration" => {
                    json_answer(StatusCode::OK, &json!({"issuer": base, "jwks_uri": format!("{base}/keys")}))
                }
                "/keys" => {
                    counted.fetch_add(1, Ordering::Relaxed);
                    match &*served.lock().expect("keys") {
                        Value::Null => raw(StatusCode::SERVICE_UNAVAILABLE, "text/plain", "not now"),
                        keys => json_answer(StatusCode::OK, keys),
                    }
                }
                _ => raw(StatusCode::NOT_FOUND, "text/plain", ""),
            };
            async move { Ok(answer) }
        })
        .await;
        Self { server: http, keys, asked }
    }

    pub fn publish(&self, signers: &[&Signer]) {
        let keys: Vec<Jwk> = signers.iter().map(|signer| signer.jwk()).collect();
        *self.keys.lock().expect("keys") = json!({"keys": keys});
    }

    fn fail(&self) {
        *self.keys.lock().expect("keys") = Value::Null;
    }

    pub fn claims(&self, subject: &str) -> Value {
        let now = Time::now().unix_seconds();
        json!({"iss": self.server.url(), "aud": AUDIENCE, "sub": subject, "iat": now, "exp": now + 60})
    }

    /// The claims of a user, with changes; `null` removes a claim.
    fn claims_with(&self, changes: &Value) -> Value {
        let mut claims = self.claims("user-one");
        for (name, value) in changes.as_object().expect("an object") {
            match value {
                Value::Null => drop(claims.as_object_mut().expect("an object").remove(name)),
                value => claims[name] = value.clone(),
            }
        }
        claims
    }
}

/// Invalid tokens of the issuer, correctly signed with this key: wrong claims about user, time or audience.
pub fn invalid(issuer: &Issuer, signer: &Signer) -> Vec<(String, String)> {
    let now = Time::now().unix_seconds();
    let claims = [
        json!({"exp": now - 60}),
        json!({"exp": null}),
        json!({"exp": "never"}),
        json!({"nbf": now + 60}),
        json!({"aud": "others"}),
        json!({"aud": null}),
        json!({"aud": []}),
        json!({"iss": "https://accounts.example.com"}),
        json!({"iss": format!("{}/", issuer.server.url())}),
        json!({"iss": null}),
        json!({"sub": null}),
        json!({"sub": ""}),
        json!({"sub": 7}),
        json!({"sub": "x".repeat(256)}),
        // The local user does not exist on AWS.
        json!({"sub": "local"}),
    ];
    claims.iter().map(|changes| (changes.to_string(), signer.sign(&issuer.claims_with(changes)))).collect()
}

/// Forged tokens that look like those of the issuer, whose real keys are `rsa` and `ec`.
pub fn forged(issuer: &Issuer, rsa: &Signer, ec: &Signer) -> Vec<(String, String)> {
    let stranger = Signer::ec("two");
    let good = ec.sign(&issuer.claims("user-one"));
    let [head, body, signature] = good.split('.').collect::<Vec<_>>()[..] else { panic!("three parts") };
    let part = |value: &Value| BASE64URL.encode(value.to_string());
    let unsigned = part(&json!({"alg": "none", "typ": "JWT"}));
    let other = part(&issuer.claims("another"));
    let hmac = |secret: &[u8], kid: &str| {
        let header = Header { kid: Some(kid.to_owned()), ..Header::new(Algorithm::HS256) };
        encode(&header, &issuer.claims("user-one"), &EncodingKey::from_secret(secret)).expect("a token")
    };
    let document = issuer.keys.lock().expect("keys").to_string();
    let AlgorithmParameters::RSA(public) = rsa.jwk().algorithm else { panic!("an RSA key") };
    let critical = part(&json!({"alg": "ES256", "kid": "two", "crit": ["exp"]}));
    let header = |signer: &Signer, algorithm, kid: Option<&str>| {
        signer.sign_with(&Header { kid: kid.map(str::to_owned), ..Header::new(algorithm) }, &issuer.claims("user-one"))
    };
    let forged = [
        ("alg none", format!("{unsigned}.{body}.")),
        ("alg none with the signature", format!("{unsigned}.{body}.{signature}")),
        ("other claims", format!("{head}.{other}.{signature}")),
        ("no signature", format!("{head}.{body}.")),
        ("two parts", format!("{head}.{body}")),
        ("HS256 with the public key", hmac(public.n.as_bytes(), "one")),
        ("HS256 with the public key's bytes", hmac(&BASE64URL.decode(&public.n).expect("bytes"), "one")),
        ("HS256 with the issuer's document", hmac(document.as_bytes(), "one")),
        ("an extension that must be understood", format!("{critical}.{body}.{signature}")),
        ("another key with the key id of the issuer's", stranger.sign(&issuer.claims("user-one"))),
        ("the name of another of its keys", header(ec, Algorithm::ES256, Some("one"))),
        ("another algorithm than the key is for", header(rsa, Algorithm::PS256, Some("one"))),
        ("nothing", ".".to_owned()),
        ("dots", "..".to_owned()),
        ("no ASCII", "é.é.é".to_owned()),
    ];
    forged.map(|(what, token)| (what.to_owned(), token)).into()
}

struct Fixture {
    keys: ApiKeyStore,
    config: AuthorizerConfig,
    authorizer: Authorizer,
    engines: Engines,
    folder: TempDir,
}

impl Fixture {
    async fn new(issuer: Option<&Issuer>) -> Self {
        let folder = TempDir::new().expect("a folder");
        let engines = Engines::start(folder.path()).await;
        let aws = Aws::new(&engines.sdk_config().await);
        let names = engines.names("authorizer-");
        schema::make_all(&aws, &names, "authorizer-").await.expect("a schema");
        let keys = ApiKeyStore::new(aws.dynamodb.clone(), names.users.clone());
        let oidc = issuer.map(|issuer| OidcConfig { issuer: issuer.server.url(), audience: AUDIENCE.into() });
        let config = AuthorizerConfig { users: names.users, oidc };
        let authorizer = Authorizer::new(&config, keys.clone());
        Self { keys, config, authorizer, engines, folder }
    }

    /// The user that a request with this header is authorized as; `None` if the response is 401.
    async fn user(&self, header: &str, value: &str) -> Option<String> {
        let arn = "arn:aws:execute-api:eu-central-1:123456789012:abcdef/live/GET/api/v1/app-conversations";
        let event = json!({"type": "REQUEST", "methodArn": arn, "headers": {header: value, "X-User-Id": "user-two"}});
        match self.authorizer.handle(event).await {
            Ok(answer) => {
                let statement = &answer["policyDocument"]["Statement"];
                let allowed = json!([{"Action": "execute-api:Invoke", "Effect": "Allow", "Resource": arn}]);
                assert_eq!(*statement, allowed);
                assert_eq!(answer["principalId"], answer["context"]["user_id"]);
                Some(answer["context"]["user_id"].as_str().expect("text").to_owned())
            }
            Err(refusal @ Refusal::Unauthorized) => {
                // API Gateway responds with 401 to this text, and with 500 to every other one.
                assert_eq!(refusal.to_string(), "Unauthorized");
                None
            }
            Err(refusal) => panic!("{refusal:?}"),
        }
    }

    async fn bearer(&self, token: &str) -> Option<String> {
        self.user("Authorization", &format!("Bearer {token}")).await
    }
}

#[tokio::test]
async fn tokens_of_the_issuer_are_accepted_and_invalid_or_forged_ones_are_refused() {
    let issuer = Issuer::start().await;
    let (rsa, ec, ed) = (Signer::rsa("one"), Signer::ec("two"), Signer::ed("three"));
    issuer.publish(&[&rsa, &ec, &ed]);
    let fixture = Fixture::new(Some(&issuer)).await;
    for signer in [&rsa, &ec, &ed] {
        let token = signer.sign(&issuer.claims("user-one"));
        for (header, value) in [
            ("Authorization", format!("Bearer {token}")),
            ("authorization", format!("bearer {token}")),
            ("X-Access-Token", token.clone()),
            ("x-session-api-key", token.clone()),
        ] {
            assert_eq!(fixture.user(header, &value).await.as_deref(), Some("user-one"), "{header}");
        }
        assert_eq!(fixture.user("Cookie", &token).await, None);
    }
    assert_eq!(issuer.asked.load(Ordering::Relaxed), 1, "keys are cached");

    // Clocks differ by a few seconds; an audience may be one of several.
    let now = Time::now().unix_seconds();
    for changes in [
        json!({"exp": now - 10}),
        json!({"nbf": now + 10}),
        json!({"nbf": now - 10}),
        json!({"aud": ["others", AUDIENCE]}),
        json!({"sub": "x".repeat(255)}),
    ] {
        assert!(fixture.bearer(&ec.sign(&issuer.claims_with(&changes))).await.is_some(), "{changes}");
    }
    for (what, token) in invalid(&issuer, &ec).into_iter().chain(forged(&issuer, &rsa, &ec)) {
        assert_eq!(fixture.bearer(&token).await, None, "{what}");
    }
    let header = |signer: &Signer, algorithm, kid: Option<&str>| {
        signer.sign_with(&Header { kid: kid.map(str::to_owned), ..Header::new(algorithm) }, &issuer.claims("user-one"))
    };
    // With several keys a token must name its key, unless only one fits the algorithm.
    assert_eq!(fixture.bearer(&header(&ec, Algorithm::ES256, None)).await.as_deref(), Some("user-one"));
    assert_eq!(issuer.asked.load(Ordering::Relaxed), 1, "refused tokens cause no request for keys");
    fixture.engines.shutdown().await;
}

/// A clock that a test sets forward.
#[derive(Clone)]
struct TestClock(Instant, Arc<AtomicU64>);

impl TestClock {
    fn new() -> Self {
        Self(Instant::now(), Arc::default())
    }

    fn advance(&self, by: Duration) {
        self.1.fetch_add(u64::try_from(by.as_millis()).expect("milliseconds"), Ordering::SeqCst);
    }

    fn as_clock(&self) -> authorizer::tokens::Clock {
        let clock = self.clone();
        Arc::new(move || clock.0 + Duration::from_millis(clock.1.load(Ordering::SeqCst)))
    }
}

/// The authorizer's decision on a token.
async fn verdict(authorizer: &Authorizer, token: &str) -> &'static str {
    let event = json!({"methodArn": "arn", "headers": {"X-Access-Token": token}});
    match authorizer.handle(event).await {
        Ok(_) => "accepted",
        Err(Refusal::Unauthorized) => "refused",
        Err(refusal @ Refusal::Unknown(_)) => {
            // Without keys the authorizer cannot decide whether a token is valid, so the response is not 401.
            assert_ne!(refusal.to_string(), "Unauthorized");
            "unknown"
        }
    }
}

/// A pause with the largest possible jitter.
fn at_most(pause: Duration) -> Duration {
    pause.mul_f64(1.5)
}

#[tokio::test]
async fn jwks_is_requested_again_after_a_key_rotation_but_at_most_once_a_minute() {
    let issuer = Issuer::start().await;
    let (old, new) = (Signer::ec("old"), Signer::ec("new"));
    issuer.publish(&[&old]);
    let mut fixture = Fixture::new(Some(&issuer)).await;
    let clock = TestClock::new();
    let authorizer = Authorizer::with_clock(&fixture.config, fixture.keys.clone(), clock.as_clock());
    let asked = || issuer.asked.load(Ordering::Relaxed);
    let [olds, news] = [&old, &new].map(|signer| {
        let mut claims = issuer.claims("user-one");
        claims["exp"] = json!(Time::now().unix_seconds() + 10_000);
        signer.sign(&claims)
    });
    assert_eq!(verdict(&authorizer, &olds).await, "accepted");
    for _ in 0..5 {
        assert_eq!(verdict(&authorizer, &news).await, "refused");
    }
    clock.advance(UNKNOWN_KEY_PAUSE.mul_f64(0.9));
    assert_eq!(verdict(&authorizer, &news).await, "refused");
    assert_eq!(asked(), 1, "not again within a minute");
    clock.advance(at_most(UNKNOWN_KEY_PAUSE));
    issuer.publish(&[&old, &new]);
    assert_eq!(verdict(&authorizer, &news).await, "accepted");
    assert_eq!(asked(), 2);
    // However many unknown key ids callers send within a minute, the keys are requested once.
    clock.advance(at_most(UNKNOWN_KEY_PAUSE));
    for number in 0..20 {
        let header = Header { kid: Some(format!("made up {number}")), ..Header::new(Algorithm::ES256) };
        assert_eq!(verdict(&authorizer, &new.sign_with(&header, &issuer.claims("user-one"))).await, "refused");
    }
    assert_eq!(asked(), 3);
    // An authorizer that starts later has the new key.
    fixture.authorizer = Authorizer::new(&fixture.config, fixture.keys.clone());
    assert!(fixture.bearer(&news).await.is_some());

    // An issuer whose metadata names another issuer.
    let oidc = OidcConfig { issuer: format!("{}/tenant", issuer.server.url()), audience: AUDIENCE.into() };
    let other = Authorizer::new(&AuthorizerConfig { oidc: Some(oidc), ..fixture.config.clone() }, fixture.keys.clone());
    assert_eq!(verdict(&other, &olds).await, "unknown");
    fixture.engines.shutdown().await;
}

#[tokio::test]
async fn cached_jwks_is_valid_for_a_day_while_the_issuer_fails() {
    let issuer = Issuer::start().await;
    let signer = Signer::ec("one");
    issuer.fail();
    let fixture = Fixture::new(Some(&issuer)).await;
    let clock = TestClock::new();
    let authorizer = Authorizer::with_clock(&fixture.config, fixture.keys.clone(), clock.as_clock());
    let asked = || issuer.asked.load(Ordering::Relaxed);
    let mut claims = issuer.claims("user-one");
    claims["exp"] = json!(Time::now().unix_seconds() + 10_000);
    let token = signer.sign(&claims);
    // Keys are not requested again for each request while the issuer fails, but after a short pause.
    for _ in 0..5 {
        assert_eq!(verdict(&authorizer, &token).await, "unknown");
    }
    assert_eq!(asked(), 1);
    issuer.publish(&[&signer]);
    clock.advance(at_most(FAILURE_PAUSE));
    assert_eq!(verdict(&authorizer, &token).await, "accepted");
    // Keys are requested again after an hour; while that fails the cached ones stay valid.
    issuer.fail();
    clock.advance(Duration::from_secs(3600));
    assert_eq!(verdict(&authorizer, &token).await, "accepted");
    let before = asked();
    assert_eq!(verdict(&authorizer, &token).await, "accepted");
    assert_eq!(asked(), before, "keys are not requested for each request");
    clock.advance(STALE.checked_sub(Duration::from_secs(3601)).expect("a day is longer"));
    assert_eq!(verdict(&authorizer, &token).await, "accepted");
    // A day after the last success they expire, also between two attempts.
    clock.advance(Duration::from_secs(2));
    for _ in 0..3 {
        assert_eq!(verdict(&authorizer, &token).await, "unknown");
    }
    clock.advance(at_most(FAILURE_PAUSE));
    assert_eq!(verdict(&authorizer, &token).await, "unknown");
    issuer.publish(&[&signer]);
    clock.advance(at_most(FAILURE_PAUSE));
    assert_eq!(verdict(&authorizer, &token).await, "accepted");
    fixture.engines.shutdown().await;
}

#[tokio::test]
async fn api_keys_are_accepted_until_revoked_and_never_stored_in_plain_text() {
    let fixture = Fixture::new(None).await;
    let (ann, bob) = (UserId::new("ann"), UserId::new("bob"));
    let (key, secret) = fixture.keys.create(&ann, " a robot ").await.expect("a key");
    let (_, bobs) = fixture.keys.create(&bob, "another").await.expect("a key");
    assert_eq!((key.name.as_str(), fixture.keys.list(&ann).await.expect("keys")), ("a robot", vec![key.clone()]));
    for header in ["Authorization", "X-Access-Token", "X-Session-API-Key"] {
        let value = |secret: &SecretString| match header {
            "Authorization" => format!("Bearer {}", secret.expose_secret()),
            _ => secret.expose_secret().to_owned(),
        };
        assert_eq!(fixture.user(header, &value(&secret)).await.as_deref(), Some("ann"), "{header}");
        assert_eq!(fixture.user(header, &value(&bobs)).await.as_deref(), Some("bob"), "{header}");
    }
    let other = format!("oh-{}", shared::id::random_base62(43));
    for wrong in
        ["", "x", &other, &secret.expose_secret().to_lowercase(), &format!("{} ", &secret.expose_secret()[..45])]
    {
        assert_eq!(fixture.bearer(wrong).await, None, "{wrong}");
    }
    // Without a configured issuer no JWT is accepted.
    let signer = Signer::ec("any");
    let claims = json!({"iss": "", "aud": AUDIENCE, "sub": "ann", "exp": Time::now().unix_seconds() + 60});
    assert_eq!(fixture.bearer(&signer.sign(&claims)).await, None);

    // Another user cannot revoke the key.
    assert!(!fixture.keys.revoke(&bob, key.id).await.expect("the store"));
    assert!(!fixture.keys.revoke(&ann, Uuid::new_v4()).await.expect("the store"));
    assert_eq!(fixture.bearer(secret.expose_secret()).await.as_deref(), Some("ann"));
    let (one, two) = tokio::join!(fixture.keys.revoke(&ann, key.id), fixture.keys.revoke(&ann, key.id));
    assert_eq!([one.expect("the store"), two.expect("the store")].iter().filter(|revoked| **revoked).count(), 1);
    assert_eq!(fixture.bearer(secret.expose_secret()).await, None, "revoked");
    assert_eq!(fixture.keys.list(&ann).await.expect("keys"), []);
    assert_eq!(fixture.bearer(bobs.expose_secret()).await.as_deref(), Some("bob"));

    for name in ["", "  ", &"x".repeat(101)] {
        let refused = fixture.keys.create(&ann, name).await.expect_err("no name");
        assert!(matches!(refused, shared::Error::Refused(_)), "{refused:?}");
    }
    for number in 0..MAX_KEYS {
        fixture.keys.create(&ann, &format!("key {number}")).await.expect("a key");
    }
    let refused = fixture.keys.create(&ann, "one too many").await.expect_err("too many");
    assert!(refused.to_string().contains("revoke one"), "{refused}");

    let folder = fixture.folder.path().to_owned();
    fixture.engines.shutdown().await;
    if skipped_on_ministack("what is in the embedded store's file") {
        return;
    }
    let stored = std::fs::read(folder.join("dynamodb.sqlite")).expect("the store");
    let holds = |text: &str| stored.windows(text.len()).any(|window| window == text.as_bytes());
    assert!(holds("another"), "the file contains the rows of keys");
    assert!(!holds(bobs.expose_secret()) && !holds(secret.expose_secret()), "keys are stored in plain text");
}

#[tokio::test]
async fn store_failure_is_an_error_and_not_a_refusal() {
    let mut fixture = Fixture::new(None).await;
    let (_, secret) = fixture.keys.create(&UserId::new("ann"), "a key").await.expect("a key");
    let event = json!({"methodArn": "arn", "headers": {"X-Access-Token": secret.expose_secret()}});
    let way = FaultProxy::new().to(&fixture.engines.dynamodb).await;
    let network = fixture.engines.network_sdk_config().await;
    let dynamodb = aws_sdk_dynamodb::config::Builder::from(&network).endpoint_url(way.url()).build();
    let keys = ApiKeyStore::new(aws_sdk_dynamodb::Client::from_conf(dynamodb), fixture.config.users.clone());
    fixture.authorizer = Authorizer::new(&fixture.config, keys);
    assert!(fixture.authorizer.handle(event.clone()).await.is_ok());
    drop(way);
    let refusal = fixture.authorizer.handle(event).await.expect_err("no store");
    assert!(matches!(refusal, Refusal::Unknown(_)), "{refusal:?}");
    for event in [json!({}), json!([]), json!({"headers": {}})] {
        assert!(fixture.authorizer.handle(event).await.is_err());
    }
    let refusal =
        fixture.authorizer.handle(json!({"methodArn": "arn", "headers": null})).await.expect_err("no credentials");
    assert!(matches!(refusal, Refusal::Unauthorized), "{refusal:?}");
}

#[tokio::test]
async fn api_key_command_creates_lists_and_revokes_keys() {
    let folder = TempDir::new().expect("a folder");
    let data = folder.path();
    let target = TargetOptions { user: Some("ann".into()), ..TargetOptions::default() };
    let run = async |command: ApiKeyCommand| api_keys::run(&command, data).await.expect("done");
    let made = run(ApiKeyCommand::Create { name: "a robot".into(), target: target.clone() }).await.expect("a key");
    assert!(ApiKeyStore::looks_like_one(made.trim()), "{made}");
    let listed = run(ApiKeyCommand::List { target: target.clone() }).await.expect("a list");
    assert!(listed.trim_end().ends_with(&format!("{}…  a robot", &made[..7])), "{listed}");
    assert!(!listed.contains(made.trim()));
    let id: Uuid = listed.split_whitespace().next().expect("an id").parse().expect("an id");
    assert_eq!(run(ApiKeyCommand::Revoke { id, target: TargetOptions::default() }).await, None, "another user");
    assert!(run(ApiKeyCommand::Revoke { id, target: target.clone() }).await.is_some());
    assert_eq!(run(ApiKeyCommand::Revoke { id, target: target.clone() }).await, None);
    assert_eq!(run(ApiKeyCommand::List { target }).await.as_deref(), Some(""));
    let without_user = TargetOptions { stack: Some("stack".into()), ..TargetOptions::default() };
    let error = api_keys::run(&ApiKeyCommand::List { target: without_user }, data).await.expect_err("no user");
    assert!(error.to_string().contains("--user"), "{error}");
}
