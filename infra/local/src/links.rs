//! Serves presigned S3 links on the port of the API: `GET` and `HEAD` of `/<bucket>/<key>?…&X-Amz-Signature=…`, and no other S3
//! operation.
//!
//! The signature in a link is its credential, so links need no API key. They are signed for one address of the server
//! (`signed_for`), but clients receive and follow them with any name that they use for the server.

use axum::Router;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use http::header::{ALLOW, AUTHORIZATION, HOST, LOCATION};
use http::{HeaderValue, Method, StatusCode};
use shared::http::cors::cors;
use shared::http::response::detail;
use tower::ServiceExt as _;

use crate::access::Access;

#[derive(Clone, Debug)]
pub struct Links {
    /// `/<bucket>/`
    prefix: String,
    /// `http://127.0.0.1:<port>`
    signed_for: String,
    /// The host and port of `signed_for`.
    host: HeaderValue,
    s3: Router,
    access: Access,
}

impl Links {
    /// `s3` has to verify signatures. `signed_for` is the endpoint of the client that signs links, without a trailing slash.
    #[must_use]
    pub fn new(bucket: &str, signed_for: &str, s3: Router, access: Access) -> Self {
        let host = signed_for.split_once("://").map_or(signed_for, |(_, host)| host);
        let origins = access.origins().clone();
        let s3 = Router::new().fallback_service(s3).layer(cors(move |origin| origins.allows(origin)));
        Self {
            prefix: format!("/{bucket}/"),
            signed_for: signed_for.to_owned(),
            // The address of a listener is a valid header value.
            host: HeaderValue::from_str(host).unwrap_or_else(|_| HeaderValue::from_static("")),
            s3,
            access,
        }
    }

    /// Serves links in addition to these routes. No path of the API or of the web UI begins with the bucket's name.
    pub fn layer(self, routes: Router) -> Router {
        routes.layer(middleware::from_fn_with_state(self, serve))
    }

    async fn follow(self, mut request: Request) -> Response {
        let is_preflight = *request.method() == Method::OPTIONS;
        if !is_preflight && let Some(status) = refused(&request) {
            return match status {
                StatusCode::METHOD_NOT_ALLOWED => ([(ALLOW, "GET, HEAD")], detail(status)).into_response(),
                status => detail(status),
            };
        }
        // An outer layer has checked the `Host` that the client used. The signature covers the host for which the link was made.
        request.headers_mut().insert(HOST, self.host);
        // Clients that are redirected within one server also send the API's key, which S3 would read as a signature.
        request.headers_mut().remove(AUTHORIZATION);
        match self.s3.oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    }

    /// Changes a redirect to a link so that it leads to the address that the client used for this server.
    fn redirect(&self, base: &str, response: &mut Response) {
        if !response.status().is_redirection() {
            return;
        }
        let location = response.headers().get(LOCATION).and_then(|location| location.to_str().ok());
        let path = location.and_then(|location| location.strip_prefix(&self.signed_for));
        let Some(path) = path.filter(|path| path.starts_with(&self.prefix)) else { return };
        if let Ok(location) = HeaderValue::from_str(&format!("{base}{path}")) {
            response.headers_mut().insert(LOCATION, location);
        }
    }
}

async fn serve(State(links): State<Links>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if path.starts_with(&links.prefix) || path == links.prefix.trim_end_matches('/') {
        return links.follow(request).await;
    }
    let (parts, body) = request.into_parts();
    let base = links.access.link_base(&parts);
    let mut response = next.run(Request::from_parts(parts, body)).await;
    links.redirect(&base, &mut response);
    response
}

