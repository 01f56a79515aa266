//! What the text pages of a process must hold, given the patches that are to be active: the file's bytes with a jump, or a probe
//! of the kernel's, at each replaced entry. Pure.

use super::ledger::AppliedPatch;
use crate::{
    address::{PAGE_SIZE, TargetAddr},
    patch::prologue,
    report::Mechanism,
};
use std::collections::{BTreeMap, BTreeSet};

/// Length of an entry jump, bytes.
pub const JUMP_LENGTH: usize = 5;

/// What leads calls away from an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detour {
    /// A jump.
    Jump([u8; JUMP_LENGTH]),
    /// A breakpoint of the kernel's, at which an eBPF program sends the thread elsewhere.
    Probe {
        /// Where to.
        to: TargetAddr,
        /// The jump that would do the same.
        jump: [u8; JUMP_LENGTH],
    },
}

/// Detours by the address of the entry.
pub type Jumps = BTreeMap<TargetAddr, Detour>;

/// What a page has at entries with a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probes {
    /// The kernel's breakpoint, as it is found in the process.
    Set,
    /// What the kernel finds when it sets one: the function's own code.
    Unset,
    /// A jump instead: for pages without probes that do the same.
    AsJumps,
}

/// The kernel's breakpoint: int3.
const BREAKPOINT: u8 = 0xcc;

/// The detours that make `patches` (oldest first) active: of several that replace a function the newest counts. `None` if a
/// replacement is out of reach, which staging has ruled out.
#[must_use]
pub fn jumps(patches: &[AppliedPatch]) -> Option<Jumps> {
    let mut jumps = Jumps::new();
    for (mechanism, function) in patches.iter().flat_map(|patch| patch.functions.iter().map(|f| (patch.mechanism, f))) {
        let to = function.replacement.start;
        let jump = prologue::entry_jump(function.entry, to)?;
        let detour = match mechanism {
            Mechanism::Redirect => Detour::Probe { to, jump },
            Mechanism::Auto | Mechanism::Page => Detour::Jump(jump),
        };
        jumps.insert(function.entry, detour);
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
pub fn render(page: TargetAddr, clean: &[u8], jumps: &Jumps, probes: Probes) -> Vec<u8> {
    let mut bytes = clean.to_vec();
    let first = page.offset(1 - JUMP_LENGTH as i64);
    for (at, detour) in jumps.range(first..page.offset(PAGE_SIZE as i64)) {
        let written: &[u8] = match (detour, probes) {
            (Detour::Jump(jump), _) | (Detour::Probe { jump, .. }, Probes::AsJumps) => jump,
            (Detour::Probe { .. }, Probes::Set) => &[BREAKPOINT],
            (Detour::Probe { .. }, Probes::Unset) => &[],
        };
        for (index, &byte) in written.iter().enumerate() {
            let offset = at.offset(index as i64).wrapping_distance(page);
            if let Some(place) = usize::try_from(offset).ok().and_then(|offset| bytes.get_mut(offset)) {
                *place = byte;
            }
        }
    }
    bytes
}

/// The entries on the page at `page` that have a probe, and where it leads.
#[must_use]
pub fn probes(page: TargetAddr, jumps: &Jumps) -> Vec<(TargetAddr, TargetAddr)> {
    let on_page = jumps.range(page..page.offset(PAGE_SIZE as i64));
    on_page
        .filter_map(|(&at, detour)| if let Detour::Probe { to, .. } = detour { Some((at, *to)) } else { None })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_across_a_page_border_touches_both_pages() {
        let page = TargetAddr(0x40_1000);
        let jump = |bytes| Detour::Jump(bytes);
        let jumps = Jumps::from([(TargetAddr(0x40_1ffe), jump([0xe9, 1, 2, 3, 4])), (page, jump([0xe9, 5, 6, 7, 8]))]);
        let clean = vec![0x90; PAGE_SIZE as usize];
        let first = render(page, &clean, &jumps, Probes::Set);
        assert_eq!(first[..6], [0xe9, 5, 6, 7, 8, 0x90]);
        assert_eq!(first[0xffd..], [0x90, 0xe9, 1]);
        let second = render(TargetAddr(0x40_2000), &clean, &jumps, Probes::Set);
        assert_eq!(second[..4], [2, 3, 4, 0x90]);
        let pages = differing_pages(&Jumps::new(), &jumps);
        assert_eq!(Vec::from_iter(pages), [page, TargetAddr(0x40_2000)]);
        assert!(differing_pages(&jumps, &jumps).is_empty());
    }

    #[test]
    fn a_probe_is_one_byte_of_the_kernels_that_no_other_page_may_show() {
        let page = TargetAddr(0x40_1000);
        let probed = TargetAddr(0x40_1ffe);
        let probe = Detour::Probe { to: TargetAddr(0x50_0000), jump: [0xe9, 1, 2, 3, 4] };
        let jumps = Jumps::from([(page, Detour::Jump([0xe9, 5, 6, 7, 8])), (probed, probe)]);
        let clean = vec![0x90; PAGE_SIZE as usize];
        let with = |probes| render(page, &clean, &jumps, probes);
        let [set, unset, gate] = [Probes::Set, Probes::Unset, Probes::AsJumps].map(with);
        assert!([&set, &unset, &gate].into_iter().all(|bytes| bytes[..6] == [0xe9, 5, 6, 7, 8, 0x90]));
        assert_eq!(
            (&set[0xffd..], &unset[0xffd..], &gate[0xffd..]),
            (&[0x90, 0xcc, 0x90][..], &[0x90; 3][..], &[0x90, 0xe9, 1][..])
        );
        assert_eq!(render(TargetAddr(0x40_2000), &clean, &jumps, Probes::Set), clean);
        assert_eq!(probes(page, &jumps), [(probed, TargetAddr(0x50_0000))]);
        // The gates of both pages hold the jump that stands for the probe.
        assert_eq!(Vec::from_iter(differing_pages(&Jumps::new(), &jumps)), [page, TargetAddr(0x40_2000)]);
    }
}
