//! The web UI: a prebuilt package from the npm registry, served on the API's port or written to a folder for hosting elsewhere.
//!
//! npm downloads the package, so that npm's configuration applies: registry, proxy, credentials. The download must have the SHA-512
//! digest that is pinned here. It is stored in the data folder, together with the editor (Monaco) in which the UI shows diffs, and
//! which the unchanged UI loads from a CDN:
//!
//! ```text
//! agent-canvas-<version>-<digest>/    complete: the folder gets this name after everything is unpacked
//!     build/                          the served files
//!     LICENSE
//! monaco-editor-<version>-<digest>/   likewise; without it the UI works, but diffs are blank
//!     min/vs/                         the served files
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
use axum::extract::{self, Request};
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
    /// A description, for the beginning of a sentence.
    title: &'static str,
    name: &'static str,
    version: &'static str,
    /// The SHA-512 of the package in base64, as in the registry and in lockfiles.
    integrity: &'static str,
    /// The folder of the package whose files are served.
    served: &'static str,
    /// License files, which are served and written together with the other files.
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

/// The version has to be the one that [`UI`] loads from the CDN: otherwise [`Site::read`] fails.
const EDITOR: Package = Package {
    title: "The editor of the web UI",
    name: "monaco-editor",
    version: "0.55.1",
    integrity: "jz4x+TJNFHwHtwuV9vA9rMujcZRb0CEilTEwG2rRSpe/A7Jdkuj8xPKttCgOh+v/lkHy7HsZ64oj+q3xoAFl9A==",
    served: "min/vs",
    licenses: &[LICENSE, "ThirdPartyNotices.txt"],
};

impl Package {
    /// The name of its folder in the data folder.
    fn folder_name(&self) -> String {
        let name = self.name.rsplit('/').next().unwrap_or(self.name);
        let digest: String = self.integrity.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
        format!("{name}-{}-{digest}", self.version)
    }

    /// The license files, under names with which browsers show them as text.
    fn licenses_from(&self, installed: &Path) -> Result<BTreeMap<String, Bytes>, WebUiError> {
        let read = |license: &&str| {
            let path = installed.join(license);
            let bytes = fs::read(&path).map_err(file_error(&path))?;
            Ok((format!("{}.txt", license.trim_end_matches(".txt")), bytes.into()))
        };
        self.licenses.iter().map(read).collect()
    }
}

/// The prefix of the editor's translation files, which the UI never requests.
const EDITOR_TRANSLATION_PREFIX: &str = "nls.messages.";

/// The folder of both packages in the data folder.
pub const FOLDER: &str = "web-ui";
/// The script that configures the UI for this server.
const SCRIPT: &str = include_str!("web_ui.js");
const INDEX: &str = "index.html";
const LICENSE: &str = "LICENSE";
const ASSETS: &str = "assets/";
/// The script is inserted after this tag, so that it runs before any other script of the page.
const HEAD: &str = "<head>";
/// The time limit of a download, for a registry that does not respond.
const FETCH_TIMEOUT: Duration = Duration::from_secs(300);
const UNPACK_TIMEOUT: Duration = Duration::from_secs(60);
/// The number of lines of npm's error output that an error quotes.
const QUOTED_LINES: usize = 4;

/// Paths of the API that are not below `/api/`.
const API_PATHS: [&str; 5] = ["/alive", "/health", "/openapi.json", "/ready", "/server_info"];
/// The path of Swagger UI.
const DOCS: &str = "/docs";

