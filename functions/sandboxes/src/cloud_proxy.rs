//! The cloud proxy, `POST /api/cloud-proxy`: forwards a request of a web front end to the agent server of one of the caller's sandboxes.
//! Pages use it where they cannot call agent servers directly.

use std::borrow::Cow;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::Method;
use http::header::CONTENT_TYPE;
use serde_json::Value;
use shared::agent_server::SESSION_API_KEY;
use shared::agent_server::{AgentServerError, Failure};
use shared::conversation::git::WorkspaceGit;
use shared::conversation::workspace::path_in_workspace;
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::extract::JsonBody;
use shared::http::pydantic::body::FromJson;
use shared::http::pydantic::validation::{Checker, Fields, dictionary, float, string};
use shared::http::truncated::changes_response;
use shared::http_client;
use shared::sandbox::{Sandbox, SandboxStatus};

use crate::Context;

/// The prefix of the paths that the proxy forwards. Health checks and documentation of the agent server are outside it.
const PATH_PREFIX: &str = "/api/";
const METHODS: [Method; 5] = [Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
/// The largest response, in bytes. Lambda returns 6 MB at most, and Base64 makes a binary body a third larger.
const RESPONSE_LIMIT: usize = 4 * 1024 * 1024;
const TIMED_OUT: &str = "The agent server did not respond in time";

/// `{host, method, path, headers: {X-Session-API-Key}, body, timeout_seconds}`
pub(crate) struct CloudProxyIn {
    host: String,
    method: Method,
    path: String,
    key: Option<String>,
    body: Option<Value>,
    timeout: Option<Duration>,
}

impl FromJson for CloudProxyIn {
    fn from_json(check: &mut Checker, value: &Value) -> Option<Self> {
        let fields = Fields::of(check, value)?;
        let host = fields.required(check, "host", string);
        let method = fields.required(check, "method", |check, value| {
            let name = string(check, value)?.to_uppercase();
            let method = METHODS.into_iter().find(|method| method.as_str() == name);
            if method.is_none() {
                check.report_value_error("the method must be GET, POST, PUT, PATCH or DELETE", value.clone());
            }
            method
        });
        let path = fields.required(check, "path", |check, value| {
            let path = string(check, value)?;
            if !path.starts_with(PATH_PREFIX) {
                check.report_value_error(format!("the path must start with {PATH_PREFIX}"), value.clone());
                return None;
            }
            // A path that another parser normalises differently could lead out of the prefix.
            if !http_client::is_plain(&path) {
                let fault = "the path must not contain `.` or `..` segments, empty segments, backslashes, fragments, control \
                             characters, or any of these encoded";
                check.report_value_error(fault, value.clone());
                return None;
            }
            Some(path)
        });
        let headers = fields.nullable(check, "headers", dictionary);
        let timeout = fields.nullable(check, "timeout_seconds", float);
        let body = fields.nullable(check, "body", |_, value| Some(value.clone()));
        let key = headers?.and_then(|headers| {
            let key = headers.into_iter().find(|(name, _)| name.eq_ignore_ascii_case(SESSION_API_KEY))?.1;
            key.as_str().map(ToOwned::to_owned)
        });
        let timeout = timeout?.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        Some(Self { host: host?, method: method?, path: path?, key, body: body?, timeout })
    }
}

/// Forwards the request to the sandbox whose session key it contains, if the sandbox is the caller's. The proxy reaches no other host.
pub(crate) async fn proxy(
    State(context): State<Context>,
    Caller(user): Caller,
    JsonBody(request): JsonBody<CloudProxyIn>,
) -> Result<Response> {
    let record = match &request.key {
        Some(key) => context.records.find_by_session_key(key).await?.filter(|record| record.user == user),
        None => None,
    };
    // The same error for an unknown key and for another user's.
    let forbidden =
        || Error::Forbidden("`headers` must contain the X-Session-API-Key of one of your sandboxes".to_owned());
    let record = record.ok_or_else(forbidden)?;
    let sandbox = context.sandboxes.get(&user, &record.id).await?;
    let sandbox = sandbox.ok_or_else(|| Error::NotFound(format!("Sandbox {} not found", record.id)))?;
    let url = sandbox.agent_server_url().ok_or_else(|| not_running(&sandbox))?;
    if !is_same_host(&request.host, url) {
        return Err(Error::Forbidden(format!("Host {} does not match sandbox {}", request.host, record.id)));
    }
    let agent_server = sandbox.agent_server(&context.messages.http).ok_or_else(|| not_running(&sandbox))?;
    let timeout = request.timeout.unwrap_or(context.sandbox_request_budget).min(context.sandbox_request_budget);
    if request.method == Method::GET
        && let Some(query) = GitQuery::read(&request.path, &sandbox.working_dir)
    {
        let git = WorkspaceGit { agent_server: &agent_server, root: &sandbox.working_dir };
        return match tokio::time::timeout(timeout, query.run(git)).await {
            Ok(result) => result.map_err(|error| upstream(&error))?,
            Err(_) => Err(Error::Upstream { message: TIMED_OUT.to_owned(), context: format!("after {timeout:?}") }),
        };
    }
    let path = with_sandbox_path(&request.path, &sandbox.working_dir);
    let response = agent_server.proxy(request.method, &path, request.body.as_ref(), RESPONSE_LIMIT, timeout).await;
    match response.map_err(|error| upstream(&error))? {
        Some((status, kind, body)) => Ok((status, kind.map(|kind| [(CONTENT_TYPE, kind)]), body).into_response()),
        None => {
            let message = "The agent server's response is larger than the proxy can return; request less at once";
            Err(Error::TooLarge(message.to_owned()))
        }
    }
}

fn not_running(sandbox: &Sandbox) -> Error {
    let id = &sandbox.id;
    Error::Conflict(match sandbox.status {
        SandboxStatus::Paused => format!("Sandbox {id} is paused; POST /api/v1/sandboxes/{id}/resume resumes it"),
        SandboxStatus::Starting => format!("Sandbox {id} is starting; try again in a few seconds"),
        SandboxStatus::Running | SandboxStatus::Missing | SandboxStatus::Error => {
            format!("Sandbox {id} is not running")
        }
    })
}

fn upstream(error: &AgentServerError) -> Error {
    let message = match &error.failure {
        Failure::TimedOut => TIMED_OUT,
        _ => "The agent server did not respond",
    };
    Error::Upstream { message: message.to_owned(), context: error.to_string() }
}

/// `GET /api/git/changes` or `GET /api/git/diff` of a workspace. The proxy does not forward these but runs git as the conversation's own
/// routes do, because agent servers fail on many file names, each version in its own way. Requests for the changes of one commit, or for
/// paths outside the workspace, are forwarded.
#[derive(Debug, PartialEq, Eq)]
struct GitQuery {
    is_diff: bool,
    path: String,
    reference: Option<String>,
}

impl GitQuery {
    fn read(path: &str, working_dir: &str) -> Option<Self> {
        let (route, query) = path.split_once('?')?;
        let is_diff = match route {
            "/api/git/changes" => false,
            "/api/git/diff" => true,
            _ => return None,
        };
        let mut git_query = Self { is_diff, path: String::new(), reference: None };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            match name.as_ref() {
                "path" => git_query.path = value.into_owned(),
                "ref" => git_query.reference = Some(value.into_owned()).filter(|reference| !reference.is_empty()),
                "commit" => return None,
                _ => {}
            }
        }
        path_in_workspace(working_dir, &git_query.path).map(|_| git_query)
    }

    async fn run(&self, git: WorkspaceGit<'_>) -> Result<Result<Response>, AgentServerError> {
        let reference = self.reference.as_deref();
        Ok(if self.is_diff {
            git.diff(&self.path, reference).await?.map(|diff| Json(diff).into_response())
        } else {
            let changes = git.changes(&self.path, reference).await?;
            changes.map(|changes| changes_response(&changes.list, changes.is_truncated))
        })
    }
}

