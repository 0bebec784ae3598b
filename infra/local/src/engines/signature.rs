//! Verifies requests to engines that listen on ports, which other users of this machine and web pages can reach.
//!
//! Every request has to be for this machine (`Host`), must not come from a web page (`Origin`), and has to be signed with the engines'
//! key pair. Signatures for DynamoDB and SQS (Signature Version 4, in headers) are verified by computing the signature of the request.
//! S3 verifies signatures itself, in headers and in presigned links.

use std::time::{Duration, SystemTime};

use aws_sigv4::http_request::{SignableBody, SignableRequest, SigningSettings, sign};
use aws_sigv4::sign::v4;
use aws_smithy_runtime_api::client::identity::Identity;
use aws_smithy_types::date_time::{DateTime, Format};
use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use http::header::{AUTHORIZATION, CONTENT_TYPE, HeaderName};
use http::request::Parts;
use http::{Method, StatusCode};
use serde_json::json;
use shared::digest::sha256_hex;

use super::{EngineCredentials, REGION, s3};
use crate::access::{self, Header, Origins, Refusal, single};

const ALGORITHM: &str = "AWS4-HMAC-SHA256";
const DATE: HeaderName = HeaderName::from_static("x-amz-date");
/// The accepted difference between the clocks of signer and verifier, which is that of AWS.
const SKEW: Duration = Duration::from_secs(15 * 60);
/// Headers that a signature has to cover if the request has them, because they determine the operation.
const COVERED: [&str; 4] = ["host", "x-amz-date", "x-amz-target", "content-type"];

/// Why a signature is invalid. Responses have the error codes of AWS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// The request has no signature.
    Missing,
    /// The signature does not have the format of Signature Version 4, or does not cover all required headers.
    Incomplete,
    UnknownKey,
    Expired,
    /// The signature belongs to another request or another secret.
    Mismatch,
}

impl Fault {
    fn response(self) -> Response {
        let (code, text) = match self {
            Self::Missing => ("MissingAuthenticationTokenException", "Request is missing Authentication Token"),
            Self::Incomplete => {
                ("IncompleteSignatureException", "The Authorization header is not a complete AWS signature, version 4")
            }
            Self::UnknownKey => {
                ("UnrecognizedClientException", "The security token included in the request is invalid.")
            }
            Self::Expired => {
                ("InvalidSignatureException", "Signature expired: x-amz-date is not within 15 minutes of now")
            }
            Self::Mismatch => {
                ("InvalidSignatureException", "The request signature we calculated does not match the one you provided")
            }
        };
        refused(StatusCode::FORBIDDEN, code, text)
    }
}

fn refused(status: StatusCode, code: &str, text: &str) -> Response {
    let body = json!({"__type": format!("com.amazon.coral.service#{code}"), "message": text});
    (status, [(CONTENT_TYPE, "application/x-amz-json-1.0")], body.to_string()).into_response()
}

/// Allows only signed requests to DynamoDB or SQS. `service` is the service name in signatures, `limit` the maximum size of a body in
/// bytes.
pub(super) fn verified(router: Router, service: &'static str, limit: usize, credentials: EngineCredentials) -> Router {
    let verifier = Verifier { service, credentials };
    router.layer(middleware::from_fn(move |request: Request, next: Next| {
        let verifier = verifier.clone();
        async move {
            if !access::is_for_loopback(&request) {
                return Refusal::Host.response();
            }
            if access::origin_of(request.headers()) != Header::Missing {
                return Refusal::Origin.response();
            }
            let (parts, body) = request.into_parts();
            let Ok(body) = axum::body::to_bytes(body, limit).await else {
                return refused(StatusCode::PAYLOAD_TOO_LARGE, "RequestEntityTooLarge", "The request is too large");
            };
            match verifier.verify(&parts, &body, SystemTime::now()) {
                Ok(()) => next.run(Request::from_parts(parts, Body::from(body))).await,
                Err(fault) => fault.response(),
            }
        }
    }))
}

