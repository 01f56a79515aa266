//! Which mechanisms work here: each is tried, on ourselves or on a child made for it, and never judged by the kernel's version.
//! Without root most are told as missing, with the reason.

use super::{
    Ebpf, KernelError, redirect,
    uffd::{self, Uffd, feature},
};
use serde::Serialize;
use std::{
    ffi::CStr,
    fs, io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
};

/// One mechanism.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Feature {
    /// Its name.
    pub name: &'static str,
    /// It was tried and worked.
    pub available: bool,
    /// What was seen.
    pub detail: String,
    /// What asap uses it for.
    pub gives: &'static str,
    /// What the administrator can do where it is missing.
    pub how_to_get: &'static str,
}

/// Name, use, way out, and the trial, which tells what it saw.
type Trial = (&'static str, &'static str, &'static str, fn() -> Result<String, String>);

const TRIALS: [Trial; 11] = [
    ("capabilities", "the right to read and change other processes", "run asap as root", capabilities),
    (
        "ptrace",
        "attach, and stack walks of running threads",
        "run as root; kernel.yama.ptrace_scope must be below 3 (which only a reboot changes)",
        ptrace,
    ),
    (
        "seccomp suspend",
        "targets that are confined by seccomp",
        "run as root, not itself under seccomp (containers: --security-opt seccomp=unconfined); CONFIG_CHECKPOINT_RESTORE",
        suspend_seccomp,
    ),
    ("pidfd", "to notice the end of a target, and to take its descriptors", "Linux 5.6", pidfd),
    (
        "userfaultfd",
        "gates: threads wait at a function instead of being stopped",
        "Linux 5.14 with CONFIG_USERFAULTFD; run as root, or set vm.unprivileged_userfaultfd=1",
        userfaultfd,
    ),
    (
        "page exchange",
        "patches without a write to running code (mremap with MREMAP_DONTUNMAP on files)",
        "Linux 5.13",
        page_exchange,
    ),
    ("membarrier", "CPUs that see new code at once (SYNC_CORE)", "Linux 4.16 with CONFIG_MEMBARRIER", membarrier),
    (
        "names of memory",
        "asap's memory shown by name in /proc/PID/maps",
        "Linux 5.17 with CONFIG_ANON_VMA_NAME; asap works without",
        memory_names,
    ),
    ("lockdown", "eBPF programs that read kernel structures", "boot with lockdown=integrity or none", lockdown),
    (
        "task iterator",
        "stacks of sleeping threads, told without stopping them",
        "Linux 6.1 with CONFIG_DEBUG_INFO_BTF; run as root",
        task_iterator,
    ),
    (
        "redirect",
        "--mechanism redirect: functions replaced without a byte of ours at their entry",
        "a kernel that lets uprobe programs write registers (7.2 does); asap works without",
        redirect_program,
    ),
];

/// Tries all mechanisms. Takes some tenths of a second, and affects nobody but this process and a child of its own.
#[must_use]
pub fn features() -> Vec<Feature> {
    let mut found: Vec<Feature> =
        TRIALS.iter().map(|&(name, gives, how_to_get, trial)| feature(name, gives, how_to_get, trial())).collect();
    let ebpf = Ebpf::load().map_err(|error| error.to_string());
    let life = ebpf.and_then(|ebpf| ebpf.life_cycles().map_err(|error| error.to_string()));
    found.push(feature(
        "process life cycle",
        "children of a target patched before they run their first instruction",
        "CONFIG_BPF_EVENTS; run as root",
        life.map(|_| "watches fork, exec and exit".to_owned()),
    ));
    found
}

fn feature(
    name: &'static str,
    gives: &'static str,
    how_to_get: &'static str,
    result: Result<String, String>,
) -> Feature {
    let available = result.is_ok();
    Feature { name, available, detail: result.unwrap_or_else(|error| error), gives, how_to_get }
}

/// What the last system call complained about.
fn complaint(what: &str) -> String {
    format!("{what}: {}", io::Error::last_os_error())
}

fn capabilities() -> Result<String, String> {
    /// Numbers of include/uapi/linux/capability.h.
    const NEEDED: [(u32, &str); 3] = [(19, "CAP_SYS_PTRACE"), (21, "CAP_SYS_ADMIN"), (5, "CAP_KILL")];
    let status = fs::read_to_string("/proc/self/status").map_err(|error| format!("/proc/self/status: {error}"))?;
    let held = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .ok_or("/proc/self/status names no capabilities")?;
    let missing: Vec<_> =
        NEEDED.iter().filter(|(number, _)| held & (1 << number) == 0).map(|(_, name)| *name).collect();
    if missing.is_empty() { Ok(format!("{held:x}")) } else { Err(format!("missing: {}", missing.join(", "))) }
}

/// A child that does nothing, killed and reaped when dropped.
struct Idle(libc::pid_t);

impl Idle {
    fn start() -> Result<Self, String> {
        // SAFETY: the child calls nothing but pause and _exit, which are allowed after a fork of a process with threads.
        match unsafe { libc::fork() } {
            -1 => Err(complaint("fork")),
            0 => loop {
                // SAFETY: no memory is involved. It must not outlive a killed parent.
                unsafe {
                    libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                    libc::pause();
                }
            },
            child => Ok(Self(child)),
        }
    }

    fn seize(options: libc::c_int) -> Result<(), String> {
        let child = Self::start()?;
        let none = ptr::null_mut::<libc::c_void>();
        // SAFETY: PTRACE_SEIZE takes numbers only; the child is ours.
        if unsafe { libc::ptrace(libc::PTRACE_SEIZE, child.0, none, options as usize) } < 0 {
            return Err(complaint("PTRACE_SEIZE of a child"));
        }
        Ok(())
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        // SAFETY: a child of ours that nobody else waits for.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, ptr::null_mut(), libc::__WALL);
        }
    }
}