/// Why the web UI or its editor is not available. Each message is a sentence.
#[derive(Debug, thiserror::Error)]
pub enum WebUiError {
    /// A required program is not installed. `hint` says where to get it.
    #[error("{what} is fetched with {program}, which is not on PATH. {hint}")]
    Missing { what: &'static str, program: &'static str, hint: &'static str },
    /// A program failed. `output` is the beginning of its error output.
    #[error("{what} could not be fetched: {program} reports: {output}")]
    Failed { what: &'static str, program: &'static str, output: String },
    /// A program exceeded its time limit.
    #[error("{what} could not be fetched: {program} did not finish within {} seconds.", limit.as_secs())]
    TooSlow { what: &'static str, program: &'static str, limit: Duration },
    /// The download is not the pinned package.
    #[error("The download is not {package}: its SHA-512 is {found}, not {expected}. It was discarded.")]
    Digest { package: String, expected: &'static str, found: String },
    /// The package is not built as expected.
    #[error("{} {} has no {INDEX} into which a script can be inserted.", UI.name, UI.version)]
    Index,
    /// The package loads another editor, or loads it in another way.
    #[error("{} {} has no script that loads the editor from {}.", UI.name, UI.version, editor_origin())]
    Editor,
    #[error("{path} cannot be used: {source}", path = path.display())]
    File { path: PathBuf, source: io::Error },
}

/// The server that the UI connects to.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The server's address; `None` for the address of the page.
    pub host: Option<String>,
    /// The text with which the page prompts for an API key; `None` if the server needs none.
    pub key_prompt: Option<&'static str>,
    /// Whether the server has a model; otherwise the UI first prompts for one.
    pub has_model: bool,
    /// Other addresses to which the page may connect, as sources of `connect-src`: agent servers have addresses of their own.
    pub connect_src: &'static str,
}

/// Sources for agent servers on this machine.
pub const LOOPBACK: &str = "http://127.0.0.1:* ws://127.0.0.1:* http://localhost:* ws://localhost:*";
/// Sources for agent servers at any address.
pub const ANYWHERE: &str = "http: ws: https: wss:";

/// The files of the UI, by their paths without the leading slash.
#[derive(Clone, Debug)]
pub struct Site(BTreeMap<String, Bytes>);

/// The web UI of a server, which is fetched while the server already runs.
#[derive(Clone, Debug)]
pub struct WebUi(Arc<Mutex<State>>);

#[derive(Clone, Debug)]
enum State {
    Fetching,
    Ready(Arc<Site>),
    Failed(String),
}

impl Default for WebUi {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State::Fetching)))
    }
}

