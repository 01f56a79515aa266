//! bpf(2) as far as aya has no words for it: loading a program with any attach type, links of several kinds, iterators.

use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

const BPF_MAP_UPDATE: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_ITER_CREATE: libc::c_int = 33;

/// Program types and attach types of include/uapi/linux/bpf.h that are used here.
pub const PROGRAM_UPROBE: u32 = 2;
pub const PROGRAM_RAW_TRACEPOINT: u32 = 17;
pub const PROGRAM_TRACING: u32 = 26;
pub const ATTACH_ITERATOR: u32 = 28;
pub const ATTACH_UPROBE_MULTI: u32 = 48;
pub const FLAG_SLEEPABLE: u32 = 1 << 4;

/// Calls bpf(2) with a command's part of `union bpf_attr`. The kernel takes what is missing as zeros.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<i64> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes of a plain structure that outlives the call; pointers in it are made
    // from borrows that do, too.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// As `bpf`, for commands that return a file descriptor.
fn bpf_fd<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    let fd = bpf(command, attributes)?;
    let fd = i32::try_from(fd).map_err(|_| io::Error::other("the kernel returned no file descriptor"))?;
    // SAFETY: a new file descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Kernels before 5.11 count maps as locked memory.
pub fn raise_memlock() {
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: reads the structure only. Without the right to do it, map creation tells what is missing.
    unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &unlimited) };
}

/// Stores a value into a map.
pub fn update_map<K: Copy, V: Copy>(map: BorrowedFd<'_>, key: &K, value: &V) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        map: u32,
        reserved: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    bpf(
        BPF_MAP_UPDATE,
        &Attributes {
            map: map.as_raw_fd() as u32,
            reserved: 0,
            key: std::ptr::from_ref(key) as u64,
            value: std::ptr::from_ref(value) as u64,
            flags: 0,
        },
    )
    .map(drop)
}

#[repr(C)]
struct PinAttributes {
    path: u64,
    object: u32,
    flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}

/// Gives a map, program or link a name in a BPF file system, which holds it.
pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let attributes = PinAttributes { path: path.as_ptr() as u64, object: object.as_raw_fd() as u32, flags: 0 };
    bpf(BPF_OBJ_PIN, &attributes).map(drop)
}

/// Opens what was pinned.
pub fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    bpf_fd(BPF_OBJ_GET, &PinAttributes { path: path.as_ptr() as u64, object: 0, flags: 0 })
}

/// What a program is loaded as.
#[derive(Clone, Copy, Debug, Default)]
pub struct ProgramType {
    pub kind: u32,
    pub attach: u32,
    pub flags: u32,
    /// BTF id of the kernel function it belongs to.
    pub target: u32,
}

#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    attach: u32,
    btf: u32,
    function_info_size: u32,
    function_info: u64,
    function_info_count: u32,
    line_info_size: u32,
    line_info: u64,
    line_info_count: u32,
    target: u32,
}

/// Loads a program; on refusal the verifier's last words come along.
pub fn load_program(
    name: &str,
    license: &CStr,
    instructions: &[aya_obj::generated::bpf_insn],
    what: ProgramType,
) -> Result<OwnedFd, (io::Error, String)> {
    let mut attributes = LoadAttributes {
        kind: what.kind,
        instruction_count: u32::try_from(instructions.len()).unwrap_or(u32::MAX),
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        flags: what.flags,
        attach: what.attach,
        target: what.target,
        ..LoadAttributes::default()
    };
    let room = attributes.name.len() - 1;
    for (to, from) in attributes.name[..room].iter_mut().zip(name.bytes()) {
        *to = from;
    }
    // Without a log first: it costs time, and a log that is too small fails the load.
    let error = match bpf_fd(BPF_PROG_LOAD, &attributes) {
        Ok(program) => return Ok(program),
        Err(error) => error,
    };
    let mut log = vec![0_u8; 256 * 1024];
    attributes.log_level = 1;
    attributes.log_size = log.len() as u32;
    attributes.log = log.as_mut_ptr() as u64;
    let _ = bpf_fd(BPF_PROG_LOAD, &attributes);
    let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
    let text = String::from_utf8_lossy(&log[..end]);
    Err((error, last_words(&text)))
}

