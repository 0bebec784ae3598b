//! The host of a git provider: its public one, or the one in the user's settings.

use super::address::{self, Address, AddressError, Scheme};
use super::encoded;
use crate::user::git::ProviderType;

const AZURE: &str = "dev.azure.com";

/// A provider's host in its normal form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GitHost {
    /// Plain HTTP.
    pub is_insecure: bool,
    /// The name, with the port unless it is the usual one.
    pub authority: String,
    /// The folder below which the provider is; for Azure DevOps the organisation or collection, and the project if one is given.
    pub path: Vec<String>,
}

/// Why a text is not the host of a provider.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostError {
    /// The text contains a user name and a password.
    #[error("a host must not contain a user name and password; send the token as `token`")]
    Password,
    /// The protocol is neither HTTPS nor HTTP.
    #[error("a git host must use https or http")]
    Scheme,
    /// The text names a repository, so that the folder of the host is ambiguous.
    #[error("this is the address of a repository; send only the host")]
    Repository,
    /// The text is not a valid host.
    #[error("not a valid host; write it like git.example.org, with its port and folder if it has them")]
    Host,
}

impl From<AddressError> for HostError {
    fn from(error: AddressError) -> Self {
        match error {
            AddressError::Scheme => Self::Scheme,
            AddressError::Host => Self::Host,
        }
    }
}

/// Normalises the host of a setting; `None` if it is blank, which means the provider's public host.
///
/// # Errors
/// When the text is not a valid host. No error contains the text.
pub fn normal_host(provider: ProviderType, text: &str) -> Result<Option<String>, HostError> {
    Ok(GitHost::parse(provider, text)?.map(|host| host.shown(provider)))
}

impl GitHost {
    /// The provider's public host. Bitbucket Data Center has none.
    pub fn public(provider: ProviderType) -> Self {
        let authority = match provider {
            ProviderType::Gitlab => "gitlab.com",
            ProviderType::Bitbucket | ProviderType::BitbucketDataCenter => "bitbucket.org",
            ProviderType::Forgejo => "codeberg.org",
            ProviderType::AzureDevops => AZURE,
            ProviderType::Github | ProviderType::EnterpriseSso => "github.com",
        };
        Self { is_insecure: false, authority: authority.to_owned(), path: Vec::new() }
    }

    /// The provider's host according to the user's setting.
    pub fn of(provider: ProviderType, setting: Option<&str>) -> Result<Self, HostError> {
        // A setting from before passwords were rejected is still used, without its password.
        let setting = setting.map(address::without_credentials);
        Ok(Self::parse(provider, setting.as_deref().unwrap_or_default())?.unwrap_or_else(|| Self::public(provider)))
    }

    /// Reads a setting; `None` if it is blank.
    pub fn parse(provider: ProviderType, text: &str) -> Result<Option<Self>, HostError> {
        let text = address::unwrapped(text);
        if text.is_empty() {
            return Ok(None);
        }
        if text.contains(char::is_control) {
            return Err(HostError::Host);
        }
        let is_azure = provider == ProviderType::AzureDevops;
        let first = text.split('/').next().unwrap_or_default();
        let is_organisation = is_azure && !address::is_address(text) && !first.contains('.') && first != "localhost";
        let address = if is_organisation { address::parse(&format!("{AZURE}/{text}"))? } else { address::parse(text)? };
        if address.had_password {
            return Err(HostError::Password);
        }
        // `https:x` with a mistyped scheme looks like a host and a path of SSH. It is one only if the name contains a dot.
        if address.is_short && !address.authority.contains('.') {
            return Err(HostError::Scheme);
        }
        let is_ssh = address.scheme == Some(Scheme::Ssh);
        let located = Located::of(&address);
        let is_public = public_provider(&located.authority).is_some();
        let is_insecure = address.scheme == Some(Scheme::Http) && !is_public;
        let path = match provider {
            ProviderType::AzureDevops => {
                let end = located.path.iter().position(|segment| segment.starts_with('_'));
                let mut path = located.path[..end.unwrap_or(located.path.len())].to_vec();
                if is_public {
                    path.truncate(2);
                }
                path
            }
            // The path of an SSH address is only the repository's.
            _ if is_public || is_ssh => Vec::new(),
            _ => folder(provider, &located.path)?,
        };
        if path.iter().any(|segment| is_odd(segment)) {
            return Err(HostError::Host);
        }
        Ok(Some(Self { is_insecure, authority: located.authority, path }))
    }

