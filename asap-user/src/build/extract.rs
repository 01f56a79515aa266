//! Writes what a comparison found as one object file that the patch linker takes: the changed functions and what they need.
//! What the program has stays undefined, static things by `file.c:name` (as ASAP_IMPORT declares them). Pure: objects in,
//! bytes out; the same input gives the same bytes. Not for deciding what comes along: that is `compare::include`.
//!
//! A changed function whose address is taken stands for its old entry, which leads to the new code while the patch is in: so
//! pointers that the new code leaves behind in the program hold after the patch has gone.

use super::compare::{
    Comparison,
    object::{Kind, Object, Place, Relocation, Symbol, SymbolKind},
};
use crate::patch::manifest::Replaced;
use object::{
    Architecture, BinaryFormat, Endianness, RelocationFlags, SectionFlags, SymbolFlags, elf,
    write::{self, SectionId, SymbolId, SymbolScope, SymbolSection},
};
use std::collections::{HashMap, HashSet};

/// Stands for functions that are not in the patch, where only the unwind table mentions them: their records are dropped.
const DROPPED: &str = "asap.dropped";

/// Two builds of an object, and what is different.
#[derive(Clone, Copy, Debug)]
pub struct Part<'a> {
    /// Before.
    pub old: &'a Object,
    /// After.
    pub new: &'a Object,
    /// What differs.
    pub comparison: &'a Comparison,
}

/// A patch without its manifest.
#[derive(Clone, Debug)]
pub struct Extracted {
    /// The object file.
    pub bytes: Vec<u8>,
    /// What it replaces.
    pub functions: Vec<Replaced>,
}

/// A patch can't be written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExtractError {
    /// Nothing to write.
    #[error("no function changes, so that there is nothing to patch")]
    Nothing,
    /// Something has no name.
    #[error(
        "{object}: the code uses something that has no name in the program ({subject}); compile with -fdata-sections"
    )]
    Nameless {
        /// The object file.
        object: String,
        /// Its section.
        subject: String,
    },
    /// The writer refused.
    #[error("the patch can't be written: {0}; leave out parts of the change until it can")]
    Writer(String),
}

/// Writes the patch.
///
/// # Errors
/// Nothing changes, or something can't be named.
pub fn extract(parts: &[Part<'_>]) -> Result<Extracted, ExtractError> {
    if parts.iter().all(|part| part.comparison.changed.is_empty()) {
        return Err(ExtractError::Nothing);
    }
    let mut writer = Writer::new(parts);
    for part in parts {
        writer.define(part);
    }
    for (number, part) in parts.iter().enumerate() {
        writer.fill(number, part)?;
    }
    let functions = writer.functions(parts);
    let bytes = writer.object.write().map_err(|error| ExtractError::Writer(error.to_string()))?;
    Ok(Extracted { bytes, functions })
}

struct Writer<'a> {
    object: write::Object<'a>,
    /// Per part: section of the new build -> section here.
    sections: Vec<HashMap<usize, SectionId>>,
    /// Per part: symbol of the new build -> symbol here.
    symbols: Vec<HashMap<usize, SymbolId>>,
    /// Symbols that all parts share, by name.
    shared: HashMap<String, SymbolId>,
    /// Names that are taken.
    taken: HashSet<String>,
    /// Symbols that stand for something of the program by another name.
    imported: HashMap<String, SymbolId>,
    /// `.asap.import`: symbol, and its name in the program.
    declared: Vec<(SymbolId, String)>,
}

impl<'a> Writer<'a> {
    fn new(parts: &[Part<'_>]) -> Self {
        let globals = parts.iter().flat_map(|part| &part.new.symbols).filter(|symbol| !symbol.local);
        Self {
            object: write::Object::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little),
            sections: Vec::new(),
            symbols: Vec::new(),
            shared: HashMap::new(),
            taken: globals.map(|symbol| symbol.name.clone()).collect(),
            imported: HashMap::new(),
            declared: Vec::new(),
        }
    }

