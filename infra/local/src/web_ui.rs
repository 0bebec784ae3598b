//! The web UI: a prebuilt one, from the npm registry, served beside the API or written to a folder for hosting elsewhere.
//!
//! npm fetches it, so that npm's own configuration counts: registry, proxy, credentials. What it brings must have the digest that is
//! pinned here. It is kept in the data folder, beside the editor (Monaco) in which the UI shows diffs, and which by itself it would load
//! from a CDN:
//!
//! ```text
//! agent-canvas-<version>-<digest>/    whole: it is renamed to this when all is there
//!     build/                          what is served
//!     LICENSE
//! monaco-editor-<version>-<digest>/   likewise; without it the UI works, but diffs are blank
//!     min/vs/                         what is served
//!     LICENSE, ThirdPartyNotices.txt
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Request, State};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse as _, Response};
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderMap, Method, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha512};
use tokio::process::Command;

/// An npm package that is served to browsers.
#[derive(Debug)]
struct Package {
    /// What it is, at the beginning of a sentence.
    title: &'static str,
    name: &'static str,
    version: &'static str,
    /// Its SHA-512, in base64, as its registry and every lockfile name it.
    integrity: &'static str,
    /// The folder of what is served of it.
    served: &'static str,
    /// Licences, which go wherever the files go.
    licenses: &'static [&'static str],
}

const UI: Package = Package {
    title: "The web UI",
    name: "@openhands/agent-canvas",
    version: "1.20.0",
    integrity: "uq28bmdMapsDN0ltp5ZHYm9xfuk7cHktNkd0NY38w/UTq25wJTqSKSPya+2+ky0+HpGX2vmn0uF3mHuNCoOb2w==",
    served: "build",
    licenses: &[LICENSE],
};

/// The version is the one that [`UI`] would load: [`Site::read`] fails otherwise.
const EDITOR: Package = Package {
    title: "The editor of the web UI",
    name: "monaco-editor",
    version: "0.55.1",
    integrity: "jz4x+TJNFHwHtwuV9vA9rMujcZRb0CEilTEwG2rRSpe/A7Jdkuj8xPKttCgOh+v/lkHy7HsZ64oj+q3xoAFl9A==",
    served: "min/vs",
    licenses: &[LICENSE, "ThirdPartyNotices.txt"],
};
impl Package {
    /// The folder in which it is kept.
    fn folder_name(&self) -> String {
        let name = self.name.rsplit('/').next().unwrap_or(self.name);
        let digest: String = self.integrity.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
        format!("{name}-{}-{digest}", self.version)
    }

    /// Its licences, as files that browsers show.
    fn licenses_from(&self, installed: &Path) -> Result<BTreeMap<String, Bytes>, WebUiError> {
        let read = |license: &&str| {
            let path = installed.join(license);
            let bytes = fs::read(&path).map_err(file_error(&path))?;
            Ok((format!("{}.txt", license.trim_end_matches(".txt")), bytes.into()))
        };
        self.licenses.iter().map(read).collect()
    }
}

/// How the editor's translations begin. The UI never asks for one.
const EDITOR_TRANSLATION: &str = "nls.messages.";

/// The folder in the data folder where it is kept.
pub const FOLDER: &str = "web-ui";
/// What tells the UI which server to talk to.
const SCRIPT: &str = include_str!("web_ui.js");
const INDEX: &str = "index.html";
const LICENSE: &str = "LICENSE";
const ASSETS: &str = "assets/";
/// Behind which the script goes: before any other of the page.
const HEAD: &str = "<head>";
/// A registry that does not answer is given up after so long.
const FETCH_LIMIT: Duration = Duration::from_secs(300);
const UNPACK_LIMIT: Duration = Duration::from_secs(60);
/// How much of what npm says an error quotes.
const QUOTED_LINES: usize = 4;

/// Paths of the API, beside all below `/api/`.
const API_PATHS: [&str; 5] = ["/alive", "/health", "/openapi.json", "/ready", "/server_info"];
/// Where the API is described.
const DOCS: &str = "/docs";

