//! DynamoDB, S3 and SQS inside this process.
//!
//! The AWS SDK's clients of this process reach them without a socket: [`Engines::sdk_config`] has an HTTP client that calls their
//! handlers. For functions in other processes ([`Engines::listening`]) they also listen on loopback ports, where
//! `signature.rs` verifies every request.
//!
//! Records are in a SQLite file and objects in a folder, both in the data folder. Queues are in memory: the start saga treats a
//! message as a notification, and enqueues it again for tasks that it finds unfinished.

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
use self::in_process::InProcessClient;
use crate::access::Origins;
use crate::private_file;

/// The region that the engines say they are in.
pub const REGION: &str = "us-east-1";

/// Endpoints of engines without a port. No name server resolves names below `.invalid`.
const IN_PROCESS_DYNAMODB: &str = "http://dynamodb.invalid";
const IN_PROCESS_SQS: &str = "http://sqs.invalid";
/// The endpoint of an S3 whose presigned links nobody serves.
pub const IN_PROCESS_S3: &str = "http://s3.invalid";

/// How long requests in flight may take to end once the engines stop.
const GRACE: Duration = Duration::from_secs(3);
/// How long a start waits for a predecessor on the same data folder to let go of it.
const LOCK_WAIT: Duration = Duration::from_secs(2);

/// The loopback ports to listen on; 0 takes any free one.
#[derive(Clone, Copy, Debug, Default)]
pub struct EnginePorts {
    /// The port of DynamoDB.
    pub dynamodb: u16,
    /// The port of S3.
    pub s3: u16,
    /// The port of SQS.
    pub sqs: u16,
}

/// Why the engines did not start. Each one reads as a sentence.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The data folder or something in it cannot be made, read or written.
    #[error("{path} in the data folder cannot be used: {source}. Check that it is writable and that the disk is not full.", path = path.display())]
    Folder {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process runs on the same data folder.
    #[error("The data folder {path} is in use by another process. Stop that one or choose another folder.", path = path.display())]
    InUse {
        /// The data folder.
        path: PathBuf,
    },
    /// A port cannot be listened on.
    #[error(
        "Port {port} on 127.0.0.1 cannot be opened for {engine}: {source}. Stop what uses it or choose another port."
    )]
    Port {
        /// DynamoDB, S3 or SQS.
        engine: &'static str,
        /// The port that was asked for.
        port: u16,
        /// What the system said.
        source: io::Error,
    },
    /// The SQLite file is locked, damaged or not ours.
    #[error("The database {path} cannot be opened: {reason}.", path = path.display())]
    Database {
        /// The SQLite file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The credentials file is not one.
    #[error("{path} does not hold the engines' credentials: {reason}. Delete it to have new ones made.", path = path.display())]
    Credentials {
        /// The credentials file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Not a name that a bucket can have.
    #[error("\"{name}\" is not a bucket name that S3 allows.")]
    BucketName {
        /// The name.
        name: String,
    },
}

impl EngineError {
    fn folder(path: &Path, source: io::Error) -> Self {
        Self::Folder { path: path.to_owned(), source }
    }
}

/// The key pair that the engines accept. Made once for a data folder, so that links and other processes outlive a
/// restart.
#[derive(Clone, Serialize, Deserialize)]
pub struct EngineCredentials {
    /// `AWS_ACCESS_KEY_ID`
    pub access_key_id: String,
    /// `AWS_SECRET_ACCESS_KEY`
    pub secret_access_key: String,
}

impl fmt::Debug for EngineCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineCredentials").field("access_key_id", &self.access_key_id).finish_non_exhaustive()
    }
}

/// The running engines. Dropping them stops them, too, but only [`Engines::shutdown`] reports when that is done.
#[derive(Debug)]
pub struct Engines {
    /// The endpoint of DynamoDB: `http://127.0.0.1:<port>` where it listens, and otherwise an address that only the HTTP client
    /// of [`Engines::sdk_config`] knows.
    pub dynamodb: String,
    /// The endpoint of S3, likewise. Presigned links begin with it.
    pub s3: String,
    /// The endpoint of SQS, likewise.
    pub sqs: String,
    /// The key pair that requests are signed with.
    pub credentials: EngineCredentials,
    buckets: PathBuf,
    client: InProcessClient,
    s3_router: Router,
    database: DynamoDb,
    // Engines stop when this says so or is gone.
    stop: watch::Sender<bool>,
    servers: Vec<JoinHandle<()>>,
}

impl Engines {
    /// Starts the engines on a data folder, which is made if it is not there. They have no port: only the SDK's clients of this
    /// process reach them. Presigned S3 links begin with `s3_url`, where somebody has to serve them ([`Engines::s3_router`]).
    pub async fn in_process(data: &Path, s3_url: &str) -> Result<Self, EngineError> {
        let urls = [IN_PROCESS_DYNAMODB, s3_url, IN_PROCESS_SQS].map(ToOwned::to_owned);
        Self::start(data, urls, None).await
    }

