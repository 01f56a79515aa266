//! What the dynamic linker reads: needed libraries, exported symbols, and the slots that it fills. Found by program header
//! alone, since stripped files may lack section headers.

use super::{
    Image,
    bytes::{NameBudget, Strings, hash},
    symbols::SymbolTable,
};
use crate::address::ImageOffset;
use object::{LittleEndian as LE, elf, read::elf::Dyn, read::elf::ProgramHeader};

/// Most entries of the dynamic section that are read; real ones have some dozens.
const TAGS_MOST: usize = 16 << 10;
/// Most DT_NEEDED entries.
const NEEDED_MOST: usize = 4096;

/// The dynamic section, up to DT_NULL.
#[derive(Default)]
pub(super) struct Dynamic(Vec<(elf::DynamicTag, u64)>);

impl Dynamic {
    pub(super) fn read(programs: &[elf::ProgramHeader64<LE>], data: &[u8]) -> Self {
        let entries = programs.iter().find_map(|p| p.dynamic(LE, data).ok().flatten()).unwrap_or_default();
        let tags = entries.iter().take(TAGS_MOST).map(|entry| (entry.d_tag(LE), entry.d_val(LE)));
        Self(tags.take_while(|(tag, _)| *tag != elf::DT_NULL).collect())
    }

    fn value(&self, wanted: elf::DynamicTag) -> Option<u64> {
        self.0.iter().find(|(tag, _)| *tag == wanted).map(|&(_, value)| value)
    }

    fn strings(&self, image: &Image) -> Option<Strings> {
        let mut range = image.file_range(ImageOffset(self.value(elf::DT_STRTAB)?))?;
        if let Some(size) = self.value(elf::DT_STRSZ).and_then(|size| usize::try_from(size).ok()) {
            range.end = range.end.min(range.start.saturating_add(size));
        }
        Some(Strings::new(&image.bytes, range))
    }

    /// DT_NEEDED and DT_SONAME.
    pub(super) fn libraries(&self, image: &Image) -> (Vec<String>, Option<String>) {
        let Some(strings) = self.strings(image) else { return Default::default() };
        let text = |&(_, at): &(elf::DynamicTag, u64)| strings.text(u32::try_from(at).ok()?);
        let needed = self.0.iter().filter(|(tag, _)| *tag == elf::DT_NEEDED).take(NEEDED_MOST).filter_map(text);
        (needed.collect(), self.0.iter().find(|(tag, _)| *tag == elf::DT_SONAME).and_then(text))
    }

    /// Slots into which the linker writes an address within the image, and that address (R_X86_64_RELATIVE).
    pub(super) fn relative_pointers(&self, image: &Image) -> Vec<(ImageOffset, ImageOffset)> {
        let relocations = self.relocations(image, elf::DT_RELA, elf::DT_RELASZ);
        let relative = relocations.filter(|&(_, kind, _)| kind == elf::R_X86_64_RELATIVE);
        relative.map(|(slot, _, target)| (ImageOffset(slot), ImageOffset(target))).collect()
    }

    /// Addresses within the image that the linker writes into slots which no symbol names, in no order.
    pub(super) fn relocated_pointers(&self, image: &Image) -> Vec<u64> {
        let tables = [(elf::DT_RELA, elf::DT_RELASZ), (elf::DT_JMPREL, elf::DT_PLTRELSZ)];
        let relocations = tables.into_iter().flat_map(|(at, size)| self.relocations(image, at, size));
        let kinds = [elf::R_X86_64_RELATIVE, elf::R_X86_64_IRELATIVE];
        relocations.filter(|(_, kind, _)| kinds.contains(kind)).map(|(.., target)| target).collect()
    }

