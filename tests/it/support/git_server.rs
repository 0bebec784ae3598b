//! A stub git host: repositories over smart HTTP, and the few routes of GitHub's API that look up a repository.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard};

use axum::body::{Body, Bytes};
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::{Method, StatusCode};
use serde_json::json;
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

use super::server::{self, Cut, Request, Server};

/// The branch every repository has.
pub const DEFAULT_BRANCH: &str = "main";

#[derive(Clone, Debug)]
struct Credentials {
    user: String,
    token: String,
}

#[derive(Debug)]
struct State {
    root: PathBuf,
    exec_path: PathBuf,
    credentials: Option<Credentials>,
    requests: Vec<Request>,
}

/// The server. Dropping it removes its repositories.
#[derive(Debug)]
pub struct GitServer {
    server: Server,
    state: Arc<Mutex<State>>,
    folder: TempDir,
}

impl GitServer {
    /// Starts without repositories and without authentication.
    pub async fn start() -> Self {
        let folder = TempDir::new().expect("a folder for the repositories");
        let exec_path = run(git(folder.path()).arg("--exec-path")).await;
        let state = Arc::new(Mutex::new(State {
            root: folder.path().join("served"),
            exec_path: PathBuf::from(exec_path.trim()),
            credentials: None,
            requests: Vec::new(),
        }));
        let shared = Arc::clone(&state);
        let server = Server::start(move |request| handle(request, Arc::clone(&shared))).await;
        Self { server, state, folder }
    }

    /// `http://127.0.0.1:PORT`; repositories are at `/owner/name.git` (or without `.git`), the
    /// API at `/api/v3`.
    pub fn url(&self) -> String {
        self.server.url()
    }

    /// `127.0.0.1:PORT`, for URLs that hold credentials.
    pub fn host(&self) -> String {
        self.url().trim_start_matches("http://").to_owned()
    }

    /// Creates `owner/name` with one commit of these files (path, content, executable) on [`DEFAULT_BRANCH`], and
    /// further branches, each with one more commit that adds `branch.txt` with the branch's name.
    pub async fn create_repository(&self, full_name: &str, files: &[(&str, &str, bool)], branches: &[&str]) {
        let work = tempfile::tempdir_in(self.folder.path()).expect("a folder to commit in");
        let work = work.path();
        run(git(work).args(["init", "--quiet", "--initial-branch", DEFAULT_BRANCH])).await;
        for (path, content, executable) in files {
            let file = work.join(path);
            std::fs::create_dir_all(file.parent().expect("a file has a folder")).expect("the file's folder");
            std::fs::write(&file, content).expect("the file");
            run(git(work).args(["add", path])).await;
            if *executable {
                run(git(work).args(["update-index", "--chmod=+x", path])).await;
            }
        }
        run(git(work).args(["commit", "--quiet", "--allow-empty", "--message", "First"])).await;
        for branch in branches {
            run(git(work).args(["checkout", "--quiet", "-b", branch, DEFAULT_BRANCH])).await;
            std::fs::write(work.join("branch.txt"), branch).expect("the branch's file");
            run(git(work).args(["add", "branch.txt"])).await;
            run(git(work).args(["commit", "--quiet", "--message", branch])).await;
        }
        // A clone checks out the current branch of the repository, so that has to be the default branch.
        run(git(work).args(["checkout", "--quiet", "--force", DEFAULT_BRANCH])).await;
        let bare = self.state().repository(full_name);
        run(git(work).args(["clone", "--quiet", "--bare", "."]).arg(&bare)).await;
        run(git(&bare).args(["config", "http.receivepack", "true"])).await;
    }

    /// Creates `owner/name` without a commit.
    pub async fn create_empty_repository(&self, full_name: &str) {
        let bare = self.state().repository(full_name);
        run(git(self.folder.path()).args(["init", "--quiet", "--bare", "--initial-branch", DEFAULT_BRANCH]).arg(&bare))
            .await;
        run(git(&bare).args(["config", "http.receivepack", "true"])).await;
    }

    /// Runs git in the bare repository on this host; returns its output.
    pub async fn git(&self, full_name: &str, arguments: &[&str]) -> String {
        let bare = self.state().repository(full_name);
        run(git(&bare).args(arguments)).await
    }

    /// Requires credentials from now on: for git `user` and `token` by basic authentication (the token is also accepted
    /// with the user names `oauth2`, `x-access-token` or `x-token-auth`, or as the user name), for the API the token as
    /// `Bearer` or `token`.
    pub fn require(&self, user: &str, token: &str) {
        self.state().credentials = Some(Credentials { user: user.to_owned(), token: token.to_owned() });
    }

    /// All requests so far, refused ones included.
    pub fn requests(&self) -> Vec<Request> {
        self.state().requests.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("the git server's state")
    }
}

impl State {
    fn repository(&self, full_name: &str) -> PathBuf {
        self.root.join(format!("{}.git", full_name.trim_end_matches(".git")))
    }
}

impl Credentials {
    fn admit_git(&self, authorization: &str) -> bool {
        let Some(encoded) = authorization.strip_prefix("Basic ") else {
            return false;
        };
        let Ok(Ok(pair)) = BASE64.decode(encoded).map(String::from_utf8) else {
            return false;
        };
        let Some((user, password)) = pair.split_once(':') else {
            return false;
        };
        let known = [self.user.as_str(), "oauth2", "x-access-token", "x-token-auth"];
        user == self.token || (password == self.token && known.contains(&user))
    }

