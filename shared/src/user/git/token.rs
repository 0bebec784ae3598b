//! Tokens in the forms in which users paste them, and the user name that each provider requires with one.

use std::borrow::Cow;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::address;
use crate::user::git::ProviderType;

/// Why a text is not a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// The text contains a line break or another control character.
    #[error("a token must not contain line breaks or other control characters")]
    Control,
    /// The text contains a character that tokens of no provider have, such as an invisible one that was copied with it.
    #[error("a token must contain only ASCII letters, digits and punctuation; copy it again")]
    Character,
    /// The text is an address.
    #[error("send the token by itself, not an address that contains it")]
    Address,
}

/// Names of headers that carry tokens; a colon follows them.
const HEADERS: [&str; 4] = ["authorization", "private-token", "job-token", "deploy-token"];
/// Words before a token that a blank, or a colon and a blank, follows. Without the blank they are the user of `user:token`.
const SCHEMES: [&str; 3] = ["bearer", "token", "basic"];

/// Normalises a token: removes blanks, quotes, the name of a header or variable, `Bearer` or `token` around it. For `Basic` it returns the
/// decoded `user:token`.
///
/// # Errors
/// When the text is not a token. No error contains the text.
pub fn normal_token(text: &str) -> Result<Cow<'_, str>, TokenError> {
    let mut token = Cow::Borrowed(address::unwrapped(text));
    // `Authorization: Basic …` has three layers at most.
    for _ in 0..4 {
        let Some(inner) = inner(&token) else { break };
        token = Cow::Owned(address::unwrapped(&inner).to_owned());
    }
    if token.contains(char::is_control) {
        return Err(TokenError::Control);
    }
    if token.contains("://") {
        return Err(TokenError::Address);
    }
    // Passwords, which come with their user name, may contain any character.
    let is_password = token.contains(':');
    if token.contains(address::is_invisible) || !(is_password || token.is_ascii()) {
        return Err(TokenError::Character);
    }
    Ok(token)
}

/// Removes the outermost layer of a text, if it has one.
fn inner(text: &str) -> Option<String> {
    let some = |text: &str| (!text.trim().is_empty()).then(|| text.trim().to_owned());
    if let Some((name, value)) = text.split_once('=').filter(|(name, _)| is_variable(name)) {
        // Padding at the end of a token is not a value.
        return some(value).filter(|_| !name.is_empty() && !value.trim_matches('=').is_empty());
    }
    let word_end = text.find([':', ' ', '\t'])?;
    let (word, rest) = text.split_at(word_end);
    let (word, has_colon) = (word.to_ascii_lowercase(), rest.starts_with(':'));
    let value = rest.trim_start_matches(':');
    if has_colon && HEADERS.contains(&word.as_str()) {
        return some(value);
    }
    let is_scheme = SCHEMES.contains(&word.as_str()) && value.starts_with([' ', '\t']);
    // One word follows.
    let value = some(value).filter(|value| is_scheme && !value.contains(char::is_whitespace))?;
    match word.as_str() {
        "basic" => STANDARD
            .decode(&value)
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .filter(|pair| pair.contains(':')),
        _ => Some(value),
    }
}

/// Whether the text is the name of a variable that contains a token, as set in a shell.
fn is_variable(text: &str) -> bool {
    let lower = text.trim().to_ascii_lowercase();
    let name = ["export ", "set ", "$env:"].iter().find_map(|word| lower.strip_prefix(word)).unwrap_or(&lower).trim();
    !name.is_empty()
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && ["token", "pat", "key", "secret", "password"].iter().any(|end| name.ends_with(end))
}

/// Returns the user name and password with which git uses the token. The name of a token that came as `user:token` is kept.
pub(super) fn user_and_password<'t>(
    provider: ProviderType,
    token: &'t str,
    organisation: &'t str,
) -> (&'t str, &'t str) {
    // None of the providers' tokens has a colon.
    let (given, password) = match token.split_once(':') {
        // The form of curl, of GitHub's documentation for OAuth, and of Azure DevOps' documentation.
        Some((token, "" | "x-oauth-basic") | ("", token)) => (None, token),
        Some((user, token)) => (Some(user), token),
        None => (None, token),
    };
    let user = match (provider, given) {
        // git at Bitbucket Cloud identifies users by name, the API by e-mail address; this name is valid with API tokens of every user.
        (ProviderType::Bitbucket, Some(user)) if user.contains('@') => "x-bitbucket-api-token-auth",
        (_, Some(user)) => user,
        (ProviderType::Bitbucket, None) if password.starts_with("ATATT") => "x-bitbucket-api-token-auth",
        (ProviderType::Bitbucket | ProviderType::BitbucketDataCenter, None) => "x-token-auth",
        (ProviderType::Gitlab, None) if password.starts_with("glcbt-") => "gitlab-ci-token",
        (ProviderType::Gitlab, None) => "oauth2",
        (ProviderType::AzureDevops, None) if !organisation.is_empty() => organisation,
        // These providers accept the token as the password of any user name.
        _ => "x-access-token",
    };
    (user, password)
}

