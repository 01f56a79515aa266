//! What the agent gives up at its start: capabilities that it does not need, ways to get them back, core files that would hold
//! memory of targets, and memory that is writable and then executable. `docs/security.md` says why not more: a process under
//! seccomp may not suspend the filters of its targets, and one under Landlock may trace nobody outside of its domain.

use nix::sys::resource::{Resource, setrlimit};
use std::io;

/// Capabilities that stay, by number (linux/capability.h), with what for.
const KEPT: [u32; 10] = [
    1,  // CAP_DAC_OVERRIDE: move the helper out of the target's control group
    2,  // CAP_DAC_READ_SEARCH: files and /proc of other users' processes
    5,  // CAP_KILL: end a helper, which belongs to the target's user
    19, // CAP_SYS_PTRACE: ptrace, /proc/PID/mem
    21, // CAP_SYS_ADMIN: suspend seccomp (PTRACE_O_SUSPEND_SECCOMP), map_files and eBPF before Linux 5.9
    23, // CAP_SYS_NICE: go first while threads wait
    24, // CAP_SYS_RESOURCE: descriptors for targets of many threads
    38, // CAP_PERFMON: eBPF programs at tracepoints
    39, // CAP_BPF: eBPF
    40, // CAP_CHECKPOINT_RESTORE: /proc/PID/map_files
];
/// More than there are.
const HIGHEST: u32 = 63;

/// A set of capabilities of the 64 that the kernel's interface knows.
const fn mask() -> u64 {
    let mut mask = 0;
    let mut index = 0;
    while index < KEPT.len() {
        mask |= 1 << KEPT[index];
        index += 1;
    }
    mask
}

/// As the kernel takes it (capset(2), _LINUX_CAPABILITY_VERSION_3).
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Sets {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

const VERSION: u32 = 0x2008_0522;

/// Gives up what is not needed. To be called while this is the only thread: capabilities belong to threads.
///
/// # Errors
/// The kernel refuses; what was given up already stays so.
pub fn confine() -> io::Result<()> {
    let unneeded = (0..=HIGHEST).filter(|capability| !KEPT.contains(capability));
    for capability in unneeded {
        // Beyond the last one the kernel knows: EINVAL. Without the right to: EPERM, and then there is nothing to be had.
        // SAFETY: a plain system call.
        unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
    }
    let mut header = Header { version: VERSION, pid: 0 };
    let mut sets = [Sets::default(); 2];
    // SAFETY: both structures are as the kernel wants them for this version, and live until it returns.
    check(unsafe { libc::syscall(libc::SYS_capget, &raw mut header, sets.as_mut_ptr()) })?;
    for (index, set) in sets.iter_mut().enumerate() {
        let kept = (mask() >> (32 * index)) as u32;
        let permitted = set.permitted & kept;
        *set = Sets { effective: permitted, permitted, inheritable: 0 };
    }
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw mut header, sets.as_ptr()) })?;
    // SAFETY: plain system calls.
    unsafe {
        libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
        check(i64::from(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))?;
        // Linux 6.3 and later: nothing that was writable becomes executable.
        libc::prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0);
        libc::umask(0o077);
    }
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(io::Error::from)
}

/// linux/prctl.h.
const PR_SET_MDWE: i32 = 65;
const PR_MDWE_REFUSE_EXEC_GAIN: u64 = 1;

fn check(result: i64) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
