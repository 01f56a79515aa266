//! Which bytes of the file are mapped where (gABI, "Program Header").

use super::Image;
use crate::address::{ImageOffset, LoadBias, PAGE_SIZE, TargetAddr};
use std::ops::Range;

/// A PT_LOAD segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// p_offset.
    pub file_offset: u64,
    /// p_filesz.
    pub file_size: u64,
    /// p_vaddr.
    pub address: ImageOffset,
    /// p_memsz.
    pub memory_size: u64,
    /// PF_R.
    pub readable: bool,
    /// PF_W.
    pub writable: bool,
    /// PF_X.
    pub executable: bool,
}

/// PT_TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsSegment {
    /// Start of the initial image.
    pub address: ImageOffset,
    /// Length of the initial image, bytes.
    pub file_size: u64,
    /// Length in memory, bytes.
    pub memory_size: u64,
    /// Alignment, bytes.
    pub alignment: u64,
}

impl Segment {
    /// Its addresses.
    pub(super) fn mapped(&self) -> Range<u64> {
        self.address.0..self.address.0.saturating_add(self.memory_size)
    }

    /// The file holds the byte that is mapped at `at`. No segment goes round the end of the address space.
    pub(super) fn is_in_file(&self, at: ImageOffset) -> bool {
        at.0.checked_sub(self.address.0).is_some_and(|offset| offset < self.file_size)
    }
}

impl Image {
    /// The load bias, given one executable mapping as `/proc/PID/maps` shows it.
    #[must_use]
    pub fn load_bias(&self, mapping_start: TargetAddr, mapping_file_offset: u64) -> Option<LoadBias> {
        let page = |value: u64| value & !(PAGE_SIZE - 1);
        let segment = self.segments.iter().find(|s| {
            let end = s.file_offset.saturating_add(s.file_size);
            s.executable && page(s.file_offset) <= mapping_file_offset && mapping_file_offset < end
        })?;
        let address = page(segment.address.0).wrapping_add(mapping_file_offset - page(segment.file_offset));
        Some(LoadBias(mapping_start.0.wrapping_sub(address)))
    }

    /// `length` bytes of the file that are mapped at `at`.
    #[must_use]
    pub fn bytes_at(&self, at: ImageOffset, length: usize) -> Option<&[u8]> {
        self.file_tail(at)?.get(..length)
    }

    /// Offset in the file of what is mapped at `at`.
    #[must_use]
    pub fn file_offset(&self, at: ImageOffset) -> Option<u64> {
        self.file_range(at).map(|range| range.start as u64)
    }

    /// Where the file holds what is mapped from `at` to the end of its segment. Lies within the file.
    pub(super) fn file_range(&self, at: ImageOffset) -> Option<Range<usize>> {
        let segment = self.segments.iter().find(|segment| segment.is_in_file(at))?;
        let start = segment.file_offset.checked_add(at.0 - segment.address.0)?;
        let end = usize::try_from(segment.file_offset.checked_add(segment.file_size)?).ok()?;
        let (start, end) = (usize::try_from(start).ok()?, end.min(self.bytes.bytes().len()));
        (start < end).then_some(start..end)
    }

    /// File bytes from `at` to the end of its segment.
    pub(super) fn file_tail(&self, at: ImageOffset) -> Option<&[u8]> {
        self.bytes.bytes().get(self.file_range(at)?)
    }
}