fn ptrace() -> Result<String, String> {
    let scope = fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").ok();
    // Yama lets a parent trace its child at 1 and 2, too; at 2 tracing others needs the capability, which is asked for above.
    Idle::seize(0)?;
    Ok(scope.map_or("not restricted by Yama".to_owned(), |scope| format!("kernel.yama.ptrace_scope={}", scope.trim())))
}

fn suspend_seccomp() -> Result<String, String> {
    Idle::seize(libc::PTRACE_O_SUSPEND_SECCOMP).map(|()| "a tracer may suspend seccomp filters".to_owned())
}

/// Takes the result of a system call that returns a descriptor.
fn descriptor(result: libc::c_long, what: &str) -> Result<OwnedFd, String> {
    match i32::try_from(result) {
        // SAFETY: a new descriptor that nobody else knows.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(complaint(what)),
    }
}

fn pidfd() -> Result<String, String> {
    // SAFETY: numbers only.
    let own = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
    let own = descriptor(own, "pidfd_open")?;
    // SAFETY: numbers only.
    let copy = unsafe { libc::syscall(libc::SYS_pidfd_getfd, own.as_raw_fd(), own.as_raw_fd(), 0) };
    descriptor(copy, "pidfd_getfd")?;
    Ok("pidfd_open, pidfd_getfd".to_owned())
}

/// A mapping of ours, unmapped when dropped.
struct Mapping(*mut libc::c_void, usize);

impl Mapping {
    fn new(length: usize, protection: i32, flags: i32, file: Option<&OwnedFd>) -> Result<Self, String> {
        let fd = file.map_or(-1, AsRawFd::as_raw_fd);
        // SAFETY: a new mapping at a place that the kernel chooses.
        let at = unsafe { libc::mmap(ptr::null_mut(), length, protection, flags, fd, 0) };
        if at == libc::MAP_FAILED { Err(complaint("mmap")) } else { Ok(Self(at, length)) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: made here, used by nobody else.
        unsafe { libc::munmap(self.0, self.1) };
    }
}

fn page_exchange() -> Result<String, String> {
    let program: OwnedFd = fs::File::open("/proc/self/exe").map_err(|error| format!("/proc/self/exe: {error}"))?.into();
    let page = 4096;
    let from = Mapping::new(page, libc::PROT_READ, libc::MAP_PRIVATE, Some(&program))?;
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_DONTUNMAP;
    // SAFETY: moves a mapping that only we know, to a place that the kernel chooses.
    let to = unsafe { libc::mremap(from.0, page, page, flags, ptr::null_mut::<libc::c_void>()) };
    if to == libc::MAP_FAILED {
        return Err(complaint("mremap with MREMAP_DONTUNMAP of a file's page"));
    }
    drop(Mapping(to, page));
    Ok("mremap moves pages of files and leaves the mapping".to_owned())
}

fn membarrier() -> Result<String, String> {
    // SAFETY: numbers only.
    let commands = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_QUERY, 0, 0) };
    if commands < 0 {
        return Err(complaint("membarrier"));
    }
    if commands & i64::from(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE) == 0 {
        return Err("membarrier knows no SYNC_CORE".to_owned());
    }
    Ok("membarrier knows SYNC_CORE".to_owned())
}

