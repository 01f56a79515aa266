//! Symbols of an image, from all tables that it has: .dynsym, .symtab, .gnu_debugdata, a separate debug file. Indexed by name
//! and by address.

use super::bytes::{ImageBytes, NameBudget, Strings, hash};
use crate::address::ImageOffset;
use object::{
    LittleEndian as LE, elf,
    read::elf::{FileHeader, SectionHeader, Sym},
};

/// What a symbol stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SymbolKind {
    /// STT_FUNC.
    Function,
    /// STT_GNU_IFUNC: a function that chooses the function.
    Ifunc,
    /// STT_OBJECT and the like.
    Data,
    /// STT_TLS: the address is an offset in the TLS segment.
    Tls,
}

/// How a symbol binds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// STB_LOCAL.
    Local,
    /// STB_GLOBAL, STB_GNU_UNIQUE.
    Global,
    /// STB_WEAK.
    Weak,
}

/// A defined symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Raw name.
    pub name: String,
    /// Value.
    pub address: ImageOffset,
    /// Size, bytes; 0 where unknown.
    pub size: u64,
    /// What it stands for.
    pub kind: SymbolKind,
    /// How it binds.
    pub binding: Binding,
    /// Source file (STT_FILE) of a local symbol.
    pub file: Option<String>,
    /// Other modules can use it.
    pub exported: bool,
}

impl Symbol {
    /// It comes from the source file `file` (a full path or its last part).
    #[must_use]
    pub fn is_from(&self, file: &str) -> bool {
        self.file.as_deref().is_some_and(|own| own == file || own.rsplit('/').next() == Some(file))
    }
}

/// A symbol as its table has it: the name stays where it is.
#[derive(Clone, Copy)]
struct Raw {
    /// Which of the string tables, and where in it.
    strings: u32,
    name: u32,
    value: u64,
    size: u64,
    kind: SymbolKind,
    binding: Binding,
    exported: bool,
    /// Index of the STT_FILE symbol in front of a local one, plus one.
    file: u32,
}

/// All symbols of an image. Names are kept as places in their string tables, so that a large file costs little.
#[derive(Default)]
pub(super) struct SymbolTable {
    strings: Vec<Strings>,
    all: Vec<Raw>,
    files: Vec<(u32, u32)>,
    /// Hash of the name and index, sorted.
    by_name: Vec<(u32, u32)>,
    /// Code symbols, by address; of several at one address the one with the best name first.
    code: Vec<u32>,
}

/// Most definitions of one name that are looked at. Large programs have hundreds of static functions of one name.
const SAME_NAME_MOST: usize = 4096;
/// How many symbols that begin in front of an address, but end there too, are looked at to find the one around it.
const NESTED_MOST: usize = 64;

fn raw(strings: u32, name: u32, value: u64, size: u64, info: u8, section: u16) -> Option<Raw> {
    let kind = match elf::SymbolType(info & 0xf) {
        elf::STT_FUNC => SymbolKind::Function,
        elf::STT_GNU_IFUNC => SymbolKind::Ifunc,
        elf::STT_OBJECT | elf::STT_NOTYPE | elf::STT_COMMON => SymbolKind::Data,
        elf::STT_TLS => SymbolKind::Tls,
        _ => return None,
    };
    if section == elf::SHN_UNDEF.0 || section == elf::SHN_ABS.0 || name == 0 {
        return None;
    }
    let binding = match elf::SymbolBind(info >> 4) {
        elf::STB_LOCAL => Binding::Local,
        elf::STB_WEAK => Binding::Weak,
        _ => Binding::Global,
    };
    Some(Raw { strings, name, value, size, kind, binding, exported: false, file: 0 })
}

