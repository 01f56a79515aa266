//! A userfaultfd(2) of a target: made in its address space by its puppet, handed over to us. For who waits where, and what is
//! done about it, see its users: gates, which let nobody through, and curtains, which let everybody through one page at a time.
//!
//! MINOR mode only: every page has its content, so that the kernel lets waiting threads go on when we die (P1).

use super::puppet::{Puppet, PuppetError};
use crate::{
    address::TargetAddr,
    kernel::uffd::{self, Uffd, feature},
};
use std::io;

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
    let children = if forks == Forks::Follow { feature::EVENT_FORK } else { 0 };
    let features = feature::MINOR_SHMEM | feature::THREAD_ID | feature::EVENT_REMAP | children;
    let fail = GateError::at(target, "handshake (MINOR mode on shared memory)");
    uffd.handshake(features).map_err(|errno| fail(errno.into()))?;
    Ok((uffd, covers_kernel_faults))
}

/// Maps `length` bytes of the memfd that is open in the puppet as `in_puppet` at a place of the kernel's choice, readable and
/// executable. Private, so that debuggers can still write to the pages through /proc/PID/mem.
pub(super) fn map_text(
    puppet: &mut Puppet,
    in_puppet: u64,
    offset: u64,
    length: u64,
) -> Result<TargetAddr, PuppetError> {
    let protection = (libc::PROT_READ | libc::PROT_EXEC) as u64;
    let arguments = [0, length, protection, libc::MAP_PRIVATE as u64, in_puppet, offset];
    puppet.syscall("mmap of shared memory", libc::SYS_mmap, arguments).map(TargetAddr)
}
