//! A userfaultfd(2) of a target: made in its address space by its puppet, handed over to us. For who waits where, and what is
//! done about it, see its users: gates, which let nobody through, and curtains, which let everybody through one page at a time.
//!
//! MINOR mode only: every page has its content, so that the kernel lets waiting threads go on when we die (P1).

use super::{
    memory::Memory,
    puppet::{Puppet, PuppetError},
};
use crate::{
    address::TargetAddr,
    kernel::uffd::{self, Uffd, feature},
};
use std::{fs::File, io};

/// Why threads can't be made to wait at pages of a process.
#[derive(Debug, thiserror::Error)]
pub enum GateError {
    /// A call in the target failed.
    #[error(transparent)]
    Puppet(#[from] PuppetError),
    /// The kernel's userfaultfd can't do it.
    #[error("userfaultfd in process {pid}: {step}: {error}")]
    Userfaultfd {
        /// The process.
        pid: i32,
        /// What was tried.
        step: &'static str,
        /// The kernel's reason.
        error: io::Error,
    },
}

impl GateError {
    /// For `map_err`: what userfaultfd was asked for.
    pub(super) fn at(pid: i32, step: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| Self::Userfaultfd { pid, step, error }
    }
}

/// What becomes of the threads of a child that is forked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Forks {
    /// They wait nowhere.
    Ignore,
    /// They wait as those of the parent do; fork(2) takes until the agent has heard of the child.
    Follow,
}

/// Makes one. Also says whether faults of the kernel itself wait; otherwise they fail with EFAULT.
///
/// # Errors
/// The kernel has no userfaultfd for this process, or not its MINOR mode.
pub(super) fn open(puppet: &mut Puppet, target: i32, forks: Forks) -> Result<(Uffd, bool), GateError> {
    crate::fault::touch("touch.userfault").map_err(GateError::at(target, "userfaultfd"))?;
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64;
    // The wider form needs a capability of the target, or vm.unprivileged_userfaultfd.
    let wide = puppet.syscall("userfaultfd", libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0]);
    let covers_kernel_faults = wide.is_ok();
    let number = match wide {
        Ok(number) => number,
        Err(PuppetError::Call { .. }) => {
            let flags = flags | uffd::USER_MODE_ONLY;
            puppet.syscall("userfaultfd", libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0])?
        }
        Err(error) => return Err(error.into()),
    };
    let uffd = Uffd::from(puppet.take_fd(number)?);
    let followed = if forks == Forks::Follow { feature::EVENT_FORK | feature::EXACT_ADDRESS } else { 0 };
    let features = feature::MINOR_SHMEM | feature::THREAD_ID | feature::EVENT_REMAP | followed;
    let fail = GateError::at(target, "handshake (MINOR mode on shared memory)");
    uffd.handshake(features).map_err(|errno| fail(errno.into()))?;
    Ok((uffd, covers_kernel_faults))
}

/// Maps `length` bytes of the memfd that is open in the puppet as `in_puppet`, readable and executable: at `place`, which must be
/// free, or where the kernel chooses. Private, so that debuggers can still write to the pages through /proc/PID/mem.
///
/// # Errors
/// The kernel refuses.
pub fn map_text(
    puppet: &mut Puppet,
    in_puppet: u64,
    offset: u64,
    length: u64,
    place: Option<TargetAddr>,
) -> Result<TargetAddr, PuppetError> {
    let protection = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let fixed = if place.is_some() { libc::MAP_FIXED_NOREPLACE } else { 0 };
    let flags = (libc::MAP_PRIVATE | fixed) as u64;
    let arguments = [place.unwrap_or_default().0, length, protection, flags, in_puppet, offset];
    puppet.syscall("mmap of shared memory", libc::SYS_mmap, arguments).map(TargetAddr)
}

/// Makes a memfd(2) in the puppet, which the kernel shows by `name` (NUL-terminated), and gives its number there and our own
/// descriptor of it. `scratch` is a place in the puppet's home for the name.
pub(super) fn make_memory(
    puppet: &mut Puppet,
    memory: &Memory,
    scratch: TargetAddr,
    name: &[u8],
) -> Result<(u64, File), GateError> {
    let fail = |step| GateError::at(memory.pid(), step);
    memory.write(scratch, name).map_err(fail("writing a name"))?;
    let arguments = [scratch.0, u64::from(libc::MFD_CLOEXEC), 0, 0, 0, 0];
    let in_puppet = puppet.syscall("memfd_create", libc::SYS_memfd_create, arguments)?;
    match puppet.fd_of(in_puppet) {
        Ok(ours) => Ok((in_puppet, File::from(ours))),
        Err(error) => {
            puppet.syscall("close", libc::SYS_close, [in_puppet, 0, 0, 0, 0, 0])?;
            Err(fail("memfd")(error))
        }
    }
}