    /// A name for a static symbol that no other has.
    fn own_name(&mut self, name: &str) -> String {
        let numbered = (1..).map(|number| format!("{name}.asap.{number}"));
        let mut names = std::iter::once(name.to_owned()).chain(numbered);
        names.find(|name| self.taken.insert(name.clone())).unwrap_or_default()
    }

    /// The sections of a part, and the symbols in them.
    fn define(&mut self, part: &Part<'_>) {
        let (mut sections, mut symbols) = (HashMap::new(), HashMap::new());
        let mut wanted: Vec<usize> = part.comparison.inclusion.sections.iter().copied().collect();
        if wanted.iter().any(|&at| part.new.sections[at].kind == Kind::Code) {
            wanted.extend(part.new.of_kind(Kind::Unwind));
        }
        for at in wanted {
            // Of what several objects bring, one is enough; another's symbols lead to that one.
            let is_known = |symbol: &&Symbol| !symbol.local && self.shared.contains_key(&symbol.name);
            if part.new.symbols_in(at).iter().any(is_known) {
                continue;
            }
            sections.insert(at, self.add_section(&part.new.sections[at]));
        }
        for (number, symbol) in part.new.symbols.iter().enumerate() {
            let Place::Section(at) = symbol.place else { continue };
            // Labels of the compiler need no name: sections do for them.
            let is_label = symbol.local && symbol.kind == SymbolKind::Untyped;
            if is_label || matches!(symbol.kind, SymbolKind::Section | SymbolKind::File) || symbol.name.is_empty() {
                continue;
            }
            if let Some(&known) = self.shared.get(&symbol.name).filter(|_| !symbol.local) {
                symbols.insert(number, known);
            } else if let Some(&section) = sections.get(&at) {
                let name = if symbol.local { self.own_name(&symbol.name) } else { symbol.name.clone() };
                let id = self.add_symbol(&name, symbol, SymbolSection::Section(section));
                if !symbol.local {
                    self.shared.insert(name, id);
                }
                symbols.insert(number, id);
            }
        }
        self.sections.push(sections);
        self.symbols.push(symbols);
    }

    fn add_section(&mut self, section: &super::compare::object::Section) -> SectionId {
        let kind = match section.kind {
            Kind::Code => object::SectionKind::Text,
            Kind::Variable | Kind::Declaration if section.data.is_empty() => object::SectionKind::UninitializedData,
            Kind::Variable | Kind::Declaration => object::SectionKind::Data,
            _ => object::SectionKind::ReadOnlyData,
        };
        let id = self.object.add_section(Vec::new(), section.name.clone().into_bytes(), kind);
        let dropped = elf::SHF_GROUP | elf::SHF_MERGE | elf::SHF_STRINGS | elf::SHF_LINK_ORDER | elf::SHF_COMPRESSED;
        let is_empty = kind == object::SectionKind::UninitializedData;
        self.object.section_mut(id).flags = SectionFlags::Elf {
            sh_type: if is_empty { elf::SHT_NOBITS } else { elf::SHT_PROGBITS },
            sh_flags: elf::SectionFlags(section.flags & !dropped.0),
        };
        if is_empty {
            self.object.append_section_bss(id, section.size, section.alignment);
        } else {
            self.object.append_section_data(id, &section.data, section.alignment);
        }
        id
    }

    fn add_symbol(&mut self, name: &str, like: &Symbol, section: SymbolSection) -> SymbolId {
        let kind = match like.kind {
            SymbolKind::Function | SymbolKind::Ifunc => object::SymbolKind::Text,
            SymbolKind::Object => object::SymbolKind::Data,
            SymbolKind::ThreadLocal => object::SymbolKind::Tls,
            _ => object::SymbolKind::Label,
        };
        // What is undefined has no type, as compilers write it.
        let kind = if section == SymbolSection::Undefined && kind != object::SymbolKind::Tls {
            object::SymbolKind::Unknown
        } else {
            kind
        };
        let is_defined = section != SymbolSection::Undefined;
        self.object.add_symbol(write::Symbol {
            name: name.as_bytes().to_vec(),
            value: if is_defined { like.value } else { 0 },
            size: if is_defined { like.size } else { 0 },
            kind,
            scope: if like.local && is_defined { SymbolScope::Compilation } else { SymbolScope::Dynamic },
            weak: like.weak,
            section,
            flags: SymbolFlags::None,
        })
    }

