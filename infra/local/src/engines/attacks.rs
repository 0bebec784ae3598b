//! Attacks on listening engines by other users of this machine and by web pages in its browser.

use std::time::{Duration, SystemTime};

use aws_sigv4::http_request::{PayloadChecksumKind, SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use aws_smithy_runtime_api::client::identity::Identity;
use http::{HeaderMap, HeaderValue, Method};
use reqwest::Client;
use tempfile::TempDir;

use super::{EngineCredentials, EnginePorts, Engines, REGION};
use crate::access::Origins;

const MINUTE: Duration = Duration::from_secs(60);

/// A valid request, which a test then changes.
#[derive(Clone)]
struct Attempt {
    method: Method,
    url: String,
    headers: HeaderMap,
    body: &'static str,
}

impl Attempt {
    /// A request that creates a queue, a table or an object.
    fn write(engines: &Engines, service: &str, credentials: &EngineCredentials, at: SystemTime) -> Self {
        let (method, url, target, body) = match service {
            "dynamodb" => (
                Method::POST,
                format!("{}/", engines.dynamodb),
                Some("DynamoDB_20120810.CreateTable"),
                r#"{"TableName": "created", "BillingMode": "PAY_PER_REQUEST", "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}],
                    "AttributeDefinitions": [{"AttributeName": "id", "AttributeType": "S"}]}"#,
            ),
            "sqs" => (
                Method::POST,
                format!("{}/", engines.sqs),
                Some("AmazonSQS.CreateQueue"),
                r#"{"QueueName": "created"}"#,
            ),
            _ => (Method::PUT, format!("{}/files/created", engines.s3), None, "content"),
        };
        let mut headers = HeaderMap::new();
        if let Some(target) = target {
            headers.insert("x-amz-target", HeaderValue::from_static(target));
            headers.insert("content-type", HeaderValue::from_static("application/x-amz-json-1.0"));
        }
        let mut attempt = Self { method, url, headers, body };
        attempt.sign(service, credentials, at);
        attempt
    }

    fn sign(&mut self, service: &str, credentials: &EngineCredentials, at: SystemTime) {
        let EngineCredentials { access_key_id, secret_access_key } = credentials;
        let identity: Identity =
            aws_sdk_dynamodb::config::Credentials::new(access_key_id, secret_access_key, None, None, "test").into();
        let mut settings = SigningSettings::default();
        if service == "s3" {
            settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
        }
        let params = v4::SigningParams::builder().identity(&identity).region(REGION).name(service).time(at);
        let params = params.settings(settings).build().unwrap().into();
        let headers = self.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap()));
        let body = SignableBody::Bytes(self.body.as_bytes());
        let request = SignableRequest::new(self.method.as_str(), &self.url, headers, body).unwrap();
        let (instructions, _) = sign(request, &params).unwrap().into_parts();
        for (name, value) in instructions.headers() {
            let name = http::HeaderName::from_bytes(name.as_bytes()).unwrap();
            self.headers.insert(name, value.parse().unwrap());
        }
    }

    fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.insert(name, value.parse().unwrap());
        self
    }

    fn without(mut self, name: &str) -> Self {
        self.headers.remove(name);
        self
    }

    async fn status(self) -> u16 {
        let client = Client::builder().no_proxy().build().unwrap();
        let sent = client.request(self.method, self.url).headers(self.headers).body(self.body).send();
        sent.await.unwrap().status().as_u16()
    }
}

async fn engines() -> (TempDir, Engines) {
    let data = TempDir::new().unwrap();
    let pages = Origins::new(["https://app.example".to_owned()]);
    let engines = Engines::listening(data.path(), EnginePorts::default(), &pages).await.unwrap();
    engines.ensure_bucket("files").unwrap();
    (data, engines)
}

/// Whether any of the requests was executed.
async fn something_was_created(engines: &Engines) -> bool {
    let config = engines.sdk_config().await;
    let tables = aws_sdk_dynamodb::Client::new(&config).list_tables().send().await.unwrap();
    let sqs = aws_sdk_sqs::Client::new(&config);
    let queue = sqs.get_queue_attributes().queue_url(format!("{}/000000000000/created", engines.sqs)).send().await;
    let s3 = aws_sdk_s3::Client::from_conf(aws_sdk_s3::config::Builder::from(&config).force_path_style(true).build());
    let objects = s3.list_objects_v2().bucket("files").send().await.unwrap();
    !(tables.table_names().is_empty() && queue.is_err() && objects.contents().is_empty())
}