    /// Starts the engines on a data folder, which is made if it is not there, and lets them listen on loopback ports for other
    /// processes. Every request has to be signed with [`Engines::credentials`]; one from a web page is refused, except for
    /// presigned links that pages of `pages` follow.
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
        let file = data.join("dynamodb.sqlite");
        // SQLite gives its log and its shared memory the mode of the database.
        private_file::ensure(&file).map_err(|source| EngineError::folder(&file, source))?;
        for suffix in ["-wal", "-shm"] {
            let path = data.join(format!("dynamodb.sqlite{suffix}"));
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

    /// The variables with which another process uses these engines, if they listen.
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

    /// The configuration of SDK clients in this process, which reach the engines without a socket. It does not depend on the
    /// environment, so that a shell set up for a real AWS account cannot send local data there.
    pub async fn sdk_config(&self) -> SdkConfig {
        self.configured().await.http_client(self.client.clone()).build()
    }

    /// The configuration of SDK clients that reach the engines through their ports.
    pub async fn network_sdk_config(&self) -> SdkConfig {
        self.configured().await.build()
    }

    async fn configured(&self) -> aws_types::sdk_config::Builder {
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
        // A name spares the loader a look into the profile files for one.
        let loader = match AppName::new("openhands-lambda-local") {
            Ok(name) => loader.app_name(name),
            Err(_) => loader,
        };
        let mut config = loader.load().await.into_builder();
        config.set_endpoint_url(None);
        config.service_config(Endpoints { dynamodb: self.dynamodb.clone(), s3: self.s3.clone(), sqs: self.sqs.clone() })
    }

    /// S3's handler. It verifies signatures, those of presigned links included.
    pub fn s3_router(&self) -> Router {
        self.s3_router.clone()
    }

    /// Makes a bucket, if it is not there yet.
    pub fn ensure_bucket(&self, name: &str) -> Result<(), EngineError> {
        if !::s3s::path::check_bucket_name(name) {
            return Err(EngineError::BucketName { name: name.to_owned() });
        }
        let path = self.buckets.join(name);
        private_file::make_folder(&path).map_err(|source| EngineError::folder(&path, source))
    }

    /// Removes what is older than `objects` below a prefix of a bucket, and multipart uploads that nothing was added to for
    /// `uploads`; returns how many files that were. Meant for before anything is served.
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

    /// Stops the engines: requests in flight are answered, waiting receives return empty, the database is closed with all
    /// its data in the one file, and the data folder is free for the next process. Clients that are left get errors.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        for mut server in self.servers {
            if tokio::time::timeout(GRACE, &mut server).await.is_err() {
                server.abort();
            }
        }
        self.database.shutdown().await;
    }
}

/// Gives each client its own endpoint, as `AWS_ENDPOINT_URL_<SERVICE>` would.
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

/// Ends when the engines are told to stop, or dropped.
async fn stopped(mut stop: watch::Receiver<bool>) {
    // An error means that the sender is gone, which is to stop as well.
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
            tracing::error!(engine, %error, "an embedded engine stopped");
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

/// Takes the data folder for this process. SQLite would share its file, but the folder that S3 keeps is not made
/// for two writers.
async fn lock(data: &Path) -> Result<File, EngineError> {
    let path = data.join("engines.lock");
    private_file::ensure(&path).map_err(|source| EngineError::folder(&path, source))?;
    let file = OpenOptions::new().write(true).open(&path).map_err(|source| EngineError::folder(&path, source))?;
    let give_up = Instant::now() + LOCK_WAIT;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < give_up => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            Err(TryLockError::WouldBlock) => {
                return Err(EngineError::InUse { path: data.to_owned() });
            }
            Err(TryLockError::Error(source)) => return Err(EngineError::Folder { path, source }),
        }
    }
}

/// Reads the credentials, or makes them. They are random because a presigned link is only as good as the secret that signs it.
fn credentials(path: &Path) -> Result<EngineCredentials, EngineError> {
    match fs::read(path) {
        Ok(text) => {
            private_file::make_private(path).map_err(|source| EngineError::folder(path, source))?;
            serde_json::from_slice(&text)
                .map_err(|error| EngineError::Credentials { path: path.to_owned(), reason: error.to_string() })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let random = || uuid::Uuid::new_v4().simple().to_string();
            let made = EngineCredentials {
                access_key_id: format!("LOCAL{}", random()[..15].to_uppercase()),
                secret_access_key: random() + &random(),
            };
            serde_json::to_vec_pretty(&made)
                .map_err(io::Error::from)
                .and_then(|text| private_file::write(path, &text, 0o600))
                .map_err(|source| EngineError::folder(path, source))?;
            Ok(made)
        }
        Err(source) => Err(EngineError::folder(path, source)),
    }
}
