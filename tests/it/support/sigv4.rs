//! Signs requests with AWS Signature Version 4, as the SDK does.

use std::time::SystemTime;

use aws_sdk_dynamodb::config::Credentials;
use aws_sigv4::http_request::{PayloadChecksumKind, SignableBody, SignableRequest, SigningSettings, sign as signed};
use aws_sigv4::sign::v4;
use http::{HeaderMap, HeaderName};
use local::engines::{EngineCredentials, REGION};

/// Adds the headers of a new signature.
pub fn sign(
    service: &str,
    credentials: &EngineCredentials,
    method: &str,
    url: &str,
    headers: &mut HeaderMap,
    body: &[u8],
) {
    let EngineCredentials { access_key_id, secret_access_key } = credentials;
    let identity = Credentials::new(access_key_id, secret_access_key, None, None, "test").into();
    let mut settings = SigningSettings::default();
    if service == "s3" {
        settings.payload_checksum_kind = PayloadChecksumKind::XAmzSha256;
    }
    let params = v4::SigningParams::builder().identity(&identity).region(REGION).name(service).time(SystemTime::now());
    let params = params.settings(settings).build().expect("parameters").into();
    let instructions = {
        let given = headers.iter().map(|(name, value)| (name.as_str(), value.to_str().expect("text")));
        let request = SignableRequest::new(method, url, given, SignableBody::Bytes(body)).expect("a request");
        signed(request, &params).expect("a signature").into_parts().0
    };
    for (name, value) in instructions.headers() {
        let name = HeaderName::from_bytes(name.as_bytes()).expect("a name");
        headers.insert(name, value.parse().expect("a value"));
    }
}