    /// What the program has under that name.
    fn undefined(&mut self, name: &str, like: &Symbol) -> SymbolId {
        if let Some(&known) = self.shared.get(name) {
            return known;
        }
        let id = self.add_symbol(name, like, SymbolSection::Undefined);
        self.shared.insert(name.to_owned(), id);
        id
    }

    /// What the program has under `written` (`f` or `file.c:f`), whatever the patch has under that name.
    fn imported(&mut self, written: &str, like: &Symbol) -> SymbolId {
        if let Some(&known) = self.imported.get(written) {
            return known;
        }
        let id = self.add_symbol(&format!("asap.import.{written}"), like, SymbolSection::Undefined);
        self.imported.insert(written.to_owned(), id);
        self.declared.push((id, written.to_owned()));
        id
    }

    fn fill(&mut self, number: usize, part: &Part<'_>) -> Result<(), ExtractError> {
        let mut sections: Vec<_> = self.sections[number].iter().map(|(&at, &id)| (at, id)).collect();
        sections.sort_unstable_by_key(|&(at, _)| at);
        for (at, id) in sections {
            for relocation in &part.new.sections[at].relocations {
                let (symbol, addend) = self.target(number, part, at, relocation)?;
                let flags = RelocationFlags::Elf { r_type: elf::RelocationType(relocation.kind) };
                let relocation = write::Relocation { offset: relocation.offset, symbol, addend, flags };
                self.object.add_relocation(id, relocation).map_err(|error| ExtractError::Writer(error.to_string()))?;
            }
        }
        if number + 1 == self.sections.len() {
            self.declare()?;
        }
        Ok(())
    }

    /// What a relocation leads to here.
    fn target(
        &mut self,
        number: usize,
        part: &Part<'_>,
        from: usize,
        relocation: &Relocation,
    ) -> Result<(SymbolId, i64), ExtractError> {
        let symbol = &part.new.symbols[relocation.symbol];
        let Place::Section(at) = symbol.place else {
            return Ok((self.undefined(&symbol.name, symbol), relocation.addend));
        };
        let offset = (symbol.value as i64).wrapping_add(relocation.addend);
        if let Some(old) = self.replaced_address(part, from, relocation, at) {
            // The same place in the old function: its beginning.
            return Ok((old, relocation.addend));
        }
        if let Some(&id) = self.symbols[number].get(&relocation.symbol) {
            return Ok((id, relocation.addend));
        }
        if let Some(&id) = self.sections[number].get(&at) {
            return Ok((self.object.section_symbol(id), offset));
        }
        if let Some(first) = part.new.symbols_in(at).into_iter().find(|symbol| !symbol.local)
            && let Some(&id) = self.shared.get(&first.name)
            && part.comparison.inclusion.sections.contains(&at)
        {
            // Another part has brought it.
            return Ok((id, offset.wrapping_sub(first.value as i64)));
        }
        if let Some(import) = part.comparison.inclusion.imports.get(&at) {
            let kind = part.new.symbols_in(at).first().map_or(SymbolKind::Untyped, |symbol| symbol.kind);
            let like = Symbol { kind, ..Symbol::default() };
            let addend = offset.wrapping_sub(import.offset as i64);
            let id = if import.local {
                self.imported(&written(part.old, &import.name), &like)
            } else {
                self.undefined(&import.name, &like)
            };
            return Ok((id, addend));
        }
        if part.new.sections[from].kind == Kind::Unwind {
            return Ok((self.undefined(DROPPED, &Symbol::default()), 0));
        }
        let subject = part.new.sections[at].name.clone();
        Err(ExtractError::Nameless { object: part.new.name.clone(), subject })
    }