    /// `https://host:port`
    pub fn origin(&self) -> String {
        format!("{}{}", self.scheme(), self.authority)
    }

    pub fn scheme(&self) -> &'static str {
        if self.is_insecure { "http://" } else { "https://" }
    }

    /// The stored and shown form: the scheme is present only if it is not https.
    pub fn shown(&self, provider: ProviderType) -> String {
        // A single word would be read as an organisation of Azure DevOps.
        let is_word = provider == ProviderType::AzureDevops && !self.authority.contains(['.', ':']);
        let scheme = if self.is_insecure || is_word { self.scheme() } else { "" };
        let mut parts = vec![self.authority.clone()];
        parts.extend(self.path.iter().map(|segment| encoded(segment)));
        format!("{scheme}{}", parts.join("/"))
    }

    pub fn is_public_azure(&self) -> bool {
        self.authority == AZURE
    }
}

/// An address whose host is that of git over HTTPS, in place of the host of an API, a mirror or SSH.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Located {
    pub authority: String,
    pub path: Vec<String>,
}

impl Located {
    pub fn of(address: &Address) -> Self {
        let (authority, mut path) = (address.authority.as_str(), address.path.clone());
        let is_azure_ssh = matches!(authority, "ssh.dev.azure.com" | "vs-ssh.visualstudio.com");
        let known = match authority {
            "www.github.com" | "api.github.com" | "ssh.github.com" | "github.dev" | "raw.githubusercontent.com" => {
                "github.com"
            }
            "www.gitlab.com" | "altssh.gitlab.com" => "gitlab.com",
            "www.bitbucket.org" | "api.bitbucket.org" | "altssh.bitbucket.org" => "bitbucket.org",
            "www.codeberg.org" => "codeberg.org",
            _ if is_azure_ssh => AZURE,
            other => other,
        };
        // Raw files: `owner/name/refs/heads/branch/path`.
        if authority == "raw.githubusercontent.com" && path.len() > 2 {
            path.insert(2, "raw".to_owned());
        }
        if is_azure_ssh && path.first().is_some_and(|version| version == "v3") {
            path.remove(0);
        }
        // The older addresses of Azure DevOps have the organisation in the host.
        if let Some(organisation) = known.strip_suffix(".visualstudio.com").filter(|name| !name.contains('.')) {
            path.retain(|segment| !segment.eq_ignore_ascii_case("DefaultCollection"));
            path.insert(0, organisation.to_owned());
            return Self { authority: AZURE.to_owned(), path };
        }
        // GitHub's hosts of single enterprises.
        let known = known.strip_prefix("api.").filter(|host| host.ends_with(".ghe.com")).unwrap_or(known);
        Self { authority: known.to_owned(), path }
    }
}

/// Returns the provider of a public host.
pub(super) fn public_provider(authority: &str) -> Option<ProviderType> {
    let public = [
        ProviderType::Github,
        ProviderType::Gitlab,
        ProviderType::Bitbucket,
        ProviderType::Forgejo,
        ProviderType::AzureDevops,
    ];
    public.into_iter().find(|provider| GitHost::public(*provider).authority == authority)
}

