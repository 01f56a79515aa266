//! What the text pages of a process must hold, given the patches that are to be active: the file's bytes with a jump at each
//! replaced entry. Pure.

use super::ledger::AppliedPatch;
use crate::{
    address::{PAGE_SIZE, TargetAddr},
    patch::prologue,
};
use std::collections::{BTreeMap, BTreeSet};

/// Length of an entry jump, bytes.
pub const JUMP_LENGTH: usize = 5;

/// Entry jumps by the address they stand at.
pub type Jumps = BTreeMap<TargetAddr, [u8; JUMP_LENGTH]>;

/// The jumps that make `patches` (oldest first) active: of several that replace a function the newest counts. `None` if a
/// replacement is out of reach, which staging has ruled out.
#[must_use]
pub fn jumps(patches: &[AppliedPatch]) -> Option<Jumps> {
    let mut jumps = Jumps::new();
    for function in patches.iter().flat_map(|patch| &patch.functions) {
        jumps.insert(function.entry, prologue::entry_jump(function.entry, function.replacement.start)?);
    }
    Some(jumps)
}

/// Pages on which the two sets of jumps differ.
#[must_use]
pub fn differing_pages(before: &Jumps, after: &Jumps) -> BTreeSet<TargetAddr> {
    let keys: BTreeSet<_> = before.keys().chain(after.keys()).copied().collect();
    let changed = keys.into_iter().filter(|at| before.get(at) != after.get(at));
    changed.flat_map(|at| [at.page(), at.offset(JUMP_LENGTH as i64 - 1).page()]).collect()
}

/// The bytes of the page at `page` that has `clean` as its file content, with all `jumps` that touch it.
#[must_use]
pub fn render(page: TargetAddr, clean: &[u8], jumps: &Jumps) -> Vec<u8> {
    let mut bytes = clean.to_vec();
    let first = page.offset(1 - JUMP_LENGTH as i64);
    for (at, jump) in jumps.range(first..page.offset(PAGE_SIZE as i64)) {
        for (index, &byte) in jump.iter().enumerate() {
            let offset = at.offset(index as i64).wrapping_distance(page);
            if let Some(place) = usize::try_from(offset).ok().and_then(|offset| bytes.get_mut(offset)) {
                *place = byte;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_across_a_page_border_touches_both_pages() {
        let page = TargetAddr(0x40_1000);
        let jumps = Jumps::from([(TargetAddr(0x40_1ffe), [0xe9, 1, 2, 3, 4]), (page, [0xe9, 5, 6, 7, 8])]);
        let clean = vec![0x90; PAGE_SIZE as usize];
        let first = render(page, &clean, &jumps);
        assert_eq!(first[..6], [0xe9, 5, 6, 7, 8, 0x90]);
        assert_eq!(first[0xffd..], [0x90, 0xe9, 1]);
        let second = render(TargetAddr(0x40_2000), &clean, &jumps);
        assert_eq!(second[..4], [2, 3, 4, 0x90]);
        let pages = differing_pages(&Jumps::new(), &jumps);
        assert_eq!(Vec::from_iter(pages), [page, TargetAddr(0x40_2000)]);
        assert!(differing_pages(&jumps, &jumps).is_empty());
    }
}
