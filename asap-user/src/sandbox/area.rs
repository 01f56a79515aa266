//! Memory that guards need once per process: the shadow of the stacks, the table of destinations, the table of system calls. Where
//! it may lie is told from the memory map; it is address space for the most part, and takes memory where it is used.
//!
//! The shadow lies at a constant distance from everything that may be a stack, so that code finds the copy of a return address
//! without asking anybody which stack it is on: coroutines and signal stacks have their shadow before they exist.

use super::code::Wanted;
use crate::{
    address::{PAGE_SIZE, TargetAddr},
    dbt::{Constants, ShadowForm, SyscallTable, TargetTable},
    process::{
        locked,
        maps::Maps,
        memory::Memory,
        pages,
        puppet::{Puppet, PuppetError},
    },
};
use serde::{Deserialize, Serialize};
use std::{io, ops::Range};

/// Lowest address that is used, and the end of user space with four page-table levels.
const LOWEST: u64 = 1 << 16;
const HIGHEST: u64 = 0x7fff_ffff_f000;
/// What lies further apart than this belongs to different clusters: they don't touch when they have grown.
const APART: u64 = 2 * GROWTH + (1 << 30);
/// Room that a cluster is given to grow, on either side: heaps grow up, mmap(2) gives out addresses further and further down.
const GROWTH: u64 = 1 << 40;
/// Distances are tried in such steps.
const STEP: i64 = 1 << 40;
/// Added to the distance: stack and shadow at a distance of a power of two would compete for the same lines of the caches.
const SKEW: i64 = -0x1840;
/// Where it lies.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Area {
    /// How a stack's shadow is found.
    pub form: Option<ShadowForm>,
    /// See there.
    pub displacement: i64,
    /// The shadow's mappings.
    pub shadow: Vec<Range<TargetAddr>>,
    /// The table of destinations.
    pub targets: Option<TargetAddr>,
    /// The table of system calls.
    pub syscalls: Option<TargetAddr>,
}

/// What may come to hold stacks: mappings that lie near each other, with room to grow.
fn clusters(maps: &Maps) -> Vec<Range<u64>> {
    let mut found: Vec<Range<u64>> = Vec::new();
    // The kernel's own page lies outside of user space.
    for mapping in maps.0.iter().filter(|mapping| mapping.range.end.0 <= HIGHEST) {
        let range = mapping.range.start.0..mapping.range.end.0;
        match found.last_mut() {
            Some(last) if range.start.saturating_sub(last.end) <= APART => last.end = last.end.max(range.end),
            _ => found.push(range),
        }
    }
    let grown = |cluster: Range<u64>| {
        cluster.start.saturating_sub(GROWTH).max(LOWEST)..cluster.end.saturating_add(GROWTH).min(HIGHEST)
    };
    found.into_iter().map(grown).collect()
}

