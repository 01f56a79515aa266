//! ELF files as the engine needs them: identity, segments, symbols, function bounds, unwind tables. Bytes in, plain data
//! out; touches no process and opens no file.

mod body;
mod names;
mod query;
mod symbols;
mod unwind;

pub use body::FunctionBody;
pub use names::demangle;
pub use query::{FunctionQuery, LookupError};
pub use symbols::{Binding, Symbol, SymbolKind};
pub use unwind::UnwindSections;

use crate::address::{ImageOffset, LoadBias, PAGE_SIZE, TargetAddr};
use object::{
    LittleEndian as LE, elf,
    read::elf::{Dyn, FileHeader, ProgramHeader, SectionHeader},
};
use std::{
    fs::File,
    io,
    ops::Deref,
    sync::{Arc, OnceLock},
};
use symbols::SymbolTable;

/// The bytes of an image: owned, or a mapped file.
#[derive(Clone)]
pub struct ImageBytes(Arc<dyn Deref<Target = [u8]> + Send + Sync>);

impl From<Vec<u8>> for ImageBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self(Arc::new(bytes))
    }
}

impl ImageBytes {
    /// Maps a file.
    ///
    /// # Errors
    /// It can't be mapped.
    pub fn map(file: &File) -> io::Result<Self> {
        // SAFETY: executables in use can't be written (ETXTBSY); who replaces a library in place instead of by rename
        // breaks every process that uses it. The bytes are parsed with checked bounds throughout.
        Ok(Self(Arc::new(unsafe { memmap2::Mmap::map(file)? })))
    }

    fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// Why bytes are no image that we can use.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not ELF, or damaged.
    #[error("{name} is no ELF file, or damaged: {reason}")]
    Damaged {
        /// Its name.
        name: String,
        /// What the parser met.
        reason: String,
    },
    /// Another machine, or 32 bits.
    #[error("{name} is not an x86-64 executable or library (ELF class {class}, machine {machine}, type {kind})")]
    Foreign {
        /// Its name.
        name: String,
        /// EI_CLASS.
        class: u8,
        /// e_machine.
        machine: u16,
        /// e_type.
        kind: u16,
    },
    /// A debug file of another build.
    #[error("the debug file belongs to another build of {0}")]
    OtherBuild(String),
}

/// A PT_LOAD segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// p_offset.
    pub file_offset: u64,
    /// p_filesz.
    pub file_size: u64,
    /// p_vaddr.
    pub address: ImageOffset,
    /// p_memsz.
    pub memory_size: u64,
    /// PF_R.
    pub readable: bool,
    /// PF_W.
    pub writable: bool,
    /// PF_X.
    pub executable: bool,
}

/// PT_TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TlsSegment {
    /// Start of the initial image.
    pub address: ImageOffset,
    /// Length of the initial image, bytes.
    pub file_size: u64,
    /// Length in memory, bytes.
    pub memory_size: u64,
    /// Alignment, bytes.
    pub alignment: u64,
}

/// Where the bounds of a function are known from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BoundsSource {
    /// A symbol with a size.
    Symbol,
    /// An unwind-table entry.
    UnwindTable,
}

/// A function of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Function {
    /// Raw name, where there is a symbol.
    pub name: Option<String>,
    /// Source file of a local symbol.
    pub file: Option<String>,
    /// Entry.
    pub address: ImageOffset,
    /// Length, bytes.
    pub size: u64,
    /// Where that is known from.
    pub source: BoundsSource,
}

/// What is looked up by name: built when it is first needed.
struct Index {
    symbols: SymbolTable,
    got: Vec<(String, ImageOffset)>,
}

/// A parsed ELF executable or shared library.
pub struct Image {
    name: String,
    bytes: ImageBytes,
    build_id: Option<Vec<u8>>,
    position_independent: bool,
    segments: Vec<Segment>,
    tls: Option<TlsSegment>,
    dynamic: Option<ImageOffset>,
    soname: Option<String>,
    needed: Vec<String>,
    debug_link: Option<String>,
    debug: Vec<Vec<u8>>,
    index: OnceLock<Index>,
    unwind: unwind::Tables,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("name", &self.name).finish_non_exhaustive()
    }
}

