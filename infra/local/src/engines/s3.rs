//! S3: s3s and s3s-fs on a folder, with additional checks where s3s-fs behaves like a file system instead of S3.

use std::convert::Infallible;
use std::fs;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::SimpleAuth;
use s3s::dto::{CompleteMultipartUploadInput, CreateBucketInput, DeleteObjectInput, DeleteObjectsInput};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{S3Request, S3Result, s3_error};
use s3s_fs::FileSystem;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::{EngineCredentials, EngineError};
use crate::private_file::{self, entries};

/// The maximum length of a file name on most file systems.
const MAX_NAME_BYTES: usize = 255;
/// The maximum size of the response to CreateMultipartUpload.
const MAX_DOCUMENT_BYTES: usize = 64 * 1024;
/// The response headers that web pages may read.
const EXPOSED_HEADERS: [HeaderName; 5] = [
    header::ETAG,
    header::CONTENT_LENGTH,
    header::CONTENT_DISPOSITION,
    header::CONTENT_RANGE,
    HeaderName::from_static("x-amz-request-id"),
];

/// Serves S3 from the files below `root`. Every request needs a signature, including those from this process, because an upload belongs
/// to the access key that created it.
pub(super) fn router(root: &Path, credentials: &EngineCredentials) -> Result<Router, EngineError> {
    let files = FileSystem::new(root)
        .map_err(|error| EngineError::folder(root, std::io::Error::other(format!("{error:?}"))))?;
    let mut builder = S3ServiceBuilder::new(files);
    builder.set_auth(SimpleAuth::from_single(credentials.access_key_id.clone(), credentials.secret_access_key.clone()));
    builder.set_access(Rules { root: root.to_owned() });
    let (service, root) = (builder.build(), root.to_owned());
    let handler = tower::service_fn(move |request: Request| {
        let (service, root) = (service.clone(), root.clone());
        async move { Ok::<_, Infallible>(call(&service, &root, request).await) }
    });
    Ok(Router::new().fallback_service(handler))
}

/// CORS for presigned links on the port of this engine.
pub(super) fn cors(is_allowed: impl Fn(&str) -> bool + Clone + Send + Sync + 'static) -> CorsLayer {
    CorsLayer::new()
        .allow_origin(AllowOrigin::predicate(move |origin: &HeaderValue, _| origin.to_str().is_ok_and(&is_allowed)))
        .allow_methods([Method::GET, Method::HEAD])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers(EXPOSED_HEADERS)
}

