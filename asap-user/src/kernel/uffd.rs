//! The calls of userfaultfd(2) on its descriptor (ioctl_userfaultfd(2)), by the kernel's own definitions. In MINOR mode only: a
//! thread waits at a page that has its content. Not for making one, which a target's helper does, nor for who waits and why.

use linux_raw_sys::general as uapi;
use nix::{errno::Errno, unistd};
use std::{
    ops::Range,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};

/// What [`Uffd::handshake`] can ask for.
pub mod feature {
    use linux_raw_sys::general as uapi;

    /// It tells of children that are forked.
    pub const EVENT_FORK: u64 = uapi::UFFD_FEATURE_EVENT_FORK as u64;
    /// It follows mremap(2), and tells of it.
    pub const EVENT_REMAP: u64 = uapi::UFFD_FEATURE_EVENT_REMAP as u64;
    /// It tells which thread waits.
    pub const THREAD_ID: u64 = uapi::UFFD_FEATURE_THREAD_ID as u64;
    /// It tells the address that was accessed, not that of its page (Linux 5.18).
    pub const EXACT_ADDRESS: u64 = uapi::UFFD_FEATURE_EXACT_ADDRESS as u64;
    /// Threads wait at pages of shared memory that have their content.
    pub const MINOR_SHMEM: u64 = uapi::UFFD_FEATURE_MINOR_SHMEM as u64;
}

/// A flag of the system call: faults of the kernel itself don't wait.
pub const USER_MODE_ONLY: u64 = uapi::UFFD_USER_MODE_ONLY as u64;

// The requests carry their number and the size of what they read and write: linux/userfaultfd.h.
mod request {
    use linux_raw_sys::general as uapi;

    const TYPE: u32 = uapi::UFFDIO;
    nix::ioctl_readwrite!(api, TYPE, uapi::_UFFDIO_API, uapi::uffdio_api);
    nix::ioctl_readwrite!(register, TYPE, uapi::_UFFDIO_REGISTER, uapi::uffdio_register);
    nix::ioctl_readwrite!(fill, TYPE, uapi::_UFFDIO_CONTINUE, uapi::uffdio_continue);
    // Both only read their argument; the kernel's header calls that `_IOR`.
    nix::ioctl_read!(unregister, TYPE, uapi::_UFFDIO_UNREGISTER, uapi::uffdio_range);
    nix::ioctl_read!(wake, TYPE, uapi::_UFFDIO_WAKE, uapi::uffdio_range);
}

