//! Writes the archive that the kernel unpacks into its first file system: cpio in the "newc" format
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use anyhow::{Context, Result, bail};
use std::{collections::BTreeMap, io::Write, path::Path};

/// What is at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    Folder(u32),
    File(u32, Vec<u8>),
    Link(String),
    /// Character device: major, minor.
    Device(u32, u32),
}

/// An archive in the making. Paths are absolute.
#[derive(Clone, Debug, Default)]
pub struct Archive {
    // In order: a folder comes before what is in it.
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// Adds a folder, and those above it.
    pub fn folder(&mut self, path: &str, mode: u32) -> Result<()> {
        let path = clean(path)?;
        self.above(&path);
        self.entries.insert(path, Entry::Folder(mode));
        Ok(())
    }

    /// Adds a file.
    pub fn file(&mut self, path: &str, mode: u32, bytes: Vec<u8>) -> Result<()> {
        self.put(path, Entry::File(mode, bytes))
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, to: &str) -> Result<()> {
        self.put(path, Entry::Link(to.to_owned()))
    }

    /// Adds a character device.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.put(path, Entry::Device(major, minor))
    }

    /// Whether something is there.
    #[must_use]
    pub fn has(&self, path: &str) -> bool {
        clean(path).is_ok_and(|path| self.entries.contains_key(&path))
    }

    fn put(&mut self, path: &str, entry: Entry) -> Result<()> {
        let path = clean(path)?;
        self.above(&path);
        self.entries.insert(path, entry);
        Ok(())
    }

    fn above(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            self.entries.entry(path[..at].to_owned()).or_insert(Entry::Folder(0o755));
        }
    }

    /// Writes it all.
    pub fn write(&self, to: &mut impl Write) -> Result<()> {
        let entries = self.entries.iter().map(|(path, entry)| (path.as_str(), entry));
        for (number, (path, entry)) in entries.enumerate() {
            let none = &b""[..];
            let (mode, bytes, device) = match entry {
                Entry::Folder(mode) => (0o040_000 | mode, none, (0, 0)),
                Entry::File(mode, bytes) => (0o100_000 | mode, bytes.as_slice(), (0, 0)),
                Entry::Link(to) => (0o120_777, to.as_bytes(), (0, 0)),
                Entry::Device(major, minor) => (0o020_666, none, (*major, *minor)),
            };
            record(to, number as u32 + 1, path, mode, bytes, device)?;
        }
        record(to, 0, "TRAILER!!!", 0, b"", (0, 0))
    }
}

/// The path as the archive names it.
fn clean(path: &str) -> Result<String> {
    let Some(below) = path.strip_prefix('/') else { bail!("{path} is not absolute") };
    let normal = |part: &str| !part.is_empty() && part != "." && part != "..";
    if !below.split('/').all(normal) || below.contains('\0') {
        bail!("{path} is not in its shortest form");
    }
    Ok(below.to_owned())
}

fn record(
    to: &mut impl Write,
    number: u32,
    path: &str,
    mode: u32,
    bytes: &[u8],
    (major, minor): (u32, u32),
) -> Result<()> {
    let length = u32::try_from(bytes.len()).with_context(|| format!("{path} is too large"))?;
    let name = path.len() as u32 + 1;
    write!(to, "070701")?;
    for field in [number, mode, 0, 0, 1, 0, length, 0, 0, major, minor, name, 0] {
        write!(to, "{field:08X}")?;
    }
    // Name and content are padded to words; the header has 110 bytes.
    to.write_all(path.as_bytes())?;
    to.write_all(&[0; 4][..1 + padding(110 + path.len() + 1)])?;
    to.write_all(bytes)?;
    to.write_all(&[0; 3][..padding(bytes.len())])?;
    Ok(())
}

const fn padding(length: usize) -> usize {
    length.next_multiple_of(4) - length
}

/// Writes an archive to a file.
pub fn store(archive: &Archive, path: &Path) -> Result<()> {
    let file = std::fs::File::create(path).with_context(|| format!("{} can't be made", path.display()))?;
    let mut file = std::io::BufWriter::new(file);
    archive.write(&mut file)?;
    Ok(file.flush()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads it as the kernel does: header, name, content, each padded.
    fn read(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let (mut at, mut found) = (0, Vec::new());
        loop {
            assert_eq!(&bytes[at..at + 6], b"070701", "magic at {at}");
            let field = |number: usize| {
                let text = std::str::from_utf8(&bytes[at + 6 + 8 * number..][..8]).expect("digits");
                usize::from_str_radix(text, 16).expect("a number")
            };
            let (mode, length, name) = (field(1), field(6), field(11));
            let path = String::from_utf8(bytes[at + 110..at + 110 + name - 1].to_vec()).expect("text");
            let content = (at + 110 + name).next_multiple_of(4);
            let next = (content + length).next_multiple_of(4);
            if path == "TRAILER!!!" {
                assert_eq!(next, bytes.len());
                return found;
            }
            found.push((path, mode as u32, bytes[content..content + length].to_vec()));
            at = next;
        }
    }

    #[test]
    fn what_goes_in_can_be_read_and_folders_come_first() {
        let mut archive = Archive::default();
        archive.file("/a/b/file", 0o755, b"12345".to_vec()).expect("added");
        archive.link("/a/link", "b/file").expect("added");
        archive.folder("/a/b", 0o700).expect("added");
        archive.device("/dev/null", 1, 3).expect("added");
        let mut bytes = Vec::new();
        archive.write(&mut bytes).expect("written");
        let found = read(&bytes);
        let expected: [(&str, u32, &[u8]); 6] = [
            ("a", 0o040_755, b""),
            ("a/b", 0o040_700, b""),
            ("a/b/file", 0o100_755, b"12345"),
            ("a/link", 0o120_777, b"b/file"),
            ("dev", 0o040_755, b""),
            ("dev/null", 0o020_666, b""),
        ];
        assert_eq!(found, expected.map(|(path, mode, bytes)| (path.to_owned(), mode, bytes.to_vec())));
        assert!(archive.has("/a/link") && !archive.has("/b"));
    }

    #[test]
    fn paths_that_lead_elsewhere_are_refused() {
        for path in ["a", "/a/../b", "//a", "/a/", "/"] {
            assert!(Archive::default().file(path, 0o644, vec![]).is_err(), "{path}");
        }
    }
}
