//! A model of S3: one bucket or several, in memory, with multipart uploads and lifecycle rules.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use jiff::Timestamp;
use percent_encoding::percent_decode_str;

use super::{Call, Clock, Decider, Faults, Happened, detached, lock, pause};
use crate::dice;
use crate::net::{Failure, Pending, Reply, Request, Server};

/// Milliseconds.
const LATENCY: [u64; 2] = [10, 100];
/// The smallest part of a multipart upload, except for the last one.
const SMALLEST_PART: usize = 5 * 1024 * 1024;
const PAGE: usize = 1000;
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Counted calls of an operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub calls: u64,
    pub bytes_received: u64,
    pub bytes_sent: u64,
}

#[derive(Clone, Debug)]
struct Object {
    body: Bytes,
    /// Those of the headers that S3 keeps.
    headers: HeaderMap,
    etag: String,
    stored_at: Duration,
}

#[derive(Clone, Debug)]
struct Upload {
    key: String,
    headers: HeaderMap,
    parts: BTreeMap<u32, (String, Bytes)>,
    changed_at: Duration,
}

#[derive(Debug, Default)]
struct State {
    buckets: BTreeMap<String, BTreeMap<String, Object>>,
    uploads: BTreeMap<String, Upload>,
    started_uploads: u64,
    /// Prefixes of keys, with the age at which objects and incomplete uploads are removed.
    expiry: Vec<(String, Duration)>,
    usage: BTreeMap<&'static str, Usage>,
}

struct Inner {
    clock: Clock,
    faults: Faults,
    decider: Decider,
    happened: Happened,
    state: Mutex<State>,
}

/// S3. Clones are the same service.
#[derive(Clone)]
pub struct S3(Arc<Inner>);

/// The parts of a request that name what it is about.
#[derive(Clone, Debug)]
struct Target {
    operation: &'static str,
    bucket: String,
    key: String,
    query: BTreeMap<String, String>,
}

type Answer = Result<http::Response<Bytes>, (u16, &'static str)>;

impl Server for S3 {
    fn handle(&self, request: Request) -> Pending {
        let service = self.clone();
        Box::pin(async move { service.serve(request).await })
    }
}

impl S3 {
    pub fn new(seed: u64, clock: Clock, faults: Faults) -> Self {
        Self(Arc::new(Inner {
            clock,
            faults,
            decider: Decider::new(seed, "s3"),
            happened: Happened::default(),
            state: Mutex::default(),
        }))
    }

    pub fn happened(&self) -> BTreeMap<&'static str, u64> {
        self.0.happened.all()
    }

    /// By operation.
    pub fn usage(&self) -> BTreeMap<&'static str, Usage> {
        lock(&self.0.state).usage.clone()
    }

    /// A lifecycle rule: removes objects with this prefix, and incomplete uploads, up to a day after they have this age.
    pub fn expire(&self, prefix: &str, age: Duration) {
        lock(&self.0.state).expiry.push((prefix.to_owned(), age));
    }

    /// The keys and the bodies of a bucket's objects.
    pub fn objects(&self, bucket: &str) -> BTreeMap<String, Bytes> {
        let mut state = lock(&self.0.state);
        self.0.remove_expired(&mut state);
        let objects = state.buckets.get(bucket).into_iter().flatten();
        objects.map(|(key, object)| (key.clone(), object.body.clone())).collect()
    }

    /// The keys of incomplete uploads.
    pub fn uploads(&self) -> Vec<String> {
        let mut state = lock(&self.0.state);
        self.0.remove_expired(&mut state);
        state.uploads.values().map(|upload| upload.key.clone()).collect()
    }

    async fn serve(self, request: Request) -> Reply {
        let target = Target::of(&request);
        let (inner, faults) = (self.0.clone(), &self.0.faults);
        let call = inner.decider.call(&(target.operation, &target.bucket, &target.key, &target.query));
        if matches!(target.operation, "CreateBucket" | "HeadBucket") {
            return Ok(respond(call.id(), inner.effect(&target, &request)));
        }
        if call.happens("refused", faults.refused) {
            inner.happened.count("refused");
            return Err(Failure::Refused);
        }
        let [there, back] = call.latency(faults, LATENCY);
        pause(there).await;
        let is_hung = call.happens("hung", faults.hung);
        if is_hung && call.happens("hung before the effect", 0.5) {
            inner.happened.count("hung");
            return Err(Failure::Hang);
        }
        let answer = if inner.decider.is_out(faults, call, inner.clock.elapsed()) {
            inner.happened.count("outage");
            inner.internal_error(&target, call)
        } else if call.happens("failed", faults.failed) {
            inner.happened.count("failed");
            inner.internal_error(&target, call)
        } else if call.happens("throttled", faults.throttled) {
            inner.happened.count("throttled");
            Err((503, "SlowDown"))
        } else {
            let (inner, target) = (inner.clone(), target.clone());
            detached(async move {
                if let Some(stall) = call.stall(&inner.faults) {
                    inner.happened.count("stalled");
                    pause(stall).await;
                }
                inner.effect(&target, &request)
            })
            .await
        };
        if is_hung {
            inner.happened.count("hung");
            return Err(Failure::Hang);
        }
        pause(back).await;
        if answer.is_ok() && call.happens("lost", faults.lost) {
            inner.happened.count("lost");
            if call.happens("cut", 0.5) {
                return Err(Failure::Cut);
            }
            return Ok(respond(call.id(), inner.internal_error(&target, call)));
        }
        Ok(respond(call.id(), answer))
    }
}