/// A userfaultfd.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

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
        Self(fd)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Uffd {
    /// The first call on each: what is wanted of it.
    ///
    /// # Errors
    /// The kernel does not know all of it.
    pub fn handshake(&self, features: u64) -> Result<(), Errno> {
        let mut api = uapi::uffdio_api { api: uapi::UFFD_API.into(), features, ioctls: 0 };
        // SAFETY: a live local of the type that the request reads and writes.
        unsafe { request::api(self.0.as_raw_fd(), &raw mut api) }.map(drop)
    }

    /// From now on threads wait at pages of this range of its process that are in memory, but not in the page table.
    ///
    /// # Errors
    /// Something else lies there, or another userfaultfd has it.
    pub fn register(&self, range: &Range<u64>) -> Result<(), Errno> {
        let mode = uapi::UFFDIO_REGISTER_MODE_MINOR.into();
        let mut register = uapi::uffdio_register { range: of(range), mode, ioctls: 0 };
        // SAFETY: a live local of the type that the request reads and writes.
        unsafe { request::register(self.0.as_raw_fd(), &raw mut register) }.map(drop)
    }

    /// Nobody waits in this range any more; who did goes on.
    ///
    /// # Errors
    /// The process is gone, or something else lies there.
    pub fn unregister(&self, range: &Range<u64>) -> Result<(), Errno> {
        let mut range = of(range);
        // SAFETY: a live local of the type that the request reads.
        unsafe { request::unregister(self.0.as_raw_fd(), &raw mut range) }.map(drop)
    }

    /// Those who wait in this range look again.
    ///
    /// # Errors
    /// The process is gone.
    pub fn wake(&self, range: &Range<u64>) -> Result<(), Errno> {
        let mut range = of(range);
        // SAFETY: a live local of the type that the request reads.
        unsafe { request::wake(self.0.as_raw_fd(), &raw mut range) }.map(drop)
    }

    /// Puts the pages of this range into the page table; who waits there goes on. Gives how many bytes that were: fewer than all
    /// of them, but at least a page, if the memory map is being changed.
    ///
    /// # Errors
    /// `EAGAIN`: the memory map is being changed; `EEXIST`: that was done before; `ESRCH`: the process is gone; else something
    /// else lies there.
    pub fn fill(&self, range: &Range<u64>) -> Result<u64, Errno> {
        let mut fill = uapi::uffdio_continue { range: of(range), mode: 0, mapped: 0 };
        // SAFETY: a live local of the type that the request reads and writes.
        let filled = unsafe { request::fill(self.0.as_raw_fd(), &raw mut fill) };
        match (filled, u64::try_from(fill.mapped)) {
            (Ok(_) | Err(Errno::EAGAIN), Ok(mapped)) if mapped > 0 => Ok(mapped),
            (Ok(_), _) => Err(Errno::EAGAIN),
            (Err(errno), _) => Err(errno),
        }
    }

    /// The next event; without `O_NONBLOCK` it waits for one, else there may be none.
    ///
    /// # Errors
    /// The process is gone.
    pub fn read_event(&self) -> Result<Option<Event>, Errno> {
        let mut message = [0; size_of::<uapi::uffd_msg>()];
        match unistd::read(&self.0, &mut message) {
            Ok(length) if length == message.len() => Ok(Some(event(&message))),
            Ok(_) => Err(Errno::EIO),
            Err(Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(errno),
        }
    }
}

fn of(range: &Range<u64>) -> uapi::uffdio_range {
    uapi::uffdio_range { start: range.start, len: range.end.saturating_sub(range.start) }
}

/// `struct uffd_msg`: the kind of the event is its first byte; what belongs to it follows after eight.
fn event(message: &[u8; size_of::<uapi::uffd_msg>()]) -> Event {
    let word = |at: usize| message[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
    match message[0].into() {
        uapi::UFFD_EVENT_PAGEFAULT => {
            // Flags, address, and the thread's id.
            let address = u64::from(word(20)) << 32 | u64::from(word(16));
            Event::Fault { address, thread: word(24).cast_signed() }
        }
        uapi::UFFD_EVENT_FORK => {
            // SAFETY: the kernel has just opened this descriptor for whoever reads the message.
            Event::Fork(Uffd(unsafe { OwnedFd::from_raw_fd(word(8).cast_signed()) }))
        }
        _ => Event::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use linux_raw_sys::ioctl;
    use std::mem::offset_of;

    #[test]
    fn messages_are_read_as_the_kernel_lays_them_out() {
        // Those of the fields that are named are what `event` takes them for.
        assert_eq!((offset_of!(uapi::uffd_msg, event), offset_of!(uapi::uffd_msg, arg)), (0, 8));
        let mut message = [0; size_of::<uapi::uffd_msg>()];
        message[0] = 0x12;
        message[16..24].copy_from_slice(&0x7fff_1234_5678_9000_u64.to_ne_bytes());
        message[24..28].copy_from_slice(&4711_u32.to_ne_bytes());
        let Event::Fault { address, thread } = event(&message) else { panic!("a fault") };
        assert_eq!((address, thread), (0x7fff_1234_5678_9000, 4711));
        message[0] = 0x14;
        assert!(matches!(event(&message), Event::Other));
    }

    #[test]
    fn requests_have_the_kernels_numbers() {
        use nix::{request_code_read, request_code_readwrite};
        let both = |number, size| request_code_readwrite!(uapi::UFFDIO, number, size);
        let read = |number, size| request_code_read!(uapi::UFFDIO, number, size);
        assert_eq!(both(uapi::_UFFDIO_API, size_of::<uapi::uffdio_api>()), u64::from(ioctl::UFFDIO_API));
        assert_eq!(both(uapi::_UFFDIO_REGISTER, size_of::<uapi::uffdio_register>()), u64::from(ioctl::UFFDIO_REGISTER));
        assert_eq!(both(uapi::_UFFDIO_CONTINUE, size_of::<uapi::uffdio_continue>()), u64::from(ioctl::UFFDIO_CONTINUE));
        assert_eq!(
            read(uapi::_UFFDIO_UNREGISTER, size_of::<uapi::uffdio_range>()),
            u64::from(ioctl::UFFDIO_UNREGISTER)
        );
        assert_eq!(read(uapi::_UFFDIO_WAKE, size_of::<uapi::uffdio_range>()), u64::from(ioctl::UFFDIO_WAKE));
    }
}
