//! Files of keys and signatures, as the commands `keygen`, `sign` and `verify` read and write them.

use super::context::shown;
use crate::{
    agent::{AgentOptions, DEFAULT_KEYS},
    report::Failure,
    signature::{SignatureError, TEXT_MOST},
};
use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Whose patches an agent accepts.
#[derive(Clone, Debug, clap::Args)]
pub struct TrustOptions {
    /// Folder of public keys (`*.pub`) whose signatures are trusted; only root may be able to write there. With a file
    /// `required` in it, the agent accepts signed patches only.
    #[arg(long, value_name = "DIR", env = "ASAP_KEYS", default_value = DEFAULT_KEYS)]
    keys: PathBuf,
    /// Accept only patch files with the signature of a trusted key, until the agent ends.
    #[arg(long)]
    pub require_signature: bool,
}

impl TrustOptions {
    /// Has an agent keep to it.
    pub fn bind(&self, options: AgentOptions) -> AgentOptions {
        let keys = std::path::absolute(&self.keys).unwrap_or_else(|_| self.keys.clone());
        AgentOptions { keys, require_signature: self.require_signature, ..options }
    }
}

/// `path` with something after its whole name.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// Makes a file that was not there.
pub fn create(path: &Path, mode: u32, text: &str) -> Result<(), Failure> {
    let opened = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let written = opened.and_then(|mut file| {
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
        // Half a key helps nobody.
        written.inspect_err(|_| drop(fs::remove_file(path)))
    });
    written
        .map_err(|error| Failure::refused(format!("{} can't be written: {error}", shown(path)), "choose another place"))
}

/// Makes a file, or puts a new one in the place of an old one: readers see one or the other, never a part.
pub fn replace(path: &Path, text: &str) -> Result<(), Failure> {
    let new = beside(path, &format!(".{}", std::process::id()));
    create(&new, 0o644, text)?;
    fs::rename(&new, path).map_err(|error| {
        let _ = fs::remove_file(&new);
        Failure::refused(format!("{} can't be written: {error}", shown(path)), "choose another place")
    })
}

/// The text of a small file.
pub fn read_text(path: &Path) -> Result<String, Failure> {
    open(path).and_then(|(file, _)| text_of(file)).map_err(|error| unreadable(path, &error))
}

/// The text of a secret key's file, which must be closed to all others.
pub fn read_secret(path: &Path) -> Result<String, Failure> {
    let (file, mode) = open(path).map_err(|error| unreadable(path, &error))?;
    if mode & 0o077 != 0 {
        return Err(Failure::refused(
            format!("others may have read the secret key {} (mode {:04o})", shown(path), mode & 0o7777),
            "make a new one with `asap keygen`; or close it with chmod 0600, if nobody else was there",
        ));
    }
    text_of(file).map_err(|error| unreadable(path, &error))
}

fn open(path: &Path) -> io::Result<(File, u32)> {
    // Not to wait for the other end of a pipe.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path)?;
    let facts = file.metadata()?;
    if facts.is_file() { Ok((file, facts.mode())) } else { Err(io::Error::other("it is not a regular file")) }
}

fn text_of(file: File) -> io::Result<String> {
    let mut text = String::new();
    // One more than any key or signature has, so that whoever reads the text sees that it is too long.
    file.take(TEXT_MOST as u64 + 1).read_to_string(&mut text)?;
    Ok(text)
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    Failure::refused(format!("{} can't be read: {error}", shown(path)), "name a file that was made by `asap keygen`")
}

/// A key that is none, or does not do what it is for.
pub fn unusable(path: &Path, error: &SignatureError) -> Failure {
    Failure::refused(format!("{}: {error}", shown(path)), "name the right key or file")
}