#[cfg(test)]
mod tests {
    use ProviderType::{AzureDevops, Bitbucket, BitbucketDataCenter, Forgejo, Github, Gitlab};

    use super::*;

    #[test]
    fn tokens_are_read_in_the_forms_that_people_paste() {
        for (text, token) in [
            ("ghp_1", Ok("ghp_1")),
            (" ghp_1\r\n", Ok("ghp_1")),
            ("\"ghp_1\"", Ok("ghp_1")),
            ("' ghp_1 '", Ok("ghp_1")),
            ("Bearer ghp_1", Ok("ghp_1")),
            ("BEARER  ghp_1", Ok("ghp_1")),
            ("token ghp_1", Ok("ghp_1")),
            ("Authorization: Bearer ghp_1", Ok("ghp_1")),
            ("PRIVATE-TOKEN: glpat-1", Ok("glpat-1")),
            ("\u{feff}ghp_1", Ok("ghp_1")),
            ("user:pass word", Ok("user:pass word")),
            ("a token", Ok("a token")),
            ("token", Ok("token")),
            ("token of somebody", Ok("token of somebody")),
            ("é", Err(TokenError::Character)),
            ("user:pässword", Ok("user:pässword")),
            ("ghp\u{200b}_1", Err(TokenError::Character)),
            ("ghp_\u{a0}1", Err(TokenError::Character)),
            ("me:ghp_\u{202e}1", Err(TokenError::Character)),
            ("\u{200b}ghp_1\u{2060}", Ok("ghp_1")),
            ("Authorization: Basic dTpw", Ok("u:p")),
            ("authorization: basic bWU6Z2hwXzE=", Ok("me:ghp_1")),
            ("Basic dTpw", Ok("u:p")),
            ("Basic token", Ok("Basic token")),
            ("\"Authorization: Bearer ghp_1\"", Ok("ghp_1")),
            ("Authorization: token ghp_1", Ok("ghp_1")),
            ("GITHUB_TOKEN=ghp_1", Ok("ghp_1")),
            ("export GITHUB_TOKEN=ghp_1", Ok("ghp_1")),
            ("export GITHUB_TOKEN=\"ghp_1\"", Ok("ghp_1")),
            ("$env:GH_TOKEN = 'ghp_1'", Ok("ghp_1")),
            ("GITLAB_PAT=glpat-1==", Ok("glpat-1==")),
            ("access_token=ghp_1", Ok("ghp_1")),
            ("bXl0b2tlbg==", Ok("bXl0b2tlbg==")),
            ("token==", Ok("token==")),
            ("user:to=ken", Ok("user:to=ken")),
            ("token: ghp_1", Ok("ghp_1")),
            ("Bearer: ghp_1", Ok("ghp_1")),
            ("Job-Token: t", Ok("t")),
            ("PRIVATE-TOKEN:glpat-1", Ok("glpat-1")),
            ("token:ghp_1", Ok("token:ghp_1")),
            ("**********", Ok("**********")),
            (" \n ", Ok("")),
            ("ghp_\n1", Err(TokenError::Control)),
            ("ghp_1\u{0}", Err(TokenError::Control)),
            ("https://user:ghp_1@github.com", Err(TokenError::Address)),
        ] {
            assert_eq!(normal_token(text), token.map(Cow::Borrowed), "{text:?}");
        }
    }

    #[test]
    fn each_provider_has_its_own_user_name_for_tokens() {
        for (provider, token, user, password) in [
            (Github, "ghp_1", "x-access-token", "ghp_1"),
            (Github, "me:ghp_1", "me", "ghp_1"),
            (Github, "ghp_1:x-oauth-basic", "x-access-token", "ghp_1"),
            (Github, "ghp_1:", "x-access-token", "ghp_1"),
            (Gitlab, "glpat-1", "oauth2", "glpat-1"),
            (Gitlab, "gitlab+deploy-token-1:gldt-1", "gitlab+deploy-token-1", "gldt-1"),
            (Gitlab, "glcbt-1", "gitlab-ci-token", "glcbt-1"),
            (Gitlab, "oauth2:a:b", "oauth2", "a:b"),
            (Bitbucket, "ATCTT1", "x-token-auth", "ATCTT1"),
            (Bitbucket, "ATATT1", "x-bitbucket-api-token-auth", "ATATT1"),
            (Bitbucket, "me@example.org:ATATT1", "x-bitbucket-api-token-auth", "ATATT1"),
            (Bitbucket, "me:ATBB1", "me", "ATBB1"),
            (BitbucketDataCenter, "t", "x-token-auth", "t"),
            (BitbucketDataCenter, "me:t", "me", "t"),
            (Forgejo, "t", "x-access-token", "t"),
            (AzureDevops, "t", "contoso", "t"),
            (AzureDevops, ":t", "contoso", "t"),
            (AzureDevops, "me:t", "me", "t"),
        ] {
            assert_eq!(user_and_password(provider, token, "contoso"), (user, password), "{provider} {token}");
        }
    }
}
