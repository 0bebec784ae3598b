//! Git providers: the URLs and credentials with which a repository is cloned.
//!
//! Users paste hosts, tokens, repositories and branches in many forms. Each has one normal form in which it is stored and used; the
//! modules here convert all other forms to it. Settings, starts and updates of conversations share them.

mod address;
mod branch;
mod check;
mod host;
mod provider;
mod repository;
mod token;

use secrecy::{ExposeSecret as _, SecretString};

pub use address::without_credentials;
pub use branch::{BranchError, normal_branch};
pub use check::TokenChecker;
pub use host::{HostError, normal_host};
pub use provider::ProviderType;
pub(crate) use repository::report_at;
pub use repository::{Repository, RepositoryError, Selection};
pub use token::{TokenError, normal_token};

use super::settings::{ProviderToken, ProviderTokens};
use crate::http::pydantic::validation::Checker;
use host::GitHost;

/// A URL from which a repository can be cloned. The URL itself never contains a credential, because it appears in the clone's
/// configuration and in logs.
#[derive(Clone, Debug)]
pub struct CloneSource {
    /// The provider of the URL.
    pub provider: ProviderType,
    /// `https://host/owner/name.git`
    pub url: String,
    /// A line of git's credential store (`https://user:password@host`), if the user has a token for the provider.
    pub credential: Option<SecretString>,
}

/// Why a repository cannot be cloned.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum GitError {
    /// The name is not valid for a repository, or not for its provider.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The host in the settings is invalid.
    #[error("the host of {0} in the settings is not valid: {1}")]
    Host(ProviderType, HostError),
    /// The host uses no encryption, which this server does not allow.
    #[error("{0} is an unencrypted git host, which this server does not allow; use https")]
    Insecure(String),
}

/// Returns the URLs to try, in order: the named provider's, or those of all providers with a token in their stored order, or GitHub's
/// public one if there is neither. Of several, those whose provider does not accept the name are left out.
///
/// # Errors
/// When no provider accepts the name of the repository, or a host is not allowed.
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

