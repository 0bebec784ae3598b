//! Checks a token at the API of its provider, before it is stored.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{ACCEPT, AUTHORIZATION, HeaderMap, RETRY_AFTER};
use http::{HeaderValue, Method, StatusCode};
use secrecy::{ExposeSecret as _, SecretString};

use super::encoded;
use super::host::GitHost;
use crate::error::{Error, Result};
use crate::http_client::HttpClient;
use crate::user::git::ProviderType;
use crate::user::settings::ProviderToken;

/// The time limit of a check. API Gateway waits for 29 s, and the checks of all providers run at once.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Only the status of a response matters; a response that is read to its end returns its connection to the pool.
const BODY_LIMIT: usize = 64 * 1024;
/// When to repeat a check that was limited, if the provider does not say it.
const DEFAULT_RETRY: Duration = Duration::from_secs(60);
/// The longest wait that a provider may impose on the caller.
const LONGEST_RETRY: Duration = Duration::from_secs(3600);

/// Checks tokens of git providers.
#[derive(Clone, Debug)]
pub struct TokenChecker {
    http: HttpClient,
    allow_insecure: bool,
}

impl TokenChecker {
    /// A checker that sends tokens without encryption only if `allow_insecure`.
    #[must_use]
    pub fn new(http: HttpClient, allow_insecure: bool) -> Self {
        Self { http, allow_insecure }
    }

    /// Checks that the provider accepts the token. The token is sent to the provider's own host only: redirects are not followed.
    ///
    /// # Errors
    /// [`Error::Unauthenticated`] when the provider refuses the token, or the host has no API of this provider;
    /// [`Error::Saturated`] when the provider limits requests; [`Error::Upstream`] when it does not respond or fails;
    /// [`Error::Refused`] when the host is not allowed. None contains the token.
    pub async fn check(&self, provider: ProviderType, token: &ProviderToken) -> Result<()> {
        let secret = token.token.as_ref().map_or("", SecretString::expose_secret);
        let host = GitHost::of(provider, token.host.as_deref())
            .map_err(|error| Error::Refused(format!("The host of {provider} is not valid: {error}")))?;
        if host.is_insecure && !self.allow_insecure {
            let authority = host.authority;
            let text = "is an unencrypted git host, which this server does not allow; use https";
            return Err(Error::Refused(format!("{authority} {text}")));
        }
        let Some(url) = url_of_check(provider, &host) else { return Err(invalid(provider)) };
        let Ok(mut authorization) = HeaderValue::from_str(&authorization(provider, secret)) else {
            return Err(invalid(provider));
        };
        authorization.set_sensitive(true);
        let failed = |context: String| Error::Upstream {
            message: format!(
                "The git provider {provider} did not respond, so the token could not be checked; try again later"
            ),
            context: format!("check of a token of {provider}: {context}"),
        };
        let request = self.http.request(Method::GET, &url).map_err(|error| failed(error.to_string()))?;
        let accept =
            if provider == ProviderType::Github { "application/vnd.github.v3+json" } else { "application/json" };
        // GitHub refuses requests without a user agent.
        let request = request.with(|request| {
            request.header(AUTHORIZATION, authorization).header(ACCEPT, accept).header("user-agent", "openhands-lambda")
        });
        let answer = request.send(TIMEOUT, |_| BODY_LIMIT).await.map_err(|error| failed(error.to_string()))?;
        let status = answer.status;
        if is_rate_limit(status, &answer.headers) {
            return Err(Error::Saturated {
                message: format!("The git provider {provider} accepts no more requests for now; try again later"),
                retry_after: retry_after(&answer.headers),
            });
        }
        match status {
            // Azure DevOps answers a bad token with 203 and a page for logging in.
            StatusCode::NON_AUTHORITATIVE_INFORMATION if provider == ProviderType::AzureDevops => {
                Err(invalid(provider))
            }
            _ if status.is_success() => Ok(()),
            _ if status.is_server_error() => Err(failed(format!("status {status}"))),
            _ => Err(invalid(provider)),
        }
    }
}

/// The contract's error for a token that its provider does not accept.
fn invalid(provider: ProviderType) -> Error {
    Error::Unauthenticated(format!("Invalid token. Please make sure it is a valid {provider} token."))
}

/// The address of a cheap request that requires a valid token; `None` where there is none.
fn url_of_check(provider: ProviderType, host: &GitHost) -> Option<String> {
    let origin = host.origin();
    let is_public = *host == GitHost::public(provider);
    let folder = folder(&host.path);
    match provider {
        ProviderType::Github if is_public => Some("https://api.github.com/user".to_owned()),
        // GitHub's hosts of single enterprises.
        ProviderType::Github if host.authority.ends_with(".ghe.com") => {
            Some(format!("{}api.{}/user", host.scheme(), host.authority))
        }
        ProviderType::Github => Some(format!("{origin}{folder}/api/v3/user")),
        ProviderType::Gitlab => Some(format!("{origin}{folder}/api/v4/user")),
        ProviderType::Bitbucket => Some(format!("{}api.{}/2.0/user", host.scheme(), host.authority)),
        // It has no public host.
        ProviderType::BitbucketDataCenter if is_public => None,
        // `/repos` responds without a token, too, where repositories are public.
        ProviderType::BitbucketDataCenter => {
            Some(format!("{origin}{folder}/rest/api/1.0/profile/recent/repos?limit=1"))
        }
        ProviderType::Forgejo => Some(format!("{origin}{folder}/api/v1/user")),
        // Which organisation the token is for is not known.
        ProviderType::AzureDevops if host.path.is_empty() => None,
        ProviderType::AzureDevops => {
            // A second segment of the public host is a project.
            let levels = if host.is_public_azure() { 1 } else { host.path.len() };
            let organisation = self::folder(&host.path[..levels]);
            Some(format!("{origin}{organisation}/_apis/connectionData?api-version=7.1-preview.1"))
        }
        ProviderType::EnterpriseSso => None,
    }
}