async fn call(service: &S3Service, root: &Path, request: Request) -> Response {
    let written = Written::of(&request);
    match service.call(request.map(s3s::Body::http_body_unsync)).await {
        Ok(response) => {
            let response = response.map(Body::new);
            match written {
                Some(written) if response.status().is_success() => written.make_private(root, response).await,
                _ => response,
            }
        }
        Err(error) => {
            tracing::error!(?error, "engines.s3_failed");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// The files that a write request creates. s3s-fs creates files with the process's umask, so their modes are changed afterwards; until
/// then they are protected by the folder, which is private.
struct Written {
    bucket: String,
    key: String,
    upload: Option<String>,
    part: Option<String>,
    creates_upload: bool,
}

impl Written {
    fn of(request: &Request) -> Option<Self> {
        if !matches!(*request.method(), Method::PUT | Method::POST) {
            return None;
        }
        let path = percent_decode(request.uri().path())?;
        let (bucket, key) = path.trim_start_matches('/').split_once('/').unwrap_or((path.trim_start_matches('/'), ""));
        // Only paths below the bucket are accepted.
        let is_below = |path: &str| Path::new(path).components().all(|part| matches!(part, Component::Normal(_)));
        if !s3s::path::check_bucket_name(bucket) || !is_below(key) {
            return None;
        }
        let query: Vec<_> = request.uri().query().unwrap_or_default().split('&').collect();
        let is_id = |value: &&str| value.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        let value = |name: &str| {
            let value = query.iter().find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
            value.filter(is_id).map(ToOwned::to_owned)
        };
        Some(Self {
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            upload: value("uploadId"),
            part: value("partNumber"),
            creates_upload: query.iter().any(|pair| matches!(*pair, "uploads" | "uploads=")),
        })
    }

    async fn make_private(mut self, root: &Path, response: Response) -> Response {
        let response = if self.creates_upload {
            // The id of the upload is in the response, a short XML document.
            let (parts, body) = response.into_parts();
            let Ok(body) = axum::body::to_bytes(body, MAX_DOCUMENT_BYTES).await else {
                return StatusCode::INTERNAL_SERVER_ERROR.into_response();
            };
            let text = String::from_utf8_lossy(&body);
            let id = text.split_once("<UploadId>").and_then(|(_, rest)| rest.split_once("</UploadId>"));
            self.upload = id.map(|(id, _)| id.to_owned()).filter(|id| uuid::Uuid::parse_str(id).is_ok());
            Response::from_parts(parts, Body::from(body))
        } else {
            response
        };
        let root = root.to_owned();
        let done = tokio::task::spawn_blocking(move || self.change_modes(&root)).await;
        match done {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, "engines.object_chmod_failed"),
            Err(error) => tracing::warn!(%error, "engines.object_chmod_failed"),
        }
        response
    }

    fn change_modes(&self, root: &Path) -> std::io::Result<()> {
        let folder = root.join(&self.bucket);
        let mut paths: Vec<PathBuf> = vec![folder.clone()];
        if !self.key.is_empty() {
            let object = folder.join(&self.key);
            paths.extend(object.ancestors().take_while(|path| *path != folder).map(Path::to_owned));
            paths.extend(["internal", "metadata"].map(|kind| root.join(sidecar_name(&self.bucket, &self.key, kind))));
        }
        if let Some(upload) = &self.upload {
            paths.push(root.join(format!(".upload-{upload}.json")));
            let kind = format!("upload-{upload}.metadata");
            paths.push(root.join(sidecar_name(&self.bucket, &self.key, &kind)));
            if let Some(part) = &self.part {
                paths.push(root.join(format!(".upload_id-{upload}.part-{part}")));
            }
        }
        for path in paths {
            match private_file::make_private(&path) {
                // Most requests create only some of the files, and another request may have removed them since.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                done => done?,
            }
        }
        Ok(())
    }
}

fn percent_decode(path: &str) -> Option<String> {
    let (mut bytes, mut rest) = (Vec::with_capacity(path.len()), path.bytes());
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            byte => byte,
        });
    }
    String::from_utf8(bytes).ok()
}

/// Removes objects older than `objects` below a prefix of a bucket, and multipart uploads to which no part was added for `uploads`. S3
/// does this by lifecycle rules, which s3s-fs does not have.
pub(super) fn expire(
    root: &Path,
    bucket: &str,
    prefix: &str,
    objects: Duration,
    uploads: Duration,
) -> std::io::Result<usize> {
    let (mut removed, mut folders) = (0, vec![root.join(bucket).join(prefix.trim_end_matches('/'))]);
    while let Some(folder) = folders.pop() {
        for entry in entries(&folder)? {
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else if is_older(&entry, objects) {
                fs::remove_file(entry.path())?;
                removed += 1;
                let path = entry.path();
                let key = path.strip_prefix(root.join(bucket)).unwrap_or(&path).to_string_lossy().into_owned();
                for kind in ["internal", "metadata"] {
                    // Some objects have no such files.
                    let _missing = fs::remove_file(root.join(sidecar_name(bucket, &key, kind)));
                }
            }
        }
    }
    for entry in entries(root)? {
        let name = entry.file_name().to_string_lossy().into_owned();
        let of_upload = name.starts_with(".upload") || (name.starts_with(".bucket-") && name.contains(".upload-"));
        if of_upload && is_older(&entry, uploads) {
            fs::remove_file(entry.path())?;
            removed += 1;
        }
    }
    Ok(removed)
}

