//! Jump tables, as gcc and clang write them for position-independent code: 32-bit distances from the table itself. Tables of
//! addresses need no search: their words are among the pointers that data holds.

use super::view::CodeView;
use crate::address::ImageOffset;

/// Most entries that are read in all tables of an image: a damaged file must not cost more than it is worth.
pub(super) const ENTRIES_MOST: usize = 1 << 22;

/// Destinations in the table at `base`, as far as they lead to instructions. Where there is no table, what is found by chance
/// costs room only.
pub(super) fn relative(
    base: u64,
    view: &CodeView<'_>,
    is_instruction: impl Fn(u64) -> bool,
    budget: &mut usize,
) -> Vec<u64> {
    let mut found = Vec::new();
    let areas = view.data.iter().chain(&view.code);
    let Some((ImageOffset(start), bytes)) =
        areas.copied().find(|(start, bytes)| base.checked_sub(start.0).is_some_and(|at| at < bytes.len() as u64))
    else {
        return found;
    };
    let (words, _) = bytes[(base - start) as usize..].as_chunks::<4>();
    for word in words {
        let to = base.wrapping_add_signed(i64::from(i32::from_le_bytes(*word)));
        if *budget == 0 || !is_instruction(to) {
            break;
        }
        *budget -= 1;
        found.push(to);
    }
    found
}
