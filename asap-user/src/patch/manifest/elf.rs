//! Finds a section of an object file, or adds one to it. Works on headers alone and moves nothing that is there: the new
//! section, a copy of the names, and a copy of the section headers go behind what the file has.

use super::ManifestError;
use std::ops::Range;

const HEADER: usize = 64;
const SECTION_HEADER: usize = 64;
/// First section number that has another meaning (gABI, SHN_LORESERVE); files with more sections keep their count elsewhere.
const RESERVED: usize = 0xff00;
const SHT_PROGBITS: u32 = 1;
const SHT_NOBITS: u32 = 8;

fn refuse<T>(what: &str) -> Result<T, ManifestError> {
    Err(ManifestError::NotAnObject(what.to_owned()))
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], ManifestError> {
    let field = at.checked_add(N).and_then(|end| bytes.get(at..end)).and_then(|field| field.try_into().ok());
    field.ok_or_else(|| ManifestError::NotAnObject("it is cut off".to_owned()))
}

fn half(bytes: &[u8], at: usize) -> Result<u16, ManifestError> {
    field(bytes, at).map(u16::from_le_bytes)
}

fn word(bytes: &[u8], at: usize) -> Result<u32, ManifestError> {
    field(bytes, at).map(u32::from_le_bytes)
}

fn offset(bytes: &[u8], at: usize) -> Result<usize, ManifestError> {
    let value = u64::from_le_bytes(field(bytes, at)?);
    usize::try_from(value).map_err(|_| ManifestError::NotAnObject("an offset is out of all bounds".to_owned()))
}

/// The section headers of an object file (ET_REL, x86-64, little-endian).
struct Sections {
    /// Where they are.
    headers: usize,
    count: usize,
    /// Which section holds the names, and where those are.
    names_index: usize,
    names: Range<usize>,
}

impl Sections {
    fn read(bytes: &[u8]) -> Result<Self, ManifestError> {
        // EI_MAG, EI_CLASS (64 bits), EI_DATA (little-endian); e_type ET_REL, e_machine EM_X86_64.
        let is_object = bytes.starts_with(b"\x7fELF\x02\x01") && half(bytes, 16)? == 1 && half(bytes, 18)? == 62;
        if !is_object || bytes.len() < HEADER {
            return refuse("it is no relocatable ELF file for x86-64");
        }
        let (headers, size, count) = (offset(bytes, 40)?, half(bytes, 58)?, usize::from(half(bytes, 60)?));
        let names_index = usize::from(half(bytes, 62)?);
        if usize::from(size) != SECTION_HEADER || count == 0 || count >= RESERVED || names_index >= count {
            return refuse("its section headers are not as the ELF header says");
        }
        let end = headers.checked_add(count * SECTION_HEADER);
        if end.is_none_or(|end| end > bytes.len()) {
            return refuse("its section headers are cut off");
        }
        let mut sections = Self { headers, count, names_index, names: 0..0 };
        sections.names = sections.contents(bytes, names_index)?;
        Ok(sections)
    }

    fn header(&self, index: usize) -> usize {
        self.headers + index * SECTION_HEADER
    }

    fn contents(&self, bytes: &[u8], index: usize) -> Result<Range<usize>, ManifestError> {
        let header = self.header(index);
        let (start, length) = (offset(bytes, header + 24)?, offset(bytes, header + 32)?);
        if word(bytes, header + 4)? == SHT_NOBITS {
            return Ok(0..0);
        }
        match start.checked_add(length).filter(|&end| end <= bytes.len()) {
            Some(end) => Ok(start..end),
            None => refuse("a section lies outside of the file"),
        }
    }

    fn name<'a>(&self, bytes: &'a [u8], index: usize) -> Option<&'a [u8]> {
        let at = word(bytes, self.header(index)).ok()? as usize;
        let tail = bytes.get(self.names.clone())?.get(at..)?;
        tail.split(|&byte| byte == 0).next()
    }
}

/// Where the contents of the one section `name` are.
pub(super) fn find(bytes: &[u8], name: &str) -> Result<Option<Range<usize>>, ManifestError> {
    let sections = Sections::read(bytes)?;
    let mut found = (1..sections.count).filter(|&index| sections.name(bytes, index) == Some(name.as_bytes()));
    let Some(index) = found.next() else { return Ok(None) };
    if found.next().is_some() {
        return Err(ManifestError::Damaged(format!("there are two sections {name}")));
    }
    sections.contents(bytes, index).map(Some)
}

/// The file with one section more, of no consequence for linkers.
pub(super) fn append(bytes: &[u8], name: &str, contents: &[u8]) -> Result<Vec<u8>, ManifestError> {
    let sections = Sections::read(bytes)?;
    if sections.count + 1 >= RESERVED {
        return refuse("it has too many sections");
    }
    let align = |file: &mut Vec<u8>| file.resize(file.len().next_multiple_of(8), 0);
    let mut file = bytes.to_vec();
    align(&mut file);
    let contents_at = file.len();
    file.extend_from_slice(contents);
    align(&mut file);
    let names_at = file.len();
    file.extend_from_slice(&bytes[sections.names.clone()]);
    // Names that the file has must end somewhere, and ours starts behind an end.
    if file.len() == names_at || file.last() != Some(&0) {
        file.push(0);
    }
    let name_at = file.len() - names_at;
    file.extend_from_slice(name.as_bytes());
    file.push(0);
    let names_length = file.len() - names_at;
    align(&mut file);
    let headers_at = file.len();
    file.extend_from_slice(&bytes[sections.headers..sections.header(sections.count)]);
    let names_header = headers_at + sections.names_index * SECTION_HEADER;
    file[names_header + 24..names_header + 32].copy_from_slice(&(names_at as u64).to_le_bytes());
    file[names_header + 32..names_header + 40].copy_from_slice(&(names_length as u64).to_le_bytes());
    let Ok(name_at) = u32::try_from(name_at) else { return refuse("its names are too long") };
    let mut header = [0; SECTION_HEADER];
    header[..4].copy_from_slice(&name_at.to_le_bytes());
    header[4..8].copy_from_slice(&SHT_PROGBITS.to_le_bytes());
    header[24..32].copy_from_slice(&(contents_at as u64).to_le_bytes());
    header[32..40].copy_from_slice(&(contents.len() as u64).to_le_bytes());
    header[48..56].copy_from_slice(&1_u64.to_le_bytes());
    file.extend_from_slice(&header);
    file[40..48].copy_from_slice(&(headers_at as u64).to_le_bytes());
    file[60..62].copy_from_slice(&((sections.count + 1) as u16).to_le_bytes());
    Ok(file)
}
