//! One ET_REL file as plain data: sections, symbols, relocations, with everything checked that a hostile or damaged file
//! could get wrong. Not for what the files mean together: that is `merge`.

use super::error::PatchError;
use object::elf;
use object::read::elf::{FileHeader, Rela, SectionHeader, Sym};
use object::{LittleEndian, SectionIndex};

type Header = elf::FileHeader64<LittleEndian>;
const LE: LittleEndian = LittleEndian;

/// Largest object file, and largest sum of all files of a patch.
pub(super) const SIZE_LIMIT: u64 = 64 << 20;
/// Largest alignment that bases (page addresses) can keep.
pub(super) const ALIGNMENT_LIMIT: u64 = 4096;

/// One object file.
#[derive(Clone, Debug)]
pub(super) struct Input {
    pub name: String,
    pub sections: Vec<Section>,
    pub symbols: Vec<Symbol>,
    /// COMDAT groups: signature and member sections.
    pub groups: Vec<(String, Vec<usize>)>,
}

/// A section; `index` in the file is its place in `Input::sections`.
#[derive(Clone, Debug)]
pub(super) struct Section {
    pub name: String,
    pub kind: SectionKind,
    /// Contents; empty for .bss and for ignored sections.
    pub data: Vec<u8>,
    /// Size in memory.
    pub size: u64,
    pub alignment: u64,
    /// In order of their offsets.
    pub relocations: Vec<Relocation>,
}

/// Where a section goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SectionKind {
    Code,
    ReadOnly,
    Data,
    /// .eh_frame: merged record by record.
    Unwind,
    /// .asap.*: read, not laid out.
    Declaration,
    /// Not part of the running patch.
    Ignored,
    /// Part of a COMDAT group that another file has brought already.
    Discarded,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Relocation {
    pub offset: u64,
    pub kind: u32,
    pub symbol: usize,
    pub addend: i64,
}

