//! Repositories in the forms in which users paste them: `owner/name`, addresses for git and addresses of web pages.

use super::address::{self, Address, AddressError, Scheme};
use super::branch::normal_branch;
use super::host::{GitHost, Located, is_page, public_provider};
use crate::http::pydantic::validation::Checker;
use crate::user::git::ProviderType;
use crate::user::settings::{ProviderToken, ProviderTokens};

/// A repository in its normal form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repository {
    /// `owner/name`, with more parts at GitLab and Azure DevOps.
    pub name: String,
    /// The provider that the request names, or that of the address.
    pub provider: Option<ProviderType>,
    /// The branch in the address.
    branch: AddressBranch,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum AddressBranch {
    None,
    Named(String),
    /// The address has a branch, but the end of its name is ambiguous.
    Unclear,
}

/// Why a text is not a repository of the named provider.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RepositoryError {
    /// The name has too few parts, or too many for its provider.
    #[error("a repository must be written as owner/name")]
    Form,
    /// The same for Azure DevOps.
    #[error(
        "a repository of Azure DevOps must be written as organisation/project/name, or as project/name if the host in the settings has the organisation"
    )]
    AzureForm,
    /// The name contains a character that no provider, or not this provider, allows in names.
    #[error("contains an invalid character")]
    Character,
    /// A branch, tag or commit follows the name.
    #[error("send the branch as selected_branch, and the repository without `@` and `#`")]
    Revision,
    /// The address has another protocol.
    #[error("repositories are cloned over https; send owner/name, or an https or ssh address")]
    Scheme,
    /// The address has no valid host.
    #[error("the host of this address is not valid")]
    Host,
    /// No provider has the host of the address.
    #[error(
        "none of your git providers has the host {0}; set it as a provider's host in the settings, or send owner/name"
    )]
    UnknownHost(String),
    /// The named provider has another host.
    #[error("the address has the host {1}, which does not belong to git_provider {0}")]
    OtherHost(ProviderType, String),
    /// The address has a branch, or a branch and a path, and where the branch ends is ambiguous.
    #[error("the end of the branch in this address is ambiguous; send the branch as selected_branch")]
    UnclearBranch,
}

/// The repository, branch and provider of a request in their normal forms.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    pub repository: Option<String>,
    pub branch: Option<String>,
    pub provider: Option<ProviderType>,
}