/// The line of a verifier log that says why.
fn last_words(log: &str) -> String {
    let statistics = ["processed ", "verification time", "stack depth"];
    let line = log.lines().rev().find(|line| !line.is_empty() && !statistics.iter().any(|s| line.starts_with(s)));
    line.unwrap_or_default().to_owned()
}

#[repr(C)]
#[derive(Default)]
struct IteratorLink {
    program: u32,
    target: u32,
    attach: u32,
    flags: u32,
    info: u64,
    info_size: u32,
    reserved: u32,
}

/// `union bpf_iter_link_info`, the part for tasks.
#[repr(C)]
struct TaskFilter {
    tid: u32,
    pid: u32,
    pid_fd: u32,
}

/// Links an iterator over the threads of one process, and opens it.
pub fn iterate_threads(program: BorrowedFd<'_>, pid: u32) -> io::Result<OwnedFd> {
    let filter = TaskFilter { tid: 0, pid, pid_fd: 0 };
    let link = bpf_fd(
        BPF_LINK_CREATE,
        &IteratorLink {
            program: program.as_raw_fd() as u32,
            attach: ATTACH_ITERATOR,
            info: std::ptr::from_ref(&filter) as u64,
            info_size: size_of::<TaskFilter>() as u32,
            ..IteratorLink::default()
        },
    )?;
    // The iterator holds the link for as long as it needs it.
    bpf_fd(BPF_ITER_CREATE, &[link.as_raw_fd() as u32, 0])
}

/// Attaches a raw tracepoint program.
pub fn open_raw_tracepoint(program: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        name: u64,
        program: u32,
        reserved: u32,
    }
    bpf_fd(
        BPF_RAW_TRACEPOINT_OPEN,
        &Attributes { name: name.as_ptr() as u64, program: program.as_raw_fd() as u32, reserved: 0 },
    )
}

/// Many uprobes of one file as one link.
pub fn link_uprobes(
    program: BorrowedFd<'_>,
    path: &CStr,
    offsets: &[u64],
    cookies: &[u64],
    pid: u32,
) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        attach: u32,
        flags: u32,
        path: u64,
        offsets: u64,
        reference_counters: u64,
        cookies: u64,
        count: u32,
        multi_flags: u32,
        pid: u32,
        reserved: u32,
    }
    if offsets.len() != cookies.len() {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    bpf_fd(
        BPF_LINK_CREATE,
        &Attributes {
            program: program.as_raw_fd() as u32,
            target: 0,
            attach: ATTACH_UPROBE_MULTI,
            flags: 0,
            path: path.as_ptr() as u64,
            offsets: offsets.as_ptr() as u64,
            reference_counters: 0,
            cookies: cookies.as_ptr() as u64,
            count: u32::try_from(offsets.len()).unwrap_or(u32::MAX),
            multi_flags: 0,
            pid,
            reserved: 0,
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verifiers_reason_is_found_behind_its_statistics() {
        let log = "0: R1=ctx()\ninvalid bpf_context access off=128 size=8\nprocessed 3 insns\n\n";
        assert_eq!(last_words(log), "invalid bpf_context access off=128 size=8");
        assert_eq!(last_words(""), "");
    }

    #[test]
    fn attributes_lie_where_the_kernel_reads_them() {
        // include/uapi/linux/bpf.h: union bpf_attr, BPF_PROG_LOAD.
        assert_eq!(std::mem::offset_of!(LoadAttributes, name), 48);
        assert_eq!(std::mem::offset_of!(LoadAttributes, attach), 68);
        assert_eq!(std::mem::offset_of!(LoadAttributes, target), 108);
    }
}
