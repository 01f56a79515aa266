//! From a bare kernel to a system that tests can live in.

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::resource::{Resource, setrlimit},
};
use std::{
    ffi::CString,
    fs,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::fs::symlink,
    },
};
use vm_tests::protocol::GUEST;

/// Type, place, options; the last word: whether a kernel may be without.
const MOUNTS: [(&str, &str, &str, bool); 12] = [
    ("proc", "/proc", "", false),
    ("sysfs", "/sys", "", false),
    ("devtmpfs", "/dev", "", false),
    ("devpts", "/dev/pts", "mode=620,ptmxmode=666", false),
    ("tmpfs", "/dev/shm", "mode=1777", false),
    ("tmpfs", "/run", "mode=755", false),
    ("tmpfs", "/tmp", "mode=1777", false),
    ("cgroup2", "/sys/fs/cgroup", "", false),
    ("securityfs", "/sys/kernel/security", "", true),
    ("debugfs", "/sys/kernel/debug", "", true),
    ("tracefs", "/sys/kernel/tracing", "", true),
    ("bpf", "/sys/fs/bpf", "mode=700", true),
];

/// Modules, in loading order.
const MODULES: &str = "/modules";

/// Mounts, loads, sets up.
pub fn up() -> Result<()> {
    for (kind, place, options, may_lack) in MOUNTS {
        let _ = fs::create_dir(place);
        let done = mount(Some(kind), place, Some(kind), MsFlags::empty(), Some(options));
        match done {
            Ok(()) | Err(Errno::EBUSY) => (),
            Err(_) if may_lack => println!("asap-vm-guest: no {kind} here"),
            Err(error) => return Err(error).with_context(|| format!("{kind} at {place}")),
        }
    }
    for (link, to) in [("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0"), ("stdout", "/proc/self/fd/1")] {
        let _ = symlink(to, format!("/dev/{link}"));
    }
    load_modules()?;
    loopback().context("the loopback interface")?;
    // As service managers set it.
    setrlimit(Resource::RLIMIT_NOFILE, 1024, 524_288)?;
    setrlimit(Resource::RLIMIT_CORE, 0, nix::libc::RLIM_INFINITY)?;
    nix::unistd::sethostname("guest")?;
    // SAFETY: there is one thread yet.
    unsafe {
        std::env::set_var("PATH", "/usr/bin:/usr/sbin");
        std::env::set_var("HOME", "/root");
        std::env::set_var("TMPDIR", format!("{GUEST}/tmp"));
    }
    Ok(())
}

fn load_modules() -> Result<()> {
    let mut modules: Vec<_> = fs::read_dir(MODULES).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    modules.sort();
    for module in modules {
        let bytes = fs::read(&module)?;
        let none = CString::default();
        // SAFETY: the module's bytes and an empty text are read, for the length that is given.
        let done =
            unsafe { nix::libc::syscall(nix::libc::SYS_init_module, bytes.as_ptr(), bytes.len(), none.as_ptr()) };
        match Errno::result(done) {
            Ok(_) | Err(Errno::EEXIST) => (),
            Err(error) => return Err(error).with_context(|| format!("{}", module.display())),
        }
    }
    Ok(())
}

fn loopback() -> Result<()> {
    // SAFETY: no memory is involved.
    let socket = Errno::result(unsafe { nix::libc::socket(nix::libc::AF_INET, nix::libc::SOCK_DGRAM, 0) })?;
    // SAFETY: nobody else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: zeros are a valid value of this plain structure.
    let mut request: nix::libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as nix::libc::c_char;
    }
    request.ifr_ifru.ifru_flags = nix::libc::IFF_UP as nix::libc::c_short;
    // SAFETY: the request is valid, and lives until the call returns.
    Errno::result(unsafe { nix::libc::ioctl(socket.as_raw_fd(), nix::libc::SIOCSIFFLAGS, &raw const request) })?;
    Ok(())
}

/// Ends the machine.
pub fn power_off() {
    nix::unistd::sync();
    let Err(error) = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
    println!("asap-vm-guest: {error}");
}
