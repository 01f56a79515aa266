//! An image as it is compared: its code cut into pieces by the unwind table, each piece with a hash of what it does, addresses
//! masked, and the list of those addresses. Not for comparing: that is `pairs`.

use crate::image::{Image, Symbol, SymbolKind};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use std::{
    collections::HashMap,
    hash::{DefaultHasher, Hash, Hasher},
    ops::Range,
};

/// Longest piece that is looked at, bytes.
const PIECE_MOST: u64 = 16 << 20;
/// Longest string that is compared, bytes.
const STRING_MOST: usize = 512;

/// A stretch of code with an entry of its own in the unwind table: a function, or a part that the compiler split off.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub start: u64,
    pub end: u64,
    /// Of the instructions, addresses masked; equal hashes have equally many references of the same kinds.
    pub hash: u64,
    /// Offsets of the instructions that do something (all but no-ops).
    pub instructions: Vec<u32>,
    /// In the order of the code.
    pub references: Vec<Reference>,
    /// Hashes of the strings that it uses.
    pub strings: Vec<u64>,
}

/// An address that code refers to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reference {
    pub target: u64,
    pub kind: ReferenceKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum ReferenceKind {
    /// Call or jump.
    Branch,
    /// Memory at exactly this address is read or written.
    Access,
    /// The address is computed: it may lie beside what is meant (the end of an array, one before its beginning).
    Address,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Area {
    Code,
    Constants,
    Variables,
}

pub(super) struct View<'a> {
    image: &'a Image,
    pub pieces: Vec<Piece>,
    areas: Vec<(Range<u64>, Area)>,
    /// What the linker's tables name.
    names: HashMap<u64, String>,
    /// Slots and the addresses that they will hold.
    pub pointers: Vec<(u64, u64)>,
    pub exports: HashMap<String, u64>,
}

