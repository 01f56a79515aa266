//! From bytes to an image: the headers are read at once, tables of any size when they are first needed.

use super::{Image, ImageBytes, ImageError, Segment, TlsSegment, dynamic::Dynamic, unwind};
use crate::address::ImageOffset;
use object::{
    LittleEndian as LE, elf,
    read::elf::{FileHeader, NoteIterator, ProgramHeader, SectionHeader, SectionTable},
};
use std::sync::OnceLock;

type Header = elf::FileHeader64<LE>;

/// Most program headers. The kernel loads no file with more than 64 KiB of them (fs/binfmt_elf.c, load_elf_phdrs).
const PROGRAMS_MOST: usize = (64 << 10) / 56;
/// Most note areas that are searched, and most notes in each.
pub(super) const NOTES_MOST: usize = 1024;
/// Longest build-id, bytes; usual are 20 (SHA-1), 16 and 8.
const BUILD_ID_MOST: usize = 64;

impl Image {
    /// Parses `bytes`; `name` is for messages.
    ///
    /// # Errors
    /// They are no x86-64 executable or library.
    pub fn parse(name: &str, bytes: ImageBytes) -> Result<Self, ImageError> {
        let damaged = |reason: &str| ImageError::Damaged { name: name.into(), reason: reason.to_owned() };
        let data = bytes.bytes();
        let head = data.get(..20).ok_or_else(|| damaged("too short"))?;
        if head[..4] != elf::ELFMAG {
            return Err(damaged("no ELF magic"));
        }
        let (class, kind) = (head[4], u16::from_le_bytes([head[16], head[17]]));
        let machine = u16::from_le_bytes([head[18], head[19]]);
        if class != 2 || machine != elf::EM_X86_64.0 || ![elf::ET_EXEC.0, elf::ET_DYN.0].contains(&kind) {
            return Err(ImageError::Foreign { name: name.into(), class, machine, kind });
        }
        let header = Header::parse(data).map_err(|error| damaged(&error.to_string()))?;
        let programs = header.program_headers(LE, data).map_err(|error| damaged(&error.to_string()))?;
        if programs.len() > PROGRAMS_MOST {
            return Err(damaged("more program headers than the kernel would load"));
        }
        // Section headers are a convenience that a stripped or damaged file may lack.
        let sections = header.sections(LE, data).ok();
        let find = |kind: elf::ProgramType| programs.iter().find(move |program| program.p_type(LE) == kind);
        let segments: Vec<Segment> = programs.iter().filter(|p| p.p_type(LE) == elf::PT_LOAD).map(segment).collect();
        let notes = programs.iter().filter_map(|program| program.notes(LE, data).ok().flatten());
        let build_id = notes.take(NOTES_MOST).find_map(build_id);
        let mut image = Self {
            name: name.to_owned(),
            build_id,
            position_independent: kind == elf::ET_DYN.0,
            tls: find(elf::PT_TLS).map(tls_segment),
            relro: find(elf::PT_GNU_RELRO).map(|program| (ImageOffset(program.p_vaddr(LE)), program.p_memsz(LE))),
            dynamic_at: find(elf::PT_DYNAMIC).map(|program| ImageOffset(program.p_vaddr(LE))),
            dynamic: Dynamic::read(programs, data),
            soname: None,
            needed: Vec::new(),
            debug_link: sections.as_ref().and_then(|sections| debug_link(sections, data)),
            debug: Vec::new(),
            told: Vec::new(),
            unwind: unwind::Tables::locate(programs, sections.as_ref(), &segments, data),
            segments,
            index: OnceLock::new(),
            bytes: bytes.clone(),
        };
        (image.needed, image.soname) = image.dynamic.libraries(&image);
        Ok(image)
    }
}

fn segment(program: &elf::ProgramHeader64<LE>) -> Segment {
    let flags = program.p_flags(LE).0;
    Segment {
        file_offset: program.p_offset(LE),
        file_size: program.p_filesz(LE),
        address: ImageOffset(program.p_vaddr(LE)),
        memory_size: program.p_memsz(LE),
        readable: flags & elf::PF_R.0 != 0,
        writable: flags & elf::PF_W.0 != 0,
        executable: flags & elf::PF_X.0 != 0,
    }
}

fn tls_segment(program: &elf::ProgramHeader64<LE>) -> TlsSegment {
    TlsSegment {
        address: ImageOffset(program.p_vaddr(LE)),
        file_size: program.p_filesz(LE),
        memory_size: program.p_memsz(LE),
        alignment: program.p_align(LE),
    }
}

impl Image {
    /// What the compilers of its parts say of themselves (`.comment`), each once; nothing, where that was stripped.
    #[must_use]
    pub fn compilers(&self) -> Vec<String> {
        const NAMES_MOST: usize = 16;
        let data = self.bytes.bytes();
        let read = || {
            let sections = Header::parse(data).ok()?.sections(LE, data).ok()?;
            let (_, section) = sections.section_by_name(LE, b".comment")?;
            section.data(LE, data).ok()
        };
        let names = read().unwrap_or_default().split(|&byte| byte == 0).filter(|name| !name.is_empty());
        let mut names: Vec<String> =
            names.take(NAMES_MOST).map(|name| String::from_utf8_lossy(name).chars().take(200).collect()).collect();
        names.sort();
        names.dedup();
        names
    }
}

/// NT_GNU_BUILD_ID among `notes`.
pub(super) fn build_id(mut notes: NoteIterator<'_, Header>) -> Option<Vec<u8>> {
    for _ in 0..NOTES_MOST {
        let note = notes.next().ok().flatten()?;
        if note.name() == elf::ELF_NOTE_GNU && note.n_type(LE) == elf::NT_GNU_BUILD_ID {
            return Some(note.desc().to_vec()).filter(|id| !id.is_empty() && id.len() <= BUILD_ID_MOST);
        }
    }
    None
}

fn debug_link(sections: &SectionTable<'_, Header>, data: &[u8]) -> Option<String> {
    const PATH_MOST: usize = 4096;
    let (_, section) = sections.section_by_name(LE, b".gnu_debuglink")?;
    let bytes = section.data(LE, data).ok()?;
    let name = bytes.split(|&byte| byte == 0).next().filter(|name| name.len() < PATH_MOST)?;
    Some(String::from_utf8_lossy(name).into_owned())
}
