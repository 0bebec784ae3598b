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

mod package;
mod site;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{self, Request};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse as _, Response};
use http::header::{ACCEPT, CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderMap, Method, StatusCode};

use self::package::UI;
use self::site::editor_origin;
pub use self::site::{ANYWHERE, Connection, LOOPBACK, Site, ensure};

/// The folder of both packages in the data folder.
pub const FOLDER: &str = "web-ui";
const INDEX: &str = "index.html";
const ASSETS: &str = "assets/";
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

fn file_error(path: &Path) -> impl FnOnce(io::Error) -> WebUiError {
    move |source| WebUiError::File { path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use axum::body::{Body, to_bytes};
    use axum::routing::get;
    use serde_json::{Value, json};
    use tempfile::TempDir;
    use tower::ServiceExt as _;

    use super::package::{EDITOR, LICENSE, Package};
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
        assert_eq!(
            request(&ui, Method::GET, "/none", "application/json").await.status,
            404,
            "the request accepts no HTML"
        );
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
