//! An object file as it is compared: sections, symbols and relocations as plain data. Not for linking: that is `patch`, which
//! reads objects with other eyes (it refuses what can't run in a patch; here everything may occur).

use super::CompareError;
use object::{
    LittleEndian, Object as _, ObjectSection as _, ObjectSymbol as _, RelocationFlags, RelocationTarget, elf,
    read::elf::{ElfFile64, ElfSection64, ElfSymbol64, SectionHeader as _},
};

const LE: LittleEndian = LittleEndian;

/// Largest object file that is read, bytes.
const SIZE_MOST: usize = 512 << 20;

/// One object file.
#[derive(Clone, Debug)]
pub struct Object {
    /// What people call it.
    pub name: String,
    /// Its source file, as the compiler named it (STT_FILE).
    pub source: Option<String>,
    /// By their number in the file; number 0 is empty.
    pub sections: Vec<Section>,
    /// By their number in the file; number 0 is empty.
    pub symbols: Vec<Symbol>,
}

/// A section.
#[derive(Clone, Debug, Default)]
pub struct Section {
    /// As in the file.
    pub name: String,
    /// What is in it.
    pub kind: Kind,
    /// `sh_flags`.
    pub flags: u64,
    /// Power of two.
    pub alignment: u64,
    /// Size of an entry, where all have the same.
    pub entry_size: u64,
    /// Bytes in memory.
    pub size: u64,
    /// Contents; none of what starts as zeros.
    pub data: Vec<u8>,
    /// In order of their offsets.
    pub relocations: Vec<Relocation>,
}

/// What is in a section.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// Functions.
    Code,
    /// Constants, also those that the dynamic linker completes.
    Constant,
    /// Variables.
    Variable,
    /// Thread-local variables.
    ThreadLocal,
    /// Strings that the linker merges: only their text counts.
    Strings,
    /// Numbers that the linker merges: only their value counts.
    Literals,
    /// What runs when the program starts or ends.
    Startup,
    /// What asap-patch.h says of the patch: hooks.
    Declaration,
    /// The unwind table.
    Unwind,
    /// Debug information.
    Debug,
    /// Of no consequence for the running program.
    #[default]
    Other,
}

/// A place in a section that the linker fills in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relocation {
    /// In the section.
    pub offset: u64,
    /// `R_X86_64_*`.
    pub kind: u32,
    /// Number of the symbol.
    pub symbol: usize,
    /// As it stands.
    pub addend: i64,
}

/// A symbol.
#[derive(Clone, Debug, Default)]
pub struct Symbol {
    /// Raw name; empty for sections.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// Offset in its section.
    pub value: u64,
    /// Bytes.
    pub size: u64,
    /// What it is.
    pub kind: SymbolKind,
    /// Static.
    pub local: bool,
    /// Others may define it, too.
    pub weak: bool,
}

/// Where a symbol is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// In another object.
    #[default]
    Undefined,
    /// A number.
    Absolute,
    /// The linker makes room for it.
    Common,
    /// In that section.
    Section(usize),
}

/// What a symbol is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SymbolKind {
    /// Not said.
    #[default]
    Untyped,
    /// Code.
    Function,
    /// Code that chooses a function when the program starts.
    Ifunc,
    /// A variable or constant.
    Object,
    /// A thread-local variable.
    ThreadLocal,
    /// The section itself.
    Section,
    /// Names the source file.
    File,
}

