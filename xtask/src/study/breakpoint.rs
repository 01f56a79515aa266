//! How often a function of another process is entered: hardware breakpoints, counted by the kernel (perf_event_open(2)). The
//! process is not stopped, and its code is not touched. A processor has four of them.

use anyhow::{Context, Result, ensure};
use asap::process::info;
use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
};

/// Breakpoints that a processor has.
pub const MOST: usize = 4;

/// PERF_TYPE_BREAKPOINT, HW_BREAKPOINT_X (linux/perf_event.h, linux/hw_breakpoint.h).
const TYPE: u32 = 5;
const EXECUTE: u32 = 4;
/// PERF_ATTR_SIZE_VER1: the first that has the breakpoint's fields.
const SIZE: usize = 72;
/// `inherit`, `exclude_kernel`, `exclude_hv` among the flags.
const FLAGS: u64 = 1 << 1 | 1 << 5 | 1 << 6;
/// PERF_FLAG_FD_CLOEXEC.
const CLOSE_ON_EXEC: libc::c_ulong = 8;

/// Counts the entries of one function in some processes, and in those that they fork.
#[derive(Debug)]
pub struct Counter {
    events: Vec<OwnedFd>,
}

impl Counter {
    /// Begins to count, in all threads that there are; each process with the address that the function has in it.
    pub fn of(places: &[(i32, u64)]) -> Result<Self> {
        let mut events = Vec::new();
        for &(pid, address) in places {
            for tid in info::threads(pid).unwrap_or_default() {
                match open(tid, address) {
                    Ok(event) => events.push(event),
                    // A thread may end meanwhile.
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                    Err(error) => return Err(error).context("a hardware breakpoint can't be set"),
                }
            }
        }
        ensure!(!events.is_empty(), "no thread to count in");
        Ok(Self { events })
    }

    /// How often it was entered so far.
    pub fn count(&self) -> Result<u64> {
        let mut sum = 0;
        for event in &self.events {
            let mut count = [0; 8];
            // SAFETY: the buffer has the length that is given.
            let read = unsafe { libc::read(event.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
            ensure!(read == 8, "a counter can't be read: {}", io::Error::last_os_error());
            sum += u64::from_ne_bytes(count);
        }
        Ok(sum)
    }
}

fn open(tid: i32, address: u64) -> io::Result<OwnedFd> {
    let mut attributes = [0_u8; SIZE];
    attributes[0..4].copy_from_slice(&TYPE.to_ne_bytes());
    attributes[4..8].copy_from_slice(&(SIZE as u32).to_ne_bytes());
    attributes[40..48].copy_from_slice(&FLAGS.to_ne_bytes());
    attributes[52..56].copy_from_slice(&EXECUTE.to_ne_bytes());
    attributes[56..64].copy_from_slice(&address.to_ne_bytes());
    // The length of an execution breakpoint is that of a long.
    attributes[64..72].copy_from_slice(&8_u64.to_ne_bytes());
    let no_group: libc::c_int = -1;
    // SAFETY: the attributes say their length, and live longer than the call.
    let event =
        unsafe { libc::syscall(libc::SYS_perf_event_open, attributes.as_ptr(), tid, -1, no_group, CLOSE_ON_EXEC) };
    match i32::try_from(event) {
        // SAFETY: the kernel has just given it to us.
        Ok(event) if event >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(event) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(never)]
    fn counted() {
        std::hint::black_box(());
    }

    #[test]
    fn entries_are_counted() {
        let counter = Counter::of(&[(std::process::id() as i32, counted as *const () as u64)]);
        let Ok(counter) = counter else {
            eprintln!("SKIPPED: no hardware breakpoints here: {counter:?}");
            return;
        };
        for _ in 0..7 {
            std::hint::black_box(counted as fn())();
        }
        assert_eq!(counter.count().expect("a count"), 7);
    }
}