/// The path of a host's folder, with a slash before each segment.
fn folder(segments: &[String]) -> String {
    segments.iter().flat_map(|segment| ["/".to_owned(), encoded(segment)]).collect()
}

/// The header with which the provider's API accepts a token.
fn authorization(provider: ProviderType, token: &str) -> String {
    let basic = |pair: &str| format!("Basic {}", STANDARD.encode(pair));
    // JSON Web Tokens have three parts; personal tokens have no dots.
    let is_jwt = token.starts_with("eyJ") && token.matches('.').count() == 2;
    match provider {
        ProviderType::Bitbucket | ProviderType::BitbucketDataCenter if token.contains(':') => basic(token),
        ProviderType::BitbucketDataCenter => basic(&format!("x-token-auth:{token}")),
        ProviderType::AzureDevops if is_jwt => format!("Bearer {token}"),
        ProviderType::AzureDevops if token.contains(':') => basic(token),
        ProviderType::AzureDevops => basic(&format!(":{token}")),
        ProviderType::Forgejo => format!("token {}", without_user(token)),
        _ => format!("Bearer {}", if provider == ProviderType::Bitbucket { token } else { without_user(token) }),
    }
}

/// A token that was given as `user:token`, `token:` or `token:x-oauth-basic` for git; APIs take it by itself.
fn without_user(token: &str) -> &str {
    match token.split_once(':') {
        Some((token, "" | "x-oauth-basic") | (_, token)) => token,
        None => token,
    }
}

fn is_rate_limit(status: StatusCode, headers: &HeaderMap) -> bool {
    let is_used_up = headers.get("x-ratelimit-remaining").is_some_and(|left| left == "0");
    status == StatusCode::TOO_MANY_REQUESTS
        || status == StatusCode::FORBIDDEN && (is_used_up || headers.contains_key(RETRY_AFTER))
}

fn retry_after(headers: &HeaderMap) -> Duration {
    let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.trim().parse().ok());
    seconds.map_or(DEFAULT_RETRY, Duration::from_secs).clamp(Duration::from_secs(1), LONGEST_RETRY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_provider_is_asked_at_its_own_api() {
        use ProviderType::{AzureDevops, Bitbucket, BitbucketDataCenter, EnterpriseSso, Forgejo, Github, Gitlab};
        for (provider, host, url) in [
            (Github, "", Some("https://api.github.com/user")),
            (Github, "ghe.example", Some("https://ghe.example/api/v3/user")),
            (Github, "corp.ghe.com", Some("https://api.corp.ghe.com/user")),
            (Gitlab, "", Some("https://gitlab.com/api/v4/user")),
            (Gitlab, "http://127.0.0.1:8080/gitlab", Some("http://127.0.0.1:8080/gitlab/api/v4/user")),
            (Bitbucket, "", Some("https://api.bitbucket.org/2.0/user")),
            (BitbucketDataCenter, "", None),
            (BitbucketDataCenter, "dc.example", Some("https://dc.example/rest/api/1.0/profile/recent/repos?limit=1")),
            (Forgejo, "", Some("https://codeberg.org/api/v1/user")),
            (Forgejo, "fj.example/git", Some("https://fj.example/git/api/v1/user")),
            (AzureDevops, "", None),
            (
                AzureDevops,
                "dev.azure.com/org1/Proj A",
                Some("https://dev.azure.com/org1/_apis/connectionData?api-version=7.1-preview.1"),
            ),
            (
                AzureDevops,
                "tfs.example/tfs/Main",
                Some("https://tfs.example/tfs/Main/_apis/connectionData?api-version=7.1-preview.1"),
            ),
            (EnterpriseSso, "", None),
        ] {
            let host = GitHost::of(provider, Some(host)).expect("a host");
            assert_eq!(url_of_check(provider, &host).as_deref(), url, "{provider}");
        }
    }

    #[test]
    fn each_provider_has_its_own_authorization() {
        use ProviderType::{AzureDevops, Bitbucket, BitbucketDataCenter, Forgejo, Github, Gitlab};
        for (provider, token, header) in [
            (Github, "gh-ok", "Bearer gh-ok"),
            (Github, "gh-ok:x-oauth-basic", "Bearer gh-ok"),
            (Gitlab, "oauth2:gl-ok", "Bearer gl-ok"),
            (Bitbucket, "u@example.com:bb-ok", "Basic dUBleGFtcGxlLmNvbTpiYi1vaw=="),
            (Bitbucket, "bb-ok", "Bearer bb-ok"),
            (BitbucketDataCenter, "dc-ok", "Basic eC10b2tlbi1hdXRoOmRjLW9r"),
            (Forgejo, "fj-ok", "token fj-ok"),
            (AzureDevops, "az-ok", "Basic OmF6LW9r"),
            (AzureDevops, "eyJ.eyJ.sig", "Bearer eyJ.eyJ.sig"),
        ] {
            assert_eq!(authorization(provider, token), header, "{provider}");
        }
    }
}
