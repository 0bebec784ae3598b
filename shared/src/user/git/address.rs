//! Parses addresses of git hosts and repositories as users paste them.

use percent_encoding::percent_decode_str;
use reqwest::Url;

/// The protocol of an address.
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
    /// The protocol is neither HTTP nor SSH.
    Scheme,
    /// The host or its port is invalid.
    Host,
}

/// An address without its credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Address {
    /// `None` if the text does not name one.
    pub scheme: Option<Scheme>,
    /// Whether the text contained a user name with a password.
    pub had_password: bool,
    /// Whether the text is `host:path` without a scheme and a user name.
    pub is_short: bool,
    /// Lower case, an international name in its ASCII form, with the port unless it is the scheme's own.
    pub authority: String,
    /// Percent-decoded.
    pub path: Vec<String>,
    /// Percent-decoded.
    pub query: Vec<(String, String)>,
    /// The branch, tag or commit, as package managers write it: `….git#main`.
    pub revision: Option<String>,
}

/// The scheme at the beginning of a text.
struct FoundScheme<'t> {
    start: usize,
    name: &'t str,
    /// The text after the slashes.
    end: usize,
}

/// Parameters of addresses that never hold a credential, among them those that name a branch.
const HARMLESS_PARAMETERS: [&str; 5] = ["version", "at", "ref", "path", "tab"];

