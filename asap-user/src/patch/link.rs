//! The patch at its addresses: sections copied, slots and stubs filled in, relocations applied, everything checked for reach.
//! Not for finding symbols in the target: that is the caller's `Resolver`.

use super::error::PatchError;
use super::input::{Binding, Place, SectionKind, SymbolKind};
use super::layout::{Placement, Segment, Slot, may_use_stub};
use super::merge::{Meaning, Program};
use super::relocation::{self, Form, Formula};
use super::{Bases, ImportKind, LinkedPatch, LinkedSymbol, Resolution, Resolver};
use crate::address::TargetAddr;

/// Links `program`, placed as `placement` says.
pub(super) fn link(
    program: &Program,
    placement: &Placement,
    bases: &Bases,
    resolver: &dyn Resolver,
) -> Result<LinkedPatch, PatchError> {
    check_bases(placement, bases)?;
    let linker = Linker { program, placement, bases, values: Values::resolve(program, resolver)? };
    let mut segments = Segments {
        code: vec![0; placement.sizes.code.size],
        rodata: vec![0; placement.sizes.rodata.size],
        data: vec![0; placement.sizes.data.size],
    };
    // Traps, not zeroes (which are an instruction), between functions.
    segments.code.fill(0xcc);
    for (file, section) in program.kept_sections() {
        linker.copy_section(&mut segments, file, section)?;
    }
    linker.fill_slots(&mut segments);
    linker.write_stubs(&mut segments)?;
    let unwind = &placement.unwind;
    let eh_frame =
        (!unwind.is_empty()).then(|| bases.rodata.offset(unwind.start as i64)..bases.rodata.offset(unwind.end as i64));
    let Segments { code, rodata, data } = segments;
    Ok(LinkedPatch { code, rodata, data, symbols: linker.symbols(), eh_frame })
}

fn check_bases(placement: &Placement, bases: &Bases) -> Result<(), PatchError> {
    let sizes = &placement.sizes;
    for (segment, base, size) in
        [("code", bases.code, sizes.code), ("rodata", bases.rodata, sizes.rodata), ("data", bases.data, sizes.data)]
    {
        let alignment = size.alignment as u64;
        if size.size > 0 && (!base.0.is_multiple_of(alignment) || base.0.checked_add(size.size as u64).is_none()) {
            return Err(PatchError::Base { segment, base: base.0, alignment });
        }
    }
    Ok(())
}

struct Segments {
    code: Vec<u8>,
    rodata: Vec<u8>,
    data: Vec<u8>,
}

impl Segments {
    fn get(&mut self, segment: Segment) -> &mut Vec<u8> {
        match segment {
            Segment::Code => &mut self.code,
            Segment::Rodata => &mut self.rodata,
            Segment::Data => &mut self.data,
        }
    }

