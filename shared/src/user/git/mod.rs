//! Where a repository may be cloned from, and with which credentials.
//!
//! Hosts, tokens, repositories and branches come as people paste them. Each has one form in which it is kept and used; the
//! modules here read it from all the others. Settings, starts and updates of conversations share them.

mod address;
mod branch;
mod host;
mod repository;
mod token;

use secrecy::{ExposeSecret as _, SecretString};

pub use address::without_credentials;
pub use branch::{BranchError, normal_branch};
pub use host::{HostError, normal_host};
pub(crate) use repository::report_at;
pub use repository::{Repository, RepositoryError, Selection};
pub use token::{TokenError, normal_token};

use super::settings::{ProviderToken, ProviderTokens};
use crate::start::request::{ProviderType, StartRequest};
use host::GitHost;

/// One address from which a repository may be cloned. The address itself never holds a credential: it ends in the
/// clone's configuration and in logs.
#[derive(Clone, Debug)]
pub struct CloneSource {
    /// Whose it is.
    pub provider: ProviderType,
    /// `https://host/owner/name.git`
    pub url: String,
    /// A line of git's credential store (`https://user:password@host`), if the user has a token there.
    pub credential: Option<SecretString>,
}

/// Why there is no address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum GitError {
    /// The name is not that of a repository, or does not fit its provider.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The host in the settings cannot be one.
    #[error("the host that the settings name for {0} cannot be used: {1}")]
    Host(ProviderType, HostError),
    /// The host is to be reached without encryption, which is not allowed here.
    #[error("{0} is an unencrypted git host, and this server does not allow those")]
    Insecure(String),
}

/// The addresses to try, in order: the named provider's, or else those of all providers with a token in their stored
/// order; GitHub's public one if there is neither. Of several, those are left out that the name does not fit.
///
/// # Errors
/// When the repository's name does not fit or a host is not allowed.
pub fn clone_sources(
    repository: &str,
    named: Option<ProviderType>,
    tokens: &ProviderTokens,
    allow_insecure: bool,
) -> Result<Vec<CloneSource>, GitError> {
    let read = Repository::read(repository, named, tokens)?;
    let parts: Vec<&str> = read.name.split('/').collect();
    let no_token = ProviderToken::default();
    let candidates: Vec<(ProviderType, &ProviderToken)> = match read.provider {
        Some(provider) => vec![(provider, repository::setting(provider, tokens).unwrap_or(&no_token))],
        None if tokens.0.is_empty() => vec![(ProviderType::Github, &no_token)],
        None => tokens.0.iter().map(|(provider, token)| (*provider, token)).collect(),
    };
    let mut sources: Vec<CloneSource> = Vec::new();
    let mut first_error = None;
    for (provider, token) in candidates {
        let fits = repository::fits(&parts, provider, tokens).map_err(GitError::from);
        match fits.and_then(|()| source(&parts, provider, token, allow_insecure, &sources)) {
            Ok(source) => sources.push(source),
            Err(error) => first_error = first_error.or(Some(error)),
        }
    }
    match first_error {
        Some(error) if sources.is_empty() => Err(error),
        _ => Ok(sources),
    }
}

/// What a request says that selects a branch and nothing that it could be of.
pub const NO_REPOSITORY: &str = "there is no branch without a repository";

/// Puts a start's repository, branch and provider into the form in which they are used and recorded. What cannot be read stays
/// as it is: starts and records of earlier versions may have anything.
pub(crate) fn use_normal_selection(request: &mut StartRequest, tokens: &ProviderTokens) {
    let given = request.selected_repository.as_deref();
    let Some(Ok(read)) = given.map(|text| Repository::read(text, request.git_provider, tokens)) else { return };
    (request.selected_repository, request.git_provider) = (Some(read.name), read.provider);
    if let Some(Ok(branch)) = request.selected_branch.as_deref().map(normal_branch) {
        request.selected_branch = branch;
    }
}