#[tokio::test]
async fn every_engine_refuses_requests_without_a_valid_signature() {
    let (_data, engines) = engines().await;
    let (now, key) = (SystemTime::now(), engines.credentials.clone());
    for service in ["dynamodb", "sqs", "s3"] {
        let write = |credentials: &EngineCredentials, at| Attempt::write(&engines, service, credentials, at);
        let good = || write(&key, now);
        let authorization = good().headers["authorization"].to_str().unwrap().to_owned();
        let guessed = EngineCredentials { secret_access_key: "guessed".to_owned(), ..key.clone() };
        let another = EngineCredentials { access_key_id: "LOCALANOTHER".to_owned(), ..key.clone() };
        let attempts = [
            ("missing", good().without("authorization")),
            ("invented", good().with("authorization", "AWS4-HMAC-SHA256 Credential=x, SignedHeaders=x, Signature=x")),
            ("named key alone", good().with("authorization", &format!("Credential={}/", key.access_key_id))),
            ("other scheme", good().with("authorization", &authorization.replace("AWS4-HMAC-SHA256", "AWS"))),
            ("version 2", good().with("authorization", &format!("AWS {}:AAAA", key.access_key_id))),
            ("another secret", write(&guessed, now)),
            ("another key", write(&another, now)),
            ("expired", write(&key, now - 16 * MINUTE)),
            ("of the future", write(&key, now + 16 * MINUTE)),
            ("replayed with another body", Attempt { body: "{\"QueueName\": \"other\"}", ..good() }),
            ("replayed elsewhere", {
                let good = good();
                Attempt { url: format!("{}?versionId=1", good.url), ..good }
            }),
        ];
        for (what, attempt) in attempts {
            let status = attempt.status().await;
            // s3s detects the mismatch while it reads the body, and reports it as an internal error.
            let is_refused =
                (400..500).contains(&status) || (service == "s3" && what.ends_with("body") && status == 500);
            assert!(is_refused, "{service}, {what}: {status}");
        }
        // A signature for another service is refused.
        let mut stray = good().without("authorization");
        stray.sign("execute-api", &key, now);
        assert!((400..=501).contains(&stray.status().await), "{service}");
        assert!(!something_was_created(&engines).await, "{service}");
    }
    for service in ["dynamodb", "sqs", "s3"] {
        assert_eq!(Attempt::write(&engines, service, &key, now).status().await, 200, "{service}");
    }
    assert!(something_was_created(&engines).await);
    engines.shutdown().await;
}

#[tokio::test]
async fn every_engine_refuses_web_pages_and_other_hosts() {
    let (_data, engines) = engines().await;
    let (now, key) = (SystemTime::now(), engines.credentials.clone());
    for service in ["dynamodb", "sqs", "s3"] {
        let good = || Attempt::write(&engines, service, &key, now);
        // Even signed requests from pages that may use the API are refused.
        for origin in ["https://evil.example", "null", "http://localhost:3000", "https://app.example"] {
            assert_eq!(good().with("origin", origin).status().await, 403, "{service} {origin}");
        }
        for origin in ["https://evil.example", "null"] {
            let mut preflight = good().without("authorization").with("origin", origin);
            preflight = preflight.with("access-control-request-method", "POST");
            preflight.method = Method::OPTIONS;
            assert_eq!(preflight.status().await, 403, "{service} {origin}");
            let mut simple = good().without("authorization").with("origin", origin).with("content-type", "text/plain");
            simple.method = Method::POST;
            assert_eq!(simple.status().await, 403, "{service} {origin}");
        }
        // The signature is valid for this host, so the refusal is because of the host alone.
        let mut rebound = good().without("authorization").with("host", "rebind.example:8000");
        rebound.sign(service, &key, now);
        assert_eq!(rebound.status().await, 421, "{service}");
        assert!(!something_was_created(&engines).await, "{service}");
    }
    // A request without headers, as of a port scan.
    for url in [&engines.dynamodb, &engines.sqs, &engines.s3] {
        let status = reqwest::get(url).await.unwrap().status().as_u16();
        assert!((400..500).contains(&status), "{url}: {status}");
    }
    engines.shutdown().await;
}