/// Whether the character has no width or changes the direction of the text. Users copy such characters without seeing them.
pub(super) fn is_invisible(c: char) -> bool {
    // The joiners, U+200C and U+200D, are part of words and of emojis.
    matches!(c, '\u{ad}' | '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Removes what surrounds a text that was copied: blanks, quotes, a byte order mark.
pub(super) fn unwrapped(text: &str) -> &str {
    let blank = |c: char| c.is_whitespace() || is_invisible(c);
    let mut text = text.trim_matches(blank);
    for (open, close) in [('"', '"'), ('\'', '\''), ('`', '`'), ('<', '>')] {
        if let Some(inner) = text.strip_prefix(open).and_then(|text| text.strip_suffix(close)) {
            text = inner.trim_matches(blank);
        }
    }
    text
}

/// Whether the text begins with a scheme, with `//`, with a user or with a host and its port, so that it can only be an address.
pub(super) fn is_address(text: &str) -> bool {
    let head = head_of(text);
    text.contains("://")
        || scheme_of(text).is_some()
        || text.starts_with("//")
        || head.contains('@')
        || head.contains(':')
        || head.starts_with('[')
}

/// Parses an address. A text without a scheme is read as `host[:port]/path` or `[user@]host:path`.
pub(super) fn parse(text: &str) -> Result<Address, AddressError> {
    let (text, had_password) = without_secrets(text);
    let (text, revision) =
        text.split_once('#').map_or((text.as_str(), None), |(text, revision)| (text, Some(revision)));
    let (text, query) = text.split_once('?').unwrap_or((text, ""));
    let (scheme, rest) = match scheme_of(text) {
        Some(found) if found.start == 0 => (Some(scheme_called(found.name)?), &text[found.end..]),
        Some(_) => return Err(AddressError::Scheme),
        None => (None, text.trim_start_matches('/')),
    };
    let user = rest.get(..4).filter(|user| user.eq_ignore_ascii_case("git@"));
    let rest = &rest[user.map_or(0, str::len)..];
    let head = head_of(rest);
    // A mistyped scheme, unlike the host of `git@host.example:/path`.
    if scheme.is_none() && head.ends_with(':') && !head.contains('.') {
        return Err(AddressError::Scheme);
    }
    // `ssh://git@host:owner/name` is a mix of both forms that is common enough.
    let (is_scp, scheme, authority, path) = match head.rsplit_once(':') {
        Some((host, path))
            if !is_port(path) && !path.contains(']') && scheme.is_none_or(|scheme| scheme == Scheme::Ssh) =>
        {
            (true, Some(Scheme::Ssh), host, &rest[host.len() + 1..])
        }
        _ => (false, scheme, head, &rest[head.len()..]),
    };
    Ok(Address {
        scheme,
        had_password,
        is_short: is_scp && user.is_none() && scheme_of(text).is_none(),
        authority: normal_authority(authority, scheme)?,
        path: path.split('/').filter(|segment| !segment.is_empty()).map(decoded).collect(),
        query: query_of(query),
        revision: revision.map(ToOwned::to_owned),
    })
}

/// Removes the user name, the password and all parameters except those that are known to be harmless, for responses and records. It
/// accepts any text, not only addresses. `git@` stays, because it is not a secret.
#[must_use]
pub fn without_credentials(text: &str) -> String {
    let mut text = text.to_owned();
    // The rest after a removal may contain another secret. The loop ends, because each removal makes the text shorter.
    loop {
        let inner = unwrapped(&text);
        // The start of the part in the text that contains it.
        let start = inner.as_ptr().addr() - text.as_ptr().addr();
        let (clean, _) = without_secrets(inner);
        let clean = format!("{}{clean}{}", &text[..start], &text[start + inner.len()..]);
        if clean == text {
            return clean;
        }
        text = clean;
    }
}

/// Removes the secrets from a text, and returns whether a password was among them.
fn without_secrets(text: &str) -> (String, bool) {
    // A whole address is sometimes encoded.
    let plain = text.replace("%40", "@").replace("%3A", ":").replace("%3a", ":");
    let (mut clean, mut had_password) = (text.to_owned(), false);
    let mut found = without_user_info(&plain);
    // Another user may follow the first one.
    while let Some((rest, is_password)) = found {
        had_password |= is_password;
        found = without_user_info(&rest);
        clean = rest;
    }
    (without_parameters(&clean), had_password)
}

fn without_user_info(text: &str) -> Option<(String, bool)> {
    let slashes = text.len() - text.trim_start_matches('/').len();
    let (front, rest) = text.split_at(scheme_of(text).map_or(slashes, |found| found.end));
    let at = end_of_user_info(rest)?;
    let user = &rest[..at];
    (!user.eq_ignore_ascii_case("git")).then(|| (format!("{front}{}", &rest[at + 1..]), user.contains(':')))
}

/// Finds the `@` that ends the user name and password.
fn end_of_user_info(text: &str) -> Option<usize> {
    let head = head_of(text);
    if head.starts_with('[') && head.contains(']') {
        return head.rfind('@');
    }
    // Users also paste unencoded passwords, with slashes, `?` and `#` in them. The end of a password that contains a slash looks like a
    // port or a folder, so a colon and a later `@` are taken as sufficient. A path that contains both is lost.
    let path = &text[..text.find(['?', '#']).unwrap_or(text.len())];
    let last = text.rfind('@')?;
    let is_scp = || {
        let host =
            head.get(..4).filter(|user| user.eq_ignore_ascii_case("git@")).and_then(|_| head[4..].split_once(':'));
        host.is_some_and(|(host, path)| host.contains('.') && !path.contains('@'))
    };
    match path.find(':') {
        Some(colon) if colon < last && !is_scp() => Some(last),
        _ => head.rfind('@'),
    }
}

fn without_parameters(text: &str) -> String {
    let Some(at) = text.find(['?', '#']) else { return text.to_owned() };
    let (front, rest) = text.split_at(at);
    let (query, fragment) = rest.split_once('#').unwrap_or((rest, ""));
    let query: Vec<&str> = pairs_of(query.trim_start_matches('?')).filter(|pair| is_harmless(pair)).collect();
    let mut clean = front.to_owned();
    if !query.is_empty() {
        clean = format!("{clean}?{}", query.join("&"));
    }
    if is_revision(front, fragment) {
        clean = format!("{clean}#{fragment}");
    }
    clean
}

/// `;` and the `&amp;` of HTML separate parameters, too.
fn pairs_of(query: &str) -> impl Iterator<Item = &str> {
    query.split(['&', ';'])
}

/// Only the names of parameters decide, because a branch may be called `oauth`.
fn is_harmless(pair: &str) -> bool {
    pair.split_once('=').is_some_and(|(name, value)| {
        // Branches, tags and paths do not need these characters; an address inside the value does.
        HARMLESS_PARAMETERS.contains(&name) && !decoded(value).contains([':', '?'])
    })
}

/// Whether the text after `#` names a branch, tag or commit, and not a section of a page.
fn is_revision(front: &str, fragment: &str) -> bool {
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '/' | '-');
    let head = head_of(front);
    let is_page = scheme_of(front).is_some() || (head.contains('.') && !head.contains(':'));
    let is_clone = front.trim_end_matches('/').to_ascii_lowercase().ends_with(".git");
    !fragment.is_empty() && fragment.chars().all(is_name) && (is_clone || !is_page)
}

/// Finds the scheme of an address, also one that lacks its colon or a slash.
fn scheme_of(text: &str) -> Option<FoundScheme<'_>> {
    if let Some(end) = text.find("://") {
        let is_part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '.' | '-');
        let start = end - text[..end].chars().rev().take_while(|c| is_part(*c)).count();
        // The text before it may be a user with a password.
        if !text[..start].contains(['@', ':']) {
            return Some(FoundScheme { start, name: &text[start..end], end: end + 3 });
        }
    }
    ["git+https", "git+http", "git+ssh", "ssh+git", "https", "http", "ssh"].into_iter().find_map(|name| {
        let (name, rest) =
            (text.get(..name.len()).filter(|start| start.eq_ignore_ascii_case(name))?, text.get(name.len()..)?);
        (rest.starts_with(':') || rest.starts_with("//")).then(|| {
            let end = text.len() - rest.trim_start_matches([':', '/', '\\']).len();
            FoundScheme { start: 0, name, end }
        })
    })
}