impl WebUi {
    /// Sets the outcome of fetching the UI.
    pub fn set(&self, outcome: Result<Site, WebUiError>) {
        let state = match outcome {
            Ok(site) => State::Ready(Arc::new(site)),
            Err(error) => State::Failed(error.to_string()),
        };
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    /// Serves the UI in addition to these routes: its files, and its first page for every other path that does not belong to the
    /// API, because the UI does its own routing.
    pub fn layer(&self, routes: Router) -> Router {
        routes.layer(middleware::from_fn_with_state(self.clone(), serve))
    }

    fn state(&self) -> State {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

async fn serve(extract::State(ui): extract::State<WebUi>, request: Request, next: Next) -> Response {
    let path = request.uri().path();
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    let is_docs = path.strip_prefix(DOCS).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    if !is_read || path.starts_with("/api/") || is_docs || API_PATHS.contains(&path) {
        return next.run(request).await;
    }
    let name = path.trim_start_matches('/');
    let is_page = is_page(name, request.headers());
    match ui.state() {
        State::Ready(site) => match site.0.get_key_value(name) {
            Some((name, bytes)) if name != INDEX => file(name, bytes),
            Some(_) => site.first_page(),
            None if is_page => site.first_page(),
            None => next.run(request).await,
        },
        State::Fetching if is_page => unavailable(
            "The web UI is being fetched. This happens once. The page reloads every two seconds.",
            "<meta http-equiv=\"refresh\" content=\"2\">",
        ),
        State::Failed(text) if is_page => unavailable(&format!("{text} The API is available."), ""),
        State::Fetching | State::Failed(_) => next.run(request).await,
    }
}

/// Whether the request is for a page, not a file: browsers accept HTML when they navigate.
fn is_page(name: &str, headers: &HeaderMap) -> bool {
    let last = name.rsplit('/').next().unwrap_or_default();
    let accepts_html =
        headers.get(ACCEPT).is_some_and(|value| value.to_str().is_ok_and(|kinds| kinds.contains("text/html")));
    accepts_html && (!last.contains('.') || last.ends_with(".html"))
}

fn file(name: &str, bytes: &Bytes) -> Response {
    // An asset with other contents has another name.
    let caching = if name.starts_with(ASSETS) { "public, max-age=31536000, immutable" } else { "no-cache" };
    ([(CONTENT_TYPE, content_type(name)), (CACHE_CONTROL, caching)], bytes.clone()).into_response()
}

fn unavailable(text: &str, head: &str) -> Response {
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
    /// Reads the files of a built UI, and inserts the server's address and the location of the editor into its first page.
    fn read(folder: &Path, connection: &Connection) -> Result<Self, WebUiError> {
        let mut files = files_below(folder)?;
        let replaced = with_own_editor(&files)?;
        let imports: BTreeMap<String, String> =
            replaced.iter().map(|(name, (own, _))| (format!("/{name}"), format!("/{own}"))).collect();
        files.extend(replaced.into_values());
        let index = files.get(INDEX).and_then(|bytes: &Bytes| std::str::from_utf8(bytes).ok());
        let (before, after) = index.and_then(|text| text.split_once(HEAD)).ok_or(WebUiError::Index)?;
        let index = format!(
            "{before}{HEAD}{}<script type=\"importmap\">{}</script><script>{}</script>{after}",
            content_security_policy(connection),
            in_script(&json!({"imports": imports})),
            script(connection)
        );
        files.insert(INDEX.to_owned(), index.into());
        Ok(Self(files))
    }

    /// Adds the editor. Fetches it first, if necessary.
    ///
    /// # Errors
    /// The editor cannot be fetched, or has an unexpected digest. The site is then unchanged: the UI works, but diffs are blank.
    pub async fn add_editor(&mut self, folder: &Path) -> Result<(), WebUiError> {
        let installed = install(&EDITOR, folder).await?;
        let path = editor_path();
        let mut files = EDITOR.licenses_from(&installed)?;
        for (name, bytes) in files_below(&installed.join(EDITOR.served))? {
            if !name.starts_with(EDITOR_TRANSLATION_PREFIX) {
                files.insert(format!("vs/{name}"), bytes);
            }
        }
        self.0.extend(files.into_iter().map(|(name, bytes)| (format!("{path}/{name}"), bytes)));
        Ok(())
    }

    fn first_page(&self) -> Response {
        let bytes = self.0.get(INDEX).cloned().unwrap_or_default();
        ([(CONTENT_TYPE, content_type(INDEX)), (CACHE_CONTROL, "no-store")], bytes).into_response()
    }

    /// Writes the files to a folder, for hosting them from there.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<(), WebUiError> {
        for (name, bytes) in &self.0 {
            let path = folder.join(name);
            let parent = path.parent().unwrap_or(folder);
            fs::create_dir_all(parent).map_err(file_error(parent))?;
            fs::write(&path, bytes).map_err(file_error(&path))?;
        }
        Ok(())
    }

    #[must_use]
    pub fn file_count(&self) -> usize {
        self.0.len()
    }
}

/// The files below a folder, by their relative paths.
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

/// The URL from which the unchanged UI loads its editor.
fn editor_origin() -> String {
    format!("https://cdn.jsdelivr.net/npm/{}@{}/{}", EDITOR.name, EDITOR.version, EDITOR.served)
}

/// The path at which this server serves the editor.
fn editor_path() -> String {
    format!("{ASSETS}{}-{}", EDITOR.name, EDITOR.version)
}

/// Finds the scripts that load the editor. Returns for each a changed copy, which loads the editor from this server, under a new name.
///
/// Browsers cache assets by name for a year. An import map in the first page, which is not cached, maps the old names to the new ones;
/// with the old names, a browser that has visited the page before would continue to use its cached script and load the editor from
/// the CDN.
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

/// The Content-Security-Policy of the page: it loads nothing from other servers, and connects only to this server and to agent servers,
/// as far as their addresses are known. The unchanged UI would also load fonts and the logos of MCP servers, check for newer versions
/// of itself, and send telemetry to its vendor.
fn content_security_policy(connection: &Connection) -> String {
    let host = connection.host.as_deref().and_then(|host| host.parse::<reqwest::Url>().ok());
    let host = host.map(|host| host.origin().ascii_serialization()).unwrap_or_default();
    let connect_src = connection.connect_src;
    format!(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' blob:; \
         style-src 'self' 'unsafe-inline'; font-src 'self' data:; img-src 'self' data: blob:; \
         worker-src 'self' blob:; \
         connect-src 'self' data: blob: {host} {connect_src}\">"
    )
}

fn script(connection: &Connection) -> String {
    let server = json!({
        "host": connection.host,
        "needs_key": connection.key_prompt.is_some(),
        "key_prompt": connection.key_prompt,
        "has_model": connection.has_model,
    });
    SCRIPT.replace("__SERVER__", &in_script(&server))
}

/// JSON for a script element, which the character `<` could end.
fn in_script(value: &Value) -> String {
    value.to_string().replace('<', "\\u003c")
}

/// Returns the UI in this folder, without its editor. Fetches it first, if necessary.
///
/// # Errors
/// The UI cannot be fetched, or has an unexpected digest. Nothing of it then stays in the folder.
pub async fn ensure(folder: &Path, connection: &Connection) -> Result<Site, WebUiError> {
    let installed = install(&UI, folder).await?;
    let mut site = Site::read(&installed.join(UI.served), connection)?;
    site.0.extend(UI.licenses_from(&installed)?);
    Ok(site)
}

/// Returns the folder of the package. Fetches the package first, if necessary.
async fn install(package: &Package, folder: &Path) -> Result<PathBuf, WebUiError> {
    let installed = folder.join(package.folder_name());
    if !installed.is_dir() {
        tracing::info!("Fetching {} {} for the web UI.", package.name, package.version);
        fs::create_dir_all(folder).map_err(file_error(folder))?;
        // Removed when dropped, on success and on failure.
        let draft = tempfile::Builder::new().prefix("fetching-").tempdir_in(folder).map_err(file_error(folder))?;
        fetch(package, draft.path()).await?;
        let unpacked = draft.path().join("package");
        // The rename fails if another run was faster, because it does not replace a folder that is not empty.
        if let Err(source) = fs::rename(&unpacked, &installed)
            && !installed.is_dir()
        {
            return Err(WebUiError::File { path: installed, source });
        }
    }
    Ok(installed)
}

/// Downloads the package, and unpacks its served files and licenses into `package/` in this folder.
async fn fetch(package: &Package, folder: &Path) -> Result<(), WebUiError> {
    let what = package.title;
    let mut npm = Command::new("npm");
    npm.arg("pack").arg(format!("{}@{}", package.name, package.version)).arg("--pack-destination").arg(folder);
    // The package's scripts are not needed, so they are not executed.
    npm.args(["--ignore-scripts", "--loglevel=error", "--no-update-notifier", "--no-fund"]).current_dir(folder);
    let hint = "It is part of Node.js. Without --ui it is not needed.";
    run(what, "npm", hint, npm, FETCH_TIMEOUT).await?;
    let packed = fs::read_dir(folder)
        .map_err(file_error(folder))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "tgz"))
        .ok_or_else(|| WebUiError::Failed {
            what,
            program: "npm",
            output: "no package was written.".to_owned(),
        })?;
    check_digest(package, &fs::read(&packed).map_err(file_error(&packed))?)?;
    let mut tar = Command::new("tar");
    tar.arg("-xzf").arg(&packed).arg("-C").arg(folder);
    tar.args(package.licenses.iter().chain([&package.served]).map(|member| format!("package/{member}")));
    run(what, "tar", "Every Linux distribution has a package for it.", tar, UNPACK_TIMEOUT).await
}

