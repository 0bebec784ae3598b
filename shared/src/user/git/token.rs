//! Tokens in the forms that people paste them, and the user name that each provider wants with one.

use super::address;
use crate::start::request::ProviderType;

/// Why a text is not a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// A line break or another control character is in it.
    #[error("a token has no line breaks and no other control characters")]
    Control,
    /// It is an address.
    #[error("give the token by itself, not an address with it")]
    Address,
}

/// The token without what surrounds it where it was copied: blanks, quotes, the name of a header, `Bearer` or `token`.
///
/// # Errors
/// When it cannot be a token. No error shows the text.
pub fn normal_token(text: &str) -> Result<&str, TokenError> {
    let mut token = address::unwrapped(text);
    for (prefix, is_header) in
        [("authorization:", true), ("private-token:", true), ("bearer ", false), ("token ", false)]
    {
        if let (Some(start), Some(rest)) = (token.get(..prefix.len()), token.get(prefix.len()..))
            && start.eq_ignore_ascii_case(prefix)
            // Of a scheme, one word follows.
            && (is_header || !rest.trim().contains(char::is_whitespace))
            && !rest.trim().is_empty()
        {
            token = address::unwrapped(rest);
        }
    }
    if token.contains(char::is_control) {
        return Err(TokenError::Control);
    }
    if token.contains("://") {
        return Err(TokenError::Address);
    }
    Ok(token)
}

/// User name and password with which git uses the token. A user's own name is kept where the token came as `user:token`.
pub(super) fn user_and_password<'t>(
    provider: ProviderType,
    token: &'t str,
    organisation: &'t str,
) -> (&'t str, &'t str) {
    // None of the providers' tokens has a colon.
    let (given, password) = match token.split_once(':') {
        // As curl wants it, as GitHub documented it for OAuth, and as Azure DevOps documents it.
        Some((token, "" | "x-oauth-basic") | ("", token)) => (None, token),
        Some((user, token)) => (Some(user), token),
        None => (None, token),
    };
    let user = match (provider, given) {
        // git at Bitbucket Cloud knows users by name, the API by e-mail address: this name is the one for API tokens of any user.
        (ProviderType::Bitbucket, Some(user)) if user.contains('@') => "x-bitbucket-api-token-auth",
        (_, Some(user)) => user,
        (ProviderType::Bitbucket, None) if password.starts_with("ATATT") => "x-bitbucket-api-token-auth",
        (ProviderType::Bitbucket | ProviderType::BitbucketDataCenter, None) => "x-token-auth",
        (ProviderType::Gitlab, None) if password.starts_with("glcbt-") => "gitlab-ci-token",
        (ProviderType::Gitlab, None) => "oauth2",
        (ProviderType::AzureDevops, None) if !organisation.is_empty() => organisation,
        // These take the token as the password of any user.
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
            ("é", Ok("é")),
            ("**********", Ok("**********")),
            (" \n ", Ok("")),
            ("ghp_\n1", Err(TokenError::Control)),
            ("ghp_1\u{0}", Err(TokenError::Control)),
            ("https://user:ghp_1@github.com", Err(TokenError::Address)),
        ] {
            assert_eq!(normal_token(text), token, "{text:?}");
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