/// Allows only requests for this machine to S3, which verifies their signatures. Web pages may only follow presigned links, and only
/// from the origins `pages`. Signature Version 2 and HTML forms, which s3s accepts, are refused.
pub(super) fn s3_on_loopback(router: Router, pages: Origins) -> Router {
    let allowed = pages.clone();
    router.layer(s3::cors(move |origin| allowed.allows(origin))).layer(middleware::from_fn(
        move |request: Request, next: Next| {
            let pages = pages.clone();
            async move {
                if !access::is_for_loopback(&request) {
                    return Refusal::Host.response();
                }
                let is_link = is_presigned(&request);
                let is_preflight = *request.method() == Method::OPTIONS;
                let may_come_from_a_page = (is_link && is_read(request.method())) || is_preflight;
                match access::origin_of(request.headers()) {
                    Header::Missing => {}
                    Header::One(origin) if may_come_from_a_page && pages.allows(origin) => {}
                    Header::One(_) | Header::Malformed => return Refusal::Origin.response(),
                }
                let is_signed = match single(request.headers(), &AUTHORIZATION) {
                    Header::One(value) => value.starts_with(ALGORITHM),
                    Header::Missing | Header::Malformed => false,
                };
                if !is_signed && !is_link && !is_preflight {
                    return Fault::Missing.response();
                }
                next.run(request).await
            }
        },
    ))
}

/// Whether the request has the form of a presigned link of Signature Version 4, and of no other version.
fn is_presigned(request: &Request) -> bool {
    let names: Vec<_> =
        request.uri().query().unwrap_or_default().split('&').filter_map(|pair| pair.split('=').next()).collect();
    names.contains(&"X-Amz-Signature") && !names.iter().any(|name| matches!(*name, "Signature" | "AWSAccessKeyId"))
}

fn is_read(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
}

#[derive(Clone)]
struct Verifier {
    service: &'static str,
    credentials: EngineCredentials,
}

/// `Authorization: AWS4-HMAC-SHA256 Credential=KEY/DATE/REGION/SERVICE/aws4_request, SignedHeaders=a;b, Signature=HEX`
struct Authorization<'a> {
    key: &'a str,
    scope: &'a str,
    signed_headers: Vec<&'a str>,
    signature: &'a str,
}

impl<'a> Authorization<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        let fields = text.strip_prefix(ALGORITHM)?.strip_prefix(' ')?;
        let (mut credential, mut signed_headers, mut signature) = (None, None, None);
        for field in fields.split(',') {
            let (name, value) = field.trim().split_once('=')?;
            let known = match name {
                "Credential" => &mut credential,
                "SignedHeaders" => &mut signed_headers,
                "Signature" => &mut signature,
                _ => return None,
            };
            if known.replace(value).is_some() {
                return None;
            }
        }
        let (key, scope) = credential?.split_once('/')?;
        Some(Self { key, scope, signed_headers: signed_headers?.split(';').collect(), signature: signature? })
    }
}

impl Verifier {
    fn verify(&self, request: &Parts, body: &Bytes, now: SystemTime) -> Result<(), Fault> {
        let authorization = match single(&request.headers, &AUTHORIZATION) {
            Header::Missing => return Err(Fault::Missing),
            Header::One(text) => Authorization::parse(text).ok_or(Fault::Incomplete)?,
            Header::Malformed => return Err(Fault::Incomplete),
        };
        if authorization.key != self.credentials.access_key_id {
            return Err(Fault::UnknownKey);
        }
        let Header::One(date) = single(&request.headers, &DATE) else { return Err(Fault::Incomplete) };
        let signed_at = timestamp(date).ok_or(Fault::Incomplete)?;
        let day = date.get(..8).ok_or(Fault::Incomplete)?;
        if authorization.scope != format!("{day}/{REGION}/{}/aws4_request", self.service) {
            return Err(Fault::Incomplete);
        }
        let skew = now.duration_since(signed_at).unwrap_or_else(|error| error.duration());
        if skew > SKEW {
            return Err(Fault::Expired);
        }
        let covers = |name: &str| authorization.signed_headers.contains(&name);
        if COVERED.iter().any(|name| request.headers.contains_key(*name) && !covers(name)) || !covers("host") {
            return Err(Fault::Incomplete);
        }
        let expected = self.signature_of(request, body, signed_at, &authorization.signed_headers)?;
        // The hashes are compared, so that the time of the comparison reveals nothing about the signature.
        if sha256_hex(&expected) == sha256_hex(authorization.signature) { Ok(()) } else { Err(Fault::Mismatch) }
    }

