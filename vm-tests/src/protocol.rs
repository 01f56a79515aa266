//! What host and guest say to each other over a virtio port: frames of a JSON header and a heap of bytes. Neither side is
//! hostile, but either may be damaged: lengths are checked.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    io::{ErrorKind, Read, Write},
};

/// Name of the virtio port.
pub const PORT: &str = "asap";

/// Folder of the guest that exists there only: test programs and temporary files. What a compiler is asked to read or write
/// below it is carried between guest and host; all other paths mean the host's files.
pub const GUEST: &str = "/asap-guest";

/// Programs that the guest does not have: the host runs them.
pub const HOSTED: [&str; 11] = ["gcc", "g++", "cc", "c++", "clang", "clang++", "rustc", "ld", "as", "objcopy", "strip"];

/// No frame is larger.
const LIMIT: usize = 512 << 20;

/// From host to guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToGuest {
    /// Run a test program.
    Run(Run),
    /// A compiler has ended; its files are in the heap.
    Compiled(Compiled),
    /// End the machine.
    PowerOff,
}

/// A test to run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Path of the program in the guest.
    pub program: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Seconds that it may take.
    pub limit: u64,
    /// Under which circumstances.
    pub setting: Setting,
}

/// What the system is like for a test, and all that it starts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// Numbers of system calls that fail with EPERM.
    pub forbidden_calls: Vec<u32>,
    /// Folders that are empty.
    pub emptied: Vec<String>,
    /// Files of the kernel, and what is written to them. They stay so.
    pub written: BTreeMap<String, String>,
}

/// From guest to host.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToHost {
    /// The guest has booted.
    Ready {
        /// `uname -r`.
        release: String,
    },
    /// The running test said the heap.
    Output,
    /// It has ended.
    Ended(Ended),
    /// It wants something compiled; the files are in the heap.
    Compile(Compile),
}

/// How a test ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ended {
    /// What it ended by.
    pub end: End,
    /// Processes that it left behind, with their names.
    pub left: Vec<String>,
    /// What the kernel complained of meanwhile.
    pub complaints: Vec<String>,
    /// Milliseconds that it took.
    pub took: u64,
}

/// What a test ended by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// It ended with this code.
    Code(i32),
    /// A signal ended it.
    Signal(i32),
    /// It did not end in time.
    TimeLimit,
    /// It could not be started.
    NotStarted(String),
}

/// A program of the host to run for the guest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Compile {
    /// Which request this is.
    pub id: u64,
    /// One of [`HOSTED`].
    pub program: String,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Its working directory.
    pub directory: String,
    /// What it reads from standard input.
    pub input: Vec<u8>,
    /// Files that it may read.
    pub files: Vec<FileHead>,
}

/// What came of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Compiled {
    /// Which request this answers.
    pub id: u64,
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub output: Vec<u8>,
    /// Standard error.
    pub errors: Vec<u8>,
    /// Files that it wrote.
    pub files: Vec<FileHead>,
}

/// A file whose bytes are in the heap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHead {
    /// Its path in the guest.
    pub path: String,
    /// Its permissions.
    pub mode: u32,
    /// How many bytes it has; they follow those of the file before.
    pub length: usize,
}

/// Sends a frame.
pub fn send(to: &mut impl Write, header: &impl Serialize, heap: &[u8]) -> Result<()> {
    let header = serde_json::to_vec(header)?;
    ensure!(header.len() < LIMIT && heap.len() < LIMIT, "a frame of {} bytes is too large", header.len() + heap.len());
    let mut frame = Vec::with_capacity(8 + header.len() + heap.len());
    frame.extend((header.len() as u32).to_le_bytes());
    frame.extend((heap.len() as u32).to_le_bytes());
    frame.extend(header);
    frame.extend(heap);
    to.write_all(&frame)?;
    Ok(to.flush()?)
}

/// Receives a frame; none if the other side is gone.
pub fn receive<T: DeserializeOwned>(from: &mut impl Read) -> Result<Option<(T, Vec<u8>)>> {
    let mut lengths = [0; 8];
    match from.read_exact(&mut lengths) {
        Ok(()) => (),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let length = |at: usize| lengths[at..at + 4].iter().rev().fold(0, |sum, &byte| sum << 8 | usize::from(byte));
    let (header, heap) = (length(0), length(4));
    ensure!(header < LIMIT && heap < LIMIT, "a frame that claims {header} and {heap} bytes");
    let mut bytes = vec![0; header + heap];
    from.read_exact(&mut bytes).context("half a frame")?;
    let heap = bytes.split_off(header);
    Ok(Some((serde_json::from_slice(&bytes).context("a frame that is not understood")?, heap)))
}

/// Takes the files out of a heap.
pub fn files(heads: &[FileHead], mut heap: &[u8]) -> Result<Vec<(FileHead, Vec<u8>)>> {
    let mut files = Vec::with_capacity(heads.len());
    for head in heads {
        let Some((bytes, rest)) = heap.split_at_checked(head.length) else {
            bail!("the bytes of {} are not all there", head.path);
        };
        files.push((head.clone(), bytes.to_vec()));
        heap = rest;
    }
    Ok(files)
}

/// The paths below [`GUEST`] that an argument names, wherever in it they are: `-I/asap-guest/x`, `-Wl,--script=/asap-guest/y`.
#[must_use]
pub fn guest_paths(argument: &str) -> Vec<&str> {
    let mut paths = Vec::new();
    for (at, _) in argument.match_indices(GUEST) {
        let path = &argument[at..];
        let path = &path[..path.find([',', ':', '=', '"', '\'']).unwrap_or(path.len())];
        if path.as_bytes().get(GUEST.len()).is_none_or(|&next| next == b'/') {
            paths.push(path);
        }
    }
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_arrives_as_it_was_sent_and_an_end_is_told_from_a_half_frame() {
        let mut wire = Vec::new();
        send(&mut wire, &ToHost::Output, b"a\0b").expect("sent");
        let whole = wire.clone();
        let (header, heap) = receive::<ToHost>(&mut wire.as_slice()).expect("received").expect("a frame");
        assert!(matches!(header, ToHost::Output));
        assert_eq!(heap, b"a\0b");
        assert!(receive::<ToHost>(&mut &whole[..0]).expect("the end").is_none());
        for cut in 8..whole.len() {
            assert!(receive::<ToHost>(&mut &whole[..cut]).is_err(), "cut at {cut}");
        }
        assert!(receive::<ToHost>(&mut &[0xff; 16][..]).is_err(), "no memory is taken for absurd lengths");
    }

    #[test]
    fn files_are_cut_from_the_heap_and_never_beyond_it() {
        let head = |path: &str, length| FileHead { path: path.to_owned(), mode: 0o644, length };
        let heads = [head("a", 2), head("b", 0), head("c", 1)];
        let bytes: Vec<_> = files(&heads, b"xyz").expect("all there").into_iter().map(|file| file.1).collect();
        assert_eq!(bytes, [b"xy".to_vec(), vec![], b"z".to_vec()]);
        assert!(files(&heads, b"xy").is_err());
    }

    #[test]
    fn paths_of_the_guest_are_found_inside_arguments() {
        assert_eq!(guest_paths("-I/asap-guest/tmp/a"), ["/asap-guest/tmp/a"]);
        assert_eq!(guest_paths("-Wl,-T=/asap-guest/x,-rpath,/asap-guest"), ["/asap-guest/x", "/asap-guest"]);
        assert!(guest_paths("/asap-guests/x /usr/include").is_empty());
    }
}
