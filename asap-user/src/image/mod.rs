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
use std::{fs::File, io, ops::Deref, sync::Arc};
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
    symbols: SymbolTable,
    got: Vec<(String, ImageOffset)>,
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
        if class != elf::ELFCLASS64 || machine != elf::EM_X86_64 || !matches!(kind, elf::ET_EXEC | elf::ET_DYN) {
            return Err(ImageError::Foreign { name: name.into(), class, machine, kind });
        }
        let header = Header::parse(data).map_err(damaged)?;
        let programs = header.program_headers(ENDIAN, data).map_err(damaged)?;
        let mut image = Self {
            name: name.to_owned(),
            build_id: None,
            position_independent: kind == elf::ET_DYN,
            segments: Vec::new(),
            tls: None,
            dynamic: None,
            soname: None,
            needed: Vec::new(),
            debug_link: None,
            symbols: SymbolTable::default(),
            got: Vec::new(),
            unwind: unwind::Tables::default(),
            bytes: bytes.clone(),
        };
        for program in programs {
            image.take_program_header(program, data);
        }
        image.unwind.locate(programs, &image.segments, data);
        let mut table = std::mem::take(&mut image.symbols);
        // Section headers are a convenience that a stripped or damaged file may lack.
        if let Ok(sections) = header.sections(ENDIAN, data) {
            for section in sections.iter() {
                if sections.section_name(ENDIAN, section) == Ok(b".gnu_debuglink") {
                    let link = section.data(ENDIAN, data).ok().and_then(|bytes| bytes.split(|&b| b == 0).next());
                    image.debug_link = link.map(|name| String::from_utf8_lossy(name).into_owned());
                }
                if sections.section_name(ENDIAN, section) == Ok(b".gnu_debugdata")
                    && let Ok(packed) = section.data(ENDIAN, data)
                    && let Some(unpacked) = symbols::unpack(packed)
                {
                    table.add_symtab(&unpacked);
                }
            }
        }
        table.add_symtab(data);
        image.take_dynamic(programs, data, &mut table);
        table.finish();
        image.symbols = table;
        Ok(image)
    }

    fn take_program_header(&mut self, program: &elf::ProgramHeader64<LE>, data: &[u8]) {
        let flags = program.p_flags(ENDIAN);
        match program.p_type(ENDIAN) {
            elf::PT_LOAD => self.segments.push(Segment {
                file_offset: program.p_offset(ENDIAN),
                file_size: program.p_filesz(ENDIAN),
                address: ImageOffset(program.p_vaddr(ENDIAN)),
                memory_size: program.p_memsz(ENDIAN),
                readable: flags & elf::PF_R != 0,
                writable: flags & elf::PF_W != 0,
                executable: flags & elf::PF_X != 0,
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

    /// Dynamic symbols, needed libraries and the slots that the linker fills: by program header, not by section.
    fn take_dynamic(&mut self, programs: &[elf::ProgramHeader64<LE>], data: &[u8], table: &mut SymbolTable) {
        let Some(entries) = programs.iter().find_map(|p| p.dynamic(ENDIAN, data).ok().flatten()) else { return };
        let mut tags = std::collections::HashMap::new();
        let (mut needed, mut soname) = (Vec::new(), None);
        for entry in entries {
            let Some(tag) = entry.tag32(ENDIAN) else { continue };
            let value = entry.d_val(ENDIAN);
            match tag {
                elf::DT_NULL => break,
                elf::DT_NEEDED => needed.push(value),
                elf::DT_SONAME => soname = Some(value),
                _ => {
                    tags.insert(tag, value);
                }
            }
        }
        let area = |tag: u32| tags.get(&tag).and_then(|&at| self.file_tail(ImageOffset(at)));
        let (Some(symbols), Some(strings)) = (area(elf::DT_SYMTAB), area(elf::DT_STRTAB)) else { return };
        let strings = &strings[..strings.len().min(tags.get(&elf::DT_STRSZ).map_or(usize::MAX, |&size| size as usize))];
        let text = |at: u64| symbols::string_at(strings, at);
        let soname = soname.and_then(text);
        let needed = needed.into_iter().filter_map(text).collect();
        let most = symbols.len() / 24;
        let count = symbols::dynamic_count(area(elf::DT_GNU_HASH), area(elf::DT_HASH)).unwrap_or(0);
        let mut got = Vec::new();
        let mut highest = count;
        for (at, size) in [(elf::DT_RELA, elf::DT_RELASZ), (elf::DT_JMPREL, elf::DT_PLTRELSZ)] {
            let (Some(bytes), Some(&size)) = (area(at), tags.get(&size)) else { continue };
            let bytes = &bytes[..bytes.len().min(size as usize)];
            for rela in bytes.chunks_exact(24) {
                let word = |index: usize| rela[index..index + 8].try_into().map_or(0, u64::from_le_bytes);
                let (offset, info) = (word(0), word(8));
                let (symbol, kind) = ((info >> 32) as usize, info as u32);
                highest = highest.max(symbol + 1);
                let slots = [elf::R_X86_64_GLOB_DAT, elf::R_X86_64_JUMP_SLOT, elf::R_X86_64_64, elf::R_X86_64_TPOFF64];
                // With an addend the slot holds something else than the symbol.
                if symbol != 0 && slots.contains(&kind) && word(16) == 0 && symbol < most {
                    let name_at =
                        u32::from_le_bytes(symbols[symbol * 24..symbol * 24 + 4].try_into().unwrap_or_default());
                    if let Some(name) = text(u64::from(name_at)) {
                        got.push((name, ImageOffset(offset)));
                    }
                }
            }
        }
        got.sort();
        let versions = area(elf::DT_VERSYM);
        table.add_dynamic(&symbols[..highest.min(most) * 24], strings, versions);
        (self.got, self.soname, self.needed) = (got, soname, needed);
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
        self.symbols.add_symtab(debug_file);
        self.symbols.finish();
        Ok(())
    }

    /// A symbol that other modules can use.
    #[must_use]
    pub fn export(&self, name: &str) -> Option<Symbol> {
        self.symbols.named(name).find(|symbol| symbol.exported).cloned()
    }

    /// All definitions of `name`, static ones included; in source file `file` only, where given.
    #[must_use]
    pub fn locals(&self, name: &str, file: Option<&str>) -> Vec<Symbol> {
        let mut found: Vec<Symbol> =
            self.symbols.named(name).filter(|s| file.is_none_or(|file| s.is_from(file))).cloned().collect();
        found.sort_by_key(|symbol| symbol.address);
        found.dedup_by_key(|symbol| symbol.address);
        found
    }

    /// Slots that the target's linker fills with the address (or thread-pointer offset) of `name`.
    #[must_use]
    pub fn got_slots(&self, name: &str) -> Vec<ImageOffset> {
        let start = self.got.partition_point(|(known, _)| known.as_str() < name);
        self.got[start..].iter().take_while(|(known, _)| known == name).map(|&(_, slot)| slot).collect()
    }

    /// Its unwind tables.
    #[must_use]
    pub fn unwind(&self) -> UnwindSections<'_> {
        self.unwind.sections(self)
    }

    /// Name and offset for an address, demangled.
    #[must_use]
    pub fn symbolise(&self, at: ImageOffset) -> Option<(String, u64)> {
        let symbol = self.symbols.function_containing(at)?;
        Some((demangle(&symbol.name), at.0 - symbol.address.0))
    }
}

#[cfg(test)]
mod tests;
