//! The unwind tables of an image, and the function bounds that they tell: stripped files keep them. Found by a binary search
//! in .eh_frame_hdr (LSB, "DWARF Extensions"), or by reading .eh_frame once where there is no such index.

use super::{Image, Segment};
use crate::address::ImageOffset;
use gimli::{
    BaseAddresses, CieOrFde, EhFrame, EhFrameOffset, EndianSlice, FrameDescriptionEntry, LittleEndian, UnwindSection,
};
use object::{
    LittleEndian as LE, elf,
    read::elf::{ProgramHeader, SectionHeader, SectionTable},
};
use std::{ops::Range, sync::OnceLock};

/// Sections for an unwinder, with their addresses in the image.
#[derive(Clone, Debug, Default)]
pub struct UnwindSections<'a> {
    /// .eh_frame_hdr.
    pub eh_frame_hdr: Option<(ImageOffset, &'a [u8])>,
    /// .eh_frame, to the end of its segment.
    pub eh_frame: Option<(ImageOffset, &'a [u8])>,
    /// The executable segment: address and file bytes.
    pub text: Option<(ImageOffset, &'a [u8])>,
}

/// Where the tables are. Read with checked bounds each time: most images are asked for a few addresses only.
#[derive(Debug, Default)]
pub(super) struct Tables {
    header: Option<(ImageOffset, usize)>,
    /// .eh_frame_hdr has a sorted index in the form that all linkers write.
    has_index: bool,
    frames: Option<ImageOffset>,
    /// First address, and offset in .eh_frame, of each entry, sorted; only where there is no index.
    listed: OnceLock<Vec<(u64, usize)>>,
}

type Reader<'a> = EndianSlice<'a, LittleEndian>;
type Fde<'a> = FrameDescriptionEntry<Reader<'a>>;

/// Where the index begins in .eh_frame_hdr: four bytes of encodings, the address of .eh_frame, a count.
const INDEX_AT: usize = 12;

impl Tables {
    pub(super) fn locate(
        programs: &[elf::ProgramHeader64<LE>],
        sections: Option<&SectionTable<'_, elf::FileHeader64<LE>>>,
        segments: &[Segment],
        data: &[u8],
    ) -> Self {
        let mut tables = Self::default();
        let is_mapped = |at: u64| segments.iter().any(|segment| segment.is_in_file(ImageOffset(at)));
        let program = programs.iter().find(|p| p.p_type(LE) == elf::PT_GNU_EH_FRAME);
        if let Some((at, bytes)) = program.and_then(|p| Some((p.p_vaddr(LE), p.data(LE, data).ok()?))) {
            tables.header = Some((ImageOffset(at), bytes.len()));
            // Version 1; .eh_frame relative to here (sdata4), count as udata4, index relative to the header (sdata4).
            if let Some(relative) = bytes.strip_prefix(&[1, 0x1b, 0x03, 0x3b]).and_then(|rest| rest.first_chunk()) {
                let frames = at.wrapping_add(4).wrapping_add_signed(i64::from(i32::from_le_bytes(*relative)));
                if bytes.len() >= INDEX_AT && is_mapped(frames) {
                    (tables.has_index, tables.frames) = (true, Some(ImageOffset(frames)));
                }
            }
        }
        if tables.frames.is_none()
            && let Some((_, section)) = sections.and_then(|sections| sections.section_by_name(LE, b".eh_frame"))
        {
            tables.frames = Some(ImageOffset(section.sh_addr(LE))).filter(|at| is_mapped(at.0));
        }
        tables
    }

    pub(super) fn sections<'a>(&self, image: &'a Image) -> UnwindSections<'a> {
        let text = image.segments.iter().find(|s| s.executable);
        UnwindSections {
            eh_frame_hdr: self.header.and_then(|(at, length)| Some((at, image.bytes_at(at, length)?))),
            eh_frame: self.frames.and_then(|at| Some((at, image.file_tail(at)?))),
            text: text.and_then(|s| Some((s.address, image.bytes_at(s.address, usize::try_from(s.file_size).ok()?)?))),
        }
    }

    /// Bounds of the table entry that holds `at`.
    pub(super) fn bounds_at(&self, image: &Image, at: ImageOffset) -> Option<Range<ImageOffset>> {
        Open::of(self, image)?.fde_at(at.0).and_then(|fde| bounds(&fde))
    }

    /// Offset in .eh_frame of the entry that holds `at`.
    pub(super) fn entry_at(&self, image: &Image, at: ImageOffset) -> Option<usize> {
        Open::of(self, image)?.fde_at(at.0).map(|fde| fde.offset())
    }

    /// At `start`, where a table entry begins, only the return address lies above the stack pointer, as after a call.
    pub(super) fn begins_like_a_function(&self, image: &Image, start: ImageOffset) -> bool {
        let Some(open) = Open::of(self, image) else { return false };
        let Some(fde) = open.fde_at(start.0) else { return false };
        let mut context = gimli::UnwindContext::new();
        let row = fde.unwind_info_for_address(&open.frames, &open.bases, &mut context, start.0);
        row.is_ok_and(is_bare)
    }

    /// Where, in all code that the table describes, only the return address lies above the stack pointer; by address.
    pub(super) fn bare_frames(&self, image: &Image) -> Vec<Range<ImageOffset>> {
        let Some(open) = Open::of(self, image) else { return Vec::new() };
        let mut context = gimli::UnwindContext::new();
        let mut found: Vec<Range<ImageOffset>> = Vec::new();
        for fde in open.fdes() {
            let Ok(mut rows) = fde.rows(&open.frames, &open.bases, &mut context) else { continue };
            while let Ok(Some(row)) = rows.next_row() {
                if is_bare(row) && row.start_address() < row.end_address() {
                    found.push(ImageOffset(row.start_address())..ImageOffset(row.end_address()));
                }
            }
        }
        found.sort_unstable_by_key(|range| (range.start, range.end));
        found
    }

    /// Where the exception table is of the code that begins at `start`.
    pub(super) fn lsda(&self, image: &Image, start: ImageOffset) -> Option<gimli::Pointer> {
        Open::of(self, image)?.fde_at(start.0).filter(|fde| fde.initial_address() == start.0)?.lsda()
    }

    /// Bounds of all entries, by address.
    pub(super) fn all(&self, image: &Image) -> Vec<Range<ImageOffset>> {
        let Some(open) = Open::of(self, image) else { return Vec::new() };
        let fdes = open.fdes();
        let mut all: Vec<_> = fdes.iter().filter(|fde| !fde.is_signal_trampoline()).filter_map(bounds).collect();
        all.sort_unstable_by_key(|range| (range.start, range.end));
        all.dedup_by_key(|range| range.start);
        all
    }

    /// Bounds of what signal handlers return to. Such an entry begins in front of its first instruction: unwinders look up
    /// return addresses less one (gcc, "S" augmentation).
    pub(super) fn signal_trampolines(&self, image: &Image) -> Vec<Range<ImageOffset>> {
        let Some(open) = Open::of(self, image) else { return Vec::new() };
        open.fdes().iter().filter(|fde| fde.is_signal_trampoline()).filter_map(bounds).collect()
    }
}

