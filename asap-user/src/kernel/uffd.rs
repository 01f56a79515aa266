//! A userfaultfd(2) by its descriptor, by way of the crate of that name: in MINOR mode only, in which a thread waits at a page that has
//! its content. Not for making one, which a target's helper does, nor for who waits and why.

use nix::errno::Errno;
use std::{
    ffi::c_void,
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd},
};
use userfaultfd::{Error, RegisterMode};

/// What [`Uffd::handshake`] can ask for (linux/userfaultfd.h).
pub mod feature {
    /// It tells of children that are forked.
    pub const EVENT_FORK: u64 = 1 << 1;
    /// It follows mremap(2), and tells of it.
    pub const EVENT_REMAP: u64 = 1 << 2;
    /// It tells which thread waits.
    pub const THREAD_ID: u64 = 1 << 8;
    /// Threads wait at pages of shared memory that have their content.
    pub const MINOR_SHMEM: u64 = 1 << 10;
    /// It tells the address that was accessed, not that of its page (Linux 5.18).
    pub const EXACT_ADDRESS: u64 = 1 << 11;
}

/// A flag of the system call: faults of the kernel itself don't wait.
pub const USER_MODE_ONLY: u64 = 1;
/// `UFFD_API` (linux/userfaultfd.h).
const API: u64 = 0xaa;

/// `struct uffdio_api`. The crate makes this call only for descriptors that it has opened itself.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

mod request {
    nix::ioctl_readwrite!(api, super::API, 0x3f, super::UffdioApi);
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd(userfaultfd::Uffd);

/// What a userfaultfd tells.
#[derive(Debug)]
pub enum Event {
    /// A thread waits.
    Fault {
        /// Where it came to.
        address: u64,
        /// Its id, as the reader's pid namespace knows it; with [`feature::THREAD_ID`].
        thread: i32,
    },
    /// A child was forked, with the same registrations.
    Fork(Uffd),
    /// The memory map has changed.
    Other,
}

impl From<OwnedFd> for Uffd {
    fn from(fd: OwnedFd) -> Self {
        // SAFETY: it is owned here, and handed over.
        Self(unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) })
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The crate has a `nix` of its own.
fn errno(error: Error) -> Errno {
    match error {
        Error::SystemError(errno) => Errno::from_raw(errno as i32),
        Error::PartiallyCopied(_) => Errno::EAGAIN,
        _ => Errno::EIO,
    }
}

fn length(range: &Range<u64>) -> usize {
    range.end.saturating_sub(range.start) as usize
}

impl Uffd {
    /// The first call on each: what is wanted of it.
    ///
    /// # Errors
    /// The kernel does not know all of it.
    pub fn handshake(&self, features: u64) -> Result<(), Errno> {
        let mut api = UffdioApi { api: API, features, ioctls: 0 };
        // SAFETY: a live local of the layout that the request reads and writes.
        unsafe { request::api(self.0.as_raw_fd(), &raw mut api) }.map(drop)
    }

    /// From now on threads wait at pages of this range of its process that are in memory, but not in the page table.
    ///
    /// # Errors
    /// Something else lies there, or another userfaultfd has it.
    pub fn register(&self, range: &Range<u64>) -> Result<(), Errno> {
        let start = range.start as *mut c_void;
        self.0.register_with_mode(start, length(range), RegisterMode::MINOR).map(drop).map_err(errno)
    }

    /// Nobody waits in this range any more; who did goes on.
    ///
    /// # Errors
    /// The process is gone, or something else lies there.
    pub fn unregister(&self, range: &Range<u64>) -> Result<(), Errno> {
        self.0.unregister(range.start as *mut c_void, length(range)).map_err(errno)
    }

    /// Those who wait in this range look again.
    ///
    /// # Errors
    /// The process is gone.
    pub fn wake(&self, range: &Range<u64>) -> Result<(), Errno> {
        self.0.wake(range.start as *mut c_void, length(range)).map_err(errno)
    }

    /// Puts the pages of this range into the page table; who waits there goes on. Gives how many bytes that were.
    ///
    /// # Errors
    /// `EAGAIN`: the memory map is being changed; `EEXIST`: that was done before; `ESRCH`: the process is gone; else something
    /// else lies there.
    pub fn fill(&self, range: &Range<u64>) -> Result<u64, Errno> {
        match self.0.r#continue(range.start as *mut c_void, length(range), true) {
            Ok(filled) if filled > 0 => Ok(filled),
            Ok(_) => Err(Errno::EAGAIN),
            Err(error) => Err(errno(error)),
        }
    }

    /// The next event; without `O_NONBLOCK` it waits for one, else there may be none.
    ///
    /// # Errors
    /// The process is gone.
    pub fn read_event(&self) -> Result<Option<Event>, Errno> {
        Ok(self.0.read_event().map_err(errno)?.map(|event| match event {
            userfaultfd::Event::Pagefault { addr, thread_id, .. } => {
                Event::Fault { address: addr as u64, thread: thread_id.as_raw() }
            }
            userfaultfd::Event::Fork { uffd } => Event::Fork(Self(uffd)),
            _ => Event::Other,
        }))
    }
}
