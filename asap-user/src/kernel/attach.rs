//! Puts a uprobe program on places of one file, for one process: one link for all places (Linux 6.6, `uprobe_multi`), which can be
//! pinned. A perf event for each place would do on older kernels, but takes about 100 ms a piece to detach, and can't be.

use super::{
    KernelError, object,
    syscall::{self, ATTACH_UPROBE_MULTI, PROGRAM_UPROBE, ProgramType},
};
use aya::maps::MapData;
use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

/// Where probes go.
pub struct Places<'a> {
    /// The only process that is affected, all its threads; `None`: all that map the file.
    pub pid: Option<i32>,
    /// A path that leads to the mapped file itself, such as one of `/proc/PID/map_files`.
    pub file: &'a Path,
    /// Offsets in the file, of first bytes of instructions.
    pub offsets: &'a [u64],
    /// What the program is told at each.
    pub cookies: &'a [u64],
}

/// Loads `program` with these maps and attaches it. It is detached when the link is closed.
pub fn attach(program: &'static str, maps: &[(&str, &MapData)], places: &Places<'_>) -> Result<OwnedFd, KernelError> {
    let unusable = |reason: &str| KernelError::File { file: places.file.to_owned(), reason: reason.to_owned() };
    if places.offsets.is_empty() || places.offsets.len() != places.cookies.len() {
        return Err(unusable("no place in it was named"));
    }
    let path = CString::new(places.file.as_os_str().as_bytes()).map_err(|_| unusable("its name holds a 0 byte"))?;
    let failed = |source: io::Error| KernelError::Attach {
        program,
        place: format!("{} places in {}", places.offsets.len(), places.file.display()),
        source,
    };
    let pid = match places.pid {
        // To the kernel 0 means all.
        Some(pid) => u32::try_from(pid)
            .ok()
            .filter(|&pid| pid != 0)
            .ok_or_else(|| failed(io::Error::from_raw_os_error(libc::ESRCH)))?,
        None => 0,
    };
    let what = ProgramType { kind: PROGRAM_UPROBE, attach: ATTACH_UPROBE_MULTI, ..ProgramType::default() };
    let loaded = object::load_program(program, maps, what)?;
    syscall::link_uprobes(loaded.as_fd(), &path, places.offsets, places.cookies, pid).map_err(failed)
}
