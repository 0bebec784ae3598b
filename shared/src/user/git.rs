//! Where a repository may be cloned from, and with which credentials.

use secrecy::{ExposeSecret as _, SecretString};

use super::settings::{ProviderToken, ProviderTokens};
use crate::start::request::ProviderType;

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
    /// The name is not `owner/name`, or does not fit its provider.
    #[error("`{0}` is not the name of a repository: it should be owner/name")]
    Name(String),
    /// The host is to be reached without encryption, which is not allowed here.
    #[error("{0} is an unencrypted git host, and this server does not allow those")]
    Insecure(String),
}

/// The addresses to try, in order: the named provider's, or else those of all providers with a token in their stored
/// order; GitHub's public one if there is neither.
///
/// # Errors
/// When the repository's name does not fit or a host is not allowed.
pub fn clone_sources(
    repository: &str,
    named: Option<ProviderType>,
    tokens: &ProviderTokens,
    allow_insecure: bool,
) -> Result<Vec<CloneSource>, GitError> {
    let segments: Vec<&str> = repository.split('/').collect();
    let odd = |segment: &&str| {
        segment.is_empty()
            || *segment == "."
            || *segment == ".."
            || segment.starts_with('-')
            || segment.chars().any(char::is_control)
    };
    if segments.len() < 2 || segments.iter().any(odd) {
        return Err(GitError::Name(repository.to_owned()));
    }
    let stored = |provider| tokens.0.iter().find(|(stored, _)| *stored == provider).map(|(_, token)| token);
    let no_token = ProviderToken::default();
    let candidates: Vec<(ProviderType, &ProviderToken)> = match named {
        Some(provider) => vec![(provider, stored(provider).unwrap_or(&no_token))],
        None if tokens.0.is_empty() => vec![(ProviderType::Github, &no_token)],
        None => tokens.0.iter().map(|(provider, token)| (*provider, token)).collect(),
    };
    candidates
        .into_iter()
        .map(|(provider, token)| source(repository, &segments, provider, token, allow_insecure))
        .collect()
}

fn source(
    repository: &str,
    segments: &[&str],
    provider: ProviderType,
    token: &ProviderToken,
    allow_insecure: bool,
) -> Result<CloneSource, GitError> {
    let configured = token.host.as_deref().map(str::trim).filter(|host| !host.is_empty());
    let host = configured.unwrap_or(match provider {
        ProviderType::Gitlab => "gitlab.com",
        ProviderType::Bitbucket | ProviderType::BitbucketDataCenter => "bitbucket.org",
        ProviderType::Forgejo => "codeberg.org",
        ProviderType::AzureDevops => "dev.azure.com",
        ProviderType::Github | ProviderType::EnterpriseSso => "github.com",
    });
    let (scheme, host) = match host.split_once("://") {
        Some(("http", _)) if !allow_insecure => return Err(GitError::Insecure(host.to_owned())),
        Some(("http", host)) => ("http", host),
        Some((_, host)) => ("https", host),
        None => ("https", host),
    };
    let host = host.trim_end_matches('/');
    let path = match provider {
        ProviderType::BitbucketDataCenter => {
            let [project, slug] = segments else { return Err(GitError::Name(repository.to_owned())) };
            format!("scm/{}/{}.git", encoded(&project.to_lowercase()), encoded(slug))
        }
        ProviderType::AzureDevops => {
            let [organisation, project, name] = segments else { return Err(GitError::Name(repository.to_owned())) };
            format!("{}/{}/_git/{}", encoded(organisation), encoded(project), encoded(name))
        }
        _ => format!("{}.git", segments.iter().map(|segment| encoded(segment)).collect::<Vec<_>>().join("/")),
    };
    let credential = token.token.as_ref().filter(|token| !token.expose_secret().is_empty()).map(|token| {
        let token = token.expose_secret();
        let (user, password) = match (provider, token.split_once(':')) {
            (ProviderType::Bitbucket | ProviderType::BitbucketDataCenter, Some((user, password))) => (user, password),
            (ProviderType::Bitbucket, None) => ("x-token-auth", token),
            (ProviderType::Gitlab, _) => ("oauth2", token),
            (ProviderType::AzureDevops, _) => (segments[0], token),
            // GitHub and Forgejo take the token as the password of any user.
            _ => ("x-access-token", token),
        };
        SecretString::from(format!("{scheme}://{}:{}@{host}", encoded(user), encoded(password)))
    });
    Ok(CloneSource { provider, url: format!("{scheme}://{host}/{path}"), credential })
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
        for name in ["r", "o/", "/r", "o/../r", "o/r\n", "-o/r"] {
            assert_eq!(
                clone_sources(name, None, &ProviderTokens::default(), false).unwrap_err(),
                GitError::Name(name.into())
            );
        }
    }
}