    /// The expected signature of the request.
    fn signature_of(
        &self,
        request: &Parts,
        body: &Bytes,
        signed_at: SystemTime,
        signed_headers: &[&str],
    ) -> Result<String, Fault> {
        let mut headers = Vec::with_capacity(signed_headers.len());
        for name in signed_headers {
            let header = HeaderName::from_bytes(name.as_bytes()).map_err(|_| Fault::Incomplete)?;
            let Header::One(value) = single(&request.headers, &header) else { return Err(Fault::Mismatch) };
            // The signer adds the date itself.
            if header != DATE {
                headers.push((*name, value));
            }
        }
        let host =
            headers.iter().find_map(|(name, value)| (*name == "host").then_some(*value)).ok_or(Fault::Incomplete)?;
        let path = request.uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        let signable = SignableRequest::new(
            request.method.as_str(),
            format!("http://{host}{path}"),
            headers.into_iter(),
            SignableBody::Bytes(body),
        );
        let identity: Identity = aws_sdk_dynamodb::config::Credentials::new(
            &self.credentials.access_key_id,
            &self.credentials.secret_access_key,
            None,
            None,
            "embedded engines",
        )
        .into();
        let mut settings = SigningSettings::default();
        // The request lists the signed headers, so the signer must not exclude any.
        settings.excluded_headers = None;
        let params = v4::SigningParams::builder()
            .identity(&identity)
            .region(REGION)
            .name(self.service)
            .time(signed_at)
            .settings(settings)
            .build()
            .map_err(|_| Fault::Incomplete)?
            .into();
        let signed = sign(signable.map_err(|_| Fault::Incomplete)?, &params).map_err(|_| Fault::Incomplete)?;
        Ok(signed.into_parts().1)
    }
}

