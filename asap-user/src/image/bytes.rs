//! The bytes of an image, and the string tables in them. Cheap to share; nothing is copied out of a file that is mapped.

use std::{
    fs::File,
    io::{self, Read, Seek},
    ops::{Deref, Range},
    os::unix::fs::MetadataExt,
    sync::Arc,
};

/// The bytes of an image: owned, or a mapped file.
#[derive(Clone)]
pub struct ImageBytes(Arc<dyn Deref<Target = [u8]> + Send + Sync>);

impl From<Vec<u8>> for ImageBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Arc::new(bytes))
    }
}

impl ImageBytes {
    /// Maps a file that only root can change; reads any other, as far as there is `room` (bytes, which it takes from it). Who can
    /// cut a file short while it is mapped here could end the agent (SIGBUS).
    ///
    /// # Errors
    /// It can't be mapped or read, or is too large to be read.
    pub fn map(file: &File, room: &mut u64) -> io::Result<Self> {
        let status = file.metadata()?;
        if status.uid() == 0 && status.mode() & 0o022 == 0 {
            // SAFETY: only root can change the file, and who replaces a program's file in place instead of by rename breaks
            // every process that runs it. The bytes are parsed with checked bounds throughout.
            return Ok(Self(Arc::new(unsafe { memmap2::Mmap::map(file)? })));
        }
        Self::read(file, room)
    }

    /// Reads a file, as far as there is `room` (bytes, which it takes from it).
    ///
    /// # Errors
    /// It can't be read, or is larger than that.
    pub fn read(mut file: &File, room: &mut u64) -> io::Result<Self> {
        let length = file.metadata()?.len();
        *room = room.checked_sub(length).ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::FileTooLarge,
                "larger than what is read of files that others than root can change",
            )
        })?;
        let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or_default());
        file.rewind()?;
        file.take(length).read_to_end(&mut bytes)?;
        Ok(Self::from(bytes))
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Longest name that is read, bytes. A damaged table may hold one that goes on to the end of the file.
pub(super) const NAME_MOST: usize = 16 << 10;

/// A string table: names are referred to by their offset and stay where they are.
#[derive(Clone)]
pub(super) struct Strings {
    file: ImageBytes,
    range: Range<usize>,
}

impl Strings {
    /// The table in `range` of `file`, cut at the file's end.
    pub(super) fn new(file: &ImageBytes, range: Range<usize>) -> Self {
        let end = range.end.min(file.bytes().len());
        Self { file: file.clone(), range: range.start.min(end)..end }
    }

    /// Length of the table, bytes.
    pub(super) fn len(&self) -> usize {
        self.range.len()
    }

    /// The name at `at`, without its NUL; `None` for one that has no end, or none within reason.
    pub(super) fn name(&self, at: u32) -> Option<&[u8]> {
        let tail = self.file.bytes()[self.range.clone()].get(at as usize..)?;
        let tail = &tail[..tail.len().min(NAME_MOST)];
        Some(&tail[..memchr::memchr(0, tail)?])
    }

    /// The same as text.
    pub(super) fn text(&self, at: u32) -> Option<String> {
        self.name(at).map(|name| String::from_utf8_lossy(name).into_owned())
    }
}

/// How many bytes of names may be read while an index is built: a table whose names overlap again and again is damaged, and
/// must not cost the square of its size.
pub(super) struct NameBudget(usize);

impl NameBudget {
    /// Enough for a table of `length` bytes in which names share their ends.
    pub(super) fn for_table(length: usize) -> Self {
        Self(length.saturating_mul(8).saturating_add(1 << 20))
    }

    /// Takes the length of a name, or of the search for its end in vain; false when nothing is left.
    pub(super) fn spend(&mut self, name: Option<&[u8]>) -> bool {
        let rest = self.0.checked_sub(name.map_or(NAME_MOST, |name| name.len() + 1));
        self.0 = rest.unwrap_or_default();
        rest.is_some()
    }
}

/// A short hash of a name. A hostile table gains nothing but a slow search in its own names.
pub(super) fn hash(name: &[u8]) -> u32 {
    let (words, rest) = name.as_chunks::<8>();
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    let words = words.iter().chain([&last]).map(|word| u64::from_le_bytes(*word));
    let mixed = words.fold(name.len() as u64, |hash, word| {
        let mixed = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed ^ (mixed >> 29)
    });
    (mixed ^ (mixed >> 32)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_end_within_their_table() {
        let file = ImageBytes::from(b"xx\0abc\0def".to_vec());
        let table = Strings::new(&file, 2..usize::MAX);
        assert_eq!(table.name(1), Some(&b"abc"[..]));
        assert_eq!(table.name(3), Some(&b"c"[..]));
        assert_eq!(table.name(5), None, "no end");
        assert_eq!(table.name(u32::MAX), None);
        assert_eq!(Strings::new(&file, 90..95).name(0), None);
        let long = ImageBytes::from(vec![b'x'; NAME_MOST * 2]);
        assert_eq!(Strings::new(&long, 0..NAME_MOST * 2).name(0), None);
    }

    #[test]
    fn a_file_that_others_can_change_is_read_rather_than_mapped() {
        use std::{io::Write, os::unix::fs::PermissionsExt};
        let mut file = tempfile::NamedTempFile::new().expect("a file");
        file.write_all(&[7; 8192]).expect("written");
        file.as_file().set_permissions(std::fs::Permissions::from_mode(0o666)).expect("changed");
        let bytes = ImageBytes::map(file.as_file(), &mut (1 << 20)).expect("read");
        // Reading a mapping behind its file's end would end this test by SIGBUS.
        file.as_file().set_len(0).expect("cut");
        assert!(bytes.bytes() == [7; 8192]);
    }
}
