//! `POST /api/cloud-proxy`: a request of a web front end, passed on to the agent server of one of the caller's sandboxes. Pages send
//! it where they do not call agent servers themselves.

use std::borrow::Cow;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, Method};
use serde_json::Value;
use shared::agent_server::{AgentServerError, Failure};
use shared::conversation::git::WorkspaceGit;
use shared::conversation::workspace::path_in_workspace;
use shared::error::{Error, Result};
use shared::http::caller::Caller;
use shared::http::pydantic::body;
use shared::http::pydantic::validation::{Checked, Checker, Fields, dictionary, float, string};
use shared::http::truncated::changes_response;
use shared::http_client;

use crate::Context;

/// What of an agent server may be reached this way: not its health, nor its documentation.
const REACHABLE: &str = "/api/";
const SESSION_API_KEY: &str = "x-session-api-key";
const METHODS: [Method; 5] = [Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE];
/// Lambda answers with 6 MB at most, and what is no text becomes a third larger.
const ANSWER_LIMIT: usize = 4 * 1024 * 1024;
const TOO_LATE: &str = "The agent server did not answer in time";

/// `{host, method, path, headers: {X-Session-API-Key}, body, timeout_seconds}`
struct ProxyRequest {
    host: String,
    method: Method,
    path: String,
    key: Option<String>,
    body: Option<Value>,
    timeout: Option<Duration>,
}

impl ProxyRequest {
    fn from_body(content_type: Option<&str>, body: &[u8]) -> Checked<Self> {
        let value = body::json(content_type, body)?;
        let mut check = Checker::new("body");
        let passed = Self::read(&mut check, &value);
        check.finish(passed)
    }

