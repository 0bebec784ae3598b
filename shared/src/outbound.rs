//! Requests to addresses that come from data: where a sandbox is, its provider says, and a sandbox is nobody's to trust. They reach
//! public addresses alone, so that none of them leads to this machine, its network or the cloud's metadata.
//!
//! Addresses are looked at when the connection is made, after names were resolved: a name that means something else a moment later
//! gains nothing. Redirects are not followed.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use percent_encoding::percent_decode;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use reqwest::{Method, RequestBuilder, Url};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a connection without a request is kept: agent servers close theirs after 5 s, and a request that meets that is lost.
const IDLE_TIMEOUT: Duration = Duration::from_secs(4);
/// An address that no request can be made to.
const REFUSED: &str = "refused:";
/// How many times over a path may be percent-encoded.
const MAX_ENCODINGS: usize = 4;

/// Which addresses may be connected to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reach {
    /// Public ones alone.
    #[default]
    Public,
    /// Any: sandboxes are on this machine or in its network.
    Anywhere,
}

/// A client that is made when it is first used: to set up TLS takes longer than all else that a process does as it starts, and many
/// requests need no client. Clones are the same client.
#[derive(Clone, Debug)]
pub struct LazyClient {
    builder: fn() -> reqwest::ClientBuilder,
    made: Arc<OnceLock<reqwest::Client>>,
}

impl LazyClient {
    /// A client that is to be built so.
    #[must_use]
    pub fn new(builder: fn() -> reqwest::ClientBuilder) -> Self {
        Self { builder, made: Arc::default() }
    }

    /// The client.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn get(&self) -> reqwest::Result<&reqwest::Client> {
        if let Some(client) = self.made.get() {
            return Ok(client);
        }
        let made = (self.builder)().build()?;
        Ok(self.made.get_or_init(|| made))
    }
}

/// The client for such requests.
#[derive(Clone, Debug)]
pub struct Outbound {
    client: LazyClient,
    reach: Reach,
}

impl Outbound {
    /// A client that reaches so far.
    #[must_use]
    pub fn new(reach: Reach) -> Self {
        let client = match reach {
            Reach::Anywhere => LazyClient::new(builder),
            // A proxy would resolve names in our place.
            Reach::Public => LazyClient::new(|| builder().no_proxy().dns_resolver(Arc::new(PublicAddresses))),
        };
        Self { client, reach }
    }

    /// Begins a request. To an address that must not be reached it fails when it is sent.
    ///
    /// # Errors
    /// When TLS cannot be set up.
    pub fn request(&self, method: Method, url: &str) -> reqwest::Result<RequestBuilder> {
        let may = self.reach == Reach::Anywhere || Url::parse(url).is_ok_and(|url| may_name(&url));
        Ok(self.client.get()?.request(method, if may { url } else { REFUSED }))
    }
}

/// Joins a path, with its query if it has one, onto a base URL. `None` unless the result stays on the base's host and below the
/// base's path, and [`is_plain`] holds for the path.
///
/// Every path with an id or a caller's text in it goes through here before it becomes part of a URL.
#[must_use]
pub fn join(base: &str, path: &str) -> Option<Url> {
    if !is_plain(path) {
        return None;
    }
    let base = Url::parse(base).ok()?;
    let below = base.path().trim_end_matches('/');
    let mut root = base.clone();
    root.set_query(None);
    root.set_fragment(None);
    let joined = Url::parse(&format!("{}{path}", root.as_str().trim_end_matches('/'))).ok()?;
    let same_place = joined.origin() == base.origin()
        && (joined.scheme(), joined.username(), joined.password()) == (base.scheme(), base.username(), base.password())
        && joined.path().strip_prefix(below).is_some_and(|rest| rest.starts_with('/'))
        && joined.fragment().is_none();
    same_place.then_some(joined)
}

/// Whether every parser reads an absolute path the same way: no `.` or `..` segments, empty segments, backslashes, control
/// characters or fragments, and no encoded dots, slashes or backslashes, not even if they are encoded twice. A query may hold
/// anything but control characters, backslashes and fragments.
#[must_use]
pub fn is_plain(path: &str) -> bool {
    let folder = path.split('?').next().unwrap_or_default();
    folder.starts_with('/')
        && !path.chars().any(|letter| letter.is_control() || matches!(letter, '\\' | '#'))
        && !folder.contains("//")
        && !folder.split('/').any(|segment| matches!(segment, "." | ".."))
        && !encodes_syntax(folder)
}