/// Reports a branch or provider that is selected without a repository.
pub(crate) fn report_without_repository(check: &mut Checker, branch: Option<&str>, provider: Option<ProviderType>) {
    if let Some(branch) = branch {
        let error = "a branch needs a repository; send selected_repository as well";
        check.within("selected_branch", |check| check.report_value_error(error, branch.into()));
    }
    if let Some(provider) = provider {
        let error = "a provider needs a repository; send selected_repository as well";
        check.within("git_provider", |check| check.report_value_error(error, provider.as_str().into()));
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
    // git uses the first credential of a host. If an earlier source has one of the same host, the user name selects the credential.
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

    /// A host in the settings, what is asked for there, and what is cloned.
    #[test]
    fn hosts_and_names_are_put_together_without_repeating_what_both_have() {
        use ProviderType::{AzureDevops, Bitbucket, BitbucketDataCenter, Forgejo, Github, Gitlab};
        for (provider, host, name, url) in [
            (Github, "http://127.0.0.1:3482/api/v3", "o/r.js", "http://127.0.0.1:3482/o/r.js.git"),
            (Github, "https://ghe.example/api/v3/", "o/r", "https://ghe.example/o/r.git"),
            (Github, "https://api.github.com", "o/r", "https://github.com/o/r.git"),
            (Github, "https://user:old@ghe.example/", "o/r", "https://ghe.example/o/r.git"),
            (Github, "https://ghe.example", "https://ghe.example/o/r.git", "https://ghe.example/o/r.git"),
            (Gitlab, "http://127.0.0.1:3482/api/v4", "g/s/r", "http://127.0.0.1:3482/g/s/r.git"),
            (Gitlab, "gitlab.example/gitlab", "g/r", "https://gitlab.example/gitlab/g/r.git"),
            (Gitlab, "https://[2001:db8::1]:8443/", "g/r", "https://[2001:db8::1]:8443/g/r.git"),
            (Gitlab, "https://bücher.example:443", "g/r", "https://xn--bcher-kva.example/g/r.git"),
            (Forgejo, "HTTPS://Forge.Example/git/api/v1", "o/r", "https://forge.example/git/o/r.git"),
            (Bitbucket, "https://api.bitbucket.org/2.0", "w/r", "https://bitbucket.org/w/r.git"),
            (Bitbucket, "bitbucket.org/workspace", "w/r", "https://bitbucket.org/w/r.git"),
            (BitbucketDataCenter, "bb.example/rest/api/1.0", "PRJ/r", "https://bb.example/scm/prj/r.git"),
            (BitbucketDataCenter, "bb.example:7990/ctx", "~jo/r", "https://bb.example:7990/ctx/scm/~jo/r.git"),
            (AzureDevops, "", "o/p q/r", "https://dev.azure.com/o/p%20q/_git/r"),
            (AzureDevops, "o", "p q/r", "https://dev.azure.com/o/p%20q/_git/r"),
            (AzureDevops, "o", "o/p q/r", "https://dev.azure.com/o/p%20q/_git/r"),
            (AzureDevops, "o", "other/p/r", "https://dev.azure.com/other/p/_git/r"),
            (AzureDevops, "dev.azure.com/o/p q", "o/p q/r", "https://dev.azure.com/o/p%20q/_git/r"),
            (AzureDevops, "https://dev.azure.com/o/p", "p/r", "https://dev.azure.com/o/p/_git/r"),
            (AzureDevops, "o.visualstudio.com", "p/r", "https://dev.azure.com/o/p/_git/r"),
            (
                AzureDevops,
                "http://127.0.0.1:3482/org",
                "org/My Project/r",
                "http://127.0.0.1:3482/org/My%20Project/_git/r",
            ),
            (
                AzureDevops,
                "http://127.0.0.1:3482/org/My Project",
                "org/My Project/r",
                "http://127.0.0.1:3482/org/My%20Project/_git/r",
            ),
            (AzureDevops, "http://127.0.0.1:3482", "org/My Project/r", "http://127.0.0.1:3482/org/My%20Project/_git/r"),
            (AzureDevops, "tfs.example/tfs/Main", "p/r", "https://tfs.example/tfs/Main/p/_git/r"),
            (AzureDevops, "tfs.example/tfs/Main", "Main/p/r", "https://tfs.example/tfs/Main/p/_git/r"),
            (AzureDevops, "tfs.example/tfs", "Main/p/r", "https://tfs.example/tfs/Main/p/_git/r"),
            (AzureDevops, "tfs.example/Main", "Main/r", "https://tfs.example/Main/Main/_git/r"),
            (
                AzureDevops,
                "tfs.example/tfs/Main",
                "https://tfs.example/tfs/Main/p/_git/r",
                "https://tfs.example/tfs/Main/p/_git/r",
            ),
        ] {
            let tokens = tokens(&[(provider, "t", Some(host))]);
            let sources = clone_sources(name, Some(provider), &tokens, true).expect("sources");
            assert_eq!((sources.len(), sources[0].url.as_str()), (1, url), "{host} {name}");
            // The credential is for the host alone, as git looks for it.
            let credential = sources[0].credential.as_ref().map(|line| line.expose_secret().to_owned()).expect("one");
            let host = url.split('/').nth(2).expect("a host");
            assert!(credential.ends_with(&format!("t@{host}")), "{credential}");
        }
        for (provider, host, name) in [
            (AzureDevops, "", "p/r"),
            (AzureDevops, "o", "a/o/p/r"),
            (AzureDevops, "tfs.example", "p/r"),
            (Github, "a host", "o/r"),
            (BitbucketDataCenter, "bb.example", "g/s/r"),
        ] {
            let tokens = tokens(&[(provider, "t", Some(host))]);
            assert!(clone_sources(name, Some(provider), &tokens, true).is_err(), "{host} {name}");
        }
    }

    #[test]
    fn an_address_is_of_the_provider_whose_host_it_has() {
        use ProviderType::{Bitbucket, BitbucketDataCenter, EnterpriseSso, Github, Gitlab};
        let given = [
            (BitbucketDataCenter, "t", None),
            (EnterpriseSso, "t", None),
            (Gitlab, "t", Some("https://git.example/a")),
            (Github, "t", Some("git.example")),
        ];
        let read =
            |text, given: &[_]| Repository::read(text, None, &tokens(given)).map(|read| (read.provider, read.name));
        for (text, provider, name) in [
            ("https://bitbucket.org/w/r", Bitbucket, "w/r"),
            ("https://github.com/o/r", EnterpriseSso, "o/r"),
            ("https://git.example/a/g/s/r", Gitlab, "g/s/r"),
            ("git.example/o/r", Github, "o/r"),
            ("https://gist.github.com/o/r", Github, ""),
            ("https://gitlab.com/g/r", Gitlab, ""),
        ] {
            let expected = if name.is_empty() { None } else { Some((Some(provider), name.to_owned())) };
            assert_eq!(read(text, &given).ok(), expected, "{text}");
        }
        // Groups may be called as a host is that is one word.
        let word = [(Gitlab, "t", Some("gitlab"))];
        assert_eq!(read("gitlab/g/r", &word), Ok((None, "gitlab/g/r".to_owned())));
        assert_eq!(read("https://gitlab/g/r", &word), Ok((Some(Gitlab), "g/r".to_owned())));
        assert_eq!(read("github.com/o", &word), Err(RepositoryError::Form));
    }

    #[test]
    fn several_tokens_of_one_host_are_distinguished_by_their_users() {
        use ProviderType::{Bitbucket, Forgejo, Github, Gitlab};
        let given = tokens(&[
            (Gitlab, "a", Some("git.example:443")),
            (Github, "b", Some("https://GIT.example/api/v3")),
            (Forgejo, "c", Some("git.example:8443")),
            (Bitbucket, "d", Some("a host")),
        ]);
        let sources = clone_sources("o/r", None, &given, false).expect("sources");
        let urls: Vec<&str> = sources.iter().map(|source| source.url.as_str()).collect();
        // What cannot be is left out where there are others.
        assert_eq!(
            urls,
            [
                "https://git.example/o/r.git",
                "https://x-access-token@git.example/o/r.git",
                "https://git.example:8443/o/r.git"
            ]
        );
        let only_gitlab = clone_sources("g/s/r", None, &given, false).expect("sources");
        assert_eq!(only_gitlab.len(), 1);
    }

    #[test]
    fn odd_names_are_refused() {
        for name in ["r", "o/", "/r", "o/../r", "o/r\nx", "-o/r", "o/r;id", "o//r"] {
            let refused = clone_sources(name, None, &ProviderTokens::default(), false);
            assert!(matches!(refused, Err(GitError::Repository(_))), "{name}: {refused:?}");
        }
    }
}