/// Replaces the parameter `path` of the query by the path inside the sandbox: pages know the workspace as `/workspace/project`, and a
/// sandbox on this machine has it in another folder. Everything else stays unchanged.
fn with_sandbox_path<'a>(path: &'a str, working_dir: &str) -> Cow<'a, str> {
    let Some((route, query)) = path.split_once('?') else { return path.into() };
    let mut is_moved = false;
    let pairs: Vec<(Cow<'_, str>, Cow<'_, str>)> = form_urlencoded::parse(query.as_bytes())
        .map(|(name, value)| {
            let moved = path_in_workspace(working_dir, &value).filter(|moved| name == "path" && *moved != value);
            is_moved |= moved.is_some();
            (name, moved.map_or(value, Cow::Owned))
        })
        .collect();
    if !is_moved {
        return path.into();
    }
    let query = form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
    format!("{route}?{query}").into()
}

/// Whether both have the same host, port and path. The scheme is ignored, because a page that was loaded over https uses https for all
/// hosts.
fn is_same_host(host: &str, url: &str) -> bool {
    let without_scheme = |url: &str| {
        let rest = url.split_once("://").map_or(url, |(_, rest)| rest);
        rest.trim_end_matches('/').to_lowercase()
    };
    without_scheme(host) == without_scheme(url)
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use shared::http::pydantic::body;
    use shared::http::pydantic::validation::Checked;

    use super::*;

    #[test]
    fn a_path_stays_below_the_api() {
        let read = |path: &str| {
            let body = json!({"host": "http://host", "method": "GET", "path": path, "headers": {}});
            let read: Checked<CloudProxyIn> = body::read(Some("application/json"), body.to_string().as_bytes());
            read.map(|request| request.path)
        };
        for path in ["/api/", "/api/git/changes?path=/workspace/../x", "/api/x/..y", "/api/a%20b"] {
            assert_eq!(read(path).as_deref().ok(), Some(path));
        }
        for path in [
            "/alive",
            "api/x",
            "/api",
            "/api/../alive",
            "/api/x/../../alive",
            "/api/..",
            "/api/./x",
            "/api/%2e%2e/docs",
            "/api/%2E./docs",
            "/api/%252e%252e/docs",
            "/api/..%2fdocs",
            "/api/%2Fdocs",
            "/api/..%5cdocs",
            "/api/\\..\\docs",
            "/api//docs",
            "/api/\t/../docs",
            "/api/.\n./docs",
            "/api/x#y",
        ] {
            assert!(read(path).is_err(), "{path}");
        }
    }

    #[test]
    fn pages_find_the_workspace_wherever_the_sandbox_has_it() {
        let moved = |path: &str| with_sandbox_path(path, "/home/a user/workspace/project").into_owned();
        for (given, expected) in [
            (
                "/api/git/commits?path=%2Fworkspace%2Fproject&limit=50",
                "/api/git/commits?path=%2Fhome%2Fa+user%2Fworkspace%2Fproject&limit=50",
            ),
            (
                "/api/git/diff?commit=abc&path=/workspace/project/a%26b/c.txt",
                "/api/git/diff?commit=abc&path=%2Fhome%2Fa+user%2Fworkspace%2Fproject%2Fa%26b%2Fc.txt",
            ),
        ] {
            assert_eq!(moved(given), expected);
            assert!(http_client::is_plain(expected), "{expected}");
        }
        for same in [
            "/api/git/commits",
            "/api/git/commits?limit=50",
            "/api/git/commits?path=/workspace/projects&x=%zz",
            "/api/git/commits?path=/home/a%20user/workspace/project/x",
            "/api/git/commits?path=/workspace/project/../../etc",
            "/api/git/commits?path=/etc",
            "/api/git/commits?other=/workspace/project",
            "/api/files/workspace/project",
        ] {
            assert_eq!(moved(same), same);
        }
        let in_container = "/api/git/commits?path=/workspace/project/a%20b&x=%zz";
        assert_eq!(with_sandbox_path(in_container, "/workspace/project"), in_container);
    }

    #[test]
    fn git_queries_of_a_workspace_are_recognised() {
        let read = |path: &str| GitQuery::read(path, "/home/a user/workspace/project/");
        let query = |is_diff, path: &str, reference: Option<&str>| {
            Some(GitQuery { is_diff, path: path.to_owned(), reference: reference.map(str::to_owned) })
        };
        for (path, expected) in [
            ("/api/git/changes?path=%2Fworkspace%2Fproject", query(false, "/workspace/project", None)),
            (
                "/api/git/diff?ref=HEAD&path=/workspace/project/a%26b+c&x=y",
                query(true, "/workspace/project/a&b c", Some("HEAD")),
            ),
            (
                "/api/git/changes?ref=&path=/home/a%20user/workspace/project/r",
                query(false, "/home/a user/workspace/project/r", None),
            ),
            ("/api/git/diff?path=/workspace/project/a&commit=abcd", None),
            ("/api/git/diff?path=/workspace/projects/a", None),
            ("/api/git/diff?path=/workspace/project/../a", None),
            ("/api/git/changes?path=relative", None),
            ("/api/git/changes?ref=HEAD", None),
            ("/api/git/changes", None),
            ("/api/git/changes/?path=/workspace/project", None),
            ("/api/git/commits?path=/workspace/project", None),
        ] {
            assert_eq!(read(path), expected, "{path}");
        }
    }

    #[test]
    fn hosts_are_compared_without_scheme() {
        assert!(is_same_host("https://Host:1/", "http://host:1"));
        assert!(is_same_host("http://host/runtime/1", "http://host/runtime/1/"));
        for other in ["http://host:2", "http://host", "http://host:1.evil", "http://host:1/api", ""] {
            assert!(!is_same_host(other, "http://host:1"), "{other}");
        }
    }
}
