//! Text pages whose entries have probes of the kernel's instead of jumps of ours (`--mechanism redirect`): an eBPF program writes the
//! instruction pointer of the thread that comes by.
//!
//! The kernel knows a probe by file and offset, and sets it in every process that maps them. So the page is that of a file which
//! only the target has: a memfd. Children that it forks map the file, too, and have the probes from their first instruction; no
//! other process is touched. The link is pinned, or the probes would go with the agent and the old code come back at any moment
//! (P3, P1). Where it is lost in spite of that, the kernel takes the breakpoint out, and what it leaves is the old function.
//!
//! Every hit is sent elsewhere: nothing is ever single-stepped, and the target never gets the mapping `[uprobes]` (P5).
//!
//! Not for deciding when a page is moved into place, which goes as with all others.

use super::{
    ledger::ChangedPage,
    process::{TargetProcess, explain, gone},
};
use crate::{
    address::{PAGE_SIZE, TargetAddr},
    process::{
        info,
        locked::Lock,
        maps::{Mapping, Maps},
        pages, userfault,
    },
    report::Failure,
};
use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, FileExt},
    },
    path::{Path, PathBuf},
};

/// How the kernel names such a page in the memory map of the target; a number of its own follows.
pub const NAME: &str = "/memfd:asap-redirect-";
/// Where links are pinned, each under the name of its page's file.
const PINS: &str = "/sys/fs/bpf/asap";
const BPF_FILE_SYSTEM: &str = "/sys/fs/bpf";
/// `BPF_FS_MAGIC` (linux/magic.h).
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// What a page is to hold.
pub struct Content<'a> {
    /// Its bytes without the breakpoints.
    pub bytes: &'a [u8],
    /// Its bytes with them.
    pub shown: &'a [u8],
    /// Entries on the page, and where calls of them go.
    pub probes: &'a [(TargetAddr, TargetAddr)],
}

/// Whether links can be pinned here.
///
/// # Errors
/// There is no BPF file system.
pub fn check_pins() -> Result<(), Failure> {
    let kind = nix::sys::statfs::statfs(BPF_FILE_SYSTEM).map(|found| found.filesystem_type().0);
    if kind == Ok(BPF_FS_MAGIC) {
        return Ok(());
    }
    Err(Failure::refused(
        format!(
            "calls can't be redirected: there is no BPF file system at {BPF_FILE_SYSTEM}, and without it they would go to the old code again when the agent ends"
        ),
        format!("mount it (mount -t bpf bpf {BPF_FILE_SYSTEM}), or use --mechanism auto"),
    ))
}

/// Lays a page ready for the place of `page`, with its probes set.
///
/// # Errors
/// The kernel refuses the memory, the program or the pin; nothing is left.
pub fn lay(
    process: &mut TargetProcess,
    page: TargetAddr,
    content: &Content<'_>,
    lock: Option<Lock>,
) -> Result<TargetAddr, Failure> {
    check_pins()?;
    let pid = process.pid;
    let refused = |what: &str, error: &dyn std::fmt::Display| {
        Failure::refused(
            format!("calls can't be redirected in process {pid}: {what}: {error}"),
            "use --mechanism auto; see `asap doctor`",
        )
    };
    let number = getrandom::u64().map_err(|error| refused("a name for its page", &error))?;
    let name = format!("asap-redirect-{number:016x}");
    let scratch = process.puppet.scratch();
    process.memory.write(scratch, format!("{name}\0").as_bytes()).map_err(|error| gone(pid, error))?;
    let arguments = [scratch.0, u64::from(libc::MFD_CLOEXEC), 0, 0, 0, 0];
    let in_puppet = process.puppet.syscall("memfd_create", libc::SYS_memfd_create, arguments);
    let in_puppet = in_puppet.map_err(|error| explain(pid, error))?;
    let filled = process.puppet.fd_of(in_puppet).map(File::from).and_then(|file| {
        file.write_all_at(content.bytes, 0)?;
        Ok(file)
    });
    let mapped = userfault::map_text(&mut process.puppet, in_puppet, 0, PAGE_SIZE, None);
    let closed = process.puppet.syscall("close", libc::SYS_close, [in_puppet, 0, 0, 0, 0, 0]);
    let at = mapped.map_err(|error| explain(pid, error))?;
    crate::fault::point("redirect.mapped");
    let pin = Path::new(PINS).join(&name);
    let ready = closed.map_err(|error| explain(pid, error)).and_then(|_| {
        let file = filled.map_err(|error| refused("filling its page", &error))?;
        probe(process, &file, page, content.probes, &pin)?;
        crate::fault::point("redirect.pinned");
        let shown = pages::content(&process.memory, at).map_err(|error| gone(pid, error))?;
        if shown != content.shown {
            return Err(refused("the kernel did not set the breakpoints", &"its page is not as expected"));
        }
        lock.map_or(Ok(()), |lock| lock.lock(&mut process.puppet, at).map_err(|error| explain(pid, error)))
    });
    match ready {
        Ok(()) => Ok(at),
        Err(failure) => {
            let _ = pages::unmap(&mut process.puppet, at, PAGE_SIZE);
            let _ = fs::remove_file(&pin);
            Err(failure)
        }
    }
}