/// Whether the first segment of a path is a page of the provider, which no owner can have as a name.
pub(super) fn is_page(provider: ProviderType, word: &str) -> bool {
    let pages: &[&str] = match provider {
        ProviderType::Github | ProviderType::EnterpriseSso => &[
            "about",
            "account",
            "apps",
            "codespaces",
            "collections",
            "dashboard",
            "enterprises",
            "explore",
            "features",
            "issues",
            "join",
            "login",
            "logout",
            "marketplace",
            "new",
            "notifications",
            "organizations",
            "orgs",
            "pulls",
            "search",
            "sessions",
            "settings",
            "setup",
            "signup",
            "site",
            "sponsors",
            "stafftools",
            "stars",
            "topics",
            "trending",
            "users",
        ],
        ProviderType::Gitlab => &[
            "admin",
            "assets",
            "dashboard",
            "explore",
            "files",
            "groups",
            "help",
            "import",
            "jwt",
            "login",
            "oauth",
            "profile",
            "public",
            "search",
            "snippets",
            "unsubscribes",
            "uploads",
            "users",
        ],
        ProviderType::Forgejo => &[
            "admin",
            "assets",
            "attachments",
            "avatars",
            "captcha",
            "explore",
            "issues",
            "login",
            "milestones",
            "notifications",
            "org",
            "pulls",
            "stars",
            "swagger",
            "user",
        ],
        ProviderType::Bitbucket => &["account", "dashboard", "product", "repo", "site", "socialauth", "support"],
        ProviderType::BitbucketDataCenter => &[
            "account",
            "admin",
            "dashboard",
            "getting-started",
            "login",
            "logout",
            "mvc",
            "plugins",
            "profile",
            "projects",
            "repos",
            "scm",
            "users",
        ],
        ProviderType::AzureDevops => &[],
    };
    pages.contains(&word.to_ascii_lowercase().as_str())
}

/// The folder below which the provider is: the path without the API's part of it, without pages of the web UI and repositories.
fn folder(provider: ProviderType, path: &[String]) -> Result<Vec<String>, HostError> {
    let at = |index: usize| path.get(index).map(|segment| segment.to_ascii_lowercase()).unwrap_or_default();
    let is_marker = |index: usize| {
        let (this, next) = (at(index), at(index + 1));
        let is_version = next.strip_prefix('v').is_some_and(|version| version.parse::<u8>().is_ok());
        match this.as_str() {
            "-" => true,
            "api" => is_version || matches!(next.as_str(), "" | "graphql" | "swagger"),
            "rest" => next == "api",
            "2.0" => provider == ProviderType::Bitbucket,
            "repo" => provider == ProviderType::Forgejo && matches!(next.as_str(), "create" | "migrate"),
            "projects" if provider == ProviderType::Gitlab => next == "new",
            _ => is_page(provider, &this),
        }
    };
    // Pages of repositories, below owner and name.
    let is_repository_page = |index: usize| {
        let names = [
            "-",
            "src",
            "tree",
            "blob",
            "raw",
            "blame",
            "commit",
            "commits",
            "branches",
            "branch",
            "tags",
            "releases",
            "issues",
            "pull",
            "pulls",
            "pull-requests",
            "merge_requests",
            "wiki",
            "actions",
        ];
        index >= 2 && names.contains(&at(index).as_str())
    };
    let end = (0..path.len()).find(|index| is_marker(*index) || is_repository_page(*index));
    let is_project_page = end.is_some_and(is_repository_page);
    let folder = &path[..end.unwrap_or(path.len())];
    let is_repository =
        folder.last().is_some_and(|last| last.to_ascii_lowercase().ends_with(".git")) || is_project_page;
    let has_no_folder =
        matches!(provider, ProviderType::Github | ProviderType::EnterpriseSso | ProviderType::Bitbucket);
    match folder.len() {
        // With more parts, the group is ambiguous.
        2 if is_repository => Ok(Vec::new()),
        // The page of a repository. These providers have a host of their own, and at most a proxy's folder.
        2.. if has_no_folder => Ok(Vec::new()),
        length if is_repository && provider != ProviderType::Gitlab && length > 2 => Ok(folder[..length - 2].to_vec()),
        _ if is_repository => Err(HostError::Repository),
        _ => Ok(folder.to_vec()),
    }
}