/// Whether decoding a path, once or several times over, adds a dot, a slash, a backslash or a control character.
fn encodes_syntax(path: &str) -> bool {
    let syntax =
        |path: &[u8]| path.iter().filter(|byte| matches!(byte, b'.' | b'/' | b'\\') || byte.is_ascii_control()).count();
    let mut current = path.as_bytes().to_vec();
    for _ in 0..MAX_ENCODINGS {
        let decoded: Vec<u8> = percent_decode(&current).collect();
        if syntax(&decoded) > syntax(path.as_bytes()) {
            return true;
        }
        if decoded == current {
            return false;
        }
        current = decoded;
    }
    true
}

fn builder() -> reqwest::ClientBuilder {
    reqwest::Client::builder().connect_timeout(CONNECT_TIMEOUT).pool_idle_timeout(IDLE_TIMEOUT).redirect(Policy::none())
}

/// Whether a URL's host is a name, which is looked at when it is resolved, or a public address.
fn may_name(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let literal = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    matches!(url.scheme(), "http" | "https") && literal.parse::<IpAddr>().map_or(!host.is_empty(), is_public)
}

/// Resolves names to public addresses alone.
#[derive(Debug)]
struct PublicAddresses;

impl Resolve for PublicAddresses {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            public(found).map_err(Into::into)
        })
    }
}

fn public(found: Vec<SocketAddr>) -> std::result::Result<Addrs, std::io::Error> {
    let public: Vec<SocketAddr> = found.into_iter().filter(|address| is_public(address.ip())).collect();
    if public.is_empty() {
        return Err(std::io::Error::other("the name has no public address"));
    }
    Ok(Box::new(public.into_iter()))
}