#[derive(Clone, Debug)]
pub(super) struct Symbol {
    pub name: String,
    pub value: u64,
    pub size: u64,
    pub binding: Binding,
    pub kind: SymbolKind,
    pub place: Place,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Binding {
    Local,
    Global,
    Weak,
    /// STB_GNU_UNIQUE: C++ vague linkage, one per process.
    Unique,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SymbolKind {
    Untyped,
    Object,
    Function,
    Section,
    ThreadLocal,
    Other,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Undefined,
    Absolute,
    Common,
    Section(usize),
}

impl Input {
    /// Reads one file.
    pub fn read(file: &str, bytes: &[u8]) -> Result<Self, PatchError> {
        let header = check_header(file, bytes)?;
        let malformed = |problem: String| PatchError::Malformed { file: file.to_owned(), problem };
        let table = header.sections(LE, bytes).map_err(|e| malformed(e.to_string()))?;

        let mut sections = Vec::with_capacity(table.len());
        for (index, section) in table.enumerate() {
            if index.0 == 0 {
                sections.push(Section::null());
                continue;
            }
            let name = table.section_name(LE, section).map_err(|e| malformed(format!("section {}: {e}", index.0)))?;
            let name = text(name);
            sections.push(read_section(file, bytes, section, name)?);
        }
        let has_code = sections.iter().any(|s| s.kind == SectionKind::Code && s.size > 0);
        if !has_code && sections.iter().any(|s| s.name.starts_with(".gnu.lto_")) {
            return Err(PatchError::LinkTimeOptimisation { file: file.to_owned() });
        }

        let symbol_table = table.symbols(LE, bytes, elf::SHT_SYMTAB).map_err(|e| malformed(e.to_string()))?;
        let mut symbols = Vec::with_capacity(symbol_table.len());
        for (index, symbol) in symbol_table.iter().enumerate() {
            let name =
                symbol_table.symbol_name(LE, symbol).map_err(|e| malformed(format!("name of symbol {index}: {e}")))?;
            let place = match symbol.st_shndx(LE) {
                elf::SHN_UNDEF => Place::Undefined,
                elf::SHN_ABS => Place::Absolute,
                elf::SHN_COMMON => Place::Common,
                _ => {
                    let section = symbol_table
                        .symbol_section(LE, symbol, object::SymbolIndex(index))
                        .map_err(|e| malformed(format!("symbol {index}: {e}")))?
                        .ok_or_else(|| malformed(format!("symbol {index} is in a section of unknown meaning")))?;
                    if section.0 >= sections.len() {
                        return Err(malformed(format!(
                            "symbol {index} is in section {}, which does not exist",
                            section.0
                        )));
                    }
                    Place::Section(section.0)
                }
            };
            symbols.push(read_symbol(file, symbol, text(name), place, &sections)?);
        }
        let mut input = Self { name: file.to_owned(), sections, symbols, groups: Vec::new() };

        for (index, section) in table.enumerate() {
            if let Some((flags, members)) = section.group(LE, bytes).map_err(|e| malformed(e.to_string()))?
                && flags.0 & elf::GRP_COMDAT.0 != 0
            {
                let signature = section.sh_info(LE) as usize;
                let signature = input
                    .symbols
                    .get(signature)
                    .ok_or_else(|| malformed(format!("group {} has no signature symbol", index.0)))?;
                // gas names a group by a section symbol when the signature is a section's name.
                let name = match (signature.kind, signature.place) {
                    (SymbolKind::Section, Place::Section(s)) => input.sections[s].name.clone(),
                    _ => signature.name.clone(),
                };
                let members: Vec<usize> = members.iter().map(|m| m.get(LE) as usize).collect();
                if members.iter().any(|&m| m >= input.sections.len()) {
                    return Err(malformed(format!("group {} has a member that does not exist", index.0)));
                }
                input.groups.push((name, members));
            }
            input.read_relocations(bytes, section, symbol_table.section())?;
        }
        Ok(input)
    }

    fn read_relocations(
        &mut self,
        bytes: &[u8],
        section: &elf::SectionHeader64<LittleEndian>,
        symbol_table: SectionIndex,
    ) -> Result<(), PatchError> {
        let file = self.name.clone();
        let malformed = |problem: String| PatchError::Malformed { file: file.clone(), problem };
        let kind = section.sh_type(LE);
        if ![elf::SHT_REL, elf::SHT_RELA, elf::SHT_CREL, elf::SHT_RELR].contains(&kind) {
            return Ok(());
        }
        let target = section.sh_info(LE) as usize;
        let symbol_count = self.symbols.len();
        let Some(patched) = self.sections.get_mut(target).filter(|_| target != 0) else {
            return Err(malformed(format!("relocations for section {target}, which does not exist")));
        };
        if patched.kind == SectionKind::Ignored {
            return Ok(());
        }
        let Some((entries, symbols)) = section.rela(LE, bytes).map_err(|e| malformed(e.to_string()))? else {
            return Err(malformed(format!(
                "relocations of section {} are not of the form x86-64 uses (RELA)",
                patched.name
            )));
        };
        if symbols != symbol_table {
            return Err(malformed(format!("relocations of section {} use an unknown symbol table", patched.name)));
        }
        for entry in entries {
            let relocation = Relocation {
                offset: entry.r_offset(LE),
                kind: entry.r_type(LE, false).0,
                symbol: entry.r_sym(LE, false) as usize,
                addend: entry.r_addend(LE),
            };
            if relocation.symbol >= symbol_count {
                return Err(malformed(format!("a relocation of section {} has no symbol", patched.name)));
            }
            if relocation.offset >= patched.data.len() as u64 {
                return Err(malformed(format!("a relocation of section {} lies outside of it", patched.name)));
            }
            patched.relocations.push(relocation);
        }
        patched.relocations.sort_by_key(|r| r.offset);
        Ok(())
    }
}

impl Section {
    fn null() -> Self {
        Self {
            name: String::new(),
            kind: SectionKind::Ignored,
            data: Vec::new(),
            size: 0,
            alignment: 1,
            relocations: Vec::new(),
        }
    }

    /// Whether it has an address in the linked patch.
    pub fn is_laid_out(&self) -> bool {
        matches!(self.kind, SectionKind::Code | SectionKind::ReadOnly | SectionKind::Data)
    }
}

fn check_header<'data>(file: &str, bytes: &'data [u8]) -> Result<&'data Header, PatchError> {
    let not_an_object = |found: &str| PatchError::NotAnObject { file: file.to_owned(), found: found.to_owned() };
    if bytes.len() as u64 > SIZE_LIMIT {
        return Err(PatchError::TooLarge { file: file.to_owned(), size: bytes.len() as u64, limit: SIZE_LIMIT });
    }
    match bytes {
        [] => return Err(not_an_object("it is empty")),
        [0x7f, b'E', b'L', b'F', ..] => {}
        [b'B', b'C', 0xc0, 0xde, ..] => return Err(PatchError::LinkTimeOptimisation { file: file.to_owned() }),
        [b'!', b'<', b'a', b'r', b'c', b'h', b'>', ..] => {
            return Err(not_an_object("it is an archive; unpack it and give the members that change"));
        }
        _ => return Err(not_an_object("it does not begin like an ELF file")),
    }
    let architecture = |found: String| PatchError::Architecture { file: file.to_owned(), found };
    match bytes.get(4) {
        Some(&2) => {}
        Some(&1) => return Err(architecture("a 32-bit machine, or x32".to_owned())),
        _ => return Err(not_an_object("its ELF class is unknown")),
    }
    if bytes.get(5) == Some(&2) {
        return Err(architecture("a big-endian machine".to_owned()));
    }
    let header =
        Header::parse(bytes).map_err(|e| PatchError::Malformed { file: file.to_owned(), problem: e.to_string() })?;
    let machine = header.e_machine(LE);
    if machine != elf::EM_X86_64 {
        let name = match machine {
            elf::EM_AARCH64 => "64-bit ARM".to_owned(),
            elf::EM_RISCV => "RISC-V".to_owned(),
            elf::EM_BPF => "eBPF".to_owned(),
            other => format!("ELF machine number {}", other.0),
        };
        return Err(architecture(name));
    }
    let found = match header.e_type(LE) {
        elf::ET_REL => return Ok(header),
        elf::ET_EXEC => "an executable".to_owned(),
        elf::ET_DYN => "a shared library or position-independent executable".to_owned(),
        elf::ET_CORE => "a core dump".to_owned(),
        other => format!("an ELF file of type {}", other.0),
    };
    Err(PatchError::NotRelocatable { file: file.to_owned(), found })
}