impl Target {
    fn of(request: &Request) -> Self {
        let path = percent_decode_str(request.path.trim_start_matches('/')).decode_utf8_lossy();
        let (bucket, key) = path.split_once('/').unwrap_or((&path, ""));
        let query: BTreeMap<String, String> = form_urlencoded::parse(request.query.as_bytes()).into_owned().collect();
        let has = |name: &str| query.contains_key(name);
        let operation = match (&request.method, key.is_empty()) {
            (&Method::HEAD, true) => "HeadBucket",
            (&Method::PUT, true) => "CreateBucket",
            (&Method::GET, true) => "ListObjectsV2",
            (&Method::HEAD, false) => "HeadObject",
            (&Method::GET, false) => "GetObject",
            (&Method::PUT, false) if has("uploadId") => "UploadPart",
            (&Method::PUT, false) => "PutObject",
            (&Method::POST, false) if has("uploads") => "CreateMultipartUpload",
            (&Method::POST, false) if has("uploadId") => "CompleteMultipartUpload",
            (&Method::DELETE, false) if has("uploadId") => "AbortMultipartUpload",
            (&Method::DELETE, false) => "DeleteObject",
            other => panic!("the model of S3 has no {other:?} {}", request.path),
        };
        Self { operation, bucket: bucket.to_owned(), key: key.to_owned(), query }
    }
}

impl Inner {
    /// An error of the service. When S3 fails to complete an upload it may have sent status 200 already.
    fn internal_error(&self, target: &Target, call: Call) -> Answer {
        if target.operation == "CompleteMultipartUpload" && call.happens("error with status 200", 0.5) {
            self.happened.count("error_with_status_200");
            return Ok(xml(200, &error_body("InternalError")));
        }
        Err((500, "InternalError"))
    }

    fn effect(&self, target: &Target, request: &Request) -> Answer {
        let mut state = lock(&self.state);
        self.remove_expired(&mut state);
        let usage = state.usage.entry(target.operation).or_default();
        usage.calls += 1;
        usage.bytes_received += request.body.len() as u64;
        let answer = self.execute(&mut state, target, request);
        if let Ok(response) = &answer {
            state.usage.entry(target.operation).or_default().bytes_sent += response.body().len() as u64;
        }
        answer
    }

