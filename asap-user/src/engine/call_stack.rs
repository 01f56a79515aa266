//! A stack, in the target, for functions that the puppet calls. The ledger says where it is: should we die during a call, which
//! runs on to its end, the next agent unmaps it. One process has one at most, for as many calls as need it.

use super::ledger::{Ledger, LedgerBook, Span};
use crate::{
    address::TargetAddr,
    process::{
        maps::Maps,
        memory::Memory,
        pages,
        puppet::{Puppet, PuppetError},
    },
};
use std::io;

/// Bytes.
const LENGTH: u64 = 256 * 1024;
/// How often another place is tried, should the target map something there first.
const TRIES: usize = 8;

/// Where a call begins to push.
#[must_use]
pub fn top(stack: Span) -> TargetAddr {
    stack.end.offset(-64)
}

/// The stack that is there, else a new one.
///
/// # Errors
/// The process is gone, or has no room.
pub fn provide(puppet: &mut Puppet, book: &mut LedgerBook, memory: &Memory) -> Result<Span, PuppetError> {
    if let Some(stack) = book.ledger.call_stack {
        return Ok(stack);
    }
    let pid = memory.pid();
    let failed = |error| PuppetError::Call { pid, call: "mapping a stack", error };
    let home = book.home();
    let mut taken = io::Error::other("no try was made");
    for _ in 0..TRIES {
        // With a page free on both sides: the kernel must not make one mapping of it and a neighbour.
        let start = Maps::of(pid).map_err(failed)?.gap(&(home..home), LENGTH, 1 << 46);
        let start = start.ok_or_else(|| failed(io::Error::other("the address space has no room")))?;
        let stack = Span { start, end: start.offset(LENGTH as i64) };
        note(book, memory, |ledger| ledger.call_stack = Some(stack))?;
        crate::fault::point("call.stack-recorded");
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
        let protection = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        let arguments = [start.0, LENGTH, protection, flags as u64, u64::MAX, 0];
        match puppet.syscall("mmap", libc::SYS_mmap, arguments) {
            Ok(_) => {
                crate::fault::point("call.stack-mapped");
                return Ok(stack);
            }
            Err(error) => {
                note(book, memory, |ledger| ledger.call_stack = None)?;
                match error {
                    PuppetError::Call { error, .. } if error.raw_os_error() == Some(libc::EEXIST) => taken = error,
                    other => return Err(other),
                }
            }
        }
    }
    Err(failed(taken))
}

/// Unmaps it, if there is one.
///
/// # Errors
/// The process is gone.
pub fn remove(puppet: &mut Puppet, book: &mut LedgerBook, memory: &Memory) -> Result<(), PuppetError> {
    let Some(stack) = book.ledger.call_stack else { return Ok(()) };
    let _ = pages::unmap(puppet, stack.start, stack.len());
    crate::fault::point("call.stack-unmapped");
    note(book, memory, |ledger| ledger.call_stack = None)
}

/// After a dead agent: removes what it has mapped. What is recorded may not be there yet, or any more.
///
/// # Errors
/// The process is gone.
pub fn remove_remains(puppet: &mut Puppet, book: &mut LedgerBook, memory: &Memory) -> Result<(), PuppetError> {
    let Some(stack) = book.ledger.call_stack else { return Ok(()) };
    let pid = memory.pid();
    let maps = Maps::of(pid).map_err(|error| PuppetError::Call { pid, call: "reading its mappings", error })?;
    let is_ours =
        maps.at(stack.start).is_some_and(|m| m.range == stack.range() && m.inode == 0 && m.writable && !m.shared);
    if is_ours { remove(puppet, book, memory) } else { note(book, memory, |ledger| ledger.call_stack = None) }
}

fn note(book: &mut LedgerBook, memory: &Memory, change: impl FnOnce(&mut Ledger)) -> Result<(), PuppetError> {
    let failed = |error| PuppetError::Call { pid: memory.pid(), call: "ledger", error: io::Error::other(error) };
    book.update(memory, change).map_err(failed)
}
