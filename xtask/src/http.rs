//! The smallest HTTP client that the demo needs: one request, one connection, the whole answer.

use anyhow::{Context, Result};
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Header lines, as they came.
    pub head: String,
    /// Bytes of the body.
    pub length: usize,
}

/// Gets `path`, with `ranges` one-byte ranges if that is not 0.
pub fn get(server: SocketAddr, path: &str, ranges: usize) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(5)).context("connecting")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    if ranges > 0 {
        let list: Vec<String> = (0..ranges).map(|n| format!("{}-{}", 3 * n, 3 * n)).collect();
        request.push_str(&format!("Range: bytes={}\r\n", list.join(",")));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).context("reading the answer")?;
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").context("an answer without a head")?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).context("an answer without a status")?;
    Ok(Answer { status, head, length: bytes.len() - end - 4 })
}