    fn execute(&self, state: &mut State, target: &Target, request: &Request) -> Answer {
        let now = self.clock.elapsed();
        let Target { operation, bucket, key, query } = target;
        if *operation == "CreateBucket" {
            state.buckets.entry(bucket.clone()).or_default();
            return Ok(empty(200));
        }
        let Some(objects) = state.buckets.get_mut(bucket) else { return Err((404, "NoSuchBucket")) };
        assert!(
            request.headers.get("content-encoding").is_none_or(|encoding| encoding != "aws-chunked"),
            "the model of S3 reads no chunks"
        );
        match *operation {
            "HeadBucket" => Ok(empty(200)),
            "PutObject" => {
                if request.headers.contains_key("if-none-match") && objects.contains_key(key) {
                    return Err((412, "PreconditionFailed"));
                }
                let etag = etag(&request.body);
                let object = Object {
                    body: request.body.clone(),
                    headers: kept(&request.headers),
                    etag: etag.clone(),
                    stored_at: now,
                };
                objects.insert(key.clone(), object);
                Ok(with_checksum(&request.headers, &etag))
            }
            "GetObject" | "HeadObject" => {
                let object = objects.get(key).ok_or((404, "NoSuchKey"))?;
                let mut response = http::Response::new(object.body.clone());
                let headers = response.headers_mut();
                *headers = object.headers.clone();
                headers.insert("etag", value(&object.etag));
                headers.insert("content-length", value(&object.body.len().to_string()));
                headers.insert("last-modified", value(&http_date(self.time(object.stored_at))));
                for (parameter, header) in
                    [("response-content-type", "content-type"), ("response-content-disposition", "content-disposition")]
                {
                    if let Some(text) = query.get(parameter) {
                        headers.insert(header, value(text));
                    }
                }
                Ok(response)
            }
            "DeleteObject" => {
                objects.remove(key);
                Ok(empty(204))
            }
            "ListObjectsV2" => Ok(self.list(objects, bucket, query)),
            "CreateMultipartUpload" => {
                state.started_uploads += 1;
                let id = format!("upload-{}", state.started_uploads);
                let upload = Upload {
                    key: key.clone(),
                    headers: kept(&request.headers),
                    parts: BTreeMap::new(),
                    changed_at: now,
                };
                state.uploads.insert(id.clone(), upload);
                let body = format!(
                    "<InitiateMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{key}</Key><UploadId>{id}</UploadId></InitiateMultipartUploadResult>"
                );
                Ok(xml(200, &body))
            }
            "UploadPart" => {
                let upload = state.uploads.get_mut(&query["uploadId"]).ok_or((404, "NoSuchUpload"))?;
                let number = query["partNumber"].parse().expect("a number");
                let etag = etag(&request.body);
                upload.parts.insert(number, (etag.clone(), request.body.clone()));
                upload.changed_at = now;
                Ok(with_checksum(&request.headers, &etag))
            }
            "CompleteMultipartUpload" => {
                let id = &query["uploadId"];
                let upload = state.uploads.get(id).ok_or((404, "NoSuchUpload"))?;
                let wanted = completed_parts(&String::from_utf8_lossy(&request.body));
                let mut body = BytesMut::new();
                for (index, (number, etag)) in wanted.iter().enumerate() {
                    let part = upload.parts.get(number).filter(|(stored, _)| stored == etag);
                    let (_, bytes) = part.ok_or((400, "InvalidPart"))?;
                    if bytes.len() < SMALLEST_PART && index + 1 < wanted.len() {
                        return Err((400, "EntityTooSmall"));
                    }
                    body.extend_from_slice(bytes);
                }
                let body = body.freeze();
                let etag = format!("\"{:016x}-{}\"", dice::seeded(0, &&body[..]), wanted.len());
                let object = Object { body, headers: upload.headers.clone(), etag: etag.clone(), stored_at: now };
                objects.insert(key.clone(), object);
                state.uploads.remove(id);
                let etag = etag.replace('"', "&quot;");
                let body = format!(
                    "<CompleteMultipartUploadResult><Bucket>{bucket}</Bucket><Key>{key}</Key><ETag>{etag}</ETag></CompleteMultipartUploadResult>"
                );
                Ok(xml(200, &body))
            }
            "AbortMultipartUpload" => {
                state.uploads.remove(&query["uploadId"]).ok_or((404, "NoSuchUpload"))?;
                Ok(empty(204))
            }
            other => panic!("the model of S3 has no {other}"),
        }
    }

