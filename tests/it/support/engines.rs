//! The AWS services of a test: the embedded engines, or ministack, an independent implementation of DynamoDB, S3 and
//! SQS in Python, which `OPENHANDS_TEST_AWS=ministack` selects. Code that relies on peculiarities of an embedded engine
//! fails there.
//!
//! Other test code does not depend on the choice, except for tests of the embedded engines themselves.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, OnceLock};

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_dynamodb::config::Credentials;
use local::access::Origins;
use local::engines::{EngineCredentials, EnginePorts, REGION};
use shared::config::Names;
use uuid::Uuid;

/// The account id of the embedded engines.
const EMBEDDED_ACCOUNT: &str = "000000000000";

/// Empty DynamoDB, S3 and SQS.
#[derive(Debug)]
pub struct Engines {
    /// The address of DynamoDB, `http://127.0.0.1:<port>`.
    pub dynamodb: String,
    /// The address of S3.
    pub s3: String,
    /// The address of SQS.
    pub sqs: String,
    /// The id of the account that owns everything.
    pub account: String,
    /// The key pair that signs requests.
    pub credentials: EngineCredentials,
    embedded: Option<local::engines::Engines>,
}

impl Engines {
    /// Starts the engines of a folder, with the data that earlier engines on the same folder left.
    pub async fn start(folder: &Path) -> Self {
        if is_ministack() { Self::ministack(folder) } else { Self::embedded(folder).await }
    }

    async fn embedded(folder: &Path) -> Self {
        // With ports, so that other processes and the proxies of tests can connect.
        let ports = EnginePorts::default();
        let engines = local::engines::Engines::listening(folder, ports, &Origins::default()).await.expect("engines");
        Self {
            dynamodb: engines.dynamodb.clone(),
            s3: engines.s3.clone(),
            sqs: engines.sqs.clone(),
            account: EMBEDDED_ACCOUNT.to_owned(),
            credentials: engines.credentials.clone(),
            embedded: Some(engines),
        }
    }

    /// One process serves all tests: ministack treats each twelve-digit access key as an account of its own.
    fn ministack(folder: &Path) -> Self {
        static ACCOUNTS: Mutex<Option<HashMap<PathBuf, usize>>> = Mutex::new(None);
        static PROCESS: OnceLock<Ministack> = OnceLock::new();
        let Ministack { url, secret, .. } = PROCESS.get_or_init(Ministack::start);
        let mut accounts = ACCOUNTS.lock().expect("accounts");
        let accounts = accounts.get_or_insert_default();
        let next = accounts.len() + 1;
        let account = format!("{:012}", accounts.entry(folder.to_owned()).or_insert(next));
        Self {
            dynamodb: url.clone(),
            s3: url.clone(),
            sqs: url.clone(),
            credentials: EngineCredentials { access_key_id: account.clone(), secret_access_key: secret.clone() },
            account,
            embedded: None,
        }
    }

    /// The names of the resources. Bucket names are globally unique, across accounts too.
    pub fn names(&self, prefix: &str) -> Names {
        let names = Names::with_prefix(prefix);
        Names { bucket: format!("{}-{}", names.bucket, self.account), ..names }
    }

    /// The embedded engines, for operations that AWS has no call for.
    pub fn as_embedded(&self) -> Option<&local::engines::Engines> {
        self.embedded.as_ref()
    }

    /// The environment variables with which another process uses these engines.
    pub fn environment(&self) -> Vec<(String, String)> {
        if let Some(embedded) = &self.embedded {
            return embedded.environment();
        }
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

    /// The configuration of SDK clients in this process. They call the embedded engines without a socket.
    pub async fn sdk_config(&self) -> SdkConfig {
        match &self.embedded {
            Some(embedded) => embedded.sdk_config().await,
            None => self.network_sdk_config().await,
        }
    }

    /// The configuration of SDK clients that use sockets, for tests that pass them the address of a proxy.
    pub async fn network_sdk_config(&self) -> SdkConfig {
        if let Some(embedded) = &self.embedded {
            return embedded.network_sdk_config().await;
        }
        let EngineCredentials { access_key_id, secret_access_key } = &self.credentials;
        aws_config::defaults(BehaviorVersion::latest())
            .region(Region::from_static(REGION))
            .credentials_provider(Credentials::new(access_key_id, secret_access_key, None, None, "ministack"))
            .endpoint_url(&self.dynamodb)
            .load()
            .await
    }

    /// Stops the embedded engines. For ministack it only drops the clients.
    pub async fn shutdown(self) {
        if let Some(embedded) = self.embedded {
            embedded.shutdown().await;
        }
    }
}

/// Whether tests run against ministack.
pub fn is_ministack() -> bool {
    match shared::config::text("OPENHANDS_TEST_AWS").as_deref() {
        None | Some("embedded") => false,
        Some("ministack") => true,
        Some(other) => panic!("OPENHANDS_TEST_AWS is \"{other}\", neither \"embedded\" nor \"ministack\""),
    }
}

/// Returns true, and prints a message, if this run uses ministack. For tests, or parts of tests, of the embedded
/// engines.
pub fn skipped_on_ministack(what: &str) -> bool {
    let skipped = is_ministack();
    if skipped {
        let test = std::thread::current();
        // Not `eprintln!`, whose output is captured for a test that passes.
        writeln!(io::stderr(), "not run on ministack: {}: {what}", test.name().unwrap_or_default()).expect("said");
    }
    skipped
}

/// A ministack process. It ends when its standard input closes, and so with this process, however this one ends.
#[derive(Debug)]
pub struct Ministack {
    pub url: String,
    pub process: Child,
    secret: String,
}

impl Ministack {
    pub fn start() -> Self {
        let temporary = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let log = OpenOptions::new().create(true).append(true).open(temporary.join("ministack.log")).expect("a log");
        let secret = Uuid::new_v4().simple().to_string();
        let mut process = Command::new(installed().join("bin/python"))
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/run-ministack.py"))
            .env_clear()
            .env("AUTH", "true")
            .env("AWS_ACCESS_KEY_ID", EMBEDDED_ACCOUNT)
            .env("AWS_SECRET_ACCESS_KEY", &secret)
            // Otherwise it looks for containers of its own.
            .env("DOCKER_HOST", "unix:///nowhere")
            .env("TMPDIR", temporary)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("ministack starts");
        let mut port = String::new();
        BufReader::new(process.stdout.take().expect("its output")).read_line(&mut port).expect("a line");
        let port: u16 = port.trim().parse().expect("a port: see target/tmp/ministack.log");
        Self { url: format!("http://127.0.0.1:{port}"), process, secret }
    }
}

/// Returns ministack's folder; installs it first if needed.
fn installed() -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("ministack");
    // Other test processes may install it at the same time.
    let lock = File::create(folder.with_extension("lock")).expect("a lock");
    lock.lock().expect("the lock");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/install-ministack.sh");
    let installed = Command::new(script).arg(&folder).output().expect("it runs");
    let said = String::from_utf8_lossy(&installed.stdout);
    let found = fs::exists(folder.join("installed")).expect("the folder is readable");
    assert!(installed.status.success() && found, "{said}{}", String::from_utf8_lossy(&installed.stderr));
    folder
}
