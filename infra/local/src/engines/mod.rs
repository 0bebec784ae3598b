//! Embedded engines: DynamoDB, S3 and SQS inside this process.
//!
//! AWS SDK clients in this process reach them without a socket: [`Engines::sdk_config`] has an HTTP client that calls their handlers.
//! For functions in other processes ([`Engines::listening`]) they also listen on loopback ports, where `signature.rs` verifies every
//! request.
//!
//! Records are stored in a SQLite file and objects in a folder, both in the data folder. Queues are in memory, so messages are lost
//! when the process ends: the start saga uses messages as notifications only, and enqueues new ones for unfinished tasks.

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests")]
mod attacks;
mod dynamodb;
mod in_process;
mod s3;
mod signature;
mod sqs;
#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "tests")]
mod tests;

use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aws_config::{AppName, BehaviorVersion, Region, SdkConfig};
use aws_types::service_config::{LoadServiceConfig, ServiceConfigKey};
use axum::Router;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use self::dynamodb::DynamoDb;
pub use self::dynamodb::InMemoryDynamoDb;
pub(crate) use self::dynamodb::open_failure;
use self::in_process::InProcessClient;
use crate::access::Origins;
use crate::migration;
use crate::private_file;

/// The AWS region of the engines.
pub const REGION: &str = "us-east-1";

/// Endpoints of engines without a port. Host names below `.invalid` never resolve.
const IN_PROCESS_DYNAMODB: &str = "http://dynamodb.invalid";
const IN_PROCESS_SQS: &str = "http://sqs.invalid";
/// The endpoint of S3 in processes that do not serve presigned links.
pub const IN_PROCESS_S3: &str = "http://s3.invalid";

/// The time that requests in flight have to finish when the engines stop.
const GRACE_PERIOD: Duration = Duration::from_secs(3);
/// How long a start waits until another process releases the data folder.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// The loopback ports to listen on; 0 selects a free port.
#[derive(Clone, Copy, Debug, Default)]
pub struct EnginePorts {
    pub dynamodb: u16,
    pub s3: u16,
    pub sqs: u16,
}

/// Why the engines did not start. Each message is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The data folder or a file in it cannot be created, read or written.
    #[error("{path} in the data folder cannot be used: {source}. Check that it is writable and that the disk is not full.", path = path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("The data folder {path} is in use by another process. Stop that process or choose another folder.", path = path.display())]
    InUse { path: PathBuf },
    #[error(
        "Port {port} on 127.0.0.1 cannot be opened for {engine}: {source}. Stop the process that uses it or choose another port."
    )]
    Port { engine: &'static str, port: u16, source: io::Error },
    /// The SQLite file is locked, damaged or not a database.
    #[error("The database {path} cannot be opened: {reason}.", path = path.display())]
    Database { path: PathBuf, reason: String },
    #[error("{path} does not contain the engines' credentials: {reason}. Delete the file to create new credentials.", path = path.display())]
    Credentials { path: PathBuf, reason: String },
    #[error("\"{name}\" is not a bucket name that S3 allows.")]
    BucketName { name: String },
    #[error("The data folder {path} has version {found}, and this program supports versions up to {supported}. Use a newer version of this program, or choose another folder.", path = path.display())]
    Newer { path: PathBuf, found: u32, supported: u32 },
    /// It was written before version 1.
    #[error("The data folder {path} was written by a version of this program that is too old to migrate from: it lacks {missing}. Choose another folder.", path = path.display())]
    TooOld { path: PathBuf, missing: String },
    #[error("{path} does not contain the version of a data folder. Delete the file if the data folder was not written by a newer version of this program.", path = path.display())]
    Version { path: PathBuf },
    /// The database is unchanged; the next start of the program migrates it.
    #[error("The data folder {path} cannot be migrated: {reason}. Its data is unchanged; the next start tries again.", path = path.display())]
    Migration { path: PathBuf, reason: String },
}

