//! Symbols of an image, from all tables that it has: .dynsym, .symtab, .gnu_debugdata, a separate debug file. Indexed by name
//! and by address.

use super::{BoundsSource, Function};
use crate::address::ImageOffset;
use object::{
    LittleEndian as LE, elf,
    read::elf::{FileHeader, Sym},
};
use std::collections::HashMap;

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

    fn is_code(&self) -> bool {
        matches!(self.kind, SymbolKind::Function | SymbolKind::Ifunc)
    }
}

/// All symbols of an image.
#[derive(Debug, Default)]
pub(super) struct SymbolTable {
    all: Vec<Symbol>,
    by_name: HashMap<String, Vec<u32>>,
    /// Code symbols, by address; of several at one address the one with the best name first.
    code: Vec<u32>,
}

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

fn symbol(name: String, value: u64, size: u64, info: u8, section: u16) -> Option<Symbol> {
    let kind = match info & 0xf {
        elf::STT_FUNC => SymbolKind::Function,
        elf::STT_GNU_IFUNC => SymbolKind::Ifunc,
        elf::STT_OBJECT | elf::STT_NOTYPE | elf::STT_COMMON => SymbolKind::Data,
        elf::STT_TLS => SymbolKind::Tls,
        _ => return None,
    };
    if section == elf::SHN_UNDEF || name.is_empty() {
        return None;
    }
    let binding = match info >> 4 {
        elf::STB_LOCAL => Binding::Local,
        elf::STB_WEAK => Binding::Weak,
        _ => Binding::Global,
    };
    Some(Symbol { name, address: ImageOffset(value), size, kind, binding, file: None, exported: false })
}

impl SymbolTable {
    /// Adds .dynsym, given as raw tables. `versions` is DT_VERSYM: hidden versions are not found by name.
    pub(super) fn add_dynamic(&mut self, symbols: &[u8], strings: &[u8], versions: Option<&[u8]>) {
        const VERSYM_HIDDEN: u8 = 0x80;
        for (index, raw) in symbols.chunks_exact(24).enumerate() {
            let hidden = versions.and_then(|v| v.get(index * 2 + 1)).is_some_and(|high| high & VERSYM_HIDDEN != 0);
            let at = u32::from_le_bytes(raw[..4].try_into().unwrap_or_default());
            let word = |at: usize| raw[at..at + 8].try_into().map_or(0, u64::from_le_bytes);
            let section = u16::from_le_bytes([raw[6], raw[7]]);
            let Some(name) = string_at(strings, u64::from(at)) else { continue };
            if let Some(symbol) = symbol(name, word(8), word(16), raw[4], section)
                && symbol.binding != Binding::Local
            {
                self.all.push(Symbol { exported: !hidden, ..symbol });
            }
        }
    }

    /// Adds the .symtab of an ELF file.
    pub(super) fn add_symtab(&mut self, data: &[u8]) {
        let Ok(header) = elf::FileHeader64::<LE>::parse(data) else { return };
        let Ok(sections) = header.sections(LE, data) else { return };
        let Ok(table) = sections.symbols(LE, data, elf::SHT_SYMTAB) else { return };
        let mut file: Option<String> = None;
        for raw in table.iter() {
            let Ok(name) = raw.name(LE, table.strings()) else { continue };
            let name = String::from_utf8_lossy(name).into_owned();
            if raw.st_type() == elf::STT_FILE {
                file = Some(name).filter(|name| !name.is_empty());
                continue;
            }
            if raw.st_shndx(LE) == elf::SHN_ABS {
                continue;
            }
            if let Some(mut symbol) = symbol(name, raw.st_value(LE), raw.st_size(LE), raw.st_info(), raw.st_shndx(LE)) {
                if symbol.binding == Binding::Local {
                    symbol.file.clone_from(&file);
                }
                self.all.push(symbol);
            }
        }
    }

    /// Builds the indexes.
    pub(super) fn finish(&mut self) {
        self.by_name.clear();
        for (index, symbol) in self.all.iter().enumerate() {
            self.by_name.entry(symbol.name.clone()).or_default().push(index as u32);
        }
        self.code = (0..self.all.len() as u32).filter(|&index| self.all[index as usize].is_code()).collect();
        let all = &self.all;
        self.code.sort_by_key(|&index| {
            let symbol = &all[index as usize];
            (symbol.address, symbol.size == 0, symbol.binding == Binding::Local, symbol.name.len())
        });
    }

    /// All symbols with that raw name.
    pub(super) fn named(&self, name: &str) -> impl Iterator<Item = &Symbol> {
        self.by_name.get(name).into_iter().flatten().map(|&index| &self.all[index as usize])
    }

    /// All code symbols, by address.
    pub(super) fn code(&self) -> impl DoubleEndedIterator<Item = &Symbol> {
        self.code.iter().map(|&index| &self.all[index as usize])
    }

    /// The code symbol that starts at or before `at` and holds it.
    pub(super) fn function_containing(&self, at: ImageOffset) -> Option<&Symbol> {
        let next = self.code.partition_point(|&index| self.all[index as usize].address <= at);
        let last = self.all.get(*self.code[..next].last()? as usize)?;
        let first = self.code.partition_point(|&index| self.all[index as usize].address < last.address);
        let best = &self.all[self.code[first] as usize];
        (best.size == 0 || at.0 - best.address.0 < best.size).then_some(best)
    }

    /// The first code symbol behind `at`.
    pub(super) fn next_code(&self, at: ImageOffset) -> Option<ImageOffset> {
        let next = self.code.partition_point(|&index| self.all[index as usize].address <= at);
        self.code.get(next).map(|&index| self.all[index as usize].address)
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