fn read_section(
    file: &str,
    bytes: &[u8],
    header: &elf::SectionHeader64<LittleEndian>,
    name: String,
) -> Result<Section, PatchError> {
    let flags = header.sh_flags(LE);
    let kind = header.sh_type(LE);
    let mut section = Section { name, ..Section::null() };
    let size = header.sh_size(LE);
    let allocated = flags.contains(elf::SHF_ALLOC);

    if allocated && size > 0 {
        let constructor = [elf::SHT_INIT_ARRAY, elf::SHT_FINI_ARRAY, elf::SHT_PREINIT_ARRAY].contains(&kind)
            || [".ctors", ".dtors", ".init_array", ".fini_array", ".preinit_array", ".init", ".fini"]
                .iter()
                .any(|&n| section.name == n || section.name.strip_prefix(n).is_some_and(|rest| rest.starts_with('.')));
        if constructor {
            return Err(PatchError::Constructor { file: file.to_owned(), section: section.name });
        }
        if flags.contains(elf::SHF_TLS) {
            return Err(PatchError::ThreadLocalDefinition { file: file.to_owned(), symbol: section.name });
        }
    }
    section.kind = if section.name == ".asap" || section.name.starts_with(".asap.") {
        SectionKind::Declaration
    } else if !allocated
        || flags.contains(elf::SHF_EXCLUDE)
        || kind == elf::SHT_NOTE
        || section.name.starts_with(".note.")
        || section.name == ".sframe"
        || section.name == "__patchable_function_entries"
    {
        SectionKind::Ignored
    } else if section.name == ".eh_frame" {
        SectionKind::Unwind
    } else if flags.contains(elf::SHF_EXECINSTR) {
        SectionKind::Code
    } else if flags.contains(elf::SHF_WRITE) {
        SectionKind::Data
    } else {
        SectionKind::ReadOnly
    };
    if section.kind == SectionKind::Ignored {
        return Ok(section);
    }
    let malformed = |problem: String| PatchError::Malformed {
        file: file.to_owned(),
        problem: format!("section {}: {problem}", section.name),
    };
    if flags.contains(elf::SHF_COMPRESSED) {
        return Err(malformed("contents in memory can't be compressed".to_owned()));
    }
    let alignment = header.sh_addralign(LE).max(1);
    if !alignment.is_power_of_two() {
        return Err(malformed(format!("alignment {alignment} is not a power of two")));
    }
    if alignment > ALIGNMENT_LIMIT {
        return Err(PatchError::Alignment {
            file: file.to_owned(),
            what: format!("section {}", section.name),
            alignment,
        });
    }
    let data = header.data(LE, bytes).map_err(|e| malformed(e.to_string()))?.to_vec();
    section.alignment = alignment;
    section.size = size;
    section.data = data;
    Ok(section)
}

fn read_symbol(
    file: &str,
    symbol: &elf::Sym64<LittleEndian>,
    name: String,
    place: Place,
    sections: &[Section],
) -> Result<Symbol, PatchError> {
    let kind = match symbol.st_type() {
        elf::STT_NOTYPE => SymbolKind::Untyped,
        elf::STT_OBJECT | elf::STT_COMMON => SymbolKind::Object,
        elf::STT_FUNC => SymbolKind::Function,
        elf::STT_SECTION => SymbolKind::Section,
        elf::STT_TLS => SymbolKind::ThreadLocal,
        elf::STT_GNU_IFUNC if place != Place::Undefined => {
            return Err(PatchError::IndirectFunction { file: file.to_owned(), symbol: name });
        }
        elf::STT_GNU_IFUNC => SymbolKind::Function,
        _ => SymbolKind::Other,
    };
    if kind == SymbolKind::ThreadLocal && place != Place::Undefined {
        return Err(PatchError::ThreadLocalDefinition { file: file.to_owned(), symbol: name });
    }
    let value = symbol.st_value(LE);
    if let Place::Section(index) = place
        && sections[index].kind != SectionKind::Ignored
        && value > sections[index].size
    {
        return Err(PatchError::Malformed {
            file: file.to_owned(),
            problem: format!("`{name}` lies outside of its section {}", sections[index].name),
        });
    }
    Ok(Symbol {
        name,
        value,
        size: symbol.st_size(LE),
        binding: match symbol.st_bind() {
            elf::STB_LOCAL => Binding::Local,
            elf::STB_WEAK => Binding::Weak,
            elf::STB_GNU_UNIQUE => Binding::Unique,
            _ => Binding::Global,
        },
        kind,
        place,
    })
}

/// Names are shown to people and compared with names of the target; bytes that are no UTF-8 stay apart from each other
/// well enough when replaced.
fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