type Header = elf::FileHeader64<LE>;
const ENDIAN: LE = LE;

impl Image {
    /// Parses `bytes`; `name` is for messages.
    ///
    /// # Errors
    /// They are no x86-64 executable or library.
    pub fn parse(name: &str, bytes: ImageBytes) -> Result<Self, ImageError> {
        let damaged =
            |reason: object::read::Error| ImageError::Damaged { name: name.into(), reason: reason.to_string() };
        let data = bytes.bytes();
        let head =
            data.get(..20).ok_or_else(|| ImageError::Damaged { name: name.into(), reason: "too short".into() })?;
        if head[..4] != elf::ELFMAG {
            return Err(ImageError::Damaged { name: name.into(), reason: "no ELF magic".into() });
        }
        let (class, kind) = (head[4], u16::from_le_bytes([head[16], head[17]]));
        let machine = u16::from_le_bytes([head[18], head[19]]);
        if class != 2 || machine != elf::EM_X86_64.0 || ![elf::ET_EXEC.0, elf::ET_DYN.0].contains(&kind) {
            return Err(ImageError::Foreign { name: name.into(), class, machine, kind });
        }
        let header = Header::parse(data).map_err(damaged)?;
        let programs = header.program_headers(ENDIAN, data).map_err(damaged)?;
        let mut image = Self {
            name: name.to_owned(),
            build_id: None,
            position_independent: kind == elf::ET_DYN.0,
            segments: Vec::new(),
            tls: None,
            dynamic: None,
            soname: None,
            needed: Vec::new(),
            debug_link: None,
            debug: Vec::new(),
            index: OnceLock::new(),
            unwind: unwind::Tables::default(),
            bytes: bytes.clone(),
        };
        for program in programs {
            image.take_program_header(program, data);
        }
        image.unwind.locate(programs, &image.segments, data);
        // Section headers are a convenience that a stripped or damaged file may lack.
        if let Ok(sections) = header.sections(ENDIAN, data)
            && let Some((_, section)) = sections.section_by_name(ENDIAN, b".gnu_debuglink")
        {
            let link = section.data(ENDIAN, data).ok().and_then(|bytes| bytes.split(|&b| b == 0).next());
            image.debug_link = link.map(|name| String::from_utf8_lossy(name).into_owned());
        }
        image.take_dynamic_names(programs, data);
        Ok(image)
    }

    fn index(&self) -> &Index {
        self.index.get_or_init(|| {
            let data = self.bytes.bytes();
            let mut symbols = SymbolTable::default();
            let mut got = Vec::new();
            if let Ok(header) = Header::parse(data) {
                if let Ok(sections) = header.sections(ENDIAN, data)
                    && let Some((_, section)) = sections.section_by_name(ENDIAN, b".gnu_debugdata")
                    && let Ok(packed) = section.data(ENDIAN, data)
                    && let Some(unpacked) = symbols::unpack(packed)
                {
                    symbols.add_symtab(&unpacked);
                }
                symbols.add_symtab(data);
                for file in &self.debug {
                    symbols.add_symtab(file);
                }
                if let Ok(programs) = header.program_headers(ENDIAN, data) {
                    got = self.index_dynamic(programs, data, &mut symbols);
                }
            }
            symbols.finish();
            Index { symbols, got }
        })
    }

    fn symbols(&self) -> &SymbolTable {
        &self.index().symbols
    }