/// Whether the request is anything but reading one object with a presigned link.
fn refused(request: &Request) -> Option<StatusCode> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        return Some(StatusCode::METHOD_NOT_ALLOWED);
    }
    let names: Vec<_> =
        request.uri().query().unwrap_or_default().split('&').filter_map(|pair| pair.split('=').next()).collect();
    let has_signature = names.iter().filter(|name| **name == "X-Amz-Signature").count() == 1;
    // Other parameters select another operation: a list, tags, the parts of an upload.
    let reads_the_object = names.iter().all(|name| {
        name.starts_with("X-Amz-") || name.starts_with("response-") || matches!(*name, "x-id" | "versionId")
    });
    let key = request.uri().path().trim_start_matches('/').split_once('/').map_or("", |(_, key)| key);
    let is_signed_link = has_signature && reads_the_object && !key.is_empty();
    (!is_signed_link).then_some(StatusCode::FORBIDDEN)
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::routing::get;

    use super::*;

    fn links() -> Router {
        let s3 = Router::new().fallback(async |request: Request| {
            let host = request.headers()[HOST].to_str().unwrap().to_owned();
            assert!(!request.headers().contains_key(AUTHORIZATION));
            format!("{} {host}", request.method())
        });
        let routes = Router::new().route(
            "/download",
            get(async || {
                (StatusCode::TEMPORARY_REDIRECT, [(LOCATION, "http://127.0.0.1:3000/data/a?X-Amz-Signature=1")])
            }),
        );
        let elsewhere =
            get(async || (StatusCode::TEMPORARY_REDIRECT, [(LOCATION, "https://elsewhere.example/data/a")]));
        let routes = routes.route("/elsewhere", elsewhere).fallback(async || "the page");
        Links::new("data", "http://127.0.0.1:3000", s3, Access::new(false, None, &[])).layer(routes)
    }

    async fn send(method: &str, target: &str, headers: &[(&str, &str)]) -> (u16, String, Option<String>) {
        let mut request = Request::builder().method(method).uri(target).header(HOST, "localhost:3000");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = links().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
        let location = response.headers().get(LOCATION).map(|location| location.to_str().unwrap().to_owned());
        let status = response.status().as_u16();
        let body = axum::body::to_bytes(response.into_body(), 1024).await.unwrap();
        (status, String::from_utf8(body.to_vec()).unwrap(), location)
    }

    #[tokio::test]
    async fn only_presigned_reads_of_objects_reach_s3() {
        let link = "/data/exports/a.zip?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Signature=1&x-id=GetObject";
        // S3 gets the host for which links are signed.
        assert_eq!(send("GET", link, &[]).await.1, "GET 127.0.0.1:3000");
        assert_eq!(send("HEAD", link, &[]).await.0, 200);
        for method in ["PUT", "POST", "DELETE", "PATCH", "LINK"] {
            assert_eq!(send(method, link, &[]).await.0, 405, "{method}");
        }
        for target in [
            "/data",
            "/data/",
            "/data/a",
            "/data/?X-Amz-Signature=1",
            "/data/?list-type=2&X-Amz-Signature=1",
            "/data?X-Amz-Signature=1",
            "/data/a?Signature=1&AWSAccessKeyId=1",
            "/data/a?Signature=1&AWSAccessKeyId=1&X-Amz-Signature=1",
            "/data/a?x-amz-signature=1",
            "/data/a?X-Amz-Signature=1&X-Amz-Signature=1",
            "/data/a?uploads&X-Amz-Signature=1",
            "/data/a?uploadId=1&X-Amz-Signature=1",
            "/data/a?acl&X-Amz-Signature=1",
        ] {
            assert_eq!(send("GET", target, &[]).await.0, 403, "{target}");
        }
        // A redirected client also sends the API's key.
        assert_eq!(send("GET", link, &[("authorization", "Bearer key")]).await.0, 200);
        assert_eq!(send("GET", "/data/a", &[("authorization", "AWS4-HMAC-SHA256 …")]).await.0, 403);
        for target in ["/", "/database", "/data.html", "/other/data/a?X-Amz-Signature=1"] {
            assert_eq!(send("GET", target, &[]).await.1, "the page", "{target}");
        }
    }

    #[tokio::test]
    async fn redirects_lead_to_the_address_that_the_client_uses() {
        let (_, _, location) = send("GET", "/download", &[]).await;
        assert_eq!(location.unwrap(), "/data/a?X-Amz-Signature=1");
        let (_, _, location) = send("GET", "/elsewhere", &[]).await;
        assert_eq!(location.unwrap(), "https://elsewhere.example/data/a");
    }
}