fn memory_names() -> Result<String, String> {
    const SET_VMA: libc::c_int = 0x5356_4d41;
    const ANONYMOUS_NAME: libc::c_ulong = 0;
    let name: &CStr = c"asap trial";
    let memory = Mapping::new(4096, libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, None)?;
    // SAFETY: names a mapping of ours; the name outlives the call.
    let result = unsafe { libc::prctl(SET_VMA, ANONYMOUS_NAME, memory.0, memory.1, name.as_ptr()) };
    if result < 0 {
        return Err(complaint("PR_SET_VMA_ANON_NAME"));
    }
    Ok("the kernel names anonymous memory".to_owned())
}

fn lockdown() -> Result<String, String> {
    let Ok(text) = fs::read_to_string("/sys/kernel/security/lockdown") else {
        return Ok("no lockdown, or not to be seen".to_owned());
    };
    let mode = text.split(['[', ']']).nth(1).unwrap_or("unknown");
    // At "integrity" programs may still read.
    if mode == "confidentiality" {
        Err("kernel lockdown: confidentiality".to_owned())
    } else {
        Ok(format!("kernel lockdown: {mode}"))
    }
}

fn userfaultfd() -> Result<String, String> {
    let open = |flags: libc::c_int| {
        // SAFETY: numbers only.
        descriptor(
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | flags) },
            "userfaultfd",
        )
    };
    let (fd, kernel_faults) = match open(0) {
        Ok(fd) => (fd, true),
        Err(_) => (open(uffd::USER_MODE_ONLY as libc::c_int)?, false),
    };
    let uffd = Uffd::from(fd);
    uffd.handshake(feature::MINOR_SHMEM | feature::THREAD_ID | feature::EVENT_FORK | feature::EVENT_REMAP)
        .map_err(|errno| format!("UFFDIO_API with MINOR_SHMEM, THREAD_ID, EVENT_FORK, EVENT_REMAP: {errno}"))?;
    // SAFETY: a name that outlives the call.
    let memory = unsafe { libc::memfd_create(c"asap trial".as_ptr(), libc::MFD_CLOEXEC) };
    let memory = descriptor(memory.into(), "memfd_create")?;
    // SAFETY: numbers only.
    if unsafe { libc::ftruncate(memory.as_raw_fd(), 4096) } < 0 {
        return Err(complaint("ftruncate of a memfd"));
    }
    let page = Mapping::new(4096, libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE, Some(&memory))?;
    let start = page.0 as u64;
    uffd.register(&(start..start + page.1 as u64))
        .map_err(|errno| format!("UFFDIO_REGISTER in MINOR mode: {errno}"))?;
    Ok(format!(
        "MINOR mode; faults of the kernel itself: {}",
        if kernel_faults { "yes" } else { "no, they fail with EFAULT" }
    ))
}

fn said(error: &KernelError) -> String {
    error.to_string()
}

fn task_iterator() -> Result<String, String> {
    let ebpf = Ebpf::load().map_err(|error| said(&error))?;
    let own = std::process::id() as i32;
    let threads = ebpf.snapshot(own, 0, None).map_err(|error| said(&error))?.tasks;
    if threads.is_empty() {
        return Err("it does not see this process".to_owned());
    }
    Ok(format!("sees this process with {} threads", threads.len()))
}

fn redirect_program() -> Result<String, String> {
    redirect::available().map(|()| "uprobe programs may write registers".to_owned()).map_err(|error| said(&error))
}