/// Why there is no web UI. Each one reads as a sentence.
#[derive(Debug, thiserror::Error)]
pub enum WebUiError {
    /// A program that is needed.
    #[error("{what} is fetched with {program}, which is not on PATH. {hint}")]
    Missing {
        /// What is fetched.
        what: &'static str,
        /// Which.
        program: &'static str,
        /// Where it comes from.
        hint: &'static str,
    },
    /// A program that failed, with the beginning of what it said.
    #[error("{what} could not be fetched: {program} says: {said}")]
    Failed {
        /// What is fetched.
        what: &'static str,
        /// Which.
        program: &'static str,
        /// What it said.
        said: String,
    },
    /// A program that took too long.
    #[error("{what} could not be fetched: {program} did not end within {} seconds.", limit.as_secs())]
    TooSlow {
        /// What is fetched.
        what: &'static str,
        /// Which.
        program: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The package is another than the one that is pinned.
    #[error("What was fetched is not {package}: its SHA-512 is {found}, not {expected}. Nothing of it is used.")]
    Digest {
        /// Name and version.
        package: String,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: String,
    },
    /// The package is not built as expected.
    #[error("{} {} has no {INDEX} that a script can be put into.", UI.name, UI.version)]
    Index,
    /// The package loads another editor, or loads it in another way.
    #[error("{} {} has no script that loads the editor from {}.", UI.name, UI.version, editor_origin())]
    Editor,
    /// A file or folder.
    #[error("{path} cannot be used: {source}", path = path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Which server the UI is told to talk to.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Its address; `None` is wherever the page is from.
    pub host: Option<String>,
    /// How a user is asked for a key; `None` if the server needs none.
    pub question: Option<&'static str>,
    /// Whether the server knows of a model; otherwise the UI asks for one first.
    pub has_model: bool,
    /// Where else the page may connect to: agent servers have addresses of their own.
    pub reach: &'static str,
}

/// Agent servers on this machine.
pub const LOOPBACK: &str = "http://127.0.0.1:* ws://127.0.0.1:* http://localhost:* ws://localhost:*";
/// Agent servers anywhere.
pub const ANYWHERE: &str = "http: ws: https: wss:";

/// The files of the UI, by their paths without the slash in front.
#[derive(Clone, Debug)]
pub struct Site(BTreeMap<String, Bytes>);

/// The web UI of a server: on its way, there, or not to be had.
#[derive(Clone, Debug)]
pub struct WebUi(Arc<Mutex<Progress>>);

#[derive(Clone, Debug)]
enum Progress {
    Coming,
    There(Arc<Site>),
    Failed(String),
}

impl Default for WebUi {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(Progress::Coming)))
    }
}