    fn read(check: &mut Checker, value: &Value) -> Option<Self> {
        let fields = Fields::of(check, value)?;
        let host = fields.required(check, "host", string);
        let method = fields.required(check, "method", |check, value| {
            let name = string(check, value)?.to_uppercase();
            let method = METHODS.into_iter().find(|method| method.as_str() == name);
            if method.is_none() {
                check.report_value_error("the method has to be GET, POST, PUT, PATCH or DELETE", value.clone());
            }
            method
        });
        let path = fields.required(check, "path", |check, value| {
            let path = string(check, value)?;
            if !path.starts_with(REACHABLE) {
                check.report_value_error(format!("the path has to begin with {REACHABLE}"), value.clone());
                return None;
            }
            // What others read as another path would lead out of there.
            if !http_client::is_plain(&path) {
                let fault = "the path must not hold `.` or `..` segments, empty segments, backslashes, fragments, control \
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

/// The request goes to where the sandbox is whose key it shows, if that is the caller's; nobody gets anywhere else by way of us.
pub(crate) async fn proxy(
    State(context): State<Context>,
    Caller(user): Caller,
    headers: HeaderMap,
    bytes: Bytes,
) -> Result<Response> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let request = ProxyRequest::from_body(content_type, &bytes).map_err(Error::Invalid)?;
    let record = match &request.key {
        Some(key) => context.records.find_by_session_key(key).await?.filter(|record| record.user == user),
        None => None,
    };
    // The same answer for a key that is nobody's and for another user's.
    let refused = || Error::Forbidden("headers must hold your own sandbox's X-Session-API-Key".to_owned());
    let record = record.ok_or_else(refused)?;
    let sandbox = context.sandboxes.get(&user, &record.id).await?;
    let sandbox = sandbox.ok_or_else(|| Error::NotFound(format!("Sandbox {} not found", record.id)))?;
    let not_running = || Error::Conflict(format!("Sandbox {} does not run", record.id));
    let url = sandbox.agent_server_url().ok_or_else(not_running)?;
    if !is_same_place(&request.host, url) {
        return Err(Error::Forbidden(format!("{} is not where sandbox {} is", request.host, record.id)));
    }
    let agent_server = sandbox.agent_server(&context.messages.http).ok_or_else(not_running)?;
    let timeout = request.timeout.unwrap_or(context.sandbox_request_budget).min(context.sandbox_request_budget);
    if request.method == Method::GET
        && let Some(asked) = AskedOfGit::read(&request.path, &sandbox.working_dir)
    {
        let git = WorkspaceGit { agent_server: &agent_server, root: &sandbox.working_dir };
        return match tokio::time::timeout(timeout, asked.answer(git)).await {
            Ok(answer) => answer.map_err(|error| not_answered(&error))?,
            Err(_) => Err(Error::Upstream { message: TOO_LATE.to_owned(), context: format!("after {timeout:?}") }),
        };
    }
    let path = in_sandbox(&request.path, &sandbox.working_dir);
    let answer = agent_server.proxy(request.method, &path, request.body.as_ref(), ANSWER_LIMIT, timeout).await;
    match answer.map_err(|error| not_answered(&error))? {
        Some((status, kind, body)) => Ok((status, kind.map(|kind| [(CONTENT_TYPE, kind)]), body).into_response()),
        None => Err(Error::TooLarge("The agent server's answer is larger than what can be passed on".to_owned())),
    }
}

fn not_answered(error: &AgentServerError) -> Error {
    let message = match &error.failure {
        Failure::TimedOut => TOO_LATE,
        _ => "The agent server did not answer",
    };
    Error::Upstream { message: message.to_owned(), context: error.to_string() }
}

/// `GET /api/git/changes` or `GET /api/git/diff` of a workspace, which are answered as the conversation's own routes do: agent servers
/// fail on many names, and each version in its own way. The changes of one commit, and what is outside, are the agent server's.
#[derive(Debug, PartialEq, Eq)]
struct AskedOfGit {
    is_diff: bool,
    path: String,
    reference: Option<String>,
}

impl AskedOfGit {
    fn read(path: &str, working_dir: &str) -> Option<Self> {
        let (route, query) = path.split_once('?')?;
        let is_diff = match route {
            "/api/git/changes" => false,
            "/api/git/diff" => true,
            _ => return None,
        };
        let mut asked = Self { is_diff, path: String::new(), reference: None };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            match name.as_ref() {
                "path" => asked.path = value.into_owned(),
                "ref" => asked.reference = Some(value.into_owned()).filter(|reference| !reference.is_empty()),
                "commit" => return None,
                _ => {}
            }
        }
        path_in_workspace(working_dir, &asked.path).map(|_| asked)
    }

    async fn answer(&self, git: WorkspaceGit<'_>) -> Result<Result<Response>, AgentServerError> {
        let reference = self.reference.as_deref();
        Ok(if self.is_diff {
            git.diff(&self.path, reference).await?.map(|diff| Json(diff).into_response())
        } else {
            let changes = git.changes(&self.path, reference).await?;
            changes.map(|changes| changes_response(&changes.list, changes.is_truncated))
        })
    }
}

/// The request's path, with the parameter `path` of its query as the sandbox has it: pages know the workspace as
/// `/workspace/project`, and a sandbox on this machine has it elsewhere. Everything else stays as it came.
fn in_sandbox<'a>(path: &'a str, working_dir: &str) -> Cow<'a, str> {
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

/// Whether both name the same host and port, whatever the scheme: a page that came by https says so of all hosts.
fn is_same_place(host: &str, url: &str) -> bool {
    let place = |url: &str| {
        let place = url.split_once("://").map_or(url, |(_, place)| place);
        place.trim_end_matches('/').to_lowercase()
    };
    place(host) == place(url)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_path_stays_below_the_api() {
        let read = |path: &str| {
            let body = json!({"host": "http://host", "method": "GET", "path": path, "headers": {}});
            ProxyRequest::from_body(Some("application/json"), body.to_string().as_bytes()).map(|passed| passed.path)
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
        let moved = |path: &str| in_sandbox(path, "/home/a user/workspace/project").into_owned();
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
        assert_eq!(in_sandbox(in_container, "/workspace/project"), in_container);
    }

    #[test]
    fn git_is_asked_of_workspaces_alone() {
        let read = |path: &str| AskedOfGit::read(path, "/home/a user/workspace/project/");
        let asked = |is_diff, path: &str, reference: Option<&str>| {
            Some(AskedOfGit { is_diff, path: path.to_owned(), reference: reference.map(str::to_owned) })
        };
        for (path, expected) in [
            ("/api/git/changes?path=%2Fworkspace%2Fproject", asked(false, "/workspace/project", None)),
            (
                "/api/git/diff?ref=HEAD&path=/workspace/project/a%26b+c&x=y",
                asked(true, "/workspace/project/a&b c", Some("HEAD")),
            ),
            (
                "/api/git/changes?ref=&path=/home/a%20user/workspace/project/r",
                asked(false, "/home/a user/workspace/project/r", None),
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
    fn places_are_compared_without_scheme() {
        assert!(is_same_place("https://Host:1/", "http://host:1"));
        assert!(is_same_place("http://host/runtime/1", "http://host/runtime/1/"));
        for other in ["http://host:2", "http://host", "http://host:1.evil", "http://host:1/api", ""] {
            assert!(!is_same_place(other, "http://host:1"), "{other}");
        }
    }
}