    fn take_program_header(&mut self, program: &elf::ProgramHeader64<LE>, data: &[u8]) {
        let flags = program.p_flags(ENDIAN);
        match program.p_type(ENDIAN) {
            elf::PT_LOAD => self.segments.push(Segment {
                file_offset: program.p_offset(ENDIAN),
                file_size: program.p_filesz(ENDIAN),
                address: ImageOffset(program.p_vaddr(ENDIAN)),
                memory_size: program.p_memsz(ENDIAN),
                readable: flags.0 & elf::PF_R.0 != 0,
                writable: flags.0 & elf::PF_W.0 != 0,
                executable: flags.0 & elf::PF_X.0 != 0,
            }),
            elf::PT_TLS => {
                self.tls = Some(TlsSegment {
                    address: ImageOffset(program.p_vaddr(ENDIAN)),
                    file_size: program.p_filesz(ENDIAN),
                    memory_size: program.p_memsz(ENDIAN),
                    alignment: program.p_align(ENDIAN),
                });
            }
            elf::PT_DYNAMIC => self.dynamic = Some(ImageOffset(program.p_vaddr(ENDIAN))),
            elf::PT_NOTE => {
                let Ok(Some(mut notes)) = program.notes(ENDIAN, data) else { return };
                while let Ok(Some(note)) = notes.next() {
                    if note.name() == elf::ELF_NOTE_GNU && note.n_type(ENDIAN) == elf::NT_GNU_BUILD_ID {
                        self.build_id = Some(note.desc().to_vec());
                    }
                }
            }
            _ => {}
        }
    }

    /// DT_NEEDED and DT_SONAME.
    fn take_dynamic_names(&mut self, programs: &[elf::ProgramHeader64<LE>], data: &[u8]) {
        let tags = dynamic_tags(programs, data);
        let Some(strings) = self.dynamic_strings(&tags) else { return };
        let text = |(_, at): &(elf::DynamicTag, u64)| symbols::string_at(strings, *at);
        let needed = tags.iter().filter(|(tag, _)| *tag == elf::DT_NEEDED).filter_map(text).collect();
        let soname = tags.iter().find(|(tag, _)| *tag == elf::DT_SONAME).and_then(text);
        (self.needed, self.soname) = (needed, soname);
    }

    fn dynamic_strings(&self, tags: &[(elf::DynamicTag, u64)]) -> Option<&[u8]> {
        let value = |wanted: elf::DynamicTag| tags.iter().find(|(tag, _)| *tag == wanted).map(|&(_, value)| value);
        let strings = self.file_tail(ImageOffset(value(elf::DT_STRTAB)?))?;
        let size = value(elf::DT_STRSZ).map_or(usize::MAX, |size| usize::try_from(size).unwrap_or(usize::MAX));
        Some(&strings[..strings.len().min(size)])
    }

    /// Dynamic symbols, and the slots that the linker fills: by program header, not by section.
    fn index_dynamic(
        &self,
        programs: &[elf::ProgramHeader64<LE>],
        data: &[u8],
        table: &mut SymbolTable,
    ) -> Vec<(String, ImageOffset)> {
        let tags = dynamic_tags(programs, data);
        let value = |wanted: elf::DynamicTag| tags.iter().find(|(tag, _)| *tag == wanted).map(|&(_, value)| value);
        let area = |tag: elf::DynamicTag| value(tag).and_then(|at| self.file_tail(ImageOffset(at)));
        let (Some(symbols), Some(strings)) = (area(elf::DT_SYMTAB), self.dynamic_strings(&tags)) else {
            return Vec::new();
        };
        let most = symbols.len() / 24;
        let count = symbols::dynamic_count(area(elf::DT_GNU_HASH), area(elf::DT_HASH)).unwrap_or(0);
        let mut got = Vec::new();
        let mut highest = count;
        for (at, size) in [(elf::DT_RELA, elf::DT_RELASZ), (elf::DT_JMPREL, elf::DT_PLTRELSZ)] {
            let (Some(bytes), Some(size)) = (area(at), value(size)) else { continue };
            let bytes = &bytes[..bytes.len().min(usize::try_from(size).unwrap_or(usize::MAX))];
            for rela in bytes.chunks_exact(24) {
                let word = |index: usize| rela[index..index + 8].try_into().map_or(0, u64::from_le_bytes);
                let (offset, info) = (word(0), word(8));
                let (symbol, kind) = ((info >> 32) as usize, elf::RelocationType(info as u32));
                let slots = [elf::R_X86_64_GLOB_DAT, elf::R_X86_64_JUMP_SLOT, elf::R_X86_64_64, elf::R_X86_64_TPOFF64];
                if symbol == 0 || symbol >= most {
                    continue;
                }
                highest = highest.max(symbol + 1);
                // With an addend the slot holds something else than the symbol.
                if slots.contains(&kind) && word(16) == 0 {
                    let name_at = symbols[symbol * 24..symbol * 24 + 4].try_into().unwrap_or_default();
                    if let Some(name) = symbols::string_at(strings, u64::from(u32::from_le_bytes(name_at))) {
                        got.push((name, ImageOffset(offset)));
                    }
                }
            }
        }
        got.sort();
        table.add_dynamic(&symbols[..highest.min(most) * 24], strings, area(elf::DT_VERSYM));
        got
    }

