//! The smallest HTTP client that the demo needs: one request, one connection, the whole answer, and its parts.

use anyhow::{Context, Result, ensure};
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
    /// Status line and header lines, as they came.
    pub head: String,
    /// The body.
    pub body: Vec<u8>,
}

/// One part of a multipart answer.
#[derive(Debug, PartialEq, Eq)]
pub struct Part<'a> {
    /// First and last byte that it is said to be.
    pub range: (usize, usize),
    /// What it is.
    pub bytes: &'a [u8],
}

/// The byte ranges that a client may ask for.
pub type Ranges<'a> = &'a [(usize, usize)];

/// Gets `path`, or `ranges` of it.
pub fn get(server: SocketAddr, path: &str, ranges: Ranges) -> Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(5)).context("connecting")?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n");
    if !ranges.is_empty() {
        let list: Vec<String> = ranges.iter().map(|(first, last)| format!("{first}-{last}")).collect();
        request.push_str(&format!("Range: bytes={}\r\n", list.join(",")));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).context("reading the answer")?;
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Result<Answer> {
    let end = find(bytes, b"\r\n\r\n").context("an answer without a head")?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).context("an answer without a status")?;
    let mut answer = Answer { status, head, body: bytes[end + 4..].to_vec() };
    if answer.header("Transfer-Encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        answer.body = unchunk(&answer.body).context("chunks of an answer that can't be read, or do not end")?;
    }
    if let Some(length) = answer.header("Content-Length") {
        ensure!(length.parse() == Ok(answer.body.len()), "{} bytes of {length} came", answer.body.len());
    }
    Ok(answer)
}

/// Puts the chunks of a body together (RFC 9112, 7.1).
fn unchunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = find(rest, b"\r\n")?;
        let length = usize::from_str_radix(std::str::from_utf8(&rest[..end]).ok()?.trim(), 16).ok()?;
        rest = &rest[end + 2..];
        if length == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..length)?);
        rest = rest.get(length..)?.strip_prefix(b"\r\n")?;
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

/// The value of a header among lines.
fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().find_map(|line| {
        let (this, value) = line.split_once(':')?;
        this.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

impl Answer {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }

    /// The parts of a `multipart/byteranges` answer (RFC 9110, 14.6).
    pub fn parts(&self) -> Result<Vec<Part<'_>>> {
        let kind = self.header("Content-Type").unwrap_or_default();
        let boundary = kind
            .strip_prefix("multipart/byteranges; boundary=")
            .with_context(|| format!("an answer of type {kind:?} has no parts"))?;
        let delimiter = format!("\r\n--{boundary}");
        let mut parts = Vec::new();
        let mut rest = &self.body[find(&self.body, delimiter.as_bytes()).context("no first delimiter")?..];
        loop {
            rest = &rest[delimiter.len()..];
            if rest.starts_with(b"--") {
                return Ok(parts);
            }
            let end = find(rest, b"\r\n\r\n").context("a part without a head")?;
            let head = String::from_utf8_lossy(&rest[..end]);
            rest = &rest[end + 4..];
            let length = find(rest, delimiter.as_bytes()).context("a part without an end")?;
            let range = header(&head, "Content-Range")
                .and_then(|value| value.strip_prefix("bytes ")?.split_once('/')?.0.split_once('-'))
                .and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)))
                .with_context(|| format!("a part without a range: {head}"))?;
            parts.push(Part { range, bytes: &rest[..length] });
            rest = &rest[length..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWO_PARTS: &str = "HTTP/1.1 206 Partial Content\r\nContent-Type: multipart/byteranges; boundary=xy\r\n\r\n\
        \r\n--xy\r\nContent-range: bytes 0-1/9\r\n\r\nab\r\n--xy\r\nContent-range: bytes 4-4/9\r\n\r\ne\r\n--xy--\r\n";

    #[test]
    fn parts_are_told_apart() {
        let answer = parse(TWO_PARTS.as_bytes()).expect("an answer");
        assert_eq!(answer.status, 206);
        let parts = answer.parts().expect("parts");
        assert_eq!(parts, [Part { range: (0, 1), bytes: b"ab" }, Part { range: (4, 4), bytes: b"e" }]);
    }

    #[test]
    fn chunks_are_put_together() {
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let answer = parse(format!("{head}3\r\nabc\r\na\r\n0123456789\r\n0\r\n\r\n").as_bytes());
        assert_eq!(answer.expect("an answer").body, b"abc0123456789");
        for cut in ["", "3\r\nabc", "3\r\nabc\r\n", "3\r\nabcd\r\n0\r\n\r\n", "ffffffffffffffff\r\n", "x\r\n"] {
            assert!(parse(format!("{head}{cut}").as_bytes()).is_err(), "{cut:?}");
        }
    }

    #[test]
    fn what_is_cut_off_is_no_answer() {
        let short = TWO_PARTS.trim_end_matches("\r\n--xy--\r\n");
        assert!(parse(short.as_bytes()).expect("a head").parts().is_err());
        assert!(parse(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab").is_err());
        assert!(parse(b"HTTP/1.1 200 OK\r\n").is_err());
    }
}