fn scheme_called(name: &str) -> Result<Scheme, AddressError> {
    match name.to_ascii_lowercase().as_str() {
        "https" | "git+https" => Ok(Scheme::Https),
        "http" | "git+http" => Ok(Scheme::Http),
        "ssh" | "git+ssh" | "ssh+git" | "git" => Ok(Scheme::Ssh),
        _ => Err(AddressError::Scheme),
    }
}

fn is_port(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

fn head_of(text: &str) -> &str {
    &text[..text.find(['/', '?', '#']).unwrap_or(text.len())]
}

/// Normalises a host.
fn normal_authority(authority: &str, scheme: Option<Scheme>) -> Result<String, AddressError> {
    // Characters that the URL standard drops or reads differently are rejected.
    let odd = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '\\' | '%' | '@' | ',' | ';' | '*');
    // A scheme without its colon looks like a host.
    let is_scheme = ["http", "https", "ssh", "ftp"].iter().any(|scheme| authority.eq_ignore_ascii_case(scheme));
    if is_scheme
        || authority.is_empty()
        || authority.len() > 300
        || authority.starts_with(['-', '.'])
        || authority.contains(odd)
    {
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

fn query_of(query: &str) -> Vec<(String, String)> {
    let decode = |pair: &str| form_urlencoded::parse(pair.as_bytes()).into_owned().next();
    pairs_of(query).filter_map(decode).collect()
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
            // This is written as a password with a slash is.
            ("https://h:8443/o/@r", "https://r"),
            ("https://[::1]:8443/o/@r", "https://[::1]:8443/o/@r"),
            ("https://h/o/r/tree/a@b", "https://h/o/r/tree/a@b"),
            ("github.com/o/r?access_token=canary", "github.com/o/r"),
            ("www.github.com/o/r.git?private_token=canary", "www.github.com/o/r.git"),
            ("github.com/o/r#token=canary", "github.com/o/r"),
            ("https://github.com/o/r.git#token=canary", "https://github.com/o/r.git"),
            ("https://github.com/o/r?pat=canary", "https://github.com/o/r"),
            ("https://github.com/o/r?canary", "https://github.com/o/r"),
            ("https://h/o/r?ref=main&pat=canary&at=a%2Foauth", "https://h/o/r?ref=main&at=a%2Foauth"),
            ("https://h/o/r?a=canary&amp;version=GBkey;b=canary", "https://h/o/r?version=GBkey"),
            ("https://h/o/r?at=https://u:canary", "https://h/o/r"),
            ("'https://h/o/r?pat=canary'", "'https://h/o/r'"),
            ("o/r?token=canary", "o/r"),
            ("o/r#token=canary", "o/r"),
            ("o/r#dev", "o/r#dev"),
            ("https://h/o/r.git#dev", "https://h/o/r.git#dev"),
            ("https://h/o/r#canary", "https://h/o/r"),
            ("https://user:12/canary@ghe.example", "https://ghe.example"),
            ("https://user:8443/canary@github.com/o/r", "https://github.com/o/r"),
            ("user:8443/canary@github.com/o/r", "github.com/o/r"),
            ("https:/u:canary@github.com/o/r", "https:/github.com/o/r"),
            ("https//u:canary@github.com/o/r", "https//github.com/o/r"),
            ("http:u:canary@github.com/o/r", "http:github.com/o/r"),
            ("htps:/u:canary@github.com/o/r", "github.com/o/r"),
            ("u:canary@https://github.com/o/r", "https://github.com/o/r"),
            ("https://u:canary@https://github.com/o/r", "https://https://github.com/o/r"),
            ("git clone https://u:canary@github.com/o/r", "git clone https://github.com/o/r"),
            ("o/u:canary@x", "x"),
            ("https%3A%2F%2Fu%3Acanary%40ghe.example", "https:ghe.example"),
            ("https/u%3Acanary%40ghe.example", "ghe.example"),
            ("https://u%3Acanary%40ghe.example/o", "https://ghe.example/o"),
            ("git@canary:x/canary@h/o", "h/o"),
            ("git@github.com:o/r@main", "git@github.com:o/r@main"),
            ("//canary@//canary@h/o", "////h/o"),
            ("canary@https//canary@h/o", "https//h/o"),
            ("", ""),
            (" \" ", " \" "),
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
            ("https:/git.example.org/x", Ok("git.example.org")),
            ("https:git.example.org", Ok("git.example.org")),
            ("HTTP//git.example.org:80", Ok("git.example.org")),
            ("https:\\\\git.example.org", Ok("git.example.org")),
            ("https/git.example.org", Err(AddressError::Host)),
            ("text https://h", Err(AddressError::Scheme)),
            ("htps:/h", Err(AddressError::Scheme)),
            ("git@git.example.org:/o/r", Ok("git.example.org")),
            ("ftp://h", Err(AddressError::Scheme)),
            ("file:///h", Err(AddressError::Scheme)),
            ("javascript://h", Err(AddressError::Scheme)),
        ] {
            assert_eq!(parse(text).map(|address| address.authority), authority.map(ToOwned::to_owned), "{text}");
        }
    }
}