    /// The old entry of a replaced function, where its address is taken.
    fn replaced_address(
        &mut self,
        part: &Part<'_>,
        from: usize,
        relocation: &Relocation,
        at: usize,
    ) -> Option<SymbolId> {
        let changed = part.comparison.changed.iter().find(|changed| changed.section == at)?;
        let section = &part.new.sections[from];
        let tables = section.name.starts_with(".gcc_except_table")
            || matches!(section.kind, Kind::Unwind | Kind::Declaration | Kind::Startup);
        let is_code = section.kind == Kind::Code;
        if tables || from == at || relocation.kind == elf::R_X86_64_PLT32.0 {
            return None;
        }
        // In data only whole addresses are pointers; distances are jump tables.
        if !is_code && relocation.kind != elf::R_X86_64_64.0 {
            return None;
        }
        let symbol = &part.new.symbols[relocation.symbol];
        let beyond = (symbol.value as i64).wrapping_add(relocation.addend);
        let is_start = match elf::RelocationType(relocation.kind) {
            elf::R_X86_64_64 | elf::R_X86_64_32 | elf::R_X86_64_32S => beyond == 0,
            // The field is the last one of a `lea` or `mov`; a jump from a split-off part leads behind the beginning.
            _ => beyond == -4,
        };
        if !is_start {
            return None;
        }
        let written = if changed.local { written(part.old, &changed.old) } else { changed.old.clone() };
        let like = Symbol { kind: SymbolKind::Function, ..Symbol::default() };
        Some(self.imported(&written, &like))
    }

    /// `.asap.import`, as asap-patch.h writes it.
    fn declare(&mut self) -> Result<(), ExtractError> {
        if self.declared.is_empty() {
            return Ok(());
        }
        let names =
            self.object.add_section(Vec::new(), b".rodata.asap_names".to_vec(), object::SectionKind::ReadOnlyData);
        let records = self.object.add_section(Vec::new(), b".asap.import".to_vec(), object::SectionKind::Data);
        let strings = self.object.section_symbol(names);
        for (symbol, written) in std::mem::take(&mut self.declared) {
            let mut text = written.into_bytes();
            text.push(0);
            let name = self.object.append_section_data(names, &text, 1);
            let record = self.object.append_section_data(records, &[0; 16], 8);
            for (offset, symbol, addend) in [(record, symbol, 0), (record + 8, strings, name as i64)] {
                let flags = RelocationFlags::Elf { r_type: elf::R_X86_64_64 };
                let relocation = write::Relocation { offset, symbol, addend, flags };
                self.object
                    .add_relocation(records, relocation)
                    .map_err(|error| ExtractError::Writer(error.to_string()))?;
            }
        }
        Ok(())
    }

    /// What replaces what, by the names here.
    fn functions(&self, parts: &[Part<'_>]) -> Vec<Replaced> {
        let mut functions = Vec::new();
        for (number, part) in parts.iter().enumerate() {
            for changed in &part.comparison.changed {
                let is_it = |symbol: &Symbol| {
                    symbol.place == Place::Section(changed.section)
                        && symbol.name == changed.new
                        && symbol.kind == SymbolKind::Function
                };
                let Some(at) = part.new.symbols.iter().position(is_it) else { continue };
                let Some(&id) = self.symbols[number].get(&at) else { continue };
                functions.push(Replaced {
                    old: changed.old.clone(),
                    file: part.old.source.clone().filter(|_| changed.local),
                    new: String::from_utf8_lossy(&self.object.symbol(id).name).into_owned(),
                });
            }
        }
        functions.sort_by(|a, b| (&a.old, &a.file).cmp(&(&b.old, &b.file)));
        // What several objects bring is one function in the program.
        functions.dedup_by(|b, a| a.old == b.old && a.file == b.file);
        functions
    }
}

/// A static name as declarations and queries write it.
fn written(old: &Object, name: &str) -> String {
    match &old.source {
        Some(source) => format!("{source}:{name}"),
        None => name.to_owned(),
    }
}
