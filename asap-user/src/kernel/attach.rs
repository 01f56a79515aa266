//! Puts a uprobe program on places of one file, for one process. One link for all places where the kernel has
//! `uprobe_multi` (Linux 6.6), else a perf event for each, which takes about 100 ms a piece to detach.

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

/// Kernel number of the perf event source for uprobes.
const UPROBE_SOURCE: &str = "/sys/bus/event_source/devices/uprobe/type";

/// How probes are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// All places as one link.
    Multi,
    /// A perf event for each place.
    Single,
}

/// Where probes go.
pub struct Places<'a> {
    /// The only process that is affected, all its threads.
    pub pid: i32,
    /// A path that leads to the mapped file itself, such as one of `/proc/PID/map_files`.
    pub file: &'a Path,
    /// Offsets in the file, of first bytes of instructions.
    pub offsets: &'a [u64],
    /// What the program is told at each.
    pub cookies: &'a [u64],
}

/// An attached program; detaches when dropped.
#[derive(Debug)]
pub struct Attached {
    /// How it was done.
    pub method: Method,
    /// What holds it in place.
    pub links: Vec<OwnedFd>,
}

/// Loads `program` with these maps and attaches it, in the best way the kernel has.
pub fn attach(program: &'static str, maps: &[(&str, &MapData)], places: &Places<'_>) -> Result<Attached, KernelError> {
    match attach_by(Method::Multi, program, maps, places) {
        // What the kernel does not know of is an invalid argument to it.
        Err(KernelError::Attach { source, .. } | KernelError::Program { source, .. })
            if source.raw_os_error() == Some(libc::EINVAL) =>
        {
            attach_by(Method::Single, program, maps, places)
        }
        other => other,
    }
}

/// As [`attach`], in one given way.
pub fn attach_by(
    method: Method,
    program: &'static str,
    maps: &[(&str, &MapData)],
    places: &Places<'_>,
) -> Result<Attached, KernelError> {
    let unusable = |reason: &str| KernelError::File { file: places.file.to_owned(), reason: reason.to_owned() };
    if places.offsets.is_empty() || places.offsets.len() != places.cookies.len() {
        return Err(unusable("no place in it was named"));
    }
    let path = CString::new(places.file.as_os_str().as_bytes()).map_err(|_| unusable("its name holds a 0 byte"))?;
    let failed = |source: io::Error| KernelError::Attach {
        program,
        place: format!("{} places in {} for process {}", places.offsets.len(), places.file.display(), places.pid),
        source,
    };
    let pid = u32::try_from(places.pid)
        .ok()
        .filter(|&pid| pid != 0)
        .ok_or_else(|| failed(io::Error::from_raw_os_error(libc::ESRCH)))?;
    let attach_type = if method == Method::Multi { ATTACH_UPROBE_MULTI } else { 0 };
    let what = ProgramType { kind: PROGRAM_UPROBE, attach: attach_type, ..ProgramType::default() };
    let loaded = object::load_program(program, maps, what)?;
    let links = match method {
        Method::Multi => {
            let link = syscall::link_uprobes(loaded.as_fd(), &path, places.offsets, places.cookies, pid);
            vec![link.map_err(failed)?]
        }
        Method::Single => {
            let source = uprobe_source().map_err(failed)?;
            let mut links = Vec::with_capacity(places.offsets.len() * 2);
            for (&offset, &cookie) in places.offsets.iter().zip(places.cookies) {
                let event = syscall::open_uprobe_event(source, &path, offset, places.pid).map_err(failed)?;
                links.push(syscall::link_perf_event(loaded.as_fd(), event.as_fd(), cookie).map_err(failed)?);
                links.push(event);
            }
            links
        }
    };
    Ok(Attached { method, links })
}

fn uprobe_source() -> io::Result<u32> {
    let text = std::fs::read_to_string(UPROBE_SOURCE)?;
    text.trim().parse().map_err(|_| io::Error::other(format!("{UPROBE_SOURCE} holds no number")))
}