    fn list(
        &self,
        objects: &BTreeMap<String, Object>,
        bucket: &str,
        query: &BTreeMap<String, String>,
    ) -> http::Response<Bytes> {
        let get = |name: &str| query.get(name).map(String::as_str).unwrap_or_default();
        let prefix = get("prefix");
        let after = if get("continuation-token").is_empty() { get("start-after") } else { get("continuation-token") };
        let most = get("max-keys").parse().unwrap_or(PAGE).min(PAGE);
        let mut found = objects.range(prefix.to_owned()..).filter(|(key, _)| key.as_str() > after);
        let page: Vec<_> = found.by_ref().take_while(|(key, _)| key.starts_with(prefix)).take(most + 1).collect();
        let is_truncated = page.len() > most;
        let page = &page[..page.len().min(most)];
        let mut body = format!(
            "<ListBucketResult><Name>{bucket}</Name><Prefix>{prefix}</Prefix><KeyCount>{}</KeyCount><MaxKeys>{most}</MaxKeys><IsTruncated>{is_truncated}</IsTruncated>",
            page.len()
        );
        for (key, object) in page {
            let _infallible = write!(
                body,
                "<Contents><Key>{key}</Key><LastModified>{}</LastModified><ETag>{}</ETag><Size>{}</Size><StorageClass>STANDARD</StorageClass></Contents>",
                Timestamp::try_from(self.time(object.stored_at)).expect("a time"),
                object.etag.replace('"', "&quot;"),
                object.body.len()
            );
        }
        if let Some((last, _)) = page.last().filter(|_| is_truncated) {
            let _infallible = write!(body, "<NextContinuationToken>{last}</NextContinuationToken>");
        }
        body += "</ListBucketResult>";
        xml(200, &body)
    }

    /// The wall-clock time at this time since the simulation began.
    fn time(&self, elapsed: Duration) -> SystemTime {
        self.clock.now() - self.clock.elapsed().saturating_sub(elapsed)
    }

    fn remove_expired(&self, state: &mut State) {
        let now = self.clock.elapsed();
        let State { buckets, uploads, expiry, .. } = state;
        if expiry.is_empty() || now < DAY {
            return;
        }
        let is_over = |key: &str, since: Duration| {
            let late = DAY.mul_f64(self.decider.random(&("expiry", key, since)));
            let mut rules = expiry.iter().filter(|(prefix, _)| key.starts_with(prefix.as_str()));
            rules.any(|(_, age)| now >= since + *age + late)
        };
        for objects in buckets.values_mut() {
            objects.retain(|key, object| !is_over(key, object.stored_at));
        }
        uploads.retain(|_, upload| !is_over(&upload.key, upload.changed_at));
    }
}

/// The headers that S3 stores with an object.
fn kept(headers: &HeaderMap) -> HeaderMap {
    let is_kept = |name: &HeaderName| {
        let name = name.as_str();
        name.starts_with("x-amz-meta-") || matches!(name, "content-type" | "content-disposition")
    };
    headers.iter().filter(|(name, _)| is_kept(name)).map(|(name, value)| (name.clone(), value.clone())).collect()
}

/// A response with an ETag and with the checksum that the client sent.
fn with_checksum(sent: &HeaderMap, etag: &str) -> http::Response<Bytes> {
    let mut response = http::Response::new(Bytes::new());
    response.headers_mut().insert("etag", value(etag));
    for (name, value) in sent.iter().filter(|(name, _)| name.as_str().starts_with("x-amz-checksum-")) {
        response.headers_mut().insert(name.clone(), value.clone());
    }
    response
}

/// The numbers and the ETags of the parts in a request's body.
fn completed_parts(body: &str) -> Vec<(u32, String)> {
    let between = |text: &str, name: &str| {
        let begin = text.find(&format!("<{name}>"))? + name.len() + 2;
        let end = text.find(&format!("</{name}>"))?;
        Some(text[begin..end].replace("&quot;", "\""))
    };
    let parts = body.split("</Part>").filter_map(|part| {
        let number = between(part, "PartNumber")?.parse().ok()?;
        Some((number, between(part, "ETag")?))
    });
    parts.collect()
}

fn etag(body: &[u8]) -> String {
    format!("\"{:016x}\"", dice::seeded(0, &body))
}

fn value(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("a header")
}

fn http_date(time: SystemTime) -> String {
    let time = Timestamp::try_from(time).expect("a time").to_zoned(jiff::tz::TimeZone::UTC);
    time.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}

fn error_body(code: &str) -> String {
    format!("<Error><Code>{code}</Code><Message>{code}</Message></Error>")
}

fn xml(status: u16, body: &str) -> http::Response<Bytes> {
    let body = format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{body}");
    let response = http::Response::builder().status(status).header("content-type", "application/xml");
    response.body(Bytes::from(body)).expect("a response")
}

fn empty(status: u16) -> http::Response<Bytes> {
    http::Response::builder().status(status).body(Bytes::new()).expect("a response")
}

fn respond(id: u64, answer: Answer) -> http::Response<Bytes> {
    let mut response = answer.unwrap_or_else(|(status, code)| xml(status, &error_body(code)));
    response.headers_mut().insert("x-amz-request-id", value(&format!("{id:016x}")));
    response
}
