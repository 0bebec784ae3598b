//! Addresses of git hosts and repositories as people paste them, taken apart.

use percent_encoding::percent_decode_str;
use reqwest::Url;

/// How an address is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scheme {
    Https,
    Http,
    /// SSH or git's own protocol. Both name a host, but not the port of its web server.
    Ssh,
}

/// Why a text is not an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AddressError {
    /// Neither HTTP nor SSH.
    Scheme,
    /// The host, or its port, cannot be one.
    Host,
}

/// An address without its credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    /// `None` if the text does not say.
    pub scheme: Option<Scheme>,
    /// Whether it had a user name with a password.
    pub had_password: bool,
    /// Lower case, an international name in its ASCII form, with the port unless it is the scheme's own.
    pub authority: String,
    /// Percent-decoded.
    pub path: Vec<String>,
    /// Percent-decoded.
    pub query: Vec<(String, String)>,
}

/// Where the parts of an address are in its text.
struct Parts<'t> {
    scheme: Option<Scheme>,
    user_info: Option<&'t str>,
    authority: &'t str,
    /// From the first `/`, or of an scp-like address what follows the colon.
    rest: &'t str,
}

/// The text without what surrounds it where it was copied: blanks, quotes, a byte order mark.
pub(super) fn unwrapped(text: &str) -> &str {
    let blank = |c: char| c.is_whitespace() || matches!(c, '\u{feff}' | '\u{200b}');
    let mut text = text.trim_matches(blank);
    for (open, close) in [('"', '"'), ('\'', '\''), ('`', '`'), ('<', '>')] {
        if let Some(inner) = text.strip_prefix(open).and_then(|text| text.strip_suffix(close)) {
            text = inner.trim_matches(blank);
        }
    }
    text
}

/// Whether the text begins with a scheme, with `//`, with a user or with a host and its port, so that it can be nothing but an
/// address.
pub(super) fn is_address(text: &str) -> bool {
    let head = head_of(text);
    text.contains("://") || text.starts_with("//") || head.contains('@') || head.contains(':') || head.starts_with('[')
}

/// Takes an address apart. What does not begin with a scheme is taken for `host[:port]/path` or `[user@]host:path`.
pub(super) fn parse(text: &str) -> Result<Address, AddressError> {
    let parts = parts(text)?;
    let had_password = parts.user_info.is_some_and(|info| info.contains(':'));
    let (rest, query) = match parts.rest.split_once(['?', '#']) {
        Some((path, _)) => (path, query_of(parts.rest)),
        None => (parts.rest, Vec::new()),
    };
    let path = rest.split('/').filter(|segment| !segment.is_empty()).map(decoded).collect();
    let authority = normal_authority(parts.authority, parts.scheme)?;
    Ok(Address { scheme: parts.scheme, had_password, authority, path, query })
}

/// The text without user name, password and secret parameters, for answers and records. `git@` stays: everyone has it.
#[must_use]
pub fn without_credentials(text: &str) -> String {
    if !is_address(unwrapped(text)) {
        return text.to_owned();
    }
    let start = text.find("://").map_or_else(|| text.find(|c: char| c.is_alphanumeric()).unwrap_or(0), |at| at + 3);
    let (front, rest) = text.split_at(start);
    let rest = match end_of_user_info(rest, front.ends_with("://")) {
        Some(at) if !rest[..at].eq_ignore_ascii_case("git") => &rest[at + 1..],
        _ => rest,
    };
    let is_secret = |query: &str| {
        let query = query.to_ascii_lowercase();
        ["token", "secret", "passw", "auth", "key", "sig", "credential"].iter().any(|word| query.contains(word))
    };
    match rest.find(['?', '#']) {
        Some(at) if is_secret(&rest[at..]) => format!("{front}{}", &rest[..at]),
        _ => format!("{front}{rest}"),
    }
}

fn parts(text: &str) -> Result<Parts<'_>, AddressError> {
    if let Some((scheme, rest)) = text.split_once("://") {
        let scheme = match scheme.trim().to_ascii_lowercase().as_str() {
            "https" | "git+https" => Scheme::Https,
            "http" | "git+http" => Scheme::Http,
            "ssh" | "git+ssh" | "ssh+git" | "git" => Scheme::Ssh,
            _ => return Err(AddressError::Scheme),
        };
        let (user_info, rest) = without_user_info(rest, true);
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, rest) = rest.split_at(end);
        // `ssh://git@host:owner/name` is a mix of both forms that is common enough.
        if scheme == Scheme::Ssh
            && let Some((host, path)) = authority.rsplit_once(':')
            && !is_port(path)
            && !path.contains(']')
        {
            let from = authority.len() - path.len();
            let whole = &text[text.len() - rest.len() - authority.len()..];
            return Ok(Parts { scheme: Some(scheme), user_info, authority: host, rest: &whole[from..] });
        }
        return Ok(Parts { scheme: Some(scheme), user_info, authority, rest });
    }
    let text = text.trim_start_matches('/');
    let (user_info, text) = without_user_info(text, false);
    let end = text.find(['/', '?', '#']).unwrap_or(text.len());
    let (head, rest) = text.split_at(end);
    match head.rsplit_once(':') {
        Some((host, path)) if !is_port(path) && !path.contains(']') => {
            Ok(Parts { scheme: Some(Scheme::Ssh), user_info, authority: host, rest: &text[host.len() + 1..] })
        }
        _ => Ok(Parts { scheme: None, user_info, authority: head, rest }),
    }
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

fn head_of(text: &str) -> &str {
    &text[..text.find(['/', '?', '#']).unwrap_or(text.len())]
}