impl Object {
    /// Reads an object file.
    ///
    /// # Errors
    /// It is none for x86-64, or damaged.
    pub fn read(name: &str, bytes: &[u8]) -> Result<Self, CompareError> {
        let refuse = |problem: &str| CompareError::NotAnObject { file: name.to_owned(), problem: problem.to_owned() };
        let damaged =
            |error: object::Error| CompareError::NotAnObject { file: name.to_owned(), problem: error.to_string() };
        if bytes.len() > SIZE_MOST {
            return Err(refuse("it is too large"));
        }
        if bytes.starts_with(b"BC\xc0\xde") {
            return Err(CompareError::LinkTimeOptimisation { file: name.to_owned() });
        }
        let file = ElfFile64::<LittleEndian>::parse(bytes).map_err(damaged)?;
        if file.architecture() != object::Architecture::X86_64 || file.kind() != object::ObjectKind::Relocatable {
            return Err(refuse("it is no relocatable object for x86-64"));
        }
        let mut sections = Vec::new();
        for section in file.sections() {
            let at = section.index().0;
            if sections.len() <= at {
                sections.resize_with(at + 1, Section::default);
            }
            sections[at] = read_section(&section).map_err(damaged)?;
        }
        let mut symbols: Vec<Symbol> = Vec::new();
        let mut source = None;
        for symbol in file.symbols() {
            let at = symbol.index().0;
            if symbols.len() <= at {
                symbols.resize_with(at + 1, Symbol::default);
            }
            symbols[at] = read_symbol(&symbol, sections.len()).ok_or_else(|| refuse("a symbol lies in no section"))?;
            if symbols[at].kind == SymbolKind::File && source.is_none() && !symbols[at].name.is_empty() {
                source = Some(symbols[at].name.clone());
            }
        }
        for section in &sections {
            if section.relocations.iter().any(|r| r.symbol >= symbols.len().max(1) || r.offset >= section.size) {
                return Err(refuse("a relocation has no symbol, or lies outside of its section"));
            }
        }
        if symbols.is_empty() {
            symbols.push(Symbol::default());
        }
        let is_bitcode = |section: &Section| section.name.starts_with(".gnu.lto_");
        let has_code = |section: &Section| section.kind == Kind::Code && section.size > 0;
        if sections.iter().any(is_bitcode) && !sections.iter().any(has_code) {
            return Err(CompareError::LinkTimeOptimisation { file: name.to_owned() });
        }
        Ok(Self { name: name.to_owned(), source, sections, symbols })
    }

    /// An object without anything: what a new file was before.
    #[must_use]
    pub fn empty(name: &str) -> Self {
        let (sections, symbols) = (vec![Section::default()], vec![Symbol::default()]);
        Self { name: name.to_owned(), source: None, sections, symbols }
    }

    /// Whether it has that global function or variable.
    #[must_use]
    pub fn defines(&self, name: &str) -> bool {
        let is_here = |symbol: &Symbol| matches!(symbol.place, Place::Section(_) | Place::Common);
        !name.is_empty() && self.symbols.iter().any(|symbol| !symbol.local && symbol.name == name && is_here(symbol))
    }

    /// The symbols that name what is in a section, in order of their places; functions and variables before labels.
    pub fn symbols_in(&self, section: usize) -> Vec<&Symbol> {
        let is_name = |symbol: &&Symbol| {
            !symbol.name.is_empty() && !matches!(symbol.kind, SymbolKind::Section | SymbolKind::File)
        };
        let mut names: Vec<&Symbol> =
            self.symbols.iter().filter(|symbol| symbol.place == Place::Section(section)).filter(is_name).collect();
        names.sort_by_key(|symbol| (symbol.value, symbol.kind == SymbolKind::Untyped, symbol.local));
        names
    }

    /// What the section is called by its symbol, or else by itself.
    #[must_use]
    pub fn title(&self, section: usize) -> &str {
        self.symbols_in(section).first().map_or(self.sections[section].name.as_str(), |symbol| symbol.name.as_str())
    }

    /// The sections of that kind that are not empty.
    pub fn of_kind(&self, kind: Kind) -> impl Iterator<Item = usize> + '_ {
        (0..self.sections.len()).filter(move |&at| self.sections[at].kind == kind && self.sections[at].size > 0)
    }
}