impl WebUi {
    /// What became of it.
    pub fn set(&self, outcome: Result<Site, WebUiError>) {
        let progress = match outcome {
            Ok(site) => Progress::There(Arc::new(site)),
            Err(error) => Progress::Failed(error.to_string()),
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }

    /// Serves it in front of these routes: its files, and its first page for every other path that is not the API's, since it
    /// knows its own pages.
    pub fn before(&self, routes: Router) -> Router {
        routes.layer(middleware::from_fn_with_state(self.clone(), serve))
    }

    fn progress(&self) -> Progress {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn serve(State(ui): State<WebUi>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    let is_docs = path.strip_prefix(DOCS).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if !is_read || path.starts_with("/api/") || is_docs || API_PATHS.contains(&path) {
        return next.run(request).await;
    }
    let name = path.trim_start_matches('/');
    let is_page = is_page(name, request.headers());
    match ui.progress() {
        Progress::There(site) => match site.0.get_key_value(name) {
            Some((name, bytes)) if name != INDEX => file(name, bytes),
            Some(_) => site.first_page(),
            None if is_page => site.first_page(),
            None => next.run(request).await,
        },
        Progress::Coming if is_page => waiting(
            "The web UI is being fetched, once. This page looks again every two seconds.",
            "<meta http-equiv=\"refresh\" content=\"2\">",
        ),
        Progress::Failed(text) if is_page => waiting(&format!("{text} The API is served here all the same."), ""),
        Progress::Coming | Progress::Failed(_) => next.run(request).await,
    }
}

/// Whether it is a page that is asked for, not a file: a browser that goes somewhere takes HTML.
fn is_page(name: &str, headers: &HeaderMap) -> bool {
    let last = name.rsplit('/').next().unwrap_or_default();
    let takes_html =
        headers.get(ACCEPT).is_some_and(|value| value.to_str().is_ok_and(|kinds| kinds.contains("text/html")));
    takes_html && (!last.contains('.') || last.ends_with(".html"))
}

fn file(name: &str, bytes: &Bytes) -> Response {
    // Names of assets change with their contents.
    let caching = if name.starts_with(ASSETS) { "public, max-age=31536000, immutable" } else { "no-cache" };
    ([(CONTENT_TYPE, content_type(name)), (CACHE_CONTROL, caching)], bytes.clone()).into_response()
}

fn waiting(text: &str, head: &str) -> Response {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    let page = format!(
        "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">{head}<title>openhands-lambda</title></head>\
         <body style=\"font-family: sans-serif; max-width: 40em; margin: 4em auto; line-height: 1.5\"><p>{text}</p></body></html>"
    );
    (StatusCode::SERVICE_UNAVAILABLE, [(CACHE_CONTROL, "no-store")], Html(page)).into_response()
}

fn content_type(name: &str) -> &'static str {
    match name.rsplit('.').next().unwrap_or_default() {
        "html" => "text/html; charset=utf-8",
        "js" | "mjs" => "text/javascript; charset=utf-8",
        "css" => "text/css; charset=utf-8",
        "json" | "map" => "application/json",
        "webmanifest" => "application/manifest+json",
        "xml" => "application/xml",
        "txt" => "text/plain; charset=utf-8",
        "svg" => "image/svg+xml",
        "png" => "image/png",
        "ico" => "image/x-icon",
        "gif" => "image/gif",
        "jpg" | "jpeg" => "image/jpeg",
        "webp" => "image/webp",
        "woff2" => "font/woff2",
        "mp3" => "audio/mpeg",
        "wav" => "audio/wav",
        _ => "application/octet-stream",
    }
}

impl Site {
    /// Reads the files of a built UI, and puts into its first page which server to talk to and where the editor is.
    fn read(folder: &Path, connection: &Connection) -> Result<Self, WebUiError> {
        let mut files = files_below(folder)?;
        let replaced = with_own_editor(&files)?;
        let imports: BTreeMap<String, String> =
            replaced.iter().map(|(name, (own, _))| (format!("/{name}"), format!("/{own}"))).collect();
        files.extend(replaced.into_values());
        let index = files.get(INDEX).and_then(|bytes: &Bytes| std::str::from_utf8(bytes).ok());
        let (before, behind) = index.and_then(|text| text.split_once(HEAD)).ok_or(WebUiError::Index)?;
        let index = format!(
            "{before}{HEAD}{}<script type=\"importmap\">{}</script><script>{}</script>{behind}",
            policy(connection),
            in_script(&json!({"imports": imports})),
            script(connection)
        );
        files.insert(INDEX.to_owned(), index.into());
        Ok(Self(files))
    }

    /// Adds the editor, after fetching it if it is not there yet.
    ///
    /// # Errors
    /// It cannot be fetched, or is another than expected. The site is as it was then: the UI works, but diffs are blank.
    pub async fn add_editor(&mut self, folder: &Path) -> Result<(), WebUiError> {
        let installed = install(&EDITOR, folder).await?;
        let at = editor_path();
        let mut files = EDITOR.licenses_from(&installed)?;
        for (name, bytes) in files_below(&installed.join(EDITOR.served))? {
            if !name.starts_with(EDITOR_TRANSLATION) {
                files.insert(format!("vs/{name}"), bytes);
            }
        }
        self.0.extend(files.into_iter().map(|(name, bytes)| (format!("{at}/{name}"), bytes)));
        Ok(())
    }

    fn first_page(&self) -> Response {
        let bytes = self.0.get(INDEX).cloned().unwrap_or_default();
        ([(CONTENT_TYPE, content_type(INDEX)), (CACHE_CONTROL, "no-store")], bytes).into_response()
    }

    /// Writes the files to a folder, to be hosted from there.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), WebUiError> {
        for (name, bytes) in &self.0 {
            let path = folder.join(name);
            let parent = path.parent().unwrap_or(folder);
            fs::create_dir_all(parent).map_err(file_error(parent))?;
            fs::write(&path, bytes).map_err(file_error(&path))?;
        }
        Ok(())
    }

    /// How many files there are.
    #[must_use]
    pub fn files(&self) -> usize {
        self.0.len()
    }
}

/// The files below a folder, by their paths from there.
fn files_below(folder: &Path) -> Result<BTreeMap<String, Bytes>, WebUiError> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(current) = folders.pop() {
        for entry in fs::read_dir(&current).map_err(file_error(&current))? {
            let path = entry.map_err(file_error(&current))?.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Some(name) = path.strip_prefix(folder).ok().and_then(Path::to_str) {
                let bytes = fs::read(&path).map_err(file_error(&path))?;
                files.insert(name.to_owned(), bytes.into());
            }
        }
    }
    Ok(files)
}