/// `20260102T030405Z`
fn timestamp(text: &str) -> Option<SystemTime> {
    let is_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (date, time) = text.strip_suffix('Z')?.split_once('T')?;
    if date.len() != 8 || time.len() != 6 || !is_digits(date) || !is_digits(time) {
        return None;
    }
    let [year, month, day] = [&date[..4], &date[4..6], &date[6..]];
    let [hour, minute, second] = [&time[..2], &time[2..4], &time[4..]];
    let text = format!("{year}-{month}-{day}T{hour}:{minute}:{second}Z");
    DateTime::from_str(&text, Format::DateTime).ok().and_then(|time| SystemTime::try_from(time).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    type Change = fn(String) -> String;

    const NOW: &str = "20260102T030405Z";

    fn verifier() -> Verifier {
        let credentials =
            EngineCredentials { access_key_id: "LOCALKEY".to_owned(), secret_access_key: "secret".to_owned() };
        Verifier { service: "dynamodb", credentials }
    }

    /// A request that is signed at [`NOW`], with these headers covered.
    fn signed(body: &'static str, covered: &[&str]) -> (Parts, Bytes) {
        let request = Request::post("/")
            .header("host", "127.0.0.1:8000")
            .header("content-type", "application/x-amz-json-1.0")
            .header("x-amz-target", "DynamoDB_20120810.PutItem")
            .header("x-amz-date", NOW);
        let (mut parts, ()) = request.body(()).unwrap().into_parts();
        let body = Bytes::from_static(body.as_bytes());
        let signature = verifier().signature_of(&parts, &body, timestamp(NOW).unwrap(), covered).unwrap();
        let mut names = covered.to_vec();
        names.sort_unstable();
        let authorization = format!(
            "{ALGORITHM} Credential=LOCALKEY/20260102/{REGION}/dynamodb/aws4_request, SignedHeaders={}, Signature={signature}",
            names.join(";")
        );
        parts.headers.insert(AUTHORIZATION, authorization.parse().unwrap());
        (parts, body)
    }

    fn outcome(parts: &Parts, body: &Bytes) -> Result<(), Fault> {
        verifier().verify(parts, body, timestamp(NOW).unwrap())
    }

    fn authorization(parts: &mut Parts, change: impl FnOnce(String) -> String) {
        let changed = change(parts.headers[AUTHORIZATION].to_str().unwrap().to_owned());
        parts.headers.insert(AUTHORIZATION, changed.parse().unwrap());
    }

    #[test]
    fn a_signature_is_valid_for_its_request_only() {
        let (parts, body) = signed("{}", &COVERED);
        assert_eq!(outcome(&parts, &body), Ok(()));
        assert_eq!(outcome(&parts, &Bytes::from_static(b"{ }")), Err(Fault::Mismatch));
        for (name, value) in [
            ("x-amz-target", "DynamoDB_20120810.DeleteItem"),
            ("host", "127.0.0.1:9000"),
            ("content-type", "application/json"),
            ("x-amz-date", "20260102T030406Z"),
        ] {
            let (mut parts, body) = signed("{}", &COVERED);
            parts.headers.insert(name, value.parse().unwrap());
            assert_eq!(outcome(&parts, &body), Err(Fault::Mismatch), "{name}");
        }
        let (mut parts, body) = signed("{}", &COVERED);
        parts.method = Method::PUT;
        assert_eq!(outcome(&parts, &body), Err(Fault::Mismatch));
        for uri in ["/?Action=x", "/other"] {
            let (mut parts, body) = signed("{}", &COVERED);
            parts.uri = uri.parse().unwrap();
            assert_eq!(outcome(&parts, &body), Err(Fault::Mismatch), "{uri}");
        }
    }

    #[test]
    fn malformed_signatures_are_refused() {
        let (mut parts, body) = signed("{}", &COVERED);
        parts.headers.remove(AUTHORIZATION);
        assert_eq!(outcome(&parts, &body), Err(Fault::Missing));
        let cases: [(Change, Fault); 10] = [
            (|text| text.replace("Credential=LOCALKEY", "Credential=OTHER"), Fault::UnknownKey),
            (|text| text.replace("LOCALKEY/20260102", "LOCALKEY/20260101"), Fault::Incomplete),
            (|text| text.replace("dynamodb/aws4", "sqs/aws4"), Fault::Incomplete),
            (|text| text.replace(REGION, "eu-west-1"), Fault::Incomplete),
            (|text| text.replace(ALGORITHM, "AWS4-HMAC-SHA1"), Fault::Incomplete),
            (|text| text.replace("SignedHeaders=", "SignedHeaders=x-amz-other;"), Fault::Mismatch),
            (|text| text.split(", Signature").next().unwrap().to_owned(), Fault::Incomplete),
            (|text| format!("{text}, Signature=0"), Fault::Incomplete),
            (|text| format!("{}0", &text[..text.len() - 1]), Fault::Mismatch),
            (|_| format!("{ALGORITHM} Credential=x, SignedHeaders=x, Signature=x"), Fault::Incomplete),
        ];
        for (index, (change, fault)) in cases.into_iter().enumerate() {
            let (mut parts, body) = signed("{}", &COVERED);
            let whole = parts.headers[AUTHORIZATION].clone();
            authorization(&mut parts, change);
            // The last digit may already be the one that replaces it.
            if parts.headers[AUTHORIZATION] != whole {
                assert_eq!(outcome(&parts, &body), Err(fault), "{index}");
            }
        }
        for left_out in COVERED {
            // The signer always covers host and date.
            let covered: Vec<_> = COVERED.into_iter().filter(|name| *name != left_out).collect();
            if !matches!(left_out, "host" | "x-amz-date") {
                let (parts, body) = signed("{}", &covered);
                assert_eq!(outcome(&parts, &body), Err(Fault::Incomplete), "{left_out}");
            }
        }
    }

    #[test]
    fn a_signature_is_valid_for_fifteen_minutes() {
        let (parts, body) = signed("{}", &COVERED);
        let at = |text: &str| verifier().verify(&parts, &body, timestamp(text).unwrap());
        assert_eq!(at("20260102T031905Z"), Ok(()));
        assert_eq!(at("20260102T031906Z"), Err(Fault::Expired));
        assert_eq!(at("20260102T024905Z"), Ok(()));
        assert_eq!(at("20260102T024904Z"), Err(Fault::Expired));
        for text in ["2026-01-02T03:04:05Z", "20260102T030405", "20261302T030405Z", "+0260102T030405Z", ""] {
            assert_eq!(timestamp(text), None, "{text}");
        }
    }
}
