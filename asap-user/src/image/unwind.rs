//! The unwind tables of an image, and the function bounds that they tell: a binary search in .eh_frame_hdr (LSB, "DWARF
//! Extensions"), which stripped files keep.

use super::{Image, Segment};
use crate::address::ImageOffset;
use gimli::{BaseAddresses, EhFrame, EhFrameHdr, EndianSlice, LittleEndian, UnwindSection};
use object::{LittleEndian as LE, elf, read::elf::ProgramHeader};

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

/// A row of the table of functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) start: ImageOffset,
    pub(super) end: ImageOffset,
    /// At its first instruction only the return address lies above the stack pointer, as after a call.
    pub(super) begins_like_a_function: bool,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Tables {
    header: Option<(ImageOffset, usize)>,
    frames: Option<ImageOffset>,
}

type Reader<'a> = EndianSlice<'a, LittleEndian>;

impl Tables {
    pub(super) fn locate(&mut self, programs: &[elf::ProgramHeader64<LE>], segments: &[Segment], data: &[u8]) {
        let Some(program) = programs.iter().find(|p| p.p_type(LE) == elf::PT_GNU_EH_FRAME) else { return };
        let address = ImageOffset(program.p_vaddr(LE));
        let Ok(bytes) = program.data(LE, data) else { return };
        self.header = Some((address, bytes.len()));
        let bases = BaseAddresses::default().set_eh_frame_hdr(address.0);
        let parsed = EhFrameHdr::new(bytes, LittleEndian).parse(&bases, 8);
        if let Ok(parsed) = parsed
            && let gimli::Pointer::Direct(at) = parsed.eh_frame_ptr()
            && segments.iter().any(|s| at.wrapping_sub(s.address.0) < s.file_size)
        {
            self.frames = Some(ImageOffset(at));
        }
    }

    pub(super) fn sections<'a>(&self, image: &'a Image) -> UnwindSections<'a> {
        let text = image.segments.iter().find(|s| s.executable);
        UnwindSections {
            eh_frame_hdr: self.header.and_then(|(at, length)| Some((at, image.bytes_at(at, length)?))),
            eh_frame: self.frames.and_then(|at| Some((at, image.file_tail(at)?))),
            text: text.and_then(|s| Some((s.address, image.bytes_at(s.address, usize::try_from(s.file_size).ok()?)?))),
        }
    }

    /// The row that holds `at`.
    pub(super) fn entry_at(&self, image: &Image, at: ImageOffset) -> Option<Entry> {
        let sections = self.sections(image);
        let (header_at, header) = sections.eh_frame_hdr?;
        let (frames_at, frames) = sections.eh_frame?;
        let bases = BaseAddresses::default().set_eh_frame_hdr(header_at.0).set_eh_frame(frames_at.0);
        let parsed = EhFrameHdr::new(header, LittleEndian).parse(&bases, 8).ok()?;
        let table = parsed.table()?;
        let frames: EhFrame<Reader<'_>> = EhFrame::new(frames, LittleEndian);
        let fde = table.fde_for_address(&frames, &bases, at.0, EhFrame::cie_from_offset).ok()?;
        let start = fde.initial_address();
        let mut context = gimli::UnwindContext::new();
        let row = fde.unwind_info_for_address(&frames, &bases, &mut context, start).ok();
        let like_a_function = row.is_some_and(|row| {
            matches!(row.cfa(), gimli::CfaRule::RegisterAndOffset { register, offset: 8 } if *register == gimli::X86_64::RSP)
        });
        Some(Entry {
            start: ImageOffset(start),
            end: ImageOffset(start.checked_add(fde.len())?),
            begins_like_a_function: like_a_function,
        })
    }
}