/// Where the UI loads its editor from by itself.
fn editor_origin() -> String {
    format!("https://cdn.jsdelivr.net/npm/{}@{}/{}", EDITOR.name, EDITOR.version, EDITOR.served)
}

/// Where the editor is served here.
fn editor_path() -> String {
    format!("{ASSETS}{}-{}", EDITOR.name, EDITOR.version)
}

/// The scripts that load the editor, by their names: each as it is when it loads the one that is served here, with a name of its own.
///
/// Browsers keep assets for a year by their names. They get the changed ones by an import map of the first page, which they do not keep:
/// who has been here before would otherwise go on with the script that loads the editor from the CDN.
fn with_own_editor(files: &BTreeMap<String, Bytes>) -> Result<BTreeMap<String, (String, Bytes)>, WebUiError> {
    let (origin, own) = (editor_origin(), format!("/{}/vs", editor_path()));
    let mut replaced = BTreeMap::new();
    for (name, bytes) in files {
        let Some(stem) = name.strip_suffix(".js") else { continue };
        let Ok(text) = std::str::from_utf8(bytes) else { continue };
        if text.contains(&origin) {
            let changed = format!("{stem}.{}-{}.js", EDITOR.name, EDITOR.version);
            replaced.insert(name.clone(), (changed, text.replace(&origin, &own).into()));
        }
    }
    if replaced.is_empty() { Err(WebUiError::Editor) } else { Ok(replaced) }
}

/// The page loads nothing from elsewhere, and calls this server and its agent servers alone, as far as it is known where those are. By
/// itself the UI would also load fonts and the logos of MCP servers, ask for newer versions of itself, and call its makers' telemetry.
fn policy(connection: &Connection) -> String {
    let host = connection.host.as_deref().and_then(|host| host.parse::<reqwest::Url>().ok());
    let host = host.map(|host| host.origin().ascii_serialization()).unwrap_or_default();
    let reach = connection.reach;
    format!(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' blob:; \
         style-src 'self' 'unsafe-inline'; font-src 'self' data:; img-src 'self' data: blob:; \
         worker-src 'self' blob:; \
         connect-src 'self' data: blob: {host} {reach}\">"
    )
}

fn script(connection: &Connection) -> String {
    let server = json!({
        "host": connection.host,
        "asks_for_key": connection.question.is_some(),
        "question": connection.question,
        "has_model": connection.has_model,
    });
    SCRIPT.replace("__SERVER__", &in_script(&server))
}

/// As it can be in a script of a page, which `<` could end.
fn in_script(value: &Value) -> String {
    value.to_string().replace('<', "\\u003c")
}

