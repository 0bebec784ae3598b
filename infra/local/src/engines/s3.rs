//! S3: s3s and s3s-fs on a folder, with CORS in front and stricter rules where the file system shows through.

use std::convert::Infallible;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderName, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use s3s::access::{S3Access, S3AccessContext};
use s3s::auth::SimpleAuth;
use s3s::dto::{CompleteMultipartUploadInput, CreateBucketInput, DeleteObjectInput, DeleteObjectsInput};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{S3Request, S3Result, s3_error};
use s3s_fs::FileSystem;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tower_http::cors::{AllowHeaders, Any, CorsLayer};

use super::{EngineCredentials, EngineError, serve};

/// What most file systems allow a name to have, in bytes.
const LONGEST_NAME: usize = 255;

pub(super) fn start(
    root: &Path,
    listener: TcpListener,
    credentials: &EngineCredentials,
    stop: watch::Receiver<bool>,
) -> Result<JoinHandle<()>, EngineError> {
    let files = FileSystem::new(root)
        .map_err(|error| EngineError::folder(root, std::io::Error::other(format!("{error:?}"))))?;
    let mut builder = S3ServiceBuilder::new(files);
    builder.set_auth(SimpleAuth::from_single(credentials.access_key_id.clone(), credentials.secret_access_key.clone()));
    builder.set_access(Rules { root: root.to_owned() });
    let service = builder.build();

    let answer = tower::service_fn(move |request: Request| {
        let service = service.clone();
        async move { Ok::<_, Infallible>(call(&service, request).await) }
    });
    // Presigned links are meant for browsers on any origin; the signature in them is what lets a request in.
    let cors = CorsLayer::new()
        .allow_origin(Any)
        .allow_methods([Method::GET, Method::HEAD, Method::PUT])
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            header::ETAG,
            header::CONTENT_LENGTH,
            header::CONTENT_DISPOSITION,
            header::CONTENT_RANGE,
            HeaderName::from_static("x-amz-request-id"),
        ]);
    serve("S3", listener, Router::new().fallback_service(answer).layer(cors), stop)
}

async fn call(service: &S3Service, request: Request) -> Response {
    match service.call(request.map(s3s::Body::http_body_unsync)).await {
        Ok(response) => response.map(Body::new),
        Err(error) => {
            tracing::error!(?error, "the embedded S3 failed");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

/// Removes what is older than `objects` below a prefix of a bucket, and every multipart upload that nothing was added to for
/// `uploads`: S3 does this by lifecycle rules, s3s-fs does not.
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
                    // Not every object has them.
                    let _missing = fs::remove_file(root.join(note_name(bucket, &key, kind)));
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

/// None where there is no such folder.
fn entries(folder: &Path) -> std::io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn is_older(entry: &fs::DirEntry, age: Duration) -> bool {
    let changed = entry.metadata().and_then(|metadata| metadata.modified());
    changed.is_ok_and(|changed| changed.elapsed().is_ok_and(|elapsed| elapsed > age))
}

/// What S3 would refuse and a folder would let through, and the traces that s3s-fs leaves behind.
struct Rules {
    root: PathBuf,
}

impl Rules {
    /// The file in which s3s-fs keeps what it knows of an object. `kind` is `metadata` or `internal`.
    fn note(&self, bucket: &str, key: &str, kind: &str) -> PathBuf {
        self.root.join(note_name(bucket, key, kind))
    }

    /// Removes what s3s-fs keeps of an object beside its content.
    fn forget(&self, bucket: &str, key: &str, kinds: &[&str]) -> S3Result<()> {
        for kind in kinds {
            match std::fs::remove_file(self.note(bucket, key, kind)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(s3_error!(error, InternalError));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn note_name(bucket: &str, key: &str, kind: &str) -> String {
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
        // Such a key would lead into another bucket.
        if key.split('/').any(|part| part == ".." || part == ".") {
            return Err(s3_error!(InvalidArgument, "The embedded S3 takes no key with a part that is . or .."));
        }
        // s3s-fs makes one file name of bucket, key and, for a multipart upload, the upload's id.
        let longest = note_name(
            bucket,
            key,
            match cx.s3_op().name() {
                "CreateMultipartUpload" => "upload-00000000-0000-0000-0000-000000000000.metadata",
                _ => "metadata",
            },
        );
        if longest.len() > LONGEST_NAME || key.split('/').any(|part| part.len() > LONGEST_NAME) {
            return Err(s3_error!(
                KeyTooLongError,
                "The key is too long for the embedded S3, which makes file names of it."
            ));
        }
        let folder = self.root.join(bucket);
        // A write would make the bucket, and hide that a set-up forgot to.
        if !folder.is_dir() {
            return Err(s3_error!(NoSuchBucket, "The specified bucket does not exist"));
        }
        // A folder on the way to other objects is not an object.
        if matches!(cx.s3_op().name(), "GetObject" | "HeadObject") && !key.ends_with('/') && folder.join(key).is_dir() {
            return Err(s3_error!(NoSuchKey, "The specified key does not exist."));
        }
        Ok(())
    }

    async fn create_bucket(&self, request: &mut S3Request<CreateBucketInput>) -> S3Result<()> {
        if self.root.join(&request.input.bucket).is_dir() {
            // There is one owner, so the bucket is theirs.
            return Err(s3_error!(BucketAlreadyOwnedByYou));
        }
        Ok(())
    }

    async fn complete_multipart_upload(&self, request: &mut S3Request<CompleteMultipartUploadInput>) -> S3Result<()> {
        // Else the new object would be given the checksum of the one that it replaces, and clients would refuse it.
        self.forget(&request.input.bucket, &request.input.key, &["internal"])
    }

    async fn delete_object(&self, request: &mut S3Request<DeleteObjectInput>) -> S3Result<()> {
        self.forget(&request.input.bucket, &request.input.key, &["internal", "metadata"])
    }

    async fn delete_objects(&self, request: &mut S3Request<DeleteObjectsInput>) -> S3Result<()> {
        for object in &request.input.delete.objects {
            self.forget(&request.input.bucket, &object.key, &["internal", "metadata"])?;
        }
        Ok(())
    }
}