fn touch(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// The ranges of the shadow for a distance; none: something is in the way.
fn shadow_at(clusters: &[Range<u64>], displacement: i64) -> Option<Vec<Range<TargetAddr>>> {
    let moved = |cluster: &Range<u64>| {
        let start = cluster.start.checked_add_signed(displacement)? & !(PAGE_SIZE - 1);
        let end = cluster.end.checked_add_signed(displacement)?.checked_next_multiple_of(PAGE_SIZE)?;
        let range = start..end;
        let is_free = range.start >= LOWEST && range.end <= HIGHEST && !clusters.iter().any(|c| touch(c, &range));
        is_free.then_some(TargetAddr(start)..TargetAddr(end))
    };
    clusters.iter().map(moved).collect()
}

impl Area {
    /// Finds room for what is wanted.
    ///
    /// # Errors
    /// There is none: what is in the way, for a person.
    pub fn plan(maps: &Maps, wanted: Wanted) -> Result<Self, String> {
        let mut area = Self::default();
        let mut taken = maps.clone();
        if wanted.shadow {
            let clusters = clusters(maps);
            // Down first: above the stack there is nothing.
            let distances = (1..120).flat_map(|steps| [-steps * STEP + SKEW, steps * STEP + SKEW]);
            let mut fitting = distances.filter_map(|distance| Some((distance, shadow_at(&clusters, distance)?)));
            let folded = TargetAddr(ShadowForm::FOLDED.start)..TargetAddr(ShadowForm::FOLDED.end + PAGE_SIZE);
            area.form = Some(ShadowForm::Displaced);
            if let Some((displacement, shadow)) = fitting.next() {
                (area.displacement, area.shadow) = (displacement, shadow);
            } else if clusters.iter().any(|cluster| touch(cluster, &(folded.start.0..folded.end.0))) {
                return Err("its address space has no room for a shadow of its stacks".to_owned());
            } else if !std::is_x86_feature_detected!("bmi2") {
                return Err("a program at a fixed address has a shadow only on processors with BMI2".to_owned());
            } else {
                (area.form, area.displacement, area.shadow) = (Some(ShadowForm::Folded), -SKEW, vec![folded]);
            }
            for range in &area.shadow {
                add(&mut taken, range);
            }
        }
        let mut room = |length| {
            let near = TargetAddr(HIGHEST / 2)..TargetAddr(HIGHEST / 2);
            let at = taken.gap(&near, length, HIGHEST).ok_or("its address space has no room for a table")?;
            add(&mut taken, &(at..at.offset(length as i64)));
            Ok::<_, String>(at)
        };
        if wanted.targets {
            area.targets = Some(room(TargetTable::SIZE)?);
        }
        if wanted.syscalls {
            area.syscalls = Some(room(SyscallTable::SIZE)?);
        }
        Ok(area)
    }

    /// All of its mappings, with whether the process writes them.
    pub fn mappings(&self) -> impl Iterator<Item = (Range<TargetAddr>, bool)> {
        let table = |at: Option<TargetAddr>, length: u64| at.map(|at| (at..at.offset(length as i64), false));
        let shadow = self.shadow.iter().map(|range| (range.clone(), true));
        shadow.chain(table(self.targets, TargetTable::SIZE)).chain(table(self.syscalls, SyscallTable::SIZE))
    }

    /// Maps it. What was mapped before an error stays, and is in the record.
    ///
    /// # Errors
    /// Something is there by now, or the process may not have so much address space (RLIMIT_AS, vm.overcommit_memory=2).
    pub fn map(&self, puppet: &mut Puppet) -> Result<(), PuppetError> {
        for (range, is_written) in self.mappings() {
            let length = range.end.0 - range.start.0;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
            // A process that locks all its memory (mlockall(2)) would have all of it at once: not before it is unlocked.
            let arguments = [range.start.0, length, libc::PROT_NONE as u64, flags as u64, u64::MAX, 0];
            puppet.syscall("mmap of a shadow or table", libc::SYS_mmap, arguments)?;
            locked::unlock_range(puppet, &range)?;
            let protection = if is_written { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
            let arguments = [range.start.0, length, protection as u64, 0, 0, 0];
            puppet.syscall("mprotect of a shadow or table", libc::SYS_mprotect, arguments)?;
            // Core dumps would be as long as the address space; huge pages would take memory that nobody uses.
            for advice in [libc::MADV_DONTDUMP, libc::MADV_NOHUGEPAGE] {
                let advised =
                    puppet.syscall("madvise", libc::SYS_madvise, [range.start.0, length, advice as u64, 0, 0, 0]);
                // Kernels without huge pages don't know the second.
                if !matches!(advised, Ok(_) | Err(PuppetError::Call { .. })) {
                    advised?;
                }
            }
        }
        Ok(())
    }

    /// Unmaps it.
    ///
    /// # Errors
    /// The puppet is gone.
    pub fn unmap(&self, puppet: &mut Puppet) -> Result<(), PuppetError> {
        for (range, _) in self.mappings() {
            pages::unmap(puppet, range.start, range.end.0 - range.start.0)?;
        }
        Ok(())
    }

    /// Accepts `destination`, and with it all others that have the same lower half.
    ///
    /// # Errors
    /// The process is gone.
    pub fn accept(&self, memory: &Memory, destination: TargetAddr) -> io::Result<()> {
        let Some(table) = self.targets else { return Ok(()) };
        memory.write(table.offset(TargetTable::index(destination.0) as i64), &[1])
    }

    /// Accepts many. Sorted ones share their writes.
    ///
    /// # Errors
    /// The process is gone.
    pub fn accept_all(&self, memory: &Memory, destinations: &[TargetAddr]) -> io::Result<()> {
        let Some(table) = self.targets else { return Ok(()) };
        for page in destinations.chunk_by(|a, b| a.page() == b.page()) {
            let at = table.offset(TargetTable::index(page[0].page().0) as i64);
            let mut bytes = memory.bytes(at, PAGE_SIZE as usize)?;
            page.iter().for_each(|destination| bytes[destination.page_offset()] = 1);
            memory.write(at, &bytes)?;
        }
        Ok(())
    }

    /// The copy of a return address at `sp`.
    #[must_use]
    pub fn shadow_of(&self, sp: u64) -> TargetAddr {
        TargetAddr(self.form.unwrap_or(ShadowForm::Displaced).slot(sp, self.displacement))
    }

    /// What translated code is told of it.
    #[must_use]
    pub fn constants(&self) -> Constants {
        let address = |at: Option<TargetAddr>| at.map_or(0, |at| at.0);
        Constants { displacement: self.displacement, targets: address(self.targets), syscalls: address(self.syscalls) }
    }
}

/// Marks `range` as taken.
fn add(maps: &mut Maps, range: &Range<TargetAddr>) {
    let at = maps.0.partition_point(|mapping| mapping.range.start < range.start);
    let line = format!("{:x}-{:x} ---p 00000000 00:00 0", range.start.0, range.end.0);
    maps.0.splice(at..at, Maps::parse(&line).0);
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Wanted = Wanted { shadow: true, targets: true, syscalls: true };

    fn is_free(maps: &Maps, range: &Range<TargetAddr>) -> bool {
        maps.0.iter().all(|m| m.range.end <= range.start || range.end <= m.range.start)
    }

    #[test]
    fn the_shadow_has_room_for_whatever_may_become_a_stack() {
        let maps = Maps::parse(
            "\
555555554000-555555556000 r--p 00000000 fe:00 123 /usr/sbin/a
555555560000-555555580000 rw-p 00000000 00:00 0 [heap]
7f1200000000-7f1280000000 rw-p 00000000 00:00 0
7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0 [stack]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0 [vsyscall]
",
        );
        let area = Area::plan(&maps, ALL).expect("room");
        for sp in [0x5555_5555_4008, 0x5565_0000_0000, 0x7f11_0000_0000, 0x7f12_0000_1000, 0x7fff_ffff_eff8] {
            let slot = area.shadow_of(sp);
            let holder = area.shadow.iter().find(|range| range.contains(&slot) && range.contains(&slot.offset(7)));
            assert!(holder.is_some(), "{sp:#x} {area:x?}");
        }
        let mut taken = maps.clone();
        for (range, _) in area.mappings() {
            assert!(is_free(&taken, &range), "{range:x?} {taken:x?}");
            add(&mut taken, &range);
        }
        assert_ne!(area.displacement & 0xfff, 0);
    }

    #[test]
    fn a_program_at_a_fixed_address_has_a_folded_shadow() {
        let maps = Maps::parse(
            "\
400000-500000 r-xp 00000000 fe:00 123 /usr/bin/fixed
7f1200000000-7f1280000000 rw-p 00000000 00:00 0
7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0 [stack]
",
        );
        let folded = Area::plan(&maps, ALL);
        if std::is_x86_feature_detected!("bmi2") {
            let area = folded.expect("room");
            assert_eq!((area.form, area.shadow.len()), (Some(ShadowForm::Folded), 1));
            for sp in [0x50_0000, 0x1_0000_0008, 0x7f12_0000_0000, 0x7fff_ffff_eff8] {
                let slot = area.shadow_of(sp);
                assert!(area.shadow[0].contains(&slot) && area.shadow[0].contains(&slot.offset(7)), "{sp:#x}");
            }
        } else {
            assert!(folded.is_err());
        }
        let tables = Area::plan(&maps, Wanted { shadow: false, ..ALL }).expect("room");
        assert_eq!((tables.shadow.len(), tables.mappings().count()), (0, 2));
    }

    #[test]
    fn wide_randomisation_leaves_room_too() {
        // vm.mmap_rnd_bits=32: a program may lie high, the libraries low.
        let maps = Maps::parse(
            "\
64d0aa554000-64d0aa556000 r--p 00000000 fe:00 123 /usr/sbin/a
7212aa560000-7212aa580000 r-xp 00000000 fe:00 124 /usr/lib/b
7ffffffde000-7ffffffff000 rw-p 00000000 00:00 0 [stack]
",
        );
        let area = Area::plan(&maps, ALL).expect("room");
        assert!(!area.shadow.is_empty());
    }
}