/// Gives the UI of this folder, after fetching it if it is not there yet, without its editor.
///
/// # Errors
/// It cannot be fetched, or is another than expected; nothing of it is left behind then.
pub async fn ensure(folder: &Path, connection: &Connection) -> Result<Site, WebUiError> {
    let installed = install(&UI, folder).await?;
    let mut site = Site::read(&installed.join(UI.served), connection)?;
    site.0.extend(UI.licenses_from(&installed)?);
    Ok(site)
}

/// Where the package is in this folder, after fetching it if it is not there yet.
async fn install(package: &Package, folder: &Path) -> Result<PathBuf, WebUiError> {
    let installed = folder.join(package.folder_name());
    if !installed.is_dir() {
        tracing::info!("Fetching {} {} for the web UI.", package.name, package.version);
        fs::create_dir_all(folder).map_err(file_error(folder))?;
        // Gone when dropped, whatever happens.
        let draft = tempfile::Builder::new().prefix("fetching-").tempdir_in(folder).map_err(file_error(folder))?;
        fetch(package, draft.path()).await?;
        let unpacked = draft.path().join("package");
        // Another run may have been faster; a folder with anything in it is not replaced.
        if let Err(source) = fs::rename(&unpacked, &installed)
            && !installed.is_dir()
        {
            return Err(WebUiError::File { path: installed, source });
        }
    }
    Ok(installed)
}

/// Fetches the package, and unpacks what is needed of it into `package/` in this folder.
async fn fetch(package: &Package, folder: &Path) -> Result<(), WebUiError> {
    let what = package.title;
    let mut npm = Command::new("npm");
    npm.arg("pack").arg(format!("{}@{}", package.name, package.version)).arg("--pack-destination").arg(folder);
    // Its own scripts have nothing to do here.
    npm.args(["--ignore-scripts", "--loglevel=error", "--no-update-notifier", "--no-fund"]).current_dir(folder);
    let hint = "It comes with Node.js; without --ui nothing of it is needed.";
    run(what, "npm", hint, npm, FETCH_LIMIT).await?;
    let packed = fs::read_dir(folder)
        .map_err(file_error(folder))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "tgz"))
        .ok_or_else(|| WebUiError::Failed {
            what,
            program: "npm",
            said: "nothing, and it left no package.".to_owned(),
        })?;
    check(package, &fs::read(&packed).map_err(file_error(&packed))?)?;
    let mut tar = Command::new("tar");
    tar.arg("-xzf").arg(&packed).arg("-C").arg(folder);
    tar.args(package.licenses.iter().chain([&package.served]).map(|member| format!("package/{member}")));
    run(what, "tar", "Every distribution has it.", tar, UNPACK_LIMIT).await
}

/// Whether it is the package that is pinned here.
fn check(package: &Package, packed: &[u8]) -> Result<(), WebUiError> {
    let Package { name, version, integrity: expected, .. } = package;
    let found = BASE64_STANDARD.encode(Sha512::digest(packed));
    if found == *expected {
        Ok(())
    } else {
        Err(WebUiError::Digest { package: format!("{name} {version}"), expected, found })
    }
}

async fn run(
    what: &'static str,
    program: &'static str,
    hint: &'static str,
    mut command: Command,
    limit: Duration,
) -> Result<(), WebUiError> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let ended = tokio::time::timeout(limit, command.output());
    let output = match ended.await.map_err(|_| WebUiError::TooSlow { what, program, limit })? {
        Ok(output) => output,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(WebUiError::Missing { what, program, hint });
        }
        Err(error) => return Err(WebUiError::Failed { what, program, said: format!("{error}.") }),
    };
    if output.status.success() {
        Ok(())
    } else {
        Err(WebUiError::Failed { what, program, said: beginning_of(&output) })
    }
}

