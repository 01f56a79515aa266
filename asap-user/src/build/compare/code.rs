//! What a section does, in a form in which two builds can be compared: decoded instructions, whose branches lead to
//! instructions instead of distances, and references that name what they lead to. Not for deciding which sections belong
//! together: that is `correlate`.

use super::object::{Kind, Object, Place, Relocation};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Mnemonic, OpKind};
use object::elf;

/// Where a reference leads, in terms of its own object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Referent {
    /// Into a section that has an identity.
    Section {
        /// Its number.
        section: usize,
        /// From its start.
        offset: i64,
    },
    /// To something of another object.
    Name {
        /// Raw name.
        name: String,
        /// From its start.
        offset: i64,
    },
    /// To a text or number: it is the same where it reads the same.
    Value(Vec<u8>),
    /// A plain number.
    Number(i64),
}

/// One instruction, or a piece of data with a reference.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// What it is, without what the linker fills in.
    bytes: Vec<u8>,
    /// The instruction that it jumps to, within the section.
    target: Option<usize>,
    /// Kind of the relocation, and where it leads.
    pub references: Vec<(u32, Referent)>,
}

impl Item {
    /// Whether two items are the same but for where their references lead.
    pub fn is_like(&self, other: &Self) -> bool {
        let kinds = |item: &Self| item.references.iter().map(|(kind, _)| *kind).collect::<Vec<_>>();
        self.bytes == other.bytes && self.target == other.target && kinds(self) == kinds(other)
    }
}

/// Whether the linker's number is a distance from the place where it stands.
fn is_relative(kind: u32) -> bool {
    [
        elf::R_X86_64_PC8,
        elf::R_X86_64_PC16,
        elf::R_X86_64_PC32,
        elf::R_X86_64_PC64,
        elf::R_X86_64_PLT32,
        elf::R_X86_64_GOTPCREL,
        elf::R_X86_64_GOTPCRELX,
        elf::R_X86_64_REX_GOTPCRELX,
        elf::R_X86_64_GOTTPOFF,
        elf::R_X86_64_TLSGD,
        elf::R_X86_64_TLSLD,
        elf::R_X86_64_GOTPC32,
        elf::R_X86_64_GOTPC32_TLSDESC,
    ]
    .iter()
    .any(|relative| relative.0 == kind)
}

/// Bytes that the linker writes.
pub(super) fn width(kind: u32) -> usize {
    match elf::RelocationType(kind) {
        elf::R_X86_64_NONE | elf::R_X86_64_TLSDESC_CALL => 0,
        elf::R_X86_64_8 | elf::R_X86_64_PC8 => 1,
        elf::R_X86_64_16 | elf::R_X86_64_PC16 => 2,
        elf::R_X86_64_64
        | elf::R_X86_64_PC64
        | elf::R_X86_64_DTPOFF64
        | elf::R_X86_64_TPOFF64
        | elf::R_X86_64_GOTOFF64
        | elf::R_X86_64_GOTPC64
        | elf::R_X86_64_GOT64
        | elf::R_X86_64_SIZE64 => 8,
        _ => 4,
    }
}

/// Kinds that mean the same: assemblers choose between them by the symbol's binding.
fn plain(kind: u32) -> u32 {
    match elf::RelocationType(kind) {
        elf::R_X86_64_PLT32 => elf::R_X86_64_PC32.0,
        _ => kind,
    }
}

/// Where a relocation leads. `bias` is the distance from the relocated field to the end of its instruction.
pub fn referent(object: &Object, relocation: &Relocation, bias: i64) -> Referent {
    let Some(symbol) = object.symbols.get(relocation.symbol) else { return Referent::Number(relocation.addend) };
    let bias = if is_relative(relocation.kind) { bias } else { 0 };
    let beyond = relocation.addend.wrapping_add(bias);
    match symbol.place {
        Place::Section(section) => {
            let offset = (symbol.value as i64).wrapping_add(beyond);
            match object.sections.get(section).and_then(|to| value(to, offset)) {
                Some(value) => Referent::Value(value),
                None => Referent::Section { section, offset },
            }
        }
        Place::Absolute => Referent::Number((symbol.value as i64).wrapping_add(beyond)),
        Place::Undefined | Place::Common if symbol.name.is_empty() => Referent::Number(beyond),
        Place::Undefined | Place::Common => Referent::Name { name: symbol.name.clone(), offset: beyond },
    }
}

