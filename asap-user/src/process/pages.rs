//! Exchanging text pages. Bytes that a thread may be executing are never written: a copy of the page is made at the side,
//! changed there, and moved over the page by one mremap(2), which is atomic for every thread.
//!
//! The copy is made with `MREMAP_DONTUNMAP` (mremap(2), Linux 5.13): a second mapping of the same file and offset, whatever
//! has become of the file. Moved into place it merges with its neighbours: the memory map stays what it was (P5). It is
//! written through `/proc/PID/mem`, never mapped writable (P4).

use super::{
    memory::Memory,
    puppet::{Puppet, PuppetError},
};
use crate::address::{PAGE_SIZE, TargetAddr};

/// Makes a second mapping of the page at `from`, which must be unchanged file content: what was written to it privately goes
/// with the copy, and `from` shows the file again.
///
/// # Errors
/// The kernel refuses; nothing has changed.
pub fn duplicate(puppet: &mut Puppet, from: TargetAddr) -> Result<TargetAddr, PuppetError> {
    let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP) as u64;
    let arguments = [from.0, PAGE_SIZE, PAGE_SIZE, flags, 0, 0];
    puppet.syscall("mremap (second mapping of a text page)", libc::SYS_mremap, arguments).map(TargetAddr)
}

/// Keeps the page at `copy`, which is about to be written to, from merging with its neighbours. What it is written with belongs
/// to an `anon_vma`, which the neighbours would inherit; two parts of a text that have inherited different ones never merge
/// again, and the memory map would stay split (P5; mm/vma.c, is_mergeable_anon_vma). Mappings with different advice don't
/// merge; this advice is about reading ahead, and means nothing for a page that is there.
///
/// # Errors
/// The puppet is gone.
pub fn keep_apart(puppet: &mut Puppet, copy: TargetAddr) -> Result<(), PuppetError> {
    let arguments = [copy.0, PAGE_SIZE, libc::MADV_RANDOM as u64, 0, 0, 0];
    puppet.syscall("madvise", libc::SYS_madvise, arguments).map(drop)
}

/// Unmaps `length` bytes at `at`.
///
/// # Errors
/// The puppet is gone.
pub fn unmap(puppet: &mut Puppet, at: TargetAddr, length: u64) -> Result<(), PuppetError> {
    puppet.syscall("munmap", libc::SYS_munmap, [at.0, length, 0, 0, 0, 0]).map(drop)
}

/// Maps `length` bytes of private anonymous memory at `at`, which must be free.
///
/// # Errors
/// Something is there already (EEXIST), or memory is short.
pub fn map_at(puppet: &mut Puppet, at: TargetAddr, length: u64, protection: i32) -> Result<(), PuppetError> {
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE) as u64;
    let arguments = [at.0, length, protection as u64, flags, u64::MAX, 0];
    puppet.syscall("mmap", libc::SYS_mmap, arguments).map(drop)
}

/// Bytes of the page at `page`, as they are now.
///
/// # Errors
/// The page is not mapped.
pub fn content(memory: &Memory, page: TargetAddr) -> std::io::Result<Vec<u8>> {
    memory.bytes(page, PAGE_SIZE as usize)
}