/// Compares the digest of a download with the pinned one.
fn check_digest(package: &Package, packed: &[u8]) -> Result<(), WebUiError> {
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
        Err(error) => return Err(WebUiError::Failed { what, program, output: format!("{error}.") }),
    };
    if output.status.success() {
        Ok(())
    } else {
        Err(WebUiError::Failed { what, program, output: beginning_of(&output) })
    }
}

/// The beginning of a program's error output, in one line: npm first prints the error, and then general advice.
fn beginning_of(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let lines = text.lines().map(|line| line.trim().trim_start_matches("npm error").trim());
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

    const HERE: Connection = Connection { host: None, key_prompt: None, has_model: true, connect_src: LOOPBACK };

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

    async fn request(ui: &WebUi, method: Method, path: &str, accept: &str) -> Answer {
        let api = get(async || "the API").post(async || "the API");
        let routes = Router::new().route("/api/v1/settings", api.clone()).route("/alive", api.clone()).route("/", api);
        let sent = Request::builder().method(method).uri(path).header(ACCEPT, accept).body(Body::empty()).unwrap();
        let answer = ui.layer(routes).oneshot(sent).await.unwrap();
        let header = |name| answer.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
        let (status, kind, caching) = (answer.status().as_u16(), header(CONTENT_TYPE), header(CACHE_CONTROL));
        let body = to_bytes(answer.into_body(), usize::MAX).await.unwrap();
        Answer { status, kind, caching, body: String::from_utf8(body.to_vec()).unwrap() }
    }

    const HTML: &str = "text/html,application/xhtml+xml,*/*;q=0.8";

    #[tokio::test]
    async fn files_pages_and_the_api_are_distinguished() {
        let ui = WebUi::default();
        ui.set(Site::read(built().path(), &HERE));
        for path in ["/", "/index.html", "/conversations/1", "/settings/llm?from=here"] {
            let page = request(&ui, Method::GET, path, HTML).await;
            assert_eq!((page.status, page.kind.as_str()), (200, "text/html; charset=utf-8"), "{path}");
            assert_eq!(page.caching, "no-store", "{path}: the next run may serve another");
            assert!(page.body.contains("<title>UI</title>"), "{path}: {}", page.body);
        }
        let script = request(&ui, Method::GET, "/assets/app-1.js", "*/*").await;
        assert_eq!((script.kind.as_str(), script.body.as_str()), ("text/javascript; charset=utf-8", "app()"));
        assert!(script.caching.contains("immutable"));
        let icon = request(&ui, Method::GET, "/favicon.svg", "image/*").await;
        assert_eq!((icon.kind.as_str(), icon.caching.as_str()), ("image/svg+xml", "no-cache"));
        for (method, path) in [(Method::GET, "/api/v1/settings"), (Method::GET, "/alive"), (Method::POST, "/")] {
            assert_eq!(request(&ui, method, path, HTML).await.body, "the API", "{path}");
        }
        for path in ["/api/v1/none", "/assets/app-2.js", "/assets/../Cargo.toml", "/%2e%2e/etc/passwd.txt"] {
            assert_eq!(request(&ui, Method::GET, path, HTML).await.status, 404, "{path}");
        }
        assert_eq!(request(&ui, Method::GET, "/none", "application/json").await.status, 404, "the request accepts no HTML");
    }

    #[test]
    fn the_page_gets_its_server_before_other_scripts_run() {
        let index = |connection: &Connection| {
            let site = Site::read(built().path(), connection).unwrap();
            String::from_utf8(site.0[INDEX].to_vec()).unwrap()
        };
        let page = index(&HERE);
        assert!(page.starts_with("<!DOCTYPE html><html><head><meta http-equiv=\"Content-Security-Policy\""), "{page}");
        assert!(page.contains(r#""host":null,"needs_key":false"#) && page.contains(LOOPBACK), "{page}");
        let host = Some("https://api.example.org/v1</script>".to_owned());
        let page = index(&Connection { host, key_prompt: Some("Key?"), has_model: false, connect_src: ANYWHERE });
        assert!(page.contains(r#""host":"https://api.example.org/v1\u003c/script>","needs_key":true"#), "{page}");
        assert!(page.contains("blob: https://api.example.org http: ws:"), "{page}");
        assert!(page.contains("img-src 'self' data: blob:;"), "{page}");
        assert_eq!(page.matches("</script>").count(), 2, "{page}");
    }

    fn text(site: &Site, name: &str) -> String {
        let bytes = site.0.get(name).unwrap_or_else(|| panic!("no {name} in {:?}", site.0.keys()));
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[test]
    fn the_page_loads_its_editor_from_this_server() {
        let site = Site::read(built().path(), &HERE).unwrap();
        let page = text(&site, INDEX);
        let map = page.split_once("<script type=\"importmap\">").unwrap().1.split_once("</script>").unwrap().0;
        let map: Value = serde_json::from_str(map).unwrap();
        assert_eq!(map, json!({"imports": {"/assets/tab-1.js": "/assets/tab-1.monaco-editor-0.55.1.js"}}));
        assert_eq!(text(&site, "assets/tab-1.monaco-editor-0.55.1.js"), "a={vs:`/assets/monaco-editor-0.55.1/vs`}");
        assert_eq!(text(&site, "assets/tab-1.js"), LOADER, "an asset that browsers may have cached is not changed");
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

    /// Writes the files of a package as an install does.
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
    async fn the_editor_is_served_with_the_ui() {
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
        let without = site.file_count();

        // An incomplete editor does not change the UI.
        fs::rename(editor.join("min"), editor.join("hidden")).unwrap();
        assert!(matches!(site.add_editor(folder.path()).await, Err(WebUiError::File { .. })));
        fs::rename(editor.join("hidden"), editor.join("min")).unwrap();
        fs::rename(editor.join(LICENSE), editor.join("hidden")).unwrap();
        assert!(matches!(site.add_editor(folder.path()).await, Err(WebUiError::File { .. })));
        fs::rename(editor.join("hidden"), editor.join(LICENSE)).unwrap();
        assert_eq!(site.file_count(), without);

        site.add_editor(folder.path()).await.unwrap();
        assert_eq!(site.file_count(), without + files.len() - 1, "all but the translation: {:?}", site.0.keys());
        assert_eq!(text(&site, "LICENSE.txt"), "of the UI");
        assert_eq!(text(&site, "assets/monaco-editor-0.55.1/LICENSE.txt"), "of the editor");
        assert_eq!(text(&site, "assets/monaco-editor-0.55.1/ThirdPartyNotices.txt"), "of others");
        let ui = WebUi::default();
        ui.set(Ok(site));
        let script = request(&ui, Method::GET, "/assets/monaco-editor-0.55.1/vs/loader.js", "*/*").await;
        assert_eq!((script.kind.as_str(), script.body.as_str()), ("text/javascript; charset=utf-8", "load()"));
        let style = request(&ui, Method::GET, "/assets/monaco-editor-0.55.1/vs/editor/editor.main.css", "*/*").await;
        assert_eq!(style.kind, "text/css; charset=utf-8");
    }

    #[test]
    fn a_page_without_a_head_is_not_served() {
        let folder = built();
        fs::write(folder.path().join(INDEX), "<html></html>").unwrap();
        assert!(matches!(Site::read(folder.path(), &HERE), Err(WebUiError::Index)));
    }

    #[tokio::test]
    async fn until_the_ui_is_ready_its_page_says_why_not() {
        let ui = WebUi::default();
        let page = request(&ui, Method::GET, "/", HTML).await;
        assert!(page.status == 503 && page.body.contains("http-equiv=\"refresh\""), "{}", page.body);
        let failed = WebUiError::Failed { what: UI.title, program: "npm", output: "<b> & more".to_owned() };
        ui.set(Err(failed));
        let page = request(&ui, Method::GET, "/", HTML).await;
        assert!(page.status == 503 && page.body.contains("npm reports: &lt;b> &amp; more"), "{}", page.body);
        assert!(!page.body.contains("refresh"), "{}", page.body);
        for (path, accept) in [("/api/v1/settings", HTML), ("/alive", HTML), ("/", "*/*")] {
            assert_eq!(request(&ui, Method::GET, path, accept).await.body, "the API", "{path}");
        }
    }

    #[tokio::test]
    async fn only_the_pinned_package_is_used() {
        for package in [&UI, &EDITOR] {
            let error = check_digest(package, b"something else").unwrap_err().to_string();
            let names = error.contains(package.name) && error.contains(package.integrity);
            assert!(names && error.contains("It was discarded"), "{error}");
        }
        let limit = Duration::from_secs(5);
        let missing = run(UI.title, "npm", "Get it.", Command::new("no-such-program-here"), limit).await;
        let missing = missing.unwrap_err().to_string();
        assert_eq!(missing, "The web UI is fetched with npm, which is not on PATH. Get it.");
        let mut fails = Command::new("sh");
        fails.args(["-c", "echo npm error first >&2; echo second >&2; exit 1"]);
        let failed = run(EDITOR.title, "npm", "", fails, limit).await.unwrap_err().to_string();
        assert_eq!(failed, "The editor of the web UI could not be fetched: npm reports: first second.");
        let mut hangs = Command::new("sleep");
        hangs.arg("60");
        let slow = run(UI.title, "npm", "", hangs, Duration::from_millis(10)).await.unwrap_err();
        assert!(matches!(slow, WebUiError::TooSlow { .. }), "{slow}");
    }

    #[test]
    fn the_ui_can_be_written_to_a_folder() {
        let folder = TempDir::new().unwrap();
        let site = Site::read(built().path(), &HERE).unwrap();
        site.write(folder.path()).unwrap();
        assert_eq!(site.file_count(), 5);
        assert_eq!(fs::read_to_string(folder.path().join("assets/app-1.js")).unwrap(), "app()");
        assert!(fs::read_to_string(folder.path().join(INDEX)).unwrap().contains("openhands-backends"));
    }
}