    /// File bytes from `at` to the end of its segment.
    fn file_tail(&self, at: ImageOffset) -> Option<&[u8]> {
        let segment = self.segments.iter().find(|s| at.0.wrapping_sub(s.address.0) < s.file_size)?;
        let offset = at.0 - segment.address.0;
        let start = usize::try_from(segment.file_offset.checked_add(offset)?).ok()?;
        let end = usize::try_from(segment.file_offset.checked_add(segment.file_size)?).ok()?;
        let bytes = self.bytes.bytes();
        bytes.get(start..end.min(bytes.len()))
    }

    /// Its name, as given.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// NT_GNU_BUILD_ID.
    #[must_use]
    pub fn build_id(&self) -> Option<&[u8]> {
        self.build_id.as_deref()
    }

    /// The build-id in hex.
    #[must_use]
    pub fn build_id_hex(&self) -> Option<String> {
        self.build_id().map(|id| id.iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// ET_DYN.
    #[must_use]
    pub fn is_position_independent(&self) -> bool {
        self.position_independent
    }

    /// PT_LOAD segments.
    #[must_use]
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// PT_TLS.
    #[must_use]
    pub fn tls_segment(&self) -> Option<TlsSegment> {
        self.tls
    }

    /// PT_DYNAMIC.
    #[must_use]
    pub fn dynamic_address(&self) -> Option<ImageOffset> {
        self.dynamic
    }

    /// DT_SONAME.
    #[must_use]
    pub fn soname(&self) -> Option<&str> {
        self.soname.as_deref()
    }

    /// DT_NEEDED.
    #[must_use]
    pub fn needed(&self) -> &[String] {
        &self.needed
    }

    /// The load bias, given one executable mapping as `/proc/PID/maps` shows it.
    #[must_use]
    pub fn load_bias(&self, mapping_start: TargetAddr, mapping_file_offset: u64) -> Option<LoadBias> {
        let page = |value: u64| value & !(PAGE_SIZE - 1);
        let segment = self.segments.iter().find(|s| {
            let end = s.file_offset.saturating_add(s.file_size);
            s.executable && page(s.file_offset) <= mapping_file_offset && mapping_file_offset < end
        })?;
        let address = page(segment.address.0).wrapping_add(mapping_file_offset - page(segment.file_offset));
        Some(LoadBias(mapping_start.0.wrapping_sub(address)))
    }

    /// `length` bytes of the file that are mapped at `at`.
    #[must_use]
    pub fn bytes_at(&self, at: ImageOffset, length: usize) -> Option<&[u8]> {
        self.file_tail(at)?.get(..length)
    }

    /// Offset in the file of what is mapped at `at`.
    #[must_use]
    pub fn file_offset(&self, at: ImageOffset) -> Option<u64> {
        let segment = self.segments.iter().find(|s| at.0.wrapping_sub(s.address.0) < s.file_size)?;
        Some(segment.file_offset + (at.0 - segment.address.0))
    }

    /// Where a separate debug file may be (gdb manual, "Separate Debug Files").
    #[must_use]
    pub fn debug_file_candidates(&self) -> Vec<String> {
        let mut candidates = Vec::new();
        if let Some(id) = self.build_id_hex().filter(|id| id.len() > 2) {
            candidates.push(format!("/usr/lib/debug/.build-id/{}/{}.debug", &id[..2], &id[2..]));
        }
        if let (Some(link), Some((directory, _))) = (&self.debug_link, self.name.rsplit_once('/'))
            && !link.contains('/')
        {
            candidates.push(format!("{directory}/{link}"));
            candidates.push(format!("{directory}/.debug/{link}"));
            candidates.push(format!("/usr/lib/debug{directory}/{link}"));
        }
        candidates
    }

    /// This image with the symbols of a separate debug file.
    ///
    /// # Errors
    /// It belongs to another build, or is damaged.
    pub fn with_symbols_from(&self, debug_file: &[u8]) -> Result<Self, ImageError> {
        let mut image = Self::parse(&self.name, self.bytes.clone())?;
        image.debug.clone_from(&self.debug);
        image.add_symbols_from(debug_file)?;
        Ok(image)
    }

    /// Adds the symbols of a separate debug file.
    ///
    /// # Errors
    /// It belongs to another build, or is damaged.
    pub fn add_symbols_from(&mut self, debug_file: &[u8]) -> Result<(), ImageError> {
        let damaged =
            |reason: object::read::Error| ImageError::Damaged { name: self.name.clone(), reason: reason.to_string() };
        let header = Header::parse(debug_file).map_err(damaged)?;
        let sections = header.sections(ENDIAN, debug_file).map_err(damaged)?;
        let mut id = None;
        for section in sections.iter() {
            let Ok(Some(mut notes)) = section.notes(ENDIAN, debug_file) else { continue };
            while let Ok(Some(note)) = notes.next() {
                if note.name() == elf::ELF_NOTE_GNU && note.n_type(ENDIAN) == elf::NT_GNU_BUILD_ID {
                    id = Some(note.desc().to_vec());
                }
            }
        }
        if id.is_none() || id != self.build_id {
            return Err(ImageError::OtherBuild(self.name.clone()));
        }
        self.debug.push(debug_file.to_vec());
        self.index = OnceLock::new();
        Ok(())
    }

    /// A symbol that other modules can use.
    #[must_use]
    pub fn export(&self, name: &str) -> Option<Symbol> {
        self.symbols().named(name).find(|symbol| symbol.exported)
    }

    /// All definitions of `name`, static ones included; in source file `file` only, where given.
    #[must_use]
    pub fn locals(&self, name: &str, file: Option<&str>) -> Vec<Symbol> {
        let mut found: Vec<Symbol> =
            self.symbols().named(name).filter(|s| file.is_none_or(|file| s.is_from(file))).collect();
        found.sort_by_key(|symbol| symbol.address);
        found.dedup_by_key(|symbol| symbol.address);
        found
    }

    /// Slots that the target's linker fills with the address (or thread-pointer offset) of `name`.
    #[must_use]
    pub fn got_slots(&self, name: &str) -> Vec<ImageOffset> {
        let got = &self.index().got;
        let start = got.partition_point(|(known, _)| known.as_str() < name);
        got[start..].iter().take_while(|(known, _)| known == name).map(|&(_, slot)| slot).collect()
    }

    /// Its unwind tables.
    #[must_use]
    pub fn unwind(&self) -> UnwindSections<'_> {
        self.unwind.sections(self)
    }

    /// Name and offset for an address, demangled.
    #[must_use]
    pub fn symbolise(&self, at: ImageOffset) -> Option<(String, u64)> {
        let symbol = self.symbols().function_containing(at)?;
        Some((demangle(&symbol.name), at.0 - symbol.address.0))
    }
}

/// The dynamic section as tags and values, up to DT_NULL.
fn dynamic_tags(programs: &[elf::ProgramHeader64<LE>], data: &[u8]) -> Vec<(elf::DynamicTag, u64)> {
    let entries = programs.iter().find_map(|p| p.dynamic(ENDIAN, data).ok().flatten()).unwrap_or_default();
    let tags = entries.iter().map(|entry| (entry.d_tag(ENDIAN), entry.d_val(ENDIAN)));
    tags.take_while(|(tag, _)| *tag != elf::DT_NULL).collect()
}

#[cfg(test)]
mod tests;