impl EngineError {
    pub(crate) fn folder(path: &Path, source: io::Error) -> Self {
        Self::Folder { path: path.to_owned(), source }
    }
}

/// The key pair that the engines accept. It is created once for a data folder, so that links and other processes' credentials stay
/// valid after a restart.
#[derive(Clone, Serialize, Deserialize)]
pub struct EngineCredentials {
    pub access_key_id: String,
    pub secret_access_key: String,
}

impl fmt::Debug for EngineCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineCredentials").field("access_key_id", &self.access_key_id).finish_non_exhaustive()
    }
}

/// The running engines. Dropping them stops them as well, but only [`Engines::shutdown`] waits until they have stopped.
#[derive(Debug)]
pub struct Engines {
    /// The endpoint of DynamoDB: `http://127.0.0.1:<port>` if it listens, otherwise an address that only the HTTP client of
    /// [`Engines::sdk_config`] resolves.
    pub dynamodb: String,
    /// The endpoint of S3, likewise. It is the prefix of presigned links.
    pub s3: String,
    /// The endpoint of SQS, likewise.
    pub sqs: String,
    /// The key pair that requests are signed with.
    pub credentials: EngineCredentials,
    buckets: PathBuf,
    client: InProcessClient,
    s3_router: Router,
    database: DynamoDb,
    // The engines stop when this becomes true or is dropped.
    stop: watch::Sender<bool>,
    servers: Vec<JoinHandle<()>>,
}

impl Engines {
    /// Starts the engines on a data folder, which is created if it is missing. They have no port: only SDK clients in this process
    /// reach them. `s3_url` is the prefix of presigned S3 links; the caller has to serve them there ([`Engines::s3_router`]).
    pub async fn in_process(data: &Path, s3_url: &str) -> Result<Self, EngineError> {
        let urls = [IN_PROCESS_DYNAMODB, s3_url, IN_PROCESS_SQS].map(ToOwned::to_owned);
        Self::start(data, urls, None).await
    }

    /// Starts the engines on a data folder, which is created if it is missing, and listens on loopback ports for other processes.
    /// Every request has to be signed with [`Engines::credentials`]. Requests from web pages are refused, except for presigned links
    /// in pages of the origins `pages`.
    pub async fn listening(data: &Path, ports: EnginePorts, pages: &Origins) -> Result<Self, EngineError> {
        let (dynamodb, dynamodb_url) = listen("DynamoDB", ports.dynamodb)?;
        let (s3, s3_url) = listen("S3", ports.s3)?;
        let (sqs, sqs_url) = listen("SQS", ports.sqs)?;
        Self::start(data, [dynamodb_url, s3_url, sqs_url], Some(([dynamodb, s3, sqs], pages))).await
    }

