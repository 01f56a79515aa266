//! Memory that a target has locked (mlock(2), mlockall(2)): text pages that are exchanged must be locked afterwards as they were.
//!
//! `MREMAP_DONTUNMAP` takes the lock from what it leaves behind, and does not count it down (mm/mremap.c): so a page is unlocked
//! before a second mapping of it is made, and locked again after. Else the target would count 4 KiB more with each patch, its
//! text page would not be locked any more, and would not merge with its neighbours (P5).

use super::puppet::{Puppet, PuppetError};
use crate::address::{PAGE_SIZE, TargetAddr};
use serde::{Deserialize, Serialize};
use std::{fs, ops::Range};

/// How a mapping is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lock {
    /// With all its pages.
    Whole,
    /// With those pages that are used (MLOCK_ONFAULT).
    OnFault,
}

impl Lock {
    /// How the page at `page` is locked, by what `/proc` says of process `pid`; `tid` is a thread of it that lives. Where a gate
    /// of ours has its place, its neighbours tell.
    #[must_use]
    pub fn of(tid: i32, page: TargetAddr) -> Option<Self> {
        // A name need not be UTF-8.
        let status = fs::read(format!("/proc/{tid}/status")).ok()?;
        let status = String::from_utf8_lossy(&status);
        let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:"))?;
        // Most processes lock nothing, and smaps is dear.
        if locked.trim().starts_with("0 ") {
            return None;
        }
        let smaps = fs::read(format!("/proc/{tid}/smaps")).ok()?;
        Self::parse(&String::from_utf8_lossy(&smaps), page)
    }

    /// The same, from the text of `smaps`.
    pub(crate) fn parse(smaps: &str, page: TargetAddr) -> Option<Self> {
        let neighbours = [page, page.offset(-1), page.offset(PAGE_SIZE as i64)];
        let mut found = [None; 3];
        let mut here = [false; 3];
        for line in smaps.lines() {
            if let Some(flags) = line.strip_prefix("VmFlags:") {
                let flag = |name: &str| flags.split_ascii_whitespace().any(|flag| flag == name);
                let lock = match (flag("lo"), flag("lf")) {
                    (false, _) => None,
                    (true, false) => Some(Self::Whole),
                    (true, true) => Some(Self::OnFault),
                };
                for (found, _) in found.iter_mut().zip(here).filter(|(_, here)| *here) {
                    *found = Some(lock);
                }
            } else if let Some((range, rest)) = line.split_once(' ')
                && let Some((start, end)) = range.split_once('-')
                && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
            {
                let is_gate = rest.contains("/memfd:asap-gate");
                here = neighbours.map(|at| !is_gate && (start..end).contains(&at.0));
            }
        }
        found.into_iter().flatten().next().flatten()
    }

    /// Locks the page at `page` so. A target without the right to lock one more page keeps it unlocked.
    ///
    /// # Errors
    /// The puppet is gone.
    pub fn lock(self, puppet: &mut Puppet, page: TargetAddr) -> Result<(), PuppetError> {
        self.lock_range(puppet, &one_page(page))
    }

    /// Locks `range` so. A target without the right to lock so much keeps it unlocked.
    ///
    /// # Errors
    /// The puppet is gone.
    pub fn lock_range(self, puppet: &mut Puppet, range: &Range<TargetAddr>) -> Result<(), PuppetError> {
        let flags = if self == Self::OnFault { u64::from(libc::MLOCK_ONFAULT) } else { 0 };
        let length = range.end.0.saturating_sub(range.start.0);
        match puppet.syscall("mlock2", libc::SYS_mlock2, [range.start.0, length, flags, 0, 0, 0]) {
            Err(PuppetError::Call { pid, error, .. }) => {
                tracing::warn!(pid, %error, "text could not be locked as it was");
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Unlocks the page at `page`, for a moment.
    ///
    /// # Errors
    /// The kernel refuses, or the puppet is gone.
    pub fn unlock(self, puppet: &mut Puppet, page: TargetAddr) -> Result<(), PuppetError> {
        unlock_range(puppet, &one_page(page))
    }
}

/// Unlocks `range`, whether it was locked or not.
///
/// # Errors
/// The kernel refuses, or the puppet is gone.
pub fn unlock_range(puppet: &mut Puppet, range: &Range<TargetAddr>) -> Result<(), PuppetError> {
    let length = range.end.0.saturating_sub(range.start.0);
    puppet.syscall("munlock", libc::SYS_munlock, [range.start.0, length, 0, 0, 0, 0]).map(drop)
}

fn one_page(page: TargetAddr) -> Range<TargetAddr> {
    page..page.offset(PAGE_SIZE as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
1000-3000 r-xp 00000000 00:00 1  /a
Locked: 8 kB
VmFlags: rd ex lo
3000-4000 r-xp 00000000 00:00 2  /memfd:asap-gate (deleted)
VmFlags: rd ex
4000-5000 r--p 00000000 00:00 1  /a
VmFlags: rd
6000-7000 r--p 00000000 00:00 1  /a
VmFlags: rd lo lf
";

    #[test]
    fn a_page_is_locked_as_its_mapping_is() {
        let lock = |at| Lock::parse(SMAPS, TargetAddr(at));
        assert_eq!((lock(0x1000), lock(0x2000)), (Some(Lock::Whole), Some(Lock::Whole)));
        assert_eq!(lock(0x3000), Some(Lock::Whole), "a gate, whose neighbour before it is locked");
        assert_eq!((lock(0x4000), lock(0x6000), lock(0x9000)), (None, Some(Lock::OnFault), None));
    }
}