fn hash_of(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl<'a> View<'a> {
    /// `symbols`: functions outside of the unwind table are taken from there.
    pub fn of(image: &'a Image, symbols: &[Symbol]) -> Self {
        let areas = image.segments().iter().map(|segment| {
            let area = match (segment.executable, segment.writable) {
                (true, _) => Area::Code,
                (false, false) => Area::Constants,
                (false, true) => Area::Variables,
            };
            (segment.address.0..segment.address.0.saturating_add(segment.memory_size), area)
        });
        let mut names: HashMap<u64, String> = image.named_slots().into_iter().map(|(at, name)| (at.0, name)).collect();
        let mut exports = HashMap::new();
        for symbol in image.all_symbols().filter(|symbol| symbol.exported && symbol.kind != SymbolKind::Tls) {
            // Of several names the first by letters, so that both images choose the same.
            let name = names.entry(symbol.address.0).or_insert_with(|| symbol.name.clone());
            if symbol.name < *name {
                name.clone_from(&symbol.name);
            }
            exports.insert(symbol.name, symbol.address.0);
        }
        let mut pointers: Vec<(u64, u64)> =
            image.relative_pointers().into_iter().map(|(slot, target)| (slot.0, target.0)).collect();
        pointers.sort_unstable();
        let mut view = Self { image, pieces: Vec::new(), areas: areas.collect(), names, pointers, exports };
        let mut bounds: Vec<Range<u64>> =
            image.unwind_bounds().into_iter().map(|bounds| bounds.start.0..bounds.end.0).collect();
        let functions = symbols.iter().filter(|symbol| symbol.kind == SymbolKind::Function && symbol.size > 0);
        let listed = bounds.clone();
        bounds.extend(functions.filter_map(|symbol| {
            let range = symbol.address.0..symbol.address.0.checked_add(symbol.size)?;
            let next = listed.partition_point(|other| other.start < range.end);
            let covered = next.checked_sub(1).is_some_and(|last| listed[last].end > range.start);
            (!covered).then_some(range)
        }));
        bounds.sort_unstable_by_key(|range| (range.start, range.end));
        bounds.dedup_by_key(|range| range.start);
        view.pieces = bounds.into_iter().filter_map(|range| view.piece(range)).collect();
        view
    }

    fn area(&self, at: u64) -> Option<Area> {
        self.areas.iter().find(|(range, _)| range.contains(&at)).map(|&(_, area)| area)
    }

    pub fn is_code(&self, at: u64) -> bool {
        self.area(at) == Some(Area::Code)
    }

    pub fn is_constant(&self, at: u64) -> bool {
        self.area(at) == Some(Area::Constants)
    }

    fn bytes(&self, at: u64, length: usize) -> Option<&'a [u8]> {
        self.image.bytes_at(crate::address::ImageOffset(at), length)
    }

    /// The piece that begins at `at`.
    pub fn piece_starting_at(&self, at: u64) -> Option<usize> {
        self.pieces.binary_search_by_key(&at, |piece| piece.start).ok()
    }

    /// The piece that holds `at`, and which of its instructions is there.
    pub fn piece_around(&self, at: u64) -> Option<(usize, usize)> {
        let index = self.pieces.partition_point(|piece| piece.start <= at).checked_sub(1)?;
        let piece = &self.pieces[index];
        let instruction = piece.instructions.partition_point(|&offset| piece.start + u64::from(offset) < at);
        (at < piece.end).then_some((index, instruction))
    }

    /// The address that the slot at `at` will hold.
    pub fn pointer_at(&self, at: u64) -> Option<u64> {
        if let Ok(index) = self.pointers.binary_search_by_key(&at, |&(slot, _)| slot) {
            return Some(self.pointers[index].1);
        }
        // Without relocations addresses are in place.
        let word = self.bytes(at, 8).filter(|_| !self.image.is_position_independent())?;
        Some(u64::from_le_bytes(word.try_into().ok()?)).filter(|&value| self.area(value).is_some())
    }

    /// The name of what is reached at `at`, where the linker knows it; through a stub that jumps to it, too.
    fn name(&self, at: u64) -> Option<&str> {
        if let Some(name) = self.names.get(&at) {
            return Some(name);
        }
        if !self.is_code(at) {
            return None;
        }
        let tail = (1..=16).rev().find_map(|length| self.bytes(at, length))?;
        let mut decoder = Decoder::with_ip(64, tail, at, DecoderOptions::NONE);
        let mut instruction = decoder.decode();
        if instruction.code() == Code::Endbr64 {
            instruction = decoder.decode();
        }
        let is_stub = instruction.code() == Code::Jmp_rm64 && instruction.memory_base() == Register::RIP;
        let slot = is_stub.then(|| instruction.memory_displacement64())?;
        self.names.get(&slot).map(String::as_str)
    }

    fn string(&self, at: u64) -> Option<&'a [u8]> {
        let tail = [STRING_MOST, 64, 8, 2].iter().find_map(|&length| self.bytes(at, length))?;
        let text = &tail[..memchr::memchr(0, tail)?];
        let is_text = |&byte: &u8| matches!(byte, b' '..=b'~' | b'\t' | b'\n' | b'\r' | 0x80..);
        (text.len() >= 2 && std::str::from_utf8(text).is_ok() && text.iter().all(is_text)).then_some(text)
    }

    /// Decodes a stretch of code.
    pub fn piece(&self, range: Range<u64>) -> Option<Piece> {
        let length = range.end.checked_sub(range.start).filter(|&length| length > 0 && length <= PIECE_MOST)?;
        let bytes = self.bytes(range.start, usize::try_from(length).ok()?).filter(|_| self.is_code(range.start))?;
        let mut decoded: Vec<Instruction> = Vec::with_capacity(bytes.len() / 4);
        let decoder = Decoder::with_ip(64, bytes, range.start, DecoderOptions::NONE);
        // No-ops fill space, as much as happens to be needed.
        decoded.extend(decoder.into_iter().filter(|instruction| instruction.mnemonic() != Mnemonic::Nop));
        let mut piece = Piece {
            start: range.start,
            end: range.end,
            hash: 0,
            instructions: decoded.iter().map(|instruction| (instruction.ip() - range.start) as u32).collect(),
            references: Vec::new(),
            strings: Vec::new(),
        };
        let mut hasher = DefaultHasher::new();
        for instruction in &decoded {
            self.take(instruction, &mut piece, &mut hasher);
        }
        piece.references.shrink_to_fit();
        piece.hash = hasher.finish();
        Some(piece)
    }

    fn take(&self, instruction: &Instruction, piece: &mut Piece, hasher: &mut DefaultHasher) {
        if instruction.op_count() > 0 && instruction.op0_kind() == OpKind::NearBranch64 {
            // Short and long forms of a jump are the same.
            (instruction.mnemonic() as u32).hash(hasher);
            let target = instruction.near_branch_target();
            if (piece.start..piece.end).contains(&target) {
                let at = (target - piece.start) as u32;
                piece.instructions.partition_point(|&offset| offset < at).hash(hasher);
            } else {
                self.refer(target, ReferenceKind::Branch, piece, hasher);
            }
            return;
        }
        (instruction.code() as u32, instruction.has_lock_prefix(), instruction.has_rep_prefix()).hash(hasher);
        (instruction.has_repne_prefix(), instruction.segment_prefix() as u32).hash(hasher);
        for operand in 0..instruction.op_count() {
            let kind = instruction.op_kind(operand);
            (kind as u32).hash(hasher);
            match kind {
                OpKind::Register => (instruction.op_register(operand) as u32).hash(hasher),
                OpKind::Memory => self.take_memory(instruction, piece, hasher),
                OpKind::Immediate8
                | OpKind::Immediate8_2nd
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64 => {
                    let value = instruction.immediate(operand);
                    if self.is_address(value) {
                        self.refer(value, ReferenceKind::Address, piece, hasher);
                    } else {
                        value.hash(hasher);
                    }
                }
                _ => {}
            }
        }
    }

    fn take_memory(&self, instruction: &Instruction, piece: &mut Piece, hasher: &mut DefaultHasher) {
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        (base as u32, index as u32, instruction.memory_index_scale()).hash(hasher);
        let at = instruction.memory_displacement64();
        let is_thread_local = matches!(instruction.segment_prefix(), Register::FS | Register::GS);
        if is_thread_local || !(base == Register::RIP || self.is_address(at)) {
            return at.hash(hasher);
        }
        let is_exact = index == Register::None && matches!(base, Register::RIP | Register::None);
        if instruction.mnemonic() == Mnemonic::Lea || !is_exact {
            return self.refer(at, ReferenceKind::Address, piece, hasher);
        }
        // Constants are compared by what they are.
        let size = instruction.memory_size().size();
        match self.bytes(at, size).filter(|_| self.is_constant(at) && (1..=64).contains(&size)) {
            Some(constant) if self.pointer_at(at).is_none() => constant.hash(hasher),
            _ => self.refer(at, ReferenceKind::Access, piece, hasher),
        }
    }

    /// Numbers in code that are addresses: programs at a fixed address have such.
    fn is_address(&self, value: u64) -> bool {
        !self.image.is_position_independent() && self.area(value).is_some()
    }

    fn refer(&self, target: u64, kind: ReferenceKind, piece: &mut Piece, hasher: &mut DefaultHasher) {
        kind.hash(hasher);
        if let Some(name) = self.name(target) {
            return name.hash(hasher);
        }
        if let Some(text) = self.string(target).filter(|_| self.is_constant(target)) {
            text.hash(hasher);
            return piece.strings.push(hash_of(text));
        }
        self.is_code(target).hash(hasher);
        piece.references.push(Reference { target, kind });
    }
}