fn is_odd(segment: &str) -> bool {
    let odd = |c: char| c.is_control() || address::is_invisible(c) || matches!(c, '/' | '\\' | '@' | ':' | '%');
    matches!(segment, "." | "..") || segment.contains(odd)
}

#[cfg(test)]
mod tests {
    use ProviderType::{AzureDevops, Bitbucket, BitbucketDataCenter, EnterpriseSso, Forgejo, Github, Gitlab};

    use super::*;

    #[test]
    fn hosts_are_read_in_the_forms_that_people_paste() {
        for (provider, text, host) in [
            (Github, "", None),
            (Github, " \u{feff}\t", None),
            (Github, "github.com", Some("github.com")),
            (Github, " HTTPS://GitHub.com/ ", Some("github.com")),
            (Github, "http://github.com", Some("github.com")),
            (Github, "https://api.github.com", Some("github.com")),
            (Github, "https://api.github.com/graphql", Some("github.com")),
            (Github, "www.github.com", Some("github.com")),
            (Github, "https://github.com/o/r", Some("github.com")),
            (Github, "git@github.com:o/r.git", Some("github.com")),
            (Github, "https://ghe.example/api/v3", Some("ghe.example")),
            (Github, "https://ghe.example/api/v3/", Some("ghe.example")),
            (Github, "https://ghe.example/api/graphql", Some("ghe.example")),
            (Github, "ghe.example/API/v3/user", Some("ghe.example")),
            (Github, "https://ghe.example/o/r.git", Some("ghe.example")),
            (Github, "https://ghe.example/o/r", Some("ghe.example")),
            (Github, "https://ghe.example/o/r/tree/main", Some("ghe.example")),
            (Github, "https://proxy.example/ghe", Some("proxy.example/ghe")),
            (Github, "https://proxy.example/ghe/api/v3", Some("proxy.example/ghe")),
            (Github, "https://ghe.example:8443//", Some("ghe.example:8443")),
            (Github, "https://ghe.example:443", Some("ghe.example")),
            (Github, "http://127.0.0.1:3482/api/v3", Some("http://127.0.0.1:3482")),
            (Github, "https://me@ghe.example", Some("ghe.example")),
            (Github, "https://ghe.example?x=1#y", Some("ghe.example")),
            (Github, "'https://ghe.example'", Some("ghe.example")),
            (Github, "https://api.corp.ghe.com", Some("corp.ghe.com")),
            (EnterpriseSso, "https://ghe.example/api/v3", Some("ghe.example")),
            (Gitlab, "https://gitlab.example/gitlab", Some("gitlab.example/gitlab")),
            (Gitlab, "https://gitlab.example/gitlab/api/v4/", Some("gitlab.example/gitlab")),
            (Gitlab, "https://gitlab.example/api/v4/projects", Some("gitlab.example")),
            (Gitlab, "https://gitlab.example/a/api/graphql", Some("gitlab.example/a")),
            (Gitlab, "https://gitlab.example/users/sign_in", Some("gitlab.example")),
            (Gitlab, "https://gitlab.example/-/profile", Some("gitlab.example")),
            (Gitlab, "https://gitlab.example/gitlab/-/profile", Some("gitlab.example/gitlab")),
            (Gitlab, "https://gitlab.example/group/name/-/tree/main", Some("gitlab.example")),
            (Gitlab, "https://gitlab.example/group/name.git", Some("gitlab.example")),
            (Gitlab, "https://gitlab.com/group/sub/name.git", Some("gitlab.com")),
            (Gitlab, "ssh://git@gitlab.example:2222/group/sub/name.git", Some("gitlab.example")),
            (Gitlab, "http://[::1]:8080/gitlab/", Some("http://[::1]:8080/gitlab")),
            (Gitlab, "gitlab", Some("gitlab")),
            (Forgejo, "https://codeberg.org/api/v1", Some("codeberg.org")),
            (Forgejo, "https://forge.example/git/api/v1", Some("forge.example/git")),
            (Forgejo, "https://forge.example/git/owner/name.git", Some("forge.example/git")),
            (Forgejo, "https://example.org/tools/forge/api/v1", Some("example.org/tools/forge")),
            (Forgejo, "https://example.org/tools/forge", Some("example.org/tools/forge")),
            (Forgejo, "https://forge.example/user/login", Some("forge.example")),
            (Bitbucket, "https://bitbucket.org/workspace", Some("bitbucket.org")),
            (Bitbucket, "https://api.bitbucket.org/2.0", Some("bitbucket.org")),
            (Bitbucket, "http://bb.example/2.0/user", Some("http://bb.example")),
            (BitbucketDataCenter, "https://bb.example/rest/api/1.0", Some("bb.example")),
            (BitbucketDataCenter, "https://bb.example/context/rest/api/1.0", Some("bb.example/context")),
            (BitbucketDataCenter, "https://bb.example/context/scm/prj/r.git", Some("bb.example/context")),
            (BitbucketDataCenter, "https://bb.example/projects/PRJ/repos/r/browse", Some("bb.example")),
            (Github, "https:/ghe.example", Some("ghe.example")),
            // Host names have no such characters: the standard leaves them out.
            (Github, "ghe\u{200b}.example", Some("ghe.example")),
            (Github, "https//ghe.example/api/v3", Some("ghe.example")),
            (Github, "http:127.0.0.1:3482", Some("http://127.0.0.1:3482")),
            (Github, "https:ghe.example/o/r", Some("ghe.example")),
            (Github, "https://ghe.example/login", Some("ghe.example")),
            (Github, "https://ghe.example/login?return_to=%2F", Some("ghe.example")),
            (Github, "https://ghe.example/orgs/o/repositories", Some("ghe.example")),
            (Github, "https://proxy.example/ghe/settings/tokens", Some("proxy.example/ghe")),
            (Gitlab, "https://gitlab.example/explore", Some("gitlab.example")),
            (Gitlab, "https://gitlab.example/dashboard/projects", Some("gitlab.example")),
            (Gitlab, "https://gitlab.example/groups/g", Some("gitlab.example")),
            (Gitlab, "https://gitlab.example/groups/g/-/settings", Some("gitlab.example")),
            (Gitlab, "https://gitlab.example/profile/personal_access_tokens", Some("gitlab.example")),
            (Gitlab, "https://gitlab.example/gitlab/help", Some("gitlab.example/gitlab")),
            (Gitlab, "https://gitlab.example/g/r/tree/main", Some("gitlab.example")),
            (Gitlab, "https://gitlab.example/projects/new", Some("gitlab.example")),
            (Forgejo, "https://forge.example/explore/repos", Some("forge.example")),
            (Forgejo, "https://forge.example/api/swagger", Some("forge.example")),
            (Forgejo, "https://forge.example/o/r/src/branch/main", Some("forge.example")),
            (Forgejo, "https://forge.example/git/o/r/src/branch/main/a/b", Some("forge.example/git")),
            (Forgejo, "https://forge.example/git/user/settings/applications", Some("forge.example/git")),
            (Forgejo, "https://forge.example/repo/create", Some("forge.example")),
            (BitbucketDataCenter, "https://bb.example/login", Some("bb.example")),
            (BitbucketDataCenter, "https://bb.example/account", Some("bb.example")),
            (BitbucketDataCenter, "https://bb.example/context/profile", Some("bb.example/context")),
            (BitbucketDataCenter, "https://bb.example/repos?visibility=public", Some("bb.example")),
            (BitbucketDataCenter, "https://bb.example/plugins/servlet/access-tokens/manage", Some("bb.example")),
            (AzureDevops, "contoso", Some("dev.azure.com/contoso")),
            (AzureDevops, "contoso/My Project", Some("dev.azure.com/contoso/My%20Project")),
            (AzureDevops, "dev.azure.com", Some("dev.azure.com")),
            (AzureDevops, "dev.azure.com/contoso/", Some("dev.azure.com/contoso")),
            (AzureDevops, "https://contoso@dev.azure.com/contoso/p/_git/r", Some("dev.azure.com/contoso/p")),
            (AzureDevops, "https://dev.azure.com/contoso/_apis/projects", Some("dev.azure.com/contoso")),
            (AzureDevops, "https://dev.azure.com/contoso/My%20Project", Some("dev.azure.com/contoso/My%20Project")),
            (AzureDevops, "https://contoso.visualstudio.com/DefaultCollection", Some("dev.azure.com/contoso")),
            (AzureDevops, "contoso.visualstudio.com/p", Some("dev.azure.com/contoso/p")),
            (AzureDevops, "git@ssh.dev.azure.com:v3/contoso/p/r", Some("dev.azure.com/contoso/p")),
            (
                AzureDevops,
                "https://tfs.example:8080/tfs/DefaultCollection",
                Some("tfs.example:8080/tfs/DefaultCollection"),
            ),
            (AzureDevops, "https://tfs", Some("https://tfs")),
            (AzureDevops, "https://tfs/tfs/Main/p/_git/r", Some("https://tfs/tfs/Main/p")),
        ] {
            let found = normal_host(provider, text);
            assert_eq!(found, Ok(host.map(ToOwned::to_owned)), "{provider} {text}");
            // What is stored is read as the same again.
            if let Some(host) = host {
                assert_eq!(normal_host(provider, host), Ok(Some(host.to_owned())), "{provider} {host}");
            }
        }
    }

