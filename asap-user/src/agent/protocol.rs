//! One request or reply per line of JSON, each line bounded, and what a request may be like. Reading only; what becomes of a
//! request is decided by the session.

use crate::report::{Request, ScopedWork};
use std::{io, time::Duration};
use tokio::{
    io::{AsyncBufRead, AsyncBufReadExt},
    time::timeout,
};

/// Most bytes of object files in one request.
pub const MAX_OBJECTS: usize = 64 << 20;
/// Longest line; the object files travel as base64, a third longer than they are.
pub const MAX_LINE: usize = 96 << 20;
/// Lines above this are read by one session at a time.
pub const LARGE_LINE: usize = 1 << 20;
/// How long a client may be silent, between its requests or in the middle of one.
pub const LINE_PATIENCE: Duration = Duration::from_secs(20);

/// Most functions in one request.
const MAX_FUNCTIONS: usize = 4096;
/// Most processes in one request.
const MAX_MEMBERS: usize = 1 << 16;
/// Longest name of anything; C++ names are long.
const MAX_NAME: usize = 16 << 10;

/// What came of reading a line.
#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    /// It is complete, and here without its end.
    Complete(Vec<u8>),
    /// It grew beyond `limit`; reading on with a higher one is possible.
    Longer(Vec<u8>),
    /// The peer closed the connection, between lines.
    End,
    /// The peer closed the connection in the middle of a line.
    Half,
    /// The peer fell silent.
    Silent,
}

/// Reads on from what `line` holds to the end of the line, or until it has more than `limit` bytes.
///
/// # Errors
/// The connection broke.
pub async fn read_line(
    reader: &mut (impl AsyncBufRead + Unpin),
    mut line: Vec<u8>,
    limit: usize,
    patience: Duration,
) -> io::Result<Line> {
    loop {
        let Ok(chunk) = timeout(patience, reader.fill_buf()).await else { return Ok(Line::Silent) };
        let chunk = chunk?;
        if chunk.is_empty() {
            return Ok(if line.is_empty() { Line::End } else { Line::Half });
        }
        let end = chunk.iter().position(|&byte| byte == b'\n');
        let part = &chunk[..end.unwrap_or(chunk.len())];
        line.extend_from_slice(part);
        let used = part.len();
        if line.len() > limit {
            // The newline stays unread, so that reading on finds it.
            reader.consume(used);
            return Ok(Line::Longer(line));
        }
        reader.consume(used + usize::from(end.is_some()));
        if end.is_some() {
            return Ok(Line::Complete(line));
        }
    }
}

/// The request in a line.
///
/// # Errors
/// It is none, or asks for too much; the words are for who sent it.
pub fn request(line: &[u8]) -> Result<Request, String> {
    let request = serde_json::from_slice::<Request>(line).map_err(|error| {
        let version = env!("CARGO_PKG_VERSION");
        format!("the agent (version {version}) can't read the request: {error}")
    })?;
    check(&request).map(|()| request)
}

/// Sizes and numbers that can be refused without knowing any target.
fn check(request: &Request) -> Result<(), String> {
    let name_fits = |name: &str| {
        if name.len() <= MAX_NAME { Ok(()) } else { Err(format!("a name of {} bytes is too long", name.len())) }
    };
    match request {
        Request::Scoped(request) => {
            if request.members.len() > MAX_MEMBERS {
                return Err(format!("{} processes in one request, more than {MAX_MEMBERS}", request.members.len()));
            }
            match &request.work {
                ScopedWork::Patch(request) => check(&Request::Patch(request.clone())),
                ScopedWork::Attach { .. } => Ok(()),
            }
        }
        Request::Patch(request) => {
            let total: usize = request.files.iter().map(|file| file.bytes.len()).sum();
            if total > MAX_OBJECTS {
                return Err(format!("the object files have {total} bytes, more than {MAX_OBJECTS}"));
            }
            if request.functions.len() > MAX_FUNCTIONS {
                return Err(format!("{} functions in one patch, more than {MAX_FUNCTIONS}", request.functions.len()));
            }
            request.name.as_deref().map_or(Ok(()), name_fits)?;
            request.files.iter().try_for_each(|file| name_fits(&file.name))?;
            request.functions.iter().try_for_each(|function| name_fits(function))
        }
        Request::Revert(request) => request.patch.as_deref().map_or(Ok(()), name_fits),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::BufReader;

    fn read(input: &[u8], limit: usize) -> Vec<Line> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            // A small buffer, so that lines come in pieces.
            let mut reader = BufReader::with_capacity(3, input);
            let mut lines = Vec::new();
            loop {
                let line = read_line(&mut reader, Vec::new(), limit, LINE_PATIENCE).await.expect("memory reads");
                let last = !matches!(line, Line::Complete(_));
                lines.push(line);
                if last {
                    return lines;
                }
            }
        })
    }

    #[test]
    fn lines_end_at_newlines_and_a_half_line_is_told_from_an_end() {
        assert_eq!(
            read(b"one\n\ntwo\n", 10),
            [Line::Complete(b"one".to_vec()), Line::Complete(Vec::new()), Line::Complete(b"two".to_vec()), Line::End]
        );
        assert_eq!(read(b"one\ntw", 10), [Line::Complete(b"one".to_vec()), Line::Half]);
    }

    #[test]
    fn a_line_is_never_read_much_beyond_its_limit() {
        assert_eq!(read(b"1234\n", 4), [Line::Complete(b"1234".to_vec()), Line::End]);
        let [Line::Longer(part)] = &read(b"12345678901234567890\n", 4)[..] else { panic!("too long") };
        assert!(part.len() <= 4 + 3, "{}", part.len());
    }

    #[test]
    fn reading_on_with_a_higher_limit_gives_the_whole_line() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            for capacity in 1..9 {
                let mut reader = BufReader::with_capacity(capacity, &b"12345\nnext\n"[..]);
                let first = read_line(&mut reader, Vec::new(), 4, LINE_PATIENCE).await.expect("memory");
                let Line::Longer(part) = first else { panic!("{first:?}") };
                let whole = read_line(&mut reader, part, 5, LINE_PATIENCE).await.expect("memory");
                assert_eq!(whole, Line::Complete(b"12345".to_vec()));
                let next = read_line(&mut reader, Vec::new(), 4, LINE_PATIENCE).await.expect("memory");
                assert_eq!(next, Line::Complete(b"next".to_vec()));
            }
        });
    }

    #[test]
    fn a_silent_peer_is_given_up() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let (_open, silent) = tokio::io::duplex(16);
            let mut reader = BufReader::new(silent);
            let line = read_line(&mut reader, Vec::new(), 10, Duration::from_millis(5)).await.expect("open");
            assert_eq!(line, Line::Silent);
        });
    }
}
