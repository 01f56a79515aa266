//! What whoever rewrites the code of an image asks of it: which addresses of code its data holds, where exceptions land, and
//! where only the return address lies on the stack. Not for looking up single functions.

use super::Image;
use crate::address::ImageOffset;
use std::ops::Range;

impl Image {
    /// Addresses of code that the image's data holds or will hold once the linker has relocated it; sorted. Words that look
    /// like one by chance are among them.
    #[must_use]
    pub fn code_pointers(&self) -> Vec<ImageOffset> {
        let executable: Vec<Range<u64>> = self.segments.iter().filter(|s| s.executable).map(|s| s.mapped()).collect();
        let is_code = |at: &u64| executable.iter().any(|range| range.contains(at));
        let mut found = self.dynamic.relocated_pointers(self);
        found.retain(is_code);
        // Programs at a fixed address need no relocations; where there are DT_RELR ones the value is in place too.
        for segment in self.segments.iter().filter(|segment| !segment.executable) {
            let Some(bytes) = self.file_tail(segment.address) else { continue };
            let misaligned = (segment.address.0.wrapping_neg() % 8) as usize;
            let (words, _) = bytes.get(misaligned..).unwrap_or_default().as_chunks::<8>();
            found.extend(words.iter().map(|word| u64::from_le_bytes(*word)).filter(is_code));
        }
        let entry = self.bytes.bytes().get(24..32).and_then(|bytes| bytes.try_into().ok()).map(u64::from_le_bytes);
        found.extend(entry.filter(is_code));
        found.sort_unstable();
        found.dedup();
        found.into_iter().map(ImageOffset).collect()
    }

    /// All symbols that its tables have, in no order.
    pub fn all_symbols(&self) -> impl Iterator<Item = super::Symbol> {
        self.symbols().all()
    }

    /// Slots that the linker fills with the address of a symbol, and its name.
    #[must_use]
    pub fn named_slots(&self) -> Vec<(ImageOffset, String)> {
        self.index().slots.all()
    }

    /// Slots that the linker fills with an address in this image, and that address.
    #[must_use]
    pub fn relative_pointers(&self) -> Vec<(ImageOffset, ImageOffset)> {
        self.dynamic.relative_pointers(self)
    }

    /// Where exceptions land in the code whose unwind-table entry begins at `start`.
    #[must_use]
    pub fn landing_pads(&self, start: ImageOffset) -> Vec<ImageOffset> {
        self.unwind.landing_pads(self, start)
    }

    /// Bounds of what signal handlers return to; the first address lies in front of the first instruction.
    #[must_use]
    pub fn signal_trampolines(&self) -> Vec<Range<ImageOffset>> {
        self.unwind.signal_trampolines(self)
    }

    /// Bounds of all other entries of the unwind table, by address.
    #[must_use]
    pub fn unwind_bounds(&self) -> Vec<Range<ImageOffset>> {
        self.unwind.all(self)
    }

    /// Where only the return address lies above the stack pointer, as when a function begins; by address.
    #[must_use]
    pub fn bare_frames(&self) -> Vec<Range<ImageOffset>> {
        self.unwind.bare_frames(self)
    }

    /// PT_GNU_RELRO: data that is read-only once the linker has relocated it.
    #[must_use]
    pub fn relro(&self) -> Option<Range<ImageOffset>> {
        self.relro.map(|(start, size)| start..ImageOffset(start.0.saturating_add(size)))
    }
}