    /// Writes within a segment; the layout made room.
    fn write(&mut self, segment: Segment, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.get(segment)[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// What the target says of imports and originals.
struct Values {
    /// `None`: weak, and the target does not have it.
    imports: Vec<Option<Resolution>>,
    originals: Vec<TargetAddr>,
}

impl Values {
    fn resolve(program: &Program, resolver: &dyn Resolver) -> Result<Self, PatchError> {
        let mut missing = Vec::new();
        let mut imports = Vec::with_capacity(program.imports.len());
        for import in &program.imports {
            let found = resolver.resolve(import);
            match (&found, import.kind) {
                (Some(Resolution::Address(_)), ImportKind::Tls) => {
                    let (wanted, found) = ("a thread-local variable", "an ordinary function or variable");
                    return Err(PatchError::WrongKind { symbol: import.name.clone(), wanted, found });
                }
                (Some(Resolution::TlsOffset(_)), ImportKind::Any) => {
                    let (wanted, found) = ("an ordinary function or variable", "a thread-local variable");
                    return Err(PatchError::WrongKind { symbol: import.name.clone(), wanted, found });
                }
                (None, kind) if !import.weak || kind == ImportKind::Tls => missing.push(match &import.file {
                    Some(file) => format!("`{file}:{}`", import.name),
                    None => format!("`{}`", import.name),
                }),
                _ => {}
            }
            imports.push(found);
        }
        let mut originals = Vec::with_capacity(program.originals.len());
        for name in &program.originals {
            match resolver.original(name) {
                Some(address) => originals.push(address),
                None => missing.push(format!("the original of `{name}`")),
            }
        }
        if missing.is_empty() {
            Ok(Self { imports, originals })
        } else {
            Err(PatchError::Unresolved { names: missing })
        }
    }
}

struct Linker<'a> {
    program: &'a Program,
    placement: &'a Placement,
    bases: &'a Bases,
    values: Values,
}

impl Linker<'_> {
    fn base(&self, segment: Segment) -> u64 {
        match segment {
            Segment::Code => self.bases.code.0,
            Segment::Rodata => self.bases.rodata.0,
            Segment::Data => self.bases.data.0,
        }
    }

    /// The address a meaning has; none: its section has no address, or it is thread-local.
    fn address(&self, meaning: Meaning) -> Option<u64> {
        match meaning {
            Meaning::Section { file, section, offset } => {
                let &(segment, start) = self.placement.sections.get(&(file, section))?;
                Some(self.base(segment).wrapping_add(start).wrapping_add(offset))
            }
            Meaning::Absolute(value) => Some(value),
            Meaning::Common(index) => Some(self.bases.data.0.wrapping_add(*self.placement.commons.get(index)?)),
            Meaning::Import(index) => match &self.values.imports[index] {
                Some(Resolution::Address(address)) => Some(address.0),
                Some(Resolution::TlsOffset(_)) => None,
                None => Some(0),
            },
            Meaning::Shared { import, file, section, offset } => match &self.values.imports[import] {
                Some(Resolution::Address(address)) => Some(address.0),
                _ => self.address(Meaning::Section { file, section, offset }),
            },
            Meaning::Original(index) => Some(self.values.originals[index].0),
            Meaning::Table => Some(self.bases.rodata.0.wrapping_add(self.placement.table)),
            Meaning::Dropped => None,
        }
    }

    fn thread_offset(&self, meaning: Meaning) -> Option<u64> {
        match meaning {
            Meaning::Import(index) => match &self.values.imports[index] {
                Some(Resolution::TlsOffset(offset)) => Some(*offset as u64),
                _ => None,
            },
            _ => None,
        }
    }

    fn slot(&self, slot: Slot) -> Option<u64> {
        Some(self.bases.rodata.0.wrapping_add(*self.placement.slots.get(&slot)?))
    }

    fn stub(&self, meaning: Meaning) -> Option<u64> {
        Some(self.bases.code.0.wrapping_add(*self.placement.stubs.get(&meaning)?))
    }

    fn copy_section(&self, segments: &mut Segments, file: usize, index: usize) -> Result<(), PatchError> {
        let Some(&(segment, start)) = self.placement.sections.get(&(file, index)) else { return Ok(()) };
        let section = &self.program.inputs[file].sections[index];
        let mut bytes = section.data.clone();
        let address = self.base(segment).wrapping_add(start);
        for r in &section.relocations {
            let form = relocation::form(r.kind).ok_or_else(|| PatchError::UnknownRelocation {
                file: self.program.inputs[file].name.clone(),
                section: section.name.clone(),
                kind: relocation::name(r.kind),
            })?;
            let value = self.value(file, index, r, form, address.wrapping_add(r.offset))?;
            let at = r.offset as usize;
            let field = bytes.get_mut(at..at + form.width).ok_or_else(|| PatchError::Malformed {
                file: self.program.inputs[file].name.clone(),
                problem: format!("a relocation of section {} lies across its end", section.name),
            })?;
            field.copy_from_slice(&value.to_le_bytes()[..form.width]);
        }
        // .bss: the rest is zero already. Gaps in code sections are the assembler's.
        segments.write(segment, start, &bytes);
        Ok(())
    }

    fn value(
        &self,
        file: usize,
        index: usize,
        r: &super::input::Relocation,
        form: Form,
        place: u64,
    ) -> Result<u64, PatchError> {
        let input = &self.program.inputs[file];
        let meaning = self.program.meanings[file][r.symbol];
        let dropped = || PatchError::DroppedSection {
            file: input.name.clone(),
            section: input.sections[index].name.clone(),
            what: format!("`{}`", self.program.display_name(file, r.symbol)),
        };
        let add = |base: u64| base.wrapping_add(r.addend as u64);
        let table = self.bases.rodata.0.wrapping_add(self.placement.table);
        let slot = |slot| self.slot(slot).ok_or_else(dropped);
        // The language-specific tables of functions that were dropped stay, and nobody reads them.
        let symbol = || match self.address(meaning) {
            None if input.sections[index].name.starts_with(".gcc_except_table") && meaning == Meaning::Dropped => Ok(0),
            address => address.ok_or_else(dropped),
        };
        let value = match form.formula {
            Formula::None => 0,
            Formula::Absolute => add(symbol()?),
            Formula::Relative | Formula::Call => add(symbol()?).wrapping_sub(place),
            Formula::SlotRelative => {
                symbol()?;
                add(slot(Slot::Address(meaning))?).wrapping_sub(place)
            }
            Formula::SlotInTable => {
                symbol()?;
                add(slot(Slot::Address(meaning))?).wrapping_sub(table)
            }
            Formula::TableRelative => add(table).wrapping_sub(place),
            Formula::FromTable => add(symbol()?).wrapping_sub(table),
            Formula::Size => match meaning {
                Meaning::Section { .. } | Meaning::Common(_) => add(self.size(file, r.symbol)),
                _ => return Err(dropped()),
            },
            Formula::ThreadOffset => add(self.thread_offset(meaning).ok_or_else(dropped)?),
            Formula::ThreadSlotRelative => {
                self.thread_offset(meaning).ok_or_else(dropped)?;
                add(slot(Slot::ThreadOffset(meaning))?).wrapping_sub(place)
            }
        };
        if form.fits(value) {
            return Ok(value);
        }
        if may_use_stub(input, index, r, form.formula)
            && let Some(stub) = self.stub(meaning)
        {
            let place = if form.formula == Formula::Absolute { 0 } else { place };
            let value = add(stub).wrapping_sub(place);
            if form.fits(value) {
                return Ok(value);
            }
        }
        if let Meaning::Import(i) = meaning
            && self.values.imports[i].is_none()
            && may_use_stub(input, index, r, form.formula)
        {
            // A call of a weak function that does not exist; the program asks before it calls.
            return Ok(0);
        }
        Err(PatchError::Overflow {
            file: input.name.clone(),
            section: input.sections[index].name.clone(),
            offset: r.offset,
            kind: form.name,
            symbol: self.program.display_name(file, r.symbol),
            value: value as i64,
            way_out: form.way_out(),
        })
    }

    fn size(&self, file: usize, symbol: usize) -> u64 {
        self.program.inputs[file].symbols[symbol].size
    }

    fn fill_slots(&self, segments: &mut Segments) {
        for (&slot, &offset) in &self.placement.slots {
            // A slot without a value belongs to a reference that was refused, or to a weak symbol: zero.
            let value = match slot {
                Slot::Address(meaning) => self.address(meaning),
                Slot::ThreadOffset(meaning) => self.thread_offset(meaning),
            };
            segments.write(Segment::Rodata, offset, &value.unwrap_or(0).to_le_bytes());
        }
    }

    fn write_stubs(&self, segments: &mut Segments) -> Result<(), PatchError> {
        for (&meaning, &offset) in &self.placement.stubs {
            let slot = self.slot(Slot::Address(meaning)).unwrap_or(0);
            let next = self.bases.code.0.wrapping_add(offset).wrapping_add(6);
            let distance = slot.wrapping_sub(next) as i64;
            let distance = i32::try_from(distance).map_err(|_| PatchError::Base {
                segment: "rodata",
                base: self.bases.rodata.0,
                alignment: self.placement.sizes.rodata.alignment as u64,
            })?;
            // jmp *slot(%rip)
            let mut stub = [0xff, 0x25, 0, 0, 0, 0, 0xcc, 0xcc];
            stub[2..6].copy_from_slice(&distance.to_le_bytes());
            segments.write(Segment::Code, offset, &stub);
        }
        Ok(())
    }

    fn symbols(&self) -> Vec<LinkedSymbol> {
        let mut symbols = Vec::new();
        for (file, input) in self.program.inputs.iter().enumerate() {
            for (index, symbol) in input.symbols.iter().enumerate() {
                let Place::Section(section) = symbol.place else { continue };
                let kind = input.sections[section].kind;
                if symbol.name.is_empty()
                    || !matches!(symbol.kind, SymbolKind::Function | SymbolKind::Object | SymbolKind::Untyped)
                    || matches!(kind, SectionKind::Ignored | SectionKind::Discarded)
                {
                    continue;
                }
                let own = Meaning::Section { file, section, offset: symbol.value };
                // A definition that another one overrode is not what the name means.
                let meaning = self.program.meanings[file][index];
                let is_own = match meaning {
                    Meaning::Shared { file: f, section: s, .. } => (f, s) == (file, section),
                    other => other == own,
                };
                let Some(address) = self.address(own).filter(|_| is_own) else { continue };
                symbols.push(LinkedSymbol {
                    name: symbol.name.clone(),
                    address: TargetAddr(address),
                    size: symbol.size,
                    is_function: symbol.kind == SymbolKind::Function
                        || (symbol.kind == SymbolKind::Untyped && kind == SectionKind::Code),
                    is_global: symbol.binding != Binding::Local,
                });
            }
        }
        for (common, &offset) in self.program.commons.iter().zip(&self.placement.commons) {
            symbols.push(LinkedSymbol {
                name: common.name.clone(),
                address: self.bases.data.offset(offset as i64),
                size: common.size,
                is_function: false,
                is_global: true,
            });
        }
        symbols
    }
}
