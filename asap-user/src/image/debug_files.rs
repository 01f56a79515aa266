//! Symbols that a stripped image keeps elsewhere: in a separate debug file (gdb manual, "Separate Debug Files"), or packed in
//! a section. Says where to look; opens nothing.

use super::{Image, ImageBytes, ImageError, parse};
use object::{
    LittleEndian as LE, elf,
    read::elf::{FileHeader, SectionHeader},
};
use std::sync::OnceLock;

/// .gnu_debugdata.
pub(super) fn mini_debug_info(data: &[u8]) -> Option<&[u8]> {
    let sections = elf::FileHeader64::<LE>::parse(data).ok()?.sections(LE, data).ok()?;
    let (_, section) = sections.section_by_name(LE, b".gnu_debugdata")?;
    section.data(LE, data).ok()
}

impl Image {
    /// Where a separate debug file may be, the likeliest place first.
    #[must_use]
    pub fn debug_file_candidates(&self) -> Vec<String> {
        let mut candidates = Vec::new();
        if let Some(id) = self.build_id_hex().filter(|id| id.len() > 2) {
            candidates.push(format!("/usr/lib/debug/.build-id/{}/{}.debug", &id[..2], &id[2..]));
        }
        // The file's own words must not lead anywhere else.
        let is_plain = |link: &&String| !link.is_empty() && !link.contains('/') && *link != ".." && *link != ".";
        if let (Some(link), Some((directory, own))) =
            (self.debug_link.as_ref().filter(is_plain), self.name.rsplit_once('/'))
        {
            if link != own {
                candidates.push(format!("{directory}/{link}"));
            }
            candidates.push(format!("{directory}/.debug/{link}"));
            candidates.push(format!("/usr/lib/debug{directory}/{link}"));
        }
        candidates
    }

    /// This image with the symbols of a separate debug file.
    ///
    /// # Errors
    /// It belongs to another build, or is damaged.
    pub fn with_symbols_from(&self, debug_file: ImageBytes) -> Result<Self, ImageError> {
        let mut image = self.without_index()?;
        image.add_symbols_from(debug_file)?;
        Ok(image)
    }

    /// The same image once more, with the symbols that were added to it, and not indexed yet.
    pub(super) fn without_index(&self) -> Result<Self, ImageError> {
        let mut image = Self::parse(&self.name, self.bytes.clone())?;
        image.debug.clone_from(&self.debug);
        image.told.clone_from(&self.told);
        Ok(image)
    }

    /// Adds the symbols of a separate debug file.
    ///
    /// # Errors
    /// It belongs to another build, or is damaged.
    pub fn add_symbols_from(&mut self, file: ImageBytes) -> Result<(), ImageError> {
        let debug_file = file.bytes();
        let damaged = |reason: object::read::Error| ImageError::Damaged {
            name: format!("the debug file of {}", self.name),
            reason: reason.to_string(),
        };
        let header = elf::FileHeader64::<LE>::parse(debug_file).map_err(damaged)?;
        let sections = header.sections(LE, debug_file).map_err(damaged)?;
        let notes = sections.iter().filter_map(|section| section.notes(LE, debug_file).ok().flatten());
        let id = notes.take(parse::NOTES_MOST).find_map(parse::build_id);
        if id.is_none() || id != self.build_id {
            return Err(ImageError::OtherBuild(self.name.clone()));
        }
        self.debug.push(file);
        self.index = OnceLock::new();
        Ok(())
    }
}