/// The beginning of what a program said, in one line: npm says first what is wrong, and last what is always good advice.
fn beginning_of(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    let lines = said.lines().map(|line| line.trim().trim_start_matches("npm error").trim());
    let lines: Vec<&str> = lines.filter(|line| !line.is_empty()).take(QUOTED_LINES).collect();
    if lines.is_empty() { format!("{}.", output.status) } else { format!("{}.", lines.join(" ").trim_end_matches('.')) }
}

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> WebUiError {
    move |source| WebUiError::File { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::routing::get;
    use tempfile::TempDir;
    use tower::ServiceExt as _;

    use super::*;

    const HERE: Connection = Connection { host: None, question: None, has_model: true, reach: LOOPBACK };

    const LOADER: &str = "a={vs:`https://cdn.jsdelivr.net/npm/monaco-editor@0.55.1/min/vs`}";

    fn built() -> TempDir {
        let folder = TempDir::new().unwrap();
        fs::create_dir(folder.path().join("assets")).unwrap();
        fs::write(folder.path().join(INDEX), "<!DOCTYPE html><html><head><title>UI</title></head></html>").unwrap();
        fs::write(folder.path().join("assets/app-1.js"), "app()").unwrap();
        fs::write(folder.path().join("assets/tab-1.js"), LOADER).unwrap();
        fs::write(folder.path().join("favicon.svg"), "<svg/>").unwrap();
        folder
    }

    struct Answer {
        status: u16,
        kind: String,
        caching: String,
        body: String,
    }

    async fn ask(ui: &WebUi, method: Method, path: &str, accept: &str) -> Answer {
        let api = get(async || "the API").post(async || "the API");
        let routes = Router::new().route("/api/v1/settings", api.clone()).route("/alive", api.clone()).route("/", api);
        let request = Request::builder().method(method).uri(path).header(ACCEPT, accept).body(Body::empty()).unwrap();
        let answer = ui.before(routes).oneshot(request).await.unwrap();
        let header = |name| answer.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
        let (status, kind, caching) = (answer.status().as_u16(), header(CONTENT_TYPE), header(CACHE_CONTROL));
        let body = to_bytes(answer.into_body(), usize::MAX).await.unwrap();
        Answer { status, kind, caching, body: String::from_utf8(body.to_vec()).unwrap() }
    }

    const HTML: &str = "text/html,application/xhtml+xml,*/*;q=0.8";

    #[tokio::test]
    async fn files_pages_and_the_api_are_told_apart() {
        let ui = WebUi::default();
        ui.set(Site::read(built().path(), &HERE));
        for path in ["/", "/index.html", "/conversations/1", "/settings/llm?from=here"] {
            let page = ask(&ui, Method::GET, path, HTML).await;
            assert_eq!((page.status, page.kind.as_str()), (200, "text/html; charset=utf-8"), "{path}");
            assert_eq!(page.caching, "no-store", "{path}: the next run may serve another");
            assert!(page.body.contains("<title>UI</title>"), "{path}: {}", page.body);
        }
        let script = ask(&ui, Method::GET, "/assets/app-1.js", "*/*").await;
        assert_eq!((script.kind.as_str(), script.body.as_str()), ("text/javascript; charset=utf-8", "app()"));
        assert!(script.caching.contains("immutable"));
        let icon = ask(&ui, Method::GET, "/favicon.svg", "image/*").await;
        assert_eq!((icon.kind.as_str(), icon.caching.as_str()), ("image/svg+xml", "no-cache"));
        for (method, path) in [(Method::GET, "/api/v1/settings"), (Method::GET, "/alive"), (Method::POST, "/")] {
            assert_eq!(ask(&ui, method, path, HTML).await.body, "the API", "{path}");
        }
        for path in ["/api/v1/none", "/assets/app-2.js", "/assets/../Cargo.toml", "/%2e%2e/etc/passwd.txt"] {
            assert_eq!(ask(&ui, Method::GET, path, HTML).await.status, 404, "{path}");
        }
        assert_eq!(ask(&ui, Method::GET, "/none", "application/json").await.status, 404, "no page was asked for");
    }

    #[test]
    fn the_page_is_told_which_server_it_is_of_before_anything_runs() {
        let index = |connection: &Connection| {
            let site = Site::read(built().path(), connection).unwrap();
            String::from_utf8(site.0[INDEX].to_vec()).unwrap()
        };
        let page = index(&HERE);
        assert!(page.starts_with("<!DOCTYPE html><html><head><meta http-equiv=\"Content-Security-Policy\""), "{page}");
        assert!(page.contains(r#""host":null,"asks_for_key":false"#) && page.contains(LOOPBACK), "{page}");
        let host = Some("https://api.example.org/v1</script>".to_owned());
        let page = index(&Connection { host, question: Some("Key?"), has_model: false, reach: ANYWHERE });
        assert!(page.contains(r#""host":"https://api.example.org/v1\u003c/script>","asks_for_key":true"#), "{page}");
        assert!(page.contains("blob: https://api.example.org http: ws:"), "{page}");
        assert!(page.contains("img-src 'self' data: blob:;"), "{page}");
        assert_eq!(page.matches("</script>").count(), 2, "{page}");
    }

    fn text(site: &Site, name: &str) -> String {
        let bytes = site.0.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", site.0.keys()));
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[test]
    fn the_page_loads_its_editor_from_here() {
        let site = Site::read(built().path(), &HERE).unwrap();
        let page = text(&site, INDEX);
        let map = page.split_once("<script type=\"importmap\">").unwrap().1.split_once("</script>").unwrap().0;
        let map: Value = serde_json::from_str(map).unwrap();
        assert_eq!(map, json!({"imports": {"/assets/tab-1.js": "/assets/tab-1.monaco-editor-0.55.1.js"}}));
        assert_eq!(text(&site, "assets/tab-1.monaco-editor-0.55.1.js"), "a={vs:`/assets/monaco-editor-0.55.1/vs`}");
        assert_eq!(text(&site, "assets/tab-1.js"), LOADER, "what browsers may have kept is not changed");
        assert!(page.find("importmap") < page.find("openhands-backends"), "{page}");
        let policy = page.split_once("content=\"").unwrap().1.split_once('"').unwrap().0;
        assert!(!policy.contains("cdn"), "{policy}");
    }

    #[test]
    fn a_page_that_loads_another_editor_is_not_served() {
        let folder = built();
        for other in ["app()", "a={vs:`https://cdn.jsdelivr.net/npm/monaco-editor@0.56.0/min/vs`}"] {
            fs::write(folder.path().join("assets/tab-1.js"), other).unwrap();
            let error = Site::read(folder.path(), &HERE).unwrap_err();
            assert!(matches!(error, WebUiError::Editor), "{error}");
            assert!(error.to_string().contains("monaco-editor@0.55.1/min/vs"), "{error}");
        }
    }

    /// As a package is when it has been fetched.
    fn installed(folder: &Path, package: &Package, files: &[(&str, &str)]) -> PathBuf {
        let at = folder.join(package.folder_name());
        for (name, text) in files {
            let path = at.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        at
    }

    #[tokio::test]
    async fn the_editor_is_served_beside_the_ui() {
        let folder = TempDir::new().unwrap();
        let page = "<html><head></head></html>";
        let files = [("build/index.html", page), ("build/assets/tab-1.js", LOADER), ("LICENSE", "of the UI")];
        installed(folder.path(), &UI, &files);
        let files = [
            ("min/vs/loader.js", "load()"),
            ("min/vs/editor/editor.main.css", "a{}"),
            ("min/vs/nls.messages-loader.js", "translate()"),
            ("min/vs/nls.messages.de.js.js", "deutsch()"),
            ("LICENSE", "of the editor"),
            ("ThirdPartyNotices.txt", "of others"),
        ];
        let editor = installed(folder.path(), &EDITOR, &files);
        let mut site = ensure(folder.path(), &HERE).await.unwrap();
        let without = site.files();

        // What is not whole costs the UI nothing.
        fs::rename(editor.join("min"), editor.join("hidden")).unwrap();
        assert!(matches!(site.add_editor(folder.path()).await, Err(WebUiError::File { .. })));
        fs::rename(editor.join("hidden"), editor.join("min")).unwrap();
        fs::rename(editor.join(LICENSE), editor.join("hidden")).unwrap();
        assert!(matches!(site.add_editor(folder.path()).await, Err(WebUiError::File { .. })));
        fs::rename(editor.join("hidden"), editor.join(LICENSE)).unwrap();
        assert_eq!(site.files(), without);

        site.add_editor(folder.path()).await.unwrap();
        assert_eq!(site.files(), without + files.len() - 1, "all but the translation: {:?}", site.0.keys());
        assert_eq!(text(&site, "LICENSE.txt"), "of the UI");
        assert_eq!(text(&site, "assets/monaco-editor-0.55.1/LICENSE.txt"), "of the editor");
        assert_eq!(text(&site, "assets/monaco-editor-0.55.1/ThirdPartyNotices.txt"), "of others");
        let ui = WebUi::default();
        ui.set(Ok(site));
        let script = ask(&ui, Method::GET, "/assets/monaco-editor-0.55.1/vs/loader.js", "*/*").await;
        assert_eq!((script.kind.as_str(), script.body.as_str()), ("text/javascript; charset=utf-8", "load()"));
        let style = ask(&ui, Method::GET, "/assets/monaco-editor-0.55.1/vs/editor/editor.main.css", "*/*").await;
        assert_eq!(style.kind, "text/css; charset=utf-8");
    }

    #[test]
    fn a_page_that_cannot_be_told_is_not_served() {
        let folder = built();
        fs::write(folder.path().join(INDEX), "<html></html>").unwrap();
        assert!(matches!(Site::read(folder.path(), &HERE), Err(WebUiError::Index)));
    }

    #[tokio::test]
    async fn until_it_is_there_its_page_says_why_not() {
        let ui = WebUi::default();
        let page = ask(&ui, Method::GET, "/", HTML).await;
        assert!(page.status == 503 && page.body.contains("http-equiv=\"refresh\""), "{}", page.body);
        let failed = WebUiError::Failed { what: UI.title, program: "npm", said: "<b> & more".to_owned() };
        ui.set(Err(failed));
        let page = ask(&ui, Method::GET, "/", HTML).await;
        assert!(page.status == 503 && page.body.contains("npm says: &lt;b> &amp; more"), "{}", page.body);
        assert!(!page.body.contains("refresh"), "{}", page.body);
        for (path, accept) in [("/api/v1/settings", HTML), ("/alive", HTML), ("/", "*/*")] {
            assert_eq!(ask(&ui, Method::GET, path, accept).await.body, "the API", "{path}");
        }
    }

    #[tokio::test]
    async fn what_is_not_the_pinned_package_is_not_used() {
        for package in [&UI, &EDITOR] {
            let error = check(package, b"something else").unwrap_err().to_string();
            let names = error.contains(package.name) && error.contains(package.integrity);
            assert!(names && error.contains("Nothing of it is used"), "{error}");
        }
        let limit = Duration::from_secs(5);
        let missing = run(UI.title, "npm", "Get it.", Command::new("no-such-program-here"), limit).await;
        let missing = missing.unwrap_err().to_string();
        assert_eq!(missing, "The web UI is fetched with npm, which is not on PATH. Get it.");
        let mut fails = Command::new("sh");
        fails.args(["-c", "echo npm error first >&2; echo second >&2; exit 1"]);
        let failed = run(EDITOR.title, "npm", "", fails, limit).await.unwrap_err().to_string();
        assert_eq!(failed, "The editor of the web UI could not be fetched: npm says: first second.");
        let mut hangs = Command::new("sleep");
        hangs.arg("60");
        let slow = run(UI.title, "npm", "", hangs, Duration::from_millis(10)).await.unwrap_err();
        assert!(matches!(slow, WebUiError::TooSlow { .. }), "{slow}");
    }

    #[test]
    fn it_can_be_written_to_a_folder() {
        let folder = TempDir::new().unwrap();
        let site = Site::read(built().path(), &HERE).unwrap();
        site.write(folder.path()).unwrap();
        assert_eq!(site.files(), 5);
        assert_eq!(fs::read_to_string(folder.path().join("assets/app-1.js")).unwrap(), "app()");
        assert!(fs::read_to_string(folder.path().join(INDEX)).unwrap().contains("openhands-backends"));
    }
}
