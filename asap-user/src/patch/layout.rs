//! Where each part of a patch goes within its three segments, stubs and slots included. Known before any address is: the
//! caller asks for memory of this size first. Not for contents: that is `link`.

use super::error::PatchError;
use super::input::{Input, Relocation, SectionKind};
use super::merge::{Meaning, Program};
use super::relocation::{self, Formula};
use super::{Layout, SegmentSize};
use std::collections::{BTreeMap, HashMap};

/// Largest segment: all of a patch must lie within 2 GiB of the module, beside other patches.
const SEGMENT_LIMIT: u64 = 128 << 20;
/// `jmp *slot(%rip)`, padded.
pub(super) const STUB_SIZE: u64 = 8;
/// One address, or one thread-pointer offset.
pub(super) const SLOT_SIZE: u64 = 8;

/// One of the three pieces of memory of a patch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Segment {
    Code,
    Rodata,
    Data,
}

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Slot {
    Address(Meaning),
    ThreadOffset(Meaning),
}

/// Offsets of everything.
#[derive(Clone, Debug)]
pub(super) struct Placement {
    pub sizes: Layout,
    /// By file and section.
    pub sections: HashMap<(usize, usize), (Segment, u64)>,
    /// In data.
    pub commons: Vec<u64>,
    /// In rodata.
    pub slots: BTreeMap<Slot, u64>,
    /// In rodata: where slots start, which is what `_GLOBAL_OFFSET_TABLE_` means.
    pub table: u64,
    /// In code.
    pub stubs: BTreeMap<Meaning, u64>,
    /// In rodata; with the terminator. Empty: no unwind table.
    pub unwind: std::ops::Range<u64>,
}

struct Cursor {
    size: u64,
    alignment: u64,
    segment: &'static str,
}

impl Cursor {
    fn new(segment: &'static str) -> Self {
        Self { size: 0, alignment: 1, segment }
    }

    fn take(&mut self, size: u64, alignment: u64) -> Result<u64, PatchError> {
        let start = self.size.next_multiple_of(alignment);
        self.size = start.saturating_add(size);
        if self.size > SEGMENT_LIMIT {
            let (segment, limit) = (self.segment, SEGMENT_LIMIT);
            return Err(PatchError::SegmentTooLarge { segment, size: self.size, limit });
        }
        self.alignment = self.alignment.max(alignment);
        Ok(start)
    }

    fn finish(&self) -> SegmentSize {
        SegmentSize { size: self.size as usize, alignment: self.alignment as usize }
    }
}

impl Placement {
    pub fn compute(program: &Program) -> Result<Self, PatchError> {
        let mut code = Cursor::new("code");
        let mut rodata = Cursor::new("rodata");
        let mut data = Cursor::new("data");
        let mut sections = HashMap::new();
        for (file, index) in program.kept_sections() {
            let section = &program.inputs[file].sections[index];
            let (segment, cursor) = match section.kind {
                SectionKind::Code => (Segment::Code, &mut code),
                SectionKind::Data => (Segment::Data, &mut data),
                SectionKind::ReadOnly => (Segment::Rodata, &mut rodata),
                _ => continue,
            };
            sections.insert((file, index), (segment, cursor.take(section.size, section.alignment)?));
        }
        let mut commons = Vec::with_capacity(program.commons.len());
        for common in &program.commons {
            commons.push(data.take(common.size, common.alignment)?);
        }

        // Records follow each other without a gap: zero bytes between them would end the table.
        let unwind_start = rodata.take(0, 8)?;
        let mut unwind_end = unwind_start;
        for (file, index) in program.kept_sections() {
            let section = &program.inputs[file].sections[index];
            if section.kind == SectionKind::Unwind && section.size > 0 {
                let start = rodata.take(section.size, 1)?;
                sections.insert((file, index), (Segment::Rodata, start));
                unwind_end = rodata.size;
            }
        }
        if unwind_end > unwind_start {
            rodata.take(4, 1)?;
            unwind_end = rodata.size;
        }

        let table = rodata.take(0, SLOT_SIZE)?;
        let mut slots = BTreeMap::new();
        let mut stubs = BTreeMap::new();
        for (file, index) in program.kept_sections() {
            let input = &program.inputs[file];
            for r in &input.sections[index].relocations {
                let form = relocation::form(r.kind).ok_or_else(|| PatchError::UnknownRelocation {
                    file: input.name.clone(),
                    section: input.sections[index].name.clone(),
                    kind: relocation::name(r.kind),
                })?;
                let meaning = program.meanings[file][r.symbol];
                match form.formula {
                    Formula::SlotRelative | Formula::SlotInTable => {
                        slots.insert(Slot::Address(meaning), 0);
                    }
                    Formula::ThreadSlotRelative => {
                        slots.insert(Slot::ThreadOffset(meaning), 0);
                    }
                    _ if may_use_stub(input, index, r, form.formula)
                        && matches!(meaning, Meaning::Import(_) | Meaning::Original(_)) =>
                    {
                        stubs.insert(meaning, 0);
                        slots.insert(Slot::Address(meaning), 0);
                    }
                    _ => {}
                }
            }
        }
        for offset in slots.values_mut() {
            *offset = rodata.take(SLOT_SIZE, SLOT_SIZE)?;
        }
        for offset in stubs.values_mut() {
            *offset = code.take(STUB_SIZE, STUB_SIZE)?;
        }
        let sizes = Layout { code: code.finish(), rodata: rodata.finish(), data: data.finish() };
        Ok(Self { sizes, sections, commons, slots, table, stubs, unwind: unwind_start..unwind_end })
    }
}

/// Whether a relocation is content with a stub that jumps to the function: calls and jumps are, and the unwind table's
/// reference to the personality routine. An address that the program may compare is not.
pub(super) fn may_use_stub(input: &Input, section: usize, r: &Relocation, formula: Formula) -> bool {
    let section = &input.sections[section];
    match formula {
        Formula::Call => true,
        Formula::Relative | Formula::Absolute if section.kind == SectionKind::Unwind => true,
        Formula::Relative if section.kind == SectionKind::Code && r.addend == -4 => {
            let Some(at) = usize::try_from(r.offset).ok().filter(|&at| at >= 1) else { return false };
            let opcode = section.data.get(at - 1).copied().unwrap_or(0);
            let escape = if at >= 2 { section.data[at - 2] } else { 0 };
            // call rel32, jmp rel32, jcc rel32. A data reference has a ModRM byte with mod 0, rm 5 there instead.
            matches!(opcode, 0xe8 | 0xe9) || (escape == 0x0f && opcode & 0xf0 == 0x80)
        }
        _ => false,
    }
}