    async fn start(
        data: &Path,
        [dynamodb, s3, sqs]: [String; 3],
        listeners: Option<([TcpListener; 3], &Origins)>,
    ) -> Result<Self, EngineError> {
        let folder = |path: &Path| private_file::make_folder(path).map_err(|source| EngineError::folder(path, source));
        folder(data)?;
        let lock = lock(data).await?;
        let buckets = data.join("s3");
        folder(&buckets)?;
        private_file::make_tree_private(&buckets).map_err(|source| EngineError::folder(&buckets, source))?;
        let credentials = credentials(&data.join("engine-credentials.json"))?;
        let file = data.join(migration::DATABASE);
        let folder = data.to_owned();
        tokio::task::spawn_blocking(move || migration::prepare(&folder))
            .await
            .map_err(|error| EngineError::Migration { path: data.to_owned(), reason: error.to_string() })??;
        private_file::make_private(&file).map_err(|source| EngineError::folder(&file, source))?;
        for suffix in ["-wal", "-shm"] {
            let path = data.join(format!("{}{suffix}", migration::DATABASE));
            if path.exists() {
                private_file::make_private(&path).map_err(|source| EngineError::folder(&path, source))?;
            }
        }

        let (stop, stopped) = watch::channel(false);
        let s3_router = s3::router(&buckets, &credentials)?;
        let sqs_router = sqs::router(&sqs, stopped.clone());
        let database = DynamoDb::start(file, lock).await?;
        let dynamodb_router = database.router();
        let mut servers = Vec::new();
        if let Some(([dynamodb_listener, s3_listener, sqs_listener], pages)) = listeners {
            let verified = |service: &'static str, limit: usize, router: &Router| {
                signature::verified(router.clone(), service, limit, credentials.clone())
            };
            for (engine, listener, router) in [
                ("DynamoDB", dynamodb_listener, verified("dynamodb", dynamodb::MAX_REQUEST, &dynamodb_router)),
                ("S3", s3_listener, signature::s3_on_loopback(s3_router.clone(), pages.clone())),
                ("SQS", sqs_listener, verified("sqs", sqs::MAX_REQUEST, &sqs_router)),
            ] {
                servers.push(serve(engine, listener, router, stopped.clone())?);
            }
        }
        let client = InProcessClient::new([
            (dynamodb.clone(), dynamodb_router),
            (s3.clone(), s3_router.clone()),
            (sqs.clone(), sqs_router),
        ]);
        Ok(Self { dynamodb, s3, sqs, credentials, buckets, client, s3_router, database, stop, servers })
    }

    /// The environment variables with which another process uses these engines, if they listen.
    #[must_use]
    pub fn environment(&self) -> Vec<(String, String)> {
        [
            ("AWS_ENDPOINT_URL_DYNAMODB", self.dynamodb.as_str()),
            ("AWS_ENDPOINT_URL_S3", &self.s3),
            ("AWS_ENDPOINT_URL_SQS", &self.sqs),
            ("AWS_REGION", REGION),
            ("AWS_ACCESS_KEY_ID", &self.credentials.access_key_id),
            ("AWS_SECRET_ACCESS_KEY", &self.credentials.secret_access_key),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }

    /// The configuration for SDK clients in this process, which reach the engines without a socket. It does not depend on the
    /// environment, so that local data is never sent to an AWS account for which the shell is configured.
    pub async fn sdk_config(&self) -> SdkConfig {
        self.sdk_config_builder().await.http_client(self.client.clone()).build()
    }

    /// The configuration for SDK clients that reach the engines through their ports.
    pub async fn network_sdk_config(&self) -> SdkConfig {
        self.sdk_config_builder().await.build()
    }

    async fn sdk_config_builder(&self) -> aws_types::sdk_config::Builder {
        let keys = aws_sdk_dynamodb::config::Credentials::new(
            &self.credentials.access_key_id,
            &self.credentials.secret_access_key,
            None,
            None,
            "embedded engines",
        );
        let loader = aws_config::defaults(BehaviorVersion::latest())
            .region(Region::from_static(REGION))
            .credentials_provider(keys);
        // Without a name the loader searches the profile files for one.
        let loader = match AppName::new("openhands-lambda-local") {
            Ok(name) => loader.app_name(name),
            Err(_) => loader,
        };
        let mut config = loader.load().await.into_builder();
        config.set_endpoint_url(None);
        config.service_config(Endpoints { dynamodb: self.dynamodb.clone(), s3: self.s3.clone(), sqs: self.sqs.clone() })
    }

    /// The handler of S3. It verifies signatures, including those of presigned links.
    pub fn s3_router(&self) -> Router {
        self.s3_router.clone()
    }

    /// Creates a bucket if it is missing.
    pub fn ensure_bucket(&self, name: &str) -> Result<(), EngineError> {
        if !::s3s::path::check_bucket_name(name) {
            return Err(EngineError::BucketName { name: name.to_owned() });
        }
        let path = self.buckets.join(name);
        private_file::make_folder(&path).map_err(|source| EngineError::folder(&path, source))
    }

    /// Removes objects older than `objects` below a prefix of a bucket, and multipart uploads to which no part was added for
    /// `uploads`. Returns the number of removed files. To be called before requests are served.
    pub fn expire(
        &self,
        bucket: &str,
        prefix: &str,
        objects: Duration,
        uploads: Duration,
    ) -> Result<usize, EngineError> {
        s3::expire(&self.buckets, bucket, prefix, objects, uploads)
            .map_err(|source| EngineError::folder(&self.buckets, source))
    }

    /// Stops the engines: finishes requests in flight, returns waiting receives without messages, closes the database with all its data
    /// in one file, and releases the lock on the data folder. Remaining clients get errors.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        for mut server in self.servers {
            if tokio::time::timeout(GRACE_PERIOD, &mut server).await.is_err() {
                server.abort();
            }
        }
        self.database.shutdown().await;
    }
}

