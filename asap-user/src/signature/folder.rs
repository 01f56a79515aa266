//! A folder of trusted public keys, `*.pub`. Everything in it must be its owner's alone: whoever could write there could let
//! any patch in. What can't be read or trusted is an error and not left out: nobody should believe in a key that is not used.

use super::{PublicKey, TEXT_MOST};
use nix::{
    dir::Dir,
    fcntl::{OFlag, openat},
    sys::stat::Mode,
};
use std::{
    fs::File,
    io::{self, Read},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

/// An agent that finds a file of this name in its folder of keys accepts signed patches only.
pub const REQUIRED: &str = "required";
/// Most keys in a folder.
const KEYS_MOST: usize = 256;

/// The folder can't be trusted or read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the trusted keys can't be used: {path}: {why}", path = path.display())]
pub struct FolderError {
    /// The folder, or the file in it.
    pub path: PathBuf,
    /// What is wrong with it.
    pub why: String,
}

/// What a folder says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Trusted {
    /// The keys, ordered by the names of their files.
    pub keys: Vec<PublicKey>,
    /// Whether patches without a signature are refused.
    pub required: bool,
}

/// Reads a folder; one that is not there holds no keys and demands nothing.
///
/// # Errors
/// It or a key in it belongs to somebody else, can be written by others, is a symbolic link, or is no key.
pub fn read(path: &Path) -> Result<Trusted, FolderError> {
    let failed = |name: &Path, why: String| FolderError { path: path.join(name), why };
    let own = |error: io::Error| FolderError { path: path.to_owned(), why: error.to_string() };
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut folder = match Dir::open(path, flags, Mode::empty()) {
        Err(nix::errno::Errno::ENOENT) => return Ok(Trusted::default()),
        opened => opened.map_err(|error| own(error.into()))?,
    };
    let facts = nix::sys::stat::fstat(&folder).map_err(|error| own(error.into()))?;
    check_owner(facts.st_uid, facts.st_mode).map_err(|why| FolderError { path: path.to_owned(), why })?;
    let mut names = Vec::new();
    let mut trusted = Trusted::default();
    for entry in folder.iter() {
        let entry = entry.map_err(|error| own(error.into()))?;
        let name = PathBuf::from(std::ffi::OsStr::from_bytes(entry.file_name().to_bytes()));
        trusted.required |= name.as_os_str() == REQUIRED;
        if name.extension().is_some_and(|extension| extension == "pub") {
            names.push(name);
        }
        if names.len() > KEYS_MOST {
            return Err(failed(Path::new(""), format!("it holds more than {KEYS_MOST} keys")));
        }
    }
    names.sort_unstable();
    for name in names {
        // Opened within the folder that was looked at, whatever its path leads to by now.
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let opened = openat(&folder, &name, flags, Mode::empty());
        let file = File::from(opened.map_err(|error| failed(&name, io::Error::from(error).to_string()))?);
        let text = text_of(file).map_err(|why| failed(&name, why))?;
        trusted.keys.push(PublicKey::parse(&text).map_err(|error| failed(&name, error.to_string()))?);
    }
    Ok(trusted)
}

fn text_of(mut file: File) -> Result<String, String> {
    let facts = file.metadata().map_err(|error| error.to_string())?;
    if !facts.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    check_owner(facts.uid(), facts.mode())?;
    let mut text = String::new();
    let read = (&mut file).take(TEXT_MOST as u64 + 1).read_to_string(&mut text);
    read.map_err(|error| error.to_string())?;
    Ok(text)
}

fn check_owner(uid: u32, mode: u32) -> Result<(), String> {
    let us = nix::unistd::geteuid().as_raw();
    if uid != us && uid != 0 {
        return Err(format!("it belongs to user {uid}, and keys must be of user {us} or root"));
    }
    if mode & 0o022 != 0 {
        return Err(format!("others can write it (mode {:04o}); close it with chmod go-w", mode & 0o7777));
    }
    Ok(())
}
