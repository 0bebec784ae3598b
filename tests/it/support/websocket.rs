//! A read-only websocket client, for what agent servers send to connected clients.

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// Opcodes of frames.
const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const CLOSE: u8 = 8;

/// A connection. Dropping it closes it.
pub struct WebSocket(BufReader<TcpStream>);

impl WebSocket {
    /// Connects to `http://host:port/path?query`.
    pub async fn connect(url: &str) -> Self {
        let (host, path) = url.trim_start_matches("http://").split_once('/').expect("a path");
        let mut stream = BufReader::new(TcpStream::connect(host).await.expect("a connection"));
        let request = format!(
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await.expect("the request is sent");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.expect("an answer"));
        }
        assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
        Self(stream)
    }

    /// The next message as JSON; `None` at the end of the connection.
    pub async fn next(&mut self) -> Option<Value> {
        let mut message = Vec::new();
        loop {
            let [first, second] = [self.0.read_u8().await.ok()?, self.0.read_u8().await.ok()?];
            let length = match second & 0x7f {
                126 => u64::from(self.0.read_u16().await.ok()?),
                127 => self.0.read_u64().await.ok()?,
                short => u64::from(short),
            };
            let mut payload = vec![0; usize::try_from(length).expect("a length")];
            self.0.read_exact(&mut payload).await.ok()?;
            match first & 0x0f {
                CLOSE => return None,
                TEXT | CONTINUATION => message.extend(payload),
                // Pings: the server may wait for a pong, but not for the duration of a test.
                _ => continue,
            }
            if first & 0x80 != 0 {
                return Some(serde_json::from_slice(&message).expect("JSON"));
            }
        }
    }
}