/// What stands there, in a section whose entries have no identity.
fn value(section: &super::object::Section, offset: i64) -> Option<Vec<u8>> {
    let at = usize::try_from(offset).ok()?;
    let entry = usize::try_from(section.entry_size).ok()?;
    match section.kind {
        Kind::Strings => {
            let rest = section.data.get(at..)?;
            let end = rest.chunks_exact(entry).position(|unit| unit.iter().all(|&byte| byte == 0))?;
            Some(rest[..end * entry].to_vec())
        }
        Kind::Literals => {
            let start = at / entry * entry;
            // Where in the entry it leads counts, too.
            let mut value = section.data.get(start..start.checked_add(entry)?)?.to_vec();
            value.extend_from_slice(&(at - start).to_le_bytes());
            Some(value)
        }
        _ => None,
    }
}

/// The items of a section.
pub fn items(object: &Object, section: usize) -> Vec<Item> {
    match object.sections[section].kind {
        Kind::Code => instructions(object, section),
        _ => data(object, section),
    }
}

/// A section of data is one item: its bytes, and its references in order.
fn data(object: &Object, section: usize) -> Vec<Item> {
    let section = &object.sections[section];
    let mut bytes = section.data.clone();
    let mut references = Vec::with_capacity(section.relocations.len());
    for relocation in &section.relocations {
        clear(&mut bytes, relocation.offset as usize, width(relocation.kind));
        bytes.extend_from_slice(&relocation.offset.to_le_bytes());
        // A jump table's entry is a distance from the table, and its addend holds the entry's place, too.
        let place = if is_relative(relocation.kind) { -(relocation.offset as i64) } else { 0 };
        references.push((plain(relocation.kind), referent(object, relocation, place)));
    }
    bytes.extend_from_slice(&section.size.to_le_bytes());
    vec![Item { bytes, target: None, references }]
}

fn clear(bytes: &mut [u8], at: usize, length: usize) {
    if let Some(field) = at.checked_add(length).and_then(|end| bytes.get_mut(at..end)) {
        field.fill(0);
    }
}

fn instructions(object: &Object, section: usize) -> Vec<Item> {
    let section = &object.sections[section];
    let mut decoder = Decoder::with_ip(64, &section.data, 0, DecoderOptions::NONE);
    let mut items = Vec::new();
    let mut branches = Vec::new();
    // Offset -> item that begins there, or the first one behind padding.
    let mut starts: Vec<(u64, usize)> = Vec::new();
    let mut relocations = section.relocations.iter().peekable();
    while decoder.can_decode() {
        let instruction = decoder.decode();
        let (start, end) = (instruction.ip(), instruction.next_ip());
        let mut bytes = section.data.get(start as usize..end as usize).unwrap_or_default().to_vec();
        let mut references = Vec::new();
        while let Some(relocation) = relocations.next_if(|relocation| relocation.offset < end) {
            let at = relocation.offset.saturating_sub(start) as usize;
            clear(&mut bytes, at, width(relocation.kind));
            let bias = end as i64 - relocation.offset as i64;
            references.push((plain(relocation.kind), referent(object, relocation, bias)));
        }
        starts.push((start, items.len()));
        let is_padding = instruction.mnemonic() == Mnemonic::Nop && references.is_empty();
        if is_padding {
            continue;
        }
        let is_branch = instruction.op_count() > 0
            && instruction.op0_kind() == OpKind::NearBranch64
            && instruction.flow_control() != FlowControl::Next
            && references.is_empty();
        let target = instruction.near_branch_target();
        if is_branch && target < section.data.len() as u64 {
            // Short or near, it is the same jump.
            bytes = (instruction.mnemonic() as u32).to_le_bytes().to_vec();
            branches.push((items.len(), target));
        }
        items.push(Item { bytes, target: None, references });
    }
    for (item, target) in branches {
        items[item].target = match starts.binary_search_by_key(&target, |&(start, _)| start) {
            Ok(found) => Some(starts[found].1),
            // Into the midst of an instruction: told apart from all others.
            Err(_) => Some(usize::MAX - target as usize),
        };
    }
    items
}
