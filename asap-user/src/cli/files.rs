//! Reads the files of a patch, within limits: what could never be one is refused without being read.

use super::{context::shown, signing};
use crate::{
    agent::protocol::MAX_OBJECTS,
    report::{Failure, PatchFile},
    signature::SUFFIX,
};
use std::{
    fs::OpenOptions,
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

/// Reads all files, with the signatures beside them.
pub fn read(paths: &[PathBuf]) -> Result<Vec<PatchFile>, Failure> {
    let mut left = MAX_OBJECTS as u64;
    paths.iter().map(|path| read_one(path, &mut left).and_then(|file| with_signature(path, file))).collect()
}

/// Reads one file without its signature.
pub fn read_plain(path: &Path) -> Result<PatchFile, Failure> {
    read_one(path, &mut (MAX_OBJECTS as u64))
}

/// Reads one file with the signature beside it, if there is one.
pub fn read_signed(path: &Path) -> Result<PatchFile, Failure> {
    read_plain(path).and_then(|file| with_signature(path, file))
}

/// What can't be read is no missing signature: that would look like a file that nobody has signed.
fn with_signature(path: &Path, file: PatchFile) -> Result<PatchFile, Failure> {
    let beside = signing::beside(path, SUFFIX);
    let signature = if beside.symlink_metadata().is_ok() { Some(signing::read_text(&beside)?) } else { None };
    Ok(PatchFile { signature, ..file })
}

fn read_one(path: &Path, left: &mut u64) -> Result<PatchFile, Failure> {
    let refuse =
        |why: String| Failure::refused(format!("{}: {why}", shown(path)), "name the object files of the patch");
    // Not to wait for the other end of a pipe.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
    let mut file = opened.map_err(|error| refuse(format!("can't be read: {error}")))?;
    let facts = file.metadata().map_err(|error| refuse(format!("can't be read: {error}")))?;
    if facts.is_dir() {
        return Err(refuse("is a directory".to_owned()));
    }
    if !facts.is_file() {
        return Err(refuse("is not a regular file".to_owned()));
    }
    let too_large = |size: u64| {
        let limit = MAX_OBJECTS >> 20;
        let size = size.div_ceil(1 << 20);
        Failure::refused(
            format!("{}: has {size} MiB; all files of a patch together may have {limit} MiB", shown(path)),
            "leave out debug information (objcopy --strip-debug), or split the patch",
        )
    };
    if facts.len() > *left {
        return Err(too_large(facts.len()));
    }
    let mut bytes = Vec::new();
    // One more than allowed, to notice a file that grows meanwhile.
    let read = (&mut file).take(*left + 1).read_to_end(&mut bytes);
    let length = read.map_err(|error| refuse(format!("can't be read: {error}")))? as u64;
    *left = left.checked_sub(length).ok_or_else(|| too_large(length))?;
    let name = path.file_name().map_or_else(|| path.to_string_lossy(), |name| name.to_string_lossy());
    Ok(PatchFile { name: name.into_owned(), bytes, signature: None })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, File};

    fn refusal(path: PathBuf) -> String {
        read(&[path]).expect_err("no patch file").message
    }

    #[test]
    fn files_are_read_and_named_without_their_directory() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("fix.o");
        fs::write(&path, "abc").expect("written");
        let files = read(&[path.clone(), path]).expect("read");
        assert_eq!(files.len(), 2);
        assert_eq!((files[0].name.as_str(), &files[0].bytes[..]), ("fix.o", &b"abc"[..]));
    }

    #[test]
    fn a_signature_beside_a_file_comes_with_it() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("fix.asap");
        fs::write(&path, "abc").expect("written");
        assert_eq!(read_signed(&path).expect("read").signature, None);
        let beside = dir.path().join("fix.asap.sig");
        fs::write(&beside, "signed").expect("written");
        assert_eq!(read(std::slice::from_ref(&path)).expect("read")[0].signature.as_deref(), Some("signed"));
        fs::write(&beside, b"\xff").expect("written");
        assert!(refusal(path).contains("fix.asap.sig can't be read"));
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        assert!(refusal(dir.path().join("missing.o")).contains("can't be read"));
        assert!(refusal(dir.path().to_owned()).contains("is a directory"));
        let pipe = dir.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        assert!(refusal(pipe).contains("not a regular file"));
    }

    #[test]
    fn a_large_file_is_refused_unread_and_so_are_many_that_are_large_together() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("large.o");
        let file = File::create(&path).expect("created");
        file.set_len(1 << 30).expect("a hole costs nothing");
        assert!(refusal(path.clone()).contains("has 1024 MiB"), "{}", refusal(path.clone()));
        file.set_len(40 << 20).expect("a smaller hole");
        assert_eq!(read(std::slice::from_ref(&path)).expect("fits alone").len(), 1);
        assert!(read(&[path.clone(), path]).is_err());
    }
}