impl Selection {
    /// Reads the repository, branch and provider of a request; blank texts count as absent. Violations are reported at `place` for
    /// the repository and at `selected_branch`; none contains a credential.
    pub fn read(
        check: &mut Checker,
        place: &[&'static str],
        (repository, branch, provider): (Option<&str>, Option<&str>, Option<ProviderType>),
        tokens: &ProviderTokens,
    ) -> Option<Self> {
        let text = repository.filter(|text| !text.trim().is_empty());
        let read_branch = branch.map_or(Ok(None), normal_branch);
        // `HEAD` is not a name, but takes precedence over the branch of an address.
        let is_given = branch.is_some_and(|branch| !address::unwrapped(branch).is_empty());
        let read = text.map(|text| Repository::read(text, provider, tokens)).transpose().and_then(|read| {
            let Some(read) = read else { return Ok((None, provider, None)) };
            let of_address = match read.branch {
                AddressBranch::None => None,
                _ if is_given => None,
                AddressBranch::Unclear => return Err(RepositoryError::UnclearBranch),
                AddressBranch::Named(name) => normal_branch(&name).map_err(|_| RepositoryError::UnclearBranch)?,
            };
            Ok((Some(read.name), read.provider, of_address))
        });
        // Violations are reported in the order of the fields.
        if let Err(error) = &read {
            report_at(check, place, &error.to_string(), text.unwrap_or_default());
        }
        if let Err(error) = &read_branch {
            let text = branch.unwrap_or_default();
            check.within("selected_branch", |check| check.report_value_error(error, text.into()));
        }
        let (repository, provider, of_address) = read.ok()?;
        Some(Self { repository, branch: read_branch.ok()?.or(of_address), provider })
    }
}

/// Reports an invalid repository.
pub(crate) fn report_at(check: &mut Checker, place: &[&'static str], error: &str, text: &str) {
    match place {
        [] => check.report_value_error(error, address::without_credentials(text).into()),
        [step, rest @ ..] => check.within(*step, |check| report_at(check, rest, error, text)),
    }
}

impl Repository {
    /// Reads a repository. `named` is the provider that the request names, if any.
    ///
    /// # Errors
    /// When the text does not identify a repository. No error contains a credential.
    pub fn read(text: &str, named: Option<ProviderType>, tokens: &ProviderTokens) -> Result<Self, RepositoryError> {
        let text = address::unwrapped(text);
        let text = text.strip_prefix("git clone ").map_or(text, address::unwrapped);
        if text.contains(char::is_control) {
            return Err(RepositoryError::Character);
        }
        if let Some((provider, name)) = shorthand(text) {
            return match named {
                Some(named) if named != provider => {
                    Err(RepositoryError::OtherHost(named, GitHost::public(provider).authority))
                }
                _ => from_name(name, Some(provider), tokens),
            };
        }
        if address::is_address(text) || begins_with_host(text, named, tokens) {
            let address = address::parse(text).map_err(|error| match error {
                AddressError::Scheme => RepositoryError::Scheme,
                AddressError::Host => RepositoryError::Host,
            })?;
            return from_address(&address, named, tokens);
        }
        from_name(text, named, tokens)
    }
}

/// `github:owner/name`, as package managers write it.
fn shorthand(text: &str) -> Option<(ProviderType, &str)> {
    let (word, name) = text.split_once(':')?;
    let provider = match word.to_ascii_lowercase().as_str() {
        "github" | "gh" => ProviderType::Github,
        "gitlab" => ProviderType::Gitlab,
        "bitbucket" => ProviderType::Bitbucket,
        _ => return None,
    };
    (!name.starts_with("//")).then_some((provider, name))
}

/// Whether the text is an address without its scheme, as browsers show it. A host of one word needs its scheme, because groups can have
/// the same name.
fn begins_with_host(text: &str, named: Option<ProviderType>, tokens: &ProviderTokens) -> bool {
    let Ok(address) = address::parse(text) else { return false };
    let located = Located::of(&address);
    let is_known = public_provider(&located.authority).is_some()
        || hosts(named, tokens).iter().any(|(_, host)| host.authority == located.authority);
    is_known && address.authority.contains('.')
}

/// The hosts that a repository can have: that of the named provider, or those of the settings and the public ones of other providers.
fn hosts(named: Option<ProviderType>, tokens: &ProviderTokens) -> Vec<(ProviderType, GitHost)> {
    let of = |provider| setting(provider, tokens).and_then(|token| token.host.as_deref());
    // Bitbucket Data Center has no public host: bitbucket.org belongs to Bitbucket Cloud.
    let is_elsewhere = |provider, host: &GitHost| {
        provider == ProviderType::BitbucketDataCenter && public_provider(&host.authority).is_some()
    };
    let host = |provider| {
        let host = GitHost::of(provider, of(provider)).ok()?;
        (!is_elsewhere(provider, &host)).then_some((provider, host))
    };
    if let Some(named) = named {
        return host(named).into_iter().collect();
    }
    let stored = tokens.0.iter().map(|(provider, _)| *provider);
    let others = [
        ProviderType::Github,
        ProviderType::Gitlab,
        ProviderType::Bitbucket,
        ProviderType::Forgejo,
        ProviderType::AzureDevops,
    ];
    stored.chain(others.into_iter().filter(|other| setting(*other, tokens).is_none())).filter_map(host).collect()
}

pub(super) fn setting(provider: ProviderType, tokens: &ProviderTokens) -> Option<&ProviderToken> {
    tokens.0.iter().find(|(stored, _)| *stored == provider).map(|(_, token)| token)
}

fn from_address(
    address: &Address,
    named: Option<ProviderType>,
    tokens: &ProviderTokens,
) -> Result<Repository, RepositoryError> {
    let located = Located::of(address);
    let is_ssh = address.scheme == Some(Scheme::Ssh);
    let matches = |host: &GitHost| {
        // The port of SSH is not that of the web server.
        let authority = if is_ssh { without_port(&host.authority) } else { &host.authority };
        authority == located.authority && (is_ssh || host.is_public_azure() || starts_with(&located.path, &host.path))
    };
    let Some((provider, host)) = hosts(named, tokens).into_iter().find(|(_, host)| matches(host)) else {
        return Err(match named {
            Some(named) => RepositoryError::OtherHost(named, located.authority),
            None => RepositoryError::UnknownHost(located.authority),
        });
    };
    let rest = match starts_with(&located.path, &host.path) {
        true if provider != ProviderType::AzureDevops => &located.path[host.path.len()..],
        _ => &located.path[..],
    };
    // A whole project of GitLab's API is one segment.
    let parts: Vec<&str> = rest.iter().flat_map(|segment| segment.split('/')).filter(|part| !part.is_empty()).collect();
    let (mut parts, branch) = match provider {
        ProviderType::Gitlab => of_gitlab(&parts),
        ProviderType::BitbucketDataCenter => of_data_center(&parts, address),
        ProviderType::AzureDevops => of_azure(&parts, address, &host),
        _ => of_owner_and_name(provider, &parts),
    }
    .ok_or(RepositoryError::Form)?;
    let name = parts.pop().unwrap_or_default();
    parts.push(without_git(&name).to_owned());
    let name = parts.join("/");
    check(&name, Some(provider), tokens)?;
    let branch = match (branch, &address.revision) {
        (AddressBranch::None, Some(revision)) => AddressBranch::Named(revision.clone()),
        (branch, _) => branch,
    };
    Ok(Repository { name, provider: Some(provider), branch })
}

fn without_port(authority: &str) -> &str {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => host,
        _ => authority,
    }
}

fn starts_with(path: &[String], folder: &[String]) -> bool {
    path.len() >= folder.len() && path.iter().zip(folder).all(|(one, other)| one.eq_ignore_ascii_case(other))
}

type Found = Option<(Vec<String>, AddressBranch)>;

fn owned(parts: &[&str]) -> Vec<String> {
    parts.iter().map(|part| (*part).to_owned()).collect()
}

fn without_git(name: &str) -> &str {
    match name.len().checked_sub(4).and_then(|at| Some((name.get(..at)?, name.get(at..)?))) {
        // No provider allows names with these endings.
        Some((name, end)) if end.eq_ignore_ascii_case(".git") => without_git(name),
        _ => name,
    }
}

/// Reads the path of an address of GitHub, Forgejo or Bitbucket Cloud.
fn of_owner_and_name(provider: ProviderType, parts: &[&str]) -> Found {
    let parts = match parts {
        ["api", _, "repos", rest @ ..] | ["2.0", "repositories", rest @ ..] => rest,
        ["repos", rest @ ..] if rest.len() >= 2 && provider == ProviderType::Github => rest,
        parts => parts,
    };
    let [owner, name, rest @ ..] = parts else { return None };
    if is_page(provider, owner) {
        return None;
    }
    let least = usize::from(rest.first().is_some_and(|page| matches!(*page, "raw" | "media")));
    let branch = match (provider, rest) {
        (ProviderType::Forgejo, ["src" | "raw" | "media" | "commits", kind, rest @ ..]) => match *kind {
            "branch" => branch_before(rest, least),
            "tag" => tag_before(rest, least),
            "commit" => branch_before(rest.get(..1).unwrap_or_default(), 0),
            _ => of_page(rest),
        },
        (ProviderType::Bitbucket, ["src", rest @ ..]) => branch_before(rest, 0),
        (ProviderType::Bitbucket, ["commits", "tag", rest @ ..]) => tag_before(rest, 0),
        (ProviderType::Bitbucket, ["branch" | "commits", rest @ ..]) if !rest.is_empty() => {
            AddressBranch::Named(rest.join("/"))
        }
        (_, rest) => of_page(rest),
    };
    Some((vec![(*owner).to_owned(), (*name).to_owned()], branch))
}

/// Reads the branch, tag or commit from the path of a page of files, commits, one file or a release.
fn of_page(rest: &[&str]) -> AddressBranch {
    match rest {
        ["tree" | "commits", rest @ ..] => branch_before(rest, 0),
        ["blob" | "raw" | "blame" | "edit", rest @ ..] => branch_before(rest, 1),
        ["releases", "tag", rest @ ..] | ["tags", rest @ ..] => tag_before(rest, 0),
        ["releases", "download", rest @ ..] => tag_before(rest, 1),
        // A page of GitLab.
        ["releases", rest @ ..] if !matches!(rest, ["latest" | "new" | "permalink", ..]) => tag_before(rest, 0),
        ["commit", hash, ..] => AddressBranch::Named((*hash).to_owned()),
        _ => AddressBranch::None,
    }
}

/// Reads a branch, or a commit's hash, before a path that has at least so many parts. Both can contain slashes.
fn branch_before(rest: &[&str], least: usize) -> AddressBranch {
    match rest {
        [] | ["HEAD" | "@", ..] => AddressBranch::None,
        ["refs", "tags", rest @ ..] => tag_before(rest, least),
        ["refs", "heads", rest @ ..] => branch_before(rest, least),
        [branch, path @ ..] if path.len() == least => AddressBranch::Named((*branch).to_owned()),
        _ => AddressBranch::Unclear,
    }
}

/// Reads a tag before a path, and returns it in the form that cannot be confused with a branch.
fn tag_before(rest: &[&str], least: usize) -> AddressBranch {
    match branch_before(rest, least) {
        AddressBranch::Named(tag) => AddressBranch::Named(format!("refs/tags/{tag}")),
        other => other,
    }
}

fn of_gitlab(parts: &[&str]) -> Found {
    let parts = match parts {
        ["api", _, "projects", rest @ ..] => rest,
        parts => parts,
    };
    // Projects cannot have these names.
    let names = ["tree", "blob", "raw", "commits", "commit", "tags", "blame", "merge_requests", "issues"];
    let end = parts.iter().position(|part| *part == "-");
    let is_name = |part: &&str| names.contains(part);
    let end = end.or_else(|| Some(2 + parts.get(2..)?.iter().position(is_name)?)).unwrap_or(parts.len());
    if parts.first().is_some_and(|group| is_page(ProviderType::Gitlab, group)) {
        return None;
    }
    let (project, page) = parts.split_at(end);
    let page = page.strip_prefix(&["-"]).unwrap_or(page);
    (project.len() >= 2).then(|| (owned(project), of_page(page)))
}

fn of_data_center(parts: &[&str], address: &Address) -> Found {
    // Below the folder that the server may be in.
    let from = parts.iter().position(|part| matches!(*part, "scm" | "projects" | "users")).unwrap_or(0);
    let name = match &parts[from..] {
        ["scm", project, name, ..] | ["projects", project, "repos", name, ..] | [project, name] => {
            vec![(*project).to_owned(), (*name).to_owned()]
        }
        ["users", user, "repos", name, ..] => vec![format!("~{user}"), (*name).to_owned()],
        _ => return None,
    };
    let at = address.query.iter().find(|(key, _)| key == "at").map(|(_, branch)| branch.as_str());
    let commit = parts.windows(2).skip(from + 4).find_map(|pair| (pair[0] == "commits").then_some(pair[1]));
    let branch = at.or(commit).map(ToOwned::to_owned);
    Some((name, branch.map_or(AddressBranch::None, AddressBranch::Named)))
}

fn of_azure(parts: &[&str], address: &Address, host: &GitHost) -> Found {
    let (before, name) = match parts.iter().position(|part| *part == "_git") {
        Some(at) => (&parts[..at], *parts.get(at + 1)?),
        None => parts.split_last().map(|(name, before)| (before, *name))?,
    };
    let mut path = owned(before);
    // A project's main repository may be given without the project.
    if host.is_public_azure() && path.len() == 1 {
        path.push(name.to_owned());
    }
    path.push(name.to_owned());
    if !host.is_public_azure() && starts_with(&path, &host.path) {
        path.drain(..host.path.len().min(path.len().saturating_sub(2)));
    }
    let version = address.query.iter().find(|(key, _)| key == "version").map(|(_, version)| version.as_str());
    // The first two letters distinguish branches, tags and commits.
    let branch = version.and_then(|version| match version.get(..2)? {
        "GB" | "GC" => Some(version[2..].to_owned()),
        "GT" => Some(format!("refs/tags/{}", &version[2..])),
        _ => None,
    });
    let commit = parts.iter().rposition(|part| *part == "commit").filter(|at| *at > before.len() + 1);
    let commit = commit.and_then(|at| parts.get(at + 1)).map(|hash| (*hash).to_owned());
    Some((path, branch.or(commit).map_or(AddressBranch::None, AddressBranch::Named)))
}

fn from_name(text: &str, named: Option<ProviderType>, tokens: &ProviderTokens) -> Result<Repository, RepositoryError> {
    let name = address::decoded(without_git(text.trim().trim_matches('/').trim()));
    let name = without_azure_marker(&name, named, tokens).unwrap_or(name);
    check(&name, named, tokens)?;
    Ok(Repository { name, provider: named, branch: AddressBranch::None })
}

/// Removes the `_git` that addresses of Azure DevOps have before the last part.
fn without_azure_marker(name: &str, named: Option<ProviderType>, tokens: &ProviderTokens) -> Option<String> {
    let parts: Vec<&str> = name.split('/').collect();
    let [before @ .., "_git", last] = parts.as_slice() else { return None };
    let setting = setting(ProviderType::AzureDevops, tokens);
    if !named.map_or(setting.is_some(), |named| named == ProviderType::AzureDevops) {
        return None;
    }
    let host = GitHost::of(ProviderType::AzureDevops, setting.and_then(|token| token.host.as_deref())).ok()?;
    let mut path = owned(before);
    // As in an address a project's main repository may be given without the project.
    if host.is_public_azure()
        && let [organisation] = before
        && host.path.first().is_none_or(|known| known.eq_ignore_ascii_case(organisation))
    {
        path.push((*last).to_owned());
    }
    path.push((*last).to_owned());
    Some(path.join("/"))
}

/// Checks the name against the rules of the provider, or of those that would be tried.
fn check(name: &str, named: Option<ProviderType>, tokens: &ProviderTokens) -> Result<(), RepositoryError> {
    // Records are read again later: a name must not be read differently then, such as an owner's name that equals a host.
    let is_ambiguous = address::is_address(name)
        || begins_with_host(name, named, tokens)
        || address::unwrapped(name) != name
        || without_git(name) != name;
    let parts: Vec<&str> = name.split('/').collect();
    if is_ambiguous
        || parts.iter().any(|part| part.trim().is_empty() || matches!(*part, "." | "..") || part.starts_with('-'))
    {
        return Err(RepositoryError::Form);
    }
    // `;`, `|`, `$` and the backtick are the contract's, the others are in no provider's names.
    if name.contains('@') {
        return Err(RepositoryError::Revision);
    }
    if name.contains(|c: char| c.is_control() || address::is_invisible(c) || ";|$`\\?#*:<>\"%".contains(c)) {
        return Err(if name.contains('#') { RepositoryError::Revision } else { RepositoryError::Character });
    }
    let candidates = match named {
        Some(provider) => vec![provider],
        None if tokens.0.is_empty() => vec![ProviderType::Github],
        None => tokens.0.iter().map(|(provider, _)| *provider).collect(),
    };
    let mut errors = candidates.into_iter().map(|provider| fits(&parts, provider, tokens));
    let first = errors.next().unwrap_or(Ok(()));
    if first.is_err() && errors.any(|other| other.is_ok()) { Ok(()) } else { first }
}

pub(super) fn fits(parts: &[&str], provider: ProviderType, tokens: &ProviderTokens) -> Result<(), RepositoryError> {
    let odd = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    let is_user = |part: &str| provider == ProviderType::BitbucketDataCenter && part.len() > 1 && part.starts_with('~');
    let is_odd = |(index, part): (usize, &&str)| match index {
        0 if is_user(part) => part[1..].contains(odd),
        _ => part.contains(odd),
    };
    match provider {
        ProviderType::AzureDevops
            if parts.iter().any(|part| part.contains([',', '+', '=', '[', ']', '{', '}']) || part.ends_with('.')) =>
        {
            Err(RepositoryError::Character)
        }
        ProviderType::AzureDevops if parts.iter().any(|part| matches!(*part, "_git" | "_apis")) => {
            Err(RepositoryError::AzureForm)
        }
        ProviderType::AzureDevops => {
            let setting = setting(provider, tokens).and_then(|token| token.host.as_deref());
            // A host that cannot be used has an error of its own: see `clone_sources`.
            let Ok(host) = GitHost::of(provider, setting) else { return Ok(()) };
            azure_path(&host, parts).map(|_| ()).ok_or(RepositoryError::AzureForm)
        }
        _ if parts.iter().enumerate().any(is_odd) || parts.last().is_some_and(|name| name.ends_with('.')) => {
            Err(RepositoryError::Character)
        }
        ProviderType::Gitlab if parts.len() >= 2 => Ok(()),
        _ if parts.len() == 2 => Ok(()),
        _ => Err(RepositoryError::Form),
    }
}

/// Reads organisation or collection, project and name of a repository of Azure DevOps. Both the host and the name can contain the first
/// two.
pub(super) fn azure_path(host: &GitHost, parts: &[&str]) -> Option<Vec<String>> {
    let parts = owned(parts);
    if host.is_public_azure() {
        return match (parts.len(), host.path.first()) {
            (3, _) => Some(parts),
            (2, Some(organisation)) => Some([vec![organisation.clone()], parts].concat()),
            _ => None,
        };
    }
    // Parts that both have are used once.
    let most = host.path.len().min(parts.len().checked_sub(1)?);
    let shared = (0..=most).rev().find(|shared| {
        let end = &host.path[host.path.len() - shared..];
        starts_with(&parts, end) && host.path.len() + parts.len() - shared >= 3
    })?;
    Some([host.path.clone(), parts[shared..].to_vec()].concat())
}