    fn admit_api(&self, authorization: &str) -> bool {
        authorization.split_once(' ').is_some_and(|(scheme, token)| {
            (scheme.eq_ignore_ascii_case("bearer") || scheme.eq_ignore_ascii_case("token")) && token == self.token
        })
    }
}

/// A git command in `folder` that ignores the git configuration of the user who runs the tests.
fn git(folder: &Path) -> Command {
    let mut git = Command::new("git");
    git.current_dir(folder)
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_TERMINAL_PROMPT", "0");
    for role in ["AUTHOR", "COMMITTER"] {
        git.env(format!("GIT_{role}_NAME"), "Tests").env(format!("GIT_{role}_EMAIL"), "tests@example.com");
    }
    git
}

async fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().await.expect("git runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?} failed: {stderr}");
    String::from_utf8(output.stdout).expect("git's output is text")
}

async fn handle(request: Request, state: Arc<Mutex<State>>) -> Result<Response, Cut> {
    let (root, exec_path, credentials) = {
        let mut state = state.lock().expect("the git server's state");
        state.requests.push(request.clone());
        (state.root.clone(), state.exec_path.clone(), state.credentials.clone())
    };
    let authorization = request.header("authorization");
    if let ["api", "v3", "repos", owner, name] = request.segments()[..] {
        let refused = credentials.map(|credentials| authorization.map(|sent| credentials.admit_api(sent)));
        return Ok(find_repository(&request, &root, refused, owner, name));
    }
    if let Some(credentials) = credentials
        && !authorization.is_some_and(|sent| credentials.admit_git(sent))
    {
        let mut refusal = server::raw(StatusCode::UNAUTHORIZED, "text/plain", "Authentication required");
        refusal.headers_mut().insert("www-authenticate", "Basic realm=\"git\"".parse().expect("a header"));
        return Ok(refusal);
    }
    Ok(http_backend(&request, &root, &exec_path).await)
}

/// `admitted` is `None` on a server without authentication; otherwise it says whether a token was sent, and whether it
/// is right.
fn find_repository(
    request: &Request,
    root: &Path,
    admitted: Option<Option<bool>>,
    owner: &str,
    name: &str,
) -> Response {
    let message = |status, text: &str| server::json(status, &json!({"message": text, "status": status.as_str()}));
    match admitted {
        Some(Some(false)) => return message(StatusCode::UNAUTHORIZED, "Bad credentials"),
        // To a caller without access a private repository does not exist.
        Some(None) => return message(StatusCode::NOT_FOUND, "Not Found"),
        Some(Some(true)) | None => {}
    }
    let full_name = format!("{owner}/{name}");
    if request.method != Method::GET || !root.join(format!("{full_name}.git")).is_dir() {
        return message(StatusCode::NOT_FOUND, "Not Found");
    }
    let host = request.header("host").unwrap_or_default();
    let body = json!({
        "id": 1,
        "name": name,
        "full_name": full_name,
        "private": admitted.is_some(),
        "owner": {"login": owner, "type": "Organization"},
        "default_branch": DEFAULT_BRANCH,
        "clone_url": format!("http://{host}/{full_name}.git"),
    });
    server::json(StatusCode::OK, &body)
}

/// Runs git's own CGI program, `git http-backend`.
async fn http_backend(request: &Request, root: &Path, exec_path: &Path) -> Response {
    let mut path = request.path.clone();
    // Git requests paths below the URL that it was given, with or without `.git`.
    if let [owner, name, ..] = request.segments()[..]
        && !name.ends_with(".git")
    {
        path = path.replacen(&format!("/{owner}/{name}"), &format!("/{owner}/{name}.git"), 1);
    }
    let mut backend = Command::new(exec_path.join("git-http-backend"));
    backend
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("REQUEST_METHOD", request.method.as_str())
        .env("PATH_INFO", path)
        .env("QUERY_STRING", &request.query)
        .env("CONTENT_LENGTH", request.body.len().to_string())
        .env("REMOTE_ADDR", "127.0.0.1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true);
    for (header, variable) in [
        ("content-type", "CONTENT_TYPE"),
        ("content-encoding", "HTTP_CONTENT_ENCODING"),
        ("git-protocol", "GIT_PROTOCOL"),
    ] {
        if let Some(value) = request.header(header) {
            backend.env(variable, value);
        }
    }
    let mut child = backend.spawn().expect("git http-backend runs");
    let mut stdin = child.stdin.take().expect("a pipe to the backend");
    let body = request.body.clone();
    // It may respond without reading the body, so a failed write is no error.
    let feed = async move { drop(stdin.write_all(&body).await) };
    let (output, ()) = tokio::join!(child.wait_with_output(), feed);
    cgi_answer(output.expect("the backend's answer").stdout.into())
}

/// Converts a CGI program's output to a response: headers, an empty line, the body.
fn cgi_answer(output: Bytes) -> Response {
    let ends = [&b"\r\n\r\n"[..], b"\n\n"];
    let end = ends.iter().find_map(|end| {
        let at = output.windows(end.len()).position(|window| window == *end)?;
        Some((at, at + end.len()))
    });
    let Some((head, body)) = end else {
        return server::raw(StatusCode::BAD_GATEWAY, "text/plain", "git http-backend gave no answer");
    };
    let mut response = Response::builder();
    for line in String::from_utf8_lossy(&output[..head]).lines() {
        let Some((name, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim();
        response = match name.eq_ignore_ascii_case("status") {
            true => response.status(value.get(..3).unwrap_or("500")),
            false => response.header(name, value),
        };
    }
    response.body(Body::from(output.slice(body..))).expect("the backend's headers are headers")
}