fn read_section(section: &ElfSection64<'_, '_, LittleEndian>) -> Result<Section, object::Error> {
    let name = section.name().map_or_else(|_| String::new(), str::to_owned);
    let header = section.elf_section_header();
    let flags = header.sh_flags(LE);
    let has = |flag: elf::SectionFlags| flags.contains(flag);
    let entry_size = header.sh_entsize(LE);
    let kind = kind_of(&name, &has, entry_size);
    let mut read = Section {
        name,
        kind,
        flags: flags.0,
        alignment: section.align().max(1),
        entry_size,
        size: section.size(),
        data: section.uncompressed_data()?.into_owned(),
        relocations: Vec::new(),
    };
    if kind == Kind::Debug {
        read.size = read.data.len() as u64;
    }
    for (offset, relocation) in section.relocations() {
        let RelocationFlags::Elf { r_type } = relocation.flags() else { continue };
        let symbol = match relocation.target() {
            RelocationTarget::Symbol(symbol) => symbol.0,
            _ => 0,
        };
        read.relocations.push(Relocation { offset, kind: r_type.0, symbol, addend: relocation.addend() });
    }
    read.relocations.sort_by_key(|relocation| relocation.offset);
    Ok(read)
}

fn kind_of(name: &str, has: &dyn Fn(elf::SectionFlags) -> bool, entry_size: u64) -> Kind {
    const STARTUP: [&str; 7] = [".init_array", ".fini_array", ".preinit_array", ".ctors", ".dtors", ".init", ".fini"];
    let is = |prefix: &str| name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    if name.starts_with(".debug_") {
        return Kind::Debug;
    }
    if !has(elf::SHF_ALLOC) || name.starts_with(".note") {
        return Kind::Other;
    }
    if name == ".eh_frame" {
        return Kind::Unwind;
    }
    if name.starts_with(".asap.") {
        return Kind::Declaration;
    }
    if STARTUP.iter().any(|prefix| is(prefix)) {
        return Kind::Startup;
    }
    if has(elf::SHF_EXECINSTR) {
        return Kind::Code;
    }
    if has(elf::SHF_TLS) {
        return Kind::ThreadLocal;
    }
    if has(elf::SHF_MERGE) && !has(elf::SHF_WRITE) && entry_size > 0 {
        return if has(elf::SHF_STRINGS) { Kind::Strings } else { Kind::Literals };
    }
    // .data.rel.ro is writable for the dynamic linker only.
    if has(elf::SHF_WRITE) && !is(".data.rel.ro") && !name.starts_with(".data.rel.ro") {
        Kind::Variable
    } else {
        Kind::Constant
    }
}

fn read_symbol(symbol: &ElfSymbol64<'_, '_, LittleEndian>, sections: usize) -> Option<Symbol> {
    let place = match symbol.section() {
        object::SymbolSection::Section(section) if section.0 < sections => Place::Section(section.0),
        object::SymbolSection::Section(_) => return None,
        object::SymbolSection::Common => Place::Common,
        object::SymbolSection::Absolute | object::SymbolSection::None => Place::Absolute,
        _ => Place::Undefined,
    };
    let kind = match symbol.elf_symbol().st_type() {
        elf::STT_FUNC => SymbolKind::Function,
        elf::STT_GNU_IFUNC => SymbolKind::Ifunc,
        elf::STT_OBJECT | elf::STT_COMMON => SymbolKind::Object,
        elf::STT_TLS => SymbolKind::ThreadLocal,
        elf::STT_SECTION => SymbolKind::Section,
        elf::STT_FILE => SymbolKind::File,
        _ => SymbolKind::Untyped,
    };
    let name = if kind == SymbolKind::Section { "" } else { symbol.name().unwrap_or("") };
    Some(Symbol {
        name: name.to_owned(),
        place,
        value: symbol.address(),
        size: symbol.size(),
        kind,
        local: symbol.is_local(),
        weak: symbol.is_weak(),
    })
}