/// Only the return address lies above the stack pointer.
fn is_bare(row: &gimli::UnwindTableRow<usize>) -> bool {
    matches!(row.cfa(), gimli::CfaRule::RegisterAndOffset { register, offset: 8 } if *register == gimli::X86_64::RSP)
}

fn bounds(fde: &Fde<'_>) -> Option<Range<ImageOffset>> {
    let end = fde.initial_address().checked_add(fde.len())?;
    Some(ImageOffset(fde.initial_address())..ImageOffset(end))
}

/// The tables with their bytes at hand.
struct Open<'a> {
    header_at: u64,
    frames_at: u64,
    length: usize,
    index: Option<&'a [u8]>,
    listed: &'a [(u64, usize)],
    frames: EhFrame<Reader<'a>>,
    bases: BaseAddresses,
}

impl<'a> Open<'a> {
    fn of(tables: &'a Tables, image: &'a Image) -> Option<Self> {
        let sections = tables.sections(image);
        let (ImageOffset(frames_at), bytes) = sections.eh_frame?;
        let mut open = Self {
            header_at: 0,
            frames_at,
            length: bytes.len(),
            index: None,
            listed: &[],
            frames: EhFrame::new(bytes, LittleEndian),
            bases: BaseAddresses::default().set_eh_frame(frames_at),
        };
        match sections.eh_frame_hdr {
            Some((ImageOffset(header_at), header)) if tables.has_index => {
                let count = header.get(8..INDEX_AT)?.try_into().map_or(0, u32::from_le_bytes) as usize;
                let rows = header.get(INDEX_AT..)?;
                open.header_at = header_at;
                open.index = Some(&rows[..rows.len().min(count.saturating_mul(8))]);
            }
            _ => open.listed = tables.listed.get_or_init(|| open.list()),
        }
        Some(open)
    }

    /// Reads all of .eh_frame.
    fn list(&self) -> Vec<(u64, usize)> {
        let mut listed = Vec::new();
        let mut entries = self.frames.entries(&self.bases);
        while let Ok(Some(entry)) = entries.next() {
            if let CieOrFde::Fde(partial) = entry
                && let Ok(fde) = partial.parse(EhFrame::cie_from_offset)
            {
                listed.push((fde.initial_address(), fde.offset()));
            }
        }
        listed.sort_unstable();
        listed
    }

    /// Offset in .eh_frame that a row of the index names.
    fn offset(&self, row: &[u8]) -> Option<usize> {
        let relative = row.get(4..8)?.try_into().map(i32::from_le_bytes).ok()?;
        let at = self.header_at.wrapping_add_signed(i64::from(relative)).checked_sub(self.frames_at)?;
        usize::try_from(at).ok().filter(|&at| at < self.length)
    }

    /// All entries.
    fn fdes(&self) -> Vec<Fde<'a>> {
        let offsets: Vec<usize> = match self.index {
            Some(index) => index.chunks_exact(8).filter_map(|row| self.offset(row)).collect(),
            None => self.listed.iter().map(|&(_, offset)| offset).collect(),
        };
        offsets.into_iter().filter_map(|offset| self.fde(offset)).collect()
    }

    fn fde(&self, offset: usize) -> Option<Fde<'a>> {
        self.frames.fde_from_offset(&self.bases, EhFrameOffset(offset), EhFrame::cie_from_offset).ok()
    }

    fn fde_at(&self, at: u64) -> Option<Fde<'a>> {
        let offset = match self.index {
            Some(index) => {
                let (rows, _) = index.as_chunks::<8>();
                let start = |row: &[u8; 8]| i64::from(i32::from_le_bytes([row[0], row[1], row[2], row[3]]));
                let wanted = at.wrapping_sub(self.header_at).cast_signed();
                self.offset(rows[..rows.partition_point(|row| start(row) <= wanted)].last()?)?
            }
            None => self.listed[..self.listed.partition_point(|&(start, _)| start <= at)].last()?.1,
        };
        self.fde(offset).filter(|fde| fde.contains(at))
    }
}