impl SymbolTable {
    /// Adds .dynsym, given as its bytes. `versions` is DT_VERSYM: hidden versions are not found by name.
    pub(super) fn add_dynamic(&mut self, symbols: &[u8], strings: Strings, versions: Option<&[u8]>) {
        const VERSYM_HIDDEN: u8 = 0x80;
        let table = self.strings.len() as u32;
        self.strings.push(strings);
        for (index, entry) in symbols.chunks_exact(24).enumerate() {
            let hidden = versions.and_then(|v| v.get(index * 2 + 1)).is_some_and(|high| high & VERSYM_HIDDEN != 0);
            let name = u32::from_le_bytes(entry[..4].try_into().unwrap_or_default());
            let word = |at: usize| entry[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
            let section = u16::from_le_bytes([entry[6], entry[7]]);
            if let Some(symbol) = raw(table, name, word(8), word(16), entry[4], section)
                && symbol.binding != Binding::Local
            {
                self.all.push(Raw { exported: !hidden, ..symbol });
            }
        }
    }

    /// Adds the .symtab of an ELF file, where it has one.
    pub(super) fn add_symtab(&mut self, file: &ImageBytes) {
        let data = file.bytes();
        let Ok(header) = elf::FileHeader64::<LE>::parse(data) else { return };
        let Ok(sections) = header.sections(LE, data) else { return };
        let Ok(symbols) = sections.symbols(LE, data, elf::SHT_SYMTAB) else { return };
        let Ok(section) = sections.section(symbols.string_section()) else { return };
        let Some((offset, size)) = section.file_range(LE) else { return };
        let (Ok(start), Ok(size)) = (usize::try_from(offset), usize::try_from(size)) else { return };
        let table = self.strings.len() as u32;
        self.strings.push(Strings::new(file, start..start.saturating_add(size)));
        self.all.reserve(symbols.len());
        let mut source = 0;
        for entry in symbols.iter() {
            let name = entry.st_name(LE);
            if entry.st_type() == elf::STT_FILE {
                // The linker ends the symbols of the last file with a file without name.
                source = 0;
                if name != 0 {
                    self.files.push((table, name));
                    source = self.files.len() as u32;
                }
                continue;
            }
            let section = entry.st_shndx.get(LE).0;
            if let Some(mut symbol) = raw(table, name, entry.st_value(LE), entry.st_size(LE), entry.st_info.0, section)
            {
                if symbol.binding == Binding::Local {
                    symbol.file = source;
                }
                self.all.push(symbol);
            }
        }
    }

    /// Adds symbols that are told from elsewhere; `places` has the name and the file of each in `strings`.
    pub(super) fn add_told(&mut self, told: &[Symbol], places: &[(u32, Option<u32>)], strings: Strings) {
        let table = self.strings.len() as u32;
        self.strings.push(strings);
        for (symbol, &(name, file)) in told.iter().zip(places) {
            let file = file.map_or(0, |file| {
                self.files.push((table, file));
                self.files.len() as u32
            });
            self.all.push(Raw {
                strings: table,
                name,
                value: symbol.address.0,
                size: symbol.size,
                kind: symbol.kind,
                binding: symbol.binding,
                exported: false,
                file,
            });
        }
    }

    /// Builds the indexes.
    pub(super) fn finish(&mut self) {
        let mut budget = NameBudget::for_table(self.strings.iter().map(Strings::len).sum());
        let mut by_name = Vec::with_capacity(self.all.len());
        let mut kept = 0;
        for index in 0..self.all.len() {
            let raw = self.all[index];
            let name = self.strings.get(raw.strings as usize).and_then(|strings| strings.name(raw.name));
            if !budget.spend(name) {
                break;
            }
            if let Some(name) = name {
                by_name.push((hash(name), kept));
                self.all[kept as usize] = raw;
                kept += 1;
            }
        }
        self.all.truncate(kept as usize);
        by_name.sort_unstable();
        let code =
            self.all.iter().zip(0u64..).filter(|(raw, _)| matches!(raw.kind, SymbolKind::Function | SymbolKind::Ifunc));
        // At one address, first what has a size, then what is global.
        let rank = |raw: &Raw| u64::from(raw.size == 0) << 1 | u64::from(raw.binding == Binding::Local);
        let mut code: Vec<(u64, u64)> = code.map(|(raw, index)| (raw.value, rank(raw) << 32 | index)).collect();
        code.sort_unstable();
        let code = code.into_iter().map(|(_, index)| index as u32).collect();
        (self.by_name, self.code) = (by_name, code);
    }

    fn name(&self, index: u32) -> &[u8] {
        let raw = &self.all[index as usize];
        self.strings.get(raw.strings as usize).and_then(|strings| strings.name(raw.name)).unwrap_or_default()
    }

    fn symbol(&self, index: u32) -> Symbol {
        let raw = &self.all[index as usize];
        let file = (raw.file as usize).checked_sub(1).and_then(|file| self.files.get(file));
        Symbol {
            name: String::from_utf8_lossy(self.name(index)).into_owned(),
            address: ImageOffset(raw.value),
            size: raw.size,
            kind: raw.kind,
            binding: raw.binding,
            file: file.and_then(|&(table, name)| self.strings.get(table as usize)?.text(name)),
            exported: raw.exported,
        }
    }

    /// All symbols with that raw name.
    pub(super) fn named(&self, name: &str) -> impl Iterator<Item = Symbol> {
        let wanted = hash(name.as_bytes());
        let start = self.by_name.partition_point(|&(hash, _)| hash < wanted);
        let same = self.by_name[start..].iter().take_while(move |&&(hash, _)| hash == wanted);
        let named = same.filter(move |&&(_, index)| self.name(index) == name.as_bytes());
        named.take(SAME_NAME_MOST).map(|&(_, index)| self.symbol(index))
    }

    /// Code symbols whose raw name `wanted` accepts, by address.
    pub(super) fn code_where(&self, wanted: impl Fn(&[u8]) -> bool) -> impl Iterator<Item = Symbol> {
        self.code.iter().filter(move |&&index| wanted(self.name(index))).map(|&index| self.symbol(index))
    }

    /// Raw names of all code symbols, by address.
    pub(super) fn code_names(&self) -> impl Iterator<Item = &[u8]> {
        self.code.iter().map(|&index| self.name(index))
    }

    /// All symbols, in no order.
    pub(super) fn all(&self) -> impl Iterator<Item = Symbol> {
        (0..self.all.len() as u32).map(|index| self.symbol(index))
    }

    /// All code symbols, by address.
    pub(super) fn code(&self) -> impl Iterator<Item = Symbol> {
        self.code.iter().map(|&index| self.symbol(index))
    }

    /// All code symbols that start at `at`, the best name first.
    pub(super) fn code_at(&self, at: ImageOffset) -> impl Iterator<Item = Symbol> {
        let first = self.code.partition_point(|&index| self.all[index as usize].value < at.0);
        let here = self.code[first..].iter().take_while(move |&&index| self.all[index as usize].value == at.0);
        here.take(SAME_NAME_MOST).map(|&index| self.symbol(index))
    }

    /// The innermost code symbol with a size that holds `at`.
    pub(super) fn function_containing(&self, at: ImageOffset) -> Option<Symbol> {
        let next = self.code.partition_point(|&index| self.all[index as usize].value <= at.0);
        let holds = |raw: &Raw| at.0 - raw.value < raw.size;
        let before = self.code[..next].iter().rev().take(NESTED_MOST).map(|&index| &self.all[index as usize]);
        let start = before.into_iter().find(|raw| holds(raw))?.value;
        let first = self.code[..next].partition_point(|&index| self.all[index as usize].value < start);
        // Of several at that address, the best name.
        self.code[first..next].iter().find(|&&index| holds(&self.all[index as usize])).map(|&index| self.symbol(index))
    }

    /// The last code symbol at or before `at`, whether or not it reaches that far.
    pub(super) fn code_before(&self, at: ImageOffset) -> Option<Symbol> {
        let next = self.code.partition_point(|&index| self.all[index as usize].value <= at.0);
        let start = self.all.get(*self.code[..next].last()? as usize)?.value;
        self.code_at(ImageOffset(start)).next()
    }
}