/// Sets the endpoint of each SDK client, like the variables `AWS_ENDPOINT_URL_<SERVICE>`.
#[derive(Debug)]
struct Endpoints {
    dynamodb: String,
    s3: String,
    sqs: String,
}

impl LoadServiceConfig for Endpoints {
    fn load_config(&self, key: ServiceConfigKey<'_>) -> Option<String> {
        if key.env() != "AWS_ENDPOINT_URL" {
            return None;
        }
        match key.service_id().to_ascii_lowercase().as_str() {
            "dynamodb" => Some(self.dynamodb.clone()),
            "s3" => Some(self.s3.clone()),
            "sqs" => Some(self.sqs.clone()),
            _ => None,
        }
    }
}

/// Completes when the engines stop or are dropped.
async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the sender was dropped, which also stops the engines.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Serves a router until the engines stop.
fn serve(
    engine: &'static str,
    listener: TcpListener,
    router: Router,
    stop: watch::Receiver<bool>,
) -> Result<JoinHandle<()>, EngineError> {
    let port = listener.local_addr().map_or(0, |address| address.port());
    let listener =
        tokio::net::TcpListener::from_std(listener).map_err(|source| EngineError::Port { engine, port, source })?;
    Ok(tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(stopped(stop)).await {
            tracing::error!(engine, %error, "engines.serving_failed");
        }
    }))
}

fn listen(engine: &'static str, port: u16) -> Result<(TcpListener, String), EngineError> {
    let open = || -> io::Result<_> {
        let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))?;
        listener.set_nonblocking(true)?;
        let url = format!("http://{}", listener.local_addr()?);
        Ok((listener, url))
    };
    open().map_err(|source| EngineError::Port { engine, port, source })
}

/// Locks the data folder for this process. SQLite files can be shared between processes, but the folder of S3 cannot have two
/// writers.
async fn lock(data: &Path) -> Result<File, EngineError> {
    let path = data.join("engines.lock");
    private_file::ensure(&path).map_err(|source| EngineError::folder(&path, source))?;
    let file = OpenOptions::new().write(true).open(&path).map_err(|source| EngineError::folder(&path, source))?;
    let deadline = Instant::now() + LOCK_TIMEOUT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(EngineError::InUse { path: data.to_owned() });
            }
            Err(TryLockError::Error(source)) => return Err(EngineError::Folder { path, source }),
        }
    }
}

/// Reads the credentials, or creates random ones: with a known secret anyone could sign presigned links.
fn credentials(path: &Path) -> Result<EngineCredentials, EngineError> {
    match fs::read(path) {
        Ok(text) => {
            private_file::make_private(path).map_err(|source| EngineError::folder(path, source))?;
            serde_json::from_slice(&text)
                .map_err(|error| EngineError::Credentials { path: path.to_owned(), reason: error.to_string() })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let random = || uuid::Uuid::new_v4().simple().to_string();
            let created = EngineCredentials {
                access_key_id: format!("LOCAL{}", random()[..15].to_uppercase()),
                secret_access_key: random() + &random(),
            };
            serde_json::to_vec_pretty(&created)
                .map_err(io::Error::from)
                .and_then(|text| private_file::write(path, &text, 0o600))
                .map_err(|source| EngineError::folder(path, source))?;
            Ok(created)
        }
        Err(source) => Err(EngineError::folder(path, source)),
    }
}
