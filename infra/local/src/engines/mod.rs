//! DynamoDB, S3 and SQS inside this process, each on a loopback port.
//!
//! The AWS SDK clients talk to them as they talk to AWS, so nothing above knows the difference. Records are in
//! a SQLite file and objects in a folder, both in the data folder; queues are in memory, because the start saga
//! treats a message as a doorbell and rings again for what it finds unfinished.

mod dynamodb;
mod s3;
mod sqs;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aws_config::{AppName, BehaviorVersion, Region, SdkConfig};
use aws_types::service_config::{LoadServiceConfig, ServiceConfigKey};
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

/// The region that the engines say they are in.
pub const REGION: &str = "us-east-1";

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

/// The key pair that the engines take. Made once for a data folder, so that links and other processes outlive a
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

/// The running engines. Dropping them stops them too, but only [`Engines::shutdown`] says when that is done.
#[derive(Debug)]
pub struct Engines {
    /// Where DynamoDB listens, `http://127.0.0.1:<port>`.
    pub dynamodb: String,
    /// Where S3 listens.
    pub s3: String,
    /// Where SQS listens.
    pub sqs: String,
    /// What requests to them are signed with.
    pub credentials: EngineCredentials,
    buckets: PathBuf,
    // Engines stop when this says so or is gone.
    stop: watch::Sender<bool>,
    database_closed: oneshot::Receiver<()>,
    servers: [JoinHandle<()>; 2],
}

impl Engines {
    /// Starts the engines on a data folder, which is made if it is not there.
    pub async fn start(data: &Path, ports: EnginePorts) -> Result<Self, EngineError> {
        make_folder(data)?;
        let lock = lock(data).await?;
        let buckets = data.join("s3");
        make_folder(&buckets)?;
        let credentials = credentials(&data.join("engine-credentials.json"))?;

        let (dynamodb_listener, dynamodb) = listen("DynamoDB", ports.dynamodb)?;
        let (s3_listener, s3) = listen("S3", ports.s3)?;
        let (sqs_listener, sqs) = listen("SQS", ports.sqs)?;

        let (stop, stopped) = watch::channel(false);
        let database_closed =
            dynamodb::start(data.join("dynamodb.sqlite"), dynamodb_listener, lock, stopped.clone()).await?;
        let servers = [
            s3::start(&buckets, s3_listener, &credentials, stopped.clone())?,
            sqs::start(sqs_listener, &sqs, &credentials.access_key_id, stopped)?,
        ];
        Ok(Self { dynamodb, s3, sqs, credentials, buckets, stop, database_closed, servers })
    }

    /// What another process needs in its environment to use these engines.
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

    /// What the SDK clients of this process need. It does not look at the environment, so that a shell set up
    /// for a real AWS account cannot send local data there.
    pub async fn sdk_config(&self) -> SdkConfig {
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
        config
            .service_config(Endpoints { dynamodb: self.dynamodb.clone(), s3: self.s3.clone(), sqs: self.sqs.clone() })
            .build()
    }

    /// Makes a bucket, if it is not there yet.
    pub fn ensure_bucket(&self, name: &str) -> Result<(), EngineError> {
        if !::s3s::path::check_bucket_name(name) {
            return Err(EngineError::BucketName { name: name.to_owned() });
        }
        make_folder(&self.buckets.join(name))
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

    /// Stops the engines: requests in flight end, waiting receives return empty, the database is closed with all
    /// its data in the one file, and the data folder is free for the next process.
    pub async fn shutdown(self) {
        self.stop.send_replace(true);
        for mut server in self.servers {
            if tokio::time::timeout(GRACE, &mut server).await.is_err() {
                server.abort();
            }
        }
        // The sender is dropped, never used: the thread's end is the message.
        let _ = self.database_closed.await;
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
    router: axum::Router,
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

/// Makes a folder that only its owner can look into; one that is there is left as it is.
fn make_folder(path: &Path) -> Result<(), EngineError> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).map_err(|source| EngineError::folder(path, source))
}

/// Takes the data folder for this process. SQLite would share its file, but the folder that S3 keeps is not made
/// for two writers.
async fn lock(data: &Path) -> Result<File, EngineError> {
    let path = data.join("engines.lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|source| EngineError::folder(&path, source))?;
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

/// Reads the credentials, or makes them. They are random because presigned links are only as good as the secret
/// that signs them, and any web page can send requests to a loopback port.
fn credentials(path: &Path) -> Result<EngineCredentials, EngineError> {
    match fs::read(path) {
        Ok(text) => serde_json::from_slice(&text)
            .map_err(|error| EngineError::Credentials { path: path.to_owned(), reason: error.to_string() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let random = || uuid::Uuid::new_v4().simple().to_string();
            let made = EngineCredentials {
                access_key_id: format!("LOCAL{}", random()[..15].to_uppercase()),
                secret_access_key: random() + &random(),
            };
            write_private(path, &made).map_err(|source| EngineError::folder(path, source))?;
            Ok(made)
        }
        Err(source) => Err(EngineError::folder(path, source)),
    }
}

fn write_private(path: &Path, credentials: &EngineCredentials) -> io::Result<()> {
    // Written beside and renamed: a crash in between must not leave half a file that stops every later start.
    let draft = path.with_extension("tmp");
    let mut options = OpenOptions::new();
    options.create(true).truncate(true).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&draft)?;
    file.write_all(&serde_json::to_vec_pretty(credentials)?)?;
    file.sync_all()?;
    fs::rename(draft, path)
}