/// Whether an address is one of the public internet, by IANA's registries of special-purpose addresses. Addresses of version 6 that
/// hold one of version 4 are what that one is.
#[must_use]
pub fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !matches!(
        (a, b, c),
        (0 | 10 | 127 | 224..=255, ..)
            | (100, 64..=127, _)
            | (169, 254, _)
            | (172, 16..=31, _)
            | (192, 0, 0 | 2)
            | (192, 31, 196)
            | (192, 52, 193)
            | (192, 88, 99)
            | (192, 168, _)
            | (192, 175, 48)
            | (198, 18 | 19, _)
            | (198, 51, 100)
            | (203, 0, 113)
    )
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let embedded = |high: u16, low: u16| {
        let [[a, b], [c, d]] = [high.to_be_bytes(), low.to_be_bytes()];
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    match address.segments() {
        // Mapped, translated, and 6to4.
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0x2002, high, low, ..] => {
            embedded(high, low)
        }
        // Protocol assignments, Teredo among them; documentation.
        [0x2001, 0..=0x1ff | 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => false,
        // All that is assigned for the public is in 2000::/3.
        [first, ..] => (0x2000..=0x3fff).contains(&first),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_public_or_not() {
        for not_public in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "10.255.255.255",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.0.1",
            "169.254.0.1",
            "169.254.169.254",
            "169.254.170.2",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "239.1.1.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "::169.254.169.254",
            "64:ff9b::a00:1",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:1ff::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2002:a9fe:a9fe::1",
            "3fff::1",
            "3fff:fff::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fdff::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "4000::1",
        ] {
            assert!(!is_public(not_public.parse().expect("an address")), "{not_public}");
        }
        for public in [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.1",
            "100.63.255.255",
            "100.128.0.1",
            "126.0.0.1",
            "128.0.0.1",
            "169.253.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "192.167.0.1",
            "192.169.0.1",
            "198.17.0.1",
            "198.20.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2001:4860:4860::8888",
            "2001:200::1",
            "2a00::1",
            "::ffff:8.8.8.8",
            "64:ff9b::808:808",
            "2002:808:808::1",
            "3ffe::1",
        ] {
            assert!(is_public(public.parse().expect("an address")), "{public}");
        }
    }

    #[test]
    fn hosts_are_addresses_however_they_are_written() {
        let may = |url: &str| Url::parse(url).is_ok_and(|url| may_name(&url));
        for url in [
            "http://127.0.0.1/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f.0.0.1:80/",
            "http://0177.0.0.1/",
            "http://[::1]/",
            "http://[::ffff:169.254.169.254]/latest",
            "http://0/",
            "http://user@10.0.0.1/",
            "file:///etc/passwd",
            "ftp://1.1.1.1/",
            "http://1.1.1.1@127.0.0.1/",
            "nothing",
            "http://１２７.0.0.1/",
        ] {
            assert!(!may(url), "{url}");
        }
        for url in [
            "http://1.1.1.1/",
            "https://[2606:4700::1111]:8443/x",
            "https://sandbox.example.com/",
            "http://127.0.0.1.example.com/",
        ] {
            assert!(may(url), "{url}");
        }
    }

    #[test]
    fn a_joined_path_stays_below_its_base() {
        for (base, path, expected) in [
            ("http://host:1", "/api/x", "http://host:1/api/x"),
            ("http://host:1/", "/api/x?path=/a/../b&y=//z", "http://host:1/api/x?path=/a/../b&y=//z"),
            ("https://host/runtime/7", "/api/x%20y", "https://host/runtime/7/api/x%20y"),
            ("https://host/runtime/7/", "/api/100%25", "https://host/runtime/7/api/100%25"),
            ("https://host/runtime/7", "/api/a b", "https://host/runtime/7/api/a%20b"),
            ("https://host/runtime/7", "/api/..x/.hidden", "https://host/runtime/7/api/..x/.hidden"),
        ] {
            assert_eq!(join(base, path).as_ref().map(Url::as_str), Some(expected));
        }
        for path in [
            "",
            "api/x",
            "@evil/api/x",
            ":80/api/x",
            "/api/../x",
            "/api/..",
            "/api/.",
            "/api/./x",
            "/api/..?x",
            "/api/%2e%2e/x",
            "/api/%2E%2e/x",
            "/api/.%2E/x",
            "/api/%2e./x",
            "/api/%252e%252e/x",
            "/api/%25252e/x",
            "/api/%25%32%65/x",
            "/api/%%32e/x",
            "/api/..%2fx",
            "/api/%2F..%2Fx",
            "/api/%252fx",
            "/api/..%5cx",
            "/api\\..\\x",
            "/\\evil/api/",
            "//evil/api/x",
            "/api//x",
            "/api//../x",
            "/api/x#y",
            "/api/x?y#z",
            "/api/\t../x",
            "/api/.\n./x",
            "/api/.%09./x",
            "/api/%00",
            "/api/x\r\nhost: evil",
        ] {
            assert_eq!(join("https://host/runtime/7", path), None, "{path}");
        }
        // In time that grows with its length alone.
        let deep = format!("/api/%{}2e", "25".repeat(2_000_000));
        assert_eq!(join("https://host/runtime/7", &deep), None);
        for base in ["", "host", "data:text/plain,x"] {
            assert_eq!(join(base, "/api/x"), None, "{base}");
        }
    }

    #[tokio::test]
    async fn names_of_private_addresses_are_not_reached() {
        let at = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let mixed = public(vec![at("169.254.169.254:0"), at("1.1.1.1:0"), at("[::1]:0")]).expect("one is left");
        assert_eq!(mixed.collect::<Vec<_>>(), [at("1.1.1.1:0")]);
        assert!(public(vec![at("10.0.0.1:0"), at("[fd00::1]:0")]).is_err());

        // Something listens there, and is not asked.
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let outbound = Outbound::new(Reach::Public);
        for host in ["localhost", "127.0.0.1", "[::ffff:127.0.0.1]"] {
            let sent = outbound.request(Method::GET, &format!("http://{host}:{port}/")).expect("a client").send().await;
            assert!(sent.is_err(), "{host}");
        }
        let nobody = tokio::time::timeout(Duration::from_millis(50), listener.accept()).await;
        assert!(nobody.is_err(), "nothing was connected to");
        let anywhere = Outbound::new(Reach::Anywhere);
        let request = anywhere.request(Method::GET, &format!("http://localhost:{port}/")).expect("a client").send();
        let asked = tokio::select! { accepted = listener.accept() => accepted.is_ok(), _ = request => false };
        assert!(asked, "where it is allowed, it is reached");
    }
}