fn is_older(entry: &fs::DirEntry, age: Duration) -> bool {
    let changed = entry.metadata().and_then(|metadata| metadata.modified());
    changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|elapsed| elapsed > age))
}

/// Refuses requests that S3 refuses but s3s-fs accepts, and removes sidecar files that s3s-fs does not remove.
struct Rules {
    root: PathBuf,
}

impl Rules {
    /// The file in which s3s-fs stores attributes of an object. `kind` is `metadata` or `internal`.
    fn sidecar(&self, bucket: &str, key: &str, kind: &str) -> PathBuf {
        self.root.join(sidecar_name(bucket, key, kind))
    }

    /// Removes the files in which s3s-fs stores attributes of an object.
    fn remove_sidecars(&self, bucket: &str, key: &str, kinds: &[&str]) -> S3Result<()> {
        for kind in kinds {
            match std::fs::remove_file(self.sidecar(bucket, key, kind)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(s3_error!(error, InternalError));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn sidecar_name(bucket: &str, key: &str, kind: &str) -> String {
    format!(".bucket-{}.object-{}.{kind}.json", URL_SAFE_NO_PAD.encode(bucket), URL_SAFE_NO_PAD.encode(key))
}

#[async_trait::async_trait]
impl S3Access for Rules {
    async fn check(&self, cx: &mut S3AccessContext<'_>) -> S3Result<()> {
        if cx.credentials().is_none() {
            return Err(s3_error!(AccessDenied, "A signature is required."));
        }
        let Some((bucket, key)) = cx.s3_path().as_object() else {
            return Ok(());
        };
        // Path traversal check: such a key could lead into another bucket.
        if key.split('/').any(|part| part == ".." || part == ".") {
            return Err(s3_error!(
                InvalidArgument,
                "The embedded S3 does not support keys with the path segments . or .."
            ));
        }
        // s3s-fs uses file names that consist of bucket, key and, for a multipart upload, the upload's id.
        let longest = sidecar_name(
            bucket,
            key,
            match cx.s3_op().name() {
                "CreateMultipartUpload" => "upload-00000000-0000-0000-0000-000000000000.metadata",
                _ => "metadata",
            },
        );
        if longest.len() > MAX_NAME_BYTES || key.split('/').any(|part| part.len() > MAX_NAME_BYTES) {
            return Err(s3_error!(
                KeyTooLongError,
                "The key is too long for the embedded S3, which uses it as a file name."
            ));
        }
        let folder = self.root.join(bucket);
        // s3s-fs would create a missing bucket on a write, which would hide errors of the set-up.
        if !folder.is_dir() {
            return Err(s3_error!(NoSuchBucket, "The specified bucket does not exist"));
        }
        // A folder that contains objects is not an object itself.
        if matches!(cx.s3_op().name(), "GetObject" | "HeadObject") && !key.ends_with('/') && folder.join(key).is_dir() {
            return Err(s3_error!(NoSuchKey, "The specified key does not exist."));
        }
        Ok(())
    }

    async fn create_bucket(&self, request: &mut S3Request<CreateBucketInput>) -> S3Result<()> {
        if self.root.join(&request.input.bucket).is_dir() {
            // All buckets have the same owner.
            return Err(s3_error!(BucketAlreadyOwnedByYou));
        }
        Ok(())
    }

    async fn complete_multipart_upload(&self, request: &mut S3Request<CompleteMultipartUploadInput>) -> S3Result<()> {
        // Otherwise the new object would have the checksum of the object that it replaces, and clients would reject it.
        self.remove_sidecars(&request.input.bucket, &request.input.key, &["internal"])
    }

    async fn delete_object(&self, request: &mut S3Request<DeleteObjectInput>) -> S3Result<()> {
        self.remove_sidecars(&request.input.bucket, &request.input.key, &["internal", "metadata"])
    }

    async fn delete_objects(&self, request: &mut S3Request<DeleteObjectsInput>) -> S3Result<()> {
        for object in &request.input.delete.objects {
            self.remove_sidecars(&request.input.bucket, &object.key, &["internal", "metadata"])?;
        }
        Ok(())
    }
}