fn without_user_info(text: &str, has_scheme: bool) -> (Option<&str>, &str) {
    match end_of_user_info(text, has_scheme) {
        Some(at) => (Some(&text[..at]), &text[at + 1..]),
        None => (None, text),
    }
}

/// Where the `@` is that ends user name and password.
fn end_of_user_info(text: &str, has_scheme: bool) -> Option<usize> {
    let head = head_of(text);
    if let Some(at) = head.rfind('@') {
        return Some(at);
    }
    // Passwords are pasted unencoded, too: one with a slash ends what looks like the host, after something that is no port.
    let has_no_port = has_scheme
        && !head.starts_with('[')
        && head.split_once(':').is_some_and(|(_, port)| !port.is_empty() && !is_port(port));
    if has_no_port { text.rfind('@') } else { None }
}

/// The host as every spelling of it is written here.
fn normal_authority(authority: &str, scheme: Option<Scheme>) -> Result<String, AddressError> {
    // What the URL standard drops or reads as something else is refused.
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '\\' | '%' | '@' | ',' | ';' | '*');
    if authority.is_empty() || authority.len() > 300 || authority.starts_with(['-', '.']) || authority.contains(odd) {
        return Err(AddressError::Host);
    }
    let name = if scheme == Some(Scheme::Http) { "http" } else { "https" };
    let url = Url::parse(&format!("{name}://{authority}/")).map_err(|_| AddressError::Host)?;
    let host = url.host_str().filter(|host| !host.is_empty()).ok_or(AddressError::Host)?.trim_end_matches('.');
    // `1` and `0x7f.1` are IPv4 addresses by that standard.
    let is_number = host.parse::<std::net::Ipv4Addr>().is_ok();
    if host.is_empty() || host.contains("..") || (is_number && !authority.starts_with(host)) {
        return Err(AddressError::Host);
    }
    match url.port().filter(|_| scheme != Some(Scheme::Ssh)) {
        Some(0) => Err(AddressError::Host),
        Some(port) => Ok(format!("{host}:{port}")),
        None => Ok(host.to_owned()),
    }
}

fn query_of(rest: &str) -> Vec<(String, String)> {
    let query = rest.split('#').next().and_then(|rest| rest.split_once('?')).map_or("", |(_, query)| query);
    form_urlencoded::parse(query.as_bytes()).into_owned().collect()
}

pub(super) fn decoded(text: &str) -> String {
    // Bytes that are no text stay encoded.
    percent_decode_str(text).decode_utf8().map_or_else(|_| text.to_owned(), std::borrow::Cow::into_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_are_cut_off_wherever_they_stand() {
        for (text, clean) in [
            ("o/r", "o/r"),
            (" o/r@x ", " o/r@x "),
            ("https://github.com/o/r", "https://github.com/o/r"),
            ("https://user:tok@github.com/o/r", "https://github.com/o/r"),
            ("  HTTPS://tok@github.com/o/r.git ", "  HTTPS://github.com/o/r.git "),
            ("https://user:p/w@x@github.com/o/r", "https://github.com/o/r"),
            ("https://user:p#w?@github.com/o/r", "https://github.com/o/r"),
            ("user:tok@github.com/o/r", "github.com/o/r"),
            ("git@github.com:o/r.git", "git@github.com:o/r.git"),
            ("ssh://git@github.com/o/r", "ssh://git@github.com/o/r"),
            ("tok@github.com:o/r.git", "github.com:o/r.git"),
            ("//user:tok@github.com/o/r", "//github.com/o/r"),
            ("\"https://u:tok@h/o/r\"", "\"https://h/o/r\""),
            ("https://h/o/r?private_token=tok", "https://h/o/r"),
            ("https://h/o/r?ref=main", "https://h/o/r?ref=main"),
            ("https://h/o/r#access_token=tok", "https://h/o/r"),
            ("https://h:8443/o/@r", "https://h:8443/o/@r"),
        ] {
            assert_eq!(without_credentials(text), clean, "{text}");
        }
    }

    #[test]
    fn hosts_have_one_spelling() {
        for (text, authority) in [
            ("GitHub.com", Ok("github.com")),
            ("https://git.example.org:443/x", Ok("git.example.org")),
            ("http://git.example.org:80", Ok("git.example.org")),
            ("http://git.example.org:443", Ok("git.example.org:443")),
            ("https://git.example.org.:8443/", Ok("git.example.org:8443")),
            ("https://bücher.example/x", Ok("xn--bcher-kva.example")),
            ("https://[2001:DB8::1]:8443/x", Ok("[2001:db8::1]:8443")),
            ("[::1]:3000", Ok("[::1]:3000")),
            ("ssh://git@git.example.org:2222/o/r", Ok("git.example.org")),
            ("git@git.example.org:o/r", Ok("git.example.org")),
            ("ssh://git@git.example.org:o/r", Ok("git.example.org")),
            ("127.0.0.1:3482", Ok("127.0.0.1:3482")),
            ("my_host", Ok("my_host")),
            ("host of me", Err(AddressError::Host)),
            ("https://", Err(AddressError::Host)),
            ("https://h:99999", Err(AddressError::Host)),
            ("https://h:0", Err(AddressError::Host)),
            ("https://h%2eorg", Err(AddressError::Host)),
            ("https://-h", Err(AddressError::Host)),
            ("2130706433", Err(AddressError::Host)),
            ("https://0x7f.1/", Err(AddressError::Host)),
            ("https://a..b", Err(AddressError::Host)),
            ("https://[::1", Err(AddressError::Host)),
            ("ftp://h", Err(AddressError::Scheme)),
            ("file:///h", Err(AddressError::Scheme)),
            ("javascript://h", Err(AddressError::Scheme)),
        ] {
            assert_eq!(parse(text).map(|address| address.authority), authority.map(ToOwned::to_owned), "{text}");
        }
    }
}