    #[test]
    fn what_cannot_be_a_host_is_refused() {
        for (provider, text, error) in [
            (Github, "https://user:tok@ghe.example", HostError::Password),
            (Github, "user:tok@ghe.example", HostError::Password),
            (Gitlab, "https://oauth2:p/w@gitlab.example/gitlab", HostError::Password),
            (Github, "ftp://ghe.example", HostError::Scheme),
            (Gitlab, "file:///srv/git", HostError::Scheme),
            (Github, "a host", HostError::Host),
            (Github, "https://", HostError::Host),
            (Github, "ghe\n.example", HostError::Host),
            (Gitlab, "https://gitlab.example:99999", HostError::Host),
            (Gitlab, "https://gitlab.example/%2e%2e/x", HostError::Host),
            (Gitlab, "https://gitlab.example/group/sub/name.git", HostError::Repository),
            (Gitlab, "https://gitlab.example/group/sub/name/-/tree/main", HostError::Repository),
            (Gitlab, "https://gitlab.example/g/s/r/tree/main", HostError::Repository),
            (AzureDevops, "conto\\so", HostError::Host),
            (Github, "https://user:12/canary@ghe.example", HostError::Password),
            (Github, "https:/u:canary@ghe.example", HostError::Password),
            (Github, "https//u:canary@ghe.example", HostError::Password),
            (Github, "u%3Acanary%40ghe.example", HostError::Password),
            (Gitlab, "https://ghe.example/canary@x", HostError::Host),
            (Gitlab, "https://ghe.example/u%253Acanary%2540x", HostError::Host),
            (Github, "https/ghe.example", HostError::Host),
            (Github, "htps:/ghe.example", HostError::Scheme),
            (Github, "htps:ghe.example", HostError::Scheme),
            (Gitlab, "htps://gitlab.example", HostError::Scheme),
            (Gitlab, "gitlab.example/git\u{202e}lab", HostError::Host),
        ] {
            assert_eq!(normal_host(provider, text), Err(error), "{text}");
        }
    }
}