    /// Slot, type and addend of each relocation in a table (gABI, Elf64_Rela).
    fn relocations<'a>(
        &self,
        image: &'a Image,
        at: elf::DynamicTag,
        size: elf::DynamicTag,
    ) -> impl Iterator<Item = (u64, elf::RelocationType, u64)> + use<'a> {
        let table = self.value(at).zip(self.value(size));
        let bytes = table.and_then(|(at, size)| {
            let bytes = image.file_tail(ImageOffset(at))?;
            Some(&bytes[..bytes.len().min(usize::try_from(size).unwrap_or(usize::MAX))])
        });
        let (entries, _) = bytes.unwrap_or_default().as_chunks::<24>();
        entries.iter().map(|entry| {
            let word = |index: usize| entry[index..index + 8].try_into().map_or(0, u64::from_le_bytes);
            (word(0), elf::RelocationType(word(8) as u32), word(16))
        })
    }

    /// Adds the dynamic symbols to `table`, and lists the slots.
    pub(super) fn index(&self, image: &Image, table: &mut SymbolTable) -> Slots {
        let area = |tag: elf::DynamicTag| self.value(tag).and_then(|at| image.file_tail(ImageOffset(at)));
        let (Some(symbols), Some(strings)) = (area(elf::DT_SYMTAB), self.strings(image)) else {
            return Slots::default();
        };
        let most = symbols.len() / 24;
        let mut count = symbol_count(area(elf::DT_GNU_HASH), area(elf::DT_HASH)).unwrap_or(0);
        let mut found = Vec::new();
        for (at, size) in [(elf::DT_RELA, elf::DT_RELASZ), (elf::DT_JMPREL, elf::DT_PLTRELSZ)] {
            let (Some(bytes), Some(size)) = (area(at), self.value(size)) else { continue };
            let bytes = &bytes[..bytes.len().min(usize::try_from(size).unwrap_or(usize::MAX))];
            for entry in bytes.chunks_exact(24) {
                let word = |index: usize| entry[index..index + 8].try_into().map_or(0, u64::from_le_bytes);
                let (offset, info) = (word(0), word(8));
                let (symbol, kind) = ((info >> 32) as usize, elf::RelocationType(info as u32));
                if symbol == 0 || symbol >= most {
                    continue;
                }
                // A symbol that a relocation names exists, whatever the hash table (of defined ones only) says.
                count = count.max(symbol + 1);
                let slots = [elf::R_X86_64_GLOB_DAT, elf::R_X86_64_JUMP_SLOT, elf::R_X86_64_64, elf::R_X86_64_TPOFF64];
                // With an addend the slot holds something else than the symbol.
                if slots.contains(&kind) && word(16) == 0 {
                    let name = symbols[symbol * 24..symbol * 24 + 4].try_into().unwrap_or_default();
                    found.push((u32::from_le_bytes(name), ImageOffset(offset)));
                }
            }
        }
        table.add_dynamic(&symbols[..count.min(most) * 24], strings.clone(), area(elf::DT_VERSYM));
        Slots::new(strings, found)
    }
}

/// Number of dynamic symbols, which only the hash tables tell (gABI DT_HASH; DT_GNU_HASH: the highest bucket's chain).
fn symbol_count(gnu: Option<&[u8]>, sysv: Option<&[u8]>) -> Option<usize> {
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

/// Slots of imported symbols, by name.
#[derive(Default)]
pub(super) struct Slots {
    strings: Option<Strings>,
    /// Hash of the name, the name, the slot; sorted.
    sorted: Vec<(u32, u32, ImageOffset)>,
}

impl Slots {
    fn new(strings: Strings, mut found: Vec<(u32, ImageOffset)>) -> Self {
        found.sort_unstable();
        let mut budget = NameBudget::for_table(strings.len());
        let mut sorted: Vec<(u32, u32, ImageOffset)> = Vec::with_capacity(found.len());
        for (name, slot) in found {
            let hash = match sorted.last() {
                Some(&(hash, last, _)) if last == name => hash,
                _ => {
                    let text = strings.name(name);
                    if !budget.spend(text) {
                        break;
                    }
                    let Some(text) = text else { continue };
                    hash(text)
                }
            };
            sorted.push((hash, name, slot));
        }
        sorted.sort_unstable();
        Self { strings: Some(strings), sorted }
    }

    /// All slots with the names of their symbols.
    pub(super) fn all(&self) -> Vec<(ImageOffset, String)> {
        let Some(strings) = &self.strings else { return Vec::new() };
        self.sorted.iter().filter_map(|&(_, name, slot)| Some((slot, strings.text(name)?))).collect()
    }

    /// The slots of one symbol, by address.
    pub(super) fn of(&self, name: &str) -> Vec<ImageOffset> {
        let Some(strings) = &self.strings else { return Vec::new() };
        let wanted = hash(name.as_bytes());
        let start = self.sorted.partition_point(|&(hash, ..)| hash < wanted);
        let same = self.sorted[start..].iter().take_while(|&&(hash, ..)| hash == wanted);
        let named = same.filter(|&&(_, at, _)| strings.name(at) == Some(name.as_bytes()));
        let mut slots: Vec<ImageOffset> = named.map(|&(.., slot)| slot).collect();
        slots.sort_unstable();
        slots
    }
}