fn source(
    parts: &[&str],
    provider: ProviderType,
    token: &ProviderToken,
    allow_insecure: bool,
    earlier: &[CloneSource],
) -> Result<CloneSource, GitError> {
    let host = GitHost::of(provider, token.host.as_deref()).map_err(|error| GitError::Host(provider, error))?;
    if host.is_insecure && !allow_insecure {
        return Err(GitError::Insecure(host.authority));
    }
    let joined = |parts: &[String]| parts.iter().map(|part| encoded(part)).collect::<Vec<_>>().join("/");
    let owned: Vec<String> = parts.iter().map(|part| (*part).to_owned()).collect();
    let mut organisation = String::new();
    let path = match (provider, parts) {
        (ProviderType::BitbucketDataCenter, [project, slug]) => {
            let path = [host.path.clone(), vec!["scm".to_owned(), project.to_lowercase(), format!("{slug}.git")]];
            joined(&path.concat())
        }
        (ProviderType::AzureDevops, _) => {
            let mut path = repository::azure_path(&host, parts).ok_or(RepositoryError::AzureForm)?;
            organisation = path.first().cloned().unwrap_or_default();
            let at = path.len() - 1;
            path.insert(at, "_git".to_owned());
            joined(&path)
        }
        _ => format!("{}.git", joined(&[host.path.clone(), owned].concat())),
    };
    let origin = host.origin();
    let token = token.token.as_ref().filter(|token| !token.expose_secret().is_empty());
    let user = token.map(|token| token::user_and_password(provider, token.expose_secret(), &organisation));
    let (scheme, authority) = (host.scheme(), &host.authority);
    let credential = user.map(|(user, password)| {
        SecretString::from(format!("{scheme}{}:{}@{authority}", encoded(user), encoded(password)))
    });
    // git takes the first credential of a host. Where an earlier source has one of the same host, the user name chooses.
    let is_taken =
        earlier.iter().any(|source| source.url.starts_with(&format!("{origin}/")) && source.credential.is_some());
    let url = match user {
        Some((user, _)) if is_taken => format!("{scheme}{}@{authority}/{path}", encoded(user)),
        _ => format!("{origin}/{path}"),
    };
    Ok(CloneSource { provider, url, credential })
}

/// Percent-encodes everything but RFC 3986's unreserved characters.
fn encoded(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => out.push(char::from(byte)),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(given: &[(ProviderType, &str, Option<&str>)]) -> ProviderTokens {
        ProviderTokens(
            given
                .iter()
                .map(|(provider, token, host)| {
                    let token =
                        ProviderToken { token: Some((*token).into()), host: host.map(Into::into), user_id: None };
                    (*provider, token)
                })
                .collect(),
        )
    }

    #[test]
    fn each_provider_has_its_own_address_and_credential() {
        for (provider, token, repository, url, credential) in [
            (ProviderType::Github, "t", "o/r", "https://github.com/o/r.git", "https://x-access-token:t@github.com"),
            (ProviderType::Gitlab, "t", "g/s/r", "https://gitlab.com/g/s/r.git", "https://oauth2:t@gitlab.com"),
            (
                ProviderType::Bitbucket,
                "t",
                "o/r",
                "https://bitbucket.org/o/r.git",
                "https://x-token-auth:t@bitbucket.org",
            ),
            (ProviderType::Bitbucket, "u:p@", "o/r", "https://bitbucket.org/o/r.git", "https://u:p%40@bitbucket.org"),
            (
                ProviderType::BitbucketDataCenter,
                "u:p",
                "PRJ/r",
                "https://bitbucket.org/scm/prj/r.git",
                "https://u:p@bitbucket.org",
            ),
            (
                ProviderType::AzureDevops,
                "t",
                "o/p q/r",
                "https://dev.azure.com/o/p%20q/_git/r",
                "https://o:t@dev.azure.com",
            ),
            (
                ProviderType::Forgejo,
                "t",
                "o/r",
                "https://codeberg.org/o/r.git",
                "https://x-access-token:t@codeberg.org",
            ),
        ] {
            let sources =
                clone_sources(repository, Some(provider), &tokens(&[(provider, token, None)]), false).expect("sources");
            assert_eq!(sources.len(), 1);
            assert_eq!(sources[0].url, url);
            assert_eq!(sources[0].credential.as_ref().map(secrecy::ExposeSecret::expose_secret), Some(credential));
        }
    }

    #[test]
    fn without_a_named_provider_every_token_is_tried_in_order() {
        let tokens = tokens(&[(ProviderType::Gitlab, "a", None), (ProviderType::Github, "b", Some("ghe.example"))]);
        let urls: Vec<_> =
            clone_sources("o/r", None, &tokens, false).expect("sources").into_iter().map(|source| source.url).collect();
        assert_eq!(urls, ["https://gitlab.com/o/r.git", "https://ghe.example/o/r.git"]);
        let public = clone_sources("o/r", None, &ProviderTokens::default(), false).expect("sources");
        assert_eq!(public[0].url, "https://github.com/o/r.git");
        assert!(public[0].credential.is_none());
    }

    #[test]
    fn an_unencrypted_host_needs_permission() {
        let tokens = tokens(&[(ProviderType::Github, "t", Some("http://127.0.0.1:8080"))]);
        assert!(matches!(clone_sources("o/r", None, &tokens, false), Err(GitError::Insecure(_))));
        assert_eq!(clone_sources("o/r", None, &tokens, true).expect("sources")[0].url, "http://127.0.0.1:8080/o/r.git");
    }

    #[test]
    fn odd_names_are_refused() {
        for name in ["r", "o/", "/r", "o/../r", "o/r\nx", "-o/r", "o/r;id", "o//r"] {
            let refused = clone_sources(name, None, &ProviderTokens::default(), false);
            assert!(matches!(refused, Err(GitError::Repository(_))), "{name}: {refused:?}");
        }
    }
}