/// Sets the probes of a page, and pins what keeps them set.
fn probe(
    process: &TargetProcess,
    file: &File,
    page: TargetAddr,
    probes: &[(TargetAddr, TargetAddr)],
    pin: &Path,
) -> Result<(), Failure> {
    let pid = process.pid;
    let refused = |reason: String| {
        Failure::refused(
            format!("calls can't be redirected in process {pid}: {reason}"),
            "use --mechanism auto; see `asap doctor`",
        )
    };
    let ebpf = process.ebpf.as_ref().ok_or_else(|| refused("there is no eBPF on this system".to_owned()))?;
    let from_to: Vec<(u64, u64)> = probes.iter().map(|(at, to)| (at.0.wrapping_sub(page.0), to.0)).collect();
    make_folder().map_err(|error| refused(format!("{PINS} can't be made: {error}")))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let linked = ebpf.redirect_file(pid, &path, &from_to).and_then(|link| link.pin(pin));
    linked.map_err(|error| refused(error.to_string()))
}

fn make_folder() -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(PINS) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// `maps` with the files of `pages` at the places of those that have probes.
#[must_use]
pub fn as_files(maps: Maps, pages: &[ChangedPage]) -> Maps {
    let behind = |mapping: &Mapping| {
        let known = pages.iter().find(|known| known.page == mapping.range.start)?;
        let spare = maps.at(known.spare)?;
        let file_offset = spare.file_offset + (known.spare.0 - spare.range.start.0);
        Some(Mapping { range: mapping.range.clone(), file_offset, ..spare.clone() })
    };
    if !maps.0.iter().any(|mapping| mapping.name.starts_with(NAME)) {
        return maps;
    }
    let mut shown: Vec<Mapping> = Vec::new();
    for mapping in &maps.0 {
        let file = if mapping.name.starts_with(NAME) { behind(mapping) } else { None };
        let mapping = file.unwrap_or_else(|| mapping.clone());
        match shown.last_mut() {
            Some(last) if goes_on(last, &mapping) => last.range.end = mapping.range.end,
            _ => shown.push(mapping),
        }
    }
    Maps(shown)
}

/// Whether the two would be one mapping, had neither ever been exchanged.
fn goes_on(first: &Mapping, second: &Mapping) -> bool {
    let protection = |mapping: &Mapping| (mapping.readable, mapping.writable, mapping.executable, mapping.shared);
    first.is_file()
        && first.range.end == second.range.start
        && (first.inode, &first.device) == (second.inode, &second.device)
        && protection(first) == protection(second)
        && first.file_offset + first.len() == second.file_offset
}

/// Removes the pins of pages that no process maps any more.
pub fn sweep() {
    let Ok(pins) = fs::read_dir(PINS) else { return };
    let pins: Vec<PathBuf> = pins.flatten().map(|pin| pin.path()).collect();
    if !pins.is_empty() {
        let Ok(mapped) = mapped() else { return };
        for pin in pins {
            let is_mapped = pin.file_name().is_some_and(|name| mapped.contains(&*name.to_string_lossy()));
            if !is_mapped && let Err(error) = fs::remove_file(&pin) {
                tracing::warn!(pin = %pin.display(), %error, "a pin stays");
            }
        }
    }
    let _ = fs::remove_dir(PINS);
}

/// The names of all files of such pages that some process maps.
fn mapped() -> io::Result<HashSet<String>> {
    let mut found = HashSet::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        let tid = info::living_thread(pid).unwrap_or(pid);
        let maps = match fs::read(format!("/proc/{tid}/maps")) {
            Ok(maps) => maps,
            // It has ended.
            Err(error) if [Some(libc::ESRCH), Some(libc::ENOENT)].contains(&error.raw_os_error()) => continue,
            // Who can't be looked at may map it.
            Err(error) => return Err(error),
        };
        for line in String::from_utf8_lossy(&maps).lines() {
            if let Some((_, name)) = line.split_once("/memfd:")
                && let Some(name) = name.split(' ').next().filter(|name| name.starts_with("asap-redirect-"))
            {
                found.insert(name.to_owned());
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_with_probes_are_shown_as_those_of_their_files() {
        let maps = Maps::parse(
            "\
555555554000-555555556000 r--p 00000000 fe:00 123                        /usr/sbin/a
555555556000-555555558000 r-xp 00002000 fe:00 123                        /usr/sbin/a
555555558000-555555559000 r-xp 00000000 00:01 7                          /memfd:asap-redirect-0123456789abcdef (deleted)
555555559000-55555555a000 r-xp 00005000 fe:00 123                        /usr/sbin/a
55555555b000-55555555c000 r-xp 00000000 00:01 8                          /memfd:asap-redirect-fedcba9876543210 (deleted)
7f0000002000-7f0000003000 r-xp 00004000 fe:00 123                        /usr/sbin/a
",
        );
        let known = ChangedPage { page: TargetAddr(0x5555_5555_8000), spare: TargetAddr(0x7f00_0000_2000) };
        let shown = as_files(maps.clone(), &[known]);
        let ranges: Vec<_> = shown.0.iter().map(|m| (m.range.start.0, m.len(), m.file_offset, m.inode)).collect();
        assert_eq!(
            ranges,
            [
                (0x5555_5555_4000, 0x2000, 0, 123),
                (0x5555_5555_6000, 0x4000, 0x2000, 123),
                // Nobody knows this one: an agent died before it was moved into place.
                (0x5555_5555_b000, 0x1000, 0, 8),
                (0x7f00_0000_2000, 0x1000, 0x4000, 123),
            ]
        );
        assert_eq!(shown.0[1].map_file(9), "/proc/9/map_files/555555556000-555555558000");
        assert_eq!(as_files(maps.clone(), &[]), maps);
    }
}
