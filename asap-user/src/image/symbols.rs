//! Symbols of an image, from all tables that it has: .dynsym, .symtab, .gnu_debugdata, a separate debug file. Indexed by name
//! and by address.

use super::{BoundsSource, Function};
use crate::address::ImageOffset;
use object::{
    LittleEndian as LE, elf,
    read::elf::{FileHeader, SectionHeader, Sym},
};
use std::sync::Arc;

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
    strings: Vec<Arc<[u8]>>,
    all: Vec<Raw>,
    files: Vec<(u32, u32)>,
    /// Hash of the name and index, sorted.
    by_name: Vec<(u64, u32)>,
    /// Code symbols, by address; of several at one address the one with the best name first.
    code: Vec<u32>,
}

fn hash(name: &[u8]) -> u64 {
    // FNV-1a: names are short, and a hostile table gains nothing but a slow search in its own names.
    name.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

fn name_at(strings: &[u8], at: u32) -> Option<&[u8]> {
    let tail = strings.get(at as usize..)?;
    Some(&tail[..tail.iter().position(|&byte| byte == 0)?])
}

/// Section index of absolute symbols.
const SHN_ABS: u16 = 0xfff1;

/// Largest unpacked .gnu_debugdata, bytes.
const UNPACKED_MOST: usize = 256 << 20;

/// Unpacks .gnu_debugdata.
pub(super) fn unpack(packed: &[u8]) -> Option<Vec<u8>> {
    struct Bounded(Vec<u8>);
    impl std::io::Write for Bounded {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if self.0.len() + bytes.len() > UNPACKED_MOST {
                return Err(std::io::ErrorKind::OutOfMemory.into());
            }
            self.0.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut unpacked = Bounded(Vec::new());
    lzma_rs::xz_decompress(&mut std::io::BufReader::new(packed), &mut unpacked).ok()?;
    Some(unpacked.0)
}

/// The NUL-terminated string at `at`.
pub(super) fn string_at(strings: &[u8], at: u64) -> Option<String> {
    let tail = strings.get(usize::try_from(at).ok()?..)?;
    let end = tail.iter().position(|&byte| byte == 0)?;
    Some(String::from_utf8_lossy(&tail[..end]).into_owned())
}

/// Number of dynamic symbols, which only the hash tables tell (gABI DT_HASH; DT_GNU_HASH: the highest bucket's chain).
pub(super) fn dynamic_count(gnu: Option<&[u8]>, sysv: Option<&[u8]>) -> Option<usize> {
    let word = |bytes: &[u8], index: usize| {
        bytes.get(index * 4..index * 4 + 4).and_then(|b| b.try_into().ok()).map(u32::from_le_bytes)
    };
    if let Some(table) = sysv {
        return word(table, 1).map(|count| count as usize);
    }
    let table = gnu?;
    let (buckets, first, bloom) = (word(table, 0)? as usize, word(table, 1)? as usize, word(table, 2)? as usize);
    let bucket_at = 4usize.checked_add(bloom.checked_mul(2)?)?;
    let highest = (0..buckets).map_while(|index| word(table, bucket_at + index)).max()? as usize;
    if highest < first {
        return Some(first);
    }
    let chain_at = bucket_at + buckets;
    let mut index = highest;
    // The last entry of a chain has its lowest bit set.
    while word(table, chain_at + (index - first))? & 1 == 0 {
        index += 1;
    }
    Some(index + 1)
}

fn raw(strings: u32, name: u32, value: u64, size: u64, info: u8, section: u16) -> Option<Raw> {
    let kind = match elf::SymbolType(info & 0xf) {
        elf::STT_FUNC => SymbolKind::Function,
        elf::STT_GNU_IFUNC => SymbolKind::Ifunc,
        elf::STT_OBJECT | elf::STT_NOTYPE | elf::STT_COMMON => SymbolKind::Data,
        elf::STT_TLS => SymbolKind::Tls,
        _ => return None,
    };
    if section == 0 || name == 0 {
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
    /// Adds .dynsym, given as raw tables. `versions` is DT_VERSYM: hidden versions are not found by name.
    pub(super) fn add_dynamic(&mut self, symbols: &[u8], strings: &[u8], versions: Option<&[u8]>) {
        const VERSYM_HIDDEN: u8 = 0x80;
        let table = self.strings.len() as u32;
        self.strings.push(strings.into());
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

    /// Adds the .symtab of an ELF file.
    pub(super) fn add_symtab(&mut self, data: &[u8]) {
        let Ok(header) = elf::FileHeader64::<LE>::parse(data) else { return };
        let Ok(sections) = header.sections(LE, data) else { return };
        let Ok(symbols) = sections.symbols(LE, data, elf::SHT_SYMTAB) else { return };
        let Ok(section) = sections.section(symbols.string_section()) else { return };
        let Ok(strings) = section.data(LE, data) else { return };
        let table = self.strings.len() as u32;
        self.strings.push(strings.into());
        self.all.reserve(symbols.len());
        let mut file = 0;
        for entry in symbols.iter() {
            let name = entry.st_name(LE);
            if entry.st_type() == elf::STT_FILE {
                file = 0;
                if name != 0 {
                    self.files.push((table, name));
                    file = self.files.len() as u32;
                }
                continue;
            }
            if entry.st_shndx.get(LE).0 == SHN_ABS {
                continue;
            }
            let symbol =
                raw(table, name, entry.st_value(LE), entry.st_size(LE), entry.st_info.0, entry.st_shndx.get(LE).0);
            if let Some(mut symbol) = symbol {
                if symbol.binding == Binding::Local {
                    symbol.file = file;
                }
                self.all.push(symbol);
            }
        }
    }

    /// Builds the indexes.
    pub(super) fn finish(&mut self) {
        self.by_name = (0..self.all.len() as u32).map(|index| (hash(self.name(index)), index)).collect();
        self.by_name.sort_unstable();
        let is_code = |raw: &Raw| matches!(raw.kind, SymbolKind::Function | SymbolKind::Ifunc);
        let mut code: Vec<u32> =
            (0..self.all.len() as u32).filter(|&index| is_code(&self.all[index as usize])).collect();
        code.sort_unstable_by_key(|&index| {
            let symbol = &self.all[index as usize];
            (symbol.value, symbol.size == 0, symbol.binding == Binding::Local, index)
        });
        self.code = code;
    }

    fn name(&self, index: u32) -> &[u8] {
        let raw = &self.all[index as usize];
        self.strings.get(raw.strings as usize).and_then(|strings| name_at(strings, raw.name)).unwrap_or_default()
    }

    fn symbol(&self, index: u32) -> Symbol {
        let raw = &self.all[index as usize];
        let text = |(table, at): (u32, u32)| {
            let bytes = self.strings.get(table as usize).and_then(|strings| name_at(strings, at)).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        Symbol {
            name: text((raw.strings, raw.name)),
            address: ImageOffset(raw.value),
            size: raw.size,
            kind: raw.kind,
            binding: raw.binding,
            file: (raw.file as usize).checked_sub(1).and_then(|file| self.files.get(file)).map(|&file| text(file)),
            exported: raw.exported,
        }
    }

    /// All symbols with that raw name.
    pub(super) fn named(&self, name: &str) -> impl Iterator<Item = Symbol> {
        let wanted = hash(name.as_bytes());
        let start = self.by_name.partition_point(|&(hash, _)| hash < wanted);
        let same = self.by_name[start..].iter().take_while(move |&&(hash, _)| hash == wanted);
        same.filter(move |&&(_, index)| self.name(index) == name.as_bytes()).map(|&(_, index)| self.symbol(index))
    }

    /// Code symbols whose raw name `wanted` accepts, by address.
    pub(super) fn code_where(&self, wanted: impl Fn(&[u8]) -> bool) -> impl Iterator<Item = Symbol> {
        self.code.iter().filter(move |&&index| wanted(self.name(index))).map(|&index| self.symbol(index))
    }

    /// All code symbols, by address.
    pub(super) fn code(&self) -> impl Iterator<Item = Symbol> {
        self.code.iter().map(|&index| self.symbol(index))
    }

    /// The code symbol that starts at or before `at` and holds it.
    pub(super) fn function_containing(&self, at: ImageOffset) -> Option<Symbol> {
        let next = self.code.partition_point(|&index| self.all[index as usize].value <= at.0);
        let last = self.all.get(*self.code[..next].last()? as usize)?.value;
        let first = self.code.partition_point(|&index| self.all[index as usize].value < last);
        let best = self.symbol(*self.code.get(first)?);
        (best.size == 0 || at.0 - best.address.0 < best.size).then_some(best)
    }

    /// The first code symbol behind `at`.
    pub(super) fn next_code(&self, at: ImageOffset) -> Option<ImageOffset> {
        let next = self.code.partition_point(|&index| self.all[index as usize].value <= at.0);
        self.code.get(next).map(|&index| ImageOffset(self.all[index as usize].value))
    }
}

/// A function as a symbol describes it.
pub(super) fn function(symbol: &Symbol) -> Function {
    Function {
        name: Some(symbol.name.clone()),
        file: symbol.file.clone(),
        address: symbol.address,
        size: symbol.size,
        source: BoundsSource::Symbol,
    }
}
